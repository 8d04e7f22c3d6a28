"""Which documents of the cache are trained on, cut how, how often; and the account of every row and token.

The account closes, and `Accounting` asserts it:

    rows read = rows used + rows dropped, by reason
    tokens    = trained + context + cut + in dropped documents

Nothing is cut or dropped that is not in it. It counts rows once; a source's weight may repeat them in an epoch. A row is
used if one of its documents is: a conversation that is rendered turn by turn has one for each answer.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from minisft.data.batch import TRAINED
from minisft.data.cache import Documents, TokenCache
from minisft.data.packing import ragged_arange
from minisft.data.tokenizer import Tokenizer
from minisft.errors import DATA, UserError

TRUNCATIONS = ("error", "drop", "right", "left", "turns")
BLOCK_TOKENS = 2**24  # tokens whose kinds are looked at together, to bound memory


@dataclass(frozen=True)
class Accounting:
    """What became of every row and token."""

    rows_read: int
    rows_used: int
    dropped: dict[str, int]  # reason -> rows
    rows_cut: int
    tokens: int
    trained: int  # targets
    context: int  # seen, not trained
    cut: int
    in_dropped: int
    dropped_answers: int  # documents that are dropped, of rows that are used all the same
    num_documents: int  # of one epoch, with the repeats of source weights
    tokens_per_epoch: int

    def __post_init__(self) -> None:
        assert self.rows_read == self.rows_used + sum(self.dropped.values()), self
        assert self.tokens == self.trained + self.context + self.cut + self.in_dropped, self

    def lines(self) -> list[str]:
        """The account for the console."""
        num_dropped = sum(self.dropped.values())
        dropped = "".join(f", {count:,} {reason}" for reason, count in self.dropped.items())
        lost = f" + {self.in_dropped:,} in dropped documents" if self.in_dropped else ""
        lines = [
            f"rows: {self.rows_read:,} read = {self.rows_used:,} used + {num_dropped:,} dropped{dropped}",
            f"tokens: {self.tokens:,} = {self.trained:,} trained + {self.context:,} context + {self.cut:,} cut{lost}",
        ]
        if self.rows_cut:
            lines.append(f"truncated: {self.rows_cut:,} rows, {self.cut:,} tokens")
        if self.dropped_answers:
            lines.append(
                f"{self.dropped_answers:,} answers of used rows are dropped, as too long or with nothing to train"
            )
        if self.num_documents != self.rows_used:
            lines.append(f"{self.num_documents:,} documents, {self.tokens_per_epoch:,} tokens an epoch")
        return lines


def select_documents(
    cache: TokenCache, *, max_length: int | None, truncation: str = "right", split_at: int | None = None, seed: int = 0
) -> tuple[Documents, Accounting]:
    """The documents of one epoch in the order of the cache, none longer than max_length (None = no limit).

    truncation: what happens to a longer document. "error", "drop", "right" keeps its first tokens, "left" its last;
    "turns" has shortened conversations already (tokenise.py), and is "right" for what has no turns.
    split_at: packing will cut documents into pieces of this length (bfd_split), and the first token of a piece is context.
    Documents with no target left are dropped: the first token of a document is never one. A source of weight 2.5
    gives every document twice and a half of them, drawn once by `seed`, a third time.
    Raises UserError where truncation is "error" and a document is longer, and where nothing is left.
    """
    if truncation not in TRUNCATIONS:
        raise UserError(f"truncation = {truncation!r}", hint=f"one of {', '.join(TRUNCATIONS)}")
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length = {max_length}: the first token of a document is never a target")
    lengths = np.diff(cache.offsets)
    longer = lengths > (max_length or lengths.max())
    if longer.any() and truncation == "error":
        longest = int(lengths.argmax())
        raise UserError(
            f"{longer.sum()} of {len(lengths)} rows are longer than max_length = {max_length}; "
            f"the longest has {lengths[longest]} tokens: {cache.place(longest)}",
            hint='raise max_length, or set truncation = "right", "left" or "drop"',
            exit_code=DATA,
        )
    start, end = cut(cache, max_length, truncation)
    targets = count_targets(cache, start, end)
    if split_at:
        cuts = np.maximum(end - start - 1, 0) // split_at  # the pieces of each document after its first
        first_tokens = np.repeat(start, cuts) + split_at * (ragged_arange(np.zeros_like(cuts), cuts) + 1)
        trained = cache.kinds[first_tokens] >= TRAINED
        if cache.weights is not None:
            trained &= cache.weights[first_tokens] > 0
        targets -= np.bincount(np.repeat(np.arange(len(cuts)), cuts)[trained], minlength=len(cuts))

    too_long = longer & (truncation == "drop")
    usable = ~too_long & (targets > 0)
    copies = np.zeros(len(lengths), dtype=np.int64)
    for number, source in enumerate(cache.sources):
        documents = np.flatnonzero(usable & (cache.source == number))
        copies[documents] = int(source.weight)
        drawn = round((source.weight - int(source.weight)) * len(documents))
        copies[np.random.default_rng([seed, number]).permutation(documents)[:drawn]] += 1
    used = copies > 0

    # Reasons are counted by row: that of its first document, where none of a row's documents is used.
    group = rows_of(cache)
    first_of_row = np.concatenate([[True], group[1:] != group[:-1]])
    row_used = np.bincount(group, weights=used) > 0
    lost = first_of_row & ~row_used[group]
    dropped = sum((Counter(entry["dropped"]) for entry in cache.manifest["sources"]), Counter())
    dropped["longer than max_length"] += int((lost & too_long).sum())
    dropped["with nothing to train"] += int((lost & ~usable & ~longer).sum())
    dropped["with nothing to train after the cut"] += int((lost & ~usable & ~too_long & longer).sum())
    dropped["not drawn (source weight below 1)"] += int((lost & usable).sum())

    kept = end - start
    turns = sum((Counter(entry["turns_cut"]) for entry in cache.manifest["sources"]), Counter())
    accounting = Accounting(
        rows_read=sum(entry["rows_read"] for entry in cache.manifest["sources"]),
        rows_used=int(row_used.sum()),
        dropped={reason: count for reason, count in dropped.items() if count},
        rows_cut=int((used & (kept < lengths)).sum()) + turns["rows"],
        tokens=int(lengths.sum()) + turns["tokens"],
        trained=int(targets[used].sum()),
        context=int((kept - targets)[used].sum()),
        cut=int((lengths - kept)[used].sum()) + turns["tokens"],
        in_dropped=int(lengths[~used].sum()),
        dropped_answers=int((~used & row_used[group]).sum()) + turns["lost_answers"],
        num_documents=int(copies.sum()),
        tokens_per_epoch=int((copies * kept).sum()),
    )
    if not used.any():
        raise UserError("no row is left to train on\n  " + "\n  ".join(accounting.lines()), exit_code=DATA)
    index = np.repeat(np.arange(len(lengths)), copies)
    return Documents(cache, index, start[index], end[index]), accounting


def cut(cache: TokenCache, max_length: int | None, truncation: str) -> tuple[np.ndarray, np.ndarray]:
    """(start, end), int64 [D]: what is left of each document of the cache. "drop" and "error" cut nothing."""
    start, end = np.array(cache.offsets[:-1]), np.array(cache.offsets[1:])
    if max_length and truncation in ("right", "turns"):
        end = np.minimum(end, start + max_length)
    if max_length and truncation == "left":
        start = np.maximum(start, end - max_length)
    return start, end


def rows_of(cache: TokenCache) -> np.ndarray:
    """The number of the row that each document comes from, int64 [D]: 0, 1, 2 ... over all sources, without gaps."""
    new = (np.diff(cache.row) != 0) | (np.diff(cache.source) != 0)
    return np.concatenate([[0], np.cumsum(new)])


def count_targets(cache: TokenCache, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How many tokens of start[d] : end[d], without the first, are trained, for every document d of the cache [D]."""
    targets = np.zeros(len(start), dtype=np.int64)
    first = 0
    while first < len(start):
        last = int(np.searchsorted(cache.offsets, cache.offsets[first] + BLOCK_TOKENS, side="right")) - 1
        last = max(last, first + 1)
        base, stop = cache.offsets[first], cache.offsets[last]
        trained = cache.kinds[base:stop] >= TRAINED
        if cache.weights is not None:
            trained &= cache.weights[base:stop] > 0
        before = np.concatenate([[0], np.cumsum(trained)])  # trained tokens before each position
        block = slice(first, last)
        targets[block] = before[end[block] - base] - before[np.minimum(start[block] + 1, end[block]) - base]
        first = last
    return targets


