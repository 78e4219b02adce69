"""Work that a call leaves behind: done, bounded, and nobody's trouble."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time

import pytest

from dspy_prod.experiments import aside
from dspy_prod.experiments.aside import WAITING, Aside


def test_pieces_are_done_in_order_also_after_the_thread_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that came while the thread was ending is no piece that waits for another one."""
    monkeypatch.setattr(aside, "_IDLE", 0.001)
    done: list[int] = []
    work = Aside[int]("test-aside", done.append)
    for number in range(300):
        work.offer(number)
        time.sleep(0.001)  # about as long as the thread lives without work
    assert work.wait()
    assert done == list(range(300))


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(1), asyncio.CancelledError(), GeneratorExit()])
def test_what_raises_is_logged_and_the_next_piece_is_done(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what would end a thread: nothing was done any more, and nobody was told."""
    done: list[int] = []

    def body(number: int) -> None:
        if number == 0:
            raise error
        done.append(number)

    work = Aside[int]("test-aside", body)
    with caplog.at_level(logging.ERROR, "dspy_prod"):
        work.offer(0)
        work.offer(1)
        assert work.wait()
    assert done == [1]
    assert "test-aside could not do a piece of its work" in caplog.text


def test_what_finds_no_room_is_left_out() -> None:
    held, begun, done = threading.Event(), threading.Event(), list[int]()

    def body(number: int) -> None:
        begun.set()
        held.wait(10)
        done.append(number)

    work = Aside[int]("test-aside", body)
    work.offer(0)
    assert begun.wait(10)
    for number in range(1, WAITING + 6):
        work.offer(number)
    assert work.left_out == 5
    held.set()
    assert work.wait()
    assert done == list(range(WAITING + 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_begins_empty_and_works() -> None:
    held, begun, done = threading.Event(), threading.Event(), list[int]()

    def body(number: int) -> None:
        begun.set()
        held.wait(10)
        done.append(number)

    work = Aside[int]("test-aside", body)
    work.offer(0)
    work.offer(1)
    assert begun.wait(10)
    child = os.fork()
    if child == 0:
        held.set()
        work.offer(7)
        os._exit(0 if work.wait(5) and done == [7] else 1)
    held.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert work.wait()
    assert done == [0, 1]
