"""The files of a tokenizer, read as transformers 5 reads them, and overridden where the user says so.

    tokenizer.json                       all that encoding needs; truncation and padding saved in it are switched off
    tokenizer_config.json                which tokens are BOS, EOS, padding; tokens to add; the chat template, or a list of them
    special_tokens_map.json, added_tokens.json     older places of the same, read where the config has no added_tokens_decoder
    chat_template.jinja                  the default template; wins over the config's
    additional_chat_templates/*.jinja    templates with names, such as tool_use

What is overridden (EOS, padding, template, new tokens) is written into the files that `Tokenizer.save` writes, so that
whoever loads them next, with transformers or here, gets the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from operator import itemgetter
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from minisft.data.training_templates import CHATML
from minisft.errors import MODEL, UserError
from minisft.files import dump_json, parse_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
NAMED_TEMPLATES = "additional_chat_templates"
OTHER_FORMATS = ("tokenizer.model", "tekken.json", "vocab.json", "spiece.model", "vocab.txt")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Parts:
    """What the files hold."""

    backend: tokenizers.Tokenizer
    files: dict[str, bytes]  # as they are to be saved: name -> content
    special_tokens: dict[str, str]  # "eos_token" -> its text, those that are set
    templates: dict[str, str]  # name -> text; "default" is used where nothing else is asked for


def read_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files in a folder. Raises UserError where there is no tokenizer.json."""
    paths = [folder / name for name in FILES] + sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}
    if "tokenizer.json" not in files:
        others = [name for name in OTHER_FORMATS if (folder / name).exists()]
        raise UserError(
            f"{folder} has no tokenizer.json" + (f", only {', '.join(others)}" if others else ""),
            hint="convert it once: transformers.AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
            exit_code=MODEL,
        )
    return files


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
    try:
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
    except Exception as error:  # the Rust library raises a bare Exception
        raise UserError(f"{where}/tokenizer.json: {error}", exit_code=MODEL) from None
    backend.no_truncation()
    backend.no_padding()
    try:
        config = _config(files, where)
        _add_tokens(backend, config, _table(files, "added_tokens.json", where), where)
        special_tokens = {name: _text(config[name]) for name in NAMES if config.get(name)}
        if isinstance(config.get("extra_special_tokens"), dict):  # names of the model's own, which templates may use
            special_tokens |= {name: _text(token) for name, token in config["extra_special_tokens"].items()}
        templates = _templates(config, files)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{where}: malformed tokenizer files ({error!r})", exit_code=MODEL) from None

    added = [text for text in new_special_tokens if backend.token_to_id(text) is None]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in added])
    changes = {"eos_token": eos_token, "pad_token": pad_token}
    changes = {name: text for name, text in changes.items() if text is not None}
    special_tokens |= changes
    for name in {"bos_token", "eos_token", *changes} & special_tokens.keys():
        _check_token(backend, name, special_tokens[name], where, is_override=name in changes)
    files = dict(files)
    if added:
        files["tokenizer.json"] = backend.to_str(pretty=True).encode("utf-8")
    if changes:
        files["tokenizer_config.json"] = dump_json({**_table(files, "tokenizer_config.json", where), **changes})
        if "special_tokens_map.json" in files:
            files["special_tokens_map.json"] = dump_json({**_table(files, "special_tokens_map.json", where), **changes})
    if chat_template is not None:
        templates = {"default": _chosen_template(chat_template, templates)}
        files["chat_template.jinja"] = templates["default"].encode("utf-8")
    return Parts(backend, files, special_tokens, templates)


def _config(files: dict[str, bytes], where: str) -> dict:
    config = _table(files, "tokenizer_config.json", where)
    older = {} if "added_tokens_decoder" in config else _table(files, "special_tokens_map.json", where)
    return {**older, **config}


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
        hint = f"{similar}a new token is named in new_special_tokens too"
    raise UserError(f"{where}: {name} {text!r} is not in the vocabulary", hint=hint, exit_code=MODEL)


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


def _templates(config: dict, files: dict[str, bytes]) -> dict[str, str]:
    """Name -> text of the tokenizer's own chat templates."""
    own = config.get("chat_template")
    templates = {"default": own} if isinstance(own, str) else {}
    if isinstance(own, list):
        templates = {entry["name"]: entry["template"] for entry in own}
    for path, data in files.items():
        if path.startswith(f"{NAMED_TEMPLATES}/"):
            templates[Path(path).stem] = data.decode("utf-8")
    if "chat_template.jinja" in files:
        templates["default"] = files["chat_template.jinja"].decode("utf-8")
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
        return Path(chosen).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = f", or one of the tokenizer's own: {', '.join(sorted(own))}" if own else ""
        hint = f'give "chatml", the path of a .jinja file, the template itself{names}'
        raise UserError(f"chat_template = {chosen!r}: {error}", hint=hint) from None


def _text(token: str | dict) -> str:
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r} as a special token")
    return text
