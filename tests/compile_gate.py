"""Compiles every launch configuration of the kernels ahead of time, for the cards that people own, without a GPU.

    python tests/compile_gate.py TABLE.csv

The functions `*_cases(arch)` of tests/compile_cases_*.py call the public ops, forward and backward, on small CPU tensors.
Here a launch does not run: a stand-in for the driver says which architecture the machine has, and Triton's own binder
turns the arguments into what would be compiled on such a machine, specialised as at run time. The recorded kernels are
then compiled to machine code in as many processes as there are cores, cuobjdump reads what the code needs, and nvdisasm
its instructions: of all kernels of an architecture at once, as it takes 0.3 seconds to start.

If TABLE.csv exists, a kernel whose key is in it is not compiled again, its row stays. The key is a hash of all that
decides the machine code: Triton itself, the kernel's source, its arguments, the options and the architecture. The table of
the pinned Triton is tests/compiled_kernels.csv: after a change of a kernel, write it again by this command.

Triton's interpreter cannot be on in this process, so tests/test_compile.py starts it as one of its own.
"""

import argparse
import csv
import hashlib
import importlib
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton  # before the kernels are imported: they use Triton where the program has imported it
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction

from minisft.kernels import common

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = {  # what is counted in the machine code
    "wgmma": "HGMMA",  # Hopper's matrix product
    "mma": "HMMA|IMMA",  # that of Ampere and Ada, the slow path on Hopper
    "tcgen05": "UTC[A-Z]*MMA",  # Blackwell's (sm_100)
    "load_16_bytes": r"LDG\.E(?:\.[A-Z]+)*\.128|LDGSTS\.E(?:\.[A-Z]+)*\.128|UTMALDG",
    "spill": "LDL|STL",
}


class Driver:
    """What Triton asks of a driver in order to compile."""

    arch = 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device):
        return 0


def record() -> list[dict]:
    """Calls all cases for all architectures; a dict for each different kernel that would be compiled."""
    driver, kernels, seen = Driver(), [], set()
    this_file = Path(__file__).read_text(encoding="utf-8")  # it decides what a row says
    triton.runtime.driver.set_active(driver)

    def compile(source, target, options, **_):
        text = f"{triton_key()} {driver.arch} {source.hash()} {options} {this_file}"
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in seen:
            kernels.append(dict(key=key, source=source, target=target, options=options))
            seen.add(key)

    triton.compiler.compile = compile
    run = JITFunction.run
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: run(self, *args, grid=grid, warmup=True, **kwargs)
    for arch in common.SHARED_MEMORY:
        common.compile_for = driver.arch = arch
        for name, cases in all_cases().items():
            first = len(kernels)
            with common.use_backend("triton"):
                cases(arch)
            for kernel in kernels[first:]:
                kernel.update(arch=arch, op=name)
    return kernels


def all_cases() -> dict:
    """{"rms_norm": function, ...}"""
    sys.path.insert(0, str(Path(__file__).parent))
    cases = {}
    for file in sorted(Path(__file__).parent.glob("compile_cases_*.py")):
        for name, function in vars(importlib.import_module(file.stem)).items():
            if name.endswith("_cases"):
                cases[name.removesuffix("_cases")] = function
    return cases


def compile_one(kernel: dict) -> tuple[dict, bytes]:
    """A row of the table without the counts of INSTRUCTIONS, and the machine code."""
    from triton.compiler.compiler import compile

    started = time.perf_counter()
    source, options = kernel["source"], kernel["options"]
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    compiled = compile(source, target=kernel["target"], options=options)
    cubin = compiled.asm["cubin"]
    resources = _tool("cuobjdump", cubin, "-res-usage")
    row = {
        "op": kernel["op"],
        "kernel": source.fn.__name__,
        "arch": kernel["arch"],
        "constants": " ".join(f"{k}={v}" for k, v in constants.items() if k.isupper() and v is not None),
        "num_warps": options["num_warps"],
        "num_stages": options["num_stages"],
        "maxnreg": options["maxnreg"] or "",  # the most registers of a thread, where a configuration has a limit
        "registers": int(re.search(r"REG:(\d+)", resources)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", resources)[1]),
        "shared_kb": round(compiled.metadata.shared / 1024, 1),
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "seconds": round(time.perf_counter() - started, 1),
        "key": kernel["key"],
    }
    return row, machine_code(cubin, f".text.{source.fn.__name__}")


def machine_code(cubin: bytes, section: str) -> bytes:
    """The bytes of one section of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, index_of_names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<2I4Q", cubin, table + size * i) for i in range(count)]
    names = headers[index_of_names][4]
    for name, _, _, _, offset, length in headers:
        if cubin[names + name :].startswith(section.encode() + b"\0"):
            return cubin[offset : offset + length]
    raise ValueError(f"no section {section}")


def count_instructions(rows: list[dict], codes: list[bytes]) -> None:
    """Adds to each row how many of each of INSTRUCTIONS its code has."""
    for arch in {row["arch"] for row in rows}:
        those = [i for i, row in enumerate(rows) if row["arch"] == arch]
        listing = _tool("nvdisasm", b"".join(codes[i] for i in those), "--binary", f"SM{arch}")
        lines = re.findall(r"^\s*/\*[0-9a-f]+\*/(.*)", listing, re.MULTILINE)
        assert 16 * len(lines) == sum(len(codes[i]) for i in those)  # an instruction has 16 bytes
        for i in those:
            own, lines = lines[: len(codes[i]) // 16], lines[len(codes[i]) // 16 :]
            for name, pattern in INSTRUCTIONS.items():
                rows[i][name] = sum(len(re.findall(rf"\b(?:{pattern})\b", line)) for line in own)


def _tool(name: str, binary: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def compile_all(kernels: list[dict]) -> list[dict]:
    """A row of the table for each kernel."""
    global _kernels
    _kernels = kernels  # the processes are forked and find the sources here
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        compiled = pool.map(_compile_nth, range(len(kernels)), chunksize=1)
    rows = [row for row, _ in compiled]
    count_instructions(rows, [code for _, code in compiled])
    return rows


def _compile_nth(n: int) -> tuple[dict, bytes]:
    return compile_one(_kernels[n])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    table = parser.parse_args().table
    torch.manual_seed(0)
    known = {}
    if table.exists():
        with table.open(newline="", encoding="utf-8") as file:
            known = {row["key"]: row for row in csv.DictReader(file)}
    kernels = record()
    compiled = {row["key"]: row for row in compile_all([k for k in kernels if k["key"] not in known])}
    rows = [(known | compiled)[kernel["key"]] for kernel in kernels]
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
