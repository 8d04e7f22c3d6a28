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

Everything is computed in fp32 and rounded to the wanted dtype last. There is no gradient through quantisation: a quantised
weight is frozen. Two choices where implementations differ: a tie between two values goes down in NF4 and towards zero in
FP4, and a negative number that FP4 rounds to zero keeps its sign bit, both as the CUDA kernels of bitsandbytes do it.

Bytes moved, per weight in bf16
    4 bits: quantising reads 2 and writes 0.56, dequantising reads 0.52 and writes 2. 8 bits: 4 and 3 (quantising reads the
    row twice, the second time from the cache).

The kernels
    Dequantising is bound by memory as long as a thread does little a byte: it reads 16 bytes at once, which hold 32 weights of
    one block (or of one block and the next, of 32) and so share one scale, and looks their nibbles up in a table of 64 bytes
    that stays in the first cache; what a warp writes goes through shared memory, so that its lines are whole.
    Quantising keeps a block in registers between its absmax and its indices. An index is a lookup and one comparison:
    round(14 x) names one of 29 stretches of [-1, 1], a table says how many midpoints lie before a stretch and which single
    one lies in it. Comparing with all 15 midpoints takes more than twice the instructions, several times the time of the
    bytes. The second quantisation touches 1 number in 64 and is left to torch.
    All three backends agree to the bit. So a kernel divides by the correctly rounded division, its multiplications and
    additions are not contracted into one rounding (enable_fp_fusion=False), and it rounds to an integer by adding and
    taking off 1.5 * 2^23, above which fp32 has no fractions. On a CPU, torch looks a whole byte up in a table of 256 pairs.
    A block with a NaN becomes NaN as a whole, so that a broken weight shows.

