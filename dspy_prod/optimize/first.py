"""The first example of a run: it shows whether something is called that no cap could hold, before much is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dspy_prod.compat.calling import is_without_lm, looking_at_calls
from dspy_prod.context.current import current
from dspy_prod.errors import ConfigError, RejectedError
from dspy_prod.lm.lm import LM
from dspy_prod.optimize.gate import Closed, Gate
from dspy_prod.policies.run import Run


class FirstExample:
    """Runs one example alone.

    Args:
        gate: closed when a program calls from threads that know nothing of the run. run: whose caps hold.
        foreign: such calls are allowed.
    """

    def __init__(self, gate: Gate, run: Run, foreign: bool) -> None:
        self._gate, self._run, self._foreign = gate, run, foreign
        self._before = frozenset(threading.enumerate())  # not their idents: those of ended ones are given away again
        self._inside = 0
        self._elsewhere: Any = None

    def run(self, program: Any, example: Any, metric: Callable[..., Any] | None, lms: Sequence[LM]) -> None:
        """Ask it, and score the answer.

        A failure of the program itself is its score, as in every evaluation.

        Raises:
            Closed: the run is over, by a cap, or because somebody calls past it or there is no LM.
        """
        with self.looking(lms):
            try:
                answer = program(**example.inputs())
                if metric is not None:
                    metric(example, answer)
            except RejectedError as error:
                self._gate.close("failed", str(error), error)
            except Exception as error:  # seen by the camera, which tells the program's failures from others
                if is_without_lm(error):
                    self._wrong("the program has no LM: dspy.configure(lm=...), or program.set_lm(...)")
        self.check()

    def check(self) -> None:
        """See what the looks have found.

        Raises:
            Closed: the run is over, or only threads that were there before have called: they are the program's then.
        """
        if self._elsewhere is not None and not self._inside:
            self._wrong(_strayed(self._elsewhere))
        self._gate.check()

    def looking(self, lms: Sequence[LM]) -> AbstractContextManager[None]:
        """Look at every call inside, and refuse what goes past the run."""
        if self._foreign:
            return nullcontext()
        return looking_at_calls(tuple({LM, *(type(lm) for lm in lms)}), self._look)

    def _look(self, lm: Any) -> None:
        """Refuse a call that no run knows of, from a thread that did not live before.

        One of those that did may serve others; but it is the program's where the program has made no other call.
        """
        guards = current().guards
        if self._run in guards:
            self._inside += 1
        elif not guards and threading.current_thread() in self._before:
            self._elsewhere = lm
        elif not guards:
            self._wrong(_strayed(lm))
            raise Closed(self._gate.detail)

    def _wrong(self, what: str) -> None:
        self._gate.wrong = ConfigError(f"BudgetedOptimizer.compile: {what}")
        self._gate.close("failed", str(self._gate.wrong), self._gate.wrong)


def _strayed(lm: Any) -> str:
    return (
        f"the program calls {getattr(lm, 'model', type(lm).__name__)!r} from threads of its own, which know nothing of "
        "this run, so that no cap would hold. Use dspy.Parallel or dspy.asyncify, or enter "
        "dspy_prod.call_context(run=...) in the thread; foreign='allow' leaves such calls uncapped"
    )
