"""What was spent since the ledger began is the sum of its days, whoever wrote them."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspy_prod.records import Totals
from dspy_prod.stores.memory_ledger import day_of
from dspy_prod.stores.sqlite import rollups, summed
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.sqlite.test_hits import hit
from tests.stores.support import CENT, DAY, record

DIMENSIONS = ("all", "model", "user", "tenant")
EARLIER_ADDS = (
    "INSERT INTO rollups (ns, day, dimension, value, cost_nano, attempts) VALUES (1, ?, 'user', ?, ?, 1) "
    "ON CONFLICT (ns, day, dimension, value) DO UPDATE SET cost_nano = cost_nano + excluded.cost_nano, "
    "attempts = attempts + excluded.attempts"
)


@pytest.fixture
def store(path: str) -> Iterator[SqliteStore]:
    with contextlib.closing(SqliteStore(path)) as store:
        yield store


@contextlib.contextmanager
def by_hand(path: str) -> Iterator[sqlite3.Connection]:
    """The file, as somebody else opens it."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def added_up(store: SqliteStore, dimension: str, since: str | None = None) -> list[tuple[str, Totals]]:
    """The sums of the days, the dearest first."""
    found: dict[str, Totals] = {}
    for _, value, totals in store.totals(dimension=dimension, since_day=since):
        found[value] = found.get(value, Totals()).plus(totals)
    return sorted(found.items(), key=lambda each: (-each[1].cost_nano, each[0]))


def agrees(store: SqliteStore) -> None:
    days = sorted({day for day, _, _ in store.totals()})
    for dimension in DIMENSIONS:
        for since in (None, "2000-01-01", *days, "2100-01-01"):
            assert store.sums(dimension=dimension, since_day=since) == added_up(store, dimension, since)


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_any_time_are_those_of_its_days(store: SqliteStore, seed: int) -> None:
    """Whatever was written, corrected, or answered from the cache, on whichever day."""
    rng = random.Random(seed)
    written = []
    for number in range(120):
        at = DAY - 86_400 * rng.randrange(4)
        who = {"user": rng.choice((None, "ann", "bob", "eve")), "tenant": rng.choice((None, "t"))}
        if rng.random() < 0.3:
            store.append(hit(number, **{**who, "started_at": at, "saved_nano": rng.choice((None, CENT))}))
        else:
            cost = rng.randrange(3 * CENT)
            written.append(record(started_at=at, cost_nano=cost, estimated=rng.random() < 0.3, **who))
            store.append(written[-1])
        if written and rng.random() < 0.1:
            store.flush()
            assert store.correct(rng.choice(written).id, rng.randrange(CENT))
    assert len(store.sums(dimension="user")) == 3
    agrees(store)


def test_several_writers_of_a_file_add_to_the_same_sums(path: str) -> None:
    with contextlib.closing(SqliteStore(path)) as one, contextlib.closing(SqliteStore(path)) as other:
        for number in range(20):
            (one, other)[number % 2].append(record(user="ann", cost_nano=1))
        one.flush()
        other.flush()
        assert [(value, sums.cost_nano) for value, sums in one.sums(dimension="user")] == [("ann", 20)]


def test_a_file_of_an_earlier_release_has_them_and_that_release_goes_on(store: SqliteStore, path: str) -> None:
    """It knows nothing of them, and opened again the file is as it was."""
    for user, days_ago in (("ann", 0), ("ann", 1), ("bob", 2)):
        store.append(record(user=user, cost_nano=CENT, started_at=DAY - 86_400 * days_ago))
    store.close()
    with by_hand(path) as connection:
        for name in ("new", "changed", "moved", "gone"):
            connection.execute(f"DROP TRIGGER rollups_{name}")
        connection.execute("DROP TABLE rollups_ever")
        connection.execute("DROP TABLE rollups_before")
        connection.execute(EARLIER_ADDS, ("2025-11-20", "eve", 7))
    with contextlib.closing(SqliteStore(path)) as again:
        agrees(again)
        assert dict(again.sums(dimension="user"))["eve"].cost_nano == 7
        with by_hand(path) as connection:
            connection.execute(EARLIER_ADDS, ("2025-11-20", "eve", 7))
            connection.execute(EARLIER_ADDS, ("2025-11-19", "new", 3))
        agrees(again)
        assert {user: sums.cost_nano for user, sums in again.sums(dimension="user")} == {
            "ann": 2 * CENT, "bob": CENT, "eve": 14, "new": 3
        }  # fmt: skip
    with contextlib.closing(SqliteStore(path)) as later:
        agrees(later)


