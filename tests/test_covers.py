"""The mark covers(n), by which the normal run has fewer cases than all combinations (conftest.py)."""

from itertools import combinations, product
from types import SimpleNamespace

import pytest
from conftest import leave_the_rest_to_slow


class Case:
    """What pytest collects for one combination of a fixture's parameter, of y, and of z and w together."""

    nodeid = "test.py::test_it"

    def __init__(self, n, fixture, y, z_and_w):
        self.n, self.values, self.marks = n, (fixture, y, z_and_w), []
        self.callspec = SimpleNamespace(params={"fixture": fixture, "y": y, "z": z_and_w[0], "w": z_and_w[1]})

    def get_closest_marker(self, name):
        assert name == "covers"
        return SimpleNamespace(args=(self.n,))

    def iter_markers(self, name):
        assert name == "parametrize"
        return [SimpleNamespace(args=("z, w", ...)), SimpleNamespace(args=(["y"], ...))]

    def add_marker(self, name):
        self.marks.append(name)


def values_of_the_normal_run(n, *axes):
    cases = [Case(n, *values) for values in product(*axes)]
    leave_the_rest_to_slow(cases)
    assert all(case.marks in ([], ["slow"]) for case in cases)
    return [case.values for case in cases if not case.marks]


@pytest.mark.parametrize("n, most", [(1, 4), (2, 14), (3, 24)])
def test_any_n_values_meet(n, most):
    axes = [object(), object()], ["a", "b", "c"], [(0, 1), (0, 2), (1, 1), (1, 2)]

    def meetings(cases):
        return {meeting for values in cases for meeting in combinations(enumerate(values), n)}

    chosen = values_of_the_normal_run(n, *axes)
    assert meetings(chosen) == meetings(product(*axes)) and len(chosen) <= most


def test_values_are_used_equally_often():
    chosen = values_of_the_normal_run(1, range(9), "abc", [(0, 0)])
    assert sorted(y for _, y, _ in chosen) == sorted("abc" * 3)
