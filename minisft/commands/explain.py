"""`minisft explain KEY [CONFIG.toml]`: what a key means, which values it takes, what it acts on, and where its value came from.

Everything is read from config/sections.py and config/interactions.py. docs/configuration.md is the same for all keys:

    python -m minisft explain --all > docs/configuration.md
"""

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING

from minisft.config.aliases import ALIASES, NOT_NEEDED, UNSUPPORTED
from minisft.config.command_line import parse_arguments, take_options
from minisft.config.interactions import of_key
from minisft.config.load import DEFAULTS, full_name
from minisft.config.sections import KEYS, SECTIONS, Config, config_to_dict
from minisft.config.stages import load_stages
from minisft.config.values import as_toml, expected
from minisft.errors import UserError

USAGE = """\
usage: minisft explain KEY [CONFIG.toml] [--KEY VALUE ...]
       minisft explain SECTION [CONFIG.toml]
       minisft explain --all

Tell what a key means, which values it takes, what its default is, which other keys it acts on and, with a file, its
value and where that comes from. KEY is full, as in train.learning_rate, or its last part; other trainers' names are
known too. SECTION, as in train, lists its keys. --all prints docs/configuration.md.
"""
WIDTH, COLUMN = 100, 13


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    options, words = take_options(argv, (), ("all",))
    if "all" in options:
        print(page(), end="")
        return 0
    if not words or words[0].startswith("--"):
        raise UserError("explain: which key?", hint="as in minisft explain learning_rate run.toml")
    written, rest = words[0], words[1:]
    stages = load_stages(*parse_arguments(rest)) if rest else []
    for stage in stages or [None]:
        if stage is not None and stage.title:
            print(f"== {stage.title}")
        values = config_to_dict(stage.config) if stage is not None else {}
        print("\n".join(explain(written, values, stage.origins if stage is not None else {})))
    return 0


def explain(written: str, values: dict, origins: dict[str, str]) -> list[str]:
    """The lines about a key, or about a section. values, origins: of a configuration; empty without one. Raises UserError for a
    name that is neither, with the nearest one."""
    if written in SECTIONS:
        keys = [key for key in KEYS if key.startswith(f"{written}.")]
        shown = [f"  {key} = {as_toml(values.get(key, default_of(key)))}" for key in keys]
        return [f"[{written}]  {SECTIONS[written].__doc__}", *shown]
    key, entry = full_name(written, "explain", by_last_part=True)
    last = written.rpartition(".")[2]
    if key is None:
        reason = UNSUPPORTED.get(last) or NOT_NEEDED.get(last, "")
        return wrapped(
            written, f"{'not supported' if last in UNSUPPORTED else 'without effect'}: {reason}", len(written) + 2
        )
    f = KEYS[key]
    head = f"{key} = {as_toml(values[key])}" if key in values else f"{key} = {as_toml(default_of(key))}"
    lines = textwrap.wrap(head, WIDTH, subsequent_indent="  ")
    if entry:
        lines += wrapped("entry", f"{written} is {entry} of this table")
    elif written != key and last != key.rpartition(".")[2]:
        lines += wrapped("written", f"{written} is another trainer's name for it")
    if key in origins:
        lines += wrapped("from", origins[key])
    lines += wrapped("means", f.metadata["help"])
    lines += wrapped("default", ", ".join(defaults_of(key)))
    lines += wrapped("takes", expected(f))
    if names := other_names(key):
        lines += wrapped("also called", ", ".join(names))
    for others, text in of_key(key):
        now = [f"{other} = {as_toml(values[other])}" if other in values else other for other in others]
        lines += wrapped("acts with", f"{', '.join(now)}: {text}")
    return lines


def wrapped(title: str, text: str, column: int = COLUMN) -> list[str]:
    first = f"  {title}".ljust(column + 2)
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * (column + 2), **options)


def default_of(key: str) -> object:
    return {} if KEYS[key].default is MISSING else KEYS[key].default


def defaults_of(key: str) -> list[str]:
    """The default, and those of trainers that have another."""
    others = [
        f'{as_toml(values[key])} with trainer_type = "{name}"' for name, values in DEFAULTS.items() if key in values
    ]
    return [as_toml(default_of(key)), *others]


def other_names(key: str) -> list[str]:
    return [name for name, ours in ALIASES.items() if (ours if isinstance(ours, str) else ours[0]) == key]


def page() -> str:
    """docs/configuration.md"""
    return "\n".join(_page()) + "\n"


def _page() -> Iterator[str]:
    yield "# Every key of the configuration\n"
    yield "Written by `python -m minisft explain --all` from `minisft/config/sections.py` and `interactions.py`; do not edit."
    yield "`minisft explain KEY run.toml` prints one of them, with its value in a run and where that came from.\n"
    sections = {"": Config, **SECTIONS}
    yield " · ".join(f"[{name or 'the run'}](#{name or 'the-run-as-a-whole'})" for name in sections)
    for section, kind in sections.items():
        yield f"\n## {section or 'The run as a whole'}\n"
        if section:
            yield f"{kind.__doc__}\n"
        for key, f in KEYS.items():
            if key.rpartition(".")[0] != section:
                continue
            yield f"### `{key}`\n"
            yield f"{f.metadata['help'].replace('<', '&lt;').replace('|', chr(92) + '|')}  "
            yield f"*Default* `{'`, `'.join(defaults_of(key))}`  "
            yield f"*Takes* {expected(f)}."
            if names := other_names(key):
                yield f"*Also called* {', '.join(f'`{name}`' for name in names)}."
            if together := of_key(key):
                yield ""  # some readers of Markdown begin no list inside a paragraph
            for others, text in together:
                yield f"- with {', '.join(f'`{other}`' for other in others)}: {text}"
            yield ""
