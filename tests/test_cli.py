"""The commands as a user meets them: in a process of their own, without torch for whatever needs none."""

import errno
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minisft
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

    def run(self, config, origins, signal):
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
"""
    done = run_python(["-c", code])
    assert (done.returncode, done.stderr) == (0, "")


def test_the_names_of_the_package_are_those_of_its_rooms():
    from minisft.data.tokenizer import load_tokenizer
    from minisft.evaluation import evaluate
    from minisft.generation import generate
    from minisft.model.load import load_model

    assert minisft.evaluate is evaluate and minisft.generate is generate
    assert minisft.load_model is load_model and minisft.load_tokenizer is load_tokenizer
    assert all(hasattr(minisft, name) for name in minisft.__all__) and not hasattr(minisft, "rum")


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


class PanicException(BaseException):
    """As PyO3 raises it for a panic of a library in Rust: no Exception."""


class OutOfMemoryError(RuntimeError):
    """As torch raises it for a GPU."""


UNFORESEEN = {
    AssertionError("invariant"): errors.INTERNAL,
    ConnectionResetError(errno.ECONNRESET, "Connection reset"): errors.INTERNAL,
    RecursionError("maximum recursion depth exceeded"): errors.INTERNAL,
    OverflowError("Python int too large to convert to C long"): errors.INTERNAL,
    PanicException("a panic\nof two lines, and of " + 5000 * "a"): errors.INTERNAL,
    OSError(errno.ENAMETOOLONG, "File name too long", 5000 * "a"): errors.INTERNAL,
    MemoryError(): errors.MEMORY,
    OutOfMemoryError("CUDA out of memory."): errors.MEMORY,
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"): errors.MEMORY,
}


@pytest.mark.parametrize("is_there", [True, False], ids=["output folder", "temporary folder"])
@pytest.mark.parametrize("raised", UNFORESEEN, ids=lambda error: type(error).__name__)
def test_what_nobody_foresaw_is_two_lines_and_a_file(folder, loop, capsys, monkeypatch, raised, is_there):
    """The file has the traceback; it is in the output folder, or in the temporary folder if there is none yet."""
    (folder / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder / "tmp"))
    if is_there:
        (folder / "output").mkdir()
    loop(raised)
    assert train.main(["run.toml"]) == UNFORESEEN[raised]
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "Traceback" not in said and len(said) < 1000
    assert said.startswith("minisft: error: ") and type(raised).__name__ in said
    (report,) = (folder / ("output" if is_there else "tmp")).iterdir()
    assert str(report) in said or f"output/{report.name}" in said
    text = report.read_text()
    assert "Traceback (most recent call last):" in text and "in run" in text
    assert f"minisft {__version__}" in text


def test_a_report_that_cannot_be_written_is_printed(folder, loop, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(folder / "absent"))
    loop(AssertionError("invariant"))
    assert train.main(["run.toml"]) == errors.INTERNAL
    assert "Traceback (most recent call last):" in capsys.readouterr().err


def test_an_exit_is_none_of_our_business(folder, loop):
    loop(SystemExit(3))
    with pytest.raises(SystemExit, match="3"):
        train.main(["run.toml"])


def test_messages_are_short_and_hold_no_commands_for_a_terminal(folder, loop, capsys):
    loop(UserError("\x1b[2J\x07" + "a" * 10**6, hint="b"))
    assert train.main(["run.toml"]) == errors.CONFIG
    said = capsys.readouterr().err
    assert len(said) < 5000 and "\x1b" not in said and "\\x1b[2J\\x07aaa" in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_that_the_encoding_lacks_characters_for_is_escaped(monkeypatch, encoding):
    """A model's answer, a row or a bar must not end a run after its last step."""
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(data, encoding=encoding))
    assert errors.run_command(lambda: print("a \u4f60 \u2588") or 0) == 0
    assert data.getvalue().decode(encoding) == "a \\u4f60 \\u2588\n"


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two' in the environment: expected"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE = '0' in the environment: expected"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 .* but RANK = '', MASTER_ADDR = '', MASTER_PORT = ''"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "but RANK = '2'\n"),
    ],
)
def test_ranks_that_nobody_launched_are_a_mistake_of_the_environment(
    folder, loop, capsys, monkeypatch, environment, told
):
    from minisft import ranks

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told) as mistake, ranks.process_group(torch.device("cpu")):
        pass
    loop(mistake.value)
    assert train.main(["run.toml"]) == errors.CONFIG
    said = capsys.readouterr().err
    assert "error: WORLD_SIZE = " in said and "unset" in said and "Traceback" not in said


@pytest.mark.parametrize("command", ["audit run.toml --html", "generate . --data rows.jsonl --out"])
@pytest.mark.parametrize(("file", "told"), [("absent/x", "there is no such folder"), (".", "it is a folder")])
def test_a_file_that_cannot_be_written_is_told_before_the_work(folder, capsys, command, file, told):
    assert __main__.main([*command.split(), file]) == errors.CONFIG
    option = command.split()[-1]
    assert f"error: {option} {file}: {told}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- before torch


