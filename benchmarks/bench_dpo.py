"""Tokens per second and peak memory of preference tuning (DPO), beside TRL's trainer where it can be imported.

    python -m benchmarks.bench_dpo [--device cpu|cuda] [--rounds N] [--out DIR] [--only TEXT] [--quick]

Whole optimizer steps: minisft's by loop.train_step on what `prepare` makes of a configuration, TRL's by DPOTrainer.train.
Both load the same random weights (fp32, with autocast as SIZES says) and train the same pairs in the same order: those of
../shared/data/dpo_en_demo.json, or made-up rows of about these lengths where it is absent, tokenised once by a BPE that is
trained on them and cut to max_length. AdamW, clipping, no gradient checkpointing, and the metrics that each logs by default.

    layout      unpacked: some pairs a step, TRL's padded to the longest of its documents, ours never; packed: some packs
                of 2 x max_length tokens a step; shared: packed, both answers of a pair after one copy of the prompt
    reference   copy: a second set of weights; cached: computed before the first step; adapter off: LoRA on every matrix

Tokens are those of prompt + chosen and prompt + rejected up to the last one that is trained, for every case: no padding, and
prompts that are shared still count twice, so that sharing them shows as speed. The first step is not counted. Memory is what a
process takes at most beyond its imports: resident memory on a CPU, the allocator's on a GPU, the loading of the model
included. Every case runs in a process of its own, in rounds (a b c a b c ...), the medians over all are reported.

The first batch is trained twice. So the loss of the second step is that of the first batch after one step, and without packing
it has to be the same for both trainers, from the same weights and pairs: the relative difference is printed. What is rounding
depends on what is subtracted: the logps of an answer are in the hundreds or thousands, the margins between them below one.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # for both, before torch is imported, as train.py does

import torch

from benchmarks.harness import AS_A_COMMAND, ROOT, extra_memory, in_fresh_process, print_table, quartiles, write_csv

PAIRS = ROOT.parent / "shared" / "data" / "dpo_en_demo.json"
SMALL = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 9,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
LARGE = SMALL | {  # as Qwen2.5-0.5B
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
}
TINY = SMALL | {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES = {  # rows: read of the file; pairs, packs: of a step; steps: counted; tolerance: of the loss after a step
    "cpu": dict(rows=64, max_length=384, pairs=3, packs=2, steps=2, precision="bf16", tolerance=1e-2),
    "cuda": dict(rows=299, max_length=1024, pairs=16, packs=12, steps=6, precision="bf16", tolerance=1e-2),
    "quick": dict(rows=24, max_length=160, pairs=2, packs=1, steps=1, precision="fp32", tolerance=1e-5),
}
MODELS = {"cpu": SMALL, "cuda": LARGE, "quick": TINY}
LORA = {"lora.r": 16, "lora.lora_alpha": 32}
LEARNING_RATE = {"cpu": 1e-6, "cuda": 1e-6, "quick": 1e-4}  # a step is to change the loss visibly
LAYOUTS = {
    "unpacked": {},
    "packed": {"data.packing": True},
    "shared": {"data.packing": True, "dpo.share_prompt": True},
}
REFERENCES = {"copy": {}, "cached": {"dpo.precompute_ref_log_probs": True}, "adapter off": LORA}
CASES = [("minisft", layout, reference) for reference in REFERENCES for layout in LAYOUTS]
PEER = [("trl", "unpacked", reference) for reference in REFERENCES]


def synthetic_rows(count: int) -> list[dict]:
    """Pairs of random words, about as long as those of the real file."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + letter) for letter in rng.integers(0, 26, n)) for n in rng.integers(2, 9, 3000)]

    def text(median: float, spread: float) -> str:
        return " ".join(rng.choice(words, 1 + int(rng.lognormal(np.log(median), spread))))

    def turn(who: str, *length: float) -> dict:
        return {"from": who, "value": text(*length)}

    return [
        {"conversations": [turn("human", 130, 1.4)], "chosen": turn("gpt", 200, 0.9), "rejected": turn("gpt", 210, 0.9)}
        for _ in range(count)
    ]


