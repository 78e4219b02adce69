"""The reaper goes on, whatever what it does comes to."""

from __future__ import annotations

import pytest

from dspy_prod.runtime.reaper import Reaper


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_work_that_fails_in_whatever_way_keeps_none_posted_later_from_being_done(error: type[BaseException]) -> None:
    reaper, done = Reaper(), []

    def fails() -> None:
        raise error

    reaper.start()
    reaper.post(fails)
    reaper.post(lambda: done.append(1))
    assert reaper.flush(5)
    assert done == [1]


def test_what_is_kept_is_done_at_the_end_after_what_was_posted_and_once() -> None:
    reaper, done = Reaper(), []
    reaper.start()
    reaper.keep("first", lambda: done.append("kept"))
    reaper.post(lambda: reaper.keep("second", lambda: done.append("kept on the way")))
    assert reaper.flush(5)
    assert done == []
    assert reaper.finish(5)
    assert done == ["kept", "kept on the way"]
    assert reaper.finish(5)
    assert len(done) == 2
    assert not reaper.take("first")


def test_what_was_taken_back_is_not_done_at_the_end() -> None:
    reaper = Reaper()
    reaper.keep("it", lambda: pytest.fail("it was done"))
    assert reaper.take("it")
    assert not reaper.take("it"), "by one alone"
    assert reaper.finish(0)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_what_fails_at_the_end_keeps_nothing_else_from_being_done(error: type[BaseException]) -> None:
    reaper, done = Reaper(), []

    def fails() -> None:
        raise error

    reaper.keep(1, fails)
    reaper.keep(2, lambda: done.append(2))
    reaper.finish(0)
    assert done == [2]


def test_a_forked_child_leaves_to_its_parent_what_the_parent_keeps() -> None:
    """The seat of a call is the parent's, whose worker may still be sending."""
    reaper = Reaper()
    reaper.keep("it", lambda: pytest.fail("it was done"))
    reaper._after_fork()
    reaper.finish(0)
