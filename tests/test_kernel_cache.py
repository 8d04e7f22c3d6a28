"""The kernels of a session on a GPU that are compiled elsewhere."""

import os
import subprocess
import sys

import pytest

from benchmarks.harness import ROOT
from minisft.kernels import common

# One process starts the others, as importing torch takes longest: one compiles a kernel, which is packed, and unpacked for a
# Triton of the same version whose library has other bytes; another one looks for it. What reads text and files is not
# installed there, and the steps are imported all the same.
TRAVEL = """
import os, sys
from importlib.machinery import PathFinder
from pathlib import Path

hidden, find = set(sys.argv[2].split()), PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *more: None if name.partition(".")[0] in hidden else find(name, *more))

from benchmarks import kernel_cache, train_step_gpu
import torch, triton
from triton.runtime import cache

folder = Path(sys.argv[1])
print(type(sys.modules["tokenizers"].models).__name__)

def job():
    from minisft.kernels.common import use_backend
    from minisft.kernels.layer_norm import layer_norm
    x, weight = torch.empty(4, 1024, device="cuda"), torch.empty(1024, device="cuda")
    assert x.is_cuda and x.device == torch.device("cuda", 0)
    with use_backend("triton"):
        layer_norm(x, weight, weight, 1e-5)

def compile_there(name):
    os.environ["TRITON_CACHE_DIR"] = str(folder / name)
    triton.knobs.compilation.listener = lambda cache_hit, **_: print(f"{name} {'found' if cache_hit else 'compiled'}")
    kernel_cache.run_job(job)
    sys.stdout.flush()

def in_process_of_its_own(function, *arguments):
    pid = os.fork()
    if not pid:
        function(*arguments)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
in_process_of_its_own(compile_there, "here")
del os.environ["TRITON_STORE_BINARY_ONLY"]
assert kernel_cache.pack(folder / "here", folder / "file") == 1
ours = cache.triton_key()
cache.triton_key = lambda: ours + "of another Python"
os.environ["TRITON_CACHE_DIR"] = str(folder / "there")
print(kernel_cache.unpack(folder / "file", folder / "there"))
in_process_of_its_own(compile_there, "there")
triton.__version__ = "0.1"
try:
    kernel_cache.unpack(folder / "file", folder / "there")
except ValueError as error:
    print(str(error).split()[-1])
"""


def test_a_kernel_that_has_travelled_is_not_compiled_again(tmp_path):
    if not common.HAS_TRITON:
        pytest.skip("needs Triton")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON")}
    command = [
        sys.executable,
        "-u",
        "-c",
        TRAVEL,
        str(tmp_path),
        "tokenizers safetensors huggingface_hub jinja2 tqdm yaml",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["Empty", "here compiled", "1", "there found", "0.1"]


# The benchmarks and the steps on a GPU that is not there; nothing is compiled.
JOBS = """
import os, sys
from benchmarks import kernel_cache
from triton.compiler import compiler

kernel_cache.launchers = lambda *_: {}
for name, job in kernel_cache.jobs().items():
    if not name.startswith("tests"):
        found = []
        compiler.compile = lambda source, **_: found.append(source.fn.__name__)
        pid = os.fork()
        if not pid:
            kernel_cache.run_job(job)
            print(name, len(found), flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, name
"""


@pytest.mark.slow
def test_all_jobs_come_to_their_end():
    if not common.HAS_TRITON:
        pytest.skip("needs Triton")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON")}
    done = subprocess.run([sys.executable, "-c", JOBS], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = {name: int(number) for name, _, number in (line.rpartition(" ") for line in done.stdout.splitlines())}
    assert len(counts) == 12 + 4 and min(counts.values()) > 0
