"""Gated linear units: the activation of one projection times another projection, y = act(gate) * up.

What it computes

        swiglu: act(x) = silu(x) = x * sigmoid(x)
        geglu:  act(x) = gelu(x) = x * Phi(x), exact ("none"), or its tanh approximation ("tanh")

    In each of them a share of x passes, act(x) = x * s(x). That of the approximation is a sigmoid as well, because
    (1 + tanh(u)) / 2 = sigmoid(2 u).

Backward

        dup = dy * act(gate)        dgate = dy * up * act'(gate)        act'(x) = s(x) + x * s'(x)
        silu: s' = s * (1 - s)        gelu: s' = the normal density

What is saved
    gate and up only; act(gate) is computed again in the backward pass. Autograd through the formula saves act(gate)
    too, half as much again: for T = 16,384 tokens and 8,192 features 256 MB a layer in bf16. A CPU takes longer to
    compute it than to read it, most of all gelu: there that unit's torch path is the formula. For silu it is worth
    the memory: 4 ms of a layer with 2,048 tokens and 5,632 features, some 1 % of the time of its products.

Bytes moved, per element in bf16: fused 6 forward (read gate and up, write y) and 10 backward; op by op 10 and 18.

The kernels
    Nothing is summed, so rows do not matter: a program takes a tile of BLOCK neighbouring elements, several times 16
    bytes a thread, and where all tensors are contiguous the tiles run on over the ends of the rows. A program for each
    row would hold too many registers where rows are long, and wait for its last bytes before it writes the first.

fp32: the kernels compute in fp32 from the first read to the write. PyTorch's ops and the formula do so inside each op
and round act(gate) to the dtype of the inputs before the product, as Hugging Face models do.

gate and up may be strided views, such as the two halves of one fused [T, 2 F] projection. Autograd would put their two
gradients together with a copy; so the fused tensor may also be given as a whole, and its gradient is written as one.

Paper: Shazeer 2020, "GLU Variants Improve Transformer".
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.common import as_rows, backend_for, cdiv, jit, once_differentiable, tl


def swiglu_ref(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """The formula. Arguments as in `swiglu`."""
    gate, up = _halves(gate, up)
    return F.silu(gate) * up


def geglu_ref(gate: Tensor, up: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """The formula. Arguments as in `geglu`."""
    gate, up = _halves(gate, up)
    return F.gelu(gate, approximate=approximate) * up


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return gate.chunk(2, dim=-1) if up is None else (gate, up)


@jit
def _share(x, APPROXIMATE: tl.constexpr):
    """s and s' of act(x) = x * s(x); APPROXIMATE is None for silu."""
    if APPROXIMATE is None:
        share = tl.sigmoid(x)
        slope = share * (1 - share)
    elif APPROXIMATE == "tanh":  # sigmoid(2 u) of u = sqrt(2 / pi) * (x + 0.044715 x^3)
        share = tl.sigmoid(x * (1.5957691216057308 + 0.07135481282553542 * x * x))
        slope = share * (1 - share) * (1.5957691216057308 + 3 * 0.07135481282553542 * x * x)
    else:
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return share, slope


@jit
def _glu_fwd_kernel(
    gate_ptr,  # [rows, F], rows stride_gate apart
    up_ptr,  # [rows, F]
    y_ptr,  # [rows, F], contiguous
    F,
    stride_gate,
    stride_up,
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a tile of BLOCK elements of a row."""
    program, tiles = tl.program_id(0), tl.cdiv(F, BLOCK)
    row = (program // tiles).to(tl.int64)
    column = (program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=column < F, other=0.0).to(tl.float32)
    share, _ = _share(gate, APPROXIMATE)
    tl.store(y_ptr + row * F + column, (gate * share * up).to(y_ptr.dtype.element_ty), mask=column < F)


@jit
def _glu_bwd_kernel(
    gate_ptr,  # [rows, F], rows stride_gate apart
    up_ptr,  # [rows, F]
    dy_ptr,  # [rows, F]
    dgate_ptr,  # [rows, F], rows stride_dx apart
    dup_ptr,  # [rows, F], rows stride_dx apart
    F,
    stride_gate,
    stride_up,
    stride_dy,
    stride_dx,
    APPROXIMATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program a tile of BLOCK elements of a row."""
    program, tiles = tl.program_id(0), tl.cdiv(F, BLOCK)
    row = (program // tiles).to(tl.int64)
    column = (program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + row * stride_gate + column, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + column, mask=column < F, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * stride_dy + column, mask=column < F, other=0.0).to(tl.float32)
    share, slope = _share(gate, APPROXIMATE)
    dgate, dup = dy * up * (share + gate * slope), dy * gate * share
    at = row * stride_dx + column
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=column < F)
    tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), mask=column < F)


