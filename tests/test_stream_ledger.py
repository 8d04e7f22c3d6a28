"""The ledger of a stream: rows keep their numbers over chunks, passes and resumes, and are found again in their files."""

import gzip
import json
import tempfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_ledger import said, table
from test_stream_mix import home, mix_of, no_process, preference  # noqa: F401
from tiny import parts, train, train_until_killed, weights

from minisft.__main__ import main
from minisft.commands.ledger import longest_of
from minisft.data.chunks import find_files
from minisft.data.sources import parse_source, read_rows
from minisft.data.stream_rows import copy_rows, number_of
from minisft.errors import UserError
from minisft.ledger import MARKER, Ledger
from minisft.report.page import data_of

STREAM = {"data.stream": True, "data.stream_rows": 20, "train.max_steps": 20, "log.ledger": True}
STREAM |= {"train.lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def streamed(home) -> Path:  # noqa: F811
    """64 rows in chunks of 20, that is 3 steps of 8 and for the last chunk one: two passes."""
    return train(home, output_dir=str(home / "streamed"), **STREAM).output_dir


@pytest.fixture(scope="module")
def mixed(home) -> Path:  # noqa: F811
    return train(home, output_dir=str(home / "mixed"), **mix_of(home, **{"log.ledger": True})).output_dir


def line_of(path: Path, line: int) -> dict:
    return json.loads(path.read_text().splitlines()[line - 1])


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_every_pass_has_every_row_once(streamed):
    rows = list(table(streamed))
    passes = [[row for step, row in rows if low < step <= low + 10] for low in (0, 10)]
    assert [sorted(of_pass) for of_pass in passes] == [list(range(64))] * 2
    assert [row for step, row in rows if step <= 3] != sorted(row for step, row in rows if step <= 3)  # shuffled
    assert (streamed / "ledger-rank-0.bin").stat().st_size == 8 * (len(rows) + 1)


def test_the_ledger_of_a_stream_of_one_chunk_is_that_of_the_data_set(home, tmp_path, no_process):  # noqa: F811
    whole = {"train.max_steps": 9, "log.ledger": True}
    train(home, output_dir=str(tmp_path / "whole"), **whole)
    train(home, output_dir=str(tmp_path / "stream"), **whole, **{"data.stream": True})
    assert table(tmp_path / "stream") == table(tmp_path / "whole")


def test_a_stopped_stream_has_the_ledger_of_one_that_was_not(home, streamed, tmp_path, no_process):  # noqa: F811
    for max_steps in (3, 20):
        train(home, output_dir=str(tmp_path / "out"), **(STREAM | {"train.max_steps": max_steps}))
    assert table(tmp_path / "out") == table(streamed)


@pytest.mark.parametrize("stop", [5, pytest.param(9, marks=pytest.mark.slow)])
def test_a_mix_that_was_killed_and_resumed_is_one_that_was_not(home, mixed, tmp_path, no_process, stop):  # noqa: F811
    """Chunks of three steps, saves after four: the run goes back into the chunk before, or to the middle of this one."""
    keys = mix_of(home, **{"log.ledger": True, "checkpoint.save_steps": 4, "output_dir": str(tmp_path / "out")})
    train_until_killed(home, stop, **keys)
    train(home, **keys)
    assert table(tmp_path / "out") == table(mixed) and weights(tmp_path / "out") == weights(mixed)
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == (mixed / "metrics.jsonl").read_bytes()


def test_the_rows_of_a_mix_are_numbered_by_source(home, mixed):  # noqa: F811
    """72 of 96 rows are those of the first source, of which there are 33: the third pass has begun."""
    times = {}
    for _, number in table(mixed):
        times[number] = times.get(number, 0) + 1
    assert {number // 2 for number in times if number % 2 == 0} == set(range(33))
    assert {number // 2 for number in times if number % 2 == 1} == set(range(11))
    assert sum(count for number, count in times.items() if number % 2 == 0) >= 60


def test_pairs_of_a_stream_have_one_loss_each(home, tmp_path, no_process):  # noqa: F811
    keys = preference(home, "packed", **{"data.stream": True, "data.stream_rows": 10, "log.ledger": True})
    result = train(home, output_dir=str(tmp_path / "out"), **keys)
    rows = [row for _, row in table(result.output_dir)]
    assert sorted(rows[:21]) == list(range(21))


def test_a_number_without_room_is_told(tmp_path):
    ledger = Ledger(tmp_path, 0, 0)
    losses = [(np.array([0]), np.float32([1]))]
    ledger.write(1, losses, np.array([MARKER // 2 - 1]))
    with pytest.raises(UserError, match="no room in the ledger"):
        ledger.write(2, losses, np.array([MARKER // 2]))
    ledger.close()
    assert table(tmp_path) == {(1, MARKER // 2 - 1): 1.0}


def test_documents_of_one_row_share_its_entry(tmp_path):
    """A conversation that is rendered turn by turn: the mean is over the targets of both documents; the longer one is shown."""
    numbers, offsets = np.array([3, 7, 7, 9]), np.array([0, 5, 9, 20, 22])
    with closing(Ledger(tmp_path, 0, 0)) as ledger:
        ledger.write(1, [(np.array([1, 2, 2, 3]), np.float32([1, 2, 6, 5]))], numbers)
    assert table(tmp_path) == {(1, 7): 3.0, (1, 9): 5.0}
    documents = SimpleNamespace(numbers=numbers, cache=SimpleNamespace(group=1, offsets=offsets))
    assert [longest_of(documents, number) for number in (3, 7, 9)] == [0, 2, 3]


# ---- the files ------------------------------------------------------------------------------------------------------


@hypothesis_settings(max_examples=15)
@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=4), st.booleans(), st.data())
def test_rows_are_found_by_their_numbers(files, is_mix, data):
    """files: which of their lines are empty. The first is a source, the others are another; every row by its file and line."""
    with tempfile.TemporaryDirectory() as name:
        folder, names = Path(name), []
        for i, empty in enumerate(files):
            lines = ["\n" if is_empty else json.dumps({"text": f"{i} {j}"}) + "\n" for j, is_empty in enumerate(empty)]
            suffix = data.draw(st.sampled_from([".jsonl", ".jsonl.gz"]))
            content = "".join([json.dumps({"text": f"{i} first"}) + "\n", *lines]).encode()
            names.append(str(folder / f"{'other-' if i else ''}{i}{suffix}"))
            Path(names[-1]).write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
        chosen = [names[0], str(folder / "other-*")] if len(files) > 1 else names
        sources = find_files([parse_source(path) for path in chosen], is_mix=is_mix)
        expected, numbers = {}, {}
        for path in names:
            for row in read_rows(parse_source(path)):
                if hasattr(row, "data"):
                    place = path, row.line
                    numbers[place] = number_of(sources, path, row.line, folder, is_mix=is_mix)
                    expected[place] = row.data
        assert len(set(numbers.values())) == len(numbers)
        (folder / "copies").mkdir()
        for part in copy_rows(folder / "copies", sources, list(numbers.values()), is_mix=is_mix):
            (row,) = read_rows(parse_source(str(folder / "copies" / part.name)))
            place = sources[part.source].files[part.file], part.row + 1
            assert row.data == expected.pop(place)
            assert part.number * (len(sources) if is_mix else 1) + (part.source if is_mix else 0) == numbers[place]
        assert not expected


def test_rows_of_parquet_files_are_found(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    values = [{"text": f"row {i}"} for i in range(43)]
    pq.write_table(pa.Table.from_pylist(values[:30]), tmp_path / "0.parquet", row_group_size=8)
    pq.write_table(pa.Table.from_pylist(values[30:]), tmp_path / "1.parquet", row_group_size=50)
    sources = find_files([parse_source(str(tmp_path / "*.parquet"))])
    numbers = [number_of(sources, "0.parquet", 30, tmp_path, is_mix=False)]
    numbers += [number_of(sources, "1.parquet", line, tmp_path, is_mix=False) for line in (1, 13)]
    assert numbers == [29, 30, 42]
    (tmp_path / "copies").mkdir()
    parts = copy_rows(tmp_path / "copies", sources, numbers, is_mix=False)
    found = [next(iter(read_rows(parse_source(str(tmp_path / "copies" / part.name))))).data for part in parts]
    assert found == [values[number] for number in numbers]
    with pytest.raises(UserError, match="row 43 of the stream: there are 43"):
        copy_rows(tmp_path / "copies", sources, [43], is_mix=False)


# ---- the commands ---------------------------------------------------------------------------------------------------


def test_one_row_of_a_stream_over_all_steps(home, streamed, capsys):  # noqa: F811
    for name in ("35", "rows.jsonl:35"):
        (found,) = json.loads(said(capsys, str(streamed), "--row", name, "--json"))
        assert found["row"] == f"{home / 'rows.jsonl'}:35" and found["document"] == 34
        assert line_of(home / "rows.jsonl", 35)["completion"] in found["text"]
        assert {(one["step"], 34): one["loss"] for one in found["steps"]}.items() <= table(streamed).items()
        assert len(found["steps"]) == 2


@pytest.mark.parametrize("option", ["--hardest", "--forgotten"])
def test_the_hardest_and_the_forgotten_rows_of_a_mix(home, mixed, capsys, option):  # noqa: F811
    last, lowest = {}, {}
    for (_, number), loss in table(mixed).items():
        last[number], lowest[number] = loss, min(loss, lowest.get(number, loss))
    by = last if option == "--hardest" else {number: last[number] - lowest[number] for number in last}
    found = json.loads(said(capsys, str(mixed), option, "7", "--json"))
    assert [by[one["document"]] for one in found] == sorted(by.values(), reverse=True)[:7]
    for one in found:
        path, _, line = one["row"].rpartition(":")
        assert Path(path).name == ("a.jsonl", "b.jsonl")[one["document"] % 2] and int(line) == one["document"] // 2 + 1
        assert line_of(Path(path), int(line))["completion"] in one["text"]
    (row,) = json.loads(said(capsys, str(mixed), "--row", "b.jsonl:3", "--json"))
    assert row["document"] == 5
    assert main(["ledger", str(mixed), "--row", "3"]) != 0 and "FILE:NUMBER" in capsys.readouterr().err


def test_files_that_have_changed_are_told(home, tmp_path, no_process, capsys):  # noqa: F811
    lines = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    keys = STREAM | {"data.train_data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "out")}
    train(home, **(keys | {"train.max_steps": 5}))  # the checkpoint is in the second chunk
    said(capsys, str(tmp_path / "out"), "--hardest", "1")
    (tmp_path / "rows.jsonl").write_text("".join([*lines, lines[0]]))
    said(capsys, str(tmp_path / "out"), "--hardest", "1")
    (tmp_path / "rows.jsonl").write_text("".join(lines[1:]))
    assert main(["ledger", str(tmp_path / "out"), "--hardest", "1"]) == 65
    assert "it has changed before row 21" in capsys.readouterr().err


def test_the_report_of_a_stream_shows_its_first_rows(home, streamed):  # noqa: F811
    chart, rows = data_of(streamed)
    assert chart.title.endswith("of the first 1,000 rows") and sum(number for _, number in chart.bars) == 64
    assert [row["place"] for row in rows] == [f"rows.jsonl:{line}" for line in (1, 13, 26, 38, 51, 64)]


def test_a_message_names_the_file_of_the_source(home, tmp_path, no_process):  # noqa: F811
    """Not that of the chunk: the places of rows are those that the user knows."""
    run, _ = parts(home, output_dir=str(tmp_path / "out"), **STREAM)
    run.train.stream.reach(run.train, 3)
    places = {run.train.documents.cache.place(document) for document in range(20)}
    assert places == {f"{home / 'rows.jsonl'}:{line}" for line in range(21, 41)}
