"""Parquet: rows as JSON values, bad rows and damaged files, slices, the missing package."""

import datetime
import json
import sys
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.cache import build_cache
from minisft.data.parquet import BATCH_ROWS
from minisft.data.rows import NotJson
from minisft.data.sources import list_files, parse_source, read_rows
from minisft.data.tokenizer import train_tokenizer
from minisft.errors import DATA, UserError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

TOKENIZER = train_tokenizer(["a text"], 300)


def write(path, table, **options):
    parquet.write_table(pyarrow.Table.from_pylist(table) if isinstance(table, list) else table, path, **options)
    return str(path)


def read(path, **source):
    return list(read_rows(parse_source({"path": str(path), **source})))


TURN = st.fixed_dictionaries({"role": st.text(max_size=5), "content": st.none() | st.text(max_size=9)})
ROW = st.fixed_dictionaries(
    {
        "text": st.none() | st.text(max_size=20),
        "n": st.none() | st.integers(-(2**63), 2**63 - 1),
        "x": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "b": st.none() | st.booleans(),
        "messages": st.none() | st.lists(TURN, max_size=3),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=6))
def test_parquet_and_jsonl_give_the_same_rows(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    types = [("text", pyarrow.string()), ("n", pyarrow.int64()), ("x", pyarrow.float64()), ("b", pyarrow.bool_())]
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema([*types, ("messages", pyarrow.list_(turn))]))
    write(folder / "a.parquet", table)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours, theirs = read(folder / "a.parquet"), read(folder / "a.jsonl")
    assert [row.data for row in ours] == [row.data for row in theirs] == rows
    assert [row.line for row in ours] == [row.line for row in theirs]


def test_values_that_become_text(tmp_path):
    day, at = datetime.date(2024, 1, 2), datetime.datetime(2024, 1, 2, 3, 4, 5, 600)
    values = {
        "day": day,
        "at": at,
        "zone": at.replace(tzinfo=datetime.UTC),
        "time": at.time(),
        "price": Decimal("1.50"),
    }
    (row,) = read(write(tmp_path / "a.parquet", [values]))
    assert row.data == {
        "day": "2024-01-02",
        "at": "2024-01-02T03:04:05.000600",
        "zone": "2024-01-02T03:04:05.000600+00:00",
        "time": "03:04:05.000600",
        "price": "1.50",
    }


def test_maps_are_objects(tmp_path):
    texts = pyarrow.array([[("a", 1), ("b", None)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    rows = read(write(tmp_path / "a.parquet", pyarrow.table({"m": texts})))
    assert [row.data["m"] for row in rows] == [{"a": 1, "b": None}, {}, None]
    numbers = pyarrow.array([[(1, 2)]], pyarrow.map_(pyarrow.int64(), pyarrow.int64()))
    (bad,) = read(write(tmp_path / "b.parquet", pyarrow.table({"m": numbers})))
    assert bad.data == {"m": NotJson("a map whose keys are not texts has no JSON form")}


def test_a_value_without_json_form_costs_its_own_row_and_only_if_it_is_read(tmp_path):
    columns = {
        "bytes": pyarrow.array([None, b"x", None]),
        "number": pyarrow.array([1.0, float("nan"), 2.0]),
        "inf": pyarrow.array([[1.0], [float("-inf")], []]),
        "length": pyarrow.array([None, datetime.timedelta(seconds=1), None]),
        "nanoseconds": pyarrow.array([None, 1, None], pyarrow.timestamp("ns")),
        "year 0": pyarrow.array([None, -(10**6), None], pyarrow.date32()),
        "twice": pyarrow.array([[("a", 1)], [("a", 1), ("a", 2)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    }
    for name, column in columns.items():
        texts = ["a", "b", "c"]
        path = write(tmp_path / "a.parquet", pyarrow.table({name: column, "text": texts}))
        rows = read(path)
        assert [isinstance(row.data[name], NotJson) for row in rows] == [False, True, False], name
        assert [row.data["text"] for row in rows] == texts
        options = {"cache_dir": tmp_path / "cache"}
        assert len(build_cache([parse_source(path)], TOKENIZER, **options).source) == 3
        read_it = parse_source({"path": path, "field_map": {name: "text"}, "ignore": ["text"], "format": "text"})
        with pytest.raises(UserError) as caught:
            build_cache([read_it], TOKENIZER, on_bad_row="skip", **options)
        assert f"{path}:2: not a JSON value: column 'text': " in str(caught.value)


def test_text_that_is_not_utf8_costs_its_own_row(tmp_path):
    offsets, data = (
        pyarrow.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 1, 2, 3))),
        pyarrow.py_buffer(b"a\xffb"),
    )
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, data])
    first, bad, last = read(write(tmp_path / "a.parquet", pyarrow.table({"t": text})))
    assert (first.data["t"], last.data["t"]) == ("a", "b") and bad.line == 2 and "utf-8" in bad.data["t"].why


def test_null_keys_below_tools_and_calls_are_absent(tmp_path):
    """Every struct of a column has the keys of all rows; what was written is what a JSONL file of the rows gives."""
    written = []
    for name, arguments in (("weather", {"city": "Oslo"}), ("add", {"a": 2, "b": {"c": [1]}}), ("now", {"x": 1})):
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        properties = {key: {"type": "string", "enum": ["a", None]} for key in arguments}
        tool = {"name": name, "parameters": {"type": "object", "properties": properties}}
        tools = [{"type": "function", "function": tool}, {**tool, "name": "bare", f"only_{name}": True}]
        written.append({"messages": turns, "tools": tools, "chat_template_kwargs": {"d": {f"of_{name}": 1}}})
    del written[0]["messages"][0]["content"], written[0]["messages"][1]["content"]
    for row in read(write(tmp_path / "a.parquet", written)):
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in row.data["messages"]]
        assert {**row.data, "messages": turns} == written[row.line - 1]
    renamed = [{"functions": row["tools"]} for row in written]
    path = write(tmp_path / "b.parquet", renamed)
    assert [row.data for row in read(path, field_map={"functions": "tools"})] == renamed
    assert [row.data for row in read(path)] != renamed  # of another column, nobody knows what its nulls mean


