"""A tokenizer without transformers: the Rust library, the few files around it, and masks by character offsets.

`tokenizer.json` is all that encoding needs. Around it lie tokenizer_config.json (which tokens are BOS, EOS, padding;
the chat template) and chat_template.jinja. Truncation and padding saved inside tokenizer.json apply silently to every
encoding (34 ids became 8), so they are switched off. Special tokens are never added by the library: a rendered template
holds its own, and for other text `prefix_ids` and `suffix_ids` are put around the whole document once, so BOS cannot
be doubled. We do not patch the wrong pre-tokenizer of some early Mistral files as transformers 5 does.

Masks. A text is encoded once as a whole and every token carries the range of characters it came from; a token
belongs to a span if the two overlap. No mask is ever derived from an id: <|im_end|> is trained where it ends an answer
and is context where it ends a question. Several tokens may share one character (an emoji is four bytes), a token may
cover the border of a span (counted as straddling: part of it was given), and a token may have no characters at all.

train_tokenizer learns a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2): every text round-trips, nothing is
unknown.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from minisft.data.batch import TRAINED
from minisft.data.formats import Piece, RowError, check_messages
from minisft.data.template import CHATML, ChatTemplate, check_template, render, render_with_spans, terminator
from minisft.errors import MODEL, UserError
from minisft.files import dump_json, parse_json
from minisft.hub import resolve

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """Made by `load_tokenizer` or `train_tokenizer`."""

    backend: tokenizers.Tokenizer
    files: dict[str, bytes]  # what `save` writes
    special_tokens: dict[str, str]  # "eos_token" -> its text, those that are set
    template: ChatTemplate | None = None
    tool_template: ChatTemplate | None = None  # some tokenizers have one of its own for rows with tools
    prefix_ids: list[int] = field(default_factory=list)  # what the tokenizer puts before a text, usually BOS
    suffix_ids: list[int] = field(default_factory=list)  # and after it

    def _id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Never read by training, which has no padding; EOS where the tokenizer names none."""
        return self._id("eos_token") if self._id("pad_token") is None else self._id("pad_token")

    @cached_property
    def stop_ids(self) -> set[int]:
        """The tokens that end an answer: EOS, and what the chat template puts after one, which may be another token."""
        ids = {self.eos_token_id}
        if self.template is not None:
            ids.add(self.backend.token_to_id(terminator(self.template)))
        return ids - {None}

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1: the model's embedding has at least this many rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def control_tokens(self) -> re.Pattern:
        """Matches the text of any special token."""
        texts = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text; add_special_tokens puts `prefix_ids` before and `suffix_ids` after it."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return self.prefix_ids + ids + self.suffix_ids if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, without special tokens, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text, byte-equal to transformers. Encode it without special tokens.

        Raises UserError where there is no template or it refuses the conversation.
        """
        try:
            return render(
                self.template_for(tools),
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except RowError as error:
            raise UserError(str(error)) from None

    def template_for(self, tools: list[dict] | None) -> ChatTemplate:
        if self.template is None:
            raise UserError(
                "the tokenizer has no chat template", hint='set chat_template = "chatml", or to a file', exit_code=MODEL
            )
        return self.tool_template if tools and self.tool_template else self.template

    def fingerprint(self) -> str:
        """Changes whenever a file, a token, the template or its date does."""
        parts = {name: sha256(data).hexdigest() for name, data in self.files.items()}
        templates = [vars(t) for t in (self.template, self.tool_template) if t]
        return sha256(json.dumps([parts, templates, self.special_tokens], sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write the files into a folder (made where absent) that this module and transformers load."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (Path(folder) / name).write_bytes(data)


# ------------------------------------------------------------------------------------------------- loading


def load_tokenizer(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    template_date: str | None = None,
) -> Tokenizer:
    """A tokenizer from a local folder or a hub repository.

    chat_template: None = the tokenizer's own; "chatml" = ours; the path of a .jinja file; or the template itself.
    template_date: the ISO date that a template's strftime_now sees; today where None.
    Raises UserError where a file is missing, broken or contradicts another.
    """
    folder, _ = resolve(path_or_repo, revision, "tokenizer")
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if "tokenizer.json" not in files:
        raise UserError(
            f"{folder} has no tokenizer.json",
            hint="convert it once: transformers.AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
            exit_code=MODEL,
        )
    try:
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    except Exception as error:  # the Rust library raises a bare Exception
        raise UserError(f"{folder}/tokenizer.json: {error}", exit_code=MODEL) from None
    try:
        return _assemble(backend, files, chat_template, template_date, str(folder))
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: malformed tokenizer files ({error!r})", exit_code=MODEL) from None


def _assemble(
    backend: tokenizers.Tokenizer,
    files: dict[str, bytes],
    chat_template: str | None,
    template_date: str | None,
    where: str,
) -> Tokenizer:
    backend.no_truncation()
    backend.no_padding()

    def table(name: str) -> dict:
        value = parse_json(files[name], f"{where}/{name}", exit_code=MODEL) if name in files else {}
        if not isinstance(value, dict):
            raise UserError(f"{where}/{name}: not a JSON object", exit_code=MODEL)
        return value

    config = table("tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # files older than that map
        config = {**table("special_tokens_map.json"), **config}
    _add_tokens(backend, config, table("added_tokens.json"), where)
    special_tokens = {name: _text(config[name]) for name in NAMES if config.get(name)}
    if isinstance(config.get("extra_special_tokens"), dict):  # names of the model's own, which templates may use
        special_tokens |= {name: _text(token) for name, token in config["extra_special_tokens"].items()}
    for name in ("bos_token", "eos_token"):
        if name in special_tokens and backend.token_to_id(special_tokens[name]) is None:
            raise UserError(
                f"{where}: {name} {special_tokens[name]!r} is not in the vocabulary",
                hint="add it to tokenizer.json, or name another in tokenizer_config.json",
                exit_code=MODEL,
            )
    templates = _templates(config, files, chat_template, where)
    if chat_template is not None:
        files = {**files, "chat_template.jinja": templates["default"].encode("utf-8")}

    def template(name: str) -> ChatTemplate | None:
        if name not in templates:
            return None
        day = (template_date or date.today().isoformat()) if "strftime_now" in templates[name] else ""
        return ChatTemplate(templates[name], tuple(special_tokens.items()), day)

    bare, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    at = next((i for i in range(len(full)) if bare and full[i : i + len(bare)] == bare), len(full))
    return Tokenizer(
        backend,
        files,
        special_tokens,
        template=template("default"),
        tool_template=template("tool_use"),
        prefix_ids=full[:at],
        suffix_ids=full[at + len(bare) :],
    )


def _add_tokens(backend: tokenizers.Tokenizer, config: dict, added_tokens: dict, where: str) -> None:
    """Add what tokenizer_config.json (or the older added_tokens.json) lists and tokenizer.json lacks."""
    listed = {}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        flags = {
            name: bool(entry[name])
            for name in ("lstrip", "rstrip", "normalized", "single_word", "special")
            if name in entry
        }
        listed[int(key)] = AddedToken(entry["content"], **flags)
    if not listed:
        listed = {int(number): AddedToken(text, normalized=False) for text, number in added_tokens.items()}
    for number, token in sorted(listed.items(), key=itemgetter(0)):
        if backend.token_to_id(token.content) is None:
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        if backend.token_to_id(token.content) != number:
            raise UserError(
                f"{where}: token {token.content!r} has id {backend.token_to_id(token.content)} in tokenizer.json "
                f"and {number} beside it",
                exit_code=MODEL,
            )


def _templates(config: dict, files: dict[str, bytes], chosen: str | None, where: str) -> dict[str, str]:
    """Name -> text: "default" and perhaps "tool_use"."""
    if chosen == "chatml":
        return {"default": CHATML}
    if chosen is not None:
        if "{{" in chosen or "{%" in chosen:
            return {"default": chosen}
        try:
            return {"default": Path(chosen).read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            hint = 'give "chatml", the path of a .jinja file, or the template itself'
            raise UserError(f"chat_template = {chosen!r}: {error}", hint=hint) from None
    own = config.get("chat_template")
    templates = {"default": own} if isinstance(own, str) else {}
    if isinstance(own, list):
        templates = {entry["name"]: entry["template"] for entry in own}
    if "chat_template.jinja" in files:
        templates["default"] = files["chat_template.jinja"].decode("utf-8")
    return templates


def _text(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


# ------------------------------------------------------------------------------------------------- training one


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    eos_token: str = "<|im_end|>",
    pad_token: str = "<|endoftext|>",
    chat_template: str | None = "chatml",
) -> Tokenizer:
    """Learn a byte-level BPE from texts. The same texts give the same tokenizer.

    vocab_size counts the 256 bytes and the special tokens. chat_template as in `load_tokenizer`, None = none.
    """
    for name in (eos_token, pad_token):
        if name not in special_tokens:
            raise UserError(f"{name!r} is not among the special tokens {list(special_tokens)}")
    if vocab_size < 256 + len(special_tokens):
        raise UserError(f"vocab_size = {vocab_size}: 256 bytes and {len(special_tokens)} special tokens need more")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": pad_token,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": backend.to_str(pretty=True).encode("utf-8"), "tokenizer_config.json": dump_json(config)}
    return _assemble(backend, files, chat_template, None, "the new tokenizer")


# ------------------------------------------------------------------------------------------------- masks


def conversation_piece(
    tokenizer: Tokenizer,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    train_on: str = "assistant",
    first_trained: int = 0,
) -> Piece:
    """A conversation rendered by the chat template, with its spans. Raises RowError.

    The text of a special token inside a message would become that token, and a user could end his turn and begin the
    assistant's; such a message is refused.
    """
    for i, message in enumerate(messages):
        found = tokenizer.control_tokens.search(message["content"])
        if found:
            raise RowError("control token in a message", f"message {i} contains {found[0]!r}")
    template = tokenizer.template_for(tools)
    text, spans = render_with_spans(template, messages, tools=tools, train_on=train_on, first_trained=first_trained)
    return Piece(text, spans)


def check_chat_template(tokenizer: Tokenizer) -> None:
    """The start-up check of the tokenizer's template. Raises UserError; see `template.check_template`."""
    specials = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special]
    if "eos_token" in tokenizer.special_tokens:
        specials.append(tokenizer.special_tokens["eos_token"])
    terminators = tuple(sorted(set(specials)))
    for template in filter(None, (tokenizer.template, tokenizer.tool_template)):
        check_template(template, terminators)


def encode_pieces(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Encode pieces in one batch on all cores: (ids uint32 [n], kinds uint8 [n], straddling tokens) of each."""
    encodings = tokenizer.backend.encode_batch([piece.text for piece in pieces], add_special_tokens=False)
    return [
        (np.array(encoding.ids, dtype=np.uint32), *_piece_kinds(encoding, piece))
        for piece, encoding in zip(pieces, encodings)
    ]


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
        first = bisect_right(offsets, start, key=itemgetter(1))  # the first token that ends after the span starts
        last = bisect_left(offsets, end, key=itemgetter(0))  # the first token that starts at the span's end or later
        kinds[first:last] = byte
        if byte & TRAINED and first < last:
            straddling += (offsets[first][0] < start) + (offsets[last - 1][1] > end)
    return kinds, straddling


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
        piece = conversation_piece(tokenizer, check_messages(messages, "messages"), tools=tools, train_on=train_on)
    except RowError as error:
        raise UserError(str(error)) from None
    ids, kinds, _ = encode_pieces(tokenizer, [piece])[0]
    return ids, kinds
