"""A GGUF file, the format of llama.cpp: metadata, a tokenizer, and tensors that are mostly quantised, in one file.

The library `gguf` (the extra `minisft[gguf]`) reads and dequantises it. A run may start from such a file: config.py makes a
config.json of the metadata, tensors.py the weights, tokenizer.py the files of a tokenizer. Nothing is written to the disk, and
what the run exports is a Hugging Face folder.
"""

import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minisft.errors import MODEL, UserError
from minisft.files import open_file

if TYPE_CHECKING:
    import numpy as np
    from gguf import ReaderTensor


@dataclass(frozen=True)
class GgufFile:
    path: Path
    values: dict[str, Any]  # "llama.block_count" -> 30; strings, numbers, lists
    tensors: dict[str, "ReaderTensor"]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def own(self) -> dict[str, Any]:
        """The values of the architecture, without its name in front."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}


def is_gguf(path: Path | str) -> bool:
    """Whether the path names a GGUF file that exists."""
    return Path(path).suffix.lower() == ".gguf" and os.path.isfile(os.path.expanduser(path))


def open_gguf(path: Path | str) -> GgufFile:
    """The file, its tensors as memory maps. Raises UserError (exit code MODEL) if it cannot be read."""
    path = Path(os.path.expanduser(path))
    status = path.stat()
    return _open(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=2)
def _open(path: Path, _size: int, _time: int) -> GgufFile:
    try:
        from gguf import GGUFReader
    except ImportError:
        hint = "install it: pip install 'minisft[gguf]'"
        raise UserError(f"{path}: reading GGUF needs the library gguf", hint=hint, exit_code=MODEL) from None
    with open_file(path, exit_code=MODEL) as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file", hint="download it again", exit_code=MODEL)
    try:
        reader = GGUFReader(path)
        values = {name: _plain(field.contents()) for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        problem = f"{path} is not a whole GGUF file ({reason})"
        raise UserError(problem, hint="download it again", exit_code=MODEL) from error
    parts = values.get("split.count", 0)
    if parts and parts > 1:
        hint = "join them once with llama.cpp's llama-gguf-split --merge"
        raise UserError(f"{path} is one of {parts} parts of a model", hint=hint, exit_code=MODEL)
    return GgufFile(path, values, tensors)


def dequantized(tensor: "ReaderTensor") -> "np.ndarray":
    """fp32, [out, in]. Raises UserError (exit code MODEL) for a quantisation that the library cannot undo."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    if tensor.tensor_type == GGMLQuantizationType.F32:
        return np.array(tensor.data, dtype=np.float32)
    try:
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError:
        problem = f"{tensor.name} is stored as {tensor.tensor_type.name}, which is not read"
        raise UserError(problem, hint="take the model in another quantisation", exit_code=MODEL) from None


def _plain(value: Any) -> Any:
    """Numbers as Python's; a float with the digits that its 32 bits have, so that 9.9999997e-06 is 1e-05."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    shorter = (float(f"{value:.{digits}g}") for digits in range(6, 10))
    return next((x for x in shorter if struct.pack("f", x) == struct.pack("f", value)), value)
