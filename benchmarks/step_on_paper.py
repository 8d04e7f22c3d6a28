"""One optimizer step of real models on a GPU that exists on paper: its launches, waits, bytes, FLOPs, and an estimate.

    python -m benchmarks.step_on_paper                                          four models on an H200
    python -m benchmarks.step_on_paper --model SmolLM2-135M --tokens 4096       one of them, other sizes
    python -m benchmarks.step_on_paper --json                                   a list of dicts, one for each model
    python -m benchmarks.step_on_paper --csv benchmarks/results                 rows by part of the step

The step is loop.train_step itself, with a decoder of the family's shape and the optimizer of a configuration, on documents of
2,048 tokens of which all are trained. paper_gpu.py runs it without a GPU and writes down what would be launched. It is the
second step of a run: the first one makes the optimizer's moments.

Three times stand side by side, none of them measured:

- roofline: every launch at the limit of the card, by its bytes or by its FLOPs, whichever takes longer. The sum is what these
  launches would take if each were perfect.
- floor: what no step of this model can go below, from the model alone and not from what was launched: see `floor`.
- estimate: what the launches will probably take, from assumptions that are named at `estimate`. The host is not part of it: a GPU
  that waits for Python takes longer, and a step with thousands of launches of a few microseconds does wait.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.harness import write_csv
from benchmarks.paper_gpu import Launch, PaperGPU
from minisft import sft
from minisft.cards import CARDS, Card
from minisft.config.choices import OPTIMIZERS
from minisft.config.load import load
from minisft.config.sections import Config
from minisft.data.batch import Batch
from minisft.data.cache import Documents
from minisft.data.kinds import ANSWER, TRAINED
from minisft.data.loader import Loader
from minisft.data.packing import plan
from minisft.errors import run_command
from minisft.loop import train_step
from minisft.metrics import Sums
from minisft.model.decoder import Decoder
from minisft.model.families import from_hf
from minisft.model.layers import NORMS, GatedMLP
from minisft.model.lora import apply_lora
from minisft.model.lora_options import LoraOptions
from minisft.plan.flops import products
from minisft.prepare.data import ROUND_TO
from minisft.prepare.optimizer import prepare_optimizer
from minisft.prepare.run import Progress, Run
from minisft.runtime import DTYPES
from minisft.update import LossScale

DOCUMENT = 2048  # tokens of a document


@dataclass(frozen=True)
class Case:
    """A model by its config.json, and how it is trained."""

    config: dict
    tokens: int = 16384  # of a micro-batch
    optimizer: str = "adamw"
    weights_dtype: str = "fp32"
    accumulation: int = 1
    lora: int | None = None  # rank of adapters beside all linear layers


def llama(**shape) -> dict:
    return {"model_type": "llama", "max_position_embeddings": 131072, "tie_word_embeddings": True, **shape}


MODELS = {
    "SmolLM2-135M": Case(
        llama(
            **dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30),
            **dict(num_attention_heads=9, num_key_value_heads=3),
        )
    ),
    "Qwen2.5-0.5B": Case(
        llama(
            **dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24),
            **dict(num_attention_heads=14, num_key_value_heads=2, model_type="qwen2"),
        )
    ),
    "Llama-3.2-1B": Case(
        llama(
            **dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16),
            **dict(num_attention_heads=32, num_key_value_heads=8, head_dim=64),
        )
    ),
    "Llama-3.1-8B": Case(
        llama(
            **dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
            **dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
        ),
        tokens=8192,
        optimizer="adamw_minisft",
        weights_dtype="bf16",
    ),
}

# Which part of the step a launch belongs to: by the file that it comes from, else by the name of the op. What is in neither is
# "rest", and printed.
PART_OF_ROOM = {
    "kernels/rms_norm": "norms",
    "kernels/layer_norm": "norms",
    "kernels/flash_attention": "attention",
    "kernels/embedding": "embedding",
    "kernels/rope": "rope",
    "model/rope": "rope",
    "kernels/glu": "glu",
    "kernels/cross_entropy": "linear cross-entropy",
    "kernels/linear_cross_entropy": "linear cross-entropy",
    "data/batch": "metrics",
    "metrics": "metrics",
    "update": "gradient norm, clip",
    "optimizers": "optimizer",
    "kernels/adamw": "optimizer",
}
PART_OF_OP = {
    "embedding": "embedding",
    "embedding_dense_backward": "embedding",
    "mm": "matmuls",
    "addmm": "matmuls",
    "bmm": "matmuls",
    "_to_copy": "casts",
    "copy": "casts",
    "add": "adds",
    "_foreach_norm": "gradient norm, clip",
    "linalg_vector_norm": "gradient norm, clip",
}
PARTS = tuple(dict.fromkeys(["copies", "embedding", "matmuls", *PART_OF_ROOM.values(), *PART_OF_OP.values(), "rest"]))


def part_of(launch: Launch) -> str:
    if launch.is_copy:
        return "copies"
    known = [PART_OF_ROOM[room] for room in launch.rooms if room in PART_OF_ROOM]
    return known[0] if known else PART_OF_OP.get(launch.name.rstrip("_"), "rest")


# ---- the step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    launches: list[Launch]
    waits: Counter[str]
    floor: dict[str, float]  # seconds of each part


def take_step(case: Case, card: Card) -> Step:
    """One step of the case on the card, on paper."""
    config = make_config(case)
    batches = make_batches(case)
    with PaperGPU(card, pairs=attended_pairs(batches[0])) as gpu:
        run = make_run(config, case, gpu)
        for step in range(2):
            gpu.launches.clear()
            gpu.waits.clear()
            gpu.phase, run.progress.step = "forward", step
            train_step(run, config.train, batches)
        return Step(gpu.launches, gpu.waits, floor(run, batches, card))


def make_config(case: Case) -> Config:
    config, _ = load(
        {},
        {
            **dict.fromkeys(("output_dir", "model.tokenizer_name_or_path", "data.train_data"), "on paper"),
            "model.config": case.config,
            "train.optim": case.optimizer,
            "train.weights_dtype": case.weights_dtype,
            "train.gradient_accumulation_steps": case.accumulation,
        },
        origin="benchmark",
    )
    return config


def make_batches(case: Case) -> list[Batch]:
    """The micro-batches of a step by the loader: documents of 2,048 tokens (the last one of each may be shorter), all trained."""
    lengths = [DOCUMENT] * (case.tokens // DOCUMENT) + [case.tokens % DOCUMENT] * (case.tokens % DOCUMENT > 0)
    offsets = np.concatenate([[0], np.cumsum(lengths * case.accumulation)])
    cache = SimpleNamespace(
        ids=np.zeros(offsets[-1], dtype=np.uint32),
        kinds=np.full(offsets[-1], ANSWER | TRAINED, dtype=np.uint8),
        source=np.zeros(len(offsets) - 1, dtype=np.int32),
        **dict(weights=None, role=None, group=1, fingerprint="0" * 64, sources=()),
    )
    documents = Documents(cache, np.arange(len(offsets) - 1), offsets[:-1], offsets[1:])
    each_alone = plan(documents.lengths, DOCUMENT, "none")
    options = dict(batch_size=len(lengths), accumulation=case.accumulation, shuffle=False, round_to=ROUND_TO)
    return Loader(documents, each_alone, **options).step(0, 0)


def attended_pairs(batch: Batch) -> int:
    """Pairs of a query and a key that it sees, of one head."""
    return int((batch.position_ids.long() + 1).sum())


def make_run(config: Config, case: Case, gpu: PaperGPU) -> Run:
    """What train_step needs of a run: the model and its optimizer on the GPU, the objective of SFT."""
    torch.set_default_dtype(DTYPES[config.train.weights_dtype])
    with gpu.device:
        model = Decoder(from_hf(case.config))
    torch.set_default_dtype(torch.float32)
    model.mean_length = DOCUMENT
    if case.lora:
        apply_lora(model, LoraOptions(r=case.lora))
    trained = prepare_optimizer(config, model)

    def loss(*arguments):
        gpu.phase = "forward"
        return sft.loss(*arguments)

    nothing = dict.fromkeys(
        (
            "tokenizer",
            "train",
            "eval_steps",
            "save_steps",
            "sample_steps",
            "best_metric",
            "reference",
            "start",
            "graphs",
        )
    )
    return Run(
        progress=Progress(Sums(gpu.device), LossScale(1.0)),
        device=gpu.device,
        precision="bf16",
        model=model.train(),
        optimizer=trained.optimizer,
        evals={},
        prompts=[],
        sample_prompts=[],
        weight=sft.weight,
        loss=loss,
        schedule={"name": "constant", "total_steps": 2},
        summary=[],
        prompting={},
        first_steps=trained.first_steps,
        measured=set(),  # steps that are not logged count no zero updates
        **nothing,
    )


# ---- the three times --------------------------------------------------------------------------------------------------


def floor(run: Run, batches: list[Batch], card: Card) -> dict[str, float]:
    """Seconds of each part that no step of this model can go below on this card, if activations are in bf16.

    matmuls: 2 FLOPs for each weight of a layer and token, forward, for the gradient of the input, and for that of the weight.
    linear cross-entropy: the same of the head, for each target, and the logits, written once and read once.
    attention: two products of q and k forward and five backward, for each pair of tokens that see each other.
    norms: read x, write y; read x and dy, write dx. glu: read gate and up, write y; read these and dy, write two gradients.
    rope: read and write q and k, in both directions, as planned. By now attention turns q, and dk back, beside its products.
    optimizer: read weight, gradient and moments, write weight and moments.

    Additions to the residual stream, casts, the gradients' norm and the embedding are not in it: they could ride along.
    """
    model, config, num_bytes = run.model, run.model.config, Counter()
    T, M = (sum(getattr(batch, name) for batch in batches) for name in ("num_tokens", "num_targets"))
    V, D = model.head_weight.shape
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    pairs = sum(map(attended_pairs, batches))
    flops = Counter(products(config, shapes, trained, tokens=T, targets=M, pairs=pairs))
    num_bytes["linear cross-entropy"] = 2 * M * V * 2
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    for mixer, rope in zip(config.mixers, config.ropes):
        if mixer == "attention":
            num_bytes["rope"] += 0 if rope is None else 2 * 2 * T * (heads + kv_heads) * head_dim * 2
    for module in model.modules():
        if isinstance(module, tuple(NORMS.values())) and module.weight.numel() == D:
            num_bytes["norms"] += (2 + 3) * T * D * 2
        if isinstance(module, GatedMLP):
            num_bytes["glu"] += (3 + 5) * T * config.intermediate_size * 2
    # Logits are scored when a row of them is complete, so the traffic does not overlap with the products.
    parts = {part: card.seconds(num_bytes[part], 0) + card.seconds(0, flops[part]) for part in num_bytes | flops}
    update = 0
    for p, state in run.optimizer.state.items():
        gradient = p.numel() * (p.grad_dtype or p.dtype).itemsize
        update += gradient + 2 * p.nbytes + 2 * sum(t.nbytes for t in state.values() if t.numel() > 1)
    return parts | {"optimizer": card.seconds(update, 0)}


def estimate(launch: Launch, card: Card) -> float:
    """Seconds that a launch will probably take. The numbers are assumptions, from what is published of such kernels.

    Products: the best of four tiles and of cutting k into 1, 2, 4 or 8 parts, in waves of one tile on each multiprocessor. A
    tile reaches 100, 92, 75 or 50 % of the matmul rate by its size, and starting it costs as much as 160 steps of k. At least
    88 % of the bandwidth, and 2 us.
    Attention: 50 % of the matmul rate forward, 42 % backward.
    The rest: 85 % of the bandwidth, 65 % where a row of logits is scored, and 1.5 us.
    """
    if launch.shape is not None:
        return max(product_seconds(*launch.shape, card), launch.bytes / (0.88 * card.copy)) + 2e-6
    share = 0.65 if "kernels/cross_entropy" in launch.rooms else 0.85
    seconds = launch.bytes / (share * card.copy) + 1.5e-6
    return max(seconds, launch.flops / (card.matmul * (0.50 if launch.phase == "forward" else 0.42)))


def product_seconds(m: int, n: int, k: int, card: Card) -> float:
    best = math.inf
    for rows, columns, share in ((128, 256, 1.0), (128, 128, 0.92), (64, 128, 0.75), (64, 64, 0.5)):
        tiles = math.ceil(m / rows) * math.ceil(n / columns)
        for parts in (1, 2, 4, 8):
            if parts == 1 or k / parts >= 512:
                waves = math.ceil(tiles * parts / card.num_sms)
                wave = 2 * rows * columns * (k / parts + 160) / (share * card.matmul / card.num_sms)
                sums = 4 * m * n * parts / card.copy if parts > 1 else 0  # fp32, written by each part
                best = min(best, waves * wave + sums)
    return best


# ---- what is printed --------------------------------------------------------------------------------------------------


def by_part(step: Step, card: Card) -> list[dict]:
    """A row for each part of the step that has launches or a floor, and one for all."""
    rows = []
    for part in PARTS:
        launches = [launch for launch in step.launches if part_of(launch) == part]
        if launches or step.floor.get(part):
            rows.append(summed(part, launches, step.floor.get(part, 0.0), card))
    return [*rows, summed("all", step.launches, sum(step.floor.values()), card)]


def summed(part: str, launches: list[Launch], floor: float, card: Card) -> dict:
    phases = Counter(launch.phase for launch in launches)
    return {
        "part": part,
        "launches": len(launches),
        **{phase: phases[phase] for phase in ("forward", "backward", "update")},
        "bytes": sum(launch.bytes for launch in launches),
        "flops": sum(launch.flops for launch in launches),
        "roofline_ms": 1e3 * sum(card.seconds(launch.bytes, launch.flops) for launch in launches),
        "floor_ms": 1e3 * floor,
        "ms": 1e3 * sum(estimate(launch, card) for launch in launches),
    }


def as_json(name: str, case: Case, step: Step, card: Card) -> dict:
    total = by_part(step, card)[-1]
    return {
        "model": name,
        "tokens": case.tokens * case.accumulation,
        "launches": total["launches"],
        "waits": step.waits.total(),
        **{key: total[key] for key in ("bytes", "flops", "ms")},
        "share_of_floor": total["floor_ms"] / total["ms"],
    }


def as_rows(name: str, case: Case, step: Step, card: Card) -> list[dict]:
    """A row of the CSV for each part of the step."""
    how = {key: value for key, value in asdict(case).items() if key != "config"}
    where = {"model": name, "card": card.name, **how, "waits": step.waits.total()}
    return [where | row for row in by_part(step, card)]


def print_step(name: str, case: Case, step: Step, card: Card) -> None:
    """A table of at most 100 columns, the waits, and the launches that are in no part."""
    how = f"{case.optimizer}, {case.weights_dtype} weights" + (f", LoRA {case.lora}" if case.lora else "")
    print(f"\n{name} on paper, {card.name}: {case.accumulation} x {case.tokens:,} tokens, {how}")
    print(f"{'':<22}{'launches':>8}{'fwd':>6}{'bwd':>6}{'upd':>6}{'GB':>8}{'TFLOP':>8}", end="")
    print(f"{'roofline':>10}{'floor':>8}{'estimate ms':>13}")
    rows = by_part(step, card)
    for row in rows:
        counts = f"{row['launches']:>8,}{row['forward']:>6}{row['backward']:>6}{row['update']:>6}"
        sizes = f"{row['bytes'] / 1e9:>8.2f}{row['flops'] / 1e12:>8.2f}"
        print(f"{row['part']:<22}{counts}{sizes}{row['roofline_ms']:>10.2f}{row['floor_ms']:>8.2f}{row['ms']:>13.2f}")
    total = rows[-1]
    share = total["floor_ms"] / total["ms"]
    speed = case.tokens * case.accumulation / total["ms"] * 1e3
    print(f"the floor is {share:.0%} of the estimate, {speed:,.0f} tokens/s (an estimate, not a measurement)")
    print(f"{step.waits.total()} waits" + "".join(f"\n  {count} x {where}" for where, count in step.waits.items()))
    rest = Counter((launch.rooms[0], launch.name) for launch in step.launches if part_of(launch) == "rest")
    unknown = [
        f"{count} x {room} {op}" for (room, op), count in rest.items() if room.startswith("kernels/") or count > 4
    ]
    print("in no part: " + (", ".join(unknown) or "single launches only"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, help="only this one")
    parser.add_argument("--card", choices=CARDS, default="H200")
    parser.add_argument("--tokens", type=int, help="of a micro-batch")
    parser.add_argument("--accumulation", type=int, help="micro-batches")
    parser.add_argument("--optimizer", choices=OPTIMIZERS)
    parser.add_argument("--lora", type=int, metavar="R", help="train adapters of this rank, the weights are frozen")
    parser.add_argument("--json", action="store_true", help="print one list, a dict for each model")
    parser.add_argument("--csv", type=Path, metavar="DIR", help="add to DIR/step_on_paper.csv")
    arguments = parser.parse_args()
    card = CARDS[arguments.card]
    keys = ("tokens", "accumulation", "optimizer", "lora")
    changed = {key: getattr(arguments, key) for key in keys if getattr(arguments, key) is not None}
    totals, rows = [], []
    for name in [arguments.model] if arguments.model else MODELS:
        case = replace(MODELS[name], **changed)
        step = take_step(case, card)
        totals.append(as_json(name, case, step, card))
        rows += as_rows(name, case, step, card)
        if not arguments.json:
            print_step(name, case, step, card)
    if arguments.json:
        print(json.dumps(totals))
    if arguments.csv:
        write_csv("step_on_paper", rows, arguments.csv)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
