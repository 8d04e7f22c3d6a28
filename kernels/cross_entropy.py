"""Cross-entropy of logits that already exist, with the shift done by index; and the kernel that every loss here runs on.

For the row of logits x that is scored against target t:

    z = scale (x + bias), then c tanh(z / c) under a softcap c
    lse = log sum_v exp(z_v)                         nll = lse - z_t
    loss = (1 - e) nll + e (lse - mean_v z_v) + z_loss * lse^2            e = label_smoothing

and backward, with p = exp(z - lse) and g the gradient of the row's loss:

    dz = g ((1 + 2 z_loss lse) p - e / V - (1 - e) onehot_t)              dx = scale (1 - (z / c)^2) dz

(bias and scale are `linear_cross_entropy`'s.)

The shift. A causal language model's row t predicts token t + 1, so the labels, which sit at their own token, are one off.
Most code copies the logits to shift them ([T, V], the largest tensor there is). Here the targets are shifted instead,
T integers; and where documents lie side by side, the last row of each is scored against nothing.

Saved for the backward: the logits (they exist anyway), the targets, and from the kernel two numbers a row. Naively the op
moves the logits through memory some ten times (to fp32, log-softmax, its gradient, back), with two fp32 copies alive.
Here: one read forward; one read and one write, of the gradient, backward. fp32 inside whatever the dtype: the soft-max,
lse, the losses, and p - 1 of the target, which is subtracted before anything is rounded.

The kernel. One program a row, in two passes that can be switched on separately:

- score: the soft-max's largest logit m and sum s = sum_v exp(z_v - m) in one read, although m is not known before the
  end: a sum that was begun with m_old is multiplied by exp(m_old - m_new) when a larger logit comes. Each thread does so
  for its own groups of 8 logits (16 bytes of bf16, one load), so the loop has one exponential a logit, one more a group,
  and never waits for other threads; the groups meet once, at the end. The statistics are sums of the same loop: the
  entropy log s - sum_v p_v (z_v - m) and, asked for separately, mean_v z_v and log sum_v p_v^2 =
  log sum_v exp(2 (z_v - m)) - 2 log s, where nothing overflows and the first sum is at least 1.
- gradient: needs only m and s of the row. It runs from right to left, because what was read last is the likeliest to be in
  the cache still, and it may write over the logits. `linear_cross_entropy` runs both passes at once in this way: a row of
  128,256 is 257 KB, and one on each multiprocessor of an H200 is 34 MB, which the L2 cache of 50 MB holds.

m and s rather than lse: at lse = 20 its rounding in fp32 is 1e-6, and would be the relative error of every p.

Odd vocabularies (50,257). Where rows follow each other without padding, most begin inside a group of 8 columns. A program
reads whole groups all the same, from the one that holds the row's first logit to the one that holds its last, and drops
what belongs to its neighbours; such a group lies in memory that is there. It writes whole groups too, and number by number
the two at the ends, which its neighbours write the rest of.

Limits: targets are checked on the CPU only (a check on a GPU would wait for it; in the kernel a target outside the
vocabulary makes the loss NaN); no second derivative. Of a tensor that itself begins inside such a group (a slice of
another), logits are read and written one at a time.

Online soft-max: Milakov and Gimelshein 2018, arXiv:1805.02867. Label smoothing: Szegedy et al. 2015, arXiv:1512.00567.
z-loss: PaLM, Chowdhery et al. 2022, arXiv:2204.02311. Softcap: Gemma 2, arXiv:2408.00118.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import (
    INTERPRETER,
    arch_of,
    as_rows,
    backend_for,
    check_documents,
    jit,
    once_differentiable,
    smallest_fit,
    tl,
)

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # stands for minus infinity, whose difference from itself would be NaN
GPU_ROWS = 1024  # the torch path: rows that are widened at once on a GPU; a CPU takes 8 a thread


def cross_entropy_ref(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The same function as `cross_entropy`, one document after the other, with PyTorch's own loss."""
    bounds = [0, len(logits)] if cu_seqlens is None else cu_seqlens.tolist()
    losses = []
    for start, end in zip(bounds, bounds[1:]):
        z, targets = logits[start:end], labels[start:end]
        z = z if z.dtype == torch.float64 else z.float()
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        if shift:
            targets = F.pad(targets, (0, 1), value=ignore_index)[1:]
        loss = F.cross_entropy(z, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
        losses.append(loss + z_loss * z.logsumexp(-1).square().where(targets != ignore_index, 0))
    losses = torch.cat(losses)
    if reduction == "none":
        return losses
    num_targets = (targets_of(labels, cu_seqlens, shift, ignore_index) != ignore_index).sum()
    return losses.sum() / (num_targets.clamp(min=1) if reduction == "mean" else 1)


@jit
def _tanh(x):
    """tanh x and its slope 1 - tanh^2, each to a few roundings, even where a difference of large numbers is small."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x  # near 0: the beginning of the continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...)))
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + square * 15.0))
    return tl.where(tl.abs(x) < 0.75, near, tl.where(x < 0, -far, far)), 4.0 * e / ((1.0 + e) * (1.0 + e))


@jit
def _load_logits(row_ptr, bias_ptr, place, column, mask, bias_mask, scale, softcap, POLICY: tl.constexpr):
    """Logits of one row as they are scored, fp32, and their softcap's slope. bias_ptr, scale, softcap: or None."""
    z = tl.load(row_ptr + place, mask=mask, other=float("nan"), eviction_policy=POLICY).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + column, mask=bias_mask, other=0.0).to(tl.float32)
    if scale is not None:
        z *= scale
    slope = 1.0
    if softcap is not None:
        z, slope = _tanh(z / softcap)
        z *= softcap
    return z, slope


