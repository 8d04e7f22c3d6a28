"""Learning-rate schedules against hand formulas and against transformers' own functions."""

import math

import pytest

from minisft.schedule import lr_factor, num_warmup_steps, total_steps

NAMES = ("linear", "cosine", "constant")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("warmup", [0, 1, 7, 100])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warms_up_to_the_peak_then_never_rises(name, warmup, floor):
    factors = [lr_factor(name, step, 100, warmup, floor) for step in range(101)]
    assert factors[:warmup] == [step / warmup for step in range(warmup)]
    after = factors[warmup:]
    assert after[0] == 1.0 or warmup == 100
    assert all(a >= b for a, b in zip(after, after[1:]))
    assert min(after) >= floor


def test_hand_values():
    # 10 steps, 2 of warm-up: step 6 is half way down
    assert [lr_factor("linear", s, 10, 2) for s in (0, 1, 2, 6, 9, 10)] == [0.0, 0.5, 1.0, 0.5, 0.125, 0.0]
    assert lr_factor("cosine", 6, 10, 2) == pytest.approx(0.5, abs=1e-15)
    assert lr_factor("cosine", 4, 10, 2) == pytest.approx((1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert lr_factor("cosine", 4, 10, 2, 0.2) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2, abs=1e-15)
    assert lr_factor("linear", 6, 10, 2, 0.2) == pytest.approx(0.6, abs=1e-15)
    assert [lr_factor("constant", s, 10, 2) for s in (0, 1, 2, 9)] == [0.0, 0.5, 1.0, 1.0]


def test_ends_and_stays_at_the_floor():
    for step in (10, 11, 1000):
        assert lr_factor("linear", step, 10, 2, 0.25) == 0.25
        assert lr_factor("cosine", step, 10, 2, 0.25) == 0.25


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
    }
    for name, make in peers.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        peer = make(optimizer)
        for step in range(20):
            ours = lr_factor(name, step, 20, warmup, 0.1 if name == "cosine" else 0.0)
            # the same formula in another order of operations: a few units in the last place of fp64
            assert ours == pytest.approx(peer.get_last_lr()[0], abs=1e-15)
            optimizer.step()
            peer.step()


def test_total_and_warmup_steps():
    assert total_steps(10, 3.0) == 30
    assert total_steps(10, 0.25) == 3  # the last epoch in part, rounded up
    assert total_steps(10, 3.0, max_steps=7) == 7
    assert num_warmup_steps(100, warmup_steps=9) == 9
    assert num_warmup_steps(100, warmup_ratio=0.031) == 4
    assert num_warmup_steps(100) == 0
