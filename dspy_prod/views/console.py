"""Tables as text: on a console, where rich lays them out, and as a plain string.

What a name holds is shown as it is: no markup, no emoji codes, no escape sequences. Figures are never cut; names wrap.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table as Grid
from rich.text import Text

from dspy_prod.views import cells
from dspy_prod.views.cells import Cell, Tabular, cell, told

NARROWEST: Final = 12
"""Characters to which a column of names is narrowed at most; on a terminal that has no room for it, lines wrap."""

STYLES: Final = {"good": "green", "warn": "yellow", "bad": "red", "faint": "dim", "strong": "bold"}
_DIFF: Final = (("+++", "bold"), ("---", "bold"), ("@@", "cyan"), ("+", "green"), ("-", "red"))


@dataclass(frozen=True)
class Listing:
    """A table below its title. Where it is wider than the console although its names wrap, the console wraps it.

    Args:
        table: what to lay out.
        cut: shorten what is too long.
    """

    table: Tabular
    cut: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heading = self._text(cell(self.table.title))
        heading.stylize("table.title")
        yield heading
        grid, least = self._grid()
        yield from console.render(grid, options.update(max_width=max(options.max_width, least)))
        if self.table.caption:
            yield self._text(Cell(self.table.caption, "faint"))

    def _grid(self) -> tuple[Grid, int]:
        """The table's grid, and the characters that it needs at least."""
        table, least = self.table, 0
        grid = Grid(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=any(table.columns))
        rows = [[self._text(each) for each in row] for row in (*table.cells, *table.sums)]
        for place, name in enumerate(table.columns):
            words = [line.cell_len for row in rows for line in row[place].split()]
            if not table.figures[place]:
                narrow = min(NARROWEST, max([len(name), *words]))
                grid.add_column(as_text(name), overflow="fold", min_width=narrow)
            else:  # as wide as its widest figure; rich takes a `width` for a wish
                narrow = max([0, *map(len, name.split()), *words])
                head = as_text(name if len(name) <= narrow else "\n".join(name.split()))
                grid.add_column(head, justify="right", no_wrap=True, min_width=narrow, max_width=narrow)
            least += narrow + len("  ")
        for number, row in enumerate(rows, 1):
            grid.add_row(*row, end_section=number == len(rows) - len(table.sums))
        return grid, least

    def _text(self, given: Cell) -> Text:
        """A cell with a line that matters, and fainter ones below it."""
        first, *more = [cells.cut(line) if self.cut else line for line in given.lines()]
        return Text.assemble((first, STYLES.get(given.tone, "")), ("".join(f"\n{line}" for line in more), "dim"))


class _Paper(io.StringIO):
    """Takes what the screen could take: where that is not UTF-8, a table has lines of hyphens."""

    encoding = "utf-8"


def written(given: Iterable[RenderableType], width: int) -> str:
    """What rich draws, as plain text without spaces at the ends of lines."""
    paper = _Paper()
    paper.encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    console = Console(
        file=paper, width=width, color_system=None, force_terminal=False, force_jupyter=False, emoji=False
    )
    for one in given:
        console.print(one, "", crop=False, sep="\n")
    text = "\n".join(line.rstrip() for line in paper.getvalue().splitlines()).strip("\n")
    return text.encode(paper.encoding, "backslashreplace").decode(paper.encoding)


def lines(given: Sequence[str], diff: bool = False) -> Text:
    """Lines that were `told`; of a unified diff, each in the style of its beginning."""
    return Text("\n").join(Text(line, _style(line) if diff else "") for line in given)


def as_text(given: str | Text) -> Text:
    """A text as it is; what would steer the terminal is shown as Python writes it."""
    return given if isinstance(given, Text) else Text(told(given))


def _style(line: str) -> str:
    return next((style for start, style in _DIFF if line.startswith(start)), "")
