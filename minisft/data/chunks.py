"""Chunks of data that is never read as a whole (stream.py): some rows of the sources, copied into a folder of small files.

A `Place` is where the rows of a chunk begin. The folder's manifest has where they end, which is where the next chunk begins, and
for each of its files (`Part`) where its rows came from.

The rows come in the order of the files, one source after the other, and a chunk ends where the last source does. In a mix
(data.stream_mix) there is a place in each source. A chunk takes rows from all of them in proportion to their weights, and a
source that ends begins again at once, in the same chunk. So each row of a source comes once before any of them comes again.

Rows are copied as they are: lines of .jsonl (also .gz and .zst), row groups of .parquet. So a chunk is what a reader of the
whole file would have read, and memory holds one line, or one row group. The files of a hub repository are downloaded one by one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import IO

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
from minisft.data.parquet import copy_parquet
from minisft.data.repositories import locate
from minisft.data.row_format import RowFormat
from minisft.data.sources import BOM, MAX_ROW_BYTES, READ_AT_ONCE, Source, file_kind, list_files, open_rows
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
    # length and sha256 of the line before it, of a very long one of its end, by which a file that has changed is noticed
    before: str = ""
    number: int = 0  # rows of this pass before it: a row has the same number in every pass
    taken: int = 0  # rows of all passes before it


Places = tuple[Place, ...]  # one, or in a mix one for each source


@dataclass(frozen=True)
class Part:
    """A file of a chunk: rows of a file of a source."""

    source: int
    name: str  # of the file of the chunk
    number: int  # of its first row, as in Place
    file: int  # of the source
    row: int  # of the file, from 0: its first row


def start_of(sources: Sequence[Source], is_mix: bool) -> Places:
    """Where the first chunk begins."""
    return tuple(Place(source=number) for number in range(len(sources) if is_mix else 1))


def has_read_all(begin: Places, end: Places) -> bool:
    """Whether every row is between two places of a stream."""
    return all(
        (last.passes - 1, last.source, last.file, last.row) >= (first.passes, first.source, first.file, first.row)
        for first, last in zip(begin, end)
    )


def read_places(value: list[dict]) -> Places:
    """The places that a checkpoint holds as JSON. Raises UserError for one of an earlier version, whose rows have no numbers."""
    if not isinstance(value, list):
        hint = "choose a new output_dir, or set resume = 'never'"
        raise UserError(
            "the checkpoint of a stream from an earlier version cannot be resumed", hint=hint, exit_code=DATA
        )
    return tuple(Place(**place) for place in value)


def formats_of(cache: TokenCache, parts: Sequence[Part]) -> dict[int, RowFormat]:
    """The format of each source that has rows in a chunk, by the number of the source."""
    numbers, entries = dict.fromkeys(part.source for part in parts), cache.manifest["sources"]
    found = {number: entry.get("format") for number, entry in zip(numbers, entries)}  # absent in an older cache
    return read_formats({number: row_format for number, row_format in found.items() if row_format})


def read_formats(value: dict) -> dict[int, RowFormat]:
    """The same from the JSON of a checkpoint or a manifest."""
    return {int(number): RowFormat(**{**row, "ignored": tuple(row["ignored"])}) for number, row in value.items()}


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
            which = "" if name == source.path else f"{name} "
            refuse(f"{which}cannot be read in pieces", "convert it to .jsonl or .parquet")


def name_of(source: Source, file: int) -> str:
    """A file as messages name it."""
    return f"{source.path}/{source.files[file]}" if source.commit else source.files[file]


def local_file(source: Source, number: int, folder: Path, local_files_only: bool) -> Path:
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
    with waiting_lock(folder):
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
            manifest["parts"] = [tuple(vars(part).values()) for part in copier.parts]


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
    parts: list[Part] = field(default_factory=list)
    # of files, downloaded where they are the hub's, by source and file
    paths: dict[tuple[int, int], Path] = field(default_factory=dict)

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
            is_over = at.passes > begin.passes and not self.is_mix and (written >= self.least or not begin.number)
            if is_over or empty_passes > 1:
                break
        if rows and not written:
            files = ", ".join(name for source in self.sources for name in source.files)
            raise UserError(f"data.stream: no row in {files}", exit_code=DATA)
        return at

    def copy_of_file(self, at: Place, rows: int) -> tuple[int, Place, bool]:
        """As copy_lines, from the file in which the place is."""
        source, downloads = self.sources[at.source], self.folder.parent / "downloads"
        if (at.source, at.file) not in self.paths:
            self.paths[at.source, at.file] = local_file(source, at.file, downloads, self.local_files_only)
        path = self.paths[at.source, at.file]
        suffix = ".parquet" if file_kind(path)[0] == ".parquet" else ".jsonl"
        copy = self.folder / f"{at.source}-{at.file}-pass-{at.passes}-row-{at.row}{suffix}"
        if suffix == ".parquet":
            number, is_end = copy_parquet(path, copy, at.row, rows)
            end = replace(at, row=at.row + number)
        else:
            number, end, is_end = copy_lines(path, copy, at, rows)
        if number:
            self.parts.append(Part(at.source, copy.name, at.number, at.file, at.row))
        else:
            copy.unlink()
        if is_end and source.commit and not self.local_files_only and len(source.files) > 1:
            self.paths.pop((at.source, at.file)).unlink(missing_ok=True)  # its place on the disk is for the next one
        return number, replace(end, number=at.number + number, taken=at.taken + number), is_end

    def next_file(self, at: Place) -> Place:
        """The beginning of the file behind a place, which is in the next pass where it was the last."""
        if at.file + 1 < len(self.sources[at.source].files):
            return Place(at.passes, at.source, at.file + 1, number=at.number, taken=at.taken)
        if not self.is_mix and at.source + 1 < len(self.sources):
            return Place(at.passes, at.source + 1, number=at.number, taken=at.taken)
        return Place(at.passes + 1, at.source if self.is_mix else 0, taken=at.taken)


def read_chunk(
    folder: Path, sources: Sequence[Source], formats: dict[int, RowFormat] | None = None
) -> tuple[list[Source], list[Part], Places]:
    """(the sources of a chunk that was written, whose files are its own; these files; where the next chunk begins)"""
    manifest = read_manifest(folder)
    parts = [Part(*part) for part in manifest["parts"]]
    return sources_of(folder, sources, parts, formats or {}), parts, read_places(manifest["end"])


def sources_of(
    folder: Path, sources: Sequence[Source], parts: Sequence[Part], formats: dict[int, RowFormat]
) -> list[Source]:
    """The sources with the files that were copied into a folder for their own. formats: of the sources whose first rows were
    in another chunk; no later row decides it."""
    found = []
    for number in dict.fromkeys(part.source for part in parts):
        old, own = sources[number], [part for part in parts if part.source == number]
        files = tuple(str(folder / part.name) for part in own)
        origins = tuple((name_of(old, part.file), part.row) for part in own)
        new = replace(old, files=files, origins=origins, row_format=formats.get(number))
        found.append(replace(new, name=old.label, split="", weight=1.0))  # the weight chose the rows
    return found


def with_places(documents: Documents, sources: Sequence[Source], parts: Sequence[Part], is_mix: bool) -> Documents:
    """The documents of some parts with `numbers`.

    A row has one number in all passes and chunks: rows are numbered in the order of the stream; in a mix of S sources row r of
    source s is number r S + s.
    """
    cache, count = documents.cache, len(sources) if is_mix else 1
    places = {number: place for place, number in enumerate(dict.fromkeys(part.source for part in parts))}
    files = {name: number for number, name in enumerate(cache.manifest["paths"])}
    first = np.zeros((len(places), len(files)), dtype=np.int64)  # the number of the first row of each file of a source
    for part in parts:
        number = (part.number - part.row) * count + (part.source if is_mix else 0)
        first[places[part.source], files[name_of(sources[part.source], part.file)]] = number
    return replace(documents, numbers=first[cache.source, cache.file] + (cache.line - 1) * count)


def copy_lines(path: Path, copy: Path, at: Place, count: int) -> tuple[int, Place, bool]:
    """Copy up to `count` lines from a place on; (lines copied, the place behind them, whether it is the end of the file).

    Empty lines are copied with the row behind them, so there may be more; at the end of the file they are no rows, as for other
    readers. Raises UserError where the line before the place is another one now.
    """
    number, offset, before, empty = 0, at.offset, at.before, []
    with open_rows(path) as file, open(copy, "wb") as target:
        length, _, digest = at.before.partition(" ")
        _skip(file, at.offset - int(length or 0))
        if length and sha256(file.read(int(length))).hexdigest() != digest:
            hint = "put the file back as it was; rows may only be added at its end"
            raise UserError(f"{path}: it has changed before row {at.row + 1:,}", hint=hint, exit_code=DATA)
        for line, length, last in read_lines(file):
            if length == len(line) and not line.strip():
                empty.append(line)
                continue
            if number >= count:
                break
            for part in (*empty, line if offset else line.removeprefix(BOM)):
                target.write(part if part.endswith(b"\n") else part + b"\n")
            number += 1 + len(empty)
            offset += sum(map(len, empty)) + length
            before, empty = f"{len(last)} {sha256(last).hexdigest()}", []
        else:
            return number, replace(at, row=at.row + number, offset=offset, before=before), True
    return number, replace(at, row=at.row + number, offset=offset, before=before), False


def _skip(file: IO[bytes], offset: int) -> None:
    if file.seekable():
        file.seek(offset)
        return
    while offset:
        read = len(file.read(min(offset, 2**20)))
        if not read:
            return
        offset -= read


def read_lines(file: IO[bytes]) -> Iterator[tuple[bytes, int, bytes]]:
    """(a line with its end, its bytes in the file, the last of them). A line that is longer than a row may be is cut there, and
    the reader of the chunk refuses it."""
    while line := file.readline(MAX_ROW_BYTES + 2):
        length, last = len(line), line
        while not last.endswith(b"\n") and (more := file.readline(READ_AT_ONCE)):
            length, last = length + len(more), more
        yield line, length, last
