"""Tensors whose rows lie in several files: what the ranks of a sharded run write of a checkpoint, each its own rows.

    model.rows-00001-of-00004.safetensors         our parameters by our names, which rows cut alike for every family
    optimizer.rows-00001-of-00004.safetensors     as optimizer.safetensors has them

The header of each file says which rows it has: "rows" is JSON, {name: [first row, rows of the whole tensor]}. A tensor that is
not listed there is whole: a vector that every rank has, or a counter. It is in one of the files.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minisft.errors import DATA, UserError, shortened
from minisft.model.tensor_files import TORCH_DTYPES, Entry, TensorFile, in_usual_order, open_weights
from minisft.strict_json import dump_json, parse_json

NAME = re.compile(r"(\w+)\.rows-(\d{5,9})-of-(\d{5,9})\.safetensors", re.ASCII)


def row_file(
    stem: str, number: int, count: int, entries: list[Entry], rows: dict[str, tuple[int, int]], **metadata: str
) -> TensorFile:
    """File `number`, from 0, of `count`. rows: of entries that are not whole, the first row here and the rows of the whole."""
    name = f"{stem}.rows-{number + 1:05}-of-{count:05}.safetensors"
    metadata = {"format": "pt", "rows": dump_json(rows).decode(), **metadata}
    return TensorFile(name, in_usual_order(entries), metadata)


def lies_in_rows(folder: Path) -> bool:
    """Whether the weights of a folder are in such files."""
    return any(NAME.fullmatch(path.name) for path in folder.glob("model.rows-*"))


def missing_file(names: Iterable[str], stem: str) -> str | None:
    """The first file that is not among the names, of those that hold the tensors of `stem`; None where all are there."""
    matches = [match for match in map(NAME.fullmatch, names) if match and match[1] == stem]
    if not matches:
        return None if f"{stem}.safetensors" in names else f"{stem}.safetensors"
    expected = (f"{stem}.rows-{i + 1:05}-of-{matches[0][3]}.safetensors" for i in range(int(matches[0][3])))
    return next((name for name in expected if name not in names), None)


@dataclass(frozen=True)
class Rows:
    """A tensor that is read when rows are asked for: rows[2:5] are three of them, rows[:] is the whole tensor."""

    name: str
    shape: list[int]
    dtype: str  # as safetensors spells it
    places: list[tuple[int, int, safe_open]]  # first row and number of rows in each file, in order

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        if not self.shape:
            return self.places[0][2].get_tensor(self.name)
        first, last, _ = rows.indices(len(self))
        pieces = [
            file.get_slice(self.name)[max(first - start, 0) : min(last - start, count)]
            for start, count, file in self.places
            if start < last and first < start + count
        ]
        if not pieces:
            return torch.empty([0, *self.shape[1:]], dtype=TORCH_DTYPES[self.dtype])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def read_rows(folder: Path, stem: str) -> tuple[dict[str, Rows], dict[str, str]]:
    """({name: tensor}, the metadata of the header) of <stem>.safetensors, or of the files by rows.

    Raises UserError (exit code DATA) where a file is missing or the rows in the files are not the tensors once.
    """
    names = {path.name for path in folder.glob(f"{stem}.*")}
    if (name := missing_file(names, stem)) is not None:
        raise UserError(f"{folder / name} is missing", exit_code=DATA)
    by_rows = sorted(name for name in names if (match := NAME.fullmatch(name)) and match[1] == stem)
    metadata: dict[str, str] = {}
    places: dict[str, list[tuple[int, int, safe_open]]] = {}
    shapes: dict[str, tuple[list[int], str]] = {}
    for name in by_rows or [f"{stem}.safetensors"]:
        path = folder / name
        file = open_weights(path)
        metadata = file.metadata() or {}
        listed = parse_json(metadata.get("rows", "{}").encode(), str(path))
        for tensor, shape, dtype, first in _tensors(file, listed, path):
            if shapes.setdefault(tensor, (shape, dtype)) != (shape, dtype):
                raise _not_once(folder, tensor)
            places.setdefault(tensor, []).append((first, file.get_slice(tensor).get_shape()[0] if shape else 1, file))
    tensors = {}
    for name, parts in places.items():
        parts.sort(key=lambda part: part[:2])
        shape, dtype = shapes[name]
        ends = [first + count for first, count, _ in parts]
        if [first for first, _, _ in parts] != [0, *ends[:-1]] or ends[-1] != (shape[0] if shape else 1):
            raise _not_once(folder, name)
        tensors[name] = Rows(name, shape, dtype, parts)
    return tensors, metadata


def _tensors(file: safe_open, listed: object, path: Path) -> Iterator[tuple[str, list[int], str, int]]:
    """(name, shape of the whole tensor, dtype, first row here) for each tensor of a file."""
    if not isinstance(listed, dict):
        raise UserError(f"{path}: its list of rows is no object", exit_code=DATA)
    for name in file.keys():
        piece = file.get_slice(name)
        shape, first = piece.get_shape(), 0
        if name in listed:
            place = listed[name]
            if not (isinstance(place, list) and len(place) == 2 and all(type(n) is int for n in place) and shape):
                raise _not_once(path, name)
            first, shape = place[0], [place[1], *shape[1:]]
        yield name, shape, piece.get_dtype(), first


def _not_once(where: Path, name: str) -> UserError:
    problem = f"{where}: the rows of {shortened(name, 100)} are not there once each"
    return UserError(problem, hint="take another checkpoint, or a whole copy of this one", exit_code=DATA)
