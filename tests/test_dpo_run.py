"""Preference tuning in whole runs: the start is ln 2, and what should change nothing changes nothing."""

import json
import math
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from test_ranks import join, start_ranks
from test_resume import stop_after
from tiny import logged, relative_error, settings, train, weights

from minisft.config.load import load
from minisft.data.loader import Loader
from minisft.dpo import Objective
from minisft.errors import UserError
from minisft.preference.losses import LOSSES, LossOptions
from minisft.prepare.dpo import objective_of
from minisft.train import run

DPO = {"trainer_type": "dpo", "train.learning_rate": 1e-3, "train.per_device_train_batch_size": 4, "dpo.beta": 0.5}
METRICS = {
    *("loss", "grad_norm", "entropy", "mean_token_accuracy"),
    *(f"{kind}/{name}" for kind in ("rewards", "logps", "logits") for name in ("chosen", "rejected")),
    *("rewards/accuracies", "rewards/margins"),
}


FEW = 12


def write_pairs(path: Path, count: int = 32, **fields) -> Path:
    rng = np.random.default_rng(0)

    def text(low, high):
        return "".join(rng.choice(list("abcdefgh "), rng.integers(low, high))) + "."

    rows = [{"prompt": text(2, 14), "chosen": text(1, 14), "rejected": text(1, 14), **fields} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with pairs, fewer pairs, a tokenizer, and a model that was trained a little."""
    folder = tmp_path_factory.mktemp("dpo")
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "few.jsonl", FEW)
    train(folder, output_dir=str(folder / "first"), **{"train.max_steps": 4})
    return folder


@pytest.fixture
def go(home, tmp_path):
    """A function that trains on the pairs, in the folder of that name."""

    def go(name="out", **overrides):
        base = {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
        data = {"data.train_data": str(home / "pairs.jsonl"), "data.cache_dir": str(home / "cache")}
        return train(home, output_dir=str(tmp_path / name), **base | data | DPO | overrides)

    return go


def same(a: Path, b: Path, tolerance=3e-6):
    """Whether two runs logged the same and made the same weights, within rounding. tolerance: two updates of AdamW amplify the
    last bits of fp32, 1.3e-6 where a CPU adds in another order."""
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        np.testing.assert_allclose(logged(a, name), logged(b, name), rtol=1e-5, atol=2e-6, err_msg=name)
    # before the first update every margin is 0, and its sign is rounding
    assert logged(a, "rewards/accuracies")[1:] == logged(b, "rewards/accuracies")[1:]
    ours, others = (load_file(out / "model" / "model.safetensors") for out in (a, b))
    assert max(relative_error(ours[name], others[name]) for name in ours) < tolerance


def test_it_starts_at_ln_2_and_learns(go, home):
    result = go(**{"train.num_train_epochs": 3, "train.learning_rate": 2e-3})
    loss, accuracy, margin = (logged(result.output_dir, n) for n in ("loss", "rewards/accuracies", "rewards/margins"))
    assert loss[0] == pytest.approx(math.log(2), rel=1e-6) and margin[0] == accuracy[0] == 0
    loss, accuracy, margin = (np.mean(values[-8:]) for values in (loss, accuracy, margin))  # of the last pass
    assert loss < 0.6 and accuracy > 0.75 and margin > 0.2
    row = json.loads((result.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert METRICS <= row.keys()
    assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)
    assert "every margin is 0" in (result.output_dir / "summary.txt").read_text()


def test_the_learning_rate_is_that_of_preference_tuning(go):
    config, origins = load({"trainer_type": "dpo", "model": {"model_name_or_path": "m"}, "data": {"train_data": "d"}})
    assert config.train.learning_rate == 1e-6 and "dpo" in origins["train.learning_rate"]


@pytest.mark.parametrize(
    "other",
    [
        {"data.packing": True},
        {"dpo.share_prompt": True},
        {"data.packing": True, "dpo.share_prompt": True, "train.per_device_train_batch_size": 1},
        {"dpo.precompute_ref_log_probs": True},
        {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": FEW // 2},
        pytest.param(
            {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": FEW}, marks=pytest.mark.slow
        ),
        {"model.gradient_checkpointing": True},
        {"model.kernels": "reference"},
        {"evaluate.sample_steps": 1, "evaluate.max_new_tokens": 4},
    ],
    ids=lambda keys: "-".join(key.rpartition(".")[2] for key in keys),
)
def test_what_changes_nothing(go, home, other):
    """One pack of all pairs a step, or all pairs side by side, so that every run has the same pairs in its steps."""
    whole = {"data.train_data": str(home / "few.jsonl")}
    whole |= {"train.per_device_train_batch_size": FEW, "train.num_train_epochs": 2}
    base = home / "whole"
    if not base.exists():
        result = go("whole", **whole)
        result.output_dir.rename(base)
    overrides = whole | other
    if other.get("data.packing"):
        overrides |= {"data.max_length": 64, "train.per_device_train_batch_size": FEW}
    same(go("other", **overrides).output_dir, base)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "sigmoid"])
def test_every_loss_trains(go, name):
    smoothing = {"train.label_smoothing": 0.1} if name in ("exo_pair", "robust") else {}
    result = go(**{"dpo.loss_type": [name], "train.max_steps": 2} | smoothing)
    assert all(math.isfinite(loss) for loss in logged(result.output_dir))


def test_evaluation_is_exact_whatever_its_batches(go, home):
    evals = {"data.eval_data": str(home / "pairs.jsonl"), "audit.max_eval_overlap": 1.0, "train.max_steps": 2}
    results = [
        go(
            f"eval-{size}",
            **evals | {"evaluate.per_device_eval_batch_size": size, "dpo.precompute_ref_log_probs": cached},
        )
        for size, cached in ((32, False), (5, False), (3, True))
    ]
    for name in ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins", "eval_logits/rejected"):
        values = [result.metrics[name] for result in results]
        assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-5), name


def test_two_ranks_are_one(home, tmp_path, go):
    overrides = {"data.train_data": str(home / "pairs.jsonl"), "data.cache_dir": str(home / "cache"), **DPO}
    overrides |= {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    overrides["train.num_train_epochs"] = 1
    alone = go("alone", **{"train.per_device_train_batch_size": 8, "train.num_train_epochs": 1})
    for name, more in (
        ("live", {}),
        ("cached", {"dpo.precompute_ref_log_probs": True, "data.cache_dir": str(tmp_path)}),
    ):
        out = tmp_path / name
        assert join(start_ranks(home, overrides | more | {"output_dir": str(out)})) == (0, 0)
        same(out, alone.output_dir)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"dpo.sync_ref_model": True, "dpo.ref_model_sync_steps": 2},
        {"dpo.precompute_ref_log_probs": True},
        {"lora.r": 4},
        {"lora.r": 4, "dpo.sync_ref_model": True, "dpo.ref_model_sync_steps": 2},
    ],
    ids=["copy", "tr-dpo", "cached", "lora", "lora tr-dpo"],
)
def test_resumed_is_uninterrupted(go, keys, monkeypatch):
    file = "adapter_model.safetensors" if "lora.r" in keys else "model.safetensors"
    keys = keys | {"train.per_device_train_batch_size": 16, "train.max_steps": 4}  # 2 steps an epoch
    whole = go("whole", **keys)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGTERM)
        stopped = go("parts", **keys)
    assert stopped.exit_code == 75 and stopped.step == 3
    resumed = go("parts", **keys)
    read = lambda result: (result.output_dir / "model" / file).read_bytes()  # noqa: E731
    assert read(resumed) == read(whole)
    assert logged(resumed.output_dir, "rewards/margins") == logged(whole.output_dir, "rewards/margins")


def test_a_run_whose_packs_hold_shared_prompts_resumes_with_these_only(go, monkeypatch):
    """Pairs that share their prompt are shorter, so that other pairs share a pack. Without packs it makes no difference."""
    for packing in (True, False):
        keys = {"data.packing": packing, "train.max_steps": 3, "dpo.share_prompt": True}
        with monkeypatch.context() as patch:
            stop_after(patch, 2, signal.SIGTERM)
            go(f"packing-{packing}", **keys)
        other = keys | {"dpo.share_prompt": False}
        if packing:
            with pytest.raises(UserError, match="packing was bfd of pairs that share a prompt, is bfd"):
                go(f"packing-{packing}", **other)
        else:
            assert go(f"packing-{packing}", **other).exit_code == 0


def test_a_new_adapter_has_its_base_as_the_reference(go):
    """Switched off or copied (TR-DPO that never comes): the same."""
    keys = {"lora.r": 4, "train.max_steps": 4}
    off = go("off", **keys)
    copied = go("copied", **keys | {"dpo.sync_ref_model": True, "dpo.ref_model_sync_steps": 10**6})
    read = lambda result: (result.output_dir / "model" / "adapter_model.safetensors").read_bytes()  # noqa: E731
    assert read(off) == read(copied)


def test_another_model_as_the_reference(go, home):
    few = {"train.max_steps": 4}
    itself = go("itself", **few)
    named = go("named", **few | {"dpo.ref_model_name_or_path": str(home / "first" / "model")})
    assert weights(itself.output_dir) == weights(named.output_dir)
    moved = go("moved", **few | {"dpo.ref_model_name_or_path": str(itself.output_dir / "model")})
    assert logged(moved.output_dir)[0] != pytest.approx(math.log(2), rel=1e-3)


@pytest.mark.quick
def test_tr_dpo_starts_again_at_ln_2(go):
    keys = {"dpo.sync_ref_model": True, "dpo.ref_model_sync_steps": 4, "dpo.ref_model_mixup_alpha": 1.0}
    result = go(**keys, **{"train.max_steps": 5})
    losses = logged(result.output_dir)
    assert losses[4] == pytest.approx(math.log(2), rel=1e-6) and losses[3] != pytest.approx(math.log(2), rel=1e-3)


def test_dropout_is_off_unless_asked_for(go):
    keys = {"lora.r": 4, "train.max_steps": 3}
    result = go("off", **keys, **{"lora.lora_dropout": 0.5})
    assert logged(result.output_dir)[0] == pytest.approx(math.log(2), rel=1e-6)
    without = go("without", **keys)
    read = lambda result: (result.output_dir / "model" / "adapter_model.safetensors").read_bytes()  # noqa: E731
    assert read(result) == read(without)
    dropped = go("on", **keys, **{"lora.lora_dropout": 0.5, "dpo.disable_dropout": False})
    assert read(dropped) != read(without)


def test_kto_trains_on_labels_and_on_pairs(go, home, tmp_path):
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    labelled = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    kto = {"dpo.loss_type": ["kto"], "train.per_device_train_batch_size": 16, "train.num_train_epochs": 4}
    kto["train.learning_rate"] = 2e-3
    for name, data in (("pairs", home / "pairs.jsonl"), ("labels", path)):
        out = go(name, **kto | {"data.train_data": str(data)}).output_dir
        loss, kl = logged(out), logged(out, "kl")
        assert loss[0] == pytest.approx(0.5) and kl[0] == 0 and np.mean(loss[-8:]) < 0.48
        chosen, rejected = (np.nanmean(logged(out, f"rewards/{side}")[-8:]) for side in ("chosen", "rejected"))
        assert chosen > rejected + 0.2


def test_kto_of_good_answers_only_on_two_ranks(go, home, tmp_path):
    """5 answers in steps of 4: in the second step a rank has filler, and both add up the same metrics. There is no mean of
    bad answers."""
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()][:5]
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in good))
    keys = DPO | {
        "dpo.loss_type": ["kto"],
        "data.train_data": str(tmp_path / "good.jsonl"),
        "train.num_train_epochs": 1,
    }
    keys |= {"model.config": None, "model.model_name_or_path": str(home / "first" / "model")}
    keys |= {"data.cache_dir": str(home / "cache"), "train.per_device_train_batch_size": 2}
    out = tmp_path / "ranks"
    assert join(start_ranks(home, keys | {"output_dir": str(out)})) == (0, 0)
    first, second = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert first.keys() == second.keys() >= {"kl", "rewards/chosen"}
    assert not {"rewards/rejected", "logps/rejected", "rewards/margins"} & second.keys()


def test_a_row_s_weight_is_that_of_its_pair(go, home, tmp_path):
    twice = write_pairs(tmp_path / "twice.jsonl", weight=2.0)
    few = {"train.max_steps": 4}
    plain, weighted = go("plain", **few), go("twice", **few | {"data.train_data": str(twice)})
    same(plain.output_dir, weighted.output_dir)  # the mean is weighted


def test_memory_is_not_spent_where_it_need_not_be(go, home):
    """Without a reference there is none, with new adapters there is no copy."""
    simpo = go("simpo", **{"dpo.loss_type": ["simpo"], "train.max_steps": 1})
    assert "without a reference" in (simpo.output_dir / "summary.txt").read_text()
    cached = go("cached", **{"dpo.precompute_ref_log_probs": True, "train.max_steps": 1})
    assert (
        "reference: the policy as it starts; its log-probabilities" in (cached.output_dir / "summary.txt").read_text()
    )
    lora = go("lora", **{"lora.r": 4, "train.max_steps": 1})
    assert "without its new adapters" in (lora.output_dir / "summary.txt").read_text()


# ------------------------------------------------------------------------------------------------- SFT, then DPO


def stop_after_collecting(patch, number: int) -> None:
    """The process gets a signal when the batches of a step are asked for, for this many times over all stages."""
    honest, calls = Loader.step, []

    def step(self, epoch, s):
        calls.append(s)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return honest(self, epoch, s)

    patch.setattr(Loader, "step", step)


@pytest.mark.parametrize(
    "lora, step",
    [({}, 2), pytest.param({}, 6, marks=pytest.mark.slow), ({"lora": {"r": 4}}, 6)],
    ids=["full, first", "full, second", "lora, second"],
)
def test_stopped_in_either_stage_is_uninterrupted(home, tmp_path, monkeypatch, lora, step):
    """The second stage's reference is what the first wrote: with adapters, the adapter as it was, not the base."""
    rows = {"data": {"train_data": str(home / "rows.jsonl")}}
    pairs = {"data": {"train_data": str(home / "pairs.jsonl")}, "trainer_type": "dpo"}
    common = settings(home, **{"model.config": None, "model.model_name_or_path": str(home / "first" / "model")})
    common |= {"data.cache_dir": str(home / "cache"), "train.num_train_epochs": 1, "train.learning_rate": 3e-3}
    common |= {"train.per_device_train_batch_size": 16}  # 4 steps, then 2
    del common["data.train_data"]
    stages = {"stages": [rows | lora, pairs | lora]}
    file = "adapter_model.safetensors" if lora else "model.safetensors"

    def go(name):
        result = run(stages, **common | {"output_dir": str(tmp_path / name)})
        return result, tmp_path / name / "2-dpo"

    _, whole = go("whole")
    with monkeypatch.context() as patch:
        # the sixth batch is the second stage's first, which it reads before it begins
        stop_after_collecting(patch, step)
        stopped, _ = go("stopped")
    assert stopped.exit_code == 75
    result, out = go("stopped")
    assert result.exit_code == 0
    assert (out / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()
    for name in ("loss", "rewards/margins"):
        assert logged(out, name) == logged(whole, name)
    assert logged(whole)[0] == pytest.approx(math.log(2), rel=1e-6)
    assert "a copy of the trained weights" in (whole / "summary.txt").read_text()


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"dpo.loss_type": ["sigmoid", "kto"]}, "kto takes single answers"),
        ({"dpo.loss_type": ["sigmoid", "sigmoid"]}, "once"),
        ({"dpo.loss_type": ["sigmoid", "sft"], "dpo.loss_weights": [1.0]}, "1 weights for 2 losses"),
        ({"dpo.loss_type": ["exo_pair"]}, "label_smoothing"),
        ({"dpo.loss_type": ["robust"], "train.label_smoothing": 0.5}, "half of the pairs"),
        ({"dpo.loss_type": ["simpo"], "dpo.sync_ref_model": True}, "policy only"),
        ({"dpo.loss_type": ["aot"], "dpo.use_weighting": True}, "aot"),
        ({"dpo.loss_weights": [-1.0]}, "at least 0"),
        ({"dpo.loss_type": ["sigmoid", "sft"], "dpo.loss_weights": [0, 0]}, "all losses are left out"),
        ({"dpo.desirable_weight": 2.0}, "kto"),
        ({"dpo.loss_type": ["kto"], "dpo.desirable_weight": 0, "dpo.undesirable_weight": 0}, "nothing would train"),
        ({"dpo.loss_type": ["hinge"], "train.label_smoothing": 0.1}, "belongs to loss_type sigmoid"),
        ({"dpo.loss_type": ["apo_zero"], "dpo.f_divergence_type": "forward_kl"}, "belongs to loss_type sigmoid"),
        ({"dpo.f_alpha_divergence_coef": 0.3}, "belongs to alpha_divergence"),
        ({"dpo.simpo_gamma": 1.0}, "belongs to loss_type simpo"),
        ({"dpo.discopop_tau": 1.0}, "belongs to loss_type discopop"),
        ({"dpo.ref_model_sync_steps": 4}, "belongs to sync_ref_model"),
        ({"dpo.precompute_ref_batch_size": 4}, "belongs to precompute_ref_log_probs"),
        ({"dpo.sync_ref_model": True, "dpo.precompute_ref_log_probs": True}, "choose one"),
        ({"data.packing": True, "data.packing_strategy": "wrapped"}, "pair cannot be cut"),
        ({"data.truncation": "turns"}, "differently"),
        ({"data.format": "text"}, "no preference"),
        ({"data.completion_only_loss": False}, "only answers"),
        ({"train.neftune_noise_alpha": 5.0}, "noise"),
        ({"train.z_loss": 1e-4}, "z_loss"),
        ({"dpo.beta": 0}, "above 0"),
        ({"dpo.loss_type": ["sigmoyd"]}, "sigmoid"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(key.rpartition(".")[2] for key in value),
)
def test_contradictions_are_told(go, keys, words):
    with pytest.raises(UserError) as caught:
        go(**keys)
    assert words in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    "config, reason",
    [
        ({"model_type": "mistral", "sliding_window": 16}, "a model whose layers see 16 tokens"),
        ({"model_type": "lfm2", "full_attn_idxs": [1]}, "lfm2, whose layers remember one past"),
    ],
)
def test_windows_and_states_do_not_go_with_shared_prompts(config, reason, home, tmp_path):
    config |= {"vocab_size": 259, "hidden_size": 32}
    config |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    keys = {"model.config": config, "data.train_data": str(home / "pairs.jsonl"), "dpo.share_prompt": True, **DPO}
    run = partial(train, home, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=f"share_prompt with {reason}"):
        run(**keys)
    run(**keys | {"dpo.share_prompt": False, "train.max_steps": 1})


