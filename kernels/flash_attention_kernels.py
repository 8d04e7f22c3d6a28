"""The Triton kernels of flash_attention. The lesson is in flash_attention.py, what a tile is in flash_attention_tiles.py.

Scores begin as zeros, or, in a block that is not visible as a whole, as minus infinity where a query does not see a key:
the matrix product is added to that. So the mask needs no registers of its own beside the accumulators (with a mask applied
after the product, the backward kernel would not fit), and a block in which every query sees every key skips the masking.

A head dim that is no power of two is cut in two, Dh = D1 + D2, and every product has two parts: 96 = 64 + 32 costs three
quarters of 128. Names that end in 2 belong to the right part.
"""

from minisft.kernels.common import jit, tl
from minisft.kernels.flash_attention_tiles import (
    kept,
    keys_at,
    keys_of,
    load_tile,
    queries_of,
    set_to_zero,
    store_tile,
    tanh,
    turn_tile,
)


@jit
def _flash_attention_fwd_kernel(
    q,  # [Tq, Hq, Dh], k and v [Tk, Hkv, Dh]: pointers, or TMA descriptors of [heads, tokens, Dh]
    k,
    v,
    q_given_ptr,  # [Tq, Hq, Dh]: q before its norm and its rotary embedding, perhaps in the same place; None: q is given
    q_weight_ptr,  # [Dh] of the norm, or None
    cos_ptr,  # [Tq, R / 2], as sin
    sin_ptr,
    start_ptr,  # int [Tq]
    end_ptr,  # int [Tk]
    tiles_ptr,  # as `_flash_attention_tiles_kernel` makes them; None: whole documents side by side
    seed_ptr,  # int64 [1], None without dropout
    out_ptr,  # [Tq, Hq, Dh], contiguous
    lse_ptr,  # fp32 [Hq, Tq]
    Tq,
    Tk,
    q_offset,
    window,
    group,  # query heads of a key head
    stride_q,
    stride_k,
    stride_v,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    stride_given,
    stride_given_head,
    eps,  # of the norm
    norm_offset,
    inner,  # scale / softcap, unused without softcap
    outer,  # log2(e) * scale, or log2(e) * softcap
    dropout,
    D1: tl.constexpr,
    D2: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """A program takes BLOCK_M queries of one head. The last queries have the most keys: they go first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    first_query = block * BLOCK_M
    head = tl.program_id(1)
    kv_head = head // group
    TMA_Q: tl.constexpr = TMA and q_given_ptr is None  # TMA does not see what threads have just written
    if not TMA_Q:
        q += head.to(tl.int64) * stride_q_head
    if not TMA:
        k += kv_head.to(tl.int64) * stride_k_head
        v += kv_head.to(tl.int64) * stride_v_head
    query = first_query + tl.arange(0, BLOCK_M)
    i = query + q_offset
    start = tl.load(start_ptr + query, mask=query < Tq, other=Tk)  # on its way while the queries are read
    if q_given_ptr is not None:  # these queries of this head are no other program's
        PIECE: tl.constexpr = BLOCK_M if BLOCK_M * PAIRS <= 4096 else 4096 // PAIRS  # more would spill registers
        q_given_ptr += head.to(tl.int64) * stride_given_head
        turn_tile(
            *(q_given_ptr, q, q_weight_ptr, cos_ptr, sin_ptr, first_query, Tq),
            *(stride_given, stride_q, eps, norm_offset, D1 + D2, R, INTERLEAVED, False, PAIRS, BLOCK_M, PIECE),
        )
        tl.debug_barrier()
    queries = load_tile(q, head, first_query, 0, Tq, stride_q, BLOCK_M, D1, TMA_Q)
    acc = tl.zeros((BLOCK_M, D1), tl.float32)
    if D2:
        queries2 = load_tile(q, head, first_query, D1, Tq, stride_q, BLOCK_M, D2, TMA_Q)
        acc2 = tl.zeros((BLOCK_M, D2), tl.float32)
    lowest, first, stop, full, right = keys_of(start, first_query, Tq, Tk, q_offset, window, WINDOW, BLOCK_M, BLOCK_N)
    entry = 0
    if tiles_ptr is not None:
        tiles_ptr += block * (2 + tl.cdiv(Tk, BLOCK_N))
        first, stop, entry = 0, tl.load(tiles_ptr) * BLOCK_N, tl.load(tiles_ptr + 1)
    total = tl.zeros((BLOCK_M,), tl.float32)
    highest = tl.zeros((BLOCK_M,), tl.float32) - 1e30  # finite, so that no row ever computes inf - inf

    for step in tl.range(first, stop, BLOCK_N):
        first_key, hidden, entry = keys_at(step, entry, tiles_ptr, full, right, BLOCK_N)
        key = first_key + tl.arange(0, BLOCK_N)
        keys = load_tile(k, kv_head, first_key, 0, Tk, stride_k, BLOCK_N, D1, TMA)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if hidden:
            visible = (lowest[:, None] <= key[None, :]) & (key[None, :] <= i[:, None])
            if tiles_ptr is not None:
                visible &= i[:, None] < tl.load(end_ptr + key, mask=key < Tk, other=0)[None, :]
            s = tl.where(visible, s, float("-inf"))
        s = tl.dot(queries, tl.trans(keys), s, input_precision="ieee")
        if D2:
            keys2 = load_tile(k, kv_head, first_key, D1, Tk, stride_k, BLOCK_N, D2, TMA)
            s = tl.dot(queries2, tl.trans(keys2), s, input_precision="ieee")
        if SOFTCAP:
            s = tl.where(s == float("-inf"), s, tanh(s * inner))

        new_highest = tl.maximum(highest, tl.max(s, 1) * outer)
        p = tl.exp2(s * outer - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(p, 1)
        highest = new_highest
        if DROPOUT:
            p = tl.where(kept(seed_ptr, head, i[:, None], key[None, :], dropout), p, 0.0)
        values = load_tile(v, kv_head, first_key, 0, Tk, stride_v, BLOCK_N, D1, TMA)
        p = p.to(values.dtype)
        acc = tl.dot(p, values, acc * shrink[:, None], input_precision="ieee")
        if D2:
            values2 = load_tile(v, kv_head, first_key, D1, Tk, stride_v, BLOCK_N, D2, TMA)
            acc2 = tl.dot(p, values2, acc2 * shrink[:, None], input_precision="ieee")

    seen = total > 0
    total = tl.where(seen, total, 1.0)
    # Without a visible key the sum is 0 and its logarithm -inf; a huge number instead makes every p of the backward pass 0.
    lse_ptr += head.to(tl.int64) * Tq
    tl.store(lse_ptr + query, tl.where(seen, highest + tl.log2(total), 1e30), mask=query < Tq)
    share = 1.0 / (total * (1.0 - dropout)) if DROPOUT else 1.0 / total
    stride = tl.num_programs(1) * (D1 + D2)
    out_ptr += head * (D1 + D2)
    store_tile(out_ptr, acc * share[:, None], first_query, 0, Tq, stride, BLOCK_M, D1)
    if D2:
        store_tile(out_ptr, acc2 * share[:, None], first_query, D1, Tq, stride, BLOCK_M, D2)


@jit
def _flash_attention_delta_kernel(
    out_ptr,  # [Tq, Hq, Dh], contiguous, as dout
    dout_ptr,
    delta_ptr,  # fp32 [Hq, Tq]
    dq_sum_ptr,  # fp32 [Tq, Hq, Dh] to be set to zero, or None
    Tq,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(p * dp) = rowsum(out * dout), known before the backward pass begins."""
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK_D)[None, :]
    offset = (query.to(tl.int64) * tl.num_programs(1) + head)[:, None] * D + column
    mask = (query[:, None] < Tq) & (column < D)
    out = tl.load(out_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + head.to(tl.int64) * Tq + query, tl.sum(out * dout, 1), mask=query < Tq)
    if dq_sum_ptr is not None:
        tl.store(dq_sum_ptr + offset, tl.zeros((BLOCK_M, BLOCK_D), tl.float32), mask=mask)


