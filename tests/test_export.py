"""`minisft export RUN OUT`: a copy of the finished model, as vLLM's loader and the others read it."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny import settings, train
from tiny_models import tiny

from minisft.__main__ import main
from minisft.atomic_folder import verify_folder
from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.generation import stop_ids
from minisft.model.load import load_model
from minisft.model.save import save_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    keys = settings(folder)
    save_model(tiny(keys["model.config"]), folder / "base")
    train_tokenizer([], vocab_size=259).save(folder / "base")
    return folder


def run(base: Path, name: str, **keys) -> Path:
    given = {"output_dir": str(base / name), "train.max_steps": 2, "model.config": None}
    given |= {"model.model_name_or_path": str(base / "base"), "model.tokenizer_name_or_path": None}
    train(base, **given, **keys)
    return base / name


def test_a_finished_model_is_copied_and_is_a_folder_that_servers_load(base, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    finished, out = run(base, "whole"), tmp_path / "out"
    assert main(["export", str(finished), str(out)]) == 0
    for path in (finished / "model").iterdir():
        assert path.name == "manifest.json" or (out / path.name).read_bytes() == path.read_bytes()
    assert verify_folder(out) is None and load_model(out) is not None
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert type(transformers.AutoConfig.from_pretrained(out)).__name__ == "LlamaConfig"
    tokenizer = load_tokenizer(out)
    ends = transformers.GenerationConfig.from_pretrained(out).eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == stop_ids(load_model(out), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "a"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == tokenizer.apply_chat_template(chat)
    weights = [path for path in out.glob("*.safetensors")]  # vLLM reads every one at the top
    with safe_open(weights[0], "pt") as file:
        assert len(weights) == 1 and "model.embed_tokens.weight" in file.keys()
    assert main(["export", str(finished), str(out)]) == 2 and "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, named",
    [({}, []), ({"lora.use_dora": True, "lora.rank_pattern": {"q_proj": 1}}, ["use_dora", "rank_pattern"])],
)
def test_an_adapter_is_copied_as_peft_reads_it(options, named, base, tmp_path, capsys):
    finished = run(base, f"adapter{len(named)}", **{"lora.r": 2}, **options)
    capsys.readouterr()
    assert main(["export", str(finished), str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--merge writes both as one model" in said
    assert (
        ("vLLM does not serve adapters with use_dora:" in said) == bool(named) == ("0.32 reads rank_pattern;" in said)
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"} <= names


def test_a_damaged_model_is_not_copied(base, tmp_path, capsys):
    finished = run(base, "damaged")
    with open(finished / "model" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert main(["export", str(finished), str(tmp_path / "out")]) != 0
    assert "model.safetensors" in capsys.readouterr().err and not (tmp_path / "out").exists()
