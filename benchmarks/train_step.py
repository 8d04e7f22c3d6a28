"""Tokens per second and peak memory of a whole optimizer step on the CPU, beside TRL where it can be imported.

    python -m benchmarks.train_step                 minisft, and TRL if it is installed (pip install -e ".[bench]")
    python -m benchmarks.train_step --only minisft --steps 6

The work: a 57 M parameter Llama (hidden 576, 8 layers, 9 heads, 3 KV heads, intermediate 1536, vocabulary 49,152, tied) on
GSM8K, tokenised by a byte-level BPE that is trained on it, packed to 1,024 tokens, 2 packs a micro-batch, 2 micro-batches a
step, bf16 autocast over fp32 weights, AdamW, clipping, the statistics that each logs by default. Once with every token
trained and once with the answers only; the two are different work and are reported apart.

A step is timed from taking its micro-batches to the end of the update; its tokens are the real ones of its packs. Every
case runs in a process of its own, in rounds (a b c a b c), and the median step over all rounds is reported with its
quartiles; the first steps of a process are not counted. Peak memory is that of the process, with Python and torch.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, in_fresh_process, print_table, write_csv

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
MAX_LENGTH, BATCH_SIZE, ACCUMULATION, WARMUP_STEPS = 1024, 2, 2, 1
MODEL = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def make_tokenizer(folder: str) -> dict:
    from minisft.data.tokenizer import train_tokenizer

    rows = [json.loads(line) for line in GSM8K.read_bytes().split(b"\n") if line]
    texts = (f"{row['question']}\n{row['answer']}" for row in rows)
    train_tokenizer(texts, MODEL["vocab_size"], chat_template=None).save(Path(folder) / "tokenizer")
    return {}


def minisft(folder: str, steps: int, answers_only: bool) -> dict:
    """Steps of loop.train_step, as a run takes them."""
    import torch

    from minisft.config.load import load
    from minisft.loop import train_step
    from minisft.prepare.run import prepare

    config, _ = load(
        {},
        {
            "output_dir": f"{folder}/out",
            "model.config": MODEL,
            "model.tokenizer_name_or_path": f"{folder}/tokenizer",
            "data.train_data": str(GSM8K),
            "data.completion_only_loss": answers_only,
            "data.max_length": MAX_LENGTH,
            "data.packing": True,
            "train.per_device_train_batch_size": BATCH_SIZE,
            "train.gradient_accumulation_steps": ACCUMULATION,
            "train.device": "cpu",
        },
        origin="benchmark",
    )
    run = prepare(config, torch.device("cpu"))
    speeds, losses = [], []
    for step in range(WARMUP_STEPS + steps):
        began = time.perf_counter()
        result = train_step(run, config.train, run.train.step(0, step))
        speeds.append(result.num_tokens / (time.perf_counter() - began))
        losses.append(result.stats.means()["loss"])
        run.progress.step += 1
    return {"speeds": speeds[WARMUP_STEPS:], "loss": losses[-1]}


def trl(folder: str, steps: int, answers_only: bool) -> dict:
    """Steps of SFTTrainer with the same model, data and settings; gradient checkpointing off, as in minisft."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in GSM8K.read_bytes().split(b"\n") if line]
    prompts = [f"### Instruction:\n{row['question']}\n\n### Response:\n" for row in rows]
    if answers_only:
        data = [{"prompt": prompt, "completion": row["answer"]} for prompt, row in zip(prompts, rows)]
    else:
        data = [{"text": prompt + row["answer"]} for prompt, row in zip(prompts, rows)]
    torch.manual_seed(42)
    config = {key: value for key, value in MODEL.items() if key != "model_type"}
    times, counts = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **more):
            times.append([time.perf_counter()])

        def on_step_end(self, *arguments, **more):
            times[-1].append(time.perf_counter())

    class Counting(SFTTrainer):
        def training_step(self, model, inputs, *arguments):
            counts.append(inputs["input_ids"].numel())
            return super().training_step(model, inputs, *arguments)

    trainer = Counting(
        LlamaForCausalLM(LlamaConfig(**config)),
        SFTConfig(
            output_dir=f"{folder}/trl",
            max_length=MAX_LENGTH,
            packing=True,
            per_device_train_batch_size=BATCH_SIZE,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=WARMUP_STEPS + steps,
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(data),
        processing_class=PreTrainedTokenizerFast.from_pretrained(f"{folder}/tokenizer"),
        callbacks=[Clock()],
    )
    trainer.train()
    tokens = [sum(counts[i * ACCUMULATION : (i + 1) * ACCUMULATION]) for i in range(len(times))]
    speeds = [n / (end - start) for n, (start, end) in zip(tokens, times)]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"speeds": speeds[WARMUP_STEPS:], "loss": losses[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("minisft", "trl"))
    arguments = parser.parse_args()
    if not GSM8K.exists():
        raise SystemExit(f"needs {GSM8K}")
    engines = [arguments.only] if arguments.only else ["minisft", *(["trl"] if importlib.util.find_spec("trl") else [])]
    cases = [(engine, answers_only) for answers_only in (False, True) for engine in engines]
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_process("benchmarks.train_step:make_tokenizer", folder=folder)
        answers = {case: [] for case in cases}
        for _ in range(arguments.rounds):
            for engine, answers_only in cases:
                target = f"benchmarks.train_step:{engine}"
                answer = in_fresh_process(target, folder=folder, steps=arguments.steps, answers_only=answers_only)
                answers[engine, answers_only].append(answer)
    rows = []
    for (engine, answers_only), runs in answers.items():
        q1, median, q3 = statistics.quantiles([s for run in runs for s in run["speeds"]], n=4, method="inclusive")
        rows.append(
            {
                "engine": engine,
                "trained": "answers" if answers_only else "every token",
                "tokens_per_second": median,
                "q1": q1,
                "q3": q3,
                "peak_gb": statistics.median(run["peak_mb"] for run in runs) * 2**20 / 1e9,
                "last_loss": runs[0]["loss"],
            }
        )
    print_table(rows)
    print(f"written to {write_csv('train_step', rows)}")


if __name__ == "__main__":
    main()
