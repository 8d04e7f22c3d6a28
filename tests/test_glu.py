"""Gated linear units against their formulas."""

import pytest
import torch
from tolerance import assert_close_to_truth, relative_error, run_with_gradients

from minisft.kernels.common import use_backend
from minisft.kernels.glu import _GLU, geglu, geglu_ref, swiglu, swiglu_ref

UNITS = {
    "swiglu": (swiglu, swiglu_ref),
    "geglu tanh": (geglu, geglu_ref),
    "geglu erf": (lambda g, u=None: geglu(g, u, "none"), lambda g, u=None: geglu_ref(g, u, "none")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", [(1, 1), (63, 100), (2, 9, 32)], ids=str)
def test_equals_the_formula(shape, unit, dtype):
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    assert_close_to_truth(*UNITS[unit], inputs, dtype)


@pytest.mark.parametrize("unit", UNITS)
def test_forward_is_bitwise_the_formula(unit):
    gate, up = torch.randn(2, 50, 64).bfloat16()
    op, reference = UNITS[unit]
    assert torch.equal(op(gate, up), reference(gate, up))


@pytest.mark.parametrize("unit", UNITS)
def test_halves_of_a_fused_projection(unit):
    fused = torch.randn(40, 64)
    views = [x.requires_grad_() for x in fused.split(32, dim=-1)]
    separate = [x.detach().contiguous().requires_grad_() for x in views]
    op = UNITS[unit][0]
    a, b = run_with_gradients(op, views), run_with_gradients(op, separate)
    assert not views[0].is_contiguous()
    for name in a:  # not bitwise: PyTorch has another erf for rows that are not contiguous
        assert relative_error(a[name], b[name]) < 3e-7, name


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", [(40, 64), (2, 20, 64)], ids=str)
def test_a_fused_projection_as_a_whole(unit, shape):
    fused = torch.randn(shape)
    halves = run_with_gradients(UNITS[unit][0], [x.requires_grad_() for x in fused.chunk(2, dim=-1)])
    for op in UNITS[unit]:
        whole = run_with_gradients(op, [fused.clone().requires_grad_()])
        gradients = torch.cat([halves["gradient of input 0"], halves["gradient of input 1"]], dim=-1)
        assert relative_error(whole["output 0"], halves["output 0"]) < 3e-7
        assert relative_error(whole["gradient of input 0"], gradients) < 3e-7


@pytest.mark.parametrize("unit, approximate", list(zip(UNITS, (None, "tanh", "none"))), ids=UNITS)
def test_the_function_that_recomputes_the_activation(unit, approximate):
    """On a CPU only swiglu uses it, on a GPU every unit."""
    inputs = [torch.randn(9, 32, requires_grad=True) for _ in range(2)]
    assert_close_to_truth(lambda g, u: _GLU.apply(g, u, approximate), UNITS[unit][1], inputs, torch.float32)


def test_what_swiglu_keeps_for_its_backward_is_gate_and_up():
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        swiglu(gate, up)
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in (gate, up))


@pytest.mark.parametrize("unit", UNITS)
def test_gradcheck(unit):
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for backend in ("torch", "reference"):
        with use_backend(backend):
            assert torch.autograd.gradcheck(UNITS[unit][0], inputs)


@pytest.mark.parametrize("unit", UNITS)
def test_inputs_stay_as_they_are_and_extremes_are_finite(unit):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    up = torch.full((5,), 2.0, requires_grad=True)
    out = UNITS[unit][0](gate, up)
    out.sum().backward()
    assert torch.equal(out.detach()[[0, 2, 4]], torch.tensor([0.0, 0.0, 2e4]))
    assert gate.grad.isfinite().all() and up.grad.isfinite().all() and torch.equal(up.detach(), torch.full((5,), 2.0))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"gate \(2, 3\) torch.float32 and up \(2, 4\)"):
        swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="torch.bfloat16"):
        geglu(torch.zeros(2, 3), torch.zeros(2, 3).bfloat16())
    with pytest.raises(ValueError, match=r"geglu: \(2, 3\) has no two halves"):
        geglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="'exact'"):
        geglu(torch.zeros(2, 3), torch.zeros(2, 3), approximate="exact")
