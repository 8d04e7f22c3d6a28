"""Strict JSON, the atomic folder, deletion that cannot hit anything else, and the lock of an output folder."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft import atomic_folder, files, strict_json
from minisft.config.stages import load_stages
from minisft.data.sources import Source, list_files
from minisft.data.tokenizer import load_tokenizer
from minisft.errors import DATA, MODEL, SAVE, UserError
from minisft.importers.yaml_file import read_yaml
from minisft.prepare.look import look_for_models

# ------------------------------------------------------------------------------------------------- JSON

BAD_JSON = {
    "empty": (b"", "column 1"),
    "two values": (b"1 2", "Extra data at column 3"),
    "not closed": (b'{"a": 1', "column"),
    "second line": (b'{"a": 1,\n"b" 2}', "line 2 column 5"),
    "single quotes": (b"{'a': 1}", "column 2"),
    "NaN": (b'{"a": NaN}', "NaN"),
    "Infinity": (b"-Infinity", "Infinity"),
    "overflow": (b"[1e400]", "too large for a float: 1e400"),
    "long integer": (b"9" * 5000, "4300 digits"),
    "key twice": (b'{"role": 1, "x": {"a": 1, "a": 2}}', "occurs twice in one object: 'a'"),
    "deep list": (b"[" * 100_000 + b"]" * 100_000, "too deep"),
    "deep object": (b'{"a":' * 100_000, "too deep"),
    "deeper than what reads it": (b'{"a":[' * 51 + b"]}" * 51, "too deep"),
    "many keys, two equal": (b"{" + b",".join(b'"%d":1' % i for i in range(10**5)) + b',"7":1}', "in one object: '7'"),
    "a long key twice": (b'{"a%s":1,"a%s":1}' % (2 * (b"a" * 10**6,)), "(1,000,003 characters)"),
    "lone surrogate": (b'{"a": "\\ud800 x"}', "surrogate"),
    "lone low surrogate in a key": (b'{"\\uDFff": 1}', "surrogate"),
    "UTF-16": ('"x"'.encode("utf-16"), "0xff at position 0"),
    "Latin-1": (b'"caf\xe9"', "0xe9 at position 4"),
    "byte order mark": (b"\xef\xbb\xbf{}", "column 1"),
    "control character": (b'"a\x00b"', "Invalid control character at column 3"),
}


@pytest.mark.parametrize("data, reason", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_refused_with_place_and_reason(data, reason):
    with pytest.raises(UserError) as error:
        strict_json.parse_json(data, "rows.jsonl:7")
    assert error.value.message.startswith("rows.jsonl:7: ") and reason in error.value.message
    assert error.value.exit_code == DATA
    with pytest.raises(UserError) as bare:
        strict_json.parse_json(data, exit_code=MODEL)
    assert bare.value.message == error.value.message.removeprefix("rows.jsonl:7: ") and bare.value.exit_code == MODEL


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)  # a busy machine is no failure
@given(json_values)
def test_every_json_value_survives_both_spellings(value):
    assert strict_json.parse_json(strict_json.dump_json(value)) == value
    assert strict_json.parse_json(json.dumps(value, ensure_ascii=True).encode()) == value  # \ud83d\ude00 pairs included


json_texts = st.builds(
    lambda before, value, after: before + json.dumps(value) + after,
    st.sampled_from(["", " ", "\n\t ", "\r\n", "\x0b", "\u00a0", "x"]),
    json_values,
    st.sampled_from(["", "\n", "\r\n", " \t\r\n", "\x0b", "\u00a0\n", "\x00", " 1", "\n{}", ","]),
) | st.text('{}[]":, \n01e-.\\\\utrnaN', max_size=12)


@settings(deadline=None, max_examples=500)  # most texts are short
@given(json_texts)
def test_what_is_accepted_is_what_the_standard_library_accepts_without_its_extras(text):
    def refuse(constant):
        raise ValueError(constant)

    def no_duplicates(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    try:
        expected = json.loads(text, parse_constant=refuse, object_pairs_hook=no_duplicates)
        json.dumps(expected, ensure_ascii=False, allow_nan=False).encode()  # no 1e400, no half of a surrogate pair
    except (ValueError, AssertionError):
        with pytest.raises(UserError):
            strict_json.parse_json(text.encode())
    else:
        assert strict_json.parse_json(text.encode()) == expected


def test_write_json_refuses_nan_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "report.json"
    strict_json.write_json(path, {"b": 1, "a": [2.5, "\u00e9"]})
    before = path.read_bytes()
    assert before.decode() == '{\n  "b": 1,\n  "a": [\n    2.5,\n    "\u00e9"\n  ]\n}\n'
    with pytest.raises(ValueError):
        strict_json.write_json(path, {"loss": float("nan")})
    assert path.read_bytes() == before and strict_json.read_json(path) == {"b": 1, "a": [2.5, "\u00e9"]}


def test_reading_a_missing_file_or_a_folder_is_a_user_error(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            strict_json.read_json(path)


def test_nesting_is_counted_where_it_is_allowed():
    for value in ([[1]] * 500, {"a": [{}] * 500}, [[[]] * 200] * 2):
        assert strict_json.parse_json(json.dumps(value).encode()) == value
    assert strict_json.parse_json(b"[" * 100 + b"]" * 100)
    assert [strict_json.is_depth_at_most(value, 1) for value in (1, [], [1], {"a": 1}, [[]], {"a": {}})] == [
        *(True, True, True, True, False, False)
    ]


# ------------------------------------------------------------------------------------------------- regular files


@pytest.fixture
def kinds(tmp_path) -> dict[str, Path]:
    """What a path may name besides a file: name of the kind in messages -> a path."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as there:
        there.bind(str(tmp_path / "socket"))
    paths = {"a pipe (FIFO)": "fifo", "a folder": "folder", "a socket": "socket", "a device": "/dev/zero"}
    return {kind: tmp_path / path for kind, path in paths.items()} | {"a pipe": tmp_path / "link"}