@jit
def _flash_attention_bwd_kv_kernel(
    q,  # as in the forward kernel
    k,
    v,
    dout,  # [Tq, Hq, Dh], contiguous: pointer or TMA descriptor
    dq,  # the same in fp32, to be added to; None: the next kernel computes dq
    start_ptr,
    end_ptr,
    seed_ptr,
    lse_ptr,  # fp32 [Hq, Tq], as delta
    delta_ptr,
    dk_ptr,  # [splits, Tk, Hkv, Dh], contiguous, as dv; if TOGETHER Hkv of Hq + 2 Hkv heads
    dv_ptr,
    cos_ptr,  # [Tk, R / 2], as sin: dk is turned back by them; None: it is not
    sin_ptr,
    next_dq_ptr,  # fp32 [Tq, Hq, Dh], to be set to zero, or None
    Tq,
    Tk,
    q_offset,
    window,
    group,
    stride_q,
    stride_k,
    stride_v,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    inner,
    outer,
    scale,
    dropout,
    D1: tl.constexpr,
    D2: tl.constexpr,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    ADD_DQ: tl.constexpr,
    TOGETHER: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """A program takes BLOCK_N keys of one key head through the queries of its group of query heads, or of one of `splits`
    equal parts of it. The first keys have the most queries: they go first.

    Scores lie transposed, [BLOCK_N, BLOCK_M], so that p and ds are left operands of the products for dv and dk.
    """
    first_key = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1)
    stride_dout = tl.num_programs(1) * group * (D1 + D2)
    if not TMA:
        k += kv_head.to(tl.int64) * stride_k_head
        v += kv_head.to(tl.int64) * stride_v_head
    key = first_key + tl.arange(0, BLOCK_N)
    end = tl.load(end_ptr + key, mask=key < Tk, other=0)
    keys = load_tile(k, kv_head, first_key, 0, Tk, stride_k, BLOCK_N, D1, TMA)
    values = load_tile(v, kv_head, first_key, 0, Tk, stride_v, BLOCK_N, D1, TMA)
    if next_dq_ptr is not None:  # these stores wait for memory while the products keep the multiprocessor busy
        program = (tl.program_id(2) * tl.num_programs(1) + kv_head) * tl.num_programs(0) + tl.program_id(0)
        programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
        set_to_zero(next_dq_ptr, tl.cast(Tq, tl.int64) * stride_dout, program, programs)
    dk = tl.zeros((BLOCK_N, D1), tl.float32)
    dv = tl.zeros((BLOCK_N, D1), tl.float32)
    if D2:
        keys2 = load_tile(k, kv_head, first_key, D1, Tk, stride_k, BLOCK_N, D2, TMA)
        values2 = load_tile(v, kv_head, first_key, D1, Tk, stride_v, BLOCK_N, D2, TMA)
        dk2 = tl.zeros((BLOCK_N, D2), tl.float32)
        dv2 = tl.zeros((BLOCK_N, D2), tl.float32)

    end, first, stop, left, full = queries_of(
        end, start_ptr, first_key, Tq, Tk, q_offset, window, WINDOW, SHARED, BLOCK_M, BLOCK_N
    )
    num_blocks = tl.cdiv(tl.maximum(stop - first, 0), BLOCK_M)
    heads = group // tl.num_programs(2)
    first_head = kv_head * group + tl.program_id(2) * heads
    for step in tl.range(0, heads * num_blocks):
        head = first_head + step // num_blocks
        first_query = first + step % num_blocks * BLOCK_M
        q_head, dout_head, dq_head = q, dout, dq
        if not TMA:
            q_head += head.to(tl.int64) * stride_q_head
            dout_head += head * (D1 + D2)
            if ADD_DQ:
                dq_head += head * D1
        rows = head.to(tl.int64) * Tq
        query = first_query + tl.arange(0, BLOCK_M)
        i = query + q_offset
        queries = load_tile(q_head, head, first_query, 0, Tq, stride_q, BLOCK_M, D1, TMA)
        s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if (first_query < left) | (first_query + BLOCK_M > full):
            lowest = tl.load(start_ptr + query, mask=query < Tq, other=Tk)[None, :]
            visible = (lowest <= key[:, None]) & (key[:, None] <= i[None, :]) & (i[None, :] < end[:, None])
            s = tl.where(visible, s, float("-inf"))
        s = tl.dot(keys, tl.trans(queries), s, input_precision="ieee")
        if D2:
            queries2 = load_tile(q_head, head, first_query, D1, Tq, stride_q, BLOCK_M, D2, TMA)
            s = tl.dot(keys2, tl.trans(queries2), s, input_precision="ieee")
        if SOFTCAP:
            capped = tanh(s * inner)
            s = tl.where(s == float("-inf"), s, capped)
        lse = tl.load(lse_ptr + rows + query, mask=query < Tq, other=1e30)
        p = tl.exp2(s * outer - lse[None, :])
        dout_tile = load_tile(dout_head, head, first_query, 0, Tq, stride_dout, BLOCK_M, D1, TMA)
        dropped = p
        if DROPOUT:
            keep = kept(seed_ptr, head, i[None, :], key[:, None], dropout)
            dropped = tl.where(keep, p / (1.0 - dropout), 0.0)
        dropped = dropped.to(dout_tile.dtype)
        dv = tl.dot(dropped, dout_tile, dv, input_precision="ieee")
        dp = tl.dot(values, tl.trans(dout_tile), input_precision="ieee")
        if D2:
            dout_tile2 = load_tile(dout_head, head, first_query, D1, Tq, stride_dout, BLOCK_M, D2, TMA)
            dv2 = tl.dot(dropped, dout_tile2, dv2, input_precision="ieee")
            dp = tl.dot(values2, tl.trans(dout_tile2), dp, input_precision="ieee")
        if DROPOUT:
            dp = tl.where(keep, dp / (1.0 - dropout), 0.0)
        delta = tl.load(delta_ptr + rows + query, mask=query < Tq, other=0.0)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds *= 1.0 - capped * capped
        ds = ds.to(queries.dtype)
        dk = tl.dot(ds, queries, dk, input_precision="ieee")
        if D2:
            dk2 = tl.dot(ds, queries2, dk2, input_precision="ieee")
        if ADD_DQ:
            dq_tile = tl.dot(tl.trans(ds), keys, input_precision="ieee")
            if TMA:
                dq_head.atomic_add([head, first_query, 0], dq_tile.reshape([1, BLOCK_M, D1]))
            else:
                row = first_query + tl.arange(0, BLOCK_M)[:, None]
                pointers = dq_head + row.to(tl.int64) * stride_dout + tl.arange(0, D1)[None, :]
                tl.atomic_add(pointers, dq_tile, mask=row < Tq, sem="relaxed")

    stride = tl.num_programs(1) * (D1 + D2)
    offset = tl.program_id(2).to(tl.int64) * Tk * stride + kv_head * (D1 + D2)
    dk_ptr += offset
    dv_ptr += offset
    if TOGETHER:  # there is one split, so that only the head counts above
        stride *= group + 2
    store_tile(dk_ptr, dk * scale, first_key, 0, Tk, stride, BLOCK_N, D1)
    store_tile(dv_ptr, dv, first_key, 0, Tk, stride, BLOCK_N, D1)
    if D2:
        store_tile(dk_ptr, dk2 * scale, first_key, D1, Tk, stride, BLOCK_N, D2)
        store_tile(dv_ptr, dv2, first_key, D1, Tk, stride, BLOCK_N, D2)
    if cos_ptr is not None:
        tl.debug_barrier()
        turn_tile(
            *(dk_ptr, dk_ptr, None, cos_ptr, sin_ptr, first_key, Tk, stride, stride, 0.0, 0.0),
            *(D1 + D2, R, INTERLEAVED, True, PAIRS, BLOCK_N, BLOCK_N),
        )


