"""What the benchmark of an op prints: a table for each size, in 100 columns, and one line that says what it shows."""

from benchmarks.harness import number
from benchmarks.report import OTHER_PEER, by_case, whole

COLUMNS = (
    ("forward", 10),
    ("backward", 10),
    ("both", 10),
    ("speed", 9),
    ("memory", 10),
    ("ceiling", 9),
    ("differs", 9),
)
NAME_WIDTH = 26
FORMULA = {"eager": "the naive formula", OTHER_PEER: "transformers' code"}


def op_table(rows: list[dict], is_quick: bool = False) -> str:
    """rows: as compare.rows_of makes them. is_quick: of tiny sizes, which show nothing.

    speed: how many times as fast as the naive formula. ceiling: the least time that the bytes and FLOPs take on this device, over
    the time that was taken. differs: from the first contender, relative.
    """
    lines = []
    for (op, case), contenders in by_case(rows).items():
        lines += ["", f"{op}, {case}", " " * NAME_WIDTH + "".join(name.rjust(width) for name, width in COLUMNS)]
        for name, by_pass in contenders.items():
            if "" in by_pass:
                lines.append(
                    f"  {name[: NAME_WIDTH - 3].ljust(NAME_WIDTH - 2)}{by_pass['']['error'][: 100 - NAME_WIDTH]}"
                )
                continue
            row = whole(by_pass)
            cells = {label: duration(float(by_pass[label]["ms"])) for label in by_pass}
            naive = whole(contenders.get(baseline(contenders), {}))
            cells["speed"] = f"{speed(row, naive):.2f} x" if naive else ""
            cells["memory"] = f"{float(row['extra_mb']):,.0f} MB" if row.get("extra_mb") not in (None, "") else ""
            cells["ceiling"] = f"{float(row['percent']):.0f} %" if row.get("percent") else ""
            cells["differs"] = f"{float(row['differs']):.0e}" if float(row["differs"]) else "0"
            line = "".join(cells.get(column, "").rjust(width) for column, width in COLUMNS)
            lines.append(f"  {name[: NAME_WIDTH - 3].ljust(NAME_WIDTH - 2)}{line}".rstrip())
    says = [shown(op, rows) for op in dict.fromkeys(row["op"] for row in rows)]
    if is_quick:
        says = ["These sizes show that it runs, and nothing about speed."]
    return "\n".join([*lines, "", *filter(None, says)])


def shown(op: str, rows: list[dict]) -> str:
    """What the rows of an op say, over all sizes; "" where there is nothing to compare with."""
    speeds, memory, shares, ours, beside = [], [], [], "torch", ""
    for (name, _), contenders in by_case(rows).items():
        if name != op:
            continue
        ours = "triton" if whole(contenders.get("triton", {})) else "torch"
        mine, naive = whole(contenders.get(ours, {})), whole(contenders.get(baseline(contenders), {}))
        if mine and naive:
            beside = FORMULA.get(baseline(contenders), "")
            speeds.append(speed(mine, naive))
            if all(row.get("extra_mb") not in (None, "") for row in (mine, naive)) and float(naive["extra_mb"]) > 0:
                memory.append(float(mine["extra_mb"]) / float(naive["extra_mb"]))
        if ours == "triton" and mine.get("percent"):
            shares.append(float(mine["percent"]))
    says = []
    if speeds:
        says.append(f"{span(speeds)} times as fast as {beside}")
    if memory:
        says.append(f"in {span([100 * share for share in memory])} % of its memory")
    if shares:
        says.append(f"at {span(shares)} % of the ceiling")
    return f"{op}: {ours} is {', '.join(says)}." if says else ""


def baseline(contenders: dict) -> str:
    """Beside whom the others stand: the naive formula; transformers' code where that would take minutes."""
    return "eager" if "eager" in contenders else OTHER_PEER


def speed(row: dict, naive: dict) -> float:
    """How many times as fast: by the median over the rounds, where it is known."""
    return float(row.get("speedup") or float(naive["ms"]) / float(row["ms"]))


def span(values: list[float]) -> str:
    low, high = number(min(values)), number(max(values))
    return low if low == high else f"{low} to {high}"


def duration(ms: float) -> str:
    return f"{number(1e3 * ms)} us" if ms < 0.1 else f"{number(ms)} ms" if ms < 10_000 else f"{number(ms / 1e3)} s"
