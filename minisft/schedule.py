"""Learning-rate schedules: the factor that multiplies the peak learning rate at a step.

Steps count from 0: the first update of a run takes step = 0, the last one step = total_steps - 1. The formulas are
those of Hugging Face transformers, so that a run here and a run there take the same learning rates. All of them warm up
alike, and then fall in a way of their own, from 1 to the floor:

    warm-up    step < W     f = step / W                                  (the first update has learning rate 0)
    after it   p = (step - W) / (S - W), from 0 towards 1
               f = min_factor + (1 - min_factor) fall(p)

    linear                  fall = 1 - p
    cosine                  fall = (1 + cos(pi p)) / 2                                (SGDR, arXiv 1608.03983)
    cosine_with_restarts    fall = (1 + cos(pi (num_cycles p mod 1))) / 2             (the same, with its restarts)
    polynomial              fall = (1 - p)^power
    warmup_stable_decay     fall = 1 until the last decay_ratio of the steps (MiniCPM, arXiv 2404.06395), then with q from
                            0 to 1 over these: 1 - q (linear), (1 + cos(pi q)) / 2 (cosine), 1 - sqrt(q) (1-sqrt,
                            arXiv 2405.18392); it warms up from min_factor and not from 0
    inverse_sqrt            f = sqrt(t / (step - W + t)), t = timescale, or W, or 10,000   (T5; arXiv 2106.04560)
    constant                f = 1
    reduce_on_plateau       f = 1, lowered step by step by the evaluation loss, see `after_evaluation`

with W = warmup_steps, S = total_steps and min_factor = min_lr / learning_rate. After step S the factor stays the same.
inverse_sqrt and constant have no floor. A constant rate after the warm-up suits runs whose end is not known. So do the
stable steps of warmup_stable_decay: a run can be resumed there and decayed later.
"""

import math
from dataclasses import dataclass
from typing import Any

# Every schedule, with what it takes besides the number of steps and of warm-up steps.
SCHEDULES: dict[str, dict] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 1},
    "polynomial": {"power": 1.0},
    "warmup_stable_decay": {"decay_ratio": 0.1, "decay_type": "linear"},
    "inverse_sqrt": {"timescale": None},
    "constant": {},
    "reduce_on_plateau": {"factor": 0.1, "patience": 10, "threshold": 1e-4, "cooldown": 0},
}
HAVE_NO_FLOOR = ("inverse_sqrt", "constant")
DECAYS = {
    "linear": lambda q: 1.0 - q,
    "cosine": lambda q: 0.5 * (1.0 + math.cos(math.pi * q)),
    "1-sqrt": lambda q: 1.0 - math.sqrt(q),
}


def wrong_option(name: str, key: str, value: Any) -> str:
    """What schedule `name` expects instead of this option; empty if the option is right."""
    if key == "min_lr":
        return "it has a key of its own, train.min_lr"
    if key not in SCHEDULES[name]:
        return f"{name} takes {', '.join(SCHEDULES[name]) or 'no options'}"
    if key == "decay_type":
        return "" if value in DECAYS else f"decay_type is one of {', '.join(DECAYS)}"
    if key == "timescale" and value is None:
        return ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in ("patience", "cooldown"):
        return "" if is_number and value >= 0 and value == int(value) else f"{key} is a whole number from 0 on"
    if key in ("factor", "threshold"):
        return "" if is_number and 0 <= value < 1 and (value or key == "threshold") else f"{key} is between 0 and 1"
    if key == "num_cycles":
        return "" if is_number and value >= 1 and value == int(value) else "num_cycles is a whole number from 1 on"
    if key == "decay_ratio":
        return "" if is_number and 0 < value <= 1 else "decay_ratio is above 0 and at most 1"
    return "" if is_number and 0 < value < math.inf else f"{key} is a number above 0"


def lr_factor(
    name: str, step: int, total_steps: int, warmup_steps: int = 0, min_factor: float = 0.0, **options: Any
) -> float:
    """Learning rate of update `step` (0 = the first) divided by the peak; `name` and `options` as in SCHEDULES."""
    assert name in SCHEDULES, name
    assert options.keys() <= SCHEDULES[name].keys(), options
    options = SCHEDULES[name] | options
    if step < warmup_steps:
        start = min_factor if name == "warmup_stable_decay" else 0.0
        return start + (1.0 - start) * step / warmup_steps
    if name in ("constant", "reduce_on_plateau"):
        return 1.0
    if name == "inverse_sqrt":
        timescale = options["timescale"] or warmup_steps or 10_000
        return math.sqrt(timescale / (step - warmup_steps + timescale))

    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    if name == "polynomial":
        fall = (1.0 - progress) ** options["power"]
    elif name == "cosine_with_restarts":
        fall = DECAYS["cosine"](options["num_cycles"] * progress % 1.0) if progress < 1 else 0.0
    elif name == "warmup_stable_decay":
        decay_steps = math.ceil(total_steps * options["decay_ratio"])
        decayed = min(1.0, max(0.0, (step - (total_steps - decay_steps)) / decay_steps))
        fall = DECAYS[options["decay_type"]](decayed)
    else:
        fall = DECAYS[name](progress)
    return min_factor + (1.0 - min_factor) * fall


@dataclass(frozen=True)
class Plateau:
    """The state of reduce_on_plateau: the best loss, the number of evaluations since without progress, the factor."""

    best: float | None = None
    num_bad: int = 0
    cooling: int = 0  # evaluations after a reduction that are not counted as bad
    factor: float = 1.0


def after_evaluation(
    plateau: Plateau,
    loss: float,
    step: int,
    *,
    name: str,
    total_steps: int = 0,
    warmup_steps: int = 0,
    min_factor: float = 0.0,
    **options: Any,
) -> Plateau:
    """The plateau after an evaluation at `step`. It changes only for reduce_on_plateau, after the warm-up.

    Once more than `patience` evaluations in a row have not brought the loss below (1 - threshold) x the best one, the
    learning rate is multiplied by `factor`, down to min_factor x the peak; then `cooldown` evaluations do not count. This
    is the rule of torch's ReduceLROnPlateau; a NaN is no progress. The arguments after the step are those of `lr_factor`.
    """
    if name != "reduce_on_plateau" or step < warmup_steps:
        return plateau
    options = SCHEDULES[name] | options
    is_best = loss < (math.inf if plateau.best is None else plateau.best * (1.0 - options["threshold"]))
    num_bad = 0 if is_best or plateau.cooling else plateau.num_bad + 1
    reduced = num_bad > options["patience"]
    return Plateau(
        best=loss if is_best else plateau.best,
        num_bad=0 if reduced else num_bad,
        cooling=options["cooldown"] if reduced else max(0, plateau.cooling - 1),
        factor=max(plateau.factor * options["factor"], min_factor) if reduced else plateau.factor,
    )


def total_steps(steps_per_epoch: int, num_train_epochs: float, max_steps: int = -1) -> int:
    """Optimizer steps of a run: max_steps where it is positive, else all epochs, the last one possibly in part."""
    return max_steps if max_steps > 0 else math.ceil(steps_per_epoch * num_train_epochs)


def num_warmup_steps(total_steps: int, warmup_steps: int = 0, warmup_ratio: float = 0.0) -> int:
    """Steps of warm-up: warmup_steps where it is set, else warmup_ratio of all steps."""
    return warmup_steps or math.ceil(total_steps * warmup_ratio)
