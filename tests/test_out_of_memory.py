"""Running out of memory: found before the first step, told in one error, or answered by smaller micro-batches.

Memory that runs out is simulated: `Memory` raises torch's error at the end of the backward pass, when most gradients are added
to already, of micro-batches with more than so many tokens. One test takes the memory away from a process.
"""

import json
import os
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_dpo_run import DPO, write_pairs
from test_loader import make_documents
from test_micro_batch import with_graphs
from test_ranks import join, same_weights, start_ranks
from test_resume import stop_after
from tiny import logged, parts, relative_error, settings, start, train, train_quietly, weights

from minisft import loop, out_of_memory
from minisft.data.loader import Loader
from minisft.data.packing import plan
from minisft.errors import MEMORY, STOPPED, UserError, is_out_of_memory
from minisft.loop import train_step
from minisft.optimizers import OPTIMIZERS
from minisft.out_of_memory import OutOfMemory, halve, trial_step

SPLIT = {"train.on_oom": "split", "train.memory_check": False}
# Momentum without a square root: Adam turns the last bit of a gradient near zero into another update.
SGD = {"train.optim": "sgd", "train.learning_rate": 0.1, "train.lr_scheduler_type": "constant", "train.max_steps": 10}


class Memory:
    """Enough for `most` tokens, filler included, from its start at optimizer step `from_step` on (the first is 1)."""

    def __init__(self, most: int, from_step: int = 1):
        self.most, self.from_step, self.refused = most, from_step, []

    def limit(self, run):
        def raises(grad):
            self.refused.append(len(grad))
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of ..."
            )

        def watch(module, arguments, output):
            if output.requires_grad and len(output) > self.most and run.progress.step + 1 >= self.from_step:
                output.register_hook(raises)

        run.model.embed_tokens.register_forward_hook(watch)
        return run


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Rows of 6 to 40 tokens, pairs, and rows of which the 13th is longest."""
    folder = tmp_path_factory.mktemp("memory")
    settings(folder)
    write_pairs(folder / "pairs.jsonl")
    rows = (folder / "rows.jsonl").read_text().splitlines()[:24]
    rows[12] = json.dumps({"prompt": "a", "completion": "b" * 58 + "."})
    (folder / "late.jsonl").write_text("\n".join(rows) + "\n")
    return folder


LATE = {"data.shuffle": False, "train.per_device_train_batch_size": 2, "train.num_train_epochs": 1}


@pytest.fixture
def go(home, tmp_path, monkeypatch):
    """A function that trains in the folder of that name, with so much memory."""

    def go(name="out", memory: Memory | None = None, **overrides):
        with monkeypatch.context() as patch:
            if memory is not None:
                honest = loop.prepare
                patch.setattr(loop, "prepare", lambda *arguments: memory.limit(honest(*arguments)))
            return train(home, output_dir=str(tmp_path / name), **{"data.cache_dir": str(home / "cache")} | overrides)

    return go


# ---- smaller micro-batches --------------------------------------------------------------------------------------

KINDS = {
    "rows": {"train.per_device_train_batch_size": 5, "train.gradient_accumulation_steps": 2},
    "packs of pairs": {
        **DPO,
        "data.packing": True,
        "model.gradient_checkpointing": "selective",
        "data.train_data": "pairs.jsonl",
        "train.learning_rate": 0.1,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_run_is_the_same_run(go, home, kind):
    keys = SGD | KINDS[kind] | SPLIT
    if "data.train_data" in keys:
        keys["data.train_data"] = str(home / keys["data.train_data"])
    whole, memory = go("whole", **keys).output_dir, Memory(128 if "data.packing" in keys else 64)
    split = go("split", memory, **keys).output_dir
    assert memory.refused  # and less often than there are steps, as what is found once is kept
    assert len(memory.refused) <= 3
    for name in ("loss", "grad_norm", "num_tokens"):
        # fp32 sums in another order; after some steps the difference of the weights is in the loss too
        assert logged(split, name) == pytest.approx(logged(whole, name), rel=2e-6), name
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (split, whole))
    assert max(relative_error(one[name], other[name]) for name in one) <= 1e-6
    assert logged(split, "micro_batch_size")[-1] < keys.get("train.per_device_train_batch_size", 8)
    assert logged(whole, "micro_batch_size") == []


def test_what_was_added_before_the_failure_is_not_counted_twice(home):
    """The gradients of one step, exactly those of the smaller micro-batches."""
    (small, config), (run, _) = (parts(home, **SGD, **SPLIT) for _ in range(2))
    small.train.micro_batch_size = 4
    train_step(small, config.train, small.train.step(0, 0))
    memory = Memory(128)
    memory.limit(run)
    first = train_step(run, config.train, run.train.step(0, 0))
    assert memory.refused and first.ran_out.batch.num_tokens > 128 and not first.updated
    assert all(p.grad is None for p in run.model.parameters())
    assert halve(run, config.train, first.ran_out) and run.train.micro_batch_size == 4
    assert train_step(run, config.train, run.train.step(0, 0)).updated
    for p, other in zip(run.model.parameters(), small.model.parameters()):
        assert torch.equal(p, other)


def test_a_resumed_run_keeps_its_smaller_micro_batches(go, monkeypatch, capsys):
    keys = SGD | SPLIT
    go("whole", Memory(128, from_step=3), **keys)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        stopped = go("out", Memory(128, from_step=3), **keys)
    assert stopped.exit_code == STOPPED
    assert capsys.readouterr().err.count("out of memory") == 2  # once in each of them
    memory = Memory(128)
    out = go("out", memory, **keys).output_dir
    assert memory.refused == [] and "micro-batches of 4 documents" in (out / "summary.txt").read_text()
    assert (out / "metrics.jsonl").read_bytes() == (out.parent / "whole" / "metrics.jsonl").read_bytes()
    assert weights(out) == weights(out.parent / "whole")
    # the user can go back to what the configuration says
    state = json.loads((out / "checkpoints" / "step-00000010" / "trainer_state.json").read_text())
    assert state["micro_batch_size"] == 4
    again = go("out", **keys | {"train.max_steps": 11, "train.on_oom": "stop"})
    assert len(logged(again.output_dir, "micro_batch_size")) == 8


def test_the_warning_says_what_is_done(go, capsys):
    go(memory=Memory(128, from_step=2), **SGD | SPLIT | {"train.max_steps": 2})
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert "WARNING step 2: out of memory (asked for 2.50 GiB more) in a micro-batch of " in lines[0]
    assert "micro-batches of 4 documents instead of 8 for the rest of the run" in lines[0]


def test_one_row_that_does_not_fit_is_the_error(go):
    with pytest.raises(UserError, match="step 1: out of memory .* in a micro-batch of .* Its rows: .*jsonl:") as caught:
        go(memory=Memory(32), **SPLIT)
    assert caught.value.exit_code == MEMORY and "per_device_train_batch_size" not in caught.value.hint


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_smaller_micro_batches_divide_those_of_each_rank(packing, world_size):
    documents = make_documents()
    made = plan(documents.lengths, 24, "bfd" if packing else "none")
    for rank in range(world_size):
        loader = Loader(documents, made, 5, 2, rank=rank, world_size=world_size, round_to=8)
        for size in (3, 2, 1):
            smaller = replace(loader)
            smaller.micro_batch_size = size
            for step in range(loader.steps_per_epoch):
                whole, split = loader.step(0, step), smaller.step(0, step)
                tokens, others = (
                    torch.cat([batch.input_ids[: batch.num_tokens] for batch in batches]) for batches in (whole, split)
                )
                assert torch.equal(tokens, others)
                assert sum(batch.num_targets for batch in split) == sum(batch.num_targets for batch in whole)
                assert len(split) >= len(whole)
    # all ranks have the same number of micro-batches
    sizes = []
    for rank in range(world_size):
        loader = Loader(documents, made, 5, 2, rank=rank, world_size=world_size)
        loader.micro_batch_size = 2
        sizes.append([len(loader.step(0, step)) for step in range(loader.steps_per_epoch)])
    assert all(other == sizes[0] for other in sizes)


def test_a_loader_that_is_ahead_makes_smaller_ones_from_the_next_step_on():
    documents = make_documents()
    loader = Loader(documents, plan(documents.lengths, 24, "none"), batch_size=4)
    made, honest = [], loader.step
    loader.step = lambda epoch, s: made.append(s) or honest(epoch, s)
    steps = loader.steps(0, 4, ahead=True)
    assert len(next(steps)) == 1
    while made != [0, 1]:  # the second one is there in its old size
        time.sleep(0.001)
    loader.micro_batch_size = 2
    assert [len(batches) for batches in steps] == [2, 2, 2]


def test_graphs_of_larger_micro_batches_are_forgotten(home):
    options = SPLIT | {"train.precision": "bf16", "train.per_device_train_batch_size": 4, "data.packing": True}
    run, config = parts(home, **options)
    run, _ = with_graphs(run)
    for step in range(4):
        train_step(run, config.train, run.train.step(0, step))
        run.progress.step += 1
    assert run.graphs.graphs
    large = set(run.graphs.graphs)
    assert halve(run, config.train, OutOfMemory(message="..."))
    assert not run.graphs.graphs
    for step in range(3):
        train_step(run, config.train, run.train.step(0, step))
    assert run.graphs.graphs and not large & set(run.graphs.graphs)


def test_weights_in_bf16_then_add_up_their_gradients_in_fp32(home):
    run, config = parts(home, **SPLIT, **{"train.precision": "bf16", "train.weights_dtype": "bf16"})
    train_step(run, config.train, run.train.step(0, 0))
    assert {p.grad.dtype for p in run.model.parameters()} == {torch.bfloat16}
    assert halve(run, config.train, OutOfMemory(message="..."))
    train_step(run, config.train, run.train.step(0, 1))
    assert {p.grad.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "keys",
    [
        {"train.loss_normalization": "micro_batch"},
        {"train.optimizer_in_backward": True, "train.max_grad_norm": None},
        {"trainer_type": "dpo", "dpo.loss_type": ["sigmoid", "sft"]},
        {"trainer_type": "dpo", "dpo.loss_type": ["kto"]},
    ],
)
def test_what_would_be_another_step_is_refused(home, keys):
    with pytest.raises(UserError, match="on_oom"):
        parts(home, **SPLIT, **keys)


def test_a_reference_that_fails_leaves_the_policy_training(home):
    """Else the step that is taken again would have no dropout."""
    run, _ = parts(home, **DPO, **{"data.train_data": str(home / "pairs.jsonl")})
    (batch,) = run.train.step(0, 0)

    def fails(module, arguments):
        raise MemoryError

    run.model.register_forward_pre_hook(fails)
    with OutOfMemory() as ran_out:
        run.reference.logps(run.model, batch)
    assert ran_out.message and run.model.training


# ---- stopping ---------------------------------------------------------------------------------------------------


def test_a_late_row_stops_the_run_after_a_save_of_the_step_before(go, home):
    keys = LATE | {"data.train_data": str(home / "late.jsonl"), "train.memory_check": False}
    constant = {"train.lr_scheduler_type": "constant"}
    good = go("good", **keys | constant | {"train.max_steps": 6}).output_dir
    with pytest.raises(UserError) as caught:
        go(memory=Memory(64), **keys | constant)
    error = caught.value
    assert error.exit_code == MEMORY
    for part in ("step 7: out of memory (asked for 2.50 GiB more)", "tokens with", "GiB were in use", "late.jsonl:13"):
        assert part in error.message
    for part in (
        "per_device_train_batch_size = 1 with gradient_accumulation_steps = 2",
        '"split"',
        "max_length",
        "lora.r",
    ):
        assert part in error.hint
    (saved,) = (good.parent / "out" / "checkpoints").iterdir()
    assert saved.name == "step-00000006"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (saved / name).read_bytes() == (good / "checkpoints" / saved.name / name).read_bytes()


def test_an_evaluation_stops_the_run_after_a_save(go, tmp_path, monkeypatch):
    def evaluate(*arguments):
        raise MemoryError

    monkeypatch.setattr(loop, "evaluate", evaluate)
    with pytest.raises(UserError, match="evaluation after step 3: out of memory in a batch of it") as caught:
        go(**{"data.eval_fraction": 0.2, "evaluate.eval_steps": 3})
    assert caught.value.exit_code == MEMORY and "per_device_eval_batch_size = 4" in caught.value.hint
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000003"]


def test_updates_in_the_backward_pass_are_not_saved_half_done(go, tmp_path):
    keys = {"train.optimizer_in_backward": True, "train.max_grad_norm": None, "train.memory_check": False}
    with pytest.raises(UserError, match="step 3: .* without saving them") as caught:
        go(memory=Memory(64, from_step=3), **keys)
    assert caught.value.exit_code == MEMORY
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_the_step_of_an_optimizer_too(home):
    """In the trial, where the state is made: smaller micro-batches would not help."""
    run, config = parts(home, **{"train.on_oom": "split", "train.memory_check": True})

    def step():
        raise MemoryError

    run.optimizer.step = step
    with pytest.raises(UserError, match="before step 1, .* out of memory in the optimizer's step") as caught:
        out_of_memory.try_largest(config, run)
    assert 'optim = "adamw_8bit"' in caught.value.hint and run.train.micro_batch_size is None


@pytest.mark.parametrize(
    "error, is_memory",
    [
        (MemoryError(), True),
        (np.exceptions.AxisError("x"), False),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you ..."),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (UserError("out of memory"), False),
    ],
)
def test_which_errors_are_about_memory(error, is_memory):
    assert is_out_of_memory(error) == is_memory
    with nullcontext() if is_memory else pytest.raises(type(error)), OutOfMemory() as ran_out:
        raise error
    if is_memory:
        assert ran_out.message.startswith(type(error).__name__)


# ---- the trial --------------------------------------------------------------------------------------------------


def brute_force(loader: Loader, first: int, last: int, key: str) -> int:
    return max(
        getattr(batch, key)
        for rank in range(loader.world_size)
        for step in range(first, last)
        for batch in replace(loader, rank=rank).step(*divmod(step, loader.steps_per_epoch))
    )


@pytest.mark.parametrize("kind", ["rows", "packs", "pairs", "shared prompts", "split"])
def test_the_largest_micro_batch_of_the_steps_to_come(home, kind):
    keys = {"train.per_device_train_batch_size": 3, "train.gradient_accumulation_steps": 2}
    if kind in ("packs", "split"):
        keys |= {"data.packing": True, "data.packing_strategy": "bfd_split" if kind == "split" else "bfd"}
    if kind in ("pairs", "shared prompts"):
        keys |= {"trainer_type": "dpo", "data.train_data": str(home / "pairs.jsonl")}
        keys |= {"dpo.share_prompt": kind == "shared prompts"}
    run, _ = parts(home, **keys)
    loader = replace(run.train, world_size=2)
    n = loader.steps_per_epoch
    for first, last in ((0, 2 * n), (1, n), (n - 1, n + 1), (n + 1, n + 2)):
        found = loader.largest(first, last)
        for key in ("num_tokens", "num_targets"):
            assert max(getattr(micro_batch, key) for micro_batch in found) == brute_force(loader, first, last, key)
        for micro_batch in found:
            assert first <= micro_batch.step < last
            batch = loader.make(micro_batch)
            assert (batch.num_tokens, batch.num_targets) == (micro_batch.num_tokens, micro_batch.num_targets)


def state_of(run) -> list:
    """All that a trial must leave as it was."""
    model = [(name, p.detach().numpy().tobytes(), p.grad, p.requires_grad) for name, p in run.model.named_parameters()]
    names = {p: name for name, p in run.model.named_parameters()}
    state = {
        f"{names[p]}.{key}": value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
        for p, values in run.optimizer.state.items()
        for key, value in values.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
    return [model, state, groups, torch.get_rng_state().numpy().tobytes(), run.model.training]


VARIANTS = {
    **{name: {"train.optim": name} for name in OPTIMIZERS},
    "offloaded": {"train.offload_optimizer": True},
    "in backward": {"train.optimizer_in_backward": True, "train.max_grad_norm": None},
    "8 bits in backward": {
        "train.optimizer_in_backward": True,
        "train.max_grad_norm": None,
        "train.optim": "adamw_8bit",
    },
    "unfreeze": {"train.unfreeze": {"embed": 2}},
    "bf16": {"train.weights_dtype": "bf16", "train.precision": "bf16"},
    "lora": {"lora.r": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_trial_leaves_no_trace(home, name):
    """Neither before the first step nor beside the moments of a checkpoint; signs of zeros included."""
    keys = {"train.weight_decay": 0.1, "train.neftune_noise_alpha": 5.0} | VARIANTS[name]
    if name == "schedule_free_adamw":
        keys["train.lr_scheduler_type"] = "constant"
    if name == "lora":
        keys |= {"model.config": None, "model.model_name_or_path": str(model_folder(home))}
    run, config = parts(home, **keys)
    with torch.no_grad():
        for p in run.model.parameters():
            p.view(-1)[::3] = -0.0
    batches = run.train.step(0, 0)
    for step in range(2):
        for p in run.model.parameters():
            p.grad = None
        before = state_of(run) if name != "bf16" else None
        versions = [p.detach().clone() for p in run.model.parameters()]
        ran_out = trial_step(run, config.train, batches)
        assert ran_out.message == "" and ran_out.batch is batches[-1]
        if before:
            assert state_of(run) == before
        assert all(torch.equal(p, other) for p, other in zip(run.model.parameters(), versions))
        train_step(run, config.train, run.train.step(0, step))
        run.progress.step += 1


def model_folder(home: Path) -> Path:
    if not (home / "trained").exists():
        train(home, output_dir=str(home / "trained"), **{"train.max_steps": 1})
    return home / "trained" / "model"


def test_a_run_with_the_trial_leaves_the_same_bytes(go):
    """With dropout of its own, and after a resume."""
    files = {}
    for check in (True, False):
        keys = {"train.memory_check": check, "train.neftune_noise_alpha": 5.0, "checkpoint.save_total_limit": 9}
        for steps in (2, 4):
            out = go(str(check), **keys, **{"train.lr_scheduler_type": "constant", "train.max_steps": steps}).output_dir
            assert ("memory     tried" in (out / "summary.txt").read_text()) == check
        names = ("model.safetensors", "optimizer.safetensors")
        files[check] = [
            (path / name).read_bytes() for path in sorted((out / "checkpoints").iterdir()) for name in names
        ]
        files[check].append((out / "metrics.jsonl").read_bytes())
    assert files[True] == files[False]


@pytest.mark.parametrize("policy", ["stop", "split"])
def test_the_trial_finds_a_late_row_before_the_first_step(go, home, policy, capsys):
    keys = LATE | {"data.train_data": str(home / "late.jsonl"), "train.on_oom": policy}
    if policy == "stop":
        with pytest.raises(UserError, match="before step 1, trying the largest micro-batch: .*late.jsonl:13") as caught:
            go(memory=Memory(64), **keys)
        assert caught.value.exit_code == MEMORY
    else:
        out = go(memory=Memory(64), **keys).output_dir
        assert set(logged(out, "micro_batch_size")) == {1}
        assert "WARNING step 1: out of memory" in capsys.readouterr().err


def test_a_cpu_tries_what_is_clearly_larger_than_the_first_step(home):
    for rows, tried in (("late.jsonl", True), ("rows.jsonl", False)):
        keys = LATE | {"data.train_data": str(home / rows), "train.max_steps": 7}
        keys["train.per_device_train_batch_size"] = 2 if tried else 8
        run, config = parts(home, **keys)
        out_of_memory.try_largest(config, run)
        assert any(line.startswith("memory ") for line in run.summary) == tried


def test_the_trial_has_the_state_and_the_gradients_of_a_later_step(home):
    """In its forward passes the state of the optimizer is there, for parameters that train later too; with accumulation the
    gradients are too."""
    run, config = parts(home, **{"train.unfreeze": {"embed": 2}, "train.gradient_accumulation_steps": 2})
    seen = []

    def look(module, arguments):
        seen.append((len(run.optimizer.state), sum(p.grad is not None for p in run.model.parameters())))

    run.model.register_forward_pre_hook(look)
    trial_step(run, config.train, run.train.step(0, 0))
    assert seen == [(len(list(run.model.parameters())),) * 2] * 2


# ---- ranks, and a process without memory ------------------------------------------------------------------------


def with_little_memory(run):
    """The same run, whose loss has enough memory for 64 tokens."""

    def loss(model, batch, *arguments):
        if batch.num_tokens > 64:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run.loss(model, batch, *arguments)

    return replace(run, loss=loss)


@pytest.mark.parametrize("policy", ["split", pytest.param("stop", marks=pytest.mark.slow)])
def test_all_ranks_stop_or_go_on_together(home, tmp_path, policy):
    out = tmp_path / "out"
    keys = SGD | {"output_dir": str(out), "train.max_steps": 3, "train.per_device_train_batch_size": 4}
    keys |= {"train.on_oom": policy, "train.memory_check": False}
    codes = join(start_ranks(home, keys, broken_step=2, spoil=with_little_memory))
    said = [(out / f"said-{rank}").read_text() for rank in (0, 1)]
    if policy == "stop":
        assert codes == (MEMORY, MEMORY)
        assert (
            "step 2: another rank ran out of memory" in said[0] and "step 2: out of memory in a micro-batch" in said[1]
        )
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
        return
    assert codes == (0, 0)
    assert same_weights(out) and set(logged(out, "micro_batch_size")[1:]) <= {1, 2}
    assert "another rank ran out of memory; micro-batches of 2 documents" in said[0]
    keys |= {"output_dir": str(tmp_path / "whole")}
    train(home, **keys | {"train.per_device_train_batch_size": 8})
    assert logged(out) == pytest.approx(logged(tmp_path / "whole"), rel=2e-6)


def train_in(megabytes: int, folder: Path, overrides: dict, output: str) -> None:
    """Train in a process that may have so much more memory than it has at the start of the loop."""
    honest = loop.prepare

    def prepare(*arguments):
        run = honest(*arguments)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20,) * 2)
        return run

    loop.prepare = prepare
    os.environ["MALLOC_ARENA_MAX"] = "8"  # the user's heap, so that no addresses are reserved for it
    train_quietly(folder, overrides, output)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of the address space")
def test_a_process_without_memory_ends_with_one_error(home, tmp_path):
    """Real memory: a row of 20,000 tokens after some short ones, which then need 10 MB for each layer's activations."""
    rows = (home / "rows.jsonl").read_text().splitlines()[:8]
    rows.append(json.dumps({"prompt": "a", "completion": "b" * 20_000}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    keys = {"data.train_data": str(tmp_path / "rows.jsonl"), "data.max_length": None, "data.shuffle": False}
    keys |= {"train.per_device_train_batch_size": 1, "train.memory_check": False, "output_dir": str(tmp_path / "out")}
    process = start(train_in, 40, home, keys, str(tmp_path / "said"))
    process.join(60)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == MEMORY, said
    assert "step 9: out of memory" in said and "rows.jsonl:9" in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000008"]
