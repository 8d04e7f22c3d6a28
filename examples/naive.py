"""Supervised fine-tuning, the naive way: a whole run in one file, to read first and to test other code against.

    python examples/naive.py

It trains the model of configs/quickstart.toml as a first explanation of fine-tuning would: rows are padded to the longest one,
a mask tensor says who sees whom, every position gets its logits, torch computes the cross-entropy, and torch's AdamW updates
the weights. The engine pads nothing, has no mask and never makes these logits, and has the same losses: tests/test_naive.py
compares them step by step. Two things come from the engine, since both draw them by chance: the weights at the start, and
which rows are in which step.

Shapes: B rows of L tokens, D features, V tokens in the vocabulary, H query heads, K key heads, Dh features of a head.
"""

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from minisft.config.load import load
from minisft.config.sections import Config
from minisft.data.batch import Batch
from minisft.prepare.run import Run, prepare

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.toml"
IGNORED = -100  # the label of a token that is not trained

Model = Callable[[Tensor, Tensor], Tensor]  # ids [B, L], mask [B, L, L] -> logits [B, L, V]


# ---- data -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    ids: list[int]
    labels: list[int]  # the token itself where it is trained, else IGNORED
    weights: list[float]  # how much each token counts: 1 where it is trained, as a rule, else 0


def read_rows(path: Path, tokenizer: Tokenizer, eos: int) -> list[Row]:
    """A line has a prompt, which is not trained, and a completion, which is, with the token that ends it."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        prompt = tokenizer.encode(example["prompt"], add_special_tokens=False).ids
        answer = [*tokenizer.encode(example["completion"], add_special_tokens=False).ids, eos]
        weights = [0.0] * len(prompt) + [1.0] * len(answer)
        rows.append(Row(prompt + answer, [IGNORED] * len(prompt) + answer, weights))
    return rows


def pad(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> ids, labels, weights [B, L] and mask [B, L, L]: whether the query of this line sees the key of this column."""
    length = max(len(row.ids) for row in rows)
    padding = Row([0], [IGNORED], [0.0])
    filled = [Row(*(x + y * (length - len(x)) for x, y in zip(row, padding))) for row in rows]
    ids, labels, weights = (torch.tensor(column) for column in zip(*filled))
    is_token = torch.arange(length) < torch.tensor([len(row.ids) for row in rows])[:, None]  # [B, L]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ids, labels, weights, causal & is_token[:, None, :]


