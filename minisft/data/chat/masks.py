"""Masks: what each character of a rendered conversation is, and whether it is trained.

The places of the assistant's turns in the text are found in one of four ways. If none works it is an error, never a guess.

A. "tags": the template marks the turns, without their headers, by `{% generation %} ... {% endgeneration %}`. To record the
   output position while rendering, as transformers does, goes wrong inside a macro, a `{% set %}` block or a filter block,
   whose output is buffered and placed later. Here the tag puts a private-use character before and after its text. These are
   found in the output and removed, and the remaining text must equal a rendering without them.
B. "known": the template is a stock one without tags, known by its sha256, for which we have a tagged twin
   (training_templates.py). Both are rendered, and the twin is used only if they give the same text.
C. "prefix": let h be the messages before an assistant turn a. Then the turn is the text that render(h + [a]) adds to
   render(h, add_generation_prompt=True), provided that each of these is a prefix of the next and of the whole. This is
   checked for every trained turn of every row (a third of the stock templates fail somewhere).
D. "per_turn": each trained turn gets a document of its own, which ends with it. It is rendered exactly as at inference, so
   it is right by construction for templates that render a turn differently once others follow (Qwen 3 drops earlier
   reasoning). The price: each document repeats the earlier messages as context.

`multi_turn = "auto"` uses A, B or C if, in the whole conversation rendered at once, the text before each trained turn is
exactly the prompt that inference would give; otherwise D. "joint" refuses such rows instead of using D (and trusts the tags
of a template that has them). "per_turn" always uses D.

The places of the other contents are found by private-use characters around the contents themselves. If a template inspects a
content and therefore renders it differently, only this detail is lost.

A conversation may begin with the assistant. There is no prompt before this greeting, so its span begins after the header that the
template puts before an answer to a question. If the header is not found, the greeting is context.

A turn's span begins after the header ("<|im_start|>assistant\n" is given at inference, so it is not trained) and ends
after the terminator, which must be trained or the model never stops: template_check.py refuses a template that fails.
"""

import json
import os
import re
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import Any

from minisft.data.chat.template import REFUSED, ChatTemplate, render
from minisft.data.chat.training_templates import CHATML, tagged_twin
from minisft.data.kinds import ANSWER, HEADER, KIND_MASK, REASONING, SYSTEM, TERMINATOR, TOOL, TOOL_CALL, TRAINED, USER
from minisft.data.rows import RowError

# Markers are private-use characters of the last plane that the row does not contain. The first two are around the text of
# {% generation %}, the third closes the content of a message, the others open those of messages 0, 1, ...
MARKERS = range(0x100000, 0x10FFFE)
MARKER = re.compile(f"[{chr(MARKERS.start)}-{chr(MARKERS.stop)}]")
START, END, CLOSE, OPEN = range(4)
KIND_OF_ROLE = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "tool": TOOL, "assistant": ANSWER}
THINKING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
TAG = re.compile(r"\{%[-+]?\s*generation\b")
PROBE = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]
OURS = ("train", "weight", "part_spans")  # keys of a message that the template does not get

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


@dataclass(frozen=True)
class _Conversation:
    """A row while it is rendered: the template's input, and our notes about each message."""

    template: ChatTemplate
    messages: list[dict]
    trained: list[bool]
    notes: list[dict]  # the keys OURS of each message
    masking: Masking
    given: dict[str, Any]  # tools, documents and variables, for render()
    markers: str

    def render(self, stop: int | None = None, **options: Any) -> str:
        return render(self.template, self.messages[:stop], **self.given, **options)

    def prompt(self, i: int) -> str:
        """The text that the model is given before it writes message i. Raises RowError if that cannot be told."""
        if i > self.greeting:
            return self.render(i, add_generation_prompt=True)
        # Many templates render no prompt without a question. So the greeting's is its own text up to the end of the header.
        so_far, header = self.render(i + 1), self.header()
        at = so_far.find(header)
        if not header.strip() or at < 0:
            raise RowError("no header before the first turn", f"message {i}: {header!r} is not in {so_far[:80]!r}")
        return so_far[: at + len(header)]

    @property
    def greeting(self) -> int:
        """The number of the first turn if it is the assistant's, else -1."""
        first = next((i for i, m in enumerate(self.messages) if m["role"] not in ("system", "developer")), -1)
        return first if self.messages[first]["role"] == "assistant" else -1

    def header(self) -> str:
        """What the template puts after a question's end and before its answer."""
        asked = replace(self, messages=PROBE[:1])
        question, prompt = asked.render(), asked.render(add_generation_prompt=True)
        at = len(os.path.commonprefix([question, prompt]))
        if question[at:] and prompt.rfind("<", 0, at) > prompt.rfind(">", 0, at):  # they part inside a special token
            at = prompt.rfind("<", 0, at)
        return prompt[at:]


