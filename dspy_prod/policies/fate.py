"""A call's own fate: what made its outcome another one than that of an identical call."""

from __future__ import annotations

from math import inf
from typing import Any

from dspy_prod.policies.budget import BudgetRule


class Fate:
    """See the module's docstring. Hardly any call has one.

    Attributes:
        budgets: those that had it ask a cheaper model, ask for fewer tokens, or leave a route out.
        short: monotonic time by which its deadline came too soon for a further attempt; `inf`: none was left out for
            that.
        left: routes that its own limit did not let it ask, or that no budget or run of its own could bound.
    """

    __slots__ = ("budgets", "left", "short")

    def __init__(self) -> None:
        self.budgets: tuple[BudgetRule, ...] = ()
        self.short = inf
        self.left: tuple[Any, ...] = ()

    def shaped_by(self, rule: BudgetRule) -> None:
        """Note such a budget."""
        if rule not in self.budgets:
            self.budgets += (rule,)

    def left_out(self, route: Any) -> None:
        """Note such a route."""
        if route not in self.left:
            self.left += (route,)

    def was_short(self, until: float) -> None:
        """Note that a further attempt would have begun at `until`."""
        self.short = min(self.short, until)
