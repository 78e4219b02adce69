"""The memory store's ledger: no call pays for many others, and no reader holds calls up."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dspy_prod.records import CallRecord, Totals
from dspy_prod.stores.admission.accounts import worst
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.memory_ledger import MemoryLedger
from tests.stores.support import CENT, DAY, DOLLAR, ask, granted, record


@pytest.mark.parametrize("users", [1, 5, 1_000])
def test_no_append_does_the_work_of_many(monkeypatch: pytest.MonkeyPatch, users: int) -> None:
    """One call in 512 made the sums of all 512: 1.4 ms, which was the p99.9 of a call."""
    ledger, done = MemoryLedger(10_000), 0
    plain = Totals.of.__func__  # type: ignore[attr-defined]

    def counting(cls: type[Totals], *rows: CallRecord) -> Totals:
        nonlocal done
        done += len(rows)
        sums: Totals = plain(cls, *rows)
        return sums

    monkeypatch.setattr(Totals, "of", classmethod(counting))
    most = 0
    for number in range(3_000):
        done = 0
        ledger.append(record(user=f"u{number % users}"))
        most = max(most, done)
    assert 0 < most <= 160


def test_sums_are_those_of_every_record_whenever_they_are_asked_for() -> None:
    """Records wait for their like before they are added up; replaced ones and asking in between change nothing."""
    randomly = random.Random(7)
    store, known = MemoryStore(max_records=150), dict[str, CallRecord]()
    for number in range(2_000):
        id = f"r{number if randomly.random() < 0.8 else randomly.randrange(max(0, number - 40), number + 1)}"
        at = DAY + 86_400.0 * randomly.randrange(3)
        made = record(id, started_at=at, user=f"u{randomly.randrange(7)}", cost_nano=randomly.randrange(CENT))
        store.append(made)
        known[id] = made
        if randomly.random() < 0.02:
            assert sum(sums.cost_nano for _, _, sums in store.totals()) == sum(r.cost_nano or 0 for r in known.values())
    for user in range(7):
        mine = [Totals.of(row) for row in known.values() if row.user == f"u{user}"]
        found = [sums for _, value, sums in store.totals(dimension="user") if value == f"u{user}"]
        assert [sum(each) for each in zip(*found, strict=True)] == [sum(each) for each in zip(*mine, strict=True)]
    assert [row.id for row in store.records()] == list(known)[:-151:-1]
    assert len(store.records()) == 150


class _Looking(str):
    """Compares as a text, and notes whether the store was locked meanwhile."""

    def __new__(cls, text: str, store: MemoryStore) -> _Looking:
        made = super().__new__(cls, text)
        made.store, made.locked = store, set()
        return made

    store: MemoryStore
    locked: set[bool]

    def __eq__(self, other: Any) -> bool:
        self.locked.add(self.store._lock.locked())
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_records_are_filtered_while_calls_go_on() -> None:
    """`records(user=...)` looked at 100,000 records under the lock that every call needs: all stood for 100 ms."""
    store = MemoryStore()
    for number in range(50):
        store.append(record(user=f"u{number % 2}"))
    user = _Looking("u1", store)
    assert len(store.records(user=user)) == 25
    assert user.locked == {False}


def test_accounts_are_looked_through_while_calls_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The costs of a budget with 100,000 tenants stopped every call in the same way."""
    store = MemoryStore()
    for number in range(5):
        granted(store, ask(CENT * (number + 1), accounts=(f"day/tenant|t{number}|d",), budget=DOLLAR))
    locked = set()

    def looking(known: Any, prefix: str, suffix: str, most: int) -> list[str]:
        locked.add(store._lock.locked())
        return worst(known, prefix, suffix, most)

    monkeypatch.setattr("dspy_prod.stores.memory.worst", looking)
    found = store.accounts("day/tenant|", "|d", 2)
    assert (len(found), locked) == (2, {False})


def test_a_readers_sums_stay_as_they_were() -> None:
    """What `totals` copies under the lock is shallow: later calls must replace it, not change it."""
    ledger = MemoryLedger(100)
    ledger.append(record(user="u", cost_nano=CENT))
    (day,) = ledger.days(None, None)
    before = ledger.sums(day, "user")
    ledger.append(record(user="u", cost_nano=CENT))
    assert ledger.days(None, None) == [day]
    assert (before["u"][0], ledger.sums(day, "user")["u"][0]) == (CENT, 2 * CENT)
