"""adamw: the update rule on every backend, rounding by chance, moments of 8 bits."""

import math

import pytest
import torch
from tolerance import padded_with_nan, relative_error

from minisft.kernels import adamw as module
from minisft.kernels.adamw import adamw_
from minisft.kernels.adamw_formats import dequantize_state, quantize_state, round_stochastically, search
from minisft.kernels.common import use_backend
from minisft.kernels.copies import keep_copies, kept_copy, weight_as
from minisft.kernels.quantize import dynamic_table

SIZES = [(1,), (255,), (256,), (0,), (257,), (10007,), (16, 64)]
OPTIONS = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=["torch", "triton", "reference"])
def backend(request):
    if request.param == "triton":
        request.getfixturevalue("triton_kernels")
        yield "triton"
    else:
        with use_backend(request.param):
            yield request.param


def zeros(w, is_8bit=False):
    if is_8bit:
        return torch.zeros_like(w, dtype=torch.uint8), torch.zeros(-(-w.numel() // 256))
    return torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))


def train(params, steps=3, is_8bit=False, grad_dtype=None, copies=None, **options):
    """(params, first moments, second moments) after some steps with gradients that do not depend on the dtype of w.
    copies: the dtype of those that all weights but the first keep; that of the second is stale."""
    generator = torch.Generator().manual_seed(1)
    params = [w.clone() for w in params]
    if copies is not None:
        with keep_copies():
            for w in params[1:]:
                weight_as(w, copies)
        params[1].mul_(1)
    m, v = ([zeros(w, is_8bit) for w in params] for _ in range(2))
    for step in range(1, steps + 1):
        # Small ones too: the 8-bit moments have to hold seven powers of ten.
        grads = [
            torch.randn(w.shape, generator=generator) * torch.rand(w.shape, generator=generator) ** 8 for w in params
        ]
        grads = [g.to(grad_dtype or w.dtype) for g, w in zip(grads, params)]
        adamw_(params, grads, m, v, **{"step": step, **OPTIONS, **options})
    return params, m, v


def flat(tensors):
    """All in one vector; an 8-bit moment as its codes and its absmax."""
    parts = [part for t in tensors for part in (t if isinstance(t, tuple) else (t,))]
    return torch.cat([part.flatten().double() for part in parts])


def assert_same(a, b):
    assert all(torch.equal(flat(x), flat(y)) for x, y in zip(a, b))


def test_twenty_steps_of_torchs_adamw(backend):
    """Torch's AdamW in fp64: its fp32 multiplies by a rounded 1 - lr wd, which is off by up to 3e-8 the same way every step."""
    params = [torch.randn(size) for size in SIZES]
    theirs = [torch.nn.Parameter(w.double()) for w in params]
    optimizer = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False)
    ours, m, v = [w.clone() for w in params], [zeros(w) for w in params], [zeros(w) for w in params]
    for step in range(1, 21):
        grads = [torch.randn_like(w) for w in params]
        for w, g in zip(theirs, grads):
            w.grad = g.double()
        optimizer.step()
        adamw_(ours, grads, m, v, step=step, **OPTIONS)
    # 20 roundings of at most 6e-8 each, of either sign. torch's fused kernel rounds 1 - lr wd, so it gets that on top.
    assert relative_error(flat(ours), flat(theirs)) <= (8e-7 if backend == "torch" else 2e-7)
    for key, moments in (("exp_avg", m), ("exp_avg_sq", v)):
        assert relative_error(flat(moments), flat([optimizer.state[w][key] for w in theirs])) <= 2e-7


