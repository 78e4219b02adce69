"""Evaluation on a budget or behind a limit: the score is about the program, or there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod import Budget, BudgetExceededError, CircuitBreaker, CircuitOpenError, RateLimit, call_context
from dspy_prod.context.scoring import raising
from dspy_prod.pipeline.plan import plan, wait_until
from dspy_prod.testing import Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import CHEAP, outcome, records
from tests.pipeline.support import call_of

ANSWER = "[[ ## answer ## ]]\nok\n\n[[ ## completed ## ]]"


def devset(examples: int) -> list[Any]:
    return [dspy.Example(question=f"question {number}").with_inputs("question") for number in range(examples)]


def score(lm: Any, examples: int = 12, threads: int = 4, **options: Any) -> Any:
    check = dspy.Evaluate(
        devset=devset(examples), metric=lambda *_: 1.0, num_threads=threads, display_progress=False, **options
    )
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        return check(dspy.Predict("question -> answer"))


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("max_errors", [1, 1000])
def test_an_empty_budget_ends_an_evaluation_as_itself(
    serve: MakeProvider, connect: MakeLM, threads: int, max_errors: int
) -> None:
    """It was a score of 50.0, or "Execution cancelled due to errors"."""
    provider = serve(answer=ANSWER, usage=(1_000, 100))
    lm = connect(provider, budget=Budget(usd=0.0008))
    error = outcome(lambda: score(lm, threads=threads, max_errors=max_errors))
    assert isinstance(error, BudgetExceededError)
    assert error.limit_usd == pytest.approx(0.0008)
    assert 0 < sum(record.outcome == "ok" for record in records(lm)) < 12


def test_an_open_circuit_ends_an_evaluation_as_itself(serve: MakeProvider, connect: MakeLM) -> None:
    """An outage says nothing about the program."""
    lm = connect(serve(faults=Status(500)), breaker=CircuitBreaker(failure_threshold=1))
    assert isinstance(outcome(lambda: score(lm, max_errors=1000)), CircuitOpenError)


def test_what_the_program_does_wrong_is_still_a_score(serve: MakeProvider, connect: MakeLM) -> None:
    """Its own errors, and its own time limit, count as ever."""

    class Hasty(dspy.Module):
        def forward(self, question: str) -> Any:
            with call_context(deadline=1e-6):
                return dspy.Predict("question -> answer")(question=question)

    lm = connect(serve(answer=ANSWER))
    check = dspy.Evaluate(devset=devset(2), metric=lambda *_: 1.0, num_threads=2, max_errors=1000)
    with dspy.context(lm=lm):
        assert check(Hasty()).score == 0.0


def test_an_evaluation_after_one_that_was_ended_works(serve: MakeProvider, connect: MakeLM) -> None:
    """Nothing of the first is left."""
    provider = serve(answer=ANSWER, usage=(1_000, 100))
    poor = connect(provider, budget=Budget(usd=0.0008))
    assert isinstance(outcome(lambda: score(poor)), BudgetExceededError)
    assert score(connect(provider)).score == 100.0


def test_admission_waits_as_long_as_it_takes(serve: MakeProvider, connect: MakeLM) -> None:
    """With six requests a minute and sixteen threads it was "cancelled" after a third of a second."""
    lm = connect(serve(), limit=RateLimit(rpm=6, max_wait=1), budget=Budget(usd=1, max_wait=1))
    with raising():
        attempt = plan(call_of(lm), lm.pipeline.primary, 1)
        assert wait_until(attempt, 0.0) == float("inf")
        with call_context(deadline=5):
            call = call_of(lm)
            assert wait_until(plan(call, lm.pipeline.primary, 1), 0.0) == call.deadline
    assert attempt.reservation is not None
    assert attempt.reservation.horizon == float("inf")
    assert attempt.reservation.lease < 10_000


def test_a_limited_evaluation_is_served_whole(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """Every example waits for its turn, and none of them goes to another model."""
    provider = serve(answer=ANSWER)
    limit = RateLimit(rpm=120, burst=1, max_wait=0)
    lm = connect(provider, limit=limit, fallbacks=[CHEAP], store=store_url)
    assert score(lm, examples=6, threads=6, max_errors=1).score == 100.0
    assert {asked.model for asked in provider.calls} == {"e2e"}


# -- optimizers ------------------------------------------------------------------------------------------------------
def trainset(examples: int = 8) -> list[Any]:
    return [dspy.Example(question=f"q {number}", answer="ok").with_inputs("question") for number in range(examples)]


def always(*_: Any) -> float:
    return 1.0


class Swallowing(Teleprompter):
    """An optimizer of somebody's own, that takes whatever a program raises for a poor score."""

    def compile(self, student: Any, *, trainset: Any, **_: Any) -> Any:
        for example in trainset:
            try:
                student(**example.inputs())
            except Exception:
                continue
        return student


