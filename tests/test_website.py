"""The documentation site: it builds without a warning, loads nothing from elsewhere, and shows what the pages and files have.

Skipped where the extra `docs` is not installed. `.ci/run` runs this file in an environment that has neither torch nor conftest.
"""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("*.md"), *ROOT.glob("kernels/*.md"), *ROOT.glob("docs/**/*.md")])
pytestmark = pytest.mark.skipif(find_spec("material") is None, reason="the extra `docs` is not installed")


class Read(HTMLParser):
    """What a page has of each tag inside of its article, which ids, and what it leads to and loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loads, self.tags, self.code, self.lines = set(), [], [], [], "", {}
        self.inside, self.line = [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag in ("article", "code", "pre"):
            self.inside.append(tag)
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in ("link", "script", "img", "iframe", "source"):
            self.loads += [values[key] for key in ("href", "src") if values.get(key)]
        if values.get("id", "").startswith("__codelineno"):
            self.line = values["id"]
        if "article" in self.inside:
            self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag in self.inside:
            self.inside.remove(tag)

    def handle_data(self, data):
        if self.inside[-2:] == ["pre", "code"]:
            self.code += data
            self.lines[self.line] = self.lines.get(self.line, "") + data


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Read]:
    return {path: Read(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}


def of(site: Path, source: Path) -> Path:
    """Where the page of a file of the repository lies."""
    name = source.relative_to(ROOT).as_posix()
    name = re.sub(r"(^|/)README\.md$", r"\1index.md", name)
    return site / f"{name.removesuffix('.md')}.html"


def test_links_lead_to_files_and_anchors_of_the_site(site, pages):
    wrong = []
    for path, page in pages.items():
        for url in (urlsplit(link) for link in [*page.links, *page.loads]):
            if url.scheme in ("http", "https"):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path not in ("", ".") else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or url.fragment and unquote(url.fragment) not in pages[target].ids | {"__toc"}:
                wrong.append((path.relative_to(site), url.geturl()))
    assert wrong == []


def test_nothing_is_loaded_from_elsewhere(pages):
    assert [(path, url) for path, page in pages.items() for url in page.loads if urlsplit(url).netloc] == []


def test_every_list_and_table_of_a_page_is_one_on_the_site(site, pages):
    """Markdown has dialects: a forge begins a list inside of a paragraph and the site does not, for example."""
    for source in SOURCES:
        text = re.sub(r"^```.*?^```", "", source.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        items = re.findall(r"^ *(?:[-*]|\d+\.) ", text, re.MULTILINE)
        rows = re.findall(r"^ *\|(?! *:?-+:? *\|).*\|$", text, re.MULTILINE)  # without the line below a table's head
        tags = pages[of(site, source)].tags
        assert (tags.count("li"), tags.count("tr")) == (len(items), len(rows)), source


def test_a_file_that_a_page_links_to_is_shown_whole(site, pages):
    sources = [path for path in pages if (ROOT / path.relative_to(site).with_suffix("")).is_file()]
    assert of(site, ROOT / "minisft" / "loop.py") in sources and of(site, ROOT / "launch" / "slurm.sbatch") in sources
    for path in sources:
        text = (ROOT / path.relative_to(site).with_suffix("")).read_text(encoding="utf-8")
        assert pages[path].code.strip("\n") == text.strip("\n"), path


def test_a_link_with_a_name_leads_to_the_line_of_its_definition(site, pages):
    found = 0
    for source in SOURCES:
        for name, link in re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", source.read_text(encoding="utf-8")):
            target = of(site, (source.parent / link).resolve())
            if name.endswith(".py"):
                continue
            href = os.path.relpath(target, of(site, source).parent)
            lines = [url.partition("#")[2] for url in pages[of(site, source)].links if url.startswith(f"{href}#")]
            last = name.rpartition(".")[2]
            definition = re.compile(rf" *(def|class) {last}\b|[\w, ]*\b{last}\b.*=")
            shown = [pages[target].lines[line].strip("\n") for line in lines]
            assert any(map(definition.match, shown)), (name, link, shown)
            found += 1
    assert found > 20
