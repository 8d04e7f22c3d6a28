"""From packs of documents to batches, in an order that is a pure function.

The packs of step s of epoch e depend on (seed, data fingerprint, e, s) and nothing else. There is no sampler state to
save: a resumed run deals the epoch again and continues with step s. A step is a window of consecutive packs, divided among
the ranks, so its packs are the same whatever the number of ranks and micro-batches, as long as batch_size x accumulation
x world_size is the same.

`make_batch` copies the tokens of its packs out of the memory-mapped cache with one gather and does the shift by index:
a trained token at position j >= 1 of a piece is a target, scored from the row before it. So the first token of a piece
is never a target, and no document predicts its neighbour's first token.

Preference data comes in units of two documents, two answers to one prompt, which are always in the same pack. If they share
the prompt, the pack has one copy of it, and the second answer follows the first:

    prompt | chosen | rejected          positions of rejected restart at the prompt's length

The keys of `chosen` are visible up to its own end only, those of the prompt and of `rejected` up to the end of the pair, so
that each answer sees the prompt and itself. The first token of both answers is scored from the prompt's last row.
The documents of a conversation that is rendered turn by turn are laid out in the same way, as a tree (shared_turns.py).
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minisft.data.batch import IGNORE_INDEX, Answers, Batch, document_bounds
from minisft.data.cache import Documents, TokenCache
from minisft.data.kinds import KIND_MASK, TOKEN_KINDS, TRAINED
from minisft.data.packing import Packs, Plan, plan, ragged_arange
from minisft.data.pieces import take_pieces
from minisft.data.shared_packs import LEAST, folder_of, made_once, packs_of
from minisft.data.shared_turns import share_turns, tree_bounds
from minisft.data.sources import source_names
from minisft.data.stream import Stream

MOST_PIECES = 20_000_000  # of all epochs in which a run looks for its largest micro-batch: a few seconds


def make_batch(documents: Documents, packs: Packs, pack_numbers: Sequence[int], *, round_to: int = 1) -> Batch:
    """The packs with these numbers, side by side: T tokens in N pieces with M targets, on the host.

    T and M are rounded up to a multiple of `round_to`, for fixed shapes. Filler comes last: a filler token (id 0) is a
    document of its own, a filler row has target -100, weight 0 and document -1, and num_tokens and num_targets do not
    count them. An empty list of packs makes a batch of filler, which trains nothing.
    """
    cache = documents.cache
    document, skipped, first_position, lengths = _pieces(documents, packs, pack_numbers)
    num_documents, num_tokens = len(lengths), int(lengths.sum())
    filler = np.zeros(-num_tokens % round_to if num_tokens else round_to, dtype=np.int64)

    # The tokens: one gather.
    token = ragged_arange(documents.start[document] + skipped, lengths)  # where they are in the cache
    ids = np.concatenate([cache.ids[token], filler]).astype(np.int64)  # [T]
    kinds = np.concatenate([cache.kinds[token], filler]).astype(np.uint8)  # [T]
    lengths = np.concatenate([lengths, filler + 1])  # [N]
    first_position = np.concatenate([first_position, filler])
    position = ragged_arange(first_position, lengths)  # [T]
    begin = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.repeat(np.arange(len(lengths)), lengths)  # [T]
    cu_seqlens, start, end, parent = _bounds(begin, first_position)

    # The targets: all trained tokens except the first of each piece.
    trained = ((kinds & TRAINED) != 0) & (position > 0)
    at = np.flatnonzero(trained)
    scored_from, of_document = at - 1, owner[at]
    opens = at == begin[of_document]  # the first token of a piece that shares what comes before it
    scored_from[opens] = parent[of_document[opens]]
    num_targets = len(at)
    index = documents.index[document[of_document]]
    weights = None if cache.weights is None else cache.weights[token[at]]
    filler = -num_targets % round_to
    answers = None
    if documents.group > 1:
        answers = _answers(documents, document, np.append(of_document, np.full(filler, num_documents)), weights)
    if filler and weights is None:
        weights = np.ones(num_targets)

    def rows(values, value_of_filler, dtype):  # [M]
        return torch.from_numpy(np.append(values, np.full(filler, value_of_filler)).astype(dtype))

    row_weights = None if weights is None else rows(weights, 0, np.float32)
    parts, row_parts = _parts(cache, scored_from, kinds[at] & KIND_MASK, index)
    return Batch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(position.astype(np.int32)),
        start=start,
        end=end,
        cu_seqlens=cu_seqlens,
        max_seqlen=int(cu_seqlens.diff().max()),
        loss_rows=rows(scored_from, 0, np.int64),
        targets=rows(ids[at], IGNORE_INDEX, np.int64),
        row_weights=row_weights,
        row_parts=torch.from_numpy(np.pad(row_parts, ((0, 0), (0, filler))).astype(np.uint8)),
        row_kind=rows(kinds[at] & KIND_MASK, 0, np.uint8),
        row_source=rows(cache.source[index], 0, np.int32),
        row_document=rows(index, -1, np.int64),
        labels=torch.from_numpy(np.where(trained, ids, IGNORE_INDEX)),
        num_tokens=num_tokens,
        num_targets=num_targets,
        total_weight=float(num_targets) if row_weights is None else row_weights.double().sum().item(),
        parts=parts,
        part_sizes=tuple(row_parts.sum(1).tolist()),
        answers=answers,
        shared=documents.shared is not None or documents.turns is not None,
    )


def _pieces(
    documents: Documents, packs: Packs, pack_numbers: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(document, skipped, first_position, length), int [N] each: the pieces of these packs.

    A piece is `length` tokens of documents.index[document], after the first `skipped`; their positions start at
    first_position.
    """
    numbers = np.asarray(pack_numbers, dtype=np.int64)
    first = packs.offsets[numbers]
    places = ragged_arange(first, packs.offsets[numbers + 1] - first)
    first, size = documents.pieces_of(packs.document[places])
    document = ragged_arange(first, size)
    first_position = documents.shared_by(document)
    # A unit of one piece may be cut into several.
    cut_at, stop = np.repeat(packs.start[places], size), np.repeat(packs.end[places], size)
    alone = np.repeat(size == 1, size)
    skipped = np.where(alone, cut_at, first_position)
    stop = np.where(alone, stop, documents.end[document] - documents.start[document])
    return document, skipped, first_position, (stop - skipped).astype(np.int64)


