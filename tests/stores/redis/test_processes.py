"""The Redis store shared by processes: budgets, limits, deaths; and how often it asks its server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import redis

from dspy_prod.options import RateLimit
from dspy_prod.stores.base import GRANTED, AccountState
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.testing import Provider
from tests.e2e.children import A_CENT, spend
from tests.stores.redis import workers
from tests.stores.support import CENT, DOLLAR, Problems, ask, check_books, granted, settlement, until

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.stores.redis.workers", "tests.e2e.children"])


@pytest.fixture
def space(connection: Connection) -> str:
    """A namespace that nobody else uses."""
    return connection.namespace


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Start a process; whatever still runs at the end of the test is killed."""
    begun: list[Any] = []

    def begin(target: Callable[..., None], *arguments: Any) -> Any:
        begun.append(SERVER.Process(target=target, args=arguments, daemon=True))
        begun[-1].start()
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.join(10)


def run(start: Callable[..., Any], target: Callable[..., None], count: int, *arguments: Any) -> list[Any]:
    """What each of some processes that begin together put into its results."""
    barrier, results = SERVER.Barrier(count), SERVER.Queue()
    for _ in range(count):
        start(target, *arguments, barrier, results)
    return [results.get(timeout=90) for _ in range(count)]


def calls_of(url: str, name: str = "evalsha") -> int:
    """How often the server was asked so."""
    with closing(redis.Redis.from_url(url)) as client:
        told: dict[str, dict[str, int]] = client.info("commandstats")
        return told.get(f"cmdstat_{name}", {"calls": 0})["calls"]


# -- how often the server is asked -------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [None, RateLimit(rpm=60_000, tpm=1_000_000, concurrency=50)])
def test_an_admission_is_one_call_of_the_script(valkey: str, space: str, limit: RateLimit | None) -> None:
    """And its settlement, which nobody waits for, is another."""
    with closing(RedisStore(valkey, space)) as store:
        warm = granted(store, ask(CENT, budget=100 * DOLLAR, limit=limit))
        store.settle(warm, settlement(warm, 1))
        store.flush(10)
        before = calls_of(valkey), calls_of(valkey, "hmget")
        for _ in range(5):
            time.sleep(0.11)  # else they count as a series, and are drawn ahead
            each = granted(store, ask(CENT, budget=100 * DOLLAR, limit=limit))
            assert calls_of(valkey) - before[0] == 1
            store.settle(each, settlement(each, 1))
            store.flush(10)
            before = calls_of(valkey), 0


