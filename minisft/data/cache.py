"""The token cache: every row tokenised once, in flat memory-mapped arrays that the next run finds again.

    ids      uint32 [N]    all tokens of all documents, end to end
    kinds    uint8  [N]    what each token is (7 bits) and whether it is trained (top bit); see kinds.py
    offsets  int64  [D+1]  document d is tokens offsets[d] : offsets[d + 1]
    source   int32  [D]    which source it came from            row   int64 [D]   its row number there, from 0
    file     int32  [D]    which of manifest["paths"]           line  int64 [D]   its line there
    weights  float32 [N]   only if a token has a weight other than 1
    role     uint8  [D]    only in preference data: CHOSEN, REJECTED, MISMATCHED; there documents 2u and 2u + 1 are a unit,
                           two answers to one prompt

Five bytes a token. The folder is named by the sha256 of everything that shaped it: the bytes of every data file, the
tokenizer's files, the template, the options, and CACHE_VERSION. A data file whose bytes are others when they are tokenised
than when they were hashed is an error (hashed_file.py). The folder is written as an atomic folder (atomic_folder.py) and every
byte of it is verified against its manifest before use; a cache that does not match is built again.

The build streams: tokenise.py yields a batch of documents, which is appended to the files. Memory holds a few batches,
whatever the size of the data.
"""

import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers

from minisft.atomic_folder import (
    atomic_folder,
    not_written,
    read_manifest,
    remove_leftovers,
    verify_folder,
    waiting_lock,
)
from minisft.data.detect_format import check_field_map
from minisft.data.hashed_file import hash_blocks
from minisft.data.kinds import CHOSEN, MISMATCHED
from minisft.data.repositories import locate
from minisft.data.row_format import ON_BAD_ROW, FormatOptions
from minisft.data.rows import NothingToTrain, place
from minisft.data.sources import Digests, Source, list_files
from minisft.data.tokenise import Document, new_entry, tokenise, with_mismatched
from minisft.data.tokenizer import Tokenizer
from minisft.errors import DATA, UserError

CACHE_VERSION = 6  # raise it when the same input gives other tokens or kinds
BLOCK_TOKENS = 2**20
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
OPTIONAL = {"weights": np.float32, "role": np.uint8}


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
    role: np.ndarray | None  # uint8 [D]: CHOSEN, REJECTED, MISMATCHED; preference data only
    manifest: dict  # for each source the rows read, used, and dropped by reason, and its row format
    fingerprint: str  # sha256 (hex) of the tokens, their kinds, and where documents and sources begin
    note: str  # "built", "found", or why it was built again
    # of each data file: sha256 (hex) of the hashes of its blocks
    file_hashes: dict[str, str] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """How many neighbouring documents are a unit: 2 in preference data, else 1."""
        return 1 if self.role is None else 2

    @property
    def unit(self) -> str:
        """The name of a unit, which is used, cut and packed as a whole."""
        return "documents" if self.role is None else "labelled answers" if self.role[1] == MISMATCHED else "pairs"

    def place(self, document: int) -> str:
        """Where a document came from, such as data.jsonl:12."""
        return place(self.manifest["paths"][self.file[document]], int(self.line[document]))

    def label_notes(self) -> list[str]:
        """A line if all labelled answers have the same label."""
        if self.role is None or self.unit != "labelled answers":
            return []
        is_good = self.role[::2] == CHOSEN
        if is_good.any() and not is_good.all():
            return []
        one = "true (good)" if is_good.all() else "false (bad)"
        return [f"WARNING: every label is {one}: KTO learns from good and from bad answers"]

    def describe(self) -> list[str]:
        """Lines for the start of a run: the format of each source, the rows dropped, and what else the user should know."""
        lines = []
        for source, entry in zip(self.sources, self.manifest["sources"]):
            lines.append(f"{source.label}{f' at {source.origin}' if source.commit else ''}: {entry['layout']}")
            lines += source_notes(entry)
        lines += self.label_notes()
        dropped = sum(sum(entry["dropped"].values()) for entry in self.manifest["sources"])
        if dropped:
            reasons = sum((Counter(entry["dropped"]) for entry in self.manifest["sources"]), Counter())
            lines.append(f"{dropped:,} rows skipped: " + ", ".join(f"{n:,} {why}" for why, n in reasons.most_common()))
            lines += [f"  {bad_row}" for bad_row in self.manifest["bad_rows"]]
        entries = self.manifest["sources"]
        strategies = sum((Counter(entry["strategies"]) for entry in entries), Counter())
        if strategies["per_turn"] and self.role is None:  # in preference data each answer is one document anyway
            answers = sum(entry["documents"] for entry in entries) - sum(entry["rows_used"] for entry in entries)
            lines.append(
                f"{strategies['per_turn']:,} conversations are rendered turn by turn, as at inference: {answers:,} more documents"
            )
        cut = sum((Counter(entry["turns_cut"]) for entry in entries), Counter())
        if cut["rows"]:
            lines.append(
                f"{cut['rows']:,} conversations are without their oldest {cut['turns']:,} turns, {cut['tokens']:,} tokens"
            )
        if rows := sum(entry["untrained_greetings"] for entry in entries):
            lines.append(
                f"{rows:,} conversations begin with the assistant, and this turn is context: the chat template gives it no header"
            )
        if rows := sum(entry["control_tokens"] for entry in entries):
            lines.append(f"{rows:,} rows contain the text of a control token")
        if straddling := sum(entry["straddling"] for entry in entries):
            lines.append(f"{straddling:,} trained tokens begin before or end after the trained text")
        return lines


