"""Files that are hashed once and then held to their hash, so that what is tokenised is what a token cache is named by.

The name of a cache has the hash of every data file, and its build reads them again: twice for a slice in per cent, which counts
rows first, and in any order for Parquet. Between two looks another process may write the file, and even put it back. So a
file is hashed in blocks, and each block that is read later is compared with its own hash before a byte of it is used.
Memory holds one block, and 32 bytes for each block of the file.
"""

import io
import os
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from minisft.errors import DATA, UserError

BLOCK = 2**20  # bytes
DIGEST = 32  # bytes of a sha256


def hash_blocks(path: Path | str) -> bytes:
    """The sha256 of every BLOCK bytes of a file, end to end. Raises UserError (exit code DATA) where it cannot be read."""
    digests, block = bytearray(), memoryview(bytearray(BLOCK))
    try:
        with open(path, "rb") as file:
            while count := file.readinto(block):
                digests += sha256(block[:count]).digest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", hint="see to the disk", exit_code=DATA) from None
    return bytes(digests)


def open_file(path: Path | str, digests: bytes | None = None) -> BinaryIO:
    """The file for reading. With digests (what hash_blocks returned) the read of a block that has changed raises UserError."""
    return open(path, "rb") if digests is None else io.BufferedReader(_HashedFile(path, digests), BLOCK)


class _HashedFile(io.RawIOBase):
    def __init__(self, path: Path | str, digests: bytes):
        self.path, self.digests = path, digests
        self.file = open(path, "rb")
        self.position, self.number, self.block = 0, -1, b""  # the block that is held, and which one it is

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self.position, os.fstat(self.file.fileno()).st_size)[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        number, first = divmod(self.position, BLOCK)
        if number != self.number:
            self.number, self.block = number, self._read_block(number)
        part = self.block[first : first + len(buffer)]
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)

    def _read_block(self, number: int) -> bytes:
        self.file.seek(number * BLOCK)
        block = self.file.read(BLOCK)
        expected = self.digests[number * DIGEST : (number + 1) * DIGEST]  # nothing beyond the end
        if (sha256(block).digest() if block else b"") != expected:
            hint = "start again once it is written; nothing of it was kept"
            raise UserError(f"{self.path}: changed while it was being read", hint=hint, exit_code=DATA)
        return block

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()
