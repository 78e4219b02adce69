"""The tables (or JSON) with which the demo ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median_high
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich.console import Console

from dspy_prod.cli.demo import traces
from dspy_prod.cli.demo.traces import Written
from dspy_prod.cli.printing import print_json
from dspy_prod.records import NANO, CallRecord
from dspy_prod.status.health import Health
from dspy_prod.views import Cell, Table

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
    by_model = _money("Cost by model", records, lambda record: record.model)
    by_user = _money("Cost by user", records, lambda record: record.user or "anonymous")
    mlflow = [] if report.written is None else [traces.table(report.written)]
    parts = (_requests(run), _acts(run), by_model, by_user, _answers(run), _bill(report.verdict), *mlflow)
    changes = Table("Circuit changes", ("",), [(" → ".join(run.transitions) or "none",)])
    for part in (*parts, changes, report.health):
        console.print(part, crop=False)


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
    print_json(result)


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
    fallbacks = {f"  fallback: {reason}": count for reason, count in _fallbacks(run).items()}
    requests = run.providers.requests()
    upstream = {"upstream HTTP requests": "n/a" if requests is None else requests}
    counts = {**summary(run), **fallbacks, **upstream}
    return Table("Requests", ("", "count"), [(name, str(count)) for name, count in counts.items()], numbers=1)


def _acts(run: Run) -> Table:
    rows = []
    for act, priority in product(dict.fromkeys(o.act for o in run.outcomes), ("high", "normal")):
        found = [o for o in run.outcomes if o.act == act and o.priority == priority]
        if found:
            ends = Counter(o.status for o in found)
            counts = (len(found), ends["ok"], ends["cached"], ends["fallback"], sum(o.attempts for o in found))
            name = act if priority == "normal" else f"{act}, high priority"
            rows.append((name, *map(str, counts), f"{median_high(o.latency for o in found):.2f} s"))
    columns = ("act", "requests", "ok", "cached", "fallback", "attempts", "median latency")
    return Table("Act by act", columns, rows, numbers=6)


def _money(title: str, records: Sequence[CallRecord], key: Callable[[CallRecord], str]) -> Table:
    rows = []
    for value in sorted({key(record) for record in records}):
        found = [record for record in records if key(record) == value]
        counts = (
            sum(not record.cached for record in found),
            sum(record.outcome not in ("ok", "cached", "stale") for record in found),
            sum(record.cached for record in found),
            _sum(record.input_tokens for record in found),
            _sum(record.output_tokens for record in found),
        )
        rows.append((value, *map(str, counts), _usd(_sum(record.cost_nano for record in found))))
    columns = ("", "attempts", "failed", "cached", "tokens in", "tokens out", "USD")
    return Table(title, columns, rows, numbers=6)


def _answers(run: Run) -> Table:
    share = accuracy(run)
    note = "" if share is None else f" (category right in {share:.0%} of model answers)"
    short = partial(shorten, placeholder="…")
    chosen = [run.outcomes[index] for index in (0, 5, 13, 18, 24, -1) if index < len(run.outcomes)]
    return Table(f"Some answers{note}", ("message", "category", "labelled", "reply", "by"), [
        (short(o.message.message, 90), o.category or "-", o.message.category, short(o.reply or "-", 60),
         o.status if o.reason is None else f"{o.status}: {o.reason}")
        for o in chosen
    ])  # fmt: skip


def _bill(verdict: Verdict) -> Table:
    unknown = verdict.bill is None
    agree = Cell("yes", "good") if verdict.agrees else Cell("NO", "bad")
    return Table("Ledger against the providers' bill", ("", "USD"), [
        ("ledger", _usd(verdict.ledger)),
        ("  of it unconfirmed", _usd(verdict.unconfirmed)),
        ("bill", "see the provider" if verdict.bill is None else _usd(verdict.bill)),
        ("agree", "n/a" if unknown else agree),
    ], numbers=1)  # fmt: skip


def _usd(nano: int) -> str:
    return f"{nano / NANO:.9f}"


def _sum(values: Iterable[int | None]) -> int:
    return sum(value or 0 for value in values)
