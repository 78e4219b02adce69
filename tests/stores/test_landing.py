"""A claim whose answer is on its way to the store ends, whatever becomes of the answer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest

import dspy_prod
from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.durable import flights as durable_flights
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.testing import Provider
from tests.stores.support import Put, until

ANSWER = CachedAnswer(b"{}", inf, inf)


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "redis":
        opened: Any = RedisStore(request.getfixturevalue("valkey"), tmp_path.name)
    else:
        opened = SqliteStore(str(tmp_path / "state.db"), "n")
    opened.flush(10)
    yield opened
    opened.close()


def lead_and_land(store: Any) -> None:
    assert store.flights.join(b"key") is True
    store.cache_put(b"key", ANSWER, max_entries=9, max_bytes=999)
    store.flights.leave(b"key")


class Somebody:
    """Who asks, and may never go on."""

    def __init__(self) -> None:
        self.is_gone = False

    def gone(self) -> bool:
        return self.is_gone


def test_a_claim_is_ended_by_whose_it_is(store: Any) -> None:
    """Of several of one process: one that asks without a claim, or was interrupted, ends no other one's."""
    his, hers = Somebody(), Somebody()
    assert store.flights.join(b"key", who=his) is True
    for verdict in (False, True):
        assert store.flights.join(b"key", True, who=hers) is False
        store.flights.leave(b"key", verdict, who=hers)
        store.flights.leave(b"key", verdict)
        assert store.flights._claims.claimed(b"key", his)
    store.flights.leave(b"key", who=his)
    until(lambda: store.flights.join(b"key", True, who=hers) is True, 5)
    store.flights.leave(b"key", who=his)
    assert store.flights._claims.claimed(b"key", hers)


def test_a_claim_of_somebody_who_is_gone_is_the_next_ones(store: Any) -> None:
    """It was renewed for as long as its process lived, and all others followed."""
    his, hers = Somebody(), Somebody()
    assert store.flights.join(b"key", who=his) is True
    time.sleep(3 * durable_flights.RENEW)
    assert store.flights.join(b"key", True, who=hers) is False
    his.is_gone = True
    until(lambda: store.flights.join(b"key", True, who=hers) is True, 5)
    store.flights.leave(b"key", who=his)
    assert store.flights._claims.claimed(b"key", hers)


def test_an_answer_that_is_cleared_before_it_is_written(store: Any) -> None:
    """Whoever asks next leads: nobody else ever will."""
    with store._mailbox.writer.io:  # nothing is written meanwhile
        lead_and_land(store)
        assert store.flights.join(b"key") is False
        clearing = threading.Thread(target=store.cache_clear)
        clearing.start()
        until(lambda: store.cache_get(b"key") is None, 5)
    clearing.join(20)
    until(lambda: store.flights.join(b"key", True) is True, 5)


