"""From a row to an example: which fields it has, what is the prompt, what is trained.

Eight shapes of rows are known; the first row of a source decides which one it is, and every other row of that source
must have it too. Nothing is guessed after that: a row that does not fit is a `RowError` that names the field.

    input_ids           {"input_ids": [...], "labels": [...]?}                 labels: input_ids, or -100 = not trained
    preference          {"prompt"?, "chosen", "rejected"}                      strings, or messages
                        {"conversations", "chosen", "rejected"}                ShareGPT turns
    messages            {"messages": [{"role", "content"}, ...]}               conversations.py has all that is allowed
    sharegpt            {"conversations": [{"from", "value"}, ...], "system"?}
    prompt_completion   {"prompt", "completion"}                               two strings, or two lists of messages
    instruction         {"instruction", "input"?, "output" or "response", "system"?}
    question_answer     {"question", "answer"}
    text                {"text": ...}                                          the field named by dataset_text_field

Any row may have a `weight` that scales its targets. Rows that a chat template renders may have `tools`, `documents` and
`chat_template_kwargs`, which are given to it.

A prompt and its completion are two strings that are encoded apart, so that training sees for the prompt exactly the ids
that inference will produce for it alone, and the border between them needs no search. instruction and question_answer
become a conversation where the tokenizer has a chat template and the plain layout below where it has none;
`prompt_format` ("chat", "plain") overrides that. The strings of prompt_completion and preference rows are used as they
are unless prompt_format is "chat".

What is trained: the answer of rows with a prompt, the assistant's turns of conversations, everything of plain text;
`completion_only_loss = false` or `assistant_only_loss = false` trains everything. Of a preference row the chosen answer
is the answer, and nothing here reads the rejected one.
"""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches

from minisft.data.batch import ANSWER, TEXT, TRAINED, USER
from minisft.data.conversations import (
    RowError,
    check_documents,
    check_messages,
    check_tools,
    check_turns,
    check_variables,
    check_weight,
    describe_type,
)
from minisft.errors import DATA, UserError

TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")  # read where a chat template renders the row
FIELDS = {  # format -> (fields that it needs, fields that it may have); "a|b" = one of the two; the first that fits is it
    "input_ids": (("input_ids",), ("labels",)),
    "preference": (("chosen", "rejected"), ("prompt", "conversations", "system", *TEMPLATE_FIELDS)),
    "messages": (("messages",), TEMPLATE_FIELDS),
    "sharegpt": (("conversations",), ("system", *TEMPLATE_FIELDS)),
    "prompt_completion": (("prompt", "completion"), TEMPLATE_FIELDS),
    "instruction": (("instruction", "output|response"), ("input", "system", *TEMPLATE_FIELDS)),
    "question_answer": (("question", "answer"), TEMPLATE_FIELDS),
    "text": (("text",), ()),
}
FORMATS = ("auto", *FIELDS)
CHOICES = {
    "prompt_format": ("auto", "chat", "plain"),
    "control_tokens": ("error", "escape", "allow"),
    "reasoning": ("train", "mask", "strip"),
    "multi_turn": ("auto", "joint", "per_turn"),
}


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
    control_tokens: str = "error"  # a special token's text inside a content: error | escape | allow
    reasoning: str = "train"  # of assistant turns: train | mask | strip
    multi_turn: str = "auto"  # auto | joint | per_turn
    last_turn_only: bool = False  # only the last assistant turn is trained
    turns_max_length: int | None = None  # truncation = "turns": longer conversations lose their oldest turns


@dataclass(slots=True)  # of the classes here, those of a single row are not frozen: that costs 0.1 us a field
class Piece:
    """A string that is encoded by itself. Spans are (char start, char end, kind | TRAINED); later ones win."""

    text: str
    spans: list[tuple[int, int, int]]
    weights: list[tuple[int, int, float]] = field(default_factory=list)  # of stretches whose loss has a factor
    literal: list[tuple[int, int]] = field(default_factory=list)  # where the text of a special token is ordinary text


