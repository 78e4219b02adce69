"""Cached answers are kept many in a row of the file, and are read as if each were a row."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import sqlite3
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from dspy_prod.records import CallRecord, Totals
from dspy_prod.stores.sqlite import hits
from dspy_prod.stores.sqlite.indices import SELECTIVE
from dspy_prod.stores.sqlite.pages import Page
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import CENT, DAY, Problems, record


def hit(number: int, **fields: Any) -> CallRecord:
    """A cached answer as the pipeline records it; ids grow."""
    facts = {"call_id": f"call-{number:08x}", "started_at": DAY + number, "cached": True, "outcome": "cached"}
    return record(f"id-{number:08x}", **{**facts, **fields})


def counted(path: str, table: str) -> int:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)


def bodies(store: SqliteStore) -> list[bytes]:
    """The pages of a store's file."""
    return [
        body for (body,) in store._read(lambda c, ns: c.execute("SELECT body FROM hits WHERE NOT loose").fetchall())
    ]


@pytest.fixture
def store(path: str) -> Iterator[SqliteStore]:
    with contextlib.closing(SqliteStore(path)) as store:
        yield store


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of four."""
    monkeypatch.setattr(hits, "PAGE", 4)
    monkeypatch.setattr(hits, "LEAST", 4)


def test_hits_take_no_row_each(store: SqliteStore, path: str) -> None:
    """A row with its twelve indices took longer than the answer."""
    written = [hit(number) for number in range(1_000)]
    for each in written:
        store.append(each)
    assert store.records() == written[::-1]
    assert counted(path, "records") == 0
    assert counted(path, "hits WHERE NOT loose") <= 1_000 // hits.LEAST
    assert counted(path, "hits WHERE loose") < 10, "as many as the rest came in batches"
    assert [sums for _, _, sums in store.totals()] == [Totals(cached=1_000)]


def test_few_hits_are_loose_until_there_are_enough_for_a_page(store: SqliteStore, path: str, short: None) -> None:
    for number in range(11):
        store.append(hit(number))
        assert [row.id for row in store.records()] == [f"id-{n:08x}" for n in range(number, -1, -1)]
    assert counted(path, "hits") == 2 + 3
    assert counted(path, "hits WHERE loose") == 3


@pytest.mark.parametrize("seed", range(6))
def test_reads_cannot_tell_a_hit_from_a_row(store: SqliteStore, short: None, seed: int) -> None:
    """Every filter, two filters together, bounds and limits, whatever is in pages, loose, or a row."""
    chance = random.Random(seed)
    known: list[CallRecord] = []
    for number in range(150):
        fields: dict[str, Any] = {
            name: chance.choice([None, "a", "b", f"{number}"])
            for name in (*SELECTIVE[2:7], "variant", "experiment", "program")
        }
        fields |= {"model": chance.choice(["x", "y"]), "started_at": DAY + chance.randrange(40)}
        if chance.random() < 0.3:
            known.append(record(f"id-{number:08x}", **fields))
        else:
            tags = chance.choice([(), (("team", "a"),)])
            outcome = chance.choice(["cached", "stale"])
            known.append(hit(number, call_id=f"call-{number // 3:08x}", outcome=outcome, tags=tags, **fields))
        store.append(known[-1])
        if chance.random() < 0.3:
            store.flush(10)
    order = sorted(range(len(known)), key=lambda index: (known[index].started_at, index), reverse=True)
    newest_first = [known[index] for index in order]
    assert store.records() == newest_first
    for _ in range(300):
        equals = {}
        for name in chance.sample([*SELECTIVE, "route", "priority"], chance.choice([0, 1, 1, 2, 3])):
            equals[name] = chance.choice([getattr(chance.choice(known), name) or "a", "absent"])
        since, until = (chance.choice([None, DAY + chance.randrange(40)]) for _ in range(2))
        limit = chance.choice([None, 0, 1, 3, 20])
        expected = [
            row
            for row in newest_first
            if all(getattr(row, name) == value for name, value in equals.items())
            and (since is None or row.started_at >= since)
            and (until is None or row.started_at < until)
        ]
        assert store.records(since=since, until=until, limit=limit, **equals) == expected[:limit]


def test_a_field_that_is_no_text_is_compared_as_in_a_row(store: SqliteStore) -> None:
    store.append(hit(1))
    store.append(record("row", attempt=1))
    for equals in ({"attempt": "1"}, {"cost_nano": "0"}, {"started_at": str(DAY + 1)}, {"attempt": "x"}):
        both = store.records(**equals)
        assert ("id-00000001" in {row.id for row in both}) is (equals != {"attempt": "x"})


def test_a_hit_whose_cost_is_corrected_becomes_a_row(store: SqliteStore, path: str, short: None) -> None:
    for number in range(6):
        store.append(hit(number, user="u"))
    for number in (1, 5):  # of a page, and loose
        assert store.correct(f"id-{number:08x}", CENT)
        (found,) = store.records(id=f"id-{number:08x}")
        assert found.cost_nano == CENT
    assert sorted(row.id for row in store.records(user="u")) == [f"id-{number:08x}" for number in range(6)]
    assert counted(path, "records") == 2
    assert [sums for _, _, sums in store.totals(dimension="user")] == [Totals(cost_nano=2 * CENT, cached=6)]
    assert not store.correct("id-absent", CENT)


@pytest.mark.parametrize("before", [3, 9])
def test_a_hit_that_comes_again_is_there_once(store: SqliteStore, short: None, before: int) -> None:
    """What was committed when the connection broke is posted again, cut into other batches."""
    written = [hit(number) for number in range(12)]
    for each in written[:before]:
        store.append(each)
    store.flush(10)
    for each in written:
        store.append(each)
    assert sorted(store.records()) == written
    assert [sums for _, _, sums in store.totals()] == [Totals(cached=12)]


def test_a_hit_that_json_cannot_carry_is_a_row(store: SqliteStore, path: str) -> None:
    store.append(hit(1, session="half \ud83d"))
    store.append(hit(2))
    assert [row.session for row in store.records(session="half \ud83d")] == ["half \\ud83d"]
    assert counted(path, "records") == 2
    assert len(store.records()) == 2


def test_namespaces_do_not_see_each_others_hits(store: SqliteStore, path: str, short: None) -> None:
    with contextlib.closing(SqliteStore(path, "other")) as other:
        for number in range(10):
            store.append(hit(number, user="u"))
            other.append(hit(number + 100, user="u"))
        assert len(store.records(user="u")) == len(other.records(user="u")) == 10
        assert other.records(id="id-00000001") == []


def test_a_damaged_page_does_not_stop_the_others(store: SqliteStore, path: str, short: None) -> None:
    for number in range(8):
        store.append(hit(number))
    store.flush(10)
    bodies: list[Any] = [b"{", b"[]", "{}", None, 7, orjson.dumps({"size": 4, "same": {}, "each": {"id": ["x"]}})]
    for body in bodies[:3] + bodies[4:]:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE hits SET body = ? WHERE seq = 1", (body,))
        assert [row.id for row in store.records()] == [f"id-{number:08x}" for number in (7, 6, 5, 4)]
    assert Page.load(None).all() == []


def test_the_oldest_go_whether_they_are_hits_or_rows(path: str) -> None:
    """`max_records` counts both."""
    with contextlib.closing(SqliteStore(path, max_records=1_000)) as store:
        for number in range(6_000):
            store.append(hit(number) if number % 3 else record(f"row-{number:08x}", started_at=DAY + number))
            if number % 100 == 0:
                store.flush(10)
        found = store.records()
        assert 900 <= len(found) <= 1_400
        assert min(row.started_at for row in found) >= DAY + 6_000 - 1_400
        assert [sums.cached for _, _, sums in store.totals()] == [4_000]
        pages = {page for (page,) in store._read(lambda c, ns: c.execute("SELECT page FROM hit_values").fetchall())}
        assert pages == {seq for (seq,) in store._read(lambda c, _: c.execute("SELECT seq FROM hits WHERE NOT loose"))}


@pytest.mark.parametrize("rows", [0, 100])
@pytest.mark.parametrize("newer", ["hits", "rows"])
def test_what_is_kept_is_the_newest_of_both(store: SqliteStore, short: None, rows: int, newer: str) -> None:
    """The moment since which there are as many as are kept, wherever it falls."""
    for number in range(100):
        store.append(hit(number, started_at=DAY + number + (rows if newer == "hits" else 0)))
    for number in range(rows):
        store.append(record(f"row-{number}", started_at=DAY + number + (0 if newer == "hits" else 100)))
    known = store.records()
    ends = [page.find({})[-1].started_at for page in map(Page.load, bodies(store))]
    assert 4 * len(ends) == 100
    with store._writer.io:
        for most in range(0, 100 + rows, 7):
            since = store._writer.tables.ledger._kept_since(most)
            assert since is not None
            kept = sum(not row.cached and row.started_at >= since for row in known) + 4 * sum(
                end >= since for end in ends
            )
            assert most <= kept <= most + 5
        assert store._writer.tables.ledger._kept_since(100 + rows) is None


def test_a_file_of_an_earlier_release_takes_hits(path: str) -> None:
    """It has no tables for them; what it says of itself stays, so that the earlier release opens it again."""
    with contextlib.closing(SqliteStore(path)) as store:
        store.append(record("row"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE hits")
        connection.execute("DROP TABLE hit_values")
    with contextlib.closing(SqliteStore(path)) as store:
        store.append(hit(1))
        assert [row.id for row in store.records()] == ["id-00000001", "row"]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert dict(connection.execute("SELECT key, value FROM meta"))["schema"] == 1


def test_a_hit_that_cannot_be_kept_is_told_and_the_others_stay(path: str) -> None:
    problems = Problems()
    with contextlib.closing(SqliteStore(path, on_problem=problems)) as store:
        store.append(hit(1))
        store.append(hit(2, started_at=float("nan")))
        store.append(hit(3))
        assert [row.id for row in store.records()] == ["id-00000003", "id-00000001"]
        assert problems.names == ["operation_dropped"]


def answer(path: str, name: int, barrier: Any) -> None:
    """Write hits in small batches, reading in between."""
    store = SqliteStore(path)
    barrier.wait(30)
    for number in range(300):
        store.append(hit(number, call_id=f"call-{name}", user=f"u{name}")._replace(id=f"{name}-{number:08x}"))
        if number % 7 == 0:
            assert len(store.records(user=f"u{name}")) == number + 1
    store.close()


def test_processes_that_write_hits_at_the_same_time_lose_none(path: str) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=answer, args=(path, name, barrier)) for name in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    with contextlib.closing(SqliteStore(path)) as store:
        found = store.records()
        assert len(found) == len({row.id for row in found}) == 600
        assert [sums for _, _, sums in store.totals()] == [Totals(cached=600)]
        assert counted(path, "hits WHERE loose") < hits.PAGE
