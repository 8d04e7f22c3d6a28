"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP in every phase of a run: exit code 75, nothing half written, in the end the same bytes."""

import json
import os
import pkgutil
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from test_dpo_run import write_pairs
from test_ranks import free_port, join
from test_resume import assert_same, files, outcome, saved
from tiny import settings, start, train_quietly, write_rows

from minisft import __main__, loop, signals
from minisft import train as command
from minisft.atomic_folder import atomic_folder
from minisft.config.values import as_toml
from minisft.errors import STOPPED, Stopped
from minisft.signals import SIGNALS, StopSignal

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _terminal_may_close():
    """Under nohup a process and those that it starts ignore SIGHUP, which these tests send."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


# ---- the object alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_at_once_it_raises_and_noted_it_waits(number, capfd):
    with StopSignal("here", STOPPED) as stop:
        with pytest.raises(Stopped, match=f"^stopped by {number.name} here$") as caught:
            signal.raise_signal(number)
    assert caught.value.exit_code == STOPPED and isinstance(caught.value, KeyboardInterrupt)
    with StopSignal() as stop:
        stop.note("saving")
        signal.raise_signal(number)
        assert stop.received == number.name
        with pytest.raises(Stopped) as caught:  # from now on it would end the process, and it is there already
            stop.end_at_once("there")
        assert caught.value.exit_code == 128 + number
    assert capfd.readouterr().err == f"\nminisft: {number.name}: saving; once more quits at once\n"


def test_one_signal_that_is_delivered_twice_is_one(monkeypatch):
    with StopSignal() as stop:
        stop.note("saving")
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(signals, "SAME_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGTERM)
    assert not isinstance(caught.value, Stopped)


def test_one_that_a_library_swallows_stops_before_the_first_step():
    with StopSignal() as stop:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # noqa: B036 - a library may do so
            pass
        with pytest.raises(Stopped):
            stop.note("saving")


def test_handlers_come_back_and_other_threads_have_none():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]

        def enter():
            with StopSignal() as stop:
                assert stop._previous == {}

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


STUCK = """
import ctypes, sys, time
from minisft import errors, signals
signals.UNWIND_SECONDS = 0.05
def command():
    with signals.StopSignal("here", errors.STOPPED, is_command=True) as stop:
        if sys.argv[1] == "noted":  # then the thread leaves it alone
            stop.note("saving")
        print("ready", flush=True)
        if sys.argv[1] == "noted":
            while stop.received is None:
                time.sleep(0.01)
            time.sleep(0.3)
            return 5
        mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex), lock(mutex)  # waits for ever in C, where no handler of Python is called
sys.exit(errors.run_command(command))
"""


@pytest.mark.parametrize("how", ["stuck", "noted"])
def test_a_thread_ends_a_command_that_is_stuck_in_a_library(how):
    arguments = [sys.executable, "-c", STUCK, how]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(arguments, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    expected = {
        "stuck": (STOPPED, "minisft: stopped by SIGTERM here\n"),
        "noted": (5, "\nminisft: SIGTERM: saving; once more quits at once\n"),
    }
    assert (process.returncode, said) == expected[how]


CLOSED = """
import pathlib, sys, time
from minisft import errors, signals
def command():
    with signals.StopSignal("here", errors.STOPPED, is_command=True) as stop:
        stop.note("saving")
        print("ready", flush=True)
        while stop.received is None:
            time.sleep(0.01)
        print("after the terminal", flush=True)
        pathlib.Path(sys.argv[1]).write_text(stop.received)
sys.exit(errors.run_command(command))
"""


def test_a_terminal_that_closes_stops_a_run_which_then_saves(tmp_path):
    """What it prints afterwards would be errors of the disk (EIO)."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.execl(sys.executable, sys.executable, "-c", CLOSED, tmp_path / "said")
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    assert (tmp_path / "said").read_text() == "SIGHUP"


def test_nohup_keeps_its_word():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.received is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_that_does_not_train_ends_in_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, number):
    def main(argv):
        with atomic_folder(tmp_path / "merged") as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            signal.raise_signal(number)

    monkeypatch.setattr("minisft.commands.export.main", main)
    assert __main__.main(["export"]) == 128 + number
    assert capsys.readouterr().err == f"minisft: stopped by {number.name}\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == signal.SIG_IGN  # until the process has ended


