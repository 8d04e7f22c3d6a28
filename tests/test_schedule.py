"""Learning-rate schedules against hand formulas and against transformers' own functions."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.schedule import (
    HAVE_NO_FLOOR,
    SCHEDULES,
    Plateau,
    after_evaluation,
    lr_factor,
    num_warmup_steps,
    total_steps,
    wrong_option,
)

FALLS = [name for name in SCHEDULES if name not in HAVE_NO_FLOOR and name != "reduce_on_plateau"]  # by the step alone


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 100])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warms_up_to_the_peak_then_never_rises(name, warmup, floor):
    factors = [lr_factor(name, step, 100, warmup, floor) for step in range(101)]
    start = floor if name == "warmup_stable_decay" else 0.0
    assert factors[:warmup] == pytest.approx([start + (1 - start) * step / warmup for step in range(warmup)], abs=1e-15)
    after = factors[warmup:]
    assert after[0] == 1.0 or warmup == 100
    assert all(a >= b for a, b in zip(after, after[1:]))
    assert min(after) >= floor or name in HAVE_NO_FLOOR


def test_hand_values():
    # 10 steps, 2 of warm-up: step 6 is half way down
    assert [lr_factor("linear", s, 10, 2) for s in (0, 1, 2, 6, 9, 10)] == [0.0, 0.5, 1.0, 0.5, 0.125, 0.0]
    assert lr_factor("cosine", 6, 10, 2) == pytest.approx(0.5, abs=1e-15)
    assert lr_factor("cosine", 4, 10, 2) == pytest.approx((1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert lr_factor("cosine", 4, 10, 2, 0.2) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert lr_factor("linear", 6, 10, 2, 0.2) == pytest.approx(0.6, abs=1e-15)
    assert [lr_factor("constant", s, 10, 2) for s in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", FALLS)
def test_ends_and_stays_at_the_floor(name):
    assert [lr_factor(name, step, 10, 2, 0.25) for step in (10, 11, 1000)] == [0.25] * 3


def test_options():
    assert [lr_factor("polynomial", s, 10, 2, power=2.0) for s in (2, 6, 10)] == [1.0, 0.25, 0.0]
    restarts = [lr_factor("cosine_with_restarts", s, 12, 0, num_cycles=3) for s in range(13)]
    assert restarts[0] == restarts[4] == restarts[8] == 1.0 and restarts[12] == 0.0
    assert restarts[2] == pytest.approx(0.5, abs=1e-15) and restarts[1:4] == pytest.approx(restarts[5:8], abs=1e-15)
    assert [lr_factor("inverse_sqrt", s, 100, 4) for s in (4, 16)] == [1.0, 0.5]
    assert lr_factor("inverse_sqrt", 28, 100, 4, timescale=8) == 0.5
    for kind, half in {"linear": 0.5, "cosine": 0.5, "1-sqrt": 1 - math.sqrt(0.5)}.items():
        decay = dict(decay_ratio=0.4, decay_type=kind)
        stable = [lr_factor("warmup_stable_decay", s, 20, 4, **decay) for s in range(4, 13)]
        assert stable == [1.0] * 9 and lr_factor("warmup_stable_decay", 16, 20, 4, **decay) == pytest.approx(half)


def test_a_stable_run_can_be_prolonged():
    """Until the decay begins, its learning rates do not depend on when the run will end."""
    short, long = ([lr_factor("warmup_stable_decay", s, total, 5) for s in range(90)] for total in (100, 1000))
    assert short == long


@pytest.mark.parametrize(
    "name, key, value, expected",
    [
        ("linear", "power", 2, "linear takes no options"),
        ("polynomial", "num_cycles", 2, "polynomial takes power"),
        ("polynomial", "power", 0, "power is a number above 0"),
        ("polynomial", "power", "2", "power is a number above 0"),
        ("cosine_with_restarts", "num_cycles", 1.5, "num_cycles is a whole number from 1 on"),
        ("cosine_with_restarts", "num_cycles", True, "num_cycles is a whole number from 1 on"),
        ("warmup_stable_decay", "decay_ratio", 1.2, "decay_ratio is above 0 and at most 1"),
        ("warmup_stable_decay", "decay_type", "sqrt", "decay_type is one of linear, cosine, 1-sqrt"),
        ("inverse_sqrt", "timescale", -1, "timescale is a number above 0"),
        ("inverse_sqrt", "timescale", None, ""),
        ("reduce_on_plateau", "min_lr", 1e-6, "it has a key of its own, train.min_lr"),
        ("reduce_on_plateau", "factor", 1, "factor is between 0 and 1"),
        ("reduce_on_plateau", "factor", 0, "factor is between 0 and 1"),
        ("reduce_on_plateau", "patience", 1.5, "patience is a whole number from 0 on"),
        ("reduce_on_plateau", "cooldown", -1, "cooldown is a whole number from 0 on"),
        ("reduce_on_plateau", "threshold", 0, ""),
        ("cosine_with_restarts", "num_cycles", 3, ""),
        ("warmup_stable_decay", "decay_type", "1-sqrt", ""),
    ],
)
def test_wrong_options_are_told(name, key, value, expected):
    assert wrong_option(name, key, value) == expected


def test_unknown_name_is_our_mistake():
    with pytest.raises(AssertionError, match="cosin"):
        lr_factor("cosin", 0, 10)


@pytest.mark.slow  # importing transformers takes seconds
@pytest.mark.parametrize("warmup", [0, 3])
def test_equals_transformers(warmup):
    import torch
    from transformers import optimization

    peers = {
        "linear": lambda o: optimization.get_linear_schedule_with_warmup(o, warmup, 20),
        "cosine": lambda o: optimization.get_cosine_with_min_lr_schedule_with_warmup(o, warmup, 20, min_lr_rate=0.1),
        "constant": lambda o: optimization.get_constant_schedule_with_warmup(o, warmup),
        "cosine_with_restarts": lambda o: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(
            o, warmup, 20, num_cycles=3
        ),
        "polynomial": lambda o: optimization.get_polynomial_decay_schedule_with_warmup(
            o, warmup, 20, lr_end=0.1, power=2.0
        ),
        "inverse_sqrt": lambda o: optimization.get_inverse_sqrt_schedule(o, warmup, timescale=7),
        "warmup_stable_decay": lambda o: optimization.get_wsd_schedule(
            o, warmup, 5, num_stable_steps=15 - warmup, decay_type="1-sqrt", min_lr_ratio=0.1
        ),
    }
    options = {
        "cosine": dict(min_factor=0.1),
        "cosine_with_restarts": dict(num_cycles=3),
        "polynomial": dict(min_factor=0.1, power=2.0),
        "inverse_sqrt": dict(timescale=7),
        "warmup_stable_decay": dict(decay_ratio=0.25, decay_type="1-sqrt", min_factor=0.1),
    }
    assert peers.keys() | {"reduce_on_plateau"} == SCHEDULES.keys()
    for name, make in peers.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        peer = make(optimizer)
        for step in range(20):
            ours = lr_factor(name, step, 20, warmup, **options.get(name, {}))
            # the same formula in another order of operations: a few units in the last place of fp64
            assert ours == pytest.approx(peer.get_last_lr()[0], abs=1e-15)
            optimizer.step()
            peer.step()


# ---- reduce_on_plateau --------------------------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {
        "factor": st.floats(0.1, 0.9),
        "patience": st.integers(0, 3),
        "threshold": st.sampled_from([0.0, 1e-4, 0.1]),
        "cooldown": st.integers(0, 3),
    }
)


def plateaus(losses, **options) -> list[Plateau]:
    """After each evaluation."""
    plateau, seen = Plateau(), []
    for loss in losses:
        plateau = after_evaluation(plateau, loss, 0, name="reduce_on_plateau", **options)
        seen.append(plateau)
    return seen


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.1, 10) | st.just(math.nan), max_size=30), OPTIONS, st.sampled_from([0.0, 0.3]))
def test_plateau_is_torchs(losses, options, floor):
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=floor, eps=0.0, **options)
    for loss, plateau in zip(losses, plateaus(losses, min_factor=floor, **options)):
        theirs.step(loss)
        assert plateau.factor == optimizer.param_groups[0]["lr"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), OPTIONS)
def test_plateau_never_rises_and_a_falling_loss_never_reduces(losses, options):
    factors = [p.factor for p in plateaus(losses, **options)]
    assert all(a >= b for a, b in zip([1.0, *factors], factors))
    falling = [0.8**i for i in range(len(losses))]
    assert plateaus(falling, **options)[-1].factor == 1.0


def test_evaluations_in_the_warm_up_and_of_other_schedules_change_nothing():
    plateau = Plateau(best=1.0, num_bad=10)
    assert after_evaluation(plateau, 2.0, 9, name="reduce_on_plateau", warmup_steps=10) == plateau
    assert after_evaluation(plateau, 2.0, 9, name="linear") == plateau
    assert after_evaluation(plateau, 2.0, 10, name="reduce_on_plateau", warmup_steps=10).factor == 0.1


def test_total_and_warmup_steps():
    assert total_steps(10, 3.0) == 30
    assert total_steps(10, 0.25) == 3  # the last epoch in part, rounded up
    assert total_steps(10, 3.0, max_steps=7) == 7
    assert num_warmup_steps(100, warmup_steps=9) == 9
    assert num_warmup_steps(100, warmup_ratio=0.031) == 4
    assert num_warmup_steps(100) == 0
