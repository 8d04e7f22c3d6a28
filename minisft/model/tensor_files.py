"""safetensors files: opened with messages that say what else a file may be, and written tensor by tensor."""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from minisft.errors import MODEL, UserError
from minisft.files import open_file, require_file
from minisft.strict_json import parse_json

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def open_weights(path: Path) -> safe_open:
    require_file(path, exit_code=MODEL)  # safe_open would wait for a pipe
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        reason = str(error)[:100]
    with open_file(path, exit_code=MODEL) as file:
        start = file.read(64)
    problem = f"not a complete safetensors file ({reason})"
    if start.startswith(b"version https://git-lfs"):
        problem = "a Git LFS pointer, not the weights (`git lfs pull` in that folder fetches them)"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        problem = "a web page, not the weights: the download went wrong (a login page?)"
    elif start.startswith((b"PK\x03\x04", b"\x80\x02")):
        problem = "a pickled PyTorch file with another name; it is not read, because opening it can run code"
    raise UserError(f"{path}: {problem}", hint="download the file again", exit_code=MODEL)


@dataclass
class Entry:
    """A tensor of a file that is written."""

    name: str
    dtype: str  # as safetensors spells it
    shape: list[int]
    num_bytes: int
    write: Callable[[BinaryIO], None]
    read: Callable[[], torch.Tensor] | None = None  # of tensors in memory


def entry_of(name: str, dtype: torch.dtype, shape: Iterable[int], read: Callable[[], torch.Tensor]) -> Entry:
    """read(): the values, on any device and in any dtype, when they are written."""

    def write(file: BinaryIO) -> None:
        values = read().detach().to("cpu", dtype).contiguous()
        assert list(values.shape) == entry.shape, name
        file.write(values.reshape(-1).view(torch.uint8).numpy())

    shape = list(shape)
    entry = Entry(name, DTYPE_NAMES[dtype], shape, math.prod(shape) * dtype.itemsize, write, read)
    return entry


@dataclass
class TensorFile:
    """A safetensors file that is to be written, tensor by tensor in this order."""

    name: str
    entries: list[Entry]
    metadata: dict[str, str] | None

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    def write(self, folder: Path) -> None:
        write_entries(folder / self.name, self.entries, self.metadata)

    def copied(self, homes: dict[str, torch.Tensor]) -> "TensorFile":
        """The same file with the values of now, as copies in the memory of the CPU, which may still be on their way from a GPU.

        homes: the memory of the copies by "file/tensor", which is taken again if it fits; pinned if the tensors are on a GPU.
        """
        entries = []
        for entry in self.entries:
            assert entry.read is not None, entry.name
            values, key, dtype = entry.read().detach(), f"{self.name}/{entry.name}", TORCH_DTYPES[entry.dtype]
            home = homes.get(key)
            if home is None or list(home.shape) != entry.shape or home.dtype != dtype:
                home = homes[key] = torch.empty(entry.shape, dtype=dtype, pin_memory=values.is_cuda)
            home.copy_(values, non_blocking=True)
            entries.append(entry_of(entry.name, dtype, entry.shape, home.detach))
        return replace(self, entries=entries)


def aligned(entries: Iterable[Entry]) -> list[Entry]:
    """Those of large items first: readers want each tensor to begin at a multiple of its item size."""
    return sorted(entries, key=lambda entry: -entry.num_bytes // max(math.prod(entry.shape), 1))


def in_usual_order(entries: Iterable[Entry]) -> list[Entry]:
    """As safetensors writes them: by the size of an item, then by name."""
    return aligned(sorted(entries, key=lambda entry: entry.name))


def write_entries(
    path: Path, entries: list[Entry], metadata: dict[str, str] | None, *, like: bytes | None = None
) -> None:
    """A safetensors file, tensor by tensor in this order, so that one of them is in memory at a time. Raises OSError if writing
    fails.

    like: the header of another file, which is taken byte by byte where it says the same.
    """
    header, offset = {} if metadata is None else {"__metadata__": metadata}, 0
    for entry in entries:
        last = offset + entry.num_bytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, last]}
        offset = last
    if like is not None and parse_json(like, str(path)) == header:
        text = like
    else:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            entry.write(file)
