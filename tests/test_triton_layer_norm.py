"""The Triton kernels of LayerNorm, in the interpreter: against the formula, in poisoned memory, repeated."""

import pytest
import torch
from tolerance import assert_close_to_truth, padded_with_nan, run_with_gradients

from minisft.kernels.common import use_backend
from minisft.kernels.layer_norm import layer_norm, layer_norm_ref

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
PARAMETERS = {"cohere": ("weight",), "olmo 1": (), "bias only": ("bias",)}
DTYPES = {
    "fp32": [torch.float32] * 3,
    "fp16": [torch.float16] * 3,
    "bf16": [torch.bfloat16] * 3,
    "bf16, weights fp32": [torch.bfloat16, torch.float32, torch.float32],
}
# One row; rows that do not fill the last program; more rows than the backward's programs take at once; each of CONFIGS.
SHAPES = [(1, 16), (7, 4, 64), (150, 257), (9, 1500), (5, 5000), (3, 8192)]


def leaf(*shape):
    return padded_with_nan(torch.randn(*shape)).requires_grad_()


def with_parameters(op, names):
    return lambda x, *values: op(x, **{"weight": None, "bias": None, "eps": 1e-5, **dict(zip(names, values))})


@pytest.mark.covers(1)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape, dtypes):
    inputs = [leaf(*shape), leaf(shape[-1]), leaf(shape[-1])]
    ours, formula = (with_parameters(op, ("weight", "bias")) for op in (layer_norm, layer_norm_ref))
    assert_close_to_truth(ours, formula, inputs, DTYPES[dtypes])


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_parameters_may_be_left_out(parameters, dtypes):
    names = PARAMETERS[parameters]
    inputs = [leaf(37, 300), *(leaf(300) for _ in names)]
    ours, formula = (with_parameters(op, names) for op in (layer_norm, layer_norm_ref))
    assert_close_to_truth(ours, formula, inputs, DTYPES[dtypes][: len(inputs)])


def test_a_large_mean_costs_no_digits():
    """The variance of 1000 + noise: as exact as the formula's, where mean(x^2) - mean(x)^2 has no correct digit."""
    x = padded_with_nan(1000 + torch.randn(9, 700)).requires_grad_()
    assert_close_to_truth(
        lambda x: layer_norm(x, None, None, 1e-5), lambda x: layer_norm_ref(x, None, None, 1e-5), [x], torch.float32
    )


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)], ids=str)
def test_frozen_inputs_get_no_gradient_and_change_nothing(frozen):
    inputs = [leaf(9, 48), leaf(48), leaf(48)]
    op = with_parameters(layer_norm, ("weight", "bias"))
    everything = run_with_gradients(op, inputs)
    some = run_with_gradients(op, [x.detach() if i in frozen else x for i, x in enumerate(inputs)])
    assert set(everything) - set(some) == {f"gradient of input {i}" for i in frozen}
    assert all(torch.equal(some[name], everything[name]) for name in some)


def test_repeats_bitwise_and_strides_change_nothing():
    inputs = [leaf(20, 2, 96), *(torch.randn(192)[::2].requires_grad_() for _ in range(2))]
    every_second = torch.empty(20, 2, 192)[..., ::2].copy_(inputs[0].detach()).requires_grad_()
    copies = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
    op = with_parameters(layer_norm, ("weight", "bias"))
    first = run_with_gradients(op, inputs)
    for others in (inputs, copies, [every_second, *inputs[1:]]):
        again = run_with_gradients(op, others)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_same_as_torch():
    inputs = [leaf(64, 200).detach().bfloat16().requires_grad_(), leaf(200), leaf(200)]
    op = with_parameters(layer_norm, ("weight", "bias"))
    ours = run_with_gradients(op, inputs)
    with use_backend("torch"):
        torchs = run_with_gradients(op, inputs)
    for name in ours:
        assert ours[name].dtype == torchs[name].dtype
        torch.testing.assert_close(ours[name], torchs[name])  # torch's own tolerance of each dtype


def test_no_rows():
    x, weight, bias = torch.empty(0, 32).requires_grad_(), leaf(32), leaf(32)
    result = run_with_gradients(with_parameters(layer_norm, ("weight", "bias")), [x, weight, bias])
    assert result["output 0"].shape == (0, 32)
    assert torch.equal(result["gradient of input 1"], torch.zeros(32))
    assert torch.equal(result["gradient of input 2"], torch.zeros(32))


@pytest.mark.parametrize("dtype,most", [(torch.float32, 8192), (torch.bfloat16, 16384)])
def test_rows_too_long_for_the_kernels_are_refused_by_name(dtype, most):
    with pytest.raises(ValueError, match=f"{most + 1} features in {dtype}, .* at most {most}"):
        layer_norm(torch.ones(1, most + 1, dtype=dtype), None, None, 1e-5)
