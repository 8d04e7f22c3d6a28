"""Where the metrics of a run are kept: in JSON lines in the output folder, and in the trackers of `log.report_to`.

metrics.jsonl    one object a line, {"step": 10, "loss": 1.25, ...}: only values that are a function of the run, so that
                 a run that was killed and resumed leaves the same bytes as one that was not
timings.jsonl    the same shape for what depends on the clock and the machine: tokens/s, memory, and
                 data_wait_fraction, the share of the time in which the loop waits for its next batches
tensorboard/     and W&B, Trackio, MLflow: both kinds of values, as train/<name> and eval/<name>

JSON has no NaN, and a NaN loss must not look like a missing one: values that are not finite are written as the strings
"NaN", "Infinity", "-Infinity", which float() reads back.

A tracker never stops a run: its first exception is printed, and the tracker is switched off. A tracker whose package is
not installed is an error at the start.
"""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minisft.errors import UserError

Tracker = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]  # log(step, values), close()


class Loggers:
    """All destinations of one run. Only rank 0 makes one.

    report_to: names of TRACKERS. config: the resolved configuration, for trackers that show it. resume: {"step": ...,
    **position()} from the checkpoint: later lines are cut off. None starts all files anew.
    """

    def __init__(
        self, output_dir: Path, report_to: Sequence[str], run_name: str, config: dict, resume: dict | None = None
    ):
        for name in report_to:
            if name not in TRACKERS:
                raise UserError(f"report_to = {name!r} is unknown", hint=f"choose from {', '.join(TRACKERS)}")
        self.trackers: dict[str, Tracker] = {}
        for name in report_to:
            package, start = TRACKERS[name]
            try:
                self.trackers[name] = start(_import(package), Path(output_dir), run_name, config, resume)
            except UserError:
                raise
            except Exception as error:  # no network, no login, ...
                _tell(f"{name} could not start and is off: {error!r}")
        position = resume or {}
        self.metrics = JSONLines(Path(output_dir) / "metrics.jsonl", position.get("metrics.jsonl", 0))
        self.timings = JSONLines(Path(output_dir) / "timings.jsonl", position.get("timings.jsonl", 0))

    def log(self, step: int, values: dict[str, float], timings: dict[str, float] | None = None) -> None:
        """Log after optimizer step `step`. values: functions of the run alone; timings: what depends on the clock."""
        self.metrics.write({"step": step, **values})
        if timings:
            self.timings.write({"step": step, **timings})
        grouped = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in {**values, **(timings or {})}.items()
        }
        for name, (log, _) in list(self.trackers.items()):
            self._safely(name, log, step, grouped)

    def position(self) -> dict[str, int]:
        """Bytes written to each JSONL file, which are on disk now. A checkpoint stores them, and `resume` takes them."""
        return {"metrics.jsonl": self.metrics.sync(), "timings.jsonl": self.timings.sync()}

    def close(self) -> None:
        for name, (_, close) in list(self.trackers.items()):
            self._safely(name, close)
        self.trackers = {}
        self.metrics.file.close()
        self.timings.file.close()

    def _safely(self, name: str, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        except Exception as error:
            _tell(f"{name} failed and is off for the rest of the run: {error!r}")
            del self.trackers[name]


class JSONLines:
    """A file of one JSON object a line, cut to its first `position` bytes at the start.

    A full disk only delays lines: those that could not be written are kept and written before the next line.
    """

    def __init__(self, path: Path, position: int):
        self.path, self.pending = path, b""
        self.file = open(path, "ab", buffering=0)
        self.written = self.file.tell()
        if self.written < position:
            _tell(f"{path} has {self.written} bytes, {position} when the checkpoint was saved: lines are missing")
        else:
            self.written = position
            self.file.truncate(position)

    def write(self, values: dict) -> None:
        spelled = {key: _finite_or_string(value) for key, value in values.items()}
        self.pending += json.dumps(spelled, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            while self.pending:
                count = self.file.write(self.pending)
                self.written, self.pending = self.written + count, self.pending[count:]
        except OSError as error:
            _tell(f"{self.path} could not be written, {len(self.pending)} bytes are waiting: {error}")

    def sync(self) -> int:
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            _tell(f"{self.path}: {error}")
        return self.written + len(self.pending)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; without one that a full disk left unfinished."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(
                {key: float(value) if isinstance(value, str) else value for key, value in json.loads(line).items()}
            )
        except ValueError:
            continue
    return rows


def _finite_or_string(value):
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _tell(message: str) -> None:
    print(f"minisft: WARNING {message}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------- trackers


def _import(module: str):
    package = "tensorboard" if module == "torch.utils.tensorboard" else module
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"report_to names {package}, which is not installed",
            hint=f"pip install {package}, or take it out of report_to",
        ) from None


def _start_tensorboard(tensorboard, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    """purge_step hides what an earlier process logged for the steps that this one will take (again)."""
    purge_step = resume["step"] + 1 if resume else 0
    writer = tensorboard.SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge_step)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()  # or a killed run would lose up to two minutes

    return log, writer.close


def _start_wandb(wandb, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    """The run's id is kept in the output folder, so that a resumed run continues the same curves. The step is a value like
    the others, because W&B drops lines whose own step goes back, as it does after a resume."""
    id_file = output_dir / "wandb_run_id"
    run_id = id_file.read_text().strip() if resume and id_file.exists() else None
    run = wandb.init(dir=str(output_dir), name=run_name, config=config, id=run_id, resume="allow")
    id_file.write_text(run.id + "\n")
    run.define_metric("*", step_metric="step")
    return lambda step, values: run.log({"step": step, **values}), run.finish


def _start_trackio(trackio, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    trackio.init(project="minisft", name=run_name, config=config, resume="allow" if resume else "never")
    return lambda step, values: trackio.log(values, step=step), trackio.finish


def _start_mlflow(mlflow, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    id_file = output_dir / "mlflow_run_id"
    run_id = id_file.read_text().strip() if resume and id_file.exists() else None
    run = mlflow.start_run(run_id=run_id, run_name=run_name)
    id_file.write_text(run.info.run_id + "\n")
    if run_id is None:
        mlflow.log_dict(config, "config.json")
    return lambda step, values: mlflow.log_metrics(values, step=step), mlflow.end_run


TRACKERS = {
    "tensorboard": ("torch.utils.tensorboard", _start_tensorboard),
    "wandb": ("wandb", _start_wandb),
    "trackio": ("trackio", _start_trackio),
    "mlflow": ("mlflow", _start_mlflow),
}
