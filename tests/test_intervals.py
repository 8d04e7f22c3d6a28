"""When a run evaluates, logs and saves, what a log line counts, and when failed saves and overflows end a run."""

import errno
import itertools
import json
import time
from functools import partial

import pytest
from tiny import logged, settings, train

from minisft import checkpoint, samples, sft
from minisft.data.tokenizer import load_tokenizer
from minisft.errors import NONFINITE, SAVE, UserError


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One folder for the runs of this file: they share rows, tokenizer and token cache."""
    folder = tmp_path_factory.mktemp("intervals")
    settings(folder)
    return folder


@pytest.fixture
def go(home, tmp_path):
    """A function that trains, in tmp_path/out unless told otherwise."""
    options = {"output_dir": str(tmp_path / "out"), "data.cache_dir": str(home / "cache")}
    return lambda **overrides: train(home, **options | overrides)


def steps_with(out, name: str, file: str = "metrics.jsonl") -> list[int]:
    """The steps at which a metric was logged."""
    rows = map(json.loads, (out / file).read_text().splitlines())
    return [row["step"] for row in rows if name in row]


# ---- when -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "max_steps, evaluate, log, save, eval_on_start", [(7, 3, 2, 4, False), (6, 2, 3, 1, True), (3, 5, 4, 8, True)]
)
def test_evaluations_logs_and_saves_come_at_their_steps_and_at_the_end(
    go, max_steps, evaluate, log, save, eval_on_start
):
    options = {"train.max_steps": max_steps, "evaluate.eval_steps": evaluate, "log.logging_steps": log}
    options |= {"checkpoint.save_steps": save, "checkpoint.save_total_limit": 9}
    out = go(**options, **{"data.eval_fraction": 0.1, "evaluate.eval_on_start": eval_on_start}).output_dir

    def expected(interval):
        return sorted({*range(interval, max_steps + 1, interval), max_steps})

    assert steps_with(out, "eval_loss") == [0] * eval_on_start + expected(evaluate)
    assert steps_with(out, "loss") == steps_with(out, "tokens_per_second", "timings.jsonl") == expected(log)
    saved = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in expected(save)]


# ---- what a line counts -----------------------------------------------------------------------------------------


def test_a_line_counts_the_steps_since_the_last_one(go, tmp_path, monkeypatch):
    """Nine steps in windows of 4, 4 and 1. Every step takes a second, after a second in which its data is made."""
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    options = {"train.max_steps": 9, "data.eval_fraction": 0.1}
    every = go(output_dir=str(tmp_path / "every"), **options).output_dir
    windows = go(**options, **{"log.logging_steps": 4}).output_dir
    of = partial(logged, every)
    for name in ("num_tokens", "learning_rate", "epoch"):  # where the run is
        assert logged(windows, name) == [of(name)[i] for i in (3, 7, 8)]
    norms = of("grad_norm")
    means = [sum(norms[:4]) / 4, sum(norms[4:8]) / 4, norms[8]]
    assert logged(windows, "grad_norm") == pytest.approx(means, rel=1e-12)  # fp64 sums
    at = [0, *logged(windows, "num_tokens")]
    rows = [json.loads(line) for line in (windows / "timings.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows]
    assert speeds == [(b - a) / (2 * steps) for a, b, steps in zip(at, at[1:], (4, 4, 1))]
    assert [row["data_wait_fraction"] for row in rows] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_lines_are_for_everybody_and_the_bar_is_for_terminals(go, capsys, monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    go(**{"log.progress_bar": True, "train.max_steps": 3})
    out, err = capsys.readouterr()
    assert "step 3/3  loss" in out + err and ("3/3" in err) == is_terminal
    go(**{"train.max_steps": 4})  # without log.progress_bar neither is there
    out, err = capsys.readouterr()
    assert "step 4/4  loss" not in out and err == ""


def test_exact_match_is_the_share_of_right_completions(go, home, monkeypatch):
    tokenizer = load_tokenizer(home / "tokenizer")
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()[:3]]
    outputs = [tokenizer.encode(text) for text in (rows[0]["completion"], "neither", rows[2]["completion"])]
    monkeypatch.setattr(samples, "generate", lambda *arguments, **options: outputs)
    data = {"evaluate.generate_data": str(home / "rows.jsonl[:3]"), "train.max_steps": 1}
    result = go(**data)
    assert result.metrics["eval_exact_match"] == 2 / 3
    lines = (result.output_dir / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["correct"] for line in lines] == [True, False, True]


def test_a_run_killed_before_its_samples_completes_them_at_the_next_start(go, home, tmp_path, monkeypatch, capsys):
    data = {"evaluate.generate_data": str(home / "rows.jsonl[:3]"), "train.max_steps": 1}
    whole = go(output_dir=str(tmp_path / "whole"), **data).output_dir
    for killed in ("complete", "console.write_samples"):
        with monkeypatch.context() as patch:
            patch.setattr(f"minisft.finish.{killed}", lambda *arguments, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                go(**data, **{"checkpoint.resume": "never"})
        out = tmp_path / "out"
        written = (out / "model" / "model.safetensors").stat().st_mtime_ns
        assert not (out / "samples.jsonl").exists()
        capsys.readouterr()
        assert go(**data).metrics.keys() >= {"eval_exact_match"}
        for name in ("samples.jsonl", "metrics.jsonl"):
            assert (out / name).read_bytes() == (whole / name).read_bytes()
        assert (out / "model" / "model.safetensors").stat().st_mtime_ns == written  # the export was whole
        assert "finished already" not in capsys.readouterr().out
        go(**data)
        assert "finished already" in capsys.readouterr().out


# ---- failures that a run survives, and those that end it --------------------------------------------------------


@pytest.mark.parametrize(
    "failing, ends_at",
    [([1, 2, 4, 5], None), ([2, 3, 4], 4), ([6], 6), ([1, 2, 6], 6)],
    ids=["two in a row", "three in a row", "the last", "the last after others"],
)
def test_failed_saves_end_a_run_after_the_third_in_a_row_or_the_last(go, monkeypatch, failing, ends_at):
    honest = checkpoint.save_checkpoint

    def save_checkpoint(folder, step, **arguments):
        if step in failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(folder, step, **arguments)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_checkpoint)
    options = {"train.max_steps": 6, "checkpoint.save_steps": 1}
    if ends_at is None:
        assert go(**options).exit_code == 0
    else:
        with pytest.raises(UserError, match=f"checkpoint of step {ends_at} could not be saved") as caught:
            go(**options)
        assert caught.value.exit_code == SAVE


def test_overflows_of_fp16_end_a_run_once_the_scale_is_below_1(go, monkeypatch):
    """From 2^16 it is halved 16 times, down to 1; the seventeenth overflow is no matter of the scale."""
    honest = sft.loss

    def loss(*arguments, **options):
        total, metrics = honest(*arguments, **options)
        return total * float("inf"), metrics

    monkeypatch.setattr(sft, "loss", loss)
    options = {"train.precision": "fp16", "train.per_device_train_batch_size": 1}
    assert go(**options, **{"train.max_steps": 16}).exit_code == 0
    with pytest.raises(UserError, match="step 17: the loss or a gradient is not finite") as caught:
        go(**options, **{"train.max_steps": 20, "checkpoint.resume": "never"})
    assert caught.value.exit_code == NONFINITE
