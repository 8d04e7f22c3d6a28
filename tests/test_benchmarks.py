"""The benchmarks' own arithmetic: clocks, formulas of bytes and FLOPs, tables from CSVs, markers; and that each case runs."""

import importlib
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    bench_dpo,
    bench_ranks,
    bench_shared_turns,
    op_table,
    paper_report,
    report,
    step_memory,
    train_step,
)
from benchmarks.compare import (
    EVERYBODY,
    Case,
    CpuClock,
    backend,
    difference,
    first_calls,
    lapses,
    measured_already,
    rates,
    rows_of,
    time_rounds,
)
from benchmarks.harness import ENDED, in_fresh_process, print_table, quartiles, read_csv, write_csv
from minisft.kernels.rms_norm import rms_norm

PEAKS = {"copy": 4e12, "matmul": 8e14}
OPS = [
    "ceilings",
    "rms_norm",
    "layer_norm",
    "rope",
    "glu",
    "cross_entropy",
    "linear_cross_entropy",
    "flash_attention",
    "gated_delta_rule",
    "causal_conv1d",
    "quantize",
    "adamw",
]


class FakeClock(CpuClock):
    """Every look at it costs a second."""

    time = 0.0

    def now(self):
        self.time += 1.0
        return self.time


def norm_case(**contenders):
    inputs = [torch.randn(4, 8, requires_grad=True), torch.ones(8, requires_grad=True)]
    ours = {name: backend(name, lambda x, w: rms_norm(x, w, 1e-5)) for name in ("torch", "reference")}
    costs = {"forward": (4e12, 0), "backward": (2e12, 8e14)}
    return Case(
        "rms_norm",
        "4 x 8 fp32",
        lambda: inputs,
        {"torch": ours["torch"], "eager": ours["reference"]} | contenders,
        costs,
    )


def broken():
    def run(*inputs):
        raise RuntimeError("out of luck\nand more")

    return run


def absent():
    import not_installed_anywhere  # noqa: F401


def wrong():
    return lambda x, w: x * w


def measured(case):
    clock, inputs = FakeClock(), case.inputs()
    runs, errors, differs = first_calls(case, inputs, clock)
    times = time_rounds(runs, case, inputs, clock, seconds=0)
    return rows_of(case, times, dict.fromkeys(runs, 1.0), errors, differs, PEAKS)


def test_a_case_becomes_rows():
    rows = measured(norm_case())
    assert [(row["contender"], row["pass"]) for row in rows] == [
        (name, label) for name in ("torch", "eager") for label in ("forward", "backward", "both")
    ]
    for row in rows:
        assert row["ms"] == (2000 if row["pass"] == "both" else 1000) and row["rounds"] == 5 and row["speedup"] == 1
        # 1 s at 4 TB/s; the backward is bound by its FLOPs; in all 1.5 s of bytes against 1 s of FLOPs in 2 s.
        assert row["percent"] == pytest.approx({"forward": 100, "backward": 100, "both": 75}[row["pass"]])
        assert row["differs"] < 1e-6 and ("extra_mb" in row) == (row["pass"] == "both")
    assert not lapses(rows)
    assert lapses([{**row, "speedup_q3": 0.9} if row["contender"] == "torch" else row for row in rows])


def test_a_contender_that_fails_or_is_absent_or_wrong_does_not_end_the_others(capsys):
    rows = measured(norm_case(broken=broken, absent=absent, wrong=wrong))
    errors = [row for row in rows if "error" in row]
    found = {row["contender"]: row["error"] for row in errors}
    assert found.keys() == {"broken", "absent"} and found["broken"] == "RuntimeError: out of luck"
    assert found["absent"] == "not here: No module named 'not_installed_anywhere'"
    assert "absent is left out" in capsys.readouterr().out
    assert min(row["differs"] for row in rows if row["contender"] == "wrong") > 0.1
    runs, errors, _ = first_calls(norm_case(), norm_case().inputs(), CpuClock(), ended=["torch"])
    assert list(runs) == ["eager"] and list(errors) == ["torch"]


def test_a_case_is_missing_until_all_its_contenders_have_rows():
    case = norm_case()
    rows = [{"op": case.op, "case": case.name, "contender": name, "error": ""} for name in ("torch", "eager")]
    assert measured_already(rows, case) == (True, set()) and measured_already(rows[:1], case) == (False, set())
    assert not measured_already([row | {"case": "other"} for row in rows], case)[0]
    died = rows[1] | {"case": "other", "error": f"{ENDED} with -11"}
    assert measured_already([rows[0], died], case) == (False, {"eager"})
    assert measured_already([died | {"op": "other"}], case) == (False, set())
    assert measured_already([died | {"case": case.name, "contender": EVERYBODY}], case)[0]  # while they took turns


