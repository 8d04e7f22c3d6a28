"""Token-exact evaluation.

The evaluation loss is (sum of nll over every target of the set) / (number of targets). It does not depend on the batch
size, on packing, or on the number of ranks.
"""

from collections.abc import Callable

import torch

from minisft import runtime
from minisft.data.loader import Loader
from minisft.metrics import Sums
from minisft.model.decoder import Decoder

POLL_BATCHES = 4  # the ranks exchange a number for each poll


@torch.no_grad()
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
        for step in range(loader.steps_per_epoch):
            if step % POLL_BATCHES == 0:
                poll()
            for batch in loader.step(0, step):
                with runtime.autocast(device, precision):
                    sums.add(loss(model, batch.to(device), 1.0)[1])
    finally:
        model.train(training)
    return sums.means()
