"""From rows to tokenised documents, in batches, which cache.py writes to disk.

Python reads, checks and renders a batch of rows while the Rust tokenizer encodes the one before on the other cores (it
releases the interpreter). A row gives one document, or several if its conversation is rendered turn by turn (chat/masks.py,
strategy D). Every row is either used or dropped, with a reason that is counted. Preference data gives two documents for each
comparison, one after the other: the chosen and the rejected answer, or (labels) an answer and the same prompt with the
answer of another row.

`truncation = "turns"`: a conversation that is too long loses its oldest whole turns (a question with all that follows up
to the next one) and is rendered again, so that the remainder is exactly the text that the model would see at inference. The
system turn, the tools and the answer at the end stay.
"""

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import tokenizers

from minisft.data.detect_format import detect_row_format, is_repeated, rename_fields, unread_columns
from minisft.data.encoding import (
    Encoded,
    check_chat_template,
    conversation_pieces,
    encode_pieces,
    raw_encodings,
    text_pieces,
    with_kinds,
)
from minisft.data.formats import Example, Piece, to_examples, without_nulls
from minisft.data.kinds import ANSWER, MISMATCHED, SPECIAL, TERMINATOR, TEXT, TRAINED
from minisft.data.preferences import SIDES
from minisft.data.row_format import FormatOptions, RowFormat
from minisft.data.rows import BadRow, NothingToTrain, Row, RowError, excerpt, place
from minisft.data.sources import Digests, Source, read_rows
from minisft.data.tokenizer import Tokenizer
from minisft.errors import DATA, MODEL, UserError

BATCH_ROWS, BATCH_CHARACTERS = 512, 2_000_000  # a batch ends at whichever comes first
# A thread may wait 5 ms for the interpreter before and after it encodes, and Rust should have the next batch meanwhile.
THREADS, BATCHES_AT_WORK = 2, 3
CHARACTERS_AT_WORK = 6_000_000  # in all batches; each takes up to some 250 bytes while it is encoded
# Seconds of the processor that encoding may take: a tenth of the slowest speed that was measured, 200,000 characters a second.
SECONDS_AT_LEAST, SLOWEST = 60.0, 20_000
SHOWN_BAD_ROWS = 5
LABEL_COLUMNS = ("label", "kto_tag")  # false: a bad answer
TOO_LONG = "too long even without its earlier turns"


@dataclass(slots=True)
class Document:
    ids: np.ndarray  # uint32 [n]
    kinds: np.ndarray  # uint8 [n]: kind | TRAINED
    weights: np.ndarray | float  # float32 [n], or one for all tokens
    straddling: int  # trained tokens that begin before or end after the trained text
    row: int  # the number of its row in the source, from 0
    file: str
    line: int
    role: int | None = None  # CHOSEN, REJECTED or MISMATCHED in pairs and labels


@dataclass(slots=True)
class _Pending:
    """A document on its way to the tokenizer."""

    number: int  # of its row
    row: Row
    example: Example
    pieces: tuple[Piece, ...]
    has_control_tokens: bool = False
    has_untrained_greeting: bool = False
    end: int = 0  # how many messages of a conversation the document holds
    # How the turns of a conversation were found (chat/masks.py); per_turn: only the last answer is trained.
    strategy: str = ""
    prompts: frozenset[str] = frozenset()  # how its answers got another prompt than the default (chat/inference.py)
    lost_reasoning: bool = False


def new_entry() -> dict[str, Any]:
    """The counts of a source, which `tokenise` fills in."""
    turns = {"rows": 0, "turns": 0, "tokens": 0, "lost_answers": 0}
    counts = {"rows_read": 0, "rows_used": 0, "documents": 0, "dropped": {}, "control_tokens": 0, "straddling": 0}
    counts |= {"untrained_greetings": 0, "lost_reasoning": 0}
    columns = {"unread": {}, "bad_answers": {}, "weight": {}}
    row_format = {"layout": "", "prompt": "", "format": None}
    return {**row_format, **counts, **columns, "strategies": {}, "prompts": {}, "turns_cut": turns}