def test_only_regular_files_are_opened(kinds, tmp_path):
    """Nothing waits for a pipe, and nothing reads from a device without end."""
    readers = [files.open_file, files.read_file, files.require_file, strict_json.read_json]
    readers += [lambda path: list_files(Source(str(path))), lambda path: load_tokenizer_file(path, tmp_path)]
    for kind, path in kinds.items():
        for read in readers[:4]:
            with pytest.raises(UserError, match=re.escape(f"{path}: {kind}") + ".*, not a regular file"):
                read(path)
        for read in readers[4:]:
            with pytest.raises(UserError):
                read(path)
    (tmp_path / "file").write_bytes(b"{}")
    (tmp_path / "to file").symlink_to(tmp_path / "file")
    assert strict_json.read_json(tmp_path / "to file") == {}
    for path in (tmp_path / "absent", tmp_path / ("a" * 300), "a\0b", tmp_path / "file" / "x"):
        with pytest.raises(UserError):
            files.read_file(path)


def load_tokenizer_file(path: Path, folder: Path) -> None:
    """Read a tokenizer whose tokenizer.json is a link to this path."""
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer" / "tokenizer.json").symlink_to(path)
    load_tokenizer(folder / "tokenizer")


def test_a_file_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    assert files.read_file(tmp_path / "a", at_most=100) == b"x" * 100
    with pytest.raises(UserError, match="more than 99 bytes"):
        files.read_file(tmp_path / "a", at_most=99)


def test_a_path_is_checked_and_its_home_is_written_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert files.checked_path("~/a", "x") == "/home/me/a" and files.checked_path(Path("a/b"), "x") == "a/b"
    assert files.checked_path("\u00e4" * 127, "x") and files.checked_path("a/" * 2047 + "a", "x")
    for path in ("", "a\0", "\u00e4" * 128, "a/" * 2048, "~nobody1", "\ud800"):
        with pytest.raises(UserError, match="^output_dir = ") as error:
            files.checked_path(path, "output_dir", exit_code=MODEL)
        assert error.value.exit_code == MODEL and len(error.value.message) < 300