CONFIGS = {  # 16 elements a thread
    "_glu_fwd_kernel": dict(BLOCK=2048, num_warps=4),
    "_glu_bwd_kernel": dict(BLOCK=2048, num_warps=4),
}


class _GLU(torch.autograd.Function):
    """Both units; `approximate` is None for silu."""

    @staticmethod
    def forward(ctx, gate, up, approximate):
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return _times(_activate(gate, approximate), up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        with torch.autocast(gate.device.type, enabled=False):
            dgate = dy * up
            if ctx.approximate is None:
                torch.ops.aten.silu_backward(dgate, gate, grad_input=dgate)
            else:
                torch.ops.aten.gelu_backward(dgate, gate, approximate=ctx.approximate, grad_input=dgate)
            return dgate, _times(_activate(gate, ctx.approximate), dy), None


def _activate(x: Tensor, approximate: str | None) -> Tensor:
    return F.silu(x) if approximate is None else F.gelu(x, approximate=approximate)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x * y: in the memory of x, except in 16 bits, where PyTorch takes longer for that on a CPU."""
    return x * y if x.dtype.itemsize == 2 else x.mul_(y)


class _GLUTriton(torch.autograd.Function):
    """As `_GLU`; `up` is None where `gate` holds both."""

    @staticmethod
    def forward(ctx, gate, up, approximate):
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        gate, up = _halves(gate, up)
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        (gate, up), config = _rows(gate, up), CONFIGS["_glu_fwd_kernel"]
        rows, features = gate.shape
        _glu_fwd_kernel[(rows * cdiv(features, config["BLOCK"]),)](
            *(gate, up, y, features, gate.stride(0), up.stride(0), approximate), **config
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        # of one tensor, so that the products of gate's and up's layers may be one
        features = gate.shape[-1] * (1 if up is None else 2)
        gradient = gate.new_empty(*gate.shape[:-1], features)
        dgate, dup = _halves(gradient, None)
        gradients = [gradient] if up is None else [dgate, dup]
        gate, up, dy, dgate, dup = _rows(*_halves(gate, up), dy, dgate, dup)
        (rows, features), config = gate.shape, CONFIGS["_glu_bwd_kernel"]
        _glu_bwd_kernel[(rows * cdiv(features, config["BLOCK"]),)](
            *(gate, up, dy, dgate, dup, features, gate.stride(0), up.stride(0), dy.stride(0), dgate.stride(0)),
            *(ctx.approximate,),
            **config,
        )
        return *gradients, *[None] * (3 - len(gradients))


def _rows(*tensors: Tensor) -> list[Tensor]:
    """[..., F] -> [rows, F]; one long row where all are contiguous."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, the unit of the Llama family.

    gate, up: [..., F], same shape and dtype, contiguous or strided views; or one tensor [..., 2 F] of both side by side.

    Returns [..., F] in the dtype of the inputs. Raises ValueError where shapes or dtypes do not fit.
    """
    return _glu("swiglu", gate, up, None)


def geglu(gate: Tensor, up: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up, the unit of the Gemma family.

    gate, up: as in `swiglu`.
    approximate: "tanh" for the tanh approximation, "none" for the exact form with erf, as in torch.nn.functional.gelu.

    Returns [..., F] in the dtype of the inputs. Raises ValueError where shapes or dtypes do not fit.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate {approximate!r}: expected 'tanh' or 'none'")
    return _glu("geglu", gate, up, approximate)


def _glu(op: str, gate: Tensor, up: Tensor | None, approximate: str | None) -> Tensor:
    if up is None and gate.shape[-1] % 2:
        raise ValueError(f"{op}: {tuple(gate.shape)} has no two halves of the same size")
    if up is not None and (gate.shape != up.shape or gate.dtype != up.dtype):
        raise ValueError(f"{op}: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} differ")
    with torch.autocast(gate.device.type, enabled=False):
        backend = backend_for(op, gate)
        pays = gate.is_cuda or approximate is None  # to compute act(gate) again
        if backend == "reference" or (backend == "torch" and not pays):
            return swiglu_ref(gate, up) if approximate is None else geglu_ref(gate, up, approximate)
        if backend == "triton":
            return _GLUTriton.apply(gate, up, approximate)
        return _GLU.apply(*_halves(gate, up), approximate)
