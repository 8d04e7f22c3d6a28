"""Everything that has to be shown on a machine with one GPU, in one go and within eight minutes.

    python -m benchmarks.report --suite gpu --out DIR [--commit HASH]

Runs from a plain checkout with nothing installed but PyTorch, Triton and pytest, and without a network. Correctness comes
first: tests/test_gpu.py. Meanwhile the benchmarks compile their kernels, all of them at once; nothing is timed yet. Then
they run one after the other, the weightiest first, each in a process of its own with a limit, so that a crash or a hang
loses one contender of one benchmark: the process is started again behind it. Rows are in DIR/kernels_cuda.csv as soon as
a case has been timed. At last whole trainings are measured, where what minisft needs besides these is installed.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks.harness import ROOT

TOTAL_S = 450  # half a minute less than allowed
TESTS_S = 165  # for correctness, and for the compiling beside it
TIMING_S = 2  # for each case
BENCHMARKS = [  # (module, options, seconds at most)
    ("bench_linear_cross_entropy", [], 75),
    ("bench_flash_attention", ["--only", "packed"], 75),
    ("bench_flash_attention", ["--only", "one document"], 60),
    ("bench_cross_entropy", [], 30),
    ("bench_rms_norm", [], 30),
    ("bench_glu", [], 30),
    ("bench_rope", [], 30),
    ("bench_gated_delta_rule", [], 40),
    ("bench_causal_conv1d", [], 20),
    ("bench_quantize", [], 30),
    ("bench_adamw", [], 30),
    ("bench_layer_norm", [], 30),
]
TRAININGS = [("bench_dpo", ["--rounds", "1"], 150)]
NEEDED = ("tokenizers", "safetensors", "jinja2", "huggingface_hub", "tqdm")  # by a training
ATTEMPTS = 4  # of a benchmark; each but the last may lose a contender


def suite(out: Path, device: str = "cuda", quick: bool = False, benchmarks=None, tests: bool = True) -> bool:
    """Returns whether the tests passed and every benchmark came to its end."""
    deadline, out = time.monotonic() + TOTAL_S, out.resolve()
    benchmarks = BENCHMARKS if benchmarks is None else benchmarks
    out.mkdir(parents=True, exist_ok=True)
    options = ["--device", device] + (["--quick"] if quick else [])
    with (out / "suite.txt").open("a", encoding="utf-8") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            print(text, file=log, flush=True)

        compiling = [_Process(_command(module, *options, *more, "--compile")) for module, more, _ in benchmarks]
        good = True
        if tests:
            began = time.monotonic()
            passed, text = _tests(deadline - TOTAL_S + TESTS_S)
            (out / "tests.txt").write_text(text, encoding="utf-8")
            summary = next(reversed([line for line in text.splitlines() if line.strip()]), "")
            say(f"tests: {'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s: {summary}")
            good &= passed
        for (module, more, _), process in zip(benchmarks, compiling):
            code, text = process.end(deadline - TOTAL_S + TESTS_S + 20)
            say(f"compiled {module} {' '.join(more)}: {'done' if code == 0 else 'NOT DONE'}")
            print(text, file=log, flush=True)

        timing = ["--seconds", str(TIMING_S), "--out", str(out)]
        for module, more, limit in benchmarks:
            first, without = 0, []
            for _ in range(ATTEMPTS):
                left = min(limit, deadline - time.monotonic())
                if left < 5:
                    say(f"{module} {' '.join(more)}: NO TIME LEFT")
                    good = False
                    break
                began, leave = time.monotonic(), [option for name in without for option in ("--without", name)]
                command = _command(module, *options, *more, *timing, "--first", str(first), *leave)
                code, text = _Process(command).end(began + left)
                print(text, file=log, flush=True)
                took = f"{module} {' '.join(more)}: {time.monotonic() - began:.0f} s"
                if code == 0:
                    say(took)
                    break
                good, limit = False, limit - (time.monotonic() - began)
                first, culprit = _died_of(text, first)
                say(f"{took}, ENDED with {code} at case {first} of {culprit or 'all contenders'}")
                without, first = (without + [culprit], first) if culprit else (without, first + 1)

        for module, more, limit in TRAININGS:
            left, missing = deadline - time.monotonic(), [name for name in NEEDED if not find_spec(name)]
            if missing or left < 30:
                say(f"{module}: left out, {', '.join(missing) + ' missing' if missing else 'no time left'}")
                continue
            began = time.monotonic()
            code, text = _Process(_command(module, *options, *more, "--out", str(out))).end(began + min(limit, left))
            print(text, file=log, flush=True)
            say(f"{module}: {time.monotonic() - began:.0f} s{'' if code == 0 else f', ENDED with {code}'}")
            good &= code == 0
    return good


def _command(module: str, *options: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{module}", *options]


class _Process:
    """A command in a session of its own; `end` waits until a moment and then ends it with all that it has started."""

    def __init__(self, command: list[str]):
        self.file = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=self.file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def end(self, moment: float) -> tuple[int, str]:
        """(exit code, what it printed)"""
        try:
            code = self.process.wait(max(0.1, moment - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = -1
            for number in (signal.SIGABRT, signal.SIGKILL):  # the first one makes Python say where it was
                try:
                    os.killpg(self.process.pid, number)
                    self.process.wait(3)
                    break
                except subprocess.TimeoutExpired:
                    continue
        self.file.seek(0)
        text = self.file.read()
        self.file.close()
        return code, text


def _died_of(text: str, first: int) -> tuple[int, str]:
    """(case, contender) whose call was announced last; the contender is empty where all had been called."""
    announced = re.findall(r"^# (\d+) (.+)$", text, re.MULTILINE)
    if not announced:
        return first, ""
    number, name = announced[-1]
    return int(number), "" if name == "all" else name


def _tests(moment: float) -> tuple[bool, str]:
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-o", "addopts=", "-q", "-ra"]
    command += ["--tb=short", "--durations=8", "-p", "no:cacheprovider"]
    if find_spec("xdist"):
        code, text = _Process([*command, "-n", "4"]).end(moment)
        if code in (0, 1) or time.monotonic() > moment - 30:
            return code == 0, text
    code, text = _Process(command).end(moment)
    return code == 0, text
