"""Data that is never read as a whole: chunks of so many rows, each an ordinary data set with a token cache of its own.

    chunk k      some rows of the sources, copied to a folder of small files. A `Place` is where they begin; the folder's manifest
                 has where they end, which is where chunk k + 1 begins
    order        chunks in turn; the packs of a chunk are dealt as those of an epoch are, by (seed, tokens of the chunk, k)
    position     (chunk, step): a checkpoint holds the number, the places and the first step of its chunk. So a resumed run needs
                 no earlier chunk, and may be on another machine

The rows come in the order of the files, one source after the other; a chunk is what is shuffled. After the last row the stream
begins again, with a new chunk, so that a pass over the data is an epoch. A data set of one chunk is therefore trained in the
same order as without streaming.

A mix (data.stream_mix) has a place in each source. A chunk takes rows from all of them in proportion to their weights, and a
source that ends begins again at once, in the same chunk. So each row of a source comes once before any of them comes again.

Rows are copied as they are: lines of .jsonl (also .gz and .zst), row groups of .parquet. So a chunk is what a reader of the
whole file would have read, and memory holds one line, or one row group. The files of a hub repository are downloaded one by one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from minisft import hub
from minisft.atomic_folder import (
    atomic_folder,
    read_manifest,
    remove_folder,
    remove_leftovers,
    verify_folder,
    waiting_lock,
)
from minisft.data.cache import Documents, TokenCache
from minisft.data.packing import Plan
from minisft.data.parquet import copy_parquet
from minisft.data.repositories import locate
from minisft.data.sources import BOM, MAX_ROW_BYTES, Source, file_kind, list_files, open_rows, source_names
from minisft.errors import DATA, UserError

LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Place:
    """Where a chunk begins: in all sources, one after the other; in a mix, in one of them."""

    passes: int = 0  # over all rows, before it
    source: int = 0  # of the list
    file: int = 0  # of the source
    row: int = 0  # of the file, from 0
    offset: int = 0  # bytes of the unpacked file before it; 0 for .parquet
    before: str = ""  # length and sha256 of the line before it, by which a file that has changed is noticed
    number: int = 0  # rows of this pass before it: a row has the same number in every pass
    taken: int = 0  # rows of all passes before it


Places = tuple[Place, ...]  # one, or in a mix one for each source


def start_of(sources: Sequence[Source], is_mix: bool) -> Places:
    """Where the first chunk begins."""
    return tuple(Place(source=number) for number in range(len(sources) if is_mix else 1))


def read_places(value: list[dict] | dict) -> Places:
    """The places that a checkpoint holds as JSON; a single table where it was written before there were mixes."""
    return tuple(Place(**place) for place in (value if isinstance(value, list) else [value]))


# ------------------------------------------------------------------------------------------------- sources


def find_files(sources: Sequence[Source], *, is_mix: bool = False, local_files_only: bool = False) -> list[Source]:
    """The sources with the names of their files: local paths, or those in a repository of the hub (then `commit` is set), of
    which none is downloaded. Raises UserError."""
    found = []
    for source in sources:
        if hub.is_repository_name(source.path):
            source = locate(source, local_files_only=local_files_only, download=False)
        else:
            source = replace(source, files=tuple(map(str, list_files(source))))
        _require_readable(source, is_mix)
        found.append(source)
    return found


def _require_readable(source: Source, is_mix: bool) -> None:
    def refuse(problem: str, hint: str) -> None:
        raise UserError(f"data.stream: {source.label}: {problem}", hint=hint, exit_code=DATA)

    if source.weight != 1 and not is_mix:
        hint = "set stream_mix = true: weights are then shares of the rows; or leave the weight out"
        refuse(f"weight = {source.weight:g}, but the sources of this stream come one after the other", hint)
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
    folder: Path, sources: Sequence[Source], begin: Places, rows: int, *, least: int = 1, local_files_only: bool = False
) -> None:
    """Copy `rows` rows from `begin` on into a new folder. Where the sources come one after the other, a chunk ends where the last
    one does; but not with fewer than `least` rows, unless there are no more.

    The folder appears whole or not at all; if another process is writing it, this one waits. Raises UserError.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder.with_name(f".lock-{folder.name}")):
        if verify_folder(folder, hashes=False) is None:
            return
        remove_leftovers(folder.parent)
        if folder.exists():
            remove_folder(folder)
        manifest: dict = {"begin": [asdict(place) for place in begin], "parts": [], "end": []}
        with atomic_folder(folder, manifest) as temporary:
            copier = Copier(temporary, sources, is_mix=len(begin) > 1, least=least, local_files_only=local_files_only)
            for place, number in zip(begin, shares(begin, [source.weight for source in sources], rows)):
                manifest["end"].append(asdict(copier.copy(place, number)))
            manifest["parts"] = copier.parts


def shares(begin: Places, weights: Sequence[float], rows: int) -> list[int]:
    """How many of the `rows` rows of a chunk come from each place, so that its share of all rows so far is that of its weight.

    Of n rows since the beginning, a source of weight w has n w / (sum of weights) to within 1 at the end of every chunk, or to
    within 2 if a chunk is too small to have a row of each source.
    """
    if len(begin) == 1:
        return [rows]
    total = sum(place.taken for place in begin) + rows
    due = [total * weight / sum(weights) - place.taken for place, weight in zip(begin, weights)]
    numbers = [max(0, int(rows_due)) for rows_due in due]
    places = range(len(begin))
    while sum(numbers) < rows:
        numbers[max(places, key=lambda i: due[i] - numbers[i])] += 1
    while sum(numbers) > rows:
        numbers[min((i for i in places if numbers[i]), key=lambda i: due[i] - numbers[i])] -= 1
    return numbers


