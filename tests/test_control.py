"""output_dir/control.toml: it acts once, a mistake in it is a warning, and a resumed run repeats what was done."""

import json
from pathlib import Path

import pytest
from test_resume import assert_same, outcome
from tiny import logged, settings, train

from minisft.control import Control, Request
from minisft.data.loader import Loader
from minisft.errors import STOPPED

# ---- the file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, request_",
    [
        ("save = true", Request(save=True)),
        ("evaluate = true\nstop = true", Request(evaluate=True, stop=True)),
        ("learning_rate = 1e-5\nsave = false", Request(learning_rate=1e-5)),
        ("learning_rate = 1", Request(learning_rate=1.0)),
    ],
)
def test_it_acts_once_and_is_kept_under_another_name(tmp_path, capsys, text, request_):
    control = Control(tmp_path, 0, can_evaluate=True)
    assert control.before_step(6) == Request()
    (tmp_path / "control.toml").write_text(text)
    assert control.before_step(7) == request_
    assert control.before_step(8) == Request()
    assert [path.name for path in tmp_path.glob("control*")] == ["control-done-step-00000007.toml"]
    assert (tmp_path / "control-done-step-00000007.toml").read_text() == text
    (line,) = (tmp_path / "config_history.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 7, "control": {k: v for k, v in vars(request_).items() if v}}
    assert f"step 7: {request_}" in capsys.readouterr().err
    assert Request.of(*request_.numbers()) == request_


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"save = tr", "not a TOML file"),
        (b"\xff\xfe", "not a TOML file"),
        (b"a = " + b"[" * 2000, "not a TOML file"),
        (b"learning_rates = 1e-5", "did you mean learning_rate?"),
        (b"pause = true", "the keys are save, evaluate, stop, learning_rate"),
        (b"save = 1", "save = 1: expected true or false"),
        (b'learning_rate = "1e-5"', "expected a number above 0"),
        (b"learning_rate = true", "expected a number above 0"),
        (b"learning_rate = 0", "expected a number above 0"),
        (b"learning_rate = inf", "expected a number above 0"),
        (b"evaluate = true", "no evaluation data"),
        (b"#" * 70000, "more than 65,536 bytes"),
    ],
)
def test_a_mistake_is_one_warning_and_nothing_is_done(tmp_path, capsys, data, reason):
    control = Control(tmp_path, 0, can_evaluate=False)
    (tmp_path / "control.toml").write_bytes(data)
    assert [control.before_step(step) for step in (1, 2, 3)] == [Request()] * 3
    err = capsys.readouterr().err
    assert err.count("WARNING") == 1 and reason in err and "the run goes on" in err
    assert [path.name for path in tmp_path.iterdir()] == ["control.toml"]
    (tmp_path / "control.toml").write_text("save = true  # mended")
    assert control.before_step(4) == Request(save=True)


def test_a_file_that_asks_for_nothing_is_told_as_that(tmp_path, capsys):
    (tmp_path / "control.toml").write_text("# save = true\nstop = false\n")
    assert Control(tmp_path, 0, can_evaluate=True).before_step(7) == Request()
    assert "step 7: nothing, as " in capsys.readouterr().err


def test_what_is_no_file_and_what_is_empty_are_left_alone(tmp_path, capsys):
    control = Control(tmp_path, 0, can_evaluate=False)
    (tmp_path / "control.toml").touch()  # somebody is about to write it
    assert control.before_step(1) == Request() and capsys.readouterr().err == ""
    (tmp_path / "control.toml").unlink()
    (tmp_path / "control.toml").mkdir()
    assert control.before_step(2) == Request() and "a folder, not a regular file" in capsys.readouterr().err


def test_what_was_done_later_is_done_again_but_for_a_stop(tmp_path):
    for step, text in ((3, "save = true"), (5, "learning_rate = 1e-5\nstop = true"), (6, "evaluate = true")):
        (tmp_path / f"control-done-step-{step:08d}.toml").write_text(text)
    control = Control(tmp_path, 3, can_evaluate=True)
    assert len(control.lines()) == 2
    (tmp_path / "control.toml").write_text("save = true")  # must not take the name of what was done in step 5
    asked = {step: control.before_step(step) for step in range(4, 9)}
    assert asked[4] == Request(save=True) and asked[5] == Request(learning_rate=1e-5)
    assert asked[6] == Request(evaluate=True) and asked[7] == asked[8] == Request()
    control = Control(tmp_path, 3, can_evaluate=True)
    (tmp_path / "control.toml").write_text("learning_rate = 2e-5\nstop = true")
    assert [control.before_step(step) for step in (5, 7)] == [
        Request(learning_rate=1e-5),
        Request(learning_rate=2e-5, stop=True),
    ]


