"""Preference tuning on batches: the loss and its gradients are those of a loop over documents, however pairs are laid out."""

import math
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import relative_error
from tiny_models import CONFIGS, tiny

from minisft import dpo
from minisft.data.cache import Documents
from minisft.data.kinds import ANSWER, CHOSEN, MISMATCHED, REJECTED, TRAINED, USER
from minisft.data.loader import Loader, make_batch, shared_prompts
from minisft.data.packing import pack, plan
from minisft.errors import UserError
from minisft.model.lora import apply_lora
from minisft.model.lora_options import LoraOptions
from minisft.preference.answer_logps import answer_logps, token_weights
from minisft.preference.losses import (
    ACROSS_THE_BATCH,
    LOSSES,
    WITH_DIVERGENCE,
    WITH_LABEL_SMOOTHING,
    WITHOUT_REFERENCE,
    LossOptions,
    dpo_loss,
    kto_loss,
)
from minisft.preference.reference import Reference, cache_logps, check_start, copy_of, fingerprint

SMOOTHED = {"exo_pair": 0.1, "robust": 0.1}
BETA = 0.3


def make_pairs(num_pairs=7, roles=(CHOSEN, REJECTED), seed=0, weighted=False, longest=12) -> Documents:
    """Random pairs that share a prompt, in the cache's layout. weighted: the two answers of a pair differ in their weight."""
    rng = np.random.default_rng(seed)
    ids, kinds, lengths = [], [], []
    for _ in range(num_pairs):
        prompt = rng.integers(0, 53, rng.integers(1, longest))
        for _ in range(2):
            answer = rng.integers(0, 53, rng.integers(1, longest))
            ids += [*prompt, *answer]
            kinds += [USER] * len(prompt) + [ANSWER | TRAINED] * len(answer)
            lengths.append(len(prompt) + len(answer))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    weights = np.repeat(rng.uniform(0.5, 2, 2 * num_pairs), lengths)
    role = np.tile(np.array(roles, dtype=np.uint8), num_pairs)
    if MISMATCHED in roles:
        role[::4] = REJECTED  # good and bad in turn
    cache = SimpleNamespace(
        ids=np.array(ids, dtype=np.uint32),
        kinds=np.array(kinds, dtype=np.uint8),
        offsets=offsets,
        source=np.zeros(2 * num_pairs, dtype=np.int32),
        weights=weights.astype(np.float32) if weighted else None,
        role=role,
        group=2,
        fingerprint="0123456789abcdef" * 4,
        sources=(),
    )
    return Documents(cache, np.arange(2 * num_pairs), offsets[:-1], offsets[1:])


def batch_of(documents: Documents, strategy="none", round_to=8, numbers=None):
    packs = pack(documents.unit_lengths, 60, strategy)
    return make_batch(documents, packs, range(len(packs)) if numbers is None else numbers, round_to=round_to)


def policy(config="llama", seed=0, dtype=torch.float64):
    config = dict(CONFIGS[config]) if isinstance(config, str) else config
    if config["model_type"] == "gpt2":
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tiny(config, seed).to(dtype).train()