def tokenise(
    source: Source,
    tokenizer: Tokenizer,
    options: FormatOptions,
    on_bad_row: str,
    entry: dict,
    bad_rows: list[str],
    digests: Digests,
) -> Iterator[list[Document]]:
    """The documents of a source in batches; fills in `entry` and appends the first bad rows to `bad_rows`.

    on_bad_row: "error" raises UserError at the first bad row, "skip" counts bad rows. digests: as in read_rows.
    """
    work = _Work(source, tokenizer, options, on_bad_row, entry, bad_rows, digests)
    if source.row_format is not None:
        work.settle(source.row_format)
    encoding: deque[tuple[list[_Pending], Future, int]] = deque()  # batches whose text is being encoded, characters
    slots = threading.Semaphore(THREADS)

    def start(batch: list[_Pending]) -> Future:
        """The encodings of a batch, by a thread that does not keep the process alive if it never ends."""
        future: Future = Future()
        pieces = [piece for part in batch for piece in part.pieces]

        def encode() -> None:
            with slots:
                try:
                    future.set_result(raw_encodings(tokenizer, pieces))
                except BaseException as error:
                    future.set_exception(error)

        threading.Thread(target=encode, daemon=True).start()
        return future

    def documents_of_the_first() -> Iterator[list[Document]]:
        characters = sum(size for _, _, size in encoding)
        batch, future, _ = encoding.popleft()
        _wait(future, characters, batch)
        yield from work.documents(batch, future)

    for batch in work.batches():
        characters = _characters(batch)
        while encoding and sum(size for _, _, size in encoding) + characters > CHARACTERS_AT_WORK:
            yield from documents_of_the_first()
        encoding.append((batch, start(batch), characters))
        if len(encoding) > BATCHES_AT_WORK:
            yield from documents_of_the_first()
    while encoding:
        yield from documents_of_the_first()
    entry["dropped"] = dict(work.dropped)
    entry["strategies"] = {name: rows for name, rows in work.strategies.items() if name}


def _wait(future: Future, characters: int, batch: list[_Pending]) -> None:
    """Wait for a batch. Raises UserError if it takes much longer than these characters can take any honest tokenizer."""
    seconds = SECONDS_AT_LEAST + characters / SLOWEST
    end = time.process_time() + seconds
    while wait([future], timeout=1.0).not_done:
        if time.process_time() > end:
            first, last = (place(part.row.file, part.row.line) for part in (batch[0], batch[-1]))
            raise UserError(
                f"the tokenizer has computed for {seconds:,.0f} s and is not done with {characters:,} characters",
                hint=f"a regular expression in its tokenizer.json may have no end; the rows are {first} to {last}",
                exit_code=MODEL,
            )


def _characters(parts: list[_Pending]) -> int:
    return sum(len(piece.text) for part in parts for piece in part.pieces)


