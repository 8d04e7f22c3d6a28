"""A configuration as text for people: the keys that are set, in the order of config/sections.py, with a remark on each."""

import textwrap
import tomllib
from pathlib import Path
from typing import Any

from minisft.atomic_folder import not_written, write_file
from minisft.config.check import require_packages
from minisft.config.sections import KEYS
from minisft.config.stages import load_stages
from minisft.config.values import as_toml
from minisft.errors import UserError

WIDTH = 110

StageKeys = tuple[str, dict[str, Any], dict[str, str]]  # name of the stage, {full key: value}, {full key: a remark}


def configuration(header: list[str], parts: list[StageKeys], output_dir: str) -> str:
    """The text of one run, or of several stages below the keys that they share."""
    if len(parts) == 1:
        _, values, remarks = parts[0]
        return render(header, {"output_dir": output_dir} | values, remarks)
    names, tables = [name for name, _, _ in parts], [values for _, values, _ in parts]
    own_keys = {"trainer_type", "output_dir"}
    own_keys |= {k for k in tables[0] if len({part[2].get(k) for part in parts}) > 1}  # packs here, pairs there
    shared = {k: v for k, v in tables[0].items() if k not in own_keys and all(k in t and t[k] == v for t in tables[1:])}
    start = {k: v for k, v in tables[0].items() if k.startswith("model.") and all(t.get(k, v) == v for t in tables[1:])}
    later = [{k: v for k, v in t.items() if k not in shared and not (i and k in start)} for i, t in enumerate(tables)]
    common = {"output_dir": output_dir} | shared
    own = [(name, table, part[2]) for name, table, part in zip(names, later, parts)]
    return render(header, common, parts[0][2], own)


def render(
    header: list[str], values: dict[str, Any], remarks: dict[str, str], stages: list[StageKeys] | None = None
) -> str:
    """The text of a TOML file. header: paragraphs, "" between blocks; values: full name -> value; remarks: full name ->
    the comment behind the key. stages: one [[stages]] table each, after the common keys."""
    lines = [line for paragraph in header for line in _comment(paragraph)]
    lines += _tables(values, remarks, "")
    for name, own, own_remarks in stages or []:
        lines += ["", "", f"[[stages]] # {name}", *_tables(own, own_remarks, "stages.")]
    return "\n".join(lines) + "\n"


def _comment(paragraph: str) -> list[str]:
    """Comment lines, wrapped at WIDTH."""
    return [f"# {line}".rstrip() for line in wrapped(paragraph, WIDTH)]


def wrapped(paragraph: str, width: int) -> list[str]:
    """Printable lines, broken between words; a paragraph that starts with spaces keeps that indent on every line."""
    indent = " " * (len(paragraph) - len(paragraph.lstrip()))
    lines = textwrap.wrap(paragraph.strip(), width - len(indent), subsequent_indent="  ", break_long_words=False,
                          break_on_hyphens=False)  # fmt: skip
    return [indent + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines or [""]]


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


def refuse_broken(text: str, path: Path) -> None:
    """Raises UserError if the configuration, which will be in `path`, does not load, or needs what is not installed."""
    try:
        for stage in load_stages(tomllib.loads(text)):
            require_packages(stage.config, stage.origins)
    except UserError as error:
        message = error.message.replace("the given dict", str(path))
        raise UserError(message, hint=error.hint, exit_code=error.exit_code) from None


def refuse_to_replace(path: Path, *, force: bool) -> None:
    """Raises UserError if the path is a folder, or a file and `force` is not set."""
    if path.is_dir() or path.exists() and not force:
        hint = "name another file by --output" + ("" if path.is_dir() else ", or replace this one with --force")
        raise UserError(f"{path} exists", hint=hint)


def write(path: Path, text: str, *, force: bool = False) -> None:
    """Write the whole file or nothing. Raises UserError if it exists and `force` is not set, or if writing fails."""
    refuse_to_replace(path, force=force)
    hint = "name another file by --output"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(path, error, hint=hint) from None
    write_file(path, text, hint=hint)
