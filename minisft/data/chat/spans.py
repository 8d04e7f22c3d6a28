"""From the places of turns in a text to spans: what each character is, and whether it is trained.

A turn that has no end of its own is ended here, by the opener of the next one (inference.py).
"""

import re

from minisft.data.chat.dialogue import Conversation, Rendered, Span
from minisft.data.chat.inference import TOKEN, openers, terminator, thought_inside
from minisft.data.kinds import ANSWER, HEADER, REASONING, SYSTEM, TERMINATOR, TOOL, TOOL_CALL, TRAINED, USER
from minisft.data.rows import RowError

KIND_OF_ROLE = {"system": SYSTEM, "developer": SYSTEM, "user": USER, "tool": TOOL, "assistant": ANSWER}
THINKING = re.compile(r"(\s*)<think>.*?</think>(\s*)", re.DOTALL)


def ended(row: Conversation, text: str, turns: dict[int, tuple[int, int]]) -> tuple[str, dict]:
    """(text, turns), in which the opener of the next turn ends each trained turn that has no end of its own."""
    after_answer, after_call = openers(row.template)
    if not after_answer and not after_call:
        return text, turns
    found = {}
    for i, (start, end) in turns.items():
        following = TOKEN.match(text, end)
        if row.trained[i] and end > start and i == len(row.messages) - 1:
            text += after_call if row.messages[i].get("tool_calls") else after_answer
            end = len(text)
        elif row.trained[i] and end > start and following and following[1] in (after_answer, after_call):
            end = following.end()
        found[i] = start, end
    return text, found


def spans_of(row: Conversation, text: str, turns: dict, contents: dict, strategy: str) -> Rendered:
    """turns: {assistant message: span}, contents: {other message: span}."""
    spans: list[Span] = [(0, len(text), HEADER)]
    weights, lost_reasoning = [], False
    for i, message in enumerate(row.messages):
        start, end = turns.get(i) or contents.get(i) or (0, 0)
        trained = TRAINED if row.trained[i] else 0
        if end == start:
            is_hidden = row.masking.train_on == "all" and not trained  # context, with all around it trained
            if (row.wants(i) or is_hidden) and message["content"].strip():
                what = "not to be trained, unlike all around it" if is_hidden else "to be trained"
                raise RowError("the place of a message cannot be found", f"message {i} is {what}")
            continue
        if message["role"] == "assistant":
            spans += _answer_spans(row, text, start, end, message, trained)
            lost_reasoning |= row.trained[i] and _thought(message) not in _before_answer(text[start:end], message)
        else:
            spans.append((start, end, KIND_OF_ROLE[message["role"]] | trained))
        if "part_spans" in row.notes[i]:
            spans += _part_spans(row, text, start, end, i)
        if row.wants(i) and row.notes[i].get("weight", 1.0) != 1.0:
            weights.append((start, end, row.notes[i]["weight"]))
    prompts = frozenset(how for i, how in row.prompts.items() if row.trained[i])
    return Rendered(text, spans, weights, strategy, len(row.messages), prompts=prompts, lost_reasoning=lost_reasoning)


def _answer_spans(row: Conversation, text: str, start: int, end: int, message: dict, trained: int) -> list[Span]:
    """One assistant turn: answer, reasoning, tool calls, terminator."""
    turn = text[start:end]
    answer = _words(message)
    if trained and answer not in turn:
        raise RowError("the chat template changed an answer", f"{answer[:40]!r} is not rendered as it is")
    reasoning = (message.get("reasoning_content") or "").strip()
    calls = [str((call.get("function") or call).get("name")) for call in message.get("tool_calls") or []]
    for name in calls if trained else []:
        in_words = sum(text.count(name) for text in (answer, reasoning) if text and text in turn)
        if turn.count(name) - in_words < calls.count(name):
            raise RowError("the chat template omits a tool call", f"of {name!r}")
    spans = [(start, end, (TOOL_CALL if message.get("tool_calls") else ANSWER) | trained)]
    if message.get("tool_calls") and answer in turn:
        at = start + turn.rindex(answer)
        spans.append((at, at + len(answer), ANSWER | trained))
    reasoned = REASONING | (0 if row.masking.reasoning == "mask" else trained)
    spans += [(start + a, start + b, reasoned) for a, b in _thoughts(turn, message)]
    for end_of_turn in filter(None, (terminator(row.template), *openers(row.template))):
        if turn.rstrip().endswith(end_of_turn):
            spans.append((start + turn.rindex(end_of_turn), end, TERMINATOR | trained))
    return spans


def without_thoughts(content: str) -> str:
    """An answer without the reasoning that is in its content."""
    inside = thought_inside(content)
    content = content[inside.end() :] if inside else content

    def gap(block: re.Match) -> str:  # between two words, the longer space of the two
        return "" if block.end() == len(content) else max(block[1], block[2], key=len)

    return THINKING.sub(gap, content)


def _thought(message: dict) -> str:
    """The reasoning of an answer, which may be in its content, between <think> and </think>; "" if it has none."""
    inside = thought_inside(message["content"])
    return (message.get("reasoning_content") or (inside[1] if inside else "")).strip()


def _words(message: dict) -> str:
    """The text of an answer without the reasoning with which it begins."""
    content = message["content"].strip()
    inside = thought_inside(content)
    return content[inside.end() :] if inside else content


def _before_answer(turn: str, message: dict) -> str:
    """The part of a turn that may hold its reasoning. An answer may say the same words again."""
    answer = _words(message)
    return turn[: turn.rindex(answer)] if answer and answer in turn else turn


def _thoughts(turn: str, message: dict) -> list[tuple[int, int]]:
    """The places of reasoning in a turn, with its tags: what it begins with, up to the end of the reasoning, and later blocks."""
    reasoning, before = _thought(message), _before_answer(turn, message)
    at = turn.index(reasoning) + len(reasoning) if reasoning and reasoning in before else 0
    closing, opening = turn.find("</think>", at), turn.find("<think>")
    end = closing + len("</think>") if closing >= 0 else at
    if not at and turn[: max(opening, 0)].strip():  # the answer begins with words
        end = 0
    later = [(block.start() + len(block[1]), block.end() - len(block[2])) for block in THINKING.finditer(turn, end)]
    return [(0, end)] * bool(end) + later


def _part_spans(row: Conversation, text: str, start: int, end: int, i: int) -> list[Span]:
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
