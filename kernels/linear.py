"""Linear layers in mixed precision, y = x W^T + b, and the matrix products of their gradients.

The weights that the optimizer sees (the master weights) are in fp32, the products are in bf16. torch.autocast does this layer
by layer: it casts W at every micro-batch, rounds dW to bf16, casts it to fp32 and adds it to the gradient of the micro-batches
before, and q, k and v, which read the same x, have three gradients of x that two more passes add up. Here

- a weight keeps its copy in bf16 until it changes (`keep_copies`): once an optimizer step, in which AdamW's kernel writes the
  copy beside the weight (adamw.py);
- dW goes to the fp32 gradient in the product itself. A GPU sums and adds in fp32 (beta = 1). A CPU has no product of bf16
  matrices into fp32, so it multiplies a block of rows at a time, and adds the block while it is in the cache;
- layers with the same input are one op. On a GPU they are one product too, as their copies lie side by side (weights in bf16 are
  moved there themselves) and, mostly, their outputs' gradients: fewer launches, and fewer tiles that find no multiprocessor free
  (a matrix of 192 columns has few tiles). Else the product of one adds to the gradient of x by the other.

Bytes moved for a weight of n numbers in one more micro-batch of a step: 2 n for each of y and dx, 8 n for dW. By autocast also
6 n for the cast, 2 n + 6 n for dW's detour, 4 n more for the addition.

What is fp32 whatever the dtype: the sums inside the products, dW over micro-batches, the gradient of a bias.

Paper: Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import HAS_AMX, chosen_backend

BLOCK_ROWS = 2048  # of a product that a CPU multiplies and adds while they are in its cache
STRIP = 32  # columns that `transposed` moves at once
WIDE = 1024  # with AMX oneDNN transposes a of a^T b slowly, and again for each block of columns of b: here it pays to do it once

Layer = tuple[Tensor, Tensor | None]  # weight [out, in], bias [out]


def linears_ref(x: Tensor, *layers: Layer) -> list[Tensor]:
    """The formula. Arguments as in `linears`."""
    return [F.linear(x, weight, bias) for weight, bias in layers]


# ---- the copy of a weight -----------------------------------------------------------------------------------------


_keeps = False


@contextlib.contextmanager
def keep_copies() -> Iterator[None]:
    """Inside the block weights keep the copies that are made of them (unless autocast's cache is off, as where a parameter holds
    other values for a while).

    A copy counts as current while autograd's counter of changes stands still. Whoever opens the block must see to it that every
    update counts, which torch's fused optimizers do not by themselves (optimizers.py). Outside each use makes a new copy, and so
    does each use of a weight of `never_keep_copy`.
    """
    global _keeps
    before, _keeps = _keeps, True
    try:
        yield
    finally:
        _keeps = before


def never_keep_copy(weight: Tensor) -> None:
    """Each use of this weight makes a new copy: it gets other values without being changed in place, as a weight that FSDP2
    gathers, whose counter stands still by design."""
    weight._is_refilled = True


def _keeps_copy(weight: Tensor) -> bool:
    return _keeps and torch.is_autocast_cache_enabled() and not hasattr(weight, "_is_refilled")


class _Copy(NamedTuple):
    source: Tensor  # shares the memory of the weight that was copied, so that nothing else can have its address
    version: int  # of the weight's values: autograd counts every change in place
    values: Tensor


def weight_as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's values in another dtype, without a gradient."""
    if weight.dtype == dtype:
        return weight.detach()
    kept = getattr(weight, "_copy", None)
    if kept is None or kept.values.dtype != dtype or not _shares_memory(kept.source, weight):
        kept = None
    elif kept.version == weight._version:
        return kept.values
    if not _keeps_copy(weight):
        return weight.detach().to(dtype)
    with torch.no_grad():
        values = weight.detach().to(dtype) if kept is None else kept.values.copy_(weight)
    weight._copy = _Copy(weight.detach(), weight._version, values)
    return values


def move_side_by_side(weights: Sequence[Tensor]) -> None:
    """Weights [out, in], or biases [out], that are multiplied as they are become views of one buffer, one after another."""
    values = [weight.detach() for weight in weights]
    if side_by_side([value.view(len(value), -1) for value in values], 0) is None:
        for weight, part in zip(weights, torch.cat(values).split([len(value) for value in values])):
            weight.data = part


