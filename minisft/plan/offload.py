"""What `parallel.cpu_offload` moves to the memory of the CPU, and what time its traffic takes.

    memory of the CPU    a rank's rows of the matrices, 4 bytes a number (2 with bf16 weights); of the trained ones gradients, 4,
                         and moments, 8 with AdamW; what an update takes for a while; with save_async the copy of a checkpoint
    left on the GPU      vectors and adapters with theirs, gathered blocks, and the sums of one block's gradients; with "hsdp"
                         those of all blocks, which FSDP2 keeps until the backward ends
    link                 the rows of every block go to the GPU for its forward and again for its backward, those of the root once,
                         and the gradients come back; in each micro-batch
    update               the CPU reads weights, gradients and moments, and writes weights and moments

The rates are assumptions: nothing of this was measured on a GPU. That traffic and passes may overlap is not counted.
"""

from dataclasses import dataclass
from math import prod

from minisft.config.sections import Config
from minisft.model.model_config import ModelConfig
from minisft.plan.memory import (
    Parameters,
    Place,
    gradients_at_once,
    moment_bytes,
    parameters_of,
    update_bytes,
    weight_bytes,
)
from minisft.plan.shapes import layer_of

LINK = 20e9  # bytes/s between a GPU and the memory of the CPU, each way: PCIe 4.0 with 16 lanes has 32e9 on paper
CPU_MEMORY = 20e9  # bytes/s that the update of one rank reads and writes, with a share of the cores of its own


@dataclass(frozen=True)
class Offload:
    """Of one rank."""

    memory: dict[str, float]  # of the CPU: bytes by component
    link: float  # bytes over the link in a step
    update: float  # bytes that the update reads and writes

    @property
    def seconds(self) -> float:
        """That a step takes longer."""
        return self.link / LINK + self.update / CPU_MEMORY


def offload(config: Config, c: ModelConfig, place: Place) -> Offload | None:
    """None without parallel.cpu_offload, and where it changes nothing: without sharding, and on a CPU."""
    if not (config.parallel.cpu_offload and place.is_gpu and place.shards > 1):
        return None
    p = parameters_of(config, c)
    share = 1 / place.shards
    weights = (weight_bytes(config, p) - 4.0 * p.num_adapter) * share
    is_full = config.lora.r is None
    gradients, moments = (4.0 * p.num_trained * share, moment_bytes(config, p) * share) if is_full else (0.0, 0.0)
    in_root = _share_of_root(p)
    gathers = 2 if config.parallel.reshard_after_forward else 1
    link = weights * (in_root + gathers * (1 - in_root)) + gradients
    update = (2 * weights + gradients + 2 * moments) if is_full else 0.0
    at_once = gradients_at_once(p) * share if config.train.optimizer_in_backward and is_full else gradients
    memory = {"weights": weights, "gradients": at_once, "moments": moments}
    memory["update"] = update_bytes(config, p) * share if is_full else 0.0
    if config.checkpoint.save_async:
        memory["save"] = (weights if is_full else 0.0) + moments
    times = config.train.gradient_accumulation_steps
    return Offload({name: size for name, size in memory.items() if size}, times * link, update)


def _share_of_root(p: Parameters) -> float:
    numbers = {name: prod(shape) for name, shape in p.model.items()}
    return sum(n for name, n in numbers.items() if layer_of(name) is None) / sum(numbers.values())
