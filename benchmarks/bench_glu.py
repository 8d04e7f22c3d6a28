"""How near are SwiGLU and GeGLU to the speed of memory?

    python -m benchmarks.bench_glu [--device cpu|cuda] [--quick] [--out DIR]

At least they must read gate and up and write the product; backward, read both and the gradient and write two. The fused
case has gate and up side by side in one tensor, as the product of one stacked weight leaves them.
"""

import torch

from benchmarks.compare import Case, main, normal, ours
from minisft.kernels.glu import geglu, swiglu


def bytes_moved(T: int, F: int, itemsize: int) -> dict:
    return {"forward": (3 * T * F * itemsize, 0), "backward": (5 * T * F * itemsize, 0)}


def liger_swiglu():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def liger_fused():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda gate_up: LigerSiLUMulFunction.apply(*gate_up.chunk(2, -1))


def liger_geglu():
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    sizes = [(16384, 8192, bf16)] if gpu else [(2048, 5632, bf16), (2048, 5632, fp32)]
    found = []
    for T, F, dtype in [(64, 256, dtype) for *_, dtype in sizes] if quick else sizes:

        def apart(T=T, F=F, dtype=dtype):
            return [normal(T, F, dtype=dtype), normal(T, F, dtype=dtype)]

        def fused(T=T, F=F, dtype=dtype):
            return [normal(T, 2 * F, dtype=dtype)]

        name, costs = f"{T} x {F} {'bf16' if dtype == bf16 else 'fp32'}", bytes_moved(T, F, dtype.itemsize)
        for op, inputs, function, peer in [
            ("swiglu", apart, swiglu, liger_swiglu),
            ("swiglu, fused", fused, swiglu, liger_fused),
            ("geglu", apart, geglu, liger_geglu),
        ]:
            contenders = ours(device, function) | ({"liger": peer} if gpu else {})
            found.append(Case(op, name, inputs, contenders, costs))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
