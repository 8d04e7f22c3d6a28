"""Two ranks train the same model as one: gloo on this machine, started as torchrun starts them."""

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import logged, relative_error, settings, start, train, train_quietly, weights, with_spoilt_loss

from minisft import loop, parallel, peers
from minisft.errors import DATA, NONFINITE, PEER, STOPPED, UserError
from minisft.model.shards import local


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    settings(folder)
    return folder


def with_a_spike(run):
    return with_spoilt_loss(run, lambda total: total * 1e5)


def misbehave(how: str) -> None:
    if how == "fails":
        raise UserError("row 7 is bad", exit_code=DATA)
    os.kill(os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how])


def train_rank(
    folder: Path,
    overrides: dict,
    rank: int,
    port: int,
    broken_step: int | None,
    spoil: Callable,
    trouble: tuple[int, str, str],
    cwd: Path | None,
    before: Callable[[], None] | None,
    count: int = 2,
    crash: tuple[int, str] = (-1, ""),
) -> None:
    """What one process does: train, and leave its output and a hash of its final weights in the output folder. On rank 1
    spoil(run) takes the place of the run in step `broken_step`.

    trouble: (rank, where, how) of a rank that is killed, stopped or fails. crash: a rank, and the crash point where it dies.
    """
    if crash[0] == rank:
        os.environ["MINISFT_CRASH_AT"] = crash[1]

    def in_trouble(where: str) -> None:
        if trouble[:2] == (rank, where):
            misbehave(trouble[2])

    if before and rank == 1:
        before()
    if cwd is not None:
        os.chdir(cwd)
    if trouble == (rank, "decomposition", "other"):
        honest_svd = torch.linalg.svd
        torch.linalg.svd = lambda *arguments, **options: [-part for part in honest_svd(*arguments, **options)]
    peers.BEAT, peers.SUSPICIOUS, peers.GRACE, peers.LAST_WORD = 0.1, 1.0, 0.5, 0.5
    if (trouble[0], crash[0]) != (-1, -1):  # else a busy machine may keep a rank from running for seconds
        peers.SILENCE = 2.0
    os.environ |= {"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    out = Path(overrides["output_dir"])
    out.mkdir(exist_ok=True)
    honest_step, honest_finish, honest_evaluate, honest_save = (
        loop.train_step,
        loop.finish,
        loop.evaluate_sets,
        loop.save,
    )

    def evaluate_sets(*arguments):
        in_trouble("evaluate")
        return honest_evaluate(*arguments)

    def save(*arguments, **options):
        in_trouble("save")
        return honest_save(*arguments, **options)

    def join_group(*arguments, **options):
        in_trouble("join")
        return honest_join(*arguments, **options)

    def settle(*arguments):
        in_trouble("settle")
        return honest_settle(*arguments)

    def train_step(run, *arguments, **options):
        if run.progress.step == 2:
            in_trouble("step")
        if rank == 1 and run.progress.step + 1 == broken_step:
            run = spoil(run)
        return honest_step(run, *arguments, **options)

    def finish(config, run, *arguments):
        data = b"".join(
            local(p).contiguous().view(-1).view(torch.uint8).numpy().tobytes() for p in run.model.parameters()
        )
        (out / f"weights-{rank}").write_text(hashlib.sha256(data).hexdigest())
        in_trouble("export")
        return honest_finish(config, run, *arguments)

    honest_settle, parallel.settle = parallel.settle, settle
    honest_join, torch.distributed.init_process_group = torch.distributed.init_process_group, join_group
    loop.train_step, loop.finish, loop.evaluate_sets, loop.save = train_step, finish, evaluate_sets, save
    in_trouble("start")
    train_quietly(folder, overrides, output=out / f"said-{rank}")


def free_ports(count: int) -> list[int]:
    """Different ones: on a port that a process has had before, torch goes on with the old store and the addresses in it. None of
    those that Linux gives to connections (from 32,768 on): until rank 0 listens, one could take it."""
    found: set[int] = set()
    while len(found) < count:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", random.SystemRandom().randrange(16_384, 32_768)))
            found.add(free.getsockname()[1])
    return list(found)


def free_port() -> int:
    return free_ports(1)[0]


def start_ranks(
    folder: Path,
    overrides: dict,
    broken_step: int | None = None,
    spoil: Callable = with_spoilt_loss,
    trouble: tuple = (-1, "", ""),
    folders: tuple = (None, None),
    of_rank: tuple[dict, dict] = ({}, {}),
    before: Callable[[], None] | None = None,
    count: int = 2,
    crash: tuple[int, str] = (-1, ""),
) -> list:
    """`count` processes. Of the first two, folders: where each is; of_rank: overrides of each. before(): called by rank 1."""
    more = (free_port(), broken_step, spoil, trouble)
    of_rank, folders = (*of_rank, *[{}] * (count - 2)), (*folders, *[None] * (count - 2))
    return [
        start(train_rank, folder, overrides | of_rank[i], i, *more, folders[i], before, count, crash)
        for i in range(count)
    ]


def join(processes, seconds: float = 200) -> tuple[int, ...]:
    for process in processes:
        process.join(seconds)
        process.kill()  # where it hangs
        process.join()
    return tuple(process.exitcode for process in processes)


def same_weights(out: Path) -> bool:
    return (out / "weights-0").read_text() == (out / "weights-1").read_text()


def test_a_place_where_the_ranks_cannot_meet_is_named(home, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = {"output_dir": str(tmp_path / "out")}
        rank = start(train_rank, home, options, 0, port, None, with_spoilt_loss, (-1, "", ""), None, None)
        assert join([rank]) == (PEER,)
    said = (tmp_path / "out" / "said-0").read_text()
    assert f"the ranks cannot meet at 127.0.0.1:{port}: " in said and "Traceback" not in said


@pytest.mark.parametrize("batch_size, accumulation", [(6, 1), (3, 2)])
def test_two_ranks_are_one(home, tmp_path, batch_size, accumulation):
    """64 rows in steps of 12: in the last one the second rank has fewer rows, or none."""
    options = {"train.num_train_epochs": 1, "train.adam_beta1": 0.0, "train.max_grad_norm": None}
    options |= {
        "checkpoint.save_steps": 1,
        "checkpoint.save_total_limit": 9,
        "data.eval_data": str(home / "rows.jsonl"),
    }
    one = options | {"output_dir": str(tmp_path / "one"), "train.per_device_train_batch_size": 12}
    two = options | {"output_dir": str(tmp_path / "two"), "train.per_device_train_batch_size": batch_size}
    two |= {"train.gradient_accumulation_steps": accumulation}
    processes = [start(train_quietly, home, one), *start_ranks(home, two)]
    assert join(processes) == (0, 0, 0)

    expected, losses = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(losses) == 6
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)  # the bound of the house for equal maths in fp32
    assert losses == pytest.approx(expected, rel=1e-5)  # Adam amplifies the last bits of a gradient near zero
    for name in ("num_tokens", "epoch", "learning_rate"):
        assert logged(tmp_path / "two", name) == logged(tmp_path / "one", name)
    for name in ("eval_loss", "losses/answer", "losses/first_token", "eval_losses/terminator"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(tmp_path / "one", name), rel=1e-5)
    first = "checkpoints/step-00000001/optimizer.safetensors"
    moments, expected = (load_file(tmp_path / name / first) for name in ("two", "one"))
    gradients = [name for name in expected if name.endswith("exp_avg")]  # with beta1 = 0
    assert gradients
    for name in gradients:
        assert relative_error(moments[name], expected[name]) <= 1e-6, name

    assert same_weights(tmp_path / "two")
    assert "2 ranks" in (tmp_path / "two" / "said-0").read_text()
    assert (tmp_path / "two" / "said-1").read_text() == ""


def test_a_signal_to_one_rank_stops_and_saves_both(home, tmp_path):
    # one log window over the whole run, so that it is open at every save; `whole` saves at its end only
    options = {"train.num_train_epochs": 4, "train.per_device_train_batch_size": 4, "log.logging_steps": 1000}
    whole = start_ranks(home, options | {"output_dir": str(tmp_path / "whole")})
    out = tmp_path / "out"
    options |= {"output_dir": str(out), "checkpoint.save_steps": 7}
    processes = start_ranks(home, options)
    while processes[1].is_alive() and not list(out.glob("checkpoints/step-*")):
        time.sleep(0.001)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert join(processes) == (STOPPED, STOPPED)
    assert same_weights(out) and not (out / "model").exists()
    assert "stopped by a signal to another rank" in (out / "said-0").read_text()

    assert join(start_ranks(home, options)) == (0, 0)
    assert join(whole) == (0, 0)
    assert same_weights(out)
    assert weights(out) == weights(tmp_path / "whole")
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_step_that_one_rank_finds_not_finite_is_refused_by_both(home, tmp_path, policy):
    options = {"output_dir": str(tmp_path / "out"), "train.on_nonfinite": policy, "train.max_steps": 2}
    options |= {"train.per_device_train_batch_size": 4}
    codes = join(start_ranks(home, options, broken_step=2))
    if policy == "stop":
        assert codes == (NONFINITE, NONFINITE)
        rows = [
            [json.loads(line)["row"] for line in path.read_text().splitlines()[1:]]
            for path in sorted((tmp_path / "out").glob("nonfinite-step-00000002-rank-?.jsonl"))
        ]
        assert len(rows[0]) == len(rows[1]) == 4 and not set(rows[0]) & set(rows[1])
        assert (tmp_path / "out" / "checkpoints" / "step-00000001").is_dir()
    else:
        assert codes == (0, 0)
        assert same_weights(tmp_path / "out")
        assert logged(tmp_path / "out", "nonfinite_steps") == [1]


PLACES = ("join", "step", "evaluate", "save", "export")
TROUBLES = [
    (1, "join", "killed"),
    (1, "step", "killed"),
    (0, "export", "killed"),
    (1, "evaluate", "stopped"),
    (0, "save", "fails"),
]
ALL_TROUBLES = [(rank, where, how) for rank in (0, 1) for where in PLACES for how in ("killed", "stopped", "fails")]


@pytest.mark.parametrize(
    "rank, where, how",
    [*TROUBLES, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL_TROUBLES if one not in TROUBLES)],
)
def test_a_rank_that_is_gone_ends_the_other_which_names_it(home, tmp_path, rank, where, how):
    out = tmp_path / "out"
    options = {"output_dir": str(out), "data.eval_data": str(home / "rows.jsonl"), "train.max_steps": 4}
    options |= {"train.per_device_train_batch_size": 4, "evaluate.eval_steps": 2, "checkpoint.save_steps": 2}
    processes = start_ranks(home, options, trouble=(rank, where, how))
    survivor = processes[1 - rank]
    survivor.join(30)
    code, said = survivor.exitcode, (out / f"said-{1 - rank}").read_text()
    assert code == (DATA if how == "fails" else PEER), said
    assert f"minisft: [rank {1 - rank} on {socket.gethostname()}] error:" in said and "Traceback" not in said
    assert f"rank {rank} on {socket.gethostname()}" in said
    if how == "fails":
        assert "row 7 is bad" in said
    elif rank == 1:
        assert "no sign of life for" in said
    else:  # the store is in its process; torchrun has it in another one
        assert "is gone, and with it the store" in said or "does not answer" in said
    if how == "stopped":
        os.kill(processes[rank].pid, signal.SIGCONT)
    processes[rank].join(30)
    assert processes[rank].exitcode == {"killed": -signal.SIGKILL, "fails": DATA}.get(how, PEER)


