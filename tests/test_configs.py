"""The configurations in configs/: each resolves, its model has the size that it promises, and what its header calculates is so.

ready_models.json holds the config.json of their models, as on the hub, and the number of parameters there; ready_rows.json
rows in the shape of their data sets. With these every configuration also trains in miniature: a tiny model of the same family,
the same format, template and method.
"""

import json
import math
import re
import shutil
import tomllib
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import logged

from minisft.config.load import load
from minisft.config.sections import Config, source_list
from minisft.config.stages import load_stages
from minisft.data.sources import parse_source
from minisft.data.tokenizer import train_tokenizer
from minisft.hub import is_repository_name
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights
from minisft.model.lora import adapter_sites, apply_lora
from minisft.model.lora_options import LoraOptions
from minisft.model.model_config import ModelConfig
from minisft.model.save import save_model
from minisft.plan.estimate import MARGIN
from minisft.plan.memory import MicroBatch, Place, describe, predict, shards_of
from minisft.train import run

ROOT = Path(__file__).resolve().parents[1]
FILES = {path.stem: path for path in sorted((ROOT / "configs").glob("*.toml"))}
HUB = json.loads((ROOT / "tests" / "ready_models.json").read_text())
ROWS = json.loads((ROOT / "tests" / "ready_rows.json").read_text())
TEMPLATES = ROOT / "tests" / "templates"
# Lists of stages, and what these share: no runs of their own.
PARTS = ("quickstart-dpo", "smollm3-3b", "smollm3-3b-base")
RUNS = [name for name in FILES if name not in PARTS]
ON_CPU = ("quickstart", "smollm2-135m-laptop")
OF_HUB = [name for name in RUNS if name not in ON_CPU]
LORA = [name for name in OF_HUB if re.search(r"^\[lora\]", FILES[name].read_text(), re.MULTILINE)]
# SmolLM3's second stage starts from what the first wrote, a model of the same shape.
WRITTEN_BY = {"output/smollm3-3b-sft/model": "HuggingFaceTB/SmolLM3-3B-Base"}

each_file = pytest.mark.parametrize("name", FILES)
each_run = pytest.mark.parametrize("name", RUNS)
each_of_hub = pytest.mark.parametrize("name", OF_HUB)


def resolved(name: str) -> Config:
    """The configuration, with the options that its command has."""
    options = re.findall(rf"configs/{name}\.toml((?: --\w+ \S+)+)", header(name))
    words = options[0].split() if options else []
    return load(FILES[name], {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2])})[0]


def header(name: str) -> str:
    """The comment at the top as one line, without what sets it up in columns."""
    lines = []
    for line in FILES[name].read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def repository(name: str) -> str:
    path = resolved(name).model.model_name_or_path
    return WRITTEN_BY.get(path, path)


@cache
def shape(repo: str) -> ModelConfig:
    return from_hf(HUB[repo]["config"])


@cache
def num_parameters(repo: str) -> int:
    return sum(p.numel() for p in build_model(shape(repo)).parameters())


# ---------------------------------------------------------------- what a header says


def ranks(name: str) -> int:
    processes = re.search(r"torchrun --nproc-per-node (\d+) ", header(name))
    return int(processes[1]) if processes else 1


def tokens_line(config: Config, ranks: int) -> str:
    """The arithmetic of a step. Packs of pairs hold two answers."""
    assert config.data.packing
    train = config.train
    factors = [(train.per_device_train_batch_size, " packs"), (train.gradient_accumulation_steps, " accumulated")]
    factors += [(ranks, " ranks"), (2 if config.trainer_type == "dpo" else 1, ""), (config.data.max_length, " tokens")]
    shown = [f"{number:,}{unit}" for number, unit in factors if number > 1 or unit == " packs"]
    total = math.prod(number for number, _ in factors)
    return f"Tokens a step: {' x '.join(shown)} = {total:,}.".replace("1 packs", "1 pack")


def micro_batch(config: Config) -> int:
    """Tokens of one."""
    answers = 2 if config.trainer_type == "dpo" else 1
    return config.train.per_device_train_batch_size * answers * config.data.max_length


