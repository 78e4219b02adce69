"""Everything that holds while a run goes on, and is taken back afterwards, on every way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import dspy

from dspy_prod.compat.mlflow import apart_from_autolog
from dspy_prod.context.current import call_context
from dspy_prod.context.scoring import compiling
from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.lineage import told_by
from dspy_prod.optimize.lms import LMs
from dspy_prod.optimize.metrics import Metrics, optimizers_within
from dspy_prod.optimize.task import Task
from dspy_prod.optimize.terms import Terms
from dspy_prod.policies.run import Run

NO_END: Final = 10**9
"""Errors after which DSPy would give an evaluation up: a bad candidate must not end the run."""


@contextmanager
def in_force(
    task: Task,
    terms: Terms,
    run: Run,
    lms: LMs,
    metrics: Metrics,
    camera: Camera,
    models: set[str],
    quiet: Callable[[], Any],
) -> Iterator[None]:
    """Put every LM under the run's caps, watch the metrics, and keep DSPy from showing and ending things by itself.

    Args:
        task: what. terms: how. run: whose caps. lms: finds the LMs. metrics: watches.
        camera: knows the candidates. models: gets the models of the program's LMs. quiet: silences what DSPy shows.
    """
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(apart_from_autolog())
        stack.enter_context(lms.restored())
        lm = lms.guarded(dspy.settings.lm, "task")
        lms.within(task.optimizer)
        lms.program(task.student, "task")
        teachers = task.arguments.get("teacher")
        for teacher in teachers if isinstance(teachers, list) else [teachers]:
            lms.program(teacher, "teacher")
        lms.within(task.arguments)
        own = getattr(task.optimizer, "task_model", None)
        lm = own if isinstance(own, dspy.BaseLM) else lm
        found = [lm, *(predictor.lm for _, predictor in task.student.named_predictors())]
        models.update(each.model for each in found if isinstance(each, dspy.BaseLM))
        stack.enter_context(told_by(optimizers_within(task.optimizer), lambda: tuple(camera.candidates.all)))
        stack.enter_context(metrics.watched(task.optimizer))
        stack.enter_context(compiling())
        stack.enter_context(dspy.context(lm=lm if isinstance(lm, dspy.BaseLM) else _only(found[1:]), max_errors=NO_END))
        stack.enter_context(call_context(run=run, priority=terms.priority, sample=terms.sample))
        yield


def _only(lms: list[Any]) -> Any:
    """The LM that all predictors have, if it is one: optimizers take it from copies and trust in the configured one."""
    return lms[0] if lms and all(each is lms[0] for each in lms) else None
