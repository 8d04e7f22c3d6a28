"""Streams of several sources at once, and of preference data: every row in its turn, in proportion, and the same after a stop."""

import json
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_dpo_run import DPO, write_pairs
from test_ranks import join, start_ranks
from test_stream import assert_one_chunk_is_the_data_set
from tiny import logged, parts, settings, start, train, train_quietly, weights, write_rows

from minisft.data.chunks import Place, find_files, read_chunk, read_places, shares, start_of, write_chunk
from minisft.data.sources import parse_source, read_rows
from minisft.data.stream_rows import number_of
from minisft.errors import DATA, UserError
from minisft.ledger import read_ledger
from minisft.prepare import data as prepare_data

STREAM = {"data.stream": True, "data.stream_rows": 20, "train.max_steps": 12, "train.lr_scheduler_type": "constant"}
RATIO = [3.0, 1.0]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with rows and pairs, half of them with a label, and a model that was trained a little."""
    folder = tmp_path_factory.mktemp("mix")
    settings(folder)
    write_rows(folder / "a.jsonl", 33, source="a")
    write_rows(folder / "b.jsonl", 11, source="b")
    write_pairs(folder / "pairs.jsonl", count=21)
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()[:21]]
    answers = [{**row, "label": i % 3 == 0} for i, row in enumerate(rows)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return folder


@pytest.fixture
def no_process(monkeypatch):
    """The run makes all its chunks itself: a process that starts takes seconds."""
    monkeypatch.setattr(prepare_data.Chunks, "ahead", lambda *arguments: lambda: None)


def mix_of(home: Path, **keys) -> dict:
    sources = [{"path": str(home / name), "weight": weight} for name, weight in zip(("a.jsonl", "b.jsonl"), RATIO)]
    return STREAM | {"data.stream_mix": True, "data.train_data": sources} | keys


# ---- the rows of chunks ---------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=15)
@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=2), min_size=2, max_size=4), st.integers(1, 9), st.data()
)
def test_a_source_comes_whole_before_it_comes_again_and_in_proportion(sizes, rows, data):
    """sizes: the rows of the files of each source."""
    weights = [data.draw(st.sampled_from([0.1, 0.5, 1.0, 2.0, 7.0])) for _ in sizes]
    with tempfile.TemporaryDirectory() as name:
        folder, sources, contents = Path(name), [], []
        for s, of_source in enumerate(sizes):
            for f, count in enumerate(of_source):
                lines = [json.dumps({"text": f"{s} {f} {i}"}) + "\n" for i in range(count)]
                (folder / f"source-{s}-{f}.jsonl").write_text("".join(lines))
            sources.append(parse_source({"path": str(folder / f"source-{s}-*.jsonl"), "weight": weights[s]}))
            contents.append([row.data for row in read_rows(sources[-1])])
        sources = find_files(sources, is_mix=True)
        at, found = start_of(sources, is_mix=True), [[] for _ in sources]
        for number in range(1, 8):
            chunk = folder / "chunks" / str(number)
            write_chunk(chunk, sources, at, rows)
            of_chunk, parts_of_chunk, at = read_chunk(chunk, sources)
            for source in of_chunk:
                assert source.weight == 1.0
                found[[s.label for s in sources].index(source.label)] += [row.data for row in read_rows(source)]
            for part in parts_of_chunk:  # the numbers of its rows
                rows_of_part = [row.data for row in read_rows(parse_source(str(chunk / part.name)))]
                assert contents[part.source][part.number : part.number + len(rows_of_part)] == rows_of_part
            taken = [len(rows_of_source) for rows_of_source in found]
            assert sum(taken) == number * rows == sum(place.taken for place in at)
            bound = 1 if rows * min(weights) >= sum(weights) else 2
            for count, weight, place, content in zip(taken, weights, at, contents):
                assert abs(count - number * rows * weight / sum(weights)) < bound + 1e-9
                assert (place.passes, place.number) == divmod(count, len(content))
        for rows_of_source, content in zip(found, contents):
            assert rows_of_source == [content[i % len(content)] for i in range(len(rows_of_source))]


@given(
    st.lists(st.floats(0.001, 1000), min_size=2, max_size=8), st.lists(st.integers(1, 1000), min_size=1, max_size=20)
)
def test_shares_of_any_weights_keep_their_bound(weights, chunks):
    begin = tuple(Place(source=number) for number in range(len(weights)))
    for rows in chunks:
        numbers = shares(begin, weights, rows)
        assert sum(numbers) == rows and min(numbers) >= 0
        begin = tuple(Place(taken=place.taken + number) for place, number in zip(begin, numbers))
        total = sum(place.taken for place in begin)
        assert all(abs(p.taken - total * w / sum(weights)) < 2 + 1e-6 for p, w in zip(begin, weights))


def test_a_mix_of_the_hub_and_of_this_disk(home, tmp_path, monkeypatch):
    """A repository of two files of 5 rows beside a local source: one of its files is here at a time, and rows have its names."""
    for i in range(2):
        write_rows(tmp_path / f"train-{i}.jsonl", 5)
    downloads = []

    def download(repo, commit, files, *, local_files_only=False, folder=None):
        downloads.append(files[0])
        folder.mkdir(exist_ok=True, parents=True)
        return [Path(shutil.copy(tmp_path / files[0], folder / files[0]))]

    monkeypatch.setattr("minisft.hub.list_dataset", lambda *a, **k: (["train-0.jsonl", "train-1.jsonl"], "c0ffee"))
    monkeypatch.setattr("minisft.hub.download_dataset", download)
    sources = [{"path": str(home / "a.jsonl")}, {"path": "owner/rows", "weight": 2.0}]
    run, _ = parts(home, output_dir=str(tmp_path / "out"), **mix_of(home, **{"data.train_data": sources}))
    assert downloads == ["train-0.jsonl", "train-1.jsonl", "train-0.jsonl"]  # 13 of 20 rows
    (chunks,) = (tmp_path / "token_cache").glob("stream-*")
    assert [path.name for path in (chunks / "downloads").iterdir()] == ["train-0.jsonl"]
    documents = run.train.documents
    places = [documents.cache.place(document) for document in range(20)]
    assert places[7:] == [f"owner/rows/train-{i % 10 // 5}.jsonl:{i % 5 + 1}" for i in range(13)]
    assert documents.numbers.tolist() == [2 * i for i in range(7)] + [2 * (i % 10) + 1 for i in range(13)]
    find = partial(number_of, run.train.stream.sources, folder=tmp_path / "found", is_mix=True)
    assert find(name="train-1.jsonl", line=3) == find(name="owner/rows/train-1.jsonl", line=3) == 2 * 7 + 1


def test_places_of_an_earlier_version_are_refused():
    with pytest.raises(UserError, match="earlier version"):
        read_places({"row": 5})


# ---- runs of a mix --------------------------------------------------------------------------------------------------


def test_a_mix_whose_chunk_has_all_rows_is_the_data_set(home, tmp_path, no_process):
    """33 rows and 11 with weights 3 and 1: a chunk of 44 rows is an epoch, and the second chunk is the second epoch."""
    mix = mix_of(home, **{"data.stream_rows": 44})
    train(home, output_dir=str(tmp_path / "stream"), **mix)
    sources = [str(home / "a.jsonl"), str(home / "b.jsonl")]
    whole = {"train.max_steps": 12, "train.lr_scheduler_type": "constant", "data.train_data": sources}
    train(home, output_dir=str(tmp_path / "whole"), **whole)
    assert weights(tmp_path / "stream") == weights(tmp_path / "whole")
    for name in ("loss", "num_tokens", "losses/source a.jsonl", "losses/source b.jsonl"):
        assert logged(tmp_path / "stream", name) == logged(tmp_path / "whole", name)
    assert logged(tmp_path / "stream", "chunk")[-1] == 1
    assert logged(tmp_path / "stream", "rows/source a.jsonl")[-1] == 66
    assert logged(tmp_path / "stream", "passes/source b.jsonl")[-1] == 2


def test_a_stopped_mix_resumes_at_any_step(home, tmp_path, no_process):
    """Chunks of 20 rows are 15 and 5; the first source ends inside of the third chunk."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    train(home, output_dir=str(whole), **mix_of(home))
    for max_steps in (3, 7, 12):
        train(home, output_dir=str(out), **mix_of(home, **{"train.max_steps": max_steps}))
    assert weights(out) == weights(whole)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    other = mix_of(home, **{"train.max_steps": 14})
    other["data.train_data"] = [{**source, "weight": 1} for source in other["data.train_data"]]
    with pytest.raises(UserError, match="mix was"):
        train(home, output_dir=str(out), **other)


