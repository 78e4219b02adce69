"""What is to be done, and why: invalid before rollback before promotion before keeping on.

A candidate is rolled back once it is proven worse on any metric. It is promoted once it is proven better on a success
metric, and no worse by the margin on every metric that has one (the rule of Schultzberg et al. 2024). A sample ratio
that cannot be chance, or units in two arms, come first: then no evidence says what it seems to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from dspy_prod.experiments.alphas import Alphas
from dspy_prod.experiments.comparing import Comparison
from dspy_prod.experiments.intervals import Interval
from dspy_prod.experiments.trust import CONTAMINATED, SampleRatio, contaminated
from dspy_prod.options.metrics import Metric

Verdict = Literal["invalid", "rollback", "promote", "keep"]
Status = Literal["better", "worse", "no_worse", "unclear", "void"]
RARE: Final = 0.02
"""Where no unit of either variant has had an amount yet, and less is better, it is to be proven that fewer than this
share ever have one: of nothing no margin can be a share. Where more is better, having none says nothing against having
lost all of it."""
MOST_COUNTED: Final = 10_000
"""Units of which that is computed: no more are needed."""
ANSWERS_ALPHA: Final = 0.01
"""A metric is found void for unequal shares of answers with this probability at most, where they are equal."""


@dataclass(frozen=True)
class MetricEvidence:
    """What is known of a candidate on a metric.

    Attributes:
        metric, role: of the metric.
        status: `"void"` when units of the two variants do not answer equally often, though only answers are counted;
            else what is proven: `"worse"` before `"better"` before `"no_worse"` (by the margin) before `"unclear"`.
        better, worse, no_worse: e-values of the three claims, the largest so far; None where there is no such claim. Of
            amounts that were all 0 so far, in both variants, and of which less is better, `no_worse` is that of "fewer
            than one unit in fifty has any", which the first one that is not 0 takes back.
        better_at, worse_at, no_worse_at: e-values that prove them.
        control_units, candidate_units: units whose outcome counts.
        interval: of the difference, to look at; it decides nothing.
        nothing: values are amounts, and all of both variants were 0 so far.
    """

    metric: str
    role: Literal["success", "guardrail"]
    status: Status
    better: float | None
    worse: float
    no_worse: float | None
    better_at: float
    worse_at: float
    no_worse_at: float
    control_units: int
    candidate_units: int
    interval: Interval | None
    nothing: bool = False

    @property
    def safe(self) -> bool:
        """Whether it is proven no worse by the margin, or never has to be."""
        return self.no_worse is None or self.no_worse >= self.no_worse_at


@dataclass(frozen=True)
class CandidateDecision:
    """What to do about one candidate.

    Attributes:
        verdict: `"promote"`, `"rollback"`, `"keep"` (go on), or `"invalid"` (a metric of it is void).
        reason: in words.
        metrics: the evidence, in the order of the experiment's metrics.
    """

    verdict: Verdict
    reason: str
    metrics: tuple[MetricEvidence, ...]


@dataclass(frozen=True)
class Decision:
    """What to do about an experiment, as of a look.

    Attributes:
        verdict: `"invalid"`; `"promote"` once a candidate may be promoted; `"rollback"` once all of them are worse;
            else `"keep"`. One of several that is worse has `"rollback"` in `candidates`.
        reason: in words.
        winner: the candidate that is promoted, the one with the strongest evidence if there are several.
        candidates: the decision about each.
        units: exposed so far.
        crossed: of these, seen in two arms within one stage.
        sample_ratio: e-value of "units do not arrive in the declared shares"; the alarm is raised at 100.
    """

    verdict: Verdict
    reason: str
    winner: str | None
    candidates: Mapping[str, CandidateDecision]
    units: int
    crossed: int
    sample_ratio: float
    alpha: float = field(default=0.05)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**asdict(self), "candidates": {name: asdict(each) for name, each in self.candidates.items()}}


def weighed(
    comparison: Comparison, alphas: Alphas, candidates: int, counts: tuple[int, int], shown: Interval | None,
    nothing: bool = False,
) -> MetricEvidence:  # fmt: skip
    """What a comparison has proven.

    Args:
        comparison: of a candidate with control on a metric.
        alphas: what each claim needs. candidates: how many there are in all.
        counts: units of control and of the candidate. shown: the interval.
        nothing: all amounts of both were 0 so far.
    """
    metric, better, no_worse = comparison.metric, comparison.better, comparison.no_worse
    better_at, no_worse_at, worse_at = 1 / alphas.better, 1 / alphas.no_worse, 1 / alphas.worse(metric)
    unequal = max((each.peak for each in (comparison.more_answers, comparison.fewer_answers) if each), default=0.0)
    higher = better is not None and better.peak >= better_at
    # A score that is better is no worse; of amounts "better" is about what is typical, a margin about the mean.
    implied = higher and not metric.relative and metric.tail is None
    proven = None if no_worse is None else max(no_worse.peak, no_worse_at) if implied else no_worse.peak
    if nothing and proven is not None and metric.direction == "lower":
        proven = max(proven, (1.0 - RARE) ** -min(*counts, MOST_COUNTED))
    if unequal >= 2 * candidates / ANSWERS_ALPHA:
        status: Status = "void"
    elif comparison.worse.peak >= worse_at:
        status = "worse"
    elif higher:
        status = "better"
    else:
        status = "no_worse" if proven is not None and proven >= no_worse_at else "unclear"
    return MetricEvidence(
        metric=metric.name, role=metric.role, status=status,
        better=None if better is None else better.peak, worse=comparison.worse.peak, no_worse=proven,
        better_at=better_at, worse_at=worse_at, no_worse_at=no_worse_at,
        control_units=counts[0], candidate_units=counts[1], interval=shown,
        nothing=nothing,
    )  # fmt: skip


def about(name: str, metrics: Sequence[Metric], evidence: Sequence[MetricEvidence]) -> CandidateDecision:
    """The decision about one candidate, of an experiment that may be believed."""
    found = tuple(evidence)
    worse = [each for each in found if each.status == "worse"]
    void = [each for each in found if each.status == "void"]
    better = [each for each in found if each.status == "better"]
    judged = {metric.name for metric in metrics if metric.judge == "untrusted"}
    lacking = [each.metric for each in found if not each.safe]
    if worse:
        told = " and ".join(f"{each.metric} (e-value {each.worse:.3g} of {each.worse_at:.3g} needed)" for each in worse)
        return CandidateDecision("rollback", f"{name} is worse on {told}", found)
    if void:
        told = " and ".join(each.metric for each in void)
        reason = (
            f"{told}: users of {name} and of control do not answer equally often, so that answers say nothing about "
            "all of them; count missing ones (missing=0.0), or find out why"
        )
        return CandidateDecision("invalid", reason, found)
    anchored = [each for each in better if each.metric not in judged]
    told = " and ".join(f"{each.metric} (e-value {each.better:.3g} of {each.better_at:.3g} needed)" for each in better)
    if anchored and not lacking:
        return CandidateDecision("promote", f"{name} is better on {told}, and nothing is worse", found)
    waits = [f"not proven no worse by the margin on {', '.join(lacking)}"] if lacking else []
    if better and not anchored:
        waits.append("only an untrusted judge says so: record outcomes of users on a sample, or say judge='trusted'")
    first = f"{name} is better on {told}, but " if better else f"{name} is not proven better on any success metric"
    between = "" if better or not waits else ", and "
    return CandidateDecision("keep", first + between + "; ".join(waits), found)


def decided(
    ratio: SampleRatio, candidates: Mapping[str, CandidateDecision], alpha: float, mixed: int = 0, exposed: int = 0
) -> Decision:
    """The decision about the experiment.

    Args:
        ratio: what is known of its units. candidates: the decision about each. alpha: as of `Evidence`.
        mixed, exposed: of all units, also those whose window is not over; see `Evidence.look`.
    """
    crossed, units = max(ratio.crossed, mixed), max(ratio.units, exposed)
    promoted = {name: each for name, each in candidates.items() if each.verdict == "promote"}
    winner: str | None = None
    verdict: Verdict
    if ratio.mismatch:
        verdict, reason = "invalid", (
            f"units do not arrive in the declared shares (e-value {ratio.e_value:.3g}, the alarm is at 100; tested "
            f"units: {ratio.counts}): something loses or moves units, so that the variants' users differ"
        )  # fmt: skip
    elif contaminated(crossed, units):
        verdict, reason = "invalid", (
            f"{crossed} of {units} units were seen in two arms within one stage, more than "
            f"{CONTAMINATED:.0%}: use one stable id a user, and remove overrides"
        )  # fmt: skip
    elif promoted:
        winner = max(promoted, key=lambda name: _strength(promoted[name]))
        verdict, reason = "promote", promoted[winner].reason
    else:
        verdicts = {each.verdict for each in candidates.values()}
        if verdicts == {"rollback"}:
            verdict = "rollback"
        else:
            verdict = "invalid" if verdicts <= {"rollback", "invalid"} else "keep"
        reason = "; ".join(each.reason for each in candidates.values())
    return Decision(verdict, reason, winner, dict(candidates), units, crossed, ratio.e_value, alpha)


def _strength(decision: CandidateDecision) -> float:
    return max(each.better / each.better_at for each in decision.metrics if each.better is not None)
