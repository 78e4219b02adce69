"""What a process remembers of units: their arms, so that a known one costs a look, and a new one an exposure."""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import partial
from typing import Final

from dspy_prod.errors import StoreUnavailableError
from dspy_prod.experiments.assignment import ELSEWHERE, OVERRIDE, UNKNOWN, Assignment, Design
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.trials import Exposure, Trials

MOST_KNOWN: Final = 50_000
"""Units a process remembers; of others the arm is computed anew, and their exposure posted again, to no effect."""


class Exposing:
    """Assigns units of one experiment, and posts the exposures of those that are taken in. Thread-safe.

    Args:
        experiment: its name in the store.
        design: who gets what.
        trials: the store's, see `Trials`.
        most: units to remember.
        made: when the experiment was, see `Exposure`.

    Example:
        >>> from dspy_prod.stores.memory import MemoryStore
        >>> exposing = Exposing("e", Design("e", ("control", "cot")), MemoryStore().trials)
        >>> exposing("u1") == exposing("u1")
        True
    """

    def __init__(
        self, experiment: str, design: Design, trials: Trials, most: int = MOST_KNOWN, made: float | None = None
    ) -> None:
        self.experiment = experiment
        self.design = design
        self._trials = trials
        self._most = most
        self.made = made
        self._stage = self._full = 0
        self._known: OrderedDict[str, Assignment] = OrderedDict()
        self._after_fork()
        reset_after_fork(self)

    @property
    def stage(self) -> int:
        """The stage in force here."""
        return self._stage

    @property
    def full(self) -> int:
        """The candidates that take no new units here, see `Assignment`."""
        return self._full

    def move(self, stage: int, full: int = 0) -> None:
        """Assign by this stage, and these full candidates, from now on."""
        if (stage, full) == (self._stage, self._full):
            return
        with self._lock:
            kept = {} if stage != self._stage else {unit: one for unit, one in self._known.items() if one.random}
            # Who was exposed in this stage keeps its arm, however full that is now.
            self._known = OrderedDict(kept)
            self._stage, self._full = stage, full

    def __call__(self, unit: str) -> Assignment:
        """What a unit gets; a first exposure is posted.

        Where its candidate is full, and whether the unit was in it before cannot be read, it gets control until it can.

        Raises:
            Exception: what `assign=` raised, or a ConfigError for what it returned.
        """
        with self._lock:
            found = self._known.get(unit)
            if found is not None:
                self._known.move_to_end(unit)
                return found
            stage, full = self._stage, self._full
        try:
            found = self.design.assign(unit, stage, full, partial(self._seen, unit) if full else None)
        except StoreUnavailableError:  # it is not remembered, so that the next call asks again
            return Assignment(self.design.variants[0], 1.0, stage, full, UNKNOWN)
        if found.random or found.how in (OVERRIDE, ELSEWHERE):  # the store notices a second arm within one stage
            at = self._trials.now()
            had = found.variant, found.propensity
            self._trials.expose(Exposure(self.experiment, unit, stage, *had, at, found.full, self.made))
        with self._lock:
            if (stage, full) == (self._stage, self._full):
                self._known[unit] = found
                if len(self._known) > self._most:
                    self._known.popitem(last=False)
        return found

    def _seen(self, unit: str) -> str | None:
        return self._trials.seen(self.experiment, unit)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
