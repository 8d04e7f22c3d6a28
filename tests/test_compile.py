"""Every launch configuration compiles for the cards that people own, fits their shared memory and does not spill."""

import csv
import importlib
import shutil
from functools import partial
from pathlib import Path

import pytest
from tiny import run_anew, start

from minisft.kernels import common
from minisft.kernels.flash_attention_configs import CANDIDATES, CONFIGS

HERE = Path(__file__).parent
RECORD = HERE / "compiled_kernels.csv"
KERNEL_FILES = [file.stem for file in sorted((HERE.parent / "kernels").glob("*.py"))]
MOST_COMPILES = 350  # a new table of all of them takes 220 seconds of processor time
MATRIX_OPS = {"flash_attention", "gated_delta_rule"}  # whose kernels multiply matrices themselves
TENSOR_MEMORY = 512  # columns, on sm_100
SPILLS = {  # kernel, one of its constants and the architecture -> why it may spill
    ("_flash_attention_bwd_kv_kernel", "DROPOUT=True", 90): "the random numbers' ten rounds; little used",
    (
        "_flash_attention_fwd_kernel",
        "BLOCK_M=128",
        80,
    ): "a register or three, in return for more rows to each tile of keys",
    ("_layer_norm_bwd_kernel", "D=16384", 90): "as that of rms_norm",
    ("_rms_norm_bwd_kernel", "D=16384", 90): "x, dy and the sums of a whole row in the registers of 512 threads",
}


def compile_anew(folder: Path, known: Path | None) -> list[dict]:
    """A row a kernel. `known`: a table whose kernels are compiled only where they, or Triton, have changed since."""
    file = folder / "table.csv"
    if known is not None:
        shutil.copyfile(known, file)
    said, program = folder / "said.txt", HERE / "compile_gate.py"
    done = start(partial(run_anew, TRITON_CACHE_DIR=str(folder / "cache")), program, said, str(file))
    done.join()
    assert done.exitcode == 0, said.read_text()[-4000:]
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def recorded_rows() -> dict[str, dict]:
    """By their keys, of which another Triton has others."""
    with RECORD.open(newline="", encoding="utf-8") as lines:
        return {row["key"]: row for row in csv.DictReader(lines)}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> list[dict]:
    """A row a compiled kernel; see compile_gate.py. Compiling all takes 100 seconds, so RECORD has those of the last change."""
    if not common.HAS_TRITON:
        pytest.skip("needs Triton")
    return compile_anew(tmp_path_factory.mktemp("compile"), RECORD)


@pytest.mark.slow
def test_the_record_is_what_is_compiled(tmp_path):
    if not common.HAS_TRITON:
        pytest.skip("needs Triton")
    recorded = {key: row | {"seconds": ""} for key, row in recorded_rows().items()}
    rows = {row["key"]: row | {"seconds": ""} for row in compile_anew(tmp_path, None)}
    same_triton = rows.keys() & recorded.keys()
    assert all(rows[key] == recorded[key] for key in same_triton)
    assert not same_triton or rows.keys() == recorded.keys(), f"python tests/compile_gate.py {RECORD.name} records them"


def leaves(table: dict, path: tuple = ()):
    """(keys that lead to it, launch configuration) of all that a CONFIGS table has for GPUs."""
    for key, value in table.items():
        if key == common.INTERPRETER:
            continue
        if "num_warps" in value:
            yield (*path, key), value
        else:
            yield from leaves(value, (*path, key))


def launched_with(row: dict) -> dict:
    options = dict(pair.split("=") for pair in row["constants"].split() if "=" in pair)
    return {**options, **{name: row[name] for name in ("num_warps", "num_stages", "maxnreg")}}


def test_every_configuration_is_compiled(table):
    compiled = {}
    for row in table:
        compiled.setdefault(row["kernel"], []).append(launched_with(row))
    missing = []
    for name in KERNEL_FILES:
        configs = getattr(importlib.import_module(f"minisft.kernels.{name}"), "CONFIGS", {})
        for path, config in leaves(configs):
            kernel, wanted = path[0], {k: str(v) for k, v in config.items()}
            if not any(wanted.items() <= launch.items() for launch in compiled.get(kernel, [])):
                missing.append((name, path, config))
    assert not missing


