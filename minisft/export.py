"""The trained model in the output folder, as Hugging Face files: exported whole, once a run is done."""

from pathlib import Path

import torch
from safetensors import SafetensorError

from minisft.atomic_folder import atomic_folder, read_manifest, verify_folder
from minisft.checkpoint import name_aside
from minisft.console import wrap
from minisft.data.tokenizer import Tokenizer
from minisft.errors import SAVE, UserError
from minisft.generation import stop_ids
from minisft.model.adapter_files import load_adapter_weights, save_adapter
from minisft.model.decoder import Decoder
from minisft.model.drop_in import copy_other_files, save_like
from minisft.model.load import load_weights
from minisft.model.quantized import quantization_of, read_record
from minisft.model.save import save_model
from minisft.prepare.data import titled
from minisft.prepare.run import Run
from minisft.strict_json import write_json


def write_model(run: Run, folder: Path, dtype: torch.dtype | None = None, source: Path | None = None) -> list[str]:
    """The model, or its adapter where it has one, and its tokenizer, as Hugging Face and PEFT files.

    source: the folder that the model came from, for an exported model, which keeps its form (drop_in.py). The written
    generation_config lists every token that ended an answer in the training data: it is often not the base model's EOS, and
    a server without it would never stop. Returns lines for the user.
    """
    stops = stop_ids(run.model, run.tokenizer)
    run.model.generation_config |= {"eos_token_id": sorted(stops)} if stops else {}
    if run.model.lora is None:
        return write_whole(run.model, run.tokenizer, folder, dtype or run.model.head_weight.dtype, source)
    save_adapter(run.model, folder, base=run.start.name, revision=run.start.revision)
    write_json(folder / "generation_config.json", run.model.generation_config)
    run.tokenizer.save(folder)
    return []


def write_whole(
    model: Decoder, tokenizer: Tokenizer | None, folder: Path, dtype: torch.dtype, source: Path | None
) -> list[str]:
    """A model without adapters, and its tokenizer where it has one; in the form of `source` if that is a folder. Returns lines
    for the user."""
    lines = []
    if source is not None and source.is_dir():  # a GGUF file has no form to keep
        lines = save_like(model, source, folder, dtype)
    else:
        save_model(model, folder, dtype=dtype)
    if tokenizer is not None:
        tokenizer.save(folder)
    if source is not None and source.is_dir():
        copy_other_files(source, folder)
    return lines


def write_state(run: Run, folder: Path) -> None:
    """The model as a checkpoint needs it, and the reference where it moves."""
    write_model(run, folder)
    if run.reference is not None:
        run.reference.save(folder)


def read_model(model: Decoder, folder: Path) -> None:
    """Fill the model, or its adapter where it has one, from what `write_model` wrote."""
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


def export_model(run: Run, folder: Path, dtype: torch.dtype, config_id: str) -> None:
    """Write folder/model. Its manifest names its origin: the fingerprint of the configuration and the starting model.

    An earlier export there is moved aside, not deleted, and this is printed. Raises UserError where the disk refuses.
    """
    path = folder / "model"
    aside = name_aside(path)
    made_by = {"config": config_id, "started_from": run.start.id if run.start else None}
    manifest = {"step": run.progress.step, "checkpoint": checkpoint_id(run, folder), **made_by, **run.prompting}
    source = run.start.folder if run.start else None
    try:
        with atomic_folder(path, manifest, move_existing_to=aside) as temporary:
            lines = write_model(run, temporary, dtype, source)
    except (OSError, SafetensorError) as error:
        hint = "nothing is lost: the last checkpoint has all steps. Free some space and give the same command again"
        raise UserError(f"the model could not be written: {error}", hint=hint, exit_code=SAVE) from error
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
    path = folder / "checkpoints" / f"step-{run.progress.step:08d}"
    return read_manifest(path)["sha256"] if path.exists() else None
