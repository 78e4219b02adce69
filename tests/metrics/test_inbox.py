"""What waits for the metrics is taken once for a whole scrape, and for no longer than who scrapes waits."""

from __future__ import annotations

import pytest

from dspy_prod.metrics import inbox
from dspy_prod.metrics.inbox import Inbox


def test_all_counters_of_a_scrape_tell_of_the_same_calls() -> None:
    """Each took what had come while the one before it was read: beside a busy thread, more and more."""
    taken: list[int] = []
    box = Inbox(taken.append)
    box.put(1)
    box.empty("attempts")
    assert taken == [1]
    box.put(2)
    box.empty("cost")
    box.empty("tokens")
    assert taken == [1]
    box.empty("attempts")  # the next scrape
    assert taken == [1, 2]
    box.put(3)
    box.empty("cost")
    assert taken == [1, 2]
    box.empty("cost")  # of a reader that asks for this one alone
    assert taken == [1, 2, 3]


def test_what_takes_too_long_is_left_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "LONGEST", -1.0)
    taken: list[int] = []
    box = Inbox(taken.append)
    for number in range(100):
        box.put(number)
    box.empty("attempts")
    assert taken
    assert len(taken) < 100
    monkeypatch.setattr(inbox, "LONGEST", 60.0)
    box.empty("attempts")
    assert taken == list(range(100))
