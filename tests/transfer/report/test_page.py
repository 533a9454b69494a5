"""The page: whole in either form, with its pictures, and nothing left where it cannot be written."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from peftkern.finetune.errors import InputError
from peftkern.transfer.report import Line, Page, Plot, Section, write_page
from peftkern.transfer.report.page import check_path

PNG = b"\x89PNG\r\n\x1a\n"
SECTIONS = (
    Section(
        "How <far>?",
        "Far & wide.",
        (Line("a|b", "1 [0, 2]", "0: <near>"),),
        (Plot("line", lambda axes: axes.plot([1, 2])),),
        2.4,
    ),
    Section("Where?", missing="no labels"),
)
PAGE = Page(
    "Before", (Line("model", "m", "nf4"),), SECTIONS, "peftkern finetune --data 'a b'", ("because <this>",)
)


def test_html_holds_its_pictures_and_escapes_what_it_quotes(tmp_path: Path) -> None:
    write_page(PAGE, tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text()
    images = re.findall(r"data:image/png;base64,([^\"]+)", text)
    assert [base64.b64decode(image)[:8] for image in images] == [PNG]
    for part in (
        "How &lt;far&gt;?",
        "Far &amp; wide.",
        "0: &lt;near&gt;",
        "Not measured: no labels.",
        "because &lt;this&gt;",
        "Measured in 2 s.",
    ):
        assert part in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_markdown_has_its_pictures_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    write_page(PAGE, path)
    write_page(PAGE, path)  # a second time over the first
    text = path.read_text()
    assert (
        "| a\\|b | 1 [0, 2] | 0: <near> |" in text
        and "**Far & wide.**" in text
        and "Not measured: no labels." in text
    )
    shown = re.findall(r"!\[line\]\((.+?)\)", text)
    assert len(shown) == 1 and (tmp_path / shown[0]).read_bytes()[:8] == PNG
    assert sorted(item.name for item in tmp_path.iterdir()) == ["page-plots", "page.md"]


def test_a_plot_that_fails_leaves_nothing(tmp_path: Path) -> None:
    section = Section("?", "!", (), (Plot("bad", lambda axes: 1 / 0),))
    for name in ("page.html", "page.md"):
        with pytest.raises((OSError, ZeroDivisionError)):
            write_page(Page("t", (), (section,), "", ()), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "message"), [("page.pdf", "ends in .html"), ("page", "ends in .html"), ("", "ends in .html")]
)
def test_other_forms_are_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        check_path(tmp_path / name)


def test_a_folder_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_path(tmp_path / "page.md")
