"""The pulse of a run: a thread that looks at the clock, and tells those who watch."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from dspy_prod.optimize.candidates import Progress, Watcher
from dspy_prod.runtime.threads import begin

_log = logging.getLogger("dspy_prod")

_EVERY: Final = 0.25
"""Seconds between two beats."""


class Pulse:
    """Beats while a run goes on. A signal handler may wake it, whatever the thread that it interrupts is about.

    Args:
        progress: tells how far the run is. watchers: are told; what they raise is logged.
        beat: called at each beat.
    """

    def __init__(self, progress: Callable[[], Progress], watchers: Sequence[Watcher], beat: Callable[[], None]) -> None:
        self._progress, self._watchers, self._beat = progress, list(watchers), beat
        self._all = tuple(watchers)
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()  # an Event locks in Python, where handlers come in
        self._beats = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def wake(self) -> None:
        """Beat now: something happened."""
        self._tell_thread()
        if self._thread is None:
            self._start()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat until the end of the block; where no thread can be begun, from when something happens and one can."""
        self.tell("begin")
        self._beats = True
        self._start()
        try:
            yield
        finally:
            with self._starting:
                thread = self._thread
                self._beats, self._thread = False, None
            self._tell_thread()
            if thread is not None:
                thread.join(5.0)

    def _tell_thread(self) -> None:
        if self._news.empty():
            self._news.put(None)

    def _start(self) -> None:
        if not self._starting.acquire(blocking=False):
            return  # somebody starts it, perhaps the very thread that a handler of a signal has interrupted
        try:
            if self._beats and self._thread is None:
                self._thread = begin("dspy_prod-optimization", self._go)
        finally:
            self._starting.release()

    def _go(self) -> None:
        while self._beats:
            with suppress(queue.Empty):
                self._news.get(timeout=_EVERY)
            try:
                self._beat()
            except Exception:
                _log.exception("The pulse of an optimization failed once; it goes on")
            self.tell("update")

    def tell(self, what: str, *more: Any) -> None:
        """Tell every watcher; one that raises is left out from then on, but for the end."""
        if not self._all:
            return
        try:
            progress = self._progress()
        except Exception:
            _log.exception("How far an optimization is could not be told; it goes on")
            return
        for watcher in self._all if what == "end" else tuple(self._watchers):
            try:
                getattr(watcher, what)(progress, *more)
            except Exception:
                if watcher in self._watchers:
                    self._watchers.remove(watcher)
                _log.exception("%s of an optimization failed and is left out; the run goes on", type(watcher).__name__)
