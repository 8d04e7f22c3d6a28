"""From a TOML file and the command line to a `Config`, and back to a file.

Later layers win, key by key: the defaults of config/sections.py; the files that are extended, the base first; the file
itself; the command line. Tables (model.config, data.field_map) merge, everything else is replaced. TOML has no null: a key
that may be empty is emptied by the word "none".

Relative paths of data and models that a file names are looked for beside that file first and in the working directory
second, and are made absolute where they exist, so that a configuration works from any folder. output_dir, cache_dir and
checkpoint.resume always belong to the working directory.

Every value keeps its origin: the file, the command line or the default. Messages name it, `write_resolved` records it.
Nothing here imports torch, so a mistake is reported within a fraction of a second.
"""

import glob
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from minisft.atomic_folder import write_file
from minisft.config.aliases import ALIASES, NOT_NEEDED, UNSUPPORTED, VALUE_ALIASES, VALUE_NOTES
from minisft.config.check import check_config
from minisft.config.sections import KEYS, SECTIONS, Config, config_to_dict
from minisft.config.values import as_toml, expected, fit, fit_type, nearest_choice, problem_of
from minisft.errors import CONFIG, UserError, number_of_ranks, shortened, tell
from minisft.files import checked_path, is_there, read_file

RESOLVED_NAME = "config.toml"  # in the output folder
MAX_BYTES = 2**22  # of a file
SLICE = re.compile(r"\[[^\[\]]*:[^\[\]]*\]$")  # the end of data.jsonl[:10%]
DEFAULTS = {"sft": {}, "dpo": {"train.learning_rate": 1e-6}}  # of a trainer, where config/sections.py has another one
SOURCES = ("data.train_data", "data.eval_data")
SOURCE_FIELDS = ("name", "split", "data_dir", "revision", "data_files", "weight", "format", "field_map", "ignore")
PACKAGE = Path(__file__).parents[1]
# the ready configurations, in an installation and in a checkout
READY = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"
MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
MODEL_FILES += ("model/config.json", "model/adapter_config.json")  # of a run's output folder


@dataclass(frozen=True)
class Given:
    """A value that somebody wrote: where, and under which name."""

    value: Any
    origin: str
    written: str


def load(
    source: str | Path | dict | None, overrides: dict[str, Any] | None = None, origin: str = "command line"
) -> tuple[Config, dict[str, str]]:
    """The configuration of a TOML file, or of a dict shaped like one, with `overrides` on top.

    overrides: {name: value}; a name is full ("train.learning_rate"), or its last part where that is unambiguous.
    origin: what messages call the overrides.
    Returns the configuration and {full name: where its value comes from}. Raises UserError (exit code 2).
    """
    files = read_files(source)
    if listing := next((name for table, name, _ in files if "stages" in table), None):
        hint = "name the configuration of one of its stages: the file, or <output_dir>/config.toml once it has begun"
        raise UserError(f"{listing} lists stages, which are several runs; one is wanted here", hint=hint)
    return load_files(files, overrides, origin)


def load_files(
    files: list[tuple[dict, str, Path]], overrides: dict[str, Any] | None, origin: str
) -> tuple[Config, dict[str, str]]:
    """The same of files that `read_files` has read."""
    layers = [*map(file_layer, files), override_layer(overrides or {}, origin)]
    return resolve(layers, where=files[-1][1] if files else origin)


def resolve(layers: list[dict[str, Given]], where: str) -> tuple[Config, dict[str, str]]:
    """The configuration that layers make, later ones on top, and the origin of every value."""
    given: dict[str, Given] = {}
    for layer in layers:
        _merge(given, layer)
    for key in SOURCES:
        if key in given and isinstance(given[key].value, SourceFields):
            hint = f"name the data set too: {key}"
            raise UserError(
                f"{given[key].origin}: {given[key].written} is a field of a data set that is absent", hint=hint
            )
    values = {key: _fitted(key, g) for key, g in given.items() if not isinstance(g.value, TotalBatch)}
    of_trainer = DEFAULTS[values.get("trainer_type", "sft")]
    values = of_trainer | values
    for key, g in given.items():
        if isinstance(g.value, TotalBatch):
            values[key] = _fitted(key, replace(g, value=_accumulation(g, values)))

    tables: dict[str, dict] = {name: {} for name in ("", *SECTIONS)}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        tables[section][name] = value
    config = Config(**tables[""], **{name: section(**tables[name]) for name, section in SECTIONS.items()})
    origins = {key: given[key].origin if key in given else "default" for key in KEYS}
    origins |= {key: "default of trainer_type dpo" for key in of_trainer if key not in given}
    check_config(config, origins, where)
    return config, origins