def test_what_a_contender_does_to_its_inputs_is_not_seen():
    case = norm_case(greedy=lambda: lambda x, w: x.detach().zero_() * 0 + x * w)
    before = case.inputs()[0].detach().clone()
    measured(case)
    assert torch.equal(case.inputs()[0].detach(), before)


def test_differences():
    a, b = [torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])]
    assert difference(a, a) == 0 and difference(b, a) == pytest.approx(0.1)
    assert difference([torch.tensor([float("nan"), 0.0])], a) == difference([], a) == float("inf")


def test_rates_and_quartiles():
    assert rates((0, 0), 1.0, PEAKS) == {}
    assert rates((2e12, 0), 1.0, PEAKS) == {"percent": 50, "gb": 2000, "gb_s": 2000}
    assert rates((0, 2e14), 0.5, PEAKS) == {"percent": 50, "tflop": 200, "tflops": 400}
    assert quartiles([1.0]) == (1, 1, 1) and quartiles([4.0, 1.0, 2.0, 3.0, 5.0]) == (2, 3, 4)


def test_bytes_and_flops():
    """Of numbers that reference/kernels.md gives for an H200 at 4.3 TB/s and 788 TFLOP/s, in ms."""
    ms = {"copy": 4.3e9, "matmul": 7.88e11}

    def of(op, *arguments):
        module = importlib.import_module(f"benchmarks.bench_{op}")
        function = next(getattr(module, name) for name in ("bytes_moved", "cost", "flops") if hasattr(module, name))
        return {at: max(b / ms["copy"], f / ms["matmul"]) for at, (b, f) in function(*arguments).items()}

    assert of("rms_norm", 16384, 2048, 2, False) == pytest.approx({"forward": 0.031, "backward": 0.047}, rel=0.02)
    assert of("rms_norm", 16384, 2048, 2, True) == pytest.approx({"forward": 0.062, "backward": 0.062}, rel=0.02)
    assert of("glu", 16384, 8192, 2) == pytest.approx({"forward": 0.187, "backward": 0.312}, rel=0.01)
    assert of("rope", 16384, 40, 64, 2, False) == pytest.approx({"forward": 0.039, "backward": 0.039}, rel=0.01)
    assert of("linear_cross_entropy", 4096, 4096, 128256) == pytest.approx({"both": 16.4}, rel=0.01)
    assert of("cross_entropy", 16384, 128256, 2) == pytest.approx({"forward": 0.98, "backward": 1.95}, rel=0.01)
    # Llama-3.2-1B, 16 layers, one document of 16,384 tokens: 22.3 and 55.8 ms
    assert of("flash_attention", [16384], 32, 64) == pytest.approx(
        {"forward": 22.3 / 16, "backward": 55.8 / 16}, rel=0.01
    )
    assert of("adamw", 10**9, 4, 32) == pytest.approx({"forward": 28 / 4.3})
    assert of("adamw", 10**9, 2, 8) == pytest.approx({"forward": 10 / 4.3}, rel=0.01)
    assert of("quantize", 10**9, 2, 4) == pytest.approx({"forward": 2.516e9 / 4.3e9}, rel=0.001)


def test_documents_have_the_length_that_was_asked_for():
    from benchmarks.bench_flash_attention import document_lengths

    for mean in (300, 1024, 2048):
        lengths = document_lengths(16384, mean)
        assert sum(lengths) == 16384 and min(lengths) > 0 and 16384 / len(lengths) == pytest.approx(mean, rel=0.05)
    assert document_lengths(100, 100) == [100]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_every_case_runs(op, device):
    """The cases for a GPU too, with their tensors on the CPU: only what needs a GPU or another package may fail."""
    for case in importlib.import_module(f"benchmarks.bench_{op}").cases(device, True):
        plain = {name: make for name, make in case.contenders.items() if name in ("torch", "eager")}
        if device == "cuda":  # peers that need no GPU
            plain |= {name: make for name, make in case.contenders.items() if name.startswith("F.")}
        case = Case(case.op, case.name, case.inputs, plain, case.costs, case.returned_bytes)
        runs, errors, differs = first_calls(case, case.inputs(), CpuClock())
        assert runs.keys() == plain.keys() and not errors
        assert all(value < 0.02 for value in differs.values()), differs  # bf16 through a sum or two


