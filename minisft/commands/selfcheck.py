"""`minisft selfcheck CONFIG.toml`: the equalities that the engine promises, measured on your model, your data and your machine.

Every check computes the same thing in two ways and prints the largest difference beside the most that rounding may make of it.
selfcheck/checks.py has them and says where the bars come from. Nothing is written into the run's output folder.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from minisft.errors import MEMORY, SAVE, UserError, is_out_of_memory
from minisft.strict_json import spelled

USAGE = """\
usage: minisft selfcheck CONFIG.toml [--rows N] [--only WORD] [--naive [STEPS]] [--json] [--KEY VALUE ...]

Check on this machine, with the model and the data of CONFIG.toml, that what must be equal is equal: packed and one
by one, any split into micro-batches, kernels and reference formulas, checkpointing on and off, one rank and several,
resumed and uninterrupted, adapter and merged model, memory and exported files. The exit code is 1 if something is not.

  --rows N         rows, or pairs, in the checks (default 8)
  --only WORD      the checks with this word in their name; may be given several times
  --naive [STEPS]  instead, the run's first steps (default 10) beside a naive loop, and both losses
  --json           print JSON

Other options are keys of the configuration, as for `minisft train`. Checks of the mathematics run in fp32, those of
kernels in the run's precision. They write into a temporary folder beside output_dir.
"""
FAILED = 1  # the exit code
DEFAULT_STEPS = 10
# Relative difference of two losses. fp32: the last bits of a gradient near zero decide the sign of Adam's first updates, and
# this grows with the steps. bf16 and fp16: the same, beginning with the rounding of every product (2^-9 and 2^-11).
NAIVE_BAR = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    from minisft.atomic_folder import scratch_folder
    from minisft.config.command_line import parse_arguments, take_options, whole_number
    from minisft.config.stages import load_stages
    from minisft.prepare.look import look

    argv = with_default_steps(argv)
    options, words = take_options(argv, ("rows", "only", "naive"), ("json",))
    number = {name: whole_number(name, options[name][-1]) for name in ("rows", "naive") if name in options}
    stages = load_stages(*parse_arguments(words))
    if len(stages) > 1:
        raise UserError(f"selfcheck with {len(stages)} stages", hint="name the file of one stage")
    look(stages)
    config = quiet(stages[0].config)
    if "naive" in number:
        return compare_with_naive(config, number["naive"], "json" in options)
    home = next(folder for folder in Path(config.output_dir).absolute().parents if folder.is_dir())
    with scratch_folder(home, "selfcheck") as folder:
        return check(config, words, folder, number.get("rows", 8), options.get("only", []), "json" in options)


def with_default_steps(argv: list[str]) -> list[str]:
    """--naive may stand alone."""
    words = list(argv)
    for i, word in enumerate(words):
        if word == "--naive" and not (i + 1 < len(words) and words[i + 1].isdecimal()):
            words[i] = f"--naive={DEFAULT_STEPS}"
    return words


def quiet(config: Any) -> Any:
    """The configuration with the token cache where the run has it."""
    from dataclasses import replace

    from minisft.prepare.options import cache_folder

    return replace(config, verbose=False, data=replace(config.data, cache_dir=str(cache_folder(config))))


def check(config: Any, words: list[str], folder: Path, num_rows: int, only: list[str], as_json: bool) -> int:
    """Run the checks one after the other, each printed when it is done; a summary at the end."""
    from minisft.selfcheck.bench import Bench
    from minisft.selfcheck.checks import CHECKS

    names = [name for name in CHECKS if not only or any(word in name for word in only)]
    if not names:
        raise UserError(f"--only {' '.join(only)}: no check has this in its name", hint="; ".join(CHECKS))
    bench = Bench(config, words, folder, num_rows)
    run = bench.prepared()
    if not as_json:
        about = f"{run.model.config.model_type} on {run.device.type}, {run.precision}; {num_rows} rows a check"
        about += " of the stream's first chunk" if run.train.stream else ""
        print(f"{about}\n\n{'':<28}{'error':>9}{'bar':>9}  {'':<7}{'seconds':>8}  where the error is largest")
    del run
    rows = []
    for name in names:
        began = time.perf_counter()
        row = {"check": name, **run_check(CHECKS[name], bench), "seconds": time.perf_counter() - began}
        rows.append(row)
        if not as_json:
            print(line(row), flush=True)
    failed = [row["check"] for row in rows if row["result"] == "FAILED"]
    if as_json:
        print(json.dumps(spelled({"passed": not failed, "checks": rows}), indent=2))
    else:
        skipped = sum(row["result"] == "skipped" for row in rows)
        passed = len(rows) - skipped - len(failed)
        print(f"\n{passed} passed, {skipped} skipped, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}")
    return FAILED if failed else 0


def run_check(function: Any, bench: Any) -> dict[str, Any]:
    """{result, error, bar, where}. What has no room on this machine is skipped; any other mistake fails."""
    from minisft.selfcheck.bench import Skipped

    try:
        found = function(bench)
    except Skipped as reason:
        return {"result": "skipped", "error": None, "bar": None, "where": str(reason)}
    except UserError as error:
        result = "skipped" if error.exit_code in (MEMORY, SAVE) else "FAILED"
        return {"result": result, "error": None, "bar": None, "where": error.message}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        bench.forget()
        return {"result": "skipped", "error": None, "bar": None, "where": "there is too little memory for it"}
    return {"result": "passed" if found.passed else "FAILED", **vars(found)}


def line(row: dict[str, Any]) -> str:
    """A row of the table, at most 100 columns but for a long reason."""
    error, bar = ("" if row[key] is None else f"{row[key]:.1e}" if row[key] else "0" for key in ("error", "bar"))
    bar = "bitwise" if row["bar"] == 0 else bar
    return f"{row['check']:<28}{error:>9}{bar:>9}  {row['result']:<7}{row['seconds']:>8.1f}  {row['where']}"


# ---- beside a naive loop --------------------------------------------------------------------------------------------


def compare_with_naive(config: Any, steps: int, as_json: bool) -> int:
    """The run's first steps by the engine, then by selfcheck/naive.py from the same start, with the losses side by side."""
    import gc
    from dataclasses import replace

    from minisft import loop, runtime
    from minisft.prepare.run import prepare
    from minisft.selfcheck import naive
    from minisft.selfcheck.bench import has_noise

    config = replace(config, train=replace(config.train, neftune_noise_alpha=None))
    device = runtime.pick_device(config.train.device)
    notes = []

    def begin() -> Any:
        notes.clear()
        run = prepare(config, device)
        if has_noise(run):
            run.model.eval()
            notes.append("Dropout is off in both: they would draw other numbers.")
        if run.train.stream is not None:
            notes.append("These are steps of the stream's first chunk.")
        return run

    run = begin()
    first_chunk = run.total_steps if run.train.stream is None else run.train.steps_per_epoch
    steps, precision = min(steps, run.total_steps, first_chunk), run.precision
    losses, seconds = [], []
    began = time.perf_counter()
    for step in range(steps):
        result = loop.train_step(run, config.train, run.train.step(*run.train.at(step)))
        losses.append(result.loss)
        run.progress.step += 1
        if run.reference is not None:
            run.reference.follow(run.progress.step)
    seconds.append(time.perf_counter() - began)
    del run
    gc.collect()

    run, rows = begin(), []
    if not as_json:
        print(f"{steps} steps in {precision}, and the same by the loop of selfcheck/naive.py\n")
        print(f"{'step':>6}{'minisft':>12}{'naive':>12}{'difference':>12}")
    began = time.perf_counter()
    for step, (ours, theirs) in enumerate(zip(losses, naive.train(config, run, steps)), start=1):
        difference = abs(ours - theirs) / max(abs(theirs), 1e-30)
        rows.append({"step": step, "minisft": ours, "naive": theirs, "difference": difference})
        if not as_json:
            print(f"{step:>6}{ours:>12.6f}{theirs:>12.6f}{difference:>12.1e}", flush=True)
    seconds.append(time.perf_counter() - began)
    differences = [row["difference"] for row in rows]
    bar, largest = NAIVE_BAR[precision], max(differences)
    passed = all(difference <= bar for difference in differences)
    if as_json:
        found = {"passed": passed, "largest": largest, "bar": bar, "seconds": seconds, "steps": rows}
        print(json.dumps(spelled(found), indent=2))
    else:
        print(f"\nThe largest difference is {largest:.1e} of the loss; the bar for {precision} is {bar:g}: ", end="")
        print("passed." if passed else "FAILED.")
        print(f"minisft took {seconds[0]:.1f} s, the naive loop {seconds[1]:.1f} s.", *notes)
        if precision != "fp32":
            print("--precision fp32 compares without the rounding of the products, with a narrower bar.")
    return 0 if passed else FAILED
