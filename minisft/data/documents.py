"""Which documents of the cache are used, how they are cut, and how often an epoch has them; the account of rows and tokens.

The account closes, and `Accounting` asserts it:

    rows read = rows used + rows dropped, by reason
    tokens    = trained + context + cut + in dropped documents

It contains everything that is cut or dropped. It counts a row once, though the weight of its source may repeat it in an
epoch. A row is used if one of its documents is: a conversation that is rendered turn by turn has one for each answer.

In preference data two neighbouring documents, two answers to one prompt, form a unit. Either both are used or neither. Each
is cut alone, at the left too, as TRL's keep_end does: the longer answer keeps less of the prompt, or none of it. Such a pair
shares no copy of the prompt (loader.py). A document with the answer of another row (MISMATCHED) is measured and not trained:
all of it is context.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minisft.data.cache import Documents, TokenCache
from minisft.data.kinds import MISMATCHED, TRAINED
from minisft.data.packing import ragged_arange
from minisft.data.row_format import TRUNCATIONS
from minisft.data.rows import NothingToTrain
from minisft.data.tokenizer import Tokenizer
from minisft.errors import DATA, UserError

MAX_DOCUMENTS = 2**31 - 1  # in an epoch: packs number them in 32 bits
BLOCK_TOKENS = 2**24  # tokens whose kinds are read at a time, to bound memory


@dataclass(frozen=True)
class Accounting:
    """The account of every row and token."""

    rows_read: int
    rows_used: int
    dropped: dict[str, int]  # reason -> rows
    rows_cut: int
    tokens: int
    trained: int  # targets
    context: int  # seen, not trained
    cut: int
    in_dropped: int
    dropped_answers: int  # dropped documents of rows that are used nevertheless
    without_prompt: int  # answers that are used and have lost their whole prompt to the cut; preference data only
    num_documents: int  # in one epoch, with the repeats of source weights
    tokens_per_epoch: int
    unit: str = "documents"  # or "pairs", "labelled answers", of two documents each

    def __post_init__(self) -> None:
        assert self.rows_read == self.rows_used + sum(self.dropped.values()), self
        assert self.tokens == self.trained + self.context + self.cut + self.in_dropped, self

    def lines(self) -> list[str]:
        """The account for the console."""
        num_dropped = sum(self.dropped.values())
        dropped = "".join(f", {count:,} {reason}" for reason, count in self.dropped.items())
        lost = f" + {self.in_dropped:,} in dropped {self.unit}" if self.in_dropped else ""
        num_units = self.num_documents // (1 if self.unit == "documents" else 2)
        lines = [
            f"rows: {self.rows_read:,} read = {self.rows_used:,} used + {num_dropped:,} dropped{dropped}",
            f"tokens: {self.tokens:,} = {self.trained:,} trained + {self.context:,} context + {self.cut:,} cut{lost}",
        ]
        if self.rows_cut:
            lines.append(f"truncated: {self.rows_cut:,} rows, {self.cut:,} tokens")
        lines += self.notes()
        if self.dropped_answers:
            lines.append(
                f"{self.dropped_answers:,} answers of used rows are dropped: too long, or nothing to train in them"
            )
        if num_units != self.rows_used:
            lines.append(f"{num_units:,} {self.unit}, {self.tokens_per_epoch:,} tokens an epoch")
        return lines

    def notes(self) -> list[str]:
        """A warning if answers have lost their prompt."""
        count = self.without_prompt
        return [f"WARNING: {count:,} answers fill max_length and are trained without their prompt"] if count else []


def select_documents(
    cache: TokenCache, *, max_length: int | None, truncation: str = "right", split_at: int | None = None, seed: int = 0
) -> tuple[Documents, Accounting]:
    """The documents of one epoch in the order of the cache, none longer than max_length (None = no limit).

    truncation: what happens to a longer document. "error" refuses it, "drop" drops it, "right" keeps its first tokens, "left"
    its last. "turns" has shortened conversations already (tokenise.py) and cuts the rest like "right". split_at: packing will
    cut documents into pieces of this length (bfd_split), whose first token is context. Dropped are documents with no target
    left (their first token is never one), and pairs whose two documents are the same after the cut. A source of weight 2.5
    gives every document, or pair, twice, and half of them, drawn once by `seed`, a third time.
    Raises UserError if truncation is "error" and a document is longer, and if nothing or too much is left.
    """
    if truncation not in TRUNCATIONS:
        raise UserError(f"truncation = {truncation!r}", hint=f"one of {', '.join(TRUNCATIONS)}")
    if max_length is not None and max_length < 2:
        raise UserError(f"max_length = {max_length}: the first token of a document is never a target")
    lengths = np.diff(cache.offsets)
    longer = (lengths > (max_length or lengths.max())) & ~is_mismatched(cache)
    if longer.any() and truncation == "error":
        longest = int(lengths.argmax())
        raise UserError(
            f"{longer.sum()} of {(~is_mismatched(cache)).sum()} "
            f"{'rows' if cache.role is None else 'answers, with their prompts,'} are longer than max_length = {max_length}; "
            f"the longest has {lengths[longest]} tokens: {cache.place(longest)}",
            hint='raise max_length, or set truncation = "right", "left" or "drop"',
            exit_code=DATA,
        )
    start, end = cut(cache, max_length, truncation)
    targets = count_targets(cache, start, end)
    if split_at:
        targets -= _count_first_tokens(cache, start, end, split_at)
    reasons = _reasons(cache, start, end, targets, longer, is_dropped=truncation == "drop")
    copies = _copies(cache, ~np.any(list(reasons.values()), axis=0), seed)
    reasons["not drawn (source weight below 1)"] = copies == 0
    accounting = _account(cache, start, end, targets, copies, reasons)
    if not copies.any():
        raise NothingToTrain("no row is left to train on\n  " + "\n  ".join(accounting.lines()), exit_code=DATA)
    if (number := int(copies.sum()) * cache.group) > MAX_DOCUMENTS:
        hint = "lower the weights of the sources"
        raise UserError(f"{number:,} documents an epoch, at most {MAX_DOCUMENTS:,}", hint=hint, exit_code=DATA)
    unit = np.repeat(np.arange(len(copies)), copies)
    index = (unit[:, None] * cache.group + np.arange(cache.group)).ravel()
    return Documents(cache, index, start[index], end[index], targets[index]), accounting


def is_mismatched(cache: TokenCache) -> np.ndarray:
    """Which documents of the cache hold an answer of another row, bool [D]."""
    return np.zeros(len(cache.source), dtype=bool) if cache.role is None else cache.role == MISMATCHED


def _any_of(cache: TokenCache, documents: np.ndarray) -> np.ndarray:
    """Which units have at least one of these documents (bool [D]), bool [U]."""
    return np.any(documents.reshape(-1, cache.group), axis=1)


def _is_cut(cache: TokenCache, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which units have lost tokens to the cut, bool [U]."""
    return _any_of(cache, (end - start < np.diff(cache.offsets)) & ~is_mismatched(cache))


