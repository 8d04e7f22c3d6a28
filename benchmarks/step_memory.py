"""The memory of a process over one optimizer step: the naive run (examples/naive.py) beside the engine, on the same rows.

    python -m benchmarks.step_memory

A Llama of 13.2 M parameters with a vocabulary of 32,768, in fp32 on a CPU: 8 documents of 128 tokens, half of them trained,
AdamW. A thread notes the resident memory every two milliseconds during the third step. Memory is that above the start of the
step, when weights and moments are there already. docs/charts.py draws the curves.
"""

import json
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

from benchmarks.harness import in_fresh_process, memory_mb, print_table, write_csv

MODEL = {
    "model_type": "llama",
    "vocab_size": 32768,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
FREED = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back at once what is freed: the memory in use shows
DOCUMENTS, LENGTH, STEPS, POINTS = 8, 128, 3, 80


def sample(engine: str) -> dict:
    """[(share of the step's time, MB)] and the share at which each phase ends."""
    import torch

    from minisft.config.load import load
    from minisft.data.tokenizer import train_tokenizer
    from minisft.examples import naive
    from minisft.prepare.run import prepare

    half = LENGTH // 2
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer([], vocab_size=259, chat_template=None).save(Path(folder, "tokenizer"))  # a token is a byte
        row = {"prompt": "x" * half, "completion": "y" * (LENGTH - half - 1)}  # and the token that ends it
        Path(folder, "rows.jsonl").write_text((json.dumps(row) + "\n") * DOCUMENTS)
        keys = {"output_dir": f"{folder}/out", "data.train_data": f"{folder}/rows.jsonl", "model.config": MODEL}
        keys |= {"model.tokenizer_name_or_path": f"{folder}/tokenizer", "data.prompt_format": "plain"}
        keys |= {"train.precision": "fp32", "train.device": "cpu", "train.per_device_train_batch_size": DOCUMENTS}
        run = prepare(load({}, keys, origin="benchmark")[0], torch.device("cpu"))
        (batch,) = run.train.step(0, 0)
    assert (batch.num_tokens, batch.num_targets) == (DOCUMENTS * LENGTH, DOCUMENTS * (LENGTH - half))
    weights, rows = dict(run.model.named_parameters()), naive.rows_of(batch)
    notes: list[tuple[float, float]] = []
    done = threading.Event()

    def watch():
        while not done.is_set():
            notes.append((time.perf_counter(), memory_mb("VmRSS")))
            time.sleep(0.002)

    watcher, marks, before = threading.Thread(target=watch), [], 0.0
    for step in range(STEPS):
        if step == STEPS - 1:
            before = memory_mb("VmRSS")
            watcher.start()
            marks.append(time.perf_counter())
        if engine == "naive":
            loss = naive.loss_sum(partial(naive.llama, weights, MODEL), rows) / batch.num_targets
        else:
            loss, _ = run.loss(run.model, batch, 1 / batch.num_targets)
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        run.optimizer.step()
        run.optimizer.zero_grad()
        del loss
        marks.append(time.perf_counter())
    done.set()
    watcher.join()
    first, *ends = marks[-4:]
    length = ends[-1] - first
    curve: dict[int, float] = {}  # the highest of each interval, so that no peak is lost
    for when, mb in notes:
        point = min(int((when - first) / length * POINTS), POINTS - 1)
        curve[point] = max(curve.get(point, 0.0), mb - before)
    return {
        "curve": [(p / POINTS, mb) for p, mb in sorted(curve.items())],
        "ends": [(e - first) / length for e in ends],
    }


def main() -> None:
    rows = []
    for engine in ("naive", "minisft"):
        answer = in_fresh_process("benchmarks.step_memory:sample", FREED, engine=engine)
        ends = dict(zip(("forward_ends", "backward_ends"), answer["ends"]))
        rows += [{"engine": engine, "at": at, "extra_mb": mb, **ends} for at, mb in answer["curve"]]
    path = write_csv("step_memory", rows)
    peaks = {e: max(row["extra_mb"] for row in rows if row["engine"] == e) for e in ("naive", "minisft")}
    print_table([{"engine": engine, "peak above the start, MB": round(mb)} for engine, mb in peaks.items()])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
