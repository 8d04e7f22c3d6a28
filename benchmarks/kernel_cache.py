"""The kernels of benchmarks, steps and tests, compiled on a machine without a GPU, in one file for a machine with one.

    python -m benchmarks.kernel_cache --build FILE        for sm_90 and the Triton that is installed here
    python -m benchmarks.kernel_cache --unpack FILE       there, into Triton's cache folder

Triton finds a compiled kernel by a hash of: Triton itself with its library's bytes, which differ from one Python to the next;
the kernel's source; types, constants and alignments of its arguments; the version of ptxas and the architecture; the options;
some variables of the environment. All but the first are the same wherever the version is the same, so FILE has each kernel
under the rest of its key, and `unpack` adds the first part where it runs.

Which kernels there will be only the programs know. So they run: each benchmark, the training steps, the tests, on `MetaGPU`,
whose tensors have their real sizes and no memory. A launch compiles and does nothing else. (paper_gpu.py has another such GPU:
it counts what a step launches, and no kernel is bound to its arguments there.)
"""

import argparse
import base64
import contextlib
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
import triton  # before the kernels are imported: they use Triton where the program has imported it
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from benchmarks.compare import CpuClock, one_round
from benchmarks.harness import ROOT

ARCH, NUM_SMS = 90, 132  # of an H200
BENCHMARKS = ("bench_linear_cross_entropy", "bench_flash_attention", "sweep_flash_attention", "bench_gated_delta_rule")
BENCHMARKS += ("bench_causal_conv1d", "bench_cross_entropy", "bench_rms_norm", "bench_glu", "bench_rope")
BENCHMARKS += ("bench_quantize", "bench_adamw", "bench_layer_norm")
TEST_JOBS = 12  # so many processes share the tests
PRODUCTS = (F.linear, torch.mm, torch.addmm, torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
READS = (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.__float__, Tensor.__int__)
KEY, MANIFEST, LAUNCHERS = "key", "manifest.json", "launchers.json"


# ---- a GPU that is not there ----------------------------------------------------------------------------------------


class Autocast(contextlib.ContextDecorator):
    """torch.autocast, which does not know meta tensors: `MetaGPU` casts what goes into a product."""

    dtype: torch.dtype | None = None

    def __init__(self, device_type, dtype=torch.bfloat16, enabled=True, cache_enabled=None):
        self.new = dtype if enabled else None

    def __enter__(self):
        self.old, Autocast.dtype = Autocast.dtype, self.new

    def __exit__(self, *exception):
        Autocast.dtype = self.old


class MetaGPU(TorchFunctionMode):
    """Meta tensors that say they are on cuda:0. Who asks for a number gets 0, who asks for a truth True."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        x = args[0] if args and isinstance(args[0], Tensor) and args[0].is_meta else None
        if x is not None:
            if func == Tensor.device.__get__:
                return torch.device("cuda", 0)
            if func == Tensor.is_cuda.__get__:
                return True
            if func in READS:
                return func(torch.full(x.shape, x.dtype == torch.bool, dtype=x.dtype, device="cpu"))
        if func is torch.device:
            return func(*args, **kwargs or {})
        if func is Tensor.cuda:
            return args[0].to("meta")
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.copy_ and args[1].is_meta and x is None:  # from the GPU
            return args[0].zero_()
        args, kwargs = tree_map(_as_meta, (args, kwargs or {}))
        kwargs.pop("pin_memory", None)
        if kwargs.get("device") == torch.device("meta"):
            kwargs.pop("generator", None)
        if Autocast.dtype is not None and func in PRODUCTS:
            args = tree_map(_autocast, args)
        return func(*args, **kwargs)


def _as_meta(x):
    name = x.type if isinstance(x, torch.device) else x
    return torch.device("meta") if isinstance(name, str) and name.partition(":")[0] == "cuda" else x


def _autocast(x):
    return x.to(Autocast.dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x


def pretend_gpu() -> MetaGPU:
    """From now on this process finds a GPU. `with` what is returned, it runs there; every launch only compiles."""
    from triton.runtime.jit import JITFunction

    generator, done = torch.Generator.__new__, SimpleNamespace(synchronize=int, query=lambda: True)
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: divmod(ARCH, 10)
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=NUM_SMS)
    torch.cuda.mem_get_info = lambda *_: (2**40, 2**40)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_stream = lambda *_: SimpleNamespace(cuda_stream=0, synchronize=int, record_event=lambda: done)
    torch.autocast = Autocast
    torch.is_autocast_enabled = lambda *_: Autocast.dtype is not None
    torch.get_autocast_dtype = lambda *_: Autocast.dtype
    torch.Generator = type("Generator", (torch.Generator,), {"__new__": lambda cls, *_: generator(cls)})
    torch.equal = lambda *_: True
    # a mode is off inside of what it was asked about, and autograd's engine runs inside of `backward`
    run_backward = torch.autograd.graph._engine_run_backward

    def run_backward_there(*args, **kwargs):
        with MetaGPU():
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = torch.autograd.graph._engine_run_backward = run_backward_there

    sys.path.insert(0, str(ROOT / "tests"))
    driver = importlib.import_module("compile_gate").Driver()
    driver.arch = ARCH
    triton.runtime.driver.set_active(driver)
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    return MetaGPU()


# ---- what runs there ------------------------------------------------------------------------------------------------


def bench(name: str) -> None:
    for case in importlib.import_module(f"benchmarks.{name}").cases("cuda", False):
        with torch.device("cuda"):
            inputs = case.inputs()
        for contender, make in case.contenders.items():
            if contender.startswith("triton") or name.startswith("sweep"):
                one_round(make(), inputs, CpuClock(), case.with_backward)


def step(model: str) -> None:
    from benchmarks.train_step_gpu import MODELS, make_run, make_steps
    from minisft.loop import train_step

    run, train = make_run(MODELS[model], torch.device("cuda", 0))
    for batches in make_steps(MODELS[model], 2):  # the second time with moments
        train_step(run, train, batches)


def tests(share: int) -> None:
    """Every TEST_JOBS-th test, as far as it comes: a comparison of numbers that are not there may fail."""
    import pytest
    import tolerance

    held_to_truth = tolerance.assert_close_to_truth

    def only_ours(fast, reference, inputs, dtype, **_):
        with contextlib.suppress(ValueError):  # the kernels refuse the truth, in fp64
            held_to_truth(fast, fast, inputs, dtype)

    tolerance.assert_close_to_truth = only_ours
    plugin = SimpleNamespace(pytest_collection_modifyitems=_keep_share(share))
    options = ["-m", "gpu", "-o", "addopts=", "-q", "--tb=no", "-p", "no:cacheprovider"]
    pytest.main([str(ROOT / "tests" / "test_gpu.py"), *options], plugins=[plugin])


def _keep_share(share: int) -> Callable:
    def keep(items):
        items[:] = items[share::TEST_JOBS]

    return keep


def jobs() -> dict[str, Callable[[], None]]:
    from benchmarks.train_step_gpu import MODELS

    found = {name: partial(bench, name) for name in BENCHMARKS if find_spec(f"benchmarks.{name}")}
    found |= {f"step {model}": partial(step, model) for model in MODELS}
    return found | {f"tests {share}": partial(tests, share) for share in range(TEST_JOBS)}


def run_job(job: Callable[[], None]) -> None:
    """Compile what the job launches, into Triton's cache folder, with each kernel's key beside it."""
    from triton.compiler import compiler
    from triton.runtime.cache import triton_key

    gpu, key_of, compile_it = pretend_gpu(), compiler.get_cache_key, compiler.compile
    own_part = f"{triton_key()}-"

    def noted_key(*args, **kwargs):
        key = key_of(*args, **kwargs)
        folder = folder_of(key, Path(triton.knobs.cache.dir))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / KEY).write_text(key.removeprefix(own_part), encoding="utf-8")
        return key

    def compile_noted(source, **kwargs):
        kernel = compile_it(source, **kwargs)
        for name, text in launchers(source, kernel).items():
            (Path(triton.knobs.cache.dir) / name).write_text(text, encoding="utf-8")
        return kernel

    compiler.get_cache_key, triton.compiler.compile = noted_key, compile_noted
    with gpu:
        job()


def launchers(source, kernel) -> dict[str, str]:
    """{file name: C code} of the program that launches a kernel; Triton 3.6 compiles one for each signature, 3.7 none."""
    from triton.backends.nvidia import driver

    found = {}
    if hasattr(driver, "make_launcher"):

        def take(src, name, **_):
            found[f"{hashlib.sha256(src.encode()).hexdigest()}.c"] = src
            return SimpleNamespace(launch=None)

        with mock.patch.multiple(driver, compile_module_from_src=take, library_dirs=list):
            driver.CudaLauncher(source, kernel.metadata)
    return found


def folder_of(key: str, cache: Path) -> Path:
    """Where Triton looks for the kernel with this key."""
    return cache / base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")


# ---- the file -------------------------------------------------------------------------------------------------------


def fill(cache: Path, names: list[str] | None = None) -> None:
    """Run the jobs, in as many processes as there are cores. Says which of them failed, and goes on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(name: str) -> None:
        command = [sys.executable, "-m", "benchmarks.kernel_cache", "--job", name]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        failed = f"FAILED\n{done.stderr[-2000:]}" if done.returncode else ""
        print(f"{name}: {len(list(cache.glob(f'*/{KEY}')))} kernels so far {failed}", flush=True)

    cache.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(start, names or jobs()))


