"""The Triton kernels of RMSNorm, in the interpreter: against the formula, in poisoned memory, repeated."""

import pytest
import torch
from compile_cases_rms_norm import FAMILIES
from tolerance import assert_close_to_truth, padded_with_nan, relative_error, run_with_gradients

from minisft.kernels import rms_norm as module
from minisft.kernels.common import use_backend
from minisft.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
DTYPES = {
    "fp32": [torch.float32] * 3,
    "fp16": [torch.float16] * 3,
    "bf16": [torch.bfloat16] * 3,
    "bf16, weights fp32": [torch.bfloat16, torch.bfloat16, torch.float32],
}
# One row; rows that do not fill the last program; more rows than the backward's programs take at once; each of CONFIGS.
SHAPES = [(1, 16), (37, 48), (7, 4, 64), (150, 257), (9, 1500), (3, 8200)]


def leaf(*shape):
    return padded_with_nan(torch.randn(*shape)).requires_grad_()


@pytest.mark.covers(2)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_formula(shape, family, dtypes):
    assert_close_to_truth(
        lambda x, w: rms_norm(x, w, 1e-5, **FAMILIES[family]),
        lambda x, w: rms_norm_ref(x, w, 1e-5, **FAMILIES[family]),
        [leaf(*shape), leaf(shape[-1])],
        DTYPES[dtypes][1:],
    )


@pytest.mark.parametrize("weight", [torch.randn(48)[::2], torch.tensor([2.0]).expand(24)], ids=["every other", "one"])
def test_a_weight_need_not_lie_side_by_side(weight):
    x, copy = leaf(5, 24), weight.detach().clone()
    for op in (
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: add_rms_norm(x, x, w, 1e-5),
        lambda x, w: add_rms_norm(None, x * 1, w, 1e-5, keep="y"),
    ):
        ours, plain = (run_with_gradients(op, [x, w.detach().requires_grad_()]) for w in (weight, copy))
        assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.covers(1)
@pytest.mark.parametrize("keep", ["x", "y"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_residual(family, dtypes, keep):
    assert_close_to_truth(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5, keep=keep, **FAMILIES[family]),
        lambda x, r, w: add_rms_norm_ref(x, r, w, 1e-5, **FAMILIES[family]),
        [leaf(65, 300), leaf(65, 300), leaf(300)],
        DTYPES[dtypes],
    )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_bf16_branch_joins_an_fp32_residual(family, dtype):
    """y is what a cast of the plain op's would be, and so are all gradients."""
    x, residual, weight = leaf(5, 80).detach().bfloat16().requires_grad_(), leaf(5, 80), leaf(80)
    inputs = [x, residual, weight]
    options = FAMILIES[family]
    ours = run_with_gradients(lambda *inputs: add_rms_norm(*inputs, 1e-5, dtype=dtype, **options), inputs)
    plain = run_with_gradients(
        lambda *inputs: tuple(
            t.to(d) if d else t for t, d in zip(add_rms_norm(*inputs, 1e-5, **options), (dtype, None))
        ),
        inputs,
    )
    with use_backend("torch"):
        torchs = run_with_gradients(lambda *inputs: add_rms_norm(*inputs, 1e-5, dtype=dtype, **options), inputs)
    assert torch.equal(ours["output 1"], x + residual)
    for name in ours:
        assert ours[name].dtype == torchs[name].dtype and torch.equal(ours[name], plain[name])
        torch.testing.assert_close(ours[name], torchs[name])  # torch's own tolerance of each dtype
    alone, cast = rms_norm(residual, weight, 1e-5, dtype=dtype, **options), rms_norm(residual, weight, 1e-5, **options)
    assert torch.equal(alone, cast if dtype is None else cast.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_y_is_the_same_in_both_backends(family, dtype):
    """With weights that are zero, or nearly."""
    branch, residual, weight = leaf(65, 40), leaf(65, 40), leaf(40)
    options = FAMILIES[family] | {"dtype": dtype, "keep": "y"}
    with torch.no_grad():
        weight[:4] = torch.tensor([0.0, -0.0, 1e-30, -1e-7]) - options.get("offset", 0.0)
    inputs = [branch.detach().bfloat16().requires_grad_(), residual, weight]
    found = []
    for backend in ("triton", "torch"):
        with use_backend(backend):
            found.append(run_with_gradients(lambda *inputs: add_rms_norm(*inputs, 1e-5, **options), inputs))
    ours, torchs = found
    for name in ours:
        assert ours[name].dtype == torchs[name].dtype
        torch.testing.assert_close(ours[name], torchs[name])  # torch's own tolerance of each dtype


@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only the sum"])
def test_one_output_unused(used):
    x, residual, weight = leaf(6, 40), leaf(6, 40), leaf(40)
    ours = run_with_gradients(lambda x, r: add_rms_norm(x, r, weight, 1e-5)[used], [x, residual])
    formula = run_with_gradients(lambda x, r: add_rms_norm_ref(x, r, weight, 1e-5)[used], [x, residual])
    for name in ours:
        torch.testing.assert_close(ours[name], formula[name])


def test_a_frozen_weight_gets_no_gradient_and_changes_nothing():
    x, weight = leaf(40, 48), leaf(48)
    both, alone = (run_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), [x, w]) for w in (weight, weight.detach()))
    assert torch.equal(both["gradient of input 0"], alone["gradient of input 0"])
    assert set(both) - set(alone) == {"gradient of input 1"}


