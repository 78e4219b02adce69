"""Money and limits where routes, copies and windows meet."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import dspy
import pytest
from dspy.clients import model_metadata
from dspy.lm15 import Config, Message, Request, Usage
from dspy.utils.exceptions import LMRateLimitError, LMServerError

import dspy_prod
from dspy_prod import (
    Budget,
    BudgetExceededError,
    CircuitBreaker,
    Price,
    RateLimit,
    RateLimitedError,
    UnpricedModelError,
    call_context,
)
from dspy_prod.context.current import current
from dspy_prod.pipeline.attempt import Attempt
from dspy_prod.pipeline.call import Call
from dspy_prod.pipeline.effects import Wait
from dspy_prod.pipeline.flow import flow
from dspy_prod.pipeline.plan import plan
from dspy_prod.pipeline.refusals import refused
from dspy_prod.pricing.book import PriceBook
from dspy_prod.runtime.forking import RegistryLock
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.admission.limiter import LimiterState
from dspy_prod.stores.base import GRANTED, REFUSED, Account, Refusal, Reservation, Settlement
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock, ScriptedEngine
from tests.compose.support import CENT, MODEL, SPARE, Caller, Gate, caught, down, over, spare

_ids = itertools.count()


def request_for(lm: dspy_prod.LM) -> Request:
    return Request(model=lm.model, messages=(Message.user("hi"),), config=Config(max_tokens=100))


def call_of(lm: dspy_prod.LM, streaming: bool = False) -> Call:
    return Call(lm.pipeline, request_for(lm), current(), None, None, streaming, [])


def ask(amount: int = 0, accounts: tuple[Account, ...] = (), limit: RateLimit | None = None) -> Reservation:
    key = None if limit is None else "key"
    return Reservation(f"money-{next(_ids)}", key, limit, 0, accounts, amount, 1, "", 1e9, 900.0, None)


# -- budgets of routes -----------------------------------------------------------------------------------------------
def test_the_budget_of_a_fallback_lm_holds_when_it_is_a_fallback() -> None:
    """Given a fallback LM with a budget of one call, when it stands in twice, then the second time is refused."""
    engine = ScriptedEngine("spare", output_tokens=100)
    store = MemoryStore()
    small = dspy_prod.LM(
        SPARE, engine=engine, budget=Budget(usd=0.01, name="spare"), store=store, cache=False, max_tokens=100,
        prices={SPARE: Price(input=0.0, output=100.0)},
    )  # fmt: skip
    lm = over(ScriptedEngine(down()), fallbacks=[small], store=store, budget=Budget(usd=1, name="all"))

    assert lm("q") == ["spare"]
    assert isinstance(caught(lambda: lm("q")), LMServerError), "what the upstream said is not hidden"
    assert isinstance(caught(lambda: small("q")), BudgetExceededError), "both draw on one account"
    assert engine.calls == 1


def test_a_budget_that_call_and_route_share_is_charged_once() -> None:
    """Given one budget on an LM and on its fallback, when the fallback answers, then it is one account."""
    store = MemoryStore()
    both = Budget(usd=1, name="both")
    small = dspy_prod.LM(SPARE, engine=ScriptedEngine("s"), budget=both, store=store, max_tokens=100)
    lm = over(ScriptedEngine(down()), fallbacks=[small], store=store, budget=both)

    planned = plan(call_of(lm), lm.pipeline.fallbacks[0], 1)
    assert [rule.options.title for rule in planned.rules] == ["both"]


def test_a_spent_budget_of_one_model_leaves_the_fallback() -> None:
    """Given a budget for each model, when the primary's is spent, then the fallback answers."""
    lm = over(
        ScriptedEngine("first", output_tokens=100),
        fallbacks=[spare(ScriptedEngine("spare"))],
        budget=Budget(usd=0.01, scope="model"),
    )
    assert [lm("a"), lm("b")] == [["first"], ["spare"]]


