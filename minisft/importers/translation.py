"""How the keys of another trainer's file are translated: every key ends up in exactly one of three lists.

    translated       theirs = value  ->  ours = value
    difference       the run will differ from theirs here, or a default of theirs is written out so that it does not
    no counterpart   nothing here corresponds to the key, with or without an effect on the result

A reader of one trainer's files (trl.py, axolotl.py, llamafactory.py) takes keys out of a `Translation` one by one; `finish`
sorts the rest. A value that our key does not accept is listed and never written, so that the resulting TOML loads.
"""

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from typing import Any, get_args

from minisft.config.aliases import ALIASES, NOT_NEEDED, UNSUPPORTED, VALUE_ALIASES, VALUE_NOTES
from minisft.config.load import DEFAULTS
from minisft.config.sections import KEYS
from minisft.config.values import as_toml, expected, fit
from minisft.data.formats import TEMPLATE_FIELDS
from minisft.data.prompts import PROMPT_FIELDS
from minisft.errors import UserError
from minisft.hub import is_repository_name
from minisft.importers.yaml_file import MAX_KEYS, leaves

TRANSLATED, DIFFERENCE, NO_COUNTERPART = "translated", "difference", "no counterpart"
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?")
OUR_NAMES = [key.rpartition(".")[2] for key in KEYS]
# Columns that rows may have besides the answers. Which of them are read depends on the format.
READ_HERE = ("prompt", "messages", "conversations", *dict.fromkeys(PROMPT_FIELDS), *TEMPLATE_FIELDS, "weight")
LOADERS = ("json", "csv", "parquet", "text")
OFF = (None, False, "", "none", "None", "no", "off", "false", 0, [], {})

# A key of theirs: ours, or (ours, {their value: ours}).
Table = dict[str, str | tuple[str, dict]]
FirstRow = Callable[[Any], dict | None]  # a source of rows -> its first row, None if it cannot be read


@dataclass(frozen=True)
class Note:
    """One line of a list."""

    kind: str
    text: str
    key: str = ""  # theirs; "" if the note is about no key of the file
    harmless: bool = False  # for `no counterpart`: the result is the same without the key


