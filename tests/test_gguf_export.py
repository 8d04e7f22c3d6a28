"""`minisft export RUN OUT --gguf KIND`: the file is the model, for every reader of the format that can be had.

Readers: ours (a run may start from the file), transformers', and llama.cpp itself where `llama-cpp-python` is installed, here or
beside the Python that MINISFT_LLAMA_PYTHON names.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from test_full_disk import full_disk
from test_gguf import MODELS as READ
from tiny import settings, train
from tiny_models import CONFIGS, DELTA, stream, tiny
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from minisft.__main__ import main
from minisft.commands.export import name_of
from minisft.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from minisft.errors import MODEL, UserError
from minisft.generation import stop_ids
from minisft.gguf.kinds import KINDS
from minisft.gguf.tokenizer import CUTS, WORDS
from minisft.gguf.write import ARCHITECTURES
from minisft.gguf_folder import write_gguf_folder
from minisft.model.families import FAMILIES
from minisft.model.load import load_model
from minisft.model.save import save_model

gguf = pytest.importorskip("gguf")

VOCAB = 320
WIDE = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
HEADS = {"head_dim": 16}
OWN = {  # what the tiny models of tiny_models.py set and llama.cpp cannot have
    "llama": HEADS | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": False},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window_pattern": 6},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 256, "head_dim": 16},
    "smollm3": {"no_rope_layers": None, "use_sliding_window": False, "num_hidden_layers": 4},
    "granite": {"attention_multiplier": 0.25},
    "starcoder2": {"sliding_window": None},
    "exaone4": {"sliding_window": None},
    "olmo3": {"num_hidden_layers": 4, "layer_types": None},
    "cohere2": {"sliding_window_pattern": 4, "num_hidden_layers": 4, "head_dim": 16},
    "ernie4_5": {"use_bias": False},
    "seed_oss": {"attention_out_bias": False},
}  # fmt: skip
WRITTEN = {family: CONFIGS[family] | WIDE | OWN.get(family, {}) for family in ARCHITECTURES}
TEXTS = [
    "Some words, 12345 of them: it's 3.14!\n\n\tx=y[i]+2;\r\n",
    "na\u00efve caf\u00e9  \u65e5\u672c\u8a9e \U0001f600 \u0410\u0431\u0432",
    "HTTPServer don't WON'T we'll 1,000,000   <|im_end|> so",
    "",
    " ",
    "a",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And now?"},
]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Some words, 12345 of them.\n\n  And  it's so! " * 3], vocab_size=VOCAB)


def model_of(family: str, **change):
    config = WRITTEN[family] | change
    return tiny({key: value for key, value in config.items() if value is not None or key == "sliding_window"}).eval()


def write(folder: Path, model, tokenizer: Tokenizer, kind: str = "f32") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf_folder(model, tokenizer, folder, kind, "a name")
    return folder / f"model-{kind}.gguf"


def logits_of(model, ids: list[int]) -> torch.Tensor:
    position_ids, start, end = stream([len(ids)])
    with torch.no_grad():
        return model.logits(model(torch.tensor(ids), position_ids, start, end))


IDS = [int(i) for i in np.random.default_rng(0).integers(0, VOCAB, 24)]


# ---------------------------------------------------------------- weights and configuration


@pytest.mark.parametrize("family", READ)
def test_what_is_written_is_what_is_read(family, tokenizer, tmp_path):
    """The identity on weights, configuration, tokens and ends of answers, for every family that a run may start from."""
    model = tiny(READ[family] | {"vocab_size": tokenizer.vocab_size})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # Gemma's near 0, so that adding and taking away 1 rounds nothing
                parameter.copy_((parameter * 64).round() / 64)
    model.generation_config = {"eos_token_id": [3, 7]}
    path = write(tmp_path, model, tokenizer)
    again = load_model(path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    for field in vars(model.config):
        if field not in ("initializer_range", "hf", "notes", "stored_vocab_size"):
            assert getattr(again.config, field) == getattr(model.config, field), field
    theirs = load_tokenizer(path)
    assert [theirs.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    assert stop_ids(again, theirs) == stop_ids(model, tokenizer)
    assert theirs.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)


SUPPORTED = ("llama", "mistral", "qwen2", "phi3", "starcoder2", "qwen3", "gemma2", "gemma3_text")
ONLY_WEIGHTS = SUPPORTED[-3:]  # of whose keys transformers does not read all


@pytest.mark.parametrize("family", SUPPORTED)
def test_transformers_reads_the_same_model(family, tokenizer, tmp_path):
    """Logits within 1e-4 of their norm: fp32 sums in another order. transformers does not read rope_freqs."""
    transformers = pytest.importorskip("transformers")
    model = model_of(family, **({"rope_scaling": None} if family == "llama" else {}))
    path = write(tmp_path, model, tokenizer)
    options = {}
    if family in ONLY_WEIGHTS:
        save_model(model, tmp_path / "folder")
        options["config"] = transformers.AutoConfig.from_pretrained(tmp_path / "folder")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path, gguf_file=path.name, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor([IDS])).logits[0]
    ours = logits_of(model, IDS)
    assert (logits - ours).norm() <= 1e-4 * ours.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_holds_the_numbers_that_the_library_makes_of_them(kind, tokenizer, tmp_path):
    """And takes the bits that kinds.py says; more where blocks are too short for a row."""
    model = tiny(CONFIGS["qwen3"] | WIDE | {"vocab_size": tokenizer.vocab_size})
    path = write(tmp_path, model, tokenizer, kind)
    dtype = gguf.GGMLQuantizationType[kind.upper()]
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    down = model.get_parameter("layers.0.mlp.down_proj.weight").detach().numpy()  # rows of 96 numbers
    stored = reader["blk.0.ffn_down.weight"]
    assert stored.tensor_type == dtype and stored.n_bytes == down.size * KINDS[kind] / 8
    expected = gguf.quants.quantize(down, dtype)
    assert np.array_equal(np.asarray(stored.data).view(np.uint8).ravel(), expected.view(np.uint8).ravel())
    assert reader["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    embedding = reader["token_embd.weight"].tensor_type
    assert embedding == (gguf.GGMLQuantizationType.Q8_0 if kind.startswith("q") else dtype)


def test_short_rows_and_large_numbers(tokenizer, tmp_path):
    model = tiny(CONFIGS["llama"] | WIDE | {"intermediate_size": 48, "vocab_size": tokenizer.vocab_size})
    path = write(tmp_path / "a", model, tokenizer, "q8_0")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert reader["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    with torch.no_grad():
        model.get_parameter("layers.0.mlp.down_proj.weight")[0, 0] = 7e4
    with pytest.raises(UserError, match="7e\\+04.*65504") as caught:
        write(tmp_path / "b", model, tokenizer, "f16")
    assert caught.value.hint == "--gguf bf16"
    write(tmp_path / "b", model, tokenizer, "bf16")


REFUSED = {
    "gpt2": ("gpt2", {}, "gpt2 is not written as GGUF"),
    "a delta rule": ("qwen3_5_text", DELTA, "qwen3_5_text is not written"),
    "biases": ("qwen3", {"attention_bias": True}, "no qkv_bias for qwen3"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 99}, "multiplies the scores of gemma2 by 0.25"),
    "layers without rope": ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "not those of llama.cpp's smollm3"),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' has no form in GGUF"),
    "yarn": ("qwen3", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}, "yarn"),
    "llama3": ("qwen3", {"rope_scaling": OWN["llama"]["rope_scaling"]}, "'llama3' of qwen3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(what, tokenizer, tmp_path):
    family, change, named = REFUSED[what]
    config = CONFIGS[family] | OWN.get(family, {}) | change
    model = tiny({key: value for key, value in config.items() if value is not None or key == "sliding_window"})
    with pytest.raises(UserError) as caught:
        write(tmp_path, model, tokenizer)
    assert (
        named in caught.value.message and "convert_hf_to_gguf" in caught.value.hint and caught.value.exit_code == MODEL
    )
    assert not list(tmp_path.glob("*.gguf"))


def test_a_full_disk_is_an_error_at_every_byte(tokenizer, tmp_path):
    """numpy's tofile, with which the library writes, has no error for the last bytes of a tensor that find no room."""
    model = model_of("llama")
    size = write(tmp_path, model, tokenizer, "q8_0").stat().st_size
    for missing in (1, 200, 1000, 5000, size // 2):
        with full_disk(size - missing), pytest.raises(OSError, match="File too large"):
            write(tmp_path, model, tokenizer, "q8_0")


def test_every_family_is_written_or_refused():
    assert ARCHITECTURES.keys() <= FAMILIES.keys()


def test_windows_that_llama_cpp_does_not_compute_bound_the_context(tokenizer, tmp_path):
    model = tiny(CONFIGS["mistral"] | WIDE | {"sliding_window": 9})
    assert any("context_length is 9" in line for line in write_gguf_folder(model, tokenizer, tmp_path, "f32", "m"))
    field = gguf.GGUFReader(tmp_path / "model-f32.gguf").fields["llama.context_length"]
    assert field.contents() == 9


# ---------------------------------------------------------------- tokenizers


def byte_level(cut, merges: bool = True) -> Tokenizer:
    trained = json.loads(train_tokenizer([" ".join(TEXTS) * 3], vocab_size=VOCAB).backend.to_str())["model"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=trained["vocab"],
            merges=[tuple(merge) for merge in trained["merges"]],
            ignore_merges=cut.ignore_merges,
        )
    )
    steps = [pre_tokenizers.Digits(individual_digits=True)] if cut.splits_digits else []
    steps += [pre_tokenizers.Split(Regex(cut.regex), "isolated")] if cut.regex else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(False, use_regex=cut.regex is None)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return backend


