"""Documents of a conversation as a tree: what is trained, and its gradients, are those of separate documents."""

import json
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import stop_after
from tiny import MODEL, logged, parts, relative_error, train, weights
from tiny import settings as run_settings
from tiny_models import SIZES, tiny
from tolerance import assert_close_to_truth, bounds_of, padded_with_nan

from minisft import sft
from minisft.commands import audit as audit_command
from minisft.config.load import load
from minisft.data.audit_text import text_report
from minisft.data.batch import document_bounds
from minisft.data.cache import Documents
from minisft.data.kinds import ANSWER, REASONING, TRAINED, USER
from minisft.data.loader import Loader, _bounds, make_batch, plan_set
from minisft.data.tokenizer import Tokenizer, train_tokenizer
from minisft.errors import UserError
from minisft.kernels.common import use_backend
from minisft.kernels.flash_attention import flash_attention, flash_attention_ref
from minisft.samples import prompts_of

TEMPLATES = Path(__file__).parent / "templates"


def documents_of(rows: list[list[tuple[list[int], int]]], *, weighted: bool = False, copies: int = 1) -> Documents:
    """Rows of documents (ids, number of trained tokens at the end), in the cache's layout."""
    flat = [(number, ids, trained) for number, row in enumerate(rows) for ids, trained in row]
    offsets = np.cumsum([0, *(len(ids) for _, ids, _ in flat)])
    kinds = [np.full(len(ids), USER, dtype=np.uint8) for _, ids, _ in flat]
    for own, (_, _, trained) in zip(kinds, flat):
        own[len(own) - trained :] = ANSWER | TRAINED
        own[len(own) - trained : len(own) - trained // 2] = REASONING | TRAINED
    cache = SimpleNamespace(
        ids=np.concatenate([ids for _, ids, _ in flat]).astype(np.uint32),
        kinds=np.concatenate(kinds),
        offsets=offsets,
        source=np.zeros(len(flat), dtype=np.int32),
        row=np.array([number for number, _, _ in flat]),
        weights=np.random.default_rng(0).random(offsets[-1]).astype(np.float32) if weighted else None,
        role=None,
        group=1,
        unit="documents",
        fingerprint="0123456789abcdef" * 4,
        sources=(),
    )
    index = np.repeat(np.arange(len(flat)), copies)
    return Documents(cache, index, offsets[index], offsets[index + 1])


def conversation(
    rng: np.random.Generator, turns: int, longest: int = 6, vocab: int = 50
) -> list[tuple[list[int], int]]:
    """The documents of a conversation whose template drops earlier reasoning."""

    def some() -> list[int]:
        return rng.integers(0, vocab, rng.integers(1, longest + 1)).tolist()

    before, documents = some(), []
    for _ in range(turns):
        before = before + some()
        reasoning, answer = some(), some()
        documents.append((before + reasoning + answer, len(reasoning + answer)))
        before = before + answer
    return documents


# Documents with common beginnings of any kind: tokens of two values, and any number of them trained.
DOCUMENT = st.lists(st.integers(0, 1), min_size=2, max_size=9).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids)))
)
ROWS = st.lists(st.lists(DOCUMENT, min_size=1, max_size=5), min_size=1, max_size=4)


def trained_of(batch) -> Counter:
    """The targets with all that decides their loss: ({(tokens that are seen, target, weight, kind, document): number})."""
    ids, start, end = batch.input_ids.tolist(), batch.start.tolist(), batch.end.tolist()
    found = Counter()
    for i, row in enumerate(batch.loss_rows[: batch.num_targets].tolist()):
        seen = [k for k in range(start[row], row + 1) if row < end[k]]
        assert batch.position_ids[seen].tolist() == list(range(len(seen)))  # each is where it is in its own document
        weight = 1.0 if batch.row_weights is None else batch.row_weights[i].item()
        context = tuple(ids[k] for k in seen)
        found[context, batch.targets[i].item(), weight, batch.row_kind[i].item(), batch.row_document[i].item()] += 1
    return found


