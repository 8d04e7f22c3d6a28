"""Sources: strict reading, every bad row named, slices, globs."""

import csv
import gzip
import json
import os
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.rows import place
from minisft.data.sources import (
    MAX_ROW_BYTES,
    BadRow,
    Row,
    Source,
    _row_number,
    excerpt,
    list_files,
    parse_source,
    read_rows,
)
from minisft.errors import DATA, UserError


def write(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return str(path)


def read(folder, name, data, **source):
    return list(read_rows(parse_source({"path": write(folder, name, data), **source})))


# ---- JSONL


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=3), min_size=1, max_size=8))
def test_jsonl_round_trips_any_text(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    for ascii_only in (False, True):
        text = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
        found = read(folder, "a.jsonl", text)
        assert [row.data for row in found] == rows
        assert [row.line for row in found] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\n{"text": "b"}',  # no newline at the end
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',  # one BOM
        b'{"text": "a"}\r\n{"text": "b"}\r\n',
        b'  {"text": "a"}  \n\t{"text": "b"}\n',
        b'{"text": "a"}\n{"text": "b"}\n\n',
        b'{"text": "a"}\n{"text": "b"}\r\n \r\n\n',
    ],
)
def test_jsonl_variants_that_are_fine(tmp_path, data):
    assert [row.data["text"] for row in read(tmp_path, "a.jsonl", data)] == ["a", "b"]


def test_only_newline_ends_a_row(tmp_path):
    odd = "a\u2028b\u2029c\x85d\u000be"
    (row,) = read(tmp_path, "a.jsonl", json.dumps({"text": odd}, ensure_ascii=False))
    assert row.data["text"] == odd


