"""What a server does with a chat template: the prompt that it gives the model, and the tokens at which it stops.

The prompt is the conversation so far, rendered with `add_generation_prompt`. Three things about it are not in the template's
rendering of a finished conversation:

- A switch. The prompt of Nemotron 3 or Qwen 3.5 opens a thought, or is followed by the answer itself, as `enable_thinking`
  says. An answer is trained after the prompt that it continues: the default one, or else the one of another value.
- The end of an answer. GLM renders none: the model ends its answer by the opener of the next turn (`<|user|>`, or
  `<|observation|>` after a tool call), at which servers stop. So the opener is trained, and follows the last answer too.
- A thought that only the prompt has. The prompt of DeepSeek R1 and V3 ends in `<think>`, and finished answers are rendered
  without any thought. The model is to write the thought, `</think>` and the answer, so this is put behind the prompt.
"""

import json
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from minisft.data.chat.template import ChatTemplate, render
from minisft.data.rows import RowError

SWITCHES = ("enable_thinking", "thinking")  # variables of well-known templates that change the prompt
PROBE = [{"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"key": "a"}}, "id": "call00001"}
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks up a key.", "parameters": {}}}]
CALLED = [PROBE[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
RESULT = {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "b"}
TOKEN = re.compile(r"\s*(<[^<>\s]+>)")
# At the beginning of an answer. The rows that R1 and the like have written often lack <think>, which their prompt ends in.
THOUGHT = re.compile(r"\s*(?:<think>)?((?:(?!<think>).)*?)</think>\s*", re.DOTALL)
CLOSED_THOUGHT = "</think> after the prompt's <think>"


@lru_cache(maxsize=32)
def switch_values(template: ChatTemplate) -> tuple[tuple[str, bool], ...]:
    """The (switch, value) with which the template renders another prompt than by default. The user sets none of them."""
    found = []
    for name in SWITCHES:
        if name not in template.text or name in dict(template.variables):
            continue
        for value in (False, True):
            try:
                options: list[dict[str, Any]] = [{}, {name: value}]
                prompts = [render(template, PROBE[:1], add_generation_prompt=True, **option) for option in options]
            except RowError:
                continue
            if prompts[0] != prompts[1]:
                found.append((name, value))
    return tuple(found)


def describe_switch(name: str, value: bool) -> str:
    return f"{name} = {json.dumps(value)}"


def described_switch(prompts: Iterable[str]) -> dict[str, bool]:
    """The variables that `prompts` (Rendered.prompts) describe; {} for the default prompt."""
    parts = [how.partition(" = ") for how in prompts]
    return {name: json.loads(value) for name, _, value in parts if name in SWITCHES}


@lru_cache(maxsize=32)
def terminator(template: ChatTemplate) -> str:
    """The text that the template puts after an answer inside the assistant's turn, such as "<|im_end|>"."""
    text, answer = render(template, PROBE), PROBE[1]["content"]
    return text[text.rindex(answer) + len(answer) :].rstrip() if answer in text else ""


@lru_cache(maxsize=32)
def openers(template: ChatTemplate) -> tuple[str, str]:
    """The tokens that open the turn after an answer and after a tool call, if turns have no end of their own, else "".

    A token that opens the assistant's turns too ends nothing.
    """
    if terminator(template):
        return "", ""
    return _opener(template, PROBE, PROBE[0]), _opener(template, CALLED, RESULT)


def _opener(template: ChatTemplate, messages: list[dict], following: dict) -> str:
    tools = TOOLS if messages is CALLED else None
    try:
        so_far, text, other = (
            render(template, some, tools=tools) for some in (messages, [*messages, following], [*messages, PROBE[1]])
        )
    except RowError:
        return ""
    ours, theirs = (TOKEN.match(some, len(so_far)) for some in (text, other))
    is_turn = text.startswith(so_far) and ours and not (theirs and ours[1] == theirs[1])
    return ours[1] if ours and is_turn else ""


@lru_cache(maxsize=32)
def opens_thought(template: ChatTemplate) -> bool:
    """Whether the prompt opens a thought that the rendering of a finished answer does not have."""
    try:
        prompt, text = render(template, PROBE[:1], add_generation_prompt=True), render(template, PROBE)
    except RowError:
        return False
    return with_thought(prompt, text, PROBE[1]) != text


def thought_inside(content: str) -> re.Match | None:
    """The reasoning with which a content begins: its text is group 1, and the answer follows the match."""
    return THOUGHT.match(content) if "</think>" in content else None  # the search costs more than the test


def with_thought(prompt: str, text: str, message: dict) -> str:
    """`text`, which ends with the assistant's `message`, with its thought if only the prompt opens one."""
    before = prompt.rstrip().removesuffix("<think>")
    if before == prompt.rstrip() or not text.startswith(before) or text.startswith("<think>", len(before)):
        return text
    inside = thought_inside(message["content"])
    thought = (message.get("reasoning_content") or (inside[1] if inside else "")).strip()
    answer = text[len(before) :]
    if inside:
        answer = answer.lstrip()  # the space between the two is there already
    return prompt + (thought + "\n" if thought else "") + "</think>\n\n" + answer
