"""What a block keeps for its backward, and what is computed again there, or waits in the CPU's memory.

    model.gradient_checkpointing = false        keeps everything
    model.gradient_checkpointing = "selective"  computes the cheap things again: the norms and the gated units, which read
                                                and write their tensors and do next to nothing with them
    model.gradient_checkpointing = true         keeps the input of a block [T, D] and runs the whole block once more
                                                (Chen et al. 2016, arXiv:1604.06174); every = n: of each n-th block

A norm's output is kept by the linear layers that read it, though the norm has kept its input, of which it could be made
again; so is that of a gated unit, beside gate and up. In a block of Llama's shape in bf16 (the residual stream is fp32),
with as many key heads as query heads and 8/3 D features in the MLP, a token leaves 18 D 2-byte numbers, and 4.7 D of them
are of this kind. Korthikanti et al. 2022, arXiv:2205.05198, do so with attention's scores, which no kernel here keeps.

No op that makes a tensor can say how those who read it should keep it; autograd's hooks on saved tensors can. `droppable`
notes on a tensor how it is made; inside `dropped`, whoever saves the tensor keeps that note instead.

All of it is bitwise: the same ops run again on the same inputs, with the same random state.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recipe:
    """A tensor as the function that makes it. The first of those who saved it computes it, the last frees it."""

    def __init__(self, function: Callable[[], Tensor]):
        self.function, self.num_saved, self.num_waiting, self.value = function, 0, 0, None

    def get(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value, self.num_waiting = self.function(), self.num_saved
        self.num_waiting -= 1
        value = self.value
        if self.num_waiting == 0:
            self.value = None
        return value


def droppable(y: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """y = function(*inputs), with a note of it. The inputs must be what is kept for the backward anyway."""
    if torch.is_grad_enabled():
        inputs = [x.detach() for x in inputs]
        y.recipe = lambda: function(*inputs)
    return y


def dropped(y: Tensor) -> contextlib.AbstractContextManager:
    """Inside it nobody keeps y for the backward, where y is `droppable`."""
    function = getattr(y, "recipe", None)
    if function is None:
        return contextlib.nullcontext()
    recipe, identity = Recipe(function), (y.data_ptr(), y.shape, y.dtype)

    def pack(x: Tensor) -> Tensor | Recipe:
        if (x.data_ptr(), x.shape, x.dtype) != identity:
            return x
        recipe.num_saved += 1
        return recipe

    return saved_tensors_hooks(pack, lambda kept: kept.get() if isinstance(kept, Recipe) else kept)


def offloaded(shape: torch.Size) -> contextlib.AbstractContextManager:
    """Inside it saved tensors of this shape wait in the CPU's memory, pinned where they come from a GPU: the host does
    not wait for the copies, which the GPU makes in the order of its other work."""

    def pack(x: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        if x.shape != shape:
            return x
        kept = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        return x.device, kept.copy_(x, non_blocking=True)

    def unpack(kept: tuple[torch.device, Tensor] | Tensor) -> Tensor:
        return kept[1].to(kept[0], non_blocking=True) if isinstance(kept, tuple) else kept

    return saved_tensors_hooks(pack, unpack)
