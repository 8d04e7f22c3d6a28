"""The equalities of the engine, each as a function that measures it on a user's model, data and machine.

A check returns how far two ways of computing the same are apart, and the bar: the most that rounding may make of it. There are
three kinds of bar, each with its reason:

    0        the same numbers in the same order: every bit must agree
    FP32     the same sums in another order, in fp32. Checks of the mathematics run in fp32 whatever the run's precision, because
             bf16's rounding (2^-9) hides an error of one token in a hundred
    2 x      a kernel in the run's precision may lose twice what the naive formula loses in that precision, both against fp32
"""

import gc
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minisft import loop, runtime
from minisft.checkpoint import step_folder
from minisft.config.sections import Config
from minisft.data.cache import Documents
from minisft.data.loader import Loader, make_batch
from minisft.errors import UserError
from minisft.export import export_dtype, write_model, write_whole
from minisft.kernels.common import use_backend
from minisft.memory import memory_bytes
from minisft.model.adapter_files import load_adapted
from minisft.model.load import load_model
from minisft.model.lora import adapter_disabled, adapters, changed_by_merge, merge_adapter
from minisft.preference.losses import ACROSS_THE_BATCH
from minisft.prepare.model import quantization_for
from minisft.prepare.run import Run, prepare
from minisft.resume import resume
from minisft.runtime import DTYPES
from minisft.saver import Saver
from minisft.selfcheck import naive
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
    relative,
    take_gradients,
)

# Sums of fp32 numbers in another order: an element is off by a few ulp (6e-8) a layer, and the gradient of a norm, whose terms
# nearly cancel, loses a digit more. Measured: 2e-6 at most for 30 layers.
FP32 = 2e-5
FLOOR = {
    "fp32": FP32,
    "bf16": 1e-4,
    "fp16": 2e-5,
}  # fp32: the truth is fp32 itself; else where the naive formula happens to lose nothing
STEPS = 4  # of the run that is resumed in its middle
PROBE_TOKENS = 512  # whose logits are compared


class Skipped(Exception):
    """A check does not apply here; the text says why."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: the largest error, its bar (0: every bit), and where that error is."""

    error: float
    bar: float
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bar


@dataclass
class Bench:
    """What the checks share. The run is made once, and used up by the last of them."""

    config: Config
    words: list[str]  # the command line, for the check that starts processes
    folder: Path  # for whatever is written
    num_rows: int
    run: Run | None = None
    by_rows: Step | None = None  # the step with every document alone, in fp32

    def prepared(self) -> Run:
        if self.run is None:
            self.run = prepare(self.config, runtime.pick_device(self.config.train.device))
            for adapter in adapters(self.run.model) if self.run.model.lora is not None else ():
                move_adapter(adapter)
            if has_noise(self.run):
                self.run.model.eval()
        return self.run

    def forget(self) -> None:
        """Free the run, so that another one has room."""
        self.run = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def documents(self) -> Documents:
        return first_documents(self.prepared().train, self.num_rows)

    def alone(self) -> Step:
        """The reference of the equalities of the mathematics."""
        if self.by_rows is None:
            with in_fp32(self.prepared()) as run:
                self.by_rows = engine_step(run, self.config.train, self.rows(run))
        return self.by_rows

    def rows(self, run: Run) -> Loader:
        """Each document a row of its own: a micro-batch each or, where the loss depends on that, one for all of them."""
        documents = self.documents()
        return one_by_one(run.train, documents, documents.num_units if split_matters(self.config) else 1)


def move_adapter(adapter: torch.nn.Module) -> None:
    """A new adapter does nothing (B is zero), and what does nothing is not seen to be wrong."""
    generator = torch.Generator().manual_seed(0)
    for name, p in adapter.named_parameters():
        if name.endswith("lora_B"):
            noise = torch.randn(p.shape, generator=generator) * 0.01
            p.data += noise.to(p)


def has_noise(run: Run) -> bool:
    """Whether training draws random numbers: then two layouts of a batch draw others."""
    model = run.model
    names = ("attention_dropout", "mlp_dropout", "dropout")
    rates = [getattr(module, name, 0.0) for module in model.modules() for name in names]
    rates += [model.neftune_alpha, model.config.embedding_dropout, *(m.p for m in model.modules() if hasattr(m, "p"))]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def split_matters(config: Config) -> str:
    """Why another split into micro-batches is another objective; "" as a rule."""
    if config.train.loss_normalization == "micro_batch":
        return 'loss_normalization = "micro_batch" depends on the split, on purpose'
    losses = set(config.dpo.loss_type) if config.trainer_type == "dpo" else set()
    if across := sorted(losses & {"kto", *ACROSS_THE_BATCH}):
        return f"{', '.join(across)} takes a mean over a micro-batch, which depends on the split, on purpose"
    return ""