@jit
def _flash_attention_bwd_q_kernel(
    q,  # as in the forward kernel
    k,
    v,
    dout,  # [Tq, Hq, Dh], contiguous: pointer or TMA descriptor
    start_ptr,
    end_ptr,
    tiles_ptr,  # as in the forward kernel, for the tiles of this one
    seed_ptr,
    lse_ptr,  # fp32 [Hq, Tq], as delta
    delta_ptr,
    dq_ptr,  # [Tq, Hq, Dh], contiguous
    Tq,
    Tk,
    q_offset,
    window,
    group,
    stride_q,
    stride_k,
    stride_v,
    stride_q_head,
    stride_k_head,
    stride_v_head,
    inner,
    outer,
    scale,
    dropout,
    D1: tl.constexpr,
    D2: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TMA: tl.constexpr,
):
    """The forward kernel's walk over the keys, for dq: no program adds to what another one writes."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    first_query = block * BLOCK_M
    head = tl.program_id(1)
    kv_head = head // group
    stride_dout = tl.num_programs(1) * (D1 + D2)
    if not TMA:
        q += head.to(tl.int64) * stride_q_head
        k += kv_head.to(tl.int64) * stride_k_head
        v += kv_head.to(tl.int64) * stride_v_head
        dout += head * (D1 + D2)
    query = first_query + tl.arange(0, BLOCK_M)
    i = query + q_offset
    rows = head.to(tl.int64) * Tq
    start = tl.load(start_ptr + query, mask=query < Tq, other=Tk)
    lse = tl.load(lse_ptr + rows + query, mask=query < Tq, other=1e30)
    delta = tl.load(delta_ptr + rows + query, mask=query < Tq, other=0.0)
    queries = load_tile(q, head, first_query, 0, Tq, stride_q, BLOCK_M, D1, TMA)
    dout_tile = load_tile(dout, head, first_query, 0, Tq, stride_dout, BLOCK_M, D1, TMA)
    dq = tl.zeros((BLOCK_M, D1), tl.float32)
    if D2:
        queries2 = load_tile(q, head, first_query, D1, Tq, stride_q, BLOCK_M, D2, TMA)
        dout_tile2 = load_tile(dout, head, first_query, D1, Tq, stride_dout, BLOCK_M, D2, TMA)
        dq2 = tl.zeros((BLOCK_M, D2), tl.float32)
    lowest, first, stop, full, right = keys_of(start, first_query, Tq, Tk, q_offset, window, WINDOW, BLOCK_M, BLOCK_N)
    entry = 0
    if tiles_ptr is not None:
        tiles_ptr += block * (2 + tl.cdiv(Tk, BLOCK_N))
        first, stop, entry = 0, tl.load(tiles_ptr) * BLOCK_N, tl.load(tiles_ptr + 1)

    for step in tl.range(first, stop, BLOCK_N):
        first_key, hidden, entry = keys_at(step, entry, tiles_ptr, full, right, BLOCK_N)
        key = first_key + tl.arange(0, BLOCK_N)
        keys = load_tile(k, kv_head, first_key, 0, Tk, stride_k, BLOCK_N, D1, TMA)
        values = load_tile(v, kv_head, first_key, 0, Tk, stride_v, BLOCK_N, D1, TMA)
        s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if hidden:
            visible = (lowest[:, None] <= key[None, :]) & (key[None, :] <= i[:, None])
            if tiles_ptr is not None:
                visible &= i[:, None] < tl.load(end_ptr + key, mask=key < Tk, other=0)[None, :]
            s = tl.where(visible, s, float("-inf"))
        s = tl.dot(queries, tl.trans(keys), s, input_precision="ieee")
        dp = tl.dot(dout_tile, tl.trans(values), input_precision="ieee")
        if D2:
            keys2 = load_tile(k, kv_head, first_key, D1, Tk, stride_k, BLOCK_N, D2, TMA)
            values2 = load_tile(v, kv_head, first_key, D1, Tk, stride_v, BLOCK_N, D2, TMA)
            s = tl.dot(queries2, tl.trans(keys2), s, input_precision="ieee")
            dp = tl.dot(dout_tile2, tl.trans(values2), dp, input_precision="ieee")
        if SOFTCAP:
            capped = tanh(s * inner)
            s = tl.where(s == float("-inf"), s, capped)
        p = tl.exp2(s * outer - lse[:, None])
        if DROPOUT:
            keep = kept(seed_ptr, head, i[:, None], key[None, :], dropout)
            dp = tl.where(keep, dp / (1.0 - dropout), 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds *= 1.0 - capped * capped
        ds = ds.to(keys.dtype)
        dq = tl.dot(ds, keys, dq, input_precision="ieee")
        if D2:
            dq2 = tl.dot(ds, keys2, dq2, input_precision="ieee")

    dq_ptr += head * (D1 + D2)
    store_tile(dq_ptr, dq * scale, first_query, 0, Tq, stride_dout, BLOCK_M, D1)
    if D2:
        store_tile(dq_ptr, dq2 * scale, first_query, D1, Tq, stride_dout, BLOCK_M, D2)
