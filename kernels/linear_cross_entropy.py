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

- rows that train nothing are never multiplied (often two thirds of a chat data set): `rows` lists the others, and the host
  makes that list without waiting for the GPU;
- chunks are large. Each one, of R rows, reads and writes all of dW: 8 V D bytes against 6 R V D FLOPs. An H200 does some
  180 FLOPs in the time of a byte: with 4096 rows that traffic adds 6 % to the matmuls, with 128 rows it doubles and
  triples them;
- the memory for one depends on T and V and not on how many rows are trained, so that a run allocates the same in every step. The
  rows that are trained are spread evenly over as few chunks as there can be: a small last one would have few tiles for many
  multiprocessors, and below some 370 rows its traffic would take longer than its FLOPs (a chunk reads W twice and reads and
  writes dW, 12 V D bytes);
- the matrix products are cuBLAS's, written directly to their destination. Rows of logits are padded to a multiple of 128 bytes,
  so that an odd vocabulary (50,257) reads and writes as fast as an even one;
- between them one kernel (`score_rows` of cross_entropy.py) reads a chunk of logits and writes its gradient in its place.

Bytes moved beside the matmuls, M 4096, D 4096, V 128,256 in bf16: one read and one write of the logits, 2.1 GB, half a
millisecond at 4.3 TB/s where the three matmuls take 16.4 ms at 788 TFLOP/s. Losses that keep the logits move them ten times.

dW. A single chunk is multiplied straight into the gradient's dtype. Several are added up in fp32 by the matmuls
themselves; that sum is the gradient of an fp32 master weight, and is cast once for another.
dh. A row of hidden may be scored several times and most are not scored at all. Each scored row's share is a row of one
product; sorted by owner, the shares of one row are neighbours, and a kernel adds them in fp32 and writes every row of dh
once: no atomics, so the result repeats bitwise, and no fp32 buffer. Without `rows` the product is dh.
The gradient that comes from above is nearly always 1, but only the GPU knows. A kernel checks, and scales dh and dW in place
only if it is not 1.

Statistics. The kernel that reads a row of logits can compute more than its loss. On request (`Stats`): nll, whether the
target is the largest logit, the entropy; with "all" also two that preference tuning needs, mean_v z_v and

    log sum_v p_v^2 = log sum_v exp(2 (z_v - m)) - 2 log sum_v exp(z_v - m)        m = max_v z_v

in [-log V, 0]: the logarithm of the probability that a word drawn from p has on average, by which WPO measures how much an
answer is the policy's own. Both sums have terms up to 1 and contain a 1, so the result is exact to fp32's rounding for flat
and for peaked rows alike.

What is fp32 whatever the dtype: the soft-max, lse, the loss, the statistics, (p - 1) of the target, the scaling by
grad_scale, and the sums over chunks of dW, dh and dbias (dbias adds up dz as rounded for the matmuls).

Memory besides inputs and gradients: one chunk of logits, 1.25 GB or 4096 rows whichever is more, of T rows if these are
fewer; where the weight is not fp32, the sum of dW in fp32, or its bytes in more logits if one chunk is then enough; the shares
of dh [M, D] with `rows`; W in the matmul's dtype if it is not so already. CPUs, and GPUs without Triton, run
linear_cross_entropy_torch.py.
Limits: targets and rows are checked where they are on the CPU (a check on a GPU would wait for it); no second derivative.

After "Cut Your Losses in Large-Vocabulary Language Models" (Wijmans et al. 2024, arXiv:2411.09009), which recomputes
instead; gradients in the forward as in "Liger Kernel" (Hsu et al. 2024, arXiv:2410.10989); label smoothing of Szegedy et
al. (2015, arXiv:1512.00567); z-loss of PaLM (Chowdhery et al. 2022, arXiv:2204.02311); WPO, equation 2 (Zhou et al. 2024,
arXiv:2406.11827).
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import backend_for, cdiv, check_documents, jit, num_sms, once_differentiable, tl
from minisft.kernels.copies import weight_as
from minisft.kernels.cross_entropy import score_rows, targets_of
from minisft.kernels.linear import product_into
from minisft.kernels.linear_cross_entropy_torch import Options
from minisft.kernels.linear_cross_entropy_torch import run as run_torch

