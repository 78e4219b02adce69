"""`dspy-prod health`, `costs` and `calls`: what a store knows, for people (tables) and programs (`--json`)."""

from __future__ import annotations

import argparse
import datetime as dt
import re
import time
from collections import Counter
from collections.abc import Sequence
from math import fsum
from typing import Any

from rich.text import Text

from dspy_prod.cli.printing import Cell, as_text, print_json, show, table
from dspy_prod.errors import ConfigError
from dspy_prod.privacy.visible import carried
from dspy_prod.records import OTHER, CallRecord
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.status.costs import Place, check_dimension, costs_by, summary
from dspy_prod.status.ledger import Ledger
from dspy_prod.status.models import CostRow
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import default_namespace, default_store_url, file_of, open_store
from dspy_prod.stores.sqlite.schema import namespaces

DEFAULT_LIMIT = 20
RECENT = 3600.0
"""Seconds that `health` looks back."""
_UNITS = {"m": dt.timedelta(minutes=1), "h": dt.timedelta(hours=1), "d": dt.timedelta(days=1), "w": dt.timedelta(7)}


def health(arguments: argparse.Namespace) -> int:
    """Print whether the store is usable, what is in flight and how recent calls ended."""
    store = opened(arguments)
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
    unconfirmed = f"({costs.unconfirmed_usd:.6f} USD unconfirmed)"
    rows: list[tuple[Cell, Cell]] = [
        ("store", Text("usable", "green")),
        ("reservations in flight", str(report["holds"])),
        ("spent today", f"{costs.today_usd:.6f} USD {unconfirmed}"),
    ]
    for model, outcomes in report["last_hour"].items():
        rows.append((f"last hour, {model}", ", ".join(f"{count} {name}" for name, count in outcomes.items())))
    if not recent:
        rows.append(("last hour", "no calls"))
    return show(
        table(f"{store.url}, namespace {store.namespace!r}", ("", ""), rows),
        "Circuit breakers live in the calling process: ask lm.health() or dspy_prod.health() there.",
    )


def costs(arguments: argparse.Namespace) -> int:
    """Print the cost summary, or sums by a dimension."""
    since, by = _since(arguments.since), arguments.by
    if since is not None and by is None:
        by = "day"
    if by is not None:
        check_dimension(by)
    store = opened(arguments)
    if by is None:
        found = summary([Place(store, SYSTEM_CLOCK)], [])
        if arguments.json:
            return print_json(found.model_dump(mode="json"))
        sums = [
            ("today", f"{found.today_usd:.6f} USD"),
            ("  of it unconfirmed", f"{found.unconfirmed_usd:.6f} USD"),
            ("average day (7 days)", f"{found.average_daily_7d_usd:.6f} USD"),
            ("projected for the month", f"{found.projected_monthly_usd:.4f} USD"),
            ("calls of unknown cost today", str(found.unknown_cost_calls)),
            *((str(day), f"{spent:.6f} USD") for day, spent in found.history.items()),
            ("total of these days", f"{fsum(found.history.values()):.6f} USD"),
        ]
        return show(table(f"Costs in {store.namespace!r}", ("", ""), sums))
    rows = costs_by(store, by, None if since is None else since.date())
    if arguments.json:
        return print_json([row.model_dump(mode="json") for row in rows])
    columns = (by, "USD", "unconfirmed", "attempts", "failed", "cached", "tokens in", "tokens out")
    if not rows:
        return show(f"No calls are recorded in namespace {store.namespace!r}{_from(arguments)}.")
    shown, total = [_sums(_named(row), [row]) for row in rows], [_sums("total", rows)]
    return show(table(f"Costs in {store.namespace!r} by {by}{_from(arguments)}", columns, shown, numbers=7, last=total))


def calls(arguments: argparse.Namespace) -> int:
    """Print the newest records."""
    since, limit = _since(arguments.since), arguments.limit
    if limit is None and arguments.trace is None:
        limit = DEFAULT_LIMIT
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1")
    store = opened(arguments)
    wanted = {name: getattr(arguments, name) for name in ("user", "tenant", "model", "outcome", "program", "variant")}
    wanted["run"], wanted["prompt_version"] = arguments.of_run, arguments.prompt
    wanted["trace_id"] = _trace(arguments.trace)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    tags = dict(map(_tag, arguments.tag or ()))
    records: list[CallRecord]
    if arguments.unconfirmed:
        found = Ledger(store).unconfirmed(since=since)
        found = [each for each in found if tags.items() <= dict(each.tags).items()]
        records = [each for each in found if wanted.items() <= each.to_dict().items()][:limit]
    else:
        records = Ledger(store).records(since=since, limit=limit, tags=tags, **wanted)
    if arguments.json:
        return print_json([record.to_dict() for record in records])
    if not records:
        that = " that match" if wanted or tags or arguments.unconfirmed else ""
        return show(f"No calls{that} are recorded in namespace {store.namespace!r}{_from(arguments)}.")
    columns = ("when, user", "model and id", "outcome", "USD", "seconds")
    return show(table(f"Newest calls in {store.namespace!r}{_from(arguments)}", columns, map(_row, records), numbers=2))


