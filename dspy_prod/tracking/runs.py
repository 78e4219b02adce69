"""Runs in MLflow that somebody keeps while his work goes on: told to a process of their own, which alone writes.

What is told are plain messages (see `runs_exporter`); telling never waits. What MLflow has not confirmed is kept and
told again to the next process, up to a bound; then the rest is left out, and the log says so once.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakSet

from dspy_prod.privacy.names import bare_url
from dspy_prod.privacy.outward import outward
from dspy_prod.runtime.forking import Stage, reset_after_fork
from dspy_prod.runtime.living import members
from dspy_prod.tracking.process import Exporter
from dspy_prod.tracking.setup import Place, environment_of

_log = logging.getLogger("dspy_prod")

MOST_WAITING: Final = 4000
"""Messages that MLflow may not have confirmed; further ones are left out."""
_TRIES: Final = 3  # processes that may die of it
_MODULE: Final = "dspy_prod.tracking.runs_exporter"


class Runs:
    """The runs of one piece of work.

    Args:
        place: where they are written.

    Attributes:
        ids: MLflow's id of each run that it has, by its key.
        failing: why nothing can be written at the moment, None when it can.
        lost: messages that were left out or that MLflow refused.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.ids: dict[str, str] = {}
        self.failing: str | None = None
        self.lost = 0
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._unconfirmed: dict[int, Mapping[str, Any]] = {}
        self._told = self._tries = 0
        self._expecting = self._finished = self._given_up = self._warned = False
        self._exporter: Exporter | None = None
        reset_after_fork(self, Stage.THREADS)
        _LIVE.add(self)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Have something written, as `runs_exporter` says. Never waits, never raises."""
        with self._lock:
            if self._given_up or self._finished or len(self._unconfirmed) >= MOST_WAITING:
                self.lost += 1
                return
            self._told += 1
            numbered = {**message, "batch": self._told}
            self._unconfirmed[self._told] = numbered
            if self._exporter is None or not self._exporter.alive:
                self._start()
            elif self._exporter is not None:
                self._exporter.tell(numbered)

    def wait(self, seconds: float, *, patiently: bool = True) -> bool:
        """Wait until all that was told is in MLflow or known to be lost; False when that took longer.

        Args:
            seconds: at most. patiently: also while MLflow cannot be reached.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._settled or (self.failing is not None and not patiently), seconds)
            return self._settled

    def wait_for(self, key: str, seconds: float) -> str | None:
        """MLflow's id of a run, once it has it; None when that took longer or MLflow cannot be reached."""
        with self._changed:
            self._changed.wait_for(lambda: key in self.ids or self._settled or self.failing is not None, seconds)
            return self.ids.get(key)

    @property
    def _settled(self) -> bool:
        return self._given_up or not (self._unconfirmed or self._expecting)

    def expect(self) -> None:
        """The last messages are being made: until `finish`, whoever waits waits for them too."""
        self._expecting = True

    def finish(self) -> None:
        """Nothing more is to come; the process ends once everything is written. Does not wait."""
        with self._changed:
            self._expecting = False
            self._changed.notify_all()
            if self._finished:
                return
            self._finished = True
            if not self._unconfirmed and self._exporter is not None:
                self._exporter.finish()

    def close(self) -> None:
        """The program ends: wait for what is on its way, as long as somebody answers and it may last."""
        if self._exporter is None:
            return
        self._exporter.hurry()
        until = time.monotonic() + self.place.exit_timeout
        while not self.wait(0.1) and time.monotonic() < until:
            if self.failing is not None and not self.wait(1.0):
                break
        with self._lock:
            left, self._given_up = len(self._unconfirmed) + self.lost, True
            self._exporter.finish()
        if left and not self._warned:
            self._warn(f"{left} messages did not reach it")

    def _start(self) -> None:
        self._tries += 1
        if self._tries > _TRIES:
            self._give_up("the process that writes ended again and again")
            return
        place = self.place
        config = {
            "uri": place.uri, "experiment": place.experiment, "patience": place.exit_timeout, "ids": dict(self.ids),
        }  # fmt: skip
        environment = {**environment_of(place.uri), "MPLBACKEND": "agg"}
        self._exporter = Exporter(config, self._heard, environment, module=_MODULE)
        for message in self._unconfirmed.values():
            self._exporter.tell(message)

    def _heard(
        self,
        number: int | None = None,
        lost: int = 0,
        failing: str | None = None,
        *,
        ids: Mapping[str, str] | None = None,
        ready: bool = False,
        died: bool = False,
    ) -> None:
        """What the process says; on its reader thread."""
        with self._changed:
            if number is not None:
                self._unconfirmed.pop(number, None)
                self.lost += lost
            self.ids.update(ids or {})
            failing = None if failing is None else outward(failing)
            if failing is not None and not self._warned and not (died and not self._unconfirmed):
                self._warned = True
                self._warn(failing)
            self.failing = failing
            if died and self._exporter is not None:
                self._exporter.stop()
                if self._unconfirmed and not self._given_up:
                    self._start()
            elif self._finished and not self._unconfirmed and self._exporter is not None:
                self._exporter.finish()
            self._changed.notify_all()

    def _give_up(self, why: str) -> None:
        self._given_up = True
        self.lost += len(self._unconfirmed)
        self._unconfirmed.clear()
        self._warn(why)

    def _warn(self, why: str) -> None:
        _log.warning(
            "MLflow at %s has not all of a run's candidates: %s. The run goes on; its report has them",
            bare_url(self.place.uri), why,
        )  # fmt: skip

    def _after_fork(self) -> None:
        """In a child: the parent's to write."""
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._given_up = True
        self._unconfirmed = {}
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.forget()


_LIVE: Final[WeakSet[Runs]] = WeakSet()


def flush(timeout: float = 30.0) -> bool:
    """Wait until all that was told of runs, or is just being told, is in MLflow or known to be lost.

    Returns:
        False when that took longer than `timeout` seconds.
    """
    until = time.monotonic() + timeout
    return not [runs for runs in members(_LIVE) if not runs.wait(max(0.0, until - time.monotonic()))]


def _close() -> None:
    for runs in members(_LIVE):
        runs.close()


atexit.register(_close)