def loaded(backend: tokenizers.Tokenizer, folder: Path, **config) -> Tokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(backend.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | config))
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", CUTS)
def test_a_byte_level_tokenizer_keeps_its_tokens_and_has_llama_cpps_name(name, tmp_path):
    tokenizer = loaded(byte_level(CUTS[name]), tmp_path / "t", eos_token="<|im_end|>")
    model = tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size + 5})  # rows that no token has
    path = write(tmp_path / "m", model, tokenizer)
    assert gguf.GGUFReader(path).fields["tokenizer.ggml.pre"].contents() == name
    again = load_tokenizer(path)
    for text in [*TEXTS, "a <tool> b"]:
        assert again.encode(text) == tokenizer.encode(text), text
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def sentencepiece(folder: Path, *, metaspace: str | None = None, puts_space: bool = True, **config) -> Tokenizer:
    """All cuts of a token are merges, in the order of the tokens, as in converted files."""
    pieces = ["\u2581", *"abcdef", "ab", "bc", "\u2581a", "\u2581ab", "abc", "de"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = []
    for token in ["bc", "ab", "\u2581a", "abc", "\u2581ab", "de"]:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [cut for cut in cuts if cut[0] in tokens and cut[1] in tokens]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=metaspace, split=False)
    else:
        spaces = [normalizers.Replace(" ", "\u2581")]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581")] * puts_space + spaces)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (puts_space or bool(metaspace)))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return loaded(backend, folder, **names | config)


