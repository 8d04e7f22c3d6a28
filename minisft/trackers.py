"""The trackers of `log.report_to`, each by its own library, each in a thread of its own.

A tracker never stops a run and never slows it. Values are put into a queue, and the thread passes them on. What the library
raises is printed once and switches the tracker off. A library that hangs, because a server does not answer, holds up its own
thread only: one checkpoint waits FLUSH_SECONDS for it, the end of the run CLOSE_SECONDS, and the run goes on without it. Nothing
waits for a tracker that is off.

A function of TRACKERS starts a tracker: start(module, output_dir, run_name, config, resume) -> Tracker. resume is the state of
the checkpoint that a resumed run continues, or None. The id of the run is kept in the output folder, so that a resumed run
continues its own curves.
"""

import html
import importlib
import os
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from minisft.errors import UserError, warn
from minisft.log_files import LogFile

MOST_WAITING = 20_000  # calls that wait for a tracker; more are dropped, and the tracker is switched off
FLUSH_SECONDS = 1.0  # that a checkpoint waits for what was logged before it
CLOSE_SECONDS = 30.0  # that the end of a run waits for all trackers together

Rows = list[dict[str, str]]  # samples: {"prompt", "answer", "output"}


class Tracker(NamedTuple):
    """A tracker that was started."""

    log: Callable[[int, dict[str, float]], object]  # log(step, values)
    samples: Callable[[int, Rows], object]
    close: Callable[[], object]


class Sender:
    """A thread that starts a tracker and passes on what it is given, in order. Its methods never raise, and wait no longer than
    the seconds that they are given."""

    def __init__(self, name: str, start: Callable[[], Tracker]):
        self.name, self.calls = name, queue.Queue(MOST_WAITING)
        self.is_off = False  # it failed, or is closed
        self.is_late = False  # it did not keep up with a checkpoint: the next ones do not wait for it
        self.thread = threading.Thread(target=self._work, args=(start,), name=f"tracker {name}", daemon=True)
        self.thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        self._put("log", step, values)

    def samples(self, step: int, rows: Rows) -> None:
        self._put("samples", step, rows)

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Wait until all that was logged has been passed on, but no longer than so many seconds, and once only for a tracker that
        hangs."""
        if not self.is_off:
            passed_on = threading.Event()
            self._put(passed_on)
            self.is_late = not passed_on.wait(0.0 if self.is_late else seconds)

    def close(self) -> None:
        """Ask it to close; `join` waits for it."""
        self._put("close")

    def join(self, seconds: float) -> None:
        if not self.is_off:  # else nobody waits for it
            self.thread.join(seconds)
        if self.thread.is_alive():
            self._switch_off(f"has not finished after {CLOSE_SECONDS:g} s; the run goes on without it")

    def _put(self, *call) -> None:
        if self.is_off:
            return
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            self._switch_off(f"hangs, with {MOST_WAITING:,} values to log")

    def _switch_off(self, problem: str) -> None:
        if not self.is_off:
            self.is_off = True
            warn(f"{self.name} {problem}")

    def _work(self, start: Callable[[], Tracker]) -> None:
        what = "could not start and is off"
        try:
            tracker = start()
            what = "failed and is off for the rest of the run"
            while True:
                call, *arguments = self.calls.get()
                if isinstance(call, threading.Event):
                    call.set()
                    continue
                if not self.is_off or call == "close":
                    getattr(tracker, call)(*arguments)
                if call == "close":
                    self.is_off = True
                    return
        except BaseException as error:  # SystemExit too: a library must not end the run
            self._switch_off(f"{what}: {error!r}")
            while not self.calls.empty():  # nobody waits for a tracker that is off
                call, *_ = self.calls.get()
                if isinstance(call, threading.Event):
                    call.set()


def start_trackers(
    names: Sequence[str], output_dir: Path, run_name: str, config: dict, resume: dict | None
) -> list[Sender]:
    """Start all of them at once. Raises UserError for one that is unknown or not installed."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"report_to = {name!r} is unknown", hint=f"choose from {', '.join(TRACKERS)}")
    modules = [import_module(TRACKERS[name][0]) for name in names]
    return [
        Sender(name, lambda name=name, module=module: TRACKERS[name][1](module, output_dir, run_name, config, resume))
        for name, module in zip(names, modules)
    ]


def import_module(module: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"report_to names {package}, which is not installed",
            hint=f"pip install {package}, or take it out of report_to",
        ) from None


def as_markdown(rows: Rows) -> str:
    """Samples as a text that every tracker can show. Their own marks are no marks here: they stand in blocks of code."""
    blocks = []
    for number, row in enumerate(rows, 1):
        parts = [
            f"**{number}. {title}**\n\n" + "\n".join(f"    {line}" for line in row[title].split("\n")) for title in row
        ]
        blocks.append("\n\n".join(parts))
    return "\n\n---\n\n".join(blocks)


