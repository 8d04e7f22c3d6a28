"""The data of a run: documents read, checked, cut and packed, and what became of every row, in lines."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from pathlib import Path

from minisft import ranks
from minisft.config.sections import Config, config_to_dict, eval_sets, source_list
from minisft.data.audit import quick_findings
from minisft.data.cache import Documents, build_cache
from minisft.data.chunks import (
    Part,
    Places,
    copy_lines,
    find_files,
    formats_of,
    has_read_all,
    read_chunk,
    sources_of,
    start_of,
    with_places,
    write_chunk,
)
from minisft.data.documents import Accounting, select_documents, show_document, split_documents
from minisft.data.loader import Loader, plan_set
from minisft.data.packing import Plan
from minisft.data.packing_strategies import STRATEGIES
from minisft.data.row_format import RowFormat
from minisft.data.rows import NothingToTrain
from minisft.data.shared_turns import may_share
from minisft.data.sources import file_kind, parse_source
from minisft.data.stream import Stream
from minisft.data.stream_rows import copy_rows, number_of
from minisft.data.tokenizer import Tokenizer
from minisft.errors import DATA, UserError, warn
from minisft.prepare.options import cache_folder, cut_length, format_options, ranks_sharing_a_batch, split_length

# Findings whose numbers are in the account of the rows or the description of the cache.
TOLD_ELSEWHERE = ("no_label", "lost_answer", "too_long", "control_token", "straddling")
ROUND_TO = 64  # tokens and targets of a batch are filled up to a multiple: few shapes, so few kernels to set up


def prepare_data(
    config: Config,
    tokenizer: Tokenizer,
    find_longest_tree: Callable[[], int | None] | None = None,
    *,
    title: str = "train",
) -> tuple[Loader, dict[str, Loader], list[str]]:
    """The training loader, the evaluation loaders by name, and their lines of the summary. title: of the training data there.

    find_longest_tree(): `longest_tree` of the model. A function, because few data sets need it, and it finds the model. None:
    no turns are shared.
    """
    data, seed, sharing = config.data, config.train.seed, ranks_sharing_a_batch(config, ranks.world_size())
    eval_packing = data.packing if data.eval_packing is None else data.eval_packing

    def planned(documents: Documents, packing: bool) -> tuple[Documents, Plan]:
        return plan_set(
            documents,
            strategy=data.packing_strategy if packing else "none",
            max_length=data.max_length,
            share_prompt=config.dpo.share_prompt,
            longest_tree=tree_limit(config, packing, find_longest_tree)
            if find_longest_tree and may_share(documents)
            else 0,
            share_in=documents.cache.folder.parent if ranks.world_size() > 1 else None,
        )

    stream = None
    if data.stream:
        chunks = Chunks(config, tokenizer)
        documents, lines = chunks.read(0, chunks.begin)
        calls = partial(chunks.open, planned), chunks.ahead, chunks.discard
        begin, end = chunks.begin, chunks.end
        stream = Stream(*calls, begin=begin, end=end, sources=chunks.sources, formats=chunks.formats)
    else:
        documents, lines = read_documents(title, source_list(data.train_data), config, tokenizer, data.packing)
    held_out = {}
    for name, sources in eval_sets(data.eval_data).items():
        held_out[name], more = read_documents(f"eval {name}".strip(), sources, config, tokenizer, eval_packing)
        lines += more
    if data.eval_fraction:
        documents, held_out[""] = split_documents(documents, data.eval_fraction, seed)
        lines.append(
            f"           {held_out[''].num_units:,} {documents.cache.unit} held out for evaluation, "
            f"{documents.num_units:,} are trained"
        )

    def loader(documents: Documents, packing: bool, batch_size: int, **options) -> Loader:
        documents, packs = planned(documents, packing)
        group, place = divmod(ranks.rank(), sharing)
        options |= {"seed": seed, "round_to": ROUND_TO, "rank": group, "world_size": ranks.world_size() // sharing}
        return Loader(documents, packs, batch_size, context=(place, sharing), **options)

    train = loader(
        documents,
        data.packing,
        config.train.per_device_train_batch_size,
        accumulation=config.train.gradient_accumulation_steps,
        shuffle=data.shuffle,
        stream=stream,
    )
    batch_size = config.evaluate.per_device_eval_batch_size
    evals = {name: loader(docs, eval_packing, batch_size, shuffle=False) for name, docs in held_out.items()}
    if train.documents.shared is not None:
        once, all_tokens = train.documents.unit_lengths.sum(), documents.unit_lengths.sum()
        lines.append(f"prompts    shared by both answers: {once:,} tokens an epoch instead of {all_tokens:,}")
    if train.documents.turns is not None:
        once, all_tokens = train.documents.unit_lengths.sum(), documents.unit_lengths.sum()
        lines.append(
            f"turns      share what comes before them: {once:,} tokens an epoch instead of {all_tokens:,}, "
            f"{documents.num_units:,} documents in {train.documents.num_units:,} trees"
        )
    if data.packing:
        lines.append(
            f"packing    {data.packing_strategy}: {train.documents.num_units:,} {train.documents.unit} in "
            f"{train.plan.num_packs:,} packs of {train.plan.max_length:,} tokens, {train.plan.fill:.2%} full"
        )
    return train, evals, lines


def read_documents(
    title: str, sources: list, config: Config, tokenizer: Tokenizer, packing: bool, cache_dir: Path | None = None
) -> tuple[Documents, list[str]]:
    """The documents of some sources, and what became of every row. cache_dir: None for that of the configuration. Raises
    UserError where too many are wrong."""
    documents, account = open_documents(sources, config, tokenizer, packing, cache_dir)
    cache = documents.cache
    lines = [*cache.describe(), *account.lines(), f"tokens {cache.note} in {cache.folder}"]
    limits = asdict(config.audit)
    for finding in quick_findings(cache, tokenizer, cut_length(config.data, packing), config.data.truncation):
        if finding.exceeds(limits):
            raise UserError(
                f"{title}: {finding}",
                hint=f"`minisft audit` shows them; audit.max_{finding.name} = {limits[f'max_{finding.name}']:g} is the limit",
                exit_code=DATA,
            )
        if finding.name not in TOLD_ELSEWHERE:
            lines.append(f"{finding}")
    if packing and STRATEGIES[config.data.packing_strategy].cut == "stream":
        lines.append(
            f"{config.data.packing_strategy} cuts documents anew every epoch: the first token of each piece is context, even if "
            "trained above"
        )
    if config.verbose:
        first = range(2 if cache.unit == "pairs" else 1)
        lines += ["the first of them, [trained] marked:", *(show_document(documents, n, tokenizer) for n in first)]
    return documents, titled(title, lines)


def open_documents(
    sources: list, config: Config, tokenizer: Tokenizer, packing: bool, cache_dir: Path | None = None
) -> tuple[Documents, Accounting]:
    """Tokenise the sources (or find them in the cache) and cut what is too long."""
    data = config.data
    cache = build_cache(
        [parse_source(s) for s in sources],
        tokenizer,
        cache_dir=cache_dir or cache_folder(config),
        on_bad_row=data.on_bad_row,
        format=data.format,
        field_map=data.field_map,
        options=format_options(config),
        local_files_only=config.model.local_files_only,
    )
    return select_documents(
        cache,
        max_length=cut_length(data, packing),
        split_at=split_length(data, packing),
        truncation=data.truncation,
        seed=config.train.seed,
    )


class Chunks:
    """The chunks of a streamed training set (data/chunks.py), each read as a data set of its own.

    They are in a folder beside the token cache, named after the output folder: runs do not share them, because each deletes
    those that are behind it.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer
        sources = [parse_source(source) for source in source_list(config.data.train_data)]
        self.is_mix = config.data.stream_mix and len(sources) > 1
        self.local_files_only = config.model.local_files_only
        self.sources = find_files(sources, is_mix=config.data.stream_mix, local_files_only=self.local_files_only)
        self.begin = start_of(self.sources, self.is_mix)  # of the first chunk
        run = sha256(str(Path(config.output_dir).absolute()).encode()).hexdigest()
        self.folder = cache_folder(config) / f"stream-{run[:16]}"
        self.end = self.begin  # of the chunk that was read last
        self.formats: dict[int, RowFormat] = {}  # of each source, as its first row decided

    def read(self, number: int, begin: Places) -> tuple[Documents, list[str]]:
        """Its documents, and lines about them. What another process has prepared is found; what it prepares now is waited for.

        Rows of which none can be trained on are left out, with a warning, and the chunk has the rows behind them. Raises
        UserError where no row of the stream can be trained on.
        """
        data, at = self.config.data, begin
        least = 2 if self.needs_another_row() else 1
        title = "train" if number == 0 else f"chunk {number}"
        while True:
            folder = self.chunk(number, at)
            write_chunk(folder, self.sources, at, data.stream_rows, least=least, local_files_only=self.local_files_only)
            sources, parts, self.end = read_chunk(folder, self.sources, self.formats if number else {})
            tokens = folder.with_suffix(".tokens")
            try:
                documents, lines = read_documents(title, sources, self.config, self.tokenizer, data.packing, tokens)
                break
            except NothingToTrain as error:
                if has_read_all(begin, self.end):
                    raise
                if ranks.rank() == 0:
                    warn(f"chunk {number} is made of later rows: {error}")
                at = self.end
        self.formats |= formats_of(documents.cache, parts) | self.formats
        return with_places(documents, self.sources, parts, self.is_mix), [*self.describe_mix(), *lines]

    def describe_mix(self) -> list[str]:
        """Lines about the shares of the sources."""
        if not self.is_mix:
            return []
        total = sum(source.weight for source in self.sources)
        each = ", ".join(f"{source.weight / total:.1%} {source.label}" for source in self.sources)
        return [f"mix        {each}: of the rows of every chunk; a source that ends begins again"]

    def rows(self, folder: Path, numbers: Sequence[int]) -> Documents:
        """The documents of single rows by their numbers; what is made for them is in a folder that is deleted later."""
        if self.needs_another_row():
            numbers = [0, len(self.sources) if self.is_mix else 1, *numbers]  # with two of the first source
        options = {"is_mix": self.is_mix, "local_files_only": self.local_files_only}
        return self.documents_of(folder, copy_rows(folder, self.sources, numbers, **options))

    def first_rows(self, folder: Path, number: int) -> Documents:
        """The documents of the first rows, in a folder that is deleted later."""
        rows = folder / "rows"
        write_chunk(rows, self.sources, self.begin, number, local_files_only=self.local_files_only)
        return self.documents_of(rows, read_chunk(rows, self.sources)[1])

    def needs_another_row(self) -> bool:
        """Whether a row alone makes no documents: KTO compares an answer with that of another row."""
        return format_options(self.config).answers == "labels"

    def documents_of(self, folder: Path, parts: Sequence[Part]) -> Documents:
        """The documents of copied rows, whose tokens are in the folder too."""
        sources = sources_of(folder, self.sources, parts, self.formats)
        documents, _ = open_documents(sources, self.config, self.tokenizer, self.config.data.packing, folder / "tokens")
        return with_places(documents, self.sources, parts, self.is_mix)

    def require_unchanged(self, begin: Places) -> None:
        """UserError where a local .jsonl file has another line than it had before one of these places."""
        for place in begin:
            path, source = Path(self.sources[place.source].files[place.file]), self.sources[place.source]
            if not source.commit and file_kind(path)[0] != ".parquet":
                copy_lines(path, Path(os.devnull), place, 0)

    def find(self, folder: Path, name: str, line: int) -> int:
        """The number of the row in a line of a file. Raises UserError."""
        options = {"is_mix": self.is_mix, "local_files_only": self.local_files_only}
        return number_of(self.sources, name, line, folder, **options)

    def open(
        self, planned: Callable[[Documents, bool], tuple[Documents, Plan]], number: int, begin: Places
    ) -> tuple[Documents, Plan, Places]:
        """As Stream asks for it. planned: shares packs among the documents."""
        documents, _ = self.read(number, begin)
        return *planned(documents, self.config.data.packing), self.end

    def ahead(self, number: int, begin: Places) -> Callable[[], None]:
        """Prepare a chunk in another process, one for all ranks of this machine; returns what ends it."""
        if int(os.environ.get("LOCAL_RANK", 0)):
            return lambda: None
        # what goes wrong there goes wrong again in `read`, and is reported by it
        command = [sys.executable, "-m", "minisft.prepare.ahead"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        formats = {number: asdict(row_format) for number, row_format in self.formats.items()}
        places = [asdict(place) for place in begin]
        task = {"config": config_to_dict(self.config), "number": number, "begin": places, "formats": formats}
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(json.dumps(task).encode())

        def stop() -> None:
            process.kill()
            process.wait()

        return stop

    def chunk(self, number: int, begin: Places) -> Path:
        """Its folder. It is another one where the chunk begins elsewhere, or where its files have been written since."""
        files = [
            (source.commit, name) if source.commit else written(name)
            for source in self.sources
            for name in source.files
        ]
        weights = [source.weight for source in self.sources]
        where = sha256(repr((begin, weights, self.config.data.stream_rows, files)).encode()).hexdigest()
        return self.folder / f"chunk-{number:06d}-{where[:8]}"

    def discard(self, number: int) -> None:
        """Delete a chunk and its tokens."""
        if not int(os.environ.get("LOCAL_RANK", 0)):
            for path in self.folder.glob(f"*chunk-{number:06d}-*"):
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def written(path: str) -> tuple[str, int, int]:
    """What changes when a file is written."""
    found = os.stat(path)
    return path, found.st_size, found.st_mtime_ns


def tree_limit(config: Config, packing: bool, find_longest_tree: Callable[[], int | None]) -> int | None:
    """The most tokens of documents that share their beginnings (data.share_turns), 0: none share it. Raises UserError where
    they are to share it and cannot."""
    data = config.data
    cuts_anywhere = packing and STRATEGIES[data.packing_strategy].cut == "stream"
    if data.share_turns is False or cuts_anywhere or config.train.neftune_noise_alpha:
        return 0  # config/check.py refuses share_turns = true with these
    limit = find_longest_tree()
    if limit == 0 and data.share_turns is True:
        hint = 'leave it out, or set share_turns = "auto"'
        raise UserError(
            "data.share_turns = true, but a layer of this model has one past for all that follows", hint=hint
        )
    return limit


def titled(title: str, lines: list[str]) -> list[str]:
    """Lines of the summary, the first with its title in front."""
    return [f"{title if i == 0 else '':<10} {line}" for i, line in enumerate(lines)]