@dataclass
class _Work:
    """A source on its way to documents, and the counts of its rows."""

    source: Source
    tokenizer: Tokenizer
    options: FormatOptions
    on_bad_row: str
    entry: dict
    bad_rows: list[str]
    digests: Digests
    row_format: RowFormat | None = None  # decided by the first row
    columns: dict[tuple[str, ...], tuple[set[str], tuple[str, ...]]] = field(default_factory=dict)  # see unread_columns
    dropped: Counter = field(default_factory=Counter)  # reason -> rows
    strategies: Counter = field(default_factory=Counter)  # how turns were found -> rows; "" = rows without turns

    def batches(self) -> Iterator[list[_Pending]]:
        """The rows of the source as texts to encode, some hundred rows at a time."""
        batch, characters = [], 0
        for number, row in enumerate(read_rows(self.source, self.digests)):
            self.entry["rows_read"] += 1
            parts = self.parts(number, row)
            size = _characters(parts)
            if batch and characters + size > BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
            batch += parts
            characters += size
            if len(batch) >= BATCH_ROWS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def parts(self, number: int, row: Row | BadRow) -> list[_Pending]:
        """The documents of a row, as text; none if it is bad."""
        if isinstance(row, BadRow):
            self.refuse(row)
            return []
        try:
            data = rename_fields(row.data, self.source.field_map, self.source.ignore)
            if self.row_format is None:
                where = place(row.file, row.line)
                self.settle(_detect(data, where, self.source.format, self.tokenizer, self.options))
            assert self.row_format is not None
            parts = []
            examples = to_examples(data, self.row_format, self.options)
            for example in examples:
                parts += _parts(number, row, example, self.row_format, self.tokenizer, self.options)
            if self.options.answers == "pairs":
                _check_prompts(parts)
        except RowError as error:
            self.refuse(_bad_row(row, error))
            return []
        self.count_columns(data, examples[0].weight)
        self.entry["control_tokens"] += any(part.has_control_tokens for part in parts)
        self.entry["untrained_greetings"] += any(part.has_untrained_greeting for part in parts)
        self.entry["lost_reasoning"] += any(part.lost_reasoning for part in parts)
        self.strategies[parts[0].strategy] += 1
        for how in frozenset().union(*(part.prompts for part in parts)):
            self.entry["prompts"][how] = self.entry["prompts"].get(how, 0) + 1
        return parts

    def settle(self, row_format: RowFormat) -> None:
        """Read all rows in this format."""
        self.row_format = row_format
        # "layout" was the name of a row format when the first caches were written.
        self.entry |= {"layout": str(row_format), "prompt": row_format.prompt, "format": asdict(row_format)}

    def count_columns(self, row: dict, weight: float) -> None:
        """Count what the user should know of a row's columns: those of a prompt that are not read, and a weight."""
        assert self.row_format is not None
        row = without_nulls(row)
        if (names := tuple(row)) not in self.columns:
            template = "".join(t.text for t in (self.tokenizer.template, self.tokenizer.tool_template) if t)
            self.columns[names] = unread_columns(row, self.row_format, self.options, template)
        read, unread = self.columns[names]
        for name in unread:
            if row[name] not in ("", "[]", [], {}) and not is_repeated(row, name, read):
                self.entry["unread"][name] = self.entry["unread"].get(name, 0) + 1
        for name in LABEL_COLUMNS if self.row_format.name not in ("text", "input_ids") else ():
            if name not in read and str(row.get(name)).lower() == "false":
                self.entry["bad_answers"][name] = self.entry["bad_answers"].get(name, 0) + 1
        if row.get("weight") is not None:
            seen = self.entry["weight"] or {"rows": 0, "min": weight, "max": weight}
            limits = {"min": min(weight, seen["min"]), "max": max(weight, seen["max"])}
            self.entry["weight"] = {"rows": seen["rows"] + 1, **limits}

    def documents(self, batch: list[_Pending], encodings: Future) -> Iterator[list[Document]]:
        """The documents of an encoded batch in one list; nothing if there are none."""
        encoded = iter(encodings.result())
        documents = []
        for _, parts in groupby(batch, key=attrgetter("number")):
            documents += self.documents_of_row(list(parts), encoded)
        self.entry["documents"] += len(documents)
        self.entry["straddling"] += sum(document.straddling for document in documents)
        if documents:
            yield documents

    def documents_of_row(
        self, parts: list[_Pending], encoded: Iterator[tokenizers.Encoding | RowError]
    ) -> list[Document]:
        """The documents of one row, whose encodings come next from `encoded`; none if the row is bad."""
        assert self.row_format is not None  # the first row decided it
        documents, too_long, error = [], [], None
        for part in parts:
            raw = [next(encoded) for _ in part.pieces]
            try:
                documents.append(
                    _document(part, raw, self.row_format, self.tokenizer, self.options, self.entry["turns_cut"])
                )
            except RowError as caught:
                if caught.reason == TOO_LONG:
                    too_long.append(caught)
                else:
                    error = caught
        if self.options.answers != "chosen" and not error:
            error = next(iter(too_long), None) or _no_preference(documents)
        if error or not documents:
            self.refuse(_bad_row(parts[-1].row, error or too_long[0]))
            return []
        self.entry["rows_used"] += 1
        self.entry["turns_cut"]["lost_answers"] += len(too_long)
        return documents

    def refuse(self, bad_row: BadRow) -> None:
        """Count a bad row, or raise UserError."""
        if self.on_bad_row == "error" and bad_row.reason != TOO_LONG:
            hint = 'mend the row, or set on_bad_row = "skip" to leave such rows out and count them'
            raise UserError(str(bad_row), hint=hint, exit_code=DATA)
        self.dropped[bad_row.reason] += 1
        if len(self.bad_rows) < SHOWN_BAD_ROWS:
            self.bad_rows.append(str(bad_row))


def _detect(row: dict, where: str, format: str, tokenizer: Tokenizer, options: FormatOptions) -> RowFormat:
    try:
        row_format = detect_row_format(row, format, options, tokenizer.template is not None)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", hint=error.hint, exit_code=error.exit_code) from None
    if row_format.chat:
        check_chat_template(tokenizer)
    elif options.add_eos and row_format.name != "input_ids" and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token", hint="set add_eos = false, or name eos_token in its config")
    return row_format


