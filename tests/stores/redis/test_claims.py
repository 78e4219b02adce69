"""Claims on a server: an answer or the lead in one step, leases, verdicts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import inf

import pytest

from dspy_prod.stores.base import CachedAnswer
from dspy_prod.stores.redis import claims
from dspy_prod.stores.redis.store import RedisStore
from tests.stores.support import until


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
    assert b"key" not in his.flights._claims
    assert mine.flights.join(b"key") is True
    assert b"key" in mine.flights._claims


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
