r"""Evaluates a formula in LaTeX or plain text to a complex number, with numbers for its letters.

Two formulas count as equal if they have the same values for several values of their letters:
``\frac{\sqrt{3}}{2}`` and ``\sqrt3/2``, ``2x(x-1)`` and ``2x^2 - 2x``. Nothing is executed: a
recursive-descent parser reads the formula.
"""

from __future__ import annotations

import cmath
import math
import re
from collections.abc import Callable, Mapping

_FUNCTIONS: Mapping[str, Callable[[complex], complex]] = {
    "sqrt": cmath.sqrt,
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "cot": lambda x: 1 / cmath.tan(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "ln": cmath.log,
    "log": cmath.log10,
    "exp": cmath.exp,
    "abs": abs,
}
_CONSTANTS = {"pi": complex(math.pi), "infty": complex(math.inf)}
_TOKEN = re.compile(r"\\?[A-Za-z]+|\d+\.?\d*|\.\d+|[-+*/^(){}\[\]!|_,]|\\[a-z]+")
_DEGREE = math.pi / 180
_LONGEST = 400
# Larger powers and factorials do not occur in benchmark answers, and are slow.
_LARGEST_POWER, _LARGEST_FACTORIAL = 10_000, 100


class _FormulaError(Exception):
    """The text is not a formula that this parser understands."""


def value(text: str, letters: Mapping[str, complex]) -> complex | None:
    """The value of a formula; None if the text is not a formula or has no finite value.

    Args:
      text: LaTeX without ``\\left`` and spacing commands, or plain text.
      letters: the value of each letter; i and e are the constants unless given.
    """
    if len(text) > _LONGEST or not text.strip():
        return None
    try:
        parser = _Parser(_tokens(text), letters)
        found = parser.sum()
        if parser.peek() is not None:
            return None
    except (_FormulaError, ArithmeticError, ValueError, RecursionError):
        return None
    return found if cmath.isfinite(found) else None


def letters_in(text: str) -> set[str]:
    """The letters of a formula that stand for numbers, Greek ones by name."""
    found: set[str] = set()
    for token in _TOKEN.findall(text):
        name = token.lstrip("\\")
        if not name[:1].isalpha() or name in _FUNCTIONS or name in _CONSTANTS:
            continue
        if token.startswith("\\") or len(name) == 1:
            found |= set() if name in ("frac", "cdot", "times", "div", "circ", "pm") else {name}
        else:
            found |= set(name)
    return found - {"i", "e"}


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    place = 0
    text = text.replace("**", "^")
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        match = _TOKEN.match(text, place)
        if match is None:
            raise _FormulaError
        token = match[0]
        name = token.lstrip("\\")
        if token[0].isalpha() and len(name) > 1 and name not in (*_FUNCTIONS, *_CONSTANTS):
            tokens += list(name)
        else:
            tokens.append(name)
        place = match.end()
    return tokens


class _Parser:
    """Parses sums of products of powers; factors need no sign between them."""

    def __init__(self, tokens: list[str], letters: Mapping[str, complex]) -> None:
        self._tokens, self._letters, self._place = tokens, letters, 0

    def peek(self) -> str | None:
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _take(self, wanted: str | None = None) -> str:
        token = self.peek()
        if token is None or (wanted is not None and token != wanted):
            raise _FormulaError
        self._place += 1
        return token

    def sum(self) -> complex:
        total = self._product()
        while (token := self.peek()) in ("+", "-", "pm"):
            self._take()
            term = self._product()
            # Plus-minus is a letter of its own, so that both sides must use it alike.
            sign = {"+": 1, "-": -1}.get(str(token), self._letters.get("pm", 0.7310585))
            total += sign * term
        return total

    def _product(self) -> complex:
        total = self._signed()
        while (token := self.peek()) is not None:
            if token in ("*", "cdot", "times"):
                self._take()
                total *= self._signed()
            elif token in ("/", "div"):
                self._take()
                total /= self._signed()
            elif token in ("+", "-", "pm", ")", "}", "]", "|", ",", "!"):
                break
            else:
                total *= self._power()
        return total

    def _signed(self) -> complex:
        token = self.peek()
        if token in ("+", "-", "pm"):
            self._take()
            sign = {"+": 1, "-": -1}.get(str(token), self._letters.get("pm", 0.7310585))
            return sign * self._signed()
        return self._power()

    def _power(self) -> complex:
        base = self._postfixed()
        if self.peek() != "^":
            return base
        self._take()
        if self._is_degree():
            return base * _DEGREE
        exponent = self._argument(signed=True)
        if abs(exponent) > _LARGEST_POWER:
            raise _FormulaError
        return complex(base) ** exponent

    def _is_degree(self) -> bool:
        rest = self._tokens[self._place : self._place + 3]
        size = 1 if rest[:1] == ["circ"] else 3 if rest == ["{", "circ", "}"] else 0
        self._place += size
        return size > 0

    def _postfixed(self) -> complex:
        found = self._atom()
        while self.peek() == "!":
            self._take()
            if (
                found.imag
                or found.real != int(found.real)
                or not 0 <= found.real <= (_LARGEST_FACTORIAL)
            ):
                raise _FormulaError
            found = complex(math.factorial(int(found.real)))
        return found

    def _argument(self, *, signed: bool = False) -> complex:
        r"""The argument of a command: a group, or one digit or letter as in ``\frac12``."""
        if self.peek() == "{":
            return self._group("{", "}")
        if signed and self.peek() in ("-", "+"):
            return self._signed()
        token = self.peek() or ""
        if len(token) > 1 and token[0].isdigit() and not signed:
            self._tokens[self._place : self._place + 1] = [token[0], token[1:]]
        return self._atom()

    def _group(self, opening: str, closing: str) -> complex:
        self._take(opening)
        found = self.sum()
        self._take(closing)
        return found

    def _atom(self) -> complex:
        token = self.peek()
        if token in ("(", "{", "["):
            return self._group(token, {"(": ")", "{": "}", "[": "]"}[token])
        if token == "|":
            return complex(abs(self._group("|", "|")))
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            return self._number(token)
        if token == "frac":
            above = self._argument()
            return above / self._argument()
        if token in _FUNCTIONS:
            return self._function(token)
        if token in self._letters:
            return self._letters[token]
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        if token in ("i", "e"):
            return {"i": 1j, "e": complex(math.e)}[token]
        raise _FormulaError

    def _number(self, token: str) -> complex:
        found = complex(float(token))
        # A mixed number: "3\frac{1}{2}" is 3 + 1/2.
        if self.peek() == "frac" and token.isdigit():
            kept = self._place
            self._take()
            above = self._argument()
            below = self._argument()
            plain = not above.imag and not below.imag and 0 < above.real < below.real
            if plain and above.real.is_integer() and below.real.is_integer():
                return found + above / below
            self._place = kept
        return found

    def _function(self, name: str) -> complex:
        if name == "sqrt":
            root = self._group("[", "]") if self.peek() == "[" else 2
            inside = self._argument()
            return cmath.sqrt(inside) if root == 2 else _root(inside, root)
        power: complex = 1
        base: complex | None = None
        while self.peek() in ("^", "_"):
            if self._take() == "^":
                power = self._argument(signed=True)
            else:
                base = self._argument()
        inside = self._argument() if self.peek() in ("(", "{") else self._inside()
        found = complex(_FUNCTIONS[name](inside))
        if base is not None:
            found = cmath.log(inside) / cmath.log(base)
        return found**power

    def _inside(self) -> complex:
        """The argument of a function without brackets: ``sin 2x``."""
        total = self._power()
        while (
            (token := self.peek()) is not None
            and (token[0].isalnum())
            and (token not in (*_FUNCTIONS, "cdot", "times", "div", "pm", "frac"))
        ):
            total *= self._power()
        return total


def _root(inside: complex, root: complex) -> complex:
    if inside.imag == 0 and inside.real < 0 and root.imag == 0 and root.real % 2 == 1:
        return complex(-((-inside.real) ** (1 / root.real)))
    return inside ** (1 / root)
