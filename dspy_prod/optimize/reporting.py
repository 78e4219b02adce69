"""From a run to its report."""

from __future__ import annotations

import time
from math import isfinite
from typing import Any

from dspy_prod.optimize.candidates import Candidate
from dspy_prod.optimize.choosing import described
from dspy_prod.optimize.rehearsal import Forecast
from dspy_prod.optimize.report import OptimizationReport, Selection, Spent
from dspy_prod.optimize.session import Session
from dspy_prod.optimize.sums import Sum
from dspy_prod.statistics.expected import expected
from dspy_prod.statistics.paired import paired


def report_of(
    session: Session, forecast: Forecast | None = None, experiment_run: str | None = None
) -> OptimizationReport:
    """What a run came to, as far as it came.

    Args:
        session: the run. forecast: what was foretold of it. experiment_run: MLflow's id of it.
    """
    outcome, terms, task = session.outcome, session.terms, session.task
    candidates = described(session.camera, session.sums, outcome.returned)
    by_key = {each.key: each for each in candidates}
    best = by_key.get(outcome.best.state.key) if outcome.best is not None else None
    total, roles, phases = session.sums.snapshot()
    mean, interval = _expected(candidates, best, len(task.selection[0]))
    contest = session.contest
    return OptimizationReport(
        run=session.run.name, optimizer=type(task.optimizer).__name__, stopped_by=outcome.stopped_by,
        detail=outcome.detail, spent_usd=session.spent_usd, unconfirmed_usd=total.unconfirmed_usd,
        spent_by={name: _spent(each) for name, each in roles.items()},
        phases={name: _spent(each) for name, each in phases.items()},
        calls=total.calls, cached=total.cached, replayed=total.replayed, first_new=session.run.first_new,
        tokens=total.tokens, seconds=time.monotonic() - session.began, budget_usd=terms.budget_usd,
        max_calls=terms.max_calls, max_tokens=terms.max_tokens, max_time=terms.max_time, forecast=forecast,
        baseline=by_key.get(outcome.given.state.key) if outcome.given is not None else None, best=best,
        best_score=None if best is None else best.score, expected_score=mean, expected_interval=interval,
        test=None if outcome.tests is None else paired(*outcome.tests), candidates=candidates,
        racing=None if contest is None else contest.raced,
        selection=Selection(len(task.selection[0]), task.selection[1]),
        warnings=(*outcome.warnings, *_strangers(session)),
        experiment_run=experiment_run, _make=lambda candidate: session.programs.make(candidate.key),
    )  # fmt: skip


def _spent(sum_: Sum) -> Spent:
    return Spent(sum_.usd, sum_.calls, sum_.tokens)


def _expected(
    candidates: tuple[Candidate, ...], best: Candidate | None, examples: int
) -> tuple[float | None, tuple[float, float] | None]:
    """What the best one's score would be on new examples of the kind, which the best of many noisy ones overstates."""
    scored = [each for each in candidates if each.scores]
    if best is None or best not in scored:
        return None, None
    if not all(isfinite(score) for each in scored for score in each.scores.values()):
        return None, None  # nothing can be expected of a metric that tells infinity
    found: Any = expected([each.scores for each in scored], examples)[scored.index(best)]
    return found.mean, (found.low, found.high)


def _strangers(session: Session) -> list[str]:
    told = session.run.diverged
    return [] if told is None else [told]
