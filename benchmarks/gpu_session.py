"""Everything that has to be shown on a machine with one GPU, in one command and within nine minutes.

    python -m benchmarks.gpu_session --out DIR [--seconds 540] [--cache FILE] [--commit HASH]
    python -m benchmarks.gpu_session --build-cache FILE         before, on a machine without a GPU: see kernel_cache.py

Runs from a plain checkout with nothing installed but PyTorch, Triton and numpy, and without a network. What needs more is left
out where that is missing. Given again with the same DIR it goes on with what is missing there.

A session is a list of parts, the weightiest first: each is a process with a limit, so that a crash or a hang loses one
contender of one part. What a benchmark or the tests have not done when their process dies is done by another one, without
whoever was running. DIR gets these files:

    report.md              the numbers, and what was left out and why; written again after every part
    parts.csv              a row for each part that has ended
    tests.csv              a row for each test
    kernels_cuda.csv       a row for each contender of an op, and pass
    train_step_cuda.csv    a row for each model
    dpo_cuda.csv           a row for each case of preference tuning
    shared_turns.csv       a row for each layout of turns
    log.txt                what all of them printed
"""

import argparse
import ctypes
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks import report
from benchmarks.harness import ENDED, READERS, ROOT, package_version, read_csv, write_csv

LEAST_S = 8  # with less time left a part does not begin
ATTEMPTS = 6  # of a part whose process dies; each but the last may lose a contender
KERNELS = "triton"  # folder of compiled kernels in the working folder
MACHINE = "machine"  # the part without which nothing else runs
DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl


@dataclass(frozen=True)
class Part:
    name: str
    command: list[str]
    seconds: float  # at most
    kind: str = "once"  # "kernels" and "tests" go on after a crash; "background": the next benchmark waits for it
    needs: tuple[str, ...] = ()  # modules
    tool: str = ""  # a program that it needs
    unless: str = ""  # a part after whose success this one is not needed
    final: tuple[str, ...] = ("done", "failed")  # results with which it is not tried again,
    makes: Path | None = None  # while this folder is there
    says: bool = False  # the last line that it prints belongs into the report


