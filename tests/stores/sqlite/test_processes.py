"""The SQLite store shared by processes: budgets, limits, deaths."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import pytest

from dspy_prod.options import RateLimit
from dspy_prod.stores.base import GRANTED, PENDING, AccountState
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores import support
from tests.stores.support import (
    CENT,
    DOLLAR,
    FakeClock,
    Problems,
    ask,
    check_books,
    granted,
    record,
    settlement,
    until,
)

SPAWN = multiprocessing.get_context("spawn")
SERVER = multiprocessing.get_context("forkserver")
"""Fresh processes too, but dspy is imported once for all of them."""
SERVER.set_forkserver_preload(["tests.stores.support"])


def run_processes(target: Callable[..., None], arguments: tuple[Any, ...], count: int) -> list[Any]:
    """Run `count` processes that begin together; what each put into its results."""
    barrier, results = SERVER.Barrier(count), SERVER.Queue()
    workers = [SERVER.Process(target=target, args=(*arguments, barrier, results)) for _ in range(count)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_processes_spend_exactly_the_budget(path: str, count: int) -> None:
    results = run_processes(support.spend_all, (path,), count)
    assert sum(spent for spent, _ in results) == DOLLAR
    assert {reason for _, reason in results} == {"budget_exceeded"}
    with contextlib.closing(SqliteStore(path)) as store:
        assert store.account("day") == AccountState(DOLLAR, 0, 0)
        assert len(store.records()) == 100
        check_books(store)


def test_processes_that_pay_less_than_reserved_never_exceed_the_budget_and_use_it(path: str) -> None:
    spent = sum(run_processes(support.spend_less, (path,), 4))
    assert 0.99 * DOLLAR <= spent <= DOLLAR
    with contextlib.closing(SqliteStore(path)) as store:
        assert store.account("day") == AccountState(spent, 0, 0)
        check_books(store)


def test_processes_share_a_limit_of_requests_per_minute(path: str) -> None:
    sent = sorted(at for times in run_processes(support.send_all, (path, 60), 2) for at in times)
    assert len(sent) == 60
    assert sent[-1] - sent[0] < 50.0


def test_money_freed_by_another_process_is_noticed(open_sqlite: Callable[..., SqliteStore], path: str) -> None:
    store = open_sqlite()
    reservation = granted(store, ask(CENT))
    ready, results = SERVER.Queue(), SERVER.Queue()
    worker = SERVER.Process(target=support.wait_for_money, args=(path, ready, results))
    worker.start()
    assert ready.get(timeout=30) == "waiting"
    store.settle(reservation, settlement(reservation, 0))
    assert results.get(timeout=10) == GRANTED
    worker.join(30)
    assert store.account("day").spent == DOLLAR


def test_the_holds_of_a_killed_process_are_charged_in_full_exactly_once(path: str) -> None:
    ready = SERVER.Queue()
    worker = SERVER.Process(target=support.hold_and_hang, args=(path, 0.5, 40 * CENT, ready))
    worker.start()
    id = ready.get(timeout=30)
    problems = Problems()
    stores = [SqliteStore(path, lease=0.5, on_problem=problems) for _ in range(3)]
    for store in stores:
        store.append(record())
        store.flush(10)
    assert worker.pid is not None
    time.sleep(0.7)
    assert stores[0].account("day") == AccountState(0, 40 * CENT, 0)  # alive: its lease is renewed
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    until(lambda: stores[0].account("day").held == 0)
    time.sleep(0.5)  # time enough for the others to do it again
    for store in stores:
        assert store.account("day") == AccountState(40 * CENT, 0, 40 * CENT)
        assert store.holds() == 0
        check_books(store)
    (row,) = stores[0].records(outcome="abandoned")
    assert (row.id, row.cost_nano, row.estimated, row.user) == (id, 40 * CENT, True, "dead")
    assert problems.names == ["hold_abandoned"]
    # The answer comes all the same, say through another process: it replaces the charge.
    late = ask(40 * CENT, id=id)
    reservation = stores[1].admit(ask(0))
    stores[1].settle(reservation, settlement(late, 10 * CENT))
    assert stores[2].flush(10)
    assert stores[1].account("day") == AccountState(10 * CENT, 0, 0)
    assert stores[1].records(id=id)[0].outcome == "ok"
    check_books(stores[1])
    for store in stores:
        store.close()


def test_a_process_that_was_thought_dead_settles_late_and_charges_once(path: str) -> None:
    """Suspended beyond its lease: another process charged its hold; its own settlement then replaces that."""
    clock = FakeClock()
    first = SqliteStore(path, lease=10.0, clock=clock)
    reservation = granted(first, ask(40 * CENT))
    later = FakeClock()
    later.advance(60.0)
    second = SqliteStore(path, lease=10.0, clock=later)
    second.append(record())
    until(lambda: second.account("day").held == 0)
    assert second.account("day") == AccountState(40 * CENT, 0, 40 * CENT)
    clock.advance(60.0)
    first.settle(reservation, settlement(reservation, 15 * CENT))
    assert first.account("day") == AccountState(15 * CENT, 0, 0)
    granted(first, ask(CENT))
    assert first.holds() == 1
    check_books(first)
    first.close()
    second.close()


def test_killing_a_storm_of_settlements_leaves_a_consistent_ledger(path: str) -> None:
    known: set[str] = set()
    for _ in range(3):
        ready = SERVER.Queue()
        worker = SERVER.Process(target=support.storm, args=(path, ready))
        worker.start()
        for _ in range(3):
            known.update(ready.get(timeout=30))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with contextlib.closing(SqliteStore(path, lease=0.5)) as store:
        store.append(record())
        rows = store.records()
        assert known <= {row.id for row in rows if row.outcome == "ok"}
        connection = sqlite3.connect(path)
        held = connection.execute("SELECT coalesce(sum(amount), 0) FROM holds").fetchone()[0]
        state = store.account("day")
        if held == state.held:  # nothing was reaped between the two looks
            assert state.spent == sum(row.cost_nano or 0 for row in store.records())
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
        until(lambda: store.account("day").held == 0)
        assert store.holds() == 0
        check_books(store)


def test_a_pause_that_is_lifted_in_one_process_ends_in_the_others(open_sqlite: Callable[..., SqliteStore]) -> None:
    """The pause stands in the file: whoever waits in another process goes, too."""
    one, other = open_sqlite(), open_sqlite()
    limit = RateLimit(rpm=60_000)
    granted(one, ask(limit=limit))
    one.throttled("provider", limit, 250.0)
    one.flush(10)
    waiting = one.admit(ask(limit=limit, horizon=one.now() + 1_000.0))
    one.flush(10)
    assert waiting.state == PENDING
    assert other.lift("provider")
    until(lambda: waiting.state == GRANTED)
