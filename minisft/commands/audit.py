"""`minisft audit CONFIG.toml`: report the data that a run would train on, and its problems, on the CPU.

It reads the data as the run would, through the same cache, masks and cuts, but needs the tokenizer only. The exit code is
65 if a share exceeds its limit in the [audit] section, else 0.
"""

import json
import os
import re
import sys
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.config.sections import AuditSection
from minisft.data.audit_text import text_report
from minisft.errors import DATA, UserError, shortened
from minisft.files import file_to_write

if TYPE_CHECKING:
    from minisft.config.sections import Config
    from minisft.data.audit import Finding
    from minisft.data.cache import Documents
    from minisft.data.documents import Accounting
    from minisft.data.tokenizer import Tokenizer

USAGE = """\
usage: minisft audit CONFIG.toml [--show N] [--row PLACE] [--html FILE] [--json] [--KEY VALUE ...]

Read the whole data set as the run of CONFIG.toml would, and report which part of it is trained and which problems it has.
If the file has stages, each of them is audited.

  --show N      print N rows of each set, trained text in colour (in [brackets] if the output is no terminal)
  --row PLACE   print only this row, in full; PLACE as in the report: data.jsonl:12, or data.json[12] of an array
  --html FILE   write one page with charts and rows to browse; it needs no network
  --json        print only the report, as JSON

Other options are keys of the configuration, as for `minisft train`. The exit code is 65 if the share of a finding exceeds
its limit:

"""
TOKENS_SHOWN = 4000  # of a row of --show


