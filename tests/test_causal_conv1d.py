"""causal_conv1d on the torch path: against the formula and torch's convolution, packed, in slabs and step by step."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import LAYOUTS, assert_close_to_truth, bounds_of, padded_with_nan, run_with_gradients

from minisft.kernels import causal_conv1d as module
from minisft.kernels.causal_conv1d import causal_conv1d, causal_conv1d_ref, causal_conv1d_update, conv_state
from minisft.kernels.common import use_backend

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """16 or so tokens each, so that a test has many."""
    monkeypatch.setattr(module, "SLAB", 400)


def inputs_of(tokens: int, C: int, K: int, bias: bool = True) -> list:
    tensors = [torch.randn(tokens, C), torch.randn(C, K), torch.randn(C)]
    leaves = [padded_with_nan(x).requires_grad_() for x in tensors]
    return leaves if bias else [*leaves[:2], None]


def hold_to_the_formula(lengths, inputs, dtype, activation):
    start, _ = bounds_of(lengths)
    return assert_close_to_truth(
        lambda *tensors: causal_conv1d(*tensors, start, activation=activation),
        lambda *tensors: causal_conv1d_ref(*tensors, start, activation=activation),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_formula(layout, dtype):
    hold_to_the_formula(LAYOUTS[layout], inputs_of(sum(LAYOUTS[layout]), 24, 4), DTYPES[dtype], "silu")


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K", [1, 2, 3, 4, 7])
def test_sizes_and_options(K, bias, activation):
    dtypes = [torch.bfloat16, torch.float32, torch.float32]  # weights in fp32 beside activations in bf16
    hold_to_the_formula([40, 1, 2, 3, 57], inputs_of(103, 9, K, bias), dtypes, activation)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_each_document_is_torchs_convolution(backend):
    lengths = [70, 3, 1, 50]
    inputs = inputs_of(124, 10, 4)
    x, weight, bias = (tensor.detach() for tensor in inputs)
    with use_backend(backend):
        ours = causal_conv1d(x, weight, bias, bounds_of(lengths)[0])
    for document, out in zip(x.split(lengths), ours.split(lengths)):
        padded = F.pad(document.T, (3, 0))[None]
        torch.testing.assert_close(out, F.conv1d(padded, weight[:, None], bias, groups=10)[0].T)


def test_gradcheck():
    start, _ = bounds_of([5, 1, 20])
    inputs = [x.detach().double().requires_grad_() for x in inputs_of(26, 2, 3)]
    assert torch.autograd.gradcheck(lambda *tensors: causal_conv1d(*tensors, start, activation="silu"), inputs)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("value", [1e30, float("inf"), float("nan")])
def test_a_document_does_not_see_its_neighbours(value, backend):
    start, _ = bounds_of([20, 2, 37])
    x, weight, bias = inputs_of(59, 20, 4)
    with use_backend(backend):
        for other in (0, 20, 22):
            changed, own = x.detach().clone(), start == other
            changed[own] = value
            one, two = (
                run_with_gradients(
                    lambda x: causal_conv1d(x, weight.detach(), bias.detach(), start, activation="silu"),
                    [tensor.detach().requires_grad_()],
                )
                for tensor in (x, changed)
            )
            assert all(torch.equal(one[name][~own], two[name][~own]) for name in one)


def test_frozen_weights_get_no_gradient_and_change_nothing():
    start, _ = bounds_of([30, 20])
    inputs = inputs_of(50, 8, 4)
    whole = run_with_gradients(lambda *tensors: causal_conv1d(*tensors, start, activation="silu"), inputs)
    frozen = [inputs[0], *(x.detach() for x in inputs[1:])]
    alone = run_with_gradients(lambda *tensors: causal_conv1d(*tensors, start, activation="silu"), frozen)
    assert torch.equal(whole["gradient of input 0"], alone["gradient of input 0"])
    assert set(whole) - set(alone) == {"gradient of input 1", "gradient of input 2"}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_steps_continue_a_prefill(K, activation):
    """Documents to their last three tokens, then these one by one, give the longer prefill; the short ones began with zeros."""
    lengths = [20, 4, 5, 1 + 3]
    x, weight, bias = (tensor.detach() for tensor in inputs_of(33, 6, K))
    documents = torch.arange(33).split(lengths)
    whole = causal_conv1d(x, weight, bias, bounds_of(lengths)[0], activation=activation)
    tokens = torch.cat([document[:-3] for document in documents])
    state = conv_state(x[tokens], *bounds_of([n - 3 for n in lengths]), K)
    assert state.shape == (4, 6, K - 1)
    for i in range(-3, 0):
        tokens = torch.stack([document[i] for document in documents])
        out, state = causal_conv1d_update(x[tokens], state, weight, bias, activation)
        torch.testing.assert_close(out, whole[tokens])
    assert torch.equal(state, conv_state(x, *bounds_of(lengths), K))


def test_the_state_is_the_last_inputs():
    x = torch.arange(1.0, 9)[:, None]
    state = conv_state(x, *bounds_of([5, 1, 2]), 4)
    assert state[:, 0].tolist() == [[3, 4, 5], [0, 0, 6], [0, 7, 8]]


def test_no_tokens():
    nothing = torch.empty(0, dtype=torch.int32)
    inputs = [torch.empty(0, 6).requires_grad_(), *inputs_of(1, 6, 4)[1:]]
    for backend in ("torch", "reference"):
        with use_backend(backend):
            result = run_with_gradients(lambda *tensors: causal_conv1d(*tensors, nothing), inputs)
        assert result["output 0"].shape == (0, 6) and torch.equal(result["gradient of input 1"], torch.zeros(6, 4))
    assert conv_state(inputs[0], nothing, nothing, 4).shape == (0, 6, 3)


def test_what_does_not_fit_is_refused():
    x, weight, bias = (tensor.detach() for tensor in inputs_of(5, 6, 4))
    start, _ = bounds_of([5])
    for wrong, message in [
        (dict(weight=weight[:5]), "expected"),
        (dict(bias=bias[:5]), "expected"),
        (dict(x=x[None]), "expected"),
        (dict(start=start[:4]), "5 integers"),
        (dict(start=start.float()), "5 integers"),
        (dict(activation="gelu"), "'gelu'"),
    ]:
        with pytest.raises(ValueError, match=message):
            causal_conv1d(**dict(x=x, weight=weight, bias=bias, start=start) | wrong)
    with pytest.raises(ValueError, match="state"):
        causal_conv1d_update(x, torch.zeros(5, 6, 4), weight, bias)
