"""Ranks that share each micro-batch (context parallelism, on gloo) are one: losses, gradients, weights."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_ledger import table
from test_parallel import SHARDED, assert_equal, home, run_both  # noqa: F401
from test_ranks import free_port, join
from tiny import logged, settings, start
from tiny_models import CONFIGS, stream, tiny

from minisft import parallel, sft
from minisft.config.load import load
from minisft.data.batch import Answers, Batch
from minisft.data.pieces import pieces_of, take_pieces
from minisft.errors import UserError
from minisft.model.families import from_hf
from minisft.plan.memory import MicroBatch, Place, predict
from minisft.prepare.model import refuse_split_documents
from minisft.prepare.options import ranks_sharing_a_batch

LENGTHS = (70, 7, 41, 30, 40, 4)  # T = 192
ATTENDS = [name for name in CONFIGS if set(from_hf(CONFIGS[name]).mixers) == {"attention"}]


def batch_of(lengths: tuple[int, ...], seed: int = 0, answers: bool = False, weighted: bool = False) -> Batch:
    """Random tokens, two thirds of them targets; without filler."""
    rng, num_tokens = np.random.default_rng(seed), sum(lengths)
    position_ids, begin, end = stream(list(lengths))
    rows = torch.from_numpy(np.flatnonzero(rng.random(num_tokens - 1) < 2 / 3))
    document = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    of_row, count = document[rows], len(rows)
    ids = torch.from_numpy(rng.integers(0, 53, num_tokens))
    weights = torch.from_numpy(rng.random(count).astype(np.float32)) if weighted else None
    role = torch.tensor([0, 1] * (len(lengths) // 2), dtype=torch.uint8)
    length = torch.bincount(of_row, minlength=len(role))
    counts = tuple(int((role[of_row] == r).sum()) for r in range(3)) if answers else ()
    ones = torch.ones(len(role) // 2)
    return Batch(
        input_ids=ids,
        position_ids=position_ids,
        start=begin,
        end=end,
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_rows=rows,
        targets=ids[rows + 1],
        row_weights=weights,
        row_parts=torch.stack([torch.ones(count), of_row % 2]).to(torch.uint8),
        row_kind=torch.zeros(count, dtype=torch.uint8),
        row_source=torch.zeros(count, dtype=torch.int32),
        row_document=of_row,
        labels=ids,
        num_tokens=num_tokens,
        num_targets=count,
        total_weight=float(count) if weights is None else weights.double().sum().item(),
        parts=("all", "odd"),
        part_sizes=(count, int((of_row % 2).sum())),
        answers=Answers(of_row, role, length, torch.arange(len(role)), ones, None, len(ones), (3, 3, 0), counts)
        if answers
        else None,
        shared=False,
    )


# ---- which tokens a rank has --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_every_token_and_every_target_is_on_one_rank(count, weighted):
    whole = batch_of(LENGTHS, answers=True, weighted=weighted)
    pieces = [take_pieces(whole, index, count) for index in range(count)]
    tokens = torch.arange(len(whole.input_ids)).chunk(2 * count)
    found, targets = [], []
    for index, piece in enumerate(pieces):
        mine = torch.cat([tokens[number] for number in pieces_of(index, count)])
        for name in ("input_ids", "position_ids", "start", "labels"):
            assert torch.equal(getattr(piece, name), getattr(whole, name)[mine])
        assert torch.equal(piece.end, whole.end) and piece.is_piece
        found += mine.tolist()
        M = piece.num_targets
        weights = torch.ones(len(piece.targets)) if piece.row_weights is None else piece.row_weights
        assert len(piece.targets) % 64 == 0 and (weights[M:] == 0).all() and (piece.row_document[M:] == -1).all()
        assert piece.part_sizes == tuple(piece.row_parts.sum(1).tolist()) and not piece.row_parts[:, M:].any()
        assert piece.total_weight == pytest.approx(weights.sum().item())
        rows = mine[piece.loss_rows[:M]].tolist()
        targets += list(zip(rows, piece.targets[:M].tolist(), piece.row_document[:M].tolist(), weights[:M].tolist()))
    assert sorted(found) == list(range(len(whole.input_ids)))
    weights = torch.ones(whole.num_targets) if whole.row_weights is None else whole.row_weights
    expected = zip(*(values.tolist() for values in (whole.loss_rows, whole.targets, whole.row_document, weights)))
    assert sorted(targets) == sorted(expected)
    for name in ("num_tokens", "num_targets", "total_weight"):
        assert sum(getattr(piece, name) for piece in pieces) == pytest.approx(getattr(whole, name))
    assert tuple(np.sum([piece.part_sizes for piece in pieces], axis=0)) == whole.part_sizes
    by_role = np.sum([piece.answers.num_targets for piece in pieces], axis=0)
    assert tuple(by_role) == whole.answers.num_targets


@pytest.mark.parametrize("count", [2, 4, 16])
def test_ranks_attend_to_equally_many_keys(count):
    """A token of one long document sees all before it."""
    work = [sum(2 * piece + 1 for piece in pieces_of(index, count)) for index in range(count)]
    assert len(set(work)) == 1 and sum(work) == (2 * count) ** 2


# ---- loss and gradients -------------------------------------------------------------------------------------------


def compare(folder: Path, rank: int, count: int, port: int, families: list[str]) -> None:
    """For a process of its own. The largest relative difference between a whole batch and a split one, of every family."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(count)}
    dist.init_process_group("gloo")
    found = {}
    cases = [(name, CONFIGS[name], LENGTHS, False) for name in families]
    cases += [("one document", CONFIGS["llama"], (192,), False), ("again", CONFIGS["llama"], LENGTHS, True)]
    for name, config, lengths, again in cases:
        model, batch = tiny(config).double(), batch_of(lengths, weighted=name == "qwen3")
        model.gradient_checkpointing = again
        values = []
        for split in (False, True):
            if split:
                parallel.split_documents(model, torch.device("cpu"), count)
                batch = take_pieces(batch, rank, count)
            model.zero_grad()
            total, _ = sft.loss(model.train(again), batch, 1 / 100)  # else without dropout
            total.backward()
            summed = [total.detach().double(), *(p.grad.clone() for p in model.parameters())]
            if split:
                for x in summed:
                    dist.all_reduce(x)
            values.append(summed)
        # a bias of keys has no gradient but rounding
        least = 1e-6 * max(x.norm().item() for x in values[0])
        found[name] = max((b - a).norm().item() / max(a.norm().item(), least) for a, b in zip(*values))
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "count, families", [(2, ["gemma2", "gpt2", "qwen3"]), pytest.param(4, ATTENDS, marks=pytest.mark.slow)]
)
def test_losses_and_gradients_of_split_documents_are_those_of_whole_ones(tmp_path, count, families):
    """Every family whose layers attend, in fp64: windows, soft caps, norms of heads, learned positions; checkpointing."""
    port = free_port()
    processes = [start(compare, tmp_path, rank, count, port, families) for rank in range(count)]
    assert join(processes, 120) == (0,) * count
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(families) + 2
    assert max(found.values()) <= 1e-12, found  # fp64, and sums of some hundred numbers


