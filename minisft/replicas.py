"""Replicas: every rank has the whole model, and gradients are summed over the ranks while the backward pass goes on.

The parameters that train are cut into buckets, from the last one to the first, about in the order in which a backward pass
completes their gradients. In the last micro-batch of a step a bucket is sent as soon as all its gradients are complete; what is
left is sent after it. All ranks send their buckets in the same order, whatever each of them computes, also one that runs out of
memory in the middle: the others would wait for it.

Li et al. 2020, "PyTorch Distributed", arXiv:2006.15704. torch's own wrapper averages, and wants the loss inside its forward pass.
"""

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minisft import ranks

BUCKET_BYTES = 2**24
IN_FLIGHT = 4  # buckets: the memory of the sum is theirs


class GradientSum:
    """The sum of one step. A context manager around its last backward pass; then `finish`, on every rank, also after an error."""

    def __init__(self, model: nn.Module, is_needed: bool):
        """is_needed: False where there is nothing to sum: for one rank, and for sharded weights (parallel.py)."""
        self.buckets: list[list[nn.Parameter]] = []
        size = BUCKET_BYTES
        for p in reversed([p for p in model.parameters() if p.requires_grad and is_needed]):
            if size >= BUCKET_BYTES:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(p)
            size += p.nbytes
        self.bucket_of = {p: i for i, bucket in enumerate(self.buckets) for p in bucket}
        self.num_missing = [len(bucket) for bucket in self.buckets]
        self.num_sent = 0
        self.in_flight: deque[tuple[list[nn.Parameter], Tensor, dist.Work]] = deque()
        self.hooks: list = []

    def __enter__(self) -> "GradientSum":
        self.hooks = [p.register_post_accumulate_grad_hook(self._complete) for p in self.bucket_of]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def finish(self) -> None:
        """Send what was not sent, and put the sums into the gradients."""
        while self.num_sent < len(self.buckets):
            self._send()
        while self.in_flight:
            self._receive()

    def _complete(self, p: Tensor) -> None:
        self.num_missing[self.bucket_of[p]] -= 1
        while self.num_sent < len(self.buckets) and self.num_missing[self.num_sent] == 0:
            self._send()

    def _send(self) -> None:
        """The next bucket. A gradient that is not there counts as zeros."""
        if len(self.in_flight) == IN_FLIGHT:
            self._receive()
        bucket = self.buckets[self.num_sent]
        grads = [torch.zeros_like(p, dtype=p.grad_dtype or p.dtype) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.detach().flatten() for grad in grads])
        self.in_flight.append((bucket, flat, ranks.start_sum(flat)))
        self.num_sent += 1

    def _receive(self) -> None:
        """Wait for the bucket that was sent first."""
        bucket, flat, work = self.in_flight.popleft()
        with ranks.waiting():
            work.wait()
        parts = flat.split([p.numel() for p in bucket])
        there = [(p.grad, part.view_as(p)) for p, part in zip(bucket, parts) if p.grad is not None]
        if there:
            torch._foreach_copy_([grad for grad, _ in there], [part for _, part in there])