def test_an_unpriced_fallback_is_skipped_and_hides_nothing() -> None:
    """Given a fallback that no budget can bound, when the primary fails, then the next answers, else the failure."""
    unpriced = dspy.LM("openai/unpriced-fallback", engine=ScriptedEngine("never"))
    lm = over(ScriptedEngine(down()), fallbacks=[unpriced, spare(ScriptedEngine("spare"))], budget=Budget(usd=1))
    assert lm("q") == ["spare"]
    alone = over(ScriptedEngine(down()), fallbacks=[unpriced], budget=Budget(usd=1))
    assert isinstance(caught(lambda: alone("q")), LMServerError)


def test_only_the_budget_that_refuses_may_shrink() -> None:
    """Given a hard budget and one that shrinks, when the hard one refuses, then the call is refused."""
    engine = ScriptedEngine("ok")
    lm = over(
        engine,
        budget=[Budget(usd=0.005, name="hard"), Budget(usd=10, per="day", name="shrinks", shrink_last=True)],
    )
    assert isinstance(caught(lambda: lm("q")), BudgetExceededError)
    assert engine.calls == 0


# -- soft thresholds -------------------------------------------------------------------------------------------------
def test_held_money_does_not_pass_a_soft_threshold() -> None:
    """Given calls that hold far more than they cost, when they run together, then no budget is past its threshold."""
    gate = Gate()
    lm = over(
        ScriptedEngine([gate, "ok"], output_tokens=1),
        budget=Budget(usd=0.021, soft=0.5, degrade_to=SPARE, name="soft"),
    )
    first = Caller(lambda: lm("holds a cent"))
    assert gate.arrived.wait(30)
    lm("holds another")
    gate.open()
    assert first.outcome() == ["ok"]
    assert not lm.pipeline.budgets[0]._softened


def test_the_first_grant_that_sees_spent_money_passes_the_threshold() -> None:
    """Given a call that spent half, when the next is granted, then it passes the threshold and later ones degrade."""
    cheap = ScriptedEngine("cheap")
    lm = over(
        ScriptedEngine("dear", output_tokens=100),
        fallbacks=[spare(cheap)],
        budget=Budget(usd=0.02, soft=0.5, degrade_to=SPARE, name="soft"),
    )
    assert [lm("a"), lm("b")] == [["dear"], ["dear"]]
    assert lm.pipeline.budgets[0]._softened


def test_a_model_to_degrade_to_that_is_also_a_fallback_is_tried_once() -> None:
    """Given `degrade_to` among the fallbacks, when the threshold is passed, then it is one route."""
    lm = over(
        ScriptedEngine("dear", output_tokens=10),
        fallbacks=[spare(ScriptedEngine("cheap"))],
        budget=Budget(usd=0.1, soft=0.001, degrade_to=SPARE),
    )
    lm("spends")
    lm("passes")
    assert call_of(lm).routes() == (lm.pipeline.fallbacks[0],)


# -- what an identity shares -----------------------------------------------------------------------------------------
def test_a_copy_with_other_retries_shares_breaker_and_throttle() -> None:
    """Given a 429, when a copy with other retries is made, then it knows of it, and has the same circuit."""
    error = LMRateLimitError("slow down", model=MODEL, status=429, retry_after=30)
    lm = over(ScriptedEngine([error, "ok"]), breaker=CircuitBreaker())
    copy = lm.copy(num_retries=5)
    other = lm.copy(breaker=CircuitBreaker(minimum_calls=50))

    assert isinstance(caught(lambda: lm("q")), LMRateLimitError)

    assert copy.pipeline.primary.breaker is lm.pipeline.primary.breaker
    assert other.pipeline.primary.breaker is not lm.pipeline.primary.breaker
    assert copy.pipeline.primary.state.throttled
    assert other.pipeline.primary.state.retry_budget is lm.pipeline.primary.state.retry_budget
    assert copy.pipeline.primary.state.retry_budget is not lm.pipeline.primary.state.retry_budget


def test_a_registry_lock_is_free_in_a_child() -> None:
    """Given a lock that a thread holds at a fork, when the child begins, then it can be taken."""
    lock = RegistryLock()
    lock._lock.acquire()
    lock._after_fork()
    with lock:
        assert lock._lock.locked()


