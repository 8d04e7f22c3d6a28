"""`minisft plan`: its formulas against the model, against what autograd saves, and against the memory of real steps."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import MODEL, settings
from tiny_models import CONFIGS, stream, tiny

from minisft import runtime
from minisft.commands.plan import main
from minisft.config.load import load
from minisft.errors import MEMORY, UserError
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights
from minisft.model.lora import apply_lora
from minisft.model.model_config import ModelConfig
from minisft.optimizers import state_bytes
from minisft.plan.activations import Precision, kept_by_block, kept_outside, shared_by_layers
from minisft.plan.changes import cheapest, dimensions, with_keys
from minisft.plan.memory import (
    MicroBatch,
    Place,
    activation_bytes,
    lora_options,
    moment_bytes,
    parameters_of,
    predict,
    weight_bytes,
)
from minisft.plan.shapes import parameter_shapes
from minisft.prepare.run import prepare

ROOT = Path(__file__).resolve().parents[1]
CPU = Place(False)


def config_of(**keys):
    names = ("output_dir", "model.tokenizer_name_or_path", "data.train_data", "model.model_name_or_path")
    config, _ = load({}, dict.fromkeys(names, "nowhere") | keys, origin="test")
    return config


# ---- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CONFIGS)
def test_the_parameters_are_those_of_the_model(family):
    config = from_hf(CONFIGS[family])
    model = build_model(config)
    assert parameter_shapes(config) == {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen3_5_text", "lfm2"])
@pytest.mark.parametrize(
    "keys", [{}, {"lora.target_modules": r".*(mlp|feed_forward).*"}, {"lora.rank_pattern": {"o_proj": 2}}]
)
def test_the_adapters_are_those_of_the_model(family, keys):
    config, shape = config_of(**{"lora.r": 3} | keys), from_hf(CONFIGS[family])
    model = tiny(family)
    apply_lora(model, lora_options(config))
    p = parameters_of(config, shape)
    assert p.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert weight_bytes(config, shape, p) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adafactor", "sgd", "lion", "muon", "schedule_free_adamw"])
def test_the_moments_are_those_of_the_optimizer(optim):
    from minisft.optimizers import build_optimizer
    from minisft.parameters import parameter_groups

    wide = CONFIGS["llama"] | {"hidden_size": 64, "intermediate_size": 96}  # some matrices have moments of 8 bits
    config = config_of(**{"train.optim": optim, "train.lr_scheduler_type": "constant"})
    model = build_model(from_hf(wide), "cpu")
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.0)
    optimizer = build_optimizer(optim, groups, betas=(0.9, 0.99), eps=1e-8)
    assert moment_bytes(config, parameters_of(config, from_hf(wide))) == state_bytes(optimizer)


# ---- what autograd saves ------------------------------------------------------------------------------------------


def saved_bytes(model, tokens: int, precision: str) -> int:
    """Of the floating tensors that the forward pass keeps, each storage once, weights left out; and of its result."""
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x):
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    positions, start, end = stream([tokens])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), runtime.autocast(torch.device("cpu"), precision):
        hidden = model(torch.zeros(tokens, dtype=torch.long), positions, start, end, shared=False)
    kept[hidden.untyped_storage().data_ptr()] = hidden
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def saved_a_token(model, precision: str) -> float:
    """Copies of weights, which do not grow with the tokens, are not in it."""
    return (saved_bytes(model, 64, precision) - saved_bytes(model, 32, precision)) / 32


def formula(config: ModelConfig, p: Precision, selective: bool) -> float:
    blocks = [kept_by_block(config, i, p, is_gpu=False, selective=selective) for i in range(config.num_layers)]
    return sum(blocks) + kept_outside(config, p, is_gpu=False) + shared_by_layers(config, p)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_a_block_keeps_is_what_autograd_saves(family):
    """To the byte, for every family: fp32, bf16 autocast, bf16 weights, and with cheap ops computed again."""
    model = tiny(family).train()
    for weights, precision in ((torch.float32, "fp32"), (torch.float32, "bf16"), (torch.bfloat16, "bf16")):
        model.to(weights)
        for selective in (False, True) if precision == "bf16" else (False,):
            model.recompute_cheap_ops(selective)
            p = Precision(weights.itemsize, 4 if precision == "fp32" else 2)
            assert formula(model.config, p, selective) == saved_a_token(model, precision), (
                weights,
                precision,
                selective,
            )


@pytest.mark.parametrize(
    "keys", [{}, {"lora.lora_dropout": 0.1}, {"lora.use_dora": True}, {"lora.init_lora_weights": "pissa"}], ids=str
)
def test_adapters_keep_what_autograd_saves(keys):
    """But for the first norm, and what q, k and v of the first layer keep: their input needs no gradient."""
    config, shape = config_of(**{"lora.r": 4} | keys), from_hf(CONFIGS["llama"])
    for precision in ("fp32", "bf16"):
        model = tiny("llama").train()
        apply_lora(model, lora_options(config))
        p = Precision(4, 4 if precision == "fp32" else 2)
        expected, again = activation_bytes(config, shape, parameters_of(config, shape), p, is_gpu=False)
        saved = saved_a_token(model, precision)
        beside = {"lora.lora_dropout": 4 * shape.hidden_size, "lora.init_lora_weights": 3 * config.lora.r}
        first = 4 * shape.hidden_size + 4 + p.product * sum(beside.get(key, 0) for key in keys)
        assert again == 0 and expected == saved + first
