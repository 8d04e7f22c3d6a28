"""Short causal convolution: every channel mixes the newest K tokens of its own document (Qwen3.5, OLMo hybrid, LFM2).

What it computes, for token t and channel c, with the first token of t's document at start[t]

        y[t, c] = act(bias[c] + sum over j < K, t - j >= start[t], of weight[c, K - 1 - j] * x[t - j, c])

    weight[c, K - 1] meets the token itself, weight[c, 0] the oldest one, as in the files of the checkpoints. Before a
    document's first token there are zeros, not the end of the neighbour: a packed row gives what its documents give one by one.

Backward, with du = dy * act'(u) and u what act is applied to

        dx[t] = sum over j of weight[K - 1 - j] * du[t + j]  where t + j is in the same document
        dweight[K - 1 - j] = sum over t of du[t] * x[t - j]  where t - j is              dbias = sum over t of du[t]

What is saved
    x, the weight, the bias and `start`. u is computed again in the backward pass: K multiplications an element.

Bytes moved, per element in bf16: fused 4 forward (read x, write y), 6 backward (read x and dy, write dx).

The torch path
    On a CPU it takes a few tokens at a time, of which all K shifted copies and u stay in a core's cache.

The kernels
    Forward, a program takes a tile of tokens and channels and loads it K times, shifted; all but the first come from the
    cache. Backward, a program walks over ROWS tokens of a few channels. The last K inputs, the K unfinished numbers of dx
    and the sums for dweight and dbias are in its registers, so that u and the activation are computed once an element; the
    K - 1 tokens behind its own are walked over as well. The sums of the programs are added up by torch: no atomics.

fp32 (fp64 for fp64 inputs): the sums and the activation; y is rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import INTERPRETER, arch_of, as_rows, backend_for, cdiv, jit, once_differentiable, tl

ACTIVATIONS = (None, "silu")
LONGEST = 4  # K of the Triton kernels: so many inputs are in the registers of the backward's


def causal_conv1d_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, *, activation: str | None = None
) -> Tensor:
    """The formula. Arguments as in `causal_conv1d`."""
    kernel_size = weight.shape[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    token = torch.arange(len(x), device=x.device)
    u = torch.zeros_like(wide) if bias is None else bias.to(wide.dtype).expand_as(wide)
    for j in range(kernel_size):
        inside = (token - j >= start)[:, None]
        u = u + torch.where(inside, wide[(token - j).clamp(min=0)], 0) * weight[:, kernel_size - 1 - j].to(wide.dtype)
    return (F.silu(u) if activation == "silu" else u).to(x.dtype)


SLAB = 2**17  # numbers that the torch path computes at a time on a CPU


def _slabs(x: Tensor, start: Tensor, kernel_size: int) -> tuple[Tensor, list[tuple[int, int, bool]]]:
    """The place of each token in its document, and slabs of neighbouring tokens (a, b, whether a start is in or close to it)."""
    place = torch.arange(len(x), device=x.device) - start
    if x.is_cuda:
        return place, [(0, len(x), True)]
    size = max(4 * kernel_size, SLAB // x.shape[1])
    close = (place < kernel_size - 1).split(size)
    ends = [bool(slab.any()) for slab in close] + [False]
    return place, [(a, min(a + size, len(x)), ends[n] or ends[n + 1]) for n, a in enumerate(range(0, len(x), size))]


def _before_activation(wide, taps, bias, place, first, mixed):
    """u of the tokens wide[first:], a slab behind the `first` tokens that it reads as well: [n, C] -> [n - first, C]."""
    u = wide[first:] * taps[0] if bias is None else torch.addcmul(bias, wide[first:], taps[0])
    for j in range(1, min(len(taps), len(wide))):
        skip = max(0, j - first)  # at the beginning of the stream there are none before
        shifted = wide[first + skip - j : len(wide) - j]
        if mixed:
            shifted = shifted.masked_fill((place[skip:] < j)[:, None], 0)
        u[skip:].addcmul_(shifted, taps[j])
    return u


class _CausalConv1d(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx, x, weight, bias, start, silu):
        ctx.save_for_backward(x, weight, bias, start)
        ctx.silu, K, dtype = silu, weight.shape[1], torch.promote_types(x.dtype, torch.float32)
        taps = weight.T.flip(0).to(dtype)  # [K, C]: that of the token itself first
        offset = None if bias is None else bias.to(dtype)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        place, slabs = _slabs(x, start, K)
        for a, b, mixed in slabs:
            before = max(0, a - K + 1)
            u = _before_activation(x[before:b].to(dtype), taps, offset, place[a:b], a - before, mixed)
            y[a:b] = F.silu(u, inplace=True) if silu else u
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, start = ctx.saved_tensors
        K, dtype = weight.shape[1], torch.promote_types(x.dtype, torch.float32)
        taps = weight.T.flip(0).to(dtype)
        offset = None if bias is None else bias.to(dtype)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dtaps = torch.zeros_like(taps) if ctx.needs_input_grad[1] else None
        dbias = torch.zeros_like(taps[0]) if ctx.needs_input_grad[2] else None
        place, slabs = _slabs(x, start, K)
        du = x.new_empty(0, x.shape[1], dtype=dtype)
        for a, b, mixed in reversed(slabs):
            before = max(0, a - K + 1)
            wide, first = x[before:b].to(dtype), a - before
            own = dy[a:b].to(dtype)
            if ctx.silu:
                u = _before_activation(wide, taps, offset, place[a:b], first, mixed)
                own = torch.ops.aten.silu_backward(own, u)
            if dbias is not None:
                dbias += own.sum(0)
            du = torch.cat([own, du[: K - 1]])  # and the tokens behind the slab
            total = own * taps[0]
            if dtaps is not None:
                dtaps[0] += (own * wide[first:]).sum(0)
            for j in range(1, K):
                later, earlier = du[j : len(own) + j], own[max(0, j - first) :]
                if mixed:
                    later = later.masked_fill((place[a + j : b + j] < j)[:, None], 0)
                    earlier = earlier.masked_fill((place[b - len(earlier) : b] < j)[:, None], 0)
                total[: len(later)].addcmul_(later, taps[j])
                if dtaps is not None and len(earlier):
                    dtaps[j] += (earlier * wide[len(wide) - j - len(earlier) : len(wide) - j]).sum(0)
            dx[a:b] = total
        dweight = None if dtaps is None else dtaps.flip(0).T.to(weight.dtype)
        return dx, dweight, None if dbias is None else dbias.to(bias.dtype), None, None


@jit
def _sigmoid(x):
    """By an exponential that cannot overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@jit
