"""Other trainers' files: every key ends up in exactly one list, what is written fits, and their defaults are theirs."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.commands import init
from minisft.config.load import DEFAULTS, load
from minisft.config.sections import KEYS
from minisft.config.stages import load_stages
from minisft.config.values import fit
from minisft.data.detect_format import detect_row_format, rename_fields
from minisft.data.formats import to_examples
from minisft.data.row_format import FormatOptions
from minisft.data.sources import parse_source, read_rows
from minisft.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_tokenizer
from minisft.errors import UserError
from minisft.importers import axolotl, llamafactory, stages, training_arguments, trl
from minisft.importers.translation import DIFFERENCE, NO_COUNTERPART, TRANSLATED, as_number, fitted_value
from minisft.importers.yaml_file import read_yaml

READERS = {"trl": trl, "axolotl": axolotl, "llamafactory": llamafactory}

TRL_FULL = """
model_name_or_path: acme/base-1b
dataset_name: acme/turns
dataset_train_split: train[:90%]
eval_strategy: steps
eval_steps: 50
learning_rate: 1e-5
max_length: 2048
packing: true
per_device_train_batch_size: 4
warmup_steps: 0.05
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
dtype: bfloat16
report_to: [tensorboard]
eos_token: <|im_end|>
bf16: true
gradient_checkpointing_kwargs: {use_reentrant: false}
"""
TRL_LORA = """
model_name_or_path: acme/base-1b
dataset_name: rows.jsonl
use_peft: true
lora_r: 32
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
learning_rate: 2.0e-4
assistant_only_loss: true
gradient_checkpointing: false
seed: 7
"""
TRL_QLORA = """
model_name_or_path: acme/base-7b
dataset_name: acme/text
dataset_text_field: body
use_peft: true
load_in_4bit: true
use_bnb_nested_quant: true
optim: paged_adamw_8bit
"""
TRL_DPO = """
model_name_or_path: acme/chat-1b
dataset_name: acme/pairs
loss_type: [sigmoid, bco_pair, sft]
loss_weights: [0.8, 0.2, 1.0]
beta: 0.05
precompute_ref_log_probs: true
label_smoothing: 0.1
num_train_epochs: 1
"""
TRL_MESSY = """
model_name_or_path: ${BASE_MODEL}
dataset_name: acme/turns
learning_rat: 1e-4
loss_type: dft
save_strategy: epoch
fp16: false
deepspeed: ds.json
max_length: null
logging_steps: 0.1
optim: galore_adamw
shuffle_dataset: false
env: {WANDB_PROJECT: x}
model_init_kwargs: {rope_scaling: {type: linear, factor: 2.0}}
"""
AXOLOTL_FULL = """
base_model: acme/base-8b
datasets:
  - {path: acme/instructions, type: alpaca, split: train}
val_set_size: 0.05
sequence_len: 8192
sample_packing: true
gradient_accumulation_steps: 8
micro_batch_size: 1
num_epochs: 1
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-5
cosine_min_lr_ratio: 0.1
bf16: auto
gradient_checkpointing: offload
flash_attention: true
evals_per_epoch: 2
use_tensorboard: true
wandb_project:
wandb_entity:
"""
AXOLOTL_LORA = """
base_model: acme/base-1b
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
lora_mlp_kernel: true
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
    train_on_eos: turn
chat_template: chatml
special_tokens: {pad_token: <|pad|>, bos_token: <s>}
learning_rate: 0.0002
warmup_steps: 10
excess_length_strategy: truncate
"""
AXOLOTL_QLORA = """
base_model: acme/base-7b
adapter: qlora
load_in_4bit: true
lora_r: 64
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, v_proj]
datasets: [{path: json, data_files: a.jsonl, type: completion, field: body}, {path: acme/turns, type: sharegpt}]
learning_rate: 1e-4
train_on_inputs: true
"""
AXOLOTL_DPO = """
base_model: acme/chat-8b
rl: dpo
rl_beta: 0.2
rpo_alpha: 0.5
datasets:
  - {path: acme/pairs, type: chat_template.default, field_messages: conversation, field_chosen: good, field_rejected: bad}
learning_rate: 5e-7
"""
AXOLOTL_MESSY = """
base_model: acme/base-1b
datasets:
  - path: acme/turns
    type: chat_template
    shards: 4
    train_on_eos: all
    roles_to_train: [user]
  - {path: acme/raw, type: input_output}
