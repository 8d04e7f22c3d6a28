"""Ranks: one process for each device, started by torchrun, and the sums over them. A single process is rank 0 of 1.

Data parallelism is the plain one: every rank holds the whole model and sums its gradients with the others. The loss of an
optimizer step is sum / N with N known before the forward pass, so each rank's gradients are already its share of the
answer: one sum over the ranks, once an optimizer step, while its last backward pass goes on (replicas.py), and every rank
applies the same update. There is no averaging to undo. parallel.py has the other way: each rank keeps a part of the model.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from minisft.errors import PEER, UserError, is_out_of_memory, number_of_ranks, rank_name
from minisft.peers import START, Watch
from minisft.strict_json import dump_json, parse_json

OF_A_LAUNCHER = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # in the environment, besides WORLD_SIZE
STEP = timedelta(minutes=10)  # that a rank waits for the others once steps are taken: one of them may save

_watch: Watch | None = None
_group: Any = None  # the group whose timeout is STEP; None before the first step


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the group that a launcher (torchrun) describes in the environment; a single process joins none.

    Inside, every rank watches the others (peers.py), and the block ends when all ranks are done. Raises UserError where the
    environment describes no group, or (exit code PEER) a place where it cannot meet.
    """
    global _watch, _group
    if number_of_ranks() == 1 or dist.is_initialized():
        yield
        return
    _require_launcher()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, number, count = next(dist.rendezvous("env://", timeout=START))
    except dist.DistError as error:  # on rank 0, which listens there
        place, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0][:300]
        hint = "MASTER_ADDR must be the machine of rank 0, and MASTER_PORT a port that is free there"
        raise UserError(f"the ranks cannot meet at {place}: {reason}", hint=hint, exit_code=PEER) from error
    group = dist.PrefixStore("group", store)
    try:
        with Watch(dist.PrefixStore("peers", store.clone()), number, count) as _watch:
            try:
                with waiting():
                    dist.init_process_group(backend, store=group, rank=number, world_size=count, timeout=START)
                yield
            except RuntimeError as error:  # maybe of a message of torch itself, as FSDP2 sends, to a rank that is gone
                if not is_out_of_memory(error):
                    _watch.wait_for_word()
                raise
    except Exception as error:
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # then torchrun prints it below the rank that failed
            get_error_handler().record_exception(error)
        raise
    finally:
        _watch = _group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def _require_launcher() -> None:
    """Some clusters set WORLD_SIZE alone, for a launcher that is still to be started."""
    count, (rank, address, port) = number_of_ranks(), (os.environ.get(name, "") for name in OF_A_LAUNCHER)
    are_right = rank.isdecimal() and int(rank) < count, bool(address), port.isdecimal()
    if not all(are_right):
        wrong = zip(OF_A_LAUNCHER, (rank, address, port), are_right)
        told = ", ".join(f"{name} = {text[:60]!r}" for name, text, is_right in wrong if not is_right)
        hint = "start the ranks by torchrun, which sets all of them, or unset WORLD_SIZE to train in one process"
        raise UserError(f"WORLD_SIZE = {count} in the environment announces several ranks, but {told}", hint=hint)


def expect_steps() -> None:
    """From now on ranks arrive within STEP of each other. All of them call it, before the first step."""
    global _group
    if dist.is_initialized() and _group is None:
        _group = dist.new_group(timeout=STEP)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around everything that waits for the other ranks: what goes wrong there is told by the watch, which knows whose fault it
    was. Raises UserError (exit code PEER) where it is nobody's."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        if _watch is not None:
            _watch.wait_for_word()
        reason = (str(error).splitlines() or [""])[0][:300]
        hint = "all ranks are alive; if one of them only takes long, look at what it does"
        raise UserError(f"the ranks cannot reach each other: {reason}", hint=hint, exit_code=PEER) from error


def sum_over_ranks(x: Tensor, group: Any = None) -> Tensor:
    """The sum of `x` over all ranks, or over those of a group, in place."""
    if dist.is_initialized():
        with waiting():
            dist.all_reduce(x, group=group or _group)
    return x


def exchange(parts: Tensor, group: Any) -> Tensor:
    """[n, ...] for the n ranks of a group: part i goes to rank i, and part i of the result came from it."""
    received = torch.empty_like(parts)
    with waiting():
        dist.all_to_all_single(received, parts, group=group)
    return received


def start_sum(x: Tensor) -> dist.Work:
    """Begin to sum `x` over all ranks, in place: `wait` of the result is its end."""
    with waiting():
        return dist.all_reduce(x, group=_group, async_op=True)


def sum_numbers_over_ranks(numbers: list[float]) -> list[float]:
    """The sums of numbers that the host knows. They go from host to host, and wait for no GPU."""
    if not dist.is_initialized():
        return numbers
    return sum_over_ranks(torch.tensor(numbers, dtype=torch.float64)).tolist()


def any_rank(is_true: bool) -> bool:
    """Whether it is true on some rank."""
    return sum_numbers_over_ranks([float(is_true)])[0] > 0


def sum_gradients(grads: list[Tensor], bucket_bytes: int = 2**26) -> None:
    """Sum the gradients over all ranks, in place, through buckets of `bucket_bytes` (few large messages, little memory)."""
    if not dist.is_initialized():
        return
    bucket: list[Tensor] = []
    for i, grad in enumerate(grads):
        bucket.append(grad)
        if i == len(grads) - 1 or sum(g.nbytes for g in bucket) >= bucket_bytes:
            flat = sum_over_ranks(torch.cat([g.flatten() for g in bucket]))
            torch._foreach_copy_(
                bucket, [f.view_as(g) for f, g in zip(flat.split([g.numel() for g in bucket]), bucket)]
            )
            bucket = []


def from_first_rank(value: Any) -> Any:
    """The first rank's value, which JSON can hold, on every rank."""
    return gathered(value if rank() == 0 else None)[0]


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, which JSON can hold, in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    data = torch.frombuffer(bytearray(dump_json(value)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    with waiting():
        dist.all_gather(sizes, torch.tensor([len(data)]), group=_group)
        longest = int(max(sizes))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))), group=_group)
    return [parse_json(part[: int(size)].numpy().tobytes(), "another rank") for part, size in zip(parts, sizes)]


def send_from_first_rank(tensors: list[Tensor]) -> None:
    """Overwrite the tensors with those of the first rank."""
    if dist.is_initialized():
        with waiting(), torch.no_grad():
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=_group)


def require_agreement(values: dict[str, Any]) -> None:
    """UserError, on every rank, where a value is not the same on all of them."""
    everyone = gathered({"": rank_name(), **values})
    for key in values:
        others = [one for one in everyone if one[key] != everyone[0][key]]
        if others:
            told = "; ".join(f"{one['']}: {one[key]}" for one in (everyone[0], *others[:3]))
            raise UserError(
                f"the ranks are not in the same state, so their gradients do not belong together: {key} ({told})",
                hint="every rank needs the same configuration, data and model, and an output_dir on a disk that all share",
            )
