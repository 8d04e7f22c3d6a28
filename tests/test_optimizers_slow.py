"""Every optimizer but plain SGD learns the quickstart's tasks: about a minute each on two idle cores (`pytest -m slow`)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minisft.optimizers import OPTIMIZERS

ROOT = Path(__file__).resolve().parents[1]
# Beside the quickstart's own settings: cosine from 4e-3, beta2 0.95.
SETTINGS = {
    "adamw": [],
    "adamw_minisft": [],
    "adamw_8bit": [],
    "stable_adamw": [],
    "lion": ["--learning_rate", "1e-3"],
    "muon": [],
    "schedule_free_adamw": ["--lr_scheduler_type", "constant"],
    "adafactor": ["--learning_rate", "3e-2"],
}


def test_all_of_them_are_here():
    assert SETTINGS.keys() == OPTIMIZERS.keys() - {"sgd"}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_learns_the_quickstart(tmp_path, name):
    command = [sys.executable, "-m", "minisft.train", ROOT / "configs" / "quickstart.toml"]
    command += ["--output_dir", tmp_path / "out", "--optim", name, *SETTINGS[name]]
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # as a user runs it
    said = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    assert float(re.search(r"^  all +\d+ / \d+ +([\d.]+)%$", said, re.MULTILINE)[1]) >= 90