def source_notes(entry: dict) -> list[str]:
    """Lines about a source: what a prompt may lack, how it was chosen, and what scales the loss. entry: of the manifest."""
    notes = []
    for name, rows in entry["unread"].items():
        is_rendered = name in ("tools", "documents")
        why = "no chat template renders it; to" if is_rendered else "is not used; rename it by field_map, or"
        notes.append(
            f'WARNING: the column {name} has a value in {rows:,} rows and {why} leave it out: ignore = ["{name}"]'
        )
    for name, rows in entry["bad_answers"].items():
        notes.append(
            f"WARNING: the column {name} is false in {rows:,} rows, as of bad answers, and is not used: they are trained like "
            'the others; KTO tells them apart (trainer_type = "dpo", dpo.loss_type = "kto")'
        )
    if rows := entry["lost_reasoning"]:
        notes.append(
            f"WARNING: {rows:,} rows have reasoning that the chat template does not render, so it is not trained; to leave it "
            'out: reasoning = "strip"'
        )
    for how, rows in entry["prompts"].items():
        notes.append(f"{rows:,} rows have answers that continue another prompt than the template's default: {how}")
    if weight := entry["weight"]:
        factors = f"{weight['min']:g}" + (f" to {weight['max']:g}" if weight["max"] > weight["min"] else "")
        rows = f"{weight['rows']:,} rows"
        notes.append(f'the column weight scales the loss of {rows} by {factors}; to leave it out: ignore = ["weight"]')
    return notes


@dataclass(frozen=True)
class Turns:
    """Documents of a conversation that share their beginnings. Unit u is a tree, pieces offsets[u] : offsets[u + 1]."""

    offsets: np.ndarray  # int64 [U+1]
    shared: np.ndarray  # int64 [P]: how many tokens a piece shares with the piece before it; 0 for the first of a unit


