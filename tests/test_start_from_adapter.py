"""A run that starts from an adapter: it is trained further, or merged into its base and all weights are trained."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_resume import stop_after
from tiny import logged, parts, train, weights

from minisft import loop
from minisft.commands import export, generate
from minisft.errors import CONFIG, MODEL, STOPPED, UserError
from minisft.model.adapter_files import save_adapter
from minisft.model.load import load_model
from minisft.model.quantized import RECORD, Quantization, quantization_of
from minisft.model.start import load_adapted

LORA = {"lora.r": 4, "lora.lora_alpha": 8, "train.learning_rate": 1e-2, "train.num_train_epochs": 1}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Rows, a tokenizer, a base that was trained for an epoch, and an adapter of it."""
    folder = tmp_path_factory.mktemp("start")
    train(folder, output_dir=str(folder / "base"), **{"train.num_train_epochs": 1})
    train(folder, output_dir=str(folder / "adapter"), **start(folder / "base"), **LORA)
    return folder


def start(path: Path) -> dict:
    """The model, and the tokenizer that comes with it."""
    keys = {"model.config": None, "model.tokenizer_name_or_path": None}
    return keys | {"model.model_name_or_path": str(path)}


@pytest.fixture
def go(home, tmp_path):
    """A function that trains from a path, in the same output folder at every call of one test."""
    return lambda path, **keys: train(home, **({"output_dir": str(tmp_path / "out")} | start(path) | LORA | keys))


def adapter_config(out: Path) -> dict:
    return json.loads((out / "model" / "adapter_config.json").read_text())


def adapter(out: Path) -> bytes:
    return (out / "model" / "adapter_model.safetensors").read_bytes()


def logits(model) -> torch.Tensor:
    tokens, bounds = torch.arange(20), (torch.zeros(20, dtype=torch.int32), torch.full((20,), 20, dtype=torch.int32))
    with torch.no_grad():
        return model.logits(model(tokens, tokens.int(), *bounds))


