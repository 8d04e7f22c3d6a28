"""What a run prints: a summary before the first step, a line for each log step and evaluation, and how it ended.

Everything but paths and commands fits in 100 columns. A line of a step has its loss, learning rate, gradient norm, tokens/s and
the time that is left; in preference tuning also rewards/accuracies (acc) and rewards/margins (margin). Whatever else is logged
is in metrics.jsonl and in the trackers.
"""

import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minisft import ranks
from minisft.atomic_folder import write_file
from minisft.best import Best
from minisft.errors import DISK
from minisft.samples import Sample, exact_match
from minisft.signals import BEFORE_STEPS
from minisft.units import digits, duration, thousands

WIDTH = 100  # columns
TITLE = 11  # columns of the titles of the summary


class ProgressBar:
    """The lines of a run while it trains; where stderr is a terminal, with one tqdm bar below them."""

    def __init__(self, step: int, total: int, enabled: bool, lose_reader: Callable[[], None] | None = None):
        """lose_reader: what to do where the reader of the output has ended; None: that is an error."""
        self.lose_reader = lose_reader
        self.first_step, self.total, self.enabled, self.began = step, total, enabled, time.perf_counter()
        self.step = step
        self.timed_from: tuple[int, float] | None = (
            None  # the first step and when it ended: it takes longer than others
        )
        self.num_skipped, self.num_spikes, self.loss_scale = 0, 0, math.inf  # as they were in the line before
        self.bar = tqdm(
            initial=step, total=total, unit="step", dynamic_ncols=True, disable=not enabled or not sys.stderr.isatty()
        )

    def log(self, step: int, values: dict[str, float], tokens_per_second: float) -> None:
        """Print the line of a log step."""
        if not self.enabled:
            return
        self.bar.set_postfix_str(f"loss {digits(values['loss'], 4)}", refresh=False)
        left = None
        if self.timed_from:
            first, then = self.timed_from
            left = (time.perf_counter() - then) / (step - first) * (self.total - step)
        self.say(step_line(step, self.total, values, tokens_per_second, left, self._unusual(values)))

    def evaluated(self, step: int, scores: dict[str, float]) -> None:
        """Print the lines of an evaluation."""
        self.say(evaluation_lines(step, self.total, scores))

    def say(self, line: str) -> None:
        """Print above the bar. A log on a full disk does not stop a run."""
        try:
            tqdm.write(line)
            print(end="", flush=True)
        except BrokenPipeError:
            if self.lose_reader is None:
                raise
            self.lose_reader()
        except OSError as error:
            if error.errno not in DISK:
                raise

    def update(self) -> None:
        self.step += 1
        self.timed_from = self.timed_from or (self.step, time.perf_counter())
        self.bar.update()

    def back_to(self, step: int) -> None:
        """The run went back to an earlier step."""
        self.step, self.timed_from, self.bar.n = step, None, step

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began

    def close(self) -> None:
        self.bar.close()

    def _unusual(self, values: dict[str, float]) -> list[str]:
        parts = []
        num_skipped, loss_scale = values.get("nonfinite_steps", 0), values.get("loss_scale", self.loss_scale)
        if num_skipped > self.num_skipped:
            parts.append(f"{num_skipped} non-finite steps skipped")
        num_spikes = values.get("spikes", 0)
        if num_spikes > self.num_spikes:
            parts.append(f"{num_spikes} {'spike' if num_spikes == 1 else 'spikes'}")
        if loss_scale < self.loss_scale:
            parts.append(f"loss scale {loss_scale:g}")
        if (fraction := values.get("zero_update_fraction", 0.0)) > 0.5:
            parts.append(f"zero updates {fraction:.0%}")
        self.num_skipped, self.num_spikes, self.loss_scale = num_skipped, num_spikes, loss_scale
        return parts

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def step_line(
    step: int,
    total: int,
    values: dict[str, float],
    tokens_per_second: float,
    seconds_left: float | None,
    unusual: list[str],
) -> str:
    """ "step 20/153  loss 0.6931  lr 7.50e-5  grad 4.49  2.23k tok/s  ETA 12m" """
    parts = [
        f"step {step:>{len(str(total))}}/{total}",
        f"loss {digits(values['loss'], 4)}",
        f"lr {digits(values['learning_rate'], 3)}",
        f"grad {digits(values['grad_norm'], 3)}",
        *_rewards(values, ""),
        f"{thousands(tokens_per_second)} tok/s",
    ]
    if seconds_left is not None and step < total:
        is_minutes = 60 <= seconds_left < 3600
        parts.append(f"ETA {seconds_left // 60:.0f}m" if is_minutes else f"ETA {duration(seconds_left)}")
    return fit(parts + unusual)


