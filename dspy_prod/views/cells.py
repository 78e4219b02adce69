"""The cells of a table, and texts as they may be shown: by the door, and cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from dspy_prod.privacy.outward import outward
from dspy_prod.privacy.visible import on_one_line, visible

Tone = Literal["", "good", "warn", "bad", "faint", "strong"]

LONGEST: Final = 240
"""Characters of a cell, a title or a caption that are shown; more end with an ellipsis."""

LONGEST_PARAGRAPH: Final = 4000
"""Characters of a paragraph that are shown."""

NONE: Final = "–"
"""What stands in a cell without a value."""


@dataclass(frozen=True)
class Cell:
    """A cell with more to say than its text.

    Attributes:
        text: what it says.
        tone: how it is meant: "good", "warn", "bad", "faint", "strong", or "" for plain text.
        below: further lines, fainter; those that are None or empty are left out.
        number: it is a figure of ours: set to the right, and no text in which to look for secrets.
    """

    text: str
    tone: Tone = ""
    below: tuple[str | None, ...] = ()
    number: bool = False

    def lines(self) -> list[str]:
        """Its lines as they may leave the process, uncut. A name with a line feed in it would begin another row."""
        own = self.text if self.number else on_one_line(outward(self.text))
        return [own, *(on_one_line(outward(line)) for line in self.below if line)]


class Tabular(Protocol):
    """What a table has to show, for those who lay it out; see `parts.Table`."""

    @property
    def title(self) -> str | Cell: ...
    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def caption(self) -> str: ...
    @property
    def cells(self) -> Sequence[Sequence[Cell]]: ...
    @property
    def sums(self) -> Sequence[Sequence[Cell]]: ...
    @property
    def figures(self) -> Sequence[bool]: ...


def cell(value: Any) -> Cell:
    """The cell that shows a value: numbers as figures, None as a dash, all else by `str`."""
    if isinstance(value, Cell):
        return value
    if value is None:
        return Cell(NONE, "faint", number=True)
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    if isinstance(value, int):
        return Cell(f"{value:,}", number=True)
    if isinstance(value, float):
        return Cell(f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}", number=True)
    return Cell(str(value))


def usd(value: float | None, places: int = 6) -> Cell:
    """Money in USD with so many places, a dash when it is not known.

    Example:
        ```python
        Table("Costs", ("model", "USD"), [("openai/gpt-4o-mini", usd(0.0123))])
        ```
    """
    return cell(None) if value is None else Cell(f"{value:.{places}f}", number=True)


def share(value: float | None, places: int = 0) -> Cell:
    """A share of 1 in percent, a dash when it is not known."""
    return cell(None) if value is None else Cell(f"{100 * value:.{places}f} %", number=True)


def told(text: str) -> str:
    """A text as it may leave the process: no known secret in it, and nothing that steers a screen."""
    return visible(outward(text))


def cut(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning and an ellipsis. Cut what was `told`: half a secret is known to nobody."""
    return text if len(text) <= longest else f"{text[: longest - 1].rstrip()}…"