def changed(home: Path, tmp_path: Path, **values) -> Path:
    """A copy of the adapter, as another program might have written it: without manifest, with other values."""
    folder = tmp_path / "changed"
    shutil.copytree(home / "adapter" / "model", folder)
    (folder / "manifest.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


# ---- its base --------------------------------------------------------------------------------------------------------


def test_an_adapter_is_refused_beside_a_base_that_was_trained_anew(tmp_path, home):
    """The path is the same, the weights are others: every answer, merge and evaluation would be of neither."""
    base, other = tmp_path / "base", tmp_path / "other"
    shutil.copytree(home / "base" / "model", base)
    train(home, output_dir=str(other), **{"train.num_train_epochs": 1, "train.seed": 7})
    first = train(home, output_dir=str(tmp_path / "first"), **start(base), **LORA, **{"train.max_steps": 2})
    again = train(home, output_dir=str(tmp_path / "again"), **start(first.output_dir), **LORA, **{"train.max_steps": 2})
    export.main([str(first.output_dir), str(tmp_path / "copy")])
    adapters = [first.output_dir / "checkpoints" / "step-00000002", again.output_dir / "model", tmp_path / "copy"]
    for folder in adapters:
        load_adapted(folder)
    shutil.rmtree(base)
    shutil.copytree(other / "model", base)
    for look in (
        *(partial(load_adapted, folder) for folder in adapters),
        partial(export.main, [str(first.output_dir), str(tmp_path / "merged"), "--merge"]),
        partial(generate.main, [str(first.output_dir), "--prompt", "a"]),
        partial(train, home, output_dir=str(tmp_path / "third"), **start(first.output_dir), **LORA),
    ):
        with pytest.raises(UserError, match="it is not the model that this adapter was trained on any more") as caught:
            look()
        assert caught.value.exit_code == MODEL and str(base) in caught.value.message


# ---- trained further -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["adapter", "adapter/model"])
def test_the_adapter_goes_on_where_it_was(home, where):
    run, _ = parts(home, **start(home / where), **LORA)
    assert run.model.adapter_is_new is False
    assert torch.equal(logits(run.model.eval()), logits(load_adapted(home / "adapter" / "model")))
    model_line = next(line for line in run.summary if line.startswith("model "))
    assert f"{home}/base/model + adapter {home}/adapter/model, trained further" in model_line
    assert run.start.name == str(home / "base" / "model")


def test_a_new_adapter_is_new(home):
    run, _ = parts(home, **start(home / "base"), **LORA)  # of a run's output folder, the model
    assert run.model.adapter_is_new and run.start.adapter is None and run.start.name == str(home / "base" / "model")


def test_it_learns_names_the_base_and_is_generated_from_and_merged(home, go, tmp_path, capsys):
    assert go(home / "adapter").exit_code == 0
    assert adapter(tmp_path / "out") != adapter(home / "adapter")
    assert logged(tmp_path / "out")[-1] < logged(home / "adapter")[0]
    was, now = adapter_config(home / "adapter"), adapter_config(tmp_path / "out")
    assert now == was and now["base_model_name_or_path"] == str(home / "base" / "model")
    assert generate.main([str(tmp_path / "out"), "--prompt", "abc", "--max_new_tokens", "2"]) == 0
    assert export.main([str(tmp_path / "out"), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0


def test_what_is_left_at_its_default_follows_the_file_and_dropout_is_this_runs(home, tmp_path):
    folder = changed(home, tmp_path, lora_dropout=0.5, lora_alpha=16.0, use_rslora=True)
    keys = LORA | {"lora.lora_alpha": 32.0, "lora.lora_dropout": 0.25}  # 32 is the default of the key
    run, _ = parts(home, **start(folder), **keys)
    options = run.model.lora
    assert (options.r, options.lora_alpha, options.use_rslora, options.lora_dropout) == (4, 16.0, True, 0.25)
    assert run.start.id is None  # no manifest


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"lora.r": 8}, "lora.r = 8, there 4"),
        ({"lora.lora_alpha": 16}, "lora.lora_alpha = 16.0, there 8.0"),
        ({"lora.target_modules": ["q_proj"]}, 'lora.target_modules = ["q_proj"], there ["down_proj", "gate_proj"'),
        ({"lora.use_dora": True}, "lora.use_dora = true, there false"),
        ({"lora.rank_pattern": {"q_proj": 2}}, "lora.rank_pattern = {q_proj = 2}, there {}"),
        ({"lora.layers_to_transform": [0]}, 'lora.layers_to_transform = [0], there "none"'),
        ({"lora.modules_to_save": ["lm_head"]}, 'lora.modules_to_save = ["lm_head"], there []'),
        ({"lora.trainable_token_indices": [3]}, "lora.trainable_token_indices = [3], there {}"),
        ({"model.new_special_tokens": ["<new>"]}, "lora.trainable_token_indices = [259], there {}"),
    ],
    ids=str,
)
def test_other_values_than_the_adapters_are_refused_with_both(home, keys, said):
    with pytest.raises(UserError) as caught:
        parts(home, **start(home / "adapter"), **(LORA | keys))
    assert said in caught.value.message and str(home / "adapter") in caught.value.message
    assert "set r = 4" in caught.value.hint and caught.value.exit_code == CONFIG


def test_the_same_values_in_another_order_are_no_contradiction(home):
    targets = {"lora.target_modules": adapter_config(home / "adapter")["target_modules"][::-1]}
    assert not parts(home, **start(home / "adapter"), **LORA, **targets)[0].model.adapter_is_new


def test_stopped_and_resumed_it_ends_in_the_same_bytes(home, go, tmp_path, monkeypatch):
    keys = {"lora.lora_dropout": 0.1}
    assert go(home / "adapter", output_dir=str(tmp_path / "whole"), **keys).exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4, signal.SIGTERM)
        assert go(home / "adapter", **keys).exit_code == STOPPED
    assert go(home / "adapter", **keys).exit_code == 0
    assert adapter(tmp_path / "out") == adapter(tmp_path / "whole")
    assert logged(tmp_path / "out") == logged(tmp_path / "whole")


