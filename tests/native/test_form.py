"""The form of csrc/: what clang-format with the repository's .clang-format gives is within 110 columns."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .compiled import CSRC

COLUMNS = 110
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))


def long_lines(sources: list[Path]) -> Iterator[str]:
    """The lines over COLUMNS as file:line, of UTF-8 text."""
    for path in sources:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > COLUMNS:
                yield f"{path}:{number}"


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
