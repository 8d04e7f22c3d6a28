"""How fast is the gated delta rule over packed documents, and over one long one?

    python -m benchmarks.bench_gated_delta_rule [--device cpu|cuda] [--quick] [--out DIR]

FLOPs as the chunked form needs them at least, with chunks of 64: a token costs 2 (64 (Hk Dk + Hv Dv) + 3 Hv Dk Dv) forward, for
the halves of the products inside the chunk that are not hidden and for the three with the state; twice that backward. Bytes:
read q, k, v, g and beta, write the output; backward, read these and the output's gradient and write five gradients.

"transformers" is the torch function that transformers falls back to where the package fla is not installed, "fla" that package.
transformers gets one document at a time, which is what it computes correctly.
"""

import torch

from benchmarks.bench_flash_attention import document_lengths
from benchmarks.compare import Case, main, normal, ours
from minisft.kernels.gated_delta_rule import gated_delta_rule


def costs(T: int, Hk: int, Hv: int, Dk: int, Dv: int, itemsize: int) -> dict:
    flops = 2 * T * (64 * (Hk * Dk + Hv * Dv) + 3 * Hv * Dk * Dv)
    tensors = T * (itemsize * (2 * Hk * Dk + Hv * Dv) + 4 * 2 * Hv)
    out = T * itemsize * Hv * Dv
    return {"forward": (tensors + out, flops), "backward": (2 * tensors + out, 2 * flops)}


def rule(q, k, v, g, beta, start, end, cu, lengths):
    return gated_delta_rule(q, k, v, g, beta, start, end)


def transformers():
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    def run(q, k, v, g, beta, start, end, cu, lengths):
        documents = zip(*(x.split(lengths) for x in (q, k, v, g, beta)))
        outputs = [
            torch_chunk_gated_delta_rule(*(x[None] for x in one), use_qk_l2norm_in_kernel=True) for one in documents
        ]
        return torch.cat([out[0] for out, _ in outputs])

    return run


def fla():
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def run(q, k, v, g, beta, start, end, cu, lengths):
        group = v.shape[1] // k.shape[1]
        q, k = (x.repeat_interleave(group, dim=1) for x in (q, k))
        tensors = [x[None] for x in (q, k, v, g, beta)]
        return chunk_gated_delta_rule(*tensors, cu_seqlens=cu.long(), use_qk_l2norm_in_kernel=True)[0][0]

    return run


def inputs_of(lengths: list[int], Hk: int, Hv: int, Dk: int, Dv: int, dtype: torch.dtype) -> list:
    T, counts = sum(lengths), torch.tensor(lengths)
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu[1:] = counts.cumsum(0)
    start, end = (bound.repeat_interleave(counts, output_size=T) for bound in (cu[:-1], cu[1:]))
    q, k, v = (normal(T, heads, D, dtype=dtype) for heads, D in ((Hk, Dk), (Hk, Dk), (Hv, Dv)))
    # The decay of a new Qwen3.5: between 0.001 and 16 a token, by head.
    rate = torch.linspace(-7, 2.8, Hv).exp()
    g = (-rate * torch.rand(T, Hv)).requires_grad_()
    return [q, k, v, g, torch.rand(T, Hv).requires_grad_(), start, end, cu, lengths]


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    if gpu:  # heads of Qwen3.5-0.8B and of 4B
        sizes = [(16384, mean, 16, Hv, bf16) for Hv in (16, 32) for mean in (300, 2048)] + [
            (16384, 16384, 16, 32, bf16)
        ]
    else:
        sizes = [
            (2048, 300, 16, 16, bf16),
            (2048, 300, 16, 16, fp32),
            (2048, 300, 16, 32, fp32),
            (2048, 2048, 16, 16, fp32),
        ]
    found = []
    for T, mean, Hk, Hv, dtype in sizes:
        Dk = Dv = 128
        if quick:
            T, mean, Hk, Hv, Dk, Dv = 96, 96 if T == mean else 30, 1, Hv // Hk, 16, 16
        lengths = document_lengths(T, mean)
        contenders = ours(device, rule, eager=T <= 256) | {"transformers": transformers, "fla": fla}
        if not gpu:
            del contenders["fla"]
        kind = "packed" if len(lengths) > 1 else "one document"
        size = f"mean length {T / len(lengths):.0f}, " if len(lengths) > 1 else ""
        name = f"{kind}, {size}{T} tokens, {Hk} + {Hv} heads of {Dk}, {'bf16' if dtype == bf16 else 'fp32'}"

        def inputs(lengths=lengths, Hk=Hk, Hv=Hv, Dk=Dk, Dv=Dv, dtype=dtype):
            return inputs_of(lengths, Hk, Hv, Dk, Dv, dtype)

        found.append(Case("gated_delta_rule", name, inputs, contenders, costs(T, Hk, Hv, Dk, Dv, dtype.itemsize)))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