class AsyncSwallowing(Teleprompter):
    """The same in a task."""

    async def compile(self, student: Any, *, trainset: Any, **_: Any) -> Any:
        for example in trainset:
            with suppress(Exception):
                await student.acall(**example.inputs())
        return student


class Outer(Teleprompter):
    """An optimizer that runs another one, and carries on without it."""

    def compile(self, student: Any, *, trainset: Any, **_: Any) -> Any:
        with suppress(Exception):
            return Swallowing().compile(student, trainset=trainset)
        return student


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "bootstrap": lambda student: dspy.BootstrapFewShot(metric=always, max_bootstrapped_demos=8).compile(
        student, trainset=trainset()
    ),
    "random search": lambda student: dspy.BootstrapFewShotWithRandomSearch(
        metric=always, num_candidate_programs=2, num_threads=2
    ).compile(student, trainset=trainset(), valset=trainset()),
    "simba": lambda student: dspy.SIMBA(metric=always, bsize=4, num_candidates=2, max_steps=1, num_threads=2).compile(
        student, trainset=trainset()
    ),
    "better together": lambda student: dspy.BetterTogether(
        metric=always, p=dspy.BootstrapFewShotWithRandomSearch(metric=always, num_candidate_programs=1, num_threads=2)
    ).compile(student, trainset=trainset(), valset=trainset(), strategy="p"),
    "somebody's own": lambda student: Swallowing().compile(student, trainset=trainset()),
    "in a task": lambda student: asyncio.run(AsyncSwallowing().compile(student, trainset=trainset())),
    "one within another": lambda student: Outer().compile(student, trainset=trainset()),
}


def compiled(lm: Any, optimize: Callable[[Any], Any], program: Any = None) -> Any:
    student = program or dspy.Predict("question -> answer")
    student.set_lm(lm)
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        return outcome(lambda: optimize(student))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_empty_budget_ends_an_optimizer_as_itself(serve: MakeProvider, connect: MakeLM, name: str) -> None:
    """Refusals were taken for failures of the program: what came back was half optimized, and nobody heard of it."""
    provider = serve(answer=ANSWER, usage=(1_000, 100))
    lm = connect(provider, budget=Budget(usd=0.0008))
    error = compiled(lm, OPTIMIZERS[name])
    assert isinstance(error, BudgetExceededError)
    assert error.budget
    served = len(provider.calls)
    assert 0 < served < 8
    assert isinstance(compiled(connect(provider), OPTIMIZERS[name]), dspy.Module), "nothing of it is left"


def test_what_a_program_handles_itself_does_not_end_an_optimizer(serve: MakeProvider, connect: MakeLM) -> None:
    """A program with an answer of its own to an empty budget is optimized as it is."""

    class Careful(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ask = dspy.Predict("question -> answer")

        def forward(self, question: str) -> Any:
            try:
                return self.ask(question=question)
            except BudgetExceededError:
                return dspy.Prediction(answer="too dear")

    lm = connect(serve(answer=ANSWER, usage=(1_000, 100)), budget=Budget(usd=0.0008))
    assert isinstance(compiled(lm, OPTIMIZERS["bootstrap"], Careful()), Careful)


def test_what_a_program_does_wrong_does_not_end_an_optimizer(serve: MakeProvider, connect: MakeLM) -> None:
    """Its own errors are the optimizer's affair, and so is an upstream that fails now and then."""
    provider = serve(answer=ANSWER, faults=[Status(400), None, Status(400)])
    assert isinstance(compiled(connect(provider), OPTIMIZERS["bootstrap"]), dspy.Module)
    assert len(provider.calls) == 8
