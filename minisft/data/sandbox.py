"""The environment in which chat templates run: Jinja's sandbox, with limits on time, memory and output.

A chat template is a program that came with somebody's tokenizer. Jinja's sandbox keeps it away from Python's internals,
but not from `'a' * 10**10` or two nested loops. So every loop body, macro and assignment ticks: a call that is put into
the syntax tree before it is compiled. A tick counts, looks at the clock, and looks at how far the process has grown since
the rendering began. What can take gigabytes in one operation (`*`, `**`, `%`, padding, replace, join, format) is measured
before it runs. Whoever exceeds a limit gets a LimitError, which render() turns into a bad row.

Cost: a fifth of a microsecond a tick, a few a message.
"""

import re
import sys
import time
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

try:
    import resource
except ImportError:  # Windows: no limit on memory but that of single operations
    resource = None

MAX_SECONDS = 10.0  # of one rendering
MAX_TICKS = 2_000_000  # loop steps, macro calls and assignments of one rendering
MAX_GROWTH = 2**30  # bytes of memory
MAX_SIZE = 2**26  # characters of the output and of what one operation makes; elements of a list

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
PADDING = (
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "indent",
    "wordwrap",
    "batch",
    "slice",
    "format",
    "pprint",
)


class LimitError(jinja2.exceptions.SecurityError):
    """A template used more than it may."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with limits. One rendering at a time: call `start` before each."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.start()
        self.filters["_tick"] = self.tick  # a filter costs less than a call, which is checked
        for name in (*PADDING, "replace", "join"):
            if name in self.filters:
                self.filters[name] = _checked(name, self.filters[name])

    def start(self) -> None:
        self.ticks = 0
        self.deadline = time.monotonic() + MAX_SECONDS
        self.memory = None  # measured at the first check: asking takes 20 us, as long as a short rendering

    @jinja2.pass_context
    def tick(self, context: Any, value: Any) -> None:
        """One step of a template; `value` is what it has just assigned, or None."""
        self.ticks += 1
        size = len(value) if isinstance(value, (str, list)) else 0
        if size > MAX_SIZE:
            raise LimitError(f"a value of {size:,} characters or elements; at most {MAX_SIZE:,}")
        if size < 2**16 and self.ticks % 64:
            return
        if self.ticks > MAX_TICKS:
            raise LimitError(f"more than {MAX_TICKS:,} steps")
        if time.monotonic() > self.deadline:
            raise LimitError(f"more than {MAX_SECONDS:g} seconds")
        memory = _memory()
        self.memory = memory if self.memory is None else self.memory
        if memory - self.memory > MAX_GROWTH:
            raise LimitError(f"more than {MAX_GROWTH:,} bytes of memory")

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for node in [tree, *tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.If))]:
            for branch in ("body", "else_"):
                if getattr(node, branch, None):
                    setattr(
                        node, branch, _with_ticks(getattr(node, branch), isinstance(node, (nodes.For, nodes.Macro)))
                    )
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_size(max(_length(left) * _number(right), _length(right) * _number(left)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_size(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str) and name in (*PADDING, "replace", "join"):
            _check_call(name, (owner, *args), kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _with_ticks(statements: list[nodes.Node], is_repeated: bool) -> list[nodes.Node]:
    """The same statements; a tick before them where they may run again, and one after every assignment."""
    ticked = [_tick(nodes.Const(None), statements[0].lineno)] if is_repeated else []
    for statement in statements:
        ticked.append(statement)
        if isinstance(statement, (nodes.Assign, nodes.AssignBlock)):
            ticked.append(_tick(_assigned(statement.target), statement.lineno))
    return ticked


def _assigned(target: nodes.Node) -> nodes.Expr:
    if isinstance(target, nodes.Name):
        return nodes.Name(target.name, "load")
    if isinstance(target, nodes.NSRef):
        return nodes.Getattr(nodes.Name(target.name, "load"), target.attr, "load")
    return nodes.Const(None)  # several names at once


def _tick(value: nodes.Expr, line: int) -> nodes.Node:
    return nodes.ExprStmt(nodes.Filter(value, "_tick", [], [], None, None)).set_lineno(line, override=True)


def _memory() -> int:
    """The most that this process has held, in bytes. It never falls, so only new heights count."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT if resource else 0


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple)) else 0


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise LimitError(f"one operation would make {size:,} characters, elements or bits; at most {MAX_SIZE:,}")


def _check_format(text: str, values: tuple) -> None:
    """Widths and precisions stand in the format, or as * or {} among the values."""
    widths = [int(digits[:20]) for digits in re.findall(r"\d+", text)]
    if "*" in text or "{" in text:
        widths += [abs(value) for value in values if isinstance(value, int)]
    _check_size(sum(widths))


def _checked(name: str, function: Any) -> Any:
    """A filter that is measured first. Filters that ask for the context get it as their first argument."""

    def measured(*args: Any, **kwargs: Any) -> Any:
        _check_call(name, args[1:] if passed else args, kwargs)
        return function(*args, **kwargs)

    passed = getattr(function, "jinja_pass_arg", None)
    if passed is not None:
        measured.jinja_pass_arg = passed
    return measured


def _check_call(name: str, args: tuple, kwargs: dict) -> None:
    """args: the string and what the method or filter is given."""
    values = (*args[1:], *kwargs.values())
    if name == "replace":
        old, new = (str(value) for value in (*values, "", "")[:2])
        _check_size((_length(args[0]) // max(len(old), 1) + 1) * len(new) + _length(args[0]))
    elif name == "join":
        lists = [value for value in args if isinstance(value, (list, tuple))]
        separators = [value for value in (*args, *kwargs.values()) if isinstance(value, str)]
        _check_size(max(map(len, lists), default=0) * max(map(len, separators), default=0))
    elif name == "format":
        _check_format(str(args[0]), values)
    else:  # the width multiplies the lines of an indentation, the tabs of a text, or stands alone
        widths = [abs(value) for value in values if isinstance(value, int)] + [_length(v) for v in values]
        pieces = str(args[0]).count("\n") + str(args[0]).count("\t") + 1 if name in ("indent", "expandtabs") else 1
        _check_size(max(widths, default=0) * pieces)
