"""From files to rows: the first thing that happens to data, and the place where most of it breaks.

A source is a path or a glob of files, with a weight and perhaps a slice. Reading is strict, because a lenient reader
loses data silently: `str.splitlines` cuts a JSON string at U+2028, a JSON parser accepts NaN and keeps the last of two
equal keys, an encoding is guessed wrongly. So files are read as bytes, split on 0x0A only and decoded as UTF-8. Each row
becomes a `Row`, or a `BadRow` that says what is wrong with it; nothing is skipped here.

    .jsonl   one JSON object a line (CR before the newline is tolerated; an empty line is a bad row, but at the end); .ndjson too
    .json    one JSON array of objects; rows are named by their index from 0
    .csv     RFC 4180 with a header line; every value is text, and empty lines at the end are no rows. Values may be separated by
             semicolons or tabs: the separator is the one that gives the header and the first row the same number of values,
             more than one
    .tsv     the same with tabs
    .parquet rows of plain values, through pyarrow (parquet.py)
    .txt     one file is one row {"text": ...}, because a newline inside prose is no reliable border. For many documents
             use many files and a glob, or a .jsonl

All but .parquet may be compressed, as in .jsonl.gz and .csv.zst (through pyarrow). Suffixes may be in capitals.
"""

import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO, cast

from minisft.data.hashed_file import open_file
from minisft.data.parquet import count_parquet, read_parquet
from minisft.data.row_format import RowFormat
from minisft.data.rows import EXCERPT, BadRow, Row, excerpt
from minisft.errors import DATA, UserError, shortened
from minisft.files import checked_path, is_there, read_up_to, require_file
from minisft.hub import is_repository_name
from minisft.strict_json import parse_json

MAX_ROW_BYTES = 16 * 2**20  # of a row; of what is read for one, if it is longer
MAX_FILE_BYTES = 2**30  # of a .json file, which is read whole
READ_AT_ONCE = 2**16  # bytes, or characters of a table, of the rest of a row that is too long
DELIMITERS = ",\t;"
LINE_ENDS = ("\n", "\r")  # of a table
COMPRESSED = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd"}  # suffix -> first bytes
DAMAGED = (OSError, EOFError, zlib.error)  # errors of reading and of unpacking

SLICE = re.compile(r"\[\s*(-?\d{1,15}%?)?\s*:\s*(-?\d{1,15}%?)?\s*\]$")
LIKE_A_SLICE = re.compile(r"\[[-\d%: ]*:[-\d%: ]*\]$")
MAX_WEIGHT = 10_000  # passes over a source per epoch
MAGIC = {  # first bytes of files that people name .jsonl by mistake
    b"\x1f\x8b": "gzip data; name it .gz, as in .jsonl.gz",
    b"\x28\xb5\x2f\xfd": "zstandard data; name it .zst, as in .jsonl.zst",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"PAR1": "a Parquet file; name it .parquet",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
    b"version https://git-lfs": "a Git LFS pointer, not the data; run `git lfs pull`",
    b"<!doctype": "an HTML page, not the data; the download failed",
    b"<html": "an HTML page, not the data; the download failed",
}
NOT_A_KEY = ("files", "commit", "origins", "row_format")  # fields of a source that are found out
LISTS = {"data_files": "names of files", "ignore": "names of fields"}  # fields of a source that are lists
BOM = b"\xef\xbb\xbf"
SPACE = re.compile(r"[ \t\r\n]+")  # between the elements of a JSON array
Digests = dict[str, bytes]  # path -> the hashes of its blocks (hashed_file.py)


