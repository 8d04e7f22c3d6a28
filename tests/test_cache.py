"""The token cache and the account of rows and tokens."""

import csv
import errno
import gzip
import json
import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from minisft import atomic_folder
from minisft.data import cache as cache_module
from minisft.data import parquet as parquet_module
from minisft.data import sources as sources_module
from minisft.data import tokenise as tokenise_module
from minisft.data.cache import build_cache, cache_key, hash_files
from minisft.data.documents import select_documents, show_document, split_documents
from minisft.data.hashed_file import open_file
from minisft.data.kinds import ANSWER, SPECIAL, TERMINATOR, TEXT, TRAINED, USER
from minisft.data.row_format import FormatOptions
from minisft.data.sources import Source, parse_source
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.errors import DATA, SAVE, UserError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

TEXTS = ["Hello, how are you today?", "I am fine, thank you. \u00e4\u00f6\u00fc", "2 + 2 = 4\n\n#### 4"] * 5
TOKENIZER = train_tokenizer(TEXTS, 320)
PLAIN = replace(TOKENIZER, template=None)


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build(folder, sources, tokenizer=TOKENIZER, on_bad_row="error", format="auto", field_map=None, **options):
    sources = sources if isinstance(sources, list) else [sources]
    return build_cache(
        [parse_source(source) for source in sources],
        tokenizer,
        cache_dir=folder / "cache",
        on_bad_row=on_bad_row,
        format=format,
        field_map=field_map,
        options=FormatOptions(**options),
    )


def document(cache, d):
    return cache.ids[cache.offsets[d] : cache.offsets[d + 1]], cache.kinds[cache.offsets[d] : cache.offsets[d + 1]]


def trained_text(cache, d, tokenizer=TOKENIZER):
    ids, kinds = document(cache, d)
    return tokenizer.decode(ids[kinds >= TRAINED])


# ---- what is in it


def test_prompt_and_completion_are_encoded_apart_and_end_in_eos(tmp_path):
    row = {"prompt": "Hello, how", "completion": " are you"}
    cache = build(tmp_path, jsonl(tmp_path / "a.jsonl", [row]))
    ids, kinds = document(cache, 0)
    prompt, answer = TOKENIZER.encode("Hello, how"), TOKENIZER.encode(" are you")
    assert ids.tolist() == [*prompt, *answer, TOKENIZER.eos_token_id]
    assert kinds.tolist() == [USER] * len(prompt) + [ANSWER | TRAINED] * len(answer) + [TERMINATOR | TRAINED]
    assert trained_text(build(tmp_path, str(tmp_path / "a.jsonl"), add_eos=False), 0) == " are you"


