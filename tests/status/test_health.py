"""Health, costs and previews say what is true, ask cheaply, and change nothing."""

from __future__ import annotations

import datetime as dt
import gc
import json
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy.lm15 import Config, Message, Request
from dspy.utils.exceptions import LMError, LMRateLimitError, LMServerError
from pydantic import ValidationError

import dspy_prod
from dspy_prod import Budget, Cache, CircuitBreaker, Price, RateLimit, Retry, call_context
from dspy_prod.errors import CircuitOpenError, RejectedError, StoreUnavailableError
from dspy_prod.pipeline.plan import plan
from dspy_prod.records import NANO, CallRecord
from dspy_prod.status import health as status
from dspy_prod.status.health import CostSummary, Health, costs_by
from dspy_prod.status.spending import BudgetStatus
from dspy_prod.stores.base import Reservation
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock, ScriptedEngine

MODEL = "openai/gpt-4o-mini"
NOON = dt.datetime(2026, 11, 23, 12, tzinfo=dt.timezone.utc)
PRICES = {"unit/model": Price(input=1000, output=1000)}  # a thousandth of a USD per token


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(NOON.timestamp())


@pytest.fixture
def store(clock: FakeClock) -> MemoryStore:
    return MemoryStore("status", clock=clock)


def make(store: MemoryStore, engine: Any = None, model: str = MODEL, **arguments: Any) -> dspy_prod.LM:
    """An LM that sends nothing anywhere."""
    arguments = {"max_tokens": 100, "retry": False, **arguments}
    return dspy_prod.LM(
        model, engine=ScriptedEngine("hi") if engine is None else engine, store=store, clock=store._clock, **arguments
    )


def record(store: MemoryStore, day: dt.date, usd: float | None, id: str = "", **fields: Any) -> None:
    """Put one record into the ledger, at noon of a day."""
    at = dt.datetime(day.year, day.month, day.day, 12, tzinfo=dt.timezone.utc).timestamp()
    record.count += 1  # type: ignore[attr-defined]
    cost = None if usd is None else round(usd * NANO)
    known = {"outcome": "ok", "model": MODEL, "route": "primary", "attempt": 1, **fields}
    store.append(CallRecord(id=id or f"r{record.count}", call_id="c", started_at=at, cost_nano=cost, **known))  # type: ignore[attr-defined]


record.count = 0  # type: ignore[attr-defined]


def ago(days: int) -> dt.date:
    """The day so many days before today."""
    return NOON.date() - dt.timedelta(days=days)


# -- health ----------------------------------------------------------------------------------------------------------


def test_an_lm_in_use_is_healthy_and_says_where_its_state_lives(store: MemoryStore) -> None:
    """A successful call leaves a healthy report with breaker, cache, costs and store in it."""
    lm = make(store)
    lm("question")
    lm("question")
    health = lm.health()
    assert (health.status, health.reasons) == ("healthy", [])
    assert [(b.route, b.model, b.state, b.successes) for b in health.breakers] == [("primary", MODEL, "closed", 1)]
    assert health.cache is not None
    assert (health.cache.size, health.cache.hits, health.cache.misses, health.cache.hit_rate) == (1, 1, 1, 0.5)
    assert health.costs is not None
    assert health.costs.today_usd > 0
    assert (health.holds, health.waiting) == (0, 0)
    assert health.store is not None
    assert (health.store.url, health.store.namespace, health.store.durable, health.store.available) == (
        "memory://",
        "status",
        False,
        True,
    )


def test_an_open_circuit_degrades(store: MemoryStore, clock: FakeClock) -> None:
    """Open, half-open and forced open are all degraded, and the reason names model and cause."""
    lm = make(store, ScriptedEngine(LMServerError("boom", status=503)), breaker=CircuitBreaker(failure_threshold=1))
    with pytest.raises(LMError):
        lm("question")
    health = lm.health()
    assert health.status == "degraded"
    (breaker,) = health.breakers
    assert (breaker.state, breaker.failures, breaker.opened_count) == ("open", 1, 1)
    assert breaker.retry_after == pytest.approx(60, abs=7)
    assert MODEL in health.reasons[0]
    assert "503" in health.reasons[0]
    guard = lm.pipeline.primary.breaker
    assert guard is not None
    clock.advance(120)
    guard.permit()
    assert [b.state for b in lm.health().breakers] == ["half_open"]
    assert lm.health().status == "degraded"
    guard.force_open("maintenance")
    assert "forced open (maintenance)" in lm.health().reasons[0]
    guard.reset()
    assert lm.health().status == "healthy"


