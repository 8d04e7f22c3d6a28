"""What a run prints: lines of at most 100 columns that hold their numbers, and commands that can be pasted."""

import math
import re
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisft.best import Best
from minisft.console import (
    ProgressBar,
    closing,
    evaluation_lines,
    sample_report,
    step_line,
    summing_up,
    wrap,
)
from minisft.samples import Prompt, Sample
from minisft.units import digits, duration, size, thousands

NAMES = {"loss": "loss", "lr": "learning_rate", "grad": "grad_norm"}
REWARDS = {"acc": "rewards/accuracies", "margin": "rewards/margins"}
UNUSUAL = ["12345 non-finite steps skipped", "loss scale 0.00390625", "zero updates 100%"]
numbers = st.floats(width=32)  # NaN and infinities too


def values_of(preference: bool, value: float = 1.0) -> dict[str, float]:
    return dict.fromkeys([*NAMES.values(), *(REWARDS.values() if preference else ()), "entropy"], value)


@given(
    st.integers(1, 10**8),
    numbers,
    numbers,
    st.floats(0, 1e9),
    st.none() | st.floats(0, 1e8),
    st.lists(st.sampled_from(UNUSUAL)),
)
def test_lines_are_short_and_hold_their_numbers(step, value, reward, speed, left, unusual):
    values = values_of(True, value) | dict.fromkeys(REWARDS.values(), reward)
    line = step_line(step, 10**8, values, speed, left, unusual)
    of_set = evaluation_lines(step, 10**8, {f"eval_{'x' * 200}_{name}": v for name, v in values.items()})
    for text, names in ((line, NAMES | REWARDS), (of_set, {"loss": "loss"} | REWARDS)):
        assert max(map(len, text.splitlines())) <= 100
        for label, name in names.items():
            shown = float(re.search(rf"{label} (\S+)", text)[1])
            # three digits: half a unit of the third, at most 0.5 % of the number
            assert shown == pytest.approx(values[name], rel=5e-3, nan_ok=True)
    assert all(part in " ".join(line.split("\n")) for part in unusual) and "entropy" not in line + of_set


def test_a_usual_line_is_one_line():
    """Of preference tuning too, over 9,999 steps."""
    values = {"loss": 0.6931, "learning_rate": 4.9e-7, "grad_norm": 12.3}
    values |= {"rewards/accuracies": 0.78125, "rewards/margins": 0.01193, "entropy": 1.0}
    assert step_line(20, 9999, values, 2231.0, 725.0, []) == (
        "step   20/9999  loss 0.6931  lr 4.90e-7  grad 12.3  acc 0.781  margin 0.0119  2.23k tok/s  ETA 12m"
    )
    scores = {"eval_loss": 0.5, "eval_rewards/margins": 1.0, "eval_b_loss": 2.0, "eval_b_entropy": 1.0}
    assert evaluation_lines(20, 9999, scores) == (
        "eval   20/9999  loss 0.5000  margin 1.00\neval   20/9999  b  loss 2.000"
    )


