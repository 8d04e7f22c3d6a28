"""Parquet files as rows of plain JSON values, through the optional package pyarrow.

Parquet stores columns, cut into row groups of some thousand rows. A file is decoded BATCH_ROWS rows at a time, so memory
holds one batch and the compressed bytes of one row group, whatever the size of the file. The footer has the number of
rows, so counting them decodes nothing.

    text, numbers, truth values, null    as they are
    lists, structs, maps with text keys  arrays and objects
    dates, times, timestamps             text as in ISO 8601
    decimals                             text with all their digits

Everything else (bytes, durations, NaN) has no exact JSON form and becomes NotJson: a row is bad only if a column that is read
holds one.

All structs of a column have the same keys, which are null where a row has none. So null keys of `tools`, and of structs inside
other structs (tool calls with their arguments), are left out. Maps have keys of their own, which stay.
"""

import datetime
from collections.abc import Iterator
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from minisft.data.hashed_file import open_file
from minisft.data.rows import NotJson, Row
from minisft.errors import DATA, UserError

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 512
UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    NotImplementedError,
)  # of a value; pyarrow's are among them


def read_parquet(path: Path, digests: bytes | None = None, tools: str = "tools") -> Iterator[tuple[int, Row]]:
    """(row number from 1, row). digests: as in hashed_file.open_file. tools: the column of tools, which a field_map may
    rename later.

    Raises UserError if pyarrow is missing, the file is damaged, or has changed.
    """
    number = 0
    with open_file(path, digests) as bare, _opened(path, bare) as file:
        shapes = {column.name: _shape(column.type) for column in file.schema_arrow}
        batches = file.iter_batches(batch_size=BATCH_ROWS)
        while (batch := _next_batch(batches, path, number)) is not None:
            for values in _values(batch):
                number += 1
                row = {name: _json_value(value, shapes[name], 2 * (name == tools)) for name, value in values.items()}
                yield number, Row(row, str(path), number)


def count_parquet(path: Path, digests: bytes | None = None) -> int:
    """The number of rows, from the file's footer. Raises UserError as read_parquet does."""
    with open_file(path, digests) as bare, _opened(path, bare) as file:
        return file.metadata.num_rows


def copy_parquet(path: Path, copy: Path, row: int, count: int) -> tuple[int, bool]:
    """Write up to `count` rows from row `row` on (from 0) into another file; (rows written, whether they are the last).

    One row group is in memory. Raises UserError as read_parquet does.
    """
    with open_file(path) as bare, _opened(path, bare) as file:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetWriter

        number, first = 0, 0  # rows written; the first row of the group
        try:
            with ParquetWriter(copy, file.schema_arrow) as writer:
                for group in range(file.num_row_groups):
                    size = file.metadata.row_group(group).num_rows
                    begin, end = max(row - first, 0), min(row + count - first, size)
                    if begin < end:
                        writer.write_table(file.read_row_group(group).slice(begin, end - begin))
                        number += end - begin
                    first += size
        except (OSError, ValueError, ArrowException) as error:
            raise UserError(f"{path}: damaged after row {row + number}: {error}", exit_code=DATA) from None
        return number, row + number >= file.metadata.num_rows


def _opened(path: Path, bare: BinaryIO) -> "ParquetFile":
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        hint = 'pip install "minisft[parquet]", or convert the file to .jsonl'
        raise UserError(f"{path}: Parquet files need the package pyarrow", hint=hint, exit_code=DATA) from None
    try:
        file = ParquetFile(bare)
    except UserError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}", exit_code=DATA) from None
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        file.close()
        raise UserError(f"{path}: a column name occurs twice: {', '.join(names)}", exit_code=DATA)
    return file


def _next_batch(batches: Iterator["RecordBatch"], path: Path, number: int) -> "RecordBatch | None":
    from pyarrow import ArrowException

    try:
        return next(batches, None)
    except UserError:
        raise
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{path}: damaged after row {number}: {error}", exit_code=DATA) from None


def _values(batch: "RecordBatch") -> Iterator[dict]:
    """The rows of a batch. In place of a value that Python cannot hold (a text that is not UTF-8, nanoseconds): the exception."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except UNREADABLE:  # one of the values: find it
        for index in range(batch.num_rows):
            yield {name: _value(batch, name, index) for name in batch.schema.names}


def _value(batch: "RecordBatch", name: str, index: int) -> Any:
    try:
        return batch.column(name)[index].as_py(maps_as_pydicts="strict")
    except UNREADABLE as error:
        return error


def _shape(type: "DataType") -> Any:
    """Where the structs of a type are: {key: shape} of a struct, [shape] of a list or a map, None of anything else."""
    from pyarrow import types

    if types.is_struct(type):
        return {field.name: _shape(field.type) for field in type}
    if types.is_map(type):
        return [_shape(type.item_type)]
    if hasattr(type, "value_field"):  # the kinds of lists
        return [_shape(type.value_type)]
    return None


def _json_value(value: Any, shape: Any, depth: int) -> Any:
    """A column's value as JSON has it, or NotJson."""
    try:
        if isinstance(value, Exception):
            raise TypeError(str(value))
        return _plain(value, shape, depth)
    except TypeError as error:
        return NotJson(str(error))


def _plain(value: Any, shape: Any, depth: int) -> Any:
    """depth: how many structs are around the value; in the second one, keys that are null are left out."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise TypeError(f"{value} is not JSON")
        return value
    if isinstance(value, list):
        return [_plain(inner, shape[0] if shape else None, depth) for inner in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a map whose keys are not texts has no JSON form")
        if not isinstance(shape, dict):  # a map
            return {key: _plain(inner, shape[0] if shape else None, depth) for key, inner in value.items()}
        return {
            key: _plain(inner, shape[key], depth + 1) for key, inner in value.items() if inner is not None or depth == 0
        }
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date too
        if getattr(value, "nanosecond", 0):  # where pandas is installed pyarrow returns its timestamps; else it raises
            raise TypeError("nanoseconds have no exact JSON form")
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no exact JSON form")
