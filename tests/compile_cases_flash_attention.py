"""Calls that launch every configuration of flash_attention, for the compile test."""

import torch

from minisft.kernels.flash_attention import flash_attention


def attend(head_dim: int, dtype=torch.bfloat16, **options) -> None:
    """Forward and backward, with two query heads to a key head."""
    q, k, v = torch.empty(64, 8, head_dim, dtype=dtype, requires_grad=True).split([4, 2, 2], dim=1)
    start, end = torch.empty(2, 64, dtype=torch.int32)
    out = flash_attention(q, k, v, start, end, **options)
    out.backward(torch.empty_like(out))


def flash_attention_cases(arch: int) -> None:
    """The whole tables of 80, 86, 90 and 100; on 89 and 120, which have those of 86, what most models need."""
    for head_dim in {80: [64, 128, 256], 86: [64, 128, 256], 89: [128], 100: [64, 128], 120: [128]}.get(arch, []):
        attend(head_dim)
    if arch == 100:
        attend(256)
        attend(128, deterministic=True)
    if arch == 90:
        for head_dim in (64, 128):
            attend(head_dim, mean_length=300)
            attend(head_dim, mean_length=3000)
        for head_dim in (64, 96, 128, 256):
            attend(head_dim, deterministic=True)
        attend(256, window=512, softcap=50.0)
        attend(64, dropout=0.1)
        attend(64, dtype=torch.float32)
