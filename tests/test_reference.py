"""The reference in runs: nobody takes another one for it, and what the start is checked for shows."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dpo import batch_of, make_pairs, policy
from test_dpo_run import DPO, write_pairs
from test_ranks import join, start_ranks
from tiny import logged, train

from minisft import ranks
from minisft.data import loader as loader_module
from minisft.data.loader import Loader, shared_prompts
from minisft.data.packing import plan
from minisft.errors import SAVE, UserError
from minisft.model.lora import apply_lora
from minisft.model.lora_options import LoraOptions
from minisft.preference.losses import dpo_loss
from minisft.preference.reference import cache_logps, check_layout, fingerprint

CACHED = {"dpo.precompute_ref_log_probs": True, "train.max_steps": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with pairs, a tokenizer, and a model that was trained a little."""
    folder = tmp_path_factory.mktemp("reference")
    write_pairs(folder / "pairs.jsonl", count=16)
    train(folder, output_dir=str(folder / "first"), **{"train.max_steps": 4})
    return folder


def keys(home: Path) -> dict:
    base = {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    return base | {"data.train_data": str(home / "pairs.jsonl"), "data.cache_dir": str(home / "cache")} | DPO


@pytest.fixture
def go(home, tmp_path):
    return lambda name="out", **more: train(home, output_dir=str(tmp_path / name), **keys(home) | more).output_dir


def how(out: Path) -> str:
    """Whether the log-probabilities were found or computed."""
    return re.search("log-probabilities are (found|computed)", (out / "summary.txt").read_text())[1]


# ------------------------------------------------------------------------------------------------- which it is


@pytest.mark.parametrize("quantised", [{"model.load_in_4bit": True}, {"model.load_in_8bit": True}], ids=["4", "8"])
def test_beside_quantised_weights_the_cached_reference_is_the_live_one(go, quantised):
    cached, live = (
        go(str(on), **quantised, **{"lora.r": 4}, **CACHED | {"dpo.precompute_ref_log_probs": on})
        for on in (True, False)
    )
    assert logged(cached) == pytest.approx(logged(live), rel=1e-6)
    assert logged(live)[1] != logged(live)[0]


def test_modules_that_train_whole_belong_to_the_reference(go, home, tmp_path):
    """The new adapters do not: with others, the cached log-probabilities are found."""
    lora = CACHED | {"lora.r": 4, "lora.modules_to_save": ["lm_head"]}
    assert how(go("one", **lora)) == "computed"
    assert how(go("other", **lora | {"lora.r": 2, "train.seed": 7})) == "found"
    shutil.copytree(home / "first" / "model", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors["lm_head.weight"] *= 1.01
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "base" / "manifest.json").unlink()
    assert how(go("moved", **lora | {"model.model_name_or_path": str(tmp_path / "base")})) == "computed"


def test_an_adapter_at_another_scale_is_another_reference(go, tmp_path):
    first = go("first", **{"lora.r": 4, "train.max_steps": 2}) / "model"
    assert how(go("one", **CACHED | {"lora.r": 4, "model.model_name_or_path": str(first)})) == "computed"
    shutil.copytree(first, tmp_path / "scaled")
    config = json.loads((first / "adapter_config.json").read_text())
    (tmp_path / "scaled" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8.0}))
    scaled = {"lora.r": 4, "model.model_name_or_path": str(tmp_path / "scaled")}
    assert how(go("other", **CACHED | scaled)) == "computed"


def test_the_reference_may_be_a_run_or_an_adapter(go):
    """What model_name_or_path may be: with the start of this run as its own reference, it begins at ln 2."""
    whole, adapted = go("whole", **{"train.max_steps": 2}), go("adapted", **{"lora.r": 4, "train.max_steps": 2})
    for out, own in ((whole, {}), (adapted, {"lora.r": 4})):
        for name in (out, out / "model"):
            start = {
                "model.model_name_or_path": str(out),
                "dpo.ref_model_name_or_path": str(name),
                "train.max_steps": 1,
            }
            assert logged(go("next", **own | start | {"checkpoint.resume": "never"}))[0] == pytest.approx(
                np.log(2), rel=1e-5
            )


# ------------------------------------------------------------------------------------------------- the files


def small_loader() -> Loader:
    documents = make_pairs()
    return Loader(documents, plan(documents.unit_lengths, 60, "bfd"), batch_size=2)


def arguments(folder: Path, compute=None) -> tuple:
    return compute or (lambda batch: -1.0 - batch.answers.document), ["a model"], folder, torch.device("cpu"), 3, False


def test_what_another_process_wrote_meanwhile_is_kept(tmp_path):
    """It may be read at this moment."""
    loader = small_loader()

    def compute(batch):
        if not list(tmp_path.glob("reference-*")):
            cache_logps(loader, *arguments(tmp_path))
        return -2.0 - batch.answers.document

    assert cache_logps(loader, *arguments(tmp_path, compute))[1] == "computed"
    (path,) = tmp_path.glob("reference-*/logps.bin")
    assert np.fromfile(path, dtype=np.float32).tolist() == [-1.0 - d for d in range(14)]
    assert cache_logps(loader, *arguments(tmp_path))[1] == "found"


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")

    def compute(batch):
        raise AssertionError("hours of work")

    with pytest.raises(UserError, match="cached log-probabilities") as caught:
        cache_logps(small_loader(), *arguments(tmp_path / "file", compute))
    assert caught.value.exit_code == SAVE


