"""QLoRA's base: the matrices of the layers are frozen and kept in 4 or 8 bits, and adapters beside them train (lora.py).

A quantised layer stores q and not W. The matrix exists only during its product, once in the forward and once more in the
backward, in the dtype of the other factor:

    y = x W'^T + b        dx = dy W'        W' = dequantise(q)

Nothing of the size of W is kept for the backward, there is no gradient of W, and y is bitwise what F.linear gives with W'.
In 4 bits with double quantisation a parameter takes 0.516 bytes, where bf16 takes 2 (kernels/quantize.py has the formats and
the arithmetic). Embeddings, norms, biases and the head are not quantised: they are few, or the most sensitive ones.

QLoRA: Dettmers et al. 2023, arXiv:2305.14314.
"""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.errors import MODEL, UserError
from minisft.kernels.linear import linears
from minisft.kernels.quantize import (
    Int8Tensor,
    NF4Tensor,
    dequantize_fp4,
    dequantize_int8,
    dequantize_nf4,
    dynamic_table,
    quantize_fp4,
    quantize_int8,
    quantize_nf4,
)
from minisft.model.decoder import Decoder
from minisft.model.layers import compute_dtype
from minisft.model.shards import is_shard, local, rows_here, whole
from minisft.strict_json import read_json, write_json
from minisft.units import size

BLOCKSIZE = 64
QUANTIZE = {"nf4": quantize_nf4, "fp4": quantize_fp4}
DEQUANTIZE = {"nf4": dequantize_nf4, "fp4": dequantize_fp4, "int8": dequantize_int8}
RECORD = "quantization_config.json"  # beside an adapter: how its base was quantised


@dataclass(frozen=True)
class Quantization:
    """How a base is quantised."""

    quant_type: str  # "nf4", "fp4" or "int8"
    double_quant: bool = False  # the scales of the 4-bit types in 8 bits
    blocksize: int = field(default=BLOCKSIZE, compare=False)  # of the 4-bit types: how many numbers share a scale

    def to_config(self) -> dict:
        """The quantization_config that bitsandbytes writes into a config.json."""
        config = {"quant_method": "bitsandbytes", "load_in_4bit": self.quant_type != "int8"}
        config["load_in_8bit"] = not config["load_in_4bit"]
        if config["load_in_4bit"]:
            config |= {"bnb_4bit_quant_type": self.quant_type, "bnb_4bit_use_double_quant": self.double_quant}
        return config

    def __str__(self) -> str:
        return self.quant_type + (" with double quantisation" if self.double_quant else "")


