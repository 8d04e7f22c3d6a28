"""The beginning of a run: the output folder, the logs, the control file, and who saves. finish.py has its end."""

import os
from pathlib import Path

from minisft import ranks, record
from minisft.atomic_folder import hidden_file, not_written, remove_leftovers, write_file
from minisft.checkpoint import checkpoint_bytes
from minisft.config.load import add_history, write_resolved
from minisft.config.sections import Config, config_to_dict
from minisft.control import Control
from minisft.errors import UserError
from minisft.export import require_space_for_run, writes_rows
from minisft.files import is_there
from minisft.ledger import cut_ledgers
from minisft.loggers import Loggers
from minisft.memory import memory_bytes, require_memory
from minisft.prepare.run import Run
from minisft.resume import changed_keys
from minisft.saver import Saver, require_shared_folder


def start_output(config: Config, origins: dict[str, str], folder: Path, run: Run, saved: dict | None) -> Loggers:
    """Tidy the output folder, check that checkpoints can be written and fit on the disk, record the configuration, open the
    logs."""
    require_writable(folder / "checkpoints")
    for parent in (folder, folder / "checkpoints"):
        remove_leftovers(parent, locked=True)
    require_space_for_run(config, run, folder)
    if saved and (changed := changed_keys(config, saved)):
        add_history(folder, {"step": saved["step"], "changed": changed})
    write_resolved(config, origins, folder)
    cut_ledgers(folder, run.progress.step)
    record.add_start(run, folder, is_resumed=saved is not None)
    write_file(folder / "summary.txt", "\n".join(run.summary) + "\n")
    return open_loggers(config, folder, saved)


def require_writable(folder: Path) -> None:
    """UserError where a folder that is there, or a link that leads nowhere, cannot take a file."""
    if is_there(folder):
        try:
            with hidden_file(folder):
                pass
        except OSError as error:
            raise not_written(folder, error) from None


def open_loggers(config: Config, folder: Path, saved: dict | None) -> Loggers:
    run_name = config.log.run_name or folder.resolve().name
    return Loggers(folder, list(config.log.report_to), run_name, config_to_dict(config), saved)


def start_control(config: Config, run: Run, folder: Path) -> Control:
    """The control file, and what is done again."""
    if config.checkpoint.resume == "never":
        for path in folder.glob("control-done-step-*.toml"):
            path.unlink()  # of another run
    control = Control(folder, run.progress.step, can_evaluate=bool(run.evals))
    run.summary.extend(control.lines())
    return control


def start_saver(config: Config, run: Run, folder: Path) -> Saver:
    """Who saves. Raises UserError where every rank writes its part, and the ranks have no folder together; and where there is no
    memory for save_async."""
    section, everyone = config.checkpoint, writes_rows(run.model)
    if everyone:
        require_shared_folder(folder)
    if section.save_async:
        share = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / ranks.world_size() if everyone else 1  # on this machine
        copies = int(checkpoint_bytes(run.model, run.optimizer) * share)
        hint = "set checkpoint.save_async = false"
        require_memory(copies, memory_bytes(), "the copy of a checkpoint for save_async", hint)
    return Saver(folder / "checkpoints", section.save_total_limit, in_background=section.save_async, everyone=everyone)


def require_unchanged(config: Config, folder: Path, saved: dict | None) -> None:
    """UserError where a finished run is started again with a configuration that would write another model."""
    if changed := changed_keys(config, saved or {}):
        told = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
        raise UserError(
            f"{folder} is finished, at step {saved['step']}, with another configuration: {told}",
            hint="to train longer with the new values raise num_train_epochs or max_steps (or the patience); to start over "
            "choose another output_dir, or resume = 'never'",
        )
