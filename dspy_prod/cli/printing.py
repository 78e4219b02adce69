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
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Cell = str | Text
NARROWEST: Final = 12
"""Characters to which a column of names is narrowed at most; on a terminal that has no room for it, lines wrap."""

_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def print_json(value: Any) -> int:
    """Print a value as JSON, in whatever the output can take; returns the exit code 0."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode))
    return 0


def as_text(given: Cell) -> Text:
    """A text as it is; what would steer the terminal is shown as Python writes it."""
    return given if isinstance(given, Text) else Text(_CONTROL.sub(lambda match: repr(match[0])[1:-1], given))


def show(*given: Cell | Table) -> int:
    """Print lines and tables; returns the exit code 0."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 10_000
    for one in given:
        console.print(one if isinstance(one, Table) else as_text(one), crop=False, soft_wrap=not isinstance(one, Table))
    return 0


def table(title: Cell, columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, numbers: int = 0) -> Table:
    """A table; its last `numbers` columns hold numbers. Without names of columns it has no head."""
    head = any(columns)
    made = Table(title=as_text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_header=head)
    cells = [[as_text(cell) for cell in row] for row in rows]
    for place, name in enumerate(columns):
        lines = [line.cell_len for row in cells for line in row[place].split()]
        if place < len(columns) - numbers:
            made.add_column(Text(name), overflow="fold", min_width=min(NARROWEST, max(lines, default=0)))
        else:
            made.add_column(Text(name), justify="right", width=max([0, *map(len, name.split()), *lines]))
    for row in cells:
        made.add_row(*row)
    return made
