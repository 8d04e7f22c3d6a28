"""A checkpoint is all of one step or does not exist, whatever happens while it is written, and resume is bit-exact."""

import errno
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from minisft import atomic_folder, checkpoint
from minisft.config.choices import ADAMW, OPTIMIZERS
from minisft.errors import CONFIG, DATA, SAVE, UserError
from minisft.optimizers import build_optimizer
from minisft.parts import Cut
from minisft.saver import MAX_FAILED_SAVES, Saver


def make(seed: int = 0, optimizer=torch.optim.AdamW, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    return model, optimizer(model.parameters(), lr=0.1, **options)


def train(model, optimizer, steps: int = 3, seed: int = 0) -> None:
    torch.manual_seed(seed)  # inputs and dropout; the loop seeds every step, so no generator state is saved
    for _ in range(steps):
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(
    folder: Path, step: int, model, optimizer, *, keep=None, pinned=(), other_bytes=0, write_model=None, failures=None,
    in_background=False,
):  # fmt: skip
    """A save -> the checkpoint. failures: so many in a row before it, through `Saver` -> the same after it."""

    def write(path: Path) -> None:
        save_file(model.state_dict(), path / "model.safetensors")
        (path / "config.json").write_text("{}")

    state = {"step": step, "epoch": step / 7, "data": {"position": 3 * step}}
    contents = checkpoint.Contents([], [checkpoint.optimizer_file(model, optimizer)], write_model or write, state)
    options = {"needed": checkpoint.checkpoint_bytes(model, optimizer) + other_bytes, "pinned": pinned}
    if failures is not None:
        with Saver(folder, keep, in_background=in_background) as saver:
            saver.num_failed = failures
            saver.save(step, contents, **options)
            saver.finish()
            return saver.num_failed
    path = folder / f"step-{step:08d}"
    with checkpoint.new_checkpoint(folder, step, keep=keep, **options) as (temporary, sealed):
        sealed |= contents.write(temporary, path.name)
    return path


def load(path: Path, model, optimizer) -> dict:
    load_weights = lambda model, path: model.load_state_dict(load_file(path / "model.safetensors"))  # noqa: E731
    return checkpoint.load_checkpoint(path, model, optimizer, load_weights)


def everything(model, optimizer) -> dict[str, bytes]:
    """Weights, and optimizer state as bytes, to compare exactly."""
    parts = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        parts |= {f"{name}.{key}": value for key, value in optimizer.state[p].items()}
    return {k: v.numpy().tobytes() if isinstance(v, torch.Tensor) else repr(v).encode() for k, v in parts.items()}


# ------------------------------------------------------------------------------------------------- resume is exact


@pytest.mark.parametrize(
    "optimizer, options",
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.SGD, {}),  # no tensor state at all
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, optimizer, options):
    model, opt = make(optimizer=optimizer, **options)
    train(model, opt)
    path = save(tmp_path, 3, model, opt)
    at_save = everything(model, opt)
    train(model, opt, steps=20, seed=1)

    other, other_opt = make(seed=1, optimizer=optimizer, **options)
    assert load(path, other, other_opt) == {"step": 3, "epoch": 3 / 7, "data": {"position": 9}}
    assert everything(other, other_opt) == at_save
    train(other, other_opt, steps=20, seed=1)
    assert everything(other, other_opt) == everything(model, opt)


def test_state_that_is_not_a_tensor_and_frozen_parameters_survive(tmp_path):
    model, opt = make()
    model[0].requires_grad_(False)
    train(model, opt)
    opt.state[model[2].bias] |= {"level": 3, "scale": 0.1, "name": None}
    path = save(tmp_path, 1, model, opt)
    other, other_opt = make(seed=1)
    load(path, other, other_opt)
    assert other_opt.state[other[2].bias].items() >= {"level": 3, "scale": 0.1, "name": None}.items()
    assert other[0].weight not in other_opt.state and len(other_opt.state) == 2


def test_before_the_first_step_there_is_no_state_to_save(tmp_path):
    model, opt = make()
    path = save(tmp_path, 0, model, opt)
    train(model, opt)
    load(path, model, opt)
    assert not opt.state


def test_bf16_weights_with_fp32_moments_keep_both_dtypes(tmp_path):
    model, opt = make()
    model.bfloat16()
    for p in model.parameters():
        opt.state[p] = {"step": torch.tensor(3.0), "exp_avg": torch.randn(p.shape)}
    path = save(tmp_path, 1, model, opt)
    other, other_opt = make(seed=1)
    load(path, other.bfloat16(), other_opt)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q) and torch.equal(opt.state[p]["exp_avg"], other_opt.state[q]["exp_avg"])


