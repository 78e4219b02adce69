"""A dollar, a cent a call, and more callers than cents: the provider's bill says whether the budget held."""

from __future__ import annotations

from typing import Any

import pytest

from dspy_prod import Budget, BudgetExceededError
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import (
    CENT,
    MODEL,
    Crowd,
    account,
    answers,
    assert_equals_bill,
    assert_nothing_held,
    charged,
    errors,
    records,
    together,
)

DOLLAR = Budget(usd=1.0)
A_CENT = {MODEL: (0.0, 100.0)}
"""Prices at which 100 output tokens cost exactly one cent and the input nothing: bound and cost are equal."""
ALMOST_A_CENT = {MODEL: (0.15, 99.9)}
"""Prices at which the input counts too, so that the bound is just above the cost."""


def assert_refused_for_spent_money_only(outcomes: list[Any]) -> None:
    """No caller was refused while money was only held by others: spent + own bound is above the limit."""
    for refusal in errors(outcomes, BudgetExceededError):
        assert refusal.spent_usd + refusal.bound_usd > refusal.limit_usd
        assert refusal.spent_usd <= refusal.limit_usd == 1.0
        assert refusal.budget == "total"


@pytest.mark.parametrize(
    ("crowd", "callers"),
    [("threads", 64), ("tasks", 64), ("threads", 1000), pytest.param("tasks", 1000, marks=pytest.mark.slow)],
)
def test_a_crowd_spends_a_dollar_and_not_a_cent_more(
    serve: MakeProvider, connect: MakeLM, store_url: str, crowd: Crowd, callers: int
) -> None:
    """64 callers who call twice, or 1,000 who call once, get exactly the hundred answers a dollar buys."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=(0.0, 0.1))
    lm = connect(provider, prices=A_CENT, max_tokens=100, budget=DOLLAR, store=store_url)
    outcomes = together(crowd, lm, callers, calls=2 if callers == 64 else 1)
    assert provider.bill.nano == 100 * CENT
    assert len(answers(outcomes)) == 100
    assert_refused_for_spent_money_only(outcomes)
    assert provider.max_in_flight > 10, "the callers were not concurrent"
    assert_equals_bill(lm, provider)
    assert_nothing_held(lm.pipeline.store)
    assert account(lm) == (100 * CENT, 0, 0)


@pytest.mark.parametrize("crowd", ["threads", "tasks"])
def test_a_bound_just_above_the_cost_leaves_less_than_one_bound_unspent(
    serve: MakeProvider, connect: MakeLM, store_url: str, crowd: Crowd
) -> None:
    """With input that is priced too, at least 99 cents of the dollar are used and the bill stays within it."""
    provider = serve(prices=ALMOST_A_CENT, usage=(40, 100), latency=(0.0, 0.05))
    lm = connect(provider, prices=ALMOST_A_CENT, max_tokens=100, budget=DOLLAR, store=store_url)
    outcomes = together(crowd, lm, 64, calls=2)
    assert 0.99 <= provider.bill.usd <= 1.0
    assert_refused_for_spent_money_only(outcomes)
    assert_equals_bill(lm, provider)


@pytest.mark.parametrize(("crowd", "callers"), [("threads", 64), ("tasks", 64), ("threads", 1000)])
def test_callers_wait_for_money_that_is_only_held(
    serve: MakeProvider, connect: MakeLM, store_url: str, crowd: Crowd, callers: int
) -> None:
    """With `max_tokens` ten times the real answer at most ten are in flight, and the others wait for what returns."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=(0.0, 0.03))
    with pytest.warns(UserWarning, match=r"more than 5 % .* Lower max_tokens"):
        lm = connect(provider, prices=A_CENT, max_tokens=1000, budget=DOLLAR, store=store_url)
    outcomes = together(crowd, lm, callers, calls=2 if callers == 64 else 1)
    assert 1.0 - 0.10 <= provider.bill.usd <= 1.0
    assert_refused_for_spent_money_only(outcomes)
    assert 5 <= provider.max_in_flight <= 10
    assert max(record.waited for record in records(lm)) > 0.0
    assert charged(lm) == provider.bill.nano
    assert_nothing_held(lm.pipeline.store)
