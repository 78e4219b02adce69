"""A gate judges a version before an alias moves to it; what is not known never passes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import dspy
import pytest

from dspy_prod import ConfigError, registry
from dspy_prod.context.scoring import is_raising
from dspy_prod.registry import Gate
from tests.registry.aliases.test_promotion import aliases, moves, publish
from tests.registry.programs import qa


def bare() -> dspy.Predict:
    return dspy.Predict("question, context: list[str] -> answer")


def says(found: Any) -> Callable[[Any], Any]:
    """An evaluation with a known result."""
    return lambda program: found


def judged(gate: Gate) -> registry.GateReport:
    """What a gate says of version 1."""
    try:
        entry = registry.promote("it", 1, gate=gate, program=bare())
    except registry.PromotionRefusedError as refused:
        return refused.report
    assert entry.evidence["gate"]["result"] == "pass"
    return registry.GateReport("pass", examples=entry.evidence["gate"]["examples"])


@pytest.mark.parametrize(
    ("found", "more", "result"),
    [
        ({"accuracy": 0.85, "usd": 0.01}, {}, "pass"),
        ({"accuracy": 0.84, "usd": 0.01}, {}, "fail"),
        ({"accuracy": 0.9, "usd": 0.011}, {}, "fail"),
        ({"accuracy": 0.9}, {}, "inconclusive"),
        ({}, {}, "inconclusive"),
        ({"accuracy": math.nan, "usd": 0.0}, {}, "inconclusive"),
        ({"accuracy": math.inf, "usd": 0.0}, {}, "inconclusive"),
        ({"accuracy": 0.9, "usd": -math.inf}, {}, "inconclusive"),
        ({"accuracy": 0.1, "usd": math.nan}, {}, "fail"),
        ({"accuracy": 0.9, "usd": 0.0, "examples": 9}, {"min_examples": 10}, "inconclusive"),
        ({"accuracy": 0.9, "usd": 0.0, "examples": 10}, {"min_examples": 10}, "pass"),
        ({"accuracy": 0.9, "usd": 0.0, "examples": 0}, {}, "inconclusive"),
        ({"accuracy": 0.9, "usd": 0.0, "examples": math.nan}, {}, "inconclusive"),
        ({"accuracy": 0.9, "usd": 0.0, "examples": -1}, {}, "inconclusive"),
        ({"accuracy": 0.9, "usd": 0.0}, {"min_examples": 10}, "inconclusive"),
        ({"accuracy": 0.9, "usd": 0.0}, {"baseline": {"accuracy": 0.91, "usd": 0.0}}, "fail"),
        ({"accuracy": 0.9, "usd": 0.0}, {"baseline": {"accuracy": 0.91, "usd": 0.0}, "margin": 0.02}, "pass"),
        ({"accuracy": 0.9, "usd": 0.01}, {"baseline": {"accuracy": 0.9, "usd": 0.005}}, "fail"),
        ({"accuracy": 0.9, "usd": 0.0}, {"baseline": {"accuracy": 0.9}}, "inconclusive"),
        ({"accuracy": 0.9, "usd": 0.0}, {"baseline": {"accuracy": math.nan, "usd": 0.0}}, "inconclusive"),
        ({"accuracy": 0.9, "usd": 0.0}, {"baseline": "it@production"}, "inconclusive"),
        ({"accuracy": "good"}, {}, "error"),
        (None, {}, "error"),
        ("0.9", {}, "error"),
        (b"0.9", {}, "error"),
    ],
)
def test_the_verdict(store: str, found: Any, more: dict[str, Any], result: str) -> None:
    """Thresholds are minima or maxima; missing, NaN and infinite values are inconclusive, whatever else is fine."""
    publish(1)
    report = judged(Gate(says(found), thresholds={"accuracy": 0.85, "usd": ("<=", 0.01)}, **more))
    assert report.result == result
    assert str(report)


@pytest.mark.parametrize(
    ("scores", "result"),
    [([1, 1, 0.6], "pass"), ([True, False], "fail"), ([], "inconclusive"), ([1.0, math.nan], "inconclusive")],
)
def test_a_list_of_scores_is_their_mean(store: str, scores: list[float], result: str) -> None:
    """Its length is the number of examples; an empty one is no data."""
    publish(1)
    report = judged(Gate(says(scores), thresholds={"score": 0.8}))
    assert (report.result, report.examples) == (result, len(scores))


def test_a_dspy_evaluation_is_understood_and_scores_no_canned_answer(store: str) -> None:
    """The gate runs the published version on a copy of the program, under `raising()`."""
    publish(2)
    program = bare()
    seen: list[Any] = []

    def evaluate(candidate: Any) -> Any:
        seen.append((candidate is program, len(candidate.demos), is_raising()))
        return dspy.Prediction(score=90.0, results=[("e", "p", 1.0)] * 10)

    registry.promote("it", 2, gate=Gate(evaluate, {"score": 85}, min_examples=10), program=program)
    assert seen == [(False, 1, True)]
    assert program.demos == []


def test_a_verdict_is_no_verdict_on_what_was_promoted_meanwhile(store: str, client: Any) -> None:
    """An alias that somebody moved during the evaluation is not moved back, also when nothing was expected of it."""
    publish(3)
    registry.promote("it", 1)

    def evaluate(program: Any) -> dict[str, float]:
        registry.promote("it", 3)
        return {"score": 1.0}

    with pytest.raises(registry.PromotionConflictError, match="has version 3"):
        registry.promote("it", 2, gate=Gate(evaluate, {"score": 1}), program=bare())
    assert aliases(client) == {"production": 3, "previous": 1}


def test_an_evaluation_that_ends_the_process_is_an_error(store: str) -> None:
    """`sys.exit()` in it must not look like success to whoever started the process."""
    publish(1)
    report = judged(Gate(lambda program: sys.exit(0), {"score": 1}))
    assert (report.result, report.error) == ("error", "SystemExit: 0")


def test_a_gate_compares_with_no_outdated_copy(store: str, monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    """A baseline that MLflow does not tell is an error, though a copy of an earlier load is at hand."""
    publish(2)
    registry.promote("it", 1)
    registry.load("it@production", bare())

    def down(self: Any, name: str, alias: str) -> Any:
        raise OSError("no route to host")

    def evaluate(program: Any) -> dict[str, float]:  # the candidate; the baseline is asked for after it
        monkeypatch.setattr(type(client), "get_prompt_version_by_alias", down)
        return {"accuracy": 1.0}

    gate = Gate(evaluate, {"accuracy": 0.5}, baseline="it@production")
    with pytest.raises(registry.PromotionRefusedError, match="no route to host"):
        registry.promote("it", 2, gate=gate, program=bare())


def test_an_exception_is_an_error_and_nothing_moves(store: str, client: Any) -> None:
    """The attempt and the error are on record."""
    publish(1)

    def broken(program: Any) -> Any:
        raise RuntimeError("no dataset")

    report = judged(Gate(broken, {"score": 1}))
    assert (report.result, report.error) == ("error", "RuntimeError: no dataset")
    assert aliases(client) == {}
    assert moves() == [("refused", "refused", None, 1)]
    assert registry.history("it")[0].evidence["gate"]["error"] == "RuntimeError: no dataset"


def test_an_inconclusive_gate_waits_for_a_person_and_a_failed_one_for_nobody(store: str, client: Any) -> None:
    """`force` with a reason overrules what is unknown, and is on record; it does not overrule a failure."""
    publish(2)
    unknown, bad = Gate(says({}), {"accuracy": 0.8}), Gate(says({"accuracy": 0.1}), {"accuracy": 0.8})
    with pytest.raises(registry.PromotionRefusedError, match=r"inconclusive .* a person may overrule it"):
        registry.promote("it", 1, gate=unknown, program=bare())
    entry = registry.promote("it", 1, gate=unknown, program=bare(), force=True, reason="checked by hand")
    assert (entry.forced, entry.reason, entry.evidence["gate"]["result"]) == (True, "checked by hand", "inconclusive")
    with pytest.raises(registry.PromotionRefusedError, match=r"accuracy is 0\.1") as caught:
        registry.promote("it", 2, gate=bad, program=bare(), force=True, reason="I want it")
    assert "overrule" not in str(caught.value)
    assert aliases(client) == {"production": 1}


def test_a_baseline_in_the_registry_is_evaluated_beside(store: str) -> None:
    """The candidate must be no worse than what production does on the same data."""
    publish(3)
    registry.promote("it", 2)
    gate = Gate(lambda program: [len(program.demos)], thresholds={"score": 0}, baseline="it@production")
    with pytest.raises(registry.PromotionRefusedError, match="it@production asks for at least 1"):
        registry.promote("it", 1, gate=gate, program=bare())
    report = registry.promote("it", 3, gate=gate, program=bare()).evidence["gate"]
    assert (report["metrics"], report["baseline"]) == ({"score": 2.0}, {"score": 1.0})


def test_a_promotion_that_moves_nothing_evaluates_nothing(store: str) -> None:
    """An evaluation costs money."""
    publish(1)
    registry.promote("it", 1)
    gate = Gate(says(None), {"score": 1})
    assert registry.promote("it", 1, gate=gate, program=bare()).outcome == "unchanged"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"evaluate": says({})}, "checks nothing"),
        ({"evaluate": 3, "thresholds": {"a": 1}}, "function"),
        ({"evaluate": says({}), "thresholds": {"a": math.nan}}, "minimum"),
        ({"evaluate": says({}), "thresholds": {"a": ("<", 1)}}, "maximum"),
        ({"evaluate": says({}), "thresholds": {"a": ("<=",)}}, "maximum"),
        ({"evaluate": says({}), "thresholds": {"a": True}}, "minimum"),
        ({"evaluate": says({}), "baseline": "production"}, "names no version"),
        ({"evaluate": says({}), "thresholds": {"a": 1}, "margin": -1}, "margin"),
    ],
)
def test_an_impossible_gate_is_refused(arguments: dict[str, Any], words: str) -> None:
    """A gate that could not fail is no gate."""
    with pytest.raises(ConfigError, match=words):
        Gate(**arguments)


def test_a_gate_needs_the_program(store: str) -> None:
    """A state alone cannot be evaluated."""
    publish(1)
    with pytest.raises(ConfigError, match="program="):
        registry.promote("it", 1, gate=Gate(says({}), {"a": 1}))
    assert qa().demos
