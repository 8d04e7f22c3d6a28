"""Attention over packed documents, without the matrix of all scores.

What it computes
    The flat stream holds documents side by side. The query at position i sees key k iff start[i] <= k <= i < end[k]:
    causal inside a document, nothing across documents. For one head with queries q, keys k and values v:

        s = scale * q k^T        (softcap: s = c tanh(s / c); invisible keys: s = -inf)
        p = softmax(s)           (dropout: p = p * keep / (1 - rate))
        o = p v

    A sliding window of w keeps the w newest keys: i - w < k. With Hkv < Hq heads of keys (grouped queries) each key
    head serves Hq / Hkv query heads next to each other. A query that sees no key at all gets zeros.

Backward
        dv = p^T do        dp = do v^T        ds = p * (dp - rowsum(p * dp))
        dq = scale * ds k        dk = scale * ds^T q

    A softcap multiplies ds by 1 - tanh(s / c)^2. The gradients of a key head add up over its query heads.

What is saved
    q, k, v only; p is computed again in the backward pass. The full score matrix of a row of T = 16,384 tokens with 9
    heads would take 4.8 GB in bf16 and as much again for every intermediate. Here a block of at most 128 queries is
    worked on at a time against the keys of its own document: documents of 200 tokens cost T x 200 scores and not T x T,
    and nothing after the diagonal block is ever multiplied (half of the work in a long document).

The torch path
    Blocks never mix long documents; short neighbours share a block and a mask hides them from each other. Blocks of
    short documents are many, small and of one shape, so up to 64 of them are multiplied at once: 100 documents of 20
    tokens went from 29 to 24 ms on one thread, and from 44 to 31 ms on two of a busy machine. The query heads of one
    key head are stacked as rows, [Hkv, G n, Dh] x [Hkv, Dh, m], so keys are never repeated. Every product is one
    batched matrix multiplication in the dtype of q, softmax and all sums run in fp32 inside the op, the gradients of k
    and v are added up over blocks in fp32. In bf16 the scores are rounded to bf16 before the softmax, as in any eager
    implementation; a fused GPU kernel keeps them in fp32.

    One thread with AVX512-bf16, T = 2,048 in 12 documents of 44-297 tokens, 9 query and 3 key heads of 64, forward and
    backward: 33 ms in bf16 and 47 ms in fp32, against 69 and 52 ms for scaled_dot_product_attention once per document.

    Which keys a block sees is read on the host (a copy from the device on a GPU).

Papers
    Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021, "Self-attention Does
    Not Need O(n^2) Memory"; Dao et al. 2022, "FlashAttention"; Ainslie et al. 2023, "GQA"; Beltagy et al. 2020,
    "Longformer" (sliding window); Gemma team 2024, "Gemma 2" (softcap).
"""

import math

import torch
from torch import Tensor

from minisft.kernels.common import backend_for

BLOCK = 128  # queries in a block of a long document
SQUARE = 64  # tokens in a block of short documents
SQUARES = 64  # blocks of short documents that are multiplied together