def test_repeats_bitwise_and_strides_change_nothing():
    x, weight = leaf(100, 2, 96), leaf(96)
    first, again = (run_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), [x, weight]) for _ in range(2))
    copy = run_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), [x.detach().clone().requires_grad_(), weight])
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], copy[name]) for name in first)


def test_no_rows():
    x, weight = torch.empty(0, 32).requires_grad_(), leaf(32)
    result = run_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), [x, weight])
    assert result["output 0"].shape == (0, 32) and torch.equal(result["gradient of input 1"], torch.zeros(32))


def test_rows_too_long_for_the_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match=f"16385 features, .* at most {module.MAX_FEATURES}"):
        rms_norm(torch.ones(1, 16385), torch.ones(16385), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sum_that_is_there_already(family, dtype, monkeypatch):
    """x None: y and the residual itself, which products may change afterwards; one gradient, with its copy in the dtype of y."""
    residual, weight, options = torch.randn(21, 80), leaf(80), FAMILIES[family]
    copies, keep = [], module.keep_copy
    monkeypatch.setattr(module, "keep_copy", lambda dx, copy: copies.append((dx.clone(), copy)) or keep(dx, copy))

    def ours(residual, weight):
        total = residual * 1
        y, same = add_rms_norm(None, total, weight, 1e-5, dtype=dtype, keep="y", **options)
        assert same is total and not same._is_view()
        same.mul_(2)
        return y, same

    def formula(residual, weight):
        return rms_norm_ref(residual, weight, 1e-5, dtype=dtype, **options), residual * 2

    inputs = [residual.requires_grad_(), weight]
    expected = run_with_gradients(formula, inputs)
    for name, value in run_with_gradients(ours, inputs).items():
        assert relative_error(value, expected[name]) < (1e-6 if dtype == torch.float32 else 2**-8), name
    assert len(copies) == (dtype != torch.float32)
    assert all(torch.equal(copy, dx.to(dtype)) for dx, copy in copies)


@pytest.mark.parametrize("keep", ["x", "y"])
@pytest.mark.parametrize(
    "make", [torch.exp, lambda x: x * 1], ids=["kept where it comes from", "kept where it is read"]
)
def test_others_may_have_kept_a_sum_that_is_there_already(make, keep):
    """Its values are not changed, and a change afterwards is still noticed."""

    def run(norm, changes):
        def call(x, weight):
            total = make(x)
            square = total**2
            y, same = norm(total, weight)
            if changes:
                same.mul_(2)
            return y, same, square

        return run_with_gradients(call, [leaf(9, 24), torch.ones(24, requires_grad=True)])

    torch.manual_seed(1)
    ours = run(lambda total, weight: add_rms_norm(None, total, weight, 1e-5, keep=keep), False)
    torch.manual_seed(1)
    formula = run(lambda total, weight: (rms_norm_ref(total, weight, 1e-5), total), False)
    assert all(relative_error(ours[name], formula[name]) < 1e-6 for name in formula)  # fp32
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(lambda total, weight: add_rms_norm(None, total, weight, 1e-5, keep=keep), True)


def test_a_sum_in_a_view_is_left_as_it_is():
    """Of a view, or without a kernel, autograd adds the two gradients."""
    buffer, weight = torch.randn(3, 21, 80), leaf(80)
    ours = run_with_gradients(lambda x, w: add_rms_norm(None, x[1], w, 1e-5)[:2], [buffer.requires_grad_(), weight])
    formula = run_with_gradients(lambda x, w: (rms_norm_ref(x[1], w, 1e-5), x[1]), [buffer, weight])
    assert all(relative_error(ours[name], formula[name]) < 1e-6 for name in formula)
