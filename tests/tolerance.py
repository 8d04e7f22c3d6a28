"""How a fast op is held to its reference, and the awkward document layouts that it is held to it on.

The rule: with the error of a tensor defined as norm(a - b) / norm(b),

    error(fast op, truth) <= 2 x error(plain torch in the same dtype, truth) + a tiny floor

for the output and for every gradient. The truth is the reference in fp64 on the same, already rounded numbers. So a
bound is never a number that somebody liked: it is twice what the obvious code loses in that dtype. The floor is for the
cases where the obvious code happens to lose nothing at all.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOOR = {torch.float64: 1e-14, torch.float32: 2e-7, torch.float16: 2e-5, torch.bfloat16: 1e-4}

# Lengths of the documents of one packed row. Tiles of the kernels are 64 or 128 tokens.
LAYOUTS = {
    "one_token": [1],
    "one_63": [63],
    "one_1000": [1000],
    "ones": [1, 1, 1, 1, 1],
    "inside_tiles": [100, 1, 63, 205, 2, 37],
    "on_tile_edges": [64, 128, 64, 128],
    "filler_tail": [150, 63, 70] + [1] * 37,
    "long_then_short": [300, 1, 2, 3, 65, 1],
}


def cu_seqlens_of(lengths: Sequence[int]) -> Tensor:
    """[3, 1] -> int32 [0, 3, 4]."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def bounds_of(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """[3, 1] -> start [0, 0, 0, 3] and end [3, 3, 3, 4], int32."""
    cu, counts = cu_seqlens_of(lengths), torch.tensor(lengths)
    return cu[:-1].repeat_interleave(counts), cu[1:].repeat_interleave(counts)


def shared_prompts(items: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """Prompts, each with answers that see it and not each other: [(3, 2, 4), (5,)] is a prompt of 3 tokens, its answers of
    2 and 4, and a plain document of 5.

    Returns start and end, int32 [T]; and what tells the same without sharing: copies, the tokens of whole documents prompt +
    answer side by side; where [T], the place of every token among the copies (of a prompt's: in its first copy); and the
    lengths of these documents. A gradient through x[copies] is the sum over the copies.
    """
    start, end, copies, lengths = [], [], [], []
    for prompt, *answers in items:
        a = len(start)
        first = a + prompt
        b = first + sum(answers)
        start += [a] * (b - a)
        end += [b] * prompt
        for n in answers or [0]:
            end += [first + n] * n
            copies += [*range(a, a + prompt), *range(first, first + n)]
            lengths.append(prompt + n)
            first += n
    where = [copies.index(token) for token in range(len(start))]
    return torch.tensor(start).int(), torch.tensor(end).int(), torch.tensor(copies), torch.tensor(where), lengths


def padded_with_nan(x: Tensor) -> Tensor:
    """x as a view into a larger buffer of NaN: a read beyond its end, or over the end of a row, shows.

    The last dimension stays contiguous, the strides of the others grow.
    """
    buffer = x.new_full([n + 3 for n in x.shape[:-1]] + [x.shape[-1] + 8], float("nan"))
    view = buffer[tuple(slice(1, n + 1) for n in x.shape[:-1]) + (slice(0, x.shape[-1]),)]
    return view.copy_(x)


def relative_error(a: Tensor, b: Tensor) -> float:
    """norm(a - b) / norm(b) in fp64; norm(a) where b is zero; inf where a is not finite."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape, f"shape {tuple(a.shape)} against {tuple(b.shape)}"
    if not a.isfinite().all():
        return float("inf")
    scale = b.norm().item()
    return (a - b).norm().item() / (scale if scale > 0 else 1.0)


def run_with_gradients(op: Callable, inputs: Sequence, seed: int = 1, like: dict | None = None) -> dict[str, Tensor]:
    """Runs `op(*inputs)` and a backward pass from random output gradients.

    The leaves are the floating tensors in `inputs` that require a gradient, detached, strides kept. Returns every
    output ("output 0") and every gradient ("gradient of input 2"). The output gradients are rounded to the dtypes of
    the outputs in `like`, another result of this function, so that two runs in different precision start from the same
    numbers.
    """
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x for x in inputs]
    outputs = op(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    result = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    generator = torch.Generator().manual_seed(seed)
    upstream = {}
    for name, out in zip(list(result), outputs):
        if out.requires_grad:
            gradient = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            upstream[out] = gradient.to((like or result)[name].dtype).to(out)
    torch.autograd.backward(list(upstream), list(upstream.values()))
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad is not None, f"input {i} got no gradient"
            result[f"gradient of input {i}"] = leaf.grad
    return result


def assert_close_to_truth(
    fast: Callable,
    reference: Callable,
    inputs: Sequence,
    dtype: torch.dtype | Sequence[torch.dtype],
    *,
    floor: float | None = None,
) -> dict[str, tuple[float, float]]:
    """Holds `fast` to `reference` by the rule of this module, for every output and every gradient.

    inputs: the positional arguments of both; floating tensors are cast to `dtype` (one for all, or one per input), the
    rest is passed as it is. Those with requires_grad get their gradient checked. A strided view stays one.
    Returns {"output 0": (error of fast, error of plain torch), ...}.
    """
    dtypes = [dtype] * len(inputs) if isinstance(dtype, torch.dtype) else list(dtype)
    if floor is None:
        floor = max(FLOOR[d] for d in dtypes)

    def cast(x, to):
        floating = isinstance(x, Tensor) and x.is_floating_point()
        if not floating:
            return x
        cast = x.detach().to(to)
        if cast.stride() != x.stride():  # a view into NaN stays one in another dtype
            cast = (
                torch.full((x.untyped_storage().nbytes() // x.element_size(),), float("nan"), dtype=to, device=x.device)
                .as_strided(x.shape, x.stride(), x.storage_offset())
                .copy_(cast)
            )
        return cast.requires_grad_(x.requires_grad)

    rounded = [cast(x, d) for x, d in zip(inputs, dtypes)]
    plain = run_with_gradients(reference, rounded)
    truth = run_with_gradients(reference, [cast(x, torch.float64) for x in rounded], like=plain)
    ours = run_with_gradients(fast, rounded, like=plain)
    assert ours.keys() == plain.keys()

    errors = {}
    for name, exact in truth.items():
        assert ours[name].dtype == plain[name].dtype, f"{name}: {ours[name].dtype}, expected {plain[name].dtype}"
        errors[name] = relative_error(ours[name], exact), relative_error(plain[name], exact)
        error, bound = errors[name][0], 2 * errors[name][1] + floor
        assert error <= bound, f"{name}: error {error:.3e} > {bound:.3e}; {_worst(ours[name], exact, plain[name])}"
    return errors


def _worst(ours: Tensor, exact: Tensor, plain: Tensor) -> str:
    gap = (ours.double() - exact.double()).abs().nan_to_num(nan=float("inf"))
    i = gap.argmax().item()
    at = tuple(int(n) for n in torch.unravel_index(torch.tensor(i), gap.shape))
    values = [f"{x.flatten()[i].item():.6g}" for x in (ours, exact, plain)]
    return f"worst element {at}: {values[0]}, truth {values[1]}, plain torch {values[2]}"
