"""A user of the server who may do no more than the guide says: all that a store does is among it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis

import dspy_prod
from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.base import AccountState
from dspy_prod.stores.opening import open_store
from dspy_prod.testing import Provider
from tests.stores.redis.servers import started_valkey
from tests.stores.support import CENT, ask, check_books, decided, granted, settlement, until
from tests.stores.trial_support import call, expose, made, outcome

GUIDE = Path(__file__).parents[3] / "docs" / "guide" / "fleet.md"


@pytest.fixture
def server() -> Iterator[redis.Redis]:
    """One that has the user of the guide; as who may do all."""
    told = re.findall(r"^ACL SETUSER triage .+$", GUIDE.read_text(), re.MULTILINE)
    assert told
    running = started_valkey()
    with closing(redis.Redis(port=running.port, decode_responses=True)) as client:
        for line in told:
            client.execute_command(*line.split())
        yield client
    running.stop()


def place(server: redis.Redis, user: str = "triage:secret@") -> str:
    return f"redis://{user}127.0.0.1:{server.connection_pool.connection_kwargs['port']}/0"


def test_the_rights_of_the_guide_are_enough(server: redis.Redis) -> None:
    """Budgets, limits, circuits, cache, runs, programs, experiments, and what operators say."""
    url = place(server)
    with Provider() as provider:
        lm = dspy_prod.LM(
            "openai/gpt-4o-mini", api_base=provider.url, api_key="test", store=url, namespace="triage", max_tokens=20,
            limit=dspy_prod.RateLimit(rpm=6000, concurrency=4), budget=dspy_prod.Budget(usd=1, per="day"),
        )  # fmt: skip
        with dspy_prod.call_context(run=dspy_prod.Run("it", usd=1, store=url, namespace="triage")):
            assert lm("hello") == lm("hello") == ["ok"]
        controls = dspy_prod.controls(url, "triage")
        controls.stop(model="openai/gpt-4o-mini", reason="a try")
        with pytest.raises(dspy_prod.StoppedError):
            lm("anybody there?")
        controls.resume(model="openai/gpt-4o-mini")
        assert lm("hello again") == ["ok"]
        store = lm.pipeline.store
        made(store)
        expose(store, "u", "control")
        call(store, "u", list_nano=1)
        outcome(store, "u", 1.0)
        assert store.flush(10)
        assert lm.costs().today_usd == provider.bill.usd > 0
        assert [record.outcome for record in lm.ledger.records()] == ["ok", "refused", "cached", "ok"]
        lm.close()
        store.close()
    refused = [f"{entry['reason']} {entry['object']}" for entry in server.acl_log()]
    assert set(refused) <= {"command client|setinfo", "command client"}, "redis-py tells its name where it may"


def test_what_is_of_others_is_out_of_reach(server: redis.Redis) -> None:
    """Another namespace, other keys: the error says where the rights are told."""
    with pytest.raises(StoreUnavailableError, match="see the rights in the guide"):
        open_store(place(server), "billing")
    with closing(redis.Redis.from_url(place(server))) as triage, pytest.raises(redis.exceptions.NoPermissionError):
        triage.get("a key of somebody else")
    with closing(open_store(place(server, ""), "billing")) as everything:
        granted(everything, ask(CENT))


@pytest.mark.parametrize("right", ["pttl", "set", "hincrby"])
def test_a_right_that_is_missing_is_missed_before_anything_is_written(server: redis.Redis, right: str) -> None:
    """The script ended halfway: what it had written stayed, was taken for not written, and was written again."""
    with closing(open_store(place(server), "triage")) as store:
        first = granted(store, ask(10 * CENT))
        assert store.flush(10)
        server.execute_command("ACL", "SETUSER", "triage", f"-{right}")
        store.settle(first, settlement(first, 4 * CENT))
        refused = decided(store.admit(ask(CENT, accounts=("another",))), 10).refusal
        assert refused is not None
        assert "its user may not do this; see the rights in the guide" in refused.detail
        until(lambda: store._writer._back_off > 0.1, 10)  # tried again and again
        server.execute_command("ACL", "SETUSER", "triage", f"+{right}")
        until(lambda: store.flush(1), 10)
        assert store.account("day") == AccountState(4 * CENT, 0, 0)
        assert store.account("another") == AccountState(0, 0, 0)
        check_books(store)
