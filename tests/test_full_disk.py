"""A disk that is full, at the start, in the middle or at the end: two lines with what was needed and what is free, no traceback,
and nothing lost.

RLIMIT_FSIZE stands for the disk: files beyond the limit cannot grow, at real write calls of Python, of Rust and of C. Python
ignores SIGXFSZ and gets EFBIG.
"""

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_best import BEST
from test_dpo_run import DPO, write_pairs
from test_loggers import scalars
from test_lora_run import LORA
from test_resume import assert_same, outcome
from tiny import train

from minisft import console, errors, export, finish, loop
from minisft.data.loader import Loader
from minisft.errors import NONFINITE, SAVE, UserError, run_command

SHORT = {"train.max_steps": 8}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """One folder for the runs of this file, with a finished run to start from and to compare with."""
    folder = tmp_path_factory.mktemp("full")
    write_pairs(folder / "pairs.jsonl")
    train(folder, output_dir=str(folder / "whole"), **SHORT, **{"data.cache_dir": str(folder / "cache")})
    return folder


@pytest.fixture
def go(home, tmp_path):
    """A function that trains, in the same output folder at every call of one test."""
    options = SHORT | {"data.cache_dir": str(home / "cache"), "output_dir": str(tmp_path / "out")}
    return lambda **more: train(home, **options | more)


@contextmanager
def full_disk(room: int = 0):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def fill_at(patch, owner, name: str) -> None:
    """The disk is full while this function runs."""
    honest = getattr(owner, name)

    def full(*arguments, **options):
        with full_disk():
            return honest(*arguments, **options)

    patch.setattr(owner, name, full)


# ---- the check before the first step --------------------------------------------------------------------------------


def used(folder: Path) -> int:
    """Bytes of tensors and tokenizers. JSON and the headers of tensors weigh something only in a model this small."""
    total = 0
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            with open(path, "rb") as file:
                total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
        elif path.name.startswith("tokenizer"):
            total += path.stat().st_size
    return total


START = {"model.config": None, "model.model_name_or_path": "{home}/whole/model"}
RUNS = {  # of 8 steps
    "short": {"checkpoint.save_steps": 5, "checkpoint.save_total_limit": 9},
    "bf16": START
    | {"train.weights_dtype": "bf16", "train.precision": "bf16", "train.optim": "adamw_8bit"}
    | {"checkpoint.save_steps": 3},
    "best": BEST  # step 5 of 10
    | {"evaluate.eval_steps": 5, "checkpoint.save_steps": 2, "checkpoint.save_total_limit": 2},
    "lora": START | LORA | {"checkpoint.save_steps": 3, "checkpoint.save_total_limit": 1},
    "moving reference": START
    | DPO
    | {"data.train_data": "{home}/pairs.jsonl", "dpo.sync_ref_model": True, "dpo.ref_model_sync_steps": 2}
    | {"checkpoint.save_steps": 2, "checkpoint.save_total_limit": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_what_the_start_asks_for_is_what_the_run_takes(go, home, tmp_path, monkeypatch, name):
    """Not less, or the run would die at a later save; and a tenth more, or runs that fit would be refused."""
    options = {key: v.format(home=home) if isinstance(v, str) else v for key, v in RUNS[name].items()}
    out, asked, most, honest = tmp_path / "out", [], 0, os.rename

    def rename(*paths):  # what is new is whole, what it replaces is still there
        nonlocal most
        most = max(most, used(out))
        honest(*paths)

    monkeypatch.setattr(export, "require_space", lambda folder, needed, what, hint: asked.append(needed))
    monkeypatch.setattr(os, "rename", rename)
    go(**options)
    assert asked[0] / 1.1 == pytest.approx(most, rel=0.01), (most, asked)  # step counters are not asked for


@pytest.mark.parametrize("kind", ["read-only", "a link that leads nowhere", "a file"])
def test_a_folder_of_checkpoints_that_cannot_be_written_is_told_at_the_start(go, tmp_path, monkeypatch, kind):
    place, honest = tmp_path / "out" / "checkpoints", Path.touch
    place.parent.mkdir()
    if kind == "read-only":
        place.mkdir()

        def touch(path, *arguments, **options):
            if path.parent == place:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            honest(path, *arguments, **options)

        monkeypatch.setattr(Path, "touch", touch)
    elif kind == "a file":
        place.touch()
    else:
        place.symlink_to(tmp_path / "gone")
    monkeypatch.setattr(loop, "train_step", None)
    with pytest.raises(UserError, match="checkpoints cannot be (written|read)") as caught:
        go()
    assert caught.value.exit_code == SAVE and "permissions" in caught.value.hint


def test_a_run_that_is_resumed_asks_for_what_is_not_there_yet(go, monkeypatch):
    """And not for what is pinned, or belongs to later steps: that stays."""
    asked, honest = [], export.require_space

    def require_space(folder, needed, what, hint):
        asked.append(needed)
        honest(folder, needed, what, hint=hint)

    monkeypatch.setattr(export, "require_space", require_space)
    options = {"checkpoint.save_steps": 2, "checkpoint.save_total_limit": 2}
    out = go(**options).output_dir  # asks for three; 6 and 8 stay
    longer = options | {"train.max_steps": 24}
    for pinned, resume, more in ((None, "auto", 1), (6, "auto", 2), (None, str(out / "checkpoints/step-00000006"), 2)):
        if pinned:
            (out / f"checkpoints/step-{pinned:08d}/keep").touch()
        monkeypatch.setattr(loop, "take_steps", lambda *arguments: pytest.fail("stop"))
        with pytest.raises(pytest.fail.Exception):
            go(**longer, **{"checkpoint.resume": resume})
        if pinned:
            (out / f"checkpoints/step-{pinned:08d}/keep").unlink()
        assert asked[-1] / asked[0] == pytest.approx(more / 3, rel=0.01)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=asked[-1] - 1))
    with pytest.raises(
        UserError, match=r"too little room for 2 more checkpoints of [0-9.]+ kB each in .*save_total_limit = 2"
    ) as caught:
        go(**longer, **{"checkpoint.resume": resume})
    assert caught.value.exit_code == SAVE and re.search(r": [0-9.]+ kB needed, [0-9.]+ kB free", caught.value.message)


