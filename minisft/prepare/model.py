"""The model of a run: random weights, a trained model, or one with an adapter.

`model.model_name_or_path` names where a run starts: a hub repository, a model folder, an adapter folder (ours or PEFT's), or
the output folder of a run. What becomes of an adapter says `lora.r`:

    set      the training of that same adapter goes on, beside the base that it names
    "none"   it is merged into that base, in fp32, and all weights train

An adapter that goes on is what its files say. Keys of [lora] at their defaults follow them, other values must be the same.
lora_dropout and loraplus_lr_ratio do not belong to the adapter but to the training: this run's count.
"""

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import nn

from minisft import runtime
from minisft.config.sections import Config, LoraSection, ModelSection
from minisft.config.values import as_toml
from minisft.data.tokenizer import Tokenizer
from minisft.errors import MODEL, UserError
from minisft.model.adapter_files import (
    adapter_tensors,
    least_vocab_size,
    load_adapter,
    load_adapter_weights,
    read_options,
)
from minisft.model.families import from_hf
from minisft.model.load import build_model, init_weights, load_weights, place_quantized, read_config
from minisft.model.lora import LoraOptions, apply_lora, merge_adapter
from minisft.model.model_config import with_vocab_size, without_dropout
from minisft.model.quantized import Quantization, describe_quantized, named_weights, quantization_of, read_record
from minisft.model.start import Start, find_start
from minisft.prepare.data import titled
from minisft.strict_json import read_json


def prepare_model(
    config: Config, tokenizer: Tokenizer, highest_id: Callable[[], int], device: torch.device
) -> tuple[nn.Module, list[str], Start | None]:
    """The model in train.weights_dtype on its device, its lines of the summary, and where it started (None: nowhere).

    highest_id: finds the highest token id of the data, if it must be known.
    """
    section, max_length = config.model, config.data.max_length
    notes = []
    if section.config is not None:
        # what the folder's readers need to know about its tokenizer, unless the user says it
        specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        table = {"vocab_size": tokenizer.vocab_size, **specials, **section.config}
        model_config, start, origin = from_hf(table, max_length=max_length), None, "random weights"
    else:
        start = find_start(section.model_name_or_path, section.revision, local_files_only=section.local_files_only)
        model_config = read_config(start.folder, max_length=max_length)
        origin = start.name + (f" at {start.commit}" if start.commit else "")
        if start.adapter is not None:
            origin += f" + adapter {start.adapter}, {'merged' if config.lora.r is None else 'trained on'}"
            num_rows = max(model_config.vocab_size, least_vocab_size(start.adapter))
            model_config = with_vocab_size(model_config, num_rows)
        if section.new_special_tokens and tokenizer.vocab_size > model_config.vocab_size:
            model_config = with_vocab_size(model_config, tokenizer.vocab_size)
    if tokenizer.vocab_size > model_config.vocab_size:  # Gemma 3 1B has a token for images, and no row for it
        ids, rows = f"the tokenizer has ids up to {tokenizer.vocab_size - 1}", model_config.vocab_size
        if (highest := highest_id()) >= rows:
            raise UserError(
                f"{ids}, the data up to {highest}, the model's embedding {rows} rows",
                hint="use the tokenizer of this model, or set vocab_size in model.config",
                exit_code=MODEL,
            )
        notes = [f"{ids}, the embedding {rows} rows: the data has none of the others"]
    if model_config.learned_positions and (max_length or 0) > model_config.max_position_embeddings:
        raise UserError(
            f"data.max_length = {max_length}, but the model has {model_config.max_position_embeddings} positions",
            hint="lower max_length",
            exit_code=MODEL,
        )
    if config.trainer_type == "dpo" and config.dpo.disable_dropout:
        model_config = without_dropout(model_config)
    merges = start is not None and start.adapter is not None and config.lora.r is None
    dtype = runtime.DTYPES[config.train.weights_dtype]
    model, lines = build_model(model_config), [*model_config.notes, *notes]
    model.to(torch.float32 if merges else dtype)
    if start is None:
        init_weights(model.to_empty(device=device), config.train.seed)
    else:
        place_quantized(model, start.folder, quantization_for(section, start))
        lines += load_weights(model.to_empty(device=device), start.folder)
    if merges:
        was = quantization_of(model)
        merge_adapter(load_adapter(model, start.adapter)).to(dtype)
        lines += [f"the base was {was}: the adapter is merged into its dequantised matrices"] if was else []
    if quantization_of(model) is not None:
        lines.append(describe_quantized(model))
        if config.lora.r is None:
            raise UserError(
                f"{section.model_name_or_path} is quantised: such weights cannot be trained, adapters beside them can",
                hint="set lora.r, as in r = 16",
                exit_code=MODEL,
            )
    if start is not None and start.adapter is not None and (start.adapter / "generation_config.json").exists():
        model.generation_config = read_json(start.adapter / "generation_config.json", exit_code=MODEL)
    model.gradient_checkpointing = section.gradient_checkpointing is True
    model.gradient_checkpointing_every = section.gradient_checkpointing_every
    model.offload_activations = section.offload_activations
    model.recompute_cheap_ops(section.gradient_checkpointing == "selective")
    model.neftune_alpha = config.train.neftune_noise_alpha or 0.0
    size = sum(weight.numel() for weight in named_weights(model).values())
    lines.insert(0, f"{model_config.model_type}, {size / 1e6:,.1f} M parameters, {origin}")
    if config.lora.r is not None:
        lines += add_adapters(model, config, tokenizer, start.adapter)
    return model.train(), titled("model", lines), start


