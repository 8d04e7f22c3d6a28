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

The kernels
    Forward, a program keeps a few whole rows in registers, so the variance takes the differences from the mean and not
    mean(x^2) - mean(x)^2, which loses every digit where the mean is large. Backward, a small grid walks over the rows
    as in rms_norm.py. A walk would wait for memory at every step, so each step asks for the rows of the next ones
    (`STAGES`), which travel into shared memory while this one computes. Each program writes one row of partial sums
    for dweight and one for dbias, one torch.sum adds up both: no atomics, the result repeats bitwise. Rows longer than
    32 KB (16,384 features in bf16) would not fit the registers: the torch path has them.

fp32 (fp64 for fp64 inputs): everything between reading x and writing y. The parameters may be kept in fp32 beside bf16
activations; y always has the dtype of x.

Paper: Ba, Kiros and Hinton 2016, "Layer Normalization".
"""

import torch
from torch import Tensor

from minisft.kernels.common import (
    as_rows,
    backend_for,
    cdiv,
    jit,
    next_power_of_2,
    num_sms,
    once_differentiable,
    refuse_second_derivative,
    smallest_fit,
    tl,
)

MAX_BYTES = 32768  # of a row, in the Triton kernels


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


@jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [T, D], rows stride_x apart
    weight_ptr,  # [D] or None
    bias_ptr,  # [D] or None
    y_ptr,  # [T, D]
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    T,
    stride_x,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """ROWS rows a program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < T) & (column < D)
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1, keep_dims=True) / D
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1, keep_dims=True) / D + eps)
    tl.store(mean_ptr + row, mean, mask=row < T)
    tl.store(rstd_ptr + row, rstd, mask=row < T)
    y = centred * rstd
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _layer_norm_bwd_kernel(
    x_ptr,  # [T, D], rows stride_x apart
    weight_ptr,  # [D] or None
    mean_ptr,  # fp32 [T]
    rstd_ptr,  # fp32 [T]
    dy_ptr,  # [T, D]
    dx_ptr,  # [T, D]
    dweight_ptr,  # fp32 [programs, D]: each program's share, or None
    dbias_ptr,  # fp32 [programs, D] or None
    T,
    stride_x,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Every program takes ROWS rows at a time, as many times as there are rows left."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    dweight = tl.zeros((ROWS, BLOCK_D), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    for first in tl.range(program * ROWS, T, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        mask = (row < T) & (column < D)
        x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * D + column, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        normed = tl.where(mask, (x - mean) * rstd, 0.0)
        g = dy
        if weight_ptr is not None:
            g = dy * weight.to(tl.float32)
        pull = tl.sum(g, 1, keep_dims=True) / D + normed * (tl.sum(g * normed, 1, keep_dims=True) / D)
        tl.store(dx_ptr + row * D + column, (rstd * (g - pull)).to(dx_ptr.dtype.element_ty), mask=mask)
        if dweight_ptr is not None:
            dweight += dy * normed
        if dbias_ptr is not None:
            dbias += dy
    column = tl.arange(0, BLOCK_D)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * D + column, tl.sum(dweight, 0), mask=column < D)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * D + column, tl.sum(dbias, 0), mask=column < D)


# Forward by the features of a row, backward by its bytes, because rows wait in shared memory: 2 (STAGES - 1) of them may
# take 64 KB. The first entry that is large enough; a thread holds 16 to 32 elements.
CONFIGS = {
    "_layer_norm_fwd_kernel": {
        1024: dict(ROWS=4, num_warps=4),
        8192: dict(ROWS=1, num_warps=8),
        16384: dict(ROWS=1, num_warps=16),
    },
    "_layer_norm_bwd_kernel": {
        2048: dict(ROWS=2, STAGES=3, num_warps=4),
        8192: dict(ROWS=1, STAGES=3, num_warps=8),
        16384: dict(ROWS=1, STAGES=3, num_warps=16),
        MAX_BYTES: dict(ROWS=1, STAGES=2, num_warps=16),
    },
}
WARPS_PER_SM = 16  # of the backward's grid


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
        if not fused or any(dtype not in (None, rstd.dtype) for dtype in ctx.dtypes):  # else PyTorch's op has it
            refuse_second_derivative(ctx)
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


class _LayerNormTriton(torch.autograd.Function):
    """x [T, D] -> y [T, D]."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        T, D = x.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        mean, rstd = x.new_empty(2, T, dtype=torch.float32)
        config = smallest_fit(CONFIGS["_layer_norm_fwd_kernel"], D)
        _layer_norm_fwd_kernel[(cdiv(T, config["ROWS"]),)](
            *(x, weight, bias, y, mean, rstd, T, x.stride(0), eps, D),
            BLOCK_D=next_power_of_2(D),
            **config,
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        T, D = x.shape
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        config = smallest_fit(CONFIGS["_layer_norm_bwd_kernel"], D * x.element_size())
        programs = min(cdiv(T, config["ROWS"]), num_sms(x) * (WARPS_PER_SM // config["num_warps"]))
        wanted = [i for i in (0, 1) if ctx.needs_input_grad[1 + i]]  # 0 the weight, 1 the bias
        partial = x.new_empty(len(wanted), programs, D, dtype=torch.float32)
        shares = [partial[wanted.index(i)] if i in wanted else None for i in (0, 1)]
        _layer_norm_bwd_kernel[(programs,)](
            *(x, weight, mean, rstd, dy.contiguous(), dx, *shares, T, x.stride(0), D),
            BLOCK_D=next_power_of_2(D),
            **config,
        )
        sums = partial.sum(1) if wanted else None
        gradients = [sums[wanted.index(i)].to(ctx.dtypes[i]) if i in wanted else None for i in (0, 1)]
        return dx, *gradients, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension.

    x: [..., D], bf16, fp16, fp32 or fp64. weight, bias: [D] in the dtype of x or fp32, or None. eps: added to the
    variance.

    Returns [..., D] in the dtype of x. Raises ValueError where a parameter does not fit x.
    """
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"layer_norm: {name} {tuple(p.shape)} does not fit x {tuple(x.shape)}")
    cannot, most = "", MAX_BYTES // x.element_size()
    if x.shape[-1] > most:
        cannot = f"{x.shape[-1]} features in {x.dtype}, and the kernels take at most {most}"
    with torch.autocast(x.device.type, enabled=False):
        backend = backend_for("layer_norm", x, cannot)
        if backend == "reference":
            return layer_norm_ref(x, weight, bias, eps)
        if backend == "triton":
            weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
            return _LayerNormTriton.apply(as_rows(x), weight, bias, eps).view(x.shape)
        return _LayerNorm.apply(x, weight, bias, eps)
