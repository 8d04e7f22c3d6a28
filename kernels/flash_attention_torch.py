"""The torch path of flash_attention: blocks of queries against the keys of their own documents.

The lesson, the contract and the public ops are in flash_attention.py.

The query heads of one key head are stacked as rows, [Hkv, G n, Dh] x [Hkv, Dh, m], so keys are never repeated. Every product
is one batched matrix multiplication in the dtype of q, softmax and all sums run in fp32 inside the op, the gradients of k and
v are added up over blocks in fp32. In bf16 the scores are rounded to bf16 before the softmax, as in any eager implementation;
a fused kernel keeps them in fp32.

Plain packing, whole documents side by side, has a path of its own. The many small ops between the products cost as much on a CPU
as the products, so documents of about the same length are multiplied together. Each is padded to c n tokens and cut into c
blocks of n queries; block j of all of them is one batch, n queries against (j + 1) n keys. One gather brings q, k and v into the
order of the batches, one brings the results back. Padding repeats the document's own last token, so documents never meet, not
even as 0 x NaN. In 16 bits n is rounded up to whole tiles, as oneDNN compiles code for each shape that it meets, and keeps it,
some 1 MB each. The backward pass computes the probabilities again.

PyTorch has a fused kernel, which needs a call for each run of documents of one length. Its backward pass is slow on a CPU, and in
bf16 without AMX its forward pass too; else it is the forward pass here.

Windows that cut documents, documents that share their beginnings, soft caps and dropout go block by block. There short
neighbours share a block, and a mask hides them from each other.

2,048 tokens in 11 documents of 106 to 248, 9 query and 3 key heads of 64, in bf16. One thread with AVX512-bf16, processor time in
whole training steps: forward and backward 47 ms block by block, 33 ms by groups, 69 ms by the fused kernel. Two threads, forward
by groups and by the fused kernel: with AMX 8.9 and 3.0 ms, with AVX512-bf16 5.6 and 9.0 ms, there in fp32 7.6 and 8.1 ms.

Which keys a block sees is read on the host (a copy from the device on a GPU), for plain packing once for all layers.
"""

import math
import threading
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import HAS_AMX, once_differentiable

BLOCK = 128  # queries of a block, at most
SQUARE = 64  # tokens of a block that short neighbours share
AT_ONCE = 2**21  # scores of a batch, at most
PADDING = 1.06  # the longest document of a group over the shortest, at most
HALF_TILE = 16  # in 16 bits n is a multiple of it
SHORT = 512  # keys: PyTorch's softmax of such rows is faster in fp32, casts included, than in bf16


# ---- whole documents side by side ---------------------------------------------------------------------------------


class _Group(NamedTuple):
    """Documents of about the same length, in c blocks of n queries each."""

    batch: int  # documents x key heads
    c: int
    n: int
    mask: Tensor  # [G n, n]: -inf where a query does not see a key of its own block


class _Plan(NamedTuple):
    """How plain packing is multiplied. A row is one head of one token, as in q [T Hq, Dh] and k [T Hkv, Dh]. Gathered
    rows are padded, and ordered by group, block, document, key head, query head of it, query; those of keys by group, document,
    head, key.
    """

    groups: list[_Group]
    q_rows: Tensor  # int64: which row of q each gathered row is
    k_rows: Tensor
    q_places: Tensor  # int64 [T Hq]: where each row of q is among the gathered ones
    k_places: Tensor  # int64 [T Hkv]
    padding: Tensor  # int64: which gathered rows of q are padding


def _alike(lengths: list[int], tile: int) -> list[tuple[list[int], int, int]]:
    """Groups of documents of about the same length: (their numbers, c, n), n a multiple of tile."""
    groups, shortest = [], 0
    sizes = [(math.ceil(length / BLOCK), length, i) for i, length in enumerate(lengths)]
    for c, length, i in sorted(sizes):
        n = tile * math.ceil(length / c / tile)
        numbers, c_before, _ = groups[-1] if groups else ([], 0, 0)
        if c == c_before and n <= PADDING * shortest + 2:
            groups[-1] = ([*numbers, i], c, n)
        else:
            groups.append(([i], c, n))
            shortest = n
    return groups


