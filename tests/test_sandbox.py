"""Templates under limits: what would take minutes or gigabytes is refused at once, and what is ordinary is not."""

import resource
import time

import jinja2
import pytest
from jinja2 import nodes

from minisft.data.chat import sandbox
from minisft.data.chat.dialogue import Masking
from minisft.data.chat.masks import render_conversation
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.chat.training_templates import CHATML
from minisft.data.rows import RowError
from minisft.errors import MODEL, UserError

DOUBLING = "{% set ns = namespace(s='12345678') %}{% for i in range(60) %}{% set ns.s = ns.s OP ns.s %}{% endfor %}"
ATTACKS = {
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "much output": "{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}",
    "doubling by +": DOUBLING.replace("OP", "+"),
    "doubling by ~": DOUBLING.replace("OP", "~"),
    "doubling a list": DOUBLING.replace("OP", "+").replace("'12345678'", "[1, 2]"),
    "doubling, unrolled": "{% set s = 'a' * 1000 %}" + "{% set s = s ~ s %}" * 40,
    "doubling in a block": "{% set s = 'a' * 1000 %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 40,
    "doubling in a branch": "{% set s = 'a' %}{% if true %}" + "{% set s = s ~ s %}" * 40 + "{% endif %}",
    "a product": "{{ 'a' * 10**10 }}",
    "a product, turned": "{{ 10**10 * 'a' }}",
    "a long list": "{% set x = [1] * 10**9 %}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a range": "{% for i in range(10**9) %}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ '1'.zfill(10000000000) }}",
    "expandtabs": "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "indent": "{{ ('a\\n' * 100000) | indent(100000) }}",
    "% with a width": "{{ '%1000000000d' % 1 }}",
    "% with a star": "{{ '%*d' % (1000000000, 1) }}",
    "the filter format": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format with a field": "{{ '{:{}}'.format(1, 1000000000) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "the filter replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "join": "{{ ('b' * 1000000).join(['a'] * 100000) }}",
    "the filter join": "{{ (['a'] * 100000) | join('b' * 1000000) }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_soon_and_small(name, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(sandbox, "MAX_SIZE", 2**22)
    monkeypatch.setattr(sandbox, "MAX_GROWTH", 2**26)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    with pytest.raises(RowError, match="the chat template refuses the conversation: (LimitError|RecursionE|OverflowE)"):
        render(ChatTemplate(ATTACKS[name]), [])
    assert time.process_time() - began < 3  # 0.3 s and what one operation on values of the allowed size may take
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**28


def test_what_is_large_but_ordinary_renders():
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(2000)]
    messages[0]["content"] = "\u00e4" * 2**20
    text = render(ChatTemplate(CHATML), messages)
    assert text.count("<|im_end|>") == 2000 and messages[0]["content"] in text


def test_limits_are_those_of_one_rendering(monkeypatch):
    """A template that uses most of what it may does so again and again."""
    monkeypatch.setattr(sandbox, "MAX_STEPS", 1000)
    template = ChatTemplate("{% for i in range(900) %}{% endfor %}x")
    assert [render(template, []) for _ in range(5)] == ["x"] * 5


def test_measured_operations_give_what_they_gave():
    text = "{{ 'a'.center(5) }}|{{ 'a' * 3 }}|{{ 2 ** 5 }}|{{ '%3d' % 7 }}|{{ 'a b'.replace(' ', '-') }}|{{ [1, 2] | join('-') }}"
    assert render(ChatTemplate(text), []) == "  a  |aaa|32|  7|a-b|1-2"
    text = "{{ '{:>3}'.format(7) }}|{{ 'a\nb' | indent(2) }}|{{ '-'.join(['a', 'b']) }}|{{ [1] * 2 }}|{{ 7 % 4 }}"
    assert render(ChatTemplate(text), []) == "  7|a\n  b|a-b|[1, 1]|3"


# ------------------------------------------------------------------------------------------------- compiling

LARGE = {  # templates of n parts
    "a sum in a list": lambda n: "{{ [" + "~".join(["a"] * n) + "] | length }}",
    "texts in a list": lambda n: "{{ [" + "~".join(["'b'"] * n) + ", a] | length }}",
    "sums": lambda n: "{% set b = a ~ 'b' ~ a %}" * (n // 8),
    "a list in lists": lambda n: "{{ " + "[" * 30 + "1," * n + "1" + "]" * 30 + " | length }}",
    "names in lists": lambda n: "{{ " + "[" * 30 + "a," * n + "1" + "]" * 30 + " | length }}",
    "sums in sums": lambda n: "{{ [" + "(a ~ a ~ " * 30 + "a" + ")" * 30 + " ~ a" * n + "] | length }}",
    "outputs": lambda n: "{{ a }}" * (n // 4),
    "blocks": lambda n: "{% for i in a %}{{ i }}{% endfor %}" * (n // 16),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_walk_through_a_template_looks_at_each_node_a_few_times(name, monkeypatch):
    """It looked at everything inside of each, 28 s for a sum of 4,000 parts, before any limit counted."""
    tree = jinja2.Environment().parse(LARGE[name](400))
    size, looks = sum(1 for _ in tree.find_all(nodes.Node)), []
    children, fields = nodes.Node.iter_child_nodes, nodes.Node.iter_fields
    monkeypatch.setattr(nodes.Node, "iter_child_nodes", lambda *a: looks.append(1) or children(*a))
    monkeypatch.setattr(nodes.Node, "iter_fields", lambda *a: looks.append(1) or fields(*a))
    sandbox._Measure().visit(tree)
    assert 0 < len(looks) < 3 * size


def test_a_long_sum_compiles_soon():
    began = time.process_time()
    assert render(ChatTemplate(LARGE["a sum in a list"](4000)), [], a="") == "1"
    assert time.process_time() - began < 5


def test_a_template_has_a_largest_size():
    most = sandbox.MAX_TEMPLATE
    assert render(ChatTemplate("a" * most), []) == "a" * most
    with pytest.raises(
        UserError, match=f"the chat template has {most + 1:,} characters, at most {most:,} are read"
    ) as error:
        render(ChatTemplate("a" * (most + 1)), [])
    assert error.value.exit_code == MODEL


def test_long_sums_give_what_jinja_gives(monkeypatch):
    """Also where they are measured: in a list, in an argument, in a block, with values of every kind."""
    parts = " ~ ".join(["a", "'x'", "1", "none", "true", "b.c", "[1, a]", "1.5", "missing", "{'k': a}"] * 12)
    text = "{{ [PARTS] | join('|') }};{% set s %}{{ PARTS }}{% endset %}{{ s | upper }};{{ (PARTS).replace('x', 'y') }}"
    text = text.replace("PARTS", parts)
    values = {"a": "\u00e4", "b": {"c": [1, "z"]}}
    plain = jinja2.Environment().from_string(text).render(**values)
    assert render(ChatTemplate(text), [], **values) == plain
    monkeypatch.setattr(sandbox, "MAX_SIZE", 10**4)
    with pytest.raises(RowError, match="LimitError"):
        render(ChatTemplate("{{ (" + "~".join(["a"] * 100) + ") | length }}"), [], a="b" * 500)


# ------------------------------------------------------------------------------------------------- time


def test_a_rendering_has_two_seconds_of_the_processor(monkeypatch):
    assert sandbox.MAX_SECONDS == 2
    template = ChatTemplate("{% for i in range(200) %}{% endfor %}x")
    monkeypatch.setattr(time, "monotonic", lambda: 1e9 * time.process_time())  # a machine on which all others run
    assert render(template, []) == "x"
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.0)
    with pytest.raises(RowError, match="LimitError: more than 0 seconds"):
        render(template, [])


def test_all_renderings_of_a_row_have_a_limit_too(monkeypatch):
    """Turns are found by many renderings: their number is that of the turns, and their length too."""
    template = ChatTemplate(CHATML)
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(40)]
    masking = Masking(multi_turn="per_turn")
    assert len(render_conversation(template, messages, masking=masking)) == 20
    monkeypatch.setattr("minisft.data.chat.masks.MAX_SIZE", 1000)
    with pytest.raises(RowError, match="too long turn by turn: more than 1,000 characters in"):
        render_conversation(template, messages, masking=masking)
    monkeypatch.setattr("minisft.data.chat.dialogue.MAX_ROW_SECONDS", 0.0)
    with pytest.raises(RowError, match="too long to render"):
        render_conversation(template, messages, masking=masking)
