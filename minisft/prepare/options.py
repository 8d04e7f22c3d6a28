"""What a configuration means for the data: the tokenizer, and arguments of the data rooms. No torch, so that `minisft plan` reads
it at once."""

import os
from pathlib import Path

from minisft.config.sections import Config, DataSection
from minisft.data.packing_strategies import STRATEGIES
from minisft.data.row_format import FormatOptions
from minisft.data.tokenizer import Tokenizer, load_tokenizer
from minisft.errors import UserError


def prepare_tokenizer(config: Config) -> tuple[Tokenizer, str]:
    """The tokenizer of the configuration, and a line about it."""
    section = config.model
    path, revision = section.tokenizer_name_or_path, None
    if path is None or path == section.model_name_or_path:
        path, revision = section.model_name_or_path, section.revision
        assert path is not None, "config/check.py requires one of them"
        if os.path.isdir(folder := os.path.expanduser(path)) and not os.path.isfile(Path(folder, "tokenizer.json")):
            from minisft.model.start import tokenizer_source  # of a run's folder or an adapter; it needs torch

            path, revision = tokenizer_source(path, revision)
    tokenizer = load_tokenizer(
        path,
        revision=revision,
        chat_template=section.chat_template,
        chat_template_kwargs=section.chat_template_kwargs,
        template_date=section.template_date,
        eos_token=section.eos_token,
        pad_token=section.pad_token,
        new_special_tokens=section.new_special_tokens,
        local_files_only=section.local_files_only,
    )
    return (
        tokenizer,
        f"tokenizer  {path}: {tokenizer.vocab_size:,} tokens, EOS {tokenizer.special_tokens.get('eos_token')!r}",
    )


def cache_folder(config: Config) -> Path:
    return Path(config.data.cache_dir or Path(config.output_dir).absolute().parent / "token_cache")


def cut_length(data: DataSection, packing: bool) -> int | None:
    """Where longer documents are cut; None where packing takes all of them, in pieces."""
    return None if packing and STRATEGIES[data.packing_strategy].cut != "front" else data.max_length


def split_length(data: DataSection, packing: bool) -> int | None:
    """Of what length these pieces are, where it is the same in every epoch."""
    return data.max_length if packing and STRATEGIES[data.packing_strategy].cut == "pieces" else None


def format_options(config: Config) -> FormatOptions:
    data = config.data
    preference = "labels" if "kto" in config.dpo.loss_type else "pairs"
    return FormatOptions(
        answers=preference if config.trainer_type == "dpo" else "chosen",
        dataset_text_field=data.dataset_text_field,
        prompt_format=data.prompt_format,
        completion_only_loss=data.completion_only_loss,
        assistant_only_loss=data.assistant_only_loss,
        response_marker=data.response_marker or "",
        instruction_marker=data.instruction_marker or "",
        add_eos=data.add_eos,
        add_special_tokens=data.add_special_tokens,
        control_tokens=data.control_tokens,
        reasoning=data.reasoning,
        multi_turn=data.multi_turn,
        last_turn_only=data.train_on_last_turn_only,
        turns_max_length=data.max_length if data.truncation == "turns" else None,
    )


def ranks_sharing_a_batch(config: Config, number: int) -> int:
    """parallel.context_parallel, on `number` ranks; one rank alone ignores it. Raises UserError where it does not divide them."""
    count = config.parallel.context_parallel
    if number > 1 and number % count:
        raise UserError(
            f"parallel.context_parallel = {count} on {number} ranks",
            hint=f"start a multiple of {count} ranks: each {count} of them share a micro-batch",
        )
    return count if number > 1 else 1
