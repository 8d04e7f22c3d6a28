"""The Triton kernels of causal_conv1d, in the interpreter: against the formula, in poisoned memory, repeated."""

import pytest
import torch
from test_causal_conv1d import hold_to_the_formula, inputs_of
from tolerance import LAYOUTS, bounds_of, run_with_gradients

from minisft.kernels.causal_conv1d import causal_conv1d

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bf16, weights fp32": [torch.bfloat16, torch.float32, torch.float32],
}


@pytest.mark.covers(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["one_63", "ones", "filler_tail"])
def test_against_the_formula(layout, dtype):
    lengths = [n % 29 + 1 for n in LAYOUTS[layout]]
    hold_to_the_formula(lengths, inputs_of(sum(lengths), 20, 4), DTYPES[dtype], "silu")


@pytest.mark.covers(2)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_sizes_and_options(K, bias, activation):
    hold_to_the_formula([20, 1, 2, 3, 13], inputs_of(39, 9, K, bias), torch.float32, activation)


@pytest.mark.parametrize("value", [1e30, float("nan")])
def test_a_document_does_not_see_its_neighbours(value):
    start, _ = bounds_of([11, 2, 17])
    x, weight, bias = inputs_of(30, 20, 4)
    changed, own = x.detach().clone(), start == 11
    changed[own] = value
    op = lambda x: causal_conv1d(x, weight.detach(), bias.detach(), start, activation="silu")  # noqa: E731
    one, two = (run_with_gradients(op, [tensor.detach().requires_grad_()]) for tensor in (x, changed))
    assert all(torch.equal(one[name][~own], two[name][~own]) for name in one)


def test_frozen_weights_strides_and_repetition_change_nothing():
    start, _ = bounds_of([9, 12])
    inputs = inputs_of(21, 8, 4)
    op = lambda *tensors: causal_conv1d(*tensors, start, activation="silu")  # noqa: E731
    first, again = (run_with_gradients(op, inputs) for _ in range(2))
    copy = run_with_gradients(op, [x.detach().clone().requires_grad_() for x in inputs])
    frozen = run_with_gradients(op, [inputs[0], *(x.detach() for x in inputs[1:])])
    apart = run_with_gradients(op, [x.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for x in inputs])
    assert all(torch.equal(first[name], other[name]) for other in (again, copy, frozen, apart) for name in other)
    assert set(first) - set(frozen) == {"gradient of input 1", "gradient of input 2"}


def test_more_weights_than_the_kernels_take_are_refused_by_name():
    with pytest.raises(ValueError, match="5 weights a channel, .* at most 4"):
        causal_conv1d(torch.ones(3, 2), torch.ones(2, 5), None, torch.zeros(3, dtype=torch.int32))
