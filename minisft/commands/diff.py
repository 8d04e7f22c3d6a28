"""`minisft diff A B`: where the losses of two runs part, and every recorded difference that may be the reason."""

import json
import math
import sys
from pathlib import Path
from typing import Any

from minisft.config.load import RESOLVED_NAME, deciding_values, load, read_resolved
from minisft.config.sections import KEYS, config_to_dict
from minisft.config.values import as_toml
from minisft.errors import UserError
from minisft.files import checked_path
from minisft.log_files import read_metrics

USAGE = """\
usage: minisft diff A B [--json]

A and B are output folders of runs. Print where their losses part, then everything that differs: keys of the
configuration with their defaults, the starting model, the data, code, versions and machines. The exit code is 0 if
nothing differs, else 1.
"""
WIDTH = 100
SHOWN = 8  # differences of one kind in the data and in the files of a model


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    from minisft.config.command_line import take_options

    options, names = take_options(argv, (), ("json",))
    if len(names) != 2:
        raise UserError(f"diff of {len(names)} runs", hint="minisft diff RUN_A RUN_B")
    a, b = (Path(checked_path(name, "the run")) for name in names)
    found = {"losses": compare_losses(a, b), **compare_configs(a, b), **compare_records(a, b)}
    if "json" in options:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(report(found, a, b)))
    return 1 if found["losses"]["part"] is not None or any(found[kind] for kind in KINDS) else 0


# ---- the losses ---------------------------------------------------------------------------------------------------


def compare_losses(a: Path, b: Path) -> dict[str, Any]:
    """{same: the last step to which all logged values are the same, part: the first step where one differs, or None, ...}"""
    rows = [by_step(read_metrics(folder / "metrics.jsonl")) for folder in (a, b)]
    common = sorted(rows[0].keys() & rows[1].keys())
    same, part, values = None, None, {}
    for step in common:
        first, second = (one[step] for one in rows)
        values = {
            name: [first[name], second[name]]
            for name in first
            if name in second and not equal(first[name], second[name]) and name not in ("learning_rate", "epoch")
        }
        if values:
            part = step
            break
        same = step
    last = [max(one, default=None) for one in rows]
    return {"same": same, "part": part, "values": {k: [str(x) for x in v] for k, v in values.items()}, "last": last}


def by_step(rows: list[dict]) -> dict[int, dict]:
    """The values of training by step."""
    return {int(row["step"]): row for row in rows if "loss" in row and "step" in row}


def equal(x: float, y: float) -> bool:
    return x == y or math.isnan(x) and math.isnan(y)


# ---- the configuration and the record -----------------------------------------------------------------------------

KINDS = {
    "decides": "configuration: keys that decide which model is written",
    "other": "configuration: other keys",
    "base": "the model at the start",
    "tokenizer": "the tokenizer and its template",
    "data": "the data",
    "code": "the code",
    "versions": "versions",
    "machine": "the machine",
}


def compare_configs(a: Path, b: Path) -> dict[str, dict[str, list[str]]]:
    """{"decides" and "other": {key: [value in A, value in B]}}, each value with where it came from."""
    paths = [resolved(folder) for folder in (a, b)]
    texts, configs = [read_resolved(path.read_text("utf-8")) for path in paths], [load(path)[0] for path in paths]
    values, deciding = [config_to_dict(config) for config in configs], deciding_values(configs[0])
    found: dict[str, dict[str, list[str]]] = {"decides": {}, "other": {}}
    for key in KEYS:
        if values[0][key] != values[1][key]:
            told = [
                f"{as_toml(value[key])} ({text[key][1] if key in text else 'default'})"
                for value, text in zip(values, texts)
            ]
            found["decides" if key in deciding else "other"][key] = told
    return found


def resolved(folder: Path) -> Path:
    path = folder / RESOLVED_NAME
    if not path.exists():
        hint = "name the output folder of a run, which has it from its start on"
        raise UserError(f"{folder} is no run: it has no {RESOLVED_NAME}", hint=hint)
    return path


