"""An exported model has the form of the folder that it came from: what was not trained is there, byte by byte."""

import ctypes
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import settings, start, train
from tiny_models import CONFIGS, tiny

from benchmarks.harness import extra_memory
from minisft.errors import MODEL, UserError
from minisft.model.drop_in import copy_other_files, save_like
from minisft.model.families import FAMILIES
from minisft.model.load import load_model
from minisft.model.save import save_model

FOREIGN = {
    "mtp.fc.weight": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "mtp.layers.0.input_layernorm.weight": torch.ones(3),
    "model.visual.blocks.0.attn.qkv.weight": torch.full((2, 2), float("nan")),  # nobody's business here
    "visual.blocks.0.attn.qkv.weight": torch.ones(2, 2),
    "audio_tower.layers.0.scale": torch.tensor(7, dtype=torch.int64),
    "v_head.summary.bias": torch.ones(1, dtype=torch.float16),
}
SHARDS = 3


def plant(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """A model folder as publishers make them: shards, mixed dtypes, tensors of other parts, keys and files of their own."""
    model = tiny(family)
    save_model(model, folder, dtype=dtype)
    tensors = load_file(folder / "model.safetensors")
    norms = [name for name in tensors if "norm" in name and name.endswith("weight")][:1]
    tensors |= {name: tensors[name].float() for name in norms} | FOREIGN
    names, weight_map = list(tensors), {}
    for number in range(SHARDS):
        file = f"model.safetensors-{number + 1:05}-of-{SHARDS:05}.safetensors"
        shard = {name: tensors[name] for name in names[number::SHARDS]}
        save_file(shard, folder / file, metadata={"format": "pt", "made by": "someone"})
        weight_map |= dict.fromkeys(shard, file)
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": str(dtype).removeprefix("torch."), "a_key": {"of": ["others", None]}}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "README.md").write_text("the card of another model")
    (folder / "pytorch_model.bin").write_bytes(b"not copied")


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same bytes: a NaN is equal to itself."""
    bytes_of = [tensor.flatten().view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bytes_of)


@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_it_is_the_same_folder_byte_by_byte(family, tmp_path):
    plant(tmp_path / "base", family)
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        (line,) = save_like(load_model(tmp_path / "base", dtype=dtype), tmp_path / "base", out, torch.float32)
        assert line.startswith("0 tensors have changed") and f"{len(FOREIGN)} are not part of the text model" in line
        assert copy_other_files(tmp_path / "base", out) == ["LICENSE", "preprocessor_config.json"]
        left = {"README.md", "pytorch_model.bin"}
        assert {p.name for p in out.iterdir()} == {p.name for p in (tmp_path / "base").iterdir()} - left
        for path in out.iterdir():
            if dtype == torch.float32 or path.suffix != ".safetensors":  # bf16 rounds the norm that is kept in fp32
                assert path.read_bytes() == (tmp_path / "base" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_was_trained_differs(family, tmp_path):
    """Names, order of shards and dtypes too. A stacked tensor (q, k and v in one) is trained where one part of it is."""
    base, out = tmp_path / "base", tmp_path / "out"
    plant(base, family)
    model = load_model(base)
    trained = "layers.1.self_attn.q_proj.weight"
    with torch.no_grad():
        model.get_parameter(trained).add_(1.0)
    (line,) = save_like(model, base, out, torch.float32)
    before, after = all_tensors(base), all_tensors(out)
    assert before.keys() == after.keys() and line.startswith("1 tensors have changed")
    changed = [name for name in before if not same(before[name], after[name])]
    assert len(changed) == 1 and after[changed[0]].dtype == torch.float32
    assert all(after[name].dtype == before[name].dtype for name in before if name not in changed)
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as one, safe_open(out / path.name, "pt") as other:
            assert set(one.keys()) == set(other.keys()) and one.metadata() == other.metadata()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    again = load_model(out)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name


@pytest.mark.parametrize(
    "wrapper, family, prefix",
    [("qwen3_5", "qwen3_5_text", "model.language_model."), ("gemma3", "gemma3_text", "language_model.model.")],
)
def test_the_text_of_a_model_that_sees(wrapper, family, prefix, tmp_path):
    """The head lies outside of the prefix, and config.json says inside and outside whether it is tied."""
    base, out = tmp_path / "base", tmp_path / "out"
    model = tiny(family)
    save_model(model, base, dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    tensors = {re.sub(r"^model\.", prefix, name): tensor for name, tensor in tensors.items()}
    save_file(tensors | FOREIGN, base / "model.safetensors", metadata={"format": "pt"})
    tied = model.config.tie_word_embeddings
    hf = {"model_type": wrapper, "vision_config": {"depth": 2}, "dtype": "bfloat16", "image_token_id": 7}
    hf |= {"tie_word_embeddings": tied, "text_config": CONFIGS[family] | {"dtype": "bfloat16"}}
    (base / "config.json").write_text(json.dumps(hf))
    model = load_model(base, least_vocab_size=60)
    assert "the text part is trained" in model.config.notes[0]
    save_like(model, base, out, torch.float32)
    before, after = all_tensors(base), all_tensors(out)
    changed = {name for name in before if not same(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed == {f"{prefix}embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    hf["text_config"] |= {"dtype": "float32", "vocab_size": 60}
    assert json.loads((out / "config.json").read_text()) == hf | {"dtype": "float32"}
    again = load_model(out)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())


def measure_saving(folder: str) -> None:
    """Writes how far memory rose while a model was saved, and its largest matrix in fp32, in MiB."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(-3, 2**16)  # what is freed goes back at once
    base, out = Path(folder, "base"), Path(folder, "out")
    model = load_model(base)
    save_like(tiny("llama"), Path(folder, "tiny"), Path(folder, "warm"), torch.float32)  # what is imported only now
    with torch.no_grad():
        for parameter in list(model.parameters())[::2]:
            parameter.add_(1.0)
    _, extra = extra_memory(lambda: save_like(model, base, out, torch.float32))
    largest = 4 * max(parameter.numel() for parameter in model.parameters())
    Path(folder, "measured").write_text(json.dumps([extra, largest / 2**20]))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """21 million parameters, 42 MB of which have changed; beside them 32 MB of another part."""
    config = CONFIGS["llama"] | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 3}
    save_model(tiny(config), tmp_path / "base", dtype=torch.bfloat16)
    save_model(tiny("llama"), tmp_path / "tiny")
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file) | {"visual.x": torch.ones(2**23)}, file, metadata={"format": "pt"})
    process = start(measure_saving, str(tmp_path))
    process.join(60)
    extra, largest = json.loads((tmp_path / "measured").read_text())
    # A matrix of the file (half of fp32), converted to compare it, then the one that is written; and two MiB to copy
    assert extra < 2.5 * largest + 4


