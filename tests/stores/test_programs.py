"""The records of programs' calls, and their sums: the same in every store."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dspy_prod.stores import memory_programs
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.programs import COMPARED, ProgramCall, ProgramTotals
from dspy_prod.stores.redis import programs as redis_programs
from dspy_prod.stores.sqlite import program_tables
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import CENT, DAY, Problems, new_id, record

NEXT_DAY = DAY + 86_400.0


def call(id: str | None = None, **fields: Any) -> ProgramCall:
    base: dict[str, Any] = {"started_at": DAY, "program": "triage", "status": "ok", "latency": 0.5}
    return ProgramCall(id or new_id(), **{**base, **fields})


FULL = call(
    "full", started_at=DAY + 0.25, status="fallback", reason="parse_error", error="AdapterParseError", latency=1.5,
    waited=0.25, cost_nano=None, list_nano=7, attempts=3, cached=2, user="ü", tenant="t", session="s", run="r",
    experiment="e", variant="v", stage="5%", prompt_version="triage/7", trace_id="tr",
    tags=(("feature", "a[b]"), ("région", "eu")),
)  # fmt: skip


def counts(store: Store, **wanted: Any) -> list[tuple[str, str, str, str, int]]:
    return [(*each[:4], each.totals.calls) for each in store.programs.sums(**wanted)]


def test_a_call_survives_the_way_to_the_store_and_back(store: Store) -> None:
    store.programs.append(FULL)
    store.programs.append(call("bare", started_at=DAY - 1))
    assert store.programs.calls() == [FULL, call("bare", started_at=DAY - 1)]
    assert FULL.to_dict()["tags"] == {"feature": "a[b]", "région": "eu"}
    assert (FULL.cost_usd, FULL.list_cost_usd) == (None, 7e-9)


@pytest.mark.parametrize("name", COMPARED)
def test_calls_are_found_by_every_field(store: Store, name: str) -> None:
    others = [call(started_at=DAY + number, program="other") for number in range(5)]
    for each in (*others, FULL):
        store.programs.append(each)
    assert store.programs.calls(**{name: getattr(FULL, name)}) == [FULL]
    assert store.programs.calls(**{"program": "other", name: getattr(FULL, name), "user": "absent"}) == []
    assert store.programs.calls(**{name: "absent"}) == []


def test_calls_come_newest_first_and_not_more_than_asked_for(store: Store) -> None:
    for number in range(200):
        store.programs.append(call(f"c{number}", started_at=DAY + number, user=f"u{number % 2}"))
    ids = [f"c{number}" for number in reversed(range(200))]
    assert [each.id for each in store.programs.calls()] == ids
    assert [each.id for each in store.programs.calls(limit=3)] == ids[:3]
    assert store.programs.calls(limit=0) == []
    assert [each.id for each in store.programs.calls(user="u1", limit=2)] == ["c199", "c197"]
    assert [each.id for each in store.programs.calls(since=DAY + 3, until=DAY + 5)] == ["c4", "c3"]
    with pytest.raises(ValueError, match="colour"):
        store.programs.calls(colour="red")


def test_ends_are_counted_per_day_status_and_reason(store: Store) -> None:
    ends = [("ok", None), ("ok", None), ("fallback", "parse_error"), ("refused", "budget_exceeded"), ("error", None)]
    for number, (status, reason) in enumerate(ends):
        at, program = (NEXT_DAY if number % 2 else DAY), f"p{number // 3}"
        store.programs.append(call(started_at=at, status=status, reason=reason, program=program))
    assert counts(store) == [
        ("2025-11-23", "", "error", "", 1),
        ("2025-11-23", "", "fallback", "parse_error", 1),
        ("2025-11-23", "", "ok", "", 1),
        ("2025-11-24", "", "ok", "", 1),
        ("2025-11-24", "", "refused", "budget_exceeded", 1),
    ]
    assert counts(store, dimension="program", value="p1") == [
        ("2025-11-23", "p1", "error", "", 1),
        ("2025-11-24", "p1", "refused", "budget_exceeded", 1),
    ]
    assert len(counts(store, since_day="2025-11-24")) == 2
    assert len(counts(store, until_day="2025-11-23")) == 3
    assert counts(store, dimension="tenant") == []


def test_money_attempts_and_seconds_are_summed(store: Store) -> None:
    store.programs.append(call(cost_nano=CENT, list_nano=2 * CENT, attempts=2, cached=1, latency=0.25))
    store.programs.append(call(cost_nano=None, list_nano=None, attempts=1, latency=0.5))
    [sums] = store.programs.sums()
    assert sums.totals == ProgramTotals(2, CENT, 1, 2 * CENT, 1, 3, 1, 750_000)


def test_a_call_counts_for_its_variant_and_for_those_around_it(store: Store) -> None:
    """Each experiment has a `control`; of nested ones the outer is a tag."""
    outer = (("experiment:outer", "control"),)
    for experiment, tags in (("e1", ()), ("e2", outer), ("e2", outer)):
        store.programs.append(call(experiment=experiment, variant="control", tags=tags, prompt_version="triage/7"))
    assert [each[1::3] for each in counts(store, dimension="variant")] == [("e1/control", 1), ("e2/control", 2)]
    assert [each[1::3] for each in counts(store, dimension="experiment")] == [("e1", 1), ("e2", 2)]
    assert [each[1::3] for each in counts(store, dimension="prompt")] == [("triage/7", 3)]
    assert [each[1::3] for each in counts(store, dimension="tag:experiment:outer")] == [("control", 2)]


def test_values_beyond_so_many_are_summed_together(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who calls with a new tag each time does not fill the table."""
    for room in (memory_programs, program_tables, redis_programs):
        monkeypatch.setattr(room, "MAX_VALUES_PER_DAY", 4)
    for number in range(8):
        store.programs.append(call(tags=(("n", str(number)),)))
    sums = {value: calls for _, value, *_, calls in counts(store, dimension="tag:n")}
    assert sums == {"0": 1, "1": 1, "(other)": 6}
    assert sum(calls for *_, calls in counts(store, dimension="program")) == 8


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_the_newest_are_kept_and_all_are_counted(kind: str, path: str) -> None:
    """As many as records of the ledger are."""
    store: Store = MemoryStore(max_records=50) if kind == "memory" else SqliteStore(path, max_records=50)
    with contextlib.closing(store):
        for number in range(400):
            store.programs.append(call(f"c{number}", started_at=DAY + number))
            if number % 40 == 0:
                store.flush(10)
        kept = store.programs.calls()
        assert 50 <= len(kept) <= 250
        assert [each.id for each in kept] == [f"c{number}" for number in range(399, 399 - len(kept), -1)]
        assert [each[-1] for each in counts(store)] == [400]


