"""Whole steps and whole runs: what must be equal is equal, and what must stop a run stops it."""

import json
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny import (
    GPT2,
    MODEL,
    logged,
    parts,
    relative_error,
    settings,
    train,
    weights,
    with_spoilt_loss,
    write_rows,
)

from minisft import loop, update
from minisft.data.kinds import TOKEN_KINDS
from minisft.errors import UserError
from minisft.examples import naive
from minisft.loop import train_step
from minisft.metrics import Sums
from minisft.optimizers import OPTIMIZERS
from minisft.runtime import seed_step
from minisft.update import LossScale, make_gradients

# fp32 sums in another order differ by a few ulp (6e-8) times a small factor; the bound of the house for equal maths.
TOLERANCE = 1e-6


def gradients_of_step(folder, step=0, change_batches=lambda batches: batches, **overrides):
    """(loss, {parameter: gradient}) of one optimizer step of a fresh model, read from Adam's first moment with beta1 = 0."""
    run, config = parts(folder, **{"train.adam_beta1": 0.0, "train.max_grad_norm": None, **overrides})
    run.progress.step = step
    result = train_step(run, config.train, change_batches(run.train.step(0, step)))
    assert result.updated
    grads = {name: run.optimizer.state[p]["exp_avg"].clone() for name, p in run.model.named_parameters()}
    return result.stats.means()["loss"], grads


def assert_same(one, other, tolerance=TOLERANCE):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for name in other[1]:
        assert relative_error(one[1][name], other[1][name]) <= tolerance, name


def naive_step(folder, **overrides):
    """The definition, examples/naive.py: padding, a mask, all logits, weight x nll summed and divided by the sum of weights."""
    run, config = parts(folder, **overrides)
    weights = {name: p.detach().clone().requires_grad_() for name, p in run.model.named_parameters()}
    micro_batches = [naive.rows_of(batch) for batch in run.train.step(0, 0)]
    loss = naive.add_gradients(partial(naive.llama, weights, config.model.config), micro_batches)
    return loss, {name: p.grad for name, p in weights.items()}


# ---- equality of one step ---------------------------------------------------------------------------------------


def test_a_step_equals_the_definition(tmp_path):
    assert_same(gradients_of_step(tmp_path), naive_step(tmp_path))


@pytest.mark.parametrize("batch_size, accumulation", [(2, 4), (1, 8), (4, 2)])
def test_accumulation_splits_are_equal(tmp_path, batch_size, accumulation):
    split = {"train.per_device_train_batch_size": batch_size, "train.gradient_accumulation_steps": accumulation}
    assert_same(gradients_of_step(tmp_path, **split), gradients_of_step(tmp_path))


def test_packed_equals_unpacked(tmp_path):
    # In another order of rows the sums of a norm's gradient, which nearly cancel, lose a digit; 32 rows stay below 1e-6.
    settings(tmp_path)
    everything = {"train.per_device_train_batch_size": 32, "data.train_data": str(tmp_path / "rows.jsonl[:32]")}
    packed = gradients_of_step(tmp_path, **everything, **{"data.packing": True})
    assert_same(packed, gradients_of_step(tmp_path, **everything))


def test_the_reference_kernels_give_the_same_step(tmp_path):
    assert_same(gradients_of_step(tmp_path), gradients_of_step(tmp_path, **{"model.kernels": "reference"}))


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, about what the kernels compute for ignored rows
@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unpacked", "packed"])
def test_the_triton_kernels_give_the_same_step(tmp_path, packing):
    model = {**MODEL, "head_dim": 16}  # the least that a tensor core multiplies

    def step(kernels):
        keys = {"model.config": model, "model.kernels": kernels, "data.packing": packing}
        return gradients_of_step(tmp_path, **keys, **{"train.per_device_train_batch_size": 2})

    assert_same(step("triton"), step("reference"))


@pytest.mark.usefixtures("triton_kernels")
def test_a_model_that_triton_cannot_run_is_a_users_mistake_where_triton_is_asked_for(tmp_path):
    with pytest.raises(UserError, match="flash_attention: head dim 8"):
        parts(tmp_path, **{"model.kernels": "triton"})


def test_gradient_checkpointing_gives_the_same_step_bitwise(tmp_path):
    loss, grads = gradients_of_step(tmp_path, **{"model.gradient_checkpointing": True})
    plain_loss, plain = gradients_of_step(tmp_path)
    assert loss == plain_loss and all(torch.equal(grads[name], plain[name]) for name in plain)


