"""What `minisft init` proposes: keys from the size of the model, the method and the memory.

The memory is that which `minisft plan` predicts, if there is a config.json to predict by, with the plan's margin of a tenth. Of a
model that is only a name, the arithmetic below estimates it.

Bytes for each trained parameter, with AdamW:

    16    fp32 weights, gradients and two moments
    14    bf16 weights, gradients that add up in fp32, two fp32 moments
     8    bf16 weights, gradients in fp32, two 8-bit moments (adamw_8bit)

A frozen parameter takes 2 (LoRA beside bf16) or 0.516 (QLoRA: NF4 with scales in 8 bits; embeddings and head stay bf16). LoRA
of rank r on all linear modules trains r (inputs + outputs) parameters a matrix, at 16 bytes each. DPO of all weights adds a
frozen copy, 4 or 2 bytes a parameter; with adapters the reference is the model without them.

Bytes for each token of a micro-batch, with L layers of width D (residual stream fp32, the rest bf16; SwiGLU of 3 to 5 D, for
which `minisft plan` counts 25 to 41 L D on a GPU):

    40 L D                  without recomputation
    4 L D + 100 D           with gradient_checkpointing: the blocks' inputs, and one block

Logits take nothing, because they are never all in memory. A tenth of the memory and 1 GB are left to PyTorch. DPO takes two
documents a pair.

With local rows, max_length is the power of two that holds 99 in 100 of them, if the memory allows it, and the step is as
small as it must be for a run of at least 50 steps. A token is taken to be four characters (three for max_length).

The rules, in their order: fp32 master weights if they fit, else bf16, else bf16 with adamw_8bit; no recomputation if a pack
fits without it; as many packs a micro-batch as fit, up to 16,384 tokens; then accumulation up to about 32,768 tokens a step
(DPO: 32 pairs). Learning rates are the usual ones: 2e-5 for all weights, 2e-4 for adapters; DPO 1e-6 and 5e-6.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minisft.errors import UserError

TRAINERS, METHODS = ("sft", "dpo", "sft+dpo"), ("full", "lora", "qlora")
GB = 1e9
TOKENS_A_STEP, PAIRS_A_STEP, TOKENS_A_MICRO_BATCH = 32768, 32, 16384
LORA_RANK = 16
LEAST_STEPS = 50  # of a run: fewer do not show whether it learns
USUAL_LENGTH, LENGTHS = 1024, (128, 8192)
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

    @property
    def room(self) -> float:
        """The bytes of a device that are left for training."""
        return (self.gigabytes * 0.9 - 1) * GB

    def __str__(self) -> str:
        if self.is_cpu:
            return f"CPU with {self.gigabytes:.0f} GB"
        return f"{self.devices} x {self.gigabytes:g} GB" if self.devices > 1 else f"{self.gigabytes:g} GB"


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, in characters."""

    number: int
    characters: int  # of all rows
    long: int  # 99 in 100 rows have no more

    @property
    def tokens(self) -> float:
        return self.characters / 4

    @property
    def max_length(self) -> int:
        """A power of two in tokens."""
        least, most = LENGTHS
        return min(most, max(least, 2 ** math.ceil(math.log2(max(1, self.long / 3)))))


