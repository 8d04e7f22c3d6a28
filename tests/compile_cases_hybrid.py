"""Calls that launch every configuration of causal_conv1d, for the compile test."""

import torch

from minisft.kernels.causal_conv1d import causal_conv1d


def causal_conv1d_cases(arch: int) -> None:
    """The configurations do not depend on the architecture: sm_90, and sm_86 for the memory of 120."""
    if arch in (86, 90):
        x = torch.empty(64, 6144, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(6144, 4, requires_grad=True)
        start = torch.empty(64, dtype=torch.int32)
        causal_conv1d(x, weight, None, start, activation="silu").backward(torch.empty_like(x))
