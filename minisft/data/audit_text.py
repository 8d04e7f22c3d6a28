"""The report of an audit as lines of text; audit_page.py makes a page of it."""

from pathlib import Path
from typing import Any

BAR = 40  # characters of the longest bar


def text_report(report: dict[str, Any]) -> list[str]:
    """The report for people, the most important first."""
    lines = _verdict(report)
    for name, entry in report["sets"].items():
        lines += ["", f"== {name} ".ljust(80, "="), *_findings_text(entry), "", *_account_text(entry), ""]
        lines += [*_sources_text(entry), "", *_kinds_text(entry), "", *_lengths_text(entry)]
    return [*lines, "", f"tokenizer  {report['tokenizer']}"]


def _exceeded_text(e: dict[str, Any]) -> str:
    """A limit that is exceeded, with the count, because one of 25,000 is 0.00 %."""
    share = f"{e['count']:,} of {e['of']:,} ({e['share']:.2%}) {e['title']}"
    return f"{e['set']}: {share}; {e['limit']} = {e['at_most']:g} is the limit"


def _verdict(report: dict[str, Any]) -> list[str]:
    """A line for each limit that is exceeded."""
    if not report["exceeded"]:
        return ["ok         no limit of [audit] is exceeded"]
    return [f"EXCEEDED   {_exceeded_text(e)}" for e in report["exceeded"]]


def _findings_text(entry: dict[str, Any]) -> list[str]:
    lines = []
    for f in entry["findings"]:
        mark = "!!" if f["exceeded"] else "  "
        lines.append(f"{mark} {f['count']:>9,}  {f['share']:>7.2%}  {f['title']}")
        if f["examples"]:
            lines.append(" " * 23 + "e.g. " + ", ".join(Path(e).name for e in f["examples"]))
    lines += [f"   bad row: {bad_row}" for bad_row in entry["bad_rows"]]
    return lines or ["   nothing found"]


def _account_text(entry: dict[str, Any]) -> list[str]:
    rows, tokens, packing = entry["rows"], entry["tokens"], entry["packing"]
    dropped = sum(rows["dropped"].values())
    lines = [
        f"rows       {rows['read']:>12,} read = {rows['used']:,} used + {dropped:,} dropped",
        *(f"           {count:>12,} dropped: {reason}" for reason, count in rows["dropped"].items()),
    ]
    if entry["dropped_answers"]:
        lines.append(f"           {entry['dropped_answers']:>12,} answers of used rows dropped")
    lines.append(
        f"tokens     {tokens['all']:>12,} = {tokens['trained']:,} trained + {tokens['context']:,} context"
        f" + {tokens['cut']:,} cut + {tokens['in_dropped']:,} in dropped documents"
    )
    if rows["cut"]:
        lines.append(f"cut        {rows['cut']:>12,} rows longer than max_length")
    lines += [" " * 11 + note for note in entry["notes"]]
    if entry["held_out"]:
        lines.append(f"held out   {entry['held_out']:>12,} documents, for evaluation")
    lines.append(f"an epoch   {entry['epoch']['tokens']:>12,} tokens in {entry['epoch']['documents']:,} documents")
    for title, plan, is_on in (
        ("packed", packing["packed"], packing["is_on"]),
        ("unpacked", packing["unpacked"], not packing["is_on"]),
    ):
        if plan:
            unit = "packs" if title == "packed" else "rows"
            fill = f", {plan['fill']:.2%} of {packing['max_length']:,} tokens full" if plan["fill"] else ""
            mark = "  <- as configured" if is_on else ""
            lines.append(f"{title:<10} {plan['packs']:>12,} {unit}{fill}: {_steps_text(plan)}{mark}")
            if trees := plan["trees"]:
                what = f"{trees['tokens']:,} tokens an epoch"
                lines.append(
                    f"{'':<10} {trees['number']:>12,} trees of documents that share what comes before them: {what}"
                )
    return lines


def _steps_text(plan: dict[str, Any]) -> str:
    if "batches" in plan:
        return f"{plan['batches']:,} batches"
    return f"{plan['steps_per_epoch']:,} steps an epoch, {plan['steps']:,} in all"


def _sources_text(entry: dict[str, Any]) -> list[str]:
    names = [Path(source["source"]).name for source in entry["sources"]]
    width = min(40, max(map(len, names)))
    lines = [f"{'source':<{width}}{'rows read':>12}{'used':>12}{'trained':>14}{'context':>14}{'of trained':>12}"]
    for name, s in zip(names, entry["sources"]):
        share = s["trained"] / max(1, entry["tokens"]["trained"])
        numbers = f"{s['rows_read']:>12,}{s['rows_used']:>12,}{s['trained']:>14,}{s['context']:>14,}{share:>12.1%}"
        lines.append(f"{name[-width:]:<{width}}{numbers}")
        ways = ", ".join(f"{ways} ({rows:,} rows)" for ways, rows in s["found_by"].items())
        lines.append(f"  {s['layout']}" + (f"; turns found by {ways}" if ways else ""))
        lines += [f"  {note}" for note in s["notes"]]
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
        lines.append(f"{bin['from']:>7,} to {bin['to'] - 1:<7,}{bin['documents']:>10,}  {bar}".rstrip())
    return lines
