"""Quantised matrices in the files of bitsandbytes, as transformers writes and reads them.

    <module>.weight                     uint8 [(n + 1) // 2, 1]: two indices a byte           (4 bits)
            .weight.absmax              fp32 [blocks]; with double quantisation uint8
            .weight.quant_map           fp32 [16]: the table
            .weight.nested_absmax       fp32 [ceil(blocks / 256)]                             (double quantisation)
            .weight.nested_quant_map    fp32 [256]
            .weight.quant_state.bitsandbytes__nf4       JSON as uint8: type, blocksize, dtype, shape, offset of absmax

    <module>.weight                     int8 [out, in]                                        (8 bits)
            .SCB                        fp32 [out]: absmax of the rows
            .weight_format              uint8 []: 0, row by row

Where a family's files stack several of our matrices into one, loading splits its rows and saving joins them again. The
double quantisation is then undone and the scales are kept in fp32, because its blocks of 256 scales would end elsewhere. The
values stay the same to the last bit, at 0.56 bytes a parameter instead of 0.52.
"""

import json
import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from minisft.errors import UserError
from minisft.kernels.quantize import BLOCKSIZES, NESTED_BLOCKSIZE, TABLES, Int8Tensor, NF4Tensor, dynamic_table
from minisft.model.tensor_names import Stored
from minisft.strict_json import parse_json

STATE = "quant_state.bitsandbytes__"
PART = re.compile(rf"(.+)\.(weight\.(?:(?:nested_)?(?:absmax|quant_map)|{re.escape(STATE)}\w+)|SCB|weight_format)")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def take_parts(found: dict) -> dict[str, dict]:
    """Move the parts of quantised weights out of {name: anything} into {name of the weight: {leaf: anything}}, with the
    leaves "absmax", "quant_state.bitsandbytes__nf4", "SCB", ..."""
    parts = {}
    for name in list(found):
        if match := PART.fullmatch(name):
            leaf = match[2].removeprefix("weight.")
            parts.setdefault(f"{match[1]}.weight", {})[leaf] = found.pop(name)
    return parts


def quant_type_of(leaves: dict) -> str:
    """ "nf4", "fp4" or "int8", by the names of the parts. Raises ValueError if these are not the parts of a weight."""
    states = [leaf.removeprefix(STATE) for leaf in leaves if leaf.startswith(STATE)]
    if "SCB" in leaves and not states:
        return "int8"
    if len(states) != 1 or states[0] not in TABLES:
        raise ValueError(f"its parts are {', '.join(sorted(leaves))}, expected SCB or one {STATE}nf4 or fp4")
    return states[0]


