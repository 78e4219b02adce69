"""One process of an evaluation: has the program and the metric, and is asked example by example."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from dspy_prod.errors import ConfigError
from dspy_prod.policies.run import Run
from dspy_prod.privacy.outward import outward
from dspy_prod.records import CallRecord
from dspy_prod.runtime.processes import this_process
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.scaling.carried import NOTE, Carried, Place
from dspy_prod.scaling.parcel import Parcel, unpacked
from dspy_prod.telemetry.tap import TAP

FLUSH: float = 5.0
"""Seconds for which the end of a worker waits for its stores."""


@dataclass
class Outcome:
    """What came of one example.

    Attributes:
        prediction, score: what program and metric gave; None when either raised.
        error: what was raised. records: of the LM calls.
    """

    prediction: Any = None
    score: Any = None
    error: Exception | None = None
    records: list[CallRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """What every worker is given.

    Attributes:
        program, metric: as for `dspy.Evaluate`. carried: what is in force. places: of every store that has to be
            shared. run: the name of the innermost run. mark: what the note of `run` in each of them says.
    """

    program: Any
    metric: Any
    carried: Carried
    places: tuple[Place, ...]
    run: str
    mark: str


class Worker:
    """An actor; `answer` is called from several threads at once."""

    def __init__(self) -> None:
        self._work: Work | None = None
        self._runs: list[Run] = []
        self._every: weakref.WeakSet[Run] = weakref.WeakSet()
        self._stopped: str | None = None
        self._lock = threading.Lock()

    def ready(self, parcel: bytes) -> str:
        """Take up the work; which process this is.

        Args:
            parcel: a `Work`, packed under "work".

        Raises:
            ConfigError: the program cannot be made here, or a store is not the one that it should be.
        """
        with self._lock:
            if self._work is None:
                try:
                    work: Work = unpacked(parcel)["work"]
                except Exception as error:
                    raise ConfigError(
                        f"evaluate: a worker cannot make the program ({type(error).__name__}: {outward(str(error))}). "
                        "What is not in it must be installed there, and keys must be in the worker's environment"
                    ) from None
                for place in work.places:
                    self._check(place, work)
                work.carried.track()
                self._runs = [terms.opened() for terms in work.carried.runs]
                self._every.update(self._runs)
                self._work = work
        return this_process()

    def answer(self, example: bytes, again: bool) -> bytes | None:
        """An `Outcome`, packed under "outcome"; None when this process has just begun and is not ready.

        Args:
            example: packed under "example". again: it was under way in a worker that died, whose answers are asked for.
        """
        work = self._work
        if work is None:
            return None
        outcome = Outcome()
        try:
            given = unpacked(example)["example"]
            with work.carried.in_force(self._runs_for(again), outcome.records):
                outcome.prediction = work.program(**given.inputs())
                outcome.score = work.metric(given, outcome.prediction)
        except Exception as error:
            outcome.error = error
        return _packed(outcome)

    def stop(self, reason: str) -> None:
        """Send nothing more; what is under way ends by itself."""
        with self._lock:
            self._stopped = reason
            runs = list(self._every)
        for run in runs:
            run.stop(reason)

    def close(self) -> bool:
        """Hand over what is still to be written: Ray ends a process without its exit functions. False: not all was."""
        reaped = REAPER.finish(FLUSH)
        places = () if self._work is None else self._work.places
        written = [place.opened().flush(FLUSH) for place in places]
        tap = TAP.active
        if tap is not None:
            tap.flush()
        return reaped and all(written)

    def _runs_for(self, again: bool) -> list[Run]:
        """The runs of this process; `again`, with every answer that is kept by now, the dead worker's too."""
        if not again or self._work is None:
            return self._runs
        terms = self._work.carried.runs
        runs = [each.opened() if each.keeps else run for each, run in zip(terms, self._runs, strict=True)]
        with self._lock:
            self._every.update(runs)
            stopped = self._stopped
        for run in runs if stopped is not None else ():
            run.stop(stopped or "")
        return runs

    def _check(self, place: Place, work: Work) -> None:
        if place.opened().runs.note(work.run, NOTE) != work.mark:
            raise ConfigError(
                f"evaluate: {place.url} is another store for a worker than here, so that workers would share no budget "
                "and no limit. A file serves one machine: across machines, use a store that all of them reach"
            )


def _packed(outcome: Outcome) -> bytes:
    try:
        data = Parcel({"outcome": outcome}).data
        if outcome.error is not None:
            unpacked(data)  # some errors cannot be made again
        return data
    except Exception as error:
        said = outcome.error if outcome.error is not None else error
        told = RuntimeError(f"{type(said).__name__}: {outward(str(said))}")
        return Parcel({"outcome": Outcome(error=told, records=outcome.records)}).data
