"""What was spent and what is left: reads of the ledger's daily sums, never of its records.

However old the ledger is, a `CostSummary` reads at most 31 days of one sum each (and, when the last month begins
with a gap, a year more).
"""

from __future__ import annotations

import datetime as dt
from calendar import monthrange
from collections.abc import Iterable, Sequence
from itertools import chain
from math import inf
from typing import Final, NamedTuple

from dspy_prod.compat.pydantic import constructed
from dspy_prod.context.current import current
from dspy_prod.errors import ConfigError, StoreUnavailableError
from dspy_prod.pipeline.pipeline import Pipeline
from dspy_prod.policies.budget import BudgetRule
from dspy_prod.policies.sharing import refresh
from dspy_prod.privacy.visible import carried
from dspy_prod.records import NANO, OTHER, ROLLUP_DIMENSIONS, Totals, called
from dspy_prod.runtime.clock import Clock
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.status.spending import BudgetStatus, CostRow, CostRows, CostSummary
from dspy_prod.stores.base import Account, AccountState, Store
from dspy_prod.stores.memory_ledger import day_of

HISTORY_DAYS: Final = 31
AVERAGE_DAYS: Final = 7

WORST: Final = 10
"""Accounts that are shown of each budget with a scope, however many tenants or users there are."""

FLUSH_TIMEOUT: Final = 2.0
"""Seconds a store gets to write what was posted before it counts as unavailable."""

_SEARCH_DAYS: Final = 366
"""How far back the first record is looked for; an older one, with nothing since, begins a new ledger."""

_DAY: Final = dt.timedelta(days=1)


class Place(NamedTuple):
    """A store, and the clock whose days it is read by."""

    store: Store
    clock: Clock


def costs(pipeline: Pipeline) -> CostSummary:
    """What the pipeline's store and namespace has spent, and what is left of the pipeline's budgets."""
    REAPER.flush(FLUSH_TIMEOUT)
    return summary([Place(pipeline.store, pipeline.clock)], [pipeline])


def summary(places: Sequence[Place], pipelines: Iterable[Pipeline]) -> CostSummary:
    """The costs of several stores (at least one) together."""
    unwritten = sum(behind(store) for store, _ in places)
    days: dict[dt.date, int] = {}
    now = Totals()
    firsts: list[dt.date] = []
    today = dt.date.fromisoformat(max(day_of(clock.time()) for _, clock in places))
    for store, _ in places:
        begin = today - (HISTORY_DAYS - 1) * _DAY
        rows = store.totals(since_day=str(begin), until_day=str(today))
        for day, _, totals in rows:
            date = dt.date.fromisoformat(day)
            days[date] = days.get(date, 0) + totals.cost_nano
            if date == today:
                now = now.plus(totals)
        if not rows or rows[0][0] != str(begin):  # the first record may lie before a gap
            rows = store.totals(since_day=str(today - _SEARCH_DAYS * _DAY), until_day=str(begin - _DAY)) or rows
        firsts += [dt.date.fromisoformat(day) for day, _, _ in rows[:1]]
    first = min(firsts, default=today + _DAY)
    average = _mean([days.get(day, 0) for day in _span(max(first, today - (AVERAGE_DAYS - 1) * _DAY), today)])
    budgets, scoped = budgets_of(pipelines)
    tightest = max(budgets, key=lambda budget: (budget.used_percent, -budget.remaining_usd), default=None)
    return CostSummary(
        today_usd=now.cost_nano / NANO,
        budget_usd=None if tightest is None else tightest.limit_usd,
        used_percent=None if tightest is None else tightest.used_percent,
        remaining_usd=None if tightest is None else tightest.remaining_usd,
        held_usd=0.0 if tightest is None else tightest.held_usd,
        unconfirmed_usd=now.unconfirmed_nano / NANO,
        average_daily_7d_usd=average,
        projected_monthly_usd=average * monthrange(today.year, today.month)[1],
        history={day: days.get(day, 0) / NANO for day in _span(max(first, today - (HISTORY_DAYS - 1) * _DAY), today)},
        unknown_cost_calls=now.unknown_cost,
        unwritten=unwritten,
        budgets=[*budgets, *scoped],
    )


