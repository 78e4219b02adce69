"""What every store promises of experiments (`Trials`). Each test runs against each store."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest

from dspy_prod.stores.base import Store
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.trial_terms import lease_of
from dspy_prod.stores.trials import (
    DECIDED,
    RUNNING,
    Arm,
    Calls,
    Decision,
    Ended,
    Lease,
    Matured,
    Once,
    Progress,
    Tally,
    Trial,
    Underway,
    Values,
    Waiting,
)
from tests.stores.support import FakeClock
from tests.stores.trial_support import WINDOWS, call, expose, made, numbers, outcome

ODD = ["a|b", "a", "b|c", "anonymous", "%61nonymous", "", "a%7Cb", "half \ud800", "nul \0", "ü" * 50, "x y"]
"""Names that make one key, written without care."""


# -- experiments -------------------------------------------------------------------------------------------------------
def test_an_experiment_is_made_once_and_kept_as_it_was_made(still: Store, clock: FakeClock) -> None:
    first = made(still)
    assert first == Trial("e", '{"v": 1}', WINDOWS, 10.0, "created", 0, first.created, 1, first.created)
    clock.advance(5.0)
    assert still.trials.create("e", '{"v": 2}', {}, 1.0) == first
    assert still.trials.trial("e") == first
    assert still.trials.trial("another") is None
    assert [each.name for each in (made(still, "a"), *still.trials.trials())] == ["a", "a", "e"]


def test_a_change_needs_the_revision_that_is_there_and_leaves_its_line_in_the_audit(
    still: Store, clock: FakeClock
) -> None:
    trials, first = still.trials, made(still)
    clock.advance(5.0)
    running = trials.change("e", 1, state=RUNNING, decision=Decision("start", "ann", "{}"))
    assert running == first._replace(state=RUNNING, revision=2, since=first.created + 5.0)
    assert trials.change("e", 1, state=DECIDED, decision=Decision("promote", "bob", "{}")) is None
    clock.advance(5.0)
    same = trials.change("e", 2, declaration="{}")
    assert same == running._replace(declaration="{}", revision=3), "the state is the same since then"
    moved = trials.change("e", 3, stage=2)
    assert moved == same._replace(stage=2, revision=4, since=first.created + 10.0)
    assert trials.trial("e") == moved
    assert trials.decisions("e") == [Decision("start", "ann", "{}", first.created + 5.0, 1)]
    assert trials.decide("e", Decision("note", "bob", '{"why": "x"}')) == 2
    assert [(each.number, each.what) for each in trials.decisions("e")] == [(1, "start"), (2, "note")]
    assert (trials.decide("another", Decision("note", "b", "")), trials.decisions("another")) == (0, [])
    assert trials.change("another", 1, state=RUNNING) is None


def test_of_many_who_change_the_same_revision_one_does(store: Store) -> None:
    made(store)
    start, won = threading.Barrier(8), []

    def change(number: int) -> None:
        start.wait(10)
        if store.trials.change("e", 1, stage=number, decision=Decision(str(number), "x", "")) is not None:
            won.append(number)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (number,) = won
    found = store.trials.trial("e")
    assert found is not None
    assert (found.stage, found.revision, [each.what for each in store.trials.decisions("e")]) == (
        number,
        2,
        [str(number)],
    )


@pytest.mark.parametrize(
    ("windows", "grace", "message"),
    [({"m": -1.0}, 1.0, "'m'"), ({"m": math.inf}, 1.0, "'m'"), ({None: math.nan}, 1.0, "None"), ({}, -1.0, "grace")],
)
def test_what_cannot_be_is_refused(store: Store, windows: dict[str | None, float], grace: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store.trials.create("e", "{}", windows, grace)
    made(store)
    with pytest.raises(ValueError, match="'done'"):
        store.trials.change("e", 1, state="done")
    with pytest.raises(ValueError, match="no window for 'other'"):
        store.trials.matured("e", "other")


def test_what_is_posted_of_a_removed_experiment_is_not_of_the_next_one_of_its_name(
    still: Store, clock: FakeClock
) -> None:
    """A process that still had the old one told of its units in the new one, in one batch with those of it."""
    old = made(still).created
    still.trials.remove("e")
    clock.advance(5.0)
    new = made(still).created
    for number in range(2):
        for whose, moment in (("old", old), ("new", new), ("anybody", None)):
            expose(still, f"{whose} {number}", made=moment)
    assert [each.unit for each in still.trials.exposed("e")] == ["new 0", "anybody 0", "new 1", "anybody 1"]
    for moment in (old, new, old, None):
        call(still, "new 0" if moment else "anybody 0", arm="control", failed=moment == old, made=moment)
        outcome(still, "new 0", 1.0 if moment == old else 0.0, id=f"{moment}", made=moment)
    expose(still, "new 0", "cot", made=old)
    still.trials.underway(Underway("e", "new 0", still.trials.now(), 5_000.0, old))
    assert still.trials.ended("e") == [Ended("control", 2)]
    assert still.trials.tally("e") == Tally(4)
    assert still.trials.waiting("e")[None].until == still.trials.now() + WINDOWS[None] + 10.0
    clock.advance(120.0)
    (unit, *_) = still.trials.matured("e", "resolved")
    assert (unit.unit, unit.values.size, unit.values.total) == ("new 0", 2, 0.0)
    (unit, *_) = still.trials.matured("e", None)
    assert (unit.unit, unit.calls.calls, unit.calls.failed) == ("new 0", 1, 0)
    expose(still, "long", made=new)
    still.trials.underway(Underway("e", "long", still.trials.now(), 5_000.0, new))
    assert still.trials.waiting("e")[None].until == still.trials.now() + 5_000.0


def test_a_removed_experiment_leaves_nothing_and_its_name_is_free(still: Store, clock: FakeClock) -> None:
    for name in ("e", "other"):
        made(still, name)
        for unit in ("u1", "u2"):
            expose(still, unit, trial=name)
            expose(still, unit, "b", 1, trial=name)
            outcome(still, unit, 1.0, trial=name)
            call(still, unit, trial=name)
        assert still.trials.save(name, "{}", 0)
        still.trials.decide(name, Decision("note", "x", ""))
    clock.advance(200.0)
    assert numbers(still.trials.matured("e", "resolved")) == [1, 2]
    still.trials.remove("e")
    assert [each.name for each in still.trials.trials()] == ["other"]
    made(still)
    trials = still.trials
    assert (trials.tally("e"), trials.counts("e"), trials.checkpoint("e")) == (Tally(), [], None)
    assert (trials.seen("e", "u1"), trials.decisions("e"), trials.matured("e", None)) == (None, [], [])
    expose(still, "u2")
    clock.advance(200.0)
    assert [each.unit for each in trials.matured("e", "resolved")] == ["u2"]
    assert trials.tally("other").units == 2
    assert numbers(trials.matured("other", "resolved")) == [1, 2]
    trials.remove("never made")


def test_an_outcome_from_before_the_exposure_does_not_count_and_is_counted(still: Store, clock: FakeClock) -> None:
    """It can be none of what the arm has done. Clocks of processes may differ by seconds."""
    made(still)
    clock.advance(100.0)
    at = expose(still, "u1")
    outcome(still, "u1", 0.0, at=at - 5.1)
    outcome(still, "u1", 0.0, "at once", at=at - 86_400.0)
    outcome(still, "u1", 1.0, "at once", at=at - 4.9)
    outcome(still, "u1", 1.0, at=at - 4.9)
    assert still.trials.tally("e") == Tally(1, early=2)
    clock.advance(200.0)
    for metric in ("resolved", "at once"):
        assert [each.values for each in still.trials.matured("e", metric)] == [Values(1, 1.0, 1.0, 1.0, at - 4.9)]


def test_a_call_whose_price_nobody_knows_is_in_no_sum_of_costs(still: Store, clock: FakeClock) -> None:
    made(still)
    for unit, costs in {"u1": (None, 3, None), "u2": (3, None), "u3": (None,)}.items():
        expose(still, unit)
        for each in costs:
            call(still, unit, list_nano=each)
            still.flush(10)
    clock.advance(200.0)
    found = still.trials.matured("e", None)
    assert [(each.calls.calls, each.calls.list_nano, each.calls.unpriced) for each in found] == [
        (3, 3, 2), (2, 3, 1), (1, 0, 1),
    ]  # fmt: skip
    assert [(each.first_call.list_nano, each.first_call.unpriced) for each in found] == [(0, 1), (3, 0), (0, 1)]
    assert still.trials.tally("e") == Tally(3, unpriced=4)


# -- who is waited for -------------------------------------------------------------------------------------------------
def test_a_unit_whose_call_goes_on_is_waited_for_and_nobody_behind_it_is_told(still: Store, clock: FakeClock) -> None:
    made(still, windows={None: 0.0, "at once": 0.0})
    began = expose(still, "u1")
    expose(still, "u2")
    call(still, "u2")
    outcome(still, "u2", 1.0, "at once")
    for _ in range(5):
        clock.advance(8.0)
        still.trials.underway(Underway("e", "u1", still.trials.now(), 9.0))
    still.trials.underway(Underway("e", "never exposed", still.trials.now()))
    still.trials.underway(Underway("another", "u1", still.trials.now()))
    assert clock.time() - began > 10.0  # the grace is over
    for metric in (None, "at once"):
        assert still.trials.matured("e", metric) == []
        assert still.trials.waiting("e")[metric] == Waiting(2, pytest.approx(still.trials.now() + 9.0))
    call(still, "u1", at=began, latency=40.0)
    found = still.trials.matured("e", None)
    assert [(each.number, each.calls.calls, each.calls.latency) for each in found] == [(1, 1, 40.0), (2, 1, 0.0)]
    assert still.trials.matured("e", "at once") == []  # its outcome has as long as after any call
    outcome(still, "u1", 1.0, "at once")
    assert [each.values.size for each in still.trials.matured("e", "at once")] == [1, 1]
    assert still.trials.waiting("e") == {None: Waiting(), "at once": Waiting()}


def test_a_call_of_which_no_more_is_said_was_lost_with_its_process(still: Store, clock: FakeClock) -> None:
    made(still, windows={None: 0.0, "resolved": 100.0})
    expose(still, "u1")
    clock.advance(9.0)
    still.trials.underway(Underway("e", "u1", still.trials.now() + 1e6, 20.0))  # told by a clock that is ahead
    still.flush(10)
    clock.advance(19.0)
    assert still.trials.matured("e", None) == []
    clock.advance(2.0)
    assert [each.calls for each in still.trials.matured("e", None)] == [Calls()]
    assert still.trials.waiting("e") == {
        None: Waiting(),
        "resolved": Waiting(1, pytest.approx(still.trials.now() + 80.0)),
    }


def test_exposures_are_told_at_once_in_their_order_and_in_parts(still: Store) -> None:
    made(still)
    at = [expose(still, f"u{number}", ("control", "cot")[number % 2], full=number) for number in range(5)]
    assert still.trials.exposed("e", 3) == [Matured(4, "u3", 0, "cot", 0.5, at[3], 3, False),
                                            Matured(5, "u4", 0, "control", 0.5, at[4], 4, False)]  # fmt: skip
    assert numbers(still.trials.exposed("e", 0, 2)) == [1, 2]
    assert still.trials.exposed("another") == []
    assert still.trials.waiting("another") == {}
    assert still.trials.waiting("e")["at once"] == Waiting(5, at[0] + 10.0)


# -- exposures ---------------------------------------------------------------------------------------------------------
def test_the_first_exposure_counts_and_those_after_it_do_not(still: Store) -> None:
    made(still)
    at = expose(still, "u1", "control", propensity=0.99)
    expose(still, "u2", "cot", propensity=0.01, full=2)
    expose(still, "u1", "control", propensity=0.5)
    assert still.trials.tally("e") == Tally(2)
    assert still.trials.counts("e") == [Arm(0, "control", 0, 1, 1, 0), Arm(0, "cot", 2, 1, 1, 0)]
    said = still.trials.now()
    outcome(still, "u1", 1.0, "at once", at=said)
    outcome(still, "u2", 1.0, "at once", at=said)
    assert still.trials.matured("e", "at once") == [
        Matured(1, "u1", 0, "control", 0.99, at, 0, False, values=Values(1, 1.0, 1.0, 1.0, said)),
        Matured(2, "u2", 0, "cot", 0.01, at, 2, False, values=Values(1, 1.0, 1.0, 1.0, said)),
    ]


def test_a_unit_that_moves_up_is_counted_in_its_new_stage_and_keeps_its_number(still: Store, clock: FakeClock) -> None:
    made(still)
    expose(still, "u1")
    still.flush(10)
    expose(still, "u1", "cot", 1)
    expose(still, "u1", "cot", 1)
    expose(still, "u2", "cot", 1)
    assert still.trials.counts("e") == [Arm(0, "control", 0, 1, 1, 0), Arm(1, "cot", 0, 2, 1, 0, entered=1)]
    assert still.trials.tally("e") == Tally(2)
    assert [still.trials.seen("e", unit) for unit in ("u1", "u2", "u3")] == ["cot", "cot", None]
    clock.advance(200.0)
    found = still.trials.matured("e", "resolved")
    assert [(each.number, each.arm, each.stage, each.mixed) for each in found] == [
        (1, "control", 0, False),
        (2, "cot", 1, False),
    ]


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one by one"])
def test_a_unit_enters_an_arm_once_however_many_stages_it_is_seen_in(still: Store, together: bool) -> None:
    made(still)
    for stage, arm in [(0, "control"), (1, "cot"), (2, "cot"), (3, "cot")]:
        for unit in ("u1", "u2"):
            expose(still, unit, arm if unit == "u1" else "cot", stage)
            if not together:
                still.flush(10)
    counts = still.trials.counts("e")
    assert {(each.stage, each.arm): each.entered for each in counts if each.entered} == {(1, "cot"): 1}
    assert sum(each.first + each.entered for each in counts if each.arm == "cot") == 2


def test_a_call_that_another_arm_answered_is_none_of_the_units_first_one(still: Store, clock: FakeClock) -> None:
    made(still, windows={None: 0.0})
    expose(still, "u1")
    expose(still, "u1", "cot", 1)
    call(still, "u1", arm="cot", failed=True)
    assert still.trials.matured("e", None) == []
    call(still, "u1", arm="control")
    (found,) = still.trials.matured("e", None)
    assert found.calls == Calls(1)


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one by one"])
def test_a_second_arm_within_a_stage_is_counted_once_and_overwrites_nothing(
    still: Store, clock: FakeClock, together: bool
) -> None:
    made(still)
    for stage, arm in [(0, "control"), (0, "cot"), (0, "control"), (1, "cot"), (1, "control"), (0, "other")]:
        expose(still, "u1", arm, stage)
        if not together:
            still.flush(10)
    expose(still, "u2")
    for arm in ("cot", "control"):
        expose(still, "u3", arm, 1)
    expose(still, "u2", "cot", 1)
    expose(still, "u2", "control", 1)
    assert still.trials.tally("e") == Tally(3, mixed=3)
    assert still.trials.counts("e") == [Arm(0, "control", 0, 2, 2, 1), Arm(1, "cot", 0, 3, 1, 2, entered=2)]
    clock.advance(200.0)
    found = still.trials.matured("e", "resolved")
    assert [(each.unit, each.arm, each.mixed) for each in found] == [
        ("u1", "control", True),
        ("u2", "control", True),
        ("u3", "cot", True),
    ]


def test_a_unit_that_is_mixed_after_it_was_told_is_counted_and_not_left_out(still: Store, clock: FakeClock) -> None:
    """Else who reads again, or another metric later, would read something else than was told."""
    made(still)
    expose(still, "u1")
    expose(still, "u2")
    outcome(still, "u1", 1.0, "at once")
    assert [each.mixed for each in still.trials.matured("e", "at once")] == [False]
    expose(still, "u1", "cot")
    expose(still, "u2", "cot")
    assert still.trials.tally("e").mixed == 2
    clock.advance(200.0)
    assert [each.mixed for each in still.trials.matured("e", "at once")] == [False, True]
    assert [each.mixed for each in still.trials.matured("e", "resolved")] == [False, True]


def test_a_unit_that_was_told_in_one_metric_is_left_out_in_none(still: Store, clock: FakeClock) -> None:
    made(still)
    expose(still, "u1")
    expose(still, "u2")
    clock.advance(200.0)
    assert numbers(still.trials.matured("e", "resolved")) == [1, 2]
    assert numbers(still.trials.matured("e", None, most=1)) == [1]
    expose(still, "u2", "cot")
    assert [each.mixed for each in still.trials.matured("e", None)] == [False, False]


def test_what_is_not_left_to_chance_takes_nobody_in_and_is_noticed_as_a_second_arm(still: Store) -> None:
    made(still)
    expose(still, "staff", "cot", propensity=1.0)
    for unit in ("u1", "u2"):
        expose(still, unit)
    expose(still, "u1", "cot", propensity=1.0)
    expose(still, "u2", "control", propensity=1.0)
    expose(still, "u2", "cot", 1, propensity=1.0)
    assert still.trials.tally("e") == Tally(2, mixed=1)
    assert still.trials.counts("e") == [Arm(0, "control", 0, 2, 2, 1)]
    assert [still.trials.seen("e", unit) for unit in ("u1", "u2", "staff")] == ["control", "control", None]


def test_names_are_told_apart_whatever_is_in_them(still: Store) -> None:
    for number, name in enumerate(ODD):
        made(still, name, {None: 1.0, name: 0.0})
        for other, unit in enumerate(ODD):
            expose(still, unit, name, number, trial=name)
            outcome(still, unit, other, name, id=unit, trial=name)
    for number, name in enumerate(ODD):
        assert still.trials.counts(name) == [Arm(number, name, 0, len(ODD), len(ODD), 0)]
        found = still.trials.matured(name, name)
        assert [(each.unit, each.arm, each.values.total) for each in found] == [
            (unit, name, float(other)) for other, unit in enumerate(ODD)
        ]
        assert still.trials.seen(name, ODD[0]) == name
    assert [each.name for each in still.trials.trials()] == sorted(ODD)


def test_namespaces_keep_experiments_and_leases_apart(make_store: Callable[..., Store]) -> None:
    one, other = make_store("one"), make_store("other")
    made(one)
    made(other)
    expose(one, "u1")
    assert one.trials.lease("e", "a", 60.0).holder == "a"
    assert (one.trials.tally("e").units, other.trials.tally("e").units) == (1, 0)
    assert other.trials.lease("e", "b", 60.0).holder == "b"
    other.trials.remove("e")
    assert one.trials.tally("e").units == 1


def test_exposures_of_many_threads_are_each_counted_once(store: Store) -> None:
    made(store)

    def work() -> None:
        for number in range(500):
            expose(store, f"u{number}")

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert store.trials.tally("e") == Tally(500)
    assert store.trials.counts("e") == [Arm(0, "control", 0, 500, 500, 0)]


def test_what_is_posted_for_no_experiment_or_to_no_unit_does_no_harm(still: Store) -> None:
    expose(still, "u1")
    outcome(still, "u1", 1.0)
    call(still, "u1")
    made(still)
    outcome(still, "u1", 1.0)
    call(still, "u1")
    assert still.trials.tally("e") == Tally(stray=1)
    expose(still, "u1")
    outcome(still, "u1", 1.0, "undeclared")
    outcome(still, "u1", math.nan)
    assert still.trials.tally("e") == Tally(1, stray=3)
    assert (still.trials.tally("none"), still.trials.matured("none", "x"), still.trials.seen("none", "u")) == (
        Tally(),
        [],
        None,
    )


# -- windows -----------------------------------------------------------------------------------------------------------
def test_units_are_told_in_order_of_exposure_once_their_window_is_over(still: Store, clock: FakeClock) -> None:
    made(still)
    for number in range(5):
        expose(still, f"u{number}")
        clock.advance(10.0)
    said = still.trials.now()
    outcome(still, "u4", 1.0, at=said)
    clock.advance(59.0)
    assert still.trials.matured("e", "resolved") == []
    clock.advance(1.0)
    assert numbers(still.trials.matured("e", "resolved")) == [1]
    clock.advance(20.0)
    assert numbers(still.trials.matured("e", "resolved")) == [1, 2, 3]
    assert numbers(still.trials.matured("e", "resolved", after=1)) == [2, 3]
    clock.advance(100.0)
    assert numbers(still.trials.matured("e", "resolved", after=3, most=1)) == [4]
    assert numbers(still.trials.matured("e", "resolved", after=4)) == [5]
    assert numbers(still.trials.matured("e", "resolved", most=2)) == [1, 2]
    assert still.trials.matured("e", "resolved", after=5) == []
    assert still.trials.matured("e", "resolved")[4].values == Values(1, 1.0, 1.0, 1.0, said)
    assert still.trials.matured("e", "resolved")[0].values == Values()
    assert still.trials.matured("e", "resolved")[0].values.mean is None


def test_values_of_a_unit_gather_by_what_they_are_of(still: Store, clock: FakeClock) -> None:
    """Of the same call, the last one holds; the unit's own figure is made of all."""
    made(still)
    at = expose(still, "u1")
    outcome(still, "u1", 3.0, id="second", at=at + 20)
    outcome(still, "u1", 1.0, id="first", at=at + 10)
    outcome(still, "u1", 9.0, at=at + 30)
    still.flush(10)
    outcome(still, "u1", 5.0, at=at + 40)
    outcome(still, "u1", 5.0, at=at + 40)
    clock.advance(200.0)
    (found,) = still.trials.matured("e", "resolved")
    assert found.values == Values(3, 9.0, 1.0, 5.0, at + 10)
    assert found.values.mean == 3.0


