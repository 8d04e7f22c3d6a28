"""The optimizers, sorted by complexity, each with its update rule and its paper.

Every one is a torch.optim.Optimizer: groups of parameters with their learning rates, and a state of tensors, which
checkpoints keep bit for bit. g is the gradient, w the weight, wd the weight decay; all decay is decoupled, w -= lr wd w
(Loshchilov & Hutter 2019, arXiv 1711.05101). The loop sets group["lr"] before every step.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from minisft.config.choices import OPTIMIZERS, wrong_optimizer_option
from minisft.errors import UserError
from minisft.kernels.adamw import adamw_
from minisft.kernels.adamw_formats import STATE_BLOCKSIZE, State
from minisft.parts import first_of, rows_of, shape_of, shared_out, summed, wait_for_readers

# The methods of torch's optimizers import torch's compiler at their first call, with SymPy and Triton, only to tell it to leave
# them alone. Nothing here is compiled, and it takes 170 MB and seconds of every start.
for _name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
    _method = inspect.unwrap(getattr(torch.optim.Optimizer, _name))
    setattr(_method, "__dynamo_disable", _method)

SMALLEST_IN_8_BITS = 4096  # numbers; smaller tensors save nothing, and are often the sensitive ones
# keys of state with one number for every STATE_BLOCKSIZE of a parameter
OF_BLOCKS = ("exp_avg_absmax", "exp_avg_sq_absmax")


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


class TorchAdamW(torch.optim.AdamW):
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr (m^ / (sqrt(v^) + eps) + wd w), with m^ and v^ divided by
    1 - b^t. torch's fused form: one pass over weights, gradients and moments. Kingma & Ba 2015, arXiv 1412.6980."""

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        super().__init__(groups, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        inspect.unwrap(torch.optim.AdamW.step)(self, closure)  # without its wrapper, which imports the compiler too
        # the fused kernel does not tell autograd that the weights have changed, and their copies (kernels/copies.py) ask for it
        torch.autograd.graph.increment_version([p for group in self.param_groups for p in group["params"]])


class AdamW(torch.optim.Optimizer):
    """The same by our own kernel (kernels/adamw.py): one launch for all tensors of a group, in which the gradients are
    clipped too, without a pass of their own. It has options that torch's has not:

    is_8bit: the moments of tensors of 4,096 numbers or more have a byte a number, and an absmax for every 256: 2 bytes a
    parameter instead of 8. Embedding moments stay in fp32. A token's row gets a gradient in few batches, while its
    256-number block shares one scale with busier rows, whose larger moments would round this row's to zero. Dettmers et
    al. 2022, arXiv 2110.02861.
    offload: the moments are in the memory of the CPU, pinned for a GPU, which they visit one tensor after the other.
    rounding_seed: of weights in bf16, which are rounded up or down by chance; None: to the nearest. The random numbers are a
    function of the seed, t, the parameter's place in the groups, and the element of the whole tensor.

    Moments are fp32 where the weights are bf16.
    """

    def __init__(
        self,
        groups: list[dict],
        betas: tuple[float, float],
        eps: float,
        *,
        is_8bit: bool = False,
        offload: bool = False,
        rounding_seed: int | None = None,
    ):
        super().__init__(groups, {"betas": betas, "eps": eps, "is_8bit": is_8bit, "offload": offload})
        self.rounding_seed = rounding_seed
        params = [p for group in self.param_groups for p in group["params"]]
        self.places = {p: place for place, p in enumerate(params)}

    @torch.no_grad()
    def step(self, *, clip: Tensor | float = 1.0) -> None:
        """clip: a factor for the gradients as they are read; .grad itself does not change. NaN: only the counts go on."""
        for group, t, params, grads in _trained(self):
            beta1, beta2 = group["betas"]
            options = {key: group[key] for key in ("lr", "eps", "weight_decay")}
            options |= dict(step=t, beta1=beta1, beta2=beta2, clip=clip, stochastic_rounding_seed=self.rounding_seed)
            homes = [self._moments(p, group) for p in params]
            size = 1 if group["offload"] else len(params)
            for part in (slice(i, i + size) for i in range(0, len(params), size)):
                device = params[0].device  # where nothing is offloaded, `to` and `copy_` have nothing to do
                here = [{key: x.to(device, non_blocking=True) for key, x in home.items()} for home in homes[part]]
                moments = ([_kernel_state(h, key) for h in here] for key in ("exp_avg", "exp_avg_sq"))
                where = {"places": [self.places[p] for p in params[part]], "firsts": list(map(first_of, params[part]))}
                adamw_(params[part], grads[part], *moments, **where, **options)
                for home, visitors in zip(homes[part], here):
                    for key, visitor in visitors.items():
                        home[key].copy_(visitor, non_blocking=True)
            if group["offload"] and params[0].is_cuda:
                torch.cuda.current_stream().synchronize()  # a checkpoint reads the moments, which return asynchronously

    def take_back(self) -> None:
        """Count the last step as not taken: its clip was NaN, so nothing but the counts has changed."""
        for state in (self.state[p] for group in self.param_groups for p in group["params"] if p.grad is not None):
            state["step"] -= 1

    def _moments(self, p: Tensor, group: dict) -> dict[str, Tensor]:
        """The state of a parameter without its step: exp_avg and exp_avg_sq, or codes and absmax of both."""
        state = self.state[p]
        if len(state) == 1:  # first update: only "step" is there, the moments are not made yet
            like = {"device": "cpu" if group["offload"] else p.device}
            like["pin_memory"] = group["offload"] and p.is_cuda
            in_8_bits = _is_in_8_bits(p, group)
            for key in ("exp_avg", "exp_avg_sq"):
                if in_8_bits:
                    state[f"{key}_codes"] = torch.zeros(p.shape, dtype=torch.uint8, **like)
                    state[f"{key}_absmax"] = torch.zeros(math.ceil(p.numel() / STATE_BLOCKSIZE), **like)
                else:
                    state[key] = torch.zeros(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), **like)
        return {key: moment for key, moment in state.items() if key != "step"}


