"""SFT, then DPO, from one file: `configs/quickstart-dpo.toml` as a user runs it (`pytest -m slow`, about a minute and a half)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import logged

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_quickstart_of_preferences_learns(tmp_path):
    """What is chosen for one prompt is rejected for another: only who heeds the prompt can tell (test_configs.py has that)."""
    command = [sys.executable, "-m", "minisft.train", ROOT / "configs" / "quickstart-dpo.toml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    second = tmp_path / "output" / "quickstart-dpo" / "2-dpo"
    accuracies = logged(second, "eval_rewards/accuracies")
    assert accuracies[-1] >= 0.95
    assert logged(second, "eval_rewards/margins")[-1] > 1
