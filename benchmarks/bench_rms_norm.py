"""How near is RMSNorm, alone and with the residual addition, to the speed of memory?

    python -m benchmarks.bench_rms_norm [--device cpu|cuda] [--quick] [--out DIR]

At least it must read x and write y; backward, read x and dy and write dx. With the residual added: read two and write two
each way. "mixed" is a decoder's: a branch in bf16 is added to an fp32 residual, y is for products in bf16 and kept instead of
the sum. That moves 12 bytes a number forward and 14 backward.

"4 sublayers", on a GPU: four times a product, its addition to the residual stream and the norm of the sum. On paper a product
that adds hides what it moves for that behind its arithmetic, and the norm moves 6 bytes a number forward. If it hid nothing, both
ways would take the same time.
"""

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.compare import Case, backend, main, normal, ours
from minisft.kernels.linear import add_linear, linears
from minisft.kernels.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5
SUBLAYERS = 4


def bytes_moved(T: int, D: int, itemsize: int, residual: bool) -> dict:
    forward, backward = (4, 4) if residual else (2, 3)
    return {"forward": (forward * T * D * itemsize, 0), "backward": (backward * T * D * itemsize, 0)}


def liger():
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, EPS)


def liger_add():
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, residual, w: LigerFusedAddRMSNormFunction.apply(x, residual, w, EPS)


def torch_nn():
    return lambda x, w: F.rms_norm(x, w.shape, w, EPS)


def sublayers(x, total, weight, W, products_add: bool):
    """x [T, D] bf16, the residual stream [T, D] fp32, the weight of the norms [D], that of the products [D, D] bf16."""
    total = total.clone()
    for _ in range(SUBLAYERS):
        branch = add_linear(total, x, W) if products_add else linears(x, (W, None))[0]
        x, total = add_rms_norm(branch, total, weight, EPS, dtype=torch.bfloat16, keep="y")
    return x


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    sizes = [(16384, 4096, bf16), (16384, 2048, bf16)] if gpu else [(4096, 2048, bf16), (4096, 2048, fp32)]
    found = []
    for T, D, dtype in [(64, 256, dtype) for *_, dtype in sizes] if quick else sizes:
        name = f"{T} x {D} {'bf16' if dtype == bf16 else 'fp32'}"

        def alone(T=T, D=D, dtype=dtype):
            return [normal(T, D, dtype=dtype), normal(D, dtype=dtype)]

        def added(T=T, D=D, dtype=dtype):
            return [normal(T, D, dtype=dtype), normal(T, D, dtype=dtype), normal(D, dtype=dtype)]

        contenders = ours(device, lambda x, w: rms_norm(x, w, EPS))
        contenders |= {"F.rms_norm": torch_nn, "liger": liger} if gpu else {}
        found.append(Case("rms_norm", name, alone, contenders, bytes_moved(T, D, dtype.itemsize, False)))
        contenders = ours(device, lambda x, residual, w: add_rms_norm(x, residual, w, EPS))
        contenders |= {"liger": liger_add} if gpu else {}
        found.append(Case("add_rms_norm", name, added, contenders, bytes_moved(T, D, dtype.itemsize, True)))
    T, D, _ = sizes[-1]
    T, D = (64, 256) if quick else (T, D)

    def mixed():
        return [normal(T, D), normal(T, D, dtype=fp32), normal(D, dtype=fp32)]

    contenders = ours(device, lambda x, residual, w: add_rms_norm(x, residual, w, EPS, dtype=bf16, keep="y"))
    moved = {"forward": (12 * T * D, 0), "backward": (14 * T * D, 0)}
    found.append(Case("add_rms_norm", f"{T} x {D} mixed", mixed, contenders, moved))
    if not gpu:
        return found

    def chain():
        return [normal(T, D), normal(T, D, dtype=fp32), normal(D, dtype=fp32), normal(D, D, scale=D**-0.5)]

    contenders = {"triton": backend("triton", partial(sublayers, products_add=True))}
    contenders |= {"norms add": backend("triton", partial(sublayers, products_add=False))}
    products = 2 * T * D * D * SUBLAYERS
    moved = {"forward": (6 * T * D * SUBLAYERS, products), "backward": (14 * T * D * SUBLAYERS, 2 * products)}
    return [*found, Case("add_rms_norm", f"{T} x {D}, {SUBLAYERS} sublayers", chain, contenders, moved)]


if __name__ == "__main__":
    main(__doc__, cases)
