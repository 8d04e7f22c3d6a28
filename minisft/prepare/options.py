"""What a configuration means for the data, as arguments of the data rooms. No torch, so that `minisft plan` reads it at once."""

from pathlib import Path

from minisft.config.sections import Config, DataSection
from minisft.data.packing_strategies import STRATEGIES
from minisft.data.row_format import FormatOptions


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
