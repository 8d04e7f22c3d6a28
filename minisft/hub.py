"""Downloads from the Hugging Face hub: the only place that uses the network, and only when a config names a repository.

A download takes the files that are named here and nothing else: no code, no pickles, no copies of the weights in other
formats. The commit it came from is returned, so that a run can record it and a later one can ask for it.

A partial download is never taken for a complete one. huggingface_hub moves a file into place only when it is complete.
Whether a model or a data set is complete is checked here, because a cache looks the same after a broken download:

    model, tokenizer   the required files are there, among them every shard that the index names
    data set           the list of all files is kept in the cache; a run gets every file that it chooses from it, or fails

huggingface_hub is imported only when it is needed, so that local work does not wait for it.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from minisft.atomic_folder import make_folder
from minisft.errors import DATA, MODEL, UserError
from minisft.files import checked_path, read_file
from minisft.gguf.file import is_gguf
from minisft.strict_json import read_json, write_json

# The files of a tokenizer in other formats. None is read; a model folder that has them keeps them.
OTHER_TOKENIZERS = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model")
# A star also matches slashes, so patterns such as *.safetensors would fetch whole folders of other formats.
FILES = {
    "model": [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors-*-of-*.safetensors",
        "model.safetensors.index.json",
        # Not read here: an exported model has them too (model/drop_in.py).
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        *OTHER_TOKENIZERS,
        "LICENSE*",
    ],
    "tokenizer": [
        "config.json",
        "tokenizer.json",
        "tokenizer.[0-9]*.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "additional_chat_templates/*.jinja",
    ],
}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".json", ".csv", ".txt", ".tsv", ".gz", ".zst", ".zip", ".arrow")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_CARD_BYTES = 2**22
CONVERTED = "refs/convert/parquet"  # a branch where the hub keeps a data set as Parquet files


# ------------------------------------------------------------------------------------------------- models, tokenizers


def resolve(
    path_or_repo: str | Path, revision: str | None, kind: str, *, local_files_only: bool = False
) -> tuple[Path, str | None]:
    """A local folder with the files of `kind` ("model" or "tokenizer"), and the commit sha it came from.

    A folder or a GGUF file that exists is returned as it is, with None. Everything else is a hub repository, "owner/name":
    its files at `revision` (branch, tag or commit; None = main) are taken from the local cache or downloaded.
    HF_HUB_OFFLINE=1 or local_files_only stops downloads, HF_HOME is the folder of the cache, HF_TOKEN opens private
    repositories. Raises UserError (exit code MODEL), also if the repository or the cache lacks a required file.
    """
    folder = Path(checked_path(path_or_repo, f"the {kind}", exit_code=MODEL))
    if folder.is_dir() or is_gguf(folder):
        if revision is not None:
            raise UserError(
                f"revision {revision!r} is given, but {folder} is a local {'folder' if folder.is_dir() else 'file'}",
                hint="remove the revision, or name a hub repository",
                exit_code=MODEL,
            )
        return folder, None
    repo = str(path_or_repo)
    if not may_be_repository(repo):
        what = "a file" if folder.is_file() else "not a folder that exists"
        raise UserError(
            f"{repo!r} is {what}, and not the name of a hub repository",
            hint=f"give a folder with {FILES[kind][0]} in it, a GGUF file, or a repository as owner/name",
            exit_code=MODEL,
        )
    from huggingface_hub import snapshot_download

    try:
        options = {"allow_patterns": FILES[kind], "local_files_only": local_files_only}
        folder = Path(snapshot_download(repo, revision=revision, **options))  # .../snapshots/<commit sha>
    except Exception as error:  # broken connections and full disks: their classes differ by version and transport
        raise _user_error(error, repo, revision, MODEL) from None
    if missing := _missing(folder, kind):
        raise _incomplete(repo, folder.name, missing, local_files_only)
    return folder, folder.name


def model_file(repo: str, revision: str | None, name: str, *, local_files_only: bool = False) -> Path:
    """One file of a model's repository, from the cache or downloaded. Raises UserError (exit code MODEL)."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision, local_files_only=local_files_only))
    except Exception as error:
        raise _user_error(error, repo, revision, MODEL) from None