def test_what_comes_after_the_window_or_after_it_was_told_is_late(still: Store, clock: FakeClock) -> None:
    made(still)
    at = expose(still, "u1")
    outcome(still, "u1", 1.0, id="in", at=at + 100.0)
    outcome(still, "u1", 1.0, id="out", at=at + 100.1)
    call(still, "u1", at=at + 100.1)
    clock.advance(105.0)
    outcome(still, "u1", 1.0, id="arrives in the grace", at=at + 99.0)
    clock.advance(5.1)
    (told,) = still.trials.matured("e", "resolved")
    assert told.values.size == 2
    outcome(still, "u1", 1.0, id="arrives too late", at=at + 99.0)
    outcome(still, "u1", 0.0, id="in", at=at + 99.0)
    call(still, "u1", at=at + 99.0)
    assert still.trials.matured("e", "resolved") == [told]
    assert still.trials.tally("e") == Tally(1, late=3, repeated=1)
    assert still.trials.matured("e", None)[0].calls.calls == 1, "nobody was told of its calls yet"


def test_without_a_window_a_unit_is_ready_with_its_first_value_or_after_the_grace(
    still: Store, clock: FakeClock
) -> None:
    made(still)
    for unit in ("slow", "fast", "never", "last"):
        expose(still, unit)
    outcome(still, "fast", 1.0, "at once")
    assert still.trials.matured("e", "at once") == [], "the one before it holds it up"
    outcome(still, "slow", 0.0, "at once")
    outcome(still, "slow", 1.0, "at once", id="another")
    outcome(still, "last", 1.0, "at once")
    assert [(each.unit, each.values.total) for each in still.trials.matured("e", "at once")] == [
        ("slow", 0.0),
        ("fast", 1.0),
    ]
    still.flush(10)
    outcome(still, "last", 0.0, "at once")
    clock.advance(10.0)
    assert [(each.unit, each.values.mean) for each in still.trials.matured("e", "at once", after=2)] == [
        ("never", None),
        ("last", 1.0),
    ]
    assert still.trials.tally("e").late == 2


