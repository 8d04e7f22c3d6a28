"""Tokens per second and peak memory of a whole optimizer step on the CPU, beside others and beside its ceiling.

    python -m benchmarks.train_step                     all of them; TRL if it is installed (pip install -e ".[bench]")
    python -m benchmarks.train_step --lora 16           adapters of this rank beside every linear layer but the head
    python -m benchmarks.train_step --only minisft products --steps 6      some; such a run goes into no CSV

The work: a 57 M parameter Llama (hidden 576, 8 layers, 9 heads, 3 KV heads, intermediate 1536, vocabulary 49,152, tied) on
GSM8K, tokenised by a byte-level BPE that is trained on it, packed to 1,024 tokens, 2 packs a micro-batch, 2 micro-batches a
step, bf16 autocast over fp32 weights, AdamW, clipping, the statistics that each logs by default. Once with every token
trained and once with the answers only; the two are different work and are reported apart.

    minisft     loop.train_step, as a run takes it
    plain       the loop that a careful user writes with transformers' Llama: SDPA with a mask that keeps the documents of a pack
                apart, torch's cross-entropy and fused AdamW, on the packs of minisft, a pack a row
    compiled    the same, the forward pass with its loss through torch.compile
    trl         SFTTrainer, which packs for itself
    products    the ceiling: the matrix products with weights of the same steps, forward and backward in bf16, and nothing else

With --lora the base is frozen and the others have PEFT's adapters; the products are those of the base without the gradients of
its weights, and those of the adapters.

A step is timed from taking its micro-batches to the end of the update; its tokens are the real ones of its packs. Every
case runs in a process of its own, in rounds (a b c a b c), and the median step over all rounds is reported with its
quartiles; the first steps of a process are not counted. Ratios are medians of the rounds' ratios. Peak memory is that of
the process, with Python and torch.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.harness import AS_A_COMMAND, ROOT, in_fresh_process, print_table, quartiles, write_csv

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
MAX_LENGTH, BATCH_SIZE, ACCUMULATION, WARMUP_STEPS = 1024, 2, 2, 2
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
PEERS = {
    "plain": "transformers",
    "compiled": "transformers",
    "trl": "trl",
}  # and what each of them needs, for adapters also peft
ENGINES = ("minisft", *PEERS, "products")
TRAINED = ("every token", "answers")


# ---- the data ---------------------------------------------------------------------------------------------------


def load_config(folder: str, trained: str, batch_size: int, accumulation: int, lora: int | None = None):
    from minisft.config.load import load

    adapters = {
        "model.config": None,
        "model.model_name_or_path": f"{folder}/base",
        "lora.r": lora,
        "lora.lora_alpha": 32,
    }
    values = {
        "output_dir": f"{folder}/out",
        "model.config": MODEL,
        "model.tokenizer_name_or_path": f"{folder}/tokenizer",
        "data.train_data": str(GSM8K),
        "data.completion_only_loss": trained == "answers",
        "data.max_length": MAX_LENGTH,
        "data.packing": True,
        "train.per_device_train_batch_size": batch_size,
        "train.gradient_accumulation_steps": accumulation,
        "train.device": "cpu",
    }
    return load({}, values | (adapters if lora else {}), origin="benchmark")[0]


def make_inputs(folder: str, steps: int, lora: int | None) -> dict:
    """Writes the tokenizer; for the plain loops and the products, the micro-batches of the first steps; a base for adapters."""
    import torch
    from safetensors.torch import save_file

    from minisft.data.tokenizer import train_tokenizer
    from minisft.model.save import save_model
    from minisft.prepare.run import prepare

    rows = [json.loads(line) for line in GSM8K.read_bytes().split(b"\n") if line]
    texts = (f"{row['question']}\n{row['answer']}" for row in rows)
    train_tokenizer(texts, MODEL["vocab_size"], chat_template=None).save(Path(folder) / "tokenizer")
    for trained in TRAINED:
        # One pack a micro-batch: the packs of a step are the same ones.
        run = prepare(load_config(folder, trained, 1, BATCH_SIZE * ACCUMULATION), torch.device("cpu"))
        if lora:
            save_model(run.model, f"{folder}/base")
        loader = run.train
        for step in range(WARMUP_STEPS + steps):
            packs = loader.step(0, step)
            for number in range(ACCUMULATION):
                some = packs[number * BATCH_SIZE : (number + 1) * BATCH_SIZE]
                save_file(as_rows(some), Path(folder) / f"{trained}-{step}-{number}.safetensors")
    return {}


def as_rows(packs: list) -> dict:
    """A micro-batch as others have it, a pack a row: input_ids, position_ids, document and targets, int64 [B, MAX_LENGTH] each,
    and num_tokens [B].

    Row t of the hidden states is scored against targets[t], -100 = not trained. Tokens that fill a row are documents of one.
    """
    import torch

    rows = {key: torch.zeros(len(packs), MAX_LENGTH, dtype=torch.int64) for key in ("input_ids", "position_ids")}
    rows["targets"] = torch.full((len(packs), MAX_LENGTH), -100)
    rows["document"] = torch.arange(MAX_LENGTH).repeat(len(packs), 1)
    for i, pack in enumerate(packs):
        tokens, scored = slice(pack.num_tokens), slice(pack.num_targets)  # filler comes after them
        rows["input_ids"][i, tokens] = pack.input_ids[tokens]
        rows["position_ids"][i, tokens] = pack.position_ids[tokens]
        rows["document"][i, tokens] = pack.start[tokens].long()
        rows["targets"][i, pack.loss_rows[scored]] = pack.targets[scored]
    return rows | {"num_tokens": torch.tensor([pack.num_tokens for pack in packs])}


def load_step(folder: str, trained: str, step: int) -> list[dict]:
    from safetensors.torch import load_file

    return [load_file(Path(folder) / f"{trained}-{step}-{number}.safetensors") for number in range(ACCUMULATION)]


# ---- the engines ------------------------------------------------------------------------------------------------


def minisft(folder: str, steps: int, trained: str, lora: int | None) -> dict:
    """Steps of loop.train_step, as a run takes them."""
    import torch

    from minisft.loop import train_step
    from minisft.prepare.run import prepare

    config = load_config(folder, trained, BATCH_SIZE, ACCUMULATION, lora)
    run = prepare(config, torch.device("cpu"))
    speeds, losses = [], []
    for step in range(WARMUP_STEPS + steps):
        began = time.perf_counter()
        result = train_step(run, config.train, run.train.step(0, step))
        speeds.append(result.num_tokens / (time.perf_counter() - began))
        losses.append(result.stats.means()["loss"])
        run.progress.step += 1
    return {"speeds": speeds[WARMUP_STEPS:], "loss": losses[-1]}


def llama_of_transformers(folder: str, lora: int | None):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if lora:
        return LlamaForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    torch.manual_seed(42)
    return LlamaForCausalLM(LlamaConfig(**{key: value for key, value in MODEL.items() if key != "model_type"}))


def peft_options(lora: int | None):
    from peft import LoraConfig

    return LoraConfig(r=lora, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None


def plain(folder: str, steps: int, trained: str, lora: int | None, is_compiled: bool = False) -> dict:
    """Steps of the loop that a careful user writes with transformers, PEFT and torch."""
    import torch
    from torch.nn.functional import cross_entropy

    model = llama_of_transformers(folder, lora)
    if lora:
        from peft import get_peft_model

        model = get_peft_model(model, peft_options(lora))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-5, weight_decay=0.0, fused=True)

    def summed_loss(input_ids, position_ids, mask, targets):
        logits = model(input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")

    if is_compiled:
        summed_loss = torch.compile(summed_loss)
    not_later = torch.ones(MAX_LENGTH, MAX_LENGTH, dtype=torch.bool).tril()
    speeds, losses = [], []
    for step in range(WARMUP_STEPS + steps):
        batches, losses_of_step = load_step(folder, trained, step), []
        began = time.perf_counter()
        num_targets = sum(int((batch["targets"] != -100).sum()) for batch in batches)
        for batch in batches:
            document = batch["document"]
            mask = (document[:, None, :, None] == document[:, None, None, :]) & not_later  # [B, 1, T, T]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = summed_loss(batch["input_ids"], batch["position_ids"], mask, batch["targets"]) / num_targets
            loss.backward()
            losses_of_step.append(loss.item())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(sum(int(batch["num_tokens"].sum()) for batch in batches) / (time.perf_counter() - began))
        losses.append(sum(losses_of_step))
    return {"speeds": speeds[WARMUP_STEPS:], "loss": losses[-1]}


def compiled(folder: str, steps: int, trained: str, lora: int | None) -> dict:
    return plain(folder, steps, trained, lora, is_compiled=True)


def trl(folder: str, steps: int, trained: str, lora: int | None) -> dict:
    """Steps of SFTTrainer with the same model, data and settings; gradient checkpointing off, as in minisft."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line) for line in GSM8K.read_bytes().split(b"\n") if line]
    prompts = [f"### Instruction:\n{row['question']}\n\n### Response:\n" for row in rows]
    if trained == "answers":
        data = [{"prompt": prompt, "completion": row["answer"]} for prompt, row in zip(prompts, rows)]
    else:
        data = [{"text": prompt + row["answer"]} for prompt, row in zip(prompts, rows)]
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
        llama_of_transformers(folder, lora),
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
        **({"peft_config": peft_options(lora)} if lora else {}),
    )
    trainer.train()
    tokens = [sum(counts[i * ACCUMULATION : (i + 1) * ACCUMULATION]) for i in range(len(times))]
    speeds = [n / (end - start) for n, (start, end) in zip(tokens, times)]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"speeds": speeds[WARMUP_STEPS:], "loss": losses[-1]}


