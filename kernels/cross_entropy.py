"""Cross-entropy of logits that already exist, with the shift done by index.

For the row of logits x that is scored against target t:

    z = c tanh(x / c) under a softcap c, else x
    lse = log sum_v exp(z_v)                         nll = lse - z_t
    loss = (1 - e) nll + e (lse - mean_v z_v) + z_loss * lse^2            e = label_smoothing

and backward, with p = exp(z - lse) and g the gradient of the row's loss:

    dz = g ((1 + 2 z_loss lse) p - e / V - (1 - e) onehot_t)              dx = dz (1 - (z / c)^2)

The shift. A causal language model's row t predicts token t + 1, so the labels, which sit at their own token, are one off.
Most code copies the logits to shift them ([T, V], the largest tensor there is). Here the targets are shifted instead,
T integers; and where documents lie side by side, the last row of each is scored against nothing.

Saved for the backward: the logits (they exist anyway) and the targets. Naively the op moves the logits through memory
some ten times (to fp32, log-softmax, its gradient, back), with two fp32 copies alive. Here a few rows at a time are
widened into a buffer that stays in the cache: one read forward; one read and one write, of the gradient, backward.
fp32 inside whatever the dtype: the soft-max, lse, the losses, (p - 1) of the target.

`linear_cross_entropy` never has the logits at all and is what training uses; this op is for models that return logits.
Limits: targets are checked on the CPU only (a check on a GPU would wait for it); no second derivative.

Label smoothing: Szegedy et al. 2015, arXiv:1512.00567. z-loss: PaLM, Chowdhery et al. 2022, arXiv:2204.02311.
Softcap: Gemma 2, arXiv:2408.00118.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import backend_for

GPU_ROWS = 1024  # rows that are widened at once on a GPU; a CPU takes 8 a thread


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
    num_targets = (_targets(labels, cu_seqlens, shift, ignore_index) != ignore_index).sum()
    return losses.sum() / (num_targets.clamp(min=1) if reduction == "mean" else 1)


def _targets(labels: Tensor, cu_seqlens: Tensor | None, shift: bool, ignore_index: int) -> Tensor:
    """labels [T] -> what each row of logits is scored against [T]."""
    if not shift:
        return labels
    targets = torch.full_like(labels, ignore_index)
    targets[:-1] = labels[1:]
    if cu_seqlens is not None:
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
    @torch.autograd.function.once_differentiable
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
    Raises ValueError for shapes that do not fit, options out of range and, on the CPU, labels outside the vocabulary.
    """
    _check(logits, labels, cu_seqlens, ignore_index, softcap, label_smoothing, reduction)
    if backend_for("cross_entropy", logits) == "reference":
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
    targets = _targets(labels, cu_seqlens, shift, ignore_index)
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
    if logits.device.type == "cpu":
        if cu_seqlens is not None and (cu_seqlens[0] != 0 or cu_seqlens[-1] != T):
            raise ValueError(f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}: expected 0 to {T}")
        bad = labels[((labels < 0) & (labels != ignore_index)) | (labels >= V)]
        bad = bad[bad != ignore_index]
        if len(bad):
            raise ValueError(f"label {bad[0]} is outside the vocabulary of {V} (and is not {ignore_index})")
