"""How an experiment stands, as a process knows it: the stage, which candidates are full, or what everybody gets.

No call waits for the store. When what is known is older than `refresh` seconds, the next call has a thread look, and
goes by what was known; so a stage reaches a process within `refresh` seconds of its next call. While the store cannot
be read, what was known last holds: units keep their arms.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.exposing import Exposing
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.threads import begin
from dspy_prod.stores.trials import PAUSED, RUNNING, Arm, Trial, Trials

REFRESH: Final = 2.0
"""Seconds after which a process looks again."""

_log = logging.getLogger("dspy_prod")


class Standing:
    """Keeps a process's assignments at what the store says.

    Args:
        name: the experiment's. trials: the store's. design: who gets what. exposing: assigns.
        most: units a stage may bring to one candidate, for each stage; None: any number.
        refresh: seconds between two looks.

    Attributes:
        serves: the variant that everybody gets, since nothing is assigned now; None while units are assigned.
        dropped: candidates whose units get control.
        trial: as it was read last.
    """

    def __init__(
        self, name: str, trials: Trials, design: Design, exposing: Exposing, most: tuple[int | None, ...],
        refresh: float = REFRESH,
    ) -> None:  # fmt: skip
        self._name, self._trials, self._design, self._exposing = name, trials, design, exposing
        self._most, self._refresh = most, refresh
        self.serves: str | None = None
        self.dropped: frozenset[str] = frozenset()
        self.trial: Trial | None = None
        self._due = 0.0
        self._after_fork()
        reset_after_fork(self)

    def keep_up(self) -> None:
        """Have a thread look, if it is time to."""
        if time.monotonic() >= self._due and self._looking.acquire(blocking=False):
            try:
                if time.monotonic() < self._due:
                    return
                self._due = time.monotonic() + self._refresh
                begin("dspy_prod-experiment", self._look_quietly)
            finally:
                self._looking.release()

    def look(self) -> Trial | None:
        """Look now.

        Raises:
            StoreUnavailableError: the store cannot be read.
        """
        with self._reading:  # what was read last is what holds
            return self._looked()

    def _looked(self) -> Trial | None:
        trial = self._trials.trial(self._name)
        control = self._design.variants[0]
        declaration = None if trial is None else Declaration.from_json(trial.declaration)
        if trial is None or declaration is None or declaration.salt != self._design.salt:
            # It was removed, perhaps to make another one of this name: that one has nothing to do with this.
            self.trial, self.serves = None, control
            return None
        self.trial, dropped = trial, frozenset(declaration.dropped)
        if trial.state in (RUNNING, PAUSED):
            everybody = (1 << (len(self._design.variants) - 1)) - 1
            counts = [] if trial.state == PAUSED else self._trials.counts(self._name)
            full = everybody if trial.state == PAUSED else self._full(trial.stage, counts, dropped)
            self._exposing.move(trial.stage, full)  # before they are dropped: nobody is exposed who then gets control
            self.dropped, self.serves = dropped, None
        else:
            self.dropped, self.serves = dropped, declaration.serves or control
        return trial

    def _full(self, stage: int, counts: list[Arm], dropped: frozenset[str]) -> int:
        """The candidates that have as many units in this stage as it may bring them."""
        most = self._most[stage]
        gone = sum(1 << place for place, name in enumerate(self._design.variants[1:]) if name in dropped)
        if most is None:
            return gone
        units = dict.fromkeys(self._design.variants, 0)
        for arm in counts:
            if arm.stage == stage:
                units[arm.arm] += arm.units
        return gone | sum(1 << place for place, name in enumerate(self._design.variants[1:]) if units[name] >= most)

    def _look_quietly(self) -> None:
        try:
            self.look()
        except StoreUnavailableError as error:
            _log.warning("The experiment %s goes on as it was, for its store cannot be read: %s", self._name, error)
        except Exception:
            _log.exception("The experiment %s goes on as it was, for what its store has cannot be read", self._name)

    def _after_fork(self) -> None:
        self._looking, self._reading = threading.Lock(), threading.Lock()
