"""Jinja for templates of unknown origin: no access to Python, and limits of time and memory.

A rendering has an allowance, in characters. Every iteration, call, filter and operation charges
for the text that it reads or makes, before it is made where one step could make much more than it
was given (``'a' * 10**9``). Only filters and methods of texts that chat templates use exist, and
none of them is random. So a rendering takes time and memory in proportion to its messages.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from proxykd_jax.errors import UserError
from proxykd_jax.texts.special_text import MARK_END, MARK_START

if TYPE_CHECKING:
    import jinja2.sandbox

# A template that prints today's date would give other tokens every day. This is the date that
# Llama 3.1's template falls back to.
_DATE = datetime.datetime(2024, 7, 26)
# Real templates charge up to 30 for each character of long messages.
_ALLOWANCE, _PER_CHARACTER, _MOST = 2_000_000, 200, 200_000_000
_STEP = 50
_MOST_BITS = 128
_MOST_DECIMALS = 30
# A width or precision of four digits, or one that is itself a value.
_WIDE_FORMAT = re.compile(r"\d{4}|\*|\{[^{}]*\{")
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items"),
    *("last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("select", "selectattr", "sort", "title", "trim", "unique", "upper"),
)
_TEXT_METHODS = {
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha"),
    *("isascii", "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper"),
    *("join", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind"),
    *("rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip"),
    *("swapcase", "title", "upper"),
}
# No template can write these names.
_COUNTED, _JOINED, _MADE, _READ = "counted loop", "joined text", "made value", "read value"


class TemplateTooCostly(UserError):  # noqa: N818 (read as a sentence)
    """A template takes more time or memory than any chat template needs."""


class Allowance:
    """What one rendering may still cost, and the filters that make texts within it."""

    def __init__(self) -> None:
        # Renderings in several threads have an allowance each.
        self._here = threading.local()
        self.begin()

    def begin(self, *given: Any) -> None:
        """Starts a rendering of these messages and tools."""
        self._here.left = _MOST
        size = sum(self.deep(value) for value in given)
        self._here.left = min(_ALLOWANCE + _PER_CHARACTER * size, _MOST)

    def charge(self, cost: int) -> None:
        """Takes something from the allowance.

        Raises:
          TemplateTooCostly: nothing is left.
        """
        here = self._here
        here.left -= cost
        if here.left < 0:
            raise TemplateTooCostly(
                "the chat template takes more time or memory than any chat template needs: it "
                "repeats, counts or multiplies texts without end. Use another template."
            )

    def text(self, value: Any) -> str:
        """The text of a value that a template writes."""
        if isinstance(value, str):
            return str(value)
        self.charge(self.deep(value))
        return str(value)

    def call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], call: Any) -> Any:
        """Calls what a template calls; ``call`` does it if no filter takes its place."""
        owner = getattr(function, "__self__", None)
        self.charge(_STEP + _weight(owner))
        if isinstance(owner, str) and function.__name__ == "replace":
            return self.replace(owner, *args)
        if isinstance(owner, str) and function.__name__ == "join" and len(args) == 1:
            return self.join(args[0], owner)
        result = call(*args, **kwargs)
        self.charge(self.deep(result) if isinstance(result, dict) else _weight(result))
        return result

    def charge_operator(self, operator: str, left: Any, right: Any) -> None:
        """Charges for ``left operator right`` before it is computed."""
        numbers = [value for value in (left, right) if isinstance(value, int)]
        if any(value.bit_length() > _MOST_BITS for value in numbers):
            self.charge(_MOST)
        if operator == "*":
            sizes = [_weight(v) for v in (left, right) if not isinstance(v, int | float)]
            if sizes and numbers:
                self.charge(sizes[0] * max(numbers[0], 1))
        elif operator == "**":
            if len(numbers) == 2 and left.bit_length() * abs(right) > _MOST_BITS:
                self.charge(_MOST)
        elif operator == "+" and len(numbers) < 2:
            self.charge(_weight(left) + _weight(right))

    def charged(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter of Jinja that charges for what it reads and gives."""
        place = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.charge(_STEP + _weight(args[place]))
            result = function(*args, **kwargs)
            self.charge(_weight(result))
            return result

        return bounded

    def counted(self, values: Iterable[Any], written: int) -> Iterator[Any]:
        """What a loop runs over; its body has ``written`` characters of its own."""
        cost = _STEP + max(written, 0)
        for value in values:
            self.charge(cost)
            yield value

    def made(self, value: Any) -> Any:
        self.charge(self.deep(value, written=False))
        return value

    def read(self, value: Any) -> Any:
        self.charge(_weight(value) // 8)
        return value

    def join(self, values: Iterable[Any], d: str = "") -> str:
        between, texts = self.text(d), []
        for value in values:
            texts.append(self.text(value))
            self.charge(len(texts[-1]) + len(between))
        return between.join(texts)

    def replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = self.text(s), self.text(old), self.text(new)
        found = text.count(old)
        found = found if count is None or count < 0 else min(found, count)
        self.charge(_STEP + len(text) + found * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def indent(self, s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        import jinja2.filters

        text = self.text(s)
        wide = len(width) if isinstance(width, str) else width
        self.charge(len(text) + (len(text.splitlines()) + 1) * max(wide, 0))
        return str(jinja2.filters.do_indent(text, width, first, blank))

    def escape(self, value: Any) -> str:
        import jinja2.filters

        text = self.text(value)
        self.charge(6 * len(text))
        return str(jinja2.filters.escape(text))

    def percent(self, pattern: Any, *args: Any, **kwargs: Any) -> str:
        pattern = self.text(pattern)
        values: Any = kwargs or (args[0] if len(args) == 1 and isinstance(args[0], dict) else args)
        self.check_format(pattern, pattern.count("%"), values)
        return pattern % values

    def check_format(self, pattern: str, fields: int, values: Any) -> None:
        if _WIDE_FORMAT.search(pattern):
            self.charge(_MOST)
        self.charge(len(pattern) + fields * (1000 + self.deep(values)))

    def to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        wide = indent if isinstance(indent, int) else len(indent or "")
        between = sum(len(text) for text in separators or (", ", ": "))
        self.charge(self.deep(value) * (1 + max(wide, 0) + between))
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def deep(self, value: Any, *, written: bool = True) -> int:
        """Characters and elements of a value at any depth; repeated ones count again.

        ``written``: the value becomes text, which some values cannot.
        """
        import jinja2

        size, rest, left = 0, [value], self._here.left
        while rest and size <= left:
            found = rest.pop()
            size += 1 + (len(found) if isinstance(found, str) else 0)
            if isinstance(found, dict):
                rest += [*found.keys(), *found.values()]
            elif isinstance(found, list | tuple):
                rest += found
            elif written and not isinstance(
                found, str | int | float | range | jinja2.Undefined | None
            ):
                raise jinja2.TemplateError(f"a {type(found).__name__} cannot be written as text")
        return size


def sandbox(allowance: Allowance) -> jinja2.sandbox.SandboxedEnvironment:
    """The environment of one template, whose renderings use this allowance."""
    import jinja2.ext
    import jinja2.filters
    import jinja2.nodes
    import jinja2.sandbox
    import jinja2.visitor

    nodes = jinja2.nodes

    class Generation(jinja2.ext.Extension):
        """The ``generation`` block: its body between two marks."""

        tags: set[str] = {"generation"}  # noqa: RUF012 (the base class declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{MARK_START}{caller()}{MARK_END}"

    class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(jinja2.sandbox.SandboxedEnvironment.default_binop_table)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            return Charging().visit(super()._parse(source, name, filename))

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            call = functools.partial(super().call, context, function)
            return allowance.call(function, args, kwargs, call)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+" and type(left) is str and type(right) is str:  # most of all
                made = left + right
                allowance.charge(len(made))
                return made
            if operator == "%" and isinstance(left, str):
                return allowance.percent(left, *(right if isinstance(right, tuple) else (right,)))
            allowance.charge_operator(operator, left, right)
            return self.binop_table[operator](left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str):
                return attr in _TEXT_METHODS
            if isinstance(obj, int | float) or obj is dict:
                return False
            return super().is_safe_attribute(obj, attr, value)

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise jinja2.sandbox.SecurityError(
                f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe"
            )

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            made = super().wrap_str_format(value)
            if made is None:
                return None

            def bounded(*args: Any, **kwargs: Any) -> str:
                pattern = value.__self__
                allowance.check_format(pattern, pattern.count("{"), (args, kwargs))
                return made(*args, **kwargs)

            return bounded

    class Charging(jinja2.visitor.NodeTransformer):
        """Lets what a template repeats or makes charge the allowance."""

        def visit_For(self, node: nodes.For) -> nodes.Node:
            if node.recursive:
                raise jinja2.TemplateSyntaxError("a recursive loop is not supported", node.lineno)
            self.generic_visit(node)
            written = sum(
                len(data.data) for part in node.body for data in part.find_all(nodes.TemplateData)
            )
            node.iter = filtered(node.iter, _COUNTED, nodes.Const(written))
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

        def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
            self.generic_visit(node)
            for operand in node.ops:
                if operand.op in ("in", "notin") and not isinstance(operand.expr, nodes.Const):
                    operand.expr = filtered(operand.expr, _READ)
            return node

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
            self.generic_visit(node)
            return filtered(node, _READ) if isinstance(node.arg, nodes.Slice) else node

        def _visit_literal(self, node: Any) -> nodes.Node:
            self.generic_visit(node)
            parts = node.items
            constant = all(isinstance(part, nodes.Const) for part in parts)
            return (
                node
                if constant or getattr(node, "ctx", "load") != "load"
                else filtered(node, _MADE)
            )

        visit_List = visit_Tuple = visit_Dict = _visit_literal

    def filtered(node: Any, name: str, *args: Any) -> Any:
        return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)

    @jinja2.pass_context
    def written(context: Any, value: Any) -> str:
        """What ``{{ ... }}`` writes. It asks for the context, so that nothing is written early."""
        text = value if type(value) is str else allowance.text(value)
        allowance.charge(len(text))
        return text

    @jinja2.pass_environment
    def join(environment: Any, value: Any, d: str = "", attribute: Any = None) -> str:
        if attribute is not None:
            value = map(jinja2.filters.make_attrgetter(environment, attribute), value)
        return allowance.join(value, d)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
        finalize=written,
    )
    environment.globals = {
        "range": jinja2.sandbox.safe_range,
        "dict": dict,
        "namespace": jinja2.utils.Namespace,
        "raise_exception": _refuse,
        "strftime_now": _date,
    }
    known = jinja2.filters.FILTERS
    environment.filters = {name: allowance.charged(known[name]) for name in _FILTERS} | {
        "e": allowance.escape,
        "escape": allowance.escape,
        "format": allowance.percent,
        "indent": allowance.indent,
        "join": join,
        "replace": allowance.replace,
        "round": _round,
        "safe": allowance.text,
        "string": allowance.text,
        "sum": _sum,
        "tojson": allowance.to_json,
        _COUNTED: allowance.counted,
        _JOINED: allowance.join,
        _MADE: allowance.made,
        _READ: allowance.read,
    }
    return environment


def _weight(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 1


def _refuse(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _date(form: str) -> str:
    return _DATE.strftime(form[:100])


def _round(value: float, precision: int = 0, method: str = "common") -> float:
    import jinja2.filters

    if not -_MOST_DECIMALS <= precision <= _MOST_DECIMALS:
        raise jinja2.TemplateError(f"round takes at most {_MOST_DECIMALS} decimals")
    return jinja2.filters.do_round(value, precision, method)  # type: ignore[arg-type]


def _sum(values: Iterable[float], start: float = 0) -> float:
    import jinja2

    if not isinstance(start, int | float):
        raise jinja2.TemplateError("sum adds numbers alone")
    return sum(values, start)
