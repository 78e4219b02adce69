"""A circuit breaker that all workers of a namespace share, and that goes by what operators say.

Each worker counts its own calls, and opens its circuit at once when they fail; that it did is posted to the store's
board (`circuit.py`), and the others see it before they send. Probes are asked for there, and their ends told there, so
that they are counted over all workers. While the store cannot be used each worker's circuit is its own.
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
from dspy_prod.policies.breaker.breaker import Breaker, BreakerSnapshot, Permit, _Notice
from dspy_prod.policies.breaker.permit import Asked
from dspy_prod.policies.breaker.states import Change, Closed, Disabled, ForcedOpen, HalfOpen, Open, Refusal
from dspy_prod.policies.fleet import Fleet
from dspy_prod.policies.orders import Order
from dspy_prod.runtime.clock import Clock
from dspy_prod.stores.board import Decide, Row
from dspy_prod.telemetry.events import EventBus

PATIENCE: Final = 2.0
"""Seconds for which a call waits for the store to give it a probe."""
RETURN: Final = 5.0
"""Seconds after which a worker that is alone tries to share its circuit again."""
_IDS: Final = 2**52


class SharedBreaker(Breaker):
    """See the module's docstring.

    Args:
        name, place: the model, and its address and model: what operators call it by.
        key: of the circuit on the board; it holds no secret.
        shares: whether the circuit is on the board; operators' orders are obeyed in any case.
    """

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
        super().__init__(options, name=name, clock=clock, bus=bus, random=random)
        self.place = place
        self.shares = shares
        self._key = key
        self._fleet = fleet
        self._board = fleet.board
        self._heard: object = None  # the view that it goes by
        self._row: Row | None = None
        self._ahead: int | None = None  # the row's generation once our own move is written
        self._order: Order | None = None
        self._alone = False
        self._return_at = 0.0
        self._begin()
        self._hear(tell=False)

    def _begin(self) -> None:
        """What is this process's own: in a forked child it is another one."""
        self._moves = circuit.Moves(self.options, circuit.Whose(self.name, self.place, self._fleet.worker))
        self._ids = itertools.count(_random.randrange(1, _IDS))  # no other worker's

    # -- hearing -----------------------------------------------------------------------------------------------------
    def _hear(self, tell: bool = True) -> None:
        """Go by the board as it was read last."""
        notices: list[_Notice | None] = []
        with self._lock:
            view = self._fleet.view
            if view is self._heard:
                return
            self._heard = view
            if view.orders or self._order is not None:
                notices.append(self._obey(view.order(self.place, self.name)))
            if self.shares and not self._alone:
                notices.append(self._adopt(view.circuits.get(self._key)))
        if tell:
            self._tell(*notices)

    def obey(self, order: Order) -> None:
        """Do at once as an operator says in this process."""
        with self._lock:
            notice = self._obey(order)
        self._tell(notice)

    def _obey(self, order: Order | None) -> _Notice | None:
        """Do as an operator has said, if that is news."""
        before, self._order = self._order, order
        if before is not None and order is not None and before.number == order.number:
            return None
        if order is not None:
            return self._move(order.move, order.cause)
        return self._move("reset", "an operator's order is over") if before and before.move != "reset" else None

    def _adopt(self, row: Row | None) -> _Notice | None:
        """The circuit is as the board says, if that is news."""
        before = self._row
        if row is before or (row is not None and before is not None and circuit.order(row) <= circuit.order(before)):
            return None
        self._row = row
        if isinstance(self._state, ForcedOpen | Disabled):
            return None
        ahead, known, now = self._ahead, circuit.generation(before), circuit.generation(row)
        if now == known:
            if self._state.name == circuit.state(row) == "half_open":
                self._mirror(row)
            return None
        self._ahead = None
        if ahead == now and self._state.name == circuit.state(row) == "closed":
            return None  # our own move: what was counted since counts
        return self._enter(row)

    def _enter(self, row: Row | None) -> _Notice | None:
        """Enter the state of the circuit on the board."""
        name, generation, before = circuit.state(row), self._state.generation + 1, self._state.name
        if row is None or name == "closed":
            if before == "closed":
                return None  # it opened and closed, and nobody here noticed
            self._interval = self.options.recovery_timeout
            self._state = self._last_closed = Closed(generation, self.options, self._now)
            return _Notice("breaker_closed", "another worker's probes succeeded", None, generation)
        left, cause = row["until"] - self._board.now(), str(row["cause"])
        self._interval = row["interval"]
        if name == "open":
            state = Open(generation, self._now, cause, left)
            state.since -= self._board.now() - row["since"]
            self._state = state
            if before == "open":
                return None
            self._opened_count += 1
            return _Notice("breaker_opened", cause, left, generation)
        since = self._now() - (self._board.now() - row["since"])
        self._state = HalfOpen(generation, self.options, self._now, cause, since)
        self._mirror(row)
        return None if before == "half_open" else _Notice("breaker_half_open", cause, None, generation)

    def _mirror(self, row: Row | None) -> None:
        """The probes of all workers, on this worker's clock."""
        assert row is not None
        state, ahead = self._state, self._now() - self._board.now()
        if isinstance(state, HalfOpen):
            leases = {int(probe): end + ahead for probe, end in row["probes"].items()}
            state.hear(leases, row["successes"], row["slow"])

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
        super().success(permit, duration)
        if post:
            slow = slowest is not None and duration > slowest
            self._probed(partial(self._moves.succeeded, permit.id, slow, self._jittered()))

    def failure(self, permit: Permit, duration: float, cause: str, retry_after: float | None = None) -> None:
        post = self._is_probe(permit)
        super().failure(permit, duration, cause, retry_after)
        if post:
            with self._lock:
                state, following = self._state, self._interval
                left = getattr(state, "until", self._now()) - self._now()
                told = str(getattr(state, "cause", cause))
            self._probed(partial(self._moves.failed, permit.id, told, left, following))

    def release(self, permit: Permit) -> None:
        asked, permit.asked = permit.asked, None
        if asked is not None:  # nobody waits for it any more
            permit.generation = -1
            self._post(partial(self._moves.released, permit.id))
            return
        post = self._is_probe(permit)
        super().release(permit)
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
