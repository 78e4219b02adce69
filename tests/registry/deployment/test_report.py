"""The report of a deployment shows names, reasons and errors as they are, whatever they would mean where it is read."""

from __future__ import annotations

import datetime as dt
import html
import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from dspy_prod.registry import Deployment, Step
from dspy_prod.registry.aliases.gates import Check, GateReport
from dspy_prod.registry.deployment.markdown import code, literal
from dspy_prod.registry.deployment.report import path_of, save

RENDERED = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
OURS = {"h1", "h2", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code", "pre", "br"}
HOSTILE = (
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a | b | c", "[x](javascript:alert(1))",
    "![x](https://example.com/track.png)", "`code` ```fence", "**bold** _it_ ~~no~~", "&lt;b&gt; &amp;", "<https://x.y>",
    "two\nlines\n\n# heading", "back\\slash \\| \\`", "$x$", "\x1b[31mred\u202e",
)  # fmt: skip


def deployment(text: str) -> Deployment:
    """One in which everything that somebody may have chosen is this text."""
    now = dt.datetime.now(dt.timezone.utc)
    gate = GateReport("fail", (Check(text, "fail", text),), {text: 0.5}, {text: 0.75}, 3, 1.0, text)
    return Deployment(
        "it", None, text, None, "failed", ("staging",), False, False, text, text, now, 1.0,
        (Step(text, "stopped", text, now),), gate, {text: 1}, {text: None}, 1, text, {text: "changed"}, text, (text,),
    )  # fmt: skip


def tags(page: str) -> set[str]:
    """The names of the tags in HTML."""
    return set(re.findall(r"<\s*/?\s*([a-zA-Z0-9]+)", page))


def words(page: str) -> str:
    """What a reader sees of it."""
    return html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_report_shows_what_it_was_given_and_obeys_none_of_it(text: str) -> None:
    """An error with `<script>` in it was a script on the page that showed the report, and `[x](...)` a link."""
    page = RENDERED.render(deployment(text).to_markdown())
    assert tags(page) <= OURS
    assert "alert" not in re.sub(r">[^<]*<", "><", page), "not within a tag either"
    shown = " ".join(text.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").split())
    assert words(page).count(shown) >= 10
    assert page.count("<td>") == page.count("</td>") == 1 * 5 + 1 * 3 + 1 * 3 + 1 * 4, "no further columns"


@given(st.text(min_size=1).filter(str.strip))
def test_any_text_within_a_line_is_that_text(text: str) -> None:
    """White space alone is drawn together, and what would steer a screen is spelled out."""
    page = RENDERED.render(f"x {literal(text)} x")
    assert tags(page) == {"p"}
    named = RENDERED.render(f"x {code(text)} x")
    assert tags(named) == {"p", "code"}
    if text.isprintable():
        assert words(page).split() == ["x", *text.split(), "x"]
        assert words(named).split() == ["x", *text.split(), "x"]


def test_a_report_with_half_a_character_is_written(tmp_path: Path) -> None:
    """A lone surrogate in an error failed a deployment that had been made."""
    path = path_of(tmp_path, "it", None)
    save(deployment("lone \ud800 surrogate"), path)
    for file in (path, path.with_suffix(".md")):
        assert r"lone \ud800 surrogate" in file.read_text().replace("\\\\", "\\")


def test_a_terminal_is_not_steered() -> None:
    """Neither by a step's text nor by the candidate's name."""
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    console.print(deployment("\x1b[2J\u202e [x] :bug:"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert r"\x1b[2J\u202e [x]" in shown
