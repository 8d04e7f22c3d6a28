"""The machine a run sees: device, precision, seeds.

Precision is explicit: the weights stay in fp32 (the master weights) and autocast computes in bf16 or fp16. bf16 weights
alone do not train well: an update smaller than 2^-9 of a weight rounds to nothing.
"""

import contextlib
import os
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from minisft.config.sections import TrainSection
from minisft.errors import UserError
from minisft.kernels.copies import keep_copies
from minisft.ranks import rank

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" takes the launcher's GPU where there is one, and sets it up. Raises UserError for "cuda" without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device = 'cuda', but torch finds no GPU", hint="use device = 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    # Else cuBLAS may cut a long sum into parts and round each to bf16 before it adds them.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return device


@contextlib.contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """The context of every forward pass: computes in `precision` ("bf16", "fp16"), or changes nothing ("fp32")."""
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"), keep_copies():
        yield


def cpu_has_bf16() -> bool:
    """Whether bf16 matmuls run on this CPU's own instructions; elsewhere they are emulated, slower than fp32."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            flags = f.read()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


EMULATED = (
    'this CPU has no instructions for 16 bits and emulates them: precision = "auto" takes fp32, which is faster here'
)


def is_emulated(precision: str, device: torch.device) -> bool:
    """Whether products in this precision are slower than in fp32."""
    return device.type == "cpu" and precision != "fp32" and not cpu_has_bf16()


def pick_precision(train: TrainSection, device: torch.device) -> str:
    """Of the matrix products: bf16 for weights in bf16; "auto" is bf16 where the device computes in it, fp32 elsewhere."""
    if train.weights_dtype == "bf16":
        return "bf16"
    if train.precision != "auto":
        return train.precision
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
    return "bf16" if has_bf16 else "fp32"


def use_deterministic_algorithms() -> None:
    """Forbid kernels whose result depends on timing, so that two runs are byte-equal on a GPU too."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def seed_step(seed: int, step: int) -> None:
    """Seed dropout and noise as a pure function of (seed, step, rank): there is no generator state to save or lose."""
    number = int(np.random.SeedSequence([seed, step, rank()]).generate_state(1, np.uint64)[0] >> 1)
    # not torch.manual_seed: for a GPU that is not in use it formats the stack, which takes a millisecond
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def copy_back(x: Tensor) -> Tensor:
    """Begin to copy a tensor from the device. It is here once something that was queued later on the same stream has arrived."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x, non_blocking=True)


def read_back(x: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor from the device. The function that is returned waits for the copy, and has it; it does not wait
    for what was queued after it."""
    here = copy_back(x)
    arrived = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

    def values() -> Tensor:
        if arrived is not None:
            arrived.synchronize()
        return here

    return values
