"""Uploads to the Hugging Face hub, only for `minisft export --push`.

A repository is made private, unless it is asked to be public. The upload is that of huggingface_hub: finished files and chunks
are kept, so that the same command again sends only what is missing.
"""

import os
import re
from pathlib import Path
from typing import Any

from minisft.atomic_folder import MANIFEST
from minisft.errors import SAVE, UserError
from minisft.strict_json import read_json

CHECKED = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "quantization_config.json",
)


def prepare_repository(name: str, *, public: bool) -> None:
    """Make the repository if there is none. Raises UserError (exit code SAVE) without a token, if it cannot be made, and if it is
    public and `public` is not set."""
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise UserError(f"--push {name!r}: not the name of a repository", hint="as in --push owner/name")
    if not get_token():
        hint = "set HF_TOKEN to a token that may write, or run `hf auth login`"
        raise UserError("--push needs a token of the Hugging Face hub, and there is none", hint=hint, exit_code=SAVE)
    try:
        HfApi().create_repo(name, private=not public, exist_ok=True)
        is_private = HfApi().model_info(name, expand=["private"]).private
    except Exception as error:  # broken connections: their classes differ by version and transport
        raise _not_pushed(name, error, "nothing was written; check the name and what the token may do") from None
    if not is_private and not public:
        hint = "give --public too, or another name: a new repository is private"
        raise UserError(f"{name} is a public repository: everyone would see the model", hint=hint, exit_code=SAVE)


def push(folder: Path, name: str) -> str:
    """Upload the files of a folder; returns the address of the commit. Raises UserError (exit code SAVE)."""
    from huggingface_hub import HfApi

    check_for_paths(folder)
    try:
        ignored = [MANIFEST, ".*"]
        done = HfApi().upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=ignored, commit_message="Upload from minisft"
        )
    except Exception as error:
        hint = f"{folder} is complete: the same command again sends what is missing"
        raise _not_pushed(name, error, hint) from None
    return str(done.commit_url)


def check_for_paths(folder: Path) -> None:
    """Raises UserError where a file that would be uploaded names a file or folder of this machine."""

    def walk(value: Any, key: str, file: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, name, file)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, key, file)
        elif isinstance(value, str) and value.count(os.sep) > 1 and os.path.isabs(value) and os.path.exists(value):
            hint = f"write there what others can load, as in owner/name, in {folder / file}"
            if key == "base_model_name_or_path":
                hint += "; or push base and adapter as one model (--merge)"
            raise UserError(f"{file}: {key} is a path of this machine, {value}", hint=hint, exit_code=SAVE)

    for file in CHECKED:
        if (folder / file).is_file():
            walk(read_json(folder / file), "", file)


def _not_pushed(name: str, error: Exception, hint: str) -> UserError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if status in (401, 403):
        reason, hint = "the hub refuses the token", "make a token that may write to it (HF_TOKEN, or `hf auth login`)"
    return UserError(f"{name} could not be pushed: {reason}", hint=hint, exit_code=SAVE)
