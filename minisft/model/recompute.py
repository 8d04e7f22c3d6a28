"""What a block keeps for its backward, what it computes again instead, and what is moved to CPU memory meanwhile.

    model.gradient_checkpointing = false        keeps everything
    model.gradient_checkpointing = "selective"  computes the gated units and LayerNorms again: they are cheap, hardly more
                                                than reading and writing their tensors
    model.gradient_checkpointing = true         keeps the input of a block [T, D] and runs the whole block once more
                                                (Chen et al. 2016, arXiv:1604.06174), in every n-th block with
                                                model.gradient_checkpointing_every = n

The linear layer behind a gated unit saves the unit's output for the backward, although the output can be recomputed from
gate and up, which are saved as well; so it is with LayerNorm's output beside its input. RMSNorm keeps nothing but its output
(kernels/rms_norm.py). A block of Llama's shape in bf16 (fp32 residual stream, as many key heads as query heads, 8/3 D features
in the MLP) keeps 14 D 2-byte numbers a token, of which 2.7 D can be recomputed in this way. Korthikanti et al. 2022,
arXiv:2205.05198, recompute attention's scores, which no kernel here keeps.

The op that makes a tensor cannot control how later ops save it; autograd's saved-tensor hooks can. `droppable` attaches to
a tensor the function that makes it; inside `dropped`, autograd saves that function instead of the tensor.

All of it is bitwise exact: the same ops run again on the same inputs, with the same random state.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Recipe:
    """A saved tensor replaced by the function that recomputes it. The first backward that asks computes it, the last frees it."""

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


def droppable(y: Tensor, function: Callable[..., Tensor], *inputs: Tensor | torch.dtype | None) -> Tensor:
    """y, which is function(*inputs), with that function attached. The inputs must be tensors that are saved anyway."""
    if torch.is_grad_enabled():
        kept = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
        y.recipe = lambda: function(*kept)
    return y


def dropped(y: Tensor) -> contextlib.AbstractContextManager:
    """A context in which ops do not keep y for the backward, if y is `droppable`."""
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
    """A context in which saved tensors of this shape are kept in CPU memory, pinned if they come from a GPU. The host does
    not wait for the copies; the GPU makes them in the order of its other work."""

    def pack(x: Tensor) -> tuple[torch.device, Tensor] | Tensor:
        if x.shape != shape:
            return x
        kept = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        return x.device, kept.copy_(x, non_blocking=True)

    def unpack(kept: tuple[torch.device, Tensor] | Tensor) -> Tensor:
        return kept[1].to(kept[0], non_blocking=True) if isinstance(kept, tuple) else kept

    return saved_tensors_hooks(pack, unpack)