def test_all_formats_together(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = {
        "messages": {"messages": turns},
        "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        "chat": {"prompt": turns[:1], "completion": turns[1:]},
        "instruction": {"instruction": "Hi", "input": "", "output": "Hello"},
        "question": {"question": "Hi", "answer": "Hello"},
        "text": {"text": "Hi"},
        "ids": {"input_ids": [5, 6, 7], "labels": [-100, 6, -100]},
    }
    cache = build(tmp_path, [jsonl(tmp_path / f"{name}.jsonl", [row]) for name, row in rows.items()])
    for d in range(5):
        assert np.array_equal(document(cache, d)[0], document(cache, 0)[0])
        assert np.array_equal(document(cache, d)[1], document(cache, 0)[1])
        assert trained_text(cache, d) == "Hello<|im_end|>"
    assert trained_text(cache, 5) == "Hi<|im_end|>"
    assert document(cache, 6)[1].tolist() == [TEXT, ANSWER | TRAINED, TEXT]
    assert cache.source.tolist() == list(range(7)) and cache.row.tolist() == [0] * 7
    assert [entry["layout"] for entry in cache.manifest["sources"]][3] == (
        "instruction, by the chat template; trained: the answer"
    )
    assert len(cache.describe()) == 7


TOOL = {"name": "add", "parameters": {"type": "object", "properties": {}}}


def test_columns_that_change_the_loss_or_may_be_missed_are_reported_on_lines_of_their_own(tmp_path):
    rows = [{"question": "Hi", "answer": "Hello", "query": "x", "note": "y", "weight": w} for w in (72.5, 2)]
    rows += [{"question": "Hi", "answer": "Hello", "query": empty, "weight": None} for empty in ("", None)]
    _, unread, weight = build(tmp_path, jsonl(tmp_path / "a.jsonl", rows)).describe()
    assert (
        unread.startswith("WARNING: the column query has a value in 2 rows and is not used;") and "note" not in unread
    )
    assert weight.startswith("the column weight scales the loss of 2 rows by 2 to 72.5;")
    source = {"path": str(tmp_path / "a.jsonl"), "ignore": ["query", "weight"]}
    cache = build(tmp_path, source)
    assert cache.weights is None and len(cache.describe()) == 1 and "query" not in cache.describe()[0]
    turns = [{"role": "user", "content": 'Say "Hi"\n'}, {"role": "assistant", "content": "Hi"}]
    rows = [{"prompt": 'Say "Hi"', "messages": turns}, {"prompt": "Ho", "messages": turns}]  # the first is no loss
    assert "prompt has a value in 1 rows" in build(tmp_path, jsonl(tmp_path / "b.jsonl", rows)).describe()[1]
    rows = [
        {"messages": turns},
        {"messages": turns, "context": "c"},
        {"messages": turns, "tools": [TOOL], "documents": [{"text": "d"}]},
    ]
    lines = build(tmp_path, jsonl(tmp_path / "c.jsonl", rows)).describe()[1:]  # the first row has none of them
    assert [line.partition(";")[0] for line in lines] == [
        "WARNING: the column context has a value in 1 rows and is not used",
        "WARNING: the column documents has a value in 1 rows and no chat template renders it",
    ]
    rows = [{"messages": turns, "images": images} for images in ([], ["a.png"], [{"bytes": None, "path": "b.png"}])]
    assert "images has a value in 2 rows" in build(tmp_path, jsonl(tmp_path / "d.jsonl", rows)).describe()[1]


def test_bad_answers_that_are_trained_are_reported(tmp_path):
    rows = [
        {"prompt": "Hi", "completion": answer, "label": label} for answer, label in zip("abc", (True, False, "False"))
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert build(tmp_path, path).describe()[1].startswith("WARNING: the column label is false in 2 rows, as of bad")
    assert not any("as of bad" in line for line in build(tmp_path, path, answers="labels").describe())
    rows = [{"text": "Hi", "label": False}]  # a class of texts
    assert len(build(tmp_path, jsonl(tmp_path / "b.jsonl", rows)).describe()) == 1


@pytest.mark.parametrize("more", [{}, {"multi_turn": "per_turn"}])
def test_reasoning_that_the_template_does_not_render_is_reported(tmp_path, more):
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    without = replace(TOKENIZER, template=replace(TOKENIZER.template, text=text))
    thought = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "reasoning": "A greeting."}]
    untrained = [thought[0], {**thought[1], "train": False}, thought[0], {"role": "assistant", "content": "Hello"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": rows} for rows in (thought, thought * 2, untrained)])
    assert (
        build(tmp_path, path, without, **more).describe()[1].startswith("WARNING: 2 rows have reasoning that the chat")
    )
    for lines in (
        build(tmp_path, path, without, reasoning="strip", **more).describe(),
        build(tmp_path, path, **more).describe(),  # this template renders it
    ):
        assert not any(line.startswith("WARNING") for line in lines)


def test_everything_is_trained_where_asked(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"question": "Hi", "answer": "Hello"}])
    for options in ({"completion_only_loss": False}, {"assistant_only_loss": False}):
        assert (build(tmp_path, path, **options).kinds >= TRAINED).all()
        assert (build(tmp_path, path, PLAIN, **options).kinds >= TRAINED).all()


def test_response_markers(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "<|user|>1<|assistant|>one<|user|>2<|assistant|>two"}])
    cache = build(tmp_path, path, response_marker="<|assistant|>", instruction_marker="<|user|>")
    assert trained_text(cache, 0) == "onetwo<|im_end|>"


