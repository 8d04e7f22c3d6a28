"""Preference rows: where the prompt ends, which two answers follow it, and which single answers are good.

    prompt             chosen, rejected
    a string           two strings
    string, messages   two lists of messages, or two messages; a list may repeat the prompt
    a string           two whole conversations that have it in a turn: the prompt is the turns that both have in common
    conversations      two ShareGPT turns, or lists of them
    absent             two lists of messages; the prompt is their common beginning, at least up to the last question
    absent             two transcripts as in hh-rlhf, "\n\nHuman: ... \n\nAssistant: ...": up to the last "\n\nAssistant:"
    absent             two other strings; the prompt is the words with which both begin, without the space after them. Only in
                       rows without another column of text, which may hold the prompt

A single answer is in `completion`, else in `output`, `response` or `answer`, or it is the last of `messages` or `conversations`.

The string may also be in the columns of a question, such as instruction and input, and the system turn in `system`
(prompts.py).

Nothing here is encoded. A row whose sides answer different prompts, or are the same, teaches no preference and is refused.
"""

import os
import re
from dataclasses import replace

from minisft.data.chat.conversations import check_messages, check_turns, with_system
from minisft.data.prompts import (
    SYSTEMS,
    Prompt,
    prompt_of,
    question_field,
    string_of,
    system_of,
)
from minisft.data.rows import RowError

SIDES = ("chosen", "rejected")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of a transcript
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
ANSWERS = "\n\nAssistant:"
COMPLETIONS = ("output", "response", "answer")  # other names of `completion`, in rows without messages
LABELS = {"true": True, "1": True, "false": False, "0": False}


def is_sharegpt(row: dict) -> bool:
    return row.get("conversations") is not None


def has_transcripts(row: dict) -> bool:
    """Whether a preference row has no prompt and its chosen side is a transcript."""
    return not has_prompt(row) and not is_sharegpt(row) and _is_transcript(row["chosen"])


def has_prompt(row: dict) -> bool:
    """Whether the row has a prompt of its own, in `prompt` or in the columns of a question."""
    return row.get("prompt") is not None or question_field(row) is not None


def _is_transcript(text: object) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and ANSWERS in text


# ------------------------------------------------------------------------------------------------- messages


def preference_turns(row: dict, sides: tuple[str, ...], *, transcripts: bool) -> tuple[list[dict], list[list[dict]]]:
    """(prompt, the answer of each side) of a row that holds messages, ShareGPT turns or transcripts.

    sides: SIDES, or ("chosen",) where the rejected one is not needed. Raises RowError.
    """
    if is_sharegpt(row):
        prompt = check_turns(row["conversations"], "conversations", system=system_of(row), needs_answer=False)
        return prompt, check_answers(prompt, {side: check_turns(as_list(row[side]), side) for side in sides})
    if transcripts:
        said = [_transcript(row, side) for side in sides]
    else:
        said = [check_messages(as_list(row[side]), side) for side in sides]
    prompt = None if transcripts else _prompt_of_messages(row)
    if prompt is not None:
        answers = [messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages for messages in said]
        whole = None if isinstance(row.get("prompt"), list) else _conversations(prompt, said, answers)
        if whole is None:
            prompt = with_system(prompt, system_of(row), "prompt")
            return prompt, check_answers(prompt, dict(zip(sides, answers)))
        said = whole
    common = _common_messages(*said)
    answers = [messages[len(common) :] for messages in said]
    prompt = with_system(common, system_of(row), sides[0])
    return prompt, check_answers(prompt, dict(zip(sides, answers)))


def _conversations(prompt: list[dict], said: list[list[dict]], answers: list[list[dict]]) -> list[list[dict]] | None:
    """The sides as whole conversations, None if they are answers to the prompt.

    A string beside conversations that have it in a turn is only a label. If they begin with an answer, they follow it.
    """
    if all(message["role"] in ("assistant", "tool") for answer in answers for message in answer):
        return None
    if all(messages[0]["role"] == "assistant" for messages in said):
        return [prompt + messages for messages in said]
    asked = prompt[-1]["content"].strip()
    questions = [[m["content"] for m in messages if m["role"] not in ("assistant", "tool")] for messages in said]
    return said if all(any(asked in text for text in texts) for texts in questions) else None


