"""The tables (or JSON) with which the demo ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
from rich.console import Console
from rich.table import Table

from dspy_prod.cli.demo.traces import Written, table
from dspy_prod.cli.printing import numbers
from dspy_prod.records import NANO, CallRecord
from dspy_prod.status.health import Health

if TYPE_CHECKING:
    from dspy_prod.cli.demo.running import Run


@dataclass(frozen=True)
class Verdict:
    """The ledger against the providers' bill, in nano-USD. `bill` is None where only the provider knows it."""

    ledger: int
    unconfirmed: int
    bill: int | None

    @property
    def agrees(self) -> bool:
        """The confirmed part never exceeds the bill, and the whole is never below it."""
        if self.bill is None:
            return True
        return self.ledger - self.unconfirmed <= self.bill <= self.ledger


@dataclass(frozen=True)
class Report:
    """What the demo ends with. `written` is None without traces."""

    run: Run
    records: Sequence[CallRecord]
    health: Health
    written: Written | None

    @property
    def verdict(self) -> Verdict:
        """The ledger held against the bill."""
        ledger = _sum(record.cost_nano for record in self.records)
        unconfirmed = _sum(record.cost_nano for record in self.records if record.estimated)
        return Verdict(ledger, unconfirmed, self.run.providers.bill_nano())


def show(console: Console, report: Report) -> None:
    """Print everything as tables."""
    run, records = report.run, report.records
    console.print(_requests(run))
    console.print(_acts(run))
    console.print(_money("Cost by model", records, lambda record: record.model))
    console.print(_money("Cost by user", records, lambda record: record.user or "anonymous"))
    console.print(_answers(run))
    console.print(_bill(report.verdict))
    if report.written is not None:
        console.print(table(report.written))
    console.print(_health(run, report.health))


def show_json(report: Report) -> None:
    """Print everything as one JSON object on standard output."""
    run, verdict, written = report.run, report.verdict, report.written
    result: dict[str, Any] = {
        "provider": run.providers.description,
        "requests": summary(run),
        "fallbacks": dict(_fallbacks(run)),
        "attempts": dict(Counter(record.outcome for record in report.records)),
        "accuracy": accuracy(run),
        "ledger_usd": verdict.ledger / NANO,
        "unconfirmed_usd": verdict.unconfirmed / NANO,
        "bill_usd": None if verdict.bill is None else verdict.bill / NANO,
        "agrees": verdict.agrees,
        "mlflow": None if written is None else written.to_dict(),
        "breaker": run.transitions,
        "health": report.health.model_dump(mode="json"),
    }
    Console().print_json(orjson.dumps(result).decode())


def summary(run: Run) -> dict[str, int]:
    """Counts of requests by how they ended."""
    outcomes = run.outcomes
    return {
        "total": len(outcomes),
        "successful": sum(o.status in ("ok", "cached") for o in outcomes),
        "cached": sum(o.status == "cached" for o in outcomes),
        "by fallback model": sum(o.status == "ok" and o.route not in (None, "primary") for o in outcomes),
        "static fallback": sum(o.status == "fallback" for o in outcomes),
    }


def accuracy(run: Run) -> float | None:
    """Share of model answers whose category is the labelled one."""
    answered = [o for o in run.outcomes if o.status in ("ok", "cached") and o.category is not None]
    return sum(o.category == o.message.category for o in answered) / len(answered) if answered else None


def _fallbacks(run: Run) -> Counter[str | None]:
    return Counter(o.reason for o in run.outcomes if o.status == "fallback")


def _requests(run: Run) -> Table:
    table = numbers("Requests", "", "count")
    for name, count in summary(run).items():
        table.add_row(name, str(count))
    for reason, count in _fallbacks(run).items():
        table.add_row(f"  fallback: {reason}", str(count))
    requests = run.providers.requests()
    table.add_row("upstream HTTP requests", "n/a" if requests is None else str(requests))
    return table


