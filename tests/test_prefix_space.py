"""Tokenizers that put a space before a text (Llama 2, Mistral 0.1): an answer continues its prompt and gets none."""

import json
from dataclasses import replace

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from minisft.answers import prompt_ids
from minisft.data.audit import all_findings, stretches
from minisft.data.cache import build_cache
from minisft.data.documents import select_documents, show_document
from minisft.data.kinds import TRAINED
from minisft.data.row_format import FormatOptions
from minisft.data.sources import parse_source
from minisft.data.tokenizer import train_tokenizer
from minisft.samples import read_prompts

TRAINED_ONE = train_tokenizer(["The sky is blue."] * 2, 300)
LLAMA = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
STEPS = {  # name -> (normalizer, pre-tokenizer, decoder)
    "prepend": (
        LLAMA,
        None,
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1)]),
    ),
    "metaspace always": (None, pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()),
    "metaspace first": (None, pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()),
    "byte level": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
    "in a sequence": (
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.Metaspace(prepend_scheme="first", split=False)]
        ),
        decoders.Metaspace(),
    ),
}
TEXTS = [  # (prompt, completion)
    ("The sky is", " blue."),
    ("Answer:\n", "She sold 5."),
    ("Answer: ", "blue."),
    ("a", "\nb"),
    ("", "She sold."),
    ("a<|im_end|>", "b"),
    ("a<|im_end|>", " b"),
    ("a", "b<|im_end|>c<|im_end|> d"),
    ("a", "<|im_end|>b"),
]


def by_characters(name):
    """A tokenizer without merges: the tokens of two texts are those of the one that they make together."""
    normalizer, pre_tokenizer, decoder = STEPS[name]
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), "\u2581", " ", "\n"})
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in ("<|im_start|>", "<|im_end|>")])
    return replace(TRAINED_ONE, backend=backend)


def build(folder, rows, tokenizer, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = FormatOptions(**{"prompt_format": "plain"} | options)
    return build_cache([parse_source(str(path))], tokenizer, cache_dir=folder / "cache", options=options)


def documents_of(cache):
    return [cache.ids[a:b].tolist() for a, b in zip(cache.offsets, cache.offsets[1:])]


@pytest.mark.parametrize("name", STEPS)
def test_an_answer_is_encoded_as_the_continuation_of_its_prompt(tmp_path, name):
    tokenizer = by_characters(name)
    assert tokenizer.has_prefix_space and not TRAINED_ONE.has_prefix_space
    cache = build(tmp_path, [{"prompt": p, "completion": c} for p, c in TEXTS], tokenizer, add_eos=False)
    found = documents_of(cache)
    assert found == [tokenizer.encode(prompt + completion) for prompt, completion in TEXTS]
    trained = [(cache.kinds[a:b] >= TRAINED).argmax() for a, b in zip(cache.offsets, cache.offsets[1:])]
    assert [ids[:n] for ids, n in zip(found, trained)] == [tokenizer.encode(prompt) for prompt, _ in TEXTS]
    assert found[7][-1] != tokenizer.encode("c d")[0]  # the text after a token inside an answer is no start

    pairs = [{"prompt": p, "chosen": c, "rejected": "x"} for p, c in TEXTS if p]
    cache = build(tmp_path, pairs, tokenizer, add_eos=False, answers="pairs")
    assert documents_of(cache)[::2] == [tokenizer.encode(p + c) for p, c in TEXTS if p]

    cache = build(tmp_path, [{"instruction": "a", "output": "b"}], tokenizer, add_eos=False)
    assert documents_of(cache) == [tokenizer.encode("### Instruction:\na\n\n### Response:\nb")]

    rows = [{"prompt": "a", "completion": " b<|im_end|>c"}]
    cache = build(tmp_path, rows, tokenizer, add_eos=False, control_tokens="escape")
    (ids,) = documents_of(cache)
    assert tokenizer.decode(ids).lstrip() == "a b<|im_end|>c" and not tokenizer.special_ids & set(ids)


@pytest.mark.parametrize("name", STEPS)
def test_the_prompt_at_inference_is_that_of_training_and_nothing_else_is_found_or_shown(tmp_path, name):
    tokenizer = by_characters(name)
    bos = tokenizer.backend.token_to_id("<|im_start|>")
    tokenizer = replace(tokenizer, prefix_ids=[bos])
    rows = [{"prompt": p, "completion": c} for p, c in [*TEXTS[:4], ("<|im_start|>The sky", " is")]]
    cache = build(tmp_path, rows, tokenizer)
    options = FormatOptions(prompt_format="plain")
    prompts = read_prompts(str(tmp_path / "rows.jsonl"), tokenizer, options=options, field_map={}, group_field=None)
    for ids, prompt, row in zip(documents_of(cache), prompts, rows, strict=True):
        assert ids[: len(prompt.ids)] == prompt.ids and ids.count(bos) == 1
        assert prompt.ids == prompt_ids(tokenizer, [{"role": "user", "content": row["prompt"]}], "plain")
    documents, _ = select_documents(cache, max_length=None, truncation="right")
    assert not [f for f in all_findings(documents, tokenizer, None, "right") if f.name == "round_trip"]
    assert show_document(documents, 0, tokenizer).endswith("The sky is[ blue.<|im_end|>]")
    shown = stretches(cache, 0, 0, int(cache.offsets[1]), tokenizer, 99)
    assert "".join(s.text for s in shown).endswith("The sky is blue.<|im_end|>")
