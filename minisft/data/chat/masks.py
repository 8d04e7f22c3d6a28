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
inference.py says which prompt an answer is given, and what ends an answer whose turn has no end of its own.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

from minisft.data.chat.dialogue import Conversation, Masking, Rendered, first_difference
from minisft.data.chat.inference import (
    CLOSED_THOUGHT,
    PROBE,
    describe_switch,
    opens_thought,
    switch_values,
)
from minisft.data.chat.sandbox import MAX_SIZE
from minisft.data.chat.spans import ended, spans_of, without_thoughts
from minisft.data.chat.template import REFUSED, ChatTemplate
from minisft.data.chat.training_templates import CHATML, tagged_twin
from minisft.data.kinds import HEADER, TRAINED
from minisft.data.rows import RowError

# Markers are private-use characters of the last plane that the row does not contain. The first two are around the text of
# {% generation %}, the third closes the content of a message, the others open those of messages 0, 1, ...
MARKERS = range(0x100000, 0x10FFFE)
MARKER = re.compile(f"[{chr(MARKERS.start)}-{chr(MARKERS.stop)}]")
START, END, CLOSE, OPEN = range(4)
TAG = re.compile(r"\{%[-+]?\s*generation\b")
OURS = ("train", "weight", "part_spans")  # keys of a message that the template does not get


