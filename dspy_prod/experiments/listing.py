"""All experiments of a store, a line each, as they were when somebody looked last."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from dspy_prod.experiments.declaration import Declaration
from dspy_prod.experiments.evidence import Evidence
from dspy_prod.experiments.opened import stage_of
from dspy_prod.experiments.pairs import SUFFIX
from dspy_prod.options.experiments import Rollout
from dspy_prod.stores.trials import DECIDED, Trial, Trials

DAMAGED = "damaged"


@dataclass(frozen=True)
class Listed:
    """An experiment in a list.

    Attributes:
        experiment: its name. state: as the store has it, or `damaged`: it cannot be read, only removed.
        stage: of the rollout, in words. users: exposed so far.
        decision: what was decided; while nothing is, what the evidence said at the last look, None before the first.
        serves: the variant that everybody gets, once it is decided.
        since: when state or stage changed last. created: when it was made; both in seconds since the epoch.
    """

    experiment: str
    state: str
    stage: str | None
    users: int
    decision: str | None
    serves: str | None
    since: float
    created: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def listing(trials: Trials) -> list[Listed]:
    """All experiments of a store, the one that changed last first. Nothing is read that has come since the last look.

    Raises:
        StoreUnavailableError: the store cannot be read.
    """
    kept = [each for each in trials.trials() if not each.name.endswith(SUFFIX)]
    return sorted((_row(trials, each) for each in kept), key=lambda row: -row.since)


def _row(trials: Trials, trial: Trial) -> Listed:
    users = trials.tally(trial.name).units
    try:
        declaration = Declaration.from_json(trial.declaration)
        rollout = None if declaration.rollout is None else Rollout.model_validate(declaration.rollout)
        stage = stage_of(rollout, trial.stage)
        decision = _decision(trials, trial)
    except (TypeError, ValueError, KeyError, IndexError):  # written by somebody else, or by another release
        return Listed(trial.name, DAMAGED, None, users, None, None, trial.since, trial.created)
    return Listed(trial.name, trial.state, stage, users, decision, declaration.serves, trial.since, trial.created)


def _decision(trials: Trials, trial: Trial) -> str | None:
    if trial.state == DECIDED:
        done = [each.what for each in trials.decisions(trial.name) if each.what in ("promote", "rollback")]
        return done[-1] if done else None
    saved = trials.checkpoint(trial.name)
    return None if saved is None else Evidence.from_dict(json.loads(saved.state)["evidence"]).look().verdict