def test_numbers():
    assert [digits(x, 3) for x in (0.0, 1e-5, 0.0119, -4.494, 123.4, 12345.0, math.nan)] == [
        *("0.00", "1.00e-5", "0.0119", "-4.49", "123", "1.23e4", "nan")
    ]
    assert [thousands(x) for x in (0, 167.4, 999.9, 2234, 12_345, 3.17e6)] == [
        *("0.00", "167", "1.00k", "2.23k", "12.3k", "3.17M")
    ]
    assert [size(x) for x in (0, 999, 1000, 22_100, 999_700, 1.2e9, 9.6e10, 3e13)] == [
        *("0 bytes", "999 bytes", "1.00 kB", "22.1 kB", "1.00 MB", "1.20 GB", "96.0 GB", "30.0 TB")
    ]
    assert [duration(x) for x in (8.6, 65, 11520, 187_200)] == ["9s", "1m05s", "3h12m", "2d04h"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_every_log_step_stays_on_the_screen(monkeypatch, capsys, is_terminal):
    """On a terminal too, above the bar. What is unusual is said once: when it happens."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    seen = [{"loss_scale": 65536.0}, {"loss_scale": 32768.0}, {"loss_scale": 32768.0, "nonfinite_steps": 2}]
    seen += [{"nonfinite_steps": 2}, {"zero_update_fraction": 0.9}, {"zero_update_fraction": 0.1}]
    with ProgressBar(0, 6, enabled=True) as bar:
        for step, more in enumerate(seen, 1):
            bar.log(step, values_of(False) | more, 1000.0)
            bar.update()
        bar.evaluated(6, {"eval_loss": 1.0})
    out, err = capsys.readouterr()
    ends = ["scale 65536", "scale 32768", "2 non-finite steps skipped", "ETA 0s", "updates 90%", "tok/s", "loss 1.000"]
    lines = [line for line in out.splitlines() if line.startswith(("step", "eval"))]
    assert [line.endswith(end) for line, end in zip(lines, ends, strict=True)] == [True] * 7
    assert ("6/6" in err) == is_terminal


def test_a_summary_wraps_at_words():
    path = "/a" * 60
    lines = ["title      " + "some words " * 20, "           short", f"model      {path}, and more", "", "a\nb"]
    shown = wrap(lines)
    assert shown.split() == " ".join(lines).split()
    for line in shown.splitlines():
        assert len(line) <= 100 or line.strip() in (f"{path},", f"model      {path},")
    assert all(re.match(r"title      some|           \w", line) for line in shown.splitlines()[:3])
    assert shown.splitlines()[-2:] == ["a", "b"]


@pytest.mark.parametrize("base, ranks", [(None, 1), ("owner/base", 1), (None, 4)])
def test_the_closing_commands_can_be_pasted(tmp_path, monkeypatch, base, ranks):
    monkeypatch.setattr("minisft.ranks.world_size", lambda: ranks)
    folder = tmp_path / "my runs"
    (folder / "model").mkdir(parents=True)
    options = {"step": 7, "report_to": ("tensorboard",), "prompt": "What's 2 + 3?\\n", "longer": "--max_steps 14"}
    contents, commands = closing(folder, **options, base=base).split("\nnext:\n")
    launch = ["python"] if ranks == 1 else ["torchrun", "--nproc_per_node", "4"]
    export = ["python", "-m", "minisft", "export", str(folder), str(folder / "merged-7"), "--merge"]
    assert [shlex.split(line) for line in commands.splitlines()] == [
        ["python", "-m", "minisft", "generate", str(folder), "--prompt", "What's 2 + 3?\\n"],
        *([] if base is None else [export]),
        ["tensorboard", "--logdir", str(folder)],
        [*launch, "-m", "minisft", "train", str(folder / "config.toml"), "--max_steps", "14"],
    ]
    assert ("adapter" in contents, "owner/base" in contents) == (base is not None, base is not None)


def test_closing_commands_have_no_folder_and_no_prompt_that_are_read_as_options():
    said = closing(
        Path("-x"), step=7, report_to=("tensorboard",), prompt="-y", longer="--max_steps 14", base="owner/base"
    )
    assert [shlex.split(line)[3:] for line in said.split("\nnext:\n")[1].splitlines()] == [
        ["generate", "./-x", "--prompt=-y"],
        ["export", "./-x", "./-x/merged-7", "--merge"],
        [],
        ["train", "./-x/config.toml", "--max_steps", "14"],
    ]


def test_the_last_line_sums_up():
    rows = [
        {"step": 0, "eval_a_loss": math.nan},
        {"step": 2, "loss": 5.0, "num_tokens": 10},
        {"step": 2, "eval_a_loss": 3.0},
    ]
    rows += [{"step": 3, "eval_a_loss": 4.0, "eval_b_loss": 1.0}, {"step": 4, "loss": 0.25, "num_tokens": 12345}]
    assert (
        summing_up(rows, 65.0, 0) == "done: loss 5.000 -> 0.2500  best eval_a_loss 3.000 at step 2  12.3k tokens  1m05s"
    )
    assert summing_up([*rows[3:], {"step": 4, "eval_exact_match": 0.975}], 5.0, 2) == (
        "done: loss 0.2500 -> 0.2500  best eval_a_loss 4.000 at step 3  exact match 97.5%  12.3k tokens\n"
        + " " * 29
        + "5s since step 2"
    )
    assert summing_up([], 1.0, 0) == "done  1s"
    by_metric = summing_up(rows, 65.0, 0, "eval_b_rewards/accuracies", Best(0.75, 3))
    assert "  best eval_b_rewards/accuracies 0.7500 at step 3  " in by_metric


def test_long_samples_are_shortened():
    samples = [Sample(Prompt([1], "a" * 300, "c" * 300, "all"), "b" * 300), Sample(Prompt([1], "a", "b", "all"), "b")]
    report = sample_report(samples, 2)
    assert max(map(len, report.splitlines())) <= 100 and "'a' -> 'b'  (right)" in report
    assert all(word in report for word in ("prompt ", "wrong ", "expected "))