def may_be_repository(name: str) -> bool:
    """Whether a path that is no folder may be the name of a repository: owner/name, or a name alone."""
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name, re.ASCII) and not name.lower().endswith(".gguf")
    return bool(is_name) and not name.startswith(".")


def _missing(folder: Path, kind: str) -> list[str]:
    """The names of the required files that a snapshot lacks."""
    if kind == "tokenizer":
        needed = ["tokenizer.json"]
    elif (folder / "model.safetensors").exists() or not (folder / "model.safetensors.index.json").exists():
        needed = ["config.json", "model.safetensors"]
    else:
        index = read_json(folder / "model.safetensors.index.json", exit_code=MODEL)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        shards = weight_map.values() if isinstance(weight_map, dict) else []  # load.py reports what is wrong with it
        needed = ["config.json", *sorted({shard for shard in shards if isinstance(shard, str)})]
    return [name for name in needed if not os.path.exists(folder / name)]


def _incomplete(repo: str, commit: str, missing: list[str], local_files_only: bool) -> UserError:
    """The error for missing files: either the repository lacks them, or only its copy in the cache does."""
    from huggingface_hub import HfApi, constants

    listed = None
    if not local_files_only and not constants.HF_HUB_OFFLINE:
        with suppress(Exception):  # then it stays unknown
            listed = HfApi().list_repo_files(repo, revision=commit)
    if listed is None or all(name in listed for name in missing):
        problem = f"{repo} at {commit}: the local cache has only a part of it, without {', '.join(missing)}"
        return UserError(problem, hint="start once with a connection, to download the rest", exit_code=MODEL)
    if missing == ["model.safetensors"] and (pickles := [name for name in listed if name.endswith(PICKLES)]):
        problem = f"{repo} has its weights only as {', '.join(pickles[:3])}: opening such files can run code"
        hint = (
            "only safetensors are read; look for a converted copy in the repository's pull requests (revision = "
            '"refs/pr/1"), or convert it once with transformers: from_pretrained(repo), then save_pretrained(folder)'
        )
    elif missing == ["tokenizer.json"]:
        problem = f"{repo} has no tokenizer.json; it has {_some(listed)}"
        hint = "name another repository with the same tokenizer, or write one with transformers' save_pretrained"
    else:
        problem = f"{repo} has no {', '.join(missing)}; it has {_some(listed)}"
        hint = "name the repository of a whole model in the safetensors format"
    return UserError(problem, hint=hint, exit_code=MODEL)


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


# ------------------------------------------------------------------------------------------------- data sets


def is_repository_name(path: str) -> bool:
    """Whether a path is shaped like owner/name, is not the name of a data file, and does not exist locally."""
    is_shaped = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path, re.ASCII) and not path.lower().endswith(DATA_SUFFIXES)
    return bool(is_shaped) and not os.path.exists(path)


