"""Parquet files as rows of plain JSON values, through the optional package pyarrow.

A file is read in batches of BATCH_ROWS rows, so memory holds one batch of one row group. Numbers, texts, truths, lists and
structs (maps as objects, where their keys are texts) become what JSON has; dates and times become ISO text, which loses
nothing. Bytes and decimals have no exact JSON form: a row that holds one is a bad row that names the column.
"""

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisft.data.rows import BadRow, Row, excerpt
from minisft.errors import DATA, UserError

BATCH_ROWS = 512


def read_parquet(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    """(row number from 1, row). Raises UserError where pyarrow is missing or the file is damaged."""
    with _opened(path) as file:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield number, _row(values, path, number)
        except (OSError, ValueError) as error:  # pyarrow's errors are of these
            raise UserError(f"{path}: damaged after row {number}: {error}", exit_code=DATA) from None


def count_parquet(path: Path) -> int:
    """The number of rows, from the file's own footer."""
    with _opened(path) as file:
        return file.metadata.num_rows


def _opened(path: Path):
    try:
        from pyarrow import parquet
    except ImportError:
        hint = 'pip install "minisft[parquet]", or convert the file to .jsonl'
        raise UserError(f"{path}: Parquet files need the package pyarrow", hint=hint, exit_code=DATA) from None
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file: {error}", exit_code=DATA) from None


def _row(values: dict[str, Any], path: Path, number: int) -> Row | BadRow:
    row = {}
    for name, value in values.items():
        try:
            row[name] = _plain(value)
        except TypeError as error:
            return BadRow(str(path), number, "not a JSON value", f"column {name!r}: {error}", excerpt(str(value)))
    return Row(row, str(path), number)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        pairs = bool(value) and all(isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) for v in value)
        return {key: _plain(inner) for key, inner in value} if pairs else [_plain(inner) for inner in value]
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date too
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} has no exact JSON form")
