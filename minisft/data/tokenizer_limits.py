"""What a tokenizer, which is somebody's program too, may take: memory, time, and how it fails.

The library does its work in Rust and out of Python's reach: nothing here can interrupt it or limit its memory. So

- what is known to run for ever, or to make a large text of a small one, is refused when the tokenizer is loaded;
- a text is refused before it is encoded, if it is too long or could become so;
- a batch that computes for too long ends the run (tokenise.py), though its threads go on until the process ends;
- a panic of the library, which is not even an Exception in Python, becomes a RowError or a UserError.

A hostile regular expression can still cost the minutes of that limit, and a tokenizer that hangs while it is loaded is not
noticed: to be safe from that, run in a container with limits.
"""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import models

from minisft.data.rows import RowError, excerpt
from minisft.errors import MODEL, UserError

MAX_TEXT = (
    2**22
)  # characters of a text that is encoded at once, before and after its normalisation; each takes some 200 bytes
MAX_DECODED = 64  # characters that a decoder may make of one
MAX_WORD = 1000  # characters of a word of a WordPiece model, whose time is the square of that
# The most characters that a step makes of one. Replace, Prepend and Precompiled depend on what is in them.
GROWTH = {"NFC": 4, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 3, "BertNormalizer": 12, "ByteLevel": 4}
FAILS = "the tokenizer fails on a text"


def is_failure(error: BaseException) -> bool:
    """Whether it is an error of the library: an Exception, or a panic, which PyO3 derives from BaseException."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def call(function: Callable, *arguments: Any, what: str, **options: Any) -> Any:
    """What a function of the library returns. Raises UserError (exit code MODEL), which begins with `what`, if it fails."""
    try:
        return function(*arguments, **options)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise UserError(f"{what}: {reason_of(error)}", exit_code=MODEL) from None


def reason_of(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def encode_each(backend: tokenizers.Tokenizer, texts: Sequence[str], most: int) -> list[tokenizers.Encoding | RowError]:
    """The encodings of many texts, without special tokens, on all cores; a RowError in place of one that cannot be encoded.

    most: the `growth` of its normalizer.
    """
    refused = {n: error for n, text in enumerate(texts) if (error := _too_long(backend, text, most))}
    fine = [text for n, text in enumerate(texts) if n not in refused]
    try:
        encoded = iter(backend.encode_batch(fine, add_special_tokens=False))
    except BaseException as error:
        if not is_failure(error):
            raise
        encoded = (_encode(backend, text) for text in fine)  # one after the other, to find out which
    return [refused[n] if n in refused else next(encoded) for n in range(len(texts))]


def encode_one(backend: tokenizers.Tokenizer, text: str, most: int) -> tokenizers.Encoding:
    """The encoding of a text, without special tokens. most: as in encode_each. Raises RowError."""
    encoding = _too_long(backend, text, most) or _encode(backend, text)
    if isinstance(encoding, RowError):
        raise encoding
    return encoding


def _encode(backend: tokenizers.Tokenizer, text: str) -> tokenizers.Encoding | RowError:
    try:
        return backend.encode(text, add_special_tokens=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        return RowError(FAILS, f"{reason_of(error)}; it begins {excerpt(text)}")


def _too_long(backend: tokenizers.Tokenizer, text: str, most: int) -> RowError | None:
    """The error of a text that is too long, or would be after its normalisation; None for any other."""
    size = len(text)
    if size <= MAX_TEXT < size * most:  # it could be: measure it in parts that cannot
        step, size = MAX_TEXT // most, 0
        for i in range(0, len(text), step):
            size += len(backend.normalizer.normalize_str(text[i : i + step]))
            if size > MAX_TEXT:
                break
    if size <= MAX_TEXT:
        return None
    grows = ", of which the normalizer makes more" if len(text) <= MAX_TEXT else ""
    return RowError("too long a text", f"{len(text):,} characters{grows}; at most {MAX_TEXT:,} are encoded at once")


def check_backend(backend: tokenizers.Tokenizer, where: str) -> None:
    """Raises UserError (exit code MODEL) for a tokenizer that is known to take too much."""

    def require(holds: bool, problem: str) -> None:
        if not holds:
            raise UserError(f"{where}/tokenizer.json: {problem}", hint="use another tokenizer", exit_code=MODEL)

    for name, part, most in (("normalizer", backend.normalizer, MAX_TEXT), ("decoder", backend.decoder, MAX_DECODED)):
        steps = list(_steps(part))
        is_endless = any(step["type"] == "Replace" and step["pattern"].get("String") == "" for step in steps)
        require(not is_endless, f"its {name} replaces the empty text, which never ends")
        require(growth(part) <= most, f"its {name} makes more than {most:,} characters of one")
    word = backend.model.max_input_chars_per_word if isinstance(backend.model, models.WordPiece) else 0
    require(word <= MAX_WORD, f"its words have up to {word:,} characters, at most {MAX_WORD:,} are read")
    require(backend.get_vocab_size(with_added_tokens=True) > 0, "it has no tokens")


def growth(part: Any) -> int:
    """The most characters that a normalizer or a decoder makes of one; not less than 1."""
    most = 1
    for step in _steps(part):
        kind = step["type"]
        if kind == "Replace":
            pattern = step["pattern"].get("String")
            most *= 2 * len(step["content"]) + 1 if pattern is None else -(-len(step["content"]) // len(pattern)) or 1
        elif kind == "Prepend":
            most *= len(step["prepend"]) + 1
        elif kind == "Precompiled":  # SentencePiece's: the size of a trie, the trie, and texts with zeros between them
            blob = base64.b64decode(step["precompiled_charsmap"])
            texts = blob[4 + int.from_bytes(blob[:4], "little") :]
            most *= max(map(len, texts.split(b"\0"))) or 1
        else:
            most *= GROWTH.get(kind, 1)
    return most


def _steps(part: Any) -> Iterator[dict]:
    """The steps of a normalizer or a decoder, as tokenizer.json has them."""
    waiting = [] if part is None else [json.loads(part.__getstate__())]
    while waiting:
        step = waiting.pop()
        inner = step.get("normalizers", step.get("decoders"))
        if inner is None:
            yield step
        else:
            waiting += inner