def quantization_for(section: ModelSection, start: Start) -> Quantization | None:
    """How the base is to be quantised: as the configuration asks, and as the record beside the adapter says.

    Raises UserError where they differ: an adapter is exact only beside the base that it was trained on.
    """
    asked = None
    if section.load_in_8bit:
        asked = Quantization("int8")
    elif section.load_in_4bit:
        asked = Quantization(section.bnb_4bit_quant_type, section.bnb_4bit_use_double_quant)
    recorded = read_record(start.adapter) if start.adapter is not None else None
    if asked is not None and recorded is not None and asked != recorded:
        raise UserError(
            f"the adapter {start.adapter} was trained beside a base that was {recorded}; {asked} is asked for",
            hint="leave load_in_4bit and load_in_8bit out: the base is quantised as it was",
            exit_code=MODEL,
        )
    return asked or recorded


def add_adapters(model: nn.Module, config: Config, tokenizer: Tokenizer, adapter: Path | None) -> list[str]:
    """Freeze the model and put the adapters of [lora] beside its layers, or that of a folder; what trains, in lines."""
    keys = {f.name for f in fields(LoraOptions)} - {"trainable_token_indices"}
    new = [tokenizer.backend.token_to_id(token) for token in config.model.new_special_tokens]
    ids = tuple(sorted({*config.lora.trainable_token_indices, *new}))
    if adapter is None:
        rows = token_rows(model, ids, config.lora.modules_to_save)
        chosen = {key: value for key, value in asdict(config.lora).items() if key in keys}
        options = LoraOptions(**chosen, trainable_token_indices=rows)
    else:
        options = options_of(model, adapter, config.lora, ids)
    sites = apply_lora(model, options, seed=config.train.seed)
    if adapter is not None:
        load_adapter_weights(model, adapter)
        model.adapter_is_new = False
    kinds = ", ".join(sorted({site.rpartition(".")[2] for site in sites}))
    trained = [p for p in model.parameters() if p.requires_grad]
    size, all_sizes = (sum(w.numel() for w in weights) for weights in (trained, named_weights(model).values()))
    name = "DoRA" if options.use_dora else "rsLoRA" if options.use_rslora else "LoRA"
    name += " from PiSSA" if options.is_pissa else ""
    rows = options.trainable_token_indices.items()
    also = "".join(f", and {len(ids)} row{'s' * (len(ids) > 1)} of {name}" for name, ids in rows)
    return [
        f"{name} r {options.r}, alpha {options.lora_alpha:g}, beside {len(sites)} layers ({kinds}){also}",
        f"trains {size / 1e6:,.2f} M of {all_sizes / 1e6:,.1f} M parameters ({size / all_sizes:.2%}); "
        f"the adapter will have {sum(t.nbytes for t in adapter_tensors(model).values()) / 1e6:,.1f} MB",
    ]


def token_rows(model: nn.Module, ids: tuple[int, ...], modules_to_save: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Matrix of which rows are to train -> the ids of their tokens."""
    matrices = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return {name: ids for name in matrices if ids and name not in modules_to_save}


def options_of(model: nn.Module, adapter: Path, section: LoraSection, ids: tuple[int, ...]) -> LoraOptions:
    """The options of an adapter that goes on; ids: of the tokens whose rows are to train.

    Raises UserError where a key of [lora] that is not at its default says something else than the adapter's files.
    """
    found, defaults = read_options(model, adapter), LoraSection()
    keys = {f.name for f in fields(LoraOptions)} - {"lora_dropout", "init_lora_weights", "trainable_token_indices"}
    asked = LoraOptions(**{key: getattr(section, key) for key in (*keys, "init_lora_weights")})
    saved = replace(asked, use_rslora=found.use_rslora).plain()
    differing = {}
    for key in sorted(keys):
        ours, theirs = getattr(section, key), getattr(found, key)
        if ours != getattr(defaults, key) and not same(ours, theirs) and not same(getattr(saved, key), theirs):
            differing[key] = ours, theirs
    rows = token_rows(model, ids, found.modules_to_save)
    if not all(set(ids) <= set(found.trainable_token_indices.get(name, ())) for name in rows):
        differing["trainable_token_indices"] = ids, found.trainable_token_indices
    if differing:
        said = "; ".join(
            f"lora.{k} = {as_toml(ours)}, there {as_toml(theirs)}" for k, (ours, theirs) in differing.items()
        )
        hint = f"set r = {found.r} and leave the other keys of [lora] out: they are the adapter's. "
        hint += 'Or set lora.r to "none": then it is merged, and all weights train'
        raise UserError(f"the adapter {adapter} is trained on, and is another one: {said}", hint=hint)
    return replace(found, lora_dropout=section.lora_dropout)


def same(ours: object, theirs: object) -> bool:
    """Equal; names and numbers of a list in any order."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return set(ours) == set(theirs)
    return ours == theirs
