"""A trained model in the form of the folder that it came from.

Whatever reads that folder reads this one: the same files, with the same tensors in the same order, the same config.json, and
the processor's files beside them. A tensor that training did not change is copied byte by byte in its own dtype, whether it
belongs to the text model (a frozen layer) or not (a vision tower, an audio encoder, layers that predict further tokens). The
others are written in the dtype of the export, in the layout of the family's files.

Tensors are compared and written one after the other: memory is that of the largest one, besides the model.
"""

import shutil
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch

from minisft import hub
from minisft.errors import MODEL, UserError
from minisft.model.decoder import Decoder
from minisft.model.model_config import ModelConfig
from minisft.model.quantized import quantization_of
from minisft.model.quantized_files import take_parts
from minisft.model.save import whole_tensor
from minisft.model.tensor_files import Entry, aligned, entry_of, write_entries
from minisft.model.tensor_names import Stored, stored_tensors
from minisft.model.weight_files import INDEX, FileTensor, bare, read_headers, weight_files
from minisft.strict_json import dump_json, parse_json, read_json, write_json

# Files that are not copied: those that are written anew, weights in other formats, and the model's own card.
WRITTEN = ("config.json", "generation_config.json", "quantization_config.json", "manifest.json", INDEX)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz")


def save_like(model: Decoder, source: Path, folder: Path, dtype: torch.dtype) -> list[str]:
    """Write weights, config.json and generation_config.json into a folder, made if absent, in the form of `source`.

    dtype: of the tensors that training changed. Returns a line for the user that counts them. Raises UserError (exit code
    MODEL) if the source is no longer the model that was loaded, OSError if writing fails.
    """
    assert quantization_of(model) is None, "weights that train are not quantised"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {bare(name): s for name, s in stored_tensors(model.config, dict(model.named_parameters())).items()}
    text, others = read_headers(source, model.config)
    dropped = {part.name for leaves in take_parts(text).values() for part in leaves.values()}
    if model.config.tie_word_embeddings and "lm_head.weight" in text:
        wanted["lm_head.weight"] = next(s for s in wanted.values() if s.names == ("embed_tokens.weight",))
    if differing := wanted.keys() ^ text.keys():
        raise UserError(
            f"{source} is not the model that the run started from any more: {len(differing)} tensors differ",
            hint="put that folder back, and give the same command again",
            exit_code=MODEL,
        )
    sources = {tensor.name: (wanted[key], tensor) for key, tensor in text.items()}
    num_changed, weight_map, total = 0, {}, 0
    for path in weight_files(source):
        header, text_of_header = _read_header(path)
        start, entries = 8 + len(text_of_header), []
        for name, place in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [-1])[0]):
            if name == "__metadata__" or name in dropped:
                continue
            changed = name in sources and not _is_unchanged(model, *sources[name])
            num_changed += changed
            entries.append(
                _changed(model, name, sources[name][0], dtype) if changed else _kept(path, start, name, place)
            )
        if any(entry.dtype != header[entry.name]["dtype"] for entry in entries):
            entries = aligned(entries)
        write_entries(folder / path.name, entries, header.get("__metadata__"), like=text_of_header)
        weight_map |= {entry.name: path.name for entry in entries}
        total += sum(entry.num_bytes for entry in entries)
    if (source / INDEX).is_file():
        _write_index(source / INDEX, folder / INDEX, weight_map, total)
    _write_config(model, source, folder, dtype, is_changed=num_changed > 0)
    kinds = f", of which {len(others)} are not part of the text model" if others else ""
    return [f"{num_changed} tensors have changed, {len(weight_map) - num_changed} are copied as they were{kinds}"]


def copy_other_files(source: Path, folder: Path) -> list[str]:
    """Copy what lies beside the model: the processor's files, licences, the other files of a tokenizer that is still the same,
    or the whole tokenizer where none was written. Call it after everything else is written. Returns the names."""
    has_tokenizer = (folder / "tokenizer.json").exists()
    is_same = not has_tokenizer or _same_bytes(source / "tokenizer.json", folder / "tokenizer.json")
    written = (*WRITTEN, *(hub.FILES["tokenizer"] if has_tokenizer else ()))
    copied = []
    for path in sorted(source.iterdir()):
        is_written = any(fnmatch(path.name, pattern) for pattern in written) or path.suffix in WEIGHTS
        is_page = path.name.lower() == "readme.md" or path.name.startswith(".")
        is_stale = path.name in hub.OTHER_TOKENIZERS and not is_same
        if is_written or is_page or is_stale or not path.is_file():
            continue
        shutil.copyfile(path, folder / path.name)
        copied.append(path.name)
    return copied


