"""Shared by all tests: determinism, few threads, no network, Triton's interpreter where there is no GPU."""

import gc
import importlib
import os
import signal
from collections import Counter, defaultdict
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as in train.py: before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on a busy machine, small tensors on two threads take minutes

import pytest
import torch

from minisft.heap import TUNABLES
from minisft.signals import SIGNALS

os.environ.setdefault("GLIBC_TUNABLES", TUNABLES)  # for commands that tests start: each would start again with them
gc.disable()  # until all tests are collected: millions of objects that stay, looked through again and again
os.fsync = lambda descriptor: None  # no test cuts the power, and those about fsync put their own in its place

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

if find_spec("hypothesis") is not None:  # a machine with a GPU may have no more than pytest
    from hypothesis import settings
    from hypothesis.internal.conjecture import providers

    settings.register_profile("search", deadline=None)

    def pytest_configure(config) -> None:
        """Hypothesis draws the same examples in every run. `--hypothesis-profile=search` draws others each time."""
        if config.getoption("--hypothesis-profile") is None:
            settings.load_profile("ci")
            # It also draws constants that it finds in our modules that are loaded: in another order of tests other ones.
            providers._get_local_constants = lambda: providers.Constants()


@pytest.hookimpl(optionalhook=True)  # the tests run without xdist too, with `-o addopts=-q`
def pytest_xdist_auto_num_workers(config) -> int:
    """How many processes `-n auto` in pyproject.toml starts: one a core, up to 4, for the whole suite. None (0) for tests that
    are named on the command line, and none where there is a GPU, which tests in parallel would have to share."""
    is_whole_suite = config.args_source is config.ArgsSource.TESTPATHS
    return min(os.cpu_count(), 4) if is_whole_suite and not torch.cuda.is_available() else 0


# Tests that are not `quick` unless they are marked so: files of whole runs, files that import a large library
# or start processes, and single tests with thousands of examples.
NOT_QUICK = (
    *("test_compile.py", "test_full_disk.py", "test_gpu_session.py", "test_kernel_cache.py", "test_train_step_gpu.py"),
    *("test_control.py", "test_out_of_memory.py", "test_parallel.py", "test_signals.py", "test_spikes.py"),
    *("test_dpo_run.py", "test_hub.py", "test_lora_run.py", "test_optim_memory.py", "test_qlora.py"),
    *("test_gpu_ranks.py", "test_launch.py", "test_shared_packs.py", "test_stream.py"),
    *("test_ranks.py", "test_reference.py", "test_resume.py", "test_run.py", "test_stages.py"),
    *("test_report.py", "test_selfcheck.py", "test_push.py", "test_intervals.py", "test_naive.py"),
    *("test_stream_mix.py", "test_stream_ledger.py", "test_ledger.py", "test_saver.py", "test_context_parallel.py"),
    *(
        "test_start_from_adapter.py",
        "test_step_on_paper.py",
        "test_trainable.py",
        "transformers",
        "peft",
        "bitsandbytes",
    ),
    "test_the_kernels_import_without_triton_and_do_not_load_it_for_a_cpu",
    "test_as_toml_is_read_back_by_a_toml_reader",
    "test_the_triton_kernels_give_the_same_step",
    "test_the_full_model_never_stands_in_memory",
    "test_every_case_of_dpo_counts_the_same_tokens_of_a_pair",
    "test_the_losses_of_dpo_do_not_depend_on_the_reference",
    "test_a_format_a_loss_a_schedule_and_an_optimizer_are_added_by_an_entry",
    "test_oldest_turns_are_cut_as_few_as_possible",
    "test_real_data_has_no_unexplained_drop",
    "test_real_pairs_are_used_to_the_last_row",
    "test_our_files_are_theirs_byte_by_byte",
    "test_the_package_imports_nothing_until_a_name_is_used",
    "test_retention_keeps_the_newest_whole_ones_and_touches_nothing_else",
    "test_early_stopping_ends_the_run_and_survives_a_resume",
    "test_what_is_accepted_is_what_the_standard_library_accepts_without_its_extras",
    "test_template_files_replace_those_in_the_config",
    "test_rows_and_table_of_dpo",
    "test_we_read_theirs",
    "test_whole_runs_agree_over_splits",
    "test_no_circle",
    "test_the_engine_reads_every_key",
    "test_joint_and_turn_by_turn_train_the_same",
    "test_real_data_is_used_to_the_last_row",
    "test_dropout_keeps_the_mean_and_its_gradient_uses_the_same_draw",
    "test_malformed_files_are_told_without_a_traceback",
    "test_many_changes_at_once",
    "test_layers_that_were_left_out_stay_plain",
    "test_a_run_killed_before_its_samples_completes_them_at_the_next_start",
    "test_flags_and_weights_of_messages",
    "test_whole_runs_end_in_the_same_bytes",
    "test_part_spans_are_the_parts_that_say_how_they_are_trained",
    "test_no_key_vanishes_and_no_value_is_wrong",
    "test_every_row_and_token_is_accounted_for",
    "test_the_account_closes",
    "test_overflows_of_fp16_end_a_run_once_the_scale_is_below_1",
    "test_hundreds_of_tiny_tensors_in_one_launch",
    "test_a_crash_at_any_file_operation_leaves_the_old_or_the_new_checkpoint",
    "test_low_precision_learns_like_fp32",
    "test_tr_dpo_starts_again_at_ln_2",
    "test_a_chosen_template_is_the_only_one_that_is_saved",
    "test_one_stage_is_a_list_too",
    "test_a_path_goes_back_to_that_checkpoint",
    "test_a_real_vocabulary",
    "test_a_row_of_all_private_characters_is_refused",
    "test_torch_chooses_the_kernels_that_repeat",
    "test_every_target_is_trained_as_in_its_own_document",
    "test_training_imports_no_compiler",
    "test_the_cheapest_change_changes_no_more_than_it_must",
    "test_few_shapes_are_multiplied",
)


