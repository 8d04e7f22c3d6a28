"""Formats: what is detected, what is trained, and every way in which a row can be wrong."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.data.detect_format import check_field_map, detect_row_format, rename_fields
from minisft.data.formats import FORMATS, TEMPLATE_FIELDS, Example, Format, Piece, plain_prompt, to_example
from minisft.data.kinds import ANSWER, TEXT, TRAINED, USER
from minisft.data.row_format import CHOICES, FormatOptions
from minisft.data.rows import RowError
from minisft.data.sources import Row, parse_source, read_rows
from minisft.errors import UserError

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = {
    "input_ids": {"input_ids": [1, 2]},
    "preference": {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
    "labelled": {"prompt": "Hi", "completion": "Hello", "label": True},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "instruction": {"instruction": "Hi", "output": "Hello"},
    "question_answer": {"question": "Hi", "answer": "Hello"},
    "text": {"text": "Hi"},
}


def made_for(name, **options):
    """The options of a trainer that reads such rows."""
    return FormatOptions(answers="labels" if name == "labelled" else "chosen", **options)


def example(row, format="auto", template=True, **options):
    options = FormatOptions(**options)
    return to_example(row, detect_row_format(row, format, options, template), options)


MASK = st.lists(st.integers(0, 1), min_size=6, max_size=6)


@given(mask=MASK, more=MASK, labels=MASK, left=st.integers(0, 3), right=st.integers(0, 3))
def test_masks_of_ready_tokens_say_the_same_as_labels(mask, more, labels, left, right):
    """What a mask excludes is not trained, and padding is no token of the row."""
    ids = [7, 8, 9, 10, 11, 12]
    on = [a and b and c for a, b, c in zip(mask, more, labels)]
    plain = {"input_ids": ids, "labels": [i if keep else -100 for i, keep in zip(ids, on)]}

    def padded(values: list, pad: int) -> list:
        return [pad] * left + values + [pad] * right

    row = {"input_ids": padded(ids, 0), "labels": padded([i if keep else -100 for i, keep in zip(ids, labels)], -100)}
    row |= {"completion_mask": padded(mask, 0), "assistant_masks": padded(more, 1)}
    row["attention_mask"] = padded([1] * 6, 0)
    assert example(row) == example(plain)
    assert detect_row_format(row, "auto", FormatOptions(), True).ignored == ()


# ---- detection


def test_every_format_is_detected_from_its_row():
    assert list(ROWS) == list(FORMATS)
    for name, row in ROWS.items():
        assert detect_row_format(row, "auto", made_for(name), True).name == name
        assert detect_row_format(row, name, made_for(name), True).name == name


def test_an_entry_in_the_table_is_all_that_a_format_needs(monkeypatch):
    def read(row, row_format, options):
        return [Example((Piece(row["verse"], [(0, len(row["verse"]), TEXT | TRAINED)]),))]

    monkeypatch.setitem(FORMATS, "poem", Format(("verse",), ("poet",), read, has_prompt=False))
    row = {"verse": "So much depends", "poet": "W", "year": 1923, "weight": 2}
    for asked in ("auto", "poem"):
        found = detect_row_format(row, asked, FormatOptions(), True)
        assert str(found).startswith("poem, as text; trained: everything, scaled") and found.ignored == ("year",)
    piece = Piece("So much depends", [(0, 15, TEXT | TRAINED)])
    assert to_example(row, found, FormatOptions()) == Example((piece,), weight=2.0)
    check_field_map({"line": "verse"}, FormatOptions())
    with pytest.raises(UserError, match="verse"):
        detect_row_format({"ode": 1}, "auto", FormatOptions(), True)
    with pytest.raises(UserError, match="two answers to a prompt"):
        detect_row_format(row, "poem", FormatOptions(answers="pairs"), True)


def test_what_was_detected_is_one_line_and_names_unused_fields():
    row_format = detect_row_format({**ROWS["question_answer"], "id": 3}, "auto", FormatOptions(), True)
    assert str(row_format) == "question_answer, by the chat template; trained: the answer; fields not used: id"
    row_format = detect_row_format({**ROWS["text"], "weight": 2}, "auto", FormatOptions(), True)
    assert str(row_format) == "text, as text; trained: everything, scaled by the field weight"


@pytest.mark.parametrize("name", FORMATS)
def test_a_first_row_without_values_is_a_bad_row_of_its_format(name):
    """It has the columns, so no other format is asked for: on_bad_row = "skip" leaves the row to the next one."""
    row = dict.fromkeys(ROWS[name])
    with pytest.raises(RowError, match="missing field: '[a-z_]+' is null"):
        detect_row_format(row, "auto", made_for(name), True)


def test_field_map_takes_the_place_of_a_null_column():
    row = {"query": "a", "reply": "b", "prompt": None}
    names = {"query": "prompt", "reply": "completion"}
    assert rename_fields(row, names) == {"prompt": "a", "completion": "b"}
    assert rename_fields({"prompt": None, "query": "a"}, {"query": "prompt", "prompt": "query"}) == {
        "query": None,
        "prompt": "a",
    }
    with pytest.raises(RowError, match="field_map hides a field"):
        rename_fields(row | {"prompt": ""}, names)


@pytest.mark.parametrize(
    "row, options, message",
    [
        ({"txt": "a"}, {}, "txt are those of no known format"),
        ({}, {}, "(none) are those of no known format"),
        ({"question|answer": "a|b"}, {}, "question|answer are those of no known format"),
        ({"prompt": "a", "chosen": "b"}, {}, "of no known format"),  # not half of a preference
        (ROWS["text"], {"completion_only_loss": True}, "completion_only_loss = true, but text rows have neither"),
        (ROWS["text"], {"assistant_only_loss": True}, "assistant_only_loss = true"),
        (ROWS["text"], {"completion_only_loss": False, "response_marker": "A:"}, "name a response_marker"),
        *[(ROWS["text"], {key: "chatty"}, f"{key} = 'chatty'") for key in CHOICES],
        (ROWS["text"], {"last_turn_only": True}, "last_turn_only = true, but text rows have no turns"),
        (ROWS["text"], {"last_turn_only": True, "response_marker": "A:"}, "last_turn_only = true"),
        (ROWS["messages"], {"last_turn_only": True, "assistant_only_loss": False}, "but everything is trained"),
        (ROWS["text"], {"dataset_text_field": "body"}, "no known format"),
    ],
)
def test_detection_refuses(row, options, message):
    with pytest.raises(UserError) as caught:
        detect_row_format(row, "auto", FormatOptions(**options), True)
    assert message in str(caught.value)
    assert ("a .tsv tabs" in caught.value.hint) == ("|" in next(iter(row), ""))


@pytest.mark.parametrize("name", FORMATS)
def test_every_field_is_read_or_named_as_unused(name):
    """A field that changes the example is not called unused, and one that is called unused changes nothing."""
    values = {
        "tools": [{"name": "f"}],
        "documents": [{"title": "T"}],
        "chat_template_kwargs": {"enable_thinking": False},
        "system": "Be brief.",
        "system_prompt": "Be brief.",
        "instruction": "Add.",
        "question": "How many?",
        "query": "How many?",
        "input": "1 2",
        "context": "1 2",
        "history": [["Hi", "Hello"]],
        "labels": [-100, 2],
        "weight": 0.5,
        "id": 7,
    }
    for template in (True, False):
        options = made_for(name, prompt_format="auto" if template else "plain")
        if not template and name in ("messages", "sharegpt"):
            continue
        without = to_example(ROWS[name], detect_row_format(ROWS[name], name, options, template), options)
        for field, value in values.items():
            row = {**ROWS[name], field: ROWS[name].get(field, value)}
            if field in ROWS[name]:
                continue
            row_format = detect_row_format(row, name, options, template)
            assert (to_example(row, row_format, options) == without) == (field in row_format.ignored), (field, template)
            assert (f"fields not used: {', '.join(row_format.ignored)}" in str(row_format)) == bool(row_format.ignored)


def test_fields_for_the_template_reach_it():
    extra = {"tools": [], "documents": [{"text": "D"}], "chat_template_kwargs": {"enable_thinking": False, "x": None}}
    assert tuple(extra) == TEMPLATE_FIELDS
    found = example({**ROWS["messages"], **extra})
    assert (found.tools, found.documents, found.variables) == (None, [{"text": "D"}], {"enable_thinking": False})
    for row in (ROWS["text"], ROWS["prompt_completion"], ROWS["input_ids"]):  # where no template renders, they are not
        found = example({**row, **extra, "tools": "not JSON"})
        assert (found.tools, found.documents, found.variables) == (None, None, None)


def test_detection_refuses_an_unknown_name_and_a_missing_template():
    with pytest.raises(UserError, match="did you mean 'messages'"):
        detect_row_format(ROWS["messages"], "message", FormatOptions(), True)
    for row in (ROWS["messages"], ROWS["sharegpt"], {"prompt": TURNS[:1], "completion": TURNS[1:]}):
        with pytest.raises(UserError, match="need a chat template"):
            detect_row_format(row, "auto", FormatOptions(), False)
    with pytest.raises(UserError, match="need a chat template"):
        detect_row_format(ROWS["question_answer"], "auto", FormatOptions(prompt_format="chat"), False)


def test_field_map():
    row = {"q": "Hi", "a": "Hello", "id": 1}
    assert rename_fields(row, {"q": "prompt", "a": "completion"}) == {"prompt": "Hi", "completion": "Hello", "id": 1}
    assert rename_fields({"prompt": 1, "text": 2}, {"prompt": "text", "text": "prompt"}) == {"text": 1, "prompt": 2}
    with pytest.raises(RowError, match="missing field: 'x'"):
        rename_fields(row, {"x": "prompt"})
    with pytest.raises(RowError, match="has already"):
        rename_fields({"q": 1, "prompt": 2}, {"q": "prompt"})
    assert rename_fields({"q": 1, "prompt": 2, "id": 3}, {"q": "prompt"}, ("prompt", "id", "x")) == {"prompt": 1}
    check_field_map({"body": "doc"}, FormatOptions(dataset_text_field="doc"))
    with pytest.raises(UserError, match="did you mean 'completion'"):
        check_field_map({"a": "compeltion"}, FormatOptions())
    with pytest.raises(UserError, match="two fields to the same name"):
        check_field_map({"a": "text", "b": "text"}, FormatOptions())


# ---- what becomes of a row


def test_prompt_and_completion_are_two_pieces_used_as_they_are():
    row = {"prompt": " Hi\n", "completion": " Hello "}
    assert example(row).pieces == (Piece(" Hi\n", [(0, 4, USER)]), Piece(" Hello ", [(0, 7, ANSWER | TRAINED)]))
    everything = example(row, completion_only_loss=False).pieces
    assert [piece.spans[0][2] for piece in everything] == [USER | TRAINED, ANSWER | TRAINED]
    assert example(row, assistant_only_loss=False).pieces == everything
    assert len(example({"prompt": "", "completion": "a"}).pieces) == 1  # nothing to encode for an empty prompt


def test_chat_or_plain_is_the_users_choice():
    for row in (ROWS["instruction"], ROWS["question_answer"]):
        assert example(row).messages == TURNS
        assert example(row, prompt_format="plain") == example(row, template=False)
        assert example(row, template=False).pieces[0].text == "### Instruction:\nHi\n\n### Response:\n"
    assert example(ROWS["prompt_completion"]).messages is None
    assert example(ROWS["prompt_completion"], prompt_format="chat").messages == TURNS


def test_instruction_with_input_and_system():
    row = {"instruction": "Add.", "input": "1 2", "response": "3", "system": "Be brief."}
    assert example(row).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]
    assert example(row, template=False).pieces[0].text == (
        "Be brief.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert plain_prompt("Add.", "  ") == plain_prompt("Add.")


def test_prompt_and_completion_of_messages_train_the_completion_only():
    history = [*TURNS, {"role": "user", "content": "And?"}]
    found = example({"prompt": history, "completion": TURNS[1:]})
    assert found.messages == [*history, TURNS[1]] and found.first_trained == 3
    row_format = detect_row_format({"prompt": history, "completion": TURNS[1:]}, "auto", FormatOptions(), True)
    for row in ({"prompt": "Hi", "completion": "Hello"}, {"prompt": history, "completion": "Hello"}):
        with pytest.raises(RowError, match="is a str"):  # every row is like the first
            to_example(row, row_format, FormatOptions())


def test_sharegpt_with_system_and_tools():
    found = example({**ROWS["sharegpt"], "system": "S", "tools": '[{"name": "f"}]'})
    assert found.messages == [{"role": "system", "content": "S"}, *TURNS]
    assert found.tools == [{"type": "function", "function": {"name": "f"}}]


SAID = {name: [{"role": "assistant", "content": name}] for name in ("yes", "no")}
SAID_TURNS = {name: {"from": "gpt", "value": name} for name in ("yes", "no")}


@pytest.mark.parametrize(
    "row, unused",
    [
        ({"prompt": TURNS[:1], "chosen": SAID["yes"], "rejected": SAID["no"]}, "rejected"),
        ({"prompt": TURNS[:1], "chosen": SAID["yes"][0], "rejected": SAID["no"][0]}, "rejected"),
        ({"prompt": "Hi", "chosen": SAID["yes"], "rejected": SAID["no"]}, "rejected"),
        ({"prompt": "Hi", "chosen": TURNS[:1] + SAID["yes"], "rejected": TURNS[:1] + SAID["no"]}, "rejected"),
        ({"chosen": TURNS[:1] + SAID["yes"], "rejected": TURNS[:1] + SAID["no"]}, "rejected"),
        ({"chosen": TURNS[:1] + SAID["yes"], "rejected": 0, "messages": TURNS}, "rejected, messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": SAID_TURNS["yes"], "rejected": 0}, "rejected"),
    ],
    ids=str,
)
def test_of_a_preference_the_chosen_answer_is_trained(row, unused):
    found = example(row)
    assert found.messages == [TURNS[0], *SAID["yes"]] and found.first_trained == 1
    line = f"preference, by the chat template; trained: the chosen answer; fields not used: {unused}"
    assert str(detect_row_format(row, "auto", FormatOptions(), True)) == line
    assert example({**row, "rejected": "whatever"}) == found


def test_a_preference_of_strings_is_like_prompt_and_completion():
    row = ROWS["preference"]
    assert example(row) == example(ROWS["prompt_completion"])
    assert example(row, prompt_format="chat") == example(ROWS["prompt_completion"], prompt_format="chat")
    line = "preference, as text; trained: the chosen answer; fields not used: rejected"
    assert str(detect_row_format(row, "auto", FormatOptions(), False)) == line


SYSTEM = {"role": "system", "content": "S"}
ASKED = {"role": "user", "content": "And?\n\n1 2"}


@pytest.mark.parametrize(
    "columns, prompt, plain",
    [
        ({"instruction": "And?", "input": "1 2"}, [ASKED], plain_prompt("And?", "1 2")),
        ({"question": "And?", "context": "1 2", "system": "S"}, [SYSTEM, ASKED], plain_prompt("And?", "1 2", "S")),
        ({"query": "Hi", "system_prompt": "S"}, [SYSTEM, TURNS[0]], plain_prompt("Hi", "", "S")),
        ({"input": "Hi", "instruction": None}, [TURNS[0]], plain_prompt("Hi")),
        (
            {"instruction": "And?", "context": "1 2", "history": [["Hi", "Hello"]], "system": "S"},
            [SYSTEM, *TURNS, ASKED],
            "S\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n"
            "### Instruction:\nAnd?\n\n### Input:\n1 2\n\n### Response:\n",
        ),
        ({"prompt": "Hi", "system": "S"}, [SYSTEM, TURNS[0]], "S\n\nHi"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_the_columns_of_a_prompt_mean_the_same_in_every_format(columns, prompt, plain):
    """Also where both answers begin alike, which would give another prompt."""
    rows = [({**columns, "chosen": "The yes", "rejected": "The no"}, {"answers": "pairs"})]
    rows.append(({**columns, "completion": "The yes", "label": True}, {"answers": "labels"}))
    rows.append((rows[0][0], {}))
    rows += [({**columns, "answer": "The yes"}, {})] if "question" in columns else []
    rows += [({**columns, "output": "The yes"}, {})] if columns.get("instruction") else []
    rows += [({**columns, "completion": "The yes"}, {})] if "prompt" in columns else []
    for row, options in rows:
        found = example(row, **options)
        assert found.messages == [*prompt, {"role": "assistant", "content": "The yes"}]
        assert found.first_trained in ((0,) if "history" not in columns else (len(prompt),))
        for template in (True, False):
            found = example(row, template=template, prompt_format="plain", **options)
            assert [piece.text for piece in found.pieces] == [plain, "The yes"]
    for side in (TURNS[1], TURNS[1:]):
        found = example({**columns, "chosen": side, "rejected": SAID["no"]}, answers="pairs")
        assert found.messages == [*prompt, TURNS[1]] and found.first_trained == len(prompt)


def test_a_system_column_is_the_system_turn_of_messages():
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    for row in ({"messages": TURNS}, share, {"prompt": TURNS[:1], "completion": TURNS[1:]}, chosen(TURNS)):
        assert example({**row, "system": "S"}).messages == [SYSTEM, *TURNS]
        assert example({**row, "system": " "}).messages == TURNS
    assert example({"messages": [SYSTEM, *TURNS], "system": "S"}).messages == [SYSTEM, *TURNS]  # said twice


def test_the_first_row_may_lack_a_system_prompt():
    first = {"prompt": "Hi", "completion": "Hello", "system": None}
    row_format = detect_row_format(first, "auto", FormatOptions(), True)
    assert to_example(first, row_format, FormatOptions()).messages == TURNS
    assert to_example({**first, "system": "S"}, row_format, FormatOptions()).messages == [SYSTEM, *TURNS]


@pytest.mark.parametrize("column", ["topic", "context", "text", "output"])
def test_a_prompt_is_not_guessed_beside_a_column_that_may_hold_it(column):
    row = {"chosen": "The capital is Paris.", "rejected": "The capital is Lyon."}
    assert [piece.text for piece in example(row, answers="pairs").pieces] == ["The capital is", " Paris."]
    assert example({**row, column: " ", "score": 3}, answers="pairs") == example(row, answers="pairs")
    with pytest.raises(RowError, match=f"no prompt: .*the text of {column} is not used; rename .* ignore = "):
        example({**row, column: "Which city?"}, answers="pairs")


LONG = [*TURNS, {"role": "user", "content": "And a lake."}]


@pytest.mark.parametrize(
    "prompt, before, common",
    [
        ("Hi", LONG, LONG),  # the first question
        ("And a lake.", LONG, LONG),  # the last one
        ("And a lake.", [SYSTEM, *LONG], [SYSTEM, *LONG]),
        ("Hi", LONG[1:], LONG),  # the conversation goes on after it
        ("", LONG, LONG),
    ],
)
def test_a_string_beside_whole_conversations_is_a_label(prompt, before, common):
    row = {"chosen": before + SAID["yes"], "rejected": before + SAID["no"]}
    for name in ("prompt", "instruction"):
        found = example({name: prompt, **row}, answers="pairs")
        assert found.messages == common + SAID["yes"] and found.first_trained == len(common)


def test_null_is_absent_in_every_column_of_every_format():
    """The null columns of one format in the rows of another, as in data sets that were joined, and its own optional ones."""
    columns = {
        name for format in FORMATS.values() for field in format.needs + format.may_have for name in field.split("|")
    }
    for name, row in ROWS.items():
        options = made_for(name)
        nulls = dict.fromkeys(columns - {"system", "system_prompt"} - row.keys())
        for joined in ({**nulls, **row, "weight": None}, {**row, "weight": None, **nulls}):
            row_format = detect_row_format(joined, "auto", options, True)
            assert row_format.name == name
            assert to_example(joined, row_format, options) == example(row, **vars(options))


def test_earlier_turns_of_a_preference_are_context():
    history = [*TURNS, {"role": "user", "content": "And?"}]
    for row in ({"chosen": history + SAID["yes"]}, {"prompt": history, "chosen": history + SAID["yes"]}):
        found = example({**row, "rejected": []})
        assert found.messages == history + SAID["yes"] and found.first_trained == 3
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    found = example({"chosen": [*TURNS[:1], call, {"role": "tool", "content": "7"}, *SAID["yes"]], "rejected": []})
    assert found.first_trained == 1 and len(found.messages) == 4  # the answer is all that follows the question


def test_response_marker():
    text = "<|user|>Q1<|assistant|>A1</s><|user|>Q2<|assistant|>A2"
    options = {"response_marker": "<|assistant|>", "instruction_marker": "<|user|>"}
    (piece,) = example({"text": text}, **options).pieces
    kinds = [TEXT] * len(text)
    for start, end, byte in piece.spans:
        kinds[start:end] = [byte] * (end - start)
    assert "".join(c for c, kind in zip(text, kinds) if kind & TRAINED) == "A1</s>A2"
    (piece,) = example({"text": "Q: 1\nA: 2"}, response_marker="A:").pieces
    assert [piece.text[a:b] for a, b, byte in piece.spans if byte & TRAINED] == [" 2"]


def test_weight():
    assert example({**ROWS["text"], "weight": 0.5}).weight == 0.5
    assert example({**ROWS["text"], "weight": "2"}).weight == 2.0  # as a CSV has it
    assert example(ROWS["text"]).weight == 1.0


def chosen(value, **more):
    return {"chosen": value, "rejected": value, **more}


BAD_ROWS = [
    ("turns", chosen(TURNS[1:]), "no prompt: the row has no prompt"),
    ("turns", chosen(TURNS[0]), "no assistant turn"),
    ("turns", chosen([*TURNS, TURNS[0]]), "chosen is no answer: roles after the prompt: none"),
    ("turns", chosen(TURNS, prompt=TURNS), "chosen is no answer: roles after the prompt: none"),
    ("turns", chosen(TURNS, prompt="Ho"), "chosen is no answer: roles after the prompt: user, assistant"),
    ("turns", chosen(TURNS, prompt=3), "prompt is an int"),
    ("turns", chosen("Hello", prompt="Hi"), "chosen is a str"),
    ("turns", chosen([], prompt="Hi"), "chosen is empty"),
    ("turns", chosen(TURNS[1], conversations=[{"from": "human", "value": "Hi"}]), 'chosen[0] has "role"'),
    ("turns", {"chosen": TURNS}, "missing field: 'rejected'"),
    ("preference", chosen("Hello", prompt=None), "no prompt: its end in the text"),
    ("preference", chosen("Hello"), "no prompt: its end in the text of chosen cannot be found"),
    ("preference", chosen(["Hello"], prompt="Hi"), "chosen is a list"),
    ("preference", chosen(" ", prompt="Hi"), "empty answer"),
    ("messages", {"text": "Hi"}, "missing field: 'messages'; the row has text"),
    ("messages", {}, "the row has no field"),
    ("messages", {"messages": [TURNS[0]]}, "no assistant turn: roles: user"),
    ("messages", {"messages": TURNS, "tools": 3}, "bad tools"),
    ("messages", {"messages": TURNS, "documents": {}}, "bad documents"),
    ("messages", {"messages": TURNS, "chat_template_kwargs": []}, "bad chat_template_kwargs"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "Hi"}], "system": 3}, "system is an int"),
    ("prompt_completion", {"prompt": "Hi", "completion": None}, "missing field: 'completion'; the row has prompt"),
    ("prompt_completion", {"prompt": "Hi", "completion": ""}, "empty answer"),
    ("prompt_completion", {"prompt": 3, "completion": "Hi"}, "prompt is an int"),
    ("prompt_completion", {"prompt": "Hi", "completion": TURNS[1:]}, "completion is a list"),
    ("prompt_completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt is a list"),
    ("prompt_completion", {"prompt": "Hi"}, "missing field: 'completion'"),
    ("instruction", {"instruction": "Hi", "output": " "}, "empty answer"),
    ("instruction", {"instruction": "", "input": "", "output": "x"}, "empty prompt"),
    ("instruction", {"instruction": "Hi", "input": 3, "output": "x"}, "input is an int"),
    ("instruction", {"instruction": "Hi"}, "missing field: 'output|response'"),
    ("question_answer", {"question": None, "answer": "x"}, "missing field: 'question'"),
    ("text", {"text": ""}, "empty text"),
    ("text", {"text": " \n"}, "empty text"),
    ("text", {"text": ["a"]}, "text is a list"),
    ("text", {"text": "a", "weight": -1}, "bad weight: weight is -1"),
    ("text", {"text": "a", "weight": True}, "bad weight"),
    ("text", {"text": "a", "weight": "nan"}, "bad weight"),
    ("text", {"text": "a", "weight": 1e39}, "bad weight"),
    (
        "text",
        {"text": "a", "weight": ""},
        "bad weight: weight is '', not a finite number from 0 up; if the column means",
    ),
    ("instruction", {"instruction": "Hi", "output": "x", "history": "Ho"}, "bad history: not a list of pairs"),
    ("instruction", {"instruction": "Hi", "output": "x", "history": [["a", ""]]}, "bad history: a turn has no text"),
    ("instruction", {"instruction": "Hi", "output": "x", "system": "S", "system_prompt": "T"}, "two system prompts"),
    ("messages", {"messages": [{"role": "system", "content": "S"}, *TURNS], "system": "T"}, "two system prompts"),
    ("question_answer", {"question": "Hi", "answer": "x", "tools": "a, b"}, "not valid JSON: tools: "),
    (
        "question_answer",
        {"question": "Hi", "answer": "x", "documents": ["a"]},
        "leave it out by `ignore` of the source",
    ),
    ("input_ids", {"input_ids": []}, "not a list of token ids: input_ids"),
    ("input_ids", {"input_ids": "1 2"}, "not a list of token ids"),
    ("input_ids", {"input_ids": [1, 2.0]}, "not a list of token ids"),
    ("input_ids", {"input_ids": [1, True]}, "not a list of token ids"),
    ("input_ids", {"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
    ("input_ids", {"input_ids": [1, 2], "labels": [-100, 3]}, "labels differ from input_ids"),
    ("input_ids", {"input_ids": [1, 2], "labels": [2, -100]}, "labels differ from input_ids"),  # shifted
    ("input_ids", {"input_ids": [1, 2], "completion_mask": [1]}, "1 values for 2 input_ids"),
    ("input_ids", {"input_ids": [1, 2], "assistant_masks": [1, 2]}, "not a list of 0 and 1: assistant_masks"),
    ("input_ids", {"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "attention_mask is not that of padding"),
    ("input_ids", {"input_ids": [1, 2], "attention_mask": [0, 0]}, "attention_mask is not that of padding"),
]


@pytest.mark.parametrize("format, row, message", BAD_ROWS, ids=lambda value: str(value)[:40])
def test_bad_rows_say_what_is_wrong(format, row, message):
    first, format = (chosen(TURNS), "preference") if format == "turns" else (ROWS[format], format)
    row_format = detect_row_format(first, format, FormatOptions(), True)
    with pytest.raises(RowError) as caught:
        to_example(row, row_format, FormatOptions())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text, options, message",
    [
        ("no turn", {"response_marker": "A:"}, "no response_marker: 'A:' does not occur"),
        ("A: 1 A: 2", {"response_marker": "A:"}, "several answers"),
        ("Q: 1 A: ", {"response_marker": "A:"}, "empty answer"),
        ("Q: 1 A: Q: 2 A: 3", {"response_marker": "A:", "instruction_marker": "Q:"}, "empty answer"),
    ],
)
def test_a_response_marker_fails_closed(text, options, message):
    with pytest.raises(RowError, match=message):
        example({"text": text}, **options)


# ---- real data


@pytest.mark.parametrize(
    "name, count, line",
    [
        ("gsm8k_train.jsonl", 7473, "question_answer, by the chat template; trained: the answer"),
        ("gsm8k_test.jsonl", 1319, "question_answer, by the chat template; trained: the answer"),
        ("alpaca_en_demo.json", 999, "instruction, by the chat template; trained: the answer"),
        (
            "dpo_en_demo.json",
            299,
            "preference, by the chat template; trained: the chosen answer; fields not used: rejected",
        ),
        ("glaive_toolcall_en_demo.json", 300, "sharegpt, by the chat template; trained: the assistant's turns"),
    ],
)
def test_every_row_of_the_shared_data_is_read(name, count, line):
    if not (DATA / name).is_file():
        pytest.skip("the shared data is not here")
    rows = list(read_rows(parse_source(str(DATA / name))))
    assert len(rows) == count and all(isinstance(row, Row) for row in rows)
    row_format = detect_row_format(rows[0].data, "auto", FormatOptions(), True)
    assert str(row_format) == line
    dropped = Counter()
    for row in rows:
        try:
            found = to_example(row.data, row_format, FormatOptions())
        except RowError as error:
            dropped[error.reason] += 1
            continue
        if "conversations" in row.data:  # nothing that was said is lost
            said = [turn["value"] for turn in row.data["conversations"]]
            said += [row.data["chosen"]["value"]] if "chosen" in row.data else []
            kept = [_call_as_text(message) or message["content"] for message in found.messages]
            assert [_spelling(text) for text in kept] == [_spelling(text) for text in said]
            assert len(found.tools or []) == len(json.loads(row.data.get("tools", "[]")))
    assert dropped == {}


def _call_as_text(message):
    return json.dumps(message["tool_calls"][0]["function"]) if "tool_calls" in message else ""


def _spelling(text):
    """Text, or JSON in one spelling."""
    try:
        return json.loads(text)
    except ValueError:
        return text
