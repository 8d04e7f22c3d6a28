"""Cross-entropy straight from the hidden states, without the matrix of logits.

The last layer of a language model multiplies T hidden states [T, D] with the vocabulary's matrix [V, D] and scores every
row of logits against one target. The logits are by far the largest tensor of a training step: 8192 tokens of a
vocabulary of 151,936 are 2.5 GB in bf16, and a naive loss keeps two or three copies of them, some in fp32. This op never
has more than one chunk of rows, and computes the gradients while it has them.

Forward, for the row i that is scored against target t:

    z = softcap(logit_scale * (W h_i + bias))        softcap(x) = c tanh(x / c)
    lse = log sum_v exp(z_v)                         nll = lse - z_t
    loss_i = (1 - e) nll + e (lse - mean_v z_v) + z_loss * lse^2          e = label_smoothing

Backward, with p = exp(z - lse) and g_i = the gradient of loss_i (row weight x grad_scale):

    dz = g_i ((1 + 2 z_loss lse) p - e / V - (1 - e) onehot_t), times (1 - (z / c)^2) under a softcap
    dh_i = logit_scale W^T dz        dW = logit_scale sum_i dz h_i^T        dbias = logit_scale sum_i dz

Nothing in dz waits for what comes after the loss except one scalar, the gradient of the summed loss. So the forward pass
computes dh and dW at once, three matmuls a chunk and no recomputation, and the backward pass only hands them out. With
reduction="none" every row has a gradient of its own which is unknown yet: there the backward recomputes the logits.

What makes it fast:

- rows that train nothing are never multiplied (of a chat data set that is often two thirds of them);
- chunks are large. Each one, of R rows, reads and writes all of dW: 8 V D bytes against 6 R V D FLOPs. With 128 rows
  that traffic takes a GPU longer than the matmuls (an H200 does some 180 FLOPs in the time of a byte);
- the exponentials are computed once, in fp32, a few rows at a time so that they stay in the cache; the result goes back
  over the logits in their own dtype, ready for the two matmuls of the backward;
- a CPU maps fresh memory page by page (60 ms for 113 MB was measured), so there the chunk of logits and the copy of W in
  the matmul's dtype are kept from call to call.

What is fp32 whatever the dtype: the soft-max, lse, the loss, the statistics, (p - 1) of the target, the scaling by
grad_scale, and the sums over chunks of dW, dh and dbias. A GPU also keeps each chunk's product in fp32. PyTorch's CPU
matmul has no fp32 output for bf16 inputs: there each chunk's share of dW is rounded to bf16 once before it is added.

Memory besides inputs and gradients: one chunk of logits [R, V], W in the matmul's dtype if it is not so already.
Limits: targets and rows are checked on the CPU only (a check on a GPU would wait for it); no second derivative.

After "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024, arXiv:2411.09009), which recomputes
instead; gradients in the forward as in "Liger Kernel" (Hsu et al. 2024, arXiv:2410.10989); label smoothing of Szegedy et
al. (2015, arXiv:1512.00567); z-loss of PaLM (Chowdhery et al. 2022, arXiv:2204.02311).
"""

import math
import threading
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import backend_for

IGNORE_INDEX = -100
CPU_CHUNK_ROWS, GPU_CHUNK_ROWS = 512, 4096  # rows of logits that exist at once
WEIGHT_BLOCK = 2048  # rows of dW that a CPU multiplies and adds while they are in its cache


