"""Plans and packs that processes share are those that each would make, and are made once."""

import numpy as np
import pytest
from test_ranks import join, start_ranks
from tiny import logged, settings, start, train_quietly

from minisft.data import loader, shared_packs
from minisft.data.packing import Packs, Plan, plan
from minisft.data.packing_strategies import STRATEGIES
from minisft.data.shared_packs import folder_of, made_once, packs_of


def equal(a: Plan | Packs, b: Plan | Packs) -> bool:
    for name, value in vars(a).items():
        other = vars(b)[name]
        if isinstance(value, np.ndarray):
            if value.dtype != other.dtype or not np.array_equal(value, other):
                return False
        elif value != other:
            return False
    return True


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_shared_plan_is_the_plan(tmp_path, strategy):
    lengths = np.random.default_rng(0).integers(1, 90, 500)
    private = plan(lengths, 64, strategy)
    folder, makers = folder_of(tmp_path, lengths, 64, strategy), []

    def make() -> Plan:
        makers.append(1)
        return plan(lengths, 64, strategy)

    one, other = (made_once(folder, make, Plan) for _ in range(2))
    assert len(makers) == 1 and equal(one, private) and equal(other, private)
    for seed in ((1, 2, 0), (1, 2, 1), None):
        assert equal(packs_of(one, seed), private.deal(seed)) and equal(packs_of(other, seed), private.deal(seed))
        assert len(list(tmp_path.glob("plan-*-dealt-*"))) == 1  # of the seeds before none is left
    assert folder_of(tmp_path, lengths[::-1], 64, strategy) != folder


def test_what_a_killed_process_left_is_made_again(tmp_path):
    lengths = np.arange(1, 50)
    folder = folder_of(tmp_path, lengths, 64, "bfd")
    made_once(folder, lambda: plan(lengths, 64, "bfd"), Plan)
    (folder / "end.bin").write_bytes(b"half")
    assert equal(made_once(folder, lambda: plan(lengths, 64, "bfd"), Plan), plan(lengths, 64, "bfd"))


def share_all() -> None:
    loader.LEAST = 0


def test_two_ranks_that_share_their_packs_are_one(tmp_path):
    settings(tmp_path)
    keys = {"train.num_train_epochs": 2, "data.packing": True, "output_dir": str(tmp_path / "one")}
    keys |= {"train.per_device_train_batch_size": 4}
    two = keys | {"output_dir": str(tmp_path / "two"), "train.per_device_train_batch_size": 2}
    processes = [start(train_quietly, tmp_path, keys), *start_ranks(tmp_path, two, before=share_all)]
    assert join(processes, 120) == (0, 0, 0)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), rel=1e-5)  # as tests/test_ranks.py
    assert list((tmp_path / "token_cache").glob("plan-*")), (
        "one of the ranks shares, the other does not: the packs are equal"
    )
    assert shared_packs.LEAST > 1e6
