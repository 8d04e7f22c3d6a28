"""Parameter groups, the optimizers sorted by complexity, clipping, and the loss scale of fp16.

Every optimizer is a torch.optim.Optimizer: groups of parameters with their learning rates, and a state of tensors, which
checkpoints keep bit for bit. g is the gradient, w the weight, wd the weight decay; all decay is decoupled, w -= lr wd w
(Loshchilov & Hutter 2019, arXiv 1711.05101). The schedule sets group["lr"] before every step.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minisft.errors import UserError

# ---- what trains, and how fast ------------------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    learning_rates: dict[str, float] | None = None,
    weight_decays: dict[str, float] | None = None,
    lora_plus_ratio: float = 1.0,
) -> list[dict]:
    """The parameters that train, those with the same peak_lr and weight_decay together; matrices inside the layers apart
    from embeddings, head and vectors ("matrices", for Muon).

    Matrices decay; norms and biases, which set scales and offsets, do not. learning_rates, weight_decays: regular
    expression of a parameter's name -> its own value; the first that is found in the name counts. lora_plus_ratio: the
    B of every adapter learns so many times as fast as its A (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    Raises UserError for an expression that is none, or is found in no name.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for key, patterns in (("learning_rates", learning_rates), ("weight_decays", weight_decays)):
        for pattern in patterns or {}:
            try:
                found = any(re.search(pattern, name) for name in names)
            except re.error as error:
                raise UserError(f"train.{key}: {pattern!r} is not a regular expression: {error}") from error
            if not found:
                hint = f"some names: {', '.join(names[:3])}, ..., {names[-1]}"
                raise UserError(f"train.{key}: {pattern!r} is found in no parameter that trains", hint=hint)
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        rate = learning_rate * (lora_plus_ratio if name.endswith("lora_B") else 1.0)
        rate = _of(learning_rates, name, rate)
        decay = _of(weight_decays, name, weight_decay if p.ndim >= 2 else 0.0)
        kind = {"peak_lr": rate, "weight_decay": decay, "matrices": p.ndim == 2 and name.startswith("layers.")}
        groups.setdefault(tuple(kind.values()), {"params": [], **kind})["params"].append(p)
    return list(groups.values())


def _of(patterns: dict[str, float] | None, name: str, default: float) -> float:
    return next((value for pattern, value in (patterns or {}).items() if re.search(pattern, name)), default)


def build_optimizer(
    name: str, groups: list[dict], *, betas: tuple[float, float], eps: float, **options: float
) -> torch.optim.Optimizer:
    """An optimizer of OPTIMIZERS over groups of `parameter_groups`; options as there."""
    make, defaults = OPTIMIZERS[name]
    for key, value in options.items():
        if key not in defaults or isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            known = ", ".join(f"{key} (from 0 to below 1)" for key in defaults) or "no options"
            raise UserError(f"train.optim_args: {key} = {value!r}", hint=f"{name} takes {known}")
    for group in groups:
        group["lr"] = group["peak_lr"]
    return make(groups, betas, eps, **(defaults | options))


# ---- optimizers ---------------------------------------------------------------------------------------------------


class SGD(torch.optim.Optimizer):
    """m = momentum m + g; w -= lr (m + wd w). One state tensor, none without momentum."""

    def __init__(self, groups: list[dict], momentum: float):
        super().__init__(groups, {"momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group, _, params, grads in _trained(self):
            if group["momentum"]:
                m = _state(self, params, "momentum")
                torch._foreach_mul_(m, group["momentum"])
                torch._foreach_add_(m, grads)
                grads = m
            _decay(group, params)
            torch._foreach_add_(params, grads, alpha=-group["lr"])


class Lion(torch.optim.Optimizer):
    """u = sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g; w -= lr (u + wd w).

    Every weight moves by lr, whatever its gradient: a third to a tenth of AdamW's learning rate is usual, and betas of
    0.9 and 0.99. One state tensor. Chen et al. 2023, arXiv 2302.06675.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float]):
        super().__init__(groups, {"betas": betas})

    @torch.no_grad()
    def step(self) -> None:
        for group, _, params, grads in _trained(self):
            (b1, b2), m = group["betas"], _state(self, params, "exp_avg")
            update = torch._foreach_mul(m, b1)
            torch._foreach_add_(update, grads, alpha=1 - b1)
            torch._foreach_sign_(update)
            torch._foreach_lerp_(m, grads, 1 - b2)
            _decay(group, params)
            torch._foreach_add_(params, update, alpha=-group["lr"])


def adamw(groups: list[dict], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr (m^ / (sqrt(v^) + eps) + wd w), with m^ and v^ divided by
    1 - b^t. torch's fused form: one pass over weights, gradients and moments. Kingma & Ba 2015, arXiv 1412.6980."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


class StableAdamW(torch.optim.Optimizer):
    """AdamW that slows down a tensor whose gradients v does not expect: with r = rms(g / max(sqrt(v), eps)),

        w -= lr / max(1, r) * m / (sqrt(v) + eps) + lr wd w

    Instead of dividing the moments by 1 - b^t, the betas start at 0: b(t) = b (1 - b^(t-1)) / (1 - b^t), which is the
    same. Takes the place of clipping the gradient's norm. Wortsman et al. 2023, arXiv 2304.13013.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group, t, params, grads in _trained(self):
            eps = group["eps"]
            b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in group["betas"])
            m, v = _state(self, params, "exp_avg"), _state(self, params, "exp_avg_sq")
            torch._foreach_lerp_(m, grads, 1 - b1)
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, grads, grads, 1 - b2)
            _decay(group, params)
            for w, g, mean, square in zip(params, grads, m, v):
                r = (g.square() / square.clamp(min=eps**2)).mean().sqrt()
                w -= (group["lr"] / r.clamp(min=1.0)) * mean / (square.sqrt() + eps)


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """AdamW without a schedule: the gradient is taken at y, between the AdamW iterate z and its running mean x:

        y = b1 x + (1 - b1) z        z -= lr (g^ + wd y)        x = (1 - c) x + c z,   c = lr_t^2 / sum of lr^2

    with g^ = g / (sqrt(v^) + eps). The parameters hold y while training; evaluation and export want x, which
    `evaluation_weights` puts in their place. Needs a constant learning rate (after a warm-up), about that of AdamW or
    higher. Two state tensors, as AdamW. Defazio et al. 2024, arXiv 2405.15682.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group, t, params, grads in _trained(self):
            (b1, b2), lr = group["betas"], group["lr"]
            z, v = _state(self, params, "z", torch.clone), _state(self, params, "exp_avg_sq")
            sums = _state(self, params, "weight_sum", lambda p: torch.zeros((), dtype=torch.float64))
            torch._foreach_add_(sums, lr**2)
            c = lr**2 / max(sums[0].item(), 1e-30)  # on the CPU, which knows it
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, grads, grads, 1 - b2)
            scale = torch._foreach_sqrt(v)
            torch._foreach_div_(scale, math.sqrt(1 - b2**t))
            torch._foreach_add_(scale, group["eps"])
            update = torch._foreach_div(grads, scale)
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
            # y = b1 x + (1 - b1) z with the new x and z, written in terms of the old y
            torch._foreach_lerp_(params, z, c)
            torch._foreach_add_(params, update, alpha=lr * (b1 * (1 - c) - 1))
            torch._foreach_add_(z, update, alpha=-lr)

    def mean_weights(self, p: Tensor) -> Tensor:
        """x of the parameter, of which y and z are known."""
        z = self.state[p].get("z")
        return p.data if z is None else p.data.lerp(z, 1 - 1 / self.defaults["betas"][0])


def adafactor(groups: list[dict], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """v of a matrix is kept as the outer product of its row and column means, so that the state is a vector or two; no m.
    Updates are clipped to an rms of 1 and scaled by max(1e-3, rms(w)). Shazeer & Stern 2018, arXiv 1804.04235; torch's
    own. With that scale a learning rate of 1e-2 is usual."""
    return torch.optim.Adafactor(groups)


class Muon(torch.optim.Optimizer):
    """For the matrices inside the layers: momentum, then the nearest orthogonal matrix, so that every direction of the
    update is as long as every other:

        m = momentum m + g        u = g + momentum m        w -= lr (0.2 sqrt(max(rows, columns)) orthogonal(u) + wd w)

    The factor gives updates of the size of AdamW's, so its learning rates serve. Embeddings, head, norms and biases take
    AdamW. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the factor from Liu et al. 2025, arXiv 2502.16982.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, momentum: float):
        super().__init__(groups, {"betas": betas, "eps": eps, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group, t, params, grads in _trained(self):
            if not group["matrices"]:
                self._adamw(group, t, params, grads)
                continue
            m = _state(self, params, "momentum")
            torch._foreach_mul_(m, group["momentum"])
            torch._foreach_add_(m, grads)
            update = torch._foreach_add(grads, m, alpha=group["momentum"])
            _decay(group, params)
            for w, u in zip(params, update):
                w.add_(orthogonal(u), alpha=-group["lr"] * 0.2 * math.sqrt(max(w.shape)))

    def _adamw(self, group: dict, t: int, params: list[Tensor], grads: list[Tensor]) -> None:
        b1, b2 = group["betas"]
        m, v = _state(self, params, "exp_avg"), _state(self, params, "exp_avg_sq")
        torch._foreach_lerp_(m, grads, 1 - b1)
        torch._foreach_mul_(v, b2)
        torch._foreach_addcmul_(v, grads, grads, 1 - b2)
        scale = torch._foreach_sqrt(v)
        torch._foreach_div_(scale, math.sqrt(1 - b2**t))
        torch._foreach_add_(scale, group["eps"])
        _decay(group, params)
        torch._foreach_addcdiv_(params, m, scale, -group["lr"] / (1 - b1**t))


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """About the nearest matrix with orthogonal rows or columns: its singular values become 0.7 to 1.2.

    Newton-Schulz with a quintic polynomial that is steep at 0, in bf16, where a product is exact enough for a direction.
    """
    y = (x / (x.norm() + 1e-7)).bfloat16()
    y = y.T if len(y) > y.shape[1] else y
    for _ in range(steps):
        gram = y @ y.T
        y = 3.4445 * y + (-4.7750 * gram + 2.0315 * gram @ gram) @ y
    return (y.T if len(x) > x.shape[1] else y).to(x.dtype)


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, int, list[Tensor], list[Tensor]]]:
    """(group, t, its parameters with a gradient, their gradients), where t = 1 at a parameter's first update. Those that
    began to train later have an earlier t and come apart."""
    for group in optimizer.param_groups:
        by_step: dict[int, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                step = optimizer.state[p].setdefault("step", torch.zeros(()))
                step += 1
                by_step.setdefault(int(step), []).append(p)
        for t, params in by_step.items():
            yield group, t, params, [p.grad for p in params]


def _state(
    optimizer: torch.optim.Optimizer,
    params: list[Tensor],
    key: str,
    first: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> list[Tensor]:
    """One state tensor of each parameter, `first` of the parameter at its first update."""
    states = [optimizer.state[p] for p in params]
    for p, state in zip(params, states):
        if key not in state:
            state[key] = first(p.detach())
    return [state[key] for state in states]


def _decay(group: dict, params: list[Tensor]) -> None:
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])


# name -> (makes the optimizer from groups, betas, eps and options; options with their defaults)
OPTIMIZERS: dict[str, tuple[Callable, dict]] = {
    "sgd": (lambda groups, betas, eps, **options: SGD(groups, **options), {"momentum": 0.0}),
    "lion": (lambda groups, betas, eps: Lion(groups, betas), {}),
    "adamw": (adamw, {}),
    "stable_adamw": (StableAdamW, {}),
    "schedule_free_adamw": (ScheduleFreeAdamW, {}),
    "adafactor": (adafactor, {}),
    "muon": (Muon, {"momentum": 0.95}),
}


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


# ---- gradients ----------------------------------------------------------------------------------------------------


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
