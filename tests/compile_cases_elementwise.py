"""Calls that launch every configuration of layer_norm, rope and the gated linear units, for the compile test.

None of their configurations depends on the architecture: all are compiled for sm_90, one of each kernel for sm_86,
which has the instructions of 80 and the memory of 120.
"""

import torch

from minisft.kernels.glu import swiglu
from minisft.kernels.layer_norm import layer_norm
from minisft.kernels.rope import rope


def leaf(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


def layer_norm_cases(arch: int) -> None:
    for size in {86: [4096], 90: [1024, 4096, 8192, 16384]}.get(arch, []):
        x, weight, bias = leaf(4, size), leaf(size, dtype=torch.float32), leaf(size, dtype=torch.float32)
        layer_norm(x, weight, bias, 1e-5).backward(torch.empty_like(x))


def rope_cases(arch: int) -> None:
    """With norms, as the backward without them launches the forward's kernel."""
    for head_dim in {86: [128], 90: [64, 128, 256]}.get(arch, []):
        q, k, _ = leaf(64, 6, head_dim).split([4, 1, 1], dim=1)
        cos, sin = torch.empty(2, 64, head_dim // 2)
        norm = leaf(head_dim, dtype=torch.float32), 1e-6, 0.0
        outputs = rope(q, k, cos, sin, interleaved=head_dim == 64, q_norm=norm, k_norm=norm)
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])


def glu_cases(arch: int) -> None:
    if arch in (86, 90):
        gate, up = leaf(4, 4096), leaf(4, 4096)
        swiglu(gate, up).backward(torch.empty_like(up))
