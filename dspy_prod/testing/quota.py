"""The provider's own rate limits: sliding windows, as strict as one can be, answered with 429."""

from __future__ import annotations

import math
from collections import deque

from dspy_prod.testing.faults import Status

MINUTE = 60.0


class Quota:
    """Limits over what was accepted. A refused request takes nothing.

    Args:
        rpm: requests in any 60 s.
        tpm: tokens (input and output of the accepted calls, counted at arrival) in any 60 s.
        per_second: requests in any 1 s.
        concurrency: requests in flight.
    """

    def __init__(self, rpm: int | None, tpm: int | None, per_second: int | None, concurrency: int | None) -> None:
        self.rpm = rpm
        self.tpm = tpm
        self.per_second = per_second
        self.concurrency = concurrency
        self._minute: deque[tuple[float, int]] = deque()
        self._tokens = 0
        self._second: deque[float] = deque()

    def admit(self, now: float, tokens: int, in_flight: int) -> Status | None:
        """Take `tokens` at `now` (monotonic seconds), or return the 429; `in_flight` counts the others."""
        self._forget(now)
        if self.concurrency is not None and in_flight >= self.concurrency:
            return _refusal(f"{self.concurrency} concurrent requests", 1.0)
        if self.per_second is not None and len(self._second) >= self.per_second:
            return _refusal(f"{self.per_second} requests per second", self._second[0] + 1.0 - now)
        if self.rpm is not None and len(self._minute) >= self.rpm:
            # Lowered in flight the limit may be exceeded by several: wait until enough of them have left.
            oldest = self._minute[len(self._minute) - self.rpm][0] if self.rpm > 0 else now
            return _refusal(f"{self.rpm} requests per minute", oldest + MINUTE - now)
        if self.tpm is not None and self._tokens + tokens > self.tpm:
            return _refusal(f"{self.tpm} tokens per minute", self._until_tokens(now, tokens))
        self._minute.append((now, tokens))
        self._second.append(now)
        self._tokens += tokens
        return None

    def headers(self, now: float) -> dict[str, str]:
        """OpenAI's `x-ratelimit-*` headers for the limits that are set."""
        self._forget(now)
        headers: dict[str, str] = {}
        reset = max(0.0, self._minute[-1][0] + MINUTE - now) if self._minute else 0.0
        for kind, limit, used in (("requests", self.rpm, len(self._minute)), ("tokens", self.tpm, self._tokens)):
            if limit is not None:
                headers[f"x-ratelimit-limit-{kind}"] = str(limit)
                headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, limit - used))
                headers[f"x-ratelimit-reset-{kind}"] = go_duration(reset if used else 0.0)
        return headers

    def clear(self) -> None:
        """Forget what was used."""
        self._minute.clear()
        self._second.clear()
        self._tokens = 0

    def _forget(self, now: float) -> None:
        while self._minute and self._minute[0][0] <= now - MINUTE:
            self._tokens -= self._minute.popleft()[1]
        while self._second and self._second[0] <= now - 1.0:
            self._second.popleft()

    def _until_tokens(self, now: float, tokens: int) -> float:
        free = (self.tpm or 0) - self._tokens
        for at, used in self._minute:
            free += used
            if free >= tokens:
                return at + MINUTE - now
        return MINUTE


def _refusal(limit: str, wait: float) -> Status:
    wait = max(wait, 0.001)
    return Status(
        429,
        f"Rate limit reached: {limit}. Please try again in {wait:.3f}s.",
        retry_after=math.ceil(wait),
        headers={"retry-after-ms": str(math.ceil(wait * 1000))},
        error_code="rate_limit_exceeded",
    )


def go_duration(seconds: float) -> str:
    """Seconds as OpenAI's headers write them: "0s", "250ms", "59.5s", "1m0s"."""
    if seconds <= 0:
        return "0s"
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
