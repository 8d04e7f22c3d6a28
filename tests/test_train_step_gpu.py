"""The steps that are timed on a GPU: they run on a CPU too, and what a profiler says of them is counted."""

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report, train_step_gpu
from benchmarks.harness import read_csv, write_csv


def test_steps_of_the_loop_become_a_row(tmp_path):
    before, row = train_step_gpu.measure("tiny", train_step_gpu.QUICK, torch.device("cpu"), 2, as_graph=False)
    assert before.keys() < row.keys() and before.items() <= row.items()
    assert row["tokens"] == 96 and row["tokens_per_second"] == pytest.approx(96e3 / row["ms"])
    assert row["q1"] <= row["ms"] <= row["q3"] and row["first_loss"] == pytest.approx(math.log(384), rel=0.01)
    assert row["last_loss"] != row["first_loss"] and row["kernels"] == row["waits"] == 0
    for batch in train_step_gpu.make_steps(train_step_gpu.QUICK, 1)[0]:
        real = slice(batch.num_targets)
        assert torch.equal(batch.targets[real], batch.input_ids[batch.loss_rows + 1][real]) and batch.num_targets == 95
    write_csv("train_step_cuda", [before | {"share_of_floor": 0.5}, row | {"model": "other", "peak_gb": 1.5}], tmp_path)
    head, _, *lines = report.gpu_step_table(read_csv(tmp_path / "train_step_cuda.csv")).splitlines()
    assert all(line.count("|") == head.count("|") for line in lines)
    assert lines[0].endswith("| 50% | - | - | - | - | - |") and lines[1].endswith("| - | 0 ms | 0 | 0 | 0 | 1.5 GB |")


def test_kernels_copies_and_waits_of_a_step_are_counted(capsys):
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name: str, where, us: float = 0.0, **more):
        return SimpleNamespace(name=name, device_type=where, time_range=SimpleNamespace(elapsed_us=lambda: us), **more)

    events = [event("gemm", gpu, 1000), event("_rms_norm_fwd_kernel", gpu, 500), event("gemm", gpu, 2000)]
    events += [event(f"Memcpy HtoD ({memory} -> Device)", gpu, 10) for memory in ("Pageable", "Pinned")]
    events += [event("Optimizer.step", gpu, 9000, is_user_annotation=True)]
    events += [event("aten::mm", cpu, 50), event("cudaStreamSynchronize", cpu), event("cudaDeviceSynchronize", cpu)]
    row = {"kernels": 3, "busy_ms": 3.5, "copies": 2, "pageable": 1, "waits": 1}
    assert train_step_gpu.counted(events) == row
    assert capsys.readouterr().out.splitlines()[1].split() == ["gemm", "2", "3"]
