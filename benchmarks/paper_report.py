"""The table and the chart of benchmarks/results/step_on_paper.csv, for docs/step_on_paper.md."""

from pathlib import Path

from benchmarks.harness import drawing, number, read_csv, table

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


def paper_chart(results: Path, folder: Path) -> Path | None:
    """Draws step_on_paper.png: for each step three bars in ms, stacked by part. Returns its path; None if nothing is drawn."""
    steps = newest_steps(read_csv(results / "step_on_paper.csv"))
    if not steps or (pyplot := drawing()) is None:
        return None
    bars = {"estimate": "ms", "roofline": "roofline_ms", "floor": "floor_ms"}
    parts = dict.fromkeys(row["part"] for rows in steps for row in rows[:-1])
    colors = dict(zip(parts, pyplot.get_cmap("tab20").colors))
    figure, axes = pyplot.subplots(len(steps), 1, figsize=(11, 1.5 * len(steps) + 0.8), squeeze=False)
    for axis, rows in zip(axes.flat, steps):
        for bar, column in bars.items():
            end = 0.0
            for row in rows[:-1]:
                axis.barh(bar, float(row[column]), left=end, color=colors[row["part"]])
                end += float(row[column])
            axis.text(end, bar, f" {number(end)}", va="center", fontsize=8)
        axis.set_title(step_name(rows[-1]), fontsize=9, loc="left")
        axis.margins(x=0.06)
        axis.tick_params(labelsize=8)
    axes.flat[-1].set_xlabel("ms, computed and not measured", fontsize=8)
    patches = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(patches, colors, loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.83, 1))
    figure.savefig(folder / "step_on_paper.png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return folder / "step_on_paper.png"
