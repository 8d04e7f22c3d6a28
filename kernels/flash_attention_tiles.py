"""What the Triton kernels of flash_attention share: which keys and queries belong to a tile, and how tiles are moved.

A tile is a few neighbouring tokens of one head. A kernel keeps one tile (of queries, or of keys) and walks over the tiles
of the other kind that it needs. Most of a long document's tiles are visible as a whole and are computed without a mask;
`keys_of` and `queries_of` find out which, on the GPU, from `start` and `end` alone: the host neither waits for them nor
shapes the grid by them, so that one captured CUDA graph serves every batch.

Of whole documents side by side, two numbers a tile say which those are. Where documents share prefixes, some keys between
have ended, and only a look at all of them tells where. What sees a key still lies in one piece, from the key to its end.
What a query sees does not: a small kernel lists the tiles that are not over, once for all heads.
"""

from minisft.kernels.common import jit, tl
from minisft.kernels.rope import rope_rows

SCAN = tl.constexpr(2048)  # tokens whose bounds are looked at together
FAR = tl.constexpr(2**31 - 1)


@jit
def keys_of(
    start,  # int [BLOCK_M]: the first key of each query's document, Tk for a query beyond the last one
    first_query,
    Tq,
    Tk,
    q_offset,
    window,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which keys the BLOCK_M queries from first_query on see, as far as no key has ended before its document does.

    Returns the first visible key of each query, int32 [BLOCK_M]; the keys first:stop that any of them sees, first a
    multiple of BLOCK_N; and full, right: all of them see every key of every block that lies within full:right.
    """
    query = first_query + tl.arange(0, BLOCK_M)
    lowest = start.to(tl.int32)
    if WINDOW:
        lowest = tl.maximum(lowest, query + q_offset - window + 1)
    lowest = tl.minimum(tl.maximum(lowest, 0), Tk)
    first = tl.min(lowest, 0) // BLOCK_N * BLOCK_N
    stop = tl.minimum(tl.minimum(first_query + BLOCK_M, Tq) + q_offset, Tk)
    right = tl.minimum(first_query + q_offset + 1, Tk)
    full = tl.max(tl.where(query < Tq, lowest, 0), 0)
    return lowest, first, stop, full, right


@jit
def _flash_attention_tiles_kernel(
    start_ptr,  # int [Tq]
    end_ptr,  # int [Tk]
    tiles_ptr,  # int32 [blocks of queries, 2 + blocks of keys]
    Tq,
    Tk,
    q_offset,
    window,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Where documents share prefixes: the blocks of keys that the queries of a block see. Those that have ended for all of
    them, such as the answer beside theirs, are not visited.

    A row a block of queries: how many there are, then the first key of each, plus 1 where a query does not see every key.
    The last place stays free, for who reads one ahead.
    """
    block = tl.program_id(0)
    first_query = block * BLOCK_M
    query = first_query + tl.arange(0, BLOCK_M)
    start = tl.load(start_ptr + query, mask=query < Tq, other=Tk)
    _, first, stop, full, right = keys_of(start, first_query, Tq, Tk, q_offset, window, WINDOW, BLOCK_M, BLOCK_N)
    i_first = first_query + q_offset
    i_last = tl.minimum(first_query + BLOCK_M, Tq) - 1 + q_offset
    tiles_ptr += block * (2 + tl.cdiv(Tk, BLOCK_N))
    count = 0
    for first_key in range(first, stop, SCAN):
        tile = first_key + tl.arange(0, SCAN // BLOCK_N) * BLOCK_N
        key = tile[:, None] + tl.arange(0, BLOCK_N)[None, :]
        end = tl.load(end_ptr + key, mask=key < stop, other=0).to(tl.int32)
        seen = (tl.max(end, 1) > i_first).to(tl.int32)
        hidden = (tile < full) | (tile + BLOCK_N > right) | (tl.min(end, 1) <= i_last)
        tl.store(tiles_ptr + count + tl.cumsum(seen, 0), tile + hidden.to(tl.int32), mask=seen > 0)
        count += tl.sum(seen, 0)
    tl.store(tiles_ptr, count)


@jit
def keys_at(step, entry, tiles_ptr, full, right, BLOCK_N: tl.constexpr):
    """Where a loop over the keys is at `step`: (first key of the block, whether some query does not see every key, entry).

    The block begins at step itself, or, where there is a list of blocks, at its entry, which was read a step before: so the
    keys can be asked for early.
    """
    first_key = step
    hidden = (step < full) | (step + BLOCK_N > right)
    if tiles_ptr is not None:
        first_key = entry // BLOCK_N * BLOCK_N
        hidden = entry > first_key
        entry = tl.load(tiles_ptr + 2 + step // BLOCK_N)
    return first_key, hidden, entry


@jit
def queries_of(
    end,  # int [BLOCK_N]: where each key's document ends, 0 for a key beyond the last one
    start_ptr,  # int [Tq]
    first_key,
    Tq,
    Tk,
    q_offset,
    window,
    WINDOW: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Which queries see the BLOCK_N keys from first_key on: the mirror of `keys_of`, and right where keys end early.

    Returns the position before which each key ends, int32 [BLOCK_N]; the queries first:stop that see any of them, first a
    multiple of BLOCK_M; and left, full: every query of every block that lies within left:full sees all of them.
    """
    end = end.to(tl.int32)
    if WINDOW:
        end = tl.minimum(end, first_key + tl.arange(0, BLOCK_N) + window)
    first = tl.maximum(first_key - q_offset, 0) // BLOCK_M * BLOCK_M
    stop = tl.minimum(tl.max(end, 0) - q_offset, Tq)
    left = tl.maximum(first_key + BLOCK_N - 1 - q_offset, 0)
    full = tl.minimum(tl.min(end, 0) - q_offset, Tq)
    if SHARED:  # a query in between may start later
        for first_query in range(left, full, SCAN):
            query = first_query + tl.arange(0, SCAN)
            later = tl.load(start_ptr + query, mask=query < full, other=0) > first_key
            full = tl.minimum(full, tl.min(tl.where(later, query, FAR), 0))
    return end, first, stop, left, full


@jit
def load_tile(
    x,  # one head of x, [count, Dh] with rows `stride` apart; with TMA the descriptor of all heads, [H, count, Dh]
    head,
    first,
    column: tl.constexpr,
    count,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows first:first+ROWS and columns column:column+COLUMNS of one head; zeros beyond the last row."""
    if TMA:
        tile = x.load([head, first, column]).reshape([ROWS, COLUMNS])
    else:
        # 64 bits once for the tile: inside it 32 are enough, and take half the registers.
        row = tl.arange(0, ROWS)[:, None]
        pointers = x + (tl.cast(first, tl.int64) * stride + column) + (row * stride + tl.arange(0, COLUMNS)[None, :])
        tile = tl.load(pointers, mask=first + row < count, other=0.0)
    return tile


@jit
def store_tile(x_ptr, values, first, column: tl.constexpr, count, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """values [ROWS, COLUMNS] to where `load_tile` would find them, in the dtype of x."""
    row = tl.arange(0, ROWS)[:, None]
    pointers = x_ptr + (tl.cast(first, tl.int64) * stride + column) + (row * stride + tl.arange(0, COLUMNS)[None, :])
    tl.store(pointers, values.to(x_ptr.dtype.element_ty), mask=first + row < count)


@jit
def turn_tile(
    x_ptr,  # one head of x, [count, DH] with rows `stride_x` apart
    y_ptr,  # the same of y, perhaps in the same place
    weight_ptr,  # [DH] of a norm before the rotary embedding, or None
    cos_ptr,  # [count, R / 2], as sin
    sin_ptr,
    first,
    count,
    stride_x,
    stride_y,
    eps,
    offset,
    DH: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Rows first:first+ROWS turn, or turn back, PIECE of them at a time. Each thread writes other features than `load_tile` gives
    it: see to it that nobody reads before everybody has written."""
    for row in tl.range(first, first + ROWS, PIECE):
        rope_rows(
            *(row // PIECE, x_ptr, y_ptr, weight_ptr, cos_ptr, sin_ptr, count, stride_x, 0, stride_y, 1.0, eps, offset),
            *(1, DH, R, INTERLEAVED, BACK, PIECE, PAIRS),
        )


@jit
def set_to_zero(x_ptr, count, program, programs):
    """The share of one program, of `programs`, of the `count` (int64) numbers at x_ptr."""
    PIECE: tl.constexpr = 4096
    pieces = tl.cdiv(count, PIECE)
    for piece in tl.range(pieces * program // programs, pieces * (program + 1) // programs):
        first = tl.cast(piece, tl.int64) * PIECE
        index = tl.arange(0, PIECE)
        tl.store(x_ptr + first + index, tl.zeros((PIECE,), x_ptr.dtype.element_ty), mask=index < count - first)


@jit
def tanh(x):
    """tanh by the exponential function; near 0, where that would cancel, by the series."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))  # exp(-2 |x|)
    t = (1.0 - e) / (1.0 + e)
    y = x * x
    small = x * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    return tl.where(y < 0.0625, small, tl.where(x < 0, -t, t))


@jit
def kept(seed_ptr, head, i, key, dropout):
    """Which probabilities dropout keeps: a function of seed, head, query and key, so that every kernel draws the same."""
    zeros = i * 0 + key * 0
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), key + zeros, i + zeros, head + zeros, zeros)
    return tl.uint_to_uniform_float(bits) >= dropout
