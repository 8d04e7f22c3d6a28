"""`minisft evaluate FOLDER --tasks NAMES`: lm-evaluation-harness on a finished model.

The library is an extra. With it, here or beside the Python that MINISFT_LM_EVAL_PYTHON names, a task of our own is run offline.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny import settings, train
from tiny_models import stream

from minisft.__main__ import main
from minisft.data.tokenizer import load_tokenizer
from minisft.errors import DATA, MODEL
from minisft.model.load import load_model

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b", "cde"]
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [{"question": f"{'abc'[i % 3]}{'d' * (i % 4 + 1)}", "answer": i % 3} for i in range(9)]
CHOICES = ["a", "b", "cde"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    train(folder, **settings(folder, **{"train.max_steps": 4}))
    return folder / "out"


def test_without_the_library_the_error_names_the_extra(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(run), "--tasks", "hellaswag"]) == MODEL
    assert "pip install 'minisft[lm-eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, named",
    [
        ([], "--data FILE or --tasks"),
        (["--tasks", "a", "--data", "b"], "either --data FILE or --tasks"),
        (["--data", "rows.jsonl", "--limit", "3"], "--limit is of the tasks"),
        (["--tasks", "a", "--limit", "none"], "--limit none: expected a whole number"),
        (["--tasks", "a", "--precision", "fp32"], "--precision is not read beside --tasks"),
        (["--tasks", "a", "--device", "tpu"], "expected auto, cpu or cuda"),
    ],
)
def test_mistakes(words, named, run, capsys):
    assert main(["evaluate", str(run), *words]) == 2
    assert named in capsys.readouterr().err


@pytest.fixture
def library(monkeypatch):
    """Stands for the library: tells what it was asked, answers with `results` or fails."""
    asked, fake, tasks = {}, types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")

    class TaskManager:
        def __init__(self, include_path=None):
            asked["include_path"] = include_path

        def match_tasks(self, names):
            return [name for name in names if name != "unknown"]

    def simple_evaluate(**options):
        print("the library prints")
        asked.update(options)
        if "broken" in options["tasks"]:
            raise ConnectionError("no such\nhost")
        return {"results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.25, "f1,strict": 1.0}}}

    fake.simple_evaluate, fake.tasks, tasks.TaskManager = simple_evaluate, tasks, TaskManager
    monkeypatch.setitem(sys.modules, "lm_eval", fake)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    return asked


def test_what_the_library_is_asked_and_what_is_printed(run, library, capsys):
    words = [
        "--tasks",
        "t,u",
        "--limit",
        "5",
        "--num_fewshot",
        "0",
        "--batch_size=2",
        "--apply_chat_template",
        "--device",
        "cpu",
    ]
    assert main(["evaluate", str(run), *words, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"t": {"acc,none": 0.5, "acc_stderr,none": 0.25, "f1,strict": 1.0}}
    assert "the library prints" in printed.err
    expected = {
        "tasks": ["t", "u"],
        "limit": 5,
        "num_fewshot": 0,
        "batch_size": 2,
        "apply_chat_template": True,
        "device": "cpu",
    }
    assert {key: library[key] for key in expected} == expected and library["model"] == "hf"
    assert library["model_args"] == {"pretrained": str(run / "model"), "dtype": "auto", "trust_remote_code": False}
    assert main(["evaluate", str(run), "--tasks", "t"]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["task", "metric", "value", "stderr"], ["t", "acc", "0.5000", "0.2500"], ["t", "f1", "(strict)", "1.0000"],
    ]  # fmt: skip


def test_tasks_that_do_not_exist_or_fail(run, library, capsys):
    assert main(["evaluate", str(run), "--tasks", "t,unknown"]) == 2
    assert "no task unknown" in capsys.readouterr().err
    assert main(["evaluate", str(run), "--tasks", "broken"]) == DATA
    assert "ConnectionError: no such host" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_library_scores_as_the_definition(run, tmp_path):
    """The accuracy is that of the answer with the best log-probability, computed here from our own model."""
    python = os.environ.get("MINISFT_LM_EVAL_PYTHON")
    if python is None and importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed, and MINISFT_LM_EVAL_PYTHON names no Python that has it")
    rows = tmp_path / "questions.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "own.yaml").write_text(TASK.format(name="own", file=rows))
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    words = ["evaluate", str(run), "--tasks", "own", "--include_path", str(tmp_path), "--json", "--device", "cpu"]
    command = [python or sys.executable, "-m", "minisft", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["own"]["acc,none"]
    model, tokenizer = load_model(run / "model"), load_tokenizer(run / "model")

    def score(question: str, choice: str) -> float:
        ids, start = tokenizer.encode(question + choice), len(tokenizer.encode(question))
        position_ids, first, end = stream([len(ids)])
        with torch.no_grad():
            log_p = model.logits(model(torch.tensor(ids), position_ids, first, end)).log_softmax(-1)
        return sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))

    right = sum(max(range(3), key=lambda i: score(row["question"], CHOICES[i])) == row["answer"] for row in QUESTIONS)
    assert math.isclose(found, right / len(QUESTIONS), abs_tol=1e-9)
