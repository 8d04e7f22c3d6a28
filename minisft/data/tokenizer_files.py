"""The files of a tokenizer, read as transformers 5 reads them, with the user's overrides.

    tokenizer.json                       all that encoding needs; truncation and padding saved in it are switched off
    tokenizer_config.json                which tokens are BOS, EOS, padding; tokens to add; the chat template(s)
    special_tokens_map.json and added_tokens.json   override the config if it has no added_tokens_decoder, else not read
    chat_template.jinja                  the default template
    additional_chat_templates/*.jinja    templates with names, such as tool_use; files replace all of the config's

A special token that is named but not listed as an added token is added, with the next id or that of its vocabulary entry,
as in transformers. BOS and EOS are used in training, so the vocabulary must have them, else it is an error.

The files that `Tokenizer.save` writes contain the overrides (EOS, padding, template, new tokens), so that they load as the
same tokenizer, with transformers or here.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from operator import itemgetter
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from minisft.data.chat.training_templates import CHATML
from minisft.data.tokenizer_limits import call, check_backend
from minisft.errors import MODEL, UserError, shortened
from minisft.files import checked_path, read_file
from minisft.gguf.file import is_gguf, open_gguf
from minisft.gguf.tokenizer import tokenizer_files
from minisft.hub import OTHER_TOKENIZERS
from minisft.strict_json import dump_json, parse_json

OLDER_FILES = ("special_tokens_map.json", "added_tokens.json")
FILES = ("tokenizer.json", "tokenizer_config.json", *OLDER_FILES, "chat_template.jinja")
NAMED_TEMPLATES = "additional_chat_templates"
MAX_BYTES = 2**28  # of a file
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Parts:
    """The contents of the files, with the overrides."""

    backend: tokenizers.Tokenizer
    files: dict[str, bytes]  # name -> content to save
    special_tokens: dict[str, str]  # "eos_token" -> its text, if set
    templates: dict[str, str]  # name -> text; "default" is used unless another is requested


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder, or those that a GGUF file stands for. Raises UserError if there is no tokenizer.json."""
    if is_gguf(folder):
        return tokenizer_files(open_gguf(folder))
    paths = [folder / name for name in FILES] + sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))
    files = {path.relative_to(folder).as_posix(): _read(path) for path in paths if os.path.lexists(path)}
    config = _table(files, "tokenizer_config.json", str(folder))
    if versions := config.pop("fast_tokenizer_files", None):
        files["tokenizer_config.json"] = dump_json(config)
        newest = _for_our_version(versions)
        if (folder / newest).is_file():
            files["tokenizer.json"] = _read(folder / newest)
    if "tokenizer.json" not in files:
        others = [name for name in OTHER_TOKENIZERS if (folder / name).exists()]
        raise UserError(
            f"{folder} has no tokenizer.json" + (f", only {', '.join(others)}" if others else ""),
            hint="convert it once: transformers.AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
            exit_code=MODEL,
        )
    return files


def _read(path: Path) -> bytes:
    return read_file(path, exit_code=MODEL, at_most=MAX_BYTES)


def _for_our_version(names: object) -> str:
    """The name of the file that transformers 5 reads, among files such as tokenizer.4.0.json (for versions from 4.0 on)."""
    numbered = {}
    for name in names if isinstance(names, list) else []:
        match = re.fullmatch(r"tokenizer\.(\d+(?:\.\d+)*)\.json", str(name))
        if match and (version := tuple(int(part) for part in match[1].split("."))) < (6,):
            numbered[version] = match[0]
    return numbered[max(numbered)] if numbered else "tokenizer.json"


