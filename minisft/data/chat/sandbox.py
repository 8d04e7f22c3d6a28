"""The environment in which chat templates run: Jinja's sandbox, with limits on time, memory and output.

A chat template is a program that came with somebody's tokenizer. Jinja's sandbox keeps it away from Python's internals,
but does not prevent `'a' * 10**10`, two nested loops, or forty lists that each contain the one before twice. A long
operation of Python cannot be stopped from outside, so every operation is kept short:

- Operations that make a large value of a small one (`*`, `**`, `%`, padding, replace, join, format ...) are measured before
  they run.
- Operations that join values (`+`, `~`, lists, dicts, the text inside a macro or a block) are measured after they have run.
  The sizes of both kinds are added up over a rendering, and the sum has a limit.
- Every loop step and macro call is a tick. Ticks are counted, and every now and then the time and the growth of the process
  are checked.

Measures and ticks are filters that are inserted into the syntax tree before it is compiled. A sum that goes straight to the
output or into a variable is not measured here: render() limits the output, and the tick of an assignment the variable. So
ordinary templates pay for a few ticks a message, a tenth of a microsecond each. A template that exceeds a limit gets a
LimitError, which render() turns into a bad row.
"""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

try:
    import resource
except ImportError:  # Windows: memory is limited by the sizes of values only
    resource = None

MAX_TEMPLATE = 2**17  # characters of a template; those of well-known models have some thousand
MAX_SECONDS = 2.0  # of one rendering, of the processor, so that a busy machine refuses nothing
MAX_STEPS = 2_000_000  # loop steps and macro calls of one rendering
MAX_GROWTH = 2**30  # bytes of memory
MAX_SIZE = 2**24  # characters of the output; characters of one value, with ELEMENT for each thing in a list or dict
MAX_MADE = 2**27  # the same, summed over all measured values of one rendering
MAX_BITS = 2**12  # of a whole number that a template computes

ELEMENT = 64  # characters that an element of a list counts as: about its bytes
MAX_OPERANDS = 64  # of a sum that is not measured step by step
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes

PADDING = ("center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice")
QUADRATIC = ("wordwrap", "striptags", "urlize", "pprint")
MEASURED = (
    *PADDING, *QUADRATIC, "format", "format_map", "replace", "join", "tojson", "urlencode", "sum", "round", "int"
)  # fmt: skip
REFUSED = ("encode", "to_bytes", "translate", "maketrans")  # methods that templates do not need


