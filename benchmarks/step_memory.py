"""The memory of a process over one optimizer step: the naive run (examples/naive.py) beside the engine, on the same rows.

    python -m benchmarks.step_memory

A Llama of 13.2 M parameters with a vocabulary of 32,768, in fp32 on a CPU: 8 documents of 128 tokens, half of them trained,
AdamW. A thread notes the resident memory every two milliseconds during the third step. Memory is that above the start of the
step, when weights and moments are there already. docs/pictures.py draws the curves.
"""

import os
import threading
import time
from functools import partial

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
DOCUMENTS, LENGTH, STEPS, POINTS = 8, 128, 3, 80


def sample(engine: str) -> dict:
    """[(share of the step's time, MB)] and the share at which each phase ends."""
    import numpy as np
    import torch

    from minisft import sft
    from minisft.data.batch import Batch, document_bounds
    from minisft.examples import naive
    from minisft.model.families import from_hf
    from minisft.model.load import build_model, init_weights

    model = build_model(from_hf(MODEL), "cpu")
    init_weights(model, 0)
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, MODEL["vocab_size"], (DOCUMENTS, LENGTH)))
    half = LENGTH // 2
    rows = [naive.Row(x, [naive.IGNORED] * half + x[half:], [0.0] * half + [1.0] * half) for x in ids.tolist()]
    flat, at = ids.flatten(), torch.arange(DOCUMENTS * LENGTH)
    cu_seqlens = torch.arange(0, DOCUMENTS * LENGTH + 1, LENGTH, dtype=torch.int32)
    start, end = document_bounds(cu_seqlens, len(flat))
    trained = at[at % LENGTH >= half]
    targets = flat[trained]
    batch = Batch(
        input_ids=flat,
        position_ids=(at % LENGTH).int(),
        start=start,
        end=end,
        max_seqlen=LENGTH,
        cu_seqlens=cu_seqlens,
        loss_rows=trained - 1,
        targets=targets,
        row_weights=None,
        row_kind=None,
        row_source=None,
        row_document=None,
        labels=None,
        num_tokens=len(flat),
        num_targets=len(targets),
        total_weight=float(len(targets)),
        shared=False,
    )
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
            loss = naive.loss_sum(partial(naive.llama, weights, MODEL), rows) / len(targets)
        else:
            loss, _ = sft.loss(model, batch, 1 / len(targets))
        marks.append(time.perf_counter())
        loss.backward()
        marks.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
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
    os.environ["MALLOC_MMAP_THRESHOLD_"] = (
        "65536"  # glibc gives back at once what is freed, so that the memory in use shows
    )
    rows = []
    for engine in ("naive", "minisft"):
        answer = in_fresh_process("benchmarks.step_memory:sample", engine=engine)
        ends = dict(zip(("forward_ends", "backward_ends"), answer["ends"]))
        rows += [{"engine": engine, "at": at, "extra_mb": mb, **ends} for at, mb in answer["curve"]]
    path = write_csv("step_memory", rows)
    peaks = {e: max(row["extra_mb"] for row in rows if row["engine"] == e) for e in ("naive", "minisft")}
    print_table([{"engine": engine, "peak above the start, MB": round(mb)} for engine, mb in peaks.items()])
    print(f"written: {path}")


if __name__ == "__main__":
    main()
