"""linear_cross_entropy in plain PyTorch: what CPUs run, and GPUs without Triton.

The maths is in linear_cross_entropy.py. What makes it fast here:

- chunks are large. Each one, of R rows, reads and writes all of dW: 8 V D bytes against 6 R V D FLOPs;
- the exponentials are computed once, in fp32, a few rows at a time so that they stay in the cache, by exp2, which takes PyTorch a
  third of the time of exp; the result goes back over the logits in their own dtype, ready for the two matmuls of the backward;
- chunks are whole tiles of rows, so that few shapes are multiplied. On a CPU oneDNN compiles code for each shape that it meets,
  and keeps it: with AMX 10 to 50 ms and 3 MB for a vocabulary of 49,152, and each step has another number of rows;
- a CPU maps fresh memory page by page (60 ms for 113 MB was measured where the heap is not kept as in a run), so there the chunk
  of logits is kept from call to call.

PyTorch's CPU matmul has no fp32 output for bf16 inputs: each chunk's share of dW is rounded to bf16 once before it is
added to the fp32 sum. A GPU keeps it in fp32.
"""

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.kernels.common import HAS_AMX
from minisft.kernels.copies import weight_as
from minisft.kernels.linear import product_in_blocks, product_into

CPU_CHUNK_ROWS, GPU_CHUNK_ROWS = 512, 4096  # rows of logits that exist at once
CPU_CHUNK_BYTES = 2**20 * 100  # twice as many rows on a CPU if they take no more than this
ROW_TILE = 32  # a chunk's rows are a multiple of it, or of two tiles where they are twice as many
AMX_DX_ROWS = 256  # of dx = dz W at once: with AMX oneDNN multiplies 512 rows by such a high W on one thread
CACHE_BYTES = 2**20 if HAS_AMX else 2**21  # of a thread's share of the exponentials and of what they are computed from
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype  # of the matmuls
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    entropy: bool
    all_stats: bool
    triton: bool

    @property
    def wide(self) -> torch.dtype:
        """The dtype of everything that is summed."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def product(self, x: Tensor) -> torch.dtype:
        """What a GPU's matmul puts out for the gradient of x: its own dtype, or fp32 which is cast later."""
        return x.dtype if x.dtype == self.dtype else self.wide


_kept = threading.local()


