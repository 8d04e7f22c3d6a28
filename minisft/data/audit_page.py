"""The audit as one HTML page that needs nothing else: no network, no library, light and dark.

Texts of the data are untrusted: every one is escaped, and the page's own script only hides and shows elements.
"""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from minisft.data.audit import TITLES, Finding, place_of, stretches
from minisft.data.cache import Documents
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError

ROWS_SHOWN = 200  # of each set, besides those with a finding
ROWS_OF_A_FINDING = 20
TOKENS_SHOWN = 4000  # of a row

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #667; --line: #d6dae0; --paper: #fff; --bar: #4c78a8;
  --context: #b9c6d6; --trained: #d9f2d9; --mark: #2f7d32; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --soft: #99a; --line: #3a4048; --paper: #16191d;
  --bar: #7aa6d6; --context: #43505f; --trained: #1e3d22; --mark: #8fd694; --bad: #ff8a80; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums } .bad { color: var(--bad); font-weight: 600 }
.soft { color: var(--soft) } svg { display: block; max-width: 100% } svg text { fill: var(--text); font-size: 11px }
.bar { fill: var(--bar) } .context { fill: var(--context) }
.row { border: 1px solid var(--line); border-radius: .4rem; margin: .6rem 0; padding: .5rem .8rem }
.row pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; margin: .3rem 0 0 }
mark { background: var(--trained); color: inherit } .special { color: var(--mark); font-weight: 600 }
s { color: var(--soft) } mark.reasoning { border-bottom: 1px dashed } mark.tool_call { border-bottom: 1px solid }
select { font: inherit; margin-right: 1rem } [hidden] { display: none }
"""
SCRIPT = """
function filterRows() {
  const source = document.getElementById('source').value, finding = document.getElementById('finding').value;
  let shown = 0;
  for (const row of document.querySelectorAll('.row')) {
    const findings = row.dataset.findings.split(' ');
    row.hidden = (source && row.dataset.source !== source) || (finding && !findings.includes(finding));
    shown += !row.hidden;
  }
  document.getElementById('shown').textContent = shown;
}
"""


def write_page(
    path: Path,
    report: dict[str, Any],
    sets: dict[str, Documents],
    findings: dict[str, list[Finding]],
    tokenizer: Tokenizer,
) -> None:
    """Write the page. report: as commands/audit.py makes it; sets, findings: by the name of the set. Raises UserError."""
    body = ["<h1>Audit of the data</h1>", f'<p class="soft">{escape(report["tokenizer"])}</p>', _verdict(report)]
    for name, entry in report["sets"].items():
        body += [f"<h2>{escape(name)}</h2>", _findings(entry), _account(entry)]
        body += ["<h3>Tokens by kind</h3>", _kind_chart(entry["kinds"])]
        body += ["<h3>Documents by number of tokens</h3>", _length_chart(entry["histogram"]), _lengths(entry)]
        body += ["<h3>Tokens by source</h3>", _source_chart(entry["sources"])]
        body += ["<h3>Packing</h3>", _packing_chart(entry["packing"])]
    rows = [row for name in sets for row in _rows(name, sets[name], findings[name], tokenizer)]
    body += ["<h2>Rows</h2>", _filters(findings, rows), *(row for _, row in rows)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Audit</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>'
        + "\n".join(body)
        + f"<script>{SCRIPT}</script></body></html>\n"
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: {error.strerror}", hint="name a file that can be written") from None


def _verdict(report: dict[str, Any]) -> str:
    if not report["exceeded"]:
        return "<p>No limit is exceeded.</p>"
    lines = [
        f"<li>{escape(e['set'])}: {e['count']:,} of {e['of']:,} ({e['share']:.2%}) {escape(e['title'])}; "
        f"{escape(e['limit'])} = {e['at_most']:g} is the limit</li>"
        for e in report["exceeded"]
    ]
    return f'<ul class="bad">{"".join(lines)}</ul>'


def _findings(entry: dict[str, Any]) -> str:
    if not entry["findings"]:
        return "<p>Nothing found.</p>"
    rows = [
        f'<tr class="{"bad" if f["exceeded"] else ""}"><td class="n">{f["count"]:,}</td><td class="n">{f["share"]:.2%}</td>'
        f'<td>{escape(f["title"])}</td><td class="soft">{escape(", ".join(Path(e).name for e in f["examples"]))}</td></tr>'
        for f in entry["findings"]
    ]
    return f"<table>{''.join(rows)}</table>"


def _account(entry: dict[str, Any]) -> str:
    rows, tokens = entry["rows"], entry["tokens"]
    lines = [("rows read", rows["read"]), ("rows used", rows["used"])]
    lines += [(f"rows dropped: {reason}", count) for reason, count in rows["dropped"].items()]
    lines += [(f"tokens {name.replace('_', ' ')}", count) for name, count in tokens.items()]
    lines += [("documents held out for evaluation", entry["held_out"])] if entry["held_out"] else []
    lines += [(f"{name} of an epoch", count) for name, count in entry["epoch"].items()]
    table = "".join(f'<tr><td>{escape(name)}</td><td class="n">{count:,}</td></tr>' for name, count in lines)
    bad_rows = "".join(f"<li>{escape(bad_row)}</li>" for bad_row in entry["bad_rows"])
    return f"<table>{table}</table>" + (f'<ul class="soft">{bad_rows}</ul>' if bad_rows else "")


def _lengths(entry: dict[str, Any]) -> str:
    return f'<p class="soft">{", ".join(f"{name} {value:,}" for name, value in entry["lengths"].items())} tokens</p>'


# ------------------------------------------------------------------------------------------------- charts

WIDTH, LEFT, BAR_HEIGHT, STEP = 760, 170, 16, 22


def _bars(rows: list[tuple[str, list[tuple[float, str]], str]]) -> str:
    """Horizontal bars: (label, [(length of a part, its class)], text behind)."""
    longest = max((sum(length for length, _ in parts) for _, parts, _ in rows), default=1) or 1
    scale = (WIDTH - LEFT - 190) / longest
    drawn = []
    for i, (label, parts, text) in enumerate(rows):
        y, x = i * STEP + 4, float(LEFT)
        drawn.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        for length, kind in parts:
            drawn.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{length * scale:.1f}" height="{BAR_HEIGHT}"/>'
            )
            x += length * scale
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 12}">{escape(text)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {len(rows) * STEP + 8}" width="{WIDTH}">{"".join(drawn)}</svg>'


def _kind_chart(kinds: dict[str, dict[str, int]]) -> str:
    return _bars(
        [
            (
                kind,
                [(row["trained"], "bar"), (row["context"], "context")],
                f"{row['trained']:,} of {sum(row.values()):,} trained",
            )
            for kind, row in kinds.items()
        ]
    )


def _length_chart(histogram: list[dict[str, int]]) -> str:
    return _bars(
        [(f"{b['from']:,} to {b['to'] - 1:,}", [(b["documents"], "bar")], f"{b['documents']:,}") for b in histogram]
    )


def _source_chart(sources: list[dict]) -> str:
    return _bars(
        [
            (
                Path(s["source"]).name[-26:],
                [(s["trained"], "bar"), (s["context"], "context")],
                f"{s['trained']:,} trained, {s['rows_used']:,} rows",
            )
            for s in sources
        ]
    )


def _packing_chart(packing: dict[str, Any]) -> str:
    plans = [(name, packing[name]) for name in ("packed", "unpacked") if packing[name]]
    return _bars(
        [
            (
                name + (" (as configured)" if packing["is_on"] == (name == "packed") else ""),
                [(plan["fill"] or 0, "bar"), (1 - (plan["fill"] or 0), "context")],
                f"{plan['fill']:.1%} full" if plan["fill"] else f"{plan['packs']:,} rows",
            )
            for name, plan in plans
        ]
    )


# ------------------------------------------------------------------------------------------------- rows


def _filters(findings: dict[str, list[Finding]], rows: list[tuple[str, str]]) -> str:
    sources = sorted({source for source, _ in rows})
    names = {f.name: TITLES[f.name] for found in findings.values() for f in found if f.documents}

    def options(values: dict[str, str]) -> str:
        return "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in values.items())

    return (
        '<p><label>source <select id="source" onchange="filterRows()"><option value="">all</option>'
        f"{options({s: s for s in sources})}</select></label>"
        '<label>finding <select id="finding" onchange="filterRows()"><option value="">any or none</option>'
        f'{options(names)}</select></label><span id="shown">{len(rows)}</span> rows shown; what is trained is '
        "<mark>marked</mark>, what is cut off <s>struck out</s>.</p>"
    )


def _rows(name: str, documents: Documents, findings: list[Finding], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(source, HTML) of an even sample of the documents and of some with each finding."""
    cache = documents.cache
    sample = np.linspace(0, documents.num_units - 1, min(ROWS_SHOWN, documents.num_units)).astype(int)
    chosen = set(documents.index.reshape(-1, documents.group)[sample].ravel().tolist())
    for finding in findings:
        chosen |= set(finding.documents[:ROWS_OF_A_FINDING])
    found = {finding.name: set(finding.documents) for finding in findings}
    rows = []
    for d in sorted(chosen):
        source = f"{name}: {Path(cache.sources[cache.source[d]].label).name}"
        names = [finding for finding, listed in found.items() if d in listed]
        rows.append(
            (
                source,
                f'<div class="row" data-source="{escape(source)}" data-findings="{escape(" ".join(names))}">'
                f'<span class="soft">{escape(Path(place_of(cache, d)).name)}</span>'
                f' <span class="bad">{escape("; ".join(TITLES[n] for n in names))}</span>'
                f"<pre>{_coloured(documents, d, tokenizer)}</pre></div>",
            )
        )
    return rows


def _coloured(documents: Documents, d: int, tokenizer: Tokenizer) -> str:
    """The text of a document: what is trained marked, what is cut struck out, with the kind as a tooltip."""
    cache = documents.cache
    place = int((documents.index == d).argmax())
    is_used = documents.index[place] == d
    start, end = (int(documents.start[place]), int(documents.end[place])) if is_used else (0, 0)
    html = []
    for part in stretches(cache, d, start, end, tokenizer, TOKENS_SHOWN):
        tag = {"trained": "mark", "cut": "s"}.get(part.state, "span")
        special = " special" if part.is_special else ""
        html.append(f'<{tag} class="{part.kind}{special}" title="{part.kind}">{escape(part.text)}</{tag}>')
    left_out = int(cache.offsets[d + 1] - cache.offsets[d]) - TOKENS_SHOWN
    return "".join(html) + (f' <span class="soft">... {left_out:,} more tokens</span>' if left_out > 0 else "")
