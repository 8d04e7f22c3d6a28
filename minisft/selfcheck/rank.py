"""One process of the check that two ranks take the step of one: python -m minisft.selfcheck.rank OUT ROWS DEVICE CONFIG.toml ...

The first rank writes the loss and the gradients of the step to OUT.
"""

import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from minisft import ranks, runtime
from minisft.config.command_line import parse_arguments
from minisft.config.stages import load_stages
from minisft.errors import run_command
from minisft.selfcheck.bench import Bench
from minisft.selfcheck.measure import engine_step, in_fp32, one_by_one


def main(argv: list[str]) -> int:
    out, number, device_name, *words = argv
    config = load_stages(*parse_arguments(words))[0].config
    config = replace(config, train=replace(config.train, device=device_name))
    config = replace(config, parallel=replace(config.parallel, strategy="ddp"))
    with ranks.process_group(device := runtime.pick_device(device_name)):
        bench = Bench(config, words, Path(out).parent, int(number))
        with in_fp32(bench.prepared()) as run:
            documents, count = bench.documents(), ranks.world_size()
            loader = one_by_one(run.train, documents, 1, accumulation=-(-documents.num_units // count))
            loader.rank, loader.world_size = ranks.rank(), count
            step = engine_step(run, config.train, loader)
        if ranks.rank() == 0:
            save_file(step.grads, out, metadata={"loss": step.loss.hex(), "device": device.type})
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
