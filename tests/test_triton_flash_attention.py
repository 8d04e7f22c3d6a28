"""flash_attention by its Triton kernels, in the interpreter: against the formula, in poisoned memory, and what packing must
never change."""

import pytest
import torch
from tolerance import (
    LAYOUTS,
    assert_close_to_truth,
    bounds_of,
    padded_with_nan,
    relative_error,
    run_with_gradients,
    shared_prompts,
)
from torch.utils.checkpoint import checkpoint

from benchmarks import sweep_flash_attention
from benchmarks.compare import CpuClock, first_calls
from minisft.kernels import common
from minisft.kernels import flash_attention as module
from minisft.kernels.common import use_backend
from minisft.kernels.flash_attention import (
    flash_attention,
    flash_attention_ref,
    flash_attention_varlen,
    flash_attention_with_kvcache,
)
from minisft.kernels.flash_attention_configs import CONFIGS, candidate, config_for
from minisft.kernels.rope import rope

pytestmark = pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# A query with one key has no dq. Plain torch gets 0 - 0; here rowsum(p * dp) comes by way of the output, as sum(out * dout),
# and the difference of two sums that are equal but for their order remains.
ONE_KEY = 1e-5
# As in tolerance.py, for tiles of 16 and 32 tokens: those of the interpreter's configurations.
SMALL_LAYOUTS = {
    "one_token": [1],
    "one_63": [63],
    "ones": [1, 1, 1, 1, 1],
    "on_tile_edges": [32, 64, 32],
    "filler_tail": [75, 31, 35] + [1] * 18,
}
ONE_PASS_AND_SPLIT = pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "split"])


def qkv(num_q, num_k=None, heads=2, kv_heads=1, head_dim=16):
    shapes = (num_q, heads, head_dim), *[(num_k or num_q, kv_heads, head_dim)] * 2
    return [padded_with_nan(torch.randn(shape)).requires_grad_() for shape in shapes]


def hold_to_truth(inputs, start, end, dtype, deterministic=False, floor=None, **options):
    assert_close_to_truth(
        lambda q, k, v: flash_attention(q, k, v, start, end, deterministic=deterministic, **options),
        lambda q, k, v: flash_attention_ref(q, k, v, start, end, **options),
        inputs,
        dtype,
        floor=floor,
    )


@pytest.mark.covers(2)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("layout", SMALL_LAYOUTS)
def test_layouts(layout, deterministic, dtype):
    start, end = bounds_of(SMALL_LAYOUTS[layout])
    one_key = ONE_KEY if layout in ("one_token", "ones") else None
    hold_to_truth(qkv(len(start)), start, end, dtype, deterministic, one_key)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("options", [{}, dict(window=50, softcap=4.0)], ids=str)
@pytest.mark.parametrize("layout", ["one_1000", "inside_tiles", "long_then_short"])
def test_longer_layouts(layout, options, deterministic, dtype):
    start, end = bounds_of(LAYOUTS[layout])
    hold_to_truth(qkv(len(start), heads=2, kv_heads=1), start, end, dtype, deterministic, **options)


@pytest.mark.covers(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize(
    "options",
    [
        dict(window=1),
        dict(window=20),
        dict(window=500),
        dict(softcap=1.5),
        dict(scale=0.3),
        dict(softcap=30.0, window=33),
    ],
    ids=str,
)
def test_window_softcap_scale(options, deterministic, dtype):
    start, end = bounds_of([50, 1, 33, 2])
    one_key = ONE_KEY if options.get("window") == 1 else None
    hold_to_truth(qkv(len(start)), start, end, dtype, deterministic, one_key, **options)


@pytest.mark.covers(1)
@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(1, 1, 64), (3, 1, 32), (4, 2, 80), (2, 2, 96), (6, 2, 128), (2, 1, 256)]
)
def test_heads_and_head_dims(heads, kv_heads, head_dim, deterministic):
    start, end = bounds_of([20, 1, 49])
    inputs = qkv(len(start), None, heads, kv_heads, head_dim)
    hold_to_truth(inputs, start, end, torch.bfloat16, deterministic, window=30, softcap=20.0)


