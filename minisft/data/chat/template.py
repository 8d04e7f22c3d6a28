"""Chat templates: a conversation becomes text.

A template is a Jinja program that ships with a tokenizer. It renders here exactly as in transformers (same sandbox,
options and variables), because the served model will see the text that transformers renders; the tests compare byte by
byte. Its time and memory are limited (sandbox.py). masks.py finds the answers in the text.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from minisft.data.chat import sandbox
from minisft.data.rows import RowError
from minisft.errors import MODEL, UserError

REFUSED = "the chat template refuses the conversation"
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and its variables besides the conversation. Hashable, because it is the key of compiled templates."""

    text: str
    special_tokens: tuple[tuple[str, str], ...] = ()  # ("bos_token", "<s>"), ... if set
    date: str = ""  # ISO date that strftime_now sees, frozen so that a row renders the same all day
    variables: tuple[tuple[str, str], ...] = ()  # the run's chat_template_kwargs, as JSON: ("enable_thinking", "false")


# ------------------------------------------------------------------------------------------------- rendering


class _Generation(Extension):
    """The tag {% generation %}: its text, between the markers that the rendering gives, if any. Variables that are set inside
    it stay inside, as in transformers, where the tag is a call."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def marker(name: str) -> nodes.Output:
            given = nodes.Name(name, "load")
            return nodes.Output([nodes.CondExpr(given, given, nodes.Const(""))])

        scope = nodes.Scope([marker("_minisft_start"), *body, marker("_minisft_end")])
        return scope.set_lineno(line, override=False)


class _Dict:
    """`dict` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates: refuses names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self)
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not set namespace attribute {name!r}")
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:  # Jinja's writes out all values, which a chain of namespaces doubles at every step
        return "<Namespace>"


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compile(template: ChatTemplate) -> jinja2.Template:
    if tuple(int(part) for part in re.findall(r"\d+", jinja2.__version__)[:3]) < (3, 1, 6):
        raise UserError(
            f"jinja2 {jinja2.__version__} has holes in its sandbox, in which chat templates run",
            hint="pip install -U 'jinja2>=3.1.6'",
            exit_code=MODEL,
        )
    if len(template.text) > sandbox.MAX_TEMPLATE:
        problem = f"the chat template has {len(template.text):,} characters, at most {sandbox.MAX_TEMPLATE:,} are read"
        raise UserError(problem, exit_code=MODEL)
    environment = sandbox.LimitedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    now = datetime.fromisoformat(template.date) if template.date else datetime.now()
    environment.filters["tojson"] = _tojson
    environment.add_measures()
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=now.strftime, dict=_Dict(), namespace=_Namespace
    )
    try:
        compiled = environment.from_string(template.text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template, line {error.lineno}: {error.message}", exit_code=MODEL) from None
    except (
        RecursionError,
        SyntaxError,
        MemoryError,
        ValueError,
        OverflowError,
    ) as error:  # deeper than Python compiles
        raise UserError(f"the chat template cannot be compiled: {error}", exit_code=MODEL) from None
    compiled.globals = dict(compiled.globals)  # every rendering copies them, and Jinja's ChainMap is slow to copy
    return compiled


def _clean(messages: list[dict]) -> list[dict]:
    """Messages as transformers gives them to a template: no None values, reasoning under its usual names."""
    cleaned = []
    for message in messages:
        if len(message) == 2 and message["content"] is not None:  # a role and a text, as nearly all are
            cleaned.append(message)
            continue
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        cleaned.append(message)
    return cleaned


def render(
    template: ChatTemplate,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    documents: list[dict] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The conversation as text, byte-equal to transformers' apply_chat_template(tokenize=False).

    Raises RowError if the template refuses the conversation or fails on it.
    """
    compiled = _compile(template)
    assert isinstance(compiled.environment, sandbox.LimitedEnvironment)
    given = {name: json.loads(value) for name, value in template.variables}
    pieces, size = [], 0
    try:
        compiled.environment.start()
        for piece in compiled.generate(
            messages=_clean(messages),
            tools=tools,  # passed even if None: templates test whether tools is defined
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**dict(template.special_tokens), **given, **variables},
        ):
            pieces.append(piece)
            size += len(piece)
            if size > sandbox.MAX_SIZE:
                raise sandbox.LimitError(f"more than {sandbox.MAX_SIZE:,} characters of output")
    except Exception as error:  # a template is somebody else's program, and any error of it makes a bad row
        raise RowError(REFUSED, f"{type(error).__name__}: {error}") from None
    return "".join(pieces)
