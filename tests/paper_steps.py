"""Takes small steps on the GPU that exists on paper, and prints what tests/test_step_on_paper.py looks at, as JSON.

Triton's interpreter cannot be on in this process, so the test starts it as one of its own.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton  # noqa: F401  before the kernels are imported: they use Triton where the program has imported it
from paper_kept import both, shape_of
from test_dpo import batch_of, make_pairs

from benchmarks.paper_gpu import PaperGPU
from benchmarks.step_on_paper import (
    MODELS,
    Case,
    attended_pairs,
    by_part,
    estimate,
    make_batches,
    make_config,
    make_run,
    take_step,
)
from minisft import dpo, sft
from minisft.cards import CARDS
from minisft.loop import train_step
from minisft.model import shards
from minisft.optimizers import RULES
from minisft.preference.losses import LossOptions
from minisft.preference.reference import Reference, copy_of
from minisft.prepare.optimizer import prepare_optimizer

CARD = CARDS["H200"]


def step(case: Case, layers: int) -> dict:
    """One step of the model with fewer layers."""
    taken = take_step(replace(case, config=case.config | {"num_hidden_layers": layers}), CARD)
    parts = {row["part"]: row for row in by_part(taken, CARD)}
    rooflines = [(estimate(launch, CARD), CARD.seconds(launch.bytes, launch.flops)) for launch in taken.launches]
    return {
        "launches": len(taken.launches),
        "waits": taken.waits,
        "parts": parts,
        "least": min(seconds / least for seconds, least in rooflines if least),
    }


def dpo_waits(case: Case) -> Counter[str]:
    """Of a step of preference tuning on a few pairs, with all that weighs tokens and pairs."""
    config = make_config(case)
    batches = [batch_of(make_pairs(weighted=True)), batch_of(make_pairs(seed=1))]
    objective = dpo.Objective({"sigmoid": 1.0, "ipo": 0.5}, LossOptions(), ld_alpha=0.5, use_weighting=True)
    with PaperGPU(CARD) as gpu:
        run = make_run(config, case, gpu)
        trained = [p for p in run.model.parameters() if p.requires_grad]
        reference = Reference("adapter off") if case.lora else Reference("copy", copies=copy_of(run.model, trained))
        loss = partial(dpo.loss, objective=objective, reference=reference)
        run = replace(run, weight=dpo.weight, loss=loss, reference=reference)
        for step in range(2):
            gpu.waits.clear()
            run.progress.step = step
            train_step(run, config.train, batches)
        return gpu.waits


def waits_of(case: Case, recompute: bool = False, keep_rows: bool = False) -> Counter[str]:
    """Of a step whose blocks run again in the backward pass, or whose rows' losses come to the host too."""
    config, batches = make_config(case), make_batches(case)
    with PaperGPU(CARD, pairs=attended_pairs(batches[0])) as gpu:
        run = replace(make_run(config, case, gpu), loss=partial(sft.loss, keep_rows=keep_rows))
        run.model.gradient_checkpointing = run.model.offload_activations = recompute
        for step in range(2):
            gpu.waits.clear()
            run.progress.step = step
            assert bool(train_step(run, config.train, batches).rows) == keep_rows
        return gpu.waits


def waits() -> dict[str, Counter[str]]:
    """Of the second step of a small model, by how it is trained."""
    small = replace(MODELS["SmolLM2-135M"], tokens=4000, accumulation=2)
    full = replace(small, config=small.config | {"num_hidden_layers": 1})
    lora = replace(full, lora=4)
    found = {"SFT, full": take_step(full, CARD).waits, "SFT, LoRA": take_step(lora, CARD).waits}
    found["SFT with a ledger"] = waits_of(full, keep_rows=True)
    found |= {"SFT, recomputed": waits_of(full, recompute=True), "LoRA, recomputed": waits_of(lora, recompute=True)}
    return found | {"DPO, full": dpo_waits(full), "DPO, LoRA": dpo_waits(lora)}


