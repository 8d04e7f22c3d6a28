"""Conversations as people write them, checked and brought into one form.

It is the form that chat templates know: a list of messages, each a dict with

    role               system, developer, user, assistant or tool
    content            text, always
    reasoning_content  an assistant's reasoning before the answer (rows may call it `reasoning` or `thinking`)
    tool_calls         [{"type": "function", "function": {"name", "arguments": an object}, "id"?}, ...]
    name, tool_call_id and any other key that a template may know, as they are

and, if the row has them, three keys that are for us and not for the template:

    train              true or false: the row decides whether this turn is trained (also `training`, `loss`)
    weight             a factor on the loss of this turn, other than 1; 0 becomes train = false
    part_spans         [(start, end, train)]: the characters of `content` that are a part with a `train` of its own

`content` may be a list of parts. Texts are joined, reasoning at the front becomes reasoning_content, and an image or a
sound is refused. A key whose value is null counts as absent, as in transformers (parquet.py does the same for keys further
down), and so does an empty list of tool calls. Nothing is reordered, mended or guessed.
"""

from difflib import get_close_matches
from math import isfinite
from typing import Any

from minisft.data.rows import RowError
from minisft.errors import UserError
from minisft.strict_json import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "tool_call": "assistant", "observation": "tool", "tool": "tool",
    "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
SHAREGPT_CALLS = ("function_call", "tool_call")  # their value is the call, as JSON text
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TRAIN_KEYS = ("train", "training", "loss")
SHAREGPT_KEYS = (*TRAIN_KEYS, "weight", *REASONING_KEYS, "name", "tool_call_id")  # other keys of a turn that are read
RENDER_NAMES = ("messages", "tools", "documents", "add_generation_prompt")  # not for a row's chat_template_kwargs
MAX_DEPTH = 100  # of a JSON value in a row: far more than real data has, far less than the stack holds
MAX_WEIGHT = 3e38  # larger numbers are infinite in fp32


def describe_type(value: object) -> str:
    name = type(value).__name__
    return "null" if value is None else f"{'an' if name == 'int' else 'a'} {name}"


# ------------------------------------------------------------------------------------------------- messages


def check_messages(value: object, name: str, *, needs_answer: bool = True) -> list[dict]:
    """The messages of a row in the form above, in a new list. name: the field, for error messages. Raises RowError.

    A message that has the form already is the row's own dict, not a copy, and must not be changed.
    """
    if not isinstance(value, list) or not value:
        raise RowError("not a list of messages", f"{name} is {describe_type(value) if value != [] else 'empty'}")
    messages = []
    has_answer = False
    for i, message in enumerate(value):
        if not _is_plain(message):
            message = _message(message, f"{name}[{i}]")
        messages.append(message)
        has_answer = has_answer or message["role"] == "assistant"
    if needs_answer and not has_answer:
        raise RowError("no assistant turn", f"roles: {', '.join(message['role'] for message in messages)}")
    return messages


def with_system(messages: list[dict], system: str, name: str) -> list[dict]:
    """The messages after a system turn. Raises RowError if they begin with another one. name: their field."""
    if not system.strip():
        return messages
    first = messages[0]
    if first["role"] in ("system", "developer"):
        if first["content"].strip() == system.strip():
            return messages
        raise RowError("two system prompts", f"the field system, and {name}[0]")
    return [{"role": "system", "content": system}, *messages]


def _is_plain(message: object) -> bool:
    """Whether a message is only a known role and a text that is not blank, as nearly all are. It needs no other check."""
    if type(message) is not dict or len(message) != 2:
        return False
    content = message.get("content")
    return type(content) is str and content != "" and not content.isspace() and message.get("role") in ROLES


