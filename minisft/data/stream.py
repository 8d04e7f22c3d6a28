"""Data that is never read as a whole: chunks of so many rows, each an ordinary data set with a token cache of its own.

    chunk k      rows begin : end of the sources, copied to a folder of small files. `Place` is where a chunk begins; the folder's
                 manifest has where it ends, which is where chunk k + 1 begins
    order        chunks in turn; the packs of a chunk are dealt as those of an epoch are, by (seed, tokens of the chunk, pass)
    position     (chunk, step): a checkpoint holds the number, the place and the first step of its chunk. So a resumed run needs
                 no earlier chunk, and may be on another machine

The rows come in the order of the files, one source after the other; a chunk is what is shuffled. After the last row the stream
begins again, with a new chunk, so that a pass over the data is an epoch. A data set of one chunk is therefore trained in the
same order as without streaming.

Rows are copied as they are: lines of .jsonl (also .gz and .zst), row groups of .parquet. So a chunk is what a reader of the
whole file would have read, and memory holds one line, or one row group. The files of a hub repository are downloaded one by one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Protocol

from minisft import hub
from minisft.atomic_folder import (
    atomic_folder,
    read_manifest,
    remove_folder,
    remove_leftovers,
    verify_folder,
    waiting_lock,
)
from minisft.data.cache import Documents
from minisft.data.packing import Plan
from minisft.data.parquet import copy_parquet
from minisft.data.repositories import locate
from minisft.data.sources import BOM, MAX_ROW_BYTES, Source, file_kind, list_files, open_rows
from minisft.errors import DATA, UserError

LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Place:
    """Where a chunk begins."""

    passes: int = 0  # over all rows, before it
    source: int = 0  # of the list
    file: int = 0  # of the source
    row: int = 0  # of the file, from 0
    offset: int = 0  # bytes of the unpacked file before it; 0 for .parquet
    before: str = ""  # length and sha256 of the line before it, by which a file that has changed is noticed


# ------------------------------------------------------------------------------------------------- sources


def find_files(sources: Sequence[Source], *, local_files_only: bool = False) -> list[Source]:
    """The sources with the names of their files: local paths, or those in a repository of the hub (then `commit` is set), of
    which none is downloaded. Raises UserError."""
    found = []
    for source in sources:
        if hub.is_repository_name(source.path):
            source = locate(source, local_files_only=local_files_only, download=False)
        else:
            source = replace(source, files=tuple(map(str, list_files(source))))
        _require_readable(source)
        found.append(source)
    return found


def _require_readable(source: Source) -> None:
    def refuse(problem: str, hint: str) -> None:
        raise UserError(f"data.stream: {source.label}: {problem}", hint=hint, exit_code=DATA)

    if source.weight != 1:
        refuse(f"weight = {source.weight:g}", "the rows of a stream come once a pass: leave the weight out")
    if source.slice:
        refuse(f"the slice {source.slice}", "a stream has no slices: name the files, and set max_steps")
    for name in source.files:
        suffix, compression = file_kind(name)
        if suffix not in LINES and (suffix != ".parquet" or compression):
            refuse(f"{name} cannot be read in pieces", "convert it to .jsonl or .parquet")


def _local(source: Source, number: int, folder: Path, local_files_only: bool) -> Path:
    """The path of a file, which is downloaded into the folder if the source is a repository."""
    name = source.files[number]
    if not source.commit:
        return Path(name)
    options = {"local_files_only": local_files_only, "folder": None if local_files_only else folder}
    return hub.download_dataset(source.path, source.commit, [name], **options)[0]


# ------------------------------------------------------------------------------------------------- chunks


def write_chunk(
    folder: Path, sources: Sequence[Source], begin: Place, rows: int, *, local_files_only: bool = False
) -> None:
    """Copy up to `rows` rows, at least one, from `begin` on into a new folder; a chunk ends where the last source does.

    The folder appears whole or not at all; if another process is writing it, this one waits. Raises UserError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder.with_name(f".lock-{folder.name}")):
        if verify_folder(folder, hashes=False) is None:
            return
        remove_leftovers(folder.parent)
        if folder.exists():
            remove_folder(folder)
        manifest: dict = {"begin": asdict(begin), "parts": []}
        with atomic_folder(folder, manifest) as temporary:
            at, written = begin, 0
            while written < rows:
                source = sources[at.source]
                path = _local(source, at.file, folder.parent / "downloads", local_files_only)
                name = (
                    f"{at.source}-{at.file}-row-{at.row}{'.parquet' if file_kind(path)[0] == '.parquet' else '.jsonl'}"
                )
                if name.endswith(".parquet"):
                    number, is_end = copy_parquet(path, temporary / name, at.row, rows - written)
                    at = replace(at, row=at.row + number)
                else:
                    number, at, is_end = copy_lines(path, temporary / name, at, rows - written)
                written += number
                if number:
                    manifest["parts"].append([at.source, name])
                else:
                    (temporary / name).unlink()
                if is_end:
                    if source.commit and not local_files_only:
                        path.unlink(missing_ok=True)  # its place on the disk is for the next one
                    at = _next_file(at, sources)
                    if at.passes > begin.passes:
                        break
            if not written:
                files = ", ".join(name for source in sources for name in source.files)
                raise UserError(f"data.stream: no row in {files}", exit_code=DATA)
            manifest["end"] = asdict(at)


