"""What to change so that a run fits: the cheapest combination of the changes that its configuration allows.

They are ordered by price. First comes what leaves every number of the run as it is: smaller micro-batches with accumulation
raised, recomputation, sharding over the ranks. Then what rounds otherwise: moments in 8 bits, weights in bf16; and shards in the
memory of the CPU, which round nothing and take long. Last what trains something else: LoRA, QLoRA.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from minisft.config.check import check_config
from minisft.config.choices import ADAMW
from minisft.config.sections import KEYS, SECTIONS, Config
from minisft.errors import UserError
from minisft.model.model_config import ModelConfig
from minisft.plan.memory import Memory, Place, predict, shards_of
from minisft.plan.work import Work

LORA = {"lora.r": 16, "lora.lora_alpha": 32.0}
FSDP2 = {"parallel.strategy": "fsdp2"}
OFFLOAD = {"parallel.cpu_offload": True}


@dataclass(frozen=True)
class Change:
    """Keys to set, their price, and what is paid. Prices order the changes; those of time are shares of a step."""

    keys: dict[str, Any]
    price: float
    why: str = ""  # in words


NOTHING = Change({}, 0.0)


@dataclass(frozen=True)
class Fit:
    """A configuration with some changes, and the memory that it takes."""

    changes: tuple[Change, ...]
    memory: Memory

    @property
    def keys(self) -> dict[str, Any]:
        return {key: value for change in self.changes for key, value in change.keys.items()}

    @property
    def price(self) -> float:
        return sum(change.price for change in self.changes)


def with_keys(config: Config, keys: dict[str, Any]) -> Config:
    """The configuration with other values, by full names."""
    for key, value in keys.items():
        section, _, name = key.partition(".")
        if section in SECTIONS:
            value = replace(getattr(config, section), **{name: value})
            name = section
        config = replace(config, **{name or section: value})
    return config


def is_allowed(config: Config) -> bool:
    """Whether the changed keys go together."""
    try:
        check_config(config, dict.fromkeys(KEYS, "minisft plan"), "minisft plan")
    except UserError:
        return False
    return True


def dimensions(config: Config, place: Place, again: float) -> list[list[Change]]:
    """The changes that exclude each other, by what they change; each list begins with none.

    again: the share of a step's FLOPs that recomputing all blocks adds."""
    train, model, whole = config.train, config.model, config.lora.r is None
    found = []
    batches, size, step = [NOTHING], train.per_device_train_batch_size, train.gradient_accumulation_steps
    while size % 2 == 0 and not train.optimizer_in_backward:
        size, step = size // 2, step * 2
        keys = {"train.per_device_train_batch_size": size, "train.gradient_accumulation_steps": step}
        halvings = len(batches)
        batches.append(Change(keys, 0.01 * halvings, "the same step in smaller micro-batches: products are smaller"))
    found.append(batches)
    recompute = [NOTHING]
    if model.gradient_checkpointing is False:
        why = "computes gated units and layer norms again: a few percent"
        recompute.append(Change({"model.gradient_checkpointing": "selective"}, 0.04, why))
    if model.gradient_checkpointing is not True:
        why = f"computes every block again: {again:.0%} more FLOPs"
        recompute.append(Change({"model.gradient_checkpointing": True}, again, why))
    found.append(recompute)
    slow = "shards in the memory of the CPU, copied for every pass and updated there: steps take seconds longer (plan them)"
    if place.ranks > 1 and place.shards == 1:
        why = "shares weights, gradients and moments between the ranks: gathers every block twice a micro-batch"
        found.append([NOTHING, Change(FSDP2, 0.08, why), Change({**FSDP2, **OFFLOAD}, 1.5, slow)])
    elif place.shards > 1 and not config.parallel.cpu_offload:
        found.append([NOTHING, Change(OFFLOAD, 1.5, slow)])
    if whole and train.optim in ("adamw", "adamw_minisft"):
        why = "moments of 8 bits: other rounding, a quarter of the moments' traffic"
        found.append([NOTHING, Change({"train.optim": "adamw_8bit"}, 0.4, why)])
    if train.weights_dtype == "fp32" and train.optim in ADAMW and train.precision in ("bf16", "auto"):
        what = "weights and gradients" if whole else "the frozen weights"
        why = f"{what} in bf16, rounded by chance: no master weights" if whole else f"{what} in bf16"
        found.append([NOTHING, Change({"train.weights_dtype": "bf16"}, 0.5 if whole else 0.1, why)])
    can_have_adapters = model.config is None and not train.trainable and not train.frozen
    methods = [NOTHING]
    if whole and can_have_adapters and (train.optim in ADAMW or train.weights_dtype == "fp32"):
        methods.append(Change(LORA, 2.0, "trains adapters beside the frozen weights: another method"))
        why = "LoRA, with the frozen matrices in 4 bits: another method, and they are dequantised for every product"
        methods.append(Change({**LORA, "model.load_in_4bit": True}, 4.0, why))
    elif not whole and can_have_adapters and not (model.load_in_4bit or model.load_in_8bit):
        why = "the frozen matrices in 4 bits: rounded, and dequantised for every product"
        methods.append(Change({"model.load_in_4bit": True}, 2.0, why))
    found.append(methods)
    return found


def singles(config: Config, c: ModelConfig, work: Work, place: Place, again: float) -> Iterator[Fit]:
    """Every change by itself."""
    for changes in dimensions(config, place, again):
        for change in changes[1:]:
            if is_allowed(with_keys(config, change.keys)):
                yield _fit(config, c, work, place, (change,))


def cheapest(config: Config, c: ModelConfig, work: Work, place: Place, again: float, room: float) -> Fit | None:
    """The cheapest combination that takes at most `room` bytes a rank; None if there is none."""
    combinations = [
        tuple(change for change in chosen if change.keys) for chosen in product(*dimensions(config, place, again))
    ]
    for changes in sorted(combinations, key=lambda changes: sum(change.price for change in changes)):
        fit = _fit(config, c, work, place, changes)
        if fit.memory.total <= room and is_allowed(with_keys(config, fit.keys)):
            return fit
    return None


def _fit(config: Config, c: ModelConfig, work: Work, place: Place, changes: tuple[Change, ...]) -> Fit:
    keys = {key: value for change in changes for key, value in change.keys.items()}
    changed = with_keys(config, keys)
    batch = work.largest(changed.train.per_device_train_batch_size)
    place = replace(place, shards=shards_of(changed, place.ranks))
    return Fit(changes, predict(changed, c, batch, place))
