"""Axolotl's types of preference rows: which columns they read, and what they write around prompt and answers.

    chatml.* llama3.*    system, question and answer as turns of ChatML or Llama 3, whatever chat_template says
    chat_template.*      messages, through the chat template; argilla_chat and argilla find the prompt in the answers
    user_defined         a table: columns by name, and the texts that are written around them
    passthrough, none    the columns prompt, chosen and rejected as they are

A column that a type reads and our rows cannot have, or the other way round, is a difference.
"""

import json
from collections.abc import Callable
from string import Formatter

from minisft.importers.translation import DIFFERENCE, TRANSLATED, Translation, columns_left_out
from minisft.importers.trl import AFTER_THE_END

# The column with the question, by the last part of the type's name.
QUESTIONS = {"intel": "question", "icr": "input", "prompt_pairs": "prompt", "ultra": "prompt", "argilla": "instruction"}
# What the two families write, as chat templates. Llama 3's own would trim the texts, and since 3.1 it names a date in the
# system turn. TRL puts the EOS token after an answer that does not end with it.
TEMPLATES = {
    "chatml": "chatml",
    "llama3": "{% if bos_token == '<|begin_of_text|>' %}{{ bos_token }}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
    "{% if m.role == 'assistant' and eos_token != '<|eot_id|>' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}
BOS = "a prompt begins with BOS there if the tokenizer adds it to text, here it does not"
ONE_QUESTION = "of each conversation the first question and its answer are trained there, here the last answer"
OPTIONAL = ("system",)
FORMATS_OF_TEXTS = ("prompt_format", "chosen_format", "rejected_format", "completion_format")


def preference_fields(
    t: Translation, where: str, here: dict[str, str], value: Callable, row: dict | None, loss: str
) -> tuple[dict[str, str], list[str]]:
    """({their column: ours}, columns to leave out) of preference rows. What else the type says is written into t.

    where: the data set's name for people; here: {name of a field: its key in the file}; row: the first one, None if it
    cannot be read; loss: what `rl` says.
    """
    kind = value("type")
    kind = kind if isinstance(kind, str) else ""
    family, _, name = kind.partition(".")
    answers = ("completion",) if loss == "kto" else ("chosen", "rejected")
    if any(key.startswith("type.") for key in here):
        wanted = _user_defined(t, where, here, value, answers)
    elif family in TEMPLATES:
        wanted = _turns(t, where, family, name or "default", row, answers)
    elif family == "chat_template":
        wanted = _chat_template(t, where, name or "default", value, row)
    else:
        wanted = {"chosen": value("field_chosen"), "rejected": value("field_rejected"), "prompt": "prompt"}
        t.agree("data.prompt_format", "plain", f"{where} (type {kind or 'absent'}, texts as they are)")
        if kind == "zephyr.nectar":
            t.difference(
                f"{where}: type zephyr.nectar takes two of a list of ranked answers, the last two by rank, and writes Zephyr's "
                "turns; write such rows as prompt, chosen and rejected"
            )
        elif kind and family not in ("passthrough", "user_defined"):
            t.difference(f"{where}: type {kind} is not known; its rows are read as prompt, {' and '.join(answers)}")
    renames = {}
    for mine, theirs in wanted.items():
        if theirs and theirs != mine and (row is None or theirs in row or mine not in row and mine not in OPTIONAL):
            renames[theirs] = mine
    read = [theirs if row is None or theirs in row else mine for mine, theirs in wanted.items()]
    return renames, columns_left_out(t, row, read)


def _turns(
    t: Translation, where: str, family: str, name: str, row: dict | None, answers: tuple[str, ...]
) -> dict[str, str | None]:
    """chatml.* and llama3.*"""
    why = f"{where} (type {family}.{name})"
    t.agree("model.chat_template", TEMPLATES[family], why)
    t.agree("data.prompt_format", "chat", why)
    if family == "chatml":
        t.difference(f"{where}: {BOS}; and after <|im_end|> comes the tokenizer's EOS there if that is another token")
    elif "llama" not in str(t.given.get("base_model", "")).lower():
        t.difference(f"{where}: {BOS}, other than Llama 3's")
    if name == "argilla_chat":
        t.difference(f"{where}: {ONE_QUESTION}")
        return {"messages": "completion"} if answers == ("completion",) else {}  # the prompt is in the answers
    columns = {answer: answer for answer in answers}
    if name == "argilla" and "chosen" in answers:
        columns = {"chosen": "chosen_response", "rejected": "rejected_response"}
    if name == "ultra" and "chosen" in answers:
        t.difference(
            f"{where}: the second message of chosen and rejected is the answer there, here what follows the prompt"
        )
    question = QUESTIONS.get(name)
    if name == "default":
        of_row = row if row is not None else {"prompt": ""}
        question = next((column for column in ("prompt", "input", "question") if column in of_row), "instruction")
        if row is None:
            t.difference(
                f"{where}: its prompt is the first column of prompt, input, question, instruction that the rows have; the rows "
                "cannot be read here, and prompt is taken"
            )
        elif "chosen" in answers:
            columns = {side: side if side in row else f"{side}_response" for side in answers}
    elif question is None:
        t.difference(f"{where}: type {family}.{name} is not known; its question is read from prompt")
    return {**columns, "prompt": question, "system": "system"}


def _chat_template(t: Translation, where: str, name: str, value: Callable, row: dict | None) -> dict[str, str | None]:
    """chat_template.default, chat_template.argilla_chat, and of ORPO chat_template.argilla."""
    answers = {"chosen": value("field_chosen"), "rejected": value("field_rejected")}
    if name in ("argilla", "argilla_chat"):
        if name == "argilla":
            t.difference(f"{where}: a column prompt stands there for every question of chosen; here for the first")
            t.difference(f"{AFTER_THE_END}; there it is trained")
            return {**answers, "prompt": "prompt", "system": "system"}
        return answers
    if name != "default":
        t.difference(f"{where}: type chat_template.{name} is not known; it is read as chat_template.default")
    mapping = value("message_property_mappings")
    mapping = mapping if isinstance(mapping, dict) else {}
    role = value("message_field_role", mapping.get("role")) or "role"
    content = value("message_field_content", mapping.get("content")) or "content"
    messages = value("field_messages", "messages")
    t.agree("data.prompt_format", "chat", f"{where} (type chat_template)")
    if (role, content) not in (("role", "content"), ("from", "value")):
        t.difference(f"{where}: messages must have role and content, or from and value; there {role} and {content}")
    chosen = (row or {}).get(answers["chosen"] or "chosen")
    if isinstance((row or {}).get(messages), list) and isinstance(chosen, str):
        t.difference(f"{where}: answers to a list of messages are messages here; these are text, and must be rewritten")
    t.difference(f"{where}: of an answer that is a list of messages only the last one is trained there")
    return {**answers, ("conversations" if (role, content) == ("from", "value") else "prompt"): messages}


def _user_defined(
    t: Translation, where: str, here: dict[str, str], value: Callable, answers: tuple[str, ...]
) -> dict[str, str | None]:
    """A table of columns, and of texts that are written around them."""
    prompt = str(value("type.prompt_format") or "{prompt}")
    around = [str(value(f"type.{answer}_format") or "{}").replace(f"{{{answer}}}", "{}") for answer in answers]
    is_plain = prompt == "{prompt}" and set(around) == {"{}"}
    template = None if is_plain else _template(prompt, around[0])
    keys = [here[f"type.{name}"] for name in FORMATS_OF_TEXTS if f"type.{name}" in here]
    if template:
        t.agree("model.chat_template", template, f"{where} (its prompt_format)")
        t.agree("data.prompt_format", "chat", f"{where} (its prompt_format)")
        t.difference(f"{where}: {BOS}")
        if len(set(around)) > 1:
            t.difference(f"{where}: chosen_format is written around the rejected answer too")
    else:
        t.agree("data.prompt_format", "plain", f"{where} (texts as they are)")
    for key in keys:
        if template or is_plain:
            t.take(key, TRANSLATED, "model.chat_template" if template else 'data.prompt_format = "plain"')
        else:
            t.take(key, DIFFERENCE, "this text is not written here; write it into the rows, or give a chat template")
    columns = (*answers, "prompt", *(["label"] if "completion" in answers else []))
    wanted = {mine: value(f"type.field_{mine}", mine) for mine in columns}
    return wanted | ({"system": value("type.field_system", "system")} if "{system}" in prompt else {})


def _template(prompt: str, answer: str) -> str | None:
    """A chat template that writes the text `prompt`, with {prompt} and {system}, and `answer`, with {}; None if it cannot."""
    try:
        parts = list(Formatter().parse(prompt))
        before, after = answer.split("{}")
    except ValueError:
        return None
    names = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    if any(name not in (("prompt", "", None), ("system", "", None)) for name in names):
        return None
    contents = {"prompt": "{{ m.content }}", "system": "{{ said.system }}", None: ""}
    question = "".join(_literal(text) + contents[name] for text, name, _, _ in parts)
    end = _literal(after) + (f"{{% if not {json.dumps(after)}.endswith(eos_token) %}}{{{{ eos_token }}}}{{% endif %}}")
    return (
        "{% set said = namespace(system='') %}{% for m in messages %}"
        f"{{% if m.role == 'system' %}}{{% set said.system = m.content %}}{{% elif m.role == 'user' %}}{question}"
        f"{{% else %}}{_literal(before)}{{{{ m.content }}}}{end}{{% endif %}}{{% endfor %}}"
    )


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