def naive_logps(model, documents: Documents) -> torch.Tensor:
    """One document after the other, with log_softmax: log p of its answer [2U], and of each token."""
    logps = []
    for start, end in zip(documents.start, documents.end):
        ids = torch.from_numpy(documents.cache.ids[start:end].astype(np.int64))
        n = len(ids)
        where = torch.zeros(n, dtype=torch.int32), torch.full((n,), n, dtype=torch.int32)
        hidden = model(ids, torch.arange(n, dtype=torch.int32), *where)
        logp = model.logits(hidden)[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        logps.append(logp[torch.from_numpy(documents.cache.kinds[start + 1 : end] >= TRAINED)])
    return logps


@cache
def naive_logps_of(model) -> list[torch.Tensor]:
    return naive_logps(model, make_pairs(weighted=True))


def objective(losses, **options):
    losses = {losses: 1.0} if isinstance(losses, str) else losses
    e = max((SMOOTHED.get(name, 0.0) for name in losses), default=0.0)
    own = {key: options.pop(key) for key in list(options) if key not in {f.name for f in fields(LossOptions)}}
    return dpo.Objective(losses, LossOptions(**{"beta": BETA, "label_smoothing": e} | options), **own)


def run(model, batch, objective, reference, scale=1.0):
    """(value, stats, gradients)"""
    model.zero_grad()
    value, stats = dpo.loss(model, batch, scale, objective=objective, reference=reference)
    value.backward()
    return value, stats, [p.grad.clone() for p in model.parameters()]


def sums(stats):
    return {name: (float(total), float(weight)) for name, (total, weight) in stats.items()}


def largest_error(gradients, expected):
    """The worst tensor; one that is 0 but for rounding (the bias of keys) counts against all of them."""
    least = 1e-10 * max(b.norm() for b in expected)
    return max((a - b).norm() / b.norm() if b.norm() > least else (a - b).norm() for a, b in zip(gradients, expected))


@pytest.fixture(scope="module")
def other() -> Reference:
    return Reference("model", model=policy(seed=1).requires_grad_(False))


# ------------------------------------------------------------------------------------------------- the layout


def test_log_probabilities_are_those_of_single_documents():
    documents, model = make_pairs(), policy()
    expected = torch.stack([logp.sum() for logp in naive_logps(model, documents)])
    for strategy in ("none", "bfd", "ffd"):
        logps, _ = answer_logps(model, batch_of(documents))
        torch.testing.assert_close(logps, expected, rtol=1e-12, atol=0)
        packs = pack(documents.unit_lengths, 60, strategy)
        batch = batch_of(documents, strategy)
        order = np.concatenate([[2 * u, 2 * u + 1] for p in packs.tolist() for u, _, _ in p])
        assert batch.answers.document.tolist() == order.tolist()
        torch.testing.assert_close(answer_logps(model, batch)[0], expected[order], rtol=1e-12, atol=0)


def test_the_batch_says_whose_its_targets_are():
    documents = make_pairs(weighted=True)
    batch = batch_of(documents, "bfd")
    answers, real = batch.answers, batch.num_targets
    assert answers.role.tolist() == [CHOSEN, REJECTED] * 7
    assert answers.length.tolist() == torch.bincount(answers.row_answer[:real], minlength=14).tolist()
    assert (answers.row_answer[real:] == 14).all() and len(answers.row_answer) == len(batch.targets)
    assert answers.num_answers == (7, 7, 0)
    assert sum(answers.num_targets) == real
    expected = documents.cache.weights[documents.start[answers.document[::2]]]
    assert answers.weight.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert dpo.weight(batch) == pytest.approx(expected.sum(), rel=1e-6)
    assert dpo.weight(batch_of(make_pairs())) == 7


def test_no_pack_parts_a_pair():
    documents = make_pairs(num_pairs=40)
    packs = pack(documents.unit_lengths, 60, "bfd", seed=3)
    seen = [make_batch(documents, packs, [i]).answers.document.tolist() for i in range(len(packs))]
    assert sorted(sum(seen, [])) == list(range(80))
    assert all(pair % 2 == 0 and pair + 1 == other for some in seen for pair, other in zip(some[::2], some[1::2]))
    assert all(make_batch(documents, packs, [i]).num_tokens <= 60 for i in range(len(packs)))


def test_a_shared_prompt_stands_in_the_batch_once():
    documents = make_pairs()
    shared = replace(documents, shared=shared_prompts(documents))
    trained = [(documents.cache.kinds[a:b] >= TRAINED).argmax() for a, b in zip(documents.start, documents.end)]
    assert shared.shared.tolist() == trained[::2] == trained[1::2]
    whole, once = batch_of(documents, round_to=1), batch_of(shared, round_to=1)
    assert once.num_tokens == whole.num_tokens - shared.shared.sum() and once.shared and not whole.shared
    assert once.targets.tolist() == whole.targets.tolist()
    assert once.cu_seqlens.tolist() == [0, *np.cumsum(shared.unit_lengths)]
    for pair, (a, b) in enumerate(zip(once.cu_seqlens, once.cu_seqlens[1:])):
        p, n = shared.shared[pair], documents.lengths[2 * pair]
        positions = once.position_ids[a:b].tolist()
        assert positions == [*range(n), *range(p, documents.lengths[2 * pair + 1])]
        assert once.start[a:b].tolist() == [a] * (b - a)
        assert once.end[a:b].tolist() == [b] * p + [a + n] * (n - p) + [b] * (b - a - n)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere"])
@pytest.mark.parametrize("strategy", ["none", "bfd"])
def test_sharing_the_prompt_changes_nothing(family, strategy):
    config = {**CONFIGS[family], "sliding_window": None} if family == "gemma2" else family
    if family == "gemma2":
        config["layer_types"] = ["full_attention"] * 2
    documents, model = make_pairs(weighted=True), policy(config)
    shared = replace(documents, shared=shared_prompts(documents))
    reference = Reference("model", model=policy(config, seed=1))
    value, stats, grads = run(model, batch_of(documents, strategy), objective("sigmoid"), reference)
    value2, stats2, grads2 = run(model, batch_of(shared, strategy), objective("sigmoid"), reference)
    assert relative_error(value2, value) < 1e-12
    assert largest_error(grads2, grads) < 1e-10
    for name, pair in sums(stats).items():
        assert sums(stats2)[name] == pytest.approx(pair, rel=1e-5), name  # some are fp32


def test_prompts_that_differ_are_not_shared():
    documents = make_pairs(num_pairs=2)
    ids = documents.cache.ids.copy()
    ids[documents.start[1]] = (ids[documents.start[0]] + 1) % 53  # the second document of the first pair
    documents.cache.ids = ids
    shared = replace(documents, shared=shared_prompts(documents))
    assert shared.shared[0] == 0 < shared.shared[1]
    model = policy()
    expected = torch.stack([logp.sum() for logp in naive_logps(model, documents)])
    torch.testing.assert_close(answer_logps(model, batch_of(shared))[0], expected, rtol=1e-12, atol=0)


def test_answers_cut_at_the_left_are_those_of_single_documents():
    """Each keeps its own end of the prompt or none; what both happen to begin with may still be shared."""
    documents, model = make_pairs(num_pairs=40), policy()
    documents = replace(documents, start=np.maximum(documents.start, documents.end - 8))
    shared = replace(documents, shared=shared_prompts(documents))
    scored = np.array([len(logps) > 0 for logps in naive_logps(model, documents)])
    assert scored.all() and 0 < (shared.shared > 0).sum() < 40
    expected = torch.stack([logp.sum() for logp in naive_logps(model, documents)])
    torch.testing.assert_close(answer_logps(model, batch_of(shared))[0], expected, rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("name", [*LOSSES, "mixture"])
def test_value_and_gradients_are_those_of_the_equation(name, other):
    losses = {"sigmoid": 0.8, "bco_pair": 0.3, "sft": 1.0} if name == "mixture" else {name: 1.0}
    documents, model, o = make_pairs(weighted=True), policy(), objective(losses)
    reference = None if set(losses) <= set(WITHOUT_REFERENCE) else other
    value, stats, grads = run(model, batch_of(documents, "bfd"), o, reference, scale=0.25)

    order = batch_of(documents, "bfd").answers.document
    by_document = naive_logps(model, documents)
    tokens = [by_document[i] for i in order]
    logps, lengths = torch.stack([t.sum() for t in tokens]), torch.tensor([len(t) for t in tokens]).double()
    with torch.no_grad():
        of_other = naive_logps_of(other.model)
        refs = torch.stack([of_other[i].sum() for i in order]) if reference else torch.zeros_like(logps)
    expected, chosen, rejected = dpo_loss(
        *(logps[::2], logps[1::2], refs[::2], refs[1::2]),
        beta=BETA, loss_type=losses, chosen_length=lengths[::2], rejected_length=lengths[1::2],
        label_smoothing=o.options.label_smoothing,
    )  # fmt: skip
    weights = torch.from_numpy(documents.cache.weights[documents.start[order[::2]]].astype(float))
    total = (expected * weights).sum()
    model.zero_grad()
    (total * 0.25).backward()
    assert relative_error(value, total) < 1e-7  # weights are fp32
    assert largest_error(grads, [p.grad for p in model.parameters()]) < 1e-6

    if reference is None:
        chosen, rejected = BETA * logps[::2] / lengths[::2], BETA * logps[1::2] / lengths[1::2]
    means = {name: total / weight for name, (total, weight) in sums(stats).items()}
    assert means["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-9)
    assert means["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-9)
    assert means["rewards/accuracies"] == (chosen > rejected).double().mean().item()
    assert means["logps/rejected"] == pytest.approx(logps[1::2].mean().item(), rel=1e-9)


def test_logits_entropy_and_accuracy_are_means_over_tokens(other):
    documents, model = make_pairs(), policy()
    _, stats, _ = run(model, batch_of(documents), objective("sigmoid"), other)
    logits, entropy, correct = {0: [], 1: []}, [], []
    for number, (start, end) in enumerate(zip(documents.start, documents.end)):
        ids = torch.from_numpy(documents.cache.ids[start:end].astype(np.int64))
        n = len(ids)
        zeros = torch.zeros(n, dtype=torch.int32)
        with torch.no_grad():
            z = model.logits(model(ids, torch.arange(n, dtype=torch.int32), zeros, zeros + n))[:-1]
        z = z[torch.from_numpy(documents.cache.kinds[start + 1 : end] >= TRAINED)]
        targets = ids[n - len(z) :]
        logits[number % 2] += z.mean(-1).tolist()
        entropy += torch.distributions.Categorical(logits=z).entropy().tolist()
        correct += (z.argmax(-1) == targets).tolist() if number % 2 == 0 else []
    means = {name: total / weight for name, (total, weight) in sums(stats).items()}
    assert means["logits/chosen"] == pytest.approx(np.mean(logits[0]), rel=1e-5)  # statistics are fp32
    assert means["logits/rejected"] == pytest.approx(np.mean(logits[1]), rel=1e-5)
    assert means["entropy"] == pytest.approx(np.mean(entropy), rel=1e-5)
    assert means["mean_token_accuracy"] == pytest.approx(np.mean(correct))


def test_kto_compares_an_answer_with_those_of_other_rows(other):
    documents, model = make_pairs(roles=(CHOSEN, MISMATCHED)), policy()
    o = objective("kto", desirable_weight=1.5, undesirable_weight=0.7)
    value, stats, grads = run(model, batch_of(documents), o, other)
    logps = torch.stack([t.sum() for t in naive_logps(model, documents)])
    with torch.no_grad():
        refs = torch.stack([t.sum() for t in naive_logps(other.model, documents)])
    good = torch.from_numpy(documents.cache.role[::2] == CHOSEN)
    kl = (logps - refs)[1::2].mean()
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    expected, rewards = kto_loss(logps[::2], refs[::2], good, kl, beta=BETA, **weights)
    model.zero_grad()
    expected.sum().backward()
    assert relative_error(value, expected.sum()) < 1e-9
    assert largest_error(grads, [p.grad for p in model.parameters()]) < 1e-8
    means = {name: total / weight for name, (total, weight) in sums(stats).items()}
    assert means["rewards/chosen"] == pytest.approx(rewards[good].mean().item(), rel=1e-9)
    assert means["rewards/rejected"] == pytest.approx(rewards[~good].mean().item(), rel=1e-9)
    assert means["kl"] == pytest.approx(kl.item(), rel=1e-9)
    assert "rewards/margins" not in means


def test_wpo_weighs_pairs_and_ld_dpo_tokens(other):
    documents, model = make_pairs(), policy()
    batch = batch_of(documents)
    tokens = naive_logps(model, documents)
    with torch.no_grad():
        refs = naive_logps(other.model, documents)

    def weighed(logps):
        return torch.stack(
            [
                logp[:n].sum() + 0.4 * logp[n:].sum()
                for pair in range(7)
                for n in [min(len(logps[2 * pair]), len(logps[2 * pair + 1]))]
                for logp in logps[2 * pair : 2 * pair + 2]
            ]
        )

    c, r = weighed(tokens), weighed(refs)
    expected = dpo_loss(c[::2], c[1::2], r[::2], r[1::2], beta=BETA)[0].sum()
    value, _, grads = run(model, batch, objective("sigmoid", ld_alpha=0.4), other)
    model.zero_grad()
    expected.backward()
    assert relative_error(value, expected) < 1e-7  # 0.4 in fp32
    assert largest_error(grads, [p.grad for p in model.parameters()]) < 1e-6
    assert (token_weights(batch.answers, 1.0) == 1).all() or batch.num_targets < len(batch.targets)

    with torch.no_grad():
        factors = []
        for start, end in zip(documents.start, documents.end):
            ids = torch.from_numpy(documents.cache.ids[start:end].astype(np.int64))
            n = len(ids)
            zeros = torch.zeros(n, dtype=torch.int32)
            logp = model.logits(model(ids, torch.arange(n, dtype=torch.int32), zeros, zeros + n))[:-1].log_softmax(-1)
            adjusted = logp.gather(1, ids[1:, None])[:, 0] - (2 * logp).logsumexp(-1)
            factors.append(adjusted[torch.from_numpy(documents.cache.kinds[start + 1 : end] >= TRAINED)].mean().exp())
        factors = torch.stack(factors)
        sums_of = [torch.stack([t.sum() for t in logps]) for logps in (naive_logps(model, documents), refs)]
        pairs = dpo_loss(sums_of[0][::2], sums_of[0][1::2], sums_of[1][::2], sums_of[1][1::2], beta=BETA)[0]
        expected = (pairs * factors[::2] * factors[1::2]).sum()
    value, _, _ = run(model, batch, objective("sigmoid", use_weighting=True), other)
    assert relative_error(value, expected) < 1e-5  # statistics are fp32


@pytest.mark.parametrize("name", list(LOSSES))
def test_micro_batches_add_up_to_the_batch(name, other):
    documents, model, o = make_pairs(), policy(), objective(name)
    packs = pack(documents.unit_lengths, 60, "none")
    whole = run(model, make_batch(documents, packs, range(7)), o, other)
    parts = [run(model, make_batch(documents, packs, some), o, other) for some in ([0, 1, 2], [3, 4], [5, 6], [])]
    if name in ACROSS_THE_BATCH:
        return
    assert relative_error(sum(p[0] for p in parts), whole[0]) < 1e-9
    assert largest_error([sum(grads) for grads in zip(*(p[2] for p in parts))], whole[2]) < 1e-8
    for key, (total, weight) in sums(whole[1]).items():
        pairs = [sums(p[1])[key] for p in parts]
        assert sum(t for t, _ in pairs) == pytest.approx(total, rel=1e-6), key
        assert sum(w for _, w in pairs) == weight


@pytest.mark.parametrize("name", [*LOSSES, "kto"])
def test_a_batch_of_filler_trains_nothing(name, other):
    documents, model = make_pairs(roles=(CHOSEN, MISMATCHED if name == "kto" else REJECTED)), policy()
    _, wanted, _ = run(model, batch_of(documents), objective(name), other)
    value, stats, grads = run(model, batch_of(documents, numbers=[]), objective(name), other)
    assert list(stats) == list(wanted)  # the ranks add up what they have in this order
    assert value == 0 and all((g == 0).all() for g in grads)
    assert all(pair == (0, 0) for pair in sums(stats).values())


def test_the_tables_of_options_name_the_losses_that_read_them():
    logps = [torch.tensor([x]) for x in (-3.0, -4.0, -5.0, -4.5)]

    def changed_by(options, more):
        return {
            name
            for name in LOSSES
            if dpo_loss(*logps, loss_type=name, **options)[0] != dpo_loss(*logps, loss_type=name, **more)[0]
        }

    assert changed_by({"label_smoothing": 0.1}, {"label_smoothing": 0.2}) == set(WITH_LABEL_SMOOTHING)
    smooth = {"label_smoothing": 0.1}
    assert changed_by(smooth, smooth | {"f_divergence": "js_divergence"}) == set(WITH_DIVERGENCE)


# ------------------------------------------------------------------------------------------------- the reference


def with_adapter(seed=0):
    model = policy(seed=seed)
    apply_lora(model, LoraOptions(r=2, use_dora=seed == 2), seed=1, dtype=torch.float64)
    return model


def move(model, seed=5):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("kind", ["copy", "adapter off", "copy of an adapter"])
def test_the_reference_stays_what_the_policy_was(kind):
    documents = make_pairs()
    batch = batch_of(documents)
    model = policy() if kind == "copy" else with_adapter()
    if kind == "copy of an adapter":
        move(model, seed=9)
    before = answer_logps(model, batch)[0].detach()
    trained = [p for p in model.parameters() if p.requires_grad]
    reference = Reference("adapter off") if kind == "adapter off" else Reference("copy", copies=copy_of(model, trained))
    assert torch.equal(reference.logps(model, batch), before)
    check_start(model, batch, reference, "fp32", None, has_dropout=False)

    move(model)
    after = answer_logps(model, batch)[0].detach()
    values = [p.detach().clone() for p in model.parameters()]
    assert torch.equal(reference.logps(model, batch), before) and not torch.equal(after, before)
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters())), "the policy is as it was"
    assert torch.equal(answer_logps(model, batch)[0], after) and model.training
    with pytest.raises(UserError, match="differ before the first step"):
        check_start(model, batch, reference, "fp32", None, has_dropout=False)


def test_an_error_inside_leaves_the_policy_in_place():
    model = policy()
    reference = Reference("copy", copies=copy_of(model, model.parameters()))
    move(model)
    values = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt), reference.in_place(model):
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters()))