def test_many_callers_are_admitted_by_few_calls_of_the_script(valkey: str, space: str) -> None:
    """What 64 callers ask for is decided together, and drawn ahead."""
    with closing(RedisStore(valkey, space)) as store:
        before = calls_of(valkey)

        def work(_: int) -> None:
            for _ in range(10):
                each = granted(store, ask(CENT // 100, budget=100 * DOLLAR))
                time.sleep(0.005)
                store.settle(each, settlement(each, 1))

        workers.together(work, 64)
        store.flush(10)
        made = calls_of(valkey) - before
        print(f"640 admissions and settlements under 64 callers: {made} calls of the script")
        assert store.account("day") == AccountState(640, 0, 0)
        assert made < 320


# -- several processes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cost", [CENT // 3, pytest.param(CENT, marks=pytest.mark.chaos)])
def test_processes_spend_a_budget_and_no_more(valkey: str, space: str, start: Callable[..., Any], cost: int) -> None:
    """Four processes of 16 callers: what they were let spend is the budget, to less than one call."""
    found = run(start, workers.spend, 4, valkey, space, 16, cost)
    spent = sum(each for each, _ in found)
    assert 99 * CENT <= spent <= DOLLAR
    assert [reasons for _, reasons in found] == [["budget_exceeded"]] * 4
    with closing(RedisStore(valkey, space)) as store:
        until(lambda: store.holds() == 0)
        assert store.account("day") == AccountState(spent, 0, 0)
        check_books(store)


def test_the_provider_bills_four_processes_no_more_than_their_dollar(valkey: str, start: Callable[..., Any]) -> None:
    """Sixty-four callers in four processes, real calls: the bill is the budget, to less than one call."""
    own = f"{valkey.rpartition('/')[0]}/7"  # a database of its own: the namespace is that of all such tests
    with closing(redis.Redis.from_url(own)) as client:
        client.flushdb()
    with Provider(prices=A_CENT, usage=(20, 100)) as provider:
        found = run(start, spend, 4, provider.url, own, 16, 3)
        assert 0.99 * DOLLAR <= provider.bill.nano <= DOLLAR
    assert sum(each.get("answer", 0) for each in found) == 100
    assert sum(each.get("BudgetExceededError", 0) for each in found) == 4 * 16 * 3 - 100


def test_processes_share_the_seats_of_a_limit_and_none_starves(
    valkey: str, space: str, start: Callable[..., Any]
) -> None:
    """Never more than four in flight together, and each of two crowds gets its part."""
    found = run(start, workers.send, 2, valkey, space, {"concurrency": 4}, 6, 1.0)
    moments = sorted([(at, 1) for sent in found for at, _ in sent] + [(end, -1) for sent in found for _, end in sent])
    most = now = 0
    for _, step in moments:
        now += step
        most = max(most, now)
    assert most <= 4
    counts = sorted(len(sent) for sent in found)
    assert counts[0] >= 0.2 * counts[1], counts


@pytest.mark.chaos
def test_processes_share_a_minute_of_requests(valkey: str, space: str, start: Callable[..., Any]) -> None:
    """Sixty requests a minute, all at once: sixty go, whoever sends them."""
    found = run(start, workers.send, 2, valkey, space, {"rpm": 60, "burst": 60}, 8, 1.0)
    assert sum(map(len, found)) == 60


def test_money_freed_in_one_process_wakes_who_waits_in_another(
    valkey: str, space: str, start: Callable[..., Any]
) -> None:
    """Within a few looks of 25 ms."""
    with closing(RedisStore(valkey, space)) as store:
        held = granted(store, ask(CENT))
        ready, results = SERVER.Queue(), SERVER.Queue()
        start(workers.wait_for_money, valkey, space, ready, results)
        assert ready.get(timeout=60) == "waiting"
        store.settle(held, settlement(held, 0))
        freed = store.now()
        state, at = results.get(timeout=20)
        assert state == GRANTED
        print(f"woken after {(at - freed) * 1000:.0f} ms")
        assert at - freed < 1.0
        until(lambda: store.account("day").spent == DOLLAR)


def test_what_a_killed_process_held_is_charged_once(valkey: str, space: str, start: Callable[..., Any]) -> None:
    """When its lease ends, by one of those that are left; and the answer that comes late replaces the charge."""
    ready = SERVER.Queue()
    worker = start(workers.hold_and_hang, valkey, space, 0.6, 0, ready)
    id = ready.get(timeout=60)
    problems = Problems()
    stores = [RedisStore(valkey, space, lease=0.6, on_problem=problems) for _ in range(3)]
    for store in stores:
        other = granted(store, ask(1, accounts=("other",)))
        store.settle(other, settlement(other, 1))
    time.sleep(0.9)
    assert stores[0].account("day") == AccountState(0, CENT, 0)  # alive: its lease is renewed
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: stores[0].account("day").held == 0)
    time.sleep(0.3)  # time enough for the others to do it again
    for store in stores:
        assert store.account("day") == AccountState(CENT, 0, CENT)
        assert store.holds() == 0
    assert problems.names == ["hold_abandoned"]
    late = ask(CENT, id=id)
    stores[1].settle(late, settlement(late, CENT // 2))
    assert stores[1].account("day") == AccountState(CENT // 2, 0, 0)
    check_books(stores[1])
    for store in stores:
        store.close()


def test_what_a_killed_process_held_is_freed_by_one_that_knew_less_of_the_account(
    valkey: str, connection: Connection, space: str, start: Callable[..., Any]
) -> None:
    """Who charges it knew the account as it was before: what was held then is not what is held now."""
    ready = SERVER.Queue()
    with closing(RedisStore(valkey, space, lease=0.6)) as store:
        known = granted(store, ask(CENT))
        store.settle(known, settlement(known, CENT))
        assert store.flush(10)
        worker = start(workers.hold_and_hang, valkey, space, 0.6, 0, ready)
        ready.get(timeout=60)
        other = granted(store, ask(1, accounts=("other",)))  # so that it has heard of everything but the account
        store.settle(other, settlement(other, 1))
        os.kill(worker.pid, signal.SIGKILL)
        # Whoever asks the store has it look, so the server is asked.
        until(lambda: int(connection.read([("HGET", connection.key("account", "day"), "s")])[0]) == 2 * CENT)
        assert store.account("day") == AccountState(2 * CENT, 0, CENT)
        check_books(store)


@pytest.mark.chaos
def test_killing_processes_in_a_storm_loses_nothing_that_was_told(
    valkey: str, space: str, start: Callable[..., Any]
) -> None:
    """What was told is charged, nothing stays held, and the account is the sum of its records."""
    known = 0
    for _ in range(4):
        ready = SERVER.Queue()
        worker = start(workers.storm, valkey, space, 8, ready)
        told = [ready.get(timeout=60) for _ in range(4)]
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        known += max(told)
    with closing(RedisStore(valkey, space, lease=1.0)) as store:
        until(lambda: store.account("day").held == 0)
        assert store.holds() == 0
        assert store.account("day").spent >= known * (CENT // 20)
        check_books(store)
