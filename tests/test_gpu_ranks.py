"""benchmarks/gpu_ranks.sh without GPUs: a nvidia-smi that claims four of them, and a torchrun that writes what a run writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import ROOT, read_csv

SCRIPT = ROOT / "benchmarks" / "gpu_ranks.sh"
# A run: its losses, or what it is told to do instead. A run that may be killed starts a rank of its own and waits.
TORCHRUN = """#!{python}
import json, os, signal, subprocess, sys, time
from pathlib import Path

words = sys.argv[1:]
out, ranks = Path(words[words.index("--output_dir") + 1]), int(words[words.index("--nproc-per-node") + 1])
Path({calls!r}).open("a").write(f"{{out.name}} {{ranks}}\\n")
doing = json.loads(Path({plan!r}).read_text()).get(out.name, "")
out.mkdir(exist_ok=True, parents=True)
if doing.startswith("exit "):
    print("minisft: error: it is, broken")
    sys.exit(int(doing.split()[1]))
if out.name.startswith("killed") and not (out / "checkpoints").exists():
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "-m", "minisft.train", *words[-2:]])
    (out / "checkpoints" / "step-1").mkdir(parents=True)
    code = rank.wait()
    sys.exit(0 if code >= 0 else 1)
factor = float(doing or 1)
(out / "metrics.jsonl").write_text("".join(json.dumps({{"step": i, "loss": factor / i}}) + "\\n" for i in range(1, 5)))
(out / "timings.jsonl").write_text(json.dumps({{"tokens_per_second": 1000 * ranks, "peak_memory_gib": 7}}) + "\\n")
(out / "model").mkdir(exist_ok=True)
"""


def programs(folder: Path, gpus: int = 4, **plan: str) -> None:
    """plan: what the torchrun in place of the real one does for an output folder: a factor of its losses, or "exit CODE"."""
    for name, text in {
        "nvidia-smi": f"#!/bin/bash\nfor i in {{1..{gpus}}}; do echo 'NVIDIA H100'; done\n",
        "torchrun": TORCHRUN.format(python=sys.executable, calls=str(folder / "calls"), plan=str(folder / "plan.json")),
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "plan.json").write_text(json.dumps({name.replace("_", "-"): doing for name, doing in plan.items()}))


def hold(folder: Path, *cases: str, **variables: str) -> tuple[int, dict[tuple, dict], list[str]]:
    """(exit code, the last row of each part, what torchrun was called for)"""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "MINISFT_COMMIT": "none", "LIMIT": "20"} | variables
    done = subprocess.run([SCRIPT, str(folder / "out"), *cases], env=env, timeout=60, capture_output=True, text=True)
    rows = {(row["part"], row["strategy"], row["ranks"]): row for row in read_csv(folder / "out" / "ranks_gpu.csv")}
    calls = folder / "calls"
    return done.returncode, rows, calls.read_text().splitlines() if calls.exists() else []


def test_all_parts_leave_a_row_and_are_not_done_twice(tmp_path):
    programs(tmp_path)
    code, rows, calls = hold(tmp_path, "equal", "killed", "speed")
    assert code == 0 and {row["result"] for row in rows.values()} == {"ok"}
    assert set(rows) == {
        *(("equal", strategy, "4") for strategy in ("ddp", "fsdp2", "hsdp")),
        *(("killed", strategy, "4") for strategy in ("ddp", "fsdp2")),
        *(("speed-1B", "ddp", n) for n in "24"),
        *(("speed-8B", "fsdp2", n) for n in "24"),
        ("speed-8B", "hsdp", "4"),
    }
    assert float(rows["speed-8B", "fsdp2", "4"]["value"]) == 4000 and rows["speed-1B", "ddp", "2"]["note"][0] == "7"
    assert rows["equal", "ddp", "4"]["gpu"] == "NVIDIA H100" and calls[0] == "one 1"
    assert hold(tmp_path, "equal", "killed", "speed")[2] == calls


def test_other_losses_and_broken_runs_are_failures_that_are_tried_again(tmp_path):
    programs(tmp_path, fsdp2="1.001", hsdp="exit 71")
    code, rows, _ = hold(tmp_path, "equal")
    assert code == 1
    assert [rows["equal", s, "4"]["result"] for s in ("ddp", "fsdp2", "hsdp")] == ["ok", "failed", "failed"]
    assert float(rows["equal", "fsdp2", "4"]["value"]) == pytest.approx(1e-3)
    assert rows["equal", "hsdp", "4"]["note"].startswith("exit code 71: ") and "is; broken" in str(
        rows["equal", "hsdp", "4"]
    )
    programs(tmp_path)
    code, rows, calls = hold(tmp_path, "equal")
    assert code == 0 and calls.count("ddp 4") == 1 and calls.count("fsdp2 4") == 2


def test_two_gpus_have_no_hsdp_and_one_is_too_few(tmp_path):
    programs(tmp_path, gpus=2)
    code, rows, _ = hold(tmp_path, "equal")
    assert code == 0 and {strategy for _, strategy, _ in rows} == {"ddp", "fsdp2"}
    programs(tmp_path, gpus=1)
    assert hold(tmp_path, "equal")[0] == 1
