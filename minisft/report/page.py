"""The report of one run, or of several beside each other, as one HTML page that needs nothing else. page.html is the template."""

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minisft.atomic_folder import write_file
from minisft.data.audit import length_histogram
from minisft.data.audit_page import environment_of, rows_of
from minisft.errors import UserError
from minisft.record import trained_documents, trained_stream
from minisft.report.charts import PALETTE, Chart, Line, draw
from minisft.report.runs import RunLog, differences
from minisft.units import digits

EXAMPLES = 6  # rows with their masks
TOKENS_SHOWN = 600  # of one
ROWS_OF_A_STREAM = 1000  # that are read
MOST_PROMPTS, MOST_STEPS = 10, 12  # whose samples are shown

TITLES = {  # the first charts, in this order; whatever else was logged follows under its own name
    "loss": "Loss",
    "mean_token_accuracy": "Token accuracy",
    "entropy": "Entropy (nats)",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "peak_memory_gib": "Peak memory (GiB)",
    "packing_fill": "Fill of the packs",
    "data_wait_fraction": "Share of time waiting for data",
}
NOT_DRAWN, NOT_SMOOTHED = ("epoch", "num_tokens"), ("learning_rate", "peak_memory_gib")
RESULTS = ("loss", "eval_loss", "eval_exact_match", "num_tokens", "epoch", "tokens_per_second", "peak_memory_gib")


def write_report(path: Path, runs: list[RunLog], pictures: Path | None = None) -> int:
    """Write the page, and with `pictures` every chart as a PNG there; returns the number of charts. Raises UserError."""
    shown = list(charts(runs))
    examples, note = [], ""
    try:
        lengths, examples = data_of(runs[0].folder)
        shown.append(lengths)
    except (UserError, OSError) as error:
        note = f"no rows and lengths are shown: {str(error).splitlines()[0]}"
    environment = environment_of(Path(__file__).parent)
    page = environment.get_template("page.html").render(
        runs=runs,
        colours=[f"--line-{i % len(PALETTE)}" for i in range(len(runs))],
        results=results(runs),
        charts=[(chart.title, draw(chart, "svg").decode()) for chart in shown],
        differences=differences(runs) if len(runs) > 1 else [],
        num_same=sum(1 for key in runs[0].config if all(r.config.get(key) == runs[0].config[key] for r in runs)),
        samples=[(run.name, samples_of(run)) for run in runs if run.samples],
        examples=examples,
        note=note,
    )
    if pictures is not None:
        pictures.mkdir(exist_ok=True)
        for chart in shown:
            name = "".join(c if c.isalnum() or c in "-_." else "_" for c in chart.title)
            (pictures / f"{name}.png").write_bytes(draw(chart, "png"))
    write_file(path, page, hint="name another file by --out")
    return len(shown)


# ---- charts -----------------------------------------------------------------------------------------------------


def charts(runs: list[RunLog]) -> Iterator[Chart]:
    """A chart for each metric, with the values of its evaluations. Of a single run the losses of all kinds of tokens, or sources,
    are one."""
    names = list(dict.fromkeys(name for run in runs for name in run.series if name not in NOT_DRAWN))
    metrics = list(dict.fromkeys([*TITLES, *(name for name in names if not name.startswith("eval_"))]))
    of_metric: dict[str, list[str]] = {metric: [metric] for metric in metrics}
    for name in names:
        if name.startswith("eval_"):
            ends = [metric for metric in metrics if name == f"eval_{metric}" or name.endswith(f"_{metric}")]
            of_metric.setdefault(max(ends, key=len, default=name), []).append(name)
    if len(runs) == 1:
        yield from _charts_of_one(runs[0], of_metric)
        return
    for metric, drawn in of_metric.items():
        lines = [
            Line(" ".join(filter(None, [run.name, _set_of(name, metric)])), run.series[name], colour, name != metric)
            for name in drawn
            for colour, run in enumerate(runs)
            if name in run.series
        ]
        if lines:
            yield Chart(TITLES.get(metric, metric), lines, smooth=metric not in NOT_SMOOTHED)


