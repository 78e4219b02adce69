"""What a process remembers of units, and what it posts of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.exposing import Exposing
from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.stores.trial_terms import Tally
from dspy_prod.stores.trials import Arm

DESIGN = Design("e", ("control", "cot"), shares=(0.0, 0.1, 0.5))
UNITS = [f"u{number}" for number in range(400)]


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    found: Store = MemoryStore() if request.param == "memory" else SqliteStore(str(tmp_path / "state.db"))
    found.trials.create("e", "{}", {None: 60.0})
    yield found
    found.close()


def exposing(store: Store, stage: int = 1, full: int = 0, most: int = 1_000) -> Exposing:
    made = Exposing("e", DESIGN, store.trials, most)
    made.move(stage, full)
    return made


def test_a_unit_is_exposed_once_by_a_process_and_counted_once_of_several(store: Store) -> None:
    one, other = exposing(store), exposing(store)
    for _ in range(3):
        assert [one(unit) for unit in UNITS] == [other(unit) for unit in UNITS] == [DESIGN.assign(u, 1) for u in UNITS]
    got = [DESIGN.assign(unit, 1).variant for unit in UNITS].count("cot")
    assert store.trials.counts("e") == [
        Arm(1, "control", 0, len(UNITS) - got, len(UNITS) - got, 0),
        Arm(1, "cot", 0, got, got, 0),
    ]


def test_a_unit_that_was_forgotten_is_exposed_again_to_no_effect(store: Store) -> None:
    few = exposing(store, most=10)
    for _ in range(2):
        for unit in UNITS:
            assert few(unit) == DESIGN.assign(unit, 1)
    assert len(few._known) == 10
    assert sum(arm.units for arm in store.trials.counts("e")) == len(UNITS)
    assert store.trials.tally("e").mixed == 0


def test_the_unit_used_longest_ago_is_forgotten_first(store: Store) -> None:
    few = exposing(store, most=3)
    for unit in ("a", "b", "c", "a", "d"):
        few(unit)
    assert list(few._known) == ["c", "a", "d"]


def test_in_a_shadow_stage_nobody_is_exposed_and_later_all_are_anew(store: Store) -> None:
    one = exposing(store, stage=0)
    assert {one(unit).variant for unit in UNITS} == {"control"}
    assert store.trials.tally("e").units == 0
    one.move(1)
    for unit in UNITS:
        one(unit)
    assert store.trials.tally("e").units == len(UNITS)


def test_past_the_cap_who_was_in_the_candidate_stays_wherever_he_comes_and_after_a_restart(store: Store) -> None:
    early = exposing(store, stage=2)
    before = {unit: early(unit).variant for unit in UNITS[:200]}
    assert store.flush(10)
    early.move(2, full=1)
    anew = exposing(store, stage=2, full=1)
    for each in (early, anew):
        assert {unit: each(unit).variant for unit in UNITS[:200]} == before
        assert {each(unit).variant for unit in UNITS[200:]} == {"control"}
    assert store.trials.tally("e") == Tally(units=200), "newcomers tell nothing, and may come again in the next stage"


def test_a_unit_that_is_overridden_after_it_was_exposed_is_known_to_be_mixed(store: Store) -> None:
    exposing(store)("u1")
    got = DESIGN.assign("u1", 1).variant
    other = "cot" if got == "control" else "control"
    changed = Exposing("e", Design("e", DESIGN.variants, shares=DESIGN.shares, overrides={"u1": other}), store.trials)
    changed.move(1)
    assert changed("u1").variant == other
    assert store.trials.tally("e") == Tally(units=1, mixed=1)


def test_a_stage_is_taken_up_while_others_are_assigned(store: Store) -> None:
    """No unit gets an arm that neither stage has for it."""
    one, wrong = exposing(store), []

    def work() -> None:
        for unit in UNITS:
            if one(unit) not in (DESIGN.assign(unit, 1), DESIGN.assign(unit, 2)):
                wrong.append(unit)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    one.move(2)
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert [one(unit) for unit in UNITS] == [DESIGN.assign(unit, 2) for unit in UNITS]
