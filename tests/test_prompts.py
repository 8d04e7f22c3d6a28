"""The prompt at inference and the token that ends an answer, for templates that leave them open.

The templates are ours (tests/templates), each with the mechanism of a family. The slow test does the same with the collection of
real templates that TRL ships.
"""

import json
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from minisft.data.cache import build_cache
from minisft.data.chat.dialogue import Masking
from minisft.data.chat.inference import CLOSED_THOUGHT, openers, switch_values
from minisft.data.chat.masks import render_conversation
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.chat.template_check import check_template
from minisft.data.encoding import check_chat_template
from minisft.data.kinds import TERMINATOR, TRAINED
from minisft.data.row_format import FormatOptions
from minisft.data.rows import RowError
from minisft.data.sources import parse_source
from minisft.data.tokenizer import Tokenizer, train_tokenizer
from minisft.errors import UserError
from minisft.samples import read_prompts

OURS = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
TRL = find_spec("trl")
THEIRS = sorted((Path(TRL.origin).parent / "chat_templates").glob("*.jinja")) if TRL and TRL.origin else []
TOKENS = (("bos_token", "<bos>"), ("eos_token", "<eos>"))
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}, "id": "call00001"}

ASK = {"role": "user", "content": "A question?"}
PLAIN = {"role": "assistant", "content": "An answer."}
THOUGHT = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "3"}
CONVERSATIONS = {
    "one": [ASK, PLAIN],
    "two": [ASK, PLAIN, ASK, PLAIN],
    "three and a question": [ASK, PLAIN, ASK, THOUGHT, ASK, PLAIN, ASK],
    "system": [{"role": "system", "content": "Be brief."}, ASK, PLAIN],
    "thought": [ASK, THOUGHT],
    "thoughts": [ASK, THOUGHT, ASK, THOUGHT],
    "mixed": [ASK, PLAIN, ASK, THOUGHT],
    "mixed the other way": [ASK, THOUGHT, ASK, PLAIN],
    "call": [ASK, CALLS, RESULT, PLAIN],
    "call at the end": [ASK, CALLS],
    "greeting": [PLAIN, ASK, PLAIN],
    "greeting and system": [{"role": "system", "content": "Be brief."}, PLAIN, ASK, THOUGHT],
}
# Ours that cannot render a conversation, or leave a part of it out, which is refused.
NO_END = {("diffusion_gemma_training", "call at the end")}  # TRL's own; nothing ends a call that nothing follows
NO_CALLS = ("deepseek_r1", "gemma", "llama3", "mistral", "phi3", "smollm", "tulu")
REFUSED = {(name, c) for name in NO_CALLS for c in ("call", "call at the end")}
REFUSED |= {("gemma", c) for c in ("system", "greeting", "greeting and system")}


# How Llama 3 and Qwen cut a text before BPE: newlines are joined with the whitespace before them, whatever follows.
WORDS = tokenizers.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


