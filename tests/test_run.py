"""The whole engine on real data, and what a user does with what it leaves: generate, load elsewhere, call from Python."""

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from tiny import GPT2, MODEL, logged, parts, settings, train

from minisft import __main__ as commands
from minisft.atomic_folder import read_manifest
from minisft.commands import generate
from minisft.config.load import load
from minisft.config.stages import Stage
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.errors import MODEL as MODEL_ERROR
from minisft.errors import UserError
from minisft.loop import Result
from minisft.model.load import load_model
from minisft.prepare.look import look_for_models
from minisft.train import run

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.toml"


def config(shared_data: Path, folder: Path) -> dict:
    """A dict shaped like a configuration file: three real sources of three formats."""
    return {
        "output_dir": str(folder / "out"),
        "model": {
            "tokenizer_name_or_path": str(folder / "tokenizer"),
            "config": MODEL | {"vocab_size": 600, "hidden_size": 64, "max_position_embeddings": 512},
        },
        "data": {
            "train_data": [
                str(shared_data / "gsm8k_train.jsonl[:300]"),
                str(shared_data / "alpaca_en_demo.json[:200]"),
                str(shared_data / "glaive_toolcall_en_demo.json[:60]"),
            ],
            "eval_fraction": 0.02,
            "max_length": 512,
            "packing": True,
        },
        "train": {"learning_rate": 1e-2, "max_steps": 5, "per_device_train_batch_size": 4, "device": "cpu"},
        "log": {"logging_steps": 1, "progress_bar": False},
    }