def keep_side_by_side(weights: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Weights [out, in], or biases [out], that have no copy yet get theirs in one buffer, one after another."""
    if all(map(_keeps_copy, weights)) and not any(hasattr(weight, "_copy") for weight in weights):
        with torch.no_grad():
            values = torch.cat([weight.detach().to(dtype) for weight in weights]).split([len(w) for w in weights])
        for weight, part in zip(weights, values):
            weight._copy = _Copy(weight.detach(), weight._version, part)


def kept_copy(weight: Tensor) -> Tensor | None:
    """The copy that the weight keeps, with the values that it has now; None if there is none."""
    kept = getattr(weight, "_copy", None)
    is_current = kept is not None and kept.version == weight._version and _shares_memory(kept.source, weight)
    return kept.values if is_current else None


def copy_was_written(weight: Tensor) -> None:
    """Call after weight and copy have been changed alike."""
    weight._copy = weight._copy._replace(version=weight._version)


def refresh_copies(weights: Iterable[Tensor]) -> None:
    """Bring the copies that these weights keep up to date, where they are."""
    kept = [(w, w._copy) for w in weights if hasattr(w, "_copy")]
    stale = [(w, c) for w, c in kept if c.version != w._version and _shares_memory(c.source, w)]
    if stale:
        with torch.no_grad():
            torch._foreach_copy_([c.values for _, c in stale], [w for w, _ in stale])
    for w, _ in stale:
        copy_was_written(w)


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


# ---- products -----------------------------------------------------------------------------------------------------


def product_into(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, summed in fp32 and rounded once to the dtype of out, that of a and b or fp32."""
    options = {}
    if a.is_cuda and out.dtype != a.dtype:
        options = dict(out_dtype=out.dtype)
    else:  # a CPU, where the tests run this, has no product with an output wider than its inputs
        a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def product_in_blocks(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """`product_into` for a CPU: if out is wider than a and b, blocks of rows are rounded to their dtype before they are added."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
        return
    for rows, part in zip(a.split(BLOCK_ROWS), out.split(BLOCK_ROWS)):
        if HAS_AMX and rows.stride(0) == 1 and len(rows) % STRIP == 0 and b.shape[1] >= WIDE:
            rows = transposed(rows.T)
        block = torch.mm(rows, b)
        part.add_(block) if add else part.copy_(block)


def transposed(x: Tensor) -> Tensor:
    """x^T [n, m], contiguous, of x [m, n] with whole strips of columns: these are cut out first, and transposed in the cache.
    PyTorch's own copy takes up to three times as long on a CPU (1.4 and 4.0 ms for 2,048 x 1,536 in bf16)."""
    m, n = x.shape
    return x.unflatten(1, (n // STRIP, STRIP)).transpose(0, 1).contiguous().transpose(1, 2).reshape(n, m)


def side_by_side(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """The matrix whose slices along `dim` (0: rows, 1: columns) these matrices are, one after another; None if they are not."""
    first = parts[0]
    if len(parts) < 2 or first is None:
        return None
    place = first.storage_offset()
    for part in parts:
        if part is None or part.stride() != first.stride() or part.stride(-1) != 1 or part.storage_offset() != place:
            return None
        if part.dtype != first.dtype or part.shape[1 - dim] != first.shape[1 - dim] or not _shares_memory(part, first):
            return None
        place += part.shape[dim] * part.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    is_whole = dim == 0 or first.stride(0) >= shape[1]
    return first.as_strided(shape, first.stride(), first.storage_offset()) if is_whole else None


class _Linears(torch.autograd.Function):
    """x [T, in], copies (weight, bias) in the dtype of x, then the weights and the biases themselves -> y [T, out] of each layer.
    Saves x and the copies of the weights."""

    @staticmethod
    def forward(ctx, x, copies, *weights_and_biases):
        ctx.save_for_backward(x, *(W for W, _ in copies))
        ctx.weights = weights_and_biases[: len(copies)]  # not saved, as only their dtypes and gradients are needed
        ctx.set_materialize_grads(False)
        weights, biases = zip(*copies)
        W = side_by_side(weights, 0) if _sums_in_fp32(x) else None
        b = None if biases[0] is None else side_by_side([None if b is None else b[:, None] for b in biases], 0)
        if W is None or (b is None) != (biases[0] is None):
            return tuple(F.linear(x, W, b) for W, b in copies)
        y = F.linear(x, W, None if b is None else b[:, 0])
        return tuple(y.split([len(weight) for weight in weights], dim=1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *dys):
        x, *copies = ctx.saved_tensors
        n = len(copies)
        dx, gradients = None, [None] * (2 * n)
        needs_dx, *needs_dW = ctx.needs_input_grad[0], *ctx.needs_input_grad[2 : 2 + n]
        W, dy = side_by_side(copies, 0), side_by_side(dys, 1)
        if W is not None and dy is not None:  # one product for all
            if needs_dx:
                dx, needs_dx = dy @ W, False
            if all(needs_dW):
                gradients[:n], needs_dW = _weight_gradients(ctx.weights, dy, x), [False] * n
        for i, (dy, W, weight) in enumerate(zip(dys, copies, ctx.weights)):
            if dy is None:
                continue
            if needs_dx:
                dx = dy @ W if dx is None else dx.addmm_(dy, W)
            if needs_dW[i]:
                (gradients[i],) = _weight_gradients([weight], dy, x)
            if ctx.needs_input_grad[2 + n + i]:
                gradients[n + i] = dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
        return dx, None, *gradients


def _sums_in_fp32(x: Tensor) -> bool:
    """Whether products go the way of a GPU; the tests of the Triton kernels go it on a CPU."""
    return x.is_cuda or chosen_backend() == "triton"


def _weight_gradients(weights: Sequence[Tensor], dy: Tensor, x: Tensor) -> list[Tensor | None]:
    """dW = dy^T x of layers whose dy lie side by side, or None for each if it was added to the gradients that are there."""
    product = product_into if _sums_in_fp32(x) else product_in_blocks
    grads = [weight.grad if weight.is_leaf else None for weight in weights]
    if all(grad is not None for grad in grads):
        whole = side_by_side(grads, 0) if len(grads) > 1 else grads[0]
        sums = zip(grads, dy.split([len(w) for w in weights], dim=1)) if whole is None else [(whole, dy)]
        for grad, part in sums:
            product(grad, part.T, x, add=True)
        return [None] * len(weights)
    dtypes = {(weight.grad_dtype if weight.is_leaf else None) or weight.dtype for weight in weights}
    gradient = x.new_empty(dy.shape[1], x.shape[1], dtype=max(dtypes, key=lambda dtype: dtype.itemsize))
    product(gradient, dy.T, x)
    return list(gradient.split([len(weight) for weight in weights]))


def linears(x: Tensor, *layers: Layer) -> list[Tensor]:
    """y = x W^T + b for one or more linear layers with the same input.

    x: [..., in]. layers: (weight [out, in], bias [out] or None) each, of any dtypes. The products are in the dtype of x, or of
    autocast where that is on.

    Returns [..., out] for each layer, in the dtype of the products. The gradient of a weight has the weight's dtype (or its
    `grad_dtype`). If a weight is a leaf that has a gradient already, the backward pass adds to it in place.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    if chosen_backend() == "reference" or not torch.is_grad_enabled() and all(w.dtype == dtype for w, _ in layers):
        return linears_ref(x, *layers)
    for tensors in zip(*layers) if len(layers) > 1 else ():  # all weights, all biases
        if all(t is not None and t.dtype != dtype for t in tensors):
            keep_side_by_side(tensors, dtype)
        elif all(
            t is not None and t.dtype == dtype and t.is_leaf and _keeps_copy(t) for t in tensors
        ) and _sums_in_fp32(x):
            move_side_by_side(tensors)
    copies = [(weight_as(weight, dtype), None if bias is None else weight_as(bias, dtype)) for weight, bias in layers]
    with torch.autocast(x.device.type, enabled=False):
        rows = x.to(dtype).reshape(-1, x.shape[-1])
        weights, biases = zip(*layers)
        return [y.view(*x.shape[:-1], -1) for y in _Linears.apply(rows, copies, *weights, *biases)]
