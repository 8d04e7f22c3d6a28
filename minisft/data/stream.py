"""Data that is never read as a whole: chunks of so many rows, each an ordinary data set with a token cache of its own.

    chunk k      some rows of the sources, from `begin` to `end` (chunks.py)
    order        chunks in turn; the packs of a chunk are dealt as those of an epoch are, by (seed, tokens of the chunk, k)
    position     (chunk, step): a checkpoint holds the number, the places and the first step of its chunk. So a resumed run needs
                 no earlier chunk, and may be on another machine

A chunk is what is shuffled. After the last row the stream begins again, with a new chunk, so that a pass over the data is an
epoch. A data set of one chunk is therefore trained in the same order as without streaming. A mix of sources has no passes of its
own, only those of each source.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

from minisft.data.cache import Documents
from minisft.data.chunks import Places, read_formats, read_places
from minisft.data.packing import Plan
from minisft.data.row_format import RowFormat
from minisft.data.sources import Source, source_names
from minisft.errors import DATA, UserError


class Target(Protocol):
    """What a stream feeds: the loader of a run."""

    documents: Documents
    plan: Plan
    first_step: int

    def forget(self) -> None: ...
    @property
    def steps_per_epoch(self) -> int: ...


@dataclass(eq=False)
class Stream:
    """The chunks of a run: which one is open, and what makes the next.

    open(number, begin) -> (documents, plan, where the next chunk begins). ahead(number, begin): begin to build a chunk in another
    process; returns what stops that. discard(number): delete the files of a chunk that is behind.
    """

    open: Callable[[int, Places], tuple[Documents, Plan, Places]]
    ahead: Callable[[int, Places], Callable[[], None]]
    discard: Callable[[int], None]
    begin: Places
    end: Places
    sources: Sequence[Source]
    number: int = 0
    formats: dict[int, RowFormat] = field(default_factory=dict)  # of the sources read so far, by number
    vocab_size: int | None = None  # rows of the embedding, once the model is known
    check: Callable[[Documents], None] | None = None  # raises UserError for a chunk that the model cannot train on
    _stop: Callable[[], None] | None = None

    def position(self) -> dict:
        """For a checkpoint, beside the first step of the chunk."""
        formats = {str(number): asdict(self.formats[number]) for number in sorted(self.formats)}
        return {"chunk": self.number, "begin": [asdict(place) for place in self.begin], "formats": formats}

    def order(self) -> dict:
        """What decides which rows are in a chunk, as a checkpoint compares it."""
        mix = {"mix": [source.weight for source in self.sources]} if len(self.begin) > 1 else {}
        return {"chunk": self.number, **mix}

    def counts(self) -> dict[str, int | float]:
        """For the log: the chunk; in a mix also how many rows of each source were read up to its end, and in how many passes that
        were completed."""
        found: dict[str, int | float] = {"chunk": self.number}
        if len(self.end) > 1:
            for name, place in zip(source_names([source.label for source in self.sources]), self.end):
                found |= {f"rows/source {name}": place.taken, f"passes/source {name}": place.passes}
        return found

    def go_to(self, loader: Target, position: dict, first_step: int) -> None:
        """Open the chunk of a checkpoint, or stay in it."""
        begin = read_places(position["begin"])
        self.formats |= read_formats(position.get("formats", {}))
        if (self.number, self.begin) != (position["chunk"], begin):
            self._enter(loader, position["chunk"], begin, first_step)
        loader.first_step = first_step

    def reach(self, loader: Target, step: int) -> None:
        """Open the chunk that step `step` is in, which is the present one or the next."""
        while step >= loader.first_step + loader.steps_per_epoch:
            self._enter(loader, self.number + 1, self.end, loader.first_step + loader.steps_per_epoch)

    def follow(self, loader: Target, step: int) -> None:
        """The same, and let another process build the next chunk, until `close`."""
        self.reach(loader, step)
        if self._stop is None:
            self._stop = self.ahead(self.number + 1, self.end)

    def _enter(self, loader: Target, number: int, begin: Places, first_step: int) -> None:
        documents, plan, end = self.open(number, begin)
        self.require_known(documents)
        if self.check is not None:
            self.check(documents)
        self.close()
        before, self.number, self.begin, self.end = self.number, number, begin, end
        loader.documents, loader.plan, loader.first_step = documents, plan, first_step
        loader.forget()
        if before not in (0, number):  # the first chunk stays: every start reads it before it knows where it resumes
            self.discard(before)

    def require_known(self, documents: Documents) -> None:
        """UserError where a chunk has a token that the embedding has no row for."""
        highest = int(documents.cache.ids.max())
        if self.vocab_size is not None and highest >= self.vocab_size:
            problem = f"chunk {self.number}: token {highest:,}, but the embedding has {self.vocab_size:,} rows"
            raise UserError(problem, hint="the tokenizer has tokens that the model does not know", exit_code=DATA)

    def close(self) -> None:
        """End the process that builds ahead."""
        if self._stop is not None:
            self._stop()
            self._stop = None
