"""A conversation while it is rendered: the template's input, our notes about each message, and the documents that result."""

import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

from minisft.data.chat.inference import PROBE, opens_thought, with_thought
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.rows import RowError

MAX_ROW_SECONDS = 120.0  # of the processor, for all renderings of a row

Span = tuple[int, int, int]  # first character, the one after the last, kind | TRAINED


@dataclass(frozen=True)
class Masking:
    """Which part of a conversation is trained; see the configuration's [data] section."""

    train_on: str = "assistant"  # "assistant" | "last" | "all"
    multi_turn: str = "auto"  # "auto" | "joint" | "per_turn"
    reasoning: str = "train"  # "train" | "mask" | "strip"


@dataclass(frozen=True)
class Rendered:
    """One document of a conversation."""

    text: str
    spans: list[Span]  # the first covers everything as header; later ones win
    weights: list[tuple[int, int, float]] = field(default_factory=list)  # first character, end, factor of the loss
    strategy: str = "tags"  # "tags" | "known" | "prefix" | "per_turn"
    end: int = 0  # the number of its messages
    has_untrained_greeting: bool = False  # it begins with an assistant's turn, which had to become context
    lost_reasoning: bool = False  # a trained answer has reasoning that the template does not render
    prompts: frozenset[str] = (
        frozenset()
    )  # how answers got another prompt than the default, as in "enable_thinking = false"


@dataclass(frozen=True)
class Conversation:
    """A row while it is rendered: the template's input, and our notes about each message."""

    template: ChatTemplate
    messages: list[dict]
    trained: list[bool]
    notes: list[dict]  # the keys OURS of each message
    masking: Masking
    given: dict[str, Any]  # tools, documents and variables, for render()
    markers: str

    prompts: dict[int, str]  # answers after another prompt than the default: how it was chosen. masks.py fills it in
    switch: str = ""  # the value of a switch with which all is rendered, if it is not the default
    is_strict: bool = False  # whether a prompt that ends inside a stretch of whitespace is refused
    # Turn by turn: what the first messages were rendered to, for all documents of the row; None: it is not kept.
    kept: dict[tuple, str] | None = None
    began: float = field(default_factory=time.thread_time)  # the row: turns are found by many renderings

    def render(self, stop: int | None = None, **options: Any) -> str:
        if time.thread_time() - self.began > MAX_ROW_SECONDS:
            raise RowError("too long to render", f"its turns are not found within {MAX_ROW_SECONDS:g} s")
        key = None if self.kept is None or stop is None else (stop, *sorted(options.items()))
        if self.kept is None or key is None:
            return render(self.template, self.messages[:stop], **{**self.given, **options})
        if key not in self.kept:
            self.kept[key] = render(self.template, self.messages[:stop], **{**self.given, **options})
        return self.kept[key]

    def wants(self, i: int) -> bool:
        """Whether message i is trained, or a part of it."""
        return self.trained[i] or any(on for _, _, on in self.notes[i].get("part_spans", ()))

    def only(self, i: int) -> "Conversation":
        """The row with message i as the only one that may be trained."""
        trained = [on and n == i for n, on in enumerate(self.trained)]
        return replace(self, trained=trained, notes=[note if n == i else {} for n, note in enumerate(self.notes)])

    def prompt(self, i: int, **switch: Any) -> str:
        """The text that the model is given before it writes message i. Raises RowError if that cannot be told."""
        if i > self.greeting:
            return self.render(i, add_generation_prompt=True, **switch)
        # Many templates render no prompt without a question. So the greeting's is its own text up to the end of the header.
        so_far, header = self.render(i + 1), self.header(**switch)
        at = so_far.find(header)
        if not header.strip() or at < 0:
            raise RowError("no header before the first turn", f"message {i}: {header!r} is not in {so_far[:80]!r}")
        return so_far[: at + len(header)]

    def answered(self, i: int) -> str:
        """The text up to the end of the assistant's message i, with the thought that its prompt opens. Raises RowError."""
        text = self.render(i + 1)
        if i == self.greeting or not opens_thought(self.template):
            return text
        return with_thought(self.prompt(i), text, self.messages[i])

    @property
    def greeting(self) -> int:
        """The number of the first turn if it is the assistant's, else -1."""
        first = next((i for i, m in enumerate(self.messages) if m["role"] not in ("system", "developer")), -1)
        return first if self.messages[first]["role"] == "assistant" else -1

    def header(self, **switch: Any) -> str:
        """What the template puts after a question's end and before its answer."""
        asked = replace(self, messages=PROBE[:1])
        question, prompt = asked.render(), asked.render(add_generation_prompt=True, **switch)
        at = len(os.path.commonprefix([question, prompt]))
        if question[at:] and prompt.rfind("<", 0, at) > prompt.rfind(">", 0, at):  # they part inside a special token
            at = prompt.rfind("<", 0, at)
        return prompt[at:]


def first_difference(a: str, b: str) -> int:
    """The first place at which two texts differ, by bisection: long texts are compared often."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
