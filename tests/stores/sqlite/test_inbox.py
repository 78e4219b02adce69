"""What is posted to the writer gathers for a moment, by who waits for it and what it costs."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dspy_prod.stores.durable import inbox
from dspy_prod.stores.durable.inbox import ENOUGH, ENOUGH_FREE, GATHER, GATHER_FREE, Inbox
from dspy_prod.stores.durable.transactions import Operation, Transactions
from tests.stores.support import record

FREE: Operation = (Transactions.append, record(cached=True, outcome="cached"), True)
PAID: Operation = (Transactions.append, record(cost_nano=5), True)
UNKNOWN: Operation = (Transactions.append, record(cost_nano=None), True)
SETTLED: Operation = (Transactions.settle, None, None)
ADMITTED: Operation = (Transactions.admit, None, None)


class Waits(Inbox):
    """Tells how long it would gather."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []
        self._resting = False

    def _ring(self, seconds: float) -> None:
        if seconds:
            self.waits.append(seconds)
        super()._ring(0.0)


@pytest.mark.parametrize(
    ("posted", "waits"),
    [
        ([FREE], [GATHER_FREE]),
        ([FREE, FREE], [GATHER_FREE]),
        ([PAID], [GATHER]),
        ([UNKNOWN], [GATHER]),
        ([SETTLED], [GATHER]),
        ([FREE, SETTLED], [GATHER]),
        ([FREE, ADMITTED], []),
        ([FREE] * ENOUGH, [GATHER_FREE]),
        ([FREE] * ENOUGH_FREE, []),
        ([FREE] * ENOUGH + [SETTLED], []),
    ],
)
def test_what_costs_nothing_gathers_longer(posted: list[Operation], waits: list[float]) -> None:
    """Each transaction costs as much as thirty records, and a few cached answers each made one of their own."""
    box = Waits()
    for operation in posted:
        box.put(operation)
    box.wait(5.0)
    assert box.waits == waits
    box.begin(512)
    for _ in posted:
        box.get_nowait()
    box.waits.clear()
    box.put(FREE)
    box.wait(5.0)
    assert box.waits == [GATHER_FREE], "it goes by what is there now"


def test_what_stays_behind_keeps_its_haste() -> None:
    box = Waits()
    for operation in (FREE, FREE, ADMITTED):
        box.put(operation)
    box.begin(2)
    for _ in range(2):
        box.get_nowait()
    box.wait(5.0)
    assert box.waits == []


@pytest.mark.parametrize("operation", [SETTLED, ADMITTED])
def test_whoever_comes_wakes_who_gathers(monkeypatch: pytest.MonkeyPatch, operation: Operation) -> None:
    """A settlement behind cached answers is written as soon as any other."""
    monkeypatch.setattr(inbox, "GATHER_FREE", 60.0)
    box = Inbox()
    box.put(FREE)
    ended: list[Any] = []
    writer = threading.Thread(target=lambda: (box.wait(60.0), ended.append(box.qsize())))
    writer.start()
    while box._resting:
        pass
    box.put(operation)
    writer.join(30)
    assert ended == [2]
