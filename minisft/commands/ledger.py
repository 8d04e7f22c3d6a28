"""`minisft ledger RUN`: what the training ledger of a run (log.ledger = true) says about its rows, with their text."""

import json
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from minisft.errors import UserError
from minisft.files import checked_path
from minisft.ledger import Entries, read_ledger
from minisft.strict_json import spelled

if TYPE_CHECKING:
    from minisft.data.cache import Documents, TokenCache

USAGE = """\
usage: minisft ledger RUN [--row N | --row FILE:N | --hardest N | --forgotten N] [--json]

What the ledger of a run says, which log.ledger = true keeps: without an option a summary.

  --row N          the row in line N of the training file, or FILE:N where there are several: its loss in every step that
                   trained it
  --hardest N      the N documents with the highest loss when they were trained last
  --forgotten N    the N documents whose loss rose most from its lowest to the last
  --json           print JSON
"""
SHOWN, WIDTH = 300, 100  # characters of a text, columns


@dataclass(frozen=True)
class Seen:
    """The documents that a run has trained, sorted by number; [n] each."""

    document: np.ndarray
    times: np.ndarray
    first: np.ndarray  # loss
    lowest: np.ndarray
    last: np.ndarray


def main(argv: list[str]) -> int:
    if not argv or "-h" in argv or "--help" in argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr, end="")
        return 0 if argv else 2
    from minisft.config.command_line import take_options, whole_number

    options, names = take_options(argv, ("row", "hardest", "forgotten"), ("json",))
    asked = [name for name in ("row", "hardest", "forgotten") if name in options]
    if len(names) != 1 or len(asked) > 1:
        raise UserError("ledger: one run, and one of --row, --hardest and --forgotten", hint="see --help")
    folder = Path(checked_path(names[0], "the run"))
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", hint="name the output folder of a run")
    entries = read_ledger(folder)
    seen = summarise(entries)
    if not asked:
        found: Any = summary(entries, seen)
        print(
            json.dumps(spelled(found), indent=2)
            if "json" in options
            else "\n".join(f"{k:<28} {v}" for k, v in found.items())
        )
        return 0
    with TemporaryDirectory() as temporary:
        texts = Texts(folder, Path(temporary))
        if asked == ["row"]:
            numbers = texts.find(options["row"][-1])
            chosen = [{**text, "steps": steps_of(text["document"], entries)} for text in texts.read(numbers)]
        else:
            by = seen.last if asked == ["hardest"] else seen.last - seen.lowest
            number = whole_number(asked[0], options[asked[0]][-1])
            order = np.argsort(-np.nan_to_num(by, nan=np.inf), kind="stable")[:number]
            read = texts.read(seen.document[order].tolist())
            chosen = [{**text, **losses_of(seen, int(i))} for text, i in zip(read, order)]
    told = json.dumps(spelled(chosen), indent=2, ensure_ascii=False) if "json" in options else ""
    print(told or "\n\n".join(map(text_of, chosen)))
    return 0


def summarise(entries: Entries) -> Seen:
    order = np.argsort(entries.document, kind="stable")  # by document, in each by step
    document, loss = entries.document[order], entries.loss[order]
    unique, begin, times = np.unique(document, return_index=True, return_counts=True)
    lowest = np.fmin.reduceat(loss, begin) if len(loss) else loss
    return Seen(unique, times, loss[begin], lowest, loss[begin + times - 1])


def summary(entries: Entries, seen: Seen) -> dict[str, Any]:
    def mean(x: np.ndarray) -> float:
        return round(float(np.mean(x[np.isfinite(x)])), 4) if np.isfinite(x).any() else float("nan")

    return {
        "steps": f"{entries.step[0]} to {entries.step[-1]}" if len(entries.step) else "none",
        "documents": len(seen.document),
        "times a document was trained": f"{seen.times.min()} to {seen.times.max()}" if len(seen.times) else "none",
        "mean loss, the first time": mean(seen.first),
        "mean loss, the last time": mean(seen.last),
        "whose loss rose": int((seen.last > seen.first).sum()),
    }