def batches_of(documents: Documents, strategy: str, max_length: int, longest_tree: int | None, round_to: int = 1):
    units, plan = plan_set(documents, strategy=strategy, max_length=max_length, longest_tree=longest_tree)
    packs = plan.deal((1, 2))
    return units, [make_batch(units, packs, [i], round_to=round_to) for i in range(len(packs))]


@pytest.mark.parametrize("strategy", ["bfd", "ffd", "bfd_split", "none"])
@settings(max_examples=25, deadline=None)
@given(
    rows=ROWS,
    limit=st.one_of(st.none(), st.integers(2, 30)),
    max_length=st.integers(9, 40),
    weighted=st.booleans(),
    copies=st.integers(1, 2),
)
def test_every_target_is_trained_as_in_its_own_document(strategy, rows, limit, max_length, weighted, copies):
    documents = documents_of(rows, weighted=weighted, copies=copies)
    _, alone = batches_of(documents, strategy, max_length, 0)
    units, shared = batches_of(documents, strategy, max_length, limit)
    assert sum(map(trained_of, shared), Counter()) == sum(map(trained_of, alone), Counter())
    assert sum(batch.num_targets for batch in shared) == sum(batch.num_targets for batch in alone)
    assert sum(map(sft.weight, shared)) == pytest.approx(sum(map(sft.weight, alone)), rel=1e-6)  # sums of fp32 weights
    assert sum(batch.num_tokens for batch in shared) == units.unit_lengths.sum() <= documents.lengths.sum()
    assert max(batch.num_tokens for batch in shared) <= max_length
    assert not any(batch.shared for batch in alone) and {batch.shared for batch in shared} == {units.turns is not None}
    assert all(torch.equal(batch.end, document_bounds(batch.cu_seqlens, len(batch.end))[1]) for batch in alone)
    if units.turns is not None and limit is not None:
        _, size = units.pieces_of(np.arange(units.num_units))
        assert (units.unit_lengths[size > 1] <= limit).all()
    if limit is None and max_length == 40 and copies == 1 and not weighted:
        assert units.num_units <= len(documents)


# In fp64, because rounding cannot hide an error there. `tiny` starts with large weights, so that fp32 rounds to 1e-6 in some
# gradients; the runs below hold a model with usual ones to that.
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradients_are_those_of_separate_documents(weighted, backend, dtype, bound):
    rng = np.random.default_rng(1)
    documents = documents_of([conversation(rng, turns) for turns in (1, 3, 6, 2)], weighted=weighted)
    model = tiny("llama").to(dtype).train()
    found = {}
    for longest in (0, None, 40):
        _, batches = batches_of(documents, "bfd", 120, longest, round_to=64)
        model.zero_grad()
        total = 0.0
        with use_backend(backend):
            for batch in batches:
                loss, _ = sft.loss(model, batch, 0.125)
                loss.backward()
                total += loss.item()
        found[longest] = total, {name: p.grad.clone() for name, p in model.named_parameters()}
    for longest in (None, 40):
        assert found[longest][0] == pytest.approx(found[0][0], rel=1e-6)  # the sum is fp32
        for name, grad in found[0][1].items():
            assert relative_error(found[longest][1][name], grad) < bound, name


def test_a_branch_does_not_know_of_another():
    """Other tokens in one answer: hidden states, and gradients of their losses, of all that does not continue it are the
    same bits. A hidden key has the weight 0, and 0 times a finite value added to a sum leaves it as it is."""
    rng = np.random.default_rng(2)
    documents = documents_of([conversation(rng, 5)])
    _, (batch,) = batches_of(documents, "bfd", 200, None)
    model = tiny("llama")
    branch = batch.end == batch.end[batch.loss_rows[0] + 1]  # the first reasoning, which document 2 leaves out
    branch &= batch.end < batch.end.max()
    assert branch.any() and not branch.all()
    others = replace(batch, input_ids=torch.where(branch, (batch.input_ids + 7) % 50, batch.input_ids))
    found = []
    for some in (batch, others):
        x = model.embed_tokens.weight[some.input_ids].detach().requires_grad_()
        hidden = run_from(model, x, some)
        gradient = torch.autograd.grad(hidden[~branch].square().sum(), x)[0]
        found.append((hidden[~branch].detach(), gradient[~branch], gradient[branch]))
    (h, g, inside), (other_h, other_g, _) = found
    assert torch.equal(h, other_h) and torch.equal(g, other_g)
    assert (inside == 0).all()  # and no gradient reaches it


