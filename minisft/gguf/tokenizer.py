"""The tokenizer of a GGUF file as the files that tokenizer_files.py reads.

The file has the tokens, their kinds, and merges (byte-level BPE, "gpt2") or scores (SentencePiece, "llama"). How a text is cut
before the merges it names only ("llama-bpe"), so each name is spelled out here; an unknown one is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minisft.errors import MODEL, UserError
from minisft.gguf.file import GgufFile
from minisft.strict_json import dump_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens


@dataclass(frozen=True)
class Cut:
    """How a byte-level tokenizer cuts a text before the merges."""

    regex: str | None = None  # None: that of GPT-2
    splits_digits: bool = False  # each digit alone, before the expression is applied
    ignore_merges: bool = False  # a piece that is a token is not merged


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (  # words that begin with capitals are cut where the small letters end
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
    r"|%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
CUTS = {  # llama.cpp's name -> how texts are cut
    "gpt-2": Cut(),
    "smollm": Cut(splits_digits=True),
    "llama-bpe": Cut(WORDS % r"\p{N}{1,3}", ignore_merges=True),
    "dbrx": Cut(WORDS % r"\p{N}{1,3}"),
    "qwen2": Cut(WORDS % r"\p{N}"),
    "qwen35": Cut(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "tekken": Cut(CASED % ("", "", r"\p{N}"), ignore_merges=True),
    "gpt-4o": Cut(CASED % (ENDINGS, ENDINGS, r"\p{N}{1,3}")),
}
OTHER_NAMES = {
    "default": "gpt-2",
    "starcoder": "smollm",
    "command-r": "smollm",
    "exaone4": "gpt-2",
    "smaug-bpe": "dbrx",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "olmo": "gpt-2",
    "phi-2": "gpt-2",
    "deepseek-r1-qwen": "qwen2",
}
ADD_BOS = ("llama-bpe", "tekken")  # unless the file says otherwise
SPACE = "\u2581"  # SentencePiece's sign for a space


def tokenizer_files(file: GgufFile) -> dict[str, bytes]:
    """{"tokenizer.json": ..., "tokenizer_config.json": ..., "chat_template.jinja" where there is one}.

    Raises UserError (exit code MODEL) for a kind of tokenizer that is not read.
    """
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in file.values.items()}
    kind, tokens = values.get("model"), values.get("tokens")
    kinds = values.get("token_type") or [1] * len(tokens or [])
    if kind not in ("gpt2", "llama") or not tokens or len(kinds) != len(tokens):
        raise _not_read(file, f"the tokenizer {kind!r} is not read from GGUF")
    pre = values.get("pre", "default")
    pre = OTHER_NAMES.get(pre, pre)
    if pre not in CUTS:
        raise _not_read(
            file, f"its tokenizer cuts texts as {values['pre']!r}; known are {', '.join(CUTS | OTHER_NAMES)}"
        )
    vocab = {token: number for number, token in enumerate(tokens)}
    try:
        backend = _byte_level(values, vocab, pre) if kind == "gpt2" else _sentencepiece(values, vocab, tokens, kinds)
    except Exception as error:  # the Rust library raises a bare Exception
        raise _not_read(file, f"its tokenizer is damaged ({str(error)[:100]})") from error
    for special in (True, False):
        added = [t for t, k in zip(tokens, kinds) if k == (CONTROL if special else USER_DEFINED)]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {ours: values.get(f"{theirs}_token_id") for ours, theirs in names.items()}
    config = {f"{ours}_token": tokens[number] for ours, number in ids.items() if number is not None}
    adds_bos = values.get("add_bos_token", kind == "llama" or pre in ADD_BOS)
    if adds_bos and "bos_token" in config:
        bos = config["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    files = {"tokenizer.json": backend.to_str(pretty=False).encode(), "tokenizer_config.json": dump_json(config)}
    if template := file.values.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return files


def _not_read(file: GgufFile, problem: str) -> UserError:
    hint = "set model.tokenizer_name_or_path to a folder with tokenizer.json"
    return UserError(f"{file.path}: {problem}", hint=hint, exit_code=MODEL)


def _byte_level(values: dict, vocab: dict[str, int], pre: str) -> Tokenizer:
    cut = CUTS[pre]
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("merges", ())]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.ignore_merges))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if cut.splits_digits else []
    steps += [pre_tokenizers.Split(Regex(cut.regex), "isolated")] if cut.regex else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if pre in ("qwen2", "qwen35"):
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(values: dict, vocab: dict[str, int], tokens: list[str], kinds: list[int]) -> Tokenizer:
    unknown = values.get("unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=list(_merges(vocab, values["scores"])),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    puts_space = values.get("add_space_prefix", True)
    spaces = [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * puts_space + spaces)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * puts_space)
    return backend


def _merges(vocab: dict[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """SentencePiece merges the pair whose token has the best score: every way to cut a token in two is a merge."""
    for token in sorted(vocab, key=lambda token: -scores[vocab[token]]):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        yield from sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
