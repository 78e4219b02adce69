"""What a worker knows of its namespace's board when that cannot be read, or says what it does not know."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from dspy_prod.context.current import CallContext
from dspy_prod.errors import StoppedError, StoreUnavailableError
from dspy_prod.options import CircuitBreaker
from dspy_prod.policies.breaker import circuit
from dspy_prod.policies.fleet import AGAIN, Fleet, fleet_of
from dspy_prod.policies.orders import Stop
from dspy_prod.stores.board import Change
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.memory_board import MemoryBoard
from dspy_prod.telemetry.events import BUS
from tests.policies.conftest import FakeClock


class Board(MemoryBoard):
    """A board that cannot be read while it is broken."""

    broken = False

    def rows(self) -> Any:
        if self.broken:
            raise StoreUnavailableError("no such file")
        return super().rows()


@pytest.fixture
def fleet(clock: FakeClock) -> Fleet:
    return Fleet(Board(clock.time), "board://", durable=True)


@pytest.fixture
def events() -> Iterator[list[str]]:
    heard: list[str] = []
    remove = BUS.add(lambda event: heard.append(event.name))
    yield heard
    remove()


def stop(scope: str, value: str = "", until: float | None = None) -> Stop:
    return Stop(scope, value, "why", "me", 1.0, until)


def refused(fleet: Fleet, **context: str) -> bool:
    fleet.look()
    try:
        fleet.check(CallContext(**context), "m", "primary")  # type: ignore[arg-type]
    except StoppedError:
        return True
    return False


def test_a_stop_is_for_whom_it_names(fleet: Fleet) -> None:
    assert not refused(fleet)
    fleet.stop(stop("program", "a"))
    fleet.stop(stop("tenant", "t"))
    fleet.stop(stop("model", "other"))
    assert refused(fleet, program="a")
    assert refused(fleet, program="b", tenant="t")
    assert not refused(fleet, program="b", tenant="a")
    assert not refused(fleet)
    fleet.stop(stop("model", "m"))
    assert refused(fleet)


def test_a_board_that_cannot_be_read_is_as_it_was(fleet: Fleet, clock: FakeClock, events: list[str]) -> None:
    """Told once, asked once a second, and believed again as soon as it answers."""
    fleet.stop(stop("all"))
    assert refused(fleet)
    fleet.board.broken = True  # type: ignore[attr-defined]
    fleet.resume("all", "", "me")
    for _ in range(3):
        assert refused(fleet)
        clock.advance(AGAIN / 4)
    fleet.board.broken = False  # type: ignore[attr-defined]
    assert refused(fleet)
    clock.advance(AGAIN)
    assert not refused(fleet)
    assert events == ["calls_stopped", "board_unread", "calls_resumed"]


def test_rows_of_another_version_are_left_alone(fleet: Fleet) -> None:
    """They stop nobody, and keep nobody from being stopped."""
    fleet.write("stop", "x", lambda row, now: Change({"scope": "all", "of": "tomorrow"}))
    fleet.write("order", "m", lambda row, now: Change({"move": "dance"}))
    assert not refused(fleet)
    fleet.stop(stop("all"))
    assert refused(fleet)


def test_a_damaged_circuit_is_as_none(fleet: Fleet) -> None:
    """It would else never move again."""
    moves = circuit.Moves(CircuitBreaker(), circuit.Whose("m", "p", "me"))
    fleet.write(circuit.KIND, "k", lambda row, now: Change({"state": "open"}))
    trip = partial(circuit.stamped, partial(moves.trip, 0, "cause", 10.0, 20.0))
    row = fleet.write(circuit.KIND, "k", trip)
    assert row is not None
    assert (row["state"], row["generation"]) == ("open", 1)


def test_a_store_has_one_fleet() -> None:
    """Also a store without a board, which is then this process's own."""
    store = MemoryStore("fleet")
    assert fleet_of(store) is fleet_of(store)
    assert fleet_of(store).board is store.board
    del store.board
    other = MemoryStore("other")
    del other.board
    assert fleet_of(other).board.rows() == {}
