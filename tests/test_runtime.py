"""What a run sets up before it computes: the environment that torch reads when it is imported, and the device."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from minisft import heap, loop, runtime, train
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
    train._run([SimpleNamespace(config=SimpleNamespace(output_dir="out"), origins={}, title="")], None)
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


FAULTS = """
import resource, sys, torch
from minisft.heap import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
    keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)
    torch.ones(1_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="speaks of glibc")
@pytest.mark.parametrize("variables", [{}, {"MALLOC_ARENA_MAX": "4"}], ids=str)
def test_the_heap_keeps_what_is_freed_unless_the_user_says_otherwise(variables):
    """100 MB are 24,400 pages of 4 KB, which are new each time, or the same."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(heap.THEIRS)} | variables

    def faults(way):
        command = [sys.executable, "-c", FAULTS, way]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 100 if not variables else faults("kept") > 20_000
    assert faults("not") > 20_000