QLoRA: Dettmers et al. 2023, arXiv:2305.14314. Dynamic table: Dettmers 2015, arXiv:1511.04561. LLM.int8: Dettmers et al.
2022, arXiv:2208.07339.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import backend_for, cdiv, jit, tl

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
STRETCH = 2**18  # elements that the torch path of int8 widens at a time
TINY = 1e-36  # the least that is divided by: the absmax of zeros is 0, and 127 / TINY has to be finite


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
def dynamic_table(signed: bool = True) -> Tensor:
    """The 256 values of the dynamic 8-bit type, ascending, fp32.

    Decade i = 0..6 covers 10^(i - 7) to 10^(i - 6) with the centres of 2^i equal intervals, of both signs, or of 2^(i + 1)
    intervals where all values are positive; plus 0 and 1.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        centres = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [centres, -centres] if signed else [centres]
    return torch.cat(values).sort().values


def quantize_4bit_ref(w: Tensor, quant_type: str, blocksize: int = 64, double_quant: bool = True) -> NF4Tensor:
    """`quantize_nf4` and `quantize_fp4` from the formula: one block after the other, every number against every midpoint."""
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
    """`dequantize_nf4` and `dequantize_fp4` from the formula."""
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


@jit
def _absmax(x):
    """fp32 [R, C] -> [R, 1], NaN where there is a NaN, which tl.max may ignore.

    As integers, the bits of magnitudes are in the order of the magnitudes, and NaN is above infinity.
    """
    return tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1, keep_dims=True).to(tl.float32, bitcast=True)


@jit
def _reciprocal(absmax):
    """1 / absmax, correctly rounded; finite where absmax is 0."""
    return tl.div_rn(1.0, tl.maximum(absmax, 1e-36))  # TINY


@jit
def _quantize_4bit_kernel(
    w_ptr,  # [n]
    packed_ptr,  # uint8 [n_bytes]
    absmax_ptr,  # fp32 [blocks]
    below_ptr,  # int32 [32], as `_stretches` makes them
    midpoints_ptr,  # fp32 [32]
    n,
    n_bytes,
    FP4: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE weights a program, which are whole blocks."""
    first = tl.program_id(0).to(tl.int64) * TILE
    # In one dimension, so that what a thread looks up is what it has loaded.
    element = tl.arange(0, TILE)
    w = tl.load(w_ptr + first + element, mask=first + element < n, other=0.0).to(tl.float32)
    w = w.reshape(TILE // BLOCKSIZE, BLOCKSIZE)
    absmax = _absmax(w)
    block = first // BLOCKSIZE + tl.arange(0, TILE // BLOCKSIZE)[:, None]
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCKSIZE < n)
    scaled = (w * _reciprocal(absmax)).reshape(TILE)
    x = tl.abs(scaled) if FP4 else scaled
    stretch = (x * 14.0 + 12582912.0).to(tl.int32, bitcast=True) & 31  # round(14 x), the last bits of 1.5 * 2^23 + 14 x
    index = tl.load(below_ptr + stretch)
    index = tl.where(x > tl.load(midpoints_ptr + stretch), index + 1, index)
    if FP4:
        index ^= (index & 2) << 1  # ascending -> the place in the table: 0 1 6 7 4 5 2 3
        index = tl.where(scaled < 0, index + 8, index)
    even, odd = tl.split(index.reshape(TILE // 2, 2))
    byte = first // 2 + tl.arange(0, TILE // 2)
    tl.store(packed_ptr + byte, (even * 16 + odd).to(tl.uint8), mask=byte < n_bytes)


@jit
def _dequantize_4bit_kernel(
    packed_ptr,  # uint8 [n_bytes]
    absmax_ptr,  # fp32 [blocks], or uint8 where NESTED
    nested_absmax_ptr,  # fp32 [ceil(blocks / 256)] or None
    nested_table_ptr,  # fp32 [256] or None
    offset_ptr,  # fp32 [] or None
    table_ptr,  # fp32 [16]
    w_ptr,  # [n]
    n,
    n_bytes,
    NESTED: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BYTES: tl.constexpr,
):
    """BYTES bytes a program; for the scales, as rows that lie in one block each, so that a scale is read once a row."""
    ROW: tl.constexpr = BLOCKSIZE // 2 if BLOCKSIZE // 2 < BYTES else BYTES
    first = tl.program_id(0).to(tl.int64) * BYTES
    byte = tl.arange(0, BYTES)
    packed = tl.load(packed_ptr + first + byte, mask=first + byte < n_bytes, other=0).to(tl.int32)
    start = first + tl.arange(0, BYTES // ROW) * ROW
    block = start // (BLOCKSIZE // 2)
    absmax = tl.load(absmax_ptr + block, mask=start < n_bytes, other=0)
    if NESTED:
        scale = tl.load(nested_absmax_ptr + block // 256, mask=start < n_bytes, other=0.0)
        absmax = tl.load(nested_table_ptr + absmax.to(tl.int32)) * scale + tl.load(offset_ptr)
    # Looked up in one dimension: for a matrix of unordered addresses Triton 3.6 would take the columns first, and move
    # everything through shared memory.
    even = tl.load(table_ptr + (packed >> 4)).reshape(BYTES // ROW, ROW) * absmax[:, None]
    odd = tl.load(table_ptr + (packed & 15)).reshape(BYTES // ROW, ROW) * absmax[:, None]
    w = tl.interleave(even, odd).reshape(2 * BYTES).to(w_ptr.dtype.element_ty)
    element = tl.arange(0, 2 * BYTES)
    tl.store(w_ptr + 2 * first + element, w, mask=2 * first + element < n)


@jit
def _quantize_int8_kernel(
    w_ptr,  # [rows, columns]
    values_ptr,  # int8 [rows, columns]
    absmax_ptr,  # fp32 [rows]
    columns,
    BLOCK: tl.constexpr,
):
    """A row a program: once for its absmax, and once more, from the cache, for the values."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((1, BLOCK), tl.int32)  # as in _absmax
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        w = tl.load(w_ptr + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(w).to(tl.int32, bitcast=True))
    absmax = _absmax(largest.to(tl.float32, bitcast=True))
    tl.store(absmax_ptr + row + tl.zeros((1, 1), tl.int32), absmax)
    scale = _reciprocal(absmax) * 127.0  # in this order, as torch computes 127 / x
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        w = tl.load(w_ptr + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        rounded = (w * scale + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, a tie to the even one
        tl.store(values_ptr + row * columns + column, rounded.to(tl.int8), mask=column < columns)


@jit
def _dequantize_int8_kernel(
    values_ptr,  # int8 [rows, columns]
    absmax_ptr,  # fp32 [rows]
    w_ptr,  # [rows, columns]
    columns,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + row * columns + column, mask=column < columns, other=0).to(tl.float32)
    w = values * tl.load(absmax_ptr + row) * (1 / 127)
    tl.store(w_ptr + row * columns + column, w.to(w_ptr.dtype.element_ty), mask=column < columns)


CONFIGS = {
    "_quantize_4bit_kernel": dict(TILE=4096, num_warps=16),  # TILE: not below the largest blocksize
    "_dequantize_4bit_kernel": dict(BYTES=2048, num_warps=4),  # 16 bytes a thread
    "_quantize_int8_kernel": dict(BLOCK=2048, num_warps=8),
    "_dequantize_int8_kernel": dict(BLOCK=1024, num_warps=4),  # 16 bytes of bf16 a thread
}


@cache
def _table(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values. They stay on the device, as `_stretches`: a copy to a GPU at every call would wait for it."""
    return torch.tensor(TABLES[quant_type], device=device)


@cache
def _stretches(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(below int32 [32], midpoint fp32 [32]): how many midpoints of neighbouring values lie before stretch s, the numbers x
    with round(14 x) = s, and the one that lies in it, or infinity. In the place s modulo 32; for FP4 of the magnitudes.

    Midpoints are 0.08 apart, stretches are 0.071 wide, and no midpoint is so near to an edge that rounding could matter.
    """
    table = torch.tensor(TABLES[quant_type])
    ascending = table if quant_type == "nf4" else table[:8].sort().values
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    at = torch.round(midpoints * 14).long()
    stretch = (torch.arange(32) + 16) % 32 - 16  # 0 .. 15, -16 .. -1
    midpoint = torch.full((32,), math.inf)
    midpoint[at % 32] = midpoints
    return (at < stretch[:, None]).sum(1).int().to(device), midpoint.to(device)


def _quantize_blocks_triton(w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """[n] -> packed uint8 [(n + 1) // 2, 1], absmax fp32 [blocks]."""
    n = w.numel()
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8, device=w.device)
    absmax = torch.empty(cdiv(n, blocksize), device=w.device)
    config = CONFIGS["_quantize_4bit_kernel"]
    _quantize_4bit_kernel[(cdiv(n, config["TILE"]),)](
        *(w.contiguous(), packed, absmax, *_stretches(quant_type, w.device), n, len(packed)),
        *(quant_type == "fp4", blocksize),
        **config,
    )
    return packed, absmax


def _dequantize_4bit_triton(q: NF4Tensor, dtype: torch.dtype) -> Tensor:
    n, packed = math.prod(q.shape), q.packed.contiguous()
    scales = (None if x is None else x.contiguous() for x in (q.absmax, q.nested_absmax, q.nested_table))
    w = torch.empty(q.shape, dtype=dtype, device=packed.device)
    config = CONFIGS["_dequantize_4bit_kernel"]
    _dequantize_4bit_kernel[(cdiv(packed.numel(), config["BYTES"]),)](
        *(packed, *scales, q.offset, _table(q.quant_type, packed.device), w),
        *(n, packed.numel(), q.offset is not None, q.blocksize),
        enable_fp_fusion=False,  # table * scale + offset is rounded twice, as in torch
        **config,
    )
    return w


def _quantize_int8_triton(w: Tensor) -> Int8Tensor:
    w = w.detach().contiguous()
    values, absmax = torch.empty_like(w, dtype=torch.int8), torch.empty(len(w), device=w.device)
    config = CONFIGS["_quantize_int8_kernel"]
    _quantize_int8_kernel[(len(w),)](w, values, absmax, w.shape[1], enable_fp_fusion=False, **config)
    return Int8Tensor(values, absmax, w.dtype)


def _dequantize_int8_triton(q: Int8Tensor, dtype: torch.dtype) -> Tensor:
    rows, columns = q.values.shape
    w = torch.empty(rows, columns, dtype=dtype, device=q.values.device)
    config = CONFIGS["_dequantize_int8_kernel"]
    grid = rows, cdiv(columns, config["BLOCK"])
    _dequantize_int8_kernel[grid](q.values.contiguous(), q.absmax.contiguous(), w, columns, **config)
    return w


def _blocks(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """fp32 [n] -> (divided by the absmax of its block, padded to whole blocks [blocks, blocksize]; absmax [blocks])."""
    blocks = F.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    absmax = blocks.abs().amax(-1)
    return (blocks * (1 / absmax.clamp(min=TINY))[:, None]).clamp_(-1, 1), absmax


def _nearest(x: Tensor, ascending: Tensor) -> Tensor:
    """Index of the nearest value, uint8; a tie goes down."""
    midpoints = (ascending[1:] + ascending[:-1]) / 2
    return torch.bucketize(x, midpoints, out_int32=True).to(torch.uint8)


def _quantize_blocks_torch(w: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """[n] -> packed uint8 [(n + 1) // 2, 1], absmax fp32 [blocks]."""
    table = torch.tensor(TABLES[quant_type], device=w.device)
    scaled, absmax = _blocks(w.float(), blocksize)
    if quant_type == "nf4":
        index = _nearest(scaled, table)
    else:
        magnitudes, order = table[:8].sort()
        index = order.to(torch.uint8)[_nearest(scaled.abs(), magnitudes).int()] + 8 * (scaled < 0)
    index = index.flatten()[: w.numel() + w.numel() % 2].to(torch.uint8)  # blocks are padded with zeros
    return ((index[0::2] << 4) | index[1::2])[:, None], absmax


def _quantize_4bit(w: Tensor, quant_type: str, blocksize: int, double_quant: bool) -> NF4Tensor:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize {blocksize}: expected one of {', '.join(map(str, BLOCKSIZES))}")
    if not w.is_floating_point() or w.numel() == 0:
        raise ValueError(f"weight {w.dtype} {tuple(w.shape)}: expected floating numbers, at least one")
    backend = backend_for(f"quantize_{quant_type}", w)
    if backend == "reference":
        return quantize_4bit_ref(w, quant_type, blocksize, double_quant)
    quantize_blocks = _quantize_blocks_triton if backend == "triton" else _quantize_blocks_torch
    packed, absmax = quantize_blocks(w.detach().flatten(), quant_type, blocksize)
    q = dict(packed=packed, shape=tuple(w.shape), dtype=w.dtype, blocksize=blocksize, quant_type=quant_type)
    if not double_quant:
        return NF4Tensor(absmax=absmax, **q)

    offset, nested_table = absmax.mean(), dynamic_table().to(w.device)
    nested, nested_absmax = _blocks(absmax - offset, NESTED_BLOCKSIZE)
    nested = _nearest(nested, nested_table).flatten()[: len(absmax)]
    return NF4Tensor(absmax=nested, offset=offset, nested_absmax=nested_absmax, nested_table=nested_table, **q)


def _cannot(dtype: torch.dtype) -> str:
    return "a result in float64" if dtype == torch.float64 else ""


def _dequantize_4bit(q: NF4Tensor, dtype: torch.dtype | None) -> Tensor:
    backend = backend_for(f"dequantize_{q.quant_type}", q.packed, _cannot(dtype or q.dtype))
    if backend == "reference":
        return dequantize_4bit_ref(q, dtype)
    if backend == "triton":
        return _dequantize_4bit_triton(q, dtype or q.dtype)
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
    backend = backend_for("quantize_int8", w)
    if backend == "reference":
        return quantize_int8_ref(w)
    if backend == "triton":
        return _quantize_int8_triton(w)
    values, absmax = torch.empty_like(w, dtype=torch.int8), torch.empty(len(w), device=w.device)
    for first in range(0, len(w), rows := max(1, STRETCH // w.shape[1])):
        x = w[first : first + rows].detach().float()
        scales = torch.amax(x.abs(), -1, out=absmax[first : first + rows])
        values[first : first + rows] = torch.round(x * (127 / scales.clamp(min=TINY))[:, None])
    return Int8Tensor(values, absmax, w.dtype)


def dequantize_int8(q: Int8Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The weight [rows, columns] back; dtype: None = the dtype it had."""
    backend = backend_for("dequantize_int8", q.values, _cannot(dtype or q.dtype))
    if backend == "reference":
        return dequantize_int8_ref(q, dtype)
    if backend == "triton":
        return _dequantize_int8_triton(q, dtype or q.dtype)
    return (q.values * q.absmax[:, None] * (1 / 127)).to(dtype or q.dtype)
