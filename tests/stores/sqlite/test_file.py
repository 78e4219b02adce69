"""The SQLite store: its file, its thread, its end, and what it does without the disk."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.options import RateLimit
from dspy_prod.records import CallRecord
from dspy_prod.stores.admission.core import AdmissionCore
from dspy_prod.stores.base import GRANTED, REFUSED, WITHDRAWN, AccountState, Settlement
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.sqlite.tables import Tables
from tests.stores import support
from tests.stores.support import (
    CENT,
    DAY,
    DOLLAR,
    FakeClock,
    Problems,
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


def test_files_belong_to_their_owner_only(sqlite_store: SqliteStore, path: str) -> None:
    granted(sqlite_store, ask())
    files = sorted(Path(path).parent.iterdir())
    assert [file.name for file in files] == ["state.db", "state.db-shm", "state.db-wal"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(Path(path).parent.stat().st_mode) == 0o700


def test_a_directory_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    SqliteStore(str(tmp_path / "state.db")).close()
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_connection_that_cannot_be_made_ready_is_not_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next use found it half attached, and failed at whatever was missing."""
    tables = Tables(path, "ns", "owner", synchronous="NORMAL", max_records=None)

    def attach(connection: sqlite3.Connection, ns: int) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(tables.cache, "attach", attach)
        with pytest.raises(sqlite3.OperationalError):
            tables.open()
    assert tables.connection is None
    assert tables.open() is tables.connection
    tables.close()


