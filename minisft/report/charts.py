"""The charts of a report, drawn by matplotlib.

As SVG they are part of the page: their texts stay texts of 11 pixels, because a chart is drawn as wide as a phone shows it and is
never scaled down, and their colours are the page's variables, so that they follow its light and dark form.
"""

import io
import math
import re
from dataclasses import dataclass, field

import numpy as np

from minisft.errors import UserError
from minisft.report.runs import Series

WIDTH, HEIGHT, LEGEND_ROW = 340, 220, 14  # CSS pixels; a legend of more than two rows makes a chart higher
FONT_SIZE = 8.4  # points: 11.2 pixels
# In a PNG; in a page each is a variable, for which a colour stands that is nowhere else.
COLOURS = {"text": "#1b1f24", "soft": "#5c6270", "line": "#d6dae0"}
PALETTE = ("#2f6db3", "#c4532d", "#3a8a3f", "#8a4fb0", "#a3791a", "#1f8f96", "#b8437f", "#5d6470")
COLOURS |= {f"line-{number}": colour for number, colour in enumerate(PALETTE)}
STAND_INS = {name: f"#0102{number:02x}" for number, name in enumerate(COLOURS)}


@dataclass(frozen=True)
class Line:
    label: str
    series: Series
    colour: int  # number of it
    is_evaluation: bool  # dashed, with points


@dataclass(frozen=True)
class Chart:
    """Lines over the steps, or bars."""

    title: str
    lines: list[Line]
    smooth: bool = True  # draw the moving average, and the values themselves pale behind it
    bars: list[tuple[str, int]] = field(default_factory=list)  # label and number


def smoothed(values: list[float]) -> np.ndarray:
    """The exponential moving average over about a thirtieth of the values, without the pull of its start. What is not finite
    is left out."""
    keep = 1 - 2 / (max(1.0, len(values) / 30) + 1)
    total, weight, found = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append(total / weight if weight else math.nan)
    return np.array(found)


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "the report needs matplotlib, which is not installed", hint='pip install "minisft[plot]"'
        ) from None


def draw(chart: Chart, format: str) -> bytes:
    """The chart as a PNG, or as SVG to put into a page. The same chart gives the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    colours = COLOURS if format == "png" else STAND_INS
    settings = {"svg.fonttype": "none", "svg.hashsalt": chart.title}  # texts as texts, and no ids by chance
    settings |= {"font.size": FONT_SIZE, "font.family": "sans-serif", "text.color": colours["text"]}
    settings |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), colours["line"])
    settings |= dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), colours["soft"])
    settings |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
    settings |= {"axes.axisbelow": True, "text.parse_math": False}  # a $ in the name of a file is no formula
    with matplotlib.rc_context(settings):
        columns = 2 if max((len(line.label) for line in chart.lines), default=0) <= 20 else 1  # of the legend
        height = HEIGHT + LEGEND_ROW * max(0, math.ceil(len(chart.lines) / columns) - 2)
        figure = Figure(figsize=(WIDTH / 96, height / 96), layout="constrained")
        axes = figure.subplots()
        axes.set_title(chart.title, loc="left", fontsize=FONT_SIZE + 1, fontweight="bold")
        if chart.bars:
            axes.bar(range(len(chart.bars)), [number for _, number in chart.bars], color=colours["line-0"], width=0.85)
            shown = range(0, len(chart.bars), math.ceil(len(chart.bars) / 4))
            axes.set_xticks(list(shown), [chart.bars[i][0] for i in shown])
        for line in chart.lines:
            colour, label, (steps, values) = colours[f"line-{line.colour % len(PALETTE)}"], line.label, line.series
            label = f" {label}" if label.startswith("_") else label  # else matplotlib leaves it out of the legend
            finite = np.where(np.isfinite(values), values, np.nan)
            points = {"marker": "o", "markersize": 3} if line.is_evaluation or len(values) < 8 else {}
            if line.is_evaluation:
                axes.plot(steps, finite, "--", color=colour, label=label, linewidth=1, **points)
            elif points or not chart.smooth:
                axes.plot(steps, finite, color=colour, label=label, linewidth=1.4, **points)
            else:
                axes.plot(steps, finite, color=colour, linewidth=0.8, alpha=0.35)
                axes.plot(steps, smoothed(values), color=colour, label=label, linewidth=1.6)
        axes.grid(axis="y", color=colours["line"], linewidth=0.6)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if chart.lines:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if len(chart.lines) > 1:
                # beside the lines: matplotlib's search for a free place is slow with many values, and warns of it
                figure.legend(
                    loc="outside lower left", ncols=columns, fontsize=FONT_SIZE, handlelength=1.2, labelspacing=0.25
                )
        out = io.BytesIO()
        if format == "png":
            figure.savefig(out, format="png", dpi=192, facecolor="white")
            return out.getvalue()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue().decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(
        r'^<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" width="{WIDTH}" role="img">', svg, flags=re.DOTALL
    )
    for name, colour in STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.encode()