class LimitError(jinja2.exceptions.SecurityError):
    """A template used more than it may."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with limits. One rendering at a time: call `start` before each."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.start()
        # Filters, because a call would cost more: the sandbox checks each.
        self.filters |= {"_steps": self.loop, "_tick": self.tick, "_made": self.made, "_joined": self.joined}
        del self.globals["lipsum"]  # makes random text of any length

    def start(self) -> None:
        self.steps = self.spent = 0
        self.deadline = time.thread_time() + MAX_SECONDS
        self.memory = None  # read at the first check, because reading takes 20 us, as long as a short rendering

    def add_measures(self) -> None:
        """Measure the filters. Call it when all of them are set."""
        for name in MEASURED:
            if name in self.filters:
                self.filters[name] = self._measured(name, self.filters[name])

    @jinja2.pass_context  # so that Jinja does not evaluate it at compile time
    def loop(self, context: Any, things: Any) -> Iterator:
        """The same things for a loop, each with a tick."""
        for thing in things:
            self.steps += 1
            if self.steps % 64 == 0:
                self._look()
            yield thing

    @jinja2.pass_context
    def tick(self, context: Any, value: Any) -> None:
        """One step. value: the one that was just assigned, or None."""
        self.steps += 1
        size = len(value) if isinstance(value, (str, list)) else 0
        if size > 16 and isinstance(value, list):
            size = weight(value)
        if size > MAX_SIZE:
            raise LimitError(f"a value of more than {MAX_SIZE:,} characters")
        if size >= 2**16 or self.steps % 64 == 0:
            self._look()

    def _look(self) -> None:
        if self.steps > MAX_STEPS:
            raise LimitError(f"more than {MAX_STEPS:,} steps")
        if time.thread_time() > self.deadline:
            raise LimitError(f"more than {MAX_SECONDS:g} seconds of computing")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT if resource else 0  # never falls
        self.memory = memory if self.memory is None else self.memory
        if memory - self.memory > MAX_GROWTH:
            raise LimitError(f"more than {MAX_GROWTH:,} bytes of memory")

    @jinja2.pass_context
    def made(self, context: Any, value: Any) -> Any:
        """Measure a value and return it."""
        self.spend(len(value) if isinstance(value, str) else weight(value))
        return value

    @jinja2.pass_context
    def joined(self, context: Any, values: tuple) -> str:
        """What `~` makes of these values."""
        texts, size = [], 0
        for value in values:
            texts.append(str(value))
            size += len(texts[-1])
            if size > MAX_SIZE:
                break
        self.spend(size)
        return "".join(texts)

    def spend(self, size: int) -> None:
        """Count a value of this size, which is or will be made."""
        self.spent += size
        if size > MAX_SIZE or self.spent > MAX_MADE:
            what = f"{size:,} characters" if size > MAX_SIZE else f"{self.spent:,} characters in all"
            raise LimitError(f"would make {what}; at most {MAX_SIZE:,}, and {MAX_MADE:,} in all")

    # --------------------------------------------------------------------------------------------- what Jinja calls

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Measure().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in REFUSED and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            self.spend(_format_size(left, right if isinstance(right, tuple) else (right,)))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            if {"*": sum(bits), "**": bits[0] * abs(right)}.get(operator, 0) > MAX_BITS:
                raise LimitError(f"a whole number of more than {MAX_BITS:,} bits")
        elif operator == "*":
            times, value = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(times, int):
                self.spend(weight(value) * max(times, 0))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if name in MEASURED and isinstance(owner, str):
            args = _without_iterators(args)
            __self.spend(_size(name, (owner, *args), kwargs))
        elif isinstance(__obj, Macro) and (__obj.catch_varargs or __obj.catch_kwargs):
            __self.spend(weight([args, kwargs]))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (list, dict)):
            __self.spend(weight(result))
        return result

    def call_filter(self, name: str, value: Any, args: Any = None, *rest: Any, **more: Any) -> Any:
        self._inner_step(value, args)
        return super().call_filter(name, value, args, *rest, **more)

    def call_test(self, name: str, value: Any, args: Any = None, *rest: Any, **more: Any) -> Any:
        self._inner_step(value, args)
        return super().call_test(name, value, args, *rest, **more)

    def _inner_step(self, value: Any, args: Any) -> None:
        """A step of map, select or reject, which loop inside one operation. Each may search a long text."""
        self.steps += 1
        self.spend(weight([value, args]) // 16)
        if self.steps % 64 == 0:
            self._look()

    def _measured(self, name: str, function: Any) -> Any:
        """The filter, measured before it runs. Filters that use the context get it as their first argument."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            args = _without_iterators(args)
            self.spend(_size(name, args[1:] if passed else args, kwargs))
            return function(*args, **kwargs)

        passed = getattr(function, "jinja_pass_arg", None)
        if passed is not None:
            measured.jinja_pass_arg = passed
        return measured


# ------------------------------------------------------------------------------------------------- the syntax tree


class _Measure(NodeTransformer):
    """Puts ticks and measures into a template."""

    def __init__(self) -> None:
        # ids of sums that go straight to the output or into a variable, and are not measured
        self.free: set[int] = set()
        self.is_buffered = False  # inside a block whose text is collected before it is placed
        self.num_names = 0  # seen so far

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self._free(node.nodes)
        self.generic_visit(node)
        if self.is_buffered:
            node.nodes = [_filter(expr, "_made") for expr in node.nodes]
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node | list[nodes.Node]:
        grows = self._free([node.node])
        self.generic_visit(node)
        return [node, _tick(_assigned(node.target), node.lineno)] if grows else node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> list[nodes.Node]:
        return [self._buffered(node), _tick(_assigned(node.target), node.lineno)]

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.recursive:  # loop(...) runs over other things
            node.body.insert(0, _tick(nodes.Const(None), node.lineno))
        else:
            node.iter = _filter(node.iter, "_steps")
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self._buffered(node)
        node.body.insert(0, _tick(nodes.Const(None), node.lineno))
        return node

    def _buffered(self, node: nodes.Node) -> nodes.Node:
        before, self.is_buffered = self.is_buffered, True
        self.generic_visit(node)
        self.is_buffered = before
        return node

    visit_CallBlock = visit_FilterBlock = _buffered

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        is_free = id(node) in self.free
        self.generic_visit(node)
        return node if is_free else _filter(node, "_made")

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        is_free = id(node) in self.free
        self.generic_visit(node)
        return node if is_free else _filter(_at(nodes.Tuple(node.nodes, "load"), node.lineno), "_joined")

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        self.num_names += 1
        return node

    def _display(self, node: nodes.Node) -> nodes.Node:
        before = self.num_names
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        is_constant = self.num_names == before
        return node if is_target or is_constant else _filter(node, "_made")

    visit_List = visit_Tuple = visit_Dict = _display

    def _free(self, exprs: Sequence[nodes.Node]) -> bool:
        """Mark the sums that make these values as free, unless they are long. Whether there are any."""
        sums = list(_sums(exprs))
        if sum(len(getattr(node, "nodes", "ab")) for node in sums) <= MAX_OPERANDS:
            self.free.update(map(id, sums))
            return bool(sums)
        return False


