"""What is posted to the writer gathers for a moment, by who waits for it and what it costs."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dspy_prod.stores.durable import inbox
from dspy_prod.stores.durable.inbox import ENOUGH, ENOUGH_FREE, GATHER, GATHER_FREE, Inbox
from dspy_prod.stores.durable.transactions import Operation, Transactions
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import CENT, Problems, Put, ask, granted, record, settlement, until

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


def test_what_waits_for_a_transaction_that_does_not_end_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a disk that hangs nobody says that it fails: callers were slowed down, and memory grew for ever."""
    monkeypatch.setattr(inbox, "MOST", 300)
    monkeypatch.setattr(inbox, "PAUSE", 0.0)
    monkeypatch.setattr(inbox, "PATIENCE", 0.0)
    problems = Problems()
    with contextlib.closing(SqliteStore(str(tmp_path / "s.db"), on_problem=problems)) as store:
        kept = granted(store, ask())
        assert store.flush(10)
        with store._writer.io:
            store.append(record("first"))
            until(lambda: store._writer.inbox.qsize() == 0)  # taken, and it waits for the disk
            for number in range(1_000):
                store.append(record(f"r{number}"))
            assert store.unwritten() == 301
            store.settle(kept, settlement(kept, CENT))
            assert store.problems["dropped"] == 701
            assert problems.names == ["operation_dropped"]
            assert "does not end" in problems[0][1]["error"]
        assert store.flush(10)
        assert store.account("day").held > 0, "what was not settled stays held"
        assert len(store.records()) == 301
        store.append(record("after"))
        assert store.records(id="after")


@pytest.mark.parametrize("given", [300, 301, 1_000])
def test_cached_answers_that_wait_are_bounded_too(monkeypatch: pytest.MonkeyPatch, given: int) -> None:
    monkeypatch.setattr(inbox, "MOST", 300)
    told: list[int] = []
    box = Inbox(lambda: told.append(box.dropped))
    box.open = False
    kind: Any = SimpleNamespace(given=deque(), listed=False)
    for number in range(given):
        box.serve(kind, (float(number), None))
    assert len(kind.given) == 300
    assert box.dropped == given - 300
    assert told == [1][: given - 300], "once a second"


@pytest.mark.parametrize("operation", [ADMITTED, (Transactions.note, None, None), (Transactions.stop, None, None)])
def test_what_somebody_waits_for_is_never_dropped(monkeypatch: pytest.MonkeyPatch, operation: Operation) -> None:
    monkeypatch.setattr(inbox, "MOST", 1)
    box = Inbox()
    for _ in range(3):
        box.put(operation)
    assert (box.qsize(), box.dropped) == (3, 0)


def test_an_answer_that_is_dropped_lets_go_who_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key is another caller's to ask for."""
    monkeypatch.setattr(inbox, "MOST", 1)
    let_go: list[int] = []
    box = Inbox()
    for number in range(2):
        box.put((Transactions.put_answer, None, Put(None, partial(let_go.append, number))))
    assert (box.qsize(), let_go) == (1, [1])
