"""One run of an optimizer, from the given program to the best one found.

    baseline   the given program is evaluated on the selection set: what everything is compared with
      └ search     the optimizer itself, under the caps less a reserve, behind the gate
          └ finals     what it left unfinished is evaluated completely, out of the reserve
              └ test       the given program and the best one on untouched examples, when there are any

Whatever ends a phase, the next ones that may still help go on; what is returned is the best complete candidate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import inf
from typing import Any, Final

import dspy

from dspy_prod.compat.racing import install
from dspy_prod.context.current import call_context, current
from dspy_prod.errors import BudgetExceededError, RejectedError
from dspy_prod.optimize.camera import Camera, Seen
from dspy_prod.optimize.candidates import Progress, Watcher
from dspy_prod.optimize.choosing import best_of, finalists
from dspy_prod.optimize.first import FirstExample
from dspy_prod.optimize.gate import Closed, Gate
from dspy_prod.optimize.interrupts import noted
from dspy_prod.optimize.judging import Judge
from dspy_prod.optimize.lms import LMs
from dspy_prod.optimize.metrics import Metrics
from dspy_prod.optimize.outcome import Outcome, Programs
from dspy_prod.optimize.progress import progress_of
from dspy_prod.optimize.pulse import Pulse
from dspy_prod.optimize.racing import Contest
from dspy_prod.optimize.reserve import Reserve
from dspy_prod.optimize.scope import NO_END, in_force
from dspy_prod.optimize.sums import Sums
from dspy_prod.optimize.task import Task
from dspy_prod.optimize.terms import Terms
from dspy_prod.policies.run import Run
from dspy_prod.telemetry.events import BUS

_GOES_ON: Final = frozenset({"budget", "calls", "tokens", "time"})
"""Reasons after which the reserve is spent on finalists. After any other one nothing more is called."""

_OFTEN: Final = 0.02
"""Seconds between two looks at what has to be kept back."""

_LINGER: Final = 0.5
"""Seconds for which the end of a run waits for calls in flight."""

_ENDS: Final = frozenset({"interrupted", "stopped", "failed"})
"""Reasons that are told even if another one had ended the search before."""


class Session:
    """Runs a task on terms.

    Args:
        task: what. terms: under which caps, and how. run: the guard that holds the caps, and counts.
        watchers: who is told. asked_to_stop: whether somebody elsewhere wants it to end.
        quiet: silences what DSPy itself shows. spent_before: dollars of earlier parts of the run.
    """

    def __init__(
        self,
        task: Task,
        terms: Terms,
        run: Run,
        watchers: Sequence[Watcher],
        asked_to_stop: Callable[[], bool],
        quiet: Callable[[], Any],
        spent_before: float = 0.0,
    ) -> None:
        self.task, self.terms, self.run = task, terms, run
        self._quiet = quiet
        self.began = time.monotonic()
        self._spent_before = spent_before
        ends = min(current().deadline, inf if terms.max_time is None else self.began + terms.max_time)
        self._ends = None if ends == inf else ends
        self._search_ends = self._ends
        self.lms = LMs(run.store)
        self.gate = self._new_gate()
        self._judge = Judge(lambda: self.gate, run, self._is_out_of_time)
        examples, _ = task.selection
        self.contest = None
        if terms.racing is not None and task.traits.races:
            install()
            self.contest = Contest(len(examples), delta=1 - terms.racing, margin=terms.margin)
        models: set[str] = set()
        self._models = models
        self.camera = Camera(
            task.student, examples, [*task.examples, *task.testset], self._judge, models, self.contest,
            self._on_candidate, self._on_answer, self._origin, grows=task.traits.grows, loose=task.traits.loose,
        )  # fmt: skip
        self.metrics = Metrics(self.camera, task.metric)
        self.sums = Sums(run.name, self.lms.roles)
        self.phase = "baseline"
        self.outcome = Outcome()
        self.programs = Programs(task, self.camera, self.outcome)
        self.reserve = Reserve(terms, task, self.sums, self.camera)
        self._kept_at = 0.0
        self._stale = 0
        self._best_yet = float("-inf")
        self._pulse = Pulse(self.progress, watchers, self._beat)
        self._asked_to_stop = asked_to_stop
        self._interrupted = False
        self._completed: set[int] = set()

    # -- what others ask -----------------------------------------------------------------------------------------------
    def stop(self, detail: str = "it was asked to stop") -> None:
        """End the run; what is in flight is the last."""
        self.gate.close("stopped", detail)

    def progress(self) -> Progress:
        """How far it is."""
        return progress_of(
            self.task, self.terms, self.run.name, self.camera, self.sums, self.outcome, self.phase, self.spent_usd,
            time.monotonic() - self.began, self.run.outages.models,
        )  # fmt: skip

    @property
    def spent_usd(self) -> float:
        """Dollars of the whole run, earlier parts of it included, as far as they are settled."""
        return self._spent_before + self.sums.total.usd

    # -- what closes the gate ------------------------------------------------------------------------------------------
    def _on_close(self, detail: str) -> None:
        if self.gate.reason not in _GOES_ON:
            self.run.stop(detail)
            self.gate.let_go()
        self._pulse.wake()

    def _new_gate(self) -> Gate:
        return Gate(self._on_close, foreign=self.terms.foreign == "allow")

    def _is_out_of_time(self) -> bool:
        ends = self._search_ends if self.phase in ("baseline", "search") else self._ends
        return ends is not None and time.monotonic() >= ends - 0.05

    def _note_interrupt(self) -> None:
        self._interrupted = True

    def _beat(self) -> None:
        if self.phase == "ended" or self.gate.closed:
            return
        if self._interrupted:
            self.gate.close("interrupted", "Ctrl-C")
        elif self._is_out_of_time():
            self.gate.close(
                "time", f"its {self.terms.max_time:g} s are over" if self.terms.max_time else "time is over"
            )
        elif self._asked_to_stop():
            self.stop()

    def _on_answer(self) -> None:
        """Keep back as much as finalists lack now; the optimizer's calls keep the deadline that they began with."""
        now = time.monotonic()
        if self.phase != "search" or self.gate.closed or now - self._kept_at < _OFTEN:
            return
        if self.task.traits.finalists and not self.task.traits.late:
            self._kept_at = now
            self._keep_reserve()

    def _origin(self, number: int) -> str:
        restrict = self.task.arguments.get("restrict")
        seeds = sorted(restrict) if restrict else None
        seed = seeds[number] if seeds is not None and number < len(seeds) else number - 3
        return self.task.traits.origin.format(n=number + 1, seed=seed)

    def _on_candidate(self, seen: Seen) -> None:
        if seen.predicted is not None and seen.found_usd is None:
            seen.found_usd = self.spent_usd
        if self.camera.is_complete(seen) and seen.index not in self._completed:
            self._completed.add(seen.index)
            seen.found_usd = self.spent_usd
            score = self.camera.mean(seen)
            better = score > self._best_yet
            self._best_yet = max(self._best_yet, score)
            self._stale = 0 if better else self._stale + 1
            if self.phase == "search":
                self._enough(score)
        self._pulse.wake()

    def _enough(self, score: float) -> None:
        if self.terms.stop_at is not None and score >= self.terms.stop_at:
            self.gate.close(
                "target", f"a candidate scored {score:.4g}, which is at least stop_at={self.terms.stop_at:g}"
            )
        elif self.terms.patience is not None and self._stale >= self.terms.patience:
            self.gate.close("stopped", f"{self._stale} complete candidates in a row were no better than the best")

    # -- the run -------------------------------------------------------------------------------------------------------
    def go(self) -> Outcome:
        """Run it.

        Raises:
            ConfigError: something is called that no cap holds; nothing more is called, and nothing is lost but the
                first example.
            LMError: no model could be asked at all, and why.
            KeyboardInterrupt: a second one, while it ends after the first.
        """
        outcome = self.outcome
        remove = BUS.add(self.sums)
        try:
            with noted(self._note_interrupt), self._pulse.beating(), self._holding():
                try:
                    self._phases(outcome)
                except KeyboardInterrupt:
                    self.gate.close("interrupted", "Ctrl-C")
                if self.gate.wrong is not None:
                    raise self.gate.wrong
                if outcome.stopped_by == "failed" and outcome.error is not None and self._asked_nobody():
                    raise outcome.error  # nothing was answered, so nothing can be lost
        finally:
            self.phase = "ended"
            try:
                self.run.stop(outcome.detail or "the run has ended")
                self._settle(outcome)
            finally:
                remove()  # also when a second Ctrl-C comes meanwhile
        self._close(outcome)
        return outcome

    def _settle(self, outcome: Outcome) -> None:
        """Wait a moment for what is in flight, so that the report has it; say so where it hangs."""
        left = self._drain()
        if left:
            outcome.warnings.append(
                f"{left} call{'s were' if left > 1 else ' was'} still in flight when the run ended: what they cost is "
                "within the caps, but not in this report"
            )

    def _drain(self) -> int:
        """Wait a moment for calls in flight; how many still are."""
        until = time.monotonic() + _LINGER
        while self.camera.in_flight and time.monotonic() < until:
            time.sleep(0.01)
        return len(self.camera.in_flight)

    def _holding(self) -> AbstractContextManager[None]:
        return in_force(self.task, self.terms, self.run, self.lms, self.metrics, self._models, self._quiet)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Within it programs may be asked under the caps, without a run."""
        remove = BUS.add(self.sums)
        try:
            with self._holding(), self.gate.in_force(self.camera):
                yield
        finally:
            remove()

    def _asked_nobody(self) -> bool:
        total = self.sums.total
        return not (total.answers or total.cached or total.replayed)

    def _close(self, outcome: Outcome) -> None:
        if self.gate.reason in _ENDS or (self.gate.reason is not None and outcome.stopped_by == "completed"):
            assert self.gate.reason is not None
            outcome.stopped_by, outcome.detail = self.gate.reason, self.gate.detail
            outcome.error = self.gate.error
        outcome.best = best_of(self.camera, outcome.returned)
        for model, count in self._judge.dear.items():
            outcome.warnings.append(
                f"{count} dear call{'s' if count > 1 else ''} of {model} could not be covered by what was left, and "
                "cheaper ones went on: lower its max_tokens, or raise the cap"
            )
        if self.contest is not None and self.contest.warning:
            outcome.warnings.append(self.contest.warning)

    def _phases(self, outcome: Outcome) -> None:
        outcome.given = self.camera.seen_of(self.task.student)
        outcome.given.origin = "given program"
        outcome.given.evaluated = True
        with self.gate.in_force(self.camera):
            if self.metrics.scores is not None:
                self._baseline(outcome.given)
            if not self.gate.closed:
                self._search(outcome)
        if self.gate.reason is not None:
            outcome.stopped_by, outcome.detail, outcome.error = self.gate.reason, self.gate.detail, self.gate.error
            if self.gate.reason not in _GOES_ON:
                return
        if self.metrics.scores is None:
            return
        for phase in (self._finals, self._test):
            self._drain()  # else what waits in a thread of the phase before would take of the caps of this one
            self.gate = self._new_gate()
            with self.gate.in_force(self.camera):
                phase(outcome)
            if self.gate.reason is not None and self.gate.reason not in _GOES_ON:
                return

    def _within(self, ends: float | None) -> Any:
        """Calls inside end at a moment of the monotonic clock."""
        return call_context(deadline=None if ends is None else max(0.001, ends - time.monotonic()))

    def _baseline(self, given: Seen) -> None:
        with self._within(self._search_ends):
            try:
                first = FirstExample(self.gate, self.run, self.terms.foreign == "allow")
                first.run(self.task.student, self.task.selection[0][0], self.metrics.scores, self.lms.all)
                self.evaluate(self.task.student, given)
            except Closed:
                pass

    def _search(self, outcome: Outcome) -> None:
        task = self.task
        self.phase = self.sums.phase = "search"
        self._judge.largest_usd = self.sums.largest_usd
        self.camera.evaluations = 0
        self._search_ends = self._keep_reserve()
        with self._within(self._search_ends):
            try:
                outcome.program = task.optimizer.compile(task.student, **task.arguments)
            except Closed:
                return
            except RejectedError as error:  # unless a reason has closed it already
                self.gate.close("budget" if isinstance(error, BudgetExceededError) else "failed", str(error), error)
                return
            except Exception as error:
                if not self.gate.closed:
                    self._judge.blames_program(error)  # closes the gate where a model is to blame
                    self.gate.close("failed", f"the optimizer raised {type(error).__name__}: {error}", error)
                return
        if outcome.program is not None and self.gate.reason != "interrupted":
            outcome.returned = self.camera.seen_of(outcome.program, alone=task.traits.opaque)
            outcome.returned.origin = outcome.returned.origin or "returned by the optimizer"
            outcome.returned.evaluated = True

    def _keep_reserve(self) -> float | None:
        """Keep back what finalists need: all there can be where none is seen before the end, else those there are."""
        traits = self.task.traits
        needed: float | None = float(traits.finalists)
        if traits.finalists and not traits.late:
            seen = finalists(self.camera, None, None)[: traits.finalists]
            needed = sum(self.camera.missing(each) for each in seen) / len(self.camera.keys) if seen else None
        return self.reserve.keep(self.run, self._ends, needed)

    def _finals(self, outcome: Outcome) -> None:
        """Evaluate completely what may yet be the best."""
        completed = outcome.stopped_by == "completed"
        self.phase = self.sums.phase = "finals"
        self._pulse.tell("update")
        ends = self.reserve.keep(self.run, self._ends, 0.0, final=True)  # what the test set needs
        most = max(1, self.task.traits.finalists) if completed else None
        with self._within(ends):
            done = 0
            while not self.gate.closed and (most is None or done < most):
                left = finalists(self.camera, outcome.returned, self._score_of(outcome.given))
                if not left or (completed and left[0] is not outcome.returned and self.task.traits.finalists == 0):
                    break
                seen = left[0]
                try:
                    self.evaluate(self.programs.of(seen), seen)
                except Closed:
                    break
                done += 1
                if not self.camera.is_complete(seen):
                    break  # some of its answers did not come, so none would come of the next one

    def _test(self, outcome: Outcome) -> None:
        """The given program and the best one on the test set."""
        best = best_of(self.camera, outcome.returned)
        self.reserve.free(self.run)
        if not self.task.testset or best is None or outcome.given is None:
            return
        self.phase = self.sums.phase = "test"
        with self._within(self._ends):
            try:
                for seen in (best,) if best is outcome.given else (outcome.given, best):
                    self.evaluate(self.programs.of(seen), seen, self.task.testset)
            except Closed:
                pass
        keys = [self.camera.key(example) for example in self.task.testset]
        if all(key in seen.scores for seen in (outcome.given, best) for key in keys):
            outcome.tests = tuple([[seen.scores[key] for key in keys] for seen in (outcome.given, best)])  # type: ignore[assignment]
        else:
            outcome.warnings.append("the test set could not be answered completely, so there is no comparison on it")

    def _score_of(self, seen: Seen | None) -> float | None:
        return self.camera.mean(seen) if seen is not None and self.camera.is_complete(seen) else None

    def told(self, report: Any) -> None:
        """Tell every watcher that it is over."""
        self._pulse.tell("end", report)

    def evaluate(self, program: Any, seen: Seen, examples: Sequence[Any] | None = None) -> None:
        """Have a program answer what it has not answered yet, of the selection set or of other examples.

        Raises:
            Closed: a reason to end came.
        """
        asked = [
            example
            for example in (self.task.selection[0] if examples is None else examples)
            if self.camera.key(example) not in seen.scores
        ]
        if not asked or self.metrics.scores is None:
            return
        self.camera.seen_of(program, alone=seen.state.program is not None)
        evaluation = dspy.Evaluate(
            devset=asked, metric=self.metrics.scores, num_threads=self.task.num_threads, display_progress=False,
            max_errors=NO_END,
        )  # fmt: skip
        try:
            evaluation(program)
        except RejectedError as error:  # it ends an evaluation as itself
            self.gate.close("failed", str(error), error)
        self.gate.check()
