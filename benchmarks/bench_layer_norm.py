"""How near is LayerNorm to the speed of memory?

    python -m benchmarks.bench_layer_norm [--device cpu|cuda] [--quick] [--out DIR]

At least it must read x and write y; backward, read x and dy and write dx.
"""

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, main, normal, ours
from minisft.kernels.layer_norm import layer_norm

EPS = 1e-5


def bytes_moved(T: int, D: int, itemsize: int) -> dict:
    return {"forward": (2 * T * D * itemsize, 0), "backward": (3 * T * D * itemsize, 0)}


def torch_nn():
    return lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPS)


def liger():
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS)


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    sizes = [(16384, 4096, bf16)] if gpu else [(4096, 2048, bf16), (4096, 2048, fp32)]
    found = []
    for T, D, dtype in [(64, 256, dtype) for *_, dtype in sizes] if quick else sizes:

        def inputs(T=T, D=D, dtype=dtype):
            return [normal(T, D, dtype=dtype), normal(D, dtype=dtype), normal(D, dtype=dtype)]

        contenders = ours(device, lambda x, w, b: layer_norm(x, w, b, EPS))
        contenders |= {"F.layer_norm": torch_nn, "liger": liger} if gpu else {}
        name = f"{T} x {D} {'bf16' if dtype == bf16 else 'fp32'}"
        found.append(Case("layer_norm", name, inputs, contenders, bytes_moved(T, D, dtype.itemsize)))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
