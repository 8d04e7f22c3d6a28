"""What `minisft init` proposes: keys from the size of the model, the method and the memory, by the arithmetic below.

Bytes for each trained parameter, with AdamW:

    16    fp32 weights, gradients and two moments
    14    bf16 weights, gradients that add up in fp32, two fp32 moments
     8    bf16 weights, gradients in fp32, two 8-bit moments (adamw_8bit)

A frozen parameter takes 2 (LoRA beside bf16) or 0.516 (QLoRA: NF4 with scales in 8 bits; embeddings and head stay bf16). LoRA
of rank r on all linear modules trains r (inputs + outputs) parameters a matrix, at 16 bytes each. DPO of all weights adds a
frozen copy, 4 or 2 bytes a parameter; with adapters the reference is the model without them.

Bytes for each token of a micro-batch, with L layers of width D (residual stream fp32, the rest bf16; SwiGLU of about 3 D):

    60 L D                  without recomputation
    4 L D + 100 D           with gradient_checkpointing: the blocks' inputs, and one block

Logits take nothing, because they are never all in memory. A tenth of the memory and 1 GB are left to PyTorch. DPO takes two
documents a pair.

The rules, in their order: fp32 master weights if they fit, else bf16, else bf16 with adamw_8bit; no recomputation if a pack
fits without it; as many packs a micro-batch as fit, up to 16,384 tokens; then accumulation up to about 32,768 tokens a step
(DPO: 32 pairs). Learning rates are the usual ones: 2e-5 for all weights, 2e-4 for adapters; DPO 1e-6 and 5e-6.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

from minisft.errors import UserError

TRAINERS, METHODS = ("sft", "dpo", "sft+dpo"), ("full", "lora", "qlora")
GB = 1e9
TOKENS_A_STEP, PAIRS_A_STEP, TOKENS_A_MICRO_BATCH = 32768, 32, 16384
LORA_RANK = 16
LEARNING_RATES = {("sft", "full"): 2e-5, ("sft", "lora"): 2e-4, ("dpo", "full"): 1e-6, ("dpo", "lora"): 5e-6}
NAMED = {"gpt2": 124e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6, "distilgpt2": 82e6}
SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z0-9])", re.IGNORECASE)
HARDWARE = re.compile(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*gb", re.IGNORECASE)


@dataclass(frozen=True)
class Size:
    """The size of a model, from its config.json or estimated from its number of parameters."""

    parameters: float
    layers: int
    width: int
    embeddings: float  # the parameters of embedding and head
    exact: bool = True

    def __str__(self) -> str:
        about = "" if self.exact else "about "
        n = self.parameters
        return about + (f"{n / 1e9:.2f} B parameters" if n >= 1e9 else f"{n / 1e6:.3g} M parameters")


@dataclass(frozen=True)
class Hardware:
    """Devices, and the memory of one."""

    gigabytes: float
    devices: int = 1
    is_cpu: bool = False

    def __str__(self) -> str:
        if self.is_cpu:
            return f"CPU with {self.gigabytes:.0f} GB"
        return f"{self.devices} x {self.gigabytes:g} GB" if self.devices > 1 else f"{self.gigabytes:g} GB"


@dataclass(frozen=True)
class Proposal:
    """Values and remarks by the full names of keys, and the arithmetic in sentences."""

    values: dict[str, Any]
    remarks: dict[str, str]
    arithmetic: list[str]


def size_from_config(hf: dict) -> Size | None:
    """The size by a config.json; None if it lacks a key that is needed."""
    hf = hf.get("text_config", hf)

    def get(*names: str) -> int | None:
        return next((hf[n] for n in names if isinstance(hf.get(n), int) and not isinstance(hf.get(n), bool)), None)

    width, layers = get("hidden_size", "n_embd"), get("num_hidden_layers", "n_layer")
    vocab, heads = get("vocab_size"), get("num_attention_heads", "n_head")
    if not (width and layers and vocab and heads):
        return None
    inner = get("intermediate_size", "n_inner") or 4 * width
    head_dim, kv_heads = get("head_dim") or width // heads, get("num_key_value_heads") or heads
    matrices = 2 if hf.get("model_type") in ("gpt2", "gpt_neox", "phi", "starcoder2") else 3
    block = 2 * width * head_dim * (heads + kv_heads) + matrices * width * inner
    tied = hf.get(
        "tie_word_embeddings", hf.get("model_type") in ("gpt2", "gemma", "gemma2", "gemma3_text", "starcoder2")
    )
    embeddings = vocab * width * (1 if tied else 2)
    return Size(layers * block + embeddings, layers, width, embeddings)


def size_from_name(name: str) -> Size | None:
    """The size by the last number in the last part of the name, as in Qwen3-1.7B or SmolLM2-135M; None if there is none."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    found = SIZE.findall(last)
    if not found and last not in NAMED:
        return None
    n = float(found[-1][0]) * (1e9 if found[-1][1].lower() == "b" else 1e6) if found else NAMED[last]
    layers = max(2, round((n / (12 * 100**2)) ** (1 / 3)))  # 12 L D^2 parameters, D about 100 L
    return Size(n, layers, 100 * layers, min(n / 4, 150_000 * 100 * layers), exact=False)


