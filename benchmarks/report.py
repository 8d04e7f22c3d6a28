"""Writes the tables of README and docs/, and the pictures, from the files in benchmarks/results; nothing else writes them.

    python -m benchmarks.report         the tables between the markers, and docs/pictures.py

A table takes the newest row of each thing that was measured. What has no CSV is named at the end, as not yet measured.
"""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import RESULTS, ROOT, number, read_csv, table
from benchmarks.paper_report import paper_table

PROMISES = ROOT / "docs" / "promises.md"
OTHER_PEER = "transformers"  # whose code stands for the naive formula where that would take minutes
KERNEL_PAGES = ("rms_norm", "cross_entropy", "linear_cross_entropy", "flash_attention")
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
VARLEN = "times torch varlen"

# What the kernels are to reach on one H200 in bf16, in order of weight: the beginning of "op case" -> (pass, column, at
# least or at most, value); `beside` is what else is known of such hardware.
TARGETS = {
    "linear_cross_entropy 4096 x 4096 x 128256": [
        ("both", "ms", "<=", 18, "floor 16.4; best peer 17.3; Liger 141"),
        ("both", "beside_gb", "<=", 1.3, "memory beside the gradients and one fp32 gradient of the weight"),
    ],
    "flash_attention packed": [("both", VARLEN, ">=", 1.3, "FA3 causal backward: 182 TFLOP/s at 1k, 316 at 2k")],
    "flash_attention one document, head dim 128": [
        ("forward", "tflops", ">=", 450, "FA3 648"),
        ("backward", "tflops", ">=", 380, "FA3 561"),
    ],
    "flash_attention one document, head dim 64": [
        ("forward", "tflops", ">=", 400, "FA3 497"),
        ("backward", "tflops", ">=", 330, "FA3 474"),
    ],
    **{
        op: [("forward", "percent", ">=", 90, "of the copy"), ("backward", "percent", ">=", 90, beside)]
        for op, beside in [
            ("rms_norm", "of the copy"),
            ("rope", "of the copy"),
            ("swiglu", "of the copy; Liger 58"),
            ("cross_entropy", "of the copy"),
        ]
    },
    "dequantize_nf4": [("forward", "percent", ">=", 90, "of the copy")],
    "quantize_nf4": [("forward", "percent", ">=", 90, "of the copy")],
}
UNITS = {"ms": "ms", "beside_gb": "GB", "tflops": "TFLOP/s", "percent": "%", VARLEN: "x torch varlen"}


def newest(rows: list[dict], *key: str) -> list[dict]:
    """The last row with each key, in the order in which the keys came first."""
    return list({tuple(row.get(column, "") for column in key): row for row in rows}.values())


def source(rows: list[dict]) -> str:
    """Where the rows were measured: all machines, and the newest row's versions."""
    row = max(rows, key=lambda row: row["date"])
    machine = " and ".join(dict.fromkeys(r["gpu"] or f"{r['cores']} cores of {r['cpu']}" for r in rows))
    triton = f", Triton {row['triton']}" if row["gpu"] else ""
    return f"{row['date'][:10]}, {machine}, PyTorch {row['torch']}{triton}, commit {row['commit']}"


def section(title: str, command: str, results: Path, name: str, make: Callable[[list[dict]], str]) -> str:
    """The heading, where its numbers are from, and the table that `make` builds of the CSV's rows; "" if there are none."""
    rows = read_csv(results / f"{name}.csv")
    return f"## {title}\n\n(`python -m {command}`; {source(rows)})\n\n{make(rows)}" if rows else ""


ENGINES = {
    "minisft": "minisft",
    "plain": "a plain loop with transformers",
    "compiled": "the same, compiled",
    "trl": "TRL",
    "products": "the matrix products alone",
}


def newest_run(rows: list[dict]) -> list[dict]:
    date = max(row["date"] for row in rows)
    return [row for row in rows if row["date"] == date]


def step_table(rows: list[dict]) -> str:
    """The newest run of each processor, the newest of all first: speeds of different days are not compared."""
    lines = []
    cpus = dict.fromkeys(row["cpu"] for row in sorted(rows, key=lambda row: row["date"], reverse=True))
    for row in [row for cpu in cpus for row in newest_run([row for row in rows if row["cpu"] == cpu])]:
        is_ceiling, times = row["engine"] == "products", row.get("minisft_times")
        ratio = (
            "-"
            if not times or row["engine"] == "minisft"
            else f"{float(times):.0%}"
            if is_ceiling
            else f"{float(times):.1f} x"
        )
        memory = "-" if is_ceiling else f"{float(row['peak_gb']):.2f} GB"
        speed = f"{float(row['tokens_per_second']):,.0f} tokens/s"
        lines.append([row["cpu"], row["trained"], ENGINES[row["engine"]], speed, ratio, memory])
    return table(["processor", "trained", "", "speed", "minisft beside it", "memory"], lines)


