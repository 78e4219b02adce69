"""The courier: one queue, one thread. It gathers what calls did into traces and hands them to the exporter process.

Callers only put references into a queue. If MLflow is slow or gone, the queue fills up to its bound, then new traces
are turned away and counted. Nothing here runs on a caller's thread but `post` and `admits`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.telemetry.tap import TrackingHealth
from dspy_prod.tracking.tally import ADMITTED, LEFT_OUT, SETTLED, Tally
from dspy_prod.tracking.traces import LINGER, Batch, Traces

if TYPE_CHECKING:
    from dspy_prod.tracking.process import Exporter

_log = logging.getLogger("dspy_prod")

WINDOW: Final = 32
"""Batches that the exporter may have before it has said what became of them."""
STALLED: Final = 5.0
"""Seconds without any progress after which whoever closes something waits no longer."""
BREATH: Final = 0.0001
"""Seconds of rest after each item: a busy thread would keep the interpreter's lock from callers, 5 ms at a time."""
RESTART: Final = (1.0, 60.0)
"""Shortest and longest pause in seconds before an exporter process that died is started again."""
_STEP: Final = 0.05
_ITEMS: Final = 4  # posted for a trace, roughly
_TRIES: Final = 3  # exporter processes that may die of a batch


class _Flush:
    """Wants to know when everything that has ended by now is delivered; `everything`: also what has not ended."""

    def __init__(self, everything: bool) -> None:
        self.done = threading.Event()
        self.everything = everything
        self.upto = 0  # number of the last batch it waits for