@pytest.mark.parametrize(
    "options", [{}, {"puts_space": False}, {"metaspace": "first"}, {"metaspace": "always"}], ids=str
)
def test_a_sentencepiece_tokenizer_keeps_its_tokens(options, tmp_path):
    tokenizer = sentencepiece(tmp_path / "t", **options)
    model = tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size})
    again = load_tokenizer(write(tmp_path / "m", model, tokenizer))
    texts = ["abc abd cde", "\u00e9\U0001f600 ab", "ab</s>", "", "x"]
    for text in texts + [" a  b"] * ("metaspace" not in options):  # which puts no second space before one
        assert again.encode(text, add_special_tokens=True) == tokenizer.encode(text, add_special_tokens=True), text
    assert again.prefix_ids == [1]


def test_a_space_in_front_of_chats_is_that_of_their_prompts(tmp_path):
    """Metaspace "first" puts one before a text, and none after the special token that begins a chat: nor may llama.cpp."""
    template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    for scheme, expected in (("first", False), ("always", True)):
        tokenizer = sentencepiece(tmp_path / f"t-{scheme}", metaspace=scheme, chat_template=template)
        model = tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size})
        path = write(tmp_path / f"m-{scheme}", model, tokenizer)
        assert gguf.GGUFReader(path).fields["tokenizer.ggml.add_space_prefix"].contents() is expected
        text = tokenizer.apply_chat_template([{"role": "user", "content": "abc d"}])
        assert load_tokenizer(path).encode(text) == tokenizer.encode(text)


BYTES = pre_tokenizers.ByteLevel(False, use_regex=False)