@pytest.mark.parametrize("end", ["<|user|>", "<|user|>2", "<|user|>2<|im_end|>", "<|user|>2<|assistant|>two"])
def test_eos_is_trained_where_it_ends_an_answer(tmp_path, end):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "<|user|>1<|assistant|>one" + end}])
    for trained, options in (("answers", {"response_marker": "<|assistant|>"}), ("all", {})):
        cache = build(tmp_path, path, instruction_marker="<|user|>" * bool(options), **options)
        eos = TOKENIZER.eos_token_id
        assert (cache.ids == eos).sum() == 1 and cache.ids[-1] == eos
        assert (cache.kinds[-1] >= TRAINED) == (trained == "all" or end.endswith("two"))


def with_bos_and_eos(folder):
    backend = tokenizers.Tokenizer.from_str(TOKENIZER.backend.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return load_tokenizer(folder)


def test_bos_and_eos_come_once(tmp_path):
    tokenizer = with_bos_and_eos(tmp_path / "t")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [{"text": text} for text in ("Hi", "<s>Hi", "Hi</s>", "<s>Hi</s>")]
    path = jsonl(tmp_path / "a.jsonl", rows)
    hi = tokenizer.encode("Hi")
    cache = build(tmp_path, path, tokenizer)
    for d in range(4):
        assert document(cache, d)[0].tolist() == [bos, *hi, eos]
        assert document(cache, d)[1][-1] == TERMINATOR | TRAINED
    assert document(cache, 0)[1][0] == SPECIAL
    assert document(build(tmp_path, path, tokenizer, add_eos=False), 0)[0].tolist() == [bos, *hi]
    assert document(build(tmp_path, path, tokenizer, add_special_tokens=False), 0)[0].tolist() == [*hi, eos]
    neither = build(tmp_path, path, tokenizer, add_special_tokens=False, add_eos=False)
    assert document(neither, 0)[0].tolist() == hi


def test_a_tokenizer_without_eos_cannot_add_one(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "Hi"}])
    bare = replace(TOKENIZER, special_tokens={})
    with pytest.raises(UserError, match="no EOS token"):
        build(tmp_path, path, bare)
    assert trained_text(build(tmp_path, path, bare, add_eos=False), 0) == "Hi"


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    for ids in ([TOKENIZER.vocab_size], [-1]):
        with pytest.raises(UserError, match="token id out of range"):
            build(tmp_path, jsonl(tmp_path / "a.jsonl", [{"input_ids": ids}]))


def test_weights_are_kept_only_where_needed(tmp_path):
    assert build(tmp_path, jsonl(tmp_path / "a.jsonl", [{"text": "a", "weight": 1}])).weights is None
    cache = build(tmp_path, jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "bc", "weight": 0.25}]))
    first, second = np.diff(cache.offsets)
    assert cache.weights.tolist() == [1.0] * first + [0.25] * second and cache.weights.dtype == np.float32


def test_batches_do_not_show(tmp_path, monkeypatch):
    rows = [{"question": "Hi " * i, "answer": "Hello"} for i in range(1, 20)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    whole = build(tmp_path, path)
    monkeypatch.setattr(tokenise_module, "BATCH_ROWS", 3)
    monkeypatch.setattr(tokenise_module, "BATCH_CHARACTERS", 150)
    monkeypatch.setattr(cache_module, "CACHE_VERSION", 0)
    batched = build(tmp_path, path)
    assert batched.folder != whole.folder
    for name in cache_module.ARRAYS:
        assert np.array_equal(getattr(batched, name), getattr(whole, name)), name


def test_csv_source_with_field_map(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["q", "a", "weight"], ["Hi", "Hello", "0.5"]])
    cache = build(tmp_path, str(tmp_path / "a.csv"), field_map={"q": "question", "a": "answer"})
    assert trained_text(cache, 0) == "Hello<|im_end|>" and set(cache.weights) == {0.5}


# ---- bad rows


