"""One run of an optimizer: what belongs to it, what is in force meanwhile, what closes its gate, and how it ends.

What it does in the meantime is told by `phases`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import inf
from typing import Any, Final

from dspy_prod.compat.racing import install
from dspy_prod.context.current import current
from dspy_prod.optimize.camera import Camera
from dspy_prod.optimize.candidates import Progress, Watcher
from dspy_prod.optimize.choosing import best_of
from dspy_prod.optimize.enough import Enough
from dspy_prod.optimize.first import FirstExample
from dspy_prod.optimize.gate import Gate
from dspy_prod.optimize.interrupts import noted
from dspy_prod.optimize.judging import Judge
from dspy_prod.optimize.lineage import Lineage
from dspy_prod.optimize.lms import LMs
from dspy_prod.optimize.metrics import Metrics
from dspy_prod.optimize.outcome import Outcome, Programs
from dspy_prod.optimize.phases import GOES_ON, Phases
from dspy_prod.optimize.progress import progress_of
from dspy_prod.optimize.pulse import Pulse
from dspy_prod.optimize.racing import Contest
from dspy_prod.optimize.reserve import Reserve
from dspy_prod.optimize.scope import in_force
from dspy_prod.optimize.seen import Seen
from dspy_prod.optimize.sums import Sums
from dspy_prod.optimize.task import Task
from dspy_prod.optimize.terms import Terms
from dspy_prod.policies.run import Run
from dspy_prod.runtime.clock import SYSTEM_CLOCK, moment_on
from dspy_prod.telemetry.events import BUS

_ANSWERS: Final = 50
"""So many at most between two looks at what has to be kept back; fewer where a cap is near."""

_LINGER: Final = 0.5
"""Seconds for which the end of a run waits for calls in flight."""

_ENDS: Final = frozenset({"interrupted", "stopped", "failed"})
"""Reasons that are told even if another one had ended the search before."""


class Session(Phases):
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
        told = moment_on(SYSTEM_CLOCK, current().deadline)
        ends = min(told, inf if terms.max_time is None else self.began + terms.max_time)
        self.ends = None if ends == inf else ends
        self.search_ends = self.ends
        self.lms = LMs(run.store)
        self.gate = self._new_gate()
        self.judge = Judge(lambda: self.gate, run, self._is_out_of_time)
        examples, _ = task.selection
        self.contest = None
        if terms.racing is not None and task.traits.races:
            install()
            self.contest = Contest(len(examples), delta=1 - terms.racing, margin=terms.margin)
        models: set[str] = set()
        self._models = models
        self.camera = Camera(
            task.student, examples, [*task.examples, *task.testset], self.judge, models, self.contest,
            self._on_candidate, self._on_answer, Lineage(task.traits, task.arguments), loose=task.traits.loose,
        )  # fmt: skip
        self.metrics = Metrics(self.camera, task.metric)
        self.sums = Sums(run.name, self.lms.roles)
        self.phase = "baseline"
        self.outcome = Outcome()
        self.programs = Programs(task, self.camera, self.outcome)
        self.reserve = Reserve(terms, task, self.sums, self.camera)
        self.enough = Enough(terms)
        self._answers = self._looks_at = 0
        self.pulse = Pulse(self.progress, watchers, self._beat)
        self._asked_to_stop = asked_to_stop
        self._interrupted = False
        self._completed: set[int] = set()
        self._lock = threading.Lock()
        self._broken: BaseException | None = None
        self._stopped: str | None = None

    # -- what others ask -----------------------------------------------------------------------------------------------
    def stop(self, detail: str = "it was asked to stop") -> None:
        """End the run; what is in flight is the last."""
        self._stopped = detail
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
    def _on_close(self, gate: Gate, detail: str) -> None:
        if gate is not self.gate:
            return  # what a phase before has left behind ends none of the later ones
        if gate.reason not in GOES_ON:
            if not self.is_satisfied:
                self.run.stop(detail)
            gate.let_go()
        self.pulse.wake()

    @property
    def is_satisfied(self) -> bool:
        """Whether it has ended because what was found is enough, and that is to be looked at on the test set."""
        return bool(self.task.testset) and (self.gate.reason, self.gate.detail) == self.enough.found

    def renew_gate(self) -> Gate:
        """Put up a gate that is open, unless the run was asked to stop."""
        self.gate = self._new_gate()
        if self._stopped is not None:  # between two phases, when the gate was closed already
            self.gate.close("stopped", self._stopped)
        return self.gate

    def _new_gate(self) -> Gate:
        gate = Gate(lambda detail: self._on_close(gate, detail), foreign=self.terms.foreign == "allow")
        return gate

    def _is_out_of_time(self) -> bool:
        ends = self.search_ends if self.phase in ("baseline", "search") else self.ends
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
        if self.phase != "search" or self.gate.closed or not self.task.traits.finalists:
            return
        self._answers += 1
        if self._answers >= self._looks_at:
            self.reserve.look(self.run, self.ends)
            self._looks_at = self._answers + max(1, int(min(self.reserve.calls_left / 4, _ANSWERS)))

    def _on_candidate(self, seen: Seen) -> None:
        if seen.predicted is not None and seen.found_usd is None:
            seen.found_usd = self.spent_usd
        if self.camera.is_complete(seen) and self._is_first_time(seen):
            seen.found_usd = self.spent_usd
            enough = self.enough.see(self.camera.mean(seen))
            if enough is not None and self.phase in ("baseline", "search"):
                self.enough.found = enough
                self.gate.close(*enough)
        self.pulse.wake()

    def _is_first_time(self, seen: Seen) -> bool:
        with self._lock:  # the thread of its last answer tells of it, and the one that waits for all of them
            first = seen.index not in self._completed
            self._completed.add(seen.index)
        return first

    # -- the run -------------------------------------------------------------------------------------------------------
    def go(self) -> Outcome:
        """Run it.

        Raises:
            ConfigError: something is called that no cap holds, there is no LM, or the metric tells no score; nothing
                more is called, and nothing is lost but the first example.
            LMError: no model could be asked at all, and why.
            KeyboardInterrupt: a second one, while it ends after the first.
        """
        outcome = self.outcome
        remove = BUS.add(self.sums)
        try:
            with noted(self._note_interrupt), self.pulse.beating(), self._holding():
                try:
                    self._phases()
                except KeyboardInterrupt:
                    if self.gate.reason in GOES_ON or self.is_satisfied:  # it was about to go on
                        self.renew_gate()
                    self.gate.close("interrupted", "Ctrl-C")
                if self.gate.wrong is not None:
                    raise self.gate.wrong
                if outcome.stopped_by == "failed" and outcome.error is not None and self._asked_nobody():
                    raise outcome.error  # nothing was answered, so nothing can be lost
        except BaseException as error:
            self._broken = error
            raise
        finally:
            self.phase = "ended"
            try:
                self.run.stop(outcome.detail or "the run has ended")
                self._settle(outcome)
            finally:  # also when a second Ctrl-C comes meanwhile
                remove()
                self._close(outcome)
        return outcome

    def _settle(self, outcome: Outcome) -> None:
        """Wait a moment for what is in flight, so that the report has it; say so where it hangs."""
        left = self.drain()
        if left:
            outcome.warnings.append(
                f"{left} call{'s were' if left > 1 else ' was'} still in flight when the run ended: what they cost is "
                "within the caps, but not in this report"
            )

    def drain(self) -> int:
        """Wait a moment for calls in flight; how many still are."""
        until = time.monotonic() + _LINGER
        while self.camera.in_flight and time.monotonic() < until:
            time.sleep(0.01)
        return len(self.camera.in_flight)

    def _holding(self) -> AbstractContextManager[None]:
        return in_force(self.task, self.terms, self.run, self.lms, self.metrics, self.camera, self._models, self._quiet)

    @contextmanager
    def ready(self) -> Iterator[FirstExample]:
        """Within it programs may be asked under the caps, without a run; what looks at their calls comes back."""
        remove, first = BUS.add(self.sums), self.first_example()
        try:
            with self._holding(), self.gate.in_force(self.camera), first.looking(self.lms.all):
                yield first
        finally:
            remove()

    def first_example(self) -> FirstExample:
        """What looks for calls that no cap could hold, from now on."""
        return FirstExample(self.gate, self.run, self.terms.foreign == "allow")

    def _asked_nobody(self) -> bool:
        total = self.sums.total
        return not (total.answers or total.cached or total.replayed)

    def _close(self, outcome: Outcome) -> None:
        if self.gate.reason in _ENDS or (self.gate.reason is not None and outcome.stopped_by == "completed"):
            assert self.gate.reason is not None
            outcome.stopped_by, outcome.detail = self.gate.reason, self.gate.detail
            outcome.error = self.gate.error
        if self._broken is not None and outcome.stopped_by not in _ENDS:
            interrupted = isinstance(self._broken, KeyboardInterrupt)
            outcome.stopped_by = "interrupted" if interrupted else "failed"
            outcome.detail = "Ctrl-C" if interrupted else f"{type(self._broken).__name__}: {self._broken}"
            outcome.error = self._broken
        outcome.best = best_of(self.camera, outcome.returned)
        for model, count in self.judge.dear.items():
            outcome.warnings.append(
                f"{count} dear call{'s' if count > 1 else ''} of {model} could not be covered by what was left, and "
                "cheaper ones went on: lower its max_tokens, or raise the cap"
            )
        outcome.warnings.extend(self.metrics.scored.warnings())
        if self.contest is not None and self.contest.warning:
            outcome.warnings.append(self.contest.warning)

    def told(self, report: Any) -> None:
        """Tell every watcher that it is over."""
        self.pulse.tell("end", report)