def split_documents(documents: Documents, fraction: float, seed: int) -> tuple[Documents, Documents]:
    """(train, held out): a `fraction` of the rows, drawn by the seed, is held out, once each; no row is in both.

    Raises UserError where a side would be empty.
    """
    row = rows_of(documents.cache)[documents.index]
    rows = np.unique(row)
    count = round(fraction * len(rows))
    if not 0 < count < len(rows):
        raise UserError(f"holding out {fraction} of {len(rows)} rows leaves {count} and {len(rows) - count}")
    chosen = np.random.default_rng([seed, 1]).permutation(rows)[:count]
    held = np.isin(row, chosen)
    first = np.concatenate([[True], documents.index[1:] != documents.index[:-1]])  # not a repeat: index is sorted

    def take(mask: np.ndarray) -> Documents:
        return Documents(documents.cache, documents.index[mask], documents.start[mask], documents.end[mask])

    return take(~held), take(held & first)


def show_document(documents: Documents, number: int, tokenizer: Tokenizer, *, colour: bool = False) -> str:
    """The text of one document with what is trained in [brackets], or in green."""
    cache, span = documents.cache, slice(documents.start[number], documents.end[number])
    ids, trained = cache.ids[span], cache.kinds[span] >= TRAINED
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("[", "]")
    shown = ""
    for start, end in zip(borders, borders[1:]):
        text = tokenizer.decode(ids[start:end])
        shown += before + text + after if trained[start] else text
    return shown
