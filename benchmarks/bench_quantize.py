"""How near are 4-bit and 8-bit quantisation and their way back to the speed of memory?

    python -m benchmarks.bench_quantize [--device cpu|cuda] [--quick] [--out DIR]

At least they must read one form and write the other: of n weights, n bytes times their size, and n / 2 bytes of nibbles with
one byte for every 64 of them (double quantisation), or n bytes of integers. Bitsandbytes gets the same weight.
"""

import torch

from benchmarks.compare import Case, main, normal, ours
from minisft.kernels.quantize import dequantize_int8, dequantize_nf4, quantize_int8, quantize_nf4


def bytes_moved(n: int, itemsize: int, bits: int) -> dict:
    packed = n / 2 + n / 64 + 4 * n / 64 / 256 if bits == 4 else n
    return {"forward": (n * itemsize + packed, 0)}


def fields(op):
    """The result of a quantisation as tensors."""

    def run(w):
        q = op(w)
        return (q.values, q.absmax) if hasattr(q, "values") else (q.packed, q.absmax)

    return run


def bnb_quantize():
    from bitsandbytes.functional import quantize_4bit

    def run(w):
        packed, state = quantize_4bit(w, quant_type="nf4", compress_statistics=True)
        return packed, state.absmax

    return run


def bnb_dequantize():
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made = []

    def run(_, w):
        if not made:
            made.extend(quantize_4bit(w, quant_type="nf4", compress_statistics=True))
        return dequantize_4bit(*made)

    return run


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16 = device == "cuda", torch.bfloat16
    rows, columns = (8192, 28672) if gpu else (1024, 2048)
    if quick:
        rows, columns = 32, 256

    def weight():
        return [normal(rows, columns, scale=0.02).detach()]

    def quantised(op):
        w = weight()[0]
        return [op(w), w]

    def way_back(op):
        return lambda q, _: op(q)

    n, name = rows * columns, f"{rows} x {columns} bf16"
    nf4, int8 = (bytes_moved(n, bf16.itemsize, bits) for bits in (4, 8))
    eager = not gpu or quick  # the references go from block to block in Python
    peers = [{"bitsandbytes": peer} if gpu else {} for peer in (bnb_quantize, bnb_dequantize)]
    return [
        Case(
            "dequantize_nf4",
            name,
            lambda: quantised(quantize_nf4),
            ours(device, way_back(dequantize_nf4)) | peers[1],
            nf4,
        ),
        Case("quantize_nf4", name, weight, ours(device, fields(quantize_nf4), eager) | peers[0], nf4),
        Case(
            "dequantize_int8",
            name,
            lambda: quantised(quantize_int8),
            ours(device, way_back(dequantize_int8), eager),
            int8,
        ),
        Case("quantize_int8", name, weight, ours(device, fields(quantize_int8), eager), int8),
    ]


if __name__ == "__main__":
    main(__doc__, cases)
