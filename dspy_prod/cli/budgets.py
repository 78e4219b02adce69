"""`dspy-prod budgets`: what every budget of a store has left, and who used most of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspy_prod.cli.printing import print_json
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.status.costs import stored_budgets

DEFAULT_LIMIT = 10


def add_parser(commands: Any, where: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the command to those of `dspy-prod`; `where` adds the arguments that name a store."""
    parser = commands.add_parser("budgets", help="what every budget has left, and who used most of it")
    where(parser)
    parser.add_argument("--limit", type=int, default=DEFAULT_LIMIT, help="accounts of each budget (default: 10)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the budgets; returns the exit code."""
    from dspy_prod.cli.reports import _open

    if arguments.limit < 1:
        raise ValueError(f"--limit {arguments.limit} must be at least 1")
    store = _open(arguments)
    found = stored_budgets(store, SYSTEM_CLOCK, arguments.limit)
    if arguments.json:
        return print_json([budget.model_dump(mode="json") for budget in found])
    console = Console()
    if not found:
        console.print(f"No budget is known in namespace {store.namespace!r}.", markup=False)
        return 0
    table = Table(title=escape(f"Budgets in {store.namespace!r}, USD"), title_justify="left")
    for name in ("name", "scope", "who", "window"):
        table.add_column(name, overflow="fold")
    for name in ("limit", "spent", "held", "left", "used"):
        table.add_column(name, justify="right", no_wrap=True)
    for budget in found:
        texts = (budget.name, budget.scope, budget.who or "", budget.window)
        sums = (budget.limit_usd, budget.spent_usd, budget.held_usd, budget.remaining_usd)
        table.add_row(*map(escape, texts), *[_usd(each) for each in sums], f"{budget.used_percent:.0f} %")
    console.print(table)
    return 0


def _usd(value: float) -> str:
    """With as many places as nano-USD need, and no more."""
    whole, _, places = f"{value:.9f}".partition(".")
    return f"{whole}.{places.rstrip('0').ljust(2, '0')}"
