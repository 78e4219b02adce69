"""What the exporter process was given and has not confirmed; a process that died is replaced, and told again.

Batches are sent on the courier's thread, what became of them is heard on the exporter's reader thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from dspy_prod.privacy.outward import outward
from dspy_prod.tracking.batches import Batch
from dspy_prod.tracking.tally import SETTLED, Tally

if TYPE_CHECKING:
    from dspy_prod.tracking.process import Exporter

_log = logging.getLogger("dspy_prod")

WINDOW: Final = 32
"""Batches that the exporter may have before it has said what became of them."""
STALLED: Final = 5.0
"""Seconds without any progress after which whoever closes something waits no longer."""
RESTART: Final = (1.0, 60.0)
"""Shortest and longest pause in seconds before an exporter process that died is started again."""
_TRIES: Final = 3  # exporter processes that may die of a batch


class Delivery:
    """See the module's docstring.

    Args:
        make: makes an exporter process; told where to send what it says.
        tally: where the next exporter reads what is settled.
        changed: called when it has said something.
        silence: seconds for which an exporter that has reached MLflow may say nothing before it counts as stalled.

    Attributes:
        outbox: batches that it was not given yet.
        exported, lost: traces in MLflow; traces that it refused or that were given up.
        failing: why nothing can be delivered at the moment, None when it can.
        asked, settled: traces to be linked to prompts so far, and those that are, as this exporter process counts.
        closing: the program is ending; nobody is told of failures any more.
    """

    def __init__(
        self,
        make: Callable[[Callable[..., None]], Exporter],
        tally: Tally,
        changed: Callable[[], None],
        silence: float = STALLED,
    ) -> None:
        self._make = make
        self._silence = silence
        self._tally = tally
        self._changed = changed
        self.outbox: list[Batch] = []
        self.exported = self.lost = 0
        self.failing: str | None = None
        self.closing = False
        self.asked = self.settled = 0
        self._unacked: dict[int, Batch] = {}
        self._exporter: Exporter | None = None
        self._ready = False
        self._progressed = time.monotonic()
        self._restart_at = 0.0
        self._restart_pause = RESTART[0]

    @property
    def busy(self) -> bool:
        """Whether something is on its way."""
        return bool(self.outbox or self._unacked or self.settled < self.asked)

    @property
    def full(self) -> bool:
        """Whether so much waits that more is better left where it is."""
        return len(self.outbox) >= WINDOW

    @property
    def oldest(self) -> int | None:
        """Number of the oldest batch that is not delivered."""
        return min([*self._unacked, *(batch.number for batch in self.outbox)], default=None)

    def stalled(self, since: float) -> bool:
        """Whether nothing has moved for long, by the monotonic clock and not looking before `since`."""
        still = time.monotonic() - max(since, self._progressed)
        if self.failing is not None:
            return still > STALLED
        return self._ready and still > self._silence  # it takes seconds to be ready

    def send(self, begin: bool = False) -> None:
        """Give the exporter what it may have; with `begin` start it although there is nothing yet."""
        exporter, now = self._exporter, time.monotonic()
        if exporter is None or not exporter.alive:
            if not (begin or self.busy) or now < self._restart_at:
                return
            self._restart_at = now + self._restart_pause
            self._restart_pause = min(2 * self._restart_pause, RESTART[1])
            self._ready = False
            self.asked = self.settled = 0
            self._tally.numbers[SETTLED] = self.exported + self.lost
            exporter = self._exporter = self._make(self._heard)
            if self.closing:
                exporter.hurry()
            for batch in list(self._unacked.values()):  # the last one died; spans are written by their ids
                batch.tries += 1
                if batch.tries > _TRIES:
                    self._heard(
                        batch.number, batch.traces, "a batch of traces ended the exporter process again and again"
                    )
                else:
                    exporter.send(batch)
        while self.outbox and len(self._unacked) < WINDOW:
            batch = self.outbox.pop(0)
            self._unacked[batch.number] = batch
            exporter.send(batch)

    def hurry(self) -> None:
        """The program is ending."""
        self.closing = True
        if self._exporter is not None:
            self._exporter.hurry()

    def stop(self) -> None:
        """End the exporter process."""
        if self._exporter is not None:
            self._exporter.stop()

    def forget(self) -> None:
        """In a forked child: the exporter process is the parent's."""
        if self._exporter is not None:
            self._exporter.forget()

    def _heard(
        self,
        number: int | None = None,
        lost: int = 0,
        failing: str | None = None,
        *,
        ready: bool = False,
        died: bool = False,
        links: Sequence[int] = (),
        result: Mapping[str, Any] | None = None,
    ) -> None:
        """What the exporter says; on its reader thread.

        Args:
            number: of a batch that is done. lost: how many of its traces MLflow refused.
            failing: why nothing can be delivered at the moment.
            ready: it has reached MLflow for the first time.
            died: the process is gone.
            links: see `linking.Links`: asked, settled.
            result: what became of the batch's messages.
        """
        if links:
            self._progressed = time.monotonic() if links[1] > self.settled else self._progressed
            self.asked, self.settled = links
        failing = None if failing is None else outward(failing)
        if ready:
            self._ready = True
            self._progressed = time.monotonic()
            self._restart_pause = RESTART[0]
        if number is not None:
            batch = self._unacked.pop(number, None)
            if batch is not None:
                self._progressed = time.monotonic()
                self.lost += min(lost, batch.traces)
                self.exported += max(0, batch.traces - lost)
                if batch.done is not None:
                    batch.done(batch, result, failing)
        if failing is not None and self.failing is None and not self.closing:
            _log.warning("MLflow cannot be reached: %s. Calls go on; their traces wait, and are tried again", failing)
        elif failing is None and self.failing is not None and not self.closing:
            _log.info("MLflow can be reached again")
        self.failing = failing
        if died:
            self._ready = False
            self.settled = self.asked
        self._changed()