@dataclass(frozen=True)
class Documents:
    """Pieces of a cache to train or evaluate on. Piece p is document index[p], cut to the cache's tokens start[p] : end[p].

    A unit is a piece, or pieces that share tokens (`turns`). In preference data pieces 2u and 2u + 1 are unit u. A unit of
    several pieces is never split.
    """

    cache: TokenCache
    index: np.ndarray  # int64 [P]
    start: np.ndarray  # int64 [P]
    end: np.ndarray  # int64 [P]
    num_targets: np.ndarray | None = None  # int64 [P]: the targets of each piece; None: they were not counted
    turns: Turns | None = None  # documents of a conversation that share their beginnings (shared_turns.py)
    numbers: np.ndarray | None = None  # int64 [D]: of a stream's rows, by the cache's documents; None: it is no stream
    # In preference data:
    shared: np.ndarray | None = None  # int64 [U]: tokens of the prompt, if the two of a unit share one copy of it
    ref_logps: np.ndarray | None = None  # fp32 [D]: log-probabilities of the cache's documents under the reference

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.start

    @property
    def group(self) -> int:
        """How many pieces are a unit: 2 in preference data, else 1."""
        return self.cache.group

    @property
    def unit(self) -> str:
        """The name of a unit."""
        return self.cache.unit if self.turns is None else "trees"

    @property
    def num_units(self) -> int:
        return len(self.index) // self.group if self.turns is None else len(self.turns.offsets) - 1

    @property
    def unit_lengths(self) -> np.ndarray:
        """Tokens of each unit, int64 [U]; what is shared counts once."""
        if self.turns is not None:
            return np.add.reduceat(self.lengths - self.turns.shared, self.turns.offsets[:-1])
        lengths = self.lengths.reshape(-1, self.group).sum(1)
        return lengths if self.shared is None else lengths - self.shared

    def pieces_of(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the first piece, the number of pieces) of each of these units, int64 [n] each."""
        if self.turns is None:
            return self.group * units.astype(np.int64), np.full(len(units), self.group)
        first = self.turns.offsets[units]
        return first, self.turns.offsets[units + 1] - first

    def shared_by(self, pieces: np.ndarray) -> np.ndarray:
        """How many tokens each of these pieces shares with the piece before it, int64 [n]."""
        if self.turns is not None:
            return self.turns.shared[pieces]
        if self.shared is None:
            return np.zeros(len(pieces), dtype=np.int64)
        return np.where(pieces % 2 == 1, self.shared[pieces // 2], 0)

    def take(self, units: np.ndarray) -> "Documents":
        """Only the units that are True in `units`, bool [U]. Before plan_set, which shares turns."""
        assert self.turns is None
        documents = np.repeat(units, self.group)
        shared = None if self.shared is None else self.shared[units]
        targets = None if self.num_targets is None else self.num_targets[documents]
        cut = {name: getattr(self, name)[documents] for name in ("index", "start", "end")}
        return replace(self, **cut, num_targets=targets, shared=shared)


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
    local_files_only: bool = False,
) -> TokenCache:
    """The tokenised rows of all sources, from the cache or built now.

    format, field_map: of the sources that name none of their own.
    on_bad_row: "error" stops at the first bad row, naming file and line; "skip" counts bad rows by reason.
    local_files_only: take hub repositories from the hub's local cache.
    Raises UserError (exit code DATA) for anything wrong with the data.
    """
    if on_bad_row not in ON_BAD_ROW:
        raise UserError(f"on_bad_row = {on_bad_row!r}", hint=f"one of {', '.join(ON_BAD_ROW)}")
    sources = locate_all(sources, format, field_map, options, local_files_only=local_files_only)
    sources, digests = hash_files(sources)
    folder = Path(cache_dir) / cache_key(sources, digests, tokenizer, options, on_bad_row)[:32]
    note = "found"
    if _problem(folder) is not None:
        try:
            with waiting_lock(folder):  # one rank builds, the others wait and find it
                if problem := _problem(folder):
                    note = "built" if problem == ABSENT else f"built again: {problem}"
                    _remove(folder)
                    gc.freeze()  # without this the collector rescans every object torch has loaded, 10 % of the build time
                    _build(folder, sources, digests, tokenizer, options, on_bad_row)
        except OSError as error:
            hint = "this is the token cache: set cache_dir to a writable folder with enough space"
            raise not_written(folder, error, hint=hint) from None
        finally:
            gc.unfreeze()
    hashes = {path: sha256(blocks).hexdigest() for path, blocks in digests.items()}
    return replace(_open(folder, tuple(sources), note), file_hashes=hashes)


def find_cache(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    cache_dir: Path | str,
    options: FormatOptions = FormatOptions(),  # noqa: B008 - frozen
    on_bad_row: str = "error",
) -> TokenCache | None:
    """What build_cache would find of sources that are located (`locate_all`); None where it would build. Its bytes are not
    verified."""
    sources, digests = hash_files(sources)
    folder = Path(cache_dir) / cache_key(sources, digests, tokenizer, options, on_bad_row)[:32]
    return _open(folder, tuple(sources), "found") if verify_folder(folder, hashes=False) is None else None


def locate_all(
    sources: Sequence[Source],
    format: str,
    field_map: dict[str, str] | None,
    options: FormatOptions,
    *,
    local_files_only: bool = False,
) -> list[Source]:
    """The sources with the format and the fields that they do not name themselves, and their files. Raises UserError."""
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
    return [locate(source, local_files_only=local_files_only) for source in sources]


def _problem(folder: Path) -> str | None:
    """None if the cache is there and every byte verifies, else what is wrong."""
    return verify_folder(folder) if os.path.lexists(folder) else ABSENT


def _remove(folder: Path) -> None:
    """Remove a folder that is no complete cache, and the leftovers of killed builds beside it."""
    if os.path.lexists(folder):
        shutil.rmtree(folder)  # refuses a link
    remove_leftovers(folder.parent)


def hash_files(sources: Sequence[Source]) -> tuple[list[Source], Digests]:
    """The sources with their files looked up, once for every later look, and the hashes of the files. Raises UserError."""
    sources = [replace(source, files=tuple(map(str, list_files(source)))) for source in sources]
    return sources, {path: hash_blocks(path) for path in dict.fromkeys(p for source in sources for p in source.files)}


def cache_key(
    sources: Sequence[Source], digests: Digests, tokenizer: Tokenizer, options: FormatOptions, on_bad_row: str
) -> str:
    """sha256 (hex) of everything that shapes the cache. The names and weights of sources do not shape it.

    digests: of every file that the sources have in `files`.
    """
    row_formats = [source.row_format and asdict(source.row_format) for source in sources]
    parts = {
        "version": [CACHE_VERSION, tokenizers.__version__],
        "sources": [
            {
                "files": [[path, sha256(digests[path]).hexdigest()] for path in source.files],
                "split": source.split,
                "format": source.format,
                "field_map": source.field_map,
                "ignore": source.ignore,
                **({"origins": source.origins, "row_format": row_format} if source.origins else {}),
            }
            for source, row_format in zip(sources, row_formats)
        ],
        "tokenizer": tokenizer.fingerprint(),
        "options": asdict(options),
        "on_bad_row": on_bad_row,
    }
    return sha256(json.dumps(parts, sort_keys=True).encode("utf-8")).hexdigest()


def _open(folder: Path, sources: tuple[Source, ...], note: str) -> TokenCache:
    manifest = read_manifest(folder)
    # The fingerprint hashes the tokens, not where they came from: the same tokens in another folder give the same order.
    shaping = ("ids", "kinds", "offsets", "source", "role")
    content = [manifest["files"][f"{name}.bin"]["sha256"] for name in shaping if f"{name}.bin" in manifest["files"]]
    fingerprint = sha256("".join(content).encode()).hexdigest()
    arrays: dict[str, Any] = {
        name: np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r") if f"{name}.bin" in manifest["files"] else None
        for name, dtype in (ARRAYS | OPTIONAL).items()
    }
    return TokenCache(
        folder=folder,
        sources=sources,
        **arrays,
        manifest=manifest,
        fingerprint=fingerprint,
        note=note,
    )


def _build(
    folder: Path,
    sources: Sequence[Source],
    digests: Digests,
    tokenizer: Tokenizer,
    options: FormatOptions,
    on_bad_row: str,
) -> None:
    copied = [[name for name, _ in source.origins] for source in sources]
    paths = list(dict.fromkeys(path for source, names in zip(sources, copied) for path in names or source.files))
    manifest: dict[str, Any] = {"paths": paths, "sources": [], "bad_rows": []}
    file_numbers = {path: number for number, path in enumerate(paths)}
    num_tokens, is_weighted, has_roles = 0, False, options.answers != "chosen"
    batches = _batches(sources, digests, tokenizer, options, on_bad_row, manifest)
    with atomic_folder(folder, manifest) as temporary:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(temporary / f"{name}.bin", "wb")) for name in (*ARRAYS, *OPTIONAL)}
            _append(files["offsets"], np.zeros(1, np.int64))
            if options.answers == "labels":
                batches = with_mismatched(batches, manifest["bad_rows"])
            for number, documents in batches:
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
                    _append(files[name], column.astype(ARRAYS[name], copy=False))
                if has_roles:
                    _append(files["role"], np.array([d.role for d in documents], dtype=np.uint8))
                if not is_weighted and any(np.any(d.weights != 1) for d in documents):
                    is_weighted = True
                    _write_ones(files["weights"], num_tokens)
                if is_weighted:
                    _write_weights(files["weights"], documents)
                num_tokens += int(lengths.sum())
        if num_tokens == 0:
            read = sum(entry["rows_read"] for entry in manifest["sources"])
            shown = "".join(f"\n  {bad_row}" for bad_row in manifest["bad_rows"])
            raise NothingToTrain(f"no usable row in {', '.join(paths)}: {read} read{shown}", exit_code=DATA)
        for name, is_there in (("weights", is_weighted), ("role", has_roles)):
            if not is_there:
                (temporary / f"{name}.bin").unlink()


def _batches(
    sources: Sequence[Source],
    digests: Digests,
    tokenizer: Tokenizer,
    options: FormatOptions,
    on_bad_row: str,
    manifest: dict,
) -> Iterator[tuple[int, list[Document]]]:
    """(number of the source, documents) of all sources; fills the manifest."""
    for number, source in enumerate(sources):
        entry = {**new_entry(), "commit": source.commit}
        manifest["sources"].append(entry)
        for documents in tokenise(source, tokenizer, options, on_bad_row, entry, manifest["bad_rows"], digests):
            yield number, documents
        assert entry["rows_read"] == entry["rows_used"] + sum(entry["dropped"].values())


def _write_ones(file: BinaryIO, count: int) -> None:
    for first in range(0, count, BLOCK_TOKENS):
        _append(file, np.ones(min(BLOCK_TOKENS, count - first), dtype=np.float32))


def _write_weights(file: BinaryIO, documents: list[Document]) -> None:
    for document in documents:
        _append(file, np.full(len(document.ids), document.weights, dtype=np.float32))


def _append(file: BinaryIO, column: np.ndarray) -> None:
    """ndarray.tofile does the same, but where the disk is full it may lose the last bytes without an error."""
    file.write(column.data)
