"""Packing: which documents share a row of `max_length` tokens.

Attention never crosses documents here, so packing changes speed and not results: a row that is 99.9 % full wastes 0.1 %
of the work. packing_strategies.py has the rules by which lengths share a pack.

The plan is made once. Every epoch deals the documents into it anew: documents of equal length change places, and the
packs are shuffled. That is a few passes over integer arrays. Without a seed, dealing gives exactly the packs of
`packing_strategies.pack_ref`.

Every piece is a document of its own in a batch (positions restart, attention stays inside), so "wrapped" leaks nothing
from one document into the next, unlike the strategy of that name elsewhere. A cut costs the later piece its context.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minisft.data.packing_strategies import STRATEGIES, Group
from minisft.errors import DATA, UserError


@dataclass(frozen=True, eq=False)
class Packs:
    """Packs of pieces: pack i holds pieces offsets[i]:offsets[i + 1] in this order."""

    document: np.ndarray  # int32 [P]: which document
    start: np.ndarray  # int32 [P]: the piece is tokens start:end of that document
    end: np.ndarray  # int32 [P]
    offsets: np.ndarray  # int64 [n + 1]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def tolist(self) -> list[list[tuple[int, int, int]]]:
        """The packs as lists of (document, start, end), for small cases."""
        pieces = list(zip(self.document.tolist(), self.start.tolist(), self.end.tolist()))
        return [pieces[a:b] for a, b in pairwise(self.offsets.tolist())]


@dataclass(frozen=True, eq=False)
class Plan:
    """How many packs there are and which lengths share one; `deal` decides which documents. Made by `plan`."""

    strategy: str
    max_length: int
    num_packs: int
    num_tokens: int  # tokens in packs
    num_cut: int  # tokens of documents longer than max_length that are in no pack
    document: np.ndarray | None  # int32 [P]: piece p is tokens start[p]:end[p] of document[p]; None = of document p
    start: np.ndarray | None  # int32 [P]; None = 0
    end: np.ndarray  # int32 [P]
    order: np.ndarray  # int32 [P]: the pieces by decreasing length
    classes: list[int]  # order[classes[c]:classes[c + 1]] are interchangeable
    groups: list[Group]

    @property
    def fill(self) -> float:
        """The share of all places that hold a token, 0 to 1."""
        return self.num_tokens / (self.num_packs * self.max_length)

    def deal(self, seed: int | Sequence[int] | None = None) -> Packs:
        """Deal the documents into the packs: a pure function of plan and seed. None = the packs of `pack_ref`."""
        rng = None if seed is None else np.random.default_rng(seed)
        if STRATEGIES[self.strategy].cut == "stream":
            return _wrap(self.end, self.max_length, rng)
        order = self.order
        if rng:
            order = order.copy()
            for a, b in pairwise(self.classes):
                rng.shuffle(order[a:b])

        pieces = np.empty_like(order)
        filled = 0
        sizes = []  # pieces a pack, one entry a group
        for group in self.groups:  # a block of [packs, pieces a pack], filled by columns
            width = sum(k for _, k in group.runs)
            block = pieces[filled : filled + group.number * width].reshape(group.number, width)
            column = 0
            for rank, k in group.runs:
                block[:, column : column + k] = order[rank : rank + group.number * k].reshape(group.number, k)
                column += k
            filled += group.number * width
            sizes.append(width)
        num_pieces = np.repeat(sizes, [group.number for group in self.groups])  # [n]
        offsets = np.concatenate([[0], np.cumsum(num_pieces)])

        if rng:  # shuffle the packs
            packs = rng.permutation(self.num_packs)
            num_pieces = num_pieces[packs]
            pieces = pieces[ragged_arange(offsets[packs].astype(np.int32), num_pieces)]
            offsets = np.concatenate([[0], np.cumsum(num_pieces)])
        document = pieces if self.document is None else self.document[pieces]
        start = np.zeros_like(pieces) if self.start is None else self.start[pieces]
        return Packs(document, start, self.end[pieces], offsets)


def plan(lengths: Sequence[int] | np.ndarray, max_length: int, strategy: str) -> Plan:
    """Plan packs of at most max_length tokens for documents of these lengths (int [D], each at least 1).

    Raises UserError for an unknown strategy, max_length < 1 or no documents, ValueError for a length that is not positive.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"unknown packing strategy {strategy!r}", hint=f"choose one of {', '.join(STRATEGIES)}")
    if max_length < 1:
        raise UserError(f"max_length is {max_length}", hint="a pack needs room for at least 1 token")
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        raise UserError("no documents to pack", hint="every row was dropped or there were none", exit_code=DATA)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers [D], not {lengths.dtype} {list(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() >= 2**31:
        d = int(np.argmax((lengths < 1) | (lengths >= 2**31)))
        raise ValueError(f"document {d} has length {lengths[d]}; lengths are 1 to 2**31 - 1")
    total = int(lengths.sum(dtype=np.int64))
    room = min(max_length, total, 2**31 - 1)  # a pack never holds more than everything
    lengths = lengths.astype(np.int32, copy=False)

    cut, fit = STRATEGIES[strategy]
    document = start = None
    if cut == "pieces":
        num_pieces = -(-lengths // room)
        document = np.repeat(np.arange(len(lengths), dtype=np.int32), num_pieces)
        start = ragged_arange(np.zeros_like(lengths), num_pieces) * np.int32(room)
        end = start + np.minimum(lengths[document] - start, room)
    elif cut == "stream":
        end = lengths
    else:
        end = np.minimum(lengths, room)
    size = end if start is None else end - start
    num_tokens = int(size.sum(dtype=np.int64))

    order, classes, groups = np.arange(len(end), dtype=np.int32), [], []
    if cut == "stream":
        num_packs = -(-total // max_length)
    elif fit is None:
        groups, num_packs = [Group(0, len(end), 0, 0, ((0, 1),))], len(end)
    else:
        # Two bytes if they suffice: numpy sorts those in linear time.
        missing = (room - size).astype(np.uint16 if room < 2**16 else np.int32)
        order = np.argsort(missing, kind="stable").astype(np.int32)
        counts = np.bincount(missing)
        classes = [0, *np.cumsum(counts[counts > 0]).tolist()]
        groups = fit(counts.tolist(), room)
        num_packs = groups[-1].first + groups[-1].number
    return Plan(
        strategy, max_length, num_packs, num_tokens, total - num_tokens, document, start, end, order, classes, groups
    )


def pack(lengths: Sequence[int] | np.ndarray, max_length: int, strategy: str, seed: int | None = None) -> Packs:
    """Plan and deal in one call; see `plan` and `Plan.deal`."""
    return plan(lengths, max_length, strategy).deal(seed)


def ragged_arange(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (length[0] of them), start[1], ...: int [sum(length)] in the dtype of `start`."""
    before = np.cumsum(length) - length
    steps = np.arange(length.sum(), dtype=start.dtype)
    steps += np.repeat((start - before).astype(start.dtype), length)
    return steps


def _wrap(lengths: np.ndarray, max_length: int, rng: np.random.Generator | None) -> Packs:
    """Lay the documents end to end, in an order drawn by rng, and cut every max_length tokens."""
    order = np.arange(len(lengths), dtype=np.int32)
    if rng:
        rng.shuffle(order)
    ends = np.cumsum(lengths[order], dtype=np.int64)  # [D] document order[i] is tokens starts[i]:ends[i] of the stream
    starts = ends - lengths[order]
    first, last = starts // max_length, (ends - 1) // max_length  # [D] the packs in which it begins and ends
    at = np.repeat(np.arange(len(order), dtype=np.int32), last - first + 1)  # [P]
    packs = ragged_arange(first, last - first + 1)  # [P]
    start = np.maximum(packs * max_length - starts[at], 0).astype(np.int32)
    end = np.minimum((packs + 1) * max_length, ends[at]) - starts[at]
    offsets = np.searchsorted(packs, np.arange(last[-1] + 2))
    return Packs(order[at], start, end.astype(np.int32), offsets)