def masked(batch):
    """The same tokens with nothing trained."""
    empty = {"loss_rows": batch.loss_rows[:0], "targets": batch.targets[:0], "row_kind": batch.row_kind[:0]}
    empty |= {"row_source": batch.row_source[:0], "row_document": batch.row_document[:0], "row_weights": None}
    empty |= {"row_parts": batch.row_parts[:, :0], "part_sizes": (0,) * len(batch.parts)}
    return replace(batch, **empty, labels=torch.full_like(batch.labels, -100), num_targets=0, total_weight=0.0)


def test_a_fully_masked_micro_batch_changes_nothing(tmp_path):
    split = {"train.per_device_train_batch_size": 4, "train.gradient_accumulation_steps": 2}
    with_masked = gradients_of_step(tmp_path, change_batches=lambda b: [masked(b[1]), *b], **split)
    assert_same(with_masked, gradients_of_step(tmp_path, **split))


def test_a_step_with_nothing_trained_has_a_zero_gradient(tmp_path):
    _, grads = gradients_of_step(tmp_path, change_batches=lambda batches: [masked(b) for b in batches])
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("batch_size, accumulation", [(4, 3), (12, 1)])
def test_the_partial_last_window(tmp_path, batch_size, accumulation):
    # 64 rows in windows of 12: the sixth has 4, whatever the split
    split = {"train.per_device_train_batch_size": batch_size, "train.gradient_accumulation_steps": accumulation}
    whole = {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 12}
    assert_same(gradients_of_step(tmp_path, step=5, **split), gradients_of_step(tmp_path, step=5, **whole))


@pytest.mark.parametrize("scale", [1, 2**-20], ids=["usual", "tiny"])
def test_fractional_weights(tmp_path, scale):
    """Only their proportions count."""
    rows = [json.loads(line) for line in write_rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "weight": i % 4 * 0.5 * scale}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "rows.jsonl").write_text(text)
    assert_same(gradients_of_step(tmp_path), naive_step(tmp_path))
    split = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4}
    assert_same(gradients_of_step(tmp_path, **split), gradients_of_step(tmp_path))


def test_micro_batch_normalization_is_the_mean_of_means(tmp_path):
    split = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4}
    _, grads = gradients_of_step(tmp_path, **split, **{"train.loss_normalization": "micro_batch"})
    run, _ = parts(tmp_path, **split)
    for batch in run.train.step(0, 0):
        total, _ = run.loss(run.model, batch, 1 / (4 * batch.num_targets))
        total.backward()
    expected = {name: p.grad for name, p in run.model.named_parameters()}
    assert all(relative_error(grads[name], expected[name]) <= TOLERANCE for name in expected)
    _, exact = gradients_of_step(tmp_path, **split)
    assert max(relative_error(grads[name], exact[name]) for name in exact) > 1e-3  # it is another gradient


def test_the_summed_loss_is_not_scaled_and_its_gradient_is(tmp_path):
    run, _ = parts(tmp_path)
    (batch,) = run.train.step(0, 0)
    grads = []
    for scale in (1.0, 0.125):
        run.model.zero_grad()
        total, _ = run.loss(run.model, batch, scale)
        total.backward()
        grads.append((total.item(), run.model.head_weight.grad.clone()))
    assert grads[0][0] == grads[1][0]
    torch.testing.assert_close(grads[1][1], grads[0][1] * 0.125, rtol=0, atol=0)  # a power of two: exact


def test_label_smoothing_and_z_loss_reach_the_gradient(tmp_path):
    _, plain = gradients_of_step(tmp_path)
    for key in ("train.label_smoothing", "train.z_loss"):
        _, other = gradients_of_step(tmp_path, **{key: 0.1})
        assert max(relative_error(other[name], plain[name]) for name in plain) > 1e-3, key


def test_gradients_stay_where_they_are_on_a_cpu(tmp_path):
    """From the first micro-batch on each one is added in place, so that a resumed run adds in the same order as any other."""
    run, config = parts(tmp_path)
    make_gradients(run.model)
    memory = [p.grad.data_ptr() for p in run.model.parameters()]
    for step in range(2):
        train_step(run, config.train, run.train.step(0, step))
        assert [p.grad.data_ptr() for p in run.model.parameters()] == memory
        assert not any(p.grad.any() for p in run.model.parameters())


