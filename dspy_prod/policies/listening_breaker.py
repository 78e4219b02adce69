"""A circuit breaker that goes by its namespace's board: by the circuits of other workers, and by what operators say."""

from __future__ import annotations

from collections.abc import Callable

from dspy_prod.options import CircuitBreaker
from dspy_prod.policies.breaker import circuit
from dspy_prod.policies.breaker.breaker import Breaker, _Notice
from dspy_prod.policies.breaker.states import Closed, Disabled, ForcedOpen, HalfOpen, Open
from dspy_prod.policies.fleet import Fleet
from dspy_prod.policies.orders import Order
from dspy_prod.runtime.clock import Clock
from dspy_prod.stores.board import Row
from dspy_prod.telemetry.events import EventBus


class ListeningBreaker(Breaker):
    """The half of a `SharedBreaker` that hears; the other half tells, and says when it is alone or ahead of the board.

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
        random: Callable[[], float],
    ) -> None:
        super().__init__(options, name=name, clock=clock, bus=bus, random=random)
        self.place = place
        self.shares = shares
        self._key = key
        self._fleet = fleet
        self._board = fleet.board
        self._heard: object = None  # the view that it goes by
        self._row: Row | None = None
        self._order: Order | None = None
        self._ahead: int | None = None  # the row's generation once our own move is written
        self._alone = False  # the store cannot be used: the circuit is this worker's own for now

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
