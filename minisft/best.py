"""The best evaluation of a run, and stopping early.

After every evaluation one metric is compared with its best value so far. The checkpoint of the best step is saved at once and
is not rotated away; with load_best_model_at_end it is exported in the place of the last one. Early stopping ends the run once
`patience` evaluations in a row have not brought the metric further than `threshold` beyond its best value. `Best` is stored
in checkpoints, so a resumed run keeps both the choice and the count.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from minisft.errors import UserError

LOWER_IS_BETTER = ("loss", "entropy", "kl")
GREATER_IS_BETTER = ("accuracy", "accuracies", "margins")


@dataclass(frozen=True)
class Best:
    value: float | None = None  # of the metric; None before the first evaluation
    step: int = 0
    num_bad: int = 0  # evaluations in a row without progress, up to the last one


def best_metric(wanted: str | None, known: Collection[str]) -> str:
    """The name of the metric as it is logged. wanted: with or without "eval_"; None = the loss of the first set.

    Raises UserError for a name that no evaluation has.
    """
    if wanted is None:
        return next(name for name in known if name.endswith("loss"))
    for name in (wanted, f"eval_{wanted}"):
        if name in known:
            return name
    raise UserError(
        f"evaluate.metric_for_best_model = '{wanted}' is no metric of the evaluations",
        hint=f"metrics: {', '.join(known)}",
    )


def is_greater_better(metric: str, wanted: bool | None) -> bool:
    """evaluate.greater_is_better, or the answer that the metric's name gives. Raises UserError where it gives none."""
    if wanted is not None:
        return wanted
    whole = "loss" if "losses/" in metric else metric  # of a kind of token, or of a source
    last = whole.replace("/", "_").rpartition("_")[2]
    if last not in LOWER_IS_BETTER + GREATER_IS_BETTER:
        hint = "set evaluate.greater_is_better"
        raise UserError(f"whether a greater {metric} is better cannot be told from its name", hint=hint)
    return last in GREATER_IS_BETTER


def after_evaluation(
    best: Best, value: float, step: int, *, greater_is_better: bool, threshold: float = 0.0, counts: bool = True
) -> Best:
    """The best after an evaluation at `step`; a NaN is never better. counts: whether it is one of the regular evaluations,
    which early stopping counts."""
    sign = 1.0 if greater_is_better else -1.0
    gain = math.inf if best.value is None else sign * (value - best.value)
    is_better = gain > 0 and not math.isnan(value)
    num_bad = 0 if is_better and gain > threshold else best.num_bad + counts
    return Best(value, step, num_bad) if is_better else Best(best.value, best.step, num_bad)