def _reasons(
    cache: TokenCache, start: np.ndarray, end: np.ndarray, targets: np.ndarray, longer: np.ndarray, *, is_dropped: bool
) -> dict[str, np.ndarray]:
    """Why units are not used: {reason: the units to which it applies, bool [U]}. The first that applies is reported.

    targets [D]: targets of each document after the cut. longer (bool [D]): longer than max_length, which drops a document if
    is_dropped.
    """
    without_target, is_longer = _any_of(cache, targets == 0), _any_of(cache, longer)
    reasons = {"longer than max_length": is_longer & is_dropped}
    if cache.group > 1:
        is_cut = _is_cut(cache, start, end)
        reasons["whose prompt fills max_length"] = without_target & is_cut
        reasons["equal after the cut"] = _are_equal(cache, start, end, is_cut & (cache.unit == "pairs"))
    reasons["with nothing to train after the cut"] = without_target & is_longer
    reasons["with nothing to train"] = without_target
    return reasons


def _copies(cache: TokenCache, usable: np.ndarray, seed: int) -> np.ndarray:
    """How often an epoch has each unit, int64 [U]: as its source's weight says, 0 if it is not usable (bool [U])."""
    copies = np.zeros(len(usable), dtype=np.int64)
    for number, source in enumerate(cache.sources):
        units = np.flatnonzero(usable & (cache.source[:: cache.group] == number))
        copies[units] = int(source.weight)
        drawn = round((source.weight - int(source.weight)) * len(units))
        copies[np.random.default_rng([seed, number]).permutation(units)[:drawn]] += 1
    return copies