# -- limiter settings ------------------------------------------------------------------------------------------------
def test_a_route_without_a_limit_does_not_lift_that_of_another() -> None:
    """Given one key with a limit, when a route without one asks, then both are held to it."""
    core = AdmissionCore()
    limit, none = RateLimit(rpm=60, burst=1), RateLimit()
    states = [core.admit(ask(limit=one), 100.0).state for one in (limit, none, limit, none)]
    assert states.count(GRANTED) == 1
    state = core.limiter_state("key")
    assert state is not None
    assert state.limit == limit


@pytest.mark.parametrize("other", [RateLimit(), RateLimit(concurrency=100), RateLimit(tpm=1e9)])
def test_settings_that_alternate_keep_the_pace(other: RateLimit) -> None:
    """Given a pace of one call in 50 ms, when other settings come and go, then it still holds."""
    limit = RateLimit(rpm=1200, burst=1)
    state = LimiterState(limit, 0.0)
    sent = 0
    for tick in range(10):
        now = 100 + tick * 0.001
        if state.ready_at(now, 0) <= now:
            state.take(now, 0)
            sent += 1
        state.reconfigure(other, now)
        state = LimiterState.load(state.dump(), other)
        state.reconfigure(limit, now)
    assert sent == 1


def test_calls_without_a_pace_do_not_put_it_off() -> None:
    """Given many calls while no pace was set, when it is set again, then the next call waits for one slice only."""
    limit = RateLimit(rpm=6000, burst=1)
    state = LimiterState(limit, 0.0)
    state.take(100.0, 0)
    state.reconfigure(RateLimit(), 100.0)
    for _ in range(50):
        state.take(100.0, 0)
    state.reconfigure(limit, 100.0)
    assert 100.0 < state.ready_at(100.0, 0) < 100.1


# -- two budgets, and windows ----------------------------------------------------------------------------------------
def test_an_ask_that_a_later_budget_cannot_cover_does_not_wait_for_an_earlier() -> None:
    """Given held money in the first budget and too little in the second, when asked, then it is refused at once."""
    core = AdmissionCore()
    day, tiny = Account("day", 10, "day"), Account("tiny", 5, "tiny")
    assert core.admit(ask(6, (day,)), 1.0).state == GRANTED
    reservation = core.admit(ask(6, (day, tiny)), 1.0)
    assert reservation.state == REFUSED
    assert reservation.refusal is not None
    assert reservation.refusal.dimension == "tiny"


def test_a_call_that_waits_for_money_goes_when_the_next_window_begins() -> None:
    """Given a day's money held by a call in flight, when midnight comes, then who waited draws on the new day."""
    clock = FakeClock(start=1_800_000_000.0 - 1_800_000_000.0 % 86_400 + 86_390.0)
    store = MemoryStore(clock=clock)
    lm = over(
        ScriptedEngine("ok"), store=store, clock=clock, budget=Budget(usd=0.01, per="day", name="day", max_wait=60)
    )
    held = store.admit(_reservation_of(plan(call_of(lm), lm.pipeline.primary, 1)))
    assert held.state == GRANTED
    steps = flow(call_of(lm))
    wait = next(steps)
    assert isinstance(wait, Wait)
    assert wait.until == pytest.approx(clock.monotonic() + 10), "the wait ends with the day, not with max_wait"

    clock.advance(10)

    attempt = steps.send(None)
    assert not isinstance(attempt, Wait)
    assert store.holds() == 2
    steps.close()


def test_a_refusal_for_money_of_yesterday_is_asked_again_today() -> None:
    """Given a caller in line at midnight whose day's money was then spent, when refused, then today's is asked for."""
    clock = FakeClock(start=1_800_000_000.0 - 1_800_000_000.0 % 86_400 + 86_390.0)
    store = MemoryStore(clock=clock)
    lm = over(ScriptedEngine("ok"), store=store, clock=clock, budget=Budget(usd=0.01, per="day", name="day"))
    held = store.admit(_reservation_of(plan(call_of(lm), lm.pipeline.primary, 1)))
    steps = flow(call_of(lm))
    assert isinstance(next(steps), Wait)

    clock.advance(11)
    store.settle(held, Settlement(held.id, CENT, 0, True, False, None))

    assert not isinstance(steps.send(None), Wait)
    steps.close()


