"""The model of a run: random weights, a trained model, or one with an adapter.

`model.model_name_or_path` names where a run starts: a hub repository, a model folder, an adapter folder (ours or PEFT's), or
the output folder of a run. `lora.r` decides what happens to an adapter:

    set      that same adapter is trained further, beside the base that it names
    "none"   it is merged into that base, in fp32, and all weights train

The files of an adapter that is trained further decide its shape: keys of [lora] at their defaults follow them, other values
must be the same. lora_dropout and loraplus_lr_ratio belong to the training and not to the adapter, so this run's count.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from minisft import parallel, ranks, runtime
from minisft.config.sections import Config, LoraSection, ModelSection
from minisft.config.values import as_toml
from minisft.data.tokenizer import Tokenizer
from minisft.errors import MODEL, UserError
from minisft.memory import memory_bytes, require_memory
from minisft.model.adapter_files import (
    adapter_tensors,
    least_vocab_size,
    load_adapter,
    load_adapter_weights,
    read_options,
)
from minisft.model.decoder import Decoder
from minisft.model.families import from_hf
from minisft.model.load import (
    build_model,
    give_memory,
    init_weights,
    load_weights,
    place_quantized,
    read_config,
    read_object,
)
from minisft.model.lora import (
    adapter_options,
    adapter_sites,
    merge_adapter,
    merged_weight,
    place_adapters,
    start_adapters,
)
from minisft.model.lora_options import LoraOptions, is_target
from minisft.model.model_config import ModelConfig, longest_tree, with_vocab_size, without_dropout
from minisft.model.quantized import (
    Quantization,
    QuantWeight,
    describe_quantized,
    named_weights,
    quant_weights,
    quantization_of,
    read_record,
)
from minisft.model.shards import is_shard, local, rows_here, whole
from minisft.model.start import Start, find_start
from minisft.optimizers import cut_runs_through_blocks
from minisft.plan.memory import Place
from minisft.plan.offload import offload
from minisft.prepare.data import titled
from minisft.prepare.options import ranks_sharing_a_batch
from minisft.units import size


def prepare_model(
    config: Config, tokenizer: Tokenizer, highest_id: Callable[[], int], device: torch.device
) -> tuple[Decoder, list[str], Start | None]:
    """The model in train.weights_dtype on its device, its lines of the summary, and where it started (None: random weights).

    highest_id(): the largest token id in the data. A function, because it reads the whole cache and is needed only when the
    tokenizer has more ids than the embedding has rows.
    """
    section, start = config.model, None
    if section.config is None:
        start = find_start(section.model_name_or_path, section.revision, local_files_only=section.local_files_only)
    model_config, origin, notes = resolve_model_config(config, tokenizer, start, highest_id)
    model, lines = fill_model(config, model_config, tokenizer, start, device)
    if start is not None and start.adapter is not None and (start.adapter / "generation_config.json").exists():
        model.generation_config = read_object(start.adapter / "generation_config.json")
    model.gradient_checkpointing = section.gradient_checkpointing is True
    model.gradient_checkpointing_every = section.gradient_checkpointing_every
    model.offload_activations = section.offload_activations
    model.recompute_cheap_ops(section.gradient_checkpointing == "selective")
    model.neftune_alpha = config.train.neftune_noise_alpha or 0.0
    count = sum(weight.numel() for weight in named_weights(model).values())
    lines = [f"{model_config.model_type}, {count / 1e6:,.1f} M parameters, {origin}", *notes, *lines]
    if config.lora.r is not None:
        lines += describe_adapters(model)
    if is_to_be_sharded(config):
        parallel.settle(model)
        lines.append(parallel.describe(model) + (", in the memory of the CPU" if config.parallel.cpu_offload else ""))
    if (sharing := ranks_sharing_a_batch(config, ranks.world_size())) > 1:
        refuse_split_documents(model_config)
        parallel.split_documents(model, device, sharing)
        lines.append(
            f"documents are split: {sharing} ranks share each micro-batch, and every one has 1/{sharing} of its tokens"
        )
    return model.train(), titled("model", lines), start


def refuse_split_documents(c: ModelConfig) -> None:
    """UserError for a model whose layers cannot attend over ranks."""
    others = sorted({mixer for mixer in c.mixers if mixer != "attention"})
    if others or c.attention_dropout:
        what = f"has layers ({', '.join(others)}) that" if others else "draws attention dropout as if it"
        raise UserError(
            f"parallel.context_parallel: {c.model_type} {what} read a document from its first token on, on one rank",
            hint="leave context_parallel out"
            if others
            else "set attention_dropout to 0 in config.json, or leave context_parallel out",
            exit_code=MODEL,
        )


def find_longest_tree(config: Config, tokenizer: Tokenizer) -> int | None:
    """`longest_tree` of the model of a run, from its config.json."""
    section, start = config.model, None
    if section.config is None:
        start = find_start(section.model_name_or_path, section.revision, local_files_only=section.local_files_only)
    return longest_tree(resolve_model_config(config, tokenizer, start, lambda: 0)[0])


def resolve_model_config(
    config: Config, tokenizer: Tokenizer, start: Start | None, highest_id: Callable[[], int]
) -> tuple[ModelConfig, str, list[str]]:
    """The shape of the model, its origin in words, and notes. Raises UserError where tokenizer or data do not fit it."""
    section, max_length = config.model, config.data.max_length
    if start is None:
        # readers of the exported folder need these of the tokenizer, unless the user gives them
        specials = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        table = {"vocab_size": tokenizer.vocab_size, **specials, **section.config}
        model_config, origin = from_hf(table, max_length=max_length), "random weights"
    else:
        model_config = read_config(start.folder, max_length=max_length)
        origin = start.name + (f" at {start.commit}" if start.commit else "")
        if start.adapter is not None:
            origin += f" + adapter {start.adapter}, {'merged' if config.lora.r is None else 'trained further'}"
            num_rows = max(model_config.vocab_size, least_vocab_size(start.adapter))
            model_config = with_vocab_size(model_config, num_rows)
        if section.new_special_tokens and tokenizer.vocab_size > model_config.vocab_size:
            model_config = with_vocab_size(model_config, tokenizer.vocab_size)
    notes = list(model_config.notes)
    if tokenizer.vocab_size > model_config.vocab_size:  # Gemma 3 1B has a token for images, and no row for it
        ids, rows = f"the tokenizer has ids up to {tokenizer.vocab_size - 1}", model_config.vocab_size
        if (highest := highest_id()) >= rows:
            raise UserError(
                f"{ids}, the data up to {highest}, the model's embedding {rows} rows",
                hint="use the tokenizer of this model, or set vocab_size in model.config",
                exit_code=MODEL,
            )
        notes.append(f"{ids}, the embedding {rows} rows: the data has none of the others")
    if model_config.learned_positions and (max_length or 0) > model_config.max_position_embeddings:
        raise UserError(
            f"data.max_length = {max_length}, but the model has {model_config.max_position_embeddings} positions",
            hint="lower max_length",
            exit_code=MODEL,
        )
    if config.trainer_type == "dpo" and config.dpo.disable_dropout:
        model_config = without_dropout(model_config)
    return model_config, origin, notes


def fill_model(
    config: Config, model_config: ModelConfig, tokenizer: Tokenizer, start: Start | None, device: torch.device
) -> tuple[Decoder, list[str]]:
    """The model with its weights, random or loaded, an adapter merged where lora.r is "none", or trained beside them; notes.

    It gets its shape first, without memory: quantised layers, adapters, rows of this rank. Then each tensor is read to where it
    stays. Where an adapter is merged and the model sharded, base and adapter are another model with the same rows.
    """
    model, dtype = build_model(model_config), runtime.DTYPES[config.train.weights_dtype]
    merges = start is not None and start.adapter is not None and config.lora.r is None
    merges_rows = merges and is_to_be_sharded(config)
    rows_on = "cpu" if config.parallel.cpu_offload else device
    model.to(torch.float32 if merges else dtype)
    if start is not None:
        place_quantized(model, start.folder, quantization_for(config.model, start))
        if config.lora.r is not None:
            place_adapters(model, lora_options(model, config, tokenizer, start.adapter))
        elif merges_rows:
            place_adapters(model, read_options(model, start.adapter))
    if is_to_be_sharded(config):
        shard(config, model, device)
    give_memory(model, device, rows_on)
    if start is None:
        init_weights(model, config.train.seed)
        return model, []
    lines = list(load_weights(model, start.folder))
    if merges:
        was = quantization_of(model)
        if merges_rows:
            load_adapter_weights(model, start.adapter)
            merged = build_model(model_config).to(dtype)
            shard(config, merged, device)
            model = merge_rows(model, give_memory(merged, device, rows_on))
        else:
            merge_adapter(load_adapter(model, start.adapter)).to(dtype)
        lines += [f"the base was {was}: the adapter is merged into its dequantised matrices"] if was else []
    if quantization_of(model) is not None:
        lines.append(describe_quantized(model))
        if config.lora.r is None:
            raise UserError(
                f"{config.model.model_name_or_path} is quantised: such weights cannot be trained, adapters beside them can",
                hint="set lora.r, as in r = 16",
                exit_code=MODEL,
            )
    if config.lora.r is not None:
        fill_adapters(model, config.train.seed, start.adapter)
    return model, lines


def merge_rows(source: Decoder, model: Decoder) -> Decoder:
    """Fill a sharded model with the rows of a base and its adapter, which are sharded too, and free those. Matrices that are
    quantised or have an adapter are made whole, one at a time. All ranks call it."""
    for name, p in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        weight = getattr(source.get_submodule(parent), leaf)
        with parallel.waiting(model), torch.no_grad():
            merged = merged_weight(source, name)
            if merged is None and is_shard(weight) and is_shard(p):
                local(p).copy_(local(weight))
            else:
                local(p).copy_((whole(weight) if merged is None else merged)[rows_here(p)])
        for old in weight.parts() if isinstance(weight, QuantWeight) else [weight]:
            if is_shard(old):
                local(old).untyped_storage().resize_(0)
    model.generation_config = source.generation_config
    return model


def is_to_be_sharded(config: Config) -> bool:
    return config.parallel.strategy in ("fsdp2", "hsdp") and ranks.world_size() > 1


def shard(config: Config, model: Decoder, device: torch.device) -> None:
    """Keep only this rank's rows of the matrices. Raises UserError where the ranks are no multiple of parallel.replicas, or
    torch is too old for a quantised base."""
    section, precision = config.parallel, runtime.pick_precision(config.train, device)
    dtype = None if precision == "fp32" else runtime.DTYPES[precision]
    replicas = section.replicas if section.strategy == "hsdp" else 1
    if ranks.world_size() % replicas:
        raise UserError(
            f"parallel.replicas = {replicas} on {ranks.world_size()} ranks",
            hint="each replica has the same number of ranks",
        )
    if quant_weights(model) and not parallel.SHARDS_INTEGERS:
        raise UserError(
            f'parallel.strategy = "{section.strategy}" shards a quantised base: FSDP2 of torch {torch.__version__} cannot',
            hint='update torch to 2.12 or later, or set strategy = "ddp"',
        )
    options = {"replicas": replicas, "reshard": section.reshard_after_forward, "dtype": dtype}
    options["offload"] = section.cpu_offload
    place = Place(device.type == "cuda", ranks.world_size(), ranks.world_size() // replicas, precision=precision)
    if (moved := offload(config, model.config, place)) is not None:
        number = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        needed, hint = int(number * sum(moved.memory.values())), 'take more machines, optim = "adamw_8bit", or [lora]'
        require_memory(needed, memory_bytes(), f"cpu_offload of {number} ranks of this machine", hint)
    if config.train.optim == "adamw_8bit" and config.lora.r is None:
        options["keep"] = cut_runs_through_blocks
    parallel.shard(model, device, **options)


def quantization_for(section: ModelSection, start: Start) -> Quantization | None:
    """The quantisation of the base: that of the configuration or, without one, of the record beside the adapter.

    Raises UserError where both exist and differ: an adapter is exact only beside the base that it was trained on.
    """
    asked = None
    if section.load_in_8bit:
        asked = Quantization("int8")
    elif section.load_in_4bit:
        asked = Quantization(section.bnb_4bit_quant_type, section.bnb_4bit_use_double_quant)
    recorded = read_record(start.adapter) if start.adapter is not None else None
    if asked is not None and recorded is not None and asked != recorded:
        raise UserError(
            f"the adapter {start.adapter} was trained beside a base that was {recorded}, not {asked}",
            hint="leave load_in_4bit and load_in_8bit out: the base is quantised as it was",
            exit_code=MODEL,
        )
    return asked or recorded


def lora_options(model: Decoder, config: Config, tokenizer: Tokenizer, adapter: Path | None) -> LoraOptions:
    """The options of [lora], or those of the adapter in a folder."""
    keys = {f.name for f in fields(LoraOptions)} - {"trainable_token_indices"}
    new = [tokenizer.backend.token_to_id(token) for token in config.model.new_special_tokens]
    ids = tuple(sorted({*config.lora.trainable_token_indices, *new}))
    if adapter is not None:
        return options_of(model, adapter, config.lora, ids)
    rows = token_rows(model, ids, config.lora.modules_to_save)
    chosen = {key: value for key, value in asdict(config.lora).items() if key in keys}
    return LoraOptions(**chosen, trainable_token_indices=rows)


def fill_adapters(model: Decoder, seed: int, adapter: Path | None) -> None:
    """Give the adapters their first values, or those of the adapter in a folder. All ranks call it."""
    with parallel.waiting(model):
        start_adapters(model, seed=seed, decomposes=ranks.rank() == 0)
    if adapter_options(model).is_pissa:  # each rank's decomposition would have signs and last bits of its own
        trained = [p for p in model.parameters() if p.requires_grad]
        starts = [b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("start_A", "start_B")]
        ranks.send_from_first_rank([*trained, *starts])
    if adapter is not None:
        load_adapter_weights(model, adapter)
        model.adapter_is_new = False


def describe_adapters(model: Decoder) -> list[str]:
    options = adapter_options(model)
    sites = [site for site in adapter_sites(model) if is_target(site, options)]
    kinds = ", ".join(sorted({site.rpartition(".")[2] for site in sites}))
    trained = [p for p in model.parameters() if p.requires_grad]
    count, all_counts = (sum(w.numel() for w in weights) for weights in (trained, named_weights(model).values()))
    name = "DoRA" if options.use_dora else "rsLoRA" if options.use_rslora else "LoRA"
    name += " from PiSSA" if options.is_pissa else ""
    rows = options.trainable_token_indices.items()
    also = "".join(f", and {len(ids)} row{'s' * (len(ids) > 1)} of {name}" for name, ids in rows)
    return [
        f"{name} r {options.r}, alpha {options.lora_alpha:g}, beside {len(sites)} layers ({kinds}){also}",
        f"trains {count / 1e6:,.2f} M of {all_counts / 1e6:,.1f} M parameters ({count / all_counts:.2%}); "
        f"the adapter will have {size(sum(t.nbytes for t in adapter_tensors(model).values()))}",
    ]


def token_rows(model: Decoder, ids: tuple[int, ...], modules_to_save: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """{matrix with rows to train: the ids of their tokens}"""
    matrices = ["embed_tokens"] if model.config.tie_word_embeddings else ["embed_tokens", "lm_head"]
    return {name: ids for name in matrices if ids and name not in modules_to_save}


def options_of(model: Decoder, adapter: Path, section: LoraSection, ids: tuple[int, ...]) -> LoraOptions:
    """The options of an adapter that is trained further; ids: of the tokens whose rows are to train.

    Raises UserError where a key of [lora] is not at its default and differs from the adapter's files.
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
        raise UserError(f"the adapter {adapter} cannot be trained further with other options: {said}", hint=hint)
    return replace(found, lora_dropout=section.lora_dropout)


def same(ours: object, theirs: object) -> bool:
    """Equal; names and numbers of a list in any order."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return set(ours) == set(theirs)
    return ours == theirs
