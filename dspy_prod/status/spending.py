"""What `costs` and `preview` answer with: frozen pydantic models and lists of them, which show themselves as tables.

Money is in USD, durations in seconds, days are UTC. Nothing here holds a secret, a prompt or an answer.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from math import fsum
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeVar

from dspy_prod.records import OTHER
from dspy_prod.telemetry.tap import Frozen
from dspy_prod.views import Cell, Page, Shown, ShownList, Table, frame, usd

if TYPE_CHECKING:
    import pandas

F = TypeVar("F", bound=Frozen)

Reason = Literal[
    "circuit_open", "rate_limited", "budget_exceeded", "deadline_exceeded", "unpriced_model", "store_unavailable",
    "run_stopped", "stopped", "outage",
]  # fmt: skip
"""The words of `RejectedError.reason`."""


class BudgetStatus(Frozen):
    """One account of one budget, in its current window. `spent + held + remaining = limit` until the limit is reached.

    Attributes:
        title: the budget's name, with the scope's value when it has one, e.g. `"day/tenant=acme"`.
        name: the budget's name alone. who: the scope's value alone, after that of the run for a
            run's budget; None for the one account of a global budget.
        per, scope: as in `Budget`.
        limit_usd: what may be spent in the window.
        spent_usd: what was charged, unconfirmed charges included.
        held_usd: reserved by calls in flight.
        unconfirmed_usd: the part of `spent_usd` that is an upper bound because the provider did not tell.
        remaining_usd: what a new call can still reserve.
        used_percent: `spent_usd` in percent of `limit_usd`.
        window: id of the window, e.g. `"2026-11-23"`; `"total"` or `"run"` when it never ends.
        ends_at: when the window ends; None when it never does.
    """

    title: str
    name: str
    who: str | None
    per: str
    scope: str
    limit_usd: float
    spent_usd: float
    held_usd: float
    unconfirmed_usd: float
    remaining_usd: float
    used_percent: float
    window: str
    ends_at: dt.datetime | None


class CostSummary(Shown, Frozen):
    """What a store and namespace has spent, and what is left of the tightest global budget.

    The budget fields describe the global budget with the highest `used_percent`, in its own window (which need not be
    a day); they are None without one.

    Attributes:
        today_usd: cost since midnight UTC, unconfirmed cost included; calls of unknown cost are not in it.
        budget_usd, used_percent, remaining_usd: of the tightest global budget.
        held_usd: reserved on it by calls in flight; 0 without one.
        unconfirmed_usd: the part of `today_usd` that is an upper bound because the provider did not tell.
        average_daily_7d_usd: mean of the last 7 calendar days with today; empty days count from the first record on.
        projected_monthly_usd: `average_daily_7d_usd` times the days of the current month.
        history: day → USD, oldest first, of the last 31 days with today; empty days count from the first record on.
        unknown_cost_calls: today's attempts whose cost is not known, because their model has no known price.
        unwritten: about how many records are in none of these figures yet, because the store cannot write them at the
            moment, or not so fast; 0 when all are complete.
        budgets: every global budget of the LM, then of each budget with a scope the accounts (at most 10) that are used
            most, the worst first.

    Example:
        ```python
        spent = lm.costs()
        print(spent.today_usd, spent.projected_monthly_usd, spent.remaining_usd)
        ```
    """

    today_usd: float
    budget_usd: float | None
    used_percent: float | None
    remaining_usd: float | None
    held_usd: float
    unconfirmed_usd: float
    average_daily_7d_usd: float
    projected_monthly_usd: float
    history: dict[dt.date, float]
    unknown_cost_calls: int
    unwritten: int = 0
    budgets: list[BudgetStatus]

    def to_frame(self) -> pandas.DataFrame:
        """`history` as a DataFrame: a row a day, with the columns `day` and `usd`.

        Raises:
            ConfigError: pandas is not installed.

        Example:
            ```python
            lm.costs().to_frame().plot.bar(x="day", y="usd")
            ```
        """
        days = frame([{"day": day, "usd": usd} for day, usd in self.history.items()], ["day", "usd"])
        return days.astype({"day": "datetime64[ns]", "usd": float})

    def table(self, title: str = "Costs") -> Table:
        """The sums and the days, as a table with this title."""
        note = f"About {self.unwritten:,} records are not written yet and in none of these." if self.unwritten else ""
        return Table(
            title,
            ("", "USD"),
            [
                ("today", usd(self.today_usd)),
                ("  of it unconfirmed", usd(self.unconfirmed_usd)),
                ("average day (7 days)", usd(self.average_daily_7d_usd)),
                ("projected for the month", usd(self.projected_monthly_usd, 4)),
                ("calls of unknown cost today", self.unknown_cost_calls),
                *((str(day), usd(spent)) for day, spent in self.history.items()),
                ("total of these days", usd(fsum(self.history.values()))),
            ],
            note,
        )

    def _view(self) -> Page:
        return Page(self.table(), *([budgets_table(self.budgets)] if self.budgets else []))


class CostRow(Frozen):
    """Sums over records that have one value in common.

    Attributes:
        value: the day (`YYYY-MM-DD`), model, user, ... they have in common.
        rest: the row collects values beyond the number a store keeps apart per day; its value is `"(other)"`.
        usd: known cost, unconfirmed cost included.
        unconfirmed_usd: the part of `usd` that is an upper bound.
        unknown_cost: attempts whose cost is not known; they are not in `usd`.
        attempts: upstream attempts. cached: answers from the cache. failed: attempts that did not end in an answer.
        input_tokens, output_tokens: usage the providers told.
        list_usd: the list cost, as far as it is known: what all this would have cost without a cache, each answer
            from it at what it cost when it was asked. Variants are compared by it: the cache of a new one is cold.
        unknown_list: attempts and cached answers of unknown list cost, those that earlier releases recorded among them.
    """

    value: str
    usd: float
    unconfirmed_usd: float
    unknown_cost: int
    attempts: int
    cached: int
    failed: int
    input_tokens: int
    output_tokens: int
    list_usd: float
    unknown_list: int
    rest: bool = False


class CostRows(ShownList[CostRow]):
    """Sums by a dimension: a list, which shows itself as a table and gives a DataFrame.

    Attributes:
        by: the dimension, as in `LM.costs(by=...)`.
    """

    def __init__(self, rows: Iterable[CostRow] = (), by: str = "value") -> None:
        super().__init__(rows)
        self.by = by

    def to_frame(self) -> pandas.DataFrame:
        """A row for each value, in the column that is called like the dimension; days are dates.

        Raises:
            ConfigError: pandas is not installed.

        Example:
            ```python
            lm.costs(by="model").to_frame().sort_values("usd")
            ```
        """
        names = ("usd", "unconfirmed_usd", "unknown_cost", "attempts", "failed", "cached", "input_tokens")
        columns = (*names, "output_tokens", "list_usd", "unknown_list")
        rows = [{self.by: row.value, **{name: getattr(row, name) for name in columns}} for row in self]
        found = frame(rows, [self.by, *columns])
        return found.astype({"day": "datetime64[ns]"}) if self.by == "day" else found

    def table(self, title: str) -> Table:
        """The sums and what they come to, as a table with this title."""
        money = _COMPARED if self.by in ("experiment", "variant") else _MONEY
        columns = (self.by, *money.values(), "attempts", "failed", "cached", "tokens in", "tokens out")
        rows, total = [_sums(_named(row), [row], money) for row in self], [_sums("total", self, money)] if self else []
        return Table(title, columns, rows, numbers=len(columns) - 1, last=total)

    def _view(self) -> Table:
        return self.table(f"Costs by {self.by}")


def budgets_table(budgets: Sequence[BudgetStatus], title: str = "Budgets, USD") -> Table:
    """What each account has left, as a table."""
    columns = ("name", "scope", "who", "window", "limit", "spent", "held", "left", "used %")
    return Table(title, columns, map(_account, budgets), numbers=5)


class Preview(Shown, Frozen):
    """What a call would cost at most, and whether and when it would be sent. Nothing was sent or reserved.

    Attributes:
        model: the model that would be asked; another than the LM's when a fallback or a cheaper model would answer.
        bound_usd: the most that one attempt for each of the `n` answers can cost; 0 when it is `cached`, None when it
            is not known. Retries of attempts that were billed come on top.
        input_tokens_bound, output_tokens_bound: the bounds behind it; None when not known.
        affordable: whether the budgets cover `bound_usd`; True when there is none, None when the cost is not known.
        wait: seconds until it could be sent; None when that depends on other calls or it would be refused for good.
        reason: why it would be refused, as in `RejectedError.reason`; None when it would not.
        detail: the refusal or the wait in plain words, with the remedy; else empty.
        cached: whether the cache would answer, or the answers that the run of the call has kept.
        budgets: the accounts the call would draw on.

    Example:
        ```python
        preview = lm.preview("Summarise this ticket ...")
        print(preview.bound_usd, preview)  # nothing is sent
        ```
    """

    model: str
    bound_usd: float | None
    input_tokens_bound: int | None
    output_tokens_bound: int | None
    affordable: bool | None
    wait: float | None
    reason: Reason | None
    detail: str
    cached: bool
    budgets: list[BudgetStatus]

    def _view(self) -> Page:
        sent = Cell("yes", "good") if self.reason is None else Cell(f"no: {self.reason}", "bad")
        wait = "depends on other calls" if self.wait is None and self.reason is None else _seconds(self.wait)
        rows: list[tuple[str, Any]] = [
            ("would be sent", Cell("no, it is answered already", "good") if self.cached else sent),
            ("costs at most, USD", Cell("not known", "warn") if self.bound_usd is None else _usd(self.bound_usd)),
            ("tokens in, at most", self.input_tokens_bound),
            ("tokens out, at most", self.output_tokens_bound),
            ("affordable", self.affordable),
            ("wait", wait),
            *([("note", self.detail)] if self.detail else []),
        ]
        table = Table(f"A call of {self.model}, if it were made now", ("", ""), rows)
        return Page(table, *([budgets_table(self.budgets)] if self.budgets else []))


def filled(answer: type[F], source: NamedTuple, **more: Any) -> F:
    """An answer with the fields that its source has by the same names, and some more."""
    told = {name: value for name, value in source._asdict().items() if name in answer.model_fields}
    return answer(**told, **more)


def _account(budget: BudgetStatus) -> tuple[Any, ...]:
    sums = (budget.limit_usd, budget.spent_usd, budget.held_usd, budget.remaining_usd)
    names = (budget.name, budget.scope, budget.who or "", budget.window)
    tone: Any = "bad" if budget.used_percent >= 100 else "warn" if budget.used_percent > 90 else ""
    return (*names, *map(_usd, sums), Cell(f"{budget.used_percent:.0f}", tone, number=True))


def _usd(value: float) -> Cell:
    """With as many places as nano-USD need, and no more."""
    whole, _, places = f"{value:.9f}".partition(".")
    return Cell(f"{whole}.{places.rstrip('0').ljust(2, '0')}", number=True)


def _seconds(value: float | None) -> Cell | None:
    return None if value is None else Cell(f"{value:.1f} s", number=True)


def _named(row: CostRow) -> str:
    """A row's name; a value that is itself called `(other)` in quotes."""
    return repr(row.value) if row.value == OTHER and not row.rest else row.value


_MONEY: Final = {"usd": "USD", "unconfirmed_usd": "unconfirmed"}
_COMPARED: Final = {"usd": "USD", "list_usd": "list USD", "unconfirmed_usd": "unconfirmed"}
"""Of rows that are compared with each other, however warm the cache of each is."""


def _sums(name: str, rows: Sequence[CostRow], sums: Iterable[str]) -> tuple[Any, ...]:
    """What some rows come to: a row of the table."""
    money = [Cell(f"{fsum(getattr(row, each) for row in rows):.6f}", number=True) for each in sums]
    counts = ((row.attempts, row.failed, row.cached, row.input_tokens, row.output_tokens) for row in rows)
    return name, *money, *(Cell(str(sum(column)), number=True) for column in zip(*counts, strict=True))
