"""All evidence of an experiment, in running sums: units come in, decisions come out, and a checkpoint goes to a store.

Nothing here reads a clock or a store. Whoever does tells each unit twice: when it is exposed, for the sample ratio at
once; and for each metric when that metric's window is over, in order of exposure. A look costs the same however many
units there were. What is told in the same order again gives the same evidence, bit by bit: a controller that lost its
checkpoint replays what is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from dspy_prod.errors import ConfigError
from dspy_prod.experiments.alphas import alphas
from dspy_prod.experiments.decisions import CandidateDecision, Decision, MetricEvidence, about, decided, weighed
from dspy_prod.experiments.intervals import Interval, Sums, interval
from dspy_prod.experiments.kinds import compared
from dspy_prod.experiments.neighbours import Neighbours
from dspy_prod.experiments.trust import SampleRatio
from dspy_prod.options.metrics import Metric

VERSION: Final = 2


@dataclass(frozen=True)
class Exposure:
    """A unit's first exposure.

    Attributes:
        arm: the variant it had.
        propensities: how probable each variant was for it at that moment; one that is left out was impossible.
        stage: of the rollout.
        tenant: whose unit it is.
    """

    arm: str
    propensities: Mapping[str, float]
    stage: str = ""
    tenant: str | None = None

    def among(self, control: str, candidate: str) -> float:
        """The probability of the candidate among the two."""
        ours, theirs = self.propensities.get(candidate, 0.0), self.propensities.get(control, 0.0)
        return ours / (ours + theirs)


@dataclass(frozen=True)
class Outcome:
    """What became of a unit on a metric, once the metric's window is over.

    Attributes:
        metric: by name.
        exposure: the unit's.
        value: None if nothing was recorded.
    """

    metric: str
    exposure: Exposure = field(repr=False)
    value: float | None


class Evidence:
    """What is known of the candidates of an experiment. Not for several threads at once.

    Args:
        metrics: what they are compared by.
        candidates: names of the variants beside control, 1 to 8.
        control: its name.
        alpha: how probable a wrong decision may be, at all looks together.

    Raises:
        ConfigError: names are not unique, there are too many candidates, no metrics, or `alpha` is no probability.

    Example:
        >>> evidence = Evidence([Metric("resolved")], ["cot"])
        >>> shares = {"control": 0.5, "cot": 0.5}
        >>> for place in range(200):
        ...     exposure = Exposure("cot" if place % 2 else "control", shares)
        ...     evidence.exposed(exposure)
        ...     evidence.matured("resolved", exposure, 1.0 if place % 2 else 0.0)
        >>> evidence.look().verdict
        'promote'
    """

    def __init__(
        self, metrics: Sequence[Metric], candidates: Sequence[str], *, control: str = "control", alpha: float = 0.05
    ) -> None:
        names, arms = [metric.name for metric in metrics], [control, *candidates]
        for what, given in (("metrics", names), ("variants", arms)):
            if len(set(given)) != len(given):
                raise ConfigError(f"{what} must have names of their own, not {', '.join(map(repr, given))}")
        self.metrics, self.control, self.candidates, self.alpha = tuple(metrics), control, tuple(candidates), alpha
        self._alphas = alphas(self.metrics, len(self.candidates), alpha)
        self._ratio = SampleRatio()
        self._comparisons = {
            name: {metric.name: compared(metric) for metric in self.metrics} for name in self.candidates
        }
        self._neighbours = {
            name: {metric.name: Neighbours() for metric in self.metrics if metric.some} for name in self.candidates
        }
        # metric, stage, arm
        self._sums: dict[str, dict[str, dict[str, Sums]]] = {name: {} for name in names}
        self._by_name = {metric.name: metric for metric in self.metrics}
        self._found: dict[str, CandidateDecision] = {}  # of candidates of which nothing has come since the last look

    def exposed(self, exposure: Exposure) -> None:
        """A unit met its variant for the first time. Tell it at once; units of a holdout are not told.

        Raises:
            ValueError: the arm is none of the variants.
        """
        self._ratio.see(self._known(exposure).arm, exposure.propensities, exposure.stage)

    def crossed(self) -> None:
        """A unit that was exposed was seen in another arm within its stage. Tell each unit once, and no outcome of it
        from then on."""
        self._ratio.cross()

    def matured(self, metric: str, exposure: Exposure, value: float | None) -> None:
        """A unit's window is over. Tell units of a metric in order of exposure.

        Args:
            metric: by name.
            exposure: the unit's first one.
            value: its outcome; None if nothing was recorded.

        Raises:
            ValueError: there is no such metric or variant, or the metric cannot have that value.
        """
        if metric not in self._by_name:
            raise ValueError(f"{metric!r} is no metric of this experiment, which has {', '.join(self._by_name)}")
        arm, options = self._known(exposure).arm, self._by_name[metric]
        if exposure.propensities.get(arm, 0.0) <= 0.0:
            return  # an override: it was not drawn, and is counted as crossed
        if value is None and options.missing != "exclude":
            value = float(options.missing)
        if value is not None:
            value = options.checked(value)
        for name in self.candidates if arm == self.control else (arm,):
            self._found.pop(name, None)
            comparison, share = self._comparisons[name][metric], exposure.among(self.control, name)
            neighbours = self._neighbours[name].get(metric)
            if neighbours is None:
                comparison.counted(arm == name, share, value, exposure.tenant)
            else:
                for ours, probable, amount in neighbours.of(arm == name, share, value):
                    comparison.counted(ours, probable, amount, exposure.tenant)
        if value is not None:
            arms = self._sums[metric].setdefault(exposure.stage, {})
            arms.setdefault(arm, Sums()).see(value)

    def replay(self, exposures: Iterable[Exposure], outcomes: Iterable[Outcome]) -> None:
        """Tell all that is stored, each in order of exposure, to evidence that has seen nothing yet."""
        for exposure in exposures:
            self.exposed(exposure)
        for outcome in outcomes:
            self.matured(outcome.metric, outcome.exposure, outcome.value)

    def look(self, mixed: int = 0, units: int = 0) -> Decision:
        """What is to be done, as of now. Look whenever you like: after every unit, too.

        Args:
            mixed: units that were seen in two arms, those whose outcomes had been told by then included.
            units: of how many, in all.
        """
        for name in self.candidates:
            if name not in self._found:
                weighed = [self.weighed(metric.name, name) for metric in self.metrics]
                self._found[name] = about(name, self.metrics, weighed)
        found = {name: self._found[name] for name in self.candidates}
        return decided(self._ratio, found, self.alpha, mixed, units)

    def weighed(self, metric: str, candidate: str) -> MetricEvidence:
        """What is known of a candidate on one metric."""
        comparison, shown = self._comparisons[candidate][metric], self.interval(metric, candidate)
        counts = self.units(metric, self.control), self.units(metric, candidate)
        nothing = self._is_nothing(metric, self.control, candidate)
        return weighed(comparison, self._alphas, len(self.candidates), counts, shown, nothing)

    def _is_nothing(self, metric: str, *arms: str) -> bool:
        """Whether a metric's values are amounts to be compared as a share, and all of these arms were 0 so far."""
        if not self._by_name[metric].relative:
            return False
        found = [each[arm] for each in self._sums[metric].values() for arm in arms if arm in each]
        return bool(found) and all(each.mean == 0.0 and each.squares == 0.0 for each in found)

    def units(self, metric: str, arm: str) -> int:
        """Of a variant, whose outcome counts."""
        return sum(arms[arm].count for arms in self._sums[metric].values() if arm in arms)

    def mean(self, metric: str, arm: str) -> float | None:
        """Of a variant's outcomes; None while there are none. Candidates are compared by `interval`: where outcomes
        drift during a ramp, plain means differ for that alone."""
        found = [arms[arm] for arms in self._sums[metric].values() if arm in arms and arms[arm].count]
        units = sum(each.count for each in found)
        return sum(each.mean * each.count for each in found) / units if units else None

    def interval(self, metric: str, candidate: str) -> Interval | None:
        """Of the difference between a candidate and control, to look at; None before there are two units of each."""
        stages = [
            (arms[self.control], arms[candidate])
            for arms in self._sums[metric].values()
            if self.control in arms and candidate in arms
        ]
        options = self._by_name[metric]
        return interval(stages, relative=options.relative or options.tail is not None)

    def to_dict(self) -> dict[str, Any]:
        """A checkpoint, as JSON has it."""
        return {
            "version": VERSION,
            "control": self.control,
            "candidates": list(self.candidates),
            "alpha": self.alpha,
            "metrics": [metric.model_dump(mode="json") for metric in self.metrics],
            "ratio": self._ratio.state(),
            "comparisons": {
                name: {metric: comparison.state() for metric, comparison in comparisons.items()}
                for name, comparisons in self._comparisons.items()
            },
            "neighbours": {
                name: {metric: each.state() for metric, each in known.items()}
                for name, known in self._neighbours.items()
            },
            "sums": {
                metric: {stage: {arm: sums.state() for arm, sums in arms.items()} for stage, arms in stages.items()}
                for metric, stages in self._sums.items()
            },
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Evidence:
        """Go on from a checkpoint.

        Raises:
            ValueError: it is of another version; replay the outcomes that are stored instead.
        """
        if state.get("version") != VERSION:
            raise ValueError(f"the checkpoint has version {state.get('version')!r}, not {VERSION}: replay the outcomes")
        metrics = [Metric.model_validate(each) for each in state["metrics"]]
        evidence = cls(metrics, state["candidates"], control=state["control"], alpha=state["alpha"])
        evidence._ratio.restore(state["ratio"])
        for name, comparisons in evidence._comparisons.items():
            for metric, comparison in comparisons.items():
                comparison.restore(state["comparisons"][name][metric])
        for name, known in evidence._neighbours.items():
            for metric_name, each in known.items():
                each.restore(state["neighbours"][name][metric_name])
        for metric, stages in state["sums"].items():
            for stage, arms in stages.items():
                evidence._sums[metric][stage] = {arm: Sums.restored(each) for arm, each in arms.items()}
        return evidence

    def _known(self, exposure: Exposure) -> Exposure:
        if exposure.arm != self.control and exposure.arm not in self._comparisons:
            arms = ", ".join((self.control, *self.candidates))
            raise ValueError(f"{exposure.arm!r} is no variant of this experiment, which has {arms}")
        return exposure
