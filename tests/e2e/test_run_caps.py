"""The caps of a run: which are possible, and others while it goes on."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dspy
import pytest

import dspy_prod
from dspy_prod import (
    BudgetExceededError,
    ConfigError,
    Retry,
    Run,
)
from dspy_prod.stores.base import GRANTED, Reservation
from dspy_prod.testing import FaultPlan, Provider, Status
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.runs import A_CENT, crowd, inside
from tests.e2e.support import (
    CENT,
    answers,
    errors,
    fresh_memory,
    until,
    upstream,
)


def test_a_cap_can_be_raised(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """Going on with more money was impossible: the same name with another amount was an error."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.05)
    assert len(answers(crowd(run, [lm], 4, 5))) == 5
    run.allow(usd=0.08)
    assert len(answers(crowd(run, [lm], 4, 5))) == 3
    again = Run("it", usd=0.10, store=run.store)
    assert len(answers(crowd(again, [lm], 4, 5))) == 2
    assert provider.bill.nano == 10 * CENT
    assert again.used().usd == run.used().usd == 0.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"usd": 0}, "usd"),
        ({"usd": -1}, "usd"),
        ({"calls": 0}, "calls"),
        ({"tokens": 1.5}, "tokens"),
        ({"usd": float("nan")}, "usd"),
        ({"usd": True}, "usd"),
        ({"calls": True}, "calls"),
        ({"name": ""}, "name"),
        ({"name": 5}, "name"),
    ],
)
def test_an_impossible_cap_is_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"Run: {said}"):
        Run(**{"store": fresh_memory(), **given})
    with pytest.raises(ConfigError, match="begin one with tokens="):
        Run("it", usd=1, store=fresh_memory()).allow(tokens=5)
    with pytest.raises(ConfigError, match="Run: usd: must be greater than 0"):
        Run("it", usd=1, store=fresh_memory()).allow(usd=0)
    with pytest.raises(TypeError, match=r"takes a name or a dspy_prod.Run, got 5"), dspy_prod.call_context(run=5):  # type: ignore[arg-type]
        pass


def test_a_copy_of_a_run_is_the_run() -> None:
    """A program that keeps one is copied by optimizers; another process makes its own."""
    run = Run("it", usd=0.5, calls=2_000_000, store=fresh_memory())
    assert copy.copy(run) is copy.deepcopy(run) is run
    assert repr(run) == "Run('it', usd=0.5, calls=2000000)"
    with pytest.raises(TypeError, match=r"make dspy_prod.Run\('it', store="):
        pickle.dumps(run)


def test_a_run_that_could_not_be_capped_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every policy off the cap was void, and nobody was told: the bill was fifteen times as high."""
    monkeypatch.setenv("DSPY_PROD_DISABLED", "1")
    with pytest.raises(ConfigError, match="DSPY_PROD_DISABLED"):
        Run("it", usd=1, store=fresh_memory())


def test_a_run_holds_also_where_every_policy_is_off(
    serve: MakeProvider, connect: MakeLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LM was built with its policies off, the run before or after."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    run = Run("it", usd=0.03, store=fresh_memory())
    monkeypatch.setenv("DSPY_PROD_DISABLED", "1")
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    assert len(answers(crowd(run, [lm], 4, 5))) == 3
    assert provider.bill.nano == 3 * CENT


def test_nested_contexts_keep_the_caps(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """A name within a run is what the ledger says; the money is the run's."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.01)
    with dspy_prod.call_context(run=run), dspy_prod.call_context(run="inner", user="u1"):
        lm("a cent")
        with pytest.raises(BudgetExceededError):
            lm("another")
    assert [record.run for record in upstream(lm)] == ["inner"]


def test_a_run_follows_dspy_into_its_threads(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    provider = serve(prices=A_CENT, usage=(20, 100), answer="[[ ## answer ## ]]\nfine\n\n[[ ## completed ## ]]")
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.05)
    devset = [dspy.Example(question=str(number), answer="fine").with_inputs("question") for number in range(20)]
    evaluate = dspy.Evaluate(devset=devset, metric=lambda example, pred, trace=None: 1.0, num_threads=8)
    with dspy.context(lm=lm), dspy_prod.call_context(run=run), pytest.raises(BudgetExceededError):
        evaluate(dspy.Predict("question -> answer"))
    assert provider.bill.nano == 5 * CENT


