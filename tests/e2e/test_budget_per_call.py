"""`Budget(per="call")`: what one call may cost, with all its attempts, against a provider that bills."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from dspy.utils.exceptions import LMServerError, LMTimeoutError

import dspy_prod
from dspy_prod import Budget, BudgetExceededError, Retry
from dspy_prod.compat.dspy import engines_of
from dspy_prod.testing import Provider
from tests.e2e.support import CENT, CHEAP, MODEL, make_lm, outcome, records, request, until, upstream

A_CENT = {MODEL: (0.0, 100.0), CHEAP: (0.0, 10.0)}
"""A call of `max_tokens=100` may cost a cent, or a tenth of it with the cheap model."""


def capped(provider: Provider, cents: float, **options: Any) -> Any:
    return make_lm(provider.url, prices=A_CENT, budget=Budget(usd=cents / 100, per="call"), **options)


@pytest.mark.filterwarnings("ignore:.*every call is refused")
def test_a_call_that_could_cost_more_is_not_sent() -> None:
    """Synchronous, asynchronous and streaming; the refusal does the sum."""
    with Provider() as provider:
        lm = capped(provider, 0.99)

        engine, _ = engines_of(lm)
        for call in (lambda: lm("q"), lambda: asyncio.run(lm.acall("q")), lambda: list(engine.stream(request()))):
            error = outcome(call)
            assert isinstance(error, BudgetExceededError)
            assert (error.budget, error.limit_usd, error.bound_usd) == ("call", 0.0099, 0.01)
            assert "lower max_tokens" in str(error)
        assert not provider.calls
        assert lm.preview("q").affordable is False
        assert lm("q", max_tokens=50)


def test_calls_within_the_cap_go_on_for_ever() -> None:
    """It is no window: what one call spent is not the next one's loss."""
    with Provider() as provider:
        lm = capped(provider, 1)
        for number in range(5):
            lm(f"question {number}")
        assert len(provider.calls) == 5
        assert lm.health().costs.budgets == []


def test_all_answers_of_a_call_are_bounded_before_the_first_is_sent() -> None:
    """`n=3` sends three requests: two affordable ones and a refusal would be money for nothing."""
    with Provider() as provider:
        lm = capped(provider, 2.5)
        assert isinstance(outcome(lambda: lm("q", n=3)), BudgetExceededError)
        assert not provider.calls
        assert len(lm("q", n=2)) == 2


def test_retries_end_when_the_rest_does_not_suffice() -> None:
    """A 504 may have been billed: after two of them a cap of two and a half calls has no room for a third."""
    with Provider() as provider:
        provider.down(504)
        lm = capped(provider, 2.5, retry=Retry(attempts=5, backoff=0.001))
        assert isinstance(outcome(lambda: lm("q")), (LMServerError, LMTimeoutError))
        assert len(provider.calls) == 2
        assert sum(record.cost_nano or 0 for record in upstream(lm)) == 2 * CENT


def test_failures_that_cost_nothing_are_retried_as_before() -> None:
    with Provider() as provider:
        provider.down(500)
        lm = capped(provider, 1, retry=Retry(attempts=3, backoff=0.001))
        assert isinstance(outcome(lambda: lm("q")), LMServerError)
        assert len(provider.calls) == 3


@pytest.mark.filterwarnings("ignore:.*every call is refused")
def test_a_cheaper_fallback_may_fit_where_the_primary_does_not() -> None:
    """And pays from the same purse."""
    with Provider() as provider:
        lm = capped(provider, 0.5, fallbacks=[CHEAP])
        lm("q")
        assert [record.model for record in records(lm)] == [CHEAP]


def test_a_fallback_shares_the_purse_with_what_failed_before_it() -> None:
    with Provider() as provider:
        provider.down(504)
        lm = capped(provider, 1.05, fallbacks=[CHEAP])
        assert isinstance(outcome(lambda: lm("q")), (LMServerError, LMTimeoutError))
        assert [record.model for record in upstream(lm)] == [MODEL]


def test_an_attempt_that_was_left_counts_until_it_has_ended() -> None:
    """Its provider may still bill it: the retry after a time-out must not spend the same cent."""
    with Provider() as provider:
        provider.hold()
        lm = capped(provider, 1.5, timeout=0.2, retry=Retry(attempts=3, backoff=0.001))
        assert isinstance(outcome(lambda: lm("q")), LMTimeoutError)
        provider.release()
        until(lambda: len(upstream(lm)) == 1)
        assert len(provider.calls) == 1


@pytest.mark.filterwarnings("ignore:.*more than 5 %")
def test_a_cap_stands_beside_other_budgets_and_can_be_steered() -> None:
    with Provider() as provider:
        lm = capped(provider, 1)
        lm = lm.copy(budget=[Budget(usd=0.02, per="day"), Budget(usd=0.01, per="call")])
        lm("one")
        lm.set_budget(Budget(usd=0.005, per="call"))
        error = outcome(lambda: lm("two"))
        assert isinstance(error, BudgetExceededError)
        assert error.budget == "call"
        lm.set_budget(Budget(usd=0.05, per="call"))
        lm("two")


def test_an_unpriced_model_is_refused_under_a_cap() -> None:
    with Provider() as provider:
        lm = make_lm(provider.url, prices={}, budget=Budget(usd=1, per="call"))
        assert isinstance(outcome(lambda: lm("q")), dspy_prod.UnpricedModelError)


def test_a_cached_answer_needs_no_purse() -> None:
    with Provider() as provider:
        lm = capped(provider, 1, cache=True)
        lm("q")
        lm.set_budget(Budget(usd=0.001, per="call"))
        assert lm("q")


@pytest.mark.parametrize("option", [{"scope": "user"}, {"soft": 0.5}, {"max_wait": 3}, {"shrink_last": True}])
def test_what_has_no_meaning_for_one_call_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        Budget(usd=1, per="call", **option)
