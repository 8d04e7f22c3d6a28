"""Tokenizers that fail, hang or make much of little: refused when they are loaded, or a bad row. Never a traceback."""

import json
import threading
import time
from concurrent.futures import Future

import pytest
import tokenizers

from minisft.data import tokenise, tokenizer_limits
from minisft.data.cache import build_cache
from minisft.data.rows import RowError
from minisft.data.sources import Source
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.data.tokenizer_limits import encode_each, encode_one, growth
from minisft.errors import MODEL, UserError

TRAINED = train_tokenizer(["a b"], vocab_size=300, chat_template=None)


def changed(folder, **parts):
    """A tokenizer with other parts in its tokenizer.json, loaded."""
    TRAINED.save(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))
    return load_tokenizer(folder)


def replacing(text, by, kind="String"):
    return {"type": "Replace", "pattern": {kind: text}, "content": by}


def in_turn(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def processor(*pieces):
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": {}}


SPECIALS = {"<|im_end|>": 0, "<|endoftext|>": 1}
WORDS = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "#", "vocab": {"[UNK]": 0, "a": 1}}
REFUSED = {
    "replaces nothing, without end": ({"normalizer": replacing("", "x")}, "replaces the empty text"),
    "the same, inside": ({"normalizer": in_turn({"type": "NFC"}, in_turn(replacing("", "x")))}, "the empty text"),
    "a large text of one character": (
        {"normalizer": replacing("a", "b" * 2**23)},
        "more than 4,194,304 characters of one",
    ),
    "doubles 30 times": (
        {"normalizer": in_turn(*[replacing("a", "aa")] * 30)},
        "more than 4,194,304 characters of one",
    ),
    "a large text, decoded": ({"decoder": replacing("a", "b" * 1000)}, "decoder makes more than 64 characters of one"),
    "long words": ({"model": WORDS | {"max_input_chars_per_word": 10**9}}, "words have up to 1,000,000,000 characters"),
    "a panic while it is read": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        "Precompiled",
    ),
    "a panic of the first text": (
        {"post_processor": processor({"SpecialToken": {"id": "X", "type_id": 0}})},
        "fails on",
    ),
    "another": ({"post_processor": processor({"Sequence": {"id": "B", "type_id": 0}})}, "fails on the text a"),
    "an expression without end": ({"pre_tokenizer": split("(?<x>\\g<x>a|a)")}, "never ending recursion"),
    "no word for anything": ({"model": {"type": "WordLevel", "vocab": SPECIALS, "unk_token": "?"}}, "Missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_tokenizer_is_refused_at_once(tmp_path, case):
    parts, told = REFUSED[case]
    if "model" in parts:
        parts = parts | {"pre_tokenizer": None, "added_tokens": [], "post_processor": None}
    began = time.process_time()
    with pytest.raises(UserError) as error:
        changed(tmp_path, **parts)
    assert told in error.value.message and error.value.exit_code == MODEL and len(str(error.value)) < 1000
    assert time.process_time() - began < 2


def test_growth_is_what_a_normalizer_can_do():
    """Its bound, of steps in turn, against what it makes of the worst character."""
    bert = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None}
    for steps, worst in (
        ([replacing("a", "bcd")], "a"),
        ([replacing("ab", "bcd")], "ab"),
        ([replacing("x*", "bcd", "Regex")], "a"),  # matches the empty text
        ([{"type": "Prepend", "prepend": "xy"}, replacing("x", "zzz")], "x"),
        ([{"type": "NFKC"}], "\ufdfa"),
        ([{"type": "NFKD"}, {"type": "Lowercase"}], "\ufdfa"),
        ([{"type": "ByteLevel"}], "\U0001f600"),
        ([{"type": "Lowercase"}], "\u0130"),
        ([bert | {"lowercase": True}], "\u4e00"),
    ):
        whole = json.loads(TRAINED.backend.to_str()) | {"normalizer": in_turn(*steps)}
        normalizer = tokenizers.Tokenizer.from_str(json.dumps(whole)).normalizer
        made = len(normalizer.normalize_str(worst))
        assert made <= growth(normalizer) * len(worst) <= 64 * made, steps
    assert growth(None) == TRAINED.growth == 1


