"""A circuit breaker that all workers of a namespace share, and that goes by what operators say.

Each worker counts its own calls, and opens its circuit at once when they fail; that it did is posted to the store's
board (`circuit.py`), and the others see it before they send (`listening_breaker.py`). Probes are asked for there, and
their ends told there, so that they are counted over all workers. While the store cannot be used each worker's circuit
is its own.
"""

from __future__ import annotations

import itertools
import random as _random
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import CircuitBreaker
from dspy_prod.policies.breaker import circuit
from dspy_prod.policies.breaker.breaker import BreakerSnapshot, Permit, _Notice
from dspy_prod.policies.breaker.permit import Asked
from dspy_prod.policies.breaker.states import Change, Disabled, ForcedOpen, HalfOpen, Open, Refusal
from dspy_prod.policies.fleet import Fleet
from dspy_prod.policies.listening_breaker import ListeningBreaker
from dspy_prod.runtime.clock import Clock
from dspy_prod.stores.board import Decide, Row
from dspy_prod.telemetry.events import EventBus

PATIENCE: Final = 2.0
"""Seconds for which a call waits for the store to give it a probe."""
RETURN: Final = 5.0
"""Seconds after which a worker that is alone tries to share its circuit again."""
_IDS: Final = 2**52


class SharedBreaker(ListeningBreaker):
    """See the module's docstring, and `ListeningBreaker` for its arguments."""

    def __init__(
        self,
        options: CircuitBreaker,
        *,
        name: str,
        place: str,
        key: str,
        fleet: Fleet,
        shares: bool,
        clock: Clock,
        bus: EventBus,
        random: Callable[[], float] = _random.random,
    ) -> None:
        super().__init__(
            options, name=name, place=place, key=key, fleet=fleet, shares=shares, clock=clock, bus=bus, random=random
        )
        self._return_at = 0.0
        self._begin()
        self._hear(tell=False)

    def _begin(self) -> None:
        """What is this process's own: in a forked child it is another one."""
        self._moves = circuit.Moves(self.options, circuit.Whose(self.name, self.place, self._fleet.worker))
        self._ids = itertools.count(_random.randrange(1, _IDS))  # no other worker's

    # -- asking ------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        if self._fleet.view is not self._heard:
            self._hear()
        if self._alone:
            self._come_back()
        if not self._state.admits_all:
            super().check()

    def permit(self) -> Permit:
        if self._fleet.view is not self._heard:
            self._hear()
        state = self._state
        if state.admits_all:
            return Permit(state.generation, False, next(self._ids), self._now())
        if not self.shares or self._alone or isinstance(state, ForcedOpen):
            return super().permit()
        with self._lock:
            notice = self._write_off()
            state = self._state
            refusal = state.refusal()
            permit = Permit(state.generation, True, next(self._ids), self._now())
        self._tell(notice)
        if refusal is not None:
            raise refusal.error(self.name)
        if not state.admits_all:
            permit.asked = Asked(self._post(partial(self._moves.claim, permit.id)))
        return permit

    def decided(self, permit: Permit) -> None:
        """The store has answered what the permit was asked for, or took too long: it is one from now on.

        Raises:
            CircuitOpenError: other workers have all the probes, or the circuit opened again.
        """
        asked, permit.asked = permit.asked, None
        assert asked is not None
        answer, granted = asked.answer, False
        notice: _Notice | None = None
        refusal: Refusal | None = None
        if not answer.done():
            self._is_alone(StoreUnavailableError(f"it did not answer within {PATIENCE:g} s"))
            self._post(partial(self._moves.released, permit.id))
        elif answer.exception() is None:
            with self._lock:
                notice = self._adopt(answer.result())
                state = self._state
                granted = state.admits_all or (isinstance(state, HalfOpen) and permit.id in state.probes)
                permit.generation, permit.probe = state.generation, not state.admits_all
                refusal = None if granted else state.refusal() or Refusal(self._cause(), 0.0)
        self._tell(notice)
        if granted:
            return
        permit.generation = -1
        if refusal is not None:
            raise refusal.error(self.name)
        own = super().permit()  # the store cannot be used, so this worker decides for itself
        permit.generation, permit.probe, permit.id = own.generation, own.probe, own.id

    def _cause(self) -> str:
        return str(getattr(self._state, "cause", ""))

    # -- settling ----------------------------------------------------------------------------------------------------
    def success(self, permit: Permit, duration: float) -> None:
        if not self.shares:
            super().success(permit, duration)
            return
        post = self._is_probe(permit)
        slowest = self.options.slow_call_duration
        try:
            super().success(permit, duration)
        finally:  # also where a listener was interrupted
            if post:
                slow = slowest is not None and duration > slowest
                self._probed(partial(self._moves.succeeded, permit.id, slow, self._jittered()))

    def failure(self, permit: Permit, duration: float, cause: str, retry_after: float | None = None) -> None:
        post = self._is_probe(permit)
        try:
            super().failure(permit, duration, cause, retry_after)
        finally:  # also where a listener was interrupted
            if post:
                with self._lock:
                    state, following = self._state, self._interval
                    left = getattr(state, "until", self._now()) - self._now()
                    told = str(getattr(state, "cause", cause))
                self._probed(partial(self._moves.failed, permit.id, told, left, following))

    def release(self, permit: Permit) -> None:
        if permit.asked is not None:  # nobody waits for it any more
            self._post(partial(self._moves.released, permit.id))  # first: interrupted, it is released once more
            permit.generation = -1
            permit.asked = None
            return
        post = self._is_probe(permit)
        try:
            super().release(permit)
        finally:  # also where a listener was interrupted
            if post:
                self._probed(partial(self._moves.released, permit.id))

    def _is_probe(self, permit: Permit) -> bool:
        """Whether what becomes of a permit is told to the others. Looks at what they have done meanwhile."""
        if self._fleet.look() is not self._heard:
            self._hear()
        return permit.probe and self.shares and not self._alone and permit.generation == self._state.generation

    def _jittered(self) -> float:
        return 1 + self.options.jitter * self._random()

    def _probed(self, decide: Decide) -> None:
        if self._state.name != "half_open":
            self._ahead = circuit.generation(self._row) + 1
        self._post(decide)

    def _apply(self, change: Change) -> _Notice | None:
        """Move this worker's circuit at once, and tell the others."""
        notice = super()._apply(change)
        if not self.shares or self._alone or not isinstance(self._state, Open):
            return notice
        state, known = self._state, circuit.generation(self._row)
        left = state.until - self._now()
        if change.trigger == "failures":
            self._ahead = known + 1
            self._post(partial(self._moves.trip, known, state.cause, left, self._interval))
        elif change.written_off:
            self._ahead = known + 1
            self._post(partial(self._overdue, left))
        return notice

    def _overdue(self, interval: float, row: Row | None, now: float) -> Any:
        return self._moves.overdue(row, now, interval)

    # -- the store ---------------------------------------------------------------------------------------------------
    def _post(self, decide: Decide) -> Future[Row | None]:
        posted = self._fleet.change(circuit.KIND, self._key, partial(circuit.stamped, decide))
        posted.add_done_callback(self._posted)
        return posted

    def _posted(self, answer: Future[Row | None]) -> None:
        error = answer.exception()
        if error is not None:
            self._is_alone(error)

    def _is_alone(self, error: BaseException) -> None:
        """The store cannot be used: this worker's circuit is its own for now."""
        with self._lock:
            already, self._alone = self._alone, True
            self._return_at = self._now() + RETURN
            self._ahead = None
        if not already:
            self._bus.emit(
                "breaker_alone", self._clock.time(), route=self.name, path=self._fleet.shown, error=str(error)
            )

    def _come_back(self) -> None:
        """Share the circuit again where the store can be used: the board's state holds, unless only we are open."""
        with self._lock:
            if self._now() < self._return_at:
                return
            self._return_at = self._now() + RETURN
            state, known, following = self._state, circuit.generation(self._row), self._interval
            tripped = isinstance(state, Open)
            left, cause = getattr(state, "until", 0.0) - self._now(), self._cause()

        def ask(row: Row | None, now: float) -> Any:
            return self._moves.trip(known, cause, max(0.0, left), following, row, now) if tripped else None

        self._fleet.change(circuit.KIND, self._key, partial(circuit.stamped, ask)).add_done_callback(self._back)

    def _back(self, answer: Future[Row | None]) -> None:
        if answer.exception() is not None:
            return
        notice = None
        with self._lock:
            self._alone = False
            row, before = answer.result(), self._row
            self._row = row
            news = circuit.generation(row) != circuit.generation(before) or circuit.state(row) != self._state.name
            if news and not isinstance(self._state, ForcedOpen | Disabled):
                notice = self._enter(row)
        self._tell(notice)

    def snapshot(self) -> BreakerSnapshot:
        self._fleet.look()
        self._hear()
        return super().snapshot()

    def _after_fork(self) -> None:
        super()._after_fork()
        self._begin()
        if self.shares and isinstance(self._state, HalfOpen):
            self._mirror(self._row)