def flat(config: dict) -> dict[str, bool | int | float | str]:
    """The configuration as hyperparameters: numbers, truths and texts."""
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in config.items()}


def kept_id(output_dir: Path, tracker: str, resume: dict | None) -> str | None:
    """The id of the run that a resumed one continues."""
    file = output_dir / f"{tracker}_run_id"
    return file.read_text().strip() if resume and file.exists() else None


def keep_id(output_dir: Path, tracker: str, run_id: str) -> None:
    (output_dir / f"{tracker}_run_id").write_text(f"{run_id}\n")


# ---- the trackers -----------------------------------------------------------------------------------------------


def start_tensorboard(events, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    """Event files: records of one protobuf message each. TensorBoard's own writer does the same in a thread, which a full disk
    ends with a traceback. The session's start hides what an earlier process logged for the steps that come (again). The
    configuration is written as hyperparameters, by which TensorBoard compares runs (its HPARAMS tab)."""
    from torch.utils.tensorboard import summary

    record_writer = import_module("tensorboard.summary.writer.record_writer").RecordWriter
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

    def samples(step: int, rows: Rows) -> None:
        write(step=step, summary=summary.text("samples", as_markdown(rows)))

    write(file_version="brain.Event:2")
    start = events.SessionLog(status=events.SessionLog.START)
    write(step=resume["step"] + 1 if resume else 0, session_log=start)
    if not resume:
        compared = {"train/loss": 0.0, "eval/loss": 0.0, "train/tokens_per_second": 0.0}  # the names matter
        for one in summary.hparams(flat(config), compared)[:2]:  # what is compared, and this run's values
            write(step=0, summary=one)
    return Tracker(log, samples, file.close)


def start_wandb(wandb, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    """The step is a value like the others, because W&B drops lines whose own step goes back, as it does after a resume."""
    run = wandb.init(
        dir=str(output_dir),
        name=run_name,
        config=config,
        id=kept_id(output_dir, "wandb", resume),
        resume="allow",
        allow_val_change=True,
        settings=wandb.Settings(finish_timeout=CLOSE_SECONDS),
    )
    keep_id(output_dir, "wandb", run.id)
    run.define_metric("*", step_metric="step")

    def samples(step: int, rows: Rows) -> None:
        table = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        run.log(
            {"step": step, "samples": table, "samples_text": wandb.Html(f"<pre>{html.escape(as_markdown(rows))}</pre>")}
        )

    return Tracker(lambda step, values: run.log({"step": step, **values}), samples, run.finish)


def start_trackio(trackio, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    """On this machine, or on the server that the environment names: TRACKIO_SERVER_URL, TRACKIO_SPACE_ID."""
    kept = kept_id(output_dir, "trackio", resume)
    # a resume takes the newest run of a name, perhaps another folder's
    name = kept or f"{run_name}-{secrets.token_hex(3)}"
    trackio.init(project="minisft", name=name, config=flat(config), resume="allow" if kept else "never")
    keep_id(output_dir, "trackio", name)

    def log(step: int, values: dict[str, float]) -> None:
        trackio.log(values, step=step)

    def samples(step: int, rows: Rows) -> None:
        trackio.log({"samples": trackio.Markdown(as_markdown(rows))}, step=step)

    return Tracker(log, samples, trackio.finish)


def start_mlflow(mlflow, output_dir: Path, run_name: str, config: dict, resume: dict | None) -> Tracker:
    """Where the environment says: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME."""
    run_id = kept_id(output_dir, "mlflow", resume)
    run = mlflow.start_run(run_id=run_id, run_name=run_name)
    keep_id(output_dir, "mlflow", run.info.run_id)
    if run_id is None:
        mlflow.log_dict(config, "config.json")
        items = [(key, str(value)[:500]) for key, value in config.items()]
        for first in range(0, len(items), 100):  # as many as a server takes at once
            mlflow.log_params(dict(items[first : first + 100]))

    def log(step: int, values: dict[str, float]) -> None:
        # the characters that it takes
        known = {re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}
        mlflow.log_metrics(known, step=step)

    def samples(step: int, rows: Rows) -> None:
        mlflow.log_text(as_markdown(rows), f"samples/step-{step:08d}.md")

    return Tracker(log, samples, mlflow.end_run)


TRACKERS = {
    "tensorboard": ("tensorboard.compat.proto.event_pb2", start_tensorboard),
    "wandb": ("wandb", start_wandb),
    "trackio": ("trackio", start_trackio),
    "mlflow": ("mlflow", start_mlflow),
}
