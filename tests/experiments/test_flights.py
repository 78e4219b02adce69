"""Calls that take minutes: the experiment waits for them, and says for whom."""

from __future__ import annotations

import json
from typing import Any

import dspy
import pytest

from dspy_prod import Experiment, Metric, call_context
from dspy_prod.experiments import flights as module
from dspy_prod.experiments.document import document
from dspy_prod.experiments.flights import BEAT, LONGEST, Flights
from dspy_prod.stores.memory import MemoryStore
from tests.stores.support import FakeClock, until

RESOLVED = Metric("resolved", margin=0.02)


class Slow(dspy.Module):
    """Takes as many beats as it is told, on a clock that stands still otherwise."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__()
        self.clock, self.meanwhile = clock, []

    def __deepcopy__(self, memo: dict[int, Any]) -> Slow:
        return self

    def forward(self, beats: int) -> Any:
        for _ in range(beats):
            self.clock.advance(BEAT)
            for each in self.meanwhile:
                each()
        return dspy.Prediction(done="yes")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def made(clock: FakeClock) -> Experiment:
    program = Slow(clock)
    exp = Experiment(
        "e", variants={"control": program, "new": program}, metrics=[RESOLVED], store=MemoryStore(clock=clock)
    )
    exp._works.flights._clock = clock.monotonic
    program.meanwhile += [exp._works.flights.beat, exp.step]  # a controller looks, too
    return exp


def ask(exp: Experiment, unit: str, beats: int = 0, **more: Any) -> None:
    with call_context(user=unit, **more):
        exp(beats=beats)


def failures(exp: Experiment) -> list[float | None]:
    """Shares of failed calls by unit, as they count; None: as missing."""
    return [each.calls.failed / each.calls.calls if each.calls.calls else None
            for each in exp._works.trials.matured("e", None)]  # fmt: skip


def test_a_call_of_minutes_counts_when_it_ends_and_is_no_error(clock: FakeClock) -> None:
    """The window is 0, and a minute after the exposure it counted as failed."""
    exp = made(clock)
    ask(exp, "u1", beats=12)
    assert failures(exp) == [0.0]
    exp.record("u1", resolved=1)  # its outcome has a minute from the end of the call on
    [unit] = exp._works.trials.matured("e", "resolved")
    assert unit.values.mean == 1.0
    assert exp.scorecard().late == 0


def test_a_call_without_an_end_is_waited_for_ten_minutes(clock: FakeClock) -> None:
    exp = made(clock)
    ask(exp, "u1", beats=round(LONGEST / BEAT) + 6)
    assert failures(exp) == [None]
    assert exp.scorecard().late == 1
    flight = exp._works.flights.flight("u2")
    exp._works.flights.begin(flight)
    assert exp._works.flights.beat() == 0
    clock.advance(LONGEST)
    assert exp._works.flights.beat() == 1
    clock.advance(1.0)
    assert exp._works.flights.beat() == 0
    exp._works.flights.end(flight)


def test_a_deadline_bounds_how_long_it_is_waited_for(clock: FakeClock) -> None:
    flights = Flights("e", MemoryStore(clock=clock).trials, clock.monotonic)
    with call_context(deadline=90.0):
        from dspy_prod.context.current import current

        flights.begin(flights.flight("u1", current().deadline))
    clock.advance(80.0)
    assert flights.beat() == 1
    clock.advance(11.0)
    assert flights.beat() == 0


def test_a_thread_says_so_and_ends_when_there_are_no_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.01)
    told: list[Any] = []
    trials = MemoryStore().trials
    monkeypatch.setattr(trials, "underway", told.append)
    flights = Flights("e", trials)
    flight = flights.flight("u1")
    flights.begin(flight)
    until(lambda: len(told) >= 2)
    flights.end(flight)
    until(lambda: flights._thread is None)
    assert {each.unit for each in told} == {"u1"}
    flight = flights.flight("u2")
    flights.begin(flight)
    flights.end(flight)
    until(lambda: flights._thread is None)


def test_the_card_says_who_is_waited_for_and_until_when(clock: FakeClock) -> None:
    """With outcomes missing it read "of 0 users" for a minute, as if nobody had come."""
    exp = made(clock)
    for number in range(12):
        ask(exp, f"u{number}")
    began = clock.time()
    card = exp.scorecard()
    assert (card.waiting["resolved"].units, card.waiting["error_rate"].units) == (12, 0)
    assert card.waiting["resolved"].until == pytest.approx(began + 60.0)
    words = "0 of 12 users: 12 are waited for, the first until "
    for text in (str(card), card._view().html(), document(card)):
        assert words in text
        assert "resolved" in text
    assert json.loads(json.dumps(card.to_dict()))["waiting"]["resolved"] == {
        "units": 12, "until": card.waiting["resolved"].until,
    }  # fmt: skip
    assert exp.to_dict()["waiting"]["cost"] == {"units": 0, "until": None}
    exp.record("u0", resolved=1)
    assert "1 of 12 users: 11 are waited for" in str(exp.scorecard())
    clock.advance(61.0)
    assert "waited for" not in str(exp.scorecard())


def test_a_sample_ratio_that_is_off_is_seen_before_any_window_is_over(clock: FakeClock) -> None:
    """Who was exposed is known at once: the alarm needs no outcome, and waited for the calls' window of days."""
    from dspy_prod.options.metrics import error_rate
    from dspy_prod.stores.trials import Exposure

    program = Slow(clock)
    exp = Experiment(
        "e", variants={"control": program, "new": program}, metrics=[RESOLVED], store=MemoryStore(clock=clock),
        guardrails=[error_rate(window="3d")],
    )  # fmt: skip
    for number in range(400):
        exp._works.trials.expose(Exposure("e", f"u{number}", 0, "control", 0.5, clock.time()))
    card = exp.step()
    assert (card.decision, card.state) == ("invalid", "paused")
    assert card.waiting["error_rate"].units == 400
