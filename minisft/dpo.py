"""Preference tuning: the policy is to find the chosen answer likelier than the rejected one, by its own measure.

The same two functions as sft.py, `weight` and `loss`. A micro-batch holds pairs, N is the number of pairs of the whole
optimizer step, so that a pair counts the same wherever it is. preference/answer_logps.py gives the log-probability of every answer,
reference.py that under the reference, losses.py the loss.

    reward(answer) = beta (logp under the policy - logp under the reference)

LD-DPO weighs the tokens of an answer, WPO the pairs. Single answers with a label (KTO) come in units of two as well: the
answer, and another row's answer to the same prompt, whose reward says how far the policy has moved in general.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from minisft.data.batch import CHOSEN, MISMATCHED, REJECTED, Answers, Batch
from minisft.kernels.linear_cross_entropy import Stats
from minisft.preference.answer_logps import answer_logps, sum_by_answer
from minisft.preference.losses import LossOptions, dpo_loss, kto_loss, wpo_weights
from minisft.preference.reference import Reference

Pairs = dict[str, tuple[Tensor, float]]


@dataclass(frozen=True)
class Objective:
    """Which loss, and its options."""

    losses: dict[str, float]  # name -> weight in the mixture
    options: LossOptions
    f_divergence: str = "reverse_kl"
    alpha: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def weight(batch: Batch) -> float:
    """The number of pairs, or the sum of their weights where rows have one."""
    return batch.answers.total_weight


def loss(
    model: nn.Module, batch: Batch, grad_scale: float | Tensor, *, objective: Objective, reference: Reference | None
) -> tuple[Tensor, Pairs]:
    """The weighted sum of the losses of the pairs, and what to log as (sum, weight) pairs.

    Returns a scalar (fp32) that is not scaled by grad_scale; its gradient is. The stats are detached.
    """
    answers, o = batch.answers, objective
    # the reference first, while no activations of the policy are in memory
    ref_logps = None if reference is None else reference.logps(model, batch, o.ld_alpha)
    logps, stats = answer_logps(model, batch, o.ld_alpha, return_stats="all")  # [2U]
    ref_logps = torch.zeros_like(logps) if ref_logps is None else ref_logps
    if "kto" in o.losses:
        kl = (logps - ref_logps)[1::2].mean()
        weights = {"desirable_weight": o.desirable_weight, "undesirable_weight": o.undesirable_weight}
        is_desirable = answers.role[0::2] == CHOSEN
        losses, _ = kto_loss(logps[0::2], ref_logps[0::2], is_desirable, kl, beta=o.options.beta, **weights)
    else:
        options = {f.name: getattr(o.options, f.name) for f in fields(o.options)}
        chosen_length, rejected_length = answers.length.to(logps.dtype).view(-1, 2).T
        losses, _, _ = dpo_loss(
            *(logps[0::2], logps[1::2], ref_logps[0::2], ref_logps[1::2]),
            loss_type=o.losses,
            chosen_length=chosen_length,
            rejected_length=rejected_length,
            f_divergence=o.f_divergence,
            alpha=o.alpha,
            **options,
        )
        if o.use_weighting:
            log_sums = sum_by_answer(stats.log_sum_sq_probs, answers)
            plain = sum_by_answer(-stats.nll, answers)  # whatever LD-DPO makes of the tokens
            losses = losses * wpo_weights(
                *(plain[0::2], plain[1::2], log_sums[0::2], log_sums[1::2], chosen_length, rejected_length)
            )
    total = (losses * answers.weight).sum()
    scaled = total * grad_scale
    with torch.no_grad():
        metrics = {"loss": (total.detach(), answers.total_weight)}
        metrics |= answer_metrics(logps, ref_logps, stats, answers, o, per_token=reference is None)
    return total.detach() + (scaled - scaled.detach()), metrics


def answer_metrics(
    logps: Tensor, ref_logps: Tensor, stats: Stats, answers: Answers, o: Objective, per_token: bool
) -> Pairs:
    """What to log of the answers by role: of filler too, as the ranks add up the same names. per_token: without a reference
    a reward is beta times the mean logp of a token."""
    beta = o.options.beta
    rewards = beta * (logps / answers.length if per_token else logps - ref_logps)
    role_of_target = torch.cat([answers.role, answers.role.new_full((1,), MISMATCHED)])[answers.row_answer]  # [M]
    num_answers, num_targets = answers.num_answers, answers.num_targets

    def total(x: Tensor, role: Tensor, wanted: int) -> Tensor:
        return x.where(role == wanted, 0).sum()  # indexing by a mask would wait for the device

    metrics: Pairs = {}
    for role, name in ((CHOSEN, "chosen"), (REJECTED, "rejected")):
        metrics[f"rewards/{name}"] = (total(rewards, answers.role, role), num_answers[role])
        metrics[f"logps/{name}"] = (total(logps, answers.role, role), num_answers[role])
        metrics[f"logits/{name}"] = (total(stats.mean_logit, role_of_target, role), num_targets[role])
    entropies = [total(stats.entropy, role_of_target, role) for role in (CHOSEN, REJECTED)]
    metrics["entropy"] = (sum(entropies), num_targets[CHOSEN] + num_targets[REJECTED])
    metrics["mean_token_accuracy"] = (total(stats.correct, role_of_target, CHOSEN), num_targets[CHOSEN])
    if "kto" in o.losses:
        metrics["kl"] = (rewards[1::2].sum() / beta, num_answers[MISMATCHED])
    else:
        margins = rewards[0::2] - rewards[1::2]
        metrics["rewards/accuracies"] = ((margins > 0).sum(), num_answers[CHOSEN])
        metrics["rewards/margins"] = (margins.sum(), num_answers[CHOSEN])
    return metrics
