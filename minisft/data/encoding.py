"""From text with spans to tokens with kinds.

A text is encoded once as a whole, and every token has the range of characters it came from; a token belongs to a span if
the two overlap. No mask is ever derived from an id: <|im_end|> is trained where it ends an answer and is context where it
ends a question. Several tokens may share one character (an emoji is four bytes), a token may cover the border of a span
(counted as straddling: a part of it belongs to the prompt), and a token may have no characters at all.

Control tokens. The text "<|im_end|>" inside a message would become that token, so that a user could end his turn and begin
the assistant's. With "error" such a row is refused; with "escape" the text of the token is encoded as ordinary text, as a
careful server does with its users' input; with "allow" it becomes the token. These rows are counted.

Outside of templates, instructions and questions are treated in the same way. Prompts, completions and plain text that are
used as they are contain special tokens on purpose: such rows are neither refused nor counted. "escape" applies to prompts
and completions too, and counts those rows.
"""

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import tokenizers

from minisft.data.chat.conversations import check_messages
from minisft.data.chat.dialogue import Masking, Rendered
from minisft.data.chat.inference import described_switch
from minisft.data.chat.masks import render_conversation
from minisft.data.chat.template_check import check_template
from minisft.data.formats import Example, Piece
from minisft.data.kinds import TRAINED
from minisft.data.row_format import FormatOptions, RowFormat
from minisft.data.rows import RowError
from minisft.data.tokenizer import Tokenizer
from minisft.data.tokenizer_limits import encode_each, encode_one
from minisft.errors import UserError

ESCAPES = range(0xF0000, 0xFFFFE)  # private-use characters in place of a row's control tokens while it is rendered


@dataclass(frozen=True)
class ConversationPieces:
    """A conversation rendered: a piece for each of its documents."""

    pieces: list[Piece]
    ends: list[int]  # the number of messages that each document holds
    strategy: str  # how the turns were found: see chat/masks.py
    has_control_tokens: bool
    has_untrained_greeting: bool = False  # it begins with the assistant, and this turn is context
    prompts: frozenset[str] = frozenset()  # how answers got another prompt than the default (chat/inference.py)
    lost_reasoning: bool = False  # the template does not render the reasoning of an answer


def conversation_pieces(
    tokenizer: Tokenizer, example: Example, options: FormatOptions, train_on: str
) -> ConversationPieces:
    """A row of messages rendered by the chat template. Raises RowError."""

    def rendered(row: Example) -> list[Rendered]:
        assert row.messages is not None
        return render_conversation(
            tokenizer.template_for(example.tools),
            row.messages,
            tools=row.tools,
            documents=row.documents,
            masking=Masking(train_on, options.multi_turn, options.reasoning),
            first_trained=row.first_trained,
            variables=row.variables,
        )

    documents, pieces, has_control_tokens = _rendered(tokenizer, example, options.control_tokens, rendered)
    first, ends = documents[0], [d.end for d in documents]
    prompts = frozenset().union(*(d.prompts for d in documents))
    greeting, lost = first.has_untrained_greeting, any(d.lost_reasoning for d in documents)
    return ConversationPieces(pieces, ends, first.strategy, has_control_tokens, greeting, prompts, lost)


def _rendered(
    tokenizer: Tokenizer, example: Example, control_tokens: str, render: Callable[[Example], list[Rendered]]
) -> tuple[list[Rendered], list[Piece], bool]:
    """(what `render` makes of a row of messages, its pieces, whether the row has control tokens). Raises RowError."""
    found = _control_tokens(tokenizer, example)
    if found and control_tokens == "error":
        raise _control_token(*next(iter(found.items())))
    if not found or control_tokens == "allow":
        documents = render(example)
        return documents, [Piece(d.text, d.spans, d.weights) for d in documents], bool(found)
    tokens = _escapes(example, list(found), tokenizer.template_for(example.tools).text)
    documents = render(_escaped(tokenizer, example, {token: character for character, token in tokens.items()}))
    pieces = [_put_back(Piece(d.text, d.spans, d.weights), tokens) for d in documents]
    if [piece.text for piece in pieces] != [d.text for d in render(example)]:
        raise RowError("control token that cannot be escaped", "the chat template does not render it as it is")
    return documents, pieces, True


def prompt_variables(tokenizer: Tokenizer, example: Example, options: FormatOptions) -> dict[str, bool]:
    """The switch of the template with which the prompt of a conversation is the one that its last answer continues; {} for the
    default prompt, and where the conversation cannot be trained."""
    try:
        return described_switch(conversation_pieces(tokenizer, example, options, "last").prompts)
    except RowError:
        return {}