def make_inputs(folder: str, size: str, device: str) -> dict:
    """Rows, a tokenizer, a model; the reference's log-probabilities; and the pairs of each step for TRL, in tokens."""
    from minisft.config.load import load
    from minisft.data.tokenizer import train_tokenizer
    from minisft.model.families import from_hf
    from minisft.model.load import build_model, init_weights
    from minisft.model.save import save_model
    from minisft.prepare.run import prepare

    s, folder = SIZES[size], Path(folder)
    rows = json.loads(PAIRS.read_bytes()) if PAIRS.exists() else synthetic_rows(s["rows"])
    rows = rows[: s["rows"]]
    (folder / "rows.json").write_text(json.dumps(rows))
    texts = (turn["value"] for row in rows for turn in [*row["conversations"], row["chosen"], row["rejected"]])
    train_tokenizer(texts, min(MODELS[size]["vocab_size"], 16384)).save(folder / "tokenizer")
    model = build_model(from_hf(MODELS[size]), "cpu")
    init_weights(model, 0)
    save_model(model, folder / "model")
    config, _ = load({}, settings(folder, size, device, "unpacked", "cached"), origin="benchmark")
    run = prepare(config, torch.device(device))
    documents = scored_documents(run.train.documents)
    batches = [batch for step in step_numbers(size) for batch in run.train.step(0, step)]
    pairs = []
    for chosen, rejected in torch.cat([batch.answers.document for batch in batches]).view(-1, 2).tolist():
        (ids, prompt), (others, _) = documents[chosen], documents[rejected]
        assert ids[:prompt] == others[:prompt]
        pairs.append({"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:], "rejected_ids": others[prompt:]})
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return {"parameters": sum(p.numel() for p in model.parameters())}


def settings(folder: str | Path, size: str, device: str, layout: str, reference: str) -> dict:
    s = SIZES[size]
    return {
        "trainer_type": "dpo",
        "output_dir": f"{folder}/out",
        "model.model_name_or_path": f"{folder}/model",
        "model.tokenizer_name_or_path": f"{folder}/tokenizer",
        "data.train_data": f"{folder}/rows.json",
        "data.max_length": s["max_length"],
        "audit.max_cut_answer": 1.0,
        "audit.max_lost_answer": 1.0,
        "train.device": device,
        "train.precision": s["precision"],
        "train.learning_rate": LEARNING_RATE[size],
        "train.lr_scheduler_type": "constant",
        "train.per_device_train_batch_size": s["pairs" if layout == "unpacked" else "packs"],
        "log.progress_bar": False,
        **LAYOUTS[layout],
        **REFERENCES[reference],
    }


def step_numbers(size: str) -> list[int]:
    """The first batch twice; the first time is the warm-up."""
    return [0, *range(SIZES[size]["steps"])]


def scored_documents(documents) -> dict[int, tuple[list[int], int]]:
    """By index in the cache: the tokens up to the last that is trained, and how many of them are the prompt."""
    from minisft.data.kinds import TRAINED

    found = {}
    for index, start, end in zip(documents.index.tolist(), documents.start, documents.end):
        trained = (documents.cache.kinds[start:end] >= TRAINED).nonzero()[0]
        assert trained[-1] - trained[0] + 1 == len(trained)
        found[index] = documents.cache.ids[start : start + trained[-1] + 1].tolist(), int(trained[0])
    return found


def minisft(folder: str, size: str, device: str, layout: str, reference: str) -> dict:
    from minisft.config.load import load
    from minisft.loop import train_step
    from minisft.model.families import from_hf
    from minisft.model.load import build_model
    from minisft.prepare.run import prepare

    build_model(from_hf(TINY))  # on meta: torch imports more at its first use

    def train() -> list[dict]:
        config, _ = load({}, settings(folder, size, device, layout, reference), origin="benchmark")
        run, steps = prepare(config, torch.device(device)), []
        length = {index: len(ids) for index, (ids, _) in scored_documents(run.train.documents).items()}
        for step in step_numbers(size):
            began = now(device)
            batches = run.train.step(0, step)
            result = train_step(run, config.train, batches)
            seconds = now(device) - began
            run.progress.step += 1
            documents = [document for batch in batches for document in batch.answers.document.tolist()]
            tokens = sum(length[document] for document in documents)
            loss = result.stats.means()["loss"]
            steps.append(dict(seconds=seconds, tokens=tokens, pairs=len(documents) // 2, loss=loss))
        return steps

    return measured(train, device)


def trl(folder: str, size: str, device: str, layout: str, reference: str) -> dict:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if reference == "adapter off":
        from peft import LoraConfig

    steps, s = [], SIZES[size]

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **more):
            steps[-1]["seconds"] = -now(device)

        def on_step_end(self, *arguments, **more):
            steps[-1]["seconds"] += now(device)

    class Measured(DPOTrainer):
        def _prepare_dataset(self, dataset, *arguments):
            return dataset  # tokens already, the same as ours

        def get_batch_samples(self, *arguments):
            steps.append({})
            return super().get_batch_samples(*arguments)

        def training_step(self, model, inputs, *arguments):
            steps[-1] |= dict(tokens=int(inputs["attention_mask"].sum()), pairs=len(inputs["input_ids"]) // 2)
            loss = super().training_step(model, inputs, *arguments)
            steps[-1]["loss"] = loss.item()
            return loss

    def train() -> list[dict]:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(f"{folder}/tokenizer")
        trainer = Measured(
            AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32),
            args=DPOConfig(
                output_dir=f"{folder}/trl",
                max_length=s["max_length"],
                precompute_ref_log_probs=reference == "cached",
                per_device_train_batch_size=s["pairs"],
                max_steps=len(step_numbers(size)),
                train_sampling_strategy="sequential",
                learning_rate=LEARNING_RATE[size],
                lr_scheduler_type="constant",
                bf16=s["precision"] == "bf16",
                use_cpu=device == "cpu",
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
                dataloader_pin_memory=device == "cuda",
            ),
            train_dataset=Dataset.from_list(json.loads(Path(folder, "pairs.json").read_text())),
            processing_class=tokenizer,
            callbacks=[Clock()],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
            if reference == "adapter off"
            else None,
        )
        trainer.train()
        return [step for step in steps if "loss" in step]

    return measured(train, device)


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measured(train: Callable[[], list[dict]], device: str) -> dict:
    if device == "cpu":
        steps, extra_mb = extra_memory(train)
    else:
        steps, extra_mb = train(), torch.cuda.max_memory_allocated() / 2**20
    return {"steps": steps, "extra_mb": extra_mb}


def row_of(case: tuple[str, str, str], answers: list[dict]) -> dict:
    """Of the answers of a case, one for each round."""
    counted = [step for answer in answers for step in answer["steps"][1:]]
    q1, median, q3 = quartiles([step["tokens"] / step["seconds"] for step in counted])
    return {
        **dict(zip(("engine", "layout", "reference"), case)),
        "tokens_per_second": median,
        "q1": q1,
        "q3": q3,
        "pairs_per_second": statistics.median(step["pairs"] / step["seconds"] for step in counted),
        "seconds_a_step": statistics.median(step["seconds"] for step in counted),
        "tokens_a_step": statistics.mean(step["tokens"] for step in counted),
        "pairs_a_step": statistics.mean(step["pairs"] for step in counted),
        "extra_mb": statistics.median(answer["extra_mb"] for answer in answers),
        "peak_mb": statistics.median(answer["peak_mb"] for answer in answers),
        "loss_after_a_step": answers[0]["steps"][1]["loss"],
    }


def compare_losses(answers: dict[tuple, list[dict]], tolerance: float) -> list[str]:
    """Lines: whether both trainers have the same loss before and after the first step. LoRA starts from other numbers."""
    lines = []
    for reference in ("copy", "cached"):
        ours, theirs = (answers.get((engine, "unpacked", reference)) for engine in ("minisft", "trl"))
        if ours and theirs:
            (a, b), (c, d) = ([step["loss"] for step in one[0]["steps"][:2]] for one in (ours, theirs))
            difference = max(abs(a / c - 1), abs(b / d - 1))
            verdict = "the same" if difference <= tolerance else "NOT THE SAME"
            line = f"{reference}: loss of the first batch, and after a step: minisft {a:.6f} {b:.6f}, TRL {c:.6f} {d:.6f}: "
            lines.append(line + f"{verdict}, {difference:.1e} where {tolerance:.0e} is rounding")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--only", default="", help="cases with this in their name, as in 'trl' or 'shared, cached'")
    parser.add_argument("--out", type=Path, help="append the rows to dpo_<device>.csv in this folder")
    arguments = parser.parse_args()
    device, size = arguments.device, "quick" if arguments.quick else arguments.device
    peers = [case for case in PEER if find_spec("trl") and (case[2] != "adapter off" or find_spec("peft"))]
    cases = [case for case in CASES + peers if arguments.only in ", ".join(case)]
    answers, rows, here = {case: [] for case in cases}, [], "benchmarks.bench_dpo"
    with tempfile.TemporaryDirectory() as folder:
        where = dict(folder=folder, size=size, device=device)
        about = in_fresh_process(f"{here}:make_inputs", **where)
        for round_number in range(arguments.rounds):
            for case in cases:
                engine, layout, reference = case
                environment = AS_A_COMMAND if engine == "minisft" and device == "cpu" else {}
                answer = in_fresh_process(f"{here}:{engine}", environment, layout=layout, reference=reference, **where)
                answers[case].append(answer)
                if round_number == arguments.rounds - 1:
                    rows.append(
                        row_of(case, answers[case]) | {"parameters": about["parameters"], "rounds": arguments.rounds}
                    )
                    if arguments.out:  # at once: whoever is killed meanwhile leaves the rows of before
                        write_csv(f"dpo_{device}", rows[-1:], arguments.out)
    print_table(rows)
    print("\n".join(compare_losses(answers, SIZES[size]["tolerance"])))


if __name__ == "__main__":
    main()