def flash_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    q_offset: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The formula with the whole [Hq, Tq, Tk] matrix. Arguments as in `flash_attention`."""
    i = torch.arange(q_offset, q_offset + len(q), device=q.device)[:, None]
    key = torch.arange(len(k), device=q.device)
    visible = (start[:, None] <= key) & (key <= i) & (i < end)  # [Tq, Tk]
    if window is not None:
        visible &= i - window < key
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # [Tk, Hq, Dh]
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # A row without any key: softmax over a constant, then zero, where -inf would give NaN.
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(-1).masked_fill(~visible, 0).to(q.dtype)
    probabilities = torch.nn.functional.dropout(probabilities, dropout)
    return torch.einsum("hqk,khd->qhd", probabilities, v)


def _visible(start: Tensor, end: Tensor, first_query: int, first_key: int, window: int | None) -> Tensor:
    """bool [n, m]: which of the keys from first_key on does each of the queries from first_query on see?"""
    i = torch.arange(first_query, first_query + len(start), device=start.device)[:, None]
    key = torch.arange(first_key, first_key + len(end), device=start.device)
    visible = (key >= start[:, None]) & (key <= i) & (i < end)
    return visible if window is None else visible & (key > i - window)


def _blocks(start: Tensor, end: Tensor, q_offset: int, window: int | None) -> tuple[list, bool]:
    """Cuts the queries into blocks [(a, b, lo, hi, causal)]: queries a:b see keys in lo:hi and no others. The flag says
    that the packing is plain: whole documents side by side.

    causal: queries a:b are rows of one document that starts at lo, so only the corner above the diagonal is hidden.
    """
    starts, counts = torch.unique_consecutive(start, return_counts=True)
    stops = counts.cumsum(0)
    # Plain packing: every run of equal `start` is one whole document, and no window bites.
    plain = q_offset == 0 and len(start) == len(end) and (window is None or window >= max(counts.tolist(), default=0))
    plain = plain and bool((starts == stops - counts).all() & (end >= stops.repeat_interleave(counts)).all())

    blocks, a, joinable = [], 0, False
    for lo, b in zip(starts.tolist(), stops.tolist()):
        if joinable and b - blocks[-1][0] <= SQUARE:  # a short document joins its short neighbours
            blocks[-1] = (blocks[-1][0], b, min(blocks[-1][2], lo), False)
        else:
            size = math.ceil((b - a) / math.ceil((b - a) / BLOCK))
            blocks += [(x, min(x + size, b), lo, plain) for x in range(a, b, size)]
            joinable = b - a <= SQUARE
        a = b

    cut = []
    for a, b, lo, causal in blocks:
        if window is not None and not causal:
            lo = max(lo, a + q_offset - window + 1)
        cut.append((a, b, lo, max(lo, min(b + q_offset, len(end))), causal))
    return cut, plain


def _squares(blocks: list, start: Tensor, device: torch.device) -> tuple[list, list[tuple[Tensor, Tensor, Tensor]]]:
    """Takes the blocks of whole short documents out of a plain packing: (the other blocks, batches of them).

    These blocks are many and small, so they are multiplied together: a batch of nb blocks is (rows, own, hidden). rows
    [nb, SQUARE] are the tokens of each, queries and keys alike, a window that may reach into the neighbours; own [nb, SQUARE]
    says which of them are the block's, hidden [nb, SQUARE, SQUARE] which keys a query does not see.
    """
    bounds = [(a, b) for a, b, lo, hi, causal in blocks if (a, b) == (lo, hi) and not causal]
    if len(bounds) < 2 or len(start) < SQUARE:
        return blocks, []
    batches = []
    for some in torch.tensor(bounds).split(SQUARES):
        rows = some[:, :1].clamp(max=len(start) - SQUARE) + torch.arange(SQUARE)
        own = (rows >= some[:, :1]) & (rows < some[:, 1:])
        hidden = (rows[:, None, :] < start[rows][:, :, None]) | (rows[:, None, :] > rows[:, :, None])
        batches.append((rows.to(device), own.to(device), hidden.to(device)))
    taken = set(bounds)
    return [block for block in blocks if block[:2] not in taken], batches


def _stack(x: Tensor, num_kv_heads: int) -> Tensor:
    """[nb, n, H, Dh] -> [nb Hkv, G n, Dh]: the G query heads of one key head become rows (keys themselves: G = 1)."""
    nb, n, heads, head_dim = x.shape
    x = x.view(nb, n, num_kv_heads, heads // num_kv_heads, head_dim)
    return x.permute(0, 2, 3, 1, 4).reshape(nb * num_kv_heads, -1, head_dim)


def _unstack(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """[nb Hkv, G n, Dh] -> [nb, n, H, Dh], which is `shape`."""
    nb, n, heads, head_dim = shape
    group = rows.shape[1] // n
    return rows.view(nb, heads // group, group, n, head_dim).permute(0, 3, 1, 2, 4).reshape(shape)


def _probabilities(q, k, start, end, blocks, q_offset, scale, window, softcap, dropout, seed):
    """For every block: (block, scaled query rows [Hkv, G n, Dh], p [Hkv, G n, m], p after dropout, d softcap)."""
    generator = torch.Generator(q.device).manual_seed(seed) if dropout else None
    keys = k.transpose(0, 1).contiguous()  # [Hkv, Tk, Dh]
    triangle = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    for block in blocks:
        a, b, lo, hi, causal = block
        n, m = b - a, hi - lo
        q_rows = _stack(q[None, a:b], len(keys)) * scale
        scores = torch.bmm(q_rows, keys[:, lo:hi].transpose(1, 2))
        slope = None
        if softcap is not None:
            tanh = torch.tanh(scores.to(torch.promote_types(q.dtype, torch.float32)) / softcap)
            scores, slope = softcap * tanh, 1 - tanh * tanh
        by_head = scores.view(q.shape[1], n, m)
        if causal:
            by_head[..., m - n :] += triangle[:n, :n]
            p = scores.softmax(-1).to(q.dtype)
        else:
            visible = _visible(start[a:b], end[lo:hi], a + q_offset, lo, window)
            sees_any = visible.any(-1, keepdim=True)  # a row of nothing but -inf would turn into NaN
            by_head += scores.new_zeros(visible.shape).masked_fill_(~visible & sees_any, -math.inf)
            p = scores.softmax(-1).to(q.dtype)
            p.view(by_head.shape).mul_(sees_any)
        dropped = None
        if dropout:
            keep = torch.rand(p.shape, generator=generator, device=p.device) >= dropout
            dropped = torch.where(keep, p / (1 - dropout), 0)
        yield block, q_rows, p, dropped, slope


def _square_probabilities(q, k, rows, hidden, scale):
    """Of a batch of square blocks: scaled query rows [nb Hkv, G n, Dh], key rows [nb Hkv, n, Dh], p [nb Hkv, G n, n]."""
    nb, n = rows.shape
    q_rows, k_rows = _stack(q[rows], k.shape[1]).mul_(scale), _stack(k[rows], k.shape[1])
    scores = torch.bmm(q_rows, k_rows.transpose(1, 2))
    scores.view(nb, -1, n, n).masked_fill_(hidden[:, None], -math.inf)
    return q_rows, k_rows, scores.softmax(-1)


class _FlashAttention(torch.autograd.Function):
    """One block of queries at a time: forward and backward compute the block's probabilities by the same function."""

    @staticmethod
    def forward(ctx, q, k, v, start, end, q_offset, scale, window, softcap, dropout):
        seed = int(torch.randint(2**62, ())) if dropout else None
        ctx.save_for_backward(q, k, v, start, end)
        on_host = start.cpu()
        ctx.blocks, plain = _blocks(on_host, end.cpu(), q_offset, window)
        ctx.squares = []
        if plain and softcap is None and not dropout:
            ctx.blocks, ctx.squares = _squares(ctx.blocks, on_host, q.device)
        ctx.options = q_offset, scale, window, softcap, dropout, seed

        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        values = v.transpose(0, 1).contiguous()
        for block, _, p, dropped, _ in _probabilities(q, k, start, end, ctx.blocks, *ctx.options):
            a, b, lo, hi, _ = block
            out[a:b] = _unstack(torch.bmm(p if dropped is None else dropped, values[:, lo:hi]), (1, *q[a:b].shape))[0]
        for rows, own, hidden in ctx.squares:
            _, _, p = _square_probabilities(q, k, rows, hidden, scale)
            mixed = torch.bmm(p, _stack(v[rows], v.shape[1]))
            out[rows[own]] = _unstack(mixed, (*rows.shape, *q.shape[1:]))[own]
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, start, end = ctx.saved_tensors
        scale, dropout = ctx.options[1], ctx.options[4]
        accumulate = torch.promote_types(q.dtype, torch.float32)
        keys, values = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # [Hkv, Tk, Dh]
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros(keys.shape, dtype=accumulate, device=k.device)
        dv = torch.zeros_like(dk)
        with torch.autocast(q.device.type, enabled=False):
            for block, q_rows, p, dropped, slope in _probabilities(q, k, start, end, ctx.blocks, *ctx.options):
                a, b, lo, hi, _ = block
                do_rows = _stack(dout[None, a:b], len(keys))
                dv[:, lo:hi] += torch.bmm((p if dropped is None else dropped).transpose(1, 2), do_rows)
                dp = torch.bmm(do_rows, values[:, lo:hi].transpose(1, 2))
                if dropped is not None:
                    dp = torch.where(dropped != 0, dp / (1 - dropout), 0)
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                if slope is not None:
                    ds = (ds * slope).to(q.dtype)
                dq[a:b] = _unstack(torch.bmm(ds, keys[:, lo:hi]).mul_(scale), (1, *q[a:b].shape))[0]
                dk[:, lo:hi] += torch.bmm(ds.transpose(1, 2), q_rows)
            for rows, own, hidden in ctx.squares:  # no other block touches their keys
                shape, kv_shape, index = (*rows.shape, *q.shape[1:]), (*rows.shape, *k.shape[1:]), rows[own]
                q_rows, k_rows, p = _square_probabilities(q, k, rows, hidden, scale)
                do_rows = _stack(dout[rows].mul_(own[:, :, None, None]), len(keys))
                dv.transpose(0, 1)[index] = _unstack(torch.bmm(p.transpose(1, 2), do_rows), kv_shape)[own].to(dv.dtype)
                dp = torch.bmm(do_rows, _stack(v[rows], len(keys)).transpose(1, 2))
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                dq[index] = _unstack(torch.bmm(ds, k_rows).mul_(scale), shape)[own]
                dk.transpose(0, 1)[index] = _unstack(torch.bmm(ds.transpose(1, 2), q_rows), kv_shape)[own].to(dk.dtype)
        dk, dv = (x.transpose(0, 1).to(q.dtype, memory_format=torch.contiguous_format) for x in (dk, dv))
        return dq, dk, dv, *[None] * 7


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    *,
    q_offset: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Causal attention inside the documents of a flat stream.

    q: [Tq, Hq, Dh]. k, v: [Tk, Hkv, Dh] with Hq a multiple of Hkv; query head h reads key head h // (Hq / Hkv). bf16,
    fp16, fp32 or fp64, the same for all three.
    start: int [Tq]. end: int [Tk]. Query q at position i = q + q_offset sees key k iff start[q] <= k <= i < end[k]. For
    whole documents both come from cu_seqlens; an `end` beyond the next document's start lets documents share a prefix.
    q_offset: position of the first query on the axis of the keys, for queries that continue a cache.
    scale: multiplies q k^T; None = Dh ** -0.5.
    window: a query sees its newest `window` keys only, itself included; None = all.
    softcap: scores become softcap * tanh(scores / softcap); None = no cap.
    dropout: rate at which probabilities are dropped, drawn from torch's global random state; 0 in evaluation.
    deterministic: bitwise repeatable gradients. The torch and reference paths always are.

    Returns [Tq, Hq, Dh], contiguous, in the dtype of q; zeros for a query that sees no key. A document's output and
    gradients do not depend on the content of other documents, not even in the last bit.
    Raises ValueError where shapes, dtypes or options do not fit.
    """
    _check(q, k, v, window, softcap)
    if start.shape != q.shape[:1] or end.shape != k.shape[:1] or start.is_floating_point() or end.is_floating_point():
        raise ValueError(
            f"flash_attention: start {tuple(start.shape)} {start.dtype} and end {tuple(end.shape)} {end.dtype}: "
            f"expected integers, one per query ({len(q)}) and one per key ({len(k)})"
        )
    if q_offset < 0 or not 0 <= dropout < 1:
        raise ValueError(f"flash_attention: q_offset {q_offset} must be >= 0 and dropout {dropout} in [0, 1)")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        if backend_for("flash_attention", q) == "reference":
            options = dict(q_offset=q_offset, scale=scale, window=window, softcap=softcap, dropout=dropout)
            return flash_attention_ref(q, k, v, start, end, **options)
        return _FlashAttention.apply(q, k, v, start, end, q_offset, scale, window, softcap, dropout)


def flash_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, **options
) -> Tensor:
    """`flash_attention` with the field's usual arguments.

    q, k, v: [T, H, Dh]. cu_seqlens: int [N + 1], 0 first, T last: document n is tokens cu_seqlens[n]:cu_seqlens[n + 1].
    max_seqlen: accepted and not needed. options: the keywords of `flash_attention`.

    Returns [T, Hq, Dh]. Raises ValueError as `flash_attention` and where cu_seqlens does not end at T.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != len(q):
        raise ValueError(f"flash_attention_varlen: cu_seqlens {cu_seqlens.tolist()} must run from 0 to {len(q)}")
    lengths = cu_seqlens.diff().long()
    start, end = (bound.repeat_interleave(lengths) for bound in (cu_seqlens[:-1], cu_seqlens[1:]))
    return flash_attention(q, k, v, start, end, **options)


