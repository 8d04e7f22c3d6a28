"""The start-up check of a chat template: would a model that is trained with it learn to answer, and to stop?

Probes are rendered and masked like rows (masks.py). In each, the trained text must begin after the header, contain the whole
answer and end in a special token.
"""

from functools import lru_cache
from itertools import pairwise

from minisft.data.chat.masks import PROBE, Rendered, render_conversation
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.kinds import TRAINED
from minisft.data.rows import RowError
from minisft.errors import MODEL, UserError

SPACED = [
    {"role": "user", "content": " Fragen: \u00e4\U0001f600?\n"},
    {"role": "assistant", "content": "Zwei\n\n W\u00f6rter"},
]
THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"key": "a"}}, "id": "call00001"}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks up a key.", "parameters": {}}}]
PROBES = [  # (messages, tools)
    (PROBE, None),
    ([*PROBE, *SPACED], None),
    ([{"role": "system", "content": "Be brief."}, *SPACED], None),
    ([*PROBE, *SPACED, *PROBE], None),
    ([PROBE[0], THOUGHT], None),
    ([PROBE[0], THOUGHT, *SPACED], None),
    (
        [
            PROBE[0],
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "b"},
            PROBE[1],
        ],
        TOOLS,
    ),
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


def _trained_text(document: Rendered) -> list[str]:
    """The trained stretches of the text."""
    on = bytearray(len(document.text) + 1)
    for start, end, byte in document.spans:
        on[start:end] = bytes([bool(byte & TRAINED)]) * (end - start)
    borders = [0, *(i for i, (a, b) in enumerate(pairwise(on), 1) if a != b), len(document.text)]
    return [document.text[a:b] for a, b in pairwise(borders) if a < b and on[a]]
