"""The loader: batches say what a plain per-document computation says, and their order is a pure function."""

import json
import threading
from collections import Counter
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minisft.data.batch import ALIGNMENT, FOR_THE_DEVICE, IGNORE_INDEX
from minisft.data.cache import Documents, build_cache
from minisft.data.documents import select_documents
from minisft.data.kinds import ANSWER, CHOSEN, REJECTED, TERMINATOR, TRAINED, USER
from minisft.data.loader import Loader, make_batch
from minisft.data.packing import pack, plan
from minisft.data.packing_strategies import STRATEGIES
from minisft.data.sources import Source
from minisft.data.tokenizer import train_tokenizer


def make_documents(num_documents=60, longest=24, weighted=False, seed=0):
    """Random documents in the cache's layout. Some of its documents are selected, some of these cut short."""
    rng = np.random.default_rng(seed)
    in_cache = 2 * num_documents
    offsets = np.concatenate([[0], np.cumsum(rng.integers(1, longest + 1, in_cache))])
    total = offsets[-1]
    cache = SimpleNamespace(
        ids=np.arange(1000, 1000 + total, dtype=np.uint32),  # every token is unique, so a stray one shows
        kinds=rng.choice(np.array([USER, ANSWER, ANSWER | TRAINED], dtype=np.uint8), total),
        offsets=offsets,
        source=rng.integers(0, 3, in_cache).astype(np.int32),
        weights=rng.random(total).astype(np.float32) if weighted else None,
        role=None,
        group=1,
        fingerprint="0123456789abcdef" * 4,
        sources=(),
    )
    index = rng.permutation(in_cache)[:num_documents]
    start = offsets[index]
    end = np.maximum(start + 1, offsets[index + 1] - rng.integers(0, 3, num_documents))
    return Documents(cache, index, start, end)


def naive_rows(documents, packs, pack_numbers):
    """The targets of these packs, one token at a time: (row, target, weight, kind, source, document)."""
    cache, rows, t = documents.cache, [], 0
    for number in pack_numbers:
        for d, start, end in packs.tolist()[number]:
            for j in range(start, end):
                at = documents.start[d] + j
                if j > start and cache.kinds[at] & TRAINED:
                    weight = 1.0 if cache.weights is None else float(cache.weights[at])
                    document = documents.index[d]
                    rows.append(
                        (t - 1, cache.ids[at], weight, cache.kinds[at] & 0x7F, cache.source[document], document)
                    )
                t += 1
    return rows


