"""A call's own fate: what made its outcome another one than that of an identical call."""

from __future__ import annotations

from typing import Any

from dspy_prod.policies.budget import BudgetRule


class Fate:
    """See the module's docstring. Hardly any call has one.

    Attributes:
        budgets: those that had it ask a cheaper model, ask for fewer tokens, or leave a route out.
        short: (when a further attempt would have begun for which it had no time, since when it would have waited), in
            monotonic time, of each that was left out for that.
        left: routes that a budget or run of its own did not let it ask, or could not bound.
    """

    __slots__ = ("budgets", "left", "short")

    def __init__(self) -> None:
        self.budgets: tuple[BudgetRule, ...] = ()
        self.short: tuple[tuple[float, float], ...] = ()
        self.left: tuple[Any, ...] = ()

    def shaped_by(self, rule: BudgetRule) -> None:
        """Note such a budget."""
        if rule not in self.budgets:
            self.budgets += (rule,)

    def left_out(self, route: Any) -> None:
        """Note such a route."""
        if route not in self.left:
            self.left += (route,)

    def was_short(self, until: float, since: float) -> None:
        """Note that a further attempt would have begun at `until`, of a call that waited `since` then."""
        self.short += ((until, since),)
