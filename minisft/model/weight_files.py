"""The safetensors of a model folder: which tensors are where, and which of them are those of the text model.

safetensors is a JSON header with names, dtypes, shapes and places, then raw bytes: model.safetensors, or shards that
model.safetensors.index.json lists, or what the ranks of a sharded run wrote of a checkpoint (row_files.py). Pickled files (.bin,
.pt) run code when they are opened and are never read.

A folder may hold more than the text model: a vision tower, an audio encoder, layers that predict several tokens ahead
(mtp). Such tensors are not read, and drop_in.py copies them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from minisft.errors import MODEL, UserError, shortened
from minisft.gguf.file import is_gguf, open_gguf
from minisft.gguf.tensors import GgufTensor, gguf_tensors
from minisft.model.model_config import ModelConfig
from minisft.model.row_files import Rows, lies_in_rows, read_rows
from minisft.model.tensor_files import open_weights
from minisft.model.tensor_names import Stored, module_name, stored_tensors, usual_name
from minisft.strict_json import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Prefixes of names; files of a model without a head have none. Those with language_model come from vision models.
PREFIXES = re.compile(r"^(model\.language_model|language_model\.model|language_model|model|transformer|gpt_neox)\.")
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$")  # constants that old versions stored
PARTS = ("embed_tokens", "embed_positions", "layers", "norm", "lm_head")  # of the decoder


@dataclass(frozen=True)
class FileTensor:
    """Where a tensor lies."""

    path: Path
    name: str
    shape: list[int]
    dtype: str  # as safetensors spells it: "F32", "BF16" ...

    def read(self) -> torch.Tensor:
        """Through a memory map: the bytes are read when they are used."""
        with open_weights(self.path) as file:
            return file.get_tensor(self.name)


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor of the family's files, made of our parameters, whose rows lie in several files (row_files.py)."""

    path: Path  # the folder
    name: str
    stored: Stored
    parts: list[Rows]

    @property
    def shape(self) -> list[int]:
        return self.stored.shape(self.parts)

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def read(self) -> torch.Tensor:
        return self.stored.join([part[:] for part in self.parts])


def read_headers(
    folder: Path, config: ModelConfig
) -> tuple[dict[str, FileTensor | GgufTensor | JoinedTensor], dict[str, FileTensor]]:
    """({name without prefix: tensor} of the text model, {name: tensor} of everything else), in the order of the files.

    A name belongs to the text model if it begins with a part of the decoder. Layers after its last one are layers that predict
    further tokens if config.json counts them as such, else they are the text model's and one too many.
    Raises UserError (exit code MODEL) if a file is missing or damaged, or a tensor of the text model is there twice.
    """
    if is_gguf(folder):
        return dict(gguf_tensors(open_gguf(folder))), {}
    if lies_in_rows(folder):
        return _joined_tensors(folder, config), {}
    parts = {module_name(config, part) for part in PARTS} | {"lm_head"}
    layers, ahead = module_name(config, "layers"), config.hf.get("num_nextn_predict_layers")
    further = range(config.num_layers, config.num_layers + (ahead if type(ahead) is int else 0))
    text, others = {}, {}
    for path, listed in weight_files(folder).items():
        with open_weights(path) as file:
            names = file.offset_keys()
            if listed is not None and listed != set(names):
                raise UserError(
                    f"{path} and {INDEX} disagree about {some(sorted(listed ^ set(names)))}",
                    hint="the folder mixes two models or a download is incomplete; download it again",
                    exit_code=MODEL,
                )
            for name in names:
                part = file.get_slice(name)
                tensor = FileTensor(path, name, part.get_shape(), part.get_dtype())
                key = usual_name(config, bare(name))
                first, _, rest = key.partition(".")
                number = rest.partition(".")[0]
                is_further = first == layers and number.isdecimal() and len(number) < 10 and int(number) in further
                if first not in parts or is_further or BUFFERS.search(name):
                    others[name] = tensor
                elif key in text:
                    raise UserError(f"{folder}: {name} is stored twice", exit_code=MODEL)
                else:
                    text[key] = tensor
    return text, others


def _joined_tensors(folder: Path, config: ModelConfig) -> dict[str, JoinedTensor]:
    rows, _ = read_rows(folder, "model")
    if unknown := [name for name in rows if "." not in name]:
        raise UserError(f"{folder}: {some(unknown)} is no parameter of a model", exit_code=MODEL)
    tensors = {}
    for name, stored in stored_tensors(config, rows).items():
        if missing := [part for part in stored.names if part not in rows]:
            raise UserError(f"{folder}: {some(missing)} is missing", exit_code=MODEL)
        tensors[bare(name)] = JoinedTensor(folder, name, stored, [rows[part] for part in stored.names])
    return tensors


def weight_files(folder: Path) -> Mapping[Path, set[str] | None]:
    """The weight files of a folder, each with the tensor names that the index lists for it (None: no index)."""
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: None}
    if not (folder / INDEX).is_file():
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
        raise UserError(
            f"{folder}: no {SINGLE} and no {INDEX}" + (f", only {some(others)}" if others else ""),
            hint="only safetensors are read, because the other formats can run code or are lossy; convert the model "
            "once with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
            exit_code=MODEL,
        )
    index = read_json(folder / INDEX, exit_code=MODEL)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: no weight_map", exit_code=MODEL)
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        # A path could lead out of the folder.
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", file, re.ASCII):
            shown = shortened(repr(file), 60)
            raise UserError(f"{folder / INDEX}: {shown} is not the name of a safetensors file", exit_code=MODEL)
        files.setdefault(folder / file, set()).add(name)
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing: {some(missing)}",
            hint="download the model again",
            exit_code=MODEL,
        )
    return files


def bare(name: str) -> str:
    """The name without its prefix; GPT-NeoX's second name for the head becomes the usual one."""
    return re.sub(r"^embed_out\.", "lm_head.", PREFIXES.sub("", name))


def some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(shortened(name, 200) for name in names[:10])
    return shown + (f" and {len(names) - 10} more" if len(names) > 10 else "")
