"""The equalities of the engine, each as a function that measures it on a user's model, data and machine.

A check returns how far two ways of computing the same are apart, and the bar: the most that rounding may make of it. There are
three kinds of bar, each with its reason:

    0        the same numbers in the same order: every bit must agree
    FP32     the same sums in another order, in fp32. Checks of the mathematics run in fp32 whatever the run's precision, because
             bf16's rounding (2^-9) hides an error of one token in a hundred
    2 x      a kernel in the run's precision may lose twice what the naive formula loses in that precision, both against fp32
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minisft import loop, runtime
from minisft.checkpoint import step_folder
from minisft.data.loader import Loader, make_batch
from minisft.errors import UserError
from minisft.kernels.common import use_backend
from minisft.memory import memory_bytes
from minisft.model.model_config import longest_tree
from minisft.prepare.run import Run
from minisft.resume import resume
from minisft.saver import Saver
from minisft.selfcheck import naive
from minisft.selfcheck.bench import FP32, Bench, Outcome, Skipped, split_matters
from minisft.selfcheck.files import adapter_merged, adapter_off, by_transformers, exported
from minisft.selfcheck.measure import (
    Step,
    compare_tensors,
    difference,
    engine_step,
    first_documents,
    in_fp32,
    largest,
    one_by_one,
    packed,
    take_gradients,
)

FLOOR = {
    "fp32": FP32,
    "bf16": 1e-4,
    "fp16": 2e-5,
}  # fp32: the truth is fp32 itself; else where the naive formula happens to lose nothing
STEPS = 4  # of the run that is resumed in its middle


def sharing(run: Run) -> dict:
    """By which options of plan_set the run's packs share beginnings."""
    shares_turns, shares_prompt = run.train.documents.turns is not None, run.train.documents.shared is not None
    return {"share_prompt": shares_prompt, "longest_tree": longest_tree(run.model.config) if shares_turns else 0}


# ---- a step -------------------------------------------------------------------------------------------------------


def definition(bench: Bench) -> Outcome:
    """The engine's step is the definition: documents one at a time, all logits, torch's functions (selfcheck/naive.py)."""
    alone, run = bench.alone(), bench.prepared()
    with in_fp32(run) as run:
        run = replace(run, train=bench.rows(run))
        loss = naive.add_gradients(bench.config, run, 0)
        return outcome(alone, take_gradients(run, loss), FP32)


def outcome(a: Step, b: Step, bar: float) -> Outcome:
    error, where = difference(a, b)
    return Outcome(error, bar, where)


def packing(bench: Bench) -> Outcome:
    """Documents side by side, sharing beginnings as the run's do, have the step of documents one by one."""
    if bench.config.data.packing and bench.config.data.packing_strategy == "wrapped":
        raise Skipped("wrapped packs cut documents anywhere: another objective, on purpose")
    alone = bench.alone()
    with in_fp32(bench.prepared()) as run:
        loader = packed(run.train, bench.documents(), sharing(run))
        documents = loader.documents
        total, once = int(documents.lengths.sum()), int(documents.unit_lengths.sum())
        if loader.plan.num_packs == documents.num_units and total == once:
            raise Skipped("there is one document only")
        found = outcome(engine_step(run, bench.config.train, loader), alone, FP32)
    shares = documents.turns is not None or documents.shared is not None
    return replace(found, where=f"{found.where}; {total - once:,} of {total:,} tokens shared") if shares else found


def accumulation(bench: Bench) -> Outcome:
    """However a step is split into micro-batches, it is the same step."""
    if reason := split_matters(bench.config):
        raise Skipped(reason)
    alone, worst = bench.alone(), Outcome(0.0, FP32)
    with in_fp32(bench.prepared()) as run:
        for size in (2, 3, bench.num_rows):
            found = outcome(
                engine_step(run, bench.config.train, one_by_one(run.train, bench.documents(), size)), alone, FP32
            )
            worst = found if not found.error <= worst.error else worst
    return worst


def kernels(bench: Bench) -> Outcome:
    """The step by the run's backends and precision is as near to the reference formulas in fp32 as these formulas are in the
    run's precision."""
    run, train = bench.prepared(), bench.config.train
    loader = packed(run.train, bench.documents(), sharing(run))
    with use_backend("reference"):
        with in_fp32(run) as exact:
            truth = engine_step(exact, train, loader)
        plain = engine_step(run, train, loader)
    fast = engine_step(run, train, loader)
    worst = 0.0, Outcome(0.0, 0.0)
    for name in ["loss", *truth.grads]:
        errors = [error_of(name, step, truth) for step in (fast, plain)]
        found = Outcome(errors[0], 2 * errors[1] + FLOOR[run.precision], name)
        share = found.error / found.bar if found.error == found.error else float("inf")
        worst = (share, found) if share >= worst[0] else worst
    return worst[1]