@dataclass(slots=True)
class Example:
    """One row, ready to be encoded. Exactly one of pieces, messages, ids is set."""

    pieces: tuple[Piece, ...] = ()  # encoded one by one, then joined; BOS before, EOS after them by the options
    messages: list[dict] | None = None  # to be rendered by the chat template
    tools: list[dict] | None = None
    documents: list[dict] | None = None  # for templates of retrieval models
    variables: dict | None = None  # the row's own chat_template_kwargs
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
    last_turn_only: bool = False  # of the assistant's turns only the last is trained
    weighted: bool = False  # the rows have a `weight`
    ignored: tuple[str, ...] = ()  # fields of the first row that nothing reads

    @property
    def prompt(self) -> str:
        """How a question becomes a prompt: "chat" by the template, "instruction" by `plain_prompt`, "plain" as it is."""
        return "chat" if self.chat else "instruction" if self.format in ("instruction", "question_answer") else "plain"

    def __str__(self) -> str:
        """One line for the start of a run."""
        how = "by the chat template" if self.chat else "already tokenised" if self.format == "input_ids" else "as text"
        turns = "the assistant's last turn" if self.last_turn_only else "the assistant's turns"
        special = {"messages": turns, "sharegpt": turns, "preference": "the chosen answer"}
        answers = special.get(self.format, "the answer")
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
    for key, choices in CHOICES.items():
        if getattr(options, key) not in choices:
            raise UserError(f"{key} = {getattr(options, key)!r}", hint=f"one of {', '.join(choices)}")
    names = list(FIELDS) if format == "auto" else [format]
    found = next((name for name in names if not _missing(row, name, options)), None)
    if found is None and format != "auto":
        raise _missing_field(row, format, options)
    if found is None:
        wanted = "; ".join(f"{name}: {', '.join(_needs(name, options))}" for name in names)
        raise UserError(
            f"the fields {', '.join(row) or '(none)'} are those of no known format",
            hint=f"rename fields by field_map, or name the text field by dataset_text_field. Needed: {wanted}",
            exit_code=DATA,
        )
    turns = found in ("messages", "sharegpt") or found == "prompt_completion" and isinstance(row["prompt"], list)
    turns = turns or found == "preference" and (_is_sharegpt(row) or not isinstance(row["chosen"], str))
    has_prompt = found in ("preference", "prompt_completion", "instruction", "question_answer")
    wants_chat = found in ("instruction", "question_answer") and options.prompt_format != "plain" and has_template
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
    if options.last_turn_only and (found == "text" or not answers_only):
        what = "everything is trained" if has_prompt or turns else f"{found} rows have no turns"
        raise UserError(f"last_turn_only = true, but {what}", hint="leave last_turn_only unset")
    ignored = _ignored(row, found, chat, options)
    return Layout(found, chat, answers_only, turns, options.last_turn_only, "weight" in row, ignored)


def _ignored(row: dict, found: str, chat: bool, options: FormatOptions) -> tuple[str, ...]:
    """The fields of a row that nothing reads."""
    needs, extra = FIELDS[found]
    used = {name for field in (*needs, *extra) for name in field.split("|")} | {"weight"}
    used |= {options.dataset_text_field} if found == "text" else set()
    if not chat:
        used -= set(TEMPLATE_FIELDS)
    if found == "preference":
        used -= {"rejected", "prompt"} if _is_sharegpt(row) else {"rejected", "conversations", "system"}
    return tuple(name for name in row if name not in used)


def _is_sharegpt(preference: dict) -> bool:
    return preference.get("conversations") is not None


def _needs(name: str, options: FormatOptions) -> tuple[str, ...]:
    return (options.dataset_text_field,) if name == "text" else FIELDS[name][0]


def _missing(row: dict, name: str, options: FormatOptions) -> str:
    """The first field that the format needs and the row lacks, or nothing."""
    for needed in _needs(name, options):
        if needed not in row and not any(n in row for n in needed.split("|")):
            return needed
    return ""


def _missing_field(row: dict, name: str, options: FormatOptions) -> RowError:
    return RowError("missing field", f"{_missing(row, name, options)!r}; the row has {', '.join(row) or 'no field'}")


# ------------------------------------------------------------------------------------------------- one row


def to_example(row: dict, layout: Layout, options: FormatOptions) -> Example:
    """One row (fields already renamed) as an example. Raises RowError."""
    if _missing(row, layout.format, options):
        raise _missing_field(row, layout.format, options)
    example = Example(weight=_weight(row) if "weight" in row else 1.0)
    if layout.chat:
        example.tools = check_tools(row.get("tools"))
        example.documents = check_documents(row.get("documents"))
        example.variables = check_variables(row.get("chat_template_kwargs"))
    if layout.turns:
        example.messages, example.first_trained = _conversation(row, layout.format)
    elif layout.format == "input_ids":
        example.ids, example.labels = _tokenised(row)
    elif layout.format == "text":
        example.pieces = (_text(row, options),)
    else:
        system, prompt, answer = _prompt_and_answer(row, layout)
        if not answer.strip():
            raise RowError("empty answer", "there is nothing to learn from it")
        if layout.chat:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            example.messages = [{"role": "system", "content": system}, *turns] if system else turns
        else:
            pieces = (whole(prompt, USER if layout.answers_only else USER | TRAINED), whole(answer, ANSWER | TRAINED))
            example.pieces = pieces if prompt else pieces[1:]
    return example


