"""The record of a run, and `minisft diff`: what went into a run is recorded, and every difference between two is found."""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import settings, train, write_rows

from minisft import record
from minisft.__main__ import main
from minisft.record import flat, read_record

RUN = {"train.max_steps": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    train(folder, **RUN)
    return folder


def differences(capsys, a: Path, b: Path) -> dict:
    capsys.readouterr()  # of the runs
    code = main(["diff", str(a), str(b), "--json"])
    found = json.loads(capsys.readouterr().out)
    kinds = {kind: list(value) for kind, value in found.items() if kind not in ("losses", "notes") and value}
    assert code == (1 if kinds or found["losses"]["part"] is not None else 0)
    return kinds


def test_a_start_records_what_went_into_it(finished):
    (start,) = read_record(finished / "out")
    assert start["step"] == 0 and start["base"] == {"name": "random weights"}
    assert list(start["data"]["train"]["files"]) == [str(finished / "rows.jsonl")]
    blocks = hashlib.sha256((finished / "rows.jsonl").read_bytes()).digest()
    assert start["data"]["train"]["files"][str(finished / "rows.jsonl")] == hashlib.sha256(blocks).hexdigest()
    assert {"torch", "numpy", "python", "minisft"} <= start["versions"].keys()
    assert start["machine"]["ranks"] == 1 and len(start["code"]["kernels"]) == 64


def test_a_resume_is_a_start_of_its_own_and_a_run_from_the_beginning_is_not(tmp_path):
    for options, steps in (({}, [0]), ({"train.max_steps": 5}, [0, 3]), ({"checkpoint.resume": "never"}, [0])):
        train(tmp_path, **{**RUN, **options})
        assert [start["step"] for start in read_record(tmp_path / "out")] == steps


def test_weights_are_hashed_once(finished, tmp_path, monkeypatch):
    """Ours by their manifest; of a plain folder once, and a resume takes the hash from the record."""
    base = {"model.config": None, "model.model_name_or_path": str(finished / "out" / "model")}
    digests = []
    counted = SimpleNamespace(
        sha256=hashlib.sha256, file_digest=lambda file, name: digests.append(1) or hashlib.file_digest(file, name)
    )
    monkeypatch.setattr(record, "hashlib", counted)
    train(finished, output_dir=str(tmp_path / "a"), **base, **RUN)
    assert digests == []
    plain = shutil.copytree(
        finished / "out" / "model", tmp_path / "plain", ignore=shutil.ignore_patterns("manifest.json")
    )
    base["model.model_name_or_path"] = str(plain)
    train(finished, output_dir=str(tmp_path / "b"), **base, **RUN)
    number = len(digests)
    assert number >= 2
    train(finished, output_dir=str(tmp_path / "b"), **base, **{"train.max_steps": 4})
    assert len(digests) == number
    weights = read_record(tmp_path / "b")[-1]["base"]["files"]["model.safetensors"]
    assert weights["sha256"] == hashlib.sha256((plain / "model.safetensors").read_bytes()).hexdigest()
    assert weights["sha256"] == read_record(tmp_path / "a")[-1]["base"]["files"]["model.safetensors"]["sha256"]


def test_the_same_run_elsewhere_differs_in_its_folder_alone(finished, tmp_path, capsys):
    train(finished, output_dir=str(tmp_path / "other"), **RUN)
    assert differences(capsys, finished / "out", tmp_path / "other") == {"other": ["output_dir"]}
    main(["diff", str(finished / "out"), str(tmp_path / "other")])
    assert "All logged values are the same up to step 3." in capsys.readouterr().out


def test_other_settings_are_named_with_where_they_came_from(finished, tmp_path, capsys):
    train(finished, output_dir=str(tmp_path / "b"), **{**RUN, "train.learning_rate": 1e-3, "train.seed": 1})
    found = differences(capsys, finished / "out", tmp_path / "b")
    assert found["decides"] == ["train.learning_rate", "train.seed"]
    main(["diff", str(finished / "out"), str(tmp_path / "b")])
    shown = capsys.readouterr().out
    assert "part at step 1" in shown and "0.001 (run())" in shown and max(map(len, shown.splitlines())) <= 120


def test_other_rows_of_the_same_name_are_found(finished, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", completion="another")
    options = {**RUN, "data.train_data": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "b")}
    train(finished, **options)
    found = differences(capsys, finished / "out", tmp_path / "b")
    assert set(found["data"]) == {"train file rows.jsonl", "train tokens"}


@pytest.mark.parametrize(
    "kind, name", [("versions", "torch"), ("machine", "threads"), ("code", "kernels"), ("tokenizer", "template")]
)
def test_whatever_differs_in_the_record_is_told(finished, tmp_path, capsys, kind, name):
    other = shutil.copytree(finished / "out", tmp_path / "copy")
    content = json.loads((other / "record.json").read_text())
    start = content["starts"][0]
    (start if name == "template" else start[kind])[name] = "another"
    (other / "record.json").write_text(json.dumps(content))
    assert differences(capsys, finished / "out", other) == {kind: [name]}
    (other / "record.json").unlink()
    assert differences(capsys, finished / "out", other) == {}


def test_the_time_of_a_file_and_its_folder_are_no_difference():
    a, b = (
        {
            "base": {"files": {"model.safetensors": {"sha256": "x", "time": time}}},
            "data": {"train": {"files": {path: "y"}}},
        }
        for time, path in ((1, "here/rows.jsonl"), (2, "there/rows.jsonl"))
    )
    assert flat(a) == flat(b) == {"base files model.safetensors sha256": "x", "data train file rows.jsonl": "y"}


def test_where_the_losses_part(finished, tmp_path, capsys):
    other = shutil.copytree(finished / "out", tmp_path / "copy")
    lines = (other / "metrics.jsonl").read_text().splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "loss": 1.25})
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["diff", str(finished / "out"), str(other)]) == 1
    shown = capsys.readouterr().out
    assert "The same up to step 1. The logged values part at step 2:" in shown and "B 1.25" in shown


def test_what_is_no_run_is_told(finished, tmp_path, capsys):
    assert main(["diff", str(finished / "out"), str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err
    assert settings(finished)["output_dir"] == str(finished / "out")