IGNORE_INDEX = -100
LEAST_CHUNK_ROWS, CHUNK_BYTES = 4096, 1_250_000_000  # the logits that exist at once: whichever is more
ROW_TILE = 128  # chunks are multiples of the matmul's tiles
ROW_ALIGNMENT = 64  # every row of logits begins at a multiple of 128 bytes, whatever the vocabulary


class Stats(NamedTuple):
    """Statistics of the rows, detached; fp32 [M] each, 0 where the target is ignored."""

    nll: Tensor  # -log p(target), without smoothing, z-loss and weights
    correct: Tensor  # 1 where no logit is above the target's
    entropy: Tensor  # of the predicted distribution, in nats
    mean_logit: Tensor | None = None  # over the vocabulary, of the logits as they are scored; with return_stats="all"
    log_sum_sq_probs: Tensor | None = None  # log sum_v p_v^2, in [-log V, 0]; with return_stats="all"


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
    return_stats: bool | Literal["all"] = False,
):
    """The same function as `linear_cross_entropy`, written from the formulas; materialises the logits [M, V]."""
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
        stats = [nll, (target_logit >= z.amax(-1)).to(z.dtype), entropy]
        if return_stats == "all":
            stats += [z.mean(-1), (2 * (z - lse[:, None])).logsumexp(-1)]  # log p = z - lse
        return loss, Stats(*(s.detach().where(scored, 0).float() for s in stats))


@jit
def _sum_rows_kernel(
    parts_ptr,  # [M, D]
    order_ptr,  # int64 [M]: the parts, sorted by the row that they belong to
    first_ptr,  # int64 [T + 1]: row t owns order[first[t] : first[t + 1]]
    sums_ptr,  # [T, D]
    D,
    BLOCK: tl.constexpr,
):
    """sums[t] = the sum of the parts of row t, always in the same order. A block of columns of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(first_ptr + row), tl.load(first_ptr + row + 1)):
        part_ptr = parts_ptr + tl.load(order_ptr + i) * D
        total += tl.load(part_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row * D + column, total.to(sums_ptr.dtype.element_ty), mask=column < D)


@jit
def _scale_kernel(
    x_ptr,  # [n], scaled in place
    factor_ptr,  # a number on the device, which the host does not know
    n,
    BLOCK: tl.constexpr,
):
    """x *= factor. A few programs walk over all of x; where the factor is 1, as it nearly always is, they end at once."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
            i = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32) * factor
            tl.store(x_ptr + i, x.to(x_ptr.dtype.element_ty), mask=i < n)


CONFIGS = {
    "_sum_rows_kernel": dict(BLOCK=1024, num_warps=4),
    "_scale_kernel": dict(BLOCK=4096, num_warps=8),
}


