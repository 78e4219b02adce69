"""Units that a later stage moves into a candidate: what comes of them then is not control's doing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dspy_prod import Metric, Rollout
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.moving import Moving, begun
from dspy_prod.experiments.opened import Opened
from dspy_prod.options.metrics import error_rate
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.trials import RUNNING, Call, Decision, Exposure, Outcome
from tests.stores.support import FakeClock

DAY = 86_400.0
OK = Metric("ok", window=DAY)
ERRORS = error_rate(window=DAY)
USERS = 400


class World:
    """An experiment of two stages, whose candidate is always wrong, and whose control never is."""

    def __init__(self, *metrics: Metric) -> None:
        self.clock = FakeClock()
        self.store = MemoryStore(clock=self.clock)
        said = Declaration(
            "s", {"control": "A", "new": "B"}, [1.0, 1.0], [each.model_dump(mode="json") for each in metrics],
            rollout=Rollout(stages=(0.05, 0.5), min_users=1).model_dump(mode="json"),
        )  # fmt: skip
        trial = self.store.trials.create("e", said.to_json(), said.windows(metrics))
        self.store.trials.change("e", trial.revision, state=RUNNING)
        self.opened = Opened(self.store, "e")

    @property
    def trials(self) -> Any:
        return self.store.trials

    def call(self, unit: str) -> str:
        """One call of a unit; its arm."""
        now, got = self.trials.now(), self.opened.design.assign(unit, self.opened.trial().stage)
        self.trials.expose(Exposure("e", unit, got.stage, got.variant, got.propensity, now, got.full))
        self.trials.call(Call("e", unit, now, failed=got.variant == "new", arm=got.variant))
        return got.variant

    def say(self, unit: str) -> None:
        """What became of it, by the arm that it has now."""
        got = self.opened.design.assign(unit, self.opened.trial().stage)
        self.trials.outcome(Outcome("e", unit, "ok", float(got.variant == "control"), self.trials.now()))

    def move(self) -> None:
        """As a controller does: the stage, with its line in the audit."""
        trial = self.opened.trial()
        line = Decision("stage", "controller", json.dumps({"reason": "stage 1 of the rollout"}))
        self.trials.change("e", trial.revision, stage=trial.stage + 1, decision=line)

    def evidence(self) -> Any:
        self.opened.controller.read()
        return self.opened.controller._reading.evidence


def test_what_comes_of_units_that_were_moved_up_is_not_control_s() -> None:
    world = World(OK, ERRORS)
    users = [f"u{number}" for number in range(USERS)]
    first = {unit: world.call(unit) for unit in users}
    world.clock.advance(600.0)
    world.move()
    now = {unit: world.call(unit) for unit in users}
    for unit in users:
        world.say(unit)
    moved = [unit for unit in users if first[unit] != now[unit]]
    assert len(moved) > USERS / 3
    world.clock.advance(2 * DAY)
    evidence = world.evidence()
    for metric, control, new in (("ok", 1.0, 0.0), ("error_rate", 0.0, 1.0)):
        assert (evidence.mean(metric, "control"), evidence.mean(metric, "new")) == (control, new)
        assert evidence.units(metric, "control") == USERS - len(moved) - evidence.units(metric, "new")
        assert evidence.units(metric, "new") == list(first.values()).count("new")


def test_of_control_whom_a_stage_reaches_counts_no_more_whether_it_came_back_or_not() -> None:
    """Who comes back is another kind of user than who does not; to leave out the one kind in control alone would make
    equal variants differ. So the hash says who is left out, and of the others how probable each arm was."""
    world = World(OK)
    users = [f"u{number}" for number in range(USERS)]
    first = {unit: world.call(unit) for unit in users}
    world.move()
    world.clock.advance(2 * DAY)
    evidence, design = world.evidence(), world.opened.design
    reached = [unit for unit in users if first[unit] == "control" and design.reaches(unit, 1)]
    assert len(reached) > USERS / 3
    assert evidence.units("ok", "control") == list(first.values()).count("control") - len(reached)
    assert "new=0.05" in next(iter(evidence._ratio._strata)), "the sample ratio goes by the shares of the moment"
    unit = next(each for each in world.trials.matured("e", "ok") if each.arm == "new")
    exposure = Moving(design, [OK]).exposure(unit, begun(world.trials.decisions("e")))
    assert exposure is not None
    assert exposure.propensities == {"control": 0.5, "new": 0.05}


def test_a_stage_that_begins_after_the_window_concerns_nobody() -> None:
    world = World(OK, ERRORS)
    first = [world.call(f"u{number}") for number in range(USERS)]
    world.clock.advance(DAY + 1)
    world.move()
    for number in range(USERS):
        world.call(f"u{number}")
    world.clock.advance(2 * DAY)
    evidence = world.evidence()
    for metric in ("ok", "error_rate"):
        assert evidence.units(metric, "control") == first.count("control")
    assert evidence.mean("error_rate", "control") == 0.0


def test_without_a_window_a_value_counts_that_was_there_before_the_stage() -> None:
    world = World(Metric("ok"), error_rate())
    users = [f"u{number}" for number in range(USERS)]
    first = {unit: world.call(unit) for unit in users}
    early, late = users[: USERS // 2], users[USERS // 2 :]
    world.clock.advance(1.0)
    for unit in early:
        world.say(unit)
    world.clock.advance(1.0)
    world.move()
    world.clock.advance(1.0)
    for unit in users:
        world.call(unit)
    for unit in late:
        world.say(unit)
    world.clock.advance(600.0)
    evidence, design = world.evidence(), world.opened.design
    gone = sum(first[unit] == "control" and design.reaches(unit, 1) for unit in late)
    assert gone > USERS / 6
    assert evidence.units("ok", "control") == list(first.values()).count("control") - gone
    assert evidence.mean("ok", "control") == 1.0
    assert evidence.units("error_rate", "control") == list(first.values()).count("control"), "its first call counts"
    assert evidence.mean("error_rate", "control") == 0.0


@pytest.mark.parametrize("metrics", [(OK, ERRORS), (Metric("ok"), error_rate())], ids=["a day", "at once"])
def test_who_reads_it_all_again_has_the_same_evidence(metrics: tuple[Metric, ...]) -> None:
    world = World(*metrics)
    for number in range(USERS):
        world.call(f"u{number}")
        if number % 2:
            world.say(f"u{number}")
        if number % 50 == 49:
            world.evidence()
    world.move()
    for number in range(USERS + 50):
        world.call(f"u{number}")
        world.say(f"u{number}")
        if number % 50 == 49:
            world.evidence()
            world.clock.advance(3_600.0)
    world.clock.advance(2 * DAY)
    ours = world.evidence().to_dict()
    world.trials._kept["e"].checkpoint = None
    again = Opened(world.store, "e")
    again.controller.read()
    evidence = again.controller._reading.evidence
    assert evidence is not None
    assert evidence.to_dict() == ours


def test_users_hurt_are_also_those_whom_a_stage_has_moved() -> None:
    world = World(error_rate())
    first = [world.call(f"u{number}") for number in range(USERS)]
    world.move()
    now = [world.call(f"u{number}") for number in range(USERS)]
    world.opened.controller.step()
    while world.opened.trial().state == RUNNING and len(now) < 4 * USERS:
        now.append(world.call(f"u{len(now)}"))
        world.opened.controller.step()
    card = world.opened.scorecard()
    assert (card.state, card.decision, card.serves) == ("decided", "rollback", "control")
    assert card.hurt == now.count("new") > first.count("new") + USERS / 3
    assert card.users["new"] < card.hurt