def _buffer(name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, on the CPU kept for this thread's next call; a GPU's allocator does so by itself."""
    if like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = getattr(_kept, name, None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):  # usable in training, even if the first call is an evaluation
            memory = torch.empty(size, dtype=torch.uint8)
        setattr(_kept, name, memory)
    return memory[:size].view(dtype).view(shape)


def _as_scored(z: Tensor, bias: Tensor | None, o: Options) -> Tensor:
    """softcap(logit_scale * (z + bias)), in place."""
    if bias is not None:
        z.add_(bias)
    if o.logit_scale != 1:
        z.mul_(o.logit_scale)
    if o.softcap is not None:
        z.div_(o.softcap).tanh_().mul_(o.softcap)
    return z


def _score(logits, targets, upstream, bias, d_bias, o: Options, z, p) -> Tensor:
    """Scores a chunk of logits [R, V] against targets [R], as many rows at a time as z and p have: wide buffers [r, V].

    upstream [R]: the gradient of each row's loss; the logits are then overwritten by the gradient of (W h + bias), and that of
    the bias is added to d_bias [V] unless it is None.
    Returns (loss, nll, correct, entropy) [4, R], with all_stats (..., mean_logit, log_sum_sq_probs) [6, R].
    """
    R, targets = len(logits), targets[:, None]
    highest, total, product, mean_logit, squares = z.new_zeros(5, R, 1)
    target_bias = None if bias is None else bias[targets]
    target_logit = _as_scored(logits.gather(1, targets).to(z.dtype), target_bias, o)
    rows = [logits, targets, highest, total, product, mean_logit, squares]
    if upstream is not None:
        g = upstream[:, None] * o.logit_scale
        rows += g, g * (o.label_smoothing - 1)
    for row, target, top, sum_e, sum_xe, mean, sum_ee, *gradient in zip(*(t.split(len(z)) for t in rows)):
        x, e = z[: len(row)], p[: len(row)]
        _as_scored(x.copy_(row), bias, o)
        torch.amax(x, -1, keepdim=True, out=top)
        if o.label_smoothing or o.all_stats:
            torch.mean(x, -1, keepdim=True, out=mean)
        x.sub_(top)
        torch.mul(x, LOG2_E, out=e).exp2_()
        torch.sum(e, -1, keepdim=True, out=sum_e)
        if o.entropy:  # only the slope of a soft cap needs x any longer
            torch.sum(x.mul_(e) if o.softcap is None else x * e, -1, keepdim=True, out=sum_xe)
        if o.all_stats:
            sum_ee.copy_(torch.linalg.vecdot(e, e)[:, None])
        if not gradient:
            continue

        g_rows, g_target = gradient
        factor = g_rows / sum_e
        if o.z_loss:
            factor.mul_(1 + 2 * o.z_loss * (top + sum_e.log()))
        e.mul_(factor)
        if o.label_smoothing:
            e.sub_(g_rows * (o.label_smoothing / e.shape[1]))
        e.scatter_add_(1, target, g_target)
        if o.softcap is not None:
            e.mul_(x.add_(top).div_(o.softcap).square_().neg_().add_(1))
        if d_bias is not None:
            d_bias += e.sum(0)
        row.copy_(e)

    lse = highest + total.log()
    nll = lse - target_logit
    loss = nll
    if o.label_smoothing:
        loss = (1 - o.label_smoothing) * nll + o.label_smoothing * (lse - mean_logit)
    if o.z_loss:
        loss = loss + o.z_loss * lse.square()
    entropy = total.log() - product / total if o.entropy else product
    results = [loss, nll, (target_logit >= highest).to(lse.dtype), entropy]
    if o.all_stats:
        log_sum_sq_probs = squares.log() - 2 * total.log()
        results += [mean_logit, log_sum_sq_probs.clamp(max=0)]  # above 0 by rounding only
    return torch.stack(results)[..., 0]


def run(hidden, weight, bias, rows, targets, upstream, needs, o: Options, d_weight: Tensor | None = None):
    """All rows, chunk by chunk.

    rows int64 [M], or None for all; targets int64 [M], where one below 0 makes the row count for nothing.
    upstream [M]: the gradient of each row's loss, or None for no gradients. needs: which of (hidden, weight, bias) want one.
    d_weight [V, D] wide: what the weight's gradient is added to, or None.
    Returns results [4 or 6, M] as `_score`, and the three gradients in the dtypes of their inputs: None where they are not needed
    or were added.
    """
    M, V = len(targets), len(weight)
    if rows is None:
        rows = torch.arange(M, device=hidden.device)
    ignored, targets = targets < 0, targets.clamp(min=0)
    if upstream is not None:
        upstream = upstream.masked_fill(ignored, 0)
    d_hidden = torch.zeros_like(hidden, dtype=o.wide) if needs[0] else None
    adds = d_weight is not None
    if needs[1] and not adds:
        d_weight = torch.empty_like(weight, dtype=o.wide)
    d_bias = torch.zeros_like(bias, dtype=o.wide) if needs[2] else None
    results = hidden.new_empty(6 if o.all_stats else 4, M, dtype=o.wide)
    if M == 0 and d_weight is not None and not adds:
        d_weight.zero_()
    W = weight_as(weight, o.dtype)

    on_cpu = hidden.device.type == "cpu"
    most_rows, tile = CPU_CHUNK_ROWS if on_cpu else GPU_CHUNK_ROWS, ROW_TILE
    if on_cpu and 2 * most_rows * V * o.dtype.itemsize <= CPU_CHUNK_BYTES:
        most_rows, tile = 2 * most_rows, 2 * tile
    num_chunks = max(1, math.ceil(M / most_rows))
    R = tile * max(1, math.ceil(M / num_chunks / tile))  # all chunks alike, but for the last
    dx_rows = AMX_DX_ROWS if on_cpu and HAS_AMX else R
    in_cache = torch.get_num_threads() * max(1, CACHE_BYTES // (2 * V * o.wide.itemsize))
    r = min(R, in_cache if on_cpu else 1024)  # rows whose exponentials exist at once
    chunk = _buffer("logits", (R, V), hidden, o.dtype)
    z, p = _buffer("z", (r, V), hidden, o.wide), _buffer("p", (r, V), hidden, o.wide)

    for a in range(0, M, R):
        some = slice(a, min(a + R, M))
        n = some.stop - a
        num_padded = tile * math.ceil(n / tile)
        x = hidden.new_zeros(num_padded, hidden.shape[1], dtype=o.dtype)
        x[:n] = hidden.index_select(0, rows[some])
        logits = torch.mm(x, W.T, out=chunk[:num_padded])
        g = None if upstream is None else upstream[some]
        results[:, some] = _score(logits[:n], targets[some], g, bias, d_bias, o, z, p)
        if d_hidden is not None:
            dx = torch.empty_like(x)
            for dz, some_dx in zip(logits.split(dx_rows), dx.split(dx_rows)):
                torch.mm(dz, W, out=some_dx)
            d_hidden.index_add_(0, rows[some], dx[:n].to(o.wide))
        if d_weight is not None:
            product = product_into if hidden.is_cuda else product_in_blocks
            product(d_weight, logits.T, x, add=adds or a > 0)

    gradients = zip((d_hidden, None if adds else d_weight, d_bias), (hidden, weight, bias))
    return results.masked_fill_(ignored, 0), [None if d is None else d.to(like.dtype) for d, like in gradients]
