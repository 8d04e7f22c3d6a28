"""The problems of a data set, counted before a GPU is paid for.

Most failed runs fail because of their data: answers cut off, an end of turn that is never trained, an empty mask, rows that
are in the evaluation too. The token cache shows all of these. `quick_findings` reads kinds and bounds only (a fraction of a
second for ten million tokens) and is part of every run; `all_findings` also decodes, encodes and hashes every document.

A finding has the number of documents with a problem, their share of all documents that were checked, and the places of the
first ones. The limits of the configuration's [audit] section say which share is too large.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from minisft.data.cache import Documents, TokenCache, source_notes
from minisft.data.documents import blocks, count_targets, cut, is_mismatched, rows_of
from minisft.data.kinds import (
    ANSWER,
    HEADER,
    KIND_MASK,
    MISMATCHED,
    REASONING,
    SPECIAL,
    SYSTEM,
    TERMINATOR,
    TOKEN_KINDS,
    TOOL_CALL,
    TRAINED,
)
from minisft.data.packing import ragged_arange
from minisft.data.tokenizer import Tokenizer

NUM_EXAMPLES = 3
ROUND_TRIP_ROWS = 512  # documents that are decoded and encoded at a time
OF_ANSWER = (ANSWER, REASONING, TOOL_CALL)
NO_PROMPT = (SPECIAL, HEADER, SYSTEM)  # two documents that share only these tokens do not share a prompt
BY_THE_TEMPLATE = (SPECIAL, HEADER, TERMINATOR)  # kinds that special tokens of the template have

TITLES = {  # name of a finding, and of its limit: max_<name>
    "no_label": "documents with nothing to train",
    "lost_answer": "documents with nothing left to train after the cut at max_length",
    "untrained_end": "documents with an answer whose end is not trained: the model would not learn to stop",
    "double_bos": "documents that begin with two BOS tokens",
    "cut_answer": "documents that lose a part of their targets by the cut at max_length",
    "too_long": "documents longer than max_length",
    "control_token": "rows with the text of a control token in a message",
    "straddling": "trained tokens that begin before or end after the trained text",
    "round_trip": "documents whose text is encoded to other tokens than theirs",
    "duplicate": "documents that are a copy of an earlier one",
    "eval_overlap": "evaluation documents that are trained on too",
    "eval_prompt_overlap": "evaluation documents whose prompt is trained on too",
}


@dataclass(frozen=True)
class Finding:
    name: str  # a key of TITLES
    count: int
    total: int  # documents, rows or tokens that were checked
    examples: tuple[str, ...] = ()  # places of the first ones, such as data.jsonl:12
    documents: tuple[int, ...] = ()  # their numbers in the cache

    @property
    def share(self) -> float:
        return self.count / self.total if self.total else 0.0

    def exceeds(self, limits: dict[str, float]) -> bool:
        """limits: {"max_<name>": largest share} for every name in TITLES."""
        return self.share > limits[f"max_{self.name}"]

    def __str__(self) -> str:
        where = f": {', '.join(self.examples)}" if self.examples else ""
        return f"{self.count:,} of {self.total:,} ({self.share:.2%}) {TITLES[self.name]}{where}"


# ------------------------------------------------------------------------------------------------- findings


def quick_findings(cache: TokenCache, tokenizer: Tokenizer, max_length: int | None, truncation: str) -> list[Finding]:
    """The findings that kinds and bounds show, for all documents of the cache, also those that `select_documents` drops.

    In preference data both answers are checked, but not the MISMATCHED documents, which are made of others.
    max_length, truncation: how `select_documents` cuts. Findings with a count of 0 are left out.
    """
    first, last = np.array(cache.offsets[:-1]), np.array(cache.offsets[1:])
    start, end = cut(cache, max_length, truncation)
    whole, kept = count_targets(cache, first, last), count_targets(cache, start, end)

    bos = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    second = np.minimum(first + 1, last - 1)
    # In rows of ids the stop token does not have the kind TERMINATOR, so it is recognised by its id.
    stops = list(tokenizer.stop_ids)
    final = cache.kinds[last - 1]
    ends_open = (end == last) & (final >= TRAINED) & np.isin(final & KIND_MASK, OF_ANSWER)
    ends_open &= ~np.isin(cache.ids[last - 1], stops)
    ours = np.flatnonzero(~is_mismatched(cache))
    found = {
        "no_label": count_targets(replace(cache, weights=None), first, last) == 0,  # a weight of 0 is the user's choice
        "lost_answer": (whole > 0) & (kept == 0),
        "untrained_end": (_count_open_ends(cache, start, np.minimum(end, last - 1), stops) > 0) | ends_open,
        "double_bos": (last - first > 1) & (cache.ids[first] == bos) & (cache.ids[second] == bos),
        "cut_answer": (kept > 0) & (kept < whole),
        "too_long": last - first > (max_length or last[-1]),
    }
    findings = [_finding(name, cache, ours[mask[ours]], len(ours)) for name, mask in found.items()]
    entries = cache.manifest["sources"]
    rows = sum(entry["rows_read"] for entry in entries)
    findings.append(Finding("control_token", sum(entry["control_tokens"] for entry in entries), rows))
    findings.append(Finding("straddling", sum(entry["straddling"] for entry in entries), int(whole[ours].sum())))
    return [finding for finding in findings if finding.count]


def all_findings(documents: Documents, tokenizer: Tokenizer, max_length: int | None, truncation: str) -> list[Finding]:
    """The quick findings, and those for which every used document is decoded or hashed."""
    cache, used = documents.cache, _used(documents)
    changed, with_control_token = _read_again(cache, used, tokenizer)
    findings = quick_findings(cache, tokenizer, max_length, truncation)
    for i, finding in enumerate(findings):
        if finding.name == "control_token":  # counted when the rows were read; only their places are found here
            places = tuple(cache.place(d) for d in with_control_token[:NUM_EXAMPLES])
            findings[i] = replace(finding, examples=places, documents=tuple(with_control_token))
    seen, copies = set(), []
    digests = list(_digests(cache, used))
    size = 2 if cache.unit == "pairs" else 1  # a pair is a copy if both of its answers are
    for i in range(0, len(used), size):
        digest = b"".join(digest or b"" for digest in digests[i : i + size])
        copies += used[i : i + size].tolist() if digest in seen else []
        seen.add(digest)
    for name, found in (("round_trip", changed), ("duplicate", copies)):
        findings += [_finding(name, cache, np.array(found, dtype=int), len(used))] if found else []
    return findings


def overlap(train: Documents, held_out: Documents) -> list[Finding]:
    """Evaluation documents that are trained on too: the whole, or only the prompt (the tokens before the first trained one)."""
    findings = []
    for name, prompt_only in (("eval_overlap", False), ("eval_prompt_overlap", True)):
        trained = set(_digests(train.cache, _used(train), prompt_only)) - {None}
        used = _used(held_out)
        digests = _digests(held_out.cache, used, prompt_only)
        both = [d for d, digest in zip(used, digests) if digest in trained]
        findings.append(_finding(name, held_out.cache, np.array(both, dtype=int), len(used)))
    return [finding for finding in findings if finding.count]


def _used(documents: Documents) -> np.ndarray:
    """The documents of the cache that are used, each once, without the MISMATCHED, int64."""
    used = np.unique(documents.index)
    return used[~is_mismatched(documents.cache)[used]]


def _finding(name: str, cache: TokenCache, documents: np.ndarray, total: int) -> Finding:
    examples = tuple(dict.fromkeys(cache.place(int(d)) for d in documents[: 4 * NUM_EXAMPLES]))[:NUM_EXAMPLES]  # rows
    return Finding(name, len(documents), total, examples, tuple(documents.tolist()))


def _count_open_ends(cache: TokenCache, start: np.ndarray, end: np.ndarray, stops: list[int]) -> np.ndarray:
    """How often an answer has an untrained end, for every document, int64 [D]: tokens among start[d] : end[d] that are trained
    and of an answer, but no stop token, and whose next token is neither trained nor of an answer."""
    counts = np.zeros(len(start), dtype=np.int64)
    for block, base, stop in blocks(cache):
        kinds = np.append(cache.kinds[base:stop], np.uint8(0))
        of_answer, trained = np.isin(kinds & KIND_MASK, OF_ANSWER), kinds >= TRAINED
        is_open = trained[:-1] & of_answer[:-1] & ~trained[1:] & ~of_answer[1:]
        is_open &= ~np.isin(cache.ids[base:stop], stops)
        before = np.concatenate([[0], np.cumsum(is_open)])
        counts[block] = before[end[block] - base] - before[start[block] - base]
    return counts


def _digests(cache: TokenCache, documents: np.ndarray, prompt_only: bool = False) -> Iterator[bytes | None]:
    """A hash of the ids of each document, or of its prompt; None if it has none."""
    for d in documents:
        ids = cache.ids[cache.offsets[d] : cache.offsets[d + 1]]
        if prompt_only:
            kinds = cache.kinds[cache.offsets[d] : cache.offsets[d + 1]]
            trained = kinds >= TRAINED
            length = trained.argmax() if trained.any() else 0
            ids = ids[:length] if not np.isin(kinds[:length], NO_PROMPT).all() else ids[:0]
        yield blake2b(ids.tobytes(), digest_size=16).digest() if len(ids) else None


def _read_again(cache: TokenCache, documents: np.ndarray, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(documents with encode(decode(ids)) != ids, documents with a control token in a content).

    The ids of the former were encoded in parts, or decoding loses some of their text. A control token of the latter may be
    encoded as the token or as ordinary text.
    """
    changed, with_control_token = [], []
    # other sources may hold special tokens on purpose, see encoding.py
    has_them = [entry["control_tokens"] > 0 for entry in cache.manifest["sources"]]
    special = list(tokenizer.special_ids)
    for at in range(0, len(documents), ROUND_TRIP_ROWS):
        chunk = documents[at : at + ROUND_TRIP_ROWS]
        ids = [cache.ids[cache.offsets[d] : cache.offsets[d + 1]] for d in chunk]
        texts = tokenizer.decode_documents([i.tolist() for i in ids])
        for d, before, text, after in zip(chunk.tolist(), ids, texts, tokenizer.encode_batch(texts)):
            if before.tolist() != after:
                changed.append(d)
            if not has_them[cache.source[d]]:
                continue
            kinds = cache.kinds[cache.offsets[d] : cache.offsets[d + 1]] & KIND_MASK
            is_special = np.isin(before, special)
            written = sum(1 for _ in tokenizer.control_tokens.finditer(text))
            if written > is_special.sum() or (is_special & ~np.isin(kinds, BY_THE_TEMPLATE)).any():
                with_control_token.append(d)
    return changed, with_control_token


