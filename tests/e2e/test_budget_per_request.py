"""An LM built for each request, as web services do: what the one before it spent, sent and learned is still known."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import dspy_prod
from dspy_prod import Budget, BudgetExceededError, RateLimit, RateLimitedError
from dspy_prod.testing import Provider
from tests.e2e.support import MODEL, fresh_memory, make_lm, outcome

pytestmark = pytest.mark.filterwarnings("ignore:.*more than 5 %")


def request_after_request(provider: Provider, count: int, **options: Any) -> list[Any]:
    """The outcomes of calls through LMs that live for one call each."""
    store, found = fresh_memory(), []
    for number in range(count):
        lm = make_lm(provider.url, store=store, prices={MODEL: (0.0, 100.0)}, **options)
        found.append(outcome(lambda lm=lm, number=number: lm(f"question {number}")))  # type: ignore[misc]
        del lm
        gc.collect()
    return found


def test_the_budget_is_one_budget() -> None:
    with Provider(answer=lambda call: "word " * 100) as provider:
        found = request_after_request(provider, 3, budget=Budget(usd=0.021))
        assert [isinstance(each, BudgetExceededError) for each in found] == [False, False, True]


def test_the_limit_is_one_limit() -> None:
    with Provider() as provider:
        found = request_after_request(provider, 3, limit=RateLimit(rpm=2, burst=2, max_wait=0))
        assert [isinstance(each, RateLimitedError) for each in found] == [False, False, True]


def test_the_cache_is_one_cache() -> None:
    with Provider() as provider:
        store = fresh_memory()
        for _ in range(3):
            make_lm(provider.url, store=store, cache=True)("the same question")
            gc.collect()
        assert len(provider.calls) == 1


def test_what_was_said_live_holds_for_the_next_request() -> None:
    with Provider() as provider:
        store = fresh_memory()
        lm = make_lm(provider.url, store=store, budget=Budget(usd=1, name="b"))
        lm.set_budget(Budget(usd=0.00001, name="b"))
        del lm
        gc.collect()
        with pytest.warns(UserWarning, match="keeps the settings that are in force"):
            lm = make_lm(provider.url, store=store, budget=Budget(usd=1, name="b"))
        assert isinstance(outcome(lambda: lm("q")), BudgetExceededError)


@pytest.mark.parametrize("crowd", [1, 5])
def test_calls_that_do_not_wait_say_nothing_of_waiting(crowd: int, tmp_path: Any) -> None:
    """Every call under a budget on SQLite told `waiting`, though its admission took a millisecond."""
    heard: list[Any] = []
    remove = dspy_prod.add_listener(lambda event: heard.append(event) if event.name == "waiting" else None)
    try:
        with Provider() as provider:
            lm = make_lm(provider.url, store=f"sqlite:///{tmp_path}/state.db", budget=Budget(usd=1))
            for number in range(crowd):
                lm(f"question {number}")
            assert heard == []
            paced = lm.copy(limit=RateLimit(rpm=60, burst=1))
            for number in range(2):
                paced(f"another question {number}")
            assert [event.data["blocked_on"] for event in heard] == ["pacing"]
    finally:
        remove()