class Courier:
    """See the module's docstring.

    Args:
        traces: what gathers.
        exporter: makes an exporter process; told where to send what it says.
        queue_size: traces that may wait. Each holds its prompts and answers.
        tally: where they are counted.
    """

    def __init__(
        self, traces: Traces, exporter: Callable[[Callable[..., None]], Exporter], queue_size: int, tally: Tally
    ) -> None:
        self.traces = traces
        self.tally = tally
        self._make_exporter = exporter
        self._queue_size = queue_size
        self._reset()

    def _reset(self) -> None:
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._exported = self._lost = self._refused = 0
        self._counting = threading.RLock()  # a finaliser may end a trace of MLflow's in the middle of it
        self._unacked: dict[int, Batch] = {}
        self._outbox: list[Batch] = []
        self._flushes: list[_Flush] = []
        self._progressed = time.monotonic()
        self._ready = False
        self._closing = False
        self._restart_at = 0.0
        self._restart_pause = RESTART[0]
        self.live: dict[str, None] = {}  # traces of MLflow's own that calls of ours belong to
        self._acked = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._exporter: Exporter | None = None
        self._stopping = False
        self._ended = False
        self.failing: str | None = None

    # -- callers -----------------------------------------------------------------------------------------------------
    def admits(self) -> bool:
        """Whether one more trace may begin; counts it either way."""
        with self._counting:
            if self._waiting() < self._queue_size and not self._ended:
                self.tally.numbers[ADMITTED] += 1
                return True
            self._refused += 1
            return False

    def post(self, tell: Callable[..., None], *told: Any) -> None:
        """Have `tell(*told)` called on the courier's thread. Never waits, never raises."""
        self._inbox.put((tell, told))
        if self._thread is None and not self._stopping:
            self.start()

    def begin(self) -> None:
        """Start the exporter process before there is anything to write: it takes seconds to be ready."""
        self.post(self._send, True)

    def start(self) -> None:
        """Make sure the thread runs."""
        if not self._lock.acquire(blocking=False):
            return  # it is being started, perhaps by this very thread below a finaliser; what was posted will be read
        try:
            if self._thread is not None or self._stopping:
                return
            thread = threading.Thread(target=self._run, name="dspy_prod-tracking", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the interpreter is going down
                return
            self._thread = thread
        finally:
            self._lock.release()

    def expect(self, trace_id: str) -> None:
        """A call belongs to this trace of MLflow's. Without a bridge nobody would ever take it out again."""
        if self.traces.bridged:
            self.live[trace_id] = None

    def has_room(self) -> bool:
        """Whether more may be posted for a trace that MLflow records; it is counted when it is handed over."""
        return (
            not self._ended and self._inbox.qsize() <= _ITEMS * self._queue_size and self._waiting() <= self._queue_size
        )

    def _waiting(self) -> int:
        return self.tally.numbers[ADMITTED] - self._exported - self._lost - self.traces.sampled_out

    def health(self, uri: str, experiment: str) -> TrackingHealth:
        """What became of the traces so far."""
        return TrackingHealth(
            uri=uri,
            experiment=experiment,
            exported=self._exported,
            waiting=max(0, self._waiting()),
            sampled_out=self.traces.sampled_out,
            lost=self._lost + self._refused,
            failing=self.failing,
        )

    def flush(self, timeout: float, everything: bool = False, patiently: bool = True) -> bool:
        """Wait until what has ended before is in MLflow (or known to be lost); False when that took longer.

        Args:
            everything: also what has not ended. patiently: also while nothing moves.
        """
        if self._thread is None and self._inbox.empty():
            return True
        flush = _Flush(everything)
        self.post(self._gather, flush)
        if patiently:
            return flush.done.wait(timeout)
        self._progressed = time.monotonic()
        until = self._progressed + timeout
        while not flush.done.wait(_STEP):
            now = time.monotonic()
            stalled = (self._ready or self.failing is not None) and now - self._progressed > STALLED
            if now > until or stalled or self._thread is None or not self._thread.is_alive():
                return False
        return True

    def close(self, timeout: float) -> int:
        """Ship what there is, within `timeout` seconds, sooner when nothing moves; how many traces are lost by that."""
        before = self._lost
        self._closing = True
        busy = self._waiting() or not self._inbox.empty() or self.traces.pending or self._outbox or self._unacked
        if self._thread is not None and busy:
            exporter = self._exporter
            if exporter is not None:
                exporter.hurry()
            self.flush(timeout, everything=True, patiently=False)
        self._stopping = self._ended = True
        self._inbox.put(None)
        self._acked.set()
        if self._exporter is not None:
            self._exporter.stop()
        if self._thread is not None:
            self._thread.join(1.0)
        self.tally.close()
        left = max(0, self._waiting())
        self._lost += left
        return self._lost - before

    # -- the thread --------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while True:
            item = self._next()
            if item is None and self._stopping:
                return
            try:
                if item is not None:
                    tell, told = item
                    tell(*told)
                    if not self._closing:
                        time.sleep(BREATH)
                self.tally.numbers[LEFT_OUT] = self.traces.sampled_out
                self._outbox += self.traces.ready(time.monotonic())
                self._send()
                if self._flushes:
                    self._flushed()
            except Exception:
                _log.exception("Tracking met an error; it goes on")

    def _next(self) -> Any:
        """The next item, or None when it is time to look after something else."""
        if len(self._outbox) >= WINDOW:  # leave the rest in the queue, whose bound is the one that counts
            self._acked.wait(LINGER)
            self._acked.clear()
            return None
        try:
            quiet = not (self.traces.pending or self._outbox or self._unacked)
            return self._inbox.get(timeout=None if quiet else LINGER)
        except Empty:
            return None

    def _gather(self, flush: _Flush) -> None:
        self._outbox += self.traces.ready(time.monotonic(), at_once=True, unfinished=flush.everything)
        flush.upto = self.traces.last_batch
        self._flushes.append(flush)

    def _send(self, begin: bool = False) -> None:
        exporter, now = self._exporter, time.monotonic()
        if exporter is None or not exporter.alive:
            if not (begin or self._outbox or self._unacked) or now < self._restart_at:
                return
            self._restart_at = now + self._restart_pause
            self._restart_pause = min(2 * self._restart_pause, RESTART[1])
            self._ready = False
            self.tally.numbers[SETTLED] = self._exported + self._lost
            exporter = self._exporter = self._make_exporter(self._heard)
            if self._closing:
                exporter.hurry()
            for batch in list(self._unacked.values()):  # the last one died; spans are written by their ids
                batch.tries += 1
                if batch.tries > _TRIES:
                    self._heard(
                        batch.number, batch.traces, "a batch of traces ended the exporter process again and again"
                    )
                else:
                    exporter.send(batch)
        while self._outbox and len(self._unacked) < WINDOW:
            batch = self._outbox.pop(0)
            self._unacked[batch.number] = batch
            exporter.send(batch)

    def _flushed(self) -> None:
        """Tell those who wait for batches that are all delivered."""
        open_numbers = [*self._unacked, *(batch.number for batch in self._outbox)]
        oldest = min(open_numbers, default=None)
        for flush in [flush for flush in self._flushes if oldest is None or oldest > flush.upto]:
            self._flushes.remove(flush)
            flush.done.set()

    # -- the exporter's words ----------------------------------------------------------------------------------------
    def _heard(
        self,
        number: int | None = None,
        lost: int = 0,
        failing: str | None = None,
        *,
        ready: bool = False,
        died: bool = False,
    ) -> None:
        """What the exporter says; on its reader thread.

        Args:
            number: of a batch that is done. lost: how many of its traces MLflow refused.
            failing: why nothing can be delivered at the moment.
            ready: it has reached MLflow for the first time.
            died: the process is gone.
        """
        if ready:
            self._ready = True
            self._progressed = time.monotonic()
            self._restart_pause = RESTART[0]
        if number is not None:
            batch = self._unacked.pop(number, None)
            if batch is not None:
                self._progressed = time.monotonic()
                self._lost += min(lost, batch.traces)
                self._exported += max(0, batch.traces - lost)
        if failing is not None and self.failing is None and not self._closing:
            _log.warning("MLflow cannot be reached: %s. Calls go on; their traces wait, and are tried again", failing)
        elif failing is None and self.failing is not None and not self._closing:
            _log.info("MLflow can be reached again")
        self.failing = failing
        if died:
            self._ready = False
        self._acked.set()
        self._inbox.put(None)

    def after_fork(self) -> None:
        """In a child: nothing of the parent's is ours to ship."""
        self.traces.clear()
        self.tally.renew()
        if self._exporter is not None:
            self._exporter.forget()
        self._reset()