def _bounds(begin: np.ndarray, first_position: np.ndarray) -> tuple[Tensor, Tensor, Tensor, np.ndarray]:
    """(cu_seqlens, start, end, parent) of a batch, whose piece i is tokens begin[i] : begin[i + 1] (int [N+1]).

    A piece whose first position is not 0 shares tokens with the piece before it, and is one document with it in cu_seqlens.
    parent [N]: the row before its first token.
    """
    cu_seqlens = torch.from_numpy(begin[np.append(first_position == 0, True)].astype(np.int32))
    start, end = document_bounds(cu_seqlens, int(begin[-1]))
    return cu_seqlens, start, end, tree_bounds(begin, first_position, end.numpy())


def _parts(
    cache: TokenCache, scored_from: np.ndarray, kind: np.ndarray, document: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """(names, bool [P, M]): of which targets statistics are kept apart. scored_from, kind, document: of the M targets.

    A first token opens a stretch of trained tokens: the target before it in the batch is another document's, or not beside it.
    """
    is_first = np.ones(len(kind), dtype=bool)
    is_first[1:] = (np.diff(scored_from) != 1) | (np.diff(document) != 0)
    labels = source_names([source.label for source in cache.sources])
    names = list(dict.fromkeys(labels)) if len(labels) > 1 else []
    number = np.array([names.index(label) for label in labels]) if names else np.empty(0, dtype=int)
    rows = [
        np.ones((1, len(kind)), dtype=bool),
        kind == np.arange(len(TOKEN_KINDS))[:, None],
        is_first[None],
        number[cache.source[document]] == np.arange(len(names))[:, None] if names else np.empty((0, len(kind)), bool),
    ]
    return ("all", *TOKEN_KINDS, "first_token", *(f"source {name}" for name in names)), np.concatenate(rows)


def _answers(documents: Documents, document: np.ndarray, row_answer: np.ndarray, weights: np.ndarray | None) -> Answers:
    """The `Answers` of a batch. document [2U]: index into `documents`; row_answer [M]: 2U for filler; weights: of the targets
    without filler, None = all 1."""
    assert documents.cache.role is not None
    index = documents.index[document]
    role = documents.cache.role[index]
    length = np.bincount(row_answer, minlength=len(index) + 1)[:-1]
    of_unit = np.ones(len(index) // 2)
    if weights is not None:  # the mean weight of the first answer's targets
        sums = np.bincount(row_answer[: len(weights)], weights=weights, minlength=len(index))
        of_unit = sums[::2] / length[::2]
    roles = range(3)
    return Answers(
        row_answer=torch.from_numpy(row_answer.astype(np.int64)),
        role=torch.from_numpy(role.astype(np.uint8)),
        length=torch.from_numpy(length),
        document=torch.from_numpy(index),
        weight=torch.from_numpy(of_unit.astype(np.float32)),
        ref_logps=None if documents.ref_logps is None else torch.from_numpy(documents.ref_logps[index]),
        total_weight=float(of_unit.sum()),
        num_answers=tuple(int((role == r).sum()) for r in roles),
        num_targets=tuple(int(length[role == r].sum()) for r in roles),
    )


def plan_set(
    documents: Documents,
    *,
    strategy: str,
    max_length: int | None,
    share_prompt: bool = False,
    longest_tree: int | None = 0,
    share_in: Path | None = None,
) -> tuple[Documents, Plan]:
    """(documents, plan): how the documents of a set share packs. They get `shared` if pairs share their prompts, or `turns` if
    the documents of a conversation share their beginnings.

    They are cut already (documents.py). strategy: a key of packing_strategies.STRATEGIES; "none" makes a pack of each unit.
    max_length: the limit of a prompt with one answer, so a pack of pairs has room for two of these; None = room for the
    longest unit. longest_tree: the most tokens of a conversation's documents together; None = no limit, 0 = they share nothing.
    share_in: a folder by which the processes of a machine share the plan of very many documents (shared_packs.py).
    """
    if share_prompt and documents.group > 1 and documents.shared is None:
        documents = replace(documents, shared=shared_prompts(documents))
    if longest_tree != 0:
        limits = [limit for limit in (max_length, longest_tree) if limit is not None]
        documents = share_turns(documents, min(limits, default=None))
    lengths = documents.unit_lengths
    capacity = documents.group * max_length if max_length else int(lengths.max())
    if share_in is None or len(lengths) < LEAST:
        return documents, plan(lengths, capacity, strategy)
    folder = folder_of(share_in, lengths, capacity, strategy)
    return documents, made_once(folder, partial(plan, lengths, capacity, strategy), Plan)


def shared_prompts(documents: Documents) -> np.ndarray:
    """The length of each pair's prompt, int64 [U]: the tokens with which both documents begin and that neither trains."""
    cache, shared = documents.cache, np.zeros(documents.num_units, dtype=np.int64)
    lengths = documents.lengths.reshape(-1, 2).min(1).tolist()
    for unit, ((a, b), length) in enumerate(zip(documents.start.reshape(-1, 2).tolist(), lengths)):
        one, other = slice(a, a + length), slice(b, b + length)
        differs = (cache.ids[one] != cache.ids[other]) | ((cache.kinds[one] | cache.kinds[other]) >= TRAINED)
        shared[unit] = differs.argmax() if differs.any() else 0
    return shared


@dataclass(frozen=True)
class Largest:
    """A micro-batch of a run, and what it will hold."""

    step: int  # counted over all epochs
    packs: Packs  # of its epoch
    numbers: range  # of its packs
    num_tokens: int
    num_targets: int  # about, where packing cuts documents


@dataclass(eq=False)
class Loader:
    """The batches of one rank. An optimizer step has batch_size * accumulation * world_size packs over all ranks.

    Ranks that share their batches count as one in `rank` and `world_size`.
    """

    documents: Documents
    plan: Plan  # of documents.unit_lengths
    batch_size: int  # packs in a micro-batch
    accumulation: int = 1  # micro-batches of one rank in a step
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    context: tuple[int, int] = (0, 1)  # (i, n): this rank is number i of n that share each batch, and has a piece of it
    shuffle: bool = True  # False: the same order in every epoch, for evaluation
    round_to: int = 1
    stream: Stream | None = None  # where documents and plan are those of a chunk
    first_step: int = 0  # of the run, that this chunk had
    micro_batch_size: int | None = field(default=None, init=False)  # smaller than batch_size once memory ran out
    _dealt: dict[int, Packs] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def packs_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.plan.num_packs / self.packs_per_step)

    def num_packs(self, s: int) -> int:
        """Packs of step s over all ranks: packs_per_step, or the rest in the last step of an epoch."""
        return min(self.packs_per_step, self.plan.num_packs - s * self.packs_per_step)

    def at(self, step: int) -> tuple[int, int]:
        """(epoch, step in it) of a step of the run. In a stream it is one of this chunk, whose number is its epoch."""
        if self.stream is not None:
            return self.stream.number, step - self.first_step
        return divmod(step, self.steps_per_epoch)

    def epoch(self, step: int) -> dict[str, int | float]:
        """For the log: how many epochs `step` steps are, or which chunk of a stream they end in."""
        return {"epoch": step / self.steps_per_epoch} if self.stream is None else self.stream.counts()

    def forget(self) -> None:
        """Call when documents or plan are others."""
        self._dealt.clear()

    def packs(self, epoch: int) -> Packs:
        """The packs of an epoch, dealt once and kept until another epoch is requested."""
        if epoch not in self._dealt:
            data = int(self.documents.cache.fingerprint[:16], 16)
            packs = packs_of(self.plan, (self.seed, data, epoch) if self.shuffle else None)
            self._dealt.clear()
            self._dealt[epoch] = packs
        return self._dealt[epoch]

    def step(self, epoch: int, s: int) -> list[Batch]:
        """This rank's micro-batches of step s: the packs of the step go to the ranks in turn, batch_size at a time.

        A chunk of batch_size packs is a micro-batch, or several with micro_batch_size packs each: the packs of a step, and those
        of a rank, stay the same. The last step of an epoch may have fewer chunks, and a smaller one. All ranks get the same
        number of micro-batches, so that their collectives match: a rank without packs gets filler, which trains nothing.
        """
        assert 0 <= s < self.steps_per_epoch, f"step {s} of {self.steps_per_epoch}"
        first = s * self.packs_per_step
        last = first + self.num_packs(s)
        batches = []
        for chunk in range(first, last, self.batch_size * self.world_size):  # one for every rank
            most = min(self.batch_size, last - chunk)  # packs of the first rank; the others have as many or fewer
            chunk += self.rank * self.batch_size
            for start in range(chunk, chunk + most, self.micro_batch_size or self.batch_size):
                batches.append(self._batch(self.packs(epoch), start, min(chunk + self.batch_size, last)))
        return batches

    def _batch(self, packs: Packs, start: int, end: int) -> Batch:
        """The micro-batch that begins with pack `start` of a chunk that ends before pack `end`; filler if none is left."""
        size = self.micro_batch_size or self.batch_size
        # the filler of smaller micro-batches shrinks with them, down to a few shapes still
        round_to = min(self.round_to, math.ceil(self.round_to * size / self.batch_size / 64) * 64)
        batch = make_batch(
            self.documents, packs, range(start, min(start + size, end)), round_to=round_to * self.context[1]
        )
        return take_pieces(batch, *self.context) if self.context[1] > 1 else batch

    def steps(self, first: int, last: int, *, ahead: bool) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step from `first` to `last` - 1, counted over all epochs or chunks.

        ahead: while the caller works on a step, a thread makes the batches of the next one, in pinned memory if there is a GPU.
        What the thread raises is raised here. It ends when the generator is closed. A micro_batch_size that the caller has
        changed holds from the next step on.
        """

        def make(step: int) -> tuple[int | None, list[Batch]]:
            size, batches = self.micro_batch_size, self.step(*self.at(step))
            return size, [batch.in_one_buffer(torch.cuda.is_available()) for batch in batches] if ahead else batches

        with ThreadPoolExecutor(1, "loader") as thread, closing(self.stream) if self.stream else nullcontext():
            coming = None
            for step in range(first, last):
                if self.stream is not None:
                    self.stream.follow(self, step)
                size, batches = coming.result() if coming else make(step)
                if size != self.micro_batch_size:  # made in advance, before the change
                    _, batches = make(step)
                is_last = (
                    step + 1 == last or self.stream is not None and step + 1 == self.first_step + self.steps_per_epoch
                )
                coming = thread.submit(make, step + 1) if ahead and not is_last else None
                yield batches

    def largest(self, first: int, last: int) -> list[Largest]:
        """The micro-batches of steps `first` to `last` - 1, of any rank, with the most tokens and with the most targets.

        Found from lengths, without a look at a token. Where the passes to come are many, in the first ones of them;
        of a stream in the present chunk.
        """
        if self.stream is not None:
            last = min(last, self.first_step + self.steps_per_epoch)
        epochs = range(self.at(first)[0], self.at(last - 1)[0] + 1)
        found: list[Largest] = []
        # backwards, so that the packs of the first epoch, which are needed next, are those that stay
        for epoch in reversed(epochs[: max(1, MOST_PIECES // len(self.documents))]):
            packs, size = self.packs(epoch), self.micro_batch_size or self.batch_size
            number = np.arange(len(packs))
            starts = number[number % self.batch_size % size == 0]  # of each micro-batch
            tokens, targets = (np.add.reduceat(of_pack, starts) for of_pack in self._sizes(packs))
            step = starts // self.packs_per_step
            step += epoch * self.steps_per_epoch if self.stream is None else self.first_step
            here = np.flatnonzero((first <= step) & (step < last))
            for i in (here[tokens[here].argmax()], here[targets[here].argmax()]):
                end = int(starts[i + 1]) if i + 1 < len(starts) else len(packs)
                numbers = range(int(starts[i]), end)
                found.append(Largest(int(step[i]), packs, numbers, int(tokens[i]), int(targets[i])))
        best = [max(found, key=lambda micro_batch: getattr(micro_batch, key)) for key in ("num_tokens", "num_targets")]
        return best[:1] if best[0].num_targets >= best[1].num_targets else best

    def make(self, micro_batch: Largest) -> Batch:
        """One that `largest` has found."""
        return self._batch(micro_batch.packs, micro_batch.numbers.start, micro_batch.numbers.stop)

    def _sizes(self, packs: Packs) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets) of every pack; [n] each. Of a document that is cut each piece has its share of the targets."""
        tokens = (packs.end - packs.start).astype(np.int64)
        targets = np.zeros(len(tokens))
        if self.documents.num_targets is not None:
            first, _ = self.documents.pieces_of(np.arange(self.documents.num_units))
            of_unit = np.add.reduceat(self.documents.num_targets, first) / self.documents.unit_lengths
            targets = of_unit[packs.document] * tokens
        first = packs.offsets[:-1]
        return np.add.reduceat(tokens, first), np.add.reduceat(targets, first)