def costs_since(
    pipeline: Pipeline, by: str | None, since: dt.date | dt.timedelta | None, limit: int | None = None
) -> CostSummary | CostRows:
    """What `LM.costs` tells: the summary, or sums by a dimension since a day; with a day alone, day by day.

    Raises:
        ValueError: an unknown dimension, a negative limit. TypeError: a `since` that tells no day.
    """
    check_limit(limit)
    if by is None and since is None and limit is None:
        return costs(pipeline)
    if isinstance(since, dt.timedelta):
        since = dt.datetime.fromtimestamp(pipeline.clock.time() - since.total_seconds(), dt.timezone.utc)
    if isinstance(since, dt.datetime):
        since = since.astimezone(dt.timezone.utc).date()
    elif since is not None and not isinstance(since, dt.date):
        raise TypeError(f"since={since!r}: sums are kept by whole days; pass a datetime.date, or a timedelta (ago)")
    return costs_by(pipeline.store, "day" if by is None else by, since, limit)


def budgets_of(pipelines: Iterable[Pipeline]) -> tuple[list[BudgetStatus], list[BudgetStatus]]:
    """(the global budgets of some pipelines, the accounts of the scoped ones that are used most), each once.

    A run's global budget is that of the run in force here.
    """
    whole: dict[tuple[int, str], BudgetStatus] = {}
    scoped: dict[tuple[int, str], list[BudgetStatus]] = {}
    pipelines = list(pipelines)
    for store in {id(pipeline.store): pipeline.store for pipeline in pipelines if pipeline.rules}.values():
        refresh(store)
    for pipeline in pipelines:
        wall = pipeline.clock.time()
        for rule in pipeline.every_budget():
            key = (id(pipeline.store), rule.options.title)
            if rule.caps or key in whole or key in scoped:
                continue
            if rule.options.scope == "global":
                account = rule.account(current(), pipeline.primary.model, wall)
                whole[key] = budget_status(pipeline.store, rule, account, wall)
            else:
                scoped[key] = worst(pipeline.store, rule, wall, WORST)
    return list(whole.values()), sorted(chain(*scoped.values()), key=lambda each: -each.used_percent)


def worst(store: Store, rule: BudgetRule, wall: float, most: int) -> list[BudgetStatus]:
    """The accounts of a budget in the window of now, those that are used most first."""
    window, ends_at = rule.window(wall)
    found = store.accounts(rule.prefix, f"|{window}", most)
    return [
        _status(rule, rule.found(key, window, ends_at - wall), state, wall, rule.who(key, window))
        for key, state in found
    ]


def stored_budgets(store: Store, clock: Clock, most: int) -> list[BudgetStatus]:
    """Every budget that a store knows, by name, each with the accounts that are used most.

    Args:
        store: where the budgets are kept.
        clock: by whose time their windows are those of now.
        most: accounts of each budget.
    """
    wall, found = clock.time(), []
    for terms in store.terms():
        rule = BudgetRule(terms.in_force)
        accounts = [] if rule.caps else worst(store, rule, wall, most)
        found += accounts or [_unused(rule, wall)]
    return found


def _unused(rule: BudgetRule, wall: float) -> BudgetStatus:
    """A budget of which nobody has spent anything."""
    account = Account("", rule.limit, rule.options.title)
    return _status(rule, account, AccountState(), wall, who=None)


def budget_status(store: Store, rule: BudgetRule, account: Account, wall: float) -> BudgetStatus:
    """One account of a budget, now."""
    return _status(rule, account, store.account(account.key), wall, rule.who(account.key, rule.window(wall)[0]))


def _status(rule: BudgetRule, account: Account, state: AccountState, wall: float, who: str | None) -> BudgetStatus:
    window, ends_at = rule.window(wall)
    return BudgetStatus(
        title=account.title,
        name=rule.options.title,
        who=who,
        per=rule.options.per,
        scope=rule.options.scope,
        limit_usd=account.limit / NANO,
        spent_usd=state.spent / NANO,
        held_usd=state.held / NANO,
        unconfirmed_usd=state.unconfirmed / NANO,
        remaining_usd=max(0, account.limit - state.spent - state.held) / NANO,
        used_percent=100.0 * state.spent / account.limit if account.limit else 100.0,
        window=window,
        ends_at=None if ends_at == inf else dt.datetime.fromtimestamp(ends_at, dt.timezone.utc),
    )


