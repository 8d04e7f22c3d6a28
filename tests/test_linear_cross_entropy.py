"""linear_cross_entropy: the chunked path is the naive formula, whatever the chunks, rows, weights and options."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close_to_truth, cu_seqlens_of, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from minisft.kernels import linear
from minisft.kernels import linear_cross_entropy_torch as module
from minisft.kernels.common import use_backend
from minisft.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    shifted_linear_cross_entropy,
)

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": 0.3},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "grad_scale": {"grad_scale": 1 / 37},
    "all": {"softcap": 3.0, "logit_scale": 1.5, "label_smoothing": 0.2, "z_loss": 0.02, "grad_scale": 3.0},
}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 12 rows in tiles of 4, blocks of 16 words: small inputs then cross every kind of boundary."""
    monkeypatch.setattr(module, "CPU_CHUNK_ROWS", 12)
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "ROW_TILE", 4)
    monkeypatch.setattr(linear, "BLOCK_ROWS", 16)


def example(T=40, D=16, V=50, M=None, dtype=FP32, ignored=5, weight_dtype=None):
    hidden = torch.randn(T, D, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, D, dtype=weight_dtype or dtype, requires_grad=True)
    M = T if M is None else M
    targets = torch.randint(V, (M,))
    targets[torch.randperm(M)[:ignored]] = -100
    return hidden, weight, targets


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16, (BF16, FP32)], ids=["fp32", "bf16", "bf16_over_fp32"])
def test_equals_the_reference(small_chunks, dtype, options, reduction):
    dtypes = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    hidden, weight, targets = example()
    rows = torch.randint(40, (40,))  # some repeat, some never occur
    bias = torch.randn(50, requires_grad=True)
    row_weights = torch.rand(40) * (torch.arange(40) % 4 != 0)  # fractions and zeros

    def run(op):
        def call(h, w, b):
            return op(h, w, targets, rows=rows, row_weights=row_weights, bias=b, reduction=reduction, **options)

        return call

    # The sum is one number: the errors of its rows (2^-9 each) may cancel in one run and not in the other.
    floor = 2e-3 if reduction == "sum" and BF16 in dtypes else None
    errors = assert_close_to_truth(
        run(linear_cross_entropy),
        run(linear_cross_entropy_ref),
        [hidden, weight, bias],
        [*dtypes, dtypes[1]],
        floor=floor,
    )
    assert len(errors) == 4


@pytest.mark.parametrize("M", [1, 7, 12, 13, 24, 25, 63])
def test_chunk_boundaries(small_chunks, M):
    hidden, weight, targets = example(T=M, ignored=0)
    errors = assert_close_to_truth(
        lambda h, w: linear_cross_entropy(h, w, targets),
        lambda h, w: linear_cross_entropy_ref(h, w, targets),
        [hidden, weight],
        BF16,
    )
    assert len(errors) == 3


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", [OPTIONS["plain"], {**OPTIONS["all"], "grad_scale": None}], ids=["plain", "all"])
def test_gradcheck(small_chunks, options, reduction):
    hidden, weight, targets = example(T=15, D=4, V=9, dtype=FP64, ignored=2)
    bias = torch.randn(9, dtype=FP64, requires_grad=True)

    def call(h, w, b):
        return linear_cross_entropy(h, w, targets, bias=b, reduction=reduction, **options)

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


def test_a_real_vocabulary():
    hidden, weight, targets = example(T=70, D=8, V=50257)
    for dtype in (FP32, BF16):
        assert_close_to_truth(
            lambda h, w: linear_cross_entropy(h, w, targets),
            lambda h, w: linear_cross_entropy_ref(h, w, targets),
            [hidden, weight],
            dtype,
        )