def deciding_values(config: Config) -> dict[str, str]:
    """{full name: value in TOML} of the keys that decide which model a run writes, without those of logging and saving."""
    free = ("output_dir", "verbose", "log.", "audit.", "checkpoint.save_steps", "checkpoint.save_total_limit")
    free += ("checkpoint.resume", "data.cache_dir", "evaluate.generate_samples_shown", "evaluate.sample_steps")
    return {key: as_toml(value) for key, value in config_to_dict(config).items() if not key.startswith(free)}


def fingerprint(config: Config) -> str:
    return hashlib.sha256(repr(sorted(deciding_values(config).items())).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------- files and layers


def read_files(
    source: str | Path | dict | None, name: str = "the given dict", folder: Path | None = None
) -> list[tuple[dict, str, Path]]:
    """The file and everything it extends, the base first: (table, name for messages, folder). name, folder: of a dict."""
    if source is None:
        return []
    if isinstance(source, dict):
        table, folder, chain = dict(source), folder or Path.cwd(), []
        _refuse_problem(table, name)
    else:
        path = Path(checked_path(source, "the configuration"))
        if path.parts[:1] == ("configs",) and not path.exists() and (READY / path.name).exists():
            path = READY / path.name
            _tell(f"{source} is not here; the installed one is read: {path}")
        table, name, folder, chain = _read_toml(path), str(path), path.parent, [path]
    files = [(table, name, folder)]
    while (base := table.pop("extends", None)) is not None:
        if not isinstance(base, str):
            raise UserError(f"{name}: extends = {as_toml(base)}: expected the path of one TOML file")
        path = folder / checked_path(base, f"{name}: extends")
        again = path.resolve() in [p.resolve() for p in chain]
        chain.append(path)
        if again:
            raise UserError(
                "configuration files extend each other in a circle: " + " -> ".join(map(str, chain)),
                hint="remove one of their `extends`",
            )
        table, name, folder = _read_toml(path, extended_by=name), str(path), path.parent
        files.append((table, name, folder))
    return files[::-1]


def _read_toml(path: Path, extended_by: str = "") -> dict:
    what = f"{path} (extended by {extended_by})" if extended_by else str(path)
    if path.suffix in (".yaml", ".yml"):
        hint = (
            f"another trainer's file is translated by `python -m minisft init --from-trl {path}` (or --from-axolotl, "
        )
        raise UserError(f"{what}: not a TOML file", hint=hint + "--from-llamafactory, --from-stages)")
    if not is_there(path):
        where = "the path is relative to that file" if extended_by else f"the working directory is {Path.cwd()}"
        raise UserError(f"{what}: there is no such file", hint=where)
    try:
        table = tomllib.loads(read_file(path, exit_code=CONFIG, at_most=MAX_BYTES).decode("utf-8-sig"))
    except UserError as error:
        reason = error.message.removeprefix(f"{path}: ")
        raise UserError(f"{what}: cannot be read: {reason}", hint="name a TOML file") from None
    except (ValueError, RecursionError) as error:  # of TOML's syntax, or of UTF-8
        hint = "strings need quotes, tables are [section] lines: https://toml.io"
        raise UserError(f"{what}: not a TOML file: {error}", hint=hint) from None
    _refuse_problem(table, what)
    return table


def _refuse_problem(value: Any, what: str) -> None:
    if problem := problem_of(value):
        raise UserError(f"{what}: {problem}")


def _flatten(table: dict, name: str) -> Iterable[tuple[str, Any]]:
    """{"train": {"learning_rate": 1}} -> ("train.learning_rate", 1)"""
    for key, value in table.items():
        if key in SECTIONS and not isinstance(value, dict):
            raise UserError(f"{name}: {key} = {as_toml(value)}: expected a table", hint=f"[{key}] is a section of keys")
        if key in SECTIONS:
            yield from ((f"{key}.{inner}", value) for inner, value in value.items())
        else:
            yield key, value


def file_layer(file: tuple[dict, str, Path]) -> dict[str, Given]:
    """One of `read_files`."""
    table, name, folder = file
    return _layer(_flatten(table, name), name, folder)


def override_layer(overrides: dict[str, Any], origin: str) -> dict[str, Given]:
    for name, value in overrides.items():
        _refuse_problem(value, f"{origin}: {name}")
    return _layer(overrides.items(), origin, Path.cwd(), by_last_part=True)


def _layer(pairs: Iterable[tuple[str, Any]], origin: str, folder: Path, by_last_part: bool = False) -> dict[str, Given]:
    """One file, or the command line, under our names and values, its paths found."""
    layer: dict[str, Given] = {}
    for written, value in pairs:
        translated = _translate(written, value, origin, by_last_part)
        if translated is None:
            continue
        key, value = translated
        if (kind := KEYS[key].metadata.get("is_path")) and value is not None and not isinstance(value, SourceFields):
            value = _find_paths(value, folder, kind, f"{origin}: {key}")
        new = Given(value, origin, written)
        merges = (
            _is_table(key)
            or isinstance(value, SourceFields)
            or key in layer
            and isinstance(layer[key].value, SourceFields)
        )
        if key in layer and layer[key].value != value and not merges:
            hint = f"both set {key}: keep one of them"
            raise UserError(f"{origin}: {layer[key].written} and {written} contradict each other", hint=hint)
        _merge(layer, {key: new})
    return layer


def _is_table(key: str) -> bool:
    """A key that takes any table, as model.config does; its entries merge. A source of rows is replaced as a whole."""
    f = KEYS[key]
    return dict in (f.type, *get_args(f.type)) and "is_path" not in f.metadata


def _merge(given: dict[str, Given], layer: dict[str, Given]) -> None:
    """Lay `layer` over `given`."""
    for key, new in layer.items():
        old = given.get(key)
        if old and _is_table(key) and isinstance(old.value, dict) and isinstance(new.value, dict):
            origin = new.origin if new.origin == old.origin else f"{old.origin}, {new.origin}"
            new = replace(new, value=_deep_merge(old.value, new.value), origin=origin)
        if old and SourceFields in (type(old.value), type(new.value)):
            new = replace(new, value=_with_fields(old, new))
        given[key] = new


def _with_fields(old: Given, new: Given) -> Any:
    """A source with fields that were given apart from its path."""
    fields = [g.value.fields for g in (old, new) if isinstance(g.value, SourceFields)]
    source = next((g.value for g in (new, old) if not isinstance(g.value, SourceFields)), None)
    if source is None:
        return SourceFields(fields[0] | fields[1])
    if isinstance(source, str):
        source = {"path": source}
    if not isinstance(source, dict):
        hint = 'give each source a table of its own, as in {path = "owner/name", split = "train"}'
        raise UserError(
            f"{new.origin}: {old.written} and {new.written}: {as_toml(source)} are several sources", hint=hint
        )
    return source | fields[-1]


def _deep_merge(old: dict, new: dict) -> dict:
    merged = dict(old)
    for key, value in new.items():
        both_tables = isinstance(value, dict) and isinstance(old.get(key), dict)
        merged[key] = _deep_merge(old[key], value) if both_tables else value
    return merged


def _find_paths(value: Any, folder: Path, kind: str, what: str) -> Any:
    """The value, its paths absolute where they exist: a string, a list, a table with "path", a table of named ones.

    Raises UserError, which begins with `what`, for text that cannot be a path.
    """
    if isinstance(value, list):
        return [_find_paths(v, folder, kind, what) for v in value]
    if isinstance(value, dict):
        names = ["path"] if "path" in value else list(value)
        return {k: _find_paths(v, folder, kind, what) if k in names else v for k, v in value.items()}
    if not isinstance(value, (str, Path)) or value == "none" or "{{" in str(value) or "{%" in str(value):
        return value  # the last two: a chat template itself
    text = checked_path(value, what)
    for base in (folder, Path.cwd()):
        path = os.path.abspath(base / text)
        if kind == "model" and any(os.path.isfile(os.path.join(path, name)) for name in MODEL_FILES):
            return path
        pattern = SLICE.sub("", path)
        if kind == "data" and any(os.path.isfile(p) for p in (path, pattern, *glob.iglob(pattern, recursive=True))):
            return path
    return text


# ------------------------------------------------------------------------------------------------- names


@dataclass(frozen=True)
class TotalBatch:
    """total_batch_size: becomes gradient_accumulation_steps when the rows of a micro-batch are known."""

    rows: Any


@dataclass(frozen=True)
class SourceFields:
    """Fields of a source of rows without its path, as in --dataset_split train: they join the path that is given elsewhere."""

    fields: dict[str, Any]


def _translate(written: str, value: Any, origin: str, by_last_part: bool) -> tuple[str, Any] | None:
    """Our full name and value; None for a key that nothing here needs. Prints every translation."""
    if isinstance(value, Path):
        value = str(value)
    key, rest = full_name(written, origin, by_last_part)
    last = written.rpartition(".")[2]
    before = f"{written} = {as_toml(value)}"
    if key is None and last in UNSUPPORTED and value not in (False, None, "none"):
        raise UserError(f"{origin}: {before}: {UNSUPPORTED[last]}", hint=f"remove {written}")
    if key is None:
        _tell(f"{origin}: {before} has no effect" + (f": {NOT_NEEDED[last]}" if last in NOT_NEEDED else ""))
        return None
    if rest and not _is_table(key):  # data.train_data.split = "train"
        if last not in key.split(".") and not written.startswith(key):
            _tell(f"{origin}: {before} is read as {key}.{rest} = {as_toml(value)}")
        return key, SourceFields({rest: value})
    if rest:  # model.config.hidden_size = 64: an entry of a table
        for name in reversed(rest.split(".")):
            value = {name: value}
        return key, value
    if last == "total_batch_size":
        return key, TotalBatch(value)

    alias = ALIASES.get(last)
    spellings = VALUE_ALIASES.get(key, {}) | (alias[1] if isinstance(alias, tuple) else {})
    new = spellings.get(value, value) if isinstance(value, (bool, str)) else value
    if new is None and value is not None:
        _tell(f"{origin}: {before} has no effect")
        return None
    if last != key.rpartition(".")[2] or new is not value:
        note = f" ({VALUE_NOTES[value]})" if isinstance(value, str) and value in VALUE_NOTES else ""
        _tell(f"{origin}: {before} is read as {key} = {as_toml(new)}{note}")
    return key, new


def full_name(written: str, origin: str, by_last_part: bool) -> tuple[str | None, str]:
    """(our full name, entry of a table or ""); (None, "") for a key of NOT_NEEDED or UNSUPPORTED. Raises UserError.

    by_last_part: "learning_rate" will do for "train.learning_rate".
    """
    if written in KEYS:
        return written, ""
    section, _, last = written.rpartition(".")
    homes = [key for key in KEYS if key.rpartition(".")[2] == last]
    if by_last_part and not section and len(homes) == 1:
        return homes[0], ""
    if by_last_part and not section and len(homes) > 1:
        raise UserError(f"{origin}: {written} is ambiguous: {' or '.join(homes)}", hint="use the full name")
    if section in ("", *SECTIONS) and last in ALIASES:
        ours = ALIASES[last]
        name = ours if isinstance(ours, str) else ours[0]
        key = next(key for key in KEYS if name == key or name.startswith(f"{key}."))
        return key, name.removeprefix(key).removeprefix(".")
    if section in ("", *SECTIONS) and (last in NOT_NEEDED or last in UNSUPPORTED):
        return None, ""
    for key in KEYS:
        rest = written.removeprefix(f"{key}.")
        if rest != written and (_is_table(key) or key in SOURCES and rest in SOURCE_FIELDS):
            return key, rest
    if written in SECTIONS:
        raise UserError(f"{origin}: {written} is a section, not a key", hint=f"its keys are {written}.NAME")
    if written in ("extends", "stages"):
        raise UserError(f"{origin}: {written} is read from a file alone", hint=f"write {written} = ... at its top")
    raise UserError(f"{origin}: unknown key {written}", hint=_nearest_key(written, homes))


def _nearest_key(written: str, homes: list[str]) -> str:
    section, _, last = written.rpartition(".")
    names = {key.rpartition(".")[2]: key for key in KEYS} | {name: f"[{name}]" for name in SECTIONS}
    homes = homes or [names[name] for name in get_close_matches(last, names, n=1)]
    if homes:
        return f"did you mean {' or '.join(homes)}?"
    if section in SECTIONS:
        return f"keys of [{section}]: {', '.join(f.name for f in fields(SECTIONS[section]))}"
    return "`python -m minisft.train --help` lists every key"


def _tell(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # one process of several
        tell(message)


def _fitted(key: str, given: Given) -> Any:
    """The value in the type of its key. Raises UserError where the type or the range is wrong."""
    f = KEYS[key]
    value = fit(given.value, f)
    if value is MISSING:
        raise UserError(
            f"{given.origin}: {key} = {shortened(as_toml(given.value), 200)}: expected {expected(f)}",
            hint=nearest_choice(given.value, f) or f"{key}: {f.metadata['help']}",
        )
    return value


def _accumulation(given: Given, values: dict[str, Any]) -> int:
    """gradient_accumulation_steps = total_batch_size / (per_device_train_batch_size x processes)"""
    total = given.value.rows
    key = "train.per_device_train_batch_size"
    rows = values.get(key, KEYS[key].default) * number_of_ranks()
    if fit_type(total, int) is MISSING or total < 1 or total % rows:
        raise UserError(
            f"{given.origin}: {given.written} = {as_toml(total)}: expected a multiple of {rows}",
            hint="it is per_device_train_batch_size x processes x gradient_accumulation_steps",
        )
    _tell(f"{given.origin}: {given.written} = {total} is read as train.gradient_accumulation_steps = {total // rows}")
    return total // rows


# ------------------------------------------------------------------------------------------------- out again


def write_resolved(config: Config, origins: dict[str, str], folder: str | Path) -> Path:
    """Write every key with its origin to folder/config.toml, which `load` reads back to an equal configuration."""
    lines = ["# The resolved configuration of this run: every key, and where its value comes from."]
    section = ""
    for key, value in config_to_dict(config).items():
        here, _, name = key.rpartition(".")
        if here != section:
            lines += ["", f"[{here}]"]
            section = here
        origin = "".join(c if c.isprintable() else " " for c in origins.get(key, "default"))
        lines.append(f"{name} = {as_toml(value)}  # {origin}")
    path = Path(folder) / RESOLVED_NAME
    write_file(path, "\n".join(lines) + "\n")
    return path


def read_resolved(text: str) -> dict[str, tuple[str, str]]:
    """{key: (value as in TOML, where it came from)} of the text that `write_resolved` writes."""
    found, section = {}, ""
    for line in text.splitlines():
        if match := re.fullmatch(r"\[(\S+)\]", line):
            section = f"{match[1]}."
        elif match := re.fullmatch(r"(\w+) = (.*)  # (.*)", line):
            found[section + match[1]] = match[2], match[3]
    return found


def add_history(folder: str | Path, entry: dict[str, Any]) -> None:
    """Add a line to folder/config_history.jsonl: what is configured otherwise from a step on."""
    path = Path(folder) / "config_history.jsonl"
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_file(path, earlier + json.dumps(entry) + "\n")