def test_a_budget_above_ninety_percent_warns(store: MemoryStore) -> None:
    """The warning begins above 90 % and names the budget and both sums."""
    engine = ScriptedEngine("hi", input_tokens=8, output_tokens=1)
    lm = make(
        store,
        engine,
        "unit/model",
        prices=PRICES,
        budget=Budget(usd=1, name="small", max_wait=0),
        max_tokens=1,
        cache=False,
    )
    lm.pipeline.primary.bounds = lambda request: (10, 0)  # type: ignore[method-assign]
    for _ in range(100):
        lm("q")
    assert lm.health().status == "healthy", lm.health().reasons  # exactly 90 %
    lm("q")
    health = lm.health()
    assert health.status == "warning"
    assert health.reasons == ["The budget 'small' is used to 91 % (0.91 of 1.00 USD)"]


@pytest.mark.parametrize(
    ("limit", "calls", "word"), [(RateLimit(rpm=20, burst=20), 19, "requests"), (RateLimit(tpm=10_000), 9, "tokens")]
)
def test_a_nearly_exhausted_limiter_warns(
    limit: RateLimit, calls: int, word: str, store: MemoryStore, clock: FakeClock
) -> None:
    """Under 10 % of a minute's requests or tokens is a warning, and it passes with the minute."""
    lm = make(store, ScriptedEngine("hi", input_tokens=1000, output_tokens=10), limit=limit, cache=False, max_tokens=10)
    assert lm.health().status == "healthy"
    (before,) = lm.health().limiters
    assert (before.requests_available, before.tokens_available) == (limit.rpm, limit.tpm)
    for _ in range(calls):
        clock.advance(62 / (calls + 1))  # as pacing wants it
        lm("q")
    health = lm.health()
    assert health.status == "warning"
    assert word in health.reasons[0]
    (limiter,) = health.limiters
    used = limiter.requests_utilisation if word == "requests" else limiter.tokens_utilisation
    assert used is not None
    assert used > 0.9
    clock.advance(120)
    assert lm.health().status == "healthy"


def test_a_provider_that_asks_to_pause_warns(store: MemoryStore) -> None:
    """A 429 shows as a pause and a lowered rate, also where no limit is configured."""
    lm = make(store, ScriptedEngine(LMRateLimitError("slow down", status=429, retry_after=20)))
    assert lm.health().limiters == []
    with pytest.raises(LMError):
        lm("question")
    health = lm.health()
    assert health.status == "warning"
    (limiter,) = health.limiters
    assert limiter.paused_for == pytest.approx(20)
    assert "pause for 20 s" in health.reasons[0]


class BrokenStore(MemoryStore):
    """A store whose disk went away."""

    works = True

    def flush(self, timeout: float | None = None) -> bool:
        return self.works and super().flush(timeout)


class LyingStore(MemoryStore):
    """A store that breaks between two questions."""

    def totals(self, **_: Any) -> Any:
        raise StoreUnavailableError("the disk is full; free some space")


def test_an_unavailable_store_degrades_instead_of_raising(clock: FakeClock) -> None:
    """Health is what an operator reads in an outage, so it never raises."""
    store = BrokenStore(clock=clock)
    lm = make(store)
    store.works = False
    health = lm.health()
    assert health.status == "degraded"
    assert (health.costs, health.stores[0].available) == (None, False)
    assert "memory://" in health.reasons[0]
    healthy = MemoryStore("healthy", clock=clock)
    both = status.health([lm.pipeline, make(healthy).pipeline])
    assert (both.status, [seen.available for seen in both.stores]) == ("degraded", [False, True])
    assert both.costs is not None
    late = make(LyingStore(clock=clock)).health()
    assert (late.status, late.costs, late.stores[0].available) == ("degraded", None, False)
    assert "free some space" in late.reasons[0]