@pytest.fixture
def held(serve: MakeProvider) -> Iterator[Provider]:
    """A provider of answers at a cent that keeps them back until it is told to `release` them."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    provider.hold()
    yield provider
    provider.release()


def test_who_waits_for_money_goes_on_when_the_cap_is_raised(held: Provider, connect: MakeLM, run: Run) -> None:
    """Whoever waited for money that others held went on waiting for it, with a larger cap too."""
    lm = connect(held, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.01)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(inside, run, lm, f"question {number}") for number in range(3)]
        until(lambda: held.in_flight == 1 and run.store.waiting() == 2)
        run.allow(usd=0.03)
        held.wait_until(lambda p: p.in_flight == 3, timeout=10)
        held.release()
        assert len(answers([future.result(10) for future in futures])) == 3


def test_a_cap_raised_just_before_somebody_waits_is_heard(
    held: Provider, connect: MakeLM, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at the cap and the wait for news of it."""
    lm = connect(held, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.01)
    watch = run.watch

    def watched(wake: Any) -> bool:
        if held.in_flight:
            run.allow(usd=0.02)
        return watch(wake)

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(inside, run, lm, "first")]
        held.wait_until(lambda p: p.in_flight == 1)
        monkeypatch.setattr(run, "watch", watched)
        futures.append(pool.submit(inside, run, lm, "second"))
        try:
            held.wait_until(lambda p: p.in_flight == 2, timeout=10)
        finally:
            held.release()
        assert len(answers([future.result(10) for future in futures])) == 2


def test_a_lowered_cap_holds_for_who_waits(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """Half of what is held is given back, which the cap of before would let them have."""
    provider = serve(prices=A_CENT, usage=(20, 50))
    provider.hold()
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.02)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(inside, run, lm, f"question {number}") for number in range(4)]
        until(lambda: provider.in_flight == 2 and run.store.waiting() == 2)
        run.allow(usd=0.015)
        provider.release()
        outcomes = [future.result(10) for future in futures]
    assert len(answers(outcomes)) == 2
    assert [refusal.limit_usd for refusal in errors(outcomes, BudgetExceededError)] == [0.015] * 2
    assert provider.bill.nano == CENT