def _causal_conv1d_fwd_kernel(
    x_ptr,  # [T, C], rows stride_x apart
    weight_ptr,  # [C, K]
    bias_ptr,  # [C] or None
    start_ptr,  # int [T]
    y_ptr,  # [T, C]
    T,
    stride_x,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < T) & (column < C)
    start = tl.load(start_ptr + row, mask=row < T, other=0)
    u = tl.zeros((ROWS, BLOCK_C), tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    for j in tl.static_range(K):
        inside = mask & (row - j >= start)
        x = tl.load(x_ptr + (row - j).to(tl.int64) * stride_x + column, mask=inside, other=0.0).to(tl.float32)
        u += x * tl.load(weight_ptr + column * K + (K - 1 - j), mask=column < C, other=0.0).to(tl.float32)
    if SILU:
        u *= _sigmoid(u)
    tl.store(y_ptr + row.to(tl.int64) * C + column, u.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _load_tap(weight_ptr, column, mask, j: tl.constexpr, K: tl.constexpr):
    """The weight of the input j tokens ago; 0 where the kernel is shorter."""
    return tl.load(weight_ptr + column * K + (K - 1 - j), mask=mask & (j < K), other=0.0).to(tl.float32)


@jit
def _causal_conv1d_bwd_kernel(
    x_ptr,  # [T, C], rows stride_x apart
    weight_ptr,  # [C, K]
    bias_ptr,  # [C] or None
    start_ptr,  # int [T]
    dy_ptr,  # [T, C]
    dx_ptr,  # [T, C]
    dtaps_ptr,  # fp32 [programs, 5, C]: each program's share of the gradients of tap 0, 1, 2, 3 and of the bias, or None
    T,
    stride_x,
    C: tl.constexpr,
    K: tl.constexpr,
    SILU: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walks over its ROWS tokens and the K - 1 behind them. Names that end in j: of the token j before the present one."""
    first = tl.program_id(0) * ROWS
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = column < C
    w0 = _load_tap(weight_ptr, column, mask, 0, K)
    w1 = _load_tap(weight_ptr, column, mask, 1, K)
    w2 = _load_tap(weight_ptr, column, mask, 2, K)
    w3 = _load_tap(weight_ptr, column, mask, 3, K)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if bias_ptr is not None:
        bias += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    x_ptr += first.to(tl.int64) * stride_x + column
    x1 = tl.load(x_ptr - stride_x, mask=mask & (first >= 1), other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr - 2 * stride_x, mask=mask & (first >= 2), other=0.0).to(tl.float32)
    x3 = tl.load(x_ptr - 3 * stride_x, mask=mask & (first >= 3), other=0.0).to(tl.float32)
    zeros = tl.zeros((BLOCK_C,), tl.float32)
    dx1, dx2, dx3 = zeros, zeros, zeros
    dw0, dw1, dw2, dw3, dbias = zeros, zeros, zeros, zeros, zeros
    for i in tl.range(0, ROWS + K - 1, num_stages=STAGES):
        t = first + i
        inside = mask & (t < T)
        place = t - tl.load(start_ptr + t, mask=t < T, other=0)
        x0 = tl.load(x_ptr + tl.cast(i, tl.int64) * stride_x, mask=inside, other=0.0).to(tl.float32)
        du = tl.load(dy_ptr + tl.cast(t, tl.int64) * C + column, mask=inside, other=0.0).to(tl.float32)
        seen1 = tl.where(place >= 1, x1, 0.0)
        seen2 = tl.where(place >= 2, x2, 0.0)
        seen3 = tl.where(place >= 3, x3, 0.0)
        if SILU:
            u = bias + x0 * w0 + seen1 * w1 + seen2 * w2 + seen3 * w3
            share = _sigmoid(u)
            du *= share * (1.0 + u * (1.0 - share))
        if WEIGHT_GRADIENT:
            own = tl.where(i < ROWS, du, 0.0)
            dw0 += own * x0
            dw1 += own * seen1
            dw2 += own * seen2
            dw3 += own * seen3
            dbias += own
        dx0 = du * w0
        dx1 += tl.where(place >= 1, du * w1, 0.0)
        dx2 += tl.where(place >= 2, du * w2, 0.0)
        dx3 += tl.where(place >= 3, du * w3, 0.0)
        if K == 1:
            done = dx0
        elif K == 2:
            done = dx1
        elif K == 3:
            done = dx2
        else:
            done = dx3
        finished = t - (K - 1)  # no later token reads this one
        out = dx_ptr + tl.cast(finished, tl.int64) * C + column
        tl.store(out, done.to(dx_ptr.dtype.element_ty), mask=mask & (finished >= first) & (finished < T))
        dx3, dx2, dx1 = dx2, dx1, dx0
        x3, x2, x1 = x2, x1, x0
    if WEIGHT_GRADIENT:
        dtaps_ptr += tl.program_id(0).to(tl.int64) * 5 * C + column
        tl.store(dtaps_ptr, dw0, mask=mask)
        tl.store(dtaps_ptr + C, dw1, mask=mask)
        tl.store(dtaps_ptr + 2 * C, dw2, mask=mask)
        tl.store(dtaps_ptr + 3 * C, dw3, mask=mask)
        tl.store(dtaps_ptr + 4 * C, dbias, mask=mask)


CONFIGS = {
    "_causal_conv1d_fwd_kernel": {
        INTERPRETER: dict(ROWS=8, BLOCK_C=16),
        "GPU": dict(ROWS=8, BLOCK_C=256, num_warps=4),
    },
    "_causal_conv1d_bwd_kernel": {
        INTERPRETER: dict(ROWS=8, BLOCK_C=16, STAGES=1),
        "GPU": dict(ROWS=64, BLOCK_C=128, STAGES=3, num_warps=1),
    },
}


def _config(kernel: str, x: Tensor) -> dict:
    return CONFIGS[kernel][INTERPRETER if arch_of(x) == INTERPRETER else "GPU"]


class _CausalConv1dTriton(torch.autograd.Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx, x, weight, bias, start, silu):
        weight, bias, start = (None if t is None else t.contiguous() for t in (weight, bias, start))
        (T, C), K = x.shape, weight.shape[1]
        ctx.save_for_backward(x, weight, bias, start)
        ctx.silu = silu
        y = x.new_empty(T, C)
        config = _config("_causal_conv1d_fwd_kernel", x)
        grid = cdiv(T, config["ROWS"]), cdiv(C, config["BLOCK_C"])
        _causal_conv1d_fwd_kernel[grid](x, weight, bias, start, y, T, x.stride(0), C, K, silu, **config)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, bias, start = ctx.saved_tensors
        (T, C), K = x.shape, weight.shape[1]
        config = _config("_causal_conv1d_bwd_kernel", x)
        grid = cdiv(T, config["ROWS"]), cdiv(C, config["BLOCK_C"])
        dx = x.new_empty(T, C)
        partial = x.new_empty(grid[0], 5, C, dtype=torch.float32) if any(ctx.needs_input_grad[1:3]) else None
        _causal_conv1d_bwd_kernel[grid](
            *(
                x,
                weight,
                bias,
                start,
                dy.contiguous(),
                dx,
                partial,
                T,
                x.stride(0),
                C,
                K,
                ctx.silu,
                partial is not None,
            ),
            **config,
        )
        if partial is None:
            return dx, None, None, None, None
        sums = partial.sum(0)  # [5, C]
        dbias = None if bias is None else sums[4].to(bias.dtype)
        return dx, sums[:K].flip(0).T.to(weight.dtype), dbias, None, None


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, start: Tensor, *, activation: str | None = None
) -> Tensor:
    """Depthwise causal convolution inside the documents of a flat stream.

    x: [T, C], bf16, fp16, fp32 or fp64. weight: [C, K]. bias: [C] or None. Both in the dtype of x or in fp32.
    start: int [T]: the first token of each token's document, as in a batch. activation: None or "silu".

    Returns [T, C] in the dtype of x. A document's output and gradients do not depend on the content of other documents, not
    even in the last bit. Raises ValueError where shapes, dtypes or the activation do not fit.
    """
    _check(x, weight, bias, activation)
    if start.shape != x.shape[:1] or start.is_floating_point():
        raise ValueError(f"causal_conv1d: start {tuple(start.shape)} {start.dtype}: expected {len(x)} integers")
    with torch.autocast(x.device.type, enabled=False):
        longer = weight.shape[1] > LONGEST
        cannot = f"{weight.shape[1]} weights a channel, and the kernels take at most {LONGEST}" if longer else ""
        backend = backend_for("causal_conv1d", x, cannot)
        if backend == "reference":
            return causal_conv1d_ref(x, weight, bias, start, activation=activation)
        if backend == "triton":
            return _CausalConv1dTriton.apply(as_rows(x), weight, bias, start, activation == "silu")
        return _CausalConv1d.apply(x, weight, bias, start, activation == "silu")


def causal_conv1d_update(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """One new token a row: a step of generation. Not differentiable.

    x: [B, C], the new inputs. state: [B, C, K - 1], each row's last inputs, the newest last (`conv_state`). weight, bias,
    activation: as in `causal_conv1d`.

    Returns the output [B, C] in the dtype of x, and the new state. Raises ValueError where shapes do not fit.
    """
    _check(x, weight, bias, activation)
    if state.shape != (*x.shape, weight.shape[1] - 1):
        raise ValueError(
            f"causal_conv1d_update: state {tuple(state.shape)} does not fit x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        newest = torch.cat([state, x[:, :, None].to(state.dtype)], dim=2)  # [B, C, K]
        u = (newest.to(wide) * weight.to(wide)).sum(2)
        if bias is not None:
            u += bias.to(wide)
        return (F.silu(u) if activation == "silu" else u).to(x.dtype), newest[:, :, 1:]


def conv_state(x: Tensor, start: Tensor, end: Tensor, K: int) -> Tensor:
    """The last K - 1 inputs of every document, from which `causal_conv1d_update` continues.

    x: [T, C]. start, end: int [T], of whole documents side by side.

    Returns [B, C, K - 1] in the dtype of x, a row for each of the B documents, the newest input last; zeros where a
    document is shorter. The number of documents is read on the host.
    """
    token = torch.arange(len(x), device=x.device)
    last = (token == end - 1).nonzero()[:, 0]  # [B]
    rows = last[:, None] - torch.arange(K - 2, -1, -1, device=x.device)  # [B, K - 1]
    inside = rows >= start[last][:, None]
    return torch.where(inside[:, :, None], x[rows.clamp(min=0)], 0).transpose(1, 2)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    fits = x.ndim == weight.ndim == 2 and len(weight) == x.shape[1] and weight.shape[1] >= 1
    if not fits or (bias is not None and bias.shape != x.shape[1:]):
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {None if bias is None else tuple(bias.shape)}"
        raise ValueError(f"causal_conv1d: {shapes}: expected [T, C], [C, K] and [C]")
    if activation not in ACTIVATIONS:
        raise ValueError(f"causal_conv1d: activation {activation!r}: expected None or 'silu'")
