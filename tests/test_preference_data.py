"""Preference data: rows as pairs and labelled answers, cut, dropped, repeated and held out as wholes."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import settings

from minisft.commands import audit as audit_command
from minisft.config.load import load
from minisft.data import tokenise
from minisft.data.audit import all_findings, count_tokens, quick_findings
from minisft.data.cache import build_cache, cache_key, hash_files
from minisft.data.chat.template import ChatTemplate
from minisft.data.detect_format import detect_row_format
from minisft.data.documents import rows_of, select_documents, split_documents
from minisft.data.formats import to_examples
from minisft.data.kinds import CHOSEN, MISMATCHED, REJECTED, TRAINED
from minisft.data.row_format import FormatOptions
from minisft.data.rows import RowError
from minisft.data.sources import parse_source
from minisft.data.tokenizer import train_tokenizer
from minisft.errors import DATA, UserError
from minisft.prepare.data import prepare_data
from minisft.prepare.options import prepare_tokenizer
from minisft.samples import read_prompts

TOKENIZER = train_tokenizer(["Hello, how are you today?", "Human: Assistant: fine, thank you."] * 5, 320)
PLAIN = replace(TOKENIZER, template=None)


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build(folder, rows, tokenizer=TOKENIZER, answers="pairs", on_bad_row="error", format="auto", **options):
    """rows: of one source, or a list of lists."""
    sources = rows if rows and isinstance(rows[0], list) else [rows]
    paths = [write(folder / f"rows{len(list(folder.iterdir()))}.jsonl", source) for source in sources]
    return build_cache(
        [parse_source(path) for path in paths],
        tokenizer,
        cache_dir=folder / "cache",
        on_bad_row=on_bad_row,
        format=format,
        options=FormatOptions(answers=answers, **options),
    )


def documents_of(cache):
    """[(ids, ids that are trained, role)]"""
    spans = [slice(a, b) for a, b in zip(cache.offsets, cache.offsets[1:])]
    roles = [None] * len(spans) if cache.role is None else cache.role.tolist()
    return [(cache.ids[s].tolist(), cache.ids[s][cache.kinds[s] >= TRAINED].tolist(), r) for s, r in zip(spans, roles)]


def by_template(prompt, answer, role, tokenizer=TOKENIZER, tools=None):
    """A document built without the engine's formats, masks and spans: the whole text encoded, and where its answer is."""
    before = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True)
    ids = tokenizer.encode(tokenizer.apply_chat_template([*prompt, *answer], tools=tools))
    trained = tokenizer.encode(before + answer[0]["content"] + "<|im_end|>")[len(tokenizer.encode(before)) :]
    return ids, trained, role


def as_text(prompt, answer, role):
    answer = [*PLAIN.encode(answer), PLAIN.eos_token_id]
    return PLAIN.encode(prompt) + answer, answer, role


HISTORY = [user("Hi"), said("Hello"), user("How are you?")]
TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: How are you?\n\nAssistant:"


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


