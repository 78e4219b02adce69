"""Calls that have not ended: while one goes on, the store is told so, and waits for its unit.

What a process knows of its own calls nobody else does: a call that takes minutes looks to a controller like one whose
process was killed. So a thread says every few seconds which calls go on; once a process is gone, nobody says so, and
its units count as they stand.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from math import inf
from typing import Final

from dspy_prod.runtime.clock import SYSTEM_CLOCK, moment_on
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.threads import begin
from dspy_prod.stores.trials import GRACE, Trials, Underway

BEAT: Final = 15.0
"""Seconds between two times that it is said; a shorter call is never spoken of."""
LONGEST: Final = 600.0
"""Seconds for which a call without a deadline is waited for: one that goes on longer may never end. A unit whose call
ends later counts as one whose call has failed."""
_IDLE: Final = 4
"""Beats without a call after which the thread ends; the next call begins another one."""

_log = logging.getLogger("dspy_prod")


class Flight:
    """One call.

    Attributes:
        unit: who called. told: it was said that it goes on.
    """

    __slots__ = ("began", "last", "told", "unit")

    def __init__(self, unit: str, began: float, last: float) -> None:
        self.unit, self.began, self.last, self.told = unit, began, last, False


class Flights:
    """The calls of one experiment that go on in this process. Thread-safe; a forked child begins with none.

    Args:
        experiment: its name. trials: where it is told. clock: monotonic seconds, for tests.
        made: when the experiment was, see `Exposure`.
    """

    _lock: threading.Lock
    _thread: threading.Thread | None

    def __init__(
        self, experiment: str, trials: Trials, clock: Callable[[], float] = time.monotonic, made: float | None = None
    ) -> None:
        self._experiment, self._trials, self._clock, self._made = experiment, trials, clock, made
        self._after_fork()
        reset_after_fork(self)

    def flight(self, unit: str, deadline: float = inf) -> Flight:
        """A call that a unit is about to begin: whoever has it can end it, however early he is interrupted.

        Args:
            deadline: on the context's clock; until then it is waited for, else for `LONGEST`.
        """
        now = self._clock()
        most = LONGEST if deadline == inf else max(0.0, moment_on(SYSTEM_CLOCK, deadline) - SYSTEM_CLOCK.monotonic())
        return Flight(unit, now, now + most)

    def begin(self, flight: Flight) -> None:
        """The call begins."""
        with self._lock:
            self._flights[id(flight)] = flight
            self._idle = 0
            if self._thread is None:  # None where none can be begun: the next call tries again
                self._thread = begin("dspy_prod-experiment-calls", self._run)

    def end(self, flight: Flight) -> None:
        """It has ended, if it ever began. What becomes of a long one has from now on the time that others have."""
        with self._lock:
            self._flights.pop(id(flight), None)
        if flight.told:
            self._tell(flight)

    def beat(self) -> int:
        """Say which calls go on; how many were said."""
        now = self._clock()
        with self._lock:
            flights = [each for each in self._flights.values() if now - each.began >= BEAT and now <= each.last]
        for each in flights:
            each.told = True
            self._tell(each)
        return len(flights)

    def _tell(self, flight: Flight) -> None:
        self._trials.underway(Underway(self._experiment, flight.unit, self._trials.now(), GRACE, self._made))

    def _run(self) -> None:
        while True:
            time.sleep(BEAT)
            try:
                self.beat()
            except Exception:
                _log.exception("That calls of the experiment %s go on could not be told", self._experiment)
            with self._lock:
                self._idle = 0 if self._flights else self._idle + 1
                if self._idle >= _IDLE:
                    self._thread = None
                    return

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._flights: dict[int, Flight] = {}
        self._thread = None
        self._idle = 0
