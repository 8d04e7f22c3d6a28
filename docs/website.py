"""What `mkdocs build --strict` needs beside mkdocs.yml: the pages of the whole repository, and the files that they link to.

On the site every page has the path that it has in the repository, so that its relative links hold as they are. A linked file
becomes a page with its code highlighted, and [`train_step`](../minisft/loop.py) leads to the line of the definition.
"""

import ast
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from mkdocs.structure.toc import get_toc
from pygments.lexers import find_lexer_class_for_filename

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "kernels/*.md", "docs/**/*.md")
COPIED = {".md", ".css", ".svg", ".png", ".ipynb"}  # any other file is shown as code
LINK = re.compile(r"(?:\[`(?P<name>[A-Za-z_][\w.]*)`)?\]\((?P<path>[^)\s:#]+)\)")
LINE = "__codelineno-0-{}"  # the anchor of a line, named by pymdownx.highlight


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, the pages, and what these link to; nothing else of docs_dir."""
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    texts = [(page.parent, page.read_text(encoding="utf-8")) for page in pages]
    links = {(folder / m["path"]).resolve() for folder, text in texts for m in LINK.finditer(text)}
    paths = sorted(pages | links | {ROOT / style for style in config.extra_css})
    ours = [_file(path, config) for path in paths if path.is_file() and path.is_relative_to(ROOT)]
    return Files([*(file for file in files if file.src_dir != config.docs_dir), *ours])


def _file(path: Path, config: MkDocsConfig) -> File:
    uri = path.relative_to(ROOT).as_posix()
    if path.suffix in COPIED:
        return File.generated(config, uri, abs_src_path=str(path))
    lexer = find_lexer_class_for_filename(path.name)
    head = f"---\nsearch: {{exclude: true}}\nhide: [navigation]\n---\n\n# `{uri}`\n"
    fence = "~" * 30  # longer than any in the file
    begin = f"{fence} {{.{lexer.aliases[0] if lexer else 'text'} linenums=1}}"
    page = "\n".join([head, begin, path.read_text(encoding="utf-8"), fence])
    return File.generated(config, f"{uri}.md", content=page, inclusion=InclusionLevel.NOT_IN_NAV)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files lead to their pages, and examples with prompts are marked as such."""

    def to_page(m: re.Match) -> str:
        uri = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), m["path"]))
        if not files.get_file_from_path(f"{uri}.md"):
            return m[0]
        anchor = f"#{LINE.format(_line(m['name'], ROOT / uri))}" if m["name"] and uri.endswith(".py") else ""
        return f"{m[0].removesuffix(')')}.md{anchor})"

    if not (ROOT / page.file.src_uri).exists():
        return markdown  # code
    return LINK.sub(to_page, markdown).replace("```python\n>>>", "```pycon\n>>>")


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """The functions and classes of a Python file are its table of contents; every line of it can be linked to."""
    if page.file.src_uri.endswith(".py.md"):
        text = (ROOT / page.file.src_uri.removesuffix(".md")).read_text(encoding="utf-8")
        page.toc = get_toc(_contents(ast.parse(text).body))
        page.present_anchor_ids |= {LINE.format(i) for i in range(1, text.count("\n") + 1)}


def _contents(body: list[ast.stmt], level: int = 2) -> list[dict]:
    """The functions and classes among these statements, with the methods of the classes."""
    defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    methods = [_contents(node.body, level + 1) if isinstance(node, ast.ClassDef) else [] for node in defined]
    where = [{"level": level, "id": LINE.format(node.lineno), "name": node.name} for node in defined]
    return [entry | {"children": children} for entry, children in zip(where, methods)]


def _line(name: str, path: Path) -> int:
    """Where a file defines `name` or `Class.name`, counted from 1; the first line if it does not."""
    text, at = path.read_text(encoding="utf-8"), 0
    for part in name.split("."):
        definition = rf"^ *(?:def|class) {part}\b|^(?! )[\w, ]*\b{part}\b[^=(\n]*="
        if found := re.compile(definition, re.MULTILINE).search(text, at):
            at = found.start()
    return text.count("\n", 0, at) + 1
