"""Weights in 4 and 8 bits, in the formats that bitsandbytes stores.

4 bits (QLoRA). The flattened weight is cut into blocks of 64 numbers. A block is divided by its largest magnitude,
absmax, and each number becomes the index of the nearest of 16 table values in [-1, 1]:

    index = number of midpoints between neighbouring table values that are below w / absmax         w' = table[index] absmax

NF4's table holds quantiles of the normal distribution, so that weights that are normal use all 16 values equally often.
FP4's is a float of one sign, two exponent and one mantissa bit. Two indices share a byte, the even element in the HIGH nibble.

Double quantisation. An fp32 absmax per 64 numbers is half a bit per weight. Minus their mean they are quantised again, in
blocks of 256, to 8 bits of a "dynamic" table: a decimal exponent from 1e-6 to 1, with more fraction bits the larger it is.

    bits per weight     4 + 32 / 64 = 4.5           double: 4 + 8 / 64 + 32 / (64 * 256) = 4.127

8 bits (LLM.int8). One scale a row: q = round(127 w / absmax of the row), w' = q absmax / 127. (The outlier columns of that
paper belong to the activations, and so to the matmul, not to the weight.)

Everything is computed in fp32 and rounded to the wanted dtype last. Dequantising reads 0.52 bytes and writes 2 (bf16) per
weight: bound by memory. It looks a whole byte up in a table of 256 pairs instead of splitting it into nibbles. There is no
gradient through quantisation: a quantised weight is frozen. Two choices where implementations differ: a tie between two
values goes down in NF4 and towards zero in FP4, and a negative number that FP4 rounds to zero keeps its sign bit, both as
the CUDA kernels of bitsandbytes do it.

QLoRA: Dettmers et al. 2023, arXiv:2305.14314. Dynamic table: Dettmers 2015, arXiv:1511.04561. LLM.int8: Dettmers et al.
2022, arXiv:2208.07339.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import backend_for

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))
TABLES = {"nf4": NF4, "fp4": FP4}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
TINY = 1e-38  # the absmax of a block of zeros is divided by


@dataclass(frozen=True)
class NF4Tensor:
    """A weight in 4 bits, NF4 or FP4; the fields are what bitsandbytes saves."""

    packed: Tensor  # uint8 [(n + 1) // 2, 1], row-major, even element in the high nibble
    absmax: Tensor  # fp32 [ceil(n / blocksize)]; with double quantisation uint8, an index into nested_table
    shape: tuple[int, ...]
    dtype: torch.dtype  # of the weight before, and after dequantising
    blocksize: int
    quant_type: str  # "nf4" or "fp4"
    offset: Tensor | None = None  # fp32 []: mean of the absmax that was taken off (double quantisation)
    nested_absmax: Tensor | None = None  # fp32 [ceil(blocks / 256)]
    nested_table: Tensor | None = None  # fp32 [256]


@dataclass(frozen=True)
class Int8Tensor:
    """A weight in 8 bits with one scale a row."""

    values: Tensor  # int8 [rows, columns]
    absmax: Tensor  # fp32 [rows]
    dtype: torch.dtype


@cache
def dynamic_table() -> Tensor:
    """The 256 values of the signed dynamic 8-bit type, ascending, fp32.

    Decade i = 0..6 covers 10^(i - 7) to 10^(i - 6) with the centres of 2^i equal intervals, of both signs; plus 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        centres = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres]
    return torch.cat(values).sort().values


