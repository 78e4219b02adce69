"""What this process knows of its namespace's board: circuits that all workers share, and what operators have said.

Whoever sends looks first (`Fleet.look`), which costs nanoseconds as long as nothing has changed.
"""

from __future__ import annotations

import os
import socket
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, TimeoutError
from functools import partial
from typing import Any, Final

from dspy_prod.context.current import CallContext
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.policies.breaker import circuit
from dspy_prod.policies.breaker.transitions import OperatorMove
from dspy_prod.policies.orders import ORDER, STOP, Order, Stop, View
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.runtime.forking import RegistryLock, reset_after_fork
from dspy_prod.stores.base import Store
from dspy_prod.stores.board import Board, Change, Decide, Row
from dspy_prod.stores.keys import joined
from dspy_prod.stores.memory_board import MemoryBoard
from dspy_prod.telemetry.events import BUS

ANSWER: Final = 6.0
"""Seconds for which an operator's word waits for the store."""
READING: Final = 0.5
"""Seconds for which a call waits while another one reads the board."""
AGAIN: Final = 1.0
"""Seconds after which rows that could not be read are tried again."""


_NOTHING: Final = View({})
_NEVER: Final = object()


class Fleet:
    """The workers that share a store and a namespace, as one of them sees them.

    Args:
        board: the namespace's.
        shown: the store's URL, without a password.
        durable: whether there can be other workers.

    Attributes:
        view: the board as it was last read.
        worker: how this process is called in the journal.
    """

    def __init__(self, board: Board, shown: str, durable: bool) -> None:
        self.board = board
        self.view = _NOTHING
        self.shown = shown
        self.durable = durable
        self._seen: object = _NEVER
        self._read_at = 0.0
        self._unread = False
        self._after_fork()
        reset_after_fork(self)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self.worker = f"worker {os.getpid()} on {socket.gethostname()}"

    # -- reading -----------------------------------------------------------------------------------------------------
    def look(self) -> View:
        """The board as it is now."""
        token = self.board.token
        if token != self._seen:
            self._read(token)
        return self.view

    def _read(self, token: object) -> None:
        if self._unread and self.board.now() < self._read_at:
            return
        if not self._lock.acquire(timeout=READING):
            return  # another thread reads, and the store is slow
        try:
            if token == self._seen or (self._unread and self.board.now() < self._read_at):
                return
            try:
                before, self.view = self.view, View(self.board.rows())
            except StoreUnavailableError as error:
                self._read_at = self.board.now() + AGAIN
                if not self._unread:
                    self._unread = True
                    BUS.emit("board_unread", self.board.now(), path=self.shown, error=str(error))
                self._seen = self._seen if self._seen is not _NEVER else None
                return
            self._seen, self._unread = token, False
        finally:
            self._lock.release()
        self._tell(before, self.view)

    def _tell(self, before: View, now: View) -> None:
        """Tell the listeners of this process what was stopped, and what goes on."""
        if before.stops == now.stops:
            return
        at = self.board.now()
        for key, stop in now.stops.items():
            if before.stops.get(key) != stop and not stop.over(at):
                BUS.emit(
                    "calls_stopped", at, scope=stop.scope, value=stop.value, reason=stop.reason, by=stop.by,
                    until=stop.until,
                )  # fmt: skip
        for key, stop in before.stops.items():
            if key not in now.stops:
                BUS.emit("calls_resumed", at, scope=stop.scope, value=stop.value)

    def check(self, context: CallContext, model: str, route: str) -> None:
        """Refuse what an operator has stopped, by the board as it was last looked at.

        Raises:
            StoppedError
        """
        stops = self.view.stops
        keys = (("all", ""), ("program", context.program), ("tenant", context.tenant), ("model", model))
        for key in keys:
            stop = stops.get(key)  # type: ignore[arg-type]
            if stop is not None:
                now = self.board.now()
                if not stop.over(now):
                    raise stop.error(now, model, route)

    def stops(self) -> list[Stop]:
        """Those in force, the latest first."""
        now = self.board.now()
        found = [stop for stop in self.look().stops.values() if not stop.over(now)]
        return sorted(found, key=lambda stop: stop.since, reverse=True)

    # -- changing ----------------------------------------------------------------------------------------------------
    def change(self, kind: str, key: str, decide: Decide) -> Future[Row | None]:
        """Change a row; posted, see `Board.change`. A row that is damaged is as none."""
        return self.board.change(kind, key, partial(_soundly, decide))

    def write(self, kind: str, key: str, decide: Decide) -> Row | None:
        """`change`, and wait until it is durable.

        Raises:
            StoreUnavailableError
        """
        try:
            return self.change(kind, key, decide).result(ANSWER)
        except TimeoutError:
            raise StoreUnavailableError(f"The store {self.shown} did not answer within {ANSWER:g} s") from None

    def stop(self, stop: Stop) -> None:
        """Have every worker refuse what it names. Raises StoreUnavailableError."""
        note = ("stopped", stop.target, stop.by, stop.reason)

        def put(_: Row | None, now: float) -> Change:
            return Change(stop._asdict(), note)

        self.write(STOP, joined(stop.scope, stop.value), put)

    def resume(self, scope: str, value: str, by: str) -> bool:
        """Let them go on; whether they were stopped. Raises StoreUnavailableError."""
        found: list[bool] = []

        def drop(row: Row | None, now: float) -> Change | None:
            found[:] = [row is not None and not Stop(**row).over(now)]
            note = ("resumed", Stop(scope, value, "", "", 0.0, None).target, by, "")
            return None if row is None else Change(None, note)

        self.write(STOP, joined(scope, value), drop)
        return found[-1]

    def note(self, note: tuple[str, str, str, str]) -> None:
        """Write a line into the journal. Raises StoreUnavailableError."""
        self.write("note", "", lambda row, now: Change(None, note))

    def order(self, order: Order) -> None:
        """Have every worker move its circuits of a route. Raises StoreUnavailableError."""
        note = (_WORDS[order.move], order.target, order.by, order.reason)

        def put(_: Row | None, now: float) -> Change:
            return Change(order._asdict(), note)

        self.write(ORDER, order.target, put)
        if order.move != "reset":
            return
        for key, row in self.board.rows().items():
            if key[0] == circuit.KIND and order.target in (row.get("place"), row.get("model")):
                self.write(*key, partial(circuit.stamped, partial(circuit.reset, order.by, order.reason)))


_WORDS: Final[Mapping[OperatorMove, str]] = {
    "force_open": "forced open", "disable": "breaker disabled", "reset": "breaker reset",
}  # fmt: skip


def _soundly(decide: Callable[..., Any], row: Row | None, now: float) -> Any:
    try:
        return decide(row, now)
    except (KeyError, TypeError, ValueError):
        if row is None:
            raise
        return decide(None, now)


def fleets() -> list[Fleet]:
    """Those of this process that other workers may share."""
    with _LOCK:
        return [fleet for fleet in _FLEETS.values() if fleet.durable]


_FLEETS: weakref.WeakKeyDictionary[Any, Fleet] = weakref.WeakKeyDictionary()
_LOCK = RegistryLock()


def fleet_of(store: Store) -> Fleet:
    """The fleet of a store and its namespace; one in this process. A store without a board has one in memory."""
    with _LOCK:
        found = _FLEETS.get(store)
        if found is None:
            board = getattr(store, "board", None) or MemoryBoard(SYSTEM_CLOCK.time)
            found = _FLEETS[store] = Fleet(board, store.url, store.durable)
        return found
