"""What a run prints: one progress bar, or plain lines where the output is not a terminal, and a summary at the end."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minisft.best import Best
from minisft.samples import Sample, exact_match

NOT_SHOWN = ("logps/", "logits/")  # metrics that are logged and not printed: a line has room for the rewards only


class ProgressBar:
    """One tqdm bar with loss, learning rate, tokens/s and ETA. Where the output is not a terminal, a line for each log step."""

    def __init__(self, step: int, total: int, enabled: bool):
        self.enabled = enabled
        self.bar = tqdm(
            initial=step, total=total, unit="step", dynamic_ncols=True, disable=not enabled or not sys.stderr.isatty()
        )

    def show(self, *, loss: float, lr: float, tok_s: float) -> None:
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {tok_s:,.0f} tok/s", refresh=False)

    def log(self, line: str) -> None:
        """A line that is printed only where the bar is not shown."""
        if self.enabled and self.bar.disable:
            print(line, flush=True)

    def say(self, line: str) -> None:
        """A line that is always shown, above the bar."""
        tqdm.write(line)

    def update(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def console_line(step: int, values: dict[str, float]) -> str:
    """ "step 10 | loss 1.2500 | learning_rate 2.00e-05 | num_tokens 40960": one line for people."""
    shown = {name: value for name, value in values.items() if not any(part in name for part in NOT_SHOWN)}
    return " | ".join([f"step {step}", *(f"{name} {_readable(value)}" for name, value in shown.items())])


def _readable(value: float) -> str:
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.2e}"


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
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def sample_report(samples: list[Sample], num_shown: int) -> str:
    """Some samples, then the exact-match rate of every group and of all."""
    lines = ["", "held-out prompts, completed by the model:"]
    step = max(1, len(samples) // max(1, num_shown))
    for sample in samples[::step][:num_shown]:
        mark = "right" if sample.correct else f"wrong, expected {sample.prompt.answer!r}"
        lines.append(f"  {sample.prompt.text!r} -> {sample.output!r}  ({mark})")
    table = exact_match(samples)
    right = sum(sample.correct for sample in samples)
    width = max(len(group) for group in (*table, "all"))
    lines += ["", "exact match on held-out prompts:"]
    for group, (good, total) in (*(table.items() if len(table) > 1 else ()), ("all", (right, len(samples)))):
        lines.append(f"  {group:<{width}}  {good:>4} / {total:<4}  {good / total:>6.1%}")
    return "\n".join(lines)


def closing(folder: Path, report_to: tuple[str, ...], prompt: str) -> str:
    """The contents of the output folder and what to do next. prompt: one to try."""
    shell_quoted = shlex.quote(prompt.replace("\n", "\\n"))
    contents = {
        "model/": "the trained model and tokenizer, as Hugging Face files",
        "checkpoints/": "to resume from, exactly",
        "metrics.jsonl": "the logged metrics, a JSON object a line",
        "timings.jsonl": "speed and memory",
        "samples.jsonl": "the completed prompts",
        "tensorboard/": "the same for TensorBoard",
        "summary.txt": "the data, the trained parameters, the arithmetic of the steps",
        "config.toml": "the whole configuration, with where each value came from",
    }
    lines = ["", f"{folder}/"]
    lines += [f"  {name:<15} {what}" for name, what in contents.items() if (folder / name).exists()]
    place = shlex.quote(str(folder))
    lines += ["", "next:", f"  python -m minisft generate {place} --prompt {shell_quoted}"]
    if "tensorboard" in report_to:
        lines.append(f"  tensorboard --logdir {place}")
    lines.append(
        f"  python -m minisft train {place}/config.toml with a larger --num_train_epochs or --max_steps trains longer"
    )
    return "\n".join(lines)


def stages_closing(done: list[tuple[str, Any]]) -> str:
    """(title, loop.Result) of every stage -> a line for each."""
    lines = ["", "all stages are done:"]
    for title, result in done:
        loss = f", loss {result.metrics['loss']:.4f}" if "loss" in result.metrics else ""
        lines.append(f"  {title:<30} {result.step:,} steps{loss}: {result.model_dir}")
    return "\n".join(lines)


def finished_already(folder: Path, step: int) -> str:
    return (
        f"finished already, at step {step}: the model is in {folder}/model. To train longer, raise --num_train_epochs or "
        "--max_steps; to start over, choose another --output_dir or --resume never"
    )


def stopped_early(step: int, metric: str | None, best: Best) -> str:
    return (
        f"stopped early after step {step}: {metric} is no better since step {best.step}, where it was {best.value:.4g}"
    )


def stopped(folder: Path, step: int, total: int, signal: str | None) -> str:
    signal = signal or "a signal to another rank"
    return f"stopped by {signal} after step {step} of {total}, saved in {folder}/checkpoints; the same command resumes"