# ---- whole runs -------------------------------------------------------------------------------------------------

GOLDEN = [5.577053, 5.292076, 4.741025, 4.295825, 3.881382, 3.478601, 3.136441, 2.866225, 2.694543, 2.587087]


def test_golden_losses(tmp_path):
    """Recorded once. One thread or two, AVX2 or AVX-512: the largest difference seen was 3e-7 of the value."""
    result = train(tmp_path, **{"train.max_steps": 10, "train.lr_scheduler_type": "constant"})
    assert logged(result.output_dir) == pytest.approx(GOLDEN, rel=1e-5)


def test_whole_runs_agree_over_splits(tmp_path):
    one = train(tmp_path, output_dir=str(tmp_path / "one"))
    split = {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4}
    other = train(tmp_path, output_dir=str(tmp_path / "other"), **split)
    # 16 updates of Adam amplify the last bits of a gradient near zero: 1e-4 for the whole run, 1e-6 a step above
    assert logged(other.output_dir) == pytest.approx(logged(one.output_dir), rel=1e-4)


def test_the_same_run_twice_is_byte_equal(tmp_path):
    options = {"train.neftune_noise_alpha": 5.0, "train.max_steps": 6, "data.packing": True}
    one, other = (train(tmp_path, output_dir=str(tmp_path / name), **options) for name in ("one", "other"))
    assert weights(one.output_dir) == weights(other.output_dir)
    assert (one.output_dir / "metrics.jsonl").read_bytes() == (other.output_dir / "metrics.jsonl").read_bytes()


def test_what_is_logged_is_exact(tmp_path):
    """A window's loss and accuracy are sums over its tokens, not means of the steps' means; so are the losses of its parts."""
    settings(tmp_path)
    sources = [{"path": str(tmp_path / "rows.jsonl[:20]"), "name": name} for name in ("a/x", "b/x")]  # 8 rows a step
    sources += [str(tmp_path / "rows.jsonl[20:]")]
    run, config = parts(tmp_path, **{"data.train_data": sources})
    nll = correct = count = num_tokens = 0
    by_part = defaultdict(list)
    sums = Sums(run.device)
    for step in range(3):
        seed_step(config.train.seed, step)
        (batch,) = run.train.step(0, step)
        with torch.no_grad():
            hidden = run.model(batch.input_ids, batch.position_ids, batch.start, batch.end)
            logits = run.model.logits(hidden)[batch.loss_rows[: batch.num_targets]].double()
        targets = batch.targets[: batch.num_targets]
        losses = F.cross_entropy(logits, targets, reduction="none").tolist()
        nll += sum(losses)
        before = None
        for i, loss in enumerate(losses):
            row, document = batch.loss_rows[i].item(), batch.row_document[i].item()
            names = [TOKEN_KINDS[batch.row_kind[i]], "source " + ("a/x", "b/x", "rows.jsonl[20:]")[batch.row_source[i]]]
            for name in names + (["first_token"] if before != (row - 1, document) else []):
                by_part[f"losses/{name}"].append(loss)
            before = row, document
        correct += (logits.argmax(-1) == targets).sum().item()
        count += len(targets)
        result = train_step(run, config.train, [batch])
        sums.merge(result.stats)
        num_tokens += result.num_tokens
        run.progress.step += 1
    means = sums.means()
    assert means["loss"] == pytest.approx(nll / count, rel=1e-6)
    assert means["mean_token_accuracy"] == correct / count
    found = {name: mean for name, mean in means.items() if name.startswith("losses/")}
    assert found.keys() == by_part.keys() and len(found) == 6 and len(by_part["losses/first_token"]) == 24
    for name, of_part in by_part.items():
        assert found[name] == pytest.approx(sum(of_part) / len(of_part), rel=1e-6), name
    assert num_tokens == sum(run.train.step(0, s)[0].num_tokens for s in range(3))


def test_the_open_window_is_kept_exactly(tmp_path):
    sums = Sums(torch.device("cpu"))
    for value in (0.1, 1 / 3, math.nan):
        sums.add({"grad_norm": (value, 1.0), ("a", "b c"): (torch.tensor([value, 0.25]), (2, 0.5)), "x": (1.0, 0.0)})
        state = json.loads(json.dumps(sums.state()))  # which leaves the window open
        copy = Sums(torch.device("cpu"))
        copy.restore(state)
        assert copy.state() == state and list(state) == ["grad_norm", "a\nb c", "x"]
        copy.add({("a", "b c"): (torch.tensor([1.0, 1.0]), (1, 1))})
        assert copy.means().keys() == {"grad_norm", "a", "b c"}
    assert str(sums.means()) == str({"grad_norm": math.nan, "a": math.nan, "b c": 0.5})