def gpu_step_table(rows: list[dict]) -> str:
    """What no profiler has counted is "-"."""
    lines = []
    for row in newest(rows, "model", "tokens", "optimizer", "how"):
        speed = f"{float(row['tokens_per_second']):,.0f} tokens/s, {number(float(row['ms']))} ms"
        floor = f"{float(row['share_of_floor']):.0%}" if row.get("share_of_floor") else "-"
        busy = f"{number(float(row['busy_ms']))} ms" if row.get("busy_ms") else "-"
        counts = [row.get(name) or "-" for name in ("kernels", "copies", "waits")]
        memory = f"{float(row['peak_gb']):.1f} GB" if row.get("peak_gb") else "-"
        how = f"{row['optimizer']}, {row['weights']} weights, {row['how']}"
        lines.append([row["model"], f"{int(row['tokens']):,}", how, speed, floor, busy, *counts, memory])
    head = [
        "model",
        "tokens",
        "how",
        "speed, a step",
        "of the floor",
        "GPU busy",
        "kernels",
        "copies",
        "waits",
        "memory",
    ]
    return table(head, lines)


def dpo_table(rows: list[dict]) -> str:
    """A line for each of our cases, beside the peer with the same reference."""
    rows = newest(rows, "engine", "layout", "reference")
    lines = []
    for mine in [row for row in rows if row["engine"] == "minisft"]:
        peer = next((r for r in rows if r["engine"] != "minisft" and r["reference"] == mine["reference"]), None)
        speeds = [float(row["tokens_per_second"]) for row in (mine, peer) if row]
        memory = [f"{float(row['extra_mb']):,.0f}" for row in (mine, peer) if row]
        line = [mine["reference"], mine["layout"], *(f"{speed:,.0f} tokens/s" for speed in speeds), *["-"] * (not peer)]
        line += [f"{speeds[0] / speeds[1]:.1f} x" if peer else "-", f"{' / '.join(memory)} MB"]
        lines.append([*line, f"{float(mine['pairs_per_second']):.3g}"])
    return table(["reference", "layout", "minisft", "TRL, padded", "speed", "memory minisft / TRL", "pairs/s"], lines)


def packing_table(rows: list[dict]) -> str:
    lines = []
    for row in newest(rows, "case", "strategy"):
        seconds = [f"{number(1e3 * float(row[column]))} ms" for column in ("plan_s", "deal_s")]
        above = int(row["packs"]) - int(row["bound"])
        lines.append([row["case"].replace("_", " "), row["strategy"], f"{int(row['documents']):,}", *seconds])
        lines[-1] += [f"{float(row['fill_percent']):.2f} %", f"{above:,}", f"{float(row['extra_mb']):.0f} MB"]
    return table(
        ["lengths", "strategy", "documents", "plan", "deal an epoch", "full", "packs above bound", "memory"], lines
    )


def turns_table(rows: list[dict]) -> str:
    lines = []
    rows = newest(rows, "device", "turns", "layout")
    for shared in [row for row in rows if row["layout"] == "shared"]:
        apart = next(
            r
            for r in rows
            if r["layout"] == "separate" and (r["device"], r["turns"]) == (shared["device"], shared["turns"])
        )
        tokens = [f"{int(row['tokens']):,}" for row in (apart, shared)]
        speeds = [f"{float(row['tokens_per_second']):,.0f} tokens/s" for row in (apart, shared)]
        lines.append([shared["turns"], *tokens, *speeds, f"{float(shared['speedup']):.2f} x"])
    return table(["turns", "tokens, separate", "tokens, shared", "separate", "shared", "speed"], lines)


def tokenize_table(rows: list[dict]) -> str:
    lines = []
    for row in newest(rows, "name", "data"):
        lines.append(
            [
                row["name"],
                f"{float(row['rows_per_s']):,.0f}",
                f"{float(row['tokens_per_s']):,.0f}",
                f"{float(row['speedup']):.2f}",
            ]
        )
    return table(["", "rows/s", "tokens/s", "of encode_batch alone"], lines)


def memory_table(rows: list[dict]) -> str:
    lines = []
    for row in newest(rows, "case"):
        sizes = [f"{float(row[column]):,.0f} MB" for column in ("above_base_mb", "weights_mb", "state_mb")]
        lines.append([row["case"], *sizes])
    return table(["trained", "peak", "of it weights", "moments"], lines)