def products(folder: str, steps: int, trained: str, lora: int | None) -> dict:
    """For each weight of the model y = x W^T, dx = dy W and, if it trains, dW = dy^T x, into memory that is there already."""
    import torch

    hidden, intermediate, vocabulary = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["vocab_size"]
    keys = hidden // MODEL["num_attention_heads"] * MODEL["num_key_value_heads"]
    sizes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]  # q, k, v, o
    sizes += [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]  # gate, up, down
    layers = [torch.randn(size).bfloat16() for _ in range(MODEL["num_hidden_layers"]) for size in sizes]
    head = torch.randn(vocabulary, hidden).bfloat16()
    most_rows = BATCH_SIZE * MAX_LENGTH
    inputs = most_rows * intermediate, most_rows * vocabulary, most_rows * intermediate, vocabulary * hidden
    x, y, dx, dw = (torch.randn(size).bfloat16() for size in inputs)
    adapters = [torch.randn(size).bfloat16() for m, n in sizes for size in ((lora, n), (m, lora))] if lora else []

    def multiply(weight, rows, is_trained):
        m, n = weight.shape
        x_rows, y_rows = x[: rows * n].view(rows, n), y[: rows * m].view(rows, m)
        torch.mm(x_rows, weight.T, out=y_rows)
        torch.mm(y_rows, weight, out=dx[: rows * n].view(rows, n))
        if is_trained:
            torch.mm(y_rows.T, x_rows, out=dw[: m * n].view(m, n))

    speeds = []
    for step in range(WARMUP_STEPS + steps):
        batches = load_step(folder, trained, step)
        counts = [(int(batch["num_tokens"].sum()), int((batch["targets"] != -100).sum())) for batch in batches]
        began = time.perf_counter()
        for num_tokens, num_targets in counts:
            for weight in layers:
                multiply(weight, num_tokens, not lora)
            for weight in adapters * MODEL["num_hidden_layers"]:
                multiply(weight, num_tokens, True)
            multiply(head, num_targets, not lora)
        speeds.append(sum(num_tokens for num_tokens, _ in counts) / (time.perf_counter() - began))
    return {"speeds": speeds[WARMUP_STEPS:], "loss": ""}


