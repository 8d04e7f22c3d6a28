"""How fast is packing, how much memory does it take, and how full are the packs?

    python -m benchmarks.bench_packing

1. Ten million lognormal lengths, max_length 2048: planned and dealt within 2 s and 0.5 GB more memory, 99.9 % full.
2. GSM8K at 1024, tokenised by a byte-level BPE that is trained on it (needs ../shared/data beside the checkout).
3. All documents longer than half a pack: none can share one, so the number of packs must be the number of documents.

`bound` is the least number of packs that any packing could reach: no packing has fewer packs than the tokens need, nor
fewer than there are documents longer than half. Every case runs in a process of its own; times are medians of five.
"""

import json

import numpy as np

from benchmarks.harness import ROOT, extra_memory, in_fresh_process, print_table, time_interleaved, write_csv
from minisft.data.packing import plan

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


def main() -> None:
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
