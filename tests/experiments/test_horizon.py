"""An experiment that stays undecided asks a person, once."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError, Experiment, Metric, Rollout, call_context
from dspy_prod.cli import main
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.horizon import Horizon
from dspy_prod.experiments.opened import Opened
from dspy_prod.experiments.operating import put
from dspy_prod.stores.memory import MemoryStore
from tests.experiments.conftest import Triage
from tests.experiments.support import declared, feed, lines
from tests.stores.support import FakeClock

SAME = {"control": 0.5, "new": 0.5}
DAY = 86_400.0


def held(horizon: dict[str, Any] | None, clock: FakeClock | None = None, **more: Any) -> Opened:
    """An experiment of two equal variants that has begun."""
    opened = declared(MemoryStore(clock=clock or FakeClock()), state=None, horizon=horizon, **more)
    put(opened.trials, "e", "start")
    return opened


def test_after_so_many_users_it_pauses_once_and_goes_on_when_somebody_says_so() -> None:
    opened, told = held({"units": 100}), list[Any]()
    feed(opened, 99, SAME)
    opened.controller.step()
    assert opened.trial().state == "running"
    assert opened.scorecard().horizon == "pauses if undecided after 100 users: 99 so far"
    feed(opened, 1, SAME, begin=99)
    remove = dspy_prod.add_listener(told.append)
    try:
        for _ in range(3):
            opened.controller.step()
    finally:
        remove()
    assert opened.trial().state == "paused"
    (line,) = lines(opened, "pause")
    reason = json.loads(line.evidence)["reason"]
    assert reason.startswith("inconclusive: the horizon is reached (100 users): new is not proven better")
    assert line.by == "controller"
    assert [(each.name, each.data["what"]) for each in told] == [("experiment_alarm", "pause")]
    card = opened.scorecard()
    assert "reached, and told" in str(card.horizon)
    assert "horizon" in str(card)
    put(opened.trials, "e", "resume")
    for controller in (opened.controller, Opened(opened._store, "e").controller):
        controller.step()
        assert opened.trial().state == "running"
    assert len(lines(opened, "pause")) == 1


def test_a_duration_is_counted_from_the_start() -> None:
    clock = FakeClock()
    opened = declared(MemoryStore(clock=clock), state=None, horizon={"seconds": 30 * DAY})
    clock.advance(40 * DAY)  # it was made long ago
    assert opened.scorecard().horizon == "pauses if undecided after 30 days"
    put(opened.trials, "e", "start")
    feed(opened, 20, SAME)
    clock.advance(30 * DAY - 1)
    opened.controller.step()
    assert opened.trial().state == "running"
    assert ", on 20" in str(opened.scorecard().horizon)
    clock.advance(1)
    opened.controller.step()
    assert opened.trial().state == "paused"
    assert "(30 days)" in lines(opened, "pause")[0].evidence


def test_what_is_decided_by_then_is_decided_and_no_stage_begins_after_it() -> None:
    opened = held({"units": 100})
    feed(opened, 400, {"control": 0.05, "new": 0.95})
    opened.controller.step()
    assert opened.trial().state == "decided"
    rollout = Rollout(stages=(0.3, 0.5), min_users=1, min_time=0.0).model_dump(mode="json")
    staged = held({"units": 100}, rollout=rollout)
    feed(staged, 400, SAME)
    staged.controller.step()
    assert (staged.trial().state, staged.trial().stage) == ("paused", 0)


def test_without_a_horizon_nothing_is_kept_of_it_which_earlier_releases_could_not_read() -> None:
    opened = held(None)
    feed(opened, 400, SAME)
    opened.controller.step()
    assert opened.trial().state == "running"
    assert opened.scorecard().horizon is None
    assert "horizon" not in json.loads(opened.trial().declaration)
    assert Declaration.from_json(opened.trial().declaration).horizon is None


def test_an_experiment_keeps_its_horizon_and_refuses_another_one(store: str) -> None:
    def made(horizon: Any) -> Experiment:
        variants = {"control": Triage(), "new": Triage("Think first.")}
        return Experiment("e", variants=variants, metrics=[Metric("ok")], store=store, horizon=horizon)

    for same in ("30d", dt.timedelta(days=30), 30 * DAY):
        assert made(same).scorecard().horizon is not None
    for other in (None, "31d", 20_000):
        with pytest.raises(ConfigError, match="there is one of this name with horizon="):
            made(other)
    assert made("30d")._works.opened.declaration.horizon == {"seconds": 30 * DAY}


@pytest.mark.parametrize("horizon", [0, -1, True, 0.0, -1.0, float("nan"), float("inf"), "soon", "3", [5], "99999999d"])
def test_a_horizon_that_cannot_be_is_refused(horizon: Any, store: str) -> None:
    with pytest.raises(ConfigError, match=r"horizon=.* must be a whole number of units"):
        Experiment("e", variants={"control": Triage(), "new": Triage("Think.")}, store=store, horizon=horizon)


def test_a_plan_tells_the_horizon_and_warns_of_one_that_comes_too_early(store: str) -> None:
    def plan(name: str, horizon: Any) -> Any:
        variants = {"control": Triage(), "new": Triage("Think.")}
        exp = Experiment(name, variants=variants, metrics=[Metric("ok")], store=store, horizon=horizon)
        return exp.plan(users_per_day=800, baseline={"ok": 0.8})

    for name, early in (("a", 500), ("b", "12h")):
        found = plan(name, early)
        assert any("comes before" in each and "most likely it pauses undecided" in each for each in found.warnings)
        assert "horizon: pauses if undecided after" in str(found)
    for name, late in (("c", 10_000_000), ("d", "5000d"), ("e", None)):
        found = plan(name, late)
        assert not any("horizon" in each for each in found.warnings)
        assert ("horizon" in str(found)) is (late is not None)


def test_words_are_of_the_unit() -> None:
    assert Horizon(units=20_000).words("session") == "20,000 sessions"
    assert Horizon(seconds=2.5 * DAY).words("user") == "2.5 days"
    assert Horizon(seconds=7_200.0).words("user") == "2 hours"


def test_operators_see_it(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/state.db"

    class Free(dspy.Module):
        def forward(self, message: str) -> Any:
            return dspy.Prediction(label=message)

    exp = Experiment("e", variants={"control": Free(), "new": Free()}, metrics=[Metric("ok")], store=url, horizon=10)
    for number in range(10):
        with call_context(user=f"u{number}"):
            exp(message="hi")
    exp.step()
    assert exp.state == "paused"
    where = ["--store", url, "--namespace", exp._works.store.namespace]
    assert main(["experiment", "status", "e", *where]) == 0
    assert "after 10 users" in " ".join(capsys.readouterr().out.split())
