"""A launcher's YAML of several stages: `stages`, their names in order, and `stage_configs`, the keys of each.

Keys outside of both are common to all stages. Names are TRL's or ours. Each stage becomes one table of `stages`, and starts
from the model of the stage before it: a model path that is the output folder of an earlier stage is left out.
"""

from dataclasses import replace

from minisft.config.sections import KEYS
from minisft.errors import UserError
from minisft.importers import trl
from minisft.importers.translation import (
    DIFFERENCE,
    NO_COUNTERPART,
    TRANSLATED,
    FirstRow,
    Note,
    Translation,
)

NAME = "a file of stages"
PREFERENCE_WORDS = ("dpo", "pref", "orpo", "kto", "simpo", "ipo", "apo", "align")
LOSSES = {
    "orpo": "orpo",
    "kto": "kto",
    "simpo": "simpo",
    "ipo": "ipo",
    "apo": "apo_zero",
}  # a word of its name -> its loss
TYPE_KEYS = ("trainer_type", "trainer", "stage_type", "type", "method", "task")


def read(table: dict, first_row: FirstRow = lambda source: None) -> list[tuple[str, Translation]]:
    """[(name of the stage, its translation)], every key of the file in the notes of exactly one of them.

    Raises UserError if `stages` and `stage_configs` do not fit each other.
    """
    names, configs = table.get("stages"), table.get("stage_configs")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError("stages: expected a list of names", hint="as in stages: [sft, dpo]")
    if not isinstance(configs, dict):
        raise UserError("stage_configs: expected a table", hint="stage_configs: {sft: {learning_rate: 2.0e-5}, ...}")
    if missing := [name for name in names if not isinstance(configs.get(name), dict)]:
        raise UserError(
            f"stage_configs has no table for {', '.join(missing)}", hint=f"it has: {', '.join(map(str, configs))}"
        )
    if len(set(names)) < len(names):
        raise UserError(f"stages: a name comes twice: {', '.join(names)}", hint="one table of stage_configs for each")
    common = {key: value for key, value in table.items() if key not in ("stages", "stage_configs")}
    read_stages, folders = [], set()
    for name in names:
        merged = {**common, **configs[name]}
        t = _read_stage(name, merged, folders, first_row)
        folders.add(t.values.get("output_dir"))
        common_keys = {
            key for key in t.given if key.partition(".")[0].partition("[")[0] in set(common) - set(configs[name])
        }
        prefix = f"stage_configs.{name}."
        t.notes = [replace(note, key=note.key if note.key in common_keys or not note.key else prefix + note.key)
                   for note in t.notes if not read_stages or note.key not in common_keys]  # fmt: skip
        read_stages.append((name, t))
    first = read_stages[0][1]
    first.notes.insert(0, Note(TRANSLATED, f"stages = {names}  ->  stages", "stages"))
    for name in [name for name in configs if name not in names]:
        given = Translation(configs[name] if isinstance(configs[name], dict) else {"": configs[name]}).given
        for key, value in given.items():
            whole = f"stage_configs.{name}.{key}".rstrip(".")
            first.notes.append(Note(NO_COUNTERPART, f"{whole} = {value}: {name} is not in stages", whole, True))
    return read_stages


def _read_stage(name: str, table: dict, folders: set[str], first_row: FirstRow) -> Translation:
    written = next((key for key in TYPE_KEYS if isinstance(table.get(key), str)), None)
    words = f"{name} {table[written] if written else ''}".lower()
    is_preference = trl.is_dpo(table) or any(word in words for word in PREFERENCE_WORDS)
    kind = "dpo" if is_preference else "sft"
    models = {key: table.get(key) for key in ("model_name_or_path", "model_name", "base_model")}
    from_before = [key for key, model in models.items() if isinstance(model, str) and model in folders]
    rest = {key: value for key, value in table.items() if key != written and key not in from_before}
    full = {key: rest.pop(key) for key in list(rest) if key in KEYS and "." in key}
    sections = {key for key in rest if isinstance(rest[key], dict) and any(k.startswith(f"{key}.") for k in KEYS)}
    for key in sections:  # [train] as a table, as in our files
        full |= {f"{key}.{inner}": value for inner, value in rest.pop(key).items()}
    loss = next((LOSSES[word] for word in LOSSES if word in words), None)
    t = trl.read(rest, kind, first_row, loss=loss, lora_by_rank=True)
    t.left |= full | {key: table[key] for key in (*from_before, *([written] if written else []))}
    t.given |= t.left
    if written:
        t.take(written, TRANSLATED, f'trainer_type = "{kind}"')
    for key in from_before:
        t.take(key, TRANSLATED, "the model of the stage before, from which a stage starts anyway")
    for key in full:
        t.values.pop(key, None)
        if key in KEYS:
            t.notes = [note for note in t.notes if not (note.kind == DIFFERENCE and note.text.startswith(f"{key} = "))]
            t.into(key, key)
        else:
            t.nothing(key, "not known here")
    return t
