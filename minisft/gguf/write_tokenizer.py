"""A tokenizer.json as the metadata of a GGUF file.

llama.cpp has two kinds of tokenizers that we meet: byte-level BPE ("gpt2": tokens, merges, and the name of the rule that cuts a
text before the merges) and SentencePiece ("llama": tokens and scores). The rule is recognised by its regular expression, not
by the name of the model, so that a vocabulary of one's own has one too. A tokenizer that llama.cpp would cut otherwise is
refused.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn

from minisft.errors import MODEL, UserError
from minisft.gguf.tokenizer import BYTE, CONTROL, CUTS, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, Cut

if TYPE_CHECKING:
    from gguf import GGUFWriter

# end of text, of a turn, of a message before a tool's result: llama.cpp stops at all three
END_KEYS = ("eos", "eot", "eom")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, and what the model ends an answer with."""

    json: dict[str, Any]  # tokenizer.json
    special: dict[str, int]  # "bos", "eos", "unk", "pad" -> id, where there is one
    ends: tuple[int, ...]  # the tokens that end an answer
    adds_bos: bool  # to a plain text
    adds_eos: bool
    puts_space: bool  # before a text, and after a special token
    template: str | None  # of a chat
    tool_template: str | None = None


def add_vocabulary(writer: "GGUFWriter", vocabulary: Vocabulary, num_rows: int) -> list[str]:
    """num_rows: of the embedding; ids that no token has are filled. Returns lines for the user. Raises UserError (exit code
    MODEL) for a tokenizer that llama.cpp does not have."""
    model, added = vocabulary.json["model"], vocabulary.json.get("added_tokens", [])
    if model.get("type") != "BPE":
        _refuse(f"its model is {model.get('type')}, and llama.cpp has BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            _refuse(f"its BPE has {option} = {model[option]!r}")
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens, kinds = _tokens(model["vocab"], added, vocabulary.special.get("unk"), num_rows, is_sentencepiece)
    if is_sentencepiece:
        _check_sentencepiece(vocabulary.json)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(merges, model["vocab"], len(tokens)))
        writer.add_add_space_prefix(vocabulary.puts_space)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name_of_cut(vocabulary.json))
        writer.add_token_list(tokens)
        spaced = next((merge for merge in merges if any(" " in part for part in merge)), None)
        if spaced:
            _refuse(f"its merge {spaced!r} has a space, at which the file would be cut")
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types(kinds)
    lines = _add_special(writer, vocabulary, tokens)
    if vocabulary.template is not None:
        templates = [{"name": "default", "template": vocabulary.template}]
        if vocabulary.tool_template is not None:
            templates.append({"name": "tool_use", "template": vocabulary.tool_template})
        writer.add_chat_template(templates)
    return lines


def _add_special(writer: "GGUFWriter", vocabulary: Vocabulary, tokens: list[str]) -> list[str]:
    special = {name: number for name, number in vocabulary.special.items() if number < len(tokens)}
    eos = special.get("eos")
    ends = sorted(vocabulary.ends, key=lambda end: (end != eos, end))
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    for name, add in {
        "bos": writer.add_bos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }.items():
        if name in special:
            add(special[name])
    if not ends and eos is not None:
        ends = [eos]
    for key, end in zip(END_KEYS, ends):
        getattr(writer, f"add_{key}_token_id")(end)
    written, rest = ends[: len(END_KEYS)], ends[len(END_KEYS) :]
    lines = [f"it ends an answer at {', '.join(repr(tokens[end]) for end in written)}"] if written else []
    if rest:
        names = ", ".join(repr(tokens[end]) for end in rest)
        lines.append(f"GGUF has place for {len(END_KEYS)} ends of an answer; stop at {names} too (the Modelfile does)")
    return lines


