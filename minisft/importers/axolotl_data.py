"""Axolotl's lists of datasets: where the rows are, which of our formats they have, and what in them is trained."""

import re

from minisft.importers.translation import Translation, as_list, source

READ_OF_A_DATASET = (
    *("path", "name", "split", "revision", "data_files", "type", "field_messages", "field", "text_column"),
    *("message_property_mappings", "message_field_role", "message_field_content", "field_chosen", "field_rejected"),
    *(f"type.field_{name}" for name in ("instruction", "input", "output", "system", "prompt", "chosen", "rejected")),
)


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
    def value(name: str, default: object = None) -> object:
        return t.get(here[name], default) if name in here else default

    def done(name: str, what: str = ours) -> None:
        if name in here and here[name] in t.left:
            t.take(here[name], "translated", what)

    path, files, kind = value("path"), as_list(value("data_files")), value("type")
    entries: dict[str, object] = {"name": value("name"), "split": value("split"), "revision": value("revision")}
    if path in ("json", "csv", "parquet", "text") and files:  # a loader and its files
        path, files = (files[0], []) if len(files) == 1 else (None, files)
    if files:
        entries["data_files"] = files
    mapping = value("message_property_mappings") or {}
    role = value("message_field_role", mapping.get("role") if isinstance(mapping, dict) else None) or "role"
    content = value("message_field_content", mapping.get("content") if isinstance(mapping, dict) else None) or "content"
    kind_text, field_map = kind if isinstance(kind, str) else "", {}
    messages = value("field_messages", "messages")
    if trainer_type == "dpo":
        wanted = {"chosen": value("field_chosen"), "rejected": value("field_rejected"), "prompt": None}
        if "chat_template" in kind_text:
            wanted["prompt"] = value("field_messages", "messages")
        elif "intel" in kind_text or "zephyr" in kind_text:
            wanted["prompt"] = "question" if "intel" in kind_text else None
        for name in ("prompt", "chosen", "rejected"):
            wanted[name] = value(f"type.field_{name}", wanted[name])
        field_map = {theirs: mine for mine, theirs in wanted.items() if theirs and theirs != mine}
    elif kind_text.startswith("chat_template") or kind_text == "sharegpt":
        is_sharegpt = kind_text == "sharegpt" or (role, content) == ("from", "value")
        home = "conversations" if is_sharegpt else "messages"
        theirs = value("field_messages", home if kind_text == "sharegpt" else "messages")
        field_map = {theirs: home} if theirs != home else {}
        entries["format"] = "sharegpt" if is_sharegpt else "messages"
        if not is_sharegpt and (role, content) != ("role", "content"):
            t.difference(f"{path}: messages must have role and content; there they are {role} and {content}")
    elif kind_text.startswith(("completion", "pretrain")):
        field = value("field", value("text_column", "text"))
        field_map, entries["format"] = ({field: "text"} if field != "text" else {}), "text"
    elif kind_text == "input_output" or kind_text.startswith("bradley_terry"):
        t.difference(f"{path}: rows of type {kind_text} must be written anew, as prompt and completion or with labels")
    elif kind_text.startswith("alpaca") and "load_qa" not in kind_text:
        entries["format"] = "instruction"
        t.default("data.prompt_format", "plain", "Axolotl's alpaca is plain text, not the chat template")
        t.difference(
            "alpaca: the prompt is ### Instruction, ### Input, ### Response as there, without the sentence before them"
        )
    elif isinstance(value("type.field_instruction"), str):
        wanted = {"instruction": "instruction", "input": "input", "output": "output", "system": "system"}
        wanted = {value(f"type.field_{mine}", mine): mine for mine in wanted}
        field_map = {theirs: mine for theirs, mine in wanted.items() if theirs != mine}
        entries["format"] = "instruction"
    elif kind_text and "load_qa" in kind_text:
        entries["format"] = "question_answer"
    entries["field_map"] = field_map
    if "split" in here and isinstance(path, str) and re.search(r"\.\w+$", path):
        entries.pop("split")  # a local file has one split
    for name in READ_OF_A_DATASET:
        done(name)
    _training_of_turns(t, here, value, messages)
    for name, key in here.items():
        if key in t.left:
            easy = name in (
                "ds_type",
                "conversation",
                "preprocess_shards",
                "field_tools",
                "field_human",
                "field_model",
                "skip",
            )
            t.nothing(key, "detected from the rows" if easy else "a source of rows has no such option", harmless=easy)
    if path is None and files:
        return [source(str(file), **{**entries, "data_files": None}) for file in files][0]
    return source(str(path), **entries) if path else None


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
