"""Spikes of the loss: what is one, and that each policy does what it says, byte for byte."""

import json
import math
from functools import partial
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import logged, settings, train, weights, with_spoilt_loss

from minisft import loop
from minisft.config.load import load
from minisft.errors import NONFINITE, UserError
from minisft.spikes import WINDOW, Recent
from minisft.update import is_accepted

# ---- the rule ---------------------------------------------------------------------------------------------------


def after(losses, norms=None) -> Recent:
    recent = Recent()
    for i, loss in enumerate(losses):
        recent.add(loss, norms[i] if norms else 1.0)
    return recent


def spikes_of(losses, norms=None, threshold=8.0) -> list[int]:
    """The steps (the first is 1) that are spikes."""
    recent, found = Recent(), []
    for step, loss in enumerate(losses, 1):
        norm = norms[step - 1] if norms else 1.0
        of_loss, of_norm = recent.limits(threshold)
        if loss > of_loss or norm > of_norm:
            found.append(step)
        recent.add(loss, norm)
    return found


@given(
    st.lists(st.tuples(st.floats(-10, 1e6), st.floats(0, 1e6)), min_size=1, max_size=40), st.floats(1, 100),
    st.floats(-20, 1e9), st.floats(0, 1e9),
)  # fmt: skip
def test_a_value_is_above_its_limit_where_its_z_score_is_above_the_threshold(steps, threshold, loss, norm):
    recent = after(*zip(*steps))
    for limit, z, value in zip(recent.limits(threshold), recent.z_scores(loss, norm), (loss, norm)):
        if abs(z - threshold) > 1e-9 * threshold:  # else rounding decides
            assert (value > limit) == (z > threshold)


def test_the_z_score_by_hand():
    losses, norms = [2.0, 2.5, 3.0, 4.0] * 32, [1.0, math.e, math.e**2, math.e**4] * 32
    z_loss, z_norm = after(losses, norms).z_scores(10.0, math.e**7)
    deviation = 1.4826 * median([0.75, 0.25, 0.25, 1.25])
    assert z_loss == pytest.approx((10 - 2.75) / deviation)
    assert z_norm == pytest.approx((7 - 1.5) / (1.4826 * median([1.5, 0.5, 0.5, 2.5])))


def test_a_flat_loss_and_one_that_falls_are_no_spikes():
    assert spikes_of([2.0] * 200 + [2.5] + [2.0] * 50) == []
    assert spikes_of([1e-6] * 200 + [0.5]) == []
    assert spikes_of([10 * 0.9**step for step in range(300)], [5 * 0.9**step for step in range(300)]) == []


def test_normal_noise_of_any_size_is_no_spike():
    noise = np.random.default_rng(0).normal(size=3000)
    for size in (0.01, 0.3, 2.0):
        assert spikes_of((3 + size * noise).tolist(), np.exp(size * noise).tolist()) == []


@pytest.mark.parametrize("num_before", [1, 6, 100, 1000])
def test_a_loss_of_1000_times_the_usual_is_a_spike_and_so_is_such_a_norm_once_it_is_known(num_before):
    usual = (2 + 0.1 * np.random.default_rng(1).normal(size=num_before)).tolist()
    assert spikes_of([*usual, 2000.0]) == [num_before + 1]
    assert spikes_of(usual + [2.0], [*usual, 2000.0]) == ([num_before + 1] if num_before > 1 else [])


