"""The tokenizer of a GGUF file as the files that tokenizer_files.py reads.

The file has the tokens, their kinds, and merges (byte-level BPE, "gpt2") or scores (SentencePiece, "llama"). How a text is cut
before the merges it names only ("llama-bpe"), so each name is spelled out here; an unknown one is refused.
"""

from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minisft.errors import MODEL, UserError
from minisft.gguf.file import GgufFile
from minisft.strict_json import dump_json

CONTROL, USER_DEFINED, BYTE = 3, 4, 6  # kinds of tokens
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES = {  # name -> how texts are cut; None: as in GPT-2
    "gpt-2": None,
    "default": None,
    "smollm": None,  # each digit alone
    "llama-bpe": WORDS % r"\p{N}{1,3}",
    "qwen2": WORDS % r"\p{N}",
}
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
    if values.get("pre", "default") not in REGEXES:
        raise _not_read(file, f"its tokenizer cuts texts as {values['pre']!r}; known are {', '.join(REGEXES)}")
    vocab = {token: number for number, token in enumerate(tokens)}
    try:
        backend = _byte_level(values, vocab) if kind == "gpt2" else _sentencepiece(values, vocab, tokens, kinds)
    except Exception as error:  # the Rust library raises a bare Exception
        raise _not_read(file, f"its tokenizer is damaged ({str(error)[:100]})") from error
    for special in (True, False):
        added = [t for t, k in zip(tokens, kinds) if k == (CONTROL if special else USER_DEFINED)]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {ours: values.get(f"{theirs}_token_id") for ours, theirs in names.items()}
    config = {f"{ours}_token": tokens[number] for ours, number in ids.items() if number is not None}
    adds_bos = values.get("add_bos_token", kind == "llama" or values.get("pre") == "llama-bpe")
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


def _byte_level(values: dict, vocab: dict[str, int]) -> Tokenizer:
    name = values.get("pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in values.get("merges", ())]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=name == "llama-bpe"))
    regex = REGEXES[name]
    steps = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
    steps += [pre_tokenizers.Split(Regex(regex), "isolated")] if regex else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "qwen2":
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