def broken(change) -> tokenizers.Tokenizer:
    backend = byte_level(CUTS["gpt-2"])
    change(backend)
    return backend


def set_pre(*steps):
    def change(backend):
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps))

    return change


@pytest.mark.parametrize(
    "change, named",
    [
        (set_pre(pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)), "does not know its step"),
        (set_pre(pre_tokenizers.ByteLevel(add_prefix_space=True)), "without a space in front"),
        (set_pre(pre_tokenizers.Split(Regex("[a-z]+"), "isolated"), BYTES), "no name for"),
        (set_pre(pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(False)), "would follow each other"),
        (set_pre(pre_tokenizers.Split(Regex(WORDS % "x"), "removed"), BYTES), "step"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_cuts_otherwise_is_refused(change, named, tmp_path):
    tokenizer = loaded(broken(change), tmp_path / "t")
    with pytest.raises(UserError) as caught:
        write(tmp_path / "m", tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size}), tokenizer)
    assert named in caught.value.message and caught.value.exit_code == MODEL and "--gguf" in caught.value.hint


def test_merges_that_sentencepiece_cannot_have_are_refused(tmp_path):
    tokenizer = sentencepiece(tmp_path / "t")
    text = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    merges = text["model"]["merges"]
    for name, changed, named in (
        ("order", [*merges[:3], merges[5], merges[3], merges[6], merges[4], *merges[7:]], "not ordered"),
        ("missing", [merge for merge in merges if tuple(merge) != ("a", "bc")], "never merges ('a', 'bc')"),
    ):
        text["model"]["merges"] = changed
        tokenizer = loaded(tokenizers.Tokenizer.from_str(json.dumps(text)), tmp_path / name, bos_token="<s>")
        with pytest.raises(UserError) as caught:
            write(tmp_path / "m", tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size}), tokenizer)
        assert named in caught.value.message


def test_more_ends_than_the_format_has_place_for(tokenizer, tmp_path):
    model = tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size})
    model.generation_config = {"eos_token_id": [5, 6, 7, 8]}
    lines = write_gguf_folder(model, tokenizer, tmp_path, "f32", "m")
    assert any("place for 3 ends" in line for line in lines)
    stops = re.findall(r"^PARAMETER stop (.*)$", (tmp_path / "Modelfile").read_text(), re.MULTILINE)
    assert len(stops) == 5 and "<|im_end|>" in map(json.loads, stops)


# ---------------------------------------------------------------- the command


def test_a_finished_run_becomes_a_gguf_file(tmp_path, capsys):
    train(tmp_path, **settings(tmp_path, **{"train.max_steps": 2}))
    capsys.readouterr()
    out = tmp_path / "gguf"
    assert main(["export", str(tmp_path / "out"), str(out), "--gguf", "F32"]) == 0
    said = capsys.readouterr().out
    assert "differ by 0.0e+00" in said
    (tmp_path / "my run-1.5").mkdir()
    assert [name_of(tmp_path / name) for name in ("my run-1.5", "out/model", "gguf/model-f32.gguf")] == [
        "my run-1.5",
        "out",
        "model-f32",
    ]
    assert main(["generate", str(out / "model-f32.gguf"), "--prompt", "abc", "--max_new_tokens", "3"]) == 0
    assert {path.name for path in out.iterdir()} == {"model-f32.gguf", "Modelfile", "README.md", "manifest.json"}
    ours, theirs = load_model(tmp_path / "out" / "model"), load_model(out / "model-f32.gguf")
    assert torch.equal(logits_of(ours, [1, 2, 3]), logits_of(theirs, [1, 2, 3]))


def test_an_adapter_is_merged_first(tokenizer, tmp_path, capsys):
    save_model(tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size}), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    keys = settings(tmp_path, **{"train.max_steps": 2, "lora.r": 2, "model.config": None})
    keys |= {"model.model_name_or_path": str(tmp_path / "base"), "model.tokenizer_name_or_path": None}
    train(tmp_path, **keys)
    for command in (["--gguf", "f32"], ["--merge", "--dtype", "fp32"]):
        assert main(["export", str(tmp_path / "out"), str(tmp_path / command[0]), *command]) == 0
    gguf_model, merged = load_model(tmp_path / "--gguf" / "model-f32.gguf"), load_model(tmp_path / "--merge")
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, gguf_model.get_parameter(name)), name
    assert not torch.equal(merged.get_parameter("layers.0.self_attn.q_proj.weight"),
                           load_model(tmp_path / "base").get_parameter("layers.0.self_attn.q_proj.weight"))  # fmt: skip


