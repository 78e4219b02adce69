"""How much a memory store keeps of experiments."""

from __future__ import annotations

from dspy_prod.stores.memory_trials import MemoryTrials
from dspy_prod.stores.trials import Arm, Exposure, Outcome, Tally


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
