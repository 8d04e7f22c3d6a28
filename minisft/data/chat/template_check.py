"""The start-up check of a chat template: would a model that is trained with it learn to answer, and to stop?

Probes are rendered and masked like rows (masks.py). In each, the trained text must begin after the header, contain the whole
answer and end in a special token.
"""

from functools import lru_cache
from itertools import pairwise

from minisft.data.chat.dialogue import Rendered
from minisft.data.chat.inference import CALLED, PROBE, RESULT, TOOLS
from minisft.data.chat.masks import render_conversation
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.kinds import TRAINED
from minisft.data.rows import RowError
from minisft.errors import MODEL, UserError

SPACED = [
    {"role": "user", "content": " Fragen: \u00e4\U0001f600?\n"},
    {"role": "assistant", "content": "Zwei\n\n W\u00f6rter"},
]
THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
PROBES = [  # (messages, tools)
    (PROBE, None),
    ([*PROBE, *SPACED], None),
    ([{"role": "system", "content": "Be brief."}, *SPACED], None),
    ([*PROBE, *SPACED, *PROBE], None),
    ([PROBE[0], THOUGHT], None),
    ([PROBE[0], THOUGHT, *SPACED], None),
    ([*CALLED, RESULT, PROBE[1]], TOOLS),
]


@lru_cache(maxsize=32)
def check_template(template: ChatTemplate, terminators: tuple[str, ...]) -> None:
    """Refuse a template that would train a model wrongly: a header that is trained, an answer whose end is not.

    terminators: the texts of special tokens and EOS; a turn must end in one of them. Raises UserError.
    """

    def refuse(what: str, hint: str = "give a chat_template of your own, or chatml") -> None:
        raise UserError(f"the chat template {what}", hint=hint, exit_code=MODEL)

    for number, (messages, tools) in enumerate(PROBES):
        try:
            documents = render_conversation(template, messages, tools=tools)
        except RowError as error:
            if number == 0:  # a template may refuse the other probes (system turns, say): rows with these are bad rows
                refuse(f"cannot render one question and its answer: {error}")
            continue
        for document in documents:
            trained = _trained_text(document)
            if not trained or not trained[-1].rstrip().endswith(terminators):
                end = "".join(trained)[-40:]
                refuse(f"does not train the end of an answer: {end!r} ends in no special token")
        last = documents[-1]
        prompt = render(template, messages[:-1], tools=tools, add_generation_prompt=True)
        text, turn = last.text, _trained_text(last)[-1]
        if text.startswith(prompt) and text.rindex(turn) < len(prompt):
            refuse(f"trains the header of an answer: {turn!r}")
        if messages[-1]["content"].strip() not in turn:
            refuse(f"does not train the whole answer: {turn!r}")


@lru_cache(maxsize=32)
def ends_of_turns(template: ChatTemplate) -> tuple[str, ...]:
    """The trained texts of an answer, alone and before a question, and of a tool call. Each ends where generation stops."""
    ends = []
    for messages, tools in (PROBES[0], ([*PROBE, PROBE[0]], None), PROBES[-1]):
        try:
            documents = render_conversation(template, messages, tools=tools)
        except RowError:  # check_template reports it where it matters
            continue
        ends += [text for document in documents for text in _trained_text(document)]
    return tuple(text for text in ends if text.strip())


def _trained_text(document: Rendered) -> list[str]:
    """The trained stretches of the text."""
    on = bytearray(len(document.text) + 1)
    for start, end, byte in document.spans:
        on[start:end] = bytes([bool(byte & TRAINED)]) * (end - start)
    borders = [0, *(i for i, (a, b) in enumerate(pairwise(on), 1) if a != b), len(document.text)]
    return [document.text[a:b] for a, b in pairwise(borders) if a < b and on[a]]
