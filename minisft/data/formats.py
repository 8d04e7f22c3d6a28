"""From a row to examples: what is the prompt, what is trained.

Nine shapes of rows are known. Which one the rows of a source have is decided by its first row (row_format.py). Nothing is
guessed after that: a row that does not fit is a `RowError` that names the field.

    input_ids           {"input_ids": [...], "labels": [...]?}                 labels: input_ids, or -100 = not trained
    preference          {"prompt"?, "chosen", "rejected"}                      strings, or messages; see preferences.py
                        {"conversations", "chosen", "rejected"}                ShareGPT turns
    labelled            {"prompt", "completion", "label"}                      one answer, good (true) or bad (false)
                        {"messages" or "conversations", "label"}               the last message is the answer
    messages            {"messages": [{"role", "content"}, ...]}               chat/conversations.py has all that is allowed
    sharegpt            {"conversations": [{"from", "value"}, ...], "system"?}
    prompt_completion   {"prompt", "completion"}                               two strings, or two lists of messages
    instruction         {"instruction", "input"?, "output" or "response", "system"?}
    question_answer     {"question", "answer"}
    text                {"text": ...}                                          the field named by dataset_text_field

Any row may have a `weight` that scales its targets. Rows that a chat template renders may have `tools`, `documents` and
`chat_template_kwargs`, which are given to it.

A prompt and its completion are two strings that are encoded apart, so that training sees for the prompt exactly the ids
that inference will produce for it alone, and the border between them needs no search. instruction and question_answer
become a conversation where the tokenizer has a chat template and the plain text below where it has none;
`prompt_format` ("chat", "plain") overrides that. The strings of prompt_completion and preference rows are used as they
are unless prompt_format is "chat".

What is trained: the answer of rows with a prompt, the assistant's turns of conversations, everything of plain text;
`completion_only_loss = false` or `assistant_only_loss = false` trains everything. Of a preference row the chosen answer
is the answer, unless the trainer asks for pairs (both answers are examples) or labels (each answer is one, good or bad).
"""

import re
from dataclasses import dataclass, field, replace

from minisft.data.batch import ANSWER, CHOSEN, REJECTED, TEXT, TRAINED, USER
from minisft.data.chat.conversations import (
    check_documents,
    check_messages,
    check_tools,
    check_turns,
    check_variables,
    check_weight,
)
from minisft.data.preferences import (
    SIDES,
    check_text_answer,
    check_text_prompt,
    label_of,
    labelled_turns,
    preference_texts,
    preference_turns,
    string_of,
    system_of,
)
from minisft.data.row_format import FormatOptions, RowFormat, check_fields
from minisft.data.rows import RowError


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
    role: int | None = None  # of pairs and labels: CHOSEN | REJECTED


# ------------------------------------------------------------------------------------------------- one row


def to_example(row: dict, row_format: RowFormat, options: FormatOptions) -> Example:
    """One row as an example: of a preference row its chosen answer. Raises RowError."""
    return to_examples(row, row_format, options)[0]


def to_examples(row: dict, row_format: RowFormat, options: FormatOptions) -> list[Example]:
    """One row (fields already renamed) as its examples: one, or of pairs the chosen, then the rejected one.

    Raises RowError.
    """
    check_fields(row, row_format.name, options)
    example = Example(weight=_weight(row) if "weight" in row else 1.0)
    if row_format.chat:
        example.tools = check_tools(row.get("tools"))
        example.documents = check_documents(row.get("documents"))
        example.variables = check_variables(row.get("chat_template_kwargs"))
    if row_format.name in ("preference", "labelled"):
        prompt, answers, roles = _answers(row, row_format)
        examples = [replace(example, role=role) for role in roles]
        for example, answer in zip(examples, answers):
            _fill(example, "", prompt, answer, row_format)
        return examples
    if row_format.turns:
        example.messages, example.first_trained = _conversation(row, row_format.name)
    elif row_format.name == "input_ids":
        example.ids, example.labels = _tokenised(row)
    elif row_format.name == "text":
        example.pieces = (_text(row, options),)
    else:
        system, prompt, answer = _prompt_and_answer(row, row_format)
        check_text_answer("the answer", answer)
        _fill(example, system, prompt, answer, row_format)
    return [example]


