"""The command line of a run: CONFIG.toml --name value --name=value --flag, and the text of --help."""

import os
import re
import textwrap
import tomllib
from collections.abc import Collection
from dataclasses import MISSING
from typing import Any, Literal, get_args, get_origin

from minisft.config.aliases import ALIASES
from minisft.config.load import full_name
from minisft.config.sections import KEYS, SECTIONS, Config
from minisft.config.values import as_toml, choices
from minisft.errors import UserError

USAGE = """\
usage: python -m minisft.train CONFIG.toml [--KEY VALUE ...]
"""

EXAMPLES = """\
examples:
  python -m minisft.train configs/quickstart.toml
  python -m minisft.train run.toml --learning_rate 1e-4 --packing --output_dir runs/a
  python -m minisft.train run.toml --train.max_steps=100 --data.train_data 'rows/*.jsonl[:10%]'
  python -m minisft.train run.toml --report_to tensorboard,wandb --max_grad_norm none

A key is written with its section or, where only one section has it, alone. The command line comes before the file, the
file before the defaults below. A file may start from another one with `extends = "base.toml"`. With
`stages = ["sft.toml", "dpo.toml"]` it is several runs, each from the model that the one before wrote, in folders of
output_dir; its other keys are common to them. The same command resumes where it was stopped.
"""

HELP_COLUMN, HELP_WIDTH = 44, 120
DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # what an editor makes of hyphens
NAMES = re.compile(r"[\w.]+(,[\w.]+)*")  # what is a list where a key takes one expression too


def take_options(argv: list[str], valued: Collection[str], flags: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """({name: the texts after --name, in order; True for a flag}, the rest of the command line), for the options that a command
    has besides the keys of a configuration. Names are as in "gpu_memory"; a hyphen does as well. Raises UserError."""
    options, rest, words = {}, [], list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.partition("=")
        key = name[2:].replace("-", "_") if name.startswith("--") else ""
        if key in flags:
            if has_value:
                raise UserError(f"command line: {name} takes no value", hint=name)
            options[key] = True
        elif key in valued:
            value = value if has_value else words.pop(0) if words else ""
            if not value:
                raise UserError(f"command line: {name} needs a value", hint=f"{name} VALUE; see --help")
            options.setdefault(key, []).append(value)
        else:
            rest.append(word)
    return options, rest


def whole_number(name: str, text: str, least: int = 1, most: int = 10**6) -> int:
    """The number after --name. Raises UserError for one that is not in the range."""
    if not text.isdecimal() or len(text) > 18 or not least <= int(text) <= most:
        raise UserError(f"command line: --{name} {text[:60]}: expected a whole number from {least} to {most:,}")
    return int(text)


def parse_arguments(argv: list[str]) -> tuple[str | None, dict[str, Any]]:
    """(path of the configuration or None, {name: value}). Raises UserError.

    A key that is true or false may stand alone: it takes the next word only if that is true, false, none or a
    word of its own.
    """
    bare: dict[str, str] = {}  # words that are no value: the option before each
    overrides, rest, option = {}, list(argv), ""
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            bare[word] = option
            continue
        if not word.startswith("--"):
            raise UserError(f"command line: unknown option {word}", hint="options are --name value; see --help")
        name, has_value, text = word[2:].partition("=")
        option, name = f"--{name}", name.replace("-", "_")
        kinds = _kinds(name)
        if not has_value:
            follows = bool(rest) and not _is_option(rest[0])
            if bool in kinds and str not in kinds:
                words = [word for kind in kinds for word in choices(kind)]
                follows = follows and rest[0].lower() in ("true", "false", "none", *words)
            if not follows and bool not in kinds:
                raise UserError(f"command line: --{name} needs a value", hint=f"--{name} VALUE")
            text = rest.pop(0) if follows else "true"
        overrides[name] = _parse_word(text, kinds)
    if len(bare) > 1:
        _refuse_words(bare)
    return next(iter(bare), None), overrides


def _refuse_words(words: dict[str, str]) -> None:
    """Words of which at most one is the configuration: a value of the option before it, or several files."""
    has_toml = any(word.endswith(".toml") for word in words)
    for word, option in words.items():
        if word.endswith(".toml") or not has_toml and os.path.exists(word):
            continue
        if word.startswith(tuple(DASHES)) or re.match(r"[a-z][\w.]*=", word):
            hint = f"options begin with two hyphens: --{word.lstrip(DASHES)}"
            raise UserError(f"command line: {word} is no option", hint=hint)
        if option:
            is_flag = bool in _kinds(option[2:].replace("-", "_"))
            takes = "takes true or false" if is_flag else "takes one word; a list has commas in it, as in a,b"
            raise UserError(f"command line: {word} is no value of {option}", hint=f"{option} {takes}")
    hint = "one can extend the other, with `extends` in the file"
    raise UserError(f"command line: two configuration files, {' and '.join(list(words)[:2])}", hint=hint)


def _is_option(word: str) -> bool:
    """Whether a word is --name of a key. Any other word may be the value of the key before it."""
    try:
        full_name(word[2:].partition("=")[0].replace("-", "_"), "command line", by_last_part=True)
    except UserError:
        return False
    return word.startswith("--")


def _kinds(name: str) -> set[type]:
    """The types of value that --name takes; empty where it takes any."""
    key, entry = full_name(name, "command line", by_last_part=True)
    last = name.rpartition(".")[2]
    if key is None:  # a key that is not needed or not supported: with or without a value
        return {bool, str}
    if entry:
        return set()
    alias = ALIASES.get(last)
    if isinstance(alias, tuple) and name not in KEYS:
        return {type(theirs) for theirs in alias[1]} | ({str} if KEYS[key].type is str else set())
    kind: Any = KEYS[key].type
    if get_origin(kind) is Literal:
        return {str}
    lists = [one for one in (kind, *get_args(kind)) if get_origin(one) is tuple]
    if lists and str in get_args(kind):
        return {tuple, str}  # names, or one expression
    if lists:
        item = get_args(lists[0])[0]
        return {list, str if get_origin(item) is Literal else item}
    return {kind, *get_args(kind)}


def _parse_word(text: str, kinds: set[type]) -> Any:
    """The value of a word: TOML where it looks like it, a number or a bool where the key takes one, else the word."""
    if text[:1] in ("[", "{", '"', "'"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            pass  # a plain word that begins like TOML
    if list in kinds and "," in text or tuple in kinds and NAMES.fullmatch(text):
        return [_parse_word(part, kinds - {list, tuple}) for part in text.split(",")]
    if (bool in kinds or not kinds) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if str not in kinds:
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                pass
    return text


def help_text() -> str:
    """Usage, examples, and every key with its default and what it does."""
    lines = [USAGE, EXAMPLES]
    for section, kind in {"": Config, **SECTIONS}.items():
        lines.append(f"[{section}]  {kind.__doc__}" if section else kind.__doc__)
        for key, f in KEYS.items():
            if key.rpartition(".")[0] != section:
                continue
            words = choices(f.type)
            text = f.metadata["help"] + (f" ({' | '.join(words)})" if words else "")
            default = {} if f.default is MISSING else f.default
            head = f"  {f.name} = {as_toml(default)}".ljust(HELP_COLUMN - 1)
            first, *more = textwrap.wrap(text, HELP_WIDTH - HELP_COLUMN)
            lines.append(f"{head} {first}")
            lines += [" " * HELP_COLUMN + line for line in more]
        lines.append("")
    return "\n".join(lines).rstrip()