@cache
def tokenizer_for(text: str) -> Tokenizer:
    """A tokenizer of bytes and the special tokens that a template names, to which two newlines are one token."""
    names = {name for name in re.findall(r"<[^<>\s'\"{}+()]+>", text) if "parameter" not in name}
    names = {name for name in names if name[1] != "/"} | {"<bos>", "<eos>", "<think>", "</think>", "</s>"}
    if "m.role + '|>'" in text:
        names |= {"<|user|>", "<|assistant|>", "<|system|>"}
    size = 256 + len(names) + 3
    tokenizer = train_tokenizer(
        ["\n\n", "\n\n\n"] * 9, size, special_tokens=sorted(names), eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    assert len(tokenizer.encode("a\n\nb")) == 3
    return tokenizer


def stretches(document) -> list[tuple[int, int]]:
    """Where the trained stretches of a document are."""
    on = [False] * (len(document.text) + 2)
    for start, end, byte in document.spans:
        on[start + 1 : end + 1] = [bool(byte & TRAINED)] * (end - start)
    borders = [i for i, (a, b) in enumerate(zip(on, on[1:])) if a != b]
    return list(zip(borders[::2], borders[1::2]))


def prompts_of(template: ChatTemplate, messages: list[dict], tools) -> set[str]:
    """All prompts that the template has for these messages."""
    values = [{}, *({name: value} for name, value in switch_values(template))]
    return {render(template, messages, tools=tools, add_generation_prompt=True, **value) for value in values}


def check(template: ChatTemplate, messages: list[dict], tools: list | None) -> None:
    """Prompt at inference + trained text = rendered conversation, as tokens; what is trained ends in a stop token."""
    tokenizer = tokenizer_for(template.text)
    documents = render_conversation(template, messages, tools=tools)
    greeting = next(i for i, m in enumerate(messages) if m["role"] != "system")
    trained = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if documents[0].has_untrained_greeting:
        trained.remove(greeting)
    found = [(document, *stretch) for document in documents for stretch in stretches(document)]
    assert len(found) == len(trained)
    stops = {tokenizer.backend.id_to_token(i) for i in stop_ids(tokenizer, template)}
    for i, (document, start, end) in zip(trained, found):
        ids = tokenizer.encode(document.text[:end])
        before = tokenizer.encode(document.text[:start])
        assert ids == before + tokenizer.encode(document.text[start:end]), (document.text, start)
        if messages[i]["role"] == "assistant" and not all(m["role"] == "system" for m in messages[:i]):
            prompts = prompts_of(template, messages[:i], tools)
            assert document.text[:start] in prompts, (document.text[:start], prompts)
            default = render(template, messages[:i], tools=tools, add_generation_prompt=True)
            assert document.prompts or document.text[:start] == default  # another prompt is reported
        assert tokenizer.decode(tokenizer.encode(document.text[start:end].rstrip())[-1:]) in stops
        assert messages[i]["content"].strip() in document.text[start:end]
    for document in documents:
        values = [{}, *({name: value} for name, value in switch_values(template))]
        rendered = {render(template, messages[: document.end], tools=tools, **value) for value in values}
        rendered |= {text.rstrip() + opener for text in rendered for opener in openers(template)}
        assert document.text in rendered or CLOSED_THOUGHT in document.prompts


def stop_ids(tokenizer: Tokenizer, template: ChatTemplate) -> set[int]:
    given = Tokenizer(tokenizer.backend, tokenizer.files, dict(tokenizer.special_tokens), template=template)
    check_chat_template(given)
    return given.stop_ids


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
def test_what_is_trained_continues_a_prompt_and_ends_where_generation_stops(path, conversation):
    template = ChatTemplate(path.read_text(encoding="utf-8").rstrip("\n"), TOKENS)
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if "call" in conversation else None
    if (path.stem, conversation) in REFUSED:
        with pytest.raises(RowError):
            render_conversation(template, messages, tools=tools)
        return
    check(template, messages, tools)


def by_hand(name: str, messages: list[dict], **given) -> list[tuple[str, str]]:
    """(untrained text before, trained text) of each document of a conversation with one trained answer in each."""
    template = ChatTemplate((OURS[0].parent / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n"))
    found = [(d, stretches(d)) for d in render_conversation(template, messages, **given)]
    return [(d.text[: places[-1][0]], d.text[slice(*places[-1])]) for d, places in found]


def test_a_thought_that_only_the_prompt_opens_is_closed():
    """As DeepSeek's: thoughts are never rendered, and the prompt ends in <think>."""
    inside = {"role": "assistant", "content": "<think>Two and two.</think>Four."}
    for thought in (THOUGHT, inside):
        assert by_hand("deepseek_r1", [ASK, thought, ASK, PLAIN]) == [
            ("<s><|User|>A question?<|Assistant|><think>\n", "Two and two.\n</think>\n\nFour.</s>"),
            (
                "<s><|User|>A question?<|Assistant|>Four.</s><|User|>A question?<|Assistant|><think>\n",
                "</think>\n\nAn answer.</s>",
            ),
        ]
    stripped = by_hand("deepseek_r1", [ASK, THOUGHT], masking=Masking(reasoning="strip"))
    assert stripped[0][1] == "</think>\n\nFour.</s>"
    masked = by_hand("deepseek_r1", [ASK, THOUGHT], masking=Masking(reasoning="mask"))
    assert masked[0][1].strip() == "Four.</s>"


def test_the_next_turn_s_opener_ends_an_answer():
    """As GLM's, also after the last turn, where it depends on what may follow: a result after a call, else a question."""
    begin = "[gMASK]<sop><|user|>\nA question?<|assistant|>"
    assert by_hand("glm", [ASK, PLAIN]) == [(begin, "\n<think></think>\nAn answer.<|user|>")]
    ((before, after),) = by_hand("glm", [ASK, CALLS], tools=TOOLS)
    assert before == begin and after.endswith("</call><|observation|>")
    template = ChatTemplate((OURS[0].parent / "glm.jinja").read_text(encoding="utf-8").rstrip("\n"))
    (document,) = render_conversation(template, [ASK, CALLS, RESULT, PLAIN, ASK, {**PLAIN, "train": False}])
    trained = [document.text[a:b] for a, b in stretches(document)]
    assert [text[-len("<|observation|>") :] for text in trained] == ["<|observation|>", "\nAn answer.<|user|>"[-15:]]
    assert document.text.endswith("An answer.")  # an untrained answer at the end needs no end
    ends = [document.text[a:b] for a, b, byte in document.spans if byte == TERMINATOR | TRAINED]
    assert ends == ["<|observation|>", "<|user|>"]
    tokenizer = tokenizer_for(template.text)
    found = {tokenizer.backend.id_to_token(i) for i in stop_ids(tokenizer, template)}
    assert found == {"<eos>", "<|user|>", "<|observation|>"}


def test_an_opener_that_opens_answers_too_ends_nothing():
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert openers(template) == ("", "")
    with pytest.raises(UserError, match="does not train the end of an answer"):
        check_template(template, ("<|im_start|>",))


@pytest.mark.parametrize("name, on, off", [("nemotron", "<think>\n", "<think></think>")])
def test_each_answer_takes_the_prompt_that_it_continues_unless_the_user_sets_the_switch(name, on, off):
    text = (OURS[0].parent / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    (document,) = render_conversation(ChatTemplate(text), [ASK, PLAIN, ASK, THOUGHT])
    assert [document.text[:a].endswith(prompt) for (a, _), prompt in zip(stretches(document), (off, on))] == [
        True,
        True,
    ]
    assert document.prompts == {"enable_thinking = false"}
    for value, answer, other in ((True, THOUGHT, PLAIN), (False, PLAIN, THOUGHT)):
        run = ChatTemplate(text, variables=(("enable_thinking", json.dumps(value)),))
        for template, variables in ((run, None), (ChatTemplate(text), {"enable_thinking": value})):
            (document,) = render_conversation(template, [ASK, answer], variables=variables)
            assert document.prompts == frozenset()  # no other was chosen
            with pytest.raises(RowError, match="differently than at inference"):
                render_conversation(template, [ASK, other], variables=variables)


def written(tmp_path, name: str, rows: list[dict], **options):
    """The cache of these rows, and of a tokenizer with this template."""
    text = (OURS[0].parent / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    bare = tokenizer_for(text)
    tokenizer = Tokenizer(bare.backend, bare.files, dict(bare.special_tokens), template=ChatTemplate(text))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache = build_cache([parse_source(str(path))], tokenizer, cache_dir=tmp_path / "cache", **options)
    return cache, tokenizer


@pytest.mark.parametrize("name", ["nemotron", "qwen35", "qwen3", "glm", "deepseek_r1"])
def test_a_held_out_prompt_is_the_one_that_its_answer_was_trained_after(name, tmp_path):
    """With and without a thought, which another value of the template's switch asks for."""
    rows = [{"messages": [*before, answer]} for answer in (PLAIN, THOUGHT) for before in ([ASK], [ASK, PLAIN, ASK])]
    for number, row in enumerate(rows):
        folder = tmp_path / str(number)
        folder.mkdir()
        cache, tokenizer = written(folder, name, [row])
        options = FormatOptions()
        given = {"options": options, "field_map": {}, "group_field": None}
        (prompt,) = read_prompts(str(folder / "rows.jsonl"), tokenizer, **given)
        ids = cache.ids[cache.offsets[-2] : cache.offsets[-1]].tolist()  # the document of the last answer
        assert ids[: len(prompt.ids)] == prompt.ids
        kinds = cache.kinds[cache.offsets[-2] : cache.offsets[-1]]
        assert kinds[len(prompt.ids)] & TRAINED and not kinds[len(prompt.ids) - 1] & TRAINED


def test_rows_with_another_prompt_are_counted(tmp_path):
    rows = [{"messages": [ASK, answer]} for answer in (PLAIN, PLAIN, THOUGHT)]
    cache, _ = written(tmp_path, "nemotron", rows)
    line = "2 rows have answers that continue another prompt than the template's default: enable_thinking = false"
    assert line in cache.describe()
    cache, _ = written(tmp_path, "deepseek_r1", rows)
    assert any(line.startswith("3 rows") and line.endswith(CLOSED_THOUGHT) for line in cache.describe())
    cache, _ = written(tmp_path, "qwen3", rows)
    assert not any("another prompt" in line for line in cache.describe())


def test_the_answers_of_a_pair_continue_one_prompt(tmp_path):
    rows = [
        {"prompt": [ASK], "chosen": [a], "rejected": [b]}
        for a, b in ((PLAIN, {**PLAIN, "content": "No."}), (PLAIN, THOUGHT))
    ]
    options = FormatOptions(answers="pairs")
    cache, _ = written(tmp_path, "nemotron", rows, options=options, on_bad_row="skip")
    assert cache.manifest["sources"][0]["dropped"] == {"answers to different prompts": 1}
    assert len(cache.source) == 2
    # To KTO each answer is one alone. All four have the answer of another row beside them.
    cache, _ = written(tmp_path, "nemotron", rows, options=FormatOptions(answers="labels"))
    assert cache.manifest["sources"][0]["rows_used"] == 2 and len(cache.source) == 8


def test_too_long_conversations_lose_their_oldest_turns_all_the_same(tmp_path):
    """A document of one answer, rendered again without earlier turns, is the one of the shorter conversation."""
    for name in ("deepseek_r1", "glm", "nemotron", "qwen3", "qwen35"):
        short, tokenizer = written(tmp_path, name, [{"messages": [ASK, THOUGHT]}])
        long, _ = written(
            tmp_path,
            name,
            [{"messages": [ASK, PLAIN] * 3 + [ASK, THOUGHT]}],
            options=FormatOptions(turns_max_length=len(short.ids)),
        )
        last = slice(*long.offsets[-2:])
        assert long.ids[last].tolist() == short.ids.tolist(), name
        assert long.kinds[last].tolist() == short.kinds.tolist(), name


@pytest.mark.slow
@pytest.mark.skipif(not THEIRS, reason="TRL is not installed")
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("path", THEIRS, ids=lambda path: path.stem)
def test_the_same_with_real_templates(path, conversation):
    template = ChatTemplate(path.read_text(encoding="utf-8"), TOKENS, date="2026-01-01")
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if "call" in conversation else None
    try:
        rendered = render(template, messages)
    except RowError:
        return  # it refuses the conversation
    parts = [m["content"].strip() for m in messages] + ["add"] * bool(tools)
    if not all(part in rendered for part in parts):
        with pytest.raises(RowError):  # it leaves out a content, or a call
            render_conversation(template, messages, tools=tools)
        return
    if (path.stem, conversation) not in NO_END:
        check(template, messages, tools)
