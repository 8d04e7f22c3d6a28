"""`minisft plan`: its formulas against the model, against what autograd saves, and against the memory of real steps."""

import json
import os
import subprocess
import sys
import tomllib
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import MODEL, settings, write_rows
from tiny_models import CONFIGS, stream, tiny

from minisft import runtime
from minisft.cards import CARDS
from minisft.commands.plan import hardware_of, main
from minisft.config.load import load
from minisft.errors import MEMORY, UserError
from minisft.heap import TUNABLES
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights
from minisft.model.lora import apply_lora
from minisft.model.model_config import ModelConfig
from minisft.model.quantized import named_weights
from minisft.model.save import save_model
from minisft.optimizers import state_bytes
from minisft.plan.activations import Precision, kept_by_block, kept_outside, shared_by_layers
from minisft.plan.changes import cheapest, dimensions, with_keys
from minisft.plan.estimate import Hardware, estimate
from minisft.plan.inputs import read_model
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
from minisft.plan.offload import offload
from minisft.plan.report import report
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
    assert weight_bytes(config, p) == sum(p.nbytes for p in model.parameters())


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
    """But for rstd of the first norm, and what q, k and v of the first layer keep: their input needs no gradient."""
    config, shape = config_of(**{"lora.r": 4} | keys), from_hf(CONFIGS["llama"])
    for precision in ("fp32", "bf16"):
        model = tiny("llama").train()
        apply_lora(model, lora_options(config))
        p = Precision(4, 4 if precision == "fp32" else 2)
        expected, again = activation_bytes(config, shape, parameters_of(config, shape), p, is_gpu=False)
        saved = saved_a_token(model, precision)
        beside = {"lora.lora_dropout": 4 * shape.hidden_size, "lora.init_lora_weights": 3 * config.lora.r}
        first = 4 + p.product * sum(beside.get(key, 0) for key in keys)
        assert again == 0 and expected == saved + first


# ---- the peak -----------------------------------------------------------------------------------------------------


def live_bytes_of_a_step(run, config) -> float:
    """The most tensor bytes that a step allocates beside what was there, by the events of PyTorch's allocator."""
    from torch.profiler import ProfilerActivity, profile

    from minisft.loop import train_step

    batches = run.train.step(0, 0)
    train_step(run, config.train, batches)  # makes moments, copies and buffers
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        train_step(run, config.train, batches)
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "keys", [{"train.precision": "fp32"}, {"train.precision": "bf16"}, {"model.gradient_checkpointing": True}]
)
def test_the_peak_of_a_small_step(tmp_path, keys):
    """What comes and goes in a step, without what stays. The bar is that of whole processes (below)."""
    shape = MODEL | {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "max_position_embeddings": 512,
    }
    keys = {"model.config": shape, "train.per_device_train_batch_size": 32, "train.learning_rate": 1e-4} | keys
    config, _ = load({}, settings(tmp_path, **keys), origin="test")
    run = prepare(config, torch.device("cpu"))
    (batch,) = run.train.step(0, 0)
    micro_batch = MicroBatch(len(batch.input_ids), len(batch.targets))
    place = Place(False, precision=config.train.precision)
    memory = predict(config, run.model.config, micro_batch, place)
    assert memory.moment == "where the backward pass begins"
    stays = 40 * micro_batch.tokens + 60 * micro_batch.targets  # the batch
    expected = memory.parts["activations"] + memory.parts["working"] - stays
    assert live_bytes_of_a_step(run, config) == pytest.approx(expected, rel=0.15)
    parameters = list(run.model.parameters())
    copies = [p._copy.values.nbytes for p in parameters if hasattr(p, "_copy")]
    found = {"weights": sum(p.nbytes for p in parameters), "gradients": sum(p.grad.nbytes for p in parameters)}
    found |= {"moments": state_bytes(run.optimizer)} | ({"copies": sum(copies)} if copies else {})
    names = ("weights", "gradients", "moments", "copies")
    assert found == {name: memory.parts[name] for name in names if name in memory.parts}


