"""Claims on a server: an answer or the lead in one step, leases, verdicts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import inf

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.durable import failing
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis import claims
from dspy_prod.stores.redis.store import RedisStore
from tests.stores.support import record, until


@pytest.fixture
def two(valkey: str, namespace: str) -> Iterator[tuple[RedisStore, RedisStore]]:
    """Two stores on one namespace, as two processes have them."""
    both = RedisStore(valkey, namespace), RedisStore(valkey, namespace)
    yield both
    for store in both:
        store.close()


def test_one_leads_and_the_other_gets_its_answer(two: tuple[RedisStore, RedisStore]) -> None:
    """Asked again, the one who follows gets the answer itself as soon as it is written, without another look."""
    mine, his = two
    assert mine.flights is not None
    assert his.flights is not None
    assert his.flights.join(b"key") is True
    assert mine.flights.join(b"key") is False
    answer = CachedAnswer(b"{}", inf, inf)
    his.cache_put(b"key", answer, max_entries=9, max_bytes=999)
    his.flights.leave(b"key")
    until(lambda: mine.flights.join(b"key", True) == answer, 5)  # type: ignore[union-attr]


def test_the_lead_passes_on_and_a_verdict_lets_all_go(two: tuple[RedisStore, RedisStore]) -> None:
    mine, his = two
    assert mine.flights is not None
    assert his.flights is not None
    assert his.flights.join(b"key") is True
    his.flights.leave(b"key")
    until(lambda: mine.flights.join(b"key", True) is True, 5)  # type: ignore[union-attr]
    assert his.flights.join(b"key") is False
    mine.flights.leave(b"key", verdict=True)
    until(lambda: his.flights.join(b"key", True) is True, 5)  # type: ignore[union-attr]
    assert not his.flights._claims.claimed(b"key")
    assert mine.flights.join(b"key") is True
    assert mine.flights._claims.claimed(b"key")


def test_a_lease_that_is_renewed_holds_and_one_that_is_not_ends(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_LEASE", 800)
    mine, his = two
    assert mine.flights is not None
    assert his.flights is not None
    assert his.flights.join(b"key") is True
    assert mine.flights.join(b"key") is False
    ends = time.monotonic() + 1.2
    while time.monotonic() < ends:
        his.flights._claims.renew(set())
        assert mine.flights.join(b"key", True) is False
    assert his.flights._claims.followed(b"key")
    his.flights._claims.close()
    until(lambda: mine.flights.join(b"key", True) is True, 5)  # type: ignore[union-attr]


def test_an_expired_answer_is_no_answer(two: tuple[RedisStore, RedisStore]) -> None:
    mine, his = two
    assert mine.flights is not None
    his.cache_put(b"key", CachedAnswer(b"{}", his.now() - 1, his.now() + 60), max_entries=9, max_bytes=999)
    assert his.flush(5)
    assert mine.cache_get(b"key") is not None
    assert mine.flights.join(b"key") is True


def test_the_end_of_a_flight_ends_no_later_one(two: tuple[RedisStore, RedisStore]) -> None:
    """A process that passes the lead to its own next caller claims it again before the first end is written."""
    mine, his = two
    assert mine.flights is not None
    assert his.flights is not None
    with his._writer.io:  # nothing is written meanwhile
        assert his.flights.join(b"key") is True
        assert mine.flights.join(b"key") is False
        his.flights.leave(b"key")
        assert his.flights.join(b"key") is True
    assert his.flush(5)
    assert mine.flights.join(b"key", True) is False
    his.flights._claims.renew(set())
    assert his.flights._claims.followed(b"key")
    his.flights.leave(b"key")
    until(lambda: mine.flights.join(b"key", True) is True, 5)  # type: ignore[union-attr]


def test_a_flight_that_ends_while_it_is_renewed_has_ended(two: tuple[RedisStore, RedisStore]) -> None:
    """What renews puts no claim back that another thread has freed: it would be waited for, for ever."""
    mine, his = two
    assert mine.flights is not None
    assert his.flights is not None

    class Own(dict):  # type: ignore[type-arg]
        def __setitem__(self, key: object, value: object) -> None:
            raise AssertionError("put back")

    held = mine.flights._claims
    assert mine.flights.join(b"key") is True
    assert his.flights.join(b"key") is False
    held._own = Own(held._own)  # type: ignore[attr-defined]
    held.renew(set())
    assert held.followed(b"key")
    held.free(b"key", False)
    assert len(held) == 0


def test_of_two_that_claim_at_once_in_one_process_one_leads(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two LMs; else the first one to be done ends the claim of both."""
    mine, _ = two
    assert mine.flights is not None
    connection = mine.flights._claims._connection  # type: ignore[attr-defined]
    read, second = connection.read, []

    def meanwhile(asked: object) -> object:
        monkeypatch.undo()
        second.append(mine.flights.join(b"key"))  # type: ignore[union-attr]
        return read(asked)

    monkeypatch.setattr(connection, "read", meanwhile)
    assert mine.flights.join(b"key") is True
    assert second == [False]