def test_a_bad_row_stops_with_its_place(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}])
    with pytest.raises(UserError) as caught:
        build(tmp_path, path)
    assert caught.value.exit_code == DATA
    assert str(caught.value).startswith(f'{path}:2: empty text; it begins `{{"text": ""}}`')
    left = [name for name in os.listdir(tmp_path / "cache") if not name.startswith(".lock-")]
    assert not left  # nothing half built stays


def test_skipped_rows_are_counted_by_reason_and_shown(tmp_path):
    bad = ['{"text": ""}', '{"text": "ok"}', "{", "", '{"txt": 1}', '{"text": " "}', '{"text": 1}', "[]"]
    (tmp_path / "a.jsonl").write_text('{"text": "ok"}\n' + "\n".join(bad) + "\n")
    cache = build(tmp_path, str(tmp_path / "a.jsonl"), on_bad_row="skip")
    (entry,) = cache.manifest["sources"]
    assert entry["rows_read"] == 9 and entry["rows_used"] == 2
    assert entry["dropped"] == {
        "empty text": 2, "not valid JSON": 1, "empty line": 1, "missing field": 1, "not a string": 1,
        "not a JSON object": 1,
    }  # fmt: skip
    assert len(cache.manifest["bad_rows"]) == 5 and "a.jsonl:2: empty text" in cache.manifest["bad_rows"][0]
    assert cache.row.tolist() == [0, 2] and cache.place(1) == f"{tmp_path}/a.jsonl:3"
    assert "7 rows skipped: 2 empty text" in "\n".join(cache.describe())


def test_rows_that_a_template_refuses_are_bad_rows(tmp_path):
    rows = [{"question": q, "answer": a} for q, a in (("Hi", "Hello"), ("<|im_end|>", "x"), ("x", "<|im_start|>"))]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match="a.jsonl:2: control token in a message"):
        build(tmp_path, path)
    assert build(tmp_path, path, on_bad_row="skip").manifest["sources"][0]["dropped"] == {
        "control token in a message": 2
    }


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    with pytest.raises(UserError, match="no usable row in .*a.jsonl: 2 read"):
        build(tmp_path, str(tmp_path / "a.jsonl"), on_bad_row="skip")
    (tmp_path / "b.json").write_text("[]")
    with pytest.raises(UserError, match="no usable row"):
        build(tmp_path, str(tmp_path / "b.json"))
    (tmp_path / "c.jsonl").write_text('{"txt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UserError, match="c.jsonl:1: the fields txt are those of no known format"):
        build(tmp_path, str(tmp_path / "c.jsonl"), on_bad_row="skip")  # the format is not one bad row's matter
    assert len(build(tmp_path, str(tmp_path / "c.jsonl"), on_bad_row="skip", format="text").row) == 1
    path = jsonl(tmp_path / "d.jsonl", [{"text": None, "id": 1}, {"text": "b", "id": 2}])
    with pytest.raises(UserError, match="d.jsonl:1: missing field: 'text' is null"):
        build(tmp_path, path)
    assert build(tmp_path, path, on_bad_row="skip").line.tolist() == [2]
    with pytest.raises(UserError, match="no data source"):
        build(tmp_path, [])
    with pytest.raises(UserError, match="on_bad_row"):
        build(tmp_path, str(tmp_path / "a.jsonl"), on_bad_row="ignore")


# ---- what is tokenised is what was hashed


def packed(texts, kind, delimiter=";"):
    """Rows {"text": ...} as the bytes of a file of this kind; a .txt file is one row."""
    rows = [{"text": text} for text in texts]
    suffix = "." + kind.split(".")[1]
    if suffix == ".parquet":
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue().to_pybytes()
    plain = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        ".json": json.dumps(rows),
        ".csv": "".join(f"{text}{delimiter}{n}\n" for n, text in enumerate(["text", *texts])),
        ".txt": texts[0],
    }[suffix].encode()
    if kind.endswith(".gz"):
        return gzip.compress(plain, mtime=0)
    return pyarrow.compress(plain, codec="zstd", asbytes=True) if kind.endswith(".zst") else plain


