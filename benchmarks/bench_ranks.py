"""What several ranks cost: time after the backward, messages and bytes of a step, peak memory of a rank, by strategy.

    python -m benchmarks.bench_ranks [--rounds 3] [--only ddp] [--quick]

Ranks are processes of this machine, with one thread each, and send over gloo. Each contender trains the same rows of random
letters in fp32 from the same weights (a Llama of 31 M parameters, 8 layers of 512), 1,024 tokens a rank and step:

    one rank             minisft alone with the tokens of one rank: no messages
    ddp, fsdp2, hsdp     minisft's strategies, all weights and LoRA (hsdp: four ranks in two groups)
    torch ddp            the same model in DistributedDataParallel, torch's AdamW
    torch fsdp2          the same model, its blocks and itself in `fully_shard`, as torch's tutorial has it. Accelerate's FSDP2
                         makes the same calls on GPUs; on CPUs Accelerate 1.15 takes DistributedDataParallel instead

`step` and `after` (from the end of the last backward to the end of the update) are medians over steps and rounds; the ratio is
that of the round's step to the same round's "one rank". All contenders run in every round, one after the other, each in
processes of its own. `messages` are the collectives of a step that gloo was asked for, and `sent_mb` what the process wrote into
sockets for them (/proc/self/io; Linux). `peak_mb` is what a rank takes at most above its imports, loading included: VmHWM. `loss`
is that of the last step, over all ranks: the same for all contenders with as many ranks, which is checked.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, extra_memory, print_table, write_csv

MODEL = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
TINY = MODEL | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 512}
LENGTH, PACKS, STEPS, UNCOUNTED = 256, 4, 6, 2  # tokens of a document; documents of a rank and step
LORA = {"lora.r": 16}
RATE = 1e-4
CASES = {  # name: (ranks, who trains, keys)
    "one rank": (1, "minisft", {}),
    "ddp": (2, "minisft", {}),
    "fsdp2": (2, "minisft", {"parallel.strategy": "fsdp2"}),
    "torch ddp": (2, "torch ddp", {}),
    "torch fsdp2": (2, "torch fsdp2", {}),
    "one rank, LoRA": (1, "minisft", LORA),
    "ddp, LoRA": (2, "minisft", LORA),
    "fsdp2, LoRA": (2, "minisft", LORA | {"parallel.strategy": "fsdp2"}),
    "ddp, 4 ranks": (4, "minisft", {}),
    "fsdp2, 4 ranks": (4, "minisft", {"parallel.strategy": "fsdp2"}),
    "hsdp, 4 ranks": (4, "minisft", {"parallel.strategy": "hsdp", "parallel.replicas": 2}),
}
TOLERANCE = 1e-5  # of the losses, relative: sums in another order, after a few steps of AdamW


def make_inputs(folder: Path, is_quick: bool) -> None:
    """A model, a tokenizer and rows in the folder."""
    from minisft.data.tokenizer import train_tokenizer
    from minisft.model.families import from_hf
    from minisft.model.load import build_model, init_weights
    from minisft.model.save import save_model

    model = build_model(from_hf(TINY if is_quick else MODEL), "cpu")
    init_weights(model, 0)
    save_model(model, folder / "model")
    train_tokenizer([], vocab_size=259, chat_template=None).save(folder / "tokenizer")
    letters = random.Random(0)
    rows = [{"text": "".join(letters.choices("abcdefgh ", k=LENGTH - 1))} for _ in range(4 * PACKS * STEPS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_config(folder: str, keys: dict):
    from minisft.config.load import load

    values = {
        "output_dir": f"{folder}/out",
        "model.model_name_or_path": f"{folder}/model",
        "model.tokenizer_name_or_path": f"{folder}/tokenizer",
        "data.train_data": f"{folder}/rows.jsonl",
        "data.cache_dir": f"{folder}/cache",
        "data.max_length": LENGTH,
        "train.device": "cpu",
        "train.precision": "fp32",
        "train.learning_rate": RATE,
        "train.lr_scheduler_type": "constant",
        "train.max_steps": STEPS,
        "train.per_device_train_batch_size": PACKS,
    }
    return load({}, values | keys, origin="benchmark")[0]


# ---- a rank -------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of each step, those after its last backward, and the bytes that this process wrote."""

    def __init__(self):
        self.rows, self.backward_ended = [], 0.0

    def step(self, work) -> float:
        began, sent = time.perf_counter(), written()
        loss = work()
        ended = time.perf_counter()
        self.rows.append({"step": ended - began, "after": ended - self.backward_ended, "sent": written() - sent})
        return loss


