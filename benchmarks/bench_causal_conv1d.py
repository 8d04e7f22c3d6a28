"""How near is the short causal convolution with SiLU to the speed of memory?

    python -m benchmarks.bench_causal_conv1d [--device cpu|cuda] [--quick] [--out DIR]

At least it must read x and write y; backward, read x and dy and write dx. "F.conv1d" is what transformers computes without the
package causal_conv1d, document by document, as it knows one only; "fla" has a kernel of its own for packed rows.
"""

import torch
import torch.nn.functional as F

from benchmarks.bench_flash_attention import document_lengths
from benchmarks.compare import Case, main, normal, ours
from minisft.kernels.causal_conv1d import causal_conv1d


def conv(x, weight, start, cu, lengths):
    return causal_conv1d(x, weight, None, start, activation="silu")


def torch_conv():
    def run(x, weight, start, cu, lengths):
        (C, K), outputs = weight.shape, []
        for document in x.split(lengths):
            out = F.conv1d(document.T[None], weight[:, None], padding=K - 1, groups=C)
            outputs.append(F.silu(out[0, :, : len(document)]).T)
        return torch.cat(outputs)

    return run


def fla():
    from fla.modules.convolution import causal_conv1d as theirs

    def run(x, weight, start, cu, lengths):
        return theirs(x[None], weight, activation="silu", cu_seqlens=cu.long())[0][0]

    return run


def cases(device: str, quick: bool) -> list[Case]:
    gpu, bf16, fp32 = device == "cuda", torch.bfloat16, torch.float32
    sizes = [(16384, 6144, bf16), (16384, 8192, bf16)] if gpu else [(2048, 6144, bf16), (2048, 6144, fp32)]
    found = []
    for T, C, dtype in sizes:
        if quick:
            T, C = 90, 24
        lengths = document_lengths(T, T // 7)
        name = f"{T} tokens in {len(lengths)} documents, {C} channels, {'bf16' if dtype == bf16 else 'fp32'}"

        def inputs(lengths=lengths, T=T, C=C, dtype=dtype):
            counts = torch.tensor(lengths)
            cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
            cu[1:] = counts.cumsum(0)
            return [
                normal(T, C, dtype=dtype),
                normal(C, 4, dtype=dtype),
                cu[:-1].repeat_interleave(counts, output_size=T),
                cu,
                lengths,
            ]

        contenders = ours(device, conv) | {"F.conv1d": torch_conv} | ({"fla": fla} if gpu else {})
        moved = T * C * dtype.itemsize
        costs = {"forward": (2 * moved, 0), "backward": (3 * moved, 0)}
        found.append(Case("causal_conv1d", name, inputs, contenders, costs))
    return found


if __name__ == "__main__":
    main(__doc__, cases)