@pytest.mark.parametrize(
    "problems", [{"dropped": 3, "last_error": OSError("full")}, lambda: {"dropped": 3}], ids=["mapping", "method"]
)
def test_a_store_that_dropped_something_degrades(problems: Any, store: MemoryStore) -> None:
    """What a store tells of itself is shown, and lost operations are not healthy."""
    store.problems = problems  # type: ignore[attr-defined]
    health = make(store).health()
    assert health.status == "degraded"
    assert health.stores[0].problems["dropped"] == 3
    assert "dropped 3 operations" in health.reasons[0]
    assert json.loads(health.model_dump_json())["stores"][0]["problems"]["dropped"] == 3


def test_health_of_everything_counts_each_store_and_route_once(clock: FakeClock) -> None:
    """Copies and LMs that share an identity are one; another store and another model are not."""
    gc.collect()
    shared, other = MemoryStore("once-1", clock=clock), MemoryStore("once-2", clock=clock)
    budget = Budget(usd=4.25)
    first = make(shared, model="once/a", budget=budget, prices={"once/a": Price(input=1, output=1)})
    second = make(shared, model="once/b", budget=budget, prices={"once/b": Price(input=1, output=1)})
    third = make(other, model="once/a", limit=RateLimit(rpm=60))
    copies = [
        first.copy(temperature=1.0),
        first.copy(cache=False),
        dspy.Predict("a -> b").deepcopy(),
        first.copy(limit=None),
    ]
    first("q")
    third("q")
    health = dspy_prod.health()
    ours = [b for b in health.breakers if b.model.startswith("once/")]
    assert sorted(b.model for b in ours) == ["once/a", "once/a", "once/b"]
    assert sorted(s.namespace for s in health.stores if s.namespace in ("once-1", "once-2")) == ["once-1", "once-2"]
    assert len([x for x in health.limiters if x.model == "once/a"]) == 1
    assert health.costs is not None
    assert [b.title for b in health.costs.budgets if b.limit_usd == 4.25] == ["total"]
    del copies, second


def test_health_without_any_lm_is_empty_and_healthy() -> None:
    """Nothing to look at is nothing wrong."""
    nothing = status.health([])
    assert (nothing.status, nothing.breakers, nothing.costs, nothing.cache, nothing.store) == (
        "healthy",
        [],
        None,
        None,
        None,
    )


def test_reports_are_frozen_and_survive_json(store: MemoryStore) -> None:
    """A report is a value: it cannot be changed, and JSON gives the same one back."""
    lm = make(store, budget=Budget(usd=5, per="day"), limit=RateLimit(rpm=60, tpm=9000, concurrency=2))
    lm("q")
    health = lm.health()
    assert Health.model_validate_json(health.model_dump_json()) == health
    with pytest.raises(ValidationError):
        health.status = "warning"


# -- costs -----------------------------------------------------------------------------------------------------------


def test_costs_of_an_empty_ledger_are_zero(store: MemoryStore) -> None:
    """Nothing spent is zero, and no budget is None, never zero."""
    costs = make(store).costs()
    assert isinstance(costs, CostSummary)
    assert (costs.today_usd, costs.average_daily_7d_usd, costs.projected_monthly_usd, costs.history) == (0, 0, 0, {})
    assert (costs.budget_usd, costs.used_percent, costs.remaining_usd, costs.budgets) == (None, None, None, [])


def test_the_average_counts_empty_days_from_the_first_record_on(store: MemoryStore) -> None:
    """3 USD over the first four calendar days are 0.75 USD a day, and 30 days of that in November."""
    record(store, ago(3), 2.0)
    record(store, ago(0), 1.0)
    costs = make(store).costs()
    assert costs.today_usd == 1.0
    assert costs.average_daily_7d_usd == pytest.approx(0.75)
    assert costs.projected_monthly_usd == pytest.approx(22.5)
    assert costs.history == {ago(3): 2.0, ago(2): 0.0, ago(1): 0.0, ago(0): 1.0}
    assert list(costs.history) == sorted(costs.history)