def test_against_pytorch():
    """The reference itself, against an implementation that is not ours."""
    hidden, weight, targets = example(dtype=FP64)
    loss = linear_cross_entropy_ref(hidden, weight, targets, label_smoothing=0.1)
    theirs = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(gradients(loss, hidden, weight), gradients(theirs, hidden, weight))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_grad_scale_scales_gradients_only(backend):
    hidden, weight, targets = example()
    with use_backend(backend):
        plain = linear_cross_entropy(hidden, weight, targets)
        expected = gradients(plain, hidden, weight)
        for scale in (0.125, torch.tensor(0.125)):  # a power of two: no rounding, so equality is exact
            loss = linear_cross_entropy(hidden, weight, targets, grad_scale=scale)
            assert torch.equal(loss, plain)
            for d, e in zip(gradients(loss, hidden, weight), expected):
                assert torch.equal(d, e * 0.125)


def test_grad_scale_does_not_underflow_in_bf16():
    """1 / N of a huge batch times a small probability: nothing is rounded to zero before the sum."""
    hidden, weight, targets = example(dtype=BF16)
    small, plain = (linear_cross_entropy(hidden, weight, targets, grad_scale=s) for s in (2.0**-30, 1.0))
    for d, e in zip(gradients(small, hidden, weight), gradients(plain, hidden, weight)):
        assert torch.equal(d, e * 2.0**-30)


def test_backward_from_any_scalar():
    hidden, weight, targets = example()
    loss = linear_cross_entropy(hidden, weight, targets)
    once = gradients(loss * 4, hidden, weight)
    for d, e in zip(once, gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)):
        assert torch.equal(d, e * 4)


def test_backward_twice_with_a_retained_graph():
    hidden, weight, targets = example()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    weight.grad.zero_()  # as an optimizer would: the graph's copy must not change with it
    loss.backward()
    assert torch.equal(weight.grad, first)


def test_gradient_becomes_grad_without_a_copy():
    """dW is the largest tensor of the op: autograd must take it over."""
    hidden, weight, targets = example()
    loss = linear_cross_entropy(hidden, weight, targets)
    pointer = loss.grad_fn.saved_tensors[1].data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == pointer


def test_weight_gradient_of_a_bf16_step_is_not_rounded(small_chunks):
    """fp32 master weights: the sum over chunks comes back in fp32 and not by way of bf16."""
    hidden, weight, targets = example(T=100, ignored=0)
    linear_cross_entropy(hidden.detach().to(BF16), weight, targets).backward()
    assert weight.grad.dtype == FP32
    assert not torch.equal(weight.grad, weight.grad.to(BF16).float())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast(backend):
    """Under autocast fp32 inputs are multiplied in bf16, exactly as bf16 inputs are without it."""
    hidden, weight, targets = example()
    with use_backend(backend):
        rounded = hidden.detach().to(BF16).requires_grad_()
        expected = linear_cross_entropy(rounded, weight, targets)
        with torch.autocast("cpu", dtype=BF16):
            loss = linear_cross_entropy(hidden, weight, targets)
        assert loss.dtype == FP32 and torch.equal(loss, expected)
        (d_hidden, d_weight), (e_hidden, e_weight) = (
            gradients(loss, hidden, weight),
            gradients(expected, rounded, weight),
        )
        assert d_hidden.dtype == d_weight.dtype == FP32
        assert torch.equal(d_weight, e_weight) and torch.equal(d_hidden.to(BF16), e_hidden)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_rows_are_as_if_absent(small_chunks, reduction):
    hidden, weight, targets = example(ignored=0)
    keep = torch.arange(40) % 3 != 0
    masked = linear_cross_entropy(hidden, weight, targets.where(keep, -100), reduction=reduction)
    rows = keep.nonzero()[:, 0]
    chosen = linear_cross_entropy(hidden, weight, targets[keep], rows=rows, reduction=reduction)
    if reduction == "none":
        assert (masked[~keep] == 0).all() and torch.equal(masked[keep], chosen)
    else:
        assert torch.equal(masked, chosen)
    for d, e in zip(gradients(masked.sum(), hidden, weight), gradients(chosen.sum(), hidden, weight)):
        assert torch.equal(d, e)


def test_ignored_rows_may_hold_anything():
    hidden, weight, targets = example()
    with torch.no_grad():
        hidden[targets == -100] = float("nan")
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.isfinite()
    assert all(d.isfinite().all() for d in gradients(loss, hidden, weight))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("M", [0, 6])