def test_a_text_is_too_long_before_and_after_its_normalisation(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_limits, "MAX_TEXT", 100)
    tokenizer = changed(tmp_path, normalizer=replacing("a", "aaa"))
    texts = ["b" * 100, "b" * 101, "a" * 33, "a" * 34, "b" * 70 + "a" * 10, "b" * 71 + "a" * 10, "", "a" * 10**6]
    refused = [isinstance(one, RowError) for one in encode_each(tokenizer.backend, texts, tokenizer.growth)]
    assert refused == [False, True, False, True, False, True, False, True]
    for text, is_refused in zip(texts, refused):
        if not is_refused:
            assert encode_one(tokenizer.backend, text, 3).ids == tokenizer.backend.encode(text).ids
            continue
        with pytest.raises(
            RowError, match="too long a text: .* characters(, of which the normalizer makes more)?; at most 100"
        ):
            encode_one(tokenizer.backend, text, 3)
        with pytest.raises(UserError, match="too long a text"):
            tokenizer.encode(text)
        with pytest.raises(UserError, match="too long a text"):
            tokenizer.encode_batch([text])


def test_a_text_on_which_the_tokenizer_fails_is_a_bad_row(tmp_path, capfd):
    """A panic of the library, of an expression that backtracks, costs its row and no other."""
    changed(tmp_path / "tokenizer", pre_tokenizer=split("(a+)+$"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    texts = ["good", "a" * 40 + "b", "better"]
    good, bad, better = encode_each(tokenizer.backend, texts, 1)
    assert (good.ids, better.ids) == tuple(tokenizer.backend.encode(text).ids for text in (texts[0], texts[2]))
    assert isinstance(bad, RowError) and "retry-limit-in-match over; it begins `aaa" in str(bad)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources, options = [Source(str(tmp_path / "rows.jsonl"))], {"cache_dir": tmp_path / "cache"}
    cache = build_cache(sources, tokenizer, on_bad_row="skip", **options)
    assert cache.line.tolist() == [1, 3] and cache.manifest["sources"][0]["dropped"] == {tokenizer_limits.FAILS: 1}
    with pytest.raises(UserError, match="rows.jsonl:2: the tokenizer fails on a text"):
        build_cache(sources, tokenizer, on_bad_row="error", **options)


def test_a_batch_that_computes_without_end_ends_the_run(tmp_path, monkeypatch):
    """The thread cannot be stopped, and must not keep the process alive."""
    is_over, began = threading.Event(), threading.Event()

    def never_ends(tokenizer, pieces):
        began.set()
        while not is_over.is_set():
            pass
        return []

    monkeypatch.setattr(tokenise, "raw_encodings", never_ends)
    monkeypatch.setattr(tokenise, "SECONDS_AT_LEAST", 0.2)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    try:
        with pytest.raises(UserError, match="has computed for 0 s and is not done with 2 characters") as error:
            build_cache([Source(str(tmp_path / "rows.jsonl"))], TRAINED, cache_dir=tmp_path / "cache")
        assert "rows.jsonl:1 to " in error.value.hint and error.value.exit_code == MODEL and began.is_set()
        assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    finally:
        is_over.set()


def test_a_slow_machine_is_no_reason(monkeypatch):
    """Time that other programs take does not count."""
    future: Future = Future()
    monkeypatch.setattr(tokenise, "SECONDS_AT_LEAST", 0.05)
    threading.Timer(0.3, lambda: future.set_result([])).start()
    tokenise._wait(future, 0, [])


def test_long_texts_do_not_pile_up(tmp_path, monkeypatch):
    """What is encoded at once has a limit, whatever the length of the rows; and their order stays."""
    at_work, most = [], []
    monkeypatch.setattr(tokenise, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(tokenise, "CHARACTERS_AT_WORK", 300)
    encode = tokenise.raw_encodings

    def counted(tokenizer, pieces):
        at_work.append(sum(len(piece.text) for piece in pieces))
        most.append(sum(at_work))
        time.sleep(0.002)
        encoded = encode(tokenizer, pieces)
        at_work.remove(sum(len(piece.text) for piece in pieces))
        return encoded

    monkeypatch.setattr(tokenise, "raw_encodings", counted)
    lengths = [1, 250, 90, 5, 5, 5, 260, 40, 61, 300, 2]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in lengths))
    cache = build_cache([Source(str(tmp_path / "rows.jsonl"))], TRAINED, cache_dir=tmp_path / "cache")
    assert (cache.offsets[1:] - cache.offsets[:-1] - 1).tolist() == lengths and max(most) <= 300