def test_pissa_and_rows_of_new_tokens_come_along(home, go, tmp_path):
    """The saved adapter is a plain one of twice the rank and is trained further as such; the keys of its run fit it."""
    keys = {"lora.init_lora_weights": "pissa", "model.new_special_tokens": ["<think>"]}
    assert go(home / "base", output_dir=str(tmp_path / "first"), **keys).exit_code == 0
    assert adapter_config(tmp_path / "first")["r"] == 8
    for more in (keys, {"lora.r": 8, "lora.lora_alpha": 16}):
        run, _ = parts(home, **start(tmp_path / "first"), **(LORA | more))
        assert run.model.lora.r == 8 and not run.model.lora.is_pissa
        assert run.model.lora.trainable_token_indices == {"embed_tokens": (259,), "lm_head": (259,)}
        assert torch.equal(logits(run.model.eval()), logits(load_adapted(tmp_path / "first" / "model")))
    assert run.tokenizer.vocab_size == 260  # the adapter's own
    assert go(tmp_path / "first", **keys).exit_code == 0
    assert adapter_config(tmp_path / "out") == adapter_config(tmp_path / "first")
    assert go(tmp_path / "first", output_dir=str(tmp_path / "full"), **{"lora.r": None}).exit_code == 0
    assert load_model(tmp_path / "full" / "model").config.vocab_size == 260


@pytest.mark.parametrize("options", [{"lora.use_dora": True}, {"lora.modules_to_save": ["lm_head"]}], ids=str)
def test_other_kinds_go_on_too(home, go, tmp_path, options):
    assert go(home / "base", output_dir=str(tmp_path / "first"), **options).exit_code == 0
    for more in (options, {}):
        run, _ = parts(home, **start(tmp_path / "first"), **LORA, **more)
        assert torch.equal(logits(run.model.eval()), logits(load_adapted(tmp_path / "first" / "model")))


# ---- merged -----------------------------------------------------------------------------------------------------


def test_without_r_it_is_merged_and_all_weights_train(home, go, tmp_path):
    run, _ = parts(home, **start(home / "adapter"))
    assert run.model.lora is None and all(p.requires_grad for p in run.model.parameters())
    assert f"+ adapter {home}/adapter/model, merged" in "\n".join(run.summary)
    assert export.main([str(home / "adapter"), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    for name, parameter in load_model(tmp_path / "merged").named_parameters():
        assert torch.equal(parameter, run.model.get_parameter(name)), name
    # and so it is the same run as that from the merged folder
    for name, path in (("one", home / "adapter"), ("other", tmp_path / "merged")):
        assert go(path, output_dir=str(tmp_path / name), **{"lora.r": None}).exit_code == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "other")


def test_merged_in_bf16_it_is_rounded_once(home):
    run, _ = parts(home, **start(home / "adapter"), **{"train.weights_dtype": "bf16", "train.precision": "bf16"})
    exact, _ = parts(home, **start(home / "adapter"))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, exact.model.get_parameter(name).bfloat16()), name


def test_a_merged_run_is_resumed_in_the_same_bytes(home, go, tmp_path, monkeypatch):
    full = {"lora.r": None}
    assert go(home / "adapter", output_dir=str(tmp_path / "whole"), **full).exit_code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 4, signal.SIGTERM)
        assert go(home / "adapter", **full).exit_code == STOPPED
    assert go(home / "adapter", **full).exit_code == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


# ---- a quantised base -------------------------------------------------------------------------------------------


def test_the_base_is_quantised_as_its_record_says(home, go, tmp_path):
    quantised = {"model.load_in_4bit": True}
    assert go(home / "base", output_dir=str(tmp_path / "first"), **quantised).exit_code == 0
    for more in ({}, quantised):
        run, _ = parts(home, **start(tmp_path / "first"), **LORA, **more)
        assert quantization_of(run.model) == Quantization("nf4", True)
        assert torch.equal(logits(run.model.eval()), logits(load_adapted(tmp_path / "first" / "model")))
    assert go(tmp_path / "first").exit_code == 0
    record = (tmp_path / "first" / "model" / RECORD).read_bytes()
    assert (tmp_path / "out" / "model" / RECORD).read_bytes() == record

    with pytest.raises(UserError, match="was nf4 with double quantisation, not int8"):
        parts(home, **start(tmp_path / "first"), **LORA, **{"model.load_in_8bit": True})
    # merged is what `minisft export --merge` merges: the dequantised base
    merged, _ = parts(home, **start(tmp_path / "first"))
    assert "its dequantised matrices" in "\n".join(merged.summary)
    assert export.main([str(tmp_path / "first"), str(tmp_path / "merged"), "--merge", "--dtype", "fp32"]) == 0
    assert torch.equal(logits(merged.model.eval()), logits(load_model(tmp_path / "merged")))


