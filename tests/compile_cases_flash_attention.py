"""Calls that launch every configuration of flash_attention, and every candidate of its sweep, for the compile test."""

from collections.abc import Mapping

import torch

from minisft.kernels.flash_attention import flash_attention
from minisft.kernels.flash_attention_configs import CANDIDATES, candidate


def attend(
    head_dim: int,
    dtype=torch.bfloat16,
    num_tokens: int = 512,
    shared: bool = False,
    rotary: Mapping | None = {},
    **options,
) -> None:
    """Forward and backward, with two query heads to a key head. rotary: arguments of the embedding; None: q and k come so."""
    q, k, v = torch.empty(num_tokens, 8, head_dim, dtype=dtype, requires_grad=True).split([4, 2, 2], dim=1)
    start, end = torch.empty(2, num_tokens, dtype=torch.int32)
    if rotary is not None:
        options["rotary"] = {**dict(zip(("cos", "sin"), torch.empty(2, num_tokens, head_dim // 2))), **rotary}
    out = flash_attention(q, k, v, start, end, shared=shared, **options)
    out.backward(torch.empty_like(out))


def flash_attention_cases(arch: int) -> None:
    """The whole tables of 80, 86, 90 and 100, with shared prefixes at the head dim of most models; on 89 and 120, which have
    the table of 86, that head dim alone."""
    for head_dim in {80: [64, 128, 256], 86: [64, 128, 256], 89: [128], 100: [64, 96, 128], 120: [64, 128, 256]}.get(
        arch, []
    ):
        attend(head_dim)
    if arch in (80, 86, 100, 120):
        attend(128, shared=True, rotary=None)
    if arch == 100:
        attend(256)
        attend(128, deterministic=True)
    if arch == 90:
        for head_dim in (64, 128):
            for shared in (False, True):
                attend(head_dim, mean_length=300, shared=shared)
                attend(head_dim, mean_length=3000, shared=shared, rotary=None if shared else {})
                attend(head_dim, deterministic=True, shared=shared)
            attend(head_dim, window=512)
            attend(head_dim, num_tokens=64)  # so few that the query heads of a key head are split
            norm = torch.empty(head_dim, dtype=torch.bfloat16, requires_grad=True), 1e-6, 0.0
            attend(head_dim, rotary={"q_norm": norm, "k_norm": norm})
        attend(128, rotary={"interleaved": True})
        for head_dim in (96, 256):
            attend(head_dim, deterministic=True)
        attend(256, window=512, softcap=50.0, shared=True)
        attend(64, dropout=0.1)
        attend(64, dtype=torch.float32)
    for path, configs in CANDIDATES.items():
        for config in configs if arch in path else []:
            with candidate(path, config):
                attend(path[-2] if isinstance(path[-1], str) else path[-1])