@pytest.mark.parametrize("fused", [False, True])
def test_state_lives_with_its_parameter_but_for_the_counters_of_a_plain_optimizer(tmp_path, fused):
    """The device "meta" stands in for a GPU."""
    model, opt = make()
    train(model, opt)
    path = save(tmp_path, 1, model, opt)
    with torch.device("meta"):
        other, other_opt = make()
    other_opt.param_groups[0]["fused"] = fused
    checkpoint.load_checkpoint(path, other, other_opt, lambda model, path: None)
    devices = {key: value.device.type for state in other_opt.state.values() for key, value in state.items()}
    assert devices == {"step": "meta" if fused else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_other_trainable_parameters_are_an_error_that_names_them(tmp_path):
    model, opt = make()
    train(model, opt)
    whole = save(tmp_path / "whole", 1, model, opt)
    head_only = torch.optim.AdamW(model[2].parameters())
    part = save(tmp_path / "part", 1, model, head_only)
    with pytest.raises(UserError, match="has also the state of 2 parameters: 0.bias, 0.weight"):
        load(whole, model, head_only)
    with pytest.raises(UserError, match="lacks the state of 2 parameters: 0.bias, 0.weight") as error:
        load(part, model, opt)
    assert error.value.exit_code == DATA and opt.state


# ------------------------------------------------------------------------------------------------- finding one


def two_checkpoints(folder: Path) -> tuple[Path, Path]:
    model, opt = make()
    train(model, opt)
    first = save(folder, 10, model, opt)
    train(model, opt)
    return first, save(folder, 20, model, opt)


def test_auto_takes_the_newest_never_takes_none(tmp_path):
    assert checkpoint.find_checkpoint(tmp_path / "checkpoints", "auto") == (None, [])
    first, second = two_checkpoints(tmp_path)
    assert checkpoint.find_checkpoint(tmp_path, "auto") == (second, [])
    assert checkpoint.find_checkpoint(tmp_path, "never") == (None, [])
    assert checkpoint.find_checkpoint(tmp_path / "elsewhere", str(first)) == (first, [])


def test_any_damage_is_found_named_and_passed_over(tmp_path):
    first, second = two_checkpoints(tmp_path)
    for path in sorted(second.iterdir()):
        data = path.read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for damaged in (flipped, b"", data[:middle], data[:-1], data + b"\0", (first / path.name).read_bytes(), None):
            if damaged == data:
                continue  # config.json is the same in both
            path.unlink() if damaged is None else path.write_bytes(damaged)
            found, [(skipped, reason)] = checkpoint.find_checkpoint(tmp_path, "auto")
            assert (found, skipped) == (first, second) and reason
            with pytest.raises(UserError, match="does not verify") as error:
                checkpoint.find_checkpoint(tmp_path, second)
            assert error.value.exit_code == DATA and reason in error.value.message
        path.write_bytes(data)
    assert checkpoint.find_checkpoint(tmp_path, "auto") == (second, [])


def damage(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def test_where_no_checkpoint_verifies_the_run_does_not_start_over_by_itself(tmp_path):
    first, second = two_checkpoints(tmp_path)
    damage(first)
    (second / "trainer_state.json").unlink()
    (tmp_path / "step-00000030").mkdir()  # another program's
    with pytest.raises(UserError, match="no checkpoint in .* verifies") as caught:
        checkpoint.find_checkpoint(tmp_path, "auto")
    assert caught.value.exit_code == DATA and "resume = 'never'" in caught.value.hint
    assert [line.strip() for line in caught.value.message.split("\n")[1:]] == [
        "step-00000030: manifest.json: No such file or directory",
        "step-00000020: trainer_state.json is missing",
        "step-00000010: model.safetensors does not have the sha256 it was written with",
    ]
    assert checkpoint.find_checkpoint(tmp_path, "never") == (None, [])


def test_what_is_no_checkpoint_by_its_name_does_not_stop_a_start(tmp_path):
    for name in ("notes", "step-00000010.replaced-1", ".tmp-step-00000010-host-1-0123abcd", "step-7"):
        (tmp_path / name).mkdir()
    assert checkpoint.find_checkpoint(tmp_path, "auto") == (None, [])


def test_a_disk_that_fails_is_no_reason_to_take_an_older_checkpoint(tmp_path, monkeypatch):
    first, second = two_checkpoints(tmp_path)
    honest = atomic_folder.sha256_file

    def fail(path):
        if Path(path).parent == second:
            raise OSError(errno.EIO, "Input/output error")
        return honest(path)

    monkeypatch.setattr(atomic_folder, "sha256_file", fail)
    for resume in ("auto", str(second)):
        with pytest.raises(UserError, match="step-00000020/.* cannot be read: Input/output error") as caught:
            checkpoint.find_checkpoint(tmp_path, resume)
        assert caught.value.exit_code == SAVE
    assert checkpoint.find_checkpoint(tmp_path, str(first)) == (first, [])


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    two_checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir"):  # pathlib's glob would take it for empty
            patch.setattr(os, name, refuse)
        with pytest.raises(UserError, match="cannot be read: Permission denied") as caught:
            checkpoint.find_checkpoint(tmp_path, "auto")
    assert caught.value.exit_code == SAVE


def test_a_folder_under_another_step_s_name_is_passed_over(tmp_path):
    first, second = two_checkpoints(tmp_path)
    shutil.copytree(first, tmp_path / "step-00000030")
    found, [(skipped, reason)] = checkpoint.find_checkpoint(tmp_path, "auto")
    assert found == second and skipped.name == "step-00000030" and reason == "it was written as step 10"
    # but a path that the user gives may have any name
    shutil.copytree(first, tmp_path / "best")
    assert checkpoint.find_checkpoint(tmp_path, tmp_path / "best") == (tmp_path / "best", [])


def test_a_path_that_is_no_checkpoint_is_a_user_error(tmp_path):
    first, _ = two_checkpoints(tmp_path)
    with pytest.raises(UserError, match="no such folder") as error:
        checkpoint.find_checkpoint(tmp_path, tmp_path / "step-00000015")
    assert error.value.exit_code == CONFIG and str(first) in error.value.hint
    with atomic_folder.atomic_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no optimizer.safetensors"):
        checkpoint.find_checkpoint(tmp_path, tmp_path / "model")


# ------------------------------------------------------------------------------------------------- crashes


def record_crashes(monkeypatch, folder: Path, snapshots: Path, action) -> list[str]:
    """Run `action` and keep a copy of `folder` after every file operation: what a SIGKILL there would leave.

    Beside each copy a second one in which every file that was not yet fsynced is empty: what a power cut might leave.
    """
    log, synced = [], {p.stat().st_ino for p in folder.rglob("*")}

    def snapshot(name: str) -> None:
        killed, cut = snapshots / f"{len(log):03d}-killed", snapshots / f"{len(log):03d}-power-cut"
        shutil.copytree(folder, killed)
        shutil.copytree(folder, cut)
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_ino not in synced:
                (cut / path.relative_to(folder)).write_bytes(b"")
        log.append(name)

    def recording(name, function):
        def wrapped(*args, **kwargs):
            nonlocal copying
            if copying:  # the copies must not record themselves
                return function(*args, **kwargs)
            copying = True
            snapshot(f"before {name}")
            result = function(*args, **kwargs)
            if name == "fsync":
                synced.add(os.fstat(args[0]).st_ino)
            snapshot(name)
            copying = False
            return result

        return wrapped

    copying = False
    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "chmod"):
            patch.setattr(os, name, recording(name, getattr(os, name)))
        action()
    return log


def test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    """Every prefix of a save that replaces the only checkpoint (keep = 1), after a kill and after a power cut."""
    folder, snapshots = tmp_path / "checkpoints", tmp_path / "snapshots"
    model, opt = make()
    train(model, opt)
    save(folder, 10, model, opt)
    old = everything(model, opt)
    train(model, opt)
    new = everything(model, opt)
    log = record_crashes(monkeypatch, folder, snapshots, lambda: save(folder, 20, model, opt, keep=1))
    assert [p.name for p in folder.iterdir()] == ["step-00000020"]
    assert log.count("rename") == 2 and log.count("fsync") >= 9 and "unlink" in log  # it did record a whole save

    outcomes = []
    for crashed in sorted(snapshots.iterdir()):
        atomic_folder.remove_leftovers(crashed, locked=True)  # as a start does
        path, _ = checkpoint.find_checkpoint(crashed, "auto")
        assert path is not None, crashed.name
        other, other_opt = make(seed=1)
        state = load(path, other, other_opt)
        assert everything(other, other_opt) == {10: old, 20: new}[state["step"]], crashed.name
        outcomes.append(state["step"])
        assert {p.name for p in crashed.iterdir()} <= {"step-00000010", "step-00000020"}
    assert outcomes == sorted(outcomes) and set(outcomes) == {10, 20}


def test_a_save_passes_the_crash_points_of_the_table_in_its_order(tmp_path, monkeypatch):
    """It replaces a checkpoint, renames a later one and deletes an old one."""
    table, passed = re.findall(r"(?m)^ +(FOLDER .*?)  ", atomic_folder.crash_point.__doc__), []
    for module in (atomic_folder, checkpoint):
        monkeypatch.setattr(module, "crash_point", passed.append)
    model, opt = make()
    for step in (10, 20, 30):
        save(tmp_path, step, model, opt)
    passed.clear()
    save(tmp_path, 20, model, opt, keep=1)
    without_files = [re.sub(r"fsync \S+[.]\S+", "fsync FILE", point) for point in passed]
    points = dict.fromkeys(re.sub(r"step-\d+", "FOLDER", point) for point in without_files)
    assert list(points) == table


def test_a_full_disk_at_any_operation_keeps_the_old_checkpoint(tmp_path, monkeypatch, capsys):
    model, opt = make()
    save(tmp_path, 10, model, opt)
    before = {p: p.read_bytes() for p in (tmp_path / "step-00000010").iterdir()}
    real, left = os.fsync, 0

    def fsync(fd):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    for operation in range(1, 8):  # trainer_state.json as it is written, five files, the manifest ...
        left = operation
        failures = save(tmp_path, 20, model, opt, keep=1, failures=0)
        assert failures == 1 and "step 20 could not be saved: [Errno 28]" in capsys.readouterr().err
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000010"]
    assert {p: p.read_bytes() for p in (tmp_path / "step-00000010").iterdir()} == before
    assert save(tmp_path, 20, model, opt, keep=1, failures=1) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000020"]


def test_a_file_size_limit_fails_loudly_and_the_third_in_a_row_ends_the_run(tmp_path, capsys):
    """The disk refuses at a real write call, inside safetensors too: Python ignores SIGXFSZ and gets EFBIG."""
    model, opt = make()
    train(model, opt)
    save(tmp_path, 1, model, opt)
    failures, results = 0, []
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for size in (
            0,
            1,
            100,
            400,
            700,
            1000,
        ):  # bytes a file may have; the weights need about 600, the optimizer 1600
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, old_limit[1]))
            try:
                failures = save(tmp_path, 2, model, opt, keep=1, failures=failures)
                results.append(failures)
            except UserError as error:
                results.append(error.exit_code)
                failures = 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    assert results == [1, 2, SAVE, 1, 2, SAVE]
    assert capsys.readouterr().err.count("WARNING the checkpoint of step 2 could not be saved") == 4
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert atomic_folder.verify_folder(tmp_path / "step-00000001") is None
    assert save(tmp_path, 2, model, opt, failures=2) == 0  # there is room again


