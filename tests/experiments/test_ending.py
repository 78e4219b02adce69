"""How all calls ended: what the guardrails of first calls do not see is shown, and warned of."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import dspy
import pytest

from dspy_prod import Experiment, Metric, call_context
from dspy_prod.experiments.ending import _clearly
from dspy_prod.guardrails import cost, error_rate, fallback_rate, latency
from dspy_prod.stores.trials import Ended

FIRST = {"message": "first"}


class Answers(dspy.Module):
    """Answers; a bad one fails at everything but a user's first message, or never ends."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, message: str) -> Any:
        if self.bad and message != "first":
            raise ValueError("it was asked again")
        return dspy.Prediction(label="bug")

    async def aforward(self, message: str) -> Any:
        await asyncio.sleep(60.0 if self.bad else 0.0)
        return dspy.Prediction(label="bug")


def made(store: str, **more: Any) -> Experiment:
    return Experiment("e", variants={"control": Answers(), "new": Answers(bad=True)}, store=store, **more)


def ask(exp: Experiment, unit: str, message: str) -> None:
    with call_context(user=unit):
        try:
            exp(message=message)
        except ValueError:
            pass


def test_what_fails_after_the_first_call_is_on_the_card_and_warned_of(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The guardrail goes by first calls, which never fail; nothing came late."""
    caplog.set_level(logging.CRITICAL)
    exp = made(store)
    for message in ("first", "again", "and again"):
        for number in range(120):
            ask(exp, f"u{number}", message)
    card = exp.step()
    rates = next(each for each in card.metrics if each.metric == "error_rate")
    assert rates.status != "worse"
    new = card.users["new"]
    assert card.calls == {"control": Ended("control", 3 * (120 - new)), "new": Ended("new", 3 * new, 2 * new)}
    assert (card.late, card.repeated) == (0, 240)
    assert "came after their window" not in " ".join(card.warnings)
    (warning,) = card.warnings
    assert warning.startswith("66.7 % of all calls of new failed, and 0.0 % of those of control")
    assert "guardrails.error_rate(window='1d')" in warning
    for shown in (str(card), card._view().html()):
        assert "All calls" in shown
        assert "66.7 %" in shown
    assert json.loads(json.dumps(card.to_dict()))["calls"]["new"]["failed"] == 2 * new


def test_with_a_window_the_guardrail_sees_all_calls(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    by_day = [each(window="1d") for each in (error_rate, fallback_rate, cost, latency)]
    exp = made(f"memory://{__name__}", guardrails=by_day)
    for message in ("first", "again"):
        for number in range(60):
            ask(exp, f"u{number}", message)
    late = exp._works.trials.now() + 2 * 86_400.0
    exp._works.trials.now = lambda: late  # type: ignore[method-assign]
    card = exp.step()
    assert card.decision == "rollback"
    assert not any("does not show" in each for each in card.warnings)


def test_calls_that_were_left_are_no_failures_and_are_warned_of(store: str) -> None:
    """Whoever leaves may have waited too long, or closed the page: that one variant's callers leave is what tells."""
    exp = made(store, metrics=[Metric("ok")], guardrails=[error_rate()])

    async def ask_for(unit: str) -> None:
        with call_context(user=unit):
            try:
                await asyncio.wait_for(exp.acall(message="first"), 0.05)
            except asyncio.TimeoutError:
                pass

    async def ask_all() -> None:
        await asyncio.gather(*[ask_for(f"u{number}") for number in range(300)])

    asyncio.run(ask_all())
    card = exp.step()
    assert card.calls["new"] == Ended("new", card.users["new"], abandoned=card.users["new"])
    assert card.calls["new"].calls > 100
    assert any(each.startswith("100.0 % of all calls of new were left by their callers") for each in card.warnings)


def test_few_calls_and_small_differences_are_not_spoken_of() -> None:
    assert not _clearly(0, 99, 99, 99, 0.02)
    assert not _clearly(10, 1_000, 30, 1_000, 0.02), "the margin is acceptable"
    assert not _clearly(0, 100, 10, 100, 0.02), "so few may be one user's"
    assert _clearly(0, 1_000, 100, 1_000, 0.02)
    assert not _clearly(100, 1_000, 0, 1_000, 0.02), "better is no warning"