# ------------------------------------------------------------------------------------------------- atomic folders


def write_folder(target: Path, **contents: bytes) -> Path:
    with atomic_folder.atomic_folder(target, {"step": 3}) as folder:
        for name, data in contents.items():
            (folder / name).write_bytes(data)
    return target


def test_a_folder_appears_whole_and_verifies(tmp_path):
    extra = {}
    with atomic_folder.atomic_folder(tmp_path / "runs" / "x", extra) as folder:
        assert folder.parent == tmp_path / "runs" and not (tmp_path / "runs" / "x").exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"abc")
        extra["rows"] = 7  # known only at the end
    manifest = atomic_folder.read_manifest(tmp_path / "runs" / "x")
    sha256_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest["files"] == {"sub/a": {"size": 3, "sha256": sha256_abc}} and manifest["rows"] == 7
    assert atomic_folder.verify_folder(tmp_path / "runs" / "x") is None
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["x"]


def test_every_changed_byte_is_noticed(tmp_path):
    folder = write_folder(tmp_path / "x", a=b"hello", b=b"")
    for path in (folder / "a", folder / "manifest.json"):
        data = path.read_bytes()
        for i in range(len(data)):
            path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
            assert path.name in atomic_folder.verify_folder(folder)
        for cut in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:cut])
            assert path.name in atomic_folder.verify_folder(folder)
            assert path.name in atomic_folder.verify_folder(folder, hashes=False)
        path.unlink()
        assert path.name in atomic_folder.verify_folder(folder)
        path.write_bytes(data)
        assert atomic_folder.verify_folder(folder) is None
    (folder / "b").rename(folder / "c")
    assert atomic_folder.verify_folder(folder) == "b is missing"


def test_an_unlisted_file_is_no_concern(tmp_path):
    folder = write_folder(tmp_path / "x", a=b"hello")
    (folder / ".DS_Store").write_bytes(b"junk")
    assert atomic_folder.verify_folder(folder) is None


def test_an_error_leaves_nothing_behind(tmp_path):
    for error in (OSError("disk full"), KeyboardInterrupt()):
        with pytest.raises(type(error)), atomic_folder.atomic_folder(tmp_path / "x") as folder:
            (folder / "a").write_bytes(b"abc")
            raise error
        assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_or_moved_aside(tmp_path):
    write_folder(tmp_path / "x", a=b"old")
    with pytest.raises(FileExistsError):
        write_folder(tmp_path / "x", a=b"new")
    with atomic_folder.atomic_folder(tmp_path / "x", move_existing_to=tmp_path / "y") as folder:
        (folder / "a").write_bytes(b"new")
    assert (tmp_path / "x" / "a").read_bytes() == b"new" and (tmp_path / "y" / "a").read_bytes() == b"old"


def test_order_files_before_manifest_before_rename_before_parent(tmp_path, monkeypatch):
    """What was not fsynced before the rename may be missing after a power cut, so the order is the promise."""
    log = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(fd):
        log.append(os.fstat(fd).st_ino)
        real_fsync(fd)

    def rename(a, b):
        log.append("rename")
        real_rename(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    target = tmp_path / "new" / "x"
    write_folder(target, a=b"1", b=b"2")
    a, b, manifest, folder, parent, grandparent = (
        p.stat().st_ino
        for p in (target / "a", target / "b", target / atomic_folder.MANIFEST, target, target.parent, tmp_path)
    )
    assert log == [grandparent, a, b, manifest, folder, "rename", parent]


@pytest.mark.parametrize("umask, file_mode, folder_mode", [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770)])
def test_permissions_follow_the_umask(tmp_path, umask, file_mode, folder_mode):
    previous = os.umask(umask)
    try:
        with atomic_folder.atomic_folder(tmp_path / "x") as folder:
            (folder / "private").write_bytes(b"")
            (folder / "private").chmod(0o600)  # as safetensors leaves its files
    finally:
        os.umask(previous)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "x", *(tmp_path / "x").iterdir())}
    assert modes == {"x": folder_mode, "private": file_mode, "manifest.json": file_mode}


