"""What a controller reads: saved as it goes, without what nobody knows."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError, Experiment, Metric, Rollout, call_context
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments import reading
from dspy_prod.experiments.opened import Opened
from dspy_prod.options.metrics import cost
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.stores.trials import Call, Exposure
from dspy_prod.testing import FakeClock, Provider
from tests.experiments.conftest import Triage
from tests.experiments.support import OK, declared, feed

SAME = {"control": 0.5, "new": 0.5}


def two(store: Any, **more: Any) -> Experiment:
    return Experiment("e", variants={"control": Triage(), "new": Triage("Think first.")}, store=store, **more)


def test_a_backlog_is_saved_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is killed in the middle of a million has not read for nothing; all of it gives the same evidence."""
    monkeypatch.setattr(reading, "PART", 10)
    monkeypatch.setattr(reading, "EVERY", 0.0)
    store = MemoryStore()
    opened = declared(store)
    feed(opened, 45, SAME)
    matured, pages = store.trials.matured, iter(range(100))

    def broken(*given: Any) -> Any:
        if next(pages) >= 5:
            raise StoreUnavailableError("it is gone")
        return matured(*given)

    with monkeypatch.context() as patched:
        patched.setattr(store.trials, "matured", broken)
        with pytest.raises(StoreUnavailableError):
            opened.controller.read()
    saved = store.trials.checkpoint("e")
    assert saved is not None
    assert json.loads(saved.state)["read"] == {"": 20, "ok": 20, reading.EXPOSED: 20}
    other = Opened(store, "e")
    other.controller.read()
    saved = store.trials.checkpoint("e")
    assert saved is not None
    assert saved.revision == 5
    whole = MemoryStore()
    at_once = declared(whole)
    feed(at_once, 45, SAME)
    monkeypatch.setattr(reading, "PART", 5_000)
    at_once.controller.read()
    ours, theirs = (each.controller._reading.evidence for each in (other, at_once))
    assert ours is not None
    assert theirs is not None
    assert ours.to_dict() == theirs.to_dict()


def test_what_is_read_is_saved_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A saving costs more than a unit's bets. Whoever goes on finds what was not saved, and what it says."""
    store, clock = MemoryStore(), FakeClock()
    monkeypatch.setattr(store.trials, "now", clock.time)
    opened = declared(store)

    def saved() -> int:
        found = store.trials.checkpoint("e")
        return 0 if found is None else found.revision

    feed(opened, 5, SAME)
    opened.controller.read()
    assert saved() == 1
    for begin in (5, 10):
        feed(opened, 5, SAME, begin=begin)
        found = opened.controller.read()
        assert saved() == 1
    other = Opened(store, "e")
    assert other.controller.read().to_dict() == found.to_dict()
    assert evidence_of(other) == evidence_of(opened)
    clock.advance(reading.EVERY)
    opened.controller.read()
    assert saved() == 2, "also where nothing has come since"
    opened.controller.read()
    assert saved() == 2


def evidence_of(opened: Opened) -> Any:
    """All that a controller knows."""
    found = opened.controller._reading.evidence
    assert found is not None
    return found.to_dict()


class Watched:
    """A store's experiments, which tell what they are asked."""

    def __init__(self, trials: Any) -> None:
        self._trials, self.asked = trials, list[str]()

    def __getattr__(self, name: str) -> Any:
        if name != "now":
            self.asked.append(name)
        return getattr(self._trials, name)


def test_a_look_with_nothing_to_read_asks_the_store_once() -> None:
    """And one with news reads all of it, whatever was known before."""
    trials = Watched(MemoryStore().trials)
    store: Any = SimpleNamespace(trials=trials, namespace="watched")
    opened = declared(store)
    for looks in (1, 2):
        feed(opened, 20 * looks, SAME)
        assert opened.controller.step() is not None
        for _ in range(2):
            trials.asked.clear()
            found = opened.controller.step()
            assert trials.asked == ["look", "release"]
            assert found is not None
            assert found.units == 20 * looks
            assert sum(_units(found)) == 20 * looks
    assert Opened(store, "e").controller.step() == found


