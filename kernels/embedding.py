"""Embedding: for each token its row of a table.

Backward: the gradient of a row of y is added to the row of the token. Most rows of the table get nothing. PyTorch's backward
pass makes a gradient [V, D] of zeros nevertheless, which autograd then adds to that of the micro-batches before, and to that of
the head where it is the same matrix. Where a gradient lies there already, a CPU adds the T rows to it and touches no others: V
49,152, D 576 in fp32 are 113 MB that would be mapped, written, read and added for 5 MB of rows.

On a GPU it is PyTorch's op, whose sums do not depend on the order in which threads come.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding_ref(ids: Tensor, weight: Tensor) -> Tensor:
    """The formula. Arguments as in `embedding`."""
    return F.embedding(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight  # not saved: its values are not needed
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (ids,), weight = ctx.saved_tensors, ctx.weight
        is_wide = weight.dtype in (torch.float32, torch.float64)  # else PyTorch's op rounds otherwise
        if weight.is_leaf and is_wide and weight.grad is not None:
            tokens, place = ids.unique(return_inverse=True)
            rows = dy.new_zeros(len(tokens), dy.shape[-1]).index_add_(0, place.flatten(), dy.flatten(0, -2))
            weight.grad.index_add_(0, tokens, rows)
            return None, None
        return None, torch.ops.aten.embedding_dense_backward(dy, ids, len(weight), -1, False)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids].

    ids: int [...]. weight: [V, D].

    Returns [..., D] in the dtype of weight. If weight is an fp32 leaf on a CPU that has a gradient already, the backward pass
    adds to it in place.
    """
    return F.embedding(ids, weight) if weight.is_cuda else _Embedding.apply(ids, weight)