def _parts(
    number: int,
    row: Row,
    example: Example,
    row_format: RowFormat,
    tokenizer: Tokenizer,
    options: FormatOptions,
) -> list[_Pending]:
    """The documents of an example, as text."""
    if example.ids is not None:
        if not 0 <= min(example.ids) <= max(example.ids) < tokenizer.vocab_size:
            raise RowError("token id out of range", f"ids must be from 0 to {tokenizer.vocab_size - 1}")
        return [_Pending(number, row, example, ())]
    if example.messages is None:
        return [_Pending(number, row, example, *text_pieces(tokenizer, example, row_format, options))]
    try:
        rendered = conversation_pieces(tokenizer, example, options, _train_on(row_format))
    except RowError as error:
        if row_format.name == "preference" and example.role is not None:
            raise RowError(error.reason, f"{SIDES[example.role]}: {error.detail}") from None
        raise
    if example.role is not None and len(rendered.pieces) > 1:
        raise RowError("answer of several turns", "the chat template renders each of them differently than together")
    return [
        _Pending(
            number,
            row,
            example,
            (piece,),
            rendered.has_control_tokens,
            rendered.has_untrained_greeting,
            end,
            rendered.strategy,
            rendered.prompts,
            rendered.lost_reasoning,
        )
        for piece, end in zip(rendered.pieces, rendered.ends)
    ]


def _check_prompts(parts: list[_Pending]) -> None:
    """Raise RowError if the chosen and the rejected answer of a pair continue different prompts."""
    if len({part.prompts for part in parts}) > 1:
        how = " | ".join(", ".join(sorted(part.prompts)) or "default" for part in parts)
        raise RowError("answers to different prompts", f"the prompt of each: {how}")


def _train_on(row_format: RowFormat) -> str:
    return "all" if not row_format.answers_only else "last" if row_format.last_turn_only else "assistant"


def _bad_row(row: Row, error: RowError) -> BadRow:
    text = json.dumps(row.data, ensure_ascii=False, default=str)
    return BadRow(row.file, row.line, error.reason, error.detail, excerpt(text))


# ------------------------------------------------------------------------------------------------- oldest turns first


def _without_oldest_turns(
    part: _Pending, length: int, limit: int, row_format: RowFormat, tokenizer: Tokenizer, options: FormatOptions
) -> tuple[Encoded, int]:
    """(the document without its oldest turns, how many were removed): the fewest so that it has at most `limit` tokens.

    length: its tokens with all turns. Raises RowError if it is too long without any of them.
    """
    messages = (part.example.messages or [])[: part.end]
    first = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), 0)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    cuts = [i for i, m in enumerate(messages) if m["role"] == "user" and first < i < answers[-1]]
    is_alone = part.strategy == "per_turn"
    if is_alone:  # only the last message is trained, or parts of it
        last, whole = len(messages) - 1, part.example.messages or []
        follows = any(m["role"] == "assistant" for m in whole[part.end :])
        by_rule = not follows if row_format.last_turn_only else last >= part.example.first_trained
        messages = [{k: v for k, v in m.items() if k not in ("train", "part_spans")} for m in messages]
        messages[last] = {**whole[last], "train": whole[last].get("train", by_rule)}

    def shortened(cut: int) -> Encoded:
        fewer = replace(
            part.example,
            messages=messages[:first] + messages[cut:],
            first_trained=max(0, part.example.first_trained - (cut - first)),
        )
        train_on = "last" if is_alone else _train_on(row_format)
        joint_or_alone = replace(options, multi_turn="per_turn" if is_alone else "joint")
        pieces = conversation_pieces(tokenizer, fewer, joint_or_alone, train_on).pieces
        return encode_pieces(tokenizer, pieces)[0]

    low, high, best = 0, len(cuts), None  # bisection for the first cut with which the document fits
    while low < high:
        middle = (low + high) // 2
        candidate = shortened(cuts[middle])
        if len(candidate.ids) <= limit:
            best, high = candidate, middle
        else:
            low = middle + 1
    if best is None:
        raise RowError(TOO_LONG, f"{length} tokens, at most {limit}")
    return best, low + 1


# ------------------------------------------------------------------------------------------------- a whole document


def _document(
    part: _Pending,
    raw: list[tokenizers.Encoding | RowError],
    row_format: RowFormat,
    tokenizer: Tokenizer,
    options: FormatOptions,
    turns_cut: dict,
) -> Document:
    """The tokens of a document, without its oldest turns if it is too long; counts these in `turns_cut`. Raises RowError."""
    encoded = [with_kinds(tokenizer, piece, encoding) for piece, encoding in zip(part.pieces, raw)]
    limit = options.turns_max_length
    if part.example.messages is not None and limit and (length := len(encoded[0].ids)) > limit:
        encoded[0], num_turns = _without_oldest_turns(part, length, limit, row_format, tokenizer, options)
        turns_cut["rows"] += 1
        turns_cut["turns"] += num_turns
        turns_cut["tokens"] += length - len(encoded[0].ids)
    ids, kinds, weights = _join(part.example, encoded, tokenizer, options)
    if len(ids) == 0:
        raise RowError("no token")
    straddling = sum(piece.straddling for piece in encoded)
    return Document(ids, kinds, weights, straddling, part.number, part.row.file, part.row.line, part.example.role)