def error_of(name: str, step: Step, truth: Step) -> float:
    """The relative error of one part of a step."""

    def only(one: Step) -> Step:
        return Step(one.loss, {}) if name == "loss" else Step(0.0, {name: one.grads[name]} if name in one.grads else {})

    return difference(only(step), only(truth))[0]


def checkpointing(bench: Bench) -> Outcome:
    """Blocks that run again in the backward give the gradients of blocks whose activations were kept."""
    run = bench.prepared()
    model, loader = run.model, one_by_one(run.train, bench.documents(), 2)
    was, training = (model.gradient_checkpointing, model.gradient_checkpointing_every), model.training
    selective = bench.config.model.gradient_checkpointing == "selective"

    def step(whole: bool, cheap: bool) -> Step:
        model.gradient_checkpointing, model.gradient_checkpointing_every = whole, 1
        model.recompute_cheap_ops(cheap)
        return engine_step(run, bench.config.train, loader)

    try:
        model.train()
        kept = step(False, False)
        found = [outcome(step(True, False), kept, 0.0), outcome(step(False, True), kept, 0.0)]
    finally:
        model.gradient_checkpointing, model.gradient_checkpointing_every = was
        model.recompute_cheap_ops(selective)
        model.train(training)
    return max(found, key=lambda one: one.error)


