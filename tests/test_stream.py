"""Streams: chunks hold every row once, a stream of one chunk is the data set, a resumed run is one that was never stopped."""

import gzip
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_ranks import join, start_ranks
from tiny import logged, parts, settings, start, train, train_quietly, weights, write_rows

from minisft.data import chunks, sources, stream_rows
from minisft.data.chunks import Place, find_files, read_chunk, start_of, write_chunk
from minisft.data.loader import Loader
from minisft.data.sources import Row, parse_source, read_rows
from minisft.errors import DATA, UserError
from minisft.prepare import data as prepare_data

STREAM = {"data.stream": True, "data.stream_rows": 20, "train.max_steps": 20, "train.lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    settings(folder)
    return folder


@pytest.fixture
def no_process(monkeypatch):
    """The run makes all its chunks itself: a process that starts takes seconds."""
    monkeypatch.setattr(prepare_data.Chunks, "ahead", lambda *arguments: lambda: None)


# ---- chunks -------------------------------------------------------------------------------------------------------


def chunks_of(sources: list, rows: int, folder: Path) -> list[list]:
    """The rows of every chunk of one pass, as values."""
    sources = find_files([parse_source(source) for source in sources])
    found, at = [], start_of(sources, is_mix=False)
    while at[0].passes == 0:
        chunk = folder / f"chunk-{len(found)}"
        write_chunk(chunk, sources, at, rows)
        of_chunk, _, at = read_chunk(chunk, sources)
        found.append([value_of(row) for source in of_chunk for row in read_rows(source)])
    return found


def value_of(row) -> object:
    return row.data if isinstance(row, Row) else row.reason


LINE = st.one_of(
    st.integers(0, 99).map(lambda i: json.dumps({"text": f"row {i} \u2028 ü"}, ensure_ascii=False)), st.just(""), st.just(" "),
    st.just("{broken"),
)  # fmt: skip


@hypothesis_settings(max_examples=40)
@given(st.lists(st.lists(LINE, min_size=1, max_size=9), min_size=1, max_size=3), st.integers(1, 7), st.data())
def test_chunks_have_the_rows_of_the_files(files, rows, data):
    with tempfile.TemporaryDirectory() as name:
        folder, sources, expected = Path(name), [], []
        for i, lines in enumerate(files):
            end, bom = data.draw(st.sampled_from([b"\n", b"\r\n"])), data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
            content = bom + b'{"text": "first"}' + end + end.join(line.encode() for line in lines)
            content += data.draw(st.sampled_from([b"", end]))
            path = folder / f"{i}.jsonl{data.draw(st.sampled_from(['', '.gz']))}"
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
            sources.append(str(path))
            expected += [value_of(row) for row in read_rows(parse_source(str(path)))]
        chunks = chunks_of(sources, rows, folder / "chunks")
        assert [row for chunk in chunks for row in chunk] == expected
        empty = sum(row == "empty line" for row in expected)  # they stay with the row behind them
        assert all(rows <= len(chunk) <= rows + empty for chunk in chunks[:-1])


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_row_that_is_too_long_is_one_row(tmp_path, monkeypatch, end):
    """A row is cut at 200 bytes, and what is behind it is read 64 bytes at a time."""
    for room in (sources, chunks):
        monkeypatch.setattr(room, "MAX_ROW_BYTES", 200)
        monkeypatch.setattr(room, "READ_AT_ONCE", 64)
    path = tmp_path / "rows.jsonl"
    lines = [b'{"text": "%s"}' % (b"a" * n) for n in (5, 1000, 6, 204, 187, 7, 900)]
    path.write_bytes(b"\n".join(lines) + end)
    expected = [value_of(row) for row in read_rows(parse_source(str(path)))]
    assert expected.count("too long") == 3 and len(expected) == 7
    for rows in (1, 2, 7):
        found = chunks_of([str(path)], rows, tmp_path / f"chunks-{rows}")
        assert [row for chunk in found for row in chunk] == expected
    line = stream_rows.copy_rows(tmp_path, find_files([parse_source(str(path))]), [5], is_mix=False)[0]
    assert json.loads((tmp_path / line.name).read_bytes()) == {"text": "a" * 7}


@pytest.mark.parametrize("rows", [1, 7, 10, 25, 60])
def test_chunks_of_parquet_files(tmp_path, rows):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = [{"text": f"row {i}", "list": [{"a": i}], "day": None if i % 3 else "x"} for i in range(43)]
    pq.write_table(pa.Table.from_pylist(values[:30]), tmp_path / "0.parquet", row_group_size=8)
    pq.write_table(pa.Table.from_pylist(values[30:]), tmp_path / "1.parquet", row_group_size=50)
    chunks = chunks_of([str(tmp_path / "*.parquet")], rows, tmp_path / "chunks")
    assert [row for chunk in chunks for row in chunk] == values
    assert [len(chunk) for chunk in chunks[:-1]] == [rows] * (len(chunks) - 1)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"path": "rows.jsonl", "weight": 2.0}, "weight = 2"),
        ("rows.jsonl[:10]", "the slice"),
        ("table.csv", "table.csv: cannot be read in pieces"),
        ("empty.jsonl", "empty"),
        ("absent.jsonl", "no file matches"),
    ],
)
def test_what_cannot_be_streamed_is_told_at_once(home, tmp_path, monkeypatch, source, told):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 3)
    (tmp_path / "table.csv").write_text("text\nhello\n")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=told) as caught:
        parts(home, output_dir="out", **STREAM, **{"data.train_data": source})
    assert caught.value.exit_code == DATA


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"train.max_steps": -1}, "max_steps"),
        ({"trainer_type": "dpo", "dpo.precompute_ref_log_probs": True}, "only the first chunk is there"),
        ({"data.eval_fraction": 0.1}, "eval_data"),
        ({"checkpoint.save_steps": "epoch"}, "epoch ends"),
        ({"data.stream": False}, "the data is not streamed"),
    ],
)
def test_keys_that_need_the_whole_data(home, keys, told):
    with pytest.raises(UserError, match=told):
        parts(home, **(STREAM | keys))