def render_conversation(
    template: ChatTemplate,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    masking: Masking = Masking(),
    first_trained: int = 0,
    variables: dict | None = None,
) -> list[Rendered]:
    """The documents of a conversation: one, or several if it is rendered turn by turn.

    messages: as check_messages of conversations.py returns them. first_trained: assistant turns before this message are
    context. A message's `train` overrides all rules; its `weight` is a factor on the loss of its trained text.
    Raises RowError if the template refuses the conversation or the turns cannot be found exactly.
    """
    taken = ""
    if tools or documents or variables or not all(map(_is_unmarked, messages)):
        text = json.dumps([messages, tools, documents, variables, template.text], ensure_ascii=False)
        taken = "".join(sorted(set(MARKER.findall(text))))
    markers = markers_for(len(messages), taken)
    notes = [{key: message[key] for key in OURS if key in message} for message in messages]
    plain = [{k: v for k, v in m.items() if k not in OURS} if note else m for m, note in zip(messages, notes)]
    if masking.reasoning == "strip":
        plain = [_without_reasoning(message, note) for message, note in zip(plain, notes)]
    answers = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
    rule = {"all": range(len(plain)), "last": answers[-1:], "assistant": [i for i in answers if i >= first_trained]}
    trained = [note.get("train", i in rule[masking.train_on]) for i, note in enumerate(notes)]
    given = {"tools": tools, "documents": documents, **(variables or {})}
    row = _Conversation(template, plain, trained, notes, masking, given, markers)
    if masking.train_on == "all":
        return [_everything(row)]
    untrained = row.greeting >= 0 and trained[row.greeting] and not _has_prompt(row, row.greeting)
    if untrained:
        trained[row.greeting] = False
    try:
        found = _documents(row)
    except RowError as error:
        if row.greeting >= 0 and error.reason == REFUSED:
            raise RowError(f"{REFUSED} that begins with the assistant", error.detail) from None
        raise
    return [replace(document, has_untrained_greeting=True) for document in found] if untrained else found


def _documents(row: _Conversation) -> list[Rendered]:
    if row.masking.multi_turn == "per_turn":
        return _per_turn(row)
    try:
        return [_joint(row)]
    except RowError:
        answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if row.masking.multi_turn == "joint" or not any(row.trained[i] for i in answers):
            raise
    return _per_turn(row)


def _has_prompt(row: _Conversation, i: int) -> bool:
    """Whether the text before a turn can be told. Raises RowError if it cannot and the row wants the turn trained."""
    try:
        _turn(row, row.render(i + 1), i)
    except RowError as error:
        if row.notes[i].get("train"):
            raise RowError("the first turn cannot be trained", str(error)) from None
        return False
    return True


@lru_cache(maxsize=256)
def markers_for(num_messages: int, taken: str) -> str:
    """The markers of a row with so many messages: characters that are not in `taken`. Raises RowError if there are too few."""
    free = (chr(c) for c in MARKERS if chr(c) not in taken)
    markers = "".join(islice(free, OPEN + num_messages))
    if len(markers) < OPEN + num_messages:
        raise RowError("too many messages", f"{num_messages:,}: no private-use character is left to mark them")
    return markers


def _is_unmarked(message: dict) -> bool:
    """Whether a message is only a role and a content without private characters, as nearly all are."""
    content = message["content"]
    return len(message) == 2 and (content.isascii() or not MARKER.search(content))


