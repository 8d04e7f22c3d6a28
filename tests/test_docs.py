"""The pages hold: pictures are current, links lead somewhere, examples print what they say, commands run.

A block of a page that no test can run has a comment on the line before it, which says why:

    <!-- not run: needs a GPU -->
"""

import doctest
import importlib.util
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("docs/**/*.md")])
PAGES = [path for path in PAGES if path.name not in ("CHANGELOG.md", "notes.md")]  # records, which nobody follows
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
CHAPTERS = sorted(ROOT.glob("docs/how-it-works/[1-6]-*.md"))
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)
REASONS = (
    "needs a GPU",
    "needs a cluster",
    "needs the network",
    "needs your files",
    "installs packages",
    "takes minutes",
)


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


def test_the_page_for_those_who_migrate_is_current():
    from docs import migrating

    assert migrating.PAGE.read_text(encoding="utf-8") == migrating.page()


def test_the_notebook_is_the_page_whose_examples_are_run():
    from docs import notebook

    assert notebook.NOTEBOOK.read_text(encoding="utf-8") == notebook.notebook()
    for cell in json.loads(notebook.notebook())["cells"]:
        assert cell["cell_type"] == "markdown" or compile("".join(cell["source"]), "cell", "exec")


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


# ---- links ------------------------------------------------------------------------------------------------------

LINK = re.compile(r"!?\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)")
NAMED = re.compile(r"`(?P<name>[A-Za-z_][\w.]*)`")


def links(name: str) -> list[tuple[str, str]]:
    """(words, target) of every link of a page, outside of its blocks."""
    page = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))
    return [(m["words"], m["target"]) for m in LINK.finditer(page) if "://" not in m["target"]]


def anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def defines(path: Path, name: str) -> bool:
    """Whether a Python file has a function, a class or a value of this name (`Class.method` too) at its head or in a class."""
    *_, last = name.split(".")
    return (
        re.search(rf"^ *(def|class) {last}\b|^[\w, ]*\b{last}\b[^=(]*=", path.read_text(encoding="utf-8"), re.MULTILINE)
        is not None
    )


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_to_names_in_them(name):
    wrong = []
    for words, target in links(name):
        file, _, anchor = target.partition("#")
        path = ((ROOT / name).parent / file).resolve() if file else ROOT / name
        if not path.exists() or anchor and anchor not in anchors(path):
            wrong.append(target)
        elif path.suffix == ".py" and (named := NAMED.fullmatch(words)) and not words.strip("`").endswith(".py"):
            if not defines(path, named["name"]):
                wrong.append(f"{target} has no {named['name']}")
    assert wrong == []


def test_a_link_to_a_name_that_is_gone_is_found():
    loop = ROOT / "minisft" / "loop.py"
    assert defines(loop, "train_step") and defines(ROOT / "minisft" / "model" / "decoder.py", "Decoder.forward")
    assert not defines(loop, "train_steps") and not defines(loop, "lr_factor")  # imported there, defined elsewhere


def test_the_first_walk_is_short():
    """README, chapters 1 to 6 and the naive run: 9,000 words, of which README may take 1,200."""
    assert len(CHAPTERS) == 6
    pages = [ROOT / "README.md", *CHAPTERS, ROOT / "examples" / "naive.py"]
    words = {path.name: len(path.read_text(encoding="utf-8").split()) for path in pages}
    assert words["README.md"] <= 1_200 and sum(words.values()) <= 9_000, words


# ---- blocks -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder in which the files of the repository are, for reading."""
    for path in ROOT.iterdir():
        if path.name[0] != "." and path.name not in ("output", "README.md"):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_runs_or_says_why_not():
    marks = [(name, block.line, block.mark) for name in NAMES for block in blocks(name) if block.mark]
    known = re.compile(rf"not run: ({'|'.join(REASONS)})|exits with \d+")
    assert [mark for mark in marks if not known.fullmatch(mark[2])] == []


def is_run(block: Block) -> bool:
    return not (block.mark or "").startswith("not run")


WITH_PYTHON = [name for name in NAMES if any(block.language == "python" and is_run(block) for block in blocks(name))]


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_examples_print_what_the_page_says(name, folder):
    """The Python blocks of a page, from the first to the last, as one program."""
    from minisft.kernels.common import use_backend

    namespace: dict = {"__name__": "__main__"}
    with use_backend("auto"):  # whatever the page chooses, the next test finds what was there
        for block in blocks(name):
            if block.language == "python" and is_run(block):
                run_example(block, name, namespace)


def run_example(block: Block, name: str, namespace: dict) -> None:
    if ">>>" not in block.text:
        exec(compile(block.text, f"{name}:{block.line}", "exec"), namespace)
        return
    test = doctest.DocTestParser().get_doctest(block.text, namespace, name, name, block.line)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append, clear_globs=False)
    namespace |= test.globs
    assert not said, "".join(said)


COMMANDS = {name: [b for b in blocks(name) if b.language == "bash"] for name in NAMES}
COMMAND = re.compile(r"^(?:python -m )?(minisft(?:\.train)?|benchmarks\.\w+|docs\.\w+)(?: ([\w-]+))?", re.MULTILINE)


def test_commands_name_what_exists():
    """Also those that are not run: the module, the command of minisft, the files of the repository."""
    from minisft.__main__ import COMMANDS as OURS

    wrong = []
    for name, block in [(name, block) for name, of_page in COMMANDS.items() for block in of_page]:
        for module, word in COMMAND.findall(block.text):
            if module == "minisft" and word not in OURS or importlib.util.find_spec(module) is None:
                wrong.append((name, block.line, module, word))
        files = re.findall(r"(?<![\w/])(?:configs|examples|tests|benchmarks)/[\w./-]+\w", block.text)
        wrong += [(name, block.line, file) for file in files if not (ROOT / file).exists()]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if any(map(is_run, COMMANDS[name]))])
def test_commands_run(name, folder):
    """The commands of a page, from the first to the last, in one folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for block in filter(is_run, COMMANDS[name]):
        command = ["bash", "-e", "-c", block.text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        expected = int(block.mark.rpartition(" ")[2]) if block.mark else 0
        assert done.returncode == expected, f"{name}:{block.line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