# ---- runs ---------------------------------------------------------------------------------------------------------


def assert_one_chunk_is_the_data_set(home, folder, keys, names, passes):
    train(home, output_dir=str(folder / "whole"), **keys)
    train(home, output_dir=str(folder / "stream"), **keys, **{"data.stream": True})
    assert weights(folder / "stream") == weights(folder / "whole")
    for name in names:
        assert logged(folder / "stream", name) == logged(folder / "whole", name)
    assert logged(folder / "stream", "chunk")[-1] >= passes


def test_a_stream_of_one_chunk_is_the_data_set(home, tmp_path, no_process):
    """Over two and a half passes, packed."""
    keys = {"train.max_steps": 20, "data.packing": True, "train.per_device_train_batch_size": 4}
    assert_one_chunk_is_the_data_set(home, tmp_path, keys, ("loss", "num_tokens", "packing_fill"), passes=2)


def test_a_stopped_run_resumes_inside_a_chunk_and_at_its_end(home, tmp_path, no_process):
    """20 rows in steps of 8 are three steps. Once with the chunks that the run had, once on a disk without them."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    train(home, output_dir=str(whole), **STREAM)
    for max_steps in (4, 6, 7, 12, 20):
        train(home, output_dir=str(out), **(STREAM | {"train.max_steps": max_steps}))
        if max_steps == 7:
            for folder in (home / "token_cache", tmp_path / "token_cache"):
                shutil.rmtree(folder, ignore_errors=True)
    assert weights(out) == weights(whole)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert logged(out, "chunk")[:7] == [0, 0, 0, 1, 1, 1, 2]


def test_a_chunk_without_a_usable_row_has_the_rows_behind_it(home, tmp_path, no_process, capsys):
    """Bad are the first 20 rows, and the last 24; once more all of them are."""
    rows = (home / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(["{bad"] * 20 + rows[20:40] + ["{bad"] * 24))
    (tmp_path / "good.jsonl").write_text("\n".join(rows[20:40]))
    (tmp_path / "bad.jsonl").write_text("{bad\n" * 64)
    keys = STREAM | {"data.on_bad_row": "skip", "train.max_steps": 8}
    for name in ("good", "rows"):
        source = {"data.train_data": str(tmp_path / f"{name}.jsonl"), "output_dir": str(tmp_path / name)}
        train(home, **keys | source)
    assert logged(tmp_path / "rows", "chunk") == [0, 0, 0, 1, 1, 1, 2, 2]
    assert logged(tmp_path / "rows", "num_tokens") == logged(tmp_path / "good", "num_tokens")
    assert "WARNING chunk 1 is made of later rows: no usable row in" in capsys.readouterr().err
    train(home, **keys | source | {"output_dir": str(tmp_path / "resumed"), "train.max_steps": 4})
    train(home, **keys | source | {"output_dir": str(tmp_path / "resumed")})
    assert weights(tmp_path / "resumed") == weights(tmp_path / "rows")
    with pytest.raises(UserError, match="no usable row in .*bad.jsonl: 4 read"):
        train(home, **keys | {"data.train_data": str(tmp_path / "bad.jsonl"), "output_dir": str(tmp_path / "bad")})


def test_chunks_behind_are_deleted(home, tmp_path, no_process):
    train(home, output_dir=str(tmp_path / "out"), **STREAM)
    (folder,) = (tmp_path / "token_cache").glob("stream-*")
    last = int(logged(tmp_path / "out", "chunk")[-1])
    kept = {path.name.split("-")[1] for path in folder.iterdir() if not path.name.startswith(".")}
    assert last > 3 and kept == {"000000", f"{last:06d}"}


def test_other_rows_are_refused(home, tmp_path, no_process):
    rows = shutil.copy(home / "rows.jsonl", tmp_path / "rows.jsonl")
    keys = STREAM | {"output_dir": str(tmp_path / "out"), "data.train_data": str(rows)}
    train(home, **(keys | {"train.max_steps": 5}))
    with pytest.raises(UserError, match="cannot be resumed: tokens would be repeated and missed"):
        train(home, **(keys | {"data.stream_rows": 21}))
    lines = Path(rows).read_text().splitlines(keepends=True)
    lines[25] = lines[25].replace('"prompt": "', '"prompt": "x')
    Path(rows).write_text("".join(lines))
    with pytest.raises(UserError, match="cannot be resumed: tokens would be repeated and missed"):
        train(home, **keys)
    lines[25] = lines[25].replace('"prompt": "x', '"prompt": "')
    Path(rows).write_text("".join([lines[0], *lines]))
    with pytest.raises(UserError, match="it has changed before row 21"):
        train(home, **keys)
    Path(rows).write_text("".join([*lines, lines[0]]))  # rows behind those of this chunk may come
    assert train(home, **keys).exit_code == 0


MIXED = [{"prompt": "a", "completion": "b"}] * 20 + [{"text": "plain"}] * 5 + [{"prompt": "c", "completion": "d"}] * 15
ALIKE = MIXED[:20] + [{"prompt": "a", "completion": "b", "system": "s"}] * 20


def test_the_first_row_of_a_stream_decides_the_format_of_all(home, tmp_path, no_process, monkeypatch):
    """Not that of a chunk: rows of another format are bad ones, named by file and line, as they are without a stream."""
    file, told = tmp_path / "rows.jsonl", []
    file.write_text("".join(json.dumps(row) + "\n" for row in MIXED))
    keys = STREAM | {"data.train_data": str(file), "train.max_steps": 5}
    for options in (keys, {"data.train_data": str(file)}):
        with pytest.raises(UserError, match="missing field: 'prompt'") as error:
            train(home, **options, output_dir=str(tmp_path / f"{len(told)}"))
        told.append(error.value.message)
    assert told[0] == told[1] and told[0].startswith(f"{file}:21: ")
    run, _ = parts(home, **keys, output_dir=str(tmp_path / "skip"), **{"data.on_bad_row": "skip"})
    run.train.stream.reach(run.train, 3)
    cache = run.train.documents.cache
    assert cache.manifest["sources"][0]["rows_used"] == 15 and cache.manifest["bad_rows"][0].startswith(f"{file}:21: ")
    assert {cache.place(document) for document in range(15)} == {f"{file}:{line}" for line in range(26, 41)}


def test_a_resumed_stream_keeps_the_format(home, tmp_path, no_process):
    """A later row with a system prompt would be rendered by the template, if it were the first one. The second source begins
    in a chunk that the resumed run does not read."""
    for name, rows in (("a", MIXED[:4]), ("b", ALIKE[16:28])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    keys = {
        "data.train_data": sources,
        "data.stream_rows": 4,
        "model.chat_template": "chatml",
        "checkpoint.save_steps": 1,
    }
    keys = STREAM | keys | {"train.per_device_train_batch_size": 2}
    train(home, **keys | {"train.max_steps": 8}, output_dir=str(tmp_path / "whole"))
    train(home, **keys | {"train.max_steps": 5}, output_dir=str(tmp_path / "stopped"))
    shutil.rmtree(tmp_path / "token_cache")
    train(home, **keys | {"train.max_steps": 8}, output_dir=str(tmp_path / "stopped"))
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_two_ranks_are_one(home, tmp_path):
    one = STREAM | {"output_dir": str(tmp_path / "one"), "train.per_device_train_batch_size": 8, "train.max_steps": 8}
    two = one | {"output_dir": str(tmp_path / "two"), "train.per_device_train_batch_size": 4}
    assert join([start(train_quietly, home, one), *start_ranks(home, two)], 120) == (0, 0, 0)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)  # as tests/test_ranks.py
    for name in ("num_tokens", "chunk"):
        assert logged(tmp_path / "two", name) == logged(tmp_path / "one", name)


def test_another_process_prepares_the_next_chunk(home, tmp_path):
    run, config = parts(home, output_dir=str(tmp_path / "out"), **STREAM)
    stream = run.train.stream
    stream.follow(run.train, 0)
    (folder,) = (tmp_path / "token_cache").glob("stream-*")
    deadline = time.monotonic() + 100
    while not list(folder.glob("chunk-000001-*.tokens/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    stream.follow(run.train, 3)
    assert stream.number == 1 and run.train.documents.cache.note == "found"
    stream.close()
    (begin,) = stream.begin
    assert begin.row == begin.number == 20 and begin.offset == sum(map(len, lines_of(home)[:20]))


def lines_of(home: Path) -> list[bytes]:
    return (home / "rows.jsonl").read_bytes().splitlines(keepends=True)


def test_batches_made_ahead_are_the_same(home, tmp_path, no_process):
    def batches(name: str, ahead: bool) -> list[list[np.ndarray]]:
        loader: Loader = parts(home, output_dir=str(tmp_path / name), **STREAM)[0].train
        found = []
        for step, of_step in enumerate(loader.steps(0, 12, ahead=ahead)):
            assert (
                loader.first_step <= step < loader.first_step + loader.steps_per_epoch
            )  # until the next one is asked for
            found.append([batch.input_ids.numpy() for batch in of_step])
        return found

    for one, other in zip(batches("a", False), batches("b", True), strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))


def test_files_of_the_hub_are_downloaded_one_at_a_time(tmp_path, monkeypatch):
    """A repository of three files: each is fetched when its rows are needed, and deleted when they are read."""
    for i in range(3):
        write_rows(tmp_path / f"train-{i}.jsonl", 10)
    downloads = []

    def download(repo, commit, files, *, local_files_only=False, folder=None):
        (name,) = files
        downloads.append(name)
        folder.mkdir(exist_ok=True, parents=True)
        return [Path(shutil.copy(tmp_path / name, folder / name))]

    monkeypatch.setattr("minisft.hub.list_dataset", lambda *a, **k: ([f"train-{i}.jsonl" for i in range(3)], "c0ffee"))
    monkeypatch.setattr("minisft.hub.download_dataset", download)
    sources = find_files([parse_source("owner/rows")])
    assert not downloads and sources[0].commit == "c0ffee"
    write_chunk(tmp_path / "s" / "a", sources, (Place(),), 15)
    assert downloads == ["train-0.jsonl", "train-1.jsonl"]
    assert [path.name for path in (tmp_path / "s" / "downloads").iterdir()] == ["train-1.jsonl"]
    found, _, at = read_chunk(tmp_path / "s" / "a", sources)
    expected = Place(file=1, row=5, offset=at[0].offset, before=at[0].before, number=15, taken=15)
    assert at == (expected,) and sum(1 for _ in read_rows(found[0])) == 15


def test_one_of_two_writers_waits(tmp_path):
    write_rows(tmp_path / "rows.jsonl", 50)
    sources = find_files([parse_source(str(tmp_path / "rows.jsonl"))])
    threads = [
        threading.Thread(target=write_chunk, args=(tmp_path / "s" / "a", sources, (Place(),), 30)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(read_rows(read_chunk(tmp_path / "s" / "a", sources)[0][0]))) == 30
