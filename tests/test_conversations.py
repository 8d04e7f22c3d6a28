"""Conversations: every spelling gives the same messages, nothing is lost, and what cannot be meant is refused."""

import copy
import datetime
import decimal
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.chat.conversations import (
    MAX_DEPTH,
    ROLES,
    SHAREGPT_ROLES,
    check_documents,
    check_messages,
    check_tools,
    check_turns,
    check_variables,
)
from minisft.data.rows import RowError

USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def one(role="assistant", content="Hello", **more):
    """A message as it comes out of a row that holds it."""
    return check_messages([{"role": role, "content": content, **more}], "messages", needs_answer=False)[0]


def text(said, **more):
    return {"type": "text", "text": said, **more}


# ---- properties

not_blank = st.text(min_size=1).filter(str.strip)
plain_messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": not_blank}), min_size=1, max_size=5
)


@settings(deadline=None)  # a busy machine is no failure
@given(plain_messages, st.data())
def test_every_spelling_of_a_conversation_gives_the_same_messages(messages, data):
    """Nulls as a Parquet file writes them, contents cut into parts, ShareGPT turns: all are the messages themselves."""
    speaker = {role: name for name, role in SHAREGPT_ROLES.items() if name not in ("function_call", "tool_call")}
    spellings = [messages, [{**m, "tool_calls": None, "name": None, "train": None} for m in messages]]
    cuts = [data.draw(st.integers(0, len(m["content"]))) for m in messages]
    spellings.append(
        [{**m, "content": [text(m["content"][:cut]), text(m["content"][cut:])]} for m, cut in zip(messages, cuts)]
    )
    for spelling in spellings:
        before = copy.deepcopy(spelling)
        assert check_messages(spelling, "messages", needs_answer=False) == messages
        assert spelling == before  # the row itself is left alone
    if all(m["role"] != "developer" for m in messages):
        turns = [{"from": speaker[m["role"]], "value": m["content"]} for m in messages]
        assert check_turns(turns, "conversations", needs_answer=False) == messages


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(), st.sampled_from([None, True, False])), min_size=1, max_size=6))
def test_part_spans_are_the_parts_that_say_how_they_are_trained(parts):
    content = [text(said) if train is None else text(said, train=train) for said, train in parts]
    found = one("user", content)
    assert found["content"] == "".join(said for said, _ in parts)
    spans = [(found["content"][start:end], train) for start, end, train in found.get("part_spans", [])]
    assert spans == [(said, train) for said, train in parts if train is not None and said]


rich_answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.text()},
    optional={
        "reasoning": st.text(),
        "loss": st.booleans(),
        "weight": st.floats(0, 3e38),
        "tool_calls": st.lists(st.builds(lambda name: {"name": name}, st.text()), min_size=1, max_size=2),
        "name": st.text(),
        "extra": st.none() | st.lists(st.integers()),
    },
)


@settings(deadline=None)
@given(rich_answers)
def test_checked_messages_are_checked_messages(message):
    try:
        (found,) = check_messages([message], "messages")
    except RowError as error:
        assert error.reason == "empty answer" and not message["content"].strip() and "tool_calls" not in message
    else:
        assert check_messages([found], "messages") == [found]


json_objects = st.dictionaries(
    st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=4), max_size=3
)


