"""Exact accumulators: every logged mean is one sum divided by one weight.

A mean of means weighs a short batch like a long one, and changes when the same data is split differently. So metrics
travel as (sum, weight) pairs, are added up over the log window, the micro-batches and the ranks, and divided once. Sums
stay on the device, in fp64, until they are read: logging costs one device sync per window, not one per step.
"""

import resource
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from minisft.ranks import rank, sum_over_ranks

# name -> (sum, weight); the metric is sum / weight. A tuple of n names stands for (sums [n], weights [n]): one tensor, which is
# added up as a whole.
Names = str | tuple[str, ...]
# no metric, but the losses of targets or pairs, [M] or [U]: taken out for the ledger (ledger.py)
ROW_LOSSES = "row losses"
Metrics = dict[Names, tuple[Tensor | float, float | Sequence[float] | np.ndarray]]


class Sums:
    """Named (sum, weight) pairs. `add` never waits for the device; `means` does, once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[Names, Tensor] = {}  # fp64, [] or [n]
        self.weights: dict[Names, np.ndarray] = {}  # of the same shapes

    def add(self, metrics: Metrics) -> None:
        for name, (value, weight) in metrics.items():
            if isinstance(value, Tensor):
                value = value.double()
            else:  # filled in by the device: a copy of a number would wait for it
                value = torch.full((), value, dtype=torch.float64, device=self.device)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0.0) + np.asarray(weight, dtype=np.float64)

    def merge(self, other: "Sums") -> None:
        self.add({name: (value, other.weights[name]) for name, value in other.sums.items()})

    def _reduce(self) -> tuple[list[str], Tensor]:
        """Names and fp64 [2, names]: sums and weights over all ranks. Empties the accumulator."""
        keys = list(self.sums)  # in the order of their first `add`, the same on all ranks
        names = names_of(self.sums)
        numbers = [number for key in keys for number in np.atleast_1d(self.weights[key]).tolist()]
        weights = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        sums = torch.cat([self.sums[key].view(-1) for key in keys]) if keys else weights
        self.sums, self.weights = {}, {}
        return names, sum_over_ranks(torch.stack([sums, weights]))

    def means(self) -> dict[str, float]:
        """sum / weight of every name over all ranks; empties the accumulator.

        A name whose weight is 0 (for example rewards/rejected when the window had no rejected answer) is left out. The
        loss is the exception: with weight 0 it is NaN, so that it is noticed.
        """
        names, (sums, weights) = self._reduce()
        table = torch.stack([sums / weights, weights]).T.tolist()
        return {name: mean for name, (mean, weight) in zip(names, table) if weight != 0 or name == "loss"}

    def state(self) -> dict[str, list[str]]:
        """The open window as JSON, exact (hexadecimal floats, which also spell NaN): names, sums and weights that belong together
        are one entry, {"a\\nb": ["sum of a, sum of b", "weight of a, weight of b"]}.

        The window stays open afterwards: rank 0 holds the sums of all ranks, the others continue from 0.
        """
        keys = list(self.sums)
        _, table = self._reduce()
        sizes = [len(names_of([key])) for key in keys]
        spans = {key: slice(end - size, end) for key, size, end in zip(keys, sizes, np.cumsum(sizes).tolist())}
        state = {
            "\n".join(names_of([key])): [", ".join(map(float.hex, row[span].tolist())) for row in table]
            for key, span in spans.items()
        }
        self.restore(state)
        return state

    def restore(self, state: dict[str, list[str]]) -> None:
        for names, pair in state.items():
            key = tuple(names.split("\n")) if "\n" in names else names
            sums, weights = (
                [float.fromhex(number) if rank() == 0 else 0.0 for number in row.split(", ")] for row in pair
            )
            if isinstance(key, str):
                self.add({key: (sums[0], weights[0])})
            else:
                self.add({key: (torch.tensor(sums, dtype=torch.float64, device=self.device), weights)})


def names_of(metrics: Iterable[Names]) -> list[str]:
    return [name for key in metrics for name in ((key,) if isinstance(key, str) else key)]


def eval_name(eval_set: str, metric: str) -> str:
    """A metric of an evaluation set as it is logged; the set's name is "" where there is one without a name."""
    return f"eval_{eval_set}_{metric}" if eval_set else f"eval_{metric}"


def peak_memory(device: torch.device) -> float:
    """GiB: the most that the GPU has held since the start, or the most the process has held on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
