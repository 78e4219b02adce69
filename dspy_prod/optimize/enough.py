"""When what was found is enough: a target is met, or nothing better has come for a while."""

from __future__ import annotations

import threading

from dspy_prod.optimize.candidates import StoppedBy
from dspy_prod.optimize.terms import Terms


class Enough:
    """Looks at the scores of complete candidates, the given program's first.

    Args:
        terms: `stop_at` and `patience`.

    Attributes:
        found: for which of them the search was to end.
    """

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._lock = threading.Lock()
        self._best = float("-inf")
        self._stale = 0
        self.found: tuple[StoppedBy, str] | None = None

    def see(self, score: float) -> tuple[StoppedBy, str] | None:
        """Count a complete candidate; (why to end, in words) where it is enough."""
        target, patience = self._terms.stop_at, self._terms.patience
        with self._lock:
            self._stale = 0 if score > self._best else self._stale + 1
            self._best = max(self._best, score)
            stale = self._stale
        if target is not None and score >= target:
            return "target", f"a candidate scored {score:.4g}, which is at least stop_at={target:g}"
        if patience is not None and stale >= patience:
            return "stopped", f"{stale} complete candidates in a row were no better than the best"
        return None