@pytest.mark.covers(1)
@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("seed", range(4))
def test_random_layouts_of_documents_and_shared_prefixes(seed, deterministic):
    """Documents, some of which are a prompt and several answers that see the prompt and not each other."""
    generator = torch.Generator().manual_seed(seed)

    def length(most):
        return int(torch.randint(1, most, (1,), generator=generator))

    start, end = [], []
    for document in range(4):
        first, prompt = len(start), length(35)
        answers = [length(25) for _ in range(document)]
        whole = prompt + sum(answers)
        start += [first] * whole
        end += [first + whole] * prompt
        for answer in answers:
            end += [len(end) + answer] * answer
    start, end = torch.tensor(start, dtype=torch.int32), torch.tensor(end, dtype=torch.int32)
    inputs = qkv(len(start))
    hold_to_truth(inputs, start, end, torch.float32, deterministic, window=None if seed % 2 else 37)


@pytest.mark.covers(1)
@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_pairs_that_share_their_prompt_equal_their_answers_one_by_one(head_dim, deterministic):
    """Boundaries inside of tiles and on their edges, plain documents between; gradients are sums over a prompt's copies."""
    start, end, copies, where, alone = shared_prompts([(9,), (32, 16, 21), (1, 5, 1), (18,), (17, 1, 33)])
    bounds = bounds_of(alone)
    assert_close_to_truth(
        lambda q, k, v: flash_attention(q, k, v, start, end, deterministic=deterministic),
        lambda q, k, v: flash_attention_ref(q[copies], k[copies], v[copies], *bounds)[where],
        qkv(len(start), head_dim=head_dim),
        torch.float32,
    )


@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("window", [None, 20])
def test_whole_documents_need_no_look_at_their_ends(window, deterministic):
    """To the bit: the same tiles in the same order, with or without the mask where it hides nothing."""
    inputs, bounds = qkv(85), bounds_of([40, 1, 42, 1, 1])
    options = dict(window=window, deterministic=deterministic)
    plain = run_with_gradients(lambda *x: flash_attention(*x, *bounds, **options, shared=False), inputs)
    shared = run_with_gradients(lambda *x: flash_attention(*x, *bounds, **options), inputs)
    assert all(torch.equal(plain[name], shared[name]) for name in plain)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
def test_keys_that_have_ended_are_not_read():
    """The first answer, two whole tiles of keys and more, holds NaN; what follows it does not see it, not even times zero."""
    prompt, first, second = 40, 88, 30
    start = torch.zeros(prompt + first + second, dtype=torch.int32)
    end = torch.tensor([len(start)] * prompt + [prompt + first] * first + [len(start)] * second, dtype=torch.int32)
    inputs = qkv(len(start), head_dim=64)
    for x in inputs[1:]:
        x.data[64:96] = float("nan")  # tiles of 16 and of 32 keys, none of them with a key of another part
    out = flash_attention(*inputs, start, end, deterministic=True)
    assert out[prompt + first :].isfinite().all() and out[96 : prompt + first].isnan().all()
    (dq,) = torch.autograd.grad(out[prompt + first :].sum(), inputs[:1])
    assert dq[prompt + first :].isfinite().all()


@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("window", [None, 30])
def test_queries_that_continue_a_cache(window, deterministic):
    """Queries at positions 78..117 against 118 keys: a prompt read in pieces. The first query is the last but one of a tile
    of 16 keys, so that a block that is taken for wholly visible one token too early shows."""
    start, end = torch.zeros(40, dtype=torch.int32), torch.full((118,), 118, dtype=torch.int32)
    hold_to_truth(qkv(40, 118), start, end, torch.float32, deterministic, q_offset=78, window=window)


@ONE_PASS_AND_SPLIT
def test_queries_that_start_after_keys_that_do_not_end(deterministic):
    """Only `start` hides the first 40 keys from the later queries."""
    start, end = torch.tensor([0] * 48 + [40] * 48).int(), torch.full((96,), 96, dtype=torch.int32)
    hold_to_truth(qkv(96), start, end, torch.float32, deterministic)


@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("num_k", [30, 90], ids=["fewer keys", "more keys"])
def test_other_numbers_of_keys(num_k, deterministic):
    start, end = torch.zeros(60, dtype=torch.int32), torch.full((num_k,), 99, dtype=torch.int32)
    hold_to_truth(qkv(60, num_k), start, end, torch.float32, deterministic)