def written() -> int:
    """Bytes that this process has given to write(), sockets included; 0 where that is not known."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


def rank(folder: str, case: str) -> dict:
    """What one process of a case does. It has the environment that torchrun gives."""
    import torch

    import minisft.loop  # noqa: F401 - before memory is counted
    from minisft import ranks

    number, who, keys = CASES[case]
    torch.set_num_threads(1)
    config = load_config(folder, keys)
    train = minisft_steps if who == "minisft" else peer_steps
    with ranks.process_group(torch.device("cpu")):
        ranks.expect_steps()
        (clock, losses, messages), peak = extra_memory(lambda: train(config, who))
    counted = clock.rows[UNCOUNTED:]
    times = {key: statistics.median(row[key] for row in counted) for key in ("step", "after", "sent")}
    return {**times, "messages": messages, "loss": losses[-1], "peak": peak, "steps": [row["step"] for row in counted]}


def minisft_steps(config, who: str) -> tuple[Clock, list[float], int]:
    import torch

    from minisft import loop
    from minisft.prepare.run import prepare

    run, clock = prepare(config, torch.device("cpu")), Clock()
    honest = loop.forward_backward

    def forward_backward(*arguments):
        result = honest(*arguments)
        clock.backward_ended = time.perf_counter()
        return result

    loop.forward_backward = forward_backward

    def step() -> float:
        batches = run.train.step(0, run.progress.step)
        result = loop.train_step(run, config.train, batches)
        run.progress.step += 1
        return result.loss

    losses = [clock.step(step) for _ in range(STEPS - 1)]
    messages, loss = counting(step)
    return clock, [*losses, loss], messages


def peer_steps(config, who: str) -> tuple[Clock, list[float], int]:
    """The loop that a user of torch writes, on minisft's model and batches."""
    import torch
    from torch import nn

    from minisft import ranks
    from minisft.model.load import load_model
    from minisft.prepare.data import prepare_data
    from minisft.prepare.options import prepare_tokenizer

    class WithLoss(nn.Module):
        """DDP wants all parameters to be used inside its forward."""

        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, batch):
            hidden = self.model(batch.input_ids, batch.position_ids, batch.start, batch.end)
            return self.model.cross_entropy(hidden, batch.targets, batch.loss_rows)

    tokenizer, _ = prepare_tokenizer(config)
    loader, _, _ = prepare_data(config, tokenizer)
    module = WithLoss(load_model(config.model.model_name_or_path, dtype=torch.float32))
    if who == "torch ddp":
        module = nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in module.model.layers:
            fully_shard(block)
        fully_shard(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.0)
    clock, number = Clock(), 0

    def step() -> float:
        nonlocal number
        batches = loader.step(0, number)
        number += 1
        total = ranks.sum_numbers_over_ranks([sum(batch.total_weight for batch in batches)])[0]
        losses = []
        for batch in batches:
            loss = module(batch)
            (loss * (ranks.world_size() / total)).backward()  # both divide by the number of ranks
            losses.append(loss.detach())
        clock.backward_ended = time.perf_counter()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ranks.sum_numbers_over_ranks([float(sum(losses))])[0] / total

    losses = [clock.step(step) for _ in range(STEPS - 1)]
    messages, loss = counting(step)
    return clock, [*losses, loss], messages


def counting(step) -> tuple[int, float]:
    """(collectives of gloo, the loss) of a step; it is not timed."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        loss = step()
    return sum(event.count for event in profiler.key_averages() if event.key.startswith("gloo:")), loss


# ---- all of them --------------------------------------------------------------------------------------------------


def run_case(folder: str, case: str) -> dict:
    """A row: times and bytes of the slowest rank, memory of the largest."""
    count = CASES[case][0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import json, sys; from benchmarks.bench_ranks import rank; print(json.dumps(rank(*sys.argv[1:])))"
    processes = []
    for i in range(count):
        launcher = {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        env = os.environ | launcher | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", code, folder, case]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"{case}: exit codes {[process.returncode for process in processes]}")
    answers = [json.loads(text.splitlines()[-1]) for text in said]
    row = {key: max(answer[key] for answer in answers) for key in ("step", "after", "sent", "messages", "peak")}
    return {**row, "loss": answers[0]["loss"]}


def benchmark(folder: str, cases: list[str], rounds: int) -> list[dict]:
    found: dict[str, list[dict]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            found[case].append(run_case(folder, case))
            print(f"# {case}: {found[case][-1]['step']:.3f} s", flush=True)
    rows = []
    for case in cases:
        middle = {key: statistics.median(row[key] for row in found[case]) for key in found[case][0]}
        alone = "one rank, LoRA" if "LoRA" in case else "one rank"
        ratios = [row["step"] / base["step"] for row, base in zip(found[case], found.get(alone, []))]
        rows.append(
            {
                "case": case,
                "ranks": CASES[case][0],
                "step_s": middle["step"],
                "after_s": middle["after"],
                "ratio": statistics.median(ratios) if ratios else "",
                "messages": int(middle["messages"]),
                "sent_mb": middle["sent"] / 1e6,
                "peak_mb": middle["peak"],
                "loss": middle["loss"],
                "rounds": rounds,
            }
        )
    return rows


def require_equal_losses(rows: list[dict]) -> None:
    """Contenders with as many ranks, and as many trained weights, have taken the same steps."""
    for row in rows:
        others = [r for r in rows if r["ranks"] == row["ranks"] and ("LoRA" in r["case"]) == ("LoRA" in row["case"])]
        for other in others:
            if abs(row["loss"] / other["loss"] - 1) > TOLERANCE:
                raise SystemExit(f"{row['case']} and {other['case']}: losses {row['loss']}, {other['loss']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose name contains one of these")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, one round, nothing written: does it run at all?"
    )
    parser.add_argument("--out", type=Path, help="folder of the CSV")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or any(text in case for text in options.only)]
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), options.quick)
        rows = benchmark(folder, cases, 1 if options.quick else options.rounds)
    print_table(rows)
    require_equal_losses(rows)
    if not options.quick:
        where = {"folder": options.out} if options.out else {}
        print(f"written to {write_csv('ranks', rows, **where)}")


if __name__ == "__main__":
    main()
