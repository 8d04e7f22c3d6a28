"""AdamW: the optimizer step of all parameters in one launch, with clipping, weight decay and rounding folded in.

What it computes, for every number w of a parameter, with its gradient g and two moments, at step t = 1, 2, ...

        g = c g                                    c: the clip factor, min(1, max_norm / norm)
        m = b1 m + (1 - b1) g                      a running mean of the gradient
        v = b2 v + (1 - b2) g^2                    ... and of its square
        w -= lr (wd w + m^ / (sqrt(v^) + eps))     m^ = m / (1 - b1^t), v^ = v / (1 - b2^t)

    The moments start at zero, which m^ and v^ correct. The decay wd is decoupled: it is no part of g, so v does not
    scale it. c is read on the device, so that the host does not wait for the norm of the gradients. A step whose gradients
    are not finite is left out there too: c is NaN, and nothing changes.

adamw_formats.py explains what is stored in other formats than fp32: bf16 weights, rounded by chance, and 8-bit moments. An fp32
weight whose products are in bf16 keeps a copy for them (copies.py). The kernel writes it with the weight, which is in its
registers; a cast before the next step would read it again.

Bytes moved, per parameter
    fp32 weights 28 (read w, g, m, v; write w, m, v), 30 with a copy in bf16; bf16 weights and gradients 22; with 8-bit moments
    10. Clipping in a pass of its own would add 4 to 8, weight decay as much, a cast 6.

The kernels
    The tensors are many, and most of them small, so one launch serves all of one kind. A table on the device holds the
    addresses of each tensor; a list says which stretch of which tensor each program works on. The table is copied to the
    device asynchronously when an address changes, which the gradients' seldom do; the list depends only on the sizes. Where a
    tensor's address or size is no multiple of 16 its accesses cannot be wide: those tensors have a launch of their own.
    The byte of a number is not searched for among 256 values. Between powers of ten the table is a straight line, so a
    logarithm gives the place to within one, and two comparisons with midpoints settle it. The codes equal the reference's.

fp32 throughout (fp64 where the moments are), whatever the dtype of w and g; rounded once, when w is written.

Papers: Kingma and Ba 2015, arXiv:1412.6980; decoupled decay: Loshchilov and Hutter 2019, arXiv:1711.05101.
"""

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from minisft.kernels.adamw_formats import (
    STATE_BLOCKSIZE,
    State,
    dequantize_state,
    quantize_state,
    round_stochastically,
    search,
    step_key,
)
from minisft.kernels.common import backend_for, cdiv, jit, tl
from minisft.kernels.copies import copy_was_written, kept_copy
from minisft.kernels.quantize import _absmax, _reciprocal, dynamic_table

CPU_STRETCH = 2**16  # elements of the torch path that are worked on at a time


def adamw_ref(
    params, grads, exp_avgs, exp_avg_sqs, *, step, lr, beta1, beta2, eps, weight_decay, clip=1.0,
    stochastic_rounding_seed=None, places=None, firsts=None
):  # fmt: skip
    """The formulas, one tensor after the other. Arguments as in `adamw_`."""
    places, firsts = places or range(len(params)), firsts or [0] * len(params)
    for place, first, w, g, m_state, v_state in zip(places, firsts, params, grads, exp_avgs, exp_avg_sqs):
        m, v = (
            state if isinstance(state, Tensor) else dequantize_state(state, signed).view(w.shape)
            for state, signed in ((m_state, True), (v_state, False))
        )
        g = g.to(m.dtype) * clip
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g * g)
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
        new = w.to(m.dtype)
        new = new - lr * (weight_decay * new + m_hat / (v_hat.sqrt() + eps))
        if stochastic_rounding_seed is not None and w.dtype == torch.bfloat16:
            new = round_stochastically(new, stochastic_rounding_seed, step, place, first)
        w.copy_(new)
        for state, moment, signed in ((m_state, m, True), (v_state, v, False)):
            if isinstance(state, Tensor):
                state.copy_(moment)
            else:
                codes, absmax = quantize_state(moment, signed)
                state[0].copy_(codes.view(state[0].shape))
                state[1].copy_(absmax)


