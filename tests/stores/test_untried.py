"""A transaction that fails before any of its operations was tried: none of them is to blame, and none is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.stores.base import Settlement
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.stores.support import CENT, Problems, ask, granted, record, settlement, until


@pytest.fixture
def problems() -> Problems:
    return Problems()


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path, problems: Problems) -> Iterator[Any]:
    if request.param == "redis":
        opened: Any = RedisStore(request.getfixturevalue("valkey"), tmp_path.name, on_problem=problems)
    else:
        opened = SqliteStore(str(tmp_path / "state.db"), "n", on_problem=problems)
    opened.append(record())
    assert opened.flush(10)
    yield opened
    threading.Thread(target=opened.close, daemon=True).start()  # a test says whether it can be closed


@pytest.fixture
def fail(store: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Have transactions with such an operation fail so often before it; what each that failed was to do."""

    def prepare(kind: str, times: float = 1, place: str = "tick") -> list[list[str]]:
        writer = store._writer
        core, failed = writer._transactions.core, list[list[str]]()
        usual = getattr(core, place)

        def unfit(*arguments: Any) -> Any:
            doing = [operation.__name__ for operation, _, _ in writer._doing]
            if kind in doing and len(failed) < times:
                failed.append(doing)
                raise ValueError("no such thing")
            return usual(*arguments)

        monkeypatch.setattr(core, place, unfit)
        monkeypatch.setattr(writer, "_anything_due", lambda: True)  # as where a lease or a line is due just then
        return failed

    return prepare


def ended(store: Any) -> bool:
    """Close it; whether that came to an end."""
    closing = threading.Thread(target=store.close, daemon=True)
    closing.start()
    closing.join(10)
    return not closing.is_alive()


def account(store: Any) -> tuple[int, int]:
    """(spent, held) of the account that is asked of."""
    entry = store._writer._transactions.core.accounts.entries["day"]
    return entry.spent, entry.held


def test_a_store_closes_though_its_last_transaction_fails(store: Any, fail: Any, problems: Problems) -> None:
    """Its last operation was dropped like any other, and the thread that closed it waited for ever."""
    failed = fail("stop", times=9)
    assert ended(store)
    assert failed == [["stop"]]
    assert "operation_dropped" not in [name for name, _ in problems]


def test_what_is_drawn_ahead_goes_back_though_the_last_transaction_fails(store: Any, fail: Any) -> None:
    amount = CENT // 1000
    for _ in range(40):
        held = granted(store, ask(amount))
        store.settle(held, settlement(held, amount))
    assert store.flush(10)
    assert store._drawn.shares
    failed = fail("stop")
    assert ended(store)
    assert failed == [["stop"]]
    assert account(store) == (40 * amount, 0)


def test_who_flushes_is_told_though_the_transaction_fails(store: Any, fail: Any) -> None:
    """All that was posted before is written: he was dropped, and told the contrary."""
    failed = fail("flush")
    assert store.flush(10)
    assert failed == [["flush"]]
    until(lambda: store.problems == {}, 10)  # without any call
    assert ended(store)


def test_a_nudge_that_fails_is_not_dropped_and_leaves_no_store_failing(store: Any, fail: Any) -> None:
    failed = fail("nudge")
    store._mailbox.post((Transactions.nudge, None, None))
    until(lambda: failed == [["nudge"]], 10)
    until(lambda: store.problems == {}, 10)
    assert ended(store)


@pytest.mark.parametrize("place", ["tick", "take_turns"])
def test_a_hold_goes_back_though_the_transaction_fails_once(store: Any, fail: Any, place: str) -> None:
    """Before the operation or behind it. It was dropped, and the money held for good."""
    held = granted(store, ask())
    failed = fail("settle", place=place)
    store.settle(held, Settlement(held.id, 0, 0, False, False, None))
    until(lambda: bool(failed), 10)
    until(lambda: store.flush(1), 10)
    assert account(store) == (0, 0)
    assert store.problems == {}
    assert ended(store)


@pytest.mark.parametrize("kind", ["settle", "settle_drawn", "append", "append_served", "append_program", "withdraw"])
def test_no_operation_is_lost_to_what_fails_before_it(store: Any, fail: Any, kind: str, problems: Problems) -> None:
    """However often: with others, then alone. It is done once that is over."""
    done = threading.Event()
    failed = fail(kind, times=5)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Transactions, kind, _told(kind, done))
        operation = (getattr(Transactions, kind), *_arguments(kind))
        with store._writer.io:
            store._mailbox.post((Transactions.sent_late, ask(), 0.0))
            until(lambda: store._writer.inbox.qsize() == 0)
            store._mailbox.post(operation)
            store._mailbox.post((Transactions.sent_late, ask(), 0.0))
        begun = time.monotonic()
        assert done.wait(20), failed
    assert len(failed) == 5
    assert failed[1:] == [[kind]] * 4
    until(lambda: store.flush(1), 10)
    assert time.monotonic() - begun < 10
    assert "dropped" not in store.problems
    assert "operation_dropped" not in [name for name, _ in problems]
    assert ended(store)


def _told(kind: str, done: threading.Event) -> Callable[..., None]:
    def tell(*_: Any) -> None:
        done.set()

    tell.__name__ = kind
    return tell


def _arguments(kind: str) -> tuple[Any, Any]:
    return [record()] if kind == "append_served" else ask(), ask() if kind == "settle_drawn" else None


def test_a_record_is_written_though_its_transaction_fails_with_others_and_alone(store: Any, fail: Any) -> None:
    """Two calls were billed, and one was in the ledger."""
    held = granted(store, ask())
    failed = fail("settle", times=2)
    store.settle(held, settlement(held, CENT))
    store.flush(10)
    until(lambda: len(failed) == 2, 10)
    until(lambda: store.flush(1), 10)
    assert account(store) == (CENT, 0)
    assert sorted(each.cost_nano for each in store.records()) == [0, CENT]
    assert ended(store)


def test_what_fails_each_time_it_is_tried_is_given_up_and_the_rest_goes_on(store: Any, fail: Any) -> None:
    """It is to blame itself: else nothing would ever be written again."""
    failed = fail("append", times=9, place="take_turns")
    store.append(record("bad", cost_nano=1))
    until(lambda: store.problems.get("dropped") == 1, 10)
    assert failed == [["append"]] * 2
    held = granted(store, ask())
    store.settle(held, settlement(held, CENT))
    assert store.flush(10)
    assert account(store) == (CENT, 0)
    assert ended(store)


def test_a_store_closes_though_what_is_kept_fails_untried_for_good(store: Any, fail: Any, problems: Problems) -> None:
    """It is told as lost then, not before."""
    failed = fail("append", times=99)
    store.append(record("kept", cost_nano=1))
    until(lambda: len(failed) > 2, 10)
    assert "dropped" not in store.problems
    assert ended(store)
    assert [details["dropped"] for name, details in problems if name == "operation_dropped"] == [1]
