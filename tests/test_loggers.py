"""What is logged is what was given, once, also after a resume; no tracker and no full disk stops a run."""

import errno
import json
import math
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minisft.errors import CONFIG, UserError
from minisft.log_files import LogFile, json_line, read_metrics
from minisft.loggers import Loggers


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would show of a folder of event files."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_metrics_and_timings_go_to_their_files(tmp_path):
    loggers = Loggers(tmp_path, [], "run", {})
    loggers.log(1, {"loss": 1.25, "num_tokens": 7}, {"tokens_per_second": 3.5})
    loggers.log(2, {"eval_loss": 0.1})
    loggers.close()
    text = '{"step": 1, "loss": 1.25, "num_tokens": 7}\n{"step": 2, "eval_loss": 0.1}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == text
    assert (tmp_path / "timings.jsonl").read_text() == '{"step": 1, "tokens_per_second": 3.5}\n'


def test_values_that_are_not_finite_are_valid_json_and_read_back(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    loggers = Loggers(tmp_path, [], "run", {})
    loggers.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})
    loggers.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert row == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": 0.1}
    assert math.isnan(float(row["a"])) and float(row["b"]) == math.inf and float(row["c"]) == -math.inf
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "a"')  # the disk was full
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read.pop("a")) and read == {"step": 1, "b": math.inf, "c": -math.inf, "d": 0.1}


@pytest.mark.parametrize("killed_after", [2, 3, 5])
def test_a_resumed_log_is_byte_equal_to_an_uninterrupted_one(tmp_path, killed_after):
    def log(loggers, first, last):
        for step in range(first, last + 1):
            loggers.log(step, {"loss": 1 / step}, {"seconds": float(step)})

    whole = Loggers(tmp_path, [], "run", {})
    log(whole, 1, 6)
    whole.close()
    folder = tmp_path / "killed"
    folder.mkdir()
    killed = Loggers(folder, [], "run", {})
    log(killed, 1, 2)
    resume = json.loads(json.dumps({"step": 2, **killed.position()}))  # through a checkpoint
    log(killed, 3, killed_after)
    killed.close()
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": ')  # killed in the middle of a line
    resumed = Loggers(folder, [], "run", {}, resume)
    log(resumed, 3, 6)
    for name in ("metrics.jsonl", "timings.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    resumed.close()


def test_a_run_from_step_0_starts_its_files_anew(tmp_path):
    for value in (1.0, 2.0):
        loggers = Loggers(tmp_path, ["tensorboard"], "run", {})
        loggers.log(5, {"loss": value})
        loggers.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 2.0}]
    assert scalars(tmp_path / "tensorboard") == {"train/loss": [(5, 2.0)]}


def test_lost_lines_are_told(tmp_path, capsys):
    LogFile(tmp_path / "metrics.jsonl", 100).file.close()
    assert "has 0 bytes, 100 when the checkpoint was saved" in capsys.readouterr().err


def test_tensorboard_reads_the_events_and_a_resume_replaces_the_later_ones(tmp_path):
    first = Loggers(tmp_path, ["tensorboard"], "run", {})
    for step in (1, 2, 3):
        first.log(step, {"loss": step / 4, "eval_loss": 8.0}, {"tokens_per_second": 100})
    first.close()
    assert scalars(tmp_path / "tensorboard") == {
        "train/loss": [(1, 0.25), (2, 0.5), (3, 0.75)],
        "eval/loss": [(1, 8.0), (2, 8.0), (3, 8.0)],
        "train/tokens_per_second": [(1, 100.0), (2, 100.0), (3, 100.0)],
    }
    second = Loggers(tmp_path, ["tensorboard"], "run", {}, {"step": 1, "metrics.jsonl": 0, "timings.jsonl": 0})
    second.log(2, {"loss": 16.0})
    second.close()
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(1, 0.25), (2, 16.0)]


