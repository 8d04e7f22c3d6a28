"""Optimizers that save memory: our AdamW, moments of 8 bits, offloaded moments, weights in bf16, updates in the backward."""

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_optim import RATES
from test_resume import assert_same, break_steps, outcome, stop_after
from tiny import FORK, MODEL, logged, parts, relative_error, settings, start, train
from torch import nn

from minisft import ranks
from minisft.errors import NONFINITE, UserError
from minisft.kernels.quantize import dynamic_table
from minisft.loop import train_step
from minisft.optimizers import OPTIMIZERS, build_optimizer
from minisft.update import ZeroUpdates, gradient_norms

BETAS, EPS = (0.9, 0.98), 1e-8
WIDE = MODEL | {"hidden_size": 64, "intermediate_size": 96}  # its largest matrices have moments of 8 bits


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    settings(folder)
    return folder


@pytest.fixture
def go(home, tmp_path):
    """A function that trains six steps, in the same output folder at every call with the same name."""

    def run(name="out", **options):
        steps = {"train.max_steps": 6, "train.lr_scheduler_type": "constant"}
        keys = {"output_dir": str(tmp_path / name), "data.cache_dir": str(home / "cache"), "model.config": WIDE}
        return train(home, **steps | keys | options)

    return run


# ---- our AdamW, in and out of the memory of the GPU -----------------------------------------------------------------


def test_ours_and_offloaded_is_torchs_to_the_bit_on_a_cpu(go):
    """There they are the same kernel; ours clips on the way."""
    clipped = {"train.max_grad_norm": 0.1, "train.weight_decay": 0.1, "train.max_steps": 3}
    expected = outcome(go("torch", **clipped).output_dir)
    for name, options in (
        ("ours", {"train.optim": "adamw_minisft"}),
        ("offloaded", {"train.offload_optimizer": True}),
    ):
        other = outcome(go(name, **clipped, **options).output_dir)
        assert other["optimizer"] == expected["optimizer"] and other["weights"] == expected["weights"]


def test_offloaded_8_bits_are_the_same_bits(go):
    keys = RUNS["8-bit"] | {"train.max_steps": 3}
    one, other = (
        outcome(go(str(offload), **keys, **{"train.offload_optimizer": offload}).output_dir)
        for offload in (False, True)
    )
    assert one["optimizer"] == other["optimizer"] and one["weights"] == other["weights"]


def nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """What is left of a moment in 8 bits: in blocks of 256, the nearest value of the table times the largest."""
    blocks = x.view(-1, 256)
    largest = blocks.abs().amax(1, keepdim=True)
    codes = ((blocks / largest)[..., None] - table).abs().argmin(-1)
    if table.min() >= 0:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)  # a v that is not zero does not become zero
    return (table[codes] * largest).view(x.shape)


def test_8_bits_equal_the_plain_transcription():
    torch.manual_seed(0)
    w = torch.randn(64, 64)
    p = nn.Parameter(w.clone())
    group = {"params": [p], "peak_lr": 0.01, "weight_decay": 0.1, "matrices": True, "embedding": False}
    optimizer = build_optimizer("adamw_8bit", [group], betas=BETAS, eps=EPS)
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(1, 8):
        p.grad = torch.randn(64, 64)
        g = p.grad
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
        w = w - 0.01 * (m / (1 - BETAS[0] ** t) / ((v / (1 - BETAS[1] ** t)).sqrt() + EPS) + 0.1 * w)
        m, v = nearest(m, dynamic_table(True)), nearest(v, dynamic_table(False))
        optimizer.step()
    # Where rounding in fp32 moves a moment across a midpoint of the table, its codes are neighbours: seldom, one part in 64.
    assert relative_error(p.detach(), w) <= 1e-5