def test_the_step_beside_its_peers_and_its_ceiling(tmp_path):
    """Ratios are those of the rounds, so that a slow round counts as one; the strongest peer is the one named."""

    def runs(*speeds, gb=2.0):
        return [{"speeds": [speed], "loss": 10.0, "peak_mb": gb * 1e9 / 2**20} for speed in speeds]

    engines = {"minisft": runs(100, 10, 100), "plain": runs(50, 5, 40, gb=4), "compiled": runs(80, 8, 80, gb=2.5)}
    engines["products"] = runs(200, 20, 100)
    rows = train_step.rows_of({(engine, "answers"): answers for engine, answers in engines.items()})
    assert [row["minisft_times"] for row in rows] == pytest.approx([1, 2, 1.25, 0.5])
    assert [row["tokens_per_second"] for row in rows] == [100, 40, 80, 100]
    ceiling, peer = train_step.summary(rows)
    assert "50.0% of the ceiling" in ceiling and "1.25 x compiled, in 80% of its memory" in peer
    assert train_step.summary(rows[1:]) == []
    write_csv("train_step", rows, tmp_path)
    written = read_csv(tmp_path / "train_step.csv")
    earlier = [row | {"date": "2000-01-01", "tokens_per_second": "1"} for row in written]
    of_another = [row | {"cpu": "another", "date": "2000-01-02"} for row in written]
    lines = report.step_table([*earlier, *of_another, *written]).splitlines()[2:]  # one run of each processor
    assert [line.split(" | ")[4] for line in lines] == ["-", "2.0 x", "1.2 x", "50%"] * 2
    assert [line.split(" | ")[0] for line in lines] == [f"| {written[0]['cpu']}"] * 4 + ["| another"] * 4


def test_micro_batches_as_others_have_them():
    """Each pack is a row; what fills it is scored nowhere, and is a document of its own at every place."""
    packs = [
        SimpleNamespace(
            input_ids=torch.tensor([5, 6, 7, 0]),
            position_ids=torch.tensor([0, 1, 0, 0]),
            start=torch.tensor([0, 0, 2, 3]),
            loss_rows=torch.tensor([0, 0]),
            targets=torch.tensor([6, -100]),
            num_tokens=3,
            num_targets=1,
        )
    ]
    rows = train_step.as_rows(packs)
    assert rows["input_ids"][0, :5].tolist() == [5, 6, 7, 0, 0] and rows["num_tokens"].tolist() == [3]
    assert rows["document"][0, :5].tolist() == [0, 0, 2, 3, 4] and rows["document"][0, -1] == train_step.MAX_LENGTH - 1
    assert rows["targets"][0, 0] == 6 and (rows["targets"][0, 1:] == -100).all()


# ---- preference tuning ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dpo_answers(tmp_path_factory):
    """Every case of minisft at tiny size, on rows that are made up; without the processes of their own."""
    folder = tmp_path_factory.mktemp("dpo")
    where = {"folder": str(folder), "size": "quick", "device": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_dpo, "PAIRS", folder / "absent.json")
        bench_dpo.make_inputs(**where)
    answers = {}
    for case in bench_dpo.CASES:
        answer = bench_dpo.minisft(layout=case[1], reference=case[2], **where)
        answers[case] = [answer | {"peak_mb": 1000.0}]
    return folder, answers


def test_every_case_of_dpo_counts_the_same_tokens_of_a_pair(dpo_answers):
    """Prompts that are shared count twice: what a pair has does not depend on how it is laid out."""
    folder, answers = dpo_answers
    pairs = json.loads((folder / "pairs.json").read_text())
    sizes = [2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs]
    size = bench_dpo.SIZES["quick"]
    assert len(sizes) == 2 * size["pairs"] and max(sizes) <= 2 * size["max_length"]
    by_layout = {layout: set() for layout in bench_dpo.LAYOUTS}
    for (_, layout, _), (answer,) in answers.items():
        by_layout[layout].add(tuple((step["tokens"], step["pairs"]) for step in answer["steps"]))
    assert all(len(found) == 1 for found in by_layout.values())  # whatever the reference
    (steps,) = by_layout["unpacked"]
    assert steps == ((sum(sizes[: size["pairs"]]), size["pairs"]),) * 2  # the first batch, twice
    (shared,) = by_layout["shared"]
    assert shared[0][0] / size["packs"] > 0.5 * size["max_length"]


