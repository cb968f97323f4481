"""Jinja's immutable sandbox, bounded: a template may neither run nor grow without end. Knows no conversation.

A template comes with a model's files, and those come from anywhere. Jinja's sandbox keeps it from the interpreter, but
not from looping for hours or building a string of gigabytes. Here every turn of a loop, every call, filter and operator
costs a step of a budget that is counted, not timed (so that a render ends the same way on every machine), and whatever
can make a value larger says how large before it does. A filter or method that is not known to be harmless is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.runtime
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARS = 16 * 2**20  # of any one string that a template makes, and of all that it writes
_MAX_ITEMS = 1_000_000
_MAX_INT_BITS = 1024

# Those of Jinja's filters whose result is bounded by what they are given, or that are guarded below.
# fmt: off
_FILTERS = frozenset((
    "abs", "attr", "batch", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "forceescape", "format", "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower",
    "map", "max", "min", "random", "reject", "rejectattr", "replace", "reverse", "round", "safe", "select",
    "selectattr", "slice", "sort", "string", "striptags", "sum", "title", "tojson", "trim", "truncate",
    "unique", "upper", "urlencode", "wordcount",
))
_STR_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle",
    "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind",
    "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper",
))
_FORMAT = re.compile(r"\d{4,}|\*|:[^}]*\{")  # a width that is large, or that is given as an argument
_CHEAP_TESTS = frozenset((
    "boolean", "callable", "defined", "false", "float", "integer", "iterable", "mapping", "none", "number",
    "sequence", "string", "true", "undefined",
))
# fmt: on
_CHARS_A_STEP, _ITEMS_A_STEP = 1024, 16


class Budget:
    """What one render may still spend."""

    __slots__ = ("num_chars", "num_steps")

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.num_chars = MAX_CHARS

    def step(self) -> None:
        """One turn, call, filter or operator. Raises SecurityError."""
        self.num_steps -= 1
        if self.num_steps < 0:
            raise SecurityError("it takes too many steps: it loops without end, or in too many nested turns")

    def touch(self, value: Any) -> None:
        """Work that grows with the value it is done on."""
        if isinstance(value, str):
            self.num_steps -= len(value) // _CHARS_A_STEP
        elif isinstance(value, Sized):
            self.num_steps -= len(value) // _ITEMS_A_STEP
        self.step()

    def write(self, num_chars: int) -> None:
        """Output, or text that is kept. Raises SecurityError."""
        self.num_chars -= num_chars
        if self.num_chars < 0:
            raise SecurityError(f"it writes more than {MAX_CHARS} characters")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Renders one template at a time: `budget` is the running one's."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, filters: dict[str, Callable[..., Any]], extensions: list[Any]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.budget = Budget(0)
        known = {name: function for name, function in self.filters.items() if name in _FILTERS} | filters
        self.filters.clear()
        self.filters.update({name: _guarded(name, function) for name, function in known.items()})
        self.filters[_LOOP] = _each
        self.filters[_WRITE] = _write
        self.filters[_TOUCH] = _touch
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Instrument().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of strings, only methods whose result is bounded by the string, or that are guarded below."""
        if isinstance(obj, str) and attr not in _STR_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: jinja2.runtime.Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template, of its own macros and recursive loops too."""
        owner = getattr(function, "__self__", None)
        name = getattr(function, "__name__", "")
        self.budget.touch(owner)
        if isinstance(owner, str) and name in ("join", "replace"):
            _check_growth(name, (owner, *args) if name == "replace" else (args[0] if args else (), owner))
        return _checked(_invoke(super().call, (context, function, *args), kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format`, with widths and repetitions that are bounded."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def formatted(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, (*args, *kwargs.values()))
            return str(_invoke(wrapped, args, kwargs))

        return formatted

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Every arithmetic operator."""
        self.budget.touch(left)
        self.budget.touch(right)
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            raise SecurityError("it uses the operator '**', whose result has no bound")
        elif operator == "%" and isinstance(left, str):
            _check_format(left, right if isinstance(right, tuple) else (right,))
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            _check_size(len(left) + len(right), left)
        return super().call_binop(context, operator, left, right)


_LOOP, _WRITE, _TOUCH = "llmserve_each", "llmserve_write", "llmserve_touch"


class _Instrument(NodeTransformer):
    """Puts a step into every turn of every loop, and counts every piece of text that is written or joined."""

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _LOOP)
        return node

    def visit_Output(self, node: jinja2.nodes.Output) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            _filter(jinja2.nodes.Const(part.data) if isinstance(part, jinja2.nodes.TemplateData) else part, _WRITE)
            for part in node.nodes
        ]
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.nodes = [_filter(part, _WRITE) for part in node.nodes]
        return node

    def visit_Getitem(self, node: jinja2.nodes.Getitem) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return _filter(node, _TOUCH) if isinstance(node.arg, jinja2.nodes.Slice) else node

    def visit_Compare(self, node: jinja2.nodes.Compare) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.expr = _touched(node.expr)
        for operand in node.ops:
            operand.expr = _touched(operand.expr)
        return node

    def visit_Test(self, node: jinja2.nodes.Test) -> jinja2.nodes.Node:
        self.generic_visit(node)
        if node.name not in _CHEAP_TESTS:
            node.node = _touched(node.node)
        return node