def test_which_moments_have_8_bits(go):
    """Matrices of 4,096 numbers or more, and not the embedding: 2 bytes a number instead of 8."""
    folder = outcome_folder(go(**RUNS["8-bit"], **{"train.max_steps": 1}))
    state, weights = (load_file(folder / f"{name}.safetensors") for name in ("optimizer", "model"))
    coded = {name.removesuffix(".exp_avg_codes") for name in state if name.endswith("exp_avg_codes")}
    assert coded == {f"layers.{i}.mlp.{kind}_proj.weight" for i in (0, 1) for kind in ("gate", "up", "down")} | {
        f"layers.{i}.self_attn.{kind}_proj.weight" for i in (0, 1) for kind in "qo"
    } | {"lm_head.weight"}
    assert weights["model.embed_tokens.weight"].numel() >= 4096
    for name in coded:
        assert state[f"{name}.exp_avg_sq_codes"].dtype == torch.uint8
        moments = [state[f"{name}.{key}_{part}"] for key in ("exp_avg", "exp_avg_sq") for part in ("codes", "absmax")]
        n = moments[0].numel()
        assert sum(x.nbytes for x in moments) == 2 * n + 2 * 4 * -(-n // 256)


def outcome_folder(result) -> Path:
    return result.output_dir / "checkpoints" / f"step-{result.step:08d}"


RUNS = {
    "8-bit": {"train.optim": "adamw_8bit"},
    "offloaded": {"train.optim": "adamw_8bit", "train.offload_optimizer": True},
    "bf16": {"train.weights_dtype": "bf16", "train.precision": "auto"},
    "bf16, accumulated": {
        "train.weights_dtype": "bf16",
        "train.precision": "bf16",
        "train.optim": "adamw_8bit",
        "train.per_device_train_batch_size": 4,
        "train.gradient_accumulation_steps": 2,
    },
    "in backward": {"train.optimizer_in_backward": True, "train.max_grad_norm": None},
    "plateau": {
        "train.lr_scheduler_type": "reduce_on_plateau",
        "train.lr_scheduler_kwargs": {"patience": 0, "threshold": 0.9, "factor": 0.5, "cooldown": 1},
        "train.warmup_steps": 1,
        "data.eval_fraction": 0.1,
        "evaluate.eval_steps": 1,
        "checkpoint.save_steps": 2,
    },
}


# the moments of "offloaded" have 8 bits too, and the weights of "bf16, accumulated" are in bf16
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ("8-bit", "bf16") else name for name in RUNS]
)
def test_a_stopped_run_ends_in_the_same_bytes(go, name, monkeypatch):
    expected = outcome(go("whole", **RUNS[name]).output_dir)
    with monkeypatch.context() as patch:
        stop_after(patch, 3, signal.SIGTERM)
        go(**RUNS[name])
    result = go(**RUNS[name])
    assert_same(outcome(result.output_dir), expected)
    losses = logged(result.output_dir)
    assert losses[-1] < losses[0]


