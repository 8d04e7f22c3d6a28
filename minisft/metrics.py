"""Exact accumulators: every logged mean is one sum divided by one weight.

A mean of means weighs a short batch like a long one, and changes when the same data is split differently. So metrics
travel as (sum, weight) pairs, are added up over the log window, the micro-batches and the ranks, and divided once. Sums
stay on the device, in fp64, until they are read: logging costs one device sync per window, not one per step.
"""

import resource
import sys

import torch
from torch import Tensor

from minisft.ranks import rank, sum_over_ranks

Metrics = dict[str, tuple[Tensor | float, float]]  # name -> (sum, weight); the metric is sum / weight


class Sums:
    """Named (sum, weight) pairs. `add` never waits for the device; `means` does, once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}  # fp64 scalars
        self.weights: dict[str, float] = {}

    def add(self, metrics: Metrics) -> None:
        for name, (value, weight) in metrics.items():
            if isinstance(value, Tensor):
                value = value.double()
            else:  # filled in by the device: a copy of a number would wait for it
                value = torch.full((), value, dtype=torch.float64, device=self.device)
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.weights[name] = self.weights.get(name, 0.0) + weight

    def merge(self, other: "Sums") -> None:
        self.add({name: (value, other.weights[name]) for name, value in other.sums.items()})

    def _reduce(self) -> tuple[list[str], Tensor]:
        """Names and fp64 [2, names]: sums and weights over all ranks. Empties the accumulator."""
        names = list(self.sums)  # in the order of their first `add`, the same on all ranks
        weights = torch.tensor([self.weights[name] for name in names], dtype=torch.float64, device=self.device)
        sums = torch.stack([self.sums[name] for name in names]) if names else weights
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
        """The open window as JSON, exact (hexadecimal floats, which also spell NaN).

        The window stays open afterwards: rank 0 holds the sums of all ranks, the others continue from 0.
        """
        names, table = self._reduce()
        if rank() == 0:
            self.add({name: (sum, weight) for name, sum, weight in zip(names, table[0], table[1].tolist())})
        else:
            self.add({name: (0.0, 0.0) for name in names})
        return {name: [sum.hex(), weight.hex()] for name, (sum, weight) in zip(names, table.T.tolist())}

    def restore(self, state: dict[str, list[str]]) -> None:
        pairs = {name: tuple(map(float.fromhex, pair)) for name, pair in state.items()}
        self.add(pairs if rank() == 0 else dict.fromkeys(pairs, (0.0, 0.0)))


def eval_name(eval_set: str, metric: str) -> str:
    """A metric of an evaluation set as it is logged; the set's name is "" where there is one without a name."""
    return f"eval_{eval_set}_{metric}" if eval_set else f"eval_{metric}"


def peak_memory(device: torch.device) -> float:
    """GiB: the most that the GPU has held since the start, or the most the process has held on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