@pytest.mark.parametrize("first", [7, 20, 30, 31, 40, 200])
def test_the_average_divides_by_seven_once_the_ledger_is_a_week_old(first: int, store: MemoryStore) -> None:
    """The first record may lie before the week, before the month, or before a gap."""
    record(store, ago(first), 9.0)
    record(store, ago(1), 7.0)
    costs = make(store).costs()
    assert costs.average_daily_7d_usd == pytest.approx(1.0)
    assert len(costs.history) == min(first, 30) + 1
    assert sum(costs.history.values()) == pytest.approx(16.0 if first <= 30 else 7.0)


def test_days_are_utc(store: MemoryStore, clock: FakeClock) -> None:
    """A second before midnight UTC is yesterday."""
    lm = make(store, cache=False)
    clock.advance(12 * 3600 - 1)
    lm("q")
    assert lm.costs().today_usd > 0
    clock.advance(1)
    costs = lm.costs()
    assert costs.today_usd == 0
    assert list(costs.history) == [dt.date(2026, 11, 23), dt.date(2026, 11, 24)]


def test_unconfirmed_and_unknown_costs_stand_apart(store: MemoryStore) -> None:
    """An upper bound is part of the sum and named; an unknown cost is counted and never zero USD of certainty."""
    record(store, ago(0), 1.0)
    record(store, ago(0), 0.5, estimated=True)
    record(store, ago(0), None)
    record(store, ago(1), None)
    costs = make(store).costs()
    assert (costs.today_usd, costs.unconfirmed_usd, costs.unknown_cost_calls) == (1.5, 0.5, 1)


def test_the_budget_fields_are_those_of_the_tightest_global_budget(store: MemoryStore) -> None:
    """Of a day's and a total budget the fuller one is shown; both are listed, then the tenants' accounts."""
    engine = ScriptedEngine("hi", input_tokens=99, output_tokens=1)
    budgets = [Budget(usd=10, per="day"), Budget(usd=2), Budget(usd=1, scope="tenant")]
    lm = make(store, engine, "unit/model", prices=PRICES, budget=budgets, max_tokens=1, cache=False)
    lm("q")
    costs = lm.costs()
    assert (costs.budget_usd, costs.used_percent) == (2.0, pytest.approx(5.0))
    assert costs.remaining_usd == pytest.approx(1.9)
    assert [(b.title, b.spent_usd) for b in costs.budgets] == [
        ("day", 0.1),
        ("total", 0.1),
        ("total/tenant=anonymous", 0.1),
    ]
    day, total, _ = costs.budgets
    assert (day.window, day.ends_at) == ("2026-11-23", dt.datetime(2026, 11, 24, tzinfo=dt.timezone.utc))
    assert (total.window, total.ends_at) == ("total", None)


def test_held_money_is_neither_spent_nor_remaining(store: MemoryStore) -> None:
    """While a call is in flight, spent + held + remaining is the limit."""
    seen: list[CostSummary] = []

    def answer(_: Request) -> str:
        seen.append(lm.costs())
        return "hi"

    lm = make(store, ScriptedEngine(answer), "unit/model", prices=PRICES, budget=Budget(usd=5), max_tokens=10)
    lm("q")
    (during,) = seen
    assert during.held_usd > 0
    assert during.remaining_usd == pytest.approx(5 - during.held_usd)
    after = lm.costs()
    assert after.held_usd == 0
    assert after.remaining_usd == pytest.approx(5 - after.today_usd)


def test_a_run_budget_shows_the_run_in_force(store: MemoryStore) -> None:
    """`Budget(per="run")` is read for the run of the context, else for this process."""
    lm = make(store, budget=Budget(usd=5, per="run"), cache=False)
    with call_context(run="a"):
        lm("q")
        assert lm.costs().used_percent > 0
    with call_context(run="b"):
        assert lm.costs().used_percent == 0


