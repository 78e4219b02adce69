"""Threads for synchronous engines that cannot be bounded in time from inside."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from dspy.lm15 import Request
from dspy.utils.exceptions import LMLockTimeoutError

from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.threads import begin

T = TypeVar("T")


class Job(Generic[T]):
    """A function running in a worker thread, whose end can be awaited, bounded, or heard of later.

    Attributes:
        heard: whoever waits for it has its end.
    """

    __slots__ = ("_begun", "_done", "_lock", "_report", "error", "heard", "value")

    def __init__(self) -> None:
        self._begun = self.heard = False
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._report: Callable[[T | None, BaseException | None], None] | None = None
        self.value: T | None = None
        self.error: BaseException | None = None

    def run(self, function: Callable[[], T]) -> None:
        with self._lock:
            if self._done.is_set():  # given up before it began
                return
            self._begun = True
        try:
            self.value = function()
        except BaseException as error:
            self.error = error
        with self._lock:
            self._done.set()
            report = self._report
        if report is not None:
            report(self.value, self.error)

    def wait(self, until: float) -> bool:
        """Whether the job ended by `until` (monotonic)."""
        return self._done.wait(None if until == inf else max(0.0, until - time.monotonic()))

    def on_end(self, report: Callable[[T | None, BaseException | None], None]) -> None:
        """Call `report` when the job ends, or now if it has ended. At most one report is made.

        One that has not begun never will: nobody waits for it any more.
        """
        with self._lock:
            if self._begun and not self._done.is_set():
                self._report = report
                return
            self._done.set()
        report(self.value, self.error)


class Threaded:
    """A synchronous engine for one attempt of a task: it runs in a thread of the event loop's.

    Args:
        complete: what the thread does.

    Attributes:
        job: the attempt, which goes on when its task is cancelled. begins: called in the thread as it begins.
    """

    def __init__(self, complete: Callable[[Request], Any]) -> None:
        self._complete = complete
        self.job = Job[Any]()
        self.begins: Callable[[], None] | None = None

    async def complete(self, request: Request) -> Any:
        """What the engine answers."""

        def work() -> Any:
            if self.begins is not None:
                self.begins()
            return self._complete(request)

        job = self.job
        await asyncio.to_thread(job.run, work)
        job.heard = True
        if job.error is not None:
            raise job.error
        return job.value


class Workers:
    """Daemon threads that run jobs; idle ones end by themselves. The number is bounded.

    Args:
        limit: threads at most. When all hang in abandoned attempts, a further job is refused.
        idle: seconds after which an idle worker ends.
    """

    def __init__(self, limit: int = 512, idle: float = 2.0) -> None:
        self._limit = limit
        self._idle_for = idle
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._idle = 0
        self._count = 0

    @property
    def busy(self) -> int:
        """How many are at work, whether anybody waits for them or not."""
        with self._lock:
            return self._count - self._idle

    def submit(self, function: Callable[[], T], job: Job[T] | None = None) -> Job[T]:
        """Run `function` in a worker, with the caller's context variables.

        Args:
            job: what it will be, for who may be interrupted before this returns; None: a new one.

        Raises:
            LMLockTimeoutError: every worker is taken, or this process can start no thread. Nothing was begun.
        """
        job = Job() if job is None else job
        context = contextvars.copy_context()

        def work() -> None:
            job.run(lambda: context.run(function))

        with self._lock:
            if self._idle > 0:
                self._idle -= 1
                start = False
            elif self._count >= self._limit:
                raise LMLockTimeoutError(
                    f"All {self._limit} threads that calls may have at once are taken, also by attempts that were "
                    "given up and still hang: none is left for this one"
                )
            else:
                self._count += 1
                start = True
        if start:
            if begin("dspy_prod-attempt", self._serve, work) is None:
                with self._lock:
                    self._count -= 1
                raise LMLockTimeoutError("This process has as many threads as it may: none could be started for a call")
        else:
            self._jobs.put(work)
        return job

    def _serve(self, work: Callable[[], None] | None) -> None:
        while work is not None:
            work()
            with self._lock:
                self._idle += 1
            work = self._next()

    def _next(self) -> Callable[[], None] | None:
        while True:
            try:
                return self._jobs.get(timeout=self._idle_for)
            except Empty:
                with self._lock:
                    if not self._jobs.empty():
                        continue  # a job was promised to this idle worker meanwhile
                    if self._idle > 0:
                        self._idle -= 1
                        self._count -= 1
                        return None
                # The place among the idle was given to a job that is being put right now.

    def _after_fork(self) -> None:
        self.__init__(self._limit, self._idle_for)  # type: ignore[misc]


WORKERS = Workers()
reset_after_fork(WORKERS)