KINDS = ["a.jsonl", "a.json", "a.csv", "a.txt", "a.parquet", "a.jsonl.gz", "a.csv.zst", "repository.jsonl"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_of_a_file_that_is_written_between_two_looks_gets_into_a_cache(tmp_path, monkeypatch, kind):
    """The file holds other rows at one of the looks that the build takes at it, whichever, and is put back afterwards."""
    path = tmp_path / kind
    texts = ["Hello", "how are you", "today", "thank you"]
    right, wrong = packed(texts, kind), packed([*reversed(texts), *texts], kind, ",")
    source = Source(str(path), split="" if kind == "a.txt" else "[:50%]")  # rows are counted first
    if kind.startswith("repository"):
        source = replace(source, path="owner/name", files=(str(path),), commit="c")
    real, looks, wrong_at = open_file, 0, None

    def look(*arguments):
        nonlocal looks
        if looks == wrong_at:
            put(wrong)
        file = real(*arguments)  # it stays with the file that had the name when it was opened
        put(right)
        looks += 1
        return file

    def put(data):
        (tmp_path / "other").write_bytes(data)
        os.replace(tmp_path / "other", path)

    for module in (sources_module, parquet_module):
        monkeypatch.setattr(module, "open_file", look)
    put(right)
    expected = build(tmp_path / "right", source).ids.tolist()
    outcomes, taken = [], looks
    for wrong_at in range(taken):
        looks = 0
        folder = tmp_path / f"{wrong_at}"
        try:
            build(folder, source)
            outcomes.append("right")
        except UserError as error:
            assert error.exit_code == DATA
            outcomes.append(error.message.rpartition(": ")[2])
            left = [name for name in os.listdir(folder / "cache") if not name.startswith(".lock-")]
            assert left == []
        wrong_at = None
        assert build(folder, source).ids.tolist() == expected
    is_packed = kind.endswith((".gz", ".zst"))  # then it is opened once more, to see whether it can be
    assert set(outcomes[is_packed:]) == {"changed while it was being read"}, outcomes


def test_a_file_that_joins_a_glob_during_the_build_is_not_read(tmp_path, monkeypatch):
    path, real = jsonl(tmp_path / "a.jsonl", [{"text": "a"}]), cache_module._build

    def build_later(*arguments):
        jsonl(tmp_path / "b.jsonl", [{"text": "b"}])
        real(*arguments)

    monkeypatch.setattr(cache_module, "_build", build_later)
    assert build(tmp_path, str(tmp_path / "*.jsonl")).manifest["paths"] == [path]
    assert len(build(tmp_path, str(tmp_path / "*.jsonl")).row) == 2


def test_a_full_disk_never_leaves_a_cache_that_lacks_a_byte(tmp_path):
    """The disk refuses at a real write call: Python ignores SIGXFSZ and gets EFBIG. ndarray.tofile loses bytes in silence."""
    path = jsonl(tmp_path / "a.jsonl", [{"text": "Hello, how are you today?", "weight": 0.5}] * 80)
    whole = build(tmp_path, path)
    largest = whole.ids.nbytes
    others = [file.stat().st_size for file in whole.folder.iterdir() if file.name not in ("ids.bin", "weights.bin")]
    assert max(others) < largest - 1 < 4096  # C's buffer, at whose end the loss was
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 3, 100, largest // 2, largest - 1, largest):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
            cache = build(tmp_path / str(room), path)
        except UserError as error:
            assert error.exit_code == SAVE and "File too large" in error.message and "free" in error.message
            assert all(name.startswith(".lock-") for name in os.listdir(tmp_path / str(room) / "cache"))
        else:
            assert room == largest and np.array_equal(cache.ids, whole.ids)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# ---- found again, or not


def test_a_second_start_finds_it(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert build(tmp_path, path).note == "built"
    assert build(tmp_path, {"path": path, "name": "other", "weight": 3.0}).note == "found"  # neither shapes a token


def test_the_key_changes_with_every_input(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])

    def key(source=path, tokenizer=TOKENIZER, on_bad_row="error", **options):
        return cache_key(*hash_files([parse_source(source)]), tokenizer, FormatOptions(**options), on_bad_row)

    keys = [
        key(),
        key(f"{path}[:1]"),
        key({"path": path, "format": "text"}),
        key({"path": path, "field_map": {"text": "text"}}),
        key(on_bad_row="skip"),
        key(dataset_text_field="body"),
        key(prompt_format="plain"),
        key(completion_only_loss=True),
        key(completion_only_loss=False),
        key(assistant_only_loss=True),
        key(response_marker="A"),
        key(instruction_marker="A"),
        key(add_eos=False),
        key(add_special_tokens=False),
        key(tokenizer=train_tokenizer(TEXTS, 280)),  # fewer merges
        key(tokenizer=train_tokenizer(TEXTS, 320, chat_template=TOKENIZER.template.text + " ")),
        key(tokenizer=train_tokenizer(TEXTS, 320, eos_token="<|endoftext|>")),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "CACHE_VERSION", 0)
        keys.append(key())
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "c"}])  # one byte
    keys.append(key())
    assert len(set(keys)) == len(keys)
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    assert key() == keys[0]


