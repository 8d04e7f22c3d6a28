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

    With `keep="y"` y instead of x: n is y / (offset + weight), and the backward needs nothing else of x. A matrix product
    keeps its input for the gradient of its weight, so the y before one costs nothing, and an fp32 residual stream 4 bytes an
    element. n then has the precision of y, one rounding to bf16, which dy and dx have as well.

Bytes moved, per element in bf16
    Fused: 4 forward (read x, write y), 6 backward (read x and dy, write dx); the formula op by op: about 44 and twice
    that. Fusing the residual, s = x + residual, y = norm(s): 8 each way, against 10 and 12 with an addition of its own.

The kernels
    Forward, a program takes a few whole rows and keeps them in registers between the sum of squares and the product.
    Backward, dweight is a sum over all rows. A small grid (a few programs a multiprocessor) walks over the rows, each
    program adds up its own in fp32 registers and writes one row of partial sums; torch adds those up. No atomics, so
    the result repeats bitwise. Rows longer than 16,384 would not fit the registers: the torch path has them.

fp32 (fp64 for fp64 inputs): the sum of squares, rstd, both reductions of the backward pass. The weight may be kept in
fp32 beside bf16 activations; dweight has the dtype of the weight.

Mixed precision: the residual stream is fp32 while the matrix products around it are bf16. `dtype` makes y what the products
read: the kernel rounds once more as it writes, which a cast after it would do in a pass of its own, 6 bytes an element. For
the same reason a branch in bf16 that was added to a residual in fp32 gets its gradient in bf16 from the kernel. Where the
product itself has added to the residual (linear.py), its gradient keeps that copy.

Paper: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from typing import Literal

import torch
from torch import Tensor

from minisft.kernels.common import (
    as_rows,
    backend_for,
    cdiv,
    jit,
    may_change,
    next_power_of_2,
    num_sms,
    once_differentiable,
    smallest_fit,
    tl,
)
from minisft.kernels.copies import keep_copy