def test_candidates_are_compiled_and_not_what_is_launched_already(table):
    compiled = [launched_with(row) for row in table]
    for path, candidates in CANDIDATES.items():
        config = CONFIGS
        for key in path:
            config = config[key]
        assert config not in candidates, path
        for candidate in candidates:
            wanted = {name: str(value) for name, value in candidate.items()}.items()
            assert any(wanted <= launch.items() for launch in compiled), (path, candidate)


def test_every_kernel_is_compiled_for_several_architectures(table):
    archs = {}
    for row in table:
        archs.setdefault(row["kernel"], set()).add(int(row["arch"]))
    assert all({86, 90} <= found for found in archs.values()), archs
    assert set(common.SHARED_MEMORY) == set.union(*archs.values())
    assert len(table) <= MOST_COMPILES


def test_programs_fit_their_shared_memory(table):
    over = [row for row in table if float(row["shared_kb"]) > common.SHARED_MEMORY[int(row["arch"])]]
    over += [
        row for row in table if int(row["tensor_memory"]) > TENSOR_MEMORY
    ]  # Triton compiles that to nothing at all
    assert not over


def test_hopper_multiplies_with_wgmma(table):
    matrix_kernels = [row for row in table if row["arch"] == "90" and int(row["wgmma"]) + int(row["mma"])]
    assert all(row["mma"] == "0" for row in matrix_kernels), matrix_kernels
    assert {row["op"] for row in matrix_kernels} == MATRIX_OPS


def test_blackwell_multiplies_with_tcgen05(table):
    rows = [row for row in table if row["arch"] == "100" and row["op"] in MATRIX_OPS]
    none = ("_delta_kernel", "_tiles_kernel", "_rope_kernel")  # no products there
    rows = [row for row in rows if not row["kernel"].endswith(none)]
    assert {row["op"] for row in rows} == MATRIX_OPS
    assert all(int(row["tcgen05"]) and row["mma"] == "0" for row in rows), rows


@pytest.mark.parametrize("kernel", ["_quantize_4bit_kernel", "_dequantize_4bit_kernel", "_cross_entropy_kernel"])
def test_16_bytes_are_read_at_a_time(table, kernel):
    """Packed weights, and logits, where an odd vocabulary begins its rows anywhere too."""
    rows = [row for row in table if row["kernel"] == kernel]
    assert rows and all(int(row["load_16_bytes"]) for row in rows), rows
    assert kernel != "_cross_entropy_kernel" or any("EDGES=True" in row["constants"] for row in rows)


def test_no_kernel_spills(table):
    if recorded_rows().keys().isdisjoint(row["key"] for row in table):
        pytest.skip("another Triton needs other registers: the launch configurations are those of the pinned one")
    for row in table:
        may_spill = any((row["kernel"], c, int(row["arch"])) in SPILLS for c in row["constants"].split())
        assert may_spill or row["stack_bytes"] == row["spill"] == "0", row


def test_two_programs_of_the_forward_share_a_multiprocessor_of_hopper(table):
    """Their registers and their shared memory; head dims 64 and 128 in large tiles. While one takes exponentials, the other
    multiplies."""
    for D, config in CONFIGS["_flash_attention_fwd_kernel"][90].items():
        if "large" not in config:
            continue
        wanted = {"D1": D, "WINDOW": False, "SOFTCAP": False, **config["large"]}
        wanted = {name: str(value) for name, value in wanted.items()}.items()
        rows = [row for row in table if row["arch"] == "90" and wanted <= launched_with(row).items()]
        rows = [row for row in rows if row["kernel"] == "_flash_attention_fwd_kernel"]
        assert len(rows) > 2, D  # with and without shared prefixes, a rotary embedding, and norms before it
        for row in rows:
            assert 2 * int(row["registers"]) * 32 * int(row["num_warps"]) <= 65536, row
            assert 2 * (float(row["shared_kb"]) + 1) <= 228, row  # a program needs one of 228 KB for itself