UNREAD = """
import signal, sys
from minisft import console, errors, signals
def command():
    with signals.StopSignal("here", errors.STOPPED, is_command=True) as stop:
        stop.note("saving, then stopping")
        sys.stdin.readline()  # the reader of the output has ended
        if sys.argv[1]:
            signal.raise_signal(signal.Signals[sys.argv[1]])
        bar = console.ProgressBar(0, 10, True, stop.lose_reader)
        bar.say("step 1/10")
        bar.say("step 2/10")
        print("stopped", flush=True)
        with open(sys.argv[2], "w") as file:
            file.write(stop.received)
    return errors.STOPPED
sys.exit(errors.run_command(command))
"""


@pytest.mark.parametrize(
    ("sent", "stderr", "received"), [("SIGINT", subprocess.STDOUT, "SIGINT"), ("", subprocess.DEVNULL, "SIGPIPE")]
)
def test_a_run_whose_output_is_no_longer_read_saves_and_stops(tmp_path, sent, stderr, received):
    """Ctrl-C ends `tee` in `train run.toml 2>&1 | tee log` too: the run then ended at its next line, without a save."""
    process = subprocess.Popen(
        [sys.executable, "-c", UNREAD, sent, str(tmp_path / "received")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
    )
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(60) == 75
    assert (tmp_path / "received").read_text() == received


def test_a_signal_while_torch_is_imported(tmp_path):
    settings(tmp_path)
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Finder())
from minisft.train import main
sys.exit(main(sys.argv[1:]))
"""
    arguments = [sys.executable, "-c", code, config_file(tmp_path, settings(tmp_path))]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    said = "minisft: stopped by SIGTERM before the first step; the same command starts again\n"
    assert (done.returncode, done.stderr) == (STOPPED, said)
    assert not (tmp_path / "out").exists()


# ---- whole runs -------------------------------------------------------------------------------------------------

RUN = {
    "data.eval_fraction": 0.2,
    "evaluate.eval_on_start": True,
    "evaluate.eval_steps": 2,
    "evaluate.per_device_eval_batch_size": 2,  # six batches
    "evaluate.load_best_model_at_end": True,
    "evaluate.max_new_tokens": 4,
    "train.lr_scheduler_type": "reduce_on_plateau",
    "train.lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5},  # the rate depends on every evaluation
    "train.max_steps": 7,
    "checkpoint.save_steps": 3,
    "log.logging_steps": 3,
}


def config_file(folder: Path, keys: dict) -> str:
    (folder / "run.toml").write_text("".join(f"{key} = {as_toml(value)}\n" for key, value in keys.items()))
    return str(folder / "run.toml")


def signals_at(patch, target: str, call: int = 1, times: int = 1) -> None:
    """The process gets SIGTERM when a function is called for the `call`-th time."""
    room, _, name = target.rpartition(".")
    honest, count = getattr(pkgutil.resolve_name(room), name), 0

    def function(*arguments, **options):
        nonlocal count
        count += 1
        if count == call:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return honest(*arguments, **options)

    patch.setattr(target, function)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.name.startswith((".tmp-", ".del-"))]


BEFORE_STEPS = {  # phase: the function that is interrupted
    "hash": "minisft.data.cache.hash_blocks",
    "tokenise": "minisft.data.tokenise.raw_encodings",  # in a thread
    "cache": "minisft.data.cache._append",
    "load": "minisft.prepare.run.prepare_model",
    "reference": "minisft.preference.reference.Reference.logps",
    "logs": "minisft.loop.start_output",
}


def test_before_the_first_step_it_ends_at_once(tmp_path, monkeypatch, capfd):
    """Preference tuning has all phases. One start is stopped in each, and the next one is not disturbed by it."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", count=8)
    keys = {
        "data.train_data": str(pairs),
        "trainer_type": "dpo",
        "dpo.precompute_ref_log_probs": True,
        "train.max_steps": 1,
    }
    whole = config_file(tmp_path, settings(tmp_path, **keys, output_dir=str(tmp_path / "whole" / "out")))
    assert command.main([whole]) == 0
    config = config_file(tmp_path, settings(tmp_path, **keys))
    for phase, target in BEFORE_STEPS.items():
        capfd.readouterr()
        with monkeypatch.context() as patch:
            signals_at(patch, target)
            assert command.main([config]) == STOPPED, phase
        assert (
            capfd.readouterr().err
            == "minisft: stopped by SIGTERM before the first step; the same command starts again\n"
        )
        assert leftovers(tmp_path) == [] and saved(tmp_path / "out") == [], phase
    assert command.main([config]) == 0
    assert_same(outcome(tmp_path / "out"), outcome(tmp_path / "whole" / "out"))