@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_a_query_without_keys_gets_zeros(dtype, deterministic):
    start = torch.tensor([0, 1, 9, 3] + [70] * 60, dtype=torch.int32)  # queries from 2 on start after themselves
    end = torch.tensor([1, 4, 4, 0] + [64] * 60, dtype=torch.int32)  # key 3 ends before anybody
    inputs = qkv(64)
    hold_to_truth(inputs, start, end, dtype, deterministic, ONE_KEY)
    out = flash_attention(*inputs, start, end, deterministic=deterministic)
    assert torch.equal(out[2:], torch.zeros(62, 2, 16))
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert gradient.isfinite().all() and not gradient[4:].any()


@ONE_PASS_AND_SPLIT
def test_packed_equals_one_by_one(deterministic):
    lengths = [40, 1, 33, 70]
    inputs = qkv(sum(lengths))
    options = dict(deterministic=deterministic, window=50)
    packed = run_with_gradients(lambda *x: flash_attention(*x, *bounds_of(lengths), **options), inputs)

    def one_by_one(q, k, v):
        documents = zip(*(x.split(lengths) for x in (q, k, v)))
        return torch.cat([flash_attention(*d, *bounds_of([len(d[0])]), **options) for d in documents])

    alone = run_with_gradients(one_by_one, inputs)
    for name, tensor in packed.items():
        assert relative_error(tensor, alone[name]) < 1e-6, name  # fp32: a document's sums fall into other tiles


@pytest.mark.covers(2)
@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", [{}, dict(window=10, softcap=3.0)], ids=str)
def test_neighbours_change_nothing_bitwise(options, dtype, deterministic):
    lengths = [21, 45, 30]
    start, end = bounds_of(lengths)
    middle = slice(lengths[0], lengths[0] + lengths[1])
    inputs = [x.detach().to(dtype).requires_grad_() for x in qkv(sum(lengths))]
    others = [torch.randn_like(x).mul_(5).requires_grad_() for x in inputs]
    for x, y in zip(others, inputs):
        x.data[middle] = y.data[middle]
    options = dict(options, deterministic=deterministic)
    a, b = (run_with_gradients(lambda *x: flash_attention(*x, start, end, **options), x) for x in (inputs, others))
    for name in a:
        assert torch.equal(a[name][middle], b[name][middle]), name
        assert not torch.equal(a[name], b[name])


@pytest.mark.parametrize("window", [None, 16])
def test_repeats_bitwise_and_strides_change_nothing(window):
    """q, k and v as views of one fused projection, as tensors of their own, and with rows that no wide load fits."""
    start, end = bounds_of([30, 50])
    fused = torch.randn(80, 4, 64, requires_grad=True).split([2, 1, 1], dim=1)
    own = [x.detach().contiguous().requires_grad_() for x in fused]
    odd = [torch.randn(80, 4, 65)[:, : x.shape[1], :64].copy_(x.detach()).requires_grad_() for x in own]
    results = [
        run_with_gradients(lambda *x: flash_attention(*x, start, end, deterministic=True, window=window), inputs)
        for inputs in (fused, fused, own, odd)
    ]
    assert all(torch.equal(results[0][name], other[name]) for other in results for name in other)


