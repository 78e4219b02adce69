"""The circuit breaker of one route: it stops calling an upstream that fails and probes when to call it again.

Terms and rules: Resilience4j's CircuitBreaker (states, count and time windows, slow calls) and Polly (`retry_after`,
forced states), with leases on probes and generations on permits. See `options.CircuitBreaker` for the settings.
"""

from __future__ import annotations

import itertools
import math
import random as _random
import threading
from collections.abc import Callable
from typing import NamedTuple

from dspy_prod.options import CircuitBreaker
from dspy_prod.policies.breaker.permit import BreakerSnapshot, Permit
from dspy_prod.policies.breaker.states import Change, Closed, Disabled, ForcedOpen, HalfOpen, Open, Refusal, State
from dspy_prod.policies.breaker.transitions import EVENTS, SAID, OperatorMove, Trigger, following
from dspy_prod.runtime.brief import briefly
from dspy_prod.runtime.clock import Clock
from dspy_prod.telemetry.events import EventBus

__all__ = ["Breaker", "BreakerSnapshot", "Permit"]

_SETTLED = -1  # the generation of a permit that has reported: it matches none, so a second report changes nothing
_CAUSE_LENGTH = 160


class _Notice(NamedTuple):
    """An event to deliver once the lock is free."""

    event: str
    cause: str
    retry_after: float | None
    generation: int


