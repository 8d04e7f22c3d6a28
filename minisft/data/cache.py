"""The token cache: every row tokenised once, in flat memory-mapped arrays that the next start finds again.

    ids      uint32 [N]    all tokens of all documents, end to end
    kinds    uint8  [N]    what each token is (7 bits) and whether it is trained (top bit); see batch.py
    offsets  int64  [D+1]  document d is tokens offsets[d] : offsets[d + 1]
    source   int32  [D]    which source it came from            row   int64 [D]   its row number there, from 0
    file     int32  [D]    which of manifest["paths"]           line  int64 [D]   its line there
    weights  float32 [N]   only where some row has a weight other than 1

Five bytes a token. The folder is named by the sha256 of everything that shaped it: the bytes of every data file, the
tokenizer's files, the template, the options, and CACHE_VERSION. It is written as an atomic folder (files.py) and every
byte of it is verified against its manifest before use; one that does not match is built again.

Building streams: a batch of rows is parsed and rendered here, encoded by the Rust tokenizer on all cores, and appended
to the files, so memory holds one batch, whatever the size of the data.
"""

import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import chain
from pathlib import Path

import numpy as np
import tokenizers

from minisft.data.batch import ANSWER, SPECIAL, TERMINATOR, TEXT, TRAINED
from minisft.data.formats import (
    Example,
    FormatOptions,
    Layout,
    Piece,
    RowError,
    check_field_map,
    detect_layout,
    rename_fields,
    to_example,
)
from minisft.data.sources import BadRow, Row, Source, excerpt, list_files, place, read_rows
from minisft.data.tokenizer import Tokenizer, check_chat_template, conversation_piece, encode_pieces
from minisft.errors import DATA, SAVE, UserError
from minisft.files import atomic_folder, read_manifest, remove_leftovers, sha256_file, verify_folder, waiting_lock

CACHE_VERSION = 1  # raise it when the same input gives other tokens or kinds
BATCH_ROWS, BATCH_CHARACTERS = 1024, 8_000_000  # a batch ends at whichever comes first
SHOWN_BAD_ROWS = 5
ABSENT = "absent"
ARRAYS = {
    "ids": np.uint32,
    "kinds": np.uint8,
    "offsets": np.int64,
    "source": np.int32,
    "row": np.int64,
    "file": np.int32,
    "line": np.int64,
}


@dataclass(frozen=True)
class TokenCache:
    folder: Path
    sources: tuple[Source, ...]
    ids: np.ndarray  # uint32 [N]
    kinds: np.ndarray  # uint8 [N]: kind | TRAINED
    offsets: np.ndarray  # int64 [D+1]
    source: np.ndarray  # int32 [D]
    row: np.ndarray  # int64 [D]
    file: np.ndarray  # int32 [D]
    line: np.ndarray  # int64 [D]
    weights: np.ndarray | None  # float32 [N]
    manifest: dict  # rows read, used, dropped by reason, and what was detected, for each source
    fingerprint: str  # sha256 (hex) of the tokens, their kinds, and where documents and sources begin
    note: str  # "built", "found", or why it was built again

    def place(self, document: int) -> str:
        """Where a document came from, such as data.jsonl:12."""
        return place(self.manifest["paths"][self.file[document]], int(self.line[document]))

    def describe(self) -> list[str]:
        """What was detected and dropped, for the start of a run."""
        lines = [f"{source.label}: {entry['layout']}" for source, entry in zip(self.sources, self.manifest["sources"])]
        dropped = sum(sum(entry["dropped"].values()) for entry in self.manifest["sources"])
        if dropped:
            reasons = sum((Counter(entry["dropped"]) for entry in self.manifest["sources"]), Counter())
            lines.append(f"{dropped} bad rows skipped: " + ", ".join(f"{n} {why}" for why, n in reasons.most_common()))
            lines += [f"  {bad_row}" for bad_row in self.manifest["bad_rows"]]
        if self.manifest["straddling"]:
            lines.append(f"{self.manifest['straddling']} trained tokens begin before or end after what is trained")
        return lines


