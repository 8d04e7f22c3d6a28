"""JSON lines of a run: files that are appended to, cut after a resume, and outlive a full disk.

JSON has no NaN, and a NaN loss must not look like a missing one: values that are not finite are written as the strings
"NaN", "Infinity", "-Infinity", which float() reads back.
"""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minisft.errors import warn
from minisft.strict_json import spelled


class LogFile:
    """A file that is appended to, cut to its first `position` bytes at the start.

    A full disk only delays what is written: bytes that find no room are kept and written before the next ones.
    """

    def __init__(self, path: Path, position: int = 0):
        self.path, self.pending = path, b""
        self.file = open(path, "ab", buffering=0)
        self.written = self.file.tell()
        if self.written < position:
            warn(f"{path} has {self.written} bytes, {position} when the checkpoint was saved: lines are missing")
        else:
            self.written = position
            self.file.truncate(position)

    def write(self, data: bytes) -> None:
        self.pending += data
        try:
            while self.pending:
                count = self.file.write(self.pending)
                self.written, self.pending = self.written + count, self.pending[count:]
        except OSError as error:
            warn(f"{self.path} could not be written, {len(self.pending)} bytes are waiting: {error}")

    def sync(self) -> int:
        """The number of bytes that were given, which are on the disk now unless a warning says otherwise."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            warn(f"{self.path}: {error}")
        return self.written + len(self.pending)

    def close(self) -> None:
        if self.pending:
            self.write(b"")
        self.file.close()


def json_line(values: dict[str, Any]) -> bytes:
    """The values as one line of JSON, also those that are not finite."""
    return json.dumps(spelled(values), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; without one that a full disk left unfinished. [] where there is no file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl or timings.jsonl."""
    return [
        {key: float(value) if isinstance(value, str) else value for key, value in row.items()}
        for row in read_lines(path)
    ]


def write_report(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write lines of JSON for the user to look at after something went wrong, which a full disk must not hide."""
    try:
        path.write_bytes(b"".join(map(json_line, rows)))
    except OSError as error:
        warn(f"{path} could not be written: {error}")
