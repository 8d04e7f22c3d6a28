"""Tokens per second of a whole optimizer step on a GPU, beside the least time that such a step could take.

    python -m benchmarks.train_step_gpu [--model NAME] [--steps N] [--out DIR]

Four models with random weights, on documents of 2,048 random tokens side by side of which all are trained: the cases of
step_on_paper.py, whose `floor` is that least time. A step is loop.train_step as a run calls it, its batch in pinned memory to
begin with; first op by op, then with the micro-batch as a CUDA graph. The first steps are not counted. A time is that from the
end of one step to the end of the next, by events on the stream.

One more step is profiled: kernels and copies that ran, those from or to memory that is not pinned, how long kernels kept the
GPU busy, and waits, the calls of CUDA in which the host stood still until the device had come to it. What takes longest is
printed.

Needs neither a tokenizer nor a network, and not what the loop imports in order to read text and files: where that is not
installed, something empty stands in for it (bare_machine.py).
"""

import argparse
import dataclasses
import gc
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import benchmarks.bare_machine  # noqa: F401 (first: the loop may lack what it imports)
from benchmarks.compare import CpuClock, CudaClock
from benchmarks.harness import print_table, quartiles, write_csv
from benchmarks.step_on_paper import MODELS, Case, floor, llama, make_batches
from benchmarks.step_on_paper import make_run as make_run_on
from minisft import sft
from minisft.cards import CARDS
from minisft.config.sections import Config, TrainSection
from minisft.data.batch import IGNORE_INDEX, Batch
from minisft.loop import train_step
from minisft.micro_batch import Graphs, forward_backward
from minisft.prepare.run import Run
from minisft.runtime import pick_device

WARMUP_STEPS = 5  # a graph is recorded at the third
QUICK = Case(
    llama(
        **dict(vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2),
        **dict(num_attention_heads=4, num_key_value_heads=2),
    ),
    tokens=96,
)
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")  # for the whole device only the profiler itself waits
SHOWN = 12  # kernels in the table


def make_run(case: Case, device: torch.device, as_graph: bool = False) -> tuple[Run, TrainSection]:
    """The model with random weights and its optimizer on the device, and the settings that train_step reads."""
    section = TrainSection(
        optim=case.optimizer, weights_dtype=case.weights_dtype, gradient_accumulation_steps=case.accumulation
    )
    run = make_run_on(Config(train=section), case, SimpleNamespace(device=device, phase=""))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in run.model.parameters():
            if p.ndim > 1:
                p.normal_(0.0, 0.02)
    if as_graph:  # as prepare/run.py does
        parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
        plainly = partial(forward_backward, run.loss, run.model, run.precision)
        run = dataclasses.replace(run, graphs=Graphs(plainly, sft.metric_weights, parameters))
    return run, section


def make_steps(case: Case, count: int) -> list[list[Batch]]:
    """The micro-batches of each of so many steps, of different tokens, on the host, as the loader makes them in advance."""
    torch.manual_seed(1)
    steps = []
    for _ in range(count):
        batches = []
        for batch in make_batches(case):
            ids = torch.randint(case.config["vocab_size"], batch.input_ids.shape)
            targets = torch.where(batch.targets == IGNORE_INDEX, IGNORE_INDEX, ids[batch.loss_rows + 1])
            batch = dataclasses.replace(batch, input_ids=ids, targets=targets)
            batches.append(batch.in_one_buffer(torch.cuda.is_available()))
        steps.append(batches)
    return steps


def measure(
    name: str, case: Case, device: torch.device, count: int, as_graph: bool, recompute: bool = False
) -> Iterator[dict]:
    """Yields a row of `count` steps, and the same row with the columns of one more, which is profiled.

    recompute: the gated units in the backward.
    """
    run, section = make_run(case, device, as_graph)
    run.model.recompute_cheap_ops(recompute)
    clock = CudaClock() if device.type == "cuda" else CpuClock()
    steps, num_tokens = make_steps(case, WARMUP_STEPS + count + 1), case.tokens * case.accumulation
    marks, stats = [], []
    for batches in steps[:-1]:
        stats.append(train_step(run, section, batches).stats)
        marks.append(clock.now())
        run.progress.step += 1
    clock.wait()
    seconds = [clock.seconds(a, b) for a, b in zip(marks[WARMUP_STEPS - 1 :], marks[WARMUP_STEPS:])]
    q1, median, q3 = quartiles(seconds)
    row = {"model": name, "tokens": num_tokens, "optimizer": case.optimizer, "weights": case.weights_dtype}
    how = "op by op" if run.graphs is None else "NO GRAPH" if run.graphs.failed else "CUDA graph"
    row |= {"how": how + ", glu computed again" * recompute, "tokens_per_second": num_tokens / median}
    row |= {"ms": 1e3 * median, "q1": 1e3 * q1, "q3": 1e3 * q3, "steps": count}
    if device.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        card = next((card for card in CARDS.values() if card.name in torch.cuda.get_device_name()), None)
        if card is not None:
            least = sum(floor(run, steps[0], card).values())
            row |= {"floor_ms": 1e3 * least, "share_of_floor": least / median}
    losses = [each.means()["loss"] for each in stats]
    row |= {"first_loss": losses[0], "last_loss": losses[-1]}
    yield row
    yield row | profiled(lambda: train_step(run, section, steps[-1]), clock)


def measure_what_fits(name: str, case: Case, device: torch.device, count: int, as_graph: bool) -> Iterator[dict]:
    """`measure`, with recomputing where the memory of the GPU is too small otherwise. Ends the program if it is anyway."""
    for recompute in (False, True):
        gc.collect()  # what the last one has left
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield from measure(name, case, device, count, as_graph, recompute)
            return
        except torch.cuda.OutOfMemoryError as error:
            print(f"{name}: {error}", flush=True)
    sys.exit(f"{name} does not fit this GPU")


def profiled(step: Callable, clock) -> dict:
    """Columns: what one step did, as PyTorch's profiler tells it."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    clock.wait()
    with profile(activities=activities, acc_events=True) as profiler:  # without it torch 2.11 warns
        step()
        clock.wait()
    return counted(profiler.events())


def counted(events) -> dict:
    """Columns of the events of a step; prints the kernels that took longest."""
    spent, found = defaultdict(list), Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            if event.name.startswith(("Memcpy", "Memset")):
                found["copies"] += 1
                found["pageable"] += "Pageable" in event.name
            else:
                spent[event.name].append(event.time_range.elapsed_us() / 1e3)
        found["waits"] += event.name in WAITS
    longest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    print_table([{"kernel": name[:70], "times": len(ms), "ms": sum(ms)} for name, ms in longest])
    row = {"kernels": sum(map(len, spent.values())), "busy_ms": sum(map(sum, spent.values()))}
    return row | {name: found[name] for name in ("copies", "pageable", "waits")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="only this one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=12, help="counted steps")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it run at all?")
    parser.add_argument("--out", type=Path, help="append the rows to train_step_<device>.csv in this folder")
    arguments = parser.parse_args()
    device, rows = pick_device(arguments.device), []
    for name in [arguments.model] if arguments.model else MODELS:
        case = QUICK if arguments.quick else MODELS[name]
        for as_graph in (False, True) if device.type == "cuda" else (False,):
            for row in measure_what_fits(name, case, device, arguments.steps, as_graph):
                if arguments.out:  # at once: the profiler may end the process
                    write_csv(f"train_step_{arguments.device}", [row], arguments.out)
            rows.append(row)
    print_table(rows)


if __name__ == "__main__":
    main()