def test_another_optimizer_does_not_take_over_the_state(go, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        go(**{"train.optim": "lion"})
    with pytest.raises(UserError, match="holds the state of lion, but train.optim = 'adamw'"):
        go()


def test_torchs_adamw_and_ours_take_over_from_each_other(go, monkeypatch):
    expected = outcome(go("whole").output_dir)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        go()
    out = go(**{"train.optim": "adamw_minisft"}).output_dir
    assert outcome(out)["weights"] == expected["weights"]


# ---- weights in bf16 ------------------------------------------------------------------------------------------------

BF16 = {"train.weights_dtype": "bf16", "train.precision": "bf16"}


def test_weights_gradients_and_files_are_bf16(go, home):
    run, config = parts(home, **BF16, **{"model.config": WIDE})
    batches = run.train.step(0, 0)
    run.loss(run.model, batches[0], 1.0)[0].backward()
    assert (
        {p.dtype for p in run.model.parameters()} == {p.grad.dtype for p in run.model.parameters()} == {torch.bfloat16}
    )
    assert "weights in bf16, rounded by chance, their gradients in bf16" in "\n".join(run.summary)
    result = go(**BF16, **{"train.max_steps": 1})
    states = load_file(outcome_folder(result) / "optimizer.safetensors")
    assert {x.dtype for x in states.values()} == {torch.float32}
    saved, exported = (
        load_file(folder / "model.safetensors") for folder in (outcome_folder(result), result.output_dir / "model")
    )
    assert {x.dtype for x in saved.values()} == {torch.bfloat16}
    assert all(torch.equal(x, exported[name]) and exported[name].dtype == x.dtype for name, x in saved.items())


@pytest.mark.quick
def test_gradients_of_micro_batches_add_up_in_fp32(home):
    """Each is rounded to bf16 once, as it comes out of its backward pass; their sum is not."""
    options = BF16 | {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4}
    run, _ = parts(home, **options)
    assert "their gradients in fp32" in "\n".join(run.summary)
    batches, parameters = run.train.step(0, 0), list(run.model.parameters())
    sums = [torch.zeros(p.shape) for p in parameters]
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss(run.model, batch, 1.0)[0]
        for total, g in zip(sums, torch.autograd.grad(loss, parameters)):
            total += g.float()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = run.loss(run.model, batch, 1.0)[0]
        loss.backward()
    assert all(p.grad.dtype == torch.float32 and torch.equal(p.grad, total) for p, total in zip(parameters, sums))


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_small_updates_count_on_average_when_rounded_by_chance(name):
    """One of 1e-4 is a fortieth of the distance between 1 and the next weight: to the nearest, it is lost every time."""

    def weights_after(steps: int, seed: int | None) -> torch.Tensor:
        p = nn.Parameter(torch.ones(64, 128, dtype=torch.bfloat16))
        group = {"params": [p], "peak_lr": 1e-4, "weight_decay": 0.0, "matrices": True, "embedding": False}
        optimizer = build_optimizer(name, [group], betas=BETAS, eps=EPS, rounding_seed=seed)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().float()

    assert torch.equal(weights_after(50, None), torch.ones(64, 128))
    by_chance = weights_after(50, 0)
    # 50 steps of 1e-4. A weight is off by about sqrt(50 x 1e-4 x 2^-8) = 4.4e-3, the mean of 8,192 by 4.9e-5.
    assert by_chance.mean().item() == pytest.approx(1 - 50e-4, abs=4 * 4.9e-5)
    assert torch.equal(by_chance, weights_after(50, 0)) and not torch.equal(by_chance, weights_after(50, 1))


def test_zero_updates_are_counted():
    p, q = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 2.0]).bfloat16()), nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1e-4, 1e-1, 0.0, 1e-4]).bfloat16()
    zero_updates = ZeroUpdates({p, q})  # q has no gradient
    assert zero_updates.metrics() == {}
    with zero_updates.counted(), torch.no_grad():
        p -= p.grad
    assert zero_updates.metrics() == {"zero_update_fraction": (2, 3)}  # 1e-4 is lost twice; the zero is no update


def test_the_fraction_of_zero_updates_is_logged(go):
    """Nearly all where the learning rate is too small for bf16, few by chance as many as there is to move."""
    small = {"train.learning_rate": 1e-5, "train.warmup_steps": 1, "log.logging_steps": 3}
    lost = logged(go("a", **BF16, **small, **{"train.stochastic_rounding": False}).output_dir, "zero_update_fraction")
    kept = logged(go("b", **BF16, **small).output_dir, "zero_update_fraction")
    assert len(lost) == len(kept) == 2 and 0.5 < min(lost) and max(kept) < min(lost)
    few = {"train.max_steps": 2}
    assert logged(go("c", **few).output_dir, "zero_update_fraction") == []
    off = go("d", **BF16, **few, **{"log.zero_update_fraction": False})
    assert logged(off.output_dir, "zero_update_fraction") == []
    wide = logged(go("e", **few, **{"log.zero_update_fraction": True}).output_dir, "zero_update_fraction")
    assert len(wide) == 2 and max(wide) < 0.01