def _message(message: object, where: str) -> dict:
    if not isinstance(message, dict):
        raise RowError("not a message", f"{where} is {describe_type(message)}")
    if "role" not in message and "from" in message:
        raise RowError("not a message", f'{where} has "from", as ShareGPT turns have; map the field to conversations')
    message = {key: value for key, value in message.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise _unknown_role(f"{where}.role", role, ROLES)
    for key in ("part_spans", "function_call"):
        if key in message:
            what = "write calls as tool_calls" if key == "function_call" else "the name is reserved"
            raise RowError("key of a message that cannot be used", f"{where}.{key}: {what}")

    calls = message.pop("tool_calls", None) or None
    training = _take_training(message, where)
    reasoning = {key: message.pop(key) for key in REASONING_KEYS if key in message}
    if isinstance(content, list):
        content, thoughts, part_spans = _join_parts(content, f"{where}.content")
        if thoughts is not None:
            reasoning["content"] = thoughts
        if part_spans:
            training["part_spans"] = part_spans
    if content is None and calls:
        content = ""

    if calls and role != "assistant":
        raise RowError("tool call by another role", f"{where} has the role {role!r}")
    if not isinstance(content, str):
        raise RowError("content is not a string", f"{where}.content is {describe_type(content)}")
    if role == "assistant" and not content.strip() and not calls and training.get("train") is not False:
        raise RowError("empty answer", f"{where}.content")
    for key, value in message.items():
        if key in ("name", "tool_call_id") and not isinstance(value, str):
            raise RowError("not a string", f"{where}.{key} is {describe_type(value)}")
        if key not in ("role", "content"):
            check_json(value, f"{where}.{key}")
    message["content"] = content
    if reasoning:
        message["reasoning_content"] = _one_reasoning(reasoning, role, where)
    if calls:
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    return message | training


def _unknown_role(where: str, role: object, known: tuple[str, ...]) -> RowError:
    near = SHAREGPT_ROLES.get(str(role).lower())
    if near not in known:
        near = next(iter(get_close_matches(str(role).lower(), known, n=1)), None)
    hint = f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
    return RowError("unknown role", f"{where} is {role!r:.80}; {hint}")


def _one_reasoning(reasoning: dict[str, Any], role: str, where: str) -> str:
    """The text that all values of `reasoning`, at least one, have."""
    for key, text in reasoning.items():
        if not isinstance(text, str):
            raise RowError("reasoning is not a string", f"{where}.{key} is {describe_type(text)}")
    if role != "assistant":
        raise RowError("reasoning of another role", f"{where} has the role {role!r}")
    if len(set(reasoning.values())) > 1:
        raise RowError("reasoning given twice", f"{where} has it as {' and '.join(reasoning)}, and they differ")
    return next(iter(reasoning.values()))


def _take_training(message: dict, where: str) -> dict:
    """Remove the keys about training from a message (or part), and return them as {"train"?: bool, "weight"?: float}."""
    training = {}
    for key in TRAIN_KEYS:
        if key not in message:
            continue
        value = message.pop(key)
        if not isinstance(value, int) or value not in (0, 1):
            raise RowError("train is not true or false", f"{where}.{key} is {value!r:.80}")
        if training.get("train", value) != value:
            raise RowError("train given twice", f"{where}.{key} is {value!r}, and it contradicts another key")
        training["train"] = bool(value)
    weight = check_weight(message.pop("weight", 1), f"{where}.weight")
    if weight == 0:
        training["train"] = False
    elif weight != 1:
        training["weight"] = weight
    return training


def check_weight(value: object, where: str) -> float:
    """A factor on a loss: a finite number from 0 up. Raises RowError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_WEIGHT:
        raise RowError("bad weight", f"{where} is {value!r:.80}, not a finite number from 0 up")
    return float(value)


def _join_parts(parts: list, where: str) -> tuple[str, str | None, list[tuple[int, int, bool]]]:
    """(text, reasoning or None, part_spans) of a content that is a list of parts."""
    text, thoughts, spans = "", None, []
    for i, part in enumerate(parts):
        at = f"{where}[{i}]"
        if not isinstance(part, dict):
            raise RowError("not a content part", f"{at} is {describe_type(part)}")
        part = {key: value for key, value in part.items() if value is not None}
        kind = part.get("type")
        if kind not in ("text", "reasoning", "thinking"):
            raise RowError("not a text part", f"{at}.type is {kind!r:.80}; models here read text, no images or sound")
        said = part.get(kind, part.get("text"))
        if not isinstance(said, str):
            raise RowError("not a string", f"{at}.{kind} is {describe_type(said)}")
        training = _take_training(part, at)
        if "weight" in training:
            raise RowError("weight of a part", f"{at}.weight is {training['weight']:g}: a part has 0 or 1, or `train`")
        if kind == "text":
            if "train" in training and said:
                spans.append((len(text), len(text) + len(said), training["train"]))
            text += said
        elif text:
            raise RowError("reasoning after the answer", f"{at}: templates put reasoning before the text")
        elif training:
            raise RowError("train of a reasoning part", f"{at}: reasoning is trained, masked or stripped for all rows")
        else:
            thoughts = (thoughts or "") + said
    return text, thoughts, spans


# ------------------------------------------------------------------------------------------------- ShareGPT


def check_turns(value: object, name: str, *, system: str = "", needs_answer: bool = True) -> list[dict]:
    """The messages of ShareGPT turns [{"from", "value"}, ...], after a system message if `system` is not empty.

    A turn may also have reasoning, a name, `train` and `weight` like a message; its other keys are not read.
    Raises RowError.
    """
    if not isinstance(value, list) or not value:
        raise RowError("not a list of turns", f"{name} is {describe_type(value) if value != [] else 'empty'}")
    turns = [_turn(turn, f"{name}[{i}]") for i, turn in enumerate(value)]
    return with_system(check_messages(turns, name, needs_answer=needs_answer), system, name)


def _turn(turn: object, where: str) -> dict:
    """A ShareGPT turn as a message that is not checked yet."""
    if isinstance(turn, dict) and "role" in turn and "from" not in turn:
        raise RowError("not a turn", f'{where} has "role", as messages have; map the field to messages')
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise RowError("not a turn", f"{where} has no text in `value`")
    speaker = turn.get("from")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        raise _unknown_role(f"{where}.from", speaker, tuple(SHAREGPT_ROLES))
    message = {"role": SHAREGPT_ROLES[speaker], "content": turn["value"]}
    if speaker in SHAREGPT_CALLS:
        calls = _json(turn["value"], f"{where}.value")
        message |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        if not calls:
            raise RowError("bad tool call", f"{where}.value has no call")
    if len(turn) > 2:
        message |= {key: turn[key] for key in SHAREGPT_KEYS if key in turn}
    return message


# ------------------------------------------------------------------------------------------------- tools and the rest


def _tool_calls(calls: object, where: str) -> list[dict]:
    """Calls as {"type": "function", "function": {"name", "arguments"}, "id"?}; rows may also write {"name", "arguments"}."""
    if not isinstance(calls, list):
        raise RowError("bad tool call", f"{where} is {describe_type(calls)}, not a list")
    checked = []
    for i, call in enumerate(calls):
        at = f"{where}[{i}]"
        call = {key: value for key, value in call.items() if value is not None} if isinstance(call, dict) else {}
        if "function" not in call:
            call["function"] = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        function = call["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("bad tool call", f"{at} has no function name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # as in OpenAI's files; templates need the object
            arguments = _json(arguments, f"{at}.arguments") if arguments.strip() else {}
        elif arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError("bad tool call", f"{at}.arguments is {describe_type(arguments)}, not an object")
        call = {"type": "function", **call, "function": {**function, "arguments": arguments}}
        check_json(call, at)
        checked.append(call)
    return checked


def check_tools(tools: object) -> list[dict] | None:
    """The `tools` of a row as a list of {"type": "function", "function": {"name", ...}}, None if there are none.

    The row may give the list as JSON text, and the functions alone, without "type". Raises RowError.
    """
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowError("bad tools", f"tools is {describe_type(tools)}, not a list of objects")
    checked = []
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RowError("bad tools", f"tools[{i}] is {describe_type(tool)}, not a list of objects")
        if "function" not in tool:
            tool = {"type": "function", "function": tool}
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise RowError("bad tools", f"tools[{i}] has no function name")
        check_json(tool, f"tools[{i}]")
        checked.append(tool)
    return checked or None


def check_documents(documents: object) -> list[dict] | None:
    """The `documents` of a row, for templates of retrieval models: a list of objects. Raises RowError."""
    if documents is None:
        return None
    if not isinstance(documents, list) or not all(isinstance(document, dict) for document in documents):
        raise RowError("bad documents", "not a list of objects")
    check_json(documents, "documents")
    return [{key: value for key, value in document.items() if value is not None} for document in documents] or None


def check_variables(variables: object) -> dict | None:
    """The `chat_template_kwargs` of a row: an object with the template's own variables. Raises RowError."""
    if variables is None:
        return None
    if not isinstance(variables, dict):
        raise RowError("bad chat_template_kwargs", f"they are {describe_type(variables)}, not an object")
    check_json(variables, "chat_template_kwargs")
    for name in variables:
        if name in RENDER_NAMES or name.startswith("_"):
            raise RowError("bad chat_template_kwargs", f"a row cannot set {name!r}")
    return {name: value for name, value in variables.items() if value is not None} or None


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raise RowError unless JSON can hold the value. Parquet files also have dates, bytes, decimals and NaN, which a template
    would print as Python does."""
    if depth > MAX_DEPTH:
        raise RowError("nested too deeply", where)
    kind = type(value)
    if kind is dict:
        for key, inner in value.items():
            if type(key) is not str:
                raise RowError("not a JSON value", f"{where} has the key {key!r}")
            check_json(inner, f"{where}.{key}", depth + 1)
    elif kind is list:
        for i, inner in enumerate(value):
            check_json(inner, f"{where}[{i}]", depth + 1)
    elif kind is float and not isfinite(value):
        raise RowError("not a JSON value", f"{where} is {value}")
    elif value is not None and kind not in (str, int, float, bool):
        raise RowError("not a JSON value", f"{where} is {describe_type(value)}")


def _json(text: str, where: str) -> object:
    try:
        return parse_json(text.encode("utf-8"))
    except UserError as error:
        raise RowError("not valid JSON", f"{where}: {error.message}") from None