plugins: [axolotl.integrations.liger.LigerPlugin]
liger_rope: true
lr_groups: [{name: heads, modules: [lm_head], lr: 1e-6}]
embedding_lr: 1e-6
learning_rate: 1e-5
optimizer: lion
lora_r: 8
sequence_length: 4096
deepspeed: zero3.json
fsdp_config: {offload_params: true}
"""
LF_FULL = """
model_name_or_path: acme/base-4b
stage: sft
do_train: true
finetuning_type: full
dataset: own, hub
template: qwen3_nothink
cutoff_len: 4096
max_samples: 1000
output_dir: saves/full
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
learning_rate: 1.0e-5
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
"""
LF_LORA = """
model_name_or_path: acme/base-4b
stage: sft
finetuning_type: lora
lora_target: q_proj,v_proj
dataset: turns
template: llama3
val_size: 0.1
neat_packing: true
mask_history: true
bf16: true
report_to: none
"""
LF_QLORA = """
model_name_or_path: acme/base-4b
quantization_bit: 4
quantization_method: bnb
double_quantization: false
finetuning_type: lora
lora_rank: 16
lora_target: all
pissa_init: true
dataset: own
template: default
"""
LF_DPO = """
model_name_or_path: acme/base-4b
stage: dpo
finetuning_type: lora
pref_loss: simpo
pref_beta: 2.0
pref_ftx: 0.3
simpo_gamma: 1.0
dataset: pairs
template: qwen3
learning_rate: 5.0e-6
"""
LF_MESSY = """
model_name_or_path: acme/base-4b
stage: pt
finetuning_type: freeze
freeze_trainable_layers: 2
dataset: nowhere
dataset_dir: ${DATA}
use_galore: true
cutof_len: 99
train_on_prompt: true
interleave_probs: "0.5,0.5"
mix_strategy: interleave_under
plot_loss: true
"""
DATASET_INFO = {
    "own": {"file_name": "own.json", "columns": {"prompt": "question", "query": "context", "response": "reply"}},
    "hub": {"hf_hub_url": "acme/hub", "subset": "en", "split": "train", "num_samples": 50},
    "turns": {"file_name": "turns.json", "formatting": "sharegpt", "columns": {"messages": "dialogue"},
              "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
    "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt", "columns": {"messages": "conversations",
              "chosen": "good", "rejected": "bad"}},
}  # fmt: skip
FILES = {
    "trl": [TRL_FULL, TRL_LORA, TRL_QLORA, TRL_DPO, TRL_MESSY],
    "axolotl": [AXOLOTL_FULL, AXOLOTL_LORA, AXOLOTL_QLORA, AXOLOTL_DPO, AXOLOTL_MESSY],
    "llamafactory": [LF_FULL, LF_LORA, LF_QLORA, LF_DPO, LF_MESSY],
}
EVERY_FILE = [(name, text) for name, texts in FILES.items() for text in texts]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    return tmp_path


def translated(name: str, text: str, folder: Path):
    (folder / "theirs.yaml").write_text(text)
    table = read_yaml(folder / "theirs.yaml")
    more = {"folder": folder} if name == "llamafactory" else {}
    return READERS[name].read(table, None, init.first_row, **more)


def accounted(t) -> None:
    """Every key of the file is in exactly one list, and every value fits its key."""
    keys = [note.key for note in t.notes if note.key]
    assert sorted(keys) == sorted(t.given) and not t.left
    assert {note.kind for note in t.notes} <= {TRANSLATED, DIFFERENCE, NO_COUNTERPART}
    for key, value in t.values.items():
        assert fit(value, KEYS[key]) == value, (key, value)


def texts(t, kind: str) -> str:
    return "\n".join(note.text for note in t.notes if note.kind == kind and not note.harmless)


# ------------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize(("name", "text"), EVERY_FILE)
def test_a_file_becomes_a_configuration_that_loads(folder, capsys, name, text):
    accounted(translated(name, text, folder))
    options = ["--model", "acme/m"] if "${BASE" in text else []
    options += ["--data", "rows.jsonl"] if "dataset: nowhere" in text else []
    assert init.main([f"--from-{name}", "theirs.yaml", "ours.toml", *options]) == 0
    out = capsys.readouterr().out
    config, origins = load("ours.toml")
    assert "before it runs" not in out and "next: python -m minisft train ours.toml" in out
    assert all(len(line) <= 100 or " " not in line.strip() for line in out.split("\n"))
    written = (folder / "ours.toml").read_text().replace("#     ", "").replace("\n", " ")
    for note in translated(name, text, folder).notes:  # the file itself says what differs
        if note.kind != TRANSLATED and not note.harmless:
            assert note.text.split(": ")[0].split()[0] in written, note
    again = translated(name, text, folder).values
    same = {key for key, value in again.items() if origins[key] == "ours.toml" or value == KEYS[key].default}
    assert set(again) - same <= {"model.model_name_or_path"}


@pytest.mark.parametrize("name", ["trl", "axolotl", "llamafactory"])
def test_a_file_of_another_trainer_is_told_by_its_keys(folder, name):
    """Read as one of the named trainer it would have the wrong defaults: full weights, and no data, for a QLoRA."""
    files = {
        "trl": "model_name_or_path: a/b\ndataset_name: a/c\nuse_peft: true\nload_in_4bit: true\nlearning_rate: 1e-4\n",
        "axolotl": "base_model: a/b\nadapter: qlora\nload_in_4bit: true\ndatasets: [{path: a/c}]\nlearning_rate: 1e-4\n",
        "llamafactory": "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ntemplate: qwen\nlearning_rate: 1e-4\n",
    }
    for other, text in files.items():
        (folder / "its.yaml").write_text(text)
        words = [f"--from-{name}", "its.yaml", "--force"]
        if other == name:
            assert init.main(words) == 0
        else:
            with pytest.raises(UserError, match=f"keys of .*, not of .*\n  minisft init --from-{other} its.yaml"):
                init.main(words)


def test_a_rank_without_use_peft_trains_all_weights_by_either_name(folder):
    for key in ("lora_r", "lora_rank"):
        t = translated("trl", f"model_name_or_path: a/b\ndataset_name: a/c\n{key}: 8\n", folder)
        assert "lora.r" not in t.values and f"{key} = 8: all weights train" in texts(t, NO_COUNTERPART)


def test_trl_full(folder):
    t = translated("trl", TRL_FULL, folder)
    expected = {
        "trainer_type": "sft",
        "data.train_data": {"path": "acme/turns", "split": "train[:90%]"},
        "data.eval_data": {"path": "acme/turns", "split": "test"},
        "evaluate.eval_steps": 50,
        "train.learning_rate": 1e-5,
        "train.warmup_ratio": 0.05,
        "train.lr_scheduler_type": "cosine",
        "train.min_lr": pytest.approx(1e-6),
        "train.weights_dtype": "bf16",
        "train.stochastic_rounding": False,
        "model.eos_token": "<|im_end|>",
        "model.gradient_checkpointing": True,  # TRL's default
        "log.report_to": ("tensorboard",),
        "data.completion_only_loss": True,  # its rows cannot be seen
        "data.assistant_only_loss": False,
    }
    assert {key: t.values.get(key) for key in expected} == expected
    assert "attention stays inside" in texts(t, DIFFERENCE)


def test_trl_lora_and_what_it_trains_of_conversations(folder):
    t = translated("trl", TRL_LORA, folder)
    assert (t.values["lora.r"], t.values["lora.lora_dropout"]) == (32, 0.05)  # the file's, and TRL's default
    assert t.values["data.assistant_only_loss"] is True and "data.completion_only_loss" not in t.values
    all_turns = translated("trl", TRL_LORA.replace("assistant_only_loss: true", ""), folder)
    assert all_turns.values["data.assistant_only_loss"] is False
    assert "every turn of a conversation" in texts(all_turns, DIFFERENCE)
    usual = translated("trl", TRL_LORA.replace("lora_target_modules", "x"), folder)
    assert usual.values["lora.target_modules"] == ("q_proj", "v_proj")


def test_trl_qlora_dpo_and_mess(folder):
    q = translated("trl", TRL_QLORA, folder).values
    assert (q["model.load_in_4bit"], q["model.bnb_4bit_use_double_quant"], q["train.optim"]) == (
        True,
        True,
        "adamw_8bit",
    )
    assert q["data.dataset_text_field"] == "body" and "data.assistant_only_loss" not in q
    d = translated("trl", TRL_DPO, folder).values
    assert d["trainer_type"] == "dpo" and d["dpo.loss_type"] == ("sigmoid", "bco_pair", "sft")
    assert (d["dpo.loss_weights"], d["dpo.beta"], d["train.label_smoothing"]) == ((0.8, 0.2, 1.0), 0.05, 0.1)
    assert "train.learning_rate" not in d  # 1e-6 there and here
    m = translated("trl", TRL_MESSY, folder)
    lost = texts(m, NO_COUNTERPART)
    for key in (
        "learning_rat",
        "loss_type",
        "model_name_or_path",
        "deepspeed",
        "logging_steps",
        "optim",
        "rope_scaling",
    ):
        assert key in lost
    assert "did you mean learning_rate?" in lost and "data.shuffle" not in m.values
    assert m.values["data.max_length"] is None


def test_axolotl(folder):
    f = translated("axolotl", AXOLOTL_FULL, folder).values
    expected = {
        "data.train_data": {"path": "acme/instructions", "format": "instruction"},
        "data.prompt_format": "plain",
        "data.packing_strategy": "ffd",
        "data.truncation": "drop",
        "train.min_lr": pytest.approx(2e-6),
        "train.warmup_ratio": 0.03,
        "train.weights_dtype": "bf16",
        "train.optim": "adamw_8bit",
        "model.offload_activations": True,
        "log.report_to": ("tensorboard",),
    }
    assert {key: f.get(key) for key in expected} == expected
    lora = translated("axolotl", AXOLOTL_LORA, folder)
    assert lora.values["lora.target_modules"] == "all-linear" and lora.values["data.truncation"] == "right"
    assert lora.values["data.train_data"] == {"path": "rows.jsonl", "format": "sharegpt"}
    assert lora.values["model.chat_template"] == "chatml" and "train.warmup_ratio" not in lora.values
    assert lora.values["data.max_length"] == 512 and "bos_token" in texts(lora, NO_COUNTERPART)
    q = translated("axolotl", AXOLOTL_QLORA, folder).values
    assert q["model.load_in_4bit"] and q["data.completion_only_loss"] is False
    assert q["data.train_data"] == [
        {"path": "a.jsonl", "format": "text", "field_map": {"body": "text"}},
        {"path": "acme/turns", "format": "sharegpt"},
    ]
    d = translated("axolotl", AXOLOTL_DPO, folder).values
    assert (d["dpo.loss_type"], d["dpo.loss_weights"], d["dpo.beta"]) == (("sigmoid", "sft"), (1.0, 0.5), 0.2)
    assert d["data.train_data"]["field_map"] == {"conversation": "prompt", "good": "chosen", "bad": "rejected"}
    m = translated("axolotl", AXOLOTL_MESSY, folder)
    assert m.values["train.learning_rates"] == {"embed_tokens|lm_head": 1e-6, "lm_head": 1e-6}
    assert "train.weights_dtype" not in m.values and "lora.r" not in m.values  # lion; no adapter
    for key in ("shards", "train_on_eos", "roles_to_train", "plugins", "sequence_length", "deepspeed"):
        assert key in texts(m, NO_COUNTERPART)


def test_a_tracker_that_is_not_installed_is_told_and_the_file_written(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (folder / "a.yaml").write_text("base_model: a/b\nwandb_project: x\ndatasets: [{path: a/b}]\n")
    assert init.main(["--from-axolotl", "a.yaml"]) == 0
    assert "wandb is not installed" in capsys.readouterr().out and (folder / "a.toml").exists()


def test_axolotl_simpo_is_trls(folder):
    assert axolotl.read({"rl": "simpo"}).values["dpo.loss_weights"] == (1.0, 1.0)  # cpo_alpha is 1 there
    assert axolotl.read({"rl": "simpo", "cpo_alpha": 0.0}).values["dpo.loss_type"] == ("simpo",)


def test_new_tokens_of_llamafactory_that_are_numbers_are_texts(folder):
    found = translated("llamafactory", LF_LORA + "add_tokens: 7\nadd_special_tokens: <a>, <b>\n", folder)
    assert found.values["model.new_special_tokens"] == ("7", "<a>", "<b>")


@pytest.mark.parametrize("name", ["trl", "axolotl", "llamafactory"])
def test_a_key_of_other_trainers_sources_is_listed(folder, name):
    f = translated(name, "dataset_config_name: en\ndata_dir: x\n", folder)
    assert "data.train_data.name" in texts(f, NO_COUNTERPART) and "data.train_data.data_dir" in texts(f, NO_COUNTERPART)


def test_a_table_as_the_name_of_llamafactorys_data_is_listed(folder):
    f = translated("llamafactory", "dataset:\n- [own]\n", folder)
    assert "data.train_data" not in f.values and "dataset" in texts(f, NO_COUNTERPART)


def test_llamafactory(folder):
    f = translated("llamafactory", LF_FULL, folder)
    own = {"path": str(folder / "data/own.json"), "split": "[:1000]"}
    own["field_map"] = {"question": "instruction", "context": "input", "reply": "output"}
    assert f.values["data.train_data"] == [own, {"path": "acme/hub", "name": "en", "split": "train[:50]"}]
    assert f.values["data.max_length"] == 4096 and "lora.r" not in f.values and "template" in texts(f, NO_COUNTERPART)
    lora = translated("llamafactory", LF_LORA, folder).values
    assert (lora["lora.r"], lora["lora.lora_alpha"], lora["lora.target_modules"]) == (8, 16.0, ("q_proj", "v_proj"))
    assert lora["data.train_data"]["field_map"] == {"dialogue": "messages"} and lora["train.learning_rate"] == 5e-5
    assert lora["data.packing"] and lora["data.train_on_last_turn_only"] and lora["data.max_length"] == 2048
    q = translated("llamafactory", LF_QLORA, folder).values
    assert (q["model.load_in_4bit"], q["model.bnb_4bit_use_double_quant"]) == (True, False)
    assert (q["lora.lora_alpha"], q["lora.init_lora_weights"]) == (32.0, "pissa_niter_16")
    d = translated("llamafactory", LF_DPO, folder).values
    assert (d["dpo.loss_type"], d["dpo.loss_weights"]) == (("simpo", "sft"), (1.0, 0.3))
    assert d["data.train_data"]["field_map"] == {"good": "chosen", "bad": "rejected"}
    m = translated("llamafactory", LF_MESSY, folder)
    assert (
        m.values["data.packing"] and m.values["data.assistant_only_loss"] is False and "data.train_data" not in m.values
    )
    for key in ("finetuning_type", "dataset", "dataset_dir", "use_galore", "cutof_len", "interleave_probs"):
        assert key in texts(m, NO_COUNTERPART)


# ------------------------------------------------------------------------------------------------- preference data

OWN_TEMPLATE = (  # unlike ChatML, so that the two are told apart
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SYSTEM, QUESTION, GOOD, BAD = "Be brief.", "Capital of France?", "It is Paris.", "It is Lyon."
ASKED = [{"role": "user", "content": QUESTION}]
GOOD_TURN, BAD_TURN = ({"role": "assistant", "content": answer} for answer in (GOOD, BAD))
PAIR = {"chosen": GOOD, "rejected": BAD}
CONVERSATIONS = {"chosen": [*ASKED, GOOD_TURN], "rejected": [*ASKED, BAD_TURN]}
SHAREGPT = {"conversations": [{"from": "human", "value": QUESTION}]}
SHAREGPT_PAIR = {side: {"from": "gpt", "value": text} for side, text in PAIR.items()}
AS_IS = (QUESTION, GOOD)
OWN = (f"<user>{QUESTION}</s><assistant>", f"{GOOD}</s>")
SYSTEM_TURNS = {"chatml": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n",
                "llama3": f"<|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"}  # fmt: skip
CHATML = (f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n", f"{GOOD}<|im_end|>\n")
# TRL puts EOS, here <|im_end|>, after an answer that ends otherwise.
LLAMA3 = (
    f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    f"{GOOD}<|eot_id|><|im_end|>",
)
INST = (f"[INST] {QUESTION} [/INST]", f"{GOOD}<|im_end|>")


@pytest.fixture(scope="module")
def own_tokenizer(tmp_path_factory):
    tokens = [*SPECIAL_TOKENS, "</s>"]
    made = train_tokenizer([f"{QUESTION} {GOOD} {BAD}"] * 5, 300, chat_template=OWN_TEMPLATE, special_tokens=tokens)
    made.save(folder := tmp_path_factory.mktemp("tokenizer"))
    return folder


def first_example(name: str, text: str, rows: list[dict], folder: Path) -> tuple[str, str]:
    """(prompt, answer) of the first row, as the configuration trains it that `text` becomes."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "theirs.yaml").write_text(text)
    assert init.main([f"--from-{name}", "theirs.yaml", "ours.toml", "--force"]) == 0
    config, _ = load("ours.toml")
    tokenizer = load_tokenizer(config.model.model_name_or_path, chat_template=config.model.chat_template)
    source = parse_source(config.data.train_data)
    row = rename_fields(next(iter(read_rows(source))).data, source.field_map, source.ignore)
    answers = "labels" if "kto" in config.dpo.loss_type else "pairs"
    options = FormatOptions(answers=answers, prompt_format=config.data.prompt_format)
    row_format = detect_row_format(row, source.format, options, has_template=True)
    example = to_examples(row, row_format, options)[0]
    if example.messages is None:
        return tuple(piece.text for piece in example.pieces)
    prompt = tokenizer.apply_chat_template(example.messages[:-1], add_generation_prompt=True)
    return prompt, tokenizer.apply_chat_template(example.messages).removeprefix(prompt)


