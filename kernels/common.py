"""What every op shares: the choice of backend.

Three implementations of each op compute the same function:

- "reference": the naive formula, a few readable lines of differentiable PyTorch; what the others are tested against;
- "torch": the efficient path in plain PyTorch, for CPUs and for GPUs that the Triton kernels have no configuration for;
- "triton": our own GPU kernels.

`use_backend` sets the choice for the whole process, or for a `with` block. "auto" takes Triton on a GPU where the op has a
kernel and torch everywhere else.
"""

from importlib.util import find_spec

from torch import Tensor

BACKENDS = ("auto", "triton", "torch", "reference")
OPS = ("flash_attention", "linear_cross_entropy", "rms_norm", "layer_norm", "rope", "swiglu")  # what a model runs
HAS_TRITON = (
    find_spec("triton") is not None
)  # not on macOS and Windows; importing it costs 70 MB, so only where it runs
TRITON_OPS: frozenset[str] = frozenset()  # ops that have a Triton kernel

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


def backend_for(op: str, x: Tensor) -> str:
    """The implementation that `op` runs on a tensor like `x`: "triton", "torch" or "reference"."""
    if _backend in ("reference", "torch"):
        return _backend
    has_kernel = op in TRITON_OPS and x.is_cuda and HAS_TRITON
    if _backend == "triton" and not has_kernel:
        raise ValueError(f"backend 'triton': {op} has no Triton kernel for {x.device}; use 'auto' or 'torch'")
    return "triton" if has_kernel else "torch"
