"""How much memory does a fine-tuning take: all weights, adapters beside a plain base, adapters beside a quantised one?

    python -m benchmarks.bench_memory

A Llama of 161 million parameters with random weights (10 layers of 1024, an embedding of 32,000 rows that is the head too)
is saved in bf16, loaded as a run loads it, and trained for three steps of one document of 512 tokens in bf16 on the CPU.
Each case runs in a process of its own. `peak_mb` is the most that the process ever held, `base_mb` the same of a process that
has imported everything and loaded nothing, `weights_mb` what the weights take, `state_mb` the moments of AdamW.
"""

import json
import tempfile
import time
from pathlib import Path

from benchmarks.harness import AS_A_COMMAND, in_fresh_process, print_table, write_csv

MODEL = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
LENGTH, STEPS = 512, 3
LORA = {"lora.r": 16}
CASES = {
    "full": {},
    "full, checkpointing": {"model.gradient_checkpointing": True},
    "LoRA": LORA,
    "LoRA, checkpointing": LORA | {"model.gradient_checkpointing": True},
    "QLoRA int8": LORA | {"model.load_in_8bit": True},
    "QLoRA nf4": LORA | {"model.load_in_4bit": True},
    "QLoRA nf4, checkpointing": LORA | {"model.load_in_4bit": True, "model.gradient_checkpointing": True},
}


def make_inputs(folder: str) -> dict:
    """A model in bf16, a tokenizer and rows of more than LENGTH tokens, in the folder."""
    import torch

    from minisft.data.tokenizer import train_tokenizer
    from minisft.model.families import from_hf
    from minisft.model.load import build_model, init_weights
    from minisft.model.save import save_model

    model = build_model(from_hf(MODEL), "cpu")
    init_weights(model, 0)
    save_model(model, Path(folder, "model"), dtype=torch.bfloat16)
    train_tokenizer([], vocab_size=259, chat_template=None).save(Path(folder, "tokenizer"))
    rows = [{"text": f"{i} " * LENGTH} for i in range(STEPS)]
    Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"parameters": sum(p.numel() for p in model.parameters())}


def imports(folder: str) -> dict:
    """What a process holds before it loads anything."""
    from minisft.model.families import from_hf
    from minisft.model.load import build_model

    build_model(from_hf(MODEL | {"num_hidden_layers": 1}))  # on meta: torch imports more at its first use
    import minisft.loop  # noqa: F401

    return {}


def train(folder: str, case: str) -> dict:
    import torch

    from minisft.config.load import load
    from minisft.loop import train_step
    from minisft.model.quantized import named_weights
    from minisft.prepare.run import prepare

    keys = {
        "model.model_name_or_path": f"{folder}/model",
        "model.tokenizer_name_or_path": f"{folder}/tokenizer",
        "data.train_data": f"{folder}/rows.jsonl",
        "data.max_length": LENGTH,
        "audit.max_cut_answer": 1.0,
        "output_dir": f"{folder}/out",
        "train.device": "cpu",
        "train.per_device_train_batch_size": 1,
        "train.num_train_epochs": 1,
    }
    config, _ = load({}, keys | CASES[case], origin="benchmark")
    run = prepare(config, torch.device("cpu"))
    seconds = []
    for step in range(STEPS):
        started = time.perf_counter()
        train_step(run, config.train, run.train.step(0, step))
        run.progress.step += 1
        seconds.append(time.perf_counter() - started)
    state = (v for values in run.optimizer.state.values() for v in values.values() if torch.is_tensor(v))
    return {
        "seconds_a_step": min(seconds),
        "weights_mb": sum(w.nbytes for w in named_weights(run.model).values()) / 2**20,
        "state_mb": sum(v.nbytes for v in state) / 2**20,
    }


def main() -> None:
    here = "benchmarks.bench_memory"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        parameters = in_fresh_process(f"{here}:make_inputs", folder=folder)["parameters"]
        base = in_fresh_process(f"{here}:imports", folder=folder)["peak_mb"]
        for case in CASES:
            answer = in_fresh_process(f"{here}:train", AS_A_COMMAND, folder=folder, case=case)
            answer |= {"base_mb": base, "above_base_mb": answer["peak_mb"] - base}
            rows.append({"case": case, "parameters": parameters, "tokens": LENGTH, **answer})
    print_table(rows)
    print(f"written to {write_csv('memory', rows)}")


if __name__ == "__main__":
    main()