@dataclass(frozen=True)
class DataSet:
    """The training data or one evaluation set, as a run reads it."""

    documents: "Documents"
    account: "Accounting"
    packing: bool


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        limits = (f"  --audit.{f.name:<25}{f.default:<6g}{f.metadata['help']}" for f in fields(AuditSection))
        print(USAGE + "\n".join(limits), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    options, rest = _own_options(argv)
    from minisft.config.command_line import parse_arguments
    from minisft.config.stages import before_training, load_stages
    from minisft.prepare.look import look_for_data

    stages = load_stages(*parse_arguments(rest))
    if len(stages) > 1 and (alone := [f"--{name}" for name in ("html", "json", "row") if options.get(name)]):
        raise UserError(
            f"command line: {alone[0]} with {len(stages)} stages", hint="it needs one; name the stage's file"
        )
    for stage in stages:
        look_for_data(stage.config)
    if options.get("html"):
        options["html"] = file_to_write(options["html"], "--html")
    codes = []
    for stage in stages:
        if stage.title:
            print(f"\n== {stage.title}")
        codes.append(_audit_one(before_training(stage), options))
    return max(codes)


def _audit_one(config: "Config", options: dict[str, Any]) -> int:
    """Audit one configuration, and return the exit code."""
    from minisft.data.audit import printable

    if place := options.get("row"):
        _show_row(config, place)
        return 0
    report, tokenizer, sets, findings = audit(config)
    if "json" in options:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print(printable("\n".join(text_report(report))))  # names of fields and files are untrusted like the rows
        for name, data_set in sets.items():
            _show_rows(name, data_set.documents, tokenizer, options.get("show", 0))
    if html := options.get("html"):
        from minisft.data.audit_page import write_page

        documents = {name: data_set.documents for name, data_set in sets.items()}
        write_page(Path(html), report, documents, findings, tokenizer)
        print(f"\nwritten: {html}", file=sys.stderr if "json" in options else sys.stdout)
    return DATA if report["exceeded"] else 0


def _own_options(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The options of this command, by name, and the rest of the command line."""
    from minisft.config.command_line import take_options

    found, rest = take_options(argv, ("show", "row", "html"), ("json",))
    options: dict[str, Any] = {name: value if value is True else value[-1] for name, value in found.items()}
    if "show" in options:
        if not options["show"].isdecimal() or len(options["show"]) > 15:
            raise UserError(f"command line: --show {shortened(options['show'], 60)}: expected a number of rows")
        options["show"] = int(options["show"])
    if "json" in options and ("show" in options or "row" in options):
        raise UserError("command line: --json prints nothing but the report", hint="omit --show and --row")
    return options, rest


# ------------------------------------------------------------------------------------------------- the report


def open_sets(config: "Config") -> tuple["Tokenizer", str, dict[str, DataSet]]:
    """The tokenizer, a line about it, and the sets by name: "train", "eval" or "eval NAME"."""
    from minisft.config.sections import eval_sets, source_list
    from minisft.prepare.data import open_documents
    from minisft.prepare.options import prepare_tokenizer

    data = config.data
    tokenizer, line = prepare_tokenizer(config)
    eval_packing = data.packing if data.eval_packing is None else data.eval_packing
    train = source_list(data.train_data)
    sets = {"train": DataSet(*open_documents(train, config, tokenizer, data.packing), data.packing)}
    for name, sources in eval_sets(data.eval_data).items():
        opened = open_documents(sources, config, tokenizer, eval_packing)
        sets[f"eval {name}".strip()] = DataSet(*opened, eval_packing)
    return tokenizer, line.removeprefix("tokenizer").strip(), sets


def audit(config: "Config") -> tuple[dict[str, Any], "Tokenizer", dict[str, DataSet], dict[str, list["Finding"]]]:
    """(report for JSON, tokenizer, the sets, their findings). Raises UserError if the data cannot be read at all."""
    from minisft.data.audit import TITLES, all_findings, overlap
    from minisft.data.documents import split_documents
    from minisft.prepare.options import cut_length

    data, limits = config.data, asdict(config.audit)
    tokenizer, tokenizer_line, sets = open_sets(config)
    trained, held_out = sets["train"].documents, None
    if data.eval_fraction:
        trained, held_out = split_documents(trained, data.eval_fraction, config.train.seed)
    findings, described = {}, {}
    for name, data_set in sets.items():
        documents = data_set.documents
        found = all_findings(documents, tokenizer, cut_length(data, data_set.packing), data.truncation)
        if name != "train":
            found += overlap(trained, documents)
        elif held_out is not None:
            found += overlap(trained, held_out)
        findings[name] = found
        described[name] = {
            "findings": [
                {
                    "name": f.name,
                    "title": TITLES[f.name],
                    "count": f.count,
                    "of": f.total,
                    "share": round(f.share, 6),
                    "at_most": limits[f"max_{f.name}"],
                    "exceeded": f.exceeds(limits),
                    "examples": list(f.examples),
                }
                for f in sorted(found, key=lambda f: (not f.exceeds(limits), -f.share))
            ],
            "held_out": 0 if name != "train" or held_out is None else len(held_out),
            **_tables(data_set, trained if name == "train" else documents, name == "train", config, tokenizer),
        }
    exceeded = [
        {
            "set": name,
            "title": TITLES[f.name],
            "count": f.count,
            "of": f.total,
            "share": f.share,
            "limit": f"audit.max_{f.name}",
            "at_most": limits[f"max_{f.name}"],
        }
        for name, found in findings.items()
        for f in found
        if f.exceeds(limits)
    ]
    report = {"exceeded": exceeded, "tokenizer": tokenizer_line, "limits": limits, "sets": described}
    return report, tokenizer, sets, findings


def _tables(
    data_set: DataSet, in_epoch: "Documents", is_train: bool, config: "Config", tokenizer: "Tokenizer"
) -> dict[str, Any]:
    """The account and the tables of a set. in_epoch: its documents without the held-out ones."""
    from minisft.data.audit import count_tokens, kind_table, length_histogram, length_summary, source_table
    from minisft.prepare.options import split_length

    account, documents, lengths = data_set.account, data_set.documents, in_epoch.lengths
    counts = count_tokens(documents, split_length(config.data, data_set.packing))
    assert counts.sum(axis=(0, 1)).tolist() == [account.context, account.trained]
    return {
        "rows": {
            "read": account.rows_read,
            "used": account.rows_used,
            "dropped": account.dropped,
            "cut": account.rows_cut,
        },
        "tokens": {
            "all": account.tokens,
            "trained": account.trained,
            "context": account.context,
            "cut": account.cut,
            "in_dropped": account.in_dropped,
        },
        "dropped_answers": account.dropped_answers,
        "notes": account.notes(),
        "epoch": {"documents": len(in_epoch), "tokens": int(lengths.sum())},
        "packing": _packing(in_epoch, data_set.packing, is_train, config, tokenizer),
        "sources": source_table(documents, counts),
        "kinds": kind_table(counts),
        "lengths": length_summary(lengths),
        "histogram": length_histogram(lengths),
        "bad_rows": documents.cache.manifest["bad_rows"],
    }


def _packing(
    documents: "Documents", is_on: bool, is_train: bool, config: "Config", tokenizer: "Tokenizer"
) -> dict[str, Any]:
    """How full packs are, and how many steps an epoch has on one device, with packing and without.

    The model says how turns can share what comes before them (data.share_turns). Only a model on this machine is asked; of
    one on the hub it is assumed that it has no limit.
    """
    from minisft.data.loader import plan_set
    from minisft.data.shared_turns import may_share
    from minisft.prepare.data import tree_limit
    from minisft.prepare.model import find_longest_tree
    from minisft.schedule import total_steps

    def longest_tree() -> int | None:
        model = config.model
        is_here = model.config is not None or os.path.isdir(os.path.expanduser(model.model_name_or_path or ""))
        return find_longest_tree(config, tokenizer) if is_here else None

    data, train, batch_size = config.data, config.train, config.evaluate.per_device_eval_batch_size
    packs_a_step = train.per_device_train_batch_size * train.gradient_accumulation_steps
    strategies = {"packed": data.packing_strategy} if data.max_length else {}
    tables: dict[str, Any] = {"packed": None}
    for name, strategy in (strategies | {"unpacked": "none"}).items():
        limit = tree_limit(config, name == "packed", longest_tree) if may_share(documents) else 0
        units, plan = plan_set(
            documents,
            strategy=strategy,
            max_length=data.max_length,
            share_prompt=config.dpo.share_prompt,
            longest_tree=limit,
        )
        table = {"packs": plan.num_packs, "fill": round(plan.fill, 6) if data.max_length else None}
        if is_train:
            steps = -(-plan.num_packs // packs_a_step)
            table |= {
                "steps_per_epoch": steps,
                "steps": total_steps(steps, train.num_train_epochs, train.max_steps),
            }
        else:
            table["batches"] = -(-plan.num_packs // batch_size)
        table["trees"] = None
        if units.turns is not None:
            table["trees"] = {"number": units.num_units, "tokens": int(units.unit_lengths.sum())}
        tables[name] = table
    max_length = documents.group * data.max_length if data.max_length else None  # of a pack
    return {"is_on": is_on, "strategy": data.packing_strategy, "max_length": max_length, **tables}


# ------------------------------------------------------------------------------------------------- rows


def _show_rows(name: str, documents: "Documents", tokenizer: "Tokenizer", count: int) -> None:
    from minisft.data.audit import place_of, printable

    for number in range(min(count, documents.num_units) * documents.group):  # both answers of a pair
        d, start, end = int(documents.index[number]), int(documents.start[number]), int(documents.end[number])
        print(f"\n-- {name}, {printable(place_of(documents.cache, d))}")
        print(_row_text(documents, d, start, end, tokenizer, TOKENS_SHOWN))


def _show_row(config: "Config", place: str) -> None:
    """Print the documents of one row, used or not. Raises UserError if it has none."""
    from minisft.data.audit import place_of, printable

    match = re.fullmatch(r"(.+?)(?::(\d{1,15})|\[(\d{1,15})\])", place)
    if not match:
        raise UserError(f"command line: --row {shortened(place, 100)}", hint="as in data.jsonl:12, or data.json[12]")
    tokenizer, _, sets = open_sets(config)
    shown = 0
    for name, data_set in sets.items():
        documents, cache = data_set.documents, data_set.documents.cache
        files = [i for i, path in enumerate(cache.manifest["paths"]) if f"/{path}".endswith(f"/{match[1].lstrip('/')}")]
        at_line = cache.line == int(match[2] or match[3])
        for d in [d for d in at_line.nonzero()[0] if cache.file[d] in files]:
            used = (documents.index == d).nonzero()[0]
            start, end = (int(documents.start[used[0]]), int(documents.end[used[0]])) if len(used) else (0, 0)
            state = "" if len(used) else ", not used"
            print(f"-- {name}, {printable(place_of(cache, d))}{state}")
            print(_row_text(documents, int(d), start, end, tokenizer, 2**40))
            shown += 1
    if not shown:
        hint = "rows that cannot be read are in the report as bad rows"
        raise UserError(f"--row {shortened(place, 100)}: no document comes from there", hint=hint, exit_code=DATA)


def _row_text(documents: "Documents", d: int, start: int, end: int, tokenizer: "Tokenizer", limit: int) -> str:
    """The text of a document: trained text green, special tokens bold or blue, cut text grey and struck out; without colours
    [trained] and {cut}."""
    from minisft.data.audit import stretches

    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    brackets = {"trained": ("[", "]"), "context": ("", ""), "cut": ("{", "}")}
    colours = {"trained": ("32", "1;32"), "context": ("", "34"), "cut": ("9;90", "9;90")}
    shown = ""
    for state, alike in groupby(stretches(documents.cache, d, start, end, tokenizer, limit), key=lambda s: s.state):
        if colour:
            parts = ((s.text, colours[state][s.is_special]) for s in alike)
            shown += "".join(f"\x1b[{code}m{text}\x1b[0m" if code else text for text, code in parts)
        else:
            shown += brackets[state][0] + "".join(s.text for s in alike) + brackets[state][1]
    left_out = int(documents.cache.offsets[d + 1] - documents.cache.offsets[d]) - limit
    return shown + (f" ... {left_out:,} more tokens" if left_out > 0 else "")