class Translation:
    """The remaining keys of the file, our values so far, and the notes."""

    def __init__(self, table: dict, whole: tuple[str, ...] = ()):
        self.given: dict[str, Any] = {}  # every key of the file, as in "datasets[0].path"
        for key, value in leaves(table, whole):
            self.given[key] = value if isinstance(value, (str, int, float, list, dict, type(None))) else str(value)
            if len(self.given) > MAX_KEYS:
                raise UserError(f"more than {MAX_KEYS} keys", hint="name the configuration of a run")
        self.left = dict(self.given)
        self.values: dict[str, Any] = {}  # full name of ours -> value
        self.origins: dict[str, str] = {}  # full name of ours -> the key and value of the file
        self.notes: list[Note] = []
        for key, value in self.given.items():
            if isinstance(value, str) and "${" in value:
                self.nothing(key, "variables are not filled in here: write the value itself")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a remaining key; `default` if the key is absent, empty or taken already."""
        value = self.left.get(key)
        return default if value in (None, "") else value

    def number(self, key: str, ours: str) -> float | None:
        """The value of a remaining key as one of the numbers of our key `ours`, which takes a table or a list of them.

        None if the key is absent or empty, or its value is no such number; the last is noted."""
        number = as_number(self.get(key))
        if number is not None:
            fitted = fitted_value(ours, {key: number} if KEYS[ours].type is dict else (number,))
            if fitted is not MISSING:
                return number
            self.nothing(key, f"{ours} takes {expected(KEYS[ours])}")
        return None

    def on(self, key: str) -> bool:
        """Whether the file has this switch on."""
        return _not_off(self.left.get(key))

    def into(self, key: str, ours: str, value: Any = MISSING, note: str = "") -> bool:
        """Translate `key` to our key `ours`, with its own value or with `value`. Returns whether that worked."""
        written = self.left[key]
        value = written if value is MISSING else value
        if written in (None, "") and value in (None, ""):
            self.nothing(key, "empty", harmless=True)
            return False
        fitted = fitted_value(ours, value)
        if fitted is MISSING:
            self.nothing(key, f"{ours} takes {expected(KEYS[ours])}")
            return False
        if ours in self.values and self.values[ours] != fitted:
            self.nothing(key, f"{ours} = {as_toml(self.values[ours])} came from {self.origins[ours]} already")
            return False
        self.values[ours] = fitted
        self.origins.setdefault(ours, f"{key} = {short(written)}")
        note = note or (VALUE_NOTES.get(written, "") if isinstance(written, str) else "")
        self.take(key, TRANSLATED, f"{ours} = {as_toml(fitted)}" + (f" ({note})" if note else ""))
        return True

    def take(self, key: str, kind: str, text: str, harmless: bool = False) -> None:
        """Only move the key into a list."""
        written = self.left.pop(key)
        arrow = "  ->  " if kind == TRANSLATED else ": "
        self.notes.append(Note(kind, f"{key} = {short(written)}{arrow}{text}", key, harmless))

    def nothing(self, key: str, text: str, harmless: bool = False) -> None:
        self.take(key, NO_COUNTERPART, text, harmless)

    def difference(self, text: str) -> None:
        if Note(DIFFERENCE, text) not in self.notes:
            self.notes.append(Note(DIFFERENCE, text))

    def agree(self, ours: str, value: Any, why: str) -> None:
        """Write what one of several data sets asks for. A second one that asks for something else is a difference."""
        written = self.values.setdefault(ours, value)
        first = self.origins.setdefault(ours, why)
        if written != value:
            self.difference(
                f"{why}: {ours} = {short(value)} there; {short(written)} is written for all, as {first} asks"
            )

    def default(self, ours: str, value: Any, why: str) -> None:
        """Write a default of theirs that is not ours, unless the file has set the key."""
        if ours not in self.values:
            fitted = fitted_value(ours, value)
            assert fitted is not MISSING, (ours, value)
            of_trainer = DEFAULTS[self.values.get("trainer_type", "sft")]
            ours_by_default = of_trainer.get(ours, KEYS[ours].default)
            self.values[ours], self.origins[ours] = fitted, why
            self.difference(f"{ours} = {as_toml(fitted)}: {why} (default here: {as_toml(ours_by_default)})")

    def prompts_too(self, key: str) -> None:
        """Translate a switch that trains prompts like answers, if the file has it."""
        if self.on(key):
            ours = ("data.completion_only_loss", "data.assistant_only_loss")
            self.values |= dict.fromkeys(ours, False)
            self.origins |= dict.fromkeys(ours, f"{key} = true")
            self.take(key, TRANSLATED, "completion_only_loss = false, assistant_only_loss = false")
        elif key in self.left:
            self.nothing(key, "the answers alone are trained, as here", harmless=True)

    def table(self, table: Table) -> None:
        """Translate every key of the table that the file has."""
        for key, ours in table.items():
            if key in self.left:
                ours, spellings = (ours, {}) if isinstance(ours, str) else ours
                value = self.left[key]
                new = spellings.get(value, value) if isinstance(value, (bool, str)) else value
                self.into(key, ours, new)

    def finish(self, harmless: dict[str, str], changes: dict[str, str], known: Iterable[str] = ()) -> None:
        """Sort the remaining keys. harmless: keys without effect on the result, and why; changes: keys with one, unless off.

        All others are looked up among other trainers' names and our own. known: more names for "did you mean".
        """
        for key in list(self.left):
            value, table = self.left[key], re.split(r"[.\[]", key)[0] + ".*"
            reason, change = (t.get(key, t.get(table)) for t in (harmless, changes))
            if reason is not None:
                self.nothing(key, reason, harmless=True)
            elif change is not None:
                off = not _not_off(value)
                self.nothing(key, "off there too" if off else change, harmless=off)
            elif value in (None, ""):
                self.nothing(key, "empty", harmless=True)
            elif key in UNSUPPORTED:
                off = not _not_off(value)
                self.nothing(key, "off there too" if off else UNSUPPORTED[key], harmless=off)
            elif key in NOT_NEEDED:
                self.nothing(key, NOT_NEEDED[key], harmless=True)
            elif (ours := counterpart(key)) is not None:
                if isinstance(ours, str) and ours not in KEYS:
                    self.nothing(key, f"it is of a source of rows: {ours}")
                else:
                    self.table({key: ours})
            else:
                near = get_close_matches(key, [*known, *harmless, *changes, *ALIASES, *OUR_NAMES], n=1, cutoff=0.8)
                self.nothing(key, "not known here" + (f"; did you mean {near[0]}?" if near else ""))


def counterpart(key: str) -> str | tuple[str, dict] | None:
    """Our key for a name of ours, whole or its last part, or for a name of other trainers (config/aliases.py)."""
    homes = [ours for ours in KEYS if key in (ours, ours.rpartition(".")[2])]
    return homes[0] if len(homes) == 1 else ALIASES.get(key)


def fitted_value(ours: str, value: Any) -> Any:
    """The value in the type of our key, or MISSING. Text that is a number becomes one if the key takes numbers."""
    f = KEYS[ours]
    if isinstance(value, (str, bool)):
        value = VALUE_ALIASES.get(ours, {}).get(value, value)
    kinds = {f.type, *get_args(f.type)}
    if isinstance(value, str) and str not in kinds and kinds & {int, float} and NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        value = int(value)
    return fit(value, f)


def as_number(value: Any) -> float | None:
    """A finite number that YAML read as one or as text; None for anything else."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= sys.float_info.max else None