def test_a_cache_that_cannot_be_written(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match="the token cache: ") as caught:
        build(tmp_path, path)
    assert caught.value.exit_code == SAVE


def test_of_several_that_need_it_one_builds(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    real, built = cache_module._build, []

    def slow_build(*arguments):
        built.append(1)
        time.sleep(0.05)
        real(*arguments)

    monkeypatch.setattr(cache_module, "_build", slow_build)
    with ThreadPoolExecutor(4) as pool:  # as ranks do: the lock is held by the open file, not by the process
        caches = list(pool.map(lambda _: build(tmp_path, path), range(4)))
    assert [trained_text(cache, 0) for cache in caches] == ["a<|im_end|>"] * 4
    assert len(built) == 1 and sorted(cache.note for cache in caches) == ["built", "found", "found", "found"]


@pytest.mark.parametrize("file", ["ids.bin", "kinds.bin", "offsets.bin", "line.bin", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_cache_is_built_again(tmp_path, file, damage):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "Hello"}])
    cache = build(tmp_path, path)
    expected, victim = cache.ids.tolist(), cache.folder / file
    data = victim.read_bytes()
    victim.unlink()  # a new file, so that the memory map of `cache` keeps the old one
    if damage == "flip":
        victim.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:] if len(data) > 1 else b"?")
    elif damage == "cut":
        victim.write_bytes(data[:-1])
    again = build(tmp_path, path)
    assert again.note.startswith("built again: ") and file in again.note
    assert again.ids.tolist() == expected
    assert build(tmp_path, path).note == "found"


def test_a_cache_that_cannot_be_read_is_not_built_again(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    path = jsonl(tmp_path / "a.jsonl", [{"text": "Hello"}])
    before = {file: file.read_bytes() for file in build(tmp_path, path).folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(atomic_folder, "sha256_file", fail)
        with pytest.raises(UserError, match="cannot be read: Input/output error") as caught:
            build(tmp_path, path)
    assert caught.value.exit_code == SAVE
    assert {file: file.read_bytes() for file in build(tmp_path, path).folder.iterdir()} == before


# ---- the account


def test_truncation_policies(tmp_path):
    long = "Hello " * 30
    path = jsonl(tmp_path / "a.jsonl", [{"text": "Hi"}, {"text": long}])
    cache = build(tmp_path, path)
    lengths = np.diff(cache.offsets)
    with pytest.raises(UserError) as caught:
        select_documents(cache, max_length=10, truncation="error")
    assert f"1 of 2 rows are longer than max_length = 10; the longest has {lengths[1]} tokens: {path}:2" in str(
        caught.value
    )
    documents, account = select_documents(cache, max_length=10, truncation="drop")
    assert documents.index.tolist() == [0] and account.dropped == {"longer than max_length": 1}
    assert account.in_dropped == lengths[1] and account.cut == 0
    for truncation, kept in (("right", slice(0, 10)), ("left", slice(-10, None))):
        documents, account = select_documents(cache, max_length=10, truncation=truncation)
        assert documents.lengths.tolist() == [lengths[0], 10] and len(documents) == 2
        piece = cache.ids[documents.start[1] : documents.end[1]]
        assert piece.tolist() == document(cache, 1)[0][kept].tolist()
        assert account.rows_cut == 1 and account.cut == lengths[1] - 10
        assert f"truncated: 1 rows, {lengths[1] - 10} tokens" in account.lines()
    documents, account = select_documents(cache, max_length=None)
    assert documents.lengths.tolist() == lengths.tolist() and account.cut == 0
    with pytest.raises(UserError, match="truncation = 'middle'"):
        select_documents(cache, max_length=10, truncation="middle")
    with pytest.raises(UserError, match="max_length = 1"):
        select_documents(cache, max_length=1)


def test_rows_with_nothing_to_train_are_dropped_and_counted(tmp_path):
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]},
        {"input_ids": [1, 2, 3], "labels": [1, -100, -100]},  # a first token is never a target
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, -100, 4]},  # cut off at 3
        {"input_ids": [1, 2, 3], "weight": 0},
        {"input_ids": [1]},
    ]
    cache = build(tmp_path, jsonl(tmp_path / "a.jsonl", rows))
    documents, account = select_documents(cache, max_length=3, truncation="right")
    assert documents.index.tolist() == [0]
    assert account.dropped == {"with nothing to train": 3, "with nothing to train after the cut": 1}
    assert (account.trained, account.context, account.cut, account.in_dropped) == (1, 2, 0, 11)
    with pytest.raises(UserError, match="no row is left to train on"):
        select_documents(build(tmp_path, jsonl(tmp_path / "b.jsonl", rows[1:2])), max_length=None)