def ranks_table(rows: list[dict]) -> str:
    lines = []
    for row in newest_run(rows):
        seconds = [f"{float(row[column]):.2f} s" for column in ("step_s", "after_s")]
        sizes = [f"{float(row[column]):,.0f} MB" for column in ("sent_mb", "peak_mb")]
        lines.append([row["case"], row["ranks"], *seconds, row["messages"], *sizes])
    return table(["", "ranks", "step", "of it after the backward", "messages", "sent", "peak of a rank"], lines)


def generate_table(rows: list[dict]) -> str:
    lines = []
    for row in newest_run(rows):
        speed, times = f"{float(row['tokens_per_second']):,.0f} tokens/s", f"{float(row['batch_times']):.1f} x"
        lines.append([row["engine"], speed, times, f"{row['same']} of {row['prompts']}", row["new_tokens"]])
    return table(["", "speed", "the batch beside it", "same tokens", "new tokens"], lines)


def validate_table(rows: list[dict]) -> str:
    lines = []
    for row in newest(rows, "shape"):
        lines.append(
            [row["shape"].replace("_", " and "), f"{int(row['rows']):,}", f"{float(row['bytes_per_row']):.0f}"]
        )
        lines[-1] += [f"{float(row['seconds']):.1f} s", f"{float(row['peak_mb']):.0f} MB"]
    return table(["rows", "number", "bytes a row", "time", "memory"], lines)


