"""Whether and when to try again: attempts, exponential backoff with full jitter, Retry-After, and a retry budget.

Nothing here sleeps or reads a clock; the flow asks, waits and sends. See `options.Retry` for the settings.
"""

from __future__ import annotations

import math
import random as _random
import threading
from collections.abc import Callable
from typing import Literal

from dspy_prod.options import Retry
from dspy_prod.runtime.brief import briefly

__all__ = ["Attempts", "RetryBudget", "WhyNot"]

WhyNot = Literal["attempts", "not_retryable", "retry_budget", "deadline", "patience"]


class RetryBudget:
    """The retries a route can afford, shared by all its calls, so that an outage is not multiplied.

    A token bucket as in gRPC's retry throttling (gRFC A6), full at the start: a retry costs one token, a success
    returns `budget_refill` tokens, and there are no retries while half the tokens or fewer are left. With
    `Retry(budget=None)` it allows every retry.
    """

    __slots__ = ("_capacity", "_lock", "_refill", "_tokens")

    def __init__(self, options: Retry) -> None:
        self._capacity = options.budget
        self._refill = options.budget_refill
        self._tokens = 0.0 if options.budget is None else options.budget
        # Reentrant: the garbage collector may settle an abandoned call on a thread that is in here.
        self._lock = threading.RLock()

    @property
    def drawn(self) -> bool:
        """Whether a retry has taken something that successes have not yet returned."""
        return self._capacity is not None and self._tokens < self._capacity

    @property
    def tokens(self) -> float | None:
        """Tokens left; None without a budget."""
        return None if self._capacity is None else self._tokens

    def allow(self) -> bool:
        """Take one token for a retry; False, and nothing is taken, unless more than half of them are left."""
        if self._capacity is None:
            return True
        with briefly(self._lock):
            if self._tokens <= self._capacity / 2:
                return False
            self._tokens = max(0.0, self._tokens - 1)
            return True

    def success(self) -> None:
        """An attempt succeeded: return `budget_refill` tokens, up to the capacity."""
        if self._capacity is None or self._tokens >= self._capacity:  # what a retry takes just now, it takes after this
            return
        with briefly(self._lock):
            self._tokens = min(self._capacity, self._tokens + self._refill)

    def _after_fork(self) -> None:
        """In a forked child: a lock nobody holds."""
        self._lock = threading.RLock()


class Attempts:
    """The attempts of one call on one route; not shared between threads.

    Attributes:
        number: the current attempt, from 1.
        why_not: why the last `again` said None: `"not_retryable"`, `"attempts"` (all used), `"deadline"` (the pause
            does not fit), `"patience"` (it is longer than one cares to wait) or `"retry_budget"` (the route cannot
            afford it); None while there is another attempt.
        pause: seconds that the last `again` wanted to pause.
        waited: seconds the call has waited for this route so far; kept by the flow.
        due: when a route that was left early may be tried again; kept by the flow.
    """

    __slots__ = ("_budget", "_options", "_random", "due", "number", "pause", "waited", "why_not")

    def __init__(self, options: Retry, budget: RetryBudget, random: Callable[[], float] = _random.random) -> None:
        self._options = options
        self._budget = budget
        self._random = random
        self.number = 1
        self.why_not: WhyNot | None = None
        self.pause = 0.0
        self.waited = 0.0
        self.due: float | None = None

    @property
    def patience(self) -> float:
        """Seconds the call still waits for this route while another is left."""
        return max(0.0, self._options.patience - self.waited)

    def again(
        self,
        error_retryable: bool,
        retry_after: float | None,
        remaining: float,
        patience: float = math.inf,
        *,
        least: float | None = None,
    ) -> float | None:
        """Decide after a failed attempt; if there is another one, `number` is its number.

        Args:
            error_retryable: the error is transient and nothing of the answer has been shown yet.
            retry_after: the provider's Retry-After in seconds, which wins over a backoff that is shorter; none, or
                none that is a positive number, is no hint.
            remaining: seconds left until the call's deadline; `math.inf` without one.
            patience: longest pause, because another route is left.
            least: seconds of a pause that was put off, instead of a new one.

        Returns:
            Seconds to pause before the next attempt, less than `remaining`; None when there is none (`why_not`).
        """
        self.pause = pause = self._pause(retry_after) if least is None else max(0.0, least)
        self.why_not = self._objection(error_retryable, pause, remaining, patience)
        if self.why_not is not None:
            return None
        self.number += 1
        return pause

    def _objection(self, error_retryable: bool, pause: float, remaining: float, patience: float) -> WhyNot | None:
        if not error_retryable:
            return "not_retryable"
        if self.number >= self._options.attempts:
            return "attempts"
        if not pause < remaining:  # also when either is not a number
            return "deadline"
        if pause > patience:
            return "patience"
        if not self._budget.allow():  # last, because it takes a token
            return "retry_budget"
        return None

    def _pause(self, retry_after: float | None) -> float:
        doublings = min(self.number - 1, 1000)  # 2.0 ** 1024 would overflow
        longest = min(self._options.max_backoff, self._options.backoff * math.ldexp(1.0, doublings))
        backoff = longest * self._random()
        return retry_after if retry_after is not None and retry_after > backoff else backoff
