"""The training ledger: which documents every step trained, and the loss of each (log.ledger = true).

Each rank, and of ranks that share their batches the first, appends to a file of its own, `ledger-rank-R.bin` in the output
folder: 8 bytes a document, two little-endian numbers.

    row    uint32: the document's number in the token cache, in a stream that of its row (data/chunks.py); the top bit is set on
           the first document of a step that follows on the step before it in this file
    loss   fp32: the mean of -log p over the targets that the document had in this step; of a pair its loss

A row of 2^32 - 1 is no document: the second number is then the step, a uint32, of the documents that follow. A file begins so,
and so does every step after one in which this rank had no document. So the file says by itself which step an entry
belongs to: after a kill and a resume it is cut behind the step of the checkpoint, and nothing is there twice or missing.

The losses are those of the forward pass that trains, with its dropout, before the update. They come to the host beside the
verdict on the step, for which the loop waits anyway.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minisft.errors import DATA, UserError
from minisft.log_files import LogFile

ENTRY = np.dtype([("row", "<u4"), ("loss", "<u4")])  # the loss as the bits of an fp32
MARKER, OPENS = 2**32 - 1, 2**31
NAME = re.compile(r"ledger-rank-(\d+)\.bin")


@dataclass(frozen=True)
class Entries:
    """What a ledger holds, in the order in which it was written."""

    step: np.ndarray  # int64 [E]: optimizer steps, from 1
    document: np.ndarray  # int64 [E]: its number in the token cache, or that of its row in a stream
    loss: np.ndarray  # fp32 [E]


class Ledger:
    """The ledger of one rank. step: how many steps were taken; what is there of later ones is cut off."""

    def __init__(self, folder: Path, rank: int, step: int):
        self.path = folder / f"ledger-rank-{rank}.bin"
        self._open(step)

    def _open(self, step: int) -> None:
        entries = read_entries(self.path)
        self.file = LogFile(self.path, ENTRY.itemsize * end_of(entries, step))
        self.last = -1  # the step of the last entry; a session begins with a marker

    def write(
        self, step: int, rows: Sequence[tuple[np.ndarray, np.ndarray]], numbers: np.ndarray | None = None
    ) -> None:
        """The documents (int64 [n]) and losses (fp32 [n]) of this rank's micro-batches in a step. A document that occurs several
        times, once for each of its targets, has the mean. numbers: of all documents, int64 [D]; documents with the same number
        are one. Raises UserError for a number that has no room in an entry."""
        documents, losses = (
            np.concatenate(parts) if parts else np.zeros(0) for parts in (zip(*rows) if rows else ((), ()))
        )
        if not len(documents):
            return
        documents = documents if numbers is None else numbers[documents.astype(np.int64)]
        if documents.max() >= OPENS - 1:
            hint = "set log.ledger = false, or train on fewer rows or sources"
            raise UserError(f"step {step}: row {documents.max():,} of the stream has no room in the ledger", hint=hint)
        unique, index, count = np.unique(documents, return_inverse=True, return_counts=True)
        entries = np.zeros(len(unique), ENTRY)
        entries["row"] = unique
        means = np.bincount(index, weights=losses.astype(np.float64)) / count
        entries["loss"] = means.astype("<f4").view("<u4")
        if step == self.last + 1:
            entries["row"][0] |= OPENS
        else:
            entries = np.concatenate([np.array([(MARKER, step)], ENTRY), entries])
        self.last = step
        self.file.write(entries.tobytes())

    def sync(self) -> None:
        """What was written is on the disk afterwards, as a checkpoint must be able to rely on."""
        self.file.sync()

    def back_to(self, step: int) -> None:
        """Forget what came after a step."""
        self.file.close()
        self._open(step)

    def close(self) -> None:
        self.file.close()


def cut_ledgers(folder: Path, step: int) -> None:
    """Cut the ledgers of all ranks behind a step, also of ranks that are no longer there, and of runs that keep none now."""
    for path in ledger_files(folder):
        LogFile(path, ENTRY.itemsize * end_of(read_entries(path), step)).close()


def ledger_files(folder: Path) -> list[Path]:
    """The ledgers in an output folder, in the order of the ranks."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
    return [found[rank] for rank in sorted(found)]


def read_entries(path: Path) -> np.ndarray:
    """The entries of a file; none where there is no file. An entry that a full disk cut off is not one."""
    if not path.exists():
        return np.zeros(0, ENTRY)
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // ENTRY.itemsize * ENTRY.itemsize], ENTRY)


def steps_of(entries: np.ndarray) -> np.ndarray:
    """The step of every entry, int64 [n]. Raises UserError where the file does not begin with one."""
    if not len(entries):
        return np.zeros(0, dtype=np.int64)
    is_marker = entries["row"] == MARKER
    if not is_marker[0]:
        raise UserError("a ledger begins with a step, and this file does not", hint="remove it", exit_code=DATA)
    opened = np.cumsum((entries["row"] >= OPENS) & ~is_marker)
    marker = np.maximum.accumulate(np.where(is_marker, np.arange(len(entries)), 0))  # the last one up to here
    return entries["loss"][marker].astype(np.int64) + opened - opened[marker]


def end_of(entries: np.ndarray, step: int) -> int:
    """How many entries belong to steps up to this one."""
    later = np.flatnonzero(steps_of(entries) > step)
    return int(later[0]) if len(later) else len(entries)


def read_ledger(folder: Path) -> Entries:
    """The ledgers of all ranks together, by step. Raises UserError where there is none."""
    files = ledger_files(folder)
    if not files:
        raise UserError(f"{folder} has no ledger", hint="log.ledger = true keeps one", exit_code=DATA)
    entries = [read_entries(path) for path in files]
    step = np.concatenate([steps_of(one) for one in entries])
    together = np.concatenate(entries)
    is_document = together["row"] != MARKER
    step, together = step[is_document], together[is_document]
    order = np.argsort(step, kind="stable")
    document = (together["row"] & (OPENS - 1)).astype(np.int64)
    return Entries(step[order], document[order], together["loss"].view("<f4")[order])