def as_it_was(connection: sqlite3.Connection) -> None:
    """Take away what is kept of before each day: there were sums since the ledger began before there were those."""
    names = list(Totals._fields)
    for name in ("new", "changed", "moved", "gone"):
        connection.execute(f"DROP TRIGGER rollups_{name}")
    for table in ("rollups_before", "rollups_ever"):
        connection.execute(f"DROP TABLE {table}")
    connection.execute("DELETE FROM meta WHERE key NOT IN ('format', 'schema')")
    connection.execute(
        f"CREATE TABLE rollups_ever (ns INTEGER, dimension TEXT, value TEXT, {' INTEGER, '.join(names)} INTEGER, "
        "PRIMARY KEY (ns, dimension, value)) WITHOUT ROWID"
    )
    connection.execute(
        f"INSERT INTO rollups_ever SELECT ns, dimension, value, {', '.join(f'sum({each})' for each in names)} "
        "FROM rollups GROUP BY ns, dimension, value"
    )
    put = (
        f"INSERT INTO rollups_ever VALUES (NEW.ns, NEW.dimension, NEW.value, {', '.join(f'NEW.{x}' for x in names)}) "
        f"ON CONFLICT DO UPDATE SET {', '.join(f'{x} = {x} + excluded.{x}' for x in names)};"
    )
    take = (
        f"UPDATE rollups_ever SET {', '.join(f'{x} = {x} - OLD.{x}' for x in names)} "
        "WHERE ns = OLD.ns AND dimension = OLD.dimension AND value = OLD.value;"
    )
    for name, body in {
        "new": f"AFTER INSERT ON rollups BEGIN {put} END",
        "changed": f"AFTER UPDATE ON rollups WHEN NEW.value IS OLD.value BEGIN {take} {put} END",
        "moved": f"AFTER UPDATE ON rollups WHEN NEW.value IS NOT OLD.value BEGIN {take} {put} END",
        "gone": f"AFTER DELETE ON rollups BEGIN {take} END",
    }.items():
        connection.execute(f"CREATE TRIGGER rollups_{name} {body}")


def uses_what_was_before(store: SqliteStore, since: str) -> bool:
    asked: list[str] = []
    store._read(lambda connection, _: connection.set_trace_callback(asked.append))
    store.sums(dimension="user", since_day=since)
    store._read(lambda connection, _: connection.set_trace_callback(None))
    return any("rollups_before AS early" in statement for statement in asked)


def test_a_file_without_what_was_before_each_day_has_it_of_later_days(store: SqliteStore, path: str) -> None:
    """To make it for all days would keep everybody else from writing, for seconds."""
    for number in range(30):
        who = "ann" if number % 3 else "bob"
        store.append(record(user=who, cost_nano=number, started_at=DAY - 86_400 * (number % 7)))
    store.close()
    with by_hand(path) as connection:
        as_it_was(connection)
        connection.execute(EARLIER_ADDS, ("2025-11-19", "eve", 7))
    rng = random.Random(1)
    with contextlib.closing(SqliteStore(path)) as again:
        agrees(again)
        for number in range(60):
            at = DAY + 86_400 * rng.randrange(-9, 5)
            again.append(record(user=rng.choice(("ann", "bob", "eve", "new")), cost_nano=number, started_at=at))
        agrees(again)
        days = sorted({day for day, _, _ in again.totals()})
        (last,) = [day for day in days if day == "2025-11-23"]
        assert [uses_what_was_before(again, day) for day in days[1:-1]] == [day > last for day in days[1:-1]]
        with by_hand(path) as connection:
            for _ in range(60):
                moved = (rng.choice(days), rng.choice(("ann", "eve")), rng.choice(days), rng.choice(("ann", "bob")))
                where = "dimension = 'user' AND day = ? AND value = ?"
                connection.execute(f"UPDATE OR IGNORE rollups SET day = ?, value = ? WHERE {where}", moved)
                connection.execute("DELETE FROM rollups WHERE day = ? AND value = ?", (rng.choice(days), "new"))
                connection.execute(EARLIER_ADDS, (rng.choice(days), "bob", 5))
        agrees(again)
    with contextlib.closing(SqliteStore(path)) as later:
        agrees(later)


def test_bringing_a_file_up_to_date_takes_as_long_as_it_has_rows(tmp_path: Path) -> None:
    """With a thousand users of ninety days it kept everybody else from writing for ten seconds."""
    steps: list[list[int]] = []
    for values in (50, 500):
        path = str(tmp_path / f"{values}.db")
        SqliteStore(path).close()
        with by_hand(path) as connection:
            connection.execute("BEGIN")
            for number in range(values):
                for day in range(10, 20):
                    connection.execute(EARLIER_ADDS, (f"2025-11-{day}", f"u{number}", 1))
            as_it_was(connection)
            connection.execute("COMMIT")
            steps.append(taken := [])
            connection.set_progress_handler(lambda taken=taken: taken.append(1), 10)  # type: ignore[misc]
            rollups.bring_up_to_date(connection)
    assert len(steps[1]) < 15 * len(steps[0])


