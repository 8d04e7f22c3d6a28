"""Checkpoints: everything a run needs to resume as if it had never stopped, written so that a crash cannot spoil it.

    <output_dir>/checkpoints/step-00000010/
        model.safetensors, config.json, tokenizer files   written by `write_model`; transformers loads this folder
                                 (with LoRA adapter_model.safetensors and adapter_config.json, and PEFT loads it)
        optimizer.safetensors    every state tensor as "<parameter name>.<state key>", in its own dtype, bit for bit
        trainer_state.json       the step, and what resume.py adds: number of tokens, data order, loss scale, ...
        manifest.json            every file with size and sha256

Without any one of these, training still seems to resume: without the moments, or with moments in bf16, the first loss
after the resume is exactly right, and the weights drift away over the next steps. So a missing or unknown tensor is an
error.

A save is an atomic folder (atomic_folder.py): the checkpoint of one step, whole, or none. Only safetensors and JSON are ever
read back, so a checkpoint from a stranger cannot run code. A file `keep` that the user puts beside them pins the checkpoint:
it is verified like any other and never deleted. The hyperparameters (learning rate, betas, ...) are not in
it: they come from the configuration and the schedule.
"""

import errno
import itertools
import os
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minisft import ranks
from minisft.atomic_folder import (
    atomic_folder,
    crash_point,
    free_bytes,
    not_read,
    read_manifest,
    remove_folder,
    space,
    verify_folder,
)
from minisft.errors import CONFIG, DATA, SAVE, UserError, warn
from minisft.model.weight_files import entry_of, in_usual_order, write_entries
from minisft.optimizers import state_bytes
from minisft.parallel import is_sharded, part_of, state_here, state_shape, whole_state
from minisft.strict_json import dump_json, parse_json, read_json, write_json

MAX_FAILED_SAVES = 3  # in a row; then the run stops with exit code 74
STEP_FOLDER = re.compile(r"step-(\d{8,})")
KEEP = "keep"  # a file of this name in a checkpoint's folder pins it


# ------------------------------------------------------------------------------------------------- save


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int | None,
    pinned: Collection[Path] = (),
    other_bytes: int = 0,
) -> Path:
    """Write folder/step-XXXXXXXX, then delete all but the newest `keep` checkpoints (None: keep all).

    write_model(path): writes the model (its exact weights) and the tokenizer into the folder `path`.
    state: JSON values, without NaN. pinned: checkpoints never to delete (the best), besides those with a file `keep`.
    other_bytes: of the files that are neither weights nor optimizer state, for the check that all fits.
    Checkpoints of this step or a later one belong to a run that this one replaces (it started over, or from an earlier
    checkpoint): they are renamed to step-XXXXXXXX.replaced-N, out of sight of resume = "auto".
    Raises OSError or SafetensorError when the disk refuses; then all other checkpoints are untouched.
    """
    target = step_folder(folder, step)
    needed = checkpoint_bytes(model, optimizer) + other_bytes
    if free_bytes(folder) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with atomic_folder(target, {"step": step}, move_existing_to=name_aside(target)) as temporary:
        write_model(temporary)
        crash_point(f"{target.name} model")
        _save_optimizer(temporary / "optimizer.safetensors", model, optimizer)
        crash_point(f"{target.name} optimizer")
        write_json(temporary / "trainer_state.json", {"step": step, **state})
        crash_point(f"{target.name} state")

    try:
        for later in [path for path in checkpoints(folder) if step_of(path) > step]:
            aside = later.rename(name_aside(later))
            crash_point(f"{later.name} later aside")
            warn(f"{later} belongs to a run that this one replaces; renamed to {aside.name}")
        _delete_old(folder, keep, pinned)
    except (OSError, UserError) as error:  # this checkpoint is there; the next save looks at the others again
        warn(f"the checkpoints beside {target} were left as they are: {error}")
    return target