WHOLE = {  # a tenth of a gigabyte in weights, so that a percent is more than what a process varies by
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LORA = {"lora.r": 16}
PEAKS = {  # family, keys, other sizes, tokens of a micro-batch
    "Llama, fp32": ("llama", {"train.precision": "fp32"}, {}, 2048),
    "Llama, bf16": ("llama", {}, {}, 2048),
    "Llama, checkpointing": ("llama", {"model.gradient_checkpointing": True}, {}, 4096),
    "Llama, selective": ("llama", {"model.gradient_checkpointing": "selective"}, {}, 2048),
    "Llama, 8-bit moments": ("llama", {"train.weights_dtype": "bf16", "train.optim": "adamw_8bit"}, {}, 2048),
    "Llama, LoRA": ("llama", LORA, {}, 2048),
    "Llama, QLoRA": ("llama", LORA | {"model.load_in_4bit": True, "train.weights_dtype": "bf16"}, {}, 2048),
    "Qwen 3": ("qwen3", {}, {"head_dim": 64}, 2048),
    "Gemma 3": ("gemma3_text", {}, {"head_dim": 64, "sliding_window": 512, "sliding_window_pattern": 2}, 2048),
    "OLMo 2": ("olmo2", {}, {}, 2048),
    "GPT-NeoX, fp32": ("gpt_neox", {"train.precision": "fp32"}, {"tie_word_embeddings": False}, 2048),
    "LFM 2": ("lfm2", {}, {"full_attn_idxs": [2, 5], "block_auto_adjust_ff_dim": False}, 2048),
}
MEASURE = """
import json, sys
from pathlib import Path
from minisft.config.load import load
from minisft.plan.measure import measure_step
def resident():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmRSS"))
config, _ = load({}, json.loads(sys.argv[1]), origin="test")
before = resident()
found = measure_step(config)
print(json.dumps({"before": before, "bytes": found.bytes, "batch": [found.batch.tokens, found.batch.targets]}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a step is read on Linux")
@pytest.mark.parametrize("case", PEAKS)
def test_the_peak_of_a_process(case, tmp_path, record_property):
    """A whole process, a step of a real run: in all, and without what Python and PyTorch take."""
    family, keys, sizes, tokens = PEAKS[case]
    shape = {"model_type": family} | WHOLE | sizes
    keys = settings(tmp_path) | {"train.precision": "bf16", "train.learning_rate": 1e-4, "data.max_length": 512} | keys
    keys |= {"train.per_device_train_batch_size": tokens // 512, "model.config": shape}
    rows = [{"prompt": f"{i} ", "completion": "abcdefg " * 64} for i in range(16)]
    Path(keys["data.train_data"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys |= {"audit.max_cut_answer": 1.0, "audit.max_duplicate": 1.0, "audit.max_untrained_end": 1.0}
    if "lora.r" in keys:
        model = build_model(from_hf(shape), "cpu")
        init_weights(model, 0)
        save_model(model, tmp_path / "model", dtype=torch.bfloat16)
        keys |= {"model.config": None, "model.model_name_or_path": str(tmp_path / "model")}
    command = [sys.executable, "-c", MEASURE, json.dumps({k: v for k, v in keys.items() if v is not None})]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": TUNABLES}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    config, _ = load({}, {k: v for k, v in keys.items() if v is not None}, origin="test")
    place = Place(False, precision="bf16" if config.train.weights_dtype == "bf16" else config.train.precision)
    memory = predict(config, from_hf(shape), MicroBatch(*found["batch"]), place)
    errors = (
        memory.total / found["bytes"] - 1,
        (memory.total - found["before"]) / (found["bytes"] - found["before"]) - 1,
    )
    print(f"{case:24} predicted {memory.total / 1e6:5.0f} MB, measured {found['bytes'] / 1e6:5.0f}: {errors[0]:+.1%}, "
          f"without {found['before'] / 1e6:.0f}: {errors[1]:+.1%}")  # fmt: skip
    assert max(map(abs, errors)) < 0.07  # 0.045 was measured; oneDNN keeps more on one processor than on another


# ---- what fits ----------------------------------------------------------------------------------------------------

EIGHT_BILLION = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


OFFLOADED = {"parallel.strategy": "fsdp2", "parallel.cpu_offload": True}


def full_batches(config):
    """The work of data that fills every micro-batch."""
    from minisft.plan.work import _unknown

    return _unknown(config, 1, "a test")


def test_sharding_divides_what_trains_and_gathers_blocks():
    config, shape = config_of(), from_hf(EIGHT_BILLION)
    batch = MicroBatch(1024, 1024)
    whole = predict(config, shape, batch, Place(True))
    shared = [predict(config, shape, batch, Place(True, ranks, shards=ranks)).parts for ranks in (2, 8)]
    for ranks, parts in zip((2, 8), shared):
        assert parts["weights"] == pytest.approx(whole.parts["weights"] / ranks)
        assert parts["moments"] == pytest.approx(whole.parts["moments"] / ranks)
    assert shared[0]["gathered"] == shared[1]["gathered"] > 0 and "gathered" not in whole.parts


def test_an_update_in_the_backward_keeps_the_gradient_of_one_block_or_of_the_root():
    """Of a model whose peak is at the end of the backward, where the gradients of all would be."""
    small = from_hf(EIGHT_BILLION | {"vocab_size": 1000})
    keys = {"train.optimizer_in_backward": True, "train.max_grad_norm": None, "parallel.strategy": "fsdp2"}
    batch, place = MicroBatch(1, 1), Place(True, 4, shards=4)
    later, earlier = (predict(config_of(**more), small, batch, place).parts["gradients"] for more in ({}, keys))
    shapes = parameter_shapes(small)
    block = sum(prod(shape) for name, shape in shapes.items() if name.startswith("layers.0."))
    root = sum(prod(shape) for name, shape in shapes.items() if not name.startswith("layers."))
    vectors = sum(prod(shape) for shape in shapes.values() if len(shape) == 1)  # of all layers, until the backward ends
    # 4 bytes a number: of matrices a quarter is here
    assert later - earlier == (small.num_layers - 1) * block + root - 4 * vectors


@pytest.mark.parametrize("in_backward", [False, True])
def test_between_replicas_the_sums_of_all_blocks_stay_on_a_gpu_whose_rows_are_elsewhere(in_backward):
    small, batch = from_hf(EIGHT_BILLION | {"vocab_size": 1000}), MicroBatch(1, 1)
    keys = OFFLOADED | {"train.optimizer_in_backward": in_backward, "train.max_grad_norm": None}
    place = Place(True, 8, shards=4)
    one, all_blocks = (
        predict(config_of(**keys | {"parallel.strategy": name}), small, batch, place).parts["gradients"]
        for name in ("fsdp2", "hsdp")
    )
    numbers = sum(map(prod, parameter_shapes(small).values()))
    # 4 bytes a number, on 4 ranks; beside them the small embedding and head as a whole
    assert all_blocks == pytest.approx(numbers, rel=0.01) and one < all_blocks / 10


def test_what_an_update_takes_for_a_while_is_that_of_this_ranks_rows():
    shape, batch = from_hf(EIGHT_BILLION), MicroBatch(1, 1)
    keys = {"train.optim": "schedule_free_adamw", "train.lr_scheduler_type": "constant", "parallel.strategy": "fsdp2"}
    config = config_of(**keys)
    numbers = parameters_of(config, shape).num_trained
    found = predict(config, shape, batch, Place(True, 8, shards=8))
    assert found.moment == "in the update" and found.parts["working"] == pytest.approx(8 * numbers / 8)
    moved = config_of(**keys | {"parallel.cpu_offload": True})
    assert offload(moved, shape, Place(True, 8, shards=8)).memory["update"] == pytest.approx(8 * numbers / 8)
    assert predict(moved, shape, batch, Place(True, 8, shards=8)).moment != "in the update"


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_offload_moves_what_is_sharded_and_pays_for_it(accumulation):
    config = config_of(**OFFLOADED, **{"train.gradient_accumulation_steps": accumulation})
    plain, shape = with_keys(config, {"parallel.cpu_offload": False}), from_hf(EIGHT_BILLION)
    batch, place, p = MicroBatch(1024, 1024), Place(True, 8, shards=8), parameters_of(config, shape)
    found, before = offload(config, shape, place), predict(plain, shape, batch, place).parts
    numbers, root = p.num_trained, 2 * 128256 * 4096 + 4096  # embedding, head, last norm
    assert found.memory == {"weights": numbers / 2, "gradients": numbers / 2, "moments": numbers}
    assert found.memory["weights"] == pytest.approx(before["weights"])
    assert found.memory["moments"] == pytest.approx(before["moments"])
    # a micro-batch: blocks there and there again, the root there, gradients back; an update: 7 numbers
    assert found.link == pytest.approx(accumulation * ((2 * numbers - root) / 2 + numbers / 2))
    assert found.update == pytest.approx(28 * numbers / 8)
    parts = predict(config, shape, batch, place).parts
    vectors = (2 * 32 + 1) * 4096
    assert parts["weights"] == 4 * vectors and parts["moments"] == 8 * vectors
    assert parts["gathered"] == before["gathered"]
    assert offload(plain, shape, place) is None and offload(config, shape, Place(True)) is None
    on_cpu = Place(False, 8, shards=8)
    assert offload(config, shape, on_cpu) is None
    assert predict(config, shape, batch, on_cpu) == predict(plain, shape, batch, on_cpu)


def test_an_offload_is_told_with_its_time_and_proposed_where_nothing_else_keeps_all_weights_training():
    """8 billion parameters on two cards with 24 GB."""
    config, shape, card = (
        config_of(**{"parallel.strategy": "fsdp2", "data.max_length": 1024}),
        from_hf(EIGHT_BILLION),
        CARDS["4090"],
    )
    config = with_keys(config, {"train.per_device_train_batch_size": 1})
    hardware = Hardware(Place(True, 2, shards=2), card.memory, "two cards", card)
    found = estimate(config, shape, full_batches(config), hardware)
    best, each = found.changes()
    assert found.fits == "no" and best.keys == {"parallel.cpu_offload": True}
    assert {"parallel.cpu_offload": True} in [fit.keys for fit in each]
    moved = estimate(with_keys(config, best.keys), shape, full_batches(config), hardware)
    assert moved.fits == "yes"
    assert moved.seconds_a_step == pytest.approx(found.seconds_a_step + moved.offload.seconds)
    text = report(moved)
    assert "memory of the CPU, a rank: weights 16.1 GB, gradients 16.1 GB, moments 32.1 GB, in all 64.2 GB" in text
    assert f"offload    {moved.offload.seconds:.2f} s of a step" in text
    assert moved.to_dict()["offload"]["memory"] == moved.offload.memory


def test_every_change_takes_less_memory_and_is_a_configuration_that_loads(tmp_path):
    keys = {"model.config": None, "train.per_device_train_batch_size": 8, "data.max_length": 4096}
    config, shape = config_of(**{k: v for k, v in keys.items() if v is not None}), from_hf(EIGHT_BILLION)
    work, place = full_batches(config), Place(True)
    before = predict(config, shape, work.largest(8), place).total
    for changes in dimensions(config, place, 0.3):
        for change in changes[1:]:
            changed = with_keys(config, change.keys)
            batch = work.largest(changed.train.per_device_train_batch_size)
            assert predict(changed, shape, batch, place).total < before, change
            names = {k: v for k, v in keys.items() if v is not None and k not in change.keys}
            assert config_of(**names | change.keys) == changed


def test_the_cheapest_change_changes_no_more_than_it_must():
    config, shape = (
        config_of(**{"train.per_device_train_batch_size": 8, "data.max_length": 4096}),
        from_hf(EIGHT_BILLION),
    )
    work, place, found = full_batches(config), Place(True), []
    for room in (300e9, 200e9, 100e9, 60e9, 20e9, 10e9):
        fit = cheapest(config, shape, work, place, 0.3, room)
        assert fit is not None and fit.memory.total <= room
        found.append(fit.price)
    assert found == sorted(found) and found[0] < found[-1]
    assert cheapest(config, shape, work, place, 0.3, 3e9) is None
    assert "lora.r" in cheapest(config, shape, work, place, 0.3, 20e9).keys
    assert "lora.r" not in cheapest(config, shape, work, place, 0.3, 100e9).keys


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path) -> Path:
    """A configuration with its data."""
    from minisft.config.load import write_resolved

    config, origins = load({}, settings(tmp_path, **{"data.packing": True}), origin="test")
    (tmp_path / "out").mkdir()
    return write_resolved(config, origins, tmp_path / "out")


def test_the_plan_is_that_of_the_run(file, tmp_path, capsys):
    """From a sample of all rows, and from the token cache once a run has built it."""
    assert main([str(file), "--json"]) == 0
    sampled = json.loads(capsys.readouterr().out)
    assert sampled["data"]["source"] == "all 64 rows, tokenised now"
    config, _ = load(file)
    run = prepare(config, torch.device("cpu"))
    assert main([str(file), "--json"]) == 0
    cached = json.loads(capsys.readouterr().out)
    assert cached["data"]["source"] == "the token cache"
    for found in (sampled, cached):
        assert found["steps"] == {"per_epoch": run.train.steps_per_epoch, "all": run.total_steps}
        assert found["data"]["packs"] == run.train.plan.num_packs
        assert found["data"]["tokens"] == run.train.documents.lengths.sum()
        assert found["data"]["fill"] == run.train.plan.fill
        assert found["model"]["trained"] == sum(p.numel() for p in run.model.parameters())
        largest = max(run.train.step(0, s)[0].num_tokens for s in range(run.train.steps_per_epoch))
        assert largest <= found["memory"]["micro_batch"]["tokens"] <= 8 * 64


def test_the_plan_of_an_adapter_beside_a_quantised_folder(tmp_path, capsys):
    """config.json is enough: the folder has no weights when it is planned."""
    model = tiny(MODEL)
    keys = settings(tmp_path, **{"lora.r": 4, "model.load_in_4bit": True, "train.weights_dtype": "bf16"})
    keys |= {"train.precision": "bf16", "model.model_name_or_path": str(tmp_path / "model")}
    del keys["model.config"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(MODEL))
    words = [
        word
        for key, value in keys.items()
        for word in (f"--{key}", str(value).lower() if value is True else str(value))
    ]
    words = [word for word in words if word != "[]"]
    words.remove("--log.report_to")
    assert main([*words, "--json", "--card", "h100"]) == 0
    found = json.loads(capsys.readouterr().out)
    save_model(model, tmp_path / "model", dtype=torch.bfloat16)
    config, _ = load({}, keys, origin="test")
    run = prepare(config, torch.device("cpu"))
    assert found["model"]["trained"] == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert found["model"]["parameters"] == sum(w.numel() for w in named_weights(run.model).values())
    # To a percent: the scales of a matrix of less than 256 blocks still have a second scale of their own.
    bytes_there = sum(w.nbytes for w in named_weights(run.model).values())
    assert found["memory"]["parts"]["weights"] == pytest.approx(bytes_there, rel=0.01)


def test_the_plan_of_an_adapter_reads_the_revision_of_its_base(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    table = {
        "base_model_name_or_path": "acme/base",
        "revision": "v2",
        "peft_type": "LORA",
        "r": 4,
        "target_modules": ["q_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(table))
    read = []

    def model_file(*where, local_files_only):
        read.append((*where, local_files_only))
        return tmp_path / "config.json"

    monkeypatch.setattr("minisft.hub.model_file", model_file)
    keys = settings(tmp_path, **{"model.model_name_or_path": str(adapter), "model.local_files_only": True})
    config, _ = load({}, {key: value for key, value in keys.items() if key != "model.config"}, origin="test")
    assert read_model(config, SimpleNamespace(vocab_size=MODEL["vocab_size"])).num_layers == MODEL["num_hidden_layers"]
    assert read == [("acme/base", "v2", "config.json", True)]


def test_a_sample_stands_for_all_rows(file, tmp_path, capsys):
    """The lengths of these rows vary by a third of their mean: that of a thousand is off by a few percent at most."""
    rows = write_rows(tmp_path / "rows.jsonl", count=2500).read_text().splitlines()
    found = []
    for words in ([], ["--data.eval_fraction", "0.25"]):
        main([str(file), "--json", *words])
        found.append(json.loads(capsys.readouterr().out)["data"])
    assert found[0]["units"] == pytest.approx(2500) and found[1]["units"] == pytest.approx(0.75 * 2500)
    assert found[0]["source"].startswith("a sample of ") and found[0]["source"].endswith("of 2,500 rows")
    texts = sum(len(row["prompt"] + row["completion"]) for row in map(json.loads, rows))
    specials = 2500  # a token at the end of each
    assert found[0]["tokens"] == pytest.approx(texts + specials, rel=0.05)
    assert found[1]["tokens"] == pytest.approx(0.75 * found[0]["tokens"])


def test_what_is_printed_is_readable_and_what_is_proposed_loads(file, capsys):
    """On a GPU with less memory than the run needs: exit code 71, TOML to paste, a price for each change."""
    assert main([str(file), "--gpu-memory", "700MB", "--card", "h100", "--price", "2.5", "--gpus", "2"]) == MEMORY
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    assert "it does not fit" in text and "2 x H100" in text and "GPU hours at 2.5 each" in text
    pasted = text.partition("paste it over these keys:")[2].partition("\n\n  ")[0] if "paste" in text else ""
    table = tomllib.loads("\n".join(line.strip() for line in pasted.splitlines() if line.startswith("    ")))
    assert "no combination" in text or table
    assert "each change by itself:" in text


def test_the_time_is_the_flops_over_the_rate(file, capsys):
    main([str(file), "--json", "--card", "h100", "--mfu", "0.5", "--price", "3", "--gpus", "2"])
    found = json.loads(capsys.readouterr().out)
    seconds = sum(found["step"]["flops"].values()) / (0.5 * 788e12 * 2)
    assert found["step"]["seconds"] == pytest.approx(seconds)
    assert found["hours"] == pytest.approx(seconds * found["steps"]["all"] / 3600)
    assert found["cost"] == pytest.approx(3 * 2 * found["hours"])
    main([str(file), "--json", "--card", "h100", "--gradient_checkpointing"])
    parts = json.loads(capsys.readouterr().out)["step"]["flops"]
    # The forward pass is a third of the products of a layer, and two of seven of attention.
    assert parts["again"] == pytest.approx(parts["matmuls"] / 3 + parts["attention"] * 2 / 7)


def test_a_measured_step_writes_nothing_and_stands_beside_its_prediction(file, capsys):
    before = sorted(file.parent.iterdir())
    main([str(file), "--measure", "--json", "--precision", "fp32"])
    found = json.loads(capsys.readouterr().out)["measured"]
    config, _ = load(file)
    run = prepare(config, torch.device("cpu"))
    assert found["tokens"] == sum(batch.num_tokens for batch in run.train.step(0, 0))
    assert found["seconds"] > 0 and found["predicted"] > 0
    # This process has run other tests; the prediction is of a fresh one.
    assert found["bytes"] > sum(p.nbytes for p in run.model.parameters())
    assert sorted(file.parent.iterdir()) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (["--gpus", "0"], "at least 1"),
        (["--gpus", "two"], "at least 1"),
        (["--gpus", "2"], "needs the memory of one"),
        (["--gpu-memory", "lots"], "as in 80GB"),
        (["--card", "h1000"], "known are"),
        (["--price"], "needs a value"),
        (["--mfu", "40"], "from 0.001 to 1"),
        (["--json=yes"], "takes no value"),
        (["--no_such_key", "1"], "no_such_key"),
    ],
)
def test_wrong_options_are_told(file, words, message):
    with pytest.raises(UserError) as error:
        main([str(file), *words])
    assert message in str(error.value)


def test_a_plan_needs_no_torch(file):
    code = (
        "import sys; from minisft.commands.plan import main\n"
        f"main([{str(file)!r}, '--card', 'h100', '--json'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_a_block_keeps_on_a_gpu_of_paper():
    """The same for the Triton kernels, bf16 autocast and bf16 weights."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests" / "paper_kept.py")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == CONFIGS.keys()
    # Where weights beside the adapters are frozen, autograd keeps less: of norms of each head, and of the delta rule's decays.
    less = ("stablelm", "cohere", "qwen3_5_text", "olmo_hybrid")
    for family, cases in found.items():
        exact = cases[:3] if family in less else cases[:5]  # full, and with adapters; the last one is DoRA
        assert [saved for saved, _ in exact] == [formula for _, formula in exact], family
        assert all(saved <= formula <= 1.25 * saved for saved, formula in cases), family


@pytest.mark.parametrize(
    ("text", "threads"), [("3", 3), (" 3 ", 3), ("4,2", 4), ("", None), ("0", None), ("-1", None), ("many", None)]
)
def test_any_number_of_threads_in_the_environment_is_planned_with(monkeypatch, text, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    hardware = hardware_of(config_of(**{"train.device": "cpu"}), {})
    assert hardware.place.threads == (threads or os.cpu_count())