def _without_reasoning(message: dict, note: dict) -> dict:
    if message["role"] != "assistant":
        return message
    message = {key: value for key, value in message.items() if key != "reasoning_content"}
    content = THINKING.sub("", message["content"])
    if content != message["content"] and "part_spans" in note:
        raise RowError(
            "reasoning inside a content with parts", "give it as reasoning_content, so that it can be removed"
        )
    return {**message, "content": content}


# ------------------------------------------------------------------------------------------------- the whole conversation at once


def _joint(row: _Conversation) -> Rendered:
    """A, B or C. Raises RowError if none is exact."""
    answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    text, turns, contents, strategy = None, [], {}, "prefix"
    twin = tagged_twin(row.template.text)
    if TAG.search(row.template.text) and not _tags_hold_header(row.template):
        text, turns, contents = _marked(row)
        strategy = "tags"
    elif twin is not None:
        try:
            text, turns, contents = _marked(replace(row, template=replace(row.template, text=twin)), plain=row.render())
            strategy = "known"
        except RowError:
            text, turns = None, []
    if text is None or not turns and answers:
        text, _, contents = _marked(row)
        turns, strategy = _turns_by_prefix(row, text, answers), "prefix"
    if len(turns) != len(answers):
        raise RowError("the chat template lost a turn", f"{len(turns)} of {len(answers)} assistant turns were found")
    is_checked = strategy == "prefix" or strategy == "tags" and row.masking.multi_turn == "joint"
    if not is_checked and row.template.text != CHATML:
        for i, turn in zip(answers, turns):
            if row.trained[i] and i < len(row.messages) - 1:  # the last turn has nothing after it that could change it
                _turn(row, text, i, turn)
    return _spans(row, text, dict(zip(answers, turns)), contents, strategy)


@lru_cache(maxsize=32)
def _tags_hold_header(template: ChatTemplate) -> bool:
    """Whether the tags include the header, as SmolLM3's do. Turns are then found by prefix instead."""
    row = _Conversation(template, PROBE, [False, False], [{}, {}], Masking(), {}, markers_for(len(PROBE), ""))
    try:
        text, turns, _ = _marked(row)
        prompt = row.prompt(1)
    except RowError:
        return False  # template_check.py reports whatever it is
    return bool(turns) and text.startswith(prompt) and turns[-1][0] < len(prompt)


def _marked(row: _Conversation, plain: str | None = None) -> tuple[str, list, dict]:
    """(text, tagged turns, {message: span of its content}), found by markers. plain: the text that must result."""
    marked = [_mark_content(row.markers, i, message) for i, message in enumerate(row.messages)]
    tags: dict[str, Any] = {"_minisft_start": row.markers[START], "_minisft_end": row.markers[END]}
    text, turns, contents = _read_markers(row.markers, replace(row, messages=marked).render(**tags))
    if row.template.text == CHATML:  # our own template inspects no content, so marks change nothing
        return text, turns, contents
    plain = row.render() if plain is None else plain
    if text != plain:  # the template inspected a content: render again without marks in contents
        text, turns, contents = _read_markers(row.markers, row.render(**tags))
        if text != plain:
            raise RowError("the chat template reads the text of its generation tags", "their place cannot be found")
    return text, turns, contents


def _mark_content(markers: str, i: int, message: dict) -> dict:
    """The message with markers around its content, inside the outer whitespace, which many templates strip. An assistant's
    content gets none: its place is known, and templates search it for reasoning."""
    content = message["content"]
    inner = content.strip()
    if message["role"] == "assistant" or not inner:
        return message
    start = content.index(inner)
    marked = markers[OPEN + i] + inner + markers[CLOSE]
    return {**message, "content": content[:start] + marked + content[start + len(inner) :]}


