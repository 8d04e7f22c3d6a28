"""Sharded ranks (FSDP2 on gloo) are one: losses, first gradients, weights, files. A run goes on with another number of them."""

import errno
import json
import os
import signal
import socket
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from test_lora import randomise
from test_ranks import free_port, free_ports, join, start_ranks
from tiny import FORK, GPT2, MODEL, logged, parts, relative_error, settings, start, train, train_quietly
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.multiprocessing.reductions import StorageWeakRef

from minisft import loop, parallel, peers
from minisft.checkpoint import Contents, find_checkpoint
from minisft.commands import export
from minisft.config.load import load
from minisft.errors import DATA, NONFINITE, PEER, SAVE, UserError, run_command
from minisft.micro_batch import forward_backward
from minisft.model.adapter_files import save_adapter
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights, load_model
from minisft.model.lora import apply_lora
from minisft.model.lora_options import LoraOptions
from minisft.model.quantized import Quantization
from minisft.model.row_files import read_rows
from minisft.model.save import save_model
from minisft.model.shards import rows_here
from minisft.optimizers import RULES, build_optimizer, cut_runs_through_blocks, evaluation_weights
from minisft.parts import Cut
from minisft.preference.reference import Reference
from minisft.prepare import model as prepare_model

PLAIN_GPT2 = GPT2 | {f"{part}_pdrop": 0.0 for part in ("resid", "embd", "attn")}
SHARDED = {"parallel.strategy": "fsdp2"}
ON_CPU = SHARDED | {"parallel.cpu_offload": True}  # rows, gradients and moments; here whole weights are there too
ACCUMULATED = {"train.per_device_train_batch_size": 3, "train.gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Rows, pairs, a tokenizer, and a trained model in `base`."""
    folder = tmp_path_factory.mktemp("parallel")
    train(folder, output_dir=str(folder / "base"), **(settings(folder) and {"train.max_steps": 2}))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": r["completion"][::-1] + "x"} for r in rows]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model = load_model(folder / "base" / "model", quantization=Quantization("nf4", True))
    save_model(model, folder / "base-nf4")
    gpt2 = build_model(from_hf(PLAIN_GPT2), "cpu")
    init_weights(gpt2, seed=1)
    save_model(gpt2, folder / "gpt2")
    save_model(load_model(folder / "gpt2", quantization=Quantization("int8")), folder / "gpt2-int8")
    adapter = load_model(folder / "base" / "model")
    apply_lora(adapter, LoraOptions(r=4))
    randomise(adapter)
    save_adapter(adapter, folder / "adapter", base=str(folder / "base" / "model"))
    quantised = load_model(folder / "base-nf4")
    apply_lora(quantised, LoraOptions(r=4, use_dora=True, target_modules=("q_proj", "down_proj")))
    randomise(quantised)
    save_adapter(quantised, folder / "adapter-nf4", base=str(folder / "base-nf4"))
    rows = load_model(folder / "base" / "model")
    apply_lora(rows, LoraOptions(r=4, trainable_token_indices={"embed_tokens": (3, 200)}, modules_to_save=("lm_head",)))
    randomise(rows)
    save_adapter(rows, folder / "adapter-rows", base=str(folder / "base" / "model"))
    return folder


def options(**more) -> dict:
    """7 steps of 12 rows, the sixth of them with a rest of 4: with two ranks of 6 the second has none of these."""
    return {
        "train.max_steps": 7,
        "train.adam_beta1": 0.0,
        "train.max_grad_norm": 0.5,
        "train.lr_scheduler_type": "constant",
        "train.learning_rate": 1e-3,
        "checkpoint.save_total_limit": 99,
        **more,
    }


def train_all(home: Path, runs: list[dict], ports: list[int], rank: int, count: int) -> None:
    """What one process does: one run after another, each with a group of its own. The first that fails is the last."""
    peers.BEAT, peers.GRACE, peers.LAST_WORD = 0.1, 0.5, 0.5
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
    for keys, port in zip(runs, ports):
        os.environ["MASTER_PORT"] = str(port)
        out = Path(keys["output_dir"])
        out.mkdir(parents=True, exist_ok=True)
        with (out / f"said-{rank}").open("w") as said, redirect_stdout(said), redirect_stderr(said):
            code = run_command(lambda keys=keys: train(home, **keys).exit_code)
        if code:
            sys.exit(code)


def run_both(home: Path, folder: Path, cases: dict[str, dict], sharded: dict, count: int = 2) -> Path:
    """The folder in which <case>/one and <case>/several are the output folders of one rank and of several."""
    ones, manys = [], []
    for case, keys in cases.items():
        keys = options(**keys)
        keys.setdefault("train.per_device_train_batch_size", 12)
        ones.append(keys | {"output_dir": str(folder / case / "one")})
        rows = {"train.per_device_train_batch_size": keys["train.per_device_train_batch_size"] // count}
        manys.append(SHARDED | keys | rows | sharded | {"output_dir": str(folder / case / "several")})
    ports = free_ports(len(cases))
    processes = [start(train_all, home, ones, ports, 0, 1)]
    processes += [start(train_all, home, manys, ports, rank, count) for rank in range(count)]
    codes = join(processes, 60 + 30 * len(cases))
    if codes != (0,) * (count + 1):
        said = {path: path.read_text()[-3000:] for path in folder.glob("*/*/said-*")}
        pytest.fail(f"{codes}: {[(path, text) for path, text in said.items() if ' error: ' in text]}")
    return folder


def final_weights(output_dir: Path) -> dict[str, torch.Tensor]:
    (file,) = (output_dir / "model").glob("*model.safetensors")
    return load_file(file)


def bound_of(name: str, weights: float) -> float:
    """For what is logged, by the bound of the weights. Where these are amplified, losses differ by 7.4e-6 (muon, 4 ranks), and
    norms, which see each matrix and not only what the model computes, by 1.0e-4."""
    return 1e-5 if weights <= 1e-5 else {"grad_norm": 3e-4}.get(name, 2e-5)


def assert_equal(folder: Path, weights: float = 1e-5) -> None:
    """weights: the bound after 7 steps, in which Adam amplifies the last bits of a gradient near zero, and some rules more."""
    one, several = folder / "one", folder / "several"
    for name in ("loss", "grad_norm", "eval_loss", "zero_update_fraction"):
        expected, values = logged(one, name), logged(several, name)
        assert values[:1] == pytest.approx(expected[:1], rel=1e-6)  # the bound of the house for equal maths in fp32
        assert values == pytest.approx(expected, rel=bound_of(name, weights)), name
    expected, values = final_weights(one), final_weights(several)
    assert expected.keys() == values.keys()
    for name in expected:
        assert values[name].dtype == expected[name].dtype and values[name].shape == expected[name].shape
        assert relative_error(values[name], expected[name]) <= weights, name


# ---- equal to one rank --------------------------------------------------------------------------------------------


def evaluated(home: Path) -> dict:
    keys = {"data.eval_data": str(home / "rows.jsonl"), "evaluate.eval_steps": 4, "checkpoint.save_steps": 1}
    keys |= {"evaluate.generate_data": str(home / "rows.jsonl[:3]"), "evaluate.max_new_tokens": 4}
    return keys | {"evaluate.sample_steps": 6}


def test_two_sharded_ranks_are_one_and_go_on_with_a_run_of_one(home, tmp_path):
    """Micro-batches of unequal shares, of which the second rank has none in step 6."""
    keys = evaluated(home)
    run_both(home, tmp_path, {"": keys}, ACCUMULATED | {"checkpoint.save_async": True})
    one, several = tmp_path / "one", tmp_path / "several"
    assert_equal(tmp_path)
    moments, expected = (state_of(folder / "checkpoints" / "step-00000001") for folder in (several, one))
    gradients = [name for name in expected if name.endswith("exp_avg")]  # with beta1 = 0
    assert gradients and moments.keys() == expected.keys()
    for name in gradients:
        assert relative_error(moments[name], expected[name]) <= 1e-6, name
    for name in ("samples.jsonl", "step_samples.jsonl"):
        assert (several / name).read_bytes() == (one / name).read_bytes()
    assert "this rank keeps" in (several / "said-0").read_text()
    assert {path.name for path in (several / "checkpoints" / "step-00000004").glob("*.safetensors")} == {
        f"{stem}.rows-{rank:05}-of-00002.safetensors" for stem in ("model", "optimizer") for rank in (1, 2)
    }

    model = load_model(several / "checkpoints" / "step-00000007")
    assert export.main([str(several), str(tmp_path / "joined")]) == 0
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (several / "model" / name).read_bytes(), name
    for name, weight in load_file(tmp_path / "joined" / "model.safetensors").items():
        assert torch.equal(model.get_parameter(name.removeprefix("model.")), weight), name

    elastic = tmp_path / "elastic"
    keys = options(**keys, **ON_CPU, output_dir=str(elastic))
    keys |= {"train.per_device_train_batch_size": 6, "checkpoint.resume": str(one / "checkpoints" / "step-00000004")}
    alone = keys | {"train.per_device_train_batch_size": 12, "output_dir": str(tmp_path / "alone")}
    alone |= {"checkpoint.resume": str(several / "checkpoints" / "step-00000004")}
    assert join([*start_ranks(home, keys), start(train_quietly, home, alone)]) == (0, 0, 0)
    assert_same_end(elastic, one, since=4)
    assert_same_end(tmp_path / "alone", one, since=4)


def state_of(checkpoint: Path, stem: str = "optimizer") -> dict[str, torch.Tensor]:
    return {name: rows[:] for name, rows in read_rows(checkpoint, stem)[0].items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["adamw", "adafactor", "muon", "adamw_8bit", "DPO, a reference that follows"])
def test_a_run_goes_on_with_another_number_of_ranks_again_and_again(home, tmp_path, case):
    """2 sharded ranks, 1, 2 replicas, 4 sharded ranks."""
    one, elastic = tmp_path / "one", tmp_path / "elastic"
    more = {} if case == "adamw" else filled(home, (QUICK | SLOW)[case])
    if "trainer_type" not in more:
        more = evaluated(home) | more
    whole = options(**more, output_dir=str(one)) | {"train.per_device_train_batch_size": 12, "train.max_steps": 10}
    assert join([start(train_quietly, home, whole)]) == (0,)
    keys = options(**more, output_dir=str(elastic))
    for steps, count, strategy in ((3, 2, "fsdp2"), (5, 1, "auto"), (7, 2, "ddp"), (10, 4, "fsdp2")):
        rows = {
            "checkpoint.save_steps": 1000,
            "train.max_steps": steps,
            "train.per_device_train_batch_size": 12 // count,
            "parallel.strategy": strategy,
        }
        ranks = start_ranks(home, keys | rows, count=count) if count > 1 else [start(train_quietly, home, keys | rows)]
        assert join(ranks) == (0,) * count
    assert_same_end(elastic, one, weights=AMPLIFIED.get(case, 1e-5))


def assert_same_end(elastic: Path, one: Path, since: int = 0, weights: float = 1e-5) -> None:
    assert logged(elastic) == pytest.approx(logged(one)[since:], rel=bound_of("loss", weights))
    for name, weight in final_weights(one).items():
        assert relative_error(final_weights(elastic)[name], weight) <= weights, name


LORA = {"model.config": None, "lora.r": 4}
DPO = {"model.config": None, "trainer_type": "dpo", "train.learning_rate": 1e-4, "evaluate.eval_steps": 3}
NF4 = LORA | {"model.load_in_4bit": True}
BF16 = {"train.weights_dtype": "bf16", "train.precision": "bf16", "train.adam_beta1": 0.9}
TWICE = {"train.per_device_train_batch_size": 8, "train.gradient_accumulation_steps": 2, "train.num_train_epochs": 4}
WIDE = {"model.config": MODEL | {"hidden_size": 64, "intermediate_size": 192}}  # some moments in 8 bits
IN_BACKWARD = {"train.optimizer_in_backward": True, "train.max_grad_norm": None}
QUICK = {
    "QLoRA, double quantised": NF4 | {"lora.use_dora": True},
    "QLoRA beside a base that is stored in 4 bits": LORA | {"model.model_name_or_path": "base-nf4"},
    "muon": {"train.optim": "muon", "train.weight_decay": 0.1},
    "weights in bf16": BF16 | {"log.zero_update_fraction": True},
    "rows on the CPU": ON_CPU | {"log.zero_update_fraction": True},
    "updates in the backward": IN_BACKWARD | {"train.optim": "stable_adamw", "train.unfreeze": {"layers\\.0\\.": 3}},
}
SLOW = {
    "tied": {"model.config": MODEL | {"tie_word_embeddings": True}},
    "GPT-2": {
        "model.config": PLAIN_GPT2,
        "train.optim": "sgd",
    },
    "packing, checkpointing": {
        "data.packing": True,
        "model.gradient_checkpointing": True,
        "train.num_train_epochs": 4,
        "train.per_device_train_batch_size": 4,
    },
    "unfreezing": {"train.unfreeze": {"layers\\.0\\.": 3, "embed": 2}, "train.frozen": ["layers.1.mlp"]},
    "adamw_minisft": {"train.optim": "adamw_minisft"},
    "sgd": {"train.optim": "sgd", "train.optim_args": {"momentum": 0.9}, "train.learning_rate": 0.1},
    "lion": {"train.optim": "lion"},
    "stable_adamw": {"train.optim": "stable_adamw", "train.adam_beta1": 0.9},
    "adafactor": {"train.optim": "adafactor", "train.weight_decay": 0.1},
    "adamw_8bit": WIDE | {"train.optim": "adamw_8bit", "train.adam_beta1": 0.9},
    "schedule-free": {"train.optim": "schedule_free_adamw", "train.adam_beta1": 0.9},
    "a trained model, with new tokens": {"model.config": None, "model.new_special_tokens": ["<a>", "<b>", "<c>"]},
    "the largest micro-batch first": {"train.memory_check": True},
    "bf16": {"train.precision": "bf16"},
    "LoRA": LORA | {"model.new_special_tokens": ["<a>"]},
    "DoRA, a whole head": LORA | {"lora.use_dora": True, "lora.modules_to_save": ["lm_head"]},
    "PiSSA": LORA | {"lora.init_lora_weights": "pissa", "train.learning_rate": 1e-4},
    "LoRA, bf16": LORA | {"train.weights_dtype": "bf16", "train.precision": "bf16"},
    "QLoRA, fp4": NF4 | {"model.bnb_4bit_quant_type": "fp4", "model.bnb_4bit_use_double_quant": False},
    "QLoRA, int8, checkpointing": LORA | {"model.load_in_8bit": True, "model.gradient_checkpointing": True},
    "QLoRA, bf16": NF4 | {"train.precision": "bf16"},
    "QLoRA beside GPT-2 that is stored in 8 bits": LORA | {"model.model_name_or_path": "gpt2-int8"},
    "an adapter that is merged": {"model.config": None, "model.model_name_or_path": "adapter"},
    "an adapter that is merged, of a quantised base": {"model.config": None, "model.model_name_or_path": "adapter-nf4"},
    "an adapter that is merged, rows on the CPU": ON_CPU
    | {"model.config": None, "model.model_name_or_path": "adapter-rows"},
    "an adapter that is trained further": LORA | {"model.model_name_or_path": "adapter"},
    "DPO": DPO,
    "DPO, LoRA": DPO | {"lora.r": 4},
    "DPO, QLoRA": DPO | NF4,
    "weights in bf16, accumulated": BF16 | WIDE | {"train.optim": "adamw_8bit"} | TWICE,
    "in the backward, tied": IN_BACKWARD | {"model.config": MODEL | {"tie_word_embeddings": True}},
    "in the backward, packing, checkpointing": IN_BACKWARD
    | {
        "train.optim": "adafactor",
        "data.packing": True,
        "model.gradient_checkpointing": True,
        "train.num_train_epochs": 4,
        "train.per_device_train_batch_size": 4,
        "train.memory_check": True,
    },
    "in the backward, weights in bf16": IN_BACKWARD | BF16 | WIDE | {"train.optim": "adamw_8bit"},
    "in the backward, 8-bit moments": IN_BACKWARD | WIDE | {"train.optim": "adamw_8bit", "train.adam_beta1": 0.9},
    "in the backward, zero updates": IN_BACKWARD | {"log.zero_update_fraction": True, "train.learning_rate": 1e-9},
    "in the backward, DPO": IN_BACKWARD | DPO,
    "rows on the CPU, QLoRA": NF4 | ON_CPU,
    "rows on the CPU, adafactor in the backward": IN_BACKWARD
    | ON_CPU
    | {"train.optim": "adafactor", "train.weight_decay": 0.1},
    "rows on the CPU, bf16 weights": BF16 | WIDE | ON_CPU | {"train.optim": "adamw_8bit"},
    "rows on the CPU, DPO": DPO | ON_CPU | {"dpo.sync_ref_model": True, "dpo.ref_model_sync_steps": 3},
    "zero updates": {"log.zero_update_fraction": True, "train.learning_rate": 1e-9},
    "DPO, log-probabilities in advance": DPO | {"dpo.precompute_ref_log_probs": True},
    "DPO, QLoRA, log-probabilities in advance": DPO | NF4 | {"dpo.precompute_ref_log_probs": True},
    "DPO, a reference that follows": DPO | {"dpo.sync_ref_model": True, "dpo.ref_model_sync_steps": 3},
    "DPO, empty shares": DPO | {"train.per_device_train_batch_size": 120},
}


if not parallel.SHARDS_INTEGERS:
    QUICK, SLOW = ({name: keys for name, keys in cases.items() if "QLoRA" not in name} for cases in (QUICK, SLOW))


def filled(home: Path, keys: dict) -> dict:
    """With the paths that belong to it."""
    keys = dict(keys)
    if keys.get("model.config", MODEL) is None:
        keys["model.model_name_or_path"] = str(home / keys.get("model.model_name_or_path", "base/model"))
    if "trainer_type" in keys:
        keys |= {"data.train_data": str(home / "pairs.jsonl"), "data.eval_data": str(home / "pairs.jsonl")}
    return keys


def run_cases(home: Path, tmp_path_factory, cases: dict[str, dict], count: int) -> Path:
    cases = {case: filled(home, keys) for case, keys in cases.items()}
    return run_both(home, tmp_path_factory.mktemp(f"cases-{count}"), cases, {}, count)


@pytest.fixture(scope="module")
def quick(home, tmp_path_factory) -> Path:
    return run_cases(home, tmp_path_factory, QUICK, 2)


@pytest.fixture(scope="module", params=[2, 4])
def slow(home, tmp_path_factory, request) -> Path:
    """Every case, on so many ranks."""
    return run_cases(home, tmp_path_factory, QUICK | SLOW, request.param)


@pytest.mark.parametrize("case", QUICK)
def test_two_sharded_ranks_are_one(quick, case):
    assert_case(quick, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK | SLOW)
def test_sharded_ranks_are_one(slow, case):
    assert_case(slow, case)


# Newton-Schulz in bf16, and moments that fall on the other side of a midpoint, amplify the last bits of a gradient: with "ddp" to
# 1.7e-3 and 1.6e-4, on 4 ranks muon to 3.5e-3. The rules are exact: test_an_update_of_cut_matrices_is_that_of_whole_ones.
AMPLIFIED = {"muon": 1e-2, "adamw_8bit": 5e-4, "in the backward, 8-bit moments": 5e-4}


def assert_case(folder: Path, case: str) -> None:
    assert "this rank keeps" in (folder / case / "several" / "said-0").read_text()
    if "bf16" in case:
        one, several = (logged(folder / case / name) for name in ("one", "several"))
        assert several == pytest.approx(one, rel=1e-3)  # products in bf16, rounded in other parts
    else:
        assert_equal(folder / case, AMPLIFIED.get(case, 1e-5))


SHAPES = [(64, 64), (10, 8), (16, 256), (7,), (10, 8), (64, 64), (2, 12), (10, 8), (9, 512), (8, 1, 4)]


def update_cut_matrices(rank: int, count: int, port: int, folder: Path) -> None:
    """Three steps of every optimizer with whole matrices and with those rows of them that this rank has."""
    where = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": count}
    torch.distributed.init_process_group("gloo", **where)
    generator, errors = torch.Generator().manual_seed(0), {}
    for name in RULES:
        whole = [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in SHAPES]
        cut, places = [], []
        for p in whole:
            if p.ndim < 2 or name == "adamw_8bit" and cut_runs_through_blocks("", p, count):
                places.append(slice(None))
                cut.append(torch.nn.Parameter(p.detach().clone()))
                continue
            each = -(-len(p) // count)
            places.append(slice(min(rank * each, len(p)), min((rank + 1) * each, len(p))))
            cut.append(torch.nn.Parameter(p.detach()[places[-1]].clone()))
            cut[-1].cut = Cut(p.shape, torch.distributed.group.WORLD, rank, count)
        both = []
        for params in (whole, cut):
            groups = [
                {"params": [p for p in params if (p.ndim == 2) == is_matrix], "peak_lr": 1e-2, "weight_decay": 0.1}
                | {"matrices": is_matrix, "embedding": False}
                for is_matrix in (True, False)
            ]
            both.append(build_optimizer(name, groups, betas=(0.9, 0.99), eps=1e-8))
        for _ in range(3):
            for p, part, place in zip(whole, cut, places):
                p.grad = torch.randn(p.shape, generator=generator)
                part.grad = p.grad[place].clone()
            for optimizer in both:
                optimizer.step()
        worst = [
            (p.detach()[place] - part.detach()).abs().max().item()
            for p, part, place in zip(whole, cut, places)
            if len(part)
        ]
        errors[name] = max(worst)
    (folder / f"errors-{rank}").write_text(json.dumps(errors))
    torch.distributed.destroy_process_group()


def test_an_update_of_cut_matrices_is_that_of_whole_ones(tmp_path):
    """Three ranks, of which some have fewer rows, or none."""
    port = free_port()
    assert join([start(update_cut_matrices, rank, 3, port, tmp_path) for rank in range(3)]) == (0,) * 3
    for rank in range(3):
        errors = json.loads((tmp_path / f"errors-{rank}").read_text())
        assert errors.keys() == RULES.keys()
        for name, error in errors.items():
            assert error <= 1e-7, name  # sums over ranks are rounded in another order; weights are below 0.5


@pytest.mark.slow
def test_replicas_of_sharded_ranks_are_one(home, tmp_path):
    """2 groups of 2 ranks: a group has the whole model, each of its ranks half of it."""
    base = {"model.config": None, "model.model_name_or_path": str(home / "base" / "model")}
    cases = {"all": {"data.eval_data": str(home / "rows.jsonl")}, "adafactor": SLOW["adafactor"]}
    if parallel.SHARDS_INTEGERS:
        cases["QLoRA"] = NF4 | base
    cases |= {"muon": QUICK["muon"]} | {case: SLOW[case] for case in SLOW if "zero updates" in case}
    cases["in the backward"] = QUICK["updates in the backward"]
    cases["rows on the CPU, in the backward"] = QUICK["updates in the backward"] | ON_CPU
    keys = {"parallel.strategy": "hsdp", "parallel.replicas": 2}
    run_both(home, tmp_path, cases, keys, 4)
    for case in cases:
        assert_equal(tmp_path / case, AMPLIFIED.get(case, 1e-5))


# ---- rows in the memory of the CPU ----------------------------------------------------------------------------------


def test_the_rows_that_are_updated_are_those_that_fsdp2_pins(home):
    """FSDP2 copies the rows to pinned memory when it first sees the weights. Here that is any other memory."""
    ends, pinned = [], {}

    def pin(x):
        copy = x.clone()
        return pinned.setdefault(copy.untyped_storage().data_ptr(), copy)

    for offload in (False, True):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            with (
                mock.patch.object(prepare_model, "is_to_be_sharded", lambda config: True),
                mock.patch.object(torch.distributed.fsdp, "CPUOffloadPolicy", lambda pin_memory: CPUOffloadPolicy()),
                mock.patch.object(torch.Tensor, "pin_memory", pin),
                mock.patch.object(torch.Tensor, "is_pinned", lambda x: x.untyped_storage().data_ptr() in pinned),
            ):
                run, config = parts(home, **ON_CPU | {"parallel.cpu_offload": offload})
                losses = []
                for run.progress.step in range(2):
                    step = loop.train_step(run, config.train, run.train.step(0, run.progress.step))
                    losses.append(step.loss)
            ends.append((losses, [parallel.part_of(p).detach().clone() for p in run.model.parameters()]))
        finally:
            torch.distributed.destroy_process_group()
    assert pinned and ends[0][0] == ends[1][0] and all(torch.equal(*both) for both in zip(ends[0][1], ends[1][1]))


def test_rows_are_written_once_the_gpu_has_read_them(monkeypatch):
    """It copies them to itself after the host has gone on. What writes them between passes waits; updates wait for the loss."""
    row, events = torch.nn.Parameter(torch.zeros(2, 2)), []
    row.cut = Cut((4, 2), None, 0, 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append(row.sum().item()))
    reference = Reference("copy", copies={"row": (row, torch.ones(2, 2))})
    reference._swap(by_copy=True)
    reference._swap(by_copy=True)
    assert events == [0, 4] and row.sum() == 0
    group = {"params": [row], "peak_lr": 1e-2, "weight_decay": 0.0}
    optimizer = build_optimizer("schedule_free_adamw", [group], betas=(0.9, 0.99), eps=1e-8)
    row.grad = torch.ones(2, 2)
    optimizer.step()
    events.clear()
    trained = row.sum().item()
    with evaluation_weights(optimizer):
        evaluated = row.sum().item()
    assert events == [trained, evaluated] and row.sum() == trained


def test_rows_that_do_not_fit_into_the_memory_of_the_cpu_are_refused_before_they_are_there(home, monkeypatch):
    """Weights, gradients and two moments of 8 ranks: the whole model four times, in fp32."""
    config, _ = load({}, settings(home, **ON_CPU), origin="test")
    model = build_model(from_hf(MODEL))
    monkeypatch.setattr(prepare_model.ranks, "world_size", lambda: 8)
    monkeypatch.setattr(prepare_model.runtime, "pick_precision", lambda train, device: "fp32")
    monkeypatch.setattr(prepare_model.parallel, "shard", lambda *arguments, **options: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    needed = 16 * sum(p.numel() for p in model.parameters())
    for there, is_enough in ((needed, True), (needed - 16, False)):
        monkeypatch.setattr(prepare_model, "memory_bytes", lambda there=there: there)
        with nullcontext() if is_enough else pytest.raises(UserError, match="cpu_offload of 8 ranks"):
            prepare_model.shard(config, model, torch.device("cuda"))


# ---- updates in the backward ----------------------------------------------------------------------------------------


def measure_gradients(home: Path, strategy: str, rank: int, count: int, port: int) -> tuple[int, int, int]:
    """(most bytes of summed gradients at a time in two steps, those of a block, of all): this rank's rows of matrices."""
    where = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": count}
    torch.distributed.init_process_group("gloo", **where)
    pieces, most, take_gradient = {}, 0, parallel.take_gradient

    def taking(p):
        nonlocal most
        part = take_gradient(p)
        if part is not p and part.grad is not None:
            memory = part.grad.untyped_storage()
            pieces[memory._cdata] = StorageWeakRef(memory)
            alive = [torch.UntypedStorage._new_with_weak_ptr(piece.cdata) for piece in pieces.values()]
            most = max(most, sum(memory.nbytes() for memory in alive if memory is not None))
        return part

    keys = IN_BACKWARD | {"parallel.strategy": strategy, "model.config": MODEL | {"num_hidden_layers": 6}}
    with (
        mock.patch.object(parallel, "take_gradient", taking),
        mock.patch.object(prepare_model, "is_to_be_sharded", lambda config: True),
    ):
        run, config = parts(home, **keys)
        for run.progress.step in range(2):
            loop.train_step(run, config.train, run.train.step(0, run.progress.step))
    torch.distributed.destroy_process_group()
    sizes = [
        sum(parallel.part_of(p).nbytes for p in module.parameters() if parallel.part_of(p) is not p)
        for module in (run.model.layers[0], run.model)
    ]
    return most, *sizes


def send_gradients(connection, *arguments) -> None:
    connection.send(measure_gradients(*arguments))


def test_the_gradients_of_one_block_are_in_memory_at_a_time(home):
    most, block, whole = measure_gradients(home, "fsdp2", 0, 1, free_port())
    assert most <= max(block, whole - 6 * block) < whole / 3  # embedding and head are more than a block


@pytest.mark.slow
def test_so_they_are_between_replicas(home):
    """FSDP2 keeps the sums between replicas until the backward ends."""
    (receiver, sender), port = FORK.Pipe(duplex=False), free_port()
    processes = [start(send_gradients, sender, home, "hsdp", rank, 2, port) for rank in range(2)]
    assert join(processes) == (0, 0)
    for _ in processes:
        most, block, whole = receiver.recv()
        assert most <= max(block, whole - 6 * block) < whole / 3


def test_a_gradient_in_the_backward_that_is_not_finite_stops_all_ranks_before_a_save(home, tmp_path):
    keys = options(**IN_BACKWARD, **SHARDED, output_dir=str(tmp_path / "out"))
    keys |= {"train.per_device_train_batch_size": 6, "checkpoint.save_steps": 2}
    assert join(start_ranks(home, keys, broken_step=4)) == (NONFINITE, NONFINITE)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*")] == ["step-00000002"]


# ---- trouble ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("where", ["settle", "step", "evaluate", "save", "export"])
@pytest.mark.parametrize("rank, how", [(1, "killed"), (1, "stopped"), (1, "fails"), (0, "killed"), (0, "fails")])
def test_a_rank_that_is_gone_ends_the_other_which_names_it(home, tmp_path, rank, how, where):
    """The first rank, which has the launcher's store here, is not stopped: nobody could be told."""
    keys = {"data.eval_data": str(home / "rows.jsonl"), "evaluate.eval_steps": 2, "checkpoint.save_steps": 2}
    keys = options(**keys, **SHARDED, output_dir=str(tmp_path / "out")) | {"train.max_steps": 4}
    processes = start_ranks(home, keys, trouble=(rank, where, how))
    survivor = processes[1 - rank]
    survivor.join(60)
    said = (tmp_path / "out" / f"said-{1 - rank}").read_text()
    assert survivor.exitcode == (DATA if how == "fails" else PEER), said
    if rank == 1 or how != "killed":  # else the launcher's store, which is in the first rank here, is gone with it
        assert f"rank {rank} on {socket.gethostname()}" in said
    if how == "stopped":
        os.kill(processes[rank].pid, signal.SIGCONT)
    processes[rank].join(30)
    assert processes[rank].exitcode not in (0, None)


def test_ranks_without_a_common_folder_refuse_before_the_first_step(home, tmp_path):
    keys = options(**SHARDED, output_dir="out") | {"train.per_device_train_batch_size": 6}
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    assert join(start_ranks(home, keys, folders=folders)) == (2, 2)
    for rank, folder in enumerate(folders):
        said = (folder / "out" / f"said-{rank}").read_text()
        assert f"output_dir = 'out' is not the same folder for all ranks: rank 1 on {socket.gethostname()}" in said
        assert not (folder / "out" / "metrics.jsonl").read_text() if rank == 0 else True
        assert not list(folder.glob("out/.tmp*"))


def fail_to_save(step: int) -> None:
    """The disk of this process is full whenever this step is saved."""
    honest = Contents.write

    def write(self, folder, name):
        if name == f"step-{step:08d}":
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(self, folder, name)

    Contents.write = write


def test_a_part_that_one_rank_cannot_write_is_no_checkpoint_and_is_told(home, tmp_path):
    keys = options(**SHARDED, output_dir=str(tmp_path / "out")) | {"train.per_device_train_batch_size": 6}
    keys |= {"checkpoint.save_steps": 1, "train.max_steps": 3}
    assert join(start_ranks(home, keys, before=partial(fail_to_save, 2))) == (0, 0)
    said = (tmp_path / "out" / "said-0").read_text()
    assert f"the checkpoint of step 2 could not be saved: rank 1 on {socket.gethostname()}: [Errno 28]" in said
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000003",
    ]
    assert join(start_ranks(home, keys | {"train.max_steps": 4}, before=partial(fail_to_save, 4))) == (SAVE, SAVE)


CRASHES = ["mkdir", "model", "fsync model.rows-00001-of-00002.safetensors", "optimizer", "manifest", "rename"]


@pytest.mark.slow
@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    "rank, point",
    [(0, point) for point in CRASHES] + [(1, point.replace("00001", "00002")) for point in CRASHES[1:4]],
)
def test_a_rank_that_dies_in_a_save_leaves_the_last_checkpoint_and_the_run_goes_on_as_it_was(
    home, tmp_path, rank, point, in_background
):
    keys = options(**SHARDED, output_dir=str(tmp_path / "out")) | {"train.per_device_train_batch_size": 6}
    keys |= {"checkpoint.save_steps": 1, "train.max_steps": 4, "checkpoint.save_async": in_background}
    whole = keys | {"output_dir": str(tmp_path / "whole")}
    crashing = start_ranks(home, keys, crash=(rank, f"step-00000003 {point}"))
    codes = join([*crashing, *start_ranks(home, whole)], 120)
    assert codes[2:] == (0, 0) and codes[rank] == 137 and codes[1 - rank] in (PEER, 137), codes
    path, skipped = find_checkpoint(tmp_path / "out" / "checkpoints", "auto")
    assert path is not None and path.name == f"step-0000000{3 if point == 'rename' else 2}" and not skipped
    assert join(start_ranks(home, keys)) == (0, 0)
    for stem in ("model", "optimizer"):
        expected = state_of(tmp_path / "whole" / "checkpoints" / "step-00000004", stem)
        found = state_of(tmp_path / "out" / "checkpoints" / "step-00000004", stem)
        assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert not list(tmp_path.glob("out/checkpoints/.*"))


# ---- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"train.on_oom": "split"}, r"parallel\.strategy = .* and train\.on_oom = "),
        (IN_BACKWARD | LORA | {"model.model_name_or_path": "x"}, "every rank has all adapters"),
        (IN_BACKWARD | {"train.optim": "muon"}, "one rank would make all orthogonal ones"),
    ],
)
def test_what_sharded_weights_cannot_do_is_refused_by_name(home, keys, named):
    keys = settings(home, **keys)
    load({}, keys, origin="test")
    with pytest.raises(UserError, match=named):
        load({}, keys | SHARDED, origin="test")


