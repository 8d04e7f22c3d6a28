"""Calls that launch every configuration of RMSNorm, for the compile test."""

import torch

from minisft.kernels.rms_norm import MAX_FEATURES, add_rms_norm, rms_norm

FAMILIES = {
    "llama": {},
    "gemma": dict(offset=1.0, upcast_weight=True),
    "olmo2": dict(upcast_weight=True),
    "offset only": dict(offset=1.0),
}


def rms_norm_cases(arch: int) -> None:
    """All sizes on sm_90; one on every other card, for all the kernels that go row by row."""
    for size in (256, 1024, 4096, 8192) if arch == 90 else (4096,):
        x = torch.empty(4, size, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(size, requires_grad=True)
        rms_norm(x, weight, 1e-5).backward(torch.empty_like(x))
    mixed = {90: (4096, 8192, MAX_FEATURES), 86: (4096,)}  # as the decoder has it
    for size in mixed.get(arch, ()):
        residual, weight = torch.empty(4, size, requires_grad=True), torch.empty(size, requires_grad=True)
        branch = torch.empty(4, size, dtype=torch.bfloat16, requires_grad=True)
        outputs = add_rms_norm(branch, residual, weight, 1e-5, dtype=torch.bfloat16, keep="y")
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
