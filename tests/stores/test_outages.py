"""A store that cannot be written for a while, on SQLite and on Redis: nobody waits in vain, nothing settled is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from math import inf
from pathlib import Path
from typing import Any

import pytest

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.stores.base import REFUSED
from dspy_prod.stores.durable import failing
from dspy_prod.stores.durable.operations import Look
from dspy_prod.stores.durable.served import Kind
from dspy_prod.stores.durable.tables import DoubtError
from dspy_prod.stores.durable.transactions import Transactions
from dspy_prod.stores.durable.writer import MAX_BATCH
from dspy_prod.stores.redis.store import RedisStore
from dspy_prod.stores.sqlite.store import SqliteStore
from tests.interrupts import interrupted, interrupted_at_line
from tests.stores.support import Problems, Put, ask, decided, granted, record, until
from tests.stores.trial_support import expose, made


class Away:
    """What the store writes to: it takes `left` more transactions."""

    def __init__(self, store: Any) -> None:
        self.left: float = inf
        self.tries = 0
        self._begin = store._writer.tables.begin
        store._writer.tables.begin = self.begin

    def begin(self) -> None:
        if self.left <= 0:
            self.tries += 1
            raise OSError("away")
        self.left -= 1
        self._begin()


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
    opened.close()


@pytest.fixture
def away(store: Any) -> Away:
    return Away(store)


def fail(store: Any, away: Away) -> None:
    """From now on nothing can be written, and one record is kept."""
    away.left = 0
    store.append(record(cost_nano=5))
    until(lambda: bool(store._writer._kept) and "failing" in store.problems)


def post(store: Any, count: int) -> None:
    """Records with money in them, in one go."""
    for number in range(count):
        store._mailbox.post((Transactions.append, record(f"r{number:05}", cost_nano=1), True))


def test_what_is_posted_while_nothing_can_be_written_is_taken_at_once(
    store: Any, away: Away, problems: Problems
) -> None:
    """It was one operation a second: closing took as many seconds as there were."""
    fail(store, away)
    post(store, 40)
    begun = time.monotonic()
    with pytest.raises(StoreUnavailableError, match="away"):
        store.waiting()
    assert time.monotonic() - begun < 2.0
    assert store.problems["kept"] == 41
    store.close()
    assert time.monotonic() - begun < 4.0
    assert problems[-1][0] == "operation_dropped"
    assert problems[-1][1]["dropped"] == 41


def test_an_answer_that_comes_while_nothing_can_be_written_lets_go_who_follows(store: Any, away: Away) -> None:
    fail(store, away)
    told = threading.Event()
    post(store, 20)
    store._mailbox.post((Transactions.put_answer, b"key", Put(None, told.set)))
    assert told.wait(3.0)


def test_who_looks_while_nothing_can_be_written_takes_no_room_from_settlements(
    store: Any, away: Away, problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look of a probe or a dashboard was kept among them, until they found no room."""
    monkeypatch.setattr(failing, "MAX_KEPT", 30)
    fail(store, away)
    for _ in range(40):
        assert not store.flush(0.0)
    post(store, 29)
    until(lambda: store.problems["kept"] == 30)
    assert "dropped" not in store.problems
    away.left = inf
    until(lambda: store.flush(1))
    assert len(store.records()) == 31


def test_who_looks_is_told_once_all_is_written_and_forgotten_when_he_goes(store: Any, away: Away) -> None:
    """All: what was kept takes several transactions."""
    fail(store, away)
    post(store, 1_100)
    until(lambda: store.problems["kept"] == 1_101)
    stays, goes = Look(), Look()
    goes.given_up = True
    for look in (stays, goes):
        store._mailbox.post((Transactions.flush, look, None))
    until(lambda: store._writer.inbox.qsize() == 0 and store._writer._looks == [stays])
    away.left = inf
    assert stays.wait(10)
    assert not goes.is_set()
    assert len(store.records()) == 1_102