AXOLOTL_TYPES = [
    ("dpo", "{0}.intel", {"question": QUESTION, **PAIR}),
    ("ipo", "{0}.icr", {"input": QUESTION, **PAIR}),
    ("dpo", "{0}.prompt_pairs", {"prompt": QUESTION, **PAIR}),
    ("simpo", "{0}.argilla", {"instruction": QUESTION, "chosen_response": GOOD, "rejected_response": BAD}),
    ("dpo", "{0}.ultra", {"prompt": QUESTION, **CONVERSATIONS}),
    ("dpo", "{0}.argilla_chat", CONVERSATIONS),
    ("dpo", "{0}", {"question": QUESTION, "chosen_response": GOOD, "rejected_response": BAD}),
    ("kto", "{0}.argilla", {"instruction": QUESTION, "completion": GOOD, "label": True}),
    ("kto", "{0}.intel", {"question": QUESTION, "completion": GOOD, "label": True}),
    ("kto", "{0}.prompt_pairs", {"prompt": QUESTION, "completion": GOOD, "label": True}),
    ("kto", "{0}.ultra", {"prompt": QUESTION, "completion": GOOD, "label": True}),
    ("kto", "{0}.argilla_chat", {"completion": [*ASKED, GOOD_TURN], "label": True}),
]  # fmt: skip
FROM_VALUE = "message_property_mappings: {role: from, content: value}, field_messages: conversations"