class Stats(NamedTuple):
    """What the rows did, detached; fp32 [M] each, 0 where the target is ignored."""

    nll: Tensor  # -log p(target), without smoothing, z-loss and weights
    correct: Tensor  # 1 where no logit is above the target's
    entropy: Tensor  # of the predicted distribution, in nats


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "sum",
    return_stats: bool = False,
):
    """The same function as `linear_cross_entropy`, written down as it reads; materialises the logits [M, V]."""
    x = hidden if rows is None else hidden[rows]
    logits = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)

    scored = targets != IGNORE_INDEX
    lse = z.logsumexp(-1)
    target_logit = z.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    nll = lse - target_logit
    loss = (1 - label_smoothing) * nll + label_smoothing * (lse - z.mean(-1)) + z_loss * lse.square()
    if row_weights is not None:
        loss = loss * row_weights
    loss = loss.where(scored, 0)
    if reduction == "sum":
        loss = loss.sum()
    if grad_scale is not None:  # the value stays, the gradient is scaled
        scaled = loss * grad_scale
        loss = loss.detach() + (scaled - scaled.detach())
    if not return_stats:
        return loss
    with torch.no_grad():
        entropy = lse - (z.softmax(-1) * z).sum(-1)
        correct = (target_logit >= z.amax(-1)).to(z.dtype)
        return loss, Stats(*(s.detach().where(scored, 0).float() for s in (nll, correct, entropy)))


@dataclass(frozen=True)
class _Options:
    dtype: torch.dtype  # of the matmuls
    softcap: float | None
    logit_scale: float
    label_smoothing: float
    z_loss: float
    entropy: bool

    @property
    def wide(self) -> torch.dtype:
        """The dtype of everything that is summed."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32


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


def _score(logits: Tensor, targets: Tensor, upstream: Tensor | None, bias: Tensor | None, o: _Options, z, p):
    """Scores a few rows of logits [R, V] against targets [R]; z and p are wide buffers [R, V].

    upstream [R]: the gradient of each row's loss; the logits are then overwritten by the gradient of (W h + bias).
    Returns (loss, nll, correct, entropy) [4, R] and the gradient of the bias [V].
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
    if o.label_smoothing:
        loss = (1 - o.label_smoothing) * nll + o.label_smoothing * (lse - z.mean(-1))
    if o.z_loss:
        loss = loss + o.z_loss * lse.square()
    entropy = lse - torch.linalg.vecdot(p, z) / total if o.entropy else torch.zeros_like(lse)
    results = torch.stack([loss, nll, (target_logit >= highest).to(lse.dtype), entropy])
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


def _add_weight_gradient(d_weight: Tensor, dz: Tensor, x: Tensor, first: bool) -> None:
    """d_weight [V, D] += dz [R, V]^T x [R, D]; the first chunk finds d_weight uninitialised."""
    if dz.dtype == d_weight.dtype:
        d_weight.addmm_(dz.T, x, beta=0 if first else 1)
    elif dz.is_cuda:
        if first:
            d_weight.zero_()
        torch.addmm(d_weight, dz.T, x, out_dtype=d_weight.dtype, out=d_weight)
    else:  # in blocks of the vocabulary: faster than one large matmul, and the sum is done in the cache
        for v in range(0, len(d_weight), WEIGHT_BLOCK):
            block = d_weight[v : v + WEIGHT_BLOCK]
            product = torch.mm(dz[:, v : v + WEIGHT_BLOCK].T, x)
            if first:
                block.copy_(product)
            else:
                block.add_(product.to(d_weight.dtype))


def _run(hidden, weight, bias, rows, targets, upstream, needs, o: _Options):
    """All rows, chunk by chunk.

    upstream [M]: the gradient of each row's loss, or None for no gradients. needs: which of (hidden, weight, bias) want one.
    Returns results [4, M] as `_score`, and the three gradients (None where not needed) in the dtypes of their inputs.
    """
    M, V = len(rows), len(weight)
    d_hidden = torch.zeros_like(hidden, dtype=o.wide) if needs[0] else None
    d_weight = torch.empty_like(weight, dtype=o.wide) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=o.wide) if needs[2] else None
    results = hidden.new_empty(4, M, dtype=o.wide)
    if M == 0 and d_weight is not None:
        d_weight.zero_()
    W = weight if weight.dtype == o.dtype else _buffer("weight", weight.shape, weight, o.dtype).copy_(weight)

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
            _add_weight_gradient(d_weight, logits, x, first=a == 0)

    gradients = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias))
    return results, [None if d is None else d.to(like.dtype) for d, like in gradients]


