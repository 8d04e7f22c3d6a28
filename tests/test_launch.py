"""The files of launch/: what each starts, and which exit code it ends with. Programs in the place of torchrun, srun and scontrol
record what they were asked; a slow test starts real ranks."""

import ast
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from test_ranks import free_port
from tiny import logged, settings, train, weights

from minisft.config.load import load, write_resolved
from minisft.errors import CONFIG, INTERNAL, MEMORY, NONFINITE, PEER, STOPPED

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
FILES = {path.name: path for path in LAUNCH.iterdir() if path.is_file()}
TORCHRUN, SLURM = str(LAUNCH / "torchrun.sh"), str(LAUNCH / "slurm.sbatch")


def program(folder: Path, name: str, text: str) -> None:
    """An executable in the place of one; what it was called with is appended to `<name>.calls`."""
    path = folder / name
    path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {folder}/{name}.calls\n{text}\n')
    path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    path = folder / f"{name}.calls"
    return path.read_text().splitlines() if path.exists() else []


def environment(folder: Path, **variables: object) -> dict[str, str]:
    path = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "WAIT": "0"}
    return os.environ | path | {name: str(value) for name, value in variables.items()}


def launch(
    script: str, folder: Path, *arguments: str, seconds: float = 60, **variables: object
) -> subprocess.CompletedProcess:
    command = ["bash", script, *arguments]
    options = {"cwd": folder, "env": environment(folder, **variables), "capture_output": True, "text": True}
    return subprocess.run(command, timeout=seconds, **options)


def reported(code: int) -> str:
    """Ends as torchrun does, whose own exit code is 1, after a rank's."""
    return f'echo "  exitcode  : {code} (pid: 123)" >&2; exit 1'


# ---- torchrun -----------------------------------------------------------------------------------------------------


def test_torchrun_gets_the_machines_and_the_options_of_the_run(tmp_path):
    program(tmp_path, "torchrun", "exit 0")
    assert launch(TORCHRUN, tmp_path, "run.toml", "--seed", "1").returncode == 0
    machines = {
        "NODES": 4,
        "NODE": 3,
        "HEAD": "host-0",
        "PORT": 4000,
        "PROCESSES": 2,
        "LOGS": "of-ranks",
        "SHUTDOWN": 90,
    }
    assert launch(TORCHRUN, tmp_path, "a b.toml", **machines).returncode == 0
    one, four = calls(tmp_path, "torchrun")
    assert one.startswith("--nnodes 1 --node-rank 0 --nproc-per-node gpu --master-addr 127.0.0.1 ")
    assert one.endswith(" -m minisft.train run.toml --seed 1")
    assert "--nnodes 4 --node-rank 3 --nproc-per-node 2 --master-addr host-0 --master-port 4000" in four
    assert "--log-dir of-ranks" in four and "--shutdown-timeout 90" in four and four.endswith("minisft.train a b.toml")


@pytest.mark.parametrize("code", [CONFIG, PEER, INTERNAL, MEMORY, STOPPED, NONFINITE])
def test_the_exit_code_is_that_of_the_rank(tmp_path, code):
    program(tmp_path, "torchrun", reported(code))
    assert launch(TORCHRUN, tmp_path, "run.toml").returncode == code
    resumable = code in (PEER, STOPPED)
    assert launch(TORCHRUN, tmp_path, "run.toml", RESUMABLE=203).returncode == (203 if resumable else code)
    assert len(calls(tmp_path, "torchrun")) == 2


def test_a_torchrun_that_fails_by_itself_keeps_its_code(tmp_path):
    program(tmp_path, "torchrun", "exit 7")
    assert launch(TORCHRUN, tmp_path, "run.toml", RESTARTS=3).returncode == 7
    assert len(calls(tmp_path, "torchrun")) == 1


@pytest.mark.parametrize(("code", "times"), [(-9, 3), (PEER, 3), (MEMORY, 1), (STOPPED, 1)])
def test_only_a_lost_rank_is_started_again(tmp_path, code, times):
    program(tmp_path, "torchrun", reported(code))
    assert launch(TORCHRUN, tmp_path, "run.toml", RESTARTS=2).returncode == (PEER if code < 0 else code)
    assert len(calls(tmp_path, "torchrun")) == times


