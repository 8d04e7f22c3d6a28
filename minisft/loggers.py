"""Where the metrics of a run are kept: in JSON lines in the output folder, and in the trackers of `log.report_to`.

metrics.jsonl    one object a line, {"step": 10, "loss": 1.25, ...}: only values that are a function of the run, so that
                 a run that was killed and resumed leaves the same bytes as one that was not
timings.jsonl    the same shape for what depends on the clock and the machine: tokens/s, memory, and
                 data_wait_fraction, the share of the time in which the loop waits for its next batches
tensorboard/     and W&B, Trackio, MLflow: both kinds of values, as train/<name> and eval/<name>

JSON has no NaN, and a NaN loss must not look like a missing one: values that are not finite are written as the strings
"NaN", "Infinity", "-Infinity", which float() reads back.

A tracker never stops a run: its first exception is printed, and the tracker is switched off. A tracker whose package is
not installed is an error at the start. A full disk never stops a run either: lines and events wait until there is room.
"""

import importlib
import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from minisft.errors import UserError, warn

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
                warn(f"{name} could not start and is off: {error!r}")
        position = resume or {}
        self.metrics = LogFile(Path(output_dir) / "metrics.jsonl", position.get("metrics.jsonl", 0))
        self.timings = LogFile(Path(output_dir) / "timings.jsonl", position.get("timings.jsonl", 0))

    def log(self, step: int, values: dict[str, float], timings: dict[str, float] | None = None) -> None:
        """Log after optimizer step `step`. values: functions of the run alone; timings: what depends on the clock."""
        self.metrics.write(json_line({"step": step, **values}))
        if timings:
            self.timings.write(json_line({"step": step, **timings}))
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
        self.metrics.close()
        self.timings.close()

    def _safely(self, name: str, function: Callable, *arguments) -> None:
        try:
            function(*arguments)
        except Exception as error:
            warn(f"{name} failed and is off for the rest of the run: {error!r}")
            del self.trackers[name]


class LogFile:
    """A file that is appended to, cut to its first `position` bytes at the start.

    A full disk only delays what is written: bytes that find no room are kept and written before the next ones.
    """

    def __init__(self, path: Path, position: int = 0):
        self.path, self.pending = path, b""
        self.file = open(path, "ab", buffering=0)
        self.written = self.file.tell()
        if self.written < position:
            warn(f"{path} has {self.written} bytes, {position} when the checkpoint was saved: lines are missing")
        else:
            self.written = position
            self.file.truncate(position)

    def write(self, data: bytes) -> None:
        self.pending += data
        try:
            while self.pending:
                count = self.file.write(self.pending)
                self.written, self.pending = self.written + count, self.pending[count:]
        except OSError as error:
            warn(f"{self.path} could not be written, {len(self.pending)} bytes are waiting: {error}")

    def sync(self) -> int:
        """The number of bytes that were given, which are on the disk now unless a warning says otherwise."""
        try:
            os.fsync(self.file.fileno())
        except OSError as error:
            warn(f"{self.path}: {error}")
        return self.written + len(self.pending)

    def close(self) -> None:
        if self.pending:
            self.write(b"")
        self.file.close()


def json_line(values: dict[str, Any]) -> bytes:
    """The values as one line of JSON, also those that are not finite."""
    spelled = {key: _finite_or_string(value) for key, value in values.items()}
    return json.dumps(spelled, ensure_ascii=False, allow_nan=False).encode() + b"\n"


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


def write_report(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write lines of JSON for the user to look at after something went wrong, which a full disk must not hide."""
    try:
        path.write_bytes(b"".join(map(json_line, rows)))
    except OSError as error:
        warn(f"{path} could not be written: {error}")


# ------------------------------------------------------------------------------------------------- trackers


def _import(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"report_to names {package}, which is not installed",
            hint=f"pip install {package}, or take it out of report_to",
        ) from None


def _start_tensorboard(events, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    """Event files: records of one protobuf message each. TensorBoard's own writer does the same in a thread, which a full disk
    ends with a traceback. The session's start hides what an earlier process logged for the steps that come (again)."""
    record_writer = _import("tensorboard.summary.writer.record_writer").RecordWriter
    folder = output_dir / "tensorboard"
    folder.mkdir(exist_ok=True)
    now = time.time_ns()  # readers take files in the order of their names
    name = f"events.out.tfevents.{now // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{now}"
    file = LogFile(folder / name)
    records = record_writer(file)

    def write(**fields) -> None:
        records.write(events.Event(wall_time=time.time(), **fields).SerializeToString())

    def log(step: int, values: dict[str, float]) -> None:
        write(step=step, summary={"value": [{"tag": tag, "simple_value": value} for tag, value in values.items()]})

    write(file_version="brain.Event:2")
    start = events.SessionLog(status=events.SessionLog.START)
    write(step=resume["step"] + 1 if resume else 0, session_log=start)
    return log, file.close


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
    "tensorboard": ("tensorboard.compat.proto.event_pb2", _start_tensorboard),
    "wandb": ("wandb", _start_wandb),
    "trackio": ("trackio", _start_trackio),
    "mlflow": ("mlflow", _start_mlflow),
}
