"""Rotary embedding: against the formula, the property that it exists for, and the frequencies of its kinds."""

import math

import pytest
import torch
from tolerance import assert_close_to_truth, relative_error, run_with_gradients

from minisft.kernels.common import use_backend
from minisft.kernels.rms_norm import rms_norm
from minisft.kernels.rope import rope, rope_ref
from minisft.model.model_config import Rope
from minisft.model.rope import inverse_frequencies, rope_table


def make(tokens=37, heads=4, kv_heads=2, head_dim=16, rotated=None, dtype=torch.float32):
    """q, k, cos, sin at positions 0, 1, 2 ..."""
    rotated = head_dim if rotated is None else rotated
    inv_freq = 1e4 ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    angle = torch.arange(tokens)[:, None] * inv_freq
    q = torch.randn(tokens, heads, head_dim, dtype=dtype, requires_grad=True)
    k = torch.randn(tokens, kv_heads, head_dim, dtype=dtype, requires_grad=True)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


NORMS = {"none": (None, None), "llama-like": (0.0, 0.0), "gemma-like": (1.0, 1.0), "q only": (0.0, None)}


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16], ids=["table fp32", "table bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rotated", [16, 8, 0])
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
@pytest.mark.parametrize("rotated", [16, 6])
def test_gradients_and_norms(rotated, interleaved, norms, dtype):
    q, k, cos, sin = make(rotated=rotated)
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


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_norm_is_of_each_head_before_it_turns(dtype, offset):
    """Bitwise: Qwen 3 rounds before it multiplies by the weight, Gemma 3 (offset 1) after."""
    q, k, cos, sin = make(rotated=8)
    q, k, q_weight, k_weight = q.detach().to(dtype), k.detach().to(dtype), torch.rand(16), torch.rand(16)
    for backend in ("torch", "reference"):
        with use_backend(backend):
            ours = rope(q, k, cos, sin, q_norm=(q_weight, 1e-6, offset), k_norm=(k_weight, 1e-6, offset))
            normed = [
                rms_norm(x, weight, 1e-6, offset=offset, upcast_weight=offset == 1)
                for x, weight in ((q, q_weight), (k, k_weight))
            ]
            for a, b in zip(ours, rope(*normed, cos, sin)):
                assert a.dtype == dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bitwise_the_one_of_transformers(dtype):
    """Llama turns in the dtype of the activations, Cohere in fp32 and by neighbours, Phi the first features only."""
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    q, k, cos, sin = make()
    q, k = q.detach().to(dtype), k.detach().to(dtype)

    def theirs(op, q, k, cos, sin):
        return [
            x[0].transpose(0, 1) for x in op(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
        ]

    halves = [torch.cat((t, t), -1).to(dtype) for t in (cos, sin)]
    neighbours = [t.repeat_interleave(2, -1) for t in (cos, sin)]
    partial = [torch.cat((t[:, :4], t[:, :4]), -1).to(dtype) for t in (cos, sin)]
    for backend in ("torch", "reference"):
        with use_backend(backend):
            pairs = [
                (rope(q, k, cos.to(dtype), sin.to(dtype)), theirs(llama, q, k, *halves)),
                (rope(q, k, cos, sin, interleaved=True), theirs(cohere, q, k, *neighbours)),
            ]
            first = rope(q, k, cos[:, :4].to(dtype), sin[:, :4].to(dtype))
            pairs.append(([x[..., :8] for x in first], theirs(llama, q[..., :8], k[..., :8], *partial)))
            for ours, expected in pairs:
                assert all(torch.equal(a, b) for a, b in zip(ours, expected))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    q, k, cos, sin = make(3, 2, 1, 6, rotated=4, dtype=torch.float64)
    for backend in ("torch", "reference"):
        with use_backend(backend):
            assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), (q, k))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck_with_norms(interleaved, offset):
    q, k, cos, sin = make(3, 2, 1, 6, rotated=4, dtype=torch.float64)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)

    def run(q, k, w):
        norms = dict(q_norm=(w, 1e-6, offset), k_norm=(2 * w, 1e-5, offset))
        return rope(q, k, cos, sin, interleaved=interleaved, **norms)

    for backend in ("torch", "reference"):
        with use_backend(backend):
            assert torch.autograd.gradcheck(run, (q, k, weight))


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
        (dict(q=torch.zeros(37, 16), k=torch.zeros(37, 16)), r"k \(37, 16\)"),
        (dict(q=torch.zeros(37, 5, 2, 16), k=torch.zeros(37, 5, 2, 16)), r"q \(37, 5, 2, 16\)"),
        (dict(q_norm=(torch.zeros(8), 1e-6, 0.0)), r"q_norm \(8,\)"),
    ],
)
def test_bad_arguments(change, words):
    q, k, cos, sin = make()
    with pytest.raises(ValueError, match=words):
        rope(**{**dict(q=q, k=k, cos=cos, sin=sin), **change})