def devices(optim: str, *, in_backward: bool = False) -> list[str]:
    """Steps with parallel.cpu_offload, without FSDP2: matrices are whole on the GPU in the passes, and the rows of all but
    one are on the CPU. Returns the state that is not with its parameter. An op on tensors of two devices raises an error, as on a
    real GPU.
    """
    small = replace(MODELS["SmolLM2-135M"], tokens=500, accumulation=1)
    case = replace(small, config=small.config | {"num_hidden_layers": 1, "intermediate_size": 96, "vocab_size": 999})
    config = make_config(case)
    train = replace(config.train, optim=optim, max_grad_norm=None if in_backward else 1.0)
    config = replace(config, train=replace(train, optimizer_in_backward=in_backward))
    with PaperGPU(CARD) as gpu, mock.patch.object(shards, "local", lambda x: x.detach().to("cpu")):
        run = make_run(config, case, gpu)
        run.model.reshard = lambda: None
        whole = run.model.layers[0].mlp.down_proj.weight
        for p in run.model.parameters():
            if p.ndim > 1 and p is not whole:
                p.device_mesh = SimpleNamespace(device_type="cuda", ndim=1)
                p.part = torch.nn.Parameter(torch.zeros(p.shape, device="cpu"))
        trained = prepare_optimizer(config, run.model)
        run = replace(run, optimizer=trained.optimizer, measured=trained.parameters)
        batches = make_batches(case)
        for run.progress.step in range(2):
            assert train_step(run, config.train, batches, is_logged=True).updated
        found = []
        for p in trained.parameters:
            assert p.device.type == ("cpu" if p.ndim > 1 and p is not whole else "cuda")
            state = {key: x for key, x in run.optimizer.state[p].items() if x.ndim}  # counters are numbers of the host
            assert state or optim == "sgd"
            found += [key for key, x in state.items() if x.device != p.device]
        return found


def ops() -> list:
    """(what the code did, launches, waits) of a few lines."""
    found = []
    with PaperGPU(CARD) as gpu:

        def did(what: str) -> None:
            launches = [
                {key: asdict(launch)[key] for key in ("name", "bytes", "flops", "phase")} for launch in gpu.launches
            ]
            found.append([what, launches, sorted(where.partition(" ")[2] for where in gpu.waits.elements())])
            gpu.launches.clear()
            gpu.waits.clear()

        x, host = torch.empty(64, 32, device=gpu.device), torch.ones(64)
        weight = torch.nn.Parameter(torch.empty(16, 32, device=gpu.device))
        did("allocate")
        x.view(-1), x.T[1:], x.to(gpu.device), x.copy_(x), torch.empty_like(x)
        did("view")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = torch.nn.functional.linear(x, weight)
        did("linear")
        y.backward(torch.empty_like(y))
        did("backward")
        host.to(gpu.device), host.to("cuda", non_blocking=True), torch.tensor([1.0], device=gpu.device)
        did("copy from pageable memory")
        pinned = torch.empty_like(x[:, 0], device="cpu", pin_memory=True)
        host.pin_memory().to(gpu.device, non_blocking=True), pinned.copy_(x[:, 0], non_blocking=True)
        did("copy from and to pinned memory")
        pinned.to(gpu.device), x.cpu()
        did("copy and stay for it")
        torch.cuda.current_stream().record_event().synchronize()
        did("event")
        refused, number = 0, x[0, 0]
        for mixed in (
            lambda: x + torch.ones(64, 32),
            lambda: torch.stack([x[:, 0], host]),
            lambda: torch._foreach_mul_([host], number),
            lambda: torch._foreach_add_([x[:, 0], host], [host, host]),
        ):
            try:
                mixed()
            except RuntimeError as error:
                refused += "devices" in str(error)
        assert refused == 4
        gpu.launches.clear()
        assert (x[0, 0].item(), x.sum(1).tolist(), bool((x > 0).all()), int(host.sum())) == (0, [0] * 64, False, 64)
        did("values")
    return found


def main() -> None:
    steps = {name: {n: step(case, n) for n in (1, 2)} for name, case in MODELS.items()}
    steps["SmolLM2-135M, LoRA"] = {n: step(replace(MODELS["SmolLM2-135M"], lora=16), n) for n in (1, 2)}
    steps["SmolLM2-135M"][4] = step(MODELS["SmolLM2-135M"], 4)
    split = {name: devices(name) for name in RULES if name != "muon"}
    split |= {f"{name} in the backward": devices(name, in_backward=True) for name in ("adamw", "adafactor")}
    kept = {str(dtype): both(shape_of("llama"), dtype, False) for dtype in (torch.float32, torch.bfloat16)}
    print(json.dumps({"steps": steps, "waits": waits(), "ops": ops(), "devices": split, "kept": kept}))


if __name__ == "__main__":
    main()