BAD_LINES = {  # what is wrong -> (the line, part of the message)
    "empty": (b"", "empty line"),
    "spaces": (b"   ", "empty line"),
    "list": (b"[]", "the row is a list"),
    "string": (b'"x"', "the row is a str"),
    "null": (b"null", "not a JSON object"),
    "number": (b"3", "not a JSON object"),
    "trailing comma": (b'{"text": "a",}', "not valid JSON"),
    "single quotes": (b"{'text': 'a'}", "not valid JSON"),
    "comma after it": (b'{"text": "a"}, ', "Extra data at column 14; a comma after the row: a .jsonl file has none"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "not valid JSON: Extra data"),
    "lone CR between objects": (b'{"text": "a"}\r{"text": "b"}', "Extra data"),
    "truncated": (b'{"text": "a', "not valid JSON"),
    "BOM in the middle": (b'\xef\xbb\xbf{"text": "a"}', "not valid JSON"),
    "latin-1": (b'{"text": "\xe9"}', "not UTF-8 text"),
    "UTF-16": ('{"text": "a"}'.encode("utf-16-be"), "not valid JSON"),
    "NUL": (b'{"text": "\x00"}', "not valid JSON"),
    "control character": (b'{"text": "\x01"}', "not valid JSON"),
    "lone surrogate": (b'{"text": "\\ud800"}', "surrogate"),
    "NaN": (b'{"x": NaN}', "NaN"),
    "Infinity": (b'{"x": -Infinity}', "Infinity"),
    "1e400": (b'{"x": 1e400}', "too large"),
    "5000 digits": (b'{"x": ' + b"1" * 5000 + b"}", "4300"),
    "duplicate key": (b'{"a": 1, "a": 2}', "occurs twice"),
    "deep": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_lines_are_named_and_cost_only_themselves(tmp_path, name):
    line, expected = BAD_LINES[name]
    good = b'{"text": "good"}'
    before, bad, after = read(tmp_path, "a.jsonl", good + b"\n" + line + b"\n" + good + b"\n")
    assert isinstance(before, Row) and isinstance(after, Row) and after.line == 3
    assert isinstance(bad, BadRow) and bad.line == 2
    assert expected in str(bad) and f"{tmp_path}/a.jsonl:2: " in str(bad)
    assert len(bad.excerpt) <= 210 and bad.excerpt.isprintable()


LONG = {  # a file of three rows, of which the second is longer than 100 bytes: those around it are read as ever
    "a line": ("a.jsonl", '{"text": "a"}\n{"text": "' + "x" * 10**6 + '"}\n{"text": "b"}\n'),
    "a line at the end": ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "' + "x" * 10**6),
    "a line of spaces": ("a.jsonl", '{"text": "a"}\n' + " " * 10**6 + '{"text": "x"}\n{"text": "b"}\n'),
    "the first line, after a mark": ("a.jsonl", "\ufeff" + '{"text": "a"}' + " " * 10**6 + '\n{"text": "b"}\n'),
    "a packed line": ("a.jsonl.gz", '{"text": "a"}\n{"text": "' + "x" * 10**6 + '"}\n{"text": "b"}\n'),
    "an element": ("a.json", '[{"text": "a"}, {"text": "' + "x" * 10**6 + '"}, {"text": "b"}]'),
    "a row of a table": ("a.csv", "text\na\n" + "x" * 10**6 + "\nb\n"),
    "a value of a table": ("a.csv", 'text\na\n"' + "x" * 10**6 + '"\nb\n'),
    "a row of many lines": ("a.csv", "text\na\n" + '"' + "x\n" * 60 + "x" * 10**6 + '"\nb\n'),
    "a row of many values": ("a.csv", "text\na\n" + "x," * 10**5 + "\nb\n"),
}


@pytest.mark.parametrize("case", LONG)
def test_a_row_is_read_up_to_a_limit(tmp_path, monkeypatch, case):
    monkeypatch.setattr("minisft.data.sources.MAX_ROW_BYTES", 100)
    monkeypatch.setattr("minisft.data.sources.READ_AT_ONCE", 200)
    name, text = LONG[case]
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    rows = []
    tracemalloc.start()
    try:
        rows += read_rows(Source(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    if name != "a.json":
        assert peak < 4e5  # a million bytes are never there at once
    assert [row.data["text"] for row in rows if isinstance(row, Row)] == (["b"] if "mark" in case else ["a", "b"])
    (bad,) = (row for row in rows if isinstance(row, BadRow))
    assert bad.reason in ("too long", "not valid CSV") and len(str(bad)) < 1000
    assert rows[-1].line == {"a.json": 2, "a.csv": 4}.get(name, 3 - ("mark" in case)) + 60 * ("many lines" in case)
    assert MAX_ROW_BYTES == 16 * 2**20


def test_files_that_are_read_at_once_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("minisft.data.sources.MAX_FILE_BYTES", 100)
    monkeypatch.setattr("minisft.data.sources.MAX_ROW_BYTES", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        read(tmp_path, "a.json", "[" + " " * 100 + "]")
    for text, is_fine in (
        ("a" * 100, True),
        ("a" * 101, False),
        ("\ufeff" + "a" * 97, True),
        ("\ufeff" + "a" * 98, False),
    ):
        (row,) = read(tmp_path, "a.txt", text)
        assert isinstance(row, Row) == is_fine and (is_fine or row.reason == "too long")


def test_empty_lines_cost_nothing_until_a_row_follows(tmp_path):
    for name, head, row in (("a.jsonl", "", '{"text": "b"}\n'), ("a.csv", "text\n", "b\n")):
        (tmp_path / name).write_text(head + row + "\n" * 20_000)
        tracemalloc.start()
        try:
            assert [row.data for row in read_rows(Source(str(tmp_path / name)))] == [{"text": "b"}]
            assert tracemalloc.get_traced_memory()[1] < 2e5
        finally:
            tracemalloc.stop()
        (tmp_path / name).write_text(head + row + "\n \n"[: 3 if head == "" else 1] + row)
        lines = [(row.line, getattr(row, "reason", "")) for row in read_rows(Source(str(tmp_path / name)))]
        first = 1 + bool(head)
        empty = [(first + 1 + i, "empty line") for i in range(2 if head == "" else 1)]
        assert lines == [(first, ""), *empty, (first + 1 + len(empty), "")]


@pytest.mark.parametrize("bound", ["9" * 16, "9" * 5000, "-" + "9" * 20])
def test_bounds_of_slices_are_bounded(tmp_path, bound):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    for value in (f"{tmp_path}/a.jsonl[:{bound}]", {"path": f"{tmp_path}/a.jsonl", "split": f"[{bound}:]"}):
        with pytest.raises(UserError) as error:
            parse_source(value)
        assert len(str(error.value)) < 6000
    assert _row_number("999999999999999%", 10**7) == 10**7  # more than islice takes
    for slice in ("[:999999999999999]", "[:999999999999999%]", "[-999999999999999:]", "[-999999999999999%:]"):
        assert len(list(read_rows(parse_source(f"{tmp_path}/a.jsonl{slice}")))) == 2


def test_an_excerpt_is_short_and_printable():
    assert excerpt("a\x00\u200e\n" + "\u00e4" * 300) == "`a\\x00\\u200e\\n" + "\u00e4" * 187 + "`..."
    assert excerpt("short") == "`short`"


# ---- JSON, CSV, text


def test_json_array_names_rows_by_index(tmp_path):
    good, bad, other = read(tmp_path, "a.json", ' [ {"a": [1, {"b": "]"}]} ,\n{"a": NaN}, {"a": "\\u2019"} ]\n')
    assert good == Row({"a": [1, {"b": "]"}]}, f"{tmp_path}/a.json", 0) and other.data == {"a": "\u2019"}
    assert str(bad).startswith(f"{tmp_path}/a.json[1]: NaN")


@pytest.mark.parametrize(
    "data, message",
    [
        ('{"a": 1}\n{"a": 2}', "not a JSON array"),
        ('[{"a": 1}', "comma or ] is missing after element 0"),
        ('[{"a": 1} {"a": 2}]', "comma or ] is missing after element 0"),
        ('[{"a": 1}, ]', "element 1 is not valid JSON"),
        ('[{"a": 1}, {"a": tru}]', "element 1 is not valid JSON"),
        ('[{"a": 1}] x', "there is text after the array"),
        (b'[{"a": "\xe9"}]', "not UTF-8 text"),
    ],
)
def test_a_broken_array_is_refused_whole(tmp_path, data, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")) as caught:
        read(tmp_path, "a.json", data)
    assert caught.value.exit_code == DATA and "a.json" in str(caught.value)


def test_empty_array_has_no_row(tmp_path):
    assert read(tmp_path, "a.json", " [ ] ") == []


def test_csv(tmp_path):
    rows = [{"prompt": 'a "quoted",\nb', "completion": "\u00e4\u2028"}, {"prompt": "", "completion": "c"}]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    found = list(read_rows(Source(str(tmp_path / "a.csv"))))
    assert [row.data for row in found] == rows and [row.line for row in found] == [2, 4]


def test_bad_csv_rows(tmp_path):
    data = b'a,b\n1,2\n1\n1,2,3\n\n"x"y,2\n\xff,2\n3,4\n"open,'
    found = read(tmp_path, "a.csv", data)
    assert [row.data for row in found if isinstance(row, Row)] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    bad = [(row.line, row.reason) for row in found if isinstance(row, BadRow)]
    assert bad == [
        (3, "wrong number of values"),
        (4, "wrong number of values"),
        (5, "empty line"),
        (6, "not valid CSV"),
        (7, "not UTF-8 text"),
        (9, "not valid CSV"),
    ]


def test_empty_lines_at_the_end_of_a_csv_are_no_rows(tmp_path):
    assert [row.data for row in read(tmp_path, "a.csv", b"a,b\n1,2\n\r\n\n")] == [{"a": "1", "b": "2"}]


TABLE = [{"question": "a, b", "answer": "c"}, {"question": 'say "d";', "answer": "e\tf"}]


@pytest.mark.parametrize(
    "name, delimiter, num_rows",
    [
        ("a.csv", ",", 2),
        ("a.csv", ";", 2),
        ("a.csv", "\t", 2),
        ("a.tsv", "\t", 2),
        ("A.CSV", ";", 1),
        ("a.csv", ";", 0),
    ],
)
def test_the_delimiter_of_a_table_is_found(tmp_path, name, delimiter, num_rows):
    with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(TABLE[:num_rows])
    assert [row.data for row in read_rows(Source(str(tmp_path / name)))] == TABLE[:num_rows]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_found_before_a_long_first_row(tmp_path, delimiter):
    rows = [{"question": "a word, and\nanother " * 5000, "answer": "b"}]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    assert [row.data for row in read_rows(Source(str(tmp_path / "a.csv")))] == rows


@pytest.mark.parametrize(
    "text, rows",
    [
        ("a,b\n1;2,3;4\n", [{"a": "1;2", "b": "3;4"}]),
        ("a;x,b;c\n1;2;3\n", [{"a": "1", "x,b": "2", "c": "3"}]),  # a comma inside a name
        ('"a;b"\n"1;2"\n', [{"a;b": "1;2"}]),
        ("text\none, two; three\n", None),  # a comma too many, as before
    ],
)
def test_other_delimiters_inside_values_and_names_are_text(tmp_path, text, rows):
    found = read(tmp_path, "a.csv", text)
    assert (
        [row.reason for row in found] == ["wrong number of values"] if rows is None else [r.data for r in found] == rows
    )


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.NDJSON", "a.json.gz", "A.JSON", "a.csv.gz", "a.txt.gz", "a.jsonl.zst", "a.Csv.ZST"]
)
def test_suffixes_in_capitals_and_packed_files(tmp_path, name):
    kind = name.lower().split(".")[1]
    plain = {
        "jsonl": '{"text": "a"}\n{"text": "b"}\n',
        "csv": "text\na\nb\n",
        "txt": "a",
        "json": '[{"text": "a"}, {"text": "b"}]',
    }
    data = plain["jsonl" if kind == "ndjson" else kind].encode()
    if name.endswith(".gz"):
        data = gzip.compress(data[:7]) + gzip.compress(data[7:])  # two members, as in files that were appended to
    elif name.endswith((".zst", ".ZST")):
        pyarrow = pytest.importorskip("pyarrow")
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    rows = read(tmp_path, name, data)
    assert [row.data["text"] for row in rows] == ["a", "b"][: len(rows)] and len(rows) == (1 if kind == "txt" else 2)
    assert [row.data for row in read(tmp_path, name, data, split="[-1:]")] == [rows[-1].data]
    assert ("[0]" in place(rows[0].file, rows[0].line)) == (kind == "json")


@pytest.mark.parametrize(
    "text, hint",
    [
        ('[\n  {\n    "text": "a"\n  }\n]\n', "not valid JSON: .*; the file is one JSON array: name it .json"),
        ('[{"text": "a"},\n{"text": "b"}]\n', "the file is one JSON array: name it .json"),
        ('[{"text": "a"}]', "if the file is one JSON array, name it .json"),
        ('{\n  "text": "a"\n}\n', "an object of several lines"),
    ],
)
def test_a_jsonl_file_that_is_no_jsonl_is_told_so(tmp_path, text, hint):
    first = read(tmp_path, "a.jsonl", text)[0]
    assert isinstance(first, BadRow) and first.line == 1 and re.search(hint, str(first))


@pytest.mark.parametrize("header", ["a,a", "a,", ","])
def test_bad_csv_header(tmp_path, header):
    with pytest.raises(UserError, match="column name is empty or occurs twice"):
        read(tmp_path, "a.csv", header + "\n1,2\n")


def test_a_text_file_is_one_row(tmp_path):
    assert read(tmp_path, "a.txt", b"\xef\xbb\xbfone\n\ntwo\r\n")[0].data == {"text": "one\n\ntwo\r\n"}
    assert read(tmp_path, "b.txt", b"ok \xff")[0].reason == "not UTF-8 text"


# ---- files


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl", b"", "0 bytes"),
        ("a.jsonl", b"\x1f\x8b\x08\x00", "gzip"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd", "zstandard"),
        ("a.jsonl", b"PAR1\x15\x04", "Parquet"),
        ("a.json", b"PK\x03\x04", "zip"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "HTML"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PK\x03\x04", "not a Parquet file"),
        ("a", b"{}", "unknown kind of file"),
        ("a.gz", b"\x1f\x8b", "unknown kind of file"),
        ("a.csv", b"\xef\xbb\xbf", "empty file .only a byte order mark"),
        ("a.txt", b"\xef\xbb\xbf", "empty file .only a byte order mark"),
        ("a.csv", b"\xef\xbb\xbf\r\n\n", "empty file .only white space"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "empty file"),
        ("a.jsonl.gz", b'{"text": "a"}', "not .gz data"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "damaged .gz data"),
        ("a.csv.gz", gzip.compress(b"<html>", mtime=0), "HTML"),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), "compressed inside"),
        ("a.csv", b"\n" + b"a,b\n" * 20, "a.csv:1: the header line is empty"),
        ("a.csv", "question,gr\u00f6\u00dfe\na,b\n".encode("latin-1"), "a.csv:1: not UTF-8 text"),
        ("a.tsv", "gr\u00f6\u00dfe\ta\n1\t2\n".encode("cp1252"), "a.tsv:1: not UTF-8 text"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, name, data)
    assert caught.value.exit_code == DATA and name in str(caught.value)


def test_no_such_file_folder_and_pipe(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        list_files(Source(str(tmp_path / "*.jsonl")))
    with pytest.raises(UserError, match="is a folder"):
        list_files(Source(str(tmp_path)))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        list_files(Source(str(tmp_path / "pipe.jsonl")))
    os.symlink(tmp_path / "nowhere", tmp_path / "link.jsonl")
    with pytest.raises(UserError, match="link.jsonl"):
        list_files(Source(str(tmp_path / "l*.jsonl")))


def test_a_glob_is_sorted_and_read_in_order(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path, f"{name}.jsonl", json.dumps({"text": name}))
    (tmp_path / "folder.jsonl").mkdir()
    rows = list(read_rows(Source(str(tmp_path / "*.jsonl"))))
    assert [row.data["text"] for row in rows] == ["a", "b", "c"]


# ---- slices


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 23), st.none() | st.integers(-30, 30), st.none() | st.integers(-30, 30))
def test_slices_are_pythons(tmp_path_factory, total, first, last):
    folder = tmp_path_factory.mktemp("slice")
    lines = [json.dumps({"i": i}) for i in range(total)]
    write(folder, "1.jsonl", "\n".join(lines[:7]))
    if lines[7:]:
        write(folder, "2.jsonl", "\n".join(lines[7:]))
    source = parse_source(f"{folder}/*.jsonl[{'' if first is None else first}:{'' if last is None else last}]")
    expected = list(range(total))[first:last]
    if expected:
        assert [row.data["i"] for row in read_rows(source)] == expected
    else:
        with pytest.raises(
            UserError, match="the slice holds no row"
        ):  # also one of several sources, which may be missed
            list(read_rows(source))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("total, percent", [(10, 10), (7, 33), (3, 50), (200, 99)])
def test_percentages_meet_without_overlap(tmp_path, name, total, percent):
    data = {
        "a.jsonl": "\n".join(json.dumps({"i": str(i)}) for i in range(total)),
        "a.json": json.dumps([{"i": str(i)} for i in range(total)]),
        "a.csv": "i\n" + "".join(f"{i}\n" for i in range(total)),
    }[name]
    parts = [read(tmp_path, name, data, split=split) for split in (f"[:{percent}%]", f"train[{percent}%:]")]
    assert [int(row.data["i"]) for part in parts for row in part] == list(range(total))
    assert len(parts[0]) == total * percent // 100


def test_rows_keep_their_lines_in_a_slice(tmp_path):
    rows = read(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}\n{"a": 3}', split="[1:]")
    assert [row.line for row in rows] == [2, 3]


def test_what_is_outside_a_slice_is_not_parsed(tmp_path):
    rows = read(tmp_path, "a.jsonl", 'broken\n{"a": 2}\nbroken', split="[1:2]")
    assert [row.data for row in rows] == [{"a": 2}]


# ---- parse_source


def test_parse_source():
    assert parse_source("a/*.jsonl[:10%]") == Source("a/*.jsonl", split="[:10%]")
    assert parse_source("a[0-9].jsonl") == Source("a[0-9].jsonl")  # a glob, not a slice
    table = {"path": "a.csv", "name": "x", "weight": 2, "split": "train[-5:]", "field_map": {"q": "prompt"}}
    assert parse_source(table) == Source("a.csv", "x", 2.0, "train[-5:]", "auto", {"q": "prompt"})
    assert parse_source(parse_source(table)) == parse_source(table)


@pytest.mark.parametrize(
    "value, message",
    [
        ({"path": "a", "wieght": 2}, "did you mean 'weight'"),
        ({"name": "a"}, "without a path"),
        ("", "without a path"),
        ({"path": "a", "weight": "2"}, "weight = '2'"),
        ({"path": "a", "weight": True}, "weight = True"),
        ({"path": "a", "weight": 0}, "above 0"),
        ({"path": "a", "weight": float("nan")}, "above 0"),
        ({"path": "a", "weight": 10_001}, "at most 10,000"),
        ({"path": "a", "weight": 10**400}, "at most 10,000"),
        ("a\0.jsonl", "NUL"),
        ({"path": "a", "field_map": "x"}, "field_map = 'x'"),
        ({"path": "a", "field_map": {"x": 1}}, "names must be text"),
        ({"path": "a", "split": "test"}, "is not a slice"),
        ({"path": "a", "split": "[:10"}, "is not a slice"),
        ({"path": "a.jsonl[:5]", "split": "[5:]"}, "keep one"),
        (7, "a path or a table"),
    ],
)
def test_parse_source_refuses(value, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        parse_source(value)


def test_a_name_that_is_no_text_is_refused(tmp_path):
    """The manifest of the cache names every file, and is UTF-8."""
    name = os.path.join(os.fsencode(tmp_path), b"rows-\xff.jsonl")
    with open(name, "w") as file:
        file.write('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"rows-\\xff.jsonl: the name is not UTF-8"):
        list_files(Source(str(tmp_path / "*.jsonl")))
