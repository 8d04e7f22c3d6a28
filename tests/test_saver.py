"""A save in the background is that of its step, whole or not there, and keeps the promises of one that is waited for."""

import errno
import os
import threading
from pathlib import Path

import pytest
from test_checkpoint import everything, load, make
from test_checkpoint import train as take_steps
from test_dpo_run import DPO, write_pairs
from test_lora_run import LORA
from tiny import train

from minisft import atomic_folder, checkpoint
from minisft.errors import SAVE, UserError
from minisft.model.tensor_files import TensorFile, entry_of
from minisft.saver import Saver

ASYNC = {"checkpoint.save_async": True}


def contents(model, optimizer, step: int, gate: threading.Event | None = None) -> checkpoint.Contents:
    """gate: its thread waits for it before it writes the last file."""

    def write_rest(folder: Path) -> None:
        if gate is not None:
            assert gate.wait(20)

    entries = [entry_of(name, p.dtype, p.shape, p.detach) for name, p in model.named_parameters()]
    weights, state = TensorFile("model.safetensors", entries, {}), {"step": step}
    return checkpoint.Contents([weights], [checkpoint.optimizer_file(model, optimizer)], write_rest, state)


def begin(saver: Saver, model, optimizer, step: int, gate=None, **options) -> None:
    saver.save(step, contents(model, optimizer, step, gate), needed=0, **options)


def test_it_has_the_values_of_its_step_and_is_not_seen_before_it_is_published(tmp_path):
    model, opt = make()
    take_steps(model, opt)
    expected, gate = everything(model, opt), threading.Event()
    with Saver(tmp_path, 3, in_background=True) as saver:
        begin(saver, model, opt, 3, gate)
        take_steps(model, opt, seed=1)
        saver.publish_if_ready()
        assert checkpoint.checkpoints(tmp_path) == []  # it is being written
        gate.set()
        for thread in threading.enumerate():
            if thread.name == "save":
                thread.join()
        assert checkpoint.checkpoints(tmp_path) == []  # it is written, and waits for the next step
        saver.publish_if_ready()
        assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000003"]
        changed, homes = everything(model, opt), dict(saver._homes)
        begin(saver, model, opt, 6)
        assert all(saver._homes[key] is home for key, home in homes.items())  # the same memory again
    for step, values in ((3, expected), (6, changed)):
        path, other = tmp_path / f"step-{step:08d}", make(seed=5)
        assert atomic_folder.verify_folder(path) is None and load(path, *other) == {"step": step}
        assert everything(*other) == values


def test_one_save_is_over_before_the_next_begins_and_the_last_one_is_waited_for(tmp_path):
    model, opt = make()
    with Saver(tmp_path, 1, in_background=True) as saver:
        for step in (1, 2, 3):
            begin(saver, model, opt, step)
        assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002"]
        begin(saver, model, opt, 4, is_last=True)
        assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000004"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def refuse(number: int):
    """os.fsync that fails at its n-th call from any thread."""
    real, calls = os.fsync, iter(range(1, 10**6))

    def fsync(fd):
        if next(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    return fsync


@pytest.mark.parametrize("number", range(1, 7))
def test_a_full_disk_at_any_operation_keeps_the_old_checkpoint_and_the_next_save_tries_again(
    tmp_path, monkeypatch, capsys, number
):
    model, opt = make()
    with Saver(tmp_path, 1, in_background=True) as saver:
        begin(saver, model, opt, 1, is_last=True)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse(number))
            begin(saver, model, opt, 2)
            saver.finish()
        assert saver.num_failed == 1 and "step 2 could not be saved: [Errno 28]" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        begin(saver, model, opt, 3)
    assert saver.num_failed == 0 and [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_the_third_failure_in_a_row_and_that_of_the_last_save_end_the_run(tmp_path, monkeypatch, capsys):
    model, opt = make()
    fail = lambda *arguments: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error"))  # noqa: E731
    monkeypatch.setattr(checkpoint.Contents, "write", fail)
    with pytest.raises(UserError, match="step 3 could not be saved") as caught:
        with Saver(tmp_path, 1, in_background=True) as saver:
            for step in (1, 2, 3):
                begin(saver, model, opt, step)
            saver.finish()
    assert caught.value.exit_code == SAVE
    with pytest.raises(UserError, match="step 4 could not be saved") as caught:
        with Saver(tmp_path, 1, in_background=True) as saver:
            begin(saver, model, opt, 4)
            saver.finish(is_last=True)  # no next save would try again
    assert caught.value.exit_code == SAVE and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error, left", [(UserError("the data is bad"), ["step-00000001"]), (KeyboardInterrupt(), [])])
def test_an_error_of_the_run_waits_for_the_save_and_a_second_signal_does_not(tmp_path, error, left):
    model, opt = make()
    gate = threading.Event()
    if left:
        gate.set()
    with pytest.raises(type(error)):
        with Saver(tmp_path, 1, in_background=True) as saver:
            begin(saver, model, opt, 1, gate)
            raise error
    assert [path.name for path in tmp_path.iterdir()] == left
    gate.set()


def test_an_error_that_is_none_of_the_disk_s_is_raised_as_it_is(tmp_path, monkeypatch):
    def write(self, folder, name):
        raise ValueError("a mistake of ours")

    model, opt = make()
    monkeypatch.setattr(checkpoint.Contents, "write", write)
    with pytest.raises(ValueError, match="a mistake of ours"):
        with Saver(tmp_path, 1, in_background=True) as saver:
            begin(saver, model, opt, 1)
    assert list(tmp_path.iterdir()) == []


# ---- whole runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saver")
    write_pairs(folder / "pairs.jsonl", 32)
    train(folder, output_dir=str(folder / "base"), **{"train.max_steps": 1})
    return folder


KINDS = {
    "full": {"evaluate.eval_steps": 2, "data.eval_fraction": 0.2, "evaluate.load_best_model_at_end": True},
    "LoRA": {"model.config": None, **LORA},
    "TR-DPO": {
        "model.config": None,
        **DPO,
        "dpo.sync_ref_model": True,
        "dpo.ref_model_sync_steps": 2,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_saves_in_the_background_leaves_the_same_bytes(home, tmp_path, kind):
    keys = {"train.max_steps": 3, "checkpoint.save_steps": 1, "checkpoint.save_total_limit": 9, **KINDS[kind]}
    if kind != "full":
        keys["model.model_name_or_path"] = str(home / "base" / "model")
    if kind == "TR-DPO":
        keys["data.train_data"] = str(home / "pairs.jsonl")
    train(home, output_dir=str(tmp_path / "waits"), **keys)
    train(home, output_dir=str(tmp_path / "goes on"), **keys, **ASYNC)
    one, other = (tmp_path / name for name in ("waits", "goes on"))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert len(checkpoint.checkpoints(other / "checkpoints")) == 3
    for path in one.glob("checkpoints/*/*.safetensors"):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes(), path


def test_memory_that_is_not_there_is_told_before_the_first_step(home, tmp_path, monkeypatch):
    monkeypatch.setattr("minisft.begin.memory_bytes", lambda: 1000)
    with pytest.raises(UserError, match="the copy of a checkpoint for save_async needs .* (1.00 kB|1,000 bytes)"):
        train(home, output_dir=str(tmp_path / "out"), **ASYNC)
