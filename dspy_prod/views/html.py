"""Pages as HTML for notebooks: escaped, in the notebook's own colours and letters, with nothing to load.

Styles stand on the elements themselves, where a notebook that nobody trusts yet keeps them. Colours are either the
surroundings' or of a middle lightness, so that both light and dark themes can be read.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

from dspy_prod.views.cells import LONGEST, LONGEST_PARAGRAPH, Cell, Tabular, cell, cut, told

TONES: Final = {
    "": "", "good": "color:#1f9254", "warn": "color:#b07a12", "bad": "color:#d2453f", "faint": "opacity:.6",
    "strong": "font-weight:600",
}  # fmt: skip
_LINE: Final = "1px solid rgba(128,128,128,.35)"
_DIFF: Final = (("+++", "strong"), ("---", "strong"), ("@@", "faint"), ("+", "good"), ("-", "bad"))


def page(elements: Iterable[str]) -> str:
    """Elements below each other, in one."""
    return f'<div style="max-width:72em;overflow-x:auto">{"".join(elements)}</div>'


def paragraph(text: str) -> str:
    """A text, its lines below each other."""
    return f'<p style="margin:.5em 0">{_said(text, LONGEST_PARAGRAPH)}</p>'


def picture(png: bytes, alt: str, width: int | None) -> str:
    """A picture with its bytes inside."""
    size = "" if width is None else f' width="{width}"'
    source = f"data:image/png;base64,{b64encode(png).decode('ascii')}"
    said = escape(cut(told(alt)))
    return f'<p style="margin:.75em 0"><img alt="{said}"{size} style="max-width:100%" src="{source}"></p>'


def code(lines: Sequence[str], diff: bool) -> str:
    """Lines that were `told`, as they are."""
    style = f"margin:.5em 0;padding:.5em;border:{_LINE};background:transparent;color:inherit;white-space:pre-wrap"
    return f'<pre style="{style}">{chr(10).join(_line(line, diff) for line in lines)}</pre>'


def table(given: Tabular) -> str:
    """A table below its title."""
    head = ""
    if any(given.columns):
        names = zip(given.columns, given.figures, strict=True)
        head = f"<thead><tr>{''.join(_cell(Cell(name), right, 'th') for name, right in names)}</tr></thead>"
    rows = [_row(row, given) for row in given.cells]
    rows += [_row(row, given, f"border-top:{_LINE};font-weight:600") for row in given.sums]
    title = f'<div style="font-weight:600;margin:.75em 0 .25em">{_inner(cell(given.title))}</div>'
    caption = f'<div style="opacity:.7;font-size:90%;margin:.25em 0">{_said(given.caption)}</div>'
    grid = f'<table style="border-collapse:collapse;margin:0">{head}<tbody>{"".join(rows)}</tbody></table>'
    return title + grid + (caption if given.caption else "")


def _row(row: Sequence[Cell], given: Tabular, style: str = "") -> str:
    cells = "".join(_cell(each, right, "td") for each, right in zip(row, given.figures, strict=True))
    return f'<tr style="{style}">{cells}</tr>' if style else f"<tr>{cells}</tr>"


def _cell(given: Cell, right: bool, tag: str) -> str:
    side = "right" if right else "left"
    more = ";white-space:nowrap;font-variant-numeric:tabular-nums" if right and tag == "td" else ""
    style = f"text-align:{side};vertical-align:top;padding:.2em .8em .2em 0{more}"
    if tag == "th":
        style += f";border-bottom:{_LINE}"
    return f'<{tag} align="{side}" style="{style}">{_inner(given)}</{tag}>'


def _inner(given: Cell) -> str:
    first, *more = given.lines()
    indent = "&nbsp;" * (len(first) - len(first.lstrip(" ")))  # a browser would leave it out
    shown = indent + escape(cut(first.lstrip(" "))).replace("\n", "<br>")
    if TONES[given.tone]:
        shown = f'<span style="{TONES[given.tone]}">{shown}</span>'
    below = "".join(f"<br>{escape(cut(line))}" for line in more)
    return shown + (f'<span style="{TONES["faint"]};font-size:90%">{below}</span>' if below else "")


def _line(line: str, diff: bool) -> str:
    tone = next((tone for start, tone in _DIFF if line.startswith(start)), "") if diff else ""
    return f'<span style="{TONES[tone]}">{escape(line)}</span>' if tone else escape(line)


def _said(text: str, longest: int = LONGEST) -> str:
    return escape(cut(told(text), longest)).replace("\n", "<br>")