@dataclass(frozen=True)
class Source:
    """One entry of a data set."""

    path: str  # a file or a glob of the kinds above; or a hub repository: owner/name
    name: str = ""  # for reports, "" = the path; for a repository the configuration, as in load_dataset
    weight: float = 1.0  # passes over this source per epoch: 2 = twice, 0.5 = a half drawn once by the seed
    split: str = ""  # "[:10%]", "[100:200]", "[-5:]", "train[:10%]"; a repository has other splits too: "test[:10%]"
    format: str = "auto"  # "auto", or a key of formats.FORMATS
    field_map: dict[str, str] = field(default_factory=dict)  # the user's field -> ours
    ignore: tuple[str, ...] = ()  # the user's fields that are left out, as if no row had them
    # Of a repository only:
    revision: str = ""  # branch, tag or commit
    data_dir: str = ""  # the folder in it
    data_files: tuple[str, ...] = ()  # names or globs
    files: tuple[str, ...] = ()  # local paths, once repositories.locate has downloaded them, or a glob was looked up
    commit: str = ""  # that they are from
    # Of a chunk of a stream only (chunks.py):
    origins: tuple[tuple[str, int], ...] = ()  # of each file: the one its rows are from, and the rows before them
    row_format: RowFormat | None = None  # that of the source's first chunk; None: the first row decides it

    @property
    def label(self) -> str:
        return self.name or self.path + self.split.removeprefix("train")

    @property
    def origin(self) -> str:
        """The commit and the chosen files of a repository."""
        names = [file.partition(f"/{self.commit}/")[2] for file in self.files]
        return f"{self.commit}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    @property
    def split_name(self) -> str:
        return self.split.partition("[")[0] or "train"

    @property
    def slice(self) -> str:
        return self.split.removeprefix(self.split.partition("[")[0])


# ------------------------------------------------------------------------------------------------- sources and their files


def parse_source(value: str | dict | Source) -> Source:
    """A source from a path ("data/*.jsonl[:10%]") or from a table with the fields of `Source`.

    Raises UserError for an unknown key, a wrong type or a value out of range.
    """
    if isinstance(value, Source):
        return value
    table = {"path": value} if isinstance(value, str) else value
    if not isinstance(table, dict):
        raise UserError(f"a data source is a path or a table, not {value!r}")
    known = {f.name: f for f in fields(Source) if f.name not in NOT_A_KEY}
    for key, given in table.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown key {key!r} in the data source {table}", hint=f"{hint}keys: {', '.join(known)}")
        expected = {"weight": (int, float), "field_map": dict, **dict.fromkeys(LISTS, (str, list, tuple))}.get(key, str)
        if not isinstance(given, expected) or isinstance(given, bool):
            raise UserError(f"{key} = {given!r} in a data source: expected {known[key].type}")
    if not table.get("path"):
        raise UserError(f"a data source without a path: {table}", hint='give path = "data.jsonl"')
    lists = {key: table.get(key, ()) for key in LISTS}
    lists = {key: (names,) if isinstance(names, str) else tuple(names) for key, names in lists.items()}
    for key, names in lists.items():
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{key} = {table[key]!r} in a data source: expected {LISTS[key]}")
    weight: Any = table.get("weight", 1.0)  # a number, as was checked above
    if not 0 < weight <= MAX_WEIGHT:
        bounds = f"expected a number above 0 and at most {MAX_WEIGHT:,}"
        raise UserError(f"weight = {weight} of the data source {table['path']}: {bounds}")
    source = Source(**{**table, "weight": float(weight), **lists})
    if not all(isinstance(name, str) for name in source.field_map.values()):
        raise UserError(f"field_map = {source.field_map} in a data source: names must be text")
    checked_path(source.path, "the path of a data source")

    sliced = SLICE.search(source.path)
    if not sliced and (like := LIKE_A_SLICE.search(source.path)) and not os.path.exists(source.path):
        hint = 'as in "[:10%]", "[100:200]", "[-5:]"; a bound has at most 15 digits'
        raise UserError(f"{shortened(like[0], 60)} of {source.path[: like.start()]} is not a slice", hint=hint)
    if sliced and not os.path.exists(source.path):
        if source.split:
            raise UserError(f"{source.path} has a slice and split = {source.split!r} another", hint="keep one of them")
        source = Source(**{**vars(source), "path": source.path[: sliced.start()], "split": sliced[0]})
    if source.slice and not SLICE.fullmatch(source.slice):
        raise UserError(
            f"split = {source.split!r} of {source.path} is not a slice",
            hint='as in "[:10%]", "train[100:200]", "[-5:]"',
        )
    if not is_repository_name(source.path):
        wrong = [key for key in ("revision", "data_dir", "data_files") if getattr(source, key)]
        if source.split_name != "train":
            raise UserError(
                f"split = {source.split!r} of {source.path} is not a slice",
                hint='a local source has one split, "train"; slices look like "[:10%]", "train[100:200]", "[-5:]"',
            )
        if wrong:
            hint = "only a hub repository, as owner/name, has them; name the local files by path"
            raise UserError(f"{wrong[0]} is given for {source.path}, which is local or no repository", hint=hint)
    return source