@settings(deadline=None)
@given(json_objects)
def test_every_spelling_of_a_tool_call_gives_the_same_call(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    written = json.dumps(arguments)
    for spelling in (
        call,
        {**call, "function": {"name": "f", "arguments": written}},
        {"id": "1", "name": "f", "arguments": arguments, "function": None},
        {"id": "1", "name": "f", "arguments": written},
    ):
        assert one(content=None, tool_calls=[spelling]) == {"role": "assistant", "content": "", "tool_calls": [call]}
    call.pop("id")
    turns = [{"from": "function_call", "value": json.dumps({"name": "f", "arguments": arguments})}]
    assert check_turns(turns, "conversations") == [{"role": "assistant", "content": "", "tool_calls": [call]}]


# ---- what becomes of a message


@pytest.mark.parametrize(
    "content",
    [
        "a",
        "x" * 100_000,
        "\u0000\u0001",
        "a\u2028\u2029\x85",
        "\u200f\u200b",
        "\U0001f600",
        "e\u0301",
        "\ud55c",
        " a\n",
    ],
)
def test_odd_content_is_kept_as_it_is(content):
    assert one(content=content) == {"role": "assistant", "content": content}
    assert one(content=[text(content)]) == {"role": "assistant", "content": content}


def test_keys_that_a_template_may_know_are_kept():
    found = one("tool", "7", name="f", tool_call_id="1", annotations=[{"a": None}])
    assert found == {
        "role": "tool", "content": "7", "name": "f", "tool_call_id": "1", "annotations": [{"a": None}],
    }  # fmt: skip


def test_blank_contents_are_fine_where_nothing_is_to_be_learned_from_them():
    for role in ("system", "user", "tool"):
        assert one(role, "")["content"] == ""
    assert one(content=" ", train=False) == {"role": "assistant", "content": " ", "train": False}
    assert one(content="", weight=0) == {"role": "assistant", "content": "", "train": False}


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, {}),
        ({"train": True}, {"train": True}),
        ({"train": False}, {"train": False}),
        ({"training": False}, {"train": False}),
        ({"loss": True}, {"train": True}),
        ({"loss": 0}, {"train": False}),
        ({"train": 1, "loss": True, "training": None}, {"train": True}),
        ({"weight": 1}, {}),  # as in OpenAI's files: trained like any other turn
        ({"weight": 0}, {"train": False}),
        ({"weight": 0.0, "train": True}, {"train": False}),
        ({"weight": 0.5}, {"weight": 0.5}),
        ({"weight": 2, "train": True}, {"train": True, "weight": 2.0}),
    ],
)
def test_train_and_weight_of_a_turn(given, expected):
    plain = {"role": "assistant", "content": "Hello"}
    assert one(**given) == {**plain, **expected}
    assert check_turns([{"from": "gpt", "value": "Hello", **given}], "conversations") == [{**plain, **expected}]


def test_reasoning_under_any_of_its_names():
    expected = {"role": "assistant", "content": "Hello", "reasoning_content": "Hm."}
    for key in ("reasoning_content", "reasoning", "thinking"):
        assert one(**{key: "Hm."}) == expected
        assert check_turns([{"from": "gpt", "value": "Hello", key: "Hm."}], "conversations") == [expected]
    assert one(thinking="Hm.", reasoning="Hm.") == expected
    assert one(content=[{"type": "thinking", "thinking": "Hm."}, text("Hello")]) == expected
    parts = [{"type": "reasoning", "text": "H"}, {"type": "reasoning", "text": "m."}, text("Hello")]
    assert one(content=parts) == expected
    assert one(reasoning_content="")["reasoning_content"] == ""  # not the same as none, to some templates


def test_calls_without_arguments_and_calls_of_two_tools():
    for arguments in (None, "", {}, "{}"):
        call = {"function": {"name": "f", "arguments": arguments}}
        assert one(tool_calls=[call])["tool_calls"] == [
            {"type": "function", "function": {"name": "f", "arguments": {}}}
        ]
    value = '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]'
    (message,) = check_turns([{"from": "tool_call", "value": value}], "conversations")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["f", "g"]
    assert "tool_calls" not in one(tool_calls=[])


def test_tools_are_brought_into_one_form():
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    wrapped = [{"type": "function", "function": function}]
    for tools in (wrapped, [function], json.dumps(wrapped), json.dumps([function])):
        assert check_tools(tools) == wrapped
    for nothing in (None, [], "", " ", "[]", "null"):
        assert check_tools(nothing) is None


def test_documents_and_variables():
    assert check_documents([{"title": "T", "text": "x"}]) == [{"title": "T", "text": "x"}]
    assert check_documents(None) is check_documents([]) is None
    assert check_variables({"enable_thinking": False, "level": None}) == {"enable_thinking": False}
    assert check_variables(None) is check_variables({}) is check_variables({"level": None}) is None


# ---- what is refused


def message(role="user", content="Hi", **more):
    return {"role": role, "content": content, **more}


def answer(**more):
    return message("assistant", "Hello", **more)


def call(**function):
    return answer(tool_calls=[{"function": function}])


deep = []
for _ in range(MAX_DEPTH + 1):
    deep = [deep]