def copied_bytes(source: Path, config: ModelConfig) -> int:
    """Bytes of what the two functions above copy besides the tensors of the text model, or a little more."""
    _, others = read_headers(source, config)
    headers = [_read_header(path)[0] for path in weight_files(source)]
    places = [header[name]["data_offsets"] for header in headers for name in header.keys() & others.keys()]
    files = [path for path in source.iterdir() if path.is_file() and path.suffix not in WEIGHTS]
    return sum(last - first for first, last in places) + sum(path.stat().st_size for path in files)


# ---- tensors ------------------------------------------------------------------------------------------------------


def _is_unchanged(model: Decoder, stored: Stored, tensor: FileTensor) -> bool:
    """Whether the model has exactly what loading this tensor gives."""
    if tensor.shape != stored.shape([model.get_parameter(name) for name in stored.names]):
        return False
    parts = [model.whole(name) for name in stored.names]
    values = stored.split(tensor.read(), [len(part) for part in parts])
    return all(torch.equal(part, value.to(part.device, part.dtype)) for part, value in zip(parts, values))


def _changed(model: Decoder, name: str, stored: Stored, dtype: torch.dtype) -> Entry:
    shape = stored.shape([model.get_parameter(part) for part in stored.names])
    return entry_of(name, dtype, shape, partial(whole_tensor, model, stored))


def _kept(path: Path, start: int, name: str, place: dict) -> Entry:
    first, last = place["data_offsets"]
    write = partial(_copy_bytes, path, start + first, last - first)
    return Entry(name, place["dtype"], place["shape"], last - first, write)


def _copy_bytes(path: Path, start: int, count: int, out: BinaryIO) -> None:
    with open(path, "rb") as file:
        file.seek(start)
        while count:
            data = file.read(min(count, 2**20))
            if not data:
                raise OSError(f"{path} became shorter while it was copied")
            out.write(data)
            count -= len(data)


# ---- files --------------------------------------------------------------------------------------------------------


def _read_header(path: Path) -> tuple[dict, bytes]:
    """The header of a file that safetensors has checked, as JSON and as it is. The bytes of the tensors begin after it."""
    with open(path, "rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    return parse_json(text, str(path)), text


def _write_index(source: Path, path: Path, weight_map: dict[str, str], total: int) -> None:
    old = read_json(source, exit_code=MODEL)
    if old["weight_map"] == weight_map and old.get("metadata", {}).get("total_size", total) == total:
        shutil.copyfile(source, path)
        return
    order = {name: weight_map[name] for name in old["weight_map"] if name in weight_map}
    write_json(path, old | {"metadata": old.get("metadata", {}) | {"total_size": total}, "weight_map": order})


def _write_config(model: Decoder, source: Path, folder: Path, dtype: torch.dtype, *, is_changed: bool) -> None:
    """config.json with every key of the source's; the dtype, the number of tokens and the quantisation are the model's."""
    config = read_json(source / "config.json", exit_code=MODEL)
    parts = [config] + [config[key] for key in ("text_config",) if isinstance(config.get(key), dict)]
    before = dump_json(config)
    for part in parts:
        if is_changed:
            for key in {"dtype", "torch_dtype"} & part.keys():
                part[key] = str(dtype).removeprefix("torch.")
        if model.config.vocab_size != model.config.stored_vocab_size and ("vocab_size" in part or part is parts[-1]):
            part["vocab_size"] = model.config.vocab_size
    config.pop("quantization_config", None)
    if dump_json(config) == before:
        shutil.copyfile(source / "config.json", folder / "config.json")
    else:
        write_json(folder / "config.json", config)
    if model.generation_config:
        old = source / "generation_config.json"
        if old.is_file() and read_json(old, exit_code=MODEL) == model.generation_config:
            shutil.copyfile(old, folder / old.name)
        else:
            write_json(folder / old.name, model.generation_config)


def _same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()