def _tokens(
    vocab: dict[str, int], added: list[dict], unknown: int | None, num_rows: int, is_sentencepiece: bool
) -> tuple[list[str], list[int]]:
    """(text, kind) of every row of the embedding; tokens beyond the rows cannot occur."""
    tokens, kinds = [f"[PAD{i}]" for i in range(num_rows)], [UNUSED] * num_rows
    for text, number in vocab.items():
        if number < num_rows:
            is_byte = is_sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
            tokens[number], kinds[number] = text, BYTE if is_byte else NORMAL
    for token in added:
        if token["id"] < num_rows:
            tokens[token["id"]], kinds[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    if is_sentencepiece and unknown is not None and unknown < num_rows:
        kinds[unknown] = UNKNOWN
    return tokens, kinds


# ---- byte-level BPE -----------------------------------------------------------------------------------------------


def name_of_cut(tokenizer: dict) -> str:
    """llama.cpp's name of the rule by which texts are cut before the merges. Raises UserError (exit code MODEL) if there is
    none."""
    step, steps = tokenizer.get("pre_tokenizer"), []
    while step is not None:
        inner = step["pretokenizers"] if step["type"] == "Sequence" else [step]
        steps, step = inner, inner[0] if len(inner) == 1 and inner[0]["type"] == "Sequence" else None
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if len(byte_level) != 1 or byte_level[0] is not steps[-1] or byte_level[0].get("add_prefix_space"):
        _refuse("it does not end in a byte-level step without a space in front")
    splits_digits, regex = False, None
    for step in steps[:-1]:
        if step["type"] == "Digits" and step["individual_digits"] and step is steps[0]:
            splits_digits = True
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"] and regex is None:
            regex = step["pattern"].get("Regex", "")  # a plain text to split at is no rule of llama.cpp's
        else:
            _refuse(f"llama.cpp does not know its step {str(step)[:80]}")
    if byte_level[0].get("use_regex", True) != (regex is None):
        _refuse("its regular expression and that of GPT-2 would follow each other")
    cut = Cut(regex, splits_digits, bool(tokenizer["model"].get("ignore_merges")))
    names = [name for name, known in CUTS.items() if known == cut]
    if not names:
        _refuse(
            f"llama.cpp has no name for its regular expression {str(regex)[:120]!r} (ignore_merges = {cut.ignore_merges})"
        )
    return names[0]


# ---- SentencePiece ------------------------------------------------------------------------------------------------


def _check_sentencepiece(tokenizer: dict) -> None:
    normalizer, cut = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    kinds = [step["type"] for step in steps]
    replaces = any(s["type"] == "Replace" and s["pattern"] == {"String": " "} and s["content"] == SPACE for s in steps)
    has_metaspace = cut is not None and cut["type"] == "Metaspace" and not cut.get("split", True)
    # Gemma's finds no space
    has_no_cut = cut is None or cut["type"] == "Split" and cut["pattern"] == {"String": " "}
    if not (has_metaspace and not steps or has_no_cut and replaces and set(kinds) <= {"Prepend", "Replace"}):
        _refuse("its normalizer and pre-tokenizer are not those of SentencePiece")


def _scores(merges: list[tuple[str, ...]], vocab: dict[str, int], count: int) -> list[float]:
    """llama.cpp merges the neighbours whose token has the best score. So a token's score is minus the place of its merges in the
    list. Raises UserError (exit code MODEL) if the merges of a token are not side by side there, or if not all are."""
    scores = [0.0] * count
    worst = -float(len(vocab))
    for text, number in vocab.items():
        if number < count and len(text) > 1:
            scores[number] = worst  # no merge makes it
    groups = [(token, set(pairs)) for token, pairs in groupby(merges, key="".join)]
    repeated = next((token for token, times in Counter(token for token, _ in groups).items() if times > 1), None)
    if repeated is not None:
        _refuse(f"its merges are not ordered by the tokens that they make ({repeated!r})")
    for place, (token, pairs) in enumerate(groups):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        if missing := next((cut for cut in cuts if cut[0] in vocab and cut[1] in vocab and cut not in pairs), None):
            _refuse(f"it never merges {missing!r}, and llama.cpp would")
        if vocab[token] < count:
            scores[vocab[token]] = -float(place + 1)
    return scores


def _refuse(problem: str) -> NoReturn:
    hint = "write Hugging Face files instead (without --gguf), and try llama.cpp's convert_hf_to_gguf.py on them"
    raise UserError(f"no GGUF file is written: the tokenizer: {problem}", hint=hint, exit_code=MODEL)