def test_under_autocast_the_reference_computes_with_its_own_weights():
    """autocast keeps the casts of the parameters that it has seen, and the reference puts others in their place."""
    model, batch = policy(dtype=torch.float32), batch_of(make_pairs())
    reference = Reference("copy", copies=copy_of(model, model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        before = answer_logps(model, batch)[0].detach()
    move(model)
    with torch.autocast("cpu", torch.bfloat16):
        policy_first = answer_logps(model, batch)[0].detach()
        assert torch.equal(reference.logps(model, batch), before)
        assert torch.equal(answer_logps(model, batch)[0], policy_first)


def test_at_the_start_the_loss_is_ln_2(other):
    model, batch = policy(), batch_of(make_pairs(), "bfd")
    reference = Reference("copy", copies=copy_of(model, model.parameters()))
    value, stats, _ = run(model, batch, objective("sigmoid"), reference)
    assert value.item() / 7 == pytest.approx(math.log(2), rel=1e-12)
    assert sums(stats)["rewards/margins"] == (0, 7)
    assert sums(stats)["rewards/accuracies"] == (0, 7)  # a tie is not right


def test_tr_dpo_follows_every_so_many_steps(tmp_path):
    model = policy()
    start = [p.detach().clone() for p in model.parameters()]
    reference = Reference("copy", copies=copy_of(model, model.parameters()), sync_steps=3, mixup_alpha=0.6)
    move(model)
    for step in (1, 2):
        reference.follow(step)
    assert all(torch.equal(v, s) for (_, v), s in zip(reference.copies.values(), start))
    reference.follow(3)
    for (p, value), s in zip(reference.copies.values(), start):
        torch.testing.assert_close(value, 0.6 * p + 0.4 * s, rtol=1e-12, atol=1e-12)

    for file in reference.files():
        file.write(tmp_path)
    again = Reference("copy", copies=copy_of(model, model.parameters()), sync_steps=3)
    again.load(tmp_path)
    pairs = zip(again.copies.values(), reference.copies.values())
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(UserError, match="no reference that follows"):
        again.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds a reference that follows"):  # and this run's would not
        Reference("copy").load(tmp_path)


@pytest.mark.parametrize("shared", [False, True])
def test_cached_log_probabilities_are_those_of_the_live_reference(tmp_path, other, shared, capsys):
    documents, model = make_pairs(num_pairs=9), policy()
    index = np.array([0, 1, 4, 5, 0, 1, *range(6, 18)])  # some left out, one twice
    documents = Documents(documents.cache, index, documents.start[index], documents.end[index])
    if shared:
        documents = replace(documents, shared=shared_prompts(documents))
    loader = Loader(documents, plan(documents.unit_lengths, 60, "bfd"), batch_size=2, round_to=8, seed=3)
    calls = []

    def compute(batch):
        calls.append(len(batch.answers.role))
        return other.logps(model, batch)

    arguments = compute, ["a model"], tmp_path, torch.device("cpu"), 3, False
    cached, how = cache_logps(loader, *arguments)
    assert how == "computed" and sum(calls) == len(index)
    for s in range(loader.steps_per_epoch):
        (batch,), (live,) = cached.step(1, s), loader.step(1, s)
        torch.testing.assert_close(batch.answers.ref_logps, other.logps(model, live).float(), rtol=1e-6, atol=1e-6)
        a = run(model, batch, objective("sigmoid"), Reference("cached"))
        b = run(model, live, objective("sigmoid"), other)
        assert relative_error(a[0], b[0]) < 1e-6 and largest_error(a[2], b[2]) < 1e-6

    calls.clear()
    again, how = cache_logps(loader, *arguments)
    assert how == "found" and not calls
    assert np.array_equal(again.documents.ref_logps, cached.documents.ref_logps)
    assert cache_logps(loader, compute, ["another model"], *arguments[2:])[1] == "computed"


def test_a_damaged_cache_is_computed_again(tmp_path, other):
    documents, model = make_pairs(), policy()
    loader = Loader(documents, plan(documents.unit_lengths, 60, "bfd"), batch_size=2)
    arguments = (lambda batch: other.logps(model, batch)), ["a model"], tmp_path, torch.device("cpu"), 3, False
    first, _ = cache_logps(loader, *arguments)
    (folder,) = tmp_path.glob("reference-*")
    (folder / "logps.bin").write_bytes(b"\0" * (folder / "logps.bin").stat().st_size)
    second, how = cache_logps(loader, *arguments)
    assert how == "computed"
    assert np.array_equal(second.documents.ref_logps, first.documents.ref_logps)


def test_the_fingerprint_is_that_of_the_weights():
    model = policy()
    assert fingerprint(model) == fingerprint(policy())
    with torch.no_grad():
        model.layers[1].mlp.down_proj.weight[3, 4] += 1e-9
    assert fingerprint(model) != fingerprint(policy())
    adapted, base = with_adapter(), with_adapter()
    move(adapted)
    assert fingerprint(adapted) != fingerprint(base)
    trained = [{p for p in model.parameters() if p.requires_grad} for model in (adapted, base)]
    assert fingerprint(adapted, trained[0]) == fingerprint(base, trained[1])
