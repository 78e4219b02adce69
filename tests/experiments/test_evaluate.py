"""Offline first: variants on the same examples, paired, within a budget, and a gate before the start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import ConfigError, Experiment, Metric, Production, Rollout
from dspy_prod.testing import Provider
from dspy_prod.testing.faults import Status
from tests.experiments.conftest import Triage

Asked = Callable[..., dspy_prod.LM]
EXAMPLES = [dspy.Example(message=f"message {number}", label="x").with_inputs("message") for number in range(30)]


class Silent(Triage):
    """Fails on some messages, by its own fault."""

    def forward(self, message: str) -> Any:
        if message.endswith(("1", "2", "3", "4", "5", "6")):
            raise ValueError("no idea")
        return super().forward(message)


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}"


def two(store: str, new: Any = None, **more: Any) -> Experiment:
    variants = {"control": Triage(), "new": Triage("Think first.") if new is None else new}
    return Experiment(
        "offline", variants=variants, store=store, metrics=[Metric("resolved", margin=0.02)], rollout=Rollout(), **more
    )


def right(example: Any, prediction: Any) -> bool:
    return bool(prediction.label)


def test_every_variant_answers_every_example_and_nobody_is_exposed(
    asked: Asked, provider: Provider, store: str
) -> None:
    """It costs what the provider bills; a second time the cache answers, and it costs nothing."""
    asked()
    exp = two(store)
    report = exp.evaluate(EXAMPLES, right)
    assert [(each.variant, each.answered, each.mean, each.failed) for each in report.variants] == [
        ("control", 30, 1.0, 0), ("new", 30, 1.0, 0),
    ]  # fmt: skip
    assert len(provider.calls) == 60
    assert report.spent_usd == pytest.approx(provider.bill.usd)
    assert report.results == {"new": "pass"}
    again = exp.evaluate(EXAMPLES, right)
    assert len(provider.calls) == 60
    assert again.spent_usd == 0.0
    assert again.variants[0].usd_per_1000 == report.variants[0].usd_per_1000
    assert again.variants[0].seconds is None
    card = exp.scorecard()
    assert (card.users, card.stray, card.audit) == ({"control": 0, "new": 0}, 0, ())


def test_calls_of_an_evaluation_are_no_variant_s_in_the_ledger(asked: Asked, store: str) -> None:
    """Else they would be summed with those of users; a tag tells them."""
    lm = asked()
    two(store).evaluate(EXAMPLES[:3], right)
    assert list(lm.costs(by="variant")) == list(lm.costs(by="experiment")) == []
    assert {each.value: each.attempts for each in lm.costs(by="tag:variant")} == {"control": 3, "new": 3}
    assert [each.value for each in lm.costs(by="tag:offline")] == ["offline"]


def test_one_that_is_worse_fails_the_gate(asked: Asked, store: str) -> None:
    """Its failures score 0, no fallback answers for it, and the experiment does not begin."""
    asked()
    exp = two(store, Production(Silent(), fallback_response="sorry"))
    report = exp.evaluate(EXAMPLES, right, margin=0.02)
    assert (report.variants[1].failed, report.variants[1].mean) == (18, pytest.approx(0.4))
    assert (report.results, report.passed) == ({"new": "fail"}, False)
    assert (report.paired["new"].better, report.paired["new"].worse) == (0, 18)
    with pytest.raises(ConfigError, match=r"new fail \(-0.6, 95 %"):
        exp.start(gate=report)
    assert exp.state == "created"
    assert "fail" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["passed"] is False
    assert report.to_frame().mean().round(2).to_dict() == {"control": 1.0, "new": 0.4}


def test_one_that_is_a_little_worse_may_be_chance(asked: Asked, store: str) -> None:
    """Two of thirty examples less prove nothing; a margin says how much less is acceptable."""
    asked()
    lost = {"message 3", "message 4"}
    exp = two(store, Triage("Think first."))
    seen: list[str] = []

    def metric(example: Any, prediction: Any) -> float:
        seen.append(example.message)
        return 0.0 if example.message in lost and seen.count(example.message) == 2 else 1.0  # the candidate is second

    report = exp.evaluate(EXAMPLES, metric)
    assert (report.results, report.passed) == ({"new": "inconclusive"}, False)
    seen.clear()
    wider = exp.evaluate(EXAMPLES, metric, margin=0.1)
    assert wider.passed


def test_a_gate_that_passed_is_in_the_audit(asked: Asked, store: str) -> None:
    asked()
    exp = two(store)
    exp.start(gate=exp.evaluate(EXAMPLES, right))
    assert exp.state == "running"
    [started] = exp.scorecard().audit
    assert started.reason.startswith("by hand; offline: new pass (+0")


def test_a_gate_of_other_variants_is_refused(asked: Asked, store: str) -> None:
    asked()
    report = two(store).evaluate(EXAMPLES[:4], right)
    other = two(f"{store}-other", Production(Silent(), fallback_response="sorry"))
    with pytest.raises(ConfigError, match="of other variants"):
        other.start(gate=report)


def test_a_budget_ends_it_and_what_it_paid_for_is_compared(asked: Asked, provider: Provider, store: str) -> None:
    """Never more than the budget is billed; the gate does not pass on half of the examples."""
    lm = asked(max_tokens=50)
    exp = two(store)
    whole = exp.evaluate(EXAMPLES[:5], right, num_threads=1).spent_usd or 0.0
    lm.cache_clear()
    before = provider.bill.usd
    budget = 2.5 * whole
    report = exp.evaluate(EXAMPLES, right, budget_usd=budget, num_threads=1)
    assert report.stopped_by == "budget"
    assert provider.bill.usd - before <= budget
    assert 2 <= report.variants[0].answered == report.variants[1].answered < 30
    assert (report.results, report.passed) == ({"new": "inconclusive"}, False)
    assert "the budget of $" in str(report)


@pytest.mark.parametrize("times", [1, 100])
def test_what_could_not_be_asked_has_no_score(times: int, store: str) -> None:
    """An upstream that fails says nothing of a program: the example is left out, and the gate does not pass."""
    left = [times]

    def faults(call: Any) -> Any:
        if "Think first" in str(call.body) and left[0]:
            left[0] -= 1
            return Status(500)
        return None

    with Provider(faults=faults) as failing:
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini", api_base=failing.url, api_key="k", store=store,
            retry=dspy_prod.Retry(attempts=1), breaker=None,
        )  # fmt: skip
        with dspy.context(lm=lm):
            report = two(store).evaluate(EXAMPLES[:8], right, num_threads=1)
    assert report.variants[1].answered == max(0, 8 - times)
    assert report.variants[1].failed == 0
    assert not report.passed
    assert "a model could not be asked" in " ".join(report.warnings)
    assert str(report)


def test_a_bill_that_nobody_knows_is_told_as_unknown(store: str) -> None:
    """An LM that is none of ours is asked, but no budget holds it."""
    with dspy.context(lm=dspy.utils.DummyLM([{"label": "x"}] * 20)):
        exp = two(store)
        with pytest.raises(ConfigError, match=r"cannot hold DummyLM.*dspy_prod\.LM"):
            exp.evaluate(EXAMPLES[:3], right, budget_usd=1.0)
        report = exp.evaluate(EXAMPLES[:3], right)
    assert (report.spent_usd, report.variants[0].usd_per_1000, report.variants[0].mean) == (None, None, 1.0)
    assert "spent unknown" in str(report)


def test_another_refusal_goes_to_the_caller(asked: Asked, store: str) -> None:
    """A budget of the LM's own is not the evaluation's."""
    asked(budget=dspy_prod.Budget(usd=1e-9, per="day"))
    with pytest.raises(dspy_prod.BudgetExceededError):
        two(store).evaluate(EXAMPLES[:3], right)


def test_a_metric_has_to_tell_a_number(asked: Asked, store: str) -> None:
    """What it raises scores 0 and is told; what it tells must be a number."""
    asked()
    exp = two(store)
    with pytest.raises(ConfigError, match="told str, which is no number"):
        exp.evaluate(EXAMPLES[:3], lambda example, prediction: "good")

    def broken(example: Any, prediction: Any) -> float:
        if example.message == "message 1":
            raise KeyError("label")
        return 1.0

    report = exp.evaluate(EXAMPLES[:3], broken)
    assert report.faults == {"raised KeyError": 2}
    assert "the metric raised KeyError for 2 answers" in str(report)
    scored = exp.evaluate(EXAMPLES[:3], lambda example, prediction: dspy.Prediction(score=0.5))
    assert scored.variants[0].mean == 0.5


@pytest.mark.parametrize(
    ("devset", "options", "problem"),
    [
        ([], {}, "devset is empty"),
        ([dspy.Example(message="m")], {}, "has no inputs"),
        ([{"message": "m"}], {}, "has no inputs"),
        (EXAMPLES[:1], {"metric": None}, "metric="),
        (EXAMPLES[:1], {"margin": -1.0}, "margin"),
        (EXAMPLES[:1], {"budget_usd": -1.0}, "usd"),
    ],
)
def test_what_cannot_be_evaluated_is_named(devset: Any, options: Any, problem: str, asked: Asked, store: str) -> None:
    asked()
    with pytest.raises(ConfigError, match=problem):
        two(store).evaluate(devset, **{"metric": right, **options})
