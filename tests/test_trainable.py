"""What trains: by name, from which step on, and nothing else moves, has a gradient or costs anything."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_ranks import join, same_weights, start_ranks
from test_resume import assert_same, outcome, stop_after
from tiny import MODEL, logged, parts, relative_error, settings, train, weights
from torch.utils.flop_counter import FlopCounterMode

from minisft.errors import UserError
from minisft.loop import train_step
from minisft.parameters import choose_trainable, describe_trained, near_names

LAYER_1 = r"^layers\.1\."


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """One folder for the runs of this file: they share rows, tokenizer and token cache."""
    folder = tmp_path_factory.mktemp("trainable")
    settings(folder)
    return folder


@pytest.fixture
def go(home, tmp_path):
    """A function that trains, in the same output folder at every call of one test."""
    return partial(train, home, output_dir=str(tmp_path / "out"), **{"data.cache_dir": str(home / "cache")})


def trained(home, **keys) -> set[str]:
    run, _ = parts(home, **keys)
    names = {p: name for name, p in run.model.named_parameters()}
    inside = {names[p] for group in run.optimizer.param_groups for p in group["params"]}
    assert inside == {name for name, p in run.model.named_parameters() if p.requires_grad}
    return inside


def step_of(home, **keys) -> tuple[float, dict[str, torch.Tensor], object]:
    """(loss, gradients, run) of the first optimizer step, read from Adam's first moments with beta1 = 0."""
    run, config = parts(home, **{"train.adam_beta1": 0.0, "train.max_grad_norm": None, **keys})
    result = train_step(run, config.train, run.train.step(0, 0))
    names = {p: name for name, p in run.model.named_parameters()}
    return result.stats.means()["loss"], {names[p]: s["exp_avg"] for p, s in run.optimizer.state.items()}, run


# ---- the choice ---------------------------------------------------------------------------------------------------


def test_expressions_choose_and_frozen_wins(home):
    names = trained(home)
    assert trained(home, **{"train.trainable": [r"\.mlp\.", "^norm"]}) == {
        n for n in names if ".mlp." in n or n.startswith("norm")
    }
    assert trained(home, **{"train.frozen": ["embed_tokens", LAYER_1]}) == {
        n for n in names if "embed" not in n and "layers.1." not in n
    }
    both = trained(home, **{"train.trainable": [LAYER_1], "train.frozen": ["_proj"]})
    assert both == {n for n in names if "layers.1." in n and "norm" in n}
    assert trained(home, unfrozen_parameters=["lm_head"]) == {"lm_head.weight"}  # as others call it


