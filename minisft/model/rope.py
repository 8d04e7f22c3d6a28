"""The angles of rotary position embeddings (Su et al. 2021, arXiv:2104.09864).

Pair i of the dim features of a head that turn (i and i + dim/2) is turned at position p by the angle p * f_i, where
f_i = theta^(-2i / dim): fast for the first pairs, once in about 2 pi theta tokens for the last. The product of a query
and a key then depends on the distance of their tokens only.

Ways of stretching a trained model to longer contexts change the f_i:

- linear (Chen et al. 2023, arXiv:2306.15595): f / factor, every position squeezed into the trained range;
- dynamic (NTK-aware, u/bloc97 and u/emozilla 2023): a larger theta, so that the first pairs hardly change;
- llama3 (Llama 3.1): pairs that turn at least `high_freq_factor` times within the original context stay, pairs that
  turn at most `low_freq_factor` times are divided by factor, and those between are blended by their number of turns;
- yarn (Peng et al. 2023, arXiv:2309.00071): the same idea with `beta_fast` and `beta_slow` turns, blended by the number
  of the pair; cos and sin are multiplied by an attention factor, which sharpens the softmax;
- longrope (Ding et al. 2024, arXiv:2402.13753): each pair has a factor of its own, found by search; attention factor
  as in yarn.

Frequencies and angles are fp32 whatever the model's dtype: at position 8000 a bf16 angle is off by up to 16 radians.
Frequencies are no buffer of the model, which would follow `model.to(torch.bfloat16)`.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from minisft.model.model_config import Rope


@lru_cache(64)
def inverse_frequencies(rope: Rope, device: torch.device | None = None) -> Tensor:
    """f_i in radians a token, fp32 [dim/2]. Always the same tensor, which nobody may change."""
    power = rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim)
    frequency = 1.0 / power
    match rope.kind:
        case "default" | "dynamic":  # the theta of dynamic is the stretched one already
            return frequency
        case "linear":
            return frequency / rope.factor
        case "llama3":
            turns = rope.original_max_position_embeddings * frequency / (2 * math.pi)  # within the original context
            keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
            return (1 - keep) * frequency / rope.factor + keep * frequency
        case "yarn":
            keep = 1 - _yarn_ramp(rope).to(power.device)
            return (1 - keep) / (rope.factor * power) + keep * frequency
        case "longrope":
            return 1.0 / (torch.tensor(rope.pair_factors, device=device) * power)
    raise AssertionError(rope.kind)


def _yarn_ramp(rope: Rope) -> Tensor:
    """0 for the pairs that keep their frequency, 1 for those that are divided by factor, fp32 [dim/2]."""

    def pair_that_turns(times: float) -> float:
        length = rope.original_max_position_embeddings / (2 * math.pi * times)
        return rope.dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001  # a step, without dividing by zero
    return ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


def rope_table(rope: Rope, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """position_ids int [T] -> cos, sin of the angles times the attention factor [T, dim/2], rounded to dtype at the
    end; with a query_beta also the factors of the queries [T]. Computed once a forward, shared by all layers that have
    this rope."""
    angle = position_ids.float()[:, None] * inverse_frequencies(rope, position_ids.device)
    cos, sin = angle.cos() * rope.attention_factor, angle.sin() * rope.attention_factor
    if not rope.query_beta:
        return cos.to(dtype), sin.to(dtype)
    contexts = torch.floor(position_ids / rope.original_max_position_embeddings)  # original ones before this position
    return cos.to(dtype), sin.to(dtype), (1 + rope.query_beta * torch.log(1 + contexts)).to(dtype)
