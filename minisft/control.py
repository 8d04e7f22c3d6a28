"""output_dir/control.toml: what somebody asks of a run while it trains.

    save = true               a checkpoint after the next step
    evaluate = true           an evaluation after it
    stop = true               a checkpoint after it, then exit code 75, as after a signal
    learning_rate = 1e-5      another peak, from the next step on: the schedule, its floor and the peaks of single parameters are
                              scaled by it over train.learning_rate

Rank 0 looks for the file before every step and renames it when it acts, so that it acts once: control-done-step-00000013.toml is
what was done in step 13. These files are the record. A run that resumes from a checkpoint before step 13 does it again in that
step, stopping excepted, and so ends as if it had not been interrupted; later checkpoints hold the learning rate. What cannot be
understood is a warning with the reason, once for each version of the file, and nothing of it is done.
"""

import os
import re
import tomllib
from dataclasses import MISSING, astuple, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path

from minisft.config.load import add_history
from minisft.config.sections import KEYS
from minisft.config.values import as_toml, expected, fit
from minisft.errors import UserError, shortened, tell, warn
from minisft.files import read_file

NAME = "control.toml"
DONE = re.compile(r"control-done-step-(\d{8,})\.toml")
MAX_BYTES = 2**16


@dataclass(frozen=True)
class Request:
    """What is asked for. All of it is numbers, which travel over the ranks."""

    save: bool = False
    evaluate: bool = False
    stop: bool = False
    learning_rate: float = 0.0  # 0: as it is

    def numbers(self) -> list[float]:
        return [float(value) for value in astuple(self)]

    @classmethod
    def of(cls, save: float, evaluate: float, stop: float, learning_rate: float) -> "Request":
        return cls(save > 0, evaluate > 0, stop > 0, learning_rate)

    def __str__(self) -> str:
        asked = {key: value for key, value in vars(self).items() if value}
        return ", ".join(f"{key} = {as_toml(value)}" for key, value in asked.items()) or "nothing"


class Control:
    """The control file of an output folder, for rank 0."""

    def __init__(self, folder: Path, step: int, can_evaluate: bool):
        """step: where the run starts; what was done later is done again. can_evaluate: the run has evaluation data."""
        self.path, self.can_evaluate = folder / NAME, can_evaluate
        self.refused: tuple[int, ...] = ()  # the version of the file that was not understood
        self.has_stopped = False
        self.again: dict[int, Request] = {}  # step -> what to do again in it
        self.back_to(step)

    def back_to(self, step: int) -> None:
        """The run is at this step now."""
        self.again = {}
        for path in sorted(self.path.parent.glob("control-done-step-*.toml")):
            if (match := DONE.fullmatch(path.name)) and int(match[1]) > step:
                try:
                    self.again[int(match[1])] = replace(self._read(path), stop=False)
                except UserError as error:
                    warn(f"{error.message}: what was done in that step is not done again")

    def lines(self) -> list[str]:
        """For the summary."""
        return [
            f"control    again in step {step}: {request} ({self.path.parent / done_name(step)})"
            for step, request in self.again.items()
            if request != Request()
        ]

    def before_step(self, step: int) -> Request:
        """What to do in this step (the first is 1), or after it."""
        again, new = self.again.pop(step, Request()), self._look(step)
        self.has_stopped = new.stop
        return Request(
            save=again.save or new.save,
            evaluate=again.evaluate or new.evaluate,
            stop=again.stop or new.stop,
            learning_rate=new.learning_rate or again.learning_rate,
        )

    def _look(self, step: int) -> Request:
        try:
            status = os.stat(self.path)
        except OSError:  # it is not there
            return Request()
        done, version = self.path.with_name(done_name(step)), (status.st_mtime_ns, status.st_size, status.st_ino)
        if not status.st_size or version == self.refused or done.exists():  # the last: its time is the next step
            return Request()
        try:
            request = self._read(self.path)
            os.replace(self.path, done)
        except (UserError, OSError) as error:
            self.refused = version
            reason = (
                error.message if isinstance(error, UserError) else f"{self.path} cannot be renamed: {error.strerror}"
            )
            warn(f"{reason}; nothing of it is done, and the run goes on")
            return Request()
        tell(f"step {step}: {request}, as {self.path} asked; it is {done.name} now")
        try:
            add_history(self.path.parent, {"step": step, "control": {k: v for k, v in vars(request).items() if v}})
        except UserError as error:
            warn(error.message)
        return request

    def _read(self, path: Path) -> Request:
        """Raises UserError."""
        data = read_file(path, at_most=MAX_BYTES)
        try:
            table = tomllib.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a TOML file: {error}") from None
        names, rate = [f.name for f in fields(Request)], KEYS["train.learning_rate"]
        for key, value in table.items():
            given = f"{path}: {shortened(key, 60)} = {shortened(as_toml(value), 60)}"
            if key not in names:
                near = get_close_matches(key, names, n=1)
                raise UserError(
                    f"{given}: " + (f"did you mean {near[0]}?" if near else f"the keys are {', '.join(names)}")
                )
            if key == "learning_rate":
                table[key] = fit(value, rate)
                if table[key] is MISSING:
                    raise UserError(f"{given}: expected {expected(rate)}")
            elif not isinstance(value, bool):
                raise UserError(f"{given}: expected true or false")
        if table.get("evaluate") and not self.can_evaluate:
            raise UserError(f"{path}: evaluate = true: this run has no evaluation data")
        return Request(**table)


def done_name(step: int) -> str:
    return f"control-done-step-{step:08d}.toml"