def _acts(run: Run) -> Table:
    table = numbers("Act by act", "act", "requests", "ok", "cached", "fallback", "attempts", "median latency")
    for act in dict.fromkeys(o.act for o in run.outcomes):
        for priority in ("high", "normal"):
            found = [o for o in run.outcomes if o.act == act and o.priority == priority]
            if not found:
                continue
            latencies = sorted(o.latency for o in found)
            ends = Counter(o.status for o in found)
            table.add_row(
                act if priority == "normal" else f"{act}, high priority",
                str(len(found)),
                *(str(ends[status]) for status in ("ok", "cached", "fallback")),
                str(sum(o.attempts for o in found)),
                f"{latencies[len(latencies) // 2]:.2f} s",
            )
    return table


def _money(title: str, records: Sequence[CallRecord], key: Callable[[CallRecord], str]) -> Table:
    table = numbers(title, "", "attempts", "failed", "cached", "tokens in", "tokens out", "USD", overflow="fold")
    for value in sorted({key(record) for record in records}):
        found = [record for record in records if key(record) == value]
        table.add_row(
            value,
            str(sum(not record.cached for record in found)),
            str(sum(record.outcome not in ("ok", "cached", "stale") for record in found)),
            str(sum(record.cached for record in found)),
            str(_sum(record.input_tokens for record in found)),
            str(_sum(record.output_tokens for record in found)),
            f"{_sum(record.cost_nano for record in found) / NANO:.9f}",
        )
    return table


def _answers(run: Run) -> Table:
    share = accuracy(run)
    note = "" if share is None else f" (category right in {share:.0%} of model answers)"
    table = Table(title=f"Some answers{note}", title_justify="left")
    table.add_column("message", ratio=3)
    table.add_column("category", no_wrap=True)
    table.add_column("labelled", no_wrap=True)
    table.add_column("reply", ratio=2)
    table.add_column("by", overflow="fold")
    for outcome in [run.outcomes[index] for index in (0, 5, 13, 18, 24, -1) if index < len(run.outcomes)]:
        table.add_row(
            _short(outcome.message.message, 90),
            outcome.category or "-",
            outcome.message.category,
            _short(outcome.reply or "-", 60),
            outcome.status if outcome.reason is None else f"{outcome.status}: {outcome.reason}",
        )
    return table


def _bill(verdict: Verdict) -> Table:
    table = numbers("Ledger against the providers' bill", "", "USD")
    table.add_row("ledger", f"{verdict.ledger / NANO:.9f}")
    table.add_row("  of it unconfirmed", f"{verdict.unconfirmed / NANO:.9f}")
    table.add_row("bill", "see the provider" if verdict.bill is None else f"{verdict.bill / NANO:.9f}")
    table.add_row("agree", "n/a" if verdict.bill is None else "[green]yes[/]" if verdict.agrees else "[red]NO[/]")
    return table


def _health(run: Run, health: Health) -> Table:
    colour = {"healthy": "green", "warning": "yellow", "degraded": "red"}[health.status]
    table = Table(title=f"Health: [{colour}]{health.status}[/]", title_justify="left")
    table.add_column("part")
    table.add_column("state")
    for breaker in health.breakers:
        table.add_row(f"breaker {breaker.route}", f"{breaker.state}, opened {breaker.opened_count} time(s)")
    table.add_row("circuit changes", " → ".join(run.transitions) or "none")
    for limiter in health.limiters:
        table.add_row(f"limiter {limiter.route}", f"{limiter.in_flight} in flight, {limiter.waiting} waiting")
    for reason in health.reasons:
        table.add_row("note", reason)
    costs = health.costs
    if costs is not None:
        projected = f"projected for the month {costs.projected_monthly_usd:.4f} USD"
        table.add_row("today", f"{costs.today_usd:.6f} USD; {projected}")
    return table


def _short(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _sum(values: Iterable[int | None]) -> int:
    return sum(value or 0 for value in values)
