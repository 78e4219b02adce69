"""A lock for what takes microseconds."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from dspy_prod.runtime import brief
from dspy_prod.runtime.brief import brief as calm
from dspy_prod.runtime.brief import briefly

KINDS: list[Any] = [(calm, threading.Lock), (briefly, threading.RLock)]


@pytest.mark.parametrize(("calm", "kind"), KINDS, ids=["lock", "reentrant"])
def test_one_at_a_time(calm: Any, kind: Any) -> None:
    """Whoever is interrupted between reading and writing would lose what others counted meanwhile."""
    lock, count = kind(), 0

    def work() -> None:
        nonlocal count
        for _ in range(2_000):
            with calm(lock):
                seen = count
                if seen % 100 == 0:
                    time.sleep(0)  # lets others run into the lock
                count = seen + 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert count == 16_000


@pytest.mark.parametrize(("calm", "kind"), KINDS, ids=["lock", "reentrant"])
def test_it_is_given_back_when_something_fails(calm: Any, kind: Any) -> None:
    lock = kind()
    with pytest.raises(ZeroDivisionError), calm(lock):
        raise ZeroDivisionError
    with calm(lock):
        pass


def test_who_has_a_reentrant_one_goes_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a finaliser does that runs on a thread that is in there."""
    lock = threading.RLock()
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited for itself"))
    with briefly(lock), briefly(lock):
        pass
    assert not brief._is_taken(lock)


@pytest.mark.parametrize(("calm", "kind"), KINDS, ids=["lock", "reentrant"])
def test_who_tried_often_enough_queues(monkeypatch: pytest.MonkeyPatch, calm: Any, kind: Any) -> None:
    """A holder that sleeps is waited for without turning round."""
    monkeypatch.setattr(brief, "_TRIES", 0)
    lock, order = kind(), []

    def second() -> None:
        with calm(lock):
            order.append("second")

    with calm(lock):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.05)
        order.append("first")
    thread.join(30)
    assert order == ["first", "second"]
