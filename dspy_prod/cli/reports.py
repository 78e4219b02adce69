"""`dspy-prod health`, `costs`, `programs` and `calls`: what a store knows, as tables or `--json`."""

from __future__ import annotations

import argparse
import datetime as dt
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dspy_prod.cli.printing import print_json, show
from dspy_prod.errors import ConfigError
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.status.controls import Controls
from dspy_prod.status.costs import Place, check_dimension, costs_by, summary
from dspy_prod.status.costs_report import report as costs_report
from dspy_prod.status.ledger import Ledger
from dspy_prod.status.listed import Records
from dspy_prod.status.programs import check_program_dimension
from dspy_prod.stores.addresses import default_store_url
from dspy_prod.stores.base import Store
from dspy_prod.stores.opening import check_there, default_namespace, open_store
from dspy_prod.views import Cell, Table
from dspy_prod.views.cells import Tone

DEFAULT_LIMIT = 20
RECENT = 3600.0
"""Seconds that `health` looks back."""
_UNITS = {"m": dt.timedelta(minutes=1), "h": dt.timedelta(hours=1), "d": dt.timedelta(days=1), "w": dt.timedelta(7)}


def health(arguments: argparse.Namespace) -> int:
    """Print whether the store is usable, what is in flight and how recent calls ended."""
    store = opened(arguments)
    recent = store.records(since=time.time() - RECENT, limit=10_000)
    costs = summary([Place(store, SYSTEM_CLOCK)], [])
    controls = Controls(store)
    stops, circuits = controls.stops(), [each for each in controls.circuits() if each.state != "closed"]
    report: dict[str, Any] = {
        "store": store.url,
        "namespace": store.namespace,
        "holds": store.holds(),
        "today_usd": costs.today_usd,
        "unconfirmed_usd": costs.unconfirmed_usd,
        "stops": [each.model_dump(mode="json") for each in stops],
        "circuits": [each.model_dump(mode="json") for each in circuits],
        "last_hour": {
            model: dict(Counter(record.outcome for record in recent if record.model == model))
            for model in sorted({record.model for record in recent})
        },
    }
    if arguments.json:
        return print_json(report)
    unconfirmed = f"({costs.unconfirmed_usd:.6f} USD unconfirmed)"
    rows: list[tuple[str, Any]] = [
        ("store", Cell("usable", "good")),
        ("reservations in flight", str(report["holds"])),
        ("spent today", f"{costs.today_usd:.6f} USD {unconfirmed}"),
    ]
    rows += [("stopped", Cell(each.told(), "bad")) for each in stops]
    for each in circuits:
        tone: Tone = "" if each.state == "disabled" else "bad"
        rows.append((f"circuit of {each.route}", Cell(f"{each.state.replace('_', ' ')}: {each.cause}", tone)))
    for model, outcomes in report["last_hour"].items():
        rows.append((f"last hour, {model}", ", ".join(f"{count} {name}" for name, count in outcomes.items())))
    if not recent:
        rows.append(("last hour", "no calls"))
    return show(
        Table(f"{store.url}, namespace {store.namespace!r}", ("", ""), rows),
        "What each worker counts is its own: ask lm.health() or dspy_prod.health() there.",
    )


def costs(arguments: argparse.Namespace) -> int:
    """Print the cost summary, or sums by a dimension; or write a report."""
    since, by = _since(arguments.since), arguments.by
    if arguments.html is not None:
        return _costs_report(arguments, since)
    if since is not None and by is None:
        by = "day"
    if by is not None:
        check_dimension(by)
    store = opened(arguments)
    if by is None:
        found = summary([Place(store, SYSTEM_CLOCK)], [])
        if arguments.json:
            return print_json(found.model_dump(mode="json"))
        return show(found.table(f"Costs in {store.namespace!r}"))
    rows = costs_by(store, by, None if since is None else since.date())
    if arguments.json:
        return print_json([row.model_dump(mode="json") for row in rows])
    if not rows:
        return show(f"No calls are recorded in namespace {store.namespace!r}{_from(arguments)}.")
    return show(rows.table(f"Costs in {store.namespace!r} by {by}{_from(arguments)}"))


def _costs_report(arguments: argparse.Namespace, since: dt.datetime | None) -> int:
    """Write what was spent as an HTML file."""
    by, path = arguments.by, Path(arguments.html)
    if by is not None:
        check_dimension(by)
    if not path.parent.is_dir():
        raise ConfigError(f"--html {arguments.html!r}: there is no folder {str(path.parent)!r}")
    found = costs_report(opened(arguments), SYSTEM_CLOCK, since=since, by=None if by is None else [by])
    found.to_html(path)
    if arguments.json:
        return print_json(found.to_dict())
    return show(f"{path}: {found.total.usd:.6f} USD from {found.since} to {found.until}")


def programs(arguments: argparse.Namespace) -> int:
    """Print how many calls of programs ended how."""
    since = _since(arguments.since)
    check_program_dimension(arguments.by)
    store = opened(arguments)
    rows = Ledger(store).programs(by=arguments.by, since=None if since is None else since.date())
    if arguments.json:
        return print_json([row.model_dump(mode="json") for row in rows])
    if not rows:
        return show(f"No calls of programs are recorded in namespace {store.namespace!r}{_from(arguments)}.")
    return show(rows.table(f"Calls in {store.namespace!r} by {arguments.by}{_from(arguments)}"))


def calls(arguments: argparse.Namespace) -> int:
    """Print the newest records."""
    since, limit = _since(arguments.since), arguments.limit
    if limit is None and arguments.trace is None:
        limit = DEFAULT_LIMIT
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} must be at least 1")
    store = opened(arguments)
    fields = ("user", "tenant", "model", "outcome", "program", "experiment", "variant")
    wanted = {name: getattr(arguments, name) for name in fields}
    wanted["run"], wanted["prompt_version"] = arguments.of_run, arguments.prompt
    wanted["trace_id"] = _trace(arguments.trace)
    wanted = {name: value for name, value in wanted.items() if value is not None}
    tags = dict(map(_tag, arguments.tag or ()))
    if arguments.unconfirmed:
        wanted_tags = tags.items()
        found = [each for each in Ledger(store).unconfirmed(since=since) if wanted_tags <= dict(each.tags).items()]
        records = Records(each for each in found if wanted.items() <= each.to_dict().items())[:limit]
    else:
        records = Ledger(store).records(since=since, limit=limit, tags=tags, **wanted)
    if arguments.json:
        return print_json([record.to_dict() for record in records])
    if not records:
        that = " that match" if wanted or tags or arguments.unconfirmed else ""
        return show(f"No calls{that} are recorded in namespace {store.namespace!r}{_from(arguments)}.")
    return show(records.table(f"Newest calls in {store.namespace!r}{_from(arguments)}"))


def opened(arguments: argparse.Namespace) -> Store:
    """The store that the arguments name, which must be there: looking at one must not make it."""
    url = arguments.store or default_store_url()
    if url.startswith("memory:"):
        raise ConfigError("a memory store ends with its process; pass --store sqlite:///path or set DSPY_PROD_STORE")
    namespace = arguments.namespace or default_namespace()
    check_there(url, namespace)
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


def _trace(given: str | None) -> str | None:
    """A trace's id as MLflow writes it; OpenTelemetry's form lacks the `tr-`."""
    return f"tr-{given.lower()}" if given is not None and re.fullmatch("[0-9a-fA-F]{32}", given) else given
