"""Log-probabilities of whole answers, under the policy or the reference. Preference tuning compares them.

    logp(answer) = sum over its tokens of log p(y_t | prompt, y_<t)

One forward pass gives the hidden states of all answers of a batch; the linear cross-entropy gives -log p of each of their
tokens, without a matrix of logits; a sum by answer does the rest.
"""

import torch
from torch import Tensor

from minisft.data.batch import Answers, Batch
from minisft.kernels.linear_cross_entropy import Stats
from minisft.model.decoder import Decoder
from minisft.preference.losses import ld_weights


def answer_logps(
    model: Decoder, batch: Batch, ld_alpha: float | None = None, return_stats: bool | str = False
) -> tuple[Tensor, Stats | None]:
    """log p of every answer, fp32 [2U], and the statistics of the targets [M]."""
    hidden = model(batch.input_ids, batch.position_ids, batch.start, batch.end, shared=batch.shared)  # [T, D]
    result = model.cross_entropy(
        hidden, batch.targets, batch.loss_rows, reduction="none", return_stats=return_stats, add_to_grad=True
    )
    nll, stats = result if return_stats else (result, None)  # [M]
    if ld_alpha is not None:
        nll = nll * token_weights(batch.answers, ld_alpha)
    return sum_by_answer(-nll, model, batch), stats


def sum_by_answer(x: Tensor, model: Decoder, batch: Batch) -> Tensor:
    """[M] -> [2U]: the sums over the targets of each answer, on whatever ranks they are."""
    num_answers = len(batch.answers.role)
    sums = x.new_zeros(num_answers + 1).index_add(0, batch.answers.row_answer, x)[:num_answers]  # the last is filler's
    return model.context.sum(sums) if batch.is_piece else sums


def token_weights(answers: Answers, ld_alpha: float) -> Tensor:
    """`ld_weights` of every target [M]."""
    row_answer = answers.row_answer
    first = torch.cat([answers.length.new_zeros(1), answers.length.cumsum(0)])  # [2U + 1]: where its targets begin
    shared = answers.length.view(-1, 2).amin(1).repeat_interleave(2, output_size=len(answers.length))
    shared = torch.cat([shared, shared.new_zeros(1)])
    position = torch.arange(len(row_answer), device=row_answer.device) - first[row_answer]
    return ld_weights(position, shared[row_answer], ld_alpha)
