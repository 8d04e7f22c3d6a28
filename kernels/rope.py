"""Rotary position embedding: each pair of features of a query or key turns by an angle proportional to its position.

What it computes
    Features i and i + R/2 of a head (half-split, all families but Cohere) or 2i and 2i + 1 (`interleaved`) form a pair
    (a, b). At position t the pair turns by t * f_i:

        a' = a cos - b sin        b' = b cos + a sin

    so that the dot product of a query and a key depends on the distance of their positions only. cos and sin come as a
    table [T, R/2], one row a token: the caller looks up position_ids, which start again in every document. With R < Dh
    only the first R features turn (partial rotation) and the rest pass through.

    Qwen 3 and Gemma 3 normalise each head of q and k just before (`q_norm`, `k_norm`): part of the op, because a kernel
    can do both in one pass.

Backward
    A rotation's transpose turns the other way: the same formula with -sin. Nothing of q and k is saved, only the table.
    With norms, the gradient turns back first and then goes through RMSNorm's backward (rms_norm.py). That needs q and
    k: they are saved as they came, without a copy, and rstd is computed again from the values that are read anyway.

Bytes moved: read and write q and k once each way, 4 (Hq + Hkv) Dh bytes a token in bf16; op by op about five times
that. With norms the backward reads q and k too: 6 (Hq + Hkv) Dh; as ops of their own, norms would add 4 and 6.

The kernels
    A row is one head of one token, and a program takes ROWS of them, of q or of k: one launch for both. The halves of a
    half-split head are two blocks of neighbouring features; interleaved pairs are read as one block, which a thread
    parts in its registers. Both ways all reads and writes are 16 bytes wide. The gradient of a norm's weight is a sum
    over all tokens and heads: as in rms_norm.py a small grid walks over the rows and adds up in registers. A head is
    short, so the walk waits for memory at every step; the next rows are on their way in the meantime (`STAGES`).

Precision: computed in the wider of the dtypes of q and cos, cast back to the dtype of q at the end. A table in the
dtype of the activations reproduces Llama and its relatives, a table in fp32 OLMo and Cohere. The kernels compute in
fp32 from the first read to the write, norms included, which is closer to the truth than either.

Paper: Su et al. 2021, "RoFormer".
"""

import torch
from torch import Tensor

from minisft.kernels.common import (
    backend_for,
    cdiv,
    jit,
    next_power_of_2,
    num_sms,
    once_differentiable,
    smallest_fit,
    tl,
)
from minisft.kernels.rms_norm import rms_norm, rms_norm_ref

Norm = tuple[Tensor, float, float]  # weight [Dh], eps, offset
MAX_HEAD_DIM = 256  # of the Triton kernels


