"""The first example of a run: it shows whether something is called that no cap could hold, before much is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from dspy_prod.compat.calling import looking_at_calls
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
        self._before = frozenset(thread.ident for thread in threading.enumerate())

    def run(self, program: Any, example: Any, metric: Callable[..., Any] | None, lms: Sequence[LM]) -> None:
        """Ask it, and score the answer.

        A failure of the program itself is its score, as in every evaluation.

        Raises:
            Closed: the run is over, by a cap or because somebody calls past it.
        """
        looking: AbstractContextManager[None] = nullcontext()
        if not self._foreign:
            looking = looking_at_calls(tuple({LM, *(type(lm) for lm in lms)}), self._look)
        with looking:
            try:
                answer = program(**example.inputs())
                if metric is not None:
                    metric(example, answer)
            except RejectedError as error:
                self._gate.close("failed", str(error), error)
            except Exception:
                pass  # seen by the camera, which tells the program's failures from others
        self._gate.check()

    def _look(self, lm: Any) -> None:
        """Refuse a call that the run does not know of, from a thread that did not live before."""
        if threading.get_ident() in self._before or self._run in current().guards:
            return
        self._gate.wrong = ConfigError(
            f"The program calls {getattr(lm, 'model', type(lm).__name__)!r} from threads of its own, which know "
            "nothing of this run, so that no cap would hold. Use dspy.Parallel or dspy.asyncify, or enter "
            "dspy_prod.call_context(run=...) in the thread; foreign='allow' leaves such calls uncapped"
        )
        self._gate.close("failed", str(self._gate.wrong), self._gate.wrong)
        raise Closed(self._gate.detail)