def test_mistakes_of_the_command(tokenizer, tmp_path, capsys, monkeypatch):
    save_model(tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size}), tmp_path / "m")
    out = str(tmp_path / "out")
    for options, named in (
        (["--gguf", "q4_k_m"], "kinds: f32, f16"),
        (["--gguf", "f32", "--dtype", "fp32"], "--gguf KIND"),
        (["--dtype", "fp32"], "--merge"),
        (["--gguf"], "has no tokenizer"),
        (["--merge"], "holds no adapter"),
    ):
        assert main(["export", str(tmp_path / "m"), out, *options]) != 0
        assert named in capsys.readouterr().err, options
        assert not Path(out).exists()


# ---------------------------------------------------------------- llama.cpp

LLAMA = r"""
import json, sys
import numpy as np
import llama_cpp
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

for line in sys.stdin:
    asked = json.loads(line)
    model = llama_cpp.Llama(asked["path"], n_ctx=64, n_batch=64, logits_all=True, verbose=False, n_threads=1)
    vocab = model._model.vocab
    tokens = [model.tokenize(t.encode(), add_bos=False, special=True) for t in asked["texts"]]
    with_bos = model.tokenize(b"a", add_bos=True, special=True)
    model.eval(asked["ids"])
    logits = np.array(model.scores[: len(asked["ids"])], dtype=np.float32)
    np.save(asked["out"], logits)
    ends = [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocab, i)]
    template = model.metadata.get("tokenizer.chat_template")
    chat = None
    if template:
        text = lambda i: model._model.token_get_text(i) if i >= 0 else ""
        formatter = Jinja2ChatFormatter(template, eos_token=text(model.token_eos()), bos_token=text(model.token_bos()))
        chat = formatter(messages=asked["chat"]).prompt
    print(json.dumps({"tokens": tokens, "with_bos": with_bos, "ends": ends, "chat": chat}), flush=True)
"""


@pytest.fixture(scope="module")
def llama_cpp():
    """ask(path, ids, texts, out) -> what llama.cpp makes of them"""
    python = os.environ.get("MINISFT_LLAMA_PYTHON")
    if python is None and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed, and MINISFT_LLAMA_PYTHON names no Python that has it")
    process = subprocess.Popen(
        [python or sys.executable, "-c", LLAMA], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(**asked):
        process.stdin.write(json.dumps(asked | {"chat": CHAT}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.stdout.close()
    process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_llama_cpp_computes_the_same_logits(family, tokenizer, llama_cpp, tmp_path):
    """f32, within 2e-3 of their norm: llama.cpp's cache of keys and values is f16."""
    model = model_of(family)
    path = write(tmp_path, model, tokenizer)
    found = llama_cpp(path=str(path), ids=IDS, texts=TEXTS, out=str(tmp_path / "logits.npy"))
    ours, theirs = logits_of(model, IDS), torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert (ours - theirs).norm() <= 2e-3 * ours.norm()
    assert found["tokens"] == [tokenizer.encode(text) for text in TEXTS]
    assert found["chat"] == tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)
    assert set(found["ends"]) >= stop_ids(model, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CUTS, "sentencepiece", "sentencepiece without a space"])
def test_llama_cpp_makes_the_same_tokens(name, llama_cpp, tmp_path):
    if name in CUTS:
        tokenizer = loaded(byte_level(CUTS[name]), tmp_path / "t", eos_token="<|im_end|>")
    else:
        tokenizer = sentencepiece(tmp_path / "t", puts_space=name == "sentencepiece")
    model = tiny(CONFIGS["llama"] | WIDE | {"vocab_size": tokenizer.vocab_size + 3})
    path = write(tmp_path, model, tokenizer)
    texts = [text for text in TEXTS if text] + ["abc abd  cde", "a <tool> b"]
    found = llama_cpp(path=str(path), ids=IDS[:4], texts=texts, out=str(tmp_path / "logits.npy"))
    assert found["tokens"] == [tokenizer.encode(text) for text in texts]
    assert found["with_bos"] == tokenizer.encode("a", add_special_tokens=True)
