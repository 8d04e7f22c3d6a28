"""Supervised fine-tuning: the negative log-likelihood of the trained tokens.

An objective is two functions, the same two for every trainer:

    weight(batch)                   the micro-batch's share of N, known before the forward pass
    loss(model, batch, grad_scale)  (sum, metrics); backward() on the sum gives grad_scale times its gradient

The loop sums first and divides once: with N = the weight of all micro-batches of an optimizer step on all ranks,
loss = sum over them of w_t * -log p(y_t) / N, whatever the split into micro-batches. The division rides on
grad_scale = 1 / N, so it is applied once, in fp32, inside the kernel.
"""

from torch import Tensor

from minisft.data.batch import Batch
from minisft.metrics import Metrics
from minisft.model.decoder import Decoder


def weight(batch: Batch) -> float:
    """Sum of the weights of the trained tokens; their number where none has a weight of its own."""
    return batch.total_weight


def loss(
    model: Decoder, batch: Batch, grad_scale: float | Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Metrics]:
    """The weighted sum of the loss over the batch's targets, and metrics.

    Returns a scalar (fp32) that is not scaled by grad_scale; its gradient is. The metrics are detached. Call backward() on it, if
    gradients are enabled: a head that has a gradient already has got its new one by then.
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
    sums = {"loss": total.detach(), "mean_token_accuracy": stats.correct.sum(), "entropy": stats.entropy.sum()}
    return total, {name: (sums[name], number) for name, number in metric_weights(batch).items()}


def metric_weights(batch: Batch) -> dict[str, float]:
    """What the sum of each metric is divided by. Filler rows add 0 to all sums."""
    return {"loss": batch.total_weight, "mean_token_accuracy": batch.num_targets, "entropy": batch.num_targets}
