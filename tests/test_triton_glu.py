"""The Triton kernels of the gated linear units, in the interpreter: tiles, fused projections, extremes."""

import pytest
import torch
from tolerance import assert_close_to_truth, padded_with_nan, run_with_gradients

from minisft.kernels.common import use_backend
from minisft.kernels.glu import geglu, geglu_ref, swiglu, swiglu_ref

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
UNITS = {
    "swiglu": (swiglu, swiglu_ref),
    "geglu tanh": (geglu, geglu_ref),
    "geglu erf": (lambda g, u=None: geglu(g, u, "none"), lambda g, u=None: geglu_ref(g, u, "none")),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# A single element; rows of one tile that is not full; several tiles a row with a ragged last one; three dimensions.
SHAPES = [(1, 1), (40, 48), (3, 5000), (2, 3, 2048)]


def leaf(*shape):
    return padded_with_nan(2 * torch.randn(*shape)).requires_grad_()


@pytest.mark.covers(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape, unit, dtype):
    assert_close_to_truth(*UNITS[unit], [leaf(*shape), leaf(*shape)], DTYPES[dtype])


@pytest.mark.covers(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", [(15, 200), (4, 9000), (5, 2), (2, 3, 8)], ids=str)
def test_contiguous_tensors_and_fused_ones(shape, unit, dtype):
    """Contiguous tensors are one long row to the kernels, a fused projection given as a whole is two views."""
    fused = 2 * torch.randn(*shape)
    halves = [x.contiguous().requires_grad_() for x in fused.chunk(2, dim=-1)]
    assert_close_to_truth(*UNITS[unit], halves, DTYPES[dtype])
    assert_close_to_truth(*UNITS[unit], [padded_with_nan(fused).requires_grad_()], DTYPES[dtype])


@pytest.mark.parametrize("unit", UNITS)
def test_repeats_bitwise_and_views_change_nothing(unit):
    op, fused = UNITS[unit][0], torch.randn(13, 64)
    views = [x.requires_grad_() for x in fused.chunk(2, dim=-1)]
    separate = [x.detach().clone().contiguous().requires_grad_() for x in views]
    apart = [torch.empty(13, 64)[:, ::2].copy_(x.detach()).requires_grad_() for x in views]
    first = run_with_gradients(op, views)
    for inputs in (views, separate, apart):
        again = run_with_gradients(op, inputs)
        assert all(torch.equal(first[name], again[name]) for name in first)
    whole = run_with_gradients(op, [fused.clone().requires_grad_()])
    gradients = torch.cat([first["gradient of input 0"], first["gradient of input 1"]], dim=-1)
    assert torch.equal(whole["output 0"], first["output 0"])
    assert torch.equal(whole["gradient of input 0"], gradients)


@pytest.mark.parametrize("unit", UNITS)
def test_the_same_as_torch(unit):
    """Also with an upstream gradient that is a view: here the output is added up over its rows."""
    inputs = [leaf(12, 70), leaf(12, 70)]

    def summed(gate, up):
        return UNITS[unit][0](gate, up).sum(0)

    ours = run_with_gradients(summed, inputs)
    with use_backend("torch"):
        torchs = run_with_gradients(summed, inputs)
    for name in ours:
        torch.testing.assert_close(ours[name], torchs[name])  # torch's own tolerance of fp32


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, for 1 / (1 + inf), which is the right 0
@pytest.mark.parametrize("unit", UNITS)
def test_extremes_are_finite(unit):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    result = run_with_gradients(UNITS[unit][0], [gate, torch.full((5,), 2.0, requires_grad=True)])
    assert torch.equal(result["output 0"][[0, 2, 4]], torch.tensor([0.0, 0.0, 2e4]))
    assert all(x.isfinite().all() for x in result.values())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_nothing_to_do(shape):
    result = run_with_gradients(swiglu, [torch.zeros(*shape, requires_grad=True) for _ in range(2)])
    assert all(x.shape == shape for x in result.values())
