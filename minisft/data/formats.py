"""From a row to examples: which part is the prompt, and which part is trained.

Nine shapes of rows are known, those of the table FORMATS at the end. The first row of a source decides which one its rows
have (detect_format.py). Nothing is guessed after that: a row that does not fit is a `RowError` that names the field.

    input_ids           {"input_ids": [...], "labels": [...]?}                 labels: input_ids, or -100 = not trained
                        {..., "completion_mask"?, "assistant_masks"?}          0 = not trained
                        {..., "attention_mask"?}                               0 = padding at an end, which is left out
    preference          {"prompt"?, "chosen", "rejected"}                      strings, or messages; see preferences.py
                        {"conversations", "chosen", "rejected"}                ShareGPT turns
                        {"instruction", "input"?, "chosen", "rejected"}        the prompt in columns of its own; see prompts.py
    labelled            {"prompt", "completion", "label"}                      one answer, good (true) or bad (false)
                        {"instruction", "input"?, "output", "label"}           a question as above; or response, or answer
                        {"messages" or "conversations", "label"}               the last message is the answer
    messages            {"messages": [{"role", "content"}, ...]}               chat/conversations.py has all that is allowed
    sharegpt            {"conversations": [{"from", "value"}, ...]}
    prompt_completion   {"prompt", "completion"}                               two strings, or two lists of messages
    instruction         {"instruction", "input"?, "context"?, "history"?, "output" or "response"}
    question_answer     {"question", "input"?, "context"?, "history"?, "answer"}
    text                {"text": ...}                                          the field named by dataset_text_field

Any row may have a `weight` that scales the loss of its targets. Rows with a prompt or turns may have a `system` prompt. Rows that
a chat template renders may have `tools`, `documents` and `chat_template_kwargs`, which the template receives. A column whose
value is null counts as absent.

A prompt and its completion are two strings that are encoded separately: training sees the same ids for the prompt as
inference will, and the border between the two needs no search. A completion continues its prompt: a tokenizer that puts a space
before every text puts none before it. instruction and question_answer rows become a conversation
if the tokenizer has a chat template, else the text of `plain_prompt`; `prompt_format` ("chat", "plain") overrides that. So do
preference and labelled rows with a question in place of `prompt`. A string in `prompt` is used as it is unless prompt_format is
"chat"; beside a `system` prompt it becomes a turn too, if the tokenizer has a chat template.

Trained are the answer of rows with a prompt, the assistant's turns of conversations, and all of a plain text;
`completion_only_loss = false` or `assistant_only_loss = false` trains everything. The answer of a preference row is the
chosen one, unless the trainer asks for pairs (both answers become examples) or labels (each becomes one, good or bad).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from minisft.data.chat.conversations import (
    check_documents,
    check_messages,
    check_tools,
    check_turns,
    check_variables,
    check_weight,
    with_system,
)
from minisft.data.kinds import ANSWER, CHOSEN, REJECTED, TEXT, TRAINED, USER
from minisft.data.preferences import (
    COMPLETIONS,
    SIDES,
    check_text_answer,
    check_text_prompt,
    completion_field,
    has_prompt,
    is_sharegpt,
    label_of,
    labelled_turns,
    preference_texts,
    preference_turns,
)
from minisft.data.prompts import (
    PROMPT_FIELDS,
    QUESTIONS,
    SYSTEMS,
    Prompt,
    plain_prompt,
    prompt_of,
    question_field,
    question_of,
    string_of,
    system_of,
)
from minisft.data.row_format import FormatOptions, RowFormat
from minisft.data.rows import NotJson, RowError

TRAINED_MASKS = ("completion_mask", "assistant_masks")  # of tokens, as TRL writes them: 0 = not trained
TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")  # read where a chat template renders the row


@dataclass(slots=True)  # not frozen, like all classes of a single row: that would cost 0.1 us a field
class Piece:
    """A string that is encoded by itself. Spans are (char start, char end, kind | TRAINED); later ones win."""

    text: str
    spans: list[tuple[int, int, int]]
    weights: list[tuple[int, int, float]] = field(default_factory=list)  # (char start, char end, factor of the loss)
    literal: list[tuple[int, int]] = field(default_factory=list)  # text of special tokens to encode as ordinary text
    continues: bool = False  # it continues the piece before it: no space is put in front (encoding.py)


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
    role: int | None = None  # CHOSEN or REJECTED in pairs and labels


@dataclass(frozen=True)
class Format:
    """One shape of rows: its fields, and the function that reads it. Functions without a RowFormat get the first row."""

    needs: tuple[str, ...]  # fields that a row must have; "a|b" = one of the two
    may_have: tuple[str, ...]  # other fields that are read
    read: Callable[[dict, RowFormat, FormatOptions], list[Example]]
    has_turns: Callable[[dict], bool] = lambda row: False  # whether the row holds messages
    has_prompt: bool = True  # besides the turns
    # Whether a row's prompt is a bare question, which the chat template or `plain_prompt` wraps.
    is_question: Callable[[dict], bool] = lambda row: False
    # Key of row_format.ANSWERS -> the trained part in words. The rows cannot be used in the ways of the other keys.
    answers: dict[str, str] = field(default_factory=lambda: {"chosen": "the answer"})
    # (row, row_format.turns, row_format.answers) -> fields among needs and may_have that are not read in such rows
    unread: Callable[[dict, bool, str], set[str]] = lambda row, turns, answers: set()


# ------------------------------------------------------------------------------------------------- one row


def to_example(row: dict, row_format: RowFormat, options: FormatOptions) -> Example:
    """The first example of a row, which for a preference row has the chosen answer. Raises RowError."""
    return to_examples(row, row_format, options)[0]


def to_examples(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    """The examples of a row (fields already renamed): one, or for pairs the chosen and then the rejected one. Raises RowError."""
    row = without_nulls(row)
    check_fields(row, row_format.name, options)
    check_readable(row, row_format.name, row_format.chat, row_format.turns, options)
    tools = documents = variables = None
    try:
        weight = _weight(row) if "weight" in row else 1.0
        if row_format.chat:
            tools = check_tools(row.get("tools"))
            documents = check_documents(row.get("documents"))
            variables = check_variables(row.get("chat_template_kwargs"))
    except RowError as error:
        hint = "if the column means something else, leave it out by `ignore` of the source"
        raise RowError(error.reason, f"{error.detail}; {hint}") from None
    examples = FORMATS[row_format.name].read(row, row_format, options)
    for example in examples:
        example.weight, example.tools, example.documents, example.variables = weight, tools, documents, variables
    return examples


def without_nulls(row: dict) -> dict:
    """The row without the columns that are null, such as those that another of two joined data sets has."""
    return {name: value for name, value in row.items() if value is not None} if None in row.values() else row


def check_fields(row: dict, name: str, options: FormatOptions) -> None:
    """Raise RowError if the row lacks a field of the format."""
    if missing := missing_field(row, name, options):
        raise RowError("missing field", f"{missing!r}; the row has {', '.join(row) or 'no field'}")


def fields_read(row: dict, name: str, chat: bool, turns: bool, options: FormatOptions) -> set[str]:
    """The fields that are read in such a row."""
    known = FORMATS[name]
    fields = {name for field in (*known.needs, *known.may_have) for name in field.split("|")} | {"weight"}
    fields |= {options.dataset_text_field} if name == "text" else set()
    return fields - known.unread(row, turns, options.answers) - (set() if chat else {*TEMPLATE_FIELDS})


def check_readable(row: dict, name: str, chat: bool, turns: bool, options: FormatOptions) -> None:
    """Raise RowError if a field that is read has no JSON form, which only a Parquet file can hold."""
    if NotJson not in map(type, row.values()):
        return
    for column in row.keys() & fields_read(row, name, chat, turns, options):
        if isinstance(row[column], NotJson):
            raise RowError("not a JSON value", f"column {column!r}: {row[column].why}")


def missing_field(row: dict, name: str, options: FormatOptions) -> str:
    """The first field that the format needs and the row lacks, or ""."""
    for needed in needed_fields(name, options):
        if needed not in row and not any(n in row for n in needed.split("|")):
            return needed
    return ""


def needed_fields(name: str, options: FormatOptions) -> tuple[str, ...]:
    return (options.dataset_text_field,) if name == "text" else FORMATS[name].needs


def _weight(row: dict) -> float:
    weight = row["weight"]
    try:
        weight = float(weight) if isinstance(weight, str) else weight  # a CSV has it as text
    except ValueError:
        pass  # check_weight refuses it
    return check_weight(weight, "weight")


# ------------------------------------------------------------------------------------------------- a prompt and an answer


def _read_prompt_completion(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    if row_format.turns:
        prompt = check_messages(row["prompt"], "prompt", needs_answer=False)
        prompt = with_system(prompt, system_of(row), "prompt")
        return [_of_messages(prompt, check_messages(row["completion"], "completion"))]
    prompt = Prompt(string_of(row, "prompt"), system=system_of(row))
    return [_single(prompt, string_of(row, "completion"), row_format)]


def _read_question_answer(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    return [_asked(question_of(row, "question"), string_of(row, "answer"), row_format)]


def _read_instruction(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    answer = string_of(row, "output" if "output" in row else "response")
    return [_asked(question_of(row, "instruction"), answer, row_format)]


def _asked(question: Prompt, answer: str, row_format: RowFormat) -> Example:
    if question.is_empty:
        raise RowError("empty prompt")
    return _single(question, answer, row_format)


def _single(prompt: Prompt, answer: str, row_format: RowFormat) -> Example:
    """The example of a prompt and its answer. Raises RowError if the answer is empty."""
    check_text_answer("the answer", answer)
    return _of_texts(prompt, answer, row_format)


def _of_messages(prompt: list[dict], answer: list[dict]) -> Example:
    return Example(messages=prompt + answer, first_trained=len(prompt))


def _of_texts(prompt: Prompt, answer: str, row_format: RowFormat) -> Example:
    if row_format.chat:
        turns = prompt.messages()
        first_trained = len(turns) if prompt.history else 0  # the answers of the history are context
        return Example(messages=[*turns, {"role": "assistant", "content": answer}], first_trained=first_trained)
    if row_format.prompt == "instruction":
        text = plain_prompt(prompt.text, prompt.extra, prompt.system, prompt.history)
    else:
        text = prompt.plain()
    pieces = (whole(text, USER if row_format.answers_only else USER | TRAINED), whole(answer, ANSWER | TRAINED))
    return Example(pieces if text else pieces[1:])


def whole(text: str, byte: int) -> Piece:
    """A piece that is all of one kind."""
    return Piece(text, [(0, len(text), byte)])


# ------------------------------------------------------------------------------------------------- preference data


def _read_preference(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    sides, roles = (SIDES[:1], (None,)) if row_format.answers == "chosen" else (SIDES, (CHOSEN, REJECTED))
    if row_format.turns:
        prompt, answers = preference_turns(row, sides, transcripts=row_format.transcripts)
        examples = [_of_messages(prompt, answer) for answer in answers]
    else:
        prompt, answers = preference_texts(row, sides)
        if row_format.chat and not has_prompt(row):  # the space between prompt and answer belonged to neither
            answers = [answer.lstrip() for answer in answers]
        examples = [_of_texts(prompt, answer, row_format) for answer in answers]
    for example, role in zip(examples, roles):
        example.role = role
    return examples


def _read_labelled(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    role = CHOSEN if label_of(row) else REJECTED
    if row_format.turns:
        example = _of_messages(*labelled_turns(row))
    else:
        prompt, column = prompt_of(row), completion_field(row) or "completion"
        answer = string_of(row, column)
        if prompt is None:
            raise RowError("no prompt", f"the row has {', '.join(row)}")
        check_text_prompt(prompt)
        check_text_answer(column, answer)
        example = _of_texts(prompt, answer, row_format)
    example.role = role
    return [example]


def _unread_of_preference(row: dict, turns: bool, answers: str) -> set[str]:
    if is_sharegpt(row):
        unread = {"prompt", *PROMPT_FIELDS} - {*SYSTEMS}
    else:
        unread = {"conversations"} | _unread_of_prompt(row)
    return unread | {"rejected"} if answers == "chosen" and (turns or has_prompt(row)) else unread


def _unread_of_prompt(row: dict) -> set[str]:
    """The columns of a prompt that `prompt_of` does not read."""
    if row.get("prompt") is not None:
        return {*PROMPT_FIELDS} - {*SYSTEMS}
    head = question_field(row)
    return {*QUESTIONS, "prompt"} - {head, "input"} | ({"context", "history"} if head is None else set())


def _unread_of_labelled(row: dict, turns: bool, answers: str) -> set[str]:
    """The columns of a labelled row that are not read: all answers but one, and what would be a second form of the row."""
    column = completion_field(row)
    unread = {*COMPLETIONS} - {column}
    if column is not None:
        unread |= {"messages", "conversations"} | _unread_of_prompt(row)
    else:
        unread |= {"prompt", *PROMPT_FIELDS} - {*SYSTEMS}
        unread |= {"conversations"} if row.get("messages") is not None else set()
    return unread | {"kto_tag"} if row.get("label") is not None else unread


# ------------------------------------------------------------------------------------------------- no prompt of its own


def _read_messages(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    return [Example(messages=with_system(check_messages(row["messages"], "messages"), system_of(row), "messages"))]


def _read_sharegpt(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    return [Example(messages=check_turns(row["conversations"], "conversations", system=system_of(row)))]


def _read_text(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    text = string_of(row, options.dataset_text_field)
    if not text.strip():
        raise RowError("empty text")
    if not options.response_marker:
        return [Example((whole(text, TEXT | TRAINED),))]
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
    return [Example((Piece(text, [(0, len(text), TEXT), *spans]),))]


def _read_input_ids(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
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
    for name in TRAINED_MASKS:
        if (mask := _mask(row, name, len(ids))) is not None:
            labels = [label if on else -100 for label, on in zip(ids if labels is None else labels, mask)]
    if (mask := _mask(row, "attention_mask", len(ids))) is not None and not all(mask):
        first, last = (mask.index(1), len(mask) - mask[::-1].index(1)) if any(mask) else (0, 0)
        if not all(mask[first:last]) or first == last:
            raise RowError("attention_mask is not that of padding", "it is 0 in the middle, or everywhere")
        ids, labels = ids[first:last], labels and labels[first:last]
    return [Example(ids=ids, labels=labels)]


def _mask(row: dict, name: str, length: int) -> list[int] | None:
    """A column that has 0 or 1 for each token, None if it is absent. Raises RowError."""
    mask = row.get(name)
    if mask is None:
        return None
    if not isinstance(mask, list) or any(not isinstance(on, int) or on not in (0, 1) for on in mask):
        raise RowError("not a list of 0 and 1", name)
    if len(mask) != length:
        raise RowError(f"{name} of another length", f"{len(mask)} values for {length} input_ids")
    return [int(on) for on in mask]


# ------------------------------------------------------------------------------------------------- the table

# Name -> format. The first one whose needed fields a row has is its format.
FORMATS = {
    "input_ids": Format(
        ("input_ids",), ("labels", "attention_mask", *TRAINED_MASKS), _read_input_ids, has_prompt=False
    ),
    "preference": Format(
        ("chosen", "rejected"),
        ("prompt", "conversations", *PROMPT_FIELDS, *TEMPLATE_FIELDS),
        _read_preference,
        has_turns=lambda row: is_sharegpt(row) or not isinstance(row["chosen"], str),
        is_question=lambda row: row.get("prompt") is None and question_field(row) is not None,
        answers={
            "chosen": "the chosen answer",
            "pairs": "the chosen answer against the rejected one",
            "labels": "the chosen answer as a good one, the rejected one as a bad one",
        },
        unread=_unread_of_preference,
    ),
    "labelled": Format(
        ("|".join(("completion", "messages", "conversations", *COMPLETIONS)), "label|kto_tag"),
        ("prompt", *PROMPT_FIELDS, *TEMPLATE_FIELDS),
        _read_labelled,
        has_turns=lambda row: not isinstance(row.get(completion_field(row) or ""), str),
        is_question=lambda row: row.get("prompt") is None and question_field(row) is not None,
        answers={"labels": "the answer, as its label says"},
        unread=_unread_of_labelled,
    ),
    "messages": Format(
        ("messages",),
        (*SYSTEMS, *TEMPLATE_FIELDS),
        _read_messages,
        has_turns=lambda row: True,
        has_prompt=False,
    ),
    "sharegpt": Format(
        ("conversations",),
        (*SYSTEMS, *TEMPLATE_FIELDS),
        _read_sharegpt,
        has_turns=lambda row: True,
        has_prompt=False,
    ),
    "prompt_completion": Format(
        ("prompt", "completion"),
        (*SYSTEMS, *TEMPLATE_FIELDS),
        _read_prompt_completion,
        has_turns=lambda row: isinstance(row["prompt"], list),
    ),
    "instruction": Format(
        ("instruction", "output|response"),
        ("input", "context", "history", *SYSTEMS, *TEMPLATE_FIELDS),
        _read_instruction,
        is_question=lambda row: True,
    ),
    "question_answer": Format(
        ("question", "answer"),
        ("input", "context", "history", *SYSTEMS, *TEMPLATE_FIELDS),
        _read_question_answer,
        is_question=lambda row: True,
    ),
    "text": Format(("text",), (), _read_text, has_prompt=False),
}