def pack(cache: Path, file: Path) -> int:
    """Writes the kernels of a cache that `fill` has filled; returns how many."""
    kernels = [path.parent for path in sorted(cache.glob(f"*/{KEY}")) if any(path.parent.glob("*.cubin"))]
    codes = [path.read_text(encoding="utf-8") for path in sorted(cache.glob("*.c"))]
    with tarfile.open(file, "w:xz") as archive:

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))

        add(MANIFEST, json.dumps({"triton": triton.__version__}).encode())
        add(LAUNCHERS, json.dumps(codes).encode())
        for number, folder in enumerate(kernels):
            for path in (folder / KEY, *folder.glob("*.cubin"), *folder.glob("*.json")):
                if not path.name.startswith("__grp__"):
                    add(f"{number}/{path.name}", path.read_bytes())
    return len(kernels)


def unpack(file: Path, cache: Path) -> int:
    """Puts the kernels where Triton finds them; returns how many. Raises ValueError where they are for another version."""
    from triton.runtime.cache import triton_key

    with tarfile.open(file) as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive}
    made_for = json.loads(contents.pop(MANIFEST))["triton"]
    if made_for != triton.__version__:
        raise ValueError(f"{file} has kernels for Triton {made_for}, this is {triton.__version__}")
    codes, kernels = json.loads(contents.pop(LAUNCHERS)), {}
    for name, content in contents.items():
        number, _, name = name.partition("/")
        kernels.setdefault(number, {})[name] = content
    for files in kernels.values():
        folder = folder_of(f"{triton_key()}-{files[KEY].decode()}", cache)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        about = next(name for name in files if name.endswith(".json"))
        group = {"child_paths": {name: str(folder / name) for name in files if name != KEY}}
        (folder / f"__grp__{about}").write_text(json.dumps(group), encoding="utf-8")
    if codes:
        compile_launchers(codes)
    return len(kernels)


