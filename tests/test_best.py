"""The best evaluation, stopping early, and what is said where a configuration has changed."""

import json
import math
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_resume import stop_after
from tiny import logged, train, weights

from minisft.best import Best, after_evaluation, best_metric, is_greater_better
from minisft.config.load import load
from minisft.errors import STOPPED, UserError

# The learning rate rises until the loss on held-out rows does: the best evaluation is the fifth of ten.
RATES = {"train.learning_rate": 0.2, "train.warmup_steps": 12, "train.max_grad_norm": None, "train.max_steps": 10}
BEST = RATES | {"data.eval_fraction": 0.2, "evaluate.eval_steps": 1, "evaluate.load_best_model_at_end": True}


# ---- the rule -------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=1), st.floats(0, 1), st.booleans())
def test_the_best_is_the_first_of_the_largest_and_the_count_that_since_progress(values, threshold, greater):
    best, last_progress, seen = Best(), 0, []
    for step, value in enumerate(values, 1):
        earlier = [x if greater else -x for x in seen if not math.isnan(x)]
        now = value if greater else -value
        if not math.isnan(value) and (not earlier or now - max(earlier) > threshold):
            last_progress = step
        seen.append(value)
        best = after_evaluation(best, value, step, greater_is_better=greater, threshold=threshold)
        assert best.num_bad == step - last_progress
    numbers = [x for x in values if not math.isnan(x)]
    if not numbers:
        assert best.value is None
    else:
        assert best.value == (max if greater else min)(numbers) and best.step == values.index(best.value) + 1


def test_an_evaluation_that_does_not_count_may_be_the_best_and_costs_no_patience():
    best = Best(1.0, 5, num_bad=2)
    assert after_evaluation(best, 2.0, 7, greater_is_better=False, counts=False) == best
    assert after_evaluation(best, 0.5, 7, greater_is_better=False, counts=False) == Best(0.5, 7, 0)


def test_names_of_metrics():
    known = [
        "eval_a_loss",
        "eval_b_loss",
        "eval_b_mean_token_accuracy",
        "eval_b_rewards/margins",
        "eval_b_logps/chosen",
    ]
    assert best_metric(None, known) == "eval_a_loss"
    assert best_metric("eval_b_loss", known) == best_metric("b_loss", known) == "eval_b_loss"
    with pytest.raises(UserError, match="metrics: eval_a_loss"):
        best_metric("loss", known)
    assert [is_greater_better(name, None) for name in known[:4]] == [False, False, True, True]
    assert is_greater_better("eval_b_loss", True) is True
    with pytest.raises(UserError, match="greater_is_better"):
        is_greater_better("eval_b_logps/chosen", None)


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_the_best_model_is_kept_and_exported(tmp_path, capsys):
    result = train(tmp_path, **BEST, **{"checkpoint.save_steps": 2, "checkpoint.save_total_limit": 1})
    losses = logged(result.output_dir, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert best < 8, "the test wants a run whose best evaluation is not its last"
    names = sorted(path.name for path in (result.output_dir / "checkpoints").iterdir())
    assert names == [f"step-{best:08d}", "step-00000010"]  # the best, and the newest one
    kept = load_file(result.output_dir / "checkpoints" / names[0] / "model.safetensors")
    exported = load_file(result.output_dir / "model" / "model.safetensors")
    assert all((exported[name] == kept[name]).all() for name in kept)
    assert f"exported   the model of step {best}" in capsys.readouterr().out


def test_early_stopping_ends_the_run_and_survives_a_resume(tmp_path, monkeypatch, capsys):
    keys = BEST | {"evaluate.early_stopping_patience": 2}
    whole = train(tmp_path, output_dir=str(tmp_path / "whole"), **keys)
    losses = logged(whole.output_dir, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert whole.exit_code == 0 and whole.step == best + 2 == len(losses) < 10
    with monkeypatch.context() as patch:
        stop_after(patch, best + 1, signal.SIGTERM)
        assert train(tmp_path, **keys).exit_code == STOPPED
    resumed = train(tmp_path, **keys)
    assert resumed.step == whole.step and weights(resumed.output_dir) == weights(whole.output_dir)
    # the last page names the option with which it would continue
    assert "out/config.toml --early_stopping_patience 4\n" in capsys.readouterr().out
    assert train(tmp_path, **keys).step == whole.step
    assert "finished already" in capsys.readouterr().out
    patient = train(tmp_path, **keys | {"evaluate.early_stopping_patience": 3})  # continues
    assert patient.step == whole.step + 1 and "kept as model.replaced-1" in capsys.readouterr().out


def test_nothing_changes_silently(tmp_path, capsys):
    keys = {"train.max_steps": 4, "train.lr_scheduler_type": "constant"}
    train(tmp_path, **keys)
    before = weights(tmp_path / "out")
    changed = "train.learning_rate 0.01 -> 9.0"
    with pytest.raises(UserError, match=f"finished, at step 4, with another configuration: {changed}"):
        train(tmp_path, **keys | {"train.learning_rate": 9})
    assert weights(tmp_path / "out") == before
    assert train(tmp_path, **keys | {"log.logging_steps": 2}).step == 4  # changes nothing of the model
    capsys.readouterr()
    assert train(tmp_path, **keys | {"train.learning_rate": 9, "train.max_steps": 6}).step == 6
    said = capsys.readouterr().out
    assert f"changed since step 4: {changed}\n" in said and "changed since step 4: train.max_steps 4 -> 6\n" in said
    (line,) = (tmp_path / "out" / "config_history.jsonl").read_text().splitlines()
    changes = {"train.learning_rate": ["0.01", "9.0"], "train.max_steps": ["4", "6"]}
    assert json.loads(line) == {"step": 4, "changed": changes}


@pytest.mark.parametrize(
    "eval_steps, save_steps, evaluated, saved", [("epoch", "epoch", [7, 13], [7, 13]), ("never", 5, [], [5, 10, 13])]
)
def test_intervals(tmp_path, eval_steps, save_steps, evaluated, saved):
    """51 rows in steps of 8 are 7 steps an epoch; the run ends within the second."""
    keys = {"data.eval_fraction": 0.2, "evaluate.eval_steps": eval_steps, "checkpoint.save_steps": save_steps}
    out = train(tmp_path, **keys, **{"train.max_steps": 13}).output_dir
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == evaluated
    assert sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir()) == saved


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"load_best_model_at_end": True}, "nothing to evaluate"),
        ({"early_stopping_patience": 2, "eval_fraction": 0.1, "eval_steps": "never"}, "nothing is evaluated"),
        ({"early_stopping_threshold": 0.1}, "early_stopping_patience"),
        ({"eval_steps": "epochs"}, "expected a whole number at least 1 and"),
    ],
)
def test_contradictions(keys, words):
    minimal = {"model_name_or_path": "a/b", "train_data": "rows.jsonl"}
    with pytest.raises(UserError, match=words):
        load(None, minimal | keys)


def test_an_unknown_metric_is_refused_before_the_first_step(tmp_path):
    keys = {"data.eval_fraction": 0.2, "evaluate.metric_for_best_model": "eval_los"}
    with pytest.raises(UserError, match="metrics: eval_loss, eval_mean_token_accuracy, eval_entropy"):
        train(tmp_path, **keys)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