def test_rows_of_a_step_that_is_not_finite_are_told_once(go, home):
    """Each has two answers."""
    with pytest.raises(UserError, match="not finite") as caught:
        go(**{"dpo.beta": 1e30})
    path = Path(re.search(r"are in (\S+)\. Look", caught.value.hint)[1])
    told = caught.value.message.partition("Its rows: ")[2].split(", ")
    rows = [json.loads(line)["row"] for line in path.read_text().splitlines()[1:]]
    assert len(told) == len(set(told)) == 4 and len(rows) == 8
    assert set(rows) == {f"{row}, {answer}" for row in told for answer in ("chosen", "rejected")}


def test_sft_data_is_refused(go, home):
    with pytest.raises(UserError):
        go(**{"data.train_data": str(home / "rows.jsonl")})


def test_every_option_reaches_the_loss(home):
    options = {
        "loss_type": ["sigmoid", "simpo", "discopop"],
        "loss_weights": [0.7, 0.3, 0.2],
        "beta": 0.2,
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
        "discopop_tau": 0.1,
        "simpo_gamma": 0.9,
        "ld_alpha": 0.4,
        "use_weighting": True,
    }
    keys = {f"dpo.{key}": value for key, value in options.items()} | {"train.label_smoothing": 0.05}
    config, _ = load({}, settings(home, **{"data.train_data": str(home / "pairs.jsonl")}) | DPO | keys)
    assert objective_of(config) == Objective(
        losses={"sigmoid": 0.7, "simpo": 0.3, "discopop": 0.2},
        options=LossOptions(
            beta=0.2,
            label_smoothing=0.05,
            discopop_tau=0.1,
            simpo_gamma=0.9,
            f_divergence="alpha_divergence",
            alpha=0.3,
        ),
        ld_alpha=0.4,
        use_weighting=True,
    )
    weights = {"dpo.loss_type": ["kto"], "dpo.desirable_weight": 2.0, "dpo.undesirable_weight": 3.0}
    config, _ = load({}, settings(home, **{"data.train_data": str(home / "pairs.jsonl")}) | DPO | weights)
    assert (objective_of(config).desirable_weight, objective_of(config).undesirable_weight) == (2.0, 3.0)
