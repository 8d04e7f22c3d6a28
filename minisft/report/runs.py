"""What a run left in its output folder, for the report: metrics, samples, configuration and versions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisft.config.load import RESOLVED_NAME, read_resolved
from minisft.errors import UserError
from minisft.log_files import read_lines, read_metrics
from minisft.record import flat, read_record

Series = tuple[list[int], list[float]]  # steps and values


@dataclass(frozen=True)
class RunLog:
    name: str  # of its folder; the path where several have the same
    folder: Path
    series: dict[str, Series]  # of metrics.jsonl and timings.jsonl, by name
    samples: list[dict[str, Any]]  # of step_samples.jsonl
    config: dict[str, tuple[str, str]]  # full name of a key -> (value as in TOML, where it comes from)
    record: dict[str, str]  # of its last start (record.py): hashes, versions, the machine
    summary: str  # what it printed before its first step


def read_runs(folders: list[Path]) -> list[RunLog]:
    """Raises UserError for a folder without a run."""
    names = [folder.resolve().name for folder in folders]
    return [read_run(folder, name if names.count(name) == 1 else str(folder)) for folder, name in zip(folders, names)]


def read_run(folder: Path, name: str) -> RunLog:
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: there is no metrics.jsonl", hint="give the output folder of a run that has begun")
    series: dict[str, Series] = {}
    for file in ("metrics.jsonl", "timings.jsonl"):
        for row in read_metrics(folder / file):
            for key, value in row.items():
                if key != "step":
                    steps, values = series.setdefault(key, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    starts = read_record(folder)
    last = flat(starts[-1]) if starts else {}
    return RunLog(
        name=name,
        folder=folder,
        series=series,
        samples=read_lines(folder / "step_samples.jsonl"),
        config=read_resolved(_text(folder / RESOLVED_NAME)),
        record={key: str(value) for key, value in last.items() if key not in ("time", "step")},
        summary=_text(folder / "summary.txt"),
    )


def differences(runs: list[RunLog]) -> list[tuple[str, list[str]]]:
    """(key, its value in every run) of whatever differs in the configuration, defaults included, and in what was recorded of
    models, data, code, versions and machines; "-" where a run has no such key."""
    rows = []
    for tables in (
        [{key: value for key, (value, _) in run.config.items()} for run in runs],
        [run.record for run in runs],
    ):
        for key in dict.fromkeys(key for table in tables for key in table):
            values = [table.get(key, "-") for table in tables]
            if len(set(values)) > 1:
                rows.append((key, values))
    return rows


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
