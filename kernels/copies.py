"""Copies of tensors in another dtype, which stay with them: of fp32 weights, for products in bf16, and of a gradient that a
kernel has written in both.

A copy counts as current while autograd's counter of changes stands still, and while the tensor is where it was.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_keeps = False


@contextlib.contextmanager
def keep_copies() -> Iterator[None]:
    """Inside the block weights keep the copies that are made of them (unless autocast's cache is off, as where a parameter holds
    other values for a while).

    Whoever opens the block must see to it that every update counts as a change, which torch's fused optimizers do not by
    themselves (optimizers.py). Outside each use makes a new copy, and so does each use of a weight of `never_keep_copy`.
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


def keeps_copy(weight: Tensor) -> bool:
    """Whether this weight may keep a copy now."""
    return _keeps and torch.is_autocast_cache_enabled() and not hasattr(weight, "_is_refilled")


class _Copy(NamedTuple):
    source: Tensor  # shares the memory of the weight that was copied, so that nothing else can have its address
    version: int  # of the weight's values: autograd counts every change in place
    values: Tensor


def keep_copy(x: Tensor, values: Tensor) -> None:
    """x keeps these values, its own in another dtype, as its copy."""
    x._copy = _Copy(x.detach(), x._version, values)


def weight_as(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight's values in another dtype, without a gradient."""
    if weight.dtype == dtype:
        return weight.detach()
    kept = getattr(weight, "_copy", None)
    if kept is None or kept.values.dtype != dtype or not shares_memory(kept.source, weight):
        kept = None
    elif kept.version == weight._version:
        return kept.values
    if not keeps_copy(weight):
        return weight.detach().to(dtype)
    with torch.no_grad():
        values = weight.detach().to(dtype) if kept is None else kept.values.copy_(weight)
    keep_copy(weight, values)
    return values


def kept_copy(weight: Tensor) -> Tensor | None:
    """The copy that the weight keeps, with the values that it has now; None if there is none."""
    kept = getattr(weight, "_copy", None)
    is_current = kept is not None and kept.version == weight._version and shares_memory(kept.source, weight)
    return kept.values if is_current else None


def copy_was_written(weight: Tensor) -> None:
    """Call after weight and copy have been changed alike."""
    weight._copy = weight._copy._replace(version=weight._version)


def refresh_copies(weights: Iterable[Tensor]) -> None:
    """Bring the copies that these weights keep up to date, where they are."""
    kept = [(w, w._copy) for w in weights if hasattr(w, "_copy")]
    stale = [(w, c) for w, c in kept if c.version != w._version and shares_memory(c.source, w)]
    if stale:
        with torch.no_grad():
            torch._foreach_copy_([c.values for _, c in stale], [w for w, _ in stale])
    for w, _ in stale:
        copy_was_written(w)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata
