"""Is a run ever lost, or another one after a resume? Some hundred runs are killed, stopped and resumed, and each has to end in
the bytes of a run that nobody touched.

    python tests/reliability.py "kills, full" 10        one experiment, here in small: prints what it found

`python -m pytest -m slow tests/test_reliability.py` does all of them in full and writes what they found to
benchmarks/results/reliability.json, of which docs/promises.md has the table. An experiment returns {"runs": how many runs were
stopped, "failures": a line for each that did not end as it should, "seen": {what else was counted: number}}.

The processes are forks of a server that has imported torch and the project (tiny.py), so that a run takes a fraction of a second.
"""

import itertools
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from test_dpo_run import DPO, write_pairs
from test_lora_run import LORA
from test_ranks import join, same_weights, start_ranks
from test_resume import outcome, train_to_crash
from tiny import FORK, GPT2, PRELOAD, start, train_quietly

from benchmarks import report
from benchmarks.harness import RESULTS, stamp
from minisft import atomic_folder, checkpoint, loop
from minisft.data.loader import Loader
from minisft.errors import STOPPED, UserError

SECONDS = 120  # a run that takes longer hangs
MIB_PER_1000_STEPS = 1.0  # a leak of 1 KiB a step is noticed; a batch of the soak alone has 3 KiB
Result = dict[str, int | list[str] | dict[str, float]]


# ---- runs ---------------------------------------------------------------------------------------------------------


def make_home(folder: Path) -> Path:
    """A folder with rows, pairs, a tokenizer, and a model with dropout that was trained for four steps."""
    write_pairs(folder / "pairs.jsonl", 64)  # as many as rows
    model = {"model.config": GPT2 | {"resid_pdrop": 0.1, "embd_pdrop": 0.1}}
    finish(folder, model | {"output_dir": str(folder / "base"), "train.max_steps": 4})
    return folder


def keys(home: Path, out: Path, kind: str, trainer: str = "sft", **more) -> dict:
    """The configuration of a run in the folder `out`. kind: full or LoRA."""
    base = {"model.config": None, "model.model_name_or_path": str(home / "base" / "model"), "output_dir": str(out)}
    pairs = {"data.train_data": str(home / "pairs.jsonl"), "dpo.disable_dropout": False}
    data = DPO | pairs if trainer == "dpo" else {}
    return base | data | (LORA if kind == "LoRA" else {}) | more


def exit_code(process, seconds: float = SECONDS) -> int:
    return join([process], seconds)[0]


def finish(home: Path, overrides: dict) -> float:
    """A whole run in a process of its own; returns its seconds."""
    began = time.perf_counter()
    assert exit_code(start(train_quietly, home, overrides)) == 0
    return time.perf_counter() - began


def difference(out: Path, expected: dict[str, object]) -> str:
    """The parts of what a run left in `out` that are not as expected, byte for byte; "" where all are."""
    found = outcome(out)
    return ", ".join(part for part in expected if found[part] != expected[part])


def announced(out: Path, last: int, behind: int) -> int:
    """The step whose checkpoint must be there, as the run has gone on since: it saves step n before it logs step n + 1, or
    `behind` steps later, and the last one before it exports."""
    if any(out.glob(".tmp-model-*")):
        return last
    metrics = out / "metrics.jsonl"
    return max(0, metrics.read_bytes().count(b"\n") - 1 - behind) if metrics.exists() else 0


def problem(home: Path, overrides: dict, expected: dict[str, object]) -> str:
    """After a crash: what is lost, or goes wrong when the same command is given again; "" where nothing is and does."""
    out = Path(overrides["output_dir"])
    try:
        path, skipped = checkpoint.find_checkpoint(out / "checkpoints", "auto")
    except UserError as error:
        return error.message
    behind = int(overrides.get("checkpoint.save_async", False))  # the next save begins when this one is over
    found, wanted = checkpoint.step_of(path) if path else 0, announced(out, overrides["train.max_steps"], behind)
    if skipped or found < wanted:
        return f"step {found} was found, {wanted} was announced; damaged: {skipped}"
    if (code := exit_code(start(train_quietly, home, overrides))) != 0:
        return f"it ended with {code} when it was started again"
    left = {path.name for path in out.rglob(".*")} - {".lock"}
    return difference(out, expected) or ", ".join(left)


