"""Packing: which documents share a row of `max_length` tokens.

Attention never crosses documents here, so packing changes speed and not results: a row that is 99.9 % full wastes 0.1 %
of the work. The task is bin packing, and the classic heuristics are close to optimal: take documents in order of
decreasing length and put each into the fullest pack that still has room ("bfd", best-fit decreasing) or into the oldest
one ("ffd", first-fit decreasing). See Johnson et al., "Worst-case performance bounds for simple one-dimensional packing
algorithms" (1974): neither needs more than 11/9 of the optimum, and with many short documents both come near 100 %.

Documents of one length are interchangeable. So we plan with the histogram of lengths instead of the documents: a group
of equal packs takes as many documents of the current length as it can, in one step. The cost grows with the number of
distinct lengths, not of documents: a few thousand steps for ten million documents (Krell et al., "Efficient sequence
packing without cross-contamination", arXiv:2107.02027, plan on the histogram too).

The plan is made once. Every epoch deals the documents into it anew: documents of equal length change places, and the
packs are shuffled. That is a few passes over integer arrays. Without a seed, dealing gives exactly the packs that
`pack_ref`, the plain document-by-document version at the end of this file, gives.

    strategy    a document longer than max_length            what a pack holds
    bfd, ffd    keeps its first max_length tokens            whole documents
    bfd_split   is cut into pieces of max_length             whole documents and pieces
    wrapped     is cut wherever a pack ends                  the stream of all documents, cut every max_length tokens
    none        keeps its first max_length tokens            one document

Every piece is a document of its own in a batch (positions restart, attention stays inside), so "wrapped" leaks nothing
from one document into the next, unlike its namesake elsewhere. What a cut costs is the context before it.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

from minisft.errors import DATA, UserError

STRATEGIES = ("bfd", "ffd", "bfd_split", "wrapped", "none")


@dataclass(frozen=True, eq=False)
class Packs:
    """Packs of pieces: pack i holds pieces offsets[i]:offsets[i + 1], side by side in this order."""

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


class _Group(NamedTuple):
    """Equal packs with consecutive numbers. Pack `first + i` holds, for every (rank, k) of `runs`, the k pieces
    order[rank + i * k : rank + (i + 1) * k], where `order` lists the pieces by decreasing length."""

    first: int
    number: int
    space: int  # tokens that are still free in each pack
    arrival: int  # groups of equal space came to it in this order
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """How many packs there are and which lengths share one; `deal` says which documents. Made by `plan`."""

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
    groups: list[_Group]

    @property
    def fill(self) -> float:
        """The part of all places that holds a token, 0 to 1."""
        return self.num_tokens / (self.num_packs * self.max_length)

    def deal(self, seed: int | Sequence[int] | None = None) -> Packs:
        """Deal the documents into the packs: a pure function of plan and seed. None = the packs of `pack_ref`."""
        rng = None if seed is None else np.random.default_rng(seed)
        if self.strategy == "wrapped":
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

    Raises UserError for an unknown strategy, max_length < 1 or no documents, ValueError for a length that is not
    positive.
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

    document = start = None
    if strategy == "bfd_split":
        num_pieces = -(-lengths // room)
        document = np.repeat(np.arange(len(lengths), dtype=np.int32), num_pieces)
        start = ragged_arange(np.zeros_like(lengths), num_pieces) * np.int32(room)
        end = start + np.minimum(lengths[document] - start, room)
    elif strategy == "wrapped":
        end = lengths
    else:
        end = np.minimum(lengths, room)
    size = end if start is None else end - start
    num_tokens = int(size.sum(dtype=np.int64))

    order, classes, groups = np.arange(len(end), dtype=np.int32), [], []
    if strategy == "wrapped":
        num_packs = -(-total // max_length)
    elif strategy == "none":
        groups, num_packs = [_Group(0, len(end), 0, 0, ((0, 1),))], len(end)
    else:
        # Two bytes where they do: numpy sorts those in linear time.
        missing = (room - size).astype(np.uint16 if room < 2**16 else np.int32)
        order = np.argsort(missing, kind="stable").astype(np.int32)
        counts = np.bincount(missing)
        classes = [0, *np.cumsum(counts[counts > 0]).tolist()]
        groups = _fit(counts.tolist(), room, first_fit=strategy == "ffd")
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


def _fit(counts: list[int], room: int, first_fit: bool) -> list[_Group]:
    """Best-fit or first-fit decreasing on a histogram: counts[m] pieces have length room - m.

    Whichever rule picks a pack, it stays the pick until it has no room for another piece of the current length: it
    remains the fullest that has room, or the oldest. After its turn it waits until the lengths have come down to its
    space. `ready` is a heap of the groups that have room now: best fit by space and arrival, first fit by number.
    """
    ready, waiting = [], [[] for _ in range(room + 1)]  # waiting[space], for every space below the length
    arrivals = count()
    num_packs = rank = 0

    def push(group):
        heapq.heappush(ready, (group.first if first_fit else (group.space, group.arrival), group))

    for length, left in zip(range(room, 0, -1), counts):
        for group in waiting.pop():
            push(group)
        while left:
            if ready:
                group = heapq.heappop(ready)[1]
            else:
                group = _Group(num_packs, -(-left // (room // length)), room, next(arrivals), ())
                num_packs += group.number
            k = group.space // length  # pieces that each pack takes
            taken = min(group.number, left // k)
            if taken == 0:  # fewer pieces are left than fit into one pack
                taken, k = 1, left
            if taken < group.number:
                runs = tuple((r + taken * n, n) for r, n in group.runs)
                push(group._replace(first=group.first + taken, number=group.number - taken, runs=runs))
            space = group.space - k * length
            group = _Group(group.first, taken, space, next(arrivals), (*group.runs, (rank, k)))
            rank += taken * k
            left -= taken * k
            if space >= length:
                push(group)
            else:
                waiting[space].append(group)
    return sorted([group for _, group in ready] + [group for groups in waiting for group in groups])


def _wrap(lengths: np.ndarray, max_length: int, rng: np.random.Generator | None) -> Packs:
    """Lay the documents end to end, in an order drawn anew, and cut every max_length tokens."""
    order = np.arange(len(lengths), dtype=np.int32)
    if rng:
        rng.shuffle(order)
    ends = np.cumsum(lengths[order], dtype=np.int64)  # [D] document order[i] is tokens starts[i]:ends[i] of the stream
    starts = ends - lengths[order]
    first, last = starts // max_length, (ends - 1) // max_length  # [D] the packs that it touches
    at = np.repeat(np.arange(len(order), dtype=np.int32), last - first + 1)  # [P]
    packs = ragged_arange(first, last - first + 1)  # [P]
    start = np.maximum(packs * max_length - starts[at], 0).astype(np.int32)
    end = np.minimum((packs + 1) * max_length, ends[at]) - starts[at]
    offsets = np.searchsorted(packs, np.arange(last[-1] + 2))
    return Packs(order[at], start, end.astype(np.int32), offsets)


def pack_ref(lengths: Sequence[int], max_length: int, strategy: str) -> list[list[tuple[int, int, int]]]:
    """Every strategy, document by document: packs of (document, start, end). Quadratic; the yardstick of the tests."""
    if strategy == "wrapped":
        packs, space = [], 0
        for d, length in enumerate(lengths):
            start = 0
            while start < length:
                if space == 0:
                    packs.append([])
                    space = max_length
                end = min(start + space, length)
                packs[-1].append((d, start, end))
                space -= end - start
                start = end
        return packs
    if strategy == "bfd_split":
        pieces = [(d, a, min(a + max_length, n)) for d, n in enumerate(lengths) for a in range(0, n, max_length)]
    else:
        pieces = [(d, 0, min(n, max_length)) for d, n in enumerate(lengths)]
    if strategy == "none":
        return [[piece] for piece in pieces]

    packs, space, since = [], [], []  # of each pack: its pieces, its free tokens, since when it has just so many
    for time, (d, start, end) in enumerate(sorted(pieces, key=lambda piece: piece[1] - piece[2])):
        fits = [i for i in range(len(packs)) if space[i] >= end - start]
        if not fits:
            fits = [len(packs)]
            packs.append([])
            space.append(max_length)
            since.append(time)
        i = fits[0] if strategy == "ffd" else min(fits, key=lambda i: (space[i], since[i]))
        packs[i].append((d, start, end))
        space[i] -= end - start
        since[i] = time
    return packs
