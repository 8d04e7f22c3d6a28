"""The pictures of numbers, from the files in benchmarks/results. pictures.py has the others, and writes all of them."""

import math
from pathlib import Path

from benchmarks.harness import RESULTS, number, read_csv
from benchmarks.paper_report import newest_steps
from benchmarks.report import OTHER_PEER, by_case, whole
from docs.drawing import Sheet

PARTS = {  # of a step on paper -> colour; what is not here is "rest"
    "matmuls": "blue",
    "attention": "orange",
    "norms": "green",
    "linear cross-entropy": "red",
    "optimizer": "violet",
}


def kernels(results: Path = RESULTS) -> Sheet | None:
    """Speed-up over the naive formula on a log axis and the memory beside it: the first case of each op, slowest gain last."""
    cases, found = by_case(read_csv(results / "kernels_cpu.csv")), {}
    for op, case in sorted(cases, key=lambda key: "bf16" not in key[1]):  # those in bf16 first; the sort is stable
        contenders = cases[op, case]
        peer = "eager" if "eager" in contenders else OTHER_PEER
        ours, theirs = whole(contenders.get("torch", {})), whole(contenders.get(peer, {}))
        if op not in found and ours and theirs:
            times = float(ours.get("speedup") or float(theirs["ms"]) / float(ours["ms"]))
            found[op] = (times, float(ours["extra_mb"]), float(theirs["extra_mb"]), peer)
    if not found:
        return None
    ranked = sorted(found.items(), key=lambda item: -item[1][0])
    top, step, left, right = 62, 24, 186, 420
    s = Sheet(
        top + step * len(ranked) + 46,
        "Speed-up of the ops' torch paths over the naive formula on a CPU, and their memory beside its",
    )
    s.text(20, 24, "faster than the naive formula, on a CPU", bold=True)
    s.text(450, 24, "memory, ours / naive", bold=True)
    most = max(times for times, *_ in found.values())

    def at(times: float) -> float:
        return left + (right - left) * math.log(max(times, 0.9)) / math.log(most)

    bottom = top + step * len(ranked)
    for tick in (1, 2, 5, 10, 20, 50):
        if tick <= most:
            s.line((at(tick), 44), (at(tick), bottom), color="line", width=1)
            s.text(at(tick), bottom + 12, f"{tick} x", at="middle", size=11.5, color="soft")
    for i, (op, (times, ours_mb, theirs_mb, peer)) in enumerate(ranked):
        y = top + step * i
        s.text(left - 10, y, op + (" *" if peer == OTHER_PEER else ""), at="end", size=12.5)
        s.box(min(at(times), at(1)), y - 7, max(abs(at(times) - at(1)), 1.5), 14, "strong_blue", edge="", radius=2)
        s.text(max(at(times), at(1)) + 5, y, f"{times:.1f} x", size=11.5)
        share = min(ours_mb / theirs_mb, 1.0) if theirs_mb else 1.0
        s.box(480, y - 6, 60, 12, "empty", edge="", radius=2)
        s.box(480, y - 6, max(60 * share, 1.5), 12, "strong_orange", edge="", radius=2)
        s.text(548, y, f"{ours_mb:.0f} / {theirs_mb:.0f} MB", size=11.5)
    note = "Forward and backward, bf16 where the op has it."
    s.text(
        20,
        bottom + 32,
        note + (" * against transformers' code" if any(p == OTHER_PEER for *_, p in found.values()) else ""),
        size=11.5,
        color="soft",
    )
    return s


def roofline(results: Path = RESULTS) -> Sheet | None:
    """On a GPU: the share of the ceiling (a copy, or matrix products) that each op and its peers reach. None: not measured."""
    rows = []
    for (op, case), contenders in by_case(read_csv(results / "kernels_cuda.csv")).items():
        shares = {
            name: float(w["percent"])
            for name, by_pass in contenders.items()
            if (w := whole(by_pass)) and w.get("percent")
        }
        if "triton" in shares:
            rows.append((op, case, shares))
    if not rows:
        return None
    top, step, left, right = 62, 34, 200, 610
    s = Sheet(
        top + step * len(rows) + 40, "Share of the hardware's ceiling that our kernels and their peers reach on a GPU"
    )
    s.text(20, 24, "share of the ceiling, forward and backward", bold=True)
    bottom = top + step * len(rows) - 10
    for tick in range(0, 101, 25):
        x = left + (right - left) * tick / 100
        s.line((x, 42), (x, bottom), color="line", width=1)
        s.text(x, bottom + 12, f"{tick} %", at="middle", size=11.5, color="soft")
    for i, (op, case, shares) in enumerate(rows):
        y = top + step * i
        s.text(left - 10, y - 6, op, at="end", size=12.5)
        s.text(left - 10, y + 8, case[:34], at="end", size=9.5, color="soft")
        for name, percent in sorted(shares.items(), key=lambda item: item[0] == "triton"):
            x = left + (right - left) * min(percent, 100) / 100
            is_ours = name == "triton"
            s.box(x - 4, y - 9, 8, 14, "strong_blue" if is_ours else "line", edge="" if is_ours else "soft", radius=2)
            if not is_ours:
                s.text(x, y + 13, name, at="middle", size=9, color="soft")
    return s


