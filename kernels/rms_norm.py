"""RMSNorm: every token divided by the root mean square of its features, alone or fused with the residual addition.

What it computes, for one row x of D features

        rstd = 1 / sqrt(mean(x^2) + eps)        n = x * rstd        y = n * (offset + weight)

    Model families round at two different places, and a loaded model is only reproduced when we round where it does:
    Llama and most others cast n to the dtype of x and then multiply (`upcast_weight=False`); Gemma (offset 1) and OLMo
    2 multiply in fp32 and cast once at the end (`upcast_weight=True`).

Backward, with g = dy * (offset + weight)

        dx = rstd * (g - n * mean(g * n))        dweight = sum over rows of dy * n

    In terms of h = dy * x both reductions are matrix-vector products: h @ w gives the row sums and rstd @ h gives
    dweight.

What is saved
    x in its own dtype and rstd, 4 bytes a row. Autograd through the formula keeps an fp32 copy of x and the normalised
    values: 6 to 8 bytes an element where x in bf16 takes 2.

Bytes moved, per element in bf16
    Fused: 4 forward (read x, write y), 6 backward (read x and dy, write dx); the formula op by op: about 44 and twice
    that. Fusing the residual, s = x + residual, y = norm(s), saves reading s once more.

fp32 (fp64 for fp64 inputs): the sum of squares, rstd, both reductions of the backward pass. The weight may be kept in
fp32 beside bf16 activations; y always has the dtype of x, dweight the dtype of the weight.

Paper: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

import torch
from torch import Tensor

from minisft.kernels.common import backend_for


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, upcast_weight: bool = False) -> Tensor:
    """The formula. Arguments as in `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if not upcast_weight:
        normed = normed.to(x.dtype)
    return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float, **options) -> tuple[Tensor, Tensor]:
    """The formula. Arguments as in `add_rms_norm`."""
    total = x + residual
    return rms_norm_ref(total, weight, eps, **options), total


class _RMSNorm(torch.autograd.Function):
    """Saves x and rstd; the fp32 temporaries live for one call only."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, upcast_weight):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        y = torch.mul(wide, rstd, out=None if wide is x else wide)  # one fp32 buffer: on a CPU new memory is slow
        if not upcast_weight and y.dtype != x.dtype:
            y.copy_(y.to(x.dtype))
        return y.mul_(weight.to(wide.dtype) + offset if offset else weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        features = x.shape[-1]
        scale = weight.to(rstd.dtype) + ctx.offset
        with torch.autocast(x.device.type, enabled=False):
            wide, g = (t.to(rstd.dtype).reshape(-1, features) for t in (x, dy))
            rstd = rstd.reshape(-1, 1)
            h = wide * g
            dweight = (rstd[:, 0] @ h).to(weight.dtype) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, dweight, None, None, None
            pull = (h @ scale)[:, None].mul_(rstd.pow(3)).div_(features)  # mean(g n) rstd^2, [rows, 1]
            dx = torch.mul(g, scale, out=h).mul_(rstd).addcmul_(wide, pull, value=-1)
        return dx.to(x.dtype).view(x.shape), dweight, None, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, upcast_weight: bool = False) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension.

    x: [..., D], bf16, fp16, fp32 or fp64. weight: [D], the dtype of x or fp32. eps: added to the mean square.
    offset: 1.0 for the Gemma families, which store weight - 1.
    upcast_weight: multiply by the weight in fp32 and cast once (Gemma, OLMo 2); else cast, then multiply (all others).

    Returns [..., D] in the dtype of x. Raises ValueError where the weight does not fit x.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        if backend_for("rms_norm", x) == "reference":
            return rms_norm_ref(x, weight, eps, offset=offset, upcast_weight=upcast_weight)
        return _RMSNorm.apply(x, weight, eps, offset, upcast_weight)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, upcast_weight: bool = False
) -> tuple[Tensor, Tensor]:
    """The step between two sublayers: sum = x + residual, y = rms_norm(sum).

    x, residual: [..., D]; their dtypes may differ, the sum gets the wider one. The rest as in `rms_norm`.

    Returns (y, sum), both [..., D] in the dtype of the sum: y feeds the next sublayer, the sum is the next residual.
    Raises ValueError where the shapes differ.
    """
    if x.shape != residual.shape:
        raise ValueError(f"add_rms_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} differ")
    total = x + residual
    return rms_norm(total, weight, eps, offset=offset, upcast_weight=upcast_weight), total
