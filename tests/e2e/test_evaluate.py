"""`dspy.Evaluate` against an upstream that allows twenty requests a second: nothing refused, nothing lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import dspy
import pytest

from dspy_prod import RateLimit
from dspy_prod.testing import FaultPlan, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.elsewhere import Elsewhere
from tests.e2e.support import assert_equals_bill, assert_nothing_held, make_lm, records
from tests.stopwatch import Stopwatch

PER_SECOND = 20
ANSWER = "[[ ## answer ## ]]\nok\n\n[[ ## completed ## ]]"
LIMIT = RateLimit(rpm=60 * PER_SECOND, burst=1)


def evaluate(lm: Any, examples: int, threads: int) -> tuple[Any, float]:
    """(Evaluate's result, seconds on a machine that has nothing else to do)."""
    devset = [
        dspy.Example(question=f"question {number}", answer="ok").with_inputs("question") for number in range(examples)
    ]

    def answered(example: Any, prediction: Any, trace: Any = None) -> float:
        return float(bool(prediction.answer))

    check = dspy.Evaluate(devset=devset, metric=answered, num_threads=threads, display_progress=False, max_errors=1)
    with Stopwatch() as took, dspy.context(lm=lm):
        result = check(dspy.Predict("question -> answer"))
    return result, took.seconds


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    """A provider that allows twenty requests a second."""
    options = ["--per-second", str(PER_SECOND), "--latency", "0.05-0.3", "--answer", ANSWER, "--seconds", "120"]
    provider = Elsewhere(*options)
    yield provider
    provider.stop()


@pytest.mark.parametrize(
    ("examples", "longest"),
    [
        pytest.param(40, 40 / PER_SECOND * 1.25, id="40 examples"),
        # The bar is 1.1 × the ideal 10 s; 0.5 s more are for a busy machine.
        pytest.param(200, 11.5, marks=pytest.mark.slow, id="200 examples"),
    ],
)
def test_an_evaluation_runs_at_the_speed_of_its_upstream(
    elsewhere: Elsewhere, sqlite_url: str, examples: int, longest: float
) -> None:
    """32 threads share the limit without a single 429, and every example is scored by a real answer."""
    lm = make_lm(elsewhere.url, limit=LIMIT, max_tokens=None, retry=True, store=sqlite_url)
    with contextlib.closing(lm):
        result, took = evaluate(lm, examples, 32)
        calls, bill = elsewhere.told("calls"), elsewhere.told("bill")
        refused = sum(call["status"] == 429 for call in calls)
        print(f"{examples} examples took {took:.2f} s, ideal {examples / PER_SECOND:.2f} s, {refused} refused")
        assert (len(calls), refused) == (examples, 0)
        assert took <= longest
        assert result.score == 100.0
        assert len(result.results) == examples
        assert len(bill["rows"]) == examples
        told = sorted((record.input_tokens, record.output_tokens) for record in records(lm))
        assert told == sorted((row["input_tokens"], row["output_tokens"]) for row in bill["rows"])
        assert_nothing_held(lm.pipeline.store)


def test_examples_survive_an_upstream_that_fails_now_and_then(
    serve: MakeProvider, connect: MakeLM, store_url: str
) -> None:
    """A tenth of the requests fail at first; no example is lost, and each is paid once."""
    provider = serve(faults=FaultPlan.mix({Status(500): 0.1}, seed=3))
    lm = connect(provider, retry={"attempts": 5, "backoff": 0.01}, store=store_url)
    result, _ = evaluate(lm, 60, 16)
    assert result.score == 100.0
    assert len(provider.bill.rows) == 60 < len(provider.calls)
    assert_equals_bill(lm, provider)
