"""LoRA: train two thin matrices beside each frozen one.

For a linear layer y = W x with W [out, in] frozen, a low-rank adapter adds

    y = W x + s B A dropout(x)        A [r, in], B [out, r], s = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA)

A starts random and B at zero, so that the adapted model begins as the base. Only A and B have gradients and optimizer
state: with r = 16 that is half a percent of a 7B model, and what is saved is as small. DoRA also trains the length of each
row of the adapted matrix, m [out], apart from its direction:

    y = m (W x + s B A x) / ||W + s B A||        the norm of each row, a constant for the gradient

Sites and files are those of PEFT, so that adapters go both ways. Where a family's files stack several of our matrices into
one (Phi-3's qkv_proj), PEFT has one adapter for the stack. So have we: the parts share A, and each has its rows of B.

Papers: LoRA, Hu et al. 2021, arXiv:2106.09685. rsLoRA, Kalajdzievski 2023, arXiv:2312.03732. DoRA, Liu et al. 2024,
arXiv:2402.09353.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.errors import UserError
from minisft.model.decoder import Decoder
from minisft.model.tensor_names import Stored, stored_tensors

ALL_LINEAR = "all-linear"  # every linear layer but the head
INITIALISATIONS = ("kaiming", "gaussian")


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """What an adapter is; the names are PEFT's."""

    r: int
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0  # of the input of A
    target_modules: tuple[str, ...] | str = ALL_LINEAR  # ends of module names; or a regular expression of whole names
    layers_to_transform: tuple[int, ...] | None = None  # numbers of layers; None: all
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regular expression of a name's end -> its own r
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "kaiming"  # of A: uniform in +-1 / sqrt(in), or "gaussian": N(0, 1 / r^2)
    modules_to_save: tuple[str, ...] = ()  # trained whole, and saved with the adapter


class LoraLinear(nn.Module):
    """A linear layer with an adapter. weight [out, in] and bias are the base's own parameters, under their old names."""

    def __init__(self, base: nn.Linear, lora_A: nn.Parameter, scale: float, dropout: float, use_dora: bool):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout, self.enabled = scale, dropout, True
        self.lora_A = lora_A  # [r, in]; of a stack of layers, the same parameter in all of them
        zeros = torch.zeros(len(base.weight), len(lora_A), dtype=lora_A.dtype, device=lora_A.device)
        self.lora_B = nn.Parameter(zeros)  # [out, r]
        self.magnitude = nn.Parameter(base.weight.detach().to(lora_A.dtype).norm(dim=1)) if use_dora else None  # [out]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        if self.enabled:
            dropped = F.dropout(x, self.dropout, self.training)
            added = F.linear(F.linear(dropped, self.lora_A), self.lora_B) * self.scale
            if self.magnitude is None:
                y = y + added
            else:
                factor = (self.magnitude / self._row_norms()).to(y.dtype)
                base = y if dropped is x else F.linear(dropped, self.weight)
                y = y + (factor - 1) * base + factor * added
        return y if self.bias is None else y + self.bias

    def delta(self) -> Tensor:
        """s B A [out, in], in the dtype of the adapter."""
        return self.scale * (self.lora_B @ self.lora_A)

    def merged(self) -> Tensor:
        """The matrix [out, in] that does what weight and adapter do together, in the dtype of the adapter."""
        weight = self.weight.to(self.lora_A.dtype) + self.delta()
        return weight if self.magnitude is None else weight * (self.magnitude / weight.norm(dim=1))[:, None]

    def _row_norms(self) -> Tensor:
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            return (self.weight.to(self.lora_A.dtype) + self.delta()).norm(dim=1)


# ---- where adapters go --------------------------------------------------------------------------------------------


def adapter_sites(model: Decoder) -> dict[str, Stored]:
    """Name of a linear module in Hugging Face's files -> how its weight is made of ours. The head is not among them: the
    loss multiplies by its weight without a module."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | LoraLinear)]
    stored = stored_tensors(model.config, [f"{name}.weight" for name in linears if name != "lm_head"])
    return {name.removesuffix(".weight"): parts for name, parts in stored.items()}


def is_target(site: str, options: LoraOptions) -> bool:
    """Whether the module has an adapter, by PEFT's rules."""
    targets = options.target_modules
    if isinstance(targets, str):
        return targets == ALL_LINEAR or re.fullmatch(targets, site) is not None
    if not any(site == target or site.endswith(f".{target}") for target in targets):
        return False
    number = re.search(r"\.(\d+)\.", site)
    return options.layers_to_transform is None or (number is not None and int(number[1]) in options.layers_to_transform)


