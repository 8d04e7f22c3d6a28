"""Calls that launch every configuration of RMSNorm, for the compile test."""

import torch

from minisft.kernels.rms_norm import CONFIGS, add_rms_norm, rms_norm

FAMILIES = {
    "llama": {},
    "gemma": dict(offset=1.0, upcast_weight=True),
    "olmo2": dict(upcast_weight=True),
    "offset only": dict(offset=1.0),
}


def rms_norm_cases(arch: int) -> None:
    """All sizes on sm_90; one on every other card, for all the kernels that go row by row."""
    forward, backward = CONFIGS.values()
    sizes = {*forward, *(row_bytes // 2 for row_bytes in backward if row_bytes <= 32768)} if arch == 90 else {4096}
    for size in sorted(sizes):
        x = torch.empty(4, size, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(size, requires_grad=True)
        rms_norm(x, weight, 1e-5).backward(torch.empty_like(x))
    mixed = {90: sizes, 86: {4096}}.get(arch, ())  # as the decoder calls it
    for size in sorted(mixed):
        residual, weight = torch.empty(4, size, requires_grad=True), torch.empty(size, requires_grad=True)
        branch = torch.empty(4, size, dtype=torch.bfloat16, requires_grad=True)
        outputs = add_rms_norm(branch, residual, weight, 1e-5, dtype=torch.bfloat16, keep="y")
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
