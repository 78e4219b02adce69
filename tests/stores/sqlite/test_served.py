"""Cached answers of one kind are noted by when they were given, and become records when they are written."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from dspy_prod.records import CallRecord, Totals
from dspy_prod.stores.durable.served import Served
from dspy_prod.stores.sqlite import hits
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.sqlite.tables import Tables
from tests.stores.support import DAY, Problems, record, until


def like(**fields: Any) -> CallRecord:
    """What the records of a kind have in common."""
    return record("", **{"call_id": "", "started_at": 0.0, "cached": True, "outcome": "cached", **fields})


@pytest.fixture
def store(path: str) -> Iterator[SqliteStore]:
    with contextlib.closing(SqliteStore(path)) as store:
        yield store


@pytest.mark.parametrize("count", [1, 10, 63, 64, 100, 128, 129, 500, 1_000])
def test_each_has_a_record_of_its_own(store: SqliteStore, path: str, count: int) -> None:
    kind = store.kind(like(user="u1", tags=(("a", "1"),)))
    for number in range(count):
        assert kind.served(DAY + number)
    found = store.records()
    assert [row.started_at for row in found] == [DAY + number for number in range(count)][::-1]
    assert len({row.id for row in found} | {row.call_id for row in found}) == 2 * count
    assert {row._replace(id="", call_id="", started_at=0.0) for row in found} == {kind.like._replace(id="")}
    assert store.records(user="u1", limit=5) == found[:5]
    assert store.records(id=found[-1].id) == found[-1:]
    for dimension, value in (("all", None), ("user", "u1"), ("tag:a", "1")):
        assert [sums for *_, sums in store.totals(dimension=dimension, value=value)] == [Totals(cached=count)]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (pages,) = connection.execute("SELECT count(*) FROM hits").fetchone()
        assert pages <= 2 + count / hits.LEAST


def test_looks_of_one_kind_become_one_page() -> None:
    """Two looks of a transaction made two pages, one of them record by record; what was taken stays as it was."""
    first, second = like(user="u1"), like(user="u2")
    given = [[(1.0, 7), (2.0, None)], [(3.0, 7)], [(4.0, 8)], [(5.0, 7), (6.0, 7)]]
    taken = [Served(kind, some) for kind, some in zip((first, second, first, first), given, strict=True)]  # type: ignore[arg-type]
    before = [some.records() for some in taken]
    whole = Served.together(taken)
    assert [(some.like.user, some.times) for some in whole] == [("u1", [1.0, 2.0, 4.0, 5.0, 6.0]), ("u2", [3.0])]
    assert whole[0].records() == [*before[0], *before[2], *before[3]]
    assert whole[1].records() == before[1]
    assert [some.records() for some in taken] == before
    assert Served.together(taken[:1]) == taken[:1]
    assert Served.together([]) == []


def test_kinds_and_other_records_in_turn(store: SqliteStore) -> None:
    """Whatever comes between, none is lost and none is counted twice."""
    kinds = [store.kind(like(user=name)) for name in ("u1", "u2", "u3")]
    for number in range(900):
        at = DAY + number
        kinds[number % 3].served(at)
        if number % 7 == 0:
            store.append(record(f"r{number}", started_at=at + 0.5, cost_nano=5))
        if number % 11 == 0:
            store.append(like(user="u4")._replace(id=f"h{number}", call_id="c", started_at=at + 0.6))
        if number % 100 == 0:
            assert store.flush(10)
    found = store.records()
    assert [row.started_at for row in found] == sorted((row.started_at for row in found), reverse=True)
    for name in ("u1", "u2", "u3"):
        assert len(store.records(user=name)) == 300
    assert len(store.records(user="u4")) == 82
    assert len(found) == 900 + 129 + 82
    [(*_, sums)] = store.totals()
    assert (sums.cached, sums.attempts, sums.cost_nano) == (982, 129, 129 * 5)


def test_threads_that_hit_at_once_lose_none(store: SqliteStore) -> None:
    """Also while the writer takes what is there."""
    kind = store.kind(like())

    def work() -> None:
        for _ in range(2_000):
            kind.served(DAY)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        store.flush(10)
    assert [sums for *_, sums in store.totals()] == [Totals(cached=16_000)]
    assert len({row.id for row in store.records()}) == 16_000


def test_those_of_two_days_count_for_each(store: SqliteStore) -> None:
    midnight = DAY // 86_400 * 86_400
    kind = store.kind(like())
    for number in range(200):
        kind.served(midnight - 100 + number)
    assert [(day, sums.cached) for day, _, sums in store.totals()] == [("2025-11-22", 100), ("2025-11-23", 100)]
    assert len(store.records()) == 200


def test_what_no_page_can_hold_is_kept_as_a_row(store: SqliteStore) -> None:
    """A half of a character, which JSON cannot say."""
    kind = store.kind(like(user="\ud800"))
    for number in range(100):
        kind.served(DAY + number)
    assert len(store.records()) == 100
    assert [sums.cached for *_, sums in store.totals()] == [100]


def test_while_the_file_cannot_be_written_they_wait(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problems = Problems()
    with contextlib.closing(SqliteStore(path, on_problem=problems)) as store:
        kind = store.kind(like())
        kind.served(DAY)
        assert store.flush(10)
        tables = store._writer.tables
        with monkeypatch.context() as patch:

            def full() -> None:
                raise sqlite3.OperationalError("database or disk is full")

            patch.setattr(tables, "commit", full)
            for number in range(300):
                kind.served(DAY + number)
            assert not store.flush(1)
            assert store.unwritten() >= 300
        assert [sums.cached for *_, sums in store.totals()] == [301]
        assert len({row.id for row in store.records()}) == 301


def test_after_close_none_is_taken(store: SqliteStore) -> None:
    kind = store.kind(like())
    assert kind.served(DAY)
    store.close()
    assert not kind.served(DAY)
    assert len(store.records()) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_forked_child_notes_its_own(store: SqliteStore) -> None:
    """Those of the parent are the parent's to write; the child would have written them again, or not its own."""
    kind = store.kind(like(user="parent"))
    kind.served(DAY)
    child = os.fork()
    if not child:
        code = 1
        try:
            assert not kind.served(DAY)
            store.kind(like(user="child")).served(DAY)
            store.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(row.user or "" for row in store.records()) == ["child", "parent"]


