"""A wall clock that is set, or that one process has otherwise, ends no lease and empties no minute."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from dspy_prod.options import RateLimit
from dspy_prod.runtime.clock import SYSTEM_CLOCK
from dspy_prod.stores.admission.limiter import LimiterState
from dspy_prod.stores.base import GRANTED, PENDING, AccountState
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.sqlite.processes import Process
from tests.stores.support import CENT, FakeClock, ask, decided, granted, settlement, until

TWO = RateLimit(rpm=2, burst=2)
HOUR, DAY, TEN_YEARS = 3600.0, 86_400.0, 315e6


class Clock:
    """The machine's clocks, with a wall clock that somebody sets."""

    def __init__(self, ahead: float = 0.0) -> None:
        self.ahead = ahead

    def monotonic(self) -> float:
        return SYSTEM_CLOCK.monotonic()

    def time(self) -> float:
        return SYSTEM_CLOCK.time() + self.ahead


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state.db")


@pytest.mark.parametrize("jump", [HOUR, -HOUR, DAY, -DAY, TEN_YEARS])
def test_the_clock_of_a_process_is_set(path: str, jump: float) -> None:
    """The limiter that all share admitted nobody for a day, or everybody at once."""
    clock = Clock()
    with contextlib.closing(SqliteStore(path, clock=clock, lease=5.0)) as store:
        granted(store, ask(limit=TWO))
        clock.ahead = jump
        granted(store, ask(limit=TWO))
        third = store.admit(ask(limit=TWO))
        until(lambda: third.blocked_on != "")
        assert third.state == PENDING
        limiter = store.limiter("provider")
        assert limiter is not None
        assert limiter.requests_available == 0
        assert store.account("day") == AccountState(0, 2 * CENT, 0), "no lease has ended"


@pytest.mark.parametrize("ahead", [DAY, -DAY, TEN_YEARS])
def test_one_process_has_another_time_of_day(path: str, ahead: float) -> None:
    """It goes by the same minute as the others, and so does who comes after it."""
    with contextlib.closing(SqliteStore(path, clock=Clock())) as one:
        first = granted(one, ask(limit=TWO))
        with contextlib.closing(SqliteStore(path, clock=Clock(ahead))) as other:
            assert abs(other.now() - one.now()) < 1.0
            granted(other, ask(limit=TWO))
            for store in (one, other):
                waiting = store.admit(ask(limit=TWO))
                until(lambda waiting=waiting: waiting.blocked_on != "")  # type: ignore[misc]
                assert waiting.state == PENDING
                store.withdraw(waiting)
            one.settle(first, settlement(first, CENT))
            one.flush(10)
            assert other.account("day").spent == CENT
    with contextlib.closing(SqliteStore(path, clock=Clock())) as third:
        limiter = third.limiter("provider")
        assert limiter is not None
        assert limiter.requests_available == 0


def test_after_the_machine_started_anew_nobody_holds_anything(path: str) -> None:
    """What processes of the last run held is charged at once, however far their clock was ahead."""
    clock = FakeClock()
    dead = Process(path, clock)
    dead.admit(ask(CENT))
    dead.kill()
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE owners SET lease_until = lease_until + 1e6")
        connection.execute("INSERT OR REPLACE INTO meta VALUES ('clock', '[\"an earlier run\", 1e9]')")
    with contextlib.closing(SqliteStore(path, "test", clock=clock)) as store:
        assert abs(store.now() - clock.time()) < 1.0
        until(lambda: store.account("day") == AccountState(CENT, 0, CENT))


def test_a_limiter_from_the_future_is_not_believed(path: str) -> None:
    """It would keep everybody waiting until its time comes."""
    limit, clock = RateLimit(rpm=1), FakeClock()
    ahead = LimiterState(limit, clock.time() + DAY)
    ahead.take(clock.time() + DAY, 1)
    with pytest.raises(ValueError, match="future"):
        LimiterState.load(ahead.dump(), limit, clock.time())
    process = Process(path, clock)
    process.admit(ask(limit=limit))
    process.tables.open().execute("UPDATE limiters SET state = ?", (ahead.dump(),))
    process.kill()
    with contextlib.closing(SqliteStore(path, "test", clock=clock)) as store:
        assert decided(store.admit(ask(limit=limit))).state == GRANTED