def test_nothing_to_train(backend, reduction, M):
    hidden, weight, _ = example()
    bias = torch.randn(50, requires_grad=True)
    rows, targets = torch.arange(M), torch.full((M,), -100)
    with use_backend(backend):
        loss, stats = linear_cross_entropy(
            hidden, weight, targets, rows=rows, bias=bias, reduction=reduction, return_stats="all"
        )
        assert loss.shape == (() if reduction == "sum" else (M,)) and (loss == 0).all()
        assert all(s.shape == (M,) and (s == 0).all() for s in stats)
        for d in gradients(loss.sum(), hidden, weight, bias):
            assert (d == 0).all()


def test_zero_weights_train_nothing():
    hidden, weight, targets = example()
    loss = linear_cross_entropy(hidden, weight, targets, row_weights=torch.zeros(40))
    assert loss == 0 and all((d == 0).all() for d in gradients(loss, hidden, weight))


def test_a_row_twice_counts_twice():
    hidden, weight, targets = example(T=1, ignored=0)
    rows = torch.zeros(2, dtype=torch.int64)
    twice = linear_cross_entropy(hidden, weight, targets.repeat(2), rows=rows)
    weighted = linear_cross_entropy(hidden, weight, targets, row_weights=torch.tensor([2.0]))
    # A sum of two equal fp32 numbers is exact, a matmul over two rows instead of one may round once more.
    torch.testing.assert_close(twice, weighted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(twice, hidden, weight), gradients(weighted, hidden, weight))


def test_few_shapes_are_multiplied():
    """oneDNN compiles code for each shape that it meets, and keeps it: some 3 MB where the vocabulary is large."""
    shapes = set()
    for M in range(1, 1200, 33):
        hidden, weight, targets = example(T=1200, D=8, V=8, M=M, ignored=0)
        rows = torch.randperm(1200)[:M]
        with Recorder() as recorder:
            loss = linear_cross_entropy(hidden, weight, targets, rows=rows)
        shapes |= {size // 32 for name, size in recorder.outputs if name == "aten::mm.out"}  # rows of logits, and of dx
        expected = linear_cross_entropy_ref(hidden, weight, targets, rows=rows)
        for ours, theirs in zip(gradients(loss, hidden, weight), gradients(expected, hidden, weight)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums of up to 1,200 terms in fp32
    assert shapes == set(range(64, 1025, 64))


class Recorder(TorchDispatchMode):
    """Remembers every op's name and the size of its outputs in bytes."""

    def __init__(self):
        super().__init__()
        self.outputs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.outputs.append((func.name(), x.nbytes))
        return out


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_never_materialises_the_logits(small_chunks, reduction):
    hidden, weight, targets = example(T=600, D=4, V=300)
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight, targets, reduction=reduction, return_stats="all")[0].sum().backward()
    assert max(size for _, size in recorder.outputs) <= 4 * max(12 * 300, 600 * 4, 300 * 4)
    with Recorder() as recorder:  # the recorder does see the logits where they exist
        linear_cross_entropy_ref(hidden, weight, targets)
    assert max(size for _, size in recorder.outputs) == 4 * 600 * 300


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradient_of_a_frozen_input_is_not_computed(frozen, reduction):
    hidden, weight, targets = example(V=51)
    expected = dict(zip(("hidden", "weight"), gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)))
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    trained = "weight" if frozen == "hidden" else "hidden"
    with Recorder() as recorder:
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
        (gradient,) = gradients(loss, hidden if trained == "hidden" else weight)
    assert torch.equal(gradient, expected[trained])
    matmuls = [name for name, _ in recorder.outputs if "mm" in name]
    assert len(matmuls) == (2 if reduction == "sum" else 3)  # "none" computes the logits twice


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_gradient_that_is_there_may_be_added_to_in_place(small_chunks, reduction):
    """The second micro-batch of a step; the gradients of hidden come as ever, and without add_to_grad those of the weight too."""
    hidden, weight, targets = example(dtype=BF16, weight_dtype=FP32)
    options = dict(grad_scale=1 / 3, reduction=reduction)

    def backward(**more):
        hidden.grad = None
        linear_cross_entropy(hidden, weight, targets, **options, **more).sum().backward()
        return hidden.grad

    d_hidden = backward()
    once = weight.grad.clone()
    for more in ({"add_to_grad": True}, {}):
        weight.grad, before = torch.ones_like(weight), torch.ones_like(weight)
        memory = weight.grad.data_ptr()
        assert torch.equal(backward(**more), d_hidden) and weight.grad.data_ptr() == memory
        assert relative_error(weight.grad - before, once) < 1e-6  # fp32 sums of the same bf16 products, beside 1
    weight.grad = None
    backward(add_to_grad=True)  # nothing is there: as ever
    assert torch.equal(weight.grad, once)


