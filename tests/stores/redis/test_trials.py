"""Experiments in Redis: processes that share a server, bounds, what it costs, and what is damaged or gone."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from dspy_prod.runtime.processes import this_process
from dspy_prod.stores.redis import trial_reading, trial_writing, trials
from dspy_prod.stores.redis.asking import KEPT_FOR, named
from dspy_prod.stores.redis.trial_steps import PARTS
from dspy_prod.stores.trials import Arm, Call, Decision, Exposure, Lease, Outcome, Tally, Underway
from tests.stores.redis.looking import commands, keys_of
from tests.stores.redis.standin import Served
from tests.stores.support import FakeClock
from tests.stores.trial_support import call, expose, made, numbers, outcome

HOLDS = [*(f"trial:e:{part}" for part in PARTS), "trial:e", "trials"]


def fill(store: Served, name: str = "e") -> None:
    """Something in every key of an experiment."""
    made(store, name)
    for unit in ("u1", "u2"):
        expose(store, unit, trial=name)
        expose(store, unit, "b", 1, trial=name)
        expose(store, unit, "c", 1, trial=name)
        outcome(store, unit, 1.0, trial=name)
        call(store, unit, trial=name, arm="control")
        store.trials.underway(Underway(name, unit, store.trials.now()))
    store.trials.decide(name, Decision("note", "x", ""))


def check_units(store: Served, name: str = "e") -> int:
    """Numbers without a gap, each unit once, counts that agree; how many units there are."""
    client, key = store.connection.client(), store.connection.key("trial", name)
    units = store.trials.tally(name).units
    known, rows = client.hgetall(f"{key}:numbers"), client.hgetall(f"{key}:units")
    assert sorted(map(int, known.values())) == sorted(map(int, rows)) == list(range(1, units + 1))
    arms = Counter(named(row.split(b" ")[4]) for row in rows.values())
    first: Counter[str] = Counter()
    for arm in store.trials.counts(name):
        first[arm.arm] += arm.first
    assert +first == arms
    return units


# -- how long and how much is kept -------------------------------------------------------------------------------------
def test_every_key_ends_400_days_after_the_last_word_of_its_experiment(served: Served) -> None:
    fill(served)
    assert set(keys_of(served.connection)) == set(HOLDS)
    client, key = served.connection.client(), served.connection.key
    for part in HOLDS:
        client.expire(key(*part.split(":")), 100)
    call(served, "u1")
    served.flush()
    assert set(keys_of(served.connection).values()) <= {KEPT_FOR, KEPT_FOR - 1}
    assert served.trials.lease("controller", "a", 60.0).holder == "a"
    assert 60 < keys_of(served.connection)["trial-lease:controller"] < 2 * 86_400


def test_a_removed_experiment_leaves_no_key(served: Served) -> None:
    fill(served)
    served.trials.remove("e")
    assert keys_of(served.connection) == {}


def test_an_experiment_whose_head_is_gone_begins_anew(served: Served) -> None:
    """A server that is short of memory may drop any key; so may whoever sets a shorter life."""
    fill(served)
    client, key = served.connection.client(), served.connection.key
    client.delete(key("trial", "e"))
    assert (served.trials.trial("e"), served.trials.trials(), served.trials.tally("e")) == (None, [], Tally())
    expose(served, "u3")
    assert served.trials.matured("e", "resolved") == []
    made(served, "another")
    assert [each.name for each in served.trials.trials()] == ["another"]
    assert client.smembers(key("trials")) == {b"another"}
    made(served)
    assert (served.trials.counts("e"), served.trials.decisions("e"), served.trials.seen("e", "u1")) == ([], [], None)
    expose(served, "u1")
    assert check_units(served) == 1


def test_units_beyond_the_bound_are_served_and_not_counted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_writing, "MOST_UNITS", 3)
    monkeypatch.setattr(trial_writing, "MOST_VALUES", 2)
    made(served)
    for number in range(5):
        expose(served, f"u{number}")
    expose(served, "u0", "b")
    for number in (1.0, 2.0):
        for unit in ("u0", "u1", "u2", "u4"):
            outcome(served, unit, number)
    assert served.trials.tally("e") == Tally(3, mixed=1, stray=2, unkept=2 + 2)
    assert check_units(served) == 3
    fields = served.connection.client().hvals(served.connection.key("trial", "e", "values"))
    assert {row.split(b" ")[0] for row in fields} == {b"2.0"}, "values that are there are still corrected"


def test_so_many_units_are_waited_for_longer_than_others(open_served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_writing, "MOST_UNDERWAY", 2)
    clock = FakeClock()
    store = open_served(clock=clock)
    made(store)
    calling = store.connection.key("trial", "e", "calling")

    def goes_on(*units: str) -> set[bytes]:
        for unit in units:
            expose(store, unit)
            store.trials.underway(Underway("e", unit, store.trials.now(), 20.0))
        store.flush()
        return set(store.connection.client().zrange(calling, 0, -1))

    assert goes_on("u1", "u2", "u3") == {b"1", b"2"}
    clock.advance(15.0)
    assert goes_on("u1", "u3") == {b"1", b"2"}
    clock.advance(6.0)
    assert goes_on("u3") == {b"1", b"3"}, "the second one is not waited for any more"


# -- what it costs -----------------------------------------------------------------------------------------------------
def test_a_look_and_a_new_unit_cost_the_same_in_a_small_and_a_large_experiment(open_served: Any) -> None:
    clock = FakeClock()
    store, found = open_served(clock=clock), []
    made(store)

    def some(first: int) -> None:
        for number in range(first, first + 50):
            expose(store, f"u{number}", "ab"[number % 2])
            call(store, f"u{number}")
            outcome(store, f"u{number}", 1.0)
        store.flush()

    def look() -> None:
        store.trials.tally("e"), store.trials.counts("e"), store.trials.checkpoint("e")

    for first in (0, 2_000):
        if first:
            for number in range(50, first):
                expose(store, f"u{number}", "ab"[number % 2])
        store.flush()
        found.append((commands(store.connection, lambda first=first: some(first)), commands(store.connection, look)))
        assert store.connection.client().hlen(store.connection.key("trial", "e", "arms")) == 4
    assert found[0] == found[1]
    assert found[1][1] == {"hmget": 2, "hgetall": 1, "info": 1}


def test_a_mark_is_moved_in_steps_and_units_are_read_in_pages(
    open_served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for the server while it goes over a million units."""
    monkeypatch.setattr(trials, "_STEP", 7)
    monkeypatch.setattr(trial_reading, "PAGE", 5)
    clock = FakeClock()
    store = open_served(clock=clock)
    made(store)
    for number in range(40):
        expose(store, f"u{number}")
        outcome(store, f"u{number}", float(number))
    clock.advance(200.0)
    found = store.trials.matured("e", "resolved", most=20)
    assert [(each.number, each.values.total) for each in found] == [(number + 1, float(number)) for number in range(20)]
    assert store.connection.client().hget(store.connection.key("trial", "e"), "read resolved") == b"20"
    assert numbers(store.trials.matured("e", "resolved")) == list(range(1, 41))


