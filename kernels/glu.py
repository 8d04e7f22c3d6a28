"""Gated linear units: the activation of one projection times another projection, y = act(gate) * up.

What it computes

        swiglu: act(x) = silu(x) = x * sigmoid(x)
        geglu:  act(x) = gelu(x) = x * Phi(x), exact ("none"), or its tanh approximation ("tanh")

Backward

        dup = dy * act(gate)        dgate = dy * up * act'(gate)
        silu'(x) = sigmoid(x) * (1 + x * (1 - sigmoid(x)))

What is saved
    gate and up only; act(gate) is computed again in the backward pass. Autograd through the formula saves act(gate)
    too, half as much again: for T = 16,384 tokens and 8,192 features 256 MB a layer in bf16. On a CPU the second
    activation costs a quarter (silu) or 40 % (gelu) of the op's time when memory is warm; not having to map fresh
    memory pays it back.

Bytes moved, per element in bf16: fused 6 forward (read gate and up, write y) and 10 backward; op by op 10 and 18.

fp32: inside every op (PyTorch's and ours compute in fp32 and round what they write); act(gate) is rounded to the dtype
of the inputs before the product, as Hugging Face models do.

gate and up may be strided views, such as the two halves of one fused [T, 2 F] projection.

Paper: Shazeer 2020, "GLU Variants Improve Transformer".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import backend_for


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """The formula. Arguments as in `swiglu`."""
    return F.silu(gate) * up


def geglu_ref(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """The formula. Arguments as in `geglu`."""
    return F.gelu(gate, approximate=approximate) * up


class _GLU(torch.autograd.Function):
    """Both units; `approximate` is None for silu."""

    @staticmethod
    def forward(ctx, gate, up, approximate):
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return _activate(gate, approximate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        with torch.autocast(gate.device.type, enabled=False):
            dgate = dy * up
            if ctx.approximate is None:
                torch.ops.aten.silu_backward(dgate, gate, grad_input=dgate)
            else:
                torch.ops.aten.gelu_backward(dgate, gate, approximate=ctx.approximate, grad_input=dgate)
            return dgate, _activate(gate, ctx.approximate).mul_(dy), None


def _activate(x: Tensor, approximate: str | None) -> Tensor:
    return F.silu(x) if approximate is None else F.gelu(x, approximate=approximate)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the unit of the Llama family.

    gate, up: [..., F], same shape and dtype, contiguous or strided views.

    Returns [..., F] in the dtype of the inputs. Raises ValueError where shapes or dtypes differ.
    """
    _check("swiglu", gate, up)
    with torch.autocast(gate.device.type, enabled=False):
        if backend_for("swiglu", gate) == "reference":
            return swiglu_ref(gate, up)
        return _GLU.apply(gate, up, None)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up, the unit of the Gemma family.

    gate, up: [..., F], same shape and dtype, contiguous or strided views.
    approximate: "tanh" for the tanh approximation, "none" for the exact form with erf, as in torch.nn.functional.gelu.

    Returns [..., F] in the dtype of the inputs. Raises ValueError where shapes or dtypes differ.
    """
    _check("geglu", gate, up)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate {approximate!r}: expected 'tanh' or 'none'")
    with torch.autocast(gate.device.type, enabled=False):
        if backend_for("geglu", gate) == "reference":
            return geglu_ref(gate, up, approximate)
        return _GLU.apply(gate, up, approximate)


def _check(op: str, gate: Tensor, up: Tensor) -> None:
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"{op}: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ")