@dataclass
class Copier:
    """What copies the rows of a chunk into a folder."""

    folder: Path
    sources: Sequence[Source]
    is_mix: bool
    least: int  # as in write_chunk
    local_files_only: bool
    parts: list[tuple[int, str, int]] = field(
        default_factory=list
    )  # source, file in the folder, number of its first row

    def copy(self, begin: Place, rows: int) -> Place:
        """Copy up to `rows` rows; the place behind them."""
        at, written, empty_passes = begin, 0, 0
        while written < rows:
            number, end, is_end = self.copy_of_file(at, rows - written)
            written += number
            if not is_end:
                at = end
                continue
            at = self.next_file(end)
            empty_passes = 0 if number else empty_passes + (at.passes > end.passes)
            if (
                empty_passes > 1
                or at.passes > begin.passes
                and not self.is_mix
                and (written >= self.least or not begin.number)
            ):
                break
        if rows and not written:
            files = ", ".join(name for source in self.sources for name in source.files)
            raise UserError(f"data.stream: no row in {files}", exit_code=DATA)
        return at

    def copy_of_file(self, at: Place, rows: int) -> tuple[int, Place, bool]:
        """As copy_lines, from the file in which the place is."""
        source, downloads = self.sources[at.source], self.folder.parent / "downloads"
        path = _local(source, at.file, downloads, self.local_files_only)
        suffix = ".parquet" if file_kind(path)[0] == ".parquet" else ".jsonl"
        copy = self.folder / f"{at.source}-{at.file}-pass-{at.passes}-row-{at.row}{suffix}"
        if suffix == ".parquet":
            number, is_end = copy_parquet(path, copy, at.row, rows)
            end = replace(at, row=at.row + number)
        else:
            number, end, is_end = copy_lines(path, copy, at, rows)
        if number:
            self.parts.append((at.source, copy.name, at.number))
        else:
            copy.unlink()
        if is_end and source.commit and not self.local_files_only and len(source.files) > 1:
            path.unlink(missing_ok=True)  # its place on the disk is for the next one
        return number, replace(end, number=at.number + number, taken=at.taken + number), is_end

    def next_file(self, at: Place) -> Place:
        """The beginning of the file behind a place, which is in the next pass where it was the last."""
        if at.file + 1 < len(self.sources[at.source].files):
            return Place(at.passes, at.source, at.file + 1, number=at.number, taken=at.taken)
        if not self.is_mix and at.source + 1 < len(self.sources):
            return Place(at.passes, at.source + 1, number=at.number, taken=at.taken)
        return Place(at.passes + 1, at.source if self.is_mix else 0, taken=at.taken)


def read_chunk(folder: Path, sources: Sequence[Source]) -> tuple[list[Source], Places]:
    """(the sources of a chunk that was written, whose files are its own; where the next chunk begins)"""
    manifest = read_manifest(folder)
    found = []
    for number in dict.fromkeys(source for source, *_ in manifest["parts"]):
        files = tuple(str(folder / name) for source, name, _ in manifest["parts"] if source == number)
        old = sources[number]
        found.append(replace(old, name=old.label, files=files, split="", weight=1.0))  # the weight chose the rows
    return found, read_places(manifest["end"])


def row_numbers(folder: Path, cache: TokenCache) -> np.ndarray:
    """The row of each document of a chunk that was tokenised, int64 [D]: a number that is the same in every pass and chunk.

    Rows are numbered in the order of the stream; in a mix of S sources row r of source s is number r S + s.
    """
    manifest = read_manifest(folder)
    count, first = len(manifest["begin"]), {}
    for source, name, number in manifest["parts"]:
        first[name] = number * count + (source if count > 1 else 0)
    of_file = np.array([first[Path(path).name] for path in cache.manifest["paths"]])
    return of_file[cache.file] + (cache.line - 1) * count


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

    open: Callable[[int, Places], tuple[Documents, Plan, Places]]
    ahead: Callable[[int, Places], Callable[[], None]]
    discard: Callable[[int], None]
    begin: Places
    end: Places
    sources: Sequence[Source]
    number: int = 0
    vocab_size: int | None = None  # rows of the embedding, once the model is known
    check: Callable[[Documents], None] | None = None  # raises UserError for a chunk that the model cannot train on
    _stop: Callable[[], None] | None = None

    def position(self) -> dict:
        """For a checkpoint, beside the first step of the chunk."""
        return {"chunk": self.number, "begin": [asdict(place) for place in self.begin]}

    def order(self) -> dict:
        """What decides which rows are in a chunk, as a checkpoint compares it."""
        mix = {"mix": [source.weight for source in self.sources]} if len(self.begin) > 1 else {}
        return {"chunk": self.number, **mix}

    def counts(self) -> dict[str, int | float]:
        """For the log: the chunk; in a mix also how many rows of each source were read up to its end, and in how many passes that
        were completed."""
        found: dict[str, int | float] = {"chunk": self.number}
        if len(self.end) > 1:
            for name, place in zip(source_names([source.label for source in self.sources]), self.end):
                found |= {f"rows/source {name}": place.taken, f"passes/source {name}": place.passes}
        return found

    def go_to(self, loader: Target, position: dict, first_step: int) -> None:
        """Open the chunk of a checkpoint, or stay in it."""
        begin = read_places(position["begin"])
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

    def _enter(self, loader: Target, number: int, begin: Places, first_step: int) -> None:
        documents, plan, end = self.open(number, begin)
        self.require_known(documents)
        if self.check is not None:
            self.check(documents)
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
