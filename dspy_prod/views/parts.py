"""What a page is made of: tables, paragraphs, lines of code or of a difference, pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.views.cells import LONGEST_PARAGRAPH, Cell, cell, cut, told

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

MOST_ROWS: Final = 100
"""Rows of a table that a page shows; how many more there are stands below it."""

MOST_LINES: Final = 400
"""Lines of code that a page shows."""

WIDTH: Final = 110
"""Characters of a line of `text()`; a table whose figures need more has them all the same."""


class Part:
    """What can be shown by itself, or on a page."""

    def text(self, width: int = WIDTH) -> str:
        """As plain text, for `print`."""
        from dspy_prod.views.console import written

        return written(self.drawn(), width)

    def html(self) -> str:
        """As HTML that needs nothing else: no script, no file, no address; for a notebook, light or dark."""
        from dspy_prod.views.html import page

        return page(self.elements())

    @abstractmethod
    def drawn(self) -> Iterator[RenderableType]:
        """What rich draws of it."""

    @abstractmethod
    def elements(self) -> Iterator[str]:
        """Its elements of HTML."""

    @abstractmethod
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """On a console of rich's it has its colours, and nothing is cut."""

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return self.html()


@dataclass(frozen=True, eq=False)
class Table(Part):
    """A table with a title. Long cells and long tables are cut in `text()` and `html()`, and whole on a console.

    Args:
        title: what it shows.
        columns: the names; when all are empty it has no head.
        rows: cells by row: text, numbers, None, or `Cell`s. A column of numbers alone is set to the right.
        caption: a line below it, for what must be known to read it right.
        numbers: so many of the last columns are figures, whatever the type of their cells.
        last: rows at the end, set apart, such as a sum; they are shown however long the table is.

    Example:
        ```python
        Table("Costs by model", ("model", "USD", "calls"), [("openai/gpt-4o-mini", usd(0.01), 12)]).html()
        ```
    """

    title: str | Cell
    columns: Sequence[str]
    rows: Iterable[Sequence[Any]]
    caption: str = ""
    numbers: int = 0
    last: Iterable[Sequence[Any]] = ()

    @cached_property
    def cells(self) -> list[list[Cell]]:
        """The rows as cells."""
        return [[cell(value) for value in row] for row in self.rows]

    @cached_property
    def sums(self) -> list[list[Cell]]:
        """The last rows as cells."""
        return [[cell(value) for value in row] for row in self.last]

    @cached_property
    def figures(self) -> list[bool]:
        """Of each column, whether it holds figures."""
        rows = [*self.cells, *self.sums]
        return [
            place >= len(self.columns) - self.numbers
            or (bool(rows) and all(row[place].number or not row[place].text for row in rows))
            for place in range(len(self.columns))
        ]

    def bounded(self) -> Table:
        """With at most `MOST_ROWS` rows, and a caption that says how many are missing."""
        more = len(self.cells) - MOST_ROWS
        if more <= 0:
            return self
        note = f"{more:,} more rows are not shown." + (f" {self.caption}" if self.caption else "")
        return Table(self.title, self.columns, self.cells[:MOST_ROWS], note, self.numbers, self.sums)

    def drawn(self) -> Iterator[RenderableType]:
        from dspy_prod.views.console import Listing

        yield Listing(self.bounded(), cut=True)

    def elements(self) -> Iterator[str]:
        from dspy_prod.views.html import table

        yield table(self.bounded())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from dspy_prod.views.console import Listing

        yield Listing(self)


@dataclass(frozen=True)
class Code(Part):
    """Lines as they are, in letters of one width: a prompt, or a unified diff, whose lines have their colours.

    Args:
        lines: the text.
        diff: it is a unified diff.
    """

    lines: str
    diff: bool = False

    def shown(self) -> list[str]:
        """Its lines as they may leave the process, at most `MOST_LINES`."""
        lines = [cut(line) for line in told(self.lines).splitlines()]
        more = len(lines) - MOST_LINES
        return lines if more <= 0 else [*lines[:MOST_LINES], f"… {more:,} more lines"]

    def drawn(self) -> Iterator[RenderableType]:
        from dspy_prod.views.console import lines

        yield lines(self.shown(), self.diff)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from dspy_prod.views.console import lines

        yield lines(told(self.lines).splitlines(), self.diff)

    def elements(self) -> Iterator[str]:
        from dspy_prod.views.html import code

        yield code(self.shown(), self.diff)


@dataclass(frozen=True)
class Picture(Part):
    """A picture inside the page.

    Args:
        png: its bytes.
        alt: what it shows, for those who cannot see it; as plain text it is all there is.
        width: of the screen's pixels, when that is not the picture's own width.
    """

    png: bytes
    alt: str
    width: int | None = None

    def drawn(self) -> Iterator[RenderableType]:
        from dspy_prod.views.console import lines

        yield lines([f"[{cut(told(self.alt))}]"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.drawn()

    def elements(self) -> Iterator[str]:
        from dspy_prod.views.html import picture

        yield picture(self.png, self.alt, self.width)


class Page(Part):
    """Parts below each other.

    Args:
        parts: tables, pictures, code, other pages; a plain text is a paragraph.
    """

    def __init__(self, *parts: Part | str) -> None:
        self.parts = parts

    def drawn(self) -> Iterator[RenderableType]:
        from dspy_prod.views.console import lines

        for part in self.parts:
            if isinstance(part, str):
                yield lines(cut(told(part), LONGEST_PARAGRAPH).splitlines())
            else:
                yield from part.drawn()

    def elements(self) -> Iterator[str]:
        from dspy_prod.views.html import paragraph

        for part in self.parts:
            if isinstance(part, str):
                yield paragraph(part)
            else:
                yield from part.elements()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from dspy_prod.views.console import as_text

        for part in self.parts:
            if isinstance(part, str):
                yield as_text(part)
            else:
                yield from part.__rich_console__(console, options)
