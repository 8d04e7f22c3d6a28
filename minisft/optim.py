"""Parameter groups, the optimizer, clipping, and the loss scale of fp16."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices decay; norms and biases, which set scales and offsets, do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), fused: one pass over weights, gradients and moments.

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr * (wd w + m^ / (sqrt(v^) + eps)), with m^ and v^ divided by
    1 - b^t.
    """
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def clip_gradients(grads: list[Tensor], norm: Tensor, max_norm: float | None) -> None:
    """Scale all gradients by min(1, max_norm / norm), in place. max_norm None or 0: leave them."""
    if max_norm:
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if factor < 1.0:
            torch._foreach_mul_(grads, factor)


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
