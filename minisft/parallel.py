"""Data parallelism, the plain way: every rank holds the whole model and sums its gradients with the others.

The loss of an optimizer step is sum / N with N known before the forward pass, so each rank's gradients are already its
share of the answer: one sum over the ranks, once an optimizer step, and every rank applies the same update. There is no
averaging to undo and no hook to wait for.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def sum_gradients(grads: list[Tensor], bucket_bytes: int = 2**26) -> None:
    """Sum the gradients over all ranks, in place, through buckets of `bucket_bytes` (few large messages, little memory)."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    for i, grad in enumerate(grads):
        bucket.append(grad)
        if i == len(grads) - 1 or sum(g.nbytes for g in bucket) >= bucket_bytes:
            flat = torch.cat([g.flatten() for g in bucket])
            dist.all_reduce(flat)
            torch._foreach_copy_(
                bucket, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in bucket]), bucket)]
            )
            bucket = []