def _is_in_8_bits(p: Tensor, group: dict) -> bool:
    return group["is_8bit"] and shape_of(p).numel() >= SMALLEST_IN_8_BITS and not group["embedding"]


def cut_runs_through_blocks(name: str, p: Tensor, size: int) -> bool:
    """Whether ranks that share this matrix, `size` of them, would share blocks of its 8-bit moments too."""
    numbers_each = -(-p.shape[0] // size) * p.shape[1:].numel()
    is_in_8_bits = p.numel() >= SMALLEST_IN_8_BITS and not name.startswith("embed_")
    return is_in_8_bits and numbers_each % STATE_BLOCKSIZE > 0


def _kernel_state(moments: dict[str, Tensor], key: str) -> State:
    return moments[key] if key in moments else (moments[f"{key}_codes"], moments[f"{key}_absmax"])


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
            squares = summed(params, [(g.square() / square.clamp(min=eps**2)).sum() for g, square in zip(grads, v)])
            for w, mean, square, total in zip(params, m, v, squares):
                r = (total / shape_of(w).numel()).sqrt()
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
            if c:  # 0 with a learning rate of 0, which is to leave -0.0 as it is too
                torch._foreach_lerp_(params, z, c)
            torch._foreach_add_(params, update, alpha=lr * (b1 * (1 - c) - 1))
            torch._foreach_add_(z, update, alpha=-lr)

    def mean_weights(self, p: Tensor) -> Tensor:
        """x of the parameter, of which y and z are known."""
        z = self.state[p].get("z")
        return p.data if z is None else mean_of(p.data, z, self.defaults["betas"][0])


def mean_of(y: Tensor, z: Tensor, b1: float) -> Tensor:
    """x of y = b1 x + (1 - b1) z."""
    return y.lerp(z, 1 - 1 / b1)


class Adafactor(torch.optim.Optimizer):
    """v of a matrix is the outer product of the means of its rows and columns, so that the state is two vectors; no m:

        R = b R + (1 - b) row means of g^2      C = b C + (1 - b) column means of g^2      v = R C^T / mean(R),  b = 1 - t^-0.8
        u = g / max(sqrt(v), eps)               w -= min(lr, 1 / sqrt(t)) max(1e-3, rms(w)) u / max(1, rms(u)) + lr wd w

    v of what is no matrix is not factored; eps is the smallest step from 1 in the dtype of w. With the factor rms(w) a learning
    rate of 1e-2 is usual. The rule of torch.optim.Adafactor, whose state serves. Shazeer & Stern 2018, arXiv 1804.04235.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self) -> None:
        for group, t, params, grads in _trained(self):
            one_minus_beta = t**-0.8
            squares = summed(params, [_row_column_and_weight_squares(w, g) for w, g in zip(params, grads)])
            updates, rates = [], []
            for w, g, sums in zip(params, grads, squares):
                eps, shape = torch.finfo(w.dtype).eps, shape_of(w)
                if w.dim() != 2:
                    (v,) = _state(self, [w], "variance")
                    v.lerp_(g.square(), one_minus_beta)
                else:
                    rows, columns = sums[:-1].split(list(shape))
                    R, C = (x.view(-1) for x in (self._mean(w, "row_var", rows), self._mean(w, "col_var", columns)))
                    R.lerp_(rows / shape[1], one_minus_beta)
                    C.lerp_(columns / shape[0], one_minus_beta)
                    v = torch.outer(R[rows_of(w)] / R.mean().clamp(min=eps), C)
                updates.append(g * v.clamp(min=eps**2).rsqrt())
                rates.append((sums[-1] / shape.numel()).sqrt().clamp(min=1e-3) * min(group["lr"], t**-0.5))
            _decay(group, params)
            squares = summed(params, [u.square().sum() for u in updates])
            for w, u, rate, total in zip(params, updates, rates, squares):
                w.sub_(u * (rate / (total / shape_of(w).numel()).sqrt().clamp(min=1.0)))

    def _mean(self, w: Tensor, key: str, like: Tensor) -> Tensor:
        """A running mean of the whole matrix, on every rank."""
        return self.state[w].setdefault(key, torch.zeros_like(like))


def _row_column_and_weight_squares(w: Tensor, g: Tensor) -> Tensor:
    """[R + C + 1], or [1] for what is no matrix: sums of g^2 over the rows and the columns of the whole matrix [R, C], as far as
    they are here, and the sum of w^2."""
    total = w.square().sum()[None]
    if w.dim() != 2:
        return total
    rows = g.new_zeros(shape_of(w)[0])
    rows[rows_of(w)] = torch.linalg.vector_norm(g, dim=1).square()
    return torch.cat([rows, torch.linalg.vector_norm(g, dim=0).square(), total])


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
            for w, u in shared_out(params, update, orthogonal):
                w.add_(u, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape_of(w))))

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
    began to train later have an earlier t and come apart, and so do those of another device (parallel.cpu_offload)."""
    for group in optimizer.param_groups:
        alike: dict[tuple[int, torch.device], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                step = optimizer.state[p].setdefault("step", torch.zeros(()))
                step += 1
                alike.setdefault((int(step), p.device), []).append(p)
        for (t, _), params in alike.items():
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


# name -> makes the optimizer from groups, betas, eps and the options of config/choices.py
RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups, betas, eps, **options: SGD(groups, **options),
    "lion": lambda groups, betas, eps: Lion(groups, betas),
    "adamw": TorchAdamW,
    "adamw_minisft": AdamW,
    "adamw_8bit": partial(AdamW, is_8bit=True),
    "stable_adamw": StableAdamW,
    "schedule_free_adamw": ScheduleFreeAdamW,
    "adafactor": Adafactor,
    "muon": Muon,
}


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

    offload and rounding_seed are those of `AdamW`, which also takes the place of torch's for them, for bf16 weights, and on a
    GPU, where it clips without a pass over the gradients and writes the copies for the products. Both have the same state.
    """
    params = [p for group in groups for p in group["params"]]
    is_bf16 = any(p.dtype == torch.bfloat16 for p in params)
    if name == "adamw" and (offload or is_bf16 or any(p.is_cuda for p in params)):
        name = "adamw_minisft"
    make, defaults = RULES[name], OPTIMIZERS[name]
    for key, value in options.items():
        if expected := wrong_optimizer_option(name, key, value):
            raise UserError(f"train.optim_args: {key} = {value!r}", hint=expected)
    for group in groups:
        group["lr"] = group["peak_lr"]
    if offload or is_bf16:  # config/check.py allows these only for ADAMW
        options = {"offload": offload, "rounding_seed": rounding_seed}
    return make(groups, betas, eps, **(defaults | options))


@contextlib.contextmanager
def evaluation_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the block the parameters hold the weights to evaluate and export; after it they are restored bit for bit."""
    if not isinstance(optimizer, ScheduleFreeAdamW):
        yield
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():  # in place, as the rows of a sharded parameter must stay where they are
        wait_for_readers(params)
        kept = [p.clone() for p in params]
        for p in params:
            p.copy_(optimizer.mean_weights(p))
    try:
        yield
    finally:
        wait_for_readers(params)
        with torch.no_grad():
            torch._foreach_copy_(params, kept)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the state that the optimizer will have after its first update, without its step counters."""
    total = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            n, wide = p.numel(), torch.promote_types(p.dtype, torch.float32).itemsize
            if isinstance(optimizer, AdamW) and _is_in_8_bits(p, group):
                total += 2 * (n + 4 * math.ceil(n / STATE_BLOCKSIZE))
            elif isinstance(optimizer, Adafactor):
                total += p.element_size() * (sum(shape_of(p)) if p.dim() == 2 else n)
            elif isinstance(optimizer, SGD):
                total += p.nbytes if group["momentum"] else 0
            elif isinstance(optimizer, Lion) or isinstance(optimizer, Muon) and group["matrices"]:
                total += p.nbytes
            else:
                total += 2 * wide * n
    return total