def test_threads_that_append_at_once_lose_none(store: Store) -> None:
    def work() -> None:
        for _ in range(500):
            store.programs.append(call())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [each[-1] for each in counts(store)] == [2_000]
    assert len(store.programs.calls()) == 2_000


def test_namespaces_are_kept_apart(make_store: Callable[..., Store]) -> None:
    one, other = make_store("one"), make_store("other")
    one.programs.append(call("c"))
    assert [each.id for each in one.programs.calls()] == ["c"]
    assert other.programs.calls() == []
    assert other.programs.sums() == []


# -- the file --------------------------------------------------------------------------------------------------------
def test_what_sqlite_cannot_carry_is_cleaned_and_the_others_are_untouched(path: str) -> None:
    problems = Problems()
    with contextlib.closing(SqliteStore(path, on_problem=problems)) as store:
        store.programs.append(call("a"))
        store.programs.append(call("b", user="\ud800", cost_nano=2**70, started_at=DAY + 1))
        store.programs.append(call("c", started_at=DAY + 2))
        found = store.programs.calls()
        assert [each.id for each in found] == ["c", "b", "a"]
        assert [each[-1] for each in counts(store)] == [3]
        assert store.records() == []
    assert problems.names == []


def test_a_call_that_cannot_be_written_is_told_and_harms_no_other(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(SqliteStore(path)) as store:
        store.programs.append(call("a"))
        store.programs.append(call("b", started_at=float("nan")))
        store.append(record("r"))
        assert [each.id for each in store.programs.calls()] == ["a"]
        assert [row.id for row in store.records()] == ["r"]
    assert "cannot be written" in caplog.text


def test_a_file_of_an_earlier_release_takes_calls(path: str) -> None:
    """What it says of itself stays, so that the earlier release opens it again."""
    with contextlib.closing(SqliteStore(path)) as store:
        store.append(record("r"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE program_calls")
        connection.execute("DROP TABLE program_sums")
    with contextlib.closing(SqliteStore(path)) as store:
        store.programs.append(FULL)
        assert store.programs.calls() == [FULL]
        assert [row.id for row in store.records()] == ["r"]
    with contextlib.closing(SqliteStore(path)) as store:
        assert store.programs.calls() == [FULL]
        assert [each[-1] for each in counts(store)] == [1]
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert dict(connection.execute("SELECT key, value FROM meta"))["schema"] == 1


@pytest.mark.parametrize("name", [name for name in COMPARED if name not in ("reason", "stage")])
def test_calls_are_looked_up_by_an_index(path: str, name: str) -> None:
    with contextlib.closing(SqliteStore(path)) as store:
        store.programs.append(FULL)
        sent: list[str] = []
        store._ledger_reader.read(lambda connection, _: connection.set_trace_callback(sent.append))
        store.programs.calls(**{name: "x"})
        sql = next(each for each in sent if "program_calls" in each)
        plan = store._ledger_reader.read(
            lambda connection, _: connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()
        )
    assert f"USING INDEX program_calls_{name} " in plan[0][3]


def test_of_a_closed_store_the_lost_call_is_told(path: str, caplog: pytest.LogCaptureFixture) -> None:
    store = SqliteStore(path)
    store.close()
    store.programs.append(call())
    assert "the record of a call of 'triage' is lost" in caplog.text


def test_calls_wait_while_the_file_is_locked(path: str) -> None:
    """They are kept as settlements are, and counted among what is not written."""
    with contextlib.closing(SqliteStore(path)) as store:
        store.flush(10)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            for number in range(5):
                store.programs.append(call(f"c{number}"))
            assert store.unwritten() == 5
            other.execute("ROLLBACK")
        assert len(store.programs.calls()) == 5
        assert store.unwritten() == 0
