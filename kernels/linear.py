"""Linear layers in mixed precision, y = x W^T + b, and the matrix products of their gradients.

The weights that the optimizer sees (the master weights) are in fp32, the products are in bf16. torch.autocast does this layer
by layer: it casts W at every micro-batch, rounds dW to bf16, casts it to fp32 and adds it to the gradient of the micro-batches
before, and q, k and v, which read the same x, have three gradients of x that two more passes add up. Here

- a weight keeps its copy in bf16 until it changes (copies.py): once an optimizer step, in which AdamW's kernel writes the
  copy beside the weight (adamw.py);
- dW goes to the fp32 gradient in the product itself. A GPU sums and adds in fp32 (beta = 1). A CPU has no product of bf16
  matrices into fp32, so it multiplies a block of rows at a time, and adds the block while it is in the cache;
- layers with the same input are one op. On a GPU they are one product too, as their copies lie side by side (weights in bf16 are
  moved there themselves) and, mostly, their outputs' gradients: fewer launches, and fewer tiles that find no multiprocessor free
  (a matrix of 192 columns has few tiles). Else the product of one adds to the gradient of x by the other;
- on a GPU the last product of a sublayer adds to the residual stream in place (`add_linear`), before it rounds to bf16. The norm
  that follows would else read its result and write the sum: 6 bytes a number less, of 12, in a kernel that waits for memory.

Bytes moved for a weight of n numbers in one more micro-batch of a step: 2 n for each of y and dx, 8 n for dW. By autocast also
6 n for the cast, 2 n + 6 n for dW's detour, 4 n more for the addition.

What is fp32 whatever the dtype: the sums inside the products, dW over micro-batches, the gradient of a bias.

Paper: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import HAS_AMX, chosen_backend, may_change, once_differentiable
from minisft.kernels.copies import keep_copy, keeps_copy, kept_copy, shares_memory, weight_as

BLOCK_ROWS = 2048  # of a product that a CPU multiplies and adds while they are in its cache
STRIP = 32  # columns that `transposed` moves at once
WIDE = 1024  # with AMX oneDNN transposes a of a^T b slowly, and again for each block of columns of b: here it pays to do it once

Layer = tuple[Tensor, Tensor | None]  # weight [out, in], bias [out]


def linears_ref(x: Tensor, *layers: Layer) -> list[Tensor]:
    """The formula. Arguments as in `linears`."""
    return [F.linear(x, weight, bias) for weight, bias in layers]


# ---- matrices that lie side by side ----------------------------------------------------------------------------------


def side_by_side(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """The matrix whose slices along `dim` (0: rows, 1: columns) these matrices are, one after another; None if they are not."""
    first = parts[0]
    if len(parts) < 2 or first is None:
        return None
    place = first.storage_offset()
    for part in parts:
        if part is None or part.stride() != first.stride() or part.stride(-1) != 1 or part.storage_offset() != place:
            return None
        if part.dtype != first.dtype or part.shape[1 - dim] != first.shape[1 - dim] or not shares_memory(part, first):
            return None
        place += part.shape[dim] * part.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    is_whole = dim == 0 or first.stride(0) >= shape[1]
    return first.as_strided(shape, first.stride(), first.storage_offset()) if is_whole else None


def move_side_by_side(weights: Sequence[Tensor]) -> None:
    """Weights [out, in], or biases [out], that are multiplied as they are become views of one buffer, one after another."""
    values = [weight.detach() for weight in weights]
    if side_by_side([value.view(len(value), -1) for value in values], 0) is None:
        for weight, part in zip(weights, torch.cat(values).split([len(value) for value in values])):
            weight.data = part


def keep_side_by_side(weights: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Weights [out, in], or biases [out], that have no copy yet get theirs in one buffer, one after another."""
    if all(map(keeps_copy, weights)) and not any(hasattr(weight, "_copy") for weight in weights):
        with torch.no_grad():
            values = torch.cat([weight.detach().to(dtype) for weight in weights]).split([len(w) for w in weights])
        for weight, part in zip(weights, values):
            keep_copy(weight, part)


# ---- products -----------------------------------------------------------------------------------------------------


