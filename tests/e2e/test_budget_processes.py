"""A budget in a SQLite file is one budget: after a restart, in four processes, and when one of them is killed."""

from __future__ import annotations

import gc
import multiprocessing as mp
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspy_prod import Budget, BudgetExceededError
from dspy_prod.stores.opening import open_store
from dspy_prod.testing import Provider
from tests.e2e.children import A_CENT, call_until_killed, spend
from tests.e2e.conftest import MakeLM, MakeProvider
from tests.e2e.support import (
    CENT,
    account,
    answers,
    assert_equals_bill,
    assert_nothing_held,
    charged,
    errors,
    make_lm,
    outcome,
    together,
    until,
    upstream,
)

DOLLAR = Budget(usd=1.0)
SPAWN = mp.get_context("spawn")
Start = Callable[..., Any]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a child process; whatever still runs at the end of the test is killed."""
    children: list[Any] = []

    def begin(target: Callable[..., None], *arguments: Any) -> Any:
        child = SPAWN.Process(target=target, args=arguments, daemon=True)
        child.start()
        children.append(child)
        return child

    yield begin
    for child in children:
        if child.is_alive():
            child.kill()
        child.join(10)


def spend_in_children(
    start: Start, provider: Provider, store: str, processes: int, callers: int, calls: int
) -> Counter[str]:
    """Let a crowd in each of several processes spend the dollar; how the calls ended."""
    barrier, results = SPAWN.Barrier(processes), SPAWN.Queue()
    children = [start(spend, provider.url, store, callers, calls, barrier, results) for _ in range(processes)]
    ended: Counter[str] = Counter()
    for _ in children:
        ended.update(results.get(timeout=90))
    return ended


def test_a_new_process_goes_on_counting_where_the_old_one_ended(
    serve: MakeProvider, connect: MakeLM, start: Start, sqlite_url: str
) -> None:
    """Sixty cents spent here leave forty for a process that is started afterwards."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    lm = connect(provider, prices=A_CENT, budget=DOLLAR, store=sqlite_url)
    assert len(answers(together("threads", lm, 20, calls=3))) == 60
    lm.close()
    lm.pipeline.store.close()
    ended = spend_in_children(start, provider, sqlite_url, 1, 16, 5)
    assert ended == {"answer": 40, "BudgetExceededError": 40}
    assert provider.bill.nano == 100 * CENT


def test_a_closed_and_reopened_store_goes_on_counting(serve: MakeProvider, sqlite_url: str) -> None:
    """A store object made anew, as after a restart, finds spent money and records in the file."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    for spent in (40, 80, 100):
        lm = make_lm(provider.url, prices=A_CENT, budget=DOLLAR, store=sqlite_url)
        outcomes = together("threads", lm, 10, calls=4)
        errors(outcomes, BudgetExceededError)
        assert account(lm).spent == provider.bill.nano == spent * CENT
        assert len(upstream(lm)) == spent
        before = weakref.ref(lm.pipeline.store)
        lm.close()
        lm.pipeline.store.close()
        del lm, outcomes
        gc.collect()
        assert open_store(sqlite_url, "e2e") is not before()


def test_four_processes_spend_one_dollar(serve: MakeProvider, connect: MakeLM, start: Start, sqlite_url: str) -> None:
    """Four processes with sixteen threads each share one SQLite file, and together one dollar."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=(0.0, 0.05))
    ended = spend_in_children(start, provider, sqlite_url, 4, 16, 3)
    assert ended == {"answer": 100, "BudgetExceededError": 92}
    assert provider.bill.nano == 100 * CENT
    assert provider.max_in_flight > 16, "one process did it all"
    lm = connect(provider, prices=A_CENT, budget=DOLLAR, store=sqlite_url)
    assert_equals_bill(lm, provider)
    assert account(lm) == (100 * CENT, 0, 0)
    assert_nothing_held(lm.pipeline.store)


def test_a_call_killed_in_flight_is_charged_and_shown_as_unconfirmed(
    serve: MakeProvider, connect: MakeLM, start: Start, sqlite_url: str
) -> None:
    """After `kill -9` the hold is charged in full when its lease ends, and `resolve` can put the charge right."""
    provider = serve(prices=A_CENT, usage=(20, 60))
    store = f"{sqlite_url}?lease=1"
    provider.hold()
    child = start(call_until_killed, provider.url, store, 1)
    provider.wait_until(lambda p: p.in_flight == 1, timeout=60)
    lm = connect(provider, prices=A_CENT, budget=DOLLAR, store=store)
    assert account(lm) == (0, CENT, 0)
    child.kill()
    child.join(10)
    provider.release()
    provider.wait_until(lambda p: p.in_flight == 0, timeout=30)
    lm("somebody else goes on working")
    until(lambda: lm.pipeline.store.holds() == 0, 10, "the lease's end")
    (record,) = lm.ledger.unconfirmed()
    assert (record.outcome, record.cost_nano, record.estimated) == ("abandoned", CENT, True)
    told = next(row for row in provider.bill.rows if not row.told)
    assert told.nano == CENT * 6 // 10
    assert account(lm) == (CENT + CENT * 6 // 10, 0, CENT)
    assert lm.ledger.resolve(record.id, told.usd)
    assert lm.ledger.unconfirmed() == []
    assert charged(lm) == provider.bill.nano == account(lm).spent


def test_a_reader_alone_sees_the_charge_of_a_dead_process(
    serve: MakeProvider, connect: MakeLM, start: Start, sqlite_url: str
) -> None:
    """Nobody has to make a call for the lease of a dead process to end: looking at the costs is enough."""
    provider = serve(prices=A_CENT, usage=(20, 100))
    store = f"{sqlite_url}?lease=1"
    provider.hold()
    child = start(call_until_killed, provider.url, store, 1)
    provider.wait_until(lambda p: p.in_flight == 1, timeout=60)
    child.kill()
    child.join(10)
    lm = connect(provider, prices=A_CENT, budget=DOLLAR, store=store)
    until(lambda: len(lm.ledger.unconfirmed()) == 1, 10, "the charge")
    assert account(lm) == (CENT, 0, CENT)


def test_kill_9_under_load_leaves_a_ledger_that_is_never_below_the_bill(
    serve: MakeProvider, connect: MakeLM, start: Start, sqlite_url: str
) -> None:
    """Whatever eight threads were doing when they were killed, the file is readable and no billed call is missing."""
    provider = serve(prices=A_CENT, usage=(20, 100), latency=(0.0, 0.04))
    store = f"{sqlite_url}?lease=1"
    child = start(call_until_killed, provider.url, store, 8)
    provider.wait_until(lambda p: len(p.calls) >= 40, timeout=60)
    child.kill()
    child.join(10)
    provider.wait_until(lambda p: p.in_flight == 0, timeout=30)
    lm = connect(provider, prices=A_CENT, budget=DOLLAR, store=store)
    outcome(lambda: lm("wake the store"))
    until(lambda: lm.pipeline.store.holds() == 0, 10, "the leases' end")
    assert 40 * CENT <= provider.bill.nano <= charged(lm) <= 100 * CENT
    assert len(upstream(lm)) >= len(provider.bill.rows)
    confirmed = [record for record in upstream(lm) if not record.estimated]
    told = [row for row in provider.bill.rows if row.told]
    assert len(told) - 8 <= len(confirmed) <= len(told)
    outcomes = together("threads", lm, 16, calls=8)
    errors(outcomes, BudgetExceededError)
    assert provider.bill.nano <= 100 * CENT
    assert account(lm).spent == 100 * CENT
