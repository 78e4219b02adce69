"""What is done at a fork, and in which order."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable

import pytest

from dspy_prod.runtime.forking import Stage, hold_while_forking, reset_after_fork
from dspy_prod.stores.memory import MemoryStore
from tests.logged import logged
from tests.stores.support import ask, check_books, granted, settlement

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def forked(work: Callable[[], None]) -> int:
    """The pid of a child that does `work` and ends with code 0, or with another one if that fails or hangs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(20)
            work()
            code = 0
        except BaseException:
            logging.getLogger("dspy_prod").exception("in the child")
        finally:
            os._exit(code)
    return pid


class Noted:
    """Writes down what it is told."""

    def __init__(self, name: str, told: list[str], fails: bool = False) -> None:
        self.name = name
        self.told = told
        self.fails = fails

    def note(self, what: str) -> None:
        self.told.append(f"{what} {self.name}")
        if self.fails:
            raise ValueError(self.name)

    def before_fork(self) -> None:
        self.note("before")

    def after_fork_in_parent(self) -> None:
        self.note("parent")

    def _after_fork(self) -> None:
        self.note("child")


def test_stages_are_entered_in_order_and_left_in_reverse() -> None:
    """However late a module is imported: who may have to wait long goes first, and a child has its locks first."""
    told: list[str] = []
    kept = [Noted("state", told), Noted("imports", told), Noted("files", told), Noted("more files", told)]
    stages = [Stage.STATE, Stage.IMPORTS, Stage.FILES, Stage.FILES]
    for item, stage in zip(kept, stages, strict=True):
        hold_while_forking(item, stage)
    threads, locks = Noted("threads", told), Noted("locks", told)
    reset_after_fork(threads, Stage.THREADS)
    reset_after_fork(locks)
    entered = ["before imports", "before files", "before more files", "before state"]
    inner = ["state", "more files", "files", "imports"]

    def child() -> None:
        assert told == entered + [f"child {name}" for name in ("locks", *inner, "threads")]

    assert os.waitpid(forked(child), 0)[1] == 0
    assert told == entered + [f"parent {name}" for name in inner]


def test_whoever_is_gone_is_not_told() -> None:
    told: list[str] = []
    hold_while_forking(Noted("gone", told), Stage.STATE)
    reset_after_fork(Noted("gone", told))

    def child() -> None:
        assert told == []

    assert os.waitpid(forked(child), 0)[1] == 0
    assert told == []


def test_one_that_fails_does_not_keep_others_from_being_told(caplog: pytest.LogCaptureFixture) -> None:
    """A lock that stayed taken because another item had failed would hold up the program for ever."""
    told: list[str] = []
    failing, good = Noted("failing", told, fails=True), Noted("good", told)
    hold_while_forking(good, Stage.STATE)
    hold_while_forking(failing, Stage.FILES)

    def child() -> None:
        assert told == ["before failing", "before good", "child good", "child failing"]

    assert os.waitpid(forked(child), 0)[1] == 0
    assert told == ["before failing", "before good", "parent good", "parent failing"]
    assert [record.message.startswith("At a fork") for record in logged(caplog)] == [True, True]


def test_threads_fork_at_once_while_others_work() -> None:
    """Each fork waits for the others, and every child finds the store whole and its lock free."""
    store = MemoryStore("forking", max_records=10_000_000)  # the books are compared with every record
    stop = threading.Event()
    codes: list[int] = []

    def call() -> None:
        reservation = granted(store, ask(1, budget=10**12))
        store.settle(reservation, settlement(reservation, 1))

    def work() -> None:
        while not stop.is_set():
            call()

    def child() -> None:
        assert store.holds() == 0
        check_books(store)
        call()

    def fork() -> None:
        codes.extend([os.waitpid(forked(child), 0)[1] for _ in range(3)])

    workers = [threading.Thread(target=work) for _ in range(2)]
    forking = [threading.Thread(target=fork) for _ in range(3)]
    for thread in (*workers, *forking):
        thread.start()
    for thread in forking:
        thread.join(60)
    stop.set()
    for thread in workers:
        thread.join(10)
    assert codes == [0] * 9
    call()
    check_books(store)
    store.close()
