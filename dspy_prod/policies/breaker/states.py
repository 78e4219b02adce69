"""The states of a circuit, one small class each; `breaker.py` moves between them and holds the lock.

A state never changes the circuit itself: it returns the `Change` it asks for. It lives for one generation, so whatever
it counts begins at nothing when it is entered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import ClassVar, NamedTuple

from dspy_prod.errors import CircuitOpenError
from dspy_prod.options import CircuitBreaker
from dspy_prod.policies.breaker.permit import StateName
from dspy_prod.policies.breaker.transitions import Trigger
from dspy_prod.policies.breaker.window import FAILED, SLOW, window_of

_TICK = 1e-6
"""Seconds. A caller who waits exactly `retry_after` must not be refused because of floating-point rounding."""


class Change(NamedTuple):
    """A transition a state asks for.

    Attributes:
        trigger: what happened; `TRANSITIONS` says where it leads.
        cause: the same as short text.
        retry_after: the provider's Retry-After in seconds, if it came with the failure.
        written_off: probes that count as failed because their lease ran out.
    """

    trigger: Trigger
    cause: str
    retry_after: float | None = None
    written_off: int = 0


class Refusal(NamedTuple):
    """Why there is no permit now: the text, and the seconds until there may be one (None: unknown)."""

    cause: str
    retry_after: float | None

    def error(self, route: str) -> CircuitOpenError:
        """The error for the caller."""
        wait = self.retry_after
        remedy = "until an operator resets it" if wait is None else f"try again in {wait:.1f} s or add a fallback"
        message = f"The circuit of route {route!r} is open ({self.cause}); {remedy}"
        return CircuitOpenError(message, retry_after=wait, route=route, cause_text=self.cause)


class State:
    """What every state answers; by itself it admits every call and counts none.

    Attributes:
        generation: number of transitions before this state; permits carry it.
        admits_all: every call gets a permit, so that asking needs no lock.
    """

    name: ClassVar[StateName]
    admits_all: ClassVar[bool] = False

    __slots__ = ("generation",)

    def __init__(self, generation: int) -> None:
        self.generation = generation

    def overdue(self) -> Change | None:
        """The transition that is due because time has passed, if any."""
        return None

    def refusal(self) -> Refusal | None:
        """Why a call gets no permit now, or None if it would get one."""
        return None

    def success(self, permit_id: int, duration: float) -> Change | None:
        """A call admitted in this state succeeded after `duration` seconds."""
        return None

    def failure(self, permit_id: int, duration: float, cause: str, retry_after: float | None) -> Change | None:
        """A call admitted in this state failed after `duration` seconds."""
        return None

    def release(self, permit_id: int) -> Change | None:
        """A call admitted in this state ended in a way that says nothing about the upstream."""
        return None


class Disabled(State):
    """An operator took the circuit out of service: it admits every call and never opens."""

    name = "disabled"
    admits_all = True

    __slots__ = ()


class Closed(State):
    """Calls pass; their outcomes are counted until one of the three rules opens the circuit."""

    name = "closed"
    admits_all = True

    __slots__ = ("_last_cause", "_minimum", "_options", "_slow_above", "consecutive_failures", "window")

    def __init__(self, generation: int, options: CircuitBreaker, now: Callable[[], float]) -> None:
        super().__init__(generation)
        self.window = window_of(options, now)
        self.consecutive_failures = 0
        self._options = options
        self._minimum = options.minimum_calls
        self._slow_above = math.inf if options.slow_call_duration is None else options.slow_call_duration
        self._last_cause = ""

    def success(self, permit_id: int, duration: float) -> Change | None:
        """Count it. Also a success can complete `minimum_calls`, or be the slow call that is one too many."""
        self.consecutive_failures = 0
        window = self.window
        window.add(SLOW if duration > self._slow_above else 0)
        if window.calls >= self._minimum and (window.failures or window.slow):
            return self._judge_rates(None)
        return None

    def failure(self, permit_id: int, duration: float, cause: str, retry_after: float | None) -> Change | None:
        """Count it and apply the rules, the one on consecutive failures first."""
        self.consecutive_failures += 1
        self._last_cause = cause
        self.window.add(FAILED | SLOW if duration > self._slow_above else FAILED)
        threshold = self._options.failure_threshold
        if threshold is not None and self.consecutive_failures >= threshold:
            return Change("failures", f"{self.consecutive_failures} failures in a row, last: {cause}", retry_after)
        return self._judge_rates(retry_after) if self.window.calls >= self._minimum else None

    def _judge_rates(self, retry_after: float | None) -> Change | None:
        options, window = self._options, self.window
        calls = window.calls
        if options.failure_rate is not None and window.failures / calls >= options.failure_rate:
            return Change(
                "failures", f"{window.failures} of {calls} calls failed, last: {self._last_cause}", retry_after
            )
        if options.slow_call_duration is not None and window.slow / calls >= options.slow_call_rate:
            slow = f"{window.slow} of {calls} calls took over {options.slow_call_duration:g} s"
            return Change("failures", slow, retry_after)
        return None


class Open(State):
    """No call passes until the interval is over.

    Attributes:
        cause: what opened the circuit.
        since: when, on the monotonic clock. until: until when.
    """

    name = "open"

    __slots__ = ("_now", "cause", "since", "until")

    def __init__(self, generation: int, now: Callable[[], float], cause: str, interval: float) -> None:
        super().__init__(generation)
        self._now = now
        self.cause = cause
        self.since = now()
        self.until = self.since + interval

    def refusal(self) -> Refusal | None:
        """Refuse until the interval is over; who comes then makes the circuit half-open by taking a permit."""
        left = self.until - self._now()
        return Refusal(self.cause, left) if left > _TICK else None


class ForcedOpen(State):
    """An operator opened the circuit: no call passes until they `reset` it.

    Attributes:
        cause: the operator's reason.
        since: when they first said so, on the monotonic clock.
    """

    name = "forced_open"

    __slots__ = ("cause", "since")

    def __init__(self, generation: int, cause: str, since: float) -> None:
        super().__init__(generation)
        self.cause = cause
        self.since = since

    def refusal(self) -> Refusal | None:
        """Always refuse; nobody knows for how long."""
        return Refusal(self.cause, None)


class HalfOpen(State):
    """A few probes pass at a time; their outcomes decide.

    Each probe holds a lease of `probe_lease` seconds. One that has not reported by then counts as failed, so a hung
    call cannot keep the circuit half-open.

    Attributes:
        cause: what opened the circuit.
        since: when it was opened, on the monotonic clock.
    """

    name = "half_open"

    __slots__ = ("_leases", "_now", "_options", "_slow", "_successes", "cause", "since")

    def __init__(
        self, generation: int, options: CircuitBreaker, now: Callable[[], float], cause: str, since: float
    ) -> None:
        super().__init__(generation)
        self._options = options
        self._now = now
        self.cause = cause
        self.since = since
        self._leases: dict[int, float] = {}  # permit id to the end of its lease; the first ends first
        self._successes = 0
        self._slow = 0

    @property
    def probes(self) -> Collection[int]:
        """Their ids."""
        return self._leases.keys()

    @property
    def probes_in_flight(self) -> int:
        """Probes that have not reported."""
        return len(self._leases)

    def overdue(self) -> Change | None:
        """Re-open when a probe's lease has run out."""
        now = self._now()
        hung = sum(end - now <= _TICK for end in list(self._leases.values()))  # a copy: see Breaker's reentrant lock
        if not hung:
            return None
        cause = f"a probe did not report within {self._options.probe_lease:g} s"
        return Change("probe_failed", cause, written_off=hung)

    def refusal(self) -> Refusal | None:
        """Refuse while all probes are out, at the longest until the first lease ends."""
        if len(self._leases) < self._options.half_open_probes:
            return None
        now = self._now()
        return Refusal(self.cause, max(0.0, next(iter(self._leases.values()), now) - now))

    def admit(self, permit_id: int) -> None:
        """Send a probe; only after `refusal` said None."""
        self._leases[permit_id] = self._now() + self._options.probe_lease

    def success(self, permit_id: int, duration: float) -> Change | None:
        """Close after `success_threshold` successful probes, unless they were as slow as what opens a circuit."""
        change = self.release(permit_id)
        if change is not None:
            return change
        options = self._options
        self._successes += 1
        if options.slow_call_duration is not None:
            self._slow += duration > options.slow_call_duration
        if self._successes < options.success_threshold:
            return None
        if self._slow and self._slow / self._successes >= options.slow_call_rate:
            slow = f"{self._slow} of {self._successes} probes took over {options.slow_call_duration:g} s"
            return Change("probe_failed", slow)
        return Change("probes_succeeded", f"{self._successes} probes succeeded")

    def failure(self, permit_id: int, duration: float, cause: str, retry_after: float | None) -> Change | None:
        """One failed probe re-opens."""
        return self.release(permit_id) or Change("probe_failed", f"a probe failed: {cause}", retry_after)

    def release(self, permit_id: int) -> Change | None:
        """Free the probe. Leases are looked at first: a result after the end of the lease is none."""
        change = self.overdue()
        if change is None:
            self._leases.pop(permit_id, None)
        return change

    def hear(self, leases: dict[int, float], successes: int, slow: int) -> None:
        """What became of the probes of all workers that share the circuit: ends of leases on the monotonic clock."""
        self._leases = dict(sorted(leases.items(), key=lambda lease: lease[1]))
        self._successes, self._slow = successes, slow

    def forget_probes(self) -> None:
        """Free all probes: in a forked child, those of the parent never report."""
        self._leases.clear()