def memory_line(config: Config, repo: str, ranks: int) -> tuple[str, float]:
    """(what the header says, bytes of a GPU): what `minisft plan` predicts for full micro-batches, all of them trained."""
    tokens = micro_batch(config)
    place = Place(True, ranks, shards_of(config, ranks), precision="bf16")
    memory = predict(config, shape(repo), MicroBatch(tokens, tokens), place)
    return f"Memory of a GPU: {describe(memory)}.", memory.total


@each_file
def test_the_header_says_what_it_must(name):
    text, module = header(name), re.escape(f"configs/{name}.toml")
    if name != "smollm3-3b-base":
        assert re.search(rf"  (python|torchrun --nproc-per-node \d+) -m minisft\.train {module} ", text)
    assert re.search(r"Hardware: (one GPU with \d+ GB|\d+ GPUs with \d+ GB each|a CPU with two cores)[.,]", text)
    measured = r"(not yet measured|about [\d.,]+ (s|minutes|hours)[^.]*measured)"
    assert re.search(rf"Time: {measured}", text)
    assert re.search(r"Losses: (not yet measured|\d\.\d+ at .* measured)", text)
    assert re.search(r"(Licence|licence): \S", text)
    assert all(len(line) <= 128 for line in FILES[name].read_text().splitlines() if line.startswith("#"))


@each_run
def test_the_tokens_of_a_step_are_those_of_its_keys(name):
    assert tokens_line(resolved(name), ranks(name)) in header(name)


@each_of_hub
def test_the_memory_is_that_of_its_keys_and_fits(name):
    line, total = memory_line(resolved(name), repository(name), ranks(name))
    assert line in header(name)
    card = re.search(r"Hardware: (?:one GPU|\d+ GPUs) with (\d+) GB", header(name))
    assert total <= 1e9 * int(card[1]) / (1 + MARGIN)


@each_of_hub
def test_other_keys_would_not_fit_the_header(name):
    config, repo, text = resolved(name), repository(name), header(name)
    for change in ({"per_device_train_batch_size": 3}, {"gradient_accumulation_steps": 5}):
        other = replace(config, train=replace(config.train, **change))
        assert tokens_line(other, ranks(name)) not in text
    assert tokens_line(config, ranks(name) + 1) not in text
    longer = replace(config, data=replace(config.data, max_length=4 * config.data.max_length))
    assert tokens_line(longer, ranks(name)) not in text and memory_line(longer, repo, ranks(name))[0] not in text


def test_the_page_names_every_configuration():
    page = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in FILES if f"configs/{name}.toml" not in page] == []


# ---------------------------------------------------------------- what a configuration says


@each_run
def test_it_resolves_without_a_notice(name, capsys):
    config = resolved(name)
    assert capsys.readouterr().err == ""  # an old name, or a key that does nothing, would be told
    assert config.output_dir == f"output/{name}"
    assert (config.trainer_type == "dpo") == ("dpo" in name)
    assert (config.lora.r is not None) == (name in LORA) and config.model.load_in_4bit == ("qlora" in name)


def test_base_and_stages():
    base = load(FILES["smollm3-3b-base"], {"train_data": "rows.jsonl", "model_name_or_path": "owner/name"})[0]
    for name in FILES:
        if name.startswith("smollm3-3b-") and not name.endswith("base"):
            table = tomllib.loads(FILES[name].read_text())
            assert table["extends"] == "smollm3-3b-base.toml"
            assert resolved(name).train.max_grad_norm == base.train.max_grad_norm == 0.2
    first, second = load_stages(FILES["smollm3-3b"])
    assert [stage.config.trainer_type for stage in (first, second)] == ["sft", "dpo"]
    assert second.config.model.model_name_or_path == str(first.model_dir.resolve())
    assert first.config == resolved("smollm3-3b-sft") and second.config.dpo == resolved("smollm3-3b-dpo").dpo
    assert resolved("smollm3-3b-sft-long").train.num_train_epochs >= 5