@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one by one"])
def test_without_a_window_the_first_value_is_corrected_by_its_id_until_it_is_told(still: Store, together: bool) -> None:
    made(still)
    expose(still, "u1")
    expose(still, "u2")
    for id, value in [("a1", 1.0), ("a2", 3.0), ("a1", 0.0), (None, 5.0)]:
        outcome(still, "u1", value, "at once", id=id)
        if not together:
            still.flush(10)
    outcome(still, "u2", 1.0, "at once")
    outcome(still, "u2", 0.0, "at once")
    told = still.trials.matured("e", "at once")
    assert [(each.values.size, each.values.total) for each in told] == [(1, 0.0), (1, 1.0)]
    assert still.trials.tally("e") == Tally(2, late=3)
    outcome(still, "u1", 1.0, "at once", id="a1")
    assert still.trials.matured("e", "at once") == told, "what was told never changes"
    assert still.trials.tally("e") == Tally(2, late=4)


def test_calls_are_summed_within_their_window_and_the_first_is_known(still: Store, clock: FakeClock) -> None:
    made(still)
    expose(still, "u1")
    call(still, "u1", failed=True, latency=2.0, list_nano=10)
    call(still, "u1", fell_back=True, list_nano=5)
    still.flush(10)
    call(still, "u1", latency=1.0, list_nano=1)
    call(still, "u1", latency=math.nan, list_nano=-5)
    clock.advance(101.0)
    call(still, "u1")
    expose(still, "u2")
    clock.advance(200.0)
    one, other = still.trials.matured("e", None)
    assert one.calls == Calls(4, 1, 1, 16, 2, 3.0)
    assert one.first_call == Calls(1, 1, 0, 10, 1, 2.0)
    assert (other.calls, other.first_call) == (Calls(), Calls())
    assert still.trials.tally("e") == Tally(2, repeated=1)