def _conversation(row: dict, format: str) -> tuple[list[dict], int]:
    """(messages, number of the first that may be trained) of a row that holds turns."""
    if format == "messages":
        return check_messages(row["messages"], "messages"), 0
    if format == "sharegpt":
        return check_turns(row["conversations"], "conversations", system=_system(row)), 0
    if format == "prompt_completion":
        prompt = check_messages(row["prompt"], "prompt", needs_answer=False)
        return prompt + check_messages(row["completion"], "completion"), len(prompt)
    if _is_sharegpt(row):
        prompt = check_turns(row["conversations"], "conversations", system=_system(row), needs_answer=False)
        answer = check_turns(_as_list(row["chosen"]), "chosen")
    else:
        prompt, answer = _prompt_and_chosen(row.get("prompt"), check_messages(_as_list(row["chosen"]), "chosen"))
    roles = [message["role"] for message in answer]
    if "assistant" not in roles or not {"assistant", "tool"}.issuperset(roles):
        raise RowError("chosen is no answer", f"roles after the prompt: {', '.join(roles) or 'none'}")
    return prompt + answer, len(prompt)


def _prompt_and_chosen(prompt: object, chosen: list[dict]) -> tuple[list[dict], list[dict]]:
    """Cut `chosen` where it repeats the prompt or, where the row has none, after its last question."""
    if prompt is None:
        cut = next((i for i in range(len(chosen), 0, -1) if chosen[i - 1]["role"] not in ("assistant", "tool")), 0)
        if cut == 0:
            raise RowError("no prompt", "the row has no prompt, and chosen is an answer alone")
        return chosen[:cut], chosen[cut:]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    prompt = check_messages(prompt, "prompt", needs_answer=False)
    return prompt, chosen[len(prompt) :] if chosen[: len(prompt)] == prompt else chosen


def _as_list(value: object) -> object:
    return [value] if isinstance(value, dict) else value


def whole(text: str, byte: int) -> Piece:
    """A piece that is all of one kind."""
    return Piece(text, [(0, len(text), byte)])


def _prompt_and_answer(row: dict, layout: Layout) -> tuple[str, str, str]:
    """(system, prompt, answer) of a row with one prompt."""
    if layout.format == "prompt_completion":
        return "", _string(row, "prompt"), _string(row, "completion")
    if layout.format == "preference":
        if row.get("prompt") is None:
            raise RowError("no prompt", "where it ends in the text of chosen cannot be known")
        return "", _string(row, "prompt"), _string(row, "chosen")
    if layout.format == "question_answer":
        system, instruction, extra, answer = "", _string(row, "question"), "", _string(row, "answer")
    else:
        system = _system(row)
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


def _tokenised(row: dict) -> tuple[list[int], list[int] | None]:
    ids, labels = row["input_ids"], row.get("labels")
    for name, value in (("input_ids", ids), ("labels", labels)):
        if value is None and name == "labels":
            continue
        if not isinstance(value, list) or not value or set(map(type, value)) != {int}:
            raise RowError("not a list of token ids", name)
    if labels is not None and len(labels) != len(ids):
        raise RowError("labels of another length", f"{len(labels)} labels for {len(ids)} input_ids")
    if labels is not None and any(label not in (-100, i) for label, i in zip(labels, ids)):
        raise RowError("labels differ from input_ids", "a label is the token's own id (unshifted) or -100")
    return ids, labels


def _string(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise RowError("not a string", f"{name} is {describe_type(row[name])}")
    return row[name]


def _system(row: dict) -> str:
    return _string(row, "system") if row.get("system") is not None else ""


def _weight(row: dict) -> float:
    weight = row["weight"]
    try:
        weight = float(weight) if isinstance(weight, str) else weight  # a CSV has it as text
    except ValueError:
        pass  # the check says that it is no number
    return check_weight(weight, "weight")