def opened(arguments: argparse.Namespace) -> Store:
    """The store that the arguments name, which must be there: looking at one must not make it."""
    url = arguments.store or default_store_url()
    if url.startswith("memory:"):
        raise ConfigError("a memory store ends with its process; pass --store sqlite:///path or set DSPY_PROD_STORE")
    namespace = arguments.namespace or default_namespace()
    if url.startswith("sqlite:"):
        path = file_of(url)
        if not path.exists():
            raise ConfigError(f"there is no store at {path}; run a program with dspy_prod.LM here, or pass --store")
        there = namespaces(path)
        if there is not None and carried(namespace) not in there:
            known = ", ".join(map(repr, there)) or "none yet"
            raise ConfigError(f"there is no namespace {namespace!r} in {path}, only {known}; pass --namespace")
    return open_store(url, namespace)


def _since(given: str | None) -> dt.datetime | None:
    """The moment that `7d`, `12h`, `today` or a date means. A date begins in UTC, as the ledger's days do."""
    if given is None:
        return None
    now = dt.datetime.now(dt.timezone.utc)
    ago = re.fullmatch(r"(\d{1,4}) ?([mhdw])", given)
    if ago:
        return now - int(ago[1]) * _UNITS[ago[2]]
    if given in ("today", "yesterday"):
        given = str(now.date() - (given == "yesterday") * _UNITS["d"])
    try:
        at = dt.datetime.fromisoformat(given)
        if len(given) <= len("2026-01-31"):
            at = at.replace(tzinfo=dt.timezone.utc)
        return at.astimezone(dt.timezone.utc)
    except (ValueError, OverflowError):
        raise ConfigError(f"--since {given!r}: use 7d, 12h, 30m, 2w, today, or a date such as {now.date()}") from None


def _tag(given: str) -> tuple[str, str]:
    name, between, value = given.partition("=")
    if not name or not between:
        raise ConfigError(f"--tag {given!r}: write name=value, e.g. --tag feature=triage")
    return name, value


def _from(arguments: argparse.Namespace) -> str:
    return "" if arguments.since is None else f" since {arguments.since}"


def _named(row: CostRow) -> str:
    """A row's name; a value that is itself called `(other)` in quotes."""
    return repr(row.value) if row.value == OTHER and not row.rest else row.value


def _sums(name: str, rows: Sequence[CostRow]) -> tuple[str, ...]:
    """What some rows come to: a row of the table."""
    usd = [f"{fsum(spent):.6f}" for spent in zip(*((row.usd, row.unconfirmed_usd) for row in rows), strict=True)]
    counts = ((row.attempts, row.failed, row.cached, row.input_tokens, row.output_tokens) for row in rows)
    return name, *usd, *(str(sum(column)) for column in zip(*counts, strict=True))


def _trace(given: str | None) -> str | None:
    """A trace's id as MLflow writes it; OpenTelemetry's form lacks the `tr-`."""
    return f"tr-{given.lower()}" if given is not None and re.fullmatch("[0-9a-fA-F]{32}", given) else given


def _row(record: CallRecord) -> tuple[Text, ...]:
    route = "" if record.route == "primary" else ", fallback"
    again = f", try {record.attempt}" if record.attempt > 1 else ""
    prompt = None if record.prompt_version is None else f"prompt {record.prompt_version}"
    usd = "unknown" if record.cost_usd is None else f"{record.cost_usd:.6f}{'?' if record.estimated else ''}"
    tokens = None
    if record.input_tokens is not None:
        tokens = f"{record.input_tokens}+{'-' if record.output_tokens is None else record.output_tokens}"
    return (
        _lines(_when(record.started_at), record.user),
        _lines(f"{record.model}{route}{again}", record.id, prompt, record.trace_id),
        _lines(record.outcome, record.error),
        _lines(usd, tokens),
        _lines(f"{record.latency:.2f}", f"+{record.waited:.2f} wait" if record.waited >= 0.005 else None),
    )


def _lines(first: str, *more: str | None) -> Text:
    """A cell with a line that matters, and fainter ones below it."""
    return as_text(first).append("".join(f"\n{as_text(line)}" for line in more if line), "dim")


def _when(at: float) -> str:
    moment = dt.datetime.fromtimestamp(at)
    return moment.strftime("%H:%M:%S" if moment.date() == dt.datetime.now().date() else "%m-%d %H:%M")