def pack(name: str, q: NF4Tensor | Int8Tensor) -> dict[str, Tensor]:
    """The tensors of a file for the weight `name`."""
    if isinstance(q, Int8Tensor):
        module = name.removesuffix(".weight")
        form = torch.tensor(0, dtype=torch.uint8)
        return {name: q.values, f"{module}.SCB": q.absmax, f"{module}.weight_format": form}
    tensors = {name: q.packed, f"{name}.absmax": q.absmax, f"{name}.quant_map": torch.tensor(TABLES[q.quant_type])}
    dtype = str(q.dtype).removeprefix("torch.")
    state = {"quant_type": q.quant_type, "blocksize": q.blocksize, "dtype": dtype, "shape": q.shape}
    if q.offset is not None:
        tensors |= {f"{name}.nested_absmax": q.nested_absmax, f"{name}.nested_quant_map": dynamic_table().clone()}
        nested = {"blocksize": NESTED_BLOCKSIZE, "dtype": "float32", "offset": q.offset.item()}
        state |= {f"nested_{key}": value for key, value in nested.items()}
    tensors[f"{name}.{STATE}{q.quant_type}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def unpack(weight: Tensor, leaves: dict[str, Tensor], shape: list[int]) -> NF4Tensor | Int8Tensor:
    """The weight [out, in] from the tensors that `pack` or bitsandbytes wrote. Raises ValueError, with the reason, for others."""
    kind, numel = quant_type_of(leaves), math.prod(shape)
    if kind == "int8":
        _expect("weight", weight, torch.int8, shape)
        _expect("SCB", leaves["SCB"], torch.float32, shape[:1])
        if "weight_format" in leaves and leaves["weight_format"].any():
            raise ValueError("weight_format is not 0, row by row")
        return Int8Tensor(weight, leaves["SCB"], torch.float16)
    try:
        state = parse_json(leaves[STATE + kind].numpy().tobytes(), "quant_state")
        blocksize, dtype = state["blocksize"], DTYPES[state["dtype"]]
        if state["quant_type"] != kind or list(state["shape"]) != shape or blocksize not in BLOCKSIZES:
            raise ValueError(f"quant_state is {str(state)[:200]}, expected {kind}, shape {shape}, a known blocksize")
    except (KeyError, TypeError, UserError) as error:
        raise ValueError(f"quant_state is damaged ({type(error).__name__}: {str(error)[:100]})") from error
    packed = weight.flatten().view(torch.uint8)[:, None]  # some files store the bytes as another dtype
    _expect("weight", packed, torch.uint8, [(numel + 1) // 2, 1])
    # Compared with a tolerance: kernels use our own table, the one in the file only has to be the same up to rounding.
    if "quant_map" not in leaves or not _is_table(leaves["quant_map"], torch.tensor(TABLES[kind])):
        raise ValueError(f"quant_map is not the table of {kind}")
    num_blocks = -(-numel // blocksize)
    rest = tuple(shape), dtype, blocksize, kind
    if "nested_absmax" not in leaves:
        return NF4Tensor(packed, _expect("absmax", leaves.get("absmax"), torch.float32, [num_blocks]), *rest)
    absmax = _expect("absmax", leaves.get("absmax"), torch.uint8, [num_blocks])
    _expect("nested_absmax", leaves["nested_absmax"], torch.float32, [-(-num_blocks // NESTED_BLOCKSIZE)])
    offset, table = state.get("nested_offset"), leaves.get("nested_quant_map")
    if state.get("nested_blocksize") != NESTED_BLOCKSIZE or type(offset) is not float:
        raise ValueError(f"quant_state is {str(state)[:200]}, expected nested_blocksize {NESTED_BLOCKSIZE}, an offset")
    if table is None or not _is_table(table, dynamic_table()):
        raise ValueError("nested_quant_map is not the dynamic table of 8 bits")
    return NF4Tensor(packed, absmax, *rest, torch.tensor(offset), leaves["nested_absmax"], dynamic_table())


def _expect(name: str, tensor: Tensor | None, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """The tensor, if it is what is expected. Raises ValueError."""
    if tensor is None or tensor.dtype != dtype or list(tensor.shape) != list(shape):
        found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{name} is {found}, expected {dtype} {list(shape)}")
    return tensor


def _is_table(found: Tensor, table: Tensor) -> bool:
    return found.shape == table.shape and torch.allclose(found.float(), table, atol=1e-6)


# ---- stacks -------------------------------------------------------------------------------------------------------


def split(q: NF4Tensor | Int8Tensor, stored: Stored, rows: list[int]) -> list[NF4Tensor] | list[Int8Tensor]:
    """A stacked matrix -> our matrices with so many rows each and the same values. Raises ValueError if a block of numbers
    that share a scale crosses rows."""
    stored = replace(stored, transposed=False)  # quantised weights are [out, in] in every family
    if isinstance(q, Int8Tensor):
        parts = zip(stored.split(q.values, rows), stored.split(q.absmax[:, None], rows))
        return [Int8Tensor(values, absmax[:, 0], q.dtype) for values, absmax in parts]
    if len(rows) == 1:
        return [q]
    packed, absmax = (stored.split(part, rows) for part in _by_row(q))
    return [_from_rows(q, *parts) for parts in zip(packed, absmax)]


def join(parts: list[NF4Tensor] | list[Int8Tensor], stored: Stored) -> NF4Tensor | Int8Tensor:
    """The inverse of `split`."""
    stored, first = replace(stored, transposed=False), parts[0]
    if isinstance(first, Int8Tensor):
        absmax = stored.join([part.absmax[:, None] for part in parts])[:, 0]
        return Int8Tensor(stored.join([part.values for part in parts]), absmax, first.dtype)
    if len(parts) == 1:
        return first
    return _from_rows(first, *(stored.join(list(part)) for part in zip(*map(_by_row, parts))))


def _by_row(q: NF4Tensor) -> tuple[Tensor, Tensor]:
    """(bytes [out, in / 2], scales fp32 [out, in / blocksize])."""
    rows, columns = q.shape
    if columns % q.blocksize:
        raise ValueError(f"{columns} columns are not whole blocks of {q.blocksize}, so its rows cannot be split")
    absmax = q.absmax
    if q.offset is not None:
        scales = q.nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: len(absmax)]
        absmax = q.nested_table[absmax.int()].mul_(scales).add_(q.offset)  # rounded twice, as in dequantize_nf4
    return q.packed.view(rows, -1), absmax.view(rows, -1)


def _from_rows(q: NF4Tensor, packed: Tensor, absmax: Tensor) -> NF4Tensor:
    parts = dict(packed=packed.reshape(-1, 1), absmax=absmax.flatten(), shape=(len(packed), q.shape[1]))
    return replace(q, **parts, offset=None, nested_absmax=None, nested_table=None)
