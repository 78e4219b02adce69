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