@pytest.mark.parametrize("key", ["trainable", "frozen"])
def test_a_tied_embedding_is_one_parameter(home, key):
    tied = {"model.config": MODEL | {"tie_word_embeddings": True}}
    names = trained(home, **tied)
    assert "lm_head.weight" not in names
    expected = {"embed_tokens.weight"} if key == "trainable" else names - {"embed_tokens.weight"}
    assert trained(home, **tied, **{f"train.{key}": ["embed"]}) == expected
    with pytest.raises(UserError, match="lm_head") as caught:
        parts(home, **tied, **{f"train.{key}": ["lm_head"]})
    assert "the head of this model is its embedding: embed_tokens.weight" in caught.value.hint


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            {"train.trainable": ["q_prj"]},
            "train.trainable: 'q_prj' matches no parameter.*\n.*near.*layers.0.self_attn.q_",
        ),
        ({"train.frozen": [r"layers\.7\."]}, "train.frozen: .*7.* matches no parameter.*\n.*near names: layers.0"),
        ({"train.unfreeze": {"zzz": 1}}, "train.unfreeze: 'zzz' matches no parameter"),
        (
            {"train.unfreeze": {"embed": 2}, "train.frozen": ["embed"]},
            "train.unfreeze: 'embed' matches no parameter",
        ),
        ({"train.trainable": ["("]}, r"train.trainable = \[\"\(\"\] .*is not a regular expression"),
        ({"train.frozen": ["."]}, "no parameter is left to train"),
        ({"train.unfreeze": {".": 3}}, "nothing trains before step 3"),
        ({"train.unfreeze": {"embed": 1.5}}, "train.unfreeze = {embed = 1.5}: expected a table"),
        ({"train.unfreeze": {"embed": -1}}, "train.unfreeze = {embed = -1}: expected a table"),
        ({"train.unfreeze": {"embed": True}}, "train.unfreeze = {embed = true}: expected a table"),
        ({"train.learning_rates": {"q_prj": 1.0}}, "train.learning_rates: .*\n.*near names: layers.0.self_attn.q_proj"),
        (
            {"train.frozen": ["embed"], "lora.r": 4, "model.config": None, "model.model_name_or_path": "x"},
            "with .lora. the adapters train",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(home, keys, message):
    with pytest.raises(UserError, match=message):
        parts(home, **keys)


def test_near_names_are_few_and_shown_with_any_pattern():
    names = [f"layers.{i}.self_attn.{k}_proj.weight" for i in range(30) for k in "qkvo"]
    for pattern in ("", "[", r"\d+", "v_porj", "x" * 300):
        assert len(near_names(pattern, names)) < 200
    assert "v_proj" in near_names(r"layers\.3\.v_porj", names)


# ---- one step -----------------------------------------------------------------------------------------------------

FREEZE = {"train.frozen": ["embed_tokens", r"layers\.0\.", r"1\.mlp\.up", "^norm"]}


@pytest.mark.quick
def test_gradients_of_what_trains_are_those_of_full_training_bitwise(home):
    loss, full, _ = step_of(home)
    frozen_loss, grads, run = step_of(home, **FREEZE)
    assert loss == frozen_loss and 0 < len(grads) < len(full)
    assert all(torch.equal(grads[name], full[name]) for name in grads)
    assert grads.keys() == {name for name, p in run.model.named_parameters() if p.requires_grad}


def test_packed_equals_unpacked(home):
    everything = {"train.per_device_train_batch_size": 32, "data.train_data": str(home / "rows.jsonl[:32]"), **FREEZE}
    packed, unpacked = (step_of(home, **everything, **{"data.packing": packing}) for packing in (True, False))
    assert packed[0] == pytest.approx(unpacked[0], rel=1e-6)
    for name, grad in unpacked[1].items():
        assert relative_error(packed[1][name], grad) <= 1e-6, name  # the bound of the house for equal maths


@pytest.mark.parametrize("kept", ["lm_head", "^norm", r"layers\.1\.mlp\.down_proj", "embed_tokens"])
def test_only_what_is_needed_is_computed(home, kept):
    """Products of the backward: one for each trained matrix, one for each that lies between it and the loss."""

    def backward_flops(keys) -> int:
        run, _ = parts(home, **{"model.kernels": "reference", **keys})
        (batch,) = run.train.step(0, 0)
        loss, _ = run.loss(run.model, batch, 1.0)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        assert {n for n, p in run.model.named_parameters() if p.grad is not None} == {
            n for n, p in run.model.named_parameters() if p.requires_grad
        }
        return counter.get_total_flops()

    run, _ = parts(home)
    (batch,) = run.train.step(0, 0)
    rows, tokens, size = len(batch.loss_rows), len(batch.input_ids), run.model.head_weight.numel()
    in_mlp = MODEL["hidden_size"] * MODEL["intermediate_size"]
    head = 2 * rows * size  # either product of the head's backward
    flops = backward_flops({"train.trainable": [kept]})
    expected = {"lm_head": head, "^norm": head, r"layers\.1\.mlp\.down_proj": head + 2 * tokens * in_mlp}
    if kept in expected:
        assert flops == expected[kept]
    else:  # for the embedding, everything but the gradients of the matrices
        matrices = sum(p.numel() for name, p in run.model.layers.named_parameters() if p.ndim == 2)
        assert backward_flops({}) - flops == 2 * tokens * matrices + head


# ---- whole runs ---------------------------------------------------------------------------------------------------


def test_frozen_parameters_stay_bitwise_and_have_no_state(go, home):
    go(**FREEZE, **{"train.weight_decay": 0.1, "train.max_steps": 3, "checkpoint.save_steps": 3})
    result = go(**FREEZE, **{"train.weight_decay": 0.1, "train.max_steps": 3})
    first, _ = parts(home, **FREEZE)
    names = {name for name, p in first.model.named_parameters() if p.requires_grad}
    after = load_file(result.model_dir / "model.safetensors")
    for name, p in first.model.named_parameters():
        stored = next(value for key, value in after.items() if key.removeprefix("model.") == name)
        assert torch.equal(stored, p.detach()) == (name not in names), name
    state = load_file(result.output_dir / "checkpoints" / "step-00000003" / "optimizer.safetensors")
    assert {key.rpartition(".")[0] for key in state} == names


def test_peak_memory_falls_by_gradients_and_moments(home):
    _, _, full = step_of(home)
    _, _, part = step_of(home, **FREEZE)

    def state_bytes(run) -> int:
        return sum(v.nbytes for s in run.optimizer.state.values() for v in s.values() if v.ndim)

    sizes = [sum(p.nbytes for p in run.model.parameters() if p.requires_grad) for run in (full, part)]
    assert sizes[1] < sizes[0]
    assert [state_bytes(full), state_bytes(part)] == [2 * size for size in sizes]


UNFREEZE = {"train.unfreeze": {LAYER_1: 0, r"^layers\.": 4, "embed": 6}, "train.max_steps": 8}


def test_a_run_before_the_boundary_is_a_frozen_run_and_one_without_it_is_plain(go, home, tmp_path):
    def last(name: str, **keys) -> dict[str, bytes]:
        keys = {"train.lr_scheduler_type": "constant", **keys, "output_dir": str(tmp_path / name)}
        return weights(train(home, **keys).output_dir)

    late = {"train.unfreeze": {LAYER_1: 0, r"^layers\.": 4, "embed": 6}, "train.max_steps": 4}
    frozen = {"train.frozen": ["embed", r"^layers\.0\."], "train.max_steps": 4}
    assert last("late", **late) == last("frozen", **frozen)
    at_once = {"train.unfreeze": {".": 0}, "train.max_steps": 4}
    assert last("at once", **at_once) == last("plain", **{"train.max_steps": 4})


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_parameter_starts_with_an_empty_state_and_its_own_count(home, optim):
    """Its first update is the first update of an optimizer that has it alone."""
    run, config = parts(home, **UNFREEZE, **{"train.optim": optim, "train.lr_scheduler_type": "constant"})
    late = run.model.get_parameter("embed_tokens.weight")
    first = late.detach().clone()
    for step in range(7):
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        train_step(run, config.train, run.train.step(0, step))
        moved = {name for name, p in run.model.named_parameters() if not torch.equal(p.detach(), before[name])}
        expected = {n for n in before if not n.startswith(("layers.0.", "embed"))}
        expected |= {n for n in before if n.startswith("layers.0.")} if step >= 4 else set()
        assert moved == expected | ({"embed_tokens.weight"} if step >= 6 else set())
        assert not any(p.grad is not None and p.grad.any() for p in run.model.parameters())
        run.progress.step += 1
        if step < 6:
            assert torch.equal(late.detach(), first) and not run.optimizer.state.get(late)
    state = run.optimizer.state[late]
    assert float(state["step"]) == 1
    # of one gradient Adam makes an update of the learning rate, whatever its size: bias correction begins at 1
    moved = (late.detach() - first).abs()[state["exp_avg"].abs() > 1e-4]
    torch.testing.assert_close(moved, torch.full_like(moved, config.train.learning_rate), rtol=1e-2, atol=0)
    other = run.optimizer.state[run.model.get_parameter("layers.0.mlp.up_proj.weight")]
    assert float(other["step"]) == 3


@pytest.fixture(scope="module")
def whole(home):
    """The outcome of a run with boundaries at 4 and 6, that nobody stopped."""
    train(home, output_dir=str(home / "whole"), **UNFREEZE, **{"data.cache_dir": str(home / "cache")})
    return outcome(home / "whole")


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_stopped_before_at_and_after_a_boundary(go, whole, tmp_path, monkeypatch, steps):
    with monkeypatch.context() as patch:
        stop_after(patch, steps, signal.SIGTERM)
        assert go(**UNFREEZE).exit_code == 75
    assert json.loads((tmp_path / f"out/checkpoints/step-{steps:08d}/trainer_state.json").read_text())["step"] == steps
    assert go(**UNFREEZE).exit_code == 0
    assert_same(outcome(tmp_path / "out"), whole)


HOW = [{"train.optim": name} for name in ("adamw_minisft", "adamw_8bit", "schedule_free_adamw", "adafactor")]
HOW += [
    {"train.optimizer_in_backward": True, "train.max_grad_norm": None},
    {"train.weights_dtype": "bf16", "train.precision": "bf16"},
]


@pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(map(str, how.values())))
def test_resumed_at_a_boundary_with_whatever_updates(home, tmp_path, how):
    keys = UNFREEZE | how | {"train.lr_scheduler_type": "constant", "checkpoint.save_steps": 4}
    keys["data.cache_dir"] = str(home / "cache")
    one = train(home, output_dir=str(tmp_path / "one"), **keys)
    half = str(one.output_dir / "checkpoints" / "step-00000004")
    other = train(home, output_dir=str(tmp_path / "other"), **keys, **{"checkpoint.resume": half})
    for name in ("model.safetensors", "optimizer.safetensors"):
        last = f"checkpoints/step-00000008/{name}"
        assert (one.output_dir / last).read_bytes() == (other.output_dir / last).read_bytes()
    state = load_file(one.output_dir / "checkpoints" / "step-00000008" / "optimizer.safetensors")
    counts = {key.removesuffix(".step"): float(value) for key, value in state.items() if key.endswith(".step")}
    assert (
        counts["embed_tokens.weight"] == 2 and counts["layers.0.mlp.up_proj.weight"] == 4 and counts["norm.weight"] == 8
    )


