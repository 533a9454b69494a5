"""The form of csrc/: lines within 110 columns, as clang-format gives them with the repository's
.clang-format, files of at most 400 lines, functions of at most 15 parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .compiled import CSRC

COLUMNS, LINES, PARAMETERS = 110, 400, 15
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))


def long_lines(sources: list[Path]) -> Iterator[str]:
    """The lines over COLUMNS as file:line, of UTF-8 text."""
    for path in sources:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > COLUMNS:
                yield f"{path}:{number}"


def _closing(code: str, start: int) -> tuple[int, int]:
    """Of the bracket opened before `start`: where it closes, and how many commas lie in it alone."""
    depth, commas = 1, 0
    for at in range(start, len(code)):
        depth += (code[at] in "([{<") - (code[at] in ")]}>" and code[at - 1] != "-")
        commas += code[at] == "," and depth == 1
        if depth == 0:
            return at, commas
    return len(code), commas


def parameter_counts(text: str) -> Iterator[tuple[str, int]]:
    """(name, parameters) of every function, kernel, lambda ("]") and pointer to a function that C++ text
    declares. A call's arguments are told apart by the first word: a declaration begins with a type and a
    name."""
    code = re.sub(r"/\*.*?\*/|//[^\n]*|^\s*#[^\n]*", "", text, flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"(\w+|\]|\(\*\w+\))(?=\s*\()", code):
        start = code.index("(", match.end()) + 1
        end, commas = _closing(code, start)
        first = re.split(r"[,(<]", code[start:end], maxsplit=1)[0].strip()
        follows = re.match(r"\s*(\{|;|:|const\b|->)", code[end + 1 :])
        if follows and re.match(r"(const )?[\w:]+[ *&]+\w", first):
            yield match[1].strip("(*)"), commas + 1


def test_no_line_of_csrc_is_over_110_columns() -> None:
    assert len(SOURCES) > 40
    assert list(long_lines(SOURCES)) == []


def test_a_line_too_long_is_found(tmp_path: Path) -> None:
    source = tmp_path / "kernel.h"
    source.write_text(f"int a;\n{'x' * (COLUMNS + 1)}\n{'y' * COLUMNS}\n")
    assert list(long_lines([source])) == [f"{source}:2"]


def test_the_formatter_has_the_same_width() -> None:
    settings = (CSRC.parent / ".clang-format").read_text()
    assert re.search(r"^ColumnLimit: (\d+)$", settings, re.MULTILINE)[1] == str(COLUMNS)


def test_no_file_of_csrc_has_more_than_400_lines() -> None:
    lengths = {str(path.relative_to(CSRC)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > LINES} == {}


def test_no_function_of_csrc_has_more_than_15_parameters() -> None:
    found = [item for path in SOURCES for item in parameter_counts(path.read_text())]
    assert len(found) > 500 and ("pk_cross_entropy_cpu", 14) in found
    assert {name: count for name, count in found if count > PARAMETERS} == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int f(int a, float (&b)[4], std::pair<int, int> c) {", [("f", 3)]),
        ("void (*rope)(const Rope& operands, int threads);", [("rope", 2)]),
        ("const auto g = [&](int64_t i) { return f(i, i + 1); };", [("]", 1)]),
        ("__global__ void k_kernel(const T* __restrict__ w /* a, b */, int64_t n) {", [("k_kernel", 2)]),
        ("Single(const pk_weight* w, int64_t m) : w(w) {}", [("Single", 2)]),
        ("x = f(a, b);", []),
    ],
)
def test_parameters_are_counted(text: str, expected: list[tuple[str, int]]) -> None:
    assert list(parameter_counts(text)) == expected
