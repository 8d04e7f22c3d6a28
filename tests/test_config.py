"""The configuration: layers and their order, strict keys and values, paths, and the way back to a file."""

import ast
import datetime
import importlib.util
import math
import os
import re
import tomllib
from dataclasses import MISSING, FrozenInstanceError, fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisft.config import sections as config_module
from minisft.config.aliases import ALIASES, NOT_NEEDED, UNSUPPORTED, VALUE_ALIASES
from minisft.config.check import require_packages
from minisft.config.command_line import parse_arguments
from minisft.config.load import SOURCE_FIELDS, SOURCES, load, write_resolved
from minisft.config.sections import KEYS, SECTIONS, Config, LoraSection, config_to_dict, eval_sets, source_list
from minisft.config.stages import Stage
from minisft.config.values import as_toml, fit, limits
from minisft.data.audit import TITLES
from minisft.errors import CONFIG, UserError
from minisft.prepare.look import look

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.toml"
MINIMAL = {"model": {"model_name_or_path": "some/model"}, "data": {"train_data": "rows.jsonl"}}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def minimal(tmp_path) -> Path:
    """A configuration file with nothing but what it must have."""
    return write(tmp_path / "run.toml", 'model.model_name_or_path = "some/model"\ndata.train_data = "rows.jsonl"\n')


def append(path: Path, text: str) -> Path:
    return write(path, path.read_text() + text + "\n")


def from_words(path, *argv):
    return load(*parse_arguments([str(path), *argv]))


def refused(*arguments, call=load) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert caught.value.exit_code == CONFIG
    return caught.value


# ------------------------------------------------------------------------------------------------- defaults and fields


def test_defaults_are_those_of_the_design():
    c = load(MINIMAL)[0]
    assert (c.train.learning_rate, c.train.lr_scheduler_type, c.train.warmup_steps) == (2e-5, "linear", 0)
    assert (c.train.weight_decay, c.train.adam_beta1, c.train.adam_beta2) == (0.0, 0.9, 0.999)
    assert (c.train.adam_epsilon, c.train.max_grad_norm, c.train.num_train_epochs) == (1e-8, 1.0, 3)
    assert (c.train.per_device_train_batch_size, c.train.gradient_accumulation_steps) == (8, 1)
    assert (c.data.max_length, c.data.packing, c.data.packing_strategy, c.data.truncation) == (
        1024,
        False,
        "bfd",
        "right",
    )
    assert (c.train.precision, c.model.gradient_checkpointing, c.train.seed) == ("bf16", False, 42)
    assert (c.log.logging_steps, c.evaluate.eval_steps, c.checkpoint.save_steps) == (10, 500, 500)
    assert (c.checkpoint.save_total_limit, c.log.report_to, c.trainer_type) == (3, ("tensorboard",), "sft")
    assert c.data.completion_only_loss is None and c.data.assistant_only_loss is None


@pytest.mark.parametrize("key", KEYS)
def test_every_key_accepts_its_own_default_and_explains_itself(key):
    f = KEYS[key]
    default = f.default_factory() if f.default is MISSING else f.default
    assert fit(default, f) == default
    assert f.metadata["help"]


def test_a_configuration_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        load(MINIMAL)[0].train.learning_rate = 1.0


def test_tables_of_other_names_are_consistent():
    ours = {key.rpartition(".")[2] for key in KEYS}
    theirs = [*ALIASES, *NOT_NEEDED, *UNSUPPORTED]
    assert len(set(theirs)) == len(theirs) and not ours & set(theirs)
    for name, alias in ALIASES.items():
        key, values = alias if isinstance(alias, tuple) else (alias, {})
        if key not in KEYS:  # a field of a source
            assert key.rpartition(".")[0] in SOURCES and key.rpartition(".")[2] in SOURCE_FIELDS, name
            continue
        assert all(fit(v, KEYS[key]) is not MISSING for v in values.values() if v is not None), name
    for key, values in VALUE_ALIASES.items():
        assert all(fit(value, KEYS[key]) is not MISSING for value in values.values() if value is not None), key


def test_the_engine_reads_every_key():
    """A key that nobody reads would be accepted and do nothing."""
    files = (path for path in (ROOT / "minisft").rglob("*.py") if path.parent.name != "config")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {f"max_{name}" for name in TITLES}  # the audit looks its limits up by the name of the finding
    assert {key for key in KEYS if key.rpartition(".")[2] not in read} == set()


# ------------------------------------------------------------------------------------------------- order of the layers

LAYERED = {  # key: values of the base file, the file, the command line
    "trainer_type": ("sft", "sft", "sft"),
    "output_dir": ("a", "b", "c"),
    "train.learning_rate": (0.1, 0.2, 0.3),
    "train.precision": ("fp32", "fp16", "bf16"),
    "data.packing": (True, False, True),
    "data.max_length": (10, 20, 30),
    "log.report_to": ([], ["tensorboard"], []),
}


