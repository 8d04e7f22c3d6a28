"""Parameter groups, building an optimizer (optimizers.py has the rules), gradients and updates, the loss scale of fp16."""

import contextlib
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minisft.errors import UserError
from minisft.optimizers import OPTIMIZERS, AdamW, ScheduleFreeAdamW

# ---- what trains, and how fast ------------------------------------------------------------------------------------


def build_optimizer(
    name: str,
    groups: list[dict],
    *,
    betas: tuple[float, float],
    eps: float,
    offload: bool = False,
    rounding_seed: int | None = None,
    **options: float,
) -> torch.optim.Optimizer:
    """An optimizer of OPTIMIZERS over groups of `parameter_groups`; options as there.

    offload and rounding_seed are those of `AdamW`, which also takes the place of torch's for them and for bf16 weights.
    """
    is_bf16 = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    if name == "adamw" and (offload or is_bf16):
        name = "adamw_minisft"
    make, defaults = OPTIMIZERS[name]
    for key, value in options.items():
        if key not in defaults or isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            known = ", ".join(f"{key} (from 0 to below 1)" for key in defaults) or "no options"
            raise UserError(f"train.optim_args: {key} = {value!r}", hint=f"{name} takes {known}")
    for group in groups:
        group["lr"] = group["peak_lr"]
    if offload or is_bf16:  # config/check.py allows these for the optimizers of ADAMW only
        options = {"offload": offload, "rounding_seed": rounding_seed}
    return make(groups, betas, eps, **(defaults | options))


@contextlib.contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block the parameters hold what is to be evaluated and exported; after it, bit for bit what they held."""
    if not isinstance(optimizer, ScheduleFreeAdamW):
        yield
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [p.data for p in params]
    for p in params:
        p.data = optimizer.mean_weights(p)
    try:
        yield
    finally:
        for p, data in zip(params, kept):
            p.data = data


# ---- gradients and updates -----------------------------------------------------------------------------------------


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def sum_gradients_in_fp32(params: Iterable[Tensor]) -> None:
    """The gradients of weights in bf16 are fp32 from now on, so that those of micro-batches and ranks add up in fp32."""
    for p in params:
        if p.dtype == torch.bfloat16:
            p.grad_dtype = torch.float32


def gradient_norms(grads: list[Tensor]) -> list[Tensor]:
    """The norm of each, in fp32 (fp64 of fp64)."""
    return list(torch._foreach_norm(grads, 2, torch.promote_types(grads[0].dtype, torch.float32))) if grads else []


def clip_and_update(
    optimizer: torch.optim.Optimizer, grads: list[Tensor], norm: Tensor, max_norm: float | None
) -> None:
    """Scale all gradients by min(1, max_norm / norm), then update. max_norm None or 0: leave them.

    `AdamW` reads the factor on the device, where it reads the gradients; for all others they are scaled in place.
    """
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm else torch.ones_like(norm)
    if isinstance(optimizer, AdamW):
        optimizer.step(clip=factor)
        return
    if max_norm and factor < 1.0:
        torch._foreach_mul_(grads, factor)
    optimizer.step()


@contextlib.contextmanager
def update_in_backward(
    optimizer: torch.optim.Optimizer, measured: Set[Tensor]
) -> Iterator[tuple[dict[Tensor, Tensor], list[Tensor]]]:
    """Inside the block a backward pass updates every parameter as soon as its gradient is complete, and frees the gradient.

    At no time do the gradients stand in memory together. Nothing that needs all of them can come before the update: no
    clipping by their norm, no refusal of a step that is not finite. Yields the norm of each parameter's gradient, and the
    `zero_updates` of those that are measured; both fill as the backward pass goes. Lv et al. 2023, arXiv 2306.09782.
    """
    norms: dict[Tensor, Tensor] = {}
    zeros: list[Tensor] = []

    def update(p: Tensor, group: dict) -> None:
        norms[p] = gradient_norms([p.grad])[0]
        before = copies(measured & {p})
        everything, optimizer.param_groups = optimizer.param_groups, [group | {"params": [p]}]
        optimizer.step()
        optimizer.param_groups = everything
        zeros.extend(zero_updates(before))
        p.grad = None

    hooks = [
        p.register_post_accumulate_grad_hook(partial(update, group=group))
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    ]
    try:
        yield norms, zeros
    finally:
        for hook in hooks:
            hook.remove()


def copies(params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(parameter, a copy of it), of those that have a gradient."""
    return [(p, p.detach().clone()) for p in params if p.grad is not None]


def zero_updates(before: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """For each parameter, after its update: int64 (numbers with a gradient that are what they were, numbers with a gradient).

    In bf16 an update below 1/512 of a weight rounds to nothing, and training stands still where most do.
    """
    return [torch.stack([((p == old) & (p.grad != 0)).sum(), (p.grad != 0).sum()]) for p, old in before]


@dataclass
class LossScale:
    """fp16's dynamic loss scale (Micikevicius et al. 2018, arXiv 1710.03740).

    Gradients below 2^-24 vanish in fp16, so the loss is multiplied by a large scale that is divided out before the
    update. An overflow halves the scale and skips the step; `growth_interval` good steps in a row double it.
    """

    scale: float = 2.0**16
    growth_interval: int = 2000
    good_steps: int = 0

    def update(self, overflow: bool) -> None:
        if overflow:
            self.scale, self.good_steps = self.scale / 2, 0
        else:
            self.good_steps += 1
            if self.good_steps == self.growth_interval:
                self.scale, self.good_steps = self.scale * 2, 0
