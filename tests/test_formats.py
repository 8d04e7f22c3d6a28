"""Formats: what is detected, what is trained, and every way in which a row can be wrong."""

import pytest

from minisft.data.batch import ANSWER, TEXT, TRAINED, USER
from minisft.data.formats import (
    FIELDS,
    FormatOptions,
    Piece,
    RowError,
    check_field_map,
    detect_layout,
    plain_prompt,
    rename_fields,
    to_example,
)
from minisft.errors import UserError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = {
    "input_ids": {"input_ids": [1, 2]},
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "instruction": {"instruction": "Hi", "output": "Hello"},
    "question_answer": {"question": "Hi", "answer": "Hello"},
    "text": {"text": "Hi"},
}


def example(row, format="auto", template=True, **options):
    options = FormatOptions(**options)
    return to_example(row, detect_layout(row, format, options, template), options)


# ---- detection


def test_every_format_is_detected_from_its_row():
    assert list(ROWS) == list(FIELDS)
    for name, row in ROWS.items():
        assert detect_layout(row, "auto", FormatOptions(), True).format == name
        assert detect_layout(row, name, FormatOptions(), True).format == name


def test_what_was_detected_is_one_line_and_names_unused_fields():
    layout = detect_layout({**ROWS["question_answer"], "id": 3}, "auto", FormatOptions(), True)
    assert str(layout) == "question_answer, by the chat template; trained: the answer; fields not used: id"
    layout = detect_layout({**ROWS["text"], "weight": 2}, "auto", FormatOptions(), True)
    assert str(layout) == "text, as text; trained: everything, scaled by the field weight"


@pytest.mark.parametrize(
    "row, options, message",
    [
        ({"txt": "a"}, {}, "txt are those of no known format"),
        ({}, {}, "(none) are those of no known format"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {}, "preference training"),
        (ROWS["text"], {"completion_only_loss": True}, "completion_only_loss = true, but text rows have neither"),
        (ROWS["text"], {"assistant_only_loss": True}, "assistant_only_loss = true"),
        (ROWS["text"], {"completion_only_loss": False, "response_marker": "A:"}, "name a response_marker"),
        (ROWS["text"], {"prompt_format": "chatty"}, "prompt_format"),
        (ROWS["text"], {"dataset_text_field": "body"}, "no known format"),
    ],
)
def test_detection_refuses(row, options, message):
    with pytest.raises(UserError) as caught:
        detect_layout(row, "auto", FormatOptions(**options), True)
    assert message in str(caught.value)


def test_detection_refuses_an_unknown_name_and_a_missing_template():
    with pytest.raises(UserError, match="did you mean 'messages'"):
        detect_layout(ROWS["messages"], "message", FormatOptions(), True)
    for row in (ROWS["messages"], ROWS["sharegpt"], {"prompt": TURNS[:1], "completion": TURNS[1:]}):
        with pytest.raises(UserError, match="need a chat template"):
            detect_layout(row, "auto", FormatOptions(), False)
    with pytest.raises(UserError, match="need a chat template"):
        detect_layout(ROWS["question_answer"], "auto", FormatOptions(prompt_format="chat"), False)


def test_field_map():
    row = {"q": "Hi", "a": "Hello", "id": 1}
    assert rename_fields(row, {"q": "prompt", "a": "completion"}) == {"prompt": "Hi", "completion": "Hello", "id": 1}
    assert rename_fields({"prompt": 1, "text": 2}, {"prompt": "text", "text": "prompt"}) == {"text": 1, "prompt": 2}
    with pytest.raises(RowError, match="missing field: 'x'"):
        rename_fields(row, {"x": "prompt"})
    with pytest.raises(RowError, match="has already"):
        rename_fields({"q": 1, "prompt": 2}, {"q": "prompt"})
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
    layout = detect_layout({"prompt": history, "completion": TURNS[1:]}, "auto", FormatOptions(), True)
    for row in ({"prompt": "Hi", "completion": "Hello"}, {"prompt": history, "completion": "Hello"}):
        with pytest.raises(RowError, match="is a str"):  # every row is like the first
            to_example(row, layout, FormatOptions())


def test_sharegpt_with_tools_and_calls():
    row = {
        "system": "S",
        "tools": '[{"name": "f"}]',
        "conversations": [
            {"from": "human", "value": "?"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "It is 7."},
        ],
    }
    found = example(row)
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert found.tools == [{"name": "f"}]
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert found.messages[2] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert example({**row, "tools": "[]"}).tools is None and example({**row, "tools": ""}).tools is None