@pytest.mark.parametrize("key", LAYERED)
@pytest.mark.parametrize("given", range(8))  # which of the three layers set the key
def test_command_line_over_file_over_base_over_default(tmp_path, minimal, key, given):
    base, file, words = LAYERED[key]
    write(tmp_path / "base.toml", f"{key} = {as_toml(base)}" if given & 1 else "")
    text = 'extends = "base.toml"\n' + minimal.read_text() + (f"{key} = {as_toml(file)}" if given & 2 else "")
    run = write(tmp_path / "run.toml", text)
    config, origins = from_words(run, *([f"--{key}", as_toml(words)] if given & 4 else []))

    default, names = config_to_dict(Config())[key], {1: str(tmp_path / "base.toml"), 2: str(run), 4: "command line"}
    highest = max((layer for layer in (1, 2, 4) if given & layer), default=0)
    expected = {0: default, 1: base, 2: file, 4: words}[highest]
    assert config_to_dict(config)[key] == (tuple(expected) if isinstance(expected, list) else expected)
    assert origins[key] == names.get(highest, "default")


def test_extends_is_relative_to_the_file_that_says_it(tmp_path, monkeypatch):
    write(tmp_path / "base/root.toml", "[train]\nseed = 1\nlearning_rate = 1e-3\n[model]\nmodel_name_or_path = 'm/m'")
    write(tmp_path / "base/mid.toml", 'extends = "root.toml"\n[train]\nseed = 2\n[data]\ntrain_data = "r.jsonl"')
    leaf = write(tmp_path / "runs/leaf.toml", 'extends = "../base/mid.toml"\n[train]\nweight_decay = 0.5')
    monkeypatch.chdir("/")
    config, origins = load(leaf)
    assert (config.train.seed, config.train.learning_rate, config.train.weight_decay) == (2, 1e-3, 0.5)
    assert origins["train.seed"].endswith("mid.toml") and origins["train.learning_rate"].endswith("root.toml")


def test_tables_merge_and_remember_both_files(tmp_path):
    write(tmp_path / "base.toml", "[model.config]\nhidden_size = 64\nrope = {theta = 1.0, factor = 2.0}")
    text = 'extends = "base.toml"\ndata.train_data = "r"\n[model]\ntokenizer_name_or_path = "t"\n'
    run = write(tmp_path / "run.toml", text + "[model.config]\nnum_layers = 2\nrope.factor = 4.0")
    config, origins = from_words(
        run, "--model.config.hidden_size", "128", "--model.config.rope.kind=yarn", "--model.config.pad_token", "0"
    )
    rope = {"theta": 1.0, "factor": 4.0, "kind": "yarn"}
    assert config.model.config == {"hidden_size": 128, "rope": rope, "num_layers": 2, "pad_token": 0}
    assert [name in origins["model.config"] for name in ("base.toml", "run.toml", "command line")] == [True] * 3


def test_a_source_replaces_a_source_as_a_whole(tmp_path, minimal):
    write(tmp_path / "base.toml", 'data.train_data = {path = "a.jsonl", weight = 2}\ndata.eval_data = {x = "b.jsonl"}')
    append(minimal, 'extends = "base.toml"')
    config = from_words(minimal, "--eval_data", "{path = 'c.jsonl'}")[0]
    assert config.data.train_data == "rows.jsonl" and config.data.eval_data == {"path": "c.jsonl"}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circles_are_refused_and_the_chain_is_named(tmp_path, length):
    for i in range(length):
        write(tmp_path / f"{i}.toml", f'extends = "{(i + 1) % length}.toml"')
    error = refused(tmp_path / "0.toml")
    assert "circle" in error.message
    assert [error.message.count(f"{i}.toml") for i in range(length)] == [2] + [1] * (length - 1)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "words",
    [
        ["--train.learning_rate", "1e-4"],
        ["--train.learning_rate=1e-4"],
        ["--learning_rate", "1e-4"],
        ["--learning-rate=.0001"],
        ["--lr", "1e-4"],
        ["--learning_rate", "5", "--learning_rate", "0.0001"],  # the last one counts
    ],
)
def test_ways_to_write_an_override(minimal, words):
    assert from_words(minimal, *words)[0].train.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--packing"], "data.packing", True),
        (["--packing", "true"], "data.packing", True),
        (["--packing", "False"], "data.packing", False),
        (["--packing=false"], "data.packing", False),
        (["--eval_packing", "none"], "data.eval_packing", None),
        (["--completion_only_loss"], "data.completion_only_loss", True),
        (["--max_length", "none"], "data.max_length", None),
        (["--max_grad_norm", "none"], "train.max_grad_norm", None),
        (["--max_steps", "-1"], "train.max_steps", -1),
        (["--num_train_epochs", "2"], "train.num_train_epochs", 2.0),
        (["--run_name", "2024"], "log.run_name", "2024"),  # text stays text
        (["--run_name", "2024-01-01"], "log.run_name", "2024-01-01"),
        (["--run_name", "'a b'"], "log.run_name", "a b"),
        (["--run_name", ""], "log.run_name", ""),
        (["--revision", "1e5"], "model.revision", "1e5"),
        (["--instruction_marker", "<|user|>", "--response_marker=="], "data.response_marker", "="),
        (["--response_marker", "[/INST]"], "data.response_marker", "[/INST]"),
        (["--report_to", "tensorboard"], "log.report_to", ("tensorboard",)),
        (["--report_to", "none"], "log.report_to", ()),
        (["--report_to", "[]"], "log.report_to", ()),
        (["--train_data", "a.jsonl,b.jsonl[:10%]"], "data.train_data", ["a.jsonl", "b.jsonl[:10%]"]),
        (["--train_data", '["a,b.jsonl"]'], "data.train_data", ["a,b.jsonl"]),
        (["--train_data", "{path = 'a.jsonl', weight = 2}"], "data.train_data", {"path": "a.jsonl", "weight": 2}),
        (["--field_map", "{q = 'prompt'}"], "data.field_map", {"q": "prompt"}),
        (["--data.field_map.q", "prompt"], "data.field_map", {"q": "prompt"}),
        (["--verbose"], "verbose", True),
    ],
)
def test_values_of_words(minimal, words, key, value):
    config, origins = from_words(minimal, *words)
    assert config_to_dict(config)[key] == value and origins[key] == "command line"


