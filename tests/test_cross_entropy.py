"""cross_entropy: rows at a time, with the shift by index, equals PyTorch's loss document by document."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import LAYOUTS, assert_close_to_truth, cu_seqlens_of

from minisft.kernels.common import use_backend
from minisft.kernels.cross_entropy import cross_entropy, cross_entropy_ref

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "all": {"softcap": 2.0, "label_smoothing": 0.2, "z_loss": 0.02},
}


def example(T=70, V=50, dtype=FP32, ignored=0.3):
    logits = (2 * torch.randn(T, V, dtype=dtype)).requires_grad_()
    labels = torch.randint(V, (T,))
    labels[torch.rand(T) < ignored] = -100
    return logits, labels


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_equals_the_reference(dtype, options, reduction):
    logits, labels = example()
    options = {**options, "reduction": reduction, "cu_seqlens": cu_seqlens_of([1, 30, 38, 1])}
    assert_close_to_truth(
        lambda x: cross_entropy(x, labels, **options),
        lambda x: cross_entropy_ref(x, labels, **options),
        [logits],
        dtype,
    )


@pytest.mark.parametrize("T", [1, 2, 8, 9, 33])
@pytest.mark.parametrize("shift", [True, False])
def test_a_real_vocabulary(T, shift):
    logits, labels = example(T=T, V=50257, ignored=0)
    errors = assert_close_to_truth(
        lambda x: cross_entropy(x, labels, shift=shift),
        lambda x: cross_entropy_ref(x, labels, shift=shift),
        [logits],
        BF16,
    )
    assert len(errors) == 2


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(options, reduction):
    logits, labels = example(T=12, V=7, dtype=FP64)
    cu_seqlens = cu_seqlens_of([5, 1, 6])

    def call(x):
        return cross_entropy(x, labels, cu_seqlens=cu_seqlens, reduction=reduction, **options)

    assert torch.autograd.gradcheck(call, (logits,))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shift_stays_inside_the_document(backend, layout):
    """Equal to slicing every document out and shifting it by copy, as everybody else does."""
    lengths = LAYOUTS[layout]
    logits, labels = example(T=sum(lengths), V=11, dtype=FP64)
    with use_backend(backend):
        loss = cross_entropy(logits, labels, cu_seqlens=cu_seqlens_of(lengths), reduction="sum")
    expected = logits.sum() * 0
    for x, y in zip(logits.split(lengths), labels.split(lengths)):
        expected = expected + F.cross_entropy(x[:-1], y[1:], reduction="sum")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_reductions_agree(backend):
    logits, labels = example()
    with use_backend(backend):
        mean, total, each = (cross_entropy(logits, labels, reduction=r) for r in ("mean", "sum", "none"))
    scored = labels[1:] != -100
    assert torch.equal(total, each.sum()) and torch.equal(mean, total / scored.sum())
    assert (each[:-1][~scored] == 0).all() and (each[:-1][scored] > 0).all() and each[-1] == 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_score(backend, reduction):
    logits, labels = example(ignored=1.1)
    with use_backend(backend):
        loss = cross_entropy(logits, labels, reduction=reduction, label_smoothing=0.1, z_loss=0.1)
    assert (loss == 0).all()
    assert (torch.autograd.grad(loss.sum(), logits)[0] == 0).all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens(backend, reduction):
    logits, labels = torch.randn(0, 9, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    with use_backend(backend):
        loss = cross_entropy(logits, labels, cu_seqlens=torch.tensor([0, 0]), reduction=reduction)
    assert (loss == 0).all() and torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 9)


def test_another_ignore_index():
    """ignore_index may be outside the vocabulary or inside (a padding token that is never scored)."""
    logits, labels = example(dtype=FP64)
    expected = cross_entropy(logits, labels)
    for index in (-1, 50):
        torch.testing.assert_close(
            cross_entropy(logits, labels.where(labels >= 0, index), ignore_index=index), expected
        )
    inside = F.cross_entropy(logits[:-1], labels.clamp(min=0)[1:], ignore_index=0)
    torch.testing.assert_close(cross_entropy(logits, labels.clamp(min=0), ignore_index=0), inside)


def test_unscored_rows_may_hold_anything():
    logits, labels = example()
    with torch.no_grad():
        logits[:-1][labels[1:] == -100] = float("nan")
    loss = cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and gradient.isfinite().all()


def test_confident_predictions():
    """A probability of 0 in fp32 has a large, finite loss; NaN is not hidden."""
    logits = torch.tensor([[0.0, 500.0], [0.0, 500.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 1]), shift=False, reduction="none")
    assert loss.tolist() == [500, 0]
    assert torch.autograd.grad(loss.sum(), logits)[0].tolist() == [[-1, 1], [0, 0]]
    assert cross_entropy(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]), shift=False).isnan()


def test_logits_are_left_as_they_are():
    logits, labels = example(dtype=BF16)
    before = logits.detach().clone()
    cross_entropy(logits, labels, **OPTIONS["all"]).backward()
    assert torch.equal(logits, before) and logits.grad.dtype == BF16


BAD = {
    r"logits \(2, 3, 4\)": {"logits": torch.ones(2, 3, 4)},
    r"labels torch.int64 \(1,\)": {"labels": torch.tensor([1])},
    "labels torch.int32": {"labels": torch.tensor([1, 2], dtype=torch.int32)},
    "label 4 is outside the vocabulary of 4": {"labels": torch.tensor([0, 4])},
    "label -1 is outside": {"labels": torch.tensor([0, -1])},
    "cu_seqlens runs from 0 to 3": {"cu_seqlens": torch.tensor([0, 3])},
    "cu_seqlens runs from 1 to 2": {"cu_seqlens": torch.tensor([1, 2])},
    "cu_seqlens runs from 0 to 2: .* never back": {"cu_seqlens": torch.tensor([0, 2, 1, 2])},
    "cu_seqlens runs from 0 to 2: expected": {"cu_seqlens": torch.tensor([0, 40, 2])},
    r"cu_seqlens torch.int64 \(0,\)": {"cu_seqlens": torch.zeros(0, dtype=torch.int64)},
    r"cu_seqlens torch.int64 \(\)": {"cu_seqlens": torch.tensor(2)},
    "cu_seqlens torch.float32": {"cu_seqlens": torch.tensor([0.0, 2.0])},
    "softcap -1": {"softcap": -1},
    "label_smoothing 1.5": {"label_smoothing": 1.5},
    "reduction 'average'": {"reduction": "average"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    arguments = {"logits": torch.ones(2, 4), "labels": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**{**arguments, **BAD[message]})
