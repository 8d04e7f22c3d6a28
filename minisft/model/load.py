"""A decoder from a config, with random weights or with those of a Hugging Face folder.

A model is built on the meta device first, where tensors have shapes and no memory, and filled afterwards, tensor by
tensor through a memory map: loading needs the model plus its largest tensor, never two models. To quantise layers
(quantized.py), place_quantized comes between the two: each tensor is then quantised as soon as it is read, and the model is
never in memory in full precision.

All headers of the weight files (weight_files.py) are checked before the first byte is copied, because most mistakes
(another model's folder, half a download) show there; every tensor is then checked to be finite.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import nn

from minisft import hub
from minisft.errors import MODEL, UserError
from minisft.gguf.config import config_of, generation_config_of
from minisft.gguf.file import is_gguf, open_gguf
from minisft.kernels.quantize import BLOCKSIZES
from minisft.memory import memory_bytes, require_memory
from minisft.model.decoder import Decoder
from minisft.model.families import from_hf
from minisft.model.lora import adapter_sites, base_weights
from minisft.model.model_config import ModelConfig, with_vocab_size
from minisft.model.quantized import Quantization, QuantLinear, QuantWeight
from minisft.model.quantized_files import quant_type_of, split, take_parts, unpack
from minisft.model.row_files import Rows
from minisft.model.shards import device_of, is_shard, local, rows_here
from minisft.model.tensor_names import Stored, stored_tensors
from minisft.model.weight_files import BUFFERS, FileTensor, JoinedTensor, bare, read_headers, some
from minisft.strict_json import read_json

DTYPES = ("F64", "F32", "F16", "BF16")
VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # they have one row for each token


def build_model(config: ModelConfig, device: torch.device | str = "meta") -> Decoder:
    """A decoder in training mode with uninitialised weights. On meta it has no memory yet: call `give_memory`. Then fill it by
    init_weights or load_weights."""
    with torch.device("meta"):
        model = Decoder(config)
    return model if torch.device(device).type == "meta" else give_memory(model, device)


def give_memory(model: Decoder, device: torch.device | str, rows_on: torch.device | str | None = None) -> Decoder:
    """The model of build_model on a device; rows_on: where the rows of sharded parameters are, None = there too. Raises UserError
    (exit code MEMORY) if a device cannot hold its part."""
    device, tensors = torch.device(device), [*model.parameters(), *model.buffers()]
    rows_on = torch.device(rows_on or device)
    for place in {device, rows_on}:
        is_cuda = place.type == "cuda"
        require_memory(
            sum(local(t).nbytes for t in tensors if (rows_on if is_shard(t) else device) == place),
            torch.cuda.get_device_properties(place).total_memory if is_cuda else memory_bytes(),
            f"the model in {str(model.embed_tokens.weight.dtype).removeprefix('torch.')}",
            "take a smaller model, weights_dtype = 'bf16', or with [lora] load_in_4bit",
        )
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    # as to_empty, but for tensors on meta PyTorch then imports its compiler
    model._apply(lambda t: torch.empty_like(t, device=rows_on) if is_shard(t) else t.new_empty(t.shape, device=device))
    for first, *others in names.values():  # one parameter of several modules has become several
        for name in others:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, model.get_parameter(first))
    return model


def init_weights(model: Decoder, seed: int) -> None:
    """Random weights by the rules of transformers: matrices N(0, initializer_range), biases 0, norms multiply by 1. GPT-2's
    projections into the residual stream, two a layer, are smaller by sqrt(2 * num_layers). A Gated DeltaNet's decays are
    uniform in [0.01, 16] and its dt_bias is 1, OLMo hybrid's too.

    Drawn in fp32 on the CPU from `seed` alone, so that every device, dtype and number of ranks starts from the same model.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                _set_rows(parameter, torch.empty(parameter.shape).uniform_(0.01, 16, generator=generator).log_())
                continue
            if name.endswith(("dt_bias", "o_norm.weight")):
                parameter.fill_(1.0)
                continue
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0 - config.norm_offset)
                continue
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * config.num_layers if config.depth_scaled_init and is_residual else 1
            std = config.initializer_range / math.sqrt(depth)
            _set_rows(parameter, torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def read_config(folder: Path | str, *, max_length: int | None = None) -> ModelConfig:
    """The config.json of a model folder, or that of a GGUF file; max_length as in from_hf. Raises UserError (exit code MODEL)."""
    if is_gguf(folder):
        return from_hf(config_of(open_gguf(folder)), max_length=max_length)
    return from_hf(read_object(Path(folder) / "config.json"), max_length=max_length)


def read_object(path: Path) -> dict:
    """The table in a JSON file of a model. Raises UserError (exit code MODEL) for any other value."""
    table = read_json(path, exit_code=MODEL)
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected an object, found {type(table).__name__}", exit_code=MODEL)
    return table


def load_model(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_length: int | None = None,
    quantization: Quantization | None = None,
    least_vocab_size: int = 0,
) -> Decoder:
    """The model of a local folder or a hub repository, in eval mode. max_length: as in from_hf, for texts longer than those
    it was first trained with. quantization: as in place_quantized. least_vocab_size: a smaller embedding gets rows of new
    tokens up to this size, as in load_weights. Raises UserError (exit code MODEL)."""
    folder, _ = hub.resolve(path_or_repo, revision, "model")
    config = read_config(folder, max_length=max_length)
    model = build_model(with_vocab_size(config, max(config.vocab_size, least_vocab_size))).to(dtype)
    place_quantized(model, folder, quantization)
    give_memory(model, device)
    load_weights(model, folder)
    return model.eval()


def place_quantized(model: Decoder, source: Path | str, quantization: Quantization | None = None) -> None:
    """Replace linear layers of a model on meta by quantised ones, which load_weights then fills. These are the layers that the
    folder stores quantised or, if it stores none that way, all of them as `quantization` says (None: no layer).

    The head is not quantised. Raises UserError (exit code MODEL) if the folder stores another quantisation than requested.
    """
    folder = Path(source)
    packed = take_parts(read_headers(folder, model.config)[0])
    for site, stored in adapter_sites(model).items():
        leaves, wanted = packed.get(bare(f"{site}.weight")), None if packed else quantization
        if leaves is not None:
            try:
                wanted = _as_stored(model, stored, leaves)
            except ValueError as error:
                raise UserError(f"{folder}: {site}.weight: {error}", exit_code=MODEL) from error
            if quantization is not None and quantization.quant_type != wanted.quant_type:
                raise UserError(
                    f"{folder} is quantised already, as {wanted.quant_type}; {quantization.quant_type} is requested",
                    hint="leave load_in_4bit and load_in_8bit out: the weights are taken as they are stored",
                    exit_code=MODEL,
                )
        if wanted is None:
            continue
        for name in stored.names:
            parent, _, child = name.removesuffix(".weight").rpartition(".")
            layers = model.get_submodule(parent)
            setattr(layers, child, QuantLinear(getattr(layers, child), wanted))


def _as_stored(model: Decoder, stored: Stored, leaves: dict[str, FileTensor]) -> Quantization:
    """How the files quantise a matrix; the double quantisation of a stack is undone when it is split. Raises ValueError."""
    kind, shapes = quant_type_of(leaves), [model.get_parameter(name).shape for name in stored.names]
    numel, num_scales = sum(map(math.prod, shapes)), leaves["absmax"].shape[0] if "absmax" in leaves else 0
    sizes = [size for size in BLOCKSIZES if -(-numel // size) == num_scales]
    return Quantization(kind, "nested_absmax" in leaves and len(shapes) == 1, *sizes[:1])


def load_weights(model: Decoder, source: Path | str) -> list[str]:
    """Fill `model` (not on meta) from the safetensors of a folder, converted to the dtype of each parameter, or quantised
    where the model has a quantised matrix (place_quantized). Adapters beside the matrices are left alone. Of a sharded parameter
    only the rows of this process are read; a sharded quantised matrix is quantised whole, and its rows are kept.

    If the config has more tokens than the files (with_vocab_size), the new rows of the embedding and of the head are the
    mean of the old ones, so that no new token begins as the likeliest (Hewitt 2021).

    Returns lines for the user: rows that were added, tensors that are not the text model's.
    Raises UserError (exit code MODEL), naming up to ten tensors, if names, shapes or dtypes differ from those of the
    config, a value is not finite, a tied head differs from the embedding, or a file is missing or damaged.
    """
    folder, config = Path(source), model.config
    parameters, device = base_weights(model), device_of(model.embed_tokens.weight)
    assert not any(p.is_meta for p in model.parameters()), "give the model memory first"
    wanted = {bare(name): stored for name, stored in stored_tensors(config, parameters).items()}
    found, others = read_headers(folder, config)
    packed = take_parts(found)
    head = found.pop("lm_head.weight", None) if config.tie_word_embeddings else None
    _compare(folder, wanted, found, parameters, config, packed)

    nonfinite, added = [], 0
    with torch.no_grad():
        for key, stored in wanted.items():
            name = found[key].name
            parts = [parameters[part] for part in stored.names]
            if key in packed:
                leaves = {leaf: part.read() for leaf, part in packed[key].items()}
                _set_packed(f"{folder}: {name}", parts, stored, found[key].read(), leaves, device)
            else:
                added = max(added, _set_plain(parts, stored, found[key], device))
            if not all(_here(part).isfinite().all() for part in parts):  # after the conversion: fp16 ends at 65504
                nonfinite.append(name)
            if head is not None and stored.names == ("embed_tokens.weight",):
                _check_tied(folder, found[key].read(), head.read())
    if nonfinite:
        raise UserError(
            f"{folder}: NaN or infinite values as {model.embed_tokens.weight.dtype} in {some(nonfinite)}",
            hint="the files are damaged, or the dtype is too narrow for these weights",
            exit_code=MODEL,
        )
    # Not a weight, but the folder is known here, and save_model writes it back.
    if is_gguf(folder):
        model.generation_config = generation_config_of(open_gguf(folder))
    else:
        generation = folder / "generation_config.json"
        model.generation_config = read_object(generation) if generation.exists() else {}
    lines = [f"{added} new tokens start at the mean of the {config.vocab_size - added:,} others"] if added else []
    return lines + describe_others(others)


def weights_reader(model: Decoder, folder: Path) -> Callable[[str], torch.Tensor]:
    """The values of a parameter by its name, read from a folder when they are asked for; `model` may be on meta. For
    `Decoder.gather`. Raises UserError as `load_weights`, without a look at the values."""
    parameters = dict(model.named_parameters())
    wanted = {bare(name): stored for name, stored in stored_tensors(model.config, parameters).items()}
    found, _ = read_headers(folder, model.config)
    _compare(folder, wanted, found, parameters, model.config, {})
    places = {name: (key, i) for key, stored in wanted.items() for i, name in enumerate(stored.names)}

    def read(name: str) -> torch.Tensor:
        key, i = places[name]
        parts = [parameters[part] for part in wanted[key].names]
        return _pieces(parts, wanted[key], found[key])[i][:]

    return read


def describe_others(others: dict[str, FileTensor]) -> list[str]:
    """A line about the tensors that are not the text model's; none for constants that old versions stored."""
    names = [name.removeprefix("model.") for name in others if not BUFFERS.search(name)]
    counts = Counter(name.partition(".")[0] for name in names)
    counted = some(f"{part} ({count})" for part, count in sorted(counts.items()))
    return (
        [f"not part of the text model, and copied as they are when it is exported: {counted} tensors"] if names else []
    )


def _set_plain(
    parts: list[nn.Parameter | QuantWeight], stored: Stored, tensor: FileTensor | JoinedTensor, device: torch.device
) -> int:
    """Fill our matrices from one tensor of a file. Returns how many rows of new tokens were added."""
    added = 0
    for part, values in zip(parts, _pieces(parts, stored, tensor)):
        if isinstance(part, QuantWeight):
            part.fill(values[:].to(device))
            continue
        added = max(added, _set_rows(part, values))
    return added


def _pieces(
    parts: Sequence[nn.Parameter | QuantWeight], stored: Stored, tensor: FileTensor | JoinedTensor
) -> Sequence[torch.Tensor | Rows]:
    """The values of our parameters from one tensor of a file; those by rows are not read yet."""
    if isinstance(tensor, JoinedTensor):
        return tensor.parts
    return stored.split(tensor.read(), [part.shape[0] for part in parts])


def _set_rows(parameter: nn.Parameter, values: torch.Tensor | Rows) -> int:
    """Fill the rows of a parameter that are here; rows after the last of the values are their mean. Returns how many these are,
    here or elsewhere."""
    here, read = local(parameter), values[rows_here(parameter)]
    here[: len(read)].copy_(read)
    if len(read) < len(here):
        here[len(read) :] = values[:].float().mean(0)
    return len(parameter) - len(values)


def _here(part: nn.Parameter | QuantWeight) -> torch.Tensor | QuantWeight:
    return local(part) if isinstance(part, nn.Parameter) else part


def _set_packed(
    where: str,
    parts: list[nn.Parameter | QuantWeight],
    stored: Stored,
    tensor: torch.Tensor,
    leaves: dict,
    device: torch.device,
) -> None:
    """Fill quantised matrices from a file that stores them quantised."""
    rows = [part.shape[0] for part in parts]
    try:
        quantized = split(unpack(tensor, leaves, [sum(rows), parts[0].shape[1]]), stored, rows)
    except ValueError as error:
        hint = "download the model again, or use the one that it was made from, in bf16, fp16 or fp32"
        raise UserError(f"{where}: {error}", hint=hint, exit_code=MODEL) from error
    for part, q in zip(parts, quantized):
        assert isinstance(part, QuantWeight)  # _compare refuses other matrices
        tensors = {f.name: getattr(q, f.name) for f in fields(q)}  # copies: the file may change or go
        part.set(replace(q, **{k: v.to(device, copy=True) for k, v in tensors.items() if torch.is_tensor(v)}))


def _compare(folder: Path, wanted: dict, found: dict, parameters: dict, config: ModelConfig, packed: dict) -> None:
    """Compare names, shapes and dtypes of the files with those of the model; for quantised weights only the names."""
    problems = []
    for title, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            problems.append(f"{len(names)} {title}: {some(sorted(names))}")
    for key in sorted(wanted.keys() & found.keys()):
        parts = [parameters[part] for part in wanted[key].names]
        if key in packed and isinstance(parts[0], QuantWeight):
            continue
        shape = wanted[key].shape(parts)
        name, stored_shape, stored_dtype = found[key].name, found[key].shape, found[key].dtype
        if wanted[key].names[0] in VOCABULARY and stored_shape == [config.stored_vocab_size, *shape[1:]]:
            shape = stored_shape  # the rest is filled
        if stored_shape != shape:
            problems.append(f"{name} has shape {stored_shape}, config.json says {shape}")
        elif stored_dtype not in DTYPES:
            problems.append(f"{name} is {stored_dtype}, supported: {', '.join(DTYPES)}")
    if problems:
        raise UserError(
            f"{folder}: the weights are not those of this {len(parameters)}-tensor model: " + "; ".join(problems[:10]),
            hint="config.json and the weights must come from the same model, with its language-model head",
            exit_code=MODEL,
        )


def _check_tied(folder: Path, embedding: torch.Tensor, head: torch.Tensor) -> None:
    if not torch.equal(embedding, head):
        raise UserError(
            f"{folder}: lm_head.weight differs from the embedding, but tie_word_embeddings is true",
            hint="set tie_word_embeddings to false in config.json if this head is the right one, or delete it",
            exit_code=MODEL,
        )