@pytest.mark.parametrize(
    ("rl", "kind", "row", "expected"),
    [
        *((rl, kind.format("chatml"), row, CHATML) for rl, kind, row in AXOLOTL_TYPES),
        *((rl, kind.format("llama3"), row, LLAMA3) for rl, kind, row in AXOLOTL_TYPES),
        ("dpo", "chatml.intel", {"question": QUESTION, "prompt": "another", **PAIR}, CHATML),
        ("dpo", "chat_template.default", {"messages": ASKED, "chosen": GOOD_TURN, "rejected": BAD_TURN}, OWN),
        ("dpo", "chat_template", {"messages": QUESTION, **PAIR}, OWN),
        ("dpo", f"chat_template, {FROM_VALUE}", SHAREGPT | SHAREGPT_PAIR, OWN),
        ("dpo", "chat_template.argilla_chat", CONVERSATIONS, OWN),
        ("orpo", "chat_template.argilla", CONVERSATIONS, OWN),
        ("dpo", "passthrough", {"prompt": QUESTION, **PAIR}, AS_IS),
        ("dpo", "null", {"prompt": QUESTION, **PAIR}, AS_IS),
        ("dpo", "{field_prompt: q, field_chosen: a, field_rejected: b}", {"q": QUESTION, "a": GOOD, "b": BAD}, AS_IS),
        ("kto", "{field_prompt: q, field_completion: a, field_label: l}", {"q": QUESTION, "a": GOOD, "l": True}, AS_IS),
        ("dpo", '{prompt_format: "[INST] {prompt} [/INST]"}', {"prompt": QUESTION, **PAIR}, INST),
    ],
)  # fmt: skip
def test_axolotl_preference_types_train_prompt_and_template_as_there(folder, own_tokenizer, rl, kind, row, expected):
    text = f"base_model: {own_tokenizer}\nrl: {rl}\ndatasets:\n- {{path: rows.jsonl, type: {kind}}}\n"
    prompt, answer = expected
    assert first_example("axolotl", text, [row], folder) == expected
    turn = SYSTEM_TURNS.get(kind.partition(".")[0], "")  # the other types read no system prompt
    turn = "" if kind.endswith("argilla_chat") else f"<system>{SYSTEM}</s>" if rl == "orpo" else turn
    more = {"system": SYSTEM, "weight": 2.0, "history": [["a", "b"]]}
    assert first_example("axolotl", text, [row | more], folder) == (turn + prompt, answer)


def test_the_system_prompt_of_a_user_defined_type(folder, own_tokenizer):
    kind = '{field_system: s, prompt_format: "<s>{system}</s>{prompt}"}'
    text = f"base_model: {own_tokenizer}\nrl: dpo\ndatasets:\n- {{path: rows.jsonl, type: {kind}}}\n"
    row = {"prompt": QUESTION, **PAIR}
    assert first_example("axolotl", text, [row], folder)[0] == f"<s></s>{QUESTION}"
    assert first_example("axolotl", text, [row | {"s": SYSTEM}], folder)[0] == f"<s>{SYSTEM}</s>{QUESTION}"


@pytest.mark.parametrize(
    ("rl", "kind", "row", "told"),
    [
        ("dpo", "zephyr.nectar", {"prompt": QUESTION, "answers": [{"answer": GOOD, "rank": 1}]}, "ranked answers"),
        ("dpo", "chatml.argilla_chat", CONVERSATIONS, "of each conversation the first question"),
        ("dpo", "chatml.intel", {"question": QUESTION, **PAIR}, "after <|im_end|> comes the tokenizer's EOS"),
        ("dpo", "llama3.intel", {"question": QUESTION, **PAIR}, "a prompt begins with BOS there"),
        ("dpo", "mine.own", {"prompt": QUESTION, **PAIR}, "type mine.own is not known"),
        ("dpo", '{prompt_format: "{prompt!r}"}', {"prompt": QUESTION, **PAIR}, "this text is not written here"),
        ("dpo", '{chosen_format: "{chosen}!"}', {"prompt": QUESTION, **PAIR}, "written around the rejected answer too"),
        ("dpo", "chat_template", {"messages": ASKED, **PAIR}, "these are text, and must be rewritten"),
        ("orpo", "chat_template.argilla", CONVERSATIONS, "(ChatML's newline) is context here"),
        ("null", "context_qa", {"text": "x"}, "the prompts of type context_qa are written in another way"),
        ("null", '{field_instruction: q, format: "Q: {instruction}"}', {"q": "x"}, "what the type's format says there"),
    ],
)
def test_what_of_an_axolotl_type_differs_here_is_said(folder, rl, kind, row, told):
    (folder / "rows.jsonl").write_text(json.dumps(row))
    t = translated("axolotl", f"rl: {rl}\ndatasets:\n- {{path: rows.jsonl, type: {kind}}}\n", folder)
    accounted(t)
    assert told in texts(t, DIFFERENCE)


@pytest.mark.parametrize("rl", [None, "dpo", "kto"])
@pytest.mark.parametrize(
    "kind", ["chat_template.default", "alpaca", "completion", {"field_instruction": ["a"], "field_prompt": ["a"]}]
)
def test_a_list_in_place_of_a_column_of_axolotls_is_said(rl, kind):
    fields = ("field", "text_column", "field_messages", "field_tools", "field_chosen", "field_rejected")
    t = axolotl.read(
        {
            "rl": rl,
            "datasets": [{"path": "a/b", "type": kind, **dict.fromkeys(fields, ["a"]), "roles": {"user": [["a"]]}}],
        }
    )
    accounted(t)
    assert texts(t, NO_COUNTERPART).count("expected the name of one column") >= len(fields)


@pytest.mark.parametrize(
    "info", [{"columns": {"prompt": ["a"]}}, {"tags": {"role_tag": 1}}, {"columns": {"messages": {"a": 1}}}]
)
def test_a_column_of_llamafactorys_that_is_no_name_is_refused(folder, info):
    (folder / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": "rows.jsonl", "num_samples": "no", **info}})
    )
    with pytest.raises(UserError, match="dataset_info.json: rows: (prompt|role_tag|messages) = "):
        llamafactory.read({"dataset": "rows", "dataset_dir": "."}, folder=folder)


def test_data_sets_of_two_types_cannot_have_a_template_each(folder):
    text = "rl: dpo\ndatasets:\n- {path: a/b, type: chatml.intel}\n- {path: c/d, type: llama3.intel}\n- {path: e/f}\n"
    told = texts(translated("axolotl", text, folder), DIFFERENCE)
    assert "c/d (type llama3.intel): model.chat_template" in told and "e/f (type absent" in told
    text = "rl: dpo\nchat_template: gemma\ndatasets:\n- {path: a/b, type: chatml.intel}\n- {path: c/d, type: chat_template}"
    t = translated("axolotl", text, folder)
    assert "is that of one data set" in texts(t, DIFFERENCE) and "chat_template = " in texts(t, NO_COUNTERPART)


def test_axolotls_files_keep_their_slices_and_all_of_them_are_read():
    t = axolotl.read({"datasets": [{"path": "json", "data_files": ["a.jsonl", "b.jsonl"], "split": "train[:10%]"},
                                   {"path": "owner/rows.v1", "split": "test"}]})  # fmt: skip
    hub = {"path": "owner/rows.v1", "split": "test"}
    assert t.values["data.train_data"] == [{"path": f"{name}.jsonl", "split": "[:10%]"} for name in "ab"] + [hub]


