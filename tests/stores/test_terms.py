"""The settings of budgets may change while they are in use. Each test runs against each store."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from dspy_prod.options import Budget, RateLimit
from dspy_prod.stores.base import GRANTED, PENDING, Account, Reservation, Store, Terms
from dspy_prod.stores.durable.drawn import Drawn
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.sqlite.tables import Tables
from tests.stores.support import CENT, DOLLAR, FakeClock, ask, decided, granted, record, refused, settlement, until

ONE = Budget(usd=1, name="b")


def drawing(amount: int, key: str = "b|-|total", **more: Any) -> Reservation:
    """A reservation by a caller who still believes in one dollar."""
    asked = ask(amount, **more)
    asked.accounts = (Account(key, DOLLAR, "b", budget="b"),)
    return asked


def spend(store: Store, amount: int) -> None:
    reservation = granted(store, drawing(amount))
    store.settle(reservation, settlement(reservation, amount))


def test_a_raised_limit_serves_who_waits(store: Store) -> None:
    """Nobody had to settle first: the operator's word is enough."""
    store.declare(ONE)
    granted(store, drawing(90 * CENT))
    waiting = store.admit(drawing(20 * CENT))
    until(lambda: store.waiting() == 1)
    assert waiting.state == PENDING
    store.steer(Budget(usd=2, name="b"))
    assert decided(waiting).state == GRANTED


def test_what_is_spent_stays_when_a_limit_changes(store: Store) -> None:
    store.declare(ONE)
    spend(store, 90 * CENT)
    store.steer(Budget(usd=1.5, name="b"))
    assert store.account("b|-|total").spent == 90 * CENT
    spend(store, 60 * CENT)
    assert refused(store, drawing(CENT)).limit == 150 * CENT


def test_a_limit_below_what_is_spent_refuses_new_calls_and_breaks_nothing(store: Store) -> None:
    """A call in flight is still settled, and who waits is told at once instead of waiting for ever."""
    store.declare(ONE)
    spend(store, 50 * CENT)
    flying = granted(store, drawing(40 * CENT))
    waiting = [store.admit(drawing(20 * CENT)) for _ in range(3)]
    until(lambda: store.waiting() == 3)
    store.steer(Budget(usd=0.3, name="b"))
    for each in waiting:
        refusal = decided(each).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.limit, refusal.spent) == ("budget_exceeded", 30 * CENT, 50 * CENT)
    assert refused(store, drawing(CENT)).limit == 30 * CENT
    store.settle(flying, settlement(flying, 40 * CENT))
    assert store.account("b|-|total") == (90 * CENT, 0, 0)


def test_who_waits_for_a_limiter_is_told_at_once_too(store: Store) -> None:
    """He stood in line for a minute, to hear then that the money was taken away long ago."""
    store.declare(ONE)
    seat = RateLimit(concurrency=1)
    flying = granted(store, drawing(10 * CENT, limit=seat))
    hopeless, free = store.admit(drawing(80 * CENT, limit=seat)), store.admit(drawing(CENT, limit=seat))
    until(lambda: store.waiting() == 2)
    store.steer(Budget(usd=0.5, name="b"))
    refusal = decided(hopeless).refusal
    assert refusal is not None
    assert (refusal.reason, refusal.limit) == ("budget_exceeded", 50 * CENT)
    assert free.state == PENDING
    store.settle(flying, settlement(flying, 10 * CENT))
    assert decided(free).state == GRANTED


def test_every_admission_is_held_to_the_limit_of_its_moment(store: Store) -> None:
    """While threads spend and the limit falls and rises, no grant finds more spent and held than it then allowed."""
    store.declare(ONE)
    ended = threading.Event()
    failures: list[str] = []

    def work() -> None:
        while not ended.is_set():
            reservation = decided(store.admit(drawing(CENT)))
            if reservation.state == GRANTED:
                store.settle(reservation, settlement(reservation, CENT))
            elif reservation.refusal is None or reservation.refusal.spent + CENT <= reservation.refusal.limit:
                failures.append(repr(reservation.refusal))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for usd in (0.2, 0.9, 0.4, 1.1):
        store.steer(Budget(usd=usd, name="b"))
        until(lambda usd=usd: store.account("b|-|total").spent >= usd * DOLLAR)  # type: ignore[misc]
    ended.set()
    for thread in threads:
        thread.join()
    assert store.account("b|-|total").spent == 110 * CENT
    assert not failures


def test_another_configuration_replaces_what_was_steered_and_the_same_does_not(store: Store) -> None:
    store.declare(ONE)
    store.steer(Budget(usd=5, name="b"))
    store.declare(ONE)
    assert [terms.in_force.usd for terms in store.terms()] == [5]
    store.declare(Budget(usd=7, name="b"), False)
    assert [terms.in_force.usd for terms in store.terms()] == [5]
    store.declare(Budget(usd=2, name="b"))
    assert [(terms.built.usd, terms.in_force.usd) for terms in store.terms()] == [(2, 2)]


def test_changes_are_told(store: Store) -> None:
    heard: list[Terms] = []
    store.on_terms(heard.append)
    store.declare(ONE)
    store.steer(Budget(usd=5, name="b"))
    store.steer(Budget(usd=5, name="b"))
    until(lambda: len(heard) == 2)
    assert [terms.in_force.usd for terms in heard] == [1, 5]
    assert heard[0].revision < heard[1].revision


