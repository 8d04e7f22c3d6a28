"""A tokenizer without transformers: the Rust library and the few files around it.

`tokenizer.json` is all that encoding needs. Beside it are tokenizer_config.json (which tokens are BOS, EOS, padding; the
chat template) and chat_template.jinja. Truncation and padding saved inside tokenizer.json would apply silently to every
encoding (34 ids became 8), so they are switched off. The library never adds special tokens: a rendered template holds its
own, and around other text `prefix_ids` and `suffix_ids` are put once a document, so BOS cannot be doubled. Unlike
transformers 5, we do not patch the wrong pre-tokenizer of some early Mistral files.

train_tokenizer learns a byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2): every text round-trips, nothing is
unknown.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minisft.data.chat.conversations import RENDER_NAMES
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.chat.template_check import ends_of_turns
from minisft.data.rows import RowError
from minisft.data.tokenizer_files import Parts, assemble, read_files
from minisft.data.tokenizer_limits import call, encode_each, encode_one, growth
from minisft.errors import MODEL, UserError
from minisft.hub import resolve
from minisft.strict_json import dump_json

SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


@dataclass(frozen=True)
class Tokenizer:
    """Made by `load_tokenizer` or `train_tokenizer`."""

    backend: tokenizers.Tokenizer
    files: dict[str, bytes]  # name -> content, for `save`
    special_tokens: dict[str, str]  # "eos_token" -> its text, if set
    template: ChatTemplate | None = None
    tool_template: ChatTemplate | None = None  # for rows with tools; few tokenizers have one
    template_names: tuple[str, ...] = ()  # of all its templates
    prefix_ids: list[int] = field(default_factory=list)  # put before a text, usually BOS
    suffix_ids: list[int] = field(default_factory=list)  # put after it

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
        """EOS if the tokenizer names none. Training has no padding and never reads it."""
        return self._id("eos_token") if self._id("pad_token") is None else self._id("pad_token")

    @cached_property
    def stop_ids(self) -> set[int]:
        """The tokens that end an answer: EOS, and those at which the trained text of a chat template ends, which may be others:
        after an answer, and after a tool call."""
        ends = [
            text for template in (self.template, self.tool_template) if template for text in ends_of_turns(template)
        ]
        last = {i for text in ends for i in self.encode(text.rstrip())[-1:]}
        return (last & self.special_ids) | ({self.eos_token_id} if self.eos_token_id is not None else set())

    @cached_property
    def vocab_size(self) -> int:
        """The largest id + 1, counting unused ids below it: the model's embedding needs at least this many rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def growth(self) -> int:
        """The most characters that the normalizer makes of one."""
        return growth(self.backend.normalizer)

    @cached_property
    def control_tokens(self) -> re.Pattern:
        """Matches the text of any special token."""
        texts = [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def special_ids(self) -> set[int]:
        """The ids of all special tokens."""
        return {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @cached_property
    def added_tokens(self) -> re.Pattern:
        """Matches an added token, special or not, with the whitespace before it that the token swallows."""
        tokens = sorted(self.backend.get_added_tokens_decoder().values(), key=lambda t: len(t.content), reverse=True)
        return re.compile("|".join(r"\s*" * t.lstrip + re.escape(t.content) for t in tokens) or r"(?!)")

    @cached_property
    def continuing_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer for text that continues another. Some (Llama 2, Mistral 0.1) put a space before every text, which
        belongs before its start only. It is `backend` itself where the tokenizer puts none."""
        return _without_prefix_space(self.backend)

    @property
    def has_prefix_space(self) -> bool:
        return self.continuing_backend is not self.backend

    @cached_property
    def has_space_after_special(self) -> bool:
        """Whether the text after a special token gets a space too, as at the start of a text."""
        special = next((t.content for t in self.backend.get_added_tokens_decoder().values() if t.special), None)
        if special is None or not self.has_prefix_space:
            return False
        after = encode_one(self.backend, special + "a", 1).ids[1:]
        return after != encode_one(self.continuing_backend, "a", 1).ids

    @cached_property
    def literal_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but the text of a special token is ordinary text to it."""
        return _literal(self.backend)

    @cached_property
    def continuing_literal_backend(self) -> tokenizers.Tokenizer:
        """`literal_backend` for text that continues another."""
        return _literal(self.continuing_backend) if self.has_prefix_space else self.literal_backend

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text; add_special_tokens puts `prefix_ids` before and `suffix_ids` after it."""
        try:
            ids = encode_one(self.backend, text, self.growth).ids
        except RowError as error:
            raise UserError(str(error), exit_code=MODEL) from None
        return self.prefix_ids + ids + self.suffix_ids if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, without special tokens, on all cores."""
        encoded = encode_each(self.backend, texts, self.growth)
        if error := next((one for one in encoded if isinstance(one, RowError)), None):
            raise UserError(str(error), exit_code=MODEL)
        return [encoding.ids for encoding in encoded if not isinstance(encoding, RowError)]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        return call(
            self.backend.decode, [int(i) for i in ids], what="decoding", skip_special_tokens=skip_special_tokens
        )

    def decode_between(self, ids: Sequence[int] | np.ndarray, start: int, end: int) -> str:
        """The text of ids[start:end]. By itself it would lose the space before it, if the tokenizer puts one before a text."""
        if start == 0 or not self.has_prefix_space:
            return self.decode(ids[start:end])
        return self.decode(ids[start - 1 : end])[len(self.decode(ids[start - 1 : start])) :]

    def decode_documents(self, documents: Sequence[list[int]]) -> list[str]:
        """The texts of whole documents, special tokens written out, without the spaces that encoding puts before them."""
        if not self.has_space_after_special:
            return self.backend.decode_batch(documents, skip_special_tokens=False)
        # Decoding removes the space at the start only. So the text between two special tokens is decoded by itself.
        cut = [
            [list(part) for _, part in groupby(ids, key=lambda i: i if i in self.special_ids else None)]
            for ids in documents
        ]
        texts = iter(self.backend.decode_batch([part for parts in cut for part in parts], skip_special_tokens=False))
        return ["".join(next(texts) for _ in parts) for parts in cut]

    def apply_chat_template(
        self,
        messages: list[dict],
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text, byte-equal to transformers. Encode it without special tokens.

        Raises UserError if there is no template or it refuses the conversation.
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
        chosen = self.tool_template if tools and self.tool_template else self.template
        if chosen is None:
            named = f" but those named {', '.join(self.template_names)}" if self.template_names else ""
            hint = 'set chat_template = "chatml", or to a file' + (", or to one of these names" if named else "")
            raise UserError(f"the tokenizer has no chat template{named}", hint=hint, exit_code=MODEL)
        return chosen

    def fingerprint(self) -> str:
        """A hash that changes with every file, special token, template and template date."""
        parts = {name: sha256(data).hexdigest() for name, data in self.files.items()}
        templates = [vars(t) for t in (self.template, self.tool_template) if t]
        return sha256(json.dumps([parts, templates, self.special_tokens], sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Write the files into a folder (made if absent), from which this module and transformers load them."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)


def _literal(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    return copy


def _without_prefix_space(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A copy that puts no space before a text; the tokenizer itself if it does not."""
    found = False

    def walk(step: dict | None) -> dict | None:
        nonlocal found
        if step is None:
            return None
        for name in ("normalizers", "pretokenizers"):
            if name in step:
                steps = [walk(inner) for inner in step[name]]
                return {**step, name: [inner for inner in steps if inner is not None]}
        without = {
            "Prepend": None,
            "Metaspace": {**step, "prepend_scheme": "never"},
            "ByteLevel": {**step, "add_prefix_space": False},
        }.get(step["type"], step)
        found = found or without != step
        return without

    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    parts = {name: walk(part and json.loads(part.__getstate__())) for name, part in parts.items()}
    return tokenizers.Tokenizer.from_str(json.dumps(json.loads(backend.to_str()) | parts)) if found else backend


# ------------------------------------------------------------------------------------------------- loading


def load_tokenizer(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict | None = None,
    template_date: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    new_special_tokens: Sequence[str] = (),
    local_files_only: bool = False,
) -> Tokenizer:
    """A tokenizer from a local folder or a hub repository.

    chat_template: None = the tokenizer's own; the name of one of its named templates; "chatml" = ours; the path of a
    .jinja file; or the template itself. chat_template_kwargs: variables that every rendering gets, such as
    enable_thinking. template_date: the ISO date that a template's strftime_now sees; None = today.
    eos_token, pad_token: tokens in place of those in the files. new_special_tokens: added with the next ids if the vocabulary
    lacks them; the model's embedding must grow with them.
    Raises UserError if a file is missing, broken or contradicts another, and if an override does not fit.
    """
    folder, _ = resolve(path_or_repo, revision, "tokenizer", local_files_only=local_files_only)
    parts = assemble(
        read_files(folder),
        str(folder),
        chat_template=chat_template,
        eos_token=eos_token,
        pad_token=pad_token,
        new_special_tokens=new_special_tokens,
    )
    return _tokenizer(parts, chat_template_kwargs or {}, template_date)


def _tokenizer(parts: Parts, chat_template_kwargs: dict, template_date: str | None) -> Tokenizer:
    for name in chat_template_kwargs:
        if not name.isidentifier() or name in RENDER_NAMES:
            raise UserError(f"chat_template_kwargs: {name!r} is not a variable that can be given to a template")
    try:
        day = date.fromisoformat(template_date).isoformat() if template_date else date.today().isoformat()
    except ValueError:
        raise UserError(f"template_date = {template_date!r} is not a date", hint="as in 2026-01-31") from None
    try:
        variables = tuple((k, json.dumps(v, allow_nan=False)) for k, v in sorted(chat_template_kwargs.items()))
    except (TypeError, ValueError) as error:
        raise UserError(f"chat_template_kwargs = {chat_template_kwargs}: {error}", hint="JSON values only") from None

    def template(name: str) -> ChatTemplate | None:
        if name not in parts.templates:
            return None
        text = parts.templates[name]
        return ChatTemplate(text, tuple(parts.special_tokens.items()), day if "strftime_now" in text else "", variables)

    bare, full = (
        call(parts.backend.encode, "a", what="the tokenizer fails on the text a", add_special_tokens=special).ids
        for special in (False, True)
    )
    at = next((i for i in range(len(full)) if bare and full[i : i + len(bare)] == bare), len(full))
    return Tokenizer(
        parts.backend,
        parts.files,
        parts.special_tokens,
        template=template("default"),
        tool_template=template("tool_use"),
        template_names=tuple(sorted(parts.templates)),
        prefix_ids=full[:at],
        suffix_ids=full[at + len(bare) :],
    )


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

    vocab_size includes the 256 bytes and the special tokens. chat_template: as in `load_tokenizer`, but None = no template.
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
    return _tokenizer(assemble(files, "the new tokenizer", chat_template=chat_template), {}, None)