def test_zero_updates_are_those_of_the_logged_steps_that_move_the_weights(go):
    """Four steps, logged at 2 and 4. In a warm-up of three the first has a learning rate of 0, where all is zero."""
    name, options = "zero_update_fraction", {"log.zero_update_fraction": True, "train.learning_rate": 1e-5, **BF16}
    options |= {"train.max_steps": 4}
    every = logged(go("every", **options).output_dir, name)
    assert logged(go("second", **options, **{"log.logging_steps": 2}).output_dir, name) == every[1::2]
    assert len(logged(go("warmup", **options, **{"train.warmup_steps": 3}).output_dir, name)) == len(every) - 1


def test_frozen_weights_in_bf16_beside_adapters(go, tmp_path):
    base = go("base", **{"train.max_steps": 1})
    options = {"model.config": None, "model.model_name_or_path": str(base.model_dir), "lora.r": 4, **BF16}
    result = go("adapted", **options, **{"train.optim": "lion", "train.learning_rate": 1e-3, "train.max_steps": 2})
    adapter = load_file(result.model_dir / "adapter_model.safetensors")
    assert {x.dtype for x in adapter.values()} == {torch.float32}


def test_norms_of_gradients_are_in_fp32_and_none_are_none():
    gradients = [torch.full((4096,), 0.01, dtype=torch.bfloat16), torch.ones(4, dtype=torch.float64)]
    norms = [norm for g in gradients for norm in gradient_norms([g])]
    assert [norm.dtype for norm in norms] == [torch.float32, torch.float64]
    assert norms[0].item() == pytest.approx(gradients[0].double().norm().item(), rel=1e-6)  # in bf16 1e-3
    assert norms[1] == 2.0
    assert gradient_norms([]) == []


# ---- updates in the backward pass -----------------------------------------------------------------------------------

IN_BACKWARD = {"train.optimizer_in_backward": True, "train.max_grad_norm": None}


@pytest.mark.parametrize(
    "name, dtype, checkpointing",
    [*((name, "fp32", False) for name in OPTIMIZERS), ("adamw", "bf16", False), ("adamw_8bit", "bf16", True)],
)
def test_updates_in_the_backward_are_the_usual_ones(home, name, dtype, checkpointing):
    options = {
        "model.config": WIDE | {"tie_word_embeddings": True},
        "train.optim": name,
        "train.learning_rate": RATES.get(name, 1e-2),
        "train.lr_scheduler_type": "constant",
        "train.max_grad_norm": None,
        "model.gradient_checkpointing": checkpointing,
        "train.weights_dtype": dtype,
        "train.precision": dtype,
        "train.unfreeze": {"mlp": 1},
        "log.zero_update_fraction": True,
    }
    ends = []
    for in_backward in (False, True):
        run, config = parts(home, **options, **{"train.optimizer_in_backward": in_backward})
        stats = []
        for run.progress.step in range(3):
            stats.append(
                train_step(run, config.train, run.train.step(0, run.progress.step), is_logged=True).stats.means()
            )
            assert not any(p.grad is not None and p.grad.any() for p in run.model.parameters())
        states = [run.optimizer.state[p] for p in run.model.parameters()]
        ends.append(([p.detach() for p in run.model.parameters()], states, stats))
    (weights, states, stats), (weights_too, states_too, stats_too) = ends
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_too))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(states, states_too) for key in a)
    assert stats == stats_too


def peak_after_two_steps(folder: Path, in_backward: bool, connection) -> None:
    """Sends (most memory of this process, size of all gradients), bytes."""
    large = MODEL | {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
    options = {"model.config": large, "train.per_device_train_batch_size": 1, "train.max_grad_norm": None}
    run, config = parts(folder, **options, **{"train.optimizer_in_backward": in_backward})
    for run.progress.step in range(2):
        train_step(run, config.train, run.train.step(0, run.progress.step))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    connection.send((peak, sum(p.nbytes for p in run.model.parameters())))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="ru_maxrss has another unit")
