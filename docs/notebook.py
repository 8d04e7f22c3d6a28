"""Writes examples/python_api.ipynb from docs/python-api.md, which a test runs: `python -m docs.notebook`."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE, NOTEBOOK = ROOT / "docs" / "python-api.md", ROOT / "examples" / "python_api.ipynb"
AT_THE_ROOT = "import os\n\nif not os.path.exists('configs'):  # opened in examples/\n    os.chdir('..')"


def cells() -> list[dict]:
    """Prose and code of the page in turn."""
    found = [_cell("code", AT_THE_ROOT)]
    for i, text in enumerate(re.split(r"^```(?:python)?\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)):
        found += [_cell("code" if i % 2 else "markdown", text.strip("\n"))] if text.strip() else []
    return found


def _cell(kind: str, text: str) -> dict:
    text = re.sub(r"\]\((?!http|#)([^)]+)\)", r"](../docs/\1)", text) if kind == "markdown" else text
    cell = {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def notebook() -> str:
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells(), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    NOTEBOOK.write_text(notebook(), encoding="utf-8")
    print("written: examples/python_api.ipynb")


if __name__ == "__main__":
    main()
