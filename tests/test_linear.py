"""Linear layers in mixed precision: the formula's values and gradients, one after another, with copies that are never stale."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import relative_error

from minisft import optimizers, runtime, update
from minisft.kernels import linear as module
from minisft.kernels.common import use_backend
from minisft.kernels.copies import keep_copies, keep_copy, kept_copy, weight_as
from minisft.kernels.linear import add_linear, linears, linears_ref, may_add_to, side_by_side
from minisft.parameters import parameter_groups

BF16 = torch.bfloat16


def layers_of(dtype=torch.float32, bias=True):
    make = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    return [(make(out, 24), make(out) if bias else None) for out in (40, 8, 16)]


def values_and_gradients(function, x, layers, probes, times=1):
    """y of each layer, and the gradients of x, weights and biases, added up over `times` backward passes."""
    x = x.detach().requires_grad_()
    leaves = [x, *(t for layer in layers for t in layer if t is not None)]
    for leaf in leaves:
        leaf.grad = None
    for _ in range(times):
        ys = function(x, *layers)
        torch.autograd.backward(ys, [p.to(y.dtype) for p, y in zip(probes, ys)])
    return [*ys, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_formula(backend, bias, times, monkeypatch):
    """In fp64 to the last digits, whether a gradient is there already or not."""
    monkeypatch.setattr(module, "BLOCK_ROWS", 8)
    layers, x = layers_of(torch.float64, bias), torch.randn(3, 7, 24, dtype=torch.float64)
    probes = [torch.randn(3, 7, len(weight), dtype=torch.float64) for weight, _ in layers]
    expected = values_and_gradients(linears_ref, x, layers, probes, times)
    with use_backend(backend):
        got = values_and_gradients(linears, x, layers, probes, times)
    for ours, theirs in zip(got, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-14


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)], ids=str)
def test_no_tokens(backend, shape):
    layers, x = layers_of(), torch.randn(shape)
    with use_backend(backend):
        *ys, dx, dW = values_and_gradients(linears, x, layers, [torch.ones(*shape[:-1], len(W)) for W, _ in layers])[:5]
        assert [y.shape for y in ys] == [(*shape[:-1], len(W)) for W, _ in layers]
        assert dx.shape == shape and not dW.any()
        if backend == "triton":
            add_linear(total := torch.randn(0, 40), x, layers[0][0])
            assert total.shape == (0, 40)


@pytest.mark.parametrize("rows", [32, 100, 160])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_a_transposed_factor_is_copied_in_strips(rows, is_transposed, monkeypatch):
    """As where a CPU has AMX: whole strips of 32 columns, and what is left, give the same sums, of whole numbers here."""
    monkeypatch.setattr(module, "HAS_AMX", True)
    monkeypatch.setattr(module, "WIDE", 8)
    monkeypatch.setattr(module, "BLOCK_ROWS", 64)
    calls, transposed = [], module.transposed
    monkeypatch.setattr(module, "transposed", lambda x: calls.append(x.shape) or transposed(x))
    wider = torch.randint(-8, 8, (40, rows + 3)).to(BF16)
    a, b = wider[:, :rows].T, torch.randint(-8, 8, (40, 8)).to(BF16)
    a = a if is_transposed else a.contiguous()
    out = torch.ones(rows, 8)
    module.product_in_blocks(out, a, b, add=True)
    assert torch.equal(out, 1 + (a @ b).float())
    whole = [(40, min(64, rows - i)) for i in range(0, rows, 64) if min(64, rows - i) % 32 == 0]
    assert calls == (whole if is_transposed else [])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_mixed_precision_loses_less_than_autocast(backend, monkeypatch):
    """Three micro-batches of bf16 products: dW is added up in fp32, and rounded to bf16 once a product on a CPU, never where
    the product has an fp32 result. Values are autocast's to the last bit."""
    monkeypatch.setattr(module, "BLOCK_ROWS", 8)
    layers, x = layers_of(), torch.randn(50, 24)
    probes = [torch.randn(50, len(weight)) for weight, _ in layers]
    exact_layers = [(w.detach().to(BF16).double(), b.detach().double()) for w, b in layers]
    for tensor in sum(exact_layers, ()):
        tensor.requires_grad_()
    exact_inputs = x.to(BF16).double(), exact_layers, [p.to(BF16).double() for p in probes]
    truth = values_and_gradients(linears_ref, *exact_inputs, 3)

    def autocast(function):
        def run(*inputs):
            with torch.autocast("cpu", dtype=BF16), keep_copies():
                return function(*inputs)

        return run

    theirs = values_and_gradients(autocast(linears_ref), x, layers, probes, 3)
    with use_backend(backend):
        ours = values_and_gradients(autocast(linears), x, layers, probes, 3)
    for a, b in zip(ours[:3], theirs[:3]):
        assert a.dtype == BF16 and torch.equal(a, b)
    for a, b, exact in zip(ours[3:], theirs[3:], truth[3:]):
        assert a.dtype == torch.float32
        assert relative_error(a, exact) <= 1.05 * relative_error(b, exact)
    if backend == "triton":  # fp32 sums of products of bf16 numbers
        assert all(relative_error(a, exact) < 1e-6 for a, exact in zip(ours[4::2], truth[4::2]))