def test_a_loss_that_is_scaled_after_its_gradient_was_added(small_chunks):
    hidden, weight, targets = example(dtype=FP64)
    expected = 3 * torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), weight)[0]
    weight.grad = torch.zeros_like(weight)
    (3 * linear_cross_entropy(hidden, weight, targets, add_to_grad=True)).backward()
    assert relative_error(weight.grad, expected) < 1e-14  # fp64 rounding
    with torch.no_grad():  # without gradients nothing is added
        before = weight.grad.clone()
        linear_cross_entropy(hidden, weight, targets, add_to_grad=True)
    assert torch.equal(weight.grad, before)


def test_without_gradients_there_is_one_matmul():
    hidden, weight, targets = example()
    with Recorder() as recorder, torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    assert len([name for name, _ in recorder.outputs if "mm" in name]) == 1


def test_training_after_inference_mode():
    """Memory that was first used in inference mode serves training too."""
    module._kept.__dict__.clear()
    hidden, weight, targets = example(dtype=BF16, weight_dtype=FP32)
    with torch.inference_mode():
        linear_cross_entropy(hidden, weight, targets)
    linear_cross_entropy(hidden, weight, targets).backward()
    assert weight.grad is not None


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 0.1}], ids=["plain", "all"])
def test_stats(small_chunks, options):
    hidden, weight, targets = example()
    logits = (hidden @ weight.T).detach()
    targets[:20] = logits[:20].argmax(-1)  # some are right
    targets[3] = -100
    row_weights = torch.rand(40)
    _, stats = linear_cross_entropy(hidden, weight, targets, row_weights=row_weights, return_stats="all", **options)
    _, expected = linear_cross_entropy_ref(hidden, weight, targets, return_stats="all", **options)
    for ours, theirs in zip(stats, expected):
        assert ours.dtype == FP32 and not ours.requires_grad and ours.shape == (40,)
        assert relative_error(ours, theirs) < 1e-6  # both fp32, some ten roundings
        assert ours[3] == 0
    assert stats.correct[:20].sum() == 19

    z = logits if not options else 3 * torch.tanh(logits / 3)
    scored = targets != -100
    distribution = torch.distributions.Categorical(logits=z[scored])
    torch.testing.assert_close(stats.entropy[scored], distribution.entropy())
    torch.testing.assert_close(stats.nll[scored], -distribution.log_prob(targets[scored]))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("M", [1, 40])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_the_statistics_of_preference_tuning(small_chunks, dtype, M, reduction):
    """Against fp64, of logits that are scaled, shifted and capped, in rows of which some repeat and some are ignored."""
    hidden, weight, targets = example(V=51, M=M, ignored=M // 8)
    rows, bias = torch.randint(40, (M,)), torch.randn(51) + 2
    options = dict(OPTIONS["all"], rows=rows, row_weights=torch.rand(M), reduction=reduction, return_stats="all")

    def run(op):
        def call(h, w, b):
            loss, stats = op(h, w, targets, bias=b, **options)
            assert (stats.mean_logit[targets == -100] == 0).all()
            assert (stats.log_sum_sq_probs[targets == -100] == 0).all()
            return loss.sum(), stats.mean_logit, stats.log_sum_sq_probs

        return call

    # The first output is one number: the errors of its rows (2^-9 each) may cancel in one run and not in the other.
    floor = 2e-3 if dtype == BF16 else None
    errors = assert_close_to_truth(
        run(linear_cross_entropy), run(linear_cross_entropy_ref), [hidden, weight, bias], dtype, floor=floor
    )
    assert len(errors) == 5


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_flat_and_peaked_rows(backend):
    """log sum p^2 runs from -log V, where all words are alike, to 0, where one is certain; and is never NaN on the way."""
    V, words = 50257, 4
    rises = torch.tensor([0.0, 12.0, 80.0, 80.0, 1e4])  # of the words before `peaks`, above all others
    peaks = torch.tensor([0, 1, 1, words, 1])
    weight = torch.where(torch.arange(V)[:, None] < peaks, rises, 0.0)
    with use_backend(backend):
        _, stats = linear_cross_entropy(torch.eye(5), weight, torch.zeros(5, dtype=torch.int64), return_stats="all")
    p = weight.double().T.softmax(-1)
    # A difference of logarithms below 22 in fp32; the formula's lse, near 81, is rounded to 4e-6 and doubled.
    atol = 4e-6 if backend == "torch" else 1e-5
    torch.testing.assert_close(stats.log_sum_sq_probs, p.square().sum(-1).log().float(), rtol=0, atol=atol)
    torch.testing.assert_close(stats.mean_logit, weight.double().mean(0).float(), rtol=1e-6, atol=0)
    if backend == "torch":
        assert (stats.log_sum_sq_probs <= 0).all() and (stats.log_sum_sq_probs[[2, 4]] == 0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_statistics_change_nothing_else(backend, reduction):
    hidden, weight, targets = example()
    with use_backend(backend):
        plain = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
        (some, three), (loss, five) = (
            linear_cross_entropy(hidden, weight, targets, reduction=reduction, return_stats=asked)
            for asked in (True, "all")
        )
    assert torch.equal(plain, some) and torch.equal(plain, loss)
    assert three[3:] == (None, None) and all(torch.equal(a, b) for a, b in zip(three[:3], five))
    expected = gradients(plain.sum(), hidden, weight)
    for x in (some, loss):
        assert all(torch.equal(d, e) for d, e in zip(gradients(x.sum(), hidden, weight), expected))
    # Jensen: the logarithm of p's mean is at least the mean of p's logarithm, which is minus the entropy.
    assert (five.log_sum_sq_probs >= -five.entropy - 1e-6).all()


def test_statistics_of_shifted_labels_lie_at_the_rows_that_predict():
    hidden, weight, labels = example(ignored=3)
    cu_seqlens = cu_seqlens_of([13, 1, 26])
    targets = labels.roll(-1)
    targets[cu_seqlens[1:].long() - 1] = -100
    _, shifted = shifted_linear_cross_entropy(hidden, weight, labels, cu_seqlens, return_stats="all")
    _, direct = linear_cross_entropy(hidden, weight, targets, return_stats="all")
    assert all(torch.equal(a, b) for a, b in zip(shifted, direct))
    assert all((s[[12, 13, 39]] == 0).all() for s in shifted)


def test_confident_predictions():
    """Probabilities that are 0 or 1 in fp32: the loss of a wrong prediction is large and finite."""
    hidden = torch.eye(3, requires_grad=True)
    weight = (torch.eye(3) * 200).requires_grad_()
    loss, stats = linear_cross_entropy(hidden, weight, torch.tensor([0, 1, 0]), reduction="none", return_stats=True)
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 200.0]))
    assert stats.correct.tolist() == [1, 1, 0]
    (d_hidden,) = gradients(loss.sum(), hidden)
    torch.testing.assert_close(d_hidden, torch.tensor([[0, 0, 0], [0, 0, 0], [-200.0, 0, 200.0]]))


