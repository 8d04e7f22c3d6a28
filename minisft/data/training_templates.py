"""Chat templates that we wrote: ChatML, and twins with generation tags of stock templates that lack them.

A twin is picked by the sha256 of the stock text, which is not copied here, and is used for a row only where it renders the
same text as the stock template (masks.py, strategy B). A test compares them on a folder of stock templates where the
environment variable MINISFT_STOCK_TEMPLATES names one.
"""

from functools import lru_cache
from hashlib import sha256

# Our own template: the ChatML layout. Tools are described in a system turn, a call is JSON between <tool_call> tags,
# a result comes back inside a user turn; reasoning stands between <think> tags before the answer.
CHATML = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- if system or tools %}
    {{- '<|im_start|>system\\n' + system }}
    {%- if tools %}
        {{- ('\\n\\n' if system else '') + 'You can call these functions:\\n<tools>' }}
        {%- for tool in tools %}
            {{- '\\n' + tool | tojson }}
        {%- endfor %}
        {{- '\\n</tools>\\nTo call one, write\\n<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if message['reasoning_content'] %}
            {{- '<think>\\n' + message['reasoning_content'] + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message['content'] or '' }}
        {%- for call in message['tool_calls'] or [] %}
            {%- set function = call['function'] or call %}
            {{- '' if loop.first and not message['content'] else '\\n' }}
            {{- '<tool_call>\\n{"name": ' + function['name'] | tojson + ', "arguments": ' }}
            {{- function['arguments'] | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message['role'] == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response><|im_end|>\\n' }}
    {%- elif message['role'] != 'system' or not loop.first %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Twins of stock templates, written for conversations without tools; rows with tools differ from the stock rendering and
# go the other ways.
TWINS: dict[str, str] = {}

STOCK: dict[str, str] = {}  # sha256 of a stock template -> name of its twin


@lru_cache(maxsize=32)
def tagged_twin(stock: str) -> str | None:
    """Our tagged twin of a stock template, None where there is none."""
    name = STOCK.get(sha256(stock.encode("utf-8")).hexdigest())
    return None if name is None else TWINS[name]