@pytest.mark.parametrize(
    "number, remedy", [(errno.EACCES, "permissions"), (errno.EIO, "disk"), (errno.ENOSPC, "free some space")]
)
def test_a_last_save_that_fails_ends_the_run(tmp_path, number, remedy):
    def write_model(path):
        raise OSError(number, os.strerror(number))

    model, opt = make()
    last = MAX_FAILED_SAVES - 1
    with pytest.raises(UserError, match="step 5 could not be saved") as error:
        save(tmp_path, 5, model, opt, failures=last, write_model=write_model)
    assert error.value.exit_code == SAVE and str(tmp_path) in error.value.hint and remedy in error.value.hint
    assert (number == errno.ENOSPC) == ("free some space" in error.value.hint)


@pytest.mark.parametrize("sharing", [2, 4])
def test_the_bytes_of_a_sharded_model_are_those_of_the_whole_one(sharing):
    """Also where replicas have the same rows: each group of `sharing` ranks has the state once, and it is written once."""
    model, _ = make()
    cut = nn.Parameter(model[0].weight.detach()[: 8 // sharing].clone())
    cut.cut = Cut(model[0].weight.shape, None, 0, sharing)
    bytes_of = [checkpoint.checkpoint_bytes(model, torch.optim.AdamW([p])) for p in (model[0].weight, cut)]
    assert bytes_of[0] == bytes_of[1] == sum(p.nbytes for p in model.parameters()) + 2 * model[0].weight.nbytes


def test_too_little_space_is_refused_before_a_save(tmp_path, monkeypatch):
    model, opt = make()
    size = checkpoint.checkpoint_bytes(model, opt)
    assert size == 3 * sum(p.nbytes for p in model.parameters())  # fp32 weights and two fp32 moments
    train(model, opt)
    assert size <= checkpoint.checkpoint_bytes(model, opt) <= size + 4 * 4  # and four step counters
    save(tmp_path, 1, model, opt)

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size // 2))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, model, opt)
    with pytest.raises(UserError, match="No space left .*; 7[0-9][0-9] bytes needed, 3[0-9][0-9] bytes free"):
        save(tmp_path, 2, model, opt, failures=MAX_FAILED_SAVES - 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    needed = checkpoint.checkpoint_bytes(model, opt)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, model, opt, other_bytes=1)
    save(tmp_path, 2, model, opt)  # as much as is needed is enough


@pytest.mark.parametrize("keep", [None, 1, 3])
def test_the_most_checkpoints_at_once_are_those_that_a_run_has(tmp_path, keep):
    model, opt = make()
    for existing, coming in [(0, 0), (0, 1), (0, 2), (0, 5), (1, 1), (1, 4), (3, 1), (3, 2), (4, 1), (4, 3)]:
        folder, most = tmp_path / f"{existing}-{coming}", 0

        def write_model(path):
            nonlocal most
            most = max(most, len(list(path.parent.iterdir())))  # with the one that is being written

        for step in range(existing):
            save(folder, step, model, opt)
        for step in range(existing, existing + coming):
            save(folder, step, model, opt, keep=keep, write_model=write_model)
        assert checkpoint.most_at_once(existing, coming, keep) == (most - existing if coming else 0)


@pytest.mark.parametrize(
    "name, dtype",
    [*((name, torch.float32) for name in OPTIMIZERS), *((name, torch.bfloat16) for name in ADAMW)],
    ids=str,
)
def test_the_space_asked_for_at_the_start_is_what_a_checkpoint_takes(tmp_path, dtype, name):
    """Weights in bf16 have moments in fp32."""
    model = nn.Sequential(nn.Linear(64, 65), nn.Linear(65, 2)).to(dtype)  # 4,160 numbers are enough for 8 bits
    options = {"peak_lr": 0.1, "weight_decay": 0.0, "embedding": False}
    groups = [{"params": [p for p in model.parameters() if (p.dim() == 2) == is_matrix], "matrices": is_matrix, **options}
              for is_matrix in (True, False)]  # fmt: skip
    opt = build_optimizer(name, groups, betas=(0.9, 0.99), eps=1e-8)
    at_the_start = checkpoint.checkpoint_bytes(model, opt)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    path = save(tmp_path, 1, model, opt)
    files = [load_file(path / name) for name in ("model.safetensors", "optimizer.safetensors")]
    tensors = sum(tensor.nbytes for file in files for tensor in file.values())
    assert tensors == checkpoint.checkpoint_bytes(model, opt)
    counters = {key: v for key, v in files[1].items() if v.ndim == 0}
    assert tensors == at_the_start + sum(counter.nbytes for counter in counters.values())


# ------------------------------------------------------------------------------------------------- retention


@settings(max_examples=20, deadline=None)
@given(
    keep=st.integers(1, 4),
    events=st.lists(
        st.sampled_from(["save", "save", "fail", "kill", "damage", "best", "pin", "foreign", "link"]), max_size=10
    ),
)
def test_retention_keeps_the_newest_whole_ones_and_touches_nothing_else(keep, events):
    model, opt = make()
    with tempfile.TemporaryDirectory() as name:
        folder, elsewhere = Path(name) / "checkpoints", Path(name) / "elsewhere"
        newest = save(folder, 1, model, opt)
        whole, pinned, by_hand, others = [newest], set(), set(), set()  # others: damaged, foreign, linked
        for step, event in enumerate(events, start=2):
            path = folder / f"step-{step:08d}"
            if event == "save":
                newest = save(folder, step, model, opt, keep=keep, pinned=pinned)
                whole.append(newest)
                whole = [p for p in whole if p in whole[-keep:] or p in pinned | by_hand]
            elif event == "fail":
                with pytest.raises(OSError):
                    save(folder, step, model, opt, keep=keep, write_model=lambda path: os.stat(path / "no such file"))
            elif event == "kill":
                (folder / f".tmp-step-{step:08d}-{atomic_folder.HOST}-1-0123abcd").mkdir()
            elif event == "best":
                pinned.add(whole[-1])
            elif event == "pin":  # by hand
                (whole[-1] / "keep").touch()
                by_hand.add(whole[-1])
            elif event == "damage" and len(whole) > 1 and whole[0] not in pinned | by_hand:
                (whole[0] / "optimizer.safetensors").unlink()
                others.add(whole.pop(0))
            elif event == "foreign":
                path.mkdir()
                (path / "notes.txt").write_text("mine")
                others.add(path)
            elif event == "link":
                newest = path
                path.symlink_to(save(elsewhere, step, model, opt))
                others.add(path)
            assert [p for p in checkpoint.checkpoints(folder) if not p.is_symlink()] == whole
            assert all(os.path.lexists(p) for p in others)
            assert checkpoint.find_checkpoint(folder, "auto")[0] == newest
        assert all(atomic_folder.verify_folder(p) is None for p in elsewhere.glob("*"))


def test_a_pinned_checkpoint_is_verified_like_any_other_and_goes_once_it_is_unpinned(tmp_path):
    model, opt = make()
    first = save(tmp_path, 1, model, opt)
    (first / "keep").write_text("the one before the spike\n")
    for step in (2, 3):
        save(tmp_path, step, model, opt, keep=1)
    assert checkpoint.checkpoints(tmp_path) == [first, tmp_path / "step-00000003"]
    assert checkpoint.find_checkpoint(tmp_path, str(first)) == (first, [])
    damage(first)
    with pytest.raises(UserError, match="does not have the sha256"):
        checkpoint.find_checkpoint(tmp_path, str(first))
    damage(first)  # the same bit again
    (first / "keep").unlink()
    save(tmp_path, 4, model, opt, keep=1)
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "step-00000004"]


def test_an_older_checkpoint_that_cannot_be_read_does_not_end_a_run_at_its_save(tmp_path, monkeypatch, capsys):
    model, opt = make()
    first = save(tmp_path, 1, model, opt)
    honest = os.stat

    def fail(path, *arguments, **options):
        if Path(str(path)).parent == first:
            raise OSError(errno.ESTALE, "Stale file handle")
        return honest(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        assert save(tmp_path, 2, model, opt, keep=1, failures=0) == 0
    assert "left as they are" in (said := capsys.readouterr().err) and "Stale file handle" in said
    assert len(checkpoint.checkpoints(tmp_path)) == 2
    save(tmp_path, 3, model, opt, keep=1)
    assert len(checkpoint.checkpoints(tmp_path)) == 1


def test_keep_none_keeps_all(tmp_path):
    model, opt = make()
    for step in range(1, 6):
        save(tmp_path, step, model, opt, keep=None)
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    model, opt = make()
    save(tmp_path, 1, model, opt)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "remove_folder", refuse)
    save(tmp_path, 2, model, opt, keep=1)
    assert "could not be deleted" in capsys.readouterr().err and len(checkpoint.checkpoints(tmp_path)) == 2


def test_starting_over_moves_the_other_run_s_later_checkpoints_out_of_sight(tmp_path, capsys):
    model, opt = make()
    for step in (10, 20, 30):
        save(tmp_path, step, model, opt, keep=3)
    train(model, opt)
    save(tmp_path, 20, model, opt, keep=3)  # resumed from 10, and saved 20 again
    names = ["step-00000010", "step-00000020", "step-00000020.replaced-1", "step-00000030.replaced-1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names and "renamed" in capsys.readouterr().err
    assert checkpoint.find_checkpoint(tmp_path, "auto") == (tmp_path / "step-00000020", [])
    assert [atomic_folder.verify_folder(tmp_path / name) for name in names] == [None] * 4
    save(tmp_path, 20, model, opt, keep=1)
    assert (tmp_path / "step-00000020.replaced-2").is_dir()


def test_nothing_in_a_checkpoint_is_pickled_and_a_pickle_in_it_is_ignored(tmp_path, monkeypatch):
    model, opt = make()
    train(model, opt)
    path = save(tmp_path, 1, model, opt)
    assert {p.suffix for p in path.iterdir()} == {".safetensors", ".json"}
    torch.save({"hostile": 1}, path / "pytorch_model.bin")

    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("torch.load", refuse)
    found, _ = checkpoint.find_checkpoint(tmp_path, "auto")
    assert load(found, model, opt)["step"] == 1