def costs_by(store: Store, by: str, since: dt.date | None = None, limit: int | None = None) -> CostRows:
    """Sums since the ledger began, for each value of a dimension: the dearest first, days in order.

    Args:
        store: the store (and namespace) to read.
        by: `"day"`, `"model"`, `"user"`, `"tenant"`, `"program"`, `"experiment"`, `"variant"`, `"prompt"`, `"run"`
            or `"tag:<key>"`. Records that have no value for it are in no row. A variant's row is called
            `"experiment/variant"`, or as the variant alone where no experiment was said or an earlier release summed.
        since: the first day (UTC); default: all.
        limit: at most so many: the dearest, or the last days.

    Raises:
        ConfigError: an unknown dimension.
        StoreUnavailableError: some records could not be written yet, so the sums would be too low.
    """
    check_dimension(by)
    check_written(store)
    first = None if since is None else str(since)
    if by == "day":
        days = store.totals(since_day=first)
        last = days[0 if limit is None else max(0, len(days) - limit) :]
        return CostRows(cost_rows((day, totals) for day, _, totals in last), by)
    return CostRows(cost_rows(store.sums(dimension=by, since_day=first, most=limit)), by)


def behind(store: Store) -> int:
    """About how many records are in no sum yet, because the store cannot write them, or not so fast."""
    return 0 if store.flush(FLUSH_TIMEOUT) else store.unwritten()


def check_written(store: Store) -> None:
    """See to it that a read shows every attempt that has ended, abandoned streams included.

    Raises:
        StoreUnavailableError: some records could not be written yet.
    """
    REAPER.flush(FLUSH_TIMEOUT)
    missing = behind(store)
    if missing:
        raise StoreUnavailableError(
            f"The store {store.url} has about {missing:,} records that are not written yet, so what it shows would be "
            "too little; health() says why. Read again later, or what there is so far with costs() (`unwritten`) or "
            "from another process with dspy-prod calls"
        )


def check_limit(limit: int | None) -> None:
    """Refuse what is no number of rows."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        raise ValueError(f"limit={limit!r} must be a non-negative integer")


def check_dimension(by: str) -> None:
    """Refuse an unknown dimension by name."""
    if by == "day" or by in ROLLUP_DIMENSIONS or (isinstance(by, str) and by.startswith("tag:") and len(by) > 4):
        return
    choices = ", ".join(map(repr, ("day", *ROLLUP_DIMENSIONS, "tag:<key>")))
    raise ConfigError(f"costs(by={by!r}): use one of {choices}")


def cost_row(value: str, totals: Totals) -> CostRow:
    """Sums at the edge, in USD.

    Args:
        value: as it stands in the sums.
    """
    return cost_rows([(value, totals)])[0]


def cost_rows(sums: Iterable[tuple[str, Totals]]) -> list[CostRow]:
    """As `cost_row`, of many at once: a ledger may have thousands of users."""
    return [_row(value, totals) for value, totals in sums]


def _row(value: str, totals: Totals) -> CostRow:
    cost, unconfirmed, unknown, attempts, cached, failed, input_tokens, output_tokens, saved, saved_known = totals
    cells = {
        "value": called(value) if value.isascii() else carried(called(value)),  # JSON carries no half characters
        "usd": cost / NANO,
        "unconfirmed_usd": unconfirmed / NANO,
        "unknown_cost": unknown,
        "attempts": attempts,
        "cached": cached,
        "failed": failed,
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "list_usd": (cost + saved) / NANO,
        "unknown_list": unknown + cached - saved_known,
        "rest": value == OTHER,
    }
    return constructed(CostRow, _CELLS, cells)


_CELLS: Final = set(CostRow.model_fields)


def _span(first: dt.date, last: dt.date) -> list[dt.date]:
    return [first + n * _DAY for n in range((last - first).days + 1)]


def _mean(nanos: list[int]) -> float:
    return sum(nanos) / len(nanos) / NANO if nanos else 0.0
