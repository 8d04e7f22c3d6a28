"""Loss spikes: is the loss of a step, or the norm of its gradient, far above that of the last steps?

A value is compared with the x of the last WINDOW steps, in numbers that a single outlier does not move:

    z = (value - median(x)) / spread        spread = wide max(1.4826 median|x - median(x)|, floor)

The factor 1.4826 makes the median absolute deviation of normal values their standard deviation. x are the losses, and the
logarithms of the norms, because one norm is often several times another. A step is a spike where z of either is above the
threshold. What falls never is.

    floor    LOSS_FLOOR nats, or LOSS_FLOOR of the median if that is more; NORM_FLOOR for the logarithms. Without it a loss that
             hardly varies would alarm at every breath.
    wide     max(1, SETTLED / number of x): the fewer steps there are to compare with, the higher a value may be. With a
             threshold of 8 the second step is a spike at 14 times the loss of the first; its norm hardly ever is.

A gradient of exactly 0 beside a loss above 0 counts as a spike too. A far too high learning rate leaves it behind: weights so
large that the squares in a norm overflow. Then nothing reaches the loss any more, which stays at ln(vocabulary).

The values of spikes join the others, so after half a window a new level is no spike any more.

False alarms. Of 100,000 steps of normal noise in runs of 250 none is a spike, and the highest z is 6.1. Six healthy
runs, 1,346 steps had none either: the quickstart, GSM8K from random weights (2 rows and 2 packs a step) and continued
from the quickstart (1 row), LoRA on rows that the model knew already (4 rows), DPO (8 pairs), on a CPU. Their highest
z were 5.2 for a loss, with these 4 rows, and 3.6 for a norm, with 1 row.
"""

import math
from dataclasses import dataclass, field
from statistics import median

from minisft.units import digits

WINDOW = 128  # steps
SETTLED = 16  # steps
LOSS_FLOOR = 0.1
NORM_FLOOR = 0.3
NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal distribution
LARGEST = 1e38  # limits are compared in fp32


@dataclass
class Spikes:
    """The spikes of a run."""

    count: int = 0
    skipped: int = 0  # whose step made no update, and the run went on
    rewinds: int = 0  # how often the run went back to a checkpoint
    # steps, as the log numbers them, whose rows train nothing any more
    left_out: list[int] = field(default_factory=list)


@dataclass
class Recent:
    """The last steps, up to WINDOW of them. All values are finite."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of gradients

    def add(self, loss: float, norm: float) -> None:
        for values, value in ((self.losses, loss), (self.norms, norm)):
            values.append(value)
            del values[:-WINDOW]

    def limits(self, threshold: float) -> tuple[float, float]:
        """The highest loss and the highest norm that are no spike; infinite before the first step."""
        loss, norm = loss_scale(self.losses), norm_scale(self.norms)
        of_loss = math.inf if loss is None else min(loss[0] + threshold * loss[1], LARGEST)
        of_norm = math.inf if norm is None else math.exp(min(norm[0] + threshold * norm[1], math.log(LARGEST)))
        return of_loss, of_norm

    def z_scores(self, loss: float, norm: float) -> tuple[float, float]:
        """Of a loss and a norm, both finite; 0 before the first step."""
        of_loss, of_norm = loss_scale(self.losses), norm_scale(self.norms)
        z_loss = 0.0 if of_loss is None else (loss - of_loss[0]) / of_loss[1]
        z_norm = 0.0 if of_norm is None else (_log(norm) - of_norm[0]) / of_norm[1]
        return z_loss, z_norm

    def describe(self, loss: float, norm: float, threshold: float) -> str:
        """What is too high, the highest z-score at least: "a spike: loss 5213., z-score 412 (median of ...: 2.310)"."""
        if norm == 0:
            return f"the gradient is zero, with a loss of {digits(loss, 4)}"
        z_scores, parts = self.z_scores(loss, norm), []
        for name, value, z, values in zip(("loss", "gradient norm"), (loss, norm), z_scores, (self.losses, self.norms)):
            if z > threshold or z == max(z_scores):
                usual = f"median of the last {len(values)} steps: {digits(median(values), 4)}"
                parts.append(f"{name} {digits(value, 4)}, z-score {digits(z, 3)} ({usual})")
        return "a spike: " + ", ".join(parts)


def loss_scale(losses: list[float]) -> tuple[float, float] | None:
    """(median, spread) of losses; None where there are none."""
    return _scale(losses, LOSS_FLOOR, relative=True)


def norm_scale(norms: list[float]) -> tuple[float, float] | None:
    """(median, spread) of the logarithms of norms; None where there are none."""
    return _scale([_log(norm) for norm in norms], NORM_FLOOR, relative=False)


def _scale(values: list[float], floor: float, relative: bool) -> tuple[float, float] | None:
    if not values:
        return None
    middle = median(values)
    if relative:
        floor = max(floor, floor * abs(middle))
    deviation = NORMAL * median(abs(value - middle) for value in values)
    return middle, max(1.0, SETTLED / len(values)) * max(deviation, floor)


def _log(norm: float) -> float:
    return math.log(max(norm, 1 / LARGEST))  # a step that trains nothing has a norm of 0


def describe_spikes(spikes: Spikes, step: int) -> str:
    """For the end of a run of so many steps."""
    text = f"{spikes.count:,} of {step:,} steps were spikes of the loss or of the gradient's norm"
    if spikes.skipped:
        text += f"; {spikes.skipped:,} of them trained nothing"
    if spikes.rewinds:
        text += f"; the run went back {spikes.rewinds:,} times, and leaves out the rows of steps "
        text += ", ".join(map(str, spikes.left_out))
    return text