def test_spikes_do_not_hide_the_next_one_and_a_new_level_is_none_in_the_end():
    assert spikes_of([*[2.0] * 100, *[50.0, 2.0] * 10]) == list(range(101, 121, 2))
    found = spikes_of([2.0] * 300 + [50.0] * 300)
    assert found == list(range(301, 301 + WINDOW // 2))


def test_old_steps_are_forgotten():
    recent = after([1.0] * 500)
    assert len(recent.losses) == len(recent.norms) == WINDOW
    assert after([1.0] * 500 + [3.0] * WINDOW).limits(8.0) == after([3.0] * WINDOW).limits(8.0)


@pytest.mark.parametrize(
    "sums, accepted",
    [
        ([3.0, 2.0], True),
        ([3.1, 2.0], False),
        ([3.0, 2.1], False),
        ([1.0, 0.0], False),  # nothing reaches the loss any more
        ([0.0, 0.0], True),  # nothing is trained
        ([-1.0, 0.0], True),
    ],
)
def test_the_limits_of_a_step_and_what_is_not_finite(sums, accepted):
    assert is_accepted(torch.tensor(sums), (3.0, 2.0)) == accepted
    assert is_accepted(torch.tensor(sums)) and not is_accepted(torch.tensor(sums), (-math.inf, -math.inf))
    for bad in (math.nan, math.inf, -math.inf):
        for broken in ([bad, 1.0], [1.0, bad], [bad, -bad]):
            for limits in (None, (3.0, 2.0), (math.inf, math.inf)):
                assert not is_accepted(torch.tensor(broken), limits)


# ---- the policies, on whole runs --------------------------------------------------------------------------------

SPIKE = 8  # the step whose loss is a thousand times the usual
REWIND = {"train.on_spike": "rewind", "log.logging_steps": 4}  # so that the log's window is open at the checkpoints
OPTIONS = {"train.max_steps": 12, "checkpoint.save_steps": 3, "train.lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spikes")
    settings(folder)
    return folder


def run_in(home, out, **options):
    return train(home, **OPTIONS | {"output_dir": str(out), "data.cache_dir": str(home / "cache")} | options)


@pytest.fixture
def go(home, tmp_path):
    """A function that trains, in tmp_path/out unless another folder is named."""
    return lambda name="out", **options: run_in(home, tmp_path / name, **options)


def spoil(monkeypatch, *steps: int, factor: float = 1000.0) -> None:
    """The loss of these steps, and its gradient, are so many times as high."""
    honest = loop.train_step

    def train_step(run, *arguments):
        is_spoilt = run.progress.step + 1 in steps
        return honest(with_spoilt_loss(run, lambda total: total * factor) if is_spoilt else run, *arguments)

    monkeypatch.setattr(loop, "train_step", train_step)


def last(out):
    return sorted((out / "checkpoints").glob("step-????????"))[-1]


def moments(out) -> bytes:
    return last(out).joinpath("optimizer.safetensors").read_bytes()


def state(out) -> dict:
    return json.loads(
        sorted((out / "checkpoints").glob("step-????????"))[-1].joinpath("trainer_state.json").read_text()
    )


@pytest.fixture(scope="module")
def without(home):
    """The folder of a run that leaves the update of step SPIKE out, because it is not finite."""
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, SPIKE, factor=math.inf)
        return run_in(home, home / "without", **REWIND | {"train.on_nonfinite": "skip"}).output_dir


@pytest.fixture(scope="module")
def rewound(home):
    """The folder of a run that went back once."""
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, SPIKE)
        return run_in(home, home / "rewound", **REWIND).output_dir


def test_a_warning_changes_nothing(go, monkeypatch, capsys):
    spoil(monkeypatch, SPIKE)
    result = go()
    err = capsys.readouterr().err
    assert "WARNING step 8: a spike: loss " in err and "WARNING 1 of 12 steps were spikes" in err
    assert "spike-step-00000008-rank-0.jsonl" in err
    assert logged(result.output_dir, "spikes") == [1] * 5  # from that step on
    assert (
        rows_of(result.output_dir / "spike-step-00000008-rank-0.jsonl")[0]["weights"] == "after the update of this step"
    )
    blind = go("blind", **{"train.spike_threshold": 1e9})
    assert weights(result.output_dir) == weights(blind.output_dir)
    assert "spikes" not in blind.metrics and not list(blind.output_dir.glob("spike-*"))


@pytest.mark.parametrize("optimizer", ["adamw_minisft", "muon"])  # one finds out with its update, one before
def test_a_skipped_spike_leaves_no_trace_in_the_weights(go, monkeypatch, optimizer):
    folders = []
    for factor in (1000.0, math.inf):
        with monkeypatch.context() as patch:
            spoil(patch, SPIKE, factor=factor)
            options = {"train.on_spike": "skip", "train.on_nonfinite": "skip", "train.optim": optimizer}
            folders.append(go(f"{factor}", **options).output_dir)
    assert weights(folders[0]) == weights(folders[1]) and moments(folders[0]) == moments(folders[1])


