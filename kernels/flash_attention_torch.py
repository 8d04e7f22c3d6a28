"""The torch path of flash_attention: blocks of queries against the keys of their own documents.

The lesson, the contract and the public ops are in flash_attention.py.

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
"""

import math

import torch
from torch import Tensor

BLOCK = 128  # queries in a block of a long document
SQUARE = 64  # tokens in a block of short documents
SQUARES = 64  # blocks of short documents that are multiplied together


def _visible(start: Tensor, end: Tensor, first_query: int, seen: slice | Tensor, window: int | None) -> Tensor:
    """bool [n, m]: which of the keys `seen`, with these ends, does each of the queries from first_query on see?"""
    i = torch.arange(first_query, first_query + len(start), device=start.device)[:, None]
    key = torch.arange(seen.start, seen.stop, device=start.device) if isinstance(seen, slice) else seen
    visible = (key >= start[:, None]) & (key <= i) & (i < end)
    return visible if window is None else visible & (key > i - window)


def _blocks(start: Tensor, end: Tensor, q_offset: int, window: int | None) -> tuple[list, bool]:
    """Cuts the queries into blocks [(a, b, lo, hi, causal)]: queries a:b see keys in lo:hi and no others. The flag says
    that the packing is plain: whole documents side by side.

    causal: queries a:b are rows of one document that starts at lo, so only the corner above the diagonal is hidden.
    """
    starts, counts = torch.unique_consecutive(start, return_counts=True)
    stops = counts.cumsum(0)
    # Plain packing: every run of equal `start` is one whole document, and no window hides a key.
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


def _seen(end: Tensor, first_query: int, lo: int, hi: int) -> slice | Tensor:
    """Which of the keys lo:hi have not ended before the first query of a block: a slice, or indices where it is worth it.

    In a conversation whose documents share their beginnings (data/shared_turns.py) most keys between have ended.
    """
    open_keys = end[lo:hi] > first_query
    num_open = int(open_keys.sum())
    return slice(lo, hi) if num_open > 0.8 * (hi - lo) else open_keys.nonzero()[:, 0] + lo


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
        a, b, seen, causal = block
        q_rows = _stack(q[None, a:b], len(keys)) * scale
        scores = torch.bmm(q_rows, keys[:, seen].transpose(1, 2))
        n, m = b - a, scores.shape[-1]
        slope = None
        if softcap is not None:
            tanh = torch.tanh(scores.to(torch.promote_types(q.dtype, torch.float32)) / softcap)
            scores, slope = softcap * tanh, 1 - tanh * tanh
        by_head = scores.view(q.shape[1], n, m)
        if causal:
            by_head[..., m - n :] += triangle[:n, :n]
            p = scores.softmax(-1).to(q.dtype)
        else:
            visible = _visible(start[a:b], end[seen], a + q_offset, seen, window)
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
    """For a batch of square blocks: scaled query rows [nb Hkv, G n, Dh], key rows [nb Hkv, n, Dh], p [nb Hkv, G n, n]."""
    nb, n = rows.shape
    q_rows, k_rows = _stack(q[rows], k.shape[1]).mul_(scale), _stack(k[rows], k.shape[1])
    scores = torch.bmm(q_rows, k_rows.transpose(1, 2))
    scores.view(nb, -1, n, n).masked_fill_(hidden[:, None], -math.inf)
    return q_rows, k_rows, scores.softmax(-1)


class FlashAttentionTorch(torch.autograd.Function):
    """One block of queries at a time: forward and backward compute the block's probabilities by the same function."""

    @staticmethod
    def forward(ctx, q, k, v, start, end, q_offset, scale, window, softcap, dropout):
        seed = int(torch.randint(2**62, ())) if dropout else None
        ctx.save_for_backward(q, k, v, start, end)
        on_host, end_on_host = start.cpu(), end.cpu()
        blocks, plain = _blocks(on_host, end_on_host, q_offset, window)
        ctx.squares = []
        if plain and softcap is None and not dropout:
            blocks, ctx.squares = _squares(blocks, on_host, q.device)
        seen = [slice(lo, hi) if plain else _seen(end_on_host, a + q_offset, lo, hi) for a, _, lo, hi, _ in blocks]
        seen = [keys if isinstance(keys, slice) else keys.to(q.device) for keys in seen]
        ctx.blocks = [(a, b, keys, causal) for (a, b, _, _, causal), keys in zip(blocks, seen)]
        ctx.options = q_offset, scale, window, softcap, dropout, seed

        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        values = v.transpose(0, 1).contiguous()
        for block, _, p, dropped, _ in _probabilities(q, k, start, end, ctx.blocks, *ctx.options):
            a, b, seen, _ = block
            out[a:b] = _unstack(torch.bmm(p if dropped is None else dropped, values[:, seen]), (1, *q[a:b].shape))[0]
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
                a, b, seen, _ = block
                do_rows = _stack(dout[None, a:b], len(keys))
                dv[:, seen] += torch.bmm((p if dropped is None else dropped).transpose(1, 2), do_rows)
                dp = torch.bmm(do_rows, values[:, seen].transpose(1, 2))
                if dropped is not None:
                    dp = torch.where(dropped != 0, dp / (1 - dropout), 0)
                ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
                if slope is not None:
                    ds = (ds * slope).to(q.dtype)
                dq[a:b] = _unstack(torch.bmm(ds, keys[:, seen]).mul_(scale), (1, *q[a:b].shape))[0]
                dk[:, seen] += torch.bmm(ds.transpose(1, 2), q_rows)
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


def one_token(q, k_cache, v_cache, filled, scale, window, softcap):
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