def _reservation_of(planned: Attempt) -> Reservation:
    assert planned.reservation is not None
    return planned.reservation


# -- tokens, leases, defaults ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("provider", "tokens"), [("anthropic", 10 + 5 + 100 + 20), ("gemini", 10 + 5 + 7), ("openai", 10 + 5)]
)
def test_a_rate_limit_counts_every_token_once(provider: str, tokens: int) -> None:
    """Given counters that are disjoint at some providers, when counted, then nothing is left out or counted twice."""
    rates = PriceBook({"m": Price(input=1, output=1)}).rates("m", provider)
    assert rates is not None
    usage = Usage(
        input_tokens=10, output_tokens=5, cache_read_tokens=100, cache_write_tokens=20, reasoning_tokens=7
    )  # fmt: skip
    assert rates.tokens(usage) == tokens
    assert rates.tokens(replace(usage, input_tokens=None)) is None


def test_the_hold_of_a_stream_lasts_as_long_as_the_stream_may() -> None:
    """Given a timeout, which a stream may outlast, when it is planned, then its lease is that of the deadline."""
    lm = over(ScriptedEngine("ok"), timeout=5, limit=RateLimit(concurrency=1, max_wait=1))
    with call_context(deadline=300):
        assert _reservation_of(plan(call_of(lm, True), lm.pipeline.primary, 1)).lease >= 300
        assert _reservation_of(plan(call_of(lm, False), lm.pipeline.primary, 1)).lease < 60
    assert _reservation_of(plan(call_of(lm, True), lm.pipeline.primary, 1)).lease >= 3600


def test_a_temperature_of_zero_is_kept_on_a_fallback() -> None:
    """Given a call at temperature 0, when a fallback with a default of its own answers, then 0 stays."""
    engine = ScriptedEngine("spare")
    warm = dspy.LM(SPARE, engine=engine, temperature=1.0, max_tokens=50)
    over(ScriptedEngine(down()), fallbacks=[warm], temperature=0.0)("q")
    assert engine.requests[0].config.temperature == 0.0


# -- prices nobody knows ---------------------------------------------------------------------------------------------
def test_an_unknown_price_is_told_once_a_model(caplog: pytest.LogCaptureFixture) -> None:
    """Given a model without a price and no budget, when it is called twice, then one event and one line say so."""
    model = f"openai/unpriced-{next(_ids)}-of-this-test"
    told: list[dict[str, Any]] = []
    remove = dspy_prod.add_listener(lambda event: told.append({"name": event.name, **event.data}))
    try:
        with caplog.at_level("WARNING", logger="dspy_prod"):
            lm = dspy_prod.LM(model, engine=ScriptedEngine("ok"), store=MemoryStore(), cache=False)
            lm("a")
            lm.copy(num_retries=1)("b")
    finally:
        remove()
    assert [event["model"] for event in told if event["name"] == "unpriced_model"] == [model]
    assert [record.getMessage() for record in caplog.records if model in record.getMessage()] != []
    assert sum(model in record.getMessage() for record in caplog.records) == 1


