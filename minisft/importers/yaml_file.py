"""Another trainer's file: YAML or JSON in, a plain dict out. Nothing in it is run.

YAML has three traps: `1e-4` without a dot is text (translation.py makes it a number where a number is expected); of a key
that is given twice, the second silently wins (refused here); and aliases may contain themselves, or grow without end in a few
lines (values are counted with aliases written out).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from minisft.errors import CONFIG, UserError
from minisft.files import is_there, read_file
from minisft.strict_json import parse_json

MAX_BYTES, MAX_VALUES, MAX_KEYS, MAX_DEPTH = 2**20, 50_000, 5000, 20


class _Loader(yaml.SafeLoader):
    """The safe loader, and strict about keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        scalars = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]  # PyYAML refuses other keys
        for key in scalars:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The table of a .yaml, .yml or .json file. Raises UserError (exit code 2) for anything else."""
    if not is_there(path):
        raise UserError(f"{path}: there is no such file", hint=f"the working directory is {Path.cwd()}")
    data = read_file(path, exit_code=CONFIG, at_most=MAX_BYTES)
    try:
        if path.suffix == ".json":
            table = parse_json(data, str(path), exit_code=CONFIG)
        else:
            table = yaml.load(data.decode("utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        hint = "one document of `key: value` lines"
        raise UserError(f"{where}: not a YAML file that can be read: {problem}", hint=hint) from None
    if not isinstance(table, dict) or not table:
        raise UserError(f"{path}: holds no `key: value` lines", hint="name the other trainer's configuration file")
    _count(table, str(path))
    return table


def _count(value: Any, where: str, depth: int = 0) -> int:
    """The number of values in `value`, aliases written out. Raises UserError if there are too many."""
    if depth > MAX_DEPTH:
        raise UserError(f"{where}: nested more than {MAX_DEPTH} deep", hint="an alias (*name) may contain itself")
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    total = 1
    for item in inner:
        total += _count(item, where, depth + 1)
        if total > MAX_VALUES:
            raise UserError(f"{where}: more than {MAX_VALUES:,} values", hint="name the configuration of a run")
    return total


def leaves(table: dict, whole: tuple[str, ...] = (), before: str = "") -> Iterator[tuple[str, Any]]:
    """("datasets[0].path", value) of every value that is no table. Tables whose key is in `whole` stay in one piece."""
    for name, value in table.items():
        key = f"{before}{name}"
        tables = value if isinstance(value, list) else []
        if isinstance(value, dict) and value and name not in whole:
            yield from leaves(value, whole, f"{key}.")
        elif tables and all(isinstance(item, dict) for item in tables):
            for i, item in enumerate(tables):
                yield from leaves(item, whole, f"{key}[{i}].")
        else:
            yield key, value