def test_the_gradients_never_stand_in_memory_together(home):
    peaks = {}
    for in_backward in (False, True):
        receiver, sender = FORK.Pipe(duplex=False)
        process = start(peak_after_two_steps, home, in_backward, sender)
        sender.close()
        peaks[in_backward], gradients = receiver.recv()
        process.join()
    # all but the largest, and what the allocator keeps
    assert peaks[False] - peaks[True] >= 0.6 * gradients, (peaks, gradients)


def test_a_gradient_that_is_not_finite_stops_before_anything_is_saved(go, monkeypatch):
    break_steps(monkeypatch, 4)
    with pytest.raises(UserError, match="the run stops without saving them") as caught:
        go(**IN_BACKWARD, **{"checkpoint.save_steps": 2})
    assert caught.value.exit_code == NONFINITE


def test_its_last_checkpoint_is_the_one_before(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        break_steps(patch, 4)
        with pytest.raises(UserError):
            go(**IN_BACKWARD, **{"checkpoint.save_steps": 2})
    assert [path.name for path in (tmp_path / "out" / "checkpoints").glob("step-*")] == ["step-00000002"]
    expected = outcome(go("whole", **IN_BACKWARD).output_dir)
    assert outcome(go(**IN_BACKWARD).output_dir)["weights"] == expected["weights"]


# ---- wrong keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"train.optimizer_in_backward": True}, "max_grad_norm = 1.0 .* too late to clip"),
        (IN_BACKWARD | {"train.gradient_accumulation_steps": 2}, "an update for every micro-batch"),
        (IN_BACKWARD | {"train.on_nonfinite": "skip"}, "cannot be left out"),
        (IN_BACKWARD | {"train.precision": "fp16"}, "steps that overflow"),
        ({"train.offload_optimizer": True, "train.optim": "lion"}, "lion has no offloaded form"),
        ({"train.weights_dtype": "bf16"}, "multiplied in bf16"),
        (BF16 | {"train.optim": "muon"}, "muon would keep its state in bf16"),
        ({"train.lr_scheduler_type": "reduce_on_plateau"}, "nothing to evaluate"),
        (RUNS["plateau"] | {"train.lr_scheduler_kwargs": {"factor": 2}}, "factor is between 0 and 1"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        parts(tmp_path, **overrides)


def test_updates_in_the_backward_are_of_one_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(UserError, match="optimizer_in_backward on 2 ranks"):
        parts(tmp_path, **IN_BACKWARD)


def test_paged_optimizers_are_told_where_their_moments_are(home, capsys):
    run, config = parts(home, **{"train.optim": "paged_adamw_8bit"})
    assert config.train.optim == "adamw_8bit" and "train.offload_optimizer = true" in capsys.readouterr().err


# ---- the learning rate that waits for the loss ----------------------------------------------------------------------


def test_the_learning_rate_falls_with_the_plateau(go, tmp_path):
    go(**RUNS["plateau"])
    rates, losses = (logged(tmp_path / "out", name) for name in ("learning_rate", "eval_loss"))
    state = json.loads((tmp_path / "out" / "checkpoints" / "step-00000006" / "trainer_state.json").read_text())
    # Step 1 warms up; the first evaluation is the best, no later one is ten times better; every other one cools down.
    assert [rate / 1e-2 for rate in rates] == pytest.approx([0, 1, 0.5, 0.5, 0.25, 0.25])
    assert state["plateau"] == {"best": losses[0], "num_bad": 0, "cooling": 1, "factor": 0.125}


def test_a_run_that_is_prolonged_takes_the_same_learning_rates(go):
    """The evaluation at the end of the shorter run is one that the longer run does not have."""
    options = RUNS["plateau"] | {"evaluate.eval_steps": 2}
    expected = outcome(go("whole", **options).output_dir)
    go(**options, **{"train.max_steps": 3})
    assert outcome(go(**options).output_dir)["weights"] == expected["weights"]
