"""One real step on this machine, beside its prediction."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minisft import runtime
from minisft.config.sections import Config
from minisft.loop import train_step
from minisft.metrics import peak_memory
from minisft.plan.memory import MicroBatch
from minisft.prepare.run import prepare


@dataclass(frozen=True)
class Measured:
    batch: MicroBatch  # the largest of the step
    bytes: float  # the peak of the step: of a CPU the whole process, of a GPU without its context
    seconds: float
    tokens: int  # of the step


def measure_step(config: Config) -> Measured:
    """Prepare the run and take its first step twice; the second one counts, with moments and kept buffers there. Nothing is
    written but the token cache."""
    device = runtime.pick_device(config.train.device)
    run = prepare(config, device)
    batches = run.train.step(0, 0)
    train_step(run, config.train, batches)
    run.progress.step += 1
    forget_peak(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    train_step(run, config.train, batches)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    largest = [max(len(getattr(batch, name)) for batch in batches) for name in ("input_ids", "targets")]
    tokens = sum(batch.num_tokens for batch in batches)
    return Measured(MicroBatch(*largest), _peak(device), seconds, tokens)


def forget_peak(device: torch.device) -> None:
    """Start the peak again from here, where that can be: on a GPU and on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return peak_memory(device) * 2**30
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
