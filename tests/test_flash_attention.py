"""Attention on the flat stream: the torch path against the naive matrix, and what packing must never change."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import (
    LAYOUTS,
    assert_close_to_truth,
    bounds_of,
    cu_seqlens_of,
    relative_error,
    run_with_gradients,
    shared_prompts,
)
from torch.utils._python_dispatch import TorchDispatchMode

from minisft.kernels import flash_attention as module
from minisft.kernels import flash_attention_torch as torch_path
from minisft.kernels.common import use_backend
from minisft.kernels.flash_attention import (
    flash_attention,
    flash_attention_ref,
    flash_attention_varlen,
    flash_attention_with_kvcache,
)
from minisft.kernels.flash_attention_torch import BLOCK


def qkv(num_q, num_k=None, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32):
    shapes = (num_q, heads, head_dim), *[(num_k or num_q, kv_heads, head_dim)] * 2
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def hold_to_truth(inputs, start, end, dtype, **options):
    assert_close_to_truth(
        lambda q, k, v: flash_attention(q, k, v, start, end, **options),
        lambda q, k, v: flash_attention_ref(q, k, v, start, end, **options),
        inputs,
        dtype,
    )


@pytest.mark.covers(1)
@pytest.mark.parametrize(
    "dtype, amx",  # which decides in bf16 between two forward passes
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["fp32", "bf16", "bf16 AMX"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, dtype, amx, monkeypatch):
    monkeypatch.setattr(torch_path, "HAS_AMX", amx)
    start, end = bounds_of(LAYOUTS[layout])
    hold_to_truth(qkv(len(start)), start, end, dtype)
    hold_to_truth(qkv(len(start)), start, end, dtype, window=50, softcap=4.0)


@pytest.mark.covers(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "options",
    [
        dict(window=1),
        dict(window=20),
        dict(window=500),
        dict(softcap=1.5),
        dict(softcap=30.0, window=33),
        dict(scale=0.3),
    ],
    ids=str,
)
def test_window_softcap_scale(options, dtype):
    start, end = bounds_of([100, 1, 163, 2, 37])
    hold_to_truth(qkv(len(start)), start, end, dtype, **options)


def test_short_documents_with_a_softcap():
    """They share a block, which plain packing without a softcap does not do."""
    start, end = bounds_of([20, 30, 25, 9, 40, 33, 64, 2])
    hold_to_truth(qkv(len(start)), start, end, torch.float32, softcap=1.0)


@pytest.mark.covers(2)
@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("head_dim", [2, 16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("options", [{}, dict(window=30, softcap=20.0)], ids=str)
def test_heads_and_head_dims(heads, kv_heads, head_dim, options):
    start, end = bounds_of([40, 1, 140])
    hold_to_truth(qkv(len(start), None, heads, kv_heads, head_dim), start, end, torch.bfloat16, **options)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_window_of_the_longest_document_is_no_window(softcap):
    lengths = [100, 1, 163, 37]
    start, end = bounds_of(lengths)
    inputs = qkv(len(start))

    def run(window):
        return run_with_gradients(
            lambda q, k, v: flash_attention(q, k, v, start, end, window=window, softcap=softcap), inputs
        )

    none, longest, shorter = run(None), run(163), run(162)
    assert all(torch.equal(none[name], longest[name]) for name in none)
    change = (none["output 0"] - shorter["output 0"]).abs().flatten(1).amax(1)
    different = (change > 1e-5).nonzero()[:, 0]  # below is rounding: the two ways add up in another order
    assert different.tolist() == [263]  # one token less: the last query of the longest document loses its first key


def test_a_large_softcap_is_no_softcap():
    start, end = bounds_of([100, 1, 63])
    inputs = qkv(len(start), dtype=torch.float64)

    def run(softcap):
        return run_with_gradients(lambda q, k, v: flash_attention(q, k, v, start, end, softcap=softcap), inputs)

    plain, capped = run(None), run(1e5)
    for name in plain:  # c tanh(s / c) = s - s^3 / (3 c^2) ...: with scores below 10 off by 3e-8 at most
        assert relative_error(capped[name], plain[name]) < 1e-7, name


def test_nothing_older_than_the_window_matters():
    """To the bit, in a document of several blocks; and keys that no query sees get no gradient."""
    start, end = bounds_of([5 * BLOCK])
    last, window = slice(4 * BLOCK, 5 * BLOCK), 70
    q, k, v = qkv(5 * BLOCK)
    out = flash_attention(q, k, v, start, end, window=window)
    d_k, d_v = torch.autograd.grad(out[last].sum(), (k, v))
    first = 4 * BLOCK - window + 1  # the oldest key of the oldest of these queries
    for d in (d_k, d_v):
        assert not d[:first].any() and d[first:].flatten(1).any(1).all()
    for x in (k, v):
        x.data[:first] = 1e4
    assert torch.equal(flash_attention(q, k, v, start, end, window=window)[last], out[last])


@pytest.mark.parametrize("window", [None, 30])
def test_queries_that_continue_a_cache(window):
    """Queries at positions 150..189 against 190 keys: a prompt read in pieces."""
    start, end = torch.zeros(40, dtype=torch.int32), torch.full((190,), 190, dtype=torch.int32)
    hold_to_truth(qkv(40, 190), start, end, torch.float32, q_offset=150, window=window)
    q, k, v = qkv(190)
    whole = flash_attention(q, k, v, *bounds_of([190]), window=window)
    rest = flash_attention(q[150:], k, v, start, end, q_offset=150, window=window)
    assert relative_error(rest, whole[150:]) < 1e-6  # the same sums in another order, fp32


def test_documents_that_share_a_prefix():
    """Prompt 0:50, answers 50:90 and 90:200: both answers see the prompt, neither sees the other."""
    prompt, first, second = 50, 40, 110
    start = torch.zeros(200, dtype=torch.int32)
    end = torch.tensor([200] * prompt + [90] * first + [200] * second, dtype=torch.int32)
    hold_to_truth(qkv(200), start, end, torch.float32)
    q, k, v = qkv(200)
    shared = flash_attention(q, k, v, start, end)
    alone = torch.cat((torch.arange(50), torch.arange(90, 200)))
    expected = flash_attention(q[alone], k[alone], v[alone], *bounds_of([160]))
    assert relative_error(shared[90:], expected[50:]) < 1e-6  # the same sums in another order, fp32


@pytest.mark.parametrize("prompt", [1, 63, 130, 300])
def test_pairs_that_share_their_prompt_equal_their_answers_one_by_one(prompt):
    """Preference pairs, each prompt once: outputs, and gradients as the sum over both copies of the prompt."""
    lengths = [1, 5, 64, 129]
    pairs = [(prompt, chosen, rejected) for chosen in lengths for rejected in lengths]
    items = [item for i, pair in enumerate(pairs) for item in (pair, [(17,), (1,), (140,), (70,)][i % 4])]
    start, end, copies, where, alone = shared_prompts(items)
    inputs = qkv(len(start), heads=2, kv_heads=1, dtype=torch.float64)
    shared = run_with_gradients(lambda q, k, v: flash_attention(q, k, v, start, end), inputs)
    expected = run_with_gradients(
        lambda q, k, v: flash_attention(q[copies], k[copies], v[copies], *bounds_of(alone))[where], inputs
    )
    for name, tensor in shared.items():
        assert relative_error(tensor, expected[name]) < 1e-14, name  # fp64 rounding


@pytest.mark.covers(2)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, dict(softcap=4.0)], ids=str)
@pytest.mark.parametrize(
    "items",
    [
        [(130, 64, 129), (17,), (63, 1, 5), (1, 5, 1), (70,), (1, 129, 64)],
        [(1, 1, 1), (5,), (1, 5, 1), (20, 3, 7), (1,), (2, 9, 9)],
        [(40, 30, 1, 50), (64, 64, 64)],
    ],
    ids=["long", "short, one block", "three answers"],
)
def test_shared_prompts(items, options, dtype, backend):
    start, end, copies, where, alone = shared_prompts(items)
    bounds = bounds_of(alone)
    with use_backend(backend):
        assert_close_to_truth(
            lambda q, k, v: flash_attention(q, k, v, start, end, **options),
            lambda q, k, v: flash_attention_ref(q[copies], k[copies], v[copies], *bounds, **options)[where],
            qkv(len(start)),
            dtype,
        )


def test_a_query_without_keys_gets_zeros():
    start = torch.tensor([0, 1, 9, 3], dtype=torch.int32)  # query 2 starts after itself
    end = torch.tensor([1, 4, 4, 0], dtype=torch.int32)  # key 3 ends before anybody: query 3 sees nothing
    for dtype in (torch.float32, torch.float16):
        hold_to_truth(qkv(4), start, end, dtype)
    q, k, v = qkv(4)
    out = flash_attention(q, k, v, start, end)
    out.sum().backward()
    assert torch.equal(out[2:], torch.zeros(2, 4, 16))
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    # A block of queries that see nothing at all has no keys to multiply with.
    nothing = flash_attention(q[:2], k, v, torch.tensor([3, 3]), end)
    assert torch.equal(nothing, torch.zeros(2, 4, 16))


@pytest.mark.parametrize("options", [{}, dict(window=2), dict(softcap=0.7), dict(window=3, softcap=2.0)], ids=str)
def test_gradcheck(options):
    start, end = bounds_of([3, 1, 5])
    inputs = qkv(9, heads=2, kv_heads=1, head_dim=3, dtype=torch.float64)
    for backend in ("torch", "reference"):
        with use_backend(backend):
            assert torch.autograd.gradcheck(lambda q, k, v: flash_attention(q, k, v, start, end, **options), inputs)


def test_agrees_with_sdpa():
    """An implementation that is not ours."""
    q, k, v = qkv(200)
    ours = flash_attention(q, k, v, *bounds_of([200]))
    theirs = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True)
    assert relative_error(ours, theirs.transpose(0, 1)) < 1e-6  # both fp32, sums in another order


@pytest.mark.parametrize("options", [{}, dict(window=6), dict(window=150), dict(window=8, softcap=2.0)], ids=str)
@pytest.mark.parametrize("lengths", [[100, 1, 63, 205], [5, 7, 1, 30, 9]], ids=["long", "short"])
def test_packed_equals_one_by_one(lengths, options):
    inputs = qkv(sum(lengths), dtype=torch.float64)
    start, end = bounds_of(lengths)
    packed = run_with_gradients(lambda q, k, v: flash_attention(q, k, v, start, end, **options), inputs)

    def one_by_one(q, k, v):
        documents = zip(*(x.split(lengths) for x in (q, k, v)))
        return torch.cat([flash_attention(*d, *bounds_of([len(d[0])]), **options) for d in documents])

    alone = run_with_gradients(one_by_one, inputs)
    for name, tensor in packed.items():
        assert relative_error(tensor, alone[name]) < 1e-14, name  # fp64 rounding


def test_a_batch_of_documents_may_be_cut_into_parts(monkeypatch):
    lengths = [200, 7, 203, 5, 201, 6]  # two groups, one in two blocks each, both with padding
    start, end = bounds_of(lengths)
    inputs = qkv(sum(lengths), dtype=torch.float64)
    whole = run_with_gradients(lambda q, k, v: flash_attention(q, k, v, start, end), inputs)
    monkeypatch.setattr(torch_path, "AT_ONCE", 100)
    parts = run_with_gradients(lambda q, k, v: flash_attention(q, k, v, start, end), inputs)
    for name, tensor in parts.items():
        assert relative_error(tensor, whole[name]) < 1e-14, name  # fp64 rounding


@pytest.mark.parametrize("dtype, tile", [(torch.float32, 1), (torch.bfloat16, 16)], ids=["fp32", "bf16"])
def test_blocks_of_16_bit_documents_are_whole_tiles(dtype, tile):
    """oneDNN compiles code for each shape in 16 bits: 200 lengths are 8 sizes of blocks."""
    sizes = {group.n for n in range(1, 201) for group in torch_path._make_plan([n], 2, 1, dtype).groups}
    assert sizes == set(range(tile, 129, tile))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [[70, 250, 130], [20, 30, 25]], ids=["long", "short, one block"])
@pytest.mark.parametrize("options", [{}, dict(window=10), dict(window=40, softcap=3.0)], ids=str)
def test_neighbours_change_nothing_bitwise(options, lengths, dtype):
    start, end = bounds_of(lengths)
    middle = slice(lengths[0], lengths[0] + lengths[1])
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(sum(lengths))]
    others = [torch.randn_like(x).mul_(5).requires_grad_() for x in inputs]
    for x, y in zip(others, inputs):
        x.data[middle] = y.data[middle]
    a, b = (
        run_with_gradients(lambda q, k, v: flash_attention(q, k, v, start, end, **options), x) for x in (inputs, others)
    )
    for name in a:
        assert torch.equal(a[name][middle], b[name][middle]), name
        assert not torch.equal(a[name], b[name])


@pytest.mark.parametrize("lengths", [[BLOCK + 1, BLOCK + 70], [7, 5]], ids=["long", "padded"])
def test_neighbours_may_even_be_nan(lengths):
    q, k, v = qkv(sum(lengths))
    start, end = bounds_of(lengths)
    expected = flash_attention(q, k, v, start, end)
    for x in (q, k, v):
        x.data[: lengths[0]] = float("nan")
    assert torch.equal(flash_attention(q, k, v, start, end)[lengths[0] :], expected[lengths[0] :])


def test_dropout_keeps_the_mean_and_its_gradient_uses_the_same_draw():
    start, end = bounds_of([150, 3])
    q, k, v = qkv(153, dtype=torch.float64)
    torch.manual_seed(3)
    once = flash_attention(q, k, v, start, end, dropout=0.25)
    torch.manual_seed(3)
    assert torch.equal(once, flash_attention(q, k, v, start, end, dropout=0.25))
    exact = flash_attention(q, k, v, start, end)
    assert relative_error(once, exact) > 0.01
    many = sum(flash_attention(q, k, v, start, end, dropout=0.25) for _ in range(200)) / 200
    # One draw is off by about 0.56, the mean of 200 by a fourteenth of that: 0.04.
    assert relative_error(many, exact) < 0.1
    small = qkv(6, head_dim=2, dtype=torch.float64)

    def seeded(q, k, v):
        torch.manual_seed(5)
        return flash_attention(q, k, v, *bounds_of([4, 2]), dropout=0.4)

    assert torch.autograd.gradcheck(seeded, small)


def test_strided_inputs():
    """q, k and v as views of one fused projection."""
    start, end = bounds_of([30, 50])
    fused = torch.randn(80, 8, 16)
    q, k, v = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    assert torch.equal(
        flash_attention(q, k, v, start, end),
        flash_attention(q.contiguous(), k.contiguous(), v.contiguous(), start, end),
    )
    hold_to_truth([x.requires_grad_() for x in (q, k, v)], start, end, torch.float32)


def test_autocast_does_not_change_the_dtype_of_the_computation():
    start, end = bounds_of([30, 50])
    inputs = qkv(80)

    def run(q, k, v):
        return flash_attention(q, k, v, start, end)

    plain = run_with_gradients(run, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run_with_gradients(run, inputs)
    assert all(torch.equal(plain[name], inside[name]) for name in plain)


def test_varlen_is_the_same_op():
    lengths = [30, 1, 150]
    q, k, v = qkv(sum(lengths))
    expected = flash_attention(q, k, v, *bounds_of(lengths), window=40)
    assert torch.equal(flash_attention_varlen(q, k, v, cu_seqlens_of(lengths), 150, window=40), expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(window=1), dict(window=7), dict(softcap=2.0, scale=0.4), dict(window=9, softcap=1.0), dict(window=99)],
    ids=str,
)
def test_kvcache_equals_the_last_row_of_the_forward(options, backend):
    filled, length = [1, 9, 40, 33], 40
    q = torch.randn(4, 4, 16)
    k_cache, v_cache = torch.randn(2, 4, length, 2, 16)
    for row, n in enumerate(filled):
        k_cache[row, n:], v_cache[row, n:] = 1e4, 1e4  # places that are not filled must not matter
    with use_backend(backend):
        out = flash_attention_with_kvcache(q, k_cache, v_cache, torch.tensor(filled), **options)
    for row, n in enumerate(filled):
        queries = torch.randn(n, 4, 16)
        queries[-1] = q[row]
        whole = flash_attention(queries, k_cache[row, :n], v_cache[row, :n], *bounds_of([n]), **options)
        assert relative_error(out[row], whole[-1]) < 1e-6  # the same sums in another order, fp32


def test_no_step_copies_the_cache():
    """In memory as the model keeps it: [B, Hkv, L, Dh], turned, and cut to the longest row."""
    k_cache, v_cache = torch.randn(2, 4, 2, 50, 16).transpose(2, 3)[:, :, :40]
    outputs = []

    class Outputs(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                outputs.append((out.untyped_storage().data_ptr(), out.numel(), func.name()))
            return out

    with Outputs():
        flash_attention_with_kvcache(torch.randn(4, 4, 16), k_cache, v_cache, torch.tensor([1, 9, 40, 33]))
    cache = k_cache.untyped_storage().data_ptr()
    made = [(count, name) for place, count, name in outputs if place != cache]
    assert made and max(made)[0] < k_cache.numel() / 2, max(made)


def test_kvcache_without_rows():
    for backend in ("torch", "reference"):
        with use_backend(backend):
            out = flash_attention_with_kvcache(
                torch.randn(0, 4, 16), *torch.randn(2, 0, 5, 2, 16), torch.zeros(0).int()
            )
        assert out.shape == (0, 4, 16)


def test_kvcache_empty_row_and_bf16():
    q, caches = torch.randn(2, 4, 16).bfloat16(), torch.randn(2, 2, 5, 2, 16).bfloat16()
    out = flash_attention_with_kvcache(q, *caches, torch.tensor([0, 5]))
    assert out.dtype == torch.bfloat16 and torch.equal(out[0], torch.zeros(4, 16).bfloat16())


@pytest.mark.parametrize(
    "change,words",
    [
        (dict(k=torch.zeros(9, 3, 16), v=torch.zeros(9, 3, 16)), "4 query heads are not a multiple of 3"),
        (dict(k=torch.zeros(9, 0, 16), v=torch.zeros(9, 0, 16)), "4 query heads are not a multiple of 0"),
        (dict(k=torch.zeros(9, 2, 8)), r"\(9, 2, 8\)"),
        (dict(q=torch.zeros(9, 4, 16).bfloat16()), "torch.bfloat16"),
        (dict(start=torch.zeros(8, dtype=torch.int32)), r"start \(8,\)"),
        (dict(end=torch.zeros(9)), "torch.float32"),
        (dict(window=0), "window 0"),
        (dict(softcap=0.0), "softcap 0.0"),
        (dict(dropout=1.0), "dropout 1.0"),
        (dict(q_offset=-1), "q_offset -1"),
    ],
)
def test_bad_arguments(change, words):
    q, k, v = qkv(9)
    start, end = bounds_of([9])
    with pytest.raises(ValueError, match=words):
        flash_attention(**{**dict(q=q, k=k, v=v, start=start, end=end), **change})


def test_what_only_a_gpu_reads(monkeypatch):
    """The mean length of the documents chooses the tiles, whole documents share nothing; a head has two parts, powers of two."""
    seen = {}
    monkeypatch.setattr(module, "flash_attention", lambda *arguments, **options: seen.update(options))
    flash_attention_varlen(*qkv(9), torch.tensor([0, 2, 3, 9]))
    assert seen == {"mean_length": 3.0, "shared": False}
    assert [module._parts(n) for n in (64, 80, 96, 128)] == [(64, 0), (64, 16), (64, 32), (128, 0)]


def test_bad_arguments_of_the_wrappers():
    q, k, v = qkv(9)
    with pytest.raises(ValueError, match="runs from 0 to 8: expected 0 to 9"):
        flash_attention_varlen(q, k, v, torch.tensor([0, 8]), 8)
    with pytest.raises(ValueError, match="runs from 0 to 9: .* never back"):
        flash_attention_varlen(q, k, v, torch.tensor([0, 7, 3, 9]))
    with pytest.raises(ValueError, match="1 numbers has no document"):
        flash_attention_varlen(q[:0], k[:0], v[:0], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"cache_seqlens \(3,\)"):
        flash_attention_with_kvcache(q, *torch.zeros(2, 9, 5, 2, 16), torch.zeros(3, dtype=torch.int32))
