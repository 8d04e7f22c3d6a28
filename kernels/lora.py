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

Bytes beside the frozen product, in bf16: for each number of y 4 forward (read and write y) and 4 backward (read dy twice), op by
op 12 and 8; for each number of x 2 forward (read it for u) and 6 backward (read it for dA, read and write dx), op by op 2 and 10.

What is fp32 whatever the dtype: the sums inside the products, dA and dB over micro-batches.

Paper: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import chosen_backend, once_differentiable
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
    x: Tensor, layers: Sequence[Layer], adapters: Sequence[Adapter], dropped: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The formula. Arguments as in `lora_linears`."""
    dtype, (_, numbers) = product_dtype(x), _different(adapters)
    ys = [F.linear(x.to(dtype), W.to(dtype) if isinstance(W, Tensor) else W(dtype), b) for W, b in layers]
    for (layer, A, B, scale), number in zip(adapters, numbers):
        ys[layer] = ys[layer] + scale * F.linear(F.linear(dropped[number] if dropped else x, A), B)
    return ys


def _different(adapters: Sequence[Adapter]) -> tuple[list[Tensor], list[int]]:
    """(each A once, in the order in which they come first; the number of the A of each adapter)"""
    As = {id(adapter.A): adapter.A for adapter in adapters}
    return list(As.values()), [list(As).index(id(adapter.A)) for adapter in adapters]


class _LoraLinears(torch.autograd.Function):
    """total [T, out] or None; x [T, in]; copies of weights (or their functions) and of biases; (layer, number of A, scale) of
    each adapter; copies of the different A and of every B; then these themselves, and what each A reads in the place of x, if it
    does -> y [T, out] of each layer, or total."""

    @staticmethod
    def forward(ctx, total, x, layers, adapters, As, Bs, *others):
        n = len(As)
        ctx.factors, zs = others[: n + len(Bs)], others[n + len(Bs) :]
        ctx.functions = [None if isinstance(W, Tensor) else W for W, _ in layers]
        ctx.adapters, ctx.is_sum, ctx.drops = adapters, total is not None, len(zs) > 0
        joint = None if zs else side_by_side(As, 0)
        if joint is None:
            us = [z @ A.T for z, A in zip(zs or [x] * n, As)]
        else:
            us = (x @ joint.T).split([len(A) for A in As], dim=1)
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
        ctx.save_for_backward(*As, *us, *Bs, *(zs or [x]), *(W for W, _ in layers if isinstance(W, Tensor)))
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        m = len(ctx.adapters)
        n = len(ctx.factors) - m
        saved, needs = iter(ctx.saved_tensors), iter(ctx.needs_input_grad[6:])
        As, us, Bs, zs = (list(islice(saved, count)) for count in (n, n, m, n if ctx.drops else 1))
        needs_dA, needs_dB, needs_dz = list(islice(needs, n)), list(islice(needs, m)), list(needs)
        dtotal, needs_dx = dys[0] if ctx.is_sum else None, ctx.needs_input_grad[1]
        dys = dys if dtotal is None else (gradient_of_sum(dtotal, zs[0].dtype),)

        joint = None if ctx.drops else side_by_side(As, 0)
        whole = None if joint is None else zs[0].new_empty(len(us[0]), len(joint))  # the du, side by side as the A are
        dus = [torch.empty_like(u) for u in us] if whole is None else whole.split([len(A) for A in As], dim=1)
        dAs, dBs, begun = [None] * n, [None] * m, set()
        for i, (layer, a, scale) in enumerate(ctx.adapters):
            product_into(dus[a], dys[layer], Bs[i], add=a in begun, scale=scale)
            begun.add(a)
            if needs_dB[i]:
                (dBs[i],) = weight_gradients([ctx.factors[n + i]], dys[layer], us[a], scale)
        if whole is not None and all(needs_dA):
            dAs = weight_gradients(ctx.factors[:n], whole, zs[0])
        else:
            for a in (a for a in range(n) if needs_dA[a]):
                (dAs[a],) = weight_gradients([ctx.factors[a]], dus[a], zs[a if ctx.drops else 0])

        dx, Ws = None, saved
        if needs_dx and any(ctx.functions):  # one matrix at a time
            for dy, make in zip(dys, ctx.functions):
                dx = sum_of_products([dy], [next(Ws) if make is None else make(dy.dtype)], dx)
        elif needs_dx:
            dx = sum_of_products(dys, list(Ws))
        if needs_dx and not ctx.drops:
            dx = sum_of_products(dus, As, dx)
        dzs = [du @ A if is_needed else None for du, A, is_needed in zip(dus, As, needs_dz)]
        return dtotal, dx, None, None, None, None, *dAs, *dBs, *dzs


def lora_linears(
    x: Tensor,
    layers: Sequence[Layer],
    adapters: Sequence[Adapter],
    *,
    dropped: Sequence[Tensor] = (),
    total: Tensor | None = None,
) -> list[Tensor]:
    """y = x W^T + b + scale (x A^T) B^T for one or more frozen layers with the same input, and any number of adapters of each.

    x: [..., in]. layers: (weight [out, in] or a function dtype -> weight, bias [out] or None) each. adapters: at least one.
    dropped: [..., in] for each different A, in the order in which they come first: what it reads in the place of x. total:
    [T, out], of which `linear.may_add_to` holds: the result of the one layer, which has no bias, is added to it in place. The
    products are in the dtype of x, or of autocast where that is on.

    Returns [..., out] for each layer, in the dtype of the products; or [total]. x, dropped, total, A and B get gradients. If A or
    B is a leaf that has one already, the backward pass adds to it in place.
    """
    if chosen_backend() == "reference":
        return lora_linears_ref(x, layers, adapters, dropped)
    dtype, (As, numbers) = product_dtype(x), _different(adapters)
    Bs = [adapter.B for adapter in adapters]
    if all(isinstance(W, Tensor) for W, _ in layers):
        copies = copies_of(x, layers, dtype)
    else:
        copies = [
            (weight_as(W, dtype) if isinstance(W, Tensor) else W, None if b is None else weight_as(b, dtype))
            for W, b in layers
        ]
    A_copies = [A for A, _ in copies_of(x, [(A, None) for A in As], dtype)]
    B_copies = [weight_as(B, dtype) for B in Bs]
    where = [(adapter.layer, number, adapter.scale) for adapter, number in zip(adapters, numbers)]
    with torch.autocast(x.device.type, enabled=False):
        rows, *zs = (t.to(dtype).reshape(-1, t.shape[-1]) for t in (x, *dropped))
        ys = _LoraLinears.apply(total, rows, copies, where, A_copies, B_copies, *As, *Bs, *zs)
        return [y.view(*x.shape[:-1], y.shape[1]) for y in ys] if total is None else list(ys)
