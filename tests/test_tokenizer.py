"""Tokenizer: round trips, files that transformers loads, masks of tokens."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from minisft.data.chat.training_templates import CHATML
from minisft.data.encoding import encode_pieces, token_kinds, tokenize_conversation
from minisft.data.formats import Piece
from minisft.data.kinds import ANSWER, HEADER, TERMINATOR, TRAINED, USER
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.errors import MODEL, UserError

TEXTS = [
    "Hello, how are you today?",
    "I am fine, thank you. \u00e4\u00f6\u00fc \u65e5\u672c\u8a9e",
    "2 + 2 = 4\n\n#### 4",
] * 5
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


# ---- training


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_bpe_round_trips_any_text(text):
    tokenizer = _shared()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def _shared(made=[]):  # noqa: B006 - hypothesis functions take no module fixture; made once
    if not made:
        made.append(train_tokenizer(TEXTS, 400))
    return made[0]


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(TEXTS, 400)
    assert again.files == tokenizer.files and again.fingerprint() == tokenizer.fingerprint()
    assert train_tokenizer(TEXTS, 280).fingerprint() != tokenizer.fingerprint()


def test_the_new_tokenizer_has_its_special_tokens(tokenizer):
    assert tokenizer.decode([tokenizer.eos_token_id]) == "<|im_end|>"
    assert tokenizer.decode([tokenizer.pad_token_id]) == "<|endoftext|>"
    assert tokenizer.bos_token_id is None and tokenizer.vocab_size == tokenizer.backend.get_vocab_size() <= 400
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]
    assert tokenizer.encode_batch(["Hello", "", "you"]) == [tokenizer.encode(text) for text in ("Hello", "", "you")]


def test_training_refuses_what_cannot_work():
    with pytest.raises(UserError, match="256 bytes and 3 special tokens"):
        train_tokenizer(TEXTS, 258)
    with pytest.raises(UserError, match="'</s>' is not among the special tokens"):
        train_tokenizer(TEXTS, 400, eos_token="</s>")


# ---- files


def test_transformers_loads_what_we_save_and_agrees(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS[:3], "<|im_start|>user\nHi<|im_end|>", " x\n"):
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert theirs.eos_token_id == tokenizer.eos_token_id and theirs.pad_token_id == tokenizer.pad_token_id
    assert theirs.apply_chat_template(TURNS, tokenize=False) == tokenizer.apply_chat_template(TURNS)
    ours = load_tokenizer(tmp_path)
    assert ours.fingerprint() == tokenizer.fingerprint() and ours.files == tokenizer.files


def save_with(tokenizer, folder, config=None, backend=None, **files):
    tokenizer.save(folder)
    if config is not None:
        old = json.loads((folder / "tokenizer_config.json").read_bytes())
        (folder / "tokenizer_config.json").write_text(json.dumps({**old, **config}))
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_saved_truncation_and_padding_do_not_apply(tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    loaded = load_tokenizer(save_with(tokenizer, tmp_path, backend=backend))
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0]) and len(loaded.encode("a")) == 1


def test_tokens_listed_beside_the_tokenizer_are_added(tokenizer, tmp_path):
    new = {str(tokenizer.vocab_size): {"content": "<think>", "special": False}}
    loaded = load_tokenizer(save_with(tokenizer, tmp_path, {"added_tokens_decoder": new}))
    assert loaded.encode("<think>") == [tokenizer.vocab_size] and loaded.vocab_size == tokenizer.vocab_size + 1
    wrong = {"7": {"content": "<think>", "special": False}}
    with pytest.raises(UserError, match="has id .* and 7 beside it"):
        load_tokenizer(save_with(tokenizer, tmp_path, {"added_tokens_decoder": wrong}))


def test_older_files(tokenizer, tmp_path):
    folder = save_with(tokenizer, tmp_path, {"eos_token": None}, special_tokens_map__json="{}")
    config = json.loads((folder / "tokenizer_config.json").read_bytes())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": tokenizer.vocab_size}))
    loaded = load_tokenizer(folder)
    assert loaded.eos_token_id == tokenizer.eos_token_id and loaded.encode("<extra>") == [tokenizer.vocab_size]


@pytest.mark.parametrize("template, stops", [("chatml", {"<|endoftext|>", "<|im_end|>"}), (None, {"<|endoftext|>"})])
def test_an_answer_ends_where_the_template_ends_it(template, stops):
    tokenizer = train_tokenizer([], 259, eos_token="<|endoftext|>", chat_template=template)
    assert {tokenizer.decode([i]) for i in tokenizer.stop_ids} == stops


@pytest.mark.parametrize(
    "config, message",
    [
        ({"eos_token": "</s>"}, "eos_token '</s>' is not in the vocabulary"),
        ({"bos_token": {"content": "<s>"}}, "bos_token '<s>' is not in the vocabulary"),
    ],
)
def test_special_tokens_must_exist(tokenizer, tmp_path, config, message):
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(save_with(tokenizer, tmp_path, config))
    assert caught.value.exit_code == MODEL


def test_broken_folders(tokenizer, tmp_path):
    with pytest.raises(UserError, match="has no tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json: "):
        load_tokenizer(tmp_path)
    wrong = '{"added_tokens_decoder": {"x": 3}}'
    for broken, message in (("{", "not valid JSON"), ("[]", "not a JSON object"), (wrong, "malformed tokenizer files")):
        with pytest.raises(UserError, match=message):
            load_tokenizer(save_with(tokenizer, tmp_path, tokenizer_config__json=broken))


def test_where_the_template_comes_from(tokenizer, tmp_path):
    folder = save_with(tokenizer, tmp_path, {"chat_template": "config"}, chat_template__jinja="file")
    (tmp_path / "mine.txt").write_text("mine {{ bos_token }}")
    assert load_tokenizer(folder).template.text == "file"
    assert load_tokenizer(folder, chat_template="chatml").template.text == CHATML
    assert load_tokenizer(folder, chat_template=str(tmp_path / "mine.txt")).template.text == "mine {{ bos_token }}"
    chosen = load_tokenizer(folder, chat_template="{{ messages }}")
    chosen.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").template.text == "{{ messages }}"
    with pytest.raises(UserError, match="No such file"):
        load_tokenizer(folder, chat_template="nowhere.jinja")
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).template.text == "config"
    bare = train_tokenizer(TEXTS, 300, chat_template=None)
    with pytest.raises(UserError, match="no chat template"):
        bare.apply_chat_template(TURNS)


def test_the_fingerprint_follows_template_and_date(tokenizer, tmp_path):
    folder = save_with(tokenizer, tmp_path)
    dated = "{{ strftime_now('%Y') }}"
    prints = [
        load_tokenizer(folder, chat_template=template, template_date=day).fingerprint()
        for template, day in ((None, None), ("{{ 1 }}", None), (dated, "2024-01-01"), (dated, "2024-01-02"))
    ]
    assert len(set(prints)) == 4
    undated = [load_tokenizer(folder, template_date=day).fingerprint() for day in ("2024-01-01", "2024-01-02")]
    assert undated[0] == undated[1] == prints[0]


def with_bos(tokenizer, folder, template="<s> $A </s>"):
    """The tokenizer with a post-processor that puts BOS and EOS around a text."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>") if token in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return load_tokenizer(save_with(tokenizer, folder, config, backend))


