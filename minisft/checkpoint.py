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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minisft import ranks
from minisft.atomic_folder import (
    atomic_folder,
    crash_point,
    free_bytes,
    not_read,
    read_manifest,
    remove_folder,
    seal,
    verify_folder,
)
from minisft.errors import CONFIG, DATA, UserError, warn
from minisft.model import row_files
from minisft.model.shards import local, replica_of
from minisft.model.tensor_files import Entry, TensorFile, entry_of, in_usual_order
from minisft.optimizers import OF_BLOCKS, state_bytes
from minisft.parallel import items_here, part_of, state_here
from minisft.strict_json import dump_json, parse_json, read_json, write_json

STEP_FOLDER = re.compile(r"step-(\d{8,})")
KEEP = "keep"  # a file of this name in a checkpoint's folder pins it


# ------------------------------------------------------------------------------------------------- save


@dataclass
class Contents:
    """What a process writes of a checkpoint. Ranks other than the first have only files of tensors, or nothing."""

    model: list[TensorFile]
    optimizer: list[TensorFile]
    write_rest: Callable[[Path], None] | None = None  # the small files beside the model's
    state: dict | None = None  # of trainer_state.json: JSON values, without NaN

    def copied(self, homes: dict[str, Tensor]) -> "Contents":
        """The same with the values of now, as `TensorFile.copied`."""
        copies = ([file.copied(homes) for file in files] for files in (self.model, self.optimizer))
        return replace(self, **dict(zip(("model", "optimizer"), copies)))

    def write(self, folder: Path, name: str) -> dict[str, dict]:
        """Write everything into the temporary folder of the checkpoint `name`; returns the entries of its manifest."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not here: output_dir must be on a disk that all machines share")
        for file in self.model:
            file.write(folder)
        if self.write_rest is not None:
            self.write_rest(folder)
        crash_point(f"{name} model")
        for file in self.optimizer:
            file.write(folder)
        crash_point(f"{name} optimizer")
        if self.state is not None:
            write_json(folder / "trainer_state.json", self.state)
            crash_point(f"{name} state")
        own = {file.name for file in (*self.model, *self.optimizer)}
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if self.state is None:
            paths = [path for path in paths if path.name in own]
        else:
            paths = [path for path in paths if path.name in own or not row_files.NAME.fullmatch(path.name)]
        return {path.relative_to(folder).as_posix(): seal(path, folder, name) for path in paths}


@contextmanager
def new_checkpoint(
    folder: Path, step: int, *, needed: int, keep: int | None, pinned: Collection[Path] = ()
) -> Iterator[tuple[Path, dict[str, dict]]]:
    """Yield a temporary folder for the checkpoint folder/step-XXXXXXXX, and a dict for what `Contents.write` returns. On leaving
    it appears whole, or not at all; then all but the newest `keep` checkpoints are deleted (None: keep all).

    needed: bytes. pinned: checkpoints never to delete (the best), besides those with a file `keep`.
    Checkpoints of this step or a later one belong to a run that this one replaces (it started over, or from an earlier
    checkpoint): they are renamed to step-XXXXXXXX.replaced-N, out of sight of resume = "auto".
    Raises OSError when the disk refuses; then all other checkpoints are untouched.
    """
    target, sealed = step_folder(folder, step), {}
    if free_bytes(folder) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    with atomic_folder(target, {"step": step}, move_existing_to=name_aside(target), sealed=sealed) as temporary:
        yield temporary, sealed

    try:
        for later in [path for path in checkpoints(folder) if step_of(path) > step]:
            aside = later.rename(name_aside(later))
            crash_point(f"{later.name} later aside")
            warn(f"{later} belongs to a run that this one replaces; renamed to {aside.name}")
        _delete_old(folder, keep, pinned)
    except (OSError, UserError) as error:  # this checkpoint is there; the next save looks at the others again
        warn(f"the checkpoints beside {target} were left as they are: {error}")


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of one checkpoint: the weights, and the optimizer's state or, before its first step, that which it will have."""
    adapter_only = getattr(model, "lora", None) is not None  # the frozen weights stay where they came from
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    weights = sum(p.nbytes for p in (trained if adapter_only else model.parameters()))
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor))
    sharing = max((p.cut.size for p in trained if hasattr(p, "cut")), default=1)  # ranks, each with a part of the state
    return weights + (state or state_bytes(optimizer)) * sharing


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
    _load_optimizer(path, model, optimizer)
    return read_json(path / "trainer_state.json")


# ------------------------------------------------------------------------------------------------- parts