def test_costs_by_sums_every_dimension_and_orders_by_cost(store: MemoryStore) -> None:
    """Each dimension has a row for each value, the dearest first; days stand in order."""
    record(store, ago(1), 1.0, model="a", user="u1", tags=(("team", "x"),), input_tokens=10, output_tokens=2)
    record(store, ago(0), 3.0, model="b", user="u2", tenant="acme", program="triage", variant="v", prompt_version="p/1")
    record(store, ago(0), 0.5, model="a", estimated=True, outcome="timeout")
    record(store, ago(0), None, model="a", tags=(("team", "x"),))
    record(store, ago(0), 0.0, model="a", cached=True, outcome="cached")
    lm = make(store)
    rows = lm.costs(by="model")
    assert [(row.value, row.usd, row.unconfirmed_usd, row.unknown_cost) for row in rows] == [
        ("b", 3.0, 0, 0),
        ("a", 1.5, 0.5, 1),
    ]
    assert (rows[1].attempts, rows[1].cached, rows[1].failed) == (3, 1, 1)
    assert (rows[1].input_tokens, rows[1].output_tokens) == (10, 2)
    assert [(row.value, row.usd) for row in lm.costs(by="day")] == [(str(ago(1)), 1.0), (str(ago(0)), 3.5)]
    assert [row.value for row in lm.costs(by="user")] == ["u2", "u1"]
    for by, value in (("tenant", "acme"), ("program", "triage"), ("variant", "v"), ("prompt", "p/1")):
        assert [(row.value, row.usd) for row in lm.costs(by=by)] == [(value, 3.0)]
    (team,) = lm.costs(by="tag:team")
    assert (team.value, team.usd, team.unknown_cost) == ("x", 1.0, 1)


@pytest.mark.parametrize("by", ["", "users", "all", "tag:", "tag"])
def test_an_unknown_dimension_is_refused_by_name(by: str, store: MemoryStore) -> None:
    """The message lists what there is."""
    with pytest.raises(ValueError, match=r"'model'.*'tag:<key>'"):
        costs_by(store, by)


def test_sums_may_begin_at_a_day(clock: FakeClock) -> None:
    """The command could, the method could not: with a year of users there is no sum of last week by hand."""
    store = CountingStore(clock=clock)
    for days in range(40):
        record(store, ago(days), 1.0, user="ann" if days % 2 else "bob")
    lm = make(store)
    rows = lm.costs(by="user", since=ago(6))
    assert [(row.value, row.usd) for row in rows] == [("bob", 4.0), ("ann", 3.0)]
    assert store.asked == [(str(ago(6)), None)], "no day before it is read"
    assert lm.costs(by="user", since=dt.timedelta(days=6)) == rows
    assert lm.costs("user", since=dt.datetime.combine(ago(6), dt.time(23), dt.timezone.utc)) == rows
    assert [row.value for row in lm.costs(since=ago(1))] == [str(ago(1)), str(ago(0))]
    with pytest.raises(TypeError, match=r"datetime\.date"):
        lm.costs("user", since="7d")


def test_costs_may_be_limited_to_the_dearest_or_the_last_days(store: MemoryStore) -> None:
    """Of a thousand users who wants the dearest ten should not wait for all."""
    for day in range(4):
        record(store, ago(day), float(day + 1), user=f"u{day}")
    lm = make(store)
    assert [row.value for row in lm.costs(by="user", limit=2)] == ["u3", "u2"]
    assert [row.value for row in lm.costs(by="user", limit=2, since=ago(1))] == ["u1", "u0"]
    assert [row.value for row in lm.costs(by="day", limit=2)] == [str(ago(1)), str(ago(0))]
    assert [row.value for row in lm.costs(limit=9)] == [str(ago(day)) for day in (3, 2, 1, 0)]
    assert lm.costs(by="user", limit=0) == lm.costs(by="day", limit=0) == []
    for wrong in (-1, True, 1.5):
        with pytest.raises(ValueError, match="limit="):
            lm.costs(by="user", limit=wrong)


