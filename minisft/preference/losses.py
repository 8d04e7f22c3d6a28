"""The losses of preference tuning: functions of a pair of answers, one chosen and one rejected.

The input is the log-probability of each answer y to a prompt x, summed over its tokens, under the policy that is trained and
under a frozen reference. With the log-ratio of an answer

        r(y) = log policy(y | x) - log reference(y | x)                 r_w of the chosen one, r_l of the rejected one

beta r(y) is the reward that the policy implies (Rafailov et al. 2023, arXiv:2305.18290, eq. 5), and a loss pushes the rewards
of a pair apart. Below, m = h(r_w) - h(r_l) is the margin, s the sigmoid, e the label smoothing. h is the identity; another
f-divergence than the reverse KL between policy and reference has another h, the derivative of f at exp(r) (Wang et al. 2023,
arXiv:2309.16240):

        forward KL          1 - exp(-r)
        Jensen-Shannon      log 2 + log s(r)
        alpha-divergence    (exp((a - 1) r) - 1) / (a - 1)

Everything is fp32 (or fp64): the differences are small numbers between sums of hundreds of tokens.

A new loss is a function below and its name in LOSSES, and in the tables under it that fit. The configuration reads the
names from here without torch, so this file uses methods of tensors and imports torch only inside `logsigmoid`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
LARGEST_EXPONENT = 80.0  # exp of it is finite in fp32


@dataclass(frozen=True)
class Pairs:
    """P pairs; every tensor is [P]. The logps are sums over the tokens of an answer."""

    chosen: Tensor  # log-probabilities under the policy
    rejected: Tensor
    ref_chosen: Tensor  # and under the reference
    ref_rejected: Tensor
    chosen_length: Tensor  # tokens of the answers, at least 1
    rejected_length: Tensor
    chosen_score: Tensor  # h(r_w)
    rejected_score: Tensor  # h(r_l)

    @property
    def margin(self) -> Tensor:
        return self.chosen_score - self.rejected_score

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.ref_rejected

    @property
    def mean_margin(self) -> Tensor:
        """m of the scores a token."""
        return self.chosen_score / self.chosen_length - self.rejected_score / self.rejected_length


@dataclass(frozen=True)
class LossOptions:
    """The numbers of a loss that are not measured on the pairs."""

    beta: float = 0.1
    label_smoothing: float = 0.0  # e, the part of the pairs whose order is taken to be wrong
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5  # SimPO's target margin
    f_divergence: str = "reverse_kl"  # one of DIVERGENCES
    alpha: float = 0.5  # of the alpha-divergence; 1 = reverse KL


def logsigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def smoothed(x: Tensor, e: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x)"""
    return -(1 - e) * logsigmoid(x) - e * logsigmoid(-x)


def sigmoid(p: Pairs, o: LossOptions) -> Tensor:
    """-(1 - e) log s(beta m) - e log s(-beta m). DPO, arXiv:2305.18290 eq. 7; with e Mitchell's conservative DPO."""
    return smoothed(o.beta * p.margin, o.label_smoothing)


def sigmoid_norm(p: Pairs, o: LossOptions) -> Tensor:
    """-log s(beta (h(r_w) / |y_w| - h(r_l) / |y_l|)). Length-normalised DPO; Lambert et al. 2024, arXiv:2411.15124."""
    return -logsigmoid(o.beta * p.mean_margin)


def hinge(p: Pairs, o: LossOptions) -> Tensor:
    """max(0, 1 - beta m). Zhao et al. 2023 (SLiC), arXiv:2305.10425; normalised as in RSO, arXiv:2309.06657."""
    return (1 - o.beta * p.margin).relu()


def ipo(p: Pairs, o: LossOptions) -> Tensor:
    """(h(r_w) / |y_w| - h(r_l) / |y_l| - 1 / (2 beta))^2. Azar et al. 2023, arXiv:2310.12036 eq. 17, per token."""
    return (p.mean_margin - 1 / (2 * o.beta)).square()


def exo_pair(p: Pairs, o: LossOptions) -> Tensor:
    """KL((s(beta m), s(-beta m)) || (1 - e, e)), e > 0. Ji et al. 2024, arXiv:2402.00856 eq. 16."""
    x, e = o.beta * p.margin, o.label_smoothing
    return x.sigmoid() * (logsigmoid(x) - math.log1p(-e)) + (-x).sigmoid() * (logsigmoid(-x) - math.log(e))


def nca_pair(p: Pairs, o: LossOptions) -> Tensor:
    """-log s(beta r_w) - (log s(-beta r_w) + log s(-beta r_l)) / 2. Chen et al. 2024, arXiv:2402.05369."""
    win, lose = o.beta * p.chosen_ratio, o.beta * p.rejected_ratio
    return -logsigmoid(win) - 0.5 * logsigmoid(-win) - 0.5 * logsigmoid(-lose)


def robust(p: Pairs, o: LossOptions) -> Tensor:
    """(-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2 e), e < 1/2: unbiased where a share e of the pairs is swapped.
    Chowdhury et al. 2024, arXiv:2403.00409."""
    x, e = o.beta * p.margin, o.label_smoothing
    return (-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e)