def assemble(
    files: dict[str, bytes],
    where: str,
    *,
    chat_template: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    new_special_tokens: Sequence[str] = (),
) -> Parts:
    """The parts of a tokenizer from its files and the user's overrides (see load_tokenizer). Raises UserError."""
    name = f"{where}/tokenizer.json"
    text = call(files["tokenizer.json"].decode, "utf-8", what=name)
    backend = call(tokenizers.Tokenizer.from_str, text, what=name)
    check_backend(backend, where)
    backend.no_truncation()
    backend.no_padding()
    changes = {name: text for name, text in (("eos_token", eos_token), ("pad_token", pad_token)) if text is not None}
    try:
        config = {**_config(files, where), **changes}
        _add_listed_tokens(backend, config, where)
        named = {name: config[name] for name in NAMES if config.get(name)}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        own = {  # tokens that only this model has, such as an image token; its template may use them
            name: token
            for name, token in config.items()
            if name.endswith("_token") and name not in NAMES and isinstance(token, str)
        }
        if isinstance(extra, dict):
            own, extra = own | extra, []
        own = own or config.get("model_specific_special_tokens") or {}
        named |= own
        special_tokens = {name: _added_token(token).content for name, token in named.items()}
        for name in ("bos_token", "eos_token", *changes):
            if name in special_tokens and special_tokens[name] not in new_special_tokens:
                _check_token(backend, name, special_tokens[name], where, is_override=name in changes)
        _add_missing(backend, [*named.values(), *extra], new_special_tokens)
        for text in new_special_tokens:
            _add_new(backend, text)
        templates = _templates(config, files)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: malformed tokenizer files ({error!r})", exit_code=MODEL) from None

    if changes or new_special_tokens:
        texts = [_added_token(token).content for token in extra]
        config |= {name: special_tokens[name] for name in named if name not in own}
        config["model_specific_special_tokens"] = {name: special_tokens[name] for name in own}
        config["extra_special_tokens"] = list(dict.fromkeys([*texts, *new_special_tokens]))
        replaced = {"added_tokens_decoder", "additional_special_tokens", *own}  # tokenizer.json lists every token now
        files = {name: data for name, data in files.items() if name not in OLDER_FILES} | {
            "tokenizer.json": backend.to_str(pretty=True).encode("utf-8"),
            "tokenizer_config.json": dump_json({k: v for k, v in config.items() if k not in replaced}),
        }
    if chat_template is not None:
        templates = {"default": _chosen_template(chat_template, templates)}
        files = {name: data for name, data in files.items() if not name.startswith(NAMED_TEMPLATES)}
        files["chat_template.jinja"] = templates["default"].encode("utf-8")
    return Parts(backend, files, special_tokens, templates)


def _config(files: dict[str, bytes], where: str) -> dict:
    """tokenizer_config.json, overridden by the older files as in transformers."""
    config = _table(files, "tokenizer_config.json", where)
    if "added_tokens_decoder" in config:
        return config
    older = _table(files, "special_tokens_map.json", where)
    return {**config, **older, "added_tokens": _table(files, "added_tokens.json", where)}


def _table(files: dict[str, bytes], name: str, where: str) -> dict:
    value = parse_json(files[name], f"{where}/{name}", exit_code=MODEL) if name in files else {}
    if not isinstance(value, dict):
        raise UserError(f"{where}/{name}: not a JSON object", exit_code=MODEL)
    return value


def _check_token(backend: tokenizers.Tokenizer, name: str, text: str, where: str, is_override: bool) -> None:
    if backend.token_to_id(text) is not None:
        return
    near = get_close_matches(text, [t.content for t in backend.get_added_tokens_decoder().values()], n=3)
    hint = "add it to tokenizer.json, or name another in tokenizer_config.json"
    if is_override:
        similar = f"similar: {', '.join(near)}; " if near else ""
        hint = f"{similar}to add a new token, name it in new_special_tokens too"
    raise UserError(f"{where}: {name} {text!r} is not in the vocabulary", hint=hint, exit_code=MODEL)


