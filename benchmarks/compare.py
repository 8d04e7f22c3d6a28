"""What the benchmarks of the kernels share: one op on one size, its contenders in turn, a row for each of them.

    python -m benchmarks.bench_<op> [--device cpu|cuda] [--quick] [--out DIR]

A benchmark of an op is a list of cases. A case has inputs, contenders (our Triton kernels, our torch path, the naive
reference as "eager", and other libraries where they can be imported) and what the op must move or multiply at least.
Forward and backward are timed apart, in rounds (a b c c b a ...), and "both" is their sum. The backward starts from the
outputs moved by one place, which are random numbers of the right size, and of a loss from 1. In every round each contender
gets a copy of the inputs of its own, as some libraries overwrite what they are given.

On a GPU a time is that between two CUDA events on the stream. Before each of the two passes the cache is emptied and the
stream sleeps for a millisecond, so that Python is ahead when the work begins: what Python needs to launch a kernel does
not count here, a wait for the GPU inside of an op does. Memory is what the allocator handed out beyond the inputs, at its
highest, in one forward and backward; outputs and gradients are part of it. `percent` is the least time for the bytes and
the FLOPs, at two rates measured by the same process, over the measured time: a copy on the device (bytes read and
written), and a bf16 matrix product of 8192 x 8192 x 8192 on random numbers.

On a CPU the torch path is compared with the reference, the heap is that of a run (minisft/heap.py), and memory is measured in a
fresh process for each of them.

A contender that cannot be imported, or that fails, becomes a row with its error. Results are compared too: `differs` is the
largest norm(a - b) / norm(b) over outputs and gradients, b being those of the first contender that worked.

With --missing a case is left out if the CSV has a row of each of its contenders already, so that a benchmark that was killed
goes on where it was. A contender that has ended its process (gpu_session.py writes such a row) is not called again.
"""

import argparse
import faulthandler
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import ENDED, extra_memory, in_fresh_process, quartiles, read_csv, write_csv
from benchmarks.op_table import op_table
from minisft.heap import keep_freed_memory
from minisft.kernels.common import use_backend

