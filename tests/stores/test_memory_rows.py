"""The newest records of the memory store: a dict's behaviour, in few objects."""

from __future__ import annotations

import gc
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dspy_prod.records import CallRecord
from dspy_prod.runtime.ids import IDS
from dspy_prod.stores.memory_rows import BLOCK, MOST_ALIKE, AlikeBlock, Rows
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


def alike(number: int, count: int) -> AlikeBlock:
    """So many records alike, of which each tells its number by its time and by what it saved."""
    numbers = range(number, number + count)
    return AlikeBlock(numbered(0), IDS.make(), tuple(map(float, numbers)), tuple(numbers))


@given(parts=st.lists(st.integers(1, 20) | st.just(MOST_ALIKE), max_size=4), most=st.integers(1, 200), data=st.data())
def test_records_alike_are_as_if_each_had_come(parts: list[int], most: int, data: st.DataObject) -> None:
    """Between others, when there are more than are kept, and when one is replaced."""
    together, one_by_one = Rows(most), Rows(most)
    known: list[CallRecord] = []
    for part in parts:
        block = alike(len(known), part)
        rows = [CallRecord._make(row) for row in zip(*map(block.column, range(len(CallRecord._fields))), strict=True)]
        together.extend(block)
        if data.draw(st.booleans()):
            single = numbered(len(known) + part)
            together.put(single)
            rows.append(single)
        for each in rows:
            assert one_by_one.put(each) is None
        known += rows
        other = data.draw(st.sampled_from(known))._replace(user="other", cost_nano=7)
        assert together.put(other) == one_by_one.put(other)
        for equals in ({}, {"user": "other"}, {"id": other.id}, {"call_id": known[-1].call_id}, {"user": "u0"}):
            expected = one_by_one.view().matching(None, None, None, equals)
            assert together.view().matching(None, None, None, equals) == expected
        assert [together.find(each.id) for each in known] == [one_by_one.find(each.id) for each in known]
        assert together.find(known[0].call_id) == one_by_one.find(known[0].call_id)
    assert len(together.view().matching(None, None, None, {})) <= most
    ids = [each.id for each in known] + [each.call_id for each in known if each.call_id != "c"]
    assert len({*ids}) >= sum(parts)


def test_what_is_kept_no_longer_is_forgotten() -> None:
    """Whatever came, no more is held than one more block beside what is kept."""
    rows = Rows(100)
    for number in range(200):
        rows.extend(alike(40 * number, 40))
        for each in range(3):
            rows.put(numbered(100_000 + 3 * number + each))
    assert sum(block.size for block in rows._blocks.values()) <= 100 + 40 + BLOCK
    assert len(rows._begins) + len(rows._heads) <= 100 + BLOCK


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
