"""What a controller reads: units whose window is over become evidence, and how far it got is saved.

Anybody may go on from what was saved, and gets the same evidence.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Final

from dspy_prod.experiments.assignment import Design
from dspy_prod.experiments.decisions import Decision
from dspy_prod.experiments.declaration import source_of
from dspy_prod.experiments.evidence import Evidence, Exposure
from dspy_prod.experiments.history import History, Look
from dspy_prod.experiments.pairs import SUFFIX, Pairs
from dspy_prod.experiments.sample import Sample, spent_at
from dspy_prod.experiments.shadow import pairs_of
from dspy_prod.experiments.spread import Spread
from dspy_prod.options.experiments import Rollout
from dspy_prod.options.metrics import Metric
from dspy_prod.runtime.forking import reset_after_fork
from dspy_prod.stores.trials import Calls, Matured, Trials

EXPOSED: Final = " (exposed)"
"""Under which it is kept how many exposures were read."""

_log = logging.getLogger("dspy_prod")


class Reading:
    """What is known of one experiment, from what its store has. Thread-safe.

    Args:
        name: the experiment's. trials: the store's. design: who gets what. metrics: what is compared. alpha: as of
            `Evidence`. rollout: the stages; None: a fixed split. sample: whom judges look at.

    Attributes:
        evidence: as of the last `read`; None before it. spread: of latencies.
        pairs: those of a shadow stage; None without one.
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
        self._after_fork()
        reset_after_fork(self)

    def read(self) -> Decision:
        """Take in what has come since, save how far that is, and say what it means."""
        with self._lock:
            try:
                return self._read_on()
            except BaseException:  # what was taken in half-way must not be taken in again
                self.evidence = None
                raise

    def _read_on(self) -> Decision:
        evidence = self._restored()
        new = self._take_in_exposures(evidence)
        for source, metrics in self._sources.items():
            new |= self._take_in(evidence, source, metrics)
        new |= self._take_in_pairs()
        if new:
            pairs = None if self.pairs is None else self.pairs.state()
            told = {"evidence": evidence.to_dict(), "pairs": pairs, "history": self._history.state()}
            state = json.dumps({"read": self._read, **told, "spread": self.spread.state()})
            if self._trials.save(self._name, state, self._revision):
                self._revision += 1
            else:  # somebody else has looked meanwhile: what he read is as good
                self.evidence = None
        tally = self._trials.tally(self._name)
        return evidence.look(tally.mixed, tally.units)

    def history(self) -> tuple[Look, ...]:
        """How the evidence grew until the last `read`."""
        return () if self.evidence is None else self._history.looks(self.evidence)

    def _blank(self, state: Mapping[str, Any] | None = None) -> History:
        return History(len(self._metrics), len(self._design.variants) - 1, state)

    def _restored(self) -> Evidence:
        """The evidence of the last checkpoint: this controller's own, or another one's."""
        saved = self._trials.checkpoint(self._name)
        revision = 0 if saved is None else saved.revision
        if self.evidence is not None and revision == self._revision:
            return self.evidence
        self._read, self._revision, self._history = {}, revision, self._blank()
        self.spread = Spread()
        evidence = None
        if self._rollout is not None and self._rollout.shadow:
            self.pairs = Pairs(self._metrics, self._design.variants[1:])
        if saved is not None:
            state = json.loads(saved.state)
            try:
                evidence = Evidence.from_dict(state["evidence"])
                if self.pairs is not None and state["pairs"] is not None:
                    self.pairs.restore(state["pairs"])
                self._read, self._history = state["read"], self._blank(state.get("history"))
                self.spread = Spread.restored(state.get("spread", {}))
            except ValueError as error:  # of another release: what is stored is read again from the start
                _log.warning("The experiment %s is read anew: %s", self._name, error)
        if evidence is None:
            control, *candidates = self._design.variants
            evidence = Evidence(self._metrics, candidates, control=control, alpha=self._alpha)
        self.evidence = evidence
        return evidence

    def _take_in_exposures(self, evidence: Evidence) -> bool:
        """For the sample ratio: who was exposed is known at once, whatever becomes of him."""
        first = after = self._read.get(EXPOSED, self._read.get("", 0))
        while units := self._trials.exposed(self._name, after):
            for unit in units:
                evidence.exposed(self._exposure(unit))
            after = units[-1].number
        self._read[EXPOSED] = after
        return after > first

    def _take_in(self, evidence: Evidence, source: str | None, metrics: Sequence[Metric]) -> bool:
        """Whether there was anything new."""
        place, after = source or "", self._read.get(source or "", 0)
        first = after
        judged = source in self._sample.shares
        ends = spent_at(place, self._trials.decisions(self._name)) if judged else inf
        while units := self._trials.matured(self._name, source, after):
            for unit in units:
                exposure = self._exposure(unit)
                if source is None and unit.mixed:
                    evidence.crossed()
                drawn = not judged or (unit.at < ends and self._sample.takes(place, unit.unit))
                left_out = unit.mixed or not drawn
                if source is None and not left_out and unit.calls.timed:
                    self.spread.see(unit.arm, unit.calls.latency / unit.calls.timed)
                for metric in () if left_out else metrics:
                    evidence.matured(metric.name, exposure, value_of(metric, unit))
                    self._history.see(evidence, metric.name, unit.number, unit.at)
            after = self._read[place] = units[-1].number
        return after > first

    def _take_in_pairs(self) -> bool:
        """Those of a shadow stage."""
        if self.pairs is None:
            return False
        first = after = self._read.get(SUFFIX, 0)
        while True:
            found, last = pairs_of(self._trials, self._name, after)
            for candidate, pair in found:
                self.pairs.see(candidate, pair)
            if last == after:
                self._read[SUFFIX] = after
                return after > first
            after = last

    def _exposure(self, unit: Matured) -> Exposure:
        shares = self._design.propensities(unit.stage, unit.full)
        return Exposure(unit.arm, dict(zip(self._design.variants, shares, strict=True)), str(unit.stage))

    def _after_fork(self) -> None:
        """A child does not go on with what a thread was in the middle of."""
        self.evidence = None
        self._lock = threading.Lock()


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
    found: Mapping[str, Any] = {
        "error_rate": calls.failed, "fallback_rate": calls.fell_back, "cost": calls.list_nano / 1e9,
    }  # fmt: skip
    return float(found[metric.name]) / calls.calls
