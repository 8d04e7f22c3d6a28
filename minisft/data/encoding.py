"""From text with spans to tokens with kinds.

A text is encoded once as a whole and every token carries the range of characters it came from; a token belongs to a span
if the two overlap. No mask is ever derived from an id: <|im_end|> is trained where it ends an answer and is context
where it ends a question. Several tokens may share one character (an emoji is four bytes), a token may cover the border
of a span (counted as straddling: part of it was given), and a token may have no characters at all.

Control tokens. The text "<|im_end|>" inside a message would become that token, and a user could end his turn and begin the
assistant's. Such a row is refused ("error"), or the stretch is encoded as ordinary text ("escape"): that is what a
careful server does with its users' input. "allow" lets it become the token.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import tokenizers

from minisft.data.batch import TRAINED
from minisft.data.conversations import RowError, check_messages
from minisft.data.formats import Example, FormatOptions, Piece
from minisft.data.masks import Masking, check_template, render_conversation
from minisft.data.tokenizer import Tokenizer
from minisft.errors import UserError

ESCAPE = 0xF0000  # private-use characters that stand for the control tokens of a row while it is rendered
ESCAPED = re.compile("[\U000f0000-\U000ffffd]")


@dataclass(frozen=True)
class ConversationPieces:
    """A conversation rendered: a piece for each of its documents."""

    pieces: list[Piece]
    ends: list[int]  # the number of messages that each document holds
    strategy: str  # how the turns were found: see masks.py
    has_control_tokens: bool


def conversation_pieces(
    tokenizer: Tokenizer, example: Example, options: FormatOptions, train_on: str
) -> ConversationPieces:
    """A row of messages rendered by the chat template. Raises RowError."""
    messages, found = _without_control_tokens(tokenizer, example.messages, options.control_tokens)
    documents = render_conversation(
        tokenizer.template_for(example.tools),
        messages,
        tools=example.tools,
        documents=example.documents,
        masking=Masking(train_on, options.multi_turn, options.reasoning),
        first_trained=example.first_trained,
        variables=example.variables,
    )
    pieces = [Piece(d.text, d.spans, d.weights) for d in documents]
    if found and options.control_tokens == "escape":
        pieces = [_put_back(piece, found) for piece in pieces]
    return ConversationPieces(pieces, [d.end for d in documents], documents[0].strategy, bool(found))


def _without_control_tokens(tokenizer: Tokenizer, messages: list[dict], policy: str) -> tuple[list[dict], list[str]]:
    """The messages, and the control tokens that are written in them; to be escaped, each is one private character."""
    found: dict[str, int] = {}

    def replaced(match: re.Match) -> str:
        return chr(ESCAPE + found.setdefault(match[0], len(found)))

    def walk(value: Any, where: str) -> Any:
        if isinstance(value, str):
            if ESCAPED.search(value):
                raise RowError("reserved character", f"{where} contains one of U+F0000 to U+FFFFD")
            text = tokenizer.control_tokens.sub(replaced, value)
            if found and policy == "error":
                raise RowError("control token in a message", f"{where} contains {next(iter(found))!r}")
            return text
        if isinstance(value, dict):
            return {key: walk(inner, where) for key, inner in value.items()}
        return [walk(inner, where) for inner in value] if isinstance(value, list) else value

    walked = [
        message if _is_clean(tokenizer, message) else walk(message, f"message {i}")
        for i, message in enumerate(messages)
    ]
    return (walked if policy == "escape" else messages), list(found)


def _is_clean(tokenizer: Tokenizer, message: dict) -> bool:
    """Nearly all messages: a role and a content without control tokens."""
    content = message["content"]
    is_free = content.isascii() or not ESCAPED.search(content)
    return is_free and len(message) == 2 and not tokenizer.control_tokens.search(content)


def _put_back(piece: Piece, tokens: list[str]) -> Piece:
    """The piece with its private characters written out again, and their places as `literal`."""
    places = [0]  # character of the piece -> where it starts in the text
    text, literal = [], []
    for character in piece.text:
        written = tokens[ord(character) - ESCAPE] if ESCAPED.match(character) else character
        if written is not character:
            literal.append((places[-1], places[-1] + len(written)))
        text.append(written)
        places.append(places[-1] + len(written))
    spans = [(places[a], places[b], byte) for a, b, byte in piece.spans]
    weights = [(places[a], places[b], weight) for a, b, weight in piece.weights]
    return Piece("".join(text), spans, weights, literal)


def check_chat_template(tokenizer: Tokenizer) -> None:
    """The start-up check of the tokenizer's template. Raises UserError; see `template.check_template`."""
    specials = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special]
    if "eos_token" in tokenizer.special_tokens:
        specials.append(tokenizer.special_tokens["eos_token"])
    terminators = tuple(sorted(set(specials)))
    for template in filter(None, (tokenizer.template, tokenizer.tool_template)):
        check_template(template, terminators)


@dataclass(slots=True)
class Encoded:
    """A piece as tokens."""

    ids: np.ndarray  # uint32 [n]
    kinds: np.ndarray  # uint8 [n]: kind | TRAINED
    straddling: int  # trained tokens that begin before or end after what is trained
    weights: np.ndarray | None  # float32 [n], None = all 1


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[Encoded]:
    """Encode pieces in one batch on all cores."""
    return with_kinds(tokenizer, pieces, raw_encodings(tokenizer, pieces))