def _filter(node: Any, name: str) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _touched(node: jinja2.nodes.Expr) -> jinja2.nodes.Expr:
    return node if isinstance(node, jinja2.nodes.Const) else _filter(node, _TOUCH)


@jinja2.pass_context
def _touch(context: jinja2.runtime.Context, value: Any) -> Any:
    """The value, after paying for work that grows with it."""
    context.environment.budget.touch(value)  # type: ignore[attr-defined]
    return value


@jinja2.pass_context
def _each(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any] | list[Any]:
    """The items, a step each. What has a length keeps it: `loop.last` and `loop.length` look for it."""
    budget = context.environment.budget  # type: ignore[attr-defined]
    if isinstance(items, Sized):
        num_items = len(items)
        if num_items > budget.num_steps:
            raise SecurityError(f"it loops over {num_items} items")
        budget.num_steps -= num_items
        return items  # type: ignore[return-value]
    return _counted(items, budget)


def _counted(items: Iterable[Any], budget: Budget) -> Iterator[Any]:
    for item in items:
        budget.step()
        yield item


@jinja2.pass_context
def _write(context: jinja2.runtime.Context, value: Any) -> Any:
    """The value, counted as it will be written."""
    if not isinstance(value, str):
        if isinstance(value, jinja2.Undefined):
            return value
        value = str(value)
    context.environment.budget.write(len(value))  # type: ignore[attr-defined]
    return value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that costs a step, says no before it grows too large, and passes on what Jinja passes it."""
    kind = getattr(function, "jinja_pass_arg", None)

    @jinja2.pass_context
    def guarded(context: jinja2.runtime.Context, value: Any, *args: Any, **options: Any) -> Any:
        context.environment.budget.touch(value)  # type: ignore[attr-defined]
        given = (*args, *options.values())
        if name in ("join", "replace"):
            _check_growth(name, (value, *given))
        elif name == "format":
            _check_format(str(value), given)
        elif name in ("batch", "indent", "slice", "truncate", "tojson"):
            _check_counts(value, given)
        first = _PASSED[kind.name](context) if kind is not None else ()
        result = _invoke(function, (*first, value, *args), options)
        return _checked(result)

    return guarded


_PASSED: dict[str, Callable[[jinja2.runtime.Context], tuple[Any, ...]]] = {
    "context": lambda context: (context,),
    "eval_context": lambda context: (context.eval_ctx,),
    "environment": lambda context: (context.environment,),
}


def _check_growth(name: str, values: tuple[Any, ...]) -> None:
    """`join` of (items, separator), `replace` of (text, old, new): their results can be products."""
    if name == "join":
        separator = values[1] if len(values) > 1 and isinstance(values[1], str) else ""
        if separator and isinstance(values[0], Sized):
            _check_size(len(values[0]) * len(separator), "")
    elif len(values) > 2 and all(isinstance(value, str) for value in values[:3]):
        text, old, new = values[:3]
        _check_size(len(text) + (len(text) // max(len(old), 1) + 1) * len(new), "")


def _check_format(text: str, values: tuple[Any, ...]) -> None:
    if _FORMAT.search(text):
        raise SecurityError("it formats with a width that is too large or not known")
    longest = max((len(value) for value in values if isinstance(value, Sized)), default=0)
    _check_size(len(text) + (text.count("{") + text.count("%")) * longest, "")


def _check_counts(value: Any, given: tuple[Any, ...]) -> None:
    """A width or a number of columns, for each line or item at the most."""
    size = len(value) if isinstance(value, Sized) else 1
    for argument in given:
        if isinstance(argument, int):
            _check_size(abs(argument) * max(size, 1), "")
        elif isinstance(argument, str):
            _check_size(len(argument) * max(size, 1), "")


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, Sized) and isinstance(times, int):
            _check_size(len(value) * times, value)
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > _MAX_INT_BITS:
        raise SecurityError("it computes with numbers that are too large")


def _check_size(size: int, kind: Any) -> None:
    limit = MAX_CHARS if isinstance(kind, str) else _MAX_ITEMS
    if size > limit:
        raise SecurityError(f"it makes a value of {size} characters or items; at most {limit} are allowed")


def _invoke(function: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """A call as the template wrote it."""
    return function(*args, **options)


def _checked(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _check_size(len(value), value)
    return value