def _join(
    example: Example, encoded: list[Encoded], tokenizer: Tokenizer, options: FormatOptions
) -> tuple[np.ndarray, np.ndarray, np.ndarray | float]:
    """(ids, kinds, weights) of a whole document. Text outside of a template gets its BOS and EOS here, once each."""
    if example.ids is not None:
        ids = np.array(example.ids, dtype=np.uint32)
        kinds = np.full(len(ids), TEXT | TRAINED, dtype=np.uint8)
        if example.labels is not None:
            kinds = np.where(np.array(example.labels) != -100, ANSWER | TRAINED, TEXT).astype(np.uint8)
        return ids, kinds, example.weight
    if example.messages is not None:
        whole = encoded[0]
        weights = example.weight if whole.weights is None else whole.weights * np.float32(example.weight)
        return whole.ids, whole.kinds, weights

    ids, kinds = [piece.ids for piece in encoded], [piece.kinds for piece in encoded]
    eos = tokenizer.eos_token_id
    before = tokenizer.prefix_ids if options.add_special_tokens else []
    after = [i for i in tokenizer.suffix_ids if i != eos] if options.add_special_tokens else []
    if before and ids[0][: len(before)].tolist() != before:
        ids.insert(0, np.array(before, dtype=np.uint32))
        kinds.insert(0, np.full(len(before), SPECIAL, dtype=np.uint8))
    if options.add_eos:
        if len(ids[-1]) and ids[-1][-1] == eos:  # the text brought its own
            ids[-1], kinds[-1] = ids[-1][:-1], kinds[-1][:-1]
        ids.append(np.array([*after, eos], dtype=np.uint32))
        trained = example.pieces[-1].spans[-1][2] & TRAINED  # a text may end with a question, which EOS then ends
        kinds.append(np.array([SPECIAL] * len(after) + [TERMINATOR | trained], dtype=np.uint8))
    elif after:
        ids.append(np.array(after, dtype=np.uint32))
        kinds.append(np.full(len(after), SPECIAL, dtype=np.uint8))
    return np.concatenate(ids), np.concatenate(kinds), example.weight


# ------------------------------------------------------------------------------------------------- preference data


def _no_preference(answers: list[Document]) -> RowError | None:
    """The error of a row of which an answer has no token to score, or both answers have the same tokens."""
    if any((answer.kinds < TRAINED).all() for answer in answers):
        return RowError("answer without a trained token", "nothing in it can be scored")
    if len(answers) > 1 and np.array_equal(answers[0].ids, answers[1].ids):
        return RowError("chosen equals rejected", "they differ as text, but not as tokens")
    return None


def with_mismatched(
    batches: Iterable[tuple[int, list[Document]]], bad_rows: Sequence[str] = ()
) -> Iterator[tuple[int, list[Document]]]:
    """Batches (source, labelled answers), each answer followed by a MISMATCHED document: its prompt, another row's answer.

    That answer is from the next row of the batch; the last row takes the first one's. A batch of one row takes an answer of
    the batch before it, or after it if it is the first. On these documents KTO measures how far the policy is from its
    reference (arXiv:2402.01306, section 4). Raises UserError if there is only one row in all; it names the `bad_rows`.
    """
    before, waiting = [], None
    for source, answers in batches:
        if waiting:
            yield waiting[0], _paired(waiting[1], answers[:1] * 2)
            waiting = None
        per_row = 2 if len(answers) > 1 and answers[0].row == answers[1].row else 1  # the answers of preference rows
        others = answers[per_row:] + answers[:per_row] if len(answers) > per_row else before * per_row
        if others:
            yield source, _paired(answers, others)
        else:
            waiting = source, answers
        before = answers[-1:]
    if waiting:
        shown = "".join(f"\n  {bad_row}" for bad_row in bad_rows)
        problem = "one row of labelled answers is too few: KTO needs answers of other rows to compare with"
        raise NothingToTrain(f"{problem}{'; skipped are' * bool(shown)}{shown}", exit_code=DATA)


def _paired(answers: list[Document], others: list[Document]) -> list[Document]:
    documents = []
    for answer, other in zip(answers, others):
        prompt, begins = (
            int((document.kinds >= TRAINED).argmax()) for document in (answer, other)
        )  # first trained token
        ids = np.concatenate([answer.ids[:prompt], other.ids[begins:]])
        kinds = np.concatenate([answer.kinds[:prompt], other.kinds[begins:]])
        documents += [answer, replace(answer, ids=ids, kinds=kinds, weights=1.0, straddling=0, role=MISMATCHED)]
    return documents