def _fill(example: Example, system: str, prompt: str | list, answer: str | list, row_format: RowFormat) -> None:
    """Set the messages or pieces of an example from its prompt and answer, both strings or both messages."""
    if row_format.turns:
        example.messages, example.first_trained = prompt + answer, len(prompt)
    elif row_format.chat:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        example.messages = [{"role": "system", "content": system}, *turns] if system else turns
    else:
        pieces = (whole(prompt, USER if row_format.answers_only else USER | TRAINED), whole(answer, ANSWER | TRAINED))
        example.pieces = pieces if prompt else pieces[1:]


def _answers(row: dict, row_format: RowFormat) -> tuple[str | list, list[str] | list[list], tuple[int | None, ...]]:
    """(prompt, answers, their roles) of a preference or labelled row."""
    if row_format.name == "labelled":
        role = CHOSEN if label_of(row) else REJECTED
        if row_format.turns:
            prompt, answer = labelled_turns(row)
        else:
            prompt, answer = string_of(row, "prompt"), string_of(row, "completion")
            check_text_prompt(prompt)
            check_text_answer("completion", answer)
        return prompt, [answer], (role,)
    sides, roles = (SIDES[:1], (None,)) if row_format.answers == "chosen" else (SIDES, (CHOSEN, REJECTED))
    if row_format.turns:
        return *preference_turns(row, sides, transcripts=row_format.transcripts), roles
    prompt, answers = preference_texts(row, sides)
    if row_format.chat and row.get("prompt") is None:  # the space between them was neither's
        answers = [answer.lstrip() for answer in answers]
    return prompt, answers, roles


def _conversation(row: dict, format: str) -> tuple[list[dict], int]:
    """(messages, number of the first that may be trained) of a row that holds turns."""
    if format == "messages":
        return check_messages(row["messages"], "messages"), 0
    if format == "sharegpt":
        return check_turns(row["conversations"], "conversations", system=system_of(row)), 0
    prompt = check_messages(row["prompt"], "prompt", needs_answer=False)
    return prompt + check_messages(row["completion"], "completion"), len(prompt)


def whole(text: str, byte: int) -> Piece:
    """A piece that is all of one kind."""
    return Piece(text, [(0, len(text), byte)])


def _prompt_and_answer(row: dict, row_format: RowFormat) -> tuple[str, str, str]:
    """(system, prompt, answer) of a row with one prompt."""
    if row_format.name == "prompt_completion":
        return "", string_of(row, "prompt"), string_of(row, "completion")
    if row_format.name == "question_answer":
        system, instruction, extra, answer = "", string_of(row, "question"), "", string_of(row, "answer")
    else:
        system = system_of(row)
        extra = string_of(row, "input") if row.get("input") is not None else ""
        instruction = string_of(row, "instruction")
        answer = string_of(row, "output" if "output" in row else "response")
    if not instruction.strip() and not extra.strip():
        raise RowError("empty prompt")
    if row_format.chat:
        return system, f"{instruction}\n\n{extra}" if extra.strip() else instruction, answer
    return "", plain_prompt(instruction, extra, system), answer


def plain_prompt(instruction: str, input: str = "", system: str = "") -> str:
    """The text of a prompt for a tokenizer without a chat template; the answer follows its last newline."""
    system = f"{system}\n\n" if system.strip() else ""
    input = f"### Input:\n{input}\n\n" if input.strip() else ""
    return f"{system}### Instruction:\n{instruction}\n\n{input}### Response:\n"


def _text(row: dict, options: FormatOptions) -> Piece:
    text = string_of(row, options.dataset_text_field)
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


def _weight(row: dict) -> float:
    weight = row["weight"]
    try:
        weight = float(weight) if isinstance(weight, str) else weight  # a CSV has it as text
    except ValueError:
        pass  # the check says that it is no number
    return check_weight(weight, "weight")
