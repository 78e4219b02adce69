"""Ctrl-C at a chosen point of a call, so that a test can go through all of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

GENERATORS: Final = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


def interrupted(work: Callable[[], Any], point: int, *files: str, resumed: bool = True) -> tuple[bool, Any]:
    """Do `work`, with Ctrl-C at one of the points where Python looks for it: a function begins, or a built-in ends.

    Args:
        point: which one, from 0, of this thread in `files`.
        files: how the names of the files end that count.
        resumed: also where a generator goes on. Python tells of that one time before its handlers are in force, when
            something is thrown into it: no signal is ever looked for there.

    Returns:
        Whether it was interrupted (else it has fewer points), and what it returned or raised.
    """
    left = point

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(files):
            if event == "call" and not resumed and _has_begun(frame):
                return
            left -= 1
            if left == -1:  # Python takes the profile away
                raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        outcome = work()
    except BaseException as error:
        outcome = error
    finally:
        sys.setprofile(before)
    return left < 0, outcome


def interrupted_at_line(work: Callable[[], Any], point: int, *files: str) -> tuple[bool, Any]:
    """As `interrupted`, at one of the lines of these files, in the order they are come to: also where no signal is
    looked for.
    """
    left = point

    def line(_: FrameType, event: str, __: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return line if left >= 0 else None

    def trace(frame: FrameType, _: str, __: Any) -> Any:
        return line if left >= 0 and frame.f_code.co_filename.endswith(files) else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        outcome = work()
    except BaseException as error:
        outcome = error
    finally:
        sys.settrace(before)
    return left < 0, outcome


def _has_begun(frame: FrameType) -> bool:
    """Whether a generator's frame goes on, rather than begins."""
    code = frame.f_code
    return bool(code.co_flags & GENERATORS) and frame.f_lineno != code.co_firstlineno