@pytest.mark.parametrize("together", [False, True])
def test_a_call_that_is_posted_again_by_who_was_interrupted_is_counted_once(
    still: Store, clock: FakeClock, together: bool
) -> None:
    """In one batch or in several; another call of the unit that is alike counts, and so does one without `once`."""
    made(still)
    expose(still, "u")
    at, first, second = clock.time(), Once(), Once()
    for once in (first, first, second, None, first, None, second):
        call(still, "u", at=at, arm="control", list_nano=5, once=once)
        if not together:
            assert still.trials.ended("e")[0].arm == "control"
    assert still.trials.ended("e") == [Ended("control", 4)]
    clock.advance(WINDOWS[None] + 11.0)
    assert [unit.calls.calls for unit in still.trials.matured("e", None)] == [4]
    assert [unit.calls.list_nano for unit in still.trials.matured("e", None)] == [20]


def test_without_a_window_the_first_call_alone_counts(still: Store, clock: FakeClock) -> None:
    made(still, windows={None: 0.0})
    expose(still, "u1")
    call(still, "u1", list_nano=7)
    call(still, "u1", list_nano=1)
    still.flush(10)
    call(still, "u1", list_nano=1)
    (found,) = still.trials.matured("e", None)
    assert found.calls == found.first_call == Calls(1, 0, 0, 7)
    call(still, "u1", list_nano=1)
    assert still.trials.tally("e") == Tally(1, repeated=3), "a user's next calls are no outcomes that came late"
    expose(still, "u2")
    clock.advance(20.0)
    assert len(still.trials.matured("e", None)) == 2
    call(still, "u2")
    assert still.trials.tally("e") == Tally(2, late=1, repeated=3), "it was counted as one that never ended"


