"""The format of the rows of a source: what they look like, decided from the first one, and what is trained in them.

Nine shapes of rows are known (formats.py lists them); the first row of a source decides which one it is, and every other
row of that source must have it too. What preference rows are used for is the trainer's choice (`answers`): "chosen", their
chosen answer is trained, for SFT; "pairs", both answers to a prompt, for DPO; "labels", single answers, each good or bad,
for KTO: those of labelled rows, or both of a preference row.
"""

from dataclasses import dataclass
from difflib import get_close_matches

from minisft.data.preferences import has_transcripts, is_sharegpt
from minisft.data.rows import RowError
from minisft.errors import DATA, UserError

TEMPLATE_FIELDS = ("tools", "documents", "chat_template_kwargs")  # read where a chat template renders the row
FIELDS = {  # format -> (fields that it needs, fields that it may have); "a|b" = one of the two; the first that fits is it
    "input_ids": (("input_ids",), ("labels",)),
    "preference": (("chosen", "rejected"), ("prompt", "conversations", "system", *TEMPLATE_FIELDS)),
    "labelled": (("completion|messages|conversations", "label|kto_tag"), ("prompt", "system", *TEMPLATE_FIELDS)),
    "messages": (("messages",), TEMPLATE_FIELDS),
    "sharegpt": (("conversations",), ("system", *TEMPLATE_FIELDS)),
    "prompt_completion": (("prompt", "completion"), TEMPLATE_FIELDS),
    "instruction": (("instruction", "output|response"), ("input", "system", *TEMPLATE_FIELDS)),
    "question_answer": (("question", "answer"), TEMPLATE_FIELDS),
    "text": (("text",), ()),
}
FORMATS = ("auto", *FIELDS)
ANSWERS = {  # what preference rows are used for -> the formats that will do
    "chosen": tuple(name for name in FIELDS if name != "labelled"),
    "pairs": ("preference",),
    "labels": ("preference", "labelled"),
}
LEARNED = {"chosen": "an answer", "pairs": "two answers to a prompt", "labels": "answers that are good or bad"}
CHOICES = {
    "prompt_format": ("auto", "chat", "plain"),
    "control_tokens": ("error", "escape", "allow"),
    "reasoning": ("train", "mask", "strip"),
    "multi_turn": ("auto", "joint", "per_turn"),
    "answers": tuple(ANSWERS),
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
    answers: str = "chosen"  # of preference data: chosen (SFT) | pairs (DPO) | labels (KTO)
    turns_max_length: int | None = None  # truncation = "turns": longer conversations lose their oldest turns


@dataclass(frozen=True)
class RowFormat:
    """What was decided for a source from its first row."""

    name: str  # a key of FIELDS
    chat: bool  # rendered by the chat template
    answers_only: bool  # False = everything is trained
    turns: bool = False  # the rows hold lists of messages
    transcripts: bool = False  # or two transcripts, which become messages
    answers: str = "chosen"  # as in FormatOptions
    last_turn_only: bool = False  # of the assistant's turns only the last is trained
    weighted: bool = False  # the rows have a `weight`
    ignored: tuple[str, ...] = ()  # fields of the first row that nothing reads

    @property
    def prompt(self) -> str:
        """How a question becomes a prompt: "chat" by the template, "instruction" by `plain_prompt`, "plain" as it is."""
        return "chat" if self.chat else "instruction" if self.name in ("instruction", "question_answer") else "plain"

    def __str__(self) -> str:
        """One line for the start of a run."""
        how = "by the chat template" if self.chat else "already tokenised" if self.name == "input_ids" else "as text"
        turns = "the assistant's last turn" if self.last_turn_only else "the assistant's turns"
        preference = {
            "chosen": "the chosen answer",
            "pairs": "the chosen answer against the rejected one",
            "labels": "the chosen answer as a good one, the rejected one as a bad one",
        }
        special = {"messages": turns, "sharegpt": turns, "preference": preference[self.answers]}
        special["labelled"] = "the answer, as its label says"
        answers = special.get(self.name, "the answer")
        trained = answers if self.answers_only else "what labels say" if self.name == "input_ids" else "everything"
        ignored = f"; fields not used: {', '.join(self.ignored)}" if self.ignored else ""
        weighted = ", scaled by the field weight" if self.weighted else ""
        return f"{self.name}, {how}; trained: {trained}{weighted}{ignored}"


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


def detect_row_format(row: dict, format: str, options: FormatOptions, has_template: bool) -> RowFormat:
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
    known, for_pairs = ANSWERS[options.answers], options.answers != "chosen"
    if format not in ("auto", *known):
        raise UserError(
            f"format = {format!r}, and what is trained on is {LEARNED[options.answers]}",
            hint=f"formats that would do: {', '.join(known)}"
            + ("; labels are what loss_type = kto of trainer_type = dpo learns from" if format == "labelled" else ""),
            exit_code=DATA,
        )
    names = known if format == "auto" else [format]
    found = next((name for name in names if not _missing(row, name, options)), None)
    if format != "auto":
        check_fields(row, format, options)
    if found is None:
        wanted = "; ".join(f"{name}: {', '.join(_needs(name, options))}" for name in names)
        rename = "rename fields by field_map" + ("" if for_pairs else ", or name the text field by dataset_text_field")
        raise UserError(
            f"the fields {', '.join(row) or '(none)'} are those of no "
            + (f"format that has {LEARNED[options.answers]}" if for_pairs else "known format"),
            hint=f"{rename}. Needed: {wanted}",
            exit_code=DATA,
        )
    has_prompt = found not in ("messages", "sharegpt", "text", "input_ids")
    transcripts = options.prompt_format == "chat" or options.prompt_format == "auto" and has_template
    transcripts = transcripts and found == "preference" and has_transcripts(row)
    turns = found in ("messages", "sharegpt") or found == "prompt_completion" and isinstance(row["prompt"], list)
    turns = turns or found == "labelled" and not isinstance(row.get("completion"), str) or transcripts
    turns = turns or found == "preference" and (is_sharegpt(row) or not isinstance(row["chosen"], str))
    wants_chat = found in ("instruction", "question_answer") and options.prompt_format != "plain" and has_template
    chat = turns or wants_chat or has_prompt and options.prompt_format == "chat"
    if chat and not has_template:
        raise UserError(
            f"{found} rows need a chat template and the tokenizer has none",
            hint='set chat_template = "chatml", or to a file',
        )
    ours, other = options.completion_only_loss, options.assistant_only_loss
    if for_pairs and False in (ours, other):
        key = "completion_only_loss" if ours is False else "assistant_only_loss"
        raise UserError(f"{key} = false, but of preference data only answers are scored", hint=f"leave {key} unset")
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
    last, weighted = options.last_turn_only, "weight" in row
    ignored = _ignored(row, found, chat, turns, options)
    return RowFormat(found, chat, answers_only, turns, transcripts, options.answers, last, weighted, ignored)


def _ignored(row: dict, found: str, chat: bool, turns: bool, options: FormatOptions) -> tuple[str, ...]:
    """The fields of a row that nothing reads."""
    needs, extra = FIELDS[found]
    used = {name for field in (*needs, *extra) for name in field.split("|")} | {"weight"}
    used |= {options.dataset_text_field} if found == "text" else set()
    if not chat:
        used -= set(TEMPLATE_FIELDS)
    if found == "preference":
        used -= {"prompt"} if is_sharegpt(row) else {"conversations", "system"}
        if options.answers == "chosen" and (turns or row.get("prompt") is not None):
            used -= {"rejected"}
    if found == "labelled":  # of these the first that the row has
        if row.get("completion") is not None:
            used -= {"messages", "conversations", "system"}
        else:
            used -= {"prompt"} | ({"conversations", "system"} if row.get("messages") is not None else set())
        used -= {"kto_tag"} if row.get("label") is not None else set()
    return tuple(name for name in row if name not in used)


def _needs(name: str, options: FormatOptions) -> tuple[str, ...]:
    return (options.dataset_text_field,) if name == "text" else FIELDS[name][0]


def _missing(row: dict, name: str, options: FormatOptions) -> str:
    """The first field that the format needs and the row lacks, or nothing."""
    for needed in _needs(name, options):
        if needed not in row and not any(n in row for n in needed.split("|")):
            return needed
    return ""


def check_fields(row: dict, name: str, options: FormatOptions) -> None:
    """Raise RowError where the row lacks a field of the format."""
    if missing := _missing(row, name, options):
        raise RowError("missing field", f"{missing!r}; the row has {', '.join(row) or 'no field'}")
