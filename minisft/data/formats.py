"""From a row to an example: which fields it has, what is the prompt, what is trained.

Seven shapes of rows are known; the first row of a source decides which one it is, and every other row of that source
must have it too. Nothing is guessed after that: a row that does not fit is a `RowError` that names the field.

    input_ids           {"input_ids": [...], "labels": [...]?}                 labels: input_ids, or -100 = not trained
    messages            {"messages": [{"role", "content"}, ...], "tools"?}
    sharegpt            {"conversations": [{"from", "value"}, ...], "tools"?, "system"?}
    prompt_completion   {"prompt", "completion"}                               two strings, or two lists of messages
    instruction         {"instruction", "input"?, "output" or "response", "system"?}
    question_answer     {"question", "answer"}
    text                {"text": ...}                                          the field named by dataset_text_field

Any row may have a `weight` that scales its targets. A prompt and its completion are two strings that are encoded apart,
so that training sees for the prompt exactly the ids that inference will produce for it alone, and the border between
them needs no search. instruction and question_answer become a conversation where the tokenizer has a chat template and
the plain layout below where it has none; `prompt_format` ("chat", "plain") overrides that. The strings of
prompt_completion are used as they are unless prompt_format is "chat".

What is trained: the answer of rows with a prompt, the assistant's turns of conversations, everything of plain text;
`completion_only_loss = false` or `assistant_only_loss = false` trains everything.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from minisft.data.batch import ANSWER, TERMINATOR, TEXT, TRAINED, USER
from minisft.errors import DATA, UserError
from minisft.files import parse_json

FIELDS = {  # format -> (fields that it needs, fields that it may have); "a|b" = one of the two
    "input_ids": (("input_ids",), ("labels",)),
    "messages": (("messages",), ("tools",)),
    "sharegpt": (("conversations",), ("tools", "system")),
    "prompt_completion": (("prompt", "completion"), ("tools",)),
    "instruction": (("instruction", "output|response"), ("input", "system")),
    "question_answer": (("question", "answer"), ()),
    "text": (("text",), ()),
}
FORMATS = ("auto", *FIELDS)
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "observation": "tool", "tool": "tool",
}  # fmt: skip
EOS = TERMINATOR | TRAINED


class RowError(ValueError):
    """What is wrong with one row: `reason` is the same text for the same mistake, `detail` has the values."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class FormatOptions:
    """How rows are read; everything here is part of the cache's key."""

    dataset_text_field: str = "text"
    prompt_format: str = "auto"  # auto | chat | plain
    completion_only_loss: bool | None = None  # None = detected
    assistant_only_loss: bool | None = None  # None = detected
    response_marker: str = ""  # plain text: what follows it is trained
    instruction_marker: str = ""  # plain text: ends what is trained
    add_eos: bool = True  # plain text and prompt/completion end in EOS; conversations get it from the template
    add_special_tokens: bool = True  # outside of templates: the tokenizer's own BOS (and what else it adds)


@dataclass(frozen=True)
class Piece:
    """A string that is encoded by itself. Spans are (char start, char end, kind | TRAINED); later ones win."""

    text: str
    spans: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Example:
    """One row, ready to be encoded. Exactly one of pieces, messages, ids is set."""

    pieces: tuple[Piece, ...] = ()  # encoded one by one, then joined; BOS before, EOS after them by the options
    messages: list[dict] | None = None  # to be rendered by the chat template
    tools: list[dict] | None = None
    first_trained: int = 0  # assistant turns before this message are context
    ids: list[int] | None = None  # already tokenised
    labels: list[int] | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Layout:
    """What was decided for a source from its first row."""

    format: str
    chat: bool  # rendered by the chat template
    answers_only: bool  # False = everything is trained
    turns: bool = False  # the rows hold lists of messages
    weighted: bool = False  # the rows have a `weight`
    ignored: tuple[str, ...] = ()  # fields of the first row that nothing reads

    @property
    def prompt(self) -> str:
        """How a question becomes a prompt: "chat" by the template, "instruction" by `plain_prompt`, "plain" as it is."""
        return "chat" if self.chat else "instruction" if self.format in ("instruction", "question_answer") else "plain"

    def __str__(self) -> str:
        """One line for the start of a run."""
        how = "by the chat template" if self.chat else "already tokenised" if self.format == "input_ids" else "as text"
        answers = "the assistant's turns" if self.turns else "the answer"
        trained = answers if self.answers_only else "what labels say" if self.format == "input_ids" else "everything"
        ignored = f"; fields not used: {', '.join(self.ignored)}" if self.ignored else ""
        weighted = ", scaled by the field weight" if self.weighted else ""
        return f"{self.format}, {how}; trained: {trained}{weighted}{ignored}"


