"""The Triton kernels of gated_delta_rule. The lesson and the names of a chunk's matrices are in gated_delta_rule.py.

Chunk n is tokens n * CHUNK to (n + 1) * CHUNK of the stream, wherever documents begin and end, so that the grid depends on the
number of tokens only and the host waits for nothing. Masks keep the documents of a chunk apart. The first of them may have begun
in an earlier chunk: it is `carried`, and states[n] is the state that it brings into chunk n. Where the first document begins
with its chunk, nothing is carried and states[n] is not written.

The two kernels that walk have a program for every chunk and let those go at once that have nothing to walk: forward, a
document's walk belongs to the chunk in which it begins, backward to the one in which it ends.

Products are of fp32 numbers: in TF32 on tensor cores where q is bf16 or fp16, in full fp32 where it is fp32; G is then summed in
fp64, for the reason that gated_delta_rule_torch.py gives.
"""

from minisft.kernels.common import jit, tl


@jit
def _load(x_ptr, t, T, stride, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows t and columns first:first + BLOCK of x [T, D] in fp32; zeros outside."""
    column = first + tl.arange(0, BLOCK)
    mask = (t < T)[:, None] & (column < D)[None, :]
    return tl.load(x_ptr + t.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@jit
def _store(x_ptr, values, t, mask, stride, first, D: tl.constexpr, BLOCK: tl.constexpr):
    """values [CHUNK, BLOCK] to where `_load` would find them, in the rows of the mask."""
    column = first + tl.arange(0, BLOCK)
    out = x_ptr + t.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(out, values.to(x_ptr.dtype.element_ty), mask=mask[:, None] & (column < D)[None, :])


@jit
def _load_normed(x_ptr, t, T, stride, eps, NORMALIZE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows t of one head of q or k, and what they were multiplied by."""
    x = _load(x_ptr, t, T, stride, 0, D, BLOCK)
    factor = tl.zeros_like(t).to(tl.float32) + 1.0
    if NORMALIZE:
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) + eps)
    return x * factor[:, None], factor


