"""How commands print: tables for people, JSON for programs."""

from __future__ import annotations

from typing import Any

import orjson
from rich.console import Console, OverflowMethod
from rich.table import Table


def print_json(value: Any) -> int:
    """Print a value as JSON, however wide; returns the exit code 0."""
    text = orjson.dumps(value, option=orjson.OPT_INDENT_2).decode()
    Console(soft_wrap=True).print(text, markup=False, highlight=False)
    return 0


def numbers(title: str, *columns: str, overflow: OverflowMethod = "ellipsis") -> Table:
    """An empty table: a column of names, and columns of numbers."""
    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left", overflow=overflow, no_wrap=name == "USD")
    return table
