"""Embedding: for each token its row of a table.

Backward: the gradient of a row of y is added to the row of the token. Most rows of the table get nothing. PyTorch's backward
pass makes a gradient [V, D] of zeros nevertheless, which autograd then adds to that of the micro-batches before, and to that of
the head where it is the same matrix. Where a gradient lies there already, the T rows are added to it and no others are touched:
V 49,152, D 576 in fp32 are 113 MB that would be written, read and added for 5 MB of rows, and on a CPU mapped.

The rows of one token are added up first, by PyTorch's op, and the sum is one row: no two threads add to the same number, so the
result repeats bitwise.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import chosen_backend, once_differentiable


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
    @once_differentiable
    def backward(ctx, dy):
        (ids,), weight = ctx.saved_tensors, ctx.weight
        is_wide = weight.dtype in (torch.float32, torch.float64)  # else PyTorch's op rounds otherwise
        if weight.is_leaf and is_wide and weight.grad is not None:
            tokens, order = ids.flatten().sort(stable=True)
            first = torch.searchsorted(tokens, tokens)  # where in that order the rows of each token begin
            place = torch.empty_like(order).scatter_(0, order, first)
            dy = dy.reshape(len(place), dy.shape[-1])
            rows = torch.ops.aten.embedding_dense_backward(dy, place, len(place), -1, False)
            weight.grad.index_add_(0, tokens, rows)  # their sum is there, and zeros after it
            return None, None
        return None, torch.ops.aten.embedding_dense_backward(dy, ids, len(weight), -1, False)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """weight[ids].

    ids: int [...]. weight: [V, D].

    Returns [..., D] in the dtype of weight. If weight is an fp32 leaf that has a gradient already, the backward pass adds to it
    in place.
    """
    return embedding_ref(ids, weight) if chosen_backend() == "reference" else _Embedding.apply(ids, weight)