def isolation(bench: Bench) -> Outcome:
    """Other tokens in one document change no bit of the hidden states of another in its pack. Where documents share a beginning,
    the same of the tokens after it."""
    run = bench.prepared()
    loader = packed(run.train, bench.documents(), sharing(run))
    packs = loader.packs(0)
    batch = make_batch(loader.documents, packs, range(len(packs)), round_to=loader.round_to)
    bounds, position = batch.cu_seqlens.tolist(), batch.position_ids.tolist()
    documents = [(a, b) for a, b in zip(bounds[:-1], bounds[1:]) if b <= batch.num_tokens]
    # a document that begins at i, behind a beginning that it shares, does not have the tokens from its position on before it
    begins = [i for i in range(1, batch.num_tokens) if 0 < position[i] <= position[i - 1]]
    branches = [(i - 1 - position[i - 1 :: -1].index(position[i]), i) for i in begins]
    if len(documents) + len(branches) < 2:
        raise Skipped("there is one document only")
    training = run.model.training
    run.model.eval()

    def hidden(ids: Tensor) -> Tensor:
        work = replace(batch, input_ids=ids).to(run.device)
        with torch.no_grad(), runtime.autocast(run.device, run.precision):
            return run.model(work.input_ids, work.position_ids, work.start, work.end, shared=work.shared)

    before, errors = hidden(batch.input_ids), {}
    for a, b in {some[i] for some in (documents, branches) if some for i in (0, len(some) // 2, -1)}:
        ids = batch.input_ids.clone()
        ids[a:b] = (ids[a:b] + 1) % run.model.config.vocab_size
        change = (hidden(ids) - before).abs().float()
        if not change[a:b].any():
            raise UserError(f"other tokens in tokens {a} to {b} of a pack change nothing there")
        change[a:b] = 0
        errors[f"tokens {a} to {b} of the pack reach others"] = change[: batch.num_tokens].max().item()
    run.model.train(training)
    error, where = largest(errors)
    return Outcome(error, 0.0, where if error else "hidden states")


# ---- ranks --------------------------------------------------------------------------------------------------------


def several_ranks(bench: Bench) -> Outcome:
    """Processes that share a step, and the weights and documents as the run's ranks do, have the gradients of one. On the CPU
    where there are too few GPUs."""
    if reason := split_matters(bench.config):
        raise Skipped(reason)
    strategy, splits = bench.config.parallel.strategy, bench.config.parallel.context_parallel > 1
    number = 4 if strategy == "hsdp" else 2  # two groups of two, or one
    on_gpus = torch.cuda.device_count() >= number and bench.config.train.device != "cpu"
    if not on_gpus and bench.prepared().device.type == "cuda" and not fits_in_memory(bench.prepared()):
        raise Skipped(f"{torch.cuda.device_count()} of {number} GPUs, and too little memory to try it on the CPU")
    steps = [ranks_step(bench, count, "auto" if on_gpus else "cpu") for count in (1, number)]
    found = outcome(steps[1], steps[0], FP32)
    how = f"{number} ranks{f' by {strategy}' if strategy in ('fsdp2', 'hsdp') else ''}{', split documents' if splits else ''}"
    return replace(found, where=f"{found.where}; {how}")


def fits_in_memory(run: Run) -> bool:
    """Whether two models in fp32, with gradients, fit into half of the machine's memory."""
    return 2 * 8 * sum(p.numel() for p in run.model.parameters()) < memory_bytes() / 2


def ranks_step(bench: Bench, count: int, device: str) -> Step:
    """The step of so many processes, each of which runs selfcheck/rank.py."""
    out, port = bench.folder / f"{count}-ranks.safetensors", free_port()
    own = (str(out), str(bench.num_rows), device)
    command = [sys.executable, "-m", "minisft.selfcheck.rank", *own, *bench.words]
    log = bench.folder / f"{count}-ranks.txt"
    with log.open("wb") as output:
        group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group |= {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=output,
                stderr=output,
            )
            for rank in range(count)
        ]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        told = log.read_text(errors="replace").strip().splitlines()[-4:]
        raise UserError(f"a process of {count} ended with exit code {max(codes, key=abs)}: " + " | ".join(told))
    with safe_open(out, framework="pt") as file:
        loss = float.fromhex(file.metadata()["loss"])
        return Step(loss, {name: file.get_tensor(name) for name in file.keys()})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- resume -------------------------------------------------------------------------------------------------------


def resumed(bench: Bench) -> Outcome:
    """Steps that are stopped, saved, loaded and continued leave the bytes of steps in one go: weights, moments, state."""
    config, half = bench.config, STEPS // 2
    folders = {name: bench.folder / name for name in ("whole", "resumed")}

    def begin(resume_from: str) -> Run:
        bench.forget()
        run = bench.prepared()
        loader = small_steps(run.train, bench)
        run = replace(run, train=loader, save_steps=None)
        if resume_from != "never":
            checkpoint = replace(config.checkpoint, resume=resume_from)
            resume(replace(config, checkpoint=checkpoint), run, folders["whole"] / "checkpoints")
        return run

    def go_on(run: Run, last: int, folder: Path) -> None:
        while run.progress.step < last:
            loop.train_step(run, config.train, run.train.step(0, run.progress.step))
            run.progress.step += 1
            if run.reference is not None:
                run.reference.follow(run.progress.step)
        with Saver(folder / "checkpoints", keep=STEPS) as saver:
            loop.save(config, run, saver, None, is_last=True)

    run = begin("never")
    go_on(run, half, folders["whole"])
    go_on(run, STEPS, folders["whole"])
    del run
    run = begin(str(step_folder(folders["whole"] / "checkpoints", half)))
    go_on(run, STEPS, folders["resumed"])
    a, b = (step_folder(folder / "checkpoints", STEPS) for folder in folders.values())
    for name in sorted(path.name for path in a.glob("*.safetensors")):
        _, told = compare_tensors(a / name, b / name)
        if told:
            return Outcome(1.0, 0.0, f"{name}: {told}")
    if (a / "trainer_state.json").read_bytes() != (b / "trainer_state.json").read_bytes():
        return Outcome(1.0, 0.0, "trainer_state.json")
    return Outcome(0.0, 0.0, "weights, moments, state")


def small_steps(loader: Loader, bench: Bench) -> Loader:
    """Steps of a few of the run's rows, in two micro-batches each."""
    documents = first_documents(loader, max(bench.num_rows, 2 * STEPS))
    number = max(1, documents.num_units // (2 * STEPS))
    return one_by_one(loader, documents, number, accumulation=2)


CHECKS: dict[str, Callable[[Bench], Outcome]] = {
    "a step = the definition": definition,
    "packed = one by one": packing,
    "accumulation: any split": accumulation,
    "kernels = reference formulas": kernels,
    "checkpointing on = off": checkpointing,
    "documents are isolated": isolation,
    "adapter off = base": adapter_off,
    "exported = in memory": exported,
    "adapter merged = adapter": adapter_merged,
    "exported = in transformers": by_transformers,
    "several ranks = one": several_ranks,
    "resumed = uninterrupted": resumed,
}
