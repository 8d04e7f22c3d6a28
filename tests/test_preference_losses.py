"""The losses of preference tuning against their equations in plain Python, and what must hold of each."""

import math

import pytest
import torch

from minisft.preference.losses import (
    ACROSS_THE_BATCH,
    DIVERGENCES,
    LOSSES,
    WITHOUT_REFERENCE,
    divergence_score,
    dpo_loss,
    kto_loss,
    ld_weights,
    wpo_weights,
)

BETA, E, TAU, GAMMA = 0.3, 0.1, 0.05, 0.5
# Sums over the tokens of the answers of four pairs, and their lengths.
W, L = [-10.0, -31.5, -7.25, -22.0], [-12.5, -30.0, -9.25, -60.0]
RW, RL = [-11.0, -30.0, -8.0, -22.0], [-11.5, -33.0, -8.0, -44.0]
NW, NL = [5, 12, 3, 8], [6, 11, 4, 20]


def s(x):
    return 1 / (1 + math.exp(-x))


def equations():
    """{loss: [value for each pair]} from the papers' formulas."""
    pairs = list(zip(W, L, RW, RL, NW, NL))
    r = [(w - rw, lo - rl) for w, lo, rw, rl, _, _ in pairs]
    m = [a - b for a, b in r]
    mean = [a / nw - b / nl for (a, b), nw, nl in zip(r, NW, NL)]
    aot = [a - b for a, b in zip(sorted(w - lo for w, lo in zip(W, L)), sorted(w - lo for w, lo in zip(RW, RL)))]
    unpaired = [a - b for a, b in zip(sorted(a for a, _ in r), sorted(b for _, b in r))]

    def smooth(x):
        return -(1 - E) * math.log(s(x)) - E * math.log(s(-x))

    def kl(x):
        return s(x) * math.log(s(x) / (1 - E)) + s(-x) * math.log(s(-x) / E)

    def odds(logp):
        return math.log(math.exp(logp) / (1 - math.exp(logp)))

    return {
        "sigmoid": [smooth(BETA * x) for x in m],
        "sigmoid_norm": [-math.log(s(BETA * x)) for x in mean],
        "hinge": [max(0, 1 - BETA * x) for x in m],
        "ipo": [(x - 1 / (2 * BETA)) ** 2 for x in mean],
        "exo_pair": [kl(BETA * x) for x in m],
        "nca_pair": [
            -math.log(s(BETA * a)) - 0.5 * math.log(s(-BETA * a)) - 0.5 * math.log(s(-BETA * b)) for a, b in r
        ],
        "robust": [(-(1 - E) * math.log(s(BETA * x)) + E * math.log(s(-BETA * x))) / (1 - 2 * E) for x in m],
        "bco_pair": [-math.log(s(BETA * a)) - math.log(s(-BETA * b)) for a, b in r],
        "sppo_hard": [(a - 0.5 / BETA) ** 2 + (b + 0.5 / BETA) ** 2 for a, b in r],
        "aot": [smooth(BETA * x) for x in aot],
        "aot_unpaired": [smooth(BETA * x) for x in unpaired],
        "apo_zero": [1 - s(BETA * a) + s(BETA * b) for a, b in r],
        "apo_down": [s(BETA * a) + 1 - s(BETA * (a - b)) for a, b in r],
        "discopop": [
            -(1 - s(BETA * x / TAU)) * math.log(s(BETA * x)) + s(BETA * x / TAU) * math.exp(-BETA * x) for x in m
        ],
        "sft": [-w / (sum(NW) / 4) for w in W],
        "simpo": [-math.log(s(BETA * (w / nw - lo / nl) - GAMMA)) for w, lo, _, _, nw, nl in pairs],
        "orpo": [-w / nw - BETA * math.log(s(odds(w / nw) - odds(lo / nl))) for w, lo, _, _, nw, nl in pairs],
    }


def logps(dtype=torch.float64):
    return [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (W, L, RW, RL)]