def run_from(model, x, batch):
    """The decoder on embeddings."""
    with torch.no_grad():
        kept = model.embed_tokens
    model.embed_tokens = torch.nn.Module()
    model.embed_tokens.forward = lambda ids: x
    try:
        return model(batch.input_ids, batch.position_ids, batch.start, batch.end)
    finally:
        model.embed_tokens = kept


def test_windows_limit_trees():
    """A tree no longer than the window is seen as a whole, so that it is exact; a longer one would not be."""
    rng = np.random.default_rng(3)
    documents = documents_of([conversation(rng, 6)])
    model = tiny("llama")
    model.config = replace(model.config, windows=(30, None))
    for layer, window in zip(model.layers, model.config.windows):
        layer.self_attn.options["window"] = window
    losses = {}
    for longest in (0, 30, None):
        _, batches = batches_of(documents, "bfd", 200, longest)
        losses[longest] = sum(sft.loss(model, batch, 1.0)[0].item() for batch in batches)
    assert losses[30] == pytest.approx(losses[0], rel=1e-6)
    assert losses[None] != pytest.approx(losses[0], rel=1e-4)


# ------------------------------------------------------------------------------------------------- whole runs


def turn(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def thinking_rows(count: int = 12) -> list[dict]:
    rng = np.random.default_rng(0)

    def words() -> str:
        return "".join(rng.choice(list("abcdefgh "), rng.integers(3, 12))).strip() + "."

    return [
        {
            "messages": [
                message
                for _ in range(1 + i % 4)
                for message in (turn("user", words()), turn("assistant", words(), reasoning_content=words()))
            ]
        }
        for i in range(count)
    ]


def thinking_tokenizer() -> Tokenizer:
    template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8").rstrip("\n")
    names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")
    return train_tokenizer([], 261, special_tokens=names, chat_template=template)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    thinking_tokenizer().save(folder / "tokenizer")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in thinking_rows()))
    return folder


def keys(**overrides):
    return {
        "data.max_length": 400,
        "model.config": MODEL | {"vocab_size": 261, "max_position_embeddings": 512},
        "train.learning_rate": 1e-3,
    } | overrides


def one_epoch(home, **overrides):
    """(sum of the losses of an epoch, gradients, the loader, the summary) of a run before its first step."""
    run, _ = parts(home, **keys(**overrides))
    total, num_tokens = 0.0, 0
    for step in range(run.train.steps_per_epoch):
        for batch in run.train.step(0, step):
            loss, _ = run.loss(run.model, batch, 1e-3)
            loss.backward()
            total, num_tokens = total + loss.item(), num_tokens + batch.num_tokens
    gradients = {name: p.grad for name, p in run.model.named_parameters()}
    return total, gradients, num_tokens, run


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_on_a_template_that_drops_reasoning(home, packing):
    total, gradients, num_tokens, run = one_epoch(home, **{"data.share_turns": False, "data.packing": packing})
    assert run.train.documents.turns is None
    shared = one_epoch(home, **{"data.packing": packing})
    assert shared[0] == pytest.approx(total, rel=1e-6)
    for name, gradient in gradients.items():
        assert relative_error(shared[1][name], gradient) < 1e-6, name  # rounding of fp32 sums in another order
    assert shared[2] < 0.75 * num_tokens
    documents, trees = run.train.documents, shared[3].train.documents
    assert (documents.num_units, trees.num_units) == (30, 12)
    line = f"share what comes before them: {shared[2]:,} tokens an epoch instead of {num_tokens:,}, 30 documents in 12 trees"
    assert any(line in text for text in shared[3].summary)
    rows = "rows: 12 read = 12 used + 0 dropped"
    assert all(any(rows in text for text in some.summary) for some in (run, shared[3]))


