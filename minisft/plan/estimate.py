"""A plan: what a run will do, whether it fits, what it costs. Everything here is arithmetic; nothing is loaded or trained."""

from dataclasses import asdict, dataclass
from typing import Any

from minisft.cards import Card
from minisft.config.sections import Config
from minisft.model.model_config import ModelConfig
from minisft.plan.changes import Fit, cheapest, singles
from minisft.plan.flops import forward_of_blocks, products
from minisft.plan.memory import Memory, MicroBatch, Parameters, Place, parameters_of, predict
from minisft.plan.offload import Offload, offload
from minisft.plan.shapes import count
from minisft.plan.work import Work
from minisft.preference.losses import WITHOUT_REFERENCE

# The prediction was within so much of what was measured (docs/plan.md): a run that comes closer to the memory may not fit.
MARGIN = 0.10
MFU = 0.4  # of the card's matmul rate: what --mfu is without it, an assumption


@dataclass(frozen=True)
class Hardware:
    """Where the run is planned for."""

    place: Place
    memory: float  # bytes of a rank
    name: str  # in words
    card: Card | None = None


@dataclass(frozen=True)
class Estimate:
    config: Config
    model: ModelConfig
    hardware: Hardware
    work: Work
    batch: MicroBatch  # the largest
    memory: Memory
    parameters: int
    trained: int
    flops: dict[str, float]  # of a step, over all ranks, by part
    mfu: float
    price: float | None  # of a GPU and hour

    @property
    def fits(self) -> str:
        """ "yes", "perhaps" (within the error of the prediction) or "no"."""
        if self.memory.total <= self.hardware.memory / (1 + MARGIN):
            return "yes"
        return "perhaps" if self.memory.total <= self.hardware.memory else "no"

    @property
    def again(self) -> float:
        """What recomputing every block adds to a step, as a share of its FLOPs without that."""
        tokens, pairs = _tokens_and_pairs(self.config, self.work, self.hardware.place.ranks)
        shapes = parameters_of(self.config, self.model).model
        plain = sum(value for part, value in self.flops.items() if part != "again")
        return forward_of_blocks(self.model, shapes, tokens=tokens, pairs=pairs) / plain

    @property
    def seconds_a_step(self) -> float | None:
        card = self.hardware.card
        ranks = self.hardware.place.ranks
        more = 0.0 if self.offload is None else self.offload.seconds
        return None if card is None else sum(self.flops.values()) / (self.mfu * card.matmul * ranks) + more

    @property
    def offload(self) -> Offload | None:
        return offload(self.config, self.model, self.hardware.place)

    @property
    def hours(self) -> float | None:
        """Of the steps of the whole run; evaluations and saves are not in it."""
        seconds, steps = self.seconds_a_step, self.work.steps
        return None if seconds is None or steps is None else seconds * steps / 3600

    @property
    def cost(self) -> float | None:
        hours = self.hours
        return None if hours is None or self.price is None else hours * self.price * self.hardware.place.ranks

    def changes(self) -> tuple[Fit | None, list[Fit]]:
        """(the cheapest combination that fits, every change by itself)"""
        arguments = self.config, self.model, self.work, self.hardware.place, self.again
        return cheapest(*arguments, self.hardware.memory / (1 + MARGIN)), list(singles(*arguments))

    def to_dict(self) -> dict[str, Any]:
        """For --json. Bytes, FLOPs, seconds."""
        work, place = self.work, self.hardware.place
        found: dict[str, Any] = {
            "model": {"type": self.model.model_type, "parameters": self.parameters, "trained": self.trained},
            "data": {
                key: getattr(work, key)
                for key in ("source", "unit", "units", "tokens", "targets_share", "packs", "fill", "mean_length")
            },
            "steps": {"per_epoch": work.steps_per_epoch, "all": work.steps},
            "step": {
                "tokens": work.tokens_of_step(self.config, place.ranks),
                "flops": self.flops,
                "seconds": self.seconds_a_step,
                "mfu": self.mfu,
            },
            "hardware": {"name": self.hardware.name, "bytes": self.hardware.memory, "ranks": place.ranks},
            "memory": {
                "parts": self.memory.parts,
                "total": self.memory.total,
                "moment": self.memory.moment,
                "micro_batch": asdict(self.batch),
                "fits": self.fits,
            },
            "hours": self.hours,
            "cost": self.cost,
        }
        if self.offload is not None:
            found["offload"] = asdict(self.offload) | {"seconds": self.offload.seconds}
        if self.fits != "yes":
            best, single = self.changes()
            found["changes"] = None if best is None else {"keys": best.keys, "bytes": best.memory.total}
            found["each_change"] = [{"keys": fit.keys, "bytes": fit.memory.total} for fit in single]
        return found


def estimate(
    config: Config, model: ModelConfig, work: Work, hardware: Hardware, *, mfu: float = MFU, price: float | None = None
) -> Estimate:
    p = parameters_of(config, model)
    batch = work.largest(config.train.per_device_train_batch_size)
    memory = predict(config, model, batch, hardware.place)
    flops = flops_of_step(config, model, p, work, hardware.place.ranks)
    sizes = count(p.model) + p.num_adapter, p.num_trained
    return Estimate(config, model, hardware, work, batch, memory, *sizes, flops, mfu, price)


def flops_of_step(config: Config, model: ModelConfig, p: Parameters, work: Work, ranks: int) -> dict[str, float]:
    """By part, over all ranks."""
    tokens, pairs = _tokens_and_pairs(config, work, ranks)
    shapes, trained = dict(p.model), set(p.trained)
    for adapter in p.adapters:
        of_adapter = {f"{adapter.matrices[0]}.A": (adapter.rank, adapter.num_inputs)}
        of_adapter |= {f"{n}.B": (out, adapter.rank) for n, out in zip(adapter.matrices, adapter.num_outputs)}
        shapes, trained = shapes | of_adapter, trained | of_adapter.keys()
    sizes = {"tokens": tokens, "pairs": pairs}
    flops = products(model, shapes, trained, targets=round(tokens * work.targets_share), **sizes)
    again = 0.0
    if config.model.gradient_checkpointing is True:
        again += forward_of_blocks(model, p.model, **sizes) / config.model.gradient_checkpointing_every
    dpo = config.dpo
    if (
        config.trainer_type == "dpo"
        and not dpo.precompute_ref_log_probs
        and not set(dpo.loss_type) <= set(WITHOUT_REFERENCE)
    ):
        again += forward_of_blocks(model, p.model, **sizes) + flops["linear cross-entropy"] / 3
    return flops | ({"again": again} if again else {})


def _tokens_and_pairs(config: Config, work: Work, ranks: int) -> tuple[int, float]:
    """Tokens of a step over all ranks, and the pairs of a query and a key in them."""
    tokens = round(work.tokens_of_step(config, ranks))
    return tokens, tokens * (work.mean_length + 1) / 2
