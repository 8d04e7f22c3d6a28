"""Learning-rate schedules: the factor that multiplies the peak learning rate at a step.

Steps count from 0: the first update of a run takes step = 0, the last one step = total_steps - 1. The formulas are
those of Hugging Face transformers (linear, cosine_with_min_lr, constant_with_warmup), so that a run here and a run
there take the same learning rates:

    warm-up    step < W     f = step / W                                  (the first update has learning rate 0)
    after it   p = (step - W) / (S - W), from 0 towards 1
               linear       f = min_factor + (1 - min_factor) (1 - p)
               cosine       f = min_factor + (1 - min_factor) (1 + cos(pi p)) / 2      (SGDR, arXiv 1608.03983)
               constant     f = 1

with W = warmup_steps, S = total_steps and min_factor = min_lr / learning_rate. After step S the factor stays put.
"""

import math


def lr_factor(name: str, step: int, total_steps: int, warmup_steps: int = 0, min_factor: float = 0.0) -> float:
    """Learning rate of update `step` (0 = the first) divided by the peak; `name` is linear, cosine or constant."""
    assert name in ("linear", "cosine", "constant"), name
    if step < warmup_steps:
        return step / warmup_steps
    if name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    falling = 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return min_factor + (1.0 - min_factor) * falling


def total_steps(steps_per_epoch: int, num_train_epochs: float, max_steps: int = -1) -> int:
    """Optimizer steps of a run: max_steps where it is positive, else all epochs, the last one possibly in part."""
    return max_steps if max_steps > 0 else math.ceil(steps_per_epoch * num_train_epochs)


def num_warmup_steps(total_steps: int, warmup_steps: int = 0, warmup_ratio: float = 0.0) -> int:
    """Steps of warm-up, of which the configuration gives the number or the part of all steps."""
    return warmup_steps or math.ceil(total_steps * warmup_ratio)
