"""What a controller reads: units whose window is over become evidence, and how far it got is saved.

Anybody may go on from what was saved, and gets the same evidence.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from math import inf
from typing import Any, Final

from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.decisions import Decision
from dspy_prod.experiments.declaration import source_of
from dspy_prod.experiments.evidence import Evidence
from dspy_prod.experiments.history import History, Look
from dspy_prod.experiments.moving import Moving, begun, exposure_of
from dspy_prod.experiments.pairs import Pairs, kept_under
from dspy_prod.experiments.sample import Sample, unjudged
from dspy_prod.experiments.shadow import pairs_of
from dspy_prod.experiments.spread import Spread
from dspy_prod.options.experiments import Rollout
from dspy_prod.options.metrics import Metric
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.runtime.reaper import REAPER
from dspy_prod.stores.trials import PART, Calls, Matured, Progress, Trials

EXPOSED: Final = " (exposed)"
"""Under which it is kept how many exposures were read."""

EVERY: Final = 1.0
"""Seconds between two savings of what was read: whoever goes on reads the rest once more, and finds the same."""

PATIENCE: Final = 2.0
"""Seconds that calls which were left are waited for, to be told of."""

COLLISIONS: Final = 10
"""Times that others may save before, in one reading, until it is left to the next one."""

_log = logging.getLogger("dspy_prod")


class Reading:
    """What is known of one experiment, from what its store has. Thread-safe.

    Args:
        name: the experiment's. trials: the store's. design: who gets what. metrics: what is compared. alpha: as of
            `Evidence`. rollout: the stages; None: a fixed split. sample: whom judges look at.

    Attributes:
        evidence: as of the last `read`; None before it, and after one that others have saved before again and again.
        spread: of latencies.
        pairs: those of a shadow stage; None without one.
        impossible: values that their metric cannot have, which were left out, by metric.
    """

    def __init__(
        self, name: str, trials: Trials, design: Design, metrics: Sequence[Metric], alpha: float,
        rollout: Rollout | None, sample: Sample,
    ) -> None:  # fmt: skip
        self._name, self._trials, self._design, self._metrics = name, trials, design, tuple(metrics)
        self._alpha, self._rollout, self._sample = alpha, rollout, sample
        # Also without metrics of calls: it is with them that units are told to be in two arms.
        self._sources: dict[str | None, list[Metric]] = defaultdict(list, {None: []})
        for metric in self._metrics:
            self._sources[source_of(metric)].append(metric)
        self.spread = Spread()
        self.evidence: Evidence | None = None
        self.pairs: Pairs | None = None
        self._history = self._blank()
        self._read: dict[str, int] = {}
        self._revision = -1
        self._saved, self._unsaved = -inf, False
        self.impossible: dict[str, int] = {}
        self._warned: set[str] = set()
        self._after_fork()
        reset_after_fork(self)

    def read(self, progress: Progress | None = None) -> Decision:
        """Take in what has come since, save how far that is, now and then, and say what it means.

        Args:
            progress: of just now: units beyond it are left to the next time; None: the store is asked for all there is.
        """
        REAPER.flush(PATIENCE)  # calls whose callers have left
        with self._lock:
            try:
                return self._read_on(progress)
            except BaseException:  # what was taken in half-way must not be taken in again
                self.evidence = None
                raise

    @property
    def still(self) -> AbstractContextManager[bool]:
        """In it no other thread takes anything in: `evidence` and `spread` stay what they are."""
        return self._lock

    def _read_on(self, progress: Progress | None) -> Decision:
        tally = None if progress is None else progress.tally
        evidence, took, collisions = self._restored(None if progress is None else progress.saved), PART, 0
        while took >= PART:  # a long backlog is saved as it goes: whoever is killed meanwhile has not read for nothing
            took = self._take_in_some(evidence, inf if tally is None else tally.units)
            self._unsaved |= took > 0
            if took >= PART or (self._unsaved and self._trials.now() - self._saved >= EVERY):
                self._save(evidence)
            collisions += self.evidence is None
            if took >= PART or (self.evidence is None and collisions < COLLISIONS):
                evidence, tally, took = self._restored(), None, PART
        tally = self._trials.tally(self._name) if tally is None else tally
        return evidence.look(tally.mixed, tally.units)

    def known(self) -> Decision:
        """What was known when somebody saved last, where nothing can be written now."""
        with self._lock:
            tally = self._trials.tally(self._name)
            return self._restored().look(tally.mixed, tally.units)

    def _take_in_some(self, evidence: Evidence, units: float) -> int:
        """A part of what is new; of how many units, of the source that had the most.

        Args:
            units: there are at least so many; where all of them were read, nobody is asked for more.
        """
        took = [self._take_in_pairs()]
        if self._read.get(EXPOSED, self._read.get("", 0)) < units:
            took.append(self._take_in_exposures(evidence))
        for source, metrics in self._sources.items():
            if self._read.get(source or "", 0) < units:
                took.append(self._take_in(evidence, source, metrics))
        return max(took)

    def _save(self, evidence: Evidence) -> None:
        pairs = None if self.pairs is None else self.pairs.state()
        told = {"read": self._read, "evidence": evidence.to_dict(), "pairs": pairs, "spread": self.spread.state(),
                "impossible": self.impossible}  # fmt: skip
        state = f'{json.dumps(told)[:-1]}, "history": {self._history.state()}}}'
        if self._trials.save(self._name, state, self._revision):
            self._revision += 1
            self._saved, self._unsaved = self._trials.now(), False
        else:  # somebody else has looked meanwhile: what he read is as good, and gone on from
            self.evidence = None

    def history(self) -> tuple[Look, ...]:
        """How the evidence grew until the last `read`."""
        with self._lock:
            return () if self.evidence is None else self._history.looks(self.evidence)

    def _blank(self, state: Mapping[str, Any] | None = None) -> History:
        return History(len(self._metrics), len(self._design.variants) - 1, state)

    def _restored(self, known: int | None = None) -> Evidence:
        """The evidence of the last checkpoint: this controller's own, or another one's.

        Args:
            known: its revision; None: it is asked for.
        """
        if self.evidence is not None and known == self._revision:
            return self.evidence
        saved = self._trials.checkpoint(self._name)
        revision = 0 if saved is None else saved.revision
        if self.evidence is not None and revision == self._revision:
            return self.evidence
        self._read, self._revision, self._history, self._unsaved = {}, revision, self._blank(), False
        self.spread, self.impossible = Spread(), {}
        evidence = None
        if self._rollout is not None and self._rollout.shadow:
            self.pairs = Pairs(self._metrics, self._design.variants[1:])
        if saved is not None:
            state = json.loads(saved.state)
            try:
                history = self._blank(state.get("history"))
                evidence = Evidence.from_dict(state["evidence"])
                if self.pairs is not None and state["pairs"] is not None:
                    self.pairs.restore(state["pairs"])
                self._read, self._history = state["read"], history
                self.spread = Spread.restored(state.get("spread", {}))
                self.impossible = dict(state.get("impossible", {}))
            except ValueError as error:  # of another release: what is stored is read again from the start
                _log.warning("The experiment %s is read anew: %s", self._name, error)
        if evidence is None:
            control, *candidates = self._design.variants
            evidence = Evidence(self._metrics, candidates, control=control, alpha=self._alpha)
        self.evidence = evidence
        return evidence

    def _take_in_exposures(self, evidence: Evidence) -> int:
        """For the sample ratio: who was exposed is known at once, whatever becomes of him."""
        first = after = self._read.get(EXPOSED, self._read.get("", 0))
        for unit in self._trials.exposed(self._name, after, PART):
            evidence.exposed(exposure_of(self._design, unit))
            after = unit.number
        self._read[EXPOSED] = after
        return after - first

    def _take_in(self, evidence: Evidence, source: str | None, metrics: Sequence[Metric]) -> int:
        """Those of one source; how many."""
        place, after = source or "", self._read.get(source or "", 0)
        first = after
        judged = source in self._sample.shares
        if units := self._trials.matured(self._name, source, after, PART):
            moving = Moving(self._design, metrics)
            audit = self._trials.decisions(self._name) if judged or moving.concerns(units) else []
            gaps = unjudged(place, audit) if judged else []
            began = begun(audit)
            for unit in units:
                exposure = moving.exposure(unit, began)
                if source is None and unit.mixed:
                    evidence.crossed()
                drawn = not judged or (
                    self._sample.takes(place, unit.unit) and not any(one <= unit.at < end for one, end in gaps)
                )
                left_out = unit.mixed or not drawn or exposure is None
                if source is None and not left_out and unit.calls.timed:
                    self.spread.see(unit.arm, unit.calls.latency / unit.calls.timed)
                for metric in () if left_out else metrics:
                    if is_unpriced(metric, unit) or exposure is None:
                        continue
                    value = value_of(metric, unit)
                    if self._is_impossible(metric, value):
                        continue
                    evidence.matured(metric.name, exposure, value)
                    self._history.see(evidence, metric.name, unit.number, unit.at)
            after = self._read[place] = units[-1].number
        return after - first

    def _is_impossible(self, metric: Metric, value: float | None) -> bool:
        """Whether a unit has what its metric cannot be: it is left out, for it must not end every look of all."""
        try:
            if value is not None:
                metric.checked(value)
            return False
        except ValueError as error:
            self.impossible[metric.name] = self.impossible.get(metric.name, 0) + 1
            if metric.name not in self._warned:
                self._warned.add(metric.name)
                _log.warning("A unit of the experiment %s is left out of %s: %s", self._name, metric.name, error)
            return True

    def _take_in_pairs(self) -> int:
        """Those of a shadow stage."""
        if self.pairs is None:
            return 0
        place = kept_under(self._name, self._design.salt)
        first = self._read.get(place, 0)
        found, after = pairs_of(self._trials, place, first)
        for candidate, pair in found:
            self.pairs.see(candidate, pair)
        self._read[place] = after
        return after - first

    def _after_fork(self) -> None:
        """A child does not go on with what a thread was in the middle of."""
        self.evidence = None
        self._lock = threading.RLock()  # whoever holds it `still` may make a scorecard, which reads on


def is_unpriced(metric: Metric, unit: Matured) -> bool:
    """Whether a unit has called, and nobody knows what any of its calls cost: it is no unit of costs then, since what
    is not known is not nothing."""
    calls: Calls = unit.calls if metric.per == "unit" else unit.first_call
    return metric.name == "cost" and 0 < calls.calls == calls.unpriced


def value_of(metric: Metric, unit: Matured) -> float | None:
    """What a unit counts with, in the metric's unit."""
    if source_of(metric) is not None:
        mean = unit.values.mean
        return mean if metric.per == "unit" or mean is None else unit.values.first
    calls: Calls = unit.calls if metric.per == "unit" else unit.first_call
    if not calls.calls:
        return None
    if metric.name == "latency":
        return calls.latency / calls.timed if calls.timed else None
    if metric.name == "cost":
        priced = calls.calls - calls.unpriced
        return calls.list_nano / 1e9 / priced if priced else None
    found: Mapping[str, Any] = {
        "error_rate": calls.failed, "fallback_rate": calls.fell_back,
    }  # fmt: skip
    return float(found[metric.name]) / calls.calls