class CountingStore(MemoryStore):
    """Remembers which days were asked for."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.asked: list[tuple[str | None, str | None]] = []

    def totals(self, *, dimension: str = "all", since_day: str | None = None, until_day: str | None = None) -> Any:
        self.asked.append((since_day, until_day))
        return super().totals(dimension=dimension, since_day=since_day, until_day=until_day)

    def sums(self, *, dimension: str, since_day: str | None = None, most: int | None = None) -> Any:
        self.asked.append((since_day, None))
        return super().sums(dimension=dimension, since_day=since_day, most=most)

    def records(self, **_: Any) -> Any:
        raise AssertionError("a summary reads sums, not records")


def test_a_summary_reads_a_bounded_number_of_days(clock: FakeClock) -> None:
    """However old the ledger is, health and costs read one month of sums, and a year more only after a gap."""
    store = CountingStore(clock=clock)
    for days in range(1500):
        record(store, ago(days), 1.0)
    lm = make(store)
    assert lm.health().costs == lm.costs()
    assert lm.costs().average_daily_7d_usd == 1.0
    assert set(store.asked) == {(str(ago(30)), str(ago(0)))}
    gap = CountingStore(clock=clock)
    record(gap, ago(60), 1.0)
    record(gap, ago(0), 7.0)
    assert make(gap).costs().average_daily_7d_usd == 1.0
    assert gap.asked == [(str(ago(30)), str(ago(0))), (str(ago(366)), str(ago(31)))]


# -- preview ---------------------------------------------------------------------------------------------------------


class WatchingStore(MemoryStore):
    """Remembers what was asked for in earnest."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.asks: list[Reservation] = []

    def admit(self, ask: Reservation) -> Any:
        self.asks.append(ask)
        return super().admit(ask)


def test_a_preview_tells_the_bound_that_the_call_will_reserve(clock: FakeClock) -> None:
    """The preview's bound is the very amount the call reserves then, and the answer stays within it."""
    store = WatchingStore(clock=clock)
    lm = make(store, budget=Budget(usd=5, per="day"), limit=RateLimit(rpm=600, tpm=100_000))
    preview = lm.preview("What is the capital of France?")
    assert store.asks == []
    lm("What is the capital of France?")
    (ask,) = store.asks
    assert preview.bound_usd == ask.amount / NANO
    assert preview.input_tokens_bound is not None
    assert preview.output_tokens_bound == 100
    assert ask.tokens == preview.input_tokens_bound + 100
    assert 0 < lm.costs().today_usd <= preview.bound_usd
    assert (preview.affordable, preview.wait, preview.reason, preview.cached) == (True, 0.0, None, False)
    assert [(b.title, b.limit_usd) for b in preview.budgets] == [("day", 5.0)]


def test_a_preview_changes_nothing(store: MemoryStore) -> None:
    """Nothing is sent, reserved, recorded, counted or emitted, however often it is asked."""
    engine = ScriptedEngine("hi")
    lm = make(store, engine, budget=Budget(usd=5), limit=RateLimit(rpm=60, tpm=10_000, concurrency=1))
    lm("warm")
    before, calls = lm.health(), engine.calls
    events: list[Any] = []
    remove = dspy_prod.add_listener(events.append)
    try:
        for prompt in ("warm", "cold"):
            for _ in range(200):
                lm.preview(prompt)
    finally:
        remove()
    assert lm.health() == before
    assert (engine.calls, events, len(lm.ledger.records()), len(lm.history)) == (calls, [], 1, 1)


def test_a_preview_covers_all_answers_of_one_call(store: MemoryStore) -> None:
    """`n=3` costs at most three times as much, and is affordable only as a whole."""
    engine = ScriptedEngine("hi")
    one = make(store, engine, "unit/model", prices=PRICES, budget=Budget(usd=0.5), max_tokens=50)
    single, triple = one.preview("q"), one.preview("q", n=3)
    assert single.bound_usd is not None
    assert triple.bound_usd == pytest.approx(3 * single.bound_usd)
    assert triple.output_tokens_bound == 150
    assert (single.affordable, triple.affordable, triple.reason) == (True, False, "budget_exceeded")