def render_conversation(
    template: ChatTemplate,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    masking: Masking = Masking(),  # noqa: B008 - frozen
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
    plain = as_rendered(messages, masking.reasoning)
    answers = [i for i, message in enumerate(plain) if message["role"] == "assistant"]
    rule = {"all": range(len(plain)), "last": answers[-1:], "assistant": [i for i in answers if i >= first_trained]}
    trained = [note.get("train", i in rule[masking.train_on]) for i, note in enumerate(notes)]
    for i, (before, message, on) in enumerate(zip(messages, plain, trained)):
        if on and before["content"].strip() and not message["content"].strip() and not message.get("tool_calls"):
            raise RowError(
                "empty answer", f"message {i} is reasoning only, which reasoning = {masking.reasoning!r} removes"
            )
    given = {"tools": tools, "documents": documents, **(variables or {})}
    row = Conversation(template, plain, trained, notes, masking, given, markers, {})
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


def _documents(row: Conversation) -> list[Rendered]:
    """The documents with the default values of the template's switches, or else with others, each answer with its own if it
    must be. Raises the first RowError if no value is exact."""
    switches = [both for both in switch_values(row.template) if both[0] not in row.given]
    if not switches:
        return _joint_or_per_turn(row)
    row = replace(row, is_strict=True)
    switched = [replace(row, given=row.given | {name: v}, switch=describe_switch(name, v)) for name, v in switches]
    options = [row, *switched]
    errors = []
    for option in options:
        try:
            return _joint_or_per_turn(option)
        except RowError as error:
            errors.append(error)
    try:
        wanted = [i for i in range(len(row.messages)) if row.wants(i)]
        if row.masking.multi_turn != "joint" and len(wanted) > 1:
            options = [replace(option, kept={}) for option in options]
            return _not_too_long(_alone(options, i) for i in wanted)
    except RowError:
        pass
    try:
        return _joint_or_per_turn(replace(row, is_strict=False))
    except RowError:
        raise errors[0] from None


def _alone(options: list[Conversation], i: int) -> Rendered:
    """The document of answer i, with the first of the options that is exact. Raises RowError if none is."""
    errors = []
    for option in options:
        try:
            return _per_turn(option.only(i))[0]
        except RowError as error:
            errors.append(error)
    raise errors[0]


def _joint_or_per_turn(row: Conversation) -> list[Rendered]:
    if row.masking.multi_turn == "per_turn":
        return _per_turn(row)
    try:
        return [_joint(row)]
    except RowError:
        answers = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        if row.masking.multi_turn == "joint" or not any(row.wants(i) for i in answers):
            raise
    return _per_turn(row)


def _has_prompt(row: Conversation, i: int) -> bool:
    """Whether the text before a turn can be told. Raises RowError if it cannot and the row wants the turn trained."""
    try:
        _turn(row, row.render(i + 1), i)
    except RowError as error:
        if row.notes[i].get("train") or any(on for _, _, on in row.notes[i].get("part_spans", ())):
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


def as_rendered(messages: list[dict], reasoning: str) -> list[dict]:
    """The messages as the template gets them: without the keys OURS, and without reasoning if it is "strip". Raises RowError."""
    if reasoning == "strip":
        messages = [_without_reasoning(message) for message in messages]
    return [
        message if message.keys().isdisjoint(OURS) else {k: v for k, v in message.items() if k not in OURS}
        for message in messages
    ]


def _without_reasoning(message: dict) -> dict:
    if message["role"] != "assistant":
        return message
    message = {key: value for key, value in message.items() if key != "reasoning_content"}
    content = without_thoughts(message["content"])
    if content != message["content"] and "part_spans" in message:
        raise RowError(
            "reasoning inside a content with parts", "give it as reasoning_content, so that it can be removed"
        )
    return {**message, "content": content}


# ------------------------------------------------------------------------------------------------- the whole conversation at once


def _joint(row: Conversation) -> Rendered:
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
            # The last turn has nothing after it that could change it, but its prompt may depend on a switch.
            if row.wants(i) and (i < len(row.messages) - 1 or switch_values(row.template)):
                _turn(row, text, i, turn)
    return spans_of(row, *ended(row, text, dict(zip(answers, turns))), contents, strategy)


@lru_cache(maxsize=32)
def _tags_hold_header(template: ChatTemplate) -> bool:
    """Whether the tags include the header, as SmolLM3's do. Turns are then found by prefix instead."""
    row = Conversation(template, PROBE, [False, False], [{}, {}], Masking(), {}, markers_for(len(PROBE), ""), {})
    try:
        text, turns, _ = _marked(row)
        prompt = row.prompt(1)
    except RowError:
        return False  # template_check.py reports whatever it is
    return bool(turns) and turns[-1][0] < len(prompt)


def _marked(row: Conversation, plain: str | None = None) -> tuple[str, list, dict]:
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


def _turns_by_prefix(row: Conversation, text: str, answers: list[int]) -> list[tuple[int, int]]:
    """C. Turns that are context need not be found, because only their kind depends on it; unless all around them is trained."""
    turns = []
    for i in answers:
        try:
            turns.append(_turn(row, text, i))
        except RowError:
            if row.wants(i) or row.masking.train_on == "all":
                raise
            turns.append((0, 0))
    return turns


def _turn(row: Conversation, text: str, i: int, found: tuple[int, int] | None = None) -> tuple[int, int]:
    """The span of assistant turn i in `text`. found: the span that tags gave.

    Raises RowError unless the text before the turn is the prompt that inference gives, and the turn is the text that the
    template renders after that prompt, or a part of it that the tags enclose.
    """
    so_far = row.answered(i)
    prompt, how = _continued_prompt(row, i, so_far, text)
    if found is not None and found[0] < len(prompt):
        raise RowError("the generation tags hold more than the answer", f"message {i}: {text[slice(*found)]!r}")
    turn = so_far if found is None else text[: found[1]]
    pairs = ((prompt, so_far, "before its answer"), (prompt, text, "before its answer"))
    pairs += ((turn, text, "once other turns follow") if found is None else (turn, so_far, "once other turns follow"),)
    for ours, theirs, what in pairs:
        if not theirs.startswith(ours):
            at = first_difference(ours, theirs)
            raise RowError(
                "the chat template renders a turn differently than at inference",
                f"message {i} {what}: {ours[at : at + 40]!r} becomes {theirs[at : at + 40]!r}",
            )
    # "<|im_end|>\n": generation ends at the token, nobody samples the newline after it.
    end = len(so_far.rstrip()) if so_far[len(prompt) :].strip() else len(so_far)
    if how:
        row.prompts[i] = how
    return found or (len(prompt), end)


def _continued_prompt(row: Conversation, i: int, so_far: str, text: str) -> tuple[str, str]:
    """(prompt, how it was chosen): the default prompt, or that of a switch, whichever answer i continues.

    Two whitespace characters may be one token, so a prompt that ends inside a stretch of whitespace is taken last. The
    default prompt is returned if none is continued. Raises RowError if the default prompt cannot be told.
    """
    inside = error = None
    for switch in ((), *(both for both in switch_values(row.template) if both[0] not in row.given)):
        try:
            prompt = row.prompt(i, **dict([switch] if switch else []))
        except RowError as caught:  # no header before a greeting
            error = error or caught
            continue
        is_closed = not switch and opens_thought(row.template) and so_far != row.render(i + 1)
        how = describe_switch(*switch) if switch else CLOSED_THOUGHT * is_closed or row.switch
        if so_far.startswith(prompt) and text.startswith(prompt):
            if not (prompt[-1:].isspace() and so_far[len(prompt) :][:1].isspace()):
                return prompt, how
            inside = inside or (prompt, how)
    if inside is None and error is not None:
        raise error
    if inside is not None and row.is_strict:
        raise RowError("the prompt ends inside a stretch of whitespace", f"message {i}: {inside[0][-40:]!r}")
    return inside or (row.prompt(i), "")


# ------------------------------------------------------------------------------------------------- turn by turn


def _per_turn(row: Conversation) -> list[Rendered]:
    """D. All turns of a document but the last are context."""
    wanted = [i for i in range(len(row.messages)) if row.wants(i)]
    if not wanted:  # one document of context, which the account counts under "with nothing to train"
        text = row.render()
        return [Rendered(text, [(0, len(text), HEADER)], [], "prefix", len(row.messages))]
    others = [i for i in wanted if row.messages[i]["role"] != "assistant"]
    if others:
        raise RowError(
            "train = true outside of an answer", f"message {others[0]}, in a row that is rendered turn by turn"
        )
    return _not_too_long(_turns_alone(row, wanted))


def _turns_alone(row: Conversation, wanted: list[int]) -> Iterator[Rendered]:
    if row.kept is None:  # documents begin alike, so n turns need renderings in the order of n, not of n^2
        row = replace(row, kept={})
    for i in wanted:
        part = row.only(i)
        end = i + 1
        part = replace(
            part, messages=row.messages[:end], notes=part.notes[:end], trained=part.trained[:end], prompts={}
        )
        _, _, contents = _marked(part)
        text = part.answered(i)  # a thought is put behind all other contents
        answers = [n for n, message in enumerate(part.messages) if message["role"] == "assistant"]
        turns = dict(zip(answers, _turns_by_prefix(part, text, answers)))
        yield spans_of(part, *ended(part, text, turns), contents, "per_turn")


def _not_too_long(documents: Iterable[Rendered]) -> list[Rendered]:
    """The documents of a row. Raises RowError: those of n turns can be n times as long as the row."""
    found, size = [], 0
    for document in documents:
        found.append(document)
        size += len(document.text)
        if size > MAX_SIZE:
            raise RowError("too long turn by turn", f"more than {MAX_SIZE:,} characters in {len(found):,} documents")
    return found


def _everything(row: Conversation) -> Rendered:
    """train_on = "all". The places of turns only decide their kinds, unless something in the row is not trained."""
    try:
        rendered = _joint(row)
    except RowError:
        if not all(row.trained) or any(_has_untrained_part(row, i) for i in range(len(row.messages))):
            raise
        text = row.render()
        return Rendered(text, [(0, len(text), HEADER | TRAINED)], [], "prefix", len(row.messages))
    return replace(rendered, spans=[(0, len(rendered.text), HEADER | TRAINED), *rendered.spans[1:]])


def _has_untrained_part(row: Conversation, i: int) -> bool:
    """Whether a part of message i is not trained, though the message is: by its `train`, or because reasoning is masked."""
    message = row.messages[i]
    thinks = message["role"] == "assistant" and ("reasoning_content" in message or "</think>" in message["content"])
    return row.masking.reasoning == "mask" and thinks or any(not on for _, _, on in row.notes[i].get("part_spans", ()))
