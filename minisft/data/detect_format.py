"""The format of a source's rows, and which part of them is trained, decided from the first row.

formats.py has the table of formats. If the row and the options do not decide, it is an error, never a guess.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches

from minisft.data.formats import (
    FORMATS,
    check_fields,
    check_readable,
    fields_read,
    missing_field,
    needed_fields,
    without_nulls,
)
from minisft.data.preferences import has_transcripts
from minisft.data.prompts import PROMPT_FIELDS, SYSTEMS
from minisft.data.row_format import ANSWERS, CHOICES, FormatOptions, RowFormat
from minisft.data.rows import RowError
from minisft.errors import DATA, UserError

# ------------------------------------------------------------------------------------------------- names of fields


PICTURES = ("image", "images", "video", "videos", "audio", "audios")  # models here read text
# What an answer may have been written for. If such a column is not read, that is worth a warning.
PROMPT_COLUMNS = (
    "prompt",
    *dict.fromkeys(PROMPT_FIELDS),
    "tools",
    "functions",
    "documents",
    "chat_template_kwargs",
    *PICTURES,
)


def rename_fields(row: dict, field_map: dict[str, str], ignore: tuple[str, ...] = ()) -> dict:
    """The row with the user's field names replaced by ours and without the columns of `ignore`.

    Raises RowError if a field of field_map is absent, or ours is taken.
    """
    if ignore:
        row = {name: value for name, value in row.items() if name not in ignore}
    if not field_map:
        return row
    for theirs, ours in field_map.items():
        if theirs not in row:
            raise RowError("missing field", f"{theirs!r} (of field_map); the row has {', '.join(row) or 'no field'}")
        if row.get(ours) is not None and ours not in field_map:
            raise RowError("field_map hides a field", f"{theirs!r} becomes {ours!r}, which the row has already")
    hidden = set(field_map.values()) - field_map.keys()  # null columns of these names
    return {field_map.get(name, name): value for name, value in row.items() if name not in hidden}


def check_field_map(field_map: dict[str, str], options: FormatOptions) -> None:
    """Raise UserError if field_map names a field that no format has, or one field twice."""
    ours = {name for format in FORMATS for name in _fields(format)} | {"weight", options.dataset_text_field}
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


def _fields(format: str) -> set[str]:
    """The fields of a format, those that it needs and those that it may have."""
    return {name for field in (*FORMATS[format].needs, *FORMATS[format].may_have) for name in field.split("|")}


# ------------------------------------------------------------------------------------------------- the format


def detect_row_format(row: dict, format: str, options: FormatOptions, has_template: bool) -> RowFormat:
    """Decide the format and the trained part from a first row (fields already renamed).

    Raises UserError if no format fits or an option asks for something that the format does not have, and RowError if the row
    lacks a field of the format that the user named.
    """
    for key, choices in CHOICES.items():
        if getattr(options, key) not in choices:
            raise UserError(f"{key} = {getattr(options, key)!r}", hint=f"one of {', '.join(choices)}")
    columns, row = row, without_nulls(row)
    name = _format_of(row, format, options, columns)
    known, wants_chat = FORMATS[name], options.prompt_format == "chat"
    check_readable(row, name, has_template, False, options)
    may_be_chat = wants_chat or options.prompt_format == "auto" and has_template
    transcripts = may_be_chat and name == "preference" and has_transcripts(row)
    turns = known.has_turns(row) or transcripts
    is_question = not turns and known.is_question(row)
    has_system = not {*SYSTEMS}.isdisjoint(columns) and known.has_prompt  # also if it is null in this row
    chat = turns or known.has_prompt and wants_chat or (is_question or has_system) and may_be_chat
    if chat and not has_template:
        raise UserError(
            f"{name} rows need a chat template and the tokenizer has none",
            hint='set chat_template = "chatml", or to a file',
        )
    answers_only = _answers_only(name, turns, options)
    answer = known.answers[options.answers]
    if turns and not known.has_prompt:
        answer = "the assistant's last turn" if options.last_turn_only else "the assistant's turns"
    everything = "the tokens with a label" if name == "input_ids" else "everything"
    return RowFormat(
        name,
        chat=chat,
        prompt="chat" if chat else "instruction" if is_question else "plain",
        answers_only=answers_only,
        trained=answer if answers_only else everything,
        turns=turns,
        transcripts=transcripts,
        answers=options.answers,
        last_turn_only=options.last_turn_only,
        weighted="weight" in row,
        ignored=_ignored(columns, row, name, chat, turns, options),
    )


def _format_of(row: dict, format: str, options: FormatOptions, columns: dict) -> str:
    """The name of the row's format: the named one, or the first that fits. columns: the row with those that are null.

    Raises UserError and RowError.
    """
    if format not in ("auto", *FORMATS):
        near = get_close_matches(format, ("auto", *FORMATS), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown format {format!r}", hint=f"{hint}formats: auto, {', '.join(FORMATS)}")
    usable = [name for name in FORMATS if options.answers in FORMATS[name].answers]
    if format not in ("auto", *usable):
        raise UserError(
            f"format = {format!r}, but training needs {ANSWERS[options.answers]}",
            hint=f"usable formats: {', '.join(usable)}"
            + ("; to train on labels, set trainer_type = dpo and loss_type = kto" if format == "labelled" else ""),
            exit_code=DATA,
        )
    if format != "auto":
        check_fields(row, format, options)
        return format
    found = next((name for name in usable if not missing_field(row, name, options)), None)
    with_nulls = next((name for name in usable if not missing_field(columns, name, options)), None)
    if found is None and with_nulls is not None:  # the columns of a format, without values: a bad row, no other format
        names = missing_field(row, with_nulls, options).split("|")
        raise RowError("missing field", f"{next(name for name in names if name in columns)!r} is null")
    if found is None:
        is_sft = options.answers == "chosen"
        wanted = "; ".join(f"{name}: {', '.join(needed_fields(name, options))}" for name in usable)
        rename = "rename fields by field_map" + (", or name the text field by dataset_text_field" if is_sft else "")
        if len(row) == 1 and any(delimiter in "".join(row) for delimiter in ",;|\t"):
            rename = f"if this is a table of several columns: a .csv has commas, semicolons or tabs, a .tsv tabs. Or {rename}"
        raise UserError(
            f"the fields {', '.join(row) or '(none)'} are those of no "
            + ("known format" if is_sft else f"format with {ANSWERS[options.answers]}"),
            hint=f"{rename}. Needed: {wanted}",
            exit_code=DATA,
        )
    return found


def _answers_only(name: str, turns: bool, options: FormatOptions) -> bool:
    """Whether only answers are trained. Raises UserError if the options ask for something that the rows do not have."""
    known, asked = (
        FORMATS[name],
        {key: getattr(options, key) for key in ("completion_only_loss", "assistant_only_loss")},
    )
    if options.answers != "chosen" and False in asked.values():
        key = next(key for key in asked if asked[key] is False)
        raise UserError(f"{key} = false, but in preference data only answers are scored", hint=f"leave {key} unset")
    if known.has_prompt or turns:
        ours, other = asked.values() if known.has_prompt else reversed(asked.values())
        answers_only = (other if ours is None else ours) is not False
    else:
        answers_only = name == "text" and bool(options.response_marker)
        for key, value in asked.items():
            if value is not None and value != answers_only:
                raise UserError(
                    f"{key} = {str(value).lower()}, but {name} rows "
                    + ("name a response_marker" if answers_only else "have neither a prompt nor turns"),
                    hint=f"leave {key} unset" + ("" if answers_only else ", or name a response_marker"),
                )
    if options.last_turn_only and not (answers_only and (known.has_prompt or turns)):
        what = "everything is trained" if known.has_prompt or turns else f"{name} rows have no turns"
        raise UserError(f"last_turn_only = true, but {what}", hint="leave last_turn_only unset")
    return answers_only


def _ignored(columns: dict, row: dict, name: str, chat: bool, turns: bool, options: FormatOptions) -> tuple[str, ...]:
    """The columns that are not read. row: without those that are null."""
    used = fields_read(row, name, chat, turns, options)
    return tuple(field for field in columns if field not in used)


def unread_columns(
    row: dict, row_format: RowFormat, options: FormatOptions, template: str
) -> tuple[set[str], tuple[str, ...]]:
    """(the columns that are read, those of PROMPT_COLUMNS that nothing reads) of a row without columns that are null.

    template: the text of the chat template, which may not mention what it is given.
    """
    read = fields_read(row, row_format.name, row_format.chat, row_format.turns, options)
    omitted = {name for name in ("tools", "documents") if not re.search(rf"\b{name}\b", template)}
    read -= omitted
    return read, tuple(name for name in row if name in PROMPT_COLUMNS and name not in read)


def is_repeated(row: dict, column: str, read: set[str]) -> bool:
    """Whether the text of a column is also in one that is read, as the prompt beside the messages that begin with it."""
    text = row[column]
    return isinstance(text, str) and any(
        text.strip() in other for name in read & row.keys() for other in _strings(row[name])
    )


def _strings(value: object) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