def test_more_tokens(tmp_path):
    plant(tmp_path / "base", "llama")
    model = load_model(tmp_path / "base", least_vocab_size=60)
    save_like(model, tmp_path / "base", tmp_path / "out", torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 60
    again = load_model(tmp_path / "out")
    assert torch.equal(again.head_weight, model.head_weight.to(torch.bfloat16).float())
    assert all_tensors(tmp_path / "out").keys() == all_tensors(tmp_path / "base").keys()


def test_a_tied_head_that_was_stored_stays_the_embedding(tmp_path):
    hf = CONFIGS["llama"] | {"tie_word_embeddings": True}
    save_model(tiny(hf), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"}
    )
    model = load_model(tmp_path / "base")
    model.embed_tokens.weight.data += 1
    save_like(model, tmp_path / "base", tmp_path / "out", torch.float32)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(after["lm_head.weight"], model.embed_tokens.weight)


@pytest.mark.parametrize(
    "name, config, named",
    [
        ("model.layers.0.self_attn.q_proj.bias", {}, "1 unexpected"),  # the text model would compute something else
        ("model.layers.2.mlp.up_proj.weight", {}, "1 unexpected"),  # config.json says two layers
        ("model.layers.3.mlp.up_proj.weight", {"num_nextn_predict_layers": 1}, "1 unexpected"),
        ("lm_head.bias", {}, "1 unexpected"),
        ("model.embed_positions.weight", {}, "1 unexpected"),
    ],
)
def test_a_tensor_that_the_text_model_would_need_is_refused(name, config, named, tmp_path):
    save_model(tiny(CONFIGS["llama"] | config), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.ones(2)}, file)
    with pytest.raises(UserError, match=named) as caught:
        load_model(tmp_path)
    assert caught.value.exit_code == MODEL


def test_layers_that_predict_further_tokens_are_carried(tmp_path):
    save_model(tiny(CONFIGS["llama"] | {"num_nextn_predict_layers": 1}), tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.2.eh_proj.weight": torch.ones(2)}, file)
    save_like(load_model(tmp_path / "base"), tmp_path / "base", tmp_path / "out", torch.float32)
    assert "model.layers.2.eh_proj.weight" in load_file(tmp_path / "out" / file.name)


def test_a_source_that_is_another_model_now(tmp_path):
    save_model(tiny("llama"), tmp_path / "base")
    model = load_model(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    save_model(tiny("phi3"), tmp_path / "base")
    with pytest.raises(UserError, match="not the model that the run started from"):
        save_like(model, tmp_path / "base", tmp_path / "out", torch.float32)


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_and_a_merge_carry_everything(lora, tmp_path):
    """train.trainable leaves the rest of the model as it was; so do adapters beside one kind of layer."""
    from minisft.__main__ import main

    base = tmp_path / "base"
    keys = settings(tmp_path)
    save_model(tiny(keys["model.config"]), base, dtype=torch.bfloat16)
    file = base / "model.safetensors"
    save_file(load_file(file) | FOREIGN, file, metadata={"format": "pt"})
    (base / "preprocessor_config.json").write_text("{}")
    keys |= {"model.config": None, "model.model_name_or_path": str(base), "train.max_steps": 2}
    keys |= {"lora.r": 2, "lora.target_modules": ["q_proj"]} if lora else {"train.trainable": [".*q_proj.*"]}
    train(tmp_path, **keys)
    out = tmp_path / "out" / "model"
    if lora:
        assert main(["export", str(tmp_path / "out"), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
        out = tmp_path / "merged"
    before, after = all_tensors(base), all_tensors(out)
    assert before.keys() == after.keys() and (out / "preprocessor_config.json").exists()
    changed = {name for name in before if not same(before[name], after[name])}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
