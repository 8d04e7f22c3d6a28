"""Chat templates that we wrote: ChatML, and twins with generation tags of stock templates that lack them.

A twin is found by the sha256 of the stock text, which is not copied here, and is used for a row only if it renders the same
text as the stock template (chat/masks.py, strategy B). If the environment variable MINISFT_STOCK_TEMPLATES names a folder of
stock templates, a test compares them.
"""

from functools import lru_cache
from hashlib import sha256

# Our own template: the ChatML layout. Tools are described in a system turn, a call is JSON between <tool_call> tags,
# a result comes back inside a user turn; reasoning is between <think> tags before the answer.
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


def _twin(header: str, content: str, end: str, *, start: str = "", messages: str = "messages", finish: str = "") -> str:
    """A template that renders each message as header, content, end (Jinja texts), with tags around the generated part."""
    return (
        f"{{{{- {start or repr('')} }}}}"
        f"{{%- for m in {messages} %}}"
        f"{{{{- {header} }}}}"
        f"{{%- if m.role == 'assistant' %}}{{% generation %}}{{{{- {content} + '{end}' }}}}{{% endgeneration %}}"
        f"{{%- else %}}{{{{- {content} + '{end}' }}}}{{% endif %}}"
        f"{finish}"
        "{%- endfor %}"
    )


NEWLINE = "{{- '\\n' }}"
GEMMA_HEADER = "'<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n'"
FIRST_SYSTEM = "messages[0].role == 'system'"

# Twins of stock templates, for conversations without tools. With tools a twin renders another text than the stock template,
# so that it is not used. The end of a whole conversation (Phi 3's EOS after the last turn) is not trained.
TWINS = {
    "chatml": _twin("'<|im_start|>' + m.role + '\\n'", "m.content", "<|im_end|>", finish=NEWLINE),
    "llama3": _twin(
        "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'",
        "m.content | trim",
        "<|eot_id|>",
        start="bos_token",
    ),
    "gemma": _twin(GEMMA_HEADER, "m.content | trim", "<end_of_turn>", start="bos_token", finish=NEWLINE),
    "gemma3": _twin(  # the system text comes before the first question
        f"{GEMMA_HEADER} + (messages[0].content + '\\n\\n' if loop.first and {FIRST_SYSTEM} else '')",
        "m.content | trim",
        "<end_of_turn>",
        start="bos_token",
        messages=f"(messages[1:] if {FIRST_SYSTEM} else messages)",
        finish=NEWLINE,
    ),
    "phi3": _twin("'<|' + m.role + '|>\\n'", "m.content", "<|end|>", finish=NEWLINE)
    + "{%- if not add_generation_prompt %}{{- eos_token }}{% endif %}",
}

STOCK = {  # sha256 of a stock template -> name of its twin
    "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122": "llama3",  # llama3
    "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6": "gemma",  # gemma
    "7de1c58e208eda46e9c7f86397df37ec49883aeece39fb961e0a6b24088dd3c4": "gemma3",  # gemma3
    "dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa": "phi3",  # phi3
    "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90": "phi3",  # phi3_5
    "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326": "chatml",  # qwen3_instruct_2507
}


@lru_cache(maxsize=32)
def tagged_twin(stock: str) -> str | None:
    """Our tagged twin of a stock template, or None."""
    name = STOCK.get(sha256(stock.encode("utf-8")).hexdigest())
    return None if name is None else TWINS[name]
