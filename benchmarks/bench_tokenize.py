"""Rows per second from a file to the token cache, beside the Rust tokenizer alone.

    python -m benchmarks.bench_tokenize [--data FILE] [--vocab-size 8192] [--repeats 5]

Timed in turn, so that a noisy minute hits all of them:

    encode_batch       the library alone on the same texts, rendered before: the lower bound
    encode_batch_fast  the same without character offsets, which masks need
    build chat         parse, render by our chat template, encode, find spans, write and fsync the cache
    build tagged       the same by a template of somebody else with generation tags: rendered twice, to check the tags
    build untagged     the same without tags: rendered three times, to find where the answer begins
    build plain        prompt and answer encoded apart, without a template

The tokenizer is a byte-level BPE trained on the file's own first 2,000 rows. Results go to results/tokenize.csv.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

from benchmarks.harness import ROOT, print_table, time_interleaved, write_csv
from minisft.data.cache import build_cache
from minisft.data.row_format import FormatOptions
from minisft.data.sources import parse_source, read_rows
from minisft.data.tokenizer import train_tokenizer

UNTAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        sys.exit(f"{arguments.data} does not exist; name a file of question/answer or instruction rows by --data")

    source = parse_source(str(arguments.data))
    first = [" ".join(str(value) for value in row.data.values()) for row in islice(read_rows(source), 2000)]
    tokenizer = train_tokenizer(first, arguments.vocab_size)

    def build(prompt_format: str, template: str = tokenizer.template.text):
        with tempfile.TemporaryDirectory() as folder:
            options = FormatOptions(prompt_format=prompt_format)
            templated = replace(tokenizer, template=replace(tokenizer.template, text=template))
            return build_cache([source], templated, cache_dir=folder, options=options)

    cache = build("chat")
    bounds = cache.offsets.tolist()
    texts = [tokenizer.decode(cache.ids[a:b]) for a, b in zip(bounds, bounds[1:])]
    backend = tokenizer.backend
    rows = time_interleaved(
        {
            "encode_batch": lambda: backend.encode_batch(texts, add_special_tokens=False),
            "encode_batch_fast": lambda: backend.encode_batch_fast(texts, add_special_tokens=False),
            "build chat": lambda: build("chat"),
            "build tagged": lambda: build("chat", TAGGED),
            "build untagged": lambda: build("chat", UNTAGGED),
            "build plain": lambda: build("plain"),
        },
        repeats=arguments.repeats,
        baseline="encode_batch",
    )
    for row in rows:
        row |= {
            "data": arguments.data.name,
            "rows": len(texts),
            "tokens": bounds[-1],
            "vocab_size": tokenizer.vocab_size,
        }
        row |= {"rows_per_s": len(texts) / row["seconds"], "tokens_per_s": bounds[-1] / row["seconds"]}
    print_table(rows)
    print(f"\nwritten to {write_csv('tokenize', rows)}")


if __name__ == "__main__":
    main()
