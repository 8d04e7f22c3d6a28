"""A run that was stopped, killed or damaged ends as if nothing had happened: byte for byte."""

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from tiny import GPT2, logged, settings, start, train, train_quietly, weights, with_spoilt_loss

from minisft import export, loop, signals
from minisft import train as command
from minisft.config.values import as_toml
from minisft.data.loader import Loader
from minisft.errors import DATA, SAVE, STOPPED, UserError
from minisft.prepare import run as prepare_run
from minisft.update import LossScale

ONE_EPOCH = {"train.num_train_epochs": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """One folder for the runs of this file: they share rows, tokenizer and token cache."""
    folder = tmp_path_factory.mktemp("resume")
    settings(folder)
    return folder


@pytest.fixture
def go(home, tmp_path):
    """A function that trains, in the same output folder at every call of one test: one epoch of 8 steps unless told otherwise."""
    return partial(
        train, home, **ONE_EPOCH, output_dir=str(tmp_path / "out"), **{"data.cache_dir": str(home / "cache")}
    )


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the lock, which names its last holder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def saved(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-????????"))


def outcome(out: Path) -> dict[str, object]:
    """What a run leaves, without what depends on the clock (timings.jsonl, and its length in the checkpoint)."""
    last = saved(out)[-1]
    (model,) = last.glob("*model.safetensors")  # or adapter_model.safetensors
    state = json.loads((last / "trainer_state.json").read_text())
    del state["timings.jsonl"]
    return {
        "metrics": (out / "metrics.jsonl").read_text(),
        "state": state,
        "weights": weights(out),
        "checkpoint": (last.name, model.read_bytes()),
        "optimizer": (last / "optimizer.safetensors").read_bytes(),
    }


def assert_same(one: dict, other: dict) -> None:
    for part in one:
        assert one[part] == other[part], part  # part by part, or pytest would print the weights


def stop_after(monkeypatch, steps: int, number: signal.Signals = signal.SIGTERM) -> None:
    """The process gets a signal while it collects the batches of optimizer step `steps` (the first is 1)."""
    honest = Loader.step

    def step(self, epoch, s):
        if epoch * self.steps_per_epoch + s + 1 == steps:
            signal.raise_signal(number)
        return honest(self, epoch, s)

    monkeypatch.setattr(Loader, "step", step)


def break_steps(monkeypatch, *steps: int) -> None:
    """The loss of these optimizer steps (the first is 1) is infinite."""
    honest = loop.train_step

    def train_step(run, *arguments, **options):
        broken = run.progress.step + 1 in steps
        return honest(with_spoilt_loss(run) if broken else run, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", train_step)


# ---- stopped by a signal ----------------------------------------------------------------------------------------

RUNS = {
    "plain": {},
    # everything that is random, and a log window of 3 steps that is open at most of the saves
    "random": {
        "model.config": GPT2 | {"resid_pdrop": 0.1, "embd_pdrop": 0.1},
        "data.packing": True,
        "train.per_device_train_batch_size": 2,
        "train.neftune_noise_alpha": 5.0,
        "log.logging_steps": 3,
        "data.eval_fraction": 0.1,
        "evaluate.eval_steps": 2,
        "train.num_train_epochs": 2,
        "train.max_steps": 16,  # of 24
    },
    "fp16": {"train.precision": "fp16"},
    "skip": {"train.on_nonfinite": "skip", "log.logging_steps": 3, "train.num_train_epochs": 2, "train.max_steps": 11},
}


@pytest.fixture(scope="module")
def whole(home):
    """name of RUNS -> the outcome of that run without a stop, trained once."""
    outcomes = {}

    def outcome_of(name):
        if name not in outcomes:
            outcomes[name] = outcome(train(home, output_dir=str(home / name), **ONE_EPOCH | RUNS[name]).output_dir)
        return outcomes[name]

    return outcome_of


def prepare_kind(name: str, monkeypatch) -> None:
    if name == "fp16":  # the scale doubles every other step, overflows and halves again
        monkeypatch.setattr(prepare_run, "LossScale", partial(LossScale, growth_interval=2))
    if name == "skip":
        break_steps(monkeypatch, 3, 8, 9)


# An epoch has 8 steps, that of "random" 12.
@pytest.mark.parametrize(
    "name, steps",
    [
        ("plain", 1),
        pytest.param("random", 4, marks=pytest.mark.slow),
        ("random", 12),
        ("random", 13),
        ("fp16", 7),
        ("skip", 8),
    ],
)
def test_a_stopped_run_resumes_byte_for_byte(go, whole, monkeypatch, name, steps):
    prepare_kind(name, monkeypatch)
    expected = whole(name)
    with monkeypatch.context() as patch:
        stop_after(patch, steps)
        stopped = go(**RUNS[name])
    assert (stopped.exit_code, stopped.step, stopped.model_dir) == (STOPPED, steps, None)
    result = go(**RUNS[name])
    assert result.exit_code == 0
    assert_same(outcome(result.output_dir), expected)


@pytest.fixture
def ahead(monkeypatch):
    """The loader makes each step's batches on a thread, as for a GPU."""
    honest = Loader.steps
    monkeypatch.setattr(Loader, "steps", lambda self, first, last, ahead: honest(self, first, last, ahead=True))


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.mark.usefixtures("ahead")
def test_a_loader_that_is_ahead_changes_nothing(go, whole, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 12)  # of an epoch
        assert go(**RUNS["random"]).exit_code == STOPPED
    assert no_thread_is_left()
    assert_same(outcome(go(**RUNS["random"]).output_dir), whole("random"))
    assert no_thread_is_left()


@pytest.mark.usefixtures("ahead")
def test_the_loader_s_thread_ends_with_a_run_that_fails(go, monkeypatch):
    break_steps(monkeypatch, 2)
    with pytest.raises(UserError, match="not finite") as caught:
        go()
    assert caught.tb and no_thread_is_left()  # though the traceback keeps all that the run had


def test_fp16_s_loss_scale_moves_in_these_runs(whole, monkeypatch):
    prepare_kind("fp16", monkeypatch)
    assert whole("fp16")["state"]["loss_scale"]["scale"] not in (1.0, 2.0**16)


# ---- started again ----------------------------------------------------------------------------------------------

CONSTANT = {"train.lr_scheduler_type": "constant"}  # a schedule that does not depend on the number of steps


def test_a_second_start_of_a_finished_run_changes_nothing(go, capsys):
    options = {"log.report_to": ["tensorboard"], "data.eval_fraction": 0.1}
    out = go(**options).output_dir
    before = files(out)
    again = go(**options)
    assert (again.exit_code, again.step, again.model_dir) == (0, 8, out / "model")
    assert_same(files(out), before)
    assert files(out).keys() == before.keys()
    assert "finished already, at step 8" in capsys.readouterr().out


def test_more_epochs_go_on_where_the_run_ended(go, home):
    options = CONSTANT | {"train.per_device_train_batch_size": 32}
    at_once = train(home, output_dir=str(home / "three"), **options, **{"train.num_train_epochs": 3})
    for epochs in (1, 2, 3):
        out = go(**options, **{"train.num_train_epochs": epochs}).output_dir
    assert_same(outcome(out), outcome(at_once.output_dir))
    # the models of the shorter runs are still there
    assert sorted(p.name for p in out.glob("model*")) == ["model", "model.replaced-1", "model.replaced-2"]


def test_never_starts_over(go, whole):
    go(**{"train.learning_rate": 1e-3, "train.max_steps": 2})
    out = go(**{"checkpoint.resume": "never"}).output_dir
    assert_same(outcome(out), whole("plain"))


@pytest.mark.quick
def test_a_path_goes_back_to_that_checkpoint(go, whole):
    out = go(**{"checkpoint.save_steps": 2, "checkpoint.save_total_limit": 9}).output_dir
    result = go(**{"checkpoint.resume": str(out / "checkpoints" / "step-00000004")})
    assert result.step == 8
    assert_same(outcome(out), whole("plain"))


@pytest.mark.parametrize("change", [{"train.num_train_epochs": 2}, {"checkpoint.resume": "never"}])
def test_after_a_crash_before_the_export_the_model_is_not_that_of_the_run_before(go, monkeypatch, change):
    options = CONSTANT | {"train.per_device_train_batch_size": 32}
    go(**options)
    options |= {"train.learning_rate": 5e-3, **change}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", lambda *arguments: None)
        go(**options)
    out = go(**options | {"checkpoint.resume": "auto"}).output_dir
    assert (out / "model" / "model.safetensors").read_bytes() == outcome(out)["checkpoint"][1]


def test_a_full_disk_at_the_export_loses_nothing(go, whole, monkeypatch):
    honest = export.write_model

    def write_model(run, folder, dtype=None, source=None):
        if dtype:  # the export; a checkpoint keeps the weights as they are
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(run, folder)

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_model", write_model)
        with pytest.raises(UserError, match="model cannot be written: No space left .* needed, .* free") as caught:
            go()
    assert caught.value.exit_code == SAVE
    assert_same(outcome(go().output_dir), whole("plain"))


def test_another_precision_starts_with_its_own_loss_scale(go, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        go()
    out = go(**{"train.precision": "fp16"}).output_dir
    assert outcome(out)["state"]["loss_scale"]["scale"] == 2.0**16


def test_a_damaged_checkpoint_is_passed_over_and_said(go, whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        out = go(**{"checkpoint.save_steps": 4}).output_dir
    *_, newest = saved(out)
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "model.safetensors").write_bytes(data)
    go(**{"checkpoint.save_steps": 4})
    said = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "step-00000006: model.safetensors does not have the sha256 it was written with" in said
    assert "resumed from" in said and "step-00000004" in said
    assert_same(outcome(out), whole("plain"))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(go, whole, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        out = go(**{"checkpoint.save_steps": 1}).output_dir
    for path in saved(out):
        (path / "optimizer.safetensors").write_bytes(b"")
    before = files(out)
    with pytest.raises(UserError, match="step-00000001: optimizer.safetensors has 0 bytes") as caught:
        go()
    assert caught.value.exit_code == DATA and "step-00000002: " in caught.value.message
    assert_same(files(out), before)
    go(**{"checkpoint.resume": "never"})
    assert_same(outcome(out), whole("plain"))


def test_the_same_steps_in_other_micro_batches_may_resume(go, whole, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        go()
    result = go(**{"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4})
    losses = [json.loads(line)["loss"] for line in whole("plain")["metrics"].splitlines()]
    assert logged(result.output_dir) == pytest.approx(losses, rel=1e-4)  # as whole runs agree in test_loop.py


def change_rows(home: Path, folder: Path) -> dict:
    rows = (home / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join([rows[1], rows[0], *rows[2:]]))
    return {"data.train_data": str(folder / "rows.jsonl")}


@pytest.mark.parametrize(
    "change, message",
    [
        (change_rows, r"data was [0-9a-f]{12}, is [0-9a-f]{12}\)"),
        ({"data.eval_fraction": 0.1}, "documents was 64, is 58"),
        ({"data.packing_strategy": "ffd"}, "packing was bfd, is ffd"),
        ({"data.packing": False}, "packing was bfd, is none"),
        ({"train.gradient_accumulation_steps": 2}, "packs a step was 2, is 4"),
        ({"data.truncation": "left"}, "truncation was right, is left"),
        ({"train.seed": 1}, "seed was 42, is 1"),
        ({"data.shuffle": False}, "shuffle was True, is False"),
    ],
)
def test_another_order_of_rows_is_refused(home, stopped_packed, tmp_path, change, message):
    out, options = stopped_packed
    before = files(out)
    with pytest.raises(UserError, match=f"step-00000004 cannot be resumed: .*{message}") as caught:
        train(home, **options | (change(home, tmp_path) if callable(change) else change))
    assert "resume = 'never'" in caught.value.hint
    assert_same(files(out), before)


@pytest.mark.parametrize(
    ("before", "change", "told"),
    [
        ({}, {"lora.r": 4}, 'lora.r "none" -> 4'),
        ({"lora.r": 4}, {"lora.r": None}, 'lora.r 4 -> "none"'),
        ({"lora.r": 4}, {"lora.r": 2}, "lora.r 4 -> 2"),
        ({"lora.r": 4}, {"lora.target_modules": ["q_proj"]}, 'lora.target_modules "all-linear" -> ["q_proj"]'),
        ({}, {"train.frozen": ["embed"]}, 'train.frozen [] -> ["embed"]'),
        ({}, {"model.new_special_tokens": ["<x>"]}, 'model.new_special_tokens [] -> ["<x>"]'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_other_tensors_is_refused_by_the_keys_that_changed(home, tmp_path, before, change, told):
    """A row that its moments lack was updated beyond the end of their memory."""
    base = train(home, output_dir=str(tmp_path / "base"), **{"train.max_steps": 1}).output_dir / "model"
    options = {"output_dir": str(tmp_path / "out"), "model.config": None, "model.model_name_or_path": str(base)}
    out = train(home, **options, **before, **{"train.max_steps": 2}).output_dir
    kept = files(out)
    with pytest.raises(UserError) as caught:
        train(home, **options, **(before | change), **{"train.max_steps": 4})
    assert f"step-00000002 cannot be resumed: it has other tensors ({told}" in caught.value.message
    assert f"output_dir; {out / 'model'} may be its start" in caught.value.hint
    assert_same(files(out), kept)
    shutil.rmtree(out / "model")
    with pytest.raises(UserError) as caught:
        train(home, **options, **(before | change), **{"train.max_steps": 4})
    assert caught.value.hint == "go back to these settings, or choose a new output_dir"


@pytest.fixture(scope="module")
def stopped_packed(home) -> tuple[Path, dict]:
    """A packed run that was stopped after step 4, and its options."""
    options = {"output_dir": str(home / "packed"), "data.packing": True, "train.per_device_train_batch_size": 2}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 4)
        return train(home, **options).output_dir, options


# ---- killed -----------------------------------------------------------------------------------------------------


def kill_when(process, folder: Path, pattern: str) -> None:
    """SIGKILL as soon as a path that matches appears in the folder."""
    while process.is_alive() and not any(folder.glob(pattern)):
        time.sleep(0.0005)
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def three_steps(home) -> tuple[dict, dict]:
    """The configuration of a run that saves at each of its three steps, and its outcome."""
    options = {"checkpoint.save_steps": 1, "train.max_steps": 3, "checkpoint.save_total_limit": 2}
    return options, outcome(train(home, **options, output_dir=str(home / "three steps")).output_dir)


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["few", "9"])
def test_killed_at_so_many_moments(home, tmp_path, three_steps, few):
    """The next start ends like a run that nobody killed. Most kills are inside a save: it has begun, nothing is renamed."""
    options, expected = three_steps
    outside = ("config.toml", "checkpoints/step-00000002", ".tmp-model-*")
    written = ("", "/config.json", "/tokenizer.json", "/optimizer.safetensors", "/trainer_state.json", "/manifest.json")
    moments = [f"checkpoints/.tmp-step-{step:08d}-*{name}" for name, step in zip(written, (1, 3) * 3)]
    killed = inside = 0
    patterns = (*moments[1::2], outside[2]) if few else (*moments, *outside)
    for i, pattern in enumerate(patterns):
        out = tmp_path / str(i)
        process = start(train_quietly, home, options | {"output_dir": str(out)})
        kill_when(process, out, pattern)
        killed += process.exitcode == -signal.SIGKILL  # on a busy machine a run may end before its kill
        begun = {path.name[5:18] for path in out.glob("checkpoints/.tmp-step-*")}  # step-XXXXXXXX
        inside += bool(begun - {path.name for path in saved(out)})
        assert train(home, **options, output_dir=str(out)).exit_code == 0
        assert_same(outcome(out), expected)
        assert [path.name for path in out.rglob(".*")] == [".lock"]  # what was begun is tidied up
    assert killed >= (3 if few else 7) and inside >= (2 if few else 4), (killed, inside)


def train_to_crash(folder: Path, overrides: dict, point: str) -> None:
    """For a process of its own: it dies at a crash point (atomic_folder.py)."""
    os.environ["MINISFT_CRASH_AT"] = point
    train_quietly(folder, overrides)


@pytest.mark.parametrize("point, found", [("step-00000003 state", 2), ("step-00000001 del", 3)])
def test_killed_at_a_crash_point(home, tmp_path, three_steps, point, found):
    """In a save, and in retention; tests/reliability.py has all points."""
    overrides, expected = three_steps
    overrides = overrides | {"output_dir": str(tmp_path / "out")}
    crashed = start(train_to_crash, home, overrides, point)
    crashed.join()
    assert crashed.exitcode == 137 and saved(tmp_path / "out")[-1].name == f"step-{found:08d}"
    train(home, **overrides)
    assert_same(outcome(tmp_path / "out"), expected)


# ---- Ctrl-C -----------------------------------------------------------------------------------------------------


def write_config(home: Path, folder: Path, **overrides) -> str:
    keys = settings(home, output_dir=str(folder / "out"), **overrides)
    (folder / "run.toml").write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in keys.items()))
    return str(folder / "run.toml")


def test_ctrl_c_saves_and_says_what_to_do(home, tmp_path, monkeypatch, capfd):
    stop_after(monkeypatch, 3, signal.SIGINT)
    assert command.main([write_config(home, tmp_path)]) == STOPPED
    out, err = capfd.readouterr()
    assert err.strip() == "minisft: SIGINT: saving at the end of a step, then stopping; once more quits at once"
    assert (
        f"stopped by SIGINT after step 3 of 8, saved in {tmp_path}/out/checkpoints; the same command resumes"
        in " ".join(out.split())
    )


def test_the_configuration_of_a_run_continues_it_from_any_folder_or_is_refused(home, tmp_path, monkeypatch):
    """output_dir is relative: from another folder the run would begin anew there, and leave its checkpoints alone."""
    monkeypatch.chdir(tmp_path)
    train(home, output_dir="runs/a b", **{"train.max_steps": 1})
    assert command.run("runs/a b/config.toml", max_steps=2).step == 2
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with pytest.raises(UserError, match=r"is of the run in \.\./runs/a b, .*elsewhere") as caught:
        command.run("../runs/a b/config.toml", max_steps=3)
    assert "--output_dir '../runs/a b'" in caught.value.hint
    assert command.run("../runs/a b/config.toml", max_steps=3, output_dir="../runs/a b").step == 3
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_what_is_said_about_going_on_is_true_where_a_run_was_told_not_to_resume(
    home, tmp_path, monkeypatch, capfd, resume
):
    """config.toml repeats what the command said: with "never" it would start over."""
    options = {"output_dir": str(tmp_path / "out"), "checkpoint.resume": resume}
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(home, **options)
    told = " ".join(capfd.readouterr().out.split())
    assert ("with --resume auto goes on" in told) == (resume == "never")
    train(home, **options)
    (command,) = (line for line in capfd.readouterr().out.split("\n") if " -m minisft train " in line)
    assert command.endswith(" --resume auto") == (resume == "never")


def say_to(file: str, config: str) -> None:
    """The command, for a process of its own, where each signal counts."""
    signals.SAME_SECONDS = 0.0
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
    sys.exit(command.main([config]))


def test_ctrl_c_twice_quits_at_once(home, tmp_path):
    slow = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 64, "log.progress_bar": True}
    config = write_config(home, tmp_path, **slow, **{"train.num_train_epochs": 1000})  # half a second a step
    said, sent = tmp_path / "said.txt", 0
    said.touch()
    process = start(say_to, str(said), config)
    while process.is_alive():
        if ("\nstep    1/", "once more quits at once", "no more")[sent] in said.read_text():
            os.kill(process.pid, signal.SIGINT)
            sent += 1
        time.sleep(0.002)
    assert process.exitcode == 130
    assert said.read_text().splitlines()[-1].startswith("minisft: interrupted")
    assert not saved(tmp_path / "out")
