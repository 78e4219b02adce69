"""What all workers have heard, one of them tells."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

import dspy_prod
from dspy_prod.alerts import claiming, sending
from dspy_prod.alerts.claiming import Claims
from dspy_prod.alerts.notices import Notice, notice_of
from dspy_prod.policies.fleet import Fleet, fleet_of
from dspy_prod.stores.memory_board import MemoryBoard
from dspy_prod.stores.sqlite.store import SqliteStore
from dspy_prod.telemetry.events import BUS, Event
from dspy_prod.testing import FakeClock
from tests.alerts.test_webhook import Chat

URL = "https://hooks.example/services/T0/B0/qL3vErYsEcReT9abcdefghij"
OPENED = Notice("breaker_opened", "openai/gpt-4o-mini", "warning", "It is open", 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """The time of a board that all claims of the test share."""
    clock = FakeClock()
    board = MemoryBoard(clock.time)
    monkeypatch.setattr(claiming, "fleets", lambda: [Fleet(board, "a store", True)])
    return clock


@pytest.fixture
def chat() -> Iterator[Chat]:
    chat = Chat()
    yield chat
    chat.stop()
    for each in list(sending._OPEN):
        each.close(0)


def test_the_first_to_hear_of_it_tells_it_until_its_window_ends(clock: FakeClock) -> None:
    """And goes on telling it, with its count; a worker that ended is followed by another."""
    one, other = Claims(URL, 300), Claims(URL, 300)
    assert one.win(OPENED)
    assert not other.win(OPENED)
    clock.advance(299)
    assert one.win(OPENED), "its own window may end a moment before the board says so"
    clock.advance(299)
    assert not other.win(OPENED)
    clock.advance(1)
    assert other.win(OPENED)
    assert not one.win(OPENED)


def test_other_events_and_other_webhooks_are_told(clock: FakeClock) -> None:
    """Of another model, of another kind, to another channel."""
    one, other = Claims(URL, 300), Claims(URL, 300)
    assert one.win(OPENED)
    assert other.win(OPENED._replace(subject="openai/gpt-4o"))
    assert other.win(OPENED._replace(kind="breaker_closed"))
    assert Claims(URL + "k", 300).win(OPENED)


def test_tenants_are_told_apart_and_not_named(clock: FakeClock) -> None:
    """In every worker alike, though the message only says "one tenant"."""

    def stopped(tenant: str) -> tuple[Notice, Event]:
        data = {"scope": "tenant", "value": tenant, "reason": "", "by": "ann", "until": None}
        event = Event("calls_stopped", 0.0, data)
        return notice_of("calls_stopped", event), event

    one, other = Claims(URL, 300), Claims(URL, 300)
    for tenant in ("acme", "globex"):
        for claims in (one, other):
            claims.note(*stopped(tenant))
        assert one.win(stopped(tenant)[0])
        assert not other.win(stopped(tenant)[0])
    [fleet] = claiming.fleets()
    rows = fleet.board.rows()
    assert len(rows) == 2
    assert not any(word in repr(rows) for word in ("acme", "globex", "qL3vErY"))


def test_what_a_store_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Twice is better than not at all."""
    store = SqliteStore(str(tmp_path / "state.db"))
    fleet = fleet_of(store)
    store.close()
    monkeypatch.setattr(claiming, "fleets", lambda: [fleet])
    assert all(Claims(URL, 300).win(OPENED) for _ in range(2))


def test_workers_of_one_store_post_one_message(chat: Chat, tmp_path: Any) -> None:
    """A circuit that four workers share gave four equal messages."""
    store = SqliteStore(str(tmp_path / "state.db"))
    fleet_of(store)
    hooks = [dspy_prod.alerts.webhook(chat.url, events=["breaker_opened"]) for _ in range(4)]
    try:
        for _ in range(3):
            BUS.emit("breaker_opened", time.time(), route="m", cause="503", retry_after=60.0, generation=1)
        assert all(hook.flush(30) for hook in hooks)
        told = [body["text"] for body in chat.wait_for(1)]
        assert len(told) <= 2, "at once, and at the end what happened again"
        assert sum(hook.status().sent for hook in hooks) == len(told)
        assert sum(hook.status().dropped for hook in hooks) == 0
    finally:
        for hook in hooks:
            hook.close(0)
        store.close()