def test_a_flag_does_not_swallow_the_file(minimal):
    config = load(*parse_arguments(["--packing", str(minimal), "--verbose"]))[0]
    assert config.data.packing and config.verbose and config.model.model_name_or_path == "some/model"


def test_without_a_file_and_from_a_dict_with_keywords():
    config, origins = load(None, {"model_name_or_path": "m/m", "train.seed": 7, "train_data": Path("r.jsonl")}, "run()")
    assert (config.train.seed, config.data.train_data, origins["train.seed"]) == (7, "r.jsonl", "run()")
    config, origins = load({**MINIMAL, "train": {"seed": 3}}, {"max_length": None, "report_to": ["tensorboard"]})
    assert config.train.seed == 3 and config.data.max_length is None and origins["train.seed"] == "the given dict"


def test_ambiguous_short_names_list_the_full_ones(monkeypatch):
    monkeypatch.setitem(config_module.KEYS, "log.seed", KEYS["train.seed"])
    error = refused(MINIMAL, {"seed": 1})
    assert "ambiguous" in error.message and "train.seed" in error.message and "log.seed" in error.message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-x"], "unknown option -x"),
        (["--max_steps"], "--max_steps needs a value"),
        (["--max_steps", "--packing"], "--max_steps needs a value"),
        (["other.toml"], "two configuration files"),
        (["--train", "1"], "train is a section"),
        (["--"], "unknown key"),
    ],
)
def test_malformed_command_lines(minimal, words, told):
    assert told in refused(minimal, *words, call=from_words).message


# ------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("line", "told", "hint"),
    [
        ("train.lerning_rate = 1", "unknown key train.lerning_rate", "train.learning_rate"),
        ("learning_rate = 1", "unknown key learning_rate", "train.learning_rate"),
        ("train.max_length = 1", "unknown key train.max_length", "data.max_length"),
        ("trian.seed = 1", "unknown key trian", "[train]"),
        ("train.zzz = 1", "unknown key train.zzz", "keys of [train]: learning_rate"),
        ("zzz = 1", "unknown key zzz", "--help"),
        ("train = 1", "train = 1", "section"),
        ('train.learning_rate = "fast"', 'train.learning_rate = "fast": expected a number', "peak"),
        ("train.learning_rate = true", "expected a number above 0", ""),
        ("train.learning_rate = nan", "train.learning_rate = nan", ""),
        ("train.learning_rate = inf", "train.learning_rate = inf", ""),
        ("train.learning_rate = 0", "above 0", ""),
        ("train.max_steps = 1.5", "train.max_steps = 1.5: expected a whole number", ""),
        ("train.max_steps = 0", "train.max_steps = 0", "-1"),
        ("train.seed = true", "expected a whole number", ""),
        ("train.seed = -1", "at least 0", ""),
        ("verbose = 1", "expected true or false", ""),
        ("data.packing = 'yes'", "expected true or false", ""),
        ("data.eval_fraction = 1", "at least 0 and below 1", ""),
        ("train.adam_beta1 = 1.0", "below 1", ""),
        ("checkpoint.save_total_limit = 0", "at least 1", ""),
        ("train.lr_scheduler_type = 'cosin'", '"linear", "cosine", "cosine_with_restarts"', '"cosine"'),
        ("trainer_type = 'spo'", 'expected one of "sft"', ""),
        ("log.report_to = ['tensorbord']", 'a list of "tensorboard"', ""),
        ("data.train_data = 3", "expected a string or a list or a table", ""),
        ("data.max_length = 'long'", 'at least 2 and at most 16,777,216 or "none"', ""),
        ("model.model_name_or_path = 'none'", "model.model_name_or_path is not set", "[model.config]"),
        ("data.train_data = []", "data.train_data is not set", ""),
        ("extends = 1", "extends = 1", ""),
    ],
)
def test_mistakes_name_the_file_the_key_and_the_way_out(tmp_path, line, told, hint):
    key = line.partition(" =")[0]
    tables = {k: v for k, v in {"model.model_name_or_path": "'m/m'", "data.train_data": "'r'"}.items() if k != key}
    run = write(tmp_path / "run.toml", "\n".join([*(f"{k} = {v}" for k, v in tables.items()), line]))
    error = refused(run)
    assert told in error.message and hint in error.hint and str(run) in error.message