def list_dataset(repo: str, revision: str | None, *, local_files_only: bool = False) -> tuple[list[str], str]:
    """(paths of all files, commit sha) of a data set repository at `revision` (None = main).

    The list is kept in the hub's cache folder. It is read from there if `revision` is a commit, whose files never change,
    and with local_files_only or HF_HUB_OFFLINE=1. It is empty for CONVERTED if there is no such branch. Raises UserError
    (exit code DATA).
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "minisft"
    name = quote(revision or "main", safe="")
    is_local = local_files_only or constants.HF_HUB_OFFLINE
    if (is_local or COMMIT.fullmatch(name)) and (folder / f"{name}.json").exists():
        listing = read_json(folder / f"{name}.json")
        return listing["files"], listing["commit"]
    if is_local:
        raise UserError(
            f"{repo}{f' at {revision}' if revision else ''}: no such local path, not in the local cache, "
            "and downloads are switched off",
            hint="start once with a connection, or name local files",
            exit_code=DATA,
        )
    try:
        commit = HfApi().dataset_info(repo, revision=revision, expand=["sha"]).sha
        assert commit is not None, "the hub names no commit"
        files = sorted(HfApi().list_repo_files(repo, revision=commit, repo_type="dataset"))
    except Exception as error:
        if isinstance(error, RevisionNotFoundError) and revision == CONVERTED:
            return [], ""
        raise _user_error(error, repo, revision, DATA) from None
    assert commit is not None  # `expand` asked for it
    with suppress(OSError):  # a read-only cache still serves
        make_folder(folder)
        for kept in (folder / f"{name}.json", folder / f"{commit}.json"):
            temporary = kept.with_suffix(f".{os.getpid()}")
            write_json(temporary, {"commit": commit, "files": files})
            os.replace(temporary, kept)  # whole or not at all, even if several processes do it
    return files, commit


def download_dataset(
    repo: str, commit: str, files: list[str], *, local_files_only: bool = False, folder: Path | None = None
) -> list[Path]:
    """Local paths of files of a data set repository, from the cache or downloaded; each file is complete. folder: where they are
    then, outside of the cache.

    Raises UserError (exit code DATA).
    """
    from huggingface_hub import hf_hub_download

    options = {"repo_type": "dataset", "revision": commit, "local_files_only": local_files_only, "local_dir": folder}
    try:
        return [Path(hf_hub_download(repo, file, **options)) for file in files]
    except Exception as error:
        raise _user_error(error, repo, commit, DATA) from None


def read_card(repo: str, commit: str, *, local_files_only: bool = False) -> dict:
    """The YAML at the top of a data set's README.md, as a dict. Raises UserError (exit code DATA)."""
    from huggingface_hub import DatasetCard

    (path,) = download_dataset(repo, commit, ["README.md"], local_files_only=local_files_only)
    text = read_file(path, at_most=MAX_CARD_BYTES).decode("utf-8", errors="replace").lstrip("\ufeff")
    if not text.lstrip().startswith("---"):
        return {}
    try:
        return DatasetCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # its class depends on huggingface_hub's YAML reader
        problem = f"{repo}: the YAML at the top of its README.md cannot be read: {' '.join(str(error).split())[:200]}"
        raise UserError(problem, hint="name the files by data_files", exit_code=DATA) from None


# ------------------------------------------------------------------------------------------------- what went wrong


def _user_error(error: BaseException, repo: str, revision: str | None, exit_code: int) -> UserError:
    from huggingface_hub import errors

    is_miss = isinstance(error, errors.LocalEntryNotFoundError)
    if is_miss and error.__cause__ and not isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        error = error.__cause__  # why the hub could not be reached
    where = f"{repo} at revision {revision}" if revision else repo
    page = f"https://huggingface.co/{'datasets/' if exit_code == DATA else ''}{repo}"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    headers = getattr(response, "headers", {})
    is_refused = status == 403 or status == 401 and "credentials" in headers.get("X-Error-Message", "")
    if isinstance(error, errors.HFValidationError):
        problem, hint = f"{repo!r} is not a valid repository name ({error})", "give a local path or owner/name"
    elif isinstance(error, errors.GatedRepoError):
        problem, hint = f"{repo} is gated", f"accept its terms on {page} and set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        problem, hint = f"{repo} has no revision {revision!r}", "give a branch, a tag or a full commit sha"
    elif isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and not is_refused):
        problem = f"no hub repository {repo!r} is visible, and there is no such local path"
        hint = "check the name; for a private one set HF_TOKEN"
    elif is_refused:
        what = "refuses the token" if status == 401 else "does not let this token read it"
        problem = f"{where}: the hub {what} (HF_TOKEN, or that of `hf auth login`)"
        hint = "make a new token that may read it; public repositories need none: unset HF_TOKEN"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        problem = f"{where}: no such local path, not all of it in the local cache, and downloads are switched off"
        hint = "check the path, or start once with a connection, without HF_HUB_OFFLINE and local_files_only"
    else:
        problem = f"{where} could not be downloaded: {' '.join(str(error).split())[:300] or type(error).__name__}"
        hint = "try again: finished files are kept; local_files_only uses the cache and never the network"
    return UserError(problem, hint=hint, exit_code=exit_code)