def test_reasoning_in_no_answer_but_the_last_changes_nothing_where_turns_are_one_document(home, tmp_path):
    template = (TEMPLATES / "nemotron.jinja").read_text(encoding="utf-8").rstrip("\n")
    rows = thinking_rows()
    for row in rows:
        for message in row["messages"][:-1]:
            message.pop("reasoning_content", None)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data.train_data": str(path), "model.chat_template": template}
    runs = [parts(home, **keys(**options | {"data.share_turns": on}))[0] for on in (True, False)]
    assert runs[0].train.documents.turns is None and runs[0].train.documents.num_units == 12
    assert np.array_equal(runs[0].train.packs(0).document, runs[1].train.packs(0).document)


def test_what_is_cut_and_dropped_is_counted_as_before(home):
    """max_length cuts some documents and drops the targets of others; sources repeat documents one and a half times."""
    for more in (
        {"data.max_length": 60},
        {"data.max_length": 60, "data.truncation": "left"},
        {"data.max_length": 60, "data.packing": True},
    ):
        limits = {"audit.max_cut_answer": 1.0, "audit.max_lost_answer": 1.0, "audit.max_too_long": 1.0}
        source = {"data.train_data": {"path": str(home / "rows.jsonl"), "weight": 1.5}}
        runs = [one_epoch(home, **more | limits | source | {"data.share_turns": on}) for on in ("auto", False)]
        accounts = [[line for line in run[3].summary if "rows:" in line or "tokens:" in line] for run in runs]
        assert accounts[0] == accounts[1] and len(accounts[0]) == 2
        assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
        assert runs[0][3].train.plan.num_packs <= runs[1][3].train.plan.num_packs


def test_resume_is_bitwise_and_with_the_same_trees_only(home, tmp_path, monkeypatch):
    options = keys(**{"output_dir": str(tmp_path / "whole"), "data.packing": True})
    whole = train(home, **options)
    options |= {"output_dir": str(tmp_path / "stopped")}
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        train(home, **options)
    with pytest.raises(UserError, match="packing was bfd of turns that share what comes before them, is bfd"):
        train(home, **options | {"data.share_turns": False})
    resumed = train(home, **options)
    assert weights(resumed.output_dir) == weights(whole.output_dir)
    assert logged(resumed.output_dir) == logged(whole.output_dir)


