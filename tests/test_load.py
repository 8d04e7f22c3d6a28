"""Loading and saving: what comes back is what was stored, and what is wrong is named."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, tiny

from minisft import hub
from minisft.errors import MEMORY, MODEL, UserError
from minisft.model.decoder import Decoder
from minisft.model.families import FAMILIES, from_hf
from minisft.model.load import build_model, give_memory, init_weights, load_model, load_weights, read_config
from minisft.model.model_config import with_vocab_size
from minisft.model.save import save_model

LLAMA = CONFIGS["llama"] | {"attention_bias": True}
TIED = LLAMA | {"tie_word_embeddings": True}
LAYOUTS = ["llama", "gpt2", "phi3", "gpt_neox", "starcoder2", "phi", "cohere", "stablelm"]  # every way to store tensors


def assert_equal(one: Decoder, other: Decoder) -> None:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(params=LAYOUTS)
def model(request) -> Decoder:
    return tiny(request.param)


# ---------------------------------------------------------------- round trips


def test_round_trip_is_byte_equal(model, tmp_path):
    model.generation_config = {"eos_token_id": [2, 7]}
    save_model(model, tmp_path / "a")
    loaded = load_model(tmp_path / "a")
    save_model(loaded, tmp_path / "b")
    assert_equal(loaded, model)
    assert not loaded.training
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_shards(model, tmp_path):
    save_model(model, tmp_path)  # its single file must not survive, or it would be loaded instead
    model.norm.weight.data += 1
    limit = 20_000
    save_model(model, tmp_path, max_shard_bytes=limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    stored = {path.name: load_file(path) for path in shards}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    assert index["metadata"] == {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "total_size": sum(t.nbytes for tensors in stored.values() for t in tensors.values()),
    }
    assert all(len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit for tensors in stored.values())
    assert_equal(load_model(tmp_path), model)
    save_model(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_dtypes(model, tmp_path):
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_equal(load_model(tmp_path), model.to(torch.bfloat16).to(torch.float32))
    assert_equal(load_model(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16))


def test_config_json_keeps_what_was_there(tmp_path):
    hf = LLAMA | {"torch_dtype": "float16", "eos_token_id": [2, 7], "a_note": None, "head_dim": 16}
    save_model(tiny(hf), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    expected = hf | {"torch_dtype": "float32"}
    assert written | expected == written
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert "dtype" not in written


@pytest.mark.parametrize(
    "family, prefix",
    [(family, "") for family in LAYOUTS] + [("gemma2", "language_model.model."), ("gemma2", "model.language_model.")],
)
def test_names_with_or_without_prefix_and_old_buffers(family, prefix, tmp_path):
    model = tiny(family)
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    bare = {re.sub(r"^(model|transformer|gpt_neox)\.", "", name): value for name, value in load_file(file).items()}
    tensors = {name if name.startswith(("lm_head", "embed_out")) else prefix + name: bare[name] for name in bare}
    for module in ("attn", "attention"):
        tensors[f"h.0.{module}.bias"], tensors[f"h.0.{module}.masked_bias"] = torch.ones(1, 4, 4), torch.tensor(-1e4)
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, file)
    assert_equal(load_model(tmp_path), model)


def test_both_names_of_the_head_of_gpt_neox(tmp_path):
    model = tiny("gpt_neox")
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(load_model(tmp_path), model)


@pytest.mark.parametrize(
    "hf", [CONFIGS["gemma3_text"], {"model_type": "gemma3", "text_config": CONFIGS["gemma3_text"]}]
)
def test_what_is_not_the_text_model_is_counted(hf, tmp_path):
    model = tiny("gemma3_text")
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name.replace("model.", "language_model.model.", 1): tensor for name, tensor in load_file(file).items()}
    others = ("vision_tower.x", "model.vision_tower.y", "multi_modal_projector.z", "model.layers.0.rotary_emb.inv_freq")
    save_file(tensors | {name: torch.ones(1) for name in others}, file)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    other = build_model(read_config(tmp_path), "cpu")
    (line,) = load_weights(other, tmp_path)  # the last of these is a constant
    assert line.endswith("when it is exported: multi_modal_projector (1), vision_tower (2) tensors")
    assert_equal(other, model)


# ---------------------------------------------------------------- more tokens than the files have


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi", "cohere"])
def test_new_tokens_start_at_the_mean(family, tmp_path):
    old = tiny(family)
    save_model(old, tmp_path / "old")
    new = build_model(with_vocab_size(read_config(tmp_path / "old"), 60), "cpu")
    assert load_weights(new, tmp_path / "old") == ["7 new tokens start at the mean of the 53 others"]
    for before, after in ((old.embed_tokens.weight, new.embed_tokens.weight), (old.head_weight, new.head_weight)):
        assert torch.equal(after[:53], before) and len(after) == 60
        assert torch.equal(after[53:], before.mean(0).expand(7, -1))
    if old.head_bias is not None:
        assert torch.equal(new.head_bias, torch.cat([old.head_bias, old.head_bias.mean().expand(7)]))
    others = {name: p for name, p in old.named_parameters() if not name.startswith(("embed_tokens", "lm_head"))}
    assert all(torch.equal(p, dict(new.named_parameters())[name]) for name, p in others.items())

    save_model(new, tmp_path / "new")  # a model of its own from here on, and what a checkpoint of it restores
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vocab_size"] == 60
    assert_equal(load_model(tmp_path / "new"), new)
    again = build_model(new.config, "cpu")
    assert load_weights(again, tmp_path / "new") == []
    assert_equal(again, new)


def test_the_mean_is_taken_in_fp32(tmp_path):
    save_model(tiny("llama"), tmp_path, dtype=torch.bfloat16)
    new = build_model(with_vocab_size(read_config(tmp_path), 54), "cpu")
    load_weights(new, tmp_path)
    assert torch.equal(new.embed_tokens.weight[53], new.embed_tokens.weight[:53].mean(0))


def test_another_vocabulary_is_no_new_tokens(tmp_path):
    save_model(tiny("llama"), tmp_path)
    for stored, asked in ((50, 53), (54, 60)):
        config = with_vocab_size(from_hf(CONFIGS["llama"] | {"vocab_size": stored}), asked + 1)
        with pytest.raises(UserError, match=r"\[53, 32\], config.json says"):
            load_weights(build_model(config, "cpu"), tmp_path)


def test_fewer_tokens_are_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        with_vocab_size(from_hf(CONFIGS["llama"]), 52)


# ---------------------------------------------------------------- a head that is the embedding


def test_tied_head_in_the_file(tmp_path):
    model = tiny(TIED)
    save_model(model, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert_equal(load_model(tmp_path), model)


# ---------------------------------------------------------------- what is wrong is named


def edit(change):
    """A change of the tensors of model.safetensors."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def overwrite(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(weight_map):
    def apply(folder: Path) -> None:
        names = load_file(folder / "model.safetensors").keys()
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map(names)}))

    return apply


