"""Conversations as tokens: control tokens, weights, documents turn by turn, and what is left of too long ones."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from minisft.answers import prompt_ids
from minisft.data.cache import build_cache
from minisft.data.chat.conversations import check_messages
from minisft.data.chat.masks import render_conversation
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.documents import rows_of, select_documents, split_documents
from minisft.data.encoding import conversation_pieces, encode_pieces
from minisft.data.formats import Example
from minisft.data.kinds import ANSWER, KIND_MASK, TERMINATOR, TRAINED, USER
from minisft.data.row_format import FormatOptions
from minisft.data.rows import RowError
from minisft.data.sources import parse_source
from minisft.data.tokenizer import train_tokenizer
from minisft.errors import UserError
from minisft.samples import read_prompts

TOKENIZER = train_tokenizer(["Hello, how are you? I am fine.", "<|im_end|> |im im_end"] * 5, 300)
SPECIAL_IDS = {TOKENIZER.backend.token_to_id(text) for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
# Renders an earlier answer without the "(last)" that it has when it is asked for: no joint rendering is exact.
LAST_DIFFERS = ChatTemplate(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}(last)"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def encode(messages, tokenizer=TOKENIZER, train_on="assistant", **options):
    example = Example(messages=check_messages(messages, "messages"))
    rendered = conversation_pieces(tokenizer, example, FormatOptions(**options), train_on)
    return rendered, encode_pieces(tokenizer, rendered.pieces)


def trained_text(encoded, tokenizer=TOKENIZER) -> str:
    return tokenizer.decode(encoded.ids[encoded.kinds >= TRAINED])


def build(tmp_path, rows, tokenizer=TOKENIZER, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    on_bad_row = options.pop("on_bad_row", "error")
    cache_dir = tmp_path / "cache"
    options = FormatOptions(**options)
    return build_cache(
        [parse_source(str(path))], tokenizer, cache_dir=cache_dir, on_bad_row=on_bad_row, options=options
    )


# ------------------------------------------------------------------------------------------------- control tokens


@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "a", " ", "\n", "<", "|im_end|>", "\u00e4"]), max_size=8),
    st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_an_escaped_control_token_is_text(parts, place):
    """Wherever one is written: the same text, no special token but the template's own, the answers trained."""
    contents = ["one", "two", "three", "four"]
    contents[place] = "x" + "".join(parts) + "y"
    plain, _ = encode(turns("one", "two", "three", "four"))
    rendered, (encoded,) = encode(turns(*contents), control_tokens="escape")
    assert TOKENIZER.decode(encoded.ids) == rendered.pieces[0].text == render(TOKENIZER.template, turns(*contents))
    assert sum(int(i) in SPECIAL_IDS for i in encoded.ids) == plain.pieces[0].text.count("<|im_")
    assert trained_text(encoded) == f"{contents[1]}<|im_end|>{contents[3]}<|im_end|>"
    assert rendered.has_control_tokens == bool(TOKENIZER.control_tokens.search(contents[place]))
    is_end = np.isin(encoded.ids, TOKENIZER.eos_token_id)
    assert set(encoded.kinds[is_end] & KIND_MASK) <= {TERMINATOR, 2}  # 2 = header: the end of a question


def test_what_is_between_special_tokens_is_encoded_as_ordinary_text():
    """As a server does that encodes a whole content without looking for special tokens in it."""
    content = "Hello<|im_end|>, how are you?"
    _, (encoded,) = encode(turns(content, "two"), control_tokens="escape")
    alone = TOKENIZER.literal_backend.encode("user\n" + content, add_special_tokens=False).ids
    assert encoded.ids[1 : 1 + len(alone)].tolist() == alone


