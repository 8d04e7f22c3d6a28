"""The session on a GPU, without one: parts that stand in for its own, and its plugin of pytest."""

import os
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_session, gpu_tests
from benchmarks.gpu_session import ENDED, Part
from benchmarks.harness import read_csv

ROOT = Path(gpu_session.ROOT)
# A benchmark: three cases of two contenders, announced and written as compare.py does. What it is told to do it does when it
# calls y on case b.
BENCHMARK = """
import os, sys, time
from pathlib import Path
from benchmarks.harness import read_csv, write_csv

out, y_does = Path(sys.argv[1]), sys.argv[2]
for case in "abc":
    rows = read_csv(out / "kernels_cuda.csv")
    ended = {row["contender"] for row in rows if row.get("error", "").startswith("ended")}
    if {row["contender"] for row in rows if row["case"] == case} >= {"x", "y"}:
        continue
    new = []
    for name in "xy":
        if name in ended:
            new.append({"op": "op", "case": case, "contender": name, "error": "left out"})
            continue
        print(f"# op | {case} | {name}", flush=True)
        if (case, name) == ("b", "y"):
            exec(y_does)
        new.append({"op": "op", "case": case, "contender": name, "pass": "forward", "ms": 1.0})
    write_csv("kernels_cuda", new, out)
"""


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(gpu_session, "LEAST_S", 0.2)
    monkeypatch.setenv("MINISFT_COMMIT", "none")


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-c", *arguments]


def hold(parts: list[Part], tmp_path: Path, seconds: float = 30) -> tuple[bool, dict[str, dict]]:
    """(whether all is well, the last row of each part)"""
    out = tmp_path / "out"
    good = gpu_session.session(out, tmp_path / "work", parts, seconds)
    return good, {row["part"]: row for row in read_csv(out / "parts.csv")}


def test_parts_run_in_order_and_a_second_session_has_nothing_left_to_do(tmp_path, at_once):
    trail = tmp_path / "trail"
    parts = [Part(name, python(f"open({str(trail)!r}, 'a').write({name!r}); print({name!r})"), 5) for name in "abc"]
    for _ in range(2):
        good, rows = hold(parts, tmp_path)
        assert good and trail.read_text() == "abc" and list(rows) == ["a", "b", "c"]
    parts[1:1] = [Part("new", python("raise SystemExit(3)"), 5)]
    good, rows = hold(parts, tmp_path)
    assert not good and trail.read_text() == "abc" and rows["new"]["result"] == "failed"
    assert "exit code 3" in rows["new"]["why"] and "| new | failed |" in (tmp_path / "out" / "report.md").read_text()


def test_a_crash_loses_one_contender(tmp_path, at_once):
    part = Part("op", python(BENCHMARK, str(tmp_path / "out"), "os.abort()"), 20, "kernels")
    good, rows = hold([part], tmp_path)
    assert good and rows["op"]["result"] == "done"
    found = {(row["case"], row["contender"]): row for row in read_csv(tmp_path / "out" / "kernels_cuda.csv")}
    measured = {key for key, row in found.items() if row["ms"]}
    assert measured == {("a", "x"), ("a", "y"), ("b", "x"), ("c", "x")}
    assert found["b", "y"]["error"] == "left out" and found["c", "y"]["error"] == "left out"
    errors = [row["error"] for row in read_csv(tmp_path / "out" / "kernels_cuda.csv") if row["error"]]
    assert f"{ENDED} with -6" in errors


def test_a_part_that_always_dies_ends(tmp_path, at_once):
    parts = [Part("op", python("import os; print('# op | a | x', flush=True); os.abort()"), 20, "kernels")]
    parts += [Part("other", python("import os; os.abort()"), 20, "kernels")]  # announces nobody
    good, rows = hold(parts, tmp_path)
    assert not good and {row["result"] for row in rows.values()} == {"failed"}
    assert len(read_csv(tmp_path / "out" / "kernels_cuda.csv")) == gpu_session.ATTEMPTS


