"""Downloads from the Hugging Face hub: the only place that uses the network, and only when a config names a repository.

A download takes the files that are on the list below and nothing else: no code, no pickles, no copies of the weights in
other formats. The commit it came from is returned, so that a run can record it and a later one can ask for it.

huggingface_hub is imported when it is needed: local work does not wait for it.
"""

import re
from pathlib import Path

from minisft.errors import MODEL, UserError

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
    at `revision` (branch, tag or commit; None = main) are taken from the local cache or downloaded. HF_HUB_OFFLINE=1
    stops downloads, HF_HOME says where the cache is, HF_TOKEN opens private repositories. Raises UserError (exit code
    MODEL).
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
    from huggingface_hub import errors, snapshot_download

    where = f"{repo} at revision {revision}" if revision else repo
    try:
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=FILES[kind], local_files_only=local_files_only)
        )
        return folder, folder.name  # .../snapshots/<commit sha>
    except errors.HFValidationError as error:
        problem, hint = f"{repo!r} is not a valid repository name ({error})", "give a local folder or owner/name"
    except errors.GatedRepoError:
        problem, hint = f"{repo} is gated", f"accept its terms on https://huggingface.co/{repo} and set HF_TOKEN"
    except errors.RevisionNotFoundError:
        problem, hint = f"{repo} has no revision {revision!r}", "give a branch, a tag or a full commit sha"
    except errors.RepositoryNotFoundError:
        problem, hint = f"no hub repository {repo!r}, and no such local folder", "check the name; private: set HF_TOKEN"
    except errors.LocalEntryNotFoundError:
        problem = f"{where}: no such local folder, not in the local cache, and the hub is offline or out of reach"
        hint = "check the path; or download it once with a connection: hf download " + repo
    except Exception as error:  # broken connections and full disks: their classes differ by version and transport
        problem, hint = f"{where} could not be downloaded: {str(error)[:300]}", "try again; what has arrived is kept"
    raise UserError(problem, hint=hint, exit_code=MODEL)