def test_the_summary_has_the_shares(home):
    run, _ = parts(home, **mix_of(home))
    told = "\n".join(run.summary)
    assert f"75.0% {home / 'a.jsonl'}, 25.0% {home / 'b.jsonl'}" in told and "rows: 20 read" in told


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"data.stream_mix": False}, "weight = 3, but the sources of this stream come one after the other"),
        ({"data.stream": False, "data.stream_rows": 100_000}, "the data is not streamed"),
    ],
)
def test_weights_need_a_mix_and_a_mix_needs_a_stream(home, keys, told):
    with pytest.raises(UserError, match=told):
        parts(home, **mix_of(home, **keys))


# ---- preference data ------------------------------------------------------------------------------------------------

PACKED = {"data.packing": True, "data.max_length": 48, "dpo.share_prompt": True}
KTO = {"dpo.loss_type": ["kto"]}


def preference(home: Path, kind: str, **keys) -> dict:
    data = {"data.train_data": str(home / ("answers.jsonl" if kind == "kto" else "pairs.jsonl"))}
    own = {"pairs": {}, "packed": PACKED, "kto": KTO}[kind]
    return DPO | {"train.lr_scheduler_type": "constant", "train.max_steps": 10} | data | own | keys


@pytest.mark.parametrize("kind", [pytest.param("pairs", marks=pytest.mark.slow), "packed", "kto"])
def test_a_stream_of_one_chunk_of_answers_is_the_data_set(home, tmp_path, no_process, kind):
    names = ("loss", "num_tokens", "rewards/chosen")
    assert_one_chunk_is_the_data_set(home, tmp_path, preference(home, kind), names, passes=1)


