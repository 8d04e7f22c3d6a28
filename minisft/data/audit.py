"""What is wrong with a data set, counted before a GPU is paid for.

Most lost runs are lost in the data: answers cut off, an end of turn that is never trained, a mask that is empty, rows that
are in the evaluation too. All of it can be read from the token cache. `quick_findings` looks at kinds and bounds only (a
fraction of a second for millions of tokens) and is part of every run; `all_findings` also decodes, encodes and hashes
every document.

A finding is a count of documents, its share of those looked at, and where the first ones are. Which share is too much is
told by the limits (the configuration's [audit] section).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np

from minisft.data.batch import ANSWER, KIND_MASK, KINDS, REASONING, TOOL_CALL, TRAINED
from minisft.data.cache import Documents, TokenCache
from minisft.data.documents import BLOCK_TOKENS, count_targets
from minisft.data.tokenizer import Tokenizer

NUM_EXAMPLES = 3
ROUND_TRIP_ROWS = 512  # documents that are decoded and encoded together
OF_ANSWER = (ANSWER, REASONING, TOOL_CALL)

TITLES = {  # name of a finding, and of its limit: max_<name>
    "no_label": "documents with nothing to train",
    "untrained_end": "answers whose end is not trained, so that the model would not learn to stop",
    "double_bos": "documents that begin with two BOS tokens",
    "cut_answer": "documents whose trained part is cut by max_length",
    "too_long": "documents longer than max_length",
    "control_token": "rows with the text of a control token in a message",
    "straddling": "trained tokens that begin before or end after what is trained",
    "round_trip": "documents whose text is encoded to other tokens than they hold",
    "duplicate": "documents that are a copy of an earlier one",
    "eval_overlap": "evaluation documents that are trained on too",
    "eval_prompt_overlap": "evaluation documents whose prompt is trained on too",
}


@dataclass(frozen=True)
class Finding:
    name: str  # a key of TITLES
    count: int
    total: int  # of how many
    examples: tuple[str, ...] = ()  # places, such as data.jsonl:12
    documents: tuple[int, ...] = ()  # all of them, by their number in the cache

    @property
    def share(self) -> float:
        return self.count / self.total if self.total else 0.0

    def exceeds(self, limits: dict[str, float]) -> bool:
        """limits: {"max_<name>": largest share}; a name without one has no limit."""
        return self.share > limits.get(f"max_{self.name}", 1.0)

    def __str__(self) -> str:
        where = f": {', '.join(self.examples)}" if self.examples else ""
        return f"{self.count:,} of {self.total:,} ({self.share:.2%}) {TITLES[self.name]}{where}"


def quick_findings(documents: Documents, tokenizer: Tokenizer, max_length: int | None) -> list[Finding]:
    """What kinds and bounds tell, of the documents as they will be trained; those that were dropped for having no label
    are looked at too. Findings with a count of 0 are left out."""
    cache = documents.cache
    first, last = cache.offsets[:-1], cache.offsets[1:]
    start, end = np.array(first), np.array(last)
    used = np.unique(documents.index)
    place = np.searchsorted(documents.index, used)
    start[used], end[used] = documents.start[place], documents.end[place]
    whole, kept = count_targets(cache, first, last), count_targets(cache, start, end)

    bos = -1 if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    second = np.minimum(first + 1, last - 1)
    double_bos = (last - first > 1) & (cache.ids[first] == bos) & (cache.ids[second] == bos)
    # The stop token of rows that came as ids is not known as a terminator, but it is one.
    stops = list(tokenizer.stop_ids)
    final = cache.kinds[last - 1]
    ends_open = (end == last) & (final >= TRAINED) & np.isin(final & KIND_MASK, OF_ANSWER)
    ends_open &= ~np.isin(cache.ids[last - 1], stops)
    untrained_end = (_count_open_ends(cache, first, last - 1, stops) > 0) | ends_open
    found = {
        "no_label": count_targets(replace(cache, weights=None), first, last) == 0,  # a weight of 0 is somebody's choice
        "untrained_end": untrained_end,
        "double_bos": double_bos,
        "cut_answer": kept < whole,
        "too_long": last - first > (max_length or last[-1]),
    }
    findings = [_finding(name, cache, np.flatnonzero(mask), len(first)) for name, mask in found.items()]
    entries = cache.manifest["sources"]
    rows = sum(entry["rows_read"] for entry in entries)
    findings.append(Finding("control_token", sum(entry["control_tokens"] for entry in entries), rows))
    findings.append(Finding("straddling", sum(entry["straddling"] for entry in entries), int(whole.sum())))
    return [finding for finding in findings if finding.count]


def all_findings(documents: Documents, tokenizer: Tokenizer, max_length: int | None) -> list[Finding]:
    """The quick ones, and those that need every document decoded or hashed."""
    cache, used = documents.cache, np.unique(documents.index)
    seen, copies = set(), []
    for d, digest in zip(used, _digests(cache, used)):
        copies += [d] if digest in seen else []
        seen.add(digest)
    more = [
        _finding("round_trip", cache, np.array(list(_changed_by_a_round_trip(cache, used, tokenizer)), int), len(used)),
        _finding("duplicate", cache, np.array(copies, dtype=int), len(used)),
    ]
    return quick_findings(documents, tokenizer, max_length) + [finding for finding in more if finding.count]


def overlap(train: Documents, held_out: Documents) -> list[Finding]:
    """Evaluation documents that are trained on: whole, and by their prompt (the tokens before the first trained one)."""
    findings = []
    for name, cut in (("eval_overlap", False), ("eval_prompt_overlap", True)):
        trained = set(_digests(train.cache, np.unique(train.index), cut)) - {None}
        looked_at = np.unique(held_out.index)
        both = [d for d, digest in zip(looked_at, _digests(held_out.cache, looked_at, cut)) if digest in trained]
        findings.append(_finding(name, held_out.cache, np.array(both, dtype=int), len(looked_at)))
    return [finding for finding in findings if finding.count]


def _finding(name: str, cache: TokenCache, documents: np.ndarray, total: int) -> Finding:
    examples = tuple(cache.place(int(d)) for d in documents[:NUM_EXAMPLES])
    return Finding(name, len(documents), total, examples, tuple(documents.tolist()))


def _count_open_ends(cache: TokenCache, start: np.ndarray, end: np.ndarray, stops: list[int]) -> np.ndarray:
    """How many of the tokens start[d] : end[d] are trained, of an answer, no stop token, and followed by what is neither
    trained nor of an answer, for every document."""
    counts = np.zeros(len(start), dtype=np.int64)
    first = 0
    while first < len(start):
        last = int(np.searchsorted(cache.offsets, cache.offsets[first] + BLOCK_TOKENS, side="right")) - 1
        last = max(last, first + 1)
        base, stop = cache.offsets[first], cache.offsets[last]
        kinds = np.append(cache.kinds[base:stop], np.uint8(0))
        of_answer, trained = np.isin(kinds & KIND_MASK, OF_ANSWER), kinds >= TRAINED
        is_open = trained[:-1] & of_answer[:-1] & ~trained[1:] & ~of_answer[1:]
        is_open &= ~np.isin(cache.ids[base:stop], stops)
        before = np.concatenate([[0], np.cumsum(is_open)])
        block = slice(first, last)
        counts[block] = before[end[block] - base] - before[start[block] - base]
        first = last
    return counts


def _digests(cache: TokenCache, documents: np.ndarray, prompt_only: bool = False) -> Iterator[bytes | None]:
    """A hash of the ids of each document, or of its prompt: None where it has none."""
    for d in documents:
        ids = cache.ids[cache.offsets[d] : cache.offsets[d + 1]]
        if prompt_only:
            trained = cache.kinds[cache.offsets[d] : cache.offsets[d + 1]] >= TRAINED
            ids = ids[: trained.argmax()] if trained.any() else ids[:0]
        yield blake2b(ids.tobytes(), digest_size=16).digest() if len(ids) else None


def _changed_by_a_round_trip(cache: TokenCache, documents: np.ndarray, tokenizer: Tokenizer) -> Iterator[int]:
    """Documents d with encode(decode(ids)) != ids: text that was encoded in parts, or that the tokenizer cannot hold."""
    for at in range(0, len(documents), ROUND_TRIP_ROWS):
        chunk = documents[at : at + ROUND_TRIP_ROWS]
        ids = [cache.ids[cache.offsets[d] : cache.offsets[d + 1]].tolist() for d in chunk]
        texts = tokenizer.backend.decode_batch(ids, skip_special_tokens=False)
        for d, before, after in zip(chunk, ids, tokenizer.encode_batch(texts)):
            if before != after:
                yield int(d)


# ------------------------------------------------------------------------------------------------- tables


def tokens_by_kind(documents: Documents) -> dict[str, dict[str, int]]:
    """{kind: {"trained": tokens, "context": tokens}} of the documents as they are trained, once each."""
    counts = np.zeros(256, dtype=np.int64)
    used, place = np.unique(documents.index, return_index=True)
    for start, end in zip(documents.start[place], documents.end[place]):
        counts += np.bincount(documents.cache.kinds[start:end], minlength=256)
    table = {name: {"trained": int(counts[i | TRAINED]), "context": int(counts[i])} for i, name in enumerate(KINDS)}
    return {name: row for name, row in table.items() if row["trained"] or row["context"]}


def rows_by_source(documents: Documents) -> list[dict]:
    """What became of the rows of each source, and how many tokens of it are in an epoch."""
    cache = documents.cache
    tokens = np.bincount(cache.source[documents.index], weights=documents.lengths, minlength=len(cache.sources))
    used = np.bincount(cache.source[documents.index], minlength=len(cache.sources))
    return [
        {
            "source": source.label,
            "layout": entry["layout"],
            "rows_read": entry["rows_read"],
            "dropped": entry["dropped"],
            "found_by": entry["strategies"],
            "documents": int(used[number]),
            "tokens": int(tokens[number]),
        }
        for number, (source, entry) in enumerate(zip(cache.sources, cache.manifest["sources"]))
    ]


def length_histogram(lengths: np.ndarray, bins: int = 16) -> list[dict[str, int]]:
    """Documents by length: [{"from", "to", "documents"}] with `to` excluded, in steps of a round number of tokens."""
    step = max(1, -(-int(lengths.max() + 1) // bins))
    magnitude = 10 ** (len(str(step)) - 1)
    step = -(-step // magnitude) * magnitude
    counts = Counter((lengths // step).tolist())
    return [{"from": i * step, "to": (i + 1) * step, "documents": counts[i]} for i in range(int(max(counts)) + 1)]


def length_summary(lengths: np.ndarray) -> dict[str, float]:
    quantiles = {"median": 50, "p90": 90, "p99": 99}
    summary = {"shortest": int(lengths.min()), "mean": round(float(lengths.mean()), 1)}
    summary |= {name: int(np.percentile(lengths, q, method="higher")) for name, q in quantiles.items()}
    return summary | {"longest": int(lengths.max())}