def test_a_quantised_base_is_not_sharded_where_torch_is_too_old(home, monkeypatch):
    monkeypatch.setattr(parallel, "SHARDS_INTEGERS", False)
    monkeypatch.setattr(parallel, "shard", lambda *arguments, **options: None)
    base = {"model.model_name_or_path": str(home / "base" / "model")}
    for keys, is_refused in ((NF4 | base, True), (LORA | base, False)):
        run, config = parts(home, **keys, **SHARDED)
        with pytest.raises(UserError, match="quantised base.* of torch") if is_refused else nullcontext():
            prepare_model.shard(config, run.model, run.device)


def test_an_offload_of_what_is_not_sharded_and_of_muon_is_refused(home):
    keys = settings(home, **{"parallel.cpu_offload": True})
    with pytest.raises(UserError, match=r"cpu_offload = true .* no weights are sharded so"):
        load({}, keys, origin="test")
    with pytest.raises(UserError, match="a CPU would take longer"):
        load({}, keys | ON_CPU | {"train.optim": "muon"}, origin="test")
    load({}, keys | SHARDED, origin="test")


def test_a_process_that_had_sharded_weights_keeps_copies_of_others(home):
    """In bf16: gathered weights keep none, as they would be stale, and the weights of the next run in a notebook keep theirs."""
    bf16 = {"train.precision": "bf16", "train.max_steps": 1}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        run, config = parts(home, **bf16)
        parallel.shard(run.model, run.device)
        parallel.settle(run.model)
        loop.train_step(run, config.train, run.train.step(0, 0))
        block = run.model.layers[0]
        block.unshard()
        assert block.mlp.up_proj.weight.shape == (48, 32) and not hasattr(block.mlp.up_proj.weight, "_copy")
    finally:
        torch.distributed.destroy_process_group()
    run, config = parts(home, **bf16)
    loop.train_step(run, config.train, run.train.step(0, 0))
    assert hasattr(run.model.layers[0].mlp.up_proj.weight, "_copy")