def test_a_checkpoint_that_one_machine_does_not_have_is_refused(home, tmp_path):
    """Two machines without a shared disk: a relative output_dir in two folders."""
    options = {"train.per_device_train_batch_size": 4, "checkpoint.save_steps": 1, "output_dir": "out"}
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    assert join(start_ranks(home, options | {"train.max_steps": 1}, folders=folders)) == (0, 0)  # a new run needs none
    assert join(start_ranks(home, options | {"train.max_steps": 2}, folders=folders)) == (2, 2)
    told = "the first rank resumes from out/checkpoints/step-00000001, which is not here"
    for rank, folder in enumerate(folders):
        assert told in (folder / "out" / f"said-{rank}").read_text()
    assert not (folders[0] / "out" / "checkpoints" / "step-00000002").exists()


@pytest.mark.parametrize("key, values", [("train.learning_rate", (0.01, 0.02)), ("train.seed", (1, 2))])
def test_ranks_with_other_settings_or_weights_refuse(home, tmp_path, key, values):
    options = {"train.per_device_train_batch_size": 4, "output_dir": str(tmp_path / "out")}
    processes = start_ranks(home, options, of_rank=tuple({key: value} for value in values))
    assert join(processes) == (2, 2)
    for rank in (0, 1):
        said = (tmp_path / "out" / f"said-{rank}").read_text()
        assert "the ranks are not in the same state" in said and key.rpartition(".")[2] in said
        assert "rank 0 on" in said and "rank 1 on" in said
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_all_ranks_start_from_the_decomposition_of_the_first(home, tmp_path):
    """The second rank's PiSSA would start elsewhere, because its decomposition is not the same to the last bit."""
    options = {"train.per_device_train_batch_size": 4, "train.max_steps": 2, "output_dir": str(tmp_path / "out")}
    train(home, output_dir=str(tmp_path / "base"), **{"train.max_steps": 1})
    options |= {"model.config": None, "model.model_name_or_path": str(tmp_path / "base" / "model")}
    options |= {"lora.r": 4, "lora.init_lora_weights": "pissa"}
    assert join(start_ranks(home, options, trouble=(1, "decomposition", "other"))) == (0, 0)
    assert same_weights(tmp_path / "out")


def test_two_ranks_agree_on_a_spike_of_one_and_on_what_the_control_file_asks(home, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "control.toml").write_text("learning_rate = 1e-3\nevaluate = true\n")
    options = {"output_dir": str(out), "train.on_spike": "skip", "train.max_steps": 5, "data.eval_fraction": 0.1}
    options |= {"train.per_device_train_batch_size": 4, "train.lr_scheduler_type": "constant"}
    assert join(start_ranks(home, options, broken_step=4, spoil=with_a_spike)) == (0, 0)
    assert same_weights(out) and logged(out, "spikes") == [1, 1]
    assert logged(out, "learning_rate") == pytest.approx([1e-3] * 5, rel=1e-12) and len(logged(out, "eval_loss")) == 2
    about, rows = [], []
    for path in sorted(out.glob("spike-step-00000004-rank-?.jsonl")):
        first, *others = map(json.loads, path.read_text().splitlines())
        about.append(first)
        rows.append({row["row"] for row in others})
    assert about[0] == about[1] and len(rows[0]) == len(rows[1]) == 4 and not rows[0] & rows[1]