# -- processes that share a file ---------------------------------------------------------------------------------------
def test_other_processes_are_held_to_the_new_limit_from_their_next_admission(
    open_sqlite: Callable[..., SqliteStore],
) -> None:
    """And hear of the other settings with it."""
    one, other = open_sqlite(), open_sqlite()
    heard: list[Terms] = []
    other.on_terms(heard.append)
    one.declare(ONE)
    other.declare(ONE)
    spend(other, 10 * CENT)
    one.steer(Budget(usd=0.2, name="b", soft=0.5))
    assert refused(other, drawing(20 * CENT)).limit == 20 * CENT
    until(lambda: bool(heard) and heard[-1].in_force.soft == 0.5)
    one.steer(Budget(usd=0.4, name="b"))
    granted(other, drawing(20 * CENT))


def test_another_process_hears_of_a_cap_on_single_calls_with_its_next_record(
    open_sqlite: Callable[..., SqliteStore],
) -> None:
    """No account asks for the settings of such a budget: a cap that was lowered elsewhere was never heard of."""
    one, other = open_sqlite(), open_sqlite()
    heard: list[Terms] = []
    other.on_terms(heard.append)
    for store in (one, other):
        store.declare(Budget(usd=1, name="cap", per="call"))
    one.steer(Budget(usd=0.01, name="cap", per="call"))
    other.append(record())
    other.flush()
    assert [terms.in_force.usd for terms in heard] == [1, 0.01]


def test_who_waits_in_another_process_is_served_when_the_limit_is_raised(
    open_sqlite: Callable[..., SqliteStore],
) -> None:
    one, other = open_sqlite(), open_sqlite()
    one.declare(ONE)
    granted(one, drawing(90 * CENT))
    waiting = other.admit(drawing(20 * CENT))
    until(lambda: other.waiting() == 1)
    one.steer(Budget(usd=2, name="b"))
    assert decided(waiting).state == GRANTED


def test_a_new_process_finds_what_was_steered(open_sqlite: Callable[..., SqliteStore]) -> None:
    """Workers are replaced all the time: the one that comes with yesterday's configuration takes nothing back."""
    one = open_sqlite()
    one.declare(ONE)
    one.steer(Budget(usd=5, name="b"))
    one.close()
    late = open_sqlite()
    late.declare(ONE)
    known = late.known_terms("b")
    assert known is not None
    assert known.in_force.usd == 5
    granted(late, drawing(3 * DOLLAR))


def test_terms_survive_the_loss_of_their_file(open_sqlite: Callable[..., SqliteStore], path: str) -> None:
    """Somebody deletes the file: the process that uses it brings the terms along, with the money."""
    import os

    store = open_sqlite()
    store.declare(ONE)
    store.steer(Budget(usd=0.5, name="b"))
    for suffix in ("", "-wal", "-shm"):
        if os.path.exists(path + suffix):
            os.remove(path + suffix)
    assert refused(store, drawing(60 * CENT)).limit == 50 * CENT
    assert [terms.in_force.usd for terms in store.terms()] == [0.5]


def test_terms_that_cannot_be_kept_are_not_in_force(
    open_sqlite: Callable[..., SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspy_prod.errors import StoreUnavailableError

    store = open_sqlite()
    heard: list[Terms] = []
    store.on_terms(heard.append)
    store.declare(ONE)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(store._writer.tables, "commit", full)
        with pytest.raises(StoreUnavailableError):
            store.steer(Budget(usd=5, name="b"))
    until(lambda: store.flush(1))
    assert refused(store, drawing(2 * DOLLAR)).limit == DOLLAR
    known = store.known_terms("b")
    assert known is not None
    assert known.in_force.usd == 1
    assert [terms.in_force.usd for terms in heard] == [1]


def test_who_said_the_terms_finds_them_in_force_when_he_is_answered() -> None:
    """A call right after `lm.set_budget` went by the settings of before, now and then."""
    heard: list[bool] = []
    told: Future[Any] = Future()
    with TemporaryDirectory() as directory:
        tables = Tables(f"{directory}/state.db", "test", "owner", synchronous="NORMAL", max_records=None)
        clock = FakeClock()
        transactions = Transactions(
            tables, clock, 30.0, lambda *_: None, lambda _: heard.append(told.done()), Drawn(clock.time)
        )
        steer = (Transactions.answer, told, lambda core, _, now: core.steer(ONE, now))
        transactions.run([steer], lambda _: None)
        for callback in transactions.after:
            callback()
        tables.close()
    assert told.done()
    assert heard == [False]


@pytest.mark.parametrize("damaged", ["{", '{"usd": 5, "per": "week"}', "[]"])
def test_terms_that_cannot_be_read_stop_nobody(
    open_sqlite: Callable[..., SqliteStore], path: str, damaged: str
) -> None:
    """A row of another version, or a damaged one: every call of that budget was refused, and health raised."""
    store = open_sqlite()
    store.declare(ONE)
    store.flush()
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE budgets SET in_force = ?", (damaged,))
    other = open_sqlite()
    assert other.terms() == []
    granted(other, drawing(90 * CENT))
    assert refused(other, drawing(2 * DOLLAR)).limit == DOLLAR
    other.declare(ONE)
    assert [terms.in_force.usd for terms in other.terms()] == [1]