@pytest.mark.parametrize("window", [0.0, 100.0])
@pytest.mark.parametrize("together", [True, False], ids=["in one batch", "one by one"])
def test_it_is_known_how_all_calls_ended_by_what_answered_them(still: Store, window: float, together: bool) -> None:
    made(still, windows={None: window})
    expose(still, "u1")
    expose(still, "u1", "cot", 1)
    for ends in (
        {"arm": "control"}, {"arm": "control", "fell_back": True}, {"arm": "cot", "failed": True},
        {"arm": "cot", "abandoned": True}, {"arm": "cot", "failed": True}, {},
    ):  # fmt: skip
        call(still, "u1", **ends)
        if not together:
            still.flush(10)
    call(still, "nobody", arm="cot")
    assert still.trials.ended("e") == [Ended("control", 2, 0, 1, 0), Ended("cot", 3, 2, 0, 1)]
    assert still.trials.ended("none") == []
    assert still.trials.tally("e").late == 0
    still.trials.remove("e")
    made(still, windows={None: window})
    assert still.trials.ended("e") == []


def test_an_exposure_from_the_future_holds_nobody_up(still: Store, clock: FakeClock) -> None:
    """The clock of another machine may be wrong."""
    made(still)
    now = still.trials.now()
    expose(still, "u1", at=now + 1e6)
    still.flush(10)
    clock.advance(110.0)
    (found,) = still.trials.matured("e", "resolved")
    assert found.at == now