def test_the_quickstart_of_preferences():
    first, second = (stage.config for stage in load_stages(FILES["quickstart-dpo"]))
    assert [config.trainer_type for config in (first, second)] == ["sft", "dpo"]
    assert Path(second.model.model_name_or_path) == Path(first.output_dir, "model").resolve()
    assert first.model == resolved("quickstart").model and first.evaluate.generate_data is None
    rows = {
        name: [
            json.loads(line) for line in (ROOT / "configs" / "quickstart" / f"{name}.jsonl").read_text().splitlines()
        ]
        for name in ("undecided", "pairs", "held_out_pairs")
    }
    prompts = [row["prompt"] for some in rows.values() for row in some]
    assert len(set(prompts)) == len(prompts), "no held-out prompt is trained"
    answers = {"Reverse": lambda w: w[::-1], "Sort": lambda w: "".join(sorted(w)), "Upper": str.upper}
    wrong = 0
    for row in rows["pairs"] + rows["held_out_pairs"]:
        kind, word = row["prompt"].strip().split(": ")
        assert row["chosen"] == answers[kind](word) != row["rejected"]
        assert len(row["rejected"]) == len(row["chosen"])
        wrong += row["rejected"] in [answer(word) for answer in answers.values()]
    assert wrong == len(rows["pairs"] + rows["held_out_pairs"]), "it would be right for another prompt"


@each_of_hub
def test_repositories_have_names(name):
    config = resolved(name)
    sources = [parse_source(s) for s in source_list(config.data.train_data) + source_list(config.data.eval_data)]
    assert sources and all(is_repository_name(source.path) for source in sources)
    assert is_repository_name(repository(name))
    for hub_path in (config.model.tokenizer_name_or_path, config.dpo.ref_model_name_or_path):
        assert hub_path is None or is_repository_name(hub_path)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("name", [name for name in OF_HUB if not name.startswith("gpt2")])
def test_the_model_has_the_size_of_its_name(name):
    """Within 10 %, but 1b may be what its makers call so: Llama's has 1.24 billion."""
    number, unit = re.search(r"-([\d.]+)(m|b)(?:-|$)", name).groups()
    within = 0.25 if number == "1" else 0.1
    assert num_parameters(repository(name)) == pytest.approx(float(number) * {"m": 1e6, "b": 1e9}[unit], rel=within)


@pytest.mark.parametrize("repo", HUB)
def test_the_model_has_the_published_number_of_parameters(repo):
    assert num_parameters(repo) == HUB[repo]["parameters"]


