"""`dspy-prod budgets`: what every budget of a store has left, and who used most of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dspy_prod.cli.printing import print_json, show
from dspy_prod.cli.reports import opened
from dspy_prod.errors import ConfigError
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.status.costs import stored_budgets
from dspy_prod.status.spending import budgets_table

DEFAULT_LIMIT = 10


def add_parser(commands: Any, where: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the command to those of `dspy-prod`; `where` adds the arguments that name a store."""
    parser = commands.add_parser("budgets", help="what every budget has left, and who used most of it")
    where(parser)
    parser.add_argument("--limit", type=int, default=DEFAULT_LIMIT, help="accounts of each budget (default: 10)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the budgets; returns the exit code."""
    if arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit} must be at least 1")
    store = opened(arguments)
    found = stored_budgets(store, SYSTEM_CLOCK, arguments.limit)
    if arguments.json:
        return print_json([budget.model_dump(mode="json") for budget in found])
    if not found:
        return show(f"No budget is known in namespace {store.namespace!r}.")
    return show(budgets_table(found, f"Budgets in {store.namespace!r}, USD"))
