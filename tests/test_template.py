"""Templates: rendered as transformers renders, and exact about what is trained."""

import pytest

from minisft.data.chat.dialogue import Masking, Rendered
from minisft.data.chat.masks import render_conversation
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.chat.template_check import check_template
from minisft.data.chat.training_templates import CHATML
from minisft.data.kinds import ANSWER, HEADER, KIND_MASK, REASONING, SYSTEM, TERMINATOR, TOOL, TOOL_CALL, TRAINED, USER
from minisft.data.rows import RowError
from minisft.errors import UserError

TOKENS = (("bos_token", "<s>"), ("eos_token", "</s>"))
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"x": "<\u00e4>"}}}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, "\u00e4"]}}}

LOOP = "{{ bos_token }}{% for m in messages %}"
TEMPLATES = {
    "chatml": CHATML,
    # generation tag inside a macro, whose output is buffered and placed later
    "macro": "{% macro turn(m) %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endmacro %}"
    + LOOP
    + "{% if m.role == 'assistant' %}A: {{ turn(m) }}\n{% else %}U: {{ m.content | trim }}\n{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}A: {% endif %}",
    # the same inside a set block
    "set": LOOP
    + "{% if m.role == 'assistant' %}{% set t %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% endset %}A: {{ t }}\n{% else %}U: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: {% endif %}",
    # no tag: found by prefixes
    "plain": LOOP
    + "{{ '[' + m.role + ']' }}{{ m.content | trim }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    # what stock templates use: namespace, dict, break, tojson, tools is defined, documents, strftime_now
    "features": "{% set ns = namespace(n=0) %}{% set d = dict(a=1) %}{{ d.a }}{{ tools is defined }}{{ documents }}\n"
    "{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ strftime_now('%Y') | length }}\n"
    + LOOP
    + "    {% set ns.n = ns.n + 1 %}\n    {% if ns.n > 3 %}{% break %}{% endif %}\n"
    "<{{ m.role }}>{{ m.content }}{{ m.reasoning_content }}{{ m.thinking }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "</s>\n{% endfor %}",
}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    "system": [
        {"role": "system", "content": "Be <brief> & \u00e4."},
        {"role": "user", "content": " \n Hi\u2028 "},
        {"role": "assistant", "content": "  Hello \U0001f600\n\n"},
    ],
    "many": [
        {"role": "user", "content": "1", "name": None},
        {"role": "assistant", "content": "2", "tool_calls": None},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "5"},
        {"role": "assistant", "content": "6"},
    ],
    "tools": [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "It is 7.", "reasoning": "easy"},
    ],
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_is_byte_equal_to_transformers(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate(TEMPLATES[name], TOKENS)
    for messages in CONVERSATIONS.values():
        for tools in (None, TOOLS):
            for prompt in (False, True):
                clean = [{k: v for k, v in message.items() if v is not None} for message in messages]
                expected, _ = render_jinja_template(
                    [clean], tools=tools, chat_template=template.text, add_generation_prompt=prompt, **dict(TOKENS)
                )
                found = render(template, messages, tools=tools, add_generation_prompt=prompt)
                assert found == expected[0]


def render_with_spans(template, messages, *, tools=None, train_on="assistant", first_trained=0):
    masking = Masking(train_on, multi_turn="joint")
    (document,) = render_conversation(template, messages, tools=tools, masking=masking, first_trained=first_trained)
    return document.text, document.spans


def parts(text, spans, of=None):
    """[(text, kind, trained)] of a rendered conversation, adjacent equal characters joined."""
    bytes_ = [None] * len(text)
    for start, end, byte in spans:
        bytes_[start:end] = [byte] * (end - start)
    assert None not in bytes_
    found = []
    for char, byte in zip(text, bytes_):
        if found and found[-1][1] == byte:
            found[-1][0] += char
        else:
            found.append([char, byte])
    return [(chunk, byte & KIND_MASK, bool(byte & TRAINED)) for chunk, byte in found]


def trained(text, spans):
    return [chunk for chunk, _, is_trained in _merge(parts(text, spans)) if is_trained]


def _merge(found):
    """Adjacent parts with the same trained flag, whatever their kind."""
    merged = []
    for chunk, kind, flag in found:
        if merged and merged[-1][2] == flag:
            merged[-1] = (merged[-1][0] + chunk, kind, flag)
        else:
            merged.append((chunk, kind, flag))
    return merged


def test_chatml_masks_by_hand():
    template = ChatTemplate(CHATML)
    text, spans = render_with_spans(template, CONVERSATIONS["system"])
    assert parts(text, spans) == [
        ("<|im_start|>system\n", HEADER, False),
        ("Be <brief> & \u00e4.", SYSTEM, False),
        ("<|im_end|>\n<|im_start|>user\n \n ", HEADER, False),
        ("Hi", USER, False),
        ("\u2028 <|im_end|>\n<|im_start|>assistant\n", HEADER, False),
        ("  Hello \U0001f600\n\n", ANSWER, True),
        ("<|im_end|>", TERMINATOR, True),
        ("\n", HEADER, False),
    ]
    text, spans = render_with_spans(template, CONVERSATIONS["tools"], tools=TOOLS)
    call = '<tool_call>\n{"name": "f", "arguments": {"x": [1, "\u00e4"]}}\n</tool_call>'
    assert parts(text, spans)[1:] == [
        ("?", USER, False),
        ("<|im_end|>\n<|im_start|>assistant\n", HEADER, False),
        (call + "\n" + call, TOOL_CALL, True),
        ("<|im_end|>", TERMINATOR, True),
        ("\n<|im_start|>user\n<tool_response>\n", HEADER, False),
        ("7", TOOL, False),
        ("\n</tool_response><|im_end|>\n<|im_start|>assistant\n", HEADER, False),
        ("<think>\neasy\n</think>", REASONING, True),
        ("\n\nIt is 7.", ANSWER, True),
        ("<|im_end|>", TERMINATOR, True),
        ("\n", HEADER, False),
    ]


@pytest.mark.parametrize("name", ["chatml", "macro", "set", "plain"])
def test_every_way_of_finding_turns_gives_the_answers_and_their_ends(name):
    end = "<|im_end|>" if name == "chatml" else "</s>"
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    messages = CONVERSATIONS["many"]
    assert trained(*render_with_spans(template, messages)) == ["2" + end, "4" + end, "6" + end]
    assert trained(*render_with_spans(template, messages, train_on="last")) == ["6" + end]
    assert trained(*render_with_spans(template, messages, first_trained=2)) == ["4" + end, "6" + end]
    text, spans = render_with_spans(template, messages, train_on="all")
    assert trained(text, spans) == [text]
    assert text == render(template, messages)


@pytest.mark.parametrize("name", ["chatml", "macro", "set", "plain"])
def test_a_turn_is_trained_exactly_where_inference_begins(name):
    template = ChatTemplate(TEMPLATES[name], TOKENS)
    for messages in (CONVERSATIONS["one"], CONVERSATIONS["many"], CONVERSATIONS["system"]):
        text, spans = render_with_spans(template, messages, train_on="last")
        prompt = render(template, messages[:-1], add_generation_prompt=True)
        assert text.startswith(prompt + trained(text, spans)[0])


def test_a_template_that_inspects_contents_renders_the_same_and_loses_only_detail():
    template = ChatTemplate(
        LOOP + "{% if m.content.startswith('7') %}(seven){% endif %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
        TOKENS,
    )
    messages = [{"role": "user", "content": "7"}, {"role": "assistant", "content": "ok"}]
    text, spans = render_with_spans(template, messages)
    assert text == "<s>(seven)[user]7[assistant]ok</s>"
    assert parts(text, spans) == [
        ("<s>(seven)[user]7[assistant]", HEADER, False),
        ("ok", ANSWER, True),
        ("</s>", TERMINATOR, True),
    ]


@pytest.mark.parametrize(
    "text, messages, message",
    [
        # a prompt that is not how the turn is rendered later (reasoning models)
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:"
         "<think>{% endif %}", "one", "differently than at inference"),
        # the end only after the last turn
        ("{% for m in messages %}{{ m.role }}:{{ m.content }}{% if loop.last %}</s>{% endif %}{% endfor %}"
         "{% if add_generation_prompt %}assistant:{% endif %}", "many", "differently than at inference"),
        ("{% for m in messages[:2] %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "many", "lost a"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "one", "lost a"),
        ("{% for m in messages if m.role == 'assistant' %}{% generation %}{{ m.content | upper }}{% endgeneration %}"
         "{% endfor %}", "one", "changed an answer"),
        ("{% for m in messages %}{% set t %}{% generation %}{{ m.content }}\n\n{% endgeneration %}{% endset %}"
         "{{ t | trim }}{% endfor %}", "one", "reads the text of its generation tags"),
        ("{{ raise_exception('no system turn') }}", "one", "no system turn"),
        ("{{ messages[0].content + 1 }}", "one", "TypeError"),
        ("{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "one", "SecurityError"),
        ("{% set n = namespace(_x=1) %}", "one", "SecurityError"),
        ("{{ range(10 ** 9) | list }}", "one", "OverflowError"),
    ],
)  # fmt: skip
def test_what_is_not_exact_is_refused(text, messages, message):
    with pytest.raises(RowError, match=message):
        render_with_spans(ChatTemplate(text, TOKENS), CONVERSATIONS[messages])


def test_a_row_of_all_private_characters_is_refused():
    """Nothing is left to mark places in it."""
    every = "".join(map(chr, range(0x100000, 0x10FFFE)))
    for taken, is_refused in ((every, True), (every[4:], True), (every[5:], False)):  # three markers, and one a message
        messages = [{"role": "user", "content": taken}, {"role": "assistant", "content": "b"}]
        if is_refused:
            with pytest.raises(RowError, match="too many messages: 2: no private-use character is left"):
                render_with_spans(ChatTemplate(CHATML), messages)
        else:
            assert taken in render_with_spans(ChatTemplate(CHATML), messages)[0]


def test_the_date_is_frozen():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", date="2024-07-26")
    assert render(template, CONVERSATIONS["one"]) == "26 Jul 2024"


@pytest.mark.parametrize("name", ["chatml", "macro", "set", "plain"])
def test_good_templates_pass_the_start_up_check(name):
    check_template(ChatTemplate(TEMPLATES[name], TOKENS), ("<|im_end|>", "</s>"))


def kinds_of(document: Rendered) -> bytearray:
    """kind | TRAINED of each character."""
    kinds = bytearray(len(document.text))
    for start, end, byte in document.spans:
        kinds[start:end] = bytes([byte]) * (end - start)
    return kinds


def test_tags_that_hold_the_header_train_the_answer_all_the_same():
    """SmolLM3's template has them so."""
    text = CHATML.replace(
        "{{- '<|im_start|>assistant\\n' }}\n        {%- generation %}",
        "{%- generation %}\n        {{- '<|im_start|>assistant\\n' }}",
    )
    assert text != CHATML
    ours, theirs = (ChatTemplate(some, TOKENS) for some in (CHATML, text))
    messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(["user", "assistant"] * 3)]
    check_template(theirs, ("<|im_end|>",))
    ((document,), (expected,)) = (render_conversation(template, messages) for template in (theirs, ours))
    assert document.text == expected.text and kinds_of(document) == kinds_of(expected)


@pytest.mark.parametrize(
    "text, message",
    [
        (CHATML.replace("{{- '<|im_end|>' }}\n        {%- endgeneration %}",
                        "{%- endgeneration %}\n        {{- '<|im_end|>' }}"), "does not train the end of an answer"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "does not train the end"),
        # the end of the fourth message only
        (CHATML.replace("{{- '<|im_end|>' }}\n        {%- endgen", "{{- '<|im_end|>' if loop.index < 4 }}\n        {%- endgen"),
         "does not train the end"),
        ("{{ raise_exception('never') }}", "cannot render one question"),
    ],
)  # fmt: skip
def test_bad_templates_are_refused_at_the_start(text, message):
    assert text != CHATML
    with pytest.raises(UserError, match=message):
        check_template(ChatTemplate(text, TOKENS), ("<|im_end|>", "</s>"))


def test_a_syntax_error_names_its_line():
    with pytest.raises(UserError, match="line 2"):
        render(ChatTemplate("a\n{% if %}"), CONVERSATIONS["one"])