def test_a_claim_that_is_interrupted_is_none(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the server has it already."""
    mine, his = two
    assert mine.flights is not None
    connection = mine.flights._claims._connection  # type: ignore[attr-defined]
    read = connection.read

    def interrupted(asked: object) -> object:
        read(asked)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(connection, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mine.flights.join(b"key")
    until(lambda: his.flights.join(b"key", True) is True, 1)  # type: ignore[union-attr]
    assert not mine.flights._claims.claimed(b"key")


def test_ends_that_wait_for_a_transaction_are_one_note(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operations each, which are never dropped, were without bound while one does not end."""
    mine, his = two
    assert mine.flights is not None
    assert his.flights is not None
    keys = [b"key %d" % number for number in range(60)]
    inbox = mine._writer.inbox
    with mine._writer.io:
        for key in keys:
            assert mine.flights.join(key) is True
            mine.flights.leave(key)
        assert inbox.qsize() <= 2
        monkeypatch.setattr(claims, "MOST", 60)
        assert mine.flights.join(b"another") is True
        mine.flights.leave(b"another")
        assert len(mine.flights._claims._ended) == 60  # type: ignore[attr-defined]
    assert mine.flush(5)
    assert [his.flights.join(key) for key in keys] == [True] * 60
    assert mine.flights.join(b"again") is True
    mine.flights.leave(b"again")
    until(lambda: not mine.flights._claims._ended, 5)  # type: ignore[union-attr,attr-defined]


def test_ends_whose_transaction_fails_are_written_by_the_next_one(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, his = two
    assert mine.flights is not None
    assert his.flights is not None
    tables = mine._writer.tables
    commit, failed = tables.commit, []

    def once() -> None:
        if failed:
            return commit()
        failed.append(1)
        raise OSError("away")

    assert mine.flights.join(b"key") is True
    monkeypatch.setattr(tables, "commit", once)
    mine.flights.leave(b"key")
    until(lambda: his.flights.join(b"key", True) is True, 1)  # type: ignore[union-attr]
    assert failed


def ended(flights: RedisStore, key: bytes) -> bool:
    """Whether the server knows of no claim: long before its lease would have ended."""
    at = flights.flights._claims._key(key)  # type: ignore[union-attr,attr-defined]
    return flights._reader.read([("GET", at)]) == [None]


def test_ends_that_come_while_too_much_waits_are_written(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their note was dropped after the outage of the store, and no end was ever written again."""
    monkeypatch.setattr(claims, "_LEASE", 60_000)
    mine, _ = two
    assert mine.flights is not None
    tables = mine._writer.tables
    commit = tables.commit

    def away() -> None:
        raise OSError("away")

    assert mine.flights.join(b"key") is True
    monkeypatch.setattr(tables, "commit", away)
    monkeypatch.setattr(failing, "MAX_KEPT", 20)
    for _ in range(30):
        mine._mailbox.post((Transactions.append, record(cost_nano=1), True))
    until(lambda: mine.problems.get("dropped") == 10)
    mine.flights.leave(b"key")
    until(lambda: mine._writer.inbox.qsize() == 0)
    monkeypatch.setattr(tables, "commit", commit)
    until(lambda: ended(mine, b"key") and mine._writer.failing is None, 5)
    assert mine.flights.join(b"another") is True
    assert not ended(mine, b"another")
    mine.flights.leave(b"another")
    until(lambda: ended(mine, b"another"), 5)


@pytest.mark.parametrize("tried", [False, True])
def test_ends_go_on_after_a_note_that_can_never_be_written(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch, tried: bool
) -> None:
    """Where it was only the single operation of a transaction that failed before it, it is written the next time."""
    mine, _ = two
    assert mine.flights is not None
    assert mine.flights.join(b"key") is True
    assert mine.flush(5)
    writer = mine._writer
    transactions = writer._transactions
    place, name = (transactions.tables, "write") if tried else (transactions.core, "tick")
    usual, raised = getattr(place, name), []

    def unfit(*arguments: object) -> object:
        noted = any(kind is Transactions.note for kind, _, _ in writer._doing)
        if noted and (not writer._dropped if tried else len(raised) < 2):  # with others, and alone
            raised.append(noted)
            raise ValueError("no such thing")
        return usual(*arguments)

    monkeypatch.setattr(place, name, unfit)
    mine.flights.leave(b"key")
    until(lambda: mine.problems.get("dropped") == 1 if tried else ended(mine, b"key"), 5)
    until(lambda: mine.flush(5), 5)
    assert (mine.problems.get("dropped", 0), bool(raised)) == (tried, True)
    monkeypatch.setattr(claims, "_LEASE", 60_000)
    assert mine.flights.join(b"another") is True
    assert not ended(mine, b"another")
    mine.flights.leave(b"another")
    until(lambda: ended(mine, b"another"), 5)


def test_an_end_that_is_interrupted_keeps_no_other_from_it(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_LEASE", 60_000)
    mine, _ = two
    assert mine.flights is not None

    def interrupted(_: object) -> bool:
        raise KeyboardInterrupt

    keys = b"key", b"another"
    assert [mine.flights.join(key) for key in keys] == [True] * 2
    with monkeypatch.context() as patch:
        patch.setattr(mine._mailbox, "post", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mine.flights.leave(b"key")
    mine.flights.leave(b"another")
    until(lambda: all(ended(mine, key) for key in keys), 5)


@pytest.mark.parametrize("taken", [True, False])
def test_a_claim_whose_answer_is_lost_is_renewed_and_ends(
    two: tuple[RedisStore, RedisStore], monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """The server may have it: others followed nobody until its lease ended, and asked while its answer came."""
    monkeypatch.setattr(claims, "_LEASE", 60_000)
    mine, his = two
    assert mine.flights is not None
    assert his.flights is not None
    connection = mine.flights._claims._connection  # type: ignore[attr-defined]
    read = connection.read

    def lost(asked: object) -> None:
        if taken:
            read(asked)
        raise StoreUnavailableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "read", lost)
        assert mine.flights.join(b"key") is True
    assert his.flights.join(b"key") is not taken
    mine.flights._claims.renew(set())
    assert mine.flights._claims.followed(b"key") is taken
    mine.flights.leave(b"key")
    assert not mine.flights._claims.claimed(b"key")  # type: ignore[attr-defined]
    if not taken:
        assert mine.flush(5)
        assert not ended(mine, b"key"), "another one's is none of ours"
        his.flights.leave(b"key")
    until(lambda: ended(mine, b"key"), 5)