# ------------------------------------------------------------------------------------------------- tables


def count_tokens(documents: Documents, split_at: int | None = None) -> np.ndarray:
    """Tokens of the documents, each once, int64 [sources, kinds, 2]: [..., 0] context, [..., 1] targets.

    Targets are the same as in `select_documents`, so that the sums are those of its account. split_at: as there.
    """
    cache = documents.cache
    shape = (len(cache.sources), len(TOKEN_KINDS), 2)
    counts = np.zeros(shape, dtype=np.int64).ravel()
    used, place = np.unique(documents.index, return_index=True)
    starts, lengths = documents.start[place], documents.lengths[place]
    block_of = np.cumsum(lengths) // 2**20  # to bound memory
    for block in np.split(np.arange(len(used)), np.flatnonzero(np.diff(block_of)) + 1):
        token = ragged_arange(starts[block], lengths[block])
        position = token - np.repeat(starts[block], lengths[block])
        kinds = cache.kinds[token]
        target = (kinds >= TRAINED) & (position % (split_at or 2**40) > 0)
        target &= ~np.repeat(is_mismatched(cache)[used[block]], lengths[block])
        if cache.weights is not None:
            target &= cache.weights[token] > 0
        source = np.repeat(cache.source[used[block]], lengths[block]).astype(np.int64)
        counts += np.bincount((source * len(TOKEN_KINDS) + (kinds & KIND_MASK)) * 2 + target, minlength=counts.size)
    return counts.reshape(shape)


