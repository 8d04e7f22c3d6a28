"""`minisft verify-resume`: its comparison finds every difference between two runs, and it passes for a run that resumes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import settings, train

from minisft.__main__ import main
from minisft.commands import verify_resume
from minisft.commands.verify_resume import compare
from minisft.config.values import as_toml

STEPS = 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    train(folder, max_steps=STEPS, output_dir=str(folder / "out"))
    return folder / "out"


@pytest.fixture
def two(finished, tmp_path) -> tuple[Path, Path]:
    shutil.copytree(finished, tmp_path / "copy")
    return finished, tmp_path / "copy"


def differences(two: tuple[Path, Path]) -> dict[str, str]:
    return {name: difference for name, _, difference in compare(*two, STEPS) if difference}


def checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / f"step-{STEPS:08d}"


def test_a_copy_is_the_same_run(two):
    assert differences(two) == {}
    assert [name for name, _, _ in compare(*two, STEPS)] == [
        "checkpoint: model.safetensors",
        "checkpoint: optimizer.safetensors",
        "exported: model.safetensors",
        "trainer_state.json",
        "metrics.jsonl",
    ]


@pytest.mark.parametrize("file", ["checkpoint: model", "checkpoint: optimizer", "exported: model"])
def test_one_bit_of_one_element_is_a_difference(two, file):
    where, _, name = file.partition(": ")
    path = (checkpoint(two[1]) if where == "checkpoint" else two[1] / "model") / f"{name}.safetensors"
    tensors = load_file(path)
    key = next(key for key, tensor in tensors.items() if tensor.ndim == 2)
    tensors[key].view(torch.int32).view(-1)[-1] ^= 1
    save_file(tensors, path, metadata={"parameters": "{}"})
    (told,) = differences(two).items()
    assert told[0] == f"{file}.safetensors" and told[1].startswith("1 differ, by at most ") and key in told[1]


@pytest.mark.parametrize("change", ["a tensor fewer", "another shape", "another dtype", "no file"])
def test_other_tensors_are_a_difference(two, change):
    path = checkpoint(two[1]) / "model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    if change == "a tensor fewer":
        del tensors[key]
    elif change == "another shape":
        tensors[key] = tensors[key][None]
    elif change == "another dtype":
        tensors[key] = tensors[key].double()
    save_file(tensors, path)
    if change == "no file":
        path.unlink()
    assert list(differences(two)) == ["checkpoint: model.safetensors"]


def test_state_and_metrics_are_compared(two):
    path = checkpoint(two[1]) / "trainer_state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "num_tokens": state["num_tokens"] + 1, "timings.jsonl": 0, "more": 1}))
    lines = (two[1] / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    lines[-1] = json.dumps({**last, "loss": last["loss"] * (1 + 1e-15)})
    (two[1] / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert differences(two) == {
        "trainer_state.json": "different: more, num_tokens",
        "metrics.jsonl": f"1 lines differ, the first at step {STEPS}: loss",
    }
    (two[1] / "metrics.jsonl").write_text(lines[0])
    assert "lines and 1" in differences(two)["metrics.jsonl"]


@pytest.mark.parametrize("words", [["--steps"], ["--steps=3"], ["--steps", "many"], ["--steps", "1e9"]])
def test_a_wrong_number_of_steps_is_told(words, capsys):
    assert main(["verify-resume", "run.toml", *words]) == 2
    assert "--steps" in capsys.readouterr().err


def test_an_interrupted_comparison_leaves_nothing(tmp_path, monkeypatch):
    values = settings(tmp_path, output_dir=str(tmp_path / "run"))
    (tmp_path / "run.toml").write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in values.items()))

    def verify(words, folder, steps):
        (folder / "whole.txt").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_resume, "verify", verify)
    assert main(["verify-resume", str(tmp_path / "run.toml")]) == 130
    assert not list(tmp_path.glob("run-verify-resume-*"))


@pytest.mark.slow  # four processes that import torch
def test_a_run_that_resumes_passes_and_one_that_cannot_fails(tmp_path, capfd):
    values = settings(tmp_path, output_dir=str(tmp_path / "run"))
    text = "".join(f"{key} = {as_toml(value)}\n" for key, value in values.items())
    (tmp_path / "run.toml").write_text(text)
    assert main(["verify-resume", str(tmp_path / "run.toml"), "--steps=40", "--logging_steps=1"]) == 0
    assert "A resumed run is the same run." in capfd.readouterr().out
    assert not list(tmp_path.glob("run-verify-resume-*")) and not (tmp_path / "run").exists()