def test_an_answer_that_can_never_be_written(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unfit(*_: Any) -> None:
        raise ValueError("no such answer")

    with store._mailbox.writer.io:
        lead_and_land(store)
        monkeypatch.setattr(store._mailbox.writer.tables.cache, "put", unfit)
    until(lambda: store.flights.join(b"key", True) is True, 5)
    assert store.cache_get(b"key") is None


def test_an_answer_that_comes_as_the_writer_ends(store: Any) -> None:
    """It stays readable for nobody, and is not taken to be on its way for ever."""
    told: list[int] = []
    store.close()
    store._mailbox.writer.inbox.put((Transactions.put_answer, b"key", Put(ANSWER, partial(told.append, 1))))
    store._mailbox.refuse_stragglers()
    assert told == [1]


def test_a_cache_that_is_cleared_right_after_an_answer(tmp_path: Path) -> None:
    """The same question asked again is asked upstream, and does not wait for what was cleared."""
    with Provider() as provider:
        lm = dspy_prod.LM("openai/m", api_base=provider.url, api_key="k", store=f"sqlite:///{tmp_path}/state.db")
        with dspy_prod.call_context(deadline=10.0):
            for turn in range(40):
                assert lm("hello")
                assert len(provider.calls) == turn + 1
                lm.cache_clear()
        lm.close()


def test_a_lead_that_is_interrupted_as_it_begins_is_nobody_s(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in a notebook, while the cache is read or a thread begins: its question could never be asked again."""

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    flights = store.flights
    for place, name in ((flights._answers, "get"), (flights._renewing, "begin")):
        assert flights.join(b"key") is True
        flights.leave(b"key")
        with monkeypatch.context() as patched:
            patched.setattr(place, name, interrupted)
            with contextlib.suppress(KeyboardInterrupt):  # Redis looks and claims in one step
                flights.join(b"key", True)
                flights.leave(b"key")
        assert len(flights._claims) == 0
        until(lambda: flights.join(b"key", True) is True, 5)
        flights.leave(b"key")


@pytest.mark.parametrize("twice", [False, True])
def test_a_lead_that_is_interrupted_as_its_key_is_taken_is_nobody_s(store: Any, twice: bool) -> None:
    """Or its caller's to end, where what undoes it is interrupted too; the key was taken while its process lived."""
    left = []

    class Own(dict):  # type: ignore[type-arg]
        def setdefault(self, key: Any, claim: Any) -> Any:
            super().setdefault(key, claim)
            left.extend([1] * twice)
            raise KeyboardInterrupt

        def get(self, key: Any, default: Any = None) -> Any:
            if left:
                left.pop()
                raise KeyboardInterrupt
            return super().get(key, default)

    claims, his, hers = store.flights._claims, Somebody(), Somebody()
    usual, claims._own = claims._own, Own()
    with pytest.raises(KeyboardInterrupt):
        store.flights.join(b"key", who=his)
    usual.update(claims._own)
    claims._own = usual
    assert len(claims) == int(twice)
    store.flights.leave(b"key", who=hers)
    assert len(claims) == int(twice)
    store.flights.leave(b"key", who=his)
    assert len(claims) == 0
    until(lambda: store.flights.join(b"key", True, who=hers) is True, 5)


@pytest.mark.parametrize("by", ["the caller", "who renews"])
def test_a_claim_that_ends_just_before_it_is_ended_again_is_the_next_ones(
    store: Any, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """It was looked whose it is, and then ended whosever it was by then."""
    flights, his, hers = store.flights, Somebody(), Somebody()
    claims, free, led = flights._claims, flights._claims.free, []

    def just_before(*arguments: Any) -> None:
        monkeypatch.undo()
        flights.leave(b"key", who=his)
        until(lambda: flights.join(b"key", True, who=hers) is True, 5)
        led.append(hers)
        free(*arguments)

    assert flights.join(b"key", who=his) is True
    monkeypatch.setattr(claims, "free", just_before)
    if by == "the caller":
        flights.leave(b"key", who=his)
    else:
        his.is_gone = True
        flights._renewing._renew()
    assert led == [hers]
    assert claims.claimed(b"key", hers)
    assert flights.join(b"key", True, who=his) is False


def test_a_claim_of_somebody_who_is_gone_stays_while_its_answer_lands(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end came just as it was seen that he is gone: others asked once more, for they could not read it yet."""
    flights, his = store.flights, Somebody()
    claims, free, landed = flights._claims, flights._claims.free, threading.Event()

    def leave() -> None:
        flights.leave(b"key", who=his)
        landed.set()

    def just_before(*arguments: Any) -> None:
        monkeypatch.undo()
        leaving.start()
        landed.wait(0.3)
        free(*arguments)

    assert flights.join(b"key", who=his) is True
    leaving = threading.Thread(target=leave)
    with store._mailbox.writer.io:
        store.cache_put(b"key", ANSWER, max_entries=9, max_bytes=999)
        monkeypatch.setattr(claims, "free", just_before)
        his.is_gone = True
        flights._renewing._renew()
        leaving.join(5)
        assert claims.claimed(b"key", his) is (b"key" in flights._landing)


def test_what_is_claimed_as_the_thread_that_renews_ends_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable_flights, "RENEW", 0.01)
    monkeypatch.setattr(durable_flights, "IDLE", 0.05)
    claims: set[bytes] = set()
    renewed = threading.Event()

    class Claims:
        """One is claimed just after it was looked whether there is any."""

        def __len__(self) -> int:
            found = len(claims)
            if renewing._lock.locked() and not found:
                claims.add(b"key")
                if renewing._thread is not None:
                    renewing.begin()
                else:
                    threading.Thread(target=renewing.begin).start()
            return found

        def claimers(self) -> list[Any]:
            return []

        def renew(self, but: set[bytes]) -> None:
            renewed.set()

    claimed: Any = Claims()
    renewing = durable_flights._Renewing(claimed, set())
    renewing.begin()
    try:
        assert renewed.wait(5)
    finally:
        renewing.over.set()


def test_what_could_not_be_renewed_is_renewed_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the error was: the thread ended, was taken for one that renews, and no other one was begun."""
    monkeypatch.setattr(durable_flights, "RENEW", 0.01)
    renewed = threading.Event()

    class Claims:
        tries = 0

        def __len__(self) -> int:
            return 1

        def claimers(self) -> list[Any]:
            return []

        def renew(self, but: set[bytes]) -> None:
            self.tries += 1
            if self.tries < 3:
                raise ValueError("no such reply")
            renewed.set()

    claimed: Any = Claims()
    renewing = durable_flights._Renewing(claimed, set())
    renewing.begin()
    try:
        assert renewed.wait(5)
    finally:
        renewing.over.set()