EVERYBODY = "all"  # of a case: those that are timed in turn
FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any card
HEAD_START = 2_000_000  # cycles, about a millisecond
MEMORY_NOISE_MB = 2.0  # of resident memory, between two runs of the same
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    op: str
    name: str  # the size, "16384 x 4096 bf16"
    inputs: Callable[[], list]  # tensors (those that require a gradient get one), lists of tensors, other values;
    # made on the device that is current
    contenders: dict[str, Callable[[], Callable]]  # name -> a function that imports what it needs and returns the op
    costs: dict[str, tuple[float, float]]  # "forward", "backward" or "both" -> (bytes moved, FLOPs), at the very least
    returned_bytes: float = 0  # of the extra memory, what every implementation has to have

    @property
    def with_backward(self) -> bool:
        return set(self.costs) != {"forward"}

    def cost(self, label: str) -> tuple[float, float]:
        """(bytes, FLOPs) of a pass; zeros where it has no cost of its own, as where gradients are made in the forward."""
        if label == "both" and "both" not in self.costs:
            return tuple(sum(column) for column in zip(*self.costs.values()))
        return self.costs.get(label, (0, 0))


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Random numbers that a gradient is wanted for."""
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def backend(name: str, op: Callable) -> Callable[[], Callable]:
    """A contender: an op of minisft by one of its backends."""

    def run(*inputs):
        with use_backend(name):
            return op(*inputs)

    return lambda: run


def ours(device: str, op: Callable, eager: bool = True) -> dict[str, Callable]:
    """The contenders that are ours. eager: with the naive reference; False where its matrices are too large."""
    names = {"triton": "triton"} if device == "cuda" else {}
    names |= {"torch": "torch"} | ({"eager": "reference"} if eager else {})
    return {name: backend(setting, op) for name, setting in names.items()}


class CpuClock:
    def settle(self) -> None:
        pass

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, a: float, b: float) -> float:
        return b - a

    def wait(self) -> None:
        pass


class CudaClock:
    def __init__(self):
        self.buffer = torch.empty(FLUSH_BYTES // 4, device="cuda")

    def settle(self) -> None:
        """Fills the cache with lines that nobody needs and nobody has to write back, then gives Python a head start."""
        self.buffer.zero_()
        self.buffer.sum()
        torch.cuda._sleep(HEAD_START)

    def now(self) -> "torch.cuda.Event":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, a, b) -> float:
        return a.elapsed_time(b) / 1e3

    def wait(self) -> None:
        torch.cuda.synchronize()


def ceilings(clock, device: str) -> dict[str, float]:
    """What this device reaches, measured now: bytes/s of a copy, FLOP/s of a bf16 matrix product."""
    n, elements = (8192, 2**29) if device == "cuda" else (512, 2**22)
    source = torch.randn(elements, device=device)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    target, product = torch.empty_like(source), torch.empty_like(a)

    def median(function) -> float:
        times = []
        for _ in range(13):
            clock.settle()
            start = clock.now()
            function()
            end = clock.now()
            clock.wait()
            times.append(clock.seconds(start, end))
        return statistics.median(times[3:])

    copy_s = median(lambda: target.copy_(source))
    matmul_s = median(lambda: torch.mm(a, b.T, out=product))
    return {"copy": 2 * source.nbytes / copy_s, "matmul": 2 * n**3 / matmul_s}


def fresh(x):
    """A copy of an input: nothing that a contender does to it is seen by the next one."""
    if isinstance(x, Tensor):
        return x.detach().clone().requires_grad_(x.requires_grad)
    return type(x)(map(fresh, x)) if isinstance(x, list | tuple) else x


def one_round(run: Callable, leaves: list, clock, with_backward: bool) -> tuple[list, list[Tensor]]:
    """One forward and, if asked for, one backward.

    Returns the marks of the clock [(start, end), ...], and all outputs and gradients.
    """
    clock.settle()
    start = clock.now()
    outputs = run(*leaves)
    marks = [(start, clock.now())]
    outputs = [x for x in (outputs if isinstance(outputs, tuple | list) else [outputs]) if isinstance(x, Tensor)]
    if not with_backward:
        return marks, outputs
    roots = [x for x in outputs if x.requires_grad]
    gradients = [x.detach().roll(1) if x.ndim else None for x in roots]
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    clock.settle()
    start = clock.now()
    gradients = torch.autograd.grad(roots, wanted, gradients)
    marks.append((start, clock.now()))
    return marks, [x.detach() for x in outputs] + list(gradients)


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest norm(a - b) / norm(b); inf where shapes differ or a number is not finite."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    errors = [((x.float() - y.float()).norm() / y.float().norm().clamp(min=1e-30)).item() for x, y in zip(a, b)]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def announce(case: Case, name: str, patience: float) -> None:
    """The line tells whoever started this process whom it died of: a crash, or its own end after so many seconds."""
    print(f"# {case.op} | {case.name} | {name}", flush=True)
    faulthandler.dump_traceback_later(patience, exit=True, file=sys.__stderr__)


def first_calls(case: Case, inputs: list, clock, ended=(), patience: float = 90.0) -> tuple[dict, dict, dict]:
    """Calls every contender once, which compiles what it has to compile, and compares what they return.

    Returns ({name: op}, {name: error}, {name: difference}). ended: those that an earlier process died of.
    """
    runs, errors, differs, base = {}, {}, {}, None
    for name, make in case.contenders.items():
        if name in ended:
            errors[name] = f"left out: an earlier call of it {ENDED}"
            continue
        announce(case, name, patience)
        try:
            run = make()
            results = one_round(run, fresh(inputs), clock, case.with_backward)[1]
            clock.wait()
            base = base or results
            differs[name] = difference(results, base)
            runs[name] = run
        except ModuleNotFoundError as error:
            errors[name] = f"not here: {error}"
            print(f"{name} is left out: {error}")
        except Exception as error:  # of any library: it must not end the others
            errors[name] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            print(f"{case.op} {case.name}: {name} failed: {errors[name]}", flush=True)
            clock.wait()  # raises, and so ends the process, where the GPU is lost for it
        finally:
            faulthandler.cancel_dump_traceback_later()
            results = None
    return runs, errors, differs


def time_rounds(runs: dict[str, Callable], case: Case, inputs: list, clock, seconds: float) -> dict[str, dict]:
    """{name: {"forward": [s, ...], "backward": [s, ...], "both": [s, ...]}} of 5 to 50 rounds, as many as fit into
    `seconds`, after one that is not counted."""
    times = {name: {label: [] for label in (*PASSES, "both")} for name in runs}
    deadline = time.perf_counter() + seconds
    for number in range(51):
        for name in list(runs)[:: 1 if number % 2 else -1]:  # who comes first finds other memory than who comes second
            run = runs[name]
            marks = one_round(run, fresh(inputs), clock, case.with_backward)[0]
            clock.wait()
            spent = [clock.seconds(*mark) for mark in marks]
            if number:
                times[name]["both"].append(sum(spent))
                for label, s in zip(PASSES, spent):
                    times[name][label].append(s)
        if number >= 5 and time.perf_counter() > deadline:
            break
    return times


def cuda_extra(run: Callable, inputs: list, clock, with_backward: bool) -> float:
    """MiB of GPU memory that one forward and backward takes beyond the inputs."""
    leaves = fresh(inputs)
    gc.collect()
    clock.wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_round(run, leaves, clock, with_backward)
    clock.wait()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def cpu_extra(module: str, index: int, name: str) -> dict:
    """MiB that one forward and backward of a contender adds to a process. For `in_fresh_process`."""
    cases = importlib.import_module(module).cases
    small, case = (cases("cpu", quick)[index] for quick in (True, False))
    one_round(small.contenders[name](), small.inputs(), CpuClock(), small.with_backward)  # loads what torch loads late
    run, leaves = case.contenders[name](), case.inputs()
    gc.collect()
    return {"extra_mb": extra_memory(lambda: one_round(run, leaves, CpuClock(), case.with_backward))[1]}


def measured_already(rows: list[dict], case: Case) -> tuple[bool, set[str]]:
    """(whether rows of a CSV have all contenders of the case, those that have ended a process in any case of the op)."""
    of_op = [row for row in rows if row["op"] == case.op]
    here = {row["contender"] for row in of_op if row["case"] == case.name}
    ended = {row["contender"] for row in of_op if row.get("error", "").startswith(ENDED)}
    return case.contenders.keys() <= here or EVERYBODY in here, ended


def rates(cost: tuple[float, float], seconds: float, peaks: dict[str, float]) -> dict:
    """Columns: bytes and FLOPs with their rates, and how near the time is to what the peaks allow."""
    moved, flops = cost
    row = {}
    if moved or flops:
        row["percent"] = 100 * max(moved / peaks["copy"], flops / peaks["matmul"]) / seconds
    if moved:
        row |= {"gb": moved / 1e9, "gb_s": moved / seconds / 1e9}
    if flops:
        row |= {"tflop": flops / 1e12, "tflops": flops / seconds / 1e12}
    return row


def rows_of(case: Case, times: dict, extra: dict, errors: dict, differs: dict, peaks: dict) -> list[dict]:
    """A row for every contender and pass; memory stands in the last pass of a contender."""
    rows = []
    for name, by_pass in times.items():
        labels = (*PASSES, "both") if case.with_backward else ("forward",)
        for label in labels:
            q1, median, q3 = quartiles(by_pass[label])
            row = {"op": case.op, "case": case.name, "contender": name, "pass": label}
            row |= {"ms": 1e3 * median, "q1": 1e3 * q1, "q3": 1e3 * q3, "rounds": len(by_pass[label])}
            if "eager" in times:
                ratios = [theirs / s for theirs, s in zip(times["eager"][label], by_pass[label])]
                row |= dict(zip(("speedup_q1", "speedup", "speedup_q3"), quartiles(ratios)))
            row |= rates(case.cost(label), median, peaks)
            if label == labels[-1] and name in extra:
                row["extra_mb"] = extra[name]
                if case.returned_bytes:
                    row["beside_gb"] = extra[name] * 2**20 / 1e9 - case.returned_bytes / 1e9
            rows.append({**row, "differs": differs[name]})
    rows += [{"op": case.op, "case": case.name, "contender": name, "error": text} for name, text in errors.items()]
    where = {"copy_gb_s": peaks["copy"] / 1e9, "matmul_tflops": peaks["matmul"] / 1e12}
    return [{**row, **where} for row in rows]


def lapses(rows: list[dict]) -> list[str]:
    """Where the torch path is slower than the reference, or takes more memory.

    Slower: in three of four rounds, by the third quartile of the ratios, in the forward or in both passes together; the
    backward alone may compute what the forward did not save. More memory: beyond the noise of the measurement.
    """
    eager = {(row["op"], row["case"], row.get("pass")): row for row in rows if row["contender"] == "eager"}
    found = []
    for row in rows:
        other = eager.get((row["op"], row["case"], row.get("pass")))
        costless = "percent" not in row  # says nothing by itself, as where gradients are made in the forward
        if row["contender"] != "torch" or other is None or costless or row["pass"] == "backward":
            continue
        where = f"{row['op']} {row['case']} {row['pass']}"
        if float(row["speedup_q3"]) < 1:
            found.append(f"{where}: slower, {float(row['speedup']):.2f} x")
        ours, theirs = row.get("extra_mb"), other.get("extra_mb")
        if ours not in (None, "") and float(ours) > float(theirs) + MEMORY_NOISE_MB:
            found.append(f"{where}: more memory, {float(ours):.0f} against {float(theirs):.0f} MB")
    return found


def main(doc: str, cases: Callable[[str, bool], list[Case]]) -> None:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, help="append the rows to kernels_<device>.csv in this folder")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing for each case")
    parser.add_argument("--without", action="append", default=[], help="leave out this contender")
    parser.add_argument("--patience", type=float, default=90.0, help="seconds until a call that hangs ends the process")
    parser.add_argument("--missing", action="store_true", help="leave out the cases that the CSV in --out has already")
    parser.add_argument(
        "--once", action="store_true", help="call what is neither torch nor eager once, and time nothing"
    )
    arguments = parser.parse_args()
    faulthandler.enable()  # where a process is killed for its time, it says where it was
    device, module = arguments.device, f"benchmarks.{Path(sys.argv[0]).stem}"
    if device == "cpu":
        keep_freed_memory()  # as a run does

    torch.manual_seed(0)
    clock = CudaClock() if device == "cuda" else CpuClock()
    peaks, rows = None if arguments.once else ceilings(clock, device), []
    known = read_csv(arguments.out / f"kernels_{device}.csv") if arguments.missing else []
    without = [*arguments.without, "torch", "eager"] if arguments.once else arguments.without
    for number, case in enumerate(cases(device, arguments.quick)):
        if arguments.only not in f"{case.op} {case.name}":
            continue
        case = replace(case, contenders={name: make for name, make in case.contenders.items() if name not in without})
        complete, ended = measured_already(known, case)
        if complete:
            continue
        with torch.device(device):
            inputs = case.inputs()
        runs, errors, differs = first_calls(case, inputs, clock, ended, arguments.patience)
        if arguments.once:
            continue
        announce(case, EVERYBODY, arguments.patience)
        times = time_rounds(runs, case, inputs, clock, 0.2 if arguments.quick else arguments.seconds)
        faulthandler.cancel_dump_traceback_later()
        if device == "cuda":
            extra = {name: cuda_extra(run, inputs, clock, case.with_backward) for name, run in runs.items()}
        elif not arguments.quick:
            where = dict(target="benchmarks.compare:cpu_extra", module=module, index=number)
            extra = {name: in_fresh_process(name=name, **where)["extra_mb"] for name in runs}
        else:
            extra = {}
        new = rows_of(case, times, extra, errors, differs, peaks)
        if arguments.out:
            write_csv(f"kernels_{device}", new, arguments.out)
        rows += new
        del inputs, runs
    if rows:
        print(f"copy {peaks['copy'] / 1e9:,.0f} GB/s, bf16 products {peaks['matmul'] / 1e12:,.3g} TFLOP/s here")
        print(op_table(rows, arguments.quick))
    if device == "cpu" and not arguments.quick:
        for lapse in lapses(rows):
            print(f"NOT AS PROMISED: {lapse}")