def quantize_4bit_ref(w: Tensor, quant_type: str, blocksize: int = 64, double_quant: bool = True) -> NF4Tensor:
    """`quantize_nf4` and `quantize_fp4` as they read: one block after the other, every number against every midpoint."""
    flat, table = w.detach().flatten().float(), torch.tensor(TABLES[quant_type], device=w.device)
    indices, absmax = [], []
    for block in flat.split(blocksize):
        absmax.append(block.abs().max())
        scaled = (block * (1 / absmax[-1].clamp(min=TINY))).clamp(-1, 1)
        if quant_type == "nf4":
            midpoints = (table[1:] + table[:-1]) / 2
            indices.append((scaled[:, None] > midpoints).sum(-1))
        else:  # by magnitude; the sign is the top bit
            magnitudes, order = table[:8].sort()
            midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
            indices.append(order[(scaled.abs()[:, None] > midpoints).sum(-1)] + 8 * (scaled < 0))
    index, absmax = torch.cat(indices), torch.stack(absmax)
    if len(index) % 2:
        index = F.pad(index, (0, 1), value=7 if quant_type == "nf4" else 0)  # the index of 0.0
    packed = (index[0::2] * 16 + index[1::2]).to(torch.uint8)[:, None]
    q = dict(packed=packed, shape=tuple(w.shape), dtype=w.dtype, blocksize=blocksize, quant_type=quant_type)
    if not double_quant:
        return NF4Tensor(absmax=absmax, **q)

    offset, table, nested, nested_absmax = absmax.mean(), dynamic_table().to(w.device), [], []
    for block in (absmax - offset).split(NESTED_BLOCKSIZE):
        nested_absmax.append(block.abs().max())
        scaled = (block * (1 / nested_absmax[-1].clamp(min=TINY))).clamp(-1, 1)
        nested.append((scaled[:, None] > (table[1:] + table[:-1]) / 2).sum(-1))
    return NF4Tensor(
        absmax=torch.cat(nested).to(torch.uint8),
        offset=offset,
        nested_absmax=torch.stack(nested_absmax),
        nested_table=table,
        **q,
    )


