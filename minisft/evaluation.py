"""Token-exact evaluation.

The evaluation loss is (sum of nll over every target of the set) / (number of targets). It does not depend on the batch
size, on packing, or on the number of ranks.
"""

from collections.abc import Callable

import numpy as np
import torch

from minisft import runtime
from minisft.data.batch import Batch
from minisft.data.loader import Loader
from minisft.kernels.linear_cross_entropy import Stats
from minisft.metrics import Sums
from minisft.model.decoder import Decoder
from minisft.parallel import no_backward

POLL_BATCHES = 4  # the ranks exchange a number for each poll


def evaluate(
    model: Decoder,
    loader: Loader,
    loss: Callable,
    device: torch.device,
    precision: str,
    poll: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Means over the whole set: loss, mean_token_accuracy, entropy (nats). The model's training mode is restored.

    poll(): is called before every POLL_BATCHES batches, by all ranks together; what it raises gives the evaluation up.
    """
    training = model.training
    model.eval()
    sums = Sums(device)
    try:
        with no_backward(model):
            for step in range(loader.steps_per_epoch):
                if step % POLL_BATCHES == 0:
                    poll()
                for batch in loader.step(0, step):
                    with runtime.autocast(device, precision):
                        sums.add(loss(model, batch.to(device), 1.0)[1])
    finally:
        model.train(training)
    return sums.means()


# ---- by kind of token and by source -----------------------------------------------------------------------------


def target_stats(model: Decoder, batch: Batch, precision: str) -> Stats:
    """nll, correct and entropy of every target of a batch on the device, fp32 [M] each; filler comes last. For passes inside
    parallel.no_backward."""
    with runtime.autocast(batch.input_ids.device, precision):
        hidden = model(batch.input_ids, batch.position_ids, batch.start, batch.end, shared=batch.shared)  # [T, D]
        _, stats = model.cross_entropy(hidden, batch.targets, batch.loss_rows, return_stats=True)
    return stats


def scores(model: Decoder, loader: Loader, device: torch.device, precision: str) -> dict[str, dict[str, float]]:
    """{part of the set: {tokens, loss, perplexity, accuracy, entropy, probability}}: exact means over its targets, in nats.

    The parts are those of Batch.parts that the set has. probability: the mean of p(target), which says of a terminator how surely
    the answers end. The model's training mode is restored.
    """
    names, sizes = (), np.zeros((), dtype=int)
    sums = torch.zeros((), dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for step in range(loader.steps_per_epoch):
            for batch in loader.step(0, step):
                work = batch.to(device)
                with no_backward(model):
                    stats = target_stats(model, work, precision)
                    sums = sums + work.sums_by_part(stats.nll, stats.correct, stats.entropy, (-stats.nll).exp())
                names, sizes = batch.parts, sizes + np.array(batch.part_sizes)
    finally:
        model.train(training)
    return {name: _means(size, row) for name, size, row in zip(names, sizes.tolist(), sums.tolist()) if size}


def _means(size: int, sums: list[float]) -> dict[str, float]:
    loss, accuracy, entropy, probability = (total / size for total in sums)
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))
    return {
        "tokens": size,
        "loss": loss,
        "perplexity": perplexity,
        "accuracy": accuracy,
        "entropy": entropy,
        "probability": probability,
    }
