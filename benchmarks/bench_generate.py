"""New tokens per second of greedy generation: a batch with the KV cache, one prompt after the other, and transformers' batch.

    python -m benchmarks.bench_generate MODEL [--data FILE] [--prompts 64] [--max_new_tokens 32] [--rounds 3]

MODEL is a model folder with a chat template; the prompts are the first questions of FILE. All three run in turn, in fp32, and
without stop tokens, so that they make the same number of tokens. `same` counts the prompts whose tokens are those of the batch.
"""

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

import torch

from benchmarks.harness import ROOT, print_table, quartiles, write_csv
from minisft.answers import open_model
from minisft.data.sources import parse_source, read_rows
from minisft.generation import generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k_test.jsonl")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        sys.exit(f"{arguments.data} does not exist; name a file of question/answer rows by --data")
    answerer = open_model(arguments.model)
    rows = islice(read_rows(parse_source(str(arguments.data))), arguments.prompts)
    prompts = [answerer.ids_of([{"role": "user", "content": row.data["question"]}]) for row in rows]
    few = {"max_new_tokens": arguments.max_new_tokens}
    engines = {
        "batch": lambda: generate(answerer.model, prompts, **few),
        "one by one": lambda: [generate(answerer.model, [prompt], **few)[0] for prompt in prompts],
        "transformers": transformers_engine(arguments.model, prompts, arguments.max_new_tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    outputs = {}
    for _ in range(arguments.rounds):
        for name, engine in engines.items():
            began = time.perf_counter()
            outputs[name] = engine()
            seconds[name].append(time.perf_counter() - began)
    table = []
    for name, times in seconds.items():
        made = len(prompts) * arguments.max_new_tokens
        q1, median, q3 = quartiles([made / took for took in times])
        same = sum(a == b for a, b in zip(outputs[name], outputs["batch"]))
        times_batch = quartiles([took / batch for took, batch in zip(times, seconds["batch"])])[1]
        table.append(
            {"engine": name, "tokens_per_second": median, "q1": q1, "q3": q3, "batch_times": times_batch, "same": same}
            | {"prompts": len(prompts), "prompt_tokens": sum(map(len, prompts)), "new_tokens": arguments.max_new_tokens}
        )
    print_table(table)
    print(f"written to {write_csv('generate', table)}")


def transformers_engine(folder: Path, prompts: list[list[int]], count: int):
    """The same by transformers' generate: padded on the left, with its cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()


if __name__ == "__main__":
    main()
