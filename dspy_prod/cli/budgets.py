"""`dspy-prod budgets`: what every budget of a store has left, who used most of it, and setting another limit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dspy_prod.cli.printing import print_json, show
from dspy_prod.cli.reports import opened
from dspy_prod.errors import ConfigError
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.status.controls import Controls
from dspy_prod.status.costs import stored_budgets
from dspy_prod.status.spending import budgets_table

DEFAULT_LIMIT = 10


def add_parser(commands: Any, where: Callable[[argparse.ArgumentParser], None]) -> None:
    """Add the command to those of `dspy-prod`; `where` adds the arguments that name a store."""
    parser = commands.add_parser("budgets", help="what every budget has left, and who used most of it; `set` a limit")
    parser.add_argument("action", nargs="?", choices=("list", "set"), default="list", help="default: list")
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the budget to set, as `list` shows it")
    where(parser)
    parser.add_argument("--usd", type=float, help="with `set`: the limit from now on, in every worker")
    parser.add_argument("--limit", type=int, default=DEFAULT_LIMIT, help="accounts of each budget (default: 10)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the budgets; returns the exit code."""
    if arguments.limit < 1:
        raise ConfigError(f"--limit {arguments.limit} must be at least 1")
    if arguments.action == "set":
        return _set(arguments)
    if arguments.name is not None or arguments.usd is not None:
        raise ConfigError("write `dspy-prod budgets set NAME --usd LIMIT` to set a limit")
    store = opened(arguments)
    found = stored_budgets(store, SYSTEM_CLOCK, arguments.limit)
    if arguments.json:
        return print_json([budget.model_dump(mode="json") for budget in found])
    if not found:
        return show(f"No budget is known in namespace {store.namespace!r}.")
    return show(budgets_table(found, f"Budgets in {store.namespace!r}, USD"))


def _set(arguments: argparse.Namespace) -> int:
    if arguments.name is None or arguments.usd is None:
        raise ConfigError("budgets set: write `dspy-prod budgets set NAME --usd LIMIT`")
    budget = Controls(opened(arguments)).set_budget(arguments.name, arguments.usd)
    if arguments.json:
        return print_json({"name": budget.title, "usd": budget.usd})
    return show(f"The limit of budget {budget.title!r} is {budget.usd:g} USD per {budget.per}, in every worker.")
