"""What unseen work of an experiment may cost: a run that knows what it has refused, whatever became of the refusal."""

from __future__ import annotations

from dspy_prod.errors import BudgetExceededError
from dspy_prod.policies.run import Dimension, Run
from dspy_prod.stores.base import Refusal


class Purse(Run):
    """The run of one piece of work after another, in one thread; `open` begins a piece.

    A fallback, or code that handles errors, may answer what it refuses: such an answer tells nothing.

    Attributes:
        has_refused: a call of this piece was refused.
        is_short: one was for what is spent. Where it was for what calls under way hold, there may be money once they
            end.
    """

    has_refused = is_short = False

    def open(self) -> None:
        """Another piece begins."""
        self.has_refused = self.is_short = False

    def refused(self, name: Dimension, refusal: Refusal, model: str, route: str) -> BudgetExceededError:
        """As of `Run`."""
        self.has_refused = True
        self.is_short |= refusal.spent + refusal.amount > refusal.limit
        return super().refused(name, refusal, model, route)
