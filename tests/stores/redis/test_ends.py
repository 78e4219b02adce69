"""Everything that a store keeps on a server goes some time after its last use, but what counts for ever."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import dspy
import pytest
from dspy.utils.exceptions import LMServerError

import dspy_prod
from dspy_prod import Budget
from dspy_prod.stores.base import Reservation
from dspy_prod.stores.durable import transactions
from dspy_prod.stores.redis.accounts import window_of
from dspy_prod.stores.redis.asking import KEPT_FOR
from dspy_prod.stores.redis.connection import Connection
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.testing import Provider, Status
from tests.stores.support import CENT, DOLLAR, FakeClock, ask, granted, settlement, until
from tests.stores.trial_support import call, expose, made, outcome

DAY = 86_400


@pytest.fixture
def server(valkey: str, namespace: str) -> Iterator[Connection]:
    with closing(Connection(valkey, namespace)) as own:
        yield own


def ends(server: Connection) -> dict[str, float]:
    """Seconds for which each key of the namespace is kept; -1: without an end."""
    (keys,) = server.read([("KEYS", server.key("x")[:-1] + "*")])
    told = server.read([("PTTL", key) for key in keys])
    found = {key.decode("latin-1").partition("}:")[2]: left for key, left in zip(keys, told, strict=True)}
    return {key: left / 1000 if left > 0 else left for key, left in found.items()}


def lasting(server: Connection) -> set[str]:
    return {key for key, left in ends(server).items() if left == -1}


def day(amount: int = CENT, ends_in: float = 60.0, **fields: Any) -> Reservation:
    """On an account of a window that ends."""
    wanted = ask(amount, budget=DOLLAR, accounts=("day||-|2026-11-23",), **fields)
    wanted.accounts = tuple(account._replace(ends_in=ends_in) for account in wanted.accounts)
    return wanted


def live(url: str, namespace: str, budgets: list[Budget]) -> None:
    """Use everything that there is, and be killed with calls under way."""
    with Provider(faults=lambda each: Status(503) if "poison" in each.last_message else None) as provider:
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini", api_base=provider.url, api_key="test", store=url, namespace=namespace, max_tokens=20,
            retry=False, breaker=dspy_prod.CircuitBreaker(failure_threshold=1), budget=budgets,
            limit=dspy_prod.RateLimit(rpm=6000, concurrency=4),
        )  # fmt: skip
        program = dspy_prod.Production(dspy.Predict("question -> answer"), name="triage", fallback_response="later")
        run = dspy_prod.Run("it", usd=1, calls=100, tokens=10**6, keep_answers=True, store=url, namespace=namespace)
        with dspy.context(lm=lm), dspy_prod.call_context(tenant="acme", user="ann", run=run):
            assert lm("hello") == lm("hello")
            program(question="?")
        controls = dspy_prod.controls(url, namespace)
        controls.stop(tenant="bad")
        controls.breaker("force_open", "openai/other")
        controls.set_budget(budgets[0].title, 2.0)
        with pytest.raises(LMServerError):
            lm("poison")
        store = lm.pipeline.store
        made(store)
        expose(store, "u", "control")
        call(store, "u", list_nano=1)
        outcome(store, "u", 1.0)
        for each in range(50):
            granted(store, day(CENT // 10, id=f"held-{each}"))
        assert store.flush(10)
        os.kill(os.getpid(), signal.SIGKILL)


def lived(url: str, namespace: str, budgets: list[Budget]) -> None:
    process = multiprocessing.get_context("spawn").Process(target=live, args=(url, namespace, budgets))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


ENDING = [Budget(usd=1, per="day", name="b"), Budget(usd=1, per="month", scope="tenant"), Budget(usd=1, per="run")]
TOTAL = [Budget(usd=1, per="total", name="all"), Budget(usd=1, per="total", scope="tenant", name="each")]


def test_nothing_of_a_namespace_is_without_an_end(valkey: str, namespace: str, server: Connection) -> None:
    """Also what a fleet leaves behind of which nobody comes back."""
    lived(valkey, namespace, ENDING)
    found = ends(server)
    there = {key.partition(":")[0] for key in found}
    whole = {"meta", "names", "ends", "terms", "owners", "homes"}
    assert whole | {"account", "window", "limiter", "board", "runs", "programs", "trials", "ledger"} <= there
    assert there & {"holds", "drawn"}
    assert lasting(server) == set()
    assert max(found.values()) <= KEPT_FOR + DAY


def test_what_counts_for_ever_is_all_that_has_none(valkey: str, namespace: str, server: Connection) -> None:
    """The accounts of total budgets, whose they are, and which limits were set: else money would be spent twice."""
    lived(valkey, namespace, [*TOTAL, *ENDING])
    assert lasting(server) == {
        "names", "terms", "account:all%7C-%7Ctotal", "window:all%7C:%7Ctotal", "account:each%7Cacme%7Ctotal",
        "account:each%7Canonymous%7Ctotal", "window:each%7C:%7Ctotal",
    }  # fmt: skip


def test_what_ended_lasts_once_something_counts_for_ever(valkey: str, namespace: str, server: Connection) -> None:
    with closing(RedisStore(valkey, namespace)) as store:
        store.settle(granted(store, wanted := day()), settlement(wanted, CENT))
        store.steer(Budget(usd=1, per="day", name="day"))
        assert store.flush(10)
        assert lasting(server) == set()
        granted(store, ask(CENT, budget=DOLLAR, accounts=("all|-|total",)))
        assert store.flush(10)
        assert lasting(server) == {"names", "terms", "account:all%7C-%7Ctotal", "window:all%7C:%7Ctotal"}


def test_what_is_used_every_day_does_not_end(valkey: str, namespace: str, server: Connection) -> None:
    """What tells of the whole namespace is renewed by the first commit of a day, whatever that is about."""
    with closing(RedisStore(valkey, namespace)) as store:
        store.settle(granted(store, wanted := day()), settlement(wanted, CENT))
        store.steer(Budget(usd=1, per="day", name="day"))
        assert store.flush(10)
        whole = [server.key(name) for name in ("meta", "names", "ends", "terms")]
        server.read([*(("EXPIRE", key, 100) for key in whole), ("HSET", whole[0], "kept", "1")])
        store.append(settlement(wanted, CENT).record._replace(id="r"))  # type: ignore[union-attr]
        assert store.flush(10)
        assert min(server.read([("TTL", key) for key in whole])) > KEPT_FOR - DAY


def test_an_end_that_is_not_known_leaves_the_one_that_is(valkey: str, namespace: str, server: Connection) -> None:
    """Who charges for a dead process has not been told when its window ends."""
    clock = FakeClock()
    with closing(RedisStore(valkey, namespace, clock=clock, lease=10)) as one:
        granted(one, day())
        assert one.flush(10)
        before = ends(server)["account:day%7C%7C-%7C2026-11-23"]
        clock.advance(1_000)
        with closing(RedisStore(valkey, namespace, clock=clock, lease=10)) as other:
            key = "day||-|2026-11-23"
            until(lambda: (found := other.account(key)) is not None and found.spent == CENT, 20, "it is charged")
            assert 0 < ends(server)["account:day%7C%7C-%7C2026-11-23"] <= before


@pytest.mark.parametrize("key", ["run|{}|-|run", "|run|{}|usd"])
def test_of_a_run_that_is_over_nothing_is_left(
    valkey: str, namespace: str, server: Connection, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process is one: else a service would leave an account behind whenever it is started."""
    monkeypatch.setattr(transactions, "SWEEP_EVERY", 0.05)
    clock = FakeClock()
    with closing(RedisStore(valkey, namespace, clock=clock, lease=0.3)) as store:
        for name, later in (("one", 0), ("two", KEPT_FOR + DAY)):
            clock.advance(later)
            store.settle(granted(store, wanted := ask(CENT, accounts=(key.format(name),))), settlement(wanted, CENT))
            assert store.flush(10)
        window = window_of(server, key.format("one"))
        assert window is not None
        indices = [("ZCARD", each) for each in (server.key("names"), server.key("ends"), window)]
        until(lambda: server.read(indices) == [1, 1, 1], 20, "the first one is forgotten")