def is_running(pid: str) -> bool:
    """Whether the process is there, and not only because nobody has asked for its exit code."""
    try:
        return Path("/proc", pid, "cmdline").read_bytes() != b""
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_time_limits(tmp_path, at_once):
    child = tmp_path / "child"
    # by a shell, which starts at once on a busy machine too
    slow = ["sh", "-c", f"sleep 60 & echo $! > '{child}'; echo begun; wait"]
    parts = [Part("slow", slow, 1), Part("quick", python("pass"), 5)]
    began = time.monotonic()
    good, rows = hold(parts, tmp_path)
    assert time.monotonic() - began < 6 and not good
    assert rows["slow"]["result"] == "time is up" and rows["quick"]["result"] == "done"
    assert "begun" in (tmp_path / "out" / "log.txt").read_text() and not is_running(child.read_text())
    # of the whole session: the first part leaves no time for the second, which is tried the next time
    parts = [Part("long", python("import time; time.sleep(60)"), 60), Part("late", python("pass"), 5)]
    assert hold(parts, tmp_path, 0.6)[1]["late"]["result"] == "no time left"
    assert hold(parts[1:], tmp_path)[1]["late"]["result"] == "done"


def test_a_session_that_is_killed_goes_on_where_it_was(tmp_path, at_once):
    """Nothing is measured twice, nothing is lost, and the process that was measuring dies with the session."""
    out, work, pid = tmp_path / "out", tmp_path / "work", tmp_path / "pid"
    waits = (
        f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(0 if os.path.exists({str(pid) + '2'!r}) else 60)"
    )
    parts = [Part("first", python("pass"), 20), Part("op", python(BENCHMARK, str(out), waits), 30, "kernels")]
    program = f"""
        from pathlib import Path
        from benchmarks.gpu_session import Part, session
        session(Path({str(out)!r}), Path({str(work)!r}), {parts!r}, 60)
    """
    process = subprocess.Popen(python(textwrap.dedent(program)), cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    while is_running(pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.monotonic() < deadline
    (out / "tests.tmp").write_text("half a row")
    Path(f"{pid}2").touch()

    good, rows = hold(parts, tmp_path)
    assert good and rows["first"]["result"] == rows["op"]["result"] == "done"
    times = Counter((row["case"], row["contender"]) for row in read_csv(out / "kernels_cuda.csv"))
    assert times == {(case, name): 1 for case in "abc" for name in "xy"}
    assert [row["part"] for row in read_csv(out / "parts.csv")] == ["first", "op"]
    documented = gpu_session.__doc__.partition("DIR gets these files:")[2].split()
    assert {path.name for path in out.iterdir()} <= set(documented)


def test_at_most_eight_files():
    files = [line.split()[0] for line in gpu_session.__doc__.partition("these files:")[2].strip().splitlines()]
    assert len(files) == 8
    parts = gpu_session.all_parts(Path("/out"), Path("/work"), Path("cache"))
    assert len({part.name for part in parts}) == len(parts)


def test_what_is_missing_leaves_out_what_needs_it(tmp_path, at_once):
    parts = [
        Part("module", python("pass"), 5, needs=("not_installed_anywhere",)),
        Part("tool", python("pass"), 5, tool="not-a-program"),
        Part("unpack", python("print('7 kernels')"), 5, says=True),
        Part("fill", python("raise SystemExit(1)"), 5, "background", unless="unpack"),
    ]
    good, rows = hold(parts, tmp_path)
    assert not good and rows["module"]["why"] == "not_installed_anywhere missing"
    assert rows["tool"]["result"] == "left out" and rows["unpack"]["why"] == "7 kernels" and "fill" not in rows


def test_what_is_gone_is_made_again(tmp_path, at_once):
    """Compiled kernels lie in the working folder, which another machine does not have."""
    made = tmp_path / "work" / "made"
    part = Part("unpack", python(f"import os; os.makedirs({str(made)!r}); print('made')"), 5, makes=made)
    for _ in range(2):
        assert hold([part], tmp_path)[0] and made.exists()  # the second time it would fail
    made.rmdir()
    assert hold([part], tmp_path)[0] and made.exists()


def test_kernels_are_timed_after_what_runs_in_the_background(tmp_path, at_once):
    trail = tmp_path / "trail"

    def part(name: str, kind: str, before: str = "") -> Part:
        return Part(name, ["sh", "-c", f"{before} printf '{name}' >> '{trail}'"], 9, kind)

    # It goes on when the tests have run beside it, and what does not wait for it would be there within this half second.
    until_tests = f"until test -s '{trail}'; do sleep 0.02; done; sleep 0.5;"
    parts = [part("background", "background", until_tests), part("tests ", "tests"), part("timed", "kernels")]
    good, rows = hold(parts, tmp_path)
    assert good and trail.read_text() == "tests backgroundtimed" and rows["background"]["result"] == "done"


def test_without_a_gpu_the_session_ends_at_once(tmp_path, at_once):
    parts = [
        Part(gpu_session.MACHINE, python("raise SystemExit('no GPU')"), 5, final=("done",)),
        Part("a", python(""), 5),
    ]
    for _ in range(2):
        good, rows = hold(parts, tmp_path)
        assert not good and list(rows) == [gpu_session.MACHINE] and "no GPU" in rows[gpu_session.MACHINE]["why"]


# ---- the tests on a GPU ----------------------------------------------------------------------------------------------

TESTS = """
import os, pytest

def test_first():
    pass

def test_fails():
    assert 1 == 2

@pytest.mark.parametrize("name", ["a b"])
def test_dies(name):
    os.abort()

def test_needs():
    import not_installed_anywhere

def test_last():
    pytest.skip("no reason")
"""


def test_a_test_that_dies_does_not_end_the_others(tmp_path, at_once, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    file = tmp_path / "test_gpu.py"
    file.write_text(TESTS)
    command = [sys.executable, "-m", "pytest", str(file), "-c", os.devnull, "-v", "-p", "no:cacheprovider"]
    part = Part("other tests", [*command, "-p", "benchmarks.gpu_tests"], 30, "tests", says=True)
    for _ in range(2):
        good, rows = hold([part], tmp_path)
        found = {row["test"]: row for row in read_csv(tmp_path / "out" / "tests.csv")}
        outcomes = {name: row["outcome"] for name, row in found.items()}
        failed = {"test_fails": "failed", "test_dies[a b]": "failed"}
        assert outcomes == failed | {"test_first": "passed", "test_needs": "skipped", "test_last": "skipped"}
        assert len(read_csv(tmp_path / "out" / "tests.csv")) == 5
        assert not good and rows["other tests"]["result"] == "done"
    assert found["test_fails"]["reason"] == "assert 1 == 2" and found["test_dies[a b]"]["reason"] == f"{ENDED} with -6"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Tests: 1 passed, 2 failed, 2 skipped" in report and "- `test_fails`: assert 1 == 2" in report


def test_the_core_tests_are_there():
    collected = []
    plugin = SimpleNamespace(pytest_collection_finish=lambda session: collected.extend(i.name for i in session.items))
    options = ["-m", "gpu", "-o", "addopts=", "--collect-only", "-p", "no:cacheprovider", "-p", "no:terminal"]
    assert pytest.main([str(ROOT / "tests" / "test_gpu.py"), *options], plugins=[plugin]) == 0
    assert len(gpu_tests.CORE_TESTS) == 32 == len(set(gpu_tests.CORE_TESTS)) and set(gpu_tests.CORE_TESTS) <= set(
        collected
    )
    kinds = Counter(map(gpu_tests.kind, collected))
    assert kinds["core"] == 32 and 0 < kinds["large"] < 20 and kinds["other"] > 100


@pytest.mark.slow
def test_tests_of_the_gpu_have_no_mistakes_of_their_own():
    """Some of each kind that the interpreter runs in seconds."""
    kinds = "whole_model or adamw or update or adapters or packed_equals or leaks or (against_the_formula and rms_norm)"
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-o", "addopts=-q", "-k", kinds]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"GPU_TESTS_ON": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0 and " skipped" not in done.stdout, done.stdout[-4000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 30