@jit
def _mix_bits(x):
    """adamw_formats._mix, for uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@jit
def _store_weight(w_ptr, offset, w, first, tensor, step_key, mask, STOCHASTIC: tl.constexpr):
    """w, fp32, rounded to the dtype of w_ptr, by chance if STOCHASTIC. offset: from w_ptr, which is at element `first` of what is
    numbered."""
    if STOCHASTIC:
        key = _mix_bits((step_key ^ tensor).to(tl.uint32))
        random = _mix_bits(_mix_bits((first + offset).to(tl.uint32)) ^ key) & 0xFFFF
        rounded = ((w.to(tl.uint32, bitcast=True) + random) & 0xFFFF0000).to(tl.float32, bitcast=True)
        w = tl.where(w == w, rounded, w)
    tl.store(w_ptr + offset, w.to(w_ptr.dtype.element_ty), mask=mask)


@jit
def _update(w, g, m, v, clip, beta1, one_minus_beta1, beta2, one_minus_beta2, rate, root_correction, eps, decay):
    """The formulas, fp32. rate = lr / (1 - b1^t), root_correction = 1 / sqrt(1 - b2^t), decay = lr wd."""
    g = g * clip
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    w = w - (decay * w + rate * tl.div_rn(m, tl.sqrt_rn(v) * root_correction + eps))
    return w, m, v


@jit
def _tensor_of_program(tensors_ptr, programs_ptr, STRETCH: tl.constexpr, WIDE: tl.constexpr):
    """-> (row in the table of tensors, first element of this program, number of elements up to the tensor's end)."""
    program = programs_ptr + tl.program_id(0).to(tl.int64) * 2
    row = tensors_ptr + tl.load(program) * 10
    first = tl.load(program + 1) * STRETCH
    left = tl.load(row + 6) - first
    if WIDE:
        left = tl.multiple_of(left, 16)
    return row, first, left


@jit
def _pointer(row, column: tl.constexpr, first, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """A pointer to element `first` of one of a tensor's arrays, whose address is in the table."""
    pointer = tl.load(row + column).to(tl.pointer_type(DTYPE)) + first
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _adamw_kernel(
    tensors_ptr,  # int64 [tensors, 10]: addresses of w, g, m, v, two unused; elements; place of the parameter; copy of w; first
    programs_ptr,  # int64 [programs, 2]: row of tensors_ptr, which stretch of that tensor
    clip_ptr,  # fp32 []
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    rate,
    root_correction,
    eps,
    decay,
    step_key,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,  # dtype, or None where there is none
    STOCHASTIC: tl.constexpr,
    WIDE: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A stretch of one tensor a program, BLOCK elements at a time."""
    row, first, left = _tensor_of_program(tensors_ptr, programs_ptr, STRETCH, WIDE)
    w_ptr = _pointer(row, 0, first, PARAM, WIDE)
    g_ptr = _pointer(row, 1, first, GRAD, WIDE)
    m_ptr = _pointer(row, 2, first, tl.float32, WIDE)
    v_ptr = _pointer(row, 3, first, tl.float32, WIDE)
    tensor, numbered = tl.load(row + 7), tl.load(row + 9) + first
    clip = tl.load(clip_ptr).to(tl.float32)
    left = tl.where(clip == clip, left, 0)  # NaN: nothing changes
    for start in range(0, tl.minimum(left, STRETCH).to(tl.int32), BLOCK):
        offset = start + tl.arange(0, BLOCK)
        mask = offset < left
        w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + offset, mask=mask, other=0.0)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0)
        w, m, v = _update(
            w, g, m, v, clip, beta1, one_minus_beta1, beta2, one_minus_beta2, rate, root_correction, eps, decay
        )
        tl.store(m_ptr + offset, m, mask=mask)
        tl.store(v_ptr + offset, v, mask=mask)
        _store_weight(w_ptr, offset, w, numbered, tensor, step_key, mask, STOCHASTIC)
        if COPY is not None:
            tl.store(_pointer(row, 8, first, COPY, WIDE) + offset, w.to(COPY), mask=mask)


@jit
def _nearest_code(scaled, midpoints_ptr, SIGNED: tl.constexpr):
    """The index of the nearest value of the dynamic table; a tie goes down. midpoints_ptr: fp32 [255]"""
    # Decade d holds the 2^d (SIGNED; else 2^(d+1)) centres of equal intervals of [0.1, 1] * 10^(d - 6), and all decades
    # before it one less than that. So a number's place among the positive ones is
    magnitude = tl.abs(scaled)
    decade = tl.floor(tl.log2(tl.maximum(magnitude, 1e-9)) * 0.30102999566) + 7  # log10(2)
    decade = tl.minimum(tl.maximum(decade, 0.0), 6.0)
    place = tl.exp2(decade) * ((magnitude * tl.exp2((6 - decade) * 3.32192809489) + 0.8) / 0.9)  # log2(10)
    if SIGNED:
        place = place.to(tl.int32)
        code = 127 + tl.where(scaled < 0, -place, place)
    else:
        code = (2 * place).to(tl.int32) - 1
    # That is exact but for rounding, and for what lies between a decade's last centre and the next decade's first.
    code = tl.minimum(tl.maximum(code, 1), 254)
    below = tl.load(midpoints_ptr + code - 1)
    above = tl.load(midpoints_ptr + code)
    return tl.where(scaled > above, code + 1, tl.where(scaled > below, code, code - 1))


@jit
def _adamw_8bit_kernel(
    tensors_ptr,  # int64 [tensors, 10]: addresses of w, g, codes of m and v, absmax of m and v; elements; place; copy of w; first
    programs_ptr,  # int64 [programs, 2]: row of tensors_ptr, which stretch of that tensor
    tables_ptr,  # fp32 [4, 256]: values and midpoints of the signed table, values and midpoints of the positive one
    clip_ptr,  # fp32 []
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    rate,
    root_correction,
    eps,
    decay,
    step_key,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    COPY: tl.constexpr,  # dtype, or None where there is none
    STOCHASTIC: tl.constexpr,
    WIDE: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As _adamw_kernel. A BLOCK is several blocks of 256, whose absmax is found on the way."""
    ROWS: tl.constexpr = BLOCK // 256
    row, first, left = _tensor_of_program(tensors_ptr, programs_ptr, STRETCH, WIDE)
    w_ptr = _pointer(row, 0, first, PARAM, WIDE)
    g_ptr = _pointer(row, 1, first, GRAD, WIDE)
    m_ptr = _pointer(row, 2, first, tl.uint8, WIDE)
    v_ptr = _pointer(row, 3, first, tl.uint8, WIDE)
    m_absmax_ptr = _pointer(row, 4, first // 256, tl.float32, False)
    v_absmax_ptr = _pointer(row, 5, first // 256, tl.float32, False)
    tensor, numbered = tl.load(row + 7), tl.load(row + 9) + first
    clip = tl.load(clip_ptr).to(tl.float32)
    left = tl.where(clip == clip, left, 0)
    for start in range(0, tl.minimum(left, STRETCH).to(tl.int32), BLOCK):
        offset = start + tl.arange(0, BLOCK)
        mask = offset < left
        block = start // 256 + tl.arange(0, ROWS)
        exists = block * 256 < left
        w = tl.load(w_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(g_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        m_code = tl.load(m_ptr + offset, mask=mask, other=127).to(tl.int32)  # 127 and 0 are the codes of 0.0
        v_code = tl.load(v_ptr + offset, mask=mask, other=0).to(tl.int32)
        m = tl.load(tables_ptr + m_code).reshape(ROWS, 256)
        v = tl.load(tables_ptr + 512 + v_code).reshape(ROWS, 256)
        m = (m * tl.load(m_absmax_ptr + block, mask=exists, other=0.0)[:, None]).reshape(BLOCK)
        v = (v * tl.load(v_absmax_ptr + block, mask=exists, other=0.0)[:, None]).reshape(BLOCK)
        w, m, v = _update(
            w, g, m, v, clip, beta1, one_minus_beta1, beta2, one_minus_beta2, rate, root_correction, eps, decay
        )
        _store_weight(w_ptr, offset, w, numbered, tensor, step_key, mask, STOCHASTIC)
        if COPY is not None:
            tl.store(_pointer(row, 8, first, COPY, WIDE) + offset, w.to(COPY), mask=mask)
        m, v = m.reshape(ROWS, 256), v.reshape(ROWS, 256)
        m_absmax, v_absmax = _absmax(m), _absmax(v)
        tl.store(m_absmax_ptr + block, m_absmax.reshape(ROWS), mask=exists)
        tl.store(v_absmax_ptr + block, v_absmax.reshape(ROWS), mask=exists)
        m_code = _nearest_code((m * _reciprocal(m_absmax)).reshape(BLOCK), tables_ptr + 256, True)
        v_code = _nearest_code((v * _reciprocal(v_absmax)).reshape(BLOCK), tables_ptr + 768, False)
        v_code = tl.maximum(v_code, tl.where(v.reshape(BLOCK) > 0, 1, 0))
        tl.store(m_ptr + offset, m_code.to(tl.uint8), mask=mask)
        tl.store(v_ptr + offset, v_code.to(tl.uint8), mask=mask)


CONFIGS = {
    "_adamw_kernel": dict(STRETCH=16384, BLOCK=1024, num_warps=8),  # 16 bytes of fp32 a thread
    "_adamw_8bit_kernel": dict(STRETCH=16384, BLOCK=2048, num_warps=8),  # a warp for each 256 numbers
}


def _adamw_torch(
    params, grads, exp_avgs, exp_avg_sqs, *, step, lr, beta1, beta2, eps, weight_decay, clip, stochastic_rounding_seed,
    places, firsts
):  # fmt: skip
    """torch's fused kernel where all is fp32; else the formulas, on a CPU in stretches whose temporaries stay in the cache."""
    for place, start, w, g, m_state, v_state in zip(places, firsts, params, grads, exp_avgs, exp_avg_sqs):
        is_8bit = not isinstance(m_state, Tensor)
        g = g.to(torch.float32 if is_8bit else m_state.dtype).contiguous()
        if clip != 1:
            g = g * clip
        if not is_8bit and w.dtype == m_state.dtype and w.is_contiguous():
            steps = torch.full((), step, dtype=torch.float32, device=w.device)
            options = dict(lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps)
            torch._fused_adamw_([w], [g], [m_state], [v_state], [], [steps], amsgrad=False, maximize=False, **options)
            continue
        for first, w, g, m_state, v_state in _stretches(w, g, m_state, v_state):  # noqa: B020
            m = dequantize_state(m_state, True).view(w.shape) if is_8bit else m_state
            v = dequantize_state(v_state, False).view(w.shape) if is_8bit else v_state
            m.mul_(beta1).add_(g * (1 - beta1))
            v.mul_(beta2).add_((g * g).mul_(1 - beta2))
            update = (v / (1 - beta2**step)).sqrt_().add_(eps)
            update = torch.div(m, update, out=update).mul_(lr / (1 - beta1**step))
            wide = w.to(m.dtype)
            new = wide - update.add_(wide * (lr * weight_decay))
            if stochastic_rounding_seed is not None and w.dtype == torch.bfloat16:
                new = round_stochastically(new, stochastic_rounding_seed, step, place, start + first)
            w.copy_(new)
            if is_8bit:
                for state, moment, signed in ((m_state, m, True), (v_state, v, False)):
                    codes, absmax = quantize_state(moment, signed, search)
                    state[0].copy_(codes.view(state[0].shape))
                    state[1].copy_(absmax)


def _stretches(w: Tensor, g: Tensor, m: State, v: State):
    """Yields (place of the first element, views of the four tensors) for every CPU_STRETCH elements; on a GPU, or if w is
    strided, the whole tensors at once."""
    if w.is_cuda or not w.is_contiguous():
        yield 0, w, g, m, v
        return
    for first in range(0, w.numel(), CPU_STRETCH):
        part = slice(first, first + CPU_STRETCH)
        scales = slice(first // STATE_BLOCKSIZE, (first + CPU_STRETCH) // STATE_BLOCKSIZE)
        states = [s.view(-1)[part] if isinstance(s, Tensor) else (s[0].view(-1)[part], s[1][scales]) for s in (m, v)]
        yield first, w.view(-1)[part], g.view(-1)[part], *states


@cache
def _tables(device: torch.device) -> Tensor:
    """fp32 [4, 256], as _adamw_8bit_kernel takes it."""
    rows = []
    for signed in (True, False):
        table = dynamic_table(signed)
        rows += [table, F.pad((table[1:] + table[:-1]) / 2, (0, 1))]
    return torch.stack(rows).to(device)


@lru_cache(16)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64 [tensors, 10], as the kernels take it. From pinned memory the copy does not wait, and torch keeps that memory until
    it is done."""
    return torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@lru_cache(16)
def _programs(sizes: tuple[int, ...], stretch: int, device: torch.device) -> Tensor:
    """int64 [programs, 2]: the tensor of each program, and which stretch of it. Cached: 16 bytes for 16,384 elements."""
    counts = torch.tensor([cdiv(size, stretch) for size in sizes])
    tensor = torch.arange(len(sizes)).repeat_interleave(counts)
    stretches = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, stretches], 1).to(device)


def _adamw_triton(
    params, grads, exp_avgs, exp_avg_sqs, *, step, lr, beta1, beta2, eps, weight_decay, clip, stochastic_rounding_seed,
    places, firsts
):  # fmt: skip
    device = params[0].device
    clip = clip.to(device) if isinstance(clip, Tensor) else torch.full((), clip, device=device)
    # (8-bit moments?, dtypes of w, g and the copy of w, wide accesses?) -> rows of the table
    launches: dict[tuple, list[tuple[int, ...]]] = {}
    alive = []  # contiguous copies of gradients, until the launch
    for place, first, w, g, m, v in zip(places, firsts, params, grads, exp_avgs, exp_avg_sqs):
        if not w.numel():
            continue
        is_8bit = not isinstance(m, Tensor)
        alive.append(g := g.contiguous())
        arrays = (w, g, m[0], v[0], m[1], v[1]) if is_8bit else (w, g, m, v)
        copy = kept_copy(w)
        addresses = [t.data_ptr() for t in arrays] + [0] * (6 - len(arrays))
        row = (*addresses, w.numel(), place, 0 if copy is None else copy.data_ptr(), first)
        is_wide = not any(x % 16 for x in (*row[:4], w.numel(), row[8]))
        kind = is_8bit, w.dtype, g.dtype, None if copy is None else copy.dtype, is_wide
        launches.setdefault(kind, []).append(row)

    scalars = [beta1, 1 - beta1, beta2, 1 - beta2]  # 1 - beta in fp64: in fp32 it would be off by 1e-5 for 0.999
    scalars += [lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps, lr * weight_decay]
    scalars = [float(x) for x in scalars]
    for (is_8bit, param_dtype, grad_dtype, copy_dtype, is_wide), rows in launches.items():
        kernel = _adamw_8bit_kernel if is_8bit else _adamw_kernel
        config = CONFIGS[kernel.__name__]
        tensors = _table(tuple(rows), device)
        programs = _programs(tuple(row[6] for row in rows), config["STRETCH"], device)
        rounds = stochastic_rounding_seed is not None and param_dtype == torch.bfloat16
        kernel[(len(programs),)](
            *(tensors, programs, *([_tables(device)] if is_8bit else []), clip, *scalars),
            step_key(stochastic_rounding_seed, step) if rounds else 1,
            *(*map(_tl_dtype, (param_dtype, grad_dtype, copy_dtype)), rounds, is_wide),
            enable_fp_fusion=False,  # the same codes as the reference
            **config,
        )


def _tl_dtype(dtype: torch.dtype | None):
    """torch.bfloat16 -> tl.bfloat16; None stays."""
    return None if dtype is None else getattr(tl, str(dtype).removeprefix("torch."))


@torch.no_grad()
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[State],
    exp_avg_sqs: Sequence[State],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: Tensor | float = 1.0,
    stochastic_rounding_seed: int | None = None,
    places: Sequence[int] | None = None,
    firsts: Sequence[int] | None = None,
) -> None:
    """One AdamW step on a list of parameters, in place.

    params: fp32 or bf16, contiguous, any shapes, on one device; the Triton kernel writes the copies that they keep too. grads:
    one for each, in its shape, fp32, bf16 or fp16; not changed.
    exp_avgs, exp_avg_sqs: the moments, zeros before the first step. Each is an fp32 tensor in the shape of its parameter, or
    in 8 bits the pair (codes uint8 in that shape, absmax fp32 [ceil(n / 256)], contiguous); both moments of a parameter alike.
    step: 1 in the first step. clip: what the gradients are multiplied by; NaN: nothing changes. Triton reads a 0-d fp32
    tensor on the device; without it the host waits for that number.
    stochastic_rounding_seed: round bf16 parameters by chance, as a function of this seed, the step, the place of
    the parameter and the element. None: round to nearest. places: the place of each parameter among all that are
    updated in this step; None: 0, 1, 2, ..., for a single call with all of them. firsts: which element of that parameter the
    first one here is, where only some rows of it are here; None: 0.

    fp64 parameters with fp64 moments go through torch. Raises ValueError where lengths or shapes differ, or step is 0.
    """
    if not len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs):
        counts = [len(tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs)]
        raise ValueError(f"adamw_: {counts} parameters, gradients, first and second moments")
    for i, (w, g, *states) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        _check(i, w, g, *states)
    if step < 1:
        raise ValueError(f"adamw_: step {step}: the first one is 1")
    for name, numbers in (("places", places), ("firsts", firsts)):
        if numbers is not None and len(numbers) != len(params):
            raise ValueError(f"adamw_: {len(numbers)} {name} for {len(params)} parameters")
    if not params:
        return
    options = dict(step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, clip=clip)
    options |= dict(stochastic_rounding_seed=stochastic_rounding_seed, places=places or range(len(params)))
    options["firsts"] = firsts or [0] * len(params)
    strided = "" if all(w.is_contiguous() for w in params) else "a parameter that is not contiguous"
    backend = backend_for("adamw", params[0], strided)
    if backend != "triton" and math.isnan(clip := float(clip)):
        return
    options["clip"] = clip
    run = {"reference": adamw_ref, "torch": _adamw_torch, "triton": _adamw_triton}[backend]
    written = [w for w in params if backend == "triton" and w.numel() and kept_copy(w) is not None]
    run(params, grads, exp_avgs, exp_avg_sqs, **options)
    torch.autograd.graph.increment_version(params)  # neither our kernels nor torch's fused one tell autograd
    for w in written:
        copy_was_written(w)


def _check(i: int, w: Tensor, g: Tensor, m: State, v: State) -> None:
    """Raises ValueError where the tensors of parameter i do not fit each other: the kernel would write beyond them."""
    if g.shape != w.shape:
        raise ValueError(f"adamw_: parameter {i}: gradient {tuple(g.shape)} for {tuple(w.shape)}")
    for state in (m, v):
        if isinstance(state, Tensor):
            wanted = torch.promote_types(w.dtype, torch.float32)
            fits = state.shape == w.shape and state.dtype == wanted and state.is_contiguous() == w.is_contiguous()
        else:
            codes, absmax = state
            fits = codes.shape == w.shape and codes.dtype == torch.uint8 and absmax.dtype == torch.float32
            fits = fits and len(absmax) == cdiv(w.numel(), STATE_BLOCKSIZE)
            fits = fits and codes.is_contiguous() and absmax.is_contiguous()
        if not fits or type(m) is not type(v):
            raise ValueError(f"adamw_: parameter {i}: its moments do not fit {w.dtype} {tuple(w.shape)}")
