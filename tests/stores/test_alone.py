"""What one process decides while its store cannot: its part of a limit, and of what was left of a budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dspy_prod.options import RateLimit
from dspy_prod.stores.base import GRANTED, PENDING, REFUSED, Refusal
from dspy_prod.stores.durable.alone import Alone, Outage, part_of
from tests.stores.support import CENT, DOLLAR, FakeClock, ask, settlement


@pytest.fixture
def alone(clock: FakeClock) -> Iterator[Alone]:
    made = Alone(clock.time)
    yield made
    made.close(Refusal("store_unavailable"))


def test_a_part_is_the_limit_among_the_workers_and_at_least_one_request() -> None:
    limit = RateLimit(rpm=100, tpm=1_000, concurrency=3, burst=8)
    assert part_of(limit, 4) == RateLimit(rpm=25, tpm=250, concurrency=1, burst=2)
    assert part_of(limit, 1_000) == RateLimit(rpm=1, tpm=1, concurrency=1, burst=1)
    assert part_of(RateLimit(concurrency=9), 2) == RateLimit(concurrency=4)


def test_a_tenth_of_what_was_left_may_be_spent_by_few_and_less_by_many(alone: Alone) -> None:
    """Of 80 cents, 8 by one or five processes, 4 by each of ten."""
    for workers, part in ((1, 8), (5, 8), (10, 4)):
        outage = Outage(workers, {"day": 20 * CENT}, {})
        for _ in range(part):
            each = alone.admit(ask(CENT), outage, workers)
            assert each.state == GRANTED
            each.share.settle(settlement(each, CENT))  # type: ignore[attr-defined]
        last = alone.admit(ask(CENT), outage, workers)
        assert last.state == REFUSED
        assert last.refusal is not None
        assert last.refusal.reason == "budget_exceeded"


def test_the_terms_of_a_budget_win_over_what_a_call_says(alone: Alone) -> None:
    account = ask().accounts[0]
    assert Outage(1, {"day": 0}, {"b": CENT}).left(account._replace(budget="b")) == CENT
    assert Outage(1, {"day": 0}, {"b": 2 * DOLLAR}).left(account._replace(budget="b")) == DOLLAR


def test_a_budget_that_was_not_seen_is_not_spent(alone: Alone) -> None:
    for outage in (None, Outage(1, {}, {})):
        each = alone.admit(ask(CENT), outage, 1)
        assert each.state == REFUSED
        assert each.refusal is not None
        assert each.refusal.reason == "store_unavailable"


def test_who_waits_for_its_part_is_served_when_it_is_free(alone: Alone) -> None:
    """In line as ever: woken by whoever ends; withdrawn, it holds nothing."""
    limit = RateLimit(concurrency=2)
    first = alone.admit(ask(budget=None, limit=limit), None, 2)
    second, third = (alone.admit(ask(budget=None, limit=limit), None, 2) for _ in range(2))
    assert (first.state, second.state, third.state) == (GRANTED, PENDING, PENDING)
    assert second.blocked_on == "concurrency"
    woken: list[int] = []
    third.attach(lambda: woken.append(third.state))
    assert second.share.withdraw(second)  # type: ignore[attr-defined]
    first.share.settle(settlement(first, 0))  # type: ignore[attr-defined]
    assert woken == [GRANTED]
    third.share.settle(settlement(third, 0))  # type: ignore[attr-defined]
    assert alone.lane.holds() == alone.lane.waiting() == 0


def test_a_call_larger_than_the_part_of_a_minute_has_all_of_it(alone: Alone, clock: FakeClock) -> None:
    limit = RateLimit(tpm=100)
    assert alone.admit(ask(budget=None, limit=limit, tokens=80), None, 4).state == GRANTED
    later = alone.admit(ask(budget=None, limit=limit, tokens=80), None, 4)
    assert later.state == PENDING
    clock.advance(62)
    alone.lane.tick()
    assert later.state == GRANTED


def test_a_429_pauses_those_who_are_admitted_here(alone: Alone, clock: FakeClock) -> None:
    limit = RateLimit(rpm=600)
    assert alone.admit(ask(budget=None, limit=limit), None, 1).state == GRANTED
    clock.advance(1)
    alone.throttled("provider", 30.0)
    waiting = alone.admit(ask(budget=None, limit=limit), None, 1)
    assert waiting.blocked_on == "paused"
    clock.advance(31)
    alone.lane.tick()
    assert waiting.state == GRANTED
