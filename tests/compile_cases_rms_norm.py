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
    """All sizes on sm_90; elsewhere, as the entries do not depend on the architecture, one."""
    sizes = {size for table in CONFIGS.values() for size in table} if arch == 90 else {4096}
    for size in sorted(sizes):
        x = torch.empty(4, size, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(size, requires_grad=True)
        rms_norm(x, weight, 1e-5).backward(torch.empty_like(x))
    if arch == 90:
        y, total = add_rms_norm(x, x.detach(), weight, 1e-5)
        torch.autograd.backward([y, total], [torch.empty_like(y), torch.empty_like(y)])