class _LinearCrossEntropySum(torch.autograd.Function):
    """-> weighted sum of the losses, results [4, M]. The gradients are ready when the forward ends."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, row_weights, grad_scale, needs, o):
        upstream = (row_weights * grad_scale).to(o.wide) if any(needs) else None
        results, gradients = _run(hidden, weight, bias, rows, targets, upstream, needs, o)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(results)
        return (results[0] * row_weights).sum(), results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        gradients = ctx.saved_tensors  # autograd lets go of them after this, and .grad takes the memory over
        if not (d_loss.device.type == "cpu" and d_loss == 1):  # a GPU multiplies rather than wait for the value
            gradients = [None if d is None else d * d_loss for d in gradients]
        return *gradients, None, None, None, None, None, None


class _LinearCrossEntropyRows(torch.autograd.Function):
    """-> weighted losses [M], results [4, M]. Each row's gradient comes later: the backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, row_weights, grad_scale, needs, o):
        results, _ = _run(hidden, weight, bias, rows, targets, None, (False, False, False), o)
        ctx.save_for_backward(hidden, weight, bias, rows, targets, row_weights)
        ctx.grad_scale, ctx.needs, ctx.options = grad_scale, needs, o
        ctx.mark_non_differentiable(results)
        return results[0] * row_weights, results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_losses, _):
        *tensors, row_weights = ctx.saved_tensors
        upstream = d_losses * (row_weights * ctx.grad_scale)
        with torch.autocast(d_losses.device.type, enabled=False):
            _, gradients = _run(*tensors, upstream, ctx.needs, ctx.options)
        return *gradients, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    row_weights: Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "sum",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy of the logits softcap(logit_scale * (hidden W^T + bias)) without materialising them.

    hidden:       [T, D] floating.
    weight:       [V, D] floating. It may be wider than hidden (fp32 master weights); the matmuls run in the dtype of hidden,
                  or of autocast where that is on, the gradient is summed in fp32 and comes back in the dtype of weight.
    targets:      int64 [M] in [0, V), or -100: the row is ignored.
    rows:         int64 [M] in [0, T): targets[i] is scored against hidden[rows[i]]; a row may occur more than once.
                  None: M = T, all rows in order.
    row_weights:  [M], constants that multiply the rows' losses. None: 1.
    grad_scale:   a float or a 0-d tensor that multiplies the gradients, in fp32 before any rounding, and not the value.
    bias:         [V].
    softcap:      c > 0: logits become c tanh(logits / c), as in Gemma 2.
    label_smoothing: in [0, 1): that share of the target is spread evenly over the vocabulary.
    z_loss:       adds z_loss * lse^2 to each row's loss.
    reduction:    "sum": the weighted sum over the rows, a scalar; gradients are computed in the forward.
                  "none": the weighted losses [M]; gradients are recomputed in the backward.
    return_stats: also return `Stats`.

    Returns the loss in fp32 (fp64 for fp64 inputs); with return_stats, (loss, Stats). Inputs that do not require a
    gradient cost nothing. Without any row to score the loss is 0 and the gradients are zeros.
    Raises ValueError for shapes that do not fit, options out of range and, on the CPU, targets or rows out of range.
    """
    _check(hidden, weight, targets, rows, row_weights, bias, softcap, label_smoothing, reduction)
    if backend_for("linear_cross_entropy", hidden) == "reference":
        return linear_cross_entropy_ref(
            hidden,
            weight,
            targets,
            rows=rows,
            row_weights=row_weights,
            grad_scale=grad_scale,
            bias=bias,
            softcap=softcap,
            logit_scale=logit_scale,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
            return_stats=return_stats,
        )

    device, M = hidden.device.type, len(targets)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    o = _Options(dtype, softcap, logit_scale, label_smoothing, z_loss, entropy=return_stats)
    if rows is None:
        rows = torch.arange(M, device=hidden.device)
    if row_weights is None:
        row_weights = torch.ones(M, device=hidden.device)
    row_weights = row_weights.detach().to(o.wide)

    scored, keep = targets != IGNORE_INDEX, None
    if device != "cpu":  # to drop rows here would wait for the GPU: their weight becomes 0
        targets, row_weights = targets.clamp(min=0), row_weights.where(scored, 0)
    elif not scored.all():
        keep = scored.nonzero()[:, 0]
        rows, targets, row_weights = rows[keep], targets[keep], row_weights[keep]

    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    function = _LinearCrossEntropySum if reduction == "sum" else _LinearCrossEntropyRows
    with torch.autocast(device, enabled=False):
        scale = 1.0 if grad_scale is None else grad_scale
        loss, results = function.apply(hidden, weight, bias, rows, targets, row_weights, scale, needs, o)

    if keep is not None:  # back to [M]
        results = results.new_zeros(4, M).index_copy(1, keep, results)
        if reduction == "none":
            loss = loss.new_zeros(M).index_copy(0, keep, loss)
    if not return_stats:
        return loss
    return loss, Stats(*results[1:].where(scored, 0).float())


def shifted_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, **options
) -> Tensor | tuple[Tensor, Stats]:
    """`linear_cross_entropy` of labels as Hugging Face has them: hidden[t] predicts labels[t + 1] of its own document.

    labels: int64 [T], -100 = not trained. cu_seqlens: int [N + 1], 0 first, T last; None: all T tokens are one document.
    options: as `linear_cross_entropy` but for rows; row_weights, a loss with reduction="none" and the statistics are [T],
    indexed by the row that predicts. The last row of a document predicts nothing.
    Raises ValueError as `linear_cross_entropy`, and for labels or cu_seqlens that do not cover the T rows of hidden.
    """
    T = len(hidden)
    if labels.shape != (T,):
        raise ValueError(f"labels {tuple(labels.shape)}: expected ({T},), one a row of hidden {tuple(hidden.shape)}")
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu" and (cu_seqlens[0] != 0 or cu_seqlens[-1] != T):
        raise ValueError(f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}: expected 0 to {T}")
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:-1] = labels[1:]
    if cu_seqlens is not None:
        targets[cu_seqlens[1:].long() - 1] = IGNORE_INDEX
    return linear_cross_entropy(hidden, weight, targets, **options)


def _check(hidden, weight, targets, rows, row_weights, bias, softcap, label_smoothing, reduction) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected [T, D] and [V, D]")
    (T, _), V, M = hidden.shape, len(weight), targets.numel()
    if targets.shape != (M,) or targets.dtype != torch.int64:
        raise ValueError(f"targets {targets.dtype} {tuple(targets.shape)}: expected int64 [M]")
    if rows is None and M != T:
        raise ValueError(f"{M} targets for {T} rows of hidden: give `rows`, or one target a row")
    for name, x, size in (("rows", rows, M), ("row_weights", row_weights, M), ("bias", bias, V)):
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} {tuple(x.shape)}: expected ({size},)")
    if rows is not None and rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows {rows.dtype}: expected int64")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap}: expected more than 0, or None")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing {label_smoothing}: expected at least 0 and less than 1")
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction {reduction!r}: expected 'sum' or 'none'")
    if hidden.device.type == "cpu" and M > 0:
        bad = targets[((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= V)]
        if len(bad):
            raise ValueError(f"target {bad[0]} is outside the vocabulary of {V} (and is not {IGNORE_INDEX})")
        if rows is not None and (rows.min() < 0 or rows.max() >= T):
            raise ValueError(f"rows from {rows.min()} to {rows.max()}: hidden has {T} rows")
