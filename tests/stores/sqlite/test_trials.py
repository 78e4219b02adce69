"""Experiments in a SQLite file: processes that share it, deaths, broken disks, files of earlier releases."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from dspy_prod.stores.durable import posting
from dspy_prod.stores.sqlite import trial_forgetting
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.sqlite.tables import Tables
from dspy_prod.stores.sqlite.trial_tables import LATER, PARTS, TABLES, advance, read_matured, read_seen
from dspy_prod.stores.sqlite.trial_writing import write_batch
from dspy_prod.stores.trial_terms import lease_of
from dspy_prod.stores.trials import Call, Calls, Decision, Exposure, Lease, Outcome, Tally, Values
from tests.stores import trial_support
from tests.stores.sqlite.test_processes import SERVER, run_processes
from tests.stores.support import CENT, FakeClock, ask, granted, settlement, until
from tests.stores.trial_support import call, expose, made, numbers, outcome


def check_units(store: SqliteStore) -> int:
    """Numbers without a gap, each unit once, counts that agree; how many units there are."""
    units = store.trials.tally("e").units
    with contextlib.closing(sqlite3.connect(store._path)) as file:
        assert file.execute("SELECT count(*), max(number), count(DISTINCT unit) FROM trial_units").fetchone() == (
            (units, units, units) if units else (0, None, 0)
        )
        arms = Counter(dict(file.execute("SELECT arm, count(*) FROM trial_units GROUP BY arm").fetchall()))
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    first: Counter[str] = Counter()
    for arm in store.trials.counts("e"):
        first[arm.arm] += arm.first
    assert +first == arms
    return units


# -- processes ---------------------------------------------------------------------------------------------------------
def test_processes_that_expose_the_same_units_count_each_once(path: str) -> None:
    assert run_processes(trial_support.expose_all, (path, 3_000), 2)[-1] == 3_000
    with contextlib.closing(SqliteStore(path)) as store:
        assert check_units(store) == 3_000
        assert store.trials.tally("e") == Tally(3_000)
        with contextlib.closing(sqlite3.connect(path)) as file:
            found = file.execute("SELECT count(*), sum(calls), sum(list_nano) FROM trial_calls").fetchone()
            assert found == (3_000, 6_000, 6_000)
            assert file.execute("SELECT count(*) FROM trial_values").fetchone() == (3_000,)


def test_of_processes_that_start_the_same_experiment_one_does(path: str) -> None:
    found = run_processes(trial_support.change_once, (path,), 3)
    assert [sum(each) for each in zip(*found, strict=True)] == [1, 1]


def test_a_killed_process_loses_the_last_moment_and_counts_nothing_twice(path: str) -> None:
    told = 0
    for _ in range(2):  # the second one begins with the units of the first
        ready = SERVER.Queue()  # who is killed may hold its lock
        worker = SERVER.Process(target=trial_support.expose_until_killed, args=(path, ready), daemon=True)
        worker.start()
        for _ in range(3):
            told = max(told, ready.get(timeout=60))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    with contextlib.closing(SqliteStore(path)) as store:
        assert check_units(store) >= told
        with contextlib.closing(sqlite3.connect(path)) as file:
            found = file.execute("SELECT max(calls), sum(calls) - count(*) >= ? FROM trial_calls", (told,)).fetchone()
            assert found == (2, 1), "each process made one call for a unit"


def test_the_lease_of_a_killed_process_is_free_at_once(path: str) -> None:
    ready = SERVER.Queue()
    worker = SERVER.Process(target=trial_support.hold_lease, args=(path, 3_600.0, ready), daemon=True)
    worker.start()
    held = ready.get(timeout=60)
    with contextlib.closing(SqliteStore(path)) as store:
        assert store.trials.lease("controller", "heir", 60.0) == held == Lease("dead", held.until)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        assert store.trials.lease("controller", "heir", 60.0).holder == "heir"
        assert store.trials.lease("controller", "other", 60.0).holder == "heir"


def test_who_was_thought_dead_cannot_write_over_what_its_heir_saved(open_sqlite: Callable[..., SqliteStore]) -> None:
    clock = FakeClock()
    slow, heir = open_sqlite(clock=clock), open_sqlite(clock=clock)
    made(slow)
    assert slow.trials.lease("e", "slow", 10.0).holder == "slow"
    assert slow.trials.save("e", "first", 0)
    clock.advance(11.0)
    assert heir.trials.lease("e", "heir", 10.0).holder == "heir"
    assert heir.trials.save("e", "second", 1)
    assert not slow.trials.save("e", "third", 1)
    assert slow.trials.checkpoint("e") == heir.trials.checkpoint("e")


def test_what_one_process_was_told_is_final_for_all(open_sqlite: Callable[..., SqliteStore]) -> None:
    clock = FakeClock()
    one, other = open_sqlite(clock=clock), open_sqlite(clock=clock)
    made(one)
    at = expose(one, "u1")
    outcome(one, "u1", 1.0)
    assert one.flush(10)
    clock.advance(200.0)
    (told,) = other.trials.matured("e", "resolved")
    outcome(one, "u1", 0.0, id="more", at=at)
    call(one, "u1", at=at)
    assert one.trials.matured("e", "resolved") == [told]
    assert other.trials.matured("e", "resolved") == [told]
    assert one.trials.tally("e").late == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_counts_with_its_parent(path: str) -> None:
    store = SqliteStore(path)
    made(store)
    expose(store, "parent")
    pid = os.fork()
    if pid == 0:  # pragma: no cover
        expose(store, "child")
        expose(store, "parent")
        os._exit(0 if store.trials.tally("e").units == 2 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    expose(store, "after")
    assert store.trials.tally("e") == Tally(3)
    store.close()


# -- the file ----------------------------------------------------------------------------------------------------------
def test_everything_is_there_when_the_file_is_opened_again(open_sqlite: Callable[..., SqliteStore]) -> None:
    clock = FakeClock()
    first = open_sqlite(clock=clock)
    trial = made(first)
    expose(first, "u1", propensity=0.25)
    call(first, "u1", latency=2.0, failed=True)
    outcome(first, "u1", 1.0)
    first.trials.save("e", '{"after": 0}', 0)
    changed = first.trials.change("e", 1, state="running", decision=Decision("start", "ann", "{}"))
    first.close()
    clock.advance(300.0)
    again = open_sqlite(clock=clock)
    assert again.trials.trial("e") == changed == trial._replace(state="running", revision=2)
    assert again.trials.checkpoint("e") == ('{"after": 0}', 1, trial.created)
    assert [each.what for each in again.trials.decisions("e")] == ["start"]
    (found,) = again.trials.matured("e", None)
    assert found.calls == found.first_call == Calls(1, 1, 0, 0, 1, 2.0)
    assert [each.values for each in again.trials.matured("e", "resolved")] == [Values(1, 1.0, 1.0, 1.0, trial.created)]
    expose(again, "u1", "cot")
    expose(again, "u2")
    assert again.trials.tally("e") == Tally(2, mixed=1)


def test_a_file_of_an_earlier_release_keeps_its_rows_and_gets_the_tables(path: str) -> None:
    with contextlib.closing(SqliteStore(path)) as store:
        ticket = granted(store, ask())
        store.settle(ticket, settlement(ticket, CENT))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        names = [name for (name,) in file.execute("SELECT name FROM sqlite_master WHERE name LIKE 'trial%'")]
        assert len(names) >= len(TABLES)
        for table in (*PARTS, "trials", "trial_leases", "trial_writers"):
            file.execute(f"DROP TABLE {table}")
        assert not file.execute("SELECT name FROM sqlite_master WHERE name LIKE 'trial%'").fetchall()
    with contextlib.closing(SqliteStore(path)) as store:
        assert store.account("day").spent == CENT
        made(store)
        expose(store, "u1")
        assert store.trials.tally("e").units == 1


def test_a_file_without_the_latest_columns_gets_them(path: str) -> None:
    with contextlib.closing(SqliteStore(path)) as store:
        made(store)
        expose(store, "u1")
        call(store, "u1", list_nano=7)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        for table, names in LATER.items():
            for name in names:
                file.execute(f"ALTER TABLE {table} DROP COLUMN {name}")
    with contextlib.closing(SqliteStore(path)) as store:
        call(store, "u1", list_nano=None)
        assert store.trials.tally("e") == Tally(1, unpriced=1)
        with contextlib.closing(sqlite3.connect(path)) as file:
            assert file.execute("SELECT calls, list_nano, unpriced FROM trial_calls").fetchone() == (2, 7, 1)


def test_what_is_read_of_a_large_experiment_is_found_by_its_keys(path: str) -> None:
    with contextlib.closing(SqliteStore(path)) as store:
        made(store)
    with contextlib.closing(sqlite3.connect(path)) as file:
        sent: list[str] = []
        file.set_trace_callback(sent.append)
        for metric in ("resolved", "at once", None):
            for window in (0.0, 100.0):
                advance(file, 1, metric, window, 10.0, 0.0, 100)
            read_matured(file, 1, metric, 0, 100)
        read_seen(file, 1, "u1")
        file.set_trace_callback(None)
        for sql in sent:
            if sql.startswith("SELECT"):
                plan = " ".join(row[3] for row in file.execute(f"EXPLAIN QUERY PLAN {sql}"))
                assert "SCAN" not in plan.replace("SCAN CONSTANT ROW", ""), (sql, plan)
                assert "TEMP B-TREE" not in plan, (sql, plan)


def test_a_batch_looks_up_its_units_one_by_one_however_many_the_experiment_has(path: str) -> None:
    """Given a list of names, SQLite read all units of the experiment: two milliseconds a unit at a million."""
    with contextlib.closing(SqliteStore(path)) as store:
        made(store, windows={None: 0.0, "at once": 0.0})
        for number in range(3):
            expose(store, f"u{number}")
        assert store.flush(10)
    units = [f"u{number}" for number in range(100)]
    things = [
        *(Exposure("e", unit, 1, "cot", 0.5, 1.0) for unit in units), *(Call("e", unit, 1.0) for unit in units),
        *(Outcome("e", unit, "at once", 1.0, 1.0) for unit in units),
    ]  # fmt: skip
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        sent: list[str] = []
        file.set_trace_callback(sent.append)
        write_batch(file, 1, "me", things, 1, 2.0)
        file.set_trace_callback(None)
        asked = [sql for sql in sent if sql.startswith("WITH asked")]
        plans = [[row[3] for row in file.execute(f"EXPLAIN QUERY PLAN {sql}")][-1] for sql in asked]
    tables = ("trial_units", "trial_later", "trial_calls", "trial_values")
    assert {plan.split()[1] for plan in plans} == set(tables)
    assert all("(trial=? AND unit=?)" in plan or "number=?)" in plan for plan in plans), plans
    assert len(asked) < 20  # not a statement for each


def test_a_batch_of_a_later_stage_takes_steps_by_its_size(path: str) -> None:
    """Each exposure looked through all of the batch, while every other writer waited: 8,000 took 3.5 s."""
    with contextlib.closing(SqliteStore(path)) as store:
        made(store)
    took = []
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        for batch, count in enumerate((100, 800)):
            for stage in (0, 1):
                things = [Exposure("e", f"{batch}-{number}", stage, "cot", 0.5, 1.0) for number in range(count)]
                lines = lines_of(partial(write_batch, file, 1, "me", things, 1 + 2 * batch + stage, 2.0))
            took.append(lines)
    assert took[1] < 1.5 * 8 * took[0]


def lines_of(work: Callable[[], object]) -> int:
    """How many lines of Python are gone through: as many on any machine."""
    lines = 0

    def trace(_: Any, event: str, __: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


def test_a_look_at_what_has_not_changed_waits_for_no_writer(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was posted is waited for, and only a mark that moves is written."""
    made(sqlite_store)
    expose(sqlite_store, "u1")
    outcome(sqlite_store, "u1", 1.0, "at once")
    assert numbers(sqlite_store.trials.matured("e", "at once")) == [1]

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(sqlite_store._mailbox, "flush", never)
    monkeypatch.setattr(sqlite_store._mailbox, "question", never)
    assert numbers(sqlite_store.trials.matured("e", "at once")) == [1]
    assert numbers(sqlite_store.trials.matured("e", None)) == []
    assert sqlite_store.trials.tally("e").units == 1
    expose(sqlite_store, "u2")
    with pytest.raises(AssertionError):
        sqlite_store.trials.tally("e")


