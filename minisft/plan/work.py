"""How much there is to do: tokens of an epoch, packs, steps, and the largest micro-batch, without a loader and without torch.

Lengths come from the token cache, if there is one of these files, else from the first rows of each source, which are tokenised
now. Without rows (a hub data set that is not on this machine) every micro-batch is taken to be full.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import numpy as np

from minisft.config.sections import Config, source_list
from minisft.data.cache import TokenCache, find_cache, locate_all
from minisft.data.documents import select_documents
from minisft.data.kinds import TRAINED
from minisft.data.packing import Plan, plan
from minisft.data.sources import Source, count_rows, parse_source
from minisft.data.tokenise import new_entry, tokenise
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError
from minisft.hub import is_repository_name
from minisft.plan.memory import MicroBatch
from minisft.prepare.options import cache_folder, cut_length, format_options, ranks_sharing_a_batch, split_length
from minisft.schedule import total_steps

SAMPLE_ROWS = 1000  # of a source
UNPACKED = 1024  # tokens of a document, where neither the rows nor max_length say it
ROUND_TO = 64  # of a micro-batch, as prepare/data.py has it
MOST_MICRO_BATCHES = 100_000  # that are drawn to find the largest one


@dataclass(frozen=True)
class Work:
    """The training data, as far as it is known."""

    source: str  # where the counts are from, in words
    unit: str  # "documents", "pairs", "labelled answers"
    units: float | None  # of an epoch; None: unknown
    tokens: float | None  # of an epoch
    targets_share: float  # of all tokens
    packs: float | None  # or units, without packing
    fill: float | None  # of the packs
    mean_length: float  # of the documents, over tokens: sum(length^2) / sum(length)
    steps_per_epoch: int | None
    steps: int | None
    largest: Callable[[int], MicroBatch]  # of so many packs, or units

    def tokens_of_step(self, config: Config, ranks: int) -> float:
        """In the mean, over all ranks."""
        train = config.train
        packs = train.per_device_train_batch_size * train.gradient_accumulation_steps * ranks
        if self.tokens and self.packs:
            return min(packs, self.packs) * self.tokens / self.packs
        return float(packs * self.largest(1).tokens)


def measure(config: Config, tokenizer: Tokenizer, ranks: int) -> Work:
    """The work of a run on so many ranks. Raises UserError for data that cannot be read."""
    data, options = config.data, format_options(config)
    sources = [parse_source(source) for source in source_list(config.data.train_data)]
    group = 1 if options.answers == "chosen" else 2
    is_remote = any(is_repository_name(source.path) for source in sources)
    offline = config.model.local_files_only or is_remote  # a plan downloads no data
    try:
        sources = locate_all(sources, data.format, data.field_map, options, local_files_only=offline)
    except UserError:
        if not is_remote:
            raise
        return _unknown(config, group, "unknown: the data set is not on this machine")
    cache = find_cache(sources, tokenizer, cache_dir=cache_folder(config), options=options, on_bad_row=data.on_bad_row)
    if cache is not None:
        lengths, targets = _of_cache(config, cache)
        return _work(config, ranks, group, lengths, targets, 1.0, "the token cache")
    lengths, targets, times, source = _of_sample(config, sources, tokenizer)
    return _work(config, ranks, group, lengths, targets, times, source)


def _of_cache(config: Config, cache: TokenCache) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, targets) of each document of an epoch."""
    data = config.data
    documents, _ = select_documents(
        cache,
        max_length=cut_length(data, data.packing),
        split_at=split_length(data, data.packing),
        truncation=data.truncation,
        seed=config.train.seed,
    )
    assert documents.num_targets is not None
    return documents.lengths, documents.num_targets


