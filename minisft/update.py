"""From the gradients of a step to its update: norms, clipping, updates in the backward pass, the loss scale of fp16."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.metrics import Metrics
from minisft.optimizers import AdamW
from minisft.runtime import read_back


def by_device(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors of each device: rows of sharded weights may be in the memory of the CPU (parallel.cpu_offload)."""
    found: dict[torch.device, list[Tensor]] = {}
    for x in tensors:
        found.setdefault(x.device, []).append(x)
    return list(found.values())


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def make_gradients(model: nn.Module) -> None:
    """Zeros as the gradient of every parameter that trains and has none, so that each micro-batch adds to it in place."""
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p, dtype=p.grad_dtype or p.dtype)


def unscale(grads: list[Tensor], scale: float) -> None:
    """Divide the gradients, in place, by the loss scale that they were computed with."""
    if scale != 1.0:
        torch._foreach_mul_(grads, 1.0 / scale)


def sum_gradients_in_fp32(params: Iterable[Tensor]) -> None:
    """Make the gradients of bf16 weights fp32, so that micro-batches and ranks add up in fp32."""
    for p in params:
        if p.dtype == torch.bfloat16:
            p.grad_dtype = torch.float32


def gradient_norms(grads: list[Tensor]) -> list[Tensor]:
    """The norm of each gradient, in fp32 (fp64 for fp64)."""
    return list(torch._foreach_norm(grads, 2, torch.promote_types(grads[0].dtype, torch.float32))) if grads else []


def is_accepted(sums: Tensor, limits: Sequence[float] | None = None) -> Tensor:
    """Whether a step may update the weights, bool [] where `sums` is: both are finite. With limits, neither is above its own, and
    there is a gradient, unless the loss is 0 too (spikes.py).

    sums: fp32 [2], the loss of the step and the norm of its gradient, each summed over the ranks.
    """
    is_finite, (loss, norm) = torch.isfinite(sums.sum()), sums
    if limits is None:
        return is_finite
    return is_finite & (loss <= limits[0]) & (norm <= limits[1]) & ((norm > 0) | (loss <= 0))


def clip_and_update(
    optimizer: torch.optim.Optimizer,
    grads: list[Tensor],
    norm: Tensor,
    max_norm: float | None,
    sums: Tensor,
    limits: Sequence[float] | None = None,
) -> tuple[bool, Tensor]:
    """Scale all gradients by min(1, max_norm / norm), then update, if sums and limits allow it (`is_accepted`). Returns whether
    there was an update, and `sums` on the host. max_norm None or 0: no clipping.

    `AdamW` multiplies by the factor as it reads the gradients; for all other optimizers they are scaled in place.

    This is where the host waits for a GPU, once a step. `AdamW` finds out on the GPU that it is to change nothing, so its
    update is queued before the sums are here, and the GPU has work while the host goes on to the next step. For all other
    optimizers the host waits first.
    """
    arriving = read_back(sums)
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0) if max_norm else torch.ones_like(norm)
    if isinstance(optimizer, AdamW):
        optimizer.step(clip=factor.where(is_accepted(sums, limits), math.nan))
        here = arriving()
        if not is_accepted(here, limits):
            optimizer.take_back()
            return False, here
        return True, here
    here = arriving()
    if not is_accepted(here, limits):
        return False, here
    if max_norm:
        for those in by_device(grads):
            torch._foreach_mul_(those, factor.to(those[0].device))
    optimizer.step()
    return True, here


@contextlib.contextmanager
def only(optimizer: torch.optim.Optimizer, p: Tensor, group: dict) -> Iterator[None]:
    """Inside the block the optimizer has this parameter of the group alone."""
    everything, optimizer.param_groups = optimizer.param_groups, [group | {"params": [p]}]
    try:
        yield
    finally:
        optimizer.param_groups = everything


@contextlib.contextmanager
def update_in_backward(
    params: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    zero_updates: "ZeroUpdates",
    part_with_gradient: Callable[[Tensor], contextlib.AbstractContextManager[Tensor]] = contextlib.nullcontext,
) -> Iterator[dict[Tensor, Tensor]]:
    """Inside the block a backward pass updates each of `params` as soon as its gradient is complete, and frees the gradient.

    The gradients are never all in memory at once, so nothing that needs all of them can happen before an update: no
    clipping by their norm, no refusal of a non-finite step. Yields the norms of the gradients, by parameter of the optimizer,
    which are there after the block. Lv et al. 2023, arXiv 2306.09782.

    part_with_gradient(p): around its update, gives the parameter of the optimizer that stands for p and has its gradient.
    """
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    norm_of: dict[Tensor, Tensor] = {}

    def update(p: Tensor) -> None:
        with part_with_gradient(p) as part:
            norm_of[part] = gradient_norms([part.grad])[0]
            with only(optimizer, part, group_of[part]), zero_updates.counted({part}):
                optimizer.step()
            part.grad = None

    hooks = [p.register_post_accumulate_grad_hook(update) for p in params]
    try:
        yield norm_of
    finally:
        for hook in hooks:
            hook.remove()


class ZeroUpdates:
    """Counts the elements whose update left them as they were, for some parameters.

    In bf16 an update below 1/512 of a weight rounds to nothing, and training makes no progress where most updates do.
    """

    def __init__(self, params: Set[Tensor], share: Callable[[Tensor], float] = lambda p: 1.0):
        """share: of this rank in the counts of a parameter, where several ranks have the same one."""
        self.params, self.share = params, share
        self.counts: list[Tensor] = []  # fp64 (elements with a gradient that did not change, elements with a gradient)

    @contextlib.contextmanager
    def counted(self, updated: Set[Tensor] | None = None) -> Iterator[None]:
        """Count an update that happens inside the block. updated: the parameters that it concerns; None = all."""
        params = self.params if updated is None else self.params & updated
        before = [(p, p.detach().clone()) for p in params if p.grad is not None]
        yield
        for p, old in before:
            is_moved = p.grad != 0
            self.counts.append(torch.stack([((p == old) & is_moved).sum(), is_moved.sum()]).double() * self.share(p))

    def metrics(self) -> Metrics:
        """zero_update_fraction, the same name on all ranks; empty if nothing was counted. Waits for the device."""
        if not self.counts:
            return {}
        counts = [torch.stack(those).sum(0).cpu() for those in by_device(self.counts)]
        num_zeros, num_updates = torch.stack(counts).sum(0).tolist()
        return {"zero_update_fraction": (num_zeros, num_updates)}


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