def test_the_losses_of_dpo_do_not_depend_on_the_reference(dpo_answers):
    _, answers = dpo_answers
    for layout in bench_dpo.LAYOUTS:
        copy, cached, adapter = (
            [s["loss"] for s in answers["minisft", layout, r][0]["steps"]] for r in bench_dpo.REFERENCES
        )
        assert copy == pytest.approx(cached, rel=1e-6)
        assert copy[0] == adapter[0] == pytest.approx(math.log(2)) and copy[1] < 0.69


def test_rows_and_table_of_dpo(dpo_answers, tmp_path):
    _, answers = dpo_answers
    peer = {("trl", *case[1:]): runs for case, runs in answers.items() if case[1] == "unpacked" and case[2] != "cached"}
    rows = [bench_dpo.row_of(case, runs) for case, runs in (answers | peer).items()]
    for row, runs in zip(rows, (answers | peer).values()):
        assert row["tokens_per_second"] == pytest.approx(row["tokens_a_step"] / row["seconds_a_step"])
        # so small a model may fit into memory that the process has already: its extra megabytes can be none
        assert row["extra_mb"] == statistics.median(run["extra_mb"] for run in runs) and row["peak_mb"] == 1000
    write_csv("dpo_cpu", rows, tmp_path)
    head, _, *lines = report.dpo_table(read_csv(tmp_path / "dpo_cpu.csv")).splitlines()
    assert len(lines) == len(bench_dpo.CASES) and all(line.count("|") == head.count("|") for line in lines)
    assert "| 1.0 x |" in lines[0] and "| - | - |" in lines[3]  # copy, beside itself; cached, without a peer
    assert report.dpo_table(read_csv(tmp_path / "dpo_cpu.csv")) in report.block(tmp_path)


def test_turns_that_share_their_past(tmp_path):
    rows = bench_shared_turns.measure(4, "quick", "cpu", 1, tmp_path)
    apart, shared = rows
    assert apart["layout"] == "separate" and apart["documents"] == shared["documents"] == 16
    assert shared["tokens"] < apart["tokens"] and shared["fewer_tokens"] == apart["tokens"] / shared["tokens"]
    assert shared["loss_difference"] < 1e-6  # rounding of fp32 sums
    write_csv("shared_turns", rows, tmp_path)
    table = report.turns_table(read_csv(tmp_path / "shared_turns.csv"))
    assert len(table.splitlines()) == 3 and table in report.block(tmp_path)


def test_losses_of_both_trainers_are_compared():
    def run(*losses):
        return [{"steps": [{"loss": loss} for loss in losses]}]

    ours, theirs = ("minisft", "unpacked", "copy"), ("trl", "unpacked", "copy")
    assert bench_dpo.compare_losses({ours: run(0.69, 0.6)}, 1e-3) == []
    (same,) = bench_dpo.compare_losses({ours: run(0.69, 0.6), theirs: run(0.69, 0.6001)}, 1e-3)
    (other,) = bench_dpo.compare_losses({ours: run(0.69, 0.6), theirs: run(0.69, 0.61)}, 1e-3)
    assert "the same, 1.7e-04" in same and "NOT THE SAME" in other


# ---- the report ----------------------------------------------------------------------------------------------------

LOSS, ATTENTION = "4096 x 4096 x 128256 bf16", "packed, head dim 128, mean length 300, 16384 tokens, 32 + 8 heads, bf16"


def gpu_rows():
    def row(op, case, contender, at, ms, **more):
        return {"op": op, "case": case, "contender": contender, "pass": at, "ms": ms, **more}

    return [
        row("linear_cross_entropy", LOSS, "triton", "both", 17.5, beside_gb=1.4, extra_mb=5000.0, percent=93.0),
        row("linear_cross_entropy", LOSS, "liger", "both", 141.0, extra_mb=3000.0),
        row("flash_attention", ATTENTION, "triton", "both", 2.0),
        row("flash_attention", ATTENTION, "torch varlen", "both", 3.0),
        row("rms_norm", "16384 x 4096 bf16", "triton", "forward", 0.07, percent=89.9),
        row("add_rms_norm", "16384 x 4096 bf16", "triton", "forward", 0.07, percent=50.0),
        {"op": "rope", "case": "small", "contender": "triton", "error": "RuntimeError: no"},
    ]


