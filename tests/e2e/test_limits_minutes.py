"""Rate limits by the provider's own timestamps over three real minutes. `test_limits.py` is the short form.

The figures are printed: run with `-m slow -rP` to see them.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from dspy_prod import RateLimit, RateLimitedError
from dspy_prod.testing import Call, Provider
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import assert_equals_bill, assert_nothing_held, join

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MINUTES = 3
WINDOWS = 60.0 * MINUTES


def keep_busy(lm: Any, callers: int, seconds: float) -> tuple[int, list[BaseException]]:
    """Calls in a row by so many threads for so long; (answers, errors)."""
    end = time.monotonic() + seconds
    answers: list[Any] = []
    errors: list[BaseException] = []

    def caller(number: int) -> None:
        draw = random.Random(number)
        while (left := end - time.monotonic()) > 0:
            try:
                answers.append(lm(f"caller {number}, {draw.random()}"))
            except RateLimitedError as error:
                if error.retry_after is None or error.retry_after < left:
                    errors.append(error)
                return
            except Exception as error:
                errors.append(error)

    join([threading.Thread(target=caller, args=(number,), daemon=True) for number in range(callers)], seconds + 120)
    return len(answers), errors


def in_the_windows(provider: Provider) -> list[Call]:
    """The calls of the first three minutes; those that waited when the callers stopped came later."""
    calls = provider.calls
    return [call for call in calls if call.received_at < calls[0].received_at + WINDOWS]


def test_sixty_a_minute_for_three_minutes(serve: MakeProvider, connect: MakeLM, sqlite_url: str) -> None:
    """32 callers are never refused, no minute holds more than sixty requests, and each is used to 95 %."""
    provider = serve(rpm=60, latency=(0.0, 5.0))
    lm = connect(provider, limit=RateLimit(rpm=60, max_wait=120.0), store=sqlite_url)
    answered, errors = keep_busy(lm, 32, WINDOWS)
    assert errors == []
    assert [call for call in provider.calls if call.status == 429] == []
    sent = len(in_the_windows(provider))
    print(f"{sent} requests in {MINUTES} minutes, {provider.requests_in_window(60.0)} in the busiest")
    assert provider.requests_in_window(60.0) <= 60
    assert sent >= 0.95 * 60 * MINUTES
    assert answered == len(provider.calls)
    assert_equals_bill(lm, provider)
    assert_nothing_held(lm.pipeline.store)


def test_idle_then_burst_over_a_minute(serve: MakeProvider, connect: MakeLM, sqlite_url: str) -> None:
    """A minute's requests sent at once after an idle time leave none for the minute that follows."""
    provider = serve(rpm=60, latency=lambda call: 15.0 if call.index == 0 else 0.1)
    lm = connect(provider, limit=RateLimit(rpm=60, burst=60, max_wait=120.0), store=sqlite_url)
    lm("a call that takes a quarter of a minute, in which nothing else is sent")
    answered, errors = keep_busy(lm, 32, 130.0)
    assert errors == []
    assert [call for call in provider.calls if call.status == 429] == []
    print(f"{answered} answers in 130 s, {provider.requests_in_window(60.0)} requests in the busiest minute")
    assert provider.requests_in_window(60.0) <= 60
    assert answered >= 150


def test_tokens_for_three_minutes_with_estimates_four_times_too_high(
    serve: MakeProvider, connect: MakeLM, sqlite_url: str
) -> None:
    """No minute holds more than 100,000 tokens of 2,000 a call, and the utilisation is what such estimates allow."""
    provider = serve(tpm=100_000, usage=(500, 1500), latency=(0.0, 5.0))
    lm = connect(provider, limit=RateLimit(tpm=100_000, max_wait=120.0), max_tokens=7800, store=sqlite_url)
    answered, errors = keep_busy(lm, 32, WINDOWS)
    assert errors == []
    assert [call for call in provider.calls if call.status == 429] == []
    used = sum(call.weight("billed") for call in in_the_windows(provider))
    print(f"{used} tokens in {MINUTES} minutes, {provider.tokens_in_window(60.0)} in the busiest")
    assert provider.tokens_in_window(60.0) <= 100_000
    # Utilisation as the guide on limits says it, which leaves out two things: of the call being sent, too, more is
    # reserved than it will use, and the guard makes each minute 61 s long.
    too_much, seconds = 3 * 2000, 2.5
    possible = (1 - too_much / 100_000) / (1 + 3 * seconds / 60) * 60 / 61
    assert used >= 0.95 * possible * 100_000 * MINUTES
    assert answered == len(provider.calls)
    assert_equals_bill(lm, provider)
    assert_nothing_held(lm.pipeline.store)
