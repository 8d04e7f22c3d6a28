"""Packing: the fast planner gives the packs of the plain reference, loses no token, and deals fairly."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.data.packing import pack, plan, ragged_arange
from minisft.data.packing_strategies import STRATEGIES, Strategy, first_fit, pack_ref
from minisft.errors import UserError

SHUFFLED_PATTERNS = ("bfd", "ffd", "bfd_split", "none")  # dealing keeps which lengths share a pack; wrapped cuts anew

# Documents up to twice as long as a pack; small numbers give many ties, which is where orders can differ.
problems = st.integers(1, 40).flatmap(
    lambda max_length: st.tuples(
        st.lists(st.integers(1, 2 * max_length), min_size=1, max_size=60),
        st.just(max_length),
    )
)


def size(piece):
    return piece[2] - piece[1]


def patterns(packs):
    """How often each combination of piece lengths occurs, whatever the order."""
    return Counter(tuple(sorted(size(piece) for piece in pack)) for pack in packs)


def check_conservation(lengths, max_length, made, packs):
    """Every token of every document is in exactly one piece or counted as cut, and no pack is too long."""
    kept = [min(n, max_length) if made.strategy in ("bfd", "ffd", "none") else n for n in lengths]
    tokens = Counter((d, t) for pack in packs.tolist() for d, start, end in pack for t in range(start, end))
    assert tokens == Counter((d, t) for d, n in enumerate(kept) for t in range(n))
    assert made.num_tokens == sum(kept) and made.num_cut == sum(lengths) - sum(kept)
    assert made.num_packs == len(packs) == len(packs.tolist())
    assert all(0 < sum(map(size, pack)) <= max_length for pack in packs.tolist())
    assert all(size(piece) > 0 for pack in packs.tolist() for piece in pack)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(problems, st.integers(0, 2**32))
def test_equals_the_reference_and_loses_nothing(strategy, problem, seed):
    lengths, max_length = problem
    made = plan(lengths, max_length, strategy)
    reference = pack_ref(lengths, max_length, strategy)
    assert made.deal(None).tolist() == reference
    dealt = made.deal(seed)
    check_conservation(lengths, max_length, made, made.deal(None))
    check_conservation(lengths, max_length, made, dealt)
    assert len(dealt) == len(reference)
    if strategy in SHUFFLED_PATTERNS:
        assert patterns(dealt.tolist()) == patterns(reference)


def test_an_entry_in_the_table_is_all_that_a_strategy_of_known_parts_needs(monkeypatch):
    monkeypatch.setitem(STRATEGIES, "ffd_split", Strategy("pieces", first_fit))
    made = plan([9, 3, 4, 1], 4, "ffd_split")
    assert made.deal().tolist() == [[(0, 0, 4)], [(0, 4, 8)], [(2, 0, 4)], [(1, 0, 3), (0, 8, 9)], [(3, 0, 1)]]
    check_conservation([9, 3, 4, 1], 4, made, made.deal(7))


@pytest.mark.parametrize("strategy", ["bfd", "ffd"])
def test_equals_the_reference_on_a_realistic_histogram(strategy):
    lengths = np.clip(np.random.default_rng(0).lognormal(4.0, 0.9, 1500).astype(int), 1, 512)
    assert pack(lengths, 512, strategy).tolist() == pack_ref(lengths.tolist(), 512, strategy)


def test_goldens():
    documents = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]]
    lengths = [len(document) for document in documents]

    def tokens(strategy):
        packs = pack(lengths, 4, strategy).tolist()
        return [[t for d, start, end in pack for t in documents[d][start:end]] for pack in packs]

    assert tokens("bfd") == tokens("ffd") == [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]]
    assert plan(lengths, 4, "bfd").num_cut == 1  # token 5
    assert tokens("bfd_split") == [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]]
    assert tokens("wrapped") == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]]
    assert tokens("none") == [[1, 2, 3, 4], [6, 7], [8, 9, 10], [11]]


def test_best_fit_takes_the_fullest_pack_and_first_fit_the_oldest():
    lengths = [5, 3, 3, 1]  # the 1 fits beside the 5 (2 free) and beside the two 3s (1 free)
    assert pack(lengths, 7, "bfd").tolist() == [[(0, 0, 5)], [(1, 0, 3), (2, 0, 3), (3, 0, 1)]]
    assert pack(lengths, 7, "ffd").tolist() == [[(0, 0, 5), (3, 0, 1)], [(1, 0, 3), (2, 0, 3)]]


@pytest.mark.parametrize("strategy", ["bfd", "ffd", "bfd_split"])
def test_documents_longer_than_half_cannot_share(strategy):
    # Two of them never fit into one pack, so one pack a document is the lower bound.
    lengths = np.random.default_rng(0).integers(513, 1025, size=5000)
    made = plan(lengths, 1024, strategy)
    assert made.num_packs == 5000
    assert made.fill == pytest.approx(lengths.sum() / (5000 * 1024), rel=1e-12)


def test_pairs_that_fill_a_pack_find_each_other():
    lengths = np.random.default_rng(0).integers(1, 512, size=2000)
    made = plan(np.concatenate([lengths, 1024 - lengths]), 1024, "bfd")
    assert made.fill == 1.0 and made.num_packs == 2000


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_a_document_of_many_packs(strategy):
    made = plan([1000, 7], 100, strategy)
    assert made.num_cut == 0 and made.num_packs == 11
    check_conservation([1000, 7], 100, made, made.deal(3))


def test_one_pack_may_be_larger_than_everything():
    assert pack([3, 5, 4], 10**12, "bfd").tolist() == [[(1, 0, 5), (2, 0, 4), (0, 0, 3)]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_dealing_is_a_pure_function_of_the_seed(strategy):
    lengths = np.random.default_rng(0).integers(1, 100, size=500)
    made = plan(lengths, 64, strategy)
    once, again = made.deal((7, 2**63, 0)), plan(lengths.tolist(), 64, strategy).deal((7, 2**63, 0))
    assert once.tolist() == again.tolist()
    assert once.tolist() != made.deal((7, 2**63, 1)).tolist()  # another epoch
    assert once.tolist() != made.deal((7, 2**62, 0)).tolist()  # other data
    assert pack(lengths, 64, strategy, seed=5).tolist() == made.deal(5).tolist()
    assert made.deal(None).tolist() == pack_ref(lengths.tolist(), 64, strategy)  # dealing left the plan alone


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_document_comes_to_every_place(strategy):
    # Twelve equal documents, two a pack: over 1000 seeds each is in each place about 83 times, with a standard
    # deviation of 8.7. So 45 to 130 is more than four of them: fair counts stay inside, a place never dealt does not.
    made = plan([5] * 12, 5 if strategy == "none" else 10, strategy)
    places = np.zeros((12, 12), dtype=int)
    for seed in range(1000):
        places[made.deal(seed).document, np.arange(12)] += 1
    assert places.min() > 45 and places.max() < 130


def test_packs_come_in_a_new_order():
    made = plan(np.arange(1, 101), 100, "bfd")  # all lengths differ: only the order of the packs can change
    first, second = made.deal(1).tolist(), made.deal(2).tolist()
    assert first != second and sorted(first) == sorted(second) == sorted(made.deal(None).tolist())


def test_arrays_have_the_promised_types():
    for strategy in STRATEGIES:
        for lengths in ([3, 9, 4], np.array([3, 9, 4], np.uint16), np.array([3, 9, 4], np.int32)):
            packs = pack(lengths, 5, strategy, seed=0)
            assert packs.document.dtype == packs.start.dtype == packs.end.dtype == np.int32
            assert packs.offsets.dtype == np.int64 and len(packs) == len(packs.offsets) - 1


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5)), max_size=10))
def test_ragged_arange(ranges):
    start, length = np.array(ranges, dtype=np.int32).reshape(-1, 2).T
    assert ragged_arange(start, length).tolist() == [a + i for a, n in ranges for i in range(n)]


def test_bad_input_is_refused_with_the_values():
    with pytest.raises(UserError, match=r"'best'(.|\n)*bfd_split"):
        plan([1, 2], 4, "best")
    for max_length in (0, -3):
        with pytest.raises(UserError, match=f"max_length is {max_length}"):
            plan([1, 2], max_length, "bfd")
    for strategy in STRATEGIES:
        with pytest.raises(UserError, match="no documents"):
            plan([], 4, strategy)
        with pytest.raises(ValueError, match="document 1 has length 0"):
            plan([3, 0, 2], 4, strategy)
        with pytest.raises(ValueError, match="document 2 has length -5"):
            plan([3, 1, -5], 4, strategy)
    with pytest.raises(ValueError, match="document 0 has length 2147483648"):
        plan([2**31], 4, "bfd")
    with pytest.raises(ValueError, match="float64"):
        plan([1.5, 2.0], 4, "bfd")
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        plan([[1, 2]], 4, "bfd")


def test_packing_needs_no_torch():
    code = "import sys, minisft.data.packing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