# ---- the model: Llama -------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, heads, L, Dh]: features i and i + Dh / 2 are a pair, turned by an angle [L, Dh / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def llama(w: dict[str, Tensor], config: dict, ids: Tensor, mask: Tensor) -> Tensor:
    """w: the weights, by their names in Hugging Face's files without "model."; config: config.json. The rest as in Model."""
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, eps = config["hidden_size"] // num_heads, config.get("rms_norm_eps", 1e-6)
    frequencies = config.get("rope_theta", 10_000.0) ** -(torch.arange(0, head_dim, 2) / head_dim)  # [Dh / 2]
    angles = torch.arange(ids.shape[1])[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()

    x = w["embed_tokens.weight"][ids]  # [B, L, D]
    for layer in range(config["num_hidden_layers"]):
        of = {name.removeprefix(f"layers.{layer}."): p for name, p in w.items()}
        h = rms_norm(x, of["input_layernorm.weight"], eps)
        q, k, v = (F.linear(h, of[f"self_attn.{name}_proj.weight"]) for name in "qkv")
        q, k, v = (t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v))  # [B, H or K, L, Dh]
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(num_heads // num_kv_heads, dim=1) for t in (k, v))  # [B, H, L, Dh]
        scores = q @ k.mT / math.sqrt(head_dim)  # [B, H, L, L]
        attended = scores.masked_fill(~mask[:, None], -math.inf).softmax(-1) @ v
        x = x + F.linear(attended.transpose(1, 2).flatten(2), of["self_attn.o_proj.weight"])
        h = rms_norm(x, of["post_attention_layernorm.weight"], eps)
        gated = F.silu(F.linear(h, of["mlp.gate_proj.weight"])) * F.linear(h, of["mlp.up_proj.weight"])
        x = x + F.linear(gated, of["mlp.down_proj.weight"])
    head = "embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return F.linear(rms_norm(x, w["norm.weight"], eps), w[head])


# ---- one step ---------------------------------------------------------------------------------------------------


def loss_sum(model: Model, rows: list[Row]) -> Tensor:
    """The sum of weight x -log p(token) over the trained tokens of some rows."""
    ids, labels, weights, mask = pad(rows)
    logits = model(ids, mask)[:, :-1]  # the shift: the last position has no next token to predict,
    labels, weights = labels[:, 1:], weights[:, 1:]  # and nothing predicts the first one
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return (nll * weights.flatten()).sum()


def add_gradients(model: Model, micro_batches: list[list[Row]]) -> float:
    """Add the gradient of a step's loss to that of the weights; returns the loss. Sums of micro-batches add up and their means
    do not, so each one is divided by the weight of the whole step."""
    total = sum(sum(row.weights[1:]) for rows in micro_batches for row in rows)
    loss = 0.0
    for rows in micro_batches:
        part = loss_sum(model, rows) / total
        part.backward()
        loss += part.item()
    return loss


def lr_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """From 0 to 1 along a line, then to 0 along half a cosine. The first step is step 0."""
    if step < warmup_steps:
        return step / warmup_steps
    return (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


# ---- the whole run ----------------------------------------------------------------------------------------------


def train(config: Config, run: Run) -> Iterator[float]:
    """Train as the engine would, and yield the loss of each step. run: the parts of the engine's run, which stay as they are."""
    o, total_steps = config.train, run.total_steps
    tokenizer = Tokenizer.from_file(f"{config.model.tokenizer_name_or_path}/tokenizer.json")
    rows = read_rows(Path(config.data.train_data), tokenizer, run.tokenizer.eos_token_id)
    w = {name: p.detach().clone().requires_grad_() for name, p in run.model.named_parameters()}
    groups = [
        {"params": [p for p in w.values() if p.ndim == 2], "weight_decay": o.weight_decay},
        {"params": [p for p in w.values() if p.ndim == 1], "weight_decay": 0.0},  # the norms
    ]
    optimizer = torch.optim.AdamW(groups, betas=(o.adam_beta1, o.adam_beta2), eps=o.adam_epsilon)
    for step in range(total_steps):
        batches = run.train.step(*divmod(step, run.train.steps_per_epoch))
        micro_batches = [[rows[i] for i in numbers_of(batch)] for batch in batches]
        for group in optimizer.param_groups:
            group["lr"] = o.learning_rate * lr_factor(step, total_steps, o.warmup_steps)
        loss = add_gradients(partial(llama, w, config.model.config), micro_batches)
        torch.nn.utils.clip_grad_norm_(w.values(), o.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield loss


def numbers_of(batch: Batch) -> list[int]:
    """Which rows of the data are in one of the engine's batches, in its order."""
    return batch.row_document[: batch.num_targets].unique_consecutive().tolist()  # filler comes last


def rows_of(batch: Batch) -> list[Row]:
    """The rows of one of the engine's batches themselves, whatever data they were made from: to test other data with."""
    weights = torch.zeros(len(batch.input_ids))
    scored = batch.loss_rows[: batch.num_targets]
    weights[scored + 1] = 1.0 if batch.row_weights is None else batch.row_weights[: batch.num_targets]
    bounds = batch.cu_seqlens[batch.cu_seqlens <= batch.num_tokens].tolist()
    return [Row(*(x[a:b].tolist() for x in (batch.input_ids, batch.labels, weights))) for a, b in pairwise(bounds)]


def main() -> None:
    config, _ = load(QUICKSTART, {"train.precision": "fp32", "train.device": "cpu"})
    run = prepare(config, torch.device("cpu"))
    for step, loss in enumerate(train(config, run), start=1):
        if step == 1 or step % 25 == 0 or step == run.total_steps:
            print(f"step {step:3}/{run.total_steps}  loss {loss:.6f}", flush=True)


if __name__ == "__main__":
    main()