def _make_plan(lengths: list[int], num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> _Plan:
    """The plan of documents of these lengths, in this order, on the host."""
    heads = torch.arange(num_heads).view(num_kv_heads, -1, 1)
    kv_heads = torch.arange(num_kv_heads)[:, None]
    first = torch.tensor([0, *lengths]).cumsum(0)
    groups, parts = [], []
    for numbers, c, n in _alike(lengths, HALF_TILE if dtype.itemsize == 2 else 1):
        length = torch.tensor([lengths[i] for i in numbers])[:, None]
        at = torch.arange(c * n)
        is_real, token = at < length, first[numbers][:, None] + torch.minimum(at, length - 1)  # [documents, c n]
        blocks = (len(numbers), c, 1, 1, n)
        q_rows = (token.view(blocks) * num_heads + heads).transpose(0, 1)  # [c, documents, Hkv, G, n]
        k_rows = token[:, None] * num_kv_heads + kv_heads  # [documents, Hkv, c n]
        is_real_q = is_real.view(blocks).transpose(0, 1).expand(q_rows.shape)
        parts.append([x.flatten() for x in (q_rows, k_rows, is_real_q, is_real[:, None].expand(k_rows.shape))])
        mask = torch.full((n, n), -math.inf, dtype=torch.promote_types(dtype, torch.float32)).triu_(1)
        groups.append(_Group(len(numbers) * num_kv_heads, c, n, mask.repeat(num_heads // num_kv_heads, 1)))
    q_rows, k_rows, is_real_q, is_real_k = (torch.cat(part) for part in zip(*parts))
    q_places, k_places = is_real_q.nonzero()[:, 0], is_real_k.nonzero()[:, 0]
    q_places, k_places = q_places[q_rows[q_places].argsort()], k_places[k_rows[k_places].argsort()]
    return _Plan(groups, q_rows, k_rows, q_places, k_places, (~is_real_q).nonzero()[:, 0])


def _batches(plan: _Plan, queries: list[Tensor], keys: list[Tensor]) -> Iterator[tuple]:
    """Every group, in parts of at most AT_ONCE scores: (group, its part of the gathered `queries` as [c, batch, G n, ...], of the
    gathered `keys` as [batch, c n, ...])."""
    q, k = 0, 0
    for group in plan.groups:
        batch, c, n, mask = group
        num_q, num_k = batch * c * len(mask), batch * c * n
        of_q = [x[q : q + num_q].view(c, batch, -1, x.shape[1]) for x in queries]
        of_k = [x[k : k + num_k].view(batch, c * n, x.shape[1]) for x in keys]
        size = max(1, AT_ONCE // (c * mask.numel()))
        for first in range(0, batch, size):
            some = slice(first, first + size)
            yield group, [x[:, some] for x in of_q], [x[some] for x in of_k]
        q, k = q + num_q, k + num_k


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).index_select(0, rows)


def _softmax(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T) [batch, G n, m] with the mask over the last keys: q [batch, G n, Dh] scaled, k [batch, m, Dh]."""
    scores = torch.bmm(q, k.transpose(1, 2))
    wide = scores.to(mask.dtype) if scores.shape[2] <= SHORT else scores
    wide[:, :, -mask.shape[1] :] += mask
    return torch.softmax(wide, -1, out=wide).to(q.dtype)


def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    plan = _kept_plan(lengths, q, k.shape[1])
    q_rows, k_rows, v_rows = _gather(q, plan.q_rows).mul_(scale), _gather(k, plan.k_rows), _gather(v, plan.k_rows)
    out = torch.empty_like(q_rows)
    for (_, c, n, mask), (qs, outs), (ks, vs) in _batches(plan, [q_rows, out], [k_rows, v_rows]):
        for j in range(c):
            m = (j + 1) * n
            torch.bmm(_softmax(qs[j], ks[:, :m], mask), vs[:, :m], out=outs[j])
    return out.index_select(0, plan.q_places).view(q.shape)


def _fused_forward(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """The same by PyTorch's kernel, a call without padding for each run of documents of one length."""
    out, first = torch.empty_like(q, memory_format=torch.contiguous_format), 0
    for length, run in groupby(lengths):
        count = len(list(run))
        some, first = slice(first, first + count * length), first + count * length
        qs, ks, vs, outs = (x[some].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v, out))
        outs.copy_(F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=scale, enable_gqa=True))
    return out


def _backward(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, ...]:
    plan = _kept_plan(lengths, q, k.shape[1])
    q_rows, k_rows, v_rows = _gather(q, plan.q_rows).mul_(scale), _gather(k, plan.k_rows), _gather(v, plan.k_rows)
    do_rows = _gather(d_out, plan.q_rows).index_fill_(0, plan.padding, 0)
    dq, dk, dv = torch.empty_like(q_rows), torch.empty_like(k_rows), torch.empty_like(v_rows)
    queries, keys = [q_rows, do_rows, dq], [k_rows, v_rows, dk, dv]
    for (_, c, n, mask), (qs, dos, dqs), (ks, vs, dks, dvs) in _batches(plan, queries, keys):
        sums = [torch.zeros_like(d, dtype=mask.dtype) for d in (dks, dvs)] if c > 1 else None
        for j in range(c):
            m = (j + 1) * n
            p = _softmax(qs[j], ks[:, :m], mask)
            dp = torch.bmm(dos[j], vs[:, :m].transpose(1, 2))
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            torch.bmm(ds, ks[:, :m], out=dqs[j])
            if sums is None:
                torch.bmm(ds.transpose(1, 2), qs[j], out=dks)
                torch.bmm(p.transpose(1, 2), dos[j], out=dvs)
            else:
                sums[0][:, :m] += torch.bmm(ds.transpose(1, 2), qs[j])
                sums[1][:, :m] += torch.bmm(p.transpose(1, 2), dos[j])
        if sums is not None:
            dks.copy_(sums[0])
            dvs.copy_(sums[1])
    dq = dq.index_select(0, plan.q_places).mul_(scale)
    return dq.view(q.shape), *(d.index_select(0, plan.k_places).view(k.shape) for d in (dk, dv))


_kept = threading.local()


def _kept_plan(lengths: list[int], q: Tensor, num_kv_heads: int) -> _Plan:
    """The plan on the device of q, kept for the next layer."""
    key = lengths, q.shape[1], num_kv_heads, q.dtype, q.device
    if getattr(_kept, "key", None) != key:
        groups, *indices = _make_plan(lengths, q.shape[1], num_kv_heads, q.dtype)
        groups = [group._replace(mask=group.mask.to(q.device)) for group in groups]
        _kept.key, _kept.plan = key, _Plan(groups, *(index.to(q.device) for index in indices))
    return _kept.plan


# ---- block by block -----------------------------------------------------------------------------------------------


def _visible(start: Tensor, end: Tensor, first_query: int, seen: slice | Tensor, window: int | None) -> Tensor:
    """bool [n, m]: which of the keys `seen`, with these ends, does each of the queries from first_query on see?"""
    i = torch.arange(first_query, first_query + len(start), device=start.device)[:, None]
    key = torch.arange(seen.start, seen.stop, device=start.device) if isinstance(seen, slice) else seen
    visible = (key >= start[:, None]) & (key <= i) & (i < end)
    return visible if window is None else visible & (key > i - window)


def _documents(start: Tensor, end: Tensor, q_offset: int, window: int | None) -> tuple[list[int], list[int], bool]:
    """(first keys, lengths) of the runs of queries with equal `start`, and whether the packing is plain: each run is one whole
    document, and no window hides a key."""
    first, counts = torch.unique_consecutive(start, return_counts=True)
    stops = counts.cumsum(0)
    plain = q_offset == 0 and len(start) == len(end) and (window is None or window >= max(counts.tolist(), default=0))
    plain = plain and bool((first == stops - counts).all() & (end >= stops.repeat_interleave(counts)).all())
    return first.tolist(), counts.tolist(), plain


def _blocks(
    first: list[int], lengths: list[int], plain: bool, num_keys: int, q_offset: int, window: int | None
) -> list:
    """Cuts the queries into blocks [(a, b, lo, hi, causal)]: queries a:b see keys in lo:hi and no others. The first arguments are
    what `_documents` returns.

    causal: queries a:b are rows of one document that starts at lo, so only the corner above the diagonal is hidden.
    """
    blocks, a, joinable = [], 0, False
    for lo, length in zip(first, lengths):
        b = a + length
        if joinable and b - blocks[-1][0] <= SQUARE:  # a short document joins its short neighbours
            blocks[-1] = (blocks[-1][0], b, min(blocks[-1][2], lo), False)
        else:
            size = math.ceil(length / math.ceil(length / BLOCK))
            blocks += [(x, min(x + size, b), lo, plain) for x in range(a, b, size)]
            joinable = length <= SQUARE
        a = b

    cut = []
    for a, b, lo, causal in blocks:
        if window is not None and not causal:
            lo = max(lo, a + q_offset - window + 1)
        cut.append((a, b, lo, max(lo, min(b + q_offset, num_keys)), causal))
    return cut


def _seen(end: Tensor, first_query: int, lo: int, hi: int) -> slice | Tensor:
    """Which of the keys lo:hi have not ended before the first query of a block: a slice, or indices where it is worth it.

    In a conversation whose documents share their beginnings (data/shared_turns.py) most keys between have ended.
    """
    open_keys = end[lo:hi] > first_query
    num_open = int(open_keys.sum())
    return slice(lo, hi) if num_open > 0.8 * (hi - lo) else open_keys.nonzero()[:, 0] + lo


def _stack(x: Tensor, num_kv_heads: int) -> Tensor:
    """[n, H, Dh] -> [Hkv, G n, Dh]: the G query heads of one key head become rows."""
    n, heads, head_dim = x.shape
    x = x.view(n, num_kv_heads, heads // num_kv_heads, head_dim)
    return x.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)


def _unstack(rows: Tensor, shape: torch.Size) -> Tensor:
    """[Hkv, G n, Dh] -> [n, H, Dh], which is `shape`."""
    num_kv_heads, (n, _, head_dim) = len(rows), shape
    return rows.view(num_kv_heads, -1, n, head_dim).permute(2, 0, 1, 3).reshape(shape)


def _probabilities(q, k, start, end, blocks, q_offset, scale, window, softcap, dropout, seed):
    """For every block: (block, scaled query rows [Hkv, G n, Dh], p [Hkv, G n, m], p after dropout, d softcap)."""
    generator = torch.Generator(q.device).manual_seed(seed) if dropout else None
    keys = k.transpose(0, 1).contiguous()  # [Hkv, Tk, Dh]
    triangle = torch.full((BLOCK, BLOCK), -math.inf, dtype=q.dtype, device=q.device).triu_(1)
    for block in blocks:
        a, b, seen, causal = block
        q_rows = _stack(q[a:b], len(keys)) * scale
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


def _backward_by_block(q, k, v, start, end, d_out, blocks, options) -> tuple[Tensor, Tensor, Tensor]:
    scale, dropout = options[1], options[4]
    accumulate = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()  # [Hkv, Tk, Dh]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(keys.shape, dtype=accumulate, device=k.device)
    dv = torch.zeros_like(dk)
    for block, q_rows, p, dropped, slope in _probabilities(q, k, start, end, blocks, *options):
        a, b, seen, _ = block
        do_rows = _stack(d_out[a:b], len(keys))
        dv[:, seen] += torch.bmm((p if dropped is None else dropped).transpose(1, 2), do_rows)
        dp = torch.bmm(do_rows, values[:, seen].transpose(1, 2))
        if dropped is not None:
            dp = torch.where(dropped != 0, dp / (1 - dropout), 0)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        if slope is not None:
            ds = (ds * slope).to(q.dtype)
        dq[a:b] = _unstack(torch.bmm(ds, keys[:, seen]).mul_(scale), q[a:b].shape)
        dk[:, seen] += torch.bmm(ds.transpose(1, 2), q_rows)
    dk, dv = (x.transpose(0, 1).to(q.dtype, memory_format=torch.contiguous_format) for x in (dk, dv))
    return dq, dk, dv


class FlashAttentionTorch(torch.autograd.Function):
    """Neither way keeps probabilities: the backward pass computes them again."""

    @staticmethod
    def forward(ctx, q, k, v, start, end, q_offset, scale, window, softcap, dropout):
        on_host, end_on_host = start.cpu(), end.cpu()
        first, lengths, plain = _documents(on_host, end_on_host, q_offset, window)
        ctx.lengths = None
        if lengths and plain and scale > 0 and softcap is None and not dropout:  # the fused kernel scales its mask too
            ctx.lengths, ctx.scale = lengths, scale
            ctx.save_for_backward(q, k, v)
            by_groups = q.dtype == torch.bfloat16 and q.device.type == "cpu" and not HAS_AMX
            return (_forward if by_groups else _fused_forward)(q, k, v, lengths, scale)

        seed = int(torch.randint(2**62, ())) if dropout else None
        ctx.save_for_backward(q, k, v, start, end)
        blocks = _blocks(first, lengths, plain, len(end), q_offset, window)
        seen = [slice(lo, hi) if plain else _seen(end_on_host, a + q_offset, lo, hi) for a, _, lo, hi, _ in blocks]
        seen = [keys if isinstance(keys, slice) else keys.to(q.device) for keys in seen]
        ctx.blocks = [(a, b, keys, causal) for (a, b, _, _, causal), keys in zip(blocks, seen)]
        ctx.options = q_offset, scale, window, softcap, dropout, seed

        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        values = v.transpose(0, 1).contiguous()
        for block, _, p, dropped, _ in _probabilities(q, k, start, end, ctx.blocks, *ctx.options):
            a, b, seen, _ = block
            out[a:b] = _unstack(torch.bmm(p if dropped is None else dropped, values[:, seen]), q[a:b].shape)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        with torch.autocast(d_out.device.type, enabled=False):
            if ctx.lengths is None:
                gradients = _backward_by_block(*ctx.saved_tensors, d_out, ctx.blocks, ctx.options)
            else:
                gradients = _backward(*ctx.saved_tensors, d_out, ctx.lengths, ctx.scale)
        return *gradients, *[None] * 7


def one_token(q, k_cache, v_cache, filled, scale, window, softcap):
    batch, length, num_kv_heads, head_dim = k_cache.shape
    group = q.shape[1] // num_kv_heads
    q_rows = q.reshape(batch, num_kv_heads, group, head_dim) * scale  # [B, Hkv, G, Dh]
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