# ---- killed -------------------------------------------------------------------------------------------------------

SAVES = {"checkpoint.save_steps": 1, "checkpoint.save_total_limit": 2}


def kills(home: Path, kind: str, count: int = 100, in_background: bool = False) -> Result:
    """SIGKILL at `count` moments, uniformly random from the start of the process to the end of the run. A moment at which the run
    had ended, on a machine whose speed varies, is drawn again."""
    more = SAVES | {"train.max_steps": 12, "checkpoint.save_async": in_background}
    folder = home / f"kills-{kind}"
    seconds = statistics.median(finish(home, keys(home, folder / f"whole-{i}", kind, **more)) for i in range(3))
    expected = outcome(folder / "whole-0")
    rng, failures, seen = random.Random(0), [], Counter()
    for number in itertools.count():
        if seen.total() == count:
            break
        out = folder / str(number) / "out"  # with a token cache of its own beside it
        overrides, moment = keys(home, out, kind, **more), rng.uniform(0, seconds)
        process = start(train_quietly, home, overrides)
        process.join(moment)
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            seen[phase(out)] += 1
            if wrong := problem(home, overrides, expected):
                failures.append(f"{moment:.4f} s of {seconds:.4f}: {wrong}")
        shutil.rmtree(out.parent)
    return {"runs": count, "failures": failures, "seen": dict(seen)}


def phase(out: Path) -> str:
    """Where a run was when it was killed."""
    if any(out.glob(".tmp-model-*")):
        return "in the export"
    if any(out.glob("checkpoints/.*")):
        return "in a save"
    if any(out.glob("checkpoints/step-*")):
        return "between saves"
    return "before the first"