@pytest.mark.parametrize(
    "words",
    [
        "--model_name_or_path=whole",
        "--model_name_or_path=whole/model.gguf",
        "--model_name_or_path=run",
        "--model_name_or_path=owner/name",
        "--model_name_or_path=gpt2",
        "--tokenizer_name_or_path=whole --chat_template=whole/a.jinja",
        "--chat_template=chatml",
        "--chat_template={{messages[0].content}}/",
        "--resume=auto --output_dir=run/x/y",
    ],
)
def test_what_is_there_passes(folder, loop, words):
    (folder / "whole").mkdir()
    (folder / "run" / "model").mkdir(parents=True)
    for name in ("whole/config.json", "run/model/config.json"):
        (folder / name).write_text('{"model_type": "llama"}')
    for name in ("tokenizer.json", "model.gguf", "a.jinja"):
        (folder / "whole" / name).write_text("{}")
    loop(Outcome())
    assert train.main(["run.toml", *words.split()]) == 75


BROKEN_RUNS = {  # options: (exit code, what is told)
    "--output_dir=": (2, "output_dir = '': the path is empty"),
    "--output_dir=run.toml/x": (SAVE, "run.toml is no folder"),
    "--output_dir=run.toml": (SAVE, "run.toml is no folder"),
    "--cache_dir=run.toml": (SAVE, "data.cache_dir"),
    f"--output_dir={'a' * 256}": (2, "at most 4,095 bytes"),
    f"--output_dir={'a/' * 2100}": (2, "at most 4,095 bytes"),
    "--output_dir=~nobody1/x": (2, "no home folder ~nobody1"),
    "--model_name_or_path=/no/where": (errors.MODEL, "model.model_name_or_path = '/no/where' is no folder"),
    "--model_name_or_path=broken": (errors.MODEL, "broken/config.json: a pipe (FIFO), not a regular file"),
    "--model_name_or_path=alien": (errors.MODEL, "model_type 'alien' is not supported"),
    "--tokenizer_name_or_path=./empty": (errors.MODEL, "model.tokenizer_name_or_path = './empty' holds no model"),
    "--trainer_type=dpo --ref_model_name_or_path=./empty": (errors.MODEL, "dpo.ref_model_name_or_path = './empty'"),
    "--resume=empty/x": (2, 'checkpoint.resume = "empty/x": no such folder'),
    "--resume=empty": (DATA, "the checkpoint empty does not verify"),
    "--chat_template=pipes/../pipe.jsonl": (errors.MODEL, "pipe.jsonl: "),
    "--chat_template=./none.jinja": (errors.MODEL, "none.jinja: No such file or directory"),
    "--trainable=((": (2, "is not a regular expression"),
    "--frozen=a{99999999999}": (2, "is not a regular expression"),
    "--unfreeze={'[' = 1}": (2, "is not a regular expression"),
    "--learning_rates={'*' = 1.0}": (2, "is not a regular expression"),
    "--weight_decays={'*' = 1.0}": (2, "is not a regular expression"),
    "--lora.r=4 --rank_pattern={'*' = 1}": (2, "is not a regular expression"),
    "--lora.r=4 --alpha_pattern={'*' = 1.0}": (2, "is not a regular expression"),
    "--lora.r=4 --target_modules=*": (2, "is not a regular expression"),
    "--optim_args={momentum=0.5}": (2, "adamw takes no options"),
    "--train_data=pipe.jsonl": (DATA, "pipe.jsonl: a pipe (FIFO), not a regular file"),
    "--train_data={path='rows.jsonl',weight=1e12}": (2, "above 0 and at most 10,000"),
    "--field_map={prompt=3}": (2, "data.field_map = {prompt = 3}"),
}


def test_what_needs_no_torch_is_told_before_it(folder):
    """All in one process, which refuses to import torch and numpy."""
    for name in ("broken", "alien", "empty"):
        (folder / name).mkdir()
    (folder / "alien" / "config.json").write_text('{"model_type": "alien"}')
    (folder / "broken" / "tokenizer.json").write_text("{}")
    os.mkfifo(folder / "broken" / "config.json")
    os.mkfifo(folder / "pipe.jsonl")
    options = [option.split(" --") for option in BROKEN_RUNS]
    many = WITHOUT_TORCH.replace("sys.exit(main(sys.argv[1:]))", f"for o in {options!r}:\n"
           "    words = [o[0], *('--' + word for word in o[1:])]\n    print(main(['train', 'run.toml', *words]), flush=True)\n"
           "    print('.', file=sys.stderr)")  # fmt: skip
    done = run_python(["-c", many])
    told = done.stderr.split(".\n")
    for option, code, said in zip(BROKEN_RUNS, done.stdout.split(), told, strict=False):
        assert (int(code), BROKEN_RUNS[option][1] in said, "Traceback" in said) == (BROKEN_RUNS[option][0], True, False), (
            option, code, said)  # fmt: skip
    assert len(done.stdout.split()) == len(BROKEN_RUNS), done.stderr[-2000:]


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


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error_and_no_file_takes_their_place(tmp_path, closed):
    """A cron job or a supervisor may close them. What a library printed was then written into the next file."""
    code = f"""
import os, subprocess, sys
from minisft.errors import run_command, tell
def command():
    file = os.open({str(tmp_path / "rows")!r}, os.O_WRONLY | os.O_CREAT)
    os.write(1, b"from a library"), os.write(2, b"from a library")
    print("line"), tell("line"), sys.stdout.isatty(), sys.stdin.isatty()
    sys.stdout.flush(), subprocess.run([sys.executable, "-c", "print(input())"], input="x", text=True, check=True)
    return 3 if file > 2 and ("<" not in {closed!r} or list(sys.stdin) == []) else 4
sys.exit(run_command(command))
"""
    shell = f"exec {sys.executable} -c '{code.replace(chr(39), chr(34))}' {closed}"
    done = subprocess.run(
        ["sh", "-c", shell], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 3, done.stdout
    assert (tmp_path / "rows").read_bytes() == b""
