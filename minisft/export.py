"""The trained model in the output folder, as Hugging Face files: exported whole, once a run is done. And how much room a run
needs for it and for its checkpoints.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

import torch
from safetensors import SafetensorError

from minisft import ranks
from minisft.atomic_folder import atomic_folder, not_written, read_manifest, remedy, require_space, verify_folder
from minisft.card import write_card
from minisft.checkpoint import (
    Contents,
    checkpoint_bytes,
    checkpoints,
    is_pinned,
    most_at_once,
    name_aside,
    optimizer_file,
    row_contents,
    step_folder,
    step_of,
)
from minisft.config.load import fingerprint
from minisft.config.sections import Config
from minisft.console import wrap
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.generation import stop_ids
from minisft.log_files import read_metrics
from minisft.model.adapter_files import adapter_file, adapter_tensors, load_adapter_weights, save_adapter_config
from minisft.model.decoder import Decoder
from minisft.model.drop_in import copied_bytes, copy_other_files, save_like
from minisft.model.load import load_weights
from minisft.model.quantized import quantization_of, read_record
from minisft.model.row_files import lies_in_rows
from minisft.model.save import model_files, save_model, save_rest
from minisft.parallel import is_sharded
from minisft.parts import shape_of
from minisft.prepare.data import titled
from minisft.prepare.run import Run
from minisft.runtime import DTYPES
from minisft.strict_json import write_json
from minisft.units import size


def write_model(run: Run, folder: Path, dtype: torch.dtype, source: Path | None) -> list[str]:
    """The model, or its adapter where it has one, and its tokenizer, as Hugging Face and PEFT files.

    source: the folder that the model came from, whose form it keeps (drop_in.py). Returns lines for the user.
    """
    note_stops(run)
    if run.model.lora is None:
        return write_whole(run.model, run.tokenizer, folder, dtype, source)
    adapter_file(run.model).write(folder)
    _write_beside_adapter(run, folder)
    return []


def note_stops(run: Run) -> None:
    """The written generation_config lists every token that ended an answer in the training data: it is often not the base model's
    EOS, and a server without it would never stop."""
    stops = stop_ids(run.model, run.tokenizer)
    run.model.generation_config |= {"eos_token_id": sorted(stops)} if stops else {}


def _write_beside_adapter(run: Run, folder: Path) -> None:
    save_adapter_config(run.model, folder, base=run.start.name, revision=run.start.revision)
    write_json(folder / "generation_config.json", run.model.generation_config)
    run.tokenizer.save(folder)


def write_whole(
    model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: torch.dtype, source: Path | None
) -> list[str]:
    """A model without adapters, and its tokenizer where it has one; in the form of `source` if it has one. Returns lines for the
    user."""
    lines = []
    if has_form(source):
        lines = save_like(model, source, folder, dtype)
    else:
        save_model(model, folder, dtype=dtype)
    if tokenizer is not None:
        tokenizer.save(folder)
    if has_form(source):
        copy_other_files(source, folder)
    return lines


def has_form(source: Path | None) -> TypeGuard[Path]:
    """Whether a model can be written like this one: a GGUF file and a checkpoint by rows have no form to keep."""
    return source is not None and source.is_dir() and not lies_in_rows(source)


def checkpoint_contents(run: Run, state: dict) -> Contents:
    """What this rank writes of a checkpoint. state: of trainer_state.json. The files refer to the tensors as they are."""
    model, is_first, reference = run.model, ranks.rank() == 0, run.reference
    copies = reference.copies if reference is not None and reference.sync_steps else {}
    if writes_rows(model):
        contents, weight_map = row_contents(model, run.optimizer, copies), {}
    elif not is_first:
        return Contents([], [])
    elif model.lora is None:
        files = list(model_files(model))
        weight_map = {entry.name: file.name for file in files for entry in file.entries}
        contents = Contents(files, [optimizer_file(model, run.optimizer)])
    else:
        contents, weight_map = Contents([adapter_file(model)], [optimizer_file(model, run.optimizer)]), {}
    if not is_first:
        return contents
    note_stops(run)

    def write_rest(folder: Path) -> None:
        if model.lora is not None:
            return _write_beside_adapter(run, folder)
        save_rest(model, folder, weight_map)
        run.tokenizer.save(folder)

    files = contents.model + (reference.files() if copies and not writes_rows(model) else [])
    return replace(contents, model=files, write_rest=write_rest, state=state)


def writes_rows(model: Decoder) -> bool:
    """Whether every rank writes its rows of a checkpoint. An adapter is on all ranks, and the first one writes it."""
    return is_sharded(model) and model.lora is None


def read_model(model: Decoder, folder: Path) -> None:
    """Fill the model, or its adapter where it has one, from a checkpoint."""
    if model.lora is None:
        load_weights(model, folder)
    else:
        was, now = read_record(folder), quantization_of(model)
        if was != now:
            raise UserError(
                f"{folder} belongs to a base that was {was or 'not quantised'}; now it is {now or 'not quantised'}",
                hint="go back to the load_in_4bit and load_in_8bit of that run, or choose a new output_dir",
            )
        load_adapter_weights(model, folder)


def export_model(config: Config, run: Run, folder: Path) -> None:
    """Write folder/model, with its card. Its manifest names its origin: the fingerprint of the configuration and the starting
    model.

    An earlier export there is moved aside, not deleted, and this is printed. Raises UserError, with what is needed and what
    is free, where the disk refuses.
    """
    path = folder / "model"
    aside = name_aside(path)
    dtype = export_dtype(config)
    made_by = {"config": fingerprint(config), "started_from": run.start.id if run.start else None}
    made_by["base"] = run.start.base_id if run.start and run.model.lora else None
    manifest = {"step": run.progress.step, "checkpoint": checkpoint_id(run, folder), **made_by, **run.prompting}
    source = run.start.folder if run.start else None
    rest = " and give the same command again; nothing is lost, as the last checkpoint has all steps"
    needed = model_bytes(run.model, run.tokenizer, dtype, source)
    with room_for(path, needed, rest=rest), atomic_folder(path, manifest, move_existing_to=aside) as temporary:
        lines = write_model(run, temporary, dtype, source)
        write_card(temporary, config, run, read_metrics(folder / "metrics.jsonl"))
    if lines:
        print(wrap(titled("exported", lines)))
    if aside.exists():
        print(f"the model that was in {path} is kept as {aside.name}")


def is_exported(run: Run, folder: Path) -> bool:
    """Whether folder/model is there and comes from the checkpoint of this step, not from a run before."""
    path = folder / "model"
    whole = verify_folder(path, hashes=False) is None
    return whole and read_manifest(path).get("checkpoint", "") == checkpoint_id(run, folder)


def checkpoint_id(run: Run, folder: Path) -> str | None:
    """The hash that identifies the checkpoint of this step; None where it is not in this folder."""
    path = step_folder(folder / "checkpoints", run.progress.step)
    return read_manifest(path)["sha256"] if path.exists() else None


# ---- room for it ------------------------------------------------------------------------------------------------


@contextmanager
def room_for(path: Path, needed: int, *, rest: str = ", or choose another folder") -> Iterator[None]:
    """Write a model of so many bytes to `path` in this block. Raises UserError (exit code SAVE), with what is needed and what is
    free, where there is too little room for it, and where writing fails. rest: of the hint, behind what to do about the disk."""
    require_space(path.parent, needed, str(path), hint=f"free some space{rest}")
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise not_written(path, error, needed, hint=f"{remedy(str(error))}{rest}") from error


def model_bytes(model: Decoder, tokenizer: Tokenizer | None, dtype: torch.dtype, source: Path | None) -> int:
    """Bytes of the files that `write_model` or `write_whole` writes, but for some JSON."""
    files = tokenizer_bytes(tokenizer)
    if model.lora is not None:
        return files + sum(tensor.nbytes for tensor in adapter_tensors(model).values())
    copied = copied_bytes(source, model.config) if has_form(source) else 0
    return files + copied + sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def tokenizer_bytes(tokenizer: Tokenizer | None) -> int:
    return sum(map(len, tokenizer.files.values())) if tokenizer is not None else 0


def other_bytes(run: Run) -> int:
    """Bytes of a checkpoint besides weights and optimizer state: the tokenizer, and the reference where it moves."""
    copies = run.reference.copies.values() if run.reference is not None and run.reference.sync_steps else ()
    return tokenizer_bytes(run.tokenizer) + sum(shape_of(p).numel() * value.itemsize for p, value in copies)


def export_dtype(config: Config) -> torch.dtype:
    return DTYPES[config.checkpoint.save_dtype or config.train.weights_dtype]


def require_space_for_run(config: Config, run: Run, folder: Path) -> None:
    """Raise UserError (exit code SAVE) before the first step where a later save, or the export, would find the disk full.

    At once there are save_total_limit checkpoints, the best one, and the next while it is written; a short run has fewer. Those
    that exist are replaced one by one, but for pinned ones and those of later steps, which stay.
    """
    step, total = run.progress.step, run.total_steps
    keep = config.checkpoint.save_total_limit + (run.best_metric is not None)
    intervals = [run.save_steps, run.eval_steps if run.best_metric else None]  # every evaluation may be the best
    due = [range(step // every * every + every, total, every)[: keep + 1] for every in intervals if every]
    coming = len({total}.union(*due)) if step < total else 0  # more than keep + 1 would change nothing
    place = folder / "checkpoints"
    replaced = [p for p in checkpoints(place) if step_of(p) <= step and not p.is_symlink() and not is_pinned(p)]
    checkpoint = checkpoint_bytes(run.model, run.optimizer) + other_bytes(run)
    source, dtype = run.start.folder if run.start else None, export_dtype(config)
    is_there = not coming and is_exported(run, folder)
    model = 0 if is_there else model_bytes(run.model, run.tokenizer, dtype, source)

    more = most_at_once(len(replaced), coming, keep)
    at_the_end = max(0, min(len(replaced) + coming, keep) - len(replaced))
    needed = int(1.1 * max(more * checkpoint, at_the_end * checkpoint + model))
    best = ", the best one" if run.best_metric else ""
    what = (
        f"{more} more checkpoints of {size(checkpoint)} each in {folder} (save_total_limit = "
        f"{config.checkpoint.save_total_limit}{best}, and one while it is written) and the model of {size(model)}"
    )
    hint = "free some space, lower checkpoint.save_total_limit, or choose an output_dir on another disk"
    require_space(folder, needed, what, hint=hint)