def most_rows(T: int, width: int, itemsize: int, sum_bytes: int) -> int:
    """How many rows of logits may exist at once. sum_bytes: of the fp32 sum of dW that several chunks need and one does not."""
    all_rows = max(1, cdiv(T, ROW_TILE) * ROW_TILE)
    if all_rows * width * itemsize <= CHUNK_BYTES + sum_bytes:
        return all_rows
    return min(all_rows, max(LEAST_CHUNK_ROWS, CHUNK_BYTES // (width * itemsize) // ROW_TILE * ROW_TILE))


def _run(hidden, weight, bias, rows, targets, upstream, needs, o: Options, grad: None = None):
    """All rows, chunk by chunk. Arguments and gradients as those of the torch path's `run`, results of `score_rows`."""
    (T, D), M, V = hidden.shape, len(targets), len(weight)
    width = cdiv(V, ROW_ALIGNMENT) * ROW_ALIGNMENT
    has_narrow_gradient = needs[1] and o.product(weight) != o.wide
    most = most_rows(T, width, o.dtype.itemsize, sum_bytes=4 * V * D if has_narrow_gradient else 0)
    chunk = hidden.new_empty(most, width, dtype=o.dtype)
    num_chunks = max(1, cdiv(M, most))
    R = max(1, min(most, cdiv(cdiv(M, num_chunks), ROW_TILE) * ROW_TILE))  # of each; the last one has what is left
    results = hidden.new_empty(8 if o.all_stats else 6, M, dtype=torch.float32)
    d_rows = hidden.new_empty(M, D, dtype=o.product(hidden)) if needs[0] else None
    d_weight = weight.new_empty(V, D, dtype=o.product(weight) if M <= R else o.wide) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs[2] else None
    if M == 0 and d_weight is not None:
        d_weight.zero_()
    W = weight_as(weight, o.dtype)
    adjacent_bias = None if bias is None else bias.contiguous()

    for a in range(0, M, R):
        some = slice(a, a + R)
        x = (hidden[some] if rows is None else hidden.index_select(0, rows[some])).to(o.dtype)
        logits = chunk[: len(x), :V]
        torch.mm(x, W.T, out=logits)
        score_rows(
            *(logits, targets[some], results[:, some]),
            upstream=None if upstream is None else upstream[some],
            gradient=None if upstream is None else logits,
            padding=width - V,
            bias=adjacent_bias,
            ignore_index=IGNORE_INDEX,
            scale=o.logit_scale,
            softcap=o.softcap,
            label_smoothing=o.label_smoothing,
            z_loss=o.z_loss,
            entropy=o.entropy,
            all_stats=o.all_stats,
        )
        if d_rows is not None:
            product_into(d_rows[some], logits, W)
        if d_weight is not None:
            product_into(d_weight, logits.T, x, add=a > 0)
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=torch.float32)

    d_hidden = d_rows
    if d_rows is not None and rows is not None:
        d_hidden = hidden.new_empty(T, D)
        owner, order = rows.masked_fill(targets == IGNORE_INDEX, T).sort(stable=True)  # ignored rows belong to nobody
        first = torch.searchsorted(owner, torch.arange(T + 1, dtype=rows.dtype, device=rows.device))
        config = CONFIGS["_sum_rows_kernel"]
        _sum_rows_kernel[(T, cdiv(D, config["BLOCK"]))](d_rows, order, first, d_hidden, D, **config)
    gradients = zip((d_hidden, d_weight, d_bias), (hidden, weight, bias))
    return results, [None if d is None else d.to(like.dtype) for d, like in gradients]


def _scaled(gradients, d_loss: Tensor, o: Options) -> list[Tensor | None]:
    """The gradients times d_loss, which is nearly always 1, without waiting for a GPU to say so.

    They are the largest tensors of the op and become .grad as they are, so they are scaled where they lie; unless the
    graph is kept for another backward, which will need them as they were.
    """
    if not o.triton:
        known_to_be_1 = d_loss.device.type == "cpu" and d_loss == 1
        return list(gradients) if known_to_be_1 else [None if d is None else d * d_loss for d in gradients]
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return [None if d is None else d * d_loss for d in gradients]
    config = CONFIGS["_scale_kernel"]
    for d in gradients:
        if d is not None:
            programs = min(cdiv(d.numel(), config["BLOCK"]), 8 * num_sms(d))
            _scale_kernel[(programs,)](d, d_loss, d.numel(), **config)
    return list(gradients)


def _hand_over(gradients, owner: Tensor | None) -> list[Tensor | None]:
    """What autograd gets of the gradients of (hidden, weight, bias). owner: None, or the weight, which gets its own at once."""
    d_hidden, d_weight, d_bias = gradients
    if owner is None or d_weight is None:
        return [d_hidden, d_weight, d_bias]
    owner.grad = d_weight if owner.grad is None else owner.grad.add_(d_weight)
    return [d_hidden, None, d_bias]


class _LinearCrossEntropySum(torch.autograd.Function):
    """-> weighted sum of the losses, results [4 to 8, M]. The gradients are ready when the forward ends, that of the weight in
    `grad` unless it is None."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, row_weights, grad_scale, needs, o, grad, owner):
        upstream = (row_weights * grad_scale).to(o.wide) if any(needs) else None
        run = _run if o.triton else run_torch
        results, gradients = run(hidden, weight, bias, rows, targets, upstream, needs, o, grad)
        inputs = () if grad is None else (hidden, weight, bias, rows, targets, upstream)
        ctx.save_for_backward(*gradients, *inputs)
        ctx.options, ctx.grad, ctx.owner = o, grad, owner
        ctx.mark_non_differentiable(results)
        return (results[0] * row_weights).sum(), results

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, _):
        saved = ctx.saved_tensors  # autograd lets go of the gradients among them, .grad takes them over
        if ctx.grad is not None and d_loss != 1:  # rare: the rest of the weight's gradient is computed again
            *inputs, upstream = saved[3:]
            run_torch(*inputs, (d_loss - 1) * upstream, (False, True, False), ctx.options, ctx.grad)
        return *_hand_over(_scaled(saved[:3], d_loss, ctx.options), ctx.owner), *[None] * 8


class _LinearCrossEntropyRows(torch.autograd.Function):
    """-> weighted losses [M], results [4 to 8, M]. Each row's gradient comes later: the backward computes the logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, targets, row_weights, grad_scale, needs, o, grad, owner):
        run = _run if o.triton else run_torch
        results, _ = run(hidden, weight, bias, rows, targets, None, (False, False, False), o)
        ctx.save_for_backward(hidden, weight, bias, rows, targets, row_weights)
        ctx.grad_scale, ctx.needs, ctx.grad, ctx.owner = grad_scale, needs, grad, owner
        ctx.options = replace(o, entropy=False, all_stats=False)  # the backward has no use for them
        ctx.mark_non_differentiable(results)
        return results[0] * row_weights, results

    @staticmethod
    @once_differentiable
    def backward(ctx, d_losses, _):
        *tensors, row_weights = ctx.saved_tensors
        upstream = d_losses * (row_weights * ctx.grad_scale).to(ctx.options.wide)
        run = _run if ctx.options.triton else run_torch
        with torch.autocast(d_losses.device.type, enabled=False):
            _, gradients = run(*tensors, upstream, ctx.needs, ctx.options, ctx.grad)
        return *_hand_over(gradients, ctx.owner), *[None] * 8


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
    return_stats: bool | Literal["all"] = False,
    add_to_grad: bool = False,
) -> Tensor | tuple[Tensor, Stats]:
    """Cross-entropy of the logits softcap(logit_scale * (hidden W^T + bias)) without materialising them.

    hidden:       [T, D] floating.
    weight:       [V, D] floating. It may be wider than hidden (fp32 master weights); the matmuls run in the dtype of hidden,
                  or of autocast where that is on, the gradient is summed in fp32 and comes back in the dtype of weight.
    targets:      int64 [M] in [0, V), or -100: the row is ignored. Targets that are on the CPU beside hidden on a GPU may be
                  checked and their ignored rows dropped for free; on the GPU ignored rows are multiplied like others and
                  weigh 0 (they must be finite).
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
    return_stats: True: also return `Stats` of nll, correct and entropy. "all": its mean_logit and log_sum_sq_probs too.
    add_to_grad:  for a caller that calls backward() next. If weight is an fp32 leaf on a CPU that has a gradient already, the
                  new one is added to it in place and none comes through autograd. With "sum" the forward does it, for a loss
                  whose own gradient is 1; another one costs a second pass, and digits where it is much smaller. On a GPU an
                  fp32 leaf has its gradient when this op's backward ends, before autograd has those of other ops: an
                  embedding that is tied to it then adds its rows in place.

    Returns the loss in fp32 (fp64 for fp64 inputs); with return_stats, (loss, Stats). Inputs that do not require a
    gradient cost nothing. Without any row to score the loss is 0 and the gradients are zeros.
    Raises ValueError for shapes that do not fit, options out of range and, on the CPU, targets or rows out of range.
    """
    _check(hidden, weight, targets, rows, row_weights, bias, softcap, label_smoothing, reduction, return_stats)
    backend = backend_for("linear_cross_entropy", hidden)
    if backend == "reference":
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

    device, M = hidden.device, len(targets)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    asked = dict(entropy=bool(return_stats), all_stats=return_stats == "all")
    o = Options(dtype, softcap, logit_scale, label_smoothing, z_loss, **asked, triton=backend == "triton")
    if row_weights is None:
        row_weights = torch.ones(M, device=targets.device)
    row_weights = row_weights.detach().to(o.wide)

    # If the host knows the targets, it drops the rows that train nothing. On a GPU, finding these would wait for it.
    keep = None
    if targets.device.type == "cpu" and not (o.triton and device.type == "cpu"):
        scored = targets != IGNORE_INDEX
        if not scored.all():
            keep = scored.nonzero()[:, 0]
            rows = keep if rows is None else _pick(rows, keep)
            targets, row_weights = targets[keep], _pick(row_weights, keep)
    rows = None if rows is None else _send(rows, device)
    targets, row_weights = _send(targets.contiguous(), device), _send(row_weights, device)

    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    grad = weight.grad if add_to_grad and needs[1] and weight.is_leaf and not o.triton else None
    grad = None if grad is None or not (grad.dtype == o.wide == weight.dtype) or grad.is_cuda else grad
    hands_over = add_to_grad and needs[1] and o.triton and weight.is_leaf and weight.dtype == torch.float32
    owner = weight if hands_over and not weight._post_accumulate_grad_hooks else None
    function = _LinearCrossEntropySum if reduction == "sum" else _LinearCrossEntropyRows
    with torch.autocast(device.type, enabled=False):
        scale = 1.0 if grad_scale is None else grad_scale
        loss, results = function.apply(hidden, weight, bias, rows, targets, row_weights, scale, needs, o, grad, owner)

    stats = torch.cat((results[1:4], results[-2:])) if o.all_stats else results[1:4]
    if keep is not None:  # back to [M]
        keep = _send(keep, device)
        stats = stats.new_zeros(len(stats), M).index_copy(1, keep, stats)
        if reduction == "none":
            loss = loss.new_zeros(M).index_copy(0, keep, loss)
    return (loss, Stats(*stats.float())) if return_stats else loss


