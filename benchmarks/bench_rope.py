"""How near is the rotary embedding, alone and with the norms of q and k, to the speed of memory?

    python -m benchmarks.bench_rope [--device cpu|cuda] [--quick] [--out DIR]

At least it must read and write q and k, forward and backward. With the norms the backward also reads what was normalised.
"""

import torch

from benchmarks.compare import Case, main, normal, ours
from minisft.kernels.rope import rope


def bytes_moved(T: int, heads: int, head_dim: int, itemsize: int, norms: bool) -> dict:
    size = T * heads * head_dim * itemsize
    return {"forward": (2 * size, 0), "backward": ((3 if norms else 2) * size, 0)}


def with_norms(q, k, cos, sin, q_weight, k_weight):
    return rope(q, k, cos, sin, q_norm=(q_weight, 1e-6, 0.0), k_norm=(k_weight, 1e-6, 0.0))


def liger():
    """Theirs takes [1, heads, T, head_dim] and a table of the full width; it writes over its inputs."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def run(q, k, cos, sin):
        cos, sin = (torch.cat((table, table), -1)[None] for table in (cos, sin))
        q, k = (x.transpose(0, 1)[None] for x in (q, k))
        return tuple(x[0].transpose(0, 1) for x in LigerRopeFunction.apply(q, k, cos, sin))

    return run


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    sizes = [(16384, 32, 8, 128, bf16)] if gpu else [(4096, 32, 8, 64, bf16), (4096, 32, 8, 64, fp32)]
    found = []
    for T, Hq, Hkv, Dh, dtype in [(64, 4, 2, 32, size[-1]) for size in sizes] if quick else sizes:

        def plain(T=T, Hq=Hq, Hkv=Hkv, Dh=Dh, dtype=dtype):
            angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(Dh // 2) / (Dh // 2))  # [T, Dh / 2]
            q, k = (normal(T, heads, Dh, dtype=dtype) for heads in (Hq, Hkv))
            return [q, k, angles.cos().to(dtype), angles.sin().to(dtype)]

        def normed(plain=plain, Dh=Dh, dtype=dtype):
            return plain() + [normal(Dh, dtype=dtype), normal(Dh, dtype=dtype)]

        name = f"{T} tokens, {Hq} + {Hkv} heads of {Dh}, {'bf16' if dtype == bf16 else 'fp32'}"
        costs = [bytes_moved(T, Hq + Hkv, Dh, dtype.itemsize, norms) for norms in (False, True)]
        found.append(Case("rope", name, plain, ours(device, rope) | ({"liger": liger} if gpu else {}), costs[0]))
        found.append(Case("rope with norms", name, normed, ours(device, with_norms), costs[1]))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