def test_policies_for_control_tokens(tmp_path):
    rows = [{"messages": turns("a<|im_end|>", "b")}, {"messages": turns("a", "b")}]
    with pytest.raises(UserError, match="rows.jsonl:1: control token in a message"):
        build(tmp_path, rows)
    for policy, ends in (("escape", 2), ("allow", 3)):
        cache = build(tmp_path, rows, control_tokens=policy)
        entry = cache.manifest["sources"][0]
        assert entry["control_tokens"] == 1 and "1 rows contain the text of a control token" in "\n".join(
            cache.describe()
        )
        assert (cache.ids[: cache.offsets[1]] == TOKENIZER.eos_token_id).sum() == ends


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a", "reasoning_content": "b<|im_end|>"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}],
        },
    ],
)
def test_control_tokens_are_found_in_every_string_of_a_message(message):
    messages = [turns("q")[0], message]
    with pytest.raises(RowError, match="control token in a message"):
        encode(messages)
    _, (encoded,) = encode(messages, control_tokens="escape")
    assert (encoded.ids == TOKENIZER.eos_token_id).sum() == 2
    assert "<|im_end|>" in trained_text(encoded).removesuffix("<|im_end|>")


def test_control_tokens_are_found_in_names_tools_and_documents():
    call = {"function": {"name": "f", "arguments": {"<|im_end|>": 1}}}
    messages = [turns("q")[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(RowError, match="control token in a message: message 1 contains"):
        encode(messages)
    tools = [{"type": "function", "function": {"name": "f", "description": "ends in <|im_end|>"}}]
    for place, value in (("tools", tools), ("documents", [{"text": "<|im_end|>"}])):
        example = Example(messages=turns("a", "b"), **{place: value})
        with pytest.raises(RowError, match=f"control token in a message: {place} contains"):
            conversation_pieces(TOKENIZER, example, FormatOptions(), "assistant")
        (piece,) = conversation_pieces(TOKENIZER, example, FormatOptions(control_tokens="escape"), "assistant").pieces
        (encoded,) = encode_pieces(TOKENIZER, [piece])
        assert (
            TOKENIZER.decode(encoded.ids)
            == piece.text
            == render(TOKENIZER.template, **{"messages": turns("a", "b"), place: value})
        )
        assert (encoded.ids == TOKENIZER.eos_token_id).sum() == (3 if place == "tools" else 2)  # those of the template


def metaspace(**flags):
    """A tokenizer that writes a space before the first word of a text, but not after a special token."""
    characters = sorted(set("\u2581abxy<|>_imendstru\n"))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["[UNK]", *characters])}, merges=[], unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken(t, normalized=False, **flags) for t in ("<|im_start|>", "<|im_end|>")])
    return replace(TOKENIZER, backend=backend)


@pytest.mark.parametrize("flags", [{}, {"rstrip": True}, {"lstrip": True}])
@pytest.mark.parametrize(
    "content", ["<|im_end|>", "a <|im_end|>", "<|im_end|> b", " a<|im_end|>\n<|im_start|>b", "\n<|im_end|>\n"]
)
def test_escaping_changes_nothing_but_the_control_token(content, flags):
    """With tokenizers to which it matters what is before a text, and whose special tokens swallow whitespace: the
    same tokens as for a text with an ordinary character in its place."""
    tokenizer = metaspace(**flags)
    _, (escaped,) = encode(turns("x", content, "y", "x"), tokenizer, control_tokens="escape")
    broken = content.replace("<|im_", "<|xm_")  # as long, and no control token
    _, (plain,) = encode(turns("x", broken, "y", "x"), tokenizer)
    i, x = tokenizer.backend.token_to_id("i"), tokenizer.backend.token_to_id("x")
    differ = escaped.ids != plain.ids
    assert set(escaped.ids[differ]) == {i} and set(plain.ids[differ]) == {x} and differ.sum() == content.count("<|im_")
    assert escaped.kinds.tolist() == plain.kinds.tolist()


def test_escaping_looks_at_every_token_a_few_times_only():
    """And not at all of them for each: 20,000 tokens in a row took three minutes."""

    class Counted(list):
        seen = 0

        def __iter__(self):
            for place in super().__iter__():
                self.seen += 1
                yield place

    example = Example(messages=turns("<|im_end|> a" * 200, "two"))
    (piece,) = conversation_pieces(TOKENIZER, example, FormatOptions(control_tokens="escape"), "assistant").pieces
    piece = replace(piece, literal=Counted(piece.literal))
    encode_pieces(TOKENIZER, [piece])
    assert len(piece.literal) == 200 and piece.literal.seen < 1000


