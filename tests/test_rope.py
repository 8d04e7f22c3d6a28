"""Rotary embedding: against the formula, and the property that it exists for."""

import pytest
import torch
from tolerance import assert_close_to_truth, relative_error, run_with_gradients

from minisft.kernels.common import use_backend
from minisft.kernels.rope import rope, rope_ref


def make(tokens=37, heads=4, kv_heads=2, head_dim=16, rotated=None, dtype=torch.float32):
    """q, k, cos, sin at positions 0, 1, 2 ..."""
    rotated = rotated or head_dim
    inv_freq = 1e4 ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angle = torch.arange(tokens)[:, None] * inv_freq
    q = torch.randn(tokens, heads, head_dim, dtype=dtype, requires_grad=True)
    k = torch.randn(tokens, kv_heads, head_dim, dtype=dtype, requires_grad=True)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


NORMS = {"none": (None, None), "llama-like": (0.0, 0.0), "gemma-like": (1.0, 1.0), "q only": (0.0, None)}


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=["table fp32", "table bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_the_formula_bitwise(interleaved, rotated, dtype, table):
    """The same products and sums, so not only close: equal."""
    q, k, cos, sin = make(rotated=rotated)
    q, k = q.detach().to(dtype), k.detach().to(dtype)
    cos, sin = cos.to(table), sin.to(table)
    for ours, formula in zip(
        rope(q, k, cos, sin, interleaved=interleaved), rope_ref(q, k, cos, sin, interleaved=interleaved)
    ):
        assert ours.dtype == dtype and torch.equal(ours, formula)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_and_norms(interleaved, norms, dtype):
    q, k, cos, sin = make()
    weights = [torch.rand(16, requires_grad=True) if offset is not None else None for offset in NORMS[norms]]
    inputs = [x for x in (q, k, *weights) if x is not None]

    def call(op):
        def run(q, k, *weights):
            weights = iter(weights)
            pair = [None if offset is None else (next(weights), 1e-6, offset) for offset in NORMS[norms]]
            return op(q, k, cos.to(q), sin.to(q), interleaved=interleaved, q_norm=pair[0], k_norm=pair[1])

        return run

    dtypes = [dtype, dtype] + [torch.float32] * (len(inputs) - 2)  # the weights stay fp32, as master weights do
    assert_close_to_truth(call(rope), call(rope_ref), inputs, dtypes)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    q, k, cos, sin = make(3, 2, 1, 6, rotated=4, dtype=torch.float64)
    for backend in ("torch", "reference"):
        with use_backend(backend):
            assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), (q, k))


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only(interleaved):
    q, k, cos, sin = make(dtype=torch.float64)
    q, k = q[:1].expand(37, -1, -1), k[:1].expand(37, -1, -1)  # the same content at every position
    q, k = rope(q, k, cos, sin, interleaved=interleaved)
    scores = torch.einsum("qd,kd->qk", q[:, 0], k[:, 0])
    for distance in (0, 1, 20):
        line = scores.diagonal(-distance)
        assert (line - line[0]).abs().max() < 1e-12  # fp64 rounding of sums of 16 terms of size 1
    assert (scores[0, 0] - scores[20, 0]).abs() > 1e-3


def test_rotation_keeps_the_length_and_the_rest():
    q, k, cos, sin = make(rotated=8, dtype=torch.float64)
    turned, _ = rope(q, k, cos, sin)
    assert relative_error(turned.norm(dim=-1), q.norm(dim=-1)) < 1e-15 * 10
    assert torch.equal(turned[..., 8:], q[..., 8:]) and torch.equal(turned[0], q[0])


def test_strided_inputs_and_autocast():
    q, k, cos, sin = make()
    fused = torch.cat((q, k), dim=1).detach()
    views = [x.requires_grad_() for x in fused.split([4, 2], dim=1)]

    def run(q, k):
        return rope(q, k, cos, sin)

    expected = run_with_gradients(run, [q, k])
    with torch.autocast("cpu", torch.bfloat16):
        result = run_with_gradients(run, views)
    assert all(torch.equal(expected[name], result[name]) for name in expected)


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(cos=torch.zeros(37, 9), sin=torch.zeros(37, 9)), r"cos \(37, 9\)"),
        (dict(sin=torch.zeros(36, 8)), r"sin \(36, 8\)"),
        (dict(k=torch.zeros(36, 2, 16)), r"k \(36, 2, 16\)"),
        (dict(k=torch.zeros(37, 2, 16).bfloat16()), "torch.bfloat16"),
    ],
)
def test_bad_arguments(change, words):
    q, k, cos, sin = make()
    with pytest.raises(ValueError, match=words):
        rope(**{**dict(q=q, k=k, cos=cos, sin=sin), **change})