def evaluation_lines(step: int, total: int, scores: dict[str, float]) -> str:
    """ "eval 50/153  loss 0.6612  acc 0.643  margin 0.0731", a line for each evaluation set."""
    lines = []
    # not those of a part of the tokens
    totals = [key for key in scores if key.endswith("loss") and "losses/" not in key]
    for prefix in (key.removesuffix("loss") for key in totals):  # "eval_" or "eval_<name>_"
        name = prefix.removeprefix("eval_").removesuffix("_")
        lines.append(
            fit(
                [
                    f"eval {step:>{len(str(total))}}/{total}",
                    *([name[:40]] if name else []),
                    f"loss {digits(scores[f'{prefix}loss'], 4)}",
                    *_rewards(scores, prefix),
                ]
            )
        )
    return "\n".join(lines)


def sample_lines(step: int, total: int, samples: list[Sample]) -> str:
    """ "sample 50/153  '3+4=' -> '7'", a line for each; of a long prompt its end."""
    head, lines = f"sample {step:>{len(str(total))}}/{total}", []
    for sample in samples:
        prompt, output = repr(sample.prompt.text), repr(sample.output)
        room = WIDTH - len(head) - 6  # of both texts, with "  " and " -> " between
        if len(prompt) + len(output) > room:
            most = max(room // 2, room - len(output))
            prompt = prompt if len(prompt) <= most else "..." + prompt[3 - most :]
        lines.append(shortened(f"{head}  {prompt} -> {output}"))
    return "\n".join(lines)


def _rewards(values: dict[str, float], prefix: str) -> list[str]:
    shown = {"acc": f"{prefix}rewards/accuracies", "margin": f"{prefix}rewards/margins"}
    return [f"{label} {digits(values[name], 3)}" for label, name in shown.items() if name in values]


def aligned(rows: list[tuple[str, ...]], left: int) -> list[str]:
    """The rows of a table as lines: the first `left` columns begin at one place, the numbers after them end at one."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    )
    return [line.rstrip() for line in lines]


def wrap(lines: list[str], indent: int = TITLE) -> str:
    """The lines broken between words at column 100; what follows a break is indented. A path or a long word stays whole."""
    options = {"subsequent_indent": " " * indent, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(textwrap.fill(line, WIDTH, **options) for line in "\n".join(lines).split("\n"))


def fit(parts: list[str]) -> str:
    """The parts in one line, or in several where they are wider than 100 columns."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= WIDTH:
            lines[-1] += "  " + part
        else:
            lines.append(" " * (len(parts[0]) + 2) + part)
    return "\n".join(lines)


# ---- the end ------------------------------------------------------------------------------------------------------


def write_samples(path: Path, samples: list[Sample]) -> None:
    rows = (
        {
            "prompt": s.prompt.text,
            "answer": s.prompt.answer,
            "output": s.output,
            "correct": s.correct,
            "group": s.prompt.group,
        }
        for s in samples
    )
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def sample_report(samples: list[Sample], num_shown: int) -> str:
    """Some samples, then the exact-match rate of every group and of all."""
    lines = ["", "held-out prompts, completed by the model:"]
    step = max(1, len(samples) // max(1, num_shown))
    for sample in samples[::step][:num_shown]:
        mark = "right" if sample.correct else f"wrong, expected {sample.prompt.answer!r}"
        line = f"  {sample.prompt.text!r} -> {sample.output!r}  ({mark})"
        if len(line) <= WIDTH:
            lines.append(line)
            continue
        mark = "right" if sample.correct else "wrong"
        texts = {"prompt": sample.prompt.text, mark: sample.output, "expected": sample.prompt.answer}
        lines += [shortened(f"  {title:<9} {text!r}") for title, text in texts.items()]
    table = exact_match(samples)
    right = sum(sample.correct for sample in samples)
    width = max(len(group) for group in (*table, "all"))
    lines += ["", "exact match on held-out prompts:"]
    for group, (good, total) in (*(table.items() if len(table) > 1 else ()), ("all", (right, len(samples)))):
        lines.append(f"  {group:<{width}}  {good:>4} / {total:<4}  {good / total:>6.1%}")
    return "\n".join(lines)


def shortened(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..."


def closing(
    folder: Path, *, step: int, report_to: tuple[str, ...], prompt: str, longer: str, base: str | None = None
) -> str:
    """The contents of the output folder, and commands to paste for what comes next.

    prompt: one to try. longer: the option with which the run would take more steps. base: of an adapter, its base model.
    """
    contents = {
        "model/": "the trained model and tokenizer, as Hugging Face files",
        "checkpoints/": "to resume from, exactly",
        "metrics.jsonl": "the logged metrics, a JSON object a line",
        "timings.jsonl": "speed and memory",
        "samples.jsonl": "the completed prompts",
        "step_samples.jsonl": "what it answered during training",
        "ledger-rank-0.bin": "each row's loss at each step, for `minisft ledger`",
        "tensorboard/": "all of these for TensorBoard",
        "summary.txt": "the data, the trained parameters, the arithmetic of the steps",
        "config.toml": "the whole configuration, with where each value came from",
        "record.json": "hashes of base, data and code, and versions, for `minisft diff`",
    }
    if base is not None:
        contents["model/"] = f"the trained adapter and tokenizer, as PEFT files; its base is {base}"
    lines = ["", f"{folder}/"]
    lines += [f"  {name:<19} {what}" for name, what in contents.items() if (folder / name).exists()]
    place = f"./{folder}" if str(folder).startswith("-") else str(folder)  # else a command reads it as an option
    asked = [f"--prompt={prompt}"] if prompt.startswith("-") else ["--prompt", prompt]
    launch = ["python"]
    if ranks.world_size() > 1:
        launch = ["torchrun", "--nproc_per_node", str(ranks.world_size())]
    commands = [["python", "-m", "minisft", "generate", place, *asked]]
    if base is not None:
        commands.append(["python", "-m", "minisft", "export", place, f"{place}/merged-{step}", "--merge"])
    if "tensorboard" in report_to:
        commands.append(["tensorboard", "--logdir", place])
    commands.append([*launch, "-m", "minisft", "train", f"{place}/config.toml", *longer.split()])
    return "\n".join([*lines, "", "next:", *(f"  {shlex.join(command)}" for command in commands)])


def summing_up(
    rows: list[dict[str, float]],
    seconds: float,
    first_step: int,
    best_metric: str | None = None,
    best: Best | None = None,
) -> str:
    """The last line of a run.

    rows: its metrics.jsonl. first_step: where this process began, which took so many seconds. best: the best evaluation, where
    the run compares them by a metric; otherwise it is the one with the lowest loss of the first set.
    """
    losses = [row["loss"] for row in rows if "loss" in row]
    parts = [f"done: loss {digits(losses[0], 4)} -> {digits(losses[-1], 4)}"] if losses else ["done"]
    name = next((key for row in rows for key in row if key.startswith("eval_") and key.endswith("loss")), None)
    evaluated = [(row[name], row["step"]) for row in rows if name in row and not math.isnan(row[name])]
    if best_metric and best and best.step:
        parts.append(f"best {best_metric} {digits(best.value, 4)} at step {best.step}")
    elif evaluated:
        value, step = min(evaluated)
        parts.append(f"best {name} {digits(value, 4)} at step {step}")
    if rows and "eval_exact_match" in rows[-1]:
        parts.append(f"exact match {rows[-1]['eval_exact_match']:.1%}")
    if num_tokens := [row["num_tokens"] for row in rows if "num_tokens" in row]:
        parts.append(f"{thousands(num_tokens[-1])} tokens")
    return fit([*parts, duration(seconds) + (f" since step {first_step}" if first_step else "")])


def stages_closing(done: list[tuple[str, Any]]) -> str:
    """(title, finish.Result) of every stage -> a line for each."""
    lines = ["", "all stages are done:"]
    for title, result in done:
        loss = f", loss {digits(result.metrics['loss'], 4)}" if "loss" in result.metrics else ""
        lines.append(f"  {title:<30} {result.step:,} steps{loss}: {result.model_dir}")
    return "\n".join(lines)


def finished_already(folder: Path, step: int) -> str:
    line = (
        f"finished already, at step {step}: the model is in {folder}/model. To train longer, raise --num_train_epochs or "
        "--max_steps; to start over, choose another --output_dir or --resume never"
    )
    return wrap([line], indent=2)


def stopped_early(step: int, metric: str | None, best: Best) -> str:
    line = f"stopped early after step {step}: {metric} is no better since step {best.step}, where it was "
    return wrap([line + digits(best.value, 4)], indent=2)


def stopped(folder: Path, step: int, total: int, signal: str | None, resume: str) -> str:
    """resume: what the run was told about it, and would be told again by the same command."""
    line = f"stopped by {signal or 'a signal to another rank'} "
    again = "the same command resumes" if resume == "auto" else "the same command with --resume auto goes on"
    line += f"after step {step} of {total}, saved in {folder}/checkpoints; {again}" if step else BEFORE_STEPS
    return wrap([line], indent=2)