def test_gradients_of_sharded_weights_in_bf16_add_up_in_fp32(home):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        run, _ = parts(home, **{"train.precision": "bf16", "train.weights_dtype": "bf16"})
        parallel.shard(run.model, run.device, dtype=torch.bfloat16)
        parallel.settle(run.model)
        for p in run.model.parameters():
            parallel.part_of(p).grad_dtype = torch.float32
        sums = []
        for count in (1, 3):
            for _ in range(count):
                forward_backward(run.loss, run.model, "bf16", run.train.step(0, 0)[0], 1.0)
            sums.append([grad.clone() for grad in parallel.sum_gradients(run.model)])
            run.model.zero_grad()
        for one, three in zip(*sums):
            assert (
                three.dtype == torch.float32 and relative_error(three, 3 * one) <= 1e-6
            )  # 1e-3 if they were rounded to bf16
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("rows, ranks", [(10, 4), (3, 4), (8, 2), (1, 2)])
def test_rows_here_are_those_of_torch_chunk(rows, ranks):
    whole = torch.arange(rows)
    for rank in range(ranks):
        mesh = SimpleNamespace(ndim=1, size=lambda dim: ranks, get_local_rank=lambda dim, rank=rank: rank)
        x = SimpleNamespace(shape=(rows,), device_mesh=mesh)
        chunks = whole.chunk(ranks)
        expected = chunks[rank] if rank < len(chunks) else whole[:0]
        assert whole[rows_here(x)].tolist() == expected.tolist()
