"""Single rows of a stream, found again in the files of its sources: by their numbers (chunks.py), or by file and line.

No chunk has to be there. The files are read from their beginning up to the last row that is looked for; those of a hub
repository are downloaded one by one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from minisft.data.chunks import Part, local_file, name_of, read_lines
from minisft.data.parquet import copy_parquet, count_parquet
from minisft.data.sources import BOM, Source, file_kind, open_rows
from minisft.errors import DATA, UserError


def copy_rows(
    folder: Path, sources: Sequence[Source], numbers: Sequence[int], *, is_mix: bool, local_files_only: bool = False
) -> list[Part]:
    """Copy the rows with these numbers into a folder, each as a file. Raises UserError where there is no such row."""
    count, parts = len(sources) if is_mix else 1, []
    for turn in sorted({number % count for number in numbers}):
        wanted, first = sorted({number // count for number in numbers if number % count == turn}), 0
        for source, file in files_of(sources, turn if is_mix else None):
            path = local_file(sources[source], file, folder / "downloads", local_files_only)
            suffix = ".parquet" if file_kind(path)[0] == ".parquet" else ".jsonl"
            rows = [row - first for row in wanted]
            copies = {row: folder / f"{source}-{file}-row-{row}{suffix}" for row in rows}
            length = (_copy_parquet if suffix == ".parquet" else _copy_lines)(path, copies)
            parts += [Part(source, copies[row].name, first + row, file, row) for row in rows if row < length]
            first += length
            wanted = [row for row in wanted if row >= first]
            if not wanted:
                break
        if wanted:
            hint = "its files must be as they were: rows may only be added at the end of the last one"
            raise UserError(f"row {wanted[0]:,} of the stream: there are {first:,}", hint=hint, exit_code=DATA)
    return parts


def files_of(sources: Sequence[Source], only: int | None) -> Iterator[tuple[int, int]]:
    """(source, file) of all files in the order of their rows; only: those of one source."""
    for number, source in enumerate(sources):
        if only in (None, number):
            yield from ((number, file) for file in range(len(source.files)))


def _copy_lines(path: Path, copies: dict[int, Path]) -> int:
    """Copy some lines, which are numbered from 0. Returns how many there are, or how many were read to have the copies."""
    length, last = 0, max(copies, default=-1)
    with open_rows(path) as file:
        for row, (line, size, _) in enumerate(read_lines(file)):
            if size > len(line) or line.strip():
                length = row + 1  # empty lines at the end are no rows
            if row in copies:
                copies[row].write_bytes(line if row else line.removeprefix(BOM))
            if row == last:
                break
    return length


def _copy_parquet(path: Path, copies: dict[int, Path]) -> int:
    length = count_parquet(path)
    for row, copy in copies.items():
        if row < length:
            copy_parquet(path, copy, row, 1)
    return length


def number_of(
    sources: Sequence[Source], name: str, line: int, folder: Path, *, is_mix: bool, local_files_only: bool = False
) -> int:
    """The number of the row in this line, from 1, of the file with this name, "" where there is one file. Raises UserError."""
    files = list(files_of(sources, None))
    names = {place: name_of(sources[place[0]], place[1]) for place in files}
    chosen = [place for place in files if names[place] == name]
    chosen = chosen or [place for place in files if Path(names[place]).name == Path(name).name or not name]
    if len(chosen) != 1 or line < 1:
        raise UserError(
            f"row {name}{':' if name else ''}{line}: there are {len(chosen)} such files",
            hint=f"FILE:NUMBER, as in {Path(names[files[0]]).name}:{max(line, 1)}",
        )
    ((source, file),) = chosen
    before = 0
    for place in files_of(sources, source if is_mix else None):
        if place == (source, file):
            break
        path = local_file(sources[place[0]], place[1], folder / "downloads", local_files_only)
        before += count_parquet(path) if file_kind(path)[0] == ".parquet" else _copy_lines(path, {})
    count = len(sources) if is_mix else 1
    return (before + line - 1) * count + (source if is_mix else 0)