def launches_of(call, monkeypatch) -> list[tuple[str, tuple]]:
    """(kernel, grid) of every launch of a tile kernel in call()."""
    launches, launch = [], module._launch

    def spy(kernel, grid, config, arguments):
        launches.append((kernel.fn.__name__, grid))
        launch(kernel, grid, config, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_launch", spy)
        call()
    return launches


def test_grids_depend_on_the_number_of_tokens_alone(monkeypatch):
    """So one CUDA graph serves every batch."""
    inputs = qkv(90)

    def step(lengths):
        start, end = bounds_of(lengths)
        return lambda: flash_attention(*inputs, start, end).sum().backward()

    assert launches_of(step([90]), monkeypatch) == launches_of(step([1, 2, 3, 4, 80]), monkeypatch)


def test_torch_chooses_the_kernels_that_repeat(monkeypatch):
    inputs, bounds = qkv(20), bounds_of([20])

    def names(**options):
        launches = launches_of(lambda: flash_attention(*inputs, *bounds, **options).sum().backward(), monkeypatch)
        return [name.removeprefix("_flash_attention_").removesuffix("_kernel") for name, _ in launches]

    assert names() == ["fwd", "bwd_kv"]
    assert names(deterministic=True) == ["fwd", "bwd_kv", "bwd_q"]
    torch.use_deterministic_algorithms(True)
    try:
        assert names() == ["fwd", "bwd_kv", "bwd_q"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_group_of_query_heads_may_be_split(monkeypatch):
    """The grid grows, the sums over a group stay, but for the rounding of another order, and they repeat to the bit."""
    inputs, bounds = qkv(40, heads=4, kv_heads=1), bounds_of([10, 30])

    def run(splits):
        monkeypatch.setattr(module, "_splits", lambda *sizes: splits)
        return run_with_gradients(lambda *x: flash_attention(*x, *bounds), inputs)

    whole, halves, again = run(1), run(2), run(2)
    assert launches_of(lambda: run(2), monkeypatch)[1][1] == (2, 1, 2)
    assert all(torch.equal(halves[name], again[name]) for name in halves)
    assert all(relative_error(halves[name], whole[name]) < 1e-6 for name in whole)  # fp32


def test_splits_fill_the_card_and_no_more():
    """T = 4,096 in tiles of 128 keys on 132 multiprocessors, with the query and key heads of four models."""
    heads = {"SmolLM2 135M": (9, 3), "Qwen2.5 0.5B": (14, 2), "Llama 3.2 1B": (32, 8), "no groups": (2, 2)}
    splits = {name: module._splits(32 * kv, q // kv, 132) for name, (q, kv) in heads.items()}
    assert splits == {"SmolLM2 135M": 3, "Qwen2.5 0.5B": 7, "Llama 3.2 1B": 1, "no groups": 1}


@ONE_PASS_AND_SPLIT
def test_dropout_draws_the_same_in_every_kernel(deterministic):
    """With v the identity the output is the matrix of the kept probabilities: it tells which were kept."""
    T, rate = 60, 0.4
    q, k, _ = qkv(T, heads=2, kv_heads=1, head_dim=64)
    v = torch.eye(T, 64)[:, None].requires_grad_()
    start, end = bounds_of([25, 35])
    kept = []

    def ours(q, k, v):
        torch.manual_seed(3)
        out = flash_attention(q, k, v, start, end, dropout=rate, deterministic=deterministic)
        kept.append(out.detach()[:, :, :T].transpose(0, 1) != 0)
        return out

    def exact(q, k, v):
        kept_and_v = torch.eye(T, 64, dtype=q.dtype)[:, None]
        p = flash_attention_ref(q, k, kept_and_v, start, end)[:, :, :T].transpose(0, 1)
        return torch.einsum("hqk,kd->qhd", p * kept[0] / (1 - rate), v[:, 0])

    result = run_with_gradients(ours, [q, k, v])
    truth = run_with_gradients(exact, [x.detach().double().requires_grad_() for x in (q, k, v)])
    for name, tensor in result.items():
        assert relative_error(tensor, truth[name]) < 1e-6, name  # fp32 against fp64
    visible = flash_attention_ref(q, k, v, start, end)[:, :, :T].transpose(0, 1) != 0
    share = kept[0].sum() / visible.sum()  # of some 1,900 draws: a standard deviation is 0.011
    assert abs(share - (1 - rate)) < 0.05 and not torch.equal(kept[0][0], kept[0][1])


@pytest.mark.covers(1)
@ONE_PASS_AND_SPLIT
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_rotary_embedding_may_be_part_of_the_op(dtype, interleaved, norms, deterministic):
    """As near to fp64 as the two ops one after another, and in one pass without the rounding of dq between them."""
    q, k, v = qkv(50, heads=4, kv_heads=2, head_dim=32)
    start, end = bounds_of([20, 1, 29])
    angle = torch.arange(50.0)[:, None] * 10.0 ** -torch.arange(12)
    weights = [torch.rand(32, requires_grad=True) for _ in range(2)] if norms else []

    def call(attention, fused):
        def run(q, k, v, *weights):
            norms = {f"{name}_norm": (w, 1e-5, 0.0) for name, w in zip("qk", weights)}
            rotary = dict(cos=angle.cos().to(q.dtype), sin=angle.sin().to(q.dtype), interleaved=interleaved, **norms)
            if not fused:
                return attention(*rope(q, k, **rotary), v, start, end, **options)
            return attention(q, k, v, start, end, rotary=rotary, **options)

        options = {} if attention is flash_attention_ref else {"deterministic": deterministic}
        return run

    leaves = [q, k, v, *weights]
    inputs = [x.detach().to(dtype if x.ndim == 3 else x.dtype).requires_grad_() for x in leaves]
    fused = run_with_gradients(call(flash_attention, True), inputs)
    apart = run_with_gradients(call(flash_attention, False), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with use_backend("reference"):
        truth = run_with_gradients(call(flash_attention_ref, False), exact, like=fused)
    assert torch.equal(fused["output 0"], apart["output 0"])
    for name, value in fused.items():
        assert value.dtype == apart[name].dtype
        # 25 %: which way single numbers are rounded is chance, and the gradient of a norm has 32 of them
        assert relative_error(value, truth[name]) <= 1.25 * relative_error(apart[name], truth[name]) + 1e-7, name
        assert torch.equal(value, apart[name]) or not deterministic


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("head_dim", [32, 80], ids=["every feature turns", "some do"])
def test_dk_is_turned_back_by_one_program_or_after_the_sum_of_several(head_dim, splits, monkeypatch):
    inputs, bounds = qkv(70, heads=4, kv_heads=2, head_dim=head_dim), bounds_of([20, 1, 49])
    angle = torch.arange(70.0)[:, None] * 10.0 ** -torch.arange(16)
    rotary, options = dict(cos=angle.cos(), sin=angle.sin()), dict(deterministic=True)
    monkeypatch.setattr(module, "_splits", lambda *sizes: splits)
    fused = run_with_gradients(lambda *x: flash_attention(*x, *bounds, rotary=rotary, **options), inputs)

    def one_after_another(q, k, v):
        return flash_attention(*rope(q, k, **rotary), v, *bounds, **options)

    apart = run_with_gradients(one_after_another, inputs)
    assert all(torch.equal(fused[name], apart[name]) for name in apart)


@pytest.mark.parametrize("recompute", [False, True], ids=["all kept", "recomputed"])
def test_layers_set_the_next_dq_to_zero(recompute, monkeypatch):
    """The third layer has other shapes, so that it and the one below find nothing. Memory is NaN before it is written. What is
    left at the end is freed by the next forward pass."""
    inputs, bounds = qkv(70, heads=4, kv_heads=2), bounds_of([20, 1, 49])
    finds_zeros, kernel = [], module._flash_attention_delta_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(out, dout, delta, dq_sum, *rest, **options):
                finds_zeros.append(dq_sum is None)
                kernel[grid](out, dout, delta, dq_sum, *rest, **options)

            return launch

    monkeypatch.setattr(module, "_flash_attention_delta_kernel", Spy())

    def layers(deterministic):
        def attend(q, k, v):
            return flash_attention(q, k, v, *bounds, deterministic=deterministic)

        def call(q, k, v):
            for heads in (4, 4, 2, 4, 4):
                arguments = q[:, :heads], k, v
                out = checkpoint(attend, *arguments, use_reentrant=False) if recompute else attend(*arguments)
                q = q + out.repeat(1, 4 // heads, 1)
            return q

        return run_with_gradients(call, inputs)

    repeatable = layers(True)
    finds_zeros.clear()
    quick = layers(False)
    assert finds_zeros == [False, True, False, False, True]
    assert all(relative_error(quick[name], repeatable[name]) < 1e-6 for name in repeatable)  # fp32
    (left,) = module._zeros.values()
    assert left.shape == inputs[0].shape and not left.any()
    flash_attention(*inputs, *bounds)
    assert not module._zeros


@pytest.mark.covers(2)
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("head_dim", [32, 48], ids=["every feature turns", "some do"])
def test_q_and_k_may_be_turned_where_they_lie(head_dim, interleaved, norms):
    """Bitwise the same, in the memory of the product that made them. Not where a norm's backward pass reads them, and not where
    the heads do not lie one after another."""
    start, end = bounds_of([9, 1, 14])
    angle = torch.arange(24.0)[:, None] * 10.0 ** -torch.arange(16)
    rotary = {"cos": angle.cos(), "sin": angle.sin(), "interleaved": interleaved}
    if norms:
        rotary |= {f"{name}_norm": (torch.rand(head_dim), 1e-5, 0.0) for name in "qk"}
    options = {"deterministic": True, "rotary": rotary}
    qkv = torch.randn(24, 4, head_dim)
    given, turned = qkv.split([2, 1, 1], dim=1), rope(*qkv.split([2, 1, 1], dim=1)[:2], **rotary)
    layouts = {
        "one product": qkv.clone().split([2, 1, 1], dim=1),
        "a part of one": torch.cat([qkv, qkv], 1)[:, 4:].split([2, 1, 1], dim=1),
        "every other head": (given[0].repeat_interleave(2, 1)[:, ::2], *given[1:]),
    }

    def run(q, k, v, may_overwrite):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = flash_attention(*leaves, start, end, may_overwrite=may_overwrite, **options)
        out.backward(torch.ones_like(out))
        return [out.detach(), *(x.grad for x in leaves)]

    plain = run(*given, False)
    assert torch.equal(torch.cat(given, 1), qkv)
    for name, (q, k, v) in layouts.items():
        assert all(torch.equal(x, y) for x, y in zip(run(q, k, v, True), plain))
        expected = given if norms or name == "every other head" else turned
        assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])


@pytest.mark.parametrize("case", ["one key", "one query", "k is v", "q is k", "q is v"])
def test_what_lies_in_one_place_is_not_turned_there(case):
    start, end = bounds_of([9, 1, 14])
    angle = torch.arange(24.0)[:, None] * 10.0 ** -torch.arange(16)
    q, k, v = torch.randn(3, 24, 2, 32)
    if case == "one key":
        k = k[:1].expand(24, 2, 32)
    elif case == "one query":
        q = q[:1].expand(24, 2, 32)
    else:
        q, k, v = (q, k, k) if case == "k is v" else (q, q, v) if case == "q is k" else (q, k, q)
    rotary = {"cos": angle.cos(), "sin": angle.sin()}
    plain, overwriting = (
        flash_attention(q, k, v, start, end, rotary=rotary, may_overwrite=may) for may in (False, True)
    )
    assert torch.equal(plain, overwriting)


def test_varlen_is_the_same_op():
    lengths = [30, 1, 50]
    inputs, cu_seqlens = qkv(sum(lengths)), torch.tensor([0, 30, 31, 81])
    expected = flash_attention(*inputs, *bounds_of(lengths), window=40)
    assert torch.equal(flash_attention_varlen(*inputs, cu_seqlens, 50, window=40), expected)


def test_generation_needs_no_kernel():
    q, caches = torch.randn(2, 4, 16), torch.randn(2, 2, 5, 2, 16)
    assert flash_attention_with_kvcache(q, *caches, torch.tensor([3, 5])).isfinite().all()


@pytest.mark.parametrize(
    "head_dim, scale, words", [(8, 1.0, "head dim 8"), (100, 1.0, "head dim 100"), (16, -1.0, "scale -1")]
)
def test_what_the_kernels_do_not_serve(head_dim, scale, words):
    inputs, bounds = qkv(5, head_dim=head_dim), bounds_of([5])
    with pytest.raises(ValueError, match=words):
        flash_attention(*inputs, *bounds, scale=scale)
    with use_backend("torch"):
        assert flash_attention(*inputs, *bounds, scale=scale).isfinite().all()


def test_the_size_of_the_tiles_follows_the_documents(monkeypatch):
    monkeypatch.setattr(common, "INTERPRET", False)
    monkeypatch.setattr(common, "compile_for", 90)
    table, q = CONFIGS["_flash_attention_fwd_kernel"], torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    small, large = table[90][64]["small"], table[90][64]["large"]
    assert config_for(table, q, True) == small and config_for(table, q, False) == large
    monkeypatch.setattr(common, "compile_for", 120)
    assert config_for(table, q, True) == table[86][64]
    one_pass = CONFIGS["_flash_attention_bwd_kv_kernel"]["one pass"]
    assert config_for(one_pass, q, True) is None  # a card without reduce-add into global memory by TMA
    assert config_for(table, q.float(), True) == table["fp32"]


def test_the_sweep_puts_each_candidate_in_its_place(monkeypatch):
    path, other = ("_flash_attention_fwd_kernel", common.INTERPRETER, 64), dict(BLOCK_M=16, BLOCK_N=16, TMA=False)
    now, launched, launch = CONFIGS[path[0]][0][64], [], module._launch

    def spy(kernel, grid, config, arguments):
        launched.append((kernel.fn.__name__, config))
        launch(kernel, grid, config, arguments)

    monkeypatch.setattr(module, "_launch", spy)
    case = sweep_flash_attention.cases("cpu", True, {path: [other]})[1]
    with candidate(path, now):  # and puts it back
        runs, errors, differs = first_calls(case, case.inputs(), CpuClock())
    assert [config for name, config in launched if name == path[0]] == [now, other]
    assert list(runs) == ["as it is", "BLOCK_M=16 BLOCK_N=16 TMA=False"] and not errors
    assert max(differs.values()) < 0.01 and CONFIGS[path[0]][0][64] == now  # bf16, in other tiles