def pipe(name: str):
    def apply(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return apply


SHARD = "model-00001-of-00001.safetensors"
BAD = {
    "a Git LFS pointer": (
        overwrite("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "git lfs pull",
    ),
    "a web page": (overwrite("model.safetensors", b"<!DOCTYPE html><html>Log in</html>"), "web page"),
    "an empty file": (overwrite("model.safetensors", b""), "not a complete safetensors"),
    "half a file": (truncate, "not a complete safetensors"),
    "a pickle under another name": (overwrite("model.safetensors", b"PK\x03\x04" + bytes(99)), "pickled"),
    "only a pickle": (only_pickle, "pytorch_model.bin"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "missing": (edit(lambda t: t.pop("model.norm.weight")), "1 missing: norm.weight"),
    "unexpected": (edit(lambda t: t.update({"model.norm.x": torch.ones(1)})), "1 unexpected: norm.x"),
    "more than ten": (edit(lambda t: t.update({f"lm_head.{i}": torch.ones(1) for i in range(14)})), "and 4 more"),
    "twice": (edit(lambda t: t.update({"norm.weight": torch.ones(32)})), "stored twice"),
    "another shape": (edit(lambda t: t.update({"model.norm.weight": torch.ones(31)})), "[31], config.json says [32]"),
    "whole numbers": (edit(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})), "I8"),
    "NaN": (edit(lambda t: t["model.norm.weight"].fill_(float("nan"))), "model.norm.weight"),
    "infinite": (edit(lambda t: t["model.norm.weight"].fill_(float("inf"))), "model.norm.weight"),
    "another tied head": (edit(lambda t: t.update({"lm_head.weight": torch.ones(53, 32)})), "tie_word_embeddings"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is a list": (overwrite("config.json", b"[]"), "expected an object"),
    "config is half a file": (overwrite("config.json", b'{"model_type": "ll'), "not valid JSON"),
    "index leads outside": (index(lambda names: dict.fromkeys(names, "../model.safetensors")), "'../model.safe"),
    "index names no file": (index(lambda names: dict.fromkeys(names, 7)), "7 is not the name"),
    "index names another format": (index(lambda names: dict.fromkeys(names, "model.bin")), "model.bin"),
    "index names a long file": (index(lambda names: dict.fromkeys(names, "a" * 5000 + ".safetensors")), "'aaaa"),
    "index names a file with a NUL": (index(lambda names: dict.fromkeys(names, "a\0.safetensors")), "is not the name"),
    "long names of tensors": (edit(lambda t: t.update({"layers." + "a" * 5000: torch.ones(1)})), "5,007 characters"),
    "a pipe as config": (pipe("config.json"), "config.json: a pipe (FIFO), not a regular file"),
    "a pipe as weights": (pipe("model.safetensors"), "no model.safetensors"),
    "a pipe as generation config": (pipe("generation_config.json"), "a pipe (FIFO), not a regular file"),
    "a generation config of another kind": (overwrite("generation_config.json", b"[]"), "expected an object"),
    "index without map": (index(lambda names: []), "no weight_map"),
    "a shard is missing": (index(lambda names: dict.fromkeys(names, "b.safetensors")), "1 of 1 weight files"),
    "index lists more": (index(lambda names: dict.fromkeys([*names, "more"], SHARD)), "disagree about more"),
    "index lists less": (
        index(lambda names: {name: SHARD for name in names if name != "model.norm.weight"}),
        "disagree about model.norm.weight",
    ),
}


@pytest.mark.parametrize("damage, named", BAD.values(), ids=BAD.keys())
def test_bad_folders(tmp_path, damage, named):
    save_model(tiny(TIED), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert named in str(caught.value) and len(str(caught.value)) < 4000
    assert caught.value.exit_code == MODEL


def test_a_model_larger_than_memory_is_refused_before_it_takes_any(tmp_path, monkeypatch):
    """By its size in the dtype asked for, wherever memory is given; one that just fits is built."""
    config = from_hf(LLAMA | {"vocab_size": 10**7, "hidden_size": 2**20, "tie_word_embeddings": True})
    for make in (lambda: build_model(config, "cpu"), lambda: give_memory(build_model(config).bfloat16(), "cpu")):
        with pytest.raises(
            UserError, match=r"the model in (float32|bfloat16) needs (68\.3|34\.2) TB, and there are"
        ) as caught:
            make()
        assert caught.value.exit_code == MEMORY
    save_model(tiny(TIED), tmp_path)
    size = sum(p.nbytes for p in tiny(TIED).parameters())
    monkeypatch.setattr("minisft.model.load.memory_bytes", lambda: size)
    load_model(tmp_path)
    monkeypatch.setattr("minisft.model.load.memory_bytes", lambda: size - 1)
    with pytest.raises(UserError, match="memory"):
        load_model(tmp_path)


@pytest.mark.parametrize("number", [10**18, "7", None])
def test_layers_that_predict_further_tokens_may_be_any_number(tmp_path, number):
    """A file with a layer too many is told at once, whatever config.json says about layers behind the last one."""
    save_model(tiny(TIED), tmp_path)
    table = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": number}
    (tmp_path / "config.json").write_text(json.dumps(table))
    edit(
        lambda t: t.update({"model.layers.x.norm.weight": torch.ones(1), f"model.layers.{'9' * 5000}": torch.ones(1)})
    )(tmp_path)
    with pytest.raises(UserError, match="2 unexpected"):
        load_model(tmp_path)


def test_values_too_large_for_the_dtype(tmp_path):
    model = tiny(TIED)
    model.norm.weight.data.fill_(1e5)
    save_model(model, tmp_path)
    with pytest.raises(UserError, match="float16 in model.norm.weight"):
        load_model(tmp_path, dtype=torch.float16)


def test_untied_model_without_head(tmp_path):
    save_model(tiny(TIED), tmp_path)
    with pytest.raises(UserError, match="1 missing: lm_head.weight"):
        load_weights(tiny(LLAMA), tmp_path)


# ---------------------------------------------------------------- random weights


def fresh(config: dict, seed: int = 0) -> Decoder:
    model = build_model(from_hf(config), "cpu")
    init_weights(model, seed)
    return model


def test_init_follows_the_seed_and_not_the_dtype():
    assert_equal(fresh(TIED, seed=3), fresh(TIED, seed=3))
    assert not torch.equal(fresh(TIED, seed=3).head_weight, fresh(TIED, seed=4).head_weight)
    half = build_model(from_hf(TIED), "cpu").to(torch.bfloat16)
    init_weights(half, seed=3)
    assert_equal(half, fresh(TIED, seed=3).to(torch.bfloat16))


@pytest.mark.parametrize("family", FAMILIES)
def test_init_rules(family):
    config = CONFIGS[family] | {"initializer_range": 0.1}
    for name, parameter in fresh(config).named_parameters():
        if name.endswith("A_log"):
            assert torch.all((parameter.exp() >= 0.01) & (parameter.exp() <= 16)), name
            continue
        if name.endswith(("dt_bias", "o_norm.weight")):
            assert torch.all(parameter == 1), name
            continue
        if parameter.dim() == 1:
            stored_as_difference = family in ("gemma", "gemma2", "gemma3_text", "qwen3_5_text", "nemotron")  # from 1
            assert torch.all(parameter == (0 if name.endswith("bias") or stored_as_difference else 1)), name
            continue
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0.05 if residual and family == "gpt2" else 0.1  # sqrt(2 * 2 layers) = 2
        # At least 512 numbers: their standard deviation is within 3.2 % of the true one by one sigma; five are allowed.
        assert parameter.std().item() == pytest.approx(expected, rel=0.16), name


# ---------------------------------------------------------------- the hub, without a network


def test_resolve_local(tmp_path):
    assert hub.resolve(tmp_path, None, "model") == (tmp_path, None)
    assert hub.resolve(str(tmp_path), None, "tokenizer") == (tmp_path, None)
    with pytest.raises(UserError, match="local folder"):
        hub.resolve(tmp_path, "main", "model")


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "", "a b", "owner/na--me..git"])
def test_resolve_bad_names(name):
    with pytest.raises(UserError) as caught:
        hub.resolve(name, None, "model")
    assert caught.value.exit_code == MODEL


@pytest.mark.parametrize("revision", [None, "v1.0", "0" * 40])
def test_resolve_offline(revision):
    with pytest.raises(UserError, match="in the local cache") as caught:
        hub.resolve("minisft-tests/not-in-any-cache", revision, "model")
    assert caught.value.exit_code == MODEL


def test_download_asks_for_named_files_only(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def snapshot_download(repo, **options):
        asked.update(options, repo=repo)
        folder = tmp_path / "snapshots" / "abc123"
        folder.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (folder / name).touch()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("owner/name", "v1", "model") == (tmp_path / "snapshots" / "abc123", "abc123")
    files = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors"]
    files += ["model.safetensors-00001-of-00002.safetensors", "preprocessor_config.json", "LICENSE.txt"]
    files += ["pytorch_model.bin", "model.py", "onnx/config.json"]
    files += ["original/model.safetensors", "consolidated.safetensors", "adapter_model.safetensors"]
    taken = huggingface_hub.utils.filter_repo_objects(files, allow_patterns=asked["allow_patterns"])
    assert list(taken) == files[:6]
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1")
