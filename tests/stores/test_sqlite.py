"""What is special about the SQLite store: files, processes, crashes, broken disks, forks."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.base import GRANTED, REFUSED, AccountState, CachedAnswer, Settlement
from dspy_prod.stores.core import AdmissionCore
from dspy_prod.stores.sqlite import SqliteStore
from tests.stores import support
from tests.stores.support import (
    CENT,
    DAY,
    DOLLAR,
    FakeClock,
    ask,
    check_books,
    decided,
    granted,
    record,
    refused,
    settlement,
    until,
)

SPAWN = multiprocessing.get_context("spawn")
SERVER = multiprocessing.get_context("forkserver")
"""Fresh processes too, but dspy is imported once for all of them."""
SERVER.set_forkserver_preload(["tests.stores.support"])


@pytest.fixture
def open_sqlite(path: str) -> Iterator[Callable[..., SqliteStore]]:
    """Make SQLite stores on one file; all are closed at the end."""
    made: list[SqliteStore] = []

    def make(**options: Any) -> SqliteStore:
        store = SqliteStore(path, **options)
        made.append(store)
        return store

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(open_sqlite: Callable[..., SqliteStore]) -> SqliteStore:
    return open_sqlite()


class Problems(list[tuple[str, dict[str, Any]]]):
    """Collects what a store reports."""

    def __call__(self, name: str, details: dict[str, Any]) -> None:
        self.append((name, details))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self]


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


# -- the file ----------------------------------------------------------------------------------------------------------
def test_files_belong_to_their_owner_only(store: SqliteStore, path: str) -> None:
    granted(store, ask())
    files = sorted(Path(path).parent.iterdir())
    assert [file.name for file in files] == ["state.db", "state.db-shm", "state.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700


def test_a_directory_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    SqliteStore(str(tmp_path / "state.db")).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_importing_creates_nothing(tmp_path: Path) -> None:
    code = "import dspy_prod.stores.sqlite, dspy_prod.stores.registry"
    root = Path(support.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    SqliteStore("~/sub/state.db").close()
    assert (tmp_path / "sub" / "state.db").exists()


def test_state_survives_a_restart(open_sqlite: Callable[..., SqliteStore]) -> None:
    limit = RateLimit(rpm=1)
    first = open_sqlite()
    ticket = granted(first, ask(limit=limit))
    first.settle(ticket, settlement(ticket, CENT))
    first.close()
    second = open_sqlite()
    assert second.account("day").spent == CENT
    assert refused(second, ask(limit=limit, horizon=second.now() + 1.0)).reason == "rate_limited"
    check_books(second)


def test_a_limiter_is_shown_by_a_process_that_never_used_it(open_sqlite: Callable[..., SqliteStore]) -> None:
    first, second = open_sqlite(), open_sqlite()
    granted(first, ask(limit=RateLimit(rpm=10, concurrency=3)))
    snapshot = second.limiter("provider")
    assert snapshot is not None
    assert (snapshot.requests_max, snapshot.requests_available, snapshot.in_flight) == (10, 9, 1)


def test_the_threads_end_with_the_store(path: str) -> None:
    before = threading.active_count()
    store = SqliteStore(path)
    granted(store, ask())
    assert threading.active_count() == before + 1
    store.close()
    assert threading.active_count() == before


def test_a_forgotten_store_ends_its_thread_and_writes_what_was_posted(path: str) -> None:
    before = threading.active_count()
    store = SqliteStore(path)
    store.append(record("r"))
    del store
    gc.collect()
    until(lambda: threading.active_count() == before)
    with contextlib.closing(SqliteStore(path)) as again:
        assert [row.id for row in again.records()] == ["r"]


def test_a_closed_store_refuses_and_does_not_hang(store: SqliteStore) -> None:
    first = granted(store, ask(DOLLAR))
    waiting = store.admit(ask())
    local = store.admit(ask(budget=None))
    store.close()
    assert decided(waiting).state == REFUSED
    assert waiting.refusal is not None
    assert waiting.refusal.reason == "store_unavailable"
    assert refused(store, ask()).reason == "store_unavailable"
    store.settle(first, settlement(first, 0))
    store.settle(local, settlement(local, 0))
    store.append(record())
    assert store.flush(1.0)
    assert store.preview(ask())[1] is not None
    with pytest.raises(StoreUnavailableError):
        store.correct("r", 0)


def test_closing_writes_everything_that_was_posted(path: str) -> None:
    store = SqliteStore(path)
    for number in range(2_000):
        store.append(record(f"r{number}"))
    store.close()
    with contextlib.closing(SqliteStore(path)) as again:
        assert len(again.records()) == 2_000
        assert not os.path.exists(path + "-wal") or os.path.getsize(path + "-wal") == 0


@pytest.mark.parametrize(
    "context", [SPAWN, SERVER, multiprocessing.get_context("fork")], ids=["spawn", "forkserver", "fork"]
)
def test_a_process_that_ends_without_closing_writes_everything(path: str, context: Any) -> None:
    worker = context.Process(target=support.settle_and_return, args=(path,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == 0
    with contextlib.closing(SqliteStore(path)) as store:
        assert store.account("day") == AccountState(20 * CENT, 0, 0)
        check_books(store)


def test_an_interpreter_that_exits_without_closing_writes_everything(path: str) -> None:
    root = Path(support.__file__).parents[2]
    code = f"from tests.stores.support import settle_and_return; settle_and_return({path!r})"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    with contextlib.closing(SqliteStore(path)) as store:
        assert store.account("day") == AccountState(20 * CENT, 0, 0)


def test_old_records_go_and_their_sums_stay(open_sqlite: Callable[..., SqliteStore]) -> None:
    store = open_sqlite(max_records=1_000)
    for number in range(3_000):
        store.append(record(f"r{number}", started_at=DAY + number, cost_nano=1))
        if number % 200 == 0:
            store.flush(10)
    rows = store.records()
    assert 1_000 <= len(rows) <= 1_800
    assert rows[0].id == "r2999"
    assert sum(sums.attempts for _, _, sums in store.totals()) == 3_000


def test_endless_values_of_a_tag_are_summed_as_other(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspy_prod.stores import sqlite_ledger

    monkeypatch.setattr(sqlite_ledger, "MAX_VALUES_PER_DAY", 10)
    for number in range(50):
        store.append(record(f"r{number}", tags=(("request", str(number)),)))
        if number % 7 == 0:
            store.flush(10)
    values = {value: sums.attempts for _, value, sums in store.totals(dimension="tag:request")}
    assert len(values) <= 11
    assert values["(other)"] >= 40
    assert sum(values.values()) == 50


# -- processes ---------------------------------------------------------------------------------------------------------
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
    ticket = granted(store, ask(CENT))
    ready, results = SERVER.Queue(), SERVER.Queue()
    worker = SERVER.Process(target=support.wait_for_money, args=(path, ready, results))
    worker.start()
    assert ready.get(timeout=30) == "waiting"
    store.settle(ticket, settlement(ticket, 0))
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
    ticket = stores[1].admit(ask(0))
    stores[1].settle(ticket, settlement(late, 10 * CENT))
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
    ticket = granted(first, ask(40 * CENT))
    later = FakeClock()
    later.advance(60.0)
    second = SqliteStore(path, lease=10.0, clock=later)
    second.append(record())
    until(lambda: second.account("day").held == 0)
    assert second.account("day") == AccountState(40 * CENT, 0, 40 * CENT)
    clock.advance(60.0)
    first.settle(ticket, settlement(ticket, 15 * CENT))
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
            ticket = granted(store, ask(20 * CENT))
            store.settle(ticket, settlement(ticket, 20 * CENT))
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
            ticket = granted(store, ask(20 * CENT))
            store.flush(10)
            os.read(read, 1)  # the parent has closed everything
            store.settle(ticket, settlement(ticket, 20 * CENT))
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
            ticket = decided(store.admit(ask(1, budget=10**12)))
            store.settle(ticket, settlement(ticket, 1))
            written[0] += 1

    thread = threading.Thread(target=work)
    thread.start()
    children = []
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                ticket = granted(store, ask(1, budget=10**12))
                store.settle(ticket, settlement(ticket, 1))
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


# -- broken disks ------------------------------------------------------------------------------------------------------
def test_a_full_disk_refuses_admissions_and_loses_no_settlement(path: str) -> None:
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    tickets = [granted(store, ask(CENT)) for _ in range(20)]
    store.flush(10)
    connection = store._writer.tables.connection
    assert connection is not None
    with store._writer.io:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")
    big = "x" * 3_000
    while not problems:
        store.append(record(user=big))
        store.flush(1)
    assert problems.names == ["store_degraded"]
    refusal = refused(store, ask(CENT))
    assert refusal.reason == "store_unavailable"
    assert "full" in refusal.detail
    for ticket in tickets:
        store.settle(ticket, settlement(ticket, CENT))
    assert not store.flush(0.2)
    assert refused(store, ask(CENT)).reason == "store_unavailable"
    with store._writer.io:
        connection.execute("PRAGMA max_page_count=1000000")
    until(lambda: store.flush(1) and store.account("day") == AccountState(20 * CENT, 0, 0))
    granted(store, ask(CENT, accounts=("other",)))
    assert problems.names == ["store_degraded", "store_recovered"]
    assert len(store.records(user=big)) > 0
    check_books(store)
    store.close()


def test_what_waits_is_refused_when_the_disk_breaks(path: str) -> None:
    store = SqliteStore(path)
    granted(store, ask(DOLLAR))
    waiting = store.admit(ask(CENT))
    store.flush(10)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    from dspy_prod.stores import sqlite_transactions

    limit, sqlite_transactions.BUSY_LIMIT = sqlite_transactions.BUSY_LIMIT, 0.1  # type: ignore[misc]
    try:
        refusal = refused(store, ask(CENT, accounts=("other",)))
    finally:
        sqlite_transactions.BUSY_LIMIT = limit  # type: ignore[misc]
    assert "locked" in refusal.detail
    assert decided(waiting).state == REFUSED
    blocker.execute("ROLLBACK")
    blocker.close()
    until(lambda: store.flush(1) and decided(store.admit(ask(CENT, accounts=("other",)))).state == GRANTED)
    assert store.account("day").held == DOLLAR
    store.close()


def test_a_short_lock_of_another_program_is_waited_out(path: str) -> None:
    store = SqliteStore(path)
    store.flush(10)
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    ticket = store.admit(ask())
    store.flush(0.1)
    blocker.execute("ROLLBACK")
    blocker.close()
    assert decided(ticket).state == GRANTED
    store.close()


def test_a_deleted_file_is_made_again_with_what_is_known(path: str) -> None:
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    ticket = granted(store, ask(30 * CENT))
    store.settle(ticket, settlement(ticket, 30 * CENT))
    held = granted(store, ask(20 * CENT))
    store.flush(10)
    for suffix in ("", "-wal", "-shm"):
        os.unlink(path + suffix)
    assert refused(store, ask(71 * CENT)).spent == 30 * CENT
    assert store.account("day") == AccountState(30 * CENT, 20 * CENT, 0)
    store.settle(held, settlement(held, 5 * CENT))
    assert store.account("day") == AccountState(35 * CENT, 0, 0)
    assert problems.names == ["store_degraded"]
    store.close()
    with contextlib.closing(SqliteStore(path)) as again:
        assert again.account("day").spent == 35 * CENT


def test_a_deleted_directory_that_cannot_be_made_again_refuses(path: str) -> None:
    store = SqliteStore(path)
    ticket = granted(store, ask())
    directory = Path(path).parent
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    directory.write_text("a file is in the way")
    refusal = refused(store, ask())
    assert refusal.reason == "store_unavailable"
    assert path in refusal.detail
    store.settle(ticket, settlement(ticket, CENT))
    with pytest.raises(StoreUnavailableError):
        store.account("day")
    directory.unlink()
    until(lambda: store.flush(1))
    granted(store, ask())
    store.close()


def test_a_file_that_gets_corrupt_refuses_and_does_not_raise(path: str) -> None:
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    ticket = granted(store, ask())
    store.flush(10)
    with store._writer.io:
        store._writer.tables.close()
        for suffix in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + suffix)
        with open(path, "r+b") as file:
            file.write(b"this is not a database" * 100)
    assert refused(store, ask()).reason == "store_unavailable"
    store.settle(ticket, settlement(ticket, CENT))
    until(lambda: "store_degraded" in problems.names)
    assert store.cache_get(b"k") is None
    store.close()
    assert "operation_dropped" in problems.names


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_bytes(b"not a database at all" * 100), "not a SQLite database"),
        (lambda path: path.mkdir(), "cannot be used"),
        (lambda path: _make_foreign(path), "another program"),
        (lambda path: _make_newer(path), "upgrade dspy_prod"),
    ],
    ids=["garbage", "directory", "another program's", "newer"],
)
def test_a_file_that_cannot_be_used_is_named_with_the_remedy(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "state.db"
    spoil(path)
    with pytest.raises(StoreUnavailableError, match=message) as caught:
        SqliteStore(str(path))
    assert str(path) in str(caught.value)


def _make_foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE experiments (id)")


def _make_newer(path: Path) -> None:
    SqliteStore(str(path)).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreUnavailableError, match="memory://"):
        SqliteStore(str(blocked / "state.db"))
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        try:
            with pytest.raises(StoreUnavailableError, match="writable"):
                SqliteStore(str(tmp_path / "state.db"))
        finally:
            tmp_path.chmod(0o700)


def test_a_record_field_that_is_new_gets_a_column(path: str) -> None:
    SqliteStore(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE records DROP COLUMN trace_id")
    with contextlib.closing(SqliteStore(path)) as store:
        store.append(record("r", trace_id="t"))
        assert store.records()[0].trace_id == "t"


def test_values_that_no_database_can_carry_stop_nobody(path: str) -> None:
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    strange = ask(CENT, accounts=("user|\ud800",), user="\ud800", tags=(("\udfff", "a"),))
    others = [granted(store, ask(CENT)) for _ in range(3)]
    ticket = granted(store, strange)
    for other in others:
        store.settle(other, settlement(other, CENT))
    store.settle(ticket, settlement(ticket, CENT, tokens=2**70))
    store.append(record("odd", user=object()))
    assert store.flush(10)
    assert store.account("day").spent == 3 * CENT
    rows = {row.id: row for row in store.records()}
    assert len(rows) == 5
    assert rows[strange.id].user == "?"
    assert rows[strange.id].input_tokens == 2**53
    assert store.account("user|?").spent == CENT
    assert granted(store, ask(CENT)).state == GRANTED
    assert problems == []
    store.close()


# -- the response cache ------------------------------------------------------------------------------------------------
def answer(text: str = "hello", expires_at: float = 1e18) -> CachedAnswer:
    return CachedAnswer(text.encode(), expires_at, expires_at)


def put(store: SqliteStore, key: str, value: CachedAnswer, entries: int = 100, size: int = 10_000) -> None:
    store.cache_put(key.encode(), value, max_entries=entries, max_bytes=size)


def test_an_answer_is_found_at_once_and_after_a_restart(path: str) -> None:
    store = SqliteStore(path)
    put(store, "k", answer())
    assert store.cache_get(b"k") == answer()
    store.flush(10)
    assert store.cache_get(b"k") == answer()
    assert store.cache_get(b"other") is None
    store.close()
    with contextlib.closing(SqliteStore(path)) as again:
        assert again.cache_get(b"k") == answer()
        assert again.cache_size() == (1, 5)


def test_the_cache_is_bounded_and_evicts_what_was_not_used_for_longest(path: str) -> None:
    clock = FakeClock()
    store = SqliteStore(path, clock=clock)
    for number in range(5):
        put(store, f"k{number}", answer(), entries=5)
        store.flush(10)
        clock.advance(100.0)
    assert store.cache_get(b"k0") == answer()
    put(store, "k5", answer(), entries=5)
    store.flush(10)
    assert store.cache_size() == (5, 25)
    assert store.cache_get(b"k0") is not None
    assert store.cache_get(b"k1") is None
    put(store, "k6", answer("x" * 20), entries=5, size=30)
    store.flush(10)
    entries, size = store.cache_size()
    assert size <= 30
    assert store.cache_get(b"k6") is not None
    put(store, "huge", answer("x" * 31), entries=5, size=30)
    store.flush(10)
    assert store.cache_get(b"huge") is None
    assert store.cache_size() == (entries, size)
    put(store, "k6", answer("x"), entries=5, size=30)
    store.flush(10)
    assert store.cache_size() == (entries, size - 19)
    store.close()


def test_two_processes_keep_the_bounds_together(open_sqlite: Callable[..., SqliteStore]) -> None:
    one, other = open_sqlite(), open_sqlite()
    for number in range(20):
        put(one if number % 2 else other, f"k{number}", answer(), entries=7)
        one.flush(10)
        other.flush(10)
    assert one.cache_size() == other.cache_size() == (7, 35)
    connection = one._writer.tables.connection
    assert connection is not None
    assert connection.execute("SELECT count(*), sum(size) FROM cache").fetchone() == (7, 35)


def test_a_corrupt_row_is_a_miss(store: SqliteStore, path: str) -> None:
    put(store, "short", answer())
    put(store, "text", answer())
    put(store, "time", answer())
    store.flush(10)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE cache SET value = x'00' WHERE key = CAST('short' AS BLOB)")
        connection.execute("UPDATE cache SET value = 'hello' WHERE key = CAST('text' AS BLOB)")
        connection.execute("UPDATE cache SET expires_at = 'soon' WHERE key = CAST('time' AS BLOB)")
    assert [store.cache_get(key) for key in (b"short", b"text", b"time")] == [None, None, None]


def test_clearing_the_cache_clears_this_namespace_only(open_sqlite: Callable[..., SqliteStore]) -> None:
    one, other = open_sqlite(namespace="one"), open_sqlite(namespace="other")
    for each in (one, other):
        put(each, "k", answer())
        each.flush(10)
    put(one, "posted", answer())
    one.cache_clear()
    assert (one.cache_get(b"k"), one.cache_get(b"posted"), one.cache_size()) == (None, None, (0, 0))
    assert other.cache_get(b"k") == answer()


def test_what_can_never_be_served_again_is_swept(path: str) -> None:
    clock = FakeClock()
    store = SqliteStore(path, clock=clock)
    put(store, "old", answer(expires_at=DAY + 10.0))
    put(store, "new", answer())
    wanted = ask()
    wanted.accounts = (wanted.accounts[0]._replace(ends_in=10.0),)
    ticket = granted(store, wanted)
    store.settle(ticket, settlement(ticket, CENT))
    store.flush(10)
    clock.advance(8_000.0)
    transactions = store._writer._transactions
    transactions._sweep_at = transactions._reap_at = 0.0
    store.append(record())
    store.flush(10)
    assert store.cache_size() == (1, 5)
    assert store.cache_get(b"new") is not None
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM accounts").fetchone() == (0,)
    store.close()


# -- asks that need no disk --------------------------------------------------------------------------------------------
def test_an_ask_without_money_and_shared_limit_is_decided_at_once(store: SqliteStore) -> None:
    for limit in (None, RateLimit()):
        ticket = store.admit(ask(budget=None, limit=limit))
        assert ticket.state == GRANTED
        store.settle(ticket, settlement(ticket, CENT))
    assert store.holds() == 0
    assert len(store.records()) == 2


def test_a_pause_is_known_with_and_without_a_budget(store: SqliteStore) -> None:
    limit = RateLimit()
    store.throttled("provider", limit, 30.0)
    waiting = [store.admit(ask(budget=budget, limit=limit)) for budget in (None, DOLLAR)]
    store.flush(10)
    assert store.waiting() == 2
    snapshot = store.limiter("provider")
    assert snapshot is not None
    assert snapshot.waiting == 2
    for ticket in waiting:
        assert store.withdraw(ticket)
    assert store.waiting() == 0


# -- age ---------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_reading_and_paying_do_not_slow_down_with_a_million_rows() -> None:
    from benchmarks.ledger import read_times

    young, old = read_times(1_000), read_times(1_000_000)
    for name in ("today_us", "week_us", "account_us", "holds_us", "latest_50_records_us", "pair_us"):
        assert old[name] < 5 * young[name] + 200, (name, young, old)


# -- threads, loops, listeners -----------------------------------------------------------------------------------------
def test_tasks_of_an_event_loop_wait_without_blocking_it(store: SqliteStore) -> None:
    async def call() -> None:
        ticket = store.admit(ask(CENT))
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        if ticket.attach(lambda: loop.call_soon_threadsafe(done.set)):
            await done.wait()
        assert ticket.state == GRANTED, ticket.refusal
        await asyncio.sleep(0)
        store.settle(ticket, settlement(ticket, CENT // 2))

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*(call() for _ in range(190))), 30)

    asyncio.run(main())
    assert store.account("day") == AccountState(190 * CENT // 2, 0, 0)
    check_books(store)


def test_an_operation_that_cannot_be_done_harms_no_other(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, for a mistake in the core: it is dropped and reported, and the money stays charged."""
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    tickets = [granted(store, ask(CENT)) for _ in range(10)]
    core = store._writer._core
    real = core.settle

    def settle(done: Settlement, now: float) -> None:
        if done.id == tickets[4].ask.id and done.record is not None:
            raise ZeroDivisionError("a mistake")
        real(done, now)

    monkeypatch.setattr(core, "settle", settle)
    for ticket in tickets:
        store.settle(ticket, settlement(ticket, CENT))
    assert store.flush(10)
    until(lambda: store.account("day") == AccountState(10 * CENT, 0, 0))
    assert len(store.records()) == 9
    until(lambda: "operation_dropped" in problems.names)
    granted(store, ask(CENT))
    store.close()


