"""A row of a data file, good or bad, and where it is."""

from dataclasses import dataclass

from minisft.errors import UserError

EXCERPT = 200  # characters of a bad row that a message shows


@dataclass(slots=True)  # not frozen: that would cost 0.3 us a row
class Row:
    data: dict
    file: str
    line: int  # of its first line, from 1; in a .json file the index of the element, from 0


@dataclass(frozen=True)
class NotJson:
    """The value of a column that has no JSON form. The row is bad only if the column is read."""

    why: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `reason` is the same text for the same mistake, so that mistakes can be counted."""

    file: str
    line: int
    reason: str
    detail: str = ""
    excerpt: str = ""

    def __str__(self) -> str:
        what = f"{self.reason}: {self.detail}" if self.detail else self.reason
        return f"{place(self.file, self.line)}: {what}" + (f"; it begins {self.excerpt}" if self.excerpt else "")


class NothingToTrain(UserError):
    """None of some rows can be trained on."""


class RowError(ValueError):
    """One row is wrong. `reason` is the same text for the same mistake, `detail` has the values."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def place(file: str, line: int) -> str:
    """Where a row is: data.jsonl:12, or data.json[12] for the element of an array."""
    is_array = file.lower().removesuffix(".gz").removesuffix(".zst").endswith(".json")
    return f"{file}[{line}]" if is_array else f"{file}:{line}"


def excerpt(text: str) -> str:
    """The first EXCERPT characters; those that cannot be printed are escaped."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:EXCERPT])[:EXCERPT]
    return f"`{shown}`" + ("..." if len(text) > EXCERPT else "")
