"""QLoRA in whole runs: the quantised base untouched, what is recorded, resumed, generated from and merged."""

import json
import re
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_lora import randomise
from test_ranks import join, same_weights, start_ranks
from test_resume import stop_after
from tiny import logged, parts, relative_error, train
from tiny_models import tiny

from minisft.commands import export, generate
from minisft.config.load import load
from minisft.errors import UserError
from minisft.model.adapter_files import load_adapter, save_adapter
from minisft.model.load import load_model
from minisft.model.lora import LoraLinear, adapter_disabled, adapters, apply_lora, merge_adapter
from minisft.model.lora_options import LoraOptions
from minisft.model.quantized import RECORD, Quantization, QuantWeight, quant_weights
from minisft.model.save import save_model
from minisft.model.start import load_adapted
from minisft.prepare.run import prepare

LORA = {"lora.r": 4, "lora.lora_alpha": 8, "lora.lora_dropout": 0.1, "train.learning_rate": 1e-2}
LORA |= {"train.num_train_epochs": 1}
KINDS = {
    "nf4": ({"model.load_in_4bit": True}, Quantization("nf4", True)),
    "fp4": (
        {"model.load_in_4bit": True, "model.bnb_4bit_quant_type": "fp4", "model.bnb_4bit_use_double_quant": False},
        Quantization("fp4", False),
    ),
    "int8": ({"model.load_in_8bit": True}, Quantization("int8")),
}
NF4 = KINDS["nf4"][0]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with rows, a tokenizer, and a base model that was trained for an epoch."""
    folder = tmp_path_factory.mktemp("qlora")
    train(folder, output_dir=str(folder / "first"), **{"train.num_train_epochs": 1})
    return folder


@pytest.fixture(scope="module")
def base(home) -> dict:
    return {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")} | LORA


@pytest.fixture
def go(home, base, tmp_path):
    """A function that trains an adapter, in the same output folder at every call of one test."""
    return partial(train, home, output_dir=str(tmp_path / "out"), **base)


@pytest.fixture(scope="module")
def trained(home, base) -> Path:
    train(home, output_dir=str(home / "nf4"), **base, **NF4)
    return home / "nf4"


def adapter(out: Path) -> bytes:
    return (out / "model" / "adapter_model.safetensors").read_bytes()


def logits(model):
    tokens, bounds = torch.arange(20), (torch.zeros(20, dtype=torch.int32), torch.full((20,), 20, dtype=torch.int32))
    with torch.no_grad():
        return model.logits(model(tokens, tokens.int(), *bounds))


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, options", [*((kind, {}) for kind in KINDS), ("nf4", {"lora.use_dora": True})], ids=str)
def test_the_adapter_learns_and_the_base_stays_as_it_is(go, home, tmp_path, monkeypatch, kind, options):
    keys, quantization = KINDS[kind]
    models = []
    monkeypatch.setattr("minisft.loop.prepare", lambda *arguments: keep(prepare(*arguments), models))
    go(**keys, **options)
    losses = logged(tmp_path / "out")
    assert losses[-1] < losses[0]
    fresh = load_model(home / "first" / "model", quantization=quantization)
    (model,) = models
    assert quant_weights(model).keys() == quant_weights(fresh).keys() and len(quant_weights(fresh)) == 14
    for name, weight in quant_weights(fresh).items():
        for part, buffer in weight.named_buffers():
            assert torch.equal(model.get_submodule(name).get_buffer(part), buffer), name
    for name, parameter in fresh.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    with adapter_disabled(model.eval()):
        assert torch.equal(logits(model), logits(fresh))
    assert not torch.equal(logits(model), logits(fresh))


def keep(run, models):
    models.append(run.model)
    return run


@pytest.mark.quick
def test_it_is_lora_beside_the_dequantised_weights(home, base, tmp_path, go):
    """The same run with plain layers that hold the dequantised values; the sums are the same, so the bytes are too."""
    plain = load_model(home / "first" / "model", quantization=Quantization("nf4", True))
    apply_lora(plain, LoraOptions(r=1))  # B is zero
    save_model(merge_adapter(plain), tmp_path / "plain")
    go(**NF4)
    quantised = adapter(tmp_path / "out")
    others = base | {"model.model_name_or_path": str(tmp_path / "plain")}
    settings_of = {"output_dir": str(tmp_path / "other"), "model.tokenizer_name_or_path": str(home / "tokenizer")}
    train(home, **others, **settings_of)
    assert adapter(tmp_path / "other") == quantised


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_stopped_run_ends_in_the_same_bytes(go, tmp_path, monkeypatch, kind):
    keys = KINDS[kind][0]
    whole = go(**keys, output_dir=str(tmp_path / "whole")).output_dir
    with monkeypatch.context() as patch:
        stop_after(patch, 6, signal.SIGTERM)
        assert go(**keys).exit_code == 75
    assert go(**keys).exit_code == 0
    assert adapter(tmp_path / "out") == adapter(whole)
    assert logged(tmp_path / "out") == logged(whole)


def test_another_base_cannot_take_a_run_up(go, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 6, signal.SIGTERM)
        go(**NF4)
    for other, said in (({}, "not quantised"), (KINDS["int8"][0], "int8")):
        message = f"belongs to a base that was nf4 with double quantisation; now it is {said}"
        with pytest.raises(UserError, match=message) as mistake:
            go(**other)
        assert "load_in_4bit" in mistake.value.hint


def test_recomputing_blocks_changes_no_byte(go, trained, tmp_path):
    go(**NF4, **{"model.gradient_checkpointing": True})
    assert adapter(tmp_path / "out") == adapter(trained)


def test_two_ranks_have_one_base(home, base, tmp_path):
    options = base | NF4 | {"lora.lora_dropout": 0.0, "train.max_steps": 3}
    one, two = (options | {"output_dir": str(tmp_path / name)} for name in ("one", "two"))
    processes = start_ranks(home, two | {"train.per_device_train_batch_size": 4})
    train(home, **one)
    assert join(processes) == (0, 0)
    assert same_weights(tmp_path / "two")
    tensors = [load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in ("one", "two")]
    assert tensors[0].keys() == tensors[1].keys()
    # Adam divides by the root of what is near zero at first, which makes rounding larger
    assert all(relative_error(tensors[1][name], tensor) <= 1e-4 for name, tensor in tensors[0].items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_printed_at_the_start(home, base, kind):
    keys, quantization = KINDS[kind]
    run, _ = parts(home, **base, **keys)
    summary = "\n".join(run.summary)
    weights = quant_weights(run.model).values()
    size, numel = sum(w.nbytes for w in weights), sum(w.numel() for w in weights)
    assert f"{quantization}: 0.0 M parameters of 14 matrices at {size / numel:.3f} bytes each" in summary
    plain, _ = parts(home, **base)
    expected = re.search(r"llama, .* M parameters", "\n".join(plain.summary))[0]
    assert expected in summary
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == {
        id(p) for name, p in run.model.named_parameters() if ".lora_" in name
    }


def test_whole_modules_train_beside_a_quantised_base(go, tmp_path):
    go(**NF4, **{"lora.modules_to_save": ["lm_head"]})
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "out" / "model" / "adapter_model.safetensors")
    assert quant_weights(load_adapted(tmp_path / "out" / "model"))


def test_the_rest_of_the_base_may_be_bf16(go, tmp_path):
    go(**NF4, **{"train.weights_dtype": "bf16", "train.precision": "bf16"})
    losses = logged(tmp_path / "out")
    assert losses[-1] < losses[0]


# ---- afterwards ---------------------------------------------------------------------------------------------------


def test_the_adapter_says_what_its_base_was(trained):
    record = json.loads((trained / "model" / RECORD).read_text())
    assert record["load_in_4bit"] and record["bnb_4bit_quant_type"] == "nf4" and record["bnb_4bit_use_double_quant"]
    model = load_adapted(trained / "model")
    assert all(isinstance(module.weight, QuantWeight) for module in adapters(model)) and len(adapters(model)) == 14
    assert model.layers[0].mlp.up_proj.weight.quantization == Quantization("nf4", True)


def test_generate_reads_the_quantised_base(trained, monkeypatch):
    models = []
    monkeypatch.setattr("minisft.generation.generate", lambda model, *a, **k: models.append(model) or [[65]])
    assert generate.main([str(trained), "--prompt", "abc", "--max_new_tokens", "3"]) == 0
    assert len(quant_weights(models[0])) == 14


@pytest.mark.parametrize("options", [{}, {"lora.use_dora": True}, {"lora.target_modules": ["q_proj"]}], ids=str)
def test_merging_gives_a_plain_model_that_does_the_same(go, tmp_path, capsys, options):
    go(**NF4, **options)
    assert export.main([str(tmp_path / "out"), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    assert "logits of adapter and merged model differ by at most" in capsys.readouterr().out
    adapted, merged = load_adapted(tmp_path / "out" / "model"), load_model(tmp_path / "merged")
    assert not quant_weights(merged)
    assert relative_error(logits(merged), logits(adapted)) <= 1e-5
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLinear) and "lora.use_dora" not in options:
            expected = module.weight.dequantize(torch.float32) + module.delta()
            assert torch.equal(merged.get_parameter(f"{name}.weight"), expected.detach())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("family", ["gemma3_text", "phi3", "gpt_neox", "gpt2"])
def test_adapters_of_other_families(family, tmp_path):
    """Stacked, dealt out by heads and transposed matrices: the adapter file goes both ways, and merging is exact."""
    save_model(tiny(family), tmp_path / "base")
    for kind in (Quantization("nf4", True), Quantization("int8")):
        model, again = (load_model(tmp_path / "base", quantization=kind) for _ in range(2))
        before = logits(model)
        apply_lora(model, LoraOptions(r=2))
        assert torch.equal(logits(model), before)
        randomise(model)
        save_adapter(model, tmp_path / "adapter", base=str(tmp_path / "base"))
        adapted = logits(model)
        assert torch.equal(logits(load_adapter(again, tmp_path / "adapter")), adapted)
        assert torch.equal(logits(load_adapted(tmp_path / "adapter")), adapted)
        assert relative_error(logits(merge_adapter(model)), adapted) <= 1e-5 and not quant_weights(model)


def test_without_the_record_the_base_is_as_it_is_stored(trained, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (trained / "model").iterdir():
        if path.name not in (RECORD, "manifest.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    assert not quant_weights(load_adapted(folder))
    (folder / RECORD).write_text('{"quant_method": "bitsandbytes", "load_in_4bit": "yes"}')
    with pytest.raises(UserError, match="names no quantisation that is known here"):
        load_adapted(folder)


# ---- a base that is stored quantised ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(home) -> Path:
    model = load_model(home / "first" / "model", quantization=Quantization("nf4", True))
    save_model(model, home / "stored")
    return home / "stored"


def test_a_stored_base_trains_to_the_same_bytes(go, stored, home, trained, tmp_path):
    for keys in ({}, NF4):
        tokenizer = {"model.tokenizer_name_or_path": str(home / "tokenizer")}
        path, out = {"model.model_name_or_path": str(stored)}, {"output_dir": str(tmp_path / f"out{len(keys)}")}
        result = go(**keys | tokenizer | path | out)
        assert adapter(result.output_dir) == adapter(trained)


def test_a_stored_base_needs_adapters_and_its_own_kind(home, base, stored):
    path = {"model.model_name_or_path": str(stored), "model.tokenizer_name_or_path": str(home / "tokenizer")}
    with pytest.raises(UserError, match="is quantised: such weights cannot be trained") as mistake:
        parts(home, **base | path | {"lora.r": None})
    assert "lora.r" in mistake.value.hint
    with pytest.raises(UserError, match="quantised already, as nf4; int8 is requested"):
        parts(home, **base | path | KINDS["int8"][0])


# ---- the configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"load_in_4bit": True, "lora.r": None}, "quantised weights cannot be trained"),
        ({"load_in_8bit": True, "lora.r": None}, "quantised weights cannot be trained"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "one of these widths"),
        ({"bnb_4bit_quant_type": "fp4"}, "nothing is kept in 4 bits"),
        ({"load_in_8bit": True, "bnb_4bit_use_double_quant": False}, "nothing is kept in 4 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
        ({"load_in_4bit": 4}, "expected"),
    ],
)
def test_what_contradicts_itself_is_refused(keys, message):
    table = {"model.model_name_or_path": "m", "data.train_data": "d.jsonl", "lora.r": 4}
    with pytest.raises(UserError, match=message):
        load({}, table | keys, origin="test")


def test_other_trainers_names():
    table = {"model.model_name_or_path": "m", "data.train_data": "d.jsonl", "lora.r": 4}
    config, _ = load({}, table | {"use_4bit": True, "use_bnb_nested_quant": False}, origin="test")
    assert config.model.load_in_4bit and not config.model.bnb_4bit_use_double_quant
    config, _ = load({}, table | {"use_8bit": True, "bnb_4bit_compute_dtype": "bfloat16"}, origin="test")
    assert config.model.load_in_8bit
