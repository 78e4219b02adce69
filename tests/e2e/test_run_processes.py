"""A run in a SQLite file is one run: for many processes, after a kill, and however long its calls wait."""

from __future__ import annotations

import multiprocessing as mp
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import dspy_prod
from dspy_prod import BudgetExceededError, RateLimit, Run
from dspy_prod.context.scoring import raising
from dspy_prod.stores.memory import MemoryStore
from dspy_prod.testing import FakeClock
from tests.e2e.children import spend_a_dollar_of_a_run, spend_of_run
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.runs import A_CENT, crowd
from tests.e2e.support import CENT, answers, errors, fresh_memory, outcome, records, until

SPAWN = mp.get_context("spawn")


def test_processes_share_a_dollar(serve: MakeProvider, sqlite_url: str) -> None:
    """To the last cent, whatever each has drawn ahead; each has an LM with a store of its own."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=(0.0, 0.05))
    barrier, results = SPAWN.Barrier(3), SPAWN.Queue()
    arguments = (provider.url, sqlite_url, 8, 6, barrier, results)
    children = [SPAWN.Process(target=spend_a_dollar_of_a_run, args=arguments, daemon=True) for _ in range(3)]
    for child in children:
        child.start()
    ended: Counter[str] = Counter()
    for _ in children:
        ended.update(results.get(timeout=90))
    for child in children:
        child.join(20)
    assert ended == {"answer": 100, "BudgetExceededError": 44}
    assert provider.bill.nano == 100 * CENT
    assert provider.max_in_flight > 8, "one process did it all"
    run = Run("it", usd=1.0, calls=1_000, store=sqlite_url, namespace="e2e")
    assert run.used() == (1.0, 0.0, 0.0, 100, None)
    assert run.store.holds() == 0


def test_what_was_in_flight_at_a_kill_is_charged(serve: MakeProvider, sqlite_url: str) -> None:
    """Its bound, as unconfirmed, once the lease of the dead process has ended: five calls were under way."""
    provider = serve(prices=A_CENT, usage=(20, 60))
    url = f"{sqlite_url}?lease=1"
    provider.hold()
    child = SPAWN.Process(target=spend_of_run, args=(provider.url, url, A_CENT, 1.0, 5), daemon=True)
    child.start()
    provider.wait_until(lambda p: p.in_flight == 5, timeout=60)
    child.kill()
    child.join(10)
    provider.release()
    run = Run("it", usd=1.0, store=url, namespace="e2e")
    until(lambda: (run.used().unconfirmed_usd, run.used().held_usd) == (0.05, 0.0))
    assert run.used().usd == 0.05
    assert provider.bill.nano <= 5 * CENT


def test_a_killed_run_goes_on_within_its_cap(serve: MakeProvider, connect: MakeLM, sqlite_url: str) -> None:
    """What a killed process had in flight counts in full; what was settled counts once."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=0.02)
    url = f"{sqlite_url}?lease=1"
    child = SPAWN.Process(target=spend_of_run, args=(provider.url, url, A_CENT, 1.0, 8), daemon=True)
    child.start()
    until(lambda: provider.bill.nano >= 30 * CENT)
    child.kill()
    child.join(10)
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run = Run("it", usd=1.0, store=url, namespace="e2e")
    outcomes = crowd(run, [lm], 8, 20)
    assert provider.bill.nano <= 100 * CENT
    assert provider.bill.nano >= 85 * CENT, "only what was in flight or drawn ahead is lost"
    assert len(errors(outcomes, BudgetExceededError)) > 0
    used = run.used()
    assert provider.bill.usd <= used.usd <= 1.0
    assert len(records(lm)) > 0


@pytest.mark.parametrize("scored", [True, False])
def test_what_a_run_keeps_outlives_the_wait_for_a_limiter(serve: MakeProvider, connect: MakeLM, scored: bool) -> None:
    """A call that waited long in line was charged as abandoned meanwhile, and others were refused what was left."""
    provider, clock = serve(prices=A_CENT, usage=(20, 100)), FakeClock()
    run = Run("it", usd=1.0, store=MemoryStore(clock=clock))
    limit = RateLimit(rpm=1) if scored else RateLimit(rpm=1, max_wait=70)
    lm = connect(provider, prices=A_CENT, limit=limit, timeout=5.0, store=fresh_memory())
    lm("the minute's only one")

    def waits() -> Any:
        with dspy_prod.call_context(run=run):
            if not scored:
                return outcome(lambda: lm("question"))
            with raising():
                return outcome(lambda: lm("question"))

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(waits)
        until(lambda: lm.pipeline.store.waiting() == 1 or future.done())
        clock.advance(10_000 if scored else 2 * 70 + 5)
        run.store.tick()  # type: ignore[attr-defined]
        assert run.used() == (0.0, 0.0, 0.01, None, None)
        run.stop()
        assert isinstance(future.result(10), dspy_prod.RunStoppedError)
    assert run.used() == (0.0, 0.0, 0.0, None, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_goes_on_with_the_run(serve: MakeProvider, connect: MakeLM, sqlite_url: str) -> None:
    """What the parent has in flight stays the parent's."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, store=fresh_memory())
    run = Run("it", usd=0.1, calls=100, store=sqlite_url, namespace="e2e")
    assert len(crowd(run, [lm], 2, 2)) == 4
    provider.hold()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(crowd, run, [lm], 1, 1)
        provider.wait_until(lambda p: p.in_flight == 1)
        pid = os.fork()
        if not pid:
            answered = len(answers(crowd(run, [lm], 1, 2)))
            run.store.close()
            os._exit(answered)
        provider.wait_until(lambda p: p.in_flight == 2)
        provider.release()
        assert future.result(10) == [["ok"]]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert run.used() == (0.07, 0.0, 0.0, 7, None)
    assert provider.bill.nano == 7 * CENT
