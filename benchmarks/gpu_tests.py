"""A plugin of pytest for gpu_session.py: which tests of tests/test_gpu.py run, and a row of tests.csv for each as it ends.

    GPU_TESTS=core GPU_TESTS_OUT=DIR python -m pytest -p benchmarks.gpu_tests tests/test_gpu.py -m gpu -o addopts=

Tests that have a row already do not run again. A test that takes longer than PATIENCE_S ends its process, and so does one
after which CUDA answers with errors: every later test would fail in it too.
"""

import faulthandler
import os
import sys
from pathlib import Path

import pytest

from benchmarks.harness import ENDED, read_csv, write_csv

PATIENCE_S = 45
CORE = """
    test_against_the_formula[rms_norm 4096-bf16]
    test_against_the_formula[add_rms_norm-bf16]
    test_against_the_formula[rope with norms-bf16]
    test_against_the_formula[swiglu-bf16]
    test_against_the_formula[cross_entropy 151936-bf16]
    test_against_the_formula[linear_cross_entropy, stats-bf16]
    test_the_summed_linear_loss[bf16]
    test_attention_against_the_formula[head dim 64-bf16-one pass]
    test_attention_against_the_formula[head dim 128-bf16-one pass]
    test_attention_against_the_formula[head dim 128-bf16-deterministic]
    test_attention_against_the_formula[head dim 256-bf16-deterministic]
    test_attention_against_the_formula[window-bf16-one pass]
    test_attention_against_the_formula[short documents, 128-bf16-one pass]
    test_a_rotary_embedding_inside_of_attention[128-halves-one pass]
    test_layers_of_attention_one_after_another[128]
    test_pairs_that_share_their_prompt[64-{}-bf16-one pass]
    test_attention_over_one_long_document[128]
    test_nothing_leaks_between_documents[128-one pass]
    test_packed_equals_one_by_one
    test_attention_repeats_bitwise_if_asked[128]
    test_one_graph_serves_every_packing
    test_nobody_waits_for_the_gpu[rms_norm 4096]
    test_nobody_waits_for_the_gpu[linear_cross_entropy, none]
    test_nobody_waits_for_the_gpu[attention]
    test_nobody_waits_for_the_gpu_in_the_optimizer
    test_adamw_is_that_of_the_formula[fp32-fp32 moments]
    test_adamw_is_that_of_the_formula[bf16, by chance-8-bit moments]
    test_four_bits_are_those_of_the_torch_path[bf16-nf4-8-bit scales]
    test_the_short_convolution[bf16]
    test_the_gated_delta_rule[bf16-(2, 4, 128, 128)]
    test_a_whole_model_by_the_kernels_is_that_of_the_formulas[llama]
    test_against_the_formula[layer_norm-bf16]
"""
CORE_TESTS = [line.strip() for line in CORE.strip().splitlines()]
LARGE = ("test_offsets_beyond", "test_the_linear_loss_takes_the_memory")  # 12 to 40 GB: they run alone


def kind(test: str) -> str:
    """ "core", "large" or "other"."""
    return "core" if test in CORE_TESTS else "large" if test.startswith(LARGE) else "other"


def pytest_collection_modifyitems(items) -> None:
    known = {row["test"] for row in read_csv(Path(os.environ["GPU_TESTS_OUT"]) / "tests.csv")}
    chosen = [item for item in items if kind(item.name) == os.environ["GPU_TESTS"] and item.name not in known]
    items[:] = sorted(chosen, key=lambda item: CORE_TESTS.index(item.name) if item.name in CORE_TESTS else 0)


def pytest_runtest_logstart() -> None:
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True, file=sys.__stderr__)


def pytest_runtest_logfinish() -> None:
    faulthandler.cancel_dump_traceback_later()


class Rows:
    """Only where all results arrive: with xdist, not in the processes that run the tests."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            lines = [line for line in report.longreprtext.splitlines() if line.strip()]
            errors = [line[1:].strip() for line in lines if line.startswith("E ")]
            reason = "" if report.outcome == "passed" else [*errors, *lines[-1:], ""][0][:300]
            outcome = "skipped" if reason.startswith("ModuleNotFoundError") else report.outcome
            row = {"test": report.nodeid.partition("::")[2], "kind": os.environ["GPU_TESTS"], "outcome": outcome}
            write_csv(
                "tests", [row | {"seconds": report.duration, "reason": reason}], Path(os.environ["GPU_TESTS_OUT"])
            )


def pytest_configure(config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Rows())


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which would fail
def pytest_runtest_teardown() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception as error:  # whatever CUDA says
            print(f"the test {ENDED}: {error}", file=sys.__stderr__, flush=True)
            os._exit(70)
