"""Supervised fine-tuning: the negative log-likelihood of the trained tokens.

An objective is two functions, the same two for every trainer:

    weight(batch)                   the micro-batch's share of N, known before the forward pass
    loss(model, batch, grad_scale)  (sum, metrics); backward() on the sum gives grad_scale times its gradient

The loop sums first and divides once: with N = the weight of all micro-batches of an optimizer step on all ranks,
loss = sum over them of w_t * -log p(y_t) / N, whatever the split into micro-batches. The division rides on
grad_scale = 1 / N, so it is applied once, in fp32, inside the kernel.
"""

import torch
from torch import Tensor

from minisft.data.batch import Batch
from minisft.metrics import ROW_LOSSES, Metrics, Names
from minisft.model.decoder import Decoder


def weight(batch: Batch) -> float:
    """Sum of the weights of the trained tokens; their number where none has a weight of its own."""
    return batch.total_weight


def loss(
    model: Decoder,
    batch: Batch,
    grad_scale: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    keep_rows: bool = False,
) -> tuple[Tensor, Metrics]:
    """The weighted sum of the loss over the batch's targets, and metrics.

    Returns a scalar (fp32) that is not scaled by grad_scale; its gradient is. The metrics are detached. Call backward() on it, if
    gradients are enabled: a head that has a gradient already has got its new one by then. keep_rows: in training, the losses of
    the targets are among the metrics, as ROW_LOSSES; on ranks that share a batch each has those of all targets.
    """
    hidden = model(batch.input_ids, batch.position_ids, batch.start, batch.end, shared=batch.shared)  # [T, D]
    total, stats = model.cross_entropy(
        hidden,
        batch.targets,
        batch.loss_rows,
        row_weights=batch.row_weights,
        grad_scale=grad_scale,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        return_stats=True,
        add_to_grad=True,
    )
    nll, correct, entropy = batch.sums_by_part(stats.nll, stats.correct, stats.entropy).unbind(1)  # [parts] each
    sums = (total.detach(), correct[0], entropy[0], nll[1:])  # the first part is the whole batch
    metrics: Metrics = {name: (value, number) for (name, number), value in zip(metric_weights(batch).items(), sums)}
    if keep_rows and torch.is_grad_enabled():
        metrics[ROW_LOSSES] = (whole_rows(stats.nll, model, batch) if batch.is_piece else stats.nll), 1.0
    return total, metrics


def whole_rows(nll: Tensor, model: Decoder, batch: Batch) -> Tensor:
    """[m] -> [M]: the losses of the targets of the whole batch, of which the ranks that share it have some each."""
    assert model.context is not None and batch.row_place is not None and batch.all_documents is not None
    rows = nll.new_zeros(len(batch.all_documents) + 1)  # the last is filler's
    rows[batch.row_place] = nll
    return model.context.sum(rows)[:-1]


def metric_weights(batch: Batch) -> dict[Names, float | tuple[float, ...]]:
    """What the sum of each metric is divided by, in the order of `loss`. Filler rows add 0 to all sums.

    losses/NAME is the mean of -log p(target) over one part of the targets, whatever their weights: of a kind of token, the first
    tokens of the answers, or a source, as in Batch.parts.
    """
    by_part = tuple(f"losses/{name}" for name in batch.parts[1:])
    weights = {"loss": batch.total_weight, "mean_token_accuracy": batch.num_targets, "entropy": batch.num_targets}
    return {**weights, by_part: batch.part_sizes[1:]}