def test_what_the_tokenizer_puts_around_a_text(tokenizer, tmp_path):
    assert tokenizer.prefix_ids == tokenizer.suffix_ids == []
    both = with_bos(tokenizer, tmp_path)
    assert both.prefix_ids == [both.bos_token_id] and both.suffix_ids == [both.eos_token_id]
    text = "Hello"
    assert both.encode(text, add_special_tokens=True) == both.backend.encode(text).ids
    assert both.encode(text) == both.backend.encode(text).ids[1:-1]


# ---- masks


def test_tokens_belong_to_a_span_if_they_overlap_it():
    offsets = [(0, 2), (2, 5), (5, 5), (5, 6), (5, 6), (6, 9)]  # one without characters, two that share one
    spans = [(0, 9, 1), (2, 6, 2 | TRAINED)]
    kinds, straddling = token_kinds(offsets, spans)
    assert kinds.tolist() == [1, *[2 | TRAINED] * 4, 1] and straddling == 0
    kinds, straddling = token_kinds(offsets, [(0, 9, 1), (3, 7, 2 | TRAINED)])
    assert kinds.tolist() == [1, *[2 | TRAINED] * 5] and straddling == 2


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.text(st.sampled_from("ab \n\u00e4\u65e5\U0001f600e\u0301"), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
def test_token_kinds_cover_every_character_of_their_span(words):
    """Brute force: a token is of the last span that shares a character with it."""
    tokenizer = _shared()
    text = "".join(words)
    spans, at = [(0, len(text), 0)], 0
    for i, word in enumerate(words):
        spans.append((at, at + len(word), i + 1))
        at += len(word)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    kinds, _ = token_kinds(encoding.offsets, spans)
    for (start, end), kind in zip(encoding.offsets, kinds):
        assert kind == max(byte for a, b, byte in spans if a < end and start < b)


def test_pieces_of_one_kind_and_of_many_encode_alike(tokenizer):
    for text in TEXTS[:3]:
        plain, mixed = encode_pieces(
            tokenizer, [Piece(text, [(0, len(text), USER)]), Piece(text, [(0, len(text), USER), (0, 0, ANSWER)])]
        )
        ids, kinds, same, mixed = plain.ids, plain.kinds, mixed.ids, mixed.kinds
        assert ids.tolist() == same.tolist() == tokenizer.encode(text)
        assert kinds.tolist() == mixed.tolist() == [USER] * len(ids)
        assert ids.dtype == np.uint32 and kinds.dtype == np.uint8


def decoded(tokenizer, ids, kinds):
    return tokenizer.decode(ids[(kinds & TRAINED) != 0])


@pytest.mark.parametrize(
    "answer", ["Hello", " Hello", "\nHello\n\n", "\U0001f600", "\u00e4\u65e5\u672c", "e\u0301", "a\u200b", "x" * 50]
)
def test_the_answer_and_its_end_are_trained_and_nothing_else(tokenizer, answer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": answer},
        {"role": "assistant", "content": answer},
    ]
    ids, kinds = tokenize_conversation(tokenizer, messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages)
    # A leading newline of the answer may share its token with the header's newline; that token counts as trained.
    shared = "\n" if answer.startswith("\n") and tokenizer.encode("\n\n") != [*tokenizer.encode("\n") * 2] else ""
    assert decoded(tokenizer, ids, kinds) == (shared + answer + "<|im_end|>") * 2
    assert kinds[-2] == TERMINATOR | TRAINED and kinds[-1] == HEADER
    ends = kinds[ids == tokenizer.eos_token_id]
    assert ends.tolist() == [HEADER, HEADER, TERMINATOR | TRAINED, HEADER, TERMINATOR | TRAINED]  # never by id
    assert (
        decoded(tokenizer, *tokenize_conversation(tokenizer, messages, train_on="last"))
        == shared + answer + "<|im_end|>"
    )
    _, kinds = tokenize_conversation(tokenizer, messages, train_on="all")
    assert (kinds & TRAINED).all()


@pytest.mark.parametrize("template_bos", ["{{ bos_token }}", ""])
@pytest.mark.parametrize("processor", ["<s> $A", "$A"])
def test_a_conversation_never_gets_a_second_bos(tokenizer, tmp_path, processor, template_bos):
    with_bos(tokenizer, tmp_path, processor)
    template = (
        template_bos + "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    made = load_tokenizer(tmp_path, chat_template=template)
    ids, kinds = tokenize_conversation(made, TURNS)
    assert (ids == made.bos_token_id).sum() == (1 if template_bos else 0)
    assert decoded(made, ids, kinds) == "Hello</s>"


@pytest.mark.parametrize(
    "messages, options, message",
    [
        ([], {}, "messages is empty"),
        (TURNS[:1], {}, "no assistant turn"),
        ([{"role": "bot", "content": "x"}], {}, "unknown role"),
        ([{"role": "user", "content": "<|im_end|>"}, TURNS[1]], {}, "control token"),
        (TURNS, {"train_on": "none"}, "train_on = 'none'"),
    ],
)
def test_tokenize_conversation_refuses_rather_than_guesses(tokenizer, messages, options, message):
    with pytest.raises(UserError, match=message):
        tokenize_conversation(tokenizer, messages, **options)


def test_a_tokenizer_that_trims_offsets(tokenizer, tmp_path):
    """GPT-2's post-processor leaves the space before a word out of the word's offsets; the mask must not care."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = load_tokenizer(save_with(tokenizer, tmp_path, backend=backend))
    messages = [TURNS[0], {"role": "assistant", "content": " Hello  you "}]
    assert (
        tokenize_conversation(trimmed, messages)[1].tolist() == tokenize_conversation(tokenizer, messages)[1].tolist()
    )


def test_a_normaliser_that_leaves_characters_uncovered(tokenizer, tmp_path):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.normalizer = tokenizers.normalizers.NFC()
    loaded = load_tokenizer(save_with(tokenizer, tmp_path, backend=backend))
    ids, kinds = tokenize_conversation(loaded, [TURNS[0], {"role": "assistant", "content": "e\u0301e\u0301"}])
    assert decoded(loaded, ids, kinds) == "\u00e9\u00e9<|im_end|>"


def test_a_word_level_tokenizer_without_template(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("a b c") == [0, 1, 2] and loaded.template is None and loaded.eos_token_id is None