def test_two_ranks_agree(home, tmp_path):
    keys = {"train.unfreeze": {"embed": 2}, "train.frozen": [r"layers\.0\."], "train.max_steps": 4}
    keys |= {"train.per_device_train_batch_size": 4}
    assert join(start_ranks(home, keys | {"output_dir": str(tmp_path / "two")})) == (0, 0)
    assert same_weights(tmp_path / "two")
    one = train(home, **keys | {"output_dir": str(tmp_path / "one"), "train.per_device_train_batch_size": 8})
    assert logged(tmp_path / "two") == pytest.approx(logged(one.output_dir), rel=1e-5)  # as in test_ranks.py


def test_adapters_can_start_later(home, tmp_path):
    base = train(home, output_dir=str(tmp_path / "base"), **{"train.max_steps": 1}).model_dir
    keys = {"model.config": None, "model.model_name_or_path": str(base), "lora.r": 2, "train.max_steps": 3}
    result = train(home, output_dir=str(tmp_path / "out"), **keys, **{"train.unfreeze": {r"layers\.0\.": 2}})
    state = load_file(result.output_dir / "checkpoints" / "step-00000003" / "optimizer.safetensors")
    counts = {key: float(value) for key, value in state.items() if key.endswith(".step")}
    assert set(counts.values()) == {1.0, 3.0}
    assert all((count == 1) == key.startswith("layers.0.") for key, count in counts.items())
    assert "adapters" in (result.output_dir / "summary.txt").read_text()


