"""How fast is packing, how much memory does it take, and how full are the packs?

    python -m benchmarks.bench_packing

1. Ten million lognormal lengths, max_length 2048: planned and dealt within 2 s and 0.5 GB more memory, 99.9 % full.
2. GSM8K at 1024, tokenised by a byte-level BPE that is trained on it (needs ../shared/data beside the checkout).
3. All documents longer than half a pack: none can share one, so the number of packs must be the number of documents.
4. --documents 100000000: what a rank of several takes for the plan and an epoch of so many documents, alone ("private"), as the
   one that makes them for all ("first") and as one that maps them ("other"; shared_packs.py). `extra_mb` is the peak above the
   lengths, mapped pages included, `kept_mb` what stays that is not mapped. To packing_shared.csv.

`bound` is the least number of packs that any packing could reach: no packing has fewer packs than the tokens need, nor
fewer than there are documents longer than half. Every case runs in a process of its own; times are medians of five.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT, extra_memory, in_fresh_process, print_table, time_interleaved, write_csv
from minisft.data.packing import Plan, plan
from minisft.data.shared_packs import folder_of, made_once, packs_of

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"


def measure(lengths: np.ndarray, max_length: int, strategy: str) -> dict:
    def plan_and_deal():
        made = plan(lengths, max_length, strategy)
        return made, made.deal(0)

    (made, _), extra_mb = extra_memory(plan_and_deal)
    timed = {"plan": lambda: plan(lengths, max_length, strategy), "deal": lambda: made.deal(1)}
    seconds = {row["name"]: row["seconds"] for row in time_interleaved(timed, repeats=5, warmup=0)}
    return {
        "documents": len(lengths),
        "max_length": max_length,
        "strategy": strategy,
        "plan_s": seconds["plan"],
        "deal_s": seconds["deal"],
        "extra_mb": extra_mb,
        "packs": made.num_packs,
        "bound": max(-(-made.num_tokens // max_length), int((lengths > max_length // 2).sum())),
        "fill_percent": 100 * made.fill,
        "tokens_cut": made.num_cut,
    }


def lognormal(strategy: str) -> dict:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.9, 10_000_000).astype(np.int64), 1, 2048)
    return measure(lengths, 2048, strategy)


def longer_than_half(strategy: str) -> dict:
    return measure(np.random.default_rng(0).integers(1025, 2049, 1_000_000), 2048, strategy)


def gsm8k(strategy: str) -> dict:
    from minisft.data.tokenizer import train_tokenizer

    rows = [json.loads(line) for line in GSM8K.read_bytes().split(b"\n") if line]
    texts = [f"{row['question']}\n{row['answer']}" for row in rows]
    ids = train_tokenizer(texts, 8192).encode_batch(texts)
    return measure(np.array([len(tokens) for tokens in ids]), 1024, strategy)


def lengths_of(number: int) -> np.ndarray:
    """int32, so that the benchmark itself takes little; drawn in parts for the same reason."""
    rng, lengths = np.random.default_rng(0), np.empty(number, np.int32)
    for part in np.array_split(lengths, max(1, number // 2**20)):
        part[:] = np.clip(rng.lognormal(5.3, 0.9, len(part)), 1, 2048)
    return lengths


def a_rank(folder: str, number: int, role: str) -> dict:
    """Plans, deals an epoch, and reads the pieces of 1,000 packs of it."""
    lengths = lengths_of(number)

    def work():
        started = time.perf_counter()
        if role == "private":
            made = plan(lengths, 2048, "bfd")
        else:
            make = (lambda: plan(lengths, 2048, "bfd")) if role == "first" else None  # another rank makes nothing
            made = made_once(folder_of(Path(folder), lengths, 2048, "bfd"), make, Plan)
        planned = time.perf_counter()
        packs = packs_of(made, (0, 0, 0))
        read = int(packs.end[: packs.offsets[1000]].sum())
        return made, packs, read, planned - started, time.perf_counter() - planned

    before = resident_anonymous()
    (made, packs, read, plan_s, deal_s), extra = extra_memory(work)
    kept = resident_anonymous() - before
    return {
        "packs": made.num_packs,
        "read": read,
        "plan_s": plan_s,
        "deal_s": deal_s,
        "extra_mb": extra,
        "kept_mb": kept,
    }


def resident_anonymous() -> float:
    """MiB of this process that are no mapped files. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


def shared(number: int) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for role in ("private", "first", "other"):
            answer = in_fresh_process("benchmarks.bench_packing:a_rank", folder=folder, number=number, role=role)
            rows.append({"documents": number, "rank": role, **answer})
    assert len({row["read"] for row in rows}) == 1, "the ranks have other packs"
    print_table(rows)
    print(f"written to {write_csv('packing_shared', rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, help="only the fourth, with so many")
    if number := parser.parse_args().documents:
        return shared(number)
    cases = [(case, strategy) for case in (lognormal, gsm8k, longer_than_half) for strategy in ("bfd", "ffd")]
    rows = []
    for case, strategy in cases:
        if case is gsm8k and not GSM8K.exists():
            print(f"gsm8k is left out: there is no {GSM8K}")
            continue
        answer = in_fresh_process(f"benchmarks.bench_packing:{case.__name__}", strategy=strategy)
        rows.append({"case": case.__name__, **answer})
    print_table(rows)
    print(f"written to {write_csv('packing', rows)}")


if __name__ == "__main__":
    main()