# ---- the comparison ---------------------------------------------------------------------------------------------


def rows_of(answers: dict[tuple[str, str], list[dict]]) -> list[dict]:
    """A row for each (engine, trained), from its answers in all rounds. minisft_times: how many times as fast as this engine
    minisft is; of `products` that is the share of the ceiling."""
    rows = []
    for (engine, trained), runs in answers.items():
        q1, median, q3 = quartiles([speed for run in runs for speed in run["speeds"]])
        ours = answers.get(("minisft", trained), [])
        ratios = [statistics.median(our["speeds"]) / statistics.median(run["speeds"]) for our, run in zip(ours, runs)]
        rows.append(
            {
                "engine": engine,
                "trained": trained,
                "tokens_per_second": median,
                "q1": q1,
                "q3": q3,
                "peak_gb": statistics.median(run["peak_mb"] for run in runs) * 2**20 / 1e9,
                "last_loss": runs[0]["loss"],
                "minisft_times": statistics.median(ratios) if ratios else "",
            }
        )
    return rows


def summary(rows: list[dict]) -> list[str]:
    """minisft's share of the ceiling, and its strongest peer."""
    lines = []
    for trained in dict.fromkeys(row["trained"] for row in rows):
        of = {row["engine"]: row for row in rows if row["trained"] == trained}
        if "minisft" in of and "products" in of:
            lines.append(f"{trained}: minisft reaches {of['products']['minisft_times']:.1%} of the ceiling")
        if "minisft" in of and (peers := [of[name] for name in PEERS if name in of]):
            best = min(peers, key=lambda row: row["minisft_times"])
            memory = of["minisft"]["peak_gb"] / best["peak_gb"]
            lines.append(f"{trained}: {best['minisft_times']:.2f} x {best['engine']}, in {memory:.0%} of its memory")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=ENGINES, nargs="+", help="these engines")
    parser.add_argument("--lora", type=int, metavar="R", help="train adapters of this rank")
    parser.add_argument("--trained", choices=TRAINED, nargs="+", default=TRAINED)
    arguments = parser.parse_args()
    if not GSM8K.exists():
        raise SystemExit(f"needs {GSM8K}")
    needs = {name: [package, *(["peft"] if arguments.lora else [])] for name, package in PEERS.items()}
    installed = [name for name in ENGINES if all(map(importlib.util.find_spec, needs.get(name, [])))]
    cases = [(engine, trained) for trained in arguments.trained for engine in arguments.only or installed]
    with tempfile.TemporaryDirectory() as folder:
        common = {"folder": folder, "steps": arguments.steps, "lora": arguments.lora}
        in_fresh_process("benchmarks.train_step:make_inputs", **common)
        answers = {case: [] for case in cases}
        for _ in range(arguments.rounds):
            for engine, trained in cases:
                target = f"benchmarks.train_step:{engine}"
                environment = AS_A_COMMAND if engine == "minisft" else {}
                answers[engine, trained].append(in_fresh_process(target, environment, trained=trained, **common))
    rows = rows_of(answers)
    print_table(rows)
    print("\n".join(summary(rows)))
    if len(cases) < len(ENGINES) * len(TRAINED):
        print("not written: the tables show runs of all engines, side by side")
    else:
        print(f"written to {write_csv('train_step_lora' if arguments.lora else 'train_step', rows)}")


if __name__ == "__main__":
    main()