def in_evaluation(patch, number: int) -> None:
    """SIGTERM after three batches of the evaluation of this number in the process."""
    honest, count = loop.evaluate, 0

    def evaluate(model, loader, loss, *arguments):
        nonlocal count
        count += 1
        batches = 0

        def counted(*of_loss):
            nonlocal batches
            batches += 1
            if batches == 3 and count == number:
                os.kill(os.getpid(), signal.SIGTERM)
            assert batches < 5 or count != number, "the evaluation goes on"
            return loss(*of_loss)

        return honest(model, loader, counted, *arguments)

    patch.setattr(loop, "evaluate", evaluate)


def test_stopped_in_every_phase_it_ends_in_the_same_bytes(tmp_path, monkeypatch, capfd):
    settings(tmp_path)
    keys = RUN | {"evaluate.generate_data": str(tmp_path / "rows.jsonl[:8]")}
    whole = config_file(tmp_path, settings(tmp_path, **keys, output_dir=str(tmp_path / "whole")))
    assert command.main([whole]) == 0
    config, out = config_file(tmp_path, settings(tmp_path, **keys)), tmp_path / "out"

    def stopped_at(interrupt, *arguments, code=STOPPED) -> tuple[int, int, str]:
        """(the step of the newest checkpoint, the last evaluated step in it, all that was said)"""
        capfd.readouterr()
        with monkeypatch.context() as patch:
            interrupt(patch, *arguments)
            assert command.main([config]) == code
        assert leftovers(tmp_path) == []
        state = json.loads((saved(out)[-1] / "trainer_state.json").read_text()) if saved(out) else {}
        said = capfd.readouterr()
        return state.get("step", 0), state.get("evaluated_at", -1), " ".join((said.out + said.err).split())

    step, evaluated, said = stopped_at(in_evaluation, 1)  # on start
    assert (step, evaluated) == (
        0,
        -1,
    ) and "stopped by SIGTERM before the first step; the same command starts again" in said
    step, evaluated, said = stopped_at(in_evaluation, 2)
    assert (step, evaluated) == (2, 0) and "SIGTERM: giving up this evaluation, which the next start makes" in said
    assert "stopped by SIGTERM after step 2 of 7" in said
    step, evaluated, said = stopped_at(
        signals_at, "minisft.loop.train_step", 2
    )  # step 4, whose evaluation is not begun
    assert (step, evaluated) == (4, 2) and "SIGTERM: saving at the end of a step" in said
    step, evaluated, said = stopped_at(signals_at, "minisft.saver.new_checkpoint")
    assert (step, evaluated) == (6, 6) and "SIGTERM: stopping once a checkpoint is written" in said  # no step follows
    with monkeypatch.context() as patch:  # both signals come into the save of step 7
        patch.setattr(signals, "SAME_SECONDS", -1.0)
        before = files(saved(out)[-1])
        step, _, said = stopped_at(lambda inner: signals_at(inner, "minisft.saver.new_checkpoint", times=2), code=130)
    assert step == 6 and said.endswith("minisft: interrupted") and files(saved(out)[-1]) == before
    step, evaluated, said = stopped_at(in_evaluation, 1)
    assert (step, evaluated) == (7, 6) and not (out / "model").exists()
    step, evaluated, said = stopped_at(signals_at, "minisft.samples.generate", 1)
    assert "stopped by SIGTERM before the held-out prompts were completed; the model is written" in said
    assert (out / "model").exists() and not (out / "samples.jsonl").exists()
    assert command.main([config]) == 0

    ours, theirs = outcome(out), outcome(tmp_path / "whole")
    for outcomes in (ours, theirs):  # the last checkpoint was written before its evaluation
        state = outcomes["state"]
        del state["evaluated_at"], state["metrics.jsonl"], state["best"], state["plateau"]
    assert_same(ours, theirs)
    assert (out / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


def test_a_stage_is_prepared_like_a_run_of_its_own(tmp_path, monkeypatch, capfd):
    """What is noted while the first stage trains ends the process at once while the second one is prepared."""
    keys = settings(tmp_path, **{"train.max_steps": 1})
    config = config_file(tmp_path, keys | {"stages": [{"train.seed": 1}, {"train.seed": 2}]})
    with monkeypatch.context() as patch:
        signals_at(patch, "minisft.prepare.run.prepare_model", 2)
        assert command.main([config]) == STOPPED
    assert (
        capfd.readouterr().err == "minisft: stopped by SIGTERM before the first step; the same command starts again\n"
    )
    assert (tmp_path / "out/1-sft/model").exists() and not (tmp_path / "out/2-sft/checkpoints").exists()


# ---- ranks ------------------------------------------------------------------------------------------------------


def rank_of_two(folder: Path, overrides: dict, rank: int, port: int) -> None:
    """What one of two processes does; rank 1 gets a signal in its second evaluation."""
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            in_evaluation(patch, 2)
        train_quietly(folder, overrides)


def test_ranks_give_an_evaluation_up_together(tmp_path):
    """Otherwise the rank without a signal would wait for the other one's sums for half an hour."""
    keys = RUN | {
        "train.per_device_train_batch_size": 4,
        "data.eval_fraction": 0.4,
        "output_dir": str(tmp_path / "out"),
    }
    settings(tmp_path)
    port = free_port()
    assert join([start(rank_of_two, tmp_path, keys, rank, port) for rank in (0, 1)]) == (STOPPED, STOPPED)
    state = json.loads((saved(tmp_path / "out")[-1] / "trainer_state.json").read_text())
    assert (state["step"], state["evaluated_at"]) == (2, 0)


# ---- random moments ---------------------------------------------------------------------------------------------


def command_for(seconds: float, config: str, said: str) -> None:
    """The command in a process of its own, which gets SIGTERM after so many seconds."""
    sys.stdout = sys.stderr = open(said, "w")
    os.dup2(sys.stderr.fileno(), 2)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    code = command.main([config])
    timer.cancel()
    sys.exit(code)


@pytest.mark.slow
def test_50_signals_at_random_moments(tmp_path):
    settings(tmp_path)
    write_rows(tmp_path / "rows.jsonl", count=1000)
    keys = RUN | {"evaluate.generate_data": str(tmp_path / "rows.jsonl[:64]"), "evaluate.max_new_tokens": 32}
    keys["evaluate.per_device_eval_batch_size"] = 10
    whole = tmp_path / "whole"
    (whole / "run").mkdir(parents=True)
    config = config_file(whole, settings(tmp_path, **keys, output_dir=str(whole / "run")))
    start(int).join()  # the server of processes imports torch once
    began = time.monotonic()
    process = start(command_for, 1000.0, config, str(whole / "said"))
    process.join()
    seconds = time.monotonic() - began
    assert process.exitcode == 0
    expected, draw, stops = outcome(whole / "run"), random.Random(0), Counter()
    for number in range(50):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = config_file(folder, settings(tmp_path, **keys, output_dir=str(folder / "run")))
        delay = draw.uniform(0.1, 0.8 * seconds)  # Python itself has just started before, and has no handler yet
        stopped = start(command_for, delay, config, str(folder / "said"))
        stopped.join(60)
        said = (folder / "said").read_text()
        assert stopped.exitcode in (0, STOPPED), (stopped.exitcode, said)
        assert "Traceback" not in said and leftovers(folder) == [], said
        stops[said.strip().splitlines()[-1][:60] if stopped.exitcode else "done"] += 1
        again = start(command_for, 1000.0, config, str(folder / "said"))
        again.join(60)
        assert again.exitcode == 0
        ours = outcome(folder / "run")
        assert ours["metrics"] == expected["metrics"] and ours["weights"] == expected["weights"]
    print(stops)
    assert stops["done"] <= 30 and len(stops) >= 4, stops  # the first run may have been slower than the others
