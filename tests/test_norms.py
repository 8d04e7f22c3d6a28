"""RMSNorm and LayerNorm against their formulas."""

import pytest
import torch
from tolerance import assert_close_to_truth, relative_error, run_with_gradients

from minisft.kernels.common import use_backend
from minisft.kernels.layer_norm import layer_norm, layer_norm_ref
from minisft.kernels.rms_norm import add_rms_norm, add_rms_norm_ref, rms_norm, rms_norm_ref

FAMILIES = {
    "llama": {},
    "gemma": dict(offset=1.0, upcast_weight=True),
    "olmo2": dict(upcast_weight=True),
    "offset only": dict(offset=1.0),
}
LAYER_NORMS = {"plain": ("weight", "bias"), "cohere": ("weight",), "olmo 1": (), "bias only": ("bias",)}
DTYPES = {
    "fp32": [torch.float32] * 4,
    "bf16": [torch.bfloat16] * 4,
    "bf16, weights fp32": [torch.bfloat16, torch.float32, torch.float32],
}


def leaf(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", ["x", "y"])
@pytest.mark.parametrize("shape", [(1, 16), (300, 48), (7, 4, 64)], ids=str)
def test_rms_norm(shape, keep, family, dtypes):
    options = FAMILIES[family]
    assert_close_to_truth(
        lambda x, w: rms_norm(x, w, 1e-5, keep=keep, **options),
        lambda x, w: rms_norm_ref(x, w, 1e-5, **options),
        [leaf(*shape), leaf(shape[-1])],
        DTYPES[dtypes][:2],
        floor=2**-9 if keep == "y" and dtypes != "fp32" else None,  # the rounding of y, at most 2**-8 of a number
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_rms_norm_rounds_where_the_family_does(family):
    """In bf16 forward values equal the formula's but for a last-bit tie in rstd: the same places are rounded."""
    x, weight = leaf(500, 64).detach().bfloat16(), leaf(64).detach()
    ours, formula = (op(x, weight, 1e-6, **FAMILIES[family]) for op in (rms_norm, rms_norm_ref))
    assert (ours != formula).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_add_rms_norm(dtype):
    assert_close_to_truth(
        lambda x, r, w: add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: add_rms_norm_ref(x, r, w, 1e-5),
        [leaf(65, 32), leaf(65, 32), leaf(32)],
        [dtype, dtype, torch.float32],
    )


def test_add_rms_norm_of_two_dtypes_takes_the_wider():
    x, residual, weight = leaf(5, 8).detach().bfloat16(), leaf(5, 8), leaf(8)
    y, total = add_rms_norm(x, residual, weight, 1e-5)
    assert y.dtype == total.dtype == torch.float32 and torch.equal(total, x + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_backward_finds_in_y(family, dtype):
    """An fp32 x normalised for products in dtype: the gradients are those of the x that is kept, to the rounding of y, also
    where a weight is zero, or nearly."""
    x, weight, options = leaf(300, 48), leaf(48), FAMILIES[family] | {"dtype": dtype}
    with torch.no_grad():
        weight[:4] = torch.tensor([0.0, -0.0, 1e-30, -1e-7]) - options.get("offset", 0.0)
    kept = {
        keep: run_with_gradients(lambda x, w, keep=keep: rms_norm(x, w, 1e-5, keep=keep, **options), [x, weight])
        for keep in ("x", "y")
    }
    least = 6.2e-5 if dtype == torch.float16 else 1e-20
    assert (kept["x"]["output 0"] - kept["y"]["output 0"]).abs().max() <= least * 10  # |n| < 10
    assert torch.equal(kept["x"]["output 0"][:, 4:], kept["y"]["output 0"][:, 4:])
    # fp32: sums of 300. Else a step of y: its rounding is half of one, and small n of the least weight are subnormal in fp16.
    limit = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for columns in (slice(None), slice(4)):
        for name in ("gradient of input 0", "gradient of input 1"):
            assert relative_error(kept["y"][name][..., columns], kept["x"][name][..., columns]) < limit


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("parameters", LAYER_NORMS)
def test_layer_norm(parameters, dtypes):
    names = LAYER_NORMS[parameters]
    inputs = [leaf(130, 48), *(leaf(48) for _ in names)]

    def call(op):
        return lambda x, *values: op(x, **{"weight": None, "bias": None, "eps": 1e-5, **dict(zip(names, values))})

    assert_close_to_truth(call(layer_norm), call(layer_norm_ref), inputs, DTYPES[dtypes][: len(inputs)])


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_parameter_that_is_left_out_is_one_or_zero(backend):
    x, weight, bias = leaf(20, 48), leaf(48).detach(), leaf(48).detach()
    with use_backend(backend):
        for a, b in [
            ((None, None), (torch.ones(48), torch.zeros(48))),
            ((weight, None), (weight, torch.zeros(48))),
            ((None, bias), (torch.ones(48), bias)),
        ]:
            left_out, given = (run_with_gradients(lambda x, p=p: layer_norm(x, *p, 1e-5), [x]) for p in (a, b))
            assert all(torch.equal(left_out[name], given[name]) for name in given)


@pytest.mark.parametrize(
    "norm", [rms_norm, lambda x, weight, eps: layer_norm(x, weight, None, eps)], ids=["rms", "layer"]
)
def test_the_input_is_kept_for_the_backward_and_no_copy_of_it(norm):
    x, weight, kept = leaf(9, 16, dtype=torch.bfloat16), leaf(16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        norm(x, weight, 1e-5)
    assert [tensor.data_ptr() for tensor in kept if tensor.shape == x.shape] == [x.data_ptr()]


def test_or_the_output_is_kept_and_nothing_of_the_input():
    x, weight, kept = leaf(9, 16), leaf(16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        y = rms_norm(x, weight, 1e-5, dtype=torch.bfloat16, keep="y")
    assert [tensor.data_ptr() for tensor in kept if tensor.shape == x.shape] == [y.data_ptr()]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradcheck(backend):
    x, residual, weight, bias = (leaf(*s, dtype=torch.float64) for s in [(3, 5), (3, 5), (5,), (5,)])
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-5, offset=1.0), (x, weight))
        assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-5, upcast_weight=True), (x, weight))
        assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-5, offset=1.0, upcast_weight=True), (x, weight))
        assert torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, 1e-5), (x, residual, weight))
        assert torch.autograd.gradcheck(lambda *a: add_rms_norm(*a, 1e-5, keep="y"), (x, residual, weight))
        assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, 1e-5), (x, weight, bias))
        assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, None, 1e-5), (x, weight))
        assert torch.autograd.gradcheck(lambda x: layer_norm(x, None, None, 1e-5), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_frozen_weights_or_frozen_input(dtype):
    x, weight, bias = leaf(6, 8).detach().to(dtype).requires_grad_(), leaf(8), leaf(8)
    for op, inputs in (
        (lambda x, w: rms_norm(x, w, 1e-5), [x, weight]),
        (lambda x, w, b: layer_norm(x, w, b, 1e-5), [x, weight, bias]),
    ):
        everything = run_with_gradients(op, inputs)
        for i, leaf_ in enumerate(inputs):
            alone = [t if t is leaf_ else t.detach() for t in inputs]
            name = f"gradient of input {i}"
            assert torch.equal(run_with_gradients(op, alone)[name], everything[name])


def test_strided_input_and_autocast():
    wide, weight, bias = leaf(20, 16).detach(), leaf(8), leaf(8)
    view = wide[:, ::2].requires_grad_()
    for op, inputs in (
        (lambda x, w: rms_norm(x, w, 1e-5), [weight]),
        (lambda x, w, b: layer_norm(x, w, b, 1e-5), [weight, bias]),
    ):
        expected = run_with_gradients(op, [view.detach().contiguous().requires_grad_(), *inputs])
        with torch.autocast("cpu", torch.bfloat16):
            result = run_with_gradients(op, [view, *inputs])
        assert all(torch.equal(expected[name], result[name]) for name in expected)


def test_zero_rows_and_large_values_stay_finite():
    x = torch.stack((torch.zeros(32), torch.full((32,), 3e4), torch.full((32,), 1e-6))).bfloat16().requires_grad_()
    for y in (rms_norm(x, torch.ones(32), 1e-6), layer_norm(x, torch.ones(32), None, 1e-5)):
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"weight \(7,\) does not fit x \(4, 8\)"):
        rms_norm(torch.zeros(4, 8), torch.zeros(7), 1e-5)
    with pytest.raises(ValueError, match=r"x \(4, 8\) and residual \(4, 7\)"):
        add_rms_norm(torch.zeros(4, 8), torch.zeros(4, 7), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match=r"bias \(7,\) does not fit x \(4, 8\)"):
        layer_norm(torch.zeros(4, 8), torch.zeros(8), torch.zeros(7), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rms_norm_is_the_one_of_transformers(dtype):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

    x, weight = leaf(200, 64).detach().to(dtype), leaf(64).detach().to(dtype)
    for family, theirs in (("llama", LlamaRMSNorm), ("gemma", Gemma2RMSNorm), ("olmo2", Olmo2RMSNorm)):
        theirs = theirs(64, eps=1e-6).to(dtype)
        theirs.weight.data = weight
        ours = rms_norm(x, weight, 1e-6, **FAMILIES[family])
        # The mean of squares is summed in another order, so rstd, and after it y, may differ in the last fp32 bits.
        different = (ours != theirs(x)).float().mean()
        assert different < 1e-3 if dtype == torch.bfloat16 else torch.allclose(ours, theirs(x), rtol=6e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layer_norm_is_the_one_of_transformers(dtype):
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

    x, weight = leaf(200, 64).detach().to(dtype), leaf(64).detach().to(dtype)
    cohere, olmo = CohereLayerNorm(64, eps=1e-5).to(dtype), OlmoLayerNorm(64)
    cohere.weight.data = weight
    for backend in ("torch", "reference"):
        with use_backend(backend):
            for ours, theirs in [
                (layer_norm(x, weight, None, 1e-5), cohere(x)),
                (layer_norm(x, None, None, 1e-5), olmo(x)),
            ]:
                # Means are summed in another order: a few fp32 bits, which bf16 rounds away but for ties. Values near
                # zero are differences of larger ones, hence the absolute tolerance of fp32's bits of 4.
                assert ours.dtype == dtype
                if dtype == torch.bfloat16:
                    assert (ours != theirs).float().mean() < 1e-2
                else:
                    assert torch.allclose(ours, theirs, rtol=1e-6, atol=5e-7)