# ---- during the run -------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_for_a_while_costs_a_save_and_no_value(go, home, monkeypatch, capsys):
    """Metrics, timings, events and the log wait until there is room; the thread of TensorBoard's own writer would die."""
    honest = Loader.step
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(self, epoch, s):
        number = epoch * self.steps_per_epoch + s + 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if 3 <= number <= 5 else limit[0], limit[1]))
        return honest(self, epoch, s)

    monkeypatch.setattr(Loader, "step", step)
    with full_disk(limit[0]):  # it is as it was afterwards
        out = go(**{"checkpoint.save_steps": 3, "log.report_to": ["tensorboard"]}).output_dir
    said = capsys.readouterr().err
    assert "the checkpoint of step 3 could not be saved" in said and " needed, " in said and "Traceback" not in said
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000006", "step-00000008"]
    assert (out / "metrics.jsonl").read_text() == (home / "whole" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    shown = scalars(out / "tensorboard")
    assert shown["train/loss"] == [(row["step"], pytest.approx(row["loss"])) for row in rows]
    assert len(shown["train/tokens_per_second"]) == 8


class Full(io.StringIO):
    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_log_on_a_full_disk_does_not_stop_a_run(monkeypatch):
    bar = console.ProgressBar(0, 10, enabled=True)
    monkeypatch.setattr(sys, "stdout", Full(errno.ENOSPC))
    monkeypatch.setattr(sys, "stderr", Full(errno.ENOSPC))
    bar.say("step 1/10")
    errors.warn("the checkpoint could not be saved")
    monkeypatch.setattr(sys, "stdout", Full(errno.EPIPE))  # the reader has ended: so does the run
    with pytest.raises(BrokenPipeError):
        bar.say("step 2/10")


def test_a_report_that_finds_no_room_does_not_hide_the_error_that_it_is_about(go, monkeypatch, capsys):
    fill_at(monkeypatch, loop, "handle_bad_step")
    options = {"train.learning_rate": 1e30, "train.warmup_steps": 0, "checkpoint.save_steps": "never"}
    assert run_command(lambda: go(**options).exit_code) == NONFINITE
    said = capsys.readouterr().err
    assert "nonfinite-step-" in said and "could not be written" in said and "Its rows: " in said


# ---- at the start and at the end ------------------------------------------------------------------------------------

PROMPTS = {"evaluate.generate_data": "{home}/rows.jsonl", "evaluate.max_new_tokens": 2}
SITES = {  # what is written, and the function that does it
    "config and summary": (loop, "start_output", {}),
    "the last checkpoint": (loop, "save", {}),
    "the model": (finish, "export_model", {}),
    "samples": (console, "write_samples", PROMPTS),
}


@pytest.mark.parametrize("site", SITES)
def test_a_full_disk_is_two_lines_and_the_same_command_goes_on(go, home, tmp_path, monkeypatch, capsys, site):
    owner, name, options = SITES[site]
    options = {key: v.format(home=home) if isinstance(v, str) else v for key, v in options.items()}
    with monkeypatch.context() as patch:
        fill_at(patch, owner, name)
        assert run_command(lambda: go(**options).exit_code) == SAVE
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert re.search(r"^minisft: error: .*(written|saved): .*; [0-9.]+ (bytes|kB) needed, [0-9.]+ .B free$", error), (
        error
    )
    assert hint.startswith("  ")
    assert run_command(lambda: go(**options).exit_code) == 0
    expected, found = outcome(home / "whole"), outcome(tmp_path / "out")
    if options:  # they are in the configuration, and eval_exact_match is in the metrics
        del expected["metrics"], expected["state"]
    assert_same(expected, found)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_output_that_finds_no_room_is_two_lines_and_not_a_traceback():
    def run(*arguments, **streams):
        environment = os.environ | {"PYTHONUNBUFFERED": ""}  # so that the text waits for a flush
        return subprocess.run([sys.executable, "-m", "minisft", *arguments], env=environment, text=True, **streams)

    with open("/dev/full", "w") as full:
        done = run("--version", stdout=full, stderr=subprocess.PIPE)
        assert (
            done.returncode == SAVE and done.stderr.splitlines()[0] == "minisft: error: disk: No space left on device"
        )
        assert len(done.stderr.splitlines()) == 2
        assert run("train", "none.toml", stdout=full, stderr=full).returncode == 2  # the mistake, and not the disk