def memory(results: Path = RESULTS) -> Sheet | None:
    """Resident memory over one step, the naive run beside the engine."""
    rows = read_csv(results / "step_memory.csv")
    if not rows:
        return None
    date = max(row["date"] for row in rows)
    curves: dict[str, list[dict]] = {}
    for row in rows:
        if row["date"] == date:
            curves.setdefault(row["engine"], []).append(row)
    highest = max(float(row["extra_mb"]) for of in curves.values() for row in of)
    top = math.ceil(highest / 100) * 100
    left, right, low, high = 70, 610, 250, 50
    s = Sheet(
        320,
        "Memory above the start of a step: the naive run rises to its logits and their copies, the engine does not have them",
    )
    s.text(20, 24, "memory over one step, above its start", bold=True)
    for tick in range(0, top + 1, 100):
        y = low - (low - high) * tick / top
        s.line((left, y), (right, y), color="line", width=1)
        s.text(left - 8, y, f"{tick} MB", at="end", size=11.5, color="soft")
    names = {"naive": ("examples/naive.py", "strong_red"), "minisft": ("the engine", "strong_blue")}
    for name, (words, color) in names.items():
        of = curves[name]
        points = [
            (left + (right - left) * float(r["at"]), low - (low - high) * max(float(r["extra_mb"]), 0) / top)
            for r in of
        ]
        s.line(*points, color=color, width=2.2)
        x, y = min(points, key=lambda point: point[1])
        y += -10 if name == "naive" else 30
        words = f"{words}: {max(float(row['extra_mb']) for row in of):.0f} MB"
        s.text(min(x + 8, right - 190), y, words, color=color, size=13, bold=True)
    y = low + 18
    for name, (_, color) in names.items():
        ends = [0.0, float(curves[name][0]["forward_ends"]), float(curves[name][0]["backward_ends"]), 1.0]
        for phase, (a, b) in zip(("forward, loss", "backward", "update"), zip(ends, ends[1:])):
            x0, x1 = left + (right - left) * a, left + (right - left) * b
            s.line((x0 + 2, y), (x1 - 2, y), color=color, width=3)
            if x1 - x0 > 60:
                s.text((x0 + x1) / 2, y + 11, phase, at="middle", size=11, color="soft")
        y += 26
    return s


def step_time(results: Path = RESULTS) -> Sheet | None:
    """A step on a GPU of paper, by part: computed, not measured."""
    steps = newest_steps(read_csv(results / "step_on_paper.csv"))
    if not steps:
        return None
    left, right, top, step = 20, 560, 88, 58
    s = Sheet(
        top + step * len(steps) + 30,
        "Where the time of a step goes on a GPU, estimated from what it launches, moves and multiplies",
    )
    s.text(20, 24, "where the time of a step goes, by estimate", bold=True)
    x = 20.0
    for part, color in [*PARTS.items(), ("rest", "line")]:
        s.box(x, 44, 12, 12, color, edge="soft", radius=2)
        s.text(x + 18, 50, part, size=12)
        x += 34 + 6.6 * len(part)
    for i, rows in enumerate(steps):
        y, total = top + step * i, float(rows[-1]["ms"])
        r = rows[-1]
        s.text(20, y, f"{r['model']}, {int(r['tokens']):,} tokens, one {r['card']}", size=12.5)
        s.text(630, y + 24, f"{number(total)} ms", size=12.5, at="end")
        shares = {part: 0.0 for part in [*PARTS, "rest"]}
        for row in rows[:-1]:
            shares[row["part"] if row["part"] in PARTS else "rest"] += float(row["ms"]) / total
        x = float(left)
        for part, share in shares.items():
            w = (right - left) * share
            s.box(x, y + 12, w, 24, PARTS.get(part, "line"), edge="paper", radius=0)
            if w > 34:
                s.text(x + w / 2, y + 24, f"{share:.0%}", at="middle", size=11.5)
            x += w
        floor = left + (right - left) * float(r["floor_ms"]) / total
        s.line((floor, y + 8), (floor, y + 40), color="ink", width=2)
    s.text(
        20,
        top + step * len(steps) + 10,
        "The line across a bar: what no step of this model can go below. Computed, not measured.",
        size=11.5,
        color="soft",
    )
    return s