def test_a_commit_that_came_through_and_was_called_failed_writes_none_twice(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New ids are not looked for in the file; those that are written again are."""
    kind, commit, failed = store.kind(like()), Tables.commit, []

    def commits(tables: Tables) -> None:
        commit(tables)
        if not failed and sum(map(len, tables.served)) >= hits.LEAST:
            failed.append(tables)
            raise sqlite3.OperationalError("disk I/O error")

    assert store.flush(5)
    monkeypatch.setattr(Tables, "commit", commits)
    for number in range(100):
        kind.served(DAY + number)
    until(lambda: bool(failed) and store.flush(1))
    assert [row.started_at for row in store.records()] == [DAY + number for number in range(100)][::-1]
    assert [sums for *_, sums in store.totals()] == [Totals(cached=100)]


def test_what_others_wrote_meanwhile_is_looked_at_again(store: SqliteStore, path: str) -> None:
    """The writer remembers what it alone has written: how many hits are loose, and after which record a page comes."""
    kind = store.kind(like())

    def serve() -> None:
        for _ in range(hits.LEAST):
            kind.served(DAY)
        assert store.flush(5)

    serve()
    with contextlib.closing(SqliteStore(path)) as other, contextlib.closing(sqlite3.connect(path)) as connection:
        other.append(like(user="other")._replace(id="hit"))
        other.append(record("row", started_at=DAY))
        assert other.flush(5)
        loose = "SELECT count(*) FROM hits WHERE loose"
        assert connection.execute(loose).fetchone() == (1,)
        serve()
        assert connection.execute(loose).fetchone() == (0,)
    assert [row.id for row in store.records()].index("row") == hits.LEAST
    assert len(store.records(user="other")) == 1
