"""When a failed attempt is followed by another, after which pause, and what keeps retries from storming."""

from __future__ import annotations

import math
import random
import sys
import threading
from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from dspy_prod.options import Retry
from dspy_prod.policies.retry import Attempts, RetryBudget

NO_DEADLINE = math.inf


def given(draw: float = 1.0, budget: RetryBudget | None = None, **options: Any) -> Attempts:
    """A call's attempts on one route, whose random source always says `draw`."""
    settings = Retry(**options)
    return Attempts(settings, budget or RetryBudget(settings), random=lambda: draw)


def drained(options: Retry) -> RetryBudget:
    """A budget that allows no retry any more."""
    budget = RetryBudget(options)
    while budget.allow():
        pass
    return budget


# -- attempts ----------------------------------------------------------------------------------------------------------


def test_a_transient_error_is_retried_until_the_attempts_are_used_up() -> None:
    attempts = given(attempts=3, backoff=0.5)

    assert attempts.number == 1
    assert attempts.again(True, None, NO_DEADLINE) == 0.5
    assert (attempts.number, attempts.why_not) == (2, None)
    assert attempts.again(True, None, NO_DEADLINE) == 1.0
    assert (attempts.number, attempts.why_not) == (3, None)
    assert attempts.again(True, None, NO_DEADLINE) is None
    assert (attempts.number, attempts.why_not) == (3, "attempts")


def test_one_attempt_means_no_retry() -> None:
    attempts = given(attempts=1)

    assert attempts.again(True, None, NO_DEADLINE) is None
    assert attempts.why_not == "attempts"


@pytest.mark.parametrize("attempts", [1, 5])
def test_an_error_that_is_not_retryable_ends_it_whatever_else_would(attempts: int) -> None:
    calls = given(attempts=attempts)

    assert calls.again(False, 1.0, 0.0) is None
    assert (calls.number, calls.why_not) == (1, "not_retryable")


# -- backoff -----------------------------------------------------------------------------------------------------------