READS = {  # what verification asks of the disk, by the module that it asks
    "manifest": (Path, "read_bytes"),
    "stat": (os, "stat"),
    "contents": (atomic_folder, "sha256_file"),
}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("read", READS)
def test_a_read_that_fails_is_an_error_and_not_damage(tmp_path, monkeypatch, read, number):
    folder = write_folder(tmp_path / "x", a=b"hello")
    owner, name = READS[read]
    honest = getattr(owner, name)

    def fail(path, *arguments, **options):
        if Path(path).parent != folder:
            return honest(path, *arguments, **options)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(UserError, match=f"cannot be read: {os.strerror(number)}") as caught:
            atomic_folder.verify_folder(folder)
    file = atomic_folder.MANIFEST if read == "manifest" else "a"
    assert caught.value.exit_code == SAVE and str(folder / file) in caught.value.message and caught.value.hint
    assert atomic_folder.verify_folder(folder) is None


def test_a_folder_in_the_place_of_a_file_is_damage(tmp_path):
    folder = write_folder(tmp_path / "x", a=b"hello")
    for name in ("a", atomic_folder.MANIFEST):
        (folder / name).unlink()
        (folder / name).mkdir()
        assert name in atomic_folder.verify_folder(folder)
    assert "manifest.json" in atomic_folder.verify_folder(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------- small files


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.txt"
    atomic_folder.write_file(path, "old \u00e9\n")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        with pytest.raises(
            UserError, match=r"summary.txt cannot be written: File too large; 3.00 kB needed, .* free"
        ) as caught:
            atomic_folder.write_file(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.exit_code == SAVE and caught.value.hint
    assert path.read_text(encoding="utf-8") == "old \u00e9\n" and os.listdir(tmp_path) == ["summary.txt"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: os._exit(0))  # killed here
        if (child := os.fork()) == 0:
            atomic_folder.write_file(path, "new")
        os.waitpid(child, 0)
    assert path.read_text(encoding="utf-8") == "old \u00e9\n" and len(os.listdir(tmp_path)) == 2
    assert atomic_folder.remove_leftovers(tmp_path) == 1 and os.listdir(tmp_path) == ["summary.txt"]
    atomic_folder.write_file(path, "new")
    assert path.read_text() == "new"


# ------------------------------------------------------------------------------------------------- deletion


def test_only_folders_of_ours_are_deleted(tmp_path):
    ours = write_folder(tmp_path / "ours", a=b"1")
    link = tmp_path / "link"
    link.symlink_to(ours)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not delete")
    other_manifest = tmp_path / "other"
    other_manifest.mkdir()
    (other_manifest / "manifest.json").write_text('{"files": {}}')
    for path in (link, foreign, other_manifest):
        with pytest.raises(UserError):
            atomic_folder.remove_folder(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign", "link", "other", "ours"]

    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    (ours / "link").symlink_to(outside)
    atomic_folder.remove_folder(ours)
    assert (outside / "keep").exists() and not ours.exists()


def test_a_folder_disappears_by_rename_before_it_is_emptied(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "x", a=b"1")
    monkeypatch.setattr(shutil, "rmtree", lambda path: None)  # killed right here
    atomic_folder.remove_folder(folder)
    assert not folder.exists() and len(list(tmp_path.glob(".del-x-*"))) == 1


def test_leftovers_of_dead_processes_go_and_others_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, there = atomic_folder.HOST, "another_host"
    gone = [f".tmp-x-{here}-{dead.pid}-0123abcd", f".del-step-00000001-{here}-{dead.pid}-0123abcd"]
    alive = [f".tmp-x-{here}-{os.getpid()}-0123abcd", f".tmp-x-{there}-{dead.pid}-0123abcd"]
    never = [".tmp-x", f"tmp-x-{here}-{dead.pid}-0123abcd", ".git", ".tmp-notes-2024"]
    for name in gone + alive + never:
        (tmp_path / name).mkdir()
    (tmp_path / f".tmp-y-{here}-{dead.pid}-0123abcd").symlink_to(tmp_path / ".git")
    never.append(f".tmp-y-{here}-{dead.pid}-0123abcd")
    assert atomic_folder.remove_leftovers(tmp_path) == 2
    assert {p.name for p in tmp_path.iterdir()} == {*alive, *never}
    assert atomic_folder.remove_leftovers(tmp_path, locked=True) == 2  # with the lock in hand, nobody can be writing
    assert {p.name for p in tmp_path.iterdir()} == set(never)


# ------------------------------------------------------------------------------------------------- space and lock


def test_too_little_space_is_a_user_error_with_both_numbers(tmp_path):
    missing = tmp_path / "not" / "yet"
    assert atomic_folder.free_bytes(missing) > 0
    atomic_folder.require_space(missing, 1, "a checkpoint", hint="free some")
    with pytest.raises(UserError, match="a checkpoint: 900 TB needed, .* free") as error:
        atomic_folder.require_space(missing, 9 * 10**14, "a checkpoint", hint="free some")
    assert error.value.exit_code == SAVE and error.value.hint == "free some"


def test_a_second_run_on_one_folder_is_refused_until_the_first_is_gone(tmp_path):
    hold = "import sys, time, minisft.atomic_folder as f; x = f.lock_folder(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(tmp_path / "out")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    try:
        assert first.stdout.readline() == "1\n"
        with pytest.raises(UserError, match=f"in use by process {first.pid} on"):
            atomic_folder.lock_folder(tmp_path / "out")
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    with atomic_folder.lock_folder(tmp_path / "out"):  # the kernel let go of the dead process's lock
        with pytest.raises(UserError, match=f"process {os.getpid()} "):
            atomic_folder.lock_folder(tmp_path / "out")
    atomic_folder.lock_folder(tmp_path / "out").close()


def test_a_waiting_lock_lets_one_in_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        with atomic_folder.waiting_lock(tmp_path / "folder"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]  # flock is held by the open file, not by the process
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_what_may_not_be_looked_for_is_not_missing(tmp_path, monkeypatch):
    """A folder that the user may not search: "no such file", "no file matches" and "holds no model" would be guesses."""
    honest = os.lstat

    def lstat(path, **options):
        if "locked" in Path(path).parts[:-1]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return honest(path, **options)

    monkeypatch.chdir(tmp_path)
    Path("locked").mkdir()
    monkeypatch.setattr(os, "lstat", lstat)
    model = {"output_dir": "out", "data.train_data": "rows.jsonl", "model.model_name_or_path": "locked"}
    stages = load_stages(model, {}, origin="test")
    for look in (
        lambda: list_files(Source("locked/rows.jsonl")),
        lambda: load_stages("locked/run.toml", {}, origin="test"),
        lambda: read_yaml(Path("locked/run.yaml")),
        lambda: look_for_models(stages[0], []),
    ):
        with pytest.raises(UserError, match=r"^locked/.*: Permission denied\n") as caught:
            look()
        assert caught.value.exit_code == SAVE


def test_a_scratch_folder_is_gone_after_its_block_or_before_the_next_one(tmp_path):
    with atomic_folder.scratch_folder(tmp_path, "check") as folder:
        (folder / "model").touch()
    assert list(tmp_path.iterdir()) == []
    code = f"from minisft.atomic_folder import *\nwith scratch_folder({str(tmp_path)!r}, 'check'): os._exit(9)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    (left,) = tmp_path.iterdir()
    with atomic_folder.scratch_folder(tmp_path, "check") as folder:
        assert list(tmp_path.iterdir()) == [folder] != [left]