# ---- the table ----------------------------------------------------------------------------------------------------


def test_the_summary_says_what_trains_and_from_when(home):
    run, _ = parts(home, **{"train.unfreeze": {r"layers\.0\.": 5, "embed": 100}, "train.frozen": ["lm_head"]})
    lines = run.summary[next(i for i, line in enumerate(run.summary) if line.startswith("trains")) :]
    lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("kernels"))]
    sizes = {name: p.numel() for name, p in run.model.named_parameters()}
    assert f"lm_head                   0 of {sizes['lm_head.weight']:>14,}    0.0%  float32" in lines[4]
    assert f"{sum(sizes.values()):,}" in lines[5] and len(lines) == 8
    assert lines[6].endswith(r"layers\.0\.: 9 tensors from step 5 on")
    assert lines[7].endswith("embed: 1 tensors from step 100 on, after this run of 8 steps")
    counted = [int(line.split()[-5].replace(",", "")) for line in lines[:5]]
    assert sum(counted) == sum(sizes.values()) - sizes["lm_head.weight"]


def test_the_table_is_shown_where_it_says_something(home):
    shown = [
        any(line.startswith("trains") for line in parts(home, **keys)[0].summary)
        for keys in ({}, {"verbose": True}, {"train.frozen": ["embed"]}, {"train.unfreeze": {"embed": 1}})
    ]
    assert shown == [False, True, True, True]


def test_every_parameter_is_of_a_kind(home):
    run, _ = parts(home)
    assert choose_trainable(run.model) == {}
    kinds = [line.split()[0] for line in describe_trained(dict(run.model.named_parameters()), {}, 1)]
    assert kinds == ["embed_tokens", "norms", "attention", "mlp", "lm_head", "in"]