def test_the_longest_pause_doubles_up_to_max_backoff() -> None:
    attempts = given(draw=1.0, attempts=6, backoff=0.5, max_backoff=3.0)

    pauses = [attempts.again(True, None, NO_DEADLINE) for _ in range(5)]

    assert pauses == [0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.parametrize("draw", [0.0, 0.25, 0.999])
def test_jitter_is_full_the_pause_is_a_share_of_the_longest(draw: float) -> None:
    attempts = given(draw=draw, backoff=0.5)

    assert attempts.again(True, None, NO_DEADLINE) == 0.5 * draw
    assert attempts.again(True, None, NO_DEADLINE) == 1.0 * draw


def test_by_default_pauses_are_spread_over_the_whole_range() -> None:
    options = Retry(backoff=8.0, max_backoff=8.0, budget=None)
    budget = RetryBudget(options)

    pauses = [Attempts(options, budget).again(True, None, NO_DEADLINE) or 0.0 for _ in range(400)]

    assert all(0 <= pause <= 8 for pause in pauses)
    assert min(pauses) < 0.5
    assert max(pauses) > 7.5
    assert 3 < sum(pauses) / 400 < 5


def test_thousands_of_attempts_do_not_overflow() -> None:
    attempts = given(attempts=3000, budget=RetryBudget(Retry(budget=None)))

    pauses = [attempts.again(True, None, NO_DEADLINE) for _ in range(2999)]

    assert pauses[-1] == 20.0


def test_a_first_backoff_above_max_backoff_is_cut_too() -> None:
    assert given(backoff=30.0, max_backoff=20.0).again(True, None, NO_DEADLINE) == 20.0


# -- Retry-After -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("retry_after", "pause"), [(0.0, 0.5), (0.01, 0.5), (3.0, 3.0), (900.0, 900.0)])
def test_retry_after_wins_over_a_backoff_that_is_shorter(retry_after: float, pause: float) -> None:
    """With `Retry-After: 0` or a date in the past three attempts were made within four milliseconds."""
    attempts = given(backoff=0.5, max_backoff=20)

    assert attempts.again(True, retry_after, NO_DEADLINE) == pause


@pytest.mark.parametrize("retry_after", [-1.0, math.nan])
def test_an_impossible_retry_after_is_none(retry_after: float) -> None:
    assert given(backoff=0.5).again(True, retry_after, NO_DEADLINE) == 0.5


def test_an_infinite_retry_after_fits_nowhere() -> None:
    attempts = given()

    assert attempts.again(True, math.inf, NO_DEADLINE) is None
    assert attempts.why_not == "deadline"


# -- deadline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("remaining", "pause"), [(0.6, 0.5), (0.5, None), (0.4, None), (0.0, None), (-1.0, None)])
def test_a_pause_that_leaves_no_time_for_the_attempt_ends_it(remaining: float, pause: float | None) -> None:
    attempts = given(draw=1.0, backoff=0.5)

    assert attempts.again(True, None, remaining) == pause
    assert attempts.why_not == (None if pause else "deadline")


def test_retry_after_beyond_the_deadline_ends_it_and_costs_no_token() -> None:
    budget = RetryBudget(Retry())
    attempts = given(budget=budget)

    assert attempts.again(True, 30.0, 8.0) is None

    assert attempts.why_not == "deadline"
    assert budget.tokens == 100


def test_a_call_whose_deadline_passed_is_not_retried_even_without_a_pause() -> None:
    assert given(draw=0.0).again(True, None, 0.0) is None


# -- retry budget ------------------------------------------------------------------------------------------------------


def test_a_full_budget_pays_for_retries_until_half_is_left() -> None:
    budget = RetryBudget(Retry(budget=10))

    assert [budget.allow() for _ in range(7)] == [True] * 5 + [False] * 2
    assert budget.tokens == 5


def test_successes_refill_it_up_to_its_capacity() -> None:
    budget = drained(Retry(budget=10, budget_refill=0.4))

    for _ in range(2):
        budget.success()
    assert budget.tokens == pytest.approx(5.8)
    assert budget.allow()
    assert not budget.allow()
    for _ in range(100):
        budget.success()

    assert budget.tokens == 10


def test_the_smallest_budget_pays_for_one_retry() -> None:
    budget = RetryBudget(Retry(budget=0.5, budget_refill=0.5))

    assert [budget.allow(), budget.allow()] == [True, False]
    assert budget.tokens == 0
    budget.success()
    assert budget.allow()


def test_no_budget_allows_every_retry() -> None:
    budget = RetryBudget(Retry(budget=None))

    assert all(budget.allow() for _ in range(1000))
    budget.success()
    assert budget.tokens is None


def test_an_empty_budget_ends_it() -> None:
    attempts = given(budget=drained(Retry()))

    assert attempts.again(True, None, NO_DEADLINE) is None
    assert (attempts.number, attempts.why_not) == (1, "retry_budget")


def test_calls_of_one_route_share_its_budget_and_only_granted_retries_cost() -> None:
    budget = RetryBudget(Retry(budget=4))
    first, second, third = (given(attempts=2, budget=budget) for _ in range(3))

    assert first.again(True, None, NO_DEADLINE) is not None
    assert first.again(True, None, NO_DEADLINE) is None
    assert second.again(False, None, NO_DEADLINE) is None
    assert budget.tokens == 3
    assert second.again(True, None, NO_DEADLINE) is not None
    assert third.again(True, None, NO_DEADLINE) is None
    assert (first.why_not, second.why_not, third.why_not) == ("attempts", None, "retry_budget")


def test_an_outage_is_not_multiplied() -> None:
    """1,000 calls of three attempts each, all failing: 50 retries, not 2,000."""
    options = Retry(attempts=3, budget=100)
    budget, retries = RetryBudget(options), 0

    for _ in range(1000):
        attempts = given(budget=budget)
        while attempts.again(True, None, NO_DEADLINE) is not None:
            retries += 1

    assert retries == 50


def test_why_not_is_forgotten_when_there_is_another_attempt() -> None:
    attempts = given()

    assert attempts.again(True, None, 0.0) is None
    assert attempts.again(True, None, NO_DEADLINE) is not None
    assert attempts.why_not is None


@for_all(
    capacity=st.integers(1, 12),
    refill=st.sampled_from([0.25, 0.5, 1.0, 3.0]),
    steps=st.lists(st.booleans(), max_size=60),
)
def test_a_budget_never_leaves_its_bounds_and_follows_a_plain_count(
    capacity: int, refill: float, steps: list[bool]
) -> None:
    budget, tokens = RetryBudget(Retry(budget=capacity, budget_refill=refill)), float(capacity)

    for retry in steps:
        if retry:
            allowed = budget.allow()
            assert allowed == (2 * tokens > capacity)
            tokens -= 1 if allowed else 0
            tokens = 0.0 if tokens < 0 else tokens
        else:
            budget.success()
            tokens = capacity if tokens + refill > capacity else tokens + refill
        assert budget.tokens == tokens


@for_all(
    retry_after=st.none() | st.floats(allow_nan=True),
    remaining=st.floats(allow_nan=True),
    number=st.integers(1, 50),
    seed=st.integers(0, 2**32),
)
def test_every_pause_is_finite_not_negative_and_shorter_than_what_remains(
    retry_after: float | None, remaining: float, number: int, seed: int
) -> None:
    options = Retry(attempts=60)
    attempts = Attempts(options, RetryBudget(options), random=random.Random(seed).random)
    attempts.number = number

    pause = attempts.again(True, retry_after, remaining)

    if pause is None:
        assert attempts.why_not == "deadline"
        assert attempts.number == number
    else:
        assert 0 <= pause < remaining
        assert math.isfinite(pause)
        assert attempts.number == number + 1


# -- threads and fork --------------------------------------------------------------------------------------------------


class WatchedLock:
    """Counts how often it is taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *_: object) -> None:
        pass


def test_a_budget_changes_under_its_lock() -> None:
    """Without one, threads would lose tokens; under a GIL too seldom for the test below to notice every time."""
    budget, lock = RetryBudget(Retry()), WatchedLock()
    watched: Any = lock
    budget._lock = watched

    budget.allow()
    assert lock.taken == 1
    budget.success()
    assert lock.taken == 2


def test_threads_that_share_a_budget_get_exactly_its_retries() -> None:
    threads, budget = 8, RetryBudget(Retry(budget=2000))
    start, granted = threading.Barrier(threads), []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)

    def worker() -> None:
        start.wait(30)
        granted.append(sum(budget.allow() for _ in range(500)))

    workers = [threading.Thread(target=worker, daemon=True) for _ in range(threads)]
    try:
        for thread in workers:
            thread.start()
        for thread in workers:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)

    assert sum(granted) == 1000
    assert budget.tokens == 1000


def test_after_a_fork_the_budgets_lock_is_free() -> None:
    """A fork copies a lock that another thread holds, but not the thread that would release it."""
    budget = RetryBudget(Retry(budget=10))
    held, free = threading.Event(), threading.Event()

    def holder(lock: Any) -> None:
        with lock:
            held.set()
            free.wait(30)

    other = threading.Thread(target=holder, args=(budget._lock,), daemon=True)
    other.start()
    held.wait(30)
    budget._after_fork()

    child = threading.Thread(target=budget.allow, daemon=True)
    child.start()
    child.join(5)
    alive = child.is_alive()
    free.set()
    other.join(30)

    assert not alive
    assert budget.tokens == 9


# -- patience ----------------------------------------------------------------------------------------------------------


def test_patience_is_what_waiting_has_left_of_it() -> None:
    attempts = given(patience=2.0)
    assert attempts.patience == 2.0
    attempts.waited += 1.5
    assert attempts.patience == 0.5
    attempts.waited += 1.5
    assert attempts.patience == 0.0


def test_a_pause_longer_than_patience_is_told_and_costs_no_token() -> None:
    """The flow asks another route first, and comes back when the pause is over."""
    attempts = given(budget=(budget := RetryBudget(Retry())), backoff=0.5)
    full = budget.tokens
    assert attempts.again(True, 30.0, NO_DEADLINE, 2.0) is None
    assert (attempts.why_not, attempts.pause, attempts.number) == ("patience", 30.0, 1)
    assert budget.tokens == full
    assert attempts.again(True, 2.0, NO_DEADLINE, 2.0) == 2.0


@pytest.mark.parametrize(("least", "pause"), [(0.7, 0.7), (0.0, 0.0), (-3.0, 0.0)])
def test_a_pause_that_was_put_off_is_made_up_instead_of_a_new_one(least: float, pause: float) -> None:
    """A route that was left early has its turn when its pause is over, or at once if that is past."""
    attempts = given(backoff=8.0)
    assert attempts.again(True, 60.0, NO_DEADLINE, least=least) == pause
    assert (attempts.pause, attempts.number, attempts.why_not) == (pause, 2, None)


def test_a_call_sets_out_without_waits_and_without_reasons() -> None:
    attempts = given()
    assert (attempts.number, attempts.why_not, attempts.pause, attempts.waited, attempts.due) == (1, None, 0, 0, None)