def test_a_template_that_changes_a_control_token_refuses_to_escape_it(tmp_path):
    looks = "{% if '<|im_end|>' in m.content %}!{% endif %}"
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}" + looks + "{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a<|im_end|>", "b")}]
    cache = build(
        tmp_path,
        rows,
        replace(TOKENIZER, template=template),
        control_tokens="escape",
        on_bad_row="skip",
        assistant_only_loss=False,
    )
    assert cache.manifest["sources"][0]["dropped"] == {"control token that cannot be escaped": 1}


def test_a_tokenizer_that_cannot_escape_drops_the_row(tmp_path):
    vocab = {t: i for i, t in enumerate(["[UNK]", "a", "b", "user", "assistant"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a <|im_end|>", "b")}]
    cache = build(tmp_path, rows, replace(TOKENIZER, backend=backend), control_tokens="escape", on_bad_row="skip")
    entry = cache.manifest["sources"][0]
    assert entry["dropped"] == {"control token that cannot be escaped": 1} and entry["rows_used"] == 1


@pytest.mark.parametrize(
    "row, is_refused, ends, ends_escaped, counted",
    [
        ({"instruction": "<|im_end|>", "output": "b"}, True, 2, 1, (1, 1)),
        ({"question": "a", "answer": "b<|im_end|>c"}, True, 2, 1, (1, 1)),
        ({"prompt": "a<|im_end|>", "completion": "b"}, False, 2, 1, (0, 1)),  # strings that are used as they are
        ({"prompt": "a", "completion": "b<|im_end|>"}, False, 1, 1, (0, 1)),  # its own EOS is not doubled
        ({"text": "a<|im_end|>b"}, False, 2, 2, (0, 0)),  # part of plain text
    ],
)
def test_control_tokens_outside_of_templates(tmp_path, row, is_refused, ends, ends_escaped, counted):
    """counted: as a row with control tokens, where they become tokens and where they are escaped."""
    if is_refused:
        with pytest.raises(UserError, match="control token in a message: the row contains '<.im_end.>'"):
            build(tmp_path, [row], prompt_format="plain")
    else:
        cache = build(tmp_path, [row], prompt_format="plain")
        assert (cache.ids == TOKENIZER.eos_token_id).sum() == ends
        assert cache.manifest["sources"][0]["control_tokens"] == 0
    for policy, expected, count in (("allow", ends, counted[0]), ("escape", ends_escaped, counted[1])):
        cache = build(tmp_path, [row], prompt_format="plain", control_tokens=policy)
        assert (cache.ids == TOKENIZER.eos_token_id).sum() == expected
        assert cache.manifest["sources"][0]["control_tokens"] == count


ICONS = "\U000f0000\U000f033d\U000ffffd\U00100000\U00100001\U00100003\U0010fff0\U0010fff1\U0010fff2\U0010fffd"


@pytest.mark.parametrize("layout", ["chat", "instruction", "plain"])
def test_the_prompt_at_inference_has_the_tokens_of_training(tmp_path, layout):
    asked, tools = "One<|im_end|>two", [{"name": "<|im_start|>", "parameters": {}}]
    rows = {
        "chat": [
            {
                "messages": [{"role": "system", "content": "<|endoftext|>"}, *turns(asked, "b", "c", "d")],
                "tools": tools,
            },
            {"messages": turns(asked, "b")},
        ],
        "instruction": [
            {"instruction": asked, "input": "<|im_start|>", "output": "d"},
            {"question": asked, "answer": "d"},
        ],
        "plain": [{"prompt": asked, "completion": "d"}],
    }[layout]
    tokenizer = replace(
        TOKENIZER, prefix_ids=[TOKENIZER.eos_token_id], template=TOKENIZER.template if layout == "chat" else None
    )
    for row in rows:
        seen = []
        for policy in ("escape", "allow"):
            options = FormatOptions(control_tokens=policy)
            cache = build(tmp_path, [row], tokenizer, control_tokens=policy)
            given = {"options": options, "field_map": {}, "group_field": None}
            (prompt,) = read_prompts(str(tmp_path / "rows.jsonl"), tokenizer, **given)
            trained = np.flatnonzero(cache.kinds >= TRAINED)
            last = trained[np.flatnonzero(np.diff(trained, prepend=-9) > 1)[-1]]  # where the last answer begins
            assert prompt.ids == cache.ids[:last].tolist() and asked in prompt.text
            seen.append(prompt.ids)
        assert seen[0] != seen[1]
    for is_escaped, ids in zip((True, False), seen):  # `minisft generate`, of the last row
        assert prompt_ids(tokenizer, [{"role": "user", "content": asked}], layout, is_escaped) == ids
    if layout != "plain":
        with pytest.raises(UserError, match="rows.jsonl:1: control token in a message"):
            read_prompts(str(tmp_path / "rows.jsonl"), tokenizer, **(given | {"options": FormatOptions()}))


TELLS_KEYS = ChatTemplate(  # shows the template's input
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ m | list | length }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant 2\n{% endif %}"
)


@pytest.mark.parametrize("reasoning", ["train", "mask", "strip"])
@pytest.mark.parametrize("template", [TOKENIZER.template, TELLS_KEYS], ids=["chatml", "keys"])
def test_the_prompt_of_a_held_out_conversation_is_rendered_as_in_training(tmp_path, template, reasoning):
    tokenizer = replace(TOKENIZER, template=template)
    messages = turns("q", "<think>how</think>\n\na", "r", "<think>why</think>\n\nb")
    messages[1]["weight"], messages[2]["train"] = 2, False
    options = FormatOptions(reasoning=reasoning, last_turn_only=True)
    cache = build(tmp_path, [{"messages": messages}], tokenizer, reasoning=reasoning, last_turn_only=True)
    path = str(tmp_path / "rows.jsonl")
    (prompt,) = read_prompts(path, tokenizer, options=options, field_map={}, group_field=None)
    ids = cache.ids.tolist()
    assert ids[: len(prompt.ids)] == prompt.ids and ("how" in prompt.text) == (reasoning != "strip")
    assert tokenizer.decode(ids[len(prompt.ids) :]).strip() == prompt.answer + "<|im_end|>"
    assert prompt.answer == ("b" if reasoning == "strip" else messages[3]["content"])


def test_a_held_out_conversation_ends_with_an_answer_in_words(tmp_path):
    """Else there is nothing to complete, or nothing to compare a completion with."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    for messages in (turns("a", "b", "c"), [{"role": "assistant", "content": "a"}], [*turns("a"), call]):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        with pytest.raises(UserError, match="rows.jsonl:1: nothing to complete"):
            read_prompts(
                str(tmp_path / "rows.jsonl"), TOKENIZER, options=FormatOptions(), field_map={}, group_field=None
            )


@pytest.mark.parametrize("policy", ["error", "escape"])
@pytest.mark.parametrize("template", [TOKENIZER.template, LAST_DIFFERS], ids=["tags", "per turn"])
def test_private_characters_of_a_row_are_text_like_any_other(template, policy):
    """The icons of fonts, and all characters that mark places in rows without them: the tokens and kinds of other letters."""
    tokenizer = replace(TOKENIZER, template=template)
    token = "<|im_end|>" if policy == "escape" else ""
    for name in ("content", "tools", "answer"):
        texts = {"content": "x", "tools": "x", "answer": "x"}

        def rendered(icons, texts=texts, name=name):
            texts = {**texts, name: f"a{icons}{token}{icons}b"}
            tools = [{"type": "function", "function": {"name": texts["tools"]}}]
            messages = turns(f" {texts['content']}\n", texts["answer"], "y", "z")
            options = FormatOptions(control_tokens=policy)
            return conversation_pieces(tokenizer, Example(messages=messages, tools=tools), options, "assistant")

        found, plain = rendered(ICONS), rendered("i" * len(ICONS))
        for ours, theirs in zip(found.pieces, plain.pieces, strict=True):
            assert ours.text.replace(ICONS, "i" * len(ICONS)) == theirs.text and ICONS in ours.text or name == "tools"
            assert (ours.spans, ours.weights, ours.literal) == (theirs.spans, theirs.weights, theirs.literal)
        assert found.strategy == plain.strategy and found.has_control_tokens == bool(token)
        for ours, piece in zip(encode_pieces(tokenizer, found.pieces), found.pieces):
            assert tokenizer.decode(ours.ids) == piece.text and not ours.straddling


def test_rows_without_control_tokens_are_not_rewritten(monkeypatch):
    monkeypatch.setattr("minisft.data.encoding._escapes", None)
    monkeypatch.setattr("minisft.data.encoding._escaped", None)
    encode(turns("a" + ICONS, "b"), control_tokens="escape")


@pytest.mark.parametrize("start", ["", "\U000ffffd", "x\U000f0000 "])
def test_private_characters_beside_escaped_tokens_in_plain_rows(tmp_path, start):
    row = {"prompt": f"{start}a<|im_end|>", "completion": f"{start}<|im_end|>b"}
    cache = build(tmp_path, [row], prompt_format="plain", control_tokens="escape", add_eos=False)
    assert TOKENIZER.decode(cache.ids) == row["prompt"] + row["completion"] and not SPECIAL_IDS & set(
        cache.ids.tolist()
    )


def test_first_turns_that_had_to_become_context_are_counted(tmp_path):
    template = ChatTemplate("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")  # a turn has no header
    rows = [{"messages": [{"role": "assistant", "content": "Hi"}, *turns("a", "b")]}, {"messages": turns("a", "b")}]
    lines = build(tmp_path, rows, replace(TOKENIZER, template=template)).describe()
    assert [
        line for line in lines if line.startswith("1 conversations begin with the assistant, and this turn is context")
    ]


# ------------------------------------------------------------------------------------------------- weights and flags


def test_the_weight_of_a_message_reaches_its_tokens(tmp_path):
    messages = turns("one", "two", "three", "four")
    messages[1]["weight"] = 0.5
    plain = {"messages": turns("one", "two")}
    cache = build(tmp_path, [plain, {"messages": messages, "weight": 3.0}, plain])
    ids, weights = (array[cache.offsets[1] : cache.offsets[2]] for array in (cache.ids, cache.weights))
    assert TOKENIZER.decode(ids[weights == 1.5]) == "two<|im_end|>" and set(weights) == {1.5, 3.0}
    assert (cache.weights[: cache.offsets[1]] == 1).all() and (cache.weights[cache.offsets[2] :] == 1).all()
    assert len(cache.weights) == len(cache.ids)


def test_flags_of_a_message(tmp_path):
    messages = turns("one", "two", "three", "four")
    messages[1]["train"] = False
    messages[2]["train"] = True
    _, (encoded,) = encode(messages)
    assert trained_text(encoded) == "threefour<|im_end|>"
    kinds = encoded.kinds[encoded.kinds >= TRAINED] & KIND_MASK
    assert set(kinds) == {USER, ANSWER, TERMINATOR}


def test_parts_that_are_not_trained():
    parts = [{"type": "text", "text": "Hello,"}, {"type": "text", "text": " how are you", "train": False}]
    _, (encoded,) = encode([turns("q")[0], {"role": "assistant", "content": parts}])
    assert trained_text(encoded) == "Hello,<|im_end|>"


@pytest.mark.parametrize("role, kind", [("user", USER), ("assistant", ANSWER)])
def test_parts_that_are_trained_in_a_message_that_is_not(role, kind):
    parts = [{"type": "text", "text": "Hello,"}, {"type": "text", "text": " you", "train": True}]
    conversation = turns("q", "a", "r", "b")
    message = conversation[0 if role == "user" else 1]
    message |= {"content": parts, "train": False}
    _, (encoded,) = encode(conversation)
    is_trained = encoded.kinds >= TRAINED
    first = " you" + ("a<|im_end|>" if role == "user" else "")
    assert trained_text(encoded) == first + "b<|im_end|>"
    assert encoded.kinds[is_trained.argmax()] & KIND_MASK == kind


def test_parts_keep_their_places_where_control_tokens_are_escaped():
    parts = [
        {"type": "text", "text": "a<|im_end|>b", "train": False},
        {"type": "text", "text": "c<|im_end|>"},
        {"type": "text", "text": "d", "train": False},
    ]
    messages = [turns("q")[0], {"role": "assistant", "content": parts}]
    _, (encoded,) = encode(messages, control_tokens="escape")
    assert trained_text(encoded) == "c<|im_end|><|im_end|>" and (encoded.ids == TOKENIZER.eos_token_id).sum() == 2
    parts[:] = [{"type": "text", "text": "a<|im_"}, {"type": "text", "text": "end|>b", "train": False}]
    with pytest.raises(RowError, match="control token in a message: it is in two parts"):
        encode(messages, control_tokens="escape")


# ------------------------------------------------------------------------------------------------- turn by turn


def test_a_row_that_gives_several_documents(tmp_path):
    tokenizer = replace(TOKENIZER, template=LAST_DIFFERS)
    rows = [{"messages": turns("1", "2", "3", "4")}, {"messages": turns("5", "6")}, {"messages": turns(*"abcdef")}]
    cache = build(tmp_path, rows, tokenizer)
    entry = cache.manifest["sources"][0]
    assert (entry["rows_read"], entry["rows_used"], entry["documents"]) == (3, 3, 6)
    assert entry["strategies"] == {"per_turn": 2, "prefix": 1}
    assert rows_of(cache).tolist() == [0, 0, 1, 2, 2, 2]
    texts = [tokenizer.decode(cache.ids[a:b]) for a, b in zip(cache.offsets, cache.offsets[1:])]
    prompt = render(LAST_DIFFERS, turns("1", "2", "3"), add_generation_prompt=True)
    assert texts[1] == prompt + "(last)4<|im_end|>\n" and texts[0].endswith("(last)2<|im_end|>\n")
    documents, account = select_documents(cache, max_length=None)
    assert account.rows_used == 3 and account.num_documents == 6
    train, held_out = split_documents(documents, 0.34, seed=0)  # a row is on one side only
    assert not set(rows_of(cache)[train.index]) & set(rows_of(cache)[held_out.index])
    # A limit that drops one document of a row keeps the row; the account still closes.
    _, account = select_documents(cache, max_length=max(np.diff(cache.offsets)) - 1, truncation="drop")
    assert account.rows_used == 3 and account.dropped == {} and account.dropped_answers == 1


@pytest.mark.parametrize("multi_turn", ["auto", "joint", "per_turn"])
def test_a_row_with_nothing_to_train_is_dropped_however_turns_are_found(tmp_path, multi_turn):
    silent = [{**message, "train": False} for message in turns("1", "2", "3", "4")]
    cache = build(tmp_path, [{"messages": silent}, {"messages": turns("5", "6")}], multi_turn=multi_turn)
    _, account = select_documents(cache, max_length=None)
    assert (account.rows_used, account.dropped) == (1, {"with nothing to train": 1})
    cut = build(tmp_path, [{"messages": silent}], multi_turn=multi_turn, turns_max_length=40)  # 4 turns are 46 tokens
    assert (cut.kinds < TRAINED).all() and cut.manifest["sources"][0]["turns_cut"]["rows"] == 1


def test_joint_refuses_what_auto_renders_turn_by_turn(tmp_path):
    tokenizer = replace(TOKENIZER, template=LAST_DIFFERS)
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*differently than at inference: message 1 once other turns"):
        build(tmp_path, [{"messages": turns("1", "2", "3", "4")}], tokenizer, multi_turn="joint")


# ------------------------------------------------------------------------------------------------- oldest turns first


@given(st.integers(1, 6), st.integers(23, 120), st.booleans())
@settings(max_examples=30, deadline=None)
def test_oldest_turns_are_cut_as_few_as_possible(tmp_path_factory, num_turns, limit, has_system):
    contents = [f"{'question' if i % 2 == 0 else 'answer'} {i}" for i in range(2 * num_turns)]
    messages = [{"role": "system", "content": "Be brief."}] * has_system + turns(*contents)
    folder = tmp_path_factory.mktemp("turns")
    rows = [{"messages": turns("a", "b")}, {"messages": messages}]  # the first is always short enough
    whole = build(folder, rows)
    cache = build(folder, rows, turns_max_length=limit, on_bad_row="skip")
    entry = cache.manifest["sources"][0]

    def rendered(cut: int) -> list[int]:
        kept = messages[:has_system] + messages[has_system + 2 * cut :]
        return TOKENIZER.encode(render_conversation(TOKENIZER.template, kept)[0].text)

    fitting = [cut for cut in range(num_turns) if len(rendered(cut)) <= limit]
    if not fitting:
        assert entry["dropped"] == {"too long even without its earlier turns": 1}
    else:
        assert cache.ids[cache.offsets[1] :].tolist() == rendered(fitting[0])
        assert entry["turns_cut"]["turns"] == fitting[0]
        lost = entry["turns_cut"]["tokens"]
        assert len(cache.ids) + lost == len(whole.ids)
        line = f"1 conversations are without their oldest {fitting[0]} turns, {lost} tokens"
        assert (line in cache.describe()) == (fitting[0] > 0)
    _, account = select_documents(cache, max_length=limit, truncation="turns")
    assert account.tokens == len(cache.ids) + entry["turns_cut"]["tokens"]
    assert account.cut == entry["turns_cut"]["tokens"] and account.rows_cut == entry["turns_cut"]["rows"]


def test_a_document_of_several_that_is_too_long(tmp_path):
    """The row stays with the others; a row without one is dropped, which is no bad row."""
    tokenizer = replace(TOKENIZER, template=LAST_DIFFERS)
    rows = [{"messages": turns("1", "2", "long " * 30, "4")}, {"messages": turns("long " * 40, "2")}]
    cache = build(tmp_path, rows, tokenizer, turns_max_length=60)
    entry = cache.manifest["sources"][0]
    assert (entry["rows_used"], entry["documents"], entry["turns_cut"]["lost_answers"]) == (1, 1, 1)
    assert entry["dropped"] == {"too long even without its earlier turns": 1}
    _, account = select_documents(cache, max_length=60, truncation="turns")
    assert account.rows_read == 2 and account.rows_used == 1 and account.dropped_answers == 1


def test_a_shortened_document_trains_no_answer_of_another(tmp_path):
    tokenizer = replace(TOKENIZER, template=LAST_DIFFERS)
    messages = turns("1", "2", "3", "4", "5", "6")
    messages[1]["train"] = True  # said of its own document, where it is the last
    whole = build(tmp_path, [{"messages": messages}], tokenizer)
    lengths = np.diff(whole.offsets)
    for limit in range(lengths[0], lengths[-1]):  # the first always fits, the last loses one turn or two
        cache = build(tmp_path, [{"messages": messages}], tokenizer, turns_max_length=int(limit))
        assert np.diff(cache.offsets).max() <= limit
        trained = [
            TOKENIZER.decode(ids[kinds >= TRAINED])
            for ids, kinds in ((cache.ids[a:b], cache.kinds[a:b]) for a, b in zip(cache.offsets, cache.offsets[1:]))
        ]
        assert trained == ["(last)2<|im_end|>", "(last)4<|im_end|>", "(last)6<|im_end|>"]


@pytest.mark.parametrize("last_turn_only", [False, True])
def test_a_shortened_document_trains_the_parts_of_its_answer_only(tmp_path, last_turn_only):
    tokenizer = replace(TOKENIZER, template=LAST_DIFFERS)
    messages = turns("1", "2", "3", "4", "5", "6")
    for i, train in ((1, False), (3, None)):
        parts = [{"type": "text", "text": str(i + 1), "train": True}, {"type": "text", "text": "b"}]
        messages[i] |= {"content": parts} | ({} if train is None else {"train": train})
    expected = ["2", "4" if last_turn_only else "(last)4b<|im_end|>", "(last)6<|im_end|>"]
    rows, options = [{"messages": messages}], {"last_turn_only": last_turn_only}
    lengths = np.diff(build(tmp_path, rows, tokenizer, **options).offsets)
    for limit in range(lengths[0], lengths[-1] + 1):
        cache = build(tmp_path, rows, tokenizer, turns_max_length=int(limit), **options)
        borders = zip(cache.offsets, cache.offsets[1:])
        assert [TOKENIZER.decode(cache.ids[a:b][cache.kinds[a:b] >= TRAINED]) for a, b in borders] == expected


def test_text_without_turns_is_cut_at_its_end(tmp_path):
    cache = build(tmp_path, [{"text": "Hello, how are you? " * 9}], turns_max_length=8)
    _, account = select_documents(cache, max_length=8, truncation="turns")
    assert account.trained + account.context == 8 and account.rows_cut == 1
