"""The saves of a run, one at a time: at once, while the loop stands still, or in the background (checkpoint.save_async).

    begin     the first rank opens an atomic folder (atomic_folder.py). In the background: the values are copied
    write     every rank writes and hashes its files in it; in the background a thread does, while the loop takes steps
    publish   the first rank sees the files of all ranks in the folder, writes the manifest, and renames the folder once

A save in the background is published between two steps, at the latest before the next save begins and before the run ends. So
whatever happens, the checkpoint of a step is there as a whole, or it is not there, and the last one before it is untouched.
"""

import threading
from collections.abc import Collection
from contextlib import ExitStack, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from minisft import ranks
from minisft.atomic_folder import hidden_file, remedy, space
from minisft.checkpoint import Contents, new_checkpoint, step_folder
from minisft.errors import SAVE, UserError, rank_name, warn

MAX_FAILED_SAVES = 3  # in a row; then the run stops with exit code 74
DISK = (OSError, SafetensorError)  # what a disk that is full, read-only or gone raises


class Saver:
    """A context manager. All ranks use it alike; leaving it publishes what was begun, unless the process is in a hurry.

    folder: of all checkpoints. keep: see `new_checkpoint`. everyone: every rank writes files, and not only the first.
    """

    def __init__(self, folder: Path, keep: int | None, *, in_background: bool = False, everyone: bool = False):
        self.folder, self.keep, self.in_background, self.everyone = folder, keep, in_background, everyone
        self.num_failed = 0  # in a row
        self._homes: dict[str, Tensor] = {}  # of copies; they are kept, because new memory is slow to fill
        self._job: _Job | None = None
        # on the first rank, of the job: its atomic folder, and the hashes of the files in it
        self._opened, self._sealed = ExitStack(), {}

    def save(
        self, step: int, contents: Contents, *, needed: int, pinned: Collection[Path] = (), is_last: bool = False
    ) -> None:
        """Save, or begin to. needed: bytes on the disk. pinned: as in `new_checkpoint`. is_last: of the run; made at once.

        A failure is printed on stderr and the next save tries again. Raises UserError (exit code SAVE) for the third in a row,
        and for the last save, which has no next one to retry.
        """
        self.finish()
        if not self._takes_part():
            return
        path, problem = None, None
        if ranks.rank() == 0:
            options = {"needed": needed, "keep": self.keep, "pinned": pinned}
            try:
                path, self._sealed = self._opened.enter_context(new_checkpoint(self.folder, step, **options))
            except DISK as error:
                problem = str(error)
        if self.everyone:
            path, problem = ranks.from_first_rank([path and str(path), problem])
        if problem:
            return self._note(step, needed, problem, is_last)
        waits = self.in_background and not is_last
        self._job = _Job(step, needed, Path(path), contents.copied(self._homes) if waits else contents)
        if waits:
            self._job.start()
        else:
            self._job.run()
            self.finish(is_last)

    def publish_if_ready(self) -> None:
        """Publish the save that was begun, if all ranks have written their files."""
        if self._job is not None:
            waits = self._job.is_alive()
            if not (ranks.any_rank(waits) if self.everyone else waits):
                self.finish()

    def finish(self, is_last: bool = False) -> None:
        """Publish the save that was begun, once all ranks have written their files. Raises as `save`."""
        job, self._job = self._job, None
        if job is None:
            return
        if job.ident is not None:
            job.join()
        if job.error is not None and not isinstance(job.error, DISK):
            self._give_up()
            raise job.error
        said = [rank_name(), job.error and str(job.error), job.sealed]
        everyone = ranks.gathered(said) if self.everyone else [said]
        problem = next((f"{name}: {told}" if name else told for name, told, _ in everyone if told), None)
        if ranks.rank() == 0:
            try:
                with self._opened:
                    if problem:
                        raise OSError(problem)
                    for name, _, sealed in everyone:
                        require_files(job.path, sealed, name)
                        self._sealed |= sealed
            except DISK as error:
                problem = str(error)
        if self.everyone:
            problem = ranks.from_first_rank(problem)
        self._note(job.step, job.needed, problem, is_last)

    def _note(self, step: int, needed: int, problem: str | None, is_last: bool) -> None:
        self.num_failed = self.num_failed + 1 if problem else 0
        if not problem:
            return
        message = f"the checkpoint of step {step} could not be saved: {problem}; {space(self.folder, needed)}"
        if is_last or self.num_failed >= MAX_FAILED_SAVES:
            hint = f"the earlier checkpoints in {self.folder} are untouched; {remedy(problem)}, and resume"
            raise UserError(message, hint=hint, exit_code=SAVE)
        if ranks.rank() == 0:
            warn(f"{message}; training continues and the next save tries again")

    def _takes_part(self) -> bool:
        return self.everyone or ranks.rank() == 0

    def _give_up(self) -> None:
        """Remove what was begun."""
        self._job = None
        with suppress(_GivenUp), self._opened:
            raise _GivenUp

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """After an error the others may be gone, so only a rank that writes alone publishes."""
        if kind is None:
            self.finish(is_last=True)
        elif self.everyone or not issubclass(kind, Exception):
            self._give_up()
        else:
            with suppress(UserError):
                self.finish()
            self._give_up()  # what could not even begin


class _GivenUp(Exception):
    pass


class _Job(threading.Thread):
    """Writes the files of one save: a thread, or, by a call of `run`, the main thread."""

    def __init__(self, step: int, needed: int, path: Path, contents: Contents):
        super().__init__(name="save", daemon=True)
        self.step, self.needed, self.path, self.contents = step, needed, path, contents
        self.sealed: dict[str, dict] = {}
        self.error: BaseException | None = None
        self.copied = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if self.copied is not None:
            self.copied.record()

    def run(self) -> None:
        try:
            if self.copied is not None:
                self.copied.synchronize()
            self.sealed = self.contents.write(self.path, step_folder(self.path.parent, self.step).name)
        except BaseException as error:  # the main thread raises it
            self.error = error


def require_files(folder: Path, sealed: dict[str, dict], name: str) -> None:
    """Raise OSError where the files that a rank wrote are not in this process's folder. name: of the rank."""
    for file, entry in sealed.items():
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size != entry["size"]:
            there = "is not here" if size is None else f"has {size} bytes here"
            raise OSError(f"{path}, which {name} wrote, {there}: output_dir must be on a disk that all machines share")


def require_shared_folder(folder: Path) -> None:
    """Raise UserError, on all ranks, where one of them does not see what the first one writes into the folder."""
    with ExitStack() as stack:
        mark = str(stack.enter_context(hidden_file(folder))) if ranks.rank() == 0 else None
        mark = ranks.from_first_rank(mark)
        blind = [name for name, is_there in ranks.gathered([rank_name(), Path(mark).exists()]) if not is_there]
    if blind:
        raise UserError(
            f"output_dir = '{folder}' is not the same folder for all ranks: {', '.join(blind[:8])} "
            f"{'sees' if len(blind) == 1 else 'see'} nothing of what the first rank writes there",
            hint="every rank writes its part of a checkpoint, so output_dir must be on a disk that all machines share",
        )