# ---- rows and their text ------------------------------------------------------------------------------------------


class Texts:
    """The rows of a run by the numbers of its ledger. temporary: a folder for rows of a stream, which are read again."""

    def __init__(self, folder: Path, temporary: Path):
        from minisft.record import trained_documents, trained_stream

        self.temporary, self.stream = temporary, trained_stream(folder)
        if self.stream is None:
            documents, self.tokenizer = trained_documents(folder)
            self.cache = documents.cache

    def find(self, text: str) -> list[int]:
        """The numbers of a row, as --row names it."""
        name, _, line = text.rpartition(":")
        if not line.isdecimal():
            raise UserError(f"command line: --row {text[:100]}", hint="the number of a line, or FILE:NUMBER")
        if self.stream is None:
            return find_row(self.cache, name, int(line))
        return [self.stream.find(self.temporary, name, int(line))]

    def read(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Place and text of these documents."""
        if self.stream is None:
            return [describe(self.cache, self.tokenizer, number, number) for number in numbers]
        if not numbers:
            return []
        documents = self.stream.rows(self.temporary, numbers)
        indices = [longest_of(documents, number) for number in numbers]
        return [describe(documents.cache, self.stream.tokenizer, *both) for both in zip(indices, numbers)]


def find_row(cache: "TokenCache", name: str, line: int) -> list[int]:
    """The documents of a row: of a conversation there may be several."""
    text = f"{name}:{line}" if name else str(line)
    paths = cache.manifest["paths"]
    files = [i for i, path in enumerate(paths) if path == name or Path(path).name == Path(name).name or not name]
    if not name and len(set(paths)) > 1:
        raise UserError(f"--row {text}: there are {len(set(paths))} files", hint=f"as in {Path(paths[0]).name}:{text}")
    found = np.flatnonzero(np.isin(cache.file, files) & (cache.line == line))
    found = found[:: cache.group]  # of a pair the first answer stands for both
    if not len(found):
        raise UserError(
            f"--row {text}: no document is made from it", hint=f"files: {', '.join(sorted(set(paths))[:3])}"
        )
    return found.tolist()


def longest_of(documents: "Documents", number: int) -> int:
    """The document of a stream's row: of a conversation the one with all of it, of a pair the first answer."""
    assert documents.numbers is not None
    found = np.flatnonzero(documents.numbers == number)[:: documents.cache.group]
    return int(found[np.diff(documents.cache.offsets)[found].argmax()])


def describe(cache: "TokenCache", tokenizer: Any, index: int, number: int) -> dict[str, Any]:
    first, last = int(cache.offsets[index]), int(cache.offsets[index + 1])
    ids = cache.ids[first:last].tolist()
    return {"row": cache.place(index), "document": number, "text": tokenizer.decode(ids)}


def steps_of(number: int, entries: Entries) -> list[dict[str, Any]]:
    own = entries.document == number
    return [{"step": int(s), "loss": float(x)} for s, x in zip(entries.step[own], entries.loss[own])]


def losses_of(seen: Seen, i: int) -> dict[str, Any]:
    return {
        "times": int(seen.times[i]),
        **{name: float(getattr(seen, name)[i]) for name in ("first", "lowest", "last")},
    }


def text_of(found: dict[str, Any]) -> str:
    """A document for the console."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in found["text"])
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}... ({len(shown):,} characters)"
    if "steps" in found:
        lines = [f"  step {one['step']:>8}  loss {one['loss']:.4f}" for one in found["steps"]] or ["  not trained"]
    elif found["times"] == 1:
        lines = [f"  loss {found['last']:.4f}; trained once"]
    else:
        lines = [
            f"  loss {found['last']:.4f} the last time, {found['first']:.4f} the first, {found['lowest']:.4f} the lowest; "
            f"trained {found['times']} times"
        ]
    text = textwrap.fill(shown, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join([found["row"], *lines, text])