# ---- runs ---------------------------------------------------------------------------------------------------------

DDP = {"parallel.strategy": "ddp"}
PAIRS = {"trainer_type": "dpo", "dpo.use_weighting": True, **DDP}
CASES = {
    "packed": {"data.packing": True, "train.gradient_accumulation_steps": 2, "log.ledger": True},
    "pairs": PAIRS | {"log.ledger": True},
}
MORE_CASES = {
    "shared prompts": PAIRS | {"dpo.share_prompt": True} | SHARDED,
    "cached reference": PAIRS | {"dpo.precompute_ref_log_probs": True},
    "labels": PAIRS | {"dpo.use_weighting": False, "dpo.loss_type": ["kto"]},
    "LoRA": {"model.config": None, "lora.r": 4},
    "again": {"model.gradient_checkpointing": True},
}
# KTO's distance is a mean over a micro-batch, which has other answers with two groups of ranks than with one
ALL_CASES = {name: keys for name, keys in (CASES | MORE_CASES).items() if name != "labels"}


@pytest.mark.parametrize(
    "cases, count",
    [
        (CASES, 2),
        pytest.param(MORE_CASES, 2, marks=pytest.mark.slow),
        pytest.param(ALL_CASES, 4, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_their_batches_are_one(home, tmp_path, cases, count):  # noqa: F811
    """Evaluation included. With 4 ranks there are two groups, which share nothing but gradients."""
    rows = {"train.per_device_train_batch_size": 4}
    all_keys = {}
    for name, keys in cases.items():
        data = home / ("pairs.jsonl" if keys.get("trainer_type") == "dpo" else "rows.jsonl")
        base = {"model.model_name_or_path": str(home / "base" / "model")} if "lora.r" in keys else {}
        base |= {"data.train_data": str(data), "data.eval_data": f"{data}[:9]", "evaluate.eval_steps": 4}
        all_keys[name] = base | keys | {"parallel.context_parallel": 2, "train.per_device_train_batch_size": 2 * count}
    run_both(home, tmp_path, all_keys, rows, count)
    for name in cases:
        one, several = tmp_path / name / "one", tmp_path / name / "several"
        assert_equal(one.parent)
        for metric in ("rewards/margins", "logps/chosen", "logits/chosen", "entropy", "mean_token_accuracy"):
            assert logged(several, metric) == pytest.approx(logged(one, metric), rel=1e-4, abs=1e-6), (name, metric)
        if cases[name].get("log.ledger"):
            whole, found = table(one), table(several)
            assert found.keys() == whole.keys() and len(list(several.glob("ledger-rank-*.bin"))) == count // 2
            assert all(found[key] == pytest.approx(whole[key], rel=1e-3) for key in whole)  # as in tests/test_ledger.py
        assert f"{count // 2} groups of 2 ranks" in (several / "said-0").read_text()


# ---- what is refused, and predicted -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, others",
    [
        ("train.neftune_noise_alpha", 5.0, {}),
        ("train.loss_normalization", "micro_batch", {}),
        ("train.cuda_graph", True, {}),
        ("train.on_oom", "split", {}),
        ("dpo.ld_alpha", 0.5, {"trainer_type": "dpo"}),
    ],
)
def test_what_split_documents_cannot_do_is_refused_by_name(home, key, value, others):  # noqa: F811
    keys = settings(home, **others, **{key: value})
    load({}, keys, origin="test")
    with pytest.raises(UserError, match=rf"parallel\.context_parallel = 2 .* and {key} = "):
        load({}, keys | {"parallel.context_parallel": 2}, origin="test")


def test_models_and_numbers_of_ranks_that_cannot_share_are_refused(home):  # noqa: F811
    for family, word in (("lfm2", "conv"), ("qwen3_5_text", "delta"), ("gpt2", "dropout")):
        with pytest.raises(UserError, match=word):
            refuse_split_documents(from_hf(CONFIGS[family]))
    refuse_split_documents(from_hf(CONFIGS["gemma2"]))
    config, _ = load({}, settings(home, **{"parallel.context_parallel": 2}), origin="test")
    assert [ranks_sharing_a_batch(config, number) for number in (1, 2, 4)] == [1, 2, 2]
    with pytest.raises(UserError, match="context_parallel = 2 on 3 ranks"):
        ranks_sharing_a_batch(config, 3)


def test_the_plan_counts_the_tokens_of_a_rank_and_the_keys_of_all(home):  # noqa: F811
    shape = from_hf(CONFIGS["llama"] | {"num_hidden_layers": 4, "max_position_embeddings": 2**20})
    activations = []
    for sharing in (1, 2, 4):
        config, _ = load({}, settings(home, **{"parallel.context_parallel": sharing}), origin="test")
        memory = predict(config, shape, MicroBatch(2**18, 2**18), Place(True, ranks=4, precision="bf16"))
        activations.append(memory.parts["activations"])
    one, two, four = activations
    keys_and_values = 4 * 2**18 * 2 * 2 * shape.num_kv_heads * shape.head_dim  # bf16, of all tokens, in every layer
    # each halving takes a half of what depends on the rank's own tokens
    assert two - one / 2 == pytest.approx(keys_and_values / 2)
    assert four - one / 4 == pytest.approx(keys_and_values * 3 / 4)