def test_a_batch_that_cannot_be_written_is_done_one_by_one(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    store.flush(10)
    tables = store._writer.tables
    real = tables.write

    def write(core: AdmissionCore, now: float) -> list[CallRecord]:
        if any(row.id == "bad" for row in core.appended):
            raise ZeroDivisionError("a mistake")
        return real(core, now)

    monkeypatch.setattr(tables, "write", write)
    with store._writer.io:
        for number in range(20):
            store.append(record(f"r{number}" if number != 7 else "bad"))
    assert store.flush(10)
    until(lambda: len(store.records()) == 19)
    assert problems.names.count("operation_dropped") == 1
    store.close()


def test_a_listener_that_fails_or_asks_the_store_is_told_so(path: str) -> None:
    answers: list[str] = []

    def listener(name: str, details: dict[str, Any]) -> None:
        try:
            store.limiter("provider")
        except StoreUnavailableError as error:
            answers.append(str(error))
        store.flush(1)
        raise RuntimeError("in a listener")

    store = SqliteStore(path, on_problem=listener, clock=(clock := FakeClock()))
    granted(store, ask(CENT, lease=10.0))
    clock.advance(20.0)
    store.flush(10)
    until(lambda: bool(answers))
    assert "may not wait" in answers[0]
    granted(store, ask(CENT))
    store.close()


def test_after_the_end_of_the_interpreter_began_nothing_hangs(path: str) -> None:
    """A handler that runs after this library's own finds the store closed, not silent."""
    root = Path(support.__file__).parents[2]
    code = f"""
import atexit
def late():
    from tests.stores.support import ask, decided, granted, refused
    print(refused(store, ask()).reason, refused(other, ask()).reason)
atexit.register(late)
from tests.stores.support import SqliteStore, ask, granted, settlement
store, other = SqliteStore({path!r}), SqliteStore({path!r}, "other")
ticket = granted(store, ask())
store.settle(ticket, settlement(ticket, 5))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("store_unavailable store_unavailable\n", "")
    with contextlib.closing(SqliteStore(path)) as store:
        assert store.account("day").spent == 5