def try_save(failures: int, folder: Path, step: int, **arguments) -> int:
    """`save_checkpoint` for a run that a full disk should not end: 0 where it worked, else failures + 1.

    failures: how many saves failed in a row before this one. A failure is printed on stderr and the next save tries
    again; the third in a row raises UserError (exit code SAVE). For the last save of a run, which has no next one to
    retry, pass MAX_FAILED_SAVES - 1.
    """
    try:
        save_checkpoint(folder, step, **arguments)
        return 0
    except (OSError, SafetensorError) as error:
        needed = checkpoint_bytes(arguments["model"], arguments["optimizer"]) + arguments.get("other_bytes", 0)
        message = f"the checkpoint of step {step} could not be saved: {error}; {space(folder, needed)}"
        hint = f"the earlier checkpoints in {folder} are untouched; free some space there and resume"
        if failures + 1 >= MAX_FAILED_SAVES:
            raise UserError(message, hint=hint, exit_code=SAVE) from error
        warn(f"{message}; training continues and the next save tries again")
        return failures + 1


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of one checkpoint: the weights, and the optimizer's state or, before its first step, that which it will have."""
    adapter_only = getattr(model, "lora", None) is not None  # the frozen weights stay where they came from
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    weights = sum(p.nbytes for p in (trained if adapter_only else model.parameters()))
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor))
    return weights + (state or state_bytes(optimizer)) * (ranks.world_size() if is_sharded(model) else 1)


def most_at_once(existing: int, coming: int, keep: int | None) -> int:
    """How many checkpoints more than now the disk must hold at once, when `coming` saves follow on `existing` checkpoints.

    While one is written, the `keep` newest before it are still there (None: all are); it is counted too.
    """
    if coming == 0:
        return 0
    before_the_last = existing + coming - 1
    kept = before_the_last if keep is None else min(before_the_last, keep)
    return max(1, kept + 1 - existing)  # at the first save all that exist are there, also beyond `keep`


# ------------------------------------------------------------------------------------------------- find and load


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is in the folder of all of them."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name; -1 for any other name."""
    match = STEP_FOLDER.fullmatch(path.name)
    return int(match[1]) if match else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that are whole by manifest and sizes, oldest first. Resume checks the hashes too.

    Raises UserError (exit code SAVE) where one cannot be read.
    """
    return [path for path in _step_folders(folder) if _problem(path, hashes=False) is None]


def is_pinned(path: Path) -> bool:
    """Whether the user has put a file `keep` into a checkpoint's folder."""
    return os.path.lexists(path / KEEP)


