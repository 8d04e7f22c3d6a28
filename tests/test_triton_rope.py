"""The Triton kernels of the rotary embedding, in the interpreter: pairs of both kinds, partial rotation, norms."""

import pytest
import torch
from tolerance import assert_close_to_truth, padded_with_nan, run_with_gradients

from minisft.kernels.common import use_backend
from minisft.kernels.rope import rope, rope_ref

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
DTYPES = {  # of q and k, and of the table
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16, table fp32": (torch.bfloat16, torch.float32),
}
HEADS = {  # features of a head, and those that turn
    "80, 32 of them": (80, 32),
    "96": (96, 96),
    "16, 12 of them": (16, 12),
    "256": (256, 256),
}
NORMS = {"llama-like": (0.0, 0.0), "gemma-like": (1.0, 1.0)}


def make(tokens=37, heads=3, kv_heads=2, head_dim=16, rotated=None):
    """q and k as views of one projection in a buffer of NaN, cos, sin."""
    rotated = rotated or head_dim
    angle = torch.rand(tokens, rotated // 2) * 6
    fused = padded_with_nan(torch.randn(tokens, heads + 2 * kv_heads, head_dim))
    q, k, _ = fused.split([heads, kv_heads, kv_heads], dim=1)
    return q.requires_grad_(), k.requires_grad_(), padded_with_nan(angle.cos()), padded_with_nan(angle.sin())


def with_norms(op, offsets, interleaved):
    """op with a norm for each offset that is not None; their weights follow cos and sin."""

    def run(q, k, cos, sin, *weights):
        weights = iter(weights)
        q_norm, k_norm = (None if offset is None else (next(weights), 1e-6, offset) for offset in offsets)
        return op(q, k, cos, sin, interleaved=interleaved, q_norm=q_norm, k_norm=k_norm)

    return run


def compare(inputs, dtypes, offsets=(None, None), interleaved=False):
    dtypes = [dtypes[0]] * 2 + [dtypes[1]] * 2 + [torch.float32] * (len(inputs) - 4)  # master weights stay fp32
    assert_close_to_truth(*(with_norms(op, offsets, interleaved) for op in (rope, rope_ref)), inputs, dtypes)


@pytest.mark.covers(2)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_against_the_formula(interleaved, heads, dtypes):
    head_dim, rotated = HEADS[heads]
    compare(make(head_dim=head_dim, rotated=rotated), DTYPES[dtypes], interleaved=interleaved)


@pytest.mark.covers(1)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("norms", NORMS)
def test_with_norms(norms, dtypes):
    weights = [torch.rand(32, requires_grad=True) for _ in range(2)]
    # 110 tokens of 3 heads are more rows than the programs of the backward take at once.
    compare([*make(110, head_dim=32, rotated=24), *weights], DTYPES[dtypes], NORMS[norms], norms == "gemma-like")


@pytest.mark.parametrize("offsets", [(0.0, None), (None, 1.0)], ids=["q", "k"])
def test_a_norm_of_one_alone(offsets):
    compare([*make(), torch.rand(16, requires_grad=True)], DTYPES["bf16, table fp32"], offsets)


@pytest.mark.parametrize("heads", HEADS)
def test_norms_of_all_head_sizes(heads):
    head_dim, rotated = HEADS[heads]
    weights = [torch.rand(head_dim, requires_grad=True) for _ in range(2)]
    compare([*make(29, head_dim=head_dim, rotated=rotated), *weights], DTYPES["bf16"], (0.0, 1.0))


@pytest.mark.parametrize("tokens,heads,kv_heads", [(1, 1, 1), (70, 14, 2), (5, 1, 8)])
def test_other_numbers_of_heads(tokens, heads, kv_heads):
    weights = [torch.rand(16, requires_grad=True) for _ in range(2)]
    compare([*make(tokens, heads, kv_heads), *weights], DTYPES["fp32"], (0.0, 0.0))


@pytest.mark.parametrize("offsets", [(None, None), (0.0, 0.0)], ids=["plain", "norms"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_repeats_bitwise_and_strides_change_nothing(interleaved, offsets):
    q, k, cos, sin = make(rotated=8)
    op = with_norms(rope, offsets, interleaved)
    weights = [torch.rand(32)[::2].requires_grad_() for offset in offsets if offset is not None]
    features_apart = torch.randn(*q.shape[:2], 32)[..., ::2].copy_(q.detach()).requires_grad_()
    first = run_with_gradients(op, [q, k, cos, sin, *weights])
    copies = [x.detach().clone(memory_format=torch.contiguous_format) for x in (q, cos, sin, *weights)]
    for other in (q, copies[0].requires_grad_(), features_apart):
        again = run_with_gradients(op, [other, k, *copies[1:3], *(w.requires_grad_() for w in copies[3:])])
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("offsets", [(None, None), (0.0, 0.0)], ids=["plain", "norms"])
def test_gradients_that_are_views(offsets):
    """What flows back may have the heads before the tokens, as PyTorch's attention has them."""
    q, k, cos, sin = make()
    weights = [torch.rand(16, requires_grad=True) for offset in offsets if offset is not None]
    op = with_norms(rope, offsets, False)

    def heads_first(*inputs):
        return [x.transpose(0, 1).contiguous() for x in op(*inputs)]

    ours = run_with_gradients(heads_first, [q, k, cos, sin, *weights])
    with use_backend("torch"):
        torchs = run_with_gradients(heads_first, [q, k, cos, sin, *weights])
    for name in ours:
        torch.testing.assert_close(ours[name], torchs[name])


def test_frozen_norms_get_no_gradient_and_change_nothing():
    inputs = [*make(), torch.rand(16, requires_grad=True), torch.rand(16, requires_grad=True)]
    op = with_norms(rope, (0.0, 0.0), False)
    everything = run_with_gradients(op, inputs)
    for frozen in ((4,), (5,), (4, 5)):
        some = run_with_gradients(op, [x.detach() if i in frozen else x for i, x in enumerate(inputs)])
        assert set(everything) - set(some) == {f"gradient of input {i}" for i in frozen}
        assert all(torch.equal(some[name], everything[name]) for name in some)


def test_one_output_unused():
    q, k, cos, sin = make()
    alone = run_with_gradients(lambda q: rope(q, k.detach(), cos, sin)[0], [q])
    both = run_with_gradients(lambda q, k: rope(q, k, cos, sin)[0], [q, k])
    assert torch.equal(alone["gradient of input 0"], both["gradient of input 0"])
    assert torch.equal(both["gradient of input 1"], torch.zeros_like(k))


def test_what_does_not_turn_passes_bitwise():
    q, k, cos, sin = make(head_dim=80, rotated=32)
    for ours, x in zip(rope(q, k, cos, sin), (q, k)):
        assert torch.equal(ours[..., 32:], x[..., 32:]) and not torch.equal(ours[..., :32], x[..., :32])


def test_no_tokens():
    weights = [torch.rand(16, requires_grad=True) for _ in range(2)]
    x, table = torch.zeros(0, 2, 16, requires_grad=True), torch.zeros(0, 8)
    result = run_with_gradients(with_norms(rope, (0.0, 0.0), False), [x, x.detach(), table, table, *weights])
    assert result["output 0"].shape == (0, 2, 16) and torch.equal(result["gradient of input 4"], torch.zeros(16))


@pytest.mark.parametrize("head_dim", [15, 264])
def test_head_dims_without_a_kernel_are_refused_by_name(head_dim):
    x, table = torch.zeros(2, 1, head_dim), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=f"head dim {head_dim}, .* even ones up to 256"):
        rope(x, x, table, table)