# Files that take longest come first, so that no process is left with one of them at the end.
LONGEST = """
    dpo_run ranks resume stages golden triton_flash_attention parallel optim_memory out_of_memory qlora spikes step_on_paper
    loop lora model trajectories micro_batch dpo
""".split()


def values_of(case) -> list[tuple]:
    """(number of the axis, identities of its objects) for each `parametrize` and each fixture with parameters."""
    params = {name: id(value) for name, value in case.callspec.params.items()}
    axes = [mark.args[0] for mark in case.iter_markers("parametrize")]
    axes = [names.replace(" ", "").split(",") if isinstance(names, str) else names for names in axes]
    axes += [[name] for name in params if not any(name in names for names in axes)]
    return [(axis, *(params[name] for name in names)) for axis, names in enumerate(axes)]


def leave_the_rest_to_slow(items) -> None:
    """Of a test that is marked covers(n) the normal run has cases in which any n values of n axes meet; the others are slow.
    Taken each time: the case with the most that has not met, of these the one whose values were used least."""
    cases_of = defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("covers"):
            cases_of[item.nodeid.partition("[")[0], *mark.args].append(item)
    for (_, n), cases in cases_of.items():
        values = {case: values_of(case) for case in cases}
        meetings = {case: {*combinations(values[case], n)} for case in cases}
        missing, used = set().union(*meetings.values()), Counter()
        while missing:
            best = max(cases, key=lambda case: (len(meetings[case] & missing), -sum(used[v] for v in values[case])))
            missing -= meetings[best]
            used.update(values[best])
            cases.remove(best)
        for case in cases:
            case.add_marker("slow")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items) -> None:
    """Sorts by LONGEST, leaves cases to `slow`, and marks `quick`: of every other test the first case."""
    order = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    leave_the_rest_to_slow(items)
    seen = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_long = any(word in test for word in NOT_QUICK) or any(map(item.get_closest_marker, ("slow", "gpu")))
        if test not in seen and not is_long:
            item.add_marker("quick")
        seen.add(test)


def pytest_collection_finish() -> None:
    """What is there now stays to the end, so no collection looks at it again; one took 0.3 s, and a run collects itself."""
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000, 10, 20)  # by default every 700 objects, and often through all that is imported by a test
    gc.freeze = gc.unfreeze = lambda: None  # the token cache freezes and thaws everything


@pytest.fixture(autouse=True)
def _seed():
    # torch.manual_seed formats the stack of calls where CUDA is not in use: half a millisecond in each of 6,000 tests
    torch.manual_seed(0) if torch.cuda.is_initialized() else torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _signal_handlers():
    """A command that was stopped ignores signals until its process has ended, and here that is the process of the tests."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
            x.detach().fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)
            return x

        return poisoned

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
