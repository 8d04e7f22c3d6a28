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

Blocks
    The full score matrix of a row of T = 16,384 tokens with 9 heads would take 4.8 GB in bf16 and as much again for every
    intermediate. Both fast paths work on a block of queries at a time against the keys of its own document: documents of
    200 tokens cost T x 200 scores and not T x T, and nothing after the diagonal is ever multiplied (half of the work in a
    long document). p is computed again in the backward pass.

On a GPU (flash_attention_kernels.py, flash_attention_tiles.py, flash_attention_configs.py)
    Forward: a program keeps BLOCK_M queries and walks over tiles of BLOCK_N keys with the running maximum and sum of
    their scores (the online softmax). It saves the output and the logarithm, base 2, of each row's sum:
    p = exp2(s - lse) in the backward pass, and rowsum(p * dp) = rowsum(out * dout).
    Backward, one pass: a program keeps BLOCK_N keys and walks over the queries; dk and dv stay in registers, dq is added
    to an fp32 buffer in memory. Five matrix products, but the additions come in any order: dq differs in its last bits
    from run to run. Where that is not wanted, or the card cannot add tiles to memory (before Hopper), two kernels, the
    second one for dq: seven products, bitwise repeatable.
    A program of the backward takes all query heads of its keys, so that dk and dv are added up in registers. Few tokens and
    few key heads are too few programs for the card: then each takes a part of them, and the parts' dk and dv, in fp32, are
    added in order.
    Beside their products the kernels have time for what else must move. With a rotary embedding the forward program turns its
    queries, which no other one reads, where they lie, and the backward program turns its dk back; k and dq, which many read
    or add to, are turned by kernels/rope.py. And the zeros that the next layer's dq is added to are written by the backward
    of the layer above, as a pass of their own would take as long as reading `out`.
    Where documents share prefixes, keys between those that a query sees have ended: a small kernel lists the tiles that
    have not. Whole documents (`shared=False`) need neither the list nor a look at any `end` before the diagonal.
    The host knows T and nothing of the documents, so that nobody waits for the GPU and one captured CUDA graph serves
    every batch.

On a CPU (flash_attention_torch.py)
    The same blocks by torch's own products, and only q, k and v are saved.

Papers
    Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Rabe and Staats 2021, "Self-attention Does
    Not Need O(n^2) Memory"; Dao et al. 2022, "FlashAttention"; Ainslie et al. 2023, "GQA"; Beltagy et al. 2020,
    "Longformer" (sliding window); Gemma team 2024, "Gemma 2" (softcap).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minisft.kernels.common import (
    TensorDescriptor,
    backend_for,
    cdiv,
    check_documents,
    chosen_backend,
    next_power_of_2,
    num_sms,
    once_differentiable,
)
from minisft.kernels.flash_attention_configs import CONFIGS, SHORT, config_for
from minisft.kernels.flash_attention_kernels import (
    _flash_attention_bwd_kv_kernel,
    _flash_attention_bwd_q_kernel,
    _flash_attention_delta_kernel,
    _flash_attention_fwd_kernel,
)
from minisft.kernels.flash_attention_tiles import _flash_attention_tiles_kernel
from minisft.kernels.flash_attention_torch import FlashAttentionTorch, one_token
from minisft.kernels.rope import rope, turn, turn_arguments, turn_back


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


def _parts(head_dim: int) -> tuple[int, int]:
    """A block's sides are powers of two: 80 = 64 + 16, 96 = 64 + 32, 128 = 128 + 0."""
    left = 1 << (head_dim.bit_length() - 1)
    return left, head_dim - left


def _launch(kernel, grid: tuple, config: dict, arguments: dict) -> None:
    """Launch a kernel, its tensors of tiles as TMA descriptors if the configuration asks for it and the strides allow it."""
    rows = dict(q="BLOCK_M", dout="BLOCK_M", dq="BLOCK_M", k="BLOCK_N", v="BLOCK_N")
    tiled = {name: arguments[name] for name in rows if arguments.get(name) is not None}
    if arguments.get("q_given_ptr") is not None:
        del tiled["q"]  # is written and read by the same threads
    tma = config["TMA"] and arguments["D2"] == 0 and all(map(_has_descriptor, tiled.values()))
    if tma:
        for name, x in tiled.items():
            shape, strides = (x.shape[1], x.shape[0], x.shape[2]), (x.stride(1), x.stride(0), 1)
            tiled[name] = TensorDescriptor(x, shape, strides, [1, config[rows[name]], x.shape[2]])
    kernel[grid](**{**arguments, **tiled, **config, "TMA": tma})