ALPACA_PAIR = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
OF_TURNS = {"messages": "turns", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    ("stage", "info", "row"),
    [
        ("dpo", {"ranking": True, "columns": ALPACA_PAIR}, {"instruction": QUESTION, "input": "", **PAIR}),
        (
            "dpo",
            {"ranking": True, "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}},
            {"q": QUESTION, "a": GOOD, "b": BAD},
        ),
        (
            "dpo",
            {"ranking": True, "formatting": "sharegpt", "columns": OF_TURNS},
            {"turns": SHAREGPT["conversations"], "good": SHAREGPT_PAIR["chosen"], "bad": SHAREGPT_PAIR["rejected"]},
        ),
        (
            "dpo",
            {"ranking": True, "formatting": "sharegpt", "columns": OF_TURNS, "tags": ROLES},
            {"turns": ASKED, "good": GOOD_TURN, "bad": BAD_TURN},
        ),
        (
            "kto",
            {"columns": {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "good"}},
            {"instruction": QUESTION, "input": "", "output": GOOD, "good": True},
        ),
        (
            "kto",
            {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "kto_tag"}, "tags": ROLES},
            {"messages": [*ASKED, GOOD_TURN], "kto_tag": True},
        ),
    ],
)
def test_llamafactory_preference_rows_train_the_prompt_in_a_template(folder, own_tokenizer, stage, info, row):
    described = {"mine": {"file_name": "../rows.jsonl", **info}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(described))
    text = f"model_name_or_path: {own_tokenizer}\nstage: {stage}\ndataset: mine\ntemplate: "
    assert first_example("llamafactory", f"{text}qwen", [row], folder) == OWN
    assert first_example("llamafactory", f"{text}chatml", [row], folder) == CHATML
    more = {"sys": SYSTEM, "input": "Now."} if "input" in row else {"sys": SYSTEM}
    prompt = OWN[0].replace(QUESTION, f"{QUESTION}\n\nNow.") if "input" in row else OWN[0]
    assert first_example("llamafactory", f"{text}qwen", [row | more], folder) == (prompt, OWN[1])  # no column is named
    described["mine"]["columns"] = info["columns"] | {"system": "sys"}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(described))
    assert first_example("llamafactory", f"{text}qwen", [row | more], folder) == (
        f"<system>{SYSTEM}</s>{prompt}",
        OWN[1],
    )


@pytest.mark.parametrize(
    ("info", "row", "told"),
    [
        ({"ranking": True, "columns": ALPACA_PAIR}, {"instruction": QUESTION, **PAIR}, "prompts and answers that are text"),
        ({"columns": {"prompt": "q", "query": "c"}}, {"q": QUESTION, "c": "Europe"}, "joined by a newline there"),
        ({"columns": {"prompt": "q", "history": "h"}}, {"q": QUESTION, "h": []}, "the answers in h (earlier turns)"),
        ({"formatting": "sharegpt", "tags": {"user_tag": "prompter"}}, SHAREGPT, "user_tag = prompter"),
        ({"formatting": "openai", "tags": ROLES}, {"messages": ASKED}, "detailed thinking off"),
    ],
)  # fmt: skip
def test_what_of_a_llamafactory_data_set_differs_here_is_said(folder, info, row, told):
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "mine.json", **info}}))
    (folder / "data" / "mine.json").write_text(json.dumps([row]))
    stage = "dpo" if info.get("ranking") else "sft"
    assert told in texts(translated("llamafactory", f"stage: {stage}\ndataset: mine", folder), DIFFERENCE)


# ------------------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("trl", "dataset_name: a/b", "(ChatML's newline) is context here"),
        ("llamafactory", "stage: sft", "(ChatML's newline) is context here"),
        ("trl", "dataset_name: a/b", "the embedding of the pad token is trained here"),
        ("axolotl", "base_model: a/b", "the embedding of the pad token is trained here"),
        ("trl", "{use_peft: true, use_dora: true, weight_decay: 0.1}", "DoRA's magnitudes do not decay"),
        ("axolotl", "{adapter: lora, peft_use_dora: true, weight_decay: 0.1}", "DoRA's magnitudes do not decay"),
        ("trl", "{beta: 0.1, truncation_mode: keep_end}", "keeps the end of prompt and answer"),
        ("axolotl", "rl: orpo", "counts the tokens of its prompt there"),
        ("axolotl", "rl: kto", "KTO: the answers that are set beside the prompts of other rows"),
        ("llamafactory", "stage: kto", "KTO: the answers that are set beside the prompts of other rows"),
        ("trl", "{loss_type: kto}", "KTO: the answers that are set beside the prompts of other rows"),
        ("trl", "lr_scheduler_type: polynomial", "train.min_lr = 1e-07: transformers' polynomial ends"),
        ("trl", "{dataset_name: rows.jsonl, eval_strategy: steps}", "no evaluation: rows.jsonl has no splits"),
    ],
)
def test_what_differs_there_is_said(folder, name, text, told):
    t = translated(name, text, folder)
    accounted(t)
    assert told in texts(t, DIFFERENCE)


@pytest.mark.parametrize(
    ("name", "text", "not_told"),
    [
        ("trl", "{dataset_name: rows.jsonl}", "ChatML's newline"),  # messages, of which all is trained
        ("llamafactory", "stage: pt", "ChatML's newline"),
        ("trl", "{use_peft: true, use_dora: true}", "pad token"),
        ("trl", "{use_peft: true, use_dora: true}", "DoRA's"),
        ("trl", "{truncation_mode: keep_start, packing: false}", "keeps the end"),
        ("llamafactory", "{stage: dpo, pref_loss: orpo}", "counts the tokens of its prompt"),
        ("axolotl", "rl: dpo", "KTO:"),
        ("axolotl", "{rl: dpo, datasets: [{path: a/b, type: chatml.ultra}]}", "is not known"),
        ("axolotl", "{rl: dpo, datasets: [{path: a/b, type: llama3.prompt_pairs}]}", "is not known"),
        ("trl", "{lr_scheduler_type: polynomial, lr_scheduler_kwargs: {lr_end: 1e-6}}", "1e-07"),
    ],
)
def test_what_does_not_apply_is_not_said(folder, name, text, not_told):
    assert not_told not in texts(translated(name, text, folder), DIFFERENCE)


@pytest.mark.parametrize(
    ("name", "text", "row", "ignored"),
    [
        ("trl", "{dataset_name: rows.jsonl, beta: 0.1}", {"prompt": "", **PAIR, "system": "", "weight": 2}, ["system", "weight"]),
        ("trl", "dataset_name: rows.jsonl", {"messages": ASKED, "system": "s", "tools": []}, ["system"]),
        ("axolotl", "datasets: [{path: rows.jsonl, type: alpaca}]", {"instruction": "", "output": "", "system": ""}, ["system"]),
        ("axolotl", "datasets: [{path: rows.jsonl, type: chat_template}]", {"messages": ASKED, "weight": 2}, ["weight"]),
        ("axolotl", "{rl: dpo, datasets: [{path: rows.jsonl}]}", {"prompt": "q", **PAIR, "tools": []}, ["tools"]),
    ],
)  # fmt: skip
def test_a_column_that_is_not_read_there_is_left_out(folder, name, text, row, ignored):
    (folder / "rows.jsonl").write_text(json.dumps(row))
    t = translated(name, text, folder)
    assert t.values["data.train_data"]["ignore"] == ignored
    assert f'ignore = ["{ignored[0]}"' in texts(t, DIFFERENCE)
    assert "cannot be read yet" not in texts(t, DIFFERENCE)
    assert "cannot be read yet" in texts(translated(name, text.replace("rows.jsonl", "acme/rows"), folder), DIFFERENCE)


@pytest.mark.parametrize(
    ("name", "text", "patience"),
    [
        ("trl", "{dataset_name: rows.jsonl, validation_split: 0.1, eval_strategy: epoch, save_strategy: epoch, ", None),
        ("axolotl", "{val_set_size: 0.1, evals_per_epoch: 1, saves_per_epoch: 1, early_stopping_patience: 3, ", 3),
        ("llamafactory", "{val_size: 0.1, eval_strategy: epoch, save_strategy: epoch, early_stopping_steps: 3, ", 3),
    ],
)
def test_the_best_model_and_epochs_are_translated(folder, name, text, patience):
    best = "load_best_model_at_end: true, metric_for_best_model: eval_loss, greater_is_better: false"
    t = translated(name, text + best + "}", folder)
    accounted(t)
    keys = (
        "eval_steps",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "early_stopping_patience",
    )
    assert [t.values.get(f"evaluate.{key}") for key in keys] == ["epoch", True, "eval_loss", False, patience]
    assert t.values["checkpoint.save_steps"] == "epoch"
    # without data to evaluate on such a file would be refused
    t = translated(name, re.sub(r"val\w*: 0.1, ", "", text) + best + "}", folder)
    accounted(t)
    assert "evaluate.load_best_model_at_end" not in t.values and "nothing to evaluate on" in texts(t, NO_COUNTERPART)


