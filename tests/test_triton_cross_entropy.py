"""The Triton paths of cross_entropy and linear_cross_entropy, in the interpreter: against the formula, in poisoned memory."""

import pytest
import torch
from test_linear_cross_entropy import Recorder
from tolerance import assert_close_to_truth, cu_seqlens_of, padded_with_nan, relative_error, run_with_gradients

from minisft.kernels import linear_cross_entropy as module
from minisft.kernels.common import use_backend
from minisft.kernels.cross_entropy import cross_entropy, cross_entropy_ref, score_rows
from minisft.kernels.embedding import embedding
from minisft.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    shifted_linear_cross_entropy,
)

pytestmark = [
    pytest.mark.usefixtures("triton_kernels", "poisoned_memory"),
    # A program computes whole blocks and keeps what lies in the row; beyond it numpy meets NaN and overflows aloud.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"fp32": (FP32, FP32), "fp16": (FP16, FP16), "bf16": (BF16, BF16), "bf16 over fp32": (BF16, FP32)}
ALL = dict(softcap=3.0, logit_scale=1.5, label_smoothing=0.2, z_loss=0.02)
OPTIONS = {"plain": {}, **{name: {name: value} for name, value in ALL.items()}, "all": ALL}
CE_ALL = dict(softcap=2.0, label_smoothing=0.2, z_loss=0.02)
CE_OPTIONS = {"plain": {}, **{name: {name: value} for name, value in CE_ALL.items()}, "all": CE_ALL}
ADDITIONS = "aten::add.Tensor", "aten::add_.Tensor"
V = 257  # five blocks of the interpreter's configuration, the last of one word


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 6 rows."""
    monkeypatch.setattr(module, "most_rows", lambda T, *sizes, **more: min(6, T + T % 2))
    monkeypatch.setattr(module, "ROW_TILE", 2)


def leaf(*shape):
    return padded_with_nan(torch.randn(*shape)).requires_grad_()


def example(T=13, D=24, V=V, ignored=3):
    targets = torch.randint(V, (T,))
    targets[torch.randperm(T)[:ignored]] = -100
    return leaf(T, D), leaf(V, D), targets


# ---- linear_cross_entropy ----------------------------------------------------------------------------------------


@pytest.mark.covers(1)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_option_of_the_linear_loss(options, dtype):
    hidden, weight, targets = example(T=7)
    assert_close_to_truth(
        lambda h, w: linear_cross_entropy(h, w, targets, **options),
        lambda h, w: linear_cross_entropy_ref(h, w, targets, **options),
        [hidden, weight],
        dtype,
        floor=2e-3
        if dtype == BF16
        else None,  # the sum is one number: errors of its rows, 2^-9 each, may cancel or not
    )


@pytest.mark.covers(1)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_all_options_in_several_chunks(small_chunks, dtypes, reduction):
    hidden, weight, targets = example()
    rows = torch.randint(13, (13,))  # some repeat, some never occur
    options = dict(ALL, rows=rows, row_weights=torch.rand(13) * (torch.arange(13) % 4 != 0), reduction=reduction)
    errors = assert_close_to_truth(
        lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, grad_scale=torch.tensor(1 / 37), **options),
        lambda h, w, b: linear_cross_entropy_ref(h, w, targets, bias=b, grad_scale=1 / 37, **options),
        [hidden, weight, torch.randn(V, requires_grad=True)],
        [*dtypes, dtypes[1]],
        floor=2e-3 if reduction == "sum" and FP32 not in dtypes[:1] else None,
    )
    assert len(errors) == 4


@pytest.mark.covers(1)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("V", [50257, 151936])
def test_real_vocabularies(V, dtype):
    hidden, weight, targets = example(T=3, D=8, V=V, ignored=1)
    assert_close_to_truth(
        lambda h, w: linear_cross_entropy(h, w, targets, reduction="none"),
        lambda h, w: linear_cross_entropy_ref(h, w, targets, reduction="none"),
        [hidden, weight],
        dtype,
    )


@pytest.mark.parametrize("M", [0, 1, 5])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_nothing_to_train(reduction, M):
    hidden, weight, _ = example()
    with torch.no_grad():
        hidden[4] = float("nan")  # of logits that are NaN, too, an ignored row has no loss and no gradient of them
    bias = torch.randn(V, requires_grad=True)
    rows, targets = torch.full((M,), 4), torch.full((M,), -100)
    weight_of_nan = (
        weight if M == 0 else weight.detach()
    )  # 0 x NaN: an ignored row must be finite for the weight's sake
    loss, stats = linear_cross_entropy(
        hidden, weight_of_nan, targets, rows=rows, bias=bias, reduction=reduction, return_stats="all"
    )
    assert loss.shape == (() if reduction == "sum" else (M,)) and (loss == 0).all()
    assert all(s.shape == (M,) and (s == 0).all() for s in stats)
    for d in torch.autograd.grad(loss.sum(), [x for x in (hidden, weight_of_nan, bias) if x.requires_grad]):
        assert (d == 0).all()


def test_rows_of_weight_0_train_nothing():
    hidden, weight, targets = example()
    row_weights = torch.ones(13)
    row_weights[::2] = 0
    loss = linear_cross_entropy(hidden, weight, targets, row_weights=row_weights)
    others = linear_cross_entropy(hidden, weight, targets.where(row_weights > 0, -100))
    assert torch.equal(loss, others)
    for d, e in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, others))):
        assert torch.equal(d, e)


@pytest.mark.parametrize("rows", [torch.arange(13), torch.arange(13).int()], ids=["int64", "int32"])
def test_rows_in_order_are_no_rows(rows):
    hidden, weight, targets = example()
    ours = run_with_gradients(lambda h, w: linear_cross_entropy(h, w, targets, rows=rows), [hidden, weight])
    plain = run_with_gradients(lambda h, w: linear_cross_entropy(h, w, targets), [hidden, weight])
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


def test_a_row_twice_counts_twice():
    hidden, weight, targets = example(T=2, ignored=0)
    twice = linear_cross_entropy(hidden, weight, targets[[1, 1]], rows=torch.tensor([1, 1]))
    weighted = linear_cross_entropy(hidden, weight, targets, row_weights=torch.tensor([0.0, 2.0]))
    # A sum of two equal fp32 numbers is exact, a matmul over two rows instead of one may round once more.
    torch.testing.assert_close(twice, weighted, rtol=1e-6, atol=0)
    for d, e in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (twice, weighted))):
        torch.testing.assert_close(d, e)


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_frozen_input_changes_nothing(frozen, reduction):
    hidden, weight, targets = example(T=5)
    inputs = [hidden, weight]
    both = run_with_gradients(lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction), inputs)
    inputs[frozen] = inputs[frozen].detach()
    alone = run_with_gradients(lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction), inputs)
    assert set(both) - set(alone) == {f"gradient of input {frozen}"}
    assert all(torch.equal(alone[name], both[name]) for name in alone)


def test_repeats_bitwise_and_strides_change_nothing(small_chunks):
    hidden, weight, targets = example()
    options = dict(rows=torch.randint(13, (13,)), return_stats="all")

    def run(h, w):
        loss, stats = linear_cross_entropy(h, w, targets, **options)
        return [loss, *stats]

    first, again, copy = (
        run_with_gradients(run, inputs)
        for inputs in (
            [hidden, weight],
            [hidden, weight],
            [x.detach().clone().requires_grad_() for x in (hidden, weight)],
        )
    )
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], copy[name]) for name in first)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_bias_need_not_lie_side_by_side(reduction):
    hidden, weight, targets = example()
    apart = torch.randn(2 * len(weight))[::2]
    run = lambda bias: linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction)  # noqa: E731
    ours, plain = (run_with_gradients(run, [bias.detach().requires_grad_()]) for bias in (apart, apart.clone()))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


@pytest.mark.parametrize("options", [{}, {**ALL, "softcap": 1e4}], ids=["plain", "all"])
def test_stats(small_chunks, options):
    hidden, weight, targets = example()
    logits = (hidden @ weight.T).detach()
    targets[:6] = logits[:6].argmax(-1)  # some are right
    targets[3] = -100
    plain = linear_cross_entropy(hidden, weight, targets, **options)
    loss, stats = linear_cross_entropy(hidden, weight, targets, return_stats="all", **options)
    _, expected = linear_cross_entropy_ref(hidden.double(), weight.double(), targets, return_stats="all", **options)
    some_loss, some = linear_cross_entropy(hidden, weight, targets, return_stats=True, **options)
    assert torch.equal(loss, plain) and torch.equal(some_loss, plain)
    assert some[3:] == (None, None) and all(torch.equal(a, b) for a, b in zip(some[:3], stats))
    assert torch.equal(stats.correct, expected.correct) and stats.correct[:6].sum() == 5
    for ours, theirs in zip(stats, expected):
        assert ours.dtype == FP32 and not ours.requires_grad and ours[3] == 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # logits of +-15, summed in fp32


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("M", [1, 13])
def test_the_statistics_of_preference_tuning(small_chunks, M, dtype):
    """Against fp64, of logits that are scaled, shifted and capped, in rows of which some repeat and some are ignored."""
    hidden, weight, targets = example()
    targets, rows, bias = targets[:M], torch.randint(13, (M,)), torch.randn(V) + 2
    targets[0] = 5
    options = dict(ALL, rows=rows, row_weights=torch.rand(M), reduction="none", return_stats="all")

    def run(op):
        def call(h, w, b):
            loss, stats = op(h, w, targets, bias=b, **options)
            assert (stats.mean_logit[targets == -100] == 0).all()
            assert (stats.log_sum_sq_probs[targets == -100] == 0).all()
            return loss, stats.mean_logit, stats.log_sum_sq_probs

        return call

    errors = assert_close_to_truth(
        run(linear_cross_entropy),
        run(linear_cross_entropy_ref),
        [hidden, weight, bias],
        dtype,
        floor=2e-3
        if dtype == BF16
        else None,  # of one row, rounded to bf16, the obvious code may happen to lose nothing
    )
    assert len(errors) == 5


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_flat_and_peaked_rows(reduction):
    """log sum p^2 runs from -log V to 0, whichever block of the row the peak is in, and is never NaN on the way."""
    rises = torch.tensor([0.0, 12.0, 80.0, 80.0, 80.0, 1e4])
    peaks = torch.tensor([0, 7, 0, 130, V - 1, 70])
    weight = torch.zeros(V, 6)
    weight[peaks, torch.arange(6)] = rises
    options = dict(reduction=reduction, return_stats="all")
    _, stats = linear_cross_entropy(torch.eye(6), weight.requires_grad_(), torch.zeros(6, dtype=torch.int64), **options)
    p = weight.detach().double().T.softmax(-1)
    # Both are differences of logarithms below 6, in fp32.
    torch.testing.assert_close(stats.log_sum_sq_probs, p.square().sum(-1).log().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(stats.mean_logit, weight.detach().double().mean(0).float(), rtol=1e-6, atol=0)
    assert (stats.log_sum_sq_probs <= 0).all() and (stats.log_sum_sq_probs[2:] == 0).all()


def test_gradient_that_comes_from_above():
    """Whatever it is, whether the graph is kept or not; nothing that was handed out changes afterwards."""
    hidden, weight, targets = example()
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets)
    one = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    four = torch.autograd.grad(loss * 4, (hidden, weight), retain_graph=True)
    half = torch.autograd.grad(loss / 2, (hidden, weight), retain_graph=True)
    last = torch.autograd.grad(loss * 8, (hidden, weight))
    for gradients, factor in ((one, 1), (four, 4), (half, 0.5), (last, 8)):
        assert all(torch.equal(d, e * factor) for d, e in zip(gradients, expected))


def test_gradients_become_grad_without_a_copy():
    hidden, weight, targets = (x.detach().contiguous().requires_grad_(x.requires_grad) for x in example())
    loss = linear_cross_entropy(hidden, weight, targets)
    pointers = [x.data_ptr() for x in loss.grad_fn.saved_tensors[:2]]
    (loss * 2).backward()
    assert [hidden.grad.data_ptr(), weight.grad.data_ptr()] == pointers


def test_one_chunk_has_no_fp32_sum_and_several_do(small_chunks):
    """And the sum is the gradient of an fp32 weight: several chunks of a bf16 step are not rounded to bf16."""
    hidden, weight, targets = example()
    linear_cross_entropy(hidden.detach().bfloat16(), weight, targets).backward()
    assert weight.grad.dtype == FP32 and not torch.equal(weight.grad, weight.grad.bfloat16().float())


@pytest.mark.parametrize("T, R", [(4, 4), (13, 6)])
def test_chunks_have_the_same_memory_whatever_is_trained_and_even_rows(small_chunks, monkeypatch, T, R):
    hidden, weight, _ = example(T=T)
    seen = []

    def spy(logits, *arguments, **options):
        seen.append((len(logits), len(logits._base)))
        score_rows(logits, *arguments, **options)

    monkeypatch.setattr(module, "score_rows", spy)
    for M in (1, R, R + 1, 2 * R + 1):
        seen.clear()
        linear_cross_entropy(hidden, weight, torch.zeros(M, dtype=torch.int64), rows=torch.arange(M) % T)
        sizes, memory = zip(*seen)
        assert sum(sizes) == M and len(sizes) == -(-M // R) and set(memory) == {R}
        assert len(set(sizes[:-1])) <= 1 and sizes[0] - 2 * len(sizes) < sizes[-1] <= sizes[0]  # tiles of 2 rows


def test_logits_exist_at_once_where_a_sum_in_fp32_would_take_more():
    T, V, D = 8192, 128256, 4096
    chunk = module.most_rows(T, V, 2, sum_bytes=0)
    assert chunk < T and chunk * V * 2 <= module.CHUNK_BYTES < (chunk + module.ROW_TILE) * V * 2
    assert module.most_rows(T, V, 2, sum_bytes=4 * V * D) == T
    assert module.most_rows(4 * T, V, 2, sum_bytes=4 * V * D) == chunk
    assert module.most_rows(300, V, 2, sum_bytes=0) == 384 and module.most_rows(0, V, 2, sum_bytes=0) > 0
    assert module.most_rows(9 * T, 8 * V, 2, sum_bytes=0) == module.LEAST_CHUNK_ROWS


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_tied_embedding_adds_its_rows_to_the_gradient_of_the_head(small_chunks, reduction, micro_batches):
    """In place: no other matrix [V, D] is made for it."""
    _, weight, targets = example(ignored=0)
    weight, ids = weight.detach().clone().requires_grad_(), torch.randint(V, (13,))

    def backward(**more):
        weight.grad = None
        with Recorder() as recorder:
            for _ in range(micro_batches):
                hidden = embedding(ids, weight) * 2
                loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction, **more)
                (loss * 3).sum().backward()
        additions = [name for name, size in recorder.outputs if name.startswith(ADDITIONS) and size == weight.nbytes]
        return weight.grad, additions

    (expected, additions), (ours, fewer) = backward(), backward(add_to_grad=True)
    assert relative_error(ours, expected) < 1e-6  # fp32 sums in another order
    assert len(fewer) == micro_batches - 1 < len(additions)


def test_a_gradient_with_a_hook_comes_through_autograd():
    """Updates in the backward wait for it there."""
    hidden, weight, targets = example()
    weight, seen = weight.detach().clone().requires_grad_(), []
    weight.register_post_accumulate_grad_hook(lambda w: seen.append(w.grad.clone()))
    linear_cross_entropy(hidden, weight, targets, add_to_grad=True).backward()
    assert len(seen) == 1 and torch.equal(seen[0], weight.grad)


def test_autocast():
    hidden, weight, targets = example()
    rounded = hidden.detach().bfloat16().requires_grad_()
    expected = linear_cross_entropy(rounded, weight, targets)
    with torch.autocast("cpu", dtype=BF16):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == FP32 and torch.equal(loss, expected)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    e_hidden, e_weight = torch.autograd.grad(expected, (rounded, weight))
    assert d_hidden.dtype == d_weight.dtype == FP32 and torch.equal(d_weight, e_weight)
    assert torch.equal(d_hidden.bfloat16(), e_hidden)  # an fp32 product is kept as it is, that for bf16 rounded once


def test_same_as_the_torch_path():
    hidden, weight, targets = example()
    cu_seqlens, bias = cu_seqlens_of([1, 5, 6, 1]), torch.randn(V, requires_grad=True)

    def run(h, w, b):
        loss, stats = shifted_linear_cross_entropy(h, w, targets, cu_seqlens, bias=b, return_stats="all", **ALL)
        return [loss, *stats]

    ours = run_with_gradients(run, [hidden, weight, bias])
    with use_backend("torch"):
        torchs = run_with_gradients(run, [hidden, weight, bias])
    for name in ours:
        torch.testing.assert_close(ours[name], torchs[name])


def test_documents_do_not_leak():
    """Other words and states in one document change nothing, to the bit, in another."""
    hidden, weight, labels = example(ignored=0)
    weight = weight.detach()
    cu_seqlens = cu_seqlens_of([6, 7])
    (before,) = torch.autograd.grad(shifted_linear_cross_entropy(hidden, weight, labels, cu_seqlens), hidden)
    other = hidden.detach().clone()
    other[6:], labels[6:] = 3.0, 5
    other.requires_grad_()
    (after,) = torch.autograd.grad(shifted_linear_cross_entropy(other, weight, labels, cu_seqlens), other)
    assert torch.equal(before[:6], after[:6])


# ---- cross_entropy -----------------------------------------------------------------------------------------------


@pytest.mark.covers(2)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("options", CE_OPTIONS.values(), ids=CE_OPTIONS)
def test_the_loss_of_logits(options, dtype, reduction):
    logits, labels = leaf(9, V), torch.randint(V, (9,))
    labels[[2, 6]] = -100
    options = {**options, "reduction": reduction, "cu_seqlens": cu_seqlens_of([1, 7, 1])}
    assert_close_to_truth(
        lambda x: cross_entropy(x, labels, **options),
        lambda x: cross_entropy_ref(x, labels, **options),
        [logits],
        dtype,
    )


@pytest.mark.covers(1)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("V", [50257, 151936])
def test_logits_of_real_vocabularies(V, dtype):
    logits, labels = leaf(3, V), torch.tensor([-100, V - 1, 0])
    assert_close_to_truth(lambda x: cross_entropy(x, labels), lambda x: cross_entropy_ref(x, labels), [logits], dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("V", [7, 13, 257])
def test_rows_that_begin_anywhere_in_a_group_of_columns(V, dtype):
    """One after the other, out of a wider matrix, and in memory that no group begins with: the same loss and gradient, and
    nothing of a neighbour's."""
    plain, labels = torch.randn(6, V).to(dtype), torch.randint(V, (6,))
    labels[[2, 5]] = -100
    wider = plain.new_full((6, V + 16 - V % 8), float("nan"))[:, :V].copy_(plain)
    shifted = plain.new_full((6 * V + 3,), float("nan"))[3:].view(6, V).copy_(plain)
    options = dict(shift=False, reduction="none", **CE_ALL)

    def run(op, x):
        return run_with_gradients(lambda x: op(x, labels, **options), [x.detach().requires_grad_()])

    exact, alone = run(cross_entropy_ref, plain.double()), run(cross_entropy, shifted)
    for x in (plain, wider):
        for name, ours in run(cross_entropy, x).items():
            assert relative_error(ours, exact[name]) < (2e-6 if dtype == FP32 or "out" in name else 4e-3), name
            # A gradient is rounded once more, which may go either way where the sum's order is another.
            assert relative_error(ours, alone[name]) < (1e-6 if dtype == FP32 or "out" in name else 4e-3), name


def test_logits_with_an_offset_keep_their_precision():
    """lse is near 1000 there, where fp32 numbers are 6e-5 apart; the soft-max does not see the offset."""
    logits, labels = leaf(4, V), torch.randint(V, (4,))
    raised = (logits.detach() + 1024).requires_grad_()
    moved = (raised.detach() - 1024).requires_grad_()  # the same numbers as in `raised`, rounded as they are there
    ours, plain = (run_with_gradients(lambda x: cross_entropy(x, labels, shift=False), [x]) for x in (raised, moved))
    assert all(torch.equal(ours[name], plain[name]) for name in ours)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("T", [0, 1, 3])
def test_no_row_to_score(T, reduction):
    logits = torch.full((T, V), float("nan"), requires_grad=True)
    loss = cross_entropy(logits, torch.full((T,), -100), reduction=reduction, label_smoothing=0.1, z_loss=0.1)
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("index", [0, 1])
def test_another_ignore_index(index):
    """Inside the vocabulary; Triton's compiler makes a constant of 1."""
    logits, labels = leaf(5, V), torch.tensor([3, 0, 1, 0, 256])
    ours = run_with_gradients(lambda x: cross_entropy(x, labels, ignore_index=index), [logits])
    formula = run_with_gradients(lambda x: cross_entropy_ref(x, labels, ignore_index=index), [logits])
    for name in ours:
        torch.testing.assert_close(ours[name], formula[name])


def test_confident_predictions():
    """A probability of 0 in fp32 has a large, finite loss, words of probability 0 are allowed, NaN is not hidden."""
    logits = torch.full((4, V), -float("inf"))
    logits[:, 0], logits[:3, 200] = 0, 500
    logits[3, 7] = float("nan")
    logits.requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 200, -100, 0]), shift=False, reduction="none")
    assert loss[:3].tolist() == [500, 0, 0] and loss[3].isnan()
    (gradient,) = torch.autograd.grad(loss[:2].sum(), logits)
    assert gradient[0, 0] == -1 and gradient[0, 200] == 1 and gradient.abs().sum() == 2


def test_a_target_outside_the_vocabulary_makes_the_loss_nan():
    """On a GPU nobody checks them: the kernel reads nothing there."""
    results, logits = torch.empty(6, 3), torch.randn(3, V)
    score_rows(logits, torch.tensor([-1, V, V - 1]), results)
    assert results[0].isnan().tolist() == [True, True, False]


def test_logits_are_left_as_they_are():
    logits, labels = leaf(3, V).detach().bfloat16().requires_grad_(), torch.randint(V, (3,))
    before = logits.detach().clone()
    loss = cross_entropy(logits, labels, shift=False, reduction="none")
    once, twice = (torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(logits, before) and torch.equal(once, twice) and once.dtype == BF16
