"""A forecast of a run: a pilot that is really asked, then the rehearsal of all of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import dspy
from dspy.teleprompt.teleprompt import Teleprompter

from dspy_prod.errors import ConfigError
from dspy_prod.optimize.gate import Closed
from dspy_prod.optimize.pilot import recording
from dspy_prod.optimize.rehearsal import Forecast, rehearse
from dspy_prod.optimize.scope import NO_END
from dspy_prod.optimize.session import Session
from dspy_prod.optimize.steps import step_by_step
from dspy_prod.optimize.supported import fitting


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
    with session.ready() as first:
        scores = session.metrics.scores
        try:
            with recording(task.student, chosen) as pilot, shown("pilot", len(chosen), "example") as step:
                evaluation = dspy.Evaluate(
                    devset=chosen, metric=_then(scores or _none, step), num_threads=task.num_threads,
                    display_progress=False, max_errors=NO_END,
                )  # fmt: skip
                pilot.scored(evaluation(task.student).results)
            first.check()
            session.metrics.scored.refuse_untold()
        except KeyboardInterrupt:
            session.gate.close("interrupted", "Ctrl-C")
            raise
        except (Closed, Exception):
            gate = session.gate
            if not gate.closed:
                raise
            raise (gate.wrong or gate.error or ConfigError(f"BudgetedOptimizer.forecast: {gate.detail}")) from None
        optimizer = task.optimizer
        if scores is not None:
            optimizer = _Evaluated(optimizer, whole, scores, task.num_threads)
        return rehearse(
            optimizer, task.student, task.arguments, pilot, baseline=whole if scores is not None else [],
            num_threads=task.num_threads, roles=session.lms.roles, shown=shown,
        )  # fmt: skip


class _Evaluated(Teleprompter):
    """An optimizer whose result is evaluated completely, as a run does: free where it has been evaluated before."""

    def __init__(self, optimizer: Any, examples: list[Any], scores: Any, num_threads: int | None) -> None:
        super().__init__()
        self.optimizer, self.examples, self.scores, self.num_threads = optimizer, examples, scores, num_threads

    def compile(self, student: Any, **arguments: Any) -> Any:
        call = fitting(self.optimizer, student, arguments)
        program = self.optimizer.compile(*call.args, **call.kwargs)
        program = student if program is None else program
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