def dequantize_4bit_ref(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`dequantize_nf4` and `dequantize_fp4` as they read."""
    absmax = q.absmax
    if q.offset is not None:
        scales = q.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(absmax)]
        absmax = q.nested_table[absmax.long()] * scales + q.offset
    n, byte = math.prod(q.shape), q.packed[:, 0].long()
    index = torch.stack([byte // 16, byte % 16], dim=1).flatten()[:n]
    table = torch.tensor(TABLES[q.quant_type], device=byte.device)
    w = table[index] * absmax.repeat_interleave(q.blocksize)[:n]
    return w.view(q.shape).to(dtype or q.dtype)


def quantize_int8_ref(w: Tensor) -> Int8Tensor:
    """`quantize_int8` row by row."""
    values, absmax = torch.empty_like(w, dtype=torch.int8), torch.empty(len(w), device=w.device)
    for i, row in enumerate(w.detach().float()):
        absmax[i] = row.abs().max()
        values[i] = torch.round(row * (127 / absmax[i].clamp(min=TINY)))
    return Int8Tensor(values, absmax, w.dtype)


def dequantize_int8_ref(q: Int8Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`dequantize_int8` row by row."""
    return torch.stack([row * a * (1 / 127) for row, a in zip(q.values, q.absmax)]).to(dtype or q.dtype)


def _blocks(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> (divided by the absmax of its block, padded to whole blocks [blocks, blocksize]; absmax [blocks])."""
    blocks = F.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(-1)
    return (blocks * (1 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1), absmax


def _nearest(x: Tensor, ascending: Tensor) -> Tensor:
    """Index of the nearest value, uint8; a tie goes down."""
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    return torch.bucketize(x, midpoints, out_int32=True).to(torch.uint8)


def _quantize_4bit(w: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> NF4Tensor:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize}: expected one of {', '.join(map(str, BLOCKSIZES))}")
    if not w.is_floating_point() or w.numel() == 0:
        raise ValueError(f"weight {w.dtype} {tuple(w.shape)}: expected floating numbers, at least one")
    if backend_for(f"quantize_{quant_type}", w) == "reference":
        return quantize_4bit_ref(w, quant_type, blocksize, double_quant)

    table = torch.tensor(TABLES[quant_type], device=w.device)
    scaled, absmax = _blocks(w.detach().flatten().float(), blocksize)
    if quant_type == "nf4":
        index = _nearest(scaled, table)
    else:
        magnitudes, order = table[:8].sort()
        index = order.to(torch.uint8)[_nearest(scaled.abs(), magnitudes).int()] + 8 * (scaled < 0)
    index = index.flatten()[: w.numel() + w.numel() % 2].to(torch.uint8)  # blocks are padded with zeros
    packed = ((index[0::2] << 4) | index[1::2])[:, None]
    q = dict(packed=packed, shape=tuple(w.shape), dtype=w.dtype, blocksize=blocksize, quant_type=quant_type)
    if not double_quant:
        return NF4Tensor(absmax=absmax, **q)

    offset, nested_table = absmax.mean(), dynamic_table().to(w.device)
    nested, nested_absmax = _blocks(absmax - offset, NESTED_BLOCKSIZE)
    nested = _nearest(nested, nested_table).flatten()[: len(absmax)]
    return NF4Tensor(absmax=nested, offset=offset, nested_absmax=nested_absmax, nested_table=nested_table, **q)


def _dequantize_4bit(q: NF4Tensor, dtype: torch.dtype | None) -> Tensor:
    if backend_for(f"dequantize_{q.quant_type}", q.packed) == "reference":
        return dequantize_4bit_ref(q, dtype)
    absmax = q.absmax
    if q.offset is not None:
        scales = q.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(absmax)]
        absmax = F.embedding(absmax.int(), q.nested_table[:, None])[:, 0].mul_(scales).add_(q.offset)
    table = torch.tensor(TABLES[q.quant_type], device=q.packed.device)
    pairs = torch.cartesian_prod(table, table)  # [256, 2]: what each byte stands for
    flat = F.embedding(q.packed[:, 0].int(), pairs).flatten()
    blocks = F.pad(flat, (0, len(absmax) * q.blocksize - len(flat))).view(-1, q.blocksize)
    w = blocks.mul_(absmax[:, None]).flatten()[: math.prod(q.shape)]
    return w.view(q.shape).to(dtype or q.dtype)


def quantize_nf4(w: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Tensor:
    """Quantises a weight to 4-bit NormalFloat.

    w: floating, any shape with at least one element; blocks run over the flattened tensor and may cross rows.
    blocksize: how many numbers share a scale, one of BLOCKSIZES. double_quant: store the scales in 8 bits.
    Raises ValueError for another blocksize, an empty or an integer tensor.
    """
    return _quantize_4bit(w, "nf4", blocksize, double_quant)


def dequantize_nf4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight back, in its shape; dtype: None = the dtype it had. Raises ValueError for an FP4 tensor."""
    if q.quant_type != "nf4":
        raise ValueError(f"quant_type {q.quant_type!r}: expected 'nf4'; use dequantize_{q.quant_type}")
    return _dequantize_4bit(q, dtype)


def quantize_fp4(w: Tensor, blocksize: int = 64, double_quant: bool = True) -> NF4Tensor:
    """`quantize_nf4` with the table of a 4-bit float; the result says so in quant_type."""
    return _quantize_4bit(w, "fp4", blocksize, double_quant)


def dequantize_fp4(q: NF4Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight back, in its shape; dtype: None = the dtype it had. Raises ValueError for an NF4 tensor."""
    if q.quant_type != "fp4":
        raise ValueError(f"quant_type {q.quant_type!r}: expected 'fp4'; use dequantize_{q.quant_type}")
    return _dequantize_4bit(q, dtype)


def quantize_int8(w: Tensor) -> Int8Tensor:
    """Quantises a weight [rows, columns], floating, to 8 bits with one scale a row.

    Raises ValueError for another number of dimensions, an empty or an integer tensor.
    """
    if w.ndim != 2 or w.numel() == 0 or not w.is_floating_point():
        raise ValueError(f"weight {w.dtype} {tuple(w.shape)}: expected floating numbers [rows, columns]")
    if backend_for("quantize_int8", w) == "reference":
        return quantize_int8_ref(w)
    x = w.detach().float()
    absmax = x.abs().amax(-1)
    return Int8Tensor(torch.round(x * (127 / absmax.clamp(min=TINY))[:, None]).to(torch.int8), absmax, w.dtype)


def dequantize_int8(q: Int8Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [rows, columns] back; dtype: None = the dtype it had."""
    if backend_for("dequantize_int8", q.values) == "reference":
        return dequantize_int8_ref(q, dtype)
    return (q.values * q.absmax[:, None] * (1 / 127)).to(dtype or q.dtype)
