"""LoRA: train two thin matrices beside each frozen one.

For a linear layer y = W x with W [out, in] frozen, a low-rank adapter adds

    y = W x + s B A dropout(x)        A [r, in], B [out, r], s = lora_alpha / r, or lora_alpha / sqrt(r) (rsLoRA)

A starts random and B at zero, so that the adapted model begins as the base. Only A and B have gradients and optimizer
state: with r = 16 that is half a percent of a 7B model, and the saved files are as small. DoRA also trains the length of each
row of the adapted matrix, m [out], apart from its direction:

    y = m (W x + s B A x) / ||W + s B A||        the norm of each row, a constant for the gradient

PiSSA starts A and B from the r largest singular directions of W, each scaled by the root of its singular value. The product
of these initial values, A0 and B0, is subtracted, so that the model begins as the base. W itself stays as it is here:

    y = W x + s (B A - B0 A0) x        which is an adapter of rank 2 r, and is saved as one

The adapted modules ("sites") and the files are PEFT's, so that PEFT and we read each other's adapters. Where a family's files
stack several of our matrices into one (Phi-3's qkv_proj), PEFT has one adapter for the stack. So do we: the parts share A,
and each has its rows of B.

Papers: LoRA, Hu et al. 2021, arXiv:2106.09685. rsLoRA, Kalajdzievski 2023, arXiv:2312.03732. DoRA, Liu et al. 2024,
arXiv:2402.09353. PiSSA, Meng et al. 2024, arXiv:2404.02948.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisft.errors import UserError
from minisft.kernels.lora import Adapter, Layer, lora_linears
from minisft.model.decoder import Decoder
from minisft.model.lora_options import INITS, LoraOptions, is_target, refuse_targets_without_layer, scale_of
from minisft.model.quantized import QuantLinear, QuantWeight, dense, linear, named_weights
from minisft.model.shards import whole
from minisft.model.tensor_names import Stored, stored_tensors
from minisft.model.token_rows import TokenRows


class LoraLinear(nn.Module):
    """A linear layer with an adapter. weight [out, in] and bias are the base's own, under their old names; the weight may
    be quantised."""

    start_A: Tensor | None  # PiSSA's A0 [r, in] and B0 [out, r]
    start_B: Tensor | None

    def __init__(self, base: nn.Linear | QuantLinear, lora_A: nn.Parameter, scale: float, options: LoraOptions):
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout, self.enabled = scale, options.lora_dropout, True
        self.lora_A = lora_A  # [r, in]; one parameter for all layers that the files stack into one
        num_rows = base.weight.shape[0]
        self.lora_B = nn.Parameter(lora_A.new_empty(num_rows, len(lora_A)))  # [out, r]
        self.magnitude = nn.Parameter(lora_A.new_empty(num_rows)) if options.use_dora else None  # [out]
        self.register_buffer("start_A", torch.empty_like(lora_A) if options.is_pissa else None)
        self.register_buffer("start_B", torch.empty_like(self.lora_B) if options.is_pissa else None)

    @torch.no_grad()
    def start(self) -> None:
        """The values that leave the base as it is, if A has some."""
        self.lora_B.zero_()
        if self.magnitude is not None:
            self.magnitude.copy_(dense(self.weight, self.lora_A.dtype).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x, [self])[0]

    @staticmethod
    def together(x: Tensor, modules: Sequence[nn.Module]) -> list[Tensor]:
        """The results of layers with the same input, some of which have adapters: of one op, where it can be one."""
        adapted = {i: m for i, m in enumerate(modules) if isinstance(m, LoraLinear) and m.enabled}
        if not adapted or any(map(_needs_formula, modules)):
            return [m._by_formula(x) if i in adapted else linear(x, m.weight, m.bias) for i, m in enumerate(modules)]
        layers, adapters = list(map(_layer, modules)), [m._adapter(i) for i, m in adapted.items()]
        ys = lora_linears(x, layers, adapters, dropped=_dropped(x, adapted.values()))
        return [adapted[i]._turned(y) if i in adapted else y for i, y in enumerate(ys)]

    def adds_to(self, total: Tensor, x: Tensor) -> bool:
        """Add the result to the residual stream [T, out] in place; False: it cannot, and has not."""
        if not self.enabled or self.magnitude is not None or self.bias is not None or _needs_formula(self):
            return False
        lora_linears(x, [_layer(self)], [self._adapter(0)], dropped=_dropped(x, [self]), total=total)
        return True

    def _by_formula(self, x: Tensor) -> Tensor:
        y = base = linear(x, self.weight)
        dropped = F.dropout(x, self.dropout, self.training)
        added = linear(linear(dropped, self.lora_A), self.lora_B)
        if self.start_A is not None and self.start_B is not None:
            added = added - linear(linear(dropped, self.start_A), self.start_B)
        added = added * self.scale
        if self.magnitude is not None:
            factor = (self.magnitude / self._row_norms()).to(y.dtype)
            base = base if dropped is x else linear(dropped, self.weight)
            y, added = y + (factor - 1) * base, factor * added
        y = y + added
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _adapter(self, layer: int) -> Adapter:
        return Adapter(layer, self.lora_A, self.lora_B, self.scale)

    def _turned(self, y: Tensor) -> Tensor:
        """DoRA: y = W x + s B A x by rows of the trained lengths, and the bias."""
        if self.magnitude is None:
            return y
        y = y * (self.magnitude / self._row_norms()).to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def delta(self) -> Tensor:
        """s B A [out, in], for PiSSA s (B A - B0 A0), in the dtype of the adapter."""
        A, B = self.factors()
        return self.scale * (B @ A)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the equivalent plain adapter. PiSSA's have rank 2 r: A over A0, and B beside -B0."""
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)

    def set_factors(self, A: Tensor, B: Tensor) -> None:
        """Take A and B in the form that `factors` returns."""
        r = len(self.lora_A)
        with torch.no_grad():
            self.lora_A.copy_(A[:r])
            self.lora_B.copy_(B[:, :r])
            if self.start_A is not None and self.start_B is not None:
                self.start_A.copy_(A[r:])
                self.start_B.copy_(-B[:, r:])

    def merged(self) -> Tensor:
        """The matrix [out, in] that does the work of weight and adapter together, in the dtype of the adapter."""
        weight = dense(self.weight, self.lora_A.dtype) + self.delta()
        return weight if self.magnitude is None else weight * (self.magnitude / weight.norm(dim=1))[:, None]

    def _row_norms(self) -> Tensor:
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            return (dense(self.weight, self.lora_A.dtype) + self.delta()).norm(dim=1)