def lengths():
    return dict(chosen_length=torch.tensor(NW), rejected_length=torch.tensor(NL))


def loss_of(name, tensors=None, **options):
    smoothing = {"label_smoothing": E} if name in ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired") else {}
    return dpo_loss(*(tensors or logps()), beta=BETA, loss_type=name, **lengths(), **(smoothing | options))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_equations(name, dtype, tolerance):
    losses, chosen, rejected = loss_of(name, logps(dtype))
    assert losses.tolist() == pytest.approx(equations()[name], rel=tolerance)
    assert chosen.tolist() == pytest.approx([BETA * (a - b) for a, b in zip(W, RW)], rel=tolerance)
    assert rejected.tolist() == pytest.approx([BETA * (a - b) for a, b in zip(L, RL)], rel=tolerance)
    assert losses.dtype == dtype and not chosen.requires_grad


def test_golden_values():
    """log(1 + exp(-0.3 m)) of the margins 2, -4.5, 2 and 16."""
    losses = dpo_loss(*logps(), beta=0.3)[0]
    assert losses.tolist() == pytest.approx([0.437488, 1.580509, 0.437488, 0.008196], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(lambda *tensors: loss_of(name, list(tensors))[0], logps())


def test_of_the_reference_itself_the_sigmoid_loss_is_ln_2_and_nothing_is_rewarded():
    w, lo, _, _ = logps()
    for divergence in DIVERGENCES:
        losses, chosen, rejected = dpo_loss(w, lo, w.detach(), lo.detach(), f_divergence=divergence)
        assert losses.tolist() == pytest.approx([math.log(2)] * 4, rel=1e-15)
        assert not chosen.any() and not rejected.any()


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - set(WITHOUT_REFERENCE)))
def test_a_reference_that_moves_with_the_policy_changes_nothing(name):
    w, lo, rw, rl = logps()
    moved = loss_of(name, [w + 3, lo + 3, rw + 3, rl + 3])[0]
    assert torch.allclose(moved, loss_of(name)[0], rtol=1e-13)


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_losses_without_a_reference_do_not_look_at_it(name):
    w, lo, rw, rl = logps()
    assert torch.equal(loss_of(name, [w, lo, rw * 0, rl * 0])[0], loss_of(name)[0])


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_the_pairs(name):
    order = torch.tensor([2, 0, 3, 1])
    turned = dict(chosen_length=torch.tensor(NW)[order], rejected_length=torch.tensor(NL)[order])
    losses = dpo_loss(*(x[order] for x in logps()), beta=BETA, loss_type=name, label_smoothing=E, **turned)[0]
    plain = dpo_loss(*logps(), beta=BETA, loss_type=name, label_smoothing=E, **lengths())[0]
    assert losses.sum().item() == pytest.approx(plain.sum().item(), rel=1e-14)
    if name not in ACROSS_THE_BATCH:
        assert torch.equal(losses, plain[order])


@pytest.mark.parametrize(
    "name", "sigmoid sigmoid_norm hinge bco_pair aot aot_unpaired apo_zero simpo orpo".split()
)  # the others aim at a margin, or move the chosen answer too
def test_the_gradient_lifts_the_chosen_and_lowers_the_rejected(name):
    w, lo, rw, rl = logps()
    losses = dpo_loss(w, lo, rw, rl, beta=BETA, loss_type=name, **lengths())[0]
    losses.sum().backward()
    assert (w.grad <= 0).all() and (lo.grad >= 0).all() and w.grad.any() and lo.grad.any()


def test_a_mixture_is_the_weighted_sum():
    mixed = dpo_loss(*logps(), beta=BETA, loss_type={"sigmoid": 0.8, "sft": 0.25}, **lengths())[0]
    parts = [dpo_loss(*logps(), beta=BETA, loss_type=name, **lengths())[0] for name in ("sigmoid", "sft")]
    assert torch.equal(mixed, 0.8 * parts[0] + 0.25 * parts[1])


