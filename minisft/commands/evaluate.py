"""`minisft evaluate FOLDER --data FILE`: what a model makes of a data set, by kind of token and by source.

FOLDER is what `minisft generate` takes: a run's output folder, or any model folder, the base model too. The rows are read as in
training; for a run with its own data settings. Every number is a mean over exactly the tokens it names, so it is the same
whatever the batch size and the packing.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minisft.config.command_line import parse_arguments
from minisft.config.load import RESOLVED_NAME, load
from minisft.errors import UserError
from minisft.files import checked_path
from minisft.units import digits

if TYPE_CHECKING:
    from minisft.config.sections import Config

COLUMNS = ("tokens", "loss", "perplexity", "accuracy", "entropy", "probability")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="minisft evaluate",
        description="Loss, perplexity, accuracy and entropy of a data set, by kind of token and by source.",
        epilog="Other options are keys of the configuration, as for `minisft train`: --max_length 2048, --precision fp32. "
        "probability is the mean of p(target): for the terminator it says how surely answers end.",
    )
    parser.add_argument("folder", help="a model folder, or the output folder of a run")
    parser.add_argument("--data", metavar="FILE", action="append", required=True, help="rows; may be repeated")
    parser.add_argument("--json", action="store_true", help="print only the numbers, as JSON")
    arguments, others = parser.parse_known_args(argv)
    folder = Path(checked_path(arguments.folder, "the folder"))
    path, overrides = parse_arguments(others)
    if path is not None:
        raise UserError(f"command line: {path}: one folder is evaluated", hint="name data with --data")
    with tempfile.TemporaryDirectory() as temporary:
        config = configuration(folder, arguments.data, overrides, temporary)
        lines, parts = _evaluate(config, folder)
    if arguments.json:
        finite = {name: {key: spelled(value) for key, value in means.items()} for name, means in parts.items()}
        print(json.dumps(finite, indent=2, allow_nan=False, ensure_ascii=False))
        return 0
    from minisft.console import wrap

    print("\n".join([wrap(lines), "", *table(parts)]))
    return 0


def configuration(folder: Path, data: list[str], overrides: dict, temporary: str) -> "Config":
    """That of the run, or the default one, with these rows as its training data."""
    run = next((place for place in (folder, folder.parent) if (place / RESOLVED_NAME).exists()), None)
    values = {"data.train_data": data, "data.eval_data": [], "data.eval_fraction": 0.0}
    if run is None:
        values |= {"model.model_name_or_path": str(folder), "output_dir": temporary, "data.cache_dir": temporary}
    config, _ = load(run / RESOLVED_NAME if run else {}, {**values, **overrides}, origin="command line")
    return replace(config, verbose=False)


def _evaluate(config: "Config", folder: Path) -> tuple[list[str], dict[str, dict[str, float]]]:
    """(lines about the data, the scores by part)"""
    from minisft import runtime
    from minisft.answers import open_model
    from minisft.evaluation import scores
    from minisft.prepare.data import prepare_data

    device = runtime.pick_device(config.train.device)
    answerer = open_model(folder)
    loader, _, lines = prepare_data(config, answerer.tokenizer)
    if sys.stderr.isatty():
        print(f"{loader.steps_per_epoch:,} batches ...", file=sys.stderr)
    found = scores(
        answerer.model,
        replace(loader, shuffle=False, accumulation=1),
        device,
        runtime.pick_precision(config.train.precision, device),
    )
    return lines, found


def spelled(value: float) -> float | str:
    """A number that JSON has; else its name."""
    return value if math.isfinite(value) else str(value)


def table(parts: dict[str, dict[str, float]]) -> list[str]:
    """The scores for people, a part a line."""
    rows = [("", *COLUMNS)]
    for name, means in parts.items():
        cells = (f"{means[key]:,}" if key == "tokens" else digits(means[key], 4) for key in COLUMNS)
        rows.append((name if len(name) <= 32 else f"...{name[-29:]}", *cells))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