def test_nan_is_not_hidden():
    hidden, weight, targets = example(ignored=0)
    with torch.no_grad():
        hidden[3, 2] = float("nan")
    loss, stats = linear_cross_entropy(hidden, weight, targets, return_stats="all")
    assert loss.isnan()
    assert all(s.isnan().sum() == 1 for s in (stats.nll, stats.entropy, stats.mean_logit, stats.log_sum_sq_probs))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_shifted_of_no_tokens(backend):
    hidden, weight, labels = example(dtype=FP64)
    with use_backend(backend):
        loss = shifted_linear_cross_entropy(hidden[:0], weight, labels[:0], torch.tensor([0, 0]))
    assert loss == 0 and not any(d.any() for d in gradients(loss, hidden, weight))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("lengths", [[40], [1, 13, 1, 1, 24], [1] * 40])
def test_shifted_equals_cross_entropy_document_by_document(backend, lengths):
    hidden, weight, labels = example(dtype=FP64)
    with use_backend(backend):
        loss = shifted_linear_cross_entropy(hidden, weight, labels, cu_seqlens_of(lengths))
    expected = hidden.sum() * 0
    for h, l in zip(hidden.split(lengths), labels.split(lengths)):
        expected = expected + F.cross_entropy((h @ weight.T)[:-1], l[1:], reduction="sum")
    torch.testing.assert_close(loss, expected)
    for d, e in zip(
        gradients(loss, hidden, weight), torch.autograd.grad(expected, (hidden, weight), allow_unused=True)
    ):
        torch.testing.assert_close(d, torch.zeros_like(d) if e is None else e)


