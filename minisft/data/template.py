"""Chat templates: a conversation becomes text, and we know of every character who said it and whether it is trained.

A template is a Jinja program that ships with a tokenizer. It renders here exactly as in transformers (same sandbox,
options and variables), because the served model will see what transformers renders; the tests compare byte by byte.

Where the assistant's turns lie in the text is found in one of two ways, and by neither is an error, never a guess:

A. The template marks them: `{% generation %} ... {% endgeneration %}`. Recording output positions while rendering, as
   transformers does, goes wrong inside a macro, a `{% set %}` block or a filter block, whose output is buffered and
   placed later. Here the tag puts a private-use character before and after its text; they are found and stripped
   from the result, and what is left must equal a rendering without them.
B. Prefix differences. With h the messages before an assistant turn a, the turn is what render(h + [a]) adds to
   render(h, add_generation_prompt=True). That holds only if each of these is a prefix of the next and of the whole,
   which is checked for every turn of every row (a third of the stock templates fail somewhere).

The characters of system, user and tool contents are found by private-use characters put around the contents
themselves; a template that inspects a content and renders something else because of them loses only that detail.

A turn's span begins after the header ("<|im_start|>assistant\n" is given at inference, so it is not trained) and ends
after the terminator, which must be trained or the model never stops: `check_template` refuses a template that fails.
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minisft.data.batch import ANSWER, HEADER, KIND_MASK, REASONING, SYSTEM, TERMINATOR, TOOL, TOOL_CALL, TRAINED, USER
from minisft.data.formats import RowError
from minisft.errors import MODEL, UserError

TRAIN_ON = ("assistant", "last", "all")

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

# Markers: private-use characters that a row must not contain.
GENERATION, END_GENERATION, CLOSE = "\U0010fff0", "\U0010fff1", "\U0010fff2"
OPEN = {"system": "\U0010fff3", "developer": "\U0010fff3", "user": "\U0010fff4", "tool": "\U0010fff5"}
CONTENT_KIND = {OPEN["system"]: SYSTEM, OPEN["user"]: USER, OPEN["tool"]: TOOL}
MARKER = re.compile("([\U0010fff0-\U0010fff5])")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what it may read besides the conversation. Hashable: compiled templates are cached by it."""

    text: str
    special_tokens: tuple[tuple[str, str], ...] = ()  # ("bos_token", "<s>"), ... only those that are set
    date: str = ""  # ISO date that strftime_now sees, frozen so that a row renders the same all day


# ------------------------------------------------------------------------------------------------- rendering


class _Generation(Extension):
    """The tag {% generation %}: its text, between markers where the rendering asked for them."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: jinja2.runtime.Context, caller: Any) -> str:
        return GENERATION + caller() + END_GENERATION if context.get("_minisft_mark") else caller()


class _Dict:
    """`dict` for templates: to call, without the attributes of the class."""

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
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    now = datetime.fromisoformat(template.date) if template.date else datetime.now()
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=now.strftime, dict=_Dict(), namespace=_Namespace
    )
    try:
        return environment.from_string(template.text)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template, line {error.lineno}: {error.message}", exit_code=MODEL) from None


def _clean(messages: list[dict]) -> list[dict]:
    """Messages as transformers hands them to a template: no None values, reasoning under its usual names."""
    cleaned = []
    for message in messages:
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

    Raises RowError where the template refuses the conversation or fails on it.
    """
    compiled = _compile(template)
    try:
        return compiled.render(
            messages=_clean(messages),
            tools=tools,  # passed even when None: templates ask whether tools is defined
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            **{**dict(template.special_tokens), **variables},
        )
    except Exception as error:  # a template is a program of somebody else: any error in it is about this row
        raise RowError("the chat template refuses the conversation", f"{type(error).__name__}: {error}") from None


# ------------------------------------------------------------------------------------------------- spans