@jit
def _gradient_of(z, slope, column, target, m, g, of_p, of_target, label_smoothing, softcap, V):
    """The gradient of the logits before bias and scale; 0 where g is, even if they are NaN."""
    d = tl.exp2((z - m) * LOG2E) * of_p
    if label_smoothing is not None:
        d -= g * label_smoothing / V
    d = tl.where(column == target, d - of_target, d)
    if softcap is not None:
        d *= slope
    return tl.where(g == 0.0, 0.0, d)


@jit
def _cross_entropy_kernel(
    logits_ptr,  # [R, V], rows stride_logits apart
    gradient_ptr,  # [R, V], rows stride_gradient apart; the logits themselves, another tensor, or None
    bias_ptr,  # [V] or None
    targets_ptr,  # int64 [R]
    upstream_ptr,  # fp32 [R]: the gradient of each row's loss, or None
    results_ptr,  # fp32 [6 or 8, R], see `score_rows`
    V,
    width,  # V, or more where rows are padded with memory that may be read and written
    stride_logits,
    stride_gradient,
    stride_results,
    ignore_index,
    scale,  # the floats: None where they change nothing
    softcap,
    label_smoothing,
    z_loss,
    SCORE: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALL_STATS: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. SCORE writes the results; with a gradient_ptr the gradient follows.

    EDGES: rows begin and end inside groups of 8 columns, those of logits and gradient alike; else width is a multiple of 8,
    or no group is read whole. `place` counts from the beginning of the row's first group.
    """
    KEEP: tl.constexpr = "evict_last" if SCORE and gradient_ptr is not None else "evict_first"
    row = tl.program_id(0).to(tl.int64)
    before = 0  # columns of the first group that belong to the row before
    if EDGES:
        before = (row * stride_logits % 8).to(tl.int32)
        logits_ptr += row * stride_logits // 8 * 8
    else:
        logits_ptr += row * stride_logits
    end = V + before
    results_ptr += row
    group = tl.arange(0, BLOCK // 8)[:, None] * 8
    block = group + tl.arange(0, 8)[None, :]
    target = tl.load(targets_ptr + row)
    scored = target != ignore_index

    if SCORE:
        highest = tl.full((BLOCK // 8,), LOWEST, tl.float32)  # of each group of 8 columns, over all blocks
        total = tl.zeros((BLOCK // 8,), tl.float32)  # of exp(z - highest)
        spread = tl.zeros((BLOCK // 8,), tl.float32)  # of exp(z - highest) (z - highest)
        plain = tl.zeros((BLOCK // 8,), tl.float32)  # of z
        squares = tl.zeros((BLOCK // 8,), tl.float32)  # of exp(z - highest)^2
        for first in range(0, tl.where(scored, end, 0), BLOCK):
            place = first + block
            column = place - before
            inside = (column >= 0) & (column < V) if EDGES else column < V
            mask = first + group < end if EDGES else column < width
            z, _ = _load_logits(logits_ptr, bias_ptr, place, column, mask, inside, scale, softcap, KEEP)
            if (label_smoothing is not None) or ALL_STATS:
                plain += tl.sum(tl.where(inside, z, 0.0), 1)
            z = tl.where(inside, z, LOWEST)
            new = tl.maximum(highest, tl.max(z, 1))
            shrink = tl.exp2((highest - new) * LOG2E)
            z -= new[:, None]
            e = tl.exp2(z * LOG2E)
            if ENTROPY:
                spread = shrink * (spread + (highest - new) * total) + tl.sum(e * z, 1)
            if ALL_STATS:
                squares = shrink * shrink * squares + tl.sum(e * e, 1)
            total = shrink * total + tl.sum(e, 1)
            highest = new
        m = tl.max(highest, 0)
        shrink = tl.exp2((highest - m) * LOG2E)
        s = tl.sum(shrink * total, 0)
        known = (target >= 0) & (target < V)
        z_target, _ = _load_logits(logits_ptr, bias_ptr, before + target, target, known, known, scale, softcap, KEEP)
        log_s = tl.log(s)
        nll = (m - z_target) + log_s
        loss = nll
        if label_smoothing is not None:
            loss += label_smoothing * (z_target - tl.sum(plain, 0) / V)
        if z_loss is not None:
            loss += z_loss * (m + log_s) * (m + log_s)
        entropy = 0.0
        if ENTROPY:
            entropy = log_s - tl.sum(shrink * (spread + (highest - m) * total), 0) / s
        tl.store(results_ptr, tl.where(scored, loss, 0.0))
        tl.store(results_ptr + stride_results, tl.where(scored, nll, 0.0))
        tl.store(results_ptr + 2 * stride_results, tl.where(scored & (z_target >= m), 1.0, 0.0))
        tl.store(results_ptr + 3 * stride_results, tl.where(scored, entropy, 0.0))
        tl.store(results_ptr + 4 * stride_results, m)
        tl.store(results_ptr + 5 * stride_results, s)
        if ALL_STATS:
            log_sum_sq_probs = tl.log(tl.sum(shrink * shrink * squares, 0)) - 2.0 * log_s
            log_sum_sq_probs = tl.where(log_sum_sq_probs > 0, 0.0, log_sum_sq_probs)  # by rounding; NaN stays
            tl.store(results_ptr + 6 * stride_results, tl.where(scored, tl.sum(plain, 0) / V, 0.0))
            tl.store(results_ptr + 7 * stride_results, tl.where(scored, log_sum_sq_probs, 0.0))

    if gradient_ptr is not None:
        if EDGES:
            gradient_ptr += row * stride_gradient // 8 * 8
        else:
            gradient_ptr += row * stride_gradient
        if SCORE:
            tl.debug_barrier()  # in place, nobody writes before everybody has read
        else:
            m = tl.load(results_ptr + 4 * stride_results)
            s = tl.load(results_ptr + 5 * stride_results)
        g = tl.where(scored, tl.load(upstream_ptr + row), 0.0)
        if scale is not None:
            g *= scale
        of_p = g / s
        of_target = g
        if z_loss is not None:
            of_p *= 1.0 + 2.0 * z_loss * (m + tl.log(s))
        if label_smoothing is not None:
            of_target -= g * label_smoothing
        last = (tl.cdiv(end, BLOCK) - 1) * BLOCK
        for first in range(0, last + BLOCK, BLOCK):
            place = last - first + block
            column = place - before
            mask = column < width
            if EDGES:
                mask = (last - first + group >= before) & (last - first + group + 8 <= end)
            read, of_bias = mask & (g != 0.0), (column < V) & (g != 0.0)
            z, slope = _load_logits(logits_ptr, bias_ptr, place, column, read, of_bias, scale, softcap, "evict_first")
            d = _gradient_of(z, slope, column, target, m, g, of_p, of_target, label_smoothing, softcap, V)
            tl.store(gradient_ptr + place, d.to(gradient_ptr.dtype.element_ty), mask=mask)
        if EDGES:  # the first group and the last, as far as they are not whole
            place = tl.arange(0, 16)
            place = tl.where(place < 8, place, (end - 1) // 8 * 8 + place - 8)
            column = place - before
            whole = (place // 8 * 8 >= before) & (place // 8 * 8 + 8 <= end)
            mask = (column >= 0) & (column < V) & (whole == 0)
            z, slope = _load_logits(logits_ptr, bias_ptr, place, column, mask, mask, scale, softcap, "evict_first")
            d = _gradient_of(z, slope, column, target, m, g, of_p, of_target, label_smoothing, softcap, V)
            tl.store(gradient_ptr + place, d.to(gradient_ptr.dtype.element_ty), mask=mask)


# By the passes that run and by the vocabulary: always 16 logits a thread, two loads of 16 bytes. Both passes of a long row
# have 32 warps, so that one or two rows are on each multiprocessor and what is in flight fits the L2 cache.
CONFIGS = {
    "_cross_entropy_kernel": {
        INTERPRETER: {2048: dict(BLOCK=64, num_warps=4), 2**31: dict(BLOCK=16384, num_warps=4)},
        "one pass": {2**31: dict(BLOCK=4096, num_warps=8)},
        "both passes": {32768: dict(BLOCK=4096, num_warps=8), 2**31: dict(BLOCK=16384, num_warps=32)},
    },
}


def score_rows(
    logits: Tensor,
    targets: Tensor,
    results: Tensor,
    *,
    upstream: Tensor | None = None,
    gradient: Tensor | None = None,
    score: bool = True,
    padding: int = 0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    entropy: bool = False,
    all_stats: bool = False,
) -> None:
    """Runs the kernel on the rows of logits [R, V], neighbours in a row side by side.

    results:  fp32 [6, R]: loss, nll, correct, entropy (0 if not asked for), largest logit, sum of exp(logit - largest);
              with all_stats [8, R]: mean logit and log of the sum of squared probabilities follow.
              Written, or with score=False read (rows 4 and 5). Where the target is ignore_index, all others are 0.
    bias:     [V], contiguous.
    gradient: [R, V], may be logits; gets the gradient of the logits from upstream fp32 [R], the gradient of each loss.
    padding:  elements behind each row, of logits and gradient alike, that may be read and overwritten.
    """
    R, V = logits.shape
    both = [logits] if gradient is None else [logits, gradient]
    whole = (V + padding) % 8 == 0 and all(x.stride(0) % 8 == 0 for x in both)
    edges = not whole and all(x.data_ptr() % (8 * x.element_size()) == 0 for x in both)
    edges = edges and (both[-1].stride(0) - logits.stride(0)) % 8 == 0
    passes = "both passes" if score and gradient is not None else "one pass"
    table = CONFIGS["_cross_entropy_kernel"][INTERPRETER if arch_of(logits) == INTERPRETER else passes]
    _cross_entropy_kernel[(R,)](
        *(logits, gradient, bias, targets, upstream, results, V, V + padding),
        *(logits.stride(0), 0 if gradient is None else gradient.stride(0), results.stride(0), ignore_index),
        *(None if scale == 1 else scale, softcap, label_smoothing or None, z_loss or None),
        SCORE=score,
        ENTROPY=entropy,
        ALL_STATS=all_stats,
        EDGES=edges,
        **smallest_fit(table, V),
    )


def targets_of(labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> Tensor:
    """labels [T] -> what each row of logits is scored against [T]."""
    if not shift:
        return labels
    targets = torch.full_like(labels, ignore_index)
    targets[:-1] = labels[1:]
    if cu_seqlens is not None and len(labels):
        targets[cu_seqlens[1:].long() - 1] = ignore_index
    return targets


class _CrossEntropy(torch.autograd.Function):
    """logits [T, V], targets [T] -> losses [T], wide (fp32, or fp64 for fp64 logits)."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, softcap, label_smoothing, z_loss):
        ctx.save_for_backward(logits, targets)
        ctx.options = ignore_index, softcap, label_smoothing, z_loss
        losses = torch.zeros(len(logits), dtype=_wide(logits), device=logits.device)
        for rows, z in _wide_rows(logits, targets, ignore_index, softcap):
            lse = z.logsumexp(-1)
            t = targets[rows].clamp(min=0)
            loss = (1 - label_smoothing) * (lse - z.gather(1, t[:, None])[:, 0]) + z_loss * lse.square()
            if label_smoothing:
                loss += label_smoothing * (lse - z.mean(-1))
            losses[rows] = loss
        return losses.where(targets != ignore_index, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses):
        logits, targets = ctx.saved_tensors
        ignore_index, softcap, label_smoothing, z_loss = ctx.options
        d_losses = d_losses.where(targets != ignore_index, 0)
        d_logits = torch.zeros_like(logits)
        for rows, z in _wide_rows(logits, targets, ignore_index, softcap):
            g, t = d_losses[rows][:, None], targets[rows].clamp(min=0)
            d = z.softmax(-1)
            d *= g * (1 + 2 * z_loss * z.logsumexp(-1, keepdim=True)) if z_loss else g
            if label_smoothing:
                d -= g * (label_smoothing / z.shape[1])
            d.scatter_add_(1, t[:, None], g * (label_smoothing - 1))
            if softcap is not None:
                d *= 1 - (z / softcap).square()
            d_logits[rows] = d.to(logits.dtype).where(g != 0, 0)
        return d_logits, None, None, None, None, None


class _CrossEntropyTriton(torch.autograd.Function):
    """logits [T, V], targets [T] -> losses fp32 [T]."""

    @staticmethod
    def forward(ctx, logits, targets, ignore_index, softcap, label_smoothing, z_loss):
        results = logits.new_empty(6, len(logits), dtype=torch.float32)
        ctx.options = dict(ignore_index=ignore_index, softcap=softcap, label_smoothing=label_smoothing, z_loss=z_loss)
        score_rows(logits, targets, results, **ctx.options)
        ctx.save_for_backward(logits, targets, results)
        return results[0].clone()  # the backward reads the results, so the caller gets a copy

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses):
        logits, targets, results = ctx.saved_tensors
        V = logits.shape[1]
        width = V + (logits.stride(0) - V) % 8  # rows begin in the same place of a group as those of the logits
        d_logits = logits.new_empty(len(logits), width)[:, :V]
        upstream = d_losses.contiguous()
        score_rows(logits, targets, results, upstream=upstream, gradient=d_logits, score=False, **ctx.options)
        return d_logits, None, None, None, None, None


