"""Downloads from the Hugging Face hub: the only place that uses the network, and only when a config names a repository.

A download takes the files that are on the list below and nothing else: no code, no pickles, no copies of the weights in
other formats. The commit it came from is returned, so that a run can record it and a later one can ask for it.

huggingface_hub is imported when it is needed: local work does not wait for it.
"""

import os
import re
from pathlib import Path

from minisft.errors import DATA, MODEL, UserError
from minisft.files import read_json, write_json

# A star also matches slashes, so patterns such as *.safetensors would fetch whole folders of other formats.
FILES = {
    "model": [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-*-of-*.safetensors",
        "model.safetensors.index.json",
    ],
    "tokenizer": [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "additional_chat_templates/*.jinja",
    ],
}


def resolve(
    path_or_repo: str | Path, revision: str | None, kind: str, *, local_files_only: bool = False
) -> tuple[Path, str | None]:
    """A local folder with the files of `kind` ("model" or "tokenizer"), and the commit sha it came from.

    A folder that exists is returned as it is, with None. Everything else is a hub repository, "owner/name": its files
    at `revision` (branch, tag or commit; None = main) are taken from the local cache or downloaded. HF_HUB_OFFLINE=1 or
    local_files_only stops downloads, HF_HOME says where the cache is, HF_TOKEN opens private repositories. Raises UserError
    (exit code MODEL).
    """
    folder = Path(path_or_repo).expanduser()
    if str(path_or_repo) and folder.is_dir():
        if revision is not None:
            raise UserError(
                f"revision {revision!r} is given, but {folder} is a local folder",
                hint="remove the revision, or name a hub repository",
                exit_code=MODEL,
            )
        return folder, None
    repo = str(path_or_repo)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo, re.ASCII) or repo.startswith((".", "/")):
        what = "a file" if folder.is_file() else "not a folder that exists"
        raise UserError(
            f"{repo!r} is {what}, and not the name of a hub repository",
            hint=f"give a folder with {FILES[kind][0]} in it, or a repository as owner/name",
            exit_code=MODEL,
        )
    return _download(repo, revision, kind, local_files_only)


def _download(repo: str, revision: str | None, kind: str, local_files_only: bool) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=FILES[kind], local_files_only=local_files_only)
        )
        return folder, folder.name  # .../snapshots/<commit sha>
    except Exception as error:  # broken connections and full disks: their classes differ by version and transport
        raise _user_error(error, repo, revision, kind) from None


# ------------------------------------------------------------------------------------------------- data sets


def is_repository_name(path: str) -> bool:
    """Whether a path is shaped like owner/name and nothing local is there."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path, re.ASCII)) and not os.path.exists(path)


def list_dataset(repo: str, revision: str | None, *, local_files_only: bool = False) -> tuple[list[str], str]:
    """(paths of all files, commit sha) of a data set repository at `revision`.

    The list of an earlier call is kept in the hub's cache folder. It is taken without asking where `revision` is a commit
    (whose files never change), with local_files_only, and where the hub is offline. Raises UserError (exit code DATA).
    """
    from huggingface_hub import HfApi, constants

    kept = (
        Path(constants.HF_HOME)
        / "minisft"
        / f"{repo.replace('/', '--')}@{(revision or 'main').replace('/', '--')}.json"
    )
    is_local = local_files_only or constants.HF_HUB_OFFLINE
    if kept.exists() and (is_local or re.fullmatch(r"[0-9a-f]{40}", revision or "")):
        listing = read_json(kept)
        return listing["files"], listing["commit"]
    if is_local:
        raise UserError(
            f"{repo}{f' at {revision}' if revision else ''}: no such local path, not in the local cache, and the hub is offline",
            hint="start once with a connection; or name local files",
            exit_code=DATA,
        )
    try:
        info = HfApi().dataset_info(repo, revision=revision)
    except Exception as error:
        raise _user_error(error, repo, revision, "dataset") from None
    listing = {"files": sorted(file.rfilename for file in info.siblings or []), "commit": info.sha}
    kept.parent.mkdir(parents=True, exist_ok=True)
    for name in {revision or "main", info.sha}:
        write_json(kept.with_name(f"{repo.replace('/', '--')}@{name.replace('/', '--')}.json"), listing)
    return listing["files"], listing["commit"]


def download_dataset(repo: str, commit: str, files: list[str], *, local_files_only: bool = False) -> list[Path]:
    """Local paths of files of a data set repository, from the cache or downloaded; each is whole or an error.

    Raises UserError (exit code DATA).
    """
    from huggingface_hub import hf_hub_download

    paths = []
    for file in files:
        try:
            options = {"repo_type": "dataset", "revision": commit, "local_files_only": local_files_only}
            paths.append(Path(hf_hub_download(repo, file, **options)))
        except Exception as error:
            raise _user_error(error, f"{repo}/{file}", commit, "dataset") from None
    return paths


def _user_error(error: Exception, repo: str, revision: str | None, kind: str) -> UserError:
    """What went wrong with the hub, for people."""
    from huggingface_hub import errors

    where = f"{repo} at revision {revision}" if revision else repo
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        problem, hint = f"{repo!r} is not a valid repository name ({error})", "give a local folder or owner/name"
    elif isinstance(error, errors.GatedRepoError):
        problem, hint = f"{repo} is gated", f"accept its terms on {page} and set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        problem, hint = f"{repo} has no revision {revision!r}", "give a branch, a tag or a full commit sha"
    elif status == 401 and "Invalid" in str(error):
        problem, hint = f"{where}: the hub refuses the token in HF_TOKEN", "make a new one, or unset it for public data"
    elif isinstance(error, errors.RepositoryNotFoundError):
        problem, hint = f"no hub repository {repo!r}, and no such local path", "check the name; private: set HF_TOKEN"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        problem = f"{where}: no such local path, not in the local cache, and the hub is offline or out of reach"
        hint = f"check the path; or download it once with a connection: hf download {repo}"
    else:
        problem, hint = f"{where} could not be downloaded: {str(error)[:300]}", "try again; what has arrived is kept"
    return UserError(problem, hint=hint, exit_code=DATA if kind == "dataset" else MODEL)