def as_list(value: Any) -> list:
    """A list, or text with commas, as a list; None as an empty one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def short(value: Any) -> str:
    """A value on one short line, for people."""
    text = "null" if value is None else as_toml(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def source(path: str, **entries: object) -> str | dict:
    """One entry of train_data; a plain path if it needs nothing else."""
    entries = {name: value for name, value in entries.items() if value not in (None, "", {}, [], "train")}
    return {"path": path, **entries} if entries else path


def columns_left_out(t: Translation, row: dict | None, read: Iterable[str | None]) -> list[str]:
    """The columns of the first row that are read here and not there. read: those that are read there."""
    if row is None:
        t.difference(
            "where the rows cannot be read yet: columns such as system, input, history or weight are read here even if they are "
            "not there; `ignore` of a source leaves them out"
        )
        return []
    left_out = [column for column in READ_HERE if column in row and column not in {*read}]
    if left_out:
        t.difference(
            f"ignore = {as_toml(left_out)}: these columns are not read there; without `ignore` they are read here"
        )
    return left_out


def local_split(path: object, split: object) -> object:
    """The split of a source. Of a local one, which has no splits, only the slice: "[:10%]" of "test[:10%]"."""
    if isinstance(path, str) and isinstance(split, str) and not is_repository_name(path):
        return split[len(split.partition("[")[0]) :]
    return split


def loaded_files(path: object, files: list) -> tuple[list[object], list]:
    """([path], data_files) of a data set; with a loader of `datasets` as its path, its local files are the paths."""
    return (files, []) if path in LOADERS and files else ([path], files)


def spread(table: dict[str, str]) -> dict[str, str]:
    """{"why": "key other_key"} -> {"key": "why", "other_key": "why"}"""
    return {key: why for why, keys in table.items() for key in keys.split()}


def _not_off(value: Any) -> bool:
    return not any(value is off or (type(value) is type(off) and value == off) for off in OFF)