def test_evaluation_has_the_same_loss(home, tmp_path):
    more = {"data.eval_data": str(home / "rows.jsonl"), "train.max_steps": 1, "evaluate.eval_on_start": True}
    more |= {"data.eval_packing": True}
    losses = []
    for on in (True, False):
        out = str(tmp_path / str(on))
        losses.append(
            logged(train(home, **keys(**more | {"output_dir": out, "data.share_turns": on})).output_dir, "eval_loss")[0]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_where_turns_are_not_shared(home):
    wrapped = {"data.packing": True, "data.packing_strategy": "wrapped"}
    for more in ({"train.neftune_noise_alpha": 5.0}, wrapped):
        assert parts(home, **keys(**more))[0].train.documents.turns is None
        with pytest.raises(UserError, match="data.share_turns = true"):
            parts(home, **keys(**more | {"data.share_turns": True}))
    with pytest.raises(UserError, match="each answer of a pair is one document"):
        load({}, run_settings(home, **{"trainer_type": "dpo", "data.share_turns": True}), origin="test")


def test_a_model_with_states_shares_nothing(home):
    config = SIZES | {"model_type": "lfm2", "vocab_size": 261, "max_position_embeddings": 512, "num_key_value_heads": 2}
    config |= {"layer_types": ["conv", "full_attention"]}
    assert parts(home, **keys(**{"model.config": config}))[0].train.documents.turns is None
    with pytest.raises(UserError, match="a layer of this model has one past"):
        parts(home, **keys(**{"model.config": config, "data.share_turns": True}))


def test_a_model_with_windows_has_short_trees(home):
    config = keys()["model.config"] | {"model_type": "mistral", "sliding_window": 150}
    total, _, _, run = one_epoch(home, **{"model.config": config})
    size = run.train.documents.pieces_of(np.arange(run.train.documents.num_units))[1]
    assert run.train.documents.unit_lengths[size > 1].max() <= 150 and 12 < run.train.documents.num_units < 30
    assert total == pytest.approx(one_epoch(home, **{"model.config": config, "data.share_turns": False})[0], rel=1e-6)


def test_an_audit_shows_the_trees_that_the_run_has(home):
    config, _ = load({}, run_settings(home, **keys(**{"data.packing": True})), origin="test")
    report = audit_command.audit(config)[0]
    run, _ = parts(home, **keys(**{"data.packing": True}))
    packed = report["sets"]["train"]["packing"]["packed"]
    assert (packed["packs"], packed["steps_per_epoch"]) == (run.train.plan.num_packs, run.train.steps_per_epoch)
    assert packed["trees"] == {"number": 12, "tokens": int(run.train.documents.unit_lengths.sum())}
    assert any("12 trees of documents that share" in line for line in text_report(report))


def test_a_plan_of_trees_deals_each_document_once_an_epoch():
    rng = np.random.default_rng(4)
    documents = documents_of([conversation(rng, turns) for turns in (2, 3, 1, 4, 2)], copies=2)
    units, plan = plan_set(documents, strategy="bfd", max_length=120, longest_tree=None)
    loader = Loader(units, plan, batch_size=2, accumulation=2, world_size=1)
    for epoch in (0, 1):
        seen = Counter()
        for step in range(loader.steps_per_epoch):
            for batch in loader.step(epoch, step):
                seen.update(set(zip(batch.row_document[: batch.num_targets].tolist(), batch.loss_rows.tolist())))
        documents_seen = Counter(document for document, _ in seen)
        assert set(documents_seen) == set(range(12))


def tree_of(pieces: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor, list[list[int]], list[int]]:
    """(start, end, the rows of each document, where each piece begins in its document) of a tree of pieces.

    pieces: (new tokens, tokens shared with the piece before it, at most all of its document's).
    """
    positions, documents, begin = [], [], [0]
    for new, common in pieces:
        path = documents[-1][:common] if documents else []
        positions.append(len(path))
        documents.append(path + list(range(begin[-1], begin[-1] + new)))
        begin.append(begin[-1] + new)
    _, start, end, parent = _bounds(np.array(begin), np.array(positions))
    assert [p for p in parent if p >= 0] == [d[n - 1] for d, n in zip(documents, positions) if n]
    return start, end, documents, positions


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=9), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_attention_sees_what_each_document_has_before_it(pieces, seed):
    start, end, documents, positions = tree_of(pieces)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(len(start), heads, 16, dtype=torch.float64) for heads in (2, 1, 1))
    for op in (flash_attention_ref, flash_attention):
        with use_backend("torch"):
            out = op(q, k, v, start, end)
        for path, n in zip(documents, positions):
            alone = flash_attention_ref(q[path], k[path], v[path], *bounds_of([len(path)]))
            assert relative_error(out[path[n:]], alone[n:]) < 1e-14  # a few roundings of fp64


@pytest.mark.usefixtures("triton_kernels", "poisoned_memory")
@pytest.mark.parametrize("deterministic", [False, True], ids=["one pass", "split"])
def test_the_kernels_see_trees(deterministic):
    """A conversation: branches inside of tiles and over several, then a plain document."""
    start, end, *_ = tree_of([(20, 0), (33, 5), (17, 30), (40, 34), (1, 73), (20, 20), (18, 0)])
    assert_close_to_truth(
        lambda q, k, v: flash_attention(q, k, v, start, end, deterministic=deterministic),
        lambda q, k, v: flash_attention_ref(q, k, v, start, end),
        [padded_with_nan(torch.randn(len(start), heads, 16)).requires_grad_() for heads in (2, 1, 1)],
        torch.float32,
    )


def test_samples_are_an_even_choice_of_the_trees():
    rows = [[([10 * row + 1, 2, 3], 1), ([10 * row + 1, 2, 4, 5], 1)] for row in range(5)]
    documents, _ = plan_set(documents_of(rows), strategy="none", max_length=None, longest_tree=None)
    assert documents.num_units == 5 and len(documents) == 10
    tokenizer = train_tokenizer([], vocab_size=259, chat_template=None)
    assert [prompt.ids[0] for prompt in prompts_of(documents, tokenizer, 3)] == [1, 21, 41]