def test_a_local_file_gets_no_split_that_it_lacks(folder):
    local = (
        "{dataset_name: rows.jsonl, eval_strategy: steps, dataset_train_split: 'train[:50%]', dataset_test_split: test}"
    )
    t = translated("trl", local, folder)
    accounted(t)
    assert "data.eval_data" not in t.values and "dataset_test_split" in texts(t, NO_COUNTERPART)
    assert t.values["data.train_data"] == {"path": "rows.jsonl", "split": "[:50%]"}
    t = translated("trl", "{dataset_mixer: {rows.jsonl: 1.0}, evaluation_strategy: steps}", folder)
    assert t.values["data.train_data"] == "rows.jsonl" and "data.eval_data" not in t.values
    t = translated("trl", "datasets: [{path: json, data_files: rows.jsonl}]", folder)
    assert t.values["data.train_data"] == "rows.jsonl"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trl", "lora_r: 16"),  # without use_peft, and TRL trains all weights
        ("trl", "{use_peft: true, lora_target_parameters: [experts]}"),
        ("trl", "{use_peft: true, lora_task_type: SEQ_CLS}"),
        ("trl", "env: {OMP_NUM_THREADS: 1}"),
        ("trl", "streaming: true"),
        ("trl", "tf32: true"),
        ("trl", "{lr_scheduler_type: reduce_lr_on_plateau, metric_for_best_model: accuracy}"),
        ("trl", "data_seed: 0"),
        ("axolotl", "dataset_shard_num: 8"),
        ("axolotl", "skip_prepare_dataset: true"),
        ("axolotl", "tokenizer_use_mistral_common: true"),
        ("axolotl", "{adapter: lora, peft_ensure_weight_tying: true}"),
        ("axolotl", "{adapter: lora, peft_autocast_adapter_dtype: false}"),
        ("axolotl", "{adapter: lora, lora_target_linear: true, lora_target_modules: [lm_head]}"),
        ("axolotl", "datasets: [{path: a/b, type: sharegpt, conversation: vicuna}]"),
        ("axolotl", "pretraining_dataset: [{path: a/b, skip: 100}]"),
        ("llamafactory", "tokenized_path: saves/tokens"),
        ("llamafactory", "ignore_pad_token_for_loss: false"),
        ("llamafactory", "{adapter_name_or_path: a, create_new_adapter: true}"),
        ("llamafactory", "do_train: false"),
    ],
)
def test_a_key_with_an_effect_there_is_never_said_to_have_none(folder, name, text):
    t = translated(name, text, folder)
    accounted(t)
    key = next(key for key in reversed(t.given))
    assert [note for note in t.notes if note.key == key and note.kind == NO_COUNTERPART and not note.harmless]


@pytest.mark.parametrize(
    ("name", "text", "ours"),
    [
        ("axolotl", "{rl: ipo, dpo_loss_type: [hinge], dpo_label_smoothing: 0.1}", ("dpo.loss_type", ("ipo",))),
        ("axolotl", "{rl: kto, dpo_label_smoothing: 0.1}", ("train.label_smoothing", None)),
        ("axolotl", "{rl: simpo, rl_beta: 2.0, orpo_alpha: 0.1}", ("dpo.beta", 2.0)),
        ("axolotl", "{dpo_loss_type: [hinge], rl_beta: 0.3}", ("dpo.loss_type", None)),
        ("llamafactory", "{stage: kto, dpo_label_smoothing: 0.1}", ("train.label_smoothing", None)),
        ("llamafactory", "{stage: dpo, kto_chosen_weight: 2.0}", ("dpo.desirable_weight", None)),
    ],
)
def test_a_key_of_another_loss_has_no_effect_as_there(folder, name, text, ours):
    t = translated(name, text, folder)
    accounted(t)
    assert t.values.get(ours[0]) == ours[1] and texts(t, NO_COUNTERPART) == ""


SCHEDULES = [
    ({"lr_scheduler_type": "polynomial"}, 1e-7, {}),
    ({"lr_scheduler_type": "polynomial", "kwargs": {"lr_end": 1e-6, "power": 2.0}}, 1e-6, {"power": 2}),
    ({"lr_scheduler_type": "cosine_with_min_lr", "kwargs": {"min_lr_rate": "0.1"}}, 1e-5, {}),
    ({"lr_scheduler_type": "cosine_with_restarts", "kwargs": {"num_cycles": 3}}, None, {"num_cycles": 3}),
    (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "max_steps": 49,
            "kwargs": {"num_decay_steps": 7, "min_lr_ratio": 0.01},
        },
        1e-6,
        {"decay_ratio": 7, "decay_type": "cosine"},
    ),
    (
        {
            "lr_scheduler_type": "warmup_stable_decay",
            "max_steps": 10,
            "kwargs": {"num_decay_steps": 3, "decay_type": "1-sqrt"},
        },
        None,
        {"decay_ratio": 3, "decay_type": "1-sqrt"},
    ),
]


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(("keys", "min_lr", "options"), SCHEDULES)
def test_transformers_schedules_keep_their_options(name, keys, min_lr, options):
    """decay_ratio: as the number of steps that it makes of max_steps."""
    table = {("lr_scheduler_kwargs" if key == "kwargs" else key): value for key, value in keys.items()}
    if name == "axolotl":
        table["lr_scheduler"] = table.pop("lr_scheduler_type")
    t = READERS[name].read(table | {"learning_rate": 1e-4, "datasets": []})
    assert t.values.get("train.min_lr") == (min_lr and pytest.approx(min_lr))
    written = dict(t.values.get("train.lr_scheduler_kwargs", {}))
    if "decay_ratio" in written:
        written["decay_ratio"] = math.ceil(keys["max_steps"] * written["decay_ratio"])
    assert written == options
    assert "lr_scheduler" not in texts(t, NO_COUNTERPART)