def rope_ref(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula. Arguments as in `rope`."""
    if q_norm is not None:
        q = rms_norm_ref(q, q_norm[0], q_norm[1], offset=q_norm[2], upcast_weight=q_norm[2] != 0)
    if k_norm is not None:
        k = rms_norm_ref(k, k_norm[0], k_norm[1], offset=k_norm[2], upcast_weight=k_norm[2] != 0)
    return _rotate_ref(q, cos, sin, interleaved), _rotate_ref(k, cos, sin, interleaved)


def _rotate_ref(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]  # the same for every head
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


@jit
def _load_pairs(x_ptr, valid, DH: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """The heads at x_ptr [ROWS, 1] as fp32 pairs a, b [ROWS, BLOCK]. What does not turn is paired up as well: the first
    half of those features with the second."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.load(x_ptr + column, mask=valid & (column < DH), other=0.0)
        a, b = tl.split(tl.reshape(x, (x.shape[0], BLOCK, 2)))
    else:
        column = tl.arange(0, BLOCK)[None, :]
        mask, turns = valid & (column < DH // 2), column < R // 2
        a = tl.load(x_ptr + column + tl.where(turns, 0, R // 2), mask=mask, other=0.0)
        b = tl.load(x_ptr + column + tl.where(turns, R // 2, DH // 2), mask=mask, other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@jit
def _store_pairs(x_ptr, a, b, valid, DH: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `_load_pairs`."""
    a, b = a.to(x_ptr.dtype.element_ty), b.to(x_ptr.dtype.element_ty)
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK)[None, :]
        x = tl.reshape(tl.join(a, b), (a.shape[0], 2 * BLOCK))
        tl.store(x_ptr + column, x, mask=valid & (column < DH))
    else:
        column = tl.arange(0, BLOCK)[None, :]
        mask, turns = valid & (column < DH // 2), column < R // 2
        tl.store(x_ptr + column + tl.where(turns, 0, R // 2), a, mask=mask)
        tl.store(x_ptr + column + tl.where(turns, R // 2, DH // 2), b, mask=mask)


@jit
def _turn(
    a, b, cos_ptr, sin_ptr, token, valid, DH: tl.constexpr, R: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr
):
    """Turns the pairs [ROWS, BLOCK] of the tokens [ROWS, 1], or turns them back; pairs beyond R / 2 stay."""
    column = tl.arange(0, BLOCK)[None, :]
    angle = token.to(tl.int64) * (R // 2) + column
    mask = valid & (column < R // 2)
    cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    if R < DH:
        cos = tl.where(column < R // 2, cos, 1.0)
    if BACK:
        sin = -sin
    return a * cos - b * sin, b * cos + a * sin


@jit
def rope_rows(
    block,
    x_ptr,  # [T, HEADS, DH]
    y_ptr,  # [T, HEADS, DH], heads one after another
    weight_ptr,  # [DH] of the norm, or None
    cos_ptr,  # [T, R / 2]
    sin_ptr,
    T,
    stride_token,
    stride_head,
    stride_y,
    scale,
    eps,
    offset,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block number `block` of the T * HEADS rows (their number fits int32: 2^31 heads would be hundreds of GB). y may be x."""
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    valid = row < T * HEADS
    token, head = row // HEADS, row % HEADS
    x_ptr += token.to(tl.int64) * stride_token + head * stride_head
    a, b = _load_pairs(x_ptr, valid, DH, R, INTERLEAVED, BLOCK)
    if weight_ptr is not None:
        rstd = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / DH + eps)
        weight_a, weight_b = _load_pairs(weight_ptr, tl.full((1, 1), 1, tl.int1), DH, R, INTERLEAVED, BLOCK)
        a *= rstd * (weight_a + offset)
        b *= rstd * (weight_b + offset)
    a, b = _turn(a * scale, b * scale, cos_ptr, sin_ptr, token, valid, DH, R, BACK, BLOCK)
    _store_pairs(y_ptr + token.to(tl.int64) * stride_y + head * DH, a, b, valid, DH, R, INTERLEAVED, BLOCK)


@jit
def _rope_kernel(
    q_ptr,  # [T, Q_HEADS, DH]; in the backward pass the gradients of what came out; None if Q_HEADS is 0
    k_ptr,  # [T, K_HEADS, DH], the same
    q_out_ptr,  # [T, Q_HEADS, DH], heads one after another, as in k_out
    k_out_ptr,  # [T, K_HEADS, DH]
    q_weight_ptr,  # [DH] or None
    k_weight_ptr,  # [DH] or None
    cos_ptr,  # [T, R / 2]
    sin_ptr,  # [T, R / 2]
    T,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_q_out,
    stride_k_out,
    q_scale,  # multiplies q
    q_eps,
    q_offset,
    k_eps,
    k_offset,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    DH: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Forward; backward too (BACK) where there is no norm. ROWS tokens have Q_HEADS blocks of rows of q and K_HEADS of k;
    all of them side by side, so that the tokens' part of the table is read from memory once."""
    program = tl.program_id(0)
    tokens, block = program // (Q_HEADS + K_HEADS), program % (Q_HEADS + K_HEADS)
    if K_HEADS == 0 or (Q_HEADS > 0 and block < Q_HEADS):
        rope_rows(
            *(tokens * Q_HEADS + block, q_ptr, q_out_ptr, q_weight_ptr, cos_ptr, sin_ptr, T),
            *(stride_q_token, stride_q_head, stride_q_out, q_scale, q_eps, q_offset),
            *(Q_HEADS, DH, R, INTERLEAVED, BACK, ROWS, BLOCK),
        )
    else:
        rope_rows(
            *(tokens * K_HEADS + block - Q_HEADS, k_ptr, k_out_ptr, k_weight_ptr, cos_ptr, sin_ptr, T),
            *(stride_k_token, stride_k_head, stride_k_out, 1.0, k_eps, k_offset),
            *(K_HEADS, DH, R, INTERLEAVED, BACK, ROWS, BLOCK),
        )


@jit
def _rope_bwd_rows(
    program,  # of `programs`
    programs,
    x_ptr,  # [T, HEADS, DH]
    dy_ptr,  # [T, HEADS, DH]
    dx_ptr,  # [T, HEADS, DH], contiguous
    weight_ptr,  # [DH]
    dweight_ptr,  # fp32 [DH] of this program, or None
    cos_ptr,
    sin_ptr,
    T,
    stride_token,
    stride_head,
    stride_dy_token,
    stride_dy_head,
    scale,
    eps,
    offset,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every program takes ROWS rows at a time, as many times as there are rows left."""
    everywhere = tl.full((1, 1), 1, tl.int1)
    weight_a, weight_b = _load_pairs(weight_ptr, everywhere, DH, R, INTERLEAVED, BLOCK)
    dweight_a, dweight_b = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for first in tl.range(program * ROWS, T * HEADS, programs * ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        valid = row < T * HEADS
        token, head = row // HEADS, row % HEADS
        x_row = x_ptr + token.to(tl.int64) * stride_token + head * stride_head
        dy_row = dy_ptr + token.to(tl.int64) * stride_dy_token + head * stride_dy_head
        a, b = _load_pairs(x_row, valid, DH, R, INTERLEAVED, BLOCK)
        da, db = _load_pairs(dy_row, valid, DH, R, INTERLEAVED, BLOCK)
        da, db = _turn(da * scale, db * scale, cos_ptr, sin_ptr, token, valid, DH, R, True, BLOCK)
        rstd = 1.0 / tl.sqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / DH + eps)
        a, b = a * rstd, b * rstd
        dweight_a += da * a
        dweight_b += db * b
        da, db = da * (weight_a + offset), db * (weight_b + offset)
        pull = tl.sum(da * a + db * b, 1, keep_dims=True) / DH
        da, db = rstd * (da - a * pull), rstd * (db - b * pull)
        _store_pairs(dx_ptr + row.to(tl.int64) * DH, da, db, valid, DH, R, INTERLEAVED, BLOCK)
    if dweight_ptr is not None:
        a, b = tl.sum(dweight_a, 0, keep_dims=True), tl.sum(dweight_b, 0, keep_dims=True)
        _store_pairs(dweight_ptr, a, b, everywhere, DH, R, INTERLEAVED, BLOCK)


@jit
def _rope_norm_bwd_kernel(
    q_ptr,  # [T, Q_HEADS, DH]
    k_ptr,  # [T, K_HEADS, DH]
    dq_out_ptr,  # [T, Q_HEADS, DH]: gradients of what came out
    dk_out_ptr,  # [T, K_HEADS, DH]
    dq_ptr,  # [T, Q_HEADS, DH], contiguous
    dk_ptr,  # [T, K_HEADS, DH], contiguous
    q_weight_ptr,  # [DH]
    k_weight_ptr,  # [DH]
    dweight_ptr,  # fp32 [programs, DH]: each program's share, or None
    cos_ptr,  # [T, R / 2]
    sin_ptr,  # [T, R / 2]
    T,
    q_programs,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_dq_token,
    stride_dq_head,
    stride_dk_token,
    stride_dk_head,
    q_scale,  # multiplies dq_out
    q_eps,
    q_offset,
    k_eps,
    k_offset,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    DH: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first q_programs programs walk over the rows of q, the others over those of k."""
    program = tl.program_id(0)
    if dweight_ptr is not None:
        dweight_ptr += program * DH
    if program < q_programs:
        _rope_bwd_rows(
            *(program, q_programs, q_ptr, dq_out_ptr, dq_ptr, q_weight_ptr, dweight_ptr, cos_ptr, sin_ptr, T),
            *(stride_q_token, stride_q_head, stride_dq_token, stride_dq_head, q_scale, q_eps, q_offset),
            *(Q_HEADS, DH, R, INTERLEAVED, ROWS, STAGES, BLOCK),
        )
    else:
        _rope_bwd_rows(
            *(program - q_programs, tl.num_programs(0) - q_programs, k_ptr, dk_out_ptr, dk_ptr, k_weight_ptr),
            *(dweight_ptr, cos_ptr, sin_ptr, T, stride_k_token, stride_k_head, stride_dk_token, stride_dk_head),
            *(1.0, k_eps, k_offset, K_HEADS, DH, R, INTERLEAVED, ROWS, STAGES, BLOCK),
        )


# By the head dimension: the first entry that is large enough. 256 needs 8 warps: with 4 the compiler spreads a weight over
# threads in another way than the rows it multiplies, and moves the rows through shared memory.
CONFIGS = {
    "_rope_kernel": {
        128: dict(ROWS=32, num_warps=4),
        MAX_HEAD_DIM: dict(ROWS=32, num_warps=8),
    },
    "_rope_norm_bwd_kernel": {
        64: dict(ROWS=32, STAGES=2, num_warps=4),
        128: dict(ROWS=16, STAGES=2, num_warps=4),
        MAX_HEAD_DIM: dict(ROWS=16, STAGES=2, num_warps=8),
    },
}
WARPS_PER_SM = 16  # of the grid of _rope_norm_bwd_kernel


class _Rope(torch.autograd.Function):
    """Saves the table only."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(q, k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        with torch.autocast(dq.device.type, enabled=False):
            return *_rotate(dq, dk, cos, -sin, ctx.interleaved), None, None, None


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """x * [cos cos] + swap(x) * [-sin sin]: long rows instead of halves, the same products and sums as the formula."""
    cos, sin = (torch.stack(p, -1 if interleaved else -2).flatten(-2)[:, None] for p in ((cos, cos), (-sin, sin)))
    return tuple(_rotate_rows(x, cos, sin, interleaved) for x in (q, k))


def _rotate_rows(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotated = cos.shape[-1]
    turned = x[..., :rotated].to(torch.promote_types(x.dtype, cos.dtype), copy=True)
    if interleaved:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = turned.roll(rotated // 2, dims=-1)
    turned = turned.mul_(cos).add_(swapped.mul_(sin)).to(x.dtype)
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)


class _RopeTriton(torch.autograd.Function):
    """Saves the table only. Weights of absent norms are None; numbers: eps and offset of both."""

    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, interleaved, numbers):
        normed = (None, None) if q_weight is None else (q, k)
        ctx.save_for_backward(*normed, q_weight, k_weight, cos, sin)
        ctx.interleaved, ctx.numbers = interleaved, numbers
        return turn(q, k, q_weight, k_weight, cos, sin, interleaved, numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        saved = *ctx.saved_tensors, ctx.interleaved, ctx.numbers
        return *turn_back(dq_out, dk_out, *saved, weights=any(ctx.needs_input_grad[2:4])), *[None] * 4


def turn(q, k, q_weight, k_weight, cos, sin, interleaved, numbers, back=False, q_scale=1.0, out=None):
    """q_scale q and k turned, or turned back (without norms): in the dtype of k, new tensors or `out`, whose heads lie one after
    another. One of q and k may be None, and is None in the result. The rest as in _RopeTriton."""
    q, k = (None if x is None else _features_adjacent(x) for x in (q, k))
    q_out, k_out = out or [
        None if x is None else x.new_empty(x.shape, dtype=(q if k is None else k).dtype) for x in (q, k)
    ]
    T, _, head_dim = (q if k is None else k).shape
    q_heads, k_heads = (0 if x is None else x.shape[1] for x in (q, k))
    strides = [(0, 0) if x is None else x.stride()[:2] for x in (q, k, q_out, k_out)]
    config = smallest_fit(CONFIGS["_rope_kernel"], head_dim)
    _rope_kernel[(cdiv(T, config["ROWS"]) * (q_heads + k_heads),)](
        *(q, k, q_out, k_out, q_weight, k_weight, cos, sin, T, *strides[0], *strides[1]),
        *(strides[2][0], strides[3][0], q_scale, *numbers),
        *(q_heads, k_heads, head_dim, 2 * cos.shape[1], interleaved, back),
        BLOCK=next_power_of_2(head_dim // 2),
        **config,
    )
    return q_out, k_out


def turn_back(
    dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, interleaved, numbers, *, weights, q_scale=1.0, out=None
):
    """The backward pass of `turn`: dq, dk, and if `weights` their gradients, else None. q, k: its inputs, read for norms
    only. q_scale multiplies dq_out, which may be wider than dk_out. out: where dq and dk go if there are no norms."""
    if q_weight is None:
        dq_dk = turn(dq_out, dk_out, None, None, cos, sin, interleaved, numbers, back=True, q_scale=q_scale, out=out)
        return *dq_dk, None, None
    q, k, dq_out, dk_out = map(_features_adjacent, (q, k, dq_out, dk_out))
    (T, q_heads, head_dim), k_heads = q.shape, k.shape[1]
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    config = smallest_fit(CONFIGS["_rope_norm_bwd_kernel"], head_dim)
    programs = num_sms(q) * (WARPS_PER_SM // config["num_warps"])
    q_programs = max(1, programs * q_heads // (q_heads + k_heads))
    q_programs, k_programs = (
        min(cdiv(T * heads, config["ROWS"]), share)
        for heads, share in ((q_heads, q_programs), (k_heads, programs - q_programs))
    )
    partial = q.new_empty(q_programs + k_programs, head_dim, dtype=torch.float32) if weights else None
    _rope_norm_bwd_kernel[(q_programs + k_programs,)](
        *(q, k, dq_out, dk_out, dq, dk, q_weight, k_weight, partial, cos, sin, T, q_programs),
        *(stride for x in (q, k, dq_out, dk_out) for stride in x.stride()[:2]),
        *(q_scale, *numbers, q_heads, k_heads, head_dim, 2 * cos.shape[1], interleaved),
        BLOCK=next_power_of_2(head_dim // 2),
        **config,
    )
    if partial is None:
        return dq, dk, None, None
    dq_weight = partial[:q_programs].sum(0).to(q_weight.dtype)
    return dq, dk, dq_weight, partial[q_programs:].sum(0).to(k_weight.dtype)


def _features_adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    q_norm: Norm | None = None,
    k_norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """Turns queries and keys by the angles of their positions, after an optional RMSNorm of each head.

    q: [T, Hq, Dh], k: [T, Hkv, Dh], same dtype. cos, sin: [T, R/2] with R <= Dh, in the dtype of q or fp32, constants:
    no gradient flows into them. interleaved: pairs are (2i, 2i + 1) as in Cohere, else (i, i + R/2). q_norm, k_norm:
    (weight [Dh], eps, offset) or None; an offset other than 0 multiplies by the weight in fp32 (Gemma 3).

    Returns (q, k), new tensors in the shapes and dtype of the inputs. Raises ValueError where shapes or dtypes do not
    fit.
    """
    _check(q, k, cos, sin, q_norm, k_norm)
    cannot = ""
    if q.shape[-1] > MAX_HEAD_DIM or q.shape[-1] % 2:
        cannot = f"head dim {q.shape[-1]}, and the kernels take even ones up to {MAX_HEAD_DIM}"
    with torch.autocast(q.device.type, enabled=False):
        backend = backend_for("rope", q, cannot)
        if backend == "reference":
            return rope_ref(q, k, cos, sin, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm)
        if backend == "triton" and (q_norm is None) == (k_norm is None):
            return _RopeTriton.apply(q, k, *turn_arguments(q, k, cos, sin, interleaved, q_norm, k_norm))
        if q_norm is not None:
            q = rms_norm(q, q_norm[0], q_norm[1], offset=q_norm[2], upcast_weight=q_norm[2] != 0)
        if k_norm is not None:
            k = rms_norm(k, k_norm[0], k_norm[1], offset=k_norm[2], upcast_weight=k_norm[2] != 0)
        if backend == "triton":
            return _RopeTriton.apply(q, k, *turn_arguments(q, k, cos, sin, interleaved))
        return _Rope.apply(q, k, cos, sin, interleaved)


def turn_arguments(q, k, cos, sin, interleaved=False, q_norm=None, k_norm=None) -> tuple:
    """What `turn` takes after q and k, of the arguments of `rope`; both norms or none. Raises ValueError as `rope`."""
    _check(q, k, cos, sin, q_norm, k_norm)
    if q_norm is None or k_norm is None:
        weights, numbers = (None, None), (0.0, 0.0, 0.0, 0.0)
    else:
        weights, numbers = (q_norm[0].contiguous(), k_norm[0].contiguous()), (*q_norm[1:], *k_norm[1:])
    return *weights, cos.contiguous(), sin.contiguous(), interleaved, numbers


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_norm: Norm | None, k_norm: Norm | None) -> None:
    if cos.shape != sin.shape or cos.ndim != 2 or len(cos) != len(q) or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)}")
    if not q.ndim == k.ndim == 3 or k.shape[::2] != q.shape[::2] or k.dtype != q.dtype:
        raise ValueError(f"rope: k {tuple(k.shape)} {k.dtype} does not fit q {tuple(q.shape)} {q.dtype}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and norm[0].shape != q.shape[-1:]:
            raise ValueError(f"rope: {name} {tuple(norm[0].shape)} does not fit q {tuple(q.shape)}")