def sharing(run: Run) -> Callable[[Documents], dict]:
    """By which options of plan_set the run's packs share beginnings."""
    shares_turns, shares_prompt = run.train.documents.turns is not None, run.train.documents.shared is not None
    return lambda documents: {"share_prompt": shares_prompt, "longest_tree": None if shares_turns else 0}


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
        if loader.plan.num_packs == loader.documents.num_units:
            raise Skipped("there is one document only")
        return outcome(engine_step(run, bench.config.train, loader), alone, FP32)


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
    """Other tokens in one document change no bit of the hidden states of another in its pack."""
    run = bench.prepared()
    loader = packed(run.train, bench.documents(), lambda documents: {"longest_tree": 0})
    packs = loader.packs(0)
    batch = make_batch(loader.documents, packs, range(len(packs)), round_to=loader.round_to)
    bounds = batch.cu_seqlens.tolist()
    documents = [(a, b) for a, b in zip(bounds[:-1], bounds[1:]) if b <= batch.num_tokens]
    if len(documents) < 2:
        raise Skipped("there is one document only")
    training = run.model.training
    run.model.eval()

    def hidden(ids: Tensor) -> Tensor:
        work = replace(batch, input_ids=ids).to(run.device)
        with torch.no_grad(), runtime.autocast(run.device, run.precision):
            return run.model(work.input_ids, work.position_ids, work.start, work.end, shared=work.shared)

    before, errors = hidden(batch.input_ids), {}
    for a, b in (documents[0], documents[len(documents) // 2], documents[-1]):
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


def two_ranks(bench: Bench) -> Outcome:
    """Two processes that share a step have the gradients of one. On the CPU where there are no two GPUs."""
    if reason := split_matters(bench.config):
        raise Skipped(reason)
    on_gpus = torch.cuda.device_count() > 1 and bench.config.train.device != "cpu"
    if not on_gpus and bench.prepared().device.type == "cuda" and not fits_in_memory(bench.prepared()):
        raise Skipped("one GPU, and too little memory to try it on the CPU")
    steps = [ranks_step(bench, count, "auto" if on_gpus else "cpu") for count in (1, 2)]
    return outcome(steps[1], steps[0], FP32)


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


# ---- files --------------------------------------------------------------------------------------------------------


def probe(run: Run) -> tuple[Tensor, ...]:
    """Tokens of the run's first rows, as arguments of the model."""
    batch = run.train.step(0, 0)[0]
    n = min(batch.num_tokens, PROBE_TOKENS)
    inputs = batch.input_ids[:n], batch.position_ids[:n], batch.start[:n], batch.end[:n].clamp(max=n)
    return tuple(x.to(run.device) for x in inputs)


def logits(model: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    training = model.training
    with torch.no_grad():
        values = model.eval().logits(model(*inputs)).float()
    model.train(training)
    return values


def exported(bench: Bench) -> Outcome:
    """The exported folder, read again, is the model in the dtype that it was written in, to the last bit of every logit."""
    run, folder, dtype = bench.prepared(), bench.folder / "export", export_dtype(bench.config)
    folder.mkdir()
    write_model(run, folder, dtype, run.start.folder if run.start else None)
    max_length = bench.config.data.max_length
    with in_fp32(run) as exact:
        if run.model.lora is None:
            again = load_model(folder, device=run.device, max_length=max_length)
            kept = {p: p.data for p in exact.model.parameters()}
            for p in kept:
                p.data = p.data.to(dtype).float()
            ours = logits(exact.model, probe(run))
            for p, data in kept.items():
                p.data = data
        else:
            again, ours = (
                load_adapted(folder, device=run.device, max_length=max_length),
                logits(exact.model, probe(run)),
            )
            if bench.config.train.weights_dtype == "bf16":  # that of the frozen base
                for name, p in again.named_parameters():
                    p.data = p.data.to(torch.bfloat16).float() if "lora_" not in name else p.data
        theirs = logits(again, probe(run))
    del again
    return Outcome(relative(theirs, ours), 0.0, "logits")


def by_transformers(bench: Bench) -> Outcome:
    """transformers, where it is installed, has our logits from the files that we write (an adapter is merged first)."""
    if find_spec("transformers") is None:
        raise Skipped("transformers is not installed")
    run, folder = bench.prepared(), bench.folder / "transformers"
    if run.model.lora is not None:
        merge_adapter(run.model)
    folder.mkdir()
    with in_fp32(run) as exact:
        write_whole(exact.model, run.tokenizer, folder, torch.float32, run.start.folder if run.start else None)
        inputs = probe(run)
        ours = logits(exact.model, inputs)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    errors, ids = {}, inputs[0].cpu()
    for a in sorted(set(inputs[2].tolist())):
        (rows,) = (inputs[2] == a).cpu().nonzero(as_tuple=True)
        with torch.no_grad():
            errors[f"tokens {a} to {int(rows[-1]) + 1}"] = relative(theirs(ids[rows][None]).logits[0], ours.cpu()[rows])
    error, where = largest(errors)
    return Outcome(error, 1e-5, f"logits of {where}")


def adapter_off(bench: Bench) -> Outcome:
    """With its adapter switched off, the model is the base, to the last bit of every logit."""
    run = bench.prepared()
    if run.model.lora is None:
        raise Skipped("no adapter: all weights train")
    base = load_model(
        run.start.folder,
        dtype=DTYPES[bench.config.train.weights_dtype],
        device=run.device,
        max_length=bench.config.data.max_length,
        quantization=quantization_for(bench.config.model, run.start),
        least_vocab_size=run.model.config.vocab_size,
    )
    inputs = probe(run)
    with runtime.autocast(run.device, run.precision), adapter_disabled(run.model):
        off = logits(run.model, inputs)
    with runtime.autocast(run.device, run.precision):
        return Outcome(relative(off, logits(base, inputs)), 0.0, "logits")


def adapter_merged(bench: Bench) -> Outcome:
    """The merged model has the logits of base and adapter, in fp32."""
    run = bench.prepared()
    if run.model.lora is None:
        raise Skipped("no adapter: all weights train")
    with in_fp32(run) as exact:
        inputs = probe(run)
        adapted = logits(exact.model, inputs)
        with adapter_disabled(exact.model):
            if relative(logits(exact.model, inputs), adapted) < 10 * FP32:
                raise UserError("the adapter hardly moves the logits, so that a merge shows nothing")
        changed_by_merge(exact.model)
        merge_adapter(exact.model)
        return Outcome(relative(logits(exact.model, inputs), adapted), FP32, "logits")


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
    "2 ranks = 1": two_ranks,
    "resumed = uninterrupted": resumed,
}