def _charts_of_one(run: RunLog, of_metric: dict[str, list[str]]) -> Iterator[Chart]:
    together: dict[str, list[Line]] = {}
    for metric, drawn in of_metric.items():
        for name in drawn:
            before, is_part, part = name.partition("losses/")
            title, label = TITLES.get(metric, metric), _set_of(name, metric) or "training"
            if is_part:
                kind = "Loss by source" if part.startswith("source ") else "Loss by kind"
                title, label = f"{kind}, {before.strip('_')}" if before else kind, part.removeprefix("source ")
            lines = together.setdefault(title, [])
            if name in run.series:
                lines.append(Line(label, run.series[name], len(lines), name.startswith("eval_")))
    for title, lines in together.items():
        if lines:
            yield Chart(title, lines, smooth=title not in [TITLES[name] for name in NOT_SMOOTHED])


def _set_of(name: str, metric: str) -> str:
    """What a line is beside its metric: "" for training, "evaluation", or the name of the evaluation set."""
    return "" if name == metric else name.removeprefix("eval_").removesuffix(metric).rstrip("_") or "evaluation"


def data_of(folder: Path) -> tuple[Chart, list[dict[str, Any]]]:
    """(the lengths of the training documents, some of them with their masks). Raises UserError where the data is not there any
    more."""
    title = "Documents by number of tokens"
    with TemporaryDirectory() as temporary:
        if (stream := trained_stream(folder)) is None:
            documents, tokenizer = trained_documents(folder)
        else:
            documents, tokenizer = stream.first_rows(Path(temporary), ROWS_OF_A_STREAM), stream.tokenizer
            title += f", of the first {ROWS_OF_A_STREAM:,} rows"
        bars = [(f"{each['from']:,}", each["documents"]) for each in length_histogram(documents.lengths)]
        rows = rows_of("train", documents, [], tokenizer, number=EXAMPLES, most_tokens=TOKENS_SHOWN)
    return Chart(title, [], bars=bars), rows


# ---- tables -----------------------------------------------------------------------------------------------------


def results(runs: list[RunLog]) -> list[tuple[str, list[str]]]:
    """(what, its last value in every run), and the best of each evaluation loss."""
    rows = [("steps", [f"{max((steps[-1] for steps, _ in run.series.values()), default=0):,}" for run in runs])]
    for name in dict.fromkeys([*RESULTS, *(name for run in runs for name in run.series if name.startswith("eval_"))]):
        if "losses/" in name or not any(name in run.series for run in runs):
            continue
        rows.append((name, [_number(run.series[name][1][-1]) if name in run.series else "-" for run in runs]))
        if name.startswith("eval_") and name.endswith("loss"):
            rows.append((f"best {name}", [_best(run, name) for run in runs]))
    return rows


def _best(run: RunLog, name: str) -> str:
    pairs = [(value, step) for step, value in zip(*run.series.get(name, ([], []))) if math.isfinite(value)]
    return f"{_number(min(pairs)[0])} at step {min(pairs)[1]:,}" if pairs else "-"


def _number(value: float) -> str:
    is_large = math.isfinite(value) and (abs(value) >= 1000 or value.is_integer() and abs(value) >= 10)
    return f"{value:,.0f}" if is_large else digits(value, 4) if math.isfinite(value) else str(value)


def samples_of(run: RunLog) -> list[dict[str, Any]]:
    """{"prompt", "answer", "outputs": [(step, output)]} of the prompts, in the order of the first samples."""
    steps = sorted({row["step"] for row in run.samples})
    chosen = {steps[i] for i in np.linspace(0, len(steps) - 1, min(MOST_STEPS, len(steps))).astype(int)}
    found: dict[str, dict[str, Any]] = {}
    for row in run.samples:
        if row["step"] in chosen:
            entry = found.setdefault(row["prompt"], {"prompt": row["prompt"], "answer": row["answer"], "outputs": []})
            entry["outputs"].append((row["step"], row["output"]))
    return list(found.values())[:MOST_PROMPTS]