def _prompt_of_messages(row: dict) -> list[dict] | None:
    """The prompt of a row of messages without its system turn, None if it is in the answers."""
    if isinstance(row.get("prompt"), str) or row.get("prompt") is None:
        asked = prompt_of(row)
        if asked is None:
            return None
        prompt = replace(asked, system="").messages()
    else:
        prompt = row["prompt"]
    return check_messages(prompt, "prompt", needs_answer=False)


def check_answers(prompt: list[dict], answers: dict[str, list[dict]]) -> list[list[dict]]:
    """The values of {field: answer}. Raises RowError if one is not an answer, or both are the same."""
    for name, answer in answers.items():
        roles = [message["role"] for message in answer]
        if "assistant" not in roles or not {"assistant", "tool"}.issuperset(roles):
            raise RowError(f"{name} is no answer", f"roles after the prompt: {', '.join(roles) or 'none'}")
    if len(answers) > 1:
        check_prompt(prompt)
        check_differ(*answers.values())
    return list(answers.values())


def check_prompt(prompt: list[dict]) -> None:
    """Raise RowError if a message of the prompt asks to be trained: in preference data only answers are scored."""
    for i, message in enumerate(prompt):
        if message.get("train") or any(on for _, _, on in message.get("part_spans", ())):
            raise RowError("train = true in a prompt", f"message {i}: only the answers are scored")


def check_differ(chosen: object, rejected: object) -> None:
    if chosen == rejected:
        raise RowError("chosen equals rejected", "two answers that are the same teach no preference")


def _common_messages(chosen: list[dict], rejected: list[dict] | None = None) -> list[dict]:
    """The prompt of two conversations: up to the last question, and the turns after it that both sides have in common."""
    cut = _after_last_question(chosen)
    if cut == 0:
        raise RowError("no prompt", "the row has no prompt, and chosen is an answer alone")
    if rejected is None:
        return chosen[:cut]
    if chosen[:cut] != rejected[: _after_last_question(rejected)]:
        raise RowError("prompts differ", "chosen and rejected are not the same up to their last question")
    for n in range(cut, min(len(chosen), len(rejected)) - 1):
        if chosen[n] != rejected[n]:
            break
        if chosen[n + 1]["role"] == rejected[n + 1]["role"] == "assistant":
            cut = n + 1
    return chosen[:cut]


def _after_last_question(messages: list[dict]) -> int:
    return next((i for i in range(len(messages), 0, -1) if messages[i - 1]["role"] not in ("assistant", "tool")), 0)


