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
from dataclasses import dataclass
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

    Its parts are buffers, so that they move with the model. It is empty until `fill` or `set`.
    """

    PARTS = ("data", "absmax", "offset", "nested_absmax")

    def __init__(self, shape: tuple[int, ...], quantization: Quantization):
        super().__init__()
        self.shape, self.wanted = tuple(shape), quantization
        for part in self.PARTS:
            self.register_buffer(part, None)

    def fill(self, values: Tensor) -> None:
        """Quantise a matrix, on its device."""
        kind = self.wanted.quant_type
        is_int8 = kind == "int8"
        self.set(quantize_int8(values) if is_int8 else QUANTIZE[kind](values, BLOCKSIZE, self.wanted.double_quant))

    def set(self, q: NF4Tensor | Int8Tensor) -> None:
        """Take over a quantised matrix of any kind."""
        is_int8 = isinstance(q, Int8Tensor)
        self.quant_type, self.blocksize = ("int8", 0) if is_int8 else (q.quant_type, q.blocksize)
        self.dtype, self.absmax = q.dtype, q.absmax
        self.data = q.values if is_int8 else q.packed
        self.offset, self.nested_absmax = (None, None) if is_int8 else (q.offset, q.nested_absmax)

    def get(self) -> NF4Tensor | Int8Tensor:
        if self.quant_type == "int8":
            return Int8Tensor(self.data, self.absmax, self.dtype)
        table = None if self.offset is None else _nested_table(self.device)  # one for all weights
        parts = self.blocksize, self.quant_type, self.offset, self.nested_absmax, table
        return NF4Tensor(self.data, self.absmax, self.shape, self.dtype, *parts)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix [out, in]; dtype: None = the one that it was quantised from."""
        return DEQUANTIZE[self.quant_type](self.get(), dtype)

    def isfinite(self) -> Tensor:
        """bool [floating parts]. A NaN or an infinity in the matrix always shows in a scale."""
        return torch.stack([b.isfinite().all() for b in self.buffers() if b.is_floating_point()])

    @property
    def quantization(self) -> Quantization:
        return Quantization(self.quant_type, self.offset is not None)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def _apply(self, fn, recurse=True):
        """Move with the model, but never cast: scales in bf16 would give another matrix."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = buffer.to(fn(buffer.new_empty(0)).device)
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
    """The matrix [out, in] itself, of either kind of weight."""
    return weight.detach().to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


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
    return dict(model.named_parameters()) | quant_weights(model)


def quantization_of(model: Decoder) -> Quantization | None:
    """How the model is quantised; None where it is not."""
    return next((weight.quantization for weight in quant_weights(model).values()), None)


def describe_quantized(model: Decoder) -> str:
    """A line with the quantised parameters and the memory that they take."""
    weights = quant_weights(model).values()
    numel, nbytes = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
    rest = sum(p.nbytes for p in model.parameters())
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