def test_a_killed_computation_leaves_nothing_that_is_found(tmp_path):
    def compute(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_logps(small_loader(), *arguments(tmp_path, compute))
    assert cache_logps(small_loader(), *arguments(tmp_path))[1] == "computed"


def test_ranks_compute_together_where_one_does_not_see_the_files(tmp_path, monkeypatch):
    """Else one would wait for the others' sums for ever."""
    cache_logps(small_loader(), *arguments(tmp_path))
    monkeypatch.setattr(ranks, "sum_numbers_over_ranks", lambda numbers: [numbers[0] + 0.0])
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    assert cache_logps(small_loader(), *arguments(tmp_path))[1] == "computed"


def test_two_ranks_evaluate_on_what_they_train_on(home, tmp_path):
    """The same documents have the same files: when the second rank looks for them, the first may just have written them."""
    more = {"data.eval_data": str(home / "pairs.jsonl"), "audit.max_eval_overlap": 1.0, "train.max_steps": 1}
    more |= {"dpo.precompute_ref_log_probs": True, "data.cache_dir": str(tmp_path), "output_dir": str(tmp_path / "out")}
    assert join(start_ranks(home, keys(home) | more)) == (0, 0)


def test_the_fingerprint_takes_weights_of_every_kind():
    model = policy(dtype=torch.float32)
    assert fingerprint(model.to(torch.bfloat16)) != fingerprint(policy(dtype=torch.float32))
    apply_lora(model, LoraOptions(r=2))
    model.layers[0].mlp.up_proj.scalar = torch.nn.Parameter(torch.tensor(1.0))  # scales of scales are such
    before = fingerprint(model)
    model.layers[0].mlp.up_proj.scalar.data += 1
    assert fingerprint(model) != before


# ------------------------------------------------------------------------------------------------- the check


def no_bounds(cu_seqlens, num_tokens):
    return torch.zeros(num_tokens, dtype=torch.int32), torch.full((num_tokens,), num_tokens, dtype=torch.int32)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("strategy", ["none", "bfd"])
def test_a_boundary_error_shows_at_the_start(monkeypatch, shared, strategy):
    """Policy and reference would agree on it: they read the same batch."""
    documents, model = make_pairs(), policy(dtype=torch.float32)
    documents = replace(documents, shared=shared_prompts(documents)) if shared else documents
    loader = Loader(documents, plan(documents.unit_lengths, 60, strategy), batch_size=7, round_to=8)
    check_layout(model, batch_of(documents, strategy), loader, "fp32")
    assert model.training

    monkeypatch.setattr(loader_module, "document_bounds", no_bounds)
    with pytest.raises(UserError, match="beside others"):
        check_layout(model, batch_of(documents, strategy), loader, "fp32")


def test_positions_that_do_not_restart_at_the_prompt_show_at_the_start():
    documents, model = make_pairs(), policy(dtype=torch.float32)
    shared = replace(documents, shared=shared_prompts(documents))
    loader = Loader(shared, plan(shared.unit_lengths, 60, "none"), batch_size=7)
    batch = batch_of(shared)
    follows = torch.arange(len(batch.input_ids), dtype=torch.int32) - batch.start
    with pytest.raises(UserError, match="beside others"):
        check_layout(model, replace(batch, position_ids=follows), loader, "fp32")


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_a_run_checks_its_layout(go, monkeypatch, loss):
    monkeypatch.setattr(loader_module, "document_bounds", no_bounds)
    with pytest.raises(UserError, match="beside others"):
        go(**{"dpo.loss_type": [loss], "data.packing": True, "train.max_steps": 1})


def test_rounding_in_bf16_is_no_difference(go):
    """Computed in other batches than the first, one pair at a time, and compared with it."""
    other = {
        "train.precision": "bf16",
        "evaluate.per_device_eval_batch_size": 1,
        "data.packing": True,
        "data.max_length": 64,
    }
    go(**CACHED | other)


# ------------------------------------------------------------------------------------------------- at the ends of fp32


@pytest.mark.parametrize("logp", [0.0, -1e-9, -1e-4, -0.69, -0.7, -50.0, -5000.0])
@pytest.mark.parametrize("name, options", [("orpo", {}), ("discopop", {"beta": 0.5})])
def test_losses_of_sure_and_of_hopeless_answers_are_finite(name, options, logp):
    chosen, rejected = (torch.tensor([value], requires_grad=True) for value in (logp, -1.0))
    for pair in ((chosen, rejected), (rejected, chosen)):
        losses, _, _ = dpo_loss(*pair, torch.tensor([-1.0]), torch.tensor([-1.0]), loss_type=name, **options)
        gradients = torch.autograd.grad(losses.sum(), pair)
        assert losses.isfinite().all() and all(g.isfinite().all() for g in gradients)


# ------------------------------------------------------------------------------------------------- resuming


@pytest.mark.quick
def test_packs_of_shared_prompts_are_another_order(go, home):
    packed = {"data.packing": True, "train.max_steps": 1}
    go(**packed)
    with pytest.raises(UserError, match="share a prompt"):
        go(**packed | {"dpo.share_prompt": True, "train.max_steps": 2})
