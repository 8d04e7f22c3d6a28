"""`minisft report`: what it shows is what was logged; and the pages in a real browser, on a phone and on a screen."""

import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from tiny import settings, train

from minisft.__main__ import main
from minisft.config.load import read_resolved
from minisft.errors import UserError
from minisft.report.charts import Chart, Line, draw, smoothed
from minisft.report.runs import differences, read_runs

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two runs that differ by a rate and by a default; their names have what HTML would read as its own."""
    folder = tmp_path_factory.mktemp("report")
    rows = [{"prompt": f"<b>{i}", "completion": f"{i}</b>" * (1 + i % 7)} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"train.max_steps": 10, "evaluate.sample_steps": 5, "evaluate.max_new_tokens": 5, "data.packing": True}
    options |= {"data.train_data": [str(folder / "rows.jsonl[:20]"), str(folder / "rows.jsonl[20:30]")]}
    options |= {"data.eval_data": str(folder / "rows.jsonl[30:]"), "evaluate.eval_steps": 4}
    options |= {"train.per_device_train_batch_size": 2, "data.max_length": 48}
    settings(folder)
    train(folder, output_dir=str(folder / "one"), **options)
    train(
        folder, output_dir=str(folder / "a<i>b"), **options, **{"train.learning_rate": 2e-3, "train.weight_decay": 0.5}
    )
    return folder


class Page(HTMLParser):
    """Tags that are closed in order, all that could be fetched, and the texts."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.fetched, self.cells, self.text = [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.fetched += [v for name, v in attributes if name in ("src", "href", "action", "xlink:href") and v[0] != "#"]
        self.fetched += re.findall(r"url\((?!#)[^)]*", " ".join(v for _, v in attributes if v))
        if tag not in ("meta", "path", "use", "rect"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_the_page_of_a_run(home, capsys):
    assert main(["report", str(home / "one"), "--png", str(home / "png")]) == 0
    page = Page(home / "one" / "report.html")
    assert page.fetched == [] and "script" not in page.text
    rows = [json.loads(line) for line in (home / "one" / "metrics.jsonl").read_text().splitlines()]
    losses, evaluations = ([row[name] for row in rows if name in row] for name in ("loss", "eval_loss"))
    assert page.cells[page.cells.index("loss") + 1] == f"{losses[-1]:.4g}".ljust(5, "0")[:6]
    best = page.cells[page.cells.index("best eval_loss") + 1]
    assert best.endswith(f"at step {[4, 8, 10][int(np.argmin(evaluations))]}")
    for title in (
        "Loss",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
        "Peak memory (GiB)",
        "Fill of the packs",
    ):
        assert title in page.text
    for title in ("Loss by kind", "Loss by source", "Loss by kind, eval", "Documents by number of tokens"):
        assert title in page.text
        assert (home / "png" / f"{re.sub('[^a-zA-Z_.]', '_', title)}.png").read_bytes()[:4] == b"\x89PNG"
    samples = [json.loads(line) for line in (home / "one" / "step_samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert sample["prompt"] in page.text and sample["answer"] in page.cells and sample["output"] in page.cells
    assert page.cells.count("step 5") == 5
    assert 'class="answer" title="answer">' in (home / "one" / "report.html").read_text()  # a row with its mask
    at = page.cells.index("train.learning_rate")
    assert page.cells[at + 1 : at + 3] == ["0.01", "run()"] and "versions torch" in page.cells


def test_what_differs_is_exactly_that(home, tmp_path):
    folders = [home / "one", home / "a<i>b"]
    found = dict(differences(read_runs(folders)))
    assert found == {
        "output_dir": [f'"{folder}"' for folder in folders],
        "train.learning_rate": ["0.01", "0.002"],
        "train.weight_decay": ["0.0", "0.5"],  # of which one is a default
    }
    other = tmp_path / "one"
    shutil.copytree(home / "one", other, ignore=shutil.ignore_patterns("model", "checkpoints"))
    record = json.loads((other / "record.json").read_text())
    record["starts"][-1]["versions"]["torch"] = "0.1"
    files = record["starts"][-1]["data"]["train"]["files"]  # the same rows in another folder
    record["starts"][-1]["data"]["train"]["files"] = {
        f"elsewhere/{Path(path).name}": one for path, one in files.items()
    }
    (other / "record.json").write_text(json.dumps(record))
    config = (other / "config.toml").read_text()
    (other / "config.toml").write_text(re.sub(r"\nseed = .*", "", config))  # of a version without that key
    runs = read_runs([home / "one", other])
    found = dict(differences(runs))
    assert found.keys() == {"versions torch", "train.seed"} and found["train.seed"][1] == "-"
    assert [run.name for run in runs] == [str(home / "one"), str(other)]  # as both are "one"
    out = tmp_path / "both.html"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    page = Page(out)
    at = page.cells.index("train.weight_decay")
    assert page.cells[at + 1 : at + 3] == ["0.0", "0.5"] and "a<i>b" in page.cells and page.fetched == []


def test_values_with_a_hash_and_origins_are_read_back():
    text = 'a = "x  # y"  # run.toml\n\n[b]\nc = [1, 2]  # default of trainer_type dpo\n'
    assert read_resolved(text) == {"a": ('"x  # y"', "run.toml"), "b.c": ("[1, 2]", "default of trainer_type dpo")}


@pytest.mark.parametrize("name", ["$\\bad{$.jsonl", "_rows.jsonl"])
def test_a_chart_shows_every_name_as_it_is(name):
    lines = [Line(label, ([1, 2], [1.0, 2.0]), 0, is_evaluation=False) for label in (name, "b")]
    assert draw(Chart(name, lines), "svg").decode().count(name) == 2  # in its title and its legend


def test_the_moving_average_starts_at_the_values_and_leaves_out_what_is_not_finite():
    assert smoothed([3.0] * 90).tolist() == pytest.approx([3.0] * 90)
    noisy = np.random.default_rng(0).normal(size=900)
    assert np.std(smoothed(noisy.tolist())[100:]) < 0.3 and abs(smoothed(noisy.tolist())[-1]) < 1
    assert smoothed([math.nan, 1.0, math.inf, 1.0])[1:].tolist() == [1.0, 1.0, 1.0]


def test_a_run_without_its_data_and_mistakes(home, tmp_path, capsys):
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    (lonely / "metrics.jsonl").write_text('{"step": 1, "loss": "NaN"}\n{"step": 2, "lo')  # no more than this
    assert main(["report", str(lonely)]) == 0
    page = Page(lonely / "report.html")
    assert "no rows and lengths are shown" in page.text and page.cells[page.cells.index("loss") + 1] == "nan"
    with pytest.raises(UserError, match="no metrics.jsonl"):
        read_runs([tmp_path])
    for words in (
        [str(tmp_path)],
        [str(lonely), "--ouT", "x"],
        ["--out", "x"],
        [str(lonely), "--out", "no/such/folder.html"],
    ):
        assert main(["report", *words]) == 2
    assert "error" in capsys.readouterr().err


def test_other_data_is_not_shown_as_what_was_trained(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "changed"
    shutil.copytree(home / "one", folder, ignore=shutil.ignore_patterns("model", "checkpoints"))
    config = (folder / "config.toml").read_text()
    assert "rows.jsonl[20:30]" in config
    (folder / "config.toml").write_text(config.replace("rows.jsonl[20:30]", "rows.jsonl[20:29]"))
    assert main(["report", str(folder)]) == 0
    page = Page(folder / "report.html")
    assert "not what this run was trained on" in page.text, page.text[-900:]
    assert "Documents by number of tokens" not in page.text


# ---- in a browser -----------------------------------------------------------------------------------------------

LOOK = """() => {
  const small = [];
  for (const element of document.querySelectorAll('body *')) {
    if (!element.checkVisibility() || element.tagName.toLowerCase() == 'style') continue;
    const scale = element.getScreenCTM ? element.getScreenCTM().a : 1;
    for (const node of element.childNodes) {
      const size = parseFloat(getComputedStyle(element).fontSize) * scale;
      if (node.nodeType == Node.TEXT_NODE && node.data.trim() && size < 11) small.push([size, node.data.trim()]);
    }
  }
  const root = document.documentElement, colours = getComputedStyle(document.body);
  const outside = [...document.querySelectorAll('svg, .bars, h1, p')].filter(e => e.getBoundingClientRect().right > innerWidth);
  return {small, overflow: root.scrollWidth - root.clientWidth, outside: outside.length, text: colours.color,
          paper: colours.backgroundColor};
}"""


def browser_path() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_pages_can_be_read_on_a_phone_and_on_a_screen_in_light_and_dark(home, tmp_path):
    """No text below 11 pixels as it is shown, and nothing wider than the window; of the report and of the audit."""
    playwright = pytest.importorskip("playwright.sync_api")
    if browser_path() is None:
        pytest.skip("no Chromium; CHROMIUM=/path/to/it names one")
    one, several, audit = (tmp_path / f"{name}.html" for name in ("one", "several", "audit"))
    assert main(["report", str(home / "one"), "--out", str(one)]) == 0
    assert main(["report", str(home / "one"), str(home / "a<i>b"), "--out", str(several)]) == 0
    main(["audit", str(home / "one" / "config.toml"), "--html", str(audit)])
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        for path in (one, several, audit):
            for width in (390, 1280):
                for scheme in ("light", "dark"):
                    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                    asked = []
                    page.on("request", lambda request, asked=asked: asked.append(request.url))
                    page.goto(path.as_uri())
                    found, where = page.evaluate(LOOK), (path.name, width, scheme)
                    assert (found["small"], found["overflow"], found["outside"]) == ([], 0, 0), where
                    is_light = brightness(found["paper"]) > brightness(found["text"]) + 0.5
                    is_dark = brightness(found["text"]) > brightness(found["paper"]) + 0.5
                    assert (is_light, is_dark) == (scheme == "light", scheme == "dark"), where
                    assert asked == [path.as_uri()]
                    page.close()
        browser.close()
