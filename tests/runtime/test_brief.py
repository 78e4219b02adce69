"""A lock for what takes microseconds."""

from __future__ import annotations

import threading
import time

import pytest

from dspy_prod.runtime import brief
from dspy_prod.runtime.brief import brief as calm


def test_one_at_a_time() -> None:
    """Whoever is interrupted between reading and writing would lose what others counted meanwhile."""
    lock, count = threading.Lock(), 0

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


def test_it_is_given_back_when_something_fails() -> None:
    lock = threading.Lock()
    with pytest.raises(ZeroDivisionError), calm(lock):
        raise ZeroDivisionError
    with calm(lock):
        pass


def test_who_tried_often_enough_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that sleeps is waited for without turning round."""
    monkeypatch.setattr(brief, "_TRIES", 0)
    lock, order = threading.Lock(), []

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