class Breaker:
    """A circuit breaker; threads and tasks of any loop share one.

    Order of use (docs/guide/breaker.md): `check` before waiting for anything, `permit` last before sending,
    then exactly one of `success`, `failure`, `release`. A permit of an earlier generation changes nothing, so an
    answer to a call sent before the circuit opened can neither close it nor count as a probe.

    Listeners hear `breaker_opened`, `breaker_half_open` and `breaker_closed`, with `route`, `cause`, `retry_after`
    (seconds or None) and `generation`. They run outside the lock, so threads may deliver out of order: `generation`
    tells the order.
    """

    def __init__(
        self,
        options: CircuitBreaker,
        *,
        name: str,
        clock: Clock,
        bus: EventBus,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.options = options
        self.name = name
        self._clock = clock
        self._now = clock.monotonic
        self._bus = bus
        self._random = random
        self._ids = itertools.count(1)
        # Reentrant: the garbage collector may close an abandoned stream, which settles, on a thread that is in here.
        self._lock = threading.RLock()
        self._interval = options.recovery_timeout  # of the next trip, without jitter
        self._opened_count = 0
        self._total_failures = 0
        self._total_successes = 0
        self._last_closed = Closed(0, options, self._now)
        self._state: State = self._last_closed

    def __repr__(self) -> str:
        return f"Breaker({self.name!r}, {self._state.name})"

    @property
    def state(self) -> str:
        """Name of the state now, without taking the lock."""
        return self._state.name

    # -- asking ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse a call that could not get a permit now; takes none and never makes the circuit half-open.

        A probe whose lease has run out is written off here too, as by everyone who looks.

        Raises:
            CircuitOpenError: with `retry_after`, `route` and `cause_text`.
        """
        if self._state.admits_all:  # one read of one reference: no lock
            return
        with briefly(self._lock):
            notice = self._write_off()
            refusal = self._state.refusal()
        self._tell(notice)
        if refusal is not None:
            raise refusal.error(self.name)

    def permit(self) -> Permit:
        """Take leave to send one call, just before sending it.

        Raises:
            CircuitOpenError: the circuit is open, or half-open with all its probes out.
        """
        state = self._state
        if state.admits_all:
            return Permit(state.generation, False, next(self._ids), self._now())
        answer: Permit | Refusal | None
        with briefly(self._lock):
            notices = [self._write_off()]
            state = self._state
            answer = state.refusal()
            if answer is None:
                if isinstance(state, Open):
                    notices.append(self._move("interval_over", state.cause))
                state = self._state
                answer = Permit(state.generation, isinstance(state, HalfOpen), next(self._ids), self._now())
                if isinstance(state, HalfOpen):
                    state.admit(answer.id)
        try:
            self._tell(*notices)
        except BaseException:  # Ctrl-C in a listener: nobody has the permit to settle it
            if isinstance(answer, Permit):
                self.release(answer)
            raise
        if isinstance(answer, Refusal):
            raise answer.error(self.name)
        return answer

    # -- settling: never raises, never waits for anything but the short lock ---------------------------------------
    # A permit is marked once its state has it: whoever is interrupted before that settles it once more.

    def success(self, permit: Permit, duration: float) -> None:
        """The call succeeded after `duration` seconds."""
        with briefly(self._lock):
            state = self._state
            if permit.generation != state.generation:
                return
            change = state.success(permit.id, duration)
            permit.generation = _SETTLED
            if change is None or not change.written_off:
                self._total_successes += 1
            if change is None:
                return
            notice = self._apply(change)
        self._tell(notice)

    def failure(self, permit: Permit, duration: float, cause: str, retry_after: float | None = None) -> None:
        """The call failed after `duration` seconds, in a way that speaks against the upstream.

        Args:
            cause: class of the error and status, e.g. `"LMServerError 503"`: short, without secrets. It is shown in
                errors, events and snapshots.
            retry_after: the provider's Retry-After in seconds. If this failure opens the circuit, it is the open
                interval, at most `max_recovery_timeout` (jitter still lengthens it).
        """
        with briefly(self._lock):
            state = self._state
            if permit.generation != state.generation:
                return
            change = state.failure(permit.id, duration, cause, retry_after)
            permit.generation = _SETTLED
            if change is None or not change.written_off:
                self._total_failures += 1
            if change is None:
                return
            notice = self._apply(change)
        self._tell(notice)

    def release(self, permit: Permit) -> None:
        """The outcome says nothing about the upstream (authentication, invalid request, cancellation, our own
        refusal): give the probe back, count nothing."""
        with briefly(self._lock):
            state = self._state
            if permit.generation != state.generation:
                return
            change = state.release(permit.id)
            permit.generation = _SETTLED
            if change is None:
                return
            notice = self._apply(change)
        self._tell(notice)

    # -- the operator ---------------------------------------------------------------------------------------------

    def force_open(self, reason: str = SAID["force_open"]) -> None:
        """Refuse every call until `reset` or `disable`. `reason` is shown to callers."""
        self._operated("force_open", reason)

    def disable(self) -> None:
        """Admit every call and count none, until `reset` or `force_open`."""
        self._operated("disable", SAID["disable"])

    force_closed = disable

    def reset(self) -> None:
        """Close the circuit and forget what was counted: empty window, first open interval. Totals stay."""
        self._operated("reset", SAID["reset"])

    def begin(self, move: OperatorMove) -> None:
        """Do as an operator has said before this breaker was made; listeners have heard of it then."""
        with briefly(self._lock):
            self._move(move, SAID[move])

    def _operated(self, move: OperatorMove, cause: str) -> None:
        with briefly(self._lock):
            notice = self._move(move, cause)
        self._tell(notice)

    def snapshot(self) -> BreakerSnapshot:
        """The breaker now, consistent in itself."""
        with briefly(self._lock):
            notice = self._write_off()
            state, window = self._state, self._last_closed.window
            window.expire()
            refusal = state.refusal()
            opened = state if isinstance(state, Open | HalfOpen | ForcedOpen) else None
            result = BreakerSnapshot(
                name=self.name,
                state=state.name,
                failures=window.failures,
                successes=window.calls - window.failures,
                slow=window.slow,
                consecutive_failures=self._last_closed.consecutive_failures,
                failure_rate=window.failures / window.calls if window.calls else None,
                opened_count=self._opened_count,
                open_for=self._now() - opened.since if opened else None,
                retry_after=refusal.retry_after if refusal else 0.0,
                cause=opened.cause if opened else "",
                probes_in_flight=state.probes_in_flight if isinstance(state, HalfOpen) else 0,
                total_failures=self._total_failures,
                total_successes=self._total_successes,
            )
        self._tell(notice)
        return result

    def _after_fork(self) -> None:
        """In a forked child: a lock nobody holds, and no probes, as the parent's report to the parent."""
        self._lock = threading.RLock()
        if isinstance(self._state, HalfOpen):
            self._state.forget_probes()

    # -- transitions, under the lock ------------------------------------------------------------------------------

    def _write_off(self) -> _Notice | None:
        change = self._state.overdue()
        return None if change is None else self._apply(change)

    def _apply(self, change: Change) -> _Notice | None:
        self._total_failures += change.written_off
        return self._move(change.trigger, change.cause, change.retry_after)

    def _move(self, trigger: Trigger, cause: str, retry_after: float | None = None) -> _Notice | None:
        """Enter the state that the table names; what is to be told of it, if it is another state."""
        before, now, generation = self._state, self._now, self._state.generation + 1
        name, cause, interval = following(before.name, trigger), _short(cause), None
        if name == "closed":
            self._interval = self.options.recovery_timeout
            self._state = self._last_closed = Closed(generation, self.options, now)
        elif name == "open":
            interval = self._next_interval(retry_after)
            self._state = Open(generation, now, cause, interval)
        elif name == "half_open":
            assert isinstance(before, Open)
            self._state = HalfOpen(generation, self.options, now, cause, before.since)
        elif name == "forced_open":
            self._state = ForcedOpen(generation, cause, before.since if isinstance(before, ForcedOpen) else now())
        else:
            self._state = Disabled(generation)
        if name == before.name:  # an operator said it again, or reset a closed circuit
            return None
        self._opened_count += EVENTS[name] == "breaker_opened"
        return _Notice(EVENTS[name], cause, interval, generation)

    def _next_interval(self, retry_after: float | None) -> float:
        """Seconds to stay open: doubled with every trip in a row, lengthened by jitter so that processes spread."""
        longest = self.options.max_recovery_timeout
        interval = self._interval
        self._interval = min(2 * interval, longest)
        if retry_after is not None and 0 < retry_after < math.inf:
            interval = min(retry_after, longest)
        return interval * (1 + self.options.jitter * self._random())

    # -- outside the lock -----------------------------------------------------------------------------------------

    def _tell(self, *notices: _Notice | None) -> None:
        for notice in notices:
            if notice is not None:
                self._bus.emit(
                    notice.event,
                    self._clock.time(),
                    route=self.name,
                    cause=notice.cause,
                    retry_after=notice.retry_after,
                    generation=notice.generation,
                )


def _short(text: str) -> str:
    """One line of at most `_CAUSE_LENGTH` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= _CAUSE_LENGTH else line[: _CAUSE_LENGTH - 1] + "…"