def _transcript(row: dict, side: str) -> list[dict]:
    text = string_of(row, side)
    if has_prompt(row):
        raise RowError("not a transcript", "the row has a prompt, and the first row of the source has none")
    if not _is_transcript(text):
        raise RowError(
            "not a transcript", f"{side} is not written as Human: ... Assistant: ..., unlike the first row's"
        )
    _, *turns = TURN.split(text)
    messages = [{"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2])]
    return check_messages(messages, side)


def completion_field(row: dict) -> str | None:
    """The column of a single answer, None if it is the last message of a conversation."""
    if row.get("completion") is not None:
        return "completion"
    if row.get("messages") is not None or is_sharegpt(row):
        return None
    return next((name for name in COMPLETIONS if row.get(name) is not None), None)


def labelled_turns(row: dict) -> tuple[list[dict], list[dict]]:
    """(prompt, answer) of a row of messages with one label. Where it has no prompt, the last message is the answer."""
    column = completion_field(row)
    if column is not None:
        prompt = _prompt_of_messages(row)
        if prompt is None:
            raise RowError("no prompt", f"the row has {column} alone")
        prompt = with_system(prompt, system_of(row), "prompt")
        answer = check_messages(as_list(row[column]), column)
        check_answers(prompt, {column: answer})
    else:
        if row.get("messages") is not None:
            said = with_system(check_messages(row["messages"], "messages"), system_of(row), "messages")
        else:
            said = check_turns(row.get("conversations"), "conversations", system=system_of(row))
        prompt, answer = said[:-1], said[-1:]
        roles = [message["role"] for message in said]
        if roles[-1] != "assistant" or "user" not in roles:
            raise RowError("no final answer", f"to a question: roles: {', '.join(roles)}")
    check_prompt(prompt)
    return prompt, answer


def label_of(row: dict) -> bool:
    """Whether the row's answer is good. A CSV has the label as text."""
    name = "label" if row.get("label") is not None else "kto_tag" if "kto_tag" in row else "label"
    label = LABELS.get(str(row[name]).lower()) if isinstance(row[name], bool | int | str) else None
    if label is None:
        raise RowError("label is not true or false", f"{name} is {row[name]!r:.80}")
    return label


# ------------------------------------------------------------------------------------------------- strings


def preference_texts(row: dict, sides: tuple[str, ...]) -> tuple[Prompt, list[str]]:
    """(prompt, the answer of each side) of a row of strings. Raises RowError."""
    prompt = prompt_of(row)
    if prompt is not None:
        answers = [string_of(row, side) for side in sides]
    else:
        said = [string_of(row, side) for side in SIDES]
        if len(sides) > 1:
            check_differ(*said)
        if not _is_transcript(said[0]):
            _check_nothing_unused(row)
        common = _common_transcript(*said) if _is_transcript(said[0]) else _common_words(*said)
        answers = [text[len(common) :] for text in said[: len(sides)]]
        prompt = Prompt(common, system=system_of(row))
    for side, answer in zip(sides, answers):
        check_text_answer(side, answer)
    if len(sides) > 1:
        check_text_prompt(prompt)
        check_differ(*answers)
    return prompt, answers


def check_text_answer(name: str, answer: str) -> None:
    if not answer.strip():
        raise RowError("empty answer", f"{name} has no text")


def check_text_prompt(prompt: Prompt) -> None:
    if prompt.is_empty:
        raise RowError("no prompt", "prompt is empty, and an answer is scored given its prompt")


def _common_transcript(chosen: str, rejected: str) -> str:
    """Up to the last "\n\nAssistant:", which must be the same place of the same text in both."""
    prompts = [text[: text.rfind(ANSWERS) + len(ANSWERS)] for text in (chosen, rejected)]
    if prompts[0] != prompts[1]:
        raise RowError("prompts differ", f"chosen and rejected are not the same up to their last {ANSWERS!r}")
    for side, text in zip(SIDES, (chosen, rejected)):
        if TURN.search(text, len(prompts[0])):
            raise RowError(f"{side} is no answer", "it ends with a question of Human:")
    return prompts[0]


def _common_words(chosen: str, rejected: str) -> str:
    """The words with which both begin. A word of which only the first letters agree belongs to the answers."""
    same = len(os.path.commonprefix([chosen, rejected])) if chosen != rejected else 0
    words = chosen[:same]
    if words and not words[-1].isspace() and not (chosen[same:][:1].isspace() and rejected[same:][:1].isspace()):
        words = " ".join(words.rsplit(maxsplit=1)[:-1])
    if not words.strip():
        begins = "is the same" if chosen == rejected else "begins with other words"
        raise RowError("no prompt", f"its end in the text of chosen cannot be found: rejected {begins}")
    return words.rstrip()


def _check_nothing_unused(row: dict) -> None:
    """Raise RowError if the prompt may be in a column that is not read: then it is not guessed from the answers."""
    texts = [name for name, value in row.items() if isinstance(value, str) and value.strip()]
    if unused := [name for name in texts if name not in (*SIDES, *SYSTEMS, "weight")]:
        raise RowError(
            "no prompt",
            f"the row has none, and the text of {', '.join(unused)} is not used; rename the prompt's column by field_map, "
            f"or leave columns out, as in ignore = {unused}",
        )


def as_list(value: object) -> object:
    return [value] if isinstance(value, dict) else value