@jit
def _offsets(first, D: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Where columns first:first + BLOCK_V of a state [D, DV] are, and which of them exist."""
    row = tl.arange(0, BLOCK_K)[:, None]
    column = first + tl.arange(0, BLOCK_V)[None, :]
    return row * DV + column, (row < D) & (column < DV)


@jit
def _tokens(start_ptr, G_ptr, head, t0, T, HV: tl.constexpr, CHUNK: tl.constexpr):
    """The tokens of the chunk from t0 on, the starts of their documents, and G."""
    t = t0 + tl.arange(0, CHUNK)
    start = tl.load(start_ptr + t, mask=t < T, other=T).to(tl.int32)
    G = tl.load(G_ptr + t.to(tl.int64) * HV + head, mask=t < T, other=0.0)
    return t, start, G


@jit
def _lower(start, CHUNK: tl.constexpr):
    """Which tokens j <= i are of i's document?"""
    i = tl.arange(0, CHUNK)
    return (start[:, None] == start[None, :]) & (i[:, None] >= i[None, :])


@jit
def _is_carried(start_ptr, t0, T):
    """Did the document of token t0 begin before it?"""
    return tl.load(start_ptr + t0, mask=t0 < T, other=t0) < t0


@jit
def _decay(lower, G):
    """e^(G_i - G_j) for j <= i in one document, else 0."""
    difference = (G[:, None] - G[None, :]).to(tl.float32)
    return tl.exp(tl.where(lower, difference, float("-inf")))


@jit
def _edges(start, G, t0, T, CHUNK: tl.constexpr):
    """What is left, of the state with which the chunk begins, at each token (fade) and behind the last one (through), and
    of each token behind the last one (left)."""
    i = tl.arange(0, CHUNK)
    is_last = i == tl.minimum(CHUNK, T - t0) - 1
    start_last = tl.sum(tl.where(is_last, start, 0), 0)
    G_last = tl.sum(tl.where(is_last, G, 0.0), 0)
    nothing = float("-inf")  # its exponential is 0; that of what is hidden here might overflow
    fade = tl.exp(tl.where(start < t0, G.to(tl.float32), nothing))
    left = tl.exp(tl.where(start == start_last, (G_last - G).to(tl.float32), nothing))
    through = tl.where(start_last < t0, tl.exp(G_last.to(tl.float32)), 0.0)
    return fade, left, through, is_last


@jit
def _merged(inverse, A, i, j, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of the blocks of SIZE to those of twice the size: [[a, 0], [c, b]]^-1 = [[a', 0], [-b' c a', b']]."""
    beside = tl.where((i // SIZE != j // SIZE) & (i // (2 * SIZE) == j // (2 * SIZE)), A, 0.0)
    beside = tl.dot(beside, inverse, input_precision=PRECISION)
    return inverse - tl.dot(inverse, beside, input_precision=PRECISION)


@jit
def _gated_delta_rule_inverse_kernel(
    k_ptr,  # [T, Hk, Dk], tokens stride_k apart and heads stride_k_head
    g_ptr,  # [T, Hv], contiguous, as beta
    beta_ptr,
    start_ptr,  # int [T]
    inverse_ptr,  # fp32 [N, Hv, CHUNK, CHUNK]
    G_ptr,  # fp32 or fp64 [T, Hv]
    T,
    group,  # value heads of a key head
    stride_k,
    stride_k_head,
    eps,
    HV: tl.constexpr,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """G and (I + A)^-1 of one chunk and head: blocks of 16 by elimination, then two blocks to one of twice the size."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    t = chunk * CHUNK + tl.arange(0, CHUNK)
    start = tl.load(start_ptr + t, mask=t < T, other=T).to(tl.int32)
    lower = _lower(start, CHUNK)
    cells = t.to(tl.int64) * HV + head
    g = tl.load(g_ptr + cells, mask=t < T, other=0.0).to(G_ptr.dtype.element_ty)
    G = tl.sum(tl.where(lower, g[None, :], 0.0), 1)
    tl.store(G_ptr + cells, G, mask=t < T)
    beta = tl.load(beta_ptr + cells, mask=t < T, other=0.0).to(tl.float32)
    k_ptr += (head // group).to(tl.int64) * stride_k_head
    k, k_factor = _load_normed(k_ptr, t, T, stride_k, eps, NORMALIZE, D, BLOCK_K)
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    A = tl.dot(k, tl.trans(k), input_precision=PRECISION) * _decay(lower, G) * beta[:, None]
    A = tl.where(i > j, A, 0.0)

    inverse = tl.where(i == j, 1.0, 0.0)
    own = i // 16 == j // 16
    diagonal = tl.where(own, A, 0.0)
    for step in range(15):  # subtracts row `step` of each block from the rows below it
        column = tl.sum(tl.where(j % 16 == step, diagonal, 0.0), 1)
        row = tl.sum(tl.where(i % 16 == step, inverse, 0.0), 0)
        inverse -= tl.where(own, column[:, None] * row[None, :], 0.0)
    if CHUNK > 16:
        inverse = _merged(inverse, A, i, j, 16, PRECISION)
    if CHUNK > 32:
        inverse = _merged(inverse, A, i, j, 32, PRECISION)
    inverse_ptr += (tl.cast(chunk, tl.int64) * HV + head) * CHUNK * CHUNK
    tl.store(inverse_ptr + i * CHUNK + j, inverse)


@jit
def _gated_delta_rule_state_kernel(
    k_ptr,  # as in the kernel before
    v_ptr,  # [T, Hv, Dv], tokens stride_v apart and heads stride_v_head
    G_ptr,
    beta_ptr,
    start_ptr,
    end_ptr,  # int [T]
    inverse_ptr,
    new_ptr,  # fp32 [T, Hv, Dv]
    states_ptr,  # fp32 [N, Hv, Dk, Dv]
    T,
    group,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    eps,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Walks BLOCK_V columns of the state of the chunk's last document to that one's end; on the way, the new values."""
    first_chunk, head = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_V
    t0 = first_chunk * CHUNK
    last = tl.minimum(t0 + CHUNK, T) - 1
    document = tl.load(start_ptr + last).to(tl.int32)
    if document < t0:  # another program's
        return
    stop = tl.cdiv(tl.load(end_ptr + last).to(tl.int32), CHUNK)
    k_ptr += (head // group).to(tl.int64) * stride_k_head
    v_ptr += head.to(tl.int64) * stride_v_head
    new_ptr += head * DV
    where, exists = _offsets(first, D, DV, BLOCK_K, BLOCK_V)
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for chunk in tl.range(first_chunk, stop):
        t0 = chunk * CHUNK
        cell = tl.cast(chunk, tl.int64) * HV + head
        if chunk > first_chunk:
            tl.store(states_ptr + cell * D * DV + where, state, mask=exists)
        t, start, G = _tokens(start_ptr, G_ptr, head, t0, T, HV, CHUNK)
        fade, left, through, is_last = _edges(start, G, t0, T, CHUNK)
        beta = tl.load(beta_ptr + t.to(tl.int64) * HV + head, mask=t < T, other=0.0).to(tl.float32)
        k, k_factor = _load_normed(k_ptr, t, T, stride_k, eps, NORMALIZE, D, BLOCK_K)
        v = _load(v_ptr, t, T, stride_v, first, DV, BLOCK_V)
        v -= fade[:, None] * tl.dot(k, state, input_precision=PRECISION)
        i = tl.arange(0, CHUNK)
        inverse = tl.load(inverse_ptr + cell * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])
        new = tl.dot(inverse, beta[:, None] * v, input_precision=PRECISION)
        # The first chunk's carried document has a walk of its own, and so have the documents that begin in the last chunk.
        mine = (t < T) & ((start == document) | ((chunk == first_chunk) & (start >= t0)))
        _store(new_ptr, new, t, mine, HV * DV, first, DV, BLOCK_V)
        state = through * state + tl.dot(tl.trans(k), left[:, None] * new, input_precision=PRECISION)


@jit
def _gated_delta_rule_output_kernel(
    q_ptr,  # [T, Hk, Dk], as k
    k_ptr,
    G_ptr,
    start_ptr,
    new_ptr,
    states_ptr,
    out_ptr,  # [T, Hv, Dv], contiguous
    T,
    group,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    scale,
    eps,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """BLOCK_V columns of the output of one chunk and head: what the queries read from the state and from the chunk."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_V
    t0 = chunk * CHUNK
    t, start, G = _tokens(start_ptr, G_ptr, head, t0, T, HV, CHUNK)
    key_head = (head // group).to(tl.int64)
    q, q_factor = _load_normed(q_ptr + key_head * stride_q_head, t, T, stride_q, eps, NORMALIZE, D, BLOCK_K)
    k, k_factor = _load_normed(k_ptr + key_head * stride_k_head, t, T, stride_k, eps, NORMALIZE, D, BLOCK_K)
    out = tl.zeros((CHUNK, BLOCK_V), tl.float32)
    if _is_carried(start_ptr, t0, T):
        fade, left, through, is_last = _edges(start, G, t0, T, CHUNK)
        where, exists = _offsets(first, D, DV, BLOCK_K, BLOCK_V)
        cell = tl.cast(chunk, tl.int64) * HV + head
        state = tl.load(states_ptr + cell * D * DV + where, mask=exists, other=0.0)
        out = tl.dot(q, state, input_precision=PRECISION) * fade[:, None]
    P = tl.dot(q, tl.trans(k), input_precision=PRECISION) * _decay(_lower(start, CHUNK), G)
    new = _load(new_ptr + head * DV, t, T, HV * DV, first, DV, BLOCK_V)
    out = tl.dot(P, new, out, input_precision=PRECISION) * scale
    _store(out_ptr + head * DV, out, t, t < T, HV * DV, first, DV, BLOCK_V)


@jit
def _gated_delta_rule_bwd_local_kernel(
    q_ptr,
    k_ptr,
    G_ptr,
    start_ptr,
    dout_ptr,  # [T, Hv, Dv], contiguous
    dnew_ptr,  # fp32 [T, Hv, Dv]
    T,
    group,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    scale,
    eps,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What the gradient of the new values has from the outputs of their own chunk, P^T dout."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_V
    t, start, G = _tokens(start_ptr, G_ptr, head, chunk * CHUNK, T, HV, CHUNK)
    key_head = (head // group).to(tl.int64)
    q, q_factor = _load_normed(q_ptr + key_head * stride_q_head, t, T, stride_q, eps, NORMALIZE, D, BLOCK_K)
    k, k_factor = _load_normed(k_ptr + key_head * stride_k_head, t, T, stride_k, eps, NORMALIZE, D, BLOCK_K)
    P = tl.dot(q, tl.trans(k), input_precision=PRECISION) * _decay(_lower(start, CHUNK), G) * scale
    dout = _load(dout_ptr + head * DV, t, T, HV * DV, first, DV, BLOCK_V)
    dnew = tl.dot(tl.trans(P), dout, input_precision=PRECISION)
    _store(dnew_ptr + head * DV, dnew, t, t < T, HV * DV, first, DV, BLOCK_V)


@jit
def _gated_delta_rule_bwd_state_kernel(
    q_ptr,
    k_ptr,
    G_ptr,
    beta_ptr,
    start_ptr,
    end_ptr,
    inverse_ptr,
    dout_ptr,
    dnew_ptr,  # of the kernel before
    dstates_ptr,  # fp32 [N, Hv, Dk, Dv]
    T,
    group,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    scale,
    eps,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Walks BLOCK_V columns of the state's gradient from the end of the carried document to the chunk in which it begins."""
    last_chunk, head = tl.program_id(0), tl.program_id(1)
    first = tl.program_id(2) * BLOCK_V
    t0 = last_chunk * CHUNK
    document = tl.load(start_ptr + t0).to(tl.int32)
    if (document == t0) | (tl.load(end_ptr + t0) > t0 + CHUNK):  # nothing is carried, or another program's
        return
    key_head = (head // group).to(tl.int64)
    q_ptr += key_head * stride_q_head
    k_ptr += key_head * stride_k_head
    dout_ptr += head * DV
    dnew_ptr += head * DV
    where, exists = _offsets(first, D, DV, BLOCK_K, BLOCK_V)
    dstate = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    for back in tl.range(0, last_chunk - document // CHUNK):
        chunk = last_chunk - back
        t0 = chunk * CHUNK
        cell = tl.cast(chunk, tl.int64) * HV + head
        t, start, G = _tokens(start_ptr, G_ptr, head, t0, T, HV, CHUNK)
        fade, left, through, is_last = _edges(start, G, t0, T, CHUNK)
        beta = tl.load(beta_ptr + t.to(tl.int64) * HV + head, mask=t < T, other=0.0).to(tl.float32)
        k, k_factor = _load_normed(k_ptr, t, T, stride_k, eps, NORMALIZE, D, BLOCK_K)
        dnew = _load(dnew_ptr, t, T, HV * DV, first, DV, BLOCK_V)
        dnew += left[:, None] * tl.dot(k, dstate, input_precision=PRECISION)
        i = tl.arange(0, CHUNK)
        inverse = tl.load(inverse_ptr + cell * CHUNK * CHUNK + i[:, None] * CHUNK + i[None, :])
        dunknown = (fade * beta)[:, None] * tl.dot(tl.trans(inverse), dnew, input_precision=PRECISION)
        dstate = through * dstate - tl.dot(tl.trans(k), dunknown, input_precision=PRECISION)
        q, q_factor = _load_normed(q_ptr, t, T, stride_q, eps, NORMALIZE, D, BLOCK_K)
        dout = _load(dout_ptr, t, T, HV * DV, first, DV, BLOCK_V)
        dstate = tl.dot(tl.trans(q), (scale * fade)[:, None] * dout, dstate, input_precision=PRECISION)
        tl.store(dstates_ptr + cell * D * DV + where, dstate, mask=exists)


@jit
def _gated_delta_rule_bwd_values_kernel(
    k_ptr,
    v_ptr,
    G_ptr,
    beta_ptr,
    start_ptr,
    inverse_ptr,
    new_ptr,
    states_ptr,
    dout_ptr,
    dnew_ptr,  # becomes the gradient of v, in fp32
    dstates_ptr,
    dv_ptr,  # [T, Hv, Dv], contiguous
    dbeta_sum_ptr,  # fp32 [T, Hv]: the part of it that is known here
    dG_ptr,  # as G; so is this
    dqk_ptr,  # fp32 [N, Hv, CHUNK, CHUNK]: dout new^T
    dkk_ptr,  # the same of the new values' gradient
    T,
    group,
    stride_k,
    stride_k_head,
    stride_v,
    stride_v_head,
    eps,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradients of v of one chunk and head, and its products for those of the chunk's matrices."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    t0 = chunk * CHUNK
    t, start, G = _tokens(start_ptr, G_ptr, head, t0, T, HV, CHUNK)
    fade, left, through, is_last = _edges(start, G, t0, T, CHUNK)
    cells = t.to(tl.int64) * HV + head
    beta = tl.load(beta_ptr + cells, mask=t < T, other=0.0).to(tl.float32)
    key_head = (head // group).to(tl.int64)
    k, k_factor = _load_normed(k_ptr + key_head * stride_k_head, t, T, stride_k, eps, NORMALIZE, D, BLOCK_K)
    cell = tl.cast(chunk, tl.int64) * HV + head
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    square = cell * CHUNK * CHUNK + i * CHUNK + j
    carried, goes_on = _is_carried(start_ptr, t0, T), _is_carried(start_ptr, t0 + CHUNK, T)
    dP = tl.zeros((CHUNK, CHUNK), tl.float32)
    dA = tl.zeros((CHUNK, CHUNK), tl.float32)
    dbeta = tl.zeros((CHUNK,), tl.float32)
    dG = G - G
    dG_last = dG  # to be added up
    for first in tl.range(0, DV, BLOCK_V):
        where, exists = _offsets(first, D, DV, BLOCK_K, BLOCK_V)
        new = _load(new_ptr + head * DV, t, T, HV * DV, first, DV, BLOCK_V)
        dnew = _load(dnew_ptr + head * DV, t, T, HV * DV, first, DV, BLOCK_V)
        if goes_on:
            dstate = tl.load(dstates_ptr + (cell + HV) * D * DV + where, mask=exists, other=0.0)
            asked = left[:, None] * tl.dot(k, dstate, input_precision=PRECISION)
            dnew += asked
            share = tl.sum((asked * new).to(G.dtype), 1)
            dG -= share
            dG_last += share
        inverse = tl.load(inverse_ptr + square)  # again, rather than hold it in registers
        dunknown = tl.dot(tl.trans(inverse), dnew, input_precision=PRECISION)  # times beta, below
        dA = tl.dot(dunknown, tl.trans(new), dA, input_precision=PRECISION)
        dout = _load(dout_ptr + head * DV, t, T, HV * DV, first, DV, BLOCK_V)
        dP = tl.dot(dout, tl.trans(new), dP, input_precision=PRECISION)
        unknown = _load(v_ptr + head.to(tl.int64) * stride_v_head, t, T, stride_v, first, DV, BLOCK_V)
        dv = beta[:, None] * dunknown
        if carried:
            state = tl.load(states_ptr + cell * D * DV + where, mask=exists, other=0.0)
            known = fade[:, None] * tl.dot(k, state, input_precision=PRECISION)
            unknown -= known
            dG -= tl.sum((dv * known).to(G.dtype), 1)
        dbeta += tl.sum(dunknown * unknown, 1)
        _store(dv_ptr + head * DV, dv, t, t < T, HV * DV, first, DV, BLOCK_V)
        _store(dnew_ptr + head * DV, dv, t, t < T, HV * DV, first, DV, BLOCK_V)
    tl.store(dqk_ptr + square, dP)
    tl.store(dkk_ptr + square, dA)
    tl.store(dbeta_sum_ptr + cells, dbeta, mask=t < T)
    tl.store(dG_ptr + cells, dG + tl.where(is_last, tl.sum(dG_last, 0), 0.0), mask=t < T)


@jit
def _gated_delta_rule_bwd_inside_kernel(
    q_ptr,
    k_ptr,
    G_ptr,
    beta_ptr,
    start_ptr,
    dbeta_sum_ptr,  # of the kernel before, as the next three
    dG_ptr,  # is added to
    dqk_ptr,  # becomes the gradient of the products q k^T
    dkk_ptr,  # becomes that of k k^T, plus its transpose
    dbeta_ptr,  # [T, Hv], contiguous
    T,
    group,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    scale,
    eps,
    HV: tl.constexpr,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradients of one chunk's matrices, and what beta and G get from them."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    t, start, G = _tokens(start_ptr, G_ptr, head, chunk * CHUNK, T, HV, CHUNK)
    cells = t.to(tl.int64) * HV + head
    inside = t < T
    beta = tl.load(beta_ptr + cells, mask=inside, other=0.0).to(tl.float32)
    key_head = (head // group).to(tl.int64)
    q, q_factor = _load_normed(q_ptr + key_head * stride_q_head, t, T, stride_q, eps, NORMALIZE, D, BLOCK_K)
    k, k_factor = _load_normed(k_ptr + key_head * stride_k_head, t, T, stride_k, eps, NORMALIZE, D, BLOCK_K)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    square = (tl.cast(chunk, tl.int64) * HV + head) * CHUNK * CHUNK + i * CHUNK + j
    decay = _decay(_lower(start, CHUNK), G)
    dA = tl.where(i > j, -tl.load(dkk_ptr + square) * decay, 0.0)
    pairs = dA * tl.dot(k, tl.trans(k), input_precision=PRECISION)  # the gradient of each G_i - G_j
    dbeta = tl.load(dbeta_sum_ptr + cells, mask=inside, other=0.0) + tl.sum(pairs, 1)
    tl.store(dbeta_ptr + cells, dbeta.to(dbeta_ptr.dtype.element_ty), mask=inside)
    dA *= beta[:, None]
    tl.store(dkk_ptr + square, dA + tl.trans(dA))
    dP = tl.load(dqk_ptr + square) * decay * scale
    tl.store(dqk_ptr + square, dP)
    dP = tl.where(i > j, dP, 0.0)
    pairs = pairs * beta[:, None] + dP * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    pairs = pairs.to(G.dtype)
    dG = tl.load(dG_ptr + cells, mask=inside, other=0.0) + tl.sum(pairs, 1) - tl.sum(pairs, 0)
    tl.store(dG_ptr + cells, dG, mask=inside)


@jit
def _gated_delta_rule_bwd_keys_kernel(
    q_ptr,
    k_ptr,
    G_ptr,
    start_ptr,
    new_ptr,
    states_ptr,
    dout_ptr,
    dnew_ptr,  # this and the next three are of the kernels before
    dG_ptr,
    dqk_ptr,
    dkk_ptr,
    dstates_ptr,
    dq_ptr,  # [T, Hv, Dk], contiguous, as dk: of each value head
    dk_ptr,
    dg_ptr,  # [T, Hv], contiguous
    T,
    group,
    stride_q,
    stride_q_head,
    stride_k,
    stride_k_head,
    scale,
    eps,
    HV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradients of q, k and g of one chunk and head: of what the states get and give, then inside the chunk."""
    chunk, head = tl.program_id(0), tl.program_id(1)
    t0 = chunk * CHUNK
    t, start, G = _tokens(start_ptr, G_ptr, head, t0, T, HV, CHUNK)
    fade, left, through, is_last = _edges(start, G, t0, T, CHUNK)
    cell = tl.cast(chunk, tl.int64) * HV + head
    carried, goes_on = _is_carried(start_ptr, t0, T), _is_carried(start_ptr, t0 + CHUNK, T)
    dq = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    dk = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    both = tl.zeros((BLOCK_V,), tl.float32)
    for first in tl.range(0, DV, BLOCK_V):
        where, exists = _offsets(first, D, DV, BLOCK_K, BLOCK_V)
        dstate = tl.load(dstates_ptr + (cell + HV) * D * DV + where, mask=exists & goes_on, other=0.0)
        if goes_on:
            new = _load(new_ptr + head * DV, t, T, HV * DV, first, DV, BLOCK_V)
            dk = tl.dot(left[:, None] * new, tl.trans(dstate), dk, input_precision=PRECISION)
        if carried:
            state = tl.load(states_ptr + cell * D * DV + where, mask=exists, other=0.0)
            both += tl.sum(state * dstate, 0)
            dv = _load(dnew_ptr + head * DV, t, T, HV * DV, first, DV, BLOCK_V)
            dk = tl.dot(-fade[:, None] * dv, tl.trans(state), dk, input_precision=PRECISION)
            dout = _load(dout_ptr + head * DV, t, T, HV * DV, first, DV, BLOCK_V)
            dq = tl.dot((scale * fade)[:, None] * dout, tl.trans(state), dq, input_precision=PRECISION)

    key_head = (head // group).to(tl.int64)
    cells = t.to(tl.int64) * HV + head
    inside = t < T
    square = cell * CHUNK * CHUNK + tl.arange(0, CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    dqk = tl.load(dqk_ptr + square)
    q, q_factor = _load_normed(q_ptr + key_head * stride_q_head, t, T, stride_q, eps, NORMALIZE, D, BLOCK_K)
    dG = tl.load(dG_ptr + cells, mask=inside, other=0.0) + tl.where(is_last, tl.sum(both, 0) * through, 0.0)
    dG += tl.sum((q * dq).to(G.dtype), 1)  # dq is what the state gives it, yet
    dg = tl.sum(tl.where(_lower(start, CHUNK), dG[:, None], 0.0), 0)
    tl.store(dg_ptr + cells, dg.to(dg_ptr.dtype.element_ty), mask=inside)
    dk = tl.dot(tl.trans(dqk), q, dk, input_precision=PRECISION)
    k, k_factor = _load_normed(k_ptr + key_head * stride_k_head, t, T, stride_k, eps, NORMALIZE, D, BLOCK_K)
    dq = tl.dot(dqk, k, dq, input_precision=PRECISION)
    if NORMALIZE:
        dq = (dq - q * tl.sum(q * dq, 1)[:, None]) * q_factor[:, None]
    _store(dq_ptr + head * D, dq, t, inside, HV * D, 0, D, BLOCK_K)
    dk = tl.dot(tl.load(dkk_ptr + square), k, dk, input_precision=PRECISION)
    if NORMALIZE:
        dk = (dk - k * tl.sum(k * dk, 1)[:, None]) * k_factor[:, None]
    _store(dk_ptr + head * D, dk, t, inside, HV * D, 0, D, BLOCK_K)