def _layer(module: nn.Module) -> Layer:
    """The frozen layer under an adapter. DoRA's bias comes after it."""
    weight = module.weight if isinstance(module.weight, Tensor) else module.weight.dequantize
    return weight, None if getattr(module, "magnitude", None) is not None else module.bias


def _dropped(x: Tensor, modules: Iterable[LoraLinear]) -> list[Tensor]:
    """What each different A reads in the place of x, if it does."""
    dropouts = {m.lora_A: m.dropout for m in modules if m.training and m.dropout > 0}
    return [F.dropout(x, dropout) for dropout in dropouts.values()]


def _needs_formula(module: nn.Module) -> bool:
    """Whether W trains too; PiSSA's two products must cancel to the last bit at the start, before they add to W x; or DoRA's
    adapter reads other numbers than x."""
    if any(isinstance(p, Tensor) and p.requires_grad for p in (module.weight, module.bias)):
        return True
    drops_in_dora = (
        isinstance(module, LoraLinear) and module.magnitude is not None and module.training and module.dropout > 0
    )
    return drops_in_dora or getattr(module, "start_A", None) is not None


# ---- where adapters go --------------------------------------------------------------------------------------------


def adapter_sites(model: Decoder) -> dict[str, Stored]:
    """Name of a linear module in Hugging Face's files -> how its weight is made of ours. The head is not among them, because
    the loss reads its weight and never calls the module."""
    kinds = nn.Linear | QuantLinear | LoraLinear
    linears = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    stored = stored_tensors(model.config, [f"{name}.weight" for name in linears if name != "lm_head"])
    return {name.removesuffix(".weight"): parts for name, parts in stored.items()}


# ---- a model with adapters ----------------------------------------------------------------------------------------