def test_source_weights_repeat_and_draw(tmp_path):
    rows = [{"input_ids": [i, i]} for i in range(1, 11)]
    a, b = jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", rows)
    cache = build(tmp_path, [{"path": a, "weight": 2.5}, {"path": b, "weight": 0.3}])
    documents, account = select_documents(cache, max_length=None, seed=1)
    counts = np.bincount(documents.index, minlength=20)
    assert sorted(counts[:10]) == [2] * 5 + [3] * 5 and sorted(counts[10:]) == [0] * 7 + [1] * 3
    assert account.dropped == {"not drawn (source weight below 1)": 7}
    assert account.rows_used == 13 and account.num_documents == 28 and account.tokens_per_epoch == 56
    again, _ = select_documents(cache, max_length=None, seed=1)
    other, _ = select_documents(cache, max_length=None, seed=2)
    assert np.array_equal(again.index, documents.index) and not np.array_equal(other.index, documents.index)


def test_an_epoch_has_a_largest_number_of_documents(tmp_path, monkeypatch):
    """Sources may be repeated 10,000 times each, but an epoch is an array of its documents."""
    monkeypatch.setattr("minisft.data.documents.MAX_DOCUMENTS", 9)
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": [i, i]} for i in range(1, 4)])
    for weight, is_fine in ((3, True), (3.4, False), (10_000, False)):
        cache = build(tmp_path, {"path": path, "weight": weight})
        if is_fine:
            assert len(select_documents(cache, max_length=None)[0]) == 9
            continue
        with pytest.raises(UserError, match="documents an epoch, at most 9"):
            select_documents(cache, max_length=None)


def test_a_held_out_row_is_never_trained(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"input_ids": [1, i]} for i in range(1, 21)])
    documents, _ = select_documents(build(tmp_path, {"path": path, "weight": 3.0}), max_length=None)
    train, held_out = split_documents(documents, 0.25, seed=7)
    assert len(held_out) == 5 and len(set(held_out.index)) == 5  # once each
    assert not set(train.index) & set(held_out.index) and len(train) == 45
    assert np.array_equal(split_documents(documents, 0.25, seed=7)[1].index, held_out.index)
    assert not np.array_equal(split_documents(documents, 0.25, seed=8)[1].index, held_out.index)
    for fraction in (0.0, 0.01, 1.0):
        with pytest.raises(UserError, match="holding out"):
            split_documents(documents, fraction, seed=7)


