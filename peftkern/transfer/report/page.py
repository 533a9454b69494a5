"""A page of measured sections with plots: one HTML file that holds its pictures, or markdown with them beside
it."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import TEMP_PREFIX, atomic_directory

__all__ = ["Line", "Page", "Plot", "Section", "check_path", "write_page"]

_SUFFIXES = (".html", ".md")
_WIDTH, _HEIGHT, _DPI = 6.4, 3.6, 110  # inches, dots an inch


@dataclass(frozen=True)
class Line:
    """One measured quantity: its name, its value with unit and interval, and how to read it."""

    name: str
    value: str
    reading: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture that `draw` makes on matplotlib axes; `name` becomes part of its file's name."""

    name: str
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Section:
    """An answer to one question: the verdict in words, what was measured for it, and the seconds that took.

    `missing` says why nothing was measured; then there is no verdict.
    """

    question: str
    verdict: str = ""
    lines: tuple[Line, ...] = ()
    plots: tuple[Plot, ...] = ()
    seconds: float = 0.0
    missing: str = ""


@dataclass(frozen=True)
class Page:
    """The whole page: what it is about, its sections, and the command line that it ends with."""

    title: str
    facts: tuple[Line, ...]
    sections: tuple[Section, ...]
    command: str
    reasons: tuple[str, ...]


def check_path(path: Path) -> None:
    """Raise InputError where no page can be written to `path`, before anything is measured."""
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"--output {path}: give a file that ends in .html (one file) or .md (with its plots in a folder"
            " beside it)"
        )
    if path.is_dir():
        raise InputError(f"--output {path} is a folder: give the name of a file in it")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise InputError(
            f"--output {path}: {parent} is not writable: choose another place, or mend its permissions"
        )


def write_page(page: Page, path: Path) -> None:
    """Write the page, whole or not at all: HTML or markdown by the suffix of `path`."""
    check_path(path)
    if path.suffix.lower() == ".html":
        _write_text(path, _html(page))
        return
    folder = path.with_name(f"{path.stem}-plots")
    with atomic_directory(folder) as temporary:
        for section in page.sections:
            for plot in section.plots:
                (temporary / f"{plot.name}.png").write_bytes(_png(plot))
    _write_text(path, _markdown(page, folder.name))


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMP_PREFIX}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"could not write {path}: {error}. Check the free disk space and the permissions"
        ) from error


def _png(plot: Plot) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    plot.draw(figure.add_subplot())
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()


def _markdown(page: Page, plots: str) -> str:
    parts = [f"# {page.title}", _table(page.facts)]
    for section in page.sections:
        parts.append(f"## {section.question}")
        if section.missing:
            parts.append(f"Not measured: {section.missing}.")
            continue
        parts.append(f"**{section.verdict}**")
        parts.append(_table(section.lines))
        parts += [f"![{plot.name}]({plots}/{plot.name}.png)" for plot in section.plots]
        parts.append(f"Measured in {section.seconds:.0f} s.")
    parts += [
        "## What to run",
        f"```bash\n{page.command}\n```",
        "\n".join(f"- {reason}" for reason in page.reasons),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(lines: tuple[Line, ...]) -> str:
    if not lines:
        return ""
    rows = ["| measured | value | how to read it |", "|---|---|---|"]
    cells = (
        [cell.replace("|", "\\|").replace("\n", " ") for cell in (line.name, line.value, line.reading)]
        for line in lines
    )
    return "\n".join([*rows, *(f"| {' | '.join(row)} |" for row in cells)])


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid #ddd; padding: .3rem .6rem; text-align: left; }
.verdict { font-weight: 600; }
.small { color: #666; font-size: .85rem; }
img { max-width: 100%; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
"""


def _html(page: Page) -> str:
    escape = html.escape
    parts = [f"<h1>{escape(page.title)}</h1>", _html_table(page.facts)]
    for section in page.sections:
        parts.append(f"<h2>{escape(section.question)}</h2>")
        if section.missing:
            parts.append(f"<p>Not measured: {escape(section.missing)}.</p>")
            continue
        parts.append(f'<p class="verdict">{escape(section.verdict)}</p>')
        parts.append(_html_table(section.lines))
        for plot in section.plots:
            image = base64.b64encode(_png(plot)).decode()
            parts.append(f'<p><img alt="{escape(plot.name)}" src="data:image/png;base64,{image}"></p>')
        parts.append(f'<p class="small">Measured in {section.seconds:.0f} s.</p>')
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in page.reasons)
    parts += [
        "<h2>What to run</h2>",
        f"<pre>{escape(page.command)}</pre>",
        f"<ul>{reasons}</ul>" if reasons else "",
    ]
    head = f'<meta charset="utf-8"><title>{escape(page.title)}</title><style>{_STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_table(lines: tuple[Line, ...]) -> str:
    if not lines:
        return ""
    rows = ((html.escape(cell) for cell in (line.name, line.value, line.reading)) for line in lines)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr><th>measured</th><th>value</th><th>how to read it</th></tr>{body}</table>"