def compile_launchers(codes: list[str]) -> None:
    """Into Triton's cache folder, if this machine has a GPU's driver; else each process does it when it needs one."""
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    try:
        where = dict(library_dirs=driver.library_dirs(), include_dirs=driver.include_dirs, libraries=driver.libraries)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda code: compile_module_from_src(src=code, name="__triton_launcher", **where), codes))
    except (AssertionError, ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no launchers: {type(error).__name__}: {error}", file=sys.stderr)


def build(file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        number = pack(Path(folder), file)
    print(f"{file}: {number} kernels, {file.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", help="compile what this one launches, into Triton's cache folder")
    parser.add_argument("--build", type=Path, metavar="FILE", help="compile all jobs into a file")
    parser.add_argument("--unpack", type=Path, metavar="FILE", help="put its kernels into Triton's cache folder")
    parser.add_argument("--fill", action="store_true", help="all jobs, into Triton's cache folder")
    arguments = parser.parse_args()
    cache = Path(triton.knobs.cache.dir)
    if arguments.job:
        run_job(jobs()[arguments.job])
    elif arguments.build:
        build(arguments.build)
    elif arguments.unpack:
        print(f"{unpack(arguments.unpack, cache)} kernels")
    elif arguments.fill:
        fill(cache)


if __name__ == "__main__":
    main()