# (keys, tokens of a micro-batch) -> (bytes of a device, these in words), as `minisft plan` predicts them
Predict = Callable[[dict[str, Any], int], tuple[float, str]]
MARGIN = 0.10  # that of plan/estimate.py


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
    max_length: int | None = None,
    epochs: float | None = None,
    rows: Rows | None = None,
    predict: Predict | None = None,
) -> Proposal:
    """Settings of one stage. trainer: sft or dpo; size: None = unknown, which gives the smallest settings that always work.
    max_length: None = as the rows want it, if they are known. rows: None = unknown. predict: None = by the arithmetic above.

    Raises UserError if nothing fits.
    """
    per_unit = 2 if trainer == "dpo" else 1  # documents of max_length in a pack or pair
    if max_length is None:
        max_length = rows.max_length if rows else USUAL_LENGTH
        while max_length > USUAL_LENGTH and not _first_fit(
            trainer, method, size, hardware, per_unit * max_length, predict
        ):
            max_length //= 2
    pack = per_unit * max_length  # tokens
    plan = _first_fit(trainer, method, size, hardware, pack, predict)
    if plan is None:
        raise _too_large(trainer, method, size, hardware, max_length, pack, predict)
    epochs = epochs if epochs is not None else 1.0 if trainer == "dpo" else 3.0
    units = None if rows is None else epochs * (rows.number if trainer == "dpo" else rows.tokens / max_length)
    packs, accumulation = _batch(trainer, method, hardware, plan, max_length, pack, units, predict)
    values, remarks = _settings_of_plan(plan, method, hardware, pack)
    values |= {"trainer_type": trainer, "data.max_length": max_length, "data.packing": trainer != "dpo"}
    values |= {"train.per_device_train_batch_size": packs, "evaluate.per_device_eval_batch_size": packs}
    values |= {"train.gradient_accumulation_steps": accumulation}
    if trainer == "dpo":
        values["dpo.beta"] = 0.1  # and without packing, so that a step has a known number of pairs
        remarks["data.packing"] = "true packs pairs: fewer steps, of more pairs each"
        remarks["train.per_device_train_batch_size"] = "pairs"
    else:
        remarks["data.packing"] = "whole documents side by side: no padding, attention stays inside each"
        remarks["train.per_device_train_batch_size"] = f"packs of {max_length:,} tokens"
    trained = "all weights" if method == "full" else "adapters"
    rate = LEARNING_RATES[trainer, "full" if method == "full" else "lora"]
    values |= {"train.learning_rate": rate, "train.lr_scheduler_type": "cosine", "train.warmup_ratio": 0.03}
    values["train.num_train_epochs"] = epochs
    remarks["train.learning_rate"] = f"usual for {trainer} of {trained}; try half and twice"
    arithmetic = [_step_arithmetic(trainer, hardware, packs, accumulation, max_length)]
    if rows is not None and units is not None:
        steps = max(1, math.ceil(units / (packs * accumulation * hardware.devices)))
        values |= {"log.logging_steps": min(10, max(1, steps // 20))}
        values |= dict.fromkeys(("evaluate.eval_steps", "checkpoint.save_steps"), min(500, max(1, steps // 4)))
        amount = f"about {rows.number:,} rows, {rows.tokens:,.0f} tokens"
        arithmetic.insert(0, f"data: {amount}; x {epochs:g} epochs = about {steps:,} steps (estimated by characters)")
    if predict is not None:
        _, words = _needed(trainer, method, plan, hardware, packs * pack, predict)
        arithmetic.append(f"memory: at most {words} (`minisft plan`); a device has {hardware.gigabytes:.0f} GB")
    elif size is None:
        arithmetic.append("memory: the size of the model is not known; the batch is the smallest")
    else:
        activations = packs * pack * plan.per_token
        arithmetic.append(
            f"memory: {plan.calculation} = {plan.fixed / GB:.1f} GB; activations {packs * pack:,} tokens x "
            f"{plan.per_token / 1e6:.2f} MB = {activations / GB:.1f} GB; together {(plan.fixed + activations) / GB:.1f} of "
            f"{hardware.gigabytes:.0f} GB (estimated)"
        )
    return Proposal(values, remarks, arithmetic)


# ------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class Plan:
    """One way to keep a model and a micro-batch in memory."""

    weights: str  # fp32 or bf16
    optim: str
    recompute: bool
    fixed: float  # bytes of weights, gradients, moments and reference
    per_token: float  # bytes of activations for each token of a micro-batch
    calculation: str  # of `fixed`, in words


def _plans(trainer: str, method: str, size: Size | None, hardware: Hardware) -> list[Plan]:
    """All plans for this method, the best one first and the smallest one last."""
    pairs = [("fp32", "adamw"), ("bf16", "adamw"), ("bf16", "adamw_8bit")]
    if method != "full":  # the frozen weights are in bf16, and the adapters small
        pairs = [("bf16", "adamw")]
    elif hardware.is_cpu:  # bf16 is slow there, and what fits is small anyway
        pairs = [("fp32", "adamw")]
    plans = []
    for weights, optim in pairs:
        fixed, calculation = (0.0, "") if size is None else _weights(trainer, method, size, weights, optim)
        for recompute in (False, True):
            per_token = 0.0 if size is None else _activations(size, recompute)
            plans.append(Plan(weights, optim, recompute, fixed, per_token, calculation))
    return plans


def _needed(
    trainer: str, method: str, plan: Plan, hardware: Hardware, tokens: int, predict: Predict | None
) -> tuple[float, str]:
    """(bytes of a device with micro-batches of so many tokens, the same in words)"""
    if predict is None:
        return plan.fixed + tokens * plan.per_token, ""
    # with accumulation, which keeps the gradients between micro-batches
    keys = {"trainer_type": trainer, "train.gradient_accumulation_steps": 2}
    return predict(_settings_of_plan(plan, method, hardware, tokens)[0] | keys, tokens)


def _fits(trainer: str, method: str, plan: Plan, hardware: Hardware, tokens: int, predict: Predict | None) -> bool:
    room = hardware.room if predict is None else hardware.gigabytes * GB / (1 + MARGIN)
    return _needed(trainer, method, plan, hardware, tokens, predict)[0] <= room


def _first_fit(
    trainer: str, method: str, size: Size | None, hardware: Hardware, pack: int, predict: Predict | None
) -> Plan | None:
    plans = _plans(trainer, method, size, hardware)
    return next((plan for plan in plans if _fits(trainer, method, plan, hardware, pack, predict)), None)


def _too_large(
    trainer: str,
    method: str,
    size: Size | None,
    hardware: Hardware,
    max_length: int,
    pack: int,
    predict: Predict | None,
) -> UserError:
    smaller = METHODS[METHODS.index(method) + 1 :]
    fits = next(
        (other for other in smaller if _first_fit(trainer, other, size, hardware, pack, predict) is not None), None
    )
    instead = f"--method {fits}" if fits else "a smaller model"
    least = _plans(trainer, method, size, hardware)[-1]
    needed, _ = _needed(trainer, method, least, hardware, pack, predict)
    need = math.ceil((needed / GB + 1) / 0.9 if predict is None else needed / GB * (1 + MARGIN))
    return UserError(
        f"{size}, {trainer} {method} with {max_length} tokens needs about {need:,} GB a device; given: {hardware}",
        hint=f"{instead}, a smaller --max-length, or more memory",
    )


def _settings_of_plan(plan: Plan, method: str, hardware: Hardware, pack: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys that a plan sets, and remarks on them."""
    values: dict[str, Any] = {}
    remarks: dict[str, str] = {}
    if method != "full":
        values |= {"lora.r": LORA_RANK, "lora.lora_alpha": 2.0 * LORA_RANK}
    if method == "qlora":
        values["model.load_in_4bit"] = True
    if hardware.is_cpu:
        values["train.precision"] = "auto"
        remarks["train.precision"] = "bf16 where the CPU computes in it"
    if plan.weights == "bf16":
        values["train.weights_dtype"] = "bf16"
        why = "fp32 master weights would not fit" if method == "full" else "the frozen weights"
        remarks["train.weights_dtype"] = why
    if plan.optim != "adamw":
        values["train.optim"] = plan.optim
        remarks["train.optim"] = "moments of 8 bits"
    if plan.recompute:
        values["model.gradient_checkpointing"] = True
        why = f"a pack of {pack:,} tokens would not fit otherwise; about a third slower"
        remarks["model.gradient_checkpointing"] = why
    return values, remarks


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
    return 4.0 * size.layers * size.width + 100.0 * size.width if recompute else 40.0 * size.layers * size.width


# ------------------------------------------------------------------------------------------------- a step


def _batch(
    trainer: str,
    method: str,
    hardware: Hardware,
    plan: Plan,
    max_length: int,
    pack: int,
    units: float | None,
    predict: Predict | None,
) -> tuple[int, int]:
    """(packs of a micro-batch, micro-batches of a step). units: packs or pairs of the whole run, if they are known."""
    if predict is None:
        tokens = min(TOKENS_A_MICRO_BATCH, (hardware.room - plan.fixed) / plan.per_token if plan.per_token else pack)
        packs = max(1, 2 ** int(math.log2(max(1, tokens // pack))))
    else:
        packs = 1
        while 2 * packs * pack <= TOKENS_A_MICRO_BATCH and _fits(
            trainer, method, plan, hardware, 2 * packs * pack, predict
        ):
            packs *= 2
    wanted = PAIRS_A_STEP if trainer == "dpo" else max(1, TOKENS_A_STEP // max_length)
    if units is not None:
        wanted = min(wanted, max(1, int(units / LEAST_STEPS)))
    packs = min(packs, 2 ** int(math.log2(max(1, wanted // hardware.devices))))
    accumulation = wanted / (packs * hardware.devices)
    return packs, max(1, round(accumulation) if units is None else int(accumulation))


def _step_arithmetic(trainer: str, hardware: Hardware, packs: int, accumulation: int, max_length: int) -> str:
    many = "s" * (packs > 1)
    each = f"{packs} pair{many}" if trainer == "dpo" else f"{packs} pack{many} x {max_length:,} tokens"
    total = packs * accumulation * hardware.devices
    step = f"{total} pairs" if trainer == "dpo" else f"{total * max_length:,} tokens"
    across = f" x {hardware.devices} devices" if hardware.devices > 1 else ""
    return f"a step: {each} x {accumulation} accumulated{across} = {step}"
