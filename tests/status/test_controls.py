"""What an operator says by `dspy_prod.controls`, and where it shows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import Budget, CircuitBreaker, ConfigError, Event, StoppedError
from dspy_prod.status import controls as controls_module
from dspy_prod.status.controls import Controls
from dspy_prod.telemetry.events import BUS
from dspy_prod.testing import ScriptedEngine
from tests.compose.support import MODEL, over, spare


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """What listeners hear of stops."""
    heard: list[Event] = []
    remove = BUS.add(lambda event: heard.append(event) if event.name.startswith("calls_") else None)
    yield heard
    remove()


def controls_of(lm: Any) -> Controls:
    return Controls(lm.pipeline.store, by="me")


def test_a_stop_refuses_before_anything_is_reserved_and_is_recorded(events: list[Event]) -> None:
    """With the operator's reason, and as a refusal in the ledger; health and listeners tell of it."""
    engine = ScriptedEngine("ok")
    lm = over(engine)
    stop = controls_of(lm).stop(everything=True, reason="a  leak\nof keys")
    with pytest.raises(StoppedError, match="An operator has stopped everything: a leak of keys") as caught:
        lm("question")
    assert (caught.value.reason, caught.value.scope, caught.value.why) == ("stopped", "all", "a leak of keys")
    assert caught.value.retry_after is None
    assert engine.requests == []
    assert [row.outcome for row in lm.ledger.records()] == ["refused"]
    health = lm.health()
    assert health.status == "warning"
    assert health.stops == [stop]
    assert "everything is stopped: a leak of keys" in str(health)
    assert controls_of(lm).resume(everything=True)
    assert lm("question") == ["ok"]
    assert lm.health().stops == []
    assert [event.name for event in events] == ["calls_stopped", "calls_resumed"]


def test_a_stop_ends_by_itself() -> None:
    lm = over(ScriptedEngine("ok"))
    controls_of(lm).stop(everything=True, duration=timedelta(seconds=0.2))
    with pytest.raises(StoppedError) as caught:
        lm("question")
    assert 0 < (caught.value.retry_after or 0) <= 0.2
    while controls_of(lm).stops():
        pass
    assert lm("question") == ["ok"]
    assert not controls_of(lm).resume(everything=True)


def test_a_program_that_is_stopped_answers_with_its_fallback() -> None:
    """By the reason `stopped`; a model fallback is not asked, and other programs go on."""
    lm = over(
        ScriptedEngine("[[ ## answer ## ]]\nyes\n\n[[ ## completed ## ]]"), fallbacks=[spare(ScriptedEngine("spare"))]
    )
    controls_of(lm).stop(program="triage", reason="wrong answers")
    programs = {
        name: dspy_prod.Production(
            dspy.Predict("question -> answer"), name=name, fallback_response={"stopped": "later", "default": "sorry"}
        )
        for name in ("triage", "other")
    }
    with dspy.context(lm=lm):
        answers = {name: program(question="?") for name, program in programs.items()}
    assert {name: answer.answer for name, answer in answers.items()} == {"triage": "later", "other": "yes"}
    assert dspy_prod.call_report(answers["triage"]).reason == "stopped"


def test_a_cached_answer_is_given_all_the_same() -> None:
    lm = over(ScriptedEngine("ok"), cache=True)
    lm("question")
    controls_of(lm).stop(everything=True)
    assert lm("question") == ["ok"]


@pytest.mark.parametrize(
    ("whom", "words"),
    [
        ({}, "Name one of"),
        ({"program": "a", "tenant": "b"}, "Name one of"),
        ({"program": ""}, "program=''"),
        ({"everything": True, "duration": 0}, "positive number of seconds"),
    ],
)
def test_a_stop_of_nobody_in_particular_is_refused(whom: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        controls_of(over(ScriptedEngine("ok"))).stop(**whom)


def test_stops_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is forgotten for another one; saying one again is no other one."""
    monkeypatch.setattr(controls_module, "MOST_STOPS", 1)
    controls = controls_of(over(ScriptedEngine("ok")))
    for reason in ("one", "two"):
        controls.stop(program="a", reason=reason)
    with pytest.raises(ConfigError, match="resume some"):
        controls.stop(program="b")
    assert [stop.reason for stop in controls.stops()] == ["two"]


def test_circuits_are_moved_by_model_and_shown(tmp_path: Any) -> None:
    """Those of the workers, and what operators said of others; the journal tells who."""
    lm = over(ScriptedEngine("ok"), store=f"sqlite:///{tmp_path}/state.db", breaker=CircuitBreaker())
    controls = controls_of(lm)
    controls.breaker("force_open", MODEL, reason="prices")
    with pytest.raises(dspy_prod.CircuitOpenError, match="forced open by an operator: prices"):
        lm("question")
    assert [(each.model, each.state, each.by) for each in controls.circuits()] == [(MODEL, "forced_open", "me")]
    controls.breaker("reset", MODEL)
    assert lm("question") == ["ok"]
    assert controls.circuits() == []
    assert [(note.what, note.target, note.reason) for note in controls.journal(2)] == [
        ("breaker reset", MODEL, ""), ("forced open", MODEL, "prices"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="'force_open', 'disable', 'reset'"):
        controls.breaker("open", MODEL)  # type: ignore[arg-type]
    lm.close()
    lm.pipeline.store.close()


def test_a_budget_gets_another_limit() -> None:
    """For all who share it; the journal tells from what to what."""
    lm = over(ScriptedEngine("ok"), budget=Budget(usd=1.0, name="day", per="day"))
    controls = controls_of(lm)
    assert controls.set_budget("day", 5.0).usd == 5.0
    assert lm.costs().budgets[0].limit_usd == 5.0
    assert controls.journal(1)[0][1:] == ("budget set", "day", "me", "1 USD to 5 USD")
    with pytest.raises(ConfigError, match="known: 'day'"):
        controls.set_budget("week", 5.0)
    with pytest.raises(ConfigError, match="usd"):
        controls.set_budget("day", -1.0)
