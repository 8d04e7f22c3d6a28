"""Ranks: one process for each device, started by torchrun, and the sums over them. A single process is rank 0 of 1.

Data parallelism is the plain one: every rank holds the whole model and sums its gradients with the others. The loss of an
optimizer step is sum / N with N known before the forward pass, so each rank's gradients are already its share of the
answer: one sum over the ranks, once an optimizer step, and every rank applies the same update. There is no averaging to
undo and no hook to wait for.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that a launcher (torchrun) describes in the environment; a single process joins none."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_numbers_over_ranks(numbers: list[float]) -> list[float]:
    """The sums of numbers that the host knows. They go from host to host, and wait for no GPU."""
    if not dist.is_initialized():
        return numbers
    return sum_over_ranks(torch.tensor(numbers, dtype=torch.float64)).tolist()


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