def test_a_preview_leaves_the_plan_as_it_was(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for `n` answers is not written into the plan of one."""
    plans: list[Any] = []
    monkeypatch.setattr("dspy_prod.status.preview.plan", lambda *given: plans.append(plan(*given)) or plans[-1])
    lm = make(store, ScriptedEngine("hi"), "unit/model", prices=PRICES, budget=Budget(usd=5), max_tokens=50)
    single, triple = lm.preview("q"), lm.preview("q", n=3)
    assert single.bound_usd is not None
    assert triple.bound_usd == pytest.approx(3 * single.bound_usd)
    assert [planned.reservation.amount / NANO for planned in plans] == [single.bound_usd] * 2


def test_a_preview_without_budget_or_price(store: MemoryStore) -> None:
    """Without a budget every call is affordable; an unknown price is an unknown bound, and refused under a budget."""
    free = make(store, model="unit/unknown")
    assert (free.preview("q").bound_usd, free.preview("q").affordable, free.preview("q").reason) == (None, True, None)
    strict = make(store, model="unit/unknown", budget=Budget(usd=1))
    preview = strict.preview("q")
    assert (preview.bound_usd, preview.affordable, preview.wait, preview.reason) == (None, None, None, "unpriced_model")
    assert "prices=" in preview.detail
    priced = make(store)
    assert priced.preview("q").bound_usd is not None


def test_a_preview_of_a_spent_budget_says_so(store: MemoryStore) -> None:
    """It is not affordable, will not become so by waiting, and says what to do; the call then agrees."""
    lm = make(store, model="unit/model", prices=PRICES, budget=Budget(usd=0.05, per="day"))
    preview = lm.preview("q")
    assert (preview.affordable, preview.wait, preview.reason) == (False, None, "budget_exceeded")
    assert "Raise the budget" in preview.detail
    with pytest.raises(RejectedError) as caught:
        lm("q")
    assert caught.value.reason == preview.reason


def test_a_preview_of_an_open_circuit_tells_when_it_may_be_tried(store: MemoryStore, clock: FakeClock) -> None:
    """The wait is the breaker's; the cost is known all the same; with a fallback, the fallback would answer."""
    failing = ScriptedEngine(LMServerError("boom", status=503))
    breaker = CircuitBreaker(failure_threshold=1, jitter=0)
    lm = make(store, failing, breaker=breaker, budget=Budget(usd=5))
    with pytest.raises(LMError):
        lm("q")
    preview = lm.preview("q")
    assert (preview.reason, preview.wait, preview.affordable) == ("circuit_open", 60.0, True)
    assert preview.bound_usd is not None
    with pytest.raises(CircuitOpenError):
        lm("q")
    backup = dspy.LM("openai/gpt-4.1-nano", engine=ScriptedEngine("hi"))
    rescued = make(
        store, failing, breaker=breaker, budget=Budget(usd=5), fallbacks=[backup], retry=Retry(attempts=1)
    ).preview("q")
    assert (rescued.model, rescued.reason, rescued.wait) == ("openai/gpt-4.1-nano", None, 0.0)


def test_a_preview_that_no_route_takes_shows_the_first_refusal(store: MemoryStore) -> None:
    """As the call itself raises it."""
    lm = make(store, fallbacks=[dspy.LM("openai/gpt-4.1-nano", engine=ScriptedEngine("hi"))])
    for route in lm.pipeline.routes:
        assert route.breaker is not None
        route.breaker.force_open(f"maintenance of {route.model}")
    preview = lm.preview("q")
    assert (preview.model, preview.reason, preview.wait) == (MODEL, "circuit_open", None)
    assert f"maintenance of {MODEL}" in preview.detail


def test_a_preview_of_a_full_limiter_tells_the_wait(store: MemoryStore, clock: FakeClock) -> None:
    """The wait is exact; beyond `max_wait` or the deadline it is a refusal."""
    lm = make(store, limit=RateLimit(rpm=2, burst=2, max_wait=30), cache=False)
    lm("a")
    lm("b")
    preview = lm.preview("c")
    assert preview.reason == "rate_limited"
    assert preview.wait is not None
    assert 59 <= preview.wait <= 63
    clock.advance(preview.wait - 10)
    soon = lm.preview("c")
    assert soon.reason is None
    assert soon.wait == pytest.approx(10, abs=0.01)
    with call_context(deadline=5, clock=clock):
        assert lm.preview("c").reason == "deadline_exceeded"
    clock.advance(10.01)
    assert lm.preview("c").wait == 0
    lm("c")


def test_a_preview_of_a_call_that_can_never_fit(store: MemoryStore) -> None:
    """`max_tokens` above tpm is refused for good."""
    preview = make(store, limit=RateLimit(tpm=50)).preview("q")
    assert (preview.reason, preview.wait) == ("rate_limited", None)


@pytest.mark.parametrize(
    ("policy", "word"),
    [({"limit": RateLimit(concurrency=1)}, "in flight"), ({"budget": Budget(usd=0.3, name="held")}, "budget 'held'")],
    ids=["concurrency", "held money"],
)
def test_a_preview_that_depends_on_calls_in_flight_has_no_wait(policy: Any, word: str, store: MemoryStore) -> None:
    """Nobody knows when another call ends: no wait, no refusal, and a word about it."""
    seen: list[Any] = []

    def answer(_: Request) -> str:
        seen.append(lm.preview("other"))
        return "hi"

    lm = make(store, ScriptedEngine(answer), "unit/model", prices=PRICES, max_tokens=50, timeout=None, **policy)
    lm("q")
    (during,) = seen
    assert (during.wait, during.reason, during.affordable) == (None, None, True)
    assert word in during.detail
    assert lm.preview("other").wait == 0


def test_a_preview_after_the_deadline(store: MemoryStore, clock: FakeClock) -> None:
    """A deadline that has passed is a refusal of its own."""
    lm = make(store)
    with call_context(deadline=1, clock=clock):
        clock.advance(2)
        assert lm.preview("q").reason == "deadline_exceeded"


def test_a_preview_shrinks_the_last_call_as_the_call_does(clock: FakeClock) -> None:
    """With `shrink_last` the previewed bound is the clamped one."""
    store = WatchingStore(clock=clock)
    lm = make(store, model="unit/model", prices=PRICES, budget=Budget(usd=0.25, shrink_last=True), max_tokens=1000)
    preview = lm.preview("q")
    assert (preview.affordable, preview.reason) == (True, None)
    assert preview.bound_usd is not None
    assert preview.bound_usd <= 0.25
    lm("q")
    assert store.asks[-1].amount / NANO == preview.bound_usd


def test_a_preview_of_a_broken_store_does_not_raise(clock: FakeClock) -> None:
    """It is a refusal with the store's own words."""

    class Broken(MemoryStore):
        def account(self, key: str) -> Any:
            raise StoreUnavailableError("the disk is full")

    preview = make(Broken(clock=clock), budget=Budget(usd=1)).preview("q")
    assert (preview.reason, preview.affordable, preview.budgets) == ("store_unavailable", None, [])


REQUEST = Request(model=MODEL, messages=(Message.user("hi"),), config=Config(max_tokens=10))
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "prompt": (("hi",), {}),
    "temperature": (("hi",), {"temperature": 0.5}),
    "rollout": (("hi",), {"temperature": 1.0, "rollout_id": 3}),
    "two answers": (("hi",), {"n": 2, "temperature": 0.7}),
    "request": ((REQUEST,), {}),
    "request by name": ((), {"request": REQUEST}),
    "schema": (("hi",), {"response_format": BudgetStatus}),  # not JSON: found by its request
    "stop": (("hi",), {"stop": ["x"]}),
}