@pytest.mark.parametrize("kind", [pytest.param("packed", marks=pytest.mark.slow), "kto"])
def test_a_stopped_stream_of_answers_resumes(home, tmp_path, no_process, kind):
    """21 rows in chunks of 10: the last chunk of a pass of KTO's would have one row, and has nine of the next pass too."""
    keys = preference(home, kind, **{"data.stream": True, "data.stream_rows": 10})
    train(home, output_dir=str(tmp_path / "whole"), **keys)
    for max_steps in (3, 7, 10):
        train(home, output_dir=str(tmp_path / "out"), **(keys | {"train.max_steps": max_steps}))
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert logged(tmp_path / "out", "chunk")[-1] >= 3


def test_a_later_chunk_is_held_to_what_the_model_can_share(home, tmp_path, no_process):
    """A sliding window that is shorter than a pair of the second chunk."""
    lines = (home / "pairs.jsonl").read_text().splitlines(keepends=True)
    long = json.dumps({"prompt": "p" * 30 + ".", "chosen": "a" * 12 + ".", "rejected": "b" * 12 + "."}) + "\n"
    (tmp_path / "pairs.jsonl").write_text("".join([*lines[:10], long, *lines[10:]]))
    model = {**settings(home)["model.config"], "model_type": "mistral", "sliding_window": 50}
    keys = preference(home, "packed", **{"data.stream": True, "data.stream_rows": 10, "model.config": model})
    keys |= {"data.train_data": str(tmp_path / "pairs.jsonl"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match="50 tokens back, and pairs of"):
        train(home, **keys)


@pytest.mark.parametrize("least, ends", [(1, [(0, 3), (0, 6), (1, 0)]), (2, [(0, 3), (0, 6), (1, 2)])])
def test_a_chunk_may_have_a_least_number_of_rows(tmp_path, least, ends):
    write_rows(tmp_path / "rows.jsonl", 7)
    sources = find_files([parse_source(str(tmp_path / "rows.jsonl"))])
    at = start_of(sources, is_mix=False)
    for number, end in enumerate(ends):
        write_chunk(tmp_path / str(number), sources, at, 3, least=least)
        *_, at = read_chunk(tmp_path / str(number), sources)
        assert (at[0].passes, at[0].number) == end


# ---- several ranks --------------------------------------------------------------------------------------------------


@pytest.mark.slow  # three processes and those that prepare chunks
@pytest.mark.parametrize("kind", ["mix", "packed"])
def test_two_ranks_are_one(home, tmp_path, kind):
    keys = mix_of(home) if kind == "mix" else preference(home, kind, **{"data.stream": True, "data.stream_rows": 10})
    keys |= {"log.ledger": True}
    one = keys | {"output_dir": str(tmp_path / "one"), "train.per_device_train_batch_size": 4, "train.max_steps": 8}
    two = one | {"output_dir": str(tmp_path / "two"), "train.per_device_train_batch_size": 2}
    assert join([start(train_quietly, home, one), *start_ranks(home, two)], 240) == (0, 0, 0)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)  # as tests/test_ranks.py
    for name in ("num_tokens", "chunk"):
        assert logged(tmp_path / "two", name) == logged(tmp_path / "one", name)
    found, whole = read_ledger(tmp_path / "two"), read_ledger(tmp_path / "one")
    rows = [sorted(zip(ledger.step.tolist(), ledger.document.tolist())) for ledger in (found, whole)]
    assert rows[0] == rows[1] and len(rows[0]) >= 30


def test_a_source_without_rows_is_told(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n" * 70)
    write_rows(tmp_path / "rows.jsonl", 7)
    sources = find_files([parse_source(str(tmp_path / name)) for name in ("rows.jsonl", "empty.jsonl")], is_mix=True)
    with pytest.raises(UserError, match="no row in .*empty.jsonl") as caught:
        write_chunk(tmp_path / "chunk", sources, start_of(sources, is_mix=True), 4)
    assert caught.value.exit_code == DATA and not np.any([path.name == "chunk" for path in tmp_path.iterdir()])
