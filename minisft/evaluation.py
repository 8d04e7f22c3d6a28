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


@torch.no_grad()
def evaluate(model: Decoder, loader: Loader, loss: Callable, device: torch.device, precision: str) -> dict[str, float]:
    """Means over the whole set: loss, mean_token_accuracy, entropy (nats). The model's training mode is restored."""
    training = model.training
    model.eval()
    sums = Sums(device)
    for step in range(loader.steps_per_epoch):
        for batch in loader.step(0, step):
            with runtime.autocast(device, precision):
                sums.add(loss(model, batch.to(device), 1.0)[1])
    model.train(training)
    return sums.means()
