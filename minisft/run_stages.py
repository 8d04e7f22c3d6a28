"""The stages of one file, run one after the other. config/stages.py says what a stage is."""

import gc
from dataclasses import replace
from pathlib import Path

import torch

from minisft import console, loop, ranks, runtime
from minisft.config.stages import Stage
from minisft.errors import STOPPED, reports_in
from minisft.finish import Result
from minisft.signals import StopSignal


def run_stages(stages: list[Stage], signal: StopSignal) -> Result:
    """Run the stages that are not finished yet. Returns the result of the last one, or of the one that was stopped.

    Raises Stopped where a signal comes before the first step of one; the finished ones are skipped at the next start.
    """
    device = runtime.pick_device(stages[0].config.train.device)
    done: list[tuple[str, Result]] = []
    # One group for all stages: a second group would find the first one's keys in the launcher's store.
    with ranks.process_group(device):
        for stage in stages:
            step, folder = stage.finished_step(), stage.config.output_dir
            (num_finished,) = ranks.sum_numbers_over_ranks([step is not None])
            if num_finished == ranks.world_size():
                say(f"\n{stage.title} -> {folder}: finished, at step {step}")
                done.append((stage.title, Result(Path(folder), stage.model_dir, step)))
                continue
            say(f"\n{stage.title} -> {folder}")
            with reports_in(folder):
                result = loop.run(stage.config, stage.origins, signal)
            done.append((stage.title, result))
            release_memory(device)
            # this also waits for the model that rank 0 writes
            (num_stops,) = ranks.sum_numbers_over_ranks([signal.received is not None])
            if result.exit_code:
                return result
            if num_stops and stage is not stages[-1]:
                say(f"stopped after {stage.title}; the same command resumes with the next")
                return replace(result, exit_code=STOPPED)
        say(console.stages_closing(done))
    return done[-1][1]


def say(text: str) -> None:
    if ranks.rank() == 0:
        print(text, flush=True)


def release_memory(device: torch.device) -> None:
    """Free the model, the optimizer and everything that they refer to in circles, before the next stage makes its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
