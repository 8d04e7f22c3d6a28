"""LayerNorm: every token centred and divided by its standard deviation, with an optional scale and shift.

What it computes, for one row x of D features

        mean = sum(x) / D        rstd = 1 / sqrt(mean((x - mean)^2) + eps)        n = (x - mean) * rstd
        y = n * weight + bias

    Without weight and bias it is OLMo 1's norm, without bias Cohere's.

Backward, with g = dy * weight

        dx = rstd * (g - mean(g) - n * mean(g * n))
        dweight = sum over rows of dy * n        dbias = sum over rows of dy

What is saved: x in its own dtype, mean and rstd (8 bytes a row). Bytes moved per element in bf16: 4 forward, 6
backward; the formula op by op: about 60 and twice that.

fp32 (fp64 for fp64 inputs): everything between reading x and writing y. The parameters may be kept in fp32 beside bf16
activations; y always has the dtype of x.

Paper: Ba, Kiros and Hinton 2016, "Layer Normalization".
"""

import torch
from torch import Tensor

from minisft.kernels.common import backend_for


def layer_norm_ref(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The formula. Arguments as in `layer_norm`."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    """PyTorch's fused op; but on a CPU it would sum the gradients of the parameters in bf16, so that part is ours."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = torch.ones(x.shape[-1:], dtype=wide, device=x.device) if weight is None else weight.to(wide)
        shift = torch.zeros_like(scale) if bias is None else bias.to(wide)
        source = x if x.device.type == "cpu" else x.to(wide)  # the CUDA op takes one dtype only
        y, mean, rstd = torch.native_layer_norm(source, x.shape[-1:], scale, shift, eps)
        ctx.save_for_backward(source, scale, shift, mean, rstd)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias)]
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, scale, shift, mean, rstd = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        fused = x.dtype == rstd.dtype
        with torch.autocast(x.device.type, enabled=False):
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
                dy.to(x.dtype),
                x,
                x.shape[-1:],
                mean,
                rstd,
                scale,
                shift,
                [needs_x, fused and needs_weight, fused and needs_bias],
            )
            rows = list(range(x.ndim - 1))
            if needs_weight and not fused:
                dweight = (x - mean).mul_(rstd).mul_(dy).sum(rows)  # x - mean is fp32, as mean is
            if needs_bias and not fused:
                dbias = dy.sum(rows, dtype=rstd.dtype)
        return *(None if g is None else g.to(dtype) for g, dtype in zip((dx, dweight, dbias), ctx.dtypes)), None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension.

    x: [..., D], bf16, fp16, fp32 or fp64. weight, bias: [D] in the dtype of x or fp32, or None. eps: added to the
    variance.

    Returns [..., D] in the dtype of x. Raises ValueError where a parameter does not fit x.
    """
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"layer_norm: {name} {tuple(p.shape)} does not fit x {tuple(x.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        if backend_for("layer_norm", x) == "reference":
            return layer_norm_ref(x, weight, bias, eps)
        return _LayerNorm.apply(x, weight, bias, eps)