class QuantWeight(nn.Module):
    """A frozen quantised matrix [out, in], which takes the place of a layer's `weight` and is not a parameter.

    Its parts are buffers, so that they move with the model. It is empty until `fill` or `set`. `make_shardable` is for FSDP2,
    which cuts parameters only.
    """

    PARTS = ("absmax", "data", "nested_absmax", "offset")

    def __init__(self, shape: tuple[int, ...], quantization: Quantization):
        super().__init__()
        self.shape, self.wanted = tuple(shape), quantization
        for part in self.PARTS:
            self.register_buffer(part, None)

    def make_shardable(self) -> None:
        """Make parameters, without values, of the two parts that are large, in the shapes that `set` will fill.

        A cut may run through a block of numbers: blocks are looked at when all parts are gathered.
        """
        numel, wanted = self.numel(), self.wanted
        if wanted.quant_type == "int8":
            kinds = {"data": (self.shape, torch.int8), "absmax": (self.shape[:1], torch.float32)}
        else:
            scales = torch.uint8 if wanted.double_quant else torch.float32
            blocks = -(-numel // wanted.blocksize)
            kinds = {"data": (((numel + 1) // 2, 1), torch.uint8), "absmax": ((blocks,), scales)}
        for part, (shape, dtype) in kinds.items():
            del self._buffers[part]
            values = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(part, nn.Parameter(values, requires_grad=False))

    def fill(self, values: Tensor) -> None:
        """Quantise a matrix, on its device."""
        kind, wanted = self.wanted.quant_type, self.wanted
        is_int8 = kind == "int8"
        self.set(quantize_int8(values) if is_int8 else QUANTIZE[kind](values, wanted.blocksize, wanted.double_quant))

    def set(self, q: NF4Tensor | Int8Tensor) -> None:
        """Take over a quantised matrix of any kind; a sharded one that of `wanted`, of which it keeps its rows."""
        is_int8 = isinstance(q, Int8Tensor)
        self.quant_type, self.blocksize = ("int8", 0) if is_int8 else (q.quant_type, q.blocksize)
        self.dtype = q.dtype
        offset, nested_absmax = (None, None) if is_int8 else (q.offset, q.nested_absmax)
        parts = {"data": q.values if is_int8 else q.packed, "absmax": q.absmax}
        parts |= {"offset": offset, "nested_absmax": nested_absmax}
        for name, values in parts.items():
            if isinstance(own := getattr(self, name), nn.Parameter):
                assert own.shape == values.shape and own.dtype == values.dtype, "not quantised as `wanted` says"
                local(own).copy_(values[rows_here(own)])
            else:
                setattr(self, name, values)

    def get(self) -> NF4Tensor | Int8Tensor:
        """The matrix; of a sharded one that is not gathered every process gives its parts, and all call this."""
        data, absmax = whole(self.data), whole(self.absmax)
        if self.quant_type == "int8":
            return Int8Tensor(data, absmax, self.dtype)
        table = None if self.offset is None else _nested_table(data.device)  # one for all weights
        parts = self.blocksize, self.quant_type, self.offset, self.nested_absmax, table
        return NF4Tensor(data, absmax, self.shape, self.dtype, *parts)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [out, in]; dtype: None = the one that it was quantised from."""
        return DEQUANTIZE[self.quant_type](self.get(), dtype)

    def isfinite(self) -> Tensor:
        """bool [floating parts that are here]. A NaN or an infinity in the matrix always shows in a scale."""
        return torch.stack([local(t).isfinite().all() for t in self.parts() if t.is_floating_point()])

    def parts(self) -> list[Tensor]:
        """The tensors that it has."""
        return [part for name in self.PARTS if (part := getattr(self, name)) is not None]

    @property
    def quantization(self) -> Quantization:
        return Quantization(self.quant_type, self.offset is not None)

    @property
    def device(self) -> torch.device:
        return torch.device("meta") if self.data is None else self.data.device

    @property
    def nbytes(self) -> int:
        """Of all rows, here or elsewhere."""
        return sum(part.nbytes for part in self.parts())

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def _apply(self, fn, recurse=True):
        """Move with the model, but never cast: scales in bf16 would give another matrix."""
        for tensors in (self._buffers, self._parameters):
            for name, part in tensors.items():
                if part is not None:
                    probe = part if is_shard(part) and part.is_meta else torch.empty(0, device=part.device)
                    device = fn(probe).device  # rows may have another one than what is whole
                    moved = torch.empty_like(part, device=device) if part.is_meta else part.detach().to(device)
                    tensors[name] = nn.Parameter(moved, False) if isinstance(part, nn.Parameter) else moved
        return self


@cache
def _nested_table(device: torch.device) -> Tensor:
    return dynamic_table().to(device)


class _QuantLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, weight: QuantWeight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = dy @ ctx.weight.dequantize(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


def linear(x: Tensor, weight: Tensor | QuantWeight, bias: Tensor | None = None) -> Tensor:
    """F.linear for either kind of weight: x [..., in] -> [..., out], under autocast in its dtype."""
    if isinstance(weight, Tensor):
        return linears(x, (weight, bias))[0]
    x = x.to(compute_dtype(x))
    return _QuantLinear.apply(x, None if bias is None else bias.to(x.dtype), weight)


def dense(weight: Tensor | QuantWeight, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] itself, of either kind of weight. All processes call it where the weight is sharded."""
    return whole(weight).to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


class QuantLinear(nn.Module):
    """nn.Linear with a quantised weight; the bias stays a parameter."""

    def __init__(self, base: nn.Linear, quantization: Quantization):
        super().__init__()
        self.weight, self.bias = QuantWeight(base.weight.shape, quantization), base.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


# ---- a model with such layers -------------------------------------------------------------------------------------


def quant_weights(model: Decoder) -> dict[str, QuantWeight]:
    """The quantised matrices by the names that their parameters would have."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantWeight)}


def named_weights(model: Decoder) -> dict[str, nn.Parameter | QuantWeight]:
    """The parameters and the quantised matrices."""
    quantised = quant_weights(model)
    parameters = {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] not in quantised}
    return parameters | quantised


def quantization_of(model: Decoder) -> Quantization | None:
    """How the model is quantised; None where it is not."""
    return next((weight.quantization for weight in quant_weights(model).values()), None)


def describe_quantized(model: Decoder) -> str:
    """A line with the quantised parameters and the memory that they take."""
    weights = quant_weights(model).values()
    numel, nbytes = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
    rest = sum(w.nbytes for w in named_weights(model).values()) - nbytes
    return (
        f"{quantization_of(model)}: {numel / 1e6:,.1f} M parameters of {len(weights)} matrices at {nbytes / numel:.3f} "
        f"bytes each, {size(nbytes)}; {size(nbytes + rest)} with embeddings and norms"
    )


# ---- the record beside an adapter ---------------------------------------------------------------------------------


def write_record(model: Decoder, folder: Path) -> None:
    """Record beside an adapter how its base was quantised, because the adapter is exact only on that base."""
    if (quantization := quantization_of(model)) is not None:
        write_json(folder / RECORD, quantization.to_config())


def read_record(folder: Path) -> Quantization | None:
    """The quantisation that `write_record` recorded; None if there is no such file. Raises UserError (exit code MODEL)."""
    path = folder / RECORD
    if not path.exists():
        return None
    config = read_json(path, exit_code=MODEL)
    for kind in DEQUANTIZE:
        for double_quant in (True, False):
            if config == Quantization(kind, double_quant).to_config():
                return Quantization(kind, double_quant and kind != "int8")
    hint = f"as in {json.dumps(Quantization('nf4', True).to_config())}; without the file the base is not quantised"
    raise UserError(f"{path} names no quantisation that is known here", hint=hint, exit_code=MODEL)
