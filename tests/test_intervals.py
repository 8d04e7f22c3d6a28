"""When a run evaluates, logs and saves, what a log line counts, and when failed saves and overflows end a run."""

import errno
import itertools
import json
import time
from functools import partial

import pytest
from tiny import GPT2, logged, settings, train, weights

from minisft import samples, saver, sft
from minisft.data.cache import build_cache
from minisft.data.documents import select_documents
from minisft.data.row_format import FormatOptions
from minisft.data.sources import parse_source
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
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


@pytest.mark.parametrize("adapter", [False, True])
def test_samples_come_at_their_steps_and_change_nothing(go, home, tmp_path, adapter):
    """Dropout, noise, an open log window and a resume; weights and metrics to the byte."""
    options = {
        "train.max_steps": 7,
        "data.eval_fraction": 0.2,
        "train.neftune_noise_alpha": 5.0,
        "log.logging_steps": 3,
    }
    options |= {"train.optim": "schedule_free_adamw"}
    if adapter:
        base = go(output_dir=str(tmp_path / "base"), **{"train.max_steps": 1}).model_dir
        options |= {"model.config": None, "model.model_name_or_path": str(base), "lora.r": 2, "lora.lora_dropout": 0.2}
    else:
        options |= {"model.config": GPT2}  # which has dropout
    options |= {"train.lr_scheduler_type": "constant", "evaluate.max_new_tokens": 5}
    sampled = {"evaluate.sample_steps": 2, "evaluate.generate_samples_shown": 3}
    plain = go(output_dir=str(tmp_path / "plain"), **options).output_dir
    whole = go(output_dir=str(tmp_path / "whole"), **options, **sampled).output_dir
    out = go(**options | sampled | {"train.max_steps": 4}).output_dir
    out = go(**options, **sampled).output_dir
    assert weights(whole) == weights(plain) == weights(out)
    names = ("metrics.jsonl", "step_samples.jsonl")
    assert (whole / names[0]).read_bytes() == (plain / names[0]).read_bytes()
    assert (out / names[1]).read_bytes() == (whole / names[1]).read_bytes() and not (plain / names[1]).exists()
    rows = [json.loads(line) for line in (whole / "step_samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [step for step in (0, 2, 4, 6) for _ in range(3)]
    known = {
        row["prompt"]: row["completion"] for row in map(json.loads, (home / "rows.jsonl").read_text().splitlines())
    }
    assert all(known[row["prompt"]] == row["answer"] for row in rows) and len({row["prompt"] for row in rows}) == 3
    assert go(**options, **sampled | {"evaluate.sample_steps": 3}).step == 7  # no other run, so it is finished


@pytest.mark.parametrize("stop", ["memory", "none"])
def test_samples_that_find_no_memory_are_left_out(go, monkeypatch, capsys, stop):
    def generate(*arguments, **options):
        if stop == "memory":
            raise MemoryError
        return [[] for _ in arguments[1]]

    monkeypatch.setattr(samples, "generate", generate)
    result = go(**{"train.max_steps": 2, "evaluate.sample_steps": 1})
    assert result.step == 2
    assert capsys.readouterr().err.count("no samples of step") == (3 if stop == "memory" else 0)


def test_the_prompts_of_any_data_end_where_the_answer_begins(tmp_path):
    tokenizer = train_tokenizer([], vocab_size=259, chat_template="chatml")
    rows = {
        "talk": {"messages": [{"role": role, "content": f"{role}!"} for role in ("user", "assistant") * 2]},
        "pair": {"prompt": "why", "chosen": "because", "rejected": "no"},
        "text": {"text": "abcdefgh" * 4},
    }
    found = {}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        options = FormatOptions(answers="pairs" if name == "pair" else "chosen", prompt_format="auto")
        cache = build_cache(
            [parse_source(str(tmp_path / f"{name}.jsonl"))], tokenizer, cache_dir=tmp_path / "cache", options=options
        )
        documents, _ = select_documents(cache, max_length=None, truncation="right", seed=0)
        (found[name],) = samples.prompts_of(documents, tokenizer, 5)
    opener = "<|im_start|>assistant\n"
    assert found["talk"].text == f"<|im_start|>user\nuser!<|im_end|>\n{opener}" and found["talk"].answer == "assistant!"
    assert found["pair"].text == "why" and found["pair"].answer == "because"
    assert "abcdefgh" * 4 == found["text"].text + found["text"].answer.removesuffix("<|im_end|>")
    assert 8 <= len(found["text"].ids) <= 9


# ---- failures that a run survives, and those that end it --------------------------------------------------------


@pytest.mark.parametrize(
    "failing, ends_at",
    [([1, 2, 4, 5], None), ([2, 3, 4], 4), ([6], 6), ([1, 2, 6], 6)],
    ids=["two in a row", "three in a row", "the last", "the last after others"],
)
def test_failed_saves_end_a_run_after_the_third_in_a_row_or_the_last(go, monkeypatch, failing, ends_at):
    honest = saver.new_checkpoint

    def new_checkpoint(folder, step, **arguments):
        if step in failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(folder, step, **arguments)

    monkeypatch.setattr(saver, "new_checkpoint", new_checkpoint)
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
