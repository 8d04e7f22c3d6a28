"""Preference tuning: raise the policy's probability of the chosen answer over the rejected one, each relative to a reference.

The same two functions as sft.py, `weight` and `loss`. A micro-batch holds pairs, N is the number of pairs of the whole
optimizer step, so that a pair counts the same wherever it is. In preference/, answer_logps.py computes the log-probability of
every answer, reference.py the one under the reference, and losses.py the loss.

    reward(answer) = beta (logp under the policy - logp under the reference)

LD-DPO weighs the tokens of an answer, WPO the pairs. Single answers with a label (KTO) come in units of two as well: the
answer, and another row's answer to the same prompt, whose reward says how far the policy has moved in general.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minisft.data.batch import Answers, Batch
from minisft.data.kinds import CHOSEN, MISMATCHED, REJECTED
from minisft.kernels.linear_cross_entropy import Stats
from minisft.metrics import ROW_LOSSES, Metrics
from minisft.model.decoder import Decoder
from minisft.preference.answer_logps import answer_logps, sum_by_answer
from minisft.preference.losses import LossOptions, kto_loss, make_pairs, mixture, wpo_weights
from minisft.preference.reference import Reference


@dataclass(frozen=True)
class Objective:
    """Which loss, and its options."""

    losses: dict[str, float]  # name -> weight in the mixture
    options: LossOptions
    ld_alpha: float | None = None
    use_weighting: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def weight(batch: Batch) -> float:
    """The number of pairs, or the sum of their weights where rows have one."""
    return batch.answers.total_weight


def loss(
    model: Decoder,
    batch: Batch,
    grad_scale: float | Tensor,
    *,
    objective: Objective,
    reference: Reference | None,
    keep_rows: bool = False,
) -> tuple[Tensor, Metrics]:
    """The weighted sum of the losses of the pairs, and metrics.

    Returns a scalar (fp32) that is not scaled by grad_scale; its gradient is. The metrics are detached. keep_rows: in training,
    the losses of the pairs are among them, as ROW_LOSSES.
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
        lengths = answers.length.to(logps.dtype).view(-1, 2).T  # [2, P]: of the chosen and of the rejected answers
        pairs = make_pairs(logps[0::2], logps[1::2], ref_logps[0::2], ref_logps[1::2], *lengths, o.options)
        losses = mixture(pairs, o.losses, o.options)
        if o.use_weighting:
            log_sums = sum_by_answer(stats.log_sum_sq_probs, model, batch)
            plain = sum_by_answer(-stats.nll, model, batch)  # whatever LD-DPO makes of the tokens
            losses = losses * wpo_weights(plain[0::2], plain[1::2], log_sums[0::2], log_sums[1::2], *lengths)
    total = (losses * answers.weight).sum()
    scaled = total * grad_scale
    with torch.no_grad():
        metrics = {"loss": (total.detach(), answers.total_weight)}
        metrics |= answer_metrics(logps, ref_logps, stats, answers, o, per_token=reference is None)
    if keep_rows and torch.is_grad_enabled():
        metrics[ROW_LOSSES] = losses.detach(), 1.0
    return total.detach() + (scaled - scaled.detach()), metrics


def answer_metrics(
    logps: Tensor, ref_logps: Tensor, stats: Stats, answers: Answers, o: Objective, per_token: bool
) -> Metrics:
    """Metrics by role. A filler batch returns the same names with weight 0, because all ranks must sum the same list.

    per_token: a reward is beta times the mean log-probability of a token, as there is no reference.
    """
    beta = o.options.beta
    rewards = beta * (logps / answers.length if per_token else logps - ref_logps)
    role_of_target = torch.cat([answers.role, answers.role.new_full((1,), MISMATCHED)])[answers.row_answer]  # [M]
    num_answers, num_targets = answers.num_answers, answers.num_targets

    def total(x: Tensor, role: Tensor, wanted: int) -> Tensor:
        return x.where(role == wanted, 0).sum()  # indexing by a mask would wait for the device

    metrics: Metrics = {}
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