def test_stopping_saves_the_step_before_and_names_the_rows(go, without, tmp_path, monkeypatch):
    spoil(monkeypatch, SPIKE)
    for _ in range(2):  # the same command comes to the same end
        with pytest.raises(UserError, match=r"step 8: a spike: loss .*z-score .*rows.jsonl:\d+") as caught:
            go(**{"train.on_spike": "stop"})
        assert caught.value.exit_code == NONFINITE
    out = tmp_path / "out"
    assert state(out)["step"] == 7 and not (out / "model").exists()
    assert len(logged(out)) == 7
    assert weights(go(**{"train.on_spike": "skip"}).output_dir) == weights(without)


def test_skipping_has_an_end(go, monkeypatch):
    spoil(monkeypatch, 6, 8, 9, 10, 11)
    options = {"train.on_spike": "skip", "train.max_skips_in_a_row": 3, "train.max_skips_share": 1.0}
    with pytest.raises(UserError, match="step 11: a spike: .*trains little or nothing") as caught:
        go(**options)
    assert caught.value.exit_code == NONFINITE
    with pytest.raises(UserError, match="step 9: a spike: .*2 before it"):
        go("share", **options | {"train.max_skips_share": 0.3, "train.max_skips_in_a_row": 3})


def test_going_back_leaves_the_rows_out_and_changes_nothing_else(rewound, without):
    assert weights(rewound) == weights(without) and moments(rewound) == moments(without)
    assert [row["step"] for row in rows_of(rewound / "metrics.jsonl")] == [4, 8, 12]
    assert logged(rewound) == logged(without) and logged(rewound, "num_tokens") == logged(without, "num_tokens")
    assert state(rewound)["spikes"] == {"count": 1, "skipped": 0, "rewinds": 1, "left_out": [SPIKE]}
    assert state(rewound)["recent"] == state(without)["recent"]


def test_going_back_further(go, without, monkeypatch, capsys):
    spoil(monkeypatch, SPIKE)
    out = go(**{"train.on_spike": "rewind", "train.rewind_steps": 4, "checkpoint.save_total_limit": 9}).output_dir
    assert f"back to {out}/checkpoints/step-00000003" in capsys.readouterr().err  # of step 7 and 4 before it
    assert weights(out) == weights(without) and moments(out) == moments(without)