def flash_attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One new token a row against that row's cache: a step of generation. Not differentiable.

    q: [B, Hq, Dh]. k_cache, v_cache: [B, L, Hkv, Dh], already holding the new token's key and value. cache_seqlens: int
    [B], how many of the L places are filled, the new token included. Pass a view of the cache cut to the longest row:
    all L places are read. scale, window, softcap: as in `flash_attention`.

    Returns [B, Hq, Dh] in the dtype of q; zeros for an empty row. Raises ValueError where shapes or dtypes do not fit.
    """
    if k_cache.ndim != 4 or len(k_cache) != len(q) or cache_seqlens.shape != q.shape[:1]:
        raise ValueError(
            f"flash_attention_with_kvcache: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and "
            f"cache_seqlens {tuple(cache_seqlens.shape)} do not fit: expected [B, Hq, Dh], [B, L, Hkv, Dh], [B]"
        )
    _check(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), window, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if backend_for("flash_attention_with_kvcache", q) == "reference":
            rows = []
            for row, keys, values, n in zip(q, k_cache, v_cache, cache_seqlens.tolist()):
                start, end = cache_seqlens.new_zeros(1), cache_seqlens.new_full((n,), n)
                options = dict(q_offset=max(n - 1, 0), scale=scale, window=window, softcap=softcap)
                rows.append(flash_attention_ref(row[None], keys[:n], values[:n], start, end, **options))
            return torch.cat(rows)
        return _one_token(q, k_cache, v_cache, cache_seqlens[:, None], scale, window, softcap)


def _one_token(q, k_cache, v_cache, filled, scale, window, softcap):
    batch, length, num_kv_heads, head_dim = k_cache.shape
    q_rows = q.reshape(batch, num_kv_heads, -1, head_dim) * scale  # [B, Hkv, G, Dh]
    scores = q_rows @ k_cache.permute(0, 2, 3, 1)  # [B, Hkv, G, L]
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    key = torch.arange(length, device=q.device)
    visible = (key < filled) if window is None else (key < filled) & (key >= filled - window)
    visible = visible[:, None, None]  # [B, 1, 1, L]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    p = scores.softmax(-1).masked_fill(~visible, 0).to(q.dtype)
    return (p @ v_cache.transpose(1, 2)).view(q.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None) -> None:
    shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}, v {tuple(v.shape)} {v.dtype}"
    if (
        q.ndim != 3
        or k.ndim != 3
        or k.shape != v.shape
        or q.shape[2] != k.shape[2]
        or not q.dtype == k.dtype == v.dtype
    ):
        raise ValueError(f"flash_attention: {shapes}: expected [Tq, Hq, Dh], [Tk, Hkv, Dh], [Tk, Hkv, Dh] of one dtype")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"flash_attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if window is not None and window < 1:
        raise ValueError(f"flash_attention: window {window} must be at least 1 (None = no window)")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"flash_attention: softcap {softcap} must be positive (None = no cap)")
