"""The model of a plan: its config.json, never weights, and no torch for a plain model."""

import os
from pathlib import Path

from minisft import hub
from minisft.config.sections import Config
from minisft.data.tokenizer import Tokenizer
from minisft.errors import MODEL, UserError
from minisft.gguf.config import config_of
from minisft.gguf.file import is_gguf, open_gguf
from minisft.model.families import from_hf
from minisft.model.model_config import ModelConfig, with_vocab_size, without_dropout
from minisft.strict_json import read_json


def read_model(config: Config, tokenizer: Tokenizer) -> ModelConfig:
    """The shape of the model, as prepare/model.py resolves it. Raises UserError (exit code MODEL)."""
    section, max_length = config.model, config.data.max_length
    if section.config is not None:
        found = from_hf({"vocab_size": tokenizer.vocab_size, **section.config}, max_length=max_length)
    else:
        assert section.model_name_or_path is not None, "config/check.py requires one of them"
        found = from_hf(
            _table(section.model_name_or_path, section.revision, section.local_files_only), max_length=max_length
        )
        if section.new_special_tokens and tokenizer.vocab_size > found.vocab_size:
            found = with_vocab_size(found, tokenizer.vocab_size)
    return without_dropout(found) if config.trainer_type == "dpo" and config.dpo.disable_dropout else found


def _table(path: str, revision: str | None, local_files_only: bool) -> dict:
    """The config.json of a folder, an adapter's base, a GGUF file or a repository."""
    folder = Path(os.path.expanduser(path))
    if is_gguf(folder):
        return config_of(open_gguf(folder))
    if not folder.is_dir():
        if not hub.may_be_repository(path):
            problem = f"model.model_name_or_path = {path!r} is no folder, and not the name of a hub repository"
            raise UserError(problem, hint="a folder with config.json in it, or owner/name", exit_code=MODEL)
        file = hub.model_file(path, revision, "config.json", local_files_only=local_files_only)
    else:
        folder = folder / "model" if (folder / "model").is_dir() else folder
        file = folder / "config.json"
        if not file.is_file():
            from minisft.model.adapter_files import base_of

            return _table(*base_of(folder), local_files_only)
    table = read_json(file, exit_code=MODEL)
    if not isinstance(table, dict):
        raise UserError(f"{file}: expected an object, found {type(table).__name__}", exit_code=MODEL)
    return table
