"""Rows per second of validation: files are read, parsed strictly, checked and turned into examples, and counted.

    python -m benchmarks.bench_validate [--rows 3000000]

This is all that happens to a row before a template or a tokenizer sees it, in one process, a row at a time. Rows of
about 200 bytes are made in a temporary folder, once as question and answer and once as messages; every thousandth is
cut off in the middle, and must be found. Each file is read by a fresh process, for its own peak of resident memory
(which includes the interpreter and torch). The goal is 3 million rows within 30 s and 1 GB. Results go to
results/validate.csv.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.harness import in_fresh_process, print_table, write_csv

SPOILED = 1000  # every so many rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3_000_000)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in ("question_answer", "messages"):
            path = Path(folder) / f"{shape}.jsonl"
            write_rows(path, shape, arguments.rows)
            result = in_fresh_process("benchmarks.bench_validate:validate", path=str(path))
            assert (result["rows"], result["bad"]) == (arguments.rows, arguments.rows // SPOILED), result
            result["seconds_3m"] = 3e6 * result["seconds"] / arguments.rows
            results.append({"shape": shape, "bytes_per_row": path.stat().st_size / arguments.rows, **result})
            path.unlink()
    print_table(results)
    print(f"\nwritten to {write_csv('validate', results)}")


def write_rows(path: Path, shape: str, num_rows: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for i in range(num_rows):
            question = f"A farmer has 12 sheep and buys {i} more every week. How many are there a month later?"
            answer = f"In four weeks the farmer buys 4 * {i} = {4 * i} sheep, so there are {12 + 4 * i} of them."
            row = {"question": question, "answer": answer}
            if shape == "messages":
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                row = {"messages": turns}
            text = json.dumps(row)
            file.write((text[: len(text) // 2] if i % SPOILED == SPOILED - 1 else text) + "\n")


def validate(path: str) -> dict:
    """Check every row of a file; returns how many there are, how many of them are bad, and the seconds that it took."""
    from minisft.data.detect_format import detect_row_format, rename_fields
    from minisft.data.formats import to_example
    from minisft.data.row_format import FormatOptions
    from minisft.data.rows import BadRow, RowError
    from minisft.data.sources import parse_source, read_rows

    options, row_format = FormatOptions(), None
    num_rows, dropped = 0, Counter()
    source = parse_source(path)
    started = time.perf_counter()
    for row in read_rows(source):
        num_rows += 1
        if isinstance(row, BadRow):
            dropped[row.reason] += 1
            continue
        try:
            data = rename_fields(row.data, source.field_map, source.ignore)
            row_format = row_format or detect_row_format(data, source.format, options, has_template=True)
            to_example(data, row_format, options)
        except RowError as error:
            dropped[error.reason] += 1
    seconds = time.perf_counter() - started
    return {"rows": num_rows, "bad": dropped.total(), "seconds": seconds, "rows_per_s": num_rows / seconds}


if __name__ == "__main__":
    main()
