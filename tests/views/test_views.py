"""What tables and pages look like: escaped, bounded, without secrets, as text and as HTML."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from io import BytesIO, TextIOWrapper
from typing import Any

import pytest

import dspy_prod
from dspy_prod.privacy.redactor import Redactor, install
from dspy_prod.views import Cell, Code, Page, Picture, Shown, Table, frame, share, usd
from dspy_prod.views.cells import LONGEST
from dspy_prod.views.parts import MOST_LINES, MOST_ROWS

ODD = "<script>alert(1)</script> & [bold]x[/] :bug: \x1b[31mred \u202eturned"


class Elements(HTMLParser):
    """The tags of a page, each of which must be closed, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in ("br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_what_a_cell_holds_is_shown_for_what_it_is() -> None:
    """No markup of ours or of a browser's is found in names, and nothing steers the screen."""
    table = Table(ODD, (ODD, "n"), [(ODD, 1), (Cell(ODD, "bad", below=(ODD, None)), 2)], caption=ODD)
    page = Page(ODD, table, Code(ODD), Picture(b"png", ODD))
    seen = Elements(page.html())
    assert set(seen.seen) <= {"div", "p", "table", "thead", "tbody", "tr", "th", "td", "span", "br", "pre", "img"}
    assert seen.words.count("<script>alert(1)</script> & [bold]x[/] :bug: \\x1b[31mred \\u202eturned") == 8
    text = page.text(width=400)
    assert text.count("<script>alert(1)</script> & [bold]x[/] :bug: \\x1b[31mred \\u202eturned") == 9
    assert "\x1b" not in text + page.html()


def test_a_page_needs_nothing_else() -> None:
    """No address, no script, no style sheet; a picture is inside."""
    seen = Elements(Page(Table("t", ("a",), [(1,)]), Picture(b"\x89PNG", "a chart", 400)).html())
    addresses = [value for name, value in seen.attributes if name in ("src", "href", "srcset")]
    assert addresses == ["data:image/png;base64,iVBORw=="]
    assert not any(name.startswith("on") for name, _ in seen.attributes)
    assert not {"script", "style", "link"} & set(seen.seen)


def test_a_page_brings_no_background_and_no_fixed_ink() -> None:
    """What is neither black on white nor white on black can be read on both."""
    page = Page(
        Table(Cell("t", "warn"), ("a",), [(Cell("x", "good"),)], last=[(2,)], caption="c"), Code("+a", diff=True)
    )
    styles = [value or "" for name, value in Elements(page.html()).attributes if name == "style"]
    inks = [
        part.split(":")[1] for style in styles for part in style.split(";") if part.startswith(("color", "background"))
    ]
    assert set(inks) == {"#b07a12", "#1f9254", "inherit", "transparent"}


def test_long_texts_and_long_tables_are_cut() -> None:
    """Cells end with an ellipsis, tables say how many rows are missing, and still end with their sum."""
    rows = [("x" * 10_000, number) for number in range(MOST_ROWS + 1234)]
    table = Table("t" * 10_000, ("name", "n"), rows, "a caption", last=[("total", 99)])
    for shown in (table.html(), table.text(width=1000)):
        assert "x" * (LONGEST - 1) + "…" in shown
        assert "x" * LONGEST not in shown
        assert "1,234 more rows are not shown. a caption" in shown
        assert "total" in shown
        assert len(shown) < 100_000
    lines = Code("\n".join("y" * 10_000 for _ in range(MOST_LINES + 5)))
    assert lines.shown()[-1] == "… 5 more lines"
    assert len(Page("p" * 1_000_000, lines).html()) < 110_000


def test_a_known_secret_is_in_no_page() -> None:
    """Secrets go before anything is cut, so that not even half of one stays."""
    secret = "sk-a-key-that-this-process-knows-1234567890"
    lm = dspy_prod.LM("openai/gpt-4o-mini", api_key=secret, store="memory://views-secret")
    text = "x" * (LONGEST - 20) + secret
    page = Page(
        text, Table(text, (text,), [(text,), (Cell("a", below=(text,)),)], text), Code(text), Picture(b"", text)
    )
    for shown in (page.html(), page.text(width=1000)):
        assert "sk-a-key" not in shown
    lm.close()


def test_figures_are_set_to_the_right_and_no_redactor_looks_at_them() -> None:
    """A sum of digits is no telephone number; a column of numbers alone needs no saying."""
    rows = [("415-555-2671", 4_155_552_671, usd(1.5, 2), share(0.256), "x")] * 2
    table = Table("t", ("who", "n", "usd", "share", "note"), rows)
    assert table.figures == [False, True, True, True, False]
    remove = install(Redactor())
    try:
        row = table.text().splitlines()[-1].split()
        html = table.html()
    finally:
        remove()
    assert row[1:] == ["4,155,552,671", "1.50", "26", "%", "x"]
    assert "415-555-2671" not in (*row, html)
    assert html.count('<td align="right"') == 6


def test_without_names_a_table_has_no_head() -> None:
    """A list of names and values."""
    table = Table("t", ("", ""), [("a", None), ("b", True), ("c", 0.123456), ("d", 12345.6)])
    assert "<thead>" not in table.html()
    assert [line.split() for line in table.text().splitlines()[2:]] == [
        ["a", "–"], ["b", "yes"], ["c", "0.1235"], ["d", "12,346"],
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_printed_table_fits_the_screen_s_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`print(health)` on a console that has no lines to draw with was to be an error."""
    monkeypatch.setattr(sys, "stdout", stdout := TextIOWrapper(BytesIO(), encoding=encoding, write_through=True))
    print(Table("naïve → ∑", ("a", "b"), [("日本", None), ("x" * 1000, 1)]))
    stdout.flush()
    shown = stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert ("─" in shown) is (encoding == "utf-8")
    assert "x" * 50 in shown


def test_what_is_shown_keeps_its_repr() -> None:
    """A notebook shows the table, IPython's terminal too; inside a list there is one line."""

    class Answer(Shown):
        def __repr__(self) -> str:
            return "Answer()"

        def _view(self) -> Table:
            return Table("An answer", ("n",), [(42,)])

    answer = Answer()
    assert [line.strip() for line in str(answer).splitlines() if "─" not in line] == ["An answer", "", "n", "42"]
    assert "<table" in answer._repr_html_()
    assert repr([answer]) == "[Answer()]"
    pretty = pytest.importorskip("IPython.lib.pretty").pretty
    assert pretty(answer) == str(answer)
    assert pretty([answer]) == "[Answer()]"


def test_a_frame_has_its_columns_even_when_it_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pandas the error says what to install."""
    pytest.importorskip("pandas")
    assert list(frame([], ["a", "b"]).columns) == ["a", "b"]
    assert frame([{"a": 1}, {"a": 2}]).a.sum() == 3
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(dspy_prod.ConfigError, match=r"pip install 'dspy-prod\[notebooks\]'"):
        frame([])
