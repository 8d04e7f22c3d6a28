"""What can be found wrong with a run before torch is imported, which takes seconds: packages, files, folders and what they hold.

config/check.py has looked at the values. Repositories of the hub come later, where they are downloaded.
"""

import os
import shlex
from pathlib import Path

from minisft import hub
from minisft.atomic_folder import verify_folder
from minisft.config.check import require_packages
from minisft.config.load import MODEL_FILES, RESOLVED_NAME
from minisft.config.sections import Config, eval_sets, source_list
from minisft.config.stages import Stage
from minisft.config.values import as_toml
from minisft.data.sources import list_files, parse_source
from minisft.errors import CONFIG, DATA, MODEL, SAVE, UserError
from minisft.files import is_there, require_file, without_model
from minisft.gguf.file import is_gguf
from minisft.strict_json import read_json

MODELS = ("model.model_name_or_path", "model.tokenizer_name_or_path", "dpo.ref_model_name_or_path")


def look(stages: list[Stage]) -> None:
    """Raises UserError for the first thing that is missing or broken."""
    for number, stage in enumerate(stages):
        try:
            require_packages(stage.config, stage.origins)
            look_for_data(stage.config)
            look_for_models(stage, stages[:number])
            look_for_folders(stage.config)
        except UserError as error:
            title = f"{stage.title}: " if stage.title else ""
            raise UserError(title + error.message, hint=error.hint, exit_code=error.exit_code) from None


def look_for_run(stage: Stage) -> None:
    """The configuration that a run has left in its folder continues that run. output_dir belongs to the working directory, so
    from another one it would be a new run, from its first step. Raises UserError there."""
    origin, name = Path(stage.origins["output_dir"]), stage.config.output_dir
    folder = origin.parent
    if origin.name != RESOLVED_NAME or not (folder / "checkpoints").is_dir():
        return
    if os.path.realpath(folder) != os.path.realpath(name):
        raise UserError(
            f"{origin} is of the run in {folder}, but its output_dir = {as_toml(name)} is {os.path.abspath(name)} from here",
            hint=f"to continue that run: --output_dir {shlex.quote(str(folder))}; to begin another one, name its --output_dir",
        )


def look_for_data(config: Config) -> None:
    """The files of rows are there."""
    sources = source_list(config.data.train_data) + source_list(config.evaluate.generate_data)
    for source in sources + [s for entry in eval_sets(config.data.eval_data).values() for s in entry]:
        if not hub.is_repository_name((parsed := parse_source(source)).path):
            list_files(parsed)


def look_for_models(stage: Stage, before: list[Stage]) -> None:
    """The local folders of models and tokenizers hold one, unless an earlier stage will write it; a template's file is there."""
    from minisft.model.families import from_hf  # here, because a missing file is told sooner without it

    coming = [Path(os.path.abspath(other.config.output_dir)) for other in before]
    for key in MODELS:
        section, _, name = key.partition(".")
        path = os.path.expanduser(getattr(getattr(stage.config, section), name) or "")
        is_coming = any(Path(os.path.abspath(path)).is_relative_to(folder) for folder in coming)
        if not path or is_coming or is_gguf(path):
            continue
        if not os.path.isdir(path) and hub.may_be_repository(path):
            continue
        if not any(is_there(os.path.join(path, name)) for name in MODEL_FILES):
            hint = f"a folder with {MODEL_FILES[0]} or {MODEL_FILES[1]} in it, a run's output folder, or owner/name"
            problem, hint = without_model(path, hint)
            problem += ", and no stage before makes it" if before else ""
            raise UserError(f"{key} = {path!r} {problem}", hint=hint, exit_code=MODEL)
        if name != "tokenizer_name_or_path" and os.path.lexists(config := os.path.join(path, MODEL_FILES[0])):
            hf = read_json(config, exit_code=MODEL)
            if isinstance(hf, dict):  # model/load.py says what else it may be
                from_hf(hf)
    template = stage.config.model.chat_template or ""
    if "/" in template and "{{" not in template and "{%" not in template:  # else it may be a name, or is one itself
        require_file(template, exit_code=MODEL)
    if stage.config.model.config is not None:
        from_hf({"vocab_size": 2, **stage.config.model.config})  # the size of the tokenizer comes later


def look_for_folders(config: Config) -> None:
    """The run can write where it is to write, and the checkpoint that it resumes from is one."""
    for key, folder in (("output_dir", config.output_dir), ("data.cache_dir", config.data.cache_dir)):
        path = os.path.abspath(folder or ".")
        while not os.path.lexists(path):
            path = os.path.dirname(path)
        problem = "" if os.path.isdir(path) else f"{path} is no folder"
        if not problem and not os.access(path, os.W_OK | os.X_OK):
            problem = f"{path} cannot be written"
        if folder and problem:
            raise UserError(f"{key} = {as_toml(folder)}: {problem}", hint="name another folder", exit_code=SAVE)
    resume = config.checkpoint.resume
    if resume in ("auto", "never"):
        return
    if not os.path.isdir(resume):
        hint = f"checkpoints are in {os.path.join(config.output_dir, 'checkpoints')}"
        raise UserError(f"checkpoint.resume = {as_toml(resume)}: no such folder", hint=hint, exit_code=CONFIG)
    if reason := verify_folder(resume, hashes=False):
        hint = "resume = 'auto' takes the newest checkpoint that verifies"
        raise UserError(f"the checkpoint {resume} does not verify: {reason}", hint=hint, exit_code=DATA)
