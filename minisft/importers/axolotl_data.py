"""Axolotl's lists of datasets: where the rows are, which of our formats they have, and what in them is trained."""

from collections.abc import Callable

from minisft.importers.axolotl_preference import preference_fields
from minisft.importers.translation import (
    DIFFERENCE,
    TRANSLATED,
    FirstRow,
    Translation,
    as_list,
    columns_left_out,
    loaded_files,
    local_split,
    source,
)

FIELDS = ("instruction", "input", "output", "system", "prompt", "chosen", "rejected", "completion", "label")
READ_OF_A_DATASET = (
    *(
        "path",
        "name",
        "split",
        "revision",
        "data_files",
        "type",
        "field_messages",
        "field",
        "text_column",
        "field_tools",
    ),
    *("message_property_mappings", "message_field_role", "message_field_content", "field_chosen", "field_rejected"),
    *(f"type.field_{name}" for name in FIELDS),
)
DETECTED = ("ds_type", "preprocess_shards")
WRITTEN_AROUND = ("format", "no_input_format", "system_format", "system_prompt")  # of a user-defined type


def datasets(t: Translation, name: str, ours: str, loss: str | None, first_row: FirstRow) -> None:
    """Axolotl's list of tables -> our sources, with formats and prompts as their `type` says. loss: the file's `rl`."""
    sources, i = [], 0
    while any(key.startswith(f"{name}[{i}].") for key in t.left):
        here = {key.partition("].")[2]: key for key in t.left if key.startswith(f"{name}[{i}].")}
        sources += _dataset(t, here, ours, loss, first_row)
        i += 1
    if sources and ours not in t.values:
        t.values[ours] = sources if len(sources) > 1 else sources[0]
        t.origins[ours] = name


def _dataset(
    t: Translation, here: dict[str, str], ours: str, loss: str | None, first_row: FirstRow
) -> list[str | dict]:
    """One table of the list, as sources. here: {name of a field: its key in the file}."""

    def value(name: str, default: object = None) -> object:
        return t.get(here[name], default) if name in here else default

    for name, key in here.items():
        if ("field" in name or name == "text_column") and isinstance(t.left[key], list):
            t.nothing(key, "expected the name of one column")
    paths, files = loaded_files(value("path"), as_list(value("data_files")))
    paths = [str(path) for path in paths if path]
    split = value("split")
    entries: dict[str, object] = {"name": value("name"), "revision": value("revision"), "data_files": files}
    where = paths[0] if paths else ours
    row = first_row(source(where, split=local_split(where, split))) if paths else None
    if loss:
        entries["field_map"], entries["ignore"] = preference_fields(t, where, here, value, row, loss)
    else:
        entries["format"], fields = _format(t, here, value, where, row)
        entries["field_map"] = {theirs: mine for theirs, mine in fields.items() if theirs != mine}
        if entries["format"] in ("messages", "sharegpt", "instruction"):
            entries["ignore"] = columns_left_out(
                t, row, (*fields, "messages", "conversations", "prompt")
            )  # of other formats
    for name in READ_OF_A_DATASET:
        if name in here and here[name] in t.left:
            t.take(here[name], TRANSLATED, ours)
    _training_of_turns(t, here, value)
    for name, key in here.items():
        if key in t.left:
            easy = name in DETECTED
            why = "detected from the rows" if easy else "a source of rows has no such option"
            t.nothing(key, why, harmless=easy or not t.on(key))
    return [source(path, split=local_split(path, split), **entries) for path in paths]


def _format(
    t: Translation, here: dict[str, str], value: Callable, where: str, row: dict | None
) -> tuple[str | None, dict]:
    """(our format, {their field: ours} of the fields that are read) of rows for supervised fine-tuning."""
    if any(name.startswith("type.") for name in here):
        return _user_defined(t, here, value, where, row)
    kind = value("type")
    kind = kind if isinstance(kind, str) else ""
    if kind.startswith("chat_template") or kind == "sharegpt":
        mapping = value("message_property_mappings") or {}
        mapping = mapping if isinstance(mapping, dict) else {}
        role = value("message_field_role", mapping.get("role")) or "role"
        content = value("message_field_content", mapping.get("content")) or "content"
        is_sharegpt = kind == "sharegpt" or (role, content) == ("from", "value")
        home = "conversations" if is_sharegpt else "messages"
        theirs = value("field_messages", home if kind == "sharegpt" else "messages")
        if not is_sharegpt and (role, content) != ("role", "content"):
            t.difference(f"{where}: messages must have role and content; there they are {role} and {content}")
        return "sharegpt" if is_sharegpt else "messages", {theirs: home, value("field_tools", "tools"): "tools"}
    if kind.startswith(("completion", "pretrain")):
        field = value("field", value("text_column", "text"))
        return "text", {field: "text"}
    if kind == "input_output" or kind.startswith("bradley_terry"):
        t.difference(f"{where}: rows of type {kind} must be written anew, as prompt and completion or with labels")
        return None, {}
    if kind.startswith("alpaca") and "load_qa" not in kind:
        t.default("data.prompt_format", "plain", "Axolotl's alpaca is plain text, not the chat template")
        t.difference(
            "alpaca: the prompt is ### Instruction, ### Input, ### Response as there, without the sentence before them"
        )
        if kind != "alpaca":
            t.difference(
                f"{where}: type {kind} is read as alpaca; what else it writes or reads is not written or read here"
            )
        return "instruction", {name: name for name in ("instruction", "input", "output")}
    if kind:
        t.difference(
            f"{where}: the prompts of type {kind} are written in another way there; see `minisft audit --show 1`"
        )
    return "question_answer" if "load_qa" in kind else None, {}


def _user_defined(
    t: Translation, here: dict[str, str], value: Callable, where: str, row: dict | None
) -> tuple[str, dict]:
    """A table of columns, and of texts that are written around them."""
    columns = {mine: value(f"type.field_{mine}", mine) for mine in ("instruction", "input", "output", "system")}
    optional = [mine for mine in ("input", "system") if row is not None and columns[mine] not in row]
    for name in WRITTEN_AROUND:
        if (key := here.get(f"type.{name}")) in t.left:
            t.take(key, DIFFERENCE, "this text is not written around the columns here; see model.chat_template")
    t.difference(
        f"{where}: prompts are what the type's format says there; here the chat template, or plain text without one"
    )
    return "instruction", {theirs: mine for mine, theirs in columns.items() if mine not in optional}


def _training_of_turns(t: Translation, here: dict[str, str], value: Callable) -> None:
    """Which turns and which ends of turns are trained; Axolotl's defaults are ours."""
    for name, usual in (("roles_to_train", ["assistant"]), ("train_on_eos", "turn"), ("train_on_eot", "turn")):
        if name in here and here[name] in t.left:
            same = value(name) in (None, usual, ["gpt"], "assistant")
            why = "as here" if same else "here the assistant's turns are trained, each with its end"
            t.nothing(here[name], why, harmless=same)
    name = "message_field_training"
    if name in here and here[name] in t.left:
        same = value(name) in ("train", "training", "loss")
        t.nothing(here[name], "read from the rows" if same else "name that field `train` in the rows", harmless=same)
    if "roles" in here and here["roles"] in t.left:
        roles = value("roles") or {}
        usual = {"user": ("user", "human"), "assistant": ("assistant", "gpt"), "system": ("system",), "tool": ("tool",)}
        same = isinstance(roles, dict) and all(
            word in usual.get(k, ()) for k, v in roles.items() for word in as_list(v)
        )
        t.nothing(
            here["roles"], "the usual names" if same else "other names of roles are not known here", harmless=same
        )
