"""The commands as a user meets them: in a process of their own, without torch for whatever needs none."""

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minisft import __main__, __version__, errors, train
from minisft.config.sections import KEYS
from minisft.errors import DATA, SAVE, UserError

ROOT = Path(__file__).resolve().parents[1]
RUN = 'model.model_name_or_path = "m/m"\ndata.train_data = "rows.jsonl"\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a configuration and one row."""
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


class FakeLoop:
    """Stands for minisft.loop, so that no test here trains."""

    def __init__(self, outcome):
        self.outcome = outcome

    def run(self, config, origins):
        self.seen = config, origins
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


class Outcome:
    exit_code = 75


@pytest.fixture
def loop(monkeypatch):
    def replace_by(outcome):
        fake = FakeLoop(outcome)
        monkeypatch.setitem(sys.modules, "minisft.loop", fake)
        monkeypatch.setattr("minisft.loop", fake, raising=False)
        return fake

    return replace_by


# ------------------------------------------------------------------------------------------------- own processes


def run_python(argv: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # a plain checkout will do
    # 0.3 s is the promise on a quiet machine; the bound here only catches a command that hangs
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, env=environment)


# Imports the module under a finder that refuses torch and numpy, then runs its main: a mistake is told before both.
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("torch", "numpy", "transformers"), f"imports {name}"
sys.meta_path.insert(0, Refuse())
from minisft.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["--help"], 0, "train", ""),
        (["--version"], 0, __version__, ""),
        ([], 2, "", "usage: "),
        (["tarin"], 2, "", "minisft: error: unknown command tarin\n  did you mean train?\n"),
        (["train", "--help"], 0, "learning_rate = 2e-05", ""),
        (["train"], 2, "", "usage: python -m minisft.train CONFIG.toml"),
        (["train", "x.toml"], 2, "", "minisft: error: x.toml: there is no such file\n  the working directory is "),
        (
            ["train", "run.toml", "--sed", "1"],
            2,
            "",
            "error: command line: unknown key sed\n  did you mean train.seed?",
        ),
        (["train", "run.toml", "--train_data=no.jsonl"], DATA, "", "minisft: error: no file matches no.jsonl\n"),
    ],
)
def test_help_and_mistakes_need_no_torch_and_show_no_traceback(folder, argv, code, out, err):
    done = run_python(["-c", WITHOUT_TORCH, *argv])
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert out in done.stdout and err in done.stderr
    assert not (done.stdout and code) and not (done.stderr and not code)


@pytest.mark.parametrize("module", ["minisft", "minisft.train"])
def test_python_dash_m(module):
    done = run_python(["-m", module, "--help"])
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python -m {module}") and not done.stderr


def test_the_package_imports_nothing_until_a_name_is_used():
    code = """
import sys, minisft
assert [name for name in sys.modules if name.startswith("minisft.")] == []
from minisft import run
assert run is sys.modules["minisft.train"].run and "torch" not in sys.modules
from minisft import evaluate, generate, load_model, load_tokenizer
assert evaluate is sys.modules["minisft.evaluation"].evaluate and generate is sys.modules["minisft.generation"].generate
assert load_model is sys.modules["minisft.model.load"].load_model
assert load_tokenizer is sys.modules["minisft.data.tokenizer"].load_tokenizer
assert all(hasattr(minisft, name) for name in minisft.__all__) and not hasattr(minisft, "rum")
"""
    done = run_python(["-c", code])
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------- in this process


def test_help_shows_every_key_within_the_line(capsys):
    assert train.main(["run.toml", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for f in KEYS.values():
        assert sum(line.startswith(f"  {f.name} = ") for line in lines) == 1
    assert max(map(len, lines)) <= 120


def test_main_hands_the_configuration_to_the_loop(folder, loop):
    fake = loop(Outcome())
    assert train.main(["run.toml", "--seed", "7"]) == 75  # the loop's own exit code
    config, origins = fake.seen
    assert config.train.seed == 7 and config.data.train_data == str(folder / "rows.jsonl")
    assert (origins["train.seed"], origins["data.train_data"]) == ("command line", "run.toml")


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (UserError("bad row", hint="mend it", exit_code=DATA), DATA, "minisft: error: bad row\n  mend it\n"),
        (UserError("no hint"), 2, "minisft: error: no hint\n"),
        (KeyboardInterrupt(), 130, "minisft: interrupted\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.jsonl"),
            SAVE,
            "minisft: error: a.jsonl: Permission denied\n"
            "  check the disk, its free space and its permissions, then run the same command again\n",
        ),
    ],
)
def test_what_the_loop_raises_is_told_in_lines(folder, loop, capsys, raised, code, told):
    loop(raised)
    assert train.main(["run.toml"]) == code
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    "raised", [AssertionError("invariant"), ConnectionResetError(errno.ECONNRESET, "Connection reset")]
)
def test_our_own_mistakes_keep_their_traceback(folder, loop, raised):
    loop(raised)
    with pytest.raises(type(raised)):
        train.main(["run.toml"])


def test_run_from_python(folder, loop):
    outcome = Outcome()
    fake = loop(outcome)
    assert train.run("run.toml", learning_rate=1e-4, packing=True, **{"train.seed": 3}) is outcome
    config, origins = fake.seen
    assert (config.train.learning_rate, config.data.packing, config.train.seed) == (1e-4, True, 3)
    assert origins["train.seed"] == "run()"
    train.run({"model": {"model_name_or_path": "m"}, "data": {"train_data": "rows.jsonl"}}, output_dir=folder / "out")
    assert fake.seen[0].output_dir == str(folder / "out")
    with pytest.raises(UserError, match="unknown key learning_rat"):
        train.run("run.toml", learning_rat=1.0)


@pytest.mark.parametrize("key", ["train_data", "eval_data", "generate_data"])
def test_every_data_file_is_looked_for_before_the_run(folder, loop, capsys, key):
    fake = loop(Outcome())
    assert train.main(["run.toml", f"--{key}", "missing.jsonl"]) == DATA
    assert "no file matches missing.jsonl" in capsys.readouterr().err and not hasattr(fake, "seen")


def test_every_command_exists_and_is_dispatched_lazily(monkeypatch, capsys):
    for name, (module, text) in __main__.COMMANDS.items():
        assert importlib.util.find_spec(module) is not None and text, name
    monkeypatch.setattr(train, "main", lambda argv: len(argv))
    assert __main__.main(["train", "a", "b"]) == 2

    def fails(argv):
        raise argv[0]

    monkeypatch.setattr(train, "main", fails)
    assert __main__.main(["train", UserError("no", exit_code=errors.MODEL)]) == errors.MODEL
    assert __main__.main(["train", KeyboardInterrupt()]) == 130
    assert capsys.readouterr().err == "minisft: error: no\nminisft: interrupted\n"


def test_a_reader_that_leaves_early_causes_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m minisft.train --help | head -n 1", shell=True, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("usage:") and done.stderr == ""
