"""Axolotl's lists of datasets: where the rows are, which of our formats they have, and what in them is trained."""

import re
from collections.abc import Callable

from minisft.importers.translation import TRANSLATED, Translation, as_list, source

READ_OF_A_DATASET = (
    *("path", "name", "split", "revision", "data_files", "type", "field_messages", "field", "text_column"),
    *("message_property_mappings", "message_field_role", "message_field_content", "field_chosen", "field_rejected"),
    *(f"type.field_{name}" for name in ("instruction", "input", "output", "system", "prompt", "chosen", "rejected")),
)
DETECTED = ("ds_type", "conversation", "preprocess_shards", "field_tools", "field_human", "field_model", "skip")


def datasets(t: Translation, name: str, ours: str, trainer_type: str) -> None:
    """Axolotl's list of tables -> our sources, with formats and prompts as their `type` says."""
    sources, i = [], 0
    while any(key.startswith(f"{name}[{i}].") for key in t.left):
        here = {key.partition("].")[2]: key for key in t.left if key.startswith(f"{name}[{i}].")}
        sources.append(_dataset(t, here, ours, trainer_type))
        i += 1
    sources = [one for one in sources if one]
    if sources and ours not in t.values:
        t.values[ours] = sources if len(sources) > 1 else sources[0]
        t.origins[ours] = name


def _dataset(t: Translation, here: dict[str, str], ours: str, trainer_type: str) -> str | dict | None:
    """One table of the list. here: {name of a field: its key in the file}."""

    def value(name: str, default: object = None) -> object:
        return t.get(here[name], default) if name in here else default

    path, files = value("path"), as_list(value("data_files"))
    entries: dict[str, object] = {"name": value("name"), "split": value("split"), "revision": value("revision")}
    if path in ("json", "csv", "parquet", "text") and files:  # a loader and its files
        path, files = (files[0], []) if len(files) == 1 else (None, files)
    if files:
        entries["data_files"] = files
    messages = value("field_messages", "messages")
    kind = value("type")
    kind = kind if isinstance(kind, str) else ""
    if trainer_type == "dpo":
        entries["field_map"] = _fields_of_pairs(kind, value)
    else:
        entries["format"], entries["field_map"] = _format(t, kind, value, path)
    if "split" in here and isinstance(path, str) and re.search(r"\.\w+$", path):
        entries.pop("split")  # a local file has one split
    for name in READ_OF_A_DATASET:
        if name in here and here[name] in t.left:
            t.take(here[name], TRANSLATED, ours)
    _training_of_turns(t, here, value, messages)
    for name, key in here.items():
        if key in t.left:
            easy = name in DETECTED
            t.nothing(key, "detected from the rows" if easy else "a source of rows has no such option", harmless=easy)
    if path is None and files:
        return [source(str(file), **{**entries, "data_files": None}) for file in files][0]
    return source(str(path), **entries) if path else None


def _fields_of_pairs(kind: str, value: Callable) -> dict[str, str]:
    """{their field: ours} of preference rows."""
    wanted = {"chosen": value("field_chosen"), "rejected": value("field_rejected"), "prompt": None}
    if "chat_template" in kind:
        wanted["prompt"] = value("field_messages", "messages")
    elif "intel" in kind:
        wanted["prompt"] = "question"
    for name in ("prompt", "chosen", "rejected"):
        wanted[name] = value(f"type.field_{name}", wanted[name])
    return {theirs: mine for mine, theirs in wanted.items() if theirs and theirs != mine}


def _format(t: Translation, kind: str, value: Callable, path: object) -> tuple[str | None, dict]:
    """(our format, {their field: ours}) of rows for supervised fine-tuning."""
    if kind.startswith("chat_template") or kind == "sharegpt":
        mapping = value("message_property_mappings") or {}
        mapping = mapping if isinstance(mapping, dict) else {}
        role = value("message_field_role", mapping.get("role")) or "role"
        content = value("message_field_content", mapping.get("content")) or "content"
        is_sharegpt = kind == "sharegpt" or (role, content) == ("from", "value")
        home = "conversations" if is_sharegpt else "messages"
        theirs = value("field_messages", home if kind == "sharegpt" else "messages")
        if not is_sharegpt and (role, content) != ("role", "content"):
            t.difference(f"{path}: messages must have role and content; there they are {role} and {content}")
        return "sharegpt" if is_sharegpt else "messages", {theirs: home} if theirs != home else {}
    if kind.startswith(("completion", "pretrain")):
        field = value("field", value("text_column", "text"))
        return "text", {field: "text"} if field != "text" else {}
    if kind == "input_output" or kind.startswith("bradley_terry"):
        t.difference(f"{path}: rows of type {kind} must be written anew, as prompt and completion or with labels")
        return None, {}
    if kind.startswith("alpaca") and "load_qa" not in kind:
        t.default("data.prompt_format", "plain", "Axolotl's alpaca is plain text, not the chat template")
        t.difference(
            "alpaca: the prompt is ### Instruction, ### Input, ### Response as there, without the sentence before them"
        )
        return "instruction", {}
    if isinstance(value("type.field_instruction"), str):
        fields = {value(f"type.field_{mine}", mine): mine for mine in ("instruction", "input", "output", "system")}
        return "instruction", {theirs: mine for theirs, mine in fields.items() if theirs != mine}
    return "question_answer" if "load_qa" in kind else None, {}


def _training_of_turns(t: Translation, here: dict[str, str], value, messages: object) -> None:
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
        usual = {"user": {"user", "human"}, "assistant": {"assistant", "gpt"}, "system": {"system"}, "tool": {"tool"}}
        same = isinstance(roles, dict) and all(set(as_list(v)) <= usual.get(k, set()) for k, v in roles.items())
        t.nothing(
            here["roles"], "the usual names" if same else "other names of roles are not known here", harmless=same
        )
