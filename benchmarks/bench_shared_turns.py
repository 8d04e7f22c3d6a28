"""Conversations whose template drops earlier reasoning: one copy of what the turns share, beside one document an answer.

    python -m benchmarks.bench_shared_turns [--device cpu|cuda] [--rounds N] [--quick]

Made-up conversations of 2, 4, 8 and 16 turns, each turn a question of 30 words, a reasoning of 150 and an answer of 60 (on a
CPU 10, 50 and 20, and a model of two layers), are read, rendered in the manner of Qwen 3, packed (bfd) and trained by what
`prepare` makes of a configuration. A round is forward and backward over an epoch, without the optimizer; both layouts run in
turn, and the medians are reported.

    tokens             that are computed in an epoch
    tokens_per_second  of the separate documents, for both layouts, so that sharing shows as speed
    loss_difference    relative, of the sum over the epoch, to that of separate documents: rounding
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch is imported, as train.py does

import torch

from benchmarks.bench_dpo import LARGE, SMALL, TINY, now
from benchmarks.harness import print_table, time_interleaved, write_csv

TURNS = (2, 4, 8, 16)
OF_CPU = dict(num_hidden_layers=2, hidden_size=256, intermediate_size=704, num_attention_heads=4, vocab_size=2048)
MODELS = {"cpu": SMALL | OF_CPU, "cuda": LARGE, "quick": TINY}
SIZES = {  # turns: of all conversations together; words: of a question, a reasoning and an answer
    "cpu": dict(turns=16, words=(10, 50, 20), max_length=4096, batch_size=1, precision="fp32"),
    "cuda": dict(turns=512, words=(30, 150, 60), max_length=4096, batch_size=4, precision="bf16"),
    "quick": dict(turns=16, words=(2, 6, 3), max_length=4096, batch_size=1, precision="fp32"),
}
TEMPLATE = (
    "{%- set ns = namespace(last=-1) %}"
    "{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")


def make_rows(turns: int, words: tuple[int, int, int], count: int) -> list[dict]:
    """Conversations of random words. A word is one token once a tokenizer is trained on them."""
    import numpy as np

    rng = np.random.default_rng(0)
    known = [f"w{i}" for i in range(500)]

    def text(length: int) -> str:
        return " ".join(rng.choice(known, length))

    question, reasoning, answer = words
    return [
        {
            "messages": [
                message
                for _ in range(turns)
                for message in (
                    {"role": "user", "content": text(question)},
                    {"role": "assistant", "content": text(answer), "reasoning_content": text(reasoning)},
                )
            ]
        }
        for _ in range(count)
    ]


def measure(turns: int, size: str, device: str, rounds: int, folder: Path) -> list[dict]:
    from minisft import runtime
    from minisft.config.load import load
    from minisft.data.tokenizer import train_tokenizer
    from minisft.prepare.run import prepare

    s = SIZES[size]
    rows = make_rows(turns, s["words"], max(1, s["turns"] // turns))
    path = folder / f"{turns}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not (folder / "tokenizer").exists():
        texts = (message["content"] for row in rows for message in row["messages"])
        vocab = MODELS[size]["vocab_size"] if size == "quick" else 2048
        made = train_tokenizer(texts, vocab, special_tokens=SPECIAL_TOKENS, chat_template=TEMPLATE)
        made.save(folder / "tokenizer")

    def prepared(shared: bool):
        settings = {
            "output_dir": str(folder / "out"),
            "model.config": MODELS[size] | {"vocab_size": MODELS[size]["vocab_size"], "max_position_embeddings": 4096},
            "model.tokenizer_name_or_path": str(folder / "tokenizer"),
            "data.train_data": str(path),
            "data.max_length": s["max_length"],
            "data.packing": True,
            "data.share_turns": shared,
            "train.device": device,
            "train.precision": s["precision"],
            "train.per_device_train_batch_size": s["batch_size"],
            "log.progress_bar": False,
        }
        config, _ = load({}, settings, origin="benchmark")
        return prepare(config, torch.device(device))

    runs = {"separate": prepared(False), "shared": prepared(True)}
    batches = {
        name: [b.to(device) for step in range(run.train.steps_per_epoch) for b in run.train.step(0, step)]
        for name, run in runs.items()
    }
    num_tokens = {name: sum(batch.num_tokens for batch in some) for name, some in batches.items()}
    losses = {}

    def epoch(name: str) -> None:
        run, total = runs[name], 0.0
        for batch in batches[name]:
            with runtime.autocast(run.device, run.precision):
                loss, _ = run.loss(run.model, batch, 1e-4)
            loss.backward()
            total += loss.detach().double()
        run.model.zero_grad()
        losses[name] = float(total)
        now(device)

    timed = time_interleaved(
        {name: lambda name=name: epoch(name) for name in runs}, repeats=rounds, baseline="separate"
    )
    return [
        {
            "device": device,
            "turns": turns,
            "layout": row["name"],
            "documents": len(runs[row["name"]].train.documents),
            "tokens": num_tokens[row["name"]],
            "fewer_tokens": num_tokens["separate"] / num_tokens[row["name"]],
            "seconds": row["seconds"],
            "tokens_per_second": num_tokens["separate"] / row["seconds"],
            "q1": num_tokens["separate"] / row["q3"],
            "q3": num_tokens["separate"] / row["q1"],
            "speedup": row["speedup"],
            "loss_difference": abs(losses[row["name"]] / losses["separate"] - 1),
        }
        for row in timed
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--out", type=Path, help="append the rows to shared_turns.csv in this folder")
    arguments = parser.parse_args()
    size, rows = "quick" if arguments.quick else arguments.device, []
    with tempfile.TemporaryDirectory() as folder:
        for turns in TURNS:
            rows += measure(turns, size, arguments.device, arguments.rounds, Path(folder))
            print(
                f"{turns} turns: {rows[-1]['fewer_tokens']:.2f} x fewer tokens, {rows[-1]['speedup']:.2f} x as fast",
                flush=True,
            )
    print_table(rows)
    if not arguments.quick or arguments.out:
        options = {"folder": arguments.out} if arguments.out else {}
        print(f"written to {write_csv('shared_turns', rows, **options)}")


if __name__ == "__main__":
    main()