def _has_descriptor(x: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as TMA wants it."""
    steps = [stride * x.element_size() for stride in x.stride()[:2]]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x.numel() > 0 and x.stride(-1) == 1 and aligned


def _may_turn_in_place(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the heads of q and k lie one after another, no two numbers of them in one place, and the three are different."""
    whole = all(x.stride()[1:] == (x.shape[2], 1) and x.stride(0) >= x.shape[1] * x.shape[2] for x in (q, k))
    return whole and len({(x.untyped_storage()._cdata, x.storage_offset()) for x in (q, k, v)}) == 3


def _tiles(tensors: dict, options: dict, config: dict) -> Tensor:
    """int32 [blocks of queries, 2 + blocks of keys]: which tiles each block of queries visits; see the kernel."""
    names = ("Tq", "Tk", "q_offset", "window", "WINDOW")
    start, end, blocks = tensors["start_ptr"], tensors["end_ptr"], cdiv(options["Tq"], config["BLOCK_M"])
    tiles = start.new_empty(blocks, 2 + cdiv(options["Tk"], config["BLOCK_N"]), dtype=torch.int32)
    sides = {name: config[name] for name in ("BLOCK_M", "BLOCK_N")}
    _flash_attention_tiles_kernel[(blocks,)](start, end, tiles, **{name: options[name] for name in names}, **sides)
    return tiles


def _splits(programs: int, group: int, sms: int) -> int:
    """Into how many equal parts the query heads of a key head are split, so that programs x splits fill the card.

    `programs` walk over whole groups. One and a half for each multiprocessor are enough: with fewer, most of them wait for
    the few that have the most queries.
    """
    return next(n for n in range(1, group + 1) if n == group or group % n == 0 and 2 * programs * n >= 3 * sms)


# By device and stream: memory for the next dq, fp32 [Tq, Hq, Dh], that the backward kernel before it has set to zero.
_zeros: dict[tuple, Tensor] = {}


def _queue_of(q: Tensor) -> tuple:
    """What runs kernels one after another: a device, and a stream of it."""
    return q.device, torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0


class _FlashAttentionTriton(torch.autograd.Function):
    """Saves q, k, v, out and the log-sum-exp of every row; with a rotary embedding q and k as they are turned, and its table.
    If q and k may be overwritten, they are turned where they lie, unless a norm comes first, whose backward pass reads them.
    The first layer of a backward pass finds no zeros for its dq, and its delta kernel writes them: so a CUDA graph is complete.

    q_weight to numbers: what `turn` takes after q and k; all None without an embedding.
    """

    @staticmethod
    def forward(
        ctx,
        q, k, v,
        q_weight, k_weight, cos, sin, interleaved, numbers,
        start, end, q_offset, scale, window, softcap, dropout, deterministic, mean_length, shared, may_overwrite,
    ):  # fmt: skip
        if torch._C._current_graph_task_id() == -1:  # no recomputation inside of a backward pass
            _zeros.pop(_queue_of(q), None)  # which the last layer of one has left
        given = (q, k) if q_weight is not None else (None, None)
        q_given = None
        if cos is not None:
            in_place = may_overwrite and q_weight is None and _may_turn_in_place(q, k, v)
            _, k = turn(None, k, None, k_weight, cos, sin, interleaved, numbers, out=(None, k) if in_place else None)
            q_given = q if q.stride(-1) == 1 else q.contiguous()
            q = q if in_place and _has_descriptor(q) else q.new_empty(q.shape)
        q, k, v = (x if _has_descriptor(x) else x.contiguous() for x in (q, k, v))  # rather than load number by number
        (Tq, Hq, Dh), (Tk, Hkv, _) = q.shape, k.shape
        D1, D2 = _parts(Dh)
        out, lse = q.new_empty(Tq, Hq, Dh), q.new_empty(Hq, Tq, dtype=torch.float32)
        seed = torch.randint(2**62, (1,), device=q.device) if dropout else None
        tensors = dict(
            q=q, k=k, v=v, start_ptr=start.contiguous(), end_ptr=end.contiguous(), seed_ptr=seed, lse_ptr=lse
        )
        ctx.save_for_backward(out, *given, q_weight, k_weight, cos, sin, *tensors.values())
        ctx.rotary = interleaved, numbers
        ctx.names, ctx.scale, ctx.shared = list(tensors), scale, shared
        ctx.small = bool(softcap or dropout) or (mean_length is not None and mean_length < SHORT)
        ctx.deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        ctx.options = dict(  # of all kernels
            **dict(Tq=Tq, Tk=Tk, q_offset=q_offset, window=window or 0, group=Hq // Hkv),
            **dict(stride_q=q.stride(0), stride_q_head=q.stride(1), stride_k=k.stride(0), stride_k_head=k.stride(1)),
            **dict(stride_v=v.stride(0), stride_v_head=v.stride(1), dropout=dropout),
            **dict(inner=scale / softcap if softcap else 0.0, outer=(softcap or scale) * math.log2(math.e)),
            **dict(D1=D1, D2=D2, WINDOW=window is not None, SOFTCAP=softcap is not None, DROPOUT=dropout > 0),
        )
        config = config_for(CONFIGS["_flash_attention_fwd_kernel"], q, ctx.small)
        grid = cdiv(Tq, config["BLOCK_M"]), Hq
        tensors["tiles_ptr"] = _tiles(tensors, ctx.options, config) if shared else None
        turning = _turning(cos, sin, interleaved, Dh) | dict(q_given_ptr=q_given, q_weight_ptr=q_weight)
        turning["stride_given"], turning["stride_given_head"] = (0, 0) if q_given is None else q_given.stride()[:2]
        turning["eps"], turning["norm_offset"] = numbers[:2] if numbers else (0.0, 0.0)
        _launch(_flash_attention_fwd_kernel, grid, config, {**tensors, **ctx.options, **turning, "out_ptr": out})
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        out, *saved = ctx.saved_tensors  # once: activation checkpointing unpacks each tensor for one reader
        turned, tensors = saved[:6], dict(zip(ctx.names, saved[6:]))  # `turn_back` takes the first after the gradients
        q, k, v, lse = (tensors[name] for name in ("q", "k", "v", "lse_ptr"))
        (Tq, Hq, Dh), (Tk, Hkv, _) = q.shape, k.shape
        kv_tables = CONFIGS["_flash_attention_bwd_kv_kernel"]
        one_pass = None
        if not (ctx.deterministic or ctx.options["D2"]):
            one_pass = config_for(kv_tables["one pass"], q, ctx.small)
        dout, delta = dout.contiguous(), torch.empty_like(lse)
        dq_sum = not_zero = next_dq = None
        if one_pass:
            dq_sum, next_dq = _zeros.pop(_queue_of(q), None), q.new_empty(q.shape, dtype=torch.float32)
            if dq_sum is None or dq_sum.shape != q.shape:
                dq_sum = not_zero = torch.empty_like(next_dq)

        config = CONFIGS["_flash_attention_delta_kernel"]
        _flash_attention_delta_kernel[(cdiv(Tq, config["BLOCK_M"]), Hq)](
            *(out, dout, delta, not_zero, Tq), D=Dh, BLOCK_D=next_power_of_2(Dh), **config
        )
        arguments = dict(**tensors, **ctx.options, delta_ptr=delta, dout=dout, scale=ctx.scale)
        config = one_pass or config_for(kv_tables["split"], q, ctx.small)
        grid = cdiv(Tk, config["BLOCK_N"]), Hkv
        splits = _splits(grid[0] * grid[1], Hq // Hkv, num_sms(q))
        # After a plain rotary embedding the three gradients lie side by side, so that their layers' products may be one. Where
        # one program has the whole group of a key head, it turns dk back itself.
        cos, sin, together = *turned[-2:], None
        if cos is not None and turned[0] is None:
            sizes = [Hq, Hkv, Hkv]
            together = k.new_empty(Tk, sum(sizes), Dh).split(sizes, dim=1)
        in_place = together is not None and splits == 1
        if in_place:
            _, dk, dv = together
        else:
            dk, dv = k.new_empty(2, splits, *k.shape, dtype=torch.float32 if splits > 1 else k.dtype)
        grads = dict(dq=dq_sum, next_dq_ptr=next_dq, dk_ptr=dk, dv_ptr=dv, ADD_DQ=bool(one_pass), SHARED=ctx.shared)
        grads |= _turning(cos, sin, ctx.rotary[0], Dh) if in_place else _turning(None, None, None, Dh)
        _launch(_flash_attention_bwd_kv_kernel, (*grid, splits), config, {**arguments, **grads, "TOGETHER": in_place})
        if one_pass and Tk:  # without keys there are no programs
            _zeros[_queue_of(q)] = next_dq
        if not in_place:
            dk, dv = (x.sum(0) if splits > 1 else x[0] for x in (dk, dv))
            dv = together[2].copy_(dv) if together else dv.to(v.dtype)
        if one_pass:
            dq, dq_scale = dq_sum, ctx.scale
        else:
            dq, dq_scale = q.new_empty(q.shape), 1.0
            config = config_for(CONFIGS["_flash_attention_bwd_q_kernel"], q, ctx.small)
            grid = cdiv(Tq, config["BLOCK_M"]), Hq
            tiles = _tiles(tensors, ctx.options, config) if ctx.shared else None
            _launch(_flash_attention_bwd_q_kernel, grid, config, {**arguments, "tiles_ptr": tiles, "dq_ptr": dq})

        weights = None, None
        if in_place:  # dq is scaled and rounded on its way through the rotary embedding
            turn(dq, None, None, None, cos, sin, *ctx.rotary, back=True, q_scale=dq_scale, out=(together[0], None))
            dq = together[0]
        elif cos is not None:
            options = dict(weights=any(ctx.needs_input_grad[3:5]), q_scale=dq_scale, out=together and together[:2])
            dq, dk, *weights = turn_back(dq, dk, *turned, *ctx.rotary, **options)
        elif one_pass:
            dq = torch.mul(dq, dq_scale, out=q.new_empty(q.shape))
        dk = dk.to(k.dtype)
        return dq, dk, dv, *weights, *[None] * 15


def _turning(cos: Tensor | None, sin: Tensor | None, interleaved: bool | None, head_dim: int) -> dict:
    """What a kernel is told of the rotary embedding that it computes; without cos it computes none."""
    R = 0 if cos is None else 2 * cos.shape[1]
    return dict(cos_ptr=cos, sin_ptr=sin, R=R, INTERLEAVED=bool(interleaved), PAIRS=next_power_of_2(head_dim // 2))


def unsupported(head_dim: int, scale: float = 1.0) -> str:
    """Why the Triton kernels do not serve these arguments; empty if they do."""
    left, right = _parts(head_dim)
    if not 16 <= head_dim <= 256 or (right and (right < 16 or right & (right - 1))):
        return f"head dim {head_dim}"
    return "" if scale > 0 else f"scale {scale}"


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
    mean_length: float | None = None,
    shared: bool = True,
    rotary: Mapping = {},
    may_overwrite: bool = False,
) -> Tensor:
    """Causal attention inside the documents of a flat stream.

    q: [Tq, Hq, Dh]. k, v: [Tk, Hkv, Dh] with Hq a multiple of Hkv; query head h reads key head h // (Hq / Hkv). bf16,
    fp16, fp32 or fp64, the same for all three.
    start: int [Tq]. end: int [Tk]. Query q at position i = q + q_offset sees key k iff start[q] <= k <= i < end[k]. For
    whole documents both come from cu_seqlens; an `end` beyond the next document's start lets documents share a prefix.
    q_offset: position of the first query on the axis of the keys, for queries that continue a cache.
    scale: multiplies q k^T; None = Dh ** -0.5.
    window: a query sees its newest `window` keys only, itself included; None = all. It counts tokens of the stream: where
        documents share a prefix, those of their other answers too.
    softcap: scores become softcap * tanh(scores / softcap); None = no cap.
    dropout: rate at which probabilities are dropped, drawn from torch's global random state; 0 in evaluation.
    deterministic: bitwise repeatable gradients, as under torch.use_deterministic_algorithms. The torch and reference
        paths always are; the Triton kernels then compute the scores once more.
    mean_length: of the documents, as far as the host knows it, best as the mean over tokens, sum(length^2) /
        sum(length): the kernels take smaller tiles for short documents. It changes nothing but the speed.
    shared: False where the caller knows that these are whole documents side by side, so that every query sees all keys
        from the first one of its document to itself: the kernels then look for no keys that have ended before. It changes
        nothing but the speed; where documents do share a prefix, it would be wrong.
    rotary: the arguments of `rope` after q and k, which then turns both first; {} = they come turned. The Triton kernels of both
        are one op: the sum of dq, in fp32 and without its scale, goes back through the embedding as it is.
    may_overwrite: True where nobody reads q and k afterwards, as they come from a matrix product, which does not keep its output.
        The Triton kernels then turn them where they lie, and autograd is not told: an op that has kept them for its backward
        pass, or a checkpoint around this op alone, would read other numbers. It changes nothing but the memory.

    Returns [Tq, Hq, Dh], contiguous, in the dtype of q; zeros for a query that sees no key. A document's output and
    gradients do not depend on the content of other documents, not even in the last bit (the Triton kernels': as far as that
    is finite). Raises ValueError where shapes, dtypes or options do not fit.
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
        backend = backend_for("flash_attention", q, unsupported(q.shape[-1], scale))
        is_fused = backend == "triton" and (rotary.get("q_norm") is None) == (rotary.get("k_norm") is None)
        if rotary and not is_fused:
            q, k = rope(q, k, **rotary)
        if backend == "reference":
            options = dict(q_offset=q_offset, scale=scale, window=window, softcap=softcap, dropout=dropout)
            return flash_attention_ref(q, k, v, start, end, **options)
        arguments = q, k, v, start, end, q_offset, scale, window, softcap, dropout
        if backend == "triton":
            turning = turn_arguments(q, k, **rotary) if rotary and is_fused else (None,) * 6
            options = deterministic, mean_length, shared, may_overwrite
            return _FlashAttentionTriton.apply(q, k, v, *turning, *arguments[3:], *options)
        return FlashAttentionTorch.apply(*arguments)


def flash_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None, **options
) -> Tensor:
    """`flash_attention` with the field's usual arguments.

    q, k, v: [T, H, Dh]. cu_seqlens: int [N + 1], 0 first, T last: document n is tokens cu_seqlens[n]:cu_seqlens[n + 1].
    max_seqlen: accepted and not needed. options: the keywords of `flash_attention`; mean_length is T / N if not given, and
        shared is False.

    Returns [T, Hq, Dh]. Raises ValueError as `flash_attention` and where cu_seqlens is on the CPU and does not run from 0
    to T, or goes back. On a GPU that is not checked, as it would have to wait for the GPU: tokens beyond the last document
    see nothing.
    """
    check_documents(cu_seqlens, len(q))
    if len(cu_seqlens) < 2:
        raise ValueError(f"flash_attention_varlen: cu_seqlens of {len(cu_seqlens)} numbers has no document")
    tokens = torch.arange(len(q), device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, tokens, right=True).clamp_(max=len(cu_seqlens) - 1)
    options.setdefault("mean_length", len(q) / (len(cu_seqlens) - 1))
    options.setdefault("shared", False)
    return flash_attention(q, k, v, cu_seqlens[document - 1], cu_seqlens[document], **options)


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
    all L places are read, and the values in those that are not filled must be finite. scale, window, softcap: as in
    `flash_attention`.

    Returns [B, Hq, Dh] in the dtype of q; zeros for an empty row. Raises ValueError where shapes or dtypes do not fit.
    """
    is_cache = k_cache.ndim == 4 and k_cache.shape == v_cache.shape and len(k_cache) == len(q)
    if not is_cache or cache_seqlens.shape != q.shape[:1]:
        raise ValueError(
            f"flash_attention_with_kvcache: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)} "
            f"and cache_seqlens {tuple(cache_seqlens.shape)} do not fit: expected [B, Hq, Dh], twice [B, L, Hkv, Dh], [B]"
        )
    _check(q, k_cache[:, :1].flatten(0, 1), v_cache[:, :1].flatten(0, 1), window, softcap)  # the whole would be a copy
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if chosen_backend() == "reference":
            rows = []
            for row, keys, values, n in zip(q, k_cache, v_cache, cache_seqlens.tolist()):
                start, end = cache_seqlens.new_zeros(1), cache_seqlens.new_full((n,), n)
                options = dict(q_offset=max(n - 1, 0), scale=scale, window=window, softcap=softcap)
                rows.append(flash_attention_ref(row[None], keys[:n], values[:n], start, end, **options))
            return torch.cat([q[:0], *rows])
        return one_token(q, k_cache, v_cache, cache_seqlens[:, None], scale, window, softcap)


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
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"flash_attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if window is not None and window < 1:
        raise ValueError(f"flash_attention: window {window} must be at least 1 (None = no window)")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"flash_attention: softcap {softcap} must be positive (None = no cap)")
