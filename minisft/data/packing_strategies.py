"""The packing strategies: which lengths of documents share a pack of `max_length` tokens.

    strategy    a document longer than max_length            what a pack holds
    bfd, ffd    keeps its first max_length tokens            whole documents
    bfd_split   is cut into pieces of max_length             whole documents and pieces
    wrapped     is cut wherever a pack ends                  the stream of all documents, cut every max_length tokens
    none        keeps its first max_length tokens            one document

The task is bin packing, and the classic heuristics are close to optimal: take documents in order of decreasing length and
put each into the fullest pack that still has room ("bfd", best-fit decreasing) or into the oldest one ("ffd", first-fit
decreasing). See Johnson et al., "Worst-case performance bounds for simple one-dimensional packing algorithms" (1974): neither
needs more than 11/9 of the optimum, and with many short documents both come near 100 %.

Documents of one length are interchangeable, so the fast versions plan with the histogram of lengths instead of the
documents: a group of equal packs takes as many documents of the current length as it can, in one step. The cost grows with
the number of distinct lengths, not of documents: a few thousand steps for ten million documents (Krell et al., "Efficient
sequence packing without cross-contamination", arXiv:2107.02027, plan on the histogram too). `pack_ref` is the plain version,
document by document.
"""

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

# ------------------------------------------------------------------------------------------------- document by document


def pack_ref(lengths: Sequence[int], max_length: int, strategy: str) -> list[list[tuple[int, int, int]]]:
    """Every strategy, document by document: packs of (document, start, end). Quadratic; the tests compare with it."""
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

    packs, space, since = [], [], []  # each pack's pieces, free tokens, and when it last got a piece
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


# ------------------------------------------------------------------------------------------------- on the histogram


class Group(NamedTuple):
    """Equal packs with consecutive numbers. Pack `first + i` holds, for every (rank, k) of `runs`, the k pieces
    order[rank + i * k : rank + (i + 1) * k], where `order` lists the pieces by decreasing length."""

    first: int
    number: int
    space: int  # free tokens in each pack
    arrival: int  # the order in which groups of equal space came to have it
    runs: tuple[tuple[int, int], ...]


def best_fit(counts: list[int], room: int) -> list[Group]:
    return _fit(counts, room, lambda group: (group.space, group.arrival))


def first_fit(counts: list[int], room: int) -> list[Group]:
    return _fit(counts, room, lambda group: group.first)


def _fit(counts: list[int], room: int, priority: Callable[[Group], Any]) -> list[Group]:
    """Fit pieces in order of decreasing length; counts[m] of them have length room - m.

    Of the packs that have room, the one with the smallest `priority` takes the next piece: the fullest, or the oldest. It
    remains the smallest until it has no room for another piece of the current length. Then it waits until the lengths have
    come down to its space. `ready` is a heap of the groups that have room now.
    """
    ready, waiting = [], [[] for _ in range(room + 1)]  # waiting[space], for every space below the length
    arrivals = count()
    num_packs = rank = 0

    def push(group: Group) -> None:
        heapq.heappush(ready, (priority(group), group))

    for length, left in zip(range(room, 0, -1), counts):
        for group in waiting.pop():
            push(group)
        while left:
            if ready:
                group = heapq.heappop(ready)[1]
            else:
                group = Group(num_packs, -(-left // (room // length)), room, next(arrivals), ())
                num_packs += group.number
            k = group.space // length  # pieces that each pack takes
            taken = min(group.number, left // k)
            if taken == 0:  # fewer pieces are left than fit into one pack
                taken, k = 1, left
            if taken < group.number:
                runs = tuple((r + taken * n, n) for r, n in group.runs)
                push(group._replace(first=group.first + taken, number=group.number - taken, runs=runs))
            space = group.space - k * length
            group = Group(group.first, taken, space, next(arrivals), (*group.runs, (rank, k)))
            rank += taken * k
            left -= taken * k
            if space >= length:
                push(group)
            else:
                waiting[space].append(group)
    return sorted([group for _, group in ready] + [group for groups in waiting for group in groups])


# ------------------------------------------------------------------------------------------------- the table


class Strategy(NamedTuple):
    """What happens to a document longer than max_length, and how pieces are fitted into packs by their lengths."""

    cut: (
        str  # "front" = keeps its first tokens; "pieces" = is cut every max_length tokens; "stream" = where a pack ends
    )
    fit: Callable[[list[int], int], list[Group]] | None  # None: nothing is fitted, documents are taken in order


STRATEGIES = {
    "bfd": Strategy("front", best_fit),
    "ffd": Strategy("front", first_fit),
    "bfd_split": Strategy("pieces", best_fit),
    "wrapped": Strategy("stream", None),
    "none": Strategy("front", None),  # packing is off: a pack for each document
}