@pytest.mark.parametrize("stop_at", [8, 11])  # in the step that is left out, before it is saved, and after that
def test_a_run_that_went_back_resumes_byte_for_byte(go, rewound, monkeypatch, stop_at):
    spoil(monkeypatch, SPIKE)
    honest = loop.train_step

    def crash(run, *arguments):
        if run.progress.step + 1 == stop_at and run.progress.spikes.rewinds:
            raise RuntimeError("crash")
        return honest(run, *arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(loop, "train_step", crash)
        go(**REWIND)
    out = go(**REWIND).output_dir
    assert weights(out) == weights(rewound) and moments(out) == moments(rewound)
    assert (out / "metrics.jsonl").read_bytes() == (rewound / "metrics.jsonl").read_bytes()
    assert state(out)["spikes"] == state(rewound)["spikes"]


def test_going_back_has_an_end_and_needs_a_checkpoint(go, tmp_path, monkeypatch):
    spoil(monkeypatch, 2, 7, 8, 9, 10)
    with pytest.raises(UserError, match="step 9: a spike: .*went back 2 times already") as caught:
        go(**{"train.on_spike": "rewind", "train.max_rewinds": 2})
    assert caught.value.exit_code == NONFINITE
    spikes = state(tmp_path / "out")["spikes"]
    assert spikes["left_out"] == [2, 7, 8] and spikes["skipped"] == 1  # at step 2 there is no checkpoint


def test_a_learning_rate_of_1000_is_noticed(go):
    with pytest.raises(UserError, match="step 2: a spike: loss"):
        go(**{"train.on_spike": "stop", "train.learning_rate": 1e3})


def test_a_gradient_of_zero_is_noticed(go, monkeypatch):
    """As such a learning rate leaves it behind in larger models, whose norms overflow."""
    honest = loop.train_step
    dead = partial(with_spoilt_loss, spoil=lambda total: total.detach() + 0 * total)
    monkeypatch.setattr(
        loop, "train_step", lambda run, *rest: honest(dead(run) if run.progress.step > 0 else run, *rest)
    )
    with pytest.raises(UserError, match="step 2: the gradient is zero, with a loss of "):
        go(**{"train.on_spike": "stop"})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train.on_spike": "rewind", "checkpoint.save_steps": "never"}, "no checkpoint to go back to"),
        (
            {"train.on_spike": "skip", "train.optimizer_in_backward": True, "train.max_grad_norm": "none"},
            "cannot be left out",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load({}, settings(tmp_path, **change), origin="test")


# ---- what is written down ---------------------------------------------------------------------------------------


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("packing", [False, True])
def test_the_losses_of_the_rows_are_those_of_the_step(go, home, monkeypatch, packing):
    """By the weights before the update they add up to the step's loss."""
    spoil(monkeypatch, SPIKE)
    options = {"train.on_spike": "skip", "data.packing": packing, "train.per_device_train_batch_size": 4}
    out = go(**options, **{"train.gradient_accumulation_steps": 2}).output_dir
    about, *rows = rows_of(out / "spike-step-00000008-rank-0.jsonl")
    assert (about["step"], about["action"], about["weights"]) == (8, "skip", "before the update of this step")
    assert about["loss_z_score"] > 8 and about["grad_norm"] == logged(out, "grad_norm")[7]
    tokens = sum(row["trained_tokens"] for row in rows)
    mean = sum(row["loss"] * row["trained_tokens"] for row in rows) / tokens
    assert mean == pytest.approx(about["loss"] / 1000, rel=1e-6)  # the same sums in another order
    assert [row["loss"] for row in rows] == sorted((row["loss"] for row in rows), reverse=True)
    lines = (home / "rows.jsonl").read_text().splitlines()
    for row in rows:
        file, _, line = row["row"].rpartition(":")
        assert file == row["source"] == str(home / "rows.jsonl")
        data = json.loads(lines[int(line) - 1])
        text = {state: text for state, text in row["text"]}
        assert text["context"] == data["prompt"] and text["trained"].startswith(data["completion"])
        assert row["trained_tokens"] == len(data["completion"]) + 1  # and the end


def test_many_spikes_are_ten_files_and_a_count(go, monkeypatch, capsys):
    spoil(monkeypatch, *range(20, 32))
    options = {"train.max_steps": 32, "train.on_spike": "skip", "train.max_skips_in_a_row": 20}
    result = go(**options, **{"checkpoint.save_steps": 100})
    assert len(list(result.output_dir.glob("spike-*"))) == 10 and result.metrics["spikes"] == 12
    err = capsys.readouterr().err
    assert err.count("a spike: ") == 10 and "12 of 32 steps were spikes of the loss" in err


def test_preference_data_names_the_answer(home, tmp_path, monkeypatch):
    """Each answer of a pair is a document with a loss of its own."""
    rows = [json.loads(line) for line in (home / "rows.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": q["completion"]} for r, q in zip(rows, rows[1:])
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    spoil(monkeypatch, SPIKE)
    options = {"data.train_data": str(tmp_path / "pairs.jsonl"), "trainer_type": "dpo", "train.learning_rate": 1e-3}
    result = train(
        home, **OPTIONS | options | {"output_dir": str(tmp_path / "out"), "train.per_device_train_batch_size": 4}
    )
    _, *rows = rows_of(result.output_dir / "spike-step-00000008-rank-0.jsonl")
    assert sorted(row["row"].rpartition(", ")[2] for row in rows) == ["chosen"] * 4 + ["rejected"] * 4
    assert all(row["loss"] > 0 for row in rows)