def module(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", name, *options]


def kernels(name: str, out: Path, *options: str) -> list[str]:
    limits = ("--seconds", "1", "--patience", "30")  # of a case, of a call
    return module(f"benchmarks.{name}", "--device", "cuda", *limits, "--missing", "--out", str(out), *options)


def tests(*options: str) -> list[str]:
    command = ["pytest", "tests/test_gpu.py", "-m", "gpu", "-o", "addopts=", "-v", "--tb=short", "--durations=5"]
    return module(*command, "-p", "no:cacheprovider", "-p", "benchmarks.gpu_tests", *options)


def all_parts(out: Path, work: Path, cache: Path | None) -> list[Part]:
    """In the order in which they run."""
    loss, attention, sweep = "bench_linear_cross_entropy", "bench_flash_attention", "sweep_flash_attention"
    no_flex = ("--without", "flex")  # its compiling takes long
    compiled = work / KERNELS
    in_parallel = ("-n", "6") if find_spec("xdist") else ()
    seconds = {"SmolLM2-135M": 40, "Qwen2.5-0.5B": 40, "Llama-3.2-1B": 45, "Llama-3.1-8B": 75}
    seconds |= dict.fromkeys(("rms_norm", "glu", "rope", "cross_entropy", "quantize", "adamw", "layer_norm"), 25)
    seconds |= {"gated_delta_rule": 30, "causal_conv1d": 20}

    def step(model: str) -> Part:
        command = module("benchmarks.train_step_gpu", "--model", model, "--out", str(out))
        return Part(f"step of {model}", command, seconds[model])

    def op(name: str) -> Part:
        return Part(name, kernels(f"bench_{name}", out), seconds[name], "kernels")

    def races(name: str, *options: str) -> Part:
        command = ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"]
        command += module(f"benchmarks.bench_{name}", "--device", "cuda", "--quick", "--once", *options)
        return Part(f"races of {name}", command, 60, tool="compute-sanitizer")

    unpack, fill = (
        module("benchmarks.kernel_cache", "--unpack", str(cache)),
        module("benchmarks.kernel_cache", "--fill"),
    )
    turns, dpo = (
        module(f"benchmarks.bench_{name}", "--rounds", "1", "--out", str(out)) for name in ("shared_turns", "dpo")
    )
    others = [option for name in ("torch varlen", "flash", "cudnn") for option in ("--without", name)]
    return [
        Part(MACHINE, module("benchmarks.gpu_session", "--machine"), 40, final=("done",), says=True),
        *([Part("kernels, unpacked", unpack, 60, says=True, makes=compiled)] if cache else []),
        Part("ceilings", kernels("bench_ceilings", out), 40, "kernels"),
        Part("kernels, compiled", fill, 150, "background", unless="kernels, unpacked", makes=compiled, says=True),
        Part("core tests", tests(), 100, "tests", needs=("pytest",), says=True),
        Part("linear cross-entropy", kernels(loss, out, "--only", "4096 x 4096 x 128256"), 45, "kernels"),
        *map(step, ("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", "Llama-3.1-8B")),
        Part("attention, packed", kernels(attention, out, "--only", "packed", *no_flex), 60, "kernels"),
        Part("attention, one document", kernels(attention, out, "--only", "one document", *no_flex), 45, "kernels"),
        Part("attention, sweep", kernels(sweep, out), 75, "kernels", needs=(f"benchmarks.{sweep}",)),
        *map(op, ("rms_norm", "glu", "rope", "cross_entropy", "quantize", "adamw", "layer_norm")),
        *map(op, ("gated_delta_rule", "causal_conv1d")),
        *smoke_runs(work),
        Part("other tests", tests(*in_parallel), 150, "tests", needs=("pytest",), says=True),
        Part("large tests", tests(), 60, "tests", needs=("pytest",), says=True),
        Part("linear cross-entropy, other sizes", kernels(loss, out), 45, "kernels"),
        Part("attention beside FlexAttention", kernels(attention, out, "--patience", "60"), 120, "kernels"),
        Part("preference tuning", dpo, 90, needs=READERS),
        Part("shared turns", turns, 40, needs=READERS),
        races("rms_norm"),
        races("flash_attention", "--only", "one document", *no_flex, *others),
    ]


def smoke_runs(work: Path) -> list[Part]:
    """Short whole runs on the quickstart's files: train, resume, LoRA, QLoRA and DPO; the last two recompute activations."""
    options = "--device cuda --eval_steps never --evaluate.generate_data none --evaluate.generate_group_field none"
    trained = f"--model.model_name_or_path {work}/full/model --model.config none --max_steps 10"
    pairs = "--trainer_type dpo --train_data configs/quickstart/pairs.jsonl --eval_fraction 0 --max_length 256"
    runs = {
        "train": f"--max_steps 20 --output_dir {work}/full",
        "resume": f"--max_steps 30 --output_dir {work}/full",
        "LoRA": f"{trained} --lora.r 8 --output_dir {work}/lora",
        "QLoRA": f"{trained} --lora.r 8 --load_in_4bit true --gradient_checkpointing true --output_dir {work}/qlora",
        "DPO": f"{trained} {pairs} --dpo.share_prompt true --gradient_checkpointing selective --output_dir {work}/dpo",
    }
    command = module("minisft.train", "configs/quickstart.toml", *options.split(), "--report_to", "none")
    return [Part(f"run: {name}", [*command, *more.split()], 30, needs=READERS) for name, more in runs.items()]


# ---- running them ---------------------------------------------------------------------------------------------------


def session(out: Path, work: Path, parts: list[Part], seconds: float) -> bool:
    """Runs the parts that have not ended before; returns whether all parts and tests have succeeded by now."""
    deadline, background = time.monotonic() + seconds, []
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    for unfinished in out.glob("*.tmp"):  # of a process that was killed
        unfinished.unlink()
    results = {row["part"]: row["result"] for row in read_csv(out / "parts.csv")}

    def note(part: Part, began: float, result: str, why: str) -> None:
        print(f"{part.name}: {result}{why and ', '}{why}", flush=True)
        row = {"part": part.name, "result": result, "seconds": time.monotonic() - began, "why": why}
        write_csv("parts", [row], out)
        results[part.name] = result
        try:
            write_report(out, parts, work)
        except Exception as error:  # of a row that nobody has thought of: the next parts shall run all the same
            print(f"no report: {error!r}", flush=True)

    def wait_for_background() -> None:
        while background:
            part, began, process = background.pop()
            code, text = process.end(min(deadline, began + part.seconds))
            with (out / "log.txt").open("a", encoding="utf-8") as log:
                log.write(f"\n==== {part.name}\n{text}")
            note(part, began, *result_of(part, code, text))

    for part in parts:
        is_there = part.makes is None or part.makes.exists()
        if results.get(part.name) in part.final and is_there or results.get(part.unless) == "done":
            continue
        if part.kind == "kernels":  # the work in the background would be in the times
            wait_for_background()
        began = time.monotonic()
        limit = min(part.seconds, deadline - began)
        absent = [name for name in part.needs if find_spec(name) is None]
        absent += [part.tool] if part.tool and shutil.which(part.tool) is None else []
        if absent:
            note(part, began, "left out", f"{', '.join(absent)} missing")
        elif limit < LEAST_S:
            note(part, began, "no time left", "")
        elif part.kind == "background":
            background.append((part, began, Process(part, out, work, work / "background.txt")))
        else:
            note(part, began, *run(part, out, work, began + limit))
            if part.name == MACHINE and results[MACHINE] != "done":
                break
    wait_for_background()
    succeeded = [results.get(part.name) == "done" or results.get(part.unless) == "done" for part in parts]
    return all(succeeded) and not any(row["outcome"] == "failed" for row in latest_tests(out))


class Process:
    """A part's command in a session of its own, which is killed with this process. It prints into a file, at its end."""

    def __init__(self, part: Part, out: Path, work: Path, log: Path):
        environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # as train.py has it
        environment |= os.environ | {
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HF_HUB_OFFLINE": "1",
            "TRITON_CACHE_DIR": str(work / KERNELS),
            "GPU_TESTS": part.name.partition(" ")[0],
            "GPU_TESTS_OUT": str(out),
        }
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n==== {part.name}: {' '.join(part.command)}\n")
        self.log, self.first = log, log.stat().st_size
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL),
            )

    def end(self, moment: float) -> tuple[int | None, str]:
        """(exit code, or None if it had to be ended at that moment, with all that it had started; what it printed)"""
        try:
            code = self.process.wait(max(0.1, moment - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            for number in (signal.SIGABRT, signal.SIGKILL):  # the first one makes Python say where it was
                try:
                    os.killpg(self.process.pid, number)
                    self.process.wait(3)
                    break
                except subprocess.TimeoutExpired:
                    continue
        with self.log.open("rb") as file:
            file.seek(self.first)
            return code, file.read().decode(errors="replace")


def result_of(part: Part, code: int | None, text: str) -> tuple[str, str]:
    """(result, why) of a part whose last process has ended."""
    last = next((line.strip("= ")[:300] for line in reversed(text.splitlines()) if line.strip()), "")
    if code is None:
        return "time is up", ""
    return ("done", last if part.says else "") if code == 0 else ("failed", f"exit code {code}: {last}")


def run(part: Part, out: Path, work: Path, moment: float) -> tuple[str, str]:
    """(result, why) of a part, which begins again behind whoever its process died of."""
    blame = {"kernels": blame_contender, "tests": blame_test}.get(part.kind)
    for _ in range(ATTEMPTS):
        rows = len(read_csv(out / "tests.csv"))
        code, text = Process(part, out, work, out / "log.txt").end(moment)
        if part.kind == "tests" and code in (1, 5):  # some have failed; none was left
            code = 0
        if not code or blame is None or not (blame(text, code, out) or len(read_csv(out / "tests.csv")) > rows):
            break
    return result_of(part, code, text)


def blame_contender(text: str, code: int, out: Path) -> bool:
    """A row for the one that was announced last (compare.py); False where none was."""
    announced = re.findall(r"^# (.+) \| (.+) \| (.+)$", text, re.MULTILINE)
    if announced:
        op, case, contender = announced[-1]
        row = {"op": op, "case": case, "contender": contender, "pass": "", "error": f"{ENDED} with {code}"}
        write_csv("kernels_cuda", [row], out)
    return bool(announced)


def blame_test(text: str, code: int, out: Path) -> bool:
    """A row for a test that has begun and not ended, as `pytest -v` shows it."""
    begun = re.findall(r"^\S*test_gpu\.py::(\w+(?:\[[^]]*\])?) *(PASSED|FAILED|SKIPPED|ERROR)?", text, re.MULTILINE)
    if not begun or begun[-1][1]:
        return False
    write_csv("tests", [{"test": begun[-1][0], "outcome": "failed", "reason": f"{ENDED} with {code}"}], out)
    return True


# ---- what is reported -----------------------------------------------------------------------------------------------


def latest_tests(out: Path) -> list[dict]:
    return report.newest(read_csv(out / "tests.csv"), "test")


def write_report(out: Path, parts: list[Part], work: Path) -> None:
    """report.md: the numbers in the order of their weight, then what became of each part."""
    rows = {
        name: read_csv(out / f"{name}.csv") for name in ("kernels_cuda", "train_step_cuda", "dpo_cuda", "shared_turns")
    }
    ended = {row["part"]: row for row in read_csv(out / "parts.csv")}
    text = ["# GPU session", ended.get(MACHINE, {}).get("why", ""), tests_text(out)]
    text += ["## Steps", report.gpu_step_table(rows["train_step_cuda"])] * bool(rows["train_step_cuda"])
    text += ["## Kernels against their targets", report.target_table(rows["kernels_cuda"])]
    text += ["## Kernels beside others", report.gpu_table(rows["kernels_cuda"])] * bool(rows["kernels_cuda"])
    text += ["## Preference tuning", report.dpo_table(rows["dpo_cuda"])] * bool(rows["dpo_cuda"])
    text += ["## Turns that share their past", report.turns_table(rows["shared_turns"])] * bool(rows["shared_turns"])
    lines = []
    for part in parts:
        row = ended.get(part.name, {"result": "not needed" if part.unless in ended else "not begun"})
        seconds = f"{float(row['seconds']):.0f}" if row.get("seconds") else ""
        lines.append([part.name, row["result"], seconds, row.get("why", "").replace("|", "/")])
    text += ["## Parts", report.table(["part", "result", "seconds", ""], lines)]
    at_need = [path for path in (work / KERNELS).glob("*/*.cubin") if not (path.parent / "key").exists()]
    text.append(f"{len(at_need)} kernels were compiled when they were needed.")
    (out / "report.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def tests_text(out: Path) -> str:
    rows = latest_tests(out)
    counts = ", ".join(f"{number} {outcome}" for outcome, number in Counter(row["outcome"] for row in rows).items())
    failed = [f"- `{row['test']}`: {row['reason']}" for row in rows if row["outcome"] == "failed"]
    return "\n".join([f"## Tests: {counts or 'none has run'}", *([""] if failed else []), *failed])


def machine() -> str:
    """One line: the GPU and the versions. Ends the program where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU")
    properties = torch.cuda.get_device_properties(0)
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(ask, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else "?"
    modules = ("triton", "numpy", "pytest", "tokenizers", "safetensors", "transformers", "trl", "liger_kernel")
    versions = [f"{name} {package_version(name) or 'absent'}" for name in modules]
    versions = [f"Python {sys.version.split()[0]}", f"torch {torch.__version__} (CUDA {torch.version.cuda})", *versions]
    size = f"{properties.total_memory / 1e9:.0f} GB, {properties.multi_processor_count} multiprocessors"
    return f"{properties.name}, {size}, driver {driver}, {os.cpu_count()} cores; {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of the results")
    parser.add_argument("--seconds", type=float, default=540, help="until the end of the last part")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="kernels that --build-cache has compiled")
    parser.add_argument("--commit", help="stamp the rows with it, where the checkout has no history")
    parser.add_argument(
        "--build-cache", type=Path, metavar="FILE", help="compile the kernels for sm_90, measure nothing"
    )
    parser.add_argument("--machine", action="store_true", help="say what this machine is, measure nothing")
    arguments = parser.parse_args()
    if arguments.machine:
        print(machine())
    elif arguments.build_cache:
        from benchmarks.kernel_cache import build

        build(arguments.build_cache)
    elif arguments.out is None:
        parser.error("--out says where the results go")
    else:
        if arguments.commit:
            os.environ["MINISFT_COMMIT"] = arguments.commit
        out = arguments.out.resolve()
        work = Path(tempfile.gettempdir()) / f"minisft-{hashlib.sha256(str(out).encode()).hexdigest()[:12]}"
        good = session(
            out, work, all_parts(out, work, arguments.cache and arguments.cache.resolve()), arguments.seconds
        )
        if (out / "report.md").exists():
            print((out / "report.md").read_text(encoding="utf-8"))
        sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