def _next_file(at: Place, sources: Sequence[Source]) -> Place:
    if at.file + 1 < len(sources[at.source].files):
        return Place(at.passes, at.source, at.file + 1)
    if at.source + 1 < len(sources):
        return Place(at.passes, at.source + 1)
    return Place(passes=at.passes + 1)


def read_chunk(folder: Path, sources: Sequence[Source]) -> tuple[list[Source], Place]:
    """(the sources of a chunk that was written, whose files are its own; where the next chunk begins)"""
    manifest = read_manifest(folder)
    found = []
    for number in dict.fromkeys(source for source, _ in manifest["parts"]):
        files = tuple(str(folder / name) for source, name in manifest["parts"] if source == number)
        old = sources[number]
        found.append(replace(old, name=old.label, files=files, split=""))
    return found, Place(**manifest["end"])


def copy_lines(path: Path, copy: Path, at: Place, count: int) -> tuple[int, Place, bool]:
    """Copy up to `count` lines from a place on; (lines copied, the place behind them, whether it is the end of the file).

    Empty lines are copied with the row behind them, so there may be more; at the end of the file they are no rows, as for other
    readers. Raises UserError where the line before the place is another one now.
    """
    number, offset, last, empty = 0, at.offset, at.before, []
    with open_rows(path) as file, open(copy, "wb") as target:
        length, _, digest = at.before.partition(" ")
        _skip(file, at.offset - int(length or 0))
        if length and sha256(file.read(int(length))).hexdigest() != digest:
            hint = "put the file back as it was; rows may only be added at its end"
            raise UserError(f"{path}: it has changed before row {at.row + 1:,}", hint=hint, exit_code=DATA)
        for line in _lines(file):
            if not line.strip():
                empty.append(line)
                continue
            if number >= count:
                break
            for part in (*empty, line if offset else line.removeprefix(BOM)):
                target.write(part if part.endswith(b"\n") else part + b"\n")
            number += 1 + len(empty)
            offset += sum(map(len, empty)) + len(line)
            last, empty = f"{len(line)} {sha256(line).hexdigest()}", []
        else:
            return number, replace(at, row=at.row + number, offset=offset, before=last), True
    return number, replace(at, row=at.row + number, offset=offset, before=last), False


def _skip(file: IO[bytes], offset: int) -> None:
    if file.seekable():
        file.seek(offset)
        return
    while offset:
        read = len(file.read(min(offset, 2**20)))
        if not read:
            return
        offset -= read


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines with their ends. One that is longer than a row may be is cut there, and the reader of the chunk refuses it."""
    while line := file.readline(MAX_ROW_BYTES + 2):
        yield line


# ------------------------------------------------------------------------------------------------- the stream of a run


class Target(Protocol):
    """What a stream feeds: the loader of a run."""

    documents: Documents
    plan: Plan
    first_step: int

    def forget(self) -> None: ...
    @property
    def steps_per_epoch(self) -> int: ...


@dataclass(eq=False)
class Stream:
    """The chunks of a run: which one is open, and what makes the next.

    open(number, begin) -> (documents, plan, where the next chunk begins). ahead(number, begin): begin to build a chunk in another
    process; returns what stops that. discard(number): delete the files of a chunk that is behind.
    """

    open: Callable[[int, Place], tuple[Documents, Plan, Place]]
    ahead: Callable[[int, Place], Callable[[], None]]
    discard: Callable[[int], None]
    number: int = 0
    begin: Place = Place()
    end: Place = Place()
    vocab_size: int | None = None  # rows of the embedding, once the model is known
    _stop: Callable[[], None] | None = None

    def position(self) -> dict:
        """For a checkpoint, beside the first step of the chunk."""
        return {"chunk": self.number, "begin": asdict(self.begin)}

    def go_to(self, loader: Target, position: dict, first_step: int) -> None:
        """Open the chunk of a checkpoint, or stay in it."""
        begin = Place(**position["begin"])
        if (self.number, self.begin) != (position["chunk"], begin):
            self._enter(loader, position["chunk"], begin, first_step)
        loader.first_step = first_step

    def reach(self, loader: Target, step: int) -> None:
        """Open the chunk that step `step` is in, which is the present one or the next."""
        while step >= loader.first_step + loader.steps_per_epoch:
            self._enter(loader, self.number + 1, self.end, loader.first_step + loader.steps_per_epoch)

    def follow(self, loader: Target, step: int) -> None:
        """The same, and let another process build the next chunk, until `close`."""
        self.reach(loader, step)
        if self._stop is None:
            self._stop = self.ahead(self.number + 1, self.end)

    def _enter(self, loader: Target, number: int, begin: Place, first_step: int) -> None:
        documents, plan, end = self.open(number, begin)
        self.require_known(documents)
        self.close()
        before, self.number, self.begin, self.end = self.number, number, begin, end
        loader.documents, loader.plan, loader.first_step = documents, plan, first_step
        loader.forget()
        if before not in (0, number):  # the first chunk stays: every start reads it before it knows where it resumes
            self.discard(before)

    def require_known(self, documents: Documents) -> None:
        """UserError where a chunk has a token that the embedding has no row for."""
        highest = int(documents.cache.ids.max())
        if self.vocab_size is not None and highest >= self.vocab_size:
            problem = f"chunk {self.number}: token {highest:,}, but the embedding has {self.vocab_size:,} rows"
            raise UserError(problem, hint="the tokenizer has tokens that the model does not know", exit_code=DATA)

    def close(self) -> None:
        """End the process that builds ahead."""
        if self._stop is not None:
            self._stop()
            self._stop = None