BAD_MESSAGES = [
    ({}, "messages is a dict"),
    ([], "messages is empty"),
    (None, "messages is null"),
    ("[]", "messages is a str"),
    ([None], "messages[0] is null"),
    ([{"from": "human", "value": "Hi"}], 'messages[0] has "from"'),
    ([{"content": "Hi"}], "messages[0].role is None"),
    ([message("Assistant")], "messages[0].role is 'Assistant'; did you mean 'assistant'?"),
    ([message("asistant")], "did you mean 'assistant'?"),
    ([message("gpt")], "messages[0].role is 'gpt'; did you mean 'assistant'?"),
    ([message("Human")], "did you mean 'user'?"),
    ([message("narrator")], "messages[0].role is 'narrator'; known are system, developer, user, assistant, tool"),
    ([message(["user"])], "unknown role"),
    ([message(3)], "messages[0].role is 3"),
    ([{"role": "user"}], "messages[0].content is null"),
    ([message(content=3)], "messages[0].content is an int"),
    ([message(content={"text": "Hi"})], "messages[0].content is a dict"),
    ([message(content=b"Hi")], "messages[0].content is a bytes"),
    ([USER, message("assistant", None)], "messages[1].content is null"),
    ([USER, message("assistant", "")], "empty answer: messages[1].content"),
    ([USER, message("assistant", " \n")], "empty answer"),
    ([USER, message("assistant", [])], "empty answer"),
    ([USER, message("assistant", "", reasoning="Hm.")], "empty answer"),
    ([message("system")], "no assistant turn: roles: system"),
    ([USER, USER], "no assistant turn: roles: user, user"),
    # parts
    ([message(content=["Hi"])], "not a content part: messages[0].content[0] is a str"),
    ([message(content=[{"text": "Hi"}])], "messages[0].content[0].type is None"),
    ([message(content=[text("Hi"), {"type": "image_url", "image_url": {}}])], "content[1].type is 'image_url'"),
    ([message(content=[{"type": "audio"}])], "no images or sound"),
    ([message(content=[text(None)])], "messages[0].content[0].text is null"),
    ([message(content=[text("Hi", train="no")])], "train is not true or false: messages[0].content[0].train is 'no'"),
    ([message(content=[text("Hi", weight=0.5)])], "weight of a part: messages[0].content[0].weight is 0.5"),
    ([message(content=[text("Hi", weight=-1)])], "bad weight: messages[0].content[0].weight"),
    ([message("assistant", [text("Hi"), {"type": "thinking", "thinking": "Hm."}])], "reasoning after the answer"),
    ([message("assistant", [{"type": "thinking", "thinking": 3}])], "messages[0].content[0].thinking is an int"),
    ([message("assistant", [{"type": "thinking", "text": "Hm.", "train": False}])], "train of a reasoning part"),
    # how it is trained
    ([answer(train="yes")], "train is not true or false: messages[0].train is 'yes'"),
    ([answer(train=2)], "messages[0].train is 2"),
    ([answer(loss=0.5)], "messages[0].loss is 0.5"),
    ([answer(train=True, loss=False)], "train given twice: messages[0].loss is False"),
    *[([answer(weight=w)], "bad weight") for w in (-1, True, "1", float("nan"), float("inf"), 1e39, 10**400, [1])],
    # reasoning
    ([answer(reasoning="a", thinking="b")], "reasoning given twice: messages[0] has it as reasoning and thinking"),
    ([answer(reasoning={"effort": "low"})], "messages[0].reasoning is a dict"),
    ([message(reasoning_content="Hm.")], "reasoning of another role: messages[0] has the role 'user'"),
    # tools
    ([message(tool_calls=[{"name": "f"}])], "tool call by another role"),
    ([answer(tool_calls="f")], "tool_calls is a str, not a list"),
    ([answer(tool_calls={"name": "f"})], "tool_calls is a dict, not a list"),
    ([answer(tool_calls=["f"])], "messages[0].tool_calls[0] has no function name"),
    ([answer(tool_calls=[{}])], "has no function name"),
    ([answer(tool_calls=[{"function": "f"}])], "has no function name"),
    ([call(arguments={})], "has no function name"),
    ([call(name="f", arguments="{")], "not valid JSON: messages[0].tool_calls[0].arguments"),
    ([call(name="f", arguments='{"a": 1, "a": 2}')], "occurs twice in one object: 'a'"),
    ([call(name="f", arguments="null")], "arguments is null, not an object"),
    ([call(name="f", arguments=[1])], "arguments is a list, not an object"),
    ([answer(function_call={"name": "f"})], "write calls as tool_calls"),
    ([message("tool", "7", tool_call_id=1)], "messages[0].tool_call_id is an int"),
    ([message(name=["a"])], "messages[0].name is a list"),
    ([message(part_spans=[(0, 1, True)])], "messages[0].part_spans"),
    # what JSON has not
    *[
        ([answer(extra={"when": [value]})], f"not a JSON value: messages[0].extra.when[0] is {what}")
        for value, what in [
            (datetime.date(2024, 1, 1), "a date"),
            (decimal.Decimal(1), "a Decimal"),
            (b"x", "a bytes"),
            (np.float64(1), "a float64"),
            (np.ones(2), "a ndarray"),
            ((1,), "a tuple"),
            (float("nan"), "nan"),
            (float("-inf"), "-inf"),
        ]
    ],
    ([call(name="f", arguments={"when": datetime.datetime(2024, 1, 1)})], "function.arguments.when is a datetime"),
    ([answer(extra={1: 2})], "messages[0].extra has the key 1"),
    ([answer(extra=deep)], "nested too deeply"),
]


