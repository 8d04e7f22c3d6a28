"""`minisft evaluate`: means over exactly the tokens that are named, whatever the batch size and the packing."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny import settings, train

from minisft.__main__ import main
from minisft.answers import open_model
from minisft.commands.evaluate import configuration
from minisft.config.load import load
from minisft.data.kinds import TOKEN_KINDS
from minisft.data.tokenizer import train_tokenizer
from minisft.prepare.data import prepare_data
from minisft.prepare.options import prepare_tokenizer

LONG = {"data.max_length": 256}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    train_tokenizer([], vocab_size=259, chat_template="chatml").save(folder / "tokenizer")
    rows = [{"question": f"{i}?", "answer": f"{i * i}"} for i in range(12)]
    talks = [
        {"messages": [{"role": role, "content": f"{i} {role}"} for role in ("user", "assistant") * 2]} for i in range(5)
    ]
    for name, some in (("rows", rows), ("talks", talks)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    settings(folder)
    train(folder, **LONG, **{"train.max_steps": 3})
    return folder


def evaluated(capsys, *words: str) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *words, "--json", "--precision=fp32"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_evaluation_writes_nothing_beside_the_run(home, capsys):
    """Its folder may be read-only, or somebody else's."""
    before = sorted(home.rglob("*"))
    evaluated(capsys, str(home / "out"), "--data", str(home / "rows.jsonl[:5]"))
    assert sorted(home.rglob("*")) == before