def _read_markers(markers: str, marked: str) -> tuple[str, list[tuple[int, int]], dict[int, tuple[int, int]]]:
    pieces = re.split(f"([{markers}])", marked)  # text, marker, text, marker, ... text
    turns, contents, at, turn_start, opened = [], {}, 0, 0, None
    for text, marker in zip(pieces[::2], [*pieces[1::2], ""]):
        at += len(text)
        if marker == markers[START]:
            turn_start = at
        elif marker == markers[END]:
            turns.append((turn_start, at))
        elif marker == markers[CLOSE]:
            if opened is not None:
                contents[opened[0]] = (opened[1], at)
            opened = None
        elif marker:
            opened = markers.index(marker) - OPEN, at
    return "".join(pieces[::2]), [turn for turn in turns if turn[1] > turn[0]], contents


def _turns_by_prefix(row: _Conversation, text: str, answers: list[int]) -> list[tuple[int, int]]:
    """C. Turns that are context need not be found, because only their kind depends on it."""
    turns = []
    for i in answers:
        try:
            turns.append(_turn(row, text, i))
        except RowError:
            if row.trained[i]:
                raise
            turns.append((0, 0))
    return turns


def _turn(row: _Conversation, text: str, i: int, found: tuple[int, int] | None = None) -> tuple[int, int]:
    """The span of assistant turn i in `text`. found: the span that tags gave.

    Raises RowError unless the text before the turn is the prompt that inference gives, and the turn is the text that the
    template renders after that prompt, or a part of it that the tags enclose.
    """
    prompt, so_far = row.prompt(i), row.render(i + 1)
    if found is not None and found[0] < len(prompt):
        raise RowError("the generation tags hold more than the answer", f"message {i}: {text[slice(*found)]!r}")
    turn = so_far if found is None else text[: found[1]]
    pairs = ((prompt, so_far, "before its answer"), (prompt, text, "before its answer"))
    pairs += ((turn, text, "once other turns follow") if found is None else (turn, so_far, "once other turns follow"),)
    for ours, theirs, what in pairs:
        if not theirs.startswith(ours):
            at = next((n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            raise RowError(
                "the chat template renders a turn differently than at inference",
                f"message {i} {what}: {ours[at : at + 40]!r} becomes {theirs[at : at + 40]!r}",
            )
    # "<|im_end|>\n": generation ends at the token, nobody samples the newline after it.
    end = len(so_far.rstrip()) if so_far[len(prompt) :].strip() else len(so_far)
    return found or (len(prompt), end)


# ------------------------------------------------------------------------------------------------- turn by turn


def _per_turn(row: _Conversation) -> list[Rendered]:
    """D. All turns of a document but the last are context."""
    if not any(row.trained):  # one document of context, which the account counts under "with nothing to train"
        text = row.render()
        return [Rendered(text, [(0, len(text), HEADER)], [], "prefix", len(row.messages))]
    others = [i for i, on in enumerate(row.trained) if on and row.messages[i]["role"] != "assistant"]
    if others:
        raise RowError(
            "train = true outside of an answer", f"message {others[0]}, in a row that is rendered turn by turn"
        )
    documents = []
    for i in (i for i, on in enumerate(row.trained) if on):
        alone = [n == i for n in range(i + 1)]
        part = replace(row, messages=row.messages[: i + 1], notes=row.notes[: i + 1], trained=alone)
        text, _, contents = _marked(part)
        answers = [n for n, message in enumerate(part.messages) if message["role"] == "assistant"]
        turns = dict(zip(answers, _turns_by_prefix(part, text, answers)))
        documents.append(_spans(part, text, turns, contents, "per_turn"))
    return documents


def _everything(row: _Conversation) -> Rendered:
    """train_on = "all". The places of turns only decide their kinds, unless a message has train = false."""
    if not all(row.trained):
        rendered = _joint(row)
        untrained = [span for span in rendered.spans[1:] if not span[2] & TRAINED]
        return replace(rendered, spans=[(0, len(rendered.text), HEADER | TRAINED), *rendered.spans[1:], *untrained])
    try:
        return replace(_joint(row), spans=[(a, b, byte | TRAINED) for a, b, byte in _joint(row).spans])
    except RowError:
        text = row.render()
        return Rendered(text, [(0, len(text), HEADER | TRAINED)], [], "prefix", len(row.messages))


# ------------------------------------------------------------------------------------------------- spans


def _spans(row: _Conversation, text: str, turns: dict, contents: dict, strategy: str) -> Rendered:
    """turns: {assistant message: span}, contents: {other message: span}."""
    spans: list[Span] = [(0, len(text), HEADER)]
    weights = []
    for i, message in enumerate(row.messages):
        start, end = turns.get(i) or contents.get(i) or (0, 0)
        trained = TRAINED if row.trained[i] else 0
        if end == start:
            if trained and message["content"].strip():
                raise RowError("the place of a message cannot be found", f"message {i} is to be trained")
            continue
        if message["role"] == "assistant":
            spans += _answer_spans(row, text, start, end, message, trained)
        else:
            spans.append((start, end, KIND_OF_ROLE[message["role"]] | trained))
        if "part_spans" in row.notes[i]:
            spans += _part_spans(row, text, start, end, i)
        if trained and row.notes[i].get("weight", 1.0) != 1.0:
            weights.append((start, end, row.notes[i]["weight"]))
    return Rendered(text, spans, weights, strategy, len(row.messages))


def _answer_spans(row: _Conversation, text: str, start: int, end: int, message: dict, trained: int) -> list[Span]:
    """One assistant turn: answer, reasoning, tool calls, terminator."""
    turn = text[start:end]
    content = message["content"].strip()
    answer = THINKING.sub("", content).strip() if "</think>" in content else content
    if trained and answer not in turn:
        raise RowError("the chat template changed an answer", f"{answer[:40]!r} is not rendered as it is")
    for call in (message.get("tool_calls") or []) if trained else []:
        name = str((call.get("function") or call).get("name"))
        if name not in turn:
            raise RowError("the chat template omits a tool call", f"of {name!r}")
    spans = [(start, end, (TOOL_CALL if message.get("tool_calls") else ANSWER) | trained)]
    if message.get("tool_calls") and answer in turn:
        at = start + turn.rindex(answer)
        spans.append((at, at + len(answer), ANSWER | trained))
    reasoning = _reasoning_end(turn, (message.get("reasoning_content") or "").strip())
    if reasoning:
        spans.append((start, start + reasoning, REASONING | (0 if row.masking.reasoning == "mask" else trained)))
    end_of_turn = terminator(row.template)
    if end_of_turn and turn.rstrip().endswith(end_of_turn):
        spans.append((start + turn.rindex(end_of_turn), end, TERMINATOR | trained))
    return spans


def _reasoning_end(turn: str, reasoning: str) -> int:
    """How many characters at the beginning of a turn are reasoning, with the tag that closes it."""
    at = turn.index(reasoning) + len(reasoning) if reasoning and reasoning in turn else 0
    closing = turn.find("</think>", at)
    return closing + len("</think>") if closing >= 0 else at


def _part_spans(row: _Conversation, text: str, start: int, end: int, i: int) -> list[Span]:
    """The spans of the parts of a content that have a `train` of their own."""
    content = row.messages[i]["content"]
    inner = content.strip()
    if text[start:end].count(inner) != 1:
        raise RowError(
            "the place of a part cannot be found", f"message {i}: its content is not rendered once, as it is"
        )
    offset = text.index(inner, start) - content.index(inner)
    kind = KIND_OF_ROLE[row.messages[i]["role"]]
    kept = [(max(a + offset, start), min(b + offset, end), on) for a, b, on in row.notes[i]["part_spans"]]
    return [(a, b, kind | (TRAINED if on else 0)) for a, b, on in kept if a < b]


@lru_cache(maxsize=32)
def terminator(template: ChatTemplate) -> str:
    """The text that the template puts after an answer inside the assistant's turn, such as "<|im_end|>"."""
    text, answer = render(template, PROBE), PROBE[1]["content"]
    return text[text.rindex(answer) + len(answer) :].rstrip() if answer in text else ""


def kinds_of(document: Rendered) -> bytearray:
    """kind | TRAINED of each character."""
    kinds = bytearray(len(document.text))
    for start, end, byte in document.spans:
        kinds[start:end] = bytes([byte & (KIND_MASK | TRAINED)]) * (end - start)
    return kinds
