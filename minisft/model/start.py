"""Where a run starts: what `model.model_name_or_path` may name.

    owner/name       a repository of the hub
    a model folder   config.json and weights, Hugging Face's or ours
    an adapter       adapter_config.json, PEFT's or ours: the run starts from the base that it names, with this adapter
    a run's output   the folder `model` in it, which is one of the two

A folder that a run wrote has a manifest, from which one hash of its contents is made. A run that starts there records the
hash in its checkpoints: resuming from another starting model would mix two runs, and is refused. An adapter records that of its
base, and is refused beside another one.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minisft import hub
from minisft.atomic_folder import MANIFEST, contents_id
from minisft.errors import MODEL, UserError
from minisft.model.adapter_files import CONFIG_FILE, base_of, least_vocab_size, load_adapter, model_folder
from minisft.model.decoder import Decoder
from minisft.model.load import load_model, read_object
from minisft.model.quantized import read_record

RECORDS = (MANIFEST, "trainer_state.json")  # of an exported adapter, of a checkpoint: they have the hash of the base


@dataclass(frozen=True)
class Start:
    """The model that a run starts from, and the adapter on it."""

    name: str  # of the model without the adapter: its repository, or its folder
    revision: str | None
    folder: Path  # with config.json and the weights
    commit: str | None  # of a repository
    id: str | None  # changes whenever the starting weights do; None if that is not known
    base_id: str | None = None  # the same of the model without the adapter, in a folder that a run wrote
    adapter: Path | None = None  # its folder


def find_start(path_or_repo: str | Path, revision: str | None = None, *, local_files_only: bool = False) -> Start:
    """Download what is missing. Raises UserError (exit code MODEL) if there is no model, or an adapter's base is missing."""
    folder, commit = hub.resolve(path_or_repo, revision, "model", local_files_only=local_files_only)
    if commit is not None:
        return Start(str(path_or_repo), revision, folder, commit, commit)
    folder = model_folder(folder)
    if not is_adapter(folder):
        found = contents_id(folder)
        return Start(str(folder), None, folder, None, found, base_id=found)
    return _with_base(folder, local_files_only=local_files_only)


def _with_base(folder: Path, *, local_files_only: bool = False) -> Start:
    """An adapter's folder, and the base that it names. Raises UserError (exit code MODEL) if the base is missing, or is not the
    one that the adapter was trained on."""
    base, base_revision = base_of(folder)
    if os.path.isdir(found := os.path.expanduser(base)) and is_adapter(model_folder(Path(found))):
        hint = "merge that one first (minisft export --merge), and train an adapter beside the merged model"
        raise UserError(f"{folder / CONFIG_FILE}: the base {base} is an adapter itself", hint=hint, exit_code=MODEL)
    try:
        start = find_start(base, base_revision, local_files_only=local_files_only)
    except UserError as error:
        raise _without_base(folder, base, error.message) from None
    trained_on = [read_object(path).get("base") for name in RECORDS if (path := folder / name).exists()]
    if start.base_id and any(id not in (None, start.base_id) for id in trained_on):
        hint = "put that base back (a run that writes its model anew keeps the earlier one beside it), or train the adapter again"
        problem = "it is not the model that this adapter was trained on any more"
        raise UserError(f"{folder / CONFIG_FILE} names the base model {base}: {problem}", hint=hint, exit_code=MODEL)
    return replace(start, adapter=folder, id=contents_id(folder))


def load_adapted(folder: Path | str, *, device: torch.device | str = "cpu", max_length: int | None = None) -> Decoder:
    """The base model that an adapter folder names, quantised as its record says, with the adapter, in eval mode.

    Raises UserError (exit code MODEL) if the folder names no base, and as find_start, load_model and load_adapter do.
    """
    folder = Path(folder)
    model = load_model(
        _with_base(folder).folder,
        device=device,
        max_length=max_length,
        quantization=read_record(folder),
        least_vocab_size=least_vocab_size(folder),
    )
    return load_adapter(model, folder).eval()


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() and not (folder / "config.json").exists()


def _without_base(folder: Path, base: str, problem: str) -> UserError:
    """The error for an adapter whose base is not found."""
    hint = "an adapter needs its base: put it back, or correct base_model_name_or_path there"
    return UserError(f"{folder / CONFIG_FILE} names the base model {base}: {problem}", hint=hint, exit_code=MODEL)


def tokenizer_source(path_or_repo: str, revision: str | None) -> tuple[str, str | None]:
    """(path or repository, revision) of a model's tokenizer. An adapter that came without one uses that of its base.
    Downloads nothing. Raises UserError (exit code MODEL) if that base is neither a folder nor a repository's name."""
    folder = Path(os.path.expanduser(path_or_repo))
    if not folder.is_dir() or (folder / "tokenizer.json").exists():
        return path_or_repo, revision
    folder = model_folder(folder)
    if is_adapter(folder) and not (folder / "tokenizer.json").exists():
        base, base_revision = base_of(folder)
        if not os.path.isdir(os.path.expanduser(base)) and not hub.is_repository_name(base):
            raise _without_base(folder, base, "there is no such folder")
        return base, base_revision
    return str(folder), revision