def list_files(source: Source) -> list[Path]:
    """The files of a source, sorted by path; those that it names in `files`, if it does.

    Raises UserError if there are none or one cannot be read.
    """
    if source.files:
        for name in source.files:
            _check_file(name)
        return [Path(name) for name in source.files]
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder", hint=f'name its files, as in "{path}/*.jsonl"', exit_code=DATA)
    if is_there(path):
        names = [path]
    else:
        names = sorted(name for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
    if not names:
        raise UserError(f"no file matches {path}", hint=f"looked from {os.getcwd()}", exit_code=DATA)
    for name in names:
        _check_file(name)
    return [Path(name) for name in names]


def _check_file(name: str) -> None:
    def refuse(what: str) -> NoReturn:
        raise UserError(f"{name}: {what}", exit_code=DATA)

    shown = os.fsencode(name).decode("utf-8", "backslashreplace")
    if shown != name:
        hint = "rename the file: its name could not be recorded"
        raise UserError(f"{shown}: the name is not UTF-8 text", hint=hint, exit_code=DATA)
    suffix, compression = file_kind(name)
    if suffix not in READERS:
        refuse(f"unknown kind of file; known are {' '.join(READERS)}, also with {' or '.join(COMPRESSED)} after it")
    if suffix == ".parquet" and compression:
        refuse("a Parquet file is compressed inside; unpack it")
    require_file(name)
    try:
        with open(name, "rb") as file:
            head = file.read(64)
        if compression and head and not head.startswith(COMPRESSED[compression]):
            refuse(f"not {compression} data")
        if compression and head:
            with open_rows(Path(name)) as file:
                head = file.read(64)
    except DAMAGED as error:
        refuse(getattr(error, "strerror", None) or str(error))
    if not head:
        refuse("empty file (0 bytes)")
    if head == BOM:
        refuse("empty file (only a byte order mark)")
    if suffix != ".txt" and len(head) < 64 and not head.removeprefix(BOM).strip():
        refuse("empty file (only white space)")
    if suffix == ".parquet":
        if not head.startswith(b"PAR1"):
            refuse("not a Parquet file: it does not begin with PAR1")
        return
    for magic, what in MAGIC.items():
        if head.lower().startswith(magic.lower()):
            refuse(what)


def read_rows(source: Source, digests: Digests | None = None) -> Iterator[Row | BadRow]:
    """All rows of a source in order, or those of its slice. A slice counts the rows of all files together, bad ones too.

    digests: of each file, what hashed_file.hash_blocks returned; then no byte is used that has changed since. One row at a time
    is in memory (a .json file is read whole). Raises UserError if a whole file cannot be read, or has changed.
    """
    digests = digests or {}
    records = _records(source, digests)
    sliced = SLICE.fullmatch(source.slice)
    no_row = UserError(f"{source.label}: the slice holds no row", exit_code=DATA)
    if sliced:
        # Counting costs a pass over the files, so the rows are counted only for bounds that need their number.
        needs_total = any(bound and bound[-1] == "%" or bound and bound[0] == "-" for bound in sliced.groups())
        total = sum(_count(path, digests.get(str(path))) for path in list_files(source)) if needs_total else 0
        first, last = (_row_number(bound, total) for bound in sliced.groups())
        if last is not None and (first or 0) >= last or needs_total and (first or 0) >= total:
            raise no_row
        records = islice(records, first, last)
    origins, is_empty = dict(zip(source.files, source.origins)), True
    for file, line, value in records:
        is_empty = False
        row = _parse(file, line, value) if isinstance(value, bytes) else value
        if origins:
            name, before = origins[file]
            row = replace(row, file=name, line=before + line)
        yield row
    if sliced and is_empty:
        raise no_row


def count_rows(source: Source) -> int:
    """Rows of all files of a source, or of its slice. Rows without a slice are counted, not parsed."""
    if source.slice != "[:]" and source.slice:
        return sum(1 for _ in read_rows(source))
    return sum(_count(path, None) for path in list_files(source))


def _count(path: Path, digests: bytes | None) -> int:
    is_parquet = file_kind(path)[0] == ".parquet"
    return count_parquet(path, digests) if is_parquet else sum(1 for _ in _read(path, digests))


def _row_number(bound: str | None, total: int) -> int | None:
    """A slice's bound as a row number; percentages round down, so [:10%] and [10%:] meet without overlap."""
    if not bound:
        return None
    number = int(bound.rstrip("%"))
    if bound.endswith("%"):
        number = min(number * total // 100, total) if number >= 0 else -(-number * total // 100)
    return number if number >= 0 else max(0, total + number)


def source_names(labels: Sequence[str]) -> list[str]:
    """The sources as metrics name them: by their last component, or whole where two different ones have the same."""
    last = {label: label.rstrip("/").rpartition("/")[2] for label in labels}
    return [last[label] if list(last.values()).count(last[label]) == 1 else label for label in labels]


# ------------------------------------------------------------------------------------------------- file formats


def _records(source: Source, digests: Digests) -> Iterator[tuple[str, int, bytes | Row | BadRow]]:
    """(file, line, record) of each row. A JSON record stays bytes, so that rows outside a slice are never parsed."""
    tools = next((theirs for theirs, ours in source.field_map.items() if ours == "tools"), "tools")
    for path in list_files(source):
        for line, value in _read(path, digests.get(str(path)), tools):
            yield str(path), line, value


def file_kind(path: Path | str) -> tuple[str, str]:
    """(a key of READERS if the kind is known, a key of COMPRESSED or ""), from the name."""
    name = Path(path).name.lower()
    compression = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return Path(name.removesuffix(compression)).suffix, compression


def _read(path: Path, digests: bytes | None, tools: str = "tools") -> Iterator[tuple[int, bytes | Row | BadRow]]:
    """(line, record) of each row of a file. tools: its column of tools. Raises UserError if it is damaged or cannot be read."""
    suffix, compression = file_kind(path)
    try:
        is_parquet = suffix == ".parquet"
        yield from read_parquet(path, digests, tools) if is_parquet else READERS[suffix](path, digests)
    except DAMAGED as error:
        problem = f"damaged {compression} data: {error}" if compression else getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {problem}", exit_code=DATA) from None


def open_rows(path: Path, digests: bytes | None = None) -> BinaryIO:
    """The bytes of a file, unpacked. Raises UserError if that needs pyarrow and it is missing."""
    compression = file_kind(path)[1]
    if not compression:
        return open_file(path, digests)
    packed = str(path) if digests is None else open_file(path, digests)
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(packed, "rb"))
    try:
        from pyarrow import input_stream
    except ImportError:
        hint = 'pip install "minisft[parquet]", or unpack the file'
        raise UserError(f"{path}: .zst files need the package pyarrow", hint=hint, exit_code=DATA) from None
    return cast(BinaryIO, io.BufferedReader(input_stream(packed, compression="zstd")))


def _parse(file: str, line: int, text: bytes) -> Row | BadRow:
    reason = detail = ""
    if len(text) > MAX_ROW_BYTES:
        reason, detail = "too long", f"at most {MAX_ROW_BYTES:,} bytes of a row are read"
    else:
        try:
            value = parse_json(text)
            if type(value) is dict:
                return Row(value, file, line)
            hint = "; if the file is one JSON array, name it .json" if isinstance(value, list) and line == 1 else ""
            reason, detail = "not a JSON object", f"the row is a {type(value).__name__}{hint}"
        except UserError as error:
            if not text.strip():
                return BadRow(file, line, "empty line")
            reason, _, detail = error.message.partition(": ")
            detail += _json_hint(text.strip(), line)
    return BadRow(file, line, reason, detail, excerpt(text[: 4 * EXCERPT].decode("utf-8", "replace")))


def _json_hint(text: bytes, line: int) -> str:
    """What a line that is no JSON looks like, if it is a common mistake."""
    if line == 1 and text.startswith(b"["):
        return "; the file is one JSON array: name it .json"
    if line == 1 and text == b"{":
        return "; an object of several lines: in a .jsonl file each is one line"
    if text.endswith(b"},"):
        return "; a comma after the row: a .jsonl file has none, or it is a JSON array without its brackets"
    return ""


def _read_jsonl(path: Path, digests: bytes | None) -> Iterator[tuple[int, bytes]]:
    num_empty = 0  # lines so far, which are rows only if something follows
    with open_rows(path, digests) as file:
        lines = iter(partial(file.readline, MAX_ROW_BYTES + 1), b"")  # a binary file is split on 0x0A only
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_ROW_BYTES:
                _skip_line(file, line)
            elif number == 1:
                line = line.removeprefix(BOM)
            if len(line) <= MAX_ROW_BYTES and (not line or line.isspace()):
                num_empty += 1
                continue
            if num_empty:
                yield from ((number - before, b"") for before in range(num_empty, 0, -1))
                num_empty = 0
            yield number, line


def _skip_line(file: BinaryIO, line: bytes) -> None:
    """Read up to the end of a line that begins with `line`."""
    while line and not line.endswith(b"\n"):
        line = file.readline(READ_AT_ONCE)


def _read_json(path: Path, digests: bytes | None) -> Iterator[tuple[int, bytes]]:
    """The elements of an array, found by a lenient scan; `_parse` then reads each one strictly."""

    def refuse(what: str) -> NoReturn:
        raise UserError(
            f"{path}: {what}",
            hint="a .json file is one array of objects; name a file with one object a line .jsonl",
            exit_code=DATA,
        )

    data = _bytes(path, digests, MAX_FILE_BYTES)
    if len(data) > MAX_FILE_BYTES:
        refuse(f"more than {MAX_FILE_BYTES:,} bytes, which are read at once")
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"not UTF-8 text at byte {error.start}")
    del data
    scan = json.JSONDecoder().raw_decode
    at = _skip_space(text, 0)
    if text[at : at + 1] != "[":
        refuse("not a JSON array")
    at = _skip_space(text, at + 1)
    index = 0
    while text[at : at + 1] != "]" or index > 0:
        try:
            stop = scan(text, at)[1]
        except (ValueError, RecursionError) as error:
            refuse(f"element {index} is not valid JSON: {error}; it begins {excerpt(text[at : at + EXCERPT + 1])}")
        yield index, text[at:stop].encode("utf-8")
        index += 1
        at = _skip_space(text, stop)
        if text[at : at + 1] == "]":
            break
        if text[at : at + 1] != ",":
            refuse(f"a comma or ] is missing after element {index - 1}")
        at = _skip_space(text, at + 1)
    if text[at + 1 :].strip():
        refuse("there is text after the array")


def _skip_space(text: str, at: int) -> int:
    space = SPACE.match(text, at)
    return space.end() if space else at


class _RowTooLong(Exception):
    """A row of a table is longer than MAX_ROW_BYTES."""


class _TableLines:
    """The lines of a table for the csv module, which puts those of one row together as long as a quote is open."""

    def __init__(self, file: TextIO):
        self.file, self.number = file, 0  # lines so far
        self.begin_row()

    def begin_row(self) -> None:
        self.size = self.quotes = 0  # characters of the row, and quotes among them

    def __iter__(self) -> "_TableLines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.size += len(line)
        self.quotes += line.count('"')
        if self.size <= MAX_ROW_BYTES:
            self.number += 1
            return line
        while line:  # up to the end of the row
            if line.endswith(LINE_ENDS):
                self.number += 1
                if self.quotes % 2 == 0:
                    break
            line = self.file.readline(READ_AT_ONCE)
            self.quotes += line.count('"')
        raise _RowTooLong


def _read_csv(path: Path, digests: bytes | None) -> Iterator[tuple[int, Row | BadRow]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    # Undecodable bytes become lone surrogates, so that a wrong byte makes one bad row and not a bad file.
    with _csv_text(path, digests) as file:
        lines = _TableLines(file)
        reader = csv.reader(lines, strict=True, delimiter=_delimiter(path, digests))
        try:
            header = next(reader, [])
        except (csv.Error, _RowTooLong) as error:
            what = str(error) or f"more than {MAX_ROW_BYTES:,} characters"
            raise UserError(f"{path}:1: the header line: {what}", exit_code=DATA) from None
        if not header:
            raise UserError(f"{path}:1: the header line is empty", exit_code=DATA)
        if not _is_unicode("".join(header)):
            raise UserError(f"{path}:1: not UTF-8 text", hint="save the file as UTF-8", exit_code=DATA)
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise UserError(f"{path}:1: a column name is empty or occurs twice: {header}", exit_code=DATA)
        num_empty = 0  # lines so far, which are bad rows only if something follows
        while True:
            line = lines.number + 1
            lines.begin_row()
            problem = detail = ""
            values = [""]
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem, detail = "not valid CSV", str(error)
            except _RowTooLong:
                problem, detail = "too long", f"at most {MAX_ROW_BYTES:,} characters of a row are read"
            if not values:
                num_empty += 1
                continue
            for before in range(num_empty, 0, -1):
                yield line - before, BadRow(str(path), line - before, "empty line")
            num_empty = 0
            if not problem and len(values) != len(header):
                problem, detail = "wrong number of values", f"{len(values)} values for {len(header)} columns"
            elif not problem and not _is_unicode("".join(values)):
                problem = "not UTF-8 text"
            if problem:
                shown = ",".join(values).encode("utf-8", "replace").decode()
                yield line, BadRow(str(path), line, problem, detail, excerpt(shown) if shown else "")
            else:
                yield line, Row(dict(zip(header, values)), str(path), line)


def _csv_text(path: Path, digests: bytes | None) -> TextIO:
    return io.TextIOWrapper(open_rows(path, digests), encoding="utf-8-sig", errors="surrogateescape", newline="")


def _delimiter(path: Path, digests: bytes | None) -> str:
    """What separates the values of a CSV file: the first of DELIMITERS that divides the header and the first row alike."""
    if file_kind(path)[0] == ".tsv":
        return "\t"
    for delimiter in DELIMITERS:
        try:
            with _csv_text(path, digests) as file:
                header, *rows = islice(csv.reader(_TableLines(file), delimiter=delimiter), 2)
        except (csv.Error, _RowTooLong):
            continue
        if len(header) > 1 and all(len(row) == len(header) for row in rows):
            return delimiter
    return DELIMITERS[0]


def _bytes(path: Path, digests: bytes | None, at_most: int) -> bytearray:
    """All bytes; of a longer file the first at_most + 1."""
    with open_rows(path, digests) as file:
        return read_up_to(file, at_most + 1)


def _read_text(path: Path, digests: bytes | None) -> Iterator[tuple[int, Row | BadRow]]:
    data = _bytes(path, digests, MAX_ROW_BYTES)
    if len(data) > MAX_ROW_BYTES:
        detail = f"at most {MAX_ROW_BYTES:,} bytes of a row are read; cut it into rows"
        yield 1, BadRow(str(path), 1, "too long", detail)
        return
    data = data.removeprefix(BOM)
    try:
        yield 1, Row({"text": data.decode("utf-8")}, str(path), 1)
    except UnicodeDecodeError as error:
        shown = excerpt(data[: 4 * EXCERPT].decode("utf-8", "replace"))
        yield 1, BadRow(str(path), 1, "not UTF-8 text", f"byte {error.start}", shown)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


READERS = {  # in the order in which repositories.py prefers them
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".parquet": read_parquet,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
}
