"""Processes that share a SQLite store and are killed at random: the books balance whatever happens."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import time

import pytest

from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores import support
from tests.stores.support import DOLLAR, check_books, until

SERVER = multiprocessing.get_context("forkserver")


@pytest.mark.chaos
def test_random_kills_never_exceed_the_budget_and_never_lose_a_charge(path: str) -> None:
    random.seed(os.environ.get("CHAOS_SEED", "1"))
    SqliteStore(path).close()
    watch = sqlite3.connect(path)

    def worker() -> multiprocessing.Process:
        process = SERVER.Process(target=support.churn, args=(path,))
        process.start()
        return process  # type: ignore[return-value]

    workers = [worker() for _ in range(4)]
    deadline = time.monotonic() + 15.0
    kills = 0
    while time.monotonic() < deadline:
        time.sleep(random.uniform(0.05, 0.4))
        (row,) = watch.execute("SELECT coalesce(sum(spent + held), 0), coalesce(max(spent + held), 0) FROM accounts")
        assert row[1] <= 1000 * DOLLAR
        victim = random.randrange(len(workers))
        pid = workers[victim].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        workers[victim].join()
        workers[victim] = worker()
        kills += 1
    for process in workers:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert kills > 20
    assert watch.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    watch.close()
    with contextlib.closing(SqliteStore(path, lease=0.5)) as store:
        until(lambda: store.holds() == 0, 20.0)
        check_books(store, ("day", "other"))
        records = store.records()
        assert {row.outcome for row in records} == {"ok", "abandoned", "cached"}
        assert len({row.id for row in records}) == len(records)
        assert sum(row.cached for row in records) == sum(sums.cached for _, _, sums in store.totals())