@pytest.mark.parametrize("total", [1, BATCH_ROWS, 2 * BATCH_ROWS + 7])
def test_slices_and_several_files(tmp_path, total):
    half = total // 2
    write(tmp_path / "1.parquet", [{"i": i} for i in range(half)] or pyarrow.table({"i": pyarrow.array([], "int64")}))
    write(tmp_path / "2.parquet", [{"i": i} for i in range(half, total)], row_group_size=300)
    for bounds in ("[:]", "[-3:]", "[:40%]", "[40%:]", "[1:5]", f"[{half}:]"):
        first, last = bounds[1:-1].split(":")
        first, last = (int(b[:-1]) * total // 100 if b.endswith("%") else int(b) if b else None for b in (first, last))
        expected = list(range(total))[first:last]
        if expected:
            found = read(f"{tmp_path}/*.parquet{bounds}")
            assert [row.data["i"] for row in found] == expected
            assert all(row.line == row.data["i"] + 1 - (half if row.file.endswith("2.parquet") else 0) for row in found)


def test_counting_decodes_nothing(tmp_path):
    """A percentage needs the number of rows, which the footer has: damaged rows behind the slice do not matter."""
    path = tmp_path / "a.parquet"
    write(path, [{"i": i} for i in range(20_000)], row_group_size=1000, use_dictionary=False, compression="NONE")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = b"\xff" * 20_000
    path.write_bytes(data)
    assert len(read(f"{path}[:10%]")) == 2000
    with pytest.raises(UserError, match="damaged after row [1-9]") as caught:
        read(path)
    assert caught.value.exit_code == DATA


def test_files_that_are_damaged_or_something_else(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [{"i": i} for i in range(1000)])
    data = path.read_bytes()
    for content, message in (
        (data[: len(data) // 2], "not a readable Parquet file"),
        (data[:-4] + b"XXXX", "not a readable Parquet file"),
        (b"{}", "does not begin with PAR1"),
        (b"", "0 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            read(path)
        assert caught.value.exit_code == DATA and str(path) in str(caught.value)
    twice = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    with pytest.raises(UserError, match="a column name occurs twice: a, a"):
        read(write(path, twice))


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [{"i": 1}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert list_files(parse_source(path))  # it is a file like others until its rows are asked for
    with pytest.raises(UserError) as caught:
        read(path)
    assert 'pip install "minisft[parquet]"' in caught.value.hint