def test_a_lowered_cap_holds_for_what_was_drawn_ahead(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """A process draws money ahead for calls that follow close on each other; that of a larger cap was spent further."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=1_000, calls=100_000)
    assert len(answers(crowd(run, [lm], 4, 25))) == 100
    run.allow(usd=1.05)
    assert len(answers(crowd(run, [lm], 4, 10))) == 5
    assert provider.bill.nano == 105 * CENT
    run.allow(usd=2.0)
    assert len(answers(crowd(run, [lm], 4, 25))) == 95
    assert provider.bill.nano == 200 * CENT
    assert run.used().calls == 200


def test_each_of_two_objects_of_one_run_keeps_its_own_cap(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """What is spent is the run's; the one with the lower cap ends first."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run.allow(usd=1_000)
    low = Run("it", usd=0.5, store=run.store)
    for _ in range(20):
        inside(run, lm, "question")
        inside(low, lm, "question")
    outcomes = crowd(low, [lm], 4, 20)
    assert len(answers(outcomes)) == 10
    assert run.used().usd == low.used().usd == 0.5


def test_a_pause_goes_on_when_a_cap_is_changed(serve: MakeProvider, connect: MakeLM, run: Run) -> None:
    """A provider's Retry-After is not cut short by it."""
    provider = serve(faults=FaultPlan.script([Status(503, retry_after=1), None]))
    lm = connect(provider, retry=Retry(attempts=2), store=fresh_memory())
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(inside, run, lm, "question")
        until(lambda: len(run._watchers) == 1)
        run.allow(usd=2e6)
        assert future.result(10) == ["ok"]
    assert provider.calls[1].received_at - provider.calls[0].received_at >= 1.0


def test_dollars_are_those_of_a_budget(serve: MakeProvider, connect: MakeLM) -> None:
    """A cap of 2.01 was a nano-dollar less, so that the last cent was refused."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    assert len(answers(crowd(Run(usd=2.01, store=fresh_memory()), [lm], 5, 50))) == 201


def test_a_cap_on_what_was_never_counted_is_refused(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """A run that went on with a cap on calls beside that on dollars had all of them once more."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    begun = Run("it", usd=0.05, store=store_url)
    Run("it", usd=0.05, calls=5, store=store_url)  # nothing is used yet
    assert len(answers(crowd(begun, [lm], 1, 3))) == 3
    with pytest.raises(ConfigError, match=r"Run: calls: .*'it'.* without this cap.*Leave calls= out"):
        Run("it", usd=0.05, calls=5, store=store_url)
    with pytest.raises(ConfigError, match="Run: tokens"):
        Run("it", tokens=5, store=store_url)
    Run("it|usd", calls=5, store=store_url)
    assert Run("it", store=store_url).used() == (0.03, 0.0, 0.0, None, None)


def test_what_was_counted_before_is_counted_on(serve: MakeProvider, connect: MakeLM, store_url: str) -> None:
    """A run that went on without its cap on calls for a while had those calls once more afterwards."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    assert len(answers(crowd(Run("it", usd=0.05, calls=3, store=store_url), [lm], 1, 2))) == 2
    without = Run("it", usd=0.05, store=store_url)
    assert len(answers(crowd(without, [lm], 1, 2))) == 2
    assert without.used().calls == 4
    assert len(answers(crowd(Run("it", usd=9, calls=4, store=store_url), [lm], 1, 2))) == 0
    without.allow(usd=9, calls=6)
    assert len(answers(crowd(without, [lm], 2, 4))) == 2


@pytest.mark.parametrize("after", ["calls", "usd", "tokens"])
def test_ctrl_c_while_it_is_admitted_keeps_nothing(
    serve: MakeProvider, connect: MakeLM, run: Run, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Between the store's grant and whoever gives it back: the run had that much less for as long as it went on."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    admit = run.store.admit

    def interrupted(reservation: Reservation) -> Reservation:
        admit(reservation)
        if reservation.accounts[0].title.endswith(after):
            until(lambda: reservation.state == GRANTED)
            raise KeyboardInterrupt
        return reservation

    monkeypatch.setattr(run.store, "admit", interrupted)
    with dspy_prod.call_context(run=run), pytest.raises(KeyboardInterrupt):
        lm("question")
    assert run.used() == (0.0, 0.0, 0.0, 0, 0)
    assert run.store.holds() == 0
    assert provider.calls == []


@pytest.mark.parametrize("how", ["cancelled", "late", "collected"])
def test_who_leaves_the_line_keeps_nothing(held: Provider, connect: MakeLM, run: Run, how: str) -> None:
    lm = connect(held, prices=A_CENT, store=fresh_memory())
    run.allow(usd=0.01)

    async def scene() -> None:
        with dspy_prod.call_context(run=run):
            first = asyncio.create_task(lm.acall("first"))
            await asyncio.to_thread(held.wait_until, lambda p: p.in_flight == 1)
            with dspy_prod.call_context(deadline=0.2 if how == "late" else 60):
                second = asyncio.create_task(lm.acall("second"))
            await asyncio.to_thread(until, lambda: second.done() or run.store.waiting() == 1)
            if how == "late":
                with pytest.raises(dspy_prod.DeadlineExceededError, match="while waiting for run it: usd"):
                    await second
            elif how == "cancelled":
                second.cancel()
                await asyncio.wait([second])
            else:
                return  # the end of the loop takes both
            await asyncio.to_thread(until, lambda: run.store.waiting() == 0)
            held.release()
            assert await first == ["ok"]
            with pytest.raises(BudgetExceededError):
                await lm.acall("third")
        await lm.pipeline.aclose()

    asyncio.run(scene())
    until(lambda: (run.store.waiting(), run.store.holds()) == (0, 0))
    assert run.used().calls == 1
