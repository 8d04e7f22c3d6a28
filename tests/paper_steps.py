"""Takes small steps on the GPU that exists on paper, and prints what tests/test_step_on_paper.py looks at, as JSON.

Triton's interpreter cannot be on in this process, so the test starts it as one of its own.
"""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.paper_gpu import PaperGPU
from benchmarks.step_on_paper import MODELS, Case, by_part, estimate, take_step
from minisft.cards import CARDS

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
        assert (x[0, 0].item(), x.sum(1).tolist(), bool((x > 0).all()), int(host.sum())) == (0, [0] * 64, False, 64)
        did("values")
    return found


def main() -> None:
    steps = {name: {n: step(case, n) for n in (1, 2)} for name, case in MODELS.items()}
    steps["SmolLM2-135M"][4] = step(MODELS["SmolLM2-135M"], 4)
    print(json.dumps({"steps": steps, "ops": ops()}))


if __name__ == "__main__":
    main()
