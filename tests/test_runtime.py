"""What a run sets up before it computes: the environment that torch reads when it is imported, and the device."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minisft import heap, loop, runtime, train
from minisft.errors import CONFIG
from minisft.prepare import look


@pytest.mark.parametrize(
    "theirs",
    [{}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:4"}],
)
def test_segments_may_grow_unless_the_user_says_otherwise(monkeypatch, theirs):
    """torch reads the older name first, so setting that would override a user's newer one."""
    seen = {}
    monkeypatch.setattr(os, "environ", dict(theirs))
    monkeypatch.setattr(train.sys, "platform", "linux")
    monkeypatch.setattr(look, "look", lambda stages: None)
    monkeypatch.setattr(loop, "run", lambda config, origins, signal: seen.update(os.environ))
    stage = SimpleNamespace(config=SimpleNamespace(output_dir="out"), origins={"output_dir": "default"}, title="")
    train._run([stage], None)
    ours = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert seen == {"GOMP_SPINCOUNT": "20000"} | (theirs or ours)


def test_a_gpu_adds_up_products_in_fp32(monkeypatch):
    matmul, devices = torch.backends.cuda.matmul, []
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(matmul, name) for name in names]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    try:
        for name in names:
            setattr(matmul, name, True)
        assert [runtime.pick_device("auto")] == devices == [torch.device("cuda:1")]
        assert [getattr(matmul, name) for name in names] == [False, False]
    finally:
        for name, value in zip(names, before):
            setattr(matmul, name, value)


def test_a_cpu_that_emulates_16_bits_says_so(monkeypatch):
    for has_bf16 in (False, True):
        monkeypatch.setattr(runtime, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        emulated = [runtime.is_emulated(name, torch.device("cpu")) for name in ("fp32", "bf16", "fp16")]
        assert emulated == [False, not has_bf16, not has_bf16]
        assert not runtime.is_emulated("bf16", torch.device("cuda"))


RESIDENT = """
import importlib, sys
from minisft.heap import keep_freed_memory
def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) / 1000
library = importlib.import_module(sys.argv[2])
if sys.argv[1] == "kept":
    keep_freed_memory()
    keep_freed_memory()
before = resident()
library.ones(25_000_000, dtype=library.float32)
print(resident() - before)
"""
ROOT = Path(__file__).resolve().parents[1]
OURS = {"GLIBC_TUNABLES": heap.TUNABLES}
THEIRS = [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="speaks of glibc")
@pytest.mark.parametrize("variables", [{}, OURS, *THEIRS], ids=str)
def test_the_heap_keeps_what_is_freed_unless_the_user_says_otherwise(variables):
    """Of a tensor of 100 MB: what stays resident when it is gone. NumPy takes memory from the same heap and starts sooner."""

    def megabytes(way, library="numpy"):
        command = [sys.executable, "-c", RESIDENT, way, library]
        environment = without_settings(os.environ) | variables
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    if variables in THEIRS:
        assert megabytes("kept") < 10
    else:
        assert megabytes("kept", "numpy" if variables else "torch") > 90
    assert variables or megabytes("not") < 10


def without_settings(environment):
    return {key: value for key, value in environment.items() if not key.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}


@pytest.mark.parametrize("name", ["minisft.train", "minisft.__main__", "minisft", "pytest", None])
@pytest.mark.parametrize("variables", [{}, OURS, *THEIRS], ids=str)
@pytest.mark.parametrize("device", [None, "/dev/nvidiactl"])
def test_a_command_starts_again_once_on_a_cpu(name, variables, device, monkeypatch):
    """As `python -m minisft.train`, as the installed script, or inside another program, which is left alone."""
    started = []
    spec = SimpleNamespace(name=name) if name and "." in name else None
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec, __file__=name and f"/bin/{name}"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "minisft.train", "run.toml"])
    monkeypatch.setattr(os, "environ", {"HOME": "/"} | variables)
    monkeypatch.setattr(os.path, "exists", lambda path: path == device)
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    heap.start_without_caches()
    if name in heap.COMMANDS and not variables and device is None:
        assert started == [(sys.executable, [sys.executable, "-m", "minisft.train", "run.toml"], {"HOME": "/"} | OURS)]
    else:
        assert not started


def test_a_started_command_is_the_same_command(tmp_path):
    """A module that Python imports at each start notes it: two starts of one process, the second one with our settings."""
    notes = "import os; open('starts', 'a').write(f'{os.getpid()} {os.environ.get(\"GLIBC_TUNABLES\")}\\n')"
    (tmp_path / "sitecustomize.py").write_text(notes)
    environment = without_settings(os.environ) | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "minisft.train", "absent.toml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == CONFIG and done.stderr.count("absent.toml: there is no such file") == 1
    if sys.platform == "linux" and not Path("/dev/nvidiactl").exists():
        (first, none), (second, ours) = (line.split() for line in (tmp_path / "starts").read_text().splitlines())
        assert first == second and (none, ours) == ("None", heap.TUNABLES)