def test_who_is_over_behind_a_clock_that_was_ahead_is_found_over_many_pages(
    open_served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_reading, "PAGE", 5)
    clock = FakeClock()
    store = open_served(clock=clock)
    made(store)
    clock.advance(1e9)
    for number in range(30):
        expose(store, f"ahead {number}")
    store.flush()
    clock.advance(-1e9)
    assert store.trials.matured("e", "resolved") == []
    expose(store, "over")
    store.flush()
    clock.advance(1e9)
    for number in range(30):
        expose(store, f"ahead again {number}")
    store.flush()
    clock.advance(200.0 - 1e9)
    assert numbers(store.trials.matured("e", "resolved")) == list(range(1, 32))


def test_nano_usd_are_exact_beyond_what_a_double_holds(open_served: Any) -> None:
    clock = FakeClock()
    store = open_served(clock=clock)
    made(store)
    expose(store, "u1")
    for _ in range(30):
        call(store, "u1", list_nano=10**15 - 1, latency=0.1)
        store.flush()
    clock.advance(200.0)
    (found,) = store.trials.matured("e", None)
    assert found.calls.list_nano == 30 * (10**15 - 1)
    assert found.first_call.list_nano == 10**15 - 1
    latency = 0.0
    for _ in range(30):
        latency += 0.1
    assert found.calls.latency == latency, "added up as in every other store"