# -- the controller ----------------------------------------------------------------------------------------------------
def test_a_checkpoint_is_saved_in_the_place_of_the_one_that_was_read(still: Store, clock: FakeClock) -> None:
    trials = still.trials
    made(still)
    assert trials.checkpoint("e") is None
    assert not trials.save("e", "{}", 1)
    assert trials.save("e", '{"n": 1}', 0)
    assert not trials.save("e", '{"n": 9}', 0)
    clock.advance(5.0)
    assert trials.save("e", '{"n": 2}', 1)
    found = trials.checkpoint("e")
    assert found == ('{"n": 2}', 2, trials.now())
    assert not trials.save("another", "{}", 0)
    assert trials.checkpoint("another") is None


def test_a_lease_is_its_holder_s_until_it_is_over(still: Store, clock: FakeClock) -> None:
    trials, now = still.trials, still.trials.now()
    assert trials.lease("e", "a", 30.0) == Lease("a", now + 30.0)
    assert trials.lease("e", "b", 30.0) == Lease("a", now + 30.0)
    assert trials.lease("another", "b", 30.0).holder == "b"
    clock.advance(20.0)
    assert trials.lease("e", "a", 30.0) == Lease("a", now + 50.0)
    clock.advance(29.0)
    assert trials.lease("e", "b", 30.0).holder == "a"
    clock.advance(1.0)
    assert trials.lease("e", "b", 30.0) == Lease("b", now + 80.0)
    trials.release("e", "a")
    assert trials.lease("e", "a", 30.0).holder == "b"
    trials.release("e", "b")
    assert trials.lease("e", "a", 30.0).holder == "a"