def bco_pair(p: Pairs, o: LossOptions) -> Tensor:
    """-log s(beta r_w) - log s(-beta r_l). Jung et al. 2024, arXiv:2404.04656, without its reward shift."""
    return -logsigmoid(o.beta * p.chosen_ratio) - logsigmoid(-o.beta * p.rejected_ratio)


def sppo_hard(p: Pairs, o: LossOptions) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2. Wu et al. 2024, arXiv:2405.00675 eq. 4.7 with P = 1 and 0."""
    return (p.chosen_ratio - 0.5 / o.beta).square() + (p.rejected_ratio + 0.5 / o.beta).square()


def aot(p: Pairs, o: LossOptions) -> Tensor:
    """The margins of the policy in order against those of the reference in order: a distribution is to lie above another
    one, whichever pairs they come from. Looks across the batch. Melnyk et al. 2024, arXiv:2406.05882."""
    delta = (p.chosen - p.rejected).sort().values - (p.ref_chosen - p.ref_rejected).sort().values
    return smoothed(o.beta * delta, o.label_smoothing)


def aot_unpaired(p: Pairs, o: LossOptions) -> Tensor:
    """The same of r_w in order against r_l in order."""
    delta = p.chosen_ratio.sort().values - p.rejected_ratio.sort().values
    return smoothed(o.beta * delta, o.label_smoothing)


def apo_zero(p: Pairs, o: LossOptions) -> Tensor:
    """1 - s(beta r_w) + s(beta r_l): for answers better than the policy's own. D'Oosterlinck et al. 2024,
    arXiv:2408.06266 eq. 7."""
    return 1 - (o.beta * p.chosen_ratio).sigmoid() + (o.beta * p.rejected_ratio).sigmoid()


def apo_down(p: Pairs, o: LossOptions) -> Tensor:
    """s(beta r_w) + 1 - s(beta (r_w - r_l)): for answers worse than the policy's own; eq. 8."""
    return (o.beta * p.chosen_ratio).sigmoid() + 1 - (o.beta * (p.chosen_ratio - p.rejected_ratio)).sigmoid()


def discopop(p: Pairs, o: LossOptions) -> Tensor:
    """(1 - a) (-log s(x)) + a exp(-x), x = beta m, a = s(x / tau): found by a language model. Lu et al. 2024,
    arXiv:2406.08414 eq. 5."""
    x = o.beta * p.margin
    share = (x / o.discopop_tau).sigmoid()
    likelihood_ratio = (-x).clamp(max=LARGEST_EXPONENT).exp()  # share is 0 before, and 0 inf is no number
    return -(1 - share) * logsigmoid(x) + share * likelihood_ratio


def sft(p: Pairs, o: LossOptions) -> Tensor:
    """-log policy(y_w) / (mean |y_w|): divided by the batch's mean answer length, so that the mean over pairs is the mean NLL
    per token over all chosen answers. For mixtures, so that the chosen answers do not become unlikely too."""
    return -p.chosen / p.chosen_length.to(p.chosen.dtype).mean()


def simpo(p: Pairs, o: LossOptions) -> Tensor:
    """-log s(beta (log policy(y_w) / |y_w| - log policy(y_l) / |y_l|) - gamma), without a reference; beta is 2 or more.
    Meng et al. 2024, arXiv:2405.14734."""
    return -logsigmoid(o.beta * (p.chosen / p.chosen_length - p.rejected / p.rejected_length) - o.simpo_gamma)


def orpo(p: Pairs, o: LossOptions) -> Tensor:
    """-log P_w - beta log s(logit P_w - logit P_l), without a reference; P = policy(y)^(1 / |y|), logit P = log(P / (1 - P)).
    Hong et al. 2024, arXiv:2403.07691 eq. 6, 7."""
    win, lose = p.chosen / p.chosen_length, p.rejected / p.rejected_length
    log_odds = win - lose - (_log_one_minus_exp(win) - _log_one_minus_exp(lose))
    return -win - o.beta * logsigmoid(log_odds)


LOSSES: dict[str, Callable[[Pairs, LossOptions], Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, sigmoid_norm, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, aot, aot_unpaired),
        *(apo_zero, apo_down, discopop, sft, simpo, orpo),
    )
}
WITHOUT_REFERENCE = ("sft", "simpo", "orpo")  # these read the policy's log-probabilities only
WITH_LABEL_SMOOTHING = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")
WITH_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")  # these read h
ACROSS_THE_BATCH = ("aot", "aot_unpaired", "sft")  # a pair's loss depends on the others of the micro-batch


def make_pairs(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    o: LossOptions,
) -> Pairs:
    """The pairs, with their scores under o.f_divergence; every tensor is [P]."""
    scores = (divergence_score(r, o.f_divergence, o.alpha) for r in (chosen - ref_chosen, rejected - ref_rejected))
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, *scores)