@pytest.mark.parametrize("repo", HUB)
def test_transformers_counts_the_same(repo):
    transformers = pytest.importorskip("transformers")
    table = dict(HUB[repo]["config"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(table.pop("model_type"), **table)
        )
    assert sum(p.numel() for p in model.parameters()) == num_parameters(repo)


def linears(model: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of every matrix of every layer, from the sizes in config.json."""
    D, F = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    mlp = [(D, F), (D, F), (F, D)] if model.mlp == "glu" else [(D, F), (F, D)]
    return [(D, q), (D, kv), (D, kv), (q, D), *mlp] * model.num_layers


def num_trained(config: Config, repo: str) -> int:
    """Numbers in the adapters: r (in + out) beside each matrix, and the rows of new tokens in embedding and head."""
    model = shape(repo)
    rows = len(config.model.new_special_tokens) * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return sum(config.lora.r * (i + o) for i, o in linears(model)) + rows


@pytest.mark.parametrize("name", LORA)
def test_the_adapters_have_the_size_of_their_rank(name):
    config, repo = resolved(name), repository(name)
    model = build_model(shape(repo))
    rows = tuple(range(len(config.model.new_special_tokens)))
    matrices = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    options = LoraOptions(
        r=config.lora.r,
        target_modules=config.lora.target_modules,
        trainable_token_indices={name: rows for name in matrices if rows},
    )
    assert len(apply_lora(model, options)) == len(linears(shape(repo))) == len(adapter_sites(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == num_trained(config, repo)


# ---------------------------------------------------------------- in miniature

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "</s>"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image_soft_token>"]
# What the tokenizers of the hub have: a chat template in the layout of the stock one, and EOS.
TOKENIZERS = {
    "openai-community/gpt2": (None, "<|endoftext|>"),
    "HuggingFaceTB/SmolLM2-135M": (None, "<|endoftext|>"),
    "HuggingFaceTB/SmolLM3-3B-Base": (None, "<|endoftext|>"),
    "mistralai/Mistral-7B-v0.1": (None, "</s>"),
    "Qwen/Qwen2.5-0.5B": ("smollm", "<|endoftext|>"),
    "Qwen/Qwen2.5-0.5B-Instruct": ("smollm", "<|im_end|>"),
    "Qwen/Qwen3-1.7B": ("qwen3", "<|im_end|>"),
    "Qwen/Qwen3-8B": ("qwen3", "<|im_end|>"),
    "google/gemma-3-1b-it": ("gemma", "<end_of_turn>"),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama3", "<|eot_id|>"),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama3", "<|eot_id|>"),
    "meta-llama/Llama-3.1-70B-Instruct": ("llama3", "<|eot_id|>"),
}
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "n_embd": 64, "n_layer": 2, "n_head": 4}


def shrunk(table: dict, vocab_size: int) -> dict:
    """A config.json with the same switches and a fraction of the sizes."""
    small = {key: SMALL.get(key, value) for key, value in table.items()} | {"vocab_size": vocab_size}
    for key in ("layer_types", "no_rope_layers"):
        if key in table:
            small[key] = table[key][2:4]
    return small


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ready")


def tiny_model(home: Path, model: str, tokenizer: str) -> Path:
    """A folder with random weights, and a tokenizer as that of the hub."""
    folder = home / model.replace("/", "--")
    if not folder.exists():
        template, eos = TOKENIZERS[tokenizer]
        special = [token for token in SPECIAL if not (model.startswith("mistralai") and "im_" in token)]
        made = train_tokenizer([], 256 + len(special), special_tokens=special, eos_token=eos, chat_template=None)
        made.save(folder)
        if template is not None:
            shutil.copy(TEMPLATES / f"{template}.jinja", folder / "chat_template.jinja")
        # Gemma's tokenizer has one token more than the model has rows
        rows = made.vocab_size - model.startswith("google/")
        network = build_model(from_hf(shrunk(HUB[model]["config"], rows)), "cpu")
        init_weights(network, 0)
        save_model(network, folder)
    return folder


def local(home: Path, sources: object) -> list[dict]:
    """The sources as files of twenty rows that were written by hand in the shape of the data set."""
    replaced = []
    for source in source_list(sources):
        table = {"path": source} if isinstance(source, str) else source
        path = home / f"{table['path'].replace('/', '--')}-{len(list(home.glob('*.jsonl')))}.jsonl"
        shapes = [json.dumps(row) for row in ROWS[" ".join([table["path"], table.get("name", "")]).strip()]]
        rows = [shapes[i % len(shapes)].replace("@", f"{path.stem[-1]}{i}") for i in range(20)]
        path.write_text("".join(f"{row}\n" for row in rows))
        kept = {key: value for key, value in table.items() if key in ("format", "field_map", "weight")}
        replaced.append({"path": str(path)} | kept)
    return replaced


@each_of_hub
def test_it_trains_in_miniature(name, home, tmp_path, capsys):
    config, repo = resolved(name), repository(name)
    folder = tiny_model(home, repo, config.model.tokenizer_name_or_path or repo)
    keys = {
        "output_dir": str(tmp_path / "out"),
        "data.cache_dir": str(tmp_path / "cache"),
        "model.model_name_or_path": str(folder),
        "data.train_data": local(home, config.data.train_data),
        "data.max_length": min(config.data.max_length, 512),
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": 2,
        "train.precision": "fp32",
        "train.weights_dtype": "fp32",
        "train.device": "cpu",
        "train.warmup_steps": 0,
        "train.warmup_ratio": 0.0,
        "log.logging_steps": 1,
        "log.report_to": [],
        "log.progress_bar": False,
        "verbose": True,
    }
    if config.model.tokenizer_name_or_path:
        keys["model.tokenizer_name_or_path"] = str(folder)
    if config.data.eval_data:
        keys["data.eval_data"] = local(home, config.data.eval_data)
    if config.data.eval_fraction:
        keys["data.eval_fraction"] = 0.2
    assert run(FILES[name], **keys).exit_code == 0
    losses = logged(tmp_path / "out")
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    if config.trainer_type == "dpo":  # what the headers say of the first step
        assert losses[0] == pytest.approx({("sigmoid",): math.log(2), ("apo_zero",): 1.0}[config.dpo.loss_type])
    else:
        shown = re.search(r"\[trained\] marked:\n(.*?)\n(?:eval|packing) ", capsys.readouterr().out, re.DOTALL)[1]
        trained = re.findall(r"\[(.*?)\]", shown, re.DOTALL)
        assert trained and all("Answer" in text and "Question" not in text for text in trained)
        end = config.model.eos_token or TOKENIZERS[config.model.tokenizer_name_or_path or repo][1]
        assert all(text.rstrip().endswith(end) for text in trained)
