"""The SQLite store in a forked process."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import threading

from dspy_prod.stores.base import REFUSED, AccountState, CachedAnswer
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import (
    CENT,
    ask,
    check_books,
    decided,
    granted,
    settlement,
    until,
)


def test_a_child_of_a_fork_has_a_store_of_its_own(path: str) -> None:
    store = SqliteStore(path)
    mine = granted(store, ask(30 * CENT))
    waiting = store.admit(ask(90 * CENT))
    store.flush(10)
    store.cache_put(b"k", CachedAnswer(b"{}", 1e18, 1e18), max_entries=10, max_bytes=1000)
    store.flush(10)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert waiting.state == REFUSED  # nobody would ever decide it here
            assert store.account("day") == AccountState(0, 30 * CENT, 0)
            assert store.cache_get(b"k") is not None
            reservation = granted(store, ask(20 * CENT))
            store.settle(reservation, settlement(reservation, 20 * CENT))
            store.settle(mine, settlement(mine, 30 * CENT))  # the parent's: not ours to settle
            assert store.account("day") == AccountState(20 * CENT, 30 * CENT, 0)
            store.close()
            code = 0
        except BaseException:
            logging.getLogger("dspy_prod").exception("in the child")
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert store.account("day") == AccountState(20 * CENT, 30 * CENT, 0)
    store.settle(mine, settlement(mine, 0))
    assert store.account("day") == AccountState(20 * CENT, 0, 0)
    assert decided(waiting).state == REFUSED  # 20 + 90 cents are more than a dollar
    check_books(store)
    store.close()


def test_the_parent_of_a_fork_may_end_first(path: str) -> None:
    """SQLite's own bookkeeping is inherited and its locks are not: what the child writes must not get lost."""
    store = SqliteStore(path)
    granted(store, ask(CENT))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            reservation = granted(store, ask(20 * CENT))
            store.flush(10)
            os.read(read, 1)  # the parent has closed everything
            store.settle(reservation, settlement(reservation, 20 * CENT))
            store.close()
            code = 0
        finally:
            os._exit(code)
    until(lambda: store.account("day").held == 21 * CENT)
    store.close()
    os.write(write, b".")
    assert os.waitpid(pid, 0)[1] == 0
    with contextlib.closing(SqliteStore(path)) as again:
        assert again.account("day").spent == 20 * CENT


def test_forking_while_threads_write(path: str) -> None:
    store = SqliteStore(path)
    stop = threading.Event()
    written = [0]

    def work() -> None:
        while not stop.is_set():
            reservation = decided(store.admit(ask(1, budget=10**12)))
            store.settle(reservation, settlement(reservation, 1))
            written[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    children = []
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                reservation = granted(store, ask(1, budget=10**12))
                store.settle(reservation, settlement(reservation, 1))
                store.close()
                code = 0
            finally:
                os._exit(code)
        children.append(pid)
    stop.set()
    thread.join(30)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 5
    assert store.account("day") == AccountState(written[0] + 5, 0, 0)
    check_books(store)
    store.close()


def test_forking_while_stores_come_and_go(path: str) -> None:
    """Half of the children hung in their first `connect`: SQLite was at work for a store that nobody had any more,
    or had only just made, and what it had locked stayed locked."""
    stop = threading.Event()

    def come_and_go(name: str) -> None:
        while not stop.is_set():
            store: SqliteStore | None = SqliteStore(f"{path}-{name}")
            assert store is not None
            assert store.cache_get(b"k") is None
            assert store.flush(10)
            store = None
            gc.collect(0)

    threads = [threading.Thread(target=come_and_go, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    ends = []
    for number in range(6):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process that hangs in a lock of C code
            signal.alarm(20)
            with contextlib.suppress(BaseException), contextlib.closing(SqliteStore(path)) as store:
                granted(store, ask(1, budget=10**12))
                os._exit(0)
            os._exit(1)
        ends.append(os.waitpid(pid, 0)[1])
        if ends[-1]:
            break
        stop.wait(0.003 * (number % 3))
    stop.set()
    for thread in threads:
        thread.join(30)
    assert ends == [0] * 6
