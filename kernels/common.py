"""What every op shares: the choice of backend, the guarded import of Triton, and what a kernel must know about its GPU.

Three implementations of each op compute the same function:

- "reference": the naive formula, a few readable lines of differentiable PyTorch; what the others are tested against;
- "torch": the efficient path in plain PyTorch, for CPUs and for what the Triton kernels do not cover;
- "triton": our own GPU kernels.

`use_backend` sets the choice for the whole process, or for a `with` block. "auto" takes Triton on a GPU where the op has a
kernel and torch everywhere else; if a GPU has to run without a kernel, one warning says why.

Importing Triton costs 70 MB and half a second, so it happens only where a kernel may run: with a GPU, under
TRITON_INTERPRET=1 (Triton's interpreter, which runs the kernels on CPU tensors for the tests), or where the program has
imported it already. Elsewhere `jit` and `tl` are stand-ins that let the kernel files be imported and read.

Launch configurations. Every kernel file has a table `CONFIGS`: the block sizes, warps and stages, by kernel and then by
architecture or shape. Run time and the compile test both read it. There is no autotuning at run time: its timings vary, and
the results of a run with them.
"""

import os
import sys
import warnings
from functools import cache, wraps
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference")
# Ops that have a Triton kernel.
TRITON_OPS: frozenset[str] = frozenset(
    {
        "adamw",
        "causal_conv1d",
        "cross_entropy",
        "dequantize_fp4",
        "dequantize_int8",
        "dequantize_nf4",
        "flash_attention",
        "gated_delta_rule",
        "geglu",
        "layer_norm",
        "linear_cross_entropy",
        "quantize_fp4",
        "quantize_int8",
        "quantize_nf4",
        "rms_norm",
        "rope",
        "swiglu",
    }
)

# Architectures with configurations (compute capability x 10), and the KB of shared memory that one program may use.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
INTERPRETER = 0  # the "architecture" of Triton's interpreter: small blocks, so that small tests have many of them

HAS_AMX = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)  # matrix products of a CPU, in tiles
HAS_TRITON = find_spec("triton") is not None  # not on macOS and Windows
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
compile_for: int | None = None  # set by the compile test: kernels "run" on CPU tensors as if on this architecture

if HAS_TRITON and (INTERPRET or "triton" in sys.modules or torch.cuda.is_available()):
    import triton.language as tl
    from triton import jit
    from triton.tools.tensor_descriptor import TensorDescriptor
else:
    TensorDescriptor = None

    class tl:
        @staticmethod
        def constexpr(value):
            return value

    def jit(function):
        return function


_backend = "auto"


class use_backend:
    """`use_backend("reference")` switches the process; `with use_backend("reference"):` switches back at the end."""

    def __init__(self, name: str):
        global _backend
        if name not in BACKENDS:
            raise ValueError(f"backend {name!r}: expected one of {', '.join(BACKENDS)}")
        self.previous, _backend = _backend, name

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        global _backend
        _backend = self.previous


def chosen_backend() -> str:
    """One of BACKENDS, as `use_backend` set it."""
    return _backend


def may_change(x: Tensor) -> bool:
    """Whether autograd lets an op change x in place and return it with others: no view, and no leaf with a gradient."""
    return not (x._is_view() or x.is_leaf and x.requires_grad)


def backend_for(op: str, x: Tensor, cannot: str = "") -> str:
    """The implementation that `op` runs on a tensor like `x`: "triton", "torch" or "reference".

    cannot: why the kernel of this op does not serve these very arguments ("head dim 24"); empty if it does.
    Raises ValueError where the backend is "triton" and the kernel cannot run.
    """
    if _backend in ("reference", "torch"):
        return _backend
    if _backend == "auto" and not x.is_cuda:
        return "torch"
    why_not = _why_not(x) or (f"{op}: {cannot}" if cannot else "")
    if op not in TRITON_OPS:
        why_not = f"{op} has no Triton kernel"
    if not why_not:
        return "triton"
    if _backend == "triton":
        raise ValueError(f"backend 'triton': {why_not}; use 'auto' or 'torch'")
    _warn(f"the torch path runs instead of a Triton kernel: {why_not}")
    return "torch"


def _why_not(x: Tensor) -> str:
    """Why Triton kernels cannot run on tensors like x; empty if they can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if x.dtype == torch.float64:
        return "the kernels do not know float64"
    if arch_of(x) is None:
        if not x.is_cuda:
            return "the kernels need a GPU (or, for tests, Triton's interpreter: TRITON_INTERPRET=1)"
        return "compute capability {}.{}: the kernels need 8.0".format(*torch.cuda.get_device_capability(x.device))
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return f"the tensors are on {x.device}, the current device is cuda:{torch.cuda.current_device()}"
    return ""


@cache
def _warn(message: str) -> None:
    """Each message once a process."""
    warnings.warn(message, stacklevel=3)


def arch_of(x: Tensor) -> int | None:
    """The key of SHARED_MEMORY whose configurations serve the device of x; INTERPRETER; None where Triton cannot run."""
    if x.is_cuda:
        return _arch(x.device)
    return INTERPRETER if INTERPRET else compile_for


@cache
def _arch(device: torch.device) -> int | None:
    major, minor = torch.cuda.get_device_capability(device)
    known = [arch for arch in SHARED_MEMORY if arch // 10 == major and arch % 10 <= minor]
    if (major, minor) == (8, 7):  # Orin has the shared memory of 8.0
        return 80
    return max(known, default=None)


def num_sms(x: Tensor) -> int:
    """The number of multiprocessors of x's device, which sizes the grids of persistent kernels."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n: the sizes that a Triton block may have."""
    return 1 << (n - 1).bit_length()


def smallest_fit(table: dict[int, dict], size: int) -> dict:
    """The entry of a table of launch configurations with the smallest key that is at least `size`."""
    return table[min(key for key in table if key >= size)]


def refuse_second_derivative(ctx) -> None:
    """For the backward pass of an op whose gradients autograd would take for constants. Raises RuntimeError under
    create_graph=True."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f'{type(ctx).__name__}: no second derivative (create_graph=True); the formulas of use_backend("reference") have it'
        )


def once_differentiable(backward):
    """Decorates a backward pass without a second derivative. PyTorch's decorator of this name refuses one only where the gradient
    from above has a graph; else, as under a loss, what depends on the inputs would silently be missing."""

    @wraps(backward)
    def checked(ctx, *gradients):
        refuse_second_derivative(ctx)
        return backward(ctx, *gradients)

    return checked


def check_documents(cu_seqlens: Tensor | None, T: int) -> None:
    """Raises ValueError where these are not the bounds of documents side by side; on a GPU only their form is looked at."""
    if cu_seqlens is None:
        return
    if cu_seqlens.ndim != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"cu_seqlens {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: expected int64 or int32 [N + 1]")
    if cu_seqlens.device.type == "cpu" and (cu_seqlens[0] != 0 or cu_seqlens[-1] != T or (cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens runs from {cu_seqlens[0]} to {cu_seqlens[-1]}: expected 0 to {T}, and never back")


def as_rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D] with neighbouring features side by side: a view where the strides allow, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