@dataclass(frozen=True)
class Documents:
    """Pieces of a cache to train or evaluate on: document index[p], its tokens ids[start[p] : end[p]] of the cache."""

    cache: TokenCache
    index: np.ndarray  # int64 [P]
    start: np.ndarray  # int64 [P]
    end: np.ndarray  # int64 [P]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.start


# ------------------------------------------------------------------------------------------------- open or build


def build_cache(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    cache_dir: Path | str,
    format: str = "auto",
    field_map: dict[str, str] | None = None,
    options: FormatOptions = FormatOptions(),  # noqa: B008 - frozen
    on_bad_row: str = "error",
) -> TokenCache:
    """The tokenised rows of all sources, from the cache or built now.

    format, field_map: for the sources that name none of their own.
    on_bad_row: "error" stops at the first bad row, naming file and line; "skip" counts bad rows by reason.
    Raises UserError (exit code DATA) for anything wrong with the data.
    """
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"on_bad_row = {on_bad_row!r}", hint='one of "error", "skip"')
    if not sources:
        raise UserError("no data source", hint='name one, as in train_data = "data.jsonl"')
    sources = [
        replace(
            source,
            format=format if source.format == "auto" else source.format,
            field_map=source.field_map or field_map or {},
        )
        for source in sources
    ]
    for source in sources:
        check_field_map(source.field_map, options)
    paths = [list_files(source) for source in sources]
    folder = Path(cache_dir) / cache_key(sources, paths, tokenizer, options, on_bad_row)[:32]
    note = "found"
    if _problem(folder) is not None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with waiting_lock(folder.with_name(f".lock-{folder.name}")):  # of several ranks one builds, the others find
                if problem := _problem(folder):
                    note = "built" if problem == ABSENT else f"built again: {problem}"
                    if os.path.lexists(folder):
                        shutil.rmtree(folder)  # refuses a link
                    remove_leftovers(cache_dir)
                    _build(folder, sources, [str(path) for path in chain(*paths)], tokenizer, options, on_bad_row)
        except OSError as error:
            hint = "set cache_dir to a folder that can be written and has space"
            raise UserError(f"the token cache: {error}", hint=hint, exit_code=SAVE) from None
    return _open(folder, tuple(sources), note)


def _problem(folder: Path) -> str | None:
    """None where the cache is there, every byte of it, else what is wrong."""
    return verify_folder(folder) if os.path.lexists(folder) else ABSENT


