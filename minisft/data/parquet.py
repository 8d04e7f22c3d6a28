"""Parquet files as rows of plain JSON values, through the optional package pyarrow.

Parquet stores columns, cut into row groups of some thousand rows. A file is decoded BATCH_ROWS rows at a time, so memory
holds one batch and the compressed bytes of one row group, whatever the size of the file. The footer has the number of
rows, so counting them decodes nothing.

    text, numbers, truth values, null    as they are
    lists, structs, maps with text keys  arrays and objects
    dates, times, timestamps             text as in ISO 8601
    decimals                             text with all their digits

Everything else (bytes, durations, NaN) has no exact JSON form: a row that holds one is a bad row that names the column.
"""

import datetime
from collections.abc import Iterator
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.data.rows import BadRow, Row, excerpt
from minisft.errors import DATA, UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 512


def read_parquet(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """(row number from 1, row). Raises UserError if pyarrow is missing or the file is damaged."""
    number = 0
    with _opened(path) as file:
        batches = file.iter_batches(batch_size=BATCH_ROWS)
        while (batch := _next_batch(batches, path, number)) is not None:
            for values in _values(batch):
                number += 1
                yield number, _row(values, path, number)


def count_parquet(path: Path) -> int:
    """The number of rows, from the file's footer. Raises UserError as read_parquet does."""
    with _opened(path) as file:
        return file.metadata.num_rows


def _opened(path: Path) -> "ParquetFile":
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        hint = 'pip install "minisft[parquet]", or convert the file to .jsonl'
        raise UserError(f"{path}: Parquet files need the package pyarrow", hint=hint, exit_code=DATA) from None
    try:
        file = ParquetFile(path)
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
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"{path}: damaged after row {number}: {error}", exit_code=DATA) from None


def _values(batch: "RecordBatch") -> Iterator[dict | Exception]:
    """The rows of a batch. In place of a row that Python cannot hold (a text that is not UTF-8, nanoseconds): the exception."""
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError):  # one of the rows: find it
        for index in range(batch.num_rows):
            try:
                yield from batch.slice(index, 1).to_pylist(maps_as_pydicts="strict")
            except (ValueError, KeyError) as error:
                yield error


def _row(values: dict[str, Any] | Exception, path: Path, number: int) -> Row | BadRow:
    if isinstance(values, Exception):
        return BadRow(str(path), number, "not a JSON value", str(values))
    row = {}
    for name, value in values.items():
        try:
            row[name] = _plain(value)
        except TypeError as error:
            shown = excerpt(str(value)[:1000])
            return BadRow(str(path), number, "not a JSON value", f"column {name!r}: {error}", shown)
    return Row(row, str(path), number)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise TypeError(f"{value} is not JSON")
        return value
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a map whose keys are not texts has no JSON form")
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date too
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no exact JSON form")
