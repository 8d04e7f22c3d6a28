"""Losses of small runs, step by step, as they were when they were recorded; and adapters resumed with every optimizer.

    python tests/test_trajectories.py       records them anew, after a change that is meant to change them

Each is compared elsewhere with a definition; here a change that nobody meant shows in a run as a whole.
"""

import json
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest
from test_resume import stop_after
from tiny import logged, train

from minisft.optimizers import OPTIMIZERS

GOLDEN = Path(__file__).parent / "golden" / "trajectories.json"
LORA = {"lora.r": 4, "lora.lora_alpha": 8.0, "train.max_steps": 8, "train.num_train_epochs": 9}
QLORA = LORA | {"model.load_in_4bit": True}
KINDS = {
    "full": {"train.max_steps": 8, "train.num_train_epochs": 9},
    "full, packed, bf16": {"train.max_steps": 8, "data.packing": True, "train.precision": "bf16"},
    "LoRA": LORA,
    "LoRA+, rsLoRA": LORA | {"lora.use_rslora": True, "lora.loraplus_lr_ratio": 4.0},
    "DoRA": LORA | {"lora.use_dora": True},
    "PiSSA": LORA | {"lora.init_lora_weights": "pissa"},
    "QLoRA nf4": QLORA,
    "QLoRA fp4, single": QLORA | {"model.bnb_4bit_quant_type": "fp4", "model.bnb_4bit_use_double_quant": False},
    "QLoRA int8": LORA | {"model.load_in_8bit": True},
}


def make_home(folder: Path) -> Path:
    """A folder with rows, a tokenizer, and a base model that was trained for an epoch."""
    train(folder, output_dir=str(folder / "first"), **{"train.num_train_epochs": 1})
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("trajectories"))


def go(home: Path, out: Path, **keys):
    base = {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    return train(home, output_dir=str(out), **base, **keys)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_recorded(home, tmp_path, kind):
    go(home, tmp_path / "out", **KINDS[kind])
    # fp32 sums in another order on another processor, over eight steps of a large learning rate; products of bf16.
    tolerance = 5e-3 if "bf16" in kind else 1e-4
    assert logged(tmp_path / "out") == pytest.approx(json.loads(GOLDEN.read_text())[kind], rel=tolerance)


# In test_optim.py every optimizer resumes whole weights; here those whose state differs most from a parameter's.
FEW = ("adamw_8bit", "adafactor", "muon", "schedule_free_adamw")


@pytest.mark.covers(1)
@pytest.mark.parametrize("optimizer", [pytest.param(o, marks=[] if o in FEW else pytest.mark.slow) for o in OPTIMIZERS])
@pytest.mark.parametrize("kind", ["LoRA", "QLoRA nf4"])
def test_an_adapter_resumes_to_the_same_bytes_with_every_optimizer(home, tmp_path, monkeypatch, kind, optimizer):
    constant = {"train.lr_scheduler_type": "constant"} if optimizer.startswith("schedule_free") else {}
    run = partial(go, home, **(KINDS[kind] | constant | {"train.optim": optimizer, "train.max_steps": 3}))
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 2, signal.SIGTERM)
        assert run(tmp_path / "stopped").exit_code == 75
    assert run(tmp_path / "stopped").exit_code == 0
    one, other = (tmp_path / out / "model" / "adapter_model.safetensors" for out in ("whole", "stopped"))
    assert one.read_bytes() == other.read_bytes()


def record() -> None:
    with tempfile.TemporaryDirectory() as name:
        home, recorded = make_home(Path(name)), {}
        for kind, keys in KINDS.items():
            go(home, home / kind.replace(" ", "_"), **keys)
            recorded[kind] = logged(home / kind.replace(" ", "_"))
    GOLDEN.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    record()