def test_a_later_release_may_keep_more_of_them(store: SqliteStore, path: str) -> None:
    """This one leaves what it does not know as it is, or a process of the later one could not read its own file."""
    store.append(record(user="ann", cost_nano=CENT))
    store.close()
    with by_hand(path) as connection:
        for table in ("rollups", "rollups_ever", "rollups_before"):
            connection.execute(f"ALTER TABLE {table} ADD COLUMN later INTEGER NOT NULL DEFAULT 5")
    with contextlib.closing(SqliteStore(path)) as again:
        again.append(record(user="ann", cost_nano=CENT))
        assert dict(again.sums(dimension="user"))["ann"].cost_nano == 2 * CENT
    with by_hand(path) as connection:
        assert connection.execute("SELECT later FROM rollups_ever WHERE value = 'ann'").fetchall() == [(5,)]


def test_what_is_renamed_or_deleted_by_hand_counts_as_it_is_then(store: SqliteStore, path: str) -> None:
    for user, days_ago in (("ann", 0), ("ann", 1), ("bob", 1)):
        store.append(record(user=user, cost_nano=CENT, started_at=DAY - 86_400 * days_ago))
    store.flush()
    with by_hand(path) as connection:
        connection.execute("UPDATE rollups SET value = 'eve', cost_nano = 1 WHERE value = 'ann' AND day < '2025-11-23'")
        agrees(store)
        assert [user for user, _ in store.sums(dimension="user")] == ["ann", "bob", "eve"]
        connection.execute("DELETE FROM rollups WHERE day < '2025-11-23'")
    agrees(store)
    assert [user for user, _ in store.sums(dimension="user")] == ["ann"]


