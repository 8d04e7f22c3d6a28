"""Shared by all tests: determinism, few threads, no network, Triton's interpreter where there is no GPU."""

import importlib
import os
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py: before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine, small tensors on two threads take minutes

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# `jit` asks for the interpreter where a kernel is defined, so every kernel file is imported while the variable is set. It
# does not stay: the processes that tests start are to run what users run.
if find_spec("triton") is not None and (os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()):
    os.environ["TRITON_INTERPRET"] = "1"
    for file in (ROOT / "kernels").glob("*.py"):
        importlib.import_module(f"minisft.kernels.{file.stem}")
    importlib.import_module("interpreter").install()
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; tests that need it are skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder of real data sets is not beside this checkout")
    return SHARED_DATA


@pytest.fixture
def triton_kernels():
    """Runs the test's ops by their Triton kernels, in the interpreter."""
    from minisft.kernels import common

    if not common.INTERPRET:
        pytest.skip("the interpreter needs Triton and stands in for a GPU; where there is one, see `pytest -m gpu`")
    with common.use_backend("triton"):
        yield


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN (floats) or the largest number (integers), so that an element nobody writes shows."""

    def poison(create):
        def poisoned(*arguments, **options):
            x = create(*arguments, **options)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return poisoned

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
