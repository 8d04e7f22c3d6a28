"""How long the loop stands still for a checkpoint: saved at once, or in the background (checkpoint.save_async).

    python -m benchmarks.bench_save [--layers 8] [--rounds 5] [--folder DIR] [--device cpu]

One model, one optimizer and one disk; the two ways take turns, with steps between two saves, so that a busy machine slows
down both. Prints the median of the seconds in which no step is taken, and their ratio, and how much longer a step is
while a thread writes.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from minisft.checkpoint import Contents, checkpoint_bytes, optimizer_file
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights
from minisft.model.save import model_files, save_rest
from minisft.saver import Saver
from minisft.units import size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the disk to measure; a temporary one unless given")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = {"model_type": "llama", "vocab_size": 16384, "num_hidden_layers": arguments.layers, **shape}
    model = build_model(from_hf({**config, "max_position_embeddings": 512}), arguments.device)
    init_weights(model, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(16384, (128,), device=arguments.device)
    positions = torch.arange(128, dtype=torch.int32, device=arguments.device)
    ends = torch.full_like(positions, 128)

    def step() -> float:
        began = time.perf_counter()
        model.logits(model(tokens, positions, torch.zeros_like(positions), ends)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def contents(number: int) -> Contents:
        rest = partial(save_rest, model, weight_map={"": "model.safetensors"})
        return Contents(list(model_files(model)), [optimizer_file(model, optimizer)], rest, {"step": number})

    step()
    still: dict[str, list[float]] = {"at once": [], "in the background": []}
    steps: dict[str, list[float]] = {"alone": [], "beside a save": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        savers = {name: Saver(Path(folder) / name, 1, in_background=name != "at once") for name in still}
        for number in range(1, arguments.rounds + 2):
            for name, saver in savers.items():
                steps["alone"].append(step())
                began = time.perf_counter()
                saver.save(number, contents(number), needed=0)
                seconds = time.perf_counter() - began
                while saver._job is not None:
                    steps["beside a save"].append(step())
                    began = time.perf_counter()
                    saver.publish_if_ready()
                    seconds += time.perf_counter() - began
                still[name].append(seconds)
    first = still["in the background"][0]  # with new memory for the copies
    medians = {name: statistics.median(values[1:]) for name, values in still.items()}
    print(
        f"a checkpoint of {size(checkpoint_bytes(model, optimizer))}, {arguments.rounds} rounds, on {arguments.device}"
    )
    for name, seconds in medians.items():
        print(f"  {name:<18} the loop stands still for {seconds:.3f} s")
    print(f"  ratio {medians['at once'] / medians['in the background']:.1f}; the first copy took {first:.3f} s")
    alone, beside = (statistics.median(steps[name]) for name in ("alone", "beside a save"))
    print(f"  a step takes {alone:.3f} s, beside a save {beside:.3f} s")


if __name__ == "__main__":
    main()