def of_pattern(patterns: dict, site: str, default: float) -> float:
    """The value of the first pattern that matches the end of the name."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", site)), default)


def scale_of(site: str, options: LoraOptions) -> tuple[int, float]:
    """(r, s) of a site."""
    r = int(of_pattern(options.rank_pattern, site, options.r))
    alpha = of_pattern(options.alpha_pattern, site, options.lora_alpha)
    return r, alpha / (math.sqrt(r) if options.use_rslora else r)


# ---- a model with adapters ----------------------------------------------------------------------------------------


def apply_lora(model: Decoder, options: LoraOptions, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[str]:
    """Freeze the model and put an adapter beside every linear layer that the options name.

    The adapters are `dtype`, on the device of their layers, A drawn from `seed` alone. Returns the names of the adapted
    modules, as in Hugging Face's files. Raises UserError where a name of target_modules, layers_to_transform or
    modules_to_save fits no module.
    """
    if options.init_lora_weights not in INITIALISATIONS:
        raise UserError(f"lora.init_lora_weights = {options.init_lora_weights!r}", hint=f"one of {INITIALISATIONS}")
    sites = adapter_sites(model)
    targets = [site for site in sites if is_target(site, options)]
    _refuse_names_without_module(model, list(sites), targets, options)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for site in targets:
        r, scale = scale_of(site, options)
        linears = [model.get_submodule(name.removesuffix(".weight")) for name in sites[site].names]
        first = linears[0].weight
        lora_A = nn.Parameter(_random(r, first.shape[1], options, generator).to(first.device, dtype))
        for name, linear in zip(sites[site].names, linears):
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            adapted = LoraLinear(linear, lora_A, scale, options.lora_dropout, options.use_dora)
            setattr(model.get_submodule(parent), child, adapted)
    for name in options.modules_to_save:
        module = model.get_submodule(name)
        module.requires_grad_(True)
        module.base = {key: p.detach().clone() for key, p in module.named_parameters()}  # for `adapter_disabled`
    model.lora = options
    return targets


def _random(r: int, size: int, options: LoraOptions, generator: torch.Generator) -> Tensor:
    if options.init_lora_weights == "gaussian":
        return torch.empty(r, size).normal_(0.0, 1.0 / r, generator=generator)
    return torch.empty(r, size).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(size)


def _refuse_names_without_module(model, sites: list[str], targets: list[str], options: LoraOptions) -> None:
    names = sorted({site.rpartition(".")[2] for site in sites})
    missing = []
    if not isinstance(options.target_modules, str):
        everywhere = replace(options, layers_to_transform=None)
        one = [replace(everywhere, target_modules=(target,)) for target in options.target_modules]
        missing = [o.target_modules[0] for o in one if not any(is_target(site, o) for site in sites)]
    if missing or not targets:
        raise UserError(
            f"lora.target_modules: no linear layer is named {', '.join(missing) or options.target_modules}"
            + (
                f" in layers {list(options.layers_to_transform)}" if options.layers_to_transform and not missing else ""
            ),
            hint=f'this model has {", ".join(names)}; or "{ALL_LINEAR}"',
        )
    modules = [name for name, _ in model.named_children() if any(True for _ in model.get_submodule(name).parameters())]
    if unknown := [name for name in options.modules_to_save if name not in modules or name == "layers"]:
        known = ", ".join(name for name in modules if name != "layers")
        raise UserError(
            f"lora.modules_to_save: no module is named {', '.join(unknown)}", hint=f"this model has {known}"
        )
    if model.config.tie_word_embeddings and "embed_tokens" in options.modules_to_save:
        raise UserError(
            "lora.modules_to_save: the embedding and the head of this model are one matrix",
            hint="an adapter file cannot say so; train it without modules_to_save, or fine-tune all weights",
        )


def adapters(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


@contextlib.contextmanager
def adapter_disabled(model: Decoder) -> Iterator[Decoder]:
    """The base model inside the block, bit for bit: adapters off, modules that are trained whole as they were."""
    saved = [model.get_submodule(name) for name in model.lora.modules_to_save]

    def swap(enabled: bool) -> None:
        for adapter in adapters(model):
            adapter.enabled = enabled
        for module in saved:
            for key, parameter in module.named_parameters():
                parameter.data, module.base[key] = module.base[key], parameter.data

    swap(False)
    try:
        yield model
    finally:
        swap(True)


def merge_adapter(model: Decoder) -> Decoder:
    """Replace every adapted layer by a plain one that does the same: W + s B A, added in the adapter's dtype and rounded
    once to that of W. In place; returns the model, without adapters, its parameters trainable again."""
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLinear):
                plain = nn.Linear(*module.weight.shape[::-1], bias=module.bias is not None, device="meta")
                plain.weight, plain.bias = module.weight, module.bias
                plain.weight.copy_(module.merged())
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, plain)
        for name in model.lora.modules_to_save:
            del model.get_submodule(name).base
    model.lora = None
    return model.requires_grad_(True)