NUMBERS = [key for key, f in KEYS.items() if limits(f)]


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds_and_the_message_names_them(key):
    f = KEYS[key]
    bounds = limits(f)
    assert len(bounds) == 2 and all(abs(bound) <= 1e30 for bound in bounds.values()), bounds
    in_table, in_list = "of" in f.metadata, "tuple" in str(f.type)
    for value in (10**31, -(10**31), 1e300, -1e300, 10**300):
        given = {"a": value} if in_table else [value] if in_list else value
        error = refused(MINIMAL, {key: given})
        assert f"{key} = " in error.message and "expected" in error.message
        for name, bound in bounds.items():
            assert f"{name.replace('_', ' ')} {bound:,}" in error.message


def test_the_keys_with_numbers_are_all_found():
    annotations = {key for key, f in KEYS.items() if re.search(r"\b(int|float)\b", f"{f.type} {f.metadata.get('of')}")}
    assert annotations == set(NUMBERS) and len(NUMBERS) > 60
    free = {key for key, f in KEYS.items() if f.type is dict and "of" not in f.metadata}
    assert free == {"model.chat_template_kwargs"}  # of a template; model.config is checked by model/families.py


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.field_map", {"prompt": 3}),
        ("data.field_map", {"prompt": ["a"]}),
        ("lora.rank_pattern", {"a": 1.5}),
        ("lora.rank_pattern", {"a": True}),
        ("lora.alpha_pattern", {"a": "16"}),
        ("lora.layers_to_transform", [0, -1]),
        ("train.learning_rates", {"a": 1e-3, "b": math.nan}),
        ("train.lr_scheduler_kwargs", {"power": 10**40}),
        ("train.lr_scheduler_kwargs", {"power": [1]}),
    ],
)
def test_values_inside_tables_and_lists_are_checked(key, value):
    assert f"{key} = " in refused(MINIMAL, {key: value}).message


ANYTHING = [
    math.nan,
    -3,
    1e300,
    10**400,
    "",
    "\udc80",
    "a" * 5000,
    "\0",
    "((",
    [[]],
    [None],
    {"a": {}},
    {"((": 1},
    {1: 2},
]
ANYTHING += [datetime.date(2026, 1, 1), b"a", (1, 2), object(), {"path": "rows.jsonl", "weight": 1e12}]


@pytest.mark.parametrize("section", ["", *SECTIONS])
def test_whatever_a_key_is_given_the_configuration_loads_or_is_refused_in_words(section):
    for key in (key for key in KEYS if key.rpartition(".")[0] == section):
        for value in ANYTHING:
            try:
                load(MINIMAL, {key: value})
            except UserError as error:
                assert error.exit_code == CONFIG and len(str(error)) < 6000, key


def test_the_total_batch_has_the_bounds_of_the_accumulation():
    assert "gradient_accumulation_steps = " in refused(MINIMAL, {"total_batch_size": 8 * 10**9}).message


NO_PATHS = {
    "": "empty",
    "a\0b": "NUL",
    "a" * 256: "4,095",
    "a/" * 2100: "4,095",
    "~nobody1/a": "no home",
    "\udcff": "UTF-8",
}


@pytest.mark.parametrize("key", [key for key, f in KEYS.items() if "is_path" in f.metadata])
def test_every_path_is_checked(key):
    for text, told in NO_PATHS.items():
        error = refused(MINIMAL, {key: text})
        assert told in error.message and key in error.message and len(error.message) < 400
        if key in SOURCES:
            for value in ({"path": text}, ["a.jsonl", text]):
                assert told in refused(MINIMAL, {key: value}).message
    for text in NO_PATHS:  # the file itself
        if text != "\udcff":
            refused(text)
        refused({**MINIMAL, "extends": text})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f"a = {'[' * 5000}1{']' * 5000}", "recursion"),
        (f"model.config.{'a.' * 40}b = 1", "nested more than 32 deep"),
        (f"model.config = {{a = 0x{'f' * 5000}}}", "20,000 bits"),
        (f"train.seed = 0x{'f' * 5000}", "20,000 bits"),
        (f"train.seed = {'9' * 5000}", "not a TOML file"),
        ("a = '" + "a" * 2**22 + "'", "more than 4,194,304 bytes"),
    ],
)
def test_files_that_are_too_much(minimal, text, told):
    assert told in refused(append(minimal, text)).message


