"""No run is lost: the experiments of tests/reliability.py in full, and the page of promises, which quotes what they found."""

import re
import shlex
from pathlib import Path

import pytest
import reliability

from benchmarks import report
from minisft.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", reliability.EXPERIMENTS)
def test_in_full(name):
    result = reliability.measure(name)
    reliability.record(name, result)
    assert result["failures"] == []


def test_every_command_that_the_page_of_promises_names_exists():
    commands = re.findall(r"`(python -m pytest [^`]+|minisft [^`]+)`", report.PROMISES.read_text(encoding="utf-8"))
    assert len(commands) > 20
    for command in commands:
        words = shlex.split(command)
        if words[0] == "minisft":
            assert words[1] in COMMANDS, command
            continue
        for selected in [word for word in words if word.startswith("tests/")]:
            file, _, test = selected.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert f"def {test.partition('[')[0] or 'test_'}" in text, selected
        if "-k" in words:
            names = re.findall(r"\w+", words[words.index("-k") + 1])
            tests = re.findall(r"def (test_\w+)", text)
            assert all(name == "or" or any(name in test for test in tests) for name in names), command
