"""How near is the linear cross-entropy to three matrix products, and how much memory does it take?

    python -m benchmarks.bench_linear_cross_entropy [--device cpu|cuda] [--quick] [--out DIR]

At least it must multiply the M scored rows with the vocabulary three times (logits, gradient of the hidden states, of the
weight): 6 M D V FLOPs. Ours and Liger's compute the gradients in the forward, so only "both" says something about all.
Memory stands beside the gradients that are returned and one fp32 gradient of the weight. In the last case one row in three
is scored, as in chat data; ours and TRL's multiply these alone, ours by an index that the loader has made, TRL's
by one found on the GPU, which waits for it.
"""

import torch

from benchmarks.compare import Case, main, normal, ours
from minisft.kernels.linear_cross_entropy import linear_cross_entropy

TRL_CHUNK = 32768  # its trainer's setting


def cost(M: int, D: int, V: int) -> dict:
    return {"both": (0, 6 * M * D * V)}


def returned_bytes(T: int, D: int, V: int, itemsize: int) -> int:
    return (T + V) * D * itemsize + V * D * 4


def scored(hidden, weight, labels, rows, targets):
    return linear_cross_entropy(hidden, weight, targets, rows=rows)


def liger(accum_dtype=None):
    def make():
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

        options = (None, None, -100, 0.0, 0.0, "sum", None, False, accum_dtype)
        return lambda hidden, weight, labels, *_: Function.apply(hidden, weight, labels, *options)[0]

    return make


def cut_cross_entropy(**options):
    def make():
        from cut_cross_entropy import linear_cross_entropy as cce

        return lambda hidden, weight, labels, *_: cce(hidden, weight, labels, reduction="sum", impl="cce", **options)

    return make


def trl():
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden, weight, labels, *_):
        mask = labels != -100
        options = (1.0, TRL_CHUNK, None, 1.0, ("log_probs",))
        return -ChunkedLogProbFunction.apply(hidden[mask], weight, None, labels[mask], *options)[0].sum()

    return run


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    if gpu:  # T, D, V, every nth row is scored
        sizes = [(4096, 4096, 128256, 1, bf16), (16384, 2048, 128256, 1, bf16), (12288, 4096, 128256, 3, bf16)]
    else:
        sizes = [(1024, 576, 49152, 1, bf16), (1024, 576, 49152, 1, fp32), (2048, 576, 49152, 3, bf16)]
    found = []
    for T, D, V, nth, dtype in [(48, 64, 384, *size[3:]) for size in sizes] if quick else sizes:

        def inputs(T=T, D=D, V=V, nth=nth, dtype=dtype):
            rows = torch.arange(0, T, nth)
            labels, targets = torch.full((T,), -100), torch.randint(V, rows.shape)
            labels[rows] = targets
            return [normal(T, D, dtype=dtype), normal(V, D, dtype=dtype, scale=D**-0.5), labels, rows, targets]

        peers = {
            "liger": liger(),
            "liger, fp32 sums": liger(torch.float32),
            "cut-cross-entropy": cut_cross_entropy(),
            "cut-cross-entropy, unfiltered": cut_cross_entropy(filter_eps=None),
            "trl": trl,
        }
        contenders = ours(device, scored, eager=T <= 4096) | (peers if gpu else {})
        name = f"{T} x {D} x {V} {'bf16' if dtype == bf16 else 'fp32'}" + (f", 1 row in {nth}" if nth > 1 else "")
        returned = returned_bytes(T, D, V, dtype.itemsize)
        found.append(Case("linear_cross_entropy", name, inputs, contenders, cost(T // nth, D, V), returned))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
