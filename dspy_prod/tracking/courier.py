"""The courier: one queue, one thread. It gathers what calls did into traces and hands them to the exporter process.

Callers only put references into a queue. If MLflow is slow or gone, the queue fills up to its bound, then new traces
are turned away and counted. Nothing here runs on a caller's thread but `post` and `admits`.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from dspy_prod.records import CallRecord
from dspy_prod.tracking.traces import Batch, Traces

if TYPE_CHECKING:
    from dspy_prod.pipeline.routes import Route
    from dspy_prod.tracking.nodes import LeanNode
    from dspy_prod.tracking.process import Exporter

_log = logging.getLogger("dspy_prod")

LINGER: Final = 0.2
"""Seconds for which ended traces wait for company: MLflow takes many at once for little more than one."""
WINDOW: Final = 16
"""Batches that the exporter may have before it has said what became of them."""
STALLED: Final = 5.0
"""Seconds without any progress after which a closing courier gives up."""
_CLOSING_STEP: Final = 0.05


class Attempted(NamedTuple):
    """An attempt, to be put into its trace."""

    node: LeanNode
    record: CallRecord
    route: Route
    response: Any
    breaker: str | None


class Ended(NamedTuple):
    """A node has ended."""

    node: LeanNode


class Foreign(NamedTuple):
    """A whole trace that MLflow itself recorded."""

    trace: Any


class _Flush(NamedTuple):
    done: threading.Event
    everything: bool


@dataclass(frozen=True)
class Counts:
    """What became of the traces so far.

    Attributes:
        opened: begun, those turned away included.
        exported: in MLflow. sampled_out: left out by sampling. lost: turned away, refused by MLflow, or given up.
        waiting: not yet in MLflow, those of running calls included.
    """

    opened: int
    exported: int
    sampled_out: int
    lost: int
    waiting: int


class Courier:
    """See the module's docstring.

    Args:
        traces: what gathers.
        exporter: makes an exporter process; told where to send what it says.
        queue_size: traces that may wait. Each holds its prompts and answers.
    """

    def __init__(self, traces: Traces, exporter: Callable[[Callable[..., None]], Exporter], queue_size: int) -> None:
        self._traces = traces
        self._make_exporter = exporter
        self._queue_size = queue_size
        self._reset()

    def _reset(self) -> None:
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._admitted = itertools.count(1)
        self._turned_away = itertools.count(1)
        self._opened = self._refused = 0
        self._exported = self._lost = 0
        self._unacked: dict[int, Batch] = {}
        self._outbox: list[Batch] = []
        self._flushes: list[_Flush] = []
        self._progressed = time.monotonic()
        self._acked = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._exporter: Exporter | None = None
        self._stopping = False
        self._ended = False
        self._complained = False
        self.failing: str | None = None

    # -- callers -----------------------------------------------------------------------------------------------------
    def admits(self) -> bool:
        """Whether one more trace may begin; counts it either way."""
        self._opened = next(self._admitted)
        if self._waiting() <= self._queue_size and not self._ended:
            return True
        self._refused = next(self._turned_away)
        return False

    def post(self, item: Any) -> None:
        """Hand something over. Never waits, never raises."""
        self._inbox.put(item)
        if self._thread is None and not self._stopping:
            self.start()

    def start(self) -> None:
        """Make sure the thread runs."""
        with self._lock:
            if self._thread is not None or self._stopping:
                return
            thread = threading.Thread(target=self._run, name="dspy_prod-tracking", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is going down
                return
            self._thread = thread

    def _waiting(self) -> int:
        return self._opened - self._refused - self._exported - self._lost - self._traces.sampled_out

    def counts(self) -> Counts:
        """What became of the traces so far."""
        return Counts(
            self._opened, self._exported, self._traces.sampled_out, self._lost + self._refused, max(0, self._waiting())
        )

    def flush(self, timeout: float, everything: bool = False) -> bool:
        """Wait until what has ended before is in MLflow (or known to be lost); False when that took longer.

        Args:
            everything: also what has not ended.
        """
        if self._thread is None and self._inbox.empty():
            return True
        done = threading.Event()
        self.post(_Flush(done, everything))
        return done.wait(timeout)

    def close(self, timeout: float) -> int:
        """Ship what there is, within `timeout` seconds, sooner when nothing moves; how many traces are lost by that."""
        before = self._lost
        until = time.monotonic() + timeout
        self._progressed = time.monotonic()
        done = threading.Event()
        if self._thread is not None:
            exporter = self._exporter
            if exporter is not None:
                exporter.hurry()
            self.post(_Flush(done, True))
            while not done.wait(_CLOSING_STEP):
                now = time.monotonic()
                if now > until or now - self._progressed > STALLED or not self._thread.is_alive():
                    break
        self._stopping = self._ended = True
        self._inbox.put(None)
        self._acked.set()
        if self._exporter is not None:
            self._exporter.stop()
        if self._thread is not None:
            self._thread.join(1.0)
        left = max(0, self._waiting())
        self._lost += left
        return self._lost - before

    # -- the thread --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        traces = self._traces
        while True:
            item = self._next()
            if item is None and self._stopping:
                return
            try:
                if isinstance(item, _Flush):
                    self._flushes.append(item)
                elif item is not None:
                    traces.add(item)
                now = time.monotonic()
                if self._flushes and self._inbox.empty():
                    self._outbox += traces.ready(now, at_once=True, unfinished=any(f.everything for f in self._flushes))
                else:
                    self._outbox += traces.ready(now)
                self._send()
                if self._flushes and not (self._outbox or self._unacked) and self._inbox.empty():
                    for flush in self._flushes:
                        flush.done.set()
                    self._flushes.clear()
            except Exception:
                _log.exception("Tracking met an error; it goes on")

    def _next(self) -> Any:
        """The next item, or None when it is time to look after something else."""
        if len(self._outbox) >= WINDOW:  # leave the rest in the queue, whose bound is the one that counts
            self._acked.wait(LINGER)
            self._acked.clear()
            return None
        try:
            return self._inbox.get(timeout=LINGER if self._traces.pending or self._flushes else None)
        except Empty:
            return None

    def _send(self) -> None:
        while self._outbox and len(self._unacked) < WINDOW:
            exporter = self._exporter
            if exporter is None or not exporter.alive:
                exporter = self._exporter = self._make_exporter(self._heard)
                for batch in self._unacked.values():  # the last one died; spans are written by their ids
                    exporter.send(batch)
            batch = self._outbox.pop(0)
            self._unacked[batch.number] = batch
            exporter.send(batch)

    # -- the exporter's words ----------------------------------------------------------------------------------------
    def _heard(self, number: int | None = None, lost: int = 0, failing: str | None = None, died: bool = False) -> None:
        """What became of a batch; on the exporter's reader thread.

        Args:
            number: of the batch that is done. lost: how many of its traces MLflow refused.
            failing: why nothing can be delivered at the moment.
            died: the process is gone.
        """
        if number is not None:
            batch = self._unacked.pop(number, None)
            if batch is not None:
                self._progressed = time.monotonic()
                self._lost += min(lost, batch.traces)
                self._exported += max(0, batch.traces - lost)
        if failing is not None and self.failing is None and not self._stopping:
            _log.warning("MLflow cannot be reached: %s. Calls go on; their traces wait, and are tried again", failing)
        elif number is not None and self.failing is not None and failing is None:
            _log.info("MLflow can be reached again")
        if not died:
            self.failing = failing
        elif not self._stopping:
            self.failing = failing or "the exporter process ended"
            if not self._complained:
                self._complained = True
                _log.warning("The process that writes to MLflow ended and is started again: %s", self.failing)
            self._outbox[:0] = []  # nothing is lost: what was not confirmed is sent again
        self._acked.set()
        self._inbox.put(None)

    def after_fork(self) -> None:
        """In a child: nothing of the parent's is ours to ship."""
        self._traces.clear()
        if self._exporter is not None:
            self._exporter.forget()
        self._reset()
