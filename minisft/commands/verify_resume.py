"""`minisft verify-resume CONFIG.toml`: the proof, on your own configuration and machine, that a resumed run is the same run.

One run takes n steps in peace. Another takes the same steps and is stopped twice on its way: by SIGTERM, after which it saves and
ends by itself, and by SIGKILL, which leaves it no time to save. Both are processes of their own, started as you would start
them. Then the bytes of all that they left are compared: weights, moments, state, metrics and the exported model.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minisft.errors import STOPPED, UserError
from minisft.strict_json import read_json

USAGE = """\
usage: minisft verify-resume CONFIG.toml [--steps N] [--KEY VALUE ...]

Train N steps twice, once in peace and once stopped by SIGTERM and by SIGKILL and resumed after each, and compare the
bytes of weights, moments, state, metrics and the exported model.

  --steps N     optimizer steps of each run (default 20; at least 8)

Other options are keys of the configuration, as for `minisft train`. Both runs write into a new folder beside output_dir,
which is removed if they are equal, or on a signal. The exit code is 1 if they are not.
"""
DEFAULT_STEPS, FEWEST_STEPS = 20, 8
DIFFERENT = 1  # the exit code
# Where two runs may differ though they are the same: how many bytes of timings were logged.
NOT_COMPARED = ("timings.jsonl",)


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    from minisft.config.command_line import parse_arguments, take_options, whole_number
    from minisft.config.stages import load_stages
    from minisft.prepare.look import look

    options, rest = take_options(argv, ("steps",), ())
    steps = whole_number("steps", options.get("steps", [str(DEFAULT_STEPS)])[-1], least=FEWEST_STEPS)
    stages = load_stages(*parse_arguments(rest))
    if len(stages) > 1:
        raise UserError(f"verify-resume with {len(stages)} stages", hint="it needs one; name the stage's file")
    look(stages)
    output = Path(stages[0].config.output_dir).absolute()
    home = next(folder for folder in output.parents if folder.is_dir())
    folder = Path(tempfile.mkdtemp(prefix=f"{output.name}-verify-resume-", dir=home))
    is_kept = True
    try:
        is_kept = not verify(rest, folder, steps)
    except KeyboardInterrupt:  # a signal: there is nothing to look at
        is_kept = False
        raise
    finally:
        if is_kept:
            print(f"\nboth runs, with what they printed, are in {folder}")
        else:
            shutil.rmtree(folder)
    return DIFFERENT if is_kept else 0


def verify(words: list[str], folder: Path, steps: int) -> bool:
    """Both runs, then a table of what is equal. words: the command line of the run. Returns whether everything is."""
    save_steps = steps // 4
    whole, stopped = folder / "whole", folder / "stopped"
    options = {"max_steps": steps, "save_steps": save_steps, "save_total_limit": 4, "resume": "auto"}
    common = [
        *words,
        *(f"--{name}={value}" for name, value in options.items()),
        "--report_to=[]",
        "--progress_bar=false",
    ]

    print(f"{steps} steps without a stop", flush=True)
    _train([*common, f"--output_dir={whole}"], folder / "whole.txt")
    print("the same steps: stopped by SIGTERM", flush=True)
    again = [*common, f"--output_dir={stopped}"]
    _train(again, folder / "stopped-1.txt", stop=signal.SIGTERM, after=stopped / _checkpoint(save_steps))
    print("                resumed, stopped by SIGKILL", flush=True)
    _train(again, folder / "stopped-2.txt", stop=signal.SIGKILL, after=stopped / _checkpoint(2 * save_steps))
    print("                resumed, to the end\n", flush=True)
    _train(again, folder / "stopped-3.txt")

    rows = list(compare(whole, stopped, steps))
    width = max(len(name) for name, _, _ in rows)
    for name, count, difference in rows:
        print(f"  {name:<{width}}  {count:<16}  {difference or 'the same bytes'}")
    is_equal = not any(difference for _, _, difference in rows)
    print("\nA resumed run is the same run." if is_equal else "\nThe resumed run is another run.")
    return is_equal


def _checkpoint(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def _train(words: list[str], log: Path, stop: signal.Signals | None = None, after: Path | None = None) -> None:
    """Train in a process of its own, which prints into the file `log`; send it `stop` as soon as the folder `after` is there.

    Raises UserError where the process ends otherwise than it should.
    """
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "minisft.train", *words], stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while stop is not None and after is not None and process.poll() is None:
            if after.is_dir():
                process.send_signal(stop)
                break
            time.sleep(0.005)
        code = process.wait()
    except BaseException:  # the user does not want to wait
        process.kill()
        process.wait()
        raise
    if code == {None: 0, signal.SIGTERM: STOPPED, signal.SIGKILL: -signal.SIGKILL}[stop]:
        return
    if stop is not None and code == 0:
        raise UserError("the run was done before it could be stopped", hint="give it more steps: --steps 100")
    told = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
    raise UserError("\n  ".join([f"a run ended with exit code {code}; the last lines of {log}:", *told]))


# ---- the comparison ---------------------------------------------------------------------------------------------


def compare(a: Path, b: Path, step: int) -> Iterator[tuple[str, str, str]]:
    """(what, how much of it, "" or the difference) for each part of what two runs of so many steps left in their folders."""
    from minisft.selfcheck.measure import compare_tensors

    for name, folder in (("checkpoint", _checkpoint(step)), ("exported", "model")):
        files = sorted({path.name for side in (a, b) for path in (side / folder).glob("*.safetensors")})
        for file in files:
            count, difference = compare_tensors(a / folder / file, b / folder / file)
            yield f"{name}: {file}", f"{count:,} tensors", difference
    states = [_state(side / _checkpoint(step) / "trainer_state.json") for side in (a, b)]
    keys = sorted(states[0].keys() | states[1].keys())
    different = [key for key in keys if states[0].get(key) != states[1].get(key)]
    yield "trainer_state.json", f"{len(keys):,} values", f"different: {', '.join(different)}" if different else ""
    lines = [(side / "metrics.jsonl").read_bytes().splitlines() for side in (a, b)]
    yield "metrics.jsonl", f"{len(lines[0]):,} lines", _first_difference(*lines)


def _state(path: Path) -> dict[str, Any]:
    return {key: value for key, value in read_json(path).items() if key not in NOT_COMPARED}


def _first_difference(a: list[bytes], b: list[bytes]) -> str:
    if len(a) != len(b):
        return f"{len(a):,} lines and {len(b):,}"
    lines = [(x, y) for x, y in zip(a, b) if x != y]
    if not lines:
        return ""
    first, second = map(json.loads, lines[0])
    names = ", ".join(name for name in first if first[name] != second.get(name))
    return f"{len(lines):,} lines differ, the first at step {first['step']}: {names}"
