"""The parameters that train, and from which step on, chosen by regular expressions of their names.

    train.trainable = ["layers\\.2[0-9]\\.", "^norm"]   these and no others; [] = all
    train.frozen = ["embed_tokens"]                     not these, whatever `trainable` says
    train.unfreeze = {"layers\\.1[0-9]\\." = 200}       these train too, but only after the first 200 steps

An expression may match anywhere in a name, as in `learning_rates`. A frozen parameter has no gradient and no optimizer
state. Below the lowest layer that trains, no activations are kept and no backward pass runs. So the top half of a model
trains in half the memory for gradients and moments, and faster.

Gradual unfreezing (ULMFiT: Howard & Ruder 2018, arXiv:1801.06146) goes from the head down: the layers near the text,
which know the most general things, move last. A parameter that starts at step s has no moments before s and counts its own
updates from there, so Adam's bias correction begins at 1 for it. Its learning rate is the schedule's, as for all others.
The choice is a pure function of the configuration and the step, so a checkpoint holds nothing about it.

Tied embedding and head are one parameter, embed_tokens.weight.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from minisft.errors import UserError

# The kind of a parameter in the table of the summary: the first expression that matches its name.
PARAMETER_KINDS = {
    "adapters": r"lora_|magnitude$",
    "embed_tokens": r"^embed_",
    "norms": r"norm\.",
    "attention": r"\.(self_attn|linear_attn|conv)\.",
    "mlp": r"\.mlp\.",
    "lm_head": r"^lm_head\.",
    "other": "",
}


def choose_trainable(
    model: nn.Module,
    *,
    trainable: Iterable[str] = (),
    frozen: Iterable[str] = (),
    unfreeze: dict[str, int] | None = None,
) -> dict[str, int]:
    """Freeze the parameters that never train (requires_grad = False). Returns, for those that train but not from the
    start, name -> first step (0 is the first of a run).

    The choice is among the parameters that require a gradient now: all, or the adapters of a model with LoRA.
    Raises UserError for an invalid regular expression, for one that matches no such name, and where nothing trains at
    step 0.
    """
    require_found("trainable", trainable, model)
    require_found("frozen", frozen, model)
    for name, p in model.named_parameters():
        chosen = not trainable or any(re.search(pattern, name) for pattern in trainable)
        if not chosen or any(re.search(pattern, name) for pattern in frozen):
            p.requires_grad_(False)
    names = trained_names(model)
    if not names:
        raise UserError("train.frozen: no parameter is left to train", hint="frozen wins over trainable")
    require_found("unfreeze", unfreeze or {}, model)
    first_steps = {name: first_found(unfreeze, name, 0) for name in names}
    if min(first_steps.values()) > 0:
        hint = "give the value 0 to the parameters that are to train first"
        raise UserError(f"train.unfreeze: nothing trains before step {min(first_steps.values())}", hint=hint)
    return {name: step for name, step in first_steps.items() if step > 0}


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    learning_rates: dict[str, float] | None = None,
    weight_decays: dict[str, float] | None = None,
    lora_plus_ratio: float = 1.0,
) -> list[dict]:
    """The parameters that train, in groups of the same peak_lr and weight_decay. Matrices inside the layers ("matrices",
    for Muon) and embeddings ("embedding", for AdamW in 8 bits) have groups of their own.

    Matrices decay; norms and biases, which set scales and offsets, do not. learning_rates, weight_decays: {regular
    expression of a parameter's name: its own value}; the first that matches counts. lora_plus_ratio: the B of every
    adapter learns so many times as fast as its A (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    Raises UserError for an invalid regular expression, or one that matches no trainable parameter.
    """
    require_found("learning_rates", learning_rates or {}, model)
    require_found("weight_decays", weight_decays or {}, model)
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        rate = learning_rate * (lora_plus_ratio if name.endswith("lora_B") else 1.0)
        rate = first_found(learning_rates, name, rate)
        decay = first_found(weight_decays, name, weight_decay if p.ndim >= 2 else 0.0)
        kind = {"peak_lr": rate, "weight_decay": decay, "matrices": p.ndim == 2 and name.startswith("layers.")}
        kind["embedding"] = name.startswith("embed_")
        groups.setdefault(tuple(kind.values()), {"params": [], **kind})["params"].append(p)
    return list(groups.values())


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def first_found(patterns: dict | None, name: str, default: float) -> float:
    """The value of the first expression that matches the name."""
    return next((value for pattern, value in (patterns or {}).items() if re.search(pattern, name)), default)


def require_found(key: str, patterns: Iterable[str], model: nn.Module) -> None:
    """UserError where an expression of `train.<key>` is invalid, or matches no trainable parameter."""
    names = trained_names(model)
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UserError(f"train.{key}: {pattern!r} is not a regular expression: {error}") from error
        if not found:
            hint = near_names(pattern, names)
            if "lm_head" in pattern and not hasattr(model, "lm_head"):
                hint = "the head of this model is its embedding: embed_tokens.weight"
            raise UserError(f"train.{key}: {pattern!r} matches no parameter that trains", hint=hint)


def near_names(pattern: str, names: list[str]) -> str:
    """A few names whose parts are like the words of the pattern; or any."""
    parts = sorted({part for name in names for part in name.split(".")})
    near = [part for word in re.findall(r"[A-Za-z]\w+", pattern) for part in get_close_matches(word, parts, n=1)]
    like = [name for name in names if set(near) <= set(name.split("."))] or names
    return f"{'near' if near else 'some'} names: {', '.join([*like[:2], '...', like[-1]] if len(like) > 3 else like)}"


# ---- for the summary ----------------------------------------------------------------------------------------------


def describe_trained(weights: dict[str, nn.Parameter], unfreeze: dict[str, int], total_steps: int) -> list[str]:
    """A line for each kind of parameter: how many train, how many there are, their dtypes. Then one for each expression of
    `unfreeze`: how many tensors start at which step. weights: by name; some may be quantised."""
    table: dict[str, list] = {kind: [] for kind in (*PARAMETER_KINDS, "in all")}
    starting: dict[str, int] = dict.fromkeys(unfreeze, 0)
    for name, p in weights.items():
        table[next(kind for kind, pattern in PARAMETER_KINDS.items() if re.search(pattern, name))].append(p)
        table["in all"].append(p)
        if _trains(p) and (first := next((pattern for pattern in unfreeze if re.search(pattern, name)), None)):
            starting[first] += 1
    lines = []
    for kind, parameters in table.items():
        if parameters:
            size, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if _trains(p))
            dtypes = ", ".join(
                sorted({getattr(p, "quant_type", str(p.dtype).removeprefix("torch.")) for p in parameters})
            )
            lines.append(f"{kind:<12} {trained:>14,} of {size:>14,}  {trained / size:>6.1%}  {dtypes}")
    for pattern, step in unfreeze.items():
        late = f", after this run of {total_steps:,} steps" if step >= total_steps else ""
        lines.append(f"{pattern}: {starting[pattern]} tensors from step {step:,} on{late}")
    return lines


def _trains(weight: nn.Parameter) -> bool:
    return getattr(weight, "requires_grad", False)  # a quantised weight is not a parameter
