"""`minisft audit CONFIG.toml`: what a run would train on, and what is wrong with it, told on the CPU.

It reads the data as the run would, through the same cache, masks and cuts, but needs the tokenizer only. The exit code is
65 where a share exceeds its limit in the [audit] section, else 0.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.errors import DATA, UserError

if TYPE_CHECKING:
    from minisft.config import Config

USAGE = """\
usage: minisft audit CONFIG.toml [--show N] [--html FILE] [--json] [--KEY VALUE ...]

Read the whole data set as the run of CONFIG.toml would, and tell what is trained and what is wrong.

  --show N      print N rows of each set, what is trained in colour (in [brackets] where the output is no terminal)
  --html FILE   write one page with charts and rows to browse; it needs no network
  --json        print the report as JSON, and nothing else, on stdout

Other options are keys of the configuration, as for `python -m minisft.train`; [audit] holds the limits. The exit code is
65 where one is exceeded.
"""
BAR = 40  # characters of the longest bar


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    show, html, as_json, rest = _own_options(argv)
    from minisft.command_line import parse_arguments
    from minisft.config_file import load

    config, _ = load(*parse_arguments(rest))
    report, sets = audit(config)
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(text_report(report)))
        for name, (documents, tokenizer) in sets.items():
            _show_rows(name, documents, tokenizer, show)
    if html:
        from minisft.data.audit_page import write_page

        write_page(Path(html), report, sets)
        print(f"\nwritten: {html}", file=sys.stderr if as_json else sys.stdout)
    return DATA if report["exceeded"] else 0


def _own_options(argv: list[str]) -> tuple[int, str | None, bool, list[str]]:
    show, html, as_json, rest, words = 0, None, False, [], list(argv)
    while words:
        word = words.pop(0)
        name, has_value, value = word.partition("=")
        if name == "--json" and not has_value:
            as_json = True
        elif name in ("--show", "--html"):
            if not has_value and not words:
                raise UserError(f"command line: {name} needs a value", hint="see minisft audit --help")
            value = value if has_value else words.pop(0)
            if name == "--html":
                html = value
            elif value.isdecimal():
                show = int(value)
            else:
                raise UserError(f"command line: --show {value}: expected a number of rows")
        else:
            rest.append(word)
    return show, html, as_json, rest


# ------------------------------------------------------------------------------------------------- the report


def audit(config: "Config") -> tuple[dict[str, Any], dict[str, tuple]]:
    """(report for JSON, {set: (its documents, tokenizer)}). Raises UserError for data that cannot be read at all."""
    from minisft.config import eval_sets, source_list
    from minisft.data.audit import overlap
    from minisft.data.documents import split_documents
    from minisft.prepare import open_documents, prepare_tokenizer

    data = config.data
    tokenizer, tokenizer_line = prepare_tokenizer(config)
    eval_packing = data.packing if data.eval_packing is None else data.eval_packing
    opened = {"train": (*open_documents(source_list(data.train_data), config, tokenizer, data.packing), data.packing)}
    for name, sources in eval_sets(data.eval_data).items():
        documents, account = open_documents(sources, config, tokenizer, eval_packing)
        opened[f"eval {name}".strip()] = documents, account, eval_packing
    limits = asdict(config.audit)
    report: dict[str, Any] = {"tokenizer": tokenizer_line.split(maxsplit=1)[1], "limits": limits, "sets": {}}
    train = opened["train"][0]
    for name, (documents, account, packing) in opened.items():
        entry = report["sets"][name] = _describe(documents, account, packing, config, tokenizer)
        if name != "train":
            entry["findings"] += [_table(finding, limits) for finding in overlap(train, documents)]
    if data.eval_fraction:
        train, held_out = split_documents(train, data.eval_fraction, config.train.seed)
        findings = [_table(finding, limits) for finding in overlap(train, held_out)]
        report["sets"]["train"]["held_out"] = len(held_out)
        report["sets"]["train"]["findings"] += findings
    report["exceeded"] = [
        {"set": name, "limit": f"audit.max_{finding['name']}", "share": finding["share"], "at_most": finding["at_most"]}
        for name, entry in report["sets"].items()
        for finding in entry["findings"]
        if finding["exceeded"]
    ]
    return report, {name: (documents, tokenizer) for name, (documents, _, _) in opened.items()}


def _describe(documents, account, packing: bool, config: "Config", tokenizer) -> dict[str, Any]:
    from minisft.data.audit import all_findings, length_histogram, length_summary, rows_by_source, tokens_by_kind
    from minisft.data.packing import plan

    data, lengths = config.data, documents.lengths
    findings = all_findings(documents, tokenizer, data.max_length)
    entry = {
        "rows": {"read": account.rows_read, "used": account.rows_used, "dropped": account.dropped},
        "tokens": {
            "all": account.tokens,
            "trained": account.trained,
            "context": account.context,
            "cut": account.cut,
            "in_dropped": account.in_dropped,
        },
        "documents": len(documents),
        "tokens_per_epoch": int(lengths.sum()),
        "sources": rows_by_source(documents),
        "kinds": tokens_by_kind(documents),
        "lengths": length_summary(lengths),
        "histogram": length_histogram(lengths),
        "packing": None,
        "findings": [_table(finding, asdict(config.audit)) for finding in findings],
        "bad_rows": documents.cache.manifest["bad_rows"],
    }
    if data.max_length:
        packs = plan(lengths, data.max_length, data.packing_strategy)
        fill = float(lengths.sum() / (packs.num_packs * data.max_length))
        strategy = {"on": packing, "strategy": data.packing_strategy, "max_length": data.max_length}
        entry["packing"] = strategy | {"packs": packs.num_packs, "fill": round(fill, 6)}
    return entry


def _table(finding, limits: dict[str, float]) -> dict[str, Any]:
    from minisft.data.audit import TITLES

    return {
        "name": finding.name,
        "title": TITLES[finding.name],
        "count": finding.count,
        "of": finding.total,
        "share": round(finding.share, 6),
        "at_most": limits.get(f"max_{finding.name}", 1.0),
        "exceeded": finding.exceeds(limits),
        "examples": list(finding.examples),
        "documents": list(finding.documents),
    }


# ------------------------------------------------------------------------------------------------- as text


def text_report(report: dict[str, Any]) -> list[str]:
    """The report for people, the most important first."""
    lines = [f"tokenizer  {report['tokenizer']}"]
    for name, entry in report["sets"].items():
        lines += ["", f"== {name} ".ljust(80, "="), *_findings_text(entry), "", *_account_text(entry), ""]
        lines += [*_kinds_text(entry), "", *_lengths_text(entry)]
    lines += ["", *_verdict(report)]
    return lines


def _verdict(report: dict[str, Any]) -> list[str]:
    if not report["exceeded"]:
        return ["ok: no limit of [audit] is exceeded"]
    return [
        f"EXCEEDED  {e['set']}: {e['share']:.2%} is above {e['limit']} = {e['at_most']:g}" for e in report["exceeded"]
    ]


def _findings_text(entry: dict[str, Any]) -> list[str]:
    lines = []
    for f in sorted(entry["findings"], key=lambda f: (-f["exceeded"], -f["share"])):
        mark = "!!" if f["exceeded"] else "  "
        lines.append(f"{mark} {f['count']:>9,}  {f['share']:>7.2%}  {f['title']}")
        if f["examples"]:
            lines.append(" " * 23 + "e.g. " + ", ".join(Path(e).name for e in f["examples"]))
    lines += [f"   bad row: {bad_row}" for bad_row in entry["bad_rows"]]
    return lines or ["   nothing found"]


def _account_text(entry: dict[str, Any]) -> list[str]:
    rows, tokens = entry["rows"], entry["tokens"]
    dropped = sum(rows["dropped"].values())
    lines = [
        f"rows       {rows['read']:>12,} read = {rows['used']:,} used + {dropped:,} dropped",
        *(f"           {count:>12,} dropped: {reason}" for reason, count in rows["dropped"].items()),
        f"tokens     {tokens['all']:>12,} = {tokens['trained']:,} trained + {tokens['context']:,} context"
        f" + {tokens['cut']:,} cut + {tokens['in_dropped']:,} in dropped documents",
        f"an epoch   {entry['tokens_per_epoch']:>12,} tokens in {entry['documents']:,} documents"
        + (f", {entry['held_out']:,} more held out of them" if "held_out" in entry else ""),
    ]
    if entry["packing"]:
        p = entry["packing"]
        state = "packing" if p["on"] else "if packed"
        lines.append(f"{state:<10} {p['packs']:>12,} packs of {p['max_length']:,} tokens, {p['fill']:.2%} full")
    for source in entry["sources"]:
        found = f", turns found by {', '.join(source['found_by'])}" if source["found_by"] else ""
        lines.append(
            f"source     {source['tokens']:>12,} tokens of {Path(source['source']).name}: {source['layout']}{found}"
        )
    return lines


def _kinds_text(entry: dict[str, Any]) -> list[str]:
    total = max(1, sum(row["trained"] + row["context"] for row in entry["kinds"].values()))
    lines = [f"{'kind':<12}{'trained':>12}{'context':>12}"]
    for kind, row in entry["kinds"].items():
        bar = "#" * round(BAR * row["trained"] / total) + "." * round(BAR * row["context"] / total)
        lines.append(f"{kind:<12}{row['trained']:>12,}{row['context']:>12,}  {bar}".rstrip())
    return lines


def _lengths_text(entry: dict[str, Any]) -> list[str]:
    lines = ["length     " + ", ".join(f"{name} {value:,}" for name, value in entry["lengths"].items())]
    tallest = max(bin["documents"] for bin in entry["histogram"])
    for bin in entry["histogram"]:
        bar = "#" * round(BAR * bin["documents"] / tallest)
        lines.append(f"{bin['from']:>6,} to {bin['to'] - 1:<6,}{bin['documents']:>10,}  {bar}".rstrip())
    return lines


def _show_rows(name: str, documents, tokenizer, count: int) -> None:
    from minisft.data.documents import show_document

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for number in range(min(count, len(documents))):
        print(f"\n-- {name}, {documents.cache.place(int(documents.index[number]))}")
        print(show_document(documents, number, tokenizer, colour=colour))