ROW = st.one_of(
    st.fixed_dictionaries({"text": st.text("ab \n\u00e4", max_size=30)}),
    st.fixed_dictionaries({"text": st.just("Hello " * 20), "weight": st.sampled_from([0, 0.5, 1, -1])}),
    st.just({"wrong": 1}),
    st.just([]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(ROW, max_size=8),
    st.sampled_from([None, 2, 5, 12]),
    st.sampled_from(["drop", "right", "left"]),
    st.sampled_from([0.4, 1.0, 1.7, 2.0]),
)
def test_the_account_closes(tmp_path_factory, rows, max_length, truncation, weight):
    """Rows and tokens against a count by hand over the documents themselves (Accounting asserts its own sums)."""
    folder = tmp_path_factory.mktemp("account")
    path = jsonl(folder / "a.jsonl", [{"text": "first"}, *rows])
    cache = build(folder, {"path": path, "weight": weight}, on_bad_row="skip")
    try:
        documents, account = select_documents(cache, max_length=max_length, truncation=truncation)
    except UserError as error:
        assert "no row is left" in str(error)
        return
    assert account.rows_read == 1 + len(rows) and account.tokens == len(cache.ids)
    trained = context = cut = 0
    for d, start, end in sorted(set(zip(documents.index, documents.start, documents.end))):
        weights = np.ones(end - start) if cache.weights is None else cache.weights[start:end]
        targets = int(((cache.kinds[start:end] >= TRAINED) & (weights > 0))[1:].sum())
        assert targets > 0 and (max_length is None or end - start <= max_length)
        trained, context = trained + targets, context + int(end - start) - targets
        cut += int(cache.offsets[d + 1] - cache.offsets[d] - (end - start))
    assert (account.trained, account.context, account.cut) == (trained, context, cut)
    assert account.rows_used == len(set(documents.index)) and account.tokens_per_epoch == documents.lengths.sum()


def test_a_document_is_shown_with_what_is_trained(tmp_path):
    cache = build(tmp_path, jsonl(tmp_path / "a.jsonl", [{"question": "Hi \U0001f600", "answer": "\U0001f600 you"}]))
    documents, _ = select_documents(cache, max_length=None)
    text = "<|im_start|>user\nHi \U0001f600<|im_end|>\n<|im_start|>assistant\n{}\U0001f600 you<|im_end|>{}\n"
    assert show_document(documents, 0, TOKENIZER) == text.format("[", "]")
    assert show_document(documents, 0, TOKENIZER, colour=True) == text.format("\x1b[32m", "\x1b[0m")


# ---- real data


@pytest.mark.parametrize(
    "name, rows, layout",
    [
        ("gsm8k_test.jsonl", 1319, "question_answer, by the chat template; trained: the answer"),
        ("alpaca_en_demo.json", 999, "instruction, by the chat template; trained: the answer"),
        ("glaive_toolcall_en_demo.json", 300, "sharegpt, by the chat template; trained: the assistant's turns"),
    ],
)
def test_real_data_is_used_to_the_last_row(tmp_path, shared_data, name, rows, layout):
    tokenizer = _real_tokenizer(shared_data)
    cache = build(tmp_path, str(shared_data / name), tokenizer)
    documents, account = select_documents(cache, max_length=None)
    assert account.rows_read == account.rows_used == len(documents) == rows and account.dropped == {}
    assert account.cut == account.in_dropped == 0
    assert cache.manifest["sources"][0]["layout"] == layout
    ends = np.array(cache.offsets[1:]) - 2  # the last tokens are <|im_end|> and a newline
    assert (cache.ids[ends] == tokenizer.eos_token_id).all()
    if name != "glaive_toolcall_en_demo.json":
        assert (cache.kinds[ends] == TERMINATOR | TRAINED).all()
        ends_trained = ((cache.kinds == TERMINATOR | TRAINED) & (cache.ids == tokenizer.eos_token_id)).sum()
        assert ends_trained == rows  # and the question's <|im_end|>, the same id, is not


def _real_tokenizer(shared_data, made=[]):  # noqa: B006 - trained once
    if not made:
        lines = (shared_data / "gsm8k_test.jsonl").read_text(encoding="utf-8").split("\n")[:300]
        made.append(train_tokenizer(lines, 1000))
    return made[0]