def _of_sample(
    config: Config, sources: list[Source], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, float, str]:
    """(tokens, targets) of each document of the first rows, how many times as many an epoch has, and these rows in words."""
    data, options = config.data, format_options(config)
    lengths, targets, read, total, weighed = [], [], 0, 0, 0.0
    most, is_dropped = cut_length(data, data.packing) or 2**31, data.truncation == "drop"
    for source in sources:
        seen, is_all = 0, True  # rows that were tokenised: more are under way
        for documents in tokenise(source, tokenizer, options, "skip", new_entry(), [], {}):
            for document in documents:
                n = len(document.ids)
                if n <= most or not is_dropped:
                    lengths.append(min(n, most))
                    targets.append(int((document.kinds[1:most] >= TRAINED).sum()))
            seen = documents[-1].row + 1
            if seen >= SAMPLE_ROWS:
                is_all = False
                break
        rows = seen if is_all else count_rows(source)
        read, total, weighed = read + seen, total + rows, weighed + rows * source.weight
    if not lengths:
        raise UserError("data.train_data: no row of the sample can be used", hint="`minisft audit` tells why")
    times = weighed / read
    what = f"a sample of {read:,} of {total:,} rows" if read < total else f"all {total:,} rows, tokenised now"
    repeated = 2 if options.answers == "labels" else 1  # each with an answer of another row
    return np.repeat(lengths, repeated), np.repeat(targets, repeated), times, what


def _work(
    config: Config, ranks: int, group: int, lengths: np.ndarray, targets: np.ndarray, times: float, source: str
) -> Work:
    """lengths, targets: of documents, int [D]. times: how many of each an epoch has."""
    data, train = config.data, config.train
    keeps = targets > 0 if group == 1 else np.ones(len(targets), bool)
    lengths, targets = lengths[keeps], targets[keeps]
    if not len(lengths):
        raise UserError("data.train_data: no document of the sample has a token to train", hint="see `minisft audit`")
    times *= 1 - data.eval_fraction
    of_unit, targets_of_unit = (x[: len(x) // group * group].reshape(-1, group).sum(1) for x in (lengths, targets))
    capacity = group * data.max_length if data.packing and data.max_length else int(of_unit.max())
    packs = plan(of_unit, capacity, data.packing_strategy if data.packing else "none")
    num_packs = packs.num_packs * times
    steps_per_epoch = max(1, ceil(num_packs / _packs_a_step(config, ranks)))
    return Work(
        source=source,
        unit={1: "documents", 2: "labelled answers" if "kto" in config.dpo.loss_type else "pairs"}[group],
        units=len(of_unit) * times,
        tokens=float(of_unit.sum() * times),
        targets_share=float(targets.sum() / lengths.sum()),
        packs=num_packs,
        fill=packs.fill if data.packing else None,
        mean_length=float((lengths.astype(float) ** 2).sum() / lengths.sum()),
        steps_per_epoch=steps_per_epoch,
        steps=total_steps(steps_per_epoch, train.num_train_epochs, train.max_steps),
        largest=_largest_of(packs, of_unit, targets_of_unit, train.seed),
    )


def _largest_of(packs: Plan, lengths: np.ndarray, targets: np.ndarray, seed: int) -> Callable[[int], MicroBatch]:
    """The most tokens, and the most targets, that a micro-batch has among many that are dealt as an epoch deals them."""
    dealt = packs.deal(seed)
    size = (dealt.end - dealt.start).astype(float)
    share = targets[dealt.document] * size / lengths[dealt.document]  # of a piece of a document
    tokens, scored = (np.add.reduceat(x, dealt.offsets[:-1]) for x in (size, share))

    def largest(number: int) -> MicroBatch:
        n = min(number, len(tokens))
        rng, most = np.random.default_rng(seed), [0.0, 0.0]
        for _ in range(max(1, min(20, MOST_MICRO_BATCHES // len(tokens)))):
            order = rng.permutation(len(tokens))[: len(tokens) // n * n]
            most = [max(m, float(x[order].reshape(-1, n).sum(1).max())) for m, x in zip(most, (tokens, scored))]
        return MicroBatch(*(ceil(m / ROUND_TO) * ROUND_TO for m in most))

    return largest


def _unknown(config: Config, group: int, source: str) -> Work:
    length = config.data.max_length or UNPACKED
    train = config.train
    return Work(
        source=source,
        unit="pairs" if group == 2 else "documents",
        **dict.fromkeys(("units", "tokens", "packs", "fill", "steps_per_epoch")),
        targets_share=1.0,
        mean_length=float(length),
        steps=train.max_steps if train.max_steps > 0 else None,
        largest=lambda number: MicroBatch(number * group * length, number * group * length),
    )


def _packs_a_step(config: Config, ranks: int) -> int:
    groups = ranks // ranks_sharing_a_batch(config, ranks)
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps * groups
