"""The pages hold: pictures are current, links lead somewhere, examples print what they say, commands run.

A block of a page that no test can run has a comment on the line before it, which says why:

    <!-- not run: needs a GPU -->
"""

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("docs/**/*.md")])
PAGES = [path for path in PAGES if path.name not in ("CHANGELOG.md", "notes.md")]  # records, which nobody follows
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
CHAPTERS = sorted(ROOT.glob("docs/how-it-works/[1-6]-*.md"))
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)
REASONS = ("needs a GPU", "needs the network", "needs your files", "trains for minutes", "a sketch")


class Block(NamedTuple):
    language: str
    text: str
    mark: str | None
    line: int


@cache
def blocks(name: str) -> list[Block]:
    page = (ROOT / name).read_text(encoding="utf-8")
    return [
        Block(m["language"], m["text"], m["mark"], page[: m.start("text")].count("\n") + 1)
        for m in BLOCK.finditer(page)
    ]


# ---- pictures ---------------------------------------------------------------------------------------------------


def test_pictures_are_current():
    """`python -m docs.pictures` writes them; by hand, or after another measurement, they would grow old."""
    from docs import pictures

    drawn = pictures.drawn()
    assert {path.name for path in pictures.IMAGES.iterdir()} == drawn.keys()
    assert [name for name, text in drawn.items() if (pictures.IMAGES / name).read_text(encoding="utf-8") != text] == []


def test_a_picture_is_of_both_schemes_and_nothing_lies_outside():
    import xml.etree.ElementTree as xml

    from docs import pictures

    for name, text in pictures.drawn().items():
        root = xml.fromstring(text)
        width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
        assert "prefers-color-scheme:dark" in text and root[0].text, name
        for element in root:
            where = {key: float(element.get(key, 0)) for key in ("x", "y", "width", "height", "font-size")}
            assert 0 <= where["x"] and where["x"] + where["width"] <= width, (name, element.attrib)
            assert 0 <= where["y"] and where["y"] + where["height"] <= height, (name, element.attrib)
            if element.tag.endswith("text"):  # an average letter is half as wide as it is high
                length = len("".join(element.itertext())) * where["font-size"] * 0.5
                start = where["x"] - length * {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor")]
                assert start >= 0 and start + length <= width, (name, element.text)


def test_the_picture_of_a_gpu_is_drawn_once_there_are_measurements(tmp_path):
    from benchmarks.harness import write_csv
    from docs import charts

    assert charts.roofline(tmp_path) is None
    row = {"op": "rms_norm", "case": "16384 x 4096 bf16", "pass": "both", "ms": 1.0}
    rows = [row | {"contender": name, "percent": share} for name, share in (("triton", 92.0), ("liger", 81.0))]
    write_csv("kernels_cuda", rows, tmp_path)
    text = charts.roofline(tmp_path).svg()
    assert "liger" in text and "rms_norm" in text
