"""The table of benchmarks/results/step_on_paper.csv, for docs/step_on_paper.md."""

from benchmarks.harness import number, table

SETTINGS = ("model", "card", "tokens", "accumulation", "optimizer", "weights_dtype", "lora")


def newest_steps(rows: list[dict]) -> list[list[dict]]:
    """The newest step of each model and its settings: a row for every part, that of the whole step ("all") at the end."""
    steps: dict[tuple, list[dict]] = {}
    for row in rows:
        settings = tuple(row[key] for key in SETTINGS)
        if settings not in steps or steps[settings][-1]["part"] == "all":
            steps[settings] = []  # the one before was complete
        steps[settings].append(row)
    return list(steps.values())


def step_name(row: dict) -> str:
    times = f"{row['accumulation']} x " if row["accumulation"] != "1" else ""
    lora = f", LoRA {row['lora']}" if row["lora"] != "None" else ""
    tokens = f"{times}{int(row['tokens']):,} tokens"
    return f"{row['model']}, {row['card']}, {tokens}, {row['optimizer']}, {row['weights_dtype']} weights{lora}"


def paper_table(rows: list[dict]) -> str:
    lines = []
    for row in (step[-1] for step in newest_steps(rows)):
        sizes = [f"{float(row['bytes']) / 1e9:,.0f} GB", f"{float(row['flops']) / 1e12:,.1f} TFLOP"]
        times = [f"{number(float(row[column]))} ms" for column in ("roofline_ms", "floor_ms", "ms")]
        share = f"{float(row['floor_ms']) / float(row['ms']):.0%}"
        lines.append([step_name(row), f"{int(row['launches']):,}", row["waits"], *sizes, *times, share])
    head = ["step", "launches", "waits", "moved", "multiplied", "roofline", "floor", "estimate", "floor / estimate"]
    return table(head, lines)
