"""The newest records of the memory store: a dict's behaviour, in few objects."""

from __future__ import annotations

import gc
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.records import CallRecord
from dspy_prod.stores.memory_rows import BLOCK, Rows
from tests.stores.support import record


def numbered(number: int, id: int | None = None) -> CallRecord:
    """A record whose time and user tell its number."""
    return record(id=f"r{number if id is None else id}", started_at=float(number), user=f"u{number % 3}")


@given(ids=st.lists(st.integers(0, 60), max_size=200), most=st.integers(1, 40))
def test_rows_are_what_a_dict_would_hold(ids: list[int], most: int) -> None:
    """The newest so many, a later record in the place of an earlier one with its id."""
    rows = Rows(most)
    model: dict[str, CallRecord] = {}
    for number, id in enumerate(ids):
        one = numbered(number, id)
        assert rows.put(one) == model.get(one.id)
        model[one.id] = one
        while len(model) > most:
            del model[next(iter(model))]
        assert rows.find(one.id) == one
    assert rows.view().matching(None, None, None, {}) == list(model.values())[::-1]
    assert [rows.find(f"r{id}") for id in range(61)] == [model.get(f"r{id}") for id in range(61)]


@given(parts=st.lists(st.integers(0, 40), max_size=8), most=st.integers(1, 40))
def test_those_that_are_added_together_are_as_if_each_had_come(parts: list[int], most: int) -> None:
    """Over the ends of blocks, and when there are more than are kept."""
    together, one_by_one = Rows(most), Rows(most)
    number = 0
    for part in parts:
        records = [numbered(each) for each in range(number, number + part)]
        number += part
        together.extend(records)
        for each in records:
            assert one_by_one.put(each) is None
        assert together.view().matching(None, None, None, {}) == one_by_one.view().matching(None, None, None, {})
    kept = [together.find(f"r{each}") for each in range(number)]
    assert kept == [one_by_one.find(f"r{each}") for each in range(number)]
    assert sum(each is not None for each in kept) == min(number, most)


@given(
    since=st.none() | st.integers(-1, 50), until=st.none() | st.integers(-1, 50), limit=st.none() | st.integers(0, 9)
)
def test_what_matches_is_found_newest_first(since: Any, until: Any, limit: Any) -> None:
    """By time, by field, and not more than asked for."""
    rows = Rows(40)
    for number in range(50):
        rows.put(numbered(number))
    expected = [
        numbered(number)
        for number in range(49, 9, -1)
        if (since is None or number >= since) and (until is None or number < until) and number % 3 == 1
    ]
    assert rows.view().matching(since, until, limit, {"user": "u1"}) == expected[:limit]


def test_a_view_stays_as_it_was() -> None:
    """Whoever reads without the lock sees neither what comes later nor what takes another's place."""
    rows = Rows(3 * BLOCK)
    for number in range(2 * BLOCK + 3):
        rows.put(numbered(number))
    view = rows.view()
    before = view.matching(None, None, None, {})
    for number in range(100):
        rows.put(numbered(1000 + number, number))
    assert view.matching(None, None, None, {}) == before


def test_the_garbage_collector_finds_few_of_them() -> None:
    """A container for each record made it stop a caller for a millisecond, again and again."""
    rows = Rows(10_000)
    gc.collect()
    before = len(gc.get_objects())
    for number in range(1600):
        rows.put(numbered(number))
    assert len(gc.get_objects()) - before < 200
