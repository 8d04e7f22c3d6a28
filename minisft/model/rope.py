"""The angles of rotary position embeddings (Su et al. 2021, arXiv:2104.09864).

Pair i of a head (dims i and i + Dh/2) at position p is turned by the angle p * f_i, where f_i = theta^(-2i / Dh): fast
for the first pairs, once in about 2 pi theta tokens for the last. The product of a query and a key then depends on the
distance of their tokens only.

Two ways of stretching a trained model to longer contexts change the f_i:

- linear (Chen et al. 2023, arXiv:2306.15595): f / factor, every position squeezed into the trained range;
- llama3 (Llama 3.1): pairs that turn at least `high_freq_factor` times within the original context stay, pairs that
  turn at most `low_freq_factor` times are divided by factor, and those between are blended by their number of turns.

Frequencies and angles are fp32 whatever the model's dtype: at position 8000 a bf16 angle is off by up to 16 radians.
They are computed on the fly, because a buffer would follow `model.to(torch.bfloat16)`.
"""

import math

import torch
from torch import Tensor

from minisft.model.families import Rope


def inverse_frequencies(rope: Rope, head_dim: int, device: torch.device | None = None) -> Tensor:
    """f_i in radians a token, fp32 [Dh/2]."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequency = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return frequency / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)  # within the original context
        keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        return (1 - keep) * frequency / rope.factor + keep * frequency
    assert rope.kind == "default", rope.kind
    return frequency


def rope_table(rope: Rope, head_dim: int, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """position_ids int [T] -> cos, sin of the angles, fp32 [T, Dh/2]. Computed once a forward, shared by all layers."""
    angle = position_ids.float()[:, None] * inverse_frequencies(rope, head_dim, position_ids.device)
    return angle.cos(), angle.sin()
