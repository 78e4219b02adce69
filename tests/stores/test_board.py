"""What every store's board promises: rows changed one after the other, a token that tells of it, a bounded journal."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores import board
from dspy_prod.stores.base import Store
from dspy_prod.stores.board import Change, Row
from tests.stores.conftest import MakeStore
from tests.stores.support import until

NOTE = ("did", "it", "me", "because")


def put(**row: Any) -> Callable[[Row | None, float], Change]:
    return lambda _, now: Change(row, NOTE)


def count(row: Row | None, now: float) -> Change:
    return Change({"count": 1 if row is None else row["count"] + 1})


def change(store: Store, kind: str, key: str, decide: Any) -> Row | None:
    return store.board.change(kind, key, decide).result(20)


def test_a_change_is_there_when_it_is_told(store: Store) -> None:
    """In the rows, whatever stands in the key, and in the journal; the token is another one."""
    before = store.board.token
    assert change(store, "stop", "program|a:b é", put(why="it")) == {"why": "it"}
    assert store.board.token != before
    assert store.board.rows() == {("stop", "program|a:b é"): {"why": "it"}}
    (note,) = store.board.journal(10)
    assert note[1:] == NOTE
    assert abs(note.at - store.board.now()) < 10


def test_a_removed_row_is_gone(store: Store) -> None:
    change(store, "stop", "a", put(why="it"))
    assert change(store, "stop", "a", lambda row, now: Change(None)) is None
    assert store.board.rows() == {}


def test_what_is_left_as_it_is_disturbs_nobody(store: Store) -> None:
    change(store, "stop", "a", put(why="it"))
    store.board.rows()
    settled = store.board.token
    until(lambda: store.board.token == settled)
    assert change(store, "stop", "a", lambda row, now: None) == {"why": "it"}
    assert store.board.token == settled


def test_changes_of_many_threads_and_stores_come_one_after_the_other(make_store: MakeStore) -> None:
    """None is lost: each is decided on what the one before it left."""
    stores = [make_store("one"), make_store("one")]
    if not stores[0].durable:
        stores = stores[:1]

    def work(store: Store) -> None:
        for _ in range(10):
            change(store, "circuit", "a", count)

    threads = [threading.Thread(target=work, args=(store,)) for store in stores for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stores[0].board.rows()["circuit", "a"] == {"count": 10 * len(threads)}


def test_changes_that_are_posted_together_see_each_other(store: Store) -> None:
    posted = [store.board.change("circuit", "a", count) for _ in range(20)]
    assert [each.result(20) for each in posted] == [{"count": number} for number in range(1, 21)]


def test_another_worker_sees_it_by_its_token(make_store: MakeStore) -> None:
    """Also one that has read already."""
    one, other = make_store("one"), make_store("one")
    if not one.durable:
        pytest.skip("a memory store has one worker")
    before = other.board.token
    assert other.board.rows() == {}
    change(one, "stop", "a", put(why="it"))
    until(lambda: other.board.token != before)
    until(lambda: ("stop", "a") in other.board.rows())


def test_namespaces_have_boards_of_their_own(make_store: MakeStore) -> None:
    change(make_store("one"), "stop", "a", put(why="it"))
    assert make_store("two").board.rows() == {}
    assert make_store("two").board.journal(10) == []


def test_a_board_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed circuits go before open ones, those of longest ago first."""
    monkeypatch.setattr(board, "MOST_ROWS", 4)
    for number in range(4):
        change(store, "circuit", str(number), put(state="open" if number == 0 else "closed"))
    change(store, "circuit", "4", put(state="open"))
    change(store, "stop", "5", put(until=None))
    assert sorted(key for _, key in store.board.rows()) == ["0", "2", "3", "4", "5"]


def test_who_decides_wrongly_is_told(store: Store) -> None:
    """And the board goes on."""

    def fail(row: Row | None, now: float) -> Change:
        raise KeyError("missing")

    with pytest.raises(StoreUnavailableError, match="missing"):
        change(store, "stop", "a", fail)
    assert change(store, "stop", "a", put(why="it")) == {"why": "it"}