# ------------------------------------------------------------------------------------------------- what a source has


def rename_fields(row: dict, field_map: dict[str, str]) -> dict:
    """The row with the user's field names replaced by ours. Raises RowError where one is absent or taken."""
    if not field_map:
        return row
    for theirs, ours in field_map.items():
        if theirs not in row:
            raise RowError("missing field", f"{theirs!r} (of field_map); the row has {', '.join(row) or 'no field'}")
        if ours in row and ours not in field_map:
            raise RowError("field_map hides a field", f"{theirs!r} becomes {ours!r}, which the row has already")
    return {field_map.get(name, name): value for name, value in row.items()}


def check_field_map(field_map: dict[str, str], options: FormatOptions) -> None:
    """Raise UserError where field_map names a field that no format has, or one field twice."""
    ours = {n for needs, extra in FIELDS.values() for field in (*needs, *extra) for n in field.split("|")}
    ours |= {"weight", options.dataset_text_field}
    for theirs, name in field_map.items():
        if name not in ours:
            near = get_close_matches(name, ours, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(
                f"field_map maps {theirs!r} to {name!r}, which no format has",
                hint=f"{hint}fields: {', '.join(sorted(ours))}",
            )
    if len(set(field_map.values())) < len(field_map):
        raise UserError(f"field_map = {field_map} maps two fields to the same name")


def detect_layout(row: dict, format: str, options: FormatOptions, has_template: bool) -> Layout:
    """Decide the format and what is trained from a first row (fields already renamed).

    Raises UserError where no format fits or an option asks for what the format does not have, and RowError where the
    row lacks a field of the format that was named.
    """
    if format not in FORMATS:
        near = get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown format {format!r}", hint=f"{hint}formats: {', '.join(FORMATS)}")
    if options.prompt_format not in ("auto", "chat", "plain"):
        raise UserError(f"prompt_format = {options.prompt_format!r}", hint="one of auto, chat, plain")
    names = list(FIELDS) if format == "auto" else [format]
    found = next((name for name in names if not _missing(row, name, options)), None)
    if found is None and format != "auto":
        raise _missing_field(row, format, options)
    if found is None:
        wanted = "; ".join(f"{name}: {', '.join(_needs(name, options))}" for name in names)
        preference = " (chosen/rejected rows are for preference training)" if "chosen" in row else ""
        raise UserError(
            f"the fields {', '.join(row) or '(none)'} are those of no known format{preference}",
            hint=f"rename fields by field_map, or name the text field by dataset_text_field. Needed: {wanted}",
            exit_code=DATA,
        )
    turns = found in ("messages", "sharegpt") or found == "prompt_completion" and isinstance(row["prompt"], list)
    has_prompt = found in ("prompt_completion", "instruction", "question_answer")
    wants_chat = has_prompt and options.prompt_format != "plain" and found != "prompt_completion" and has_template
    chat = turns or wants_chat or has_prompt and options.prompt_format == "chat"
    if chat and not has_template:
        raise UserError(
            f"{found} rows need a chat template and the tokenizer has none",
            hint='set chat_template = "chatml", or to a file',
        )
    ours, other = options.completion_only_loss, options.assistant_only_loss
    if not has_prompt:
        ours, other = other, ours
    answers_only = (ours if ours is not None else other) is not False
    if found in ("text", "input_ids"):
        answers_only = found == "text" and bool(options.response_marker)
        for key in ("completion_only_loss", "assistant_only_loss"):
            asked = getattr(options, key)
            if asked is not None and asked != answers_only:
                raise UserError(
                    f"{key} = {str(asked).lower()}, but {found} rows "
                    + ("name a response_marker" if answers_only else "have neither a prompt nor turns"),
                    hint=f"leave {key} unset" + ("" if answers_only else ", or name a response_marker"),
                )
    needs, extra = FIELDS[found]
    used = {name for field in (*needs, *extra) for name in field.split("|")} | {"weight"}
    used |= {options.dataset_text_field} if found == "text" else set()
    ignored = tuple(name for name in row if name not in used)
    return Layout(found, chat, answers_only, turns, "weight" in row, ignored)


def _needs(name: str, options: FormatOptions) -> tuple[str, ...]:
    return (options.dataset_text_field,) if name == "text" else FIELDS[name][0]


def _missing(row: dict, name: str, options: FormatOptions) -> list[str]:
    return [field for field in _needs(name, options) if not any(n in row for n in field.split("|"))]


def _missing_field(row: dict, name: str, options: FormatOptions) -> RowError:
    missing = _missing(row, name, options)[0]
    return RowError("missing field", f"{missing!r}; the row has {', '.join(row) or 'no field'}")


# ------------------------------------------------------------------------------------------------- one row


def to_example(row: dict, layout: Layout, options: FormatOptions) -> Example:
    """One row (fields already renamed) as an example. Raises RowError."""
    if _missing(row, layout.format, options):
        raise _missing_field(row, layout.format, options)
    weight = _weight(row)
    tools = _tools(row) if layout.chat else None
    if layout.format == "input_ids":
        return _tokenised(row, weight)
    if layout.format == "text":
        return Example(pieces=(_text(row, options),), weight=weight)
    if layout.format == "messages":
        return Example(messages=check_messages(row["messages"], "messages"), tools=tools, weight=weight)
    if layout.format == "sharegpt":
        return Example(messages=_sharegpt(row), tools=tools, weight=weight)
    if layout.format == "prompt_completion" and layout.turns:
        prompt = check_messages(row["prompt"], "prompt", needs_answer=False)
        answer = check_messages(row["completion"], "completion")
        return Example(messages=prompt + answer, tools=tools, first_trained=len(prompt), weight=weight)

    system, prompt, answer = _prompt_and_answer(row, layout)
    if not answer.strip():
        raise RowError("empty answer", "there is nothing to learn from it")
    if layout.chat:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        system = [{"role": "system", "content": system}] if system else []
        return Example(messages=system + turns, tools=tools, weight=weight)
    prompt_byte = USER if layout.answers_only else USER | TRAINED
    pieces = (whole(prompt, prompt_byte), whole(answer, ANSWER | TRAINED))
    return Example(pieces=pieces[0 if prompt else 1 :], weight=weight)


def whole(text: str, byte: int) -> Piece:
    """A piece that is all of one kind."""
    return Piece(text, [(0, len(text), byte)])


def _prompt_and_answer(row: dict, layout: Layout) -> tuple[str, str, str]:
    """(system, prompt, answer) of a row with one prompt."""
    if layout.format == "prompt_completion":
        return "", _string(row, "prompt"), _string(row, "completion")
    if layout.format == "question_answer":
        system, instruction, extra, answer = "", _string(row, "question"), "", _string(row, "answer")
    else:
        system = _string(row, "system") if row.get("system") is not None else ""
        extra = _string(row, "input") if row.get("input") is not None else ""
        instruction = _string(row, "instruction")
        answer = _string(row, "output" if "output" in row else "response")
    if not instruction.strip() and not extra.strip():
        raise RowError("empty prompt")
    if layout.chat:
        return system, f"{instruction}\n\n{extra}" if extra.strip() else instruction, answer
    return "", plain_prompt(instruction, extra, system), answer


def plain_prompt(instruction: str, input: str = "", system: str = "") -> str:
    """The layout of a prompt for a tokenizer without a chat template; the answer follows its last newline."""
    system = f"{system}\n\n" if system.strip() else ""
    input = f"### Input:\n{input}\n\n" if input.strip() else ""
    return f"{system}### Instruction:\n{instruction}\n\n{input}### Response:\n"


def _text(row: dict, options: FormatOptions) -> Piece:
    text = _string(row, options.dataset_text_field)
    if not text.strip():
        raise RowError("empty text")
    if not options.response_marker:
        return whole(text, TEXT | TRAINED)
    responses = [(m.end(), ANSWER | TRAINED, m.start()) for m in re.finditer(re.escape(options.response_marker), text)]
    if not responses:
        raise RowError("no response_marker", f"{options.response_marker!r} does not occur")
    if len(responses) > 1 and not options.instruction_marker:
        raise RowError("several answers", "an instruction_marker must say where each of them ends")
    marker = re.escape(options.instruction_marker)
    turns = [(m.end(), TEXT, m.start()) for m in re.finditer(marker, text)] if marker else []
    marks = sorted(responses + turns)
    ends = [start for _, _, start in marks[1:]] + [len(text)]
    spans = [(begin, end, byte) for (begin, byte, _), end in zip(marks, ends)]
    if any(byte & TRAINED and not text[begin:end].strip() for begin, end, byte in spans):
        raise RowError("empty answer", "nothing follows a response_marker")
    return Piece(text, [(0, len(text), TEXT), *spans])


def _tokenised(row: dict, weight: float) -> Example:
    ids, labels = row["input_ids"], row.get("labels")
    for name, value in (("input_ids", ids), ("labels", labels)):
        if value is None and name == "labels":
            continue
        if not isinstance(value, list) or not value or not all(type(i) is int for i in value):
            raise RowError("not a list of token ids", name)
    if labels is not None and len(labels) != len(ids):
        raise RowError("labels of another length", f"{len(labels)} labels for {len(ids)} input_ids")
    if labels is not None and any(label not in (-100, i) for label, i in zip(labels, ids)):
        raise RowError("labels differ from input_ids", "a label is the token's own id (unshifted) or -100")
    return Example(ids=ids, labels=labels, weight=weight)


def _string(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise RowError("not a string", f"{name} is {_type(row[name])}")
    return row[name]


def _type(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _weight(row: dict) -> float:
    value = row.get("weight", 1.0)
    try:
        weight = math.nan if isinstance(value, bool) else float(value)  # a CSV has it as text
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not (0 <= weight <= 3e38):  # above that, fp32 has infinity
        raise RowError("bad weight", f"{value!r} is not a finite number from 0 up")
    return weight


# ------------------------------------------------------------------------------------------------- conversations


def check_messages(value: object, name: str, *, needs_answer: bool = True) -> list[dict]:
    """Check a list of messages; tool calls get their arguments as objects. Unknown keys go to the template."""
    if not isinstance(value, list) or not value:
        raise RowError("not a list of messages", f"{name} is {_type(value) if value != [] else 'empty'}")
    messages = []
    for i, message in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(message, dict):
            raise RowError("not a message", f"{where} is {_type(message)}")
        role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
        if not isinstance(role, str) or role not in ROLES:
            near = get_close_matches(str(role).lower(), ROLES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(ROLES)}"
            raise RowError("unknown role", f"{where}.role is {role!r}; {hint}")
        if calls and role != "assistant":
            raise RowError("tool call by another role", f"{where} is of {role!r}")
        if content is None and calls:
            content = ""
        if not isinstance(content, str):
            raise RowError("content is not a string", f"{where}.content is {_type(content)}")
        if role == "assistant" and not content.strip() and not calls:
            raise RowError("empty answer", f"{where}.content")
        message = {**message, "content": content}
        if calls:
            message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
        messages.append(message)
    if needs_answer and not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant turn", f"roles: {', '.join(message['role'] for message in messages)}")
    return messages


def _tool_calls(calls: object, where: str) -> list[dict]:
    if not isinstance(calls, list):
        raise RowError("bad tool call", f"{where} is {_type(calls)}, not a list")
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("bad tool call", f"{where}[{i}] has no function name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as in OpenAI's files; templates want the object
            arguments = _json(arguments, f"{where}[{i}].arguments")
        if not isinstance(arguments, dict):
            raise RowError("bad tool call", f"{where}[{i}].arguments is {_type(arguments)}, not an object")
        function = {**function, "arguments": arguments}
        checked.append(
            {**call, "function": function} if "function" in call else {"type": "function", "function": function}
        )
    return checked


def _tools(row: dict) -> list[dict] | None:
    """The `tools` field: a list of objects, or that list as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "tools") if tools.strip() else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise RowError("bad tools", "not a list of objects")
    return tools or None


def _json(text: str, where: str) -> object:
    try:
        return parse_json(text.encode("utf-8"))
    except UserError as error:
        raise RowError("not valid JSON", f"{where}: {error.message}") from None


def _sharegpt(row: dict) -> list[dict]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise RowError("not a list of turns", f"conversations is {_type(turns) if turns != [] else 'empty'}")
    system = _string(row, "system") if row.get("system") is not None else ""
    messages: Sequence[dict] = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        where = f"conversations[{i}]"
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise RowError("not a turn", f"{where} has no text in `value`")
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            raise RowError("unknown role", f"{where}.from is {speaker!r}; known are {', '.join(SHAREGPT_ROLES)}")
        message = {"role": SHAREGPT_ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":
            calls = _json(turn["value"], f"{where}.value")
            message = {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
        messages.append(message)
    return check_messages(messages, "conversations")
