"""The mutants of tests/mutation.py: each is a file that Python reads, and another one; a sample of them is killed."""

import ast
import subprocess
import sys

import mutation
import pytest

SOURCE = b'''"""A lesson with 1 number."""

def f(x: int = 0, y: "list[1]" = None):
    """1"""
    assert x == 1
    if x < 2 and not y:
        raise ValueError(f"{x + 1}")
    x += 1
    y[1:x].sort()
    return min(x, 3) * -y
'''
BY_HAND = {
    (3, "0 -> (1)"), (6, "x < 2 and not y -> (x < 2 or not y)"), (6, "x < 2 -> (x <= 2)"), (6, "2 -> (3)"),
    (6, "not y -> (y)"), (8, "x += 1 -> x -= 1"), (8, "x += 1 -> pass"), (8, "1 -> (0)"), (9, "y[1:x].sort() -> pass"),
    (9, "y[1:x] -> (y[:x])"), (9, "y[1:x] -> (y[1:])"), (9, "1 -> (0)"), (10, "min(x, 3) * -y -> (min(x, 3) / -y)"),
    (10, "return min(x, 3) * -y -> return min(x, 3)"), (10, "min(x, 3) -> (max(x, 3))"), (10, "3 -> (4)"), (10, "-y -> (y)"),
}  # fmt: skip


def test_the_mutants_of_a_small_file_are_those_written_by_hand():
    made = mutation.mutants(SOURCE)
    assert {(m.line, m.told(SOURCE).replace("  ->  ", " -> ")) for m in made} == BY_HAND
    assert len(made) == len(BY_HAND)


def test_the_table_names_files_that_are_there():
    for file, tests in mutation.TESTS.items():
        assert (mutation.ROOT / file).is_file()
        assert all((mutation.ROOT / "tests" / f"test_{name}.py").is_file() for name in tests.split()), file


@pytest.mark.parametrize("file", ["minisft/schedule.py", "kernels/glu.py"])
def test_every_mutant_is_another_program_and_the_choice_repeats(file):
    source = (mutation.ROOT / file).read_bytes()
    original = ast.unparse(ast.parse(source))
    chosen = mutation.choose(file, source, 10, seed=0)
    assert chosen == mutation.choose(file, source, 10, seed=0) != mutation.choose(file, source, 10, seed=1)
    assert len({mutant.line for mutant in chosen}) == len(chosen) == 10
    for mutant in chosen:
        assert ast.unparse(ast.parse(mutant.text(source))) != original


@pytest.mark.slow
def test_a_sample_is_killed():
    """In files whose tests take seconds; `python tests/mutation.py` has the others."""
    files = ["minisft/schedule.py", "minisft/data/packing.py", "minisft/preference/losses.py", "kernels/rope.py"]
    command = [sys.executable, mutation.__file__, "--per-file", "6", "--files", *files]
    assert subprocess.run(command).returncode == 0