def _send(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, without waiting for the device."""
    return x if x.device == device else x.pin_memory().to(device, non_blocking=True)


def _pick(x: Tensor, keep: Tensor) -> Tensor:
    """x[keep], where x may be on a GPU and keep is on the host."""
    return x[_send(keep, x.device)]


def shifted_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None, **options
) -> Tensor | tuple[Tensor, Stats]:
    """`linear_cross_entropy` of labels as Hugging Face has them: hidden[t] predicts labels[t + 1] of its own document.

    labels: int64 [T], -100 = not trained. cu_seqlens: int [N + 1], 0 first, T last; None: all T tokens are one document.
    options: as `linear_cross_entropy` but for rows; row_weights, a loss with reduction="none" and the statistics are [T],
    indexed by the row that predicts. The last row of a document predicts nothing.
    Labels (and with them cu_seqlens) may stay on the CPU while hidden is on a GPU: the host then picks the rows that are
    trained and sends the list along without waiting. With labels on the GPU, rows that train nothing are computed at weight 0.
    Raises ValueError as `linear_cross_entropy`, and for labels or cu_seqlens that do not cover the T rows of hidden.
    """
    T = len(hidden)
    if labels.shape != (T,):
        raise ValueError(f"labels {tuple(labels.shape)}: expected ({T},), one a row of hidden {tuple(hidden.shape)}")
    check_documents(cu_seqlens, T)
    return linear_cross_entropy(hidden, weight, targets_of(labels, cu_seqlens, True, IGNORE_INDEX), **options)


def _check(hidden, weight, targets, rows, row_weights, bias, softcap, label_smoothing, reduction, return_stats) -> None:
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
    if return_stats not in (False, True, "all"):
        raise ValueError(f"return_stats {return_stats!r}: expected False, True or 'all'")
    if M > 0 and targets.device.type == "cpu":
        bad = targets[((targets < 0) & (targets != IGNORE_INDEX)) | (targets >= V)]
        if len(bad):
            raise ValueError(f"target {bad[0]} is outside the vocabulary of {V} (and is not {IGNORE_INDEX})")
    if M > 0 and rows is not None and rows.device.type == "cpu" and (rows.min() < 0 or rows.max() >= T):
        raise ValueError(f"rows from {rows.min()} to {rows.max()}: hidden has {T} rows")
