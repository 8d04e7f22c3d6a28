"""The Triton kernels of gated_delta_rule, in the interpreter: against the recurrence, in poisoned memory, repeated."""

import pytest
import torch
from test_gated_delta_rule import DTYPES, hold_to_the_recurrence, inputs_of
from tolerance import bounds_of, run_with_gradients

from minisft.kernels import gated_delta_rule as module
from minisft.kernels.common import INTERPRETER, use_backend
from minisft.kernels.gated_delta_rule import gated_delta_rule

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
# Chunks have 16 tokens here, wherever documents begin.
LAYOUTS = {
    "around a chunk": [1, 15, 17, 16, 1, 1],
    "one long": [40],
    "many short": [3, 5, 2, 1, 7, 1, 1],
    "through an edge": [15, 2, 20],
    "one token": [1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_the_recurrence(layout):
    lengths = LAYOUTS[layout]
    hold_to_the_recurrence(lengths, inputs_of(sum(lengths), 1, 1, 8, 20), torch.float32)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "all bf16"])
def test_heads_in_groups(dtype):
    hold_to_the_recurrence([20, 6], inputs_of(26, 1, 2, 20, 5), DTYPES[dtype])


@pytest.mark.parametrize("size", [32, 64])
def test_longer_chunks(size, monkeypatch):
    """Their inverses are made of blocks of 16. Keys that are much alike make what is beside these large."""
    monkeypatch.setitem(module.CHUNK, INTERPRETER, size)
    inputs = inputs_of(size + 3, 1, 1, 4, 4)
    with torch.no_grad():
        inputs[1] += 1.0
        inputs[4].fill_(1.0)
    hold_to_the_recurrence([size + 3], inputs, torch.float32)


@pytest.mark.parametrize("decay, beta", [(0.0, 2.0), (300.0, 0.0)])
def test_the_ends_of_decay_and_beta(decay, beta):
    """NumPy's warning of an overflow, an error here, shows the exponential of a number above 0."""
    inputs = inputs_of(30, 1, 1, 8, 8, decay)
    with torch.no_grad():
        inputs[4].fill_(beta)
    hold_to_the_recurrence([20, 10], inputs, torch.float32)


def test_a_strong_decay_among_weak_ones():
    inputs = inputs_of(20, 1, 1, 8, 8, 0.01)
    with torch.no_grad():
        inputs[3][10] = -3000.0
    hold_to_the_recurrence([20], inputs, torch.float32)


def test_without_norms():
    inputs = [0.3 * x.detach() for x in inputs_of(30, 1, 1, 8, 8)]
    inputs = [x.requires_grad_() for x in inputs]
    hold_to_the_recurrence([30], inputs, torch.float32, normalize=False, scale=2.0)


@pytest.mark.parametrize("other", [0, 1, 2, 3])
def test_a_document_does_not_see_its_neighbours(other):
    lengths = [10, 20, 3, 4]
    start, end = bounds_of(lengths)
    inputs = inputs_of(37, 1, 1, 8, 4)
    changed = [x.detach().clone() for x in inputs]
    own = start == sum(lengths[:other])
    for x, factor in zip(changed, (1e4, -1e4, 1e4, 30, -1)):
        x[own] *= factor
    op = lambda *x: gated_delta_rule(*x, start, end)  # noqa: E731
    one, two = (run_with_gradients(op, [x.detach().requires_grad_() for x in tensors]) for tensors in (inputs, changed))
    for name in one:
        assert torch.equal(one[name][~own], two[name][~own]), name
        assert not torch.equal(one[name], two[name])


def test_repeats_bitwise_and_strides_change_nothing():
    inputs, bounds = inputs_of(25, 1, 1, 8, 8), bounds_of([18, 7])
    op = lambda *x: gated_delta_rule(*x, *bounds)  # noqa: E731
    first, again = (run_with_gradients(op, inputs) for _ in range(2))
    copy = run_with_gradients(op, [x.detach().clone().requires_grad_() for x in inputs])
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], copy[name]) for name in first)


def test_the_state_is_that_of_the_torch_path():
    inputs, bounds = [x.detach() for x in inputs_of(20, 1, 2, 8, 8)], bounds_of([13, 7])
    ours = gated_delta_rule(*inputs, *bounds, return_state=True)
    with use_backend("torch"):
        theirs = gated_delta_rule(*inputs, *bounds, return_state=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