def test_who_is_taken_as_a_store_fails_again_is_told(store: Any, away: Away, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken just before the next try, they stand behind what is kept; nobody ever told them, not even `close`."""
    writer = store._writer
    fail(store, away)
    post(store, 1_100)
    until(lambda: store.problems["kept"] == 1_101)
    collect = writer._collect

    begun = threading.Event()

    def just_then() -> Any:
        begun.set()
        operations = collect()
        if any(kind is Transactions.admit for kind, _, _ in operations):
            writer._retry_at = 0.0
        return operations

    monkeypatch.setattr(writer, "_collect", just_then)
    monkeypatch.setattr(failing, "_BACK_OFF", (30.0, 30.0))
    store._mailbox.post((Transactions.nudge, None, None))
    assert begun.wait(5)
    waiting, asked, told = ask(), Future[Any](), threading.Event()
    for operation in (
        (Transactions.put_answer, b"key", Put(None, told.set)),
        (Transactions.answer, asked, lambda *_: None),
        (Transactions.admit, waiting, None),
    ):
        store._mailbox.post(operation)
    assert decided(waiting, 5).state == REFUSED
    assert isinstance(asked.exception(5), OSError)
    assert told.wait(5)


def test_what_fails_again_stays_in_order(store: Any, away: Away) -> None:
    fail(store, away)
    post(store, 1_300)
    until(lambda: store.problems["kept"] == 1_301)
    away.left = 1
    until(lambda: away.left == 0 and "failing" in store.problems and store.problems["kept"] == 1_301 - MAX_BATCH)
    tries = away.tries
    until(lambda: away.tries >= tries + 2)
    until(lambda: "failing" in store.problems and store.problems["kept"] == 1_301 - MAX_BATCH)
    assert [kept.id for _, kept, _ in list(store._writer._kept)] == [f"r{n:05}" for n in range(MAX_BATCH - 1, 1_300)]


@pytest.fixture
def unfit(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record "bad" can never be written, which is seen when all that came with it is."""
    tables = store._writer.tables
    write = tables.write

    def written(core: Any, now: float) -> Any:
        if any(each.id == "bad" for each in core.appended):
            raise ValueError("no such record")
        return write(core, now)

    monkeypatch.setattr(tables, "write", written)


@pytest.mark.usefixtures("unfit")
def test_what_can_never_be_written_keeps_nothing_else_from_it_as_the_store_closes(
    store: Any, problems: Problems
) -> None:
    with store._writer.io:
        store.append(record("first"))
        until(lambda: store._writer.inbox.qsize() == 0)
        for name in ("bad", "second", "third"):
            store.append(record(name))
        store._mailbox.post((Transactions.stop, None, None))
    store.close()
    lost = [details for name, details in problems if name == "operation_dropped"]
    assert [details["dropped"] for details in lost] == [1], lost


@pytest.mark.usefixtures("unfit")
def test_a_store_goes_on_after_what_can_never_be_written(store: Any) -> None:
    """Those who were refused with it are not waited for."""
    writer = store._writer
    with writer.io:
        store.append(record("first", cost_nano=1))
        until(lambda: writer.inbox.qsize() == 0)
        for _ in range(5):
            store._mailbox.post((Transactions.admit, ask(), None))
        store.append(record("bad"))
    until(lambda: store.problems.get("dropped") == 1)
    granted(store, ask(accounts=("another",)))
    assert store.flush(5)
    assert writer._alone == 0


def test_a_store_goes_on_after_answers_are_missing_as_it_does_one_by_one_what_failed_together(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who had given up looking was still counted among those: it took nothing any more, and could not be closed."""
    writer, look = store._writer, Look()
    usual_write, usual_commit = writer.tables.write, writer.tables.commit
    left = ["unfit", "missing", "missing"]

    def write(core: Any, now: float) -> Any:
        if left[:1] == ["unfit"] and any(subject is look for _, subject, _ in writer._doing):
            left.pop(0)
            raise ValueError("one odd thing")
        return usual_write(core, now)

    def commit() -> None:
        if left[:1] == ["missing"]:
            left.pop(0)
            raise DoubtError("no answer")
        usual_commit()

    monkeypatch.setattr(writer.tables, "write", write)
    monkeypatch.setattr(writer.tables, "commit", commit)
    with writer.io:
        store.append(record(cost_nano=1))
        until(lambda: writer.inbox.qsize() == 0)
        post(store, 2)
        look.given_up = True
        store._mailbox.post((Transactions.flush, look, None))
    until(lambda: not left and store.problems == {} and not writer._kept)
    store.append(record("later"))
    assert store.flush(5)
    assert {"r00000", "r00001", "later"} <= {each.id for each in store.records()}
    assert writer._alone == 0


def test_a_store_goes_on_after_an_error_of_its_own_as_it_puts_back_what_failed_together(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be done one by one is not kept then, and was waited for."""
    writer, usual = store._writer, store._writer.tables.write
    failed, odd = threading.Event(), threading.Event()

    def write(core: Any, now: float) -> Any:
        if len(writer._doing) > 1 and not failed.is_set():
            failed.set()
            raise ValueError("one odd thing")
        return usual(core, now)

    def put_back(operations: Any) -> None:
        odd.set()
        raise RuntimeError("odd")

    monkeypatch.setattr(writer.tables, "write", write)
    with monkeypatch.context() as patched:
        patched.setattr(writer, "_put_back", put_back)
        with writer.io:
            store.append(record(cost_nano=1))
            until(lambda: writer.inbox.qsize() == 0)
            post(store, 2)
        assert odd.wait(5)
    store.append(record("later"))
    assert store.flush(5)
    assert "later" in {each.id for each in store.records()}


def test_what_is_gathered_while_too_much_waits_is_written_and_so_is_what_comes_later(
    store: Any, away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one operation for all of it was dropped, and no further one was ever posted."""
    made(store)
    monkeypatch.setattr(failing, "MAX_KEPT", 20)
    fail(store, away)
    post(store, 30)
    until(lambda: store.problems.get("dropped") == 11)
    expose(store, "meanwhile")
    until(lambda: store._writer.inbox.qsize() == 0)
    away.left = inf
    until(lambda: store.flush(1))
    expose(store, "later")
    assert store.flush(10)
    assert [store.trials.seen("e", unit) for unit in ("meanwhile", "later")] == ["control"] * 2


@pytest.mark.parametrize("tried", [False, True])
def test_what_is_gathered_goes_on_after_some_of_it_that_can_never_be_written(
    store: Any, problems: Problems, monkeypatch: pytest.MonkeyPatch, tried: bool
) -> None:
    """Whether it was to blame, or the only operation of a transaction that failed before it."""
    made(store)
    assert store.flush(10)
    transactions, failed = store._writer._transactions, threading.Event()
    place, name = (transactions.tables, "write") if tried else (transactions.core, "tick")
    usual = getattr(place, name)

    def unfit(*arguments: Any) -> Any:
        if any(kind is Transactions.note for kind, _, _ in store._writer._doing) and not failed.is_set():
            failed.set()
            raise ValueError("no such thing")
        return usual(*arguments)

    monkeypatch.setattr(place, name, unfit)
    expose(store, "unfit")
    assert failed.wait(5)
    if tried:
        until(lambda: store.problems.get("dropped") == 1)
    expose(store, "later")
    assert store.flush(10)
    assert store.problems.get("dropped", 0) == int(tried)  # what is written the next time is not lost
    assert [store.trials.seen("e", unit) for unit in ("unfit", "later")] == [None if tried else "control", "control"]
    assert store.trials._post.dropped == int(tried)


def test_who_is_interrupted_as_he_posts_keeps_nobody_else_from_it(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made(store)

    def cut_off(_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store._mailbox, "post", cut_off)
        with pytest.raises(KeyboardInterrupt):
            expose(store, "u")
    expose(store, "later")
    assert store.flush(10)
    assert [store.trials.seen("e", unit) for unit in ("u", "later")] == ["control"] * 2


def test_wherever_ctrl_c_comes_as_something_is_posted_nobody_else_is_kept_from_it(store: Any) -> None:
    """As its batch was made, nothing was ever written again: all that came later counted on a batch that there was."""
    made(store)
    for point in range(99):
        came, _ = interrupted(lambda: expose(store, "u"), point, "durable/posting.py")
        expose(store, f"u{point}")
        assert store.flush(10)
        assert store.trials.seen("e", f"u{point}") == "control", point
        if not came:
            break
    assert 5 < point < 98


def test_wherever_ctrl_c_comes_as_a_cached_answer_is_noted_later_ones_are(store: Any) -> None:
    kind, at = Kind(record("like", cached=True), store._mailbox), 0.0
    for point in range(99):
        came, _ = interrupted_at_line(lambda: kind.served(0.0), point, "durable/served.py", "durable/inbox.py")
        at += 1.0
        kind.served(at)
        assert store.flush(10)
        assert at in {each.started_at for each in store.records()}, point
        if not came:
            break
    assert 5 < point < 98


def full(store: Any, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """From now on a transaction fails as on a full disk, at its end; the event is set as one does."""
    failed = threading.Event()

    def commit() -> None:
        failed.set()
        raise OSError("full")

    monkeypatch.setattr(store._writer.tables, "commit", commit)
    return failed


def test_what_is_gathered_while_each_transaction_fails_at_its_end_is_bounded_in_all(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each try took what waited into a batch of its own, and there was room for as much again."""
    made(store)
    assert store.flush(10)
    posting = store.trials._post
    monkeypatch.setattr(posting, "_most", 20)
    monkeypatch.setattr(failing, "_BACK_OFF", (0.0, 0.0))
    with monkeypatch.context() as patched:
        failed = full(store, patched)
        for turn in range(5):
            for number in range(8):
                expose(store, f"u{8 * turn + number}")
            failed.clear()
            assert failed.wait(5)
            until(lambda: store._writer.inbox.qsize() == 0)
        assert (posting.posted, posting.dropped) == (20, 20)
        monkeypatch.setattr(failing, "_BACK_OFF", (0.05, 1.0))
    until(lambda: store.flush(1))
    assert (store.trials.tally("e").units, store.trials.tally("e").unkept) == (20, 20)
    for number in range(20):  # there is as much room as before
        expose(store, f"later {number}")
    assert store.flush(10)
    assert (store.trials.tally("e").units, posting.dropped) == (40, 20)


@pytest.mark.parametrize("tried", [True, False])
def test_what_is_gathered_and_cannot_be_written_as_a_store_closes_is_told(
    store: Any,
    away: Away,
    problems: Problems,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tried: bool,
) -> None:
    """As settlements and records are; in a batch, or waiting for one that never was tried."""
    made(store)
    assert store.flush(10)
    away.left = inf if tried else 0
    if tried:
        failed = full(store, monkeypatch)
        for number in range(3):
            expose(store, f"u{number}")
        assert failed.wait(5)
    for number in range(4):
        expose(store, f"v{number}")
    store.close()
    count = 7 if tried else 4
    assert store.trials._post.dropped == count
    assert [details["dropped"] for name, details in problems if name == "operation_dropped"] == [count]
    assert "exposures, calls and outcomes of experiments were not written" in caplog.text


def test_what_is_gathered_and_comes_as_the_writer_ends_is_counted(store: Any) -> None:
    made(store)
    store.close()
    mailbox, posting = store._mailbox, store.trials._post
    mailbox.closed = mailbox.writer.ended = False  # the last moment in which it is taken
    expose(store, "u")
    assert posting.dropped == 0
    mailbox.closed = mailbox.writer.ended = True
    mailbox.refuse_stragglers()
    assert posting.dropped == 1


def test_who_waits_for_what_is_gathered_is_not_told_before_it_is_written(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operation that was to write it was done with, untried, because of an error of the transaction before it."""
    made(store)
    assert store.flush(10)
    core, failed = store._writer._transactions.core, threading.Event()
    tick = core.tick

    def unfit(now: float) -> None:
        doing = [kind for kind, _, _ in store._writer._doing]
        if doing == [Transactions.note] and not failed.is_set():
            failed.set()
            raise ValueError("no such thing")
        tick(now)

    monkeypatch.setattr(core, "tick", unfit)
    with store._writer.io:
        expose(store, "u")
    assert failed.wait(5)
    assert store.flush(10)
    assert store.trials.seen("e", "u") == "control"


@pytest.fixture
def untried(store: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """So often something fails before what is gathered."""
    core, left = store._writer._transactions.core, [0.0]
    tick = core.tick

    def unfit(now: float) -> None:
        if left[0] > 0 and any(kind is Transactions.note for kind, _, _ in store._writer._doing):
            left[0] -= 1
            raise ValueError("no such thing")
        tick(now)

    monkeypatch.setattr(core, "tick", unfit)
    return left


@pytest.mark.parametrize("tried", [False, True])
def test_what_is_gathered_waits_while_something_fails_before_it(
    store: Any, untried: list[float], problems: Problems, monkeypatch: pytest.MonkeyPatch, tried: bool
) -> None:
    """All that waited was given up at the second time, where records wait; or at the first, if it had been tried."""
    made(store)
    assert store.flush(10)
    with monkeypatch.context() as patched:
        failed = full(store, patched)
        if tried:
            expose(store, "u")
            assert failed.wait(5)
        with store._writer.io:
            untried[0] = 4
    expose(store, "u")
    until(lambda: untried[0] == 0, 10)
    until(lambda: store.flush(1), 10)
    assert store.trials.seen("e", "u") == "control"
    assert store.trials._post.dropped == 0
    assert "operation_dropped" not in [name for name, _ in problems]


def test_what_is_gathered_and_fails_untried_for_good_is_told_as_lost_when_the_store_closes(
    store: Any, untried: list[float], problems: Problems
) -> None:
    made(store)
    assert store.flush(10)
    untried[0] = inf
    expose(store, "u")
    until(lambda: store.problems.get("kept") == 1, 10)
    closing = threading.Thread(target=store.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
    assert store.trials._post.dropped == 1
    assert [details["dropped"] for name, details in problems if name == "operation_dropped"] == [1]