def _account(
    cache: TokenCache,
    start: np.ndarray,
    end: np.ndarray,
    targets: np.ndarray,
    copies: np.ndarray,
    reasons: dict[str, np.ndarray],
) -> Accounting:
    """The account of documents that are cut to start[d] : end[d], with targets [D]; an epoch has copies [U] of each unit."""
    entries, lengths, kept, used = cache.manifest["sources"], np.diff(cache.offsets), end - start, copies > 0
    # A row without a used unit is dropped, for the reason of its first unit.
    row = rows_of(cache)[:: cache.group]
    row_used = np.bincount(row, weights=used) > 0
    lost = np.concatenate([[True], row[1:] != row[:-1]]) & ~row_used[row]
    dropped = sum((Counter(entry["dropped"]) for entry in entries), Counter())
    for reason, is_true in reasons.items():
        dropped[reason] += int((lost & is_true).sum())
        lost &= ~is_true

    document_used = np.repeat(used, cache.group)
    trained = int(targets[document_used & ~is_mismatched(cache)].sum())
    turns = sum((Counter(entry["turns_cut"]) for entry in entries), Counter())
    is_cut = (start > cache.offsets[:-1]) & document_used & ~is_mismatched(cache)
    without_prompt = 0 if cache.role is None else int((start[is_cut] >= first_trained(cache)[is_cut]).sum())
    return Accounting(
        rows_read=sum(entry["rows_read"] for entry in entries),
        rows_used=int(row_used.sum()),
        dropped={reason: count for reason, count in dropped.items() if count},
        rows_cut=int((used & _is_cut(cache, start, end)).sum()) + turns["rows"],
        tokens=int(lengths.sum()) + turns["tokens"],
        trained=trained,
        context=int(kept[document_used].sum()) - trained,
        cut=int((lengths - kept)[document_used].sum()) + turns["tokens"],
        in_dropped=int(lengths[~document_used].sum()),
        dropped_answers=int((~used & row_used[row]).sum()) + turns["lost_answers"],
        without_prompt=without_prompt,
        num_documents=int(copies.sum()) * cache.group,
        tokens_per_epoch=int((np.repeat(copies, cache.group) * kept).sum()),
        unit=cache.unit,
    )


def cut(cache: TokenCache, max_length: int | None, truncation: str) -> tuple[np.ndarray, np.ndarray]:
    """(start, end), int64 [D]: the tokens that are left of each document of the cache. "drop" and "error" cut nothing else.

    Each document is cut alone. A MISMATCHED one that is too long costs no row: "drop" and "error" cut its end off.
    """
    start, end = np.array(cache.offsets[:-1]), np.array(cache.offsets[1:])
    if max_length and truncation == "left":
        start = np.maximum(start, end - max_length)
    elif max_length:
        at_right = slice(None) if truncation in ("right", "turns") else is_mismatched(cache)
        end[at_right] = np.minimum(end, start + max_length)[at_right]
    return start, end


def rows_of(cache: TokenCache) -> np.ndarray:
    """The number of the row that each document comes from, int64 [D]: 0, 1, 2 ... over all sources, without gaps."""
    new = (np.diff(cache.row) != 0) | (np.diff(cache.source) != 0)
    return np.concatenate([[0], np.cumsum(new)])


