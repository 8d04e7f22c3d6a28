"""What all benchmarks share: fair timing, peak memory, where a number comes from, and the CSV that keeps it.

A number without its machine, commit and versions cannot be compared, so `stamp` goes on every row. Callables that are
compared run interleaved (a b c a b c ...), so that a noisy minute hits all of them alike; the median of the rounds is
reported with its quartiles. Run a benchmark from the checkout: `python -m benchmarks.bench_packing`.
"""

import csv
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minisft.heap import TUNABLES

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
READERS = ("tokenizers", "safetensors", "huggingface_hub", "jinja2", "tqdm", "yaml")  # of a run's text and files
AS_A_COMMAND = {"GLIBC_TUNABLES": TUNABLES}  # the heap of a run that the command line starts on a CPU
ENDED = "ended the process"  # how the error of a row begins if whoever it speaks of did that


def time_interleaved(
    functions: dict[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1, baseline: str | None = None
) -> list[dict]:
    """Time the functions in turn, `repeats` rounds after `warmup` uncounted ones.

    Returns a row per function: name, seconds (median), q1, q3 and, with a baseline, `speedup`: the median over the
    rounds of the baseline's time divided by this function's time in the same round. A function that starts work on a
    GPU must wait for it before it returns.
    """
    seconds = {name: [] for name in functions}
    for round_number in range(warmup + repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, times in seconds.items():
        q1, median, q3 = quartiles(times)
        row = {"name": name, "seconds": median, "q1": q1, "q3": q3}
        if baseline is not None:
            row["speedup"] = statistics.median(b / t for b, t in zip(seconds[baseline], times))
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else tuple(values) * 3


def in_fresh_process(target: str, environment: dict[str, str] | None = None, **arguments) -> dict:
    """Call "module:function" with JSON arguments in a new Python process; returns its dict and `peak_mb`, the process's
    peak resident memory in MiB. Memory of earlier cases, or of this process, does not count. environment: variables on top."""
    code = "from benchmarks.harness import _answer; _answer()"
    command = [sys.executable, "-c", code, target, json.dumps(arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # whatever the function printed itself comes before


def _answer() -> None:
    module, name = sys.argv[1].split(":")
    answer = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    print(json.dumps({**answer, "peak_mb": memory_mb("VmHWM")}))


def extra_memory(function: Callable[[], object]) -> tuple[object, float]:
    """Call the function; returns its result and how far resident memory rose above its level before the call, in MiB.

    Linux only. Call it once, in a fresh process: memory that was used before and is free again would hide a rise.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the peak (VmHWM) starts again from the present level
    before = memory_mb("VmRSS")
    result = function()
    return result, memory_mb("VmHWM") - before


def memory_mb(field: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:  # not Linux: only the peak is known, in bytes on a Mac
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def stamp() -> dict:
    """Where and when: date, commit, processor, threads, versions, GPU. Goes on every row of a CSV."""
    torch = sys.modules.get("torch")  # reported as the benchmark uses it, not imported for the stamp
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": _commit(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if torch else os.environ.get("OMP_NUM_THREADS", ""),
        "python": platform.python_version(),
        **{name: package_version(name) for name in ("torch", "triton", "numpy")},
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else "",
    }


@cache
def _commit() -> str:
    """Of the checkout; where it came without its history, MINISFT_COMMIT may say it."""
    if os.environ.get("MINISFT_COMMIT"):
        return os.environ["MINISFT_COMMIT"]

    def git(*arguments):
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git on this machine
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "--verify", "--quiet", "HEAD")
    # The results that this very run writes do not make the code another one.
    return (commit or "none") + ("-dirty" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def package_version(name: str) -> str:
    """Of an installed package; "" of one that is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def read_csv(path: Path) -> list[dict]:
    """The rows, as text; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(name: str, rows: list[dict], folder: Path = RESULTS) -> Path:
    """Append the rows, stamped, to <name>.csv in the folder. Columns keep their order; new ones go to the end."""
    path = folder / f"{name}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    where = stamp()
    everything = read_csv(path) + [{**row, **where} for row in rows]
    columns = list(dict.fromkeys(column for row in everything for column in row))
    unfinished = path.with_suffix(".tmp")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _text(v) for k, v in row.items()} for row in everything)
    unfinished.replace(path)  # whoever is killed meanwhile leaves the rows of before
    return path


UNITS = {"ms": "ms", "mb": "MB", "gb": "GB", "seconds": "s", "percent": "%", "s": "s"}  # by the end of a column's name


def print_table(rows: list[dict], width: int = 100) -> None:
    """Print the rows, aligned, with every column that any of them has. What is the same in all rows comes first, in one line;
    where the columns need more than `width` characters they follow in several tables, each with the first one."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return
    cells = {column: [_text(row.get(column, "")) for row in rows] for column in columns}
    same = [c for c in columns[1:] if len(rows) > 1 and len(set(cells[c])) == 1]
    if same:
        print(textwrap.fill("; ".join(f"{heading(c)}: {cells[c][0]}" for c in same), width))
    first, *others = [c for c in columns if c not in same]
    tables = [[first]]
    widths = {c: max(len(x) for x in (heading(c), *cells[c])) for c in columns}
    for column in others:
        used = sum(widths[c] + 2 for c in tables[-1])
        if used + widths[column] > width and len(tables[-1]) > 1:
            tables.append([first])
        tables[-1].append(column)
    for of_table in tables:
        for line in zip(*([heading(c), *cells[c]] for c in of_table)):
            parts = [cell.ljust(widths[c]) if c == first else cell.rjust(widths[c]) for c, cell in zip(of_table, line)]
            print("  ".join(parts).rstrip())
        print()


def heading(column: str) -> str:
    """peak_mb -> "peak, MB"; "tokens_per_second" -> "tokens per second"."""
    *words, last = column.split("_")
    if words and words[-1] != "per" and last in UNITS:
        return f"{' '.join(words)}, {UNITS[last]}"
    return UNITS.get(column, " ".join([*words, last]))


def number(value: float) -> str:
    """1234.5 -> 1,234; 12.34 -> 12.3; 0.1234 -> 0.123."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
