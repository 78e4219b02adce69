"""What is known of an experiment at a look, and what follows from it. Plain data; views and MLflow read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dspy_prod.experiments.decisions import CandidateDecision, Decision, MetricEvidence, Verdict
from dspy_prod.experiments.variants_in_mlflow import address
from dspy_prod.stores.trials import Arm, Tally, Trial


@dataclass(frozen=True)
class Scorecard:
    """An experiment, as of a look.

    Attributes:
        name: the experiment's. state: `created`, `running`, `paused`, `stopped` or `decided`.
        stage: of the rollout, as `"5 %"`; `since`: when state or stage changed last, in seconds since the epoch.
        decision: what the evidence says: `keep` (go on), `promote`, `rollback` or `invalid`.
        reason: in words.
        winner: the candidate that is better; None unless `decision` is `promote`.
        candidates: what is known of each, metric by metric.
        users: exposed so far, by variant. hurt: of them, those who got a candidate that was then rolled back.
        crossed: users who were seen in two variants within one stage; they count for nothing.
        late, stray: outcomes after their window, and of users who were never exposed.
        serves: the variant that everybody gets, once it is decided or stopped.
        url: MLflow's page that compares the winner, else the first candidate, with control: of what their traces say,
            of costs and latencies. None while tracking has told of none. Where MLflow is a database, it is the page of
            an `mlflow server` on this machine.
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
    url: str | None = None

    @property
    def metrics(self) -> tuple[MetricEvidence, ...]:
        """The evidence on each metric, of the only candidate or of the winner, else of the first."""
        chosen = self.candidates.get(self.winner or "") or next(iter(self.candidates.values()))
        return chosen.metrics

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def scorecard(
    trial: Trial, stage: str, decision: Decision, counts: Sequence[Arm], tally: Tally, variants: Sequence[str],
    serves: str | None, dropped: Sequence[str], tracked: Mapping[str, Any] | None = None,
) -> Scorecard:  # fmt: skip
    """Put together what is known.

    Args:
        trial: as the store has it. stage: in words. decision: of the look. counts, tally: of its units.
        variants: control first. serves, dropped: as in the declaration.
        tracked: where MLflow has them, see `variants_in_mlflow.tracked`.
    """
    users = dict.fromkeys(variants, 0)
    for arm in counts:
        users[arm.arm] += arm.first
    back = [name for name in variants[1:] if name in dropped or (trial.state == "decided" and serves != name)]
    worse = [name for name in back if decision.candidates[name].verdict == "rollback"]
    return Scorecard(
        name=trial.name, state=trial.state, stage=stage, since=trial.since, decision=decision.verdict,
        reason=decision.reason, winner=decision.winner, candidates=decision.candidates, users=users,
        hurt=sum(users[name] for name in worse), crossed=tally.mixed, late=tally.late, stray=tally.stray,
        serves=serves, url=address(tracked, variants, decision.winner or serves),
    )  # fmt: skip
