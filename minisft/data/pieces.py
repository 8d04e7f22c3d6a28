"""Context parallelism, the host's half: a batch whose documents are split over several ranks.

    piece      0 1 2 3 4 5 6 7      the stream of T tokens in 2 W equal pieces, here W = 4 ranks
    rank       0 1 2 3 3 2 1 0

A late token of a long document attends to more keys than an early one. So each rank has an early piece and a late one, and all
of them have about the same work. `start` and `end` stay indices into the whole stream, so windows, shared prompts and
documents that end inside of a piece need no further thought. model/context.py has the other half.
"""

from dataclasses import replace

import torch

from minisft.data.batch import IGNORE_INDEX, Batch

ROUND_TO = 64  # targets of a piece are filled up to a multiple, as those of a batch


def pieces_of(index: int, count: int) -> tuple[int, int]:
    """The two pieces of rank `index` of `count`."""
    return index, 2 * count - 1 - index


def take_pieces(batch: Batch, index: int, count: int) -> Batch:
    """The tokens of rank `index` of `count`, with the targets that are scored from them. T is a multiple of 2 count.

    `end` is that of all tokens, since a query may see all keys; the weights of all ranks' targets add up to those of the batch.
    Answers keep their length: that of the whole answer.
    """
    num_all, answers = len(batch.input_ids), batch.answers
    mine = torch.arange(num_all).chunk(2 * count)
    mine = torch.cat([mine[piece] for piece in pieces_of(index, count)])  # [t]
    place = torch.full((num_all,), -1)
    place[mine] = torch.arange(len(mine))
    rows = place[batch.loss_rows[: batch.num_targets]]  # [M] without the filler
    kept = (rows >= 0).nonzero().flatten()
    num_targets = len(kept)
    num_filler = ROUND_TO if num_targets == 0 else -num_targets % ROUND_TO

    def of_targets(values: torch.Tensor, value_of_filler: int) -> torch.Tensor:  # [..., M]
        filler = values.new_full((*values.shape[:-1], num_filler), value_of_filler)
        return torch.cat([values[..., kept], filler], -1)

    weights = torch.ones(batch.num_targets) if batch.row_weights is None else batch.row_weights
    weights = of_targets(weights, 0)
    if answers is not None:
        row_answer = of_targets(answers.row_answer, len(answers.role))
        role = answers.role[row_answer[:num_targets]]
        counts = tuple(int((role == r).sum()) for r in range(len(answers.num_targets)))
        answers = replace(answers, row_answer=row_answer, num_targets=counts)
    return replace(
        batch,
        input_ids=batch.input_ids[mine],
        position_ids=batch.position_ids[mine],
        start=batch.start[mine],
        loss_rows=of_targets(rows, 0),
        targets=of_targets(batch.targets, IGNORE_INDEX),
        row_weights=weights if num_filler or batch.row_weights is not None else None,
        row_parts=of_targets(batch.row_parts, 0),
        row_kind=of_targets(batch.row_kind, 0),
        row_source=of_targets(batch.row_source, 0),
        row_document=of_targets(batch.row_document, -1),
        row_place=of_targets(torch.arange(batch.num_targets), batch.num_targets),
        all_documents=batch.row_document[: batch.num_targets],
        labels=batch.labels[mine],
        num_tokens=int((mine < batch.num_tokens).sum()),
        num_targets=num_targets,
        total_weight=weights.double().sum().item(),
        part_sizes=tuple(batch.row_parts[:, kept].sum(1).tolist()),
        answers=answers,
    )
