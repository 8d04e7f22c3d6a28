"""Where the metrics of a run are kept: in JSON lines in the output folder, and in the trackers of `log.report_to`.

metrics.jsonl         one object a line, {"step": 10, "loss": 1.25, ...}: only values that are a function of the run, so that
                      a run that was killed and resumed leaves the same bytes as one that was not
timings.jsonl         the same shape for what depends on the clock and the machine: tokens/s, memory, and
                      data_wait_fraction, the share of the time in which the loop waits for its next batches
step_samples.jsonl    what the model answered during training, {"step", "prompt", "answer", "output"} a line
tensorboard/          and W&B, Trackio, MLflow (trackers.py): values of both kinds, as train/<name> and eval/<name>; samples

A full disk never stops a run: lines wait until there is room (log_files.py). Nor does a tracker, which has a thread of its own.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from minisft.log_files import LogFile, json_line
from minisft.trackers import CLOSE_SECONDS, Rows, start_trackers

METRICS, TIMINGS, SAMPLES = FILES = "metrics.jsonl", "timings.jsonl", "step_samples.jsonl"


class Loggers:
    """All destinations of one run. Only rank 0 makes one.

    report_to: names of trackers.TRACKERS. config: the resolved configuration, for trackers that show it. resume: {"step": ...,
    **position()} from the checkpoint: later lines are cut off. None starts all files anew.
    """

    def __init__(
        self, output_dir: Path, report_to: Sequence[str], run_name: str, config: dict, resume: dict | None = None
    ):
        self.trackers = start_trackers(report_to, Path(output_dir), run_name, config, resume)
        self.folder, self.resumed = Path(output_dir), {name: (resume or {}).get(name, 0) for name in FILES}
        self.files = {name: self._open(name) for name in FILES if name != SAMPLES or (self.folder / name).exists()}

    def _open(self, name: str) -> LogFile:
        return LogFile(self.folder / name, self.resumed[name])

    def log(self, step: int, values: dict[str, float], timings: dict[str, float] | None = None) -> None:
        """Log after optimizer step `step`. values: functions of the run alone; timings: what depends on the clock."""
        self.files[METRICS].write(json_line({"step": step, **values}))
        if timings:
            self.files[TIMINGS].write(json_line({"step": step, **timings}))
        grouped = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in {**values, **(timings or {})}.items()
        }
        for tracker in self.trackers:
            tracker.log(step, grouped)

    def samples(self, step: int, rows: Rows) -> None:
        """What the model answered after optimizer step `step`: {"prompt", "answer", "output"} each."""
        if SAMPLES not in self.files:  # few runs have it
            self.files[SAMPLES] = self._open(SAMPLES)
        self.files[SAMPLES].write(b"".join(json_line({"step": step, **row}) for row in rows))
        for tracker in self.trackers:
            tracker.samples(step, rows)

    def position(self) -> dict[str, int]:
        """Bytes written to each file, which are on disk now. A checkpoint stores them, and `resume` takes them."""
        for tracker in self.trackers:
            tracker.flush()
        return self.resumed | {name: file.sync() for name, file in self.files.items()}

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self.trackers:
            tracker.join(max(0.0, deadline - time.monotonic()))
        self.trackers = []
        for file in self.files.values():
            file.close()