def find_checkpoint(folder: Path, resume: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Where to resume from: (a checkpoint that verifies, or None; the newer ones that do not, each with the reason).

    resume: "never"; "auto", the newest that verifies; or the path of one, which must verify (UserError otherwise).
    Under "auto" None means that there is no checkpoint at all. Where there are some and none verifies, that is a UserError
    (exit code DATA): a run that starts over by itself costs more than a question. A checkpoint that cannot be read is one
    too (exit code SAVE), because an older one in its place would repeat work that may be there.
    """
    if resume == "never":
        return None, []
    if resume != "auto":
        path = Path(resume)
        if not path.is_dir():
            there = ", ".join(str(p) for p in checkpoints(folder)) or "none"
            raise UserError(f"resume = '{path}': no such folder", hint=f"checkpoints: {there}", exit_code=CONFIG)
        if reason := verify_folder(path) or _missing_parts(path):
            hint = "resume = 'auto' takes the newest checkpoint that verifies"
            raise UserError(f"the checkpoint {path} does not verify: {reason}", hint=hint, exit_code=DATA)
        return path, []
    skipped = []
    for path in reversed(_step_folders(folder)):
        reason = _problem(path)
        if reason is None:
            return path, skipped
        skipped.append((path, reason))
    if skipped:
        reasons = "".join(f"\n  {path.name}: {reason}" for path, reason in skipped)
        raise UserError(
            f"no checkpoint in {folder} verifies, so the run cannot go on:{reasons}",
            hint="put a whole copy of one back; or start over, with resume = 'never' or another output_dir",
            exit_code=DATA,
        )
    return None, []


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    load_model_weights: Callable[[nn.Module, Path], object],
) -> dict:
    """Restore weights and optimizer state in place; return trainer_state.json, with "step".

    `path` comes from find_checkpoint, so its files have been verified. load_model_weights(model, path) copies the
    weights into the model. Raises UserError where the optimizer's parameters are not those of the checkpoint.
    """
    load_model_weights(model, path)
    _load_optimizer(path / "optimizer.safetensors", model, optimizer)
    return read_json(path / "trainer_state.json")


# ------------------------------------------------------------------------------------------------- parts


def _named_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, dict]]:
    """name -> (parameter, its group) for all that the optimizer trains."""
    names = {part_of(parameter): name for name, parameter in model.named_parameters()}
    return {names[p]: (p, group) for group in optimizer.param_groups for p in group["params"]}


def _save_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """State tensors as tensors; the names of all parameters, and state that is not a tensor, as JSON in the header."""
    whole = dict(model.named_parameters())
    entries, others = [], {}
    for name, (parameter, _) in _named_parameters(model, optimizer).items():
        state = optimizer.state.get(parameter, {})
        assert not any("." in key for key in state), "the last dot separates name and key"
        for key, value in state.items():
            if isinstance(value, Tensor):
                shape = state_shape(whole[name], key, value)
                read = partial(whole_state, model, optimizer, name, parameter, key)
                entries.append(entry_of(f"{name}.{key}", value.dtype, shape, read))
        others[name] = {key: v for key, v in state.items() if not isinstance(v, Tensor)}
    write_entries(path, in_usual_order(entries), {"parameters": dump_json(others).decode()})


def _load_optimizer(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    named = _named_parameters(model, optimizer)
    with safe_open(path, framework="pt") as file:
        saved = parse_json((file.metadata() or {}).get("parameters", "").encode(), str(path))
        for word, names in (("lacks", named.keys() - saved.keys()), ("has also", saved.keys() - named.keys())):
            if names:
                few = ", ".join(sorted(names)[:5])
                raise UserError(
                    f"{path} {word} the state of {len(names)} parameters: {few}{' ...' if len(names) > 5 else ''}",
                    hint="resume with the model and the trainable parameters that the checkpoint was made with",
                    exit_code=DATA,
                )
        whole = dict(model.named_parameters())
        optimizer.state.clear()
        for name, others in saved.items():
            if others:
                optimizer.state[named[name][0]].update(others)
        for full_name in file.keys():
            name, key = full_name.rsplit(".", 1)
            parameter, group = named[name]
            value = state_here(whole[name], key, file.get_tensor(full_name))
            # torch's convention: a step counter lives on the CPU unless the optimizer is fused or capturable
            counter = value.ndim == 0 and not (group.get("fused") or group.get("capturable"))
            at_home = counter or group.get("offload")
            value = value.to("cpu" if at_home else parameter.device, copy=True)
            pinned = group.get("offload") and not counter and parameter.is_cuda
            optimizer.state[parameter][key] = value.pin_memory() if pinned else value


def _step_folders(folder: Path) -> list[Path]:
    """Everything named like a checkpoint, oldest first, whole or not. Raises UserError where the folder cannot be read."""
    try:
        names = os.listdir(folder)  # Path.glob finds nothing in a folder that it may not read
    except FileNotFoundError:
        return []
    except OSError as error:
        raise not_read(folder, error) from error
    return sorted((path for path in map(Path(folder).joinpath, names) if step_of(path) >= 0), key=step_of)


def _missing_parts(path: Path) -> str | None:
    files = read_manifest(path)["files"]
    parts = ("optimizer.safetensors", "trainer_state.json")
    missing = [name for name in parts if name not in files]
    return f"it holds no {', '.join(missing)}" if missing else None


def _problem(path: Path, *, hashes: bool = True) -> str | None:
    """None where `path` is the checkpoint that its name says, else what is wrong with it."""
    reason = verify_folder(path, hashes=hashes) or _missing_parts(path)
    if reason is None and (step := read_manifest(path).get("step")) != step_of(path):
        reason = f"it was written as step {step}"
    return reason


def name_aside(path: Path) -> Path:
    """A free name beside `path` for what another folder replaces: <name>.replaced-N."""
    names = (path.with_name(f"{path.name}.replaced-{n}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


def _delete_old(folder: Path, keep: int | None, pinned: Collection[Path]) -> None:
    """Delete whole checkpoints beyond the newest `keep`. Damaged, linked and foreign folders are not counted and stay."""
    if not keep:
        return
    protected = {Path(path).resolve() for path in pinned}
    for path in [path for path in checkpoints(folder) if not path.is_symlink()][:-keep]:
        if path.resolve() in protected or is_pinned(path):
            continue
        try:
            remove_folder(path)
        except (OSError, UserError) as error:
            warn(f"the old checkpoint {path} could not be deleted: {error}")