def test_importing_creates_nothing(tmp_path: Path) -> None:
    code = "import dspy_prod.stores.sqlite, dspy_prod.stores.opening"
    root = Path(support.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    SqliteStore("~/sub/state.db").close()
    assert (tmp_path / "sub" / "state.db").exists()


def test_a_path_may_hold_any_character(tmp_path: Path) -> None:
    path = str(tmp_path / "a b?c#d%20e" / "state.db")
    with contextlib.closing(SqliteStore(path)) as store:
        granted(store, ask())
        assert store.holds() == 1
    assert os.path.exists(path)


def test_more_accounts_than_fit_in_memory_are_read_again(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspy_prod.stores.durable.transactions.MAX_ACCOUNTS", 3)
    for _ in range(2):
        for name in "abcdef":
            ticket = granted(sqlite_store, ask(CENT, accounts=(name,)))
            sqlite_store.settle(ticket, settlement(ticket, CENT))
    assert {sqlite_store.account(name).spent for name in "abcdef"} == {2 * CENT}
    assert len(sqlite_store._writer._core.accounts.entries) <= 3


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
    before = set(threading.enumerate())
    store = SqliteStore(path)
    granted(store, ask())
    (writer,) = set(threading.enumerate()) - before
    store.close()
    assert not writer.is_alive()


def test_a_forgotten_store_ends_its_thread_and_writes_what_was_posted(path: str) -> None:
    before = set(threading.enumerate())
    store = SqliteStore(path)
    store.append(record("r"))
    (writer,) = set(threading.enumerate()) - before
    del store
    gc.collect()
    until(lambda: not writer.is_alive())
    with contextlib.closing(SqliteStore(path)) as again:
        assert [row.id for row in again.records()] == ["r"]


def test_a_closed_store_refuses_and_does_not_hang(sqlite_store: SqliteStore) -> None:
    first = granted(sqlite_store, ask(DOLLAR))
    waiting = sqlite_store.admit(ask())
    local = sqlite_store.admit(ask(budget=None))
    sqlite_store.close()
    assert decided(waiting).state == REFUSED
    assert waiting.refusal is not None
    assert waiting.refusal.reason == "store_unavailable"
    assert refused(sqlite_store, ask()).reason == "store_unavailable"
    sqlite_store.settle(first, settlement(first, 0))
    sqlite_store.settle(local, settlement(local, 0))
    sqlite_store.append(record())
    assert sqlite_store.flush(1.0)
    assert sqlite_store.preview(ask())[1] is not None
    with pytest.raises(StoreUnavailableError):
        sqlite_store.correct("r", 0)


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


def test_endless_values_of_a_tag_are_summed_as_other(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspy_prod.stores.sqlite import ledger as sqlite_ledger

    monkeypatch.setattr(sqlite_ledger, "MAX_VALUES_PER_DAY", 10)
    for number in range(50):
        sqlite_store.append(record(f"r{number}", tags=(("request", str(number)),)))
        if number % 7 == 0:
            sqlite_store.flush(10)
    values = {value: sums.attempts for _, value, sums in sqlite_store.totals(dimension="tag:request")}
    assert len(values) <= 11
    assert values["(other)"] >= 40
    assert sum(values.values()) == 50


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
        connection.execute("DROP INDEX records_trace_id")
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
    assert rows[strange.id].user == r"\ud800"
    assert rows[strange.id].input_tokens == 2**53
    assert store.account(r"user|\ud800").spent == CENT
    assert granted(store, ask(CENT)).state == GRANTED
    assert problems == []
    store.close()


def test_an_ask_without_money_and_shared_limit_is_decided_at_once(sqlite_store: SqliteStore) -> None:
    for limit in (None, RateLimit()):
        ticket = sqlite_store.admit(ask(budget=None, limit=limit))
        assert ticket.state == GRANTED
        sqlite_store.settle(ticket, settlement(ticket, CENT))
    assert sqlite_store.holds() == 0
    assert len(sqlite_store.records()) == 2


def test_a_pause_is_known_with_and_without_a_budget(sqlite_store: SqliteStore) -> None:
    limit = RateLimit()
    sqlite_store.throttled("provider", limit, 30.0)
    waiting = [sqlite_store.admit(ask(budget=budget, limit=limit)) for budget in (None, DOLLAR)]
    sqlite_store.flush(10)
    assert sqlite_store.waiting() == 2
    snapshot = sqlite_store.limiter("provider")
    assert snapshot is not None
    assert snapshot.waiting == 2
    for ticket in waiting:
        assert sqlite_store.withdraw(ticket)
    assert sqlite_store.waiting() == 0


def test_tasks_of_an_event_loop_wait_without_blocking_it(sqlite_store: SqliteStore) -> None:
    async def call() -> None:
        ticket = sqlite_store.admit(ask(CENT))
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def woken() -> None:
            loop.call_soon_threadsafe(done.set)

        if ticket.attach(woken):
            await done.wait()
        assert ticket.state == GRANTED, ticket.refusal
        await asyncio.sleep(0)
        sqlite_store.settle(ticket, settlement(ticket, CENT // 2))

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*(call() for _ in range(190))), 30)

    asyncio.run(main())
    assert sqlite_store.account("day") == AccountState(190 * CENT // 2, 0, 0)
    check_books(sqlite_store)


@pytest.mark.parametrize("posted", [True, False], ids=["open", "closing"])
def test_a_withdrawal_between_commit_and_telling_gives_everything_back(path: str, posted: bool) -> None:
    """The grant is on disk, the caller does not know it yet and leaves."""
    store = SqliteStore(path)
    store.flush(10)
    with contextlib.closing(sqlite3.connect(path)) as watch:
        with store._writer.publishing:
            ticket = store.admit(ask())
            until(lambda: watch.execute("SELECT count(*) FROM holds").fetchone() == (1,))
            ticket.state = WITHDRAWN
        if posted:
            store._mailbox.post((Transactions.withdraw, ticket, None))
        until(lambda: store.holds() == 0)
    assert store.account("day") == AccountState()
    assert store.records() == []
    store.close()


def test_an_operation_that_cannot_be_done_harms_no_other(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Say, for a mistake in the core: it is dropped and reported, and the money stays charged."""
    problems = Problems()
    store = SqliteStore(path, on_problem=problems)
    tickets = [granted(store, ask(CENT)) for _ in range(10)]
    core = store._writer._core
    real = core.settle

    def settle(done: Settlement, now: float) -> None:
        if done.id == tickets[4].id and done.record is not None:
            raise ZeroDivisionError("a mistake")
        real(done, now)

    monkeypatch.setattr(core, "settle", settle)
    for ticket in tickets:
        store.settle(ticket, settlement(ticket, CENT))
    until(lambda: store.flush(10))  # False at once while the mistaken one is being found
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
    until(lambda: store.flush(10))  # False at once while the bad one is being found
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


@pytest.mark.slow
def test_reading_and_paying_do_not_slow_down_with_a_million_rows() -> None:
    from benchmarks.ledger import one_by_one, read_times

    young, old = (read_times(rows, one_by_one) for rows in (1_000, 1_000_000))
    for name in ("today_us", "week_us", "account_us", "holds_us", "latest_50_records_us", "pair_us"):
        assert old[name] < 5 * young[name] + 200, (name, young, old)
