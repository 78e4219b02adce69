"""Changes of one row by two processes at once: each is told what stands there, and nothing that never did."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from threading import Event

import pytest

from dspy_prod.stores.board import Change, Row
from dspy_prod.stores.redis.store import RedisStore

WAIT = 20


def probe(name: str, before: Callable[[], None] = lambda: None) -> Callable[[Row | None, float], Change | None]:
    """Take the only probe of a circuit, if nobody has it."""

    def decide(row: Row | None, now: float) -> Change | None:
        before()
        return Change({"probe": name}) if row is None else None

    return decide


@pytest.mark.parametrize("same", [True, False], ids=["who takes it again", "who only looks"])
def test_what_another_process_has_prevented_is_told_to_nobody(valkey: str, namespace: str, same: bool) -> None:
    """Two callers of a worker ask for a probe in one transaction, while another worker takes it.

    The first would have had it, and the second was told so. Both must hear whose it is.
    """
    with closing(RedisStore(valkey, namespace)) as one, closing(RedisStore(valkey, namespace)) as other:
        begun, asked = Event(), Event()

        def busy(row: Row | None, now: float) -> Change:
            begun.set()
            assert asked.wait(WAIT)
            return Change({})

        taken: list[Future[Row | None]] = []

        def take() -> None:
            """The other worker is quicker, after the row was read here."""
            if not taken:
                taken.append(other.board.change("circuit", "route", probe("other")))
                assert taken[0].result(WAIT) == {"probe": "other"}

        blocked = one.board.change("circuit", "another", busy)
        assert begun.wait(WAIT)
        first = one.board.change("circuit", "route", probe("first", take))
        second = one.board.change("circuit", "route", probe("second") if same else lambda row, now: None)
        asked.set()  # both are in the next transaction
        assert blocked.result(WAIT) == {}
        assert first.result(WAIT) == {"probe": "other"}
        assert second.result(WAIT) == {"probe": "other"}
