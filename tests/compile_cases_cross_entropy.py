"""Calls that launch every configuration of cross_entropy and linear_cross_entropy, for the compile test."""

import torch

from minisft.kernels.cross_entropy import cross_entropy
from minisft.kernels.linear_cross_entropy import linear_cross_entropy

OPTIONS = dict(softcap=30.0, logit_scale=0.5, label_smoothing=0.1, z_loss=1e-4, return_stats=True)


def cross_entropy_cases(arch: int) -> None:
    """The configurations do not depend on the architecture: all on sm_90, elsewhere one of each kernel."""
    if arch not in (86, 90):
        return
    hidden = torch.empty(4, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(4, dtype=torch.int64)
    linear_cross_entropy(hidden, head(128256), targets, rows=targets).backward()
    if arch == 90:  # the kernels run in the forward
        linear_cross_entropy(hidden, head(32000), targets)
        linear_cross_entropy(hidden, head(50257), targets, bias=head(50257)[:, 0].contiguous(), **OPTIONS)
        # the statistics of preference tuning: one pass, and beside a gradient where each thread has 64 registers
        linear_cross_entropy(hidden, head(50257), targets, reduction="none", return_stats="all")
        bias = head(50257)[:, 0].contiguous()
        linear_cross_entropy(hidden, head(50257), targets, bias=bias, **{**OPTIONS, "return_stats": "all"})
        logits = torch.empty(4, 128256, dtype=torch.bfloat16, requires_grad=True)
        cross_entropy(logits, targets).backward()
        cross_entropy(torch.empty(4, 50257, dtype=torch.bfloat16, requires_grad=True), targets).backward()


def head(vocabulary: int) -> torch.Tensor:
    return torch.empty(vocabulary, 16, dtype=torch.bfloat16)
