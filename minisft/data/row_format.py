"""The format of a source's rows, and the options by which rows are read.

The first row of a source decides its `RowFormat` (detect_format.py); every other row of that source must fit it (formats.py).
The trainer decides the use of preference rows (`answers`): "chosen" trains their chosen answer, for SFT; "pairs" both answers
to a prompt, for DPO; "labels" single answers, each good or bad, for KTO, of which a labelled row has one and a preference row
two.

The tables of this module list the values of the options. The configuration's [data] section takes its choices from them.
"""

from dataclasses import dataclass

ANSWERS = {  # how the trainer uses rows -> what the rows must have
    "chosen": "an answer",
    "pairs": "two answers to a prompt",
    "labels": "answers that are good or bad",
}
CHOICES = {  # field of FormatOptions -> the values that it may have
    "prompt_format": ("auto", "chat", "plain"),
    "multi_turn": ("auto", "joint", "per_turn"),
    "reasoning": ("train", "mask", "strip"),
    "control_tokens": ("error", "escape", "allow"),
    "answers": tuple(ANSWERS),
}
ON_BAD_ROW = ("error", "skip")
TRUNCATIONS = ("right", "left", "turns", "drop", "error")


@dataclass(frozen=True)
class FormatOptions:
    """How rows are read; everything here is part of the cache's key."""

    dataset_text_field: str = "text"
    prompt_format: str = "auto"  # auto | chat | plain
    completion_only_loss: bool | None = None  # None = detected
    assistant_only_loss: bool | None = None  # None = detected
    response_marker: str = ""  # plain text: the text after it is trained
    instruction_marker: str = ""  # plain text: ends the trained text
    add_eos: bool = True  # plain text and prompt/completion end in EOS; conversations get it from the template
    add_special_tokens: bool = True  # outside of templates: BOS, or whatever the tokenizer adds by itself
    control_tokens: str = "error"  # a special token's text inside a content: error | escape | allow
    reasoning: str = "train"  # of assistant turns: train | mask | strip
    multi_turn: str = "auto"  # auto | joint | per_turn
    last_turn_only: bool = False  # only the last assistant turn is trained
    answers: str = "chosen"  # of preference data: chosen (SFT) | pairs (DPO) | labels (KTO)
    turns_max_length: int | None = None  # truncation = "turns": longer conversations lose their oldest turns


@dataclass(frozen=True)
class RowFormat:
    """The decisions of a source's first row."""

    name: str  # a key of formats.FORMATS
    chat: bool  # rendered by the chat template
    prompt: str  # a question becomes a prompt by the template ("chat"), by `plain_prompt` ("instruction"), or as it is ("plain")
    answers_only: bool  # False = everything is trained
    trained: str  # the trained part in words
    turns: bool = False  # the rows hold lists of messages
    transcripts: bool = False  # or two transcripts, which become messages
    answers: str = "chosen"  # as in FormatOptions
    last_turn_only: bool = False  # of the assistant's turns only the last is trained
    weighted: bool = False  # the rows have a `weight`
    ignored: tuple[str, ...] = ()  # fields of the first row that are not read

    def __str__(self) -> str:
        """One line for the start of a run."""
        how = "by the chat template" if self.chat else "already tokenised" if self.name == "input_ids" else "as text"
        ignored = f"; fields not used: {', '.join(self.ignored)}" if self.ignored else ""
        weighted = ", scaled by the field weight" if self.weighted else ""
        return f"{self.name}, {how}; trained: {self.trained}{weighted}{ignored}"