@pytest.fixture(scope="module")
def trained(shared_data, tmp_path_factory) -> tuple[Result, str]:
    """A short run on real data, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    names = ("gsm8k_train.jsonl", "alpaca_en_demo.json", "glaive_toolcall_en_demo.json")
    texts = [(shared_data / name).read_text(encoding="utf-8")[:200_000] for name in names]
    train_tokenizer(texts, vocab_size=600).save(folder / "tokenizer")
    said = StringIO()
    with redirect_stdout(said):
        result = run(config(shared_data, folder), precision="fp32")
    return result, said.getvalue()


# ---- real data --------------------------------------------------------------------------------------------------


def test_the_loss_on_real_data_is_finite_and_falls(trained):
    losses = logged(trained[0].output_dir)
    assert len(losses) == 5
    assert losses[0] == pytest.approx(torch.tensor(600.0).log().item(), rel=0.1)  # knows nothing: log(vocabulary)
    assert losses[-1] < losses[0] - 0.5
    assert trained[0].metrics["eval_loss"] < losses[0] - 0.5


def test_the_summary_accounts_for_every_row_and_token(trained):
    said = trained[1]
    for line in (
        "trainer    sft on cpu, fp32",
        "gsm8k_train.jsonl[:300]: question_answer",
        "alpaca_en_demo.json[:200]: instruction",
        "glaive_toolcall_en_demo.json[:60]: sharegpt",
        "max_steps = 5",
    ):
        assert line in said, line
    rows, tokens = (numbers_in(re.search(f"{what}: .*", said)[0]) for what in ("rows", "tokens"))
    read, used, dropped, *reasons = rows
    assert read == 300 + 200 + 60 == used + dropped
    assert dropped == sum(reasons)  # "3 with nothing to train after the cut"
    assert tokens[0] == sum(tokens[1:]) and tokens[1] > 0


def numbers_in(line: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", line)]


def test_the_output_folder_holds_what_the_end_says(trained):
    result, said = trained
    assert (result.exit_code, result.step, result.model_dir) == (0, 5, result.output_dir / "model")
    listed = re.findall(r"^  (\S+) {2,}\S", said[said.index(f"{result.output_dir}/\n") :], re.MULTILINE)
    assert sorted(listed) == sorted(
        path.name + "/" * path.is_dir() for path in result.output_dir.iterdir() if path.name != ".lock"
    )
    assert f"python -m minisft generate {result.output_dir} " in said


# ---- what is done with the model --------------------------------------------------------------------------------


def test_generate_answers(trained, capsys, monkeypatch):
    out = str(trained[0].output_dir)
    few = ["--max_new_tokens", "8"]
    assert commands.main(["generate", out, "--prompt", "What is 2 + 3?", "--prompt", "Hi!", *few]) == 0
    answers = capsys.readouterr().out
    assert generate.main([out + "/model", "--prompt", "What is 2 + 3?", "--prompt", "Hi!", *few]) == 0
    assert capsys.readouterr().out == answers != "\n\n"
    monkeypatch.setattr(sys, "stdin", StringIO("What is 2 + 3?\nHi!\n"))
    assert generate.main([out, *few]) == 0
    assert capsys.readouterr().out == answers


@pytest.mark.parametrize(
    "template, layout, row, prompt",
    [
        (
            None,
            "instruction",
            {"question": (question := "How many legs do 3 <|im_end|> have?"), "answer": "12"},
            question,
        ),
        ("chatml", "chat", {"question": question, "answer": "12"}, question),
        (None, "plain", {"prompt": f"{question}\n", "completion": "12"}, f"{question}\\n"),
    ],
)
def test_generate_asks_as_the_training_data_did(tmp_path, capsys, monkeypatch, template, layout, row, prompt):
    """A question becomes the tokens that stood before its answer in training; it is the one that the last page shows."""
    train_tokenizer([], vocab_size=259, chat_template=template).save(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    options = {"data.max_length": 256, "train.max_steps": 1, "data.control_tokens": "escape"}
    result = train(tmp_path, **options)
    ready, _ = parts(tmp_path, **options)
    (batch,) = ready.train.step(0, 0)
    asked = read_manifest(result.model_dir)["prompt"]
    assert f"generate {result.output_dir} --prompt '{prompt}'\n" in capsys.readouterr().out
    asked_with = []
    monkeypatch.setattr("minisft.generation.generate", lambda model, ids, **options: asked_with.extend(ids) or [[1]])
    assert generate.main([str(result.output_dir), "--prompt", prompt]) == 0
    assert asked == layout
    listed = json.loads((result.model_dir / "generation_config.json").read_text())["eos_token_id"]
    assert set(listed) == load_tokenizer(result.model_dir).stop_ids  # whoever serves it stops where the answers ended
    assert asked_with == [batch.input_ids[: batch.loss_rows[0] + 1].tolist()]


def test_generate_in_a_folder_without_a_model(tmp_path):
    with pytest.raises(UserError, match="holds no model") as caught:
        generate.main([str(tmp_path), "--prompt", "Hi!"])
    assert caught.value.exit_code == MODEL_ERROR
    with pytest.raises(UserError, match="nowhere is no folder"):
        generate.main([str(tmp_path / "nowhere"), "--prompt", "Hi!"])
    for stage in ("1-sft", "9-sft", "10-dpo", "11-dpo"):
        (tmp_path / "stages" / stage / "model").mkdir(parents=True)
        if stage != "11-dpo":  # it has not finished
            (tmp_path / "stages" / stage / "model" / "config.json").touch()
    with pytest.raises(UserError, match="the runs of several stages") as caught:
        generate.main([str(tmp_path / "stages"), "--prompt", "Hi!"])
    assert caught.value.hint == f"name one of them, as {tmp_path / 'stages' / '10-dpo'}"
    for name in ("step-00000002", "step-00000010", "step-00000012.replaced-1"):  # a run that has not finished
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "adapter_config.json").touch()
    (tmp_path / "checkpoints" / "step-00000012").mkdir()  # which a kill may leave
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UserError, match="has not finished") as caught:
            generate.main([str(folder), "--prompt", "Hi!"])
        assert caught.value.hint.endswith(f"checkpoint, {tmp_path / 'checkpoints' / 'step-00000010'}")
    keys = {"model.config": None, "model.model_name_or_path": str(tmp_path)}
    with pytest.raises(UserError, match=r"model.model_name_or_path = .* has not finished"):
        look_for_models(Stage("", load(None, settings(tmp_path, **keys))[0], {}), [])


def test_transformers_loads_the_model(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained[0].model_dir
    text = "<|im_start|>user\nHow many apples are 2 + 3?<|im_end|>\n"
    ids = load_tokenizer(folder).encode(text)
    assert AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids == ids
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ids, n = torch.tensor(ids), len(ids)
    positions, start = torch.arange(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    with torch.no_grad():
        ours = load_model(folder)
        logits = ours.logits(ours(ids, positions, start, torch.full_like(start, n)))
        # two implementations round in another order: a few ulp of fp32 through two layers
        torch.testing.assert_close(logits, theirs(ids[None]).logits[0], rtol=1e-4, atol=1e-5)


# ---- from Python ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize(
    "key, prompt", [("generate_data", "a" * 60), ("sample_steps", None)], ids=["held out", "sampled"]
)
def test_a_prompt_without_room_for_its_answer_is_refused_before_the_first_step(tmp_path, key, prompt):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": prompt, "completion": "b"}) + "\n")
    value = 4 if prompt is None else str(tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match=rf"evaluate\.{key}: prompt 0 has \d+ tokens; 64 more exceed the model's 64"):
        train(tmp_path, **{"model.config": GPT2, f"evaluate.{key}": value, "evaluate.max_new_tokens": 64})
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("stream", [False, True])
def test_documents_beyond_the_learned_positions_are_refused_before_the_first_step(tmp_path, stream):
    rows = [{"text": "a" * 20}, {"text": "a" * 70}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"model.config": GPT2, "data.max_length": None, "train.max_steps": 1, "data.stream": stream}
    with pytest.raises(UserError, match='data.max_length = "none": .* and the model has 64 positions'):
        train(tmp_path, **keys, **{"data.train_data": str(tmp_path / "long.jsonl")})
    if not stream:  # rows of up to 40 tokens
        assert train(tmp_path, **keys).step == 1


def test_run_from_python_takes_short_and_full_names(tmp_path):
    result = run(settings(tmp_path), max_steps=2, **{"train.learning_rate": 1e-3, "log.run_name": "mine"})
    assert result.step == 2 and result.metrics["learning_rate"] == 5e-4  # linear: half of the peak at the second step
    assert result.metrics["loss"] == logged(result.output_dir)[-1]
    resolved = (result.output_dir / "config.toml").read_text()
    assert "learning_rate = 0.001" in resolved and 'run_name = "mine"' in resolved


# ---- the quickstart ---------------------------------------------------------------------------------------------


def test_the_quickstart_s_data():
    """Rows of at least five kinds, and no held-out prompt is trained."""
    train, held_out = (
        [json.loads(line) for line in (QUICKSTART.parent / "quickstart" / name).read_text().splitlines()]
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert len({row["kind"] for row in held_out}) >= 5
    assert not {row["prompt"] for row in held_out} & {row["prompt"] for row in train}


def test_the_quickstart_starts(tmp_path, capsys):
    (tmp_path / "few.jsonl").write_text(
        "".join(f'{{"prompt": "Last: ab{i}\\\\n", "completion": "{i}", "kind": "{i}"}}\n' for i in range(2))
    )
    rows = QUICKSTART.parent / "quickstart" / "train.jsonl[:3000]"
    keys = {"max_steps": 2, "train_data": rows, "generate_data": tmp_path / "few.jsonl"}
    result = run(QUICKSTART, output_dir=tmp_path / "out", **keys)
    said = capsys.readouterr().out
    rate = result.metrics["eval_exact_match"]  # a metric like the others
    assert result.step == 2 and logged(result.output_dir, "eval_exact_match") == [rate] and 0 <= rate <= 1
    assert "exact match on held-out prompts:" in said and f"exact match {rate:.1%}" in said.splitlines()[-1]
    assert "control token" not in said and all(len(line) <= 100 or "/" in line for line in said.splitlines())  # paths


@pytest.mark.slow
def test_the_quickstart_learns(tmp_path):
    command = [sys.executable, "-m", "minisft.train", QUICKSTART, "--output_dir", tmp_path / "out"]
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # as a user runs it
    said = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout
    rates = dict(re.findall(r"^  (\w+) +\d+ / \d+ +([\d.]+)%$", said, re.MULTILINE))
    assert len(rates) >= 6 and float(rates.pop("all")) >= 90
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert rates.keys() == {sample["group"] for sample in samples}
