"""Linear layers with low-rank adapters: y = x W^T + b + s (x A^T) B^T, with W frozen.

An adapter of rank r has few FLOPs, and op by op it moves much: the product u B^T, that times s, and the sum are three tensors as
large as y, and their gradients three more. Here

- the product u B^T adds to y as it is written (beta = 1), with s as its factor (alpha);
- layers with the same input are one op. On a GPU their frozen products are one product, and so are those with every A. dx is that
  of the frozen product, to which du A adds;
- on a GPU the last product of a sublayer adds to the residual stream (`total`, see linear.py), and so does its adapter.

Backward, with u = x A^T [T, r]

        du = s dy B        dB = s dy^T u        dA = du^T x        dx = dy W + du A

What is saved: x and u. A quantised W is a function: the matrix is there during its products only.

Bytes for each number of y beside the frozen product, in bf16: 4 forward (read and write y) and 4 backward (read dy twice); op by
op 14 and 12. For each number of x 8 backward: read it for dA, add to dx.

What is fp32 whatever the dtype: the sums inside the products, dA and dB over micro-batches.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import chosen_backend
from minisft.kernels.copies import weight_as
from minisft.kernels.linear import (
    copies_of,
    gradient_of_sum,
    product_dtype,
    product_into,
    products,
    side_by_side,
    sum_of_products,
    weight_gradients,
)

Weight = Tensor | Callable[[torch.dtype], Tensor]  # [out, in], frozen; or a function that makes it in a dtype
Layer = tuple[Weight, Tensor | None]  # and its bias [out], frozen


class Adapter(NamedTuple):
    """Adds scale u B^T to the result of a layer, u = x A^T. Several may have the same A."""

    layer: int  # its number
    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    scale: float


def lora_linears_ref(
    x: Tensor, layers: Sequence[Layer], adapters: Sequence[Adapter], dropped: Tensor | None = None
) -> list[Tensor]:
    """The formula. Arguments as in `lora_linears`."""
    dtype = product_dtype(x)
    ys = [F.linear(x.to(dtype), W.to(dtype) if isinstance(W, Tensor) else W(dtype), b) for W, b in layers]
    for number, A, B, scale in adapters:
        ys[number] = ys[number] + scale * F.linear(F.linear(x if dropped is None else dropped, A), B)
    return ys


class _LoraLinears(torch.autograd.Function):
    """total [T, out] or None; x [T, in] of the layers; z [T, in] of the adapters, None where it is x; copies of weights (or their
    functions) and of biases; (layer, number of A, scale) of each adapter; copies of the different A and of every B; these
    themselves -> y [T, out] of each layer, or total."""

    @staticmethod
    def forward(ctx, total, x, z, layers, adapters, As, Bs, *factors):
        ctx.functions = [None if isinstance(W, Tensor) else W for W, _ in layers]
        ctx.adapters, ctx.factors, ctx.is_sum, ctx.drops = adapters, factors, total is not None, z is not None
        z = x if z is None else z
        joint = side_by_side(As, 0)
        us = [z @ A.T for A in As] if joint is None else (z @ joint.T).split([len(A) for A in As], dim=1)
        if total is not None:
            W = layers[0][0]
            product_into(total, x, (W if isinstance(W, Tensor) else W(x.dtype)).T, add=True)
            ctx.mark_dirty(total)
            ys = [total]
        elif any(ctx.functions):
            ys = [F.linear(x, W if isinstance(W, Tensor) else W(x.dtype), b) for W, b in layers]
        else:
            ys = products(x, layers)
        for (layer, a, scale), B in zip(adapters, Bs):
            product_into(ys[layer], us[a], B.T, add=True, scale=scale)
        ctx.counts = len(As), len(Bs)
        ctx.save_for_backward(z, *As, *us, *Bs, *(W for W, _ in layers if isinstance(W, Tensor)))
        return tuple(ys)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        z, *saved = ctx.saved_tensors
        n, m = ctx.counts
        As, us, Bs, Ws = saved[:n], saved[n : 2 * n], saved[2 * n : 2 * n + m], iter(saved[2 * n + m :])
        _, needs_dx, needs_dz, *_ = ctx.needs_input_grad
        needs_dA, needs_dB = ctx.needs_input_grad[7 : 7 + n], ctx.needs_input_grad[7 + n :]
        dtotal = dys[0] if ctx.is_sum else None
        dys = dys if dtotal is None else (gradient_of_sum(dtotal, z.dtype),)

        joint = side_by_side(As, 0)
        whole = None if joint is None else z.new_empty(len(z), len(joint))  # the du, side by side as the A are
        dus = [torch.empty_like(u) for u in us] if whole is None else whole.split([len(A) for A in As], dim=1)
        dAs, dBs, begun = [None] * n, [None] * m, set()
        for i, (layer, a, scale) in enumerate(ctx.adapters):
            product_into(dus[a], dys[layer], Bs[i], add=a in begun, scale=scale)
            begun.add(a)
            if needs_dB[i]:
                (dBs[i],) = weight_gradients([ctx.factors[n + i]], dys[layer], us[a], scale)
        if whole is not None and all(needs_dA):
            dAs = weight_gradients(ctx.factors[:n], whole, z)
        else:
            for a in (a for a in range(n) if needs_dA[a]):
                (dAs[a],) = weight_gradients([ctx.factors[a]], dus[a], z)

        dx = dz = None
        if needs_dx and any(ctx.functions):  # one matrix at a time
            for dy, make in zip(dys, ctx.functions):
                dx = sum_of_products([dy], [next(Ws) if make is None else make(z.dtype)], dx)
        elif needs_dx:
            dx = sum_of_products(dys, list(Ws))
        if ctx.drops:
            dz = sum_of_products(dus, As) if needs_dz else None
        elif needs_dx:
            dx = sum_of_products(dus, As, dx)
        return dtotal, dx, dz, None, None, None, None, *dAs, *dBs


def lora_linears(
    x: Tensor,
    layers: Sequence[Layer],
    adapters: Sequence[Adapter],
    *,
    dropped: Tensor | None = None,
    total: Tensor | None = None,
) -> list[Tensor]:
    """y = x W^T + b + scale (x A^T) B^T for one or more frozen layers with the same input, and any number of adapters of each.

    x: [..., in]. layers: (weight [out, in] or a function dtype -> weight, bias [out] or None) each. adapters: at least one.
    dropped: [..., in], what the adapters read in the place of x. total: [T, out], of which `linear.may_add_to` holds: the result
    of the one layer, which has no bias, is added to it in place. The products are in the dtype of x, or of autocast where that is
    on.

    Returns [..., out] for each layer, in the dtype of the products; or [total]. x, dropped, total, A and B get gradients. If A or
    B is a leaf that has one already, the backward pass adds to it in place.
    """
    if chosen_backend() == "reference":
        return lora_linears_ref(x, layers, adapters, dropped)
    dtype = product_dtype(x)
    As = list({id(adapter.A): adapter.A for adapter in adapters}.values())  # each once
    number_of = {id(A): number for number, A in enumerate(As)}
    if all(isinstance(W, Tensor) for W, _ in layers):
        copies = copies_of(x, layers, dtype)
    else:
        copies = [
            (weight_as(W, dtype) if isinstance(W, Tensor) else W, None if b is None else weight_as(b, dtype))
            for W, b in layers
        ]
    A_copies = [A for A, _ in copies_of(x, [(A, None) for A in As], dtype)]
    B_copies = [weight_as(adapter.B, dtype) for adapter in adapters]
    where = [(adapter.layer, number_of[id(adapter.A)], adapter.scale) for adapter in adapters]
    with torch.autocast(x.device.type, enabled=False):
        rows, z = (None if t is None else t.to(dtype).reshape(-1, t.shape[-1]) for t in (x, dropped))
        factors = *As, *(adapter.B for adapter in adapters)
        ys = _LoraLinears.apply(total, rows, z, copies, where, A_copies, B_copies, *factors)
        return [y.view(*x.shape[:-1], -1) for y in ys] if total is None else list(ys)