def mixture(pairs: Pairs, weights: dict[str, float], o: LossOptions) -> Tensor:
    """The weighted sum of losses by their names in LOSSES, [P]."""
    return sum(weight * LOSSES[name](pairs, o) for name, weight in weights.items())


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    loss_type: str | dict[str, float] = "sigmoid",
    chosen_length: Tensor | None = None,
    rejected_length: Tensor | None = None,
    **options: float | str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of P pairs, and the rewards that the policy implies.

    The logps: fp32 or fp64 [P], sums over the tokens of each answer. loss_type: a key of LOSSES, or a mixture {key: weight}.
    chosen_length, rejected_length: tokens of the answers [P], for the losses that divide by them; None: 1 each.
    options: fields of LossOptions, f_divergence among them.

    Returns losses [P], chosen_rewards [P] and rejected_rewards [P], the latter detached: beta (policy - reference).
    Raises ValueError for an unknown loss, divergence or option, and where label_smoothing does not fit the loss.
    """
    weights = {loss_type: 1.0} if isinstance(loss_type, str) else loss_type
    if unknown := [name for name in weights if name not in LOSSES]:
        raise ValueError(f"loss_type {', '.join(unknown)}: expected some of {', '.join(LOSSES)}")
    o = LossOptions(beta=beta, **options)
    if not 0 <= o.label_smoothing < (0.5 if "robust" in weights else 1):
        raise ValueError(f"label_smoothing {o.label_smoothing}: expected 0 or more, below 1 (robust: below 1/2)")
    if "exo_pair" in weights and o.label_smoothing == 0:
        raise ValueError("exo_pair compares with (1 - e, e): label_smoothing must be above 0, 1e-3 is usual")
    one = policy_chosen_logps.new_ones(policy_chosen_logps.shape)
    pairs = make_pairs(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        one if chosen_length is None else chosen_length,
        one if rejected_length is None else rejected_length,
        o,
    )
    return mixture(pairs, weights, o), beta * pairs.chosen_ratio.detach(), beta * pairs.rejected_ratio.detach()


def divergence_score(r: Tensor, f_divergence: str, alpha: float = 0.5) -> Tensor:
    """h(r) of one of DIVERGENCES, in the shape of the log-ratios r. Exponents end at 80, where exp is finite in fp32."""
    if f_divergence not in DIVERGENCES:
        raise ValueError(f"f_divergence {f_divergence!r}: expected one of {', '.join(DIVERGENCES)}")
    if f_divergence == "forward_kl":
        return 1 - (-r).clamp(max=LARGEST_EXPONENT).exp()
    if f_divergence == "js_divergence":
        return math.log(2) + logsigmoid(r)
    if f_divergence == "alpha_divergence" and alpha != 1:
        return ((alpha - 1) * r).clamp(max=LARGEST_EXPONENT).expm1() / (alpha - 1)
    return r


def kto_loss(
    policy_logps: Tensor, ref_logps: Tensor, is_desirable: Tensor, kl: Tensor, *, beta: float = 0.1,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Losses and rewards [P] of single answers, each good or bad. KTO, Ethayarajh et al. 2024, arXiv:2402.01306:

        good: w_d (1 - s(beta (r - z)))        bad: w_u (1 - s(beta (z - r)))        z = max(0, kl), no gradient

    policy_logps, ref_logps: [P]. is_desirable: bool [P]. kl: a scalar, the mean log-ratio of answers that belong to other
    prompts, over the whole batch. The rewards, beta r, are detached.
    """
    r, z = policy_logps - ref_logps, kl.detach().clamp(min=0)
    good, bad = 1 - (beta * (r - z)).sigmoid(), 1 - (beta * (z - r)).sigmoid()
    return (desirable_weight * good).where(is_desirable, undesirable_weight * bad), beta * r.detach()


def wpo_weights(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_log_sums: Tensor, rejected_log_sums: Tensor,
    chosen_length: Tensor, rejected_length: Tensor,
) -> Tensor:  # fmt: skip
    """How likely the pair is under the policy, [P], to multiply its loss with: off-policy answers count less.

    The mean over an answer's tokens of log p(y_t) - log sum_v p(v)^2, exponentiated, of both answers. log_sums [P]: the sums
    of log sum_v p(v)^2 over the tokens. Detached. WPO, Zhou et al. 2024, arXiv:2406.11827 eq. 2.
    """
    chosen, rejected = (
        (chosen_logps - chosen_log_sums) / chosen_length,
        (rejected_logps - rejected_log_sums) / rejected_length,
    )
    return (chosen + rejected).detach().exp()


def ld_weights(position: Tensor, shared_length: Tensor, ld_alpha: float) -> Tensor:
    """The weight of each token's log-probability, [M]: 1 within the length that both answers have, ld_alpha beyond.

    position: of the token in its answer, from 0, int [M]. shared_length: the shorter answer's length, int [M].
    LD-DPO, Liu et al. 2024, arXiv:2409.06411.
    """
    is_shared = position < shared_length
    return is_shared.float().masked_fill(~is_shared, ld_alpha)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0, without cancellation at either end; x = 0, which is rounded, counts as -1e-7."""
    near, far = x.clamp(max=-1e-7), x.clamp(max=-math.log(2))  # each finite, and its gradient, where the other is taken
    return (-near.expm1()).log().where(x > -math.log(2), (-far.exp()).log1p())
