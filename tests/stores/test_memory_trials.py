"""How much a memory store keeps of experiments."""

from __future__ import annotations

from functools import partial

import pytest

from dspy_prod.stores.memory_trials import MemoryTrials
from dspy_prod.stores.trials import Arm, Call, Ended, Exposure, Once, Outcome, Tally
from tests.interrupts import interrupted_at_line


def test_units_beyond_what_is_kept_are_not_counted_and_said_to_be(  # else they would be counted twice when they return
) -> None:
    trials = MemoryTrials(lambda: 0.0, most_units=3)
    for name in ("e", "other"):
        trials.create(name, "{}", {"m": 1.0})
    for number in range(5):
        trials.expose(Exposure("e", f"u{number % 4}", 0, "control", 0.5, 0.0))
    trials.expose(Exposure("other", "u", 0, "control", 0.5, 0.0))
    assert trials.tally("e") == Tally(3, unkept=1)
    assert trials.tally("other") == Tally(unkept=1)
    assert trials.counts("e") == [Arm(0, "control", 0, 3, 3, 0)]
    trials.remove("e")
    trials.expose(Exposure("other", "u", 0, "control", 0.5, 0.0))
    assert trials.tally("other") == Tally(1, unkept=1)


def test_values_beyond_what_is_kept_are_not_counted_and_corrections_are() -> None:
    trials = MemoryTrials(lambda: 0.0, most_values=2)
    trials.create("e", "{}", {"m": 1.0}, 0.0)
    trials.expose(Exposure("e", "u", 0, "control", 0.5, -9.0))
    for id, value in (("a", 1.0), ("b", 2.0), ("c", 4.0), ("a", 8.0)):
        trials.outcome(Outcome("e", "u", "m", value, -9.0, id))
    assert trials.matured("e", "m")[0].values.total == 10.0
    assert trials.tally("e") == Tally(1, unkept=1)
    trials.remove("e")
    trials.create("e", "{}", {"m": 1.0}, 0.0)
    trials.expose(Exposure("e", "u", 0, "control", 0.5, -9.0))
    trials.outcome(Outcome("e", "u", "m", 1.0, -9.0))
    assert trials.matured("e", "m")[0].values.size == 1


@pytest.mark.parametrize("at", [-9.0, -99.0], ids=["counted", "late"])
def test_wherever_ctrl_c_comes_as_a_call_is_counted_it_is_wholly_or_not_at_all(at: float) -> None:
    """Half of it was: as of its arm, and not of its unit."""
    trials = MemoryTrials(lambda: 0.0)
    trials.create("e", "{}", {None: 10.0}, 0.0)
    for number in range(99):
        trials.expose(Exposure("e", f"u{number}", 0, "control", 0.5, -9.0))
        call = Call("e", f"u{number}", at, list_nano=None, arm="control", once=Once())
        before = [*trials.ended("e"), trials.tally("e")]
        came, _ = interrupted_at_line(partial(trials.call, call), number, "memory_trial.py")
        assert call.once is not None
        assert call.once.taken or [*trials.ended("e"), trials.tally("e")] == before, number
        trials.call(call)
        assert trials.ended("e") == [Ended("control", number + 1)], number
        counted = trials.tally("e")
        assert counted.late + counted.unpriced == number + 1, number
        if not came:
            break
    assert 10 < number < 98
