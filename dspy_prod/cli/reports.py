"""`dspy-prod health`, `costs` and `calls`: what a store knows, for people (tables) and programs (`--json`)."""

from __future__ import annotations

import argparse
import datetime as dt
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dspy_prod.cli.printing import print_json
from dspy_prod.errors import ConfigError
from dspy_prod.lm.arguments import default_namespace
from dspy_prod.records import CallRecord
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.status.costs import Place, costs_by, summary
from dspy_prod.status.ledger import Ledger
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import default_store_url, open_store

DEFAULT_LIMIT = 20
RECENT = 3600.0
"""Seconds that `health` looks back."""


def health(arguments: argparse.Namespace) -> int:
    """Print whether the store is usable, what is in flight and how recent calls ended."""
    store = _open(arguments)
    recent = store.records(since=time.time() - RECENT, limit=10_000)
    costs = summary([Place(store, SYSTEM_CLOCK)], [])
    report: dict[str, Any] = {
        "store": store.url,
        "namespace": store.namespace,
        "holds": store.holds(),
        "today_usd": costs.today_usd,
        "unconfirmed_usd": costs.unconfirmed_usd,
        "last_hour": {
            model: dict(Counter(record.outcome for record in recent if record.model == model))
            for model in sorted({record.model for record in recent})
        },
    }
    if arguments.json:
        return print_json(report)
    table = Table(title=f"{store.url}, namespace {store.namespace!r}", title_justify="left", show_header=False)
    table.add_row("store", "[green]usable[/]")
    table.add_row("reservations in flight", str(report["holds"]))
    table.add_row("spent today", f"{costs.today_usd:.6f} USD ({costs.unconfirmed_usd:.6f} USD unconfirmed)")
    for model, outcomes in report["last_hour"].items():
        table.add_row(f"last hour, {escape(model)}", ", ".join(f"{count} {name}" for name, count in outcomes.items()))
    if not recent:
        table.add_row("last hour", "no calls")
    Console().print(table)
    Console().print("Circuit breakers live in the calling process: ask lm.health() or dspy_prod.health() there.")
    return 0


def costs(arguments: argparse.Namespace) -> int:
    """Print the cost summary, or sums by a dimension."""
    store = _open(arguments)
    if arguments.by is None:
        found = summary([Place(store, SYSTEM_CLOCK)], [])
        if arguments.json:
            return print_json(found.model_dump(mode="json"))
        table = Table(title=f"Costs in {store.namespace!r}", title_justify="left", show_header=False)
        table.add_row("today", f"{found.today_usd:.6f} USD")
        table.add_row("  of it unconfirmed", f"{found.unconfirmed_usd:.6f} USD")
        table.add_row("average day (7 days)", f"{found.average_daily_7d_usd:.6f} USD")
        table.add_row("projected for the month", f"{found.projected_monthly_usd:.4f} USD")
        table.add_row("calls of unknown cost today", str(found.unknown_cost_calls))
        for day, spent in found.history.items():
            table.add_row(str(day), f"{spent:.6f} USD")
        Console().print(table)
        return 0
    rows = costs_by(store, arguments.by)
    if arguments.json:
        return print_json([row.model_dump(mode="json") for row in rows])
    table = Table(title=f"Costs in {store.namespace!r} by {arguments.by}", title_justify="left")
    for name in (arguments.by, "USD", "unconfirmed", "attempts", "failed", "cached", "tokens in", "tokens out"):
        table.add_column(name, justify="left" if name == arguments.by else "right")
    for row in rows:
        table.add_row(
            escape(row.value), f"{row.usd:.6f}", f"{row.unconfirmed_usd:.6f}", str(row.attempts), str(row.failed),
            str(row.cached), str(row.input_tokens), str(row.output_tokens),
        )  # fmt: skip
    Console().print(table if rows else f"No calls are recorded in namespace {store.namespace!r}.")
    return 0


def calls(arguments: argparse.Namespace) -> int:
    """Print the newest records."""
    store = _open(arguments)
    limit = arguments.limit
    if limit is None and arguments.trace is None:
        limit = DEFAULT_LIMIT
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} must be at least 1")
    wanted = {name: getattr(arguments, name) for name in ("user", "tenant", "model", "outcome", "program", "variant")}
    wanted["prompt_version"] = arguments.prompt
    wanted["trace_id"] = _trace(arguments.trace)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if arguments.unconfirmed:
        records = [record for record in Ledger(store).unconfirmed() if _matches(record, wanted)][:limit]
    else:
        records = Ledger(store).records(limit=limit, **wanted)
    if arguments.json:
        return print_json([record.to_dict() for record in records])
    table = Table(
        title=f"Newest calls in {store.namespace!r}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("when, user", overflow="fold")
    wide = any(record.trace_id for record in records)
    table.add_column("model and id", overflow="fold", min_width=35 if wide else 25)
    table.add_column("outcome", overflow="fold")
    for name in ("USD", "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        route = "" if record.route == "primary" else ", fallback"
        again = f", try {record.attempt}" if record.attempt > 1 else ""
        tokens = (
            "" if record.input_tokens is None else f"\n[dim]{record.input_tokens}+{_number(record.output_tokens)}[/]"
        )
        waited = f"\n[dim]+{record.waited:.2f} wait[/]" if record.waited >= 0.005 else ""
        table.add_row(
            f"{_when(record.started_at)}\n[dim]{escape(record.user or '')}[/]",
            f"{escape(record.model)}{route}{again}\n[dim]{escape(_marks(record))}[/]",
            record.outcome if record.error is None else f"{record.outcome}\n[dim]{record.error}[/]",
            _money(record) + tokens,
            f"{record.latency:.2f}{waited}",
        )
    that = " that match" if wanted or arguments.unconfirmed else ""
    Console().print(table if records else f"No calls{that} are recorded in namespace {store.namespace!r}.")
    return 0


def _open(arguments: argparse.Namespace) -> Store:
    url = arguments.store or default_store_url()
    if url.startswith("memory:"):
        raise ConfigError("a memory store ends with its process; pass --store sqlite:///path or set DSPY_PROD_STORE")
    path = Path(url.split("?", 1)[0].removeprefix("sqlite:///")).expanduser()
    if url.startswith("sqlite:") and not path.exists():
        raise ConfigError(f"there is no store at {path}; run a program with dspy_prod.LM here, or pass --store")
    return open_store(url, arguments.namespace or default_namespace())


def _matches(record: CallRecord, wanted: dict[str, str]) -> bool:
    return all(getattr(record, name) == value for name, value in wanted.items())


def _trace(given: str | None) -> str | None:
    """A trace's id as MLflow writes it; OpenTelemetry's form lacks the `tr-`."""
    return f"tr-{given.lower()}" if given is not None and re.fullmatch("[0-9a-fA-F]{32}", given) else given


def _marks(record: CallRecord) -> str:
    """By what a record is found in MLflow and here, a line each."""
    prompt = None if record.prompt_version is None else f"prompt {record.prompt_version}"
    return "\n".join(mark for mark in (record.id, prompt, record.trace_id) if mark is not None)


def _money(record: CallRecord) -> str:
    if record.cost_usd is None:
        return "unknown"
    return f"{record.cost_usd:.6f}" + ("?" if record.estimated else "")


def _when(at: float) -> str:
    moment = dt.datetime.fromtimestamp(at)
    return moment.strftime("%H:%M:%S" if moment.date() == dt.datetime.now().date() else "%m-%d %H:%M")


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
