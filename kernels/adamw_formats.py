"""What AdamW stores besides fp32: bf16 weights, rounded by chance, and moments of a byte a number.

bf16 weights with stochastic rounding
    A weight in bf16 has 8 bits: an update below 1/512 of it rounds to nothing, each time. If it is rounded up with a
    probability equal to the part that is cut off, E[round(w)] = w, and small updates add up on average. In bits: add 16
    random bits below the mantissa of bf16 and cut them off. The random number is a hash of (seed, step, tensor, element) and
    needs no state: a resumed run draws the same ones, and so do all backends.

8-bit moments
    A moment is one byte an element, the index of the nearest value of a dynamic table (see quantize.py: 1e-7 to 1, finer
    the larger), times an fp32 absmax for every 256 elements: the formats of bitsandbytes, signed for m, positive for v.
    Unlike there, a v that is not zero never becomes zero, because its root is a divisor while m in the same place may not
    be zero. In a test of 30 steps with gradients from 1 down to 1e-8 in a block, some weights moved by 4,000 learning rates
    when v was rounded to zero. With this rule none moved by more than 21, as with exact moments.

Papers: 8-bit states, Dettmers et al. 2022, arXiv:2110.02861. The hash is the finaliser of MurmurHash3 (Appleby, public
domain).
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.quantize import TINY, dynamic_table

STATE_BLOCKSIZE = 256  # numbers that share an absmax in an 8-bit moment
State = Tensor | tuple[Tensor, Tensor]  # a moment: a float tensor, or (codes uint8 [n], absmax fp32 [ceil(n / 256)])


def _mix(x):
    """A hash of 32 bits, for Python integers and for int64 tensors."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)


def step_key(seed: int, step: int) -> int:
    """Odd and of 31 bits, so that Triton sees the same kind of integer in every step."""
    return _mix(_mix(seed ^ _mix(seed >> 32)) ^ step) >> 1 | 1


def round_stochastically(x: Tensor, seed: int, step: int, tensor: int, first: int = 0) -> Tensor:
    """fp32 -> bf16: up or down by chance, so that the mean over seeds is x.

    tensor: its place in the list of parameters. first: the place of x's first element in that tensor.
    """
    element = torch.arange(first, first + x.numel(), device=x.device).view(x.shape)
    random = _mix(_mix(element) ^ _mix(step_key(seed, step) ^ tensor))
    bits = (x.view(torch.int32).long() + (random & 0xFFFF)) & 0xFFFF0000
    rounded = (bits >> 16).to(torch.int16, copy=True).view(torch.bfloat16)
    return torch.where(x.isnan(), x.bfloat16(), rounded)


def quantize_state(x: Tensor, signed: bool, search: Callable | None = None) -> tuple[Tensor, Tensor]:
    """A moment -> its 8-bit form (codes uint8, in the shape of x; absmax fp32 [ceil(n / 256)]).

    search: torch.bucketize, or a faster function with the same results.
    """
    table = dynamic_table(signed).to(x.device)
    blocks = F.pad(x.flatten(), (0, -x.numel() % STATE_BLOCKSIZE)).view(-1, STATE_BLOCKSIZE)
    absmax = blocks.abs().amax(-1)
    scaled = blocks * (1 / absmax.clamp(min=TINY))[:, None]
    codes = (search or torch.bucketize)(scaled, (table[1:] + table[:-1]) / 2)
    if not signed:
        codes = torch.maximum(codes, (blocks > 0).to(codes.dtype))
    return codes.to(torch.uint8).flatten()[: x.numel()].view(x.shape), absmax


def dequantize_state(state: tuple[Tensor, Tensor], signed: bool) -> Tensor:
    """The moment, fp32, in the shape of its codes."""
    codes, absmax = state
    values = dynamic_table(signed).to(codes.device)[codes.int()].flatten()
    return (values * absmax.repeat_interleave(STATE_BLOCKSIZE)[: len(values)]).view(codes.shape)


def search(x: Tensor, midpoints: Tensor) -> Tensor:
    """torch.bucketize(x, midpoints), int32, of the tables of this file: ten times as fast.

    The upper half of a float's bits says nearly where it is: the floats that share them lie on both sides of one midpoint
    at most. So a table of 65,536 entries and one comparison find the place, instead of eight comparisons.
    """
    places = _places(tuple(midpoints.tolist())).to(x.device)
    place = torch.index_select(places, 0, (x.view(torch.int32).flatten() >> 16) & 0xFFFF)
    beyond = torch.index_select(F.pad(midpoints, (0, 1), value=float("inf")), 0, place)
    return place.add_(beyond < x.flatten()).view(x.shape)


@lru_cache(2)
def _places(midpoints: tuple[float, ...]) -> Tensor:
    """int32 [65536]: for each value of the upper 16 bits, how many midpoints are below all floats that have it; NaN is above
    all."""
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
    first, last = torch.bucketize(ends, torch.tensor(midpoints), out_int32=True).sort(0).values
    known = ends.isfinite().all(0) & (ends.abs() <= 1).all(0)
    assert (last - first)[known].max() <= 1
    return first
