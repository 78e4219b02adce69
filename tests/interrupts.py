"""Ctrl-C at a chosen point of a call, so that a test can go through all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def interrupted(work: Callable[[], Any], point: int, *files: str) -> tuple[bool, Any]:
    """Do `work`, with Ctrl-C at one of the points where Python looks for it: a function begins, or a built-in ends.

    Args:
        point: which one, from 0, of this thread in `files`.
        files: how the names of the files end that count.

    Returns:
        Whether it was interrupted (else it has fewer points), and what it returned or raised.
    """
    left = point

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(files):
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
