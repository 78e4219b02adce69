"""Runs within runs: what an inner one uses counts for the outer one too, and the caps of both hold."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dspy_prod
from dspy_prod import (
    BudgetExceededError,
    Run,
)
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.runs import A_CENT, inside
from tests.e2e.support import (
    CENT,
    answers,
    errors,
    fresh_memory,
    outcome,
    upstream,
)


def test_what_a_run_within_a_run_uses_counts_for_both(
    serve: MakeProvider, connect: MakeLM, run: Run, tmp_path: Path
) -> None:
    """The inner one took the place of the outer one, whose cap was void while it lasted."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    inner = Run("inner", usd=1.0, calls=3, store=f"sqlite:///{tmp_path}/other.db")
    run.allow(usd=0.05)
    with dspy_prod.call_context(run=run):
        assert lm("the outer one's") == ["ok"]
        outcomes = [inside(inner, lm, f"question {number}") for number in range(4)]
        assert len(answers(outcomes)) == 3
        assert "The run 'inner'" in str(outcomes[-1])
        another = Run("another", calls=9, store=inner.store)
        outcomes = [inside(another, lm, f"question {number}") for number in range(4)]
        assert len(answers(outcomes)) == 1
        assert "The run 'it'" in str(outcomes[-1])
    assert (run.used().usd, inner.used().usd) == (0.05, 0.03)
    assert another.used().calls == 1
    assert run.store.holds() == inner.store.holds() == 0
    assert [record.run for record in upstream(lm)] == ["it", "inner", "inner", "inner", "another"]
    assert provider.bill.nano == 5 * CENT


def test_two_runs_that_hold_each_other_wait_for_nobody(serve: MakeProvider, connect: MakeLM) -> None:
    """Whichever is within which, a call takes of them in the same order."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=0.002)
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    one, two = (Run(name, usd=0.4, calls=40, store=fresh_memory()) for name in ("one", "two"))

    def nested(outer: Run, inner: Run) -> list[Any]:
        with dspy_prod.call_context(run=outer):
            return [inside(inner, lm, f"question {number}") for number in range(20)]

    with ThreadPoolExecutor(8) as pool:
        pairs = [(one, two), (two, one)] * 4
        outcomes = [each for made in pool.map(nested, *zip(*pairs, strict=True)) for each in made]
    assert len(answers(outcomes)) == 40
    assert len(errors(outcomes, BudgetExceededError)) == 120
    assert one.used() == two.used() == (0.4, 0.0, 0.0, 40, None)


def test_a_run_within_itself_counts_once(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    with dspy_prod.call_context(run=run), dspy_prod.call_context(run=run):
        inside(Run("it", usd=0.02, store=run.store), lm, "the same one by another object")
        assert inside(Run("it", usd=0.01, store=run.store), lm, "question").limit_usd == 0.01
        assert inside(run, lm, "question") == ["ok"]
    assert run.used() == (0.02, 0.0, 0.0, 2, 240)


def test_a_run_within_itself_goes_on_under_other_caps(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """Of two objects of one run the inner one says what holds, also where the outer one is stopped."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    other = Run("other", calls=9, store=fresh_memory())
    run.allow(usd=0.01)
    with dspy_prod.call_context(run=run), dspy_prod.call_context(run=other):
        assert lm("question") == ["ok"]
        assert outcome(lambda: lm("question")).limit_usd == 0.01
        run.stop()
        again = Run("it", usd=0.03, calls=9, tokens=999, store=run.store)
        outcomes = [inside(again, lm, "question") for _ in range(3)]
    assert len(answers(outcomes)) == 2
    assert outcomes[-1].limit_usd == 0.03
    assert (again.used().usd, other.used().calls) == (0.03, 3)


def test_stopping_the_outer_run_stops_the_inner_one(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    lm = connect(serve(), store=fresh_memory())
    inner = Run("inner", calls=5, store=fresh_memory())
    with dspy_prod.call_context(run=run):
        inner.stop()
        assert inside(inner, lm, "question").run == "inner"
        assert lm("question") == ["ok"]
        run.stop()
        assert inside(Run("other", calls=5, store=fresh_memory()), lm, "question").run == "it"
