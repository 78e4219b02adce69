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

from dspy_prod.runtime.threads import begin
from dspy_prod.telemetry.events import BUS
from dspy_prod.telemetry.tap import TrackingHealth
from dspy_prod.tracking.batches import LINGER
from dspy_prod.tracking.delivery import STALLED, Delivery
from dspy_prod.tracking.messages import Messages
from dspy_prod.tracking.tally import ADMITTED, LEFT_OUT, Tally
from dspy_prod.tracking.traces import Traces

if TYPE_CHECKING:
    from dspy_prod.tracking.process import Exporter

_log = logging.getLogger("dspy_prod")

BREATH: Final = 0.0001
"""Seconds of rest after each item: a busy thread would keep the interpreter's lock from callers, 5 ms at a time."""
_STEP: Final = 0.05
_ITEMS: Final = 4  # posted for a trace, roughly


class _Flush:
    """Wants to know when everything that has ended by now is delivered; `everything`: also what has not ended."""

    def __init__(self, everything: bool) -> None:
        self.done = threading.Event()
        self.everything = everything
        self.upto = 0  # number of the last batch it waits for
        self.links: int | None = None  # and, once that is delivered, how many traces have to be linked


class Courier:
    """See the module's docstring.

    Args:
        traces: what gathers.
        exporter: makes an exporter process; told where to send what it says.
        queue_size: traces that may wait. Each holds its prompts and answers.
        tally: where they are counted.
        silence: see `Delivery`.
    """

    def __init__(
        self,
        traces: Traces,
        exporter: Callable[[Callable[..., None]], Exporter],
        queue_size: int,
        tally: Tally,
        silence: float = STALLED,
    ) -> None:
        self._silence = silence
        self.messages = Messages(traces.content)
        self.traces = traces
        self.tally = tally
        self._make_exporter = exporter
        self._queue_size = queue_size
        self._reset()

    def _reset(self) -> None:
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._refused = 0
        self._many_lost = 1
        self._counting = threading.RLock()  # a finaliser may end a trace of MLflow's in the middle of it
        self._flushes: list[_Flush] = []
        self.live: dict[str, None] = {}  # traces of MLflow's own that calls of ours belong to
        self._acked = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._ended = False
        self.delivery = Delivery(self._make_exporter, self.tally, self._changed, self._silence)

    # -- callers -----------------------------------------------------------------------------------------------------
    def admits(self) -> bool:
        """Whether one more trace may begin; counts it either way."""
        with self._counting:
            if self._waiting() < self._queue_size and not self._ended:
                self.tally.numbers[ADMITTED] += 1
                return True
            self._refused += 1
        self._look_for_losses()
        return False

    def post(self, tell: Callable[..., None], *told: Any) -> None:
        """Have `tell(*told)` called on the courier's thread. Never waits, never raises."""
        self._inbox.put((tell, told))
        if self._thread is None and not self._stopping:
            self.start()

    def tell(self, message: dict[str, Any]) -> None:
        """Have a message about a run, or feedback, written after the traces before it. Never waits, never raises."""
        if self.messages.admits():
            if self._ended:
                self.messages.lose(1, "tracking is off")
            else:
                self.post(self._told, message)
        else:
            self._look_for_losses()

    def _told(self, message: dict[str, Any]) -> None:
        """Feedback on traces that sampling has left out goes nowhere: looking for them would take minutes."""
        if message.get("links"):
            kept = [each for each in message["links"] if not self.traces.left_out(each)]
            message = {**message, "links": kept}
        about = message.get("feedback")
        if about and all(self.traces.left_out(one["trace"]) for one in about):
            self.messages.left_out()
        else:
            self.messages.told(message)

    def begin(self) -> None:
        """Start the exporter process before there is anything to write: it takes seconds to be ready."""
        self.post(self._begin)

    def start(self) -> None:
        """Make sure the thread runs."""
        if not self._lock.acquire(blocking=False):
            return  # it is being started, perhaps by this very thread below a finaliser; what was posted will be read
        try:
            if self._thread is not None or self._stopping:
                return
            self._thread = begin("dspy_prod-tracking", self._run)
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
        return self.tally.numbers[ADMITTED] - self.delivery.exported - self.delivery.lost - self.traces.sampled_out

    def health(self, uri: str, experiment: str) -> TrackingHealth:
        """What became of the traces so far."""
        return TrackingHealth(
            uri=uri,
            experiment=experiment,
            exported=self.delivery.exported,
            waiting=max(0, self._waiting()),
            sampled_out=self.traces.sampled_out,
            lost=self.delivery.lost + self._refused,
            failing=self.delivery.failing,
            messages_waiting=self.messages.waiting,
            messages_lost=self.messages.lost,
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
        since = time.monotonic()
        while not flush.done.wait(_STEP):
            late = time.monotonic() > since + timeout
            if late or self.delivery.stalled(since) or self._thread is None or not self._thread.is_alive():
                return False
        return True

    def close(self, timeout: float) -> int:
        """Ship what there is, within `timeout` seconds, sooner when nothing moves; how many traces are lost by that."""
        delivery, before = self.delivery, self.delivery.lost
        delivery.closing = True
        busy = self._waiting() or not self._inbox.empty() or self._pending or delivery.busy
        if self._thread is not None and busy:
            delivery.hurry()
            self.flush(timeout, everything=True, patiently=False)
        self._stopping = self._ended = True
        self._inbox.put(None)
        self._acked.set()
        delivery.stop()
        if self._thread is not None:
            self._thread.join(1.0)
        self.tally.close()
        left = max(0, self._waiting())
        delivery.lost += left
        self.messages.lose(self.messages.waiting, delivery.failing or "not in time")
        return delivery.lost - before

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
                    if not self.delivery.closing:
                        time.sleep(BREATH)
                self.tally.numbers[LEFT_OUT] = self.traces.sampled_out
                self._ship()
                self.delivery.send()
                if self._flushes:
                    self._flushed()
            except Exception:
                _log.exception("Tracking met an error; it goes on")

    def _ship(self, **how: bool) -> None:
        """Put what is to be written into the outbox, messages after the traces that they may be about."""
        now = time.monotonic()
        self.delivery.outbox += self.traces.ready(now, **how)
        for message in self.traces.links.taken():
            if self.messages.admits():
                self.messages.told(message)
        self.delivery.outbox += self.messages.ready(now, self.traces.number, how.get("at_once", False))

    @property
    def _pending(self) -> bool:
        return self.traces.pending or self.messages.pending

    def _next(self) -> Any:
        """The next item, or None when it is time to look after something else."""
        if self.delivery.full:  # leave the rest in the queue, whose bound is the one that counts
            self._acked.wait(LINGER)
            self._acked.clear()
            return None
        try:
            quiet = not (self._pending or self.delivery.busy)
            return self._inbox.get(timeout=None if quiet else LINGER)
        except Empty:
            return None

    def _begin(self) -> None:
        self.delivery.send(begin=True)

    def _changed(self) -> None:
        """The exporter has said something; on its reader thread."""
        self._look_for_losses()
        self._acked.set()
        self._inbox.put(None)

    def _look_for_losses(self) -> None:
        """Have listeners told, each time that what MLflow lacks has doubled."""
        lost = self.delivery.lost + self._refused + self.messages.lost
        if lost >= self._many_lost:
            self._many_lost = 2 * lost
            self.post(self._tell_losses)

    def _tell_losses(self) -> None:
        lost, messages_lost = self.delivery.lost + self._refused, self.messages.lost
        why = self.delivery.failing or self.messages.refusal
        BUS.emit("tracking_lost", time.time(), lost=lost, messages_lost=messages_lost, error=why)

    def _gather(self, flush: _Flush) -> None:
        self._ship(at_once=True, unfinished=flush.everything)
        flush.upto = self.traces.last_batch
        self._flushes.append(flush)

    def _flushed(self) -> None:
        """Tell those who wait for batches that are all delivered."""
        oldest = self.delivery.oldest
        for flush in [flush for flush in self._flushes if oldest is None or oldest > flush.upto]:
            if flush.links is None:
                flush.links = self.delivery.asked
            if self.delivery.settled >= min(flush.links, self.delivery.asked):  # another process counts anew
                self._flushes.remove(flush)
                flush.done.set()

    def after_fork(self) -> None:
        """In a child: nothing of the parent's is ours to ship."""
        self.traces.clear()
        self.messages.clear()
        self.tally.renew()
        self.delivery.forget()
        self._reset()
