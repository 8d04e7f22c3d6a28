"""A run small enough for a test: 2 layers, 64 short documents, fp32. Shared by the tests of whole runs."""

import contextlib
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file

from minisft import loop
from minisft.config.load import load
from minisft.data.tokenizer import train_tokenizer
from minisft.errors import run_command
from minisft.prepare.run import Run, prepare
from minisft.train import run

TESTS = Path(__file__).resolve().parent
MODEL = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 259, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def write_rows(path: Path, count: int = 64, **fields: Any) -> Path:
    """Prompt/completion rows of 6 to 40 tokens."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        prompt, completion = ("".join(rng.choice(list("abcdefgh "), rng.integers(2, 20))) + "." for _ in range(2))
        rows.append({"prompt": prompt, "completion": completion, **fields})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Full names of configuration keys -> values; makes data and tokenizer in `folder` where they are absent."""
    if not (folder / "tokenizer").exists():
        train_tokenizer([], vocab_size=259, chat_template=None).save(folder / "tokenizer")
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl")
    keys = {
        "output_dir": str(folder / "out"),
        "model.config": MODEL,
        "model.tokenizer_name_or_path": str(folder / "tokenizer"),
        "data.train_data": str(folder / "rows.jsonl"),
        "data.max_length": 64,
        "train.precision": "fp32",
        "train.device": "cpu",
        "train.learning_rate": 1e-2,
        "train.num_train_epochs": 1,
        "train.per_device_train_batch_size": 8,
        "checkpoint.save_steps": 1000,
        "log.logging_steps": 1,
        "log.report_to": [],
        "log.progress_bar": False,
    }
    return keys | overrides


def train(folder: Path, **overrides: Any):
    """A whole run -> Result."""
    return run({}, **settings(folder, **overrides))


def train_until_killed(folder: Path, stop: int, **overrides: Any) -> None:
    """A run that ends, in the middle of everything, after so many steps."""
    honest = loop.train_step

    def killed(run: Run, *arguments: Any, **others: Any) -> Any:
        if run.progress.step == stop:
            raise ZeroDivisionError
        return honest(run, *arguments, **others)

    with mock.patch.object(loop, "train_step", killed), contextlib.suppress(ZeroDivisionError):
        train(folder, **overrides)
        raise AssertionError(f"the run ended before step {stop + 1}")


FORK = multiprocessing.get_context("forkserver")
PRELOAD = ["tiny", "minisft.loop", "torch._dynamo", "torch.distributed.fsdp"]  # the last two are imported late
FORK.set_forkserver_preload(PRELOAD)


def start(target: Callable, *arguments: Any) -> multiprocessing.Process:
    """A started process that calls target(*arguments). Its server has imported torch once, so that it starts at once."""
    # one thread: a pool of threads would not survive the fork
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}"):
        process = FORK.Process(target=target, args=arguments)
        process.start()
    return process


def train_quietly(folder: Path, overrides: dict[str, Any], output: str = os.devnull) -> None:
    """`train` for a process of its own: what it says goes to a file, and it exits with the code of the command."""
    sys.stdout = sys.stderr = open(output, "w")
    sys.exit(run_command(lambda: train(folder, **overrides).exit_code))


def run_anew(program: Path, output: Path, *arguments: str, first: Path = TESTS.parent, **environment: str) -> None:
    """For a process of its own: a Python file as a program that finds torch imported and nothing of ours, which it imports from
    the folder `first`. What it says goes to a file."""
    os.environ |= environment
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("minisft", "tiny")]:
        del sys.modules[name]
    sys.path.insert(0, str(first))
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


def with_spoilt_loss(
    run: Run, spoil: Callable[[torch.Tensor], torch.Tensor] = lambda total: total * float("inf")
) -> Run:
    """The same run with spoil(loss) for its loss: infinite, and so its gradients, unless told otherwise."""

    def loss(*arguments):
        total, metrics = run.loss(*arguments)
        return spoil(total), metrics

    return replace(run, loss=loss)


def parts(folder: Path, **overrides: Any) -> tuple[Run, Any]:
    """The parts of a run before its first step, and its configuration."""
    config, _ = load({}, settings(folder, **overrides), origin="test")
    return prepare(config, torch.device(config.train.device)), config


def logged(output_dir: Path, name: str = "loss") -> list[float]:
    """One metric over the run."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [float(row[name]) for row in map(json.loads, lines) if name in row]


def weights(output_dir: Path) -> dict[str, bytes]:
    """The final weights as bytes, to compare exactly."""
    (file,) = (output_dir / "model").glob("*model.safetensors")  # or adapter_model.safetensors
    tensors = load_file(file)
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in tensors.items()}


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """norm(a - b) / norm(b), the measure of every equality in these tests."""
    return (torch.linalg.vector_norm(a.double() - b.double()) / torch.linalg.vector_norm(b.double())).item()
