"""The stages of one file, run one after the other. config/stages.py says what a stage is."""

import gc
from dataclasses import replace
from pathlib import Path

import torch

from minisft import console, loop, ranks, runtime
from minisft.config.stages import Stage
from minisft.errors import STOPPED
from minisft.loop import Result


def run_stages(stages: list[Stage]) -> Result:
    """One after the other, but for those that are finished; the result of the last, or of the one that was stopped."""
    device = runtime.pick_device(stages[0].config.train.device)
    done = []
    # One group for all of them: a second one would find in the launcher's store what the first wrote there.
    with ranks.process_group(device):
        is_main = ranks.rank() == 0
        for stage in stages:
            step, folder = stage.finished_step(), stage.config.output_dir
            skipped = ranks.sum_numbers_over_ranks([step is not None], device)[0] == ranks.world_size()
            if is_main:
                print(f"\n{stage.title} -> {folder}" + (f": finished, at step {step}" if skipped else ""), flush=True)
                if not skipped and (changed := stage.changed_keys()):
                    print(
                        f"its configuration is another one than when it was finished: {', '.join(changed)}", flush=True
                    )
            if skipped:
                done.append((stage.title, loop.Result(Path(folder), stage.model_dir, step)))
                continue
            result = loop.run(stage.config, stage.origins)
            done.append((stage.title, result))
            gc.collect()  # the model, the optimizer and what they refer to in circles, before the next are made
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            # which also waits for the model that rank 0 writes
            (stops,) = ranks.sum_numbers_over_ranks([result.signal is not None], device)
            if result.exit_code:
                return result
            if stops and stage is not stages[-1]:
                if is_main:
                    print(f"stopped after {stage.title}; the same command goes on with the next", flush=True)
                return replace(result, exit_code=STOPPED)
    if is_main:
        print(console.stages_closing(done))
    return done[-1][1]