# ---- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    settings(folder)
    return folder


def run_with(home, out, asked=None, crash=None, **options):
    """A run in the folder `out`, whose control file is written before the steps of `asked` (step -> text), and that crashes in
    step `crash`."""
    honest = Loader.step

    def step(self, epoch, s):
        number = epoch * self.steps_per_epoch + s + 1
        if number == crash:
            raise RuntimeError("crash")
        if number in (asked or {}) and self.accumulation == 2:  # not the loader of the evaluation
            (out / "control.toml").write_text(asked[number])
        return honest(self, epoch, s)

    keys = {"output_dir": str(out), "data.cache_dir": str(home / "cache"), "train.max_steps": 12}
    keys |= {"checkpoint.save_steps": 5, "data.eval_fraction": 0.1, "evaluate.eval_steps": 100}
    keys |= {"train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "step", step)
        return train(home, **keys | options)


@pytest.fixture
def go(home, tmp_path):
    return lambda *arguments, **options: run_with(home, tmp_path / "out", *arguments, **options)


ASKED = {3: "learning_rate = 3e-3\nevaluate = true", 7: "save = true", 9: "learning_rate = 2e-2"}


@pytest.fixture(scope="module")
def plain(home) -> Path:
    return run_with(home, home / "plain").output_dir


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """The folder of a run that is asked all of ASKED, and is not interrupted."""
    return run_with(home, home / "whole", ASKED).output_dir


def test_what_is_asked_is_done(plain, whole):
    rates, expected = logged(whole, "learning_rate"), logged(plain, "learning_rate")
    factors = [1.0] * 2 + [0.3] * 6 + [2.0] * 4  # of the schedule, from the step on in which it was read
    assert rates == pytest.approx([factor * rate for factor, rate in zip(factors, expected)], rel=1e-12)
    losses, expected = logged(whole), logged(plain)
    assert losses[:3] == expected[:3] and losses[3] != expected[3]  # the loss is that before the update
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 12]
    saved = sorted(path.name for path in (whole / "checkpoints").glob("step-????????"))
    assert saved == ["step-00000007", "step-00000010", "step-00000012"]


@pytest.mark.parametrize(
    "crash", [4, 8, 11]
)  # before the first checkpoint, after one that was asked for, after the last change
def test_a_run_that_crashes_repeats_what_was_done(go, whole, crash):
    with pytest.raises(RuntimeError):
        go({step: text for step, text in ASKED.items() if step < crash}, crash)
    out = go({step: text for step, text in ASKED.items() if step >= crash}).output_dir
    assert_same(outcome(out), outcome(whole))


def test_a_stop_saves_and_the_same_command_resumes(go, whole, capsys):
    stopped = go({3: ASKED[3], 4: "stop = true"})
    assert (stopped.exit_code, stopped.step, stopped.signal) == (STOPPED, 4, None)
    assert "stopped by control.toml after step 4 of 12" in " ".join(capsys.readouterr().out.split())
    assert_same(outcome(go({7: ASKED[7], 9: ASKED[9]}).output_dir), outcome(whole))
    assert "the learning rate is 0.3 x train.learning_rate" in (stopped.output_dir / "summary.txt").read_text()


def test_a_newly_configured_learning_rate_counts_again(go):
    go({3: "learning_rate = 3e-3", 4: "stop = true"})
    out = go(**{"train.learning_rate": 5e-2, "train.lr_scheduler_type": "constant"}).output_dir
    assert logged(out, "learning_rate")[4:] == [5e-2] * 8


def test_a_run_that_starts_over_repeats_nothing(go, plain):
    go({3: "learning_rate = 3e-3", 4: "stop = true"})
    assert logged(go(**{"checkpoint.resume": "never"}).output_dir) == logged(plain)