def encode_prompt(
    tokenizer: Tokenizer, prompt: Example, *, layout: str, control_tokens: str, add_special_tokens: bool = True
) -> tuple[str, list[int]]:
    """(text, ids) of a prompt, exactly as in training. Raises RowError.

    prompt: the one piece before the answer, or the messages before it, with `prompt_variables` among its variables. layout: as
    in RowFormat.prompt. control_tokens, add_special_tokens: as in FormatOptions.
    """

    def rendered(row: Example) -> list[Rendered]:
        assert row.messages is not None
        given = {"tools": row.tools, "documents": row.documents, **(row.variables or {})}
        return [Rendered(tokenizer.apply_chat_template(row.messages, add_generation_prompt=True, **given), [])]

    if prompt.messages:
        (piece,), add_special_tokens = _rendered(tokenizer, prompt, control_tokens, rendered)[1], False
    else:
        (piece,), _ = _pieces_of_text(tokenizer, prompt.pieces, layout, control_tokens)
    before, ids = tokenizer.prefix_ids if add_special_tokens else [], encode_pieces(tokenizer, [piece])[0].ids.tolist()
    return piece.text, ids if ids[: len(before)] == before else before + ids  # unless the prompt brings its own


def text_pieces(
    tokenizer: Tokenizer, example: Example, row_format: RowFormat, options: FormatOptions
) -> tuple[tuple[Piece, ...], bool]:
    """The pieces of a row that no template renders, and whether it counts as a row with control tokens. Raises RowError."""
    control_tokens = "allow" if row_format.name == "text" else options.control_tokens
    pieces, has_control_tokens = _pieces_of_text(tokenizer, example.pieces, row_format.prompt, control_tokens)
    return _continued(tokenizer, pieces), has_control_tokens


def _pieces_of_text(
    tokenizer: Tokenizer, pieces: tuple[Piece, ...], layout: str, control_tokens: str
) -> tuple[tuple[Piece, ...], bool]:
    found = [list(tokenizer.control_tokens.finditer(piece.text)) for piece in pieces]
    if not any(found):
        return pieces, False
    if control_tokens == "error" and layout == "instruction":
        raise _control_token(next(chain(*found))[0], "the row")
    if control_tokens != "escape":
        return pieces, layout == "instruction"
    escaped = [replace(piece, literal=[m.span() for m in matches]) for piece, matches in zip(pieces, found)]
    return tuple(escaped), True


