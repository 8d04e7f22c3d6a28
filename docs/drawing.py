"""What the pictures are drawn with: shapes on a sheet that becomes an SVG, light or dark as the reader's screen is.

A sheet has a background of its own, so that it can be read on a page of either colour. Its colours are names of COLORS, or
"none".
"""

from dataclasses import dataclass, field
from html import escape

COLORS = {  # name: (light, dark)
    "paper": ("#ffffff", "#161b22"),
    "ink": ("#1f2328", "#e6edf3"),
    "soft": ("#656d76", "#9198a1"),  # notes, axes
    "line": ("#d0d7de", "#3d444d"),
    "empty": ("#f3f5f7", "#21262d"),
    "blue": ("#b6dcff", "#1f4f86"),
    "orange": ("#ffd8a8", "#7d4e12"),
    "green": ("#b7ebc0", "#1f6b34"),
    "red": ("#ffc9c4", "#8c2f2b"),
    "violet": ("#e0d0ff", "#553098"),
    "strong_blue": ("#0969da", "#58a6ff"),
    "strong_orange": ("#bc5a00", "#f0a040"),
    "strong_green": ("#1a7f37", "#3fb950"),
    "strong_red": ("#cf222e", "#ff7b72"),
}
FONTS = {
    "": "-apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif",
    "mono": "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace",
}


def style(scheme: str | None) -> str:
    """The rules of one scheme; None: of both, the dark one where the reader's screen is dark."""

    def rules(which: int) -> str:
        return "".join(
            f".{name}{{fill:{c[which]}}}.s-{name}{{stroke:{c[which]};fill:none}}" for name, c in COLORS.items()
        )

    if scheme is not None:
        return ".none{fill:none}" + rules(["light", "dark"].index(scheme))
    return f".none{{fill:none}}{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}"


@dataclass
class Sheet:
    """A picture of width x height pixels, from the upper left. The methods draw, the later over the earlier."""

    height: int
    title: str  # for those who do not see it
    width: int = 640
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, color: str, edge: str = "line", radius: float = 3) -> None:
        at = f'x="{n(x)}" y="{n(y)}" width="{n(w)}" height="{n(h)}" rx="{n(radius)}"'
        self.parts.append(f'<rect {at} class="{color}"/>')
        if edge:
            self.parts.append(f'<rect {at} class="s-{edge}"/>')

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        color: str = "ink",
        size: float = 14,
        at: str = "start",
        bold: bool = False,
        font: str = "",
    ) -> None:
        """y is the middle of the line. at: start, middle or end."""
        weight = ' font-weight="600"' if bold else ""
        family = f' font-family="{FONTS[font]}"' if font else ""
        where = f'x="{n(x)}" y="{n(y + size * 0.35)}" font-size="{n(size)}" text-anchor="{at}"'
        self.parts.append(f'<text {where}{weight}{family} class="{color}">{escape(words)}</text>')

    def cell(
        self, x: float, y: float, w: float, h: float, words: str, color: str, *, edge: str = "line", **text
    ) -> None:
        self.box(x, y, w, h, color, edge)
        self.text(x + w / 2, y + h / 2, words, at="middle", **text)

    def line(self, *points: tuple[float, float], color: str = "soft", width: float = 1.5, dash: str = "") -> None:
        path = "M" + "L".join(f"{n(x)} {n(y)}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<path d="{path}" stroke-width="{n(width)}"{dashes} class="s-{color}"/>')

    def area(self, *points: tuple[float, float], color: str) -> None:
        self.parts.append(f'<path d="M{"L".join(f"{n(x)} {n(y)}" for x, y in points)}Z" class="{color}"/>')

    def arrow(self, *points: tuple[float, float], color: str = "soft", width: float = 1.5) -> None:
        """Along the points, with its head at the last one."""
        self.line(*points, color=color, width=width)
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        dx, dy = (x - x0) / length * 7, (y - y0) / length * 7
        self.area((x, y), (x - dx - dy / 2, y - dy + dx / 2), (x - dx + dy / 2, y - dy - dx / 2), color=color)

    def svg(self, scheme: str | None = None) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}"'
        head += f' height="{self.height}" role="img" font-family="{FONTS[""]}"><title>{escape(self.title)}</title>'
        paper = f'<rect width="{self.width}" height="{self.height}" rx="8" class="paper"/>'
        return "\n".join([head, f"<style>{style(scheme)}</style>", paper, *self.parts, "</svg>\n"])


def n(value: float) -> str:
    """A coordinate, to a hundredth of a pixel."""
    return f"{round(value, 2):g}"
