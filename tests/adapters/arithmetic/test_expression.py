"""Expressions: what they mean, exactly, and where an error points."""

from __future__ import annotations

import pytest

from peftkern.adapters.arithmetic import ExpressionError, parse


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a", {"a": 1.0}),
        ("a + 0.5*b - c", {"a": 1.0, "b": 0.5, "c": -1.0}),
        ("-a", {"a": -1.0}),
        ("a*.5 + b*2e-1", {"a": 0.5, "b": 0.2}),
        ("0.5*(a + b) - (a - 2*(b))/4", {"a": 0.25, "b": 1.0}),
        ("2*3/4*a", {"a": 1.5}),
        ("(1 - 0.3)*a + 0.3*b", {"a": 0.7, "b": 0.3}),
        ("'runs/kjv-1' - \"b c\"", {"runs/kjv-1": 1.0, "b c": -1.0}),
        ("kjv.r8 + λ", {"kjv.r8": 1.0, "λ": 1.0}),
        ("--a - -b", {"a": 1.0, "b": 1.0}),
        ("2.*a", {"a": 2.0}),
    ],
)
def test_meaning(text: str, meaning: dict[str, float]) -> None:
    assert parse(text) == meaning


def test_sums_are_exact_and_what_cancels_stays() -> None:
    assert parse("a + 0.1*b + 0.2*b - 0.3*b") == {"a": 1.0, "b": 0.0}
    assert parse("a - a") == {"a": 0.0}
    assert parse("(a + b) - b") == {"a": 1.0, "b": 0.0}


def test_variables_stand_for_numbers() -> None:
    assert parse("x*(a + b)", {"x": 0.3}) == {"a": 0.3, "b": 0.3}
    assert parse("'x'*2", {"x": 0.3}) == {"x": 2.0}, "a quoted name is an adapter's"


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("", 0, "expected an adapter's name or a number, got the end"),
        ("a + ", 4, "got the end"),
        ("a + 0.5**b", 8, "got '*'"),
        ("a b", 2, "expected +, -, * or / before 'b'"),
        ("kjv-lora/7b", 10, "stands in quotes"),
        ("0.5a", 3, "expected +, -, * or /"),
        ("a * b", 2, "two adapters cannot be multiplied"),
        ("a + 1", 2, "an adapter and a number cannot be added"),
        ("1 / a", 2, "divided by an adapter"),
        ("a / (1 - 1)", 2, "division by zero"),
        ("a + (b", 6, "expected ) for the ( at character 5"),
        ("a + b)", 5, "never opened"),
        ("a & b", 2, "'&' has no meaning here"),
        ("'a + b", 0, "never closed"),
        ("'' + b", 0, "name is empty"),
        ("1 + 2", 0, "no adapter"),
        ("1e999*a", 0, "out of range"),
        ("1e300*1e300*a", 0, "greater than a float"),
        ("1e99999999999*a", 0, "out of range"),
        ("(" * 60 + "a", 50, "within each other"),
        ("-" * 60 + "a", 50, "within each other"),
    ],
)
def test_errors_point_at_the_character(text: str, position: int, words: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    assert caught.value.position == position
    assert words in str(caught.value)
    first, shown, caret = str(caught.value).split("\n")
    assert first.startswith(f"expression, character {position + 1}: ")
    assert shown == "    " + text and caret == "    " + " " * position + "^"