def test_targets_are_judged(tmp_path):
    write_csv("kernels_cuda", gpu_rows(), tmp_path)
    rows = read_csv(tmp_path / "kernels_cuda.csv")
    found = {(row["op"], row["pass"], row["column"]): row for row in report.judged(rows)}
    assert found["linear_cross_entropy", "both", "ms"]["met"] is True
    assert found["linear_cross_entropy", "both", "beside_gb"]["met"] is False
    assert found["flash_attention", "both", report.VARLEN]["value"] == 1.5
    assert found["rms_norm", "forward", "percent"]["met"] is False
    assert (
        found["rms_norm", "backward", "percent"]["met"] is None and found["rope", "forward", "percent"]["met"] is None
    )
    text = report.target_table(rows)
    assert f"| linear_cross_entropy | {LOSS} | forward + backward | 17.5 ms | at most 18 ms | yes |" in text
    assert "| 89.9 % | at least 90 % | **no** |" in text
    assert "liger 141 (8.06 x)" in report.gpu_table(rows) and "| rope | small | failed |" in report.gpu_table(rows)


def test_the_newest_row_counts_and_columns_may_be_added(tmp_path):
    for ms in (2.0, 1.0):
        write_csv(
            "kernels_cpu",
            [
                {"op": "a", "case": "b", "contender": n, "pass": "both", "ms": ms, "speedup": 1.0}
                for n in ("torch", "eager")
            ],
            tmp_path,
        )
    write_csv("kernels_cpu", [{"op": "c", "case": "d", "contender": "torch", "error": "no"}], tmp_path)
    rows = read_csv(tmp_path / "kernels_cpu.csv")
    assert len(rows) == 5 and rows[0]["error"] == "" and rows[0]["commit"] and not list(tmp_path.glob("*.tmp"))
    assert report.cpu_table(rows).splitlines()[2:] == ["| a | b | 1 / 1 ms | 1.00 x | ? / ? MB |"]


def test_what_was_not_measured_is_said_to_be_so(tmp_path):
    text = report.block(tmp_path)
    assert text.startswith("Not yet measured: ") and text.count("`python -m ") == len(report.SECTIONS)
    assert report.highlights(tmp_path) == ""
    write_csv("kernels_cuda", gpu_rows(), tmp_path)
    text = report.block(tmp_path)
    assert "on a GPU beside others" in text.partition("Not yet")[0] and text.count("Not yet measured") == 1


def test_the_block_stands_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.write_block(readme, "new")
        assert readme.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    for bad in ("no markers", f"{report.END}\n{report.BEGIN}", f"{report.BEGIN}\n{report.BEGIN}\n{report.END}"):
        readme.write_text(bad)
        with pytest.raises(ValueError, match="once each"):
            report.write_block(readme, "new")
        assert readme.read_text() == bad