@torch.no_grad()
def definition(home: Path, files: list[str]) -> dict:
    """Each document alone, soft-max over whole logits in fp64."""
    config, _ = load({}, settings(home, **LONG, **{"data.train_data": files, "train.per_device_train_batch_size": 1}))
    loader = prepare_data(config, prepare_tokenizer(config)[0])[0]
    model, groups = open_model(home / "out").model.double(), {}
    for step in range(loader.steps_per_epoch):
        (batch,) = loader.step(0, step)
        hidden = model(batch.input_ids, batch.position_ids, batch.start, batch.end)
        log_p = model.logits(hidden[batch.loss_rows[: batch.num_targets]]).log_softmax(-1)
        last_row = None
        for i, row in enumerate(batch.loss_rows[: batch.num_targets].tolist()):
            nll, p = -log_p[i, batch.targets[i]].item(), log_p[i].exp()
            value = (nll, float(log_p[i].argmax() == batch.targets[i]), -(p * log_p[i]).sum().item(), math.exp(-nll))
            kind = TOKEN_KINDS[batch.row_kind[i]]
            source = Path(loader.documents.cache.sources[batch.row_source[i]].label).name
            first = ["first_token"] if row - 1 != last_row else []
            last_row = row
            for name in ("all", kind, f"source {source}", *first):
                groups.setdefault(name, []).append(value)
    means = {}
    for name, values in groups.items():
        loss, accuracy, entropy, probability = (sum(column) / len(values) for column in zip(*values))
        means[name] = {"tokens": len(values), "loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}
        means[name] |= {"entropy": entropy, "probability": probability}
    return means


@pytest.mark.parametrize("more", [[], ["--packing", "--per_device_train_batch_size=3"]], ids=["rows", "packs"])
def test_every_part_is_the_mean_over_its_tokens(home, capsys, more):
    files = [str(home / "rows.jsonl"), str(home / "talks.jsonl")]
    found = evaluated(capsys, str(home / "out"), "--data", files[0], "--data", files[1], *more)
    expected = definition(home, files)
    assert found.keys() == expected.keys() >= {"all", "answer", "terminator", "first_token"}
    assert found["first_token"]["tokens"] == 12 + 2 * 5
    for part, means in expected.items():
        for key, value in means.items():  # fp32 against fp64
            assert found[part][key] == pytest.approx(value, rel=1e-4), (part, key)


def test_a_model_folder_without_a_run_and_a_table(home, capsys):
    data = str(home / "rows.jsonl")
    of_run = evaluated(capsys, str(home / "out"), "--data", data)
    assert not any(name.startswith("source") for name in of_run)  # there is one
    (home / "alone").symlink_to(home / "out" / "model")
    assert evaluated(capsys, str(home / "alone"), "--data", data) == of_run
    assert main(["evaluate", str(home / "out"), "--data", data, "--precision=fp32"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("data  ") and "tokens built" not in said  # in a folder that is gone
    lines = said.splitlines()[-len(of_run) :]
    assert [line.split("  ")[0] for line in lines] == list(of_run)
    assert f"{of_run['all']['tokens']}" in lines[0] and "perplexity" in said
    assert max(map(len, lines)) <= 100


def test_all_rows_and_the_chosen_answers_count_whatever_the_run_was(home, capsys, tmp_path):
    """The configuration of a stream has the rows of its first chunk, that of preference tuning both answers of a pair."""
    text = (home / "out" / "config.toml").read_text()
    streamed = (("stream = false", "stream = true"), ("stream_rows = 100000", "stream_rows = 2"))
    for name, changes in (("stream", streamed), ("dpo", (('trainer_type = "sft"', 'trainer_type = "dpo"'),))):
        (tmp_path / name).mkdir()
        changed = text
        for old, new in changes:
            assert f"\n{old}" in changed
            changed = changed.replace(f"\n{old}", f"\n{new}")
        (tmp_path / name / "config.toml").write_text(changed)
        (tmp_path / name / "model").symlink_to(home / "out" / "model")
    rows = [{"question": f"{i}?", "answer": f"{i * i}"} for i in range(12)]
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "no idea"} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    expected = evaluated(capsys, str(home / "out"), "--data", str(home / "rows.jsonl"))
    for run in ("stream", "dpo"):
        assert evaluated(capsys, str(tmp_path / run), "--data", str(home / "rows.jsonl")) == expected
    pairs = [
        evaluated(capsys, str(run), "--data", str(tmp_path / "pairs.jsonl")) for run in (tmp_path / "dpo", home / "out")
    ]
    assert pairs[0] == pairs[1] and pairs[0]["terminator"]["tokens"] == 12


def test_an_option_is_used_or_refused(home, capsys, tmp_path):
    shutil.copytree(home / "out" / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    words = [str(tmp_path / "model"), "--data", str(home / "talks.jsonl")]
    assert main(["evaluate", *words]) == 2
    assert "set chat_template" in capsys.readouterr().err
    assert evaluated(capsys, *words, "--chat_template=chatml") == evaluated(capsys, str(home / "out"), *words[1:])
    for option in ("--learning_rate=1", "--max_steps=3", "--per_device_eval_batch_size=1", "--eval_fraction=0.1"):
        assert main(["evaluate", *words, option]) == 2
        assert "on the command line: evaluate does not read it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "keys",
    [
        {"data.eval_fraction": 0.2, "evaluate.eval_steps": 1, "evaluate.load_best_model_at_end": True},
        {"data.eval_fraction": 0.2, "evaluate.eval_steps": 1, "train.lr_scheduler_type": "reduce_on_plateau"},
    ],
    ids=["best", "plateau"],
)
def test_a_run_that_needs_evaluation_data_is_evaluated_on_all_rows(home, tmp_path, capsys, keys):
    (tmp_path / "tokenizer").symlink_to(home / "tokenizer")
    train(tmp_path, **LONG, **{"train.max_steps": 2}, **keys)
    data = str(home / "rows.jsonl")
    of_run = evaluated(capsys, str(tmp_path / "out"), "--data", data)
    assert of_run["first_token"]["tokens"] == 12
    assert of_run == evaluated(capsys, str(tmp_path / "out" / "model"), "--data", data)


def test_a_run_is_evaluated_with_the_packing_of_its_evaluation(home, capsys, tmp_path):
    """A document of more than max_length tokens is cut, or packed in pieces."""
    text = (home / "out" / "config.toml").read_text()
    for old, new in (
        ("max_length = 256", "max_length = 8"),
        ("packing = false", "packing = true"),
        ('packing_strategy = "bfd"', 'packing_strategy = "wrapped"'),
        ('eval_packing = "none"', "eval_packing = false"),
    ):
        assert f"\n{old}" in text
        text = text.replace(f"\n{old}", f"\n{new}")
    (tmp_path / "config.toml").write_text(text)
    (tmp_path / "model").symlink_to(home / "out" / "model")
    (tmp_path / "long.jsonl").write_text('{"text": "a text that is longer"}\n')
    words = [str(tmp_path), "--data", str(tmp_path / "long.jsonl"), "--max_cut_answer=1"]
    of_run, packed = evaluated(capsys, *words), evaluated(capsys, *words, "--packing")
    assert of_run["all"]["tokens"] == 7 < packed["all"]["tokens"]
    assert packed == evaluated(capsys, *words, "--eval_packing=none")


def test_a_checkpoint_and_what_is_exported_of_it_are_evaluated_as_trained(home, capsys, tmp_path):
    short = {"data.max_length": 24, "data.control_tokens": "escape", "train.max_steps": 1, "audit.max_lost_answer": 1.0}
    train(home, output_dir=str(tmp_path / "out"), **short)
    words = "--data", str(home / "rows.jsonl"), "--max_lost_answer=1"
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    of_run = evaluated(capsys, str(tmp_path / "out"), *words)
    uncut = evaluated(capsys, str(tmp_path / "out"), *words, "--max_length=64")
    assert of_run["all"]["tokens"] < uncut["all"]["tokens"]
    assert evaluated(capsys, str(checkpoint), *words) == of_run
    (tmp_path / "elsewhere").mkdir()
    assert main(["export", str(checkpoint), str(tmp_path / "elsewhere" / "model")]) == 0
    assert evaluated(capsys, str(tmp_path / "elsewhere" / "model"), *words) == of_run
    copied = shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoint")
    assert configuration(copied, [words[1]], {}, str(tmp_path)).data.control_tokens == "escape"


def test_mistakes_are_told(home, capsys):
    assert main(["evaluate", str(home / "out"), "--data", str(home / "nothing.jsonl")]) == 65
    assert main(["evaluate", str(home / "out"), "--data", str(home / "rows.jsonl"), "--max_lenght=3"]) == 2
    assert "max_length" in capsys.readouterr().err
    assert main(["evaluate", str(home / "out"), "--data", str(home / "rows.jsonl"), "other.toml"]) == 2
