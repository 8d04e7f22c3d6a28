"""The one layout of a batch: a flat stream of tokens.

A micro-batch is one row of T tokens that holds whole documents side by side. There is no padding matrix and no mask
tensor: `start` and `end` say for every token which keys it sees, and `loss_rows` says which hidden states are scored
against which targets. Everything after the loader reads this and nothing else.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a token that is not trained, as in Hugging Face
ALIGNMENT = 16  # bytes: the widest access of a kernel
# What a model and its loss read. The other tensors are for messages, peers and references, and stay on the host.
FOR_THE_DEVICE = (
    *("input_ids", "position_ids", "start", "end", "loss_rows", "targets", "row_weights", "row_parts"),
    *("row_answer", "role", "length", "weight", "ref_logps", "row_place"),
)


@dataclass(frozen=True)
class Answers:
    """To which answers the targets of preference data belong. Unit u of U has two answers to one prompt, 2u and 2u + 1."""

    row_answer: Tensor  # int64 [M]: the answer of each target; 2U for filler
    role: Tensor  # uint8 [2U]: CHOSEN, REJECTED, MISMATCHED
    length: Tensor  # int64 [2U]: targets of each answer
    document: Tensor  # int64 [2U]: its index in the token cache
    weight: Tensor  # fp32 [U]: of each unit's loss
    ref_logps: Tensor | None  # fp32 [2U]: log-probabilities under the reference, if they were computed before the run
    total_weight: float  # sum of `weight`; this and the counts below are known on the host
    num_answers: tuple[int, ...]  # by role
    num_targets: tuple[int, ...]  # of these answers


@dataclass(frozen=True)
class Batch:
    """One micro-batch of T tokens in N documents with M targets. Made on the host; `to` moves what the device needs of it."""

    input_ids: Tensor  # int64 [T]
    position_ids: Tensor  # int32 [T], from 0 in every document; a piece that shares a beginning continues it
    start: Tensor  # int32 [T]: key k is visible to query q iff start[q] <= k <= q < end[k]
    end: Tensor  # int32 [T]; of a piece (data/pieces.py): of the whole stream, to which the numbers in start and end refer
    # int32 [N+1], 0 first, T last: for the reference and for peers. Documents that share tokens are one.
    cu_seqlens: Tensor
    max_seqlen: int
    loss_rows: Tensor  # int64 [M]: the hidden state of row loss_rows[i] is scored against targets[i]
    targets: Tensor  # int64 [M]
    row_weights: Tensor | None  # fp32 [M]; None = all 1
    row_parts: Tensor  # uint8 [P, M]: 1 where the target belongs to that part of `parts`; filler belongs to none
    row_kind: Tensor  # uint8 [M]: index into kinds.TOKEN_KINDS
    row_source: Tensor  # int32 [M]: index of the data source
    row_document: Tensor  # int64 [M]: index of the document in the token cache
    labels: Tensor  # int64 [T] as in Hugging Face: unshifted, -100 = not trained
    num_tokens: int  # real tokens, without filler
    num_targets: int  # real targets, without filler
    total_weight: float  # sum of row_weights
    parts: tuple[str, ...]  # "all", the kinds of tokens, "first_token", and "source NAME" where there are several
    part_sizes: tuple[int, ...]  # targets of each
    answers: Answers | None = None  # preference data only
    # False: whole documents side by side, where keys are visible to the end of their document: attention need not look
    # for any that ended before. The same for all batches of a set.
    shared: bool = True
    # Of a piece: which of the whole batch's targets each of its own is, int64 [M], their number for filler; and the documents of
    # all of these, int64
    row_place: Tensor | None = None
    all_documents: Tensor | None = None
    buffer: Tensor | None = None  # uint8: the memory of all tensors in FOR_THE_DEVICE, once they have been put together

    @property
    def is_piece(self) -> bool:
        """Whether other ranks have the rest of these documents."""
        return len(self.input_ids) < len(self.end)

    def in_one_buffer(self, pin_memory: bool) -> "Batch":
        """The same batch, with one buffer for all that the device reads. From pinned memory its copy to a GPU does not wait."""
        layout, size = _layout(self)
        batch = self.over(torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory))
        for (_, old), (_, new) in zip(layout.values(), _layout(batch)[0].values()):
            new.copy_(old)
        return batch

    @property
    def row_owners(self) -> Tensor:
        """The document of each loss in the ledger, int64: of each target without filler, or of each pair (its first one); of a
        piece for the whole batch."""
        if self.answers is not None:
            return self.answers.document[0::2]
        return self.row_document[: self.num_targets] if self.all_documents is None else self.all_documents

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch, with all that the device reads on the device: one copy, without a wait. The rest stays on the host."""
        batch = self
        if batch.buffer is None:
            batch = self.in_one_buffer(pin_memory=torch.device(device).type == "cuda")
        assert batch.buffer is not None
        return batch.over(batch.buffer.to(device, non_blocking=True))

    def sums_by_part(self, *values: Tensor) -> Tensor:
        """The sums of some statistics of the targets, [M] each, over each of `parts`: fp64 [P, values], where they are.

        One product of matrices, so that the order of the additions is always the same, and no wait for the device.
        """
        return self.row_parts.double() @ torch.stack(values).double().T

    def shapes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and shapes of the tensors that the device reads: batches with equal ones have the same layout."""
        return tuple((name, tuple(tensor.shape)) for name, (_, tensor) in _layout(self)[0].items())

    def over(self, buffer: Tensor) -> "Batch":
        """The batch with views of this buffer in the place of the tensors that the device reads."""
        layout, _ = _layout(self)
        views = {
            name: buffer[first : first + old.nbytes].view(old.dtype).view(old.shape)
            for name, (first, old) in layout.items()
        }
        answers = self.answers
        if answers is not None:
            answers = replace(answers, **{name: view for name, view in views.items() if hasattr(answers, name)})
        own = {name: view for name, view in views.items() if hasattr(self, name)}
        return replace(self, **own, answers=answers, buffer=buffer)


def _layout(batch: Batch) -> tuple[dict[str, tuple[int, Tensor]], int]:
    """({name: (its first byte in the buffer, tensor)}, size of the buffer), for the tensors that the device reads."""
    layout, size = {}, 0
    for part in (batch, batch.answers):
        for name in FOR_THE_DEVICE:
            if (tensor := getattr(part, name, None)) is not None:
                layout[name] = size, tensor
                size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return layout, size


def document_bounds(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Visibility of whole documents: cu_seqlens int32 [N+1] -> start, end int32 [T].

    Token t of a document that occupies [a, b) gets start a and end b, so that attention is causal inside the document
    and zero across documents. Documents have at least one token.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    start = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=num_tokens)
    end = torch.repeat_interleave(cu_seqlens[1:], lengths, output_size=num_tokens)
    return start.int(), end.int()