def rows_of(batch, only_real=True):
    weights = torch.ones(len(batch.targets)) if batch.row_weights is None else batch.row_weights
    columns = batch.loss_rows, batch.targets, weights, batch.row_kind, batch.row_source, batch.row_document
    rows = list(zip(*(column.tolist() for column in columns)))
    return rows[: batch.num_targets] if only_real else rows


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("round_to", [1, 64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_batch_is_what_a_loop_over_documents_makes(strategy, round_to, weighted):
    documents = make_documents(weighted=weighted)
    packs = pack(documents.lengths, 16, strategy, seed=1)
    numbers = [3, 0, len(packs) - 1]
    batch = make_batch(documents, packs, numbers, round_to=round_to)

    pieces = [piece for number in numbers for piece in packs.tolist()[number]]
    tokens = [t for d, start, end in pieces for t in range(documents.start[d] + start, documents.start[d] + end)]
    assert batch.num_tokens == len(tokens)
    assert batch.input_ids[: len(tokens)].tolist() == documents.cache.ids[tokens].tolist()

    # Layout: pieces, then filler of one-token documents.
    num_tokens = -(-len(tokens) // round_to) * round_to
    lengths = [end - start for _, start, end in pieces] + [1] * (num_tokens - len(tokens))
    bounds = [0, *np.cumsum(lengths).tolist()]
    assert batch.cu_seqlens.tolist() == bounds and batch.max_seqlen == max(lengths)
    assert batch.position_ids.tolist() == [j for n in lengths for j in range(n)]
    assert batch.start.tolist() == [a for a, n in zip(bounds, lengths) for _ in range(n)]
    assert batch.end.tolist() == [a + n for a, n in zip(bounds, lengths) for _ in range(n)]

    # Targets.
    expected = naive_rows(documents, packs, numbers)
    assert batch.num_targets == len(expected) > 0
    assert rows_of(batch) == expected
    labels = [IGNORE_INDEX] * num_tokens
    for row, target, *_ in expected:
        labels[row + 1] = target
    assert batch.labels.tolist() == labels

    # Filler rows train nothing.
    filler = rows_of(batch, only_real=False)[len(expected) :]
    assert len(batch.targets) % round_to == 0 and len(filler) < round_to
    assert filler == [(0, IGNORE_INDEX, 0.0, 0, 0, -1)] * len(filler)
    assert (batch.row_weights is None) == (not weighted and not filler)


def test_dtypes():
    batch = make_batch(make_documents(weighted=True), pack(make_documents().lengths, 16, "bfd"), [0], round_to=8)
    assert batch.input_ids.dtype == batch.loss_rows.dtype == batch.targets.dtype == batch.labels.dtype == torch.int64
    assert batch.position_ids.dtype == batch.start.dtype == batch.end.dtype == batch.cu_seqlens.dtype == torch.int32
    assert batch.row_weights.dtype == torch.float32 and batch.row_kind.dtype == torch.uint8
    assert batch.row_source.dtype == torch.int32 and batch.row_document.dtype == torch.int64


@pytest.mark.parametrize("strategy", ["bfd", "ffd"])
def test_packing_keeps_every_target(strategy):
    documents = make_documents()

    def targets(strategy):
        loader = Loader(documents, plan(documents.lengths, 24, strategy), batch_size=3)
        batches = [batch for s in range(loader.steps_per_epoch) for batch in loader.step(0, s)]
        return Counter(row[1:] for batch in batches for row in rows_of(batch))

    assert targets(strategy) == targets("none")


def test_a_cut_costs_the_target_behind_it_and_no_other():
    documents = make_documents(num_documents=1, longest=1)
    cache = documents.cache
    cache.ids, cache.kinds = np.arange(10, dtype=np.uint32), np.full(10, ANSWER | TRAINED, dtype=np.uint8)
    documents = replace(documents, start=np.array([0]), end=np.array([10]))
    for strategy in ("bfd_split", "wrapped"):
        packs = pack(documents.lengths, 4, strategy)
        assert [make_batch(documents, packs, [i]).targets.tolist() for i in range(3)] == [[1, 2, 3], [5, 6, 7], [9]]


def stream(documents, world_size, accumulation, *, batch_size=2, epoch=0, **options):
    """For each step, the real tokens of all ranks together, sorted: tokens are unique, so this is the content."""
    made = plan(documents.lengths, 24, "bfd")
    ranks = [
        Loader(documents, made, batch_size, accumulation, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    steps = []
    for s in range(ranks[0].steps_per_epoch):
        batches = [rank.step(epoch, s) for rank in ranks]
        assert len({len(of_rank) for of_rank in batches}) == 1  # the collectives of all ranks match
        steps.append(sorted(t for of_rank in batches for b in of_rank for t in b.input_ids[: b.num_tokens].tolist()))
    return steps


def test_order_is_the_same_for_any_number_of_ranks_and_micro_batches():
    documents = make_documents()
    expected = stream(documents, 1, 4)
    num_packs = plan(documents.lengths, 24, "bfd").num_packs
    assert num_packs % 8 != 0 and len(expected) == -(-num_packs // 8)  # the last window is a partial one
    for world_size, accumulation in ((2, 2), (4, 1)):
        assert stream(documents, world_size, accumulation) == expected
    assert stream(documents, 1, 8, batch_size=1) == stream(documents, 8, 1, batch_size=1) == expected


def test_every_document_comes_once_an_epoch_and_epochs_differ():
    documents = make_documents()
    everything = sorted(1000 + t for a, b in zip(documents.start, documents.end) for t in range(a, b))
    epochs = [stream(documents, 2, 2, epoch=epoch) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(t for step in epoch for t in step) == everything
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert stream(documents, 2, 2, seed=1) != epochs[0]
    documents.cache.fingerprint = "f" * 64
    assert stream(documents, 2, 2) != epochs[0]


def test_without_shuffling_all_epochs_are_equal():
    documents = make_documents()
    steps = stream(documents, 1, 1, shuffle=False)
    assert steps == stream(documents, 1, 1, shuffle=False, epoch=5, seed=9) != stream(documents, 1, 1)


def test_any_step_can_be_asked_for_alone():
    documents = make_documents()
    made = plan(documents.lengths, 24, "bfd")
    loader = Loader(documents, made, batch_size=2, accumulation=2)
    for epoch in (0, 1):
        for s in range(loader.steps_per_epoch):
            fresh = Loader(documents, made, batch_size=2, accumulation=2)
            for a, b in zip(loader.step(epoch, s), fresh.step(epoch, s), strict=True):
                assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.loss_rows, b.loss_rows)
    first = loader.packs(0)
    assert loader.packs(0) is first  # dealt once
    loader.packs(1)
    assert loader.packs(0) is not first  # memory for one epoch, not for all
    assert loader.packs(0).tolist() == first.tolist()


@pytest.mark.parametrize("round_to", [1, 16])
def test_a_partial_last_step(round_to):
    documents = make_documents(num_documents=11)
    made = plan(documents.lengths, 24, "none")  # 11 packs; a step takes 8, so that 3 are left for 2 x 2 x 2
    ranks = [Loader(documents, made, 2, 2, rank=rank, world_size=2, round_to=round_to) for rank in range(2)]
    assert [loader.steps_per_epoch for loader in ranks] == [2, 2]
    (first,), (second,) = (loader.step(0, 1) for loader in ranks)
    real = [batch.num_tokens for batch in (first, second)]
    lengths = np.diff([ranks[0].packs(0).start, ranks[0].packs(0).end], axis=0)[0]
    assert real == [lengths[8:10].sum(), lengths[10:].sum()]

    alone = Loader(documents, plan(documents.lengths[:9], 24, "none"), 2, 2, rank=1, world_size=2, round_to=round_to)
    (dummy,) = alone.step(0, 1)  # one pack is left, and it is rank 0's
    assert dummy.num_tokens == dummy.num_targets == len(dummy.targets) == 0
    assert len(dummy.input_ids) == round_to and (dummy.labels == IGNORE_INDEX).all()
    assert dummy.cu_seqlens.tolist() == list(range(round_to + 1)) and dummy.max_seqlen == 1


# ---- the way to the device --------------------------------------------------------------------------------------


def tensors_of(batch):
    """{name: tensor} of a batch, with those of its answers; without the buffer."""
    parts = [part for part in (batch, batch.answers) if part is not None]
    values = {f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.name != "buffer"}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


FOR_THE_HOST = {"cu_seqlens", "row_kind", "row_source", "row_document", "labels", "document"}


def batch_with_everything():
    """A batch of pairs that have weights, and cached log-probabilities of the reference."""
    documents = make_documents(weighted=True)
    documents.cache.group, documents.cache.role = 2, np.tile(np.array([CHOSEN, REJECTED], dtype=np.uint8), 60)
    documents = replace(documents, ref_logps=np.arange(120, dtype=np.float32))
    packs = pack(documents.unit_lengths, 64, "bfd")
    batch = make_batch(documents, packs, [0, 1], round_to=8)
    assert set(tensors_of(batch)) - set(FOR_THE_DEVICE) == FOR_THE_HOST
    return batch


class Copies(TorchDispatchMode):
    """Counts the copies to another device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += len({x.device for x in (*args, out) if isinstance(x, torch.Tensor)}) > 1
        return out


@pytest.mark.parametrize("ready", [False, True])
def test_a_batch_goes_to_the_device_in_one_copy(ready):
    batch = batch_with_everything()
    with Copies() as copies:
        moved = (batch.in_one_buffer(pin_memory=False) if ready else batch).to("meta")
    assert copies.count == 1
    for (name, old), new in zip(tensors_of(batch).items(), tensors_of(moved).values(), strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert new.is_meta if name in FOR_THE_DEVICE else new is old


@pytest.mark.parametrize("empty", [False, True])
def test_what_the_device_reads_has_one_buffer_and_the_same_values(empty):
    documents = make_documents()
    batch = make_batch(documents, pack(documents.lengths, 24, "bfd"), []) if empty else batch_with_everything()
    moved = batch.to("cpu").to("cpu")
    for (name, old), new in zip(tensors_of(batch).items(), tensors_of(moved).values(), strict=True):
        assert torch.equal(old, new)
        if name in FOR_THE_DEVICE:
            assert new.untyped_storage().data_ptr() == moved.buffer.data_ptr()
            assert new.storage_offset() * new.itemsize % ALIGNMENT == 0


# ---- one step ahead ---------------------------------------------------------------------------------------------


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def make_loader(**options):
    documents = make_documents()
    return Loader(documents, plan(documents.lengths, 24, "bfd"), batch_size=2, accumulation=2, **options)


@pytest.mark.parametrize("ahead", [False, True])
def test_steps_go_through_the_epochs(ahead):
    loader = make_loader()
    n = loader.steps_per_epoch
    expected = [make_loader().step(*divmod(step, n)) for step in range(n - 1, 2 * n + 1)]
    for one, other in zip(loader.steps(n - 1, 2 * n + 1, ahead=ahead), expected, strict=True):
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(tensors_of(a).values(), tensors_of(b).values(), strict=True))
    assert list(loader.steps(n, n, ahead=ahead)) == [] == loader_threads()


def test_the_loader_is_one_step_ahead_and_no_more(monkeypatch):
    honest, made = Loader.step, [threading.Event() for _ in range(9)]

    def step(self, epoch, s):
        made[s].set()
        return honest(self, epoch, s)

    monkeypatch.setattr(Loader, "step", step)
    steps = make_loader().steps(0, 9, ahead=True)
    for i in range(3):
        next(steps)
        assert made[i + 1].wait(60) and not made[i + 2].is_set()
    assert len(loader_threads()) == 1
    steps.close()
    assert loader_threads() == []


def test_what_goes_wrong_ahead_is_raised_in_its_turn(monkeypatch):
    honest = Loader.step

    def step(self, epoch, s):
        if s == 2:
            raise OSError("the disk is gone")
        return honest(self, epoch, s)

    monkeypatch.setattr(Loader, "step", step)
    steps = make_loader().steps(0, 9, ahead=True)
    next(steps), next(steps)
    with pytest.raises(OSError, match="the disk is gone"):
        next(steps)
    assert loader_threads() == []


def test_a_batch_without_targets():
    documents = make_documents()
    documents.cache.kinds[:] = USER
    batch = make_batch(documents, pack(documents.lengths, 24, "bfd"), [0, 1])
    assert batch.num_tokens > 0 and batch.num_targets == len(batch.loss_rows) == 0 and batch.row_weights is None


def test_the_real_cache_end_to_end(tmp_path):
    rows = [{"prompt": f"say {i} twice: ", "completion": f"{i} {i}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in rows], 300)
    cache = build_cache([Source(str(tmp_path / "data.jsonl"))], tokenizer, cache_dir=tmp_path / "cache")
    documents, accounting = select_documents(cache, max_length=64)
    loader = Loader(documents, plan(documents.lengths, 64, "bfd"), batch_size=2, accumulation=2, round_to=8)
    batches = [batch for s in range(loader.steps_per_epoch) for batch in loader.step(0, s)]

    assert sum(batch.num_tokens for batch in batches) == accounting.tokens_per_epoch
    assert sum(batch.num_targets for batch in batches) == accounting.trained
    answers = {}
    for batch in batches:
        for _, target, _, kind, source, document in rows_of(batch):
            assert source == 0 and kind in (ANSWER, TERMINATOR)
            answers.setdefault(document, []).append(target)
    for document, row in enumerate(rows):
        *answer, terminator = answers[document]
        assert tokenizer.decode(answer) == row["completion"] and terminator == tokenizer.eos_token_id


def test_a_step_outside_the_epoch_is_refused():
    documents = make_documents()
    loader = Loader(documents, plan(documents.lengths, 24, "bfd"), batch_size=2)
    for s in (-1, loader.steps_per_epoch):
        with pytest.raises(AssertionError, match=f"step {s}"):
            loader.step(0, s)