def test_as_close_to_fp64_as_the_formula(backend):
    params = [torch.randn(size) for size in SIZES]
    ours = train(params, 5, clip=0.7)
    with use_backend("reference"):
        plain = train(params, 5, clip=0.7)
        truth = train([w.double() for w in params], 5, clip=0.7, grad_dtype=torch.float32)
    for a, b, exact in zip(ours, plain, truth):
        assert relative_error(flat(a), flat(exact)) <= 2 * relative_error(flat(b), flat(exact)) + 2e-7


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("is_8bit", [False, True], ids=["fp32 moments", "8-bit moments"])
@pytest.mark.parametrize("seed", [None, 5], ids=["nearest", "by chance"])
@pytest.mark.parametrize("dtypes", ["fp32 fp32", "fp32 bf16", "bf16 bf16", "bf16 fp16"])
def test_kernels_equal_the_reference(triton_kernels, dtypes, seed, is_8bit):
    param_dtype, grad_dtype = (DTYPES[name] for name in dtypes.split())
    params = [torch.randn(size).to(param_dtype) for size in SIZES]
    options = dict(is_8bit=is_8bit, grad_dtype=grad_dtype, clip=torch.tensor(0.7), stochastic_rounding_seed=seed)
    ours = train(params, 2, **options)
    with use_backend("reference"):
        naive = train(params, 2, **options)
    with use_backend("torch"):
        torchs = train(params, 2, **options)
    # The moments are sums and products in the same order. The weights have a root and two divisions more, which a CPU's
    # torch need not round correctly: the last bit may differ, and with it, in bf16, one rounding in thousands.
    assert_same(ours[1:], naive[1:])
    if is_8bit:
        assert_same(torchs[1:], naive[1:])
    for weights in (ours[0], torchs[0]):
        if param_dtype == torch.float32:
            assert relative_error(flat(weights), flat(naive[0])) <= 2e-7
        else:
            assert (flat(weights) != flat(naive[0])).double().mean() <= 1e-3


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("is_8bit", [False, True], ids=["fp32 moments", "8-bit moments"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_are_written_with_their_weights(triton_kernels, dtype, is_8bit):
    params = [torch.randn(size) for size in SIZES]
    ours = train(params, 1, is_8bit, copies=dtype)
    assert_same(ours, train(params, 1, is_8bit))
    first, stale, *others = ours[0]
    assert kept_copy(first) is None and kept_copy(stale) is None
    for w in others:
        assert w.numel() == 0 or torch.equal(kept_copy(w), w.to(dtype))


def test_hundreds_of_tiny_tensors_in_one_launch(triton_kernels, monkeypatch):
    launches = []
    programs = module._programs
    monkeypatch.setattr(module, "_programs", lambda sizes, *rest: launches.append(len(sizes)) or programs(sizes, *rest))
    params = [torch.randn(int(n)) for n in torch.randint(1, 40, (300,))]
    ours = train(params, 1)
    assert sum(launches) == 300 and len(launches) <= 2  # those of 16 and 32 numbers can be read wide
    with use_backend("reference"):
        assert_same(ours[1:], train(params, 1)[1:])


@pytest.mark.parametrize("is_8bit", [False, True], ids=["fp32 moments", "8-bit moments"])
def test_a_tensor_for_several_programs(triton_kernels, is_8bit):
    params = [torch.randn(2 * 16384 + 5).bfloat16(), torch.randn(17, 1024).bfloat16()]
    ours = train(params, 1, is_8bit, stochastic_rounding_seed=3)
    with use_backend("reference"):
        naive = train(params, 1, is_8bit, stochastic_rounding_seed=3)
    assert_same(ours[1:], naive[1:])
    assert (flat(ours[0]) != flat(naive[0])).double().mean() <= 1e-3


@pytest.mark.parametrize("is_8bit", [False, True], ids=["fp32 moments", "8-bit moments"])
def test_the_stretches_of_the_torch_path_change_nothing(monkeypatch, is_8bit):
    params, options = [torch.randn(10, 257).bfloat16()], dict(is_8bit=is_8bit, stochastic_rounding_seed=5)
    whole = train(params, **options)
    monkeypatch.setattr(module, "CPU_STRETCH", 512)
    assert_same(train(params, **options), whole)


def test_what_lies_around_a_tensor_is_neither_read_nor_written(backend):
    """All four cut out of buffers of NaN, at odd addresses: the same bits as tensors of their own."""
    clean = [torch.randn(n) for n in (300, 300)] + [torch.zeros(300), torch.zeros(300)]
    cut = [padded_with_nan(t) for t in clean]
    for w, g, m, v in (clean, cut):
        adamw_([w], [g], [m], [v], step=1, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(clean, cut))
    for t in cut:
        buffer = t._base
        assert buffer.isnan().sum() == buffer.numel() - 300


def test_strided_gradients(backend):
    params, grads = [torch.randn(30, 20)], [torch.randn(20, 30).T]
    states = [[zeros(params[0])] for _ in range(2)]
    copy = [params[0].clone()], [grads[0].contiguous()], [zeros(params[0])], [zeros(params[0])]
    adamw_(params, grads, *states, step=1, **OPTIONS)
    adamw_(*copy, step=1, **OPTIONS)
    assert_same((params, *states), (copy[0], *copy[2:]))


def test_different_kinds_in_one_call(backend):
    """Each as in a call of its own."""
    params = [torch.randn(300), torch.randn(20).bfloat16(), torch.randn(40, 16), torch.randn(1000).bfloat16()]
    grads = [torch.randn_like(params[0]).half(), *(torch.randn_like(w) for w in params[1:])]

    def state(w):
        return zeros(w, is_8bit=w.numel() > 500)

    together = [w.clone() for w in params], [state(w) for w in params], [state(w) for w in params]
    adamw_(together[0], grads, *together[1:], step=1, clip=0.5, **OPTIONS)
    for i, (w, g) in enumerate(zip(params, grads)):
        alone = [w.clone()], [state(w)], [state(w)]
        adamw_(alone[0], [g], *alone[1:], step=1, clip=0.5, **OPTIONS)
        assert_same(alone, [[tensors[i]] for tensors in together])


def test_clipping_by_a_tensor_or_a_number_scales_the_gradients(backend):
    w, g = torch.randn(1000), torch.randn(1000)
    results = []
    for clip, factor in ((torch.tensor(0.5), 1), (0.5, 1), (1.0, 0.5), (torch.tensor(1.0), 0.5)):
        state = [w.clone()], [zeros(w)], [zeros(w)]
        adamw_(state[0], [g * factor], *state[1:], step=1, clip=clip, **OPTIONS)
        results.append(state)
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.parametrize("is_8bit", [False, True], ids=["fp32 moments", "8-bit moments"])
def test_a_factor_that_is_nan_changes_nothing(backend, is_8bit):
    """A step that is left out. Its gradients may be anything."""
    params, *moments = state = train([torch.randn(size) for size in SIZES], 2, is_8bit)
    before = [flat(tensors).clone() for tensors in state]
    for clip in (torch.tensor(math.nan), math.nan):
        grads = [torch.full_like(w, math.inf) for w in params]
        adamw_(params, grads, *moments, step=3, clip=clip, **OPTIONS)
    assert all(torch.equal(flat(tensors), kept) for tensors, kept in zip(state, before))


def test_gradients_are_left_and_autograd_is_told(backend):
    w, g = torch.randn(64), torch.randn(64)
    kept, version = g.clone(), w._version
    adamw_([w], [g], [zeros(w)], [zeros(w)], step=1, clip=0.3, **OPTIONS)
    assert torch.equal(g, kept) and w._version > version


def test_nothing_to_do(backend):
    adamw_([], [], [], [], step=1, **OPTIONS)
    w = torch.empty(0, 4)
    adamw_([w], [w.clone()], [zeros(w)], [zeros(w)], step=1, **OPTIONS)
    adamw_([w], [w.clone()], [zeros(w, True)], [zeros(w, True)], step=1, **OPTIONS)


def test_tensors_that_do_not_fit_are_refused():
    w = torch.ones(4, 4)
    good = [w], [w], [zeros(w)], [zeros(w)]
    for place, bad, message in (
        (1, [], r"\[1, 0, 1, 1\]"),
        (1, [torch.ones(4)], r"parameter 0: gradient \(4,\) for \(4, 4\)"),
        (2, [torch.ones(4)], "parameter 0: its moments do not fit"),
        (2, [zeros(w).bfloat16()], "parameter 0: its moments do not fit"),
        (3, [zeros(w, True)], "parameter 0: its moments do not fit"),
        (3, [(torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(2))], "parameter 0: its moments do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            adamw_(*(bad if i == place else tensors for i, tensors in enumerate(good)), step=1, **OPTIONS)
    with pytest.raises(ValueError, match="step 0: the first one is 1"):
        adamw_(*good, step=0, **OPTIONS)
    w = torch.ones(4, 256)
    apart = [(torch.zeros(4, 256, dtype=torch.uint8), torch.zeros(8)[::2])]
    with pytest.raises(ValueError, match="parameter 0: its moments do not fit"):
        adamw_([w], [w], apart, apart, step=1, **OPTIONS)
    for name in ("places", "firsts"):
        for numbers in ([], [0, 1]):
            with pytest.raises(ValueError, match=rf"{len(numbers)} {name} for 1 parameters"):
                adamw_(*good, step=1, **{name: numbers}, **OPTIONS)


# ---------------------------------------------------------------------------------------------- rounding by chance


def test_places_make_calls_of_their_own_round_like_one(backend):
    params, grads = [torch.randn(300).bfloat16() for _ in range(3)], [torch.randn(300).bfloat16() for _ in range(3)]
    together, alone = [w.clone() for w in params], [w.clone() for w in params]
    options = OPTIONS | {"step": 1, "stochastic_rounding_seed": 3}
    adamw_(together, grads, *([zeros(w) for w in params] for _ in range(2)), **options)
    for i in (2, 0, 1):
        adamw_([alone[i]], [grads[i]], [zeros(params[i])], [zeros(params[i])], places=[i], **options)
    assert_same((together,), (alone,))


@pytest.mark.parametrize("is_8bit", [False, True])
def test_rows_of_a_tensor_round_like_the_whole(backend, is_8bit):
    w, g = torch.randn(4, 256).bfloat16(), torch.randn(4, 256).bfloat16()
    whole, rows = w.clone(), [part.clone() for part in w.split([1, 3])]
    options = OPTIONS | {"step": 1, "stochastic_rounding_seed": 3, "places": [5]}
    adamw_([whole], [g], [zeros(w, is_8bit)], [zeros(w, is_8bit)], **options)
    for part, grad, first in zip(rows, g.split([1, 3]), (0, 256)):
        adamw_([part], [grad], [zeros(part, is_8bit)], [zeros(part, is_8bit)], firsts=[first], **options)
    assert torch.equal(torch.cat(rows), whole)


def outcomes(seed, step=1, tensor=0, n=20000):
    """Which of n equal weights an update by a quarter of bf16's step moved."""
    params = [torch.ones(1).bfloat16() for _ in range(tensor)] + [torch.ones(n).bfloat16()]
    grads = [torch.ones_like(w) for w in params]
    options = {**OPTIONS, "lr": 2**-10, "weight_decay": 0.0, "beta1": 0.0, "beta2": 0.0}
    states = [[zeros(w) for w in params] for _ in range(2)]
    adamw_(params, grads, *states, step=step, stochastic_rounding_seed=seed, **options)
    moved = params[-1] != 1
    assert (params[-1][moved] == 1 - 2**-8).all()  # the neighbour of 1
    return moved.double()


def test_rounding_by_chance_is_unbiased_and_independent(backend):
    n = 20000
    base = outcomes(seed=7)
    sigma = math.sqrt(0.25 * 0.75 / n)
    assert abs(base.mean() - 0.25) <= 4 * sigma
    # Of independent ones, a correlation over n pairs has the standard deviation 1 / sqrt(n).
    others = [base.roll(1), base.roll(2), base.roll(256), outcomes(8), outcomes(7, step=2), outcomes(7, tensor=1)]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([base, other]))[0, 1]) <= 4 / math.sqrt(n)
    assert torch.equal(outcomes(7), base)
    assert outcomes(None).sum() == 0  # to nearest, no weight ever moves


def test_rounding_keeps_what_bf16_holds_and_what_is_no_number():
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(round_stochastically(exact, 1, 1, 0).float(), exact)
    x = torch.tensor([float("inf"), -float("inf"), 0.0, 1e-40]).repeat(100)
    assert torch.equal(round_stochastically(x, 1, 1, 0)[:3], x[:3].bfloat16())
    assert not round_stochastically(x, 1, 1, 0).isnan().any()
    all_ones = torch.full((100,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # a NaN that would overflow
    assert round_stochastically(all_ones, 1, 1, 0).isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's
def test_a_weight_that_is_no_number_stays_one(backend):
    w = torch.tensor([float("nan"), float("inf"), 1.0]).bfloat16()
    adamw_([w], [torch.zeros_like(w)], [zeros(w)], [zeros(w)], step=1, stochastic_rounding_seed=1, **OPTIONS)
    assert w[0].isnan() and not w[1].isfinite() and w[2].isfinite()


# ---------------------------------------------------------------------------------------------- moments of 8 bits


def test_the_codes_of_all_sizes_of_numbers_and_of_every_tie(triton_kernels):
    """With b1 = b2 = 0 the moments are g and g^2: the kernel finds the code of any number, as a search among all would."""
    for signed in (True, False):
        table = dynamic_table(signed)
        ties = (table[1:] + table[:-1]) / 2
        near = [torch.nextafter(ties, torch.full_like(ties, to)) for to in (-1.0, 1.0)]
        x = torch.cat([table, ties, *near, 10 ** (-9 * torch.rand(3000)), torch.zeros(3)])
        x = torch.cat([x, -x]) if signed else x.sqrt()
        x = torch.nn.functional.pad(x, (0, -len(x) % 255)).view(-1, 255)
        g = torch.nn.functional.pad(x, (1, 0), value=1.0).flatten()  # every block has the absmax 1
        w, m, v = torch.ones_like(g), zeros(g, True), zeros(g, True)
        adamw_([w], [g], [m], [v], step=1, **{**OPTIONS, "beta1": 0.0, "beta2": 0.0})
        for (codes, absmax), moment, of_m in ((m, g, True), (v, g * g, False)):
            expected = quantize_state(moment, of_m)
            assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


@pytest.mark.parametrize("signed", [True, False])
def test_the_fast_search_finds_what_bisection_finds(signed):
    table = dynamic_table(signed)
    midpoints = (table[1:] + table[:-1]) / 2
    edges = [torch.nextafter(midpoints, torch.tensor(end)) for end in (-2.0, 2.0)]
    sizes = 10 ** (-10 * torch.rand(10_000)) * torch.randn(10_000).sign()
    x = torch.cat([table, midpoints, *edges, sizes, torch.tensor([0.0, -0.0, 1e-44, -1e-44, float("nan")])])
    assert torch.equal(search(x, midpoints), torch.bucketize(x, midpoints, out_int32=True))


@pytest.mark.parametrize("signed", [True, False])
def test_a_moment_becomes_the_nearest_value(signed):
    x = torch.randn(1000) ** 3 if signed else torch.rand(1000) ** 6
    table = dynamic_table(signed)
    state = quantize_state(x, signed)
    assert state[0].shape == x.shape and state[1].shape == (4,)
    for block, back, absmax in zip(x.split(256), dequantize_state(state, signed).split(256), state[1]):
        nearest = (block[:, None] - table * absmax).abs().amin(-1)
        off = (block - back).abs()
        if not signed:  # what is not zero does not become zero
            assert (back[block > 0] > 0).all()
            nearest = torch.where(block > 0, (block[:, None] - table[1:] * absmax).abs().amin(-1), nearest)
        torch.testing.assert_close(off, nearest, rtol=0, atol=1e-7 * absmax.item())


def moved(params, steps, is_8bit, scale):
    generator = torch.Generator().manual_seed(1)
    w, m, v = params.clone(), zeros(params, is_8bit), zeros(params, is_8bit)
    for step in range(1, steps + 1):
        adamw_([w], [torch.randn(len(w), generator=generator) * scale], [m], [v], step=step, **OPTIONS)
    return w - params


def test_moments_of_8_bits_lead_to_nearly_the_same_weights(backend):
    """A byte holds a large number to 0.7 % and a small one to 10 %: together they are off by a few per cent."""
    params = torch.randn(1000)
    wide, narrow = (moved(params, 5, is_8bit, torch.ones(1000)) for is_8bit in (False, True))
    assert wide.abs().mean() > 0.01 and (wide - narrow).abs().mean() < 0.05 * wide.abs().mean()


def test_small_gradients_beside_large_ones_do_no_harm():
    """Moments of less than the smallest value of their block are badly held, but no weight jumps for that."""
    params, scale = torch.randn(2000), torch.rand(2000) ** 8
    wide, narrow = (moved(params, 30, is_8bit, scale) for is_8bit in (False, True))
    assert narrow.abs().max() <= 1.1 * wide.abs().max()


def test_tables_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(dynamic_table(signed), functional.create_dynamic_map(signed))
