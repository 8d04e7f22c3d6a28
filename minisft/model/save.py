"""Writing a model as Hugging Face files, so that transformers, vLLM and the rest load it: config.json, the weights in
model.safetensors or in shards with an index, and generation_config.json where the model came with one.

The names and shapes are those of the family's class in transformers. A tied head is left out, and matrices that were
converted on loading (stacked or transposed ones) are converted back. Quantised matrices are written as they are, in the
form of bitsandbytes (quantized_files.py), with the `quantization_config` that makes others read them so.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from minisft.errors import UserError
from minisft.model.decoder import Decoder
from minisft.model.families import to_hf
from minisft.model.quantized import QuantWeight, named_weights, quantization_of
from minisft.model.quantized_files import join, pack
from minisft.model.tensor_files import TensorFile, entry_of, in_usual_order
from minisft.model.tensor_names import Stored, stored_tensors
from minisft.strict_json import write_json


def save_model(
    model: Decoder, folder: Path | str, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write the model into `folder`, which is created if missing; older weight files in it are replaced.

    dtype: of the stored weights except quantised ones; None = the model's own. Shards hold at most max_shard_bytes each
    (one tensor may be larger). At any time one tensor is in memory besides the model, or the quantised ones of a shard. Not
    atomic. Raises OSError if writing fails, UserError if quantised rows cannot be stacked as the family's files have them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for file in model_files(model, dtype, max_shard_bytes):
        file.write(folder)
        weight_map |= dict.fromkeys((entry.name for entry in file.entries), file.name)
    save_rest(model, folder, weight_map, dtype)


def model_files(
    model: Decoder, dtype: torch.dtype | None = None, max_shard_bytes: int = 5 * 10**9
) -> Iterator[TensorFile]:
    """The weight files of `save_model`, one after the other."""
    parameters = named_weights(model)
    dtype = dtype or model.head_weight.dtype
    tensors = stored_tensors(model.config, parameters)
    sizes = {name: sum(_num_bytes(parameters[p], dtype) for p in s.names) for name, s in tensors.items()}
    shards = _shards(sizes, max_shard_bytes)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        entries = []
        for name in names:
            parts = [parameters[part] for part in tensors[name].names]
            if isinstance(parts[0], QuantWeight):
                for key, tensor in _packed_tensors(name, tensors[name], parts).items():
                    entries.append(entry_of(key, tensor.dtype, tensor.shape, tensor.detach))
            else:
                read = partial(whole_tensor, model, tensors[name])
                entries.append(entry_of(name, dtype, tensors[name].shape(parts), read))
        # transformers refuses files without this entry
        yield TensorFile(file, in_usual_order(entries), {"format": "pt"})


def save_rest(model: Decoder, folder: Path, weight_map: dict[str, str], dtype: torch.dtype | None = None) -> None:
    """Everything beside the weight files. weight_map: tensor -> its file."""
    parameters = named_weights(model)
    dtype = dtype or model.head_weight.dtype
    tensors = stored_tensors(model.config, parameters)
    written = set(weight_map.values())
    if len(written) > 1:
        total_size = sum(_num_bytes(p, dtype) for p in parameters.values())
        total = {"total_parameters": sum(p.numel() for p in parameters.values()), "total_size": total_size}
        weight_map = dict(sorted(weight_map.items()))
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
        written.add("model.safetensors.index.json")
    for path in folder.iterdir():  # a leftover model.safetensors would be loaded instead of these shards
        if path.name not in written and re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", path.name):
            path.unlink()

    config = to_hf(model.config, str(dtype).removeprefix("torch."))
    if (quantization := quantization_of(model)) is not None:
        kept = sorted(n.removesuffix(".weight") for n, s in tensors.items() if _is_plain_matrix(s, parameters))
        config["quantization_config"] = quantization.to_config() | {"llm_int8_skip_modules": kept or ["lm_head"]}
    write_json(folder / "config.json", config)
    if model.generation_config:
        write_json(folder / "generation_config.json", model.generation_config)


def _shards(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Tensor names in order, cut wherever the next tensor would not fit."""
    shards, used = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _num_bytes(weight: Tensor | QuantWeight, dtype: torch.dtype) -> int:
    return weight.nbytes if isinstance(weight, QuantWeight) else weight.numel() * dtype.itemsize


def whole_tensor(model: Decoder, stored: Stored) -> Tensor:
    """The values of a tensor of the family's files."""
    return stored.join([model.whole(name) for name in stored.names])


def _packed_tensors(name: str, stored: Stored, parts: list[QuantWeight]) -> dict[str, Tensor]:
    try:
        return pack(name, join([part.get() for part in parts], stored))
    except ValueError as error:
        raise UserError(f"{name} cannot be written in 4 bits: {error}", hint="write it in 8 bits") from error


def _is_plain_matrix(stored: Stored, parameters: dict) -> bool:
    """Whether it is the matrix of a linear layer that is not quantised."""
    weight, name = parameters[stored.names[0]], stored.names[0]
    return isinstance(weight, Tensor) and weight.dim() == 2 and not name.startswith("embed_")