def apply_lora(model: Decoder, options: LoraOptions, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[str]:
    """Freeze the model and put an adapter beside every linear layer that the options name: `place_adapters` and
    `start_adapters`, whose arguments, result and errors are theirs."""
    targets = place_adapters(model, options, dtype)
    start_adapters(model, seed=seed)
    return targets


def place_adapters(model: Decoder, options: LoraOptions, dtype: torch.dtype = torch.float32) -> list[str]:
    """Freeze the model and put adapters without values beside its layers, which may be on the meta device.

    The adapters are in `dtype`, on the device of their layers. Returns the names of the adapted modules, as in Hugging Face's
    files. Raises UserError if a name in target_modules, layers_to_transform or modules_to_save matches no module.
    """
    if options.init_lora_weights not in INITS:
        raise UserError(f"lora.init_lora_weights = {options.init_lora_weights!r}", hint=f"one of {INITS}")
    sites = adapter_sites(model)
    targets = [site for site in sites if is_target(site, options)]
    _refuse_names_without_module(model, list(sites), options)
    model.requires_grad_(False)
    for site in targets:
        r, scale = scale_of(site, options)
        linears = [model.get_submodule(name.removesuffix(".weight")) for name in sites[site].names]
        first = linears[0].weight
        lora_A = nn.Parameter(torch.empty(r, first.shape[1], dtype=dtype, device=first.device))
        for name, layer in zip(sites[site].names, linears):
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            setattr(model.get_submodule(parent), child, LoraLinear(layer, lora_A, scale, options))
    for name, ids in options.trainable_token_indices.items():
        setattr(model, name, TokenRows(model.get_submodule(name), ids, dtype))
    for name in options.modules_to_save:
        model.get_submodule(name).requires_grad_(True)
    model.lora = options
    return targets


@torch.no_grad()
def start_adapters(model: Decoder, *, seed: int = 0, decomposes: bool = True) -> None:
    """Give the adapters of `place_adapters` their first values, with which the model computes what its base does.

    A is drawn from `seed` alone. decomposes: False leaves PiSSA's starts to be copied from another rank's model. Where the
    matrices are sharded, all ranks call it together.
    """
    options, generator = adapter_options(model), torch.Generator().manual_seed(seed)
    for site, stored in adapter_sites(model).items():
        if not is_target(site, options):
            continue
        parts = [model.get_submodule(name.removesuffix(".weight")) for name in stored.names]
        parts[0].lora_A.copy_(_random(*parts[0].lora_A.shape, options, generator))
        for part in parts:
            part.start()
        if options.is_pissa:
            weight = torch.cat([dense(part.weight, torch.float32) for part in parts])
            if decomposes:
                _start_at_singular_vectors(parts, weight, options, seed)
            for part in parts:
                part.start_A.copy_(part.lora_A)
                part.start_B.copy_(part.lora_B)
    for name in options.trainable_token_indices:
        model.get_submodule(name).start()
    for name in options.modules_to_save:
        module = model.get_submodule(name)
        module.base = {key: p.detach().clone() for key, p in module.named_parameters()}  # for `adapter_disabled`


def _random(r: int, size: int, options: LoraOptions, generator: torch.Generator) -> Tensor:
    if options.init_lora_weights == "gaussian":
        return torch.empty(r, size).normal_(0.0, 1.0 / r, generator=generator)
    return torch.empty(r, size).uniform_(-1.0, 1.0, generator=generator) / math.sqrt(size)


def _start_at_singular_vectors(parts: list[LoraLinear], weight: Tensor, options: LoraOptions, seed: int) -> None:
    """A = sqrt(S / s) V^T and B = U sqrt(S / s) of the r largest singular values of the stacked matrices, weight fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the approximate decomposition begins with random directions
        r = len(parts[0].lora_A)
        if r > min(weight.shape):
            problem = f"lora.init_lora_weights = {options.init_lora_weights!r}: r = {r}, but a matrix is {tuple(weight.shape)}"
            raise UserError(problem, hint="lower r, or set another one for such matrices in lora.rank_pattern")
        if options.init_lora_weights == "pissa":
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(weight, q=r, niter=int(options.init_lora_weights.rpartition("_")[2]))
            Vh = V.T
        root = (S[:r] / parts[0].scale).sqrt()
        parts[0].lora_A.copy_(root[:, None] * Vh[:r])
        for part, B in zip(parts, (U[:, :r] * root).split([part.weight.shape[0] for part in parts])):
            part.lora_B.copy_(B)


def _refuse_names_without_module(model: Decoder, sites: list[str], options: LoraOptions) -> None:
    refuse_targets_without_layer(sites, options)
    modules = [name for name, _ in model.named_children() if any(True for _ in model.get_submodule(name).parameters())]
    if unknown := [name for name in options.modules_to_save if name not in modules or name == "layers"]:
        known = ", ".join(name for name in modules if name != "layers")
        raise UserError(
            f"lora.modules_to_save: no module is named {', '.join(unknown)}", hint=f"this model has {known}"
        )
    for name, ids in options.trainable_token_indices.items():
        if name not in ("embed_tokens", "lm_head") or name not in modules or name in options.modules_to_save:
            problem = f"lora.trainable_token_indices: {name} is no module of this model with rows of its own to train"
            raise UserError(problem, hint="remove it from this key or from modules_to_save")
        if not ids or not all(0 <= i < model.config.vocab_size for i in ids) or len(set(ids)) < len(ids):
            problem = f"lora.trainable_token_indices: {list(ids)} for {model.config.vocab_size} rows"
            raise UserError(problem, hint="give each id of a token once")
    if model.config.tie_word_embeddings and "embed_tokens" in options.modules_to_save:
        raise UserError(
            "lora.modules_to_save: the embedding and the head of this model are one matrix",
            hint="an adapter file cannot say so; train it without modules_to_save, or fine-tune all weights",
        )


def adapter_options(model: Decoder) -> LoraOptions:
    """The options of the adapter that the model has."""
    assert model.lora is not None, "the model has no adapter"
    return model.lora


def base_weights(model: Decoder) -> dict[str, nn.Parameter | QuantWeight]:
    """The parameters and the quantised matrices without the parameters of an adapter: those that the base's files have."""
    added = {
        p for a in adapters(model) for key, p in a.named_parameters(recurse=False) if key not in ("weight", "bias")
    }
    return {name: weight for name, weight in named_weights(model).items() if weight not in added}


def adapters(model: Decoder) -> list[LoraLinear | TokenRows]:
    """All modules of the adapter, which `enabled` switches on and off."""
    return [module for module in model.modules() if isinstance(module, LoraLinear | TokenRows)]


@contextlib.contextmanager
def adapter_disabled(model: Decoder) -> Iterator[Decoder]:
    """Inside the block the model is the base, bit for bit: adapters off, modules trained whole at their old values."""
    saved = [model.get_submodule(name) for name in adapter_options(model).modules_to_save]

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


def changed_by_merge(model: Decoder) -> list[str]:
    """The names of the modules whose weights `merge_adapter` changes."""
    options, kinds = adapter_options(model), LoraLinear | QuantLinear
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [*layers, *options.modules_to_save, *options.trainable_token_indices]


def merged_weight(model: Decoder, name: str) -> Tensor | None:
    """A weight by its name, whole and without the adapter, as `merge_adapter` makes it; None where neither an adapter nor
    quantisation changes it. All processes call it where the matrices are sharded."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf != "weight":
        return None
    with torch.no_grad():
        if isinstance(module, LoraLinear):
            return module.merged()
        if isinstance(module, QuantLinear):
            return dense(module.weight, model.embed_tokens.weight.dtype)
        if isinstance(module, TokenRows):
            weight = whole(module.weight)
            ids = torch.tensor(module.ids, device=weight.device)
            return weight.index_copy(0, ids, module.rows.to(weight.dtype))
    return None


def merge_adapter(model: Decoder) -> Decoder:
    """Replace every adapted layer, in place, by a plain one that does the same: W + s B A, added in the adapter's dtype and
    rounded once to that of W. A quantised W is dequantised, as it was in training, and the sum is kept in the dtype of the
    head; quantised layers without an adapter become plain too. Returns the model, without adapters, its parameters trainable."""
    options = adapter_options(model)
    with torch.no_grad():
        for name, module in list(model.named_modules()):
            if isinstance(module, LoraLinear | QuantLinear):
                weight, dtype = module.weight, model.head_weight.dtype
                merged = module.merged() if isinstance(module, LoraLinear) else dense(weight, dtype)
                plain = nn.Linear(*weight.shape[::-1], bias=module.bias is not None, device="meta")
                plain.weight = nn.Parameter(merged.to(dtype)) if isinstance(weight, QuantWeight) else weight
                plain.weight.copy_(merged)
                plain.bias = module.bias
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, plain)
        for name in options.modules_to_save:
            del model.get_submodule(name).base
        for name in options.trainable_token_indices:
            setattr(model, name, model.get_submodule(name).merged())
    model.lora = None
    return model.requires_grad_(True)