# ---------------------------------------------------------------- frequencies and tables


PLAIN = inverse_frequencies(Rope(64))
TURNS = 8192 * PLAIN / (2 * torch.pi)  # of each pair within the original context


def test_plain_frequencies():
    assert PLAIN.dtype == torch.float32 and len(PLAIN) == 32
    assert PLAIN[0] == 1 and PLAIN[16] == pytest.approx(1e4**-0.5) and torch.all(PLAIN.diff() < 0)
    assert torch.equal(inverse_frequencies(Rope(64, kind="dynamic", theta=1e5)), inverse_frequencies(Rope(64, 1e5)))


def test_linear_squeezes_positions():
    position = torch.arange(100)
    squeezed, plain = rope_table(Rope(64, kind="linear", factor=4.0), 4 * position), rope_table(Rope(64), position)
    for ours, expected in zip(squeezed, plain):
        assert torch.equal(ours, expected)  # bitwise, because 4 is a power of two


def test_llama3_blends_between_kept_and_stretched():
    ratio = inverse_frequencies(Rope(64, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)) / PLAIN
    assert torch.all(ratio[TURNS >= 4] == 1) and torch.all(ratio[TURNS <= 1] == 1 / 8)
    between = ratio[(TURNS > 1) & (TURNS < 4)]
    assert len(between) > 2 and torch.all((between > 1 / 8) & (between < 1))


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_blends_between_kept_and_stretched(truncate):
    yarn = Rope(64, kind="yarn", factor=8.0, truncate=truncate)
    ratio = inverse_frequencies(yarn) / PLAIN
    # truncate widens the range of blended pairs to whole ones, so the pairs next to its ends may go either way
    kept, stretched = TURNS >= 32 * (PLAIN[0] / PLAIN[1]), TURNS <= PLAIN[1] / PLAIN[0]
    assert kept.sum() > 2 and stretched.sum() > 2
    assert torch.allclose(ratio[kept], torch.ones(())) and torch.allclose(ratio[stretched], torch.tensor(1 / 8))
    assert torch.all(ratio.diff() <= 1e-6) and len(ratio[(ratio > 0.13) & (ratio < 0.99)]) > 2


def test_longrope_has_a_factor_for_each_pair():
    factors = tuple(1 + i / 10 for i in range(32))
    ours = inverse_frequencies(Rope(64, kind="longrope", pair_factors=factors))
    assert torch.allclose(ours * torch.tensor(factors), PLAIN)


def test_attention_factor_multiplies_the_table():
    position = torch.arange(0, 9000, 100, dtype=torch.int32)
    cos, sin = rope_table(Rope(64, attention_factor=1.5), position)
    assert cos.dtype == torch.float32 and cos.shape == (90, 32)
    assert torch.allclose(cos**2 + sin**2, torch.tensor(1.5**2))


def test_the_table_is_rounded_at_the_end_only():
    position = torch.tensor([8000, 8001])
    for exact, rounded in zip(rope_table(Rope(64), position), rope_table(Rope(64), position, torch.bfloat16)):
        assert torch.equal(rounded, exact.bfloat16())


def test_partial_rotation_has_a_shorter_table():
    assert rope_table(Rope(16), torch.arange(3))[0].shape == (3, 8)


def test_factors_of_queries():
    """1 within the original context, then a step at each multiple of it: 1 + beta log 2, 1 + beta log 3, ..."""
    rope = Rope(8, kind="yarn", factor=4.0, original_max_position_embeddings=10, query_beta=0.5)
    _, _, factors = rope_table(rope, torch.tensor([0, 9, 10, 19, 20, 35]))
    expected = [1 + 0.5 * math.log(1 + n) for n in (0, 0, 1, 1, 2, 3)]
    assert factors.tolist() == pytest.approx(expected, rel=1e-6)  # fp32


def test_a_new_kind_is_no_default():
    with pytest.raises(AssertionError, match="sinusoidal"):
        inverse_frequencies(Rope(64, kind="sinusoidal"))