def crash_points(home: Path, kind: str, count: int | None = None, in_background: bool = False) -> Result:
    """A run dies at each crash point (atomic_folder.py) that it passes: in its token cache, in each save, in retention, in the
    export. So does one that starts over where another has finished, at those that only it passes. count: of each so many."""
    folder, more = home / f"crash-{kind}", SAVES | {"train.max_steps": 3, "checkpoint.save_async": in_background}
    over = more | {"checkpoint.save_total_limit": 9, "checkpoint.resume": "never"}
    finish(home, keys(home, folder / "whole", kind, **more))
    finish(home, keys(home, folder / "old" / "out", kind, **over))
    expected, passed, failures, runs = outcome(folder / "whole"), set(), [], 0
    for case, options in (("new", more), ("over", over)):
        here, old = folder / case, folder / "old" if case == "over" else None
        overrides, said = keys(home, here / "out", kind, **options), folder / f"points-{case}"
        set_up(here, old)
        assert exit_code(start(train_noting_points, home, overrides, said)) == 0
        points = [point for point in dict.fromkeys(said.read_text().splitlines()) if point not in passed]
        passed |= set(points)
        for point in points[:: max(1, len(points) // count) if count else 1]:
            runs += 1
            set_up(here, old)
            if (code := exit_code(start(train_to_crash, home, overrides, point))) != 137:
                failures.append(f"{case}, {point}: it was not reached, the run ended with {code}")
            elif wrong := problem(home, overrides, expected):
                failures.append(f"{case}, {point}: {wrong}")
    return {"runs": runs, "failures": failures, "seen": {}}


def set_up(folder: Path, old: Path | None) -> None:
    """An empty folder for a run and its token cache, or one with what another run left."""
    shutil.rmtree(folder, ignore_errors=True)
    if old is not None:
        shutil.copytree(old, folder)


def train_noting_points(home: Path, overrides: dict, said: Path) -> None:
    """train_quietly, and the name of every crash point that it passes goes to a file."""

    def note(name: str) -> None:
        with open(said, "a") as file:
            file.write(name + "\n")

    atomic_folder.crash_point = checkpoint.crash_point = note
    train_quietly(home, overrides)


# ---- stopped and resumed ------------------------------------------------------------------------------------------

CELL = {"train.max_steps": 30, "train.gradient_accumulation_steps": 2, "log.logging_steps": 3}


def resume_cells(home: Path, trainer: str, ranks: int, count: int | None = None) -> Result:
    """Runs of 30 steps, full or LoRA, packed or not, stopped at six places and resumed. With two ranks, the signal goes to one of
    them. count: only so many of the places."""
    failures, runs = [], 0
    for kind, packing in itertools.product(("full", "LoRA"), (False, True)):
        name = f"{trainer}-{ranks}-{kind}-{'packed' if packing else 'unpacked'}"
        batch = (2 if packing else 4) // ranks
        more = CELL | {"data.packing": packing, "train.per_device_train_batch_size": batch}
        overrides = keys(home, home / name, kind, trainer, **more, **{"data.cache_dir": str(home / "cache")})
        code = train_ranks(home, overrides, ranks)
        assert code == (0,) * ranks, (name, code)
        expected = outcome(home / name)
        row = json.loads((home / name / "metrics.jsonl").read_text().partition("\n")[0])
        epoch = round(row["step"] / row["epoch"])  # its steps
        places = {
            "step 1": (1, 0),
            "the middle of an epoch": (epoch // 2, 0),
            "the last step but one of an epoch": (epoch - 1, 0),
            "the end of an epoch": (epoch, 0),
            "the step after it": (epoch + 1, 0),
            "inside a step": (epoch // 2, 2),
        }
        assert 1 < epoch // 2 < epoch - 1 and epoch + 1 <= 10, (name, epoch)
        for place, (step, micro_batch) in list(places.items())[:count]:
            runs += 1
            out = home / f"{name}-{runs}"
            cell = overrides | {"output_dir": str(out)}
            codes = train_ranks(home, cell, ranks, partial(stop_at, step, micro_batch))
            stopped = [checkpoint.step_of(path) for path in checkpoint.checkpoints(out / "checkpoints")]
            # a signal inside a step may be noticed after it or after the next one
            if codes != (STOPPED,) * ranks or stopped not in ([step], [step + 1] if micro_batch else [step]):
                failures.append(f"{name}, {place}: stopped at {stopped} with {codes}")
            elif (codes := train_ranks(home, cell, ranks)) != (0,) * ranks:
                failures.append(f"{name}, {place}: resumed, it ended with {codes}")
            elif wrong := difference(out, expected) or (ranks > 1 and not same_weights(out) and "ranks differ"):
                failures.append(f"{name}, {place}: {wrong}")
            shutil.rmtree(out)
    return {"runs": runs, "failures": failures, "seen": {}}


def train_ranks(home: Path, overrides: dict, ranks: int, before: Callable[[], None] | None = None) -> tuple[int, ...]:
    """A run on one or two ranks; returns their exit codes. before: called in the last rank's process before it trains."""
    if ranks == 2:
        return join(start_ranks(home, overrides, before=before), SECONDS)
    return join([start(train_after, home, overrides, before)], SECONDS)


def train_after(home: Path, overrides: dict, before: Callable[[], None] | None) -> None:
    if before:
        before()
    train_quietly(home, overrides)


def stop_at(step: int, micro_batch: int) -> None:
    """This process gets SIGTERM while it collects the batches of a step (the first is 1), or in a micro-batch (0: none) of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the handler says
    honest_steps, honest_pass, calls = Loader.steps, loop.forward_backward, itertools.count(1)

    def steps(self, first, last, **options):
        for number, batches in enumerate(honest_steps(self, first, last, **options), start=first + 1):
            if number == step and micro_batch == 0:
                signal.raise_signal(signal.SIGTERM)
            yield batches

    def forward_backward(*arguments):
        if next(calls) == (step - 1) * CELL["train.gradient_accumulation_steps"] + micro_batch:
            signal.raise_signal(signal.SIGTERM)
        return honest_pass(*arguments)

    Loader.steps, loop.forward_backward = steps, forward_backward if micro_batch else honest_pass


# ---- a long run ---------------------------------------------------------------------------------------------------


def soak(home: Path, count: int = 2000) -> Result:
    """A run of `count` steps with packing, an evaluation every 100 steps, a save every 50, and TensorBoard. After its first
    quarter its memory is flat, and the numbers of descriptors and threads stay the same."""
    more = {"train.max_steps": count, "data.packing": True, "train.per_device_train_batch_size": 2}
    more |= {"checkpoint.save_steps": 50, "checkpoint.save_total_limit": 2, "log.logging_steps": 10}
    more |= {"data.eval_fraction": 0.1, "evaluate.eval_steps": 100, "log.report_to": ["tensorboard"]}
    samples = home / "samples.jsonl"
    watched = start(train_watched, home, keys(home, home / "soak", "full", **more), samples)
    code = exit_code(watched, seconds=count)
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    rows = [row for row in rows if row["step"] >= count // 4]
    slope = 1000 * np.polyfit([row["step"] for row in rows], [row["MiB"] for row in rows], 1)[0]
    failures = [] if code == 0 else [f"it ended with {code}"]
    if slope > MIB_PER_1000_STEPS:
        failures.append(f"its memory grew by {slope:.2f} MiB in 1,000 steps")
    for name in ("descriptors", "threads"):
        if len(numbers := {row[name] for row in rows}) > 1:
            failures.append(f"the number of {name} was one of {sorted(numbers)}")
    last = {name: rows[-1][name] for name in ("MiB", "descriptors", "threads")}
    return {
        "runs": 1,
        "failures": failures,
        "seen": {"steps": count, **last, "MiB more in 1,000 steps": round(float(slope), 3)},
    }


def train_watched(home: Path, overrides: dict, samples: Path) -> None:
    """train_quietly, and every 50 steps what the process has goes to a file."""
    honest = loop.train_step

    def train_step(run, *arguments, **options):
        if run.progress.step % 50 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            row = {"step": run.progress.step, "MiB": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 2)}
            row |= {
                name: len(os.listdir(f"/proc/self/{of}")) for name, of in (("descriptors", "fd"), ("threads", "task"))
            }
            with open(samples, "a") as file:
                file.write(json.dumps(row) + "\n")
        return honest(run, *arguments, **options)

    loop.train_step = train_step
    train_quietly(home, overrides)


# ---- all of them --------------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Callable[..., Result]] = {
    **{f"kills, {kind}": partial(kills, kind=kind) for kind in ("full", "LoRA")},
    **{f"crash points, {kind}": partial(crash_points, kind=kind) for kind in ("full", "LoRA")},
    "kills, in the background": partial(kills, kind="full", in_background=True),
    "crash points, in the background": partial(crash_points, kind="full", in_background=True),
    **{
        f"resume, {trainer.upper()}, {ranks} rank{'s' * (ranks > 1)}": partial(
            resume_cells, trainer=trainer, ranks=ranks
        )
        for trainer, ranks in itertools.product(("sft", "dpo"), (1, 2))
    },
    "soak": soak,
}


def measure(name: str, **count: int) -> dict:
    """Do an experiment of EXPERIMENTS in a folder of its own, which is deleted."""
    FORK.set_forkserver_preload([*PRELOAD, "reliability"])  # unless it is running
    with tempfile.TemporaryDirectory(prefix="minisft-reliability-") as folder:
        home, began = make_home(Path(folder)), time.perf_counter()
        result = EXPERIMENTS[name](home, **count)
        return {**result, "seconds": round(time.perf_counter() - began, 1)}


def record(name: str, result: dict) -> None:
    """Put a result, with versions and the kind of machine, into reliability.json, and the table of all into docs/promises.md."""
    path = RESULTS / "reliability.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[name] = {**result, **stamp()}
    path.write_text(json.dumps({key: results[key] for key in EXPERIMENTS if key in results}, indent=1) + "\n")
    report.write_block(report.PROMISES, report.reliability_block())


if __name__ == "__main__":
    counts = {"count": int(sys.argv[2])} if len(sys.argv) > 2 else {}
    for experiment in sys.argv[1:2] or EXPERIMENTS:
        print(experiment, json.dumps(measure(experiment, **counts)), flush=True)