def test_evaluation_does_not_depend_on_the_batch_size_or_on_packing(tmp_path):
    options = {"data.eval_fraction": 0.3, "train.max_steps": 1}
    values = []
    for i, (size, packing) in enumerate([(1, False), (7, False), (3, True)]):
        more = {"evaluate.per_device_eval_batch_size": size, "data.eval_packing": packing}
        result = train(tmp_path, output_dir=str(tmp_path / f"run{i}"), **options, **more)
        values.append(result.metrics["eval_loss"])
    assert values[1:] == pytest.approx([values[0]] * 2, rel=TOLERANCE)


def test_named_evaluation_sets(tmp_path):
    sets = {"a": str(tmp_path / "rows.jsonl[:10]"), "b": str(tmp_path / "rows.jsonl[10:]")}
    result = train(tmp_path, **{"data.eval_data": sets, "train.max_steps": 1, "evaluate.eval_on_start": True})
    assert {"eval_a_loss", "eval_b_loss", "eval_b_mean_token_accuracy"} <= result.metrics.keys()
    assert len(logged(result.output_dir, "eval_a_loss")) == 2


def test_tokens_and_the_fill_of_packs_are_counted_over_whole_passes(tmp_path):
    """Steps of 5 packs, so that the last step of a pass is short; two passes, and one log window for both."""
    options = {"data.packing": True, "train.per_device_train_batch_size": 5, "log.logging_steps": 1000}
    options["train.num_train_epochs"] = 2
    run, _ = parts(tmp_path, **options)
    num_packs, num_tokens = run.train.plan.num_packs, int(run.train.documents.lengths.sum())
    assert num_packs % 5 != 0
    metrics = train(tmp_path, **options).metrics
    assert metrics["num_tokens"] == 2 * num_tokens
    assert metrics["packing_fill"] == pytest.approx(num_tokens / (num_packs * 64), rel=1e-12)


def test_every_step_draws_its_own_noise_and_dropout(tmp_path):
    """The same rows in every step, and weights that do not move: only the random numbers differ."""
    settings(tmp_path)
    options = {"data.train_data": str(tmp_path / "rows.jsonl[:8]"), "data.shuffle": False, "train.max_steps": 4}
    options |= {"train.learning_rate": 1e-30}  # an update that rounds to nothing
    still = GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    for name, keys, num_losses in (
        ("plain", {"model.config": still}, 1),
        ("noise", {"model.config": still, "train.neftune_noise_alpha": 5.0}, 4),
        ("dropout", {"model.config": still | {"resid_pdrop": 0.1}}, 4),
    ):
        losses = logged(train(tmp_path, output_dir=str(tmp_path / name), **options | keys).output_dir)
        assert len(set(losses)) == num_losses, name


@pytest.mark.parametrize("strategy", ["bfd", "ffd", "bfd_split"])
def test_the_account_counts_the_targets_of_an_epoch(tmp_path, strategy):
    """Documents are cut (bfd, ffd) or split: what the summary calls trained is what the batches of an epoch train."""
    options = {
        "data.packing": True,
        "data.packing_strategy": strategy,
        "data.max_length": 12,
        "audit.max_lost_answer": 1.0,
    }
    run, _ = parts(tmp_path, **options)
    targets = sum(batch.num_targets for step in range(run.train.steps_per_epoch) for batch in run.train.step(0, step))
    (line,) = (line for line in run.summary if "tokens:" in line)
    assert f"= {targets:,} trained" in line


# ---- steps that are not finite ----------------------------------------------------------------------------------