def test_decay_steps_of_a_run_of_unknown_length_are_a_difference():
    kwargs = {"num_decay_steps": 100}
    t = trl.read({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": kwargs, "num_train_epochs": 1})
    assert "lr_scheduler_kwargs.num_decay_steps = 100" in texts(t, DIFFERENCE)
    default = trl.read({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "dpo")
    assert default.values["train.min_lr"] == pytest.approx(1e-7)  # of TRL's learning rate for pairs
    constant = trl.read({"lr_scheduler_type": "constant", "warmup_ratio": 0.1})  # which has no warm-up in transformers
    assert "train.warmup_ratio" not in constant.values


# ------------------------------------------------------------------------------------------------- properties

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.floats(0, 2),
    st.sampled_from(["", "1e-4", "-1", "1e999", "none", "auto", "x/y", "${A}", -0.5, 10**30, math.inf, math.nan]),
    st.lists(st.sampled_from(["sft", "a", "wandb"]), max_size=2), st.just({"a": 1, "b": [{"c": 2}]}),
)  # fmt: skip
KNOWN = {
    "trl": [*trl.SAME, *trl.OF_LORA, *trl.OF_SFT, *trl.OF_DPO, *trl.OF_4BIT, *training_arguments.SAME, *trl.ONLY_CHANGES,
            *trl.ONLY_HARMLESS, "bf16", "fp16", "use_peft", "dataset_name", "warmup_steps", "warmup_ratio", "rpo_alpha",
            "eval_strategy", "report_to", "resume_from_checkpoint", "dtype", "typo"],
    "axolotl": [*axolotl.SAME, *axolotl.OF_LORA, *axolotl.TRACKER_KEYS, *axolotl.EASY, *axolotl.HARD, "bf16", "bfloat16",
                "fp16", "adapter", "chat_template", "chat_template_jinja", "tokens", "embedding_lr", "cpo_alpha", "rl_beta",
                "train_on_inputs", "lora_target_linear", "load_in_4bit", "gradient_checkpointing", "typo"],
    "llamafactory": [*llamafactory.SAME, *llamafactory.OF_LORA, *training_arguments.SAME, *llamafactory.EASY,
                     *llamafactory.HARD, "dataset", "template", "packing", "neat_packing", "pref_loss", "pref_ftx", "pissa_init",
                     "quantization_bit", "quantization_method", "lora_target", "bf16", "pure_bf16", "max_samples", "typo"],
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_key_vanishes_and_no_value_is_wrong(name, data):
    keys = data.draw(st.lists(st.sampled_from([k for k in KNOWN[name] if "*" not in k]), max_size=12, unique=True))
    table = {key: data.draw(VALUES, label=key) for key in keys}
    table |= {k: data.draw(st.sampled_from(v)) for k, v in {
        "axolotl": {"lr_groups": [None, [{"name": "a", "modules": ["x"], "lr": -1}, {"modules": "y", "lr": 1e-3}]],
                    "rl": [None, "dpo", "kto", "simpo"], "datasets": [None, [], [{"path": "a/b", "type": "alpaca", "x": 1}]]},
        "llamafactory": {"stage": [None, "pt", "sft", "dpo", "kto"], "finetuning_type": [None, "lora", "full", "oft"]},
        "trl": {"datasets": [None, [{"path": "a/b", "fraction": 0.5}, {"path": "c", "columns": ["x"]}]]},
    }[name].items()}  # fmt: skip
    accounted(READERS[name].read(table))


@pytest.mark.parametrize("rank, alpha", [(16, 32), ("4", 8), (0.5, 16), (-3, 16), (float("nan"), 16), (None, 16)])
def test_a_rank_that_is_none_does_not_reach_what_follows_from_it(rank, alpha):
    t = llamafactory.read({"finetuning_type": "lora", "lora_rank": rank})
    accounted(t)
    assert t.values["lora.lora_alpha"] == alpha


@pytest.mark.parametrize("strategy", ["no", '"no"', "null"])  # of which the first is false in YAML
def test_no_evaluation_is_none_by_any_spelling(folder, strategy):
    t = translated("trl", f"dataset_name: acme/turns\neval_strategy: {strategy}\n", folder)
    assert "data.eval_data" not in t.values


def test_mixtures_of_trl_and_of_the_alignment_handbook():
    table = {
        "datasets": [{"path": "a/b", "name": "c", "fraction": 0.5, "columns": ["x"]}, {"path": "d/e"}],
        "test_split_size": 0.1,
    }
    t = trl.read(table)
    assert t.values["data.train_data"] == [
        {"path": "a/b", "name": "c"},
        "d/e",
    ]  # a fraction is not a part of its data set
    assert "datasets[0].fraction = 0.5: a share of the mixture" in texts(t, NO_COUNTERPART)
    assert t.values["data.eval_fraction"] == 0.1

    table = {"dataset_mixer": {"a/b.c": 1.0, "d/e": 0.25}, "dataset_splits": ["train_sft", "test_sft"]}
    t = trl.read(table | {"dataset_configs": ["all"], "evaluation_strategy": "epoch"})
    first, second = {"path": "a/b.c", "name": "all"}, {"path": "d/e"}
    assert t.values["data.train_data"] == [first | {"split": "train_sft"}, second | {"split": "train_sft[:25%]"}]
    assert t.values["data.eval_data"] == [first | {"split": "test_sft"}, second | {"split": "test_sft"}]
    assert "data.eval_data" not in trl.read(table).values
    accounted(t)

    entry = {"id": "a/b", "config": "Preference", "split": "s", "columns": ["chosen", "rejected"], "weight": 0.5}
    t = trl.read(
        {"dataset_mixture": {"datasets": [entry, {"id": "c/d", "weight": 1.0}], "seed": 0, "test_split_size": 0.1}}
    )
    assert t.values["data.train_data"] == [{"path": "a/b", "name": "Preference", "split": "s", "weight": 0.5}, "c/d"]
    assert t.values["data.eval_fraction"] == 0.1 and texts(t, NO_COUNTERPART) == ""
    accounted(t)


def test_what_a_file_says_about_templates_and_devices():
    for key, value in (("chat_template", "{{ messages }}"), ("chat_template_path", "HuggingFaceTB/SmolLM3-3B")):
        t = trl.read({key: value})
        assert "model.chat_template" not in t.values and "into a .jinja file" in texts(t, NO_COUNTERPART)
    assert trl.read({"chat_template_path": "x.jinja"}).values["model.chat_template"] == "x.jinja"
    t = trl.read({"num_processes": 8, "accelerate_config": "zero3", "torch_dtype": "auto"})
    for told in ("torchrun --nproc-per-node 8", "parallel.strategy", "as they are stored"):
        assert told in texts(t, NO_COUNTERPART)
    assert "mean over the answers" in texts(llamafactory.read({"stage": "kto"}), DIFFERENCE)
    assert "mean over the pairs" in texts(llamafactory.read({"stage": "dpo"}), DIFFERENCE)
    told = texts(axolotl.read({"base_model": "a/b", "saves_per_epoch": 4}), DIFFERENCE)
    assert "at the end of every epoch" not in told and "there at most 100 steps" in told


def test_trls_defaults_are_trls():
    """A file that spells out every default of TRL's means the same as an empty one."""
    pytest.importorskip("trl")
    from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig

    for kind, config in (("sft", SFTConfig), ("dpo", DPOConfig)):
        defaults = {}
        for f in [f for c in (ModelConfig, ScriptArguments, config) for f in dataclasses.fields(c)]:
            made = f.default_factory() if f.default is dataclasses.MISSING else f.default
            defaults[f.name] = getattr(made, "value", made)
        unset = {"output_dir", "model_name_or_path", "dataset_name"}
        for lora in (False, True):
            named = {"lora_target_modules": ["q_proj", "v_proj"]} if lora else {}
            spelled = trl.read(defaults | {"use_peft": lora} | named, kind)
            empty = trl.read({"use_peft": lora}, kind)
            accounted(spelled)
            assert "not known here" not in texts(spelled, NO_COUNTERPART)
            asked = DEFAULTS[kind]
            for key in (set(spelled.values) | set(empty.values)) - unset:
                ours = asked.get(key, KEYS[key].default)
                ours = {} if ours is dataclasses.MISSING else ours
                if key == "data.completion_only_loss":  # spelled out as none, which is TRL's "found out"
                    continue
                assert spelled.values.get(key, ours) == empty.values.get(key, ours), (kind, lora, key)
            harmful = [n.text for n in spelled.notes if n.kind == NO_COUNTERPART and not n.harmless]
            assert harmful == []
    table = trl.USUAL_MODULES, trl.ATTENTION_MODULES
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT

    for family in (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
        "gemma3_text",
        "stablelm",
        "gpt2",
        "gpt_neox",
        "phi",
    ):
        assert tuple(PEFT[family]) == table[1].get(family, table[0])


# ------------------------------------------------------------------------------------------------- stages


def test_stages(folder, capsys):
    (folder / "all.yaml").write_text("""
stages: [warm, align]
model_name_or_path: acme/base-1b
bf16: true
lern: 1
stage_configs:
  warm: {dataset_name: rows.jsonl, learning_rate: 1e-5, output_dir: out/warm}
  align:
    trainer: dpo
    model_name_or_path: out/warm
    dataset_name: acme/pairs
    dpo.beta: 0.2
    train: {seed: 3}
    dta.x: 1
  unused: {x: 1}
""")
    table = read_yaml(folder / "all.yaml")
    parts = stages.read(table)
    keys = [note.key for _, t in parts for note in t.notes if note.key]
    assert len(keys) == len(set(keys)) == 4 + 3 + 6 + 1
    assert init.main(["--from-stages", "all.yaml", "all.toml"]) == 0
    out = capsys.readouterr().out
    assert "before it runs" not in out and "unused is not in stages" in out
    warm, align = (stage.config for stage in load_stages("all.toml"))
    assert (warm.trainer_type, align.trainer_type) == ("sft", "dpo")
    assert (warm.train.learning_rate, align.train.learning_rate) == (1e-5, 1e-6)
    assert (align.dpo.beta, align.train.seed, warm.train.seed) == (0.2, 3, 42)
    assert align.model.model_name_or_path.endswith("out/warm/model")


LAUNCHED = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "packing": True, "completion_only_loss": None,
            "neftune_noise_alpha": 5.0, "dataset_name_or_path": "rows.jsonl", "validation_split": 0.1,
            "use_4bit": True, "bnb_4bit_use_double_quant": False, "bnb_4bit_quant_type": "fp4"}  # fmt: skip


@pytest.mark.parametrize(("more", "rank"), [({}, 16), ({"use_peft": False}, None), ({"lora_r": None}, None)])
def test_the_rank_of_a_stage_switches_adapters_on(folder, more, rank):
    [(_, t)] = stages.read({"stages": ["trl_sft"], "stage_configs": {"trl_sft": LAUNCHED | more}}, init.first_row)
    given = {key.rpartition(".")[2]: note for note in t.notes if (key := note.key)}
    assert t.values.get("lora.r") == rank and t.values["data.eval_fraction"] == 0.1
    assert t.values["data.assistant_only_loss"] is False  # the rows were seen
    if rank:
        expected = {"lora.lora_alpha": 32, "lora.lora_dropout": 0.1, "model.load_in_4bit": True,
                    "model.bnb_4bit_use_double_quant": False, "model.bnb_4bit_quant_type": "fp4"}  # fmt: skip
        assert {key: t.values[key] for key in expected} == expected and given["lora_r"].kind == TRANSLATED
    else:
        assert given["lora_alpha"].harmless == ("use_peft" in more)


@pytest.mark.parametrize(
    ("name", "loss"), [("trl_orpo", "orpo"), ("kto", "kto"), ("simpo_1", "simpo"), ("trl_dpo", None)]
)
def test_the_name_of_a_stage_says_its_loss(name, loss):
    [(_, t)] = stages.read({"stages": [name], "stage_configs": {name: {"beta": 0.2}}})
    assert t.values.get("dpo.loss_type") == (loss and (loss,))
    assert ("counts the tokens of its prompt" in texts(t, DIFFERENCE)) == (loss == "orpo")


def test_stages_of_odd_names_and_values():
    configs = {"sft": {"model_name_or_path": ["a"], "model.chat_template": None}, 2: {"x": 1}, "old": {"x": 1}, "b": {}}
    [(_, t)] = stages.read({"stages": ["sft"], "stage_configs": configs})
    unused = [note.key for note in t.notes if note.text.endswith("is not in stages")]
    assert unused == ["stage_configs.2.x", "stage_configs.old.x"]  # in the order of the file
    assert "model.model_name_or_path" not in t.values
    assert any(note.text == "model.chat_template = null: empty" for note in t.notes)


@pytest.mark.parametrize(
    "text",
    ["stages: a\nstage_configs: {}", "stages: [a]\nstage_configs: {b: {}}", "stages: [a, a]\nstage_configs: {a: {x: 1}}",
     "stages: []\nstage_configs: {a: {x: 1}}", "stages: [a]\nx: 1"],
)  # fmt: skip
def test_stages_that_do_not_fit(folder, text):
    (folder / "s.yaml").write_text(text)
    with pytest.raises(UserError, match="stage"):
        stages.read(read_yaml(folder / "s.yaml"))


# ------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\na: 2", "a is given twice"),
        ("a: 1\n---\nb: 2", "found another document"),
        ("- a\n- b", "no `key: value` lines"),
        ("", "no `key: value` lines"),
        ("a: [1", "not a YAML file"),
        ("? [a, b]\n: 1", "unhashable key"),
        ("a: !!python/object/apply:os.system [true]", "not a YAML file"),
        ("\x00", "not a YAML file"),
    ],
)
def test_what_is_no_file_of_theirs(folder, text, told):
    (folder / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=told) as raised:
        read_yaml(folder / "x.yaml")
    assert raised.value.exit_code == 2


