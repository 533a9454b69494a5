"""Expressions such as "a + 0.5*b - c": a linear combination of named adapters, read exactly; an error points
at its character."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

__all__ = ["ExpressionError", "parse"]

_TOKEN = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*(?:\.\w+)*)"
    r"|(?P<quoted>'[^']*'|\"[^\"]*\")|(?P<sign>[-+*/()])"
)
_MOST_PARENTHESES = 50
_MOST_DIGITS = (
    300  # of a number's exponent and of its text: a float holds no more, and an exact one of more takes long
)


class ExpressionError(ValueError):
    """What is wrong with an expression, with a line that points at the character."""

    def __init__(self, expression: str, position: int, reason: str) -> None:
        self.position = position
        shown = expression.replace("\n", " ").replace("\t", " ")
        super().__init__(
            f"expression, character {position + 1}: {reason}\n    {shown}\n    {' ' * position}^",
        )


class _Token(NamedTuple):
    kind: str  # "number", "name", "quoted", "sign" or "end"
    text: str
    position: int

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else repr(self.text)


class _Value(NamedTuple):
    """A number (no coefficients), or a combination of adapters (number 0)."""

    number: Fraction
    coefficients: dict[str, Fraction] | None = None


def parse(expression: str, variables: Mapping[str, float] | None = None) -> dict[str, float]:
    """The coefficient of every adapter in an expression, in the order of their first mention.

    Numbers, names, + - * /, parentheses; one factor of a product at most may hold adapters, and only numbers
    divide. A name is a Python identifier, with dots if need be; any other name, a path say, stands in quotes.
    Sums are exact, so that "a + 0.1*b + 0.2*b - 0.3*b" is {"a": 1.0, "b": 0.0}; what cancels stays, with the
    coefficient 0.

    Args:
        expression: such as "0.5*(a + b) - 'runs/c-1'/3".
        variables: names that stand for numbers, as x in "x*(a + b)".
    Raises: ExpressionError, which names the character, where it does not parse, is no linear combination, or
        overflows.

    >>> parse("a + 0.5*b - c")
    {'a': 1.0, 'b': 0.5, 'c': -1.0}
    """
    parser = _Parser(expression, dict(variables or {}))
    value = parser.sum()
    parser.expect_end()
    if value.coefficients is None:
        raise ExpressionError(expression, 0, "there is no adapter in it; expected one such as a + 0.5*b - c")
    try:
        return {name: float(coefficient) for name, coefficient in value.coefficients.items()}
    except OverflowError:
        raise ExpressionError(expression, 0, "a coefficient is greater than a float can be") from None


class _Parser:
    """Recursive descent: sum = ["-"|"+"] product {("+"|"-") product}; product = factor {("*"|"/") factor}."""

    def __init__(self, expression: str, variables: dict[str, float]) -> None:
        self.expression = expression
        self.variables = variables
        self.tokens = list(self._tokens())
        self.depth = 0

    def _tokens(self) -> list[_Token]:
        found, position = [], 0
        while position < len(self.expression):
            if self.expression[position].isspace():
                position += 1
                continue
            match = _TOKEN.match(self.expression, position)
            if match is None:
                quote = self.expression[position] in "'\""
                reason = (
                    "this quote is never closed"
                    if quote
                    else f"{self.expression[position]!r} has no meaning here"
                )
                raise ExpressionError(self.expression, position, reason)
            found.append(_Token(str(match.lastgroup), match.group(), position))
            position = match.end()
        return [*found, _Token("end", "", len(self.expression))]

    def error(self, token: _Token, reason: str) -> ExpressionError:
        return ExpressionError(self.expression, token.position, reason)

    def next_if(self, signs: str) -> _Token | None:
        """The next token if it is one of these signs."""
        token = self.tokens[0]
        if token.kind != "sign" or token.text not in signs:
            return None
        return self.tokens.pop(0)

    def expect_end(self) -> None:
        token = self.tokens[0]
        if token.kind == "end":
            return
        if token.text == ")":
            raise self.error(token, "this parenthesis was never opened")
        hint = (
            "; a name with other characters than letters, digits, _ and . stands in quotes"
            if token.kind != "sign"
            else ""
        )
        raise self.error(token, f"expected +, -, * or / before {token}{hint}")

    def sum(self) -> _Value:
        total = self.product()
        while sign := self.next_if("+-"):
            term = self.product()
            factor = Fraction(1 if sign.text == "+" else -1)
            if (total.coefficients is None) != (term.coefficients is None):
                raise self.error(
                    sign,
                    "an adapter and a number cannot be added; a number multiplies an adapter, as in 0.5*a",
                )
            total = _add(total, _scale(term, factor))
        return total

    def product(self) -> _Value:
        value = self.factor()
        while sign := self.next_if("*/"):
            other = self.factor()
            if sign.text == "/":
                value = _scale(value, self._inverse(sign, other))
            elif other.coefficients is None:
                value = _scale(value, other.number)
            elif value.coefficients is None:
                value = _scale(other, value.number)
            else:
                raise self.error(sign, "two adapters cannot be multiplied; one factor has to be a number")
        return value

    def _inverse(self, sign: _Token, value: _Value) -> Fraction:
        if value.coefficients is not None:
            raise self.error(sign, "nothing can be divided by an adapter, only by a number")
        if value.number == 0:
            raise self.error(sign, "division by zero")
        return 1 / value.number

    def factor(self) -> _Value:
        if sign := self.next_if("+-"):
            return _scale(self._nested(sign, self.factor), Fraction(1 if sign.text == "+" else -1))
        if opening := self.next_if("("):
            value = self._nested(opening, self.sum)
            if not self.next_if(")"):
                raise self.error(
                    self.tokens[0],
                    f"expected ) for the ( at character {opening.position + 1}, got {self.tokens[0]}",
                )
            return value
        token = self.tokens[0]
        if token.kind in ("sign", "end"):
            raise self.error(token, f"expected an adapter's name or a number, got {token}")
        self.tokens.pop(0)
        return self._number(token) if token.kind == "number" else self._name(token)

    def _nested(self, token: _Token, part) -> _Value:
        self.depth += 1
        if self.depth > _MOST_PARENTHESES:
            raise self.error(token, f"more than {_MOST_PARENTHESES} signs and parentheses within each other")
        value = part()
        self.depth -= 1
        return value

    def _number(self, token: _Token) -> _Value:
        mantissa, _, exponent = token.text.lower().partition("e")
        if len(mantissa) > _MOST_DIGITS or (
            exponent and (len(exponent) > 4 or abs(int(exponent)) > _MOST_DIGITS)
        ):
            raise self.error(token, f"this number is out of range; expected at most {_MOST_DIGITS} digits")
        return _Value(
            Fraction(token.text.rstrip(".") if not exponent else f"{mantissa.rstrip('.')}e{exponent}"),
        )

    def _name(self, token: _Token) -> _Value:
        name = token.text[1:-1] if token.kind == "quoted" else token.text
        if not name:
            raise self.error(token, "this name is empty")
        if token.kind == "name" and name in self.variables:
            return _Value(Fraction(repr(float(self.variables[name]))))
        return _Value(Fraction(0), {name: Fraction(1)})


def _scale(value: _Value, factor: Fraction) -> _Value:
    if value.coefficients is None:
        return _Value(value.number * factor)
    return _Value(
        Fraction(0),
        {name: coefficient * factor for name, coefficient in value.coefficients.items()},
    )


def _add(one: _Value, other: _Value) -> _Value:
    if one.coefficients is None or other.coefficients is None:
        return _Value(one.number + other.number)
    names = dict.fromkeys((*one.coefficients, *other.coefficients))
    zero = Fraction(0)
    return _Value(
        zero,
        {name: one.coefficients.get(name, zero) + other.coefficients.get(name, zero) for name in names},
    )
