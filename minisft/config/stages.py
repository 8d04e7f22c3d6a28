"""Stages: several runs from one file, each starting from the model that the one before wrote.

    stages = ["sft.toml", "dpo.toml"]            # files beside this one
    output_dir = "runs/x"                        # runs/x/1-sft, runs/x/2-dpo
    train.precision = "bf16"                     # all other keys are common to all stages

A stage is a file, or a table with the keys of one; both may extend others. The later of these layers win:

    defaults < the common keys < its starting model < the files that it extends < its own keys < the command line

Common keys of [dpo] apply to the stages with trainer_type = "dpo" only.

A stage after the first starts from <output_dir of the one before>/model, with the tokenizer there, unless it names
model.model_name_or_path or model.config itself. The model on the command line is the first stage's.

The whole list is read and checked before the first stage begins. Each stage is a run like any other, in a folder of its own
that holds its resolved configuration, so the same command resumes wherever it was stopped. A stage is finished if the
manifest of its exported model names this configuration and this starting model.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minisft.atomic_folder import contents_id, read_manifest, verify_folder
from minisft.config.load import (
    Given,
    file_layer,
    fingerprint,
    load_files,
    override_layer,
    read_files,
    resolve,
)
from minisft.config.sections import Config
from minisft.config.values import as_toml
from minisft.errors import UserError

START_KEYS = ("model.model_name_or_path", "model.config", "model.revision", "model.tokenizer_name_or_path")


@dataclass(frozen=True)
class Stage:
    """One run of a list. A file without stages is a list of one, without a title."""

    title: str  # "stage 2 of 2: dpo.toml"
    config: Config
    origins: dict[str, str]
    previous: "Stage | None" = None  # the one whose model it starts from

    @property
    def model_dir(self) -> Path:
        return Path(self.config.output_dir) / "model"

    def finished_step(self) -> int | None:
        """The step at which this stage finished, if its configuration and its starting model are still the same; None if it
        must run."""
        if self.config.checkpoint.resume != "auto" or verify_folder(self.model_dir, hashes=False) is not None:
            return None
        if not has_samples(self.config):
            return None
        manifest = read_manifest(self.model_dir)
        same_start = self.previous is None or manifest.get("started_from") == contents_id(self.previous.model_dir)
        return manifest["step"] if manifest.get("config") == fingerprint(self.config) and same_start else None


def has_samples(config: Config) -> bool:
    """Whether the held-out prompts were completed, which happens after the export, or none are configured."""
    return config.evaluate.generate_data is None or Path(config.output_dir, "samples.jsonl").exists()


def load_stages(
    source: str | Path | dict | None, overrides: dict[str, Any] | None = None, origin: str = "command line"
) -> list[Stage]:
    """The stages of a TOML file, or of a dict shaped like one; arguments as in `load` of load.py. Raises UserError."""
    files = read_files(source)
    lists = [(table.pop("stages"), name, folder) for table, name, folder in files if "stages" in table]
    if not lists:
        return [Stage("", *load_files(files, overrides, origin))]
    items, name, folder = lists[-1]
    if not isinstance(items, list) or not items:
        hint = 'name a file for each, as in stages = ["sft.toml", "dpo.toml"], or write each as a [[stages]] table'
        raise UserError(f"{name}: stages = {as_toml(items)}: expected a list of stages", hint=hint)
    common = [file_layer(file) for file in files]
    commands = override_layer(overrides or {}, origin)
    stages: list[Stage] = []
    for number, item in enumerate(items, 1):
        title = f"stage {number} of {len(items)}"
        try:
            stages.append(_stage(item, f"{name}, stage {number}", folder, title, common, commands, stages))
        except UserError as error:
            if isinstance(item, str):
                title += f" ({item})"
            raise UserError(f"{title}: {error.message}", hint=error.hint, exit_code=error.exit_code) from None
    return stages


def _stage(
    item: Any,
    name: str,
    folder: Path,
    title: str,
    common: list[dict[str, Given]],
    commands: dict[str, Given],
    before: list[Stage],
) -> Stage:
    """One entry of the list, after those `before`."""
    if not isinstance(item, str | dict):
        raise UserError(f"{name} = {as_toml(item)}: expected the path of a TOML file, or a table")
    files = read_files({"extends": item} if isinstance(item, str) else item, name, folder)
    if listing := next((name for table, name, _ in files if "stages" in table), None):
        hint = "write the stages of both in one list" if listing != name else "remove the inner list"
        raise UserError(f"{listing} lists stages itself, and a stage is one run", hint=hint)
    own = [file_layer(file) for file in files]
    keys = set().union(*own)  # the keys that the stage sets itself
    previous = before[-1] if before and not keys & {"model.model_name_or_path", "model.config"} else None
    start: dict[str, Given] = {}
    if before:
        commands = {key: value for key, value in commands.items() if key not in START_KEYS}
    trainers = [layer["trainer_type"].value for layer in (*common, *own, commands) if "trainer_type" in layer]
    if trainers[-1:] != ["dpo"]:  # common keys of [dpo] are for the stages that read them
        *common, commands = [
            {key: value for key, value in layer.items() if not key.startswith("dpo.")} for layer in (*common, commands)
        ]
    if previous is not None:
        written = dict.fromkeys(START_KEYS) | {"model.model_name_or_path": os.path.abspath(previous.model_dir)}
        start = {key: Given(value, "the model of the stage before", key) for key, value in written.items()}
    config, origins = resolve([*common, start, *own, commands], where=name)

    short = Path(item).stem if isinstance(item, str) else config.trainer_type
    if "output_dir" in commands or "output_dir" not in keys:
        place = os.path.join(config.output_dir, f"{len(before) + 1}-{short}")
        config, origins = (
            replace(config, output_dir=place),
            origins | {"output_dir": f"{origins['output_dir']}, numbered"},
        )
    for other in before:
        if os.path.abspath(other.config.output_dir) == os.path.abspath(config.output_dir):
            problem = f"output_dir = {as_toml(config.output_dir)} is the folder of {other.title} too"
            raise UserError(problem, hint="give each stage its own, or leave it out: then they are numbered")
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and ("checkpoint.resume" in commands or "checkpoint.resume" not in keys):
        hint = "set checkpoint.resume in that stage, or resume it alone by the config.toml in its folder"
        raise UserError(f"checkpoint.resume = {as_toml(resume)} is a checkpoint of one stage", hint=hint)
    return Stage(f"{title}: {item if isinstance(item, str) else short}", config, origins, previous)


def before_training(stage: Stage) -> Config:
    """The configuration with the tokenizer that the stage will have, for use before the first stage has run."""
    config = stage.config
    if stage.previous is None or stage.previous.model_dir.exists():
        return config
    first = before_training(stage.previous).model
    chosen = {key.partition(".")[2]: getattr(first, key.partition(".")[2]) for key in START_KEYS}
    for key in ("chat_template", "eos_token", "pad_token"):
        chosen[key] = getattr(config.model, key) or getattr(first, key)
    chosen["new_special_tokens"] = tuple(dict.fromkeys(first.new_special_tokens + config.model.new_special_tokens))
    return replace(config, model=replace(config.model, **chosen))