def by_case(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """{(op, case): {contender: {pass: row}}} of the newest rows; a failure stands under the pass ""."""
    found: dict = {}
    for row in newest(rows, "op", "case", "contender", "pass"):
        found.setdefault((row["op"], row["case"]), {}).setdefault(row["contender"], {})[row.get("pass", "")] = row
    return found


def whole(by_pass: dict) -> dict:
    """The row of forward and backward together, or of the forward where there is no backward; {} after a failure."""
    return by_pass.get("both") or by_pass.get("forward") or {}


def cpu_table(rows: list[dict]) -> str:
    """Beside the naive formula; beside transformers where the formula, a recurrence token by token, would take minutes."""
    lines = []
    for (op, case), contenders in by_case(rows).items():
        peer = "eager" if "eager" in contenders else OTHER_PEER
        ours, theirs = (whole(contenders.get(name, {})) for name in ("torch", peer))
        if not ours or not theirs:
            continue
        memory = [f"{float(row['extra_mb']):.0f}" if row.get("extra_mb") else "?" for row in (ours, theirs)]
        times = [float(row["ms"]) for row in (ours, theirs)]
        speedup = float(ours.get("speedup") or times[1] / times[0])
        line = [op if peer == "eager" else f"{op} / transformers'", case, f"{' / '.join(map(number, times))} ms"]
        lines.append([*line, f"{speedup:.2f} x", f"{' / '.join(memory)} MB"])
    return table(["op, forward and backward", "size", "ours / naive", "speed", "memory ours / naive"], lines)


def judged(rows: list[dict]) -> list[dict]:
    """Every target with what was measured: dict(op, case, pass, column, value, relation, target, met, beside)."""
    cases, found = by_case(rows), []
    for prefix, targets in TARGETS.items():
        matching = [key for key in cases if " ".join(key).startswith(prefix) and key[0] == prefix.split()[0]]
        for at, column, relation, target, beside in targets:
            for op, case in matching or [(prefix.partition(" ")[0], prefix.partition(" ")[2])]:
                value = _measured(cases.get((op, case), {}), at, column)
                met = None if value is None else (value <= target if relation == "<=" else value >= target)
                row = dict(op=op, case=case, column=column, value=value, relation=relation, target=target, met=met)
                found.append({**row, "pass": at, "beside": beside})
    return found


def _measured(contenders: dict, at: str, column: str) -> float | None:
    row = contenders.get("triton", {}).get(at, {})
    if column == VARLEN:
        theirs = contenders.get("torch varlen", {}).get(at, {})
        return float(theirs["ms"]) / float(row["ms"]) if row and theirs else None
    return float(row[column]) if row.get(column) else None


def target_table(rows: list[dict]) -> str:
    lines = []
    for row in [row for row in judged(rows) if row["value"] is not None]:
        unit = UNITS[row["column"]]
        value = f"{number(row['value'])} {unit}"
        met = "yes" if row["met"] else "**no**"
        at = {"both": "forward + backward"}.get(row["pass"], row["pass"])
        sign = {"<=": "at most", ">=": "at least"}[row["relation"]]
        lines.append([row["op"], row["case"], at, value, f"{sign} {number(row['target'])} {unit}", met, row["beside"]])
    return table(["op", "size", "pass", "measured", "target", "met", "beside"], lines)


def gpu_table(rows: list[dict]) -> str:
    lines = []
    for (op, case), contenders in by_case(rows).items():
        first = next(iter(contenders))
        name = "triton" if "triton" in contenders else first
        ours, total = contenders[name], whole(contenders[name])
        times = " + ".join(number(float(ours[at]["ms"])) for at in ("forward", "backward") if at in ours) or "failed"
        percent = " / ".join(f"{float(ours[at]['percent']):.0f} %" for at in ours if ours[at].get("percent"))
        others = []
        for other, by_pass in contenders.items():
            row = whole(by_pass)
            if other == name or by_pass.get("", {}).get("error", "").startswith("not here"):
                continue
            ratio = f" ({float(row['ms']) / float(total['ms']):.2f} x)" if row and total else ""
            others.append(f"{other} {number(float(row['ms']))}{ratio}" if row else f"{other} failed")
        memory = f"{float(total['extra_mb']):,.0f}" if total.get("extra_mb") else ""
        lines.append([op, case, times, percent, memory, ", ".join(others)])
    head = [
        "op",
        "size",
        "ours, ms: forward + backward",
        "of the ceiling, by pass",
        "memory, MB",
        "others, ms in all (times ours)",
    ]
    return table(head, lines)


SECTIONS = [  # title, command, CSV, table
    ("A whole optimizer step", "benchmarks.train_step", "train_step", step_table),
    ("A step that trains adapters", "benchmarks.train_step --lora 16", "train_step_lora", step_table),
    ("A whole optimizer step on a GPU", "benchmarks.train_step_gpu", "train_step_cuda", gpu_step_table),
    ("Memory of a fine-tuning", "benchmarks.bench_memory", "memory", memory_table),
    ("Preference tuning", "benchmarks.bench_dpo", "dpo_cpu", dpo_table),
    ("Preference tuning on a GPU", "benchmarks.bench_dpo --device cuda", "dpo_cuda", dpo_table),
    ("Several ranks", "benchmarks.bench_ranks", "ranks", ranks_table),
    ("Generation", "benchmarks.bench_generate MODEL", "generate", generate_table),
    ("Packing", "benchmarks.bench_packing", "packing", packing_table),
    ("Turns that share their past", "benchmarks.bench_shared_turns", "shared_turns", turns_table),
    ("From the file to the token cache", "benchmarks.bench_tokenize", "tokenize", tokenize_table),
    ("Validation", "benchmarks.bench_validate", "validate", validate_table),
    ("The kernels' torch paths on a CPU", "benchmarks.bench_<op>", "kernels_cpu", cpu_table),
    ("The kernels on a GPU against their targets", "benchmarks.gpu_session --out DIR", "kernels_cuda", target_table),
    ("The kernels on a GPU beside others", "benchmarks.gpu_session --out DIR", "kernels_cuda", gpu_table),
]


def block(results: Path = RESULTS) -> str:
    """What stands between the markers of docs/benchmarks.md."""
    parts, missing = [], []
    for title, command, name, make in SECTIONS:
        text = section(title, command, results, name, make)
        parts += [text] if text else []
        missing += [] if text else [f"{title[0].lower()}{title[1:]} (`python -m {command}`)"]
    for name, rows in (("kernels_cpu", "kernels_cpu"), ("kernels_gpu", "kernels_cuda")):
        parts += [f"![{name}](images/{name}.svg)"] if read_csv(results / f"{rows}.csv") else []
    return "\n\n".join([*parts, *([f"Not yet measured: {'; '.join(missing)}."] if missing else [])])


def highlights(results: Path = RESULTS) -> str:
    """The README's table: the six numbers that say most. "" where one of them was not measured."""
    names = ("train_step", "dpo_cpu", "kernels_cpu", "packing")
    step, dpo, kernels, packing = (read_csv(results / f"{name}.csv") for name in names)
    if not (step and dpo and kernels and packing):
        return ""
    engines = {row["engine"]: row for row in newest_run(step) if row["trained"] == "answers"}
    speed = {name: f"{float(row['tokens_per_second']):,.0f}" for name, row in engines.items()}
    memory = {name: f"{float(row['peak_gb']):.2f} GB" for name, row in engines.items() if row["peak_gb"]}
    times = {name: float(row["minisft_times"]) for name, row in engines.items() if row["minisft_times"]}
    lines = [
        [
            "a training step of a 57 M Llama, answers trained",
            f"{speed['minisft']} tokens/s",
            f"{times['compiled']:.1f} x a compiled loop with transformers ({speed['compiled']}), {times['trl']:.1f} x TRL "
            f"({speed['trl']}); {times['products']:.0%} of what its matrix products alone allow",
        ],
        ["its peak memory", memory["minisft"], f"{memory['compiled']} compiled, {memory['trl']} TRL"],
    ]
    of_dpo = {(row["engine"] == "minisft", row["layout"]): row for row in dpo if row["reference"] == "cached"}
    mine, peer = of_dpo[True, "shared"], next(row for (is_ours, _), row in of_dpo.items() if not is_ours)
    ours, theirs = (float(row["tokens_per_second"]) for row in (mine, peer))
    extra = float(mine["extra_mb"]) / float(peer["extra_mb"])
    beside = f"{ours / theirs:.1f} x TRL ({theirs:,.0f}), with {extra:.0%} of its memory"
    lines.append(["DPO with a cached reference and shared prompts", f"{ours:,.0f} tokens/s", beside])
    cases = by_case(kernels)
    for op, case, what in (
        ("linear_cross_entropy", "1024 x 576 x 49152 bf16", "the loss from hidden states, 49,152 tokens, bf16"),
        (
            "flash_attention",
            "packed, head dim 64, mean length 146, 2048 tokens, 9 + 3 heads, bf16",
            "attention in packed documents, 2,048 tokens, bf16",
        ),
    ):
        fast, naive = (whole(cases[op, case][name]) for name in ("torch", "eager"))
        shown = [f"{number(float(row['ms']))} ms, {float(row['extra_mb']):.0f} MB" for row in (fast, naive)]
        lines.append([what, shown[0], f"{float(fast['speedup']):.1f} x the naive formula ({shown[1]})"])
    plan = next(row for row in newest(packing, "case", "strategy") if int(row["documents"]) == 10_000_000)
    lines.append(
        [
            "planning the packs of 10 million documents",
            f"{float(plan['plan_s']):.1f} s",
            f"{float(plan['fill_percent']):.2f} % full",
        ]
    )
    return table(["what", "minisft", "beside it"], lines)


def paper_block(results: Path = RESULTS) -> str:
    """What stands between the markers of docs/step_on_paper.md."""
    return section("Steps on paper", "benchmarks.step_on_paper", results, "step_on_paper", paper_table)


def kernel_block(op: str, results: Path = RESULTS) -> str:
    """What stands between the markers of docs/kernels/<op>.md: the rows of the op and of its relatives (add_rms_norm)."""
    parts = []
    for name, make in (("kernels_cpu", cpu_table), ("kernels_cuda", gpu_table)):
        rows = [row for row in read_csv(results / f"{name}.csv") if row["op"] in (op, f"add_{op}")]
        parts += [f"({source(rows)})\n\n{make(rows)}"] if rows else []
    return "\n\n".join(parts) or "Not yet measured."


def reliability_block(results: Path = RESULTS) -> str:
    """What stands between the markers of docs/promises.md: the experiments of tests/reliability.py."""
    path = results / "reliability.json"
    experiments = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not experiments:
        return "Not yet measured."
    lines = [
        [
            name,
            f"{row['runs']:,}",
            str(len(row["failures"])),
            f"{row['seconds']:,.0f}",
            ", ".join(f"{what}: {value:,}" for what, value in row["seen"].items()),
        ]
        for name, row in experiments.items()
    ]
    head = ["experiment", "runs", "failures", "seconds", "seen"]
    return f"({source(list(experiments.values()))})\n\n{table(head, lines)}"


def write_block(readme: Path, text: str) -> None:
    """Raises ValueError where the README does not have the two markers, once and in order."""
    old = readme.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"{readme}: expected the lines {BEGIN} and {END}, once each and in this order")
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    from docs import pictures  # which reads the same rows by this file

    pictures.main()
    write_block(ROOT / "README.md", highlights(RESULTS))
    write_block(ROOT / "docs" / "benchmarks.md", block(RESULTS))
    write_block(ROOT / "docs" / "step_on_paper.md", paper_block(RESULTS))
    write_block(PROMISES, reliability_block(RESULTS))
    for op in KERNEL_PAGES:
        write_block(ROOT / "docs" / "kernels" / f"{op}.md", kernel_block(op))
    print("written: README.md, docs/benchmarks.md, docs/step_on_paper.md, docs/promises.md, docs/kernels/")


if __name__ == "__main__":
    main()
