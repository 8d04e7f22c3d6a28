"""A parameter of which this process has some rows: FSDP2's DTensor (parallel.py). For every other tensor these are all rows.

Known by its attributes, because importing torch.distributed.tensor takes most of a second, and most runs have no such
parameter.
"""

import torch
from torch import Tensor


def is_shard(x: Tensor) -> bool:
    return hasattr(x, "device_mesh")


def rows_each(x: Tensor) -> int:
    """How many rows a process has, the last ones fewer or none: torch.chunk's cut."""
    return -(-x.shape[0] // x.device_mesh.size(x.device_mesh.ndim - 1)) if is_shard(x) else x.shape[0]


def rows_here(x: Tensor) -> slice:
    """Which rows of the whole tensor this process has."""
    if not is_shard(x):
        return slice(0, x.shape[0])
    dim = x.device_mesh.ndim - 1  # replicas before it have the same rows
    first = min(rows_each(x) * x.device_mesh.get_local_rank(dim), x.shape[0])
    return slice(first, min(first + rows_each(x), x.shape[0]))


def replica_of(x: Tensor) -> tuple[int, int]:
    """(the group of this process, the number of groups): each group has all rows of the tensor."""
    mesh = x.device_mesh
    return (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)


def device_of(x: Tensor) -> torch.device:
    """Where the model computes with it: rows in the memory of the CPU (parallel.cpu_offload) are gathered on a GPU."""
    if not is_shard(x) or x.device.type == x.device_mesh.device_type:
        return x.device
    return torch.device(x.device_mesh.device_type, torch.cuda.current_device())


def local(x: Tensor) -> Tensor:
    """These rows, detached: the same memory."""
    if not is_shard(x):
        return x.detach()
    with torch.no_grad():
        return x.to_local()


def whole(x: Tensor) -> Tensor:
    """All rows, detached, of which every process gives its own: all of them call it. They are on `device_of` x."""
    if not is_shard(x):
        return x.detach()
    with torch.no_grad():
        return x.to(device_of(x)).full_tensor()