def parse_hardware(text: str, cpu_gigabytes: float) -> Hardware:
    """cpu, 24gb, 8x80gb. Raises UserError."""
    if text.strip().lower() == "cpu":
        return Hardware(cpu_gigabytes, is_cpu=True)
    match = HARDWARE.fullmatch(text.strip())
    if not match or not float(match[2]) or match[1] and not int(match[1]):
        raise UserError(
            f"hardware {text!r}", hint="cpu, or the memory of a GPU, as in 24gb, or 8x80gb for eight of them"
        )
    return Hardware(float(match[2]), int(match[1] or 1))


def propose(
    trainer: str,
    method: str,
    size: Size | None,
    hardware: Hardware,
    max_length: int = 1024,
    epochs: float | None = None,
) -> Proposal:
    """Settings of one stage. trainer: sft or dpo; size: None = unknown, which gives the smallest settings that always work.

    Raises UserError if nothing fits.
    """
    adapters = method != "full"
    values: dict[str, Any] = {"trainer_type": trainer, "data.max_length": max_length, "data.packing": True}
    remarks: dict[str, str] = {"data.packing": "whole documents side by side: no padding, attention stays inside each"}
    if adapters:
        values |= {"lora.r": LORA_RANK, "lora.lora_alpha": 2.0 * LORA_RANK}
    if method == "qlora":
        values["model.load_in_4bit"] = True
    documents = 2 if trainer == "dpo" else 1
    pack = documents * max_length
    room = (hardware.gigabytes * 0.9 - 1) * GB
    fitted = None
    for weights, optim in (("fp32", "adamw"), ("bf16", "adamw"), ("bf16", "adamw_8bit")):
        if (weights, optim) != ("bf16", "adamw") and adapters:  # the frozen weights in bf16
            continue
        if hardware.is_cpu and weights == "bf16" and not adapters:
            continue  # slow there, and what fits is small anyway
        fixed, said = (0.0, "") if size is None else _weights(trainer, method, size, weights, optim)
        for recompute in (False, True):
            per_token = 0.0 if size is None else _activations(size, recompute)
            if fixed + pack * per_token <= room:
                fitted = fitted or (weights, optim, recompute, fixed, per_token, said)
    if fitted is None:
        fits = (
            other for other in METHODS[METHODS.index(method) + 1 :] if _fits(trainer, other, size, hardware, max_length)
        )
        smaller = next((f"--method {other}" for other in fits), "a smaller model")
        need = math.ceil(((fixed + pack * per_token) / GB + 1) / 0.9)
        raise UserError(
            f"{size}, {trainer} {method} with {max_length} tokens needs about {need:,} GB a device; given: {hardware}",
            hint=f"{smaller}, a smaller --max-length, or more memory",
        )
    weights, optim, recompute, fixed, per_token, said = fitted
    if hardware.is_cpu:
        values["train.precision"] = "auto"
        remarks["train.precision"] = "bf16 where the CPU computes in it"
    if weights == "bf16":
        values["train.weights_dtype"] = "bf16"
        remarks["train.weights_dtype"] = "the frozen weights" if adapters else "fp32 master weights would not fit"
    if optim != "adamw":
        values["train.optim"] = optim
        remarks["train.optim"] = "moments of 8 bits"
    if recompute:
        values["model.gradient_checkpointing"] = True
        remarks["model.gradient_checkpointing"] = (
            f"a pack of {pack:,} tokens would not fit otherwise; about a third slower"
        )

    tokens = min(TOKENS_A_MICRO_BATCH, (room - fixed) / per_token if per_token else pack)
    packs = max(1, 2 ** int(math.log2(max(1, tokens // pack))))
    wanted = PAIRS_A_STEP if trainer == "dpo" else max(1, TOKENS_A_STEP // max_length)
    packs = min(packs, 2 ** int(math.log2(max(1, wanted // hardware.devices))))
    accumulation = max(1, round(wanted / (packs * hardware.devices)))
    if trainer == "dpo":
        values["data.packing"] = False  # a step is then a known number of pairs
        remarks["data.packing"] = "true packs pairs: fewer steps, of more pairs each"
    values["train.per_device_train_batch_size"] = packs
    values["evaluate.per_device_eval_batch_size"] = packs
    values["train.gradient_accumulation_steps"] = accumulation
    remarks["train.per_device_train_batch_size"] = "pairs" if trainer == "dpo" else f"packs of {max_length:,} tokens"
    rate = LEARNING_RATES[trainer, "lora" if adapters else "full"]
    values |= {"train.learning_rate": rate, "train.lr_scheduler_type": "cosine", "train.warmup_ratio": 0.03}
    values["train.num_train_epochs"] = epochs if epochs is not None else 1.0 if trainer == "dpo" else 3.0
    remarks["train.learning_rate"] = (
        f"usual for {trainer} of {'adapters' if adapters else 'all weights'}; try half and twice"
    )
    if trainer == "dpo":
        values["dpo.beta"] = 0.1

    many = "s" * (packs > 1)
    each = f"{packs} pair{many}" if trainer == "dpo" else f"{packs} pack{many} x {max_length:,} tokens"
    total = packs * accumulation * hardware.devices
    step = f"{total} pairs" if trainer == "dpo" else f"{total * max_length:,} tokens"
    across = f" x {hardware.devices} devices" if hardware.devices > 1 else ""
    arithmetic = [f"a step: {each} x {accumulation} accumulated{across} = {step}"]
    if size is None:
        arithmetic.append("memory: the size of the model is not known; the batch is the smallest")
    else:
        activations = packs * pack * per_token
        arithmetic.append(
            f"memory: {said} = {fixed / GB:.1f} GB; activations {packs * pack:,} tokens x {per_token / 1e6:.2f} MB = "
            f"{activations / GB:.1f} GB; together {(fixed + activations) / GB:.1f} of {hardware.gigabytes:.0f} GB (estimated)"
        )
    return Proposal(values, remarks, arithmetic)


def _fits(trainer: str, method: str, size: Size | None, hardware: Hardware, max_length: int) -> bool:
    try:
        return bool(propose(trainer, method, size, hardware, max_length=max_length))
    except UserError:
        return False


def _weights(trainer: str, method: str, size: Size, weights: str, optim: str) -> tuple[float, str]:
    """(bytes of weights, gradients, moments and reference; their calculation in words)."""
    n = size.parameters
    if method == "full":
        each = 16 if weights == "fp32" else 14 if optim == "adamw" else 8
        reference = (4 if weights == "fp32" else 2) if trainer == "dpo" else 0
        how = f"({each} + {reference} for the reference)" if reference else f"{each}"
        return n * (each + reference), f"{n / 1e9:.3g} B x {how}"
    in_layers = n - size.embeddings
    # Seven matrices a block of D x D to D x 3 D: r (inputs + outputs) is about 19 r D.
    adapters = 19 * LORA_RANK * size.width * size.layers
    base = in_layers * (0.516 if method == "qlora" else 2) + size.embeddings * 2
    how = (
        f"{in_layers / 1e9:.3g} B x {0.516 if method == 'qlora' else 2} + embeddings {size.embeddings / 1e9:.2g} B x 2"
    )
    return base + 16 * adapters, f"{how} + adapters {adapters / 1e6:.3g} M x 16"


def _activations(size: Size, recompute: bool) -> float:
    """Bytes for each token of a micro-batch."""
    return 4.0 * size.layers * size.width + 100.0 * size.width if recompute else 60.0 * size.layers * size.width
