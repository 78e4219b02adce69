"""How commands print: tables for people, JSON for programs.

What a name holds is shown as it is: no markup, no emoji codes, no escape sequences. Numbers are never cut; names wrap,
and in a pipe not even these.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from dspy_prod.privacy.visible import UNSEEN, visible

Cell = str | Text
NARROWEST: Final = 12
"""Characters to which a column of names is narrowed at most; on a terminal that has no room for it, lines wrap."""

_BARE_IN_JSON: Final = re.compile(f"[{UNSEEN}]")


def print_json(value: Any) -> int:
    """Print a value as JSON, in whatever the output can take; returns the exit code 0."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=not unicode)
    text = _BARE_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    print(text, flush=True)  # a closed pipe is met here, not at exit
    return 0


def as_text(given: Cell) -> Text:
    """A text as it is; what would steer the terminal is shown as Python writes it."""
    return given if isinstance(given, Text) else Text(visible(given))


def show(*given: RenderableType) -> int:
    """Print lines, tables and reports; returns the exit code 0."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    for one in given:
        line = isinstance(one, (str, Text))
        console.print(as_text(one) if isinstance(one, str) else one, crop=False, soft_wrap=line)
    return 0


@dataclass
class Listing:
    """A table below its title. Where it is wider than the terminal although its names wrap, the terminal wraps it."""

    title: Text
    grid: Table
    least: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.title
        yield from console.render(self.grid, options.update(max_width=max(options.max_width, self.least)))


def table(
    title: Cell, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, numbers: int = 0,
    last: Sequence[Sequence[Cell]] = (),
) -> Listing:  # fmt: skip
    """A table whose last columns, so many, hold numbers, with `last` rows apart; without names it has no head."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_header=any(columns))
    cells = [[as_text(cell) for cell in row] for row in (*rows, *last)]
    least = 0
    for place, name in enumerate(columns):
        lines = [line.cell_len for row in cells for line in row[place].split()]
        if place < len(columns) - numbers:
            narrow = min(NARROWEST, max([len(name), *lines]))
            grid.add_column(as_text(name), overflow="fold", min_width=narrow)
        else:  # as wide as its widest number; rich takes a `width` for a wish
            narrow = max([0, *map(len, name.split()), *lines])
            head = as_text(name if len(name) <= narrow else "\n".join(name.split()))
            grid.add_column(head, justify="right", no_wrap=True, min_width=narrow, max_width=narrow)
        least += narrow + len("  ")
    for place, row in enumerate(cells, 1):
        grid.add_row(*row, end_section=place == len(cells) - len(last))
    heading = as_text(title)
    heading.stylize("table.title")
    return Listing(heading, grid, least)