def product_into(out: Tensor, a: Tensor, b: Tensor, add: bool = False, scale: float = 1.0) -> None:
    """out = scale a b, or out += scale a b, summed in fp32 and rounded once to the dtype of out, that of a and b or fp32."""
    options = {}
    if a.is_cuda and out.dtype != a.dtype:
        options = dict(out_dtype=out.dtype)
    else:  # a CPU, where the tests run this, has no product with an output wider than its inputs
        a, b = a.to(out.dtype), b.to(out.dtype)
    if add or scale != 1:
        torch.addmm(out, a, b, beta=int(add), alpha=scale, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def product_in_blocks(out: Tensor, a: Tensor, b: Tensor, add: bool = False, scale: float = 1.0) -> None:
    """`product_into` for a CPU: if out is wider than a and b, blocks of rows are rounded to their dtype before they are added."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), alpha=scale, out=out)
        return
    for rows, part in zip(a.split(BLOCK_ROWS), out.split(BLOCK_ROWS)):
        if HAS_AMX and rows.stride(0) == 1 and len(rows) % STRIP == 0 and b.shape[1] >= WIDE:
            rows = transposed(rows.T)
        block = torch.mm(rows, b)
        part.add_(block, alpha=scale) if add else part.copy_(block).mul_(scale)


def transposed(x: Tensor) -> Tensor:
    """x^T [n, m], contiguous, of x [m, n] with whole strips of columns: these are cut out first, and transposed in the cache.
    PyTorch's own copy takes up to three times as long on a CPU (1.4 and 4.0 ms for 2,048 x 1,536 in bf16)."""
    m, n = x.shape
    return x.unflatten(1, (n // STRIP, STRIP)).transpose(0, 1).contiguous().transpose(1, 2).reshape(n, m)


def products(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """x W^T + b of each layer; on a GPU one product of those whose weights lie side by side."""
    weights, biases = zip(*layers)
    W = side_by_side(weights, 0) if sums_in_fp32(x) else None
    b = None if biases[0] is None else side_by_side([None if b is None else b[:, None] for b in biases], 0)
    if W is None or (b is None) != (biases[0] is None):
        return [F.linear(x, W, b) for W, b in layers]
    return list(F.linear(x, W, None if b is None else b[:, 0]).split([len(weight) for weight in weights], dim=1))


def sum_of_products(
    dys: Sequence[Tensor | None], weights: Sequence[Tensor], onto: Tensor | None = None
) -> Tensor | None:
    """The sum of all dy W, added to `onto` in place; one product where both lie side by side. None without a summand."""
    dy, W = side_by_side(dys, 1), side_by_side(weights, 0)
    if dy is not None and W is not None:
        dys, weights = [dy], [W]
    for dy, W in zip(dys, weights):
        if dy is not None:
            onto = dy @ W if onto is None else onto.addmm_(dy, W)
    return onto


class _Linears(torch.autograd.Function):
    """x [T, in], copies (weight, bias) in the dtype of x, then the weights and the biases themselves -> y [T, out] of each layer.
    Saves x and the copies of the weights."""

    @staticmethod
    def forward(ctx, x, copies, *weights_and_biases):
        ctx.save_for_backward(x, *(W for W, _ in copies))
        ctx.weights = weights_and_biases[: len(copies)]  # not saved, as only their dtypes and gradients are needed
        ctx.set_materialize_grads(False)
        return tuple(products(x, copies))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, *copies = ctx.saved_tensors
        n = len(copies)
        gradients = [None] * (2 * n)
        needs_dx, *needs_dW = ctx.needs_input_grad[0], *ctx.needs_input_grad[2 : 2 + n]
        dx = sum_of_products(dys, copies) if needs_dx else None
        dy = side_by_side(dys, 1)
        if dy is not None and all(needs_dW) and side_by_side(copies, 0) is not None:  # one product for all
            gradients[:n], needs_dW = weight_gradients(ctx.weights, dy, x), [False] * n
        for i, (dy, weight) in enumerate(zip(dys, ctx.weights)):
            if dy is None:
                continue
            if needs_dW[i]:
                (gradients[i],) = weight_gradients([weight], dy, x)
            if ctx.needs_input_grad[2 + n + i]:
                gradients[n + i] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        return dx, None, *gradients


def sums_in_fp32(x: Tensor) -> bool:
    """Whether products go the way of a GPU; the tests of the Triton kernels go it on a CPU."""
    return x.is_cuda or chosen_backend() == "triton"


def weight_gradients(weights: Sequence[Tensor], dy: Tensor, x: Tensor, scale: float = 1.0) -> list[Tensor | None]:
    """dW = scale dy^T x of layers whose dy lie side by side, or None for each if it was added to the gradients that are there."""
    product = product_into if sums_in_fp32(x) else product_in_blocks
    grads = [weight.grad if weight.is_leaf else None for weight in weights]
    if all(grad is not None for grad in grads):
        whole = side_by_side(grads, 0) if len(grads) > 1 else grads[0]
        sums = zip(grads, dy.split([len(w) for w in weights], dim=1)) if whole is None else [(whole, dy)]
        for grad, part in sums:
            product(grad, part.T, x, add=True, scale=scale)
        return [None] * len(weights)
    dtypes = {(weight.grad_dtype if weight.is_leaf else None) or weight.dtype for weight in weights}
    gradient = x.new_empty(dy.shape[1], x.shape[1], dtype=max(dtypes, key=lambda dtype: dtype.itemsize))
    product(gradient, dy.T, x, scale=scale)
    return list(gradient.split([len(weight) for weight in weights]))


def product_dtype(x: Tensor) -> torch.dtype:
    """Of products with x: autocast's where that is on."""
    is_cast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if is_cast else x.dtype


def copies_of(x: Tensor, layers: Sequence[Layer], dtype: torch.dtype) -> list[Layer]:
    """Weights and biases of layers with the same input x, in the dtype of their products. Copies lie side by side, and so do
    weights that are in this dtype themselves on a GPU."""
    for tensors in zip(*layers) if len(layers) > 1 else ():  # all weights, all biases
        if all(t is not None and t.dtype != dtype for t in tensors):
            keep_side_by_side(tensors, dtype)
        elif sums_in_fp32(x) and all(
            t is not None and t.dtype == dtype and t.is_leaf and keeps_copy(t) for t in tensors
        ):
            move_side_by_side(tensors)
    return [(weight_as(weight, dtype), None if bias is None else weight_as(bias, dtype)) for weight, bias in layers]


def linears(x: Tensor, *layers: Layer) -> list[Tensor]:
    """y = x W^T + b for one or more linear layers with the same input.

    x: [..., in]. layers: (weight [out, in], bias [out] or None) each, of any dtypes. The products are in the dtype of x, or of
    autocast where that is on.

    Returns [..., out] for each layer, in the dtype of the products. The gradient of a weight has the weight's dtype (or its
    `grad_dtype`). If a weight is a leaf that has a gradient already, the backward pass adds to it in place.
    """
    dtype = product_dtype(x)
    if chosen_backend() == "reference" or not torch.is_grad_enabled() and all(w.dtype == dtype for w, _ in layers):
        return linears_ref(x, *layers)
    copies = copies_of(x, layers, dtype)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        weights, biases = zip(*layers)
        return [y.view(*x.shape[:-1], y.shape[1]) for y in _Linears.apply(rows, copies, *weights, *biases)]


# ---- a product that adds to the residual stream ---------------------------------------------------------------------


class _AddLinear(torch.autograd.Function):
    """total [T, out] in place, x [T, in], the weight's copy in the dtype of x, the weight -> total. Saves x and the copy."""

    @staticmethod
    def forward(ctx, total, x, W, weight):
        ctx.save_for_backward(x, W)
        ctx.weight = weight
        product_into(total, x, W.T, add=True)
        ctx.mark_dirty(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):
        x, W = ctx.saved_tensors
        dy = gradient_of_sum(dtotal, x.dtype)
        dx = dy @ W if ctx.needs_input_grad[1] else None
        (dW,) = weight_gradients([ctx.weight], dy, x) if ctx.needs_input_grad[3] else (None,)
        return dtotal, dx, None, dW


def gradient_of_sum(dtotal: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of the summands, in their dtype: the copy of the norm behind the sum (rms_norm.py), if it has made one."""
    copy = kept_copy(dtotal)
    if copy is None or copy.dtype != dtype:
        return dtotal.to(dtype)
    del dtotal._copy  # dtotal lives on
    return copy


def may_add_to(total: Tensor) -> bool:
    """Whether `add_linear` takes this tensor: on a GPU, and if it may change."""
    return sums_in_fp32(total) and chosen_backend() != "reference" and may_change(total)


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """total += x W^T in place, added in fp32 and rounded once, to the dtype of total.

    total: [T, out], a tensor of which `may_add_to` holds, that no backward pass needs as it was. x: [..., in], T rows.
    weight: [out, in]. The product is in the dtype of x, or of autocast where that is on.

    Where the gradient of total keeps a copy in that dtype, the backward pass reads the copy. For dW see `linears`.
    """
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        _AddLinear.apply(total, x.to(dtype).reshape(len(total), x.shape[-1]), weight_as(weight, dtype), weight)
