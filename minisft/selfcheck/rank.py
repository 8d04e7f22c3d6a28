"""One process of the check that ranks take the step of one: python -m minisft.selfcheck.rank OUT ROWS DEVICE CONFIG.toml ...

The weights are sharded and the documents split as the configuration says, with the fewest ranks that can do so. Everything is in
fp32. The first rank writes the loss and the whole gradients of the step to OUT.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minisft import ranks, runtime
from minisft.config.command_line import parse_arguments
from minisft.config.stages import load_stages
from minisft.errors import run_command
from minisft.model import shards
from minisft.selfcheck.bench import Bench
from minisft.selfcheck.measure import engine_step, one_by_one


def main(argv: list[str]) -> int:
    out, number, device_name, *words = argv
    config = load_stages(*parse_arguments(words))[0].config
    train = replace(config.train, device=device_name, precision="fp32", weights_dtype="fp32")
    parallel = replace(config.parallel, replicas=2, context_parallel=min(config.parallel.context_parallel, 2))
    config = replace(config, train=train, parallel=parallel)
    with ranks.process_group(device := runtime.pick_device(device_name)):
        bench = Bench(config, words, Path(out).parent, int(number))
        run, documents = bench.prepared(), bench.documents()
        groups = run.train.world_size
        loader = one_by_one(run.train, documents, 1, accumulation=-(-documents.num_units // groups))
        loader.rank, loader.world_size, loader.context = run.train.rank, groups, run.train.context
        step = engine_step(run, config.train, loader)
        grads = {name: whole_gradient(run.model.get_parameter(name), grad) for name, grad in step.grads.items()}
        if ranks.rank() == 0:
            save_file(grads, out, metadata={"loss": step.loss.hex(), "device": device.type})
    return 0


def whole_gradient(p: torch.nn.Parameter, grad: Tensor) -> Tensor:
    """On the host, from this rank's rows. They take the place of the weights, which have done their work."""
    shards.local(p).copy_(grad)
    return shards.whole(p).cpu()


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