def break_step(monkeypatch, at, value=float("nan")):
    """The loss of optimizer step `at` becomes `value`."""
    from minisft import sft

    calls = iter(range(1000))
    honest = sft.loss

    def loss(model, batch, grad_scale, **options):
        total, stats = honest(model, batch, grad_scale, **options)
        if model.training and next(calls) == at:
            total = total * value
            stats["loss"] = (total.detach(), stats["loss"][1])
        return total, stats

    monkeypatch.setattr(sft, "loss", loss)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch, value):
    options = {"train.lr_scheduler_type": "constant"}
    good = train(tmp_path, output_dir=str(tmp_path / "good"), **options, **{"train.max_steps": 3})
    break_step(monkeypatch, at=3, value=value)
    with pytest.raises(UserError, match=r"step 4: .* not finite.*rows.jsonl:\d+") as caught:
        train(tmp_path, **options, **{"train.max_steps": 8})
    assert caught.value.exit_code == 76
    (saved,) = (tmp_path / "out" / "checkpoints").iterdir()  # nothing of the first three steps is lost
    assert (saved / "model.safetensors").read_bytes() == (good.output_dir / "model" / "model.safetensors").read_bytes()
    (report,) = (tmp_path / "out").glob("nonfinite-step-00000004-rank-0.jsonl")
    about, *rows = map(json.loads, report.read_text().splitlines())
    assert (about["step"], about["weights"]) == (4, "before the update of this step") and len(rows) == 8