def test_who_looks_has_the_lease_and_sees_how_far_the_experiment_is(still: Store, clock: FakeClock) -> None:
    trials, now = still.trials, still.trials.now()
    trial = made(still)
    for unit in ("u1", "u2"):
        expose(still, unit)
    expose(still, "u2", "cot")
    outcome(still, "nobody", 1.0)
    assert trials.look("e", "a", 30.0) == (Lease("a", now + 30.0), Progress(trial, Tally(2, mixed=1, stray=1), 0))
    assert trials.look("e", "b", 30.0) == (Lease("a", now + 30.0), None)
    assert trials.lease(lease_of("e"), "b", 30.0).holder == "a"
    clock.advance(5.0)
    assert trials.save("e", "{}", 0)
    running = trials.change("e", 1, state=RUNNING)
    assert running is not None
    assert trials.look("e", "a", 30.0) == (Lease("a", now + 35.0), Progress(running, Tally(2, mixed=1, stray=1), 1))
    trials.release(lease_of("e"), "a")
    assert trials.look("e", "b", 30.0)[1] == Progress(running, Tally(2, mixed=1, stray=1), 1)
    assert trials.look("another", "b", 30.0) == (Lease("b", now + 35.0), None)


def test_a_lease_that_was_given_back_is_free_for_other_processes(make_store: Callable[..., Store]) -> None:
    one, other = make_store(), make_store()
    if isinstance(one, MemoryStore):
        pytest.skip("nobody shares it")
    made(one)
    assert one.trials.look("e", "a", 3_600.0)[0].holder == "a"
    assert other.trials.look("e", "b", 3_600.0)[0].holder == "a"
    one.trials.release(lease_of("e"), "a")
    assert one.flush(10)
    assert other.trials.look("e", "b", 3_600.0)[0].holder == "b"
    one.trials.release(lease_of("e"), "a")
    assert one.flush(10)
    assert other.trials.look("e", "c", 3_600.0)[0].holder == "b", "it is no more the first one's to give back"


