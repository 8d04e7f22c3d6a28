"""`minisft report RUN [RUN2 ...]`: what one run did, or several beside each other, as one HTML page."""

import sys
from pathlib import Path

from minisft.config.command_line import take_options
from minisft.errors import UserError
from minisft.files import checked_path, file_to_write

USAGE = """\
usage: minisft report RUN [RUN2 ...] [--out FILE] [--png FOLDER]

One page that needs nothing else: the curves of the runs, raw and smoothed, their samples over time, rows with what is trained of
them, the configuration, and for several runs exactly what differs. RUN is an output folder; the run may still be training.

  --out FILE     the page; default: report.html in RUN, or here for several runs
  --png FOLDER   every chart as a PNG, too
"""


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    options, rest = take_options(argv, ("out", "png"), ())
    if unknown := [word for word in rest if word.startswith("-")]:
        raise UserError(f"command line: unknown option {unknown[0]}", hint="minisft report --help lists them")
    folders = [Path(checked_path(word, "the folder")) for word in rest]
    if not folders:
        raise UserError("command line: no run is named", hint="minisft report RUN [RUN2 ...]")
    from minisft.report.charts import require_matplotlib

    require_matplotlib()
    from minisft.report.page import write_report
    from minisft.report.runs import read_runs

    runs = read_runs(folders)
    out = Path(file_to_write(options["out"][-1], "--out")) if "out" in options else None
    out = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    pictures = Path(checked_path(options["png"][-1], "--png")) if "png" in options else None
    if pictures and not pictures.absolute().parent.is_dir():
        raise UserError(f"--png {pictures}: there is no such folder")
    count = write_report(out, runs, pictures)
    print(f"written: {out}" + (f", and {count} charts in {pictures}" if pictures else ""))
    return 0