@pytest.fixture(params=CALLS)
def arguments(request: pytest.FixtureRequest) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    return CALLS[request.param]  # type: ignore[return-value]


def test_a_preview_knows_whether_the_cache_would_answer(arguments: Any, store: MemoryStore) -> None:
    """Before the call it would not, after it it would, and the call itself then agrees."""
    args, kwargs = arguments
    engine = ScriptedEngine("hi")
    lm = make(store, engine, cache=Cache())
    assert not lm.preview(*args, **kwargs).cached
    lm(*args, **kwargs)
    sent = engine.calls
    preview = lm.preview(*args, **kwargs)
    assert (preview.cached, preview.bound_usd, preview.wait, preview.affordable) == (True, 0.0, 0.0, True)
    lm(*args, **kwargs)
    assert engine.calls == sent


def test_a_preview_respects_cache_modes_tenants_and_expiry(store: MemoryStore, clock: FakeClock) -> None:
    """Another tenant, a bypass, a refresh, other arguments and an expired answer are not answered by the cache."""
    lm = make(store, cache=Cache(ttl=60, ttl_jitter=0, stale_if_error=600))
    with call_context(tenant="a"):
        lm("q")
        assert lm.preview("q").cached
        assert not lm.preview("q", temperature=0.1).cached
        assert not lm.preview("q", cache=False).cached
        with call_context(cache="refresh"):
            assert not lm.preview("q").cached
        with call_context(cache="bypass"):
            assert not lm.preview("q").cached
    with call_context(tenant="b"):
        assert not lm.preview("q").cached
    clock.advance(61)
    with call_context(tenant="a"):
        assert not lm.preview("q").cached