def test_of_many_who_want_a_lease_one_has_it(store: Store) -> None:
    start, found = threading.Barrier(8), []

    def want(number: int) -> None:
        start.wait(10)
        found.append(store.trials.lease("e", str(number), 60.0).holder == str(number))

    threads = [threading.Thread(target=want, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == [False] * 7 + [True]


@pytest.mark.parametrize("window", ["days", "at once"])
def test_a_clock_that_was_ahead_holds_nobody_up_for_longer_than_it_must(
    still: Store, clock: FakeClock, window: str
) -> None:
    """For a moment it was ten years later: whoever came then is over with those who came next."""
    metric, years = "resolved" if window == "days" else "thumb", 10 * 365 * 86_400.0
    still.trials.create("e", "{}", {None: 0.0, "resolved": 60.0, "thumb": 0.0}, 10.0)
    expose(still, "u1")
    clock.advance(years)
    expose(still, "u2")
    expose(still, "u3")
    assert still.flush(10)
    clock.advance(-years)
    clock.advance(5.0)
    expose(still, "u4")
    outcome(still, "u2", 1.0, metric)
    assert numbers(still.trials.matured("e", metric)) == []
    clock.advance(66.0)
    assert numbers(still.trials.matured("e", metric)) == ([1] if window == "days" else [1, 2, 3, 4])
    expose(still, "u5")
    clock.advance(5.0)
    found = still.trials.matured("e", metric)
    assert numbers(found) == [1, 2, 3, 4]
    assert [each.values.mean for each in found] == [None, 1.0, None, None]
    assert numbers(still.trials.matured("e", metric, after=4)) == []
