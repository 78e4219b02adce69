"""How a run ended, and the programs that it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.candidates import StoppedBy
from dspy_prod.optimize.seen import Seen
from dspy_prod.optimize.task import Task


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        stopped_by, detail: why. best: the candidate that is returned, None when none is complete.
        returned: what the optimizer itself returned. program: that object. given: the given program.
        tests: scores of the given program and of the best on the test set. error: what ended it, if it failed.
    """

    stopped_by: StoppedBy = "completed"
    detail: str = ""
    best: Seen | None = None
    given: Seen | None = None
    returned: Seen | None = None
    program: Any = None
    tests: tuple[list[float], list[float]] | None = None
    error: BaseException | None = None
    warnings: list[str] = field(default_factory=list)


class Programs:
    """The programs of a run's candidates, with the LMs of the given one.

    Args:
        task: tells the given program. camera: knows the states. outcome: how the run ended.
    """

    def __init__(self, task: Task, camera: Camera, outcome: Outcome) -> None:
        self._task, self._camera, self._outcome = task, camera, outcome

    def of(self, seen: Seen) -> Any:
        """A program in the state of a candidate, to be evaluated."""
        return self._task.student if seen is self._outcome.given else seen.state.put(self._task.student)

    def make(self, key: str) -> Any:
        """The program of a candidate, for whoever asks for it afterwards."""
        return self._with_own_lms(self._camera.candidates.by_key[key].state.put(self._task.student))

    def best(self) -> Any:
        """What the run returns: the best program, the optimizer's own object where it is that one."""
        outcome = self._outcome
        best = outcome.best or outcome.given
        if outcome.program is not None and (
            outcome.returned is best or (outcome.best is None and not self._task.metric)
        ):
            return self._with_own_lms(outcome.program)
        return self._task.student.deepcopy() if best is None else self.make(best.state.key)

    def _with_own_lms(self, program: Any) -> Any:
        own = dict(self._task.student.named_predictors())
        for name, predictor in program.named_predictors():
            if name in own:
                predictor.lm = own[name].lm
        return program