def test_a_look_moves_the_marks_in_its_own_transaction(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(sqlite_store)
    for unit in ("u1", "u2"):
        expose(sqlite_store, unit)
        outcome(sqlite_store, unit, 1.0, "at once")
    assert sqlite_store.trials.look("e", "another", 30.0)[0].holder == "another"
    assert sqlite_store.trials.look("e", "me", 30.0)[1] is None
    sqlite_store.trials.release(lease_of("e"), "another")
    assert sqlite_store.trials.look("e", "me", 30.0)[1] is not None

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(sqlite_store._mailbox, "question", never)
    assert numbers(sqlite_store.trials.matured("e", "at once")) == [1, 2]
    assert numbers(sqlite_store.trials.matured("e", None)) == [], "their windows are not over"


def test_a_removal_goes_in_steps_and_the_next_one_ends_what_was_interrupted(
    sqlite_store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_forgetting, "_FORGET", 3)
    store = sqlite_store
    for name in ("gone", "e"):
        made(store, name)
        for number in range(10):
            expose(store, f"u{number}", trial=name)
            expose(store, f"u{number}", "cot", 1, trial=name)
            call(store, f"u{number}", trial=name)
            outcome(store, f"u{number}", 1.0, trial=name)
    assert store.flush(10)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("DELETE FROM trials WHERE name = 'gone'")  # as if it had been killed then
        store.trials.remove("never made")
        for table in PARTS:
            assert file.execute(f"SELECT count(*) FROM {table} WHERE trial = 1").fetchone() == (0,), table
    assert check_units(store) == 10
    store.trials.remove("e")
    with contextlib.closing(sqlite3.connect(path)) as file:
        assert [file.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in PARTS] == [0] * len(PARTS)


# -- posting -----------------------------------------------------------------------------------------------------------
def test_who_asks_finds_what_he_posted_however_much_others_post(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posting, "BEHIND", 20)
    made(sqlite_store)
    missed: list[str] = []

    def work(name: int) -> None:
        for number in range(150):
            unit = f"{name}.{number}"
            expose(sqlite_store, unit)
            if number % 10 == 0 and not (sqlite_store.flush(10) and sqlite_store.trials.seen("e", unit)):
                missed.append(unit)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert missed == []
    assert check_units(sqlite_store) == 900


@pytest.mark.parametrize(
    "wrong",
    [
        Exposure("e", 5, 0, "control", 0.5, 0.0),  # type: ignore[arg-type]
        Exposure("e", "u", 0, None, 0.5, 0.0),  # type: ignore[arg-type]
        Exposure("e", "u", 0, "control", 0.5, math.nan),
        Call("e", "u1", 0.0, list_nano=0.5),  # type: ignore[arg-type]
        Outcome("e", "u1", "resolved", "good", 0.0),  # type: ignore[arg-type]
        Outcome("e", "u1", "resolved", 1.0, 0.0, 5),  # type: ignore[arg-type]
    ],
)
def test_what_no_column_can_take_is_told_and_takes_nothing_else_with_it(
    sqlite_store: SqliteStore, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made(sqlite_store)
    expose(sqlite_store, "u1")
    sqlite_store.trials._post(wrong)
    expose(sqlite_store, "u2")
    assert check_units(sqlite_store) == 2
    assert "cannot be written" in caplog.text
    assert not sqlite_store.problems


def test_a_full_disk_loses_nothing_and_counts_nothing_twice(path: str) -> None:
    store = SqliteStore(path)
    made(store)
    store.flush(10)
    connection = store._writer.tables.connection
    assert connection is not None
    with store._writer.io:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")
    number = 0
    while not store.problems:
        for _ in range(500):
            number += 1
            expose(store, f"u{number}", "x" * 100)
            call(store, f"u{number}")
        store.flush(1)
    for unit in range(1, number + 1):
        call(store, f"u{unit}")
    with store._writer.io:
        connection.execute("PRAGMA max_page_count=1000000")
    until(lambda: store.flush(1) and store.trials.tally("e").units == number)
    assert check_units(store) == number
    with contextlib.closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT min(calls), max(calls), count(*) FROM trial_calls").fetchone() == (2, 2, number)
    store.close()


def test_a_commit_that_seemed_to_fail_and_did_not_counts_once(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is tried again: it is known by its number."""
    store = sqlite_store
    made(store)
    commit, failures = Tables.commit, [True]

    def seems_to_fail(self: Any) -> None:
        commit(self)
        if failures and self.connection.execute("SELECT count(*) FROM trial_calls").fetchone()[0]:
            failures.clear()
            raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Tables, "commit", seems_to_fail)
    expose(store, "u1")
    call(store, "u1", list_nano=1)
    until(lambda: store.flush(1) and not failures and not store.problems)
    call(store, "u1", list_nano=1)
    assert store.flush(10)
    with contextlib.closing(sqlite3.connect(store._path)) as file:
        assert file.execute("SELECT calls, list_nano FROM trial_calls").fetchone() == (2, 2)


def test_what_is_posted_to_a_closed_store_is_told_and_not_raised(path: str, caplog: pytest.LogCaptureFixture) -> None:
    store = SqliteStore(path)
    made(store)
    expose(store, "u1")
    store.close()
    for number in range(3):
        expose(store, f"late {number}")
    assert "2 exposures, calls and outcomes of experiments were not written" in caplog.text
    with contextlib.closing(SqliteStore(path)) as again:
        assert again.trials.tally("e").units == 1


def test_what_is_posted_while_nothing_can_be_written_is_bounded(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made(sqlite_store)
    monkeypatch.setattr(posting, "MOST", 5)
    assert sqlite_store.flush(10)
    with sqlite_store._writer.io:
        until(lambda: _posts(sqlite_store) >= 3)
    assert "too many wait" in caplog.text
    assert sqlite_store.trials.tally("e").unkept == sqlite_store.trials._post.dropped


def _posts(store: SqliteStore) -> int:
    expose(store, f"u{store.trials._post.dropped}")
    return store.trials._post.dropped


def test_a_unit_told_by_two_readers_has_one_number(sqlite_store: SqliteStore) -> None:
    made(sqlite_store, windows={"at once": 0.0})
    for number in range(20):
        expose(sqlite_store, f"u{number}")
        outcome(sqlite_store, f"u{number}", float(number), "at once")
    found = [sqlite_store.trials.matured("e", "at once", most=most) for most in (20, 3, 30)]
    assert [numbers(each) for each in found] == [list(range(1, 21)), [1, 2, 3], list(range(1, 21))]
    assert [each.values.total for each in found[0]] == [float(number) for number in range(20)]


def test_what_was_counted_as_posted_is_on_its_way(sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who has seen the count, and finds it written, does not wait: so it may not come first."""
    made(sqlite_store)
    post, counts = sqlite_store.trials._post, []

    def told(operation: Any) -> bool:
        counts.append(post.posted)
        return put(operation)

    put = post._mailbox.post
    monkeypatch.setattr(post._mailbox, "post", told)
    expose(sqlite_store, "u1")
    assert (counts, post.posted) == ([0], 1)
    assert sqlite_store.trials.tally("e").units == 1


def test_what_a_question_found_written_is_not_waited_for_again(
    sqlite_store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(sqlite_store)
    expose(sqlite_store, "u1")
    monkeypatch.setattr(sqlite_store.trials._mailbox, "flush", lambda _: pytest.fail("it is written"))
    assert sqlite_store.trials.look("e", "me", 60.0)[1] is not None
    assert sqlite_store.trials.tally("e").units == 1
    assert [each.unit for each in sqlite_store.trials.exposed("e")] == ["u1"]