def compare_records(a: Path, b: Path) -> dict[str, Any]:
    """The differences of the last starts, by kind: {name: [in A, in B]}; and notes."""
    from minisft.record import NAME, flat, read_record

    starts, notes = [read_record(folder) for folder in (a, b)], []
    for folder, own in zip((a, b), starts):
        if not own:
            notes.append(
                f"{folder} has no {NAME} (an earlier version wrote it): only its configuration can be compared"
            )
        for kind in ("code", "versions", "machine"):
            if steps := [str(entry["step"]) for entry in own[1:] if entry.get(kind) != own[0].get(kind)]:
                notes.append(f"{folder} itself went on with other {kind} at step {', '.join(steps)}")
    found: dict[str, Any] = {kind: {} for kind in list(KINDS)[2:]}
    if all(starts):
        first, second = (flat(own[-1]) for own in starts)
        for name in sorted(first.keys() | second.keys()):
            kind, _, rest = name.partition(" ")
            kind = "tokenizer" if kind == "template" else kind
            if kind in found and first.get(name) != second.get(name):
                found[kind][rest or name] = [short(one.get(name)) for one in (first, second)]
    found["notes"] = notes
    return found


def short(value: Any) -> str:
    """A value for the table; of a hash its beginning."""
    text = "absent" if value is None else str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


# ---- the report ---------------------------------------------------------------------------------------------------


def report(found: dict[str, Any], a: Path, b: Path) -> list[str]:
    lines = [f"A  {a}", f"B  {b}", "", *loss_lines(found["losses"])]
    for kind, title in KINDS.items():
        if not found[kind]:
            continue
        lines += ["", title]
        for name, (first, second) in list(found[kind].items())[: None if kind in ("decides", "other") else SHOWN]:
            lines += [f"  {name}", f"    A  {cut(first)}", f"    B  {cut(second)}"]
            if kind == "decides":
                lines.append(f"       {cut(KEYS[name].metadata['help'])}")
        if kind not in ("decides", "other") and len(found[kind]) > SHOWN:
            lines.append(f"  and {len(found[kind]) - SHOWN} more; --json has all")
    return [*lines, "", *found["notes"], conclusion(found)]


def loss_lines(losses: dict[str, Any]) -> list[str]:
    last = losses["last"]
    if losses["part"] is not None:
        same = f"The same up to step {losses['same']}. " if losses["same"] is not None else ""
        lines = [f"{same}The logged values part at step {losses['part']}:"]
        shown = sorted(losses["values"], key=lambda name: name not in ("loss", "grad_norm"))[:4]
        return [
            *lines,
            *(f"  {name:<22} A {losses['values'][name][0]:<22} B {losses['values'][name][1]}" for name in shown),
        ]
    if losses["same"] is None:
        return ["No step is logged in both runs, so their losses cannot be compared."]
    longer = "" if last[0] == last[1] else f"; A was logged to step {last[0]}, B to step {last[1]}"
    return [f"All logged values are the same up to step {losses['same']}{longer}."]


def cut(text: str) -> str:
    return text if len(text) <= WIDTH - 10 else text[: WIDTH - 13] + "..."


def conclusion(found: dict[str, Any]) -> str:
    """What may be the reason."""
    inputs = [KINDS[kind].partition(":")[0] for kind in ("decides", "base", "tokenizer", "data") if found[kind]]
    if inputs:
        return f"Other inputs: {', '.join(inputs)}. Each of them may be the reason."
    if found["code"] or found["versions"] or found["machine"]:
        other = [KINDS[kind] for kind in ("code", "versions", "machine") if found[kind]]
        return f"The same inputs; other: {', '.join(other)}. These may round or sum in another order."
    if found["losses"]["part"] is not None:
        return "Nothing that is recorded differs. Is it a GPU without train.deterministic, or were files changed?"
    return "Nothing that decides the model differs."
