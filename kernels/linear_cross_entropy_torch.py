"""linear_cross_entropy in plain PyTorch: what CPUs run, and GPUs without Triton.

The maths is in linear_cross_entropy.py. What makes it fast here:

- chunks are large. Each one, of R rows, reads and writes all of dW: 8 V D bytes against 6 R V D FLOPs;
- the exponentials are computed once, in fp32, a few rows at a time so that they stay in the cache; the result goes back
  over the logits in their own dtype, ready for the two matmuls of the backward;
- a CPU maps fresh memory page by page (60 ms for 113 MB was measured), so there the chunk of logits is kept from call to call.

PyTorch's CPU matmul has no fp32 output for bf16 inputs: each chunk's share of dW is rounded to bf16 once before it is
added to the fp32 sum. A GPU keeps it in fp32.
"""

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.kernels.linear import product_in_blocks, product_into, weight_as

CPU_CHUNK_ROWS, GPU_CHUNK_ROWS = 512, 4096  # rows of logits that exist at once


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


def _score(logits: Tensor, targets: Tensor, upstream: Tensor | None, bias: Tensor | None, o: Options, z, p):
    """Scores a few rows of logits [R, V] against targets [R]; z and p are wide buffers [R, V].

    upstream [R]: the gradient of each row's loss; the logits are then overwritten by the gradient of (W h + bias).
    Returns (loss, nll, correct, entropy) [4, R], with all_stats (..., mean_logit, log_sum_sq_probs) [6, R], and the gradient
    of the bias [V].
    """
    z.copy_(logits)
    if bias is not None:
        z.add_(bias)
    if o.logit_scale != 1:
        z.mul_(o.logit_scale)
    if o.softcap is not None:
        z.div_(o.softcap).tanh_().mul_(o.softcap)

    torch.softmax(z, -1, out=p)
    total = p.sum(-1)  # 1 but for the rounding of softmax's plain sum over the vocabulary, which this puts right
    highest = z.amax(-1)
    lse = highest - (p.amax(-1) / total).log()  # the largest probability is exp(highest - lse)
    target_logit = z.gather(1, targets[:, None])[:, 0]
    nll = lse - target_logit
    loss = nll
    mean_logit = z.mean(-1) if o.label_smoothing or o.all_stats else None
    if o.label_smoothing:
        loss = (1 - o.label_smoothing) * nll + o.label_smoothing * (lse - mean_logit)
    if o.z_loss:
        loss = loss + o.z_loss * lse.square()
    entropy = lse - torch.linalg.vecdot(p, z) / total if o.entropy else torch.zeros_like(lse)
    results = [loss, nll, (target_logit >= highest).to(lse.dtype), entropy]
    if o.all_stats:
        log_sum_sq_probs = torch.linalg.vecdot(p, p).log() - 2 * total.log()
        results += [mean_logit, log_sum_sq_probs.clamp(max=0)]  # above 0 by rounding only
    results = torch.stack(results)
    if upstream is None:
        return results, None

    g = upstream * o.logit_scale
    p.mul_((g * (1 + 2 * o.z_loss * lse) / total)[:, None])
    if o.label_smoothing:
        p.sub_((g * (o.label_smoothing / p.shape[1]))[:, None])
    p.scatter_add_(1, targets[:, None], (g * (o.label_smoothing - 1))[:, None])
    if o.softcap is not None:
        p.mul_(z.div_(o.softcap).square_().neg_().add_(1))
    logits.copy_(p)
    return results, None if bias is None else p.sum(0)


def run(hidden, weight, bias, rows, targets, upstream, needs, o: Options):
    """All rows, chunk by chunk.

    rows int64 [M], or None for all; targets int64 [M], where one below 0 makes the row count for nothing.
    upstream [M]: the gradient of each row's loss, or None for no gradients. needs: which of (hidden, weight, bias) want one.
    Returns results [4 or 6, M] as `_score`, and the three gradients (None where not needed) in the dtypes of their inputs.
    """
    M, V = len(targets), len(weight)
    if rows is None:
        rows = torch.arange(M, device=hidden.device)
    ignored, targets = targets < 0, targets.clamp(min=0)
    if upstream is not None:
        upstream = upstream.masked_fill(ignored, 0)
    d_hidden = torch.zeros_like(hidden, dtype=o.wide) if needs[0] else None
    d_weight = torch.empty_like(weight, dtype=o.wide) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=o.wide) if needs[2] else None
    results = hidden.new_empty(6 if o.all_stats else 4, M, dtype=o.wide)
    if M == 0 and d_weight is not None:
        d_weight.zero_()
    W = weight_as(weight, o.dtype)

    on_cpu = hidden.device.type == "cpu"
    num_chunks = max(1, math.ceil(M / (CPU_CHUNK_ROWS if on_cpu else GPU_CHUNK_ROWS)))
    R = max(1, math.ceil(M / num_chunks))  # all chunks alike
    r = min(R, 16 * torch.get_num_threads() if on_cpu else 1024)  # rows whose exponentials exist at once
    chunk = _buffer("logits", (R, V), hidden, o.dtype)
    z, p = _buffer("z", (r, V), hidden, o.wide), _buffer("p", (r, V), hidden, o.wide)

    for a in range(0, M, R):
        x = hidden.index_select(0, rows[a : a + R]).to(o.dtype)
        logits = torch.mm(x, W.T, out=chunk[: len(x)])
        for b in range(0, len(x), r):
            n = min(r, len(x) - b)
            some = slice(a + b, a + b + n)
            g = None if upstream is None else upstream[some]
            results[:, some], db = _score(logits[b : b + n], targets[some], g, bias, o, z[:n], p[:n])
            if d_bias is not None:
                d_bias += db
        if d_hidden is not None:
            d_hidden.index_add_(0, rows[a : a + R], torch.mm(logits, W).to(o.wide))
        if d_weight is not None:
            product = product_into if hidden.is_cuda else product_in_blocks
            product(d_weight, logits.T, x, add=a > 0)

    gradients = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias))
    return results.masked_fill_(ignored, 0), [None if d is None else d.to(like.dtype) for d, like in gradients]