def _sums(exprs: Sequence[nodes.Node | None]) -> Iterator[nodes.Node]:
    """The sums that make these values, without sums inside calls and the like."""
    for node in exprs:
        if isinstance(node, (nodes.Add, nodes.Concat)):
            yield node
            yield from _sums([node.left, node.right] if isinstance(node, nodes.Add) else node.nodes)
        elif isinstance(node, nodes.CondExpr):
            yield from _sums([node.expr1, node.expr2])


def _assigned(target: nodes.Node) -> nodes.Expr:
    if isinstance(target, nodes.Name):
        return nodes.Name(target.name, "load")
    if isinstance(target, nodes.NSRef):
        return nodes.Getattr(nodes.Name(target.name, "load"), target.attr, "load")
    return nodes.Const(None)  # several names at once: their tuple was measured


def _tick(value: nodes.Expr, line: int) -> nodes.Node:
    return nodes.ExprStmt(_filter(value, "_tick")).set_lineno(line, override=True)


def _filter(value: nodes.Node, name: str) -> nodes.Expr:
    return _at(nodes.Filter(value, name, [], [], None, None), value.lineno)


def _at(node: Any, line: int) -> Any:
    """The node, said to be of this line. set_lineno would walk through all that is in it, once for every node around."""
    node.lineno = line
    return node


# ------------------------------------------------------------------------------------------------- sizes


def weight(value: Any) -> int:
    """The characters of a value, with ELEMENT for each thing in it, as often as it occurs. Counting stops above MAX_SIZE."""
    total, inner = 0, [value]
    while inner and total <= MAX_SIZE:
        value = inner.pop()
        total += len(value) if isinstance(value, (str, bytes)) else ELEMENT
        if isinstance(value, (list, tuple)):
            inner += value[: MAX_SIZE // ELEMENT + 1]
        elif isinstance(value, dict):
            inner += [*value.keys(), *value.values()]
    return total


def _without_iterators(args: tuple) -> tuple:
    """The same arguments, with lists in place of iterators (of map, select and the like), which have no size."""
    return tuple(list(arg) if isinstance(arg, Iterator) else arg for arg in args)


def _format_size(text: str, values: Any) -> int:
    """The largest size of a formatted text. Widths and precisions are in the format, or as * or {} among the values; a value
    may be used many times."""
    fields = text.count("%") + text.count("{") + 1
    widths = [int(digits[:20]) for digits in re.findall(r"\d+", text)]
    if "*" in text or text.count("{") > 1:
        widths += [abs(value) for value in values if isinstance(value, int)]
    return sum(widths) + fields * weight(list(values))


def _size(name: str, args: tuple, kwargs: dict) -> int:
    """The largest size that a filter or a method of strings could make. args: the value, and the arguments of the call."""
    value, *others = args
    others += kwargs.values()
    numbers = [abs(other) for other in others if isinstance(other, int)]
    if name == "replace":
        old, new = (str(other) for other in (*others, "", "")[:2])
        text = str(value)
        return (len(text) // max(len(old), 1) + 1) * len(new) + len(text)
    if name == "join":  # the method has the separator first
        parts = next((part for part in (*others, value) if isinstance(part, (list, tuple))), [])
        return weight(parts) + len(parts) * max((len(s) for s in (value, *others) if isinstance(s, str)), default=0)
    if name in ("format", "format_map"):
        return _format_size(str(value), others)
    if name in ("round", "int"):  # 10 to the power of the precision; the digits of a number
        return MAX_SIZE + 1 if max(numbers, default=0) > 300 or len(str(value)) > MAX_BITS // 5 else 0
    if name == "sum":  # a sum of lists copies all earlier ones for each list
        return MAX_SIZE + 1 if any(isinstance(other, (list, tuple)) for other in others) else 0
    size = weight(value)
    if name == "urlencode":  # a character may be 4 bytes, of 3 characters each
        return 12 * size
    if name in QUADRATIC:
        return size**2 // ELEMENT**2
    if name == "tojson":  # each thing has an indentation for each level
        levels = size // ELEMENT + 1 if numbers or any(isinstance(other, str) for other in others) else 0
        return size + levels * (sum(numbers) * 8 + weight(others))
    # A width counts once, or for each line or tab.
    times = str(value).count("\n") + str(value).count("\t") + 1 if name in ("indent", "expandtabs") else 1
    return size + max(numbers, default=0) * times + weight(others) * times
