"""A parameter of which this process has some rows: FSDP2's DTensor (parallel.py). For every other tensor these are all rows.

Known by its attributes, because importing torch.distributed.tensor takes most of a second, and most runs have no such
parameter.
"""

import torch
from torch import Tensor


def is_shard(x: Tensor) -> bool:
    return hasattr(x, "device_mesh")


def rows_here(x: Tensor) -> slice:
    """Which rows of the whole tensor this process has: torch.chunk's cut, the last ranks may have fewer or none."""
    if not is_shard(x):
        return slice(0, x.shape[0])
    dim = x.device_mesh.ndim - 1  # replicas before it have the same rows
    count = -(-x.shape[0] // x.device_mesh.size(dim))
    first = min(count * x.device_mesh.get_local_rank(dim), x.shape[0])
    return slice(first, min(first + count, x.shape[0]))


def local(x: Tensor) -> Tensor:
    """These rows, detached: the same memory."""
    if not is_shard(x):
        return x.detach()
    with torch.no_grad():
        return x.to_local()


def whole(x: Tensor) -> Tensor:
    """All rows, detached, of which every process gives its own: all of them call it."""
    if not is_shard(x):
        return x.detach()
    with torch.no_grad():
        return x.full_tensor()