def _named_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, dict]]:
    """name -> (parameter, its group) for all that the optimizer trains."""
    names = {part_of(parameter): name for name, parameter in model.named_parameters()}
    return {names[p]: (p, group) for group in optimizer.param_groups for p in group["params"]}


def optimizer_file(model: nn.Module, optimizer: torch.optim.Optimizer) -> TensorFile:
    """State tensors as tensors; the names of all parameters, and state that is not a tensor, as JSON in the header."""
    entries = [
        entry_of(f"{name}.{key}", value.dtype, value.shape, value.detach)
        for name, (p, _) in _named_parameters(model, optimizer).items()
        for key, value in _tensors_of(optimizer, p).items()
    ]
    return TensorFile("optimizer.safetensors", in_usual_order(entries), _other_state(model, optimizer))


def row_contents(
    model: nn.Module, optimizer: torch.optim.Optimizer, copies: Mapping[str, tuple[nn.Parameter, Tensor]]
) -> Contents:
    """What this rank writes of a sharded model: its rows, and a share of what every rank has. Replicas share the work too.

    copies: other values of the parameters, by name (preference/reference.py).
    """
    rank, count = ranks.rank(), ranks.world_size()
    trained = _named_parameters(model, optimizer)
    entries: dict[str, list[Entry]] = {"model": [], "optimizer": [], "reference": []}
    rows: dict[str, dict[str, tuple[int, int]]] = {stem: {} for stem in entries}
    for number, (name, p) in enumerate(model.named_parameters()):
        values: list[tuple[str, str, str | None, Tensor]] = [("model", name, None, local(p))]
        if name in trained:
            state = _tensors_of(optimizer, trained[name][0])
            values += [("optimizer", f"{name}.{key}", key, value) for key, value in state.items()]
        if name in copies:
            values.append(("reference", name, None, copies[name][1]))
        for stem, full_name, key, value in values:
            place = items_here(p, key, value)
            if place is None:
                is_mine = number % count == rank
            else:
                replica, replicas = replica_of(p)
                is_mine = number % replicas == replica and len(value) > 0
            if is_mine:
                entries[stem].append(entry_of(full_name, value.dtype, value.shape, value.detach))
                rows[stem] |= {full_name: place} if place else {}
    files = {stem: row_files.row_file(stem, rank, count, entries[stem], rows[stem]) for stem in ("model", "reference")}
    moments = row_files.row_file(
        "optimizer", rank, count, entries["optimizer"], rows["optimizer"], **_other_state(model, optimizer)
    )
    return Contents([files["model"], *([files["reference"]] if copies else [])], [moments])


def _tensors_of(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    state = {key: value for key, value in optimizer.state.get(p, {}).items() if isinstance(value, Tensor)}
    assert not any("." in key for key in state), "the last dot separates name and key"
    return state


def _other_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The names of all parameters, and state that is not a tensor, for the header."""
    others = {
        name: {key: value for key, value in optimizer.state.get(p, {}).items() if not isinstance(value, Tensor)}
        for name, (p, _) in _named_parameters(model, optimizer).items()
    }
    return {"parameters": dump_json(others).decode()}


def _load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    named = _named_parameters(model, optimizer)
    found, metadata = row_files.read_rows(folder, "optimizer")
    saved = parse_json(metadata.get("parameters", "").encode(), str(folder))
    for word, names in (("lacks", named.keys() - saved.keys()), ("has also", saved.keys() - named.keys())):
        if names:
            few = ", ".join(sorted(names)[:5])
            raise UserError(
                f"{folder} {word} the state of {len(names)} parameters: {few}{' ...' if len(names) > 5 else ''}",
                hint="resume with the model and the trainable parameters that the checkpoint was made with",
                exit_code=DATA,
            )
    whole = dict(model.named_parameters())
    for full_name, rows in found.items():
        name, key = full_name.rsplit(".", 1)
        shape = list(whole[name].shape)
        if len(rows.shape) == len(shape) and key not in OF_BLOCKS and rows.shape != shape:
            raise UserError(  # a fused update would write beyond the end of the state
                f"{folder} has the state of {name} in the shape {rows.shape}, and it is {shape} now",
                hint="resume with the model and the tokens that the checkpoint was made with",
                exit_code=DATA,
            )
    optimizer.state.clear()
    for name, others in saved.items():
        if others:
            optimizer.state[named[name][0]].update(others)
    for full_name, rows in found.items():
        name, key = full_name.rsplit(".", 1)
        parameter, group = named[name]
        value = state_here(whole[name], key, rows)
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
    state = None if "trainer_state.json" in files else "trainer_state.json"
    missing = list(filter(None, (row_files.missing_file(files, "optimizer"), state)))
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
