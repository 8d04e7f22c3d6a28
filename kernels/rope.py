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

Bytes moved: read and write q and k once each way, 4 (Hq + Hkv) Dh bytes a token in bf16; op by op about five times
that.

Precision: computed in the wider of the dtypes of q and cos, cast back to the dtype of q at the end. A table in the
dtype of the activations reproduces Llama and its relatives, a table in fp32 OLMo and Cohere.

Paper: Su et al. 2021, "RoFormer".
"""

import torch
from torch import Tensor

from minisft.kernels.common import backend_for
from minisft.kernels.rms_norm import rms_norm, rms_norm_ref

Norm = tuple[Tensor, float, float]  # weight [Dh], eps, offset


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
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.split(half, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


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
    turned = x[..., :rotated].to(torch.promote_types(x.dtype, cos.dtype))
    if interleaved:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        swapped = turned.roll(rotated // 2, dims=-1)
    turned = (turned * cos).add_(swapped.mul_(sin)).to(x.dtype)
    return turned if rotated == x.shape[-1] else torch.cat((turned, x[..., rotated:]), dim=-1)


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
    if cos.shape != sin.shape or cos.ndim != 2 or len(cos) != len(q) or 2 * cos.shape[1] > q.shape[-1]:
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)}")
    if k.shape[::2] != q.shape[::2] or k.dtype != q.dtype:
        raise ValueError(f"rope: k {tuple(k.shape)} {k.dtype} does not fit q {tuple(q.shape)} {q.dtype}")
    with torch.autocast(q.device.type, enabled=False):
        if backend_for("rope", q) == "reference":
            return rope_ref(q, k, cos, sin, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm)
        if q_norm is not None:
            q = rms_norm(q, q_norm[0], q_norm[1], offset=q_norm[2], upcast_weight=q_norm[2] != 0)
        if k_norm is not None:
            k = rms_norm(k, k_norm[0], k_norm[1], offset=k_norm[2], upcast_weight=k_norm[2] != 0)
        return _Rope.apply(q, k, cos, sin, interleaved)
