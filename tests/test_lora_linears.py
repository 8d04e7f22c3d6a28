"""Adapters beside frozen layers, as one op: the formula's values and gradients, whatever shares an input or a factor."""

import pytest
import torch
from tolerance import relative_error, run_with_gradients

from minisft.kernels import linear, lora
from minisft.kernels.common import use_backend
from minisft.kernels.copies import keep_copies
from minisft.kernels.linear import may_add_to
from minisft.kernels.lora import Adapter, lora_linears, lora_linears_ref

BF16 = torch.bfloat16
OUT = 40, 8, 16
# which of the three layers have an adapter, and whether these share A
GROUPS = {"all": ((0, 1, 2), False), "two of three": ((0, 2), False), "one A": ((0, 1, 2), True), "one": ((1,), False)}


def make(group, dtype=torch.float64, bias=False, rank=4):
    """x, the frozen layers, and a function: their adapters by factors, which are leaves."""
    numbers, shares = GROUPS[group]
    normal = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    layers = [(normal(out, 24), normal(out) if bias else None) for out in OUT]
    factors = [normal(rank, 24) for _ in ([0] if shares else numbers)] + [normal(OUT[i], rank) for i in numbers]

    def adapters(*factors):
        As, Bs = factors[: -len(numbers)], factors[-len(numbers) :]
        return [Adapter(i, As[0 if shares else n], B, 0.5 + i) for n, (i, B) in enumerate(zip(numbers, Bs))]

    return normal(3, 7, 24).requires_grad_(), layers, [factor.requires_grad_() for factor in factors], adapters


def same(ours, formula, bound=1e-14):
    assert ours.keys() == formula.keys()
    for name in formula:
        assert relative_error(ours[name], formula[name]) < bound, name


@pytest.mark.parametrize("is_dropped", [False, True], ids=["", "dropped"])
@pytest.mark.parametrize("is_made", [False, True], ids=["", "made"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_equals_the_formula(backend, group, is_made, is_dropped):
    """made: weights are functions, as quantised ones."""
    x, layers, factors, adapters = make(group, bias=not is_made)
    if is_made:
        layers = [(lambda dtype, W=W: W.to(dtype), b) for W, b in layers]

    def run(op):
        def values(x, *factors):
            chosen = adapters(*factors)
            dropped = [(2 + i) * x.roll(i, -1) for i in range(len({a.A for a in chosen}))] if is_dropped else []
            return op(x, layers, chosen, dropped=dropped)

        return run_with_gradients(values, [x, *factors])

    with use_backend(backend):
        ours = run(lora_linears)
    same(ours, run(lora_linears_ref))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_tokens(backend):
    x, layers, factors, adapters = make("all")
    with use_backend(backend):
        result = run_with_gradients(
            lambda x, *factors: lora_linears(x, layers, adapters(*factors)),
            [x.detach()[:, :0].requires_grad_(), *factors],
        )
    assert [result[f"output {i}"].shape for i in range(3)] == [(3, 0, out) for out in OUT]
    assert not any(result[f"gradient of input {i}"].any() for i in range(1 + len(factors)))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_add_up(backend):
    """Three micro-batches, of which the second and third meet the gradients of the first."""
    x, layers, factors, adapters = make("all", torch.float32)

    def run(op):
        for factor in factors:
            factor.grad = None
        for _ in range(3):
            sum(y.square().sum() for y in op(x, layers, adapters(*factors))).backward()
        return {str(i): factor.grad for i, factor in enumerate(factors)}

    with use_backend(backend), keep_copies():
        ours = run(lora_linears)
    same(ours, run(lora_linears_ref), 1e-5)


@pytest.mark.parametrize("is_dropped", [False, True], ids=["", "dropped"])
def test_it_adds_to_a_sum_in_place(is_dropped):
    x, (layer, *_), (A, B), _ = make("one")
    B = torch.randn(40, 4, dtype=torch.float64).requires_grad_()
    total = torch.randn(21, 40, dtype=torch.float64).requires_grad_()

    def ours(total, x, A, B):
        total = total * 1  # no leaf
        assert may_add_to(total)
        (result,) = lora_linears(x, [layer], [Adapter(0, A, B, 1.5)], total=total, **dropped(x))
        assert result is total
        return result

    def formula(total, x, A, B):
        return total + lora_linears_ref(x, [layer], [Adapter(0, A, B, 1.5)], **dropped(x))[0].reshape(21, 40)

    def dropped(x):
        return {"dropped": [3 * x]} if is_dropped else {}

    inputs = [total, x, A, B]
    with use_backend("triton"):
        same(run_with_gradients(ours, inputs), run_with_gradients(formula, inputs))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mixed_precision_loses_no_more_than_twice_what_autocast_does(backend):
    x, layers, factors, adapters = make("all", torch.float32, bias=True)

    def run(op, x, layers, factors, **backend_of):
        return run_with_gradients(lambda x, *factors: op(x, layers, adapters(*factors)), [x, *factors], **backend_of)

    with torch.autocast("cpu", dtype=BF16):
        naive = run(lora_linears_ref, x, layers, factors)
        with use_backend(backend), keep_copies():
            ours = run(lora_linears, x, layers, factors, like=naive)
    wide = lambda t: None if t is None else t.detach().to(BF16).double()  # noqa: E731
    exact_layers = [(wide(W), wide(b)) for W, b in layers]
    exact_factors = [wide(factor).requires_grad_() for factor in factors]
    truth = run(lora_linears_ref, wide(x).requires_grad_(), exact_layers, exact_factors, like=naive)
    for name in truth:
        assert relative_error(ours[name], truth[name]) <= 2 * relative_error(naive[name], truth[name]) + 1e-4, name


def test_frozen_products_and_those_with_a_are_one_each_on_a_gpu(monkeypatch):
    """And their gradients too: of x, of every A. Counted by shape in a backward pass of gradients that lie side by side."""
    x, layers, factors, adapters = make("all", torch.float32)
    shapes = []
    monkeypatch.setattr(
        linear.F, "linear", lambda x, W, b=None, F=linear.F.linear: shapes.append(tuple(W.shape)) or F(x, W, b)
    )
    counted = lambda out, a, b, *rest, P=linear.product_into, **more: (  # noqa: E731
        shapes.append((a.shape[0], b.shape[1])) or P(out, a, b, *rest, **more)
    )
    for module in (linear, lora):
        monkeypatch.setattr(module, "product_into", counted)
    with use_backend("triton"), torch.autocast("cpu", dtype=BF16), keep_copies():
        ys = lora_linears(x, layers, adapters(*factors))
    assert shapes == [(64, 24), (21, 40), (21, 8), (21, 16)]  # the frozen product; B of each layer
    shapes.clear()
    with use_backend("triton"):
        torch.autograd.backward(ys, torch.randn(3, 7, 64).to(BF16).split(OUT, dim=-1))
    # du and dB of each layer, then dA of all
    assert shapes == [(21, 4), (40, 4), (21, 4), (8, 4), (21, 4), (16, 4), (12, 24)]


def test_nothing_of_the_size_of_a_made_weight_is_kept():
    """Only x and u are, where weights are functions."""
    x, layers, factors, adapters = make("all", torch.float32)
    layers = [(lambda dtype, W=W: W.to(dtype), b) for W, b in layers]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        lora_linears(x, layers, adapters(*factors))
    assert sorted(kept) == sorted([(21, 24)] + 3 * [(21, 4)] + [tuple(f.shape) for f in factors])
