"""Conditions such as `loss < 2.3 and step >= 1000`, by a small parser: nothing is ever evaluated as code.

    expression := and_term ("or" and_term)*
    and_term   := factor ("and" factor)*
    factor     := "not" factor | "(" expression ")" | comparison
    comparison := NAME (== | != | < | <= | > | >=) (NUMBER | WORD | 'text')

Names are `step state incarnation lr` and metric names (letters, digits, `_ . / -` after the first letter).
A comparison with a name that has no value is false, and so is its opposite: an unknown is not "not equal".
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = float | int | str | bool | None
Test: TypeAlias = Callable[[Mapping[str, Value]], bool]

_TOKEN = re.compile(
    r"\s*(?:(?P<op>==|!=|<=|>=|<|>)|(?P<paren>[()])|(?P<text>'[^']*'|\"[^\"]*\")"
    r"|(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<word>[A-Za-z_][A-Za-z0-9_./-]*))"
)
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
_DEPTH_LIMIT = 50


class ExpressionError(ValueError):
    """The text is no condition; the message shows where and what would be."""


@dataclass(frozen=True)
class Expression:
    """A parsed condition. `names` are all the names it asks about."""

    text: str
    names: frozenset[str]
    test: Test

    def __call__(self, values: Mapping[str, Value]) -> bool:
        return self.test(values)


def parse(text: str) -> Expression:
    """Parse a condition. Raises `ExpressionError`."""
    parser = _Parser(text)
    test = parser.expression(0)
    parser.end()
    return Expression(text, frozenset(parser.names), test)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.names: set[str] = set()
        self._tokens = self._split()
        self._at = 0

    def _split(self) -> list[tuple[str, str]]:
        tokens, at = [], 0
        stripped = self.text.rstrip()
        while at < len(stripped):
            match = _TOKEN.match(stripped, at)
            if match is None:
                raise ExpressionError(f"cannot read {stripped[at:].strip()[:20]!r} in {self.text!r}")
            tokens.append((str(match.lastgroup), match.group(str(match.lastgroup))))
            at = match.end()
        return tokens

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("end", "")

    def _take(self) -> tuple[str, str]:
        token = self._peek()
        self._at += 1
        return token

    def end(self) -> None:
        if self._at < len(self._tokens):
            raise ExpressionError(f"did not expect {self._peek()[1]!r} in {self.text!r}: join with 'and' or 'or'")

    def expression(self, depth: int) -> Test:
        tests = [self._and_term(depth)]
        while self._peek() == ("word", "or"):
            self._take()
            tests.append(self._and_term(depth))
        return tests[0] if len(tests) == 1 else lambda values: any(test(values) for test in tests)

    def _and_term(self, depth: int) -> Test:
        tests = [self._factor(depth)]
        while self._peek() == ("word", "and"):
            self._take()
            tests.append(self._factor(depth))
        return tests[0] if len(tests) == 1 else lambda values: all(test(values) for test in tests)

    def _factor(self, depth: int) -> Test:
        if depth > _DEPTH_LIMIT:
            raise ExpressionError("the condition is nested too deeply")
        if self._peek() == ("word", "not"):
            self._take()
            inner = self._factor(depth + 1)
            return lambda values: not inner(values)
        if self._peek() == ("paren", "("):
            self._take()
            inner = self.expression(depth + 1)
            if self._take() != ("paren", ")"):
                raise ExpressionError(f"a ')' is missing in {self.text!r}")
            return inner
        return self._comparison()

    def _comparison(self) -> Test:
        kind, name = self._take()
        operator_kind, operator = self._take()
        value_kind, raw = self._take()
        if kind != "word" or operator_kind != "op" or value_kind not in {"number", "word", "text"}:
            raise ExpressionError(f"expected NAME OPERATOR VALUE in {self.text!r}, for example: loss < 2.3")
        self.names.add(name)
        compare = _OPERATORS[operator]
        if value_kind == "number" or raw.lower() in {"nan", "inf"}:
            number = float(raw)
            return lambda values: _compare_number(values.get(name), compare, number)
        if operator not in {"==", "!="}:
            raise ExpressionError(f"{raw!r} is a word: words compare with == and != only, in {self.text!r}")
        word = raw.strip("'\"")
        equal = operator == "=="
        return lambda values: (found := values.get(name)) is not None and (str(found) == word) is equal


def _compare_number(found: Value, compare: Callable[[float, float], bool], number: float) -> bool:
    if isinstance(found, str) or found is None:
        return False
    return compare(float(found), number)
