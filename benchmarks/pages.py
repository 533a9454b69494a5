"""Generated parts of documentation pages, between markers."""

from __future__ import annotations

from pathlib import Path

__all__ = ["put"]


def put(page: Path, name: str, text: str) -> None:
    """Replaces what stands between <!-- name: begin --> and <!-- name: end -->."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = page.read_text().partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{page}: expected the markers {begin} and {end}")
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}")