@pytest.mark.parametrize("messages, what", BAD_MESSAGES, ids=lambda value: str(value)[:60])
def test_bad_messages_say_what_is_wrong(messages, what):
    with pytest.raises(RowError) as caught:
        check_messages(messages, "messages")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    "turns, what",
    [
        ([], "conversations is empty"),
        ("x", "conversations is a str"),
        ([{"from": "human"}], "conversations[0] has no text in `value`"),
        ([USER], 'conversations[0] has "role"'),
        (["x"], "conversations[0] has no text"),
        ([{"from": "bot", "value": "x"}], "conversations[0].from is 'bot'"),
        ([{"from": "Human", "value": "x"}], "did you mean 'user'?"),
        ([{"value": "x"}], "conversations[0].from is None"),
        ([{"from": ["gpt"], "value": "x"}], "unknown role"),
        ([{"from": "function_call", "value": "f(x)"}], "not valid JSON: conversations[0].value"),
        ([{"from": "function_call", "value": "3"}], "conversations[0].tool_calls[0] has no function name"),
        ([{"from": "function_call", "value": "[]"}], "conversations[0].value has no call"),
        ([{"from": "human", "value": "x"}], "no assistant turn"),
        ([{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}], "empty answer: conversations[1]"),
        ([{"from": "gpt", "value": "x", "loss": 3}], "conversations[0].loss is 3"),
    ],
)
def test_bad_turns_say_what_is_wrong(turns, what):
    with pytest.raises(RowError) as caught:
        check_turns(turns, "conversations")
    assert what in str(caught.value)


def test_a_null_in_documents_and_variables_is_absent():
    assert check_documents([{"title": None, "text": "a"}]) == [{"text": "a"}]
    assert check_variables({"x": None, "y": False}) == {"y": False} and check_variables({"x": None}) is None


@pytest.mark.parametrize(
    "check, value, what",
    [
        (check_tools, "x", "not valid JSON: tools"),
        (check_tools, {"name": "f"}, "bad tools: tools is a dict"),
        (check_tools, 3, "bad tools"),
        (check_tools, ["f"], "bad tools: tools[0] is a str"),
        (check_tools, [{"name": "f"}, {"description": "d"}], "tools[1] has no function name"),
        (check_tools, [{"type": "function", "function": "f"}], "tools[0] has no function name"),
        (check_tools, [{"name": "f", "since": datetime.date(2024, 1, 1)}], "tools[0].function.since is a date"),
        (check_documents, {"title": "T"}, "bad documents"),
        (check_documents, ["T"], "bad documents"),
        (check_documents, [{"score": float("nan")}], "documents[0].score is nan"),
        (check_variables, "x", "bad chat_template_kwargs: they are a str"),
        (check_variables, {"x": b"y"}, "chat_template_kwargs.x is a bytes"),
        (check_variables, {"messages": []}, "a row cannot set 'messages'"),
        (check_variables, {"_minisft_mark": True}, "a row cannot set '_minisft_mark'"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
def test_bad_tools_documents_and_variables_say_what_is_wrong(check, value, what):
    with pytest.raises(RowError) as caught:
        check(value)
    assert what in str(caught.value)
