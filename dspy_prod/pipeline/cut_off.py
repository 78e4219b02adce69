"""What is done where the steps of a call are cut off: by an error, a cancellation, Ctrl-C, or the garbage collector."""

from __future__ import annotations

from collections.abc import Callable

from dspy_prod.pipeline.effects import Steps
from dspy_prod.runtime.reaper import REAPER


def if_cut_off(steps: Steps, leave: Callable[[], None]) -> Steps:
    """The same steps; should they end with an exception, `leave` is called before anybody hears of it.

    It stands around the steps, and is not called by them: Ctrl-C comes just as a function begins, so nothing that had
    to be called then would be certain.

    Args:
        leave: may be called twice. By the reaper where this is perhaps the garbage collector, or where it is
            interrupted.
    """
    try:
        return (yield from steps)
    except BaseException as error:
        try:
            if isinstance(error, GeneratorExit):
                REAPER.post(leave)
            else:
                leave()
        except BaseException:
            REAPER.post(leave)
            raise
        raise
