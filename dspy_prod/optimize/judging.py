"""What a failed call means for a run: the program is wrong, the money is gone, or nobody is there to ask."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from dspy.utils.exceptions import LMError

from dspy_prod.context.current import current
from dspy_prod.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    RejectedError,
    RunStoppedError,
)
from dspy_prod.optimize.candidates import StoppedBy
from dspy_prod.optimize.gate import Closed, Gate, gate_here
from dspy_prod.pipeline.outcome import is_of_the_request
from dspy_prod.policies.run import Run

_BY: Final[dict[str, StoppedBy]] = {"usd": "budget", "calls": "calls", "tokens": "tokens"}
_SMALL: Final = 2
"""As often as the dearest ordinary call must what is left cover it, before a dear one alone counts as refused."""


class Judge:
    """Looks at errors of a run's calls, and closes its gate where one ends the run.

    Args:
        gate: tells the one of now, for calls that came through none.
        run: whose caps are spoken of.
        out_of_time: whether the run's time is over.

    Attributes:
        dear: by model, how many calls were refused while cheaper ones went on. refusal: the last one of them.
    """

    def __init__(self, gate: Callable[[], Gate], run: Run, out_of_time: Callable[[], bool]) -> None:
        self._gate, self._run, self._out_of_time = gate, run, out_of_time
        self._lock = threading.Lock()
        self.dear: dict[str, int] = {}
        self.refusal: BudgetExceededError | None = None
        self.largest_usd = 0.0

    def _close(self, reason: StoppedBy, detail: str, error: Exception | None = None) -> None:
        """Close the gate that the call came through; one that is closed for long learns nothing new."""
        (gate_here() or self._gate()).close(reason, detail, error)

    def blames_program(self, error: BaseException) -> bool:
        """Whether a program's call failed by its own fault, which is a score of 0; any other failure is no score."""
        if not isinstance(error, Exception) or isinstance(error, Closed):
            return False
        if not isinstance(error, LMError):
            return True
        if is_of_the_request(error):
            return True
        if not isinstance(error, RejectedError):
            self._close("failed", f"a model could not be asked: {type(error).__name__}: {error}", error)
        return False

    def refused(self, error: LMError) -> bool:
        """See to what a call of any LM of the run was refused for; whether it was because the run ends."""
        if not isinstance(error, RejectedError):
            return False
        if isinstance(error, RunStoppedError):
            if error.run != self._run.name:  # one around this one
                self._close("stopped", str(error), error)
            return True
        if isinstance(error, DeadlineExceededError):
            ends = self._out_of_time()
            if ends:
                self._close("time", "its time is over")
            return ends
        if isinstance(error, BudgetExceededError):
            return self._out_of_money(error)
        self._close("failed", f"{error.reason}: {error}", error)
        return True

    def _out_of_money(self, error: BudgetExceededError) -> bool:
        owner, _, dimension = error.budget.rpartition(": ")
        if owner != f"run {self._run.name}" or dimension not in _BY:
            self._close("budget", f"another budget refused: {error}", error)
            return True
        left = error.limit_usd - error.spent_usd - error.held_usd
        inside = dict(current().tags).get("candidate") is not None
        if dimension == "usd" and not inside and left > _SMALL * self.largest_usd > 0:
            with self._lock:
                name = error.model or "?"
                self.dear[name] = self.dear.get(name, 0) + 1
                self.refusal = error
            return False  # one dear call does not end a run in which cheap ones go on
        self._close(_BY[dimension], str(error))
        return True