def test_the_pages_say_what_the_results_say():
    """`python -m benchmarks.report` writes the tables; by hand they would grow old."""
    text = (Path(report.ROOT) / "README.md").read_text(encoding="utf-8")
    assert text.partition(report.BEGIN)[2].partition(report.END)[0].strip() == report.highlights()
    text = (Path(report.ROOT) / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert text.partition(report.BEGIN)[2].partition(report.END)[0].strip() == report.block()
    text = (Path(report.ROOT) / "docs" / "step_on_paper.md").read_text(encoding="utf-8")
    assert text.partition(report.BEGIN)[2].partition(report.END)[0].strip() == report.paper_block()
    text = report.PROMISES.read_text(encoding="utf-8")
    assert text.partition(report.BEGIN)[2].partition(report.END)[0].strip() == report.reliability_block()
    for op in report.KERNEL_PAGES:
        text = (Path(report.ROOT) / "docs" / "kernels" / f"{op}.md").read_text(encoding="utf-8")
        assert text.partition(report.BEGIN)[2].partition(report.END)[0].strip() == report.kernel_block(op)


def test_the_table_of_steps_on_paper_has_the_newest_of_each(tmp_path):
    def step(launches, **settings):
        case = dict(
            model="m", card="c", tokens=2048, accumulation=1, optimizer="adamw", weights_dtype="fp32", lora=None
        )
        sizes = dict(waits=3, launches=launches, bytes=5e9, flops=7e12, roofline_ms=4.0, floor_ms=3.0, ms=6.0)
        return [case | settings | sizes | {"part": part} for part in ("matmuls", "all")]

    write_csv("step_on_paper", step(10) + step(20, lora=16, accumulation=2) + step(9), tmp_path)
    lines = paper_report.paper_table(read_csv(tmp_path / "step_on_paper.csv")).splitlines()
    rest = "| 3 | 5 GB | 7.0 TFLOP | 4 ms | 3 ms | 6 ms | 50% |"
    assert lines[2:] == [
        f"| m, c, 2,048 tokens, adamw, fp32 weights | 9 {rest}",
        f"| m, c, 2 x 2,048 tokens, adamw, fp32 weights, LoRA 16 | 20 {rest}",
    ]
    assert [len(step) for step in paper_report.newest_steps(read_csv(tmp_path / "step_on_paper.csv"))] == [2, 2]


@pytest.mark.slow
def test_ranks_of_all_kinds_take_the_same_steps(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["bench_ranks", "--quick", "--only", "ddp", "torch"])
    bench_ranks.main()  # it compares the losses
    said = capsys.readouterr().out
    cases = {line.partition("  ")[0] for line in said.splitlines() if line.startswith(("ddp", "torch"))}
    assert cases == {"ddp", "torch ddp", "torch fsdp2", "ddp, LoRA", "ddp, 4 ranks"}


def test_a_contender_with_other_losses_is_named():
    rows = [{"case": case, "ranks": 2, "loss": loss} for case, loss in (("ddp", 5.0), ("torch ddp", 5.001))]
    with pytest.raises(SystemExit, match="ddp and torch ddp: losses"):
        bench_ranks.require_equal_losses(rows)
    bench_ranks.require_equal_losses([rows[0], rows[1] | {"ranks": 4}])


def test_an_op_prints_a_table_of_100_columns_and_what_it_shows():
    common = {"op": "rms_norm", "case": "4096 x 2048 bf16", "differs": 3e-3}
    rows = [
        common | {"contender": name, "pass": at, "ms": ms * share, "percent": 10.0, "extra_mb": mb, "speedup": 40 / ms}
        for name, ms, mb in (("torch", 10.0, 144.0), ("eager", 40.0, 224.0))
        for at, share in (("forward", 0.25), ("both", 1.0))
    ]
    rows.append({"op": "rms_norm", "case": common["case"], "contender": "liger", "error": "not here: " + "x" * 200})
    lines = op_table.op_table(rows).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.split() == "torch 2.5 ms 10 ms 4.00 x 144 MB 10 % 3e-03".split() for line in lines)
    assert lines[-1] == "rms_norm: torch is 4 times as fast as the naive formula, in 64.3 % of its memory."
    rows += [row | {"contender": "triton", "percent": 93.0, "ms": row["ms"] / 8, "speedup": 8.0} for row in rows[2:4]]
    says = "rms_norm: triton is 8 times as fast as the naive formula, in 100 % of its memory, at 93 % of the ceiling."
    assert op_table.op_table(rows).endswith(says) and says not in op_table.op_table(rows, is_quick=True)


def test_a_wide_table_is_printed_in_parts(capsys):
    rows = [{"case": f"case {i}", "threads": 2} | {f"number_{c}_mb": 1000 * i + c for c in range(12)} for i in range(3)]
    print_table(rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100 and out.startswith("threads: 2\n")
    assert all(out.count(f"number {c}, MB") == 1 for c in range(12)) and out.count("case 2") == 2


@pytest.mark.parametrize(
    "words", [[], ["--lora", "4"], ["--only", "minisft", "products"], ["--trained", "answers"]], ids=str
)
def test_only_whole_runs_go_into_the_csv(words, monkeypatch, tmp_path, capsys):
    """The tables show all engines of the newest run."""
    monkeypatch.setattr(train_step, "GSM8K", tmp_path)
    monkeypatch.setattr(train_step.importlib.util, "find_spec", lambda name: True)
    answer = {"speeds": [10.0], "loss": 1.0, "peak_mb": 1.0}
    monkeypatch.setattr(train_step, "in_fresh_process", lambda *target, **arguments: answer)
    monkeypatch.setattr(train_step, "write_csv", lambda name, rows: f"{len(rows)} rows of {name}")
    monkeypatch.setattr("sys.argv", ["train_step", *words])
    train_step.main()
    whole = {(): "written to 10 rows of train_step", ("--lora", "4"): "written to 10 rows of train_step_lora"}
    assert capsys.readouterr().out.splitlines()[-1].startswith(whole.get(tuple(words), "not written"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["naive", "minisft"])
def test_memory_over_a_step_is_sampled(engine):
    answer = in_fresh_process("benchmarks.step_memory:sample", step_memory.FREED, engine=engine)
    assert len(answer["curve"]) > 5 and max(mb for _, mb in answer["curve"]) > 30
    assert 0 < answer["ends"][0] < answer["ends"][1] < answer["ends"][2] == 1
