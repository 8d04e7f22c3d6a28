"""JSON that is read strictly.

`parse_json` accepts exactly one JSON value in UTF-8 and refuses these, which Python's reader accepts: NaN, Infinity and 1e400,
a key given twice (the last would win), half of a surrogate pair (it breaks the tokenizer later), UTF-16 (which Python
guesses silently) and nesting so deep that it exhausts the stack, of the parser or of what reads the value later.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from minisft.errors import DATA, UserError, shortened
from minisft.files import read_file

MAX_DEPTH = 100  # of lists and objects inside each other


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"a key occurs twice in one object: {shortened(repr(twice), 60)}")
    return value


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"a number is too large for a float: {shortened(text, 40)}")
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates, parse_float=_finite_float, parse_constant=_refuse_constant
)
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def _decode(text: str) -> Any:
    """_DECODER.decode(text) in two thirds of its time for a short text: without its two searches for whitespace."""
    try:
        value, end = _DECODER.scan_once(text, 0)  # pyright: ignore[reportAttributeAccessIssue] typeshed leaves it out
    except StopIteration:  # whitespace comes first, or no value does
        return _DECODER.decode(text)
    return _DECODER.decode(text) if text[end:].strip(" \t\n\r") else value  # something follows: let it complain


def parse_json(data: bytes, where: str = "", *, exit_code: int = DATA) -> Any:
    """One JSON value from its UTF-8 bytes, strictly (see the top of this file).

    `where` (a path, or "file:line") begins the message; without it the message is the bare reason.
    Raises UserError with `exit_code`.
    """
    try:
        value = _decode(data.decode("utf-8"))
        if data.count(b"{") + data.count(b"[") > MAX_DEPTH and not is_depth_at_most(value, MAX_DEPTH):
            raise RecursionError
        if b"\\" in data and _SURROGATE_ESCAPE.search(data):  # the first test is a tenth of the second
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on half a pair
        return value
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text: byte 0x{data[error.start]:02x} at position {error.start}"
    except UnicodeEncodeError:
        reason = "half of a surrogate pair (\\ud800 to \\udfff) stands alone; it is not a character"
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        reason = f"not valid JSON: {error.msg.removesuffix(' at')} at {line}column {error.colno}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # from the three functions above, or an integer of more than 4300 digits
        reason = str(error)
    raise UserError(f"{where}: {reason}" if where else reason, exit_code=exit_code)


def is_depth_at_most(value: Any, depth: int) -> bool:
    """Whether at most so many lists and dicts are inside each other."""
    level = [value] if isinstance(value, (dict, list)) else []
    while level and depth:
        inner = [one.values() if isinstance(one, dict) else one for one in level]
        level = [one for values in inner for one in values if isinstance(one, (dict, list))]
        depth -= 1
    return not level


def read_json(path: Path | str, *, exit_code: int = DATA) -> Any:
    """The JSON value in a file. Raises UserError, also where the file cannot be read."""
    return parse_json(read_file(path, exit_code=exit_code), str(path), exit_code=exit_code)


def spelled(value: Any) -> Any:
    """The value with "NaN", "Infinity" and "-Infinity", which float() reads back, in the place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: spelled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [spelled(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def dump_json(value: Any) -> bytes:
    """UTF-8, indented by two, keys in their own order, a newline at the end. Raises ValueError on NaN and Infinity."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` and wait until it is on the disk. Not atomic: use it inside an atomic folder, or for a report."""
    data = dump_json(value)  # before the file is opened, so that a bad value leaves the old file alone
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