def _add_listed_tokens(backend: tokenizers.Tokenizer, config: dict, where: str) -> None:
    """Add the tokens of the config's added_tokens_decoder (or added_tokens.json); its flags override tokenizer.json's."""
    listed = {int(number): _added_token(token) for number, token in (config.get("added_tokens_decoder") or {}).items()}
    present = backend.get_added_tokens_decoder().values()
    texts, specials = (
        {t.content for t in present},
        {_added_token(config[name]).content for name in NAMES if config.get(name)},
    )
    for text, number in config.pop("added_tokens", {}).items():
        if text not in texts:
            listed[int(number)] = AddedToken(text, normalized=text not in specials, special=text in specials)
    for number, token in listed.items():
        other = backend.id_to_token(number)
        if other is not None and other != token.content:
            raise _contradiction(backend, token.content, number, where)
    known = {repr(token) for token in present}  # with its flags
    backend.add_tokens([token for _, token in sorted(listed.items(), key=itemgetter(0)) if repr(token) not in known])
    for number, token in listed.items():
        if backend.token_to_id(token.content) != number:
            raise _contradiction(backend, token.content, number, where)


def _contradiction(backend: tokenizers.Tokenizer, text: str, number: int, where: str) -> UserError:
    return UserError(
        f"{where}: token {text!r} has id {backend.token_to_id(text)} in tokenizer.json and {number} beside it",
        exit_code=MODEL,
    )


def _add_missing(backend: tokenizers.Tokenizer, tokens: list[str | dict], later: Sequence[str]) -> None:
    """Add special tokens that are not among the added tokens: with the next ids, or their ids in the vocabulary."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    known |= {text for text in later if backend.token_to_id(text) is None}
    missing = {token.content: token for token in map(_added_token, tokens) if token.content not in known}
    backend.add_special_tokens(list(missing.values()))


def _add_new(backend: tokenizers.Tokenizer, text: str) -> None:
    """Add a special token with the next id, unless the vocabulary has it."""
    if not text.strip():
        raise UserError(f"new_special_tokens: {text!r} is not the text of a token")
    if backend.token_to_id(text) is not None:
        return
    taken = set(backend.get_vocab(with_added_tokens=True).values())
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
    if backend.token_to_id(text) in taken:  # the library counts tokens, which goes wrong where ids have holes
        raise UserError(
            f"{text!r} cannot be added: it would get the id {backend.token_to_id(text)} of another token",
            hint="the ids of this vocabulary have holes; use one of its reserved tokens instead",
            exit_code=MODEL,
        )


def _added_token(token: str | dict) -> AddedToken:
    """A token as the files write it: its text, or an object with its text and flags."""
    entry = {"content": token, "special": True} if isinstance(token, str) else token
    if not isinstance(entry["content"], str) or not entry["content"]:
        raise ValueError(f"{entry!r} as a token")
    flags = {name: bool(entry[name]) for name in FLAGS if name in entry}
    return AddedToken(entry["content"], **flags)


def _templates(config: dict, files: dict[str, bytes]) -> dict[str, str]:
    """Name -> text of the tokenizer's own chat templates. Those in files replace those in the config."""
    own = config.get("chat_template") or {}
    if isinstance(own, str):
        own = {"default": own}
    elif isinstance(own, list):
        own = {entry["name"]: entry["template"] for entry in own}
    paths = {Path(path).stem: path for path in files if path.startswith(f"{NAMED_TEMPLATES}/")}
    if "chat_template.jinja" in files:
        paths["default"] = "chat_template.jinja"
    templates = {name: files[path].decode("utf-8") for name, path in paths.items()} or own
    if not all(isinstance(text, str) for text in templates.values()):
        raise TypeError("a chat template that is not text")
    return templates


def _chosen_template(chosen: str, own: dict[str, str]) -> str:
    if chosen in own:
        return own[chosen]
    if chosen == "chatml":
        return CHATML
    if "{{" in chosen or "{%" in chosen:
        return chosen
    try:
        return read_file(checked_path(chosen, "chat_template")).decode("utf-8")
    except (UserError, UnicodeDecodeError) as error:
        names = f", or one of the tokenizer's own: {', '.join(sorted(own))}" if own else ""
        hint = f'give "chatml", the path of a .jinja file, the template itself{names}'
        raise UserError(f"chat_template = {shortened(repr(chosen), 100)}: {error}", hint=hint) from None
