"""A forecast of a run: a pilot that is really asked, then the rehearsal of all of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod.errors import ConfigError, RejectedError
from dspy_prod.optimize.first import FirstExample
from dspy_prod.optimize.gate import Closed
from dspy_prod.optimize.live import step_by_step
from dspy_prod.optimize.pilot import recording
from dspy_prod.optimize.rehearsal import Forecast, rehearse
from dspy_prod.optimize.scope import NO_END
from dspy_prod.optimize.session import Session


def forecast_of(session: Session, examples: int) -> Forecast:
    """Measure a few examples, and tell what the whole would need; meanwhile the session's view shows how far it is.

    Args:
        session: one that has not begun. examples: how many are really asked.

    Raises:
        ConfigError: something is called that no cap holds. LMError: no model could be asked, and why.
        KeyboardInterrupt: Ctrl-C; nothing more is asked.
    """

    def shown(text: str, total: int | None, unit: str) -> AbstractContextManager[Callable[[], None]]:
        return step_by_step(session.terms.view, f"{session.run.name}: {text}", total=total, unit=unit)

    task, whole = session.task, list(session.task.selection[0])
    chosen = whole[:examples]
    with session.ready():
        scores = session.metrics.scores
        try:
            with recording(task.student, chosen) as pilot, shown("pilot", len(chosen), "example") as step:
                pilot.scored(_asked(session, chosen, _then(scores or _none, step)))
        except KeyboardInterrupt:
            session.gate.close("interrupted", "Ctrl-C")
            raise
        except (Closed, RejectedError):
            gate = session.gate
            raise (gate.wrong or gate.error or ConfigError(f"BudgetedOptimizer.forecast: {gate.detail}")) from None
        optimizer = task.optimizer
        if scores is not None:
            optimizer = _Evaluated(optimizer, whole, scores, task.num_threads)
        return rehearse(
            optimizer, task.student, task.arguments, pilot, baseline=whole if scores is not None else [],
            num_threads=task.num_threads, roles=session.lms.roles, shown=shown,
        )  # fmt: skip


def _asked(session: Session, examples: list[Any], metric: Callable[..., Any]) -> list[tuple[Any, Any, Any]]:
    """What the given program answers, as `EvaluationResult.results` has it; the first one is looked at more closely."""
    if not examples:
        return []
    first, *others = examples
    task, seen = session.task, session.camera.seen_of(session.task.student)
    look = FirstExample(session.gate, session.run, session.terms.foreign == "allow")
    look.run(task.student, first, metric, session.lms.all)
    scored = first, None, seen.scores.get(session.camera.key(first))
    if not others:
        return [scored]
    evaluation = dspy.Evaluate(
        devset=others, metric=metric, num_threads=task.num_threads, display_progress=False, max_errors=NO_END
    )
    return [scored, *evaluation(task.student).results]


class _Evaluated(Teleprompter):
    """An optimizer whose result is evaluated completely, as a run does: free where it has been evaluated before."""

    def __init__(self, optimizer: Any, examples: list[Any], scores: Any, num_threads: int | None) -> None:
        super().__init__()
        self.optimizer, self.examples, self.scores, self.num_threads = optimizer, examples, scores, num_threads

    def compile(self, student: Any, **arguments: Any) -> Any:
        program = self.optimizer.compile(student, **arguments)
        evaluate = dspy.Evaluate(
            devset=self.examples, metric=self.scores, num_threads=self.num_threads, max_errors=NO_END
        )
        evaluate(program)
        return program


def _then(metric: Callable[..., Any], step: Callable[[], None]) -> Callable[..., Any]:
    @wraps(metric)
    def scored(*args: Any, **kwargs: Any) -> Any:
        try:
            return metric(*args, **kwargs)
        finally:
            step()

    return scored


def _none(*_: Any) -> float:
    return 0.0