MAX_FEATURES = 16384  # of the Triton kernels


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    upcast_weight: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The formula. Arguments as in `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if not upcast_weight:
        normed = normed.to(x.dtype)
    return (normed * (weight.to(wide.dtype) + offset)).to(x.dtype).to(dtype or x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float, **options) -> tuple[Tensor, Tensor]:
    """The formula. Arguments as in `add_rms_norm`."""
    total = x + residual
    return rms_norm_ref(total, weight, eps, **options), total


@jit
def _rms_norm_fwd_kernel(
    x_ptr,  # [T, D], rows stride_x apart
    residual_ptr,  # [T, D] or None
    weight_ptr,  # [D]
    y_ptr,  # [T, D]
    sum_ptr,  # [T, D]: x + residual, or None
    rstd_ptr,  # fp32 [T]
    T,
    stride_x,
    stride_residual,
    eps,
    offset,
    D: tl.constexpr,
    UPCAST_WEIGHT: tl.constexpr,
    ADD: tl.constexpr,
    LEAST: tl.constexpr,  # what a weight nearer to zero counts as, 0 where x is kept
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < T) & (column < D)
    narrow = sum_ptr.dtype.element_ty if ADD else x_ptr.dtype.element_ty  # the dtype of what is normalised
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * stride_residual + column, mask=mask, other=0.0).to(tl.float32)
        x = x.to(narrow)  # the norm is that of the sum as the next residual has it
        tl.store(sum_ptr + row * D + column, x, mask=mask)
        x = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < T)
    normed = x * rstd
    if not UPCAST_WEIGHT:
        normed = normed.to(narrow).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset
    if LEAST > 0:
        weight = tl.where(tl.abs(weight) < LEAST, LEAST, weight)
    tl.store(y_ptr + row * D + column, (normed * weight).to(narrow).to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _rms_norm_bwd_kernel(
    kept_ptr,  # [T, D], rows stride_kept apart: x or y
    weight_ptr,  # [D]
    rstd_ptr,  # fp32 [T]
    dy_ptr,  # [T, D]
    dsum_ptr,  # [T, D]: what else flows back into x, or None
    dx_ptr,  # [T, D]
    dx_too_ptr,  # [T, D]: the same in another dtype, or None
    dweight_ptr,  # fp32 [programs, D]: each program's share, or None
    T,
    stride_kept,
    offset,
    D: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    LEAST: tl.constexpr,  # as in the forward pass, 0 where x is kept
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every program takes ROWS rows at a time, as many times as there are rows left."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset
    if LEAST > 0:
        weight = tl.where(tl.abs(weight) < LEAST, LEAST, weight)
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    # With num_stages the next rows are fetched while these are worked on.
    for first in tl.range(program * ROWS, T, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < T) & (column < D)
        kept = tl.load(kept_ptr + row * stride_kept + column, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * D + column, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        normed = kept / weight if LEAST > 0 else kept * rstd
        g = dy * weight
        dx = rstd * (g - normed * (tl.sum(g * normed, 1, keep_dims=True) / D))
        if ADD:
            dx += tl.load(dsum_ptr + row * D + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dx_too_ptr is not None:
            tl.store(dx_too_ptr + row * D + column, dx.to(dx_too_ptr.dtype.element_ty), mask=mask)
        if WEIGHT_GRADIENT:
            dweight += dy * normed
    if WEIGHT_GRADIENT:
        column = tl.arange(0, BLOCK_D)
        tl.store(dweight_ptr + program * D + column, tl.sum(dweight, 0), mask=column < D)


# The first entry that is large enough: forward for the features of a row, backward for its bytes, as rows wait in shared
# memory there, STAGES - 1 of x, dy and dsum each. A thread holds 16 to 32 elements.
CONFIGS = {
    "_rms_norm_fwd_kernel": {
        256: dict(ROWS=16, num_warps=4),
        1024: dict(ROWS=4, num_warps=4),
        8192: dict(ROWS=1, num_warps=8),
        MAX_FEATURES: dict(ROWS=1, num_warps=16),
    },
    "_rms_norm_bwd_kernel": {
        512: dict(ROWS=8, STAGES=3, num_warps=4),
        2048: dict(ROWS=2, STAGES=3, num_warps=4),
        8192: dict(ROWS=1, STAGES=3, num_warps=8),
        16384: dict(ROWS=1, STAGES=2, num_warps=16),
        4 * MAX_FEATURES: dict(ROWS=1, STAGES=1, num_warps=16),
    },
}
WARPS_PER_SM = 16  # of the backward's grid: enough loads in flight, few rows of partial sums


def _least_weight(keep: str, *dtypes: torch.dtype) -> float:
    """The size that a weight must have for y, rounded to these dtypes, to tell n; 0 where x is kept."""
    return max(1e-20, *(torch.finfo(dtype).tiny for dtype in dtypes)) if keep == "y" else 0.0


class _RMSNorm(torch.autograd.Function):
    """Saves x or y, and rstd; the fp32 temporaries live for one call only."""

    @staticmethod
    def forward(ctx, x, weight, eps, offset, upcast_weight, dtype, keep):
        ctx.offset, ctx.least, ctx.dtype = offset, _least_weight(keep, x.dtype, dtype), x.dtype
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y = torch.mul(wide, rstd, out=None if wide is x else wide)  # one fp32 buffer: on a CPU new memory is slow
        if not upcast_weight and y.dtype != x.dtype:
            y.copy_(y.to(x.dtype))
        y = y.mul_(_scale(weight, wide.dtype, offset, ctx.least)).to(x.dtype).to(dtype)
        ctx.save_for_backward(y if ctx.least else x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        kept, weight, rstd = ctx.saved_tensors
        features = kept.shape[-1]
        scale = _scale(weight, rstd.dtype, ctx.offset, ctx.least)
        with torch.autocast(dy.device.type, enabled=False):
            wide, g = (t.to(rstd.dtype).reshape(-1, features) for t in (kept, dy))
            rstd = rstd.reshape(-1, 1)
            to_n = rstd  # [rows, 1], what `wide` is to be multiplied by: x, or n itself
            if ctx.least:
                wide = torch.mul(wide, scale.reciprocal(), out=None if kept.dtype == rstd.dtype else wide)
                to_n = torch.ones_like(rstd)
            h = wide * g
            dweight = (to_n[:, 0] @ h).to(weight.dtype) if ctx.needs_input_grad[1] else None
            if not ctx.needs_input_grad[0]:
                return None, dweight, *[None] * 5
            pull = (h @ scale)[:, None].mul_(to_n.square().mul_(rstd)).div_(features)  # mean(g n) rstd to_n, [rows, 1]
            dx = torch.mul(g, scale, out=h).mul_(rstd).addcmul_(wide, pull, value=-1)
        return dx.to(ctx.dtype).view(dy.shape), dweight, *[None] * 5


def _scale(weight: Tensor, dtype: torch.dtype, offset: float, least: float) -> Tensor:
    """offset + weight, what is nearer to zero than least replaced by it."""
    scale = weight.to(dtype) + offset if offset else weight.to(dtype)
    return torch.where(scale.abs() < least, least, scale) if least else scale


class _RMSNormTriton(torch.autograd.Function):
    """x [T, D] and a residual [T, D] or None -> y, and the sum [T, D] where there is a residual. returns_x: y, and x as it is,
    whose gradient takes in what flows back from both; it keeps its copy in the dtype of y."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, upcast_weight, dtype, keep, returns_x):
        T, D = x.shape
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.dtype = x.dtype if residual is None else torch.promote_types(*ctx.dtypes)  # of what is normalised
        ctx.offset, ctx.least = offset, _least_weight(keep, ctx.dtype, dtype)
        total = None if residual is None else x.new_empty(T, D, dtype=ctx.dtype)
        y = x.new_empty(T, D, dtype=dtype)
        rstd = x.new_empty(T, dtype=torch.float32)
        config = smallest_fit(CONFIGS["_rms_norm_fwd_kernel"], D)
        _rms_norm_fwd_kernel[(cdiv(T, config["ROWS"]),)](
            *(x, residual, weight, y, total, rstd, T, x.stride(0), 0 if residual is None else residual.stride(0)),
            *(eps, offset, D, upcast_weight, residual is not None, ctx.least),
            BLOCK_D=next_power_of_2(D),
            **config,
        )
        ctx.save_for_backward(y if ctx.least else x if total is None else total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.copy_dtype = dtype if returns_x and dtype != ctx.dtype else None
        if returns_x:
            ctx.mark_dirty(x)  # else autograd would return a view of x, to which no product may add
            total = x
        return y if total is None else (y, total)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dsum=None):
        kept, weight, rstd = ctx.saved_tensors
        T, D = kept.shape
        if dy is None:  # nobody used y
            dx, dx_too, dweight = dsum, dsum, None
        else:
            dx = kept.new_empty(T, D, dtype=ctx.dtype)
            # of x or the residual
            other = next((dtype for dtype in (*ctx.dtypes, ctx.copy_dtype) if dtype not in (None, ctx.dtype)), None)
            dx_too = None if other is None else torch.empty_like(dx, dtype=other)
            config = smallest_fit(CONFIGS["_rms_norm_bwd_kernel"], D * ctx.dtype.itemsize)
            programs = min(cdiv(T, config["ROWS"]), num_sms(kept) * (WARPS_PER_SM // config["num_warps"]))
            partial = kept.new_empty(programs, D, dtype=torch.float32) if ctx.needs_input_grad[2] else None
            _rms_norm_bwd_kernel[(programs,)](
                *(kept, weight, rstd, dy.contiguous(), None if dsum is None else dsum.contiguous(), dx, dx_too),
                *(partial, T, kept.stride(0), ctx.offset, D, dsum is not None, partial is not None, ctx.least),
                BLOCK_D=next_power_of_2(D),
                **config,
            )
            dweight = None if partial is None else partial.sum(0).to(weight.dtype)
            if ctx.copy_dtype is not None:
                keep_copy(dx, dx_too)
        gradients = [None if dtype is None else dx if dtype == ctx.dtype else dx_too for dtype in ctx.dtypes]
        return *gradients, dweight, *[None] * 6


def _rms_norm_triton(x, residual, weight, eps, offset, upcast_weight, dtype, keep):
    """Any number of dimensions -> rows -> the kernels -> the shape of x."""
    rows = [None if t is None else as_rows(t) for t in (x, residual)]
    y = _RMSNormTriton.apply(*rows, weight.contiguous(), eps, offset, upcast_weight, dtype, keep, False)
    return y.view(x.shape) if residual is None else tuple(t.view(x.shape) for t in y)


def _cannot(x: Tensor) -> str:
    return f"{x.shape[-1]} features, and the kernels take at most {MAX_FEATURES}" if x.shape[-1] > MAX_FEATURES else ""


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    upcast_weight: bool = False,
    dtype: torch.dtype | None = None,
    keep: Literal["x", "y"] = "x",
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension.

    x: [..., D], bf16, fp16, fp32 or fp64. weight: [D], the dtype of x or fp32. eps: added to the mean square.
    offset: 1.0 for the Gemma families, which store weight - 1.
    upcast_weight: multiply by the weight in fp32 and cast once (Gemma, OLMo 2); else cast, then multiply (all others).
    dtype: of y; None = that of x. y is rounded to the dtype of x and then to this one.
    keep: what the backward pass reads. "y" costs no memory where y is kept anyway, as a matrix product keeps its input. So that
        y tells what n was, an |offset + weight| below 1e-20 counts as 1e-20 (fp16: 6.1e-5, its smallest normal number).

    Returns [..., D]. Raises ValueError where the weight does not fit x.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    dtype = dtype or x.dtype
    with torch.autocast(x.device.type, enabled=False):
        backend = backend_for("rms_norm", x, _cannot(x))
        if backend == "reference":
            return rms_norm_ref(x, weight, eps, offset=offset, upcast_weight=upcast_weight, dtype=dtype)
        if backend == "triton":
            return _rms_norm_triton(x, None, weight, eps, offset, upcast_weight, dtype, keep)
        return _RMSNorm.apply(x, weight, eps, offset, upcast_weight, dtype, keep)


def add_rms_norm(
    x: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    upcast_weight: bool = False,
    dtype: torch.dtype | None = None,
    keep: Literal["x", "y"] = "x",
) -> tuple[Tensor, Tensor]:
    """The step between two sublayers: sum = x + residual, y = rms_norm(sum).

    x, residual: [..., D]; their dtypes may differ, the sum gets the wider one. x None: the residual is the sum already, and is
    returned itself. dtype: of y; None = that of the sum. The rest as in `rms_norm`.

    Returns (y, sum), both [..., D]: y feeds the next sublayer, the sum is the next residual.
    Raises ValueError where the shapes differ.
    """
    if x is not None and x.shape != residual.shape:
        raise ValueError(f"add_rms_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} differ")
    if weight.shape == residual.shape[-1:] and backend_for("rms_norm", residual, _cannot(residual)) == "triton":
        sum_dtype = residual.dtype if x is None else torch.promote_types(x.dtype, residual.dtype)
        options = weight.contiguous(), eps, offset, upcast_weight, dtype or sum_dtype, keep
        with torch.autocast(residual.device.type, enabled=False):
            if x is not None:
                return _rms_norm_triton(x, residual, *options)
            has_gradient = torch.is_grad_enabled() and residual.requires_grad
            fits = residual.ndim == 2 and residual.is_contiguous() and may_change(residual)
            if has_gradient and fits and keep == "y":  # not "x": autograd would find x changed
                # Its values stay, so what others have kept of it for their backward passes counts as unchanged.
                with torch.autograd._unsafe_preserve_version_counter(residual):
                    return _RMSNormTriton.apply(residual, None, *options, True)
    total = residual if x is None else x + residual
    return rms_norm(total, weight, eps, offset=offset, upcast_weight=upcast_weight, dtype=dtype, keep=keep), total