def test_an_adapter_without_record_is_beside_what_is_asked_for(home, tmp_path):
    """PEFT's config has no field for it."""
    run, _ = parts(home, **start(home / "adapter"), **LORA, **{"model.load_in_8bit": True})
    assert quantization_of(run.model) == Quantization("int8")


# ---- from elsewhere, and bad input ------------------------------------------------------------------------------


def test_an_adapter_without_tokenizer_has_that_of_its_base(home, tmp_path):
    folder = tmp_path / "bare"
    save_adapter(load_adapted(home / "adapter" / "model"), folder, base=str(home / "base" / "model"))
    run, _ = parts(home, **start(folder), **LORA)
    assert run.tokenizer.fingerprint() == parts(home, **start(home / "base"), **LORA)[0].tokenizer.fingerprint()
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace(str(home / "base" / "model"), "moved/to/nowhere"))
    with pytest.raises(UserError, match="adapter_config.json names the base model moved/to/nowhere: there is no such"):
        parts(home, **start(folder), **LORA)


@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_pefts_adapter_goes_on(home, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "base" / "model", dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p += 0.1 if "lora_B" in name else 0
    model.save_pretrained(tmp_path / "peft")
    run, _ = parts(home, **start(tmp_path / "peft"), **{"lora.r": 3})
    theirs = model(torch.arange(20)[None]).logits[0]
    torch.testing.assert_close(logits(run.model.eval()), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": 3}, "names no base model"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "names the base model /nowhere/at/all"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 2}, "lora.r = 4, there 2"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
    ],
    ids=str,
)
def test_a_bad_adapter_is_told(home, tmp_path, values, said):
    with pytest.raises(UserError) as caught:
        parts(home, **(start(changed(home, tmp_path, **values)) | LORA))
    assert said in caught.value.message


def test_an_adapter_on_an_adapter_is_refused(home, tmp_path):
    folder = changed(home, tmp_path, base_model_name_or_path=str(home / "adapter"))
    for keys in (LORA, {}):
        with pytest.raises(UserError, match="is an adapter itself") as caught:
            parts(home, **start(folder), **keys)
        assert caught.value.exit_code == MODEL
    itself = changed(home, tmp_path / "more", base_model_name_or_path=str(tmp_path / "more" / "changed"))
    with pytest.raises(UserError, match="is an adapter itself"):
        parts(home, **start(itself), **LORA)


def test_an_adapter_of_other_shapes_is_refused(home, tmp_path):
    folder = changed(home, tmp_path)
    path = folder / "adapter_model.safetensors"
    tensors = {name: t[:, :-1].contiguous() if "lora_A" in name else t for name, t in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(UserError, match="not the tensors that this model's adapter has"):
        parts(home, **start(folder), **LORA)


def test_a_folder_without_model_is_told(home, tmp_path):
    with pytest.raises(UserError, match="holds no model"):
        parts(home, **(start(tmp_path) | {"model.tokenizer_name_or_path": str(home / "tokenizer")}))


def test_a_run_is_not_resumed_beside_another_start(home, go, tmp_path, monkeypatch):
    """The adapter was trained anew in between, so the resumed run would fit neither version."""
    shutil.copytree(home / "adapter", tmp_path / "start")
    with monkeypatch.context() as patch:
        stop_after(patch, 4, signal.SIGTERM)
        assert go(tmp_path / "start").exit_code == STOPPED
    anew = partial(train, home, output_dir=str(tmp_path / "start"), **start(home / "base"), **LORA)
    assert anew(**{"train.seed": 1, "checkpoint.resume": "never"}).exit_code == 0
    with pytest.raises(UserError, match="started from another model than") as caught:
        go(tmp_path / "start")
    assert "resume = 'never'" in caught.value.hint
    assert go(tmp_path / "start", **{"checkpoint.resume": "never"}).exit_code == 0


def test_an_old_checkpoint_without_the_record_is_resumed(home, go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        honest = loop.training_state
        patch.setattr(loop, "training_state", lambda *a: {k: v for k, v in honest(*a).items() if k != "started_from"})
        stop_after(patch, 4, signal.SIGTERM)
        assert go(home / "adapter").exit_code == STOPPED
    assert go(home / "adapter").exit_code == 0