def raw_encodings(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[tokenizers.Encoding]:
    """The part of encode_pieces that is Rust, which releases the interpreter."""
    return tokenizer.backend.encode_batch([piece.text for piece in pieces], add_special_tokens=False)


def with_kinds(
    tokenizer: Tokenizer, pieces: Sequence[Piece], encodings: Sequence[tokenizers.Encoding]
) -> list[Encoded]:
    """The part of encode_pieces that is Python."""
    return [
        _encode_literally(tokenizer, piece) if piece.literal else _encoded(encoding, piece)
        for piece, encoding in zip(pieces, encodings)
    ]


def _encoded(encoding: tokenizers.Encoding, piece: Piece) -> Encoded:
    kinds, straddling = _piece_kinds(encoding, piece)
    weights = _token_weights(encoding.offsets, piece.weights) if piece.weights else None
    return Encoded(np.array(encoding.ids, dtype=np.uint32), kinds, straddling, weights)


def _encode_literally(tokenizer: Tokenizer, piece: Piece) -> Encoded:
    """A piece in which some special tokens are ordinary text: what lies between two real special tokens and holds such a
    stretch is encoded by a tokenizer that knows no special tokens; the rest as usual."""
    literal = set(piece.literal)
    real = [m.span() for m in tokenizer.control_tokens.finditer(piece.text) if m.span() not in literal]
    stretches = []
    for start, end in zip([0, *(end for _, end in real)], [*(start for start, _ in real), len(piece.text)]):
        if any(start <= a and b <= end for a, b in literal):
            stretches.append((start, end))
    ids, offsets, at = [], [], 0
    for start, end in [*stretches, (len(piece.text), len(piece.text))]:
        for backend, a, b in ((tokenizer.backend, at, start), (tokenizer.literal_backend, start, end)):
            encoding = backend.encode(piece.text[a:b], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(x + a, y + a) for x, y in encoding.offsets]
        at = end
    usual = tokenizer.backend.encode(piece.text, add_special_tokens=False).ids
    if tokenizer.decode(ids) != tokenizer.decode(usual):
        raise RowError("control token that cannot be escaped", "this tokenizer encodes a text in parts differently")
    kinds, straddling = token_kinds(offsets, piece.spans)
    weights = _token_weights(offsets, piece.weights) if piece.weights else None
    return Encoded(np.array(ids, dtype=np.uint32), kinds, straddling, weights)


def _token_weights(offsets: list[tuple[int, int]], weights: list[tuple[int, int, float]]) -> np.ndarray:
    values = np.ones(len(offsets), dtype=np.float32)
    for start, end, weight in weights:
        first, last = _tokens_between(offsets, start, end)
        values[first:last] = weight
    return values


def _piece_kinds(encoding: tokenizers.Encoding, piece: Piece) -> tuple[np.ndarray, int]:
    """`token_kinds` of an encoding. Asking Rust for the few borders is ten times as fast as fetching all offsets."""
    tokens = {0: 0, len(piece.text): len(encoding)}  # character -> the token that starts there
    for border in {border for start, end, _ in piece.spans for border in (start, end)} - tokens.keys():
        token = encoding.char_to_token(border)
        if token is None or encoding.token_to_chars(token)[0] != border:  # no token starts exactly there
            return token_kinds(encoding.offsets, piece.spans)
        tokens[border] = token
    kinds = np.zeros(len(encoding), dtype=np.uint8)
    for start, end, byte in piece.spans:
        kinds[tokens[start] : tokens[end]] = byte
    return kinds, 0


def token_kinds(offsets: list[tuple[int, int]], spans: list[tuple[int, int, int]]) -> tuple[np.ndarray, int]:
    """What each token is: offsets (char start, end) of n tokens -> (kinds uint8 [n], tokens over a trained border)."""
    kinds = np.zeros(len(offsets), dtype=np.uint8)
    straddling = 0
    for start, end, byte in spans:
        first, last = _tokens_between(offsets, start, end)
        kinds[first:last] = byte
        if byte & TRAINED and first < last:
            straddling += (offsets[first][0] < start) + (offsets[last - 1][1] > end)
    return kinds, straddling


def _tokens_between(offsets: list[tuple[int, int]], start: int, end: int) -> tuple[int, int]:
    first = bisect_right(offsets, start, key=itemgetter(1))  # the first token that ends after the span starts
    return first, bisect_left(offsets, end, key=itemgetter(0))  # the first that starts at the span's end or later


def tokenize_conversation(
    tokenizer: Tokenizer, messages: list[dict], *, tools: list[dict] | None = None, train_on: str = "assistant"
) -> tuple[np.ndarray, np.ndarray]:
    """(ids uint32 [n], kinds uint8 [n]: kind | TRAINED) of one conversation.

    train_on: "assistant" = every assistant turn, "last" = the last one, "all" = everything. Raises UserError where the
    messages are malformed or the turns cannot be found exactly.
    """
    if train_on not in ("assistant", "last", "all"):
        raise UserError(f"train_on = {train_on!r}", hint="one of assistant, last, all")
    check_chat_template(tokenizer)
    try:
        example = Example(messages=check_messages(messages, "messages"), tools=tools)
        pieces = conversation_pieces(tokenizer, example, FormatOptions(multi_turn="joint"), train_on).pieces
        encoded = encode_pieces(tokenizer, pieces)[0]
    except RowError as error:
        raise UserError(str(error)) from None
    return encoded.ids, encoded.kinds