def test_a_signal_is_passed_on_and_waited_for(tmp_path):
    """The ranks save meanwhile; the code says that the same command resumes."""
    waits = (
        f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 1' TERM; touch {tmp_path}/begun; while :; do sleep 0.05; done"
    )
    program(tmp_path, "torchrun", waits)
    process = subprocess.Popen(["bash", TORCHRUN, "run.toml"], cwd=tmp_path, env=environment(tmp_path, RESTARTS=5))
    deadline = time.monotonic() + 30
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == STOPPED and (tmp_path / "saved").exists()
    assert len(calls(tmp_path, "torchrun")) == 1


# ---- SLURM --------------------------------------------------------------------------------------------------------

JOB = {"SLURM_JOB_ID": 41, "SLURM_JOB_NODELIST": "host-[0-1]", "SLURM_NTASKS": 2}


def sbatch(tmp_path: Path, code: int, **variables: object) -> subprocess.CompletedProcess:
    """Two tasks, as srun would start them; srun's exit code is the highest of theirs."""
    program(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo host-0; echo host-1; fi')
    program(
        tmp_path, "python", f'echo "$MASTER_ADDR:$MASTER_PORT $RANK/$WORLD_SIZE local $LOCAL_RANK: $*"; exit {code}'
    )
    program(
        tmp_path,
        "srun",
        'while [[ $1 == --* ]]; do shift; done; code=0; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" || code=$?; '
        "done; exit $code",
    )
    return launch(SLURM, tmp_path, "run.toml", "--seed", "1", **(JOB | variables))


def test_each_task_is_a_rank(tmp_path):
    done = sbatch(tmp_path, 0)
    assert done.returncode == 0 and done.stdout.splitlines() == [
        f"host-0:20041 {rank}/2 local {rank}: -m minisft.train run.toml --seed 1" for rank in (0, 1)
    ] + ["done"]
    (asked,) = calls(tmp_path, "srun")
    assert "--kill-on-bad-exit=1 " in asked and "rank-%t.log" in asked
    assert "#SBATCH --signal=TERM@300\n" in FILES["slurm.sbatch"].read_text()


@pytest.mark.parametrize(
    ("code", "variables", "again"),
    [
        (0, {}, False),
        (STOPPED, {"SLURM_JOB_END_TIME": "soon"}, True),
        (STOPPED, {}, True),  # an older SLURM, which does not tell the end
        (STOPPED, {"SLURM_JOB_END_TIME": "late"}, False),  # by control.toml
        (PEER, {}, True),
        (137, {"SLURM_RESTART_COUNT": 4}, True),
        (PEER, {"SLURM_RESTART_COUNT": 5}, False),
        (MEMORY, {}, False),
        (CONFIG, {}, False),
        (NONFINITE, {}, False),
    ],
)
def test_the_job_is_requeued_where_that_helps(tmp_path, code, variables, again):
    seconds = {"soon": 250, "late": 50_000}
    variables = {key: int(time.time()) + seconds[v] if v in seconds else v for key, v in variables.items()}
    done = sbatch(tmp_path, code, **variables)
    assert done.returncode == code
    assert ("requeue 41" in calls(tmp_path, "scontrol")) == again


# ---- all files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_each_file_parses_and_says_how_it_is_started(name):
    text = FILES[name].read_text()
    if name.endswith(".py"):
        ast.parse(text)
    elif name.endswith(".yaml"):
        yaml.safe_load(text)
    else:
        assert subprocess.run(["bash", "-n", FILES[name]]).returncode == 0
    assert f"launch/{name}" in text and f"launch/{name}" in (ROOT / "docs" / "scaling.md").read_text()


def test_the_other_schedulers_start_the_same_script():
    task = yaml.safe_load(FILES["skypilot.yaml"].read_text())
    job = yaml.safe_load(FILES["kubernetes.yaml"].read_text())["spec"]
    assert (
        "exec launch/torchrun.sh" in task["run"]
        and STOPPED in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    )
    for replicas in job["pytorchReplicaSpecs"].values():
        pod = replicas["template"]["spec"]
        (container,) = pod["containers"]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert "exec launch/torchrun.sh" in container["args"][0] and container["name"] == "pytorch"
        # of Kubeflow's operator: codes from 128 are restarted
        assert replicas["restartPolicy"] == "ExitCode" and int(variables["RESUMABLE"]) >= 128
        assert pod["terminationGracePeriodSeconds"] > int(variables["SHUTDOWN"])
        assert int(variables["PROCESSES"]) == container["resources"]["limits"]["nvidia.com/gpu"]


def test_skypilot_takes_the_file():
    sky = pytest.importorskip("sky", exc_type=ImportError)
    task = sky.Task.from_yaml(str(FILES["skypilot.yaml"]))
    assert task.num_nodes == 2


# ---- real ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_that_are_stopped_and_lost_end_in_the_weights_of_those_that_were_not(tmp_path):
    """Two real ranks under a real torchrun: a signal to the script, then a killed rank, then to the end."""
    out, config = tmp_path / "out", tmp_path / "run"
    options = {"train.num_train_epochs": 50, "train.per_device_train_batch_size": 4, "checkpoint.save_steps": 50}
    values = settings(tmp_path, **options, output_dir=str(out))
    config.mkdir()
    write_resolved(*load({}, values, origin="test"), config)
    variables = {"PROCESSES": 2, "OMP_NUM_THREADS": 1}

    def start(**more: object) -> subprocess.Popen:
        # a session of its own, so that whatever is left of it can be ended
        command = ["bash", TORCHRUN, str(config / "config.toml")]
        env = environment(tmp_path, PORT=free_port(), **variables, **more)
        return subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True)

    def wait_for_step(step: int) -> None:
        deadline = time.monotonic() + 100
        while not any(int(p.name[5:]) >= step for p in out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)

    process = start()
    wait_for_step(50)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == STOPPED and not (out / "model").exists()

    process = start(RESTARTS=1)
    wait_for_step(150)
    ranks = [int(p.name) for p in Path("/proc").glob("[0-9]*") if is_rank(p, str(config / "config.toml"))]
    os.kill(max(ranks), signal.SIGKILL)
    assert process.wait(300) == 0
    said = [path.read_text() for path in sorted((tmp_path / "logs").glob("minisft_*/attempt_0/0/stdout.log"))]
    assert len(said) == 3 and "done: loss" in "".join(said)

    whole = launch(TORCHRUN, tmp_path, str(config / "config.toml"), "--output_dir", str(tmp_path / "whole"),
                   PORT=free_port(), seconds=300, **variables)  # fmt: skip
    assert whole.returncode == 0 and weights(out) == weights(tmp_path / "whole")
    assert logged(out) == logged(tmp_path / "whole")

    assert launch(TORCHRUN, tmp_path, "absent.toml", PORT=free_port(), **variables).returncode == CONFIG


def is_rank(process: Path, config: str) -> bool:
    try:
        words = (process / "cmdline").read_bytes().decode().split("\0")
    except OSError:
        return False
    return "minisft.train" in words and config in words and not any(word.endswith("torchrun") for word in words)


@pytest.mark.slow
def test_ray_starts_the_ranks(tmp_path):
    pytest.importorskip("ray", exc_type=ImportError)
    train(tmp_path, output_dir=str(tmp_path / "alone"), **{"train.per_device_train_batch_size": 8})
    config = tmp_path / "run"
    config.mkdir()
    values = settings(tmp_path, output_dir=str(tmp_path / "out"), **{"train.per_device_train_batch_size": 4})
    write_resolved(*load({}, values, origin="test"), config)
    command = ["python", str(FILES["ray_ranks.py"]), "--ranks", "2", "--cpus", "1", "--gpus", "0"]
    done = subprocess.run([*command, str(config / "config.toml")], env=environment(tmp_path), timeout=200)
    assert done.returncode == 0
    assert logged(tmp_path / "out") == pytest.approx(logged(tmp_path / "alone"), rel=1e-5)
