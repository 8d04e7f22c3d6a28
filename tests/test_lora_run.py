"""Adapters in whole runs: what trains, what is saved, resumed, generated from and merged."""

import json
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import stop_after
from tiny import logged, parts, settings, train

from minisft.commands import export, generate
from minisft.errors import UserError
from minisft.model.load import load_model
from minisft.model.start import load_adapted
from minisft.units import size

LORA = {"lora.r": 4, "lora.lora_alpha": 8, "lora.lora_dropout": 0.1, "train.learning_rate": 1e-2}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with rows, a tokenizer, and a base model that was trained for an epoch."""
    folder = tmp_path_factory.mktemp("lora")
    train(folder, output_dir=str(folder / "first"), **{"train.num_train_epochs": 1})
    return folder


@pytest.fixture
def go(home, tmp_path):
    """A function that trains an adapter, in the same output folder at every call of one test."""
    base = {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    return partial(train, home, output_dir=str(tmp_path / "out"), **base, **LORA)


def adapter(out: Path) -> bytes:
    return (out / "model" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(home) -> Path:
    base = {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    train(home, output_dir=str(home / "adapted"), **base, **LORA)
    return home / "adapted"


def test_the_adapter_learns_and_is_all_that_is_written(trained, home):
    losses = logged(trained)
    assert losses[-1] < losses[0]
    names = {path.name for path in (trained / "model").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    config = json.loads((trained / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "first" / "model")
    assert config["target_modules"] == sorted(config["target_modules"])


def test_only_adapters_are_in_the_optimizer(home):
    base = {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    run, _ = parts(home, **base, **LORA)
    inside = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert inside == {id(p) for name, p in run.model.named_parameters() if ".lora_" in name}
    summary = "\n".join(run.summary)
    adapter_size = sum(p.nbytes for p in run.model.parameters() if p.requires_grad)
    assert re.search(r"adapter will have (\S+ \w+)", summary)[1] == size(adapter_size)


def test_a_stopped_run_ends_in_the_same_bytes(go, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 6, signal.SIGTERM)
        assert go().exit_code == 75
    assert go().exit_code == 0
    assert adapter(tmp_path / "out") == adapter(trained)
    assert logged(tmp_path / "out") == logged(trained)


def test_pissa_and_rows_of_new_tokens_in_a_stopped_run(go, home, tmp_path, monkeypatch):
    more = {
        "lora.init_lora_weights": "pissa",
        "lora.lora_dropout": 0.0,
        "model.new_special_tokens": ["<think>", "<|done|>"],
    }
    whole = partial(go, **more)
    assert whole(output_dir=str(tmp_path / "whole")).exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6, signal.SIGTERM)
        assert whole().exit_code == 75
    assert whole().exit_code == 0
    assert adapter(tmp_path / "out") == adapter(tmp_path / "whole")
    config = json.loads((tmp_path / "out" / "model" / "adapter_config.json").read_text())
    size = load_model(home / "first" / "model").config.vocab_size
    assert config["r"] == 2 * LORA["lora.r"] and size in config["trainable_token_indices"]["lm_head"]
    adapted = load_adapted(tmp_path / "out" / "model")  # whose base has no such rows
    assert adapted.config.vocab_size == size + 2
    assert export.main([str(tmp_path / "out"), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    merged = load_model(tmp_path / "merged")
    assert torch.equal(merged.embed_tokens.weight[size:], adapted.embed_tokens.rows)


def test_generate_reads_base_and_adapter(trained):
    assert generate.main([str(trained), "--prompt", "abc", "--max_new_tokens", "3"]) == 0


def test_merging_gives_a_plain_model_that_does_the_same(trained, tmp_path, capsys):
    assert export.main([str(trained), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"on \d+ tokens of training rows the logits of adapter and merged model differ by at most", shown)
    adapted, merged = load_adapted(trained / "model"), load_model(tmp_path / "merged")
    tokens = torch.arange(20)
    bounds = torch.zeros(20, dtype=torch.int32), torch.full((20,), 20, dtype=torch.int32)
    one, other = (model.logits(model(tokens, tokens.int(), *bounds)) for model in (adapted, merged))
    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(theirs(tokens[None]).logits[0], one, atol=1e-4, rtol=1e-4)


def test_merging_looks_at_held_out_rows_where_there_are_some(go, tmp_path, capsys):
    assert go(**{"data.eval_fraction": 0.2, "train.max_steps": 3}).exit_code == 0
    assert "the trained adapter and tokenizer, as PEFT files; its base is " in capsys.readouterr().out
    assert export.main([str(tmp_path / "out" / "model"), str(tmp_path / "merged"), "--merge"]) == 0
    assert "tokens of held-out rows" in capsys.readouterr().out
    (tmp_path / "out" / "config.toml").unlink()
    assert export.main([str(tmp_path / "out"), str(tmp_path / "again"), "--merge"]) == 0
    assert re.search(r"on \d+ random tokens the logits", capsys.readouterr().out)
    for path in (tmp_path / "merged").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_an_adapter_that_changes_nothing_is_not_merged(trained, tmp_path):
    folder = tmp_path / "untrained"
    folder.mkdir()
    for path in (trained / "model").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "manifest.json").unlink()
    from safetensors.torch import save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v * (0 if "lora_B" in k else 1) for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the adapter changes nothing"):
        export.main([str(folder), str(tmp_path / "merged"), "--merge"])
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_what_it_cannot_do(trained, home, tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        export.main([str(home / "first"), str(tmp_path / "merged"), "--merge"])
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists"):
        export.main([str(trained), str(tmp_path / "there"), "--merge"])


def test_random_weights_have_no_adapter(tmp_path):
    with pytest.raises(UserError, match="an adapter belongs to a trained model"):
        parts(tmp_path, **LORA)


def test_a_wrong_target_is_told_before_the_first_step(home):
    base = {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    with pytest.raises(UserError, match="no linear layer is named c_attn"):
        parts(home, **base, **LORA, **{"lora.target_modules": ["c_attn"]})
    assert settings(home)["output_dir"]
