"""Calls that launch every configuration of causal_conv1d and gated_delta_rule, for the compile test."""

import torch

from minisft.kernels.causal_conv1d import causal_conv1d
from minisft.kernels.gated_delta_rule import gated_delta_rule


def causal_conv1d_cases(arch: int) -> None:
    x = torch.empty(64, 6144, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.empty(6144, 4, requires_grad=True)
    start = torch.empty(64, dtype=torch.int32)
    causal_conv1d(x, weight, None, start, activation="silu").backward(torch.empty_like(x))


def gated_delta_rule_cases(arch: int) -> None:
    """The heads of Qwen3.5."""
    rule(128, 128)
    if arch == 90:
        rule(128, 128, torch.float32)


def rule(Dk: int, Dv: int, dtype=torch.bfloat16) -> None:
    q, k = torch.empty(2, 64, 4, Dk, dtype=dtype, requires_grad=True).unbind()
    v = torch.empty(64, 8, Dv, dtype=dtype, requires_grad=True)
    g, beta = torch.empty(2, 64, 8, requires_grad=True).unbind()
    start, end = torch.tensor([[0], [64]], dtype=torch.int32).expand(2, 64)
    out = gated_delta_rule(q, k, v, g, beta, start, end)
    out.backward(torch.empty_like(out))