def test_a_value_that_cannot_be_ends_no_look_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """As of a store that an earlier release let declare it: the unit is left out of that metric, and shown."""
    rates = {"direction": "lower", "role": "guardrail", "margin": 0.02}
    metrics = [Metric("latency", direction="lower"), Metric("error_rate", missing=1.0, **rates)]
    opened = declared(MemoryStore(), metrics=[each.model_dump(mode="json") for each in metrics])
    trials = opened.trials
    for number in range(200):
        unit, now = f"u{number}", trials.now()
        got = opened.design.assign(unit)
        trials.expose(Exposure("e", unit, got.stage, got.variant, got.propensity, now, got.full))
        slow = 1.05 if number == 7 else 0.1
        trials.call(Call("e", unit, now, failed=got.variant == "new", latency=slow))
        if number in (10, 50):
            opened.controller.step()
    opened.controller.step()
    card = opened.scorecard()
    assert (card.state, card.serves, card.decision) == ("decided", "control", "rollback")
    assert card.impossible == {"latency": 1}
    assert sum("left out of latency" in each.message for each in caplog.records) == 1
    assert any("1 units have what latency cannot be" in each for each in card.warnings)
    assert Opened(opened._store, "e").scorecard().impossible == {"latency": 1}, "whoever looks next knows it too"


def _units(found: Any) -> tuple[int, int]:
    evidence = found.candidates["new"].metrics[0]
    return evidence.control_units, evidence.candidate_units


def test_what_comes_while_it_looks_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """How far the experiment is, is known from before."""
    opened = declared(MemoryStore())
    feed(opened, 10, SAME)
    exposed = opened.trials.exposed

    def meanwhile(*given: Any) -> Any:
        monkeypatch.setattr(opened.trials, "exposed", exposed)
        feed(opened, 10, SAME, begin=10)
        return exposed(*given)

    monkeypatch.setattr(opened.trials, "exposed", meanwhile)
    for _ in range(2):
        found = opened.controller.step()
    assert found is not None
    assert (found.units, sum(_units(found))) == (20, 20)


def test_unknown_costs_are_left_out_and_told(store: str) -> None:
    """They counted as nothing, so that whoever answered from an old cache was the cheaper one."""
    kept = MemoryStore()
    opened = declared(kept, metrics=[each.model_dump(mode="json") for each in (OK, cost())])
    for number in range(100):
        arm, now = ("control", "new")[number % 2], kept.trials.now()
        kept.trials.expose(Exposure("e", f"u{number}", 0, arm, 0.5, now))
        kept.trials.call(Call("e", f"u{number}", now, list_nano=None if arm == "control" and number % 4 else 1_000))
    card = opened.scorecard()
    [found] = [each for each in card.metrics if each.metric == "cost"]
    assert (found.control_units, found.candidate_units) == (0 + sum(n % 4 == 0 for n in range(0, 100, 2)), 50)
    assert found.interval is not None
    assert found.interval.control == found.interval.candidate
    assert card.unpriced == 25
    assert "25 calls have no known price" in str(card)
    assert card.to_dict()["unpriced"] == 25


def test_a_cached_answer_whose_price_nobody_knows_is_not_free(provider: Provider, tmp_path: Path) -> None:
    """As one of an earlier release, which kept no price, of a model that has none by now."""

    def made() -> dspy_prod.LM:
        url = f"sqlite:///{tmp_path}/cache.db"
        return dspy_prod.LM("openai/nobody-knows-me", api_base=provider.url, api_key="k", store=url)

    lm = made()
    with dspy.context(lm=lm):
        Triage()(message="old")
    lm.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "cache.db")) as file:
        [(value,)] = file.execute("SELECT value FROM cache").fetchall()
        assert b"dspy_prod_list_nano" not in value
    exp = two(MemoryStore(), weights={"control": 1_000, "new": 1})
    with dspy.context(lm=made()), call_context(user="u1"):
        exp(message="old")
    assert len(provider.calls) == 1
    [unit] = exp._works.trials.matured("e", None)
    assert (unit.calls.calls, unit.calls.list_nano, unit.calls.unpriced) == (1, 0, 1)
    assert exp.scorecard().unpriced == 1
    assert exp.state == "running", "it is no call without a price, which would pause it"


def test_an_outcome_from_before_its_user_came_is_told(asked: Callable[..., dspy_prod.LM], store: str) -> None:
    asked()
    exp = two(store, metrics=[Metric("resolved")])
    with call_context(user="u1"):
        exp(message="hi")
    exp.record("u1", resolved=1, at=exp._works.trials.now() - 3_600)
    card = exp.scorecard()
    assert card.early == 1
    assert "1 outcomes are dated before their user was exposed" in str(card)


def test_the_lm_of_what_is_measured_does_not_change(store: str) -> None:
    """Set before it begins it holds; afterwards it would have been measured as the same variant, in silence."""
    exp = two(store, rollout=Rollout())
    lm = dspy.LM("openai/gpt-4o-mini")
    exp.set_lm(lm)
    assert exp.get_lm() is lm
    exp.start()
    for _ in range(2):
        with pytest.raises(ConfigError, match="pinned once it has begun"):
            exp.set_lm(dspy.LM("openai/gpt-4o"))
        exp.stop()
    assert exp.get_lm() is lm