def test_a_pipe_is_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "run.toml")
    assert "a pipe (FIFO), not a regular file" in refused(tmp_path / "run.toml").message
    assert "a device" in refused("/dev/zero").message


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, ["warmup_steps = 3", "warmup_ratio = 0.1"]),
        ({"packing": True, "max_length": None}, ["packing = true", 'max_length = "none"']),
        ({"eval_packing": True, "max_length": None}, ["eval_packing = true"]),
        ({"model.config": {"model_type": "llama"}}, ["model_name_or_path", "model.config"]),
        ({"model.config": {}, "model_name_or_path": None}, ["tokenizer_name_or_path is not set"]),
        ({"eval_data": "e.jsonl", "eval_fraction": 0.1}, ["eval_data", "eval_fraction"]),
        ({"eval_data": {"a b": "e.jsonl"}}, ['"a b"']),
        ({"min_lr": 1.0}, ["min_lr = 1.0", "learning_rate = 2e-05 (default)"]),
        ({"min_lr": 1e-6, "lr_scheduler_type": "constant"}, ["min_lr", "lr_scheduler_type"]),
        (
            {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant", "adam_beta1": 0.0},
            ["schedule_free_adamw", "adam_beta1 = 0.0"],
        ),
        ({"instruction_marker": "<u>"}, ["instruction_marker"]),
        ({"generate_group_field": "task"}, ["generate_group_field"]),
        ({"bf16": True, "fp16": True}, ["bf16 and fp16 contradict"]),
        ({"lr": 1.0, "learning_rate": 2.0}, ["lr and learning_rate contradict"]),
        ({"total_batch_size": 16, "gradient_accumulation_steps": 1}, ["contradict"]),
        ({"total_batch_size": 12}, ["total_batch_size = 12", "multiple of 8"]),
        ({"total_batch_size": 0}, ["multiple of 8"]),
        ({"total_batch_size": True}, ["multiple of 8"]),
        ({"dpo.beta": 0.2}, ["dpo.beta = 0.2", 'trainer_type = "sft" (default)']),
    ],
)
def test_contradictions(overrides, told):
    error = refused(MINIMAL, overrides)
    assert all(words in error.message for words in told), error.message


def test_a_tracker_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config, origins = load(MINIMAL, {"report_to": ["wandb"]})  # which any command may read
    with pytest.raises(UserError, match="wandb is not installed") as error:
        look([Stage("", config, origins)])  # as a run does before anything else
    assert "command line" in error.value.message and "pip install wandb" in error.value.hint
    require_packages(*load(MINIMAL, {"report_to": []}))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"learning_rate = ", "not a TOML file"),
        (b"seed = 1\nseed = 2", "not a TOML file"),
        (b"\xff\xfe\x00", "not a TOML file"),
        (None, "no such file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, told):
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content)
    assert told in refused(path).message and str(path) in refused(path).message
    base = write(tmp_path / "child.toml", 'extends = "run.toml"')
    assert told in refused(base).message and str(base) in refused(base).message
    assert "cannot be read" in refused(tmp_path).message


# ------------------------------------------------------------------------------------------------- names of others


def test_fields_of_a_source_are_given_apart_from_its_path(tmp_path, capsys):
    def source(*words: str, file: str = "") -> object:
        run = write(tmp_path / "run.toml", f"model.model_name_or_path = 'a/b'\n{file}")
        return load(run, parse_arguments(list(words))[1])[0].data.train_data

    words = ("--dataset_name", "o/x", "--dataset_split", "train[:9]", "--dataset_config", "main", "--data_dir", "d")
    expected = {"path": "o/x", "split": "train[:9]", "name": "main", "data_dir": "d"}
    assert source(*words) == source(*words[2:], *words[:2]) == expected
    assert 'dataset_split = "train[:9]" is read as data.train_data.split' in capsys.readouterr().err
    in_file = 'data.train_data = {path = "o/x", split = "test", weight = 2}'
    assert source("--dataset_train_split", "train", file=in_file) == {"path": "o/x", "split": "train", "weight": 2}
    assert source("--data.train_data.split=train", file='dataset_name = "o/x"') == {"path": "o/x", "split": "train"}
    with pytest.raises(UserError, match="a field of a data set that is absent"):
        source("--dataset_split", "train")
    with pytest.raises(UserError, match="several sources"):
        source("--dataset_split", "train", file='data.train_data = ["o/x", "o/y"]')


