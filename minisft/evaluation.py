"""Token-exact evaluation.

The evaluation loss is (sum of nll over every target of the set) / (number of targets). It does not depend on the batch
size, on packing, or on the number of ranks.
"""

from collections.abc import Callable

import numpy as np
import torch

from minisft import runtime
from minisft.data.batch import Batch
from minisft.data.kinds import TOKEN_KINDS
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


def target_stats(model: Decoder, batch: Batch, device: torch.device, precision: str) -> Stats:
    """nll, correct and entropy of every target of a batch, fp32 [M] each, on the device; filler comes last. For passes
    inside parallel.no_backward."""
    work = batch.to(device)
    with runtime.autocast(device, precision):
        hidden = model(work.input_ids, work.position_ids, work.start, work.end, shared=work.shared)  # [T, D]
        _, stats = model.cross_entropy(hidden, work.targets, work.loss_rows, return_stats=True)
    return stats


def scores(model: Decoder, loader: Loader, device: torch.device, precision: str) -> dict[str, dict[str, float]]:
    """{part of the set: {tokens, loss, perplexity, accuracy, entropy, probability}}: exact means over its targets, in nats.

    The parts are "all", the kinds of tokens that are trained, "first token" (of each trained stretch), and "source NAME" where
    there are several sources. probability: the mean of p(target), which says of a terminator how surely the answers end. The
    model's training mode is restored.
    """
    sources = [source.label for source in loader.documents.cache.sources]
    names = ["all", *TOKEN_KINDS, "first token", *(f"source {name}" for name in sources)]
    sums = np.zeros((len(names), 5))  # targets, nll, correct, entropy, p
    training = model.training
    model.eval()
    try:
        for step in range(loader.steps_per_epoch):
            for batch in loader.step(0, step):
                M = batch.num_targets
                with no_backward(model):
                    stats = target_stats(model, batch, device, precision)
                nll, correct, entropy = (
                    x[:M].double().cpu().numpy() for x in (stats.nll, stats.correct, stats.entropy)
                )
                values = np.stack([np.ones(M), nll, correct, entropy, np.exp(-nll)], axis=1)  # [M, 5]
                rows, document = batch.loss_rows[:M].numpy(), batch.row_document[:M].numpy()
                is_first = np.ones(M, dtype=bool)
                is_first[1:] = (np.diff(rows) != 1) | (np.diff(document) != 0)
                sums[0] += values.sum(0)
                np.add.at(sums, 1 + batch.row_kind[:M].numpy().astype(int), values)
                sums[1 + len(TOKEN_KINDS)] += values[is_first].sum(0)
                np.add.at(sums, 2 + len(TOKEN_KINDS) + batch.row_source[:M].numpy().astype(int), values)
    finally:
        model.train(training)
    shown = range(len(names) if len(sources) > 1 else len(names) - 1)
    return {names[i]: _means(sums[i]) for i in shown if sums[i, 0]}


def _means(sums: np.ndarray) -> dict[str, float]:
    loss, accuracy, entropy, probability = (sums[1:] / sums[0]).tolist()
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(loss))
    return {
        "tokens": int(sums[0]),
        "loss": loss,
        "perplexity": perplexity,
        "accuracy": accuracy,
        "entropy": entropy,
        "probability": probability,
    }