def kind_table(counts: np.ndarray) -> dict[str, dict[str, int]]:
    """{kind: {"trained": tokens, "context": tokens}} of count_tokens."""
    sums = counts.sum(axis=0).tolist()
    return {name: {"trained": sums[i][1], "context": sums[i][0]} for i, name in enumerate(TOKEN_KINDS) if any(sums[i])}


def source_table(documents: Documents, counts: np.ndarray) -> list[dict]:
    """The rows and tokens of each source. Rows that are read but not used are dropped."""
    cache = documents.cache
    rows = rows_of(cache)
    _, first = np.unique(rows[documents.index], return_index=True)  # a document of each row that is used
    rows_used = np.bincount(cache.source[documents.index[first]], minlength=len(cache.sources))
    in_epoch = np.bincount(cache.source[documents.index], minlength=len(cache.sources))
    return [
        {
            "source": source.label,
            "layout": entry["layout"],
            "notes": source_notes(entry) + (cache.label_notes() if number == 0 else []),
            "rows_read": entry["rows_read"],
            "rows_used": int(rows_used[number]),
            "bad_rows": entry["dropped"],
            "found_by": entry["strategies"],
            "documents_per_epoch": int(in_epoch[number]),
            "trained": int(counts[number, :, 1].sum()),
            "context": int(counts[number, :, 0].sum()),
        }
        for number, (source, entry) in enumerate(zip(cache.sources, cache.manifest["sources"]))
    ]


