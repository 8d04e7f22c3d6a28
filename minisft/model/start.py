"""Where a run starts: what `model.model_name_or_path` may name.

    owner/name       a repository of the hub
    a model folder   config.json and weights, Hugging Face's or ours
    an adapter       adapter_config.json, PEFT's or ours: the model is then the base that it names, and the adapter
    a run's output   the folder `model` in it, which is one of the two

A folder that a run wrote has a manifest. Its contents have one hash, which the checkpoints of a run that starts there record:
a run that goes on beside another start than it had would be a run of neither.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from minisft import hub
from minisft.atomic_folder import contents_id
from minisft.errors import MODEL, UserError
from minisft.model.adapter_files import CONFIG_FILE, base_of, model_folder


@dataclass(frozen=True)
class Start:
    """The model that a run starts from, and the adapter on it."""

    name: str  # of the model without the adapter: its repository, or its folder
    revision: str | None
    folder: Path  # with config.json and the weights
    commit: str | None  # of a repository
    id: str | None  # changes whenever what is trained on from here does; None where that is not known
    adapter: Path | None = None  # its folder


def find_start(path_or_repo: str | Path, revision: str | None = None, *, local_files_only: bool = False) -> Start:
    """Downloads what is not there. Raises UserError (exit code MODEL) where there is no model, or an adapter without base."""
    folder, commit = hub.resolve(path_or_repo, revision, "model", local_files_only=local_files_only)
    if commit is not None:
        return Start(str(path_or_repo), revision, folder, commit, commit)
    folder = model_folder(folder)
    if not is_adapter(folder):
        return Start(str(folder), None, folder, None, contents_id(folder))
    base, base_revision = base_of(folder)
    if Path(base).expanduser().is_dir() and is_adapter(model_folder(Path(base).expanduser())):
        hint = "merge that one first (minisft export --merge), and train an adapter beside the merged model"
        raise UserError(f"{folder / CONFIG_FILE}: the base {base} is an adapter itself", hint=hint, exit_code=MODEL)
    try:
        start = find_start(base, base_revision, local_files_only=local_files_only)
    except UserError as error:
        raise _without_base(folder, base, error.message) from None
    return replace(start, adapter=folder, id=contents_id(folder))


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() and not (folder / "config.json").exists()


def _without_base(folder: Path, base: str, problem: str) -> UserError:
    """What to say where the base of an adapter is not found."""
    hint = "an adapter needs its base: put it back, or correct base_model_name_or_path there"
    return UserError(f"{folder / CONFIG_FILE} names the base model {base}: {problem}", hint=hint, exit_code=MODEL)


def tokenizer_source(path_or_repo: str, revision: str | None) -> tuple[str, str | None]:
    """The path or repository, and its revision, of the tokenizer that belongs to a model: its own; for an adapter that came
    without one, that of its base. Downloads nothing. Raises UserError (exit code MODEL) where that base cannot be."""
    folder = Path(path_or_repo).expanduser()
    if not folder.is_dir() or (folder / "tokenizer.json").exists():
        return path_or_repo, revision
    folder = model_folder(folder)
    if is_adapter(folder) and not (folder / "tokenizer.json").exists():
        base, base_revision = base_of(folder)
        if not Path(base).expanduser().is_dir() and not hub.is_repository_name(base):
            raise _without_base(folder, base, "there is no such folder")
        return base, base_revision
    return str(folder), revision
