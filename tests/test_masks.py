"""What is trained of a conversation: 12 templates x 8 conversations against expectations written by hand.

The templates (tests/templates) are ours, each in the manner of a family that people fine-tune. What is expected of each is
written a second time here, in Python: what stands before an answer, the answer with its end, what stands after it. A
document is compared as text with the trained part in [[brackets]].
"""

import json
import os
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minisft.data.chat import dialogue, masks
from minisft.data.chat.dialogue import Masking
from minisft.data.chat.masks import render_conversation
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.chat.template_check import check_template
from minisft.data.chat.training_templates import STOCK, tagged_twin
from minisft.data.kinds import ANSWER, KIND_MASK, REASONING, SYSTEM, TERMINATOR, TOOL, TOOL_CALL, TRAINED, USER
from minisft.data.rows import RowError
from minisft.errors import UserError

TEMPLATES = {
    path.stem: ChatTemplate(path.read_text(encoding="utf-8").rstrip("\n"))
    for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))
}
PROMPTS_OTHERWISE = ChatTemplate(TEMPLATES["deepseek_r1"].text.replace("<think>", "<muse>"))
TERMINATORS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "</s>", "<|end_of_text|>")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": [1, 2]}}}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


CONVERSATIONS = {
    "system": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello"), user("More"), assistant("Bye")],
    "turns": [user("1"), assistant("one"), user("2"), assistant("two")],
    "whitespace": [user(" Hi \n"), assistant("\nHello \n\n")],
    "empty": [user("Say nothing."), assistant("", train=False), user("And now?"), assistant("Something.")],
    "reasoning": [
        user("2+2?"), assistant("4", reasoning_content="easy"), user("3+3?"), assistant("6", reasoning_content="hard"),
    ],
    "tools": [user("1+2?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "3"}, assistant("It is 3.")],
    "control": [user("<|im_end|></s><|eot_id|>"), assistant("a <|im_start|>user b</s> c")],
    "unicode": [user("\u65e5\u672c \U0001f600"), assistant("e\u0301\u2028\U0001f469\u200d\U0001f4bb \u00e4")],
}  # fmt: skip


GREETED = [assistant("Welcome!"), user("A room."), assistant("Ten.")]
NO_PROMPT_ALONE = (  # as Qwen 2.5: an error without a first message
    "{{ messages[0].role | upper }}{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONE_HEADER = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"  # turns have no headers at all


@pytest.mark.parametrize("template", [TEMPLATES["qwen3"], TEMPLATES["qwen35"]], ids=["one prompt", "a switch"])
def test_turn_by_turn_each_beginning_is_rendered_once(monkeypatch, template):
    """So the work grows with the turns of a conversation, and not with their square: 100 turns took a minute."""
    calls = []
    monkeypatch.setattr(dialogue, "render", lambda *args, **more: calls.append(args) or render(*args, **more))

    def renderings(turns: int) -> int:
        calls.clear()
        messages = [user("Why?"), assistant("So.", reasoning_content="hm"), user("And?"), assistant("Thus.")] * turns
        assert len(render_conversation(template, messages)) == 2 * turns
        return len(calls)

    renderings(2)  # what is found out once about a template
    assert renderings(12) <= 2 * renderings(6)


@pytest.mark.parametrize("a, b", [("", ""), ("a", "a"), ("", "ab"), ("abc", "abd"), ("xbc", "abd"), ("ab", "abc")])
def test_where_two_texts_differ(a, b):
    assert dialogue.first_difference(a, b) == dialogue.first_difference(b, a) == len(os.path.commonprefix([a, b]))


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize(
    "template, trained, is_context",
    [
        *[
            (name, ["Welcome!", "Ten."], False)
            for name in ("chatml", "granite", "llama3", "llama31_tools", "phi3", "tulu")
        ],
        *[(name, ["Welcome!", "Ten."], False) for name in ("smollm", "tagged_macro", "qwen3", NO_PROMPT_ALONE)],
        *[(name, ["Ten."], True) for name in ("mistral", ONE_HEADER)],
    ],
)
def test_a_conversation_may_begin_with_the_assistant(template, trained, is_context, system):
    """Its first turn is trained from the end of its header to the end of its turn, or is context; never an error of Jinja."""
    template = TEMPLATES.get(template) or ChatTemplate(template)
    messages = [{"role": "system", "content": "S"}, *GREETED][not system :]
    documents = render_conversation(template, messages)
    assert [d.has_untrained_greeting for d in documents] == [is_context] * len(documents)
    texts = [text for d in documents for text in bracketed(d).split("[[")[1:]]
    thought = "<think>\n\n</think>\n\n"
    texts = [text.partition("]]")[0].removeprefix(thought).strip() for text in texts]
    assert [text.partition("<")[0] for text in texts] == trained and all(text.endswith(">") for text in texts)
    (alone,) = render_conversation(template, messages[: -len(GREETED) + 1])
    assert any(byte & TRAINED for _, _, byte in alone.spans) != is_context == alone.has_untrained_greeting
    silent = render_conversation(template, [*messages[: -len(GREETED)], {**GREETED[0], "train": False}, *GREETED[1:]])
    assert "Welcome!]]" not in "".join(map(bracketed, silent)) and not silent[0].has_untrained_greeting


def test_a_template_that_refuses_a_greeting_says_so():
    with pytest.raises(RowError, match="refuses the conversation that begins with the assistant: TemplateError"):
        render_conversation(TEMPLATES["gemma"], GREETED)
    wanted = [{**GREETED[0], "train": True}, *GREETED[1:]]
    with pytest.raises(RowError, match="the first turn cannot be trained: no header before the first turn: message 0"):
        render_conversation(TEMPLATES["mistral"], wanted)


# ------------------------------------------------------------------------------------------------- written by hand


def calls(message: dict, before: str, after: str) -> str:
    return "".join(before + json.dumps(call["function"]) + after for call in message.get("tool_calls", []))


def chatml(m, i, messages):
    return f"<|im_start|>{m['role']}\n", m["content"] + calls(m, "<call>", "</call>") + "<|im_end|>", "\n"


def qwen3(m, i, messages):
    before, text, after = chatml(m, i, messages)
    last_question = max(n for n, other in enumerate(messages) if other["role"] == "user")
    thought = m.get("reasoning_content", "")
    if m["role"] == "assistant" and i > last_question and (thought or i == len(messages) - 1):
        text = f"<think>\n{thought}\n</think>\n\n" + text
    return before, text, after


def llama3(m, i, messages):
    start = "<|begin_of_text|>" if i == 0 else ""
    return f"{start}<|start_header_id|>{m['role']}<|end_header_id|>\n\n", m["content"].strip() + "<|eot_id|>", ""


def llama31_tools(m, i, messages):
    role = {"tool": "ipython"}.get(m["role"], m["role"])
    text = m["content"].strip()
    if m.get("tool_calls"):
        text = '{"name": "add", "parameters": {"x": [1, 2]}}'
    start = ""
    if i == 0:
        start = "<|begin_of_text|>"
        tools = json.dumps(TOOLS[0]) + "\n" if any(other.get("tool_calls") for other in messages) else ""
        if role != "system":
            start += f"<|start_header_id|>system<|end_header_id|>\n\n{tools}<|eot_id|>"
    return f"{start}<|start_header_id|>{role}<|end_header_id|>\n\n", text + "<|eot_id|>", ""


def gemma(m, i, messages):
    role = {"assistant": "model"}.get(m["role"], m["role"])
    return ("<bos>" if i == 0 else "") + f"<start_of_turn>{role}\n", m["content"].strip() + "<end_of_turn>", "\n"


def phi3(m, i, messages):
    # The last answer ends in <|end|>, a newline and <|endoftext|>: the model is to say all three.
    is_last = i == len(messages) - 1
    return (
        f"<|{m['role']}|>\n",
        m["content"] + "<|end|>" + ("\n<|endoftext|>" if is_last else ""),
        "" if is_last else "\n",
    )


def mistral(m, i, messages):
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    last_question = max(n for n, other in enumerate(messages) if other["role"] == "user")
    start = "<s>" if i == 0 else ""
    if m["role"] == "system":
        return start, "", ""
    if m["role"] == "user":
        return start + "[INST] ", (system if i == last_question else "") + m["content"] + "[/INST]", ""
    return "", " " + m["content"].strip() + "</s>", ""


def tulu(m, i, messages):
    end = "</s>" if m["role"] == "assistant" else ""
    return f"<|{m['role']}|>\n", m["content"] + end, "" if i == len(messages) - 1 else "\n"


def granite(m, i, messages):
    return (
        f"<|start_of_role|>{m['role']}<|end_of_role|>",
        m["content"] + calls(m, "<|tool_call|>", "") + "<|end_of_text|>",
        "\n",
    )


def smollm(m, i, messages):
    start = "<|im_start|>system\nYou are helpful.<|im_end|>\n" if i == 0 and m["role"] != "system" else ""
    return f"{start}<|im_start|>{m['role']}\n", m["content"] + "<|im_end|>", "\n"


def tagged_macro(m, i, messages):
    start = "<s>" if i == 0 else ""
    if m["role"] != "assistant":
        return f"{start}{m['role'][0].upper()}: ", m["content"].strip(), "\n"
    return (
        "A: ",
        m["content"].strip()
        + calls({**m, "tool_calls": []}, "", "")
        + "<call>add</call>" * len(m.get("tool_calls", []))
        + "</s>",
        "\n",
    )


BY_HAND = {
    f.__name__: f
    for f in (chatml, qwen3, llama3, llama31_tools, gemma, phi3, mistral, tulu, granite, smollm, tagged_macro)
}
# These leave tool calls out: only the end of the turn would be trained.
NO_CALLS = ("llama3", "gemma", "phi3", "mistral", "tulu", "smollm")
# How each row is rendered where it is not one document: "turns" = one for each answer, else why it is refused.
EXCEPTIONS = {
    ("qwen3", "system"): "turns",  # an earlier answer loses its empty <think> block
    ("qwen3", "turns"): "turns",
    ("qwen3", "reasoning"): "turns",  # ... or its reasoning
    ("qwen3", "tools"): "turns",
    ("phi3", "system"): "turns",  # only the last answer is followed by <|endoftext|>
    ("phi3", "turns"): "turns",
    ("phi3", "reasoning"): "turns",
    ("mistral", "system"): "turns",  # the system text moves to the last question
    ("gemma", "system"): "no system turns",
}


def by_hand(name: str, messages: list[dict], how: str) -> list[str]:
    """The documents of a conversation, what is trained in [[brackets]]."""
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
    if how != "turns":
        return [compose(name, messages, answers)]
    return [compose(name, messages[: i + 1], [i]) for i in answers]


def compose(name: str, messages: list[dict], trained: list[int]) -> str:
    parts = [BY_HAND[name](m, i, messages) for i, m in enumerate(messages)]
    return "".join(a + (f"[[{b}]]" if i in trained else b) + c for i, (a, b, c) in enumerate(parts))


def bracketed(document) -> str:
    on = [False] * len(document.text)
    for start, end, byte in document.spans:
        on[start:end] = [bool(byte & TRAINED)] * (end - start)
    shown, before = "", False
    for character, now in zip(document.text, on):
        shown += ("[[" if now else "]]") * (now != before) + character
        before = now
    return shown + "]]" * before


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", BY_HAND)
def test_masks_are_those_written_by_hand(name, conversation):
    messages = CONVERSATIONS[conversation]
    tools = TOOLS if conversation == "tools" else None
    how = EXCEPTIONS.get((name, conversation), "one")
    if how not in ("one", "turns"):
        with pytest.raises(RowError, match=how):
            render_conversation(TEMPLATES[name], messages, tools=tools)
        return
    if conversation == "tools" and name in NO_CALLS:
        with pytest.raises(RowError, match="the chat template omits a tool call"):
            render_conversation(TEMPLATES[name], messages, tools=tools)
        return
    documents = render_conversation(TEMPLATES[name], messages, tools=tools)
    assert [bracketed(document) for document in documents] == by_hand(name, messages, how)
    assert {document.strategy for document in documents} == {
        "per_turn" if how == "turns" else "tags" if name == "tagged_macro" else "prefix"
    }


@pytest.mark.parametrize(
    "turn", ["{{ m.content }}", "{{ m.content }}{{ (m.tool_calls or [''])[0] }}"], ids=["none", "the first"]
)
@pytest.mark.parametrize("said", ["", "I add, and add again."])
def test_a_call_that_is_only_named_in_the_answer_is_an_omitted_one(turn, said):
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>"
        + turn
        + "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(RowError, match="the chat template omits a tool call: of 'add'"):
        render_conversation(template, [user("1+2?"), assistant(said, tool_calls=[CALL, CALL])], tools=TOOLS)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_template_that_prompts_otherwise_than_it_renders_is_refused(conversation):
    """In the manner of DeepSeek R1's, but with a thought of another name (test_prompts.py has the one that is known)."""
    with pytest.raises(RowError, match="differently than at inference: message . before its answer"):
        render_conversation(PROMPTS_OTHERWISE, CONVERSATIONS[conversation])


def test_joint_refuses_where_turns_are_needed():
    for (name, conversation), how in EXCEPTIONS.items():
        if how == "turns":
            with pytest.raises(RowError, match="differently than at inference"):
                render_conversation(TEMPLATES[name], CONVERSATIONS[conversation], masking=Masking(multi_turn="joint"))


def test_joint_takes_the_tags_of_a_template_at_their_word():
    """The last answer is rendered otherwise than an earlier one, so that the text is not what inference gives for both."""
    template = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ '!' if loop.last }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = CONVERSATIONS["turns"]
    (joint,) = render_conversation(template, messages, masking=Masking(multi_turn="joint"))
    assert bracketed(joint) == "<user>1<assistant>[[one</s>]]<user>2<assistant>[[two!</s>]]"
    first, second = render_conversation(template, messages)
    assert bracketed(first) == "<user>1<assistant>[[one!</s>]]"
    assert bracketed(second).endswith("<user>2<assistant>[[two!</s>]]")


@pytest.mark.parametrize("name", TEMPLATES)
def test_byte_equal_to_transformers(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    for messages in CONVERSATIONS.values():
        clean = [{k: v for k, v in m.items() if k != "train"} for m in messages]
        for prompt in (False, True):
            try:
                ours = render(TEMPLATES[name], clean, tools=TOOLS, add_generation_prompt=prompt)
            except RowError:
                continue
            expected, _ = render_jinja_template(
                [clean], tools=TOOLS, chat_template=TEMPLATES[name].text, add_generation_prompt=prompt
            )
            assert ours == expected[0]


@pytest.mark.parametrize("name", BY_HAND)
def test_good_templates_pass_the_start_up_check(name):
    check_template(TEMPLATES[name], TERMINATORS)


def test_bad_templates_are_told_at_the_start():
    with pytest.raises(UserError, match="cannot render one question and its answer"):
        check_template(PROMPTS_OTHERWISE, TERMINATORS)
    no_end = ChatTemplate("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
                          "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")  # fmt: skip
    with pytest.raises(UserError, match="does not train the end of an answer"):
        check_template(no_end, TERMINATORS)


# ------------------------------------------------------------------------------------------------- twins of stock templates


@pytest.mark.skipif("MINISFT_STOCK_TEMPLATES" not in os.environ, reason="no folder of stock templates is given")
def test_twins_render_as_the_stock_templates():
    """On a folder of stock templates: each twin renders the same bytes wherever the stock one is well-behaved, and masks
    the same answers as prefix differences do."""
    known = 0
    tokens = (("bos_token", "<bos>"), ("eos_token", "<eos>"))
    for path in sorted(Path(os.environ["MINISFT_STOCK_TEMPLATES"]).glob("*.jinja")):
        stock = ChatTemplate(path.read_text(encoding="utf-8"), tokens)
        if tagged_twin(stock.text) is None:
            continue
        known += 1
        for name in ("system", "turns", "whitespace", "control", "unicode"):
            try:
                rendered = render(stock, CONVERSATIONS[name])
            except RowError:
                continue  # Gemma 1 takes no system turn
            (document,) = render_conversation(stock, CONVERSATIONS[name])
            assert document.strategy == "known" and document.text == rendered, path.name
            turns = render_conversation(stock, CONVERSATIONS[name], masking=Masking(multi_turn="per_turn"))
            for ours, alone in zip(trained(document), turns, strict=True):
                assert trained(alone)[0].startswith(ours) and trained(alone)[0][len(ours) :].strip() in ("", "<eos>")
    assert known == len(STOCK)


def test_a_twin_is_used_only_where_it_renders_the_same(monkeypatch):
    """Here the twin of a template that treats one question in its own way."""
    text = TEMPLATES["granite"].text.replace("+ m.content }}", "+ m.content + ('!' if m.content == '2' else '') }}")
    twin = (
        "{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{- m.content + '<|end_of_text|>' }}{% endgeneration %}{% else %}{{- m.content + '<|end_of_text|>' }}"
        "{% endif %}{{- '\n' }}{%- endfor %}"
    )
    monkeypatch.setattr(masks, "tagged_twin", lambda stock: twin if stock == text else None)
    template = ChatTemplate(text)
    strategies = {}
    for name in ("system", "turns", "whitespace"):
        (document,) = render_conversation(template, CONVERSATIONS[name])
        strategies[name] = document.strategy
        assert document.text == render(template, CONVERSATIONS[name])
        assert all(part.endswith("<|end_of_text|>") for part in trained(document))
    assert strategies == {"system": "known", "turns": "prefix", "whitespace": "known"}


# ------------------------------------------------------------------------------------------------- tags that go wrong


def tagged(question: str = "false", answer: str = "false", header: str = "false") -> ChatTemplate:
    """A template with tags around its answers. Three conditions on the number n of a message: whether a question, or an
    answer, ends in an exclamation mark, and whether the tags hold the header of an answer too."""
    return ChatTemplate(
        "{% for m in messages %}{% set n = loop.index0 %}{% if m.role == 'assistant' %}"
        "{% if " + header + " %}{% generation %}<assistant>{{ m.content }}</s>{% endgeneration %}{% else %}"
        "<assistant>{% generation %}{{ m.content }}{{ '!' if " + answer + " }}</s>{% endgeneration %}{% endif %}"
        "{% else %}<{{ m.role }}>{{ m.content }}{{ '!' if " + question + " }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


TURNS = [user("1"), assistant("one"), user("2"), assistant("two"), user("3"), assistant("three")]


@pytest.mark.parametrize("messages", [TURNS, [*TURNS, user("4")]], ids=["ends in an answer", "ends in a question"])
@pytest.mark.parametrize("kind", ["answer", "question", "header"])
def test_every_turn_is_trained_as_at_inference_wherever_tags_go_wrong(messages, kind):
    """A template that renders one turn in another way once messages follow it. Each of the turns in its place."""
    for i in (1, 3, 5):
        followed = f"messages | length > {i + 1}"
        n = i - 1 if kind == "question" else i
        template = tagged(**{kind: f"n == {n} and {followed}"})
        documents = render_conversation(template, messages)
        assert [text for document in documents for text in trained(document)] == ["one</s>", "two</s>", "three</s>"]
        for n, message in enumerate(messages):
            if message["role"] == "assistant":
                seen = render(template, messages[:n], add_generation_prompt=True) + message["content"] + "</s>"
                assert any(document.text.startswith(seen) for document in documents), (i, n)


def test_tags_that_hold_the_header_of_a_later_answer_are_refused_at_the_start():
    check_template(tagged(), TERMINATORS)
    with pytest.raises(UserError, match="trains the header of an answer"):
        check_template(tagged(header="n == 3"), TERMINATORS)


@pytest.mark.parametrize("name", ["chatml", "llama3", "granite", "smollm", "tagged_macro", "tulu"])
def test_everything_but_the_messages_that_say_no_is_trained(name):
    messages = TURNS[:4]
    for flags in product([True, False], repeat=4):
        flagged = [{**m, "train": on} for m, on in zip(messages, flags)]
        (document,) = render_conversation(TEMPLATES[name], flagged, masking=Masking("all"))
        expected = ""
        for i, (m, on) in enumerate(zip(messages, flags)):
            before, text, after = BY_HAND[name](m, i, messages)
            if not on:  # the end of an answer belongs to it, that of a question to the template
                text = "" if m["role"] == "assistant" else text.replace(m["content"], "", 1)
            expected += before + text + after
        assert "".join(trained(document)) == expected, flags


# ------------------------------------------------------------------------------------------------- kinds


def kinds(document) -> list[tuple[str, int]]:
    bytes_ = [0] * len(document.text)
    for start, end, byte in document.spans:
        bytes_[start:end] = [byte & KIND_MASK] * (end - start)
    borders = [0, *(i for i, (a, b) in enumerate(pairwise(bytes_), 1) if a != b), len(bytes_)]
    return [(document.text[a:b], bytes_[a]) for a, b in pairwise(borders)]


def test_kinds_of_everything():
    (document,) = render_conversation(TEMPLATES["granite"], CONVERSATIONS["tools"], tools=TOOLS)
    found = kinds(document)
    call = '<|tool_call|>{"name": "add", "arguments": {"x": [1, 2]}}'
    assert [pair for pair in found if pair[1] in (USER, TOOL_CALL, TOOL, ANSWER, TERMINATOR)] == [
        ("1+2?", USER), (call, TOOL_CALL), ("<|end_of_text|>", TERMINATOR), ("3", TOOL), ("It is 3.", ANSWER),
        ("<|end_of_text|>", TERMINATOR),
    ]  # fmt: skip
    both = [user("1+2?"), assistant("I add.", tool_calls=[CALL])]  # an answer and a call in one turn
    (document,) = render_conversation(TEMPLATES["granite"], both, tools=TOOLS)
    assert kinds(document)[-4:-1] == [("I add.", ANSWER), (call, TOOL_CALL), ("<|end_of_text|>", TERMINATOR)]
    last = render_conversation(TEMPLATES["qwen3"], CONVERSATIONS["reasoning"])[-1]
    assert ("<think>\nhard\n</think>", REASONING) in kinds(last)
    (document,) = render_conversation(TEMPLATES["llama3"], CONVERSATIONS["system"])
    assert ("Be brief.", SYSTEM) in kinds(document)


def test_reasoning_is_trained_masked_or_stripped():
    messages = CONVERSATIONS["reasoning"][2:]
    said = {}
    for how in ("train", "mask", "strip"):
        (document,) = render_conversation(TEMPLATES["qwen3"], messages, masking=Masking(reasoning=how))
        said[how] = bracketed(document).partition("<|im_start|>assistant\n")[2]
    assert said["train"] == "[[<think>\nhard\n</think>\n\n6<|im_end|>]]\n"
    assert said["mask"] == "<think>\nhard\n</think>[[\n\n6<|im_end|>]]\n"
    assert "hard" not in said["strip"] and said["strip"].endswith("6<|im_end|>]]\n")
    inline = [user("2+2?"), assistant("<think>\neasy\n</think>\n\n4")]
    (document,) = render_conversation(TEMPLATES["chatml"], inline, masking=Masking(reasoning="mask"))
    assert bracketed(document).endswith("<think>\neasy\n</think>[[\n\n4<|im_end|>]]\n")
    (document,) = render_conversation(TEMPLATES["chatml"], inline, masking=Masking(reasoning="strip"))
    assert bracketed(document).endswith("assistant\n[[4<|im_end|>]]\n")


# ------------------------------------------------------------------------------------------------- properties

TEXT = st.text(st.sampled_from("ab <>|/\n\u00e4\U0001f600"), min_size=1, max_size=8).filter(str.strip)
JOINT = ("chatml", "llama3", "granite", "smollm", "tagged_macro", "tulu")


@st.composite
def conversations(draw) -> list[dict]:
    system = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    count = draw(st.integers(1, 3))
    return system + [m for _ in range(count) for m in (user(draw(TEXT)), assistant(draw(TEXT)))]


def trained(document) -> list[str]:
    return [part.partition("]]")[0] for part in bracketed(document).split("[[")[1:]]


@given(st.sampled_from(JOINT), conversations(), st.sampled_from(["assistant", "last", "all"]))
@settings(max_examples=150, deadline=None)
def test_joint_and_turn_by_turn_train_the_same(name, messages, train_on):
    template = TEMPLATES[name]
    (joint,) = render_conversation(template, messages, masking=Masking(train_on))
    assert joint.spans[0][:2] == (0, len(joint.text))  # everything has a kind
    assert joint.text == render(template, messages)
    if train_on == "all":
        assert trained(joint) == [joint.text]
        return
    turns = render_conversation(template, messages, masking=Masking(train_on, multi_turn="per_turn"))
    assert trained(joint) == [text for document in turns for text in trained(document)]
    for document in turns:
        prompt = render(template, messages[: document.end - 1], add_generation_prompt=True)
        assert document.text.startswith(prompt + trained(document)[0])  # exactly what inference continues
        answer = messages[document.end - 1]["content"]
        assert answer.strip() in trained(document)[0]


@given(st.sampled_from(JOINT), conversations(), st.data())
@settings(max_examples=100, deadline=None)
def test_flags_and_weights_of_messages(name, messages, data):
    flags = [data.draw(st.sampled_from([None, True, False])) for _ in messages]
    weights = [data.draw(st.sampled_from([1.0, 0.5])) for _ in messages]
    flagged = [
        {**m, **({} if flag is None else {"train": flag}), "weight": weight}
        for m, flag, weight in zip(messages, flags, weights)
    ]
    wanted = [m["role"] == "assistant" if flag is None else flag for m, flag in zip(messages, flags)]
    assume(any(wanted))
    (document,) = render_conversation(TEMPLATES[name], flagged)
    (plain,) = render_conversation(TEMPLATES[name], messages)
    assert document.text == plain.text
    parts = trained(document)
    told = [m["content"].strip() for m, on in zip(messages, wanted) if on]
    assert all(a in "".join(parts) for a in told) and bool(parts) == any(wanted)
    assert len(document.weights) == sum(on and weight != 1.0 for on, weight in zip(wanted, weights))


FLAG = st.sampled_from([None, True, False])


@st.composite
def conversations_in_parts(draw) -> tuple[list[dict], list[tuple[str, bool]]]:
    """(messages, whose contents consist of parts with and without `train`; each part's text and whether it is trained)."""
    messages, parts = [], []
    for i in range(2 * draw(st.integers(1, 3))):
        flag, content, spans = draw(FLAG), "", []
        for _ in range(draw(st.integers(1, 2))):
            said, on = f"word{len(parts)}.", draw(FLAG)
            spans += [] if on is None else [(len(content), len(content) + len(said), on)]
            content += said
            parts.append((said, on, flag, i % 2 == 1))
        messages.append([user, assistant][i % 2](content) | ({} if flag is None else {"train": flag}))
        messages[-1] |= {"part_spans": spans} if spans else {}
    return messages, parts


@given(
    st.sampled_from([*JOINT, "qwen3", "qwen35"]),
    conversations_in_parts(),
    st.sampled_from(["assistant", "all"]),
    st.sampled_from(["auto", "per_turn"]),
)
@settings(max_examples=150, deadline=None)
def test_a_part_is_trained_once_or_never_however_turns_are_found(name, drawn, train_on, multi_turn):
    messages, parts = drawn
    try:
        documents = render_conversation(TEMPLATES[name], messages, masking=Masking(train_on, multi_turn))
    except RowError:  # a template that renders turns differently, and a part that is trained outside of an answer, say
        assume(False)
    told = "".join(text for document in documents for text in trained(document))
    for said, on, of_message, is_answer in parts:
        rule = is_answer or train_on == "all" if of_message is None else of_message
        assert told.count(said) == (rule if on is None else on), said


@pytest.mark.parametrize("name", ["chatml", "smollm", "qwen3"])
def test_reasoning_is_masked_also_where_everything_else_is_trained(name):
    messages = [user("2+2?"), assistant("<think>\neasy\n</think>\n\n4")]
    (document,) = render_conversation(TEMPLATES[name], messages, masking=Masking("all", reasoning="mask"))
    assert "easy" in document.text and "easy" not in "".join(trained(document)) and "2+2?" in trained(document)[0]


def test_what_is_not_trained_must_be_found_where_everything_else_is():
    """Qwen 3 drops a reasoning of earlier turns, so their places cannot be found exactly."""
    says_no = [{"train": False}, {"part_spans": [(0, 1, False)]}]
    for more in says_no:
        messages = [user("1"), assistant("one", **more), user("2"), assistant("two")]
        with pytest.raises(RowError, match="differently"):
            render_conversation(TEMPLATES["qwen3"], messages, masking=Masking("all"))
    lost = ChatTemplate(
        "{% for m in messages %}<{{ m.role }}>{{ '!' if m.content[0] == 'H' }}{{ m.content }}</s>{% endfor %}"
    )
    with pytest.raises(RowError, match="place of a message"):
        messages = [{**user("Hi"), "train": False}, assistant("Hello")]
        render_conversation(lost, messages, masking=Masking("all"))


DROPS_THOUGHTS = ChatTemplate(  # as DeepSeek V3
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("reasoning", ["train", "mask", "strip"])
@pytest.mark.parametrize("name", ["qwen3", "chatml", "smollm", "granite", "drops"])
def test_reasoning_that_is_not_rendered_is_known_wherever_it_stands(name, reasoning, inline):
    said = assistant("<think>\neasy\n</think>\n\n4") if inline else assistant("4", reasoning_content="easy")
    template = TEMPLATES.get(name, DROPS_THOUGHTS)
    (document,) = render_conversation(template, [user("2+2?"), said], masking=Masking(reasoning=reasoning))
    assert document.lost_reasoning == (reasoning != "strip" and "easy" not in document.text)
    assert ("easy" in "".join(trained(document))) == (reasoning == "train" and "easy" in document.text)


def test_a_thought_behind_an_empty_one_is_masked():
    (document,) = render_conversation(
        TEMPLATES["qwen3"], [user("2+2?"), assistant("<think>\neasy\n</think>\n\n4")], masking=Masking(reasoning="mask")
    )
    assert document.text.count("</think>") == 2 and trained(document) == ["\n\n4<|im_end|>"]


@given(
    st.sampled_from(["chatml", "llama3", "granite", "tulu", "tagged_macro"]),
    st.sampled_from(["train", "mask", "strip"]),
    st.lists(st.tuples(st.booleans(), st.sampled_from(["", " ", "\n\n"])), min_size=1, max_size=5),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_reasoning_anywhere_in_a_content(name, how, pieces, opened):
    """Words are trained; reasoning, which may begin an answer without its <think>, is trained, masked or removed."""
    said = ""
    for i, (is_thought, space) in enumerate(pieces):
        said += space + (f"<think>thought{i}</think>" if is_thought else f"word{i}.")
    if pieces[0][0] and not opened:
        said = said.replace("<think>", "", 1)
    messages = [user("Why?"), assistant(said)]
    if how == "strip" and all(is_thought for is_thought, _ in pieces):
        with pytest.raises(RowError, match="empty answer"):
            render_conversation(TEMPLATES[name], messages, masking=Masking(reasoning=how))
        return
    (document,) = render_conversation(TEMPLATES[name], messages, masking=Masking(reasoning=how))
    told = "".join(trained(document))
    for i, (is_thought, _) in enumerate(pieces):
        assert (f"word{i}." in told) != is_thought and (f"thought{i}" in told) == (is_thought and how == "train")
        assert (f"thought{i}" in document.text) == (is_thought and how != "strip")
    assert "think>" not in told or how == "train"


def test_what_is_around_a_removed_thought_stays_apart():
    said = {
        "a <think>t</think> b": "a b",
        "a\n<think>t</think>\n\nb": "a\n\nb",
        "t</think>\n\nb": "b",
        "a <think>t</think>\n": "a",
    }
    for before, after in said.items():
        (document,) = render_conversation(
            TEMPLATES["chatml"], [user("q"), assistant(before)], masking=Masking(reasoning="strip")
        )
        assert trained(document) == [f"{after}<|im_end|>"]


def test_a_thought_without_its_opening_tag_follows_a_prompt_that_opens_it():
    whole, rest = (
        render_conversation(TEMPLATES["deepseek_r1"], [user("q"), assistant(said)])
        for said in ("<think>\nt\n</think>\n\nb", "t\n</think>\n\nb")
    )
    assert whole == rest and trained(rest[0])[0].startswith("t\n</think>\n\nb")


@pytest.mark.parametrize("name", ["llama3", "tulu", "tagged_macro", "chatml", "qwen3", "deepseek_r1", "glm", "granite"])
@pytest.mark.parametrize("reasoning, answer", [("four", "four"), ("four", "It is four, I think."), ("t", "It")])
@pytest.mark.parametrize("how", ["train", "mask"])
def test_an_answer_may_repeat_its_reasoning(name, reasoning, answer, how):
    messages = [user("2+2?"), assistant(answer, reasoning_content=reasoning)]
    (document,) = render_conversation(TEMPLATES[name], messages, masking=Masking(reasoning=how))
    without = [user("2+2?"), assistant(answer)]
    (plain,) = render_conversation(TEMPLATES[name], without)
    assert document.lost_reasoning == (document.text == plain.text)
    (told,) = trained(document)
    assert answer in told and (
        how == "train" or told.count(reasoning) == f"{answer}{told.partition(answer)[2]}".count(reasoning)
    )