def test_a_weight_keeps_its_copy_until_it_changes():
    weight = torch.randn(5, 4, requires_grad=True)
    assert kept_copy(weight) is None
    alone = weight_as(weight, BF16)
    assert kept_copy(weight) is None and weight_as(weight, BF16) is not alone  # nobody keeps it
    with keep_copies():
        copy = weight_as(weight, BF16)
        assert weight_as(weight, BF16) is copy is kept_copy(weight)
        with torch.no_grad():
            weight.mul_(2)
        assert kept_copy(weight) is None
        again = weight_as(weight, BF16)
        assert torch.equal(again, weight.detach().to(BF16)) and again.data_ptr() == copy.data_ptr()  # no new memory

        before, weight.data = (
            weight.data,
            torch.randn(5, 4),
        )  # other values for a while: their own copy, and ours afterwards
        with torch.autocast("cpu", dtype=BF16, cache_enabled=False):
            assert torch.equal(weight_as(weight, BF16), weight.detach().to(BF16))
        weight.data = before
        assert kept_copy(weight) is again and torch.equal(again, weight.detach().to(BF16))
        assert weight_as(weight, torch.float16).dtype == torch.float16


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("name", optimizers.RULES)
def test_no_optimizer_leaves_a_stale_copy(name, in_backward):
    """After every update the products are those of the new weights."""
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24))
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.1)
    optimizer = optimizers.build_optimizer(name, groups, betas=(0.9, 0.99), eps=1e-8)
    x = torch.randn(9, 24)

    def forward(function):
        with runtime.autocast(torch.device("cpu"), "bf16"):
            y = x
            for layer in model:
                (y,) = function(y, (layer.weight, layer.bias))
            return y

    for _ in range(3):
        with (
            update.update_in_backward(model.parameters(), optimizer, update.ZeroUpdates(set()))
            if in_backward
            else torch.enable_grad()
        ):
            forward(linears).float().square().sum().backward()
        if not in_backward:
            update.clip_and_update(optimizer, update.gradients(model), torch.tensor(1.0), 0.5, torch.zeros(2))
            optimizer.zero_grad()
        with torch.no_grad():
            assert torch.equal(forward(linears), forward(lambda x, layer: [F.linear(x, *layer)]))


def test_a_weight_that_changes_before_the_backward_is_noticed():
    (weight, _), x = layers_of(bias=False)[0], torch.randn(4, 24, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16), keep_copies():
        (y,) = linears(x, (weight, None))
        with torch.no_grad():
            weight.add_(1)
        linears(x, (weight, None))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_layers_side_by_side_are_one_product(accumulated, dtype, monkeypatch):
    """On a GPU: one product each for y, dx and all dW, with the results of three; the copies stay their weights' own.
    Weights that are multiplied as they are lie in one buffer from then on."""
    layers, x = layers_of(dtype), torch.randn(50, 24)
    values = [t.detach().clone() for t in sum(layers, ())]
    probe = torch.randn(50, 64, dtype=BF16)
    launches, product = [], module.product_into

    def counted(out, *arguments, **options):
        launches.append(tuple(out.shape))
        product(out, *arguments, **options)

    monkeypatch.setattr(module, "product_into", counted)

    def run(apart):
        x_leaf = x.clone().requires_grad_()
        for tensor in sum(layers, ()):
            tensor.grad = None
            if hasattr(tensor, "_copy"):
                del tensor._copy
        for _ in range(accumulated):
            with torch.autocast("cpu", dtype=BF16), keep_copies():
                ys = [linears(x_leaf, layer)[0] for layer in layers] if apart else linears(x_leaf, *layers)
            # gradients that lie side by side, as attention and gated units give them
            torch.autograd.backward(ys, probe.clone().split([40, 8, 16], dim=1))
        return [*ys, x_leaf.grad, *(t.grad for layer in layers for t in layer)]

    with use_backend("triton"):
        apart, together = run(True), run(False)
    assert sorted(launches[: 3 * accumulated]) == sorted([(40, 24), (8, 24), (16, 24)] * accumulated)
    assert launches[3 * accumulated :] == [(64, 24)] * accumulated
    for a, b in zip(together, apart, strict=True):
        assert relative_error(a, b) < (2**-8 if a.dtype == BF16 or a.shape == x.shape else 1e-6)
    assert all(torch.equal(t, value) and t.is_contiguous() for t, value in zip(sum(layers, ()), values))
    for tensors in zip(*layers):
        if dtype == BF16:
            assert not any(hasattr(t, "_copy") for t in tensors)
            assert side_by_side([t.detach().view(len(t), -1) for t in tensors], 0) is not None
        else:
            assert all(torch.equal(kept_copy(t), t.detach().to(BF16)) for t in tensors)
    with keep_copies(), torch.no_grad():
        layers[1][0].mul_(2)
        with torch.autocast("cpu", dtype=BF16), use_backend("triton"):
            assert torch.equal(linears(x, *layers)[1], F.linear(x.to(BF16), *(t.to(BF16) for t in layers[1])))


