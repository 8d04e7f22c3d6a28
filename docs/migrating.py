"""Writes docs/migrating.md from the tables of minisft/importers: `python -m docs.migrating`."""

from pathlib import Path

from minisft.config.aliases import ALIASES
from minisft.importers import axolotl, llamafactory, trl
from minisft.importers.training_arguments import CHANGES, HARMLESS
from minisft.importers.training_arguments import SAME as SHARED
from minisft.importers.translation import Table

PAGE = Path(__file__).parent / "migrating.md"
BEGIN = """# Coming from another trainer

Written by `python -m docs.migrating` from the tables that `minisft init` uses; do not edit.

<!-- not run: needs your files -->
```bash
python -m minisft init run.toml --from-trl sft.yaml            # TRL: the YAML of `trl sft` or `trl dpo`
python -m minisft init run.toml --from-axolotl axolotl.yaml
python -m minisft init run.toml --from-llamafactory train.yaml
python -m minisft init run.toml --from-stages pipeline.yaml    # a list of stages, as small pipelines have it
```

Each of them translates a file and prints three lists: what was translated, what will behave differently, and what has no
counterpart. No key is passed over in silence. A default of theirs that is not ours is written out, so that the run stays
the same.

The tables below say the same without a file. The last column has the values that have another name. Keys with the same
name on both sides are left out.
"""


def rows(table: Table) -> list[str]:
    """A line of Markdown for each key that has another name here."""
    found = []
    for theirs, ours in sorted(table.items()):
        name, values = (ours, {}) if isinstance(ours, str) else ours
        if theirs != name.rpartition(".")[2] or values:
            said = ", ".join(
                f"`{_shown(before)}`: `{_shown(after)}`" for before, after in values.items() if after is not None
            )
            found.append(f"| `{theirs}` | `{name}` | {said} |")
    return found


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(title: str, *tables: Table) -> str:
    merged: Table = {}
    for one in tables:
        merged |= one
    return "\n".join([f"## {title}\n", "| theirs | here | values |", "| --- | --- | --- |", *rows(merged)])


def reasons(title: str, keys: dict[str, str]) -> str:
    """Keys by the reason why they are not translated."""
    by_reason: dict[str, list[str]] = {}
    for key, why in keys.items():
        by_reason.setdefault(why, []).append(f"`{key}`")
    lines = [f"- {why[0].upper()}{why[1:]}: {', '.join(sorted(names))}." for why, names in by_reason.items()]
    return "\n".join([f"### {title}\n", *lines])


def page() -> str:
    """The whole text."""
    parts = [
        BEGIN,
        table("TRL", SHARED, trl.SAME, trl.OF_LORA, trl.OF_4BIT, trl.OF_SFT, trl.OF_DPO),
        table("Axolotl", SHARED, axolotl.SAME, axolotl.OF_LORA),
        table("LLaMA-Factory", SHARED, llamafactory.SAME, llamafactory.OF_LORA),
        "## Names that work in a run.toml and on the command line\n\nWhoever writes a key by one of these names gets a notice, "
        "and the run that they meant.\n\n| theirs | here | values |\n| --- | --- | --- |\n" + "\n".join(rows(ALIASES)),
        "## Keys of all three that have no counterpart",
        reasons("They change nothing here", HARMLESS),
        reasons("These do, or do it otherwise", CHANGES),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print("written: docs/migrating.md")


if __name__ == "__main__":
    main()