ROWS = {  # name -> (row, prompt); the answers are always "Fine." and "No."
    "prompt of messages": ({"prompt": HISTORY, "chosen": [said("Fine.")], "rejected": [said("No.")]}, HISTORY),
    "single messages": ({"prompt": HISTORY, "chosen": said("Fine."), "rejected": said("No.")}, HISTORY),
    "prompt repeated": (
        {"prompt": HISTORY, "chosen": [*HISTORY, said("Fine.")], "rejected": [*HISTORY, said("No.")]},
        HISTORY,
    ),
    "prompt repeated once": (
        {"prompt": HISTORY, "chosen": [*HISTORY, said("Fine.")], "rejected": [said("No.")]},
        HISTORY,
    ),
    "UltraFeedback": (
        {
            "prompt": "Hi",
            "prompt_id": "1",
            "messages": [user("Hi"), said("Fine.")],
            "chosen": [user("Hi"), said("Fine.")],
            "rejected": [user("Hi"), said("No.")],
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        },
        HISTORY[:1],
    ),
    "implicit": ({"chosen": [*HISTORY, said("Fine.")], "rejected": [*HISTORY, said("No.")]}, HISTORY),
    "ShareGPT turns": (
        {"conversations": [human("Hi")], "chosen": gpt("Fine."), "rejected": gpt("No.")},
        HISTORY[:1],
    ),
    "ShareGPT lists": (
        {
            "conversations": [human("Hi"), gpt("Hello"), human("How are you?")],
            "system": "Be brief.",
            "chosen": [gpt("Fine.")],
            "rejected": [gpt("No.")],
        },
        [{"role": "system", "content": "Be brief."}, *HISTORY],
    ),
    "hh-rlhf": ({"chosen": f"{HH} Fine.", "rejected": f"{HH} No."}, HISTORY),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_messages_become_pairs(tmp_path, name):
    row, prompt = ROWS[name]
    expected = [by_template(prompt, [said("Fine.")], CHOSEN), by_template(prompt, [said("No.")], REJECTED)]
    cache = build(tmp_path, [row, row])
    assert documents_of(cache) == expected * 2
    assert cache.unit == "pairs" and rows_of(cache).tolist() == [0, 0, 1, 1] and cache.weights is None
    described = cache.manifest["sources"][0]["layout"]
    assert described.startswith("preference, by the chat template; trained: the chosen answer against the rejected one")
    assert " rejected" not in described.partition("not used")[2]
    # SFT reads the chosen answers only: the same documents.
    assert documents_of(build(tmp_path, [row, row], answers="chosen")) == [(*expected[0][:2], None)] * 2


def test_tools_reach_both_sides_and_common_calls_are_the_prompt(tmp_path):
    history = [user("Hi"), CALL, {"role": "tool", "content": "7"}]
    row = {"chosen": [*history, said("Fine.")], "rejected": [*history, said("No.")], "tools": TOOLS}
    checked = [user("Hi"), {**CALL, "tool_calls": [{"type": "function", **CALL["tool_calls"][0]}]}, history[2]]
    assert documents_of(build(tmp_path, [row])) == [
        by_template(checked, [said(text)], role, tools=TOOLS) for text, role in (("Fine.", CHOSEN), ("No.", REJECTED))
    ]


TEXTS = {  # name -> (row, prompt, chosen, rejected)
    "explicit": ({"prompt": "How? ", "chosen": "So.", "rejected": "No."}, "How? ", "So.", "No."),
    "hh-rlhf": ({"chosen": f"{HH} Fine.", "rejected": f"{HH} No."}, HH, " Fine.", " No."),
    "words": ({"chosen": "Q: colour? A: red", "rejected": "Q: colour? A: rose"}, "Q: colour? A:", " red", " rose"),
    "other space": ({"chosen": "Q: why?\nSo", "rejected": "Q: why? No"}, "Q: why?", "\nSo", " No"),
    "one goes on": ({"chosen": "Q: why? So", "rejected": "Q: why? So what"}, "Q: why?", " So", " So what"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_rows_of_strings_become_pairs(tmp_path, name):
    row, prompt, chosen, rejected = TEXTS[name]
    for tokenizer, options in ((PLAIN, {}), (TOKENIZER, {"prompt_format": "plain"})):
        cache = build(tmp_path, [row], tokenizer, **options)
        assert documents_of(cache) == [as_text(prompt, chosen, CHOSEN), as_text(prompt, rejected, REJECTED)]
        alone = build(tmp_path, [row], tokenizer, answers="chosen", **options)
        assert documents_of(alone) == [as_text(prompt, chosen, None)]
    if name not in ("hh-rlhf", "explicit"):
        chat = documents_of(build(tmp_path, [row], prompt_format="chat"))
        assert chat[0] == by_template([user(prompt)], [said(chosen.strip())], CHOSEN)


@given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
@hypothesis_settings(max_examples=200, deadline=None)
def test_the_prompt_of_two_strings_is_the_words_with_which_both_begin(start, chosen, rejected):
    row = {"chosen": start + chosen, "rejected": start + rejected}
    a, b = row["chosen"], row["rejected"]
    borders = [  # where in both a word ends, the same up to there
        k
        for k in range(1, min(len(a), len(b)))
        if a[:k] == b[:k] and not a[k - 1].isspace() and a[k].isspace() and b[k].isspace()
    ]
    options = FormatOptions(answers="pairs")
    try:
        examples = to_examples(row, detect_row_format(row, "auto", options, False), options)
    except RowError as error:
        ends = not borders or not a[borders[-1] :].strip() or not b[borders[-1] :].strip()
        assert (
            a == b
            and error.reason == "chosen equals rejected"
            or ends
            and error.reason in ("no prompt", "empty answer")
        )
        return
    (prompt, first), (same, second) = ([piece.text for piece in e.pieces] for e in examples)
    assert prompt == same == a[: borders[-1]] and (prompt + first, same + second) == (a, b)


# ------------------------------------------------------------------------------------------------- labels

LABELLED = [
    ({"prompt": "Hi", "completion": " a", "label": True}, "Hi", " a", CHOSEN),
    ({"prompt": "You", "completion": " b b", "label": False}, "You", " b b", REJECTED),
    ({"prompt": "He", "completion": " c", "label": 1}, "He", " c", CHOSEN),
    ({"prompt": "It", "completion": " d", "kto_tag": 0}, "It", " d", REJECTED),
]


def naive_units(rows, next_of):
    """The documents of labelled rows: each answer, and its prompt with the answer of row next_of[i]."""
    documents = []
    for (_, prompt, answer, role), other in zip(rows, next_of):
        documents += [as_text(prompt, answer, role), as_text(prompt, rows[other][2], MISMATCHED)]
    return documents


def test_labelled_answers_come_with_the_answer_of_the_next_row(tmp_path, monkeypatch):
    rows = [row for row, *_ in LABELLED]
    assert documents_of(build(tmp_path, rows, PLAIN, "labels")) == naive_units(LABELLED, [1, 2, 3, 0])
    # A batch that holds one row takes the answer before; one that comes first, the answer after.
    monkeypatch.setattr(tokenise, "BATCH_ROWS", 3)
    cache = build(tmp_path, rows, PLAIN, "labels")  # another file, so another cache
    assert documents_of(cache) == naive_units(LABELLED, [1, 2, 0, 2])
    cache = build(tmp_path, [rows[:1], rows[1:]], PLAIN, "labels")
    assert documents_of(cache) == naive_units(LABELLED, [1, 2, 3, 1])
    assert cache.source.tolist() == [0, 0] + [1] * 6 and cache.unit == "labelled answers"
    with pytest.raises(UserError, match="one row of labelled answers is too few"):
        build(tmp_path, rows[:1], PLAIN, "labels")
    with pytest.raises(UserError, match="(?s)one row of labelled answers is too few.*:2: label is not true or false"):
        build(tmp_path, [rows[0], {**rows[1], "label": "x"}], PLAIN, "labels", on_bad_row="skip")


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": HISTORY[:1], "completion": [said(a)], "label": b} for a, b in (("Yes", True), ("No", False))],
        [{"messages": [HISTORY[0], said(a)], "label": b} for a, b in (("Yes", True), ("No", False))],
        [{"conversations": [human("Hi"), gpt(a)], "kto_tag": b} for a, b in (("Yes", True), ("No", False))],
    ],
    ids=["prompt", "messages", "conversations"],
)
def test_labelled_rows_of_messages(tmp_path, rows):
    yes, no = [said("Yes")], [said("No")]
    roles = ((yes, CHOSEN), (no, MISMATCHED), (no, REJECTED), (yes, MISMATCHED))
    expected = [by_template(HISTORY[:1], answer, role) for answer, role in roles]
    for format in ("auto", "labelled"):
        cache = build(tmp_path, rows, answers="labels", format=format)
        assert documents_of(cache) == expected
        assert cache.manifest["sources"][0]["layout"].endswith("trained: the answer, as its label says")


@pytest.mark.parametrize(
    "columns, unread",
    [
        ({"instruction": "Hi", "input": "", "output": "Yes"}, []),
        ({"instruction": "Hi", "response": "Yes"}, []),
        ({"question": "Hi", "answer": "Yes"}, []),
        ({"query": "Hi", "response": "Yes"}, []),
        ({"prompt": [HISTORY[0]], "response": [said("Yes")]}, []),
        ({"query": "Hi", "completion": "Yes", "response": "Never", "output": None}, ["response", "output"]),
        ({"messages": [HISTORY[0], said("Yes")], "response": "Never"}, ["response"]),
    ],
)
def test_the_answer_of_a_label_has_several_names(tmp_path, columns, unread):
    cache = build(tmp_path, [{**columns, "label": label} for label in (True, False)], answers="labels")
    roles = (CHOSEN, MISMATCHED, REJECTED, MISMATCHED)
    assert documents_of(cache) == [by_template(HISTORY[:1], [said("Yes")], role) for role in roles]
    layout = cache.manifest["sources"][0]["layout"]
    assert layout.endswith(f"; fields not used: {', '.join(unread)}" if unread else "as its label says")


def test_earlier_answers_of_a_labelled_conversation_are_context(tmp_path):
    rows = [{"messages": [*HISTORY, said(text)], "label": True} for text in ("Fine.", "So so.")]
    assert documents_of(build(tmp_path, rows, answers="labels"))[0] == by_template(HISTORY, [said("Fine.")], CHOSEN)


@pytest.mark.parametrize("label, said_of_it", [(True, "true (good)"), (False, "false (bad)")])
def test_labels_of_one_class_are_a_warning(tmp_path, label, said_of_it):
    rows = [{"prompt": "Hi", "completion": text, "label": label} for text in "ab"]
    (line,) = [line for line in build(tmp_path, rows, answers="labels").describe() if "WARNING" in line]
    assert line.startswith(f"WARNING: every label is {said_of_it}")
    both = [*rows, {**rows[0], "label": not label}]
    assert "WARNING" not in "".join(build(tmp_path, both, answers="labels").describe())


def test_pairs_are_two_labelled_answers_and_are_not_mixed_with_themselves(tmp_path):
    rows = [{"prompt": f"{i}?", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(3)]
    documents = documents_of(build(tmp_path, rows, PLAIN, "labels"))
    for i in range(3):
        prompt, other = f"{i}?", (i + 1) % 3
        assert documents[4 * i : 4 * i + 4] == [
            as_text(prompt, f" yes {i}", CHOSEN),
            as_text(prompt, f" yes {other}", MISMATCHED),
            as_text(prompt, f" no {i}", REJECTED),
            as_text(prompt, f" no {other}", MISMATCHED),
        ]


def test_labels_are_not_read_where_nobody_asks_for_them(tmp_path):
    rows = [row for row, *_ in LABELLED]
    cache = build(tmp_path, rows, PLAIN, "chosen")
    assert cache.role is None and not (cache.folder / "role.bin").exists()
    assert cache.manifest["sources"][0]["layout"] == "prompt_completion, as text; trained: the answer; " + (
        "fields not used: label"
    )
    assert documents_of(cache) == [as_text(prompt, answer, None) for _, prompt, answer, _ in LABELLED]


# ------------------------------------------------------------------------------------------------- bad rows

PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": HISTORY, "chosen": [said("a")], "rejected": [said("b")]}
SHARE = ROWS["ShareGPT turns"][0]
TRANSCRIPT = ROWS["hh-rlhf"][0]
LABEL = LABELLED[0][0]
LABEL_CHAT = {"messages": [*HISTORY, said("a")], "label": True}
BAD = [  # (row that decides the format, changes that spoil it, what is said)
    (PAIR, {"rejected": "a"}, "chosen equals rejected"),
    (PAIR, {"rejected": " \n"}, "empty answer: rejected"),
    (PAIR, {"chosen": ""}, "empty answer: chosen"),
    (PAIR, {"rejected": None}, "missing field: 'rejected'"),
    (PAIR, {"rejected": [said("b")]}, "not a string: rejected is a list"),
    (PAIR, {"prompt": ""}, "no prompt: prompt is empty"),
    (PAIR, {"prompt": 3}, "not a string: prompt is an int"),
    (PAIR, {"prompt": None}, "no prompt: its end"),
    (PAIR, {"prompt": None, "chosen": "x y", "rejected": "x y"}, "chosen equals rejected"),
    (PAIR, {"prompt": None, "chosen": f"{HH} a", "rejected": f"{HH.replace('you', 'he')} b"}, "prompts differ"),
    (PAIR, {"prompt": None, "chosen": f"{HH} a\n\nHuman: Hi", "rejected": f"{HH} b"}, "chosen is no answer"),
    (PAIR, {"prompt": None, "chosen": HH, "rejected": f"{HH} b"}, "empty answer: chosen"),
    (CHAT, {"rejected": CHAT["chosen"]}, "chosen equals rejected"),
    (CHAT, {"rejected": [*HISTORY, said("a")]}, "chosen equals rejected"),
    (CHAT, {"rejected": "b"}, "not a list of messages: rejected is a str"),
    (CHAT, {"rejected": []}, "not a list of messages: rejected is empty"),
    (CHAT, {"rejected": [said(" ")]}, "empty answer: rejected[0].content"),
    (CHAT, {"rejected": [user("b")]}, "no assistant turn"),
    (CHAT, {"rejected": [user("b"), said("c")]}, "rejected is no answer: roles after the prompt: user, assistant"),
    (CHAT, {"rejected": [said("b"), user("c")]}, "rejected is no answer: roles after the prompt: assistant, user"),
    (CHAT, {"rejected": [{"role": "gpt", "content": "b"}]}, "unknown role: rejected[0].role"),
    (CHAT, {"rejected": [said("b<|im_end|>")]}, "control token in a message: rejected: message 3"),
    (CHAT, {"chosen": [said("b<|im_end|>")]}, "control token in a message: chosen: message 3"),
    (CHAT, {"rejected": [said("a ")], "chosen": [{**said("a "), "name": "x"}]}, "chosen equals rejected: they differ"),
    (CHAT, {"rejected": [{**said("b"), "train": False}]}, "answer without a trained token"),
    (CHAT, {"prompt": [user("Hi"), {**said("Ho"), "train": True}, user("?")]}, "train = true in a prompt: message 1"),
    (CHAT, {"prompt": None, "chosen": [*HISTORY, said("a")], "rejected": [user("Ho"), said("b")]}, "prompts differ"),
    (CHAT, {"prompt": None}, "no prompt: the row has no prompt"),
    (CHAT, {"tools": 3}, "bad tools"),
    (CHAT, {"weight": -1}, "bad weight"),
    (SHARE, {"rejected": {"from": "gpt"}}, "not a turn: rejected[0]"),
    (SHARE, {"rejected": SHARE["chosen"]}, "chosen equals rejected"),
    (SHARE, {"rejected": human("b")}, "no assistant turn"),
    (TRANSCRIPT, {"rejected": "b"}, "not a transcript: rejected"),
    (TRANSCRIPT, {"rejected": None}, "missing field: 'rejected'; the row has chosen"),
    (TRANSCRIPT, {"prompt": "Hi"}, "not a transcript: the row has a prompt"),
    (TRANSCRIPT, {"rejected": HH.replace("Hi", "Ho") + " b"}, "prompts differ"),
    (TRANSCRIPT, {"rejected": HH}, "empty answer: rejected[3].content"),
    (TRANSCRIPT, {"rejected": f"{HH} b\n\nHuman: Hi"}, "prompts differ"),
    (LABEL, {"label": None}, "missing field: 'label|kto_tag'; the row has"),
    (LABEL, {"label": "yes"}, "label is not true or false: label is 'yes'"),
    (LABEL, {"label": 0.5}, "label is not true or false: label is 0.5"),
    (LABEL, {"label": 2}, "label is not true or false: label is 2"),
    (LABEL, {"label": ...}, "missing field: 'label|kto_tag'"),
    (LABEL, {"completion": " "}, "empty answer: completion"),
    (LABEL, {"prompt": ...}, "no prompt: the row has completion, label"),
    (LABEL, {"prompt": " "}, "no prompt"),
    (LABEL_CHAT, {"messages": [user("Hi"), said("a"), user("b")]}, "no final answer"),
    (LABEL_CHAT, {"messages": [said("a")]}, "no final answer"),
    (LABEL_CHAT, {"messages": "Hi"}, "not a list of messages: messages is a str"),
    (LABEL_CHAT, {"messages": None, "completion": [user("a")], "prompt": HISTORY}, "no assistant turn"),
]


@pytest.mark.parametrize("good, change, message", BAD, ids=[message[:50] for _, _, message in BAD])
def test_a_bad_row_stops_the_run_or_is_counted(tmp_path, good, change, message):
    bad = {key: value for key, value in {**good, **change}.items() if value is not ...}
    answers = "labels" if "label" in good else "pairs"
    with pytest.raises(UserError) as caught:
        build(tmp_path, [good, bad], answers=answers)
    assert message in str(caught.value) and ".jsonl:2: " in str(caught.value) and caught.value.exit_code == DATA
    cache = build(tmp_path, [good, bad, good], answers=answers, on_bad_row="skip")
    entry = cache.manifest["sources"][0]
    assert entry["dropped"] == {message.partition(": ")[0]: 1} and entry["rows_used"] == 2
    assert np.array_equal(cache.ids, build(tmp_path, [good, good], answers=answers).ids)


def test_control_tokens_and_weights_of_both_sides(tmp_path):
    end = "<|im_end|>"
    row = {
        "prompt": HISTORY,
        "chosen": [said(f"a{end}")],
        "rejected": [{**said(f"b{end}"), "weight": 0.5}],
        "weight": 3,
    }
    for policy, ends in (("escape", 4), ("allow", 5)):
        cache = build(tmp_path, [row], control_tokens=policy)
        entry = cache.manifest["sources"][0]
        assert (entry["control_tokens"], entry["strategies"]) == (1, {"tags": 1})  # rows, not documents
        assert [ids.count(TOKENIZER.eos_token_id) for ids, _, _ in documents_of(cache)] == [ends, ends]
        weights = [cache.weights[a:b] for a, b in zip(cache.offsets, cache.offsets[1:])]
        assert set(weights[0]) == {3.0} and set(weights[1]) == {3.0, 1.5}
    cache = build(tmp_path, [{**row, "chosen": [said("a")], "rejected": [said("b")]}] * 2, answers="labels")
    weights = [set(cache.weights[a:b]) for a, b in zip(cache.offsets, cache.offsets[1:])]
    assert weights == [{3.0}, {1.0}] * 4  # what only measures has none


def test_an_answer_of_several_documents_is_refused(tmp_path):
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}(last)"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = replace(TOKENIZER, template=template)
    bad = {**CHAT, "chosen": [said("a"), {"role": "tool", "content": "7"}, said("b")]}
    cache = build(tmp_path, [CHAT, bad], tokenizer, on_bad_row="skip")
    assert cache.manifest["sources"][0]["dropped"] == {"answer of several turns": 1}
    assert "turn by turn" not in "".join(cache.describe()) and len(cache.role) == 2


@pytest.mark.parametrize(
    "row, answers, format, options, message",
    [
        ({"prompt": "a", "completion": "b"}, "pairs", "auto", {}, "of no format with two answers to a prompt"),
        ({"prompt": "a", "completion": "b"}, "labels", "auto", {}, "of no format with answers that are good or bad"),
        ({"messages": HISTORY}, "pairs", "messages", {}, "format = 'messages', but training needs two answers"),
        (LABEL, "pairs", "auto", {}, "of no format with two answers to a prompt"),
        (LABEL, "pairs", "labelled", {}, "format = 'labelled', but training needs two answers to a prompt"),
        (LABEL, "chosen", "labelled", {}, "format = 'labelled', but training needs an answer"),
        (PAIR, "pairs", "auto", {"completion_only_loss": False}, "completion_only_loss = false, but in preference data"),
        (CHAT, "pairs", "auto", {"assistant_only_loss": False}, "assistant_only_loss = false, but in preference data"),
        (CHAT, "both", "auto", {}, "answers = 'both'"),
    ],
)  # fmt: skip
def test_data_that_has_no_preference_is_refused(tmp_path, row, answers, format, options, message):
    with pytest.raises(UserError) as caught:
        build(tmp_path, [row], answers=answers, format=format, **options)
    assert message in str(caught.value)
    if "format" in message:
        assert "preference" in caught.value.hint and ("labelled" in caught.value.hint) == (answers == "labels")


# ------------------------------------------------------------------------------------------------- cut and counted


def test_the_cache_key_knows_the_use_and_the_fingerprint_the_roles(tmp_path):
    source = parse_source(write(tmp_path / "a.jsonl", [PAIR, {**PAIR, "prompt": "Ho"}]))
    keys = {
        cache_key(*hash_files([source]), TOKENIZER, FormatOptions(answers=answers), "error")
        for answers in ("chosen", "pairs", "labels")
    }
    assert len(keys) == 3
    good, bad = (build(tmp_path, [{**LABEL, "label": label}] * 2, answers="labels") for label in (True, False))
    assert np.array_equal(good.ids, bad.ids) and good.fingerprint != bad.fingerprint


WORDS = st.text("ab \n", max_size=30)
MIXED = st.one_of(
    st.fixed_dictionaries({"prompt": WORDS, "chosen": WORDS, "rejected": WORDS}),
    st.fixed_dictionaries({"prompt": st.none(), "chosen": WORDS, "rejected": WORDS}),
    st.fixed_dictionaries({"prompt": WORDS, "chosen": st.just("a b"), "rejected": WORDS, "weight": st.sampled_from([0, 2])}),
    st.sampled_from([{"prompt": "a", "chosen": "b"}, [], {"prompt": "x", "chosen": [said("a")], "rejected": "b"}]),
)  # fmt: skip


@given(
    st.lists(MIXED, max_size=8),
    st.sampled_from(["pairs", "labels"]),
    st.sampled_from([None, 4, 9, 20]),
    st.sampled_from(["right", "left", "drop"]),
    st.sampled_from([0.5, 1.0, 2.5]),
)
@hypothesis_settings(max_examples=60, deadline=None)
def test_every_row_and_token_is_accounted_for(tmp_path_factory, rows, answers, max_length, truncation, weight):
    folder = tmp_path_factory.mktemp("account")
    write(folder / "a.jsonl", [PAIR, {**PAIR, "prompt": "Ho"}, *rows])
    cache = build_cache(
        [parse_source({"path": str(folder / "a.jsonl"), "weight": weight})],
        PLAIN,
        cache_dir=folder / "cache",
        on_bad_row="skip",
        options=FormatOptions(answers=answers),
    )
    try:
        documents, account = select_documents(cache, max_length=max_length, truncation=truncation)
    except UserError as error:
        assert "no row is left" in str(error)
        return
    assert account.rows_read == 2 + len(rows)
    assert account.unit == ("pairs" if answers == "pairs" else "labelled answers")
    assert documents.num_units * 2 == len(documents) == account.num_documents
    assert account.tokens_per_epoch == documents.lengths.sum() == documents.unit_lengths.sum()
    trained = 0
    for unit in range(documents.num_units):
        (a, start, end), (b, other_start, other_end) = (
            (documents.index[n], documents.start[n], documents.end[n]) for n in (2 * unit, 2 * unit + 1)
        )
        assert a % 2 == 0 and b == a + 1 and cache.row[a] == cache.row[b]
        roles = (cache.role[a], cache.role[b])
        assert roles == (CHOSEN, REJECTED) if answers == "pairs" else roles[0] != MISMATCHED == roles[1]
        one, other = (cache.ids[slice(*span)].tolist() for span in ((start, end), (other_start, other_end)))
        flags = [cache.kinds[slice(*span)] >= TRAINED for span in ((start, end), (other_start, other_end))]
        targets = [int(flag[1:].sum()) for flag in flags]  # the first token is never one
        assert min(targets) > 0 and max(len(one), len(other)) <= (max_length or 10**9)
        cuts = [int(flag.argmax()) for flag in flags]
        if truncation == "left":  # each keeps its end
            for ids, document in ((one, a), (other, b)):
                whole = cache.ids[cache.offsets[document] : cache.offsets[document + 1]].tolist()
                assert ids == whole[-(max_length or len(whole)) :]
        else:
            assert one[: cuts[0]] == other[: cuts[1]] and cuts[0] > 0  # the same prompt
        assert answers == "labels" or one != other
        if unit == 0 or documents.index[2 * unit - 2] != a:
            trained += targets[0] + (targets[1] if answers == "pairs" else 0)
    assert account.trained == trained
    assert account.rows_used == len(set(cache.row[documents.index]))
    assert count_tokens(documents).sum(axis=(0, 1)).tolist() == [account.context, account.trained]


def test_reasons_for_which_pairs_are_dropped(tmp_path):
    rows = [
        {"prompt": "Hi", "chosen": " a", "rejected": " b"},
        {"prompt": "q " * 20, "chosen": " a", "rejected": " b"},
        {"prompt": "Hi", "chosen": " a" * 20 + " x", "rejected": " a" * 20 + " y"},
        {"prompt": "Hi", "chosen": " a", "rejected": " a" * 20},
        {"prompt": "Hi", "chosen": " a", "rejected": " b", "weight": 0},
    ]
    cache = build(tmp_path, rows, PLAIN)
    used = {}
    for truncation in ("right", "left", "drop"):
        documents, account = select_documents(cache, max_length=12, truncation=truncation)
        used[truncation] = sorted(set(cache.row[documents.index].tolist()))
        dropped = {k: v for k, v in account.dropped.items() if k != "with nothing to train"}
        assert account.dropped["with nothing to train"] == 1
        used[truncation] = (used[truncation], dropped)
    assert used == {
        "right": ([0, 3], {"whose prompt fills max_length": 1, "equal after the cut": 1}),
        "left": ([0, 1, 2, 3], {}),
        "drop": ([0], {"longer than max_length": 3}),
    }
    with pytest.raises(UserError, match="5 of 10 answers, with their prompts, are longer than max_length = 12"):
        select_documents(cache, max_length=12, truncation="error")
    _, account = select_documents(cache, max_length=12)
    assert account.lines()[0] == (
        "rows: 5 read = 2 used + 3 dropped, 1 whose prompt fills max_length, 1 equal after the cut, 1 with nothing to train"
    )
    assert "in dropped pairs" in account.lines()[1] and "truncated: 1 rows" in account.lines()[2]


def test_truncation_at_the_left_keeps_the_end_of_prompt_and_answer(tmp_path):
    """As TRL's keep_end: each answer alone, also where its prompt is lost; what is dropped has nothing left to train."""
    rows = [
        {"prompt": "one two three", "chosen": " a", "rejected": " b c d e f g"},
        {"prompt": "Hi", "chosen": " a" * 20 + " x", "rejected": " y"},
        {"prompt": "Hi", "chosen": " a" + " b" * 20, "rejected": " c" + " b" * 20},
    ]
    cache = build(tmp_path, rows, PLAIN)
    documents, account = select_documents(cache, max_length=8, truncation="left")
    cut = [cache.ids[a:b].tolist() for a, b in zip(documents.start, documents.end)]
    whole = [as_text(row["prompt"], row[key], None)[0] for row in rows[:2] for key in ("chosen", "rejected")]
    assert cut == [ids[-8:] for ids in whole] and len(whole[1]) > 8
    assert account.dropped == {"equal after the cut": 1} and account.without_prompt == 2
    assert "WARNING: 2 answers fill max_length and are trained without their prompt" in account.lines()
    assert not select_documents(cache, max_length=None)[1].without_prompt


def test_another_rows_long_answer_costs_nothing_but_its_end(tmp_path):
    """It is cut at max_length, and does not count as too long."""
    rows = [{"prompt": "Hi", "completion": " a" * n, "label": True} for n in (3, 4, 40)]
    cache = build(tmp_path, rows, PLAIN, "labels")
    documents, account = select_documents(cache, max_length=16, truncation="drop")
    assert documents.index.tolist() == [0, 1, 2, 3] and account.rows_cut == 0
    assert documents.lengths.tolist()[-1] == 16 and account.cut == np.diff(cache.offsets)[3] - 16
    assert {f.name for f in quick_findings(cache, PLAIN, 16, "right")} == {"too_long", "cut_answer"}
    assert all(f.count == 1 and f.total == 3 for f in quick_findings(cache, PLAIN, 16, "right"))


def test_a_source_weight_repeats_whole_pairs(tmp_path):
    rows = [{**PAIR, "prompt": f"{i}?"} for i in range(10)]
    path = write(tmp_path / "a.jsonl", rows)
    cache = build_cache(
        [parse_source({"path": path, "weight": 2.5})],
        PLAIN,
        cache_dir=tmp_path / "cache",
        options=FormatOptions(answers="pairs"),
    )
    documents, account = select_documents(cache, max_length=None)
    units = documents.index.reshape(-1, 2)
    assert (units[:, 0] % 2 == 0).all() and (units[:, 1] == units[:, 0] + 1).all()
    assert sorted(Counter(units[:, 0].tolist()).values()) == [2] * 5 + [3] * 5
    assert account.num_documents == 50 and "25 pairs" in account.lines()[-1]
    train, held_out = split_documents(documents, 0.3, seed=1)
    assert held_out.num_units == 3 and len(set(held_out.index)) == 6
    assert not set(rows_of(cache)[train.index]) & set(rows_of(cache)[held_out.index])
    assert (train.index.reshape(-1, 2) % 2 == [0, 1]).all() and len(train) + 6 <= 50


# ------------------------------------------------------------------------------------------------- the run's data


def config_of(folder, rows, **overrides):
    write(folder / "pairs.jsonl", rows)
    given = settings(folder, **{"data.train_data": str(folder / "pairs.jsonl"), "trainer_type": "dpo", **overrides})
    return load({}, given, origin="test")[0]


def prepared(config):
    tokenizer, _ = prepare_tokenizer(config)
    train, evals, lines = prepare_data(config, tokenizer)
    return train, evals, "\n".join(lines)


QUESTIONS = [{"prompt": f"{i}? " * (1 + i % 5), "chosen": "yes " * (1 + i % 3), "rejected": "no"} for i in range(30)]


def test_packs_hold_whole_pairs_of_twice_max_length(tmp_path):
    config = config_of(tmp_path, QUESTIONS, **{"data.packing": True, "data.eval_fraction": 0.2})
    train, evals, lines = prepared(config)
    assert train.plan.max_length == 128 and train.documents.num_units == 24 and evals[""].documents.num_units == 6
    assert sorted(train.packs(0).document.tolist()) == list(range(24))  # units
    assert train.plan.num_tokens == train.documents.lengths.sum()
    assert "6 pairs held out for evaluation, 24 are trained" in lines
    assert f"bfd: 24 pairs in {train.plan.num_packs} packs of 128 tokens" in lines
    assert "30 pairs," not in lines  # as many as rows
    train, _, lines = prepared(config_of(tmp_path, QUESTIONS, verbose=True))
    assert train.plan.num_packs == 30 and "0? [yes <|im_end|>]\n0? [no<|im_end|>]" in lines.replace(
        "\n           ", "\n"
    )


def test_kto_asks_for_labels(tmp_path):
    train, _, lines = prepared(config_of(tmp_path, QUESTIONS, **{"dpo.loss_type": ["kto"]}))
    assert train.documents.cache.unit == "labelled answers" and "60 labelled answers, " in lines
    assert "as a good one, the rejected one as a bad one" in lines


def test_an_audit_of_pairs_finds_what_is_there_and_no_more(tmp_path):
    same_chosen = {**QUESTIONS[4], "rejected": "never"}  # another pair
    for answers, copies in (("pairs", 2), ("labels", 3)):  # of single answers the chosen one of that pair is a third
        cache = build(tmp_path, [*QUESTIONS, QUESTIONS[3], same_chosen], PLAIN, answers)
        documents, _ = select_documents(cache, max_length=None)
        (finding,) = all_findings(documents, PLAIN, None, "right")
        assert (finding.name, finding.count, finding.total) == ("duplicate", copies, 64)
        assert (cache.role[list(finding.documents)] != MISMATCHED).all()
    told, *_ = audit_command.audit(config_of(tmp_path, QUESTIONS, **{"data.packing": True}))
    assert told["exceeded"] == [] and told["sets"]["train"]["packing"]["max_length"] == 128
    assert told["sets"]["train"]["packing"]["unpacked"]["packs"] == 30


def test_an_audit_plans_as_the_run_does(tmp_path):
    """A prompt that is shared stands in a pack once."""
    for shared in (True, False):
        keys = {"data.packing": True, "data.max_length": 32, "dpo.share_prompt": shared}
        config = config_of(tmp_path, QUESTIONS, **keys)
        told, run = audit_command.audit(config)[0], prepared(config)[0]
        packed = told["sets"]["train"]["packing"]["packed"]
        assert (packed["packs"], packed["fill"]) == (run.plan.num_packs, round(run.plan.fill, 6))
        assert packed["steps_per_epoch"] == run.steps_per_epoch


def test_findings_name_rows_once(tmp_path):
    long = [{**row, "prompt": "word " * 20} for row in QUESTIONS[:5]]
    told = audit_command.audit(config_of(tmp_path, long + QUESTIONS, **{"data.truncation": "drop"}))[0]
    (finding,) = [f for f in told["sets"]["train"]["findings"] if f["name"] == "too_long"]
    assert finding["count"] == 10
    assert [place[-13:] for place in finding["examples"]] == ["pairs.jsonl:1", "pairs.jsonl:2", "pairs.jsonl:3"]


def test_an_audit_shows_both_answers(tmp_path, capsys):
    config = tmp_path / "dpo.toml"
    keys = {k: v for k, v in settings(tmp_path).items() if k.startswith(("model.tokenizer", "output"))}
    write(tmp_path / "pairs.jsonl", QUESTIONS)
    config.write_text(
        f'trainer_type = "dpo"\noutput_dir = "{keys["output_dir"]}"\n[model]\nconfig = {{}}\n'
        f'tokenizer_name_or_path = "{keys["model.tokenizer_name_or_path"]}"\n'
        f'[data]\ntrain_data = "{tmp_path / "pairs.jsonl"}"\n'
    )
    assert audit_command.main([str(config), "--show", "1", "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "pairs.jsonl:1, chosen\n0? [yes <|im_end|>]" in out and "pairs.jsonl:1, rejected\n0? [no<|im_end|>]" in out
    page = (tmp_path / "page.html").read_text()
    assert page.count(", chosen</span>") == page.count(", rejected</span>") == 30
    assert audit_command.main([str(config), "--row", "pairs.jsonl:2", "--dpo.loss_type", "kto"]) == 0
    out = capsys.readouterr().out
    assert [f"2, {name}" in out for name in ("good", "bad", "with an answer of another row")] == [True] * 3
    assert out.count("[") == 2  # the answers of other rows are not trained


@pytest.mark.parametrize("answers", ["pairs", "labels"])
def test_samples_are_prompts_with_the_chosen_answer(tmp_path, answers):
    path = write(tmp_path / "a.jsonl", [ROWS["implicit"][0], ROWS["implicit"][0]])
    options = FormatOptions(answers=answers)
    (prompt, _) = read_prompts(path, TOKENIZER, options=options, field_map={}, group_field=None)
    assert prompt.answer == "Fine." and prompt.text == TOKENIZER.apply_chat_template(
        HISTORY, add_generation_prompt=True
    )
    path = write(tmp_path / "b.jsonl", [{"question": "a", "answer": "b"}])  # what is asked need not be preferences
    assert read_prompts(path, TOKENIZER, options=options, field_map={}, group_field=None)[0].answer == "b"


# ------------------------------------------------------------------------------------------------- real data


def test_real_pairs_are_used_to_the_last_row(tmp_path, shared_data):
    path = shared_data / "dpo_en_demo.json"
    rows = json.loads(path.read_text(encoding="utf-8"))
    texts = [row[side]["value"] for row in rows[:40] for side in ("chosen", "rejected")]
    tokenizer = train_tokenizer(texts, 800)
    options = FormatOptions(answers="pairs")
    cache = build_cache([parse_source(str(path))], tokenizer, cache_dir=tmp_path, options=options, on_bad_row="skip")
    documents, account = select_documents(cache, max_length=None)
    equal = sum(row["chosen"]["value"] == row["rejected"]["value"] for row in rows)
    assert account.rows_read == len(rows) == account.rows_used + equal and documents.num_units == account.rows_used
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    for unit, row in list(enumerate(r for r in rows if r["chosen"] != r["rejected"]))[::7]:
        prompt = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        for d, side in ((2 * unit, "chosen"), (2 * unit + 1, "rejected")):
            text = tokenizer.apply_chat_template([*prompt, said(row[side]["value"])])
            assert cache.ids[cache.offsets[d] : cache.offsets[d + 1]].tolist() == tokenizer.encode(text)
    assert cache.manifest["sources"][0]["strategies"] == {"tags": account.rows_used}