def cache_key(
    sources: Sequence[Source], paths: list[list[Path]], tokenizer: Tokenizer, options: FormatOptions, on_bad_row: str
) -> str:
    """sha256 (hex) of everything that shapes the cache. Names and weights of sources do not."""
    parts = {
        "version": [CACHE_VERSION, tokenizers.__version__],
        "sources": [
            {
                "files": [[str(path), sha256_file(path)] for path in files],
                "split": source.split,
                "format": source.format,
                "field_map": source.field_map,
            }
            for source, files in zip(sources, paths)
        ],
        "tokenizer": tokenizer.fingerprint(),
        "options": asdict(options),
        "on_bad_row": on_bad_row,
    }
    return sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def _open(folder: Path, sources: tuple[Source, ...], note: str) -> TokenCache:
    manifest = read_manifest(folder)
    # Of what was made, not of how: the same tokens in another place are dealt in the same order.
    content = [manifest["files"][f"{name}.bin"]["sha256"] for name in ("ids", "kinds", "offsets", "source")]
    fingerprint = sha256("".join(content).encode()).hexdigest()
    arrays = {name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r") for name, dtype in ARRAYS.items()}
    weights = folder / "weights.bin"
    return TokenCache(
        folder=folder,
        sources=sources,
        **arrays,
        weights=np.memmap(weights, dtype=np.float32, mode="r") if weights.exists() else None,
        manifest=manifest,
        fingerprint=fingerprint,
        note=note,
    )


def _build(
    folder: Path,
    sources: Sequence[Source],
    paths: list[str],
    tokenizer: Tokenizer,
    options: FormatOptions,
    on_bad_row: str,
) -> None:
    manifest = {"paths": paths, "sources": [], "bad_rows": [], "straddling": 0}
    file_numbers = {path: number for number, path in enumerate(paths)}
    document_weights = array("f")
    num_tokens = 0
    with atomic_folder(folder, manifest) as temporary:
        files = {name: open(temporary / f"{name}.bin", "wb") for name in ARRAYS}
        try:
            np.zeros(1, np.int64).tofile(files["offsets"])
            for number, source in enumerate(sources):
                entry = {"layout": "", "prompt": "", "rows_read": 0, "rows_used": 0, "dropped": {}}
                manifest["sources"].append(entry)
                for documents in _tokenise(source, tokenizer, options, on_bad_row, entry, manifest["bad_rows"]):
                    lengths = np.array([len(d.ids) for d in documents], dtype=np.int64)
                    columns = {
                        "ids": np.concatenate([d.ids for d in documents]),
                        "kinds": np.concatenate([d.kinds for d in documents]),
                        "offsets": num_tokens + np.cumsum(lengths),
                        "source": np.full(len(documents), number),
                        "row": np.array([d.row for d in documents]),
                        "file": np.array([file_numbers[d.file] for d in documents]),
                        "line": np.array([d.line for d in documents]),
                    }
                    for name, column in columns.items():
                        column.astype(ARRAYS[name], copy=False).tofile(files[name])
                    num_tokens += int(lengths.sum())
                    document_weights.extend(d.weight for d in documents)
                    entry["rows_used"] += len(documents)
                    manifest["straddling"] += sum(d.straddling for d in documents)
                assert entry["rows_read"] == entry["rows_used"] + sum(entry["dropped"].values())
        finally:
            for file in files.values():
                file.close()
        if num_tokens == 0:
            read = sum(entry["rows_read"] for entry in manifest["sources"])
            shown = "".join(f"\n  {bad_row}" for bad_row in manifest["bad_rows"])
            raise UserError(f"no usable row in {', '.join(paths)}: {read} read{shown}", exit_code=DATA)
        if any(weight != 1 for weight in document_weights):
            offsets = np.fromfile(temporary / "offsets.bin", dtype=np.int64)
            with open(temporary / "weights.bin", "wb") as file:
                for weight, length in zip(document_weights, np.diff(offsets)):
                    np.full(length, weight, dtype=np.float32).tofile(file)


# ------------------------------------------------------------------------------------------------- rows to documents


@dataclass(frozen=True)
class _Document:
    ids: np.ndarray  # uint32 [n]
    kinds: np.ndarray  # uint8 [n]
    straddling: int
    weight: float
    row: int
    file: str
    line: int


def _tokenise(
    source: Source,
    tokenizer: Tokenizer,
    options: FormatOptions,
    on_bad_row: str,
    entry: dict,
    bad_rows: list[str],
) -> Iterator[list[_Document]]:
    """The documents of a source in batches; fills `entry`. The next batch is rendered while Rust encodes this one."""
    layout = None
    dropped = Counter()
    batch: list[tuple[int, Row, Example, tuple[Piece, ...]]] = []
    characters = 0

    def refuse(bad_row: BadRow) -> None:
        if on_bad_row == "error":
            hint = 'mend the row, or set on_bad_row = "skip" to leave such rows out and count them'
            raise UserError(str(bad_row), hint=hint, exit_code=DATA)
        dropped[bad_row.reason] += 1
        entry["dropped"] = dict(dropped)
        if len(bad_rows) < SHOWN_BAD_ROWS:
            bad_rows.append(str(bad_row))

    with ThreadPoolExecutor(1) as pool:
        encoding: Future | None = None
        for number, row in enumerate(chain(read_rows(source), [None])):
            if row is not None:
                entry["rows_read"] += 1
                if isinstance(row, BadRow):
                    refuse(row)
                    continue
                try:
                    data = rename_fields(row.data, source.field_map)
                    if layout is None:
                        layout = _detect(data, place(row.file, row.line), source.format, tokenizer, options)
                        entry["layout"], entry["prompt"] = str(layout), layout.prompt
                    example = to_example(data, layout, options)
                    pieces = _pieces(example, layout, tokenizer)
                except RowError as error:
                    refuse(_bad_row(row, error))
                    continue
                batch.append((number, row, example, pieces))
                characters += sum(len(piece.text) for piece in pieces)
            if row is None or len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
                if encoding is not None:
                    yield from _finish(encoding.result(), tokenizer, options, refuse)
                encoding = pool.submit(_encode, batch, tokenizer)
                batch, characters = [], 0
        yield from _finish(encoding.result(), tokenizer, options, refuse)


def _detect(row: dict, where: str, format: str, tokenizer: Tokenizer, options: FormatOptions) -> Layout:
    try:
        layout = detect_layout(row, format, options, tokenizer.template is not None)
    except UserError as error:
        raise UserError(f"{where}: {error.message}", hint=error.hint, exit_code=error.exit_code) from None
    if layout.chat:
        check_chat_template(tokenizer)
    elif options.add_eos and layout.format != "input_ids" and tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token", hint="set add_eos = false, or name eos_token in its config")
    return layout


def _pieces(example: Example, layout: Layout, tokenizer: Tokenizer) -> tuple[Piece, ...]:
    if example.ids is not None:
        if not 0 <= min(example.ids) <= max(example.ids) < tokenizer.vocab_size:
            raise RowError("token id out of range", f"ids must be from 0 to {tokenizer.vocab_size - 1}")
        return ()
    if example.messages is None:
        return example.pieces
    train_on = "assistant" if layout.answers_only else "all"
    return (
        conversation_piece(
            tokenizer,
            example.messages,
            tools=example.tools,
            train_on=train_on,
            first_trained=example.first_trained,
        ),
    )


def _bad_row(row: Row, error: RowError) -> BadRow:
    text = json.dumps(row.data, ensure_ascii=False)
    return BadRow(row.file, row.line, error.reason, error.detail, excerpt(text))


def _encode(batch: list, tokenizer: Tokenizer) -> list:
    """[(number, row, example, encoded pieces)]; runs in the other thread, Rust releases the interpreter."""
    encoded = iter(encode_pieces(tokenizer, [piece for _, _, _, pieces in batch for piece in pieces]))
    return [(number, row, example, [next(encoded) for _ in pieces]) for number, row, example, pieces in batch]


def _finish(encoded: list, tokenizer: Tokenizer, options: FormatOptions, refuse) -> Iterator[list[_Document]]:
    documents = []
    for number, row, example, pieces in encoded:
        ids, kinds = _join(example, pieces, tokenizer, options)
        if len(ids) == 0:
            refuse(_bad_row(row, RowError("no token")))
            continue
        straddling = sum(piece[2] for piece in pieces)
        documents.append(_Document(ids, kinds, straddling, example.weight, number, row.file, row.line))
    if documents:
        yield documents


def _join(
    example: Example, pieces: list, tokenizer: Tokenizer, options: FormatOptions
) -> tuple[np.ndarray, np.ndarray]:
    """The ids and kinds of a whole document; text outside of a template gets its BOS and EOS here, once each."""
    if example.ids is not None:
        ids = np.array(example.ids, dtype=np.uint32)
        kinds = np.full(len(ids), TEXT | TRAINED, dtype=np.uint8)
        if example.labels is not None:
            kinds = np.where(np.array(example.labels) != -100, ANSWER | TRAINED, TEXT).astype(np.uint8)
        return ids, kinds
    if example.messages is not None:
        return pieces[0][:2]

    ids, kinds = [piece[0] for piece in pieces], [piece[1] for piece in pieces]
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
        kinds.append(np.array([SPECIAL] * len(after) + [TERMINATOR | TRAINED], dtype=np.uint8))
    elif after:
        ids.append(np.array(after, dtype=np.uint32))
        kinds.append(np.full(len(after), SPECIAL, dtype=np.uint8))
    return np.concatenate(ids), np.concatenate(kinds)