def test_a_budget_that_one_answer_at_the_models_limit_nearly_fills_is_warned_of() -> None:
    """Given no `max_tokens`, when one answer at the model's own limit takes much of a budget, then it is told."""
    prices = {MODEL: Price(input=0.0, output=100.0, max_output_tokens=1000)}
    with pytest.warns(UserWarning, match="own limit of 1000 output tokens"):
        dspy_prod.LM(MODEL, api_key="x", store=MemoryStore(), prices=prices, budget=Budget(usd=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dspy_prod.LM(MODEL, api_key="x", store=MemoryStore(), prices=prices, budget=Budget(usd=10))


class _Disk:
    """A backing with one limiter, which another process wrote."""

    owner = "disk"

    def __init__(self, limiter: bytes, limit: RateLimit) -> None:
        self._stored = limiter, limit

    def load_account(self, key: str) -> None:
        return None

    def load_terms(self, title: str) -> None:
        return None

    def load_limiter(self, key: str) -> tuple[bytes, RateLimit]:
        return self._stored

    def load_abandoned(self, id: str) -> None:
        return None


def test_what_all_processes_sent_counts_after_a_route_without_a_limit_was_first() -> None:
    """Given a shared minute that is full, when a route without a limit asks first, then one with it still waits."""
    limit = RateLimit(rpm=1)
    elsewhere = LimiterState(limit, 100.0)
    elsewhere.take(100.0, 0)
    core = AdmissionCore(_Disk(elsewhere.dump(), limit))
    assert core.changes is not None
    core.admit(ask(limit=RateLimit()), 101.0)
    core.admit(ask(limit=limit), 101.0)
    assert [state for _, state, _ in core.changes.verdicts] == [GRANTED]


def test_a_price_that_could_not_be_read_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given metadata that fails a while, when it is read again, then calls are priced and admitted again.

    The budget refused every call for the life of the process.
    """
    whole, broken = model_metadata.model_info, [True]

    def model_info(*args: Any, **kwargs: Any) -> Any:
        if broken:
            raise OSError("too many open files")
        return whole(*args, **kwargs)

    monkeypatch.setattr(model_metadata, "model_info", model_info)
    clock = FakeClock()
    lm = dspy_prod.LM(
        "openai/gpt-4o-mini", engine=ScriptedEngine("ok"), store=MemoryStore(clock=clock), clock=clock,
        budget=Budget(usd=1), max_tokens=100,
    )  # fmt: skip
    assert isinstance(caught(lambda: lm("q")), UnpricedModelError)
    broken.clear()
    clock.advance(1)

    assert lm("q") == ["ok"]
    assert lm.costs().today_usd > 0


# -- when it may be asked again ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("per", "usd", "after", "never"),
    [("day", 0.015, 10.0, False), ("total", 0.015, None, False), ("day", 0.005, None, True)],
)
def test_a_refusal_for_money_tells_when_the_next_window_begins(
    per: Any, usd: float, after: float | None, never: bool
) -> None:
    """A service passes it on as Retry-After; of a call that no window would hold it would be a lie."""
    clock = FakeClock(start=1_800_000_000.0 - 1_800_000_000.0 % 86_400 + 86_390.0)
    store = MemoryStore(clock=clock)
    lm = over(ScriptedEngine("ok"), store=store, clock=clock, budget=Budget(usd=usd, per=per, name="own"))
    if not never:
        held = store.admit(_reservation_of(plan(call_of(lm), lm.pipeline.primary, 1)))
        store.settle(held, Settlement(held.id, CENT, 0, True, False, None))
    with pytest.raises(BudgetExceededError) as caught:
        next(flow(call_of(lm)))
    assert (caught.value.retry_after, caught.value.never) == (after, never)


def test_a_refusal_by_a_store_tells_when_it_is_looked_at_again() -> None:
    """The store knew, and the error did not say."""
    lm = over(ScriptedEngine("ok"), budget=Budget(usd=1, per="day", name="own"))
    attempt = plan(call_of(lm), lm.pipeline.primary, 1)
    error = refused(attempt, Refusal("store_unavailable", 0.8, detail="the disk is full"))
    assert (error.reason, error.retry_after) == ("store_unavailable", 0.8)


def test_a_call_that_does_not_say_what_a_budget_requires_is_told_what() -> None:
    """Nothing was spent, so a service must not answer that the budget is used up."""
    lm = over(ScriptedEngine("ok"), budget=Budget(usd=1, per="day", name="own", scope="tenant", require=True))
    with pytest.raises(BudgetExceededError) as caught:
        next(flow(call_of(lm)))
    assert (caught.value.missing, caught.value.never) == ("tenant", False)


def test_a_call_that_no_minute_would_hold_says_so() -> None:
    """Without a Retry-After, "too many requests at the moment" has clients try for ever."""
    lm = over(ScriptedEngine("ok"), limit=RateLimit(tpm=5), max_tokens=10)
    with pytest.raises(RateLimitedError) as caught:
        next(flow(call_of(lm)))
    assert (caught.value.never, caught.value.retry_after) == (True, None)