@pytest.mark.parametrize(
    "spoil",
    [
        lambda total: total * float("inf"),  # the loss and its gradient
        lambda total: total + float("nan"),  # the loss alone
        lambda total: total + (0 * total).sqrt(),  # the gradient alone: 0 times infinity
    ],
    ids=["both", "loss", "gradient"],
)
def test_skipping_leaves_weights_and_moments_alone(tmp_path, spoil):
    run, config = parts(tmp_path, **{"train.on_nonfinite": "skip"})
    train_step(run, config.train, run.train.step(0, 0))
    before = [p.detach().clone() for p in run.model.parameters()]
    moments = [s["exp_avg"].clone() for s in run.optimizer.state.values()]
    assert not train_step(with_spoilt_loss(run, spoil), config.train, run.train.step(0, 1)).updated
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(run.optimizer.state.values(), moments))
    assert not any(p.grad.any() for p in run.model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_refused_steps_leave_no_trace_in_the_optimizer(tmp_path, optimizer):
    """Neither before the first update nor later, and its counts are those of the updates."""
    options = {"train.optim": optimizer, "train.on_nonfinite": "skip", "train.lr_scheduler_type": "constant"}
    spoil = {0: lambda total: total * math.inf, 2: lambda total: total + math.nan}  # the second has good gradients
    results = []
    for refused in (spoil, {}):
        run, config = parts(tmp_path, **options)
        for step in sorted({*refused, 1, 3}):
            run.progress.step = step
            ready = with_spoilt_loss(run, spoil[step]) if step in refused else run
            assert train_step(ready, config.train, run.train.step(0, step)).updated == (step not in refused)
        results.append([run.model.state_dict(), *run.optimizer.state_dict()["state"].values()])
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("optimizer, order", [("adamw_minisft", "copy update wait"), ("lion", "copy wait update")])
def test_the_host_waits_for_the_verdict_when_the_update_of_adamw_is_queued(tmp_path, monkeypatch, optimizer, order):
    """Each of the others has to know first."""
    run, config = parts(tmp_path, **{"train.optim": optimizer})
    happened, honest = [], (update.read_back, run.optimizer.step)

    def read_back(x):
        happened.append("copy")
        number = honest[0](x)
        return lambda: happened.append("wait") or number()

    def step(**options):
        happened.append("update")
        honest[1](**options)

    monkeypatch.setattr(update, "read_back", read_back)
    monkeypatch.setattr(run.optimizer, "step", step)
    assert train_step(run, config.train, run.train.step(0, 0)).updated
    assert " ".join(happened) == order


@pytest.mark.parametrize(
    "limits, broken, last",
    [
        (
            {"max_skips_in_a_row": 3, "max_skips_share": 1.0},
            range(2, 30),
            6,
        ),  # steps 3 to 5 are skipped, 6 is one too many
        ({"max_skips_in_a_row": 3, "max_skips_share": 0.5}, range(0, 30, 2), 5),  # 1 and 3; 5 is the third of five
        ({"max_skips_in_a_row": 3, "max_skips_share": 1.0}, range(0, 30, 2), None),
    ],
    ids=["in a row", "share", "neither"],
)
def test_skipping_has_an_end(tmp_path, monkeypatch, capsys, limits, broken, last):
    def step(run, *arguments):
        return train_step(with_spoilt_loss(run) if run.progress.step in broken else run, *arguments)

    monkeypatch.setattr(loop, "train_step", step)
    options = {f"train.{key}": value for key, value in limits.items()}
    options |= {"train.on_nonfinite": "skip", "train.max_steps": 9}
    if last is None:
        assert train(tmp_path, **options).metrics["nonfinite_steps"] == 5
        assert "WARNING 5 of 9 steps were not finite" in capsys.readouterr().err
        return
    with pytest.raises(UserError, match=f"step {last}: .* trains little or nothing") as caught:
        train(tmp_path, **options)
    assert caught.value.exit_code == 76 and not (tmp_path / "out" / "model").exists()
    with pytest.raises(UserError, match=f"step {last}: "):  # a resume does not begin to count anew
        train(tmp_path, **options)


def test_a_skipped_step_is_logged_as_nan_and_counted(tmp_path, monkeypatch):
    break_step(monkeypatch, at=2)
    result = train(tmp_path, **{"train.on_nonfinite": "skip", "train.max_steps": 4})
    losses = logged(result.output_dir)
    assert losses[2] != losses[2] and all(loss == loss for loss in losses[:2] + losses[3:])
    assert result.metrics["nonfinite_steps"] == 1


# ---- precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_like_fp32(tmp_path, precision):
    options = {"train.max_steps": 8}
    exact = logged(train(tmp_path, output_dir=str(tmp_path / "fp32"), **options).output_dir)
    result = train(tmp_path, output_dir=str(tmp_path / "low"), **options, **{"train.precision": precision})
    low = logged(result.output_dir)
    assert ("loss_scale" in result.metrics) == (precision == "fp16")
    assert low[0] == pytest.approx(exact[0], rel=2**-8)  # bf16 keeps 8 bits; fp16 more
    assert low[-1] == pytest.approx(exact[-1], rel=0.02)


def test_the_gradients_of_fp16_are_those_of_fp32(tmp_path):
    """Whatever the loss is scaled by."""
    _, grads = gradients_of_step(tmp_path, **{"train.precision": "fp16"})
    _, exact = gradients_of_step(tmp_path)
    # 2^-11 for every product that is rounded, and a few of these one after the other; the largest seen is 2^-10
    assert max(relative_error(grads[name], exact[name]) for name in exact) < 2**-8


@hypothesis_settings(deadline=None)
@given(st.lists(st.sampled_from([False, False, False, True]), max_size=30), st.integers(1, 4))
def test_the_loss_scale_doubles_after_good_steps_in_a_row(overflows, interval):
    """And not after as many that an overflow parts."""
    loss_scale, exponent, in_a_row = LossScale(growth_interval=interval), 16, 0
    for overflow in overflows:
        loss_scale.update(overflow)
        in_a_row = 0 if overflow else in_a_row + 1
        exponent += -1 if overflow else in_a_row % interval == 0
        assert loss_scale.scale == 2.0**exponent


def test_an_fp16_overflow_halves_the_scale_and_skips(tmp_path):
    run, config = parts(tmp_path, **{"train.precision": "fp16"})
    run.progress.loss_scale.scale = 2.0**40
    before = [p.detach().clone() for p in run.model.parameters()]
    assert not train_step(run, config.train, run.train.step(0, 0)).updated
    assert run.progress.loss_scale.scale == 2.0**39
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), before))


# ---- what a run refuses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"model.config": {"model_type": "llama", "vocab_size": 100}},
            "the data up to 223, the model's embedding 100 rows",
        ),
        ({"model.config": {"model_type": "unheard"}}, "unheard"),
        ({"data.train_data": "absent.jsonl"}, "absent.jsonl"),
        ({"data.max_length": 4, "data.truncation": "error"}, "longer than max_length = 4"),
        ({"checkpoint.resume": "absent"}, "no such folder"),
    ],
)
def test_mistakes_are_told_before_the_first_step(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, **change)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_token_that_no_row_of_the_data_has_needs_no_row_of_the_embedding(tmp_path):
    """Gemma 3 1B: the tokenizer has a token for images, which the model of text cannot embed."""
    train(tmp_path, **{"model.config": MODEL | {"vocab_size": 230}, "train.max_steps": 1})
    assert "the data has none of the others" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_second_run_in_the_same_folder_at_once_is_refused(tmp_path):
    from minisft.atomic_folder import lock_folder

    settings(tmp_path)
    with lock_folder(tmp_path / "out"), pytest.raises(UserError, match="is in use by"):
        train(tmp_path)
