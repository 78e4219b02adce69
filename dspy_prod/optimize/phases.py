"""What a run of an optimizer does, from the given program to the best one found.

    baseline   the given program is evaluated on the selection set: what everything is compared with
      └ search     the optimizer itself, under the caps less a reserve, behind the gate
          └ finals     what it left unfinished is evaluated completely, out of the reserve
              └ test       the given program and the best one on untouched examples, when there are any

Whatever ends a phase, the next ones that may still help go on; what is returned is the best complete candidate.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import dspy

from dspy_prod.compat.dspy import copy_of, mark_compiled
from dspy_prod.context.current import call_context
from dspy_prod.errors import BudgetExceededError, ConfigError, RejectedError
from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.choosing import best_of, finalists
from dspy_prod.optimize.first import FirstExample
from dspy_prod.optimize.gate import Closed, Gate
from dspy_prod.optimize.judging import Judge
from dspy_prod.optimize.lms import LMs
from dspy_prod.optimize.metrics import Metrics
from dspy_prod.optimize.outcome import Outcome, Programs
from dspy_prod.optimize.pulse import Pulse
from dspy_prod.optimize.reserve import Reserve
from dspy_prod.optimize.scope import NO_END
from dspy_prod.optimize.seen import Seen
from dspy_prod.optimize.states import rest_of
from dspy_prod.optimize.sums import Sums
from dspy_prod.optimize.supported import fitting
from dspy_prod.optimize.task import Task
from dspy_prod.policies.run import Run

GOES_ON: Final = frozenset({"budget", "calls", "tokens", "time"})
"""Reasons after which the reserve is spent on finalists. After any other one nothing more is called, but for the test
set where a target was met."""


class Phases(ABC):
    """The phases of a run, on what a `Session` keeps."""

    task: Task
    run: Run
    gate: Gate
    judge: Judge
    camera: Camera
    metrics: Metrics
    sums: Sums
    lms: LMs
    reserve: Reserve
    programs: Programs
    pulse: Pulse
    outcome: Outcome
    phase: str
    ends: float | None
    search_ends: float | None

    @property
    @abstractmethod
    def is_satisfied(self) -> bool:
        """Whether it has ended because what was found is enough, and that is to be looked at on the test set."""

    @abstractmethod
    def first_example(self) -> FirstExample:
        """What looks for calls that no cap could hold, from now on."""

    @abstractmethod
    def renew_gate(self) -> Gate:
        """Put up a gate that is open, unless the run was asked to stop."""

    @abstractmethod
    def drain(self) -> int:
        """Wait a moment for calls in flight; how many still are."""

    def _phases(self) -> None:
        """One after another, as far as they may.

        Raises:
            KeyboardInterrupt: Ctrl-C, in any of them.
        """
        outcome = self.outcome
        outcome.given = self.camera.candidates.seen_of(self.task.student)
        outcome.given.origin = "given program"
        outcome.given.evaluated = True
        with self.gate.in_force(self.camera):
            self._baseline(outcome.given)
            if not self.gate.closed:
                self._search(outcome)
        satisfied = self.is_satisfied
        if self.gate.reason is not None:
            outcome.stopped_by, outcome.detail = self.gate.reason, self.gate.detail
            outcome.error = self.gate.error
            if self.gate.reason not in GOES_ON and not satisfied:
                return
        if self.metrics.scores is None:
            return
        for phase in (self._test,) if satisfied else (self._finals, self._test):
            self.drain()  # else what waits in a thread of the phase before would take of the caps of this one
            with self.renew_gate().in_force(self.camera):
                phase(outcome)
            if self.gate.reason is not None and self.gate.reason not in GOES_ON:
                return

    # -- each of them --------------------------------------------------------------------------------------------------
    def _baseline(self, given: Seen) -> None:
        scores = self.metrics.scores
        if scores is None and not self.task.traits.asks:
            return
        with _within(self.search_ends):
            try:
                example = self.task.selection[0][0]
                self.first_example().run(self.task.student, example, scores, self.lms.all)
                self.metrics.scored.refuse_untold()
                if scores is not None:
                    self._evaluate(self.task.student, given)
            except ConfigError as error:
                self.gate.wrong = error
                self.gate.close("failed", str(error), error)
            except Closed:
                pass

    def _search(self, outcome: Outcome) -> None:
        task, gate = self.task, self.gate
        self.phase = self.sums.phase = "search"
        self.judge.largest_usd = self.sums.largest_usd
        self.camera.lineage.restart()
        self.search_ends = self.reserve.keep(self.run, self.ends)
        student = copy_of(task.student)  # an optimizer may change the one that it is given
        mark_compiled(student, False)  # some refuse what another one has made, or they themselves
        call = fitting(task.optimizer, student, task.arguments)
        with _within(self.search_ends):
            try:
                found = task.optimizer.compile(*call.args, **call.kwargs)
            except Closed:
                return
            except RejectedError as error:  # unless a reason has closed it already
                gate.close("budget" if isinstance(error, BudgetExceededError) else "failed", str(error), error)
                return
            except Exception as error:
                if not gate.closed:
                    self.judge.blames_program(error)  # closes the gate where a model is to blame
                    raised, refusal = f"the optimizer raised {_told(error)}", self.judge.refusal
                    if refusal is not None:  # some optimizers cannot do without the one that they asked for
                        gate.close("budget", f"{refusal}. Without it {raised}", refusal)
                    gate.close("failed", raised, error)
                return
        self._returned(outcome, student if found is None else found)

    def _returned(self, outcome: Outcome, program: Any) -> None:
        """Take what the optimizer returned for a candidate."""
        task = self.task
        if not isinstance(program, dspy.Module):
            outcome.warnings.append(
                f"{type(task.optimizer).__name__}.compile returned a {type(program).__name__}, which is no program: "
                "the best one that was seen is returned"
            )
            return
        outcome.program = program
        if self.gate.reason == "interrupted":
            return
        alone = task.traits.opaque or not self.camera.candidates.fits(program)
        if task.traits.free and not alone:
            alone = rest_of(program) != rest_of(task.student)
        outcome.returned = self.camera.candidates.seen_of(program, alone=alone)
        outcome.returned.origin = outcome.returned.origin or "returned by the optimizer"
        outcome.returned.evaluated = True

    def _finals(self, outcome: Outcome) -> None:
        """Evaluate completely what may yet be the best."""
        task = self.task
        completed = outcome.stopped_by == "completed"
        self.phase = self.sums.phase = "finals"
        self.pulse.tell("update")
        ends = self.reserve.keep(self.run, self.ends, final=True)  # what the test set needs
        most = max(1, task.traits.finalists) if completed else None
        with _within(ends):
            done = 0
            while not self.gate.closed and (most is None or done < most):
                left = finalists(self.camera, outcome.returned, self._score_of(outcome.given), task.rounds)
                if not left or (completed and left[0] is not outcome.returned and task.traits.finalists == 0):
                    break
                seen = next((each for each in left if self.reserve.covers(self.run, self.ends, each)), left[0])
                try:
                    self._evaluate(self.programs.of(seen), seen)
                except Closed:
                    break
                done += 1
                if not self.camera.is_complete(seen):
                    break  # some of its answers did not come, so none would come of the next one

    def _test(self, outcome: Outcome) -> None:
        """The given program and the best one on the test set."""
        tested = self.task.testset
        best = best_of(self.camera, outcome.returned)
        self.reserve.free(self.run)
        if not tested or best is None or outcome.given is None:
            return
        self.phase = self.sums.phase = "test"
        with _within(self.ends):
            try:
                for seen in (best,) if best is outcome.given else (outcome.given, best):
                    self._evaluate(self.programs.of(seen), seen, tested)
            except Closed:
                pass
        keys = [self.camera.key(example) for example in tested]
        if all(key in seen.scores for seen in (outcome.given, best) for key in keys):
            given, found = ([seen.scores[key] for key in keys] for seen in (outcome.given, best))
            outcome.tests = given, found
        else:
            outcome.warnings.append("the test set could not be answered completely, so there is no comparison on it")

    def _score_of(self, seen: Seen | None) -> float | None:
        camera = self.camera
        return camera.mean(seen) if seen is not None and camera.is_complete(seen) else None

    def _evaluate(self, program: Any, seen: Seen, examples: Sequence[Any] | None = None) -> None:
        """Have a program answer what it has not answered yet, of the selection set or of other examples.

        Raises:
            Closed: a reason to end came.
        """
        asked = [
            example
            for example in (self.task.selection[0] if examples is None else examples)
            if self.camera.key(example) not in seen.scores
        ]
        if asked and self.metrics.scores is not None:
            self.camera.candidates.seen_of(program, alone=seen.state.program is not None)
            evaluation = dspy.Evaluate(
                devset=asked, metric=self.metrics.scores, num_threads=self.task.num_threads,
                display_progress=False, max_errors=NO_END,
            )  # fmt: skip
            try:
                evaluation(program)
            except RejectedError as error:  # it ends an evaluation as itself
                self.gate.close("failed", str(error), error)
            except Exception:
                if not self.gate.closed:
                    raise  # else DSPy only says that it was cancelled
        self.gate.check()


def _within(ends: float | None) -> Any:
    """Calls inside end at a moment of the monotonic clock."""
    return call_context(deadline=None if ends is None else max(0.001, ends - time.monotonic()))


def _told(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
