"""`minisft evaluate`: means over exactly the tokens that are named, whatever the batch size and the packing."""

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import settings, train

from minisft.__main__ import main
from minisft.answers import open_model
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
    lines = said.splitlines()[-len(of_run) :]
    assert [line.split("  ")[0] for line in lines] == list(of_run)
    assert f"{of_run['all']['tokens']}" in lines[0] and "perplexity" in said
    assert max(map(len, lines)) <= 100


def test_mistakes_are_told(home, capsys):
    assert main(["evaluate", str(home / "out"), "--data", str(home / "nothing.jsonl")]) == 65
    assert main(["evaluate", str(home / "out"), "--data", str(home / "rows.jsonl"), "--max_lenght=3"]) == 2
    assert "max_length" in capsys.readouterr().err
    assert main(["evaluate", str(home / "out"), "--data", str(home / "rows.jsonl"), "other.toml"]) == 2
