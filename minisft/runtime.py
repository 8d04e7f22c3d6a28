"""The machine a run sees: device, precision, seeds, ranks.

Precision is explicit: the weights stay in fp32 (the master weights) and autocast computes in bf16 or fp16. bf16 weights
alone do not train well: an update smaller than 2^-9 of a weight rounds to nothing.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minisft.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" takes the launcher's GPU where there is one; "cpu" and "cuda" ask for one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda', but torch finds no GPU", hint="use device = 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context of every forward pass: computes in `precision` ("bf16", "fp16"), or changes nothing ("fp32")."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def cpu_has_bf16() -> bool:
    """Whether bf16 matmuls run on this CPU's own instructions; elsewhere they are emulated, slower than fp32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            flags = f.read()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 where the device computes in it, fp32 elsewhere; any other name is taken as it is."""
    if name != "auto":
        return name
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    return "bf16" if has_bf16 else "fp32"


def use_deterministic_algorithms() -> None:
    """Forbid kernels whose result depends on timing, so that two runs are byte-equal on a GPU too."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_step(seed: int, step: int) -> None:
    """Seed dropout and noise as a pure function of (seed, step, rank): there is no generator state to save or lose."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0] >> 1))


# ---- signals ----------------------------------------------------------------------------------------------------


class StopSignal:
    """Notes the first SIGINT, SIGTERM or SIGUSR1, so that the loop saves at the next step and stops. A second one
    interrupts at once. Use as a context manager; does nothing outside the main thread."""

    def __init__(self):
        self.received: str | None = None
        self.previous: dict[signal.Signals, object] = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        told = f"\nminisft: {self.received}: saving after the next step, then stopping; once more quits at once\n"
        os.write(2, told.encode())  # print is not allowed to interrupt another print


# ---- ranks: one process a device, started by torchrun -----------------------------------------------------------


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
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield
    finally:
        dist.destroy_process_group()


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def sum_numbers_over_ranks(numbers: list[float], device: torch.device) -> list[float]:
    """The sums of numbers that the host knows. A single process has them already and does not wait for its GPU."""
    if not dist.is_initialized():
        return numbers
    return sum_over_ranks(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