def test_what_lies_side_by_side():
    x = torch.randn(6, 10)
    assert side_by_side(x.split([4, 1, 5], dim=1), 1).equal(x) and side_by_side(x.split([1, 3, 2]), 0).equal(x)
    part = side_by_side(x.split([4, 1, 5], dim=1)[:2], 1)
    assert part.equal(x[:, :5]) and part.data_ptr() == x.data_ptr()
    for parts in ([x[:, :4], x[:, 5:]], [x[:, 4:], x[:, :4]], [x[:, :4], None], [x[:, :4], x.clone()[:, 4:]], [x]):
        assert side_by_side(parts, 1) is None
    assert side_by_side([x[:2], x[:2]], 0) is None and side_by_side([x[0:2, :4], x[2:4, :4]], 0) is not None


# ---- a product that adds to the residual stream -------------------------------------------------------------------


def stream_and_gradients(add, total, x, weight, probe, times=1):
    """total + x W^T, and the gradients of the three, of the weight added up over `times` backward passes."""
    leaves = [t.detach().requires_grad_() for t in (total, x, weight)]
    for _ in range(times):
        leaves[0].grad = leaves[1].grad = None
        result = leaves[0] * 1  # no leaf
        result = add(result, *leaves[1:])
        result.backward(probe)
    return [result.detach(), *(leaf.grad for leaf in leaves)]


def added(total, x, weight):
    assert may_add_to(total)
    place = total.data_ptr()
    add_linear(total, x, weight)
    assert total.data_ptr() == place
    return total


@pytest.mark.parametrize("times", [1, 3])
def test_a_product_adds_in_place(times):
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((21, 40), (21, 24), (40, 24), (21, 40))]
    expected = stream_and_gradients(lambda total, x, W: total + F.linear(x, W), *inputs, times)
    with use_backend("triton"):
        got = stream_and_gradients(added, *inputs, times)
    for ours, theirs in zip(got, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-14


def test_what_a_product_adds_is_not_rounded_to_its_dtype():
    """bf16 factors, fp32 sum: what a cast of the product would lose, 2^-9 of it, is there."""
    total, x, weight = torch.zeros(21, 40), torch.randn(21, 24), torch.randn(40, 24)
    with use_backend("triton"), torch.autocast("cpu", dtype=BF16):
        add_linear(total, x, weight)
    assert relative_error(total, x.to(BF16).double() @ weight.to(BF16).double().T) < 1e-6


@pytest.mark.parametrize("change", ["none", "in place", "another tensor"])
def test_a_copy_of_the_gradient_is_read_as_long_as_it_is_one(change, monkeypatch):
    """The norm behind the sum leaves its gradient a copy in bf16 (here it is the gradient's double, to tell them apart). A hook
    that changes the gradient, in place or not, makes it stale."""

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            dx = dx.clone()
            keep_copy(dx, 2 * dx.to(BF16))
            return dx

    total, x, weight = torch.randn(21, 40), torch.randn(21, 24).requires_grad_(), torch.randn(40, 24)
    with use_backend("triton"), torch.autocast("cpu", dtype=BF16):
        add_linear(total, x, weight)
    if change != "none":
        total.register_hook(lambda g: g.mul_(3) if change == "in place" else g * 3)
    Norm.apply(total).sum().backward()
    factor = 2 if change == "none" else 3
    assert relative_error(x.grad, factor * weight.to(BF16).float().sum(0).expand(21, 24)) < 2**-8


def test_what_no_product_may_add_to():
    leaf = torch.randn(6, 4, requires_grad=True)
    with use_backend("triton"):
        assert may_add_to(torch.randn(6, 4)) and may_add_to(leaf * 2)
        assert not may_add_to(leaf) and not may_add_to((leaf * 2)[:3])
    for backend in ("torch", "reference", "auto"):
        with use_backend(backend):
            assert not may_add_to(torch.randn(6, 4))  # on a CPU