def length_histogram(lengths: np.ndarray, bins: int = 16) -> list[dict[str, int]]:
    """Documents by length: [{"from", "to", "documents"}] with `to` excluded. A bin is 1, 2 or 5 times a power of ten wide, so
    that about `bins` reach the 99th percentile; the last bin has all longer documents too."""
    high, low = int(np.percentile(lengths, 99, method="higher")), int(lengths.min())
    wanted = (high - low + 1) / bins
    step = next(m * 10**e for e in range(12) for m in (1, 2, 5) if m * 10**e >= wanted)
    first, last = low // step, high // step
    counts = np.bincount(np.minimum(lengths // step, last) - first, minlength=last - first + 1).tolist()
    table = [{"from": (first + i) * step, "to": (first + i + 1) * step, "documents": n} for i, n in enumerate(counts)]
    table[-1]["to"] = max(table[-1]["to"], int(lengths.max()) + 1)
    return table


def length_summary(lengths: np.ndarray) -> dict[str, float]:
    quantiles = {"median": 50, "p90": 90, "p99": 99}
    summary: dict[str, float] = {"shortest": int(lengths.min()), "mean": round(float(lengths.mean()), 1)}
    summary |= {name: int(np.percentile(lengths, q, method="higher")) for name, q in quantiles.items()}
    return summary | {"longest": int(lengths.max())}


# ------------------------------------------------------------------------------------------------- one document

UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # could repaint a terminal


def printable(text: str) -> str:
    """The text with Python's escapes in place of characters that could repaint a terminal or reorder a line."""
    return UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def place_of(cache: TokenCache, d: int) -> str:
    """The place of document d, and which answer of a unit it is: data.jsonl:12, chosen."""
    names = ("chosen", "rejected") if cache.unit == "pairs" else ("good", "bad", "with an answer of another row")
    return cache.place(d) if cache.role is None else f"{cache.place(d)}, {names[cache.role[d]]}"


@dataclass(frozen=True)
class Stretch:
    """Neighbouring tokens of a document with the same kind and state."""

    text: str
    kind: str  # of TOKEN_KINDS
    state: str  # "trained" | "context" | "cut"
    is_special: bool


def stretches(cache: TokenCache, d: int, start: int, end: int, tokenizer: Tokenizer, limit: int) -> list[Stretch]:
    """The first `limit` tokens of document d, of which start : end are used. Special tokens are written out, and characters
    that could repaint a terminal or reorder a line are escaped."""
    span = slice(int(cache.offsets[d]), min(int(cache.offsets[d + 1]), int(cache.offsets[d]) + limit))
    ids, kinds, at = cache.ids[span], cache.kinds[span], np.arange(span.start, span.stop)
    state = ((kinds >= TRAINED) & (at > start)).astype(int)
    if cache.weights is not None:
        state &= cache.weights[span] > 0
    if cache.role is not None and cache.role[d] == MISMATCHED:
        state[:] = 0
    state[(at < start) | (at >= end)] = 2
    special = np.isin(ids, list(tokenizer.special_ids))
    look = np.stack([kinds & KIND_MASK, state, special])
    borders = [0, *(np.flatnonzero(np.diff(look).any(axis=0)) + 1).tolist(), len(ids)]
    return [
        Stretch(
            printable(tokenizer.decode_between(ids, a, b)),
            TOKEN_KINDS[look[0, a]],
            ("context", "trained", "cut")[look[1, a]],
            bool(look[2, a]),
        )
        for a, b in zip(borders, borders[1:])
    ]