def test_a_command_line_without_a_file(monkeypatch):
    """Keys as other trainers' command lines have them."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    words = (
        "--model_name_or_path X/y --dataset_name o/x --max_sequence_length 64 --use_wandb --save_directory out "
        "--chars_per_token 3 --num_of_sequences 8 --dataset_batch_size 9 --attn_mechanism vanilla --stage_name a "
        "--group_by_length --tf32 true --per_device_batch_size 2 --eval_strategy no --save_strategy epoch "
        "--loss_type nll --load_best_model_at_end false"
    )
    config = load(*parse_arguments(words.split()))[0]
    assert (config.data.max_length, config.output_dir, config.model.kernels) == (64, "out", "torch")
    assert (config.evaluate.eval_steps, config.checkpoint.save_steps) == ("never", "epoch")
    assert config.log.report_to == ("wandb",) and config.train.per_device_train_batch_size == 2
    for word in ("--push_to_hub", "--torch_compile", "--trackio_url=http://x", "--hub_model_id=a/b"):
        with pytest.raises(UserError, match=word[2:].partition("=")[0]):
            load(*parse_arguments([*words.split(), word]))


@pytest.mark.parametrize("value", ["--- ", "-1", "--end", "a=b", ""])
def test_any_word_may_be_a_value(value):
    assert parse_arguments(["--response_marker", value])[1] == parse_arguments([f"--response_marker={value}"])[1]


def test_the_ready_configurations_are_read_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load("configs/quickstart.toml")[0].data.train_data == str(QUICKSTART.parent / "quickstart" / "train.jsonl")
    assert f"the installed one is read: {QUICKSTART}" in capsys.readouterr().err
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs" / "quickstart.toml", "model.model_name_or_path = 'a/b'\ndata.train_data = 'own'")
    assert load("configs/quickstart.toml")[0].data.train_data == "own"
    with pytest.raises(UserError, match="configs/quick.toml: there is no such file"):
        load("configs/quick.toml")


def test_a_yaml_file_names_the_command_that_translates_it(tmp_path):
    with pytest.raises(UserError, match="init --from-trl .*run.yaml"):
        load(write(tmp_path / "run.yaml", "learning_rate: 1"))


def test_every_path_key_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "base.toml", 'model.model_name_or_path = "~/m"')
    write(tmp_path / "rows.jsonl", "{}")
    (tmp_path / "m").mkdir()
    keys = {key: "~/rows.jsonl" for key, f in KEYS.items() if f.metadata.get("is_path")}
    keys.pop("data.eval_data")
    keys |= {"model.config": None, "dpo.ref_model_name_or_path": None}
    values = config_to_dict(load({"extends": "~/base.toml"}, keys)[0])
    paths = {key: value for key, value in values.items() if keys.get(key) is not None}
    assert set(paths.values()) == {str(tmp_path / "rows.jsonl")} and {"output_dir", "data.cache_dir"} < paths.keys()
    write(tmp_path / "run.toml", 'extends = "~/base.toml"\ndata.train_data = "~/rows.jsonl"')
    assert load("~/run.toml")[0].model.model_name_or_path == str(tmp_path / "m")


@pytest.mark.parametrize("name", [name for name, alias in ALIASES.items() if isinstance(alias, tuple) or alias in KEYS])
def test_every_alias_is_translated_in_a_file_and_told(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)  # every tracker is installed
    alias = ALIASES[name]
    key, theirs = (alias, {}) if isinstance(alias, str) else alias
    default = config_to_dict(Config())[key]
    value = next(iter(theirs), {"train.gradient_accumulation_steps": 8, "train.optim": "adamw_torch"}.get(key, default))
    if value is None:
        value = 8 if key == "lora.r" else "x"
    table = {"model.model_name_or_path": "m/m", "data.train_data": "r"} | {name: value}
    table.pop(key, None)
    run = write(tmp_path / "run.toml", "\n".join(f"{k} = {as_toml(v)}" for k, v in table.items()))
    config, origins = load(run)
    expected = theirs.get(value, {"train.gradient_accumulation_steps": 1, "train.optim": "adamw"}.get(key, value))
    assert config_to_dict(config)[key] == (tuple(expected) if isinstance(expected, list) else expected)
    assert origins[key] == str(run)
    told = capsys.readouterr().err
    assert f"{name} = {as_toml(value)} is read as {key} = " in told and str(run) in told


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--max_seq_length", "256"], "data.max_length", 256),
        (["--train.optimizer", "adamw_torch_fused"], "train.optim", "adamw"),
        (["--packing_strategy", "bfd-requeue"], "data.packing_strategy", "bfd_split"),
        (["--truncation_mode", "keep_end"], "data.truncation", "left"),
        (["--lr_scheduler_type", "cosine_with_min_lr"], "train.lr_scheduler_type", "cosine"),
        (["--fp16"], "train.precision", "fp16"),
        (["--fp16", "false"], "train.precision", "bf16"),
        (["--fp16", "false", "--bf16", "false"], "train.precision", "fp32"),
        (["--enable_tracking", "false"], "log.report_to", ()),
        (["--attn_mechanism", "eager"], "model.kernels", "reference"),
        (["--resume_from_checkpoint", "runs/step-5"], "checkpoint.resume", "runs/step-5"),
        (["--resume_from_checkpoint", "false"], "checkpoint.resume", "never"),
        (["--disable_tqdm"], "log.progress_bar", False),
        (["--data_seed", "7"], "train.seed", 7),
        (["--eval_strategy", "epoch"], "evaluate.eval_steps", "epoch"),
        (["--save_strategy", "no"], "checkpoint.save_steps", "never"),
        (["--total_batch_size", "64"], "train.gradient_accumulation_steps", 8),
        (["--total_batch_size", "64", "--batch_size", "2"], "train.gradient_accumulation_steps", 32),
    ],
)
def test_aliases_on_the_command_line(minimal, capsys, words, key, value):
    assert config_to_dict(from_words(minimal, *words)[0])[key] == value
    assert "command line: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--lora.target_modules", "q_proj,mlp.up_proj"], "lora.target_modules", ("q_proj", "mlp.up_proj")),
        (["--lora_target_modules=q_proj"], "lora.target_modules", ("q_proj",)),
        (["--lora.target_modules", "all-linear"], "lora.target_modules", "all-linear"),
        (
            ["--lora.target_modules", r"model\.layers\.\d{1,2}\.mlp.*"],
            "lora.target_modules",
            r"model\.layers\.\d{1,2}\.mlp.*",
        ),
        (["--layers_to_transform", "0,1"], "lora.layers_to_transform", (0, 1)),
        (["--layers_to_transform", "3"], "lora.layers_to_transform", (3,)),
        (["--layers_to_transform", "none"], "lora.layers_to_transform", None),
        (["--trainable_token_indices", "5,7"], "lora.trainable_token_indices", (5, 7)),
        (
            ["--trainer_type=dpo", "--dpo.loss_type=sigmoid,sft", "--loss_weights", "1,0.2"],
            "dpo.loss_weights",
            (1.0, 0.2),
        ),
    ],
)
def test_a_list_on_the_command_line_has_commas(minimal, words, key, value):
    assert config_to_dict(from_words(minimal, "--lora.r=4", *words)[0])[key] == value


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run.toml", "--report_to", "wandb", "mlflow"], "mlflow is no value of --report_to\n.*commas"),
        (
            ["run.toml", "--lora_target_modules", "q_proj", "v_proj"],
            "v_proj is no value of --lora_target_modules\n.*commas",
        ),
        (["--packing", "yes", "run.toml"], "yes is no value of --packing\n.*true or false"),
        (["run.toml", "--train_data", "a.jsonl", __file__], "is no value of --train_data\n.*commas"),
        (["run.toml", "\u2014max_steps", "5"], "\u2014max_steps is no option\n.*two hyphens: --max_steps"),
        (["run.toml", "--seed", "1", "\u2013\u2013packing"], "packing is no option\n.*two hyphens: --packing"),
        (["--seed", "1", "max_steps=5", "run.toml"], "max_steps=5 is no option\n.*two hyphens: --max_steps=5"),
        (["run.toml", "--stages", "a.toml,b.toml"], "stages is read from a file alone\n.*at its top"),
        (["run.toml", "--extends=a.toml"], "extends is read from a file alone\n.*at its top"),
        (["a.toml", "b.toml"], "two configuration files, a.toml and b.toml"),
        (["--seed", "1", "a.toml", "--seed", "2", "b.toml"], "two configuration files, a.toml and b.toml"),
    ],
)
def test_a_word_that_belongs_to_nothing_is_told_by_the_option_before_it(words, told):
    with pytest.raises(UserError) as mistake:
        parse_arguments(words)
    assert re.search(told, str(mistake.value))


def test_options_of_an_adapter_need_its_rank():
    """Without it all weights would train, in silence."""
    others = {"init_lora_weights": "pissa", "target_modules": ["q_proj"], "trainable_token_indices": [1]}
    for f in fields(LoraSection):
        key, default = f"lora.{f.name}", getattr(LoraSection(), f.name)
        if f.name == "r":
            continue
        kinds = {bool: True, float: 0.5, dict: {"q_proj": 2}}
        value = others.get(f.name, kinds.get(f.type, [0] if "int" in str(f.type) else ["lm_head"]))
        assert f"{key} = " in refused(MINIMAL, {key: value}).message
        load(MINIMAL, {key: value, "lora.r": 4})
        load(MINIMAL, {key: default} if default is not None else {})
    load(MINIMAL, {"lora.r": "none", "lora.lora_alpha": 8})  # said, as for a file with [lora]
    of_a_name = {"lora.r": 4, "lora.layers_to_transform": [0], "lora.target_modules": "model.*q_proj"}
    assert "regular expression" in refused(MINIMAL, of_a_name).message


def test_total_batch_size_counts_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert load(MINIMAL, {"total_batch_size": 64})[0].train.gradient_accumulation_steps == 2


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_does_not_exist_is_refused_unless_it_is_switched_off(capsys, name):
    error = refused(MINIMAL, {name: True})
    assert name in error.message and UNSUPPORTED[name] in error.message
    load(MINIMAL, {name: False})
    assert f"{name} = false has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_what_nothing_needs_is_accepted_with_a_notice(capsys, name):
    assert load(MINIMAL, {name: 4})[0] == load(MINIMAL)[0]
    assert NOT_NEEDED[name] in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- paths


def test_paths_are_found_beside_the_file_then_in_the_working_directory(tmp_path, monkeypatch):
    there, here = tmp_path / "configs", tmp_path / "work"
    for path in (there / "both.jsonl", there / "a,b.jsonl", there / "tok/tokenizer.json", here / "both.jsonl"):
        write(path, "{}")
    write(here / "only_here.jsonl", "{}")
    text = """
        output_dir = "runs/x"
        [model]
        model_name_or_path = "some/model"
        tokenizer_name_or_path = "tok"
        chat_template = "chatml"
        [data]
        train_data = ["both.jsonl[:10%]", {path = "*.jsonl", split = "[:5]"}, "only_here.jsonl", "nowhere.jsonl"]
        eval_data = {plain = "both.jsonl", table = [{path = "both.jsonl", name = "tok"}]}
        [evaluate]
        generate_data = "both.jsonl"
    """
    run = write(there / "run.toml", text)
    monkeypatch.chdir(here)
    config = load(os.path.relpath(run))[0]
    assert config.data.train_data == [
        f"{there}/both.jsonl[:10%]",
        {"path": f"{there}/*.jsonl", "split": "[:5]"},
        f"{here}/only_here.jsonl",
        "nowhere.jsonl",
    ]
    table = [{"path": f"{there}/both.jsonl", "name": "tok"}]
    assert config.data.eval_data == {"plain": f"{there}/both.jsonl", "table": table}
    assert config.evaluate.generate_data == f"{there}/both.jsonl"
    assert config.model.tokenizer_name_or_path == f"{there}/tok"
    assert (config.model.model_name_or_path, config.model.chat_template) == ("some/model", "chatml")
    assert config.output_dir == "runs/x"  # always of the working directory
    # a path of the command line belongs to the working directory
    assert from_words(run, "--train_data", "both.jsonl")[0].data.train_data == f"{here}/both.jsonl"


def test_a_folder_of_data_is_not_a_model(tmp_path):
    write(tmp_path / "gpt2/rows.jsonl", "{}")
    run = write(tmp_path / "run.toml", 'model.model_name_or_path = "gpt2"\ndata.train_data = "gpt2/rows.jsonl"')
    assert load(run)[0].model.model_name_or_path == "gpt2"


def test_source_lists_and_evaluation_sets():
    table = {"path": "a"}
    assert [source_list(v) for v in (None, "a", ["a", table], table)] == [[], ["a"], ["a", table], [table]]
    assert eval_sets(None) == {} and eval_sets("a") == {"": ["a"]} and eval_sets(table) == {"": [table]}
    assert eval_sets({"x": "a", "y": ["b", table]}) == {"x": ["a"], "y": ["b", table]}


def test_the_quickstart_finds_its_files_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config, _ = load(QUICKSTART)
    assert Path(config.data.train_data).is_file() and Path(config.model.tokenizer_name_or_path).is_dir()


# ------------------------------------------------------------------------------------------------- back to a file


def test_the_resolved_file_reads_back_and_says_where_values_come_from(tmp_path, minimal, monkeypatch):
    write(tmp_path / "rows.jsonl", "{}")
    append(minimal, 'train.optimizer = "adamw_torch"\ndata.eval_data = {x = "rows.jsonl", y = ["rows.jsonl"]}')
    config, origins = from_words(minimal, "--lr", "3e-4", "--max_length", "none", "--run_name", 'a "b" \\ \x7f é # x')
    path = write_resolved(config, origins, tmp_path)
    monkeypatch.chdir("/")
    again, _ = load(path)
    assert again == config
    lines = path.read_text().splitlines()
    assert "learning_rate = 0.0003  # command line" in lines
    assert 'max_length = "none"  # command line' in lines
    assert f'optim = "adamw"  # {minimal}' in lines
    assert "seed = 42  # default" in lines
    assert sum("  # " in line for line in lines) == len(KEYS)
    assert set(tomllib.loads(path.read_text())) == {*SECTIONS, "trainer_type", "output_dir", "verbose"}


plain = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
values = st.recursive(plain, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("aZ9_- .é\"'", max_size=4), v))


@settings(max_examples=40, deadline=None)
@given(values)
def test_as_toml_is_read_back_by_a_toml_reader(value):
    back = tomllib.loads(f"value = {as_toml(value)}  # comment")["value"]
    assert back == value and repr(back) == repr(value)  # repr tells 1 from True from 1.0, and -0.0 from 0.0


def test_as_toml_leaves_none_out_of_tables():
    assert as_toml({"a": None, "b": math.inf}) == "{b = inf}" and as_toml(None) == '"none"'
