"""`minisft export CHECKPOINT OUT` writes a checkpoint as the run exports it, byte for byte."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_lora_run import LORA
from tiny import GPT2, MODEL, train

from minisft.__main__ import main
from minisft.answers import open_model
from minisft.errors import DATA
from minisft.errors import MODEL as MODEL_ERROR
from minisft.model.load import load_model


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    train(folder, output_dir=str(folder / "base"), **{"train.max_steps": 2})
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """All files but the manifest and the card."""
    others = ("manifest.json", "README.md")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in others]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


CASES = {
    "random, bf16": {"model.config": MODEL | {"tie_word_embeddings": True}, "checkpoint.save_dtype": "bf16"},
    "GPT-2": {"model.config": GPT2},
    "schedule-free": {"train.optim": "schedule_free_adamw", "train.lr_scheduler_type": "constant"},
    "a trained model, with new tokens and frozen layers": {
        "model.config": None,
        "model.new_special_tokens": ["<a>", "<b>"],
        "train.frozen": ["layers.1"],
        "checkpoint.save_dtype": "bf16",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_exported_as_the_run_exports_it(home, tmp_path, case):
    keys = {"train.max_steps": 3, **CASES[case]}
    if keys.get("model.config", MODEL) is None:
        keys["model.model_name_or_path"] = str(home / "base" / "model")
    train(home, output_dir=str(tmp_path / "run"), **keys)
    expected = files(tmp_path / "run" / "model")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "copy")]) == 0
    assert files(tmp_path / "copy") == expected
    step = tmp_path / "run" / "checkpoints" / "step-00000003"
    assert main(["export", str(step), str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == expected
    shutil.rmtree(tmp_path / "run" / "model")  # as if the run had not finished
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "newest")]) == 0
    assert files(tmp_path / "newest") == expected
    assert main(["export", str(step), str(tmp_path / "fp32"), "--dtype", "fp32"]) == 0
    asked = open_model(step).model  # by `generate`, `chat` and `evaluate`
    assert all(map(torch.equal, asked.parameters(), load_model(tmp_path / "fp32").parameters()))
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "out"))
    assert {weight.dtype for weight in wide.values()} == {torch.float32} and wide.keys() == narrow.keys()
    assert all(torch.equal(wide[name].to(weight.dtype), weight) for name, weight in narrow.items())
    assert main(["generate", str(tmp_path / "out"), "--prompt", "abc", "--max_new_tokens", "3"]) == 0
    assert main(["generate", str(step), "--prompt", "abc", "--max_new_tokens", "3"]) == 0


def test_what_is_no_checkpoint_is_refused_by_name(home, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path), out]) != 0
    assert main(["export", str(tmp_path / "nothing"), out]) == MODEL_ERROR
    base = {"model.config": None, "model.model_name_or_path": str(home / "base" / "model")}
    train(home, output_dir=str(tmp_path / "run"), **base, **LORA, **{"train.max_steps": 1})
    step = tmp_path / "run" / "checkpoints" / "step-00000001"
    assert main(["export", str(step), out]) == MODEL_ERROR
    assert f"{step} --merge" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "model")
    for option in ("--merge", "--gguf"):  # of a run that has not finished: the hint names what works
        assert main(["export", str(tmp_path / "run"), out, option]) == MODEL_ERROR
        assert f"name a folder of {tmp_path / 'run' / 'checkpoints'}" in capsys.readouterr().err
    assert main(["export", str(step), str(tmp_path / "merged"), "--merge"]) == 0
    weights = home / "base" / "checkpoints" / "step-00000002" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert main(["export", str(weights.parent), out]) == DATA
    weights.write_bytes(data)
    assert "Traceback" not in capsys.readouterr().err and not Path(out).exists()


def test_an_adapter_of_a_checkpoint_is_merged_as_that_of_the_run(home, tmp_path):
    """Schedule-free AdamW trains other weights than it exports."""
    keys = {"model.config": None, "model.model_name_or_path": str(home / "base" / "model"), **LORA}
    keys |= {"train.optim": "schedule_free_adamw", "train.lr_scheduler_type": "constant", "train.max_steps": 3}
    train(home, output_dir=str(tmp_path / "run"), **keys)
    for name, run in (("run", tmp_path / "run"), ("step", tmp_path / "run" / "checkpoints" / "step-00000003")):
        assert main(["export", str(run), str(tmp_path / f"of-{name}"), "--merge", "--dtype", "fp32"]) == 0
    assert files(tmp_path / "of-step") == files(tmp_path / "of-run")
