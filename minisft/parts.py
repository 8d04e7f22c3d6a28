"""What an update must know of a matrix that is cut (parallel.py): of `p` this rank has some rows, and `p.cut` says of what.

Rules that work number by number need nothing of this. The others need a sum over the whole matrix, for which a few numbers
travel (`summed`), or the whole matrix itself (`shared_out`). A tensor without `cut` is whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minisft import ranks


@dataclass(frozen=True)
class Cut:
    """Of a matrix `shape` [R, C] rank i of the n in `group` has the rows from i * rows_each on, the last ranks fewer or none."""

    shape: torch.Size
    group: Any  # of torch.distributed
    rank: int  # of this process in the group
    size: int  # n

    @property
    def rows_each(self) -> int:
        return -(-self.shape[0] // self.size)

    @property
    def numel_each(self) -> int:
        """With the rows that the last ranks have fewer."""
        return self.rows_each * self.shape[1:].numel()

    @property
    def first_row(self) -> int:
        return min(self.rank * self.rows_each, self.shape[0])


def shape_of(p: Tensor) -> torch.Size:
    """Of the whole tensor."""
    return p.cut.shape if hasattr(p, "cut") else p.shape


def rows_of(p: Tensor) -> slice:
    """Which rows of the whole tensor are here."""
    first = p.cut.first_row if hasattr(p, "cut") else 0
    return slice(first, first + len(p))


def first_of(p: Tensor) -> int:
    """Which element of the whole tensor the first one here is."""
    return p.cut.first_row * p.cut.shape[1:].numel() if hasattr(p, "cut") else 0


def wait_for_readers(params: Iterable[Tensor]) -> None:
    """Call before values are written without a wait for the device: rows in the memory of the CPU (parallel.cpu_offload) are read
    by the GPU when it comes to it, which may be later than the pass seems to be over."""
    if torch.cuda.is_initialized() and any(hasattr(p, "cut") and not p.is_cuda for p in params):
        torch.cuda.synchronize()


def summed(params: Sequence[Tensor], values: Sequence[Tensor]) -> Sequence[Tensor]:
    """The values, one of each parameter and of any shape, each summed over the ranks that share its parameter, in one message."""
    cut = [i for i, p in enumerate(params) if hasattr(p, "cut")]
    if not cut:
        return values
    total = ranks.sum_over_ranks(torch.cat([values[i].flatten() for i in cut]), params[cut[0]].cut.group)
    parts = total.split([values[i].numel() for i in cut])
    sums = {i: part.view_as(values[i]) for i, part in zip(cut, parts)}
    return [sums.get(i, value) for i, value in enumerate(values)]


def shared_out(
    params: Iterable[Tensor], values: Iterable[Tensor], work: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each parameter with its rows of work(whole matrix of its values); the result of `work` has the same shape.

    Ranks that share matrices of one shape take turns: each gathers one of them, works, and sends the others their rows. So a
    matrix is worked on once, and two messages carry as many matrices as there are ranks.
    """
    by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
    for p, value in zip(params, values):
        if hasattr(p, "cut"):
            by_shape.setdefault(tuple(p.cut.shape), []).append((p, value))
        else:
            yield p, work(value)
    for shape, pairs in by_shape.items():
        cut = pairs[0][0].cut
        for first in range(0, len(pairs), cut.size):
            turn = pairs[first : first + cut.size]  # number i goes to rank i
            rows = turn[0][1].new_zeros(cut.size, cut.rows_each, *shape[1:])
            for padded, (_, value) in zip(rows, turn):
                padded[: len(value)] = value
            rows = ranks.exchange(rows, cut.group)
            whole = rows.flatten(0, 1)[: shape[0]]  # the rows of all ranks lie one after another
            if cut.rank < len(turn):
                whole.copy_(work(whole))
            for padded, (p, _) in zip(ranks.exchange(rows, cut.group), turn):
                yield p, padded[: len(p)]