def _continued(tokenizer: Tokenizer, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces, cut so that each is either the start of a text to the tokenizer or continues one.

    Only for tokenizers that put a space before a text: an answer continues its prompt, so that their tokens read as the two
    strings do. After a special token the tokenizer's own rule applies.
    """
    if len(pieces) < 2 or not tokenizer.has_prefix_space:
        return pieces
    cut = [pieces[0]]
    for before, piece in pairwise(pieces):
        if tokenizer.has_space_after_special and any(end == len(before.text) for _, end in _tokens(tokenizer, before)):
            cut.append(piece)
            continue
        first = next(_tokens(tokenizer, piece), (len(piece.text), 0))[0]
        cut.append(replace(_part(piece, 0, first), continues=True))
        if first < len(piece.text):
            cut.append(_part(piece, first, len(piece.text)))
    return tuple(cut)


def _tokens(tokenizer: Tokenizer, piece: Piece) -> Iterator[tuple[int, int]]:
    """The places of added tokens in a piece, without those that are ordinary text."""
    places = (match.span() for match in tokenizer.added_tokens.finditer(piece.text))
    return ((a, b) for a, b in places if not any(start < b and a < end for start, end in piece.literal))


def _part(piece: Piece, start: int, end: int) -> Piece:
    """The characters start : end of a piece."""

    def inside(spans: list) -> list:
        moved = [(max(a, start) - start, min(b, end) - start, *rest) for a, b, *rest in spans]
        return [span for span in moved if span[0] < span[1]]

    return Piece(piece.text[start:end], inside(piece.spans), inside(piece.weights), inside(piece.literal))


def _control_token(token: str, where: str) -> RowError:
    return RowError("control token in a message", f"{where} contains {token!r} (see control_tokens)")


def _control_tokens(tokenizer: Tokenizer, example: Example) -> dict[str, str]:
    """{control token in a row of messages: the place where it occurs first}."""
    assert example.messages is not None
    found: dict[str, str] = {}

    def walk(value: Any, where: str) -> None:
        if isinstance(value, str):
            for match in tokenizer.control_tokens.finditer(value):
                found.setdefault(match[0], where)
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(key, where)
                walk(inner, where)
        elif isinstance(value, list):
            for inner in value:
                walk(inner, where)

    for i, message in enumerate(example.messages):
        if not _is_clean(tokenizer, message):
            walk(message, f"message {i}")
    walk(example.tools, "tools")
    walk(example.documents, "documents")
    return found


def _escapes(example: Example, tokens: list[str], template: str) -> dict[str, str]:
    """{a private-use character that is neither in the row nor in the template: the token in whose place it is rendered}."""
    given = [example.messages, example.tools, example.documents, example.variables, template]
    taken = set(json.dumps(given, ensure_ascii=False))
    escapes = dict(zip((chr(c) for c in ESCAPES if chr(c) not in taken), tokens))
    if len(escapes) < len(tokens):
        raise RowError("control token that cannot be escaped", "no private-use character is left to take its place")
    return escapes


def _escaped(tokenizer: Tokenizer, example: Example, characters: dict[str, str]) -> Example:
    """The row with a private-use character for each control token. characters: {token: its character}."""
    assert example.messages is not None

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return tokenizer.control_tokens.sub(lambda match: characters[match[0]], value)
        if isinstance(value, dict):
            return {walk(key): walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, list) else value

    def escaped(message: dict) -> dict:
        if _is_clean(tokenizer, message):
            return message
        walked = walk(message)
        if "part_spans" in message:  # these are places in the content, which became shorter
            tokens = [match.span() for match in tokenizer.control_tokens.finditer(message["content"])]
            walked["part_spans"] = [(_moved(a, tokens), _moved(b, tokens), on) for a, b, on in message["part_spans"]]
        return walked

    messages = [escaped(message) for message in example.messages]
    return replace(example, messages=messages, tools=walk(example.tools), documents=walk(example.documents))


def _moved(at: int, tokens: list[tuple[int, int]]) -> int:
    """Where a place of a text is after each of its control tokens has become one character."""
    if any(a < at < b for a, b in tokens):
        raise RowError("control token in a message", "it is in two parts of a content")
    return at - sum(b - a - 1 for a, b in tokens if b <= at)


def _is_clean(tokenizer: Tokenizer, message: dict) -> bool:
    """Whether a message is only a role and a content without control tokens, as nearly all are."""
    return len(message) == 2 and not tokenizer.control_tokens.search(message["content"])


def _put_back(piece: Piece, tokens: dict[str, str]) -> Piece:
    """The piece with control tokens again in place of their characters, and the tokens' places in `literal`."""
    places = [0]  # character of the piece -> its place in the new text
    text, literal = [], []
    for character in piece.text:
        written = tokens.get(character, character)
        if character in tokens:
            literal.append((places[-1], places[-1] + len(written)))
        text.append(written)
        places.append(places[-1] + len(written))
    spans = [(places[a], places[b], byte) for a, b, byte in piece.spans]
    weights = [(places[a], places[b], weight) for a, b, weight in piece.weights]
    return Piece("".join(text), spans, weights, literal)


def check_chat_template(tokenizer: Tokenizer) -> None:
    """The start-up check of the tokenizer's template. Raises UserError; see chat/template_check.py."""
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
    straddling: int  # trained tokens that begin before or end after the trained text
    weights: np.ndarray | None  # float32 [n], None = all 1


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[Encoded]:
    """Encode pieces in one batch on all cores. Raises RowError if one fails, or a control token cannot be escaped."""
    return [with_kinds(tokenizer, *both) for both in zip(pieces, raw_encodings(tokenizer, pieces))]


def raw_encodings(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[tokenizers.Encoding | RowError]:
    """The part of encode_pieces that is Rust, which releases the interpreter."""
    if not any(piece.continues for piece in pieces):
        return encode_each(tokenizer.backend, [piece.text for piece in pieces], tokenizer.growth)
    encodings = {}
    for continues, backend in ((False, tokenizer.backend), (True, tokenizer.continuing_backend)):
        numbers = [n for n, piece in enumerate(pieces) if piece.continues == continues]
        texts = [pieces[n].text for n in numbers]
        encodings |= zip(numbers, encode_each(backend, texts, tokenizer.growth))
    return [encodings[n] for n in range(len(pieces))]


def with_kinds(tokenizer: Tokenizer, piece: Piece, encoding: tokenizers.Encoding | RowError) -> Encoded:
    """The part of encode_pieces that is Python, for one piece."""
    if isinstance(encoding, RowError):
        raise encoding
    if piece.literal:
        ids, offsets = _encode_literally(tokenizer, piece, encoding)
        kinds, straddling = token_kinds(offsets, piece.spans)
    else:
        ids, offsets = encoding.ids, encoding.offsets if piece.weights else []
        kinds, straddling = _piece_kinds(encoding, piece)
    weights = _token_weights(offsets, piece.weights) if piece.weights else None
    return Encoded(np.array(ids, dtype=np.uint32), kinds, straddling, weights)


def _encode_literally(
    tokenizer: Tokenizer, piece: Piece, encoding: tokenizers.Encoding
) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids, offsets) of a piece in which the text of some special tokens is ordinary text.

    A stretch between two real special tokens that contains such text is encoded by a tokenizer without special tokens; the
    other stretches keep their usual encoding. After a special token that tokenizer must treat a text as the usual one does.
    """
    covered = np.zeros(len(piece.text) + 1, dtype=np.int64)  # characters before each place that are ordinary text
    for a, b in piece.literal:
        covered[a + 1 : b + 1] = 1
    covered = np.cumsum(covered).tolist()
    real = [  # places of the real special tokens in the usual encoding, and its end
        k
        for k, (i, (start, end)) in enumerate(zip(encoding.ids, encoding.offsets))
        if i in tokenizer.special_ids and covered[start] == covered[end]
    ] + [len(encoding)]
    usual_ids, usual_offsets = encoding.ids, [*encoding.offsets, (len(piece.text), len(piece.text))]
    ids, offsets, at, start = [], [], 0, 0  # at: token, start: character, both after the last real special token
    for k in real:
        end = usual_offsets[k][0]
        first = bisect_left(piece.literal, start, key=itemgetter(0))
        last = bisect_right(piece.literal, end, key=itemgetter(1))
        written = Counter(piece.text[a:b] for a, b in piece.literal[first:last])
        if written:
            continues = not tokenizer.has_space_after_special if start else piece.continues
            backend = tokenizer.continuing_literal_backend if continues else tokenizer.literal_backend
            literal = encode_one(backend, piece.text[start:end], tokenizer.growth)
            decoded = tokenizer.decode(literal.ids)
            if any(decoded.count(token) < number for token, number in written.items()):
                what = f"the tokenizer has no other way to write {list(written)}"
                raise RowError("control token that cannot be escaped", what)
            ids += literal.ids
            offsets += [(a + start, b + start) for a, b in literal.offsets]
            at = k
        ids += usual_ids[at : k + 1]
        offsets += usual_offsets[at : min(k + 1, len(encoding))]
        at, start = k + 1, usual_offsets[k][1]
    return ids, offsets


def _token_weights(offsets: list[tuple[int, int]], weights: list[tuple[int, int, float]]) -> np.ndarray:
    values = np.ones(len(offsets), dtype=np.float32)
    for start, end, weight in weights:
        first, last = _tokens_between(offsets, start, end)
        values[first:last] = weight
    return values


def _piece_kinds(encoding: tokenizers.Encoding, piece: Piece) -> tuple[np.ndarray, int]:
    """`token_kinds` of an encoding. Fetching only the borders of spans from Rust is ten times as fast as all offsets."""
    tokens = {0: 0, len(piece.text): len(encoding)}  # character -> the token that starts there
    for border in {border for start, end, _ in piece.spans for border in (start, end)} - tokens.keys():
        token = encoding.char_to_token(border)
        characters = None if token is None else encoding.token_to_chars(token)
        if token is None or characters is None or characters[0] != border:  # no token starts exactly there
            return token_kinds(encoding.offsets, piece.spans)
        tokens[border] = token
    kinds = np.zeros(len(encoding), dtype=np.uint8)
    for start, end, byte in piece.spans:
        kinds[tokens[start] : tokens[end]] = byte
    return kinds, 0


def token_kinds(offsets: list[tuple[int, int]], spans: list[tuple[int, int, int]]) -> tuple[np.ndarray, int]:
    """(kinds uint8 [n], straddling tokens) of n tokens with these offsets (char start, char end)."""
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

    train_on: "assistant" = every assistant turn, "last" = the last one, "all" = everything. Raises UserError if the messages
    are malformed or the turns cannot be found exactly.
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