def test_a_pipe_is_no_file_of_theirs(folder):
    for name in ("x.yaml", "x.json"):
        os.mkfifo(folder / name)
        with pytest.raises(UserError, match="a pipe"):
            read_yaml(folder / name)


@pytest.mark.parametrize("reader", [trl, axolotl], ids=["trl", "axolotl"])
def test_their_numbers_have_our_bounds(folder, reader):
    """A number that our key refuses is told with our bounds, and never written."""
    numbers = {"max_steps": 10**30, "per_device_train_batch_size": 10**6, "learning_rate": 1e300, "seed": 2**70}
    if reader is axolotl:
        numbers["micro_batch_size"] = numbers.pop("per_device_train_batch_size")
    (folder / "x.yaml").write_text(
        "".join(f"{key}: {value}\n" for key, value in numbers.items()) + "num_epochs: 0x" + "f" * 5000
    )
    t = reader.read(read_yaml(folder / "x.yaml"))
    told = {note.key: note.text for note in t.notes if note.kind == NO_COUNTERPART}
    assert numbers.keys() <= told.keys()
    assert all("at most" in told[key] and len(told[key]) < 250 for key in numbers), told
    assert not {value for value in t.values.values() if isinstance(value, int | float)} & set(numbers.values())


def test_yaml_as_people_write_it(folder):
    (folder / "x.yml").write_text("a: &x {lr: 1e-4}\nb: {<<: *x, c: on}\nd: 2024-01-01\n7: seven\n")
    t = trl.read(read_yaml(folder / "x.yml"))
    assert t.given == {"a.lr": "1e-4", "b.lr": "1e-4", "b.c": True, "d": "2024-01-01", "7": "seven"}
    (folder / "x.json").write_text('{"max_length": 64}')
    assert trl.read(read_yaml(folder / "x.json")).values["data.max_length"] == 64
    (folder / "x.yml").write_text("a: &a\n  b: *a\n")
    with pytest.raises(UserError, match="nested"):
        trl.read(read_yaml(folder / "x.yml"))
    with pytest.raises(UserError, match="no such file"):
        read_yaml(folder / "none.yaml")


def test_a_file_without_end_is_told_at_once(folder):
    """An alias in itself, aliases of aliases, a file of data: not a traceback, and not half a minute."""
    aliases = "a0: &a0 [x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 15)
    )
    for text, told in (
        ("a: &x [*x]", "nested more than 20 deep"),
        (aliases, "more than 50,000 values"),
        ("a: 1\n" * 300_000, "more than 1,048,576 bytes"),
        ("".join(f"k{i}: 1\n" for i in range(6000)), "more than 5000 keys"),
    ):
        (folder / "x.yaml").write_text(text)
        began = time.perf_counter()
        with pytest.raises(UserError, match=told):
            trl.read(read_yaml(folder / "x.yaml"))
        assert time.perf_counter() - began < 5  # measured: 0.6 s at the most


def test_numbers_that_are_text():
    assert fitted_value("train.learning_rate", "1e-4") == 1e-4 and as_number("5e-7") == 5e-7
    assert fitted_value("train.num_train_epochs", "3") == 3.0 and fitted_value("train.max_steps", 1e3) == 1000
    assert fitted_value("log.run_name", "1e5") == "1e5" and as_number("auto") is None and as_number(True) is None


@pytest.mark.parametrize(
    ("name", "table"),
    [("axolotl", {"rl": "grpo"}), ("axolotl", {"reward_model": True}), ("llamafactory", {"stage": "ppo"})],
)
def test_what_is_no_fine_tuning(name, table):
    with pytest.raises(UserError, match="is not supported here"):
        READERS[name].read(table)


def test_the_readers_need_no_torch():
    code = "import sys, minisft.commands.init; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