def _wide(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _wide_rows(logits, targets, ignore_index, softcap):
    """Yields (rows, their capped logits in the wide dtype), a few rows at a time; on the CPU only rows with a target."""
    if logits.device.type == "cpu":
        scored = (targets != ignore_index).nonzero()[:, 0]
        blocks = scored.split(8 * torch.get_num_threads()) if len(scored) else ()
    else:
        blocks = [slice(a, a + GPU_ROWS) for a in range(0, len(logits), GPU_ROWS)]
    for rows in blocks:
        z = logits[rows].to(_wide(logits))
        yield rows, z if softcap is None else softcap * torch.tanh(z / softcap)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    shift: bool = True,
    ignore_index: int = -100,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of logits against labels, shifted inside each document.

    logits:     [T, V] floating.
    labels:     int64 [T] in [0, V), or ignore_index: not scored.
    cu_seqlens: int [N + 1], 0 first, T last: the documents of the row. None: all T tokens are one document.
    shift:      True: row t is scored against labels[t + 1], the last row of a document against nothing, as the labels of
                Hugging Face mean it. False: row t is scored against labels[t].
    softcap:    c > 0: logits become c tanh(logits / c).
    label_smoothing: in [0, 1): that share of the target is spread evenly over the vocabulary.
    z_loss:     adds z_loss * lse^2 to each row's loss.
    reduction:  "mean" over the scored rows, "sum", or "none": [T], 0 where a row is not scored.

    Returns fp32 (fp64 for fp64 logits). Where no row is scored, mean and sum are 0 and the gradient is zero, not NaN.
    Raises ValueError for shapes that do not fit, options out of range and, on the CPU, labels outside the vocabulary (on a
    GPU the kernel makes their loss NaN).
    """
    _check(logits, labels, cu_seqlens, ignore_index, softcap, label_smoothing, reduction)
    backend = backend_for("cross_entropy", logits)
    if backend == "reference":
        return cross_entropy_ref(
            logits,
            labels,
            cu_seqlens=cu_seqlens,
            shift=shift,
            ignore_index=ignore_index,
            softcap=softcap,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            reduction=reduction,
        )
    targets = targets_of(labels, cu_seqlens, shift, ignore_index)
    if backend == "triton":
        losses = _CrossEntropyTriton.apply(
            as_rows(logits), targets.contiguous(), ignore_index, softcap, label_smoothing, z_loss
        )
    else:
        losses = _CrossEntropy.apply(logits, targets, ignore_index, softcap, label_smoothing, z_loss)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (targets != ignore_index).sum().clamp(min=1)


def _check(logits, labels, cu_seqlens, ignore_index, softcap, label_smoothing, reduction) -> None:
    """Raises ValueError for arguments that do not fit together."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {labels.dtype} {tuple(labels.shape)}: expected [T, V] and int64 [T]"
        )
    T, V = logits.shape
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap}: expected more than 0, or None")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing {label_smoothing}: expected at least 0 and less than 1")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction {reduction!r}: expected 'mean', 'sum' or 'none'")
    check_documents(cu_seqlens, T)
    if logits.device.type == "cpu":
        bad = labels[((labels < 0) & (labels != ignore_index)) | (labels >= V)]
        bad = bad[bad != ignore_index]
        if len(bad):
            raise ValueError(f"label {bad[0]} is outside the vocabulary of {V} (and is not {ignore_index})")
