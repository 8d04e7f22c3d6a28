"""Templates under limits: what would take minutes or gigabytes is refused at once, and what is ordinary is not."""

import resource
import time

import pytest

from minisft.data.chat import sandbox
from minisft.data.chat.template import ChatTemplate, render
from minisft.data.chat.training_templates import CHATML
from minisft.data.rows import RowError

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
