"""The facts of a `Scorecard`, without what it can do with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from dspy_prod.experiments.decisions import CandidateDecision, MetricEvidence, Verdict
from dspy_prod.experiments.ending import unseen
from dspy_prod.experiments.history import Look
from dspy_prod.experiments.unseen import Unseen
from dspy_prod.options.experiments import SHADOW
from dspy_prod.options.metrics import Metric
from dspy_prod.stores.trials import Ended

RATIO_ALARM: Final = 100.0
"""The e-value at which the sample ratio is off."""
RATIO_NOTED: Final = 10.0
"""From here on it is worth a look."""


@dataclass(frozen=True)
class StageUsers:
    """Users of one stage, first seen in it, by variant."""

    stage: str
    users: Mapping[str, int]


@dataclass(frozen=True)
class Waited:
    """Units of a metric that are still waited for.

    Attributes:
        units: how many of those exposed.
        until: when the first of them counts at the latest, in seconds since the epoch; None where none is waited for.
    """

    units: int
    until: float | None


@dataclass(frozen=True)
class Event:
    """A line of the audit: what was decided, by whom, why, and when (seconds since the epoch)."""

    at: float
    what: str
    by: str
    reason: str


@dataclass(frozen=True)
class Facts:
    """What is known of an experiment at a look.

    Attributes:
        name: the experiment's. state: `created`, `running`, `paused`, `stopped` or `decided`.
        stage: of the rollout, as `"5 %"`; `since`: when state or stage changed last, in seconds since the epoch.
        decision: what the evidence says: `keep` (go on), `promote`, `rollback` or `invalid`.
        reason: in words.
        winner: the candidate that is better; None unless `decision` is `promote`.
        candidates: what is known of each, metric by metric.
        users: exposed so far, by the variant that each had first.
        hurt: those who got a candidate that was then rolled back, whether at first or when a later stage moved them.
        crossed: users who were seen in two variants within one stage; they count for nothing.
        late, stray: outcomes after their window, and of users who were never exposed.
        early: outcomes that are dated before their user's exposure; they do not count.
        unpriced: calls of which nobody knows the price, such as cached answers of an earlier release; they do not
            count for costs.
        impossible: by metric, units that have what it cannot be, such as a score above its bounds; they do not count
            for it.
        repeated: calls that count for no guardrail, such as a user's next ones where the first one counts.
        calls: how all calls ended, by the variant that answered: `calls`, `failed`, `fell_back`, `abandoned` (whoever
            called left before it had ended). They decide nothing.
        unkept: exposures for which the store had no room.
        serves: the variant that everybody gets, once it is decided or stopped.
        sample_ratio: e-value of "users do not arrive in the declared shares"; the alarm is raised at 100.
        declared: the metrics, as they were declared.
        stages: users by stage. audit: what was decided, oldest first.
        history: how the evidence grew, a few points of each metric and candidate, oldest first.
        waiting: by metric, who was exposed and does not count yet, since its window, or its call, is not over.
        horizon: when it pauses if it is still undecided, in words; None: never.
        unwritten: why the store cannot be written now, so that what happened since does not count yet; None: it can.
        unseen: how the shadow stage stands, or stood when it ended; None of a rollout without one.
        url: MLflow's page that compares the winner, else the first candidate, with control: what is said of their
            traces, costs and latencies. None while tracking has told of none. Where MLflow is a database, it is the
            page of an `mlflow server` on this machine.
    """

    name: str
    state: str
    stage: str
    since: float
    decision: Verdict
    reason: str
    winner: str | None
    candidates: Mapping[str, CandidateDecision]
    users: Mapping[str, int]
    hurt: int = 0
    crossed: int = 0
    late: int = 0
    stray: int = 0
    serves: str | None = None
    unkept: int = 0
    early: int = 0
    unpriced: int = 0
    impossible: Mapping[str, int] = field(default_factory=dict)
    sample_ratio: float = 1.0
    declared: tuple[Metric, ...] = ()
    stages: tuple[StageUsers, ...] = ()
    audit: tuple[Event, ...] = ()
    history: tuple[Look, ...] = ()
    waiting: Mapping[str, Waited] = field(default_factory=dict)
    unwritten: str | None = None
    unseen: Unseen | None = None
    url: str | None = None
    horizon: str | None = None
    repeated: int = 0
    calls: Mapping[str, Ended] = field(default_factory=dict)

    @property
    def control(self) -> str:
        """The variant that candidates are compared with."""
        return next(iter(self.users))

    @property
    def metrics(self) -> tuple[MetricEvidence, ...]:
        """The evidence on each metric, of the only candidate or of the winner, else of the first."""
        chosen = self.candidates.get(self.winner or "") or next(iter(self.candidates.values()))
        return chosen.metrics

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should be known before the numbers are believed, in words."""
        return tuple(_warnings(self))

    def metric(self, name: str) -> Metric:
        """A metric as it was declared."""
        return next((each for each in self.declared if each.name == name), None) or Metric(name)


def _warnings(card: Facts) -> Iterator[str]:
    if card.unwritten is not None:
        yield f"the store cannot be written: what happened since is not counted yet. {card.unwritten}"
    if card.unseen is not None and card.stage == SHADOW and card.state in ("running", "paused"):
        yield from card.unseen.warnings
    if card.sample_ratio >= RATIO_NOTED:
        raised = card.sample_ratio >= RATIO_ALARM
        yield (
            f"users {'do' if raised else 'may'} not arrive in the declared shares: e-value {card.sample_ratio:.3g}, "
            f"the alarm is at {RATIO_ALARM:.0f}"
        )
    control = card.calls.get(card.control, Ended(card.control))
    yield from unseen(control, card.calls, card.candidates, card.metric)
    if card.crossed:
        yield f"{card.crossed:,} users were seen in two variants within one stage; they count for nothing"
    if card.late:
        yield f"{card.late:,} outcomes came after their window, and were not counted"
    if card.stray:
        yield f"{card.stray:,} outcomes are of users who were never exposed: is the id the same as in call_context?"
    if card.early:
        yield f"{card.early:,} outcomes are dated before their user was exposed, and were not counted: is at= right?"
    if card.unpriced:
        yield (
            f"{card.unpriced:,} calls have no known price, such as cached answers of an earlier release: they are left "
            "out of costs, and count for everything else"
        )
    for metric, units in card.impossible.items():
        yield f"{units:,} units have what {metric} cannot be, and are left out of it: is it declared as what it is?"
    if card.unkept:
        yield f"{card.unkept:,} exposures could not be kept: the store had no room"