@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_hand_does_to_the_days_the_sums_follow(store: SqliteStore, path: str, seed: int) -> None:
    """Rows that come late, change, move to another day or value, and go: one at a time and many."""
    rng = random.Random(seed)
    store.append(record(user="ann", cost_nano=CENT))
    store.flush()
    days = [f"2025-11-{day:02}" for day in range(15, 25)]
    with by_hand(path) as connection:
        for _ in range(80):
            day, who, cost = rng.choice(days), rng.choice(("ann", "bob", "eve")), rng.randrange(1_000)
            match rng.randrange(5):
                case 0 | 1:
                    connection.execute(EARLIER_ADDS, (day, who, cost))
                case 2:
                    connection.execute("UPDATE rollups SET cost_nano = ? WHERE day = ?", (cost, day))
                case 3:
                    where = "day = ? AND dimension = 'user' AND value = ?"
                    connection.execute(
                        f"UPDATE OR IGNORE rollups SET day = ?, value = ? WHERE {where}",
                        (rng.choice(days), rng.choice(("ann", "bob", "eve")), day, who),
                    )
                case 4:
                    connection.execute("DELETE FROM rollups WHERE day = ? AND value = ?", (day, who))
            if rng.random() < 0.2:
                agrees(store)
    agrees(store)
    with by_hand(path) as connection:
        connection.execute("DELETE FROM rollups")
        for table in ("rollups_ever", "rollups_before"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_a_long_span_takes_no_more_steps_than_a_short_one(store: SqliteStore) -> None:
    """A week of a thousand users took 7 to 8 ms, sixty days more than sixty."""
    for days_ago in range(60):
        for number in range(50):
            store.append(record(user=f"u{number}", cost_nano=number, started_at=DAY - 86_400 * days_ago))
    days = sorted({day for day, _, _ in store.totals()})
    steps: list[int] = []

    def asked(since: str) -> int:
        steps.clear()
        store._read(lambda connection, _: connection.set_progress_handler(lambda: steps.append(1), 1))
        assert len(store.sums(dimension="user", since_day=since)) == 50
        store._read(lambda connection, _: connection.set_progress_handler(None, 1))
        return len(steps)

    assert asked(days[1]) < 1.1 * asked(days[-2])
    assert asked(days[1]) < 200 * 50
    agrees(store)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("likely", [1, 3, 512])
def test_the_dearest_since_a_day_are_those_of_all(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, seed: int, likely: int
) -> None:
    """Whether they are among those that were dearest ever or not, and where several spent the same."""
    monkeypatch.setattr(summed, "_LIKELY_AT_LEAST", likely)
    rng = random.Random(seed)
    often = rng.choice((2, 9))
    for _ in range(150):
        number = min(rng.randrange(30), rng.randrange(30))
        cost = rng.choice((0, 1, 2, rng.randrange(9))) * (30 - number) ** rng.choice((0, 2))
        day = rng.randrange(often) if rng.random() < 0.9 else rng.randrange(9)
        store.append(record(user=f"u{number}", cost_nano=cost, started_at=DAY - 86_400 * day))
    for day in sorted({day for day, _, _ in store.totals()}):
        every = added_up(store, "user", day)
        for most in (0, 1, 2, 3, 5, 8, len(every), 40):
            assert store.sums(dimension="user", since_day=day, most=most) == every[:most]


def test_who_spent_much_before_is_not_among_the_dearest_since(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summed, "_LIKELY_AT_LEAST", 1)
    for number in range(20):
        who = f"old{number:02}"
        store.append(record(user=who, cost_nano=1_000, started_at=DAY - 5 * 86_400))
        store.append(record(user=who, cost_nano=1, started_at=DAY))
    store.append(record(user="new", cost_nano=2, started_at=DAY - 86_400))
    found = store.sums(dimension="user", since_day=day_of(DAY - 86_400), most=2)
    assert [(value, sums.cost_nano) for value, sums in found] == [("new", 2), ("old00", 1)]


def test_what_is_corrected_after_a_hand_has_moved_it_hides_nobody(
    store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The day is below zero then, and more was spent since than ever."""
    monkeypatch.setattr(summed, "_LIKELY_AT_LEAST", 4)
    for number in range(30):
        for day in (-1, 0, 1):
            store.append(record(user=f"u{number:02}", cost_nano=100 + number, started_at=DAY + day * 86_400))
    early = record(user="ann", cost_nano=9_000, estimated=True, started_at=DAY - 86_400)
    store.append(early)
    store.append(record(user="ann", cost_nano=5_000, started_at=DAY))
    store.flush()
    with by_hand(path) as connection:
        connection.execute("UPDATE rollups SET value = 'eve' WHERE value = 'ann' AND day = ?", (day_of(DAY - 86_400),))
    assert store.correct(early.id, 100)
    found = store.sums(dimension="user", since_day=day_of(DAY), most=1)
    assert [(value, sums.cost_nano) for value, sums in found] == [("ann", 5_000)]


def test_a_late_record_of_an_earlier_day_is_seen_whole_or_not_at_all(
    store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It changes which sums the next statement of a read goes by."""
    for day in (0, 1):
        store.append(record(user="ann", cost_nano=10, started_at=DAY + day * 86_400))
    store.flush()
    looks = summed._has_before

    def late(connection: sqlite3.Connection, ns: int, day: str) -> bool:
        found = looks(connection, ns, day)
        store.append(record(user="ann", cost_nano=1_000, started_at=DAY - 86_400))
        assert store.flush(10)
        return found

    monkeypatch.setattr(summed, "_has_before", late)
    found = store.sums(dimension="user", since_day=day_of(DAY))
    assert [(value, sums.cost_nano) for value, sums in found] == [("ann", 20)]


def test_a_read_that_was_interrupted_does_not_hold_the_next_one_back(store: SqliteStore) -> None:
    store.append(record(user="ann", cost_nano=10))
    store.flush()

    def interrupted(connection: sqlite3.Connection, ns: int) -> None:
        connection.execute("BEGIN")
        assert connection.execute("SELECT count(*) FROM records").fetchone() == (1,)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store._read(interrupted)
    store.append(record(user="ann", cost_nano=10))
    assert store.flush(10)
    assert len(store.records()) == 2
    assert store.sums(dimension="user")[0][1].cost_nano == 20


def test_the_dearest_of_many_are_found_without_looking_at_all(store: SqliteStore) -> None:
    """Of 100,000 tenants it took 9 ms."""
    for number in range(500):
        store.append(record(user=f"u{number:03}", cost_nano=number % 7, started_at=DAY - 86_400 * (number % 3)))
    whole = store.sums(dimension="user")
    steps: list[int] = []
    store._read(lambda connection, _: connection.set_progress_handler(lambda: steps.append(1), 1))
    assert store.sums(dimension="user", most=10) == whole[:10]
    assert len(steps) < 500
    store._read(lambda connection, _: connection.set_progress_handler(None, 1))


def test_no_day_is_read_for_what_was_spent_since_the_ledger_began(store: SqliteStore) -> None:
    """It took 79 ms of a thousand users after ninety days, and more with each day."""
    for days_ago in range(40):
        for user in ("ann", "bob"):
            store.append(record(user=user, cost_nano=1, started_at=DAY - 86_400 * days_ago))
    agrees(store)
    asked: list[str] = []

    def watched(connection: sqlite3.Connection, ns: int) -> None:
        connection.set_trace_callback(asked.append)

    store._read(watched)
    assert [sums.cost_nano for _, sums in store.sums(dimension="user")] == [40, 40]
    store._read(lambda connection, ns: connection.set_trace_callback(None))
    assert [statement for statement in asked if "FROM rollups " in statement] == []
    assert any("FROM rollups_ever " in statement for statement in asked)