def test_unknown_and_missing_trackers_are_user_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="report_to = 'tensorbord'") as error:
        Loggers(tmp_path, ["tensorbord"], "run", {})
    assert "tensorboard" in error.value.hint and error.value.exit_code == CONFIG
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match="wandb, which is not installed") as error:
        Loggers(tmp_path, ["wandb"], "run", {})
    assert "pip install wandb" in error.value.hint


class FakeTracker(types.ModuleType):
    """Stands for wandb, trackio and mlflow: remembers what it was called with, raises where it is told to."""

    def __init__(self, fail_at: str = ""):
        super().__init__("fake")
        self.calls, self.fail_at = [], fail_at
        self.id = self.run_id = "r1"
        self.info = self

    def __getattr__(self, function):
        def call(*args, **kwargs):
            self.calls.append((function, args, kwargs))
            if function == self.fail_at:
                raise ConnectionError("no network")
            return self

        return call


TRACKER_CALLS = {
    "wandb": ("init", "log", "finish"),
    "trackio": ("init", "log", "finish"),
    "mlflow": ("start_run", "log_metrics", "end_run"),
}


@pytest.mark.parametrize("name", TRACKER_CALLS)
def test_trackers_get_every_value_with_its_step(tmp_path, monkeypatch, name):
    fake = FakeTracker()
    monkeypatch.setitem(sys.modules, name, fake)
    start, log, close = TRACKER_CALLS[name]
    for resume in (None, {"step": 1, "metrics.jsonl": 0, "timings.jsonl": 0}):
        loggers = Loggers(tmp_path, [name], "my run", {"seed": 3}, resume)
        loggers.log(2, {"loss": 0.5, "eval_loss": 0.25})
        loggers.close()
    logged = [(args, kwargs) for call, args, kwargs in fake.calls if call == log]
    values = {"train/loss": 0.5, "eval/loss": 0.25}
    expected = (({"step": 2, **values},), {}) if name == "wandb" else ((values,), {"step": 2})
    assert logged == [expected, expected]
    assert [call for call, _, _ in fake.calls].count(close) == 2
    (_, _, first), (_, _, second) = (call for call in fake.calls if call[0] == start)
    assert any(str(value).startswith("my run") for value in first.values()) and first != second


@pytest.mark.parametrize("name", TRACKER_CALLS)
@pytest.mark.parametrize("when", [0, 1, 2], ids=["start", "log", "close"])
def test_a_tracker_that_raises_is_told_once_and_switched_off(tmp_path, monkeypatch, capsys, name, when):
    fake = FakeTracker(fail_at=TRACKER_CALLS[name][when])
    monkeypatch.setitem(sys.modules, name, fake)
    loggers = Loggers(tmp_path, [name, "tensorboard"], "run", {})
    for step in (1, 2, 3):
        loggers.log(step, {"loss": 1.0})
    loggers.close()
    told = capsys.readouterr().err
    assert told.count(name) == 1 and "no network" in told
    assert [call for call, _, _ in fake.calls].count(TRACKER_CALLS[name][when]) == 1
    assert len(lines(tmp_path / "metrics.jsonl")) == 3  # and nobody else was harmed
    assert len(scalars(tmp_path / "tensorboard")["train/loss"]) == 3


def test_a_full_disk_delays_lines_but_loses_none(tmp_path, capsys):
    class Full:
        """A file whose disk is full for a while and takes half a line before it says so."""

        def __init__(self, file):
            self.file, self.full, self.room = file, False, 5

        def write(self, data):
            if not self.full:
                return self.file.write(data)
            if self.room:
                count, self.room = self.file.write(data[: self.room]), 0
                return count
            raise OSError(errno.ENOSPC, "No space left on device")

    log = LogFile(tmp_path / "metrics.jsonl", 0)
    real = log.file
    log.file = Full(real)
    for step in range(6):
        log.file.full = 2 <= step < 4
        log.write(json_line({"step": step}))
    log.file = real
    assert lines(tmp_path / "metrics.jsonl") == [{"step": step} for step in range(6)]
    assert log.sync() == (tmp_path / "metrics.jsonl").stat().st_size
    assert capsys.readouterr().err.count("No space left") == 2
    real.close()