def test_shifted_without_documents_is_one_document():
    hidden, weight, labels = example()
    one = shifted_linear_cross_entropy(hidden, weight, labels, torch.tensor([0, 40]), reduction="none")
    none = shifted_linear_cross_entropy(hidden, weight, labels, reduction="none")
    assert torch.equal(one, none) and one[-1] == 0


def test_documents_do_not_leak():
    """Other words and states in one document change nothing, to the bit, in another."""
    hidden, weight, labels = example(ignored=0)
    weight.requires_grad_(False)
    cu_seqlens = cu_seqlens_of([17, 23])
    (before,) = gradients(shifted_linear_cross_entropy(hidden, weight, labels, cu_seqlens), hidden)
    other = hidden.detach().clone()
    other[17:], labels[17:] = 3.0, 5
    other.requires_grad_()
    (after,) = gradients(shifted_linear_cross_entropy(other, weight, labels, cu_seqlens), other)
    assert torch.equal(before[:17], after[:17])


BAD = {
    "target 50 is outside": {"targets": torch.tensor([50, 1])},
    "target -1 is outside": {"targets": torch.tensor([-1, 1])},
    r"int32 \(2,\)": {"targets": torch.tensor([0, 1], dtype=torch.int32)},
    "3 targets for 2 rows": {"targets": torch.tensor([0, 1, 2])},
    "rows from 0 to 2": {"rows": torch.tensor([0, 2])},
    "rows from -1 to 0": {"rows": torch.tensor([-1, 0])},
    r"rows \(3,\)": {"rows": torch.tensor([0, 1, 1])},
    "rows torch.float32": {"rows": torch.tensor([0.0, 1.0])},
    r"row_weights \(1,\)": {"row_weights": torch.ones(1)},
    r"bias \(2,\): expected \(50,\)": {"bias": torch.ones(2)},
    "softcap 0": {"softcap": 0},
    "label_smoothing 1": {"label_smoothing": 1.0},
    "reduction 'mean'": {"reduction": "mean"},
    "return_stats 'some': expected False, True or 'all'": {"return_stats": "some"},
    "return_stats None": {"return_stats": None},
    r"weight \(50, 7\)": {"weight": torch.ones(50, 7)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arguments = {"hidden": torch.ones(2, 16), "weight": torch.ones(50, 16), "targets": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **BAD[message]})


def test_bad_documents():
    hidden, weight, labels = example()
    with pytest.raises(ValueError, match="from 0 to 39: expected 0 to 40"):
        shifted_linear_cross_entropy(hidden, weight, labels, torch.tensor([0, 39]))
    with pytest.raises(ValueError, match="from 0 to 40: .* never back"):
        shifted_linear_cross_entropy(hidden, weight, labels, torch.tensor([0, 39, 20, 40]))
    with pytest.raises(ValueError, match=r"cu_seqlens torch.int64 \(0,\)"):
        shifted_linear_cross_entropy(hidden, weight, labels, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels \(39,\): expected \(40,\)"):
        shifted_linear_cross_entropy(hidden, weight, labels[1:])