def render_with_spans(
    template: ChatTemplate,
    messages: list[dict],
    *,
    tools: list[dict] | None = None,
    train_on: str = "assistant",
    first_trained: int = 0,
) -> tuple[str, list[tuple[int, int, int]]]:
    """Render a conversation and say of its characters what they are.

    train_on: "assistant" trains every assistant turn from message `first_trained` on, "last" the last one, "all"
    everything. Returns (text, spans (char start, char end, kind | TRAINED)): the first span covers the whole text as
    header, later ones win. Raises RowError where the turns cannot be found exactly.
    """
    assert train_on in TRAIN_ON, train_on
    if MARKER.search(json.dumps([messages, tools], ensure_ascii=False)):
        raise RowError("reserved character", "the row contains one of U+10FFF0 to U+10FFF5")
    marked = render(template, [_mark_content(message) for message in messages], tools=tools, _minisft_mark=True)
    text, turns, contents = _read_markers(marked)
    if template.text != CHATML:  # ours reads no content, so there is nothing that a mark could change
        plain = render(template, messages, tools=tools)
        if text != plain:  # the template looked at a content: again, without marks in contents
            marked = render(template, messages, tools=tools, _minisft_mark=True)
            text, turns, contents = _read_markers(marked)
            if text != plain:
                raise RowError("the chat template reads what its generation tags hold", "their place cannot be found")
    if not turns:
        try:
            turns = _turns_by_prefix(template, text, messages, tools)
        except RowError:
            if train_on != "all":  # everything is trained: where the turns lie is only a detail
                raise
    answers = [(i, message) for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(turns) != len(answers) and train_on != "all":
        raise RowError("the chat template lost a turn", f"{len(turns)} of {len(answers)} assistant turns were found")

    everything = TRAINED if train_on == "all" else 0
    spans = [(0, len(text), HEADER | everything)]
    spans += [(start, end, kind | everything) for start, end, kind in contents]
    for (start, end), (i, message) in zip(turns, answers):
        content = message["content"].strip()
        if content not in text[start:end] and "</think>" not in content and train_on != "all":
            raise RowError("the chat template changed an answer", f"message {i} is not rendered as it is")
        trained = train_on == "all" or (train_on == "assistant" and i >= first_trained) or i == answers[-1][0]
        spans += _answer_spans(template, text, start, end, message, TRAINED if trained else 0)
    return text, spans


def _mark_content(message: dict) -> dict:
    """Markers around a content of system, user or tool, inside its outer whitespace, which many templates strip."""
    content = message["content"]
    inner = content.strip()
    if message["role"] not in OPEN or not inner:
        return message
    start = content.index(inner)
    marked = content[:start] + OPEN[message["role"]] + inner + CLOSE + content[start + len(inner) :]
    return {**message, "content": marked}


def _read_markers(marked: str) -> tuple[str, list[tuple[int, int]], list[tuple[int, int, int]]]:
    """(text without markers, turns, contents), turns and contents as spans of that text."""
    pieces = MARKER.split(marked)  # text, marker, text, marker, ... text
    turns, contents, at, turn_start, content_start, kind = [], [], 0, 0, 0, None
    for part in pieces:
        if part == GENERATION:
            turn_start = at
        elif part == END_GENERATION:
            turns.append((turn_start, at))
        elif part in CONTENT_KIND:
            content_start, kind = at, CONTENT_KIND[part]
        elif part == CLOSE:
            if kind is not None:
                contents.append((content_start, at, kind))
            kind = None
        else:
            at += len(part)
    return "".join(pieces[::2]), [turn for turn in turns if turn[1] > turn[0]], contents


def _turns_by_prefix(
    template: ChatTemplate, text: str, messages: list[dict], tools: list[dict] | None
) -> list[tuple[int, int]]:
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(template, messages[:i], tools=tools, add_generation_prompt=True)
        so_far = render(template, messages[: i + 1], tools=tools)
        if not so_far.startswith(prompt) or not text.startswith(so_far):
            raise RowError(
                "the assistant's turns cannot be found",
                f"the chat template renders message {i} differently in its context than at inference",
            )
        # "<|im_end|>\n": generation ends at the token, nobody samples the newline after it.
        turns.append((len(prompt), len(so_far.rstrip()) if so_far[len(prompt) :].strip() else len(so_far)))
    return turns


def _answer_spans(
    template: ChatTemplate, text: str, start: int, end: int, message: dict, trained: int
) -> list[tuple[int, int, int]]:
    """One assistant turn: answer, reasoning, tool calls, terminator."""
    turn = text[start:end]
    content = message["content"].strip()
    spans = [(start, end, (TOOL_CALL if message.get("tool_calls") else ANSWER) | trained)]
    if message.get("tool_calls") and content in turn:
        at = start + turn.index(content)
        spans.append((at, at + len(content), ANSWER | trained))
    if "</think>" in turn:
        spans.append((start, start + turn.index("</think>") + len("</think>"), REASONING | trained))
    end_of_turn = terminator(template)
    if end_of_turn and turn.rstrip().endswith(end_of_turn):
        spans.append((start + turn.rindex(end_of_turn), end, TERMINATOR | trained))
    return spans


@lru_cache(maxsize=32)
def terminator(template: ChatTemplate) -> str:
    """What the template puts after an answer inside the assistant's turn, such as "<|im_end|>"."""
    probe = "An answer."
    text = render(template, [{"role": "user", "content": "A question."}, {"role": "assistant", "content": probe}])
    return text[text.rindex(probe) + len(probe) :].rstrip() if probe in text else ""


# ------------------------------------------------------------------------------------------------- the start-up check


@lru_cache(maxsize=32)
def check_template(template: ChatTemplate, terminators: tuple[str, ...]) -> None:
    """Refuse a template that would train a model wrongly: a header that is trained, an answer whose end is not.

    terminators: the texts of special tokens and EOS; a turn must end in one of them. Raises UserError.
    """

    def refuse(what: str, hint: str = "give a chat_template of your own, or chatml") -> None:
        raise UserError(f"the chat template {what}", hint=hint, exit_code=MODEL)

    user, answer = {"role": "user", "content": "A question?"}, {"role": "assistant", "content": "An answer."}
    other = [
        {"role": "user", "content": " Fragen: \u00e4\U0001f600?\n"},
        {"role": "assistant", "content": "Zwei\n\n W\u00f6rter"},
    ]
    conversations = [[user, answer], [user, answer, *other], [{"role": "system", "content": "Be brief."}, *other]]
    for i, messages in enumerate(conversations):
        try:
            text, spans = render_with_spans(template, messages)
        except RowError as error:
            if i == 0:  # what else a template refuses (system turns, say) is told for the rows that have it
                refuse(f"cannot render one question and its answer: {error}")
            continue
        prompt = render(template, messages[:-1], add_generation_prompt=True)
        trained = [span for span in spans if span[2] & TRAINED]
        start = max(start for start, _, byte in trained if byte & KIND_MASK != TERMINATOR)
        if text.startswith(prompt) and start < len(prompt):
            refuse(f"trains the header of an answer: {text[start:]!r}")
        end = max(end for _, end, _ in trained)
        if not text[:end].rstrip().endswith(terminators):
            refuse(f"does not train the end of an answer: {text[:end][-40:]!r} ends in no special token")