def blocks(cache: TokenCache) -> Iterator[tuple[slice, int, int]]:
    """The documents of the cache in blocks of some million tokens: (documents, first token, token after the last)."""
    first, num_documents = 0, len(cache.offsets) - 1
    while first < num_documents:
        last = int(np.searchsorted(cache.offsets, cache.offsets[first] + BLOCK_TOKENS, side="right")) - 1
        last = max(last, first + 1)
        yield slice(first, last), int(cache.offsets[first]), int(cache.offsets[last])
        first = last


def count_targets(cache: TokenCache, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The targets of every document of the cache, int64 [D]: the trained tokens of start[d] : end[d], without the first."""
    targets = np.zeros(len(start), dtype=np.int64)
    for block, base, stop in blocks(cache):
        trained = cache.kinds[base:stop] >= TRAINED
        if cache.weights is not None:
            trained &= cache.weights[base:stop] > 0
        before = np.concatenate([[0], np.cumsum(trained)])  # trained tokens before each position
        targets[block] = before[end[block] - base] - before[np.minimum(start[block] + 1, end[block]) - base]
    return targets


def first_trained(cache: TokenCache) -> np.ndarray:
    """The place in the cache of each document's first trained token, int64 [D]; its end if it has none."""
    first = np.array(cache.offsets[1:])
    for block, base, stop in blocks(cache):
        trained = np.append(np.flatnonzero(cache.kinds[base:stop] >= TRAINED) + base, stop)
        first[block] = np.minimum(first[block], trained[np.searchsorted(trained, cache.offsets[:-1][block])])
    return first


def _count_first_tokens(cache: TokenCache, start: np.ndarray, end: np.ndarray, split_at: int) -> np.ndarray:
    """How many trained tokens become the first of a piece when start[d] : end[d] is cut every split_at tokens, int64 [D]."""
    cuts = np.maximum(end - start - 1, 0) // split_at  # the pieces of each document after its first
    first_tokens = np.repeat(start, cuts) + split_at * (ragged_arange(np.zeros_like(cuts), cuts) + 1)
    trained = cache.kinds[first_tokens] >= TRAINED
    if cache.weights is not None:
        trained &= cache.weights[first_tokens] > 0
    return np.bincount(np.repeat(np.arange(len(cuts)), cuts)[trained], minlength=len(cuts))


def _are_equal(cache: TokenCache, start: np.ndarray, end: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Which of these units (bool [U]) hold the same tokens twice, bool [U]."""
    equal = np.zeros(len(units), dtype=bool)
    for unit in np.flatnonzero(units):
        chosen, rejected = (cache.ids[start[d] : end[d]] for d in (2 * unit, 2 * unit + 1))
        equal[unit] = np.array_equal(chosen, rejected)
    return equal


def split_documents(documents: Documents, fraction: float, seed: int) -> tuple[Documents, Documents]:
    """(train, held out): a `fraction` of the rows, drawn by the seed, is held out, once each; no row is in both.

    Raises UserError if a side would be empty.
    """
    unit = documents.index[:: documents.group]  # the first document of each unit
    row = rows_of(documents.cache)[unit]
    rows = np.unique(row)
    count = round(fraction * len(rows))
    if not 0 < count < len(rows):
        raise UserError(f"holding out {fraction} of {len(rows)} rows leaves {count} and {len(rows) - count}")
    chosen = np.random.default_rng([seed, 1]).permutation(rows)[:count]
    held = np.isin(row, chosen)
    first = np.concatenate([[True], unit[1:] != unit[:-1]])  # no repeat; the units are sorted
    return documents.take(~held), documents.take(held & first)


def show_document(documents: Documents, number: int, tokenizer: Tokenizer, *, colour: bool = False) -> str:
    """The text of one document, its trained tokens in [brackets] or in green."""
    cache, span = documents.cache, slice(documents.start[number], documents.end[number])
    ids, trained = cache.ids[span], cache.kinds[span] >= TRAINED
    borders = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("[", "]")
    shown = ""
    for start, end in zip(borders, borders[1:]):
        text = tokenizer.decode_between(ids, start, end)
        shown += before + text + after if trained[start] else text
    return shown
