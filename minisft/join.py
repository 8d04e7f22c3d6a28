"""A checkpoint as the model that the run would have exported at that step, byte for byte, whatever number of ranks wrote it.

No process group is needed: the rows of all ranks are files (model/row_files.py). The model is read and written tensor by tensor,
so memory is that of the largest one.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from minisft.atomic_folder import atomic_folder, read_manifest
from minisft.checkpoint import find_checkpoint
from minisft.config.load import RESOLVED_NAME, fingerprint, load
from minisft.data.tokenizer import load_tokenizer
from minisft.errors import MODEL, UserError
from minisft.export import export_dtype, has_form, model_bytes, room_for, write_whole
from minisft.model.decoder import Decoder
from minisft.model.load import build_model, read_config, read_object, weights_reader
from minisft.model.model_config import with_vocab_size
from minisft.model.row_files import read_rows
from minisft.model.start import find_start
from minisft.optimizers import mean_of
from minisft.runtime import DTYPES
from minisft.strict_json import read_json


def join(run: Path, out: Path, dtype: str | None) -> list[str]:
    """Write the model of a checkpoint, of a run's folder that of the newest whole one. Returns lines for the user."""
    is_output = (run / "checkpoints").is_dir()
    path, skipped = find_checkpoint(run / "checkpoints", "auto" if is_output else str(run))
    lines = [f"skipped {path}: {reason}" for path, reason in skipped]
    if path is None or not (path / "trainer_state.json").exists():
        raise UserError(f"{run} holds no checkpoint", hint="name <output_dir>, or a folder in <output_dir>/checkpoints")
    if not (path / "config.json").exists():
        hint = f"an adapter is there in PEFT's form already: use that folder as it is, or export {path} --merge"
        raise UserError(f"{path} holds no whole model", hint=hint, exit_code=MODEL)
    state, source, written_as = read_json(path / "trainer_state.json"), None, None
    asked = {"step": state["step"], "checkpoint": read_manifest(path)["sha256"], **state.get("prompting", {})}
    output = run if is_output else path.absolute().parent.parent
    if (output / RESOLVED_NAME).exists():
        config, _ = load(output / RESOLVED_NAME, {"output_dir": str(output)}, origin="command line")
        written_as, asked["config"] = export_dtype(config), fingerprint(config)
        if config.model.model_name_or_path:
            start = find_start(config.model.model_name_or_path, config.model.revision)
            if state.get("started_from") not in (None, start.id):
                raise UserError(
                    f"{start.folder} is not the model that this run started from any more",
                    hint="put it back: the exported model keeps its form, and tensors that have not changed",
                    exit_code=MODEL,
                )
            source, asked["started_from"] = start.folder, start.id
    else:
        lines.append(f"no {RESOLVED_NAME} in {output}: the form of the starting model is not known")

    written = read_config(path, max_length=asked.get("max_length"))
    if has_form(source):  # which may have fewer tokens
        written = with_vocab_size(read_config(source, max_length=asked.get("max_length")), written.vocab_size)
    model = build_model(written)
    model.gather = weights_reader(model, path)
    written_as = DTYPES[dtype] if dtype else written_as or model.gather("norm.weight").dtype
    model.gather = exported_weights(model.gather, path)
    if (path / "generation_config.json").exists():
        model.generation_config = read_object(path / "generation_config.json")
    tokenizer = load_tokenizer(path)
    with room_for(out, model_bytes(model, tokenizer, written_as, source)), atomic_folder(out, asked) as temporary:
        lines += write_whole(model, tokenizer, temporary, written_as, source)
    return [*lines, f"{path}, in {str(written_as).removeprefix('torch.')}"]


def exported_weights(read: Callable[[str], Tensor], folder: Path) -> Callable[[str], Tensor]:
    """What a run exports of the weights that `read` has of a checkpoint: those themselves, or with schedule-free AdamW, which
    trains y, the mean x."""
    state = read_json(folder / "trainer_state.json")
    if state.get("optim") != "schedule_free_adamw":
        return read
    moments, _ = read_rows(folder, "optimizer")
    b1 = float(state["config"]["train.adam_beta1"])
    return lambda name: mean_of(read(name), moments[f"{name}.z"][:], b1) if f"{name}.z" in moments else read(name)


def use_exported_weights(model: Decoder, folder: Path) -> None:
    """Give a model, or an adapter, that was loaded from a folder the weights that its run exports, if that is a checkpoint."""
    if not (folder / "trainer_state.json").exists():
        return

    def loaded(name: str) -> Tensor:
        return model.get_parameter(name).detach().cpu()

    weights = exported_weights(loaded, folder)
    for name, parameter in model.named_parameters() if weights is not loaded else ():
        parameter.data.copy_(weights(name))
