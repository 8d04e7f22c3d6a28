"""The audit as one HTML page that needs nothing else: no network, no library, light and dark.

audit_page.html is the template. Texts of the data are untrusted, so Jinja escapes every one of them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from minisft.atomic_folder import write_file
from minisft.data.audit import TITLES, Finding, place_of, stretches
from minisft.data.cache import Documents
from minisft.data.tokenizer import Tokenizer

ROWS_SHOWN = 200  # of each set, besides those with a finding
ROWS_OF_A_FINDING = 20
TOKENS_SHOWN = 4000  # of a row


def write_page(
    path: Path,
    report: dict[str, Any],
    sets: dict[str, Documents],
    findings: dict[str, list[Finding]],
    tokenizer: Tokenizer,
) -> None:
    """Write the page. report: made by commands/audit.py; sets, findings: by the name of the set. Raises UserError."""
    environment = environment_of(Path(__file__).parent)
    environment.filters |= {"basename": lambda place: Path(place).name, "title_of": TITLES.get}
    template = environment.get_template("audit_page.html")
    rows = [row for name in sets for row in rows_of(name, sets[name], findings[name], tokenizer)]
    page = template.render(
        report=report,
        charts={name: _charts(entry) for name, entry in report["sets"].items()},
        findings={f.name: TITLES[f.name] for found in findings.values() for f in found if f.documents},
        sources=sorted({row["source"] for row in rows}),
        rows=rows,
    )
    write_file(path, page, hint="name another file by --html")


def environment_of(folder: Path) -> jinja2.Environment:
    """Jinja for the templates of a folder, which can import page_parts.html of this one."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
    )
    environment.filters |= {"number": "{:,}".format, "percent": "{:.2%}".format}
    return environment


# ------------------------------------------------------------------------------------------------- charts

Bar = tuple[str, Sequence[float], str]  # label, lengths of the parts (trained, context), text behind them


def _charts(entry: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The charts of a set, from its part of the report."""
    packing = entry["packing"]
    plans = {name: packing[name] for name in ("packed", "unpacked") if packing[name]}
    return {
        "kinds": _chart(
            (kind, (row["trained"], row["context"]), f"{row['trained']:,} of {sum(row.values()):,} trained")
            for kind, row in entry["kinds"].items()
        ),
        "lengths": _chart(
            (f"{b['from']:,} to {b['to'] - 1:,}", (b["documents"],), f"{b['documents']:,}") for b in entry["histogram"]
        ),
        "sources": _chart(
            (
                Path(s["source"]).name[-26:],
                (s["trained"], s["context"]),
                f"{s['trained']:,} trained, {s['rows_used']:,} rows",
            )
            for s in entry["sources"]
        ),
        "packing": _chart(
            (
                name + (" (as configured)" if packing["is_on"] == (name == "packed") else ""),
                (plan["fill"] or 0, 1 - (plan["fill"] or 0)),
                f"{plan['fill']:.1%} full" if plan["fill"] else f"{plan['packs']:,} rows",
            )
            for name, plan in plans.items()
        ),
    }


def _chart(rows: Iterable[Bar]) -> list[dict[str, Any]]:
    """Horizontal bars for the macro `bars`: the lengths of their parts as shares of the longest bar."""
    rows = list(rows)
    longest = max((sum(lengths) for _, lengths, _ in rows), default=1) or 1
    return [
        {
            "label": label,
            "parts": [{"kind": kind, "share": length / longest} for length, kind in zip(lengths, ("bar", "context"))],
            "text": text,
        }
        for label, lengths, text in rows
    ]


# ------------------------------------------------------------------------------------------------- rows


def rows_of(
    name: str,
    documents: Documents,
    findings: list[Finding],
    tokenizer: Tokenizer,
    number: int = ROWS_SHOWN,
    most_tokens: int = TOKENS_SHOWN,
) -> list[dict[str, Any]]:
    """An even sample of the documents, and some with each finding, for the macro `marked`."""
    cache = documents.cache
    sample = np.linspace(0, documents.num_units - 1, min(number, documents.num_units)).astype(int)
    chosen = set(documents.index.reshape(-1, documents.group)[sample].ravel().tolist())
    for finding in findings:
        chosen |= set(finding.documents[:ROWS_OF_A_FINDING])
    found = {finding.name: set(finding.documents) for finding in findings}
    rows = []
    for d in sorted(chosen):
        at = int((documents.index == d).argmax())
        is_used = documents.index[at] == d
        start, end = (int(documents.start[at]), int(documents.end[at])) if is_used else (0, 0)
        rows.append(
            {
                "source": f"{name}: {Path(cache.sources[cache.source[d]].label).name}",
                "findings": [finding for finding, listed in found.items() if d in listed],
                "place": Path(place_of(cache, d)).name,
                "parts": stretches(cache, d, start, end, tokenizer, most_tokens),
                "left_out": int(cache.offsets[d + 1] - cache.offsets[d]) - most_tokens,
            }
        )
    return rows