@pytest.mark.parametrize(
    "divergence, alpha, h",
    [
        ("reverse_kl", 0.5, lambda r: r),
        ("forward_kl", 0.5, lambda r: 1 - math.exp(-r)),
        ("js_divergence", 0.5, lambda r: math.log(2 * math.exp(r) / (math.exp(r) + 1))),
        ("alpha_divergence", 0.3, lambda r: (math.exp(r) ** (0.3 - 1) - 1) / (0.3 - 1)),
        ("alpha_divergence", 1.0, lambda r: r),
    ],
)
def test_divergences(divergence, alpha, h):
    """h is f' at the ratio of the probabilities, exp(r); 0 where policy and reference agree."""
    r = torch.tensor([-3.0, -0.5, 0.0, 0.25, 4.0], dtype=torch.float64)
    assert divergence_score(r, divergence, alpha).tolist() == pytest.approx(
        [h(x) for x in r.tolist()], rel=1e-12, abs=1e-15
    )
    assert divergence_score(torch.tensor([-1e4, 1e4]), divergence, alpha).isfinite().all()


def test_near_1_the_alpha_divergence_is_the_reverse_kl():
    r = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    assert torch.allclose(divergence_score(r, "alpha_divergence", 1 + 1e-9), r, rtol=1e-7)


def test_kto():
    good = torch.tensor([True, False, True, False])
    losses, rewards = kto_loss(*logps()[::2], good, torch.tensor(0.5), beta=BETA, undesirable_weight=1.5)
    r = [a - b for a, b in zip(W, RW)]
    expected = [1 - s(BETA * (x - 0.5)) if g else 1.5 * (1 - s(BETA * (0.5 - x))) for x, g in zip(r, good.tolist())]
    assert losses.tolist() == pytest.approx(expected, rel=1e-7) and rewards.tolist() == pytest.approx(
        [BETA * x for x in r]
    )
    negative = kto_loss(*logps()[::2], good, torch.tensor(-3.0))[0]  # a divergence is never below 0
    assert torch.equal(negative, kto_loss(*logps()[::2], good, torch.tensor(0.0))[0])


def test_wpo_weights():
    a, b = torch.tensor([-2.0, -6.0]), torch.tensor([-4.0, -1.0])
    weights = wpo_weights(a, b, a / 2, b / 4, torch.tensor([2, 3]), torch.tensor([4, 1]))
    assert weights.tolist() == pytest.approx([math.exp(-1 / 2 - 3 / 4), math.exp(-3 / 3 - 0.75)], rel=1e-6)
    same = wpo_weights(a, b, a, b, torch.ones(2), torch.ones(2))
    assert torch.equal(same, torch.ones(2))  # every token as likely as tokens drawn from the policy


def test_ld_weights():
    position, shared = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 2, 2, 2])
    assert ld_weights(position, shared, 0.25).tolist() == [1, 1, 0.25, 1, 1]
    assert torch.equal(ld_weights(position, shared, 1.0), torch.ones(5))


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(loss_type="sigmiod"), "loss_type sigmiod"),
        (dict(loss_type={"sigmoid": 1.0, "x": 1.0}), "loss_type x"),
        (dict(label_smoothing=1.0), "label_smoothing 1.0"),
        (dict(loss_type="robust", label_smoothing=0.5), "below 1/2"),
        (dict(loss_type="exo_pair"), "above 0"),
        (dict(f_divergence="kl"), "f_divergence 'kl'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        dpo_loss(*logps(), **options)


def test_large_differences_stay_finite():
    far = [torch.tensor([x], requires_grad=True) for x in (-3000.0, -10.0, -10.0, -3000.0)]
    for name in LOSSES.keys() - {"discopop"}:  # whose exp(-x) is meant to grow
        losses = dpo_loss(*far, loss_type=name, label_smoothing=0.1, chosen_length=torch.tensor([300]))[0]
        assert losses.isfinite().all(), name
        assert all(
            g is None or g.isfinite().all() for g in torch.autograd.grad(losses.sum(), far, allow_unused=True)
        ), name
