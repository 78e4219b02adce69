"""Ctrl-C that cannot be lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noted(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` on Ctrl-C, before Python raises `KeyboardInterrupt`.

    It is raised wherever the main thread is just then. Where that is a destructor or a callback of the garbage
    collector, Python prints the exception and drops it, and a run would go on as if nobody had pressed a key.

    Args:
        note: called within a signal handler, so it must take no lock.

    Outside of the main thread, and where a program handles Ctrl-C itself, nothing is changed.
    """
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        note()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is handler:
            signal.signal(signal.SIGINT, signal.default_int_handler)