def test_openai_tool_calls_get_their_arguments_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    message = example(row).messages[1]
    assert message["content"] == "" and message["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert call["function"]["arguments"] == '{"x": 1}'  # the row itself is left alone


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


def message(role="user", content="Hi", **more):
    return {"role": role, "content": content, **more}


def call(**function):
    return message("assistant", "", tool_calls=[{"function": function}])


BAD_ROWS = [
    ("messages", {"messages": {}}, "messages is a dict"),
    ("messages", {"messages": []}, "messages is empty"),
    ("messages", {"messages": None}, "messages is null"),
    ("messages", {"messages": "[]"}, "messages is a str"),
    ("messages", {"messages": [None]}, "messages[0] is null"),
    ("messages", {"messages": [{"content": "Hi"}]}, "messages[0].role is None"),
    ("messages", {"messages": [{"role": "user"}]}, "messages[0].content is null"),
    ("messages", {"messages": [message("Assistant")]}, "did you mean 'assistant'?"),
    ("messages", {"messages": [message("gpt")]}, "messages[0].role is 'gpt'"),
    ("messages", {"messages": [message(["user"])]}, "unknown role"),
    ("messages", {"messages": [message(content=3)]}, "messages[0].content is a int"),
    ("messages", {"messages": [message(content=["Hi"])]}, "messages[0].content is a list"),
    ("messages", {"messages": [message("system")]}, "no assistant turn: roles: system"),
    ("messages", {"messages": [message()]}, "no assistant turn: roles: user"),
    ("messages", {"messages": [message(), message("assistant", "")]}, "empty answer: messages[1].content"),
    ("messages", {"messages": [message(), message("assistant", " \n")]}, "empty answer"),
    ("messages", {"messages": [message(), message("assistant", None)]}, "messages[1].content is null"),
    ("messages", {"messages": [message(tool_calls=[{"name": "f"}])]}, "tool call by another role"),
    ("messages", {"messages": [message("assistant", tool_calls="f")]}, "tool_calls is a str, not a list"),
    ("messages", {"messages": [message("assistant", tool_calls=["f"])]}, "has no function name"),
    ("messages", {"messages": [call(arguments={})]}, "has no function name"),
    ("messages", {"messages": [call(name="f", arguments="{")]}, "not valid JSON"),
    ("messages", {"messages": [call(name="f", arguments=[1])]}, "arguments is a list, not an object"),
    ("messages", {"messages": TURNS, "tools": "x"}, "not valid JSON: tools"),
    ("messages", {"messages": TURNS, "tools": {"name": "f"}}, "bad tools"),
    ("messages", {"messages": TURNS, "tools": ["f"]}, "bad tools"),
    ("messages", {"text": "Hi"}, "missing field: 'messages'; the row has text"),
    ("messages", {}, "the row has no field"),
    ("sharegpt", {"conversations": []}, "conversations is empty"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0] has no text in `value`"),
    ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from is 'bot'"),
    ("sharegpt", {"conversations": [{"value": "x"}]}, "conversations[0].from is None"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(x)"}]}, "not valid JSON: conversations[0]"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "3"}]}, "has no function name"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "no assistant turn"),
    ("prompt_completion", {"prompt": "Hi", "completion": None}, "completion is null"),
    ("prompt_completion", {"prompt": "Hi", "completion": ""}, "empty answer"),
    ("prompt_completion", {"prompt": 3, "completion": "Hi"}, "prompt is a int"),
    ("prompt_completion", {"prompt": "Hi", "completion": TURNS[1:]}, "completion is a list"),
    ("prompt_completion", {"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt is a list"),
    ("prompt_completion", {"prompt": "Hi"}, "missing field: 'completion'"),
    ("instruction", {"instruction": "Hi", "output": " "}, "empty answer"),
    ("instruction", {"instruction": "", "input": "", "output": "x"}, "empty prompt"),
    ("instruction", {"instruction": "Hi", "input": 3, "output": "x"}, "input is a int"),
    ("instruction", {"instruction": "Hi"}, "missing field: 'output|response'"),
    ("question_answer", {"question": None, "answer": "x"}, "question is null"),
    ("text", {"text": ""}, "empty text"),
    ("text", {"text": " \n"}, "empty text"),
    ("text", {"text": ["a"]}, "text is a list"),
    ("text", {"text": "a", "weight": -1}, "bad weight: -1"),
    ("text", {"text": "a", "weight": True}, "bad weight"),
    ("text", {"text": "a", "weight": "nan"}, "bad weight"),
    ("text", {"text": "a", "weight": 1e39}, "bad weight"),
    ("text", {"text": "a", "weight": None}, "bad weight"),
    ("input_ids", {"input_ids": []}, "not a list of token ids: input_ids"),
    ("input_ids", {"input_ids": "1 2"}, "not a list of token ids"),
    ("input_ids", {"input_ids": [1, 2.0]}, "not a list of token ids"),
    ("input_ids", {"input_ids": [1, True]}, "not a list of token ids"),
    ("input_ids", {"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
    ("input_ids", {"input_ids": [1, 2], "labels": [-100, 3]}, "labels differ from input_ids"),
    ("input_ids", {"input_ids": [1, 2], "labels": [2, -100]}, "labels differ from input_ids"),  # shifted
]


@pytest.mark.parametrize("format, row, message", BAD_ROWS, ids=lambda value: str(value)[:40])
def test_bad_rows_say_what_is_wrong(format, row, message):
    layout = detect_layout(ROWS[format], format, FormatOptions(), True)
    with pytest.raises(RowError) as caught:
        to_example(row, layout, FormatOptions())
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


@pytest.mark.parametrize(
    "content",
    ["a", "x" * 100_000, "\u0000\u0001", "a\u2028\u2029\x85", "\u200f\u200b", "\U0001f600", "e\u0301", "\ud55c"],
)
def test_odd_content_is_kept_as_it_is(content):
    turns = [message(content=content), message("assistant", content)]
    assert example({"messages": turns}).messages == turns
