"""A configuration as text for people: the keys that are set, in the order of config.py, each with where it comes from."""

import os
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from minisft.config import KEYS
from minisft.config_values import as_toml
from minisft.errors import UserError

WIDTH = 110

Stage = tuple[str, dict[str, Any], dict[str, str]]  # its name, {full key: value}, {full key: a remark}


def render(
    header: list[str], values: dict[str, Any], remarks: dict[str, str], stages: list[Stage] | None = None
) -> str:
    """The text of a TOML file. header: paragraphs, "" between blocks; values: full name -> value; remarks: full name ->
    what stands behind the key. stages: one [[stages]] table each, after the common keys."""
    lines = [line for paragraph in header for line in _comment(paragraph)]
    lines += _tables(values, remarks, "")
    for name, own, own_remarks in stages or []:
        lines += ["", "", f"[[stages]] # {name}", *_tables(own, own_remarks, "stages.")]
    return "\n".join(lines) + "\n"


def _comment(paragraph: str) -> list[str]:
    """Wrapped at WIDTH; what starts with spaces hangs by them."""
    indent = " " * (len(paragraph) - len(paragraph.lstrip()))
    wrapped = textwrap.wrap(paragraph.strip(), WIDTH - len(indent), subsequent_indent="  ", break_long_words=False,
                            break_on_hyphens=False)  # fmt: skip
    printable = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in wrapped or [""])
    return [f"# {indent}{line}".rstrip() for line in printable]


def _tables(values: dict[str, Any], remarks: dict[str, str], before: str) -> list[str]:
    lines, section = [], ""
    for key in KEYS:
        if key not in values:
            continue
        here, _, name = key.rpartition(".")
        if here != section:
            lines += ["", f"[{before}{here}]"]
            section = here
        line = f"{name} = {as_toml(values[key])}"
        remark = "".join(c if c.isprintable() else " " for c in remarks.get(key, ""))
        lines.append(f"{line} # {remark}" if remark and remark != line else line)
    return ["", *lines] if lines and lines[0] and not before else lines


def write(path: Path, text: str, *, force: bool = False) -> None:
    """The whole file or nothing. Raises UserError where it exists and `force` is not set."""
    if path.is_dir() or path.exists() and not force:
        hint = "name another file by --output" + ("" if path.is_dir() else ", or replace this one with --force")
        raise UserError(f"{path} exists", hint=hint)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