# -- processes ---------------------------------------------------------------------------------------------------------
def test_of_two_workers_that_expose_the_same_units_the_first_wins(open_served: Callable[..., Served]) -> None:
    """Commits of both fall between each other; each unit is counted once, with the calls of both."""
    units, stores = 1_000, [open_served(), open_served()]
    made(stores[0])
    start = threading.Barrier(2)

    def work(arm: int) -> None:
        store = stores[arm]
        start.wait(10)
        for number in range(units):
            unit = f"u{number if arm else units - 1 - number}"
            expose(store, unit, f"arm {arm}")
            call(store, unit, list_nano=1)
            outcome(store, unit, 1.0, id="the same")
            if number % 20 == 0:
                store.flush()
        store.flush()

    threads = [threading.Thread(target=work, args=(arm,)) for arm in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    store = stores[0]
    assert check_units(store) == units
    assert store.trials.tally("e") == Tally(units, mixed=units)
    arms = store.trials.counts("e")
    assert [(arm.arm, arm.first, arm.mixed) for arm in arms] == [(arm.arm, arm.units, arm.units) for arm in arms]
    assert len(arms) == 2, "both were first somewhere"
    client, key = store.connection.client(), store.connection.key
    rows = [row.split(b" ") for row in client.hvals(key("trial", "e", "calls"))]
    assert Counter(row[0] for row in rows) == {b"2": units}
    assert client.hlen(key("trial", "e", "values")) == units


def test_the_lease_of_a_process_that_has_ended_is_free_at_once(served: Served) -> None:
    host, boot, *_ = this_process().split(" ")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    held = served.trials.lease("controller", "dead", 3_600.0)
    assert served.trials.lease("controller", "heir", 60.0) == held
    key = served.connection.key("trial-lease", "controller")
    served.connection.client().hset(key, "process", f"{host} {boot} {ended.pid} -")
    assert served.trials.lease("controller", "heir", 60.0).holder == "heir"
    assert served.trials.lease("controller", "other", 60.0).holder == "heir"


def test_the_lease_of_a_process_on_another_machine_is_its_own_until_it_ends(open_served: Any) -> None:
    clock = FakeClock()
    store = open_served(clock=clock)
    held = store.trials.lease("controller", "far", 60.0)
    key = store.connection.key("trial-lease", "controller")
    store.connection.client().hset(key, "process", "another-machine boot 1 -")
    assert store.trials.lease("controller", "near", 60.0) == held == Lease("far", held.until)
    clock.advance(60.0)
    assert store.trials.lease("controller", "near", 60.0).holder == "near"


def test_who_was_thought_dead_cannot_write_over_what_its_heir_saved(open_served: Any) -> None:
    clock = FakeClock()
    slow, heir = open_served(clock=clock), open_served(clock=clock)
    revision = made(slow).revision
    assert slow.trials.lease("e", "slow", 10.0).holder == "slow"
    assert slow.trials.save("e", "first", 0)
    clock.advance(11.0)
    assert heir.trials.lease("e", "heir", 10.0).holder == "heir"
    assert heir.trials.save("e", "second", 1)
    assert heir.trials.change("e", revision, stage=1) is not None
    assert not slow.trials.save("e", "third", 1)
    assert slow.trials.change("e", revision, stage=9, decision=Decision("promote", "slow", "")) is None
    assert slow.trials.decisions("e") == []
    assert slow.trials.checkpoint("e") == heir.trials.checkpoint("e")


def test_what_one_process_was_told_is_final_for_all(open_served: Any) -> None:
    clock = FakeClock()
    one, other = open_served(clock=clock), open_served(clock=clock)
    made(one)
    at = expose(one, "u1")
    outcome(one, "u1", 1.0, id="a")
    clock.advance(200.0)
    told = one.trials.matured("e", "resolved")
    outcome(other, "u1", 0.0, id="a", at=at + 1.0)
    outcome(other, "u1", 0.0, id="b", at=at + 1.0)
    expose(other, "u1", "cot")
    assert other.trials.matured("e", "resolved") == told
    assert one.trials.matured("e", "resolved") == told
    other.flush()
    assert one.trials.tally("e") == Tally(1, mixed=1, late=2)


# -- what does not fit, and what is damaged ----------------------------------------------------------------------------
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
def test_what_does_not_fit_is_told_and_takes_nothing_else_with_it(
    served: Served, wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made(served)
    expose(served, "u1")
    served.trials._post(wrong)
    expose(served, "u2")
    served.flush()
    assert check_units(served) == 2
    assert "cannot be written" in caplog.text


def test_a_unit_whose_row_is_gone_or_damaged_harms_no_other(open_served: Any) -> None:
    clock = FakeClock()
    store = open_served(clock=clock)
    made(store)
    for unit in ("u1", "u2", "u3"):
        expose(store, unit)
        call(store, unit)
    store.flush()
    client, key = store.connection.client(), store.connection.key("trial", "e", "units")
    client.hdel(key, "1")
    client.hset(store.connection.key("trial", "e", "calls"), "2", "rubbish")
    for unit in ("u2", "u3"):
        call(store, unit)
    clock.advance(200.0)
    assert [(each.unit, each.calls.calls) for each in store.trials.matured("e", None)] == [("u2", 1), ("u3", 2)]


def test_what_is_posted_to_a_closed_store_is_told_and_not_raised(
    open_served: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    store = open_served()
    made(store)
    expose(store, "u1")
    store.close()
    expose(store, "late")
    assert "1 exposures, calls and outcomes of experiments were not written" in caplog.text
    assert open_served().trials.counts("e") == [Arm(0, "control", 0, 1, 1, 0)]
